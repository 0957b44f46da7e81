"""A sheet in inches to draw figures on: text in every script, bars, pictures in rows, PNG; without pyplot's state."""

from __future__ import annotations

import math
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager
from matplotlib.patches import Rectangle
from matplotlib.textpath import text_to_path
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from awconv.data.pictures import read_picture
from awconv.errors import InputError

DPI = 120
MARGIN = 0.2  # inches, as are all lengths on a sheet; font sizes and line widths are points
INK, FAINT, TRACK = "#1a1a1a", "#666666", "#ececec"

_BAR = "#5b76a2"
_NO_GLYPH = "Glyph .* missing from font"
# DejaVu Sans comes with matplotlib; the others are asked, glyph by glyph, for the scripts it lacks.
_FALLBACK_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Droid Sans Fallback",
    "Microsoft YaHei",
    "PingFang SC",
    "Hiragino Sans",
    "Malgun Gothic",
    "Arial Unicode MS",
    "Noto Sans",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "Noto Emoji",
)
_FONTS = ["DejaVu Sans", *(name for name in _FALLBACK_FONTS if name in fontManager.get_font_names())]


# --- the sheet and its text ---


def new_sheet(width: float, height: float, dpi: float = DPI) -> tuple[Figure, Axes]:
    """A figure of that size and axes over all of it, in inches from the top left corner."""
    figure = _Sheet(figsize=(width, height), dpi=dpi, facecolor="white")
    FigureCanvasAgg(figure)
    sheet = figure.add_axes((0, 0, 1, 1))
    sheet.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False)
    sheet.axis("off")
    return figure, sheet


class _Sheet(Figure):
    """A figure that notebooks show by itself: those of matplotlib only once pyplot has drawn something."""

    def _repr_png_(self) -> bytes:
        pixels = BytesIO()
        with one_warning_about_glyphs():
            self.savefig(pixels, format="png")
        return pixels.getvalue()


def put_text(sheet: Axes, x: float, y: float, text: str, size: float, colour: str = INK, **options: Any) -> None:
    """Writes one line, in which mathtext is not interpreted; ``options`` are matplotlib's."""
    sheet.text(
        x, y, drawable(text), fontsize=size, color=colour, family=_FONTS, parse_math=False, usetex=False, **options
    )


def drawable(text: str) -> str:
    """One line without the control characters and undecodable bytes that no font can draw."""
    return "".join(c if c.isprintable() else " " for c in text)


def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Width in inches of a text as drawn by :func:`put_text`."""
    font = FontProperties(family=_FONTS, size=size, weight=weight)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _NO_GLYPH)
        points = text_to_path.get_text_width_height_descent(drawable(text), font, ismath=False)[0]
    # Measured without hinting, which on screen may widen every letter by a part of a pixel.
    return 1.04 * points / 72


def shorten(text: str, inches: float, size: float, weight: str = "normal") -> str:
    """The text, or as much of its head and tail as fits, since names often differ at their ends."""
    text = drawable(text)
    width = text_width(text, size, weight)
    if width <= inches:
        return text
    for kept in range(min(len(text) - 1, int(len(text) * inches / width) + 4), 0, -1):
        tail = kept * 2 // 5
        shorter = f"{text[: kept - tail].rstrip()}…{text[len(text) - tail :].lstrip()}"
        if text_width(shorter, size, weight) <= inches:
            return shorter
    return "…"


def wrap(text: str, inches: float, size: float) -> list[str]:
    """The text in lines of about that width."""
    return textwrap.wrap(text, max(20, int(len(text) * inches / text_width(text, size)))) if text else []


def ink_on(colour: Sequence[float]) -> str:
    """Black or white, whichever has the larger contrast (relative luminance of WCAG 2) on a colour of RGB in [0, 1]."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "white" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else INK


def put_bar(sheet: Axes, x: float, y: float, width: float, height: float, share: float) -> None:
    """Draws a bar of which ``share``, in [0, 1], is filled."""
    sheet.add_patch(Rectangle((x, y), width, height, color=TRACK, linewidth=0))
    sheet.add_patch(Rectangle((x, y), width * share, height, color=_BAR, linewidth=0))


# --- pictures ---


def upright_picture(path: Path, side: int | None = None) -> Image.Image | None:
    """The image as the network gets it, at most ``side`` pixels long; None if it cannot be read."""
    try:
        picture: Image.Image = to_pil_image(read_picture(path))
    except InputError:
        return None
    if side:
        picture.thumbnail((side, side))
    return picture


def counted(number: int, what: str) -> str:
    """A number of things, such as ``1 box`` and ``2 pictures``; ``what`` is one whose plural ends in s."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def evenly_spaced(total: int, most: int) -> list[int]:
    """Indices below ``total``: all, or ``most`` of them with the first, the last, and equal steps between."""
    return [round(place) for place in np.linspace(0, total - 1, min(total, most)).tolist()]


def spread_rank(number: int) -> int:
    """Where a number stands in the choice of a few out of many, whatever comes before it.

    Multiples of the golden ratio spread evenly, so the lowest ranks of 1..N lie evenly between 1 and N.
    """
    return number * 0x9E3779B97F4A7C15 % 2**64


class Tile(NamedTuple):
    """Where a picture stands on a sheet."""

    x: float
    y: float
    width: float
    height: float

    @property
    def floor(self) -> float:
        """The lower edge."""
        return self.y + self.height


class Tiles:
    """Places for pictures in rows below a title, with room for a caption beneath each.

    Args:
        count: number of pictures.
        page: width that the rows aim at.
        smallest: least side of a tile.
        largest: greatest side of a tile.
        caption: height of the room beneath each picture.
    """

    _TITLE, _GAP = 0.42, 0.25

    def __init__(self, count: int, *, page: float, smallest: float, largest: float, caption: float) -> None:
        root = math.sqrt(count)
        # Of the shapes between square and twice as wide, the one whose last row is fullest.
        self._columns = min(range(math.ceil(root), math.ceil(1.4 * root) + 1), key=lambda n: -count % n)
        self._caption = caption
        self.side = min(max(page / self._columns, smallest), largest)
        self.pixels = round(self.side * DPI)
        self.width = self._columns * (self.side + self._GAP) - self._GAP + 2 * MARGIN

    def place(self, sizes: Sequence[tuple[int, int]], heading: float = _TITLE) -> tuple[list[Tile], float]:
        """Where pictures of these widths and heights, in any unit, stand, and how high the sheet is.

        Args:
            sizes: width and height of each picture; the aspect is kept.
            heading: height of what stands above the first row.
        """
        extents = [
            (width * self.side / max(width, height), height * self.side / max(width, height)) for width, height in sizes
        ]
        y = MARGIN + heading
        tiles = []
        for start in range(0, len(extents), self._columns):
            row = extents[start : start + self._columns]
            floor = y + max(height for _, height in row)
            tiles += [
                Tile(MARGIN + column * (self.side + self._GAP), floor - height, width, height)
                for column, (width, height) in enumerate(row)
            ]
            y = floor + self._caption + self._GAP
        return tiles, y - self._GAP + MARGIN


def put_picture(sheet: Axes, tile: Tile, picture: Image.Image | None) -> None:
    """Draws a picture with a fine frame; a grey tile that says so where there is none."""
    x, y, width, height = tile
    if picture is None:
        sheet.add_patch(Rectangle((x, y), width, height, color=TRACK))
        put_text(sheet, x + width / 2, y + height / 2, "cannot be read", 9, FAINT, ha="center", va="center")
        return
    sheet.imshow(np.asarray(picture), extent=(x, x + width, y + height, y), aspect="auto")
    sheet.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=TRACK, linewidth=0.6))


# --- PNG ---


def save_png(path: Path, figure: Figure) -> None:
    """Writes a figure as PNG, with one warning if the fonts lack characters of its names."""
    with one_warning_about_glyphs():
        figure.savefig(path, format="png", dpi=DPI)


@contextmanager
def one_warning_about_glyphs() -> Iterator[None]:
    """Makes one warning of all those that say which characters the fonts lack."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        if not re.search(_NO_GLYPH, str(warning.message)):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if any(re.search(_NO_GLYPH, str(warning.message)) for warning in caught):
        warnings.warn(
            "the installed fonts lack some characters of the names, which are drawn as boxes (the CSV or JSON file "
            "has them right); installing a font such as Noto Sans CJK mends the picture",
            stacklevel=2,
        )
