"""One file gives the same network input in training, validation, test and prediction, and to a figure.

The oracle decodes with Pillow and NumPy alone.
"""

import json
import struct

import numpy as np
import PIL.features
import PIL.Image
import PIL.ImageOps
import pytest
import torch
from torch import nn

from awconv.callbacks.attention.figures import read_pictures
from awconv.callbacks.canvas import upright_picture
from awconv.data import COCODataModule, ImageNetDataModule
from awconv.data.encoded import EncodedPictures

ROWS, COLUMNS = np.mgrid[:20, :30]
PIXELS = np.stack([ROWS * 9 + 20, COLUMNS * 7 + 30, 230 - ROWS * 5 - COLUMNS * 3], axis=-1).astype(np.uint8)
RGB = PIL.Image.fromarray(PIXELS)
OTHERS = [PIL.Image.new("RGB", RGB.size, colour) for colour in ("red", "blue")]
DEEP = PIL.Image.fromarray((ROWS * 2000 + COLUMNS * 700 + 9).astype(np.uint16))


def turned(orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


def transparent(mode="RGBA"):
    picture = RGB.convert(mode)
    picture.putalpha(PIL.Image.fromarray((COLUMNS * 8).astype(np.uint8)))
    return picture


# file name, picture, and how it is saved
FILES = {
    **{f"turned{k}.jpg": (RGB, turned(k)) for k in range(1, 9)},
    **{f"turned6.{kind}": (RGB, turned(6)) for kind in ("png", "webp", "tif", "mpo")},
    "turned8_grey.JPG": (RGB.convert("L"), turned(8)),
    "turned5_cmyk.jpeg": (RGB.convert("CMYK"), turned(5)),
    "turned7_deep.png": (DEEP, turned(7)),
    "turned3_alpha.png": (transparent(), turned(3)),
    "behind.png": (RGB, turned(6)),
    "grey.jpg": (RGB.convert("L"), {}),
    "cmyk.jpg": (RGB.convert("CMYK"), {}),
    "rgb_samples.jpg": (RGB, {"keep_rgb": True}),
    "progressive.jfif": (RGB, {"format": "JPEG", "progressive": True, "subsampling": 0}),
    "rare.JPE": (RGB, {"format": "JPEG"}),
    "grey.png": (RGB.convert("L"), {}),
    "grey_alpha.png": (transparent("L"), {}),
    "alpha.png": (transparent(), {}),
    "palette.png": (RGB.quantize(16), {}),
    "palette_alpha.png": (RGB.quantize(16), {"transparency": bytes(range(0, 160, 10))}),
    "colour_key.png": (RGB, {"transparency": (20, 30, 230)}),
    "black_white.png": (RGB.convert("1"), {}),
    "deep.png": (DEEP, {}),
    "animation.png": (RGB, {"save_all": True, "append_images": OTHERS}),
    "called_png.png": (RGB, {"format": "JPEG"}),
    "called_jpg.jpg": (RGB, {"format": "PNG"}),
    "palette.gif": (RGB.quantize(32), {}),
    "animation.gif": (RGB, {"save_all": True, "append_images": OTHERS}),
    "transparent.gif": (RGB.quantize(16), {"transparency": 3}),
    "alpha.webp": (transparent(), {"lossless": True}),
    "animation.WebP": (RGB, {"save_all": True, "append_images": OTHERS}),
    "plain.bmp": (RGB, {}),
    "palette.dib": (RGB.quantize(16), {}),
    "cmyk.tiff": (RGB.convert("CMYK"), {}),
    "deep.tif": (DEEP, {}),
    "pages.tif": (RGB, {"save_all": True, "append_images": OTHERS}),
    "alpha.tif": (transparent(), {"compression": "tiff_lzw"}),
    "plain.ppm": (RGB, {}),
    "grey.pgm": (RGB.convert("L"), {}),
    "deep.pgm": (DEEP, {}),
    "black_white.pbm": (RGB.convert("1"), {}),
    "alpha.tga": (transparent(), {}),
    "alpha.ico": (transparent(), {"sizes": [(16, 16)]}),
    "plain.pcx": (RGB, {}),
}
FILES |= {"turned6.avif": (RGB, turned(6))} if PIL.features.check("avif") else {}
FILES |= {"plain.jp2": (RGB, {"irreversible": False})} if PIL.features.check("jpg_2000") else {}


def oracle(path):
    with PIL.Image.open(path) as file:
        file.load()
        picture = PIL.ImageOps.exif_transpose(file)
        if file.mode.startswith("I"):
            grey = np.asarray(picture).astype(np.int64) // 256
            pixels = np.stack([grey] * 3, axis=-1).astype(np.uint8)
        elif file.mode == "CMYK":
            pixels = np.asarray(picture.convert("RGB"))
        else:
            pixels = np.asarray(picture.convert("RGBA"))[..., :3]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("reader")
    folder = root / "train" / "a"
    for other in (folder, root / "train" / "b", root / "val"):
        other.mkdir(parents=True)
    for name, (picture, options) in FILES.items():
        picture.save(folder / name, **options)
    content = (folder / "behind.png").read_bytes()
    start = content.index(b"eXIf") - 4
    end = start + 12 + struct.unpack(">I", content[start : start + 4])[0]
    # EXIF data behind the pixels, where some tools put them
    (folder / "behind.png").write_bytes(content[:start] + content[end:-12] + content[start:end] + content[-12:])
    RGB.save(root / "train" / "b" / "b.png")
    for name in ("a", "b"):
        (root / "val" / name).symlink_to(root / "train" / name)
    images = [{"id": number, "file_name": name} for number, name in enumerate(sorted(FILES))]
    boxes = [{"image_id": image["id"], "category_id": 1, "bbox": [1, 1, 8, 8]} for image in images]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "a"}]}
    (root / "boxes.json").write_text(json.dumps(content))
    return root


def test_classification(root):
    data = ImageNetDataModule(
        str(root), image_size=16, augment="none", num_workers=0, batch_size=7, predict_dir=str(root / "train" / "a")
    )
    wanted = {name: oracle(root / "train" / "a" / name) for name in FILES}
    inputs = {name: {} for name in FILES}
    for split in ("train", "val", "test"):
        dataset = data.load_split(split)
        for index in range(len(dataset)):
            if (name := dataset.path(index).rpartition("/")[2]) in inputs:
                inputs[name][split] = dataset[index][0]
    for images, paths in data.predict_dataloader():
        for image, path in zip(images, paths, strict=True):
            inputs[path.rpartition("/")[2]]["predict"] = image
    encoded = EncodedPictures(dataset := data.load_split("train"), 0, torch.device("cpu"))
    images, _ = encoded.unpack(encoded.pack([encoded[index] for index in range(len(FILES))]))
    for index, image in enumerate(images):
        inputs[dataset.path(index).rpartition("/")[2]]["decode_on_device"] = image
    paths = [root / "train" / "a" / name for name in FILES]
    for name, shown in zip(
        FILES, read_pictures(nn.Identity(), "images", paths, data.predict_transform(), None), strict=True
    ):
        inputs[name]["figure"] = shown.tensor
    # four levels of a colour, by which decoders of JPEG differ
    level = 4 / 255 / min(data.std)
    for name, by_path in inputs.items():
        assert set(by_path) == {"train", "val", "test", "predict", "decode_on_device", "figure"}, name
        for way, image in by_path.items():
            assert torch.equal(image, by_path["predict"]), (name, way)
        difference = by_path["predict"] - data.eval_transform()(wanted[name])
        assert difference.abs().max() <= level, name
        thumbnail = np.asarray(upright_picture(root / "train" / "a" / name)).transpose(2, 0, 1)
        assert np.abs(thumbnail.astype(int) - wanted[name].numpy()).max() <= 4, name


def test_detection(root):
    split = {
        f"{split}_{kind}": value
        for split in ("train", "val")
        for kind, value in (("annotations", "boxes.json"), ("images", "train/a"))
    }
    data = COCODataModule(
        str(root),
        **split,
        image_size=16,
        max_size=32,
        num_workers=0,
        batch_size=7,
        predict_dir=str(root / "train" / "a"),
    )
    found = {}
    dataset = data.load_split("val")
    for index in range(len(dataset)):
        found[dataset.path(index)] = dataset[index][0]
    assert len(found) == len(FILES)
    for images, paths in data.predict_dataloader():
        for image, path in zip(images, paths, strict=True):
            assert torch.equal(image, found[path]), path
            assert (image.int() - oracle(path).int()).abs().max() <= 4, path


class Grey(ImageNetDataModule):
    in_channels = 1
    mean, std = (0.5,), (0.5,)


def test_grey_is_the_same_from_a_file_and_from_a_pil_image(root):
    data = Grey(str(root), image_size=16, augment="none", num_workers=0)
    for name in ("grey.png", "turned8_grey.JPG", "palette.png", "alpha.png", "cmyk.jpg"):
        path = root / "train" / "a" / name
        with PIL.Image.open(path) as picture:
            from_pil = data.eval_transform()(picture)
        (shown,) = read_pictures(nn.Identity(), "images", [path], data.predict_transform(), None)
        assert (from_pil - shown.tensor).abs().max() <= 4 / 255 / 0.5
        wanted = oracle(path).float().permute(1, 2, 0) @ torch.tensor([0.299, 0.587, 0.114])
        assert (
            data.eval_transform()(oracle(path)) - data.eval_transform()(wanted.round().byte()[None])
        ).abs().max() <= 2 / 127
    white = torch.full((3, 4, 4), 255, dtype=torch.uint8)
    assert data.eval_transform()(white).min() == 1
