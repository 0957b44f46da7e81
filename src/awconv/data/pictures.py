"""Picture files on disk: finding them, reading them, and saying which one is broken."""

import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as F

from awconv.errors import InputError

_T = TypeVar("_T")

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def find_pictures(folder: str | Path) -> list[str]:
    """Paths of the picture files in a folder and the folders below it, sorted.

    A picture is known by its extension (:data:`EXTENSIONS`, in any case); names with a leading dot are
    passed over, since macOS leaves such shadows of pictures behind. Links to folders are followed, but no
    folder is searched twice.
    """
    seen: set[str] = set()
    pictures: list[str] = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        # A link to a folder above leads back here without end, or until the path is too long.
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        pictures += [
            os.path.join(parent, name)
            for name in names
            if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
        ]
    return sorted(pictures)


def eight_bits(picture: PIL.Image.Image, mode: str, name: str | Path) -> PIL.Image.Image:
    """Convert a picture to 8 bits per sample: "RGB", or "L" for grey; of 16 bits the upper 8 are kept.

    Raises:
        InputError: The samples are 32-bit integers or floats, whose black and white nobody knows.
    """
    if picture.mode in ("I", "F"):
        kind = "32-bit integers" if picture.mode == "I" else "32-bit floats"
        raise InputError(f"{name}: the samples of this picture are {kind}; save it with 8 or 16 bits")
    if picture.mode.startswith("I;16"):
        # PIL's own conversion clips at 255 instead of scaling
        picture = PIL.Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    elif picture.mode == "P" and "transparency" in picture.info:
        # PIL warns about a palette with transparency that is not taken out by way of RGBA
        picture = picture.convert("RGBA")
    return picture.convert(mode)


def read_picture(path: str | Path, upright: bool = False) -> Tensor:
    """Decode a picture file (of an animation, the first frame) as RGB.

    Grey pictures get three equal channels, transparency is dropped, and 16-bit samples are scaled to 8 bits.

    Args:
        path: The file.
        upright: Turn the picture as its EXIF orientation says, as viewers do with a phone's pictures. Class
            folders are read without: ImageNet is trained and evaluated on the pixels as they are stored, and
            published accuracies belong to those. (A TIFF is turned in any case, by PIL.)

    Returns:
        uint8 tensor (3, H, W).

    Raises:
        InputError: The file is missing, truncated, not a picture, or one of 32 bits per sample.
    """
    with _naming(path):
        return _decoded(np.fromfile(path, dtype=np.uint8), path, upright)


def read_encoded(path: str | Path) -> Tensor:
    """The bytes of a picture file that any JPEG decoder can be given, and else the picture.

    That is a complete one, grey or of the usual colours (YCbCr): what is to be made of the others, decoders disagree.

    Returns:
        uint8 tensor, (length,) of a file and (3, H, W) of a picture; see :func:`read_picture`.

    Raises:
        InputError: As from :func:`read_picture`, of files that have to be decoded here.
    """
    with _naming(path):
        encoded = np.fromfile(path, dtype=np.uint8)
        return torch.from_numpy(encoded) if _is_common_jpeg(encoded) else _decoded(encoded, path, upright=False)


_JPEG = b"\xff\xd8\xff"


def _is_common_jpeg(encoded: npt.NDArray[np.uint8]) -> bool:
    if encoded[:3].tobytes() != _JPEG or encoded[-2:].tobytes() != b"\xff\xd9":
        return False
    try:  # reads the head alone
        with PIL.Image.open(io.BytesIO(encoded.tobytes())) as picture:
            # where Adobe's marker says 0, the samples are RGB
            return picture.mode in ("L", "RGB") and picture.info.get("adobe_transform") != 0
    except Exception:  # as many kinds as there are in _naming
        return False


def _decoded(encoded: npt.NDArray[np.uint8], path: str | Path, upright: bool) -> Tensor:
    # torchvision decodes JPEG fastest. Its other decoders are left alone: a single wrong byte in a PNG
    # can crash the process.
    if encoded[:3].tobytes() == _JPEG:
        try:
            decoded: Tensor = decode_jpeg(torch.from_numpy(encoded), ImageReadMode.RGB, apply_exif_orientation=upright)
            return decoded
        except RuntimeError:
            pass
    with PIL.Image.open(io.BytesIO(encoded.tobytes())) as picture:
        turned = PIL.ImageOps.exif_transpose(picture) if upright else picture
        image: Tensor = F.pil_to_tensor(eight_bits(turned, "RGB", path))
        return image


class Head(NamedTuple):
    """What the head of an image file says: the size of the pixels as stored, and the EXIF orientation.

    Attributes:
        height: Height in pixels, as stored.
        width: Width in pixels, as stored.
        orientation: 1 for an upright image; 2 to 4 mirror or turn it by half, and 5 to 8 exchange height and width.
    """

    height: int
    width: int
    orientation: int


# They wait for slow disks together. For files in memory, fewer would be faster: the parser holds Python's lock.
_HEAD_THREADS = 8
_TIFF_SIZE = (PIL.ExifTags.Base.ImageWidth, PIL.ExifTags.Base.ImageLength)


def read_heads(paths: Sequence[str]) -> list[Head | InputError]:
    """Read the heads of image files, some thousands a second; the pixels are not decoded.

    Returns:
        For each path its head, or the `InputError` that says why there is none.
    """
    # a thread that meets the first file of a rarer format must not find the plugins half loaded
    PIL.Image.init()
    shares = [paths[k::_HEAD_THREADS] for k in range(_HEAD_THREADS)]
    heads: list[Any] = [None] * len(paths)
    with ThreadPoolExecutor(_HEAD_THREADS) as pool:
        for k, share in enumerate(pool.map(lambda share: [_head_or_error(path) for path in share], shares)):
            heads[k::_HEAD_THREADS] = share
    return heads


def _head_or_error(path: str) -> Head | InputError:
    try:
        with _naming(path), PIL.Image.open(path) as picture:
            # of a TIFF, PIL gives the size of the upright image, and earlier versions did not
            width, height = map(picture.tag_v2.get, _TIFF_SIZE) if hasattr(picture, "tag_v2") else picture.size
            return Head(height, width, _orientation(picture))
    except InputError as error:
        return error


def _orientation(picture: PIL.Image.Image) -> int:
    try:
        if picture.format in ("JPEG", "MPO"):
            # the decoder of JPEGs heeds EXIF alone, where PIL would also look into XMP
            exif = PIL.Image.Exif()
            exif.load(picture.info.get("exif", b""))
        else:
            # not a PNG's own method, which decodes the whole image to find EXIF data behind the pixels
            exif = PIL.Image.Image.getexif(picture)
        orientation = exif.get(PIL.ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data, with as many kinds of exceptions as in _naming, turn nothing
        return 1
    return orientation if orientation in range(1, 9) else 1


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Turn whatever goes wrong with a picture file into an `InputError` that names it."""
    try:
        yield
    except InputError:
        raise
    except PIL.UnidentifiedImageError:
        raise InputError(f"{path}: this file is not a picture; replace or remove it") from None
    # PIL reports a broken picture by almost any exception, according to its format and to what is broken
    except Exception as error:
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).partition("\n")[0]
        raise InputError(f"{path}: this picture cannot be read ({reason}); replace or remove it") from None


def read_or_next(read: Callable[[int], _T], index: int, length: int, path: Callable[[int], str]) -> tuple[int, _T]:
    """Read the sample at `index`, or the next one that can be read, and warn of each one that cannot.

    Args:
        read: Reads the sample at an index; raises `InputError` where it cannot be read.
        index: Which one.
        length: Number of samples; after the last one comes the first.
        path: Path of the file at an index, for the message.

    Returns:
        The index of the sample that was read, and the sample.

    Raises:
        InputError: No sample can be read.
        IndexError: There is no sample at `index`.
    """
    if index >= length:  # by which ``for`` knows the end of a data set
        raise IndexError(index)
    for step in range(length):
        candidate = (index + step) % length
        try:
            return candidate, read(candidate)
        except InputError as error:
            warnings.warn(f"skipped {error}", stacklevel=3)
    raise InputError(f"{path(index)}: neither this picture nor any other of the data set can be read")


class PictureDataset(Dataset[tuple[Any, Any]]):
    """Pictures with their labels, or upright and with their paths where there are no labels.

    Args:
        paths: The files.
        targets: Class index of each file; None yields the path instead, and pictures turned as their EXIF
            orientation says (see :func:`read_picture`).
        transform: Maps the decoded uint8 image (3, H, W) to what the network gets.
        skip_bad: Replace a file that cannot be read by the next one that can, and warn (every process that
            loads does), instead of raising `InputError`.
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
        self.transform = transform
        self._skip_bad = skip_bad

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, index: int) -> str:
        """Path of the file at `index`."""
        return os.fsdecode(self._paths[index])

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        used, image = self.read(index)
        return self.transform(image), self.label(used)

    def label(self, index: int) -> Any:
        """Class index of the file at `index`, or its path where there are no targets."""
        return self.path(index) if self._targets is None else int(self._targets[index])

    def read(self, index: int, encoded: bool = False) -> tuple[int, Tensor]:
        """Picture at `index`, or with `skip_bad` the next one that can be read, and the index of the one it is.

        Args:
            index: Which one.
            encoded: Give a file's bytes where :func:`read_encoded` does.
        """
        if not self._skip_bad:
            return index, self._read(index, encoded)
        return read_or_next(lambda candidate: self._read(candidate, encoded), index, len(self), self.path)

    def _read(self, index: int, encoded: bool) -> Tensor:
        path = self.path(index)
        return read_encoded(path) if encoded else read_picture(path, upright=self._targets is None)
