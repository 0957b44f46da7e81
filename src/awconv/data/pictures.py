"""Picture files on disk: finding them, reading them, and saying which one is broken."""

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.io import decode_image
from torchvision.transforms.v2 import functional as F

from awconv.errors import InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def find_pictures(folder: str | Path) -> list[str]:
    """Paths of the picture files in a folder and the folders below it, sorted.

    A picture is known by its extension (:data:`EXTENSIONS`, in any case); names with a leading dot are
    passed over, since macOS leaves such shadows of pictures behind.
    """
    return sorted(
        os.path.join(parent, name)
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
    )


def read_picture(path: str | Path) -> Tensor:
    """Decode a picture file as RGB.

    torchvision's decoders read JPEG, PNG, WebP and GIF (the first frame); what they refuse is left to PIL.
    Grey pictures get three equal channels, transparency is dropped, 16-bit samples are scaled to 8 bits, and
    EXIF orientation is not applied.

    Args:
        path: The file.

    Returns:
        uint8 tensor (3, H, W).

    Raises:
        InputError: The file is missing, truncated, or not a picture.
    """
    try:
        encoded = torch.from_numpy(np.fromfile(path, dtype=np.uint8))
        try:
            image = decode_image(encoded, mode="RGB")
        except RuntimeError:
            with PIL.Image.open(path) as picture:
                image = F.pil_to_tensor(picture.convert("RGB"))
    except PIL.UnidentifiedImageError:
        raise InputError(f"{path}: this file is not a picture; replace or remove it") from None
    # PIL reports a broken picture by any of these, according to its format
    except (OSError, ValueError, SyntaxError, EOFError, PIL.Image.DecompressionBombError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).partition("\n")[0]
        raise InputError(f"{path}: this picture cannot be read ({reason}); replace or remove it") from None
    if image.ndim == 4:
        image = image[0]
    as_bytes: Tensor = F.to_dtype(image, torch.uint8, scale=True)
    return as_bytes


class PictureDataset(Dataset[tuple[Any, Any]]):
    """Pictures with their labels, or with their paths where there are no labels.

    Args:
        paths: The files.
        targets: Class index of each file; None yields the path instead.
        transform: Maps the decoded uint8 image (3, H, W) to what the network gets.
        skip_bad: Replace a file that cannot be read by the next one that can, and warn once per file, instead
            of raising `InputError`.
    """

    def __init__(
        self,
        paths: Sequence[str],
        targets: Sequence[int] | None,
        transform: Callable[[Any], Any],
        skip_bad: bool = False,
    ) -> None:
        # One buffer of bytes instead of a list of a million strings: a list's reference counts would have
        # every forked worker copy it page by page.
        self._paths = np.array([os.fsencode(path) for path in paths])
        self._targets = None if targets is None else torch.tensor(targets, dtype=torch.int64)
        self._transform = transform
        self._skip_bad = skip_bad
        # in shared memory, so that the warning about a file is given once and not once per worker
        self._known_bad = torch.zeros(len(paths) if skip_bad else 0, dtype=torch.bool)
        torch.Tensor.share_memory_(self._known_bad)  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, index: int) -> str:
        """Path of the file at `index`."""
        return os.fsdecode(self._paths[index])

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if self._skip_bad:
            index, image = self._next_readable(index)
        else:
            image = read_picture(self.path(index))
        label = self.path(index) if self._targets is None else int(self._targets[index])
        return self._transform(image), label

    def _next_readable(self, start: int) -> tuple[int, Tensor]:
        for step in range(len(self)):
            index = (start + step) % len(self)
            if self._known_bad[index]:
                continue
            try:
                return index, read_picture(self.path(index))
            except InputError as error:
                self._known_bad[index] = True
                warnings.warn(f"skipped {error}", stacklevel=2)
        raise InputError(f"{self.path(start)}: neither this picture nor any other of the data set can be read")
