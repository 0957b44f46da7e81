"""Pictures that live on the training device as bytes, and are gathered and augmented there, a batch at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from awconv.data.loading import IGNORE_INDEX, seeded


class ResidentSplit:
    """A split of pictures of one size, as bytes.

    It takes the place of a data set whose samples are transformed one by one; :meth:`to` brings it to the device, and
    :class:`ResidentBatches` makes its batches there.

    Args:
        pictures: uint8 (M, C, H, W).
        targets: Class index of each, int64 (M,).
        geometry: Transforms of a batch of pictures, uint8 to uint8, that end in one size.
        finish: Transform of a batch of pictures, uint8 to normalised floats.
        padding: Training batches are padded by so many pixels of zero on each side, cropped at a random place to the
            size they had, and mirrored half of the time; None leaves them as they are.
    """

    def __init__(
        self,
        pictures: Tensor,
        targets: Tensor,
        geometry: Callable[[Tensor], Tensor],
        finish: Callable[[Tensor], Tensor],
        padding: int | None = None,
    ) -> None:
        self.pictures, self.targets = pictures, targets
        self.geometry, self.finish, self.padding = geometry, finish, padding

    def to(self, device: torch.device) -> "ResidentSplit":
        """Moves to another device, where it is not there yet, and gives itself."""
        self.pictures, self.targets = self.pictures.to(device), self.targets.to(device)
        return self

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.finish(self.geometry(self.pictures[index])), int(self.targets[index])


class ResidentBatches(Dataset[Any]):
    """Batches of a :class:`ResidentSplit`, from the indices that a sampler deals out.

    What a training picture looks like depends on the seed, the epoch and its index alone, as in
    :class:`awconv.data.loading.TrainingSet`: the random numbers of an epoch are drawn for all pictures at once, on the
    CPU, so that they are the same on every device. They are other ones than a `TrainingSet` draws.

    Args:
        split: The pictures.
        seed: Seed of the augmentation; None for evaluation. Indices beyond the last picture then stand for padding
            samples, as in :class:`awconv.data.loading.EvaluationSet`.
    """

    def __init__(self, split: ResidentSplit, seed: int | None) -> None:
        self._split, self._seed = split, seed
        self._drawn_for: int | None = None
        self._drawn: Tensor

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, key: tuple[int, int] | int) -> tuple[Tensor, Tensor]:
        images, targets = self.__getitems__([key])
        return images[0], targets[0]

    def __getitems__(self, keys: Sequence[tuple[int, int] | int]) -> tuple[Tensor, Tensor]:
        """The batch (images, targets), on the device."""
        split = self._split
        # Trainer(overfit_batches=...) replaces the sampler by one of plain indices: the same pictures every epoch
        epoch, chosen = (keys[0][0], [key[1] for key in keys]) if isinstance(keys[0], tuple) else (0, keys)  # type: ignore[index]
        indices = torch.tensor(chosen)
        is_padding = indices >= len(split)
        indices[is_padding] = 0
        indices, is_padding = (t.to(split.targets.device, non_blocking=True) for t in (indices, is_padding))
        images = split.geometry(split.pictures[indices])
        if self._seed is not None and split.padding is not None:
            down, right, mirrored = self._draws(epoch, split.padding)[indices].unbind(1)
            images = shift_and_flip(images, split.padding, down, right, mirrored.bool())
        targets = split.targets[indices].masked_fill(is_padding, IGNORE_INDEX)
        return split.finish(images), targets

    def _draws(self, epoch: int, padding: int) -> Tensor:
        if self._drawn_for != epoch:
            assert self._seed is not None
            with seeded(self._seed, epoch):
                shifts = torch.randint(2 * padding + 1, (len(self), 2))
                flips = torch.randint(2, (len(self), 1))
            self._drawn = torch.cat([shifts, flips], dim=1).to(self._split.targets.device)
            self._drawn_for = epoch
        return self._drawn


def as_it_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """What collates batches that are whole already."""
    return batch


def shift_and_flip(images: Tensor, padding: int, down: Tensor, right: Tensor, mirrored: Tensor) -> Tensor:
    """Pads with zeros, crops each image at a place of its own, and mirrors some.

    Args:
        images: (N, C, H, W).
        padding: Pixels added on each side.
        down: First row of each crop in the padded image, from 0 to twice the padding, int64 (N,).
        right: First column of each crop, likewise.
        mirrored: Which crops are mirrored, left to right, bool (N,).

    Returns:
        (N, C, H, W).
    """
    channels, height, width = images.shape[1:]
    padded = F.pad(images, [padding] * 4)
    device = images.device
    columns = torch.arange(width, device=device).expand(len(images), width)
    columns = torch.where(mirrored[:, None], width - 1 - columns, columns) + right[:, None]
    rows = torch.arange(height, device=device) + down[:, None]
    sample = torch.arange(len(images), device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[:, None, None]
    return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]
