"""COCO's annotation format: reading a file, checking it, and handing out its pictures with their boxes."""

import dataclasses
import json
import os
from collections import Counter
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from awconv.data.base import Transform
from awconv.data.pictures import is_turned, picture_size, read_picture
from awconv.errors import InputError, is_number, require

Array: TypeAlias = npt.NDArray[Any]
Target: TypeAlias = dict[str, Tensor]

# pixels by which a box may leave its picture and count as rounded, and a little for the sum x + width itself
_ROUNDING = 1 + 1e-3


@dataclass(frozen=True)
class COCOAnnotations:
    """One annotation file in flat arrays; the boxes ``offsets[i]`` to ``offsets[i + 1]`` are those of picture i.

    Arrays and not lists: a list's reference counts would have every forked worker copy it page by page. Polygons and
    masks are not kept.

    Attributes:
        source: The argument and the path that it names, for messages.
        category_ids: The K category ids in ascending order; category ``category_ids[k]`` has label k + 1.
        class_names: The K names of the categories, in the same order.
        annotated: Whether the file lists annotations at all; one of a test set may not.
        image_ids: int64 (N,).
        file_names: Names below the folder of pictures, encoded (N,).
        sizes: Height and width in pixels, int64 (N, 2); 0 where the file does not say.
        offsets: int64 (N + 1,).
        boxes: x1, y1, x2, y2 in pixels (M, 4), float64 as in the file and float32 once they are checked.
        labels: int64 (M,), 1 to K.
        area: Area of the object (not of the box) in square pixels (M,), float64, not a number where the file does not
            say, and float32 once it is checked.
        iscrowd: 1 where the box holds a crowd, int64 (M,).
        clipped: Number of boxes that were cut off at the edge of their picture.
        dropped: Number of boxes that were left out because they have no area in their picture.
    """

    source: str
    category_ids: list[int]
    class_names: list[str]
    annotated: bool
    image_ids: Array
    file_names: Array
    sizes: Array
    offsets: Array
    boxes: Array
    labels: Array
    area: Array
    iscrowd: Array
    clipped: int = 0
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def owners(self) -> Array:
        """Picture of each box, int64 (M,)."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def check_pictures(self, folder: str, argument: str, remedy: str) -> "COCOAnnotations":
        """Find the pictures, and fit the boxes into them.

        COCO's boxes are rounded, so that one that leaves its picture by up to a pixel is kept as it is: the official
        average precision is that of the boxes in the file. One that leaves it by more is cut off, and one that has no
        area in the picture is dropped.

        Args:
            folder: Folder below which the pictures lie.
            argument: The argument that names it, for messages.
            remedy: What to do if there is no such folder, for messages.

        Raises:
            InputError: The folder or a picture is missing, or the size of a picture can neither be found in the file
                nor read from the picture.
        """
        names = [os.fsdecode(name) for name in self.file_names]
        require(os.path.isdir(folder), argument, folder, f"a folder of pictures, and there is none; {remedy}")
        parents = {os.path.dirname(name) for name in names}
        there = {parent: _names_in(os.path.join(folder, parent), argument) for parent in parents}
        missing = [name for name in names if os.path.basename(name) not in there[os.path.dirname(name)]]
        if missing:
            raise InputError(
                f"{argument}={folder!r}: {len(missing)} of the {len(names)} pictures of {self.source} are missing, "
                f"such as {missing[0]}; add them, or name the folder that holds them with --data.{argument}"
            )
        sizes = self.sizes.copy()
        for index in np.flatnonzero((sizes == 0).any(axis=1)):
            sizes[index] = picture_size(os.path.join(folder, names[index]))
        height, width = sizes[self.owners].T
        inside = np.clip(self.boxes, 0, np.stack([width, height, width, height], axis=1))
        outside = (np.abs(inside - self.boxes) > _ROUNDING).any(axis=1)
        # what the networks get is float32, in which a sliver may have lost its width
        inside = inside.astype(np.float32)
        boxes = np.where(outside[:, None], inside, self.boxes.astype(np.float32))
        real = (inside[:, 2:] > inside[:, :2]).all(axis=1)
        filled = np.where(np.isnan(self.area), (boxes[:, 2:] - boxes[:, :2]).prod(axis=1), self.area)
        return dataclasses.replace(
            self,
            sizes=sizes,
            boxes=boxes,
            area=filled.astype(np.float32),
            clipped=int((outside & real).sum()),
            dropped=int((~real).sum()),
        )._keep(np.ones(len(self), dtype=bool), np.asarray(real))

    def for_training(self, keep_empty: bool) -> "COCOAnnotations":
        """Leave out the crowds, and unless `keep_empty` the pictures without boxes."""
        single = self.iscrowd == 0
        occupied = np.bincount(self.owners[single], minlength=len(self)) > 0
        return self._keep(occupied | keep_empty, single)

    def _keep(self, images: Array, boxes: Array) -> "COCOAnnotations":
        """The pictures and boxes where the masks `images` (N,) and `boxes` (M,) are true; no box may lose its own."""
        counts = np.bincount(self.owners[boxes], minlength=len(self))[images]
        return dataclasses.replace(
            self,
            offsets=np.concatenate([[0], np.cumsum(counts)]),
            **{name: getattr(self, name)[images] for name in ("image_ids", "file_names", "sizes")},
            **{name: getattr(self, name)[boxes] for name in ("boxes", "labels", "area", "iscrowd")},
        )


def read_annotations(path: str, argument: str, remedy: str) -> COCOAnnotations:
    """Read and check a file in COCO's format of object instances, or of images without annotations.

    Categories are numbered in the order of their ids, from 1: COCO's 80 ids lie between 1 and 90.

    Args:
        path: The file.
        argument: The argument that names it, for messages.
        remedy: What to do if there is no such file, for messages.

    Raises:
        InputError: The file is missing or is not what it should be.
    """
    source = f"{argument}={path!r}"
    content = _parse(path, source, remedy)
    categories = _entries(content, "categories", source)
    images = _entries(content, "images", source)
    annotations = _entries(content, "annotations", source) if "annotations" in content else []

    category_ids = _ids(categories, "category", source)
    names = [entry.get("name") for entry in categories]
    for number, name in zip(category_ids, names, strict=True):
        if not isinstance(name, str):
            raise InputError(f"{source}: category {number} has no name (name={name!r}); give it one")
    _refuse_repeated(names, "name of a category", source)
    class_names = {number: str(name) for number, name in sorted(zip(category_ids, names, strict=True))}
    image_ids = _ids(images, "image", source)
    file_names = [_file_name(image, source) for image in images]
    sizes = [_size(image, source) for image in images]
    index_of = {number: index for index, number in enumerate(image_ids)}
    label_of = {number: index + 1 for index, number in enumerate(class_names)}

    # by picture, and for each picture in the order of the file
    owners = np.empty(len(annotations), dtype=np.int64)
    boxes = np.empty((len(annotations), 4))
    labels = np.empty_like(owners)
    area, iscrowd = np.empty(len(annotations)), np.empty(len(annotations))
    for row, annotation in enumerate(annotations):
        owners[row] = _look_up(annotation, "image_id", index_of, row, source)
        labels[row] = _look_up(annotation, "category_id", label_of, row, source)
        boxes[row] = _box(annotation, row, source)
        area[row] = _number(annotation, "area", row, source, float("nan"))
        iscrowd[row] = _number(annotation, "iscrowd", row, source, 0)
    if wrong := np.flatnonzero((iscrowd != 0) & (iscrowd != 1)).tolist():
        value = annotations[wrong[0]]["iscrowd"]
        raise InputError(f"{source}: {_called(annotations[wrong[0]], wrong[0])} has iscrowd={value!r}; make it 0 or 1")
    order = np.argsort(owners, kind="stable")
    counts = np.bincount(owners, minlength=len(images))
    return COCOAnnotations(
        source=source,
        category_ids=list(class_names),
        class_names=list(class_names.values()),
        annotated="annotations" in content,
        image_ids=np.array(image_ids, dtype=np.int64),
        file_names=np.array(file_names),
        sizes=np.array(sizes, dtype=np.int64),
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        boxes=boxes[order],
        labels=labels[order],
        area=area[order],
        iscrowd=iscrowd[order].astype(np.int64),
    )


class COCODataset(Dataset[tuple[Tensor, Target]]):
    """Pictures with their boxes.

    A sample is ``(image, target)``: `image` uint8 (3, H, W); `target` has ``boxes`` float32 (M, 4), x1, y1, x2, y2 in
    pixels, ``labels`` int64 (M,) from 1, ``area`` float32 (M,), ``iscrowd`` int64 (M,) and ``image_id`` int64 ().
    Pictures are read as they are stored, whatever their EXIF orientation says: the boxes belong to those pixels. (A
    TIFF is turned in any case, by PIL.)

    Args:
        annotations: The checked annotations, see :meth:`COCOAnnotations.check_pictures`.
        folder: Folder below which the pictures lie.
        transform: Maps image and target, as ``tv_tensors``, to the sample; None hands them out as they are.
    """

    def __init__(self, annotations: COCOAnnotations, folder: str, transform: Transform | None = None) -> None:
        self.annotations = annotations
        self._folder = folder
        self._transform = transform

    def __len__(self) -> int:
        return len(self.annotations)

    def path(self, index: int) -> str:
        """Path of the picture at `index`."""
        return os.path.join(self._folder, os.fsdecode(self.annotations.file_names[index]))

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        annotations = self.annotations
        image = read_picture(self.path(index))
        size = annotations.sizes[index].tolist()
        if list(image.shape[1:]) != size:
            (height, width), (real_height, real_width) = size, image.shape[1:]
            turned = ", stored turned (EXIF)" if is_turned(self.path(index)) else ""
            remedy = "mend the file or replace the picture"
            if size == [real_width, real_height] and not turned:
                remedy = "its width and height are exchanged: mend them"
            raise InputError(
                f"{self.path(index)}: this picture is {real_width}x{real_height}{turned}, and {annotations.source} "
                f"says {width}x{height}, so that its boxes do not fit; {remedy}"
            )
        boxes = slice(*annotations.offsets[index : index + 2])
        target = {
            "boxes": torch.tensor(annotations.boxes[boxes]),
            "labels": torch.tensor(annotations.labels[boxes]),
            "image_id": torch.tensor(annotations.image_ids[index]),
            "area": torch.tensor(annotations.area[boxes]),
            "iscrowd": torch.tensor(annotations.iscrowd[boxes]),
        }
        if self._transform is None:
            return image, target
        target["boxes"] = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=image.shape[1:])
        transformed: tuple[Tensor, Target] = self._transform(tv_tensors.Image(image), target)
        return transformed


def _parse(path: str, source: str, remedy: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            # The polygons are most of a file of COCO's; left out at once, they never fill the memory.
            content = json.load(file, object_pairs_hook=_without_polygons)
    except FileNotFoundError:
        raise InputError(f"{source}: expected a COCO annotation file, and there is none; {remedy}") from None
    except OSError as error:
        raise InputError(f"{source}: this file cannot be read ({error.strerror}); {remedy}") from None
    except (ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{source}: this file is not JSON ({reason}); replace or repair it") from None
    expected = "expected a JSON object with lists of images, annotations and categories, as in COCO's instances_*.json"
    if not isinstance(content, dict):
        raise InputError(f"{source}: {expected}, found a {type(content).__name__}; convert it to COCO's format")
    missing = [key for key in ("images", "categories") if key not in content]
    if missing:
        # only a test set may lack annotations, and then it is complete in the others
        missing += ["annotations"] if "annotations" not in content else []
        found = ", ".join(map(str, list(content)[:6])) or "nothing"
        raise InputError(
            f"{source}: {expected}, found {found} and no {' and no '.join(missing)}; choose or write another file"
        )
    return content


def _without_polygons(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entry = dict(pairs)
    entry.pop("segmentation", None)
    return entry


def _entries(content: dict[str, Any], key: str, source: str) -> list[dict[str, Any]]:
    entries = content[key]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{source}: expected a list of objects under {key}, found something else; repair the file")
    if not entries and key != "annotations":
        raise InputError(f"{source}: the list of {key} is empty; add some, or choose another file")
    return entries


def _ids(entries: list[dict[str, Any]], kind: str, source: str) -> list[int]:
    ids = [entry.get("id") for entry in entries]
    for place, number in enumerate(ids):
        if not isinstance(number, int) or isinstance(number, bool) or abs(number) >= 2**63:
            raise InputError(
                f"{source}: expected a whole number as id of every {kind}, found id={number!r} in number {place + 1}; "
                "number them"
            )
    _refuse_repeated(ids, f"{kind} id", source)
    return ids  # type: ignore[return-value]


def _refuse_repeated(values: list[Any], kind: str, source: str) -> None:
    repeated = [value for value, count in Counter(values).items() if count > 1]
    if repeated:
        raise InputError(
            f"{source}: expected every {kind} once, found {repeated[0]!r} several times"
            f"{f' (and {len(repeated) - 1} more)' if len(repeated) > 1 else ''}; rename or remove the others"
        )


def _called(annotation: dict[str, Any], row: int) -> str:
    return f"annotation {annotation['id']!r}" if "id" in annotation else f"annotation number {row + 1} (without id)"


def _look_up(annotation: dict[str, Any], key: str, places: dict[Any, int], row: int, source: str) -> int:
    value = annotation.get(key)
    # anything but a number may not be hashable; 3.0 is found under 3
    place = places.get(value) if isinstance(value, (int, float)) else None
    if place is None:
        kind = {"image_id": "image", "category_id": "category"}[key]
        plural = {"image_id": "images", "category_id": "categories"}[key]
        raise InputError(
            f"{source}: {_called(annotation, row)} is of {kind} {value!r}, which is not in the list of {plural}; "
            f"add the {kind} or remove the annotation"
        )
    return place


def _box(annotation: dict[str, Any], row: int, source: str) -> tuple[float, float, float, float]:
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        raise InputError(
            f"{source}: {_called(annotation, row)} has bbox={box!r}; expected four finite numbers, "
            "x, y, width and height in pixels; repair or remove it"
        )
    x, y, width, height = box
    return x, y, x + width, y + height


def _number(annotation: dict[str, Any], key: str, row: int, source: str, default: float) -> float:
    value: float | None = annotation.get(key)
    if value is None:
        return default
    if not isinstance(value, bool) and not (is_number(value) and abs(value) < 1e30):  # which float32 can hold
        raise InputError(
            f"{source}: {_called(annotation, row)} has {key}={value!r}; expected a number; repair or remove it"
        )
    return value


def _file_name(image: dict[str, Any], source: str) -> bytes:
    """Name of an image's picture below its folder, encoded as the file system does."""
    name = image.get("file_name")
    url = image.get("coco_url")
    try:
        if not name and isinstance(url, str):
            name = urlsplit(url).path.rpartition("/")[2]
        if isinstance(name, str) and name:
            # as written on Windows
            return os.fsencode(name.replace("\\", "/"))
    except ValueError:  # an address that is none, or a name that no file can have
        name = name or url
    raise InputError(
        f"{source}: image {image['id']} has no file_name (but {name!r}); give it the name of its picture file"
    )


def _size(image: dict[str, Any], source: str) -> tuple[int, int]:
    sides = [image.get(key) or 0 for key in ("height", "width")]
    if not all(is_number(side) and 0 <= side < 2**31 and side == int(side) for side in sides):
        raise InputError(
            f"{source}: image {image['id']} has width={image.get('width')!r} and height={image.get('height')!r}; "
            "expected whole numbers of pixels; correct them, or leave both out"
        )
    return int(sides[0]), int(sides[1])


def _names_in(folder: str, argument: str) -> set[str]:
    try:
        return set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except (OSError, ValueError) as error:  # no right to read it, a name too long or with a zero byte
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"{argument}: the folder of pictures {folder!r} cannot be read ({reason}); mend that, or name another with "
            f"--data.{argument}"
        ) from None
