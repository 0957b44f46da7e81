"""Files of strangers are data: what lies about itself, never ends or leads elsewhere is refused by one line."""

import json
import logging
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import malformed
import numpy as np
import PIL.Image
import pytest
import torch

from awconv.callbacks.canvas import upright_picture
from awconv.data import CIFAR10DataModule, COCODataModule, ImageNetDataModule
from awconv.data.pictures import Unreadable, limit_pixels, read_encoded, read_heads, read_picture, unreadable
from awconv.data.transforms import Resize
from awconv.errors import InputError


@pytest.fixture(autouse=True)
def limit(monkeypatch):
    """Puts back the limit of pixels, which holds for the process."""
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", PIL.Image.MAX_IMAGE_PIXELS)


def error_of(call, *args):
    with pytest.raises(InputError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def imagenet(root, **options):
    return ImageNetDataModule(str(root), **{"num_workers": 0, "batch_size": 4, "image_size": 32, **options})


def coco(root, **options):
    return COCODataModule(str(root), **{"num_workers": 0, "image_size": 32, "max_size": 48, **options})


def test_no_malformed_file_raises_hangs_or_takes_memory(tmp_path):
    """Of 22 bombs and 22 images with other bytes in their heads, each read in three ways, and 31 annotation files."""
    done = subprocess.run(
        [sys.executable, malformed.__file__, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *outcomes, grown = map(json.loads, done.stdout.splitlines())
    assert len(outcomes) == 3 * (22 + 22) + 31
    assert grown < 1024
    for name, outcome in outcomes:
        if isinstance(outcome, str):
            assert name in outcome or "boxes.json" in outcome
            assert outcome.isprintable()
        elif isinstance(outcome, list):
            assert min(outcome) > 0, name
    refused = {name for name, outcome in outcomes if isinstance(outcome, str)}
    assert {name for name, *_ in malformed.bombs()} <= refused


# ---- images of many pixels


@pytest.mark.parametrize("kind", [*malformed.FORMATS, "AVIF", "ICNS", "PCX", "SGI", "QOI", "DDS"])
def test_the_limit_of_pixels_holds_for_every_format_and_reader(tmp_path, kind):
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(malformed.saved(kind, (128, 128)))
    (head,) = read_heads([str(path)])
    pixels = head.height * head.width
    limit_pixels(pixels)
    assert read_picture(path).shape == (3, head.height, head.width)
    limit_pixels(pixels - 1)
    expected = (
        f"{path}: this picture has {pixels} pixels, more than max_image_pixels={pixels - 1} allows; replace or remove "
        "it, or if you trust it give a larger --data.max_image_pixels"
    )
    assert error_of(read_picture, path) == error_of(read_encoded, path) == expected
    assert [str(error) for error in (*read_heads([str(path)]), *unreadable([str(path)]))] == [expected] * 2
    assert upright_picture(path) is None


def test_no_decoder_sees_an_image_beyond_the_limit(tmp_path, monkeypatch):
    def decode(*_, **__):
        pytest.fail("decoded")

    bombs = list(malformed.bombs())
    monkeypatch.setattr("awconv.data.pictures.decode_jpeg", decode)
    monkeypatch.setattr(PIL.Image.Image, "load", decode)
    for name, content, _ in bombs:
        if name in ("size.jpg", "size.png", "size.tif", "tile.tif", "size.bmp"):
            (tmp_path / name).write_bytes(content)
            assert "this picture has 4225000000 pixels" in error_of(read_picture, tmp_path / name)


@pytest.mark.parametrize("split", ["train", "val", "test", "predict"])
def test_every_split_of_class_folders_has_the_limit(imagenet_root, split):
    options = {"predict_dir": str(imagenet_root / "val"), "on_bad_image": "stop", "max_image_pixels": 50}
    data = imagenet(imagenet_root, **options)
    data.setup()
    assert "more than max_image_pixels=50 allows" in error_of(list, getattr(data, f"{split}_dataloader")())
    checking = imagenet(imagenet_root, check_images=True, **options)
    stage = {"train": "fit", "val": "validate"}.get(split, split)
    assert "more than max_image_pixels=50 allows" in error_of(checking.setup, stage)


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_every_split_of_coco_has_the_limit(coco_root, stage):
    assert "more than max_image_pixels=50 allows" in error_of(coco(coco_root, max_image_pixels=50).setup, stage)
    coco(coco_root).setup(stage)  # the limit is that of the data module that was set up last


def test_the_limit_reaches_the_workers(imagenet_root):
    data = imagenet(imagenet_root, max_image_pixels=50, num_workers=1)
    data.setup("validate")
    loader = data.val_dataloader()
    limit_pixels(10**6)  # as a process has it that was not forked
    assert "more than max_image_pixels=50 allows" in error_of(list, loader)
    assert pickle.loads(pickle.dumps(loader.worker_init_fn)).args == (50,)


def test_the_limit_can_be_raised(tmp_path, recwarn):
    path = tmp_path / "a.png"
    path.write_bytes(malformed.png(20000, 10000, malformed.chunk(b"IDAT", b"")))
    assert "has 200000000 pixels, more than max_image_pixels=178956970" in str(read_heads([str(path)])[0])
    limit_pixels(200_000_000)
    assert read_heads([str(path)]) == [(10000, 20000, 1)]
    assert not recwarn.list
    with pytest.raises(InputError, match="max_image_pixels=0: expected a number of pixels, at least 1"):
        imagenet(tmp_path, max_image_pixels=0)


def test_a_jpeg_of_two_sizes_is_not_left_to_the_decoder_of_a_device(tmp_path):
    two, *_ = (content for name, content, _ in malformed.bombs() if name == "two_sizes.jpg")
    (tmp_path / "a.jpg").write_bytes(two)
    assert "cannot be read" in error_of(read_encoded, tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_bytes(malformed.saved("JPEG"))
    assert read_encoded(tmp_path / "b.jpg").dim() == 1


def test_a_thin_image_is_not_made_huge(imagenet_root):
    image = torch.zeros(3, 1, 60000, dtype=torch.uint8)
    assert error_of(Resize(256), image) == (
        "an image of 60000x1 pixels gets 3932160000 when its shorter side is made 256, more than "
        "max_image_pixels=178956970 allows; crop or remove it"
    )
    assert Resize(2)(image).shape == (3, 2, 120000)
    path = imagenet_root / "val" / "cat" / "thin.png"
    PIL.Image.new("RGB", (60000, 1)).save(path)
    data = imagenet(imagenet_root, predict_dir=str(path.parent), image_size=256)
    data.setup()
    assert error_of(list, data.val_dataloader()).startswith(f"{path}: an image of 60000x1 pixels gets")
    assert [label.path for _, label in data._dataset("predict") if isinstance(label, Unreadable)] == [str(path)]


# ---- what is no regular file


@pytest.fixture
def irregular(tmp_path):
    """A folder of things that are called like images, and one image."""
    folder = tmp_path / "irregular"
    folder.mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "loop.png").symlink_to("loop.png")
    here = os.getcwd()
    with socket.socket(socket.AF_UNIX) as made:
        os.chdir(folder)  # the address of a socket is short
        made.bind("socket.png")
        os.chdir(here)
    (folder / "folder.png").mkdir()
    PIL.Image.new("RGB", (30, 20)).save(folder / "image.png")
    return folder


@pytest.mark.parametrize("name", ["pipe.png", "device.png", "socket.png", "folder.png", "loop.png"])
def test_only_regular_files_are_opened(irregular, name):
    reason = "a pipe, a socket or a device, and no regular file"
    reason = {"folder.png": "Is a directory", "loop.png": "Too many levels of symbolic links"}.get(name, reason)
    expected = f"{irregular / name}: this picture cannot be read ({reason}); replace or remove it"
    path = irregular / name
    assert error_of(read_picture, path) == error_of(read_encoded, path) == str(read_heads([str(path)])[0]) == expected
    content = {
        "images": [{"id": 1, "file_name": name}],
        "categories": [{"id": 1, "name": "owl"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}],
    }
    (irregular / "boxes.json").write_text(json.dumps(content))
    own = {"train_images": ".", "val_images": ".", "train_annotations": "boxes.json", "val_annotations": "boxes.json"}
    assert f"{name}: this picture cannot be read ({reason})" in error_of(coco(irregular, **own).setup, "fit")
    (irregular / "boxes.json").write_text(json.dumps(content).replace(name, "image.png"))
    for argument in ("train_annotations", "val_annotations"):
        message = error_of(coco(irregular, **{**own, argument: name}).setup, "fit")
        assert message.startswith(f"{argument}={str(path)!r}: this file cannot be read ({reason}); get COCO")
    assert error_of(imagenet(irregular, predict_dir=str(path)).setup, "predict").startswith("predict_dir=")


def test_prediction_goes_on_without_them(irregular):
    data = imagenet(irregular, predict_dir=str(irregular))
    data.setup("predict")
    labels = [label for _, label in data._dataset("predict")]
    assert [label for label in labels if label] == [str(irregular / "image.png")]
    assert {Path(label.path).name for label in labels if not label} == {
        *("pipe.png", "device.png", "socket.png", "loop.png")
    }


# ---- names in annotation files

OUTSIDE = ["../secret.png", "a/../../secret.png", "link/../../secret.png", "{root}/secret.png", "..\\secret.png"]
OUTSIDE += ["%2e%2e/secret.png", "file://{root}/secret.png", "C:\\secret.png", "C:/secret.png", "\\\\host\\secret.png"]
OUTSIDE += ["..", ".", "/", "~/secret.png", "a%00/../secret.png", "x" * 300, "x" * 300 + "/1.png"]


@pytest.fixture
def pictures(tmp_path):
    """A folder of an image and of links that the user made, and an image that is outside of it."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    (tmp_path / "elsewhere").mkdir()
    for path in (folder / "1.png", tmp_path / "secret.png", tmp_path / "elsewhere" / "3.png"):
        PIL.Image.new("RGB", (30, 20)).save(path)
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "2.png").symlink_to(tmp_path / "secret.png")
    return folder


def named(pictures, name, **url):
    """The paths of a data set whose second image has this name in the file."""
    content = malformed.document()
    content["images"][1] = {"id": 2, "file_name": name, **url}
    (pictures.parent / "boxes.json").write_text(json.dumps(content))
    boxes = {"train_annotations": "boxes.json", "val_annotations": "boxes.json"}
    data = coco(pictures.parent, train_images="pictures", val_images="pictures", **boxes)
    data.setup("fit")
    return [os.path.normpath(path) for path in data._paths("train")]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_leads_nowhere_outside_of_the_folder(pictures, name):
    name = name.format(root=pictures.parent)
    message = error_of(named, pictures, name)
    assert f"1 of the 2 pictures of train_annotations='{pictures.parent}/boxes.json' are missing, such as" in message


@pytest.mark.parametrize("name", ["2.png\0", "2\0.png", "", "x" * 10**6, "\ud800", ["2.png"], 2, None])
def test_a_name_that_no_file_can_have(pictures, name):
    message = error_of(named, pictures, name)
    assert "image 2 has no file_name (but " in message
    assert len(message) < 400


def test_a_link_that_the_user_made_is_followed(pictures):
    assert named(pictures, "2.png") == [str(pictures / "1.png"), str(pictures / "2.png")]
    assert named(pictures, "link/3.png") == [str(pictures / "1.png"), str(pictures / "link" / "3.png")]


def test_no_address_is_fetched(pictures, monkeypatch):
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("opened a connection"))
    url = dict.fromkeys(("coco_url", "flickr_url", "url"), "http://127.0.0.1/2.png")
    assert named(pictures, None, **url) == [str(pictures / "1.png"), str(pictures / "2.png")]
    assert "missing" in error_of(lambda: named(pictures, None, coco_url="http://127.0.0.1/../secret.png"))


# ---- what is printed


def test_control_characters_of_names_are_escaped_where_they_are_said(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    name = "cat\x1b[2J\r\n\u202egnp\u2066"
    for split in ("train", "val"):
        for kind in (name, "owl"):
            (tmp_path / split / kind).mkdir(parents=True)
            PIL.Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / split / kind / "é汉🦉.png")
    (tmp_path / "val" / name / "é汉🦉.png").unlink()
    (tmp_path / "val" / name / "x.\x1b[31m").touch()
    (tmp_path / "val" / "owl" / "é汉🦉.png").write_text("")
    data = imagenet(tmp_path)
    data.setup("validate")
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert r"no images of 1 of the 2 classes: cat\x1b[2J\r\n\u202egnp\u2066" in said
    assert r"1 file that is no image (.\x1b[31m)" in said
    assert not set(said) & set("\x1b\r\u202e\u2066")
    assert error_of(list, data.val_dataloader()).startswith(f"{tmp_path}/val/owl/é汉🦉.png: this file is not")
    (tmp_path / "train" / name / "é汉🦉.png").rename(tmp_path / "train" / name / "\x1b\n.png")
    (tmp_path / "train" / name / "\x1b\n.png").write_text("")
    for workers in (0, 1):
        data = imagenet(tmp_path, num_workers=workers)
        data.setup("fit")
        message = error_of(list, data.train_dataloader())
        assert r"/cat\x1b[2J\r\n\u202egnp\u2066/\x1b\n.png: this file is not a picture" in message


@pytest.mark.parametrize("name", ["data_batch_1", "test_batch", "batches.meta"])
def test_archives_are_regular_files_too(cifar10_root, name):
    path = cifar10_root / "cifar-10-batches-py" / name
    path.unlink()
    os.mkfifo(path)
    data = CIFAR10DataModule(str(cifar10_root), val_size=5, num_workers=0)
    assert f"lacks {name}" in error_of(data.setup)
