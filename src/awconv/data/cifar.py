"""CIFAR-10 and CIFAR-100 through torchvision's own classes."""

import os
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision import datasets
from torchvision.datasets.utils import check_integrity
from torchvision.transforms import v2

from awconv.data.base import Split, Transform
from awconv.data.classification import ClassificationDataModule
from awconv.data.loading import MapDataset
from awconv.data.resident import ResidentSplit
from awconv.errors import InputError, require, require_int


class CIFAR10DataModule(ClassificationDataModule):
    """CIFAR-10 (Krizhevsky 2009): 60000 pictures of 32x32 pixels in 10 classes, 10000 of them for testing.

    The validation set is cut out of the 50000 training pictures at random, by `seed` alone: the same in every
    process and every run. The test set is as published. Basic augmentation is He et al.'s: four pixels of
    padding, a crop of 32x32 and a horizontal flip.

    Args:
        root: Folder that holds ``cifar-10-batches-py`` (CIFAR-100: ``cifar-100-python``).
        image_size: Height and width of the images in pixels; the pictures are resized where it is not 32.
        val_size: Number of training pictures held out for validation. 0 trains on all of them, as published
            schedules do, and validates on the test set, with a warning: choose no checkpoint by it then, but
            report the last one.
        download: Fetch the data into `root` if they are not there.
        keep_on_device: Keep all pictures on the training device, as bytes (184 MB for training, validation and test),
            and gather and augment whole batches there; `num_workers` then serves ``predict`` alone. For `augment`
            "none" and "basic" without `random_erasing`, and for classes that leave loading and augmentation as they
            are here. The augmentation is of the same kind, from other random numbers.
        common: Arguments of :class:`ClassificationDataModule`.

    Raises:
        InputError: The data are missing or damaged (when the data are first needed).
    """

    # of the 50000 training pictures, as in github.com/kuangliu/pytorch-cifar and many after it, with the
    # standard deviation over all pixels (0.2470, ...) in place of its mean over pictures (0.2023, ...)
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)
    autoaugment_policy = v2.AutoAugmentPolicy.CIFAR10

    _source: ClassVar[type[datasets.CIFAR10]] = datasets.CIFAR10
    _names: ClassVar[str] = "airplane automobile bird cat deer dog frog horse ship truck"

    def __init__(
        self,
        root: str = "datasets",
        *,
        image_size: int = 32,
        val_size: int = 5000,
        download: bool = False,
        keep_on_device: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(image_size=image_size, **common)
        require_int("val_size", val_size, "a number of pictures, 0 or more", low=0)
        one_by_one = "random_erasing" if self.random_erasing else f"augment={self.augment!r}"
        require(
            not keep_on_device or (self.augment in ("none", "basic") and not self.random_erasing),
            "keep_on_device",
            keep_on_device,
            f"false, since {one_by_one} works picture by picture; or augment none or basic, without random_erasing",
        )
        if keep_on_device:
            names = ("load", "collate", "train_geometry", "train_transform", "eval_transform")
            self._refuse_changes("keep_on_device", CIFAR10DataModule, names)
        self.root = root
        self.val_size = val_size
        self.download = download
        self.keep_on_device = keep_on_device
        self._archives: dict[bool, datasets.CIFAR10] = {}

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, as published."""
        return self._names.split()

    def prepare_data(self) -> None:
        """Download the data where `download` says so."""
        if self.download:
            try:
                self._source(self.root, download=True)
            except (RuntimeError, OSError) as error:
                reason = str(error).partition("\n")[0]
                raise InputError(
                    f"download=True: {self._source.url} could not be fetched into root={self.root!r} ({reason}); "
                    "fetch and unpack it there by hand"
                ) from error

    def load_split(self, split: Split) -> MapDataset:
        """Return a split, on the device where `keep_on_device` says so; see :class:`ClassificationDataModule`."""
        if not self.keep_on_device:
            return super().load_split(split)
        archive, chosen = self._part(split)
        pictures, targets = _as_tensor(archive), torch.tensor(archive.targets)
        augmented = split == "train" and self.augment == "basic"
        unaugmented = self.plain_geometry() if split == "train" else self.eval_geometry()
        geometry = [v2.Resize(self.image_size)] if augmented else unaugmented
        return ResidentSplit(
            (pictures if chosen is None else pictures[chosen]).contiguous(),
            targets if chosen is None else targets[chosen],
            v2.Compose(geometry),
            self._transform([]),
            padding=self.image_size // 8 if augmented else None,
        )

    def load(self, split: Split, transform: Transform) -> MapDataset:
        """Return a split; see :class:`ClassificationDataModule`."""
        archive, chosen = self._part(split)
        pictures = _Pictures(_as_tensor(archive), archive.targets, transform)
        return pictures if chosen is None else Subset(pictures, chosen)

    def _part(self, split: Split) -> tuple[datasets.CIFAR10, list[int] | None]:
        """The archive that holds a split, and which of its pictures belong to it; None for all."""
        if split == "test":
            return self._archive(train=False), None
        if split == "val" and self.val_size == 0:
            rank_zero_warn("val_size=0: validation runs on the test set; report the last checkpoint, not the best one")
            return self._archive(train=False), None
        archive = self._archive(train=True)
        total = len(archive)
        require(self.val_size < total, "val_size", self.val_size, f"less than the {total} training pictures")
        order = torch.randperm(total, generator=torch.Generator().manual_seed(self.seed)).tolist()
        return archive, sorted(order[: self.val_size] if split == "val" else order[self.val_size :])

    def _archive(self, train: bool) -> datasets.CIFAR10:
        if train not in self._archives:
            try:
                self._archives[train] = self._source(self.root, train=train)
            except RuntimeError:
                raise InputError(self._what_is_wrong()) from None
            require(
                self._archives[train].classes == self.class_names,
                "root",
                self.root,
                f"the classes {self.class_names[0]} to {self.class_names[-1]} in their order, "
                f"and {self._source.meta['filename']} lists others; {self._remedy}",
            )
        return self._archives[train]

    @property
    def _remedy(self) -> str:
        return f"get it with --data.download true, or unpack {self._source.url} in {self.root}"

    def _what_is_wrong(self) -> str:
        source = self._source
        get_it = self._remedy
        folder = os.path.join(self.root, source.base_folder)
        files = {**dict(source.train_list + source.test_list), source.meta["filename"]: source.meta["md5"]}
        missing = [name for name in files if not os.path.isfile(os.path.join(folder, name))]
        if len(missing) == len(files):
            return f"root={self.root!r}: expected the folder {source.base_folder} with the data set in it; {get_it}"
        if missing:
            return f"root={self.root!r}: {folder} lacks {', '.join(missing)}; {get_it}"
        damaged = [name for name, md5 in files.items() if not check_integrity(os.path.join(folder, name), md5)]
        return f"root={self.root!r}: {', '.join(damaged)} in {folder} is damaged (wrong MD5 sum); delete and {get_it}"


def _as_tensor(archive: datasets.CIFAR10) -> Tensor:
    """The pictures of an archive, uint8 (N, 3, 32, 32), in the memory that holds them."""
    return torch.from_numpy(archive.data).permute(0, 3, 1, 2)


class _Pictures(Dataset[tuple[Any, int]]):
    """What torchvision's class is too, but for the PIL image in between, which takes longer than to crop it."""

    def __init__(self, pictures: Tensor, targets: list[int], transform: Transform) -> None:
        self.pictures, self.targets, self.transform = pictures, targets, transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        # a copy, since a transform may work in place
        return self.transform(self.pictures[index].clone()), self.targets[index]


class CIFAR100DataModule(CIFAR10DataModule):
    """CIFAR-100 (Krizhevsky 2009): 60000 pictures of 32x32 pixels in 100 classes, 10000 of them for testing.

    All else is as in :class:`CIFAR10DataModule`, arguments included.
    """

    # of the 50000 training pictures, rounded from github.com/weiaicunzai/pytorch-cifar100
    mean = (0.5071, 0.4865, 0.4409)
    std = (0.2673, 0.2564, 0.2762)

    _source = datasets.CIFAR100
    _names = (
        "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel "
        "can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur "
        "dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion "
        "lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree "
        "pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea "
        "seal shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table "
        "tank telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman "
        "worm"
    )
