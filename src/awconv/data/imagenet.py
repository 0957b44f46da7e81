"""ImageNet, and anyone's own pictures sorted into class folders."""

import os
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from torchvision.transforms import v2

from awconv.data.base import Split, Transform
from awconv.data.classification import ClassificationDataModule
from awconv.data.encoded import EncodedPictures, require_decoder
from awconv.data.loading import MapDataset
from awconv.data.pictures import EXTENSIONS, PictureDataset, find_pictures
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
    for training only, and ``predict`` needs no `root` at all. EXIF orientation is ignored in class folders, as
    is the convention for ImageNet, and followed in `predict_dir`.

    Args:
        root: Folder that holds ``train`` and ``val``.
        image_size: Height and width of the training images in pixels.
        eval_image_size: Height and width for validation, test and prediction; None means `image_size`.
        eval_resize_size: Length of the shorter side before the evaluation crop; None means 256/224 of the
            crop, rounded.
        class_names: Names of the classes in the order of their indices; None reads them from ``root/train``.
        on_bad_image: What training does at a file that cannot be decoded: "stop" with an error that names it,
            or "skip" it for the next one, with a warning. Evaluation and prediction always stop.
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
        on_bad_image: Literal["stop", "skip"] = "stop",
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
        require(on_bad_image in ("stop", "skip"), "on_bad_image", on_bad_image, "stop or skip")
        if decode_on_device:
            self._refuse_changes("decode_on_device", ImageNetDataModule, ("load", "collate"))
        if class_names is not None:
            repeated = [name for name, count in Counter(class_names).items() if count > 1]
            require(not repeated, "class_names", repeated, "each name once")
            require(bool(class_names), "class_names", class_names, "at least one name")
        self.root = root
        self._crop = crop
        self._shorter_side = shorter_side
        self._on_bad_image = on_bad_image
        self.decode_on_device = decode_on_device
        self._names = class_names
        self._folders: dict[str, list[str]] = {}

    @property
    def class_names(self) -> list[str]:
        """Names of the classes: `class_names`, or else the folders of ``root/train``, which are checked."""
        if self._names is None:
            folders = self._class_folders("train")
            if (Path(self.root) / "val").is_dir():
                self._compare(folders, self._class_folders("val"))
            self._names = _readable(folders)
        return self._names

    def load(self, split: Split, transform: Transform) -> MapDataset:
        """Return a split; see :class:`ClassificationDataModule`."""
        folder = "train" if split == "train" else "val"
        # the folders are looked at before the class names, for the plainer message where both are wrong
        self._class_folders(folder)
        paths: list[str] = []
        targets: list[int] = []
        for name, index in self._index_of_folder(folder, self.class_names).items():
            found = find_pictures(Path(self.root) / folder / name)
            if not found:
                raise InputError(
                    f"root={self.root!r}: the class folder {folder}/{name} holds no pictures "
                    f"({', '.join(EXTENSIONS)}); add some, or remove the folder from train/ and val/"
                )
            paths += found
            targets += [index] * len(found)
        skip = split == "train" and self._on_bad_image == "skip"
        return PictureDataset(paths, targets, transform, skip_bad=skip)

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

    def _class_folders(self, split: str) -> list[str]:
        if split not in self._folders:
            self._folders[split] = self._scan(split)
        return self._folders[split]

    def _scan(self, split: str) -> list[str]:
        root, folder = Path(self.root), Path(self.root) / split
        layout = f"{split}/CLASS/*.JPEG in it"
        if not root.is_dir():
            raise InputError(
                f"root={self.root!r}: expected a folder with train/CLASS/*.JPEG and val/CLASS/*.JPEG in it, "
                "and there is no such folder; name yours with --data.root FOLDER"
            )
        if not folder.is_dir():
            found = ", ".join(_some(sorted(os.listdir(root)))) or "nothing"
            hint = " (or give class_names, if all you want is to evaluate)" if split == "train" else ""
            raise InputError(f"root={self.root!r}: expected {layout}, found {found}; add {folder}{hint}")
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
        classes = sorted(entry.name for entry in entries if entry.is_dir())
        loose = sorted(entry.name for entry in entries if entry.name.lower().endswith(EXTENSIONS))
        if loose:
            what = f"{len(loose)} pictures outside of any class folder" if classes else "a flat folder of pictures"
            raise InputError(
                f"root={self.root!r}: expected {layout}, found {what} ({', '.join(_some(loose))}); "
                f"move each into the folder of its class, as in {split}/n01440764/{loose[0]}"
            )
        if not classes:
            raise InputError(
                f"root={self.root!r}: expected {layout}, found no class folders in {folder}; "
                "make one folder per class and put its pictures there"
            )
        return classes

    def _compare(self, train: list[str], val: list[str]) -> None:
        if train != val:
            differences = [
                f"only in {split}/: {', '.join(_some(sorted(set(ours) - set(others))))}"
                for split, ours, others in (("train", train, val), ("val", val, train))
                if set(ours) - set(others)
            ]
            raise InputError(
                f"root={self.root!r}: expected the same class folders in train/ and val/, "
                f"found {'; '.join(differences)}; add what is missing or remove the rest"
            )

    def _index_of_folder(self, split: str, names: list[str]) -> dict[str, int]:
        folders = self._class_folders(split)
        by_folder = dict(zip(folders, folders, strict=True))
        by_title = dict(zip(folders, _readable(folders), strict=True))
        # all by one or all by the other: a list that mixes them is more likely a mistake than a wish
        name_of = max(by_folder, by_title, key=lambda naming: len(set(names).intersection(naming.values())))
        absent = _some([name for name in names if name not in name_of.values()])
        extra = _some([folder for folder, name in name_of.items() if name not in names])
        if not absent and not extra:
            return {folder: names.index(name) for folder, name in name_of.items()}
        details = [f"no folder for {', '.join(absent)}"] if absent else []
        details += [f"no name for {', '.join(extra)}"] if extra else []
        raise InputError(
            f"class_names ({len(names)} names): expected those of the {len(folders)} class folders in "
            f"{Path(self.root) / split}, found {' and '.join(details)}; correct the list, or leave it out to "
            "take the names from train/"
        )


def _some(names: list[str], most: int = 3) -> list[str]:
    return names if len(names) <= most else [*names[:most], f"... ({len(names)} in all)"]


def _readable(folders: list[str]) -> list[str]:
    """English names of WordNet ids of ImageNet-1k, each unique; anything else is returned as it is."""
    if not all(len(name) == 9 and name[0] == "n" and name[1:].isdigit() for name in folders):
        return folders
    # only here: importing timm takes seconds, and one's own folders do without it
    from timm.data.imagenet_info import ImageNetInfo

    info: Any = ImageNetInfo("imagenet-1k")
    if not set(info.label_names()).issuperset(folders):
        return folders
    names = [info.label_name_to_description(wordnet_id).partition(",")[0] for wordnet_id in folders]
    count = Counter(names)
    return [
        name if count[name] == 1 else f"{name} ({wordnet_id})" for name, wordnet_id in zip(names, folders, strict=True)
    ]
