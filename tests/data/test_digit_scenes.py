import dataclasses
import errno
import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from pycocotools.coco import COCO
from sklearn.datasets import load_digits

from awconv.data import DigitsDataModule
from awconv.data.digit_scenes import DigitScenesDataModule, draw_scene, load_split_digits, write_digit_scenes
from awconv.errors import InputError

SCENES = {"train": 12, "val": 5, "test": 7}
SPLITS = ("train", "val", "test")


def small(root, **options):
    counts = {f"{split}_scenes": count for split, count in SCENES.items()}
    return DigitScenesDataModule(str(root), **{**counts, "num_workers": 0, **options})


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folder of a small data set, which no test changes."""
    return Path(write_digit_scenes(str(tmp_path_factory.mktemp("scenes")), 0, SCENES))


def annotations_of(folder, split):
    return json.loads((Path(folder) / "annotations" / f"{split}.json").read_text())


# ---- scenes

keys = st.tuples(st.integers(0, 3), st.sampled_from(SPLITS), st.integers(0, 5000))


def clean_picture(scene, glyphs):
    """The picture (H, W, 3) in [0, 1] with these digits only, without noise and blur."""
    still = dataclasses.replace(scene, glyphs=tuple(glyphs), noise=np.zeros_like(scene.noise), blur=0.0)
    return np.asarray(still.picture(), dtype=float) / 255


@settings(max_examples=60, deadline=None)
@given(keys)
def test_a_box_is_where_the_picture_changes_without_its_digit(key):
    """Told by finished pictures alone: with all digits, with all but one, and with those beneath that one."""
    scene = draw_scene(*key)
    whole = clean_picture(scene, scene.glyphs)
    for number, (glyph, (x, y, width, height)) in enumerate(zip(scene.glyphs, scene.boxes(), strict=True)):
        beneath = scene.glyphs[:number]
        change = np.abs(whole - clean_picture(scene, beneath + scene.glyphs[number + 1 :])).max(axis=2)
        most = np.abs(glyph.colour - clean_picture(scene, beneath)).max(axis=2)
        # the opacity, but where the soft edge of a later digit lies on it: less then, yet at least half of it
        share = change / np.maximum(most, 0.02)
        rows, columns = np.nonzero((share > 0.54) & (most > 0.1))
        assert x <= columns.min()
        assert columns.max() < x + width
        assert y <= rows.min()
        assert rows.max() < y + height
        inside = share[y : y + height, x : x + width]
        for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
            assert edge.max() > 0.22


@settings(max_examples=60, deadline=None)
@given(keys)
def test_what_a_scene_promises(key):
    scene = draw_scene(*key)
    height, width, _ = scene.background.shape
    assert 96 <= min(height, width) <= 128
    assert max(height, width) <= 160
    assert scene.picture().size == (width, height)
    assert len(scene.glyphs) <= 8
    indices = [glyph.digit_index for glyph in scene.glyphs]
    assert len(set(indices)) == len(indices)
    labels = load_digits().target
    assert [glyph.label for glyph in scene.glyphs] == [labels[index] for index in indices]
    ink = [glyph.opacity >= 0.5 for glyph in scene.glyphs]
    for number, (mask, box) in enumerate(zip(ink, scene.boxes(), strict=True)):
        x, y, box_width, box_height = box
        assert 0 <= x < x + box_width <= width
        assert 0 <= y < y + box_height <= height
        # frames have 14 to 56 pixels, before they are turned, sheared, stretched and cut
        assert max(box_width, box_height) <= 75
        assert max(box_width, box_height) >= 9
        covered = np.any([np.zeros_like(mask), *ink[number + 1 :]], axis=0)
        assert (mask & ~covered).sum() >= 0.9 * mask.sum()
    boxes = scene.boxes()
    for number, (x1, y1, w1, h1) in enumerate(boxes):
        for x2, y2, w2, h2 in boxes[:number]:
            w, h = max(min(x1 + w1, x2 + w2) - max(x1, x2), 0), max(min(y1 + h1, y2 + h2) - max(y1, y2), 0)
            assert w * h <= 0.25 * (w1 * h1 + w2 * h2 - w * h)


@settings(max_examples=60, deadline=None)
@given(keys)
def test_every_digit_stands_out(key):
    """Between ink and ground lies a third of the range from black to white, at nine tenths of a digit or more."""
    scene = draw_scene(*key)
    luminance = [0.299, 0.587, 0.114]
    for number, glyph in enumerate(scene.glyphs):
        ground = clean_picture(scene, scene.glyphs[:number])[glyph.opacity > 0] @ luminance
        contrast = np.abs(ground - glyph.colour @ luminance)
        assert np.quantile(contrast, 0.1) >= 0.34


def test_a_scene_is_its_own_whatever_came_before():
    first = draw_scene(3, "val", 17)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    draw_scene(3, "val", 16)
    second = draw_scene(3, "val", 17)
    assert first.picture().tobytes() == second.picture().tobytes()
    assert first.boxes() == second.boxes()


@pytest.mark.parametrize("other", [(4, "val", 17), (3, "test", 17), (3, "val", 18)])
def test_seed_split_and_number_each_make_another_scene(other):
    assert draw_scene(3, "val", 17).picture().tobytes() != draw_scene(*other).picture().tobytes()


def test_the_digits_of_the_first_scenes():
    # written down, so that no version of numpy or scikit-learn changes them unnoticed
    found = [[glyph.digit_index for glyph in draw_scene(0, split, 0).glyphs] for split in SPLITS]
    assert found == [[828, 8, 1260, 43, 1400], [1524, 988, 1062, 1689], [926, 1003, 267, 304, 1187, 1350, 652, 1660]]


def test_variety():
    scenes = [draw_scene(0, "train", index) for index in range(300)]
    numbers = np.bincount([len(scene.glyphs) for scene in scenes], minlength=9)
    assert (numbers > 0).all()
    assert 0.015 < numbers[0] / 300 < 0.08
    sides = np.array([scene.background.shape[:2] for scene in scenes])
    assert (sides[:, 0] > sides[:, 1]).mean() > 0.3
    assert (sides[:, 0] < sides[:, 1]).mean() > 0.3
    assert (sides[:, 0] == sides[:, 1]).mean() > 0.1
    boxes = np.array([box for scene in scenes for box in scene.boxes()])
    # COCO's small and medium
    area = boxes[:, 2] * boxes[:, 3]
    assert 0.15 < (area >= 32**2).mean() < 0.6
    labels = np.bincount([glyph.label for scene in scenes for glyph in scene.glyphs])
    assert labels.min() > 0.6 * labels.mean()
    brighter = [
        glyph.colour.mean() > scene.background[glyph.opacity > 0.5].mean() for scene in scenes for glyph in scene.glyphs
    ]
    assert 0.3 < np.mean(brighter) < 0.8


# ---- files


def test_pycocotools_reads_the_files(written):
    for split in SPLITS:
        coco = COCO(written / "annotations" / f"{split}.json")
        assert len(coco.getImgIds()) == SCENES[split]
        assert {category["id"]: category["name"] for category in coco.loadCats(coco.getCatIds())} == {
            digit + 1: str(digit) for digit in range(10)
        }
        labels = load_digits().target
        for annotation in coco.loadAnns(coco.getAnnIds()):
            assert annotation["category_id"] == labels[annotation["digit_index"]] + 1
            assert annotation["iscrowd"] == 0
            x, y, width, height = annotation["bbox"]
            assert annotation["area"] == width * height
            (image,) = coco.loadImgs(annotation["image_id"])
            assert 0 <= x < x + width <= image["width"]
            assert 0 <= y < y + height <= image["height"]


def test_pictures_are_as_listed_in_both_formats(written):
    for split in SPLITS:
        listed = annotations_of(written, split)["images"]
        assert sorted(os.listdir(written / split)) == sorted(image["file_name"] for image in listed)
        formats = []
        for image in listed:
            with PIL.Image.open(written / split / image["file_name"]) as picture:
                assert picture.size == (image["width"], image["height"])
                assert picture.mode == "RGB"
                formats.append(picture.format)
        assert formats == ["PNG" if index % 4 == 3 else "JPEG" for index in range(SCENES[split])]


def test_files_hold_the_scenes(written):
    content = annotations_of(written, "test")
    for index, image in enumerate(content["images"]):
        scene = draw_scene(0, "test", index)
        mine = [annotation for annotation in content["annotations"] if annotation["image_id"] == image["id"]]
        assert [tuple(annotation["bbox"]) for annotation in mine] == scene.boxes()
        assert [annotation["digit_index"] for annotation in mine] == [glyph.digit_index for glyph in scene.glyphs]
        stored = np.asarray(PIL.Image.open(written / "test" / image["file_name"]), dtype=int)
        difference = stored - np.asarray(scene.picture(), dtype=int)
        if image["file_name"].endswith(".png"):
            assert not difference.any()
        else:
            # of the luminance, since JPEG blurs the colours of the noise
            assert np.abs(difference @ [0.299, 0.587, 0.114]).mean() < 4


def test_no_digit_is_in_two_splits(tmp_path):
    folder = write_digit_scenes(str(tmp_path), 5, {"train": 60, "val": 60, "test": 60})
    used = {
        split: {annotation["digit_index"] for annotation in annotations_of(folder, split)["annotations"]}
        for split in SPLITS
    }
    assert all(len(indices) > 90 for indices in used.values())
    assert not used["train"] & used["val"]
    assert not used["train"] & used["test"]
    assert not used["val"] & used["test"]


def test_the_digits_are_split_as_in_the_digits_data_module():
    module = DigitsDataModule(image_size=8, augment="none", seed=2, batch_size=1257)
    pools = load_split_digits(2).pools
    for split, loader in (("train", module.train_dataloader), ("val", module.val_dataloader)):
        images = torch.cat([images for images, _ in loader()]) * module.std[0] + module.mean[0]
        theirs = (images.flatten(1) * 16).round().int().numpy()
        ours = load_digits().data[pools[split]]
        assert sorted(map(tuple, theirs.tolist())) == sorted(map(tuple, ours.tolist()))


def test_the_same_settings_give_the_same_bytes(written, tmp_path):
    again = write_digit_scenes(str(tmp_path), 0, SCENES)
    assert files_of(again) == files_of(written)
    assert os.path.basename(again) == written.name == "v1-seed0-12-5-7"


def test_a_picture_does_not_depend_on_how_many_there_are(written, tmp_path):
    fewer = Path(write_digit_scenes(str(tmp_path), 0, {"train": 4, "val": 9, "test": 1}))
    for split, count in (("train", 4), ("val", 5), ("test", 1)):
        common = annotations_of(written, split)["images"][:count]
        assert annotations_of(fewer, split)["images"][:count] == common
        for image in common:
            path = f"{split}/{image['file_name']}"
            assert (fewer / path).read_bytes() == (written / path).read_bytes()


def test_what_is_there_is_left_as_it_is(tmp_path):
    module = small(tmp_path)
    module.prepare_data()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    small(tmp_path).prepare_data()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_settings_have_folders_of_their_own(tmp_path):
    roots = []
    for options in ({}, {"seed": 1}, {"train_scenes": 3}, {"val_scenes": 3}, {"test_scenes": 3}):
        module = small(tmp_path, **options)
        module.prepare_data()
        roots.append(module.root)
    assert len(set(roots)) == 5
    assert sorted(map(str, tmp_path.iterdir())) == sorted(roots)
    assert (Path(roots[0]) / "train/000001.jpg").read_bytes() != (Path(roots[1]) / "train/000001.jpg").read_bytes()


# ---- crashes, other processes, other people's folders

FORK = multiprocessing.get_context("fork")


def test_killed_while_writing(written, tmp_path):
    process = FORK.Process(target=write_digit_scenes, args=(str(tmp_path), 0, {"train": 10**6, "val": 1, "test": 1}))
    process.start()
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".*/train/000003.jpg")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".v1-seed0-1000000-1-1.")
    # which stands in nobody's way
    assert files_of(write_digit_scenes(str(tmp_path), 0, SCENES)) == files_of(written)


def test_what_a_kill_left_is_removed_after_a_day_and_nothing_else(tmp_path):
    names = [f".v1-seed0-12-5-7.{32 * 'a'}", f".v1-seed0-12-5-7.{32 * 'b'}", f".v1-seed1-12-5-7.{32 * 'a'}", ".mine"]
    for name in names:
        (tmp_path / name / "train").mkdir(parents=True)
        if not name.endswith("b"):
            os.utime(tmp_path / name, (time.time() - 25 * 3600,) * 2)
    write_digit_scenes(str(tmp_path), 0, SCENES)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names[1:], "v1-seed0-12-5-7"])


def test_two_processes_at_once(written, tmp_path):
    barrier = FORK.Barrier(2)

    def write():
        barrier.wait()
        write_digit_scenes(str(tmp_path), 0, SCENES)

    processes = [FORK.Process(target=write) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert os.listdir(tmp_path) == [written.name]
    assert files_of(tmp_path / written.name) == files_of(written)


def test_the_slower_of_two_processes_keeps_what_the_faster_wrote(written, tmp_path, monkeypatch):
    rename = Path.rename

    def overtaken(partial, folder):
        monkeypatch.setattr(Path, "rename", rename)
        write_digit_scenes(str(tmp_path), 0, SCENES)
        return rename(partial, folder)

    monkeypatch.setattr(Path, "rename", overtaken)
    assert files_of(write_digit_scenes(str(tmp_path), 0, SCENES)) == files_of(written)
    assert os.listdir(tmp_path) == [written.name]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(PIL.Image.Image, "save", full)
    with pytest.raises(InputError) as caught:
        small(tmp_path).prepare_data()
    message = str(caught.value)
    assert "\n" not in message
    for part in (f"root={str(tmp_path)!r}", "No space left on device", "--data.root FOLDER"):
        assert part in message
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_is_a_file(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"^root='.*notes.txt': the data set could not be written to "):
        small(tmp_path / "notes.txt").prepare_data()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def no_picture(folder):
    (folder / "val" / "000002.jpg").unlink()


def no_pictures(folder):
    (folder / "test").rename(folder / "elsewhere")


def no_annotations(folder):
    (folder / "annotations" / "train.json").unlink()


def half_annotations(folder):
    path = folder / "annotations" / "train.json"
    path.write_bytes(path.read_bytes()[:300])


def other_annotations(folder):
    path = folder / "annotations" / "val.json"
    content = json.loads(path.read_text())
    content["info"]["seed"] = 7
    path.write_text(json.dumps(content))


def a_list(folder):
    (folder / "annotations" / "val.json").write_text("[1, 2]")


def foreign(folder):
    for path in files_of(folder):
        (folder / path).unlink()
    (folder / "thesis.txt").write_text("mine")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (no_picture, "val lacks 000002.jpg"),
        (no_pictures, "annotations/test.json or the pictures of test cannot be read"),
        (no_annotations, "annotations/train.json or the pictures of train cannot be read"),
        (half_annotations, "annotations/train.json or the pictures of train cannot be read"),
        (other_annotations, "annotations/val.json tells of another data set"),
        (a_list, "annotations/val.json or the pictures of val cannot be read"),
        (foreign, "annotations/train.json or the pictures of train cannot be read"),
    ],
)
def test_a_damaged_or_foreign_folder_is_said_and_left_alone(tmp_path, damage, said):
    module = small(tmp_path)
    module.prepare_data()
    damage(Path(module.root))
    before = files_of(tmp_path)
    with pytest.raises(InputError) as caught:
        module.prepare_data()
    message = str(caught.value)
    assert message.startswith(f"root={str(tmp_path)!r}: expected the Digit Scenes once written to {module.root}")
    assert said in message
    assert message.endswith("delete that folder or move it away, and it is written again")
    assert "\n" not in message
    assert files_of(tmp_path) == before


# ---- the module


def by_image(content):
    """The annotations of each image id, in the order of the file."""
    found = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        found[annotation["image_id"]].append(annotation)
    return found


@pytest.mark.parametrize("split", ["val", "test"])
def test_read_back_as_written(tmp_path, split):
    module = small(tmp_path, batch_size=3)
    # without a trainer the first loader has the data written
    loader = {"val": module.val_dataloader, "test": module.test_dataloader}[split]()
    content = annotations_of(module.root, split)
    expected = by_image(content)
    seen = []
    for images, targets in loader:
        for image, target in zip(images, targets, strict=True):
            number = int(target["image_id"])
            seen.append(number)
            annotations = expected[number]
            boxes = [[x, y, x + w, y + h] for x, y, w, h in (annotation["bbox"] for annotation in annotations)]
            assert target["boxes"].tolist() == boxes
            assert target["labels"].tolist() == [annotation["category_id"] for annotation in annotations]
            assert target["area"].tolist() == [annotation["area"] for annotation in annotations]
            name = content["images"][number - 1]["file_name"]
            pixels = np.asarray(PIL.Image.open(Path(module.root) / split / name))
            assert image.shape == (3, *pixels.shape[:2])
            if name.endswith(".png"):
                assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels)
    assert seen == list(expected)


def test_training_pictures_are_brought_to_size_with_their_boxes(tmp_path):
    module = small(tmp_path, batch_size=1, scale_jitter=(1.0, 1.0), keep_empty=True, image_size=64, max_size=90)
    loader = module.train_dataloader()
    content = annotations_of(module.root, "train")
    expected = by_image(content)
    seen = set()
    for (image,), (target,) in loader:
        number = int(target["image_id"])
        seen.add(number)
        height, width = image.shape[1:]
        assert max(height, width) <= 90
        # of 64 on the short side, unless the long one would be too long
        assert min(height, width) == 64 or max(height, width) == 90
        across, down = width / content["images"][number - 1]["width"], height / content["images"][number - 1]["height"]
        boxes = [
            [x * across, y * down, (x + w) * across, (y + h) * down]
            for x, y, w, h in (annotation["bbox"] for annotation in expected[number])
        ]
        # not mirrored either
        assert target["boxes"].numpy() == pytest.approx(np.array(boxes).reshape(-1, 4), abs=1e-3)
        assert target["labels"].tolist() == [annotation["category_id"] for annotation in expected[number]]
    assert seen == set(expected)


def test_facts(tmp_path):
    module = DigitScenesDataModule(str(tmp_path / "later"))
    assert module.class_names == list("0123456789")
    assert module.category_ids == list(range(1, 11))
    assert (module.num_classes, module.in_channels) == (10, 3)
    assert (module.image_size, module.max_size, module.horizontal_flip) == (128, 192, 0)
    assert module.root == str(tmp_path / "later" / "v1-seed0-1000-100-200")
    # all this before anything is written
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["train_scenes", "val_scenes", "test_scenes"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True, "8"])
def test_numbers_of_scenes_are_checked(name, value):
    with pytest.raises(InputError, match=f"^{name}={value!r}: expected a number of scenes, at least 1"):
        DigitScenesDataModule(**{name: value})


class Probe(LightningModule):
    """Trains nothing and predicts the number of pictures."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch):
        return self.weight.sum() * len(batch[0])

    def predict_step(self, batch):
        return len(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer_in(folder, **options):
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        **options,
    )


def test_a_checkpoint_gives_the_module_back(tmp_path):
    module = small(tmp_path / "data", seed=3, batch_size=2, photometric=True)
    trainer = trainer_in(tmp_path, max_steps=1)
    trainer.fit(Probe(), module)
    trainer.save_checkpoint(tmp_path / "probe.ckpt")
    restored = DigitScenesDataModule.load_from_checkpoint(tmp_path / "probe.ckpt", weights_only=True)
    assert restored.root == module.root
    assert dict(restored.hparams) == dict(module.hparams)
    assert (restored.seed, restored.batch_size, restored.photometric) == (3, 2, True)


def test_prediction_of_ones_own_pictures_writes_no_scenes(tmp_path, picture_folder):
    module = small(tmp_path / "data", predict_dir=str(picture_folder), batch_size=2)
    assert sum(trainer_in(tmp_path).predict(Probe(), module)) == 5
    assert not (tmp_path / "data").exists()
