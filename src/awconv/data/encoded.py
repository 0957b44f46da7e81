"""Pictures that travel as the bytes of their files, and are decoded on the training device, a batch at a time."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

from awconv.data.loading import Loader, collate, seeded
from awconv.data.pictures import PictureDataset
from awconv.errors import require

EncodedBatch: TypeAlias = tuple[list[tuple[int, int]], Tensor, list[tuple[int, ...]], list[int]]
"""Epoch and index of each sample, the contents one after the other, the shape of each, and the targets."""


def require_decoder(argument: str, device: torch.device) -> None:
    """Refuses a device on which torchvision decodes no JPEG.

    Raises:
        InputError: It is one of those, which ``argument`` asks for.
    """
    try:
        there = decode_jpeg([encode_jpeg(torch.zeros(3, 8, 8, dtype=torch.uint8))], device=device)[0].device.type
        reason = f"it gives pictures on {there}"
    except RuntimeError as error:
        there, reason = None, str(error).partition("\n")[0]
    expected = f"false, since this torchvision decodes no JPEG on {device.type} ({reason})"
    require(there == device.type, argument, True, expected)


class EncodedPictures(Dataset[Any]):
    """Augmented samples of a data set of picture files: read by workers, decoded and transformed on the device.

    A worker gives the bytes of a JPEG file, and decodes whatever else it meets. The process that trains decodes the
    JPEGs of a batch in one call, and then takes each picture through the transform of the data set, with the random
    numbers that a :class:`awconv.data.loading.TrainingSet` would have drawn for it: on a CPU the result is the same to
    the bit, on a GPU it differs as its decoder and its resizing do. What the decoder refuses is read again on the CPU,
    whose errors name the file.

    Transforms may draw from torch's CPU generator alone, as everywhere.

    Args:
        pictures: The files.
        seed: Seed of the augmentation.
        device: Where to decode.
    """

    def __init__(self, pictures: PictureDataset, seed: int, device: torch.device) -> None:
        self._pictures, self._seed, self._device = pictures, seed, device
        self._warned = False

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, key: tuple[int, int] | int) -> tuple[tuple[int, int], Tensor, int]:
        # Trainer(overfit_batches=...) replaces the sampler by one of plain indices: the same pictures every epoch
        epoch, index = key if isinstance(key, tuple) else (0, key)
        used, content = self._pictures.read(index, encoded=True)
        return (epoch, index), content, self._pictures.label(used)

    @staticmethod
    def pack(samples: Sequence[tuple[tuple[int, int], Tensor, int]]) -> EncodedBatch:
        """Makes a batch of samples in a worker."""
        keys, contents, targets = zip(*samples, strict=True)
        # one tensor, since each that leaves a worker takes a file descriptor
        joined = torch.cat([content.flatten() for content in contents])
        return list(keys), joined, [tuple(content.shape) for content in contents], list(targets)

    def unpack(self, batch: EncodedBatch) -> tuple[Tensor, Tensor]:
        """Makes the batch (images, targets) of it, on the device, in the process that trains."""
        keys, joined, shapes, targets = batch
        lengths = [torch.Size(shape).numel() for shape in shapes]
        contents = [part.view(shape) for part, shape in zip(torch.split(joined, lengths), shapes, strict=True)]
        samples = []
        for key, picture, target in zip(keys, self._decoded(contents), targets, strict=True):
            epoch, index = key
            if picture is None:
                used, picture = self._pictures.read(index)
                target = self._pictures.label(used)
            with seeded(self._seed, epoch, index):
                samples.append((self._pictures.transform(picture.to(self._device, non_blocking=True)), target))
        images, labels = collate(samples)
        assert isinstance(labels, Tensor)
        return images, labels.to(self._device, non_blocking=True)

    def _decoded(self, contents: Sequence[Tensor]) -> list[Tensor | None]:
        """The pictures, on the device if they were decoded there; None for what it cannot decode."""
        encoded = [content for content in contents if content.dim() == 1]
        decoded = self._attempt(encoded)
        if decoded is None:  # the decoder does not say which of them it refuses
            decoded = [picture for content in encoded for picture in self._attempt([content]) or [None]]
            if len(decoded) > 1 and not any(picture is not None for picture in decoded) and not self._warned:
                self._warned = True
                warnings.warn(
                    f"the JPEG decoder of {self._device.type} refused a whole batch, so that training waits for the "
                    "CPU to decode it; leave decode_on_device out if that goes on",
                    stacklevel=2,
                )
        in_turn = iter(decoded)
        return [next(in_turn) if content.dim() == 1 else content for content in contents]

    def _attempt(self, encoded: list[Tensor]) -> list[Tensor | None] | None:
        if not encoded:
            return []
        try:
            pictures: list[Tensor | None] = decode_jpeg(encoded, ImageReadMode.RGB, device=self._device)
            return pictures
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return None


class DecodingLoader(Loader):
    """Unpacks the batches of :class:`EncodedPictures` as they are asked for."""

    dataset: EncodedPictures

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return map(self.dataset.unpack, super().__iter__())
