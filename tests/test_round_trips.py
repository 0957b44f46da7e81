"""What one command writes, the next reads as it was: names, paths, seeds and numbers."""

import math
import os
import signal
import unicodedata
from pathlib import Path

import jsonargparse._typehints
import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks.timer import Interval
from PIL import Image

from awconv import config_text
from awconv.files import read_csv

NAMES = [
    *("1e5", "7e10", "1E5", ".5e3", "1_000", "0x1F", "0o17", "017", "0b1", "1.0", "-3", "+1", ".inf", ".nan", "NaN"),
    *("null", "Null", "~", "None", "yes", "no", "on", "Off", "y", "true", "False", "2024-01-01", "12:30:45"),
    *("a: b", "a #b", "#c", "- d", "-", "[e]", "{f: g}", "'h'", '"i"', "it's", "!tag", "&anchor", "*alias", "%dir"),
    *("`tick", "|", ">", "?", "? k", ":", ", x", "back\\slash", "tab\tbed", "two\nlines", " ahead", "behind ", "="),
    *("@at", "  ", "2024-1-1 1:1:1", "<<", "---", "...", "ünï", "É", "猫", "🐈", "\u2028", "\x85", "\x1b[31m"),
    *("\ufeffbom", "$HOME", "${model.lr}"),
]  # fmt: skip


def words(**options):
    return st.sampled_from(NAMES) | st.text(**options)


# ---- the dialect -------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words(),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(words(), values, max_size=4),
    max_leaves=12,
)


def same(one: object, other: object) -> bool:
    """Equal, of the same types, and with NaN equal to itself."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or (isinstance(one, float) and math.isnan(one) and math.isnan(other))


@settings(max_examples=300, deadline=None)
@given(VALUES)
@example({name: name for name in NAMES})
def test_what_is_written_is_read_as_it_was(value):
    written = config_text.dump(value)
    assert same(config_text.load(written), value)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(words(), words(), max_size=4))
@example({name: name for name in NAMES})
def test_names_mean_the_same_to_whoever_reads_with_pyyaml(names):
    assert yaml.safe_load(config_text.dump(names)) == names


def test_members_of_enumerations_and_numbers_of_numpy_are_written_as_what_they_stand_for():
    value = {"interval": Interval.step, "errno": signal.SIGTERM, "lr": np.float64(0.1), "on": True}
    assert same(config_text.load(config_text.dump(value)), {"interval": "step", "errno": 15, "lr": 0.1, "on": True})


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1E5", 1e5), ("1.e3", 1e3), ("-.5", -0.5), ("1_0", 10), ("None", None), ("null", None),
     ("", None), ("~", None), ("True", True), ("off", False), ("2024-01-01", "2024-01-01"), ("017", "017"),
     ("12:30", "12:30"), ("0x1F", 31), ("0x_", "0x_"), ("0b_", "0b_"),
     (".inf", math.inf), ("e5", "e5"), ("1e5x", "1e5x"), ("none", "none")],
)  # fmt: skip
def test_scalars(text, value):
    assert same(config_text.load(text), value)


BOMB = "a: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))
CHAIN = "a: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 200))


@pytest.mark.parametrize(
    ("text", "says"),
    [("!!int x", "not what its tag says"), ("!!bool x", "not what its tag says"), ("!!int ''", "not what its tag says"),
     ("!!timestamp x", "tag"), ("!!binary aGk=", "tag"), ("!!set {a}", "tag"), ("!!python/object:os.system x", "tag"),
     ("[a", "line 1, column 3"), ("a: \0", "line 1: the character U\\+0000"), ("*secret", "undefined alias$"),
     ("9" * 10**6, "too many digits"), ("0x" + "f" * 10**6, "too many digits"), ("&a [*a]", "part of"),
     ("a: &a {b: *a}", "part of"), (BOMB, "30000 values"), (CHAIN, "100 levels"), ("[" * 3000, "100 levels"),
     ("{a: " * 3000, "100 levels"), ("- " * 3000, "100 levels"), ("#" * 3_000_000, "2 MiB"),
     ("[" + "1," * 40000 + "]", "30000 values"),
     ("a: 1\nb: 2\n'a': 3", "line 3, column 1: 'a' is given twice, first in line 1"),
     ("a: {1: x, 0x1: y}", "'1' is given twice"), ("? [a]\n: b", "unhashable")],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_what_cannot_be_read_is_one_kind_of_error(text, says):
    with pytest.raises(yaml.YAMLError, match=says) as error:
        config_text.load(text)
    assert len(str(error.value)) < 200


def test_anchors_and_merge_keys_are_read():
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: {<<: [*a, {z: 4}], <<: {w: 5}}\nd: *a"
    a = {"x": 1, "y": 2}
    assert config_text.load(text) == {"a": a, "b": {"x": 3, "y": 2}, "c": {**a, "z": 4, "w": 5}, "d": a}
    assert config_text.load("[" * 100 + "]" * 100)
    assert len(config_text.load("[" + "1," * 25000 + "]")) == 25000


def test_a_long_list_is_not_copied_for_each_of_its_items(cli, tmp_path, monkeypatch):
    names = [f"class {k}" for k in range(300)]
    (tmp_path / "names.yaml").write_text(config_text.dump({"data": {"init_args": {"class_names": names}}}))
    copy, copied = jsonargparse._typehints.deepcopy, []

    def watched(value):
        result = copy(value)
        of_value = value if isinstance(value, dict) else {}
        copied.extend(n for n in ("orig_val", "prev_val") if of_value.get(n) == names and result[n] is not of_value[n])
        calls.append(of_value.get("orig_val") == names or of_value.get("prev_val") == names)
        return result

    calls: list[bool] = []
    monkeypatch.setattr(jsonargparse._typehints, "deepcopy", watched)
    imagenet = ["-c", "configs/recipes/imagenet.yaml", "-c", "configs/models/resnet18.yaml"]
    code, out, err = cli("fit", *imagenet, "-c", tmp_path / "names.yaml", "--print_config")
    assert code == 0, err
    assert config_text.load(out)["data"]["init_args"]["class_names"] == names
    assert any(calls), "jsonargparse copies otherwise than it did: config_text._copied may go"
    assert not copied


def test_a_file_may_begin_with_a_byte_order_mark_and_end_lines_as_windows_does(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_bytes("\ufeffä: 1\r\nb: 2\r\n".encode())
    assert config_text.load_file(path) == {"ä": 1, "b": 2}


# ---- commands ----------------------------------------------------------------------------------------------------

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--data.num_workers=0"]
FOLDERS = words(min_size=1, max_size=40, alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="/\0"))


def rows_of(path: Path) -> list[dict[str, str]]:
    header, rows = read_csv(path)
    return [dict(zip(header, row, strict=True)) for row in rows]


def make_class_folders(root: Path, names: list[str]) -> None:
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in names:
            (root / split / name).mkdir(parents=True)
            for index in range(2):
                pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{name[:9]}{index}.png")


@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    names=st.lists(FOLDERS.filter(lambda name: not name.startswith(".") and len(os.fsencode(name)) < 200), min_size=2,
                   max_size=8, unique_by=lambda name: unicodedata.normalize("NFC", name)),
    folder=FOLDERS.filter(lambda name: not name.startswith(".")),
    lr=st.floats(1e-12, 1e-2),
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
@example(names=NAMES, folder="1e5", lr=1e-3, seed=1).via("all at once")
def test_names_and_values_through_fit_test_predict_and_resume(cli, tmp_path_factory, names, folder, lr, seed):
    names = [name for name in names if not name.startswith(".") and "/" not in name]
    root = tmp_path_factory.mktemp("t") / folder
    make_class_folders(root / "data", names)
    places = [f"--trainer.default_root_dir={root / 'runs'}", *QUIET]
    code, _, err = cli(
        "fit", "-c", "configs/models/resnet20.yaml", "--data=ImageNetDataModule", f"--data.root={root / 'data'}",
        "--data.image_size=8", "--data.batch_size=4", f"--run_dir={root / 'runs' / folder}",
        f"--seed_everything={seed}", f"--model.lr={lr}", "--trainer.max_epochs=1", "--trainer.limit_train_batches=1",
        *places)  # fmt: skip
    assert code == 0, err
    run = root / "runs" / folder
    checkpoint = f"--ckpt_path={run / 'checkpoints/best.ckpt'}"
    held = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    assert held["hyper_parameters"]["class_names"] == sorted(names)
    assert held["hyper_parameters"]["lr"] == lr

    code, _, err = cli("test", checkpoint, f"--run_dir={root / 'test'}", *places)
    assert code == 0, err
    assert sorted(row["class"] for row in rows_of(root / "test/per_class_accuracy.csv")) == sorted(names)

    bad = root / "data/val" / names[0] / "\x1b[31m\r\n.png"
    bad.touch()
    code, out, err = cli(
        "predict", checkpoint, f"--run_dir={root / 'predict'}", f"--data.predict_dir={root / 'data/val'}", *places
    )
    assert code == 0, err
    assert r"/\x1b[31m\r\n.png: this file is not a picture; replace or remove it" in out
    assert "\x1b" not in out + err
    assert [row["path"] for row in rows_of(root / "predict/skipped.csv")] == [str(bad)]
    bad.unlink()
    rows = rows_of(root / "predict/predictions.csv")
    assert {Path(row["path"]).parent.name for row in rows} == set(names)
    assert {row["class"] for row in rows} <= set(names)

    code, _, err = cli("fit", f"--resume={run}", "--trainer.max_epochs=2")
    assert code == 0, err
    config = config_text.load((run / "config.yaml").read_text(encoding="utf-8"))
    assert (config["seed_everything"], config["model"]["init_args"]["lr"]) == (seed, lr)
    assert config["data"]["init_args"]["root"] == str(root / "data")
    resumed = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert resumed["hyper_parameters"]["class_names"] == sorted(names)
    assert resumed["global_step"] == 2
