"""COCO's annotation format: reading a file, checking it, and handing out its images with their boxes."""

import dataclasses
import errno
import json
import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from typing import Any, TypeAlias
from urllib.parse import unquote, urlsplit

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from awconv.data.base import Transform
from awconv.data.pictures import Head, composed, read_heads, read_or_next, read_picture, shown
from awconv.errors import InputError, is_number, require
from awconv.files import open_regular

Array: TypeAlias = npt.NDArray[Any]
Target: TypeAlias = dict[str, Tensor]
CategoryId: TypeAlias = str | int

# pixels by which a box may leave its picture and count as rounded, and a little for the sum x + width itself
_ROUNDING = 1 + 1e-3


@dataclass(frozen=True)
class COCOAnnotations:
    """One annotation file in flat arrays; the boxes ``offsets[i]`` to ``offsets[i + 1]`` are those of picture i.

    Arrays and not lists: a list's reference counts would have every forked worker copy it page by page. Polygons and
    masks are not kept.

    Attributes:
        source: The argument and the path that it names, for messages.
        category_ids: The K category ids, whole numbers or text, in pycocotools' order; category ``category_ids[k]`` has
            label k + 1.
        class_names: The K names of the categories, in the same order.
        root: Id of the category without annotations that all the others name as their supercategory, as Roboflow writes
            one; None where there is none.
        annotated: Whether the file lists annotations at all; one of a test set may not.
        image_ids: int64 (N,): the ids of the file, or where these are not all whole numbers of 64 bits, the place of
            each in pycocotools' order.
        own_ids: The ids of the file, objects (N,); None where `image_ids` are these.
        file_names: Names below the folder of pictures, encoded (N,); as in the file, and as on the disk once the
            pictures were found.
        sizes: Height and width in pixels, int64 (N, 2); 0 where the file does not say. Once the pictures were found,
            of the upright picture.
        orientations: The EXIF orientation that the boxes were turned by, to those of the upright picture (N,); 1 where
            they are as in the file.
        offsets: int64 (N + 1,).
        boxes: x1, y1, x2, y2 in pixels (M, 4), float64 as in the file and float32 once they are checked.
        labels: int64 (M,), 1 to K.
        area: Area of the object (not of the box) in square pixels (M,), float64, not a number where the file does not
            say, and float32 once it is checked.
        iscrowd: 1 where the box holds a crowd, int64 (M,).
        clipped: Number of boxes that were cut off at the edge of their picture.
        dropped: Number of boxes that were left out because they have no area in their picture.
        notes: What was left out or decided, for the user, one line each.
    """

    source: str
    category_ids: list[CategoryId]
    class_names: list[str]
    root: CategoryId | None
    annotated: bool
    image_ids: Array
    own_ids: Array | None
    file_names: Array
    sizes: Array
    orientations: Array
    offsets: Array
    boxes: Array
    labels: Array
    area: Array
    iscrowd: Array
    clipped: int = 0
    dropped: int = 0
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def owners(self) -> Array:
        """Picture of each box, int64 (M,)."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def has_boxes_of(self, category_id: CategoryId) -> bool:
        """Whether an annotation is of this category."""
        return category_id in self.category_ids and self.category_ids.index(category_id) + 1 in self.labels

    def for_categories(
        self, category_ids: Sequence[CategoryId], class_names: Sequence[str], source: str
    ) -> "COCOAnnotations":
        """Number the labels by these categories instead of the file's own list.

        The file may list only some of them, as tools do that list what occurs. Categories that are not among them may
        have no annotations.

        Args:
            category_ids: K ids; the first gets label 1.
            class_names: K names.
            source: Where they come from, for messages.

        Raises:
            InputError: An annotation is of another category, or an id has another name.
        """
        expected = dict(zip(category_ids, map(composed, class_names), strict=True))
        places = {number: label for label, number in enumerate(expected, start=1)}
        counts = np.bincount(self.labels, minlength=len(self.category_ids) + 1)
        own = dict(zip(self.category_ids, self.class_names, strict=True))
        wrong = [
            (number, name)
            for (number, name), count in zip(own.items(), counts[1:], strict=True)
            if expected.get(number) != name and (count or number in expected)
        ]
        if wrong:
            raise InputError(
                f"{self.source}: expected no categories besides the {len(expected)} of {source}, found "
                f"{shown_categories(wrong)}; give both the same ids and names"
            )
        labels = np.array([0, *(places.get(number, 0) for number in own)])[self.labels]
        return dataclasses.replace(
            self, category_ids=list(category_ids), class_names=list(class_names), root=None, labels=labels
        )

    # ---- with the pictures

    def check_pictures(self, folder: str, argument: str, remedy: str, skip_bad: bool = False) -> "COCOAnnotations":
        """Find the pictures, compare their sizes with those in the file, and fit the boxes into them.

        Only the heads of the images are read. Images are used upright. The boxes of one that is stored turned (EXIF)
        are turned with it where the file's width and height are those of the image as stored, unless its boxes, or
        where they fit both ways most of the file's, fit the upright image better; else they are taken to be of the
        upright image, as viewers show it. Where the size
        does not decide (it is missing, the image is square, or turned by half or mirrored), the boxes are taken as
        those of the file's other images are, and of the upright image if the others do not agree.

        COCO's boxes are rounded, so that one that leaves its picture by up to a pixel is kept as it is: the official
        average precision is that of the boxes in the file. One that leaves it by more is cut off, and one that has no
        area in the picture is dropped.

        Args:
            folder: Folder below which the pictures lie.
            argument: The argument that names it, for messages.
            remedy: What to do if there is no such folder, for messages.
            skip_bad: Leave out the pictures that are missing or cannot be read, unless that leaves none.

        Raises:
            InputError: The folder or a picture is missing or cannot be read, or pictures have other sizes than the
                file says.
        """
        require(os.path.isdir(folder), argument, folder, f"a folder of pictures, and there is none; {remedy}")
        return self._find(folder, argument, skip_bad)._measure(folder, argument, skip_bad)._fit()

    def _find(self, folder: str, argument: str, skip_bad: bool) -> "COCOAnnotations":
        """Replace the names in the file by those on the disk."""
        files = _Files(folder, argument)
        names = [os.fsdecode(name) for name in self.file_names]
        found = [files.find(name) for name in names]
        there = np.array([name is not None for name in found])
        notes = self.notes
        if not there.all():
            first = names[int(there.argmin())]
            count = f"{np.sum(~there)} of the {len(self)} pictures of {self.source} are missing, such as {first}"
            if not skip_bad or not there.any():
                base = posixpath.basename(first.replace("\\", "/"))
                known = f" (there is {base}: write names relative to the folder)" if files.find(base) else ""
                raise InputError(
                    f"{argument}={folder!r}: {count}{known}; add them, or name the folder that holds them with "
                    f"--data.{argument}"
                )
            notes = (*notes, f"{np.sum(~there)} of its {len(self)} images left out, which are missing, such as {first}")
        kept = self._keep(there, there[self.owners])
        encoded = np.array([os.fsencode(name) for name in found if name is not None])
        return dataclasses.replace(kept, file_names=encoded, notes=notes)

    def _measure(self, folder: str, argument: str, skip_bad: bool) -> "COCOAnnotations":
        """Compare the sizes with those of the pictures, and turn the boxes of those that are stored turned."""
        heads = read_heads([os.path.join(folder, os.fsdecode(name)) for name in self.file_names])
        errors = [head for head in heads if isinstance(head, InputError)]
        notes = self.notes
        if errors:
            count = f"{len(errors)} of the {len(self)} images of {self.source} cannot be read, such as {errors[0]}"
            if not skip_bad or len(errors) == len(self):
                raise InputError(f"{argument}={folder!r}: {count}")
            count = f"{len(errors)} of its {len(self)} images left out, which cannot be read, such as {errors[0]}"
            notes = (*notes, count)
        readable = np.array([isinstance(head, Head) for head in heads])
        kept = self._keep(readable, readable[self.owners])
        height, width, orientation = np.array([head for head in heads if isinstance(head, Head)]).T
        stored = np.stack([height, width], axis=1)
        upright = np.where(orientation[:, None] >= 5, stored[:, ::-1], stored)
        unknown = (kept.sizes == 0).any(axis=1)
        as_stored = (kept.sizes == stored).all(axis=1) | unknown
        as_upright = (kept.sizes == upright).all(axis=1) | unknown
        if not (as_upright | as_stored).all():
            raise kept._wrong_sizes(~(as_upright | as_stored), stored, orientation, folder, argument)
        # Some tools annotate the upright image and then write the size that the head of its file says.
        owners, sideways = kept.owners, as_stored & ~as_upright
        better = _lie_within(kept.boxes, stored[owners]) * 1 - _lie_within(kept.boxes, upright[owners])
        votes = np.bincount(owners, weights=better, minlength=len(kept))
        turned = sideways & np.where(votes == 0, votes[sideways].sum() >= 0, votes > 0)
        if turned.any() and as_stored.all():
            # those whose size says nothing, such as square ones, are what the others of the file are
            turned = orientation > 1
        boxes = kept.boxes.copy()
        for kind in np.unique(orientation[turned]).tolist():
            rows = (turned & (orientation == kind))[owners]
            boxes[rows] = turn_boxes(boxes[rows], kind, stored[owners][rows])
        if (orientation > 1).any():
            notes = (*notes, _turned_note(int((orientation > 1).sum()), int(sideways.sum()), int(turned.sum())))
        return dataclasses.replace(
            kept, sizes=upright, boxes=boxes, orientations=np.where(turned, orientation, 1), notes=notes
        )

    def _wrong_sizes(self, wrong: Array, stored: Array, orientation: Array, folder: str, argument: str) -> InputError:
        first = int(wrong.argmax())
        (height, width), (real_height, real_width) = self.sizes[first], stored[first]
        exif = ", stored turned (EXIF)" if orientation[first] > 1 else ""
        exchanged = (self.sizes[wrong] == stored[wrong][:, ::-1]).all()
        remedy = "width and height are exchanged: " if exchanged else ""
        remedy += "correct them in the file" + ("" if exchanged else ", or replace the images")
        return InputError(
            f"{argument}={folder!r}: expected the widths and heights that {self.source} says, found others in "
            f"{wrong.sum()} of its {len(self)} images, such as {os.fsdecode(self.file_names[first])}, which is "
            f"{real_width}x{real_height}{exif} and not {width}x{height}, so that its boxes do not fit; {remedy}"
        )

    def _fit(self) -> "COCOAnnotations":
        """Fit the boxes into their pictures."""
        sizes = self.sizes[self.owners]
        outside = ~_lie_within(self.boxes, sizes)
        inside = _clip(self.boxes, sizes)
        boxes = np.where(outside[:, None], inside, self.boxes).astype(np.float32)
        # what the networks get is float32, in which a sliver may have lost its width
        inside = inside.astype(np.float32)
        real = (inside[:, 2:] > inside[:, :2]).all(axis=1)
        filled = np.where(np.isnan(self.area), (boxes[:, 2:] - boxes[:, :2]).prod(axis=1), self.area)
        clipped, dropped = int((outside & real).sum()), int((~real).sum())
        note = (
            f"{clipped} of its boxes clipped, which reached out of their pictures, and {dropped} dropped, which had no "
            "area in them (a bbox is x, y, width, height)"
        )
        return dataclasses.replace(
            self,
            boxes=boxes,
            area=filled.astype(np.float32),
            clipped=clipped,
            dropped=dropped,
            notes=(*self.notes, note) if clipped or dropped else self.notes,
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
            own_ids=None if self.own_ids is None else self.own_ids[images],
            **{name: getattr(self, name)[images] for name in ("image_ids", "file_names", "sizes", "orientations")},
            **{name: getattr(self, name)[boxes] for name in ("boxes", "labels", "area", "iscrowd")},
        )


def shown_categories(categories: Sequence[tuple[CategoryId, str]]) -> str:
    """Names and ids of categories for a message, of many the first ones."""
    return ", ".join(shown([f"{name!r} (id {number!r})" for number, name in categories]))


def turn_boxes(boxes: Array, orientation: int, sizes: Array) -> Array:
    """Turn boxes as an EXIF orientation turns the image that they belong to.

    Args:
        boxes: x1, y1, x2, y2 in pixels of the image as stored (M, 4).
        orientation: EXIF's, 1 to 8.
        sizes: Height and width of each box's image as stored (M, 2).

    Returns:
        x1, y1, x2, y2 in pixels of the upright image (M, 4).
    """
    (x1, y1, x2, y2), (height, width) = boxes.T, sizes.T
    if orientation in (2, 3, 7, 8):
        x1, x2 = width - x2, width - x1
    if orientation in (3, 4, 6, 7):
        y1, y2 = height - y2, height - y1
    return np.stack([y1, x1, y2, x2] if orientation >= 5 else [x1, y1, x2, y2], axis=1)


def _turned_note(turned: int, as_stored: int, with_boxes: int) -> str:
    """What to say of the images that are stored turned.

    Args:
        turned: Their number.
        as_stored: To how many of them the file gives the size as stored.
        with_boxes: Of how many of them the boxes were turned.
    """
    upright = "taken to be of the upright image"
    if with_boxes == turned:
        how = "their boxes are turned upright with them, since width and height are given as stored"
    elif with_boxes:
        how = (
            f"the boxes of {with_boxes} are turned upright with them, since width and height are given as stored; "
            f"those of the others are {upright}, as viewers show it"
        )
    elif as_stored:
        how = f"their boxes are {upright}, where they fit, though width and height are given as stored"
    else:
        how = f"their boxes are {upright}, as viewers show it"
    return f"{turned} of its images are stored turned (EXIF): {how}"


def _clip(boxes: Array, sizes: Array) -> Array:
    """Cut boxes (M, 4) off at the edges of images of these heights and widths (M, 2)."""
    height, width = sizes.T
    return np.clip(boxes, 0, np.stack([width, height, width, height], axis=1))


def _lie_within(boxes: Array, sizes: Array) -> Array:
    """Which boxes (M, 4) lie in images of these heights and widths (M, 2), but for rounding."""
    return np.asarray((np.abs(_clip(boxes, sizes) - boxes) <= _ROUNDING).all(axis=1))


def read_annotations(path: str, argument: str, remedy: str) -> COCOAnnotations:
    """Read and check a file in COCO's format of object instances, or of images without annotations.

    It reads what pycocotools reads, and whatever else can mean only one thing. Ids are whole numbers or text (those of
    images may be fractions), and numbers may be written as text. An entry may be repeated if nothing differs. Labels
    number the categories from 1 in the order of their ids: COCO's 80 ids lie between 1 and 90.

    Args:
        path: The file.
        argument: The argument that names it, for messages.
        remedy: What to do if there is no such file, for messages.

    Raises:
        InputError: The file is missing or is not what it should be.
    """
    source = f"{argument}={path!r}"
    content = _parse(path, source, remedy)
    categories = _by_id(_entries(content, "categories", source), "category", ("name",), source)
    images = _by_id(_entries(content, "images", source), "image", ("file_name", "coco_url", "width", "height"), source)
    annotations = _entries(content, "annotations", source) if "annotations" in content else []

    category_ids = sorted(categories, key=id_order)
    names = {number: _category_name(number, categories[number], source) for number in category_ids}
    image_ids = list(images)
    file_names = [_file_name(number, image, source) for number, image in images.items()]
    given = [[image.get("height"), image.get("width")] for image in images.values()]
    sizes, row = _numbers(given, (2,), _is_side)
    if row is not None:
        raise InputError(
            f"{source}: image {image_ids[row]} has width={given[row][1]!r} and height={given[row][0]!r}; expected "
            "whole numbers of pixels; correct them, or leave both out"
        )

    def column(key: str) -> list[Any]:
        return [annotation.get(key) for annotation in annotations]

    def wrong(row: int, what: str) -> InputError:
        return InputError(f"{source}: {_called(annotations[row], numbers[row])} {what}")

    numbers = np.arange(len(annotations))
    notes: tuple[str, ...] = ()
    owners = _places(column("image_id"), image_ids)
    if (owners < 0).any():
        numbers, notes = np.flatnonzero(owners >= 0), (_orphans_note(annotations, owners, source),)
        owners, annotations = owners[numbers], [annotations[number] for number in numbers.tolist()]
    places = _places(column("category_id"), category_ids)
    if (places < 0).any():
        number = annotations[row := int(places.argmin())].get("category_id")
        remedy = "add the category or remove the annotation"
        raise wrong(row, f"is of category {number!r}, which is not in the list of categories; {remedy}")
    boxes, row = _numbers(column("bbox"), (4,), np.isfinite)
    if row is not None:
        expected = "expected four finite numbers, x, y, width and height in pixels; repair or remove it"
        raise wrong(row, f"has bbox={annotations[row].get('bbox')!r}; {expected}")
    boxes[:, 2:] += boxes[:, :2]
    area, row = _numbers(column("area"), (), _fits_float32)
    if row is not None:
        raise wrong(row, f"has area={annotations[row]['area']!r}; expected a number; repair or remove it")
    iscrowd, row = _numbers(column("iscrowd"), (), _is_flag)
    if row is not None:
        raise wrong(row, f"has iscrowd={annotations[row]['iscrowd']!r}; make it 0 or 1")

    root = _root({number: categories[number] for number in category_ids}, set(places.tolist()))
    refuse_repeated([name for number, name in names.items() if number != root], "name of a category", source)
    plain = all(type(number) is int and -(2**63) <= number < 2**63 for number in image_ids)
    own_ids = np.empty(len(image_ids), dtype=object)
    own_ids[:] = image_ids
    # by picture, and for each picture in the order of the file
    order = np.argsort(owners, kind="stable")
    counts = np.bincount(owners, minlength=len(images))
    return COCOAnnotations(
        source=source,
        category_ids=category_ids,
        class_names=list(names.values()),
        root=root,
        annotated="annotations" in content,
        image_ids=np.array(image_ids if plain else _ranks(image_ids), dtype=np.int64),
        own_ids=None if plain else own_ids,
        file_names=np.array(file_names),
        sizes=np.maximum(np.nan_to_num(sizes), 0).astype(np.int64),
        orientations=np.ones(len(images), dtype=np.int64),
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        boxes=boxes[order],
        labels=places[order] + 1,
        area=area[order],
        iscrowd=np.nan_to_num(iscrowd[order]).astype(np.int64),
        notes=notes,
    )


class COCODataset(Dataset[tuple[Tensor, Target]]):
    """Pictures with their boxes.

    A sample is ``(image, target)``: `image` uint8 (3, H, W), upright; `target` has ``boxes`` float32 (M, 4), x1, y1,
    x2, y2 in pixels, ``labels`` int64 (M,) from 1, ``area`` float32 (M,), ``iscrowd`` int64 (M,) and ``image_id`` int64
    ().

    Args:
        annotations: The checked annotations, see :meth:`COCOAnnotations.check_pictures`.
        folder: Folder below which the pictures lie.
        transform: Maps image and target, as ``tv_tensors``, to the sample; None hands them out as they are.
        skip_bad: Replace a picture that cannot be read by the next one that can, and warn (every process that loads
            does), instead of raising `InputError`.
    """

    def __init__(
        self,
        annotations: COCOAnnotations,
        folder: str,
        transform: Transform | None = None,
        skip_bad: bool = False,
    ) -> None:
        self.annotations = annotations
        self._folder = folder
        self._transform = transform
        self._skip_bad = skip_bad

    def __len__(self) -> int:
        return len(self.annotations)

    def path(self, index: int) -> str:
        """Path of the picture at `index`."""
        return os.path.join(self._folder, os.fsdecode(self.annotations.file_names[index]))

    def read(self, index: int) -> tuple[Tensor, Target]:
        """Read the picture at `index`, whatever `skip_bad` says, and its target, both before the transform.

        Raises:
            InputError: The picture cannot be read, or has another size than its head said.
        """
        annotations = self.annotations
        image = read_picture(self.path(index))
        height, width = annotations.sizes[index].tolist()
        if image.shape[1:] != (height, width):
            raise InputError(
                f"{self.path(index)}: this image is {image.shape[2]}x{image.shape[1]}, and was {width}x{height} when "
                f"{annotations.source} was checked, so that its boxes do not fit; replace the image or remove it"
            )
        boxes = slice(*annotations.offsets[index : index + 2])
        return image, {
            "boxes": torch.tensor(annotations.boxes[boxes]),
            "labels": torch.tensor(annotations.labels[boxes]),
            "image_id": torch.tensor(annotations.image_ids[index]),
            "area": torch.tensor(annotations.area[boxes]),
            "iscrowd": torch.tensor(annotations.iscrowd[boxes]),
        }

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        if self._skip_bad:
            _, (image, target) = read_or_next(self.read, index, len(self), self.path)
        else:
            image, target = self.read(index)
        if self._transform is None:
            return image, target
        target["boxes"] = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=image.shape[1:])
        transformed: tuple[Tensor, Target] = self._transform(tv_tensors.Image(image), target)
        return transformed

    # ---- back into the terms of the annotation file

    def own_id(self, image_id: int) -> Any:
        """The annotation file's own id of the picture whose target has `image_id`."""
        own_ids, index = self.annotations.own_ids, self._index_of.get(image_id)
        return image_id if own_ids is None or index is None else own_ids[index]

    def own_results(self, results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Put results in COCO's format into the annotation file's own terms.

        Args:
            results: ``image_id`` as in the targets, ``bbox`` (x, y, width and height in pixels of the upright picture),
                and whatever else.

        Returns:
            The same with the ids of the file, and with the boxes in the pixels that the boxes of the file belong to.
        """
        own = []
        for result in results:
            index = self._index_of.get(result["image_id"])
            if index is None:  # of another data set that was tested with this one
                own.append(result)
                continue
            orientation = int(self.annotations.orientations[index])
            result = {**result, "image_id": self.own_id(result["image_id"])}
            if orientation > 1:
                x, y, width, height = result["bbox"]
                boxes = np.array([[x, y, x + width, y + height]])
                # all undo themselves, but for the two quarter turns
                back = {6: 8, 8: 6}.get(orientation, orientation)
                ((x1, y1, x2, y2),) = turn_boxes(boxes, back, self.annotations.sizes[[index]]).tolist()
                result["bbox"] = [x1, y1, x2 - x1, y2 - y1]
            own.append(result)
        return own

    @cached_property
    def _index_of(self) -> dict[int, int]:
        return {image_id: index for index, image_id in enumerate(self.annotations.image_ids.tolist())}


def _parse(path: str, source: str, remedy: str) -> dict[str, Any]:
    try:
        # The polygons are most of a file of COCO's; left out at once, they never fill the memory.
        content = json.loads(_text(path), object_pairs_hook=_without_polygons)
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


def _text(path: str) -> str:
    content = bytearray()
    with open_regular(path) as file:
        for block in iter(lambda: file.read(2**24), b""):
            if b"\0" in block:  # not read on, since zeros may have any length, and take no room on a disk
                raise ValueError("it holds zero bytes")
            content += block
    return content.decode("utf-8-sig")


def _without_polygons(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entry = dict(pairs)
    if len(entry) < len(pairs):
        for key, value in pairs:
            if entry[key] != value:
                raise ValueError(f"{key!r} stands twice in one object, with different values")
    entry.pop("segmentation", None)
    return entry


def _entries(content: dict[str, Any], key: str, source: str) -> list[dict[str, Any]]:
    entries = content[key]
    if entries is None:  # as some tools write an empty list
        entries = []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{source}: expected a list of objects under {key}, found something else; repair the file")
    if not entries and key != "annotations":
        raise InputError(f"{source}: the list of {key} is empty; add some, or choose another file")
    return entries


def _by_id(
    entries: list[dict[str, Any]], kind: str, meaning: tuple[str, ...], source: str
) -> dict[Any, dict[str, Any]]:
    """The entries by their ids; of several with one id the first, where the keys in `meaning` of all say the same."""
    found: dict[Any, dict[str, Any]] = {}
    repeated = []
    for place, entry in enumerate(entries, start=1):
        number = _whole(entry.get("id")) if kind == "category" else entry.get("id")
        whole = isinstance(number, int) and not isinstance(number, bool)
        # an image's may be a fraction, such as the time when it was taken
        if not whole and not isinstance(number, str) and not (kind == "image" and is_number(number)):
            raise InputError(
                f"{source}: expected a whole number or text as id of every {kind}, found id={number!r} in number "
                f"{place}; number them"
            )
        first = found.setdefault(number, entry)
        if first is not entry and any(first.get(key) != entry.get(key) for key in meaning):
            repeated.append(number)
    refuse_repeated([*found, *dict.fromkeys(repeated)], f"{kind} id", source)
    return found


def _whole(value: Any) -> Any:
    """The int that a whole float is equal to; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def id_order(number: Any) -> tuple[bool, Any]:
    """Key that sorts ids as pycocotools does; numbers, which it cannot sort with text, come first."""
    return isinstance(number, str), number


def _ranks(ids: Sequence[Any]) -> Array:
    """Place of each id among all, sorted, int64 (N,)."""
    ranks = np.empty(len(ids), dtype=np.int64)
    ranks[sorted(range(len(ids)), key=lambda place: id_order(ids[place]))] = np.arange(len(ids))
    return ranks


def refuse_repeated(values: list[Any], kind: str, source: str) -> None:
    """Raise an `InputError` that names `source` if a value, such as the "name of a category", is there twice."""
    repeated = [value for value, count in Counter(values).items() if count > 1]
    if repeated:
        raise InputError(
            f"{source}: expected every {kind} once, found {repeated[0]!r} several times"
            f"{f' (and {len(repeated) - 1} more)' if len(repeated) > 1 else ''}; rename or remove the others"
        )


def _category_name(number: CategoryId, category: dict[str, Any], source: str) -> str:
    name = _whole(category.get("name"))
    if not isinstance(name, str) and not is_number(name):
        raise InputError(f"{source}: category {number!r} has no name (name={name!r}); give it one")
    if len(str(name)) > 1000 or re.search("[\ud800-\udfff]", str(name)):
        raise InputError(
            f"{source}: expected a text of at most 1000 characters as name of category {number!r}, found {name!r}; "
            "rename it"
        )
    return composed(str(name))


def _root(categories: dict[CategoryId, dict[str, Any]], annotated: set[int]) -> CategoryId | None:
    """Id of the category that all the others name as their supercategory; None if its place is in `annotated`."""
    above = [str(category.get("supercategory")) for category in categories.values()]
    for supercategory, count in Counter(above).items():
        place = next((place for place, name in enumerate(above) if name != supercategory), None)
        if count == len(above) - 1 and place is not None and place not in annotated:
            number = list(categories)[place]
            if str(categories[number].get("name")) == supercategory:
                return number
    return None


def _called(annotation: dict[str, Any], row: int) -> str:
    return f"annotation {annotation['id']!r}" if "id" in annotation else f"annotation number {row + 1} (without id)"


def _orphans_note(annotations: list[dict[str, Any]], owners: Array, source: str) -> str:
    """What to say of the annotations whose image is not listed; refuses those of no image, and nothing but them."""
    rows = np.flatnonzero(owners < 0).tolist()
    for row in rows:
        number = annotations[row].get("image_id")
        if not isinstance(number, (int, float, str)):
            raise InputError(
                f"{source}: {_called(annotations[row], row)} is of image {number!r}, which is no id; give it the id of "
                "its image or remove it"
            )
    example = f"such as {_called(annotations[rows[0]], rows[0])} of image {annotations[rows[0]]['image_id']!r}"
    if len(rows) == len(annotations):
        raise InputError(
            f"{source}: none of its {len(rows)} annotations is of an image that it lists, {example}; give it images "
            "and annotations of one data set"
        )
    return f"{len(rows)} of its {len(annotations)} annotations left out, of images that it does not list, {example}"


def _places(values: list[Any], ids: list[Any]) -> Array:
    """Place of each value in `ids`, int64 (M,); -1 where it is not there."""
    place_of = {number: place for place, number in enumerate(ids)}
    try:
        # 3.0 is found under 3
        places = np.fromiter(map(place_of.get, values, repeat(-1)), dtype=np.int64, count=len(values))
    except TypeError:  # lists and the like, which are no ids
        places = np.array([place_of.get(value, -1) if isinstance(value, (int, float, str)) else -1 for value in values])
    lost = np.flatnonzero(places < 0).tolist()
    # the VGG Image Annotator writes an image's id as a number, and as text where an annotation names it
    by_text = {str(_whole(number)): place for number, place in place_of.items()} if lost else {}
    if len(by_text) == len(ids):
        for row in lost:
            places[row] = by_text.get(str(_whole(values[row])), -1)
    return places


def _numbers(values: list[Any], shape: tuple[int, ...], is_fine: Callable[[Array], Array]) -> tuple[Array, int | None]:
    """Values as float64 (M, *shape), NaN for None; and the row of the first that is not fine, if there is one."""
    expected = (len(values), *shape)
    try:
        numbers = np.array(values, dtype=np.float64) if values else np.empty(expected)
        if numbers.shape == expected and is_fine(numbers).all():
            return numbers, None
    except (TypeError, ValueError, OverflowError):  # no numbers, lists of several lengths, and beyond all bounds
        pass
    if len(values) == 1:
        return np.empty(expected), 0
    return np.empty(expected), next(k for k, value in enumerate(values) if _numbers([value], shape, is_fine)[1] == 0)


def _fits_float32(numbers: Array) -> Array:
    return np.asarray(np.isnan(numbers) | (np.abs(numbers) < 1e30))


def _is_flag(numbers: Array) -> Array:
    return np.asarray(np.isnan(numbers) | (numbers == 0) | (numbers == 1))


def _is_side(numbers: Array) -> Array:
    """Whether they are numbers of pixels; NaN, 0 and -1 stand for one that is not known."""
    whole = (numbers >= -1) & (numbers < 2**31) & (numbers == np.floor(numbers))
    return np.asarray(np.isnan(numbers) | whole)


def _file_name(number: Any, image: dict[str, Any], source: str) -> bytes:
    """Name of an image's file below its folder, encoded as the file system does."""
    name = image.get("file_name")
    url = image.get("coco_url")
    try:
        if not name and isinstance(url, str):
            name = urlsplit(url).path.rpartition("/")[2]
        encoded = os.fsencode(name) if isinstance(name, str) else b""
        # as names of files end at a zero byte; and all are kept in as many bytes as the longest has
        if encoded and b"\0" not in encoded and len(encoded) <= _LONGEST_PATH:
            return encoded
    except ValueError:  # an address that is none, or a name that no file can have
        name = name or url
    shown_name = repr(name)
    if len(shown_name) > 200:
        shown_name = f"{shown_name[:100]}..., {len(shown_name)} characters"
    raise InputError(
        f"{source}: image {number!r} has no file_name (but {shown_name}); give it the name of its picture file"
    )


_LONGEST_PATH = 4096  # bytes, on Linux; less elsewhere


_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


class _Files:
    """The files below a folder; of its subfolders those are listed that are asked for.

    Args:
        folder: The folder.
        argument: The argument that names it, for messages.
    """

    def __init__(self, folder: str, argument: str) -> None:
        self._folder = folder
        self._argument = argument
        self._names: dict[str, set[str]] = {}
        self._alike: dict[str, dict[str, list[str]]] = {}

    def find(self, name: str) -> str | None:
        """Find the file that a name in an annotation file stands for, and nothing outside of the folder.

        That is the file of this name. Where there is none, backslashes may separate folders, %20 may stand for a space,
        a letter and its accent may be one character or two, and the folder's own name may stand in front, with those
        of the folders around it.

        Returns:
            Its path below the folder, or None if there is no such file.

        Raises:
            InputError: There are several.
        """
        parent, _, base = name.rpartition("/")
        if not os.path.isabs(name) and ".." not in parent and base in self._names_in(parent):
            return name
        around = composed(os.path.abspath(self._folder)).split(os.sep)
        found: dict[str, None] = {}
        for spelling in (name, unquote(name)):
            path = spelling.replace("\\", "/")
            parts = posixpath.normpath(path).split("/")
            below = os.path.relpath(os.path.join(os.path.abspath(self._folder), path), os.path.abspath(self._folder))
            repeated = [k for k in range(1, len(parts)) if composed("/".join(parts[:k])).split("/") == around[-k:]]
            for rest in (below.split(os.sep), *(parts[k:] for k in repeated)):
                found |= dict.fromkeys(self._spelt(rest))
        if len(found) > 1:
            raise InputError(
                f"{self._argument}={self._folder!r}: {name} may be {' or '.join(found)} in it; rename one, or correct "
                "the name in the annotation file"
            )
        return next(iter(found), None)

    def _spelt(self, parts: list[str]) -> list[str]:
        """The paths of these parts below the folder that are there, whatever form their accents have."""
        paths = [""]
        for part in parts:
            paths = [posixpath.join(path, name) for path in paths for name in self._spelt_in(path, part)]
        return paths

    def _spelt_in(self, parent: str, name: str) -> list[str]:
        if name in self._names_in(parent):
            return [name]
        if parent not in self._alike:
            self._alike[parent] = {}
            for there in self._names_in(parent):
                self._alike[parent].setdefault(composed(there), []).append(there)
        return self._alike[parent].get(composed(name), [])

    def _names_in(self, parent: str) -> set[str]:
        if parent not in self._names:
            try:
                self._names[parent] = set(os.listdir(os.path.join(self._folder, parent)))
            except ValueError:  # a zero byte, written as %00
                self._names[parent] = set()
            except OSError as error:
                if error.errno not in _NOT_THERE:
                    raise InputError(
                        f"{self._argument}: the folder of pictures {os.path.join(self._folder, parent)!r} cannot be "
                        f"read ({error.strerror}); mend that, or name another with --data.{self._argument}"
                    ) from None
                self._names[parent] = set()
        return self._names[parent]
