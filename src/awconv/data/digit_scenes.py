"""Digit Scenes: real handwritten digits scattered over pictures, a detection data set that needs no download."""

import colorsys
import functools
import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, get_args

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFilter
from lightning.pytorch.utilities import rank_zero_info

from awconv.data.base import Split
from awconv.data.detection import COCODataModule
from awconv.data.loading import Array, MapDataset
from awconv.errors import InputError, require_int

# x, y, width and height in whole pixels
Box: TypeAlias = tuple[int, int, int, int]

# Raised whenever the same seed gives other pictures, so that old and new data sets lie in different folders.
_VERSION = 1

_CLASS_NAMES = [str(digit) for digit in range(10)]
_CATEGORY_IDS = list(range(1, 11))
_ANNOTATIONS = "annotations/{}.json"

# the arguments of COCODataModule that follow from what the module writes
_SETTLED = [f"{split}_{what}" for split in get_args(Split) for what in ("annotations", "images")]
_SETTLED += ["class_names", "category_ids"]

_NATIVE_SIZE = 8
# pixels: the side of the digits' 8x8 frame, and the shorter and the longer side of a canvas
_FRAME = (14.0, 56.0)
_SHORT_SIDE = (96, 128)
_LONG_SIDE = 160
# share of empty scenes, and the weights of 1 to 8 digits in the others
_EMPTY = 0.04
_COUNT_WEIGHTS = np.array([2, 3, 4, 4, 3, 2, 1, 1]) / 20
# Of the smaller of two boxes the larger may cover this share, so that their IoU is at most 0.25. Of a digit's ink
# this share lies inside the canvas, and of that again this share under no other digit.
_MAX_OVERLAP = 0.4
_MIN_VISIBLE = 0.9
# difference in luminance, of 1 between black and white, between a digit and what is beneath and around it
_MIN_CONTRAST = 0.35
_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)


@dataclass(frozen=True)
class Digits:
    """The digits of scikit-learn and the share of them that each split has to itself.

    Attributes:
        images: Grey levels in [0, 1], float32 (1797, 8, 8).
        labels: The digits 0 to 9, int64 (1797,).
        pools: For each split the indices of its digits, in no common with another's.
    """

    images: Array
    labels: Array
    pools: dict[Split, Array]


@functools.lru_cache(maxsize=4)
def load_split_digits(seed: int) -> Digits:
    """Split the 1797 digits by `seed` alone: 1257 to train, 180 to validate, 360 to test, stratified."""
    # only here: importing scikit-learn takes a while, and every command line imports this module
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    rest, test = train_test_split(
        np.arange(len(digits.target)), test_size=360, stratify=digits.target, random_state=seed
    )
    train, val = train_test_split(rest, test_size=180, stratify=digits.target[rest], random_state=seed)
    images = (digits.images / 16).astype(np.float32)
    return Digits(images, digits.target, {"train": train, "val": val, "test": test})


@dataclass(frozen=True)
class Glyph:
    """One digit in a scene.

    Attributes:
        digit_index: Which of scikit-learn's digits it is.
        label: The digit, 0 to 9.
        opacity: Of the ink on the whole canvas, float32 (H, W) in [0, 1]. Where it is at least a half is ink.
        colour: RGB in [0, 1], float32 (3,).
    """

    digit_index: int
    label: int
    opacity: Array
    colour: Array


@dataclass(frozen=True)
class Scene:
    """A picture in the making.

    Attributes:
        background: RGB in [0, 1], float32 (H, W, 3).
        glyphs: The digits; each covers those before it.
        blur: Standard deviation in pixels of the blur over everything.
        noise: Added last, float32 (H, W, 3).
    """

    background: Array
    glyphs: tuple[Glyph, ...]
    blur: float
    noise: Array

    def picture(self) -> PIL.Image.Image:
        """The finished picture, 8 bits RGB."""
        sharp = PIL.Image.fromarray(_bytes(_paint(self.background, self.glyphs)))
        blurred = np.asarray(sharp.filter(PIL.ImageFilter.GaussianBlur(self.blur)), dtype=np.float32)
        return PIL.Image.fromarray(_bytes(blurred / 255 + self.noise))

    def boxes(self) -> list[Box]:
        """For each digit (x, y, width, height), tight around the ink that shows, in whole pixels."""
        return [_box(mask) for mask in _visible(self.glyphs)]


def draw_scene(seed: int, split: Split, index: int) -> Scene:
    """Compose a scene, which is the same for the same arguments and depends on nothing else.

    A canvas of 96 to 160 pixels a side with a ground (gradient, clouds, stripes, ruled paper) and clutter
    (lines, arcs, blobs, specks) holds up to 8 digits, in 4% of the scenes none. A digit keeps its handwriting,
    brought from 8x8 pixels to a frame of 14 to 56 smoothly, a little rotated, sheared and stretched. It may be
    cut by the canvas or covered by another digit a little, and always stands out from the ground.
    """
    digits = load_split_digits(seed)
    rng = np.random.default_rng([seed, get_args(Split).index(split), index])
    height, width = _canvas_size(rng)
    background = _background(rng, height, width)
    glyphs: list[Glyph] = []
    canvas = background
    # as if one pen had written everything, or each digit had its own
    pen = _colour(rng) if rng.random() < 0.4 else None
    count = 0 if rng.random() < _EMPTY else 1 + int(rng.choice(len(_COUNT_WEIGHTS), p=_COUNT_WEIGHTS))
    for digit_index in rng.choice(digits.pools[split], size=count, replace=False):
        opacity = _place(rng, _ink(rng, digits.images[digit_index]), (height, width), glyphs)
        colour = None if opacity is None else _readable(rng, canvas, opacity, pen)
        if opacity is None or colour is None:
            continue
        glyph = Glyph(int(digit_index), int(digits.labels[digit_index]), opacity, colour)
        glyphs.append(glyph)
        canvas = _paint(canvas, [glyph])
    blur = float(rng.uniform(0.4, 0.8)) if rng.random() < 0.4 else 0.0
    noise = rng.standard_normal((height, width, 3), dtype=np.float32) * np.float32(rng.uniform(0, 0.05))
    return Scene(background, tuple(glyphs), blur, noise)


# ---- the files


def write_digit_scenes(root: str, seed: int, scenes: dict[Split, int]) -> str:
    """Write the data set with these settings below `root`, unless it is there, and return its folder.

    Settings have folders of their own, so no data set ever takes another's place. A folder appears complete or not
    at all: it is written beside its place, under a hidden name, and then moved. Two processes at once may both
    write it, and then one of the two equal copies stays.

    Raises:
        InputError: `root` cannot be written, or something else lies in the folder's place.
    """
    name = _folder_name(seed, scenes)
    folder = Path(root) / name
    if not folder.is_dir():
        rank_zero_info(f"Writing {sum(scenes.values())} Digit Scenes to {folder}")
        partial = Path(root) / f".{name}.{uuid.uuid4().hex}"
        try:
            Path(root).mkdir(parents=True, exist_ok=True)
            _remove_abandoned(Path(root), name)
            partial.mkdir()
            for split, count in scenes.items():
                _write_split(partial, seed, split, count)
            _move(partial, folder)
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(
                f"root={root!r}: the data set could not be written to {folder} ({reason}); "
                "name another folder with --data.root FOLDER"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    _check(root, folder, seed, scenes)
    return str(folder)


def _folder_name(seed: int, scenes: dict[Split, int]) -> str:
    return f"v{_VERSION}-seed{seed}-{scenes['train']}-{scenes['val']}-{scenes['test']}"


def _move(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)
    except OSError:
        # another process was faster; anything else in the way is found when the folder is checked
        if not folder.is_dir():
            raise


def _remove_abandoned(root: Path, name: str) -> None:
    """Remove what killed processes left, more than a day ago: younger ones may still be written."""
    for partial in root.glob(f".{name}.{'[0-9a-f]' * 32}"):
        if time.time() - partial.stat().st_mtime > 24 * 3600:
            shutil.rmtree(partial, ignore_errors=True)


def _write_split(folder: Path, seed: int, split: Split, count: int) -> None:
    (folder / split).mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        scene = draw_scene(seed, split, index)
        picture = scene.picture()
        file_name = _file_name(index)
        # a PNG has no quality to choose, and PIL passes over it
        picture.save(folder / split / file_name, quality=92)
        image_id = index + 1
        width, height = picture.size
        images.append({"id": image_id, "file_name": file_name, "width": width, "height": height, "license": 1})
        annotations += [
            {
                "id": len(annotations) + number,
                "image_id": image_id,
                "category_id": _CATEGORY_IDS[glyph.label],
                "bbox": list(box),
                # of the box, as is usual where there are no outlines
                "area": box[2] * box[3],
                "iscrowd": 0,
                "digit_index": glyph.digit_index,
            }
            for number, (glyph, box) in enumerate(zip(scene.glyphs, scene.boxes(), strict=True), start=1)
        ]
    content = {
        "info": _info(seed, split, count),
        "licenses": [
            {
                "id": 1,
                "name": "Creative Commons Attribution 4.0 International",
                "url": "https://creativecommons.org/licenses/by/4.0/",
            }
        ],
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": category_id, "name": name, "supercategory": "digit"}
            for category_id, name in zip(_CATEGORY_IDS, _CLASS_NAMES, strict=True)
        ],
    }
    path = folder / _ANNOTATIONS.format(split)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")


def _file_name(index: int) -> str:
    # both formats, so that both readers are at work
    return f"{index + 1:06}.{'png' if index % 4 == 3 else 'jpg'}"


def _info(seed: int, split: Split, count: int) -> dict[str, Any]:
    """What the annotations say of themselves, by which a data set is known again."""
    return {
        "description": f"Digit Scenes, {split} split; the digits are those of the Optical Recognition of Handwritten "
        "Digits data (Alpaydin and Kaynak 1998, doi 10.24432/C50P49), as in scikit-learn",
        "version": str(_VERSION),
        "seed": seed,
        "scenes": count,
    }


def _check(root: str, folder: Path, seed: int, scenes: dict[Split, int]) -> None:
    """Raise an `InputError` unless the data set that `write_digit_scenes` wrote lies in `folder` whole."""
    wrong = None
    for split, count in scenes.items():
        path = folder / _ANNOTATIONS.format(split)
        try:
            info = json.loads(path.read_text(encoding="utf-8"))["info"]
            missing = sorted({_file_name(index) for index in range(count)} - set(os.listdir(folder / split)))
        except (OSError, ValueError, KeyError, TypeError):
            wrong = f"{path} or the pictures of {split} cannot be read"
            break
        if info != _info(seed, split, count):
            wrong = f"{path} tells of another data set"
            break
        if missing:
            wrong = f"{folder / split} lacks {missing[0]}"
            break
    if wrong:
        raise InputError(
            f"root={root!r}: expected the Digit Scenes once written to {folder}, and {wrong}; "
            "delete that folder or move it away, and it is written again"
        )


class DigitScenesDataModule(COCODataModule):
    """Scenes of real handwritten digits, written once as a COCO data set and then read like any other.

    See :func:`draw_scene` for what the pictures hold and :class:`COCODataModule` for how they are read. The digits
    are those of :class:`DigitsDataModule`, split alike, so that no digit in a test scene was ever trained on:
    train, val and test scenes are made from 1257, 180 and 360 digits. Every fourth picture is a PNG, the others
    are JPEGs. An annotation also holds `digit_index`, which tells the digit in ``sklearn.datasets.load_digits``.

    The files are written by ``prepare_data``, which Lightning calls, to a folder below `root` that is named after
    the generator's version, the seed and the numbers of scenes, such as ``v1-seed0-1000-100-200``. They are some
    12 kB and 10 ms per scene. The same settings give the same files, and a scene depends on its split, its number
    and the seed alone: of 500 training scenes each is among the 1000 as well.

    Args:
        root: Folder that holds the data sets.
        train_scenes: Number of training scenes.
        val_scenes: Number of validation scenes.
        test_scenes: Number of test scenes.
        image_size: Length in pixels to which the shorter side of a picture is brought.
        max_size: Length in pixels that the longer side keeps to.
        batch_size: Samples per batch and process.
        num_workers: Worker processes that load data, per process.
        scale_jitter: Range of the factor by which the size of a training picture varies.
        horizontal_flip: Probability of mirroring a training picture; a mirrored digit is no digit.
        common: Arguments of :class:`COCODataModule`, but for the files, folders and categories, which are settled.

    Raises:
        InputError: A number is out of its range; or, in ``prepare_data``, `root` cannot be written, or what lies
            in the place of the data set is something else.
    """

    def __init__(
        self,
        root: str = "datasets/digit_scenes",
        *,
        train_scenes: int = 1000,
        val_scenes: int = 100,
        test_scenes: int = 200,
        image_size: int = 128,
        max_size: int = 192,
        batch_size: int = 8,
        num_workers: int = 1,
        scale_jitter: tuple[float, float] = (0.9, 1.1),
        horizontal_flip: float = 0.0,
        **common: Any,
    ) -> None:
        scenes: dict[Split, int] = {"train": train_scenes, "val": val_scenes, "test": test_scenes}
        for split, count in scenes.items():
            require_int(f"{split}_scenes", count, "a number of scenes, at least 1", low=1)
        super().__init__(
            root,
            train_annotations=_ANNOTATIONS.format("train"),
            val_annotations=_ANNOTATIONS.format("val"),
            test_annotations=_ANNOTATIONS.format("test"),
            train_images="train",
            val_images="val",
            test_images="test",
            image_size=image_size,
            max_size=max_size,
            batch_size=batch_size,
            num_workers=num_workers,
            scale_jitter=scale_jitter,
            horizontal_flip=horizontal_flip,
            class_names=list(_CLASS_NAMES),
            category_ids=list(_CATEGORY_IDS),
            **common,
        )
        # what is settled above is no argument of this class, and `load_from_checkpoint` would hand it back as one
        for name in _SETTLED:
            self.hparams.pop(name, None)
        self._collection = root
        self._scenes = scenes
        self.root = os.path.join(root, _folder_name(self.seed, scenes))

    def prepare_data(self) -> None:
        """Write the data set where it is not there; nothing is written where all there is to do is to predict."""
        if self.trainer is None or not self.trainer.predicting:
            write_digit_scenes(self._collection, self.seed, self._scenes)

    def load_split(self, split: Split) -> MapDataset:
        """Return a split; without a trainer, which would have done so, it is written first if need be."""
        if self.trainer is None:
            self.prepare_data()
        return super().load_split(split)


# ---- the digits


def _ink(rng: np.random.Generator, image: Array) -> Array:
    """Write a digit (8, 8) larger: opacity (side, side) of its ink, with a blank margin all around."""
    # uniform in the root: small digits are more frequent than large ones, though less than they would be log-uniform
    frame = float(rng.uniform(*np.sqrt(_FRAME)) ** 2)
    angle = rng.normal(0, 5 * math.pi / 180)
    shear = rng.normal(0, 0.08)
    stretch = math.exp(rng.normal(0, 0.07))
    # the strokes reach the frame, and need blank paper beyond it to end smoothly
    margin = 3
    padded = np.pad(image, margin)
    side = math.ceil(frame * 1.6)
    pixel = _NATIVE_SIZE / frame
    cos, sin = math.cos(angle) * pixel, math.sin(angle) * pixel
    # from the pixels written back to those of the image, about the two centres
    matrix = np.array([[cos, sin], [-sin, cos]]) @ np.array([[stretch, shear], [0, 1 / stretch]])
    offset = _NATIVE_SIZE / 2 + margin - matrix @ np.full(2, side / 2)
    coefficients = (*matrix[0], offset[0], *matrix[1], offset[1])
    grey = PIL.Image.fromarray(padded).transform(
        (side, side), PIL.Image.Transform.AFFINE, coefficients, PIL.Image.Resampling.BICUBIC
    )
    # The opacity rises from 0 to 1 around the level at which ink begins; a lower level is a broader pen. The rise
    # spans a pixel or two, so that large digits are sharp too, but leaves weak strokes and narrow loops their grey.
    level = rng.uniform(0.46, 0.56)
    ramp = float(np.clip(0.6 * pixel, 0.2, 0.3))
    opacity: Array = np.clip((np.asarray(grey) - level) / (2 * ramp) + 0.5, 0, 1).astype(np.float32)
    return opacity


def _place(rng: np.random.Generator, ink: Array, shape: tuple[int, int], others: list[Glyph]) -> Array | None:
    """Put `ink` on a canvas of `shape` where it does `others` no harm; None where twenty tries find no such place."""
    written = ink >= 0.5
    x, y, width, height = _box(written)
    ink = ink[y : y + height, x : x + width]
    boxes = [_box(mask) for mask in _visible(others)]
    for _ in range(20):
        left = round(rng.uniform(-0.12 * width, shape[1] - 0.88 * width))
        top = round(rng.uniform(-0.12 * height, shape[0] - 0.88 * height))
        opacity = _on_canvas(ink, top, left, shape)
        mask = opacity >= 0.5
        if mask.sum() < _MIN_VISIBLE * written.sum():
            continue
        if any(_overlap(_box(mask), box) > _MAX_OVERLAP for box in boxes):
            continue
        whole = [(other.opacity >= 0.5).sum() for other in others]
        shows = [(seen & ~mask).sum() for seen in _visible(others)]
        if all(part >= _MIN_VISIBLE * total for part, total in zip(shows, whole, strict=True)):
            return opacity
    return None


def _on_canvas(patch: Array, top: int, left: int, shape: tuple[int, int]) -> Array:
    """A canvas of zeros with `patch` at (`top`, `left`), which may lie outside in part."""
    canvas = np.zeros(shape, dtype=patch.dtype)
    y, x = max(top, 0), max(left, 0)
    seen = patch[y - top : shape[0] - top, x - left : shape[1] - left]
    canvas[y : y + seen.shape[0], x : x + seen.shape[1]] = seen
    return canvas


def _readable(rng: np.random.Generator, canvas: Array, opacity: Array, pen: Array | None) -> Array | None:
    """A colour that stands out from all that is beneath and around a digit, the `pen`'s own if it does, or None."""
    near = np.asarray(PIL.Image.fromarray(_bytes(opacity)).filter(PIL.ImageFilter.BoxBlur(2))) > 0
    ground = (canvas @ _LUMINANCE)[near]
    # against nearly all of it: a thin line of clutter in the digit's colour does no harm
    low, high = np.quantile(ground, [0.02, 0.98])
    for attempt in range(50):
        colour = _colour(rng) if pen is None or attempt else pen
        luminance = float(colour @ _LUMINANCE)
        if max(low - luminance, luminance - high) >= _MIN_CONTRAST:
            return colour
    return None


def _visible(glyphs: Sequence[Glyph]) -> list[Array]:
    """For each digit the mask (H, W) of its ink that no later digit covers."""
    masks = [glyph.opacity >= 0.5 for glyph in glyphs]
    return [
        mask & ~np.logical_or.reduce([np.zeros_like(mask), *masks[number:]])
        for number, mask in enumerate(masks, start=1)
    ]


def _box(mask: Array) -> Box:
    """(x, y, width, height) of what is true in a mask (H, W), in whole pixels."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return (
        int(columns[0]),
        int(rows[0]),
        int(columns[-1] - columns[0] + 1),
        int(rows[-1] - rows[0] + 1),
    )


def _overlap(first: Box, second: Box) -> float:
    """The share of the smaller of two boxes that lies in the other."""
    (x1, y1, w1, h1), (x2, y2, w2, h2) = first, second
    width = max(min(x1 + w1, x2 + w2) - max(x1, x2), 0)
    height = max(min(y1 + h1, y2 + h2) - max(y1, y2), 0)
    return width * height / min(w1 * h1, w2 * h2)


# ---- the picture around them


def _canvas_size(rng: np.random.Generator) -> tuple[int, int]:
    """(height, width): landscape, portrait, and square one time in five."""
    short = int(rng.integers(_SHORT_SIDE[0], _SHORT_SIDE[1] + 1))
    long = min(round(short * rng.uniform(1.1, 1.5)), _LONG_SIDE)
    shape = rng.choice(["landscape", "portrait", "square"], p=[0.4, 0.4, 0.2])
    return {"landscape": (short, long), "portrait": (long, short), "square": (short, short)}[str(shape)]


def _colour(rng: np.random.Generator, saturation: float = 0.9, value: tuple[float, float] = (0.05, 1.0)) -> Array:
    """A random RGB colour in [0, 1], float32 (3,), up to a `saturation` and in a range of `value`."""
    hue = rng.random()
    return np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0, saturation), rng.uniform(*value)), dtype=np.float32)


def _background(rng: np.random.Generator, height: int, width: int) -> Array:
    """A ground with clutter, float32 (H, W, 3)."""
    # dark, bright or in between, and never of every luminance at once: digits have to find a contrast
    value = ((0.05, 0.4), (0.75, 1.0), (0.4, 0.65))[int(rng.choice(3, p=[0.4, 0.4, 0.2]))]
    first, second = (_colour(rng, 0.6, value) for _ in range(2))
    share = _texture(rng, height, width)[..., None]
    canvas: Array = first + (second - first) * share
    for _ in range(int(rng.integers(0, 6))):
        opacity = _clutter(rng, height, width) * np.float32(rng.uniform(0.3, 0.9))
        canvas = canvas + (_colour(rng, 0.7, value) - canvas) * opacity[..., None]
    return canvas


def _texture(rng: np.random.Generator, height: int, width: int) -> Array:
    """How far the ground is from its first colour towards its second, float32 (H, W) in [0, 1]."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle = rng.uniform(0, 2 * math.pi)
    # along a random direction, in pixels from the centre
    along = (x - width / 2) * math.cos(angle) + (y - height / 2) * math.sin(angle)
    share: Array
    kind = str(rng.choice(["plain", "gradient", "clouds", "stripes", "paper"], p=[0.1, 0.3, 0.3, 0.15, 0.15]))
    if kind == "gradient":
        share = along / (2 * np.abs(along).max()) + 0.5
    elif kind == "clouds":
        share = np.zeros((height, width), dtype=np.float32)
        for cells, weight in ((3, 0.5), (6, 0.3), (14, 0.2)):
            coarse = PIL.Image.fromarray(rng.random((cells, cells), dtype=np.float32))
            share += weight * np.asarray(coarse.resize((width, height), PIL.Image.Resampling.BICUBIC))
    elif kind == "stripes":
        share = 0.5 + 0.5 * np.sin(along * (2 * math.pi / rng.uniform(8, 40)))
    elif kind == "paper":
        period = int(rng.integers(9, 20))
        share = (y % period < 1).astype(np.float32)
        if rng.random() < 0.5:
            share = np.maximum(share, x % period < 1)
        share = share * rng.uniform(0.4, 1)
    else:
        share = np.zeros((height, width))
    share = np.clip(share, 0, 1).astype(np.float32)
    return share


def _clutter(rng: np.random.Generator, height: int, width: int) -> Array:
    """Opacity, float32 (H, W), of one thing that nobody takes for a digit."""
    # drawn three times as large and then reduced, for smooth edges
    scale = 3
    size = np.array([width, height]) * scale
    picture = PIL.Image.new("L", (width * scale, height * scale))
    draw = PIL.ImageDraw.Draw(picture)
    kind = str(rng.choice(["line", "arc", "blob", "specks"]))
    pen = int(rng.integers(2, 9))
    if kind == "line":
        # from one side of the picture to the opposite one: a short one might be read as a 1
        across = int(rng.integers(2))
        ends = rng.random((2, 2)) * size
        ends[:, across] = (-pen, size[across] + pen)
        draw.line([tuple(end) for end in ends], fill=255, width=pen)
    elif kind == "arc":
        # so large that no circle closes within the picture and is read as a 0
        centre, radius = rng.uniform(-0.2, 1.2, 2) * size, rng.uniform(0.6, 1.2) * size.max()
        box = (*(centre - radius), *(centre + radius))
        draw.ellipse(box, outline=255, width=pen)
    elif kind == "blob":
        centre, radius = rng.random(2) * size, rng.uniform(0.08, 0.35, 2) * size.max()
        draw.ellipse((*(centre - radius), *(centre + radius)), fill=255)
    else:
        for point in rng.random((int(rng.integers(10, 60)), 2)) * size:
            radius = rng.uniform(1, 4)
            draw.ellipse((*(point - radius), *(point + radius)), fill=255)
    reduced = picture.reduce(scale)
    if kind == "blob" and rng.random() < 0.6:
        reduced = reduced.filter(PIL.ImageFilter.GaussianBlur(rng.uniform(2, 10)))
    return np.asarray(reduced, dtype=np.float32) / 255


def _paint(canvas: Array, glyphs: Sequence[Glyph]) -> Array:
    for glyph in glyphs:
        canvas = canvas + (glyph.colour - canvas) * glyph.opacity[..., None]
    return canvas


def _bytes(canvas: Array) -> Array:
    """Numbers in [0, 1], clipped where they are not, as uint8."""
    levels: Array = (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)
    return levels
