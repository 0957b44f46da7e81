"""Real handwritten digits that come with scikit-learn: no download, trained in minutes on a CPU."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from awconv.data.base import Split, Transform
from awconv.data.classification import BatchTransform, ClassificationDataModule
from awconv.data.loading import MapDataset
from awconv.errors import require_int

_NATIVE_SIZE = 8


class DigitsDataModule(ClassificationDataModule):
    """The 1797 handwritten digits of scikit-learn, 8x8 pixels in 17 grey levels.

    They are the test part of the Optical Recognition of Handwritten Digits data (Alpaydin and Kaynak 1998,
    doi 10.24432/C50P49). The split is stratified and fixed by `seed`: 1257 digits to train, 180 to validate,
    360 to test. The whole set lives in memory.

    Basic augmentation rotates, shears, scales and shifts each digit a little, a batch at a time on its
    device, and flips nothing: a mirrored digit is no digit.

    The digits are bright strokes on a dark ground, and fill their frame. For ``predict``, pictures are made
    grey, reduced to 8x8 like the data, and brought to `image_size`; scans of ink on paper are dark on bright
    and need `invert`.

    Args:
        image_size: Height and width in pixels to which the digits are enlarged, at least 8.
        batch_size: Samples per batch and process.
        num_workers: Worker processes; the digits are in memory, so 0 is the fastest.
        invert: Swap dark and bright in the pictures of `predict_dir`.
        common: Arguments of :class:`ClassificationDataModule`.
    """

    in_channels = 1
    # of the 1797 digits, grey levels scaled to [0, 1]; computed from the data, which the tests repeat
    mean = (0.3053,)
    std = (0.3760,)

    def __init__(
        self,
        *,
        image_size: int = 16,
        batch_size: int = 64,
        num_workers: int = 0,
        invert: bool = False,
        **common: Any,
    ) -> None:
        least = f"a whole number of pixels, at least {_NATIVE_SIZE}, the size of the digits"
        require_int("image_size", image_size, least, low=_NATIVE_SIZE)
        super().__init__(image_size=image_size, batch_size=batch_size, num_workers=num_workers, **common)
        self.invert = invert

    @property
    def class_names(self) -> list[str]:
        """The digits "0" to "9"."""
        return [str(digit) for digit in range(10)]

    def load(self, split: Split, transform: Transform) -> MapDataset:
        """Return a split; see :class:`ClassificationDataModule`."""
        # only here: importing scikit-learn takes a while, and every command line imports this module
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        rest, test = train_test_split(
            range(len(digits.target)), test_size=360, stratify=digits.target, random_state=self.seed
        )
        train, val = train_test_split(rest, test_size=180, stratify=digits.target[rest], random_state=self.seed)
        chosen = {"train": train, "val": val, "test": test}[split]
        grey = torch.from_numpy(digits.images[chosen]).unsqueeze(1)
        images = tv_tensors.Image((grey * (255 / 16)).round().to(torch.uint8))
        targets = torch.from_numpy(digits.target[chosen]).to(torch.int64)
        random = split == "train" and (self.augment not in ("none", "basic") or self.random_erasing > 0)
        if random:
            return _Transformed(images, targets, transform)
        return TensorDataset(transform(images), targets)

    def train_geometry(self) -> list[Transform]:
        """Enlarge; the rest of the geometry is a batch transform."""
        return self.eval_geometry()

    def predict_transform(self) -> Transform:
        """Reduce the picture to the resolution of the data before it is enlarged like them."""
        polarity: list[Transform] = [v2.RandomInvert(1.0)] if self.invert else []
        reduce: list[Transform] = [v2.Resize(_NATIVE_SIZE), v2.CenterCrop(_NATIVE_SIZE)]
        return self._transform(polarity + reduce + self.eval_geometry())

    def batch_transforms(self) -> list[BatchTransform]:
        """A small random affine map per digit, and then the mixing of the base class."""
        if self.augment == "none":
            return super().batch_transforms()
        return [_RandomAffine(ground=-self.mean[0] / self.std[0]), *super().batch_transforms()]


class _Transformed(Dataset[tuple[Tensor, int]]):
    def __init__(self, images: Tensor, targets: Tensor, transform: Transform) -> None:
        self._images, self._targets, self._transform = images, targets, transform

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(tv_tensors.Image(self._images[index])), int(self._targets[index])


class _RandomAffine:
    """Rotates, shears, scales and shifts each image (N, C, H, W) of a batch on its own.

    Args:
        ground: Value of the ground, which fills what comes into view.
        degrees: Largest rotation.
        shear: Largest shear, as the tangent of its angle.
        scale: Largest change of scale.
        shift: Largest shift, in image widths.
    """

    def __init__(
        self,
        ground: float,
        degrees: float = 10.0,
        shear: float = 0.1,
        scale: float = 0.1,
        shift: float = 0.08,
    ) -> None:
        self._ground = ground
        # the grid of grid_sample spans [-1, 1], so a shift of one image width is 2
        self._limits = torch.tensor([[math.radians(degrees)], [shear], [scale], [2 * shift], [2 * shift]])

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        drawn = (torch.rand(5, len(images)) * 2 - 1) * self._limits
        angle, shear, scale, dx, dy = drawn.to(images.device)
        cos, sin = torch.cos(angle) * (1 + scale), torch.sin(angle) * (1 + scale)
        theta = torch.stack([cos, shear - sin, dx, sin, cos, dy], dim=1).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        moved = F.grid_sample(images.float() - self._ground, grid, align_corners=False) + self._ground
        return moved.to(images.dtype), targets
