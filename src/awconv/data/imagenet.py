"""ImageNet, and anyone's own pictures sorted into class folders."""

import os
import re
from collections import Counter
from collections.abc import Container, Mapping
from copy import deepcopy
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from torchvision.transforms import v2

from awconv.data.base import Split, Transform, inform, tell
from awconv.data.classification import ClassificationDataModule
from awconv.data.encoded import EncodedPictures, require_decoder
from awconv.data.loading import MapDataset
from awconv.data.pictures import (
    EXTENSIONS_SHOWN,
    PassedOver,
    PictureDataset,
    composed,
    find_pictures,
    has_image_extension,
    is_hidden,
    shown,
)
from awconv.data.transforms import RandomMirror, Resize
from awconv.errors import InputError, require, require_int


class ImageNetDataModule(ClassificationDataModule):
    """Pictures in class folders, ``root/train/CLASS/*.JPEG`` and ``root/val/CLASS/*.JPEG``: ImageNet, or yours.

    Training takes random resized crops of `image_size` and flips them; evaluation resizes the shorter side
    and crops the centre (Szegedy et al. 2015, He et al. 2016). ImageNet's test labels are not public, so
    ``test`` measures on ``val/`` too, as is the custom.

    Classes are numbered in the order of their folders' names, and named after their folders; folders that
    are all WordNet ids of ImageNet-1k get the ids' English names. With `class_names` given, all of them the
    folders' names or all of them the English ones, the numbers follow that list instead, ``train/`` is needed
    for training only, and ``predict`` needs no `root` at all. Unicode spellings of one name (NFC, NFD) are one class.
    A class of ``train/`` may be without validation images; that is said in one line.

    Images are read upright, as their EXIF orientation says, by every command; ImageNet's few turned images too, which
    other projects may take as they are stored.

    Args:
        root: Folder that holds ``train`` and ``val``.
        image_size: Height and width of the training images in pixels.
        eval_image_size: Height and width for validation, test and prediction; None means `image_size`.
        eval_resize_size: Length of the shorter side before the evaluation crop; None means 256/224 of the
            crop, rounded.
        class_names: Names of the classes in the order of their indices; None reads them from ``root/train``.
        decode_on_device: Let workers only read the files of training pictures, and decode and augment them on the
            training device: on an NVIDIA GPU with nvJPEG, a batch in one call. The augmentation, its random numbers
            and the hooks are the same, on pictures that are on the device; for classes that leave `load` and
            `collate` as they are here. A GPU's decoder and resizing round otherwise than a CPU's, so validation, test
            and prediction stay with the workers, and accuracies comparable. Reading runs ahead of training in the
            workers; decoding is done by the process that trains when it asks for a batch, which overlaps with the
            steps that the GPU has been given and still computes, and not with steps that the process waits for.
        batch_size: Samples per batch and process.
        num_workers: Worker processes that load data, per process.
        common: Arguments of :class:`ClassificationDataModule`.

    Raises:
        InputError: A number is out of its range; or, when classes or pictures are first needed, the folders
            are not as described above.
    """

    def __init__(
        self,
        root: str = "datasets/imagenet",
        *,
        image_size: int = 224,
        eval_image_size: int | None = None,
        eval_resize_size: int | None = None,
        class_names: list[str] | None = None,
        decode_on_device: bool = False,
        batch_size: int = 256,
        num_workers: int = 8,
        **common: Any,
    ) -> None:
        super().__init__(image_size=image_size, batch_size=batch_size, num_workers=num_workers, **common)
        crop = image_size if eval_image_size is None else eval_image_size
        require_int("eval_image_size", crop, "a whole number of pixels, at least 1", low=1)
        shorter_side = round(crop * 256 / 224) if eval_resize_size is None else eval_resize_size
        enough = f"a whole number, at least the {crop} pixels of the crop that is cut from it"
        require_int("eval_resize_size", shorter_side, enough, low=crop)
        if decode_on_device:
            self._refuse_changes("decode_on_device", ImageNetDataModule, ("load", "collate"))
        if class_names is not None:
            repeated = [name for name, count in Counter(map(composed, class_names)).items() if count > 1]
            require(not repeated, "class_names", repeated, "each name once")
            require(len(class_names) > 1, "class_names", class_names, "at least two names")
        self.root = root
        self._crop = crop
        self._shorter_side = shorter_side
        self.decode_on_device = decode_on_device
        self._names = class_names
        self._folders: dict[str, tuple[dict[str, list[str]], PassedOver]] = {}
        self._told: set[str] = set()

    @property
    def class_names(self) -> list[str]:
        """Names of the classes: `class_names`, or else the folders of ``root/train``, which are checked."""
        if self._names is None:
            folders = self._class_folders("train")
            if len(folders) == 1:
                raise InputError(
                    f"root={self.root!r}: expected at least two class folders in {self._below('train')}, found only "
                    f"{next(iter(folders))}; add a folder with images of another class"
                )
            if (Path(self.root) / "val").is_dir():
                self._refuse_unknown(folders)
            self._names = _readable(list(folders))
        return self._names

    def load(self, split: Split, transform: Transform) -> MapDataset:
        """Return a split; see :class:`ClassificationDataModule`."""
        folder = "train" if split == "train" else "val"
        # the folders are looked at before the class names, for the plainer message where both are wrong
        folders = self._class_folders(folder)
        passed_over = deepcopy(self._folders[folder][1])
        names = self.class_names
        paths: list[str] = []
        targets: list[int] = []
        for name, index in self._index_of_class(folder, folders, names).items():
            found = [path for own in folders[name] for path in find_pictures(self._below(folder, own), passed_over)]
            if not found and folder == "train":
                raise InputError(
                    f"root={self.root!r}: the class folder {folder}/{name} holds no images ({EXTENSIONS_SHOWN}); add "
                    "some, or remove the folder from train/ and val/"
                )
            paths += found
            targets += [index] * len(found)
        without = [names[index] for index in sorted(set(range(len(names))) - set(targets))]
        if len(without) == len(names):
            raise InputError(f"root={self.root!r}: the class folders in {folder}/ hold no images ({EXTENSIONS_SHOWN})")
        if folder not in self._told:
            self._told.add(folder)
            tell(self._below(folder), passed_over)
            if without:
                inform(
                    f"{self._below(folder)}: no images of {len(without)} of the {len(names)} classes: "
                    f"{', '.join(shown(without))}"
                )
        return PictureDataset(paths, targets, transform, skip_bad=split == "train" and self.on_bad_image == "skip")

    def _samples(self, dataset: MapDataset, seed: int | None) -> Any:
        """Training samples as the bytes of files where `decode_on_device` says so."""
        if seed is None or not self.decode_on_device:
            return super()._samples(dataset, seed)
        require_decoder("decode_on_device", self.device)
        assert isinstance(dataset, PictureDataset)
        return EncodedPictures(dataset, seed, self.device)

    def train_geometry(self) -> list[Transform]:
        """A random resized crop (8% to 100% of the area) and a flip."""
        return [v2.RandomResizedCrop(self.image_size), RandomMirror()]

    def eval_geometry(self) -> list[Transform]:
        """The shorter side to `eval_resize_size`, then the centre."""
        return [Resize(self._shorter_side), v2.CenterCrop(self._crop)]

    def plain_geometry(self) -> list[Transform]:
        """The evaluation crop, at the training size."""
        return [Resize(round(self.image_size * 256 / 224)), v2.CenterCrop(self.image_size)]

    def _below(self, *parts: str) -> Path:
        return Path(self.root, *parts)

    def _class_folders(self, split: str) -> dict[str, list[str]]:
        """The classes of a split in order, each with its folder, or folders whose names are spelled differently."""
        if split not in self._folders:
            self._folders[split] = self._scan(split)
        return self._folders[split][0]

    def _scan(self, split: str) -> tuple[dict[str, list[str]], PassedOver]:
        root, folder = self._below(), self._below(split)
        layout = f"{split}/CLASS/*.JPEG in it"
        if not root.is_dir():
            raise InputError(
                f"root={self.root!r}: expected a folder with train/CLASS/*.JPEG and val/CLASS/*.JPEG in it, "
                "and there is no such folder; name yours with --data.root FOLDER"
            )
        if not folder.is_dir():
            found = ", ".join(shown(sorted(os.listdir(root)))) or "nothing"
            hint = " (or give class_names, if all you want is to evaluate)" if split == "train" else ""
            raise InputError(f"root={self.root!r}: expected {layout}, found {found}; add {folder}{hint}")
        classes: list[str] = []
        loose: list[str] = []
        passed_over = PassedOver()
        for entry in os.scandir(folder):
            if entry.is_dir() and not is_hidden(entry.name):
                classes.append(entry.name)
            elif has_image_extension(entry.name) and not is_hidden(entry.name):
                loose.append(entry.name)
            else:
                passed_over.count(entry.name)
        if loose:
            loose.sort()
            what = f"{len(loose)} pictures outside of any class folder" if classes else "a flat folder of pictures"
            raise InputError(
                f"root={self.root!r}: expected {layout}, found {what} ({', '.join(shown(loose))}); "
                f"move each into the folder of its class, as in {split}/n01440764/{loose[0]}"
            )
        if not classes:
            raise InputError(
                f"root={self.root!r}: expected {layout}, found no class folders in {folder}; "
                "make one folder per class and put its pictures there"
            )
        spellings = sorted((composed(name), name) for name in classes)
        folders = {name: [own for _, own in group] for name, group in groupby(spellings, key=itemgetter(0))}
        return folders, passed_over

    def _refuse_unknown(self, train: Mapping[str, list[str]]) -> None:
        others = {name: own for name, own in self._class_folders("val").items() if name not in train}
        unknown = self._with_images("val", others)
        if unknown:
            missing = [name for name in train if name not in self._class_folders("val")]
            absent = f"only in train/: {', '.join(shown(missing))}; " if missing else ""
            raise InputError(
                f"root={self.root!r}: expected in val/ only class folders of train/, found {absent}"
                f"only in val/: {', '.join(shown(unknown))}; add what is missing or remove the rest"
            )

    def _with_images(self, split: str, folders: Mapping[str, list[str]]) -> list[str]:
        return [name for name, own in folders.items() if any(find_pictures(self._below(split, one)) for one in own)]

    def _index_of_class(self, split: str, folders: Mapping[str, list[str]], names: list[str]) -> dict[str, int]:
        index_of = {composed(name): index for index, name in enumerate(names)}
        by_folder = {folder: folder for folder in folders}
        # a folder of another kind is nobody's, if it holds no images
        titled = [folder for folder in folders if folder in index_of or re.fullmatch(r"n\d{8}", folder)]
        by_title = by_folder | dict(zip(titled, _readable(titled, index_of), strict=True))
        # all by one or all by the other: a list that mixes them is more likely a mistake than a wish
        name_of = max(by_folder, by_title, key=lambda naming: len(index_of.keys() & naming.values()))
        absent = [name for name in index_of if name not in name_of.values()]
        unnamed = [folder for folder, name in name_of.items() if name not in index_of]
        extra = self._with_images(split, {folder: folders[folder] for folder in unnamed})
        if not extra and (not absent or (split == "val" and len(absent) < len(names))):
            return {folder: index_of[name] for folder, name in name_of.items() if name in index_of}
        details = [f"no folder for {', '.join(shown(absent))}"] if absent else []
        details += [f"no name for {', '.join(shown(extra))}"] if extra else []
        raise InputError(
            f"class_names ({len(names)} names): expected those of the {len(folders)} class folders in "
            f"{self._below(split)}, found {' and '.join(details)}; correct the list, or leave it out to "
            "take the names from train/"
        )


def _readable(folders: list[str], known: Container[str] = ()) -> list[str]:
    """English names of WordNet ids of ImageNet-1k, each unique; anything else is returned as it is.

    Args:
        folders: Names of folders.
        known: Names of which an English one with its WordNet id is preferred.
    """
    if not all(re.fullmatch(r"n\d{8}", name) for name in folders):
        return folders
    # only here: importing timm takes seconds, and one's own folders do without it
    from timm.data.imagenet_info import ImageNetInfo

    info: Any = ImageNetInfo("imagenet-1k")
    if not set(info.label_names()).issuperset(folders):
        return folders
    names = [info.label_name_to_description(wordnet_id).partition(",")[0] for wordnet_id in folders]
    count = Counter(names)
    return [
        full if (full := f"{name} ({wordnet_id})") in known or count[name] > 1 else name
        for name, wordnet_id in zip(names, folders, strict=True)
    ]
