"""Transforms of single pictures that cost little of their own.

torchvision's do the same and more: they look through any structure for images, boxes and masks, which costs tens of
microseconds a step, more than a small picture takes to crop or to normalise. These take a picture alone, and leave
what they do not know to torchvision's.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from awconv.data.pictures import most_pixels, to_tensor
from awconv.errors import InputError


class ToImage:
    """Turns an image, PIL image or tensor (C, H, W) or (H, W), into a tensor of the wanted number of channels.

    A PIL image is turned as its EXIF orientation says. Between grey and RGB it converts; any other number of channels
    is for the data set to supply.
    """

    def __init__(self, channels: int) -> None:
        self.channels = channels

    def __call__(self, picture: Any) -> Tensor:
        """Gives the image as a tensor (channels, H, W)."""
        to_grey = self.channels == 1
        convertible = self.channels in (1, 3)
        if isinstance(picture, PIL.Image.Image) and convertible:
            picture = to_tensor(picture, getattr(picture, "filename", "") or "a picture")
        image: Tensor = picture if isinstance(picture, Tensor) else v2.functional.to_image(picture)
        if type(image) is not Tensor:  # whose operations all take a detour through Python
            image = image.as_subclass(Tensor)
        if image.dim() == 2:
            image = image.unsqueeze(0)
        present = image.shape[-3]
        if present == self.channels or not convertible:
            return image
        # the second of two channels and the fourth of four are transparency
        image = image[..., : 1 if present == 2 else 3, :, :]
        return _to_grey(image) if to_grey else v2.functional.grayscale_to_rgb(image)


def _to_grey(image: Tensor) -> Tensor:
    """Grey of an image (..., 3, H, W), rounded as Pillow does: torchvision's makes 254 of white."""
    if image.shape[-3] == 1:
        return image
    if image.dtype != torch.uint8:
        of_floats: Tensor = v2.functional.rgb_to_grayscale(image)
        return of_floats
    red, green, blue = image.to(torch.int32).unbind(-3)
    grey = (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16
    return grey.to(torch.uint8).unsqueeze(-3)


class Resize(v2.Resize):  # type: ignore[misc]
    """torchvision's, which here leaves a picture at once whose shorter side has the length already.

    Raises:
        InputError: The longer side of a very thin image would get so long that the image had more pixels than
            :func:`awconv.data.pictures.limit_pixels` lets pass.
    """

    def forward(self, *inputs: Any) -> Any:
        """Gives the picture with its shorter side of the length."""
        if len(inputs) == 1 and type(inputs[0]) is Tensor and len(self.size or ()) == 1:
            height, width = inputs[0].shape[-2:]
            (length,) = self.size
            if min(height, width) == length:
                return inputs[0]
            pixels = length * length * max(height, width) // min(height, width)
            if pixels > most_pixels():
                raise InputError(
                    f"an image of {width}x{height} pixels gets {pixels} when its shorter side is made {length}, more "
                    f"than max_image_pixels={most_pixels()} allows; crop or remove it"
                )
        return super().forward(*inputs)


class ShiftedCrop:
    """Pads a picture with zeros, and crops it at a random place.

    Args:
        size: Height and width of the crop in pixels.
        padding: Pixels added on each side.
    """

    def __init__(self, size: int, padding: int) -> None:
        self.size, self.padding = size, padding

    def __call__(self, image: Tensor) -> Tensor:
        """Gives the crop of an image (..., H, W)."""
        padded = F.pad(image, [self.padding] * 4)
        if min(padded.shape[-2:]) < self.size:
            raise InputError(
                f"a picture of {image.shape[-2]}x{image.shape[-1]} pixels, padded by {self.padding}, has no crop of "
                f"{self.size}x{self.size}; resize it before"
            )
        # one call for both: drawing takes as long as cropping
        down, right = (
            int(drawn * (side - self.size + 1))
            for drawn, side in zip(torch.rand(2).tolist(), padded.shape[-2:], strict=True)
        )
        return padded[..., down : down + self.size, right : right + self.size]


class RandomMirror:
    """Mirrors a picture left to right, half of the time."""

    def __call__(self, image: Tensor) -> Tensor:
        """Gives the image (..., H, W), mirrored or not."""
        return image.flip(-1) if torch.rand(()).item() < 0.5 else image


class Normalise(v2.Compose):  # type: ignore[misc]
    """Scales bytes to [0, 1], subtracts each channel's mean and divides by its standard deviation, all at once.

    Args:
        mean: Mean of each channel.
        std: Standard deviation of each channel.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        scaled = v2.ToDtype(torch.float32, scale=True)
        super().__init__([scaled, v2.Normalize(list(mean), list(std)), v2.ToPureTensor()])
        self._of = tuple(mean), tuple(std)

    def forward(self, *inputs: Any) -> Any:
        """Gives an image (..., C, H, W), or a batch of them, as normalised floats."""
        image = inputs[0]
        if len(inputs) > 1 or type(image) is not Tensor or image.dtype != torch.uint8:
            return super().forward(*inputs)
        factor, offset = _factor_and_offset(*self._of, image.device)
        return image.float().mul_(factor).add_(offset)


@lru_cache
def _factor_and_offset(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    centre, spread = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (mean, std))
    return (1 / (255 * spread)).float().to(device), (-centre / spread).float().to(device)
