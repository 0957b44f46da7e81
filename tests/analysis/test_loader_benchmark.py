"""The benchmark of the loaders, on few pictures: what is delivered, and what is said of it."""

import json

import pytest
import torch
from PIL import Image

from awconv.analysis import benchmark, loader_benchmark, measurement
from awconv.analysis.loader_benchmark import benchmark_loaders
from awconv.errors import InputError
from miniature import make_class_folders

PIPELINES = [
    ("JPEG to 224x224", "torchvision ImageFolder"),
    ("JPEG to 224x224", "ImageNetDataModule"),
    ("JPEG to 224x224", "ImageNetDataModule decode_on_device"),
    ("CIFAR-10", "torchvision CIFAR10"),
    ("CIFAR-10", "CIFAR10DataModule"),
    ("CIFAR-10", "CIFAR10DataModule keep_on_device"),
]


@pytest.fixture(autouse=True)
def _few_pictures(monkeypatch):
    monkeypatch.setattr(loader_benchmark, "_CIFAR_PICTURES", 32)


def test_every_pipeline_delivers_the_same_pictures(monkeypatch):
    """Whole batches of normalised pictures, as many from each, in every pass."""
    batches = {}

    def watched(loader, device):
        seen = batches.setdefault(len(batches), [])

        def call():
            seen.append([(images.shape, images.dtype, targets.dtype, images.abs().max()) for images, targets in loader])
            return sum(shape[0] for shape, *_ in seen[-1])

        return call

    monkeypatch.setattr(loader_benchmark, "_pass", watched)
    rows = benchmark_loaders(None, device="cpu", batch=3, workers=1, repeats=2)
    assert [(row["data"], row["pipeline"]) for row in rows] == PIPELINES
    for number, (data, _) in enumerate(PIPELINES):
        side = 224 if data.startswith("JPEG") else 32
        for delivered in batches[number]:
            assert len(delivered) == (8 if side == 224 else 32 // 3)
            for shape, dtype, target_dtype, largest in delivered:
                assert shape == (3, 3, side, side)
                assert (dtype, target_dtype) == (torch.float32, torch.int64)
                assert 1 < largest < 3


def test_records_are_rates_of_what_was_delivered():
    rows = benchmark_loaders(None, device="cpu", batch=2, workers=1, repeats=3)
    for row in rows:
        assert row["pictures"] == (32 if row["data"] == "CIFAR-10" else 16)
        rates = sorted(1e3 * row["pictures"] / t for t in row["times_ms"])
        assert row["pictures_per_second"] == pytest.approx(rates[1])
        low, high = row["quartiles_per_second"]
        assert rates[0] <= low <= row["pictures_per_second"] <= high <= rates[-1]
    for first, others in ((rows[0], rows[:3]), (rows[3], rows[3:])):
        for row in others:
            assert row["ratio"] == pytest.approx(row["pictures_per_second"] / first["pictures_per_second"])
    assert len({row["pipeline"] for row in rows}) == 6


@pytest.mark.parametrize(("left_out", "without"), [(PIPELINES[4], 1), (PIPELINES[3], 3)])
def test_pipelines_that_are_not_reached_are_told_and_not_run(monkeypatch, left_out, without):
    """Without torchvision's pipeline there is nothing to compare the others of its data with."""
    place, ran = PIPELINES.index(left_out) - 3, []
    draw = loader_benchmark._pass
    monkeypatch.setattr(
        loader_benchmark, "_pass", lambda loader, device: lambda: ran.append(1) or draw(loader, device)()
    )

    def measure(cases, **options):
        assert options["deadline"] == 7.0
        names = [[name for i, name in enumerate(case) if (k, i) != (1, place)] for k, case in enumerate(cases)]
        for case, kept in zip(cases, names, strict=True):
            for name in kept:
                case[name]()
        return [{name: measurement.Measurement([2.0] * 3, 0) for name in kept} for kept in names]

    monkeypatch.setattr(loader_benchmark, "measure_interleaved", measure)
    rows = benchmark_loaders(None, device="cpu", batch=2, workers=1, repeats=3, deadline=7.0)
    assert len(ran) == 5
    assert [(row["data"], row["pipeline"]) for row in rows] == PIPELINES
    assert [row["pictures_per_second"] for row in rows].count(None) == without
    assert rows[place + 3]["pictures_per_second"] is None
    assert [row["pictures_per_second"] for row in rows[:3]] == [8.0] * 3
    table = loader_benchmark.loaders_table(rows).splitlines()
    assert sum(line.count("not reached") for line in table) == without


def test_no_time_at_all_runs_no_pipeline(monkeypatch, capsys):
    monkeypatch.setattr(loader_benchmark, "_pass", lambda loader, device: pytest.fail)
    rows = benchmark_loaders(None, device="cpu", batch=2, workers=1, repeats=3, deadline=0.0)
    assert [row["pictures_per_second"] for row in rows] == [None] * 6
    monkeypatch.setattr(loader_benchmark, "benchmark_loaders", lambda *_, **__: rows)
    benchmark.main(["loader", "--batch", "2"])
    out = capsys.readouterr().out
    assert out.count("not reached") == 6
    assert "of no interleaved passes" in out


def test_drawn_pictures_are_about_as_large_as_those_of_imagenet():
    with loader_benchmark._folder_of_pictures(None, 70, 1) as folder:
        paths = sorted(folder.rglob("*.jpg"))
        assert len(paths) == 70
        sizes = [path.stat().st_size for path in paths]
        assert 80e3 < sum(sizes) / 70 < 140e3
        assert len({path.read_bytes() for path in paths}) == 64
        with Image.open(paths[0]) as picture:
            assert picture.size == (500, 375)
    assert not folder.exists()


def test_pictures_of_a_folder_are_a_random_choice_with_their_classes(tmp_path):
    root = make_class_folders(tmp_path / "pictures", train=9)
    with loader_benchmark._folder_of_pictures(root, 10, 4) as folder:
        found = sorted((folder / "train").rglob("*.*"))
        stored = {path.read_bytes(): path.parent.name for path in (root / "train").rglob("*.*")}
        assert len({path.read_bytes() for path in found}) == 10
        assert all(stored[path.read_bytes()] == path.parent.name for path in found)
        assert len({path.parent for path in found}) == 3
    assert len(list((root / "train").rglob("*.*"))) == 27


def test_a_device_that_decodes_nothing_has_no_record_of_it(monkeypatch):
    def refuse(argument, device):
        raise InputError("none here")

    monkeypatch.setattr("awconv.data.imagenet.require_decoder", refuse)
    rows = benchmark_loaders(None, device="cpu", batch=2, workers=1, repeats=1)
    assert [row["pipeline"] for row in rows] == [name for _, name in PIPELINES if "decode" not in name]


def test_the_command_prints_a_table_and_writes_the_records(tmp_path, capsys):
    root = make_class_folders(tmp_path / "pictures")
    file = tmp_path / "rows.json"
    benchmark.main(
        ["loader", "--repeats", "1", "--batch", "4", "--workers", "1", "--root", str(root), "--json", str(file)]
    )
    out, err = capsys.readouterr()
    assert err == ""
    record = json.loads(file.read_text())
    assert record["benchmark"] == "loader"
    assert record["arguments"] == {
        "device": "cpu", "batch": 4, "repeats": 1, "workers": 1, "root": str(root),
    }  # fmt: skip
    assert [row["pictures"] for row in record["rows"]] == [12, 12, 12, 32, 32, 32], "three classes of four pictures"
    lines = out.splitlines()
    assert "batch 4" in lines[0]
    assert len({len(line) for line in lines if line.startswith("|")}) == 1
    rate = f"{record['rows'][1]['pictures_per_second']:,.0f}"
    assert any("ImageNetDataModule" in line and rate in line for line in lines)


@pytest.mark.parametrize(
    ("folders", "batch", "told"),
    [
        ((), "4", "train"),
        (("train/cat",), "4", "found only cat"),
        (("train/cat", "train/dog"), "4", "train/cat"),
        (None, "20", "12 pictures to train on, less than a batch"),
    ],
)
def test_a_folder_without_enough_pictures_is_told_in_one_line(tmp_path, capsys, folders, batch, told):
    root = tmp_path / "pictures"
    if folders is None:
        make_class_folders(root)
    for folder in folders or ():
        (root / folder).mkdir(parents=True)
    with pytest.raises(SystemExit) as exit:
        benchmark.main(["loader", "--batch", batch, "--workers", "1", "--root", str(root)])
    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert told in err
