"""Picture files on disk: finding them, reading them, and saying which one is broken."""

import dataclasses
import errno
import io
import math
import os
import re
import struct
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt
import PIL.ExifTags
import PIL.Image
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.io import ImageReadMode, decode_jpeg

from awconv.errors import InputError, printable
from awconv.files import open_regular

_T = TypeVar("_T")

# What Pillow decodes itself. Left out are EPS, for which it starts Ghostscript, whatever the file is called; IPTC, in
# which it decodes whatever it finds, EPS included; formats that need a handler (BUFR, GRIB, HDF5, WMF); and films (FLI,
# MPEG).
FORMATS = frozenset(
    "AVIF BLP BMP CUR DCX DDS DIB FITS FTEX GBR GIF ICNS ICO IM IMT JPEG "  # noqa: SIM905
    "JPEG2000 MCIDAS MSP PCD PCX PIXAR PNG PPM PSD QOI SGI SPIDER SUN TGA TIFF WEBP XBM XPM XVTHUMB".split()
)

EXTENSIONS = frozenset(
    ".apng .avif .avifs .blp .bmp .bw .cur .dcx .dds .dib .fit .fits .ftc .ftu .gbr .gif .icb .icns .ico "  # noqa: SIM905
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
    transparent = picture.has_transparency_data
    # of a PGM with 16 bits, Pillow makes 32
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PPM"):
        # PIL's own conversion clips at 255 instead of scaling
        eight_bits = PIL.Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    elif picture.mode in ("I", "F"):
        kind = "32-bit integers" if picture.mode == "I" else "32-bit floats"
        raise InputError(f"{name}: the samples of this picture are {kind}; save it with 8 or 16 bits")
    else:
        eight_bits = picture
        picture.load()  # by which the size of some formats changes
    width, height = eight_bits.size
    image = torch.empty(height, width, 3, dtype=torch.uint8)
    # in bands, since Pillow takes four bytes a pixel, and several times as many while it converts
    rows = max(1, _BAND // width)
    for top in range(0, height, rows):
        band = eight_bits.crop((0, top, width, min(top + rows, height)))
        # PIL warns about a palette with transparency that is not taken out by way of RGBA
        band = (band.convert("RGBA") if transparent else band).convert("RGB")
        image[top : top + rows] = torch.from_numpy(np.array(band))
    image = image.permute(2, 0, 1)
    # last, since a PNG may have its EXIF data behind the pixels, and a TIFF is turned as it is loaded
    return _upright(image, _orientation(picture))


_BAND = 2**22  # pixels


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
            more pixels than :func:`limit_pixels` lets pass.
    """
    with _naming(path), _open(path) as (file, picture):
        return _decoded(file, picture, path)


def read_encoded(path: str | Path) -> Tensor:
    """The bytes of an image file that any JPEG decoder can be given, and else the image.

    That is a complete one, upright, grey or of the usual colours (YCbCr), and of one size: what is to be made of the
    others, decoders disagree.

    Returns:
        uint8 tensor, (length,) of a file and (3, H, W) of an image; see :func:`read_picture`.

    Raises:
        InputError: As from :func:`read_picture`, of files that have to be decoded here.
    """
    with _naming(path), _open(path) as (file, picture):
        if _is_common_jpeg(picture) and _orientation(picture) == 1:
            encoded = _whole(file)
            if encoded[-2:].tobytes() == b"\xff\xd9" and _frame_headers(encoded) == 1:
                return torch.from_numpy(encoded)
        return _decoded(file, picture, path)


def _frame_headers(encoded: npt.NDArray[np.uint8]) -> int:
    """How often a JPEG says its size before its pixels."""
    found, place = 0, 2
    while place + 4 <= len(encoded) and encoded[place] == 0xFF and encoded[place + 1] != 0xDA:
        marker, high, low = encoded[place + 1 : place + 4].tolist()
        found += 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)  # tables, and what is reserved
        place += 2 + 256 * high + low
    return found


def limit_pixels(most: int) -> None:
    """Lets this process read images of so many pixels, and refuse larger ones by their head, before they are decoded.

    It is Pillow's own limit, and holds for all that read images in this process. Until this is called it is
    :data:`MAX_IMAGE_PIXELS`. Every data module that is set up calls it, there and in its workers; see
    :class:`awconv.data.BaseDataModule`.
    """
    if most / 2 != PIL.Image.MAX_IMAGE_PIXELS:  # of which Pillow refuses twice as many
        PIL.Image.MAX_IMAGE_PIXELS = most / 2  # type: ignore[assignment]
        warnings.filterwarnings("ignore", category=PIL.Image.DecompressionBombWarning)


def most_pixels() -> float:
    """How many pixels an image may have; see :func:`limit_pixels`."""
    limit = PIL.Image.MAX_IMAGE_PIXELS
    return math.inf if limit is None else int(2 * limit)


_TILE_SIZE = (PIL.ExifTags.Base.TileWidth, PIL.ExifTags.Base.TileLength)


@contextmanager
def _open(path: str | Path) -> Iterator[tuple[io.BufferedReader, PIL.Image.Image]]:
    """Open a file and the image in it, of which the head is read; absurd sizes are refused."""
    plain = open_regular(path)
    length = _length(plain)
    # to count costs more than to decode a small image
    frugal = _FrugalReader(plain.detach(), length) if length >= _SMALL else None
    with frugal or plain as file, PIL.Image.open(file, formats=_formats()) as picture:
        sizes = [picture.size]
        if hasattr(picture, "tag_v2"):  # the tiles of a TIFF may be larger than the image
            width, height = map(picture.tag_v2.get, _TILE_SIZE)
            sizes.append((width or 1, height or 1))
        for width, height in sizes:
            if width < 1 or height < 1:
                raise ValueError(f"its size is {width}x{height}")
            if width * height > most_pixels():
                raise PIL.Image.DecompressionBombError(width * height)
        pixels = picture.width * picture.height
        # A JPEG has at least a bit for 8x8 pixels, and decoders make up those that are not there.
        if picture.format in ("JPEG", "MPO") and length < pixels // 1024:
            raise ValueError("the file is far smaller than its image")
        # which Pillow makes in Python, one by one, out of next to nothing
        if pixels > 2**24 and any(tile[0] == "fits_gzip" for tile in picture.tile):
            raise ValueError("a compressed FITS image of so many pixels")
        if frugal is not None:
            frugal.opened(pixels)
        yield file, picture


_SMALL = 2**20  # bytes


def _length(file: io.BufferedReader) -> int:
    return os.fstat(file.fileno()).st_size


def _whole(file: io.BufferedReader) -> npt.NDArray[np.uint8]:
    """Reads all of a file."""
    file.seek(0)
    content = np.empty(_length(file), dtype=np.uint8)
    return content[: file.readinto(content.data)]


class _FrugalReader(io.BufferedReader):
    """Reads no more of a file than its image can be worth: behind a good head may come endless zeros.

    Formats differ in what they read to know the size of the image: some all of the file, others every chunk before the
    pixels, a byte at a time. That all counts.
    """

    def __init__(self, raw: io.RawIOBase, length: int) -> None:
        super().__init__(raw)
        self._length = length
        # a call costs time, even if it reads a single byte
        self._left, self._per_call = 2**28, 64

    def opened(self, pixels: int) -> None:
        """Notes the size of the image, whose samples have up to 8 bytes a pixel."""
        self._left, self._per_call = self._left + 8 * pixels, 0

    def read(self, size: int | None = -1, /) -> bytes:
        """Reads as any file does, unless it gets too much."""
        there = max(0, self._length - self.tell())
        return super().read(self._counted(there if size is None or size < 0 else min(size, there)))

    def readline(self, size: int | None = -1, /) -> bytes:
        """Reads as any file does, unless it gets too much."""
        line = super().readline(2**16 if size is None or size < 0 else size)
        self._counted(len(line))
        return line

    def readinto(self, buffer: Any, /) -> int:
        """Reads as any file does, unless it gets too much."""
        self._counted(len(memoryview(buffer)))
        return super().readinto(buffer)

    def _counted(self, size: int) -> int:
        self._left -= max(size, self._per_call)
        if self._left < 0:
            raise ValueError("the file is far larger than its image")
        return size


@cache
def _formats() -> list[str]:
    PIL.Image.init()
    # in Pillow's order, which tries the common ones first
    return [name for name in PIL.Image.ID if name in FORMATS]


def _is_common_jpeg(picture: PIL.Image.Image) -> bool:
    # where Adobe's marker says 0, the samples are RGB
    is_jpeg = picture.format in ("JPEG", "MPO")
    return is_jpeg and picture.mode in ("L", "RGB") and picture.info.get("adobe_transform") != 0


def _decoded(file: io.BufferedReader, picture: PIL.Image.Image, path: str | Path) -> Tensor:
    # torchvision decodes JPEG fastest. Its other decoders are left alone: a single wrong byte in a PNG can crash the
    # process.
    if _is_common_jpeg(picture):
        try:
            decoded = decode_jpeg(torch.from_numpy(_whole(file)), ImageReadMode.RGB)
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
        return _alone(error)
    return None


def _alone(error: InputError) -> InputError:
    """The error without the frames that it came through, which hold all that was read of the file."""
    return InputError(*error.args)


def _head_or_error(path: str) -> Head | InputError:
    try:
        with _naming(path), _open(path) as (file, picture):
            # of a TIFF, PIL gives the size of the upright image, and earlier versions did not
            width, height = map(picture.tag_v2.get, _TIFF_SIZE) if hasattr(picture, "tag_v2") else picture.size
            if picture.format == "PNG" and "exif" not in picture.info:
                # unbuffered, since of every chunk no more is wanted than its head
                picture.info["exif"] = _exif_of_png(file.raw)
            return Head(height, width, _orientation(picture))
    except InputError as error:
        return _alone(error)


def _exif_of_png(file: Any) -> bytes:
    """EXIF data of a PNG, wherever they are; some tools put them behind the pixels."""
    file.seek(8)
    while len(head := file.read(8)) == 8 and head[4:].isalpha():
        length, kind = struct.unpack(">I4s", head)
        if kind == b"eXIf":
            return b"Exif\x00\x00" + bytes(file.read(min(length, 2**20)))
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
    except PIL.Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        raise InputError(
            f"{path}: this picture has {pixels[0] if pixels else 'too many'} pixels, more than "
            f"max_image_pixels={most_pixels()} allows; replace or remove it, or if you trust it give a larger "
            "--data.max_image_pixels"
        ) from None
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
        empty.path, empty.reason = path, str(error).removeprefix(printable(f"{path}: "))
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
                return self._transformed(index, read_picture(path)), path
            except InputError as error:
                return self.transform(torch.zeros(3, 64, 64, dtype=torch.uint8)), Unreadable.of(path, error)
        used, image = self._or_next(
            lambda candidate: self._transformed(candidate, read_picture(self.path(candidate))), index
        )
        return image, self.label(used)

    def _transformed(self, index: int, image: Tensor) -> Any:
        try:
            return self.transform(image)
        except InputError as error:  # which does not know the file
            raise InputError(f"{self.path(index)}: {error}") from None

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
        return self._or_next(lambda candidate: read(self.path(candidate)), index)

    def _or_next(self, read: Callable[[int], _T], index: int) -> tuple[int, _T]:
        return read_or_next(read, index, len(self), self.path) if self._skip_bad else (index, read(index))
