"""The data module of object detection: COCO, and anyone's own boxes in COCO's format."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from awconv.data.base import BaseDataModule, Split, Transform, inform
from awconv.data.coco import (
    CategoryId,
    COCOAnnotations,
    COCODataset,
    Target,
    id_order,
    read_annotations,
    refuse_repeated,
    shown_categories,
)
from awconv.data.loading import GroupedSampler, MapDataset, TrainingSampler
from awconv.errors import InputError, is_number, require, require_int, require_number


class COCODataModule(BaseDataModule):
    """Pictures and boxes in COCO's format: COCO 2017 (Lin et al. 2014) from https://cocodataset.org, or your own.

    Your own take a JSON file and a folder of pictures for each split; the folders may be one::

        --data COCODataModule --data.root mine --data.train_annotations train.json --data.train_images pictures
        --data.val_annotations val.json --data.val_images pictures

    A file lists ``images`` (``id``, ``file_name``), ``categories`` (``id``, ``name``) and ``annotations``
    (``image_id``, ``category_id`` and ``bbox``, which is x, y, width and height in pixels). What else COCO's files say
    may be left out: ``width`` and ``height`` are then read from the picture, ``area`` is the box's, ``iscrowd`` is 0.
    Polygons and masks are not looked at. Categories get the labels 1, 2, ... in the order of their ids; 0 is the
    background.

    Batches are ``(images, targets)``: a list of N pictures, uint8 (3, H, W), each of its own size, and a list of N
    dictionaries with ``boxes`` float32 (M, 4), x1, y1, x2, y2 in pixels, ``labels`` int64 (M,), ``area`` float32 (M,),
    ``iscrowd`` int64 (M,) and ``image_id`` int64 (). Prediction batches are ``(images, paths)``.

    In training a picture is brought to size, and comes without crowds, with its boxes cut off at its edges, and without
    those that are then narrower than a pixel. In evaluation it comes as it is, with its boxes as they are in the file,
    so that the average precision is the official one, but for boxes on the very edge of a threshold, since they are
    held in float32; the detector brings it to size and its boxes back. Two exceptions hold in all splits, and are
    counted: a box that leaves its picture by more than a pixel is cut off, and one without area in its picture is
    dropped. With
    several processes the padding of an evaluation is a sample that repeats an image id: count it once.

    Args:
        root: Folder below which the files and folders lie.
        train_annotations: JSON file of the training pictures; this and the paths below are relative to `root`, unless
            they are absolute.
        val_annotations: JSON file of the validation pictures.
        test_annotations: JSON file of the test pictures; null tests on the validation set, as is the custom with COCO,
            whose test annotations are not public. A file without annotations, such as image_info_test-dev2017.json,
            can be predicted but not scored.
        train_images: Folder of the training pictures.
        val_images: Folder of the validation pictures.
        test_images: Folder of the test pictures; goes with `test_annotations`.
        image_size: Length in pixels to which the short side of a picture is brought.
        max_size: Length in pixels that its long side may have; a longer picture is made smaller as a whole.
        batch_size: Samples per batch and process.
        num_workers: Worker processes that load data, per process.
        scale_jitter: Range of a factor, drawn for each training picture, by which its size differs from that of
            evaluation, such as [0.8, 1.25]; the long side stays within `max_size`.
        horizontal_flip: Probability of mirroring a training picture.
        photometric: Change brightness, contrast, saturation and hue of training pictures, and at times exchange their
            colour channels (Liu et al. 2016): not where a class is known by its colour.
        keep_empty: Train on pictures without boxes too.
        group_aspect_ratio: Fill each training batch with wide or with tall pictures, which need less padding together.
        class_names: Names of the categories in the order of their ids, where the files are not at hand, as in a
            prediction from a checkpoint; goes with `category_ids`. Null reads both from a file.
        category_ids: Ids of the categories, ascending.
        common: Arguments of :class:`awconv.data.BaseDataModule`.

    Raises:
        InputError: An argument is out of its range; or, when classes or pictures are first needed, a file or a folder
            is not as described above.
    """

    def __init__(
        self,
        root: str = "datasets/coco",
        *,
        train_annotations: str = "annotations/instances_train2017.json",
        val_annotations: str = "annotations/instances_val2017.json",
        test_annotations: str | None = None,
        train_images: str = "train2017",
        val_images: str = "val2017",
        test_images: str | None = None,
        image_size: int = 800,
        max_size: int = 1333,
        batch_size: int = 2,
        num_workers: int = 4,
        scale_jitter: tuple[float, float] = (1.0, 1.0),
        horizontal_flip: float = 0.5,
        photometric: bool = False,
        keep_empty: bool = False,
        group_aspect_ratio: bool = True,
        class_names: list[str] | None = None,
        # str first: jsonargparse would take the text "1" for the number, where it may
        category_ids: list[str | int] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, **common)
        require_int("image_size", image_size, "a whole number of pixels, at least 1", low=1)
        least = f"a whole number of pixels, at least the {image_size} of image_size"
        require_int("max_size", max_size, least, low=image_size)
        low_high = isinstance(scale_jitter, (list, tuple)) and len(scale_jitter) == 2
        ok = low_high and all(map(is_number, scale_jitter)) and 0 < scale_jitter[0] <= scale_jitter[1]
        require(ok, "scale_jitter", scale_jitter, "two numbers above 0, the lower one first; [1.0, 1.0] is off")
        require_number("horizontal_flip", horizontal_flip, "a probability between 0 and 1", low=0, high=1)
        given = {"test_annotations": test_annotations, "test_images": test_images}
        _require_together(given, "test on the validation set")
        _require_together({"class_names": class_names, "category_ids": category_ids}, "read both from a file")
        if class_names is not None and category_ids is not None:
            names, ids = isinstance(class_names, list | tuple), isinstance(category_ids, list | tuple)
            require(
                names and all(isinstance(n, str) for n in class_names), "class_names", class_names, "a list of names"
            )
            ok = ids and all(type(number) in (int, str) for number in category_ids)
            require(ok, "category_ids", category_ids, "whole numbers or text")
            require(bool(class_names), "class_names", class_names, "at least one name")
            require(len(set(class_names)) == len(class_names), "class_names", class_names, "each name once")
            require(
                category_ids == sorted(set(category_ids), key=id_order) and len(category_ids) == len(class_names),
                "category_ids",
                category_ids,
                f"one id for each of the {len(class_names)} class_names, ascending",
            )
        require(isinstance(root, str), "root", root, "the name of a folder")
        for name, value in (("photometric", photometric), ("keep_empty", keep_empty)):
            require(isinstance(value, bool), name, value, "true or false")
        self.root = root
        self.image_size = image_size
        self.max_size = max_size
        self.scale_jitter = scale_jitter
        self.horizontal_flip = horizontal_flip
        self.photometric = photometric
        self.keep_empty = keep_empty
        self.group_aspect_ratio = group_aspect_ratio
        self._known = None if class_names is None or category_ids is None else (category_ids, class_names)
        self._source_of_categories = "class_names and category_ids (those of the checkpoint, if one is given)"
        # for each split the name and the value of its two arguments
        self._arguments = {
            "train": ("train_annotations", train_annotations, "train_images", train_images),
            "val": ("val_annotations", val_annotations, "val_images", val_images),
        }
        self._arguments["test"] = self._arguments["val"]
        if test_annotations is not None and test_images is not None:
            self._arguments["test"] = ("test_annotations", test_annotations, "test_images", test_images)
        self._read: dict[str, COCOAnnotations] = {}
        self._checked: dict[tuple[str, str, bool], COCOAnnotations] = {}

    # ---- categories

    @property
    def class_names(self) -> list[str]:
        """Names of the categories in the order of their ids, label 1 first."""
        return self._categories()[1]

    @property
    def category_ids(self) -> list[CategoryId]:
        """Ids of the categories, ascending; label k stands for ``category_ids[k - 1]``."""
        return self._categories()[0]

    def _categories(self) -> tuple[list[CategoryId], list[str]]:
        if self._known is None:
            there = self._splits_there()
            # that of the training file: in other files, some tools list only the categories that occur
            annotations = self._annotations(there[0] if there else "val")
            categories = dict(zip(annotations.category_ids, annotations.class_names, strict=True))
            root = annotations.root
            if root is not None and not any(self._annotations(split).has_boxes_of(root) for split in there):
                inform(
                    f"{annotations.source}: category {shown_categories([(root, categories.pop(root))])} left out: it "
                    "has no annotations, and is only the supercategory of all the others"
                )
            refuse_repeated(list(categories.values()), "name of a category", annotations.source)
            self._known = (list(categories), list(categories.values()))
            self._source_of_categories = annotations.source
        return self._known

    def _splits_there(self) -> list[Split]:
        """The splits whose annotation file is there, that of training first."""
        splits: tuple[Split, ...] = ("train", "val", "test")
        return [split for split in splits if os.path.isfile(self._below_root(self._arguments[split][1]))]

    # ---- data sets

    def load_split(self, split: Split) -> MapDataset:
        """Return a split, checked; see :class:`BaseDataModule`."""
        annotations = self._annotations(split)
        if split != "test" and not annotations.annotated:
            raise InputError(
                f"{annotations.source}: expected images, annotations and categories, and there are no annotations; "
                "choose another file, or give this one as test_annotations"
            )
        category_ids, class_names = self.category_ids, self.class_names
        checked = self._with_pictures(split)
        boxes = int((checked.iscrowd == 0).sum())
        argument, value, *_ = self._arguments[split]
        source = f"{argument}={self._below_root(value)!r}"  # a file that serves two splits is called as it was first
        if split == "val" and boxes == 0:
            raise InputError(
                f"{source}: none of its {len(checked)} pictures has a box (that is not a crowd's), so that "
                "there is nothing to measure; add annotations or choose another file"
            )
        folder = self._below_root(self._arguments[split][3])
        if split != "train":
            return COCODataset(checked, folder)
        if boxes == 0:
            raise InputError(
                f"{source}: none of its {len(checked)} pictures has a box (that is not a crowd's) to train "
                "on; add annotations or choose another file"
            )
        training = checked.for_training(self.keep_empty)
        without = set(range(1, len(category_ids) + 1)) - set(training.labels.tolist())
        if without:
            unseen = shown_categories([(category_ids[label - 1], class_names[label - 1]) for label in sorted(without)])
            verb = "has" if len(without) == 1 else "have"
            inform(f"{source}: {len(without)} of the {len(class_names)} categories {verb} no boxes: {unseen}")
        return COCODataset(training, folder, self.train_transform(), self._skips_bad(split))

    def _below_root(self, path: str) -> str:
        return os.path.join(self.root, path)

    def _remedy(self, argument: str) -> str:
        return (
            "get COCO 2017 from https://cocodataset.org and unpack it as annotations/, train2017/ and val2017/ in "
            f"root={self.root!r}, or name your own with --data.root and --data.{argument} (relative to root)"
        )

    def _annotations(self, split: Split) -> COCOAnnotations:
        """A split's file, read once for all splits that it serves."""
        argument, value, *_ = self._arguments[split]
        path = self._below_root(value)
        if path not in self._read:
            self._read[path] = read_annotations(path, argument, self._remedy(argument))
        return self._read[path]

    def _with_pictures(self, split: Split) -> COCOAnnotations:
        *_, argument, value = self._arguments[split]
        annotations, folder = self._annotations(split), self._below_root(value)
        key = (annotations.source, folder, self._skips_bad(split))
        if key not in self._checked:
            # in the order in which they are, so that the pictures are looked at last
            category_ids, class_names = self._categories()
            numbered = annotations.for_categories(category_ids, class_names, self._source_of_categories)
            checked = numbered.check_pictures(folder, argument, self._remedy(argument), self._skips_bad(split))
            for note in checked.notes:
                inform(f"{annotations.source}: {note}")
            self._checked[key] = checked
        return self._checked[key]

    def _skips_bad(self, split: Split) -> bool:
        # an average precision over fewer images could not be compared with any other
        return split == "train" and self.on_bad_image == "skip"

    # ---- transforms and batches

    def train_transform(self) -> Transform:
        """What happens to a training picture and its target, ``tv_tensors`` both: size, flip, colours, clean boxes."""
        photometric: list[Transform] = [v2.RandomPhotometricDistort()] if self.photometric else []
        compose: Transform = v2.Compose(
            [
                _Resize(self.image_size, self.max_size, self.scale_jitter),
                v2.RandomHorizontalFlip(self.horizontal_flip),
                *photometric,
                v2.ClampBoundingBoxes(),
                v2.SanitizeBoundingBoxes(labels_getter=_with_boxes),
                v2.ToPureTensor(),
            ]
        )
        return compose

    def predict_transform(self) -> Transform:
        """Nothing: the detector brings a picture to size and its boxes back."""
        identity: Transform = v2.Identity()
        return identity

    @staticmethod
    def collate(samples: Sequence[tuple[Tensor, Any]]) -> tuple[list[Tensor], list[Any]]:
        """Put pictures and targets, or paths, into two lists."""
        images, labels = zip(*samples, strict=True)
        return list(images), list(labels)

    def train_sampler(self, dataset: MapDataset, processes: int, rank: int, seed: int) -> TrainingSampler:
        """Return the order of the training samples, in batches of wide or of tall pictures where they are grouped."""
        if not self.group_aspect_ratio:
            return super().train_sampler(dataset, processes, rank, seed)
        assert isinstance(dataset, COCODataset)
        height, width = dataset.annotations.sizes.T
        return GroupedSampler(dataset, processes, rank, seed=seed, groups=width >= height, batch_size=self.batch_size)


class _Resize:
    """Brings a picture to its size of evaluation times a random factor, within `max_size` in any case.

    Args:
        image_size: Length of the short side in pixels.
        max_size: Longest long side in pixels.
        scale_jitter: Range of the factor.
    """

    def __init__(self, image_size: int, max_size: int, scale_jitter: tuple[float, float]) -> None:
        self._image_size, self._max_size = image_size, max_size
        self._low, self._high = scale_jitter

    def __call__(self, image: tv_tensors.Image, target: Target) -> tuple[tv_tensors.Image, Target]:
        height, width = image.shape[-2:]
        factor = self._low + (self._high - self._low) * torch.rand(()).item()
        short, long = self._image_size / min(height, width), self._max_size / max(height, width)
        scale = min(factor * min(short, long), long)
        size = [max(1, round(height * scale)), max(1, round(width * scale))]
        resized = {
            **target,
            "boxes": F.resize(target["boxes"], size),
            "area": target["area"] * (size[0] * size[1] / (height * width)),
        }
        # the detector brings pictures to size in evaluation, and does not smooth them either
        return F.resize(image, size, antialias=False), resized


def _with_boxes(sample: tuple[Tensor, Target]) -> tuple[Tensor, ...]:
    """What loses its place where a box is removed."""
    _, target = sample
    return target["labels"], target["area"], target["iscrowd"]


def _require_together(arguments: dict[str, Any], otherwise: str) -> None:
    absent = [name for name, value in arguments.items() if value is None]
    if len(absent) == 1:
        other = next(name for name in arguments if name not in absent)
        raise InputError(
            f"{absent[0]}=None: expected a value, since {other} is given; give both, or neither to {otherwise}"
        )
