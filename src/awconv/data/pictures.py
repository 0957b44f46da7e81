"""Picture files on disk: finding them, reading them, and saying which one is broken."""

import dataclasses
import errno
import io
import os
import struct
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt
import PIL.ExifTags
import PIL.Image
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as F

from awconv.errors import InputError

_T = TypeVar("_T")

# What Pillow decodes itself. Left out are EPS, for which it starts Ghostscript, whatever the file is called; formats
# that need a handler (BUFR, GRIB, HDF5, WMF); and films (FLI, MPEG).
FORMATS = frozenset(
    "AVIF BLP BMP CUR DCX DDS DIB FITS FTEX GBR GIF ICNS ICO IM IMT IPTC JPEG "  # noqa: SIM905
    "JPEG2000 MCIDAS MSP PCD PCX PIXAR PNG PPM PSD QOI SGI SPIDER SUN TGA TIFF WEBP XBM XPM XVTHUMB".split()
)

EXTENSIONS = frozenset(
    ".apng .avif .avifs .blp .bmp .bw .cur .dcx .dds .dib .fit .fits .ftc .ftu .gbr .gif .icb .icns .ico .iim "  # noqa: SIM905
    ".im .j2c .j2k .jfif .jp2 .jpc .jpe .jpeg .jpf .jpg .jpx .mpo .msp .pbm .pcd .pcx .pfm .pgm .png .pnm .ppm .psd "
    ".pxr .qoi .ras .rgb .rgba .sgi .tga .tif .tiff .vda .vst .webp .xbm .xpm".split()
)
"""Extensions of the still images that Pillow reads."""

EXTENSIONS_SHOWN = ".jpg, .png, .webp, .tif and the other still images that Pillow reads"

# what systems and file servers leave behind without a leading dot
_SYSTEM_NAMES = frozenset(
    ("__macosx", "@eadir", "#recycle", "#snapshot", "$recycle.bin", "lost+found", "system volume information")
) | {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's own: its name has a leading dot, or is one that systems give."""
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def has_image_extension(name: str) -> bool:
    """Whether a file name has one of the :data:`EXTENSIONS`, in any case."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


@dataclasses.dataclass
class PassedOver:
    """Counts what a search for images passes over.

    Attributes:
        hidden: Number of hidden files and folders, by name.
        others: Number of files that are no images, by extension.
    """

    hidden: Counter[str] = dataclasses.field(default_factory=Counter)
    others: Counter[str] = dataclasses.field(default_factory=Counter)

    def count(self, name: str) -> None:
        """Count a file or a folder."""
        if is_hidden(name):
            self.hidden["._*" if name.startswith("._") else name] += 1
        else:
            self.others[os.path.splitext(name)[1].lower() or "without extension"] += 1

    def __str__(self) -> str:
        """A line such as "3 files that are no images (.txt, .xml) and 1 hidden name (.DS_Store)"; "" for nothing."""
        parts = [
            f"{counts.total()} {one if counts.total() == 1 else many} "
            f"({', '.join(sorted(counts)[:3])}{', ...' if len(counts) > 3 else ''})"
            for counts, one, many in (
                (self.others, "file that is no image", "files that are no images"),
                (self.hidden, "hidden name", "hidden names"),
            )
            if counts
        ]
        return " and ".join(parts)


def composed(name: str) -> str:
    """The name in the spelling that compares: macOS and some archives take letters and their accents apart."""
    return unicodedata.normalize("NFC", name)


def shown(names: Sequence[str], most: int = 3) -> list[str]:
    """The first names, and how many there are."""
    return list(names) if len(names) <= most else [*names[:most], f"... ({len(names)} in all)"]


def find_pictures(folder: str | Path, passed_over: PassedOver | None = None) -> list[str]:
    """Paths of the image files in a folder and the folders below it, sorted.

    An image is known by its extension (:data:`EXTENSIONS`, in any case). Hidden files and folders are passed over: they
    hold thumbnails, checkpoints of notebooks and shadows of images. Links to folders are followed, but no folder is
    searched twice.

    Args:
        folder: Where to search; it may be hidden itself.
        passed_over: Counts what is passed over.

    Raises:
        InputError: A folder cannot be read.
    """
    passed_over = PassedOver() if passed_over is None else passed_over
    seen: set[str] = set()
    pictures: list[str] = []
    for parent, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        # A link to a folder above leads back here without end, or until the path is too long.
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in filter(is_hidden, folders):
            passed_over.count(name)
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for name in names:
            if has_image_extension(name) and not is_hidden(name):
                pictures.append(os.path.join(parent, name))
            else:
                passed_over.count(name)
    return sorted(pictures)


def _refuse(error: OSError) -> NoReturn:
    raise InputError(
        f"{error.filename}: this folder cannot be read ({error.strerror}); change its permissions, or move it away"
    ) from error


def to_tensor(picture: PIL.Image.Image, name: str | Path) -> Tensor:
    """Turn a PIL image into an upright uint8 tensor (3, H, W), as :func:`read_picture` does with a file.

    Raises:
        InputError: The samples are 32-bit integers or floats, whose black and white nobody knows.
    """
    # of a PGM with 16 bits, Pillow makes 32
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PPM"):
        # PIL's own conversion clips at 255 instead of scaling
        eight_bits = PIL.Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    elif picture.mode in ("I", "F"):
        kind = "32-bit integers" if picture.mode == "I" else "32-bit floats"
        raise InputError(f"{name}: the samples of this picture are {kind}; save it with 8 or 16 bits")
    else:
        # PIL warns about a palette with transparency that is not taken out by way of RGBA
        eight_bits = picture.convert("RGBA") if picture.has_transparency_data else picture
    image: Tensor = F.pil_to_tensor(eight_bits.convert("RGB"))
    # last, since a PNG may have its EXIF data behind the pixels, and a TIFF is turned as it is loaded
    return _upright(image, _orientation(picture))


def _upright(image: Tensor, orientation: int) -> Tensor:
    """Turn an image (C, H, W) as its EXIF orientation says."""
    if orientation >= 5:
        image = image.transpose(1, 2)
    axes = [axis for axis, flipped in ((1, (3, 4, 7, 8)), (2, (2, 3, 6, 7))) if orientation in flipped]
    return image.flip(axes) if axes else image


def read_picture(path: str | Path) -> Tensor:
    """Decode an image file (of an animation, the first frame) as RGB, upright as its EXIF orientation says.

    Every file is read this way, for training, evaluation, prediction and figures. Grey images get three equal channels,
    transparency is dropped, and of 16 bits the upper 8 are kept.

    Returns:
        uint8 tensor (3, H, W).

    Raises:
        InputError: The file is missing, truncated, not an image, one of 32 bits per sample, or one whose head tells of
            more pixels than ``PIL.Image.MAX_IMAGE_PIXELS`` lets pass.
    """
    with _naming(path):
        return _decoded(np.fromfile(path, dtype=np.uint8), path)


def read_encoded(path: str | Path) -> Tensor:
    """The bytes of an image file that any JPEG decoder can be given, and else the image.

    That is a complete one, upright, grey or of the usual colours (YCbCr): what is to be made of the others, decoders
    disagree.

    Returns:
        uint8 tensor, (length,) of a file and (3, H, W) of an image; see :func:`read_picture`.

    Raises:
        InputError: As from :func:`read_picture`, of files that have to be decoded here.
    """
    with _naming(path):
        encoded = np.fromfile(path, dtype=np.uint8)
        if encoded[-2:].tobytes() == b"\xff\xd9":
            with _open(io.BytesIO(encoded.tobytes())) as picture:
                if _is_common_jpeg(picture) and _orientation(picture) == 1:
                    return torch.from_numpy(encoded)
        return _decoded(encoded, path)


def _open(file: BinaryIO) -> PIL.Image.Image:
    """Read the head of an image; absurd sizes are refused."""
    return PIL.Image.open(file, formats=_formats())


@cache
def _formats() -> list[str]:
    PIL.Image.init()
    # in Pillow's order, which tries the common ones first
    return [name for name in PIL.Image.ID if name in FORMATS]


def _is_common_jpeg(picture: PIL.Image.Image) -> bool:
    # where Adobe's marker says 0, the samples are RGB
    is_jpeg = picture.format in ("JPEG", "MPO")
    return is_jpeg and picture.mode in ("L", "RGB") and picture.info.get("adobe_transform") != 0


def _decoded(encoded: npt.NDArray[np.uint8], path: str | Path) -> Tensor:
    with _open(io.BytesIO(encoded.tobytes())) as picture:
        # torchvision decodes JPEG fastest. Its other decoders are left alone: a single wrong byte in a PNG
        # can crash the process.
        if _is_common_jpeg(picture):
            try:
                decoded = decode_jpeg(torch.from_numpy(encoded), ImageReadMode.RGB)
                return _upright(decoded, _orientation(picture))
            except RuntimeError:
                pass
        return to_tensor(picture, path)


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
_THREADS = 8
_TIFF_SIZE = (PIL.ExifTags.Base.ImageWidth, PIL.ExifTags.Base.ImageLength)


def read_heads(paths: Sequence[str]) -> list[Head | InputError]:
    """Read the heads of image files, some thousands a second; the pixels are not decoded.

    Returns:
        For each path its head, or the `InputError` that says why there is none.
    """
    return _in_threads(_head_or_error, paths)


def unreadable(paths: Sequence[str]) -> list[InputError]:
    """Decode image files, several at a time.

    Returns:
        The `InputError` of each file that cannot be read.
    """
    return [error for error in _in_threads(_error_of_reading, paths) if error is not None]


def _in_threads(function: Callable[[str], _T], paths: Sequence[str]) -> list[_T]:
    _formats()  # a thread that meets the first file must not find Pillow's plugins half loaded
    shares = [paths[k::_THREADS] for k in range(_THREADS)]
    results: list[Any] = [None] * len(paths)
    with ThreadPoolExecutor(_THREADS) as pool:
        for k, share in enumerate(pool.map(lambda share: [function(path) for path in share], shares)):
            results[k::_THREADS] = share
    return results


def _error_of_reading(path: str) -> InputError | None:
    try:
        read_picture(path)
    except InputError as error:
        return error
    return None


def _head_or_error(path: str) -> Head | InputError:
    try:
        with _naming(path), open(path, "rb") as file, _open(file) as picture:
            # of a TIFF, PIL gives the size of the upright image, and earlier versions did not
            width, height = map(picture.tag_v2.get, _TIFF_SIZE) if hasattr(picture, "tag_v2") else picture.size
            if picture.format == "PNG" and "exif" not in picture.info:
                # unbuffered, since of every chunk no more is wanted than its head
                picture.info["exif"] = _exif_of_png(file.raw)
            return Head(height, width, _orientation(picture))
    except InputError as error:
        return error


def _exif_of_png(file: Any) -> bytes:
    """EXIF data of a PNG, wherever they are; some tools put them behind the pixels."""
    file.seek(8)
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"eXIf":
            return b"Exif\x00\x00" + bytes(file.read(length))
        file.seek(length + 4, os.SEEK_CUR)
    return b""


def _orientation(picture: PIL.Image.Image) -> int:
    try:
        if hasattr(picture, "tag_v2"):  # a TIFF
            exif = PIL.Image.Image.getexif(picture)
        else:
            # viewers heed EXIF alone, where PIL would also look into XMP and ImageMagick's texts
            exif = PIL.Image.Exif()
            exif.load(picture.info.get("exif", b""))
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
        if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):  # which is not the picture's fault
            raise
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


class Unreadable(str):
    """The empty path of a padding sample, which stands for an image that cannot be read.

    Attributes:
        path: The file.
        reason: Why it cannot be read.
    """

    path: str
    reason: str

    @classmethod
    def of(cls, path: str, error: InputError) -> "Unreadable":
        """Makes it of the error that names the file."""
        empty = cls()
        empty.path, empty.reason = path, str(error).removeprefix(f"{path}: ")
        return empty


class PictureDataset(Dataset[tuple[Any, Any]]):
    """Images with their labels, or with their paths where there are no labels.

    Args:
        paths: The files.
        targets: Class index of each file; None yields the path instead.
        transform: Maps the decoded uint8 image (3, H, W) to what the network gets.
        skip_bad: Let a file that cannot be read yield something else, instead of raising `InputError`: with labels, the
            next one that can be read, and a warning from every process that loads; without, a black image whose path is
            :class:`Unreadable`, and so empty, as that of padding.
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
        if self._targets is None and self._skip_bad:
            path = self.path(index)
            try:
                return self.transform(read_picture(path)), path
            except InputError as error:
                return self.transform(torch.zeros(3, 64, 64, dtype=torch.uint8)), Unreadable.of(path, error)
        used, image = self.read(index)
        return self.transform(image), self.label(used)

    def label(self, index: int) -> Any:
        """Class index of the file at `index`, or its path where there are no targets."""
        return self.path(index) if self._targets is None else int(self._targets[index])

    def read(self, index: int, encoded: bool = False) -> tuple[int, Tensor]:
        """Image at `index`, or with `skip_bad` the next one that can be read, and the index of the one it is.

        Args:
            index: Which one.
            encoded: Give a file's bytes where :func:`read_encoded` does.
        """
        read = read_encoded if encoded else read_picture
        if not self._skip_bad:
            return index, read(self.path(index))
        return read_or_next(lambda candidate: read(self.path(candidate)), index, len(self), self.path)
