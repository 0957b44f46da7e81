"""The base of every classification data module: transforms of pictures, and mixing of batches."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torchvision.transforms import v2

from awconv.data.base import BaseDataModule, OnBadImage, Split, Transform
from awconv.data.loading import MapDataset, collate, seeded
from awconv.data.transforms import Normalise, RandomMirror, Resize, ShiftedCrop, ToImage
from awconv.errors import is_number, require, require_int, require_number
from awconv.files import MAX_IMAGE_PIXELS

Augment: TypeAlias = Literal["none", "basic", "autoaugment", "randaugment", "trivialaugment"]
BatchTransform: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class ClassificationDataModule(BaseDataModule):
    """Base class of the classification data modules.

    A data set of your own needs the names of its classes and a method that returns its three splits, each a
    map-style data set of (picture, class index) that applies `transform` to the picture; torchvision's data
    sets do. A picture is a PIL image, which is turned as its EXIF orientation says, or a tensor (C, H, W)::

        class FlowersDataModule(ClassificationDataModule):
            class_names = Path("flowers.txt").read_text(encoding="utf-8").splitlines()
            mean, std = (0.43, 0.38, 0.30), (0.29, 0.24, 0.27)

            def __init__(self, root: str = "datasets", *, image_size: int = 128, **common: Any) -> None:
                super().__init__(image_size=image_size, **common)
                self.root = root

            def load(self, split: Split, transform: Transform) -> Flowers102:
                return Flowers102(self.root, split, transform)

    Everything else comes from here: augmentation, loaders, several processes, MixUp and CutMix, a folder of
    pictures to predict, saved hyperparameters, and every argument below on the command line. Override
    :meth:`train_geometry` and :meth:`eval_geometry` for another crop, :meth:`batch_transforms` for
    augmentation of whole batches, and ``prepare_data`` for a download.

    Training and evaluation batches are tuples ``(images, targets)``: images float32 (N, C, H, W), normalised;
    targets int64 (N,), or float32 (N, num_classes) where MixUp or CutMix mixed them. Prediction batches are
    ``(images, paths)`` with a list of N paths. With several processes each evaluates its own share, and the
    shares are filled up to one length with padding samples, whose target is `IGNORE_INDEX` and whose path is
    "": drop them. An epoch of training leaves out the last batch unless it is full (or the only one).

    The order of the samples and their augmentation follow from the run's seed (``seed_everything``), the
    epoch and the sample, so that neither the number of workers nor a resumption changes them. Your own random
    transforms share in this if they draw from torch's CPU generator.

    Args:
        image_size: Height and width of the images in pixels.
        batch_size: Samples per batch and process.
        num_workers: Worker processes that load data, per process; 0 loads in the process itself.
        augment: Augmentation of the training pictures: "none", "basic" (the data set's own crop and flip), or
            basic and then a policy: "autoaugment" (Cubuk et al. 2019), "randaugment" (Cubuk et al. 2020) or
            "trivialaugment" (Müller and Hutter 2021).
        random_erasing: Probability of erasing a rectangle of a training image (Zhong et al. 2020).
        mixup_alpha: MixUp's Beta parameter (Zhang et al. 2018); 0 switches MixUp off.
        cutmix_alpha: CutMix's Beta parameter (Yun et al. 2019); 0 switches CutMix off. With both on, each batch
            gets one of the two, chosen at random.
        mean: Mean of each channel, for samples scaled to [0, 1], which normalisation subtracts; None means the
            data set's own. Give a pretrained network those it was trained with.
        std: Standard deviation of each channel, by which normalisation divides; None means the data set's own.
        predict_dir: Folder of images for ``predict``, searched with all its subfolders but the hidden ones.
        on_bad_image: "stop" at an image file that cannot be read or "skip" it; see :class:`BaseDataModule`.
        check_images: Decode every image file before a command begins; see :class:`BaseDataModule`.
        max_image_pixels: The largest image that is read; see :class:`BaseDataModule`.
        seed: Seed of the split where a validation or test set has to be cut out; nothing else depends on it.

    Raises:
        InputError: An argument is of the wrong type or out of its range.
    """

    # of ImageNet's training pictures, as torchvision's reference training has them
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    autoaugment_policy = v2.AutoAugmentPolicy.IMAGENET

    def __init__(
        self,
        *,
        image_size: int = 224,
        batch_size: int = 128,
        num_workers: int = 4,
        augment: Augment = "basic",
        random_erasing: float = 0.0,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        predict_dir: str | None = None,
        on_bad_image: OnBadImage | None = None,
        check_images: bool = False,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        seed: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            num_workers=num_workers,
            predict_dir=predict_dir,
            on_bad_image=on_bad_image,
            check_images=check_images,
            max_image_pixels=max_image_pixels,
            seed=seed,
        )
        require_int("image_size", image_size, "a whole number of pixels, at least 1", low=1)
        require(augment in get_args(Augment), "augment", augment, f"one of {', '.join(get_args(Augment))}")
        require_number("random_erasing", random_erasing, "a probability between 0 and 1", low=0, high=1)
        require_number("mixup_alpha", mixup_alpha, "a number, 0 (off) or more", low=0)
        require_number("cutmix_alpha", cutmix_alpha, "a number, 0 (off) or more", low=0)
        if mean is not None:
            self.mean = self._per_channel("mean", mean, "a number")
        if std is not None:
            self.std = self._per_channel("std", std, "a number above 0")
            require(min(self.std) > 0, "std", std, "a number above 0 for every channel")
        self.image_size = image_size
        self.augment = augment
        self.random_erasing = random_erasing
        self.mixup_alpha = mixup_alpha
        self.cutmix_alpha = cutmix_alpha
        self._batch_transforms: list[BatchTransform] | None = None

    def _per_channel(self, argument: str, values: Any, each: str) -> tuple[float, ...]:
        ok = isinstance(values, (list, tuple)) and len(values) == self.in_channels and all(map(is_number, values))
        require(ok, argument, values, f"a list with {each} for each of the {self.in_channels} channels")
        return tuple(values)

    def _refuse_changes(self, option: str, base: type, names: Sequence[str]) -> None:
        """Refuses an option that is on, for a class with methods of its own that it would pass over."""
        changed = [name for name in names if getattr(type(self), name) is not getattr(base, name)]
        own = f"false, since {type(self).__name__} has a {' and a '.join(changed)} of its own, for samples"
        require(not changed, option, True, own)

    # ---- what a data set of one's own supplies

    def load(self, split: Split, transform: Transform) -> MapDataset:
        """Return one split as a map-style data set of (``transform(picture)``, class index)."""
        raise self._lacking("load(split, transform)")

    def load_split(self, split: Split) -> MapDataset:
        """Return one split with its transform; see :meth:`load`."""
        return self.load(split, self.train_transform() if split == "train" else self.eval_transform())

    @staticmethod
    def collate(samples: Sequence[tuple[Tensor, Any]]) -> tuple[Any, Any]:
        """Stack the samples of a batch."""
        return collate(samples)

    # ---- transforms

    def train_geometry(self) -> list[Transform]:
        """Transforms of a training picture, a uint8 tensor, that end in `image_size`: a shifted crop and a flip."""
        size = self.image_size
        return [
            Resize(size),
            ShiftedCrop(size, padding=size // 8),
            RandomMirror(),
        ]

    def eval_geometry(self) -> list[Transform]:
        """Transforms of an evaluation picture, a uint8 tensor, that end in the size to evaluate at."""
        return [Resize(self.image_size), v2.CenterCrop(self.image_size)]

    def plain_geometry(self) -> list[Transform]:
        """Transforms of a training picture where `augment` is "none"; as in evaluation by default."""
        return self.eval_geometry()

    def train_transform(self) -> Transform:
        """What happens to a training picture: geometry, policy, normalisation, erasing."""
        bilinear = v2.InterpolationMode.BILINEAR
        policies: dict[str, list[Transform]] = {
            "autoaugment": [v2.AutoAugment(self.autoaugment_policy, interpolation=bilinear)],
            "randaugment": [v2.RandAugment(interpolation=bilinear)],
            "trivialaugment": [v2.TrivialAugmentWide(interpolation=bilinear)],
        }
        geometry = self.plain_geometry() if self.augment == "none" else self.train_geometry()
        erasing = [v2.RandomErasing(self.random_erasing)] if self.random_erasing else []
        return self._transform(geometry + policies.get(self.augment, []), erasing)

    def eval_transform(self) -> Transform:
        """What happens to a validation or test picture: geometry and normalisation."""
        return self._transform(self.eval_geometry())

    def predict_transform(self) -> Transform:
        """What happens to a picture of `predict_dir`: the same as to a test picture."""
        return self.eval_transform()

    def _transform(self, on_bytes: list[Transform], on_floats: list[Transform] | None = None) -> Transform:
        normalise = Normalise(self.mean, self.std)
        compose: Transform = v2.Compose([ToImage(self.in_channels), *on_bytes, normalise, *(on_floats or [])])
        return compose

    def batch_transforms(self) -> list[BatchTransform]:
        """Augmentations of a whole training batch, (images, targets) -> (images, targets), on its device."""
        mixes: list[Transform] = []
        if self.mixup_alpha:
            mixes.append(v2.MixUp(alpha=self.mixup_alpha, num_classes=self.num_classes))
        if self.cutmix_alpha:
            mixes.append(v2.CutMix(alpha=self.cutmix_alpha, num_classes=self.num_classes))
        return [v2.RandomChoice(mixes)] if mixes else []

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Apply :meth:`batch_transforms` to training batches."""
        trainer = self.trainer
        # Lightning's model summary sends bare pictures through here
        if trainer is None or not trainer.training or isinstance(batch, torch.Tensor):
            return batch
        if self._batch_transforms is None:
            self._batch_transforms = self.batch_transforms()
        step = trainer.fit_loop.epoch_loop.total_batch_idx
        with seeded(torch.initial_seed(), trainer.global_rank, step):
            for transform in self._batch_transforms:
                batch = transform(*batch)
        return batch
