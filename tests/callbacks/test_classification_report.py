"""ClassificationReport through real trainers, and its figures by what they say and where they say it."""

import csv
import itertools
import json
import os
import warnings
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger
from matplotlib.colors import to_rgb
from PIL import Image
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassConfusionMatrix

from awconv.callbacks import ClassificationReport, draw_confusion_matrix, draw_contact_sheet
from awconv.callbacks.classification_figures import _COLOURS, PredictedPicture, draw_prediction_sheet
from awconv.data.pictures import Unreadable, read_picture
from awconv.errors import InputError
from processes import spawn_two

NAMES = ["cat", "Straße_$x$", "日本", "dog, or $\\frac{", "a, b\n c", "frog"]
K = len(NAMES)


class Classifier(pl.LightningModule):
    """The contract of a classification task, without a network: the "images" are the logits."""

    def __init__(self, class_names=NAMES):
        super().__init__()
        self.class_names = class_names
        self.test_confusion = MulticlassConfusionMatrix(K, ignore_index=-100)

    def test_step(self, batch):
        logits, targets = batch
        self.test_confusion.update(logits, targets)

    def on_test_epoch_end(self):
        self.test_confusion.reset()  # the callback must have read it by now

    def predict_step(self, batch):
        logits, paths = batch
        return {"path": paths, "probabilities": logits.softmax(dim=1)}


class Detector(pl.LightningModule):
    def test_step(self, batch):
        pass

    def predict_step(self, batch):
        return [{"boxes": torch.zeros(0, 4)}]


def logits_and_targets(n=23):
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(n, K, generator=generator)
    targets = torch.randint(0, K - 1, (n,), generator=generator)  # the last class has no images
    targets[4] = -100
    return logits, targets


def counted(logits, targets):
    matrix = np.zeros((K, K), dtype=int)
    for row, target in zip(logits.numpy(), targets.tolist(), strict=True):
        if target != -100:
            matrix[target, int(row.argmax())] += 1
    return matrix


def make_trainer(folder, callback, **options):
    options = {"logger": False, "default_root_dir": folder} | options
    return pl.Trainer(
        accelerator="cpu",
        devices=options.pop("devices", 1),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[callback],
        **options,
    )


def evaluation_batches(logits, targets, size=5):
    return DataLoader(list(zip(logits, targets, strict=True)), batch_size=size)


def predict_batches(logits, paths, size=4):
    return DataLoader([(row, os.fspath(path)) for row, path in zip(logits, paths, strict=True)], batch_size=size)


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def make_pictures(folder, n):
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{name}.png" for name in itertools.islice(map("".join, itertools.permutations("cab_$")), n)]
    for k, path in enumerate(paths):
        Image.new("RGB", (20 + 7 * k, 64), (200, 10 * k % 255, 0)).save(path)
    return paths


def texts_of(figure):
    return [text for axes in figure.axes for text in axes.texts]


def strings_of(figure):
    return [text.get_text() for text in texts_of(figure)]


def assert_readable(figure):
    """Every text is inside the page, no two level texts overlap, and none is smaller than 7 points."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        figure.canvas.draw()
        boxes = [(text, text.get_window_extent()) for text in texts_of(figure) if text.get_text().strip()]
    page = figure.bbox
    for text, box in boxes:
        assert text.get_fontsize() >= 7
        assert page.x0 <= box.x0 < box.x1 <= page.x1, text
        assert page.y0 <= box.y0 < box.y1 <= page.y1, text
    level = [(text, box.padded(-1)) for text, box in boxes if not text.get_rotation()]
    for (a, box_a), (b, box_b) in itertools.combinations(level, 2):
        # A letter's box holds the room of descenders too, so lines may touch by a pixel, but not more.
        overlap = min(box_a.x1, box_b.x1) > max(box_a.x0, box_b.x0) and min(box_a.y1, box_b.y1) > max(
            box_a.y0, box_b.y0
        )
        assert not overlap, (a, b)


# --- after test ---


def test_files_after_test_say_what_was_counted(tmp_path, capsys):
    logits, targets = logits_and_targets()
    expected = counted(logits, targets)
    trainer = make_trainer(tmp_path, ClassificationReport(), logger=CSVLogger(tmp_path, name="run"))
    trainer.test(Classifier(), evaluation_batches(logits, targets), verbose=False)

    folder = Path(trainer.log_dir)
    assert folder != tmp_path
    rows = rows_of(folder / "per_class_accuracy.csv")
    assert [row["class"] for row in rows] == NAMES
    for k, row in enumerate(rows):
        mine = targets == k
        assert int(row["images"]) == int(mine.sum())
        assert int(row["correct"]) == int((logits[mine].argmax(1) == k).sum())
        if mine.any():
            assert float(row["accuracy"]) == pytest.approx(expected[k, k] / expected[k].sum(), abs=1e-6)
    assert rows[-1]["accuracy"] == ""

    with Image.open(folder / "confusion_matrix.png") as picture:
        picture.load()
        assert 500 < picture.width < 2000
        assert 400 < picture.height < 2000
    printed = capsys.readouterr().out.splitlines()
    assert f"confusion matrix: {folder / 'confusion_matrix.png'}" in printed
    assert f"per-class accuracy: {folder / 'per_class_accuracy.csv'}" in printed
    assert sorted(path.name for path in folder.iterdir()) == ["confusion_matrix.png", "per_class_accuracy.csv"]


def test_printed_paths_are_relative_to_the_working_directory(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(tmp_path / "runs", ClassificationReport())
    trainer.test(Classifier(), evaluation_batches(*logits_and_targets()), verbose=False)
    assert f"confusion matrix: {Path('runs/confusion_matrix.png')}" in capsys.readouterr().out.splitlines()


def test_files_of_another_run_are_not_touched_and_own_ones_are_replaced(tmp_path):
    (tmp_path / "per_class_accuracy.csv").write_text("precious")
    trainer = make_trainer(tmp_path, ClassificationReport())
    logits, targets = logits_and_targets()
    model = Classifier()
    trainer.test(model, evaluation_batches(logits, targets), verbose=False)
    trainer.test(model, evaluation_batches(logits[:7], targets[:7]), verbose=False)
    assert (tmp_path / "per_class_accuracy.csv").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "confusion_matrix_2.png",
        "per_class_accuracy.csv",
        "per_class_accuracy_2.csv",
    ]
    rows = rows_of(tmp_path / "per_class_accuracy_2.csv")
    assert sum(int(row["images"]) for row in rows) == 6


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr("awconv.files.csv.writer", full_disk)
    with pytest.raises(OSError, match="no space"):
        make_trainer(tmp_path, ClassificationReport()).test(
            Classifier(), evaluation_batches(*logits_and_targets()), verbose=False
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("logger", [True, False])
def test_fast_dev_run_draws_but_writes_nothing(tmp_path, monkeypatch, capsys, logger):
    monkeypatch.chdir(tmp_path)
    drawn = []

    def spy(*args):
        drawn.append(draw_confusion_matrix(*args))
        return drawn[-1]

    monkeypatch.setattr("awconv.callbacks.classification_report.draw_confusion_matrix", spy)
    pictures = make_pictures(tmp_path / "in", 3)
    trainer = make_trainer(tmp_path, ClassificationReport(), fast_dev_run=True, logger=logger)
    logits, targets = logits_and_targets()
    trainer.test(Classifier(), evaluation_batches(logits, targets), verbose=False)
    trainer.predict(Classifier(), predict_batches(logits[:3], pictures))
    assert len(drawn) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert ".png" not in capsys.readouterr().out


def test_other_tasks_are_left_alone(tmp_path, capsys):
    trainer = make_trainer(tmp_path, ClassificationReport())
    trainer.test(Detector(), DataLoader([1, 2]), verbose=False)
    trainer.predict(Detector(), DataLoader([1, 2]))
    assert list(tmp_path.iterdir()) == []
    assert "png" not in capsys.readouterr().out


def test_missing_class_names_become_numbers_and_wrong_ones_are_an_error(tmp_path):
    trainer = make_trainer(tmp_path, ClassificationReport())
    batches = evaluation_batches(*logits_and_targets())
    trainer.test(Classifier(None), batches, verbose=False)
    assert [row["class"] for row in rows_of(tmp_path / "per_class_accuracy.csv")] == [str(k) for k in range(K)]
    with pytest.raises(InputError, match=r"class_names of Classifier has 2 names: expected 6"):
        trainer.test(Classifier(["a", "b"]), batches, verbose=False)
    with pytest.raises(InputError, match=r"class_names of Classifier has 2 names: expected 6"):
        trainer.predict(Classifier(["a", "b"]), predict_batches(torch.zeros(1, K), ["x.png"]))


# --- after predict ---


def check_predictions(rows, logits, paths):
    """Against NumPy, from the logits."""
    logits = logits.double().numpy()
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = odds / odds.sum(axis=1, keepdims=True)
    expected = sorted((str(path), row) for path, row in zip(paths, probabilities, strict=True) if str(path))
    assert [row["path"] for row in rows] == [path for path, _ in expected]
    for row, (_, shares) in zip(rows, expected, strict=True):
        best = np.argsort(-shares)
        assert row["class"] == row["class_1"] == NAMES[best[0]]
        assert row["probability"] == row["probability_1"]
        for rank in range(5):
            assert row[f"class_{rank + 1}"] == NAMES[best[rank]]
            assert float(row[f"probability_{rank + 1}"]) == pytest.approx(shares[best[rank]], abs=1e-6)
        assert len(row) == 13


def test_files_after_predict(tmp_path, capsys):
    pictures = make_pictures(tmp_path / "in", 10)
    logits = torch.randn(12, K, generator=torch.Generator().manual_seed(1))
    paths = [*pictures[:6], "", *pictures[6:], ""]
    trainer = make_trainer(tmp_path / "out", ClassificationReport(max_pictures=4))
    # Twice: nothing of the first prediction may be left in the second.
    for _ in range(2):
        trainer.predict(Classifier(), predict_batches(logits, paths))
    check_predictions(rows_of(tmp_path / "out/predictions.csv"), logits, paths)
    with Image.open(tmp_path / "out/predictions.png") as picture:
        picture.load()
        assert 400 < picture.width < 2000
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["predictions.csv", "predictions.png"]
    printed = capsys.readouterr().out.splitlines()
    assert printed.count(f"predictions: {tmp_path / 'out/predictions.csv'}") == 2
    assert printed.count(f"contact sheet: {tmp_path / 'out/predictions.png'}") == 2


def test_an_interrupted_prediction_leaves_nothing_to_the_next(tmp_path):
    logits = torch.eye(K)[:5]
    trainer, model = make_trainer(tmp_path, ClassificationReport()), Classifier()

    def broken_at_c(batch):
        if "c.png" in batch[1]:
            raise RuntimeError("truncated")
        return Classifier.predict_step(model, batch)

    model.predict_step = broken_at_c
    with pytest.raises(RuntimeError, match="truncated"):
        trainer.predict(model, predict_batches(logits[:3], ["a.png", "b.png", "c.png"], size=2))
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.partial.jsonl"]
    lines = [json.loads(line) for line in (tmp_path / "predictions.partial.jsonl").read_text().splitlines()]
    assert [line["path"] for line in lines] == ["a.png", "b.png"]
    assert [line["classes"][0]["class"] for line in lines] == NAMES[:2]
    trainer.predict(model, predict_batches(logits[3:], ["d.png", "e.png"]))
    assert [row["path"] for row in rows_of(tmp_path / "predictions.csv")] == ["d.png", "e.png"]


def bad(path):
    """The path of an image that cannot be read."""
    return Unreadable.of(path, InputError(f"{path}: is broken"))


def test_what_was_skipped_is_listed_and_counted(tmp_path, capsys):
    paths = ["a.png", bad("x.png"), "b.png", bad("w.png"), ""]
    trainer = make_trainer(tmp_path, ClassificationReport())
    trainer.predict(Classifier(), predict_batches(torch.eye(K)[:5], paths, size=2))
    assert [row["path"] for row in rows_of(tmp_path / "predictions.csv")] == ["a.png", "b.png"]
    assert rows_of(tmp_path / "skipped.csv") == [
        {"path": "w.png", "reason": "is broken"},
        {"path": "x.png", "reason": "is broken"},
    ]
    assert "2 of 4 images skipped, such as w.png: is broken" in capsys.readouterr().out
    assert not list(tmp_path.glob("*partial*"))


def test_a_prediction_of_nothing_that_can_be_read_fails(tmp_path):
    trainer = make_trainer(tmp_path, ClassificationReport())
    with pytest.raises(InputError) as caught:
        trainer.predict(Classifier(), predict_batches(torch.eye(K)[:2], [bad("x.png"), bad("y.png")]))
    assert str(caught.value) == "predict_dir: none of its images can be read, such as x.png: is broken"
    assert [path.name for path in tmp_path.iterdir()] == ["skipped.csv"]


def test_fewer_classes_than_five_and_ties_and_bfloat16(tmp_path):
    model = Classifier(["no", "yes", "perhaps"])
    shares = torch.tensor([[0.25, 0.5, 0.25], [1 / 3, 1 / 3, 1 / 3]])
    model.predict_step = lambda batch: {"path": batch[1], "probabilities": shares.bfloat16()}
    make_trainer(tmp_path, ClassificationReport()).predict(model, predict_batches(shares, ["a.png", "b.png"]))
    first, second = rows_of(tmp_path / "predictions.csv")
    assert list(first) == ["path", "class", "probability"] + [
        f"{c}_{k}" for k in (1, 2, 3) for c in ("class", "probability")
    ]
    assert [first[f"class_{k}"] for k in (1, 2, 3)] == ["yes", "no", "perhaps"]
    assert [second[f"class_{k}"] for k in (1, 2, 3)] == ["no", "yes", "perhaps"]
    assert float(first["probability"]) == 0.5


def test_only_padding_writes_nothing(tmp_path):
    make_trainer(tmp_path, ClassificationReport()).predict(Classifier(), predict_batches(torch.zeros(3, K), [""] * 3))
    assert list(tmp_path.iterdir()) == []


def test_undecodable_file_names_come_out_as_they_went_in(tmp_path):
    name = os.fsdecode(b"\xff\xfe-caf\xc3\xa9.png")
    make_trainer(tmp_path, ClassificationReport()).predict(Classifier(), predict_batches(torch.zeros(1, K), [name]))
    assert b"\xff\xfe-caf\xc3\xa9.png," in (tmp_path / "predictions.csv").read_bytes()
    assert (tmp_path / "predictions.png").stat().st_size > 1000


# --- two processes ---


def _in_one_of_two_processes(rank, folder, pictures):
    callback = ClassificationReport()
    trainer = make_trainer(folder, callback, devices=2, strategy="ddp", use_distributed_sampler=False)
    logits, targets = logits_and_targets()
    logits, targets = torch.cat([logits, torch.zeros(1, K)]), torch.cat([targets, torch.tensor([-100])])
    trainer.test(Classifier(), evaluation_batches(logits[rank::2], targets[rank::2]), verbose=False)

    paths = [str(path) for path in pictures] + [""]
    trainer.predict(Classifier(), predict_batches(logits[: len(paths)][rank::2], paths[rank::2]))
    assert bool(callback._written) == (rank == 0)


@pytest.mark.slow
def test_two_processes_write_what_one_does(tmp_path):
    pictures = make_pictures(tmp_path / "in", 9)
    spawn_two(_in_one_of_two_processes, tmp_path / "two", pictures)

    logits, targets = logits_and_targets()
    alone = make_trainer(tmp_path / "one", ClassificationReport())
    alone.test(Classifier(), evaluation_batches(logits, targets), verbose=False)
    alone.predict(Classifier(), predict_batches(logits[:9], pictures))
    check_predictions(rows_of(tmp_path / "two/predictions.csv"), logits[:9], pictures)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert len(names) == 4
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


# --- the confusion matrix ---


def some_matrix(classes, images=50, seed=0):
    generator = np.random.default_rng(seed)
    shares = 0.8 * np.eye(classes) + 0.2 * generator.dirichlet(np.full(classes, 0.1), size=classes)
    return np.stack([generator.multinomial(images, row / row.sum()) for row in shares])


@pytest.mark.parametrize("classes", [1, 2, 3, 10, 20, 21, 60, 100, 101, 1000])
def test_confusion_matrix_is_readable_at_every_size(classes):
    figure = draw_confusion_matrix(some_matrix(classes), [f"class number {k}" for k in range(classes)])
    assert_readable(figure)
    width, height = figure.get_size_inches()
    assert 2 < width < 26
    assert 2 < height < 26


def test_figure_grows_with_the_number_of_classes():
    areas = [
        np.prod(draw_confusion_matrix(some_matrix(k), [str(i) for i in range(k)]).get_size_inches())
        for k in (2, 10, 20, 100)
    ]
    assert areas == sorted(areas)
    assert areas[0] < areas[-1] / 4


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.text(max_size=60), min_size=1, max_size=12),
    st.sampled_from([1, 30, 100_000, 10_000_000]),
)
def test_confusion_matrix_takes_any_names(names, images):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        assert_readable(draw_confusion_matrix(some_matrix(len(names), images), names))


def test_confusion_matrix_says_counts_accuracies_and_names():
    matrix = np.array([[7, 1, 0], [0, 12, 3], [0, 0, 0]])
    figure = draw_confusion_matrix(matrix, ["$a_1$", "b", "c"])
    strings = strings_of(figure)
    assert strings[0] == "Top-1 82.61% on 23 test images"  # 19 of 23
    assert [s for s in strings if s.isdigit()] == [str(n) for n in matrix.flatten()]
    assert strings.count("$a_1$") == 2
    assert [s for s in strings if "%" in s and " of " in s] == ["87.5% of 8", "80.0% of 15"]
    assert strings.count("no images") == 1
    assert not any(text.get_parse_math() for text in texts_of(figure))


def test_rows_are_true_classes_and_normalised():
    matrix = np.array([[8, 2], [0, 5]])
    image = draw_confusion_matrix(torch.from_numpy(matrix), ["a", "b"]).axes[0].images[0]
    np.testing.assert_allclose(image.get_array(), [[0.8, 0.2], [0, 1]])
    left, right, bottom, top = image.get_extent()
    assert left < right
    assert bottom > top  # the sheet's y runs downwards, so row 0 is on top
    figure = image.figure
    assert figure.axes[0].yaxis_inverted()
    counts = {t.get_text(): t.get_position() for t in texts_of(figure) if t.get_text() in {"8", "2"}}
    assert counts["2"][0] > counts["8"][0]
    assert counts["2"][1] == counts["8"][1]


def contrast(a, b):
    def luminance(colour):
        c = np.array(to_rgb(colour))
        linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722] + 0.05

    low, high = sorted([luminance(a), luminance(b)])
    return high / low


def test_counts_stand_out_from_their_cells():
    images = 1000
    wrong = np.arange(1, 20) * 50
    matrix = np.diag(np.append(images - wrong, images))
    matrix[np.arange(19), 19] = wrong
    figure = draw_confusion_matrix(matrix, [str(k) for k in range(20)])
    image = figure.axes[0].images[0]
    cells = [text for text in texts_of(figure) if text.get_ha() == "center" and not text.get_rotation()]
    cells = [t for t in cells if t.get_text().isdigit()][-400:]
    inks = set()
    for text, share in zip(cells, np.asarray(image.get_array()).flatten(), strict=True):
        if share:
            inks.add(text.get_color())
            assert contrast(text.get_color(), image.cmap(image.norm(share))[:3]) >= 4
    assert len(inks) == 2


def test_colours_are_perceptually_uniform():
    """Equal steps of the map are nearly equal steps of CIE lightness, which falls throughout."""
    rgb = _COLOURS(np.linspace(0, 1, 65))[:, :3]
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    y = linear @ [0.2126, 0.7152, 0.0722]
    lightness = np.where(y > 0.008856, 116 * np.cbrt(y) - 16, 903.3 * y)
    steps = -np.diff(lightness)
    assert steps.min() > 0
    assert steps.max() / steps.mean() < 1.35
    assert steps.min() / steps.mean() > 0.65


@pytest.mark.parametrize("classes", [21, 100, 400])
def test_most_confused_pairs_are_listed_in_order(classes):
    matrix = np.diag(np.full(classes, 90))
    matrix[3, 7], matrix[7, 3], matrix[20, 0] = 30, 10, 20
    strings = strings_of(draw_confusion_matrix(matrix, [f"k{i}" for i in range(classes)]))
    assert [s for s in strings if "→" in s][1:] == ["k3 → k7", "k20 → k0", "k7 → k3"]
    start = strings.index("k3 → k7") - 1
    assert strings[start : start + 6 : 2] == ["30 of 120", "20 of 110", "10 of 100"]
    if classes > 100:
        start = strings.index("Lowest accuracy")
        assert strings[start + 1 : start + 7] == ["75.0% of 120", "k3", "81.8% of 110", "k20", "90.0% of 100", "k7"]
    else:
        assert "75.0% of 120" in strings


def test_no_test_images():
    strings = strings_of(draw_confusion_matrix(np.zeros((3, 3), dtype=int), ["a", "b", "c"]))
    assert strings[0] == "No test images"
    assert strings.count("no images") == 3


@pytest.mark.parametrize(
    ("matrix", "names", "message"),
    [
        (np.zeros((2, 3)), ["a", "b"], r"matrix of shape \(2, 3\): expected square"),
        (np.zeros(4), ["a", "b"], r"matrix of shape \(4,\)"),
        (np.zeros((0, 0)), [], r"matrix of shape \(0, 0\)"),
        (-np.eye(2), ["a", "b"], "none below zero"),
        (np.eye(2), ["a"], "class_names has 1 names: expected 2"),
    ],
)
def test_confusion_matrix_refuses(matrix, names, message):
    with pytest.raises(InputError, match=message):
        draw_confusion_matrix(matrix, names)


# --- the contact sheet ---


@pytest.mark.parametrize(("n", "most", "shown"), [(1, 36, 1), (7, 36, 7), (36, 36, 36), (50, 36, 36), (50, 9, 9)])
def test_contact_sheet_shows_pictures_with_class_and_probability(tmp_path, n, most, shown):
    paths = make_pictures(tmp_path, n)
    names = [f"quite a long name of class {k}" for k in range(n)]
    figure = draw_contact_sheet(paths, names, [0.5 + k / 200 for k in range(n)], max_pictures=most)
    assert_readable(figure)
    assert len(figure.axes[0].images) == shown
    strings = strings_of(figure)
    assert strings[0].startswith(f"{n} prediction" if n == shown else f"{shown} of {n} predictions")
    percents = [s for s in strings if s.endswith("%")]
    assert len(percents) == shown
    assert percents[0] == "50.0%"
    assert percents[-1] == f"{0.5 + (n - 1) / 200:.1%}"
    assert next(s for s in strings if s.endswith(".png")) == paths[0].name


@pytest.mark.parametrize("size", [(300, 100), (100, 300), (8, 8), (2000, 10), (1, 1)])
def test_pictures_keep_their_aspect(tmp_path, size):
    Image.new("RGB", size, "red").save(tmp_path / "a.png")
    figure = draw_contact_sheet([tmp_path / "a.png"], ["a"], [1.0])
    left, right, bottom, top = figure.axes[0].images[0].get_extent()
    assert (right - left) / (bottom - top) == pytest.approx(size[0] / size[1], rel=0.15)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(tmp_path, orientation):
    upright = Image.new("RGB", (60, 40), "black")
    upright.paste("red", (0, 0, 20, 10))  # its top left corner
    # What a camera held that way stores: the inverse of what EXIF says a viewer has to do.
    transpose = Image.Transpose
    stored = {
        1: upright,
        2: upright.transpose(transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(transpose.ROTATE_180),
        4: upright.transpose(transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(transpose.TRANSPOSE),
        6: upright.transpose(transpose.ROTATE_90),
        7: upright.transpose(transpose.TRANSVERSE),
        8: upright.transpose(transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x112] = orientation
    stored.save(tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    pixels = np.asarray(draw_contact_sheet([tmp_path / "a.jpg"], ["a"], [1.0]).axes[0].images[0].get_array())
    assert pixels.shape[:2] == (40, 60)
    assert pixels[3, 8, 0] > 200
    for y, x in ((3, 55), (35, 8), (35, 55)):
        assert pixels[y, x, 0] < 60


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "I;16"])
def test_every_mode_that_the_network_gets_is_drawn(tmp_path, mode):
    ramp = np.linspace(0, 1, 30)[None].repeat(20, 0)
    if mode == "I;16":
        picture = Image.fromarray((ramp * 65000).astype(np.uint16))
    else:
        picture = Image.fromarray((ramp * 255).astype(np.uint8)).convert("RGB").convert(mode)
    assert picture.mode == mode
    picture.save(tmp_path / "a.tif")
    (image,) = draw_contact_sheet([tmp_path / "a.tif"], ["a"], [1.0]).axes[0].images
    pixels = np.asarray(image.get_array())
    assert pixels.shape == (20, 30, 3)
    assert pixels[:, -1].mean() > 240
    assert pixels[:, 0].mean() < 15


def test_transparent_parts_are_drawn_as_the_network_gets_them(tmp_path):
    Image.new("RGBA", (5, 5), (255, 30, 0, 0)).save(tmp_path / "a.png")
    (image,) = draw_contact_sheet([tmp_path / "a.png"], ["a"], [1.0]).axes[0].images
    assert (np.asarray(image.get_array()) == [255, 30, 0]).all()
    assert (read_picture(tmp_path / "a.png").permute(1, 2, 0).numpy() == [255, 30, 0]).all()


def test_unreadable_files_are_told_and_cost_no_others(tmp_path):
    (good,) = make_pictures(tmp_path, 1)
    whole = good.read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no picture")
    paths = [tmp_path / "cut.png", good, tmp_path / "missing.png", tmp_path / "text.png"]
    figure = draw_contact_sheet(paths, ["a"] * 4, [0.5] * 4)
    assert len(figure.axes[0].images) == 1
    assert strings_of(figure).count("cannot be read") == 3


def test_contact_sheet_refuses():
    with pytest.raises(InputError, match="lengths 0, 0 and 0: expected the same length, at least 1"):
        draw_contact_sheet([], [], [])
    with pytest.raises(InputError, match="lengths 2, 1 and 2"):
        draw_contact_sheet(["a", "b"], ["a"], [1, 1])
    with pytest.raises(InputError, match="max_pictures=0: expected at least 1"):
        draw_contact_sheet(["a"], ["a"], [1], max_pictures=0)
    with pytest.raises(InputError, match="max_pictures=-1"):
        ClassificationReport(max_pictures=-1)


def test_missing_glyphs_are_told_once(tmp_path):
    model = Classifier(["\U00013000\U00013001" + name for name in NAMES])  # Egyptian hieroglyphs
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(tmp_path, ClassificationReport()).test(
            model, evaluation_batches(*logits_and_targets()), verbose=False
        )
    messages = [str(warning.message) for warning in caught]
    assert not any("missing from font" in message for message in messages)
    assert sum("installed fonts lack" in message for message in messages) == 1


# ---- the sheet of predictions --------------------------------------------------------------------------------------


def some_predictions(n, size=(40, 30)):
    picture = Image.new("RGB", size, (10, 120, 200))
    return [PredictedPicture(picture, k % K, (k * k) % K, 0.9 - k / 50, k / 50, 1.5) for k in range(n)]


@pytest.mark.parametrize("counts", [(1, 0), (3, 5), (12, 12), (0, 2)])
def test_a_sheet_of_predictions_is_readable(counts):
    parts = dict(zip(("A fixed sample", "Highest loss"), map(some_predictions, counts), strict=True))
    figure = draw_prediction_sheet(parts, NAMES)
    assert_readable(figure)
    strings = strings_of(figure)
    assert [heading for heading in parts if parts[heading]] == [s for s in strings if s in parts]
    shown = [entry for part in parts.values() for entry in part]
    assert sum(s.startswith("is ") for s in strings) == sum(entry.target != entry.predicted for entry in shown)
    wrong = [text.get_text() for text in texts_of(figure) if text.get_color() == "#c8102e"]
    assert wrong.count("90.0%") == sum(e.target != e.predicted and e.probability == 0.9 for e in shown)


def test_a_probability_that_is_no_number_can_be_drawn():
    entry = some_predictions(1)[0]._replace(probability=float("nan"), of_target=float("nan"), predicted=2)
    assert_readable(draw_prediction_sheet({"Highest loss": [entry]}, NAMES))


def test_a_sheet_without_pictures_is_refused():
    with pytest.raises(InputError, match="parts holds no pictures"):
        draw_prediction_sheet({"Highest loss": []}, NAMES)


def test_the_title_of_a_confusion_matrix_says_of_what():
    strings = strings_of(draw_confusion_matrix(np.eye(K, dtype=int), NAMES, of="validation images"))
    assert "Top-1 100.00% on 6 validation images" in strings
