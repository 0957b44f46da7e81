"""Figures of a classifier's results, drawn without pyplot's global state: for callbacks, loggers and notebooks."""

from __future__ import annotations

import math
import os
import re
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager
from matplotlib.patches import Rectangle
from matplotlib.textpath import text_to_path
from PIL import Image, ImageOps

from awconv.errors import InputError

COUNTS_UP_TO = 20  # classes: counts are written into the cells
NAMES_UP_TO = 100  # classes: every row and column carries its class's name

_DPI = 120
_NO_GLYPH = "Glyph .* missing from font"
_MARGIN, _LINE, _KEY_WIDTH = 0.2, 0.2, 2.4  # inches, as every length below that is no font size
_INK, _FAINT, _ZERO, _TRACK, _BAR = "#1a1a1a", "#666666", "#9a9a9a", "#ececec", "#5b76a2"
# Nine points of a straight line in Oklab from white to dark blue: equal steps look equally large.
_COLOURS = LinearSegmentedColormap.from_list(
    "share",
    ["#ffffff", "#dce2ed", "#bbc6da", "#9aabc7", "#7a90b5", "#5b76a2", "#3e5c8f", "#20427c", "#022869"],
)
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


def draw_confusion_matrix(matrix: npt.ArrayLike, class_names: Sequence[str]) -> Figure:
    """Draws a confusion matrix, its colours normalised by row, with the accuracy of every class beside it.

    Up to 20 classes every cell shows its count. Up to 100 classes every row and column shows its name and
    every row its accuracy. Above 20 classes the most confused pairs are listed at the side, and above 100
    the classes of lowest accuracy too. Colours grow with a root of the share, so that a confusion of
    one in a hundred can be seen.

    Args:
        matrix: counts (K, K); rows are true classes, columns predicted ones.
        class_names: K names, in the matrix's order. Mathtext in them is not interpreted.

    Returns:
        A figure of its own size, bound to no pyplot state.

    Raises:
        InputError: if ``matrix`` is not square, holds negative counts, or has not K names.
    """
    if isinstance(matrix, torch.Tensor):
        matrix = matrix.detach().cpu()
    counts = np.asarray(matrix)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not counts.size or counts.min() < 0:
        raise InputError(f"matrix of shape {counts.shape}: expected square (K, K) counts, none below zero")
    classes = len(counts)
    if len(class_names) != classes:
        raise InputError(f"class_names has {len(class_names)} names: expected {classes}, one for each row of matrix")
    images, correct = counts.sum(axis=1), counts.diagonal()
    total = int(images.sum())
    shares = counts / np.maximum(images, 1)[:, None]
    accuracies = shares.diagonal()
    written, named = classes <= COUNTS_UP_TO, classes <= NAMES_UP_TO

    size = 10.0 if written else 7.5
    if written:
        cell = min(max(_width(str(counts.max()), size) + 0.16, 3.6 / classes, 0.38), 1.0)
    elif named:
        cell = max(0.14, 7.0 / classes)
    else:
        # A whole number of pixels, lest some classes look wider than others.
        cell = min(math.ceil(1200 / classes) / _DPI, 24 / classes)
    side = classes * cell
    step = 10 if named else 20 if classes <= 250 else 50 if classes <= 500 else 100 * math.ceil(classes / 1500)
    if named:
        marks = {k: _shorten(name, 2.4, size) for k, name in enumerate(class_names)}
    else:
        size = 9.0
        marks = {k: str(k) for k in range(0, classes, step)}
    longest = max(_width(mark, size) for mark in marks.values())
    flat = not named or (written and longest < cell - 0.08)
    angle = 0 if flat else 45 if written else 90
    depth = 0.2 if flat else longest * math.sin(math.radians(angle)) + (0.15 if written else 0.05)

    title = f"Top-1 {correct.sum() / total:.2%} on {total:,} test images" if total else "No test images"
    note = ""
    if written:
        note = "Number: images. Colour: share of the row's images."
    elif not named:
        note = "Classes are numbered from 0, in the order of the model's class names."

    left = _MARGIN + 0.3 + longest + 0.08
    scores = [f"{accuracy:.1%} of {n}" if n else "no images" for accuracy, n in zip(accuracies, images, strict=True)]
    bars = left + side + 0.15
    right = bars + 1.05 + max(_width(score, size) for score in scores) if named else left + side
    listings = []
    if not written:
        pairs = _confused_pairs(counts, min(30, int((side - 1.0) / _LINE)) if named else 25)
        listings.append(
            _Listing(
                "Most confused (true → predicted)",
                [f"{counts[i, j]} of {images[i]}" for i, j in pairs],
                [_pair(class_names[i], class_names[j]) for i, j in pairs],
            )
        )
    if not named:
        worst = sorted((k for k in range(classes) if images[k]), key=lambda k: (accuracies[k], k))[:15]
        listings.append(
            _Listing("Lowest accuracy", [scores[k] for k in worst], [_shorten(class_names[k], 4.0, 9) for k in worst])
        )
    beside = right + 0.4
    if listings:
        right = beside + max(_KEY_WIDTH + 0.15, *(listing.width for listing in listings))
    width = max(right + _MARGIN, _width(title, 14, "bold") + 2 * _MARGIN + 0.1)
    note_lines = _wrap(note, width - 2 * _MARGIN, 9)
    top = _MARGIN + 0.3 + 0.19 * len(note_lines) + (0.35 if named else 0.2)
    # Whole pixels here too.
    left, top = round(left * _DPI) / _DPI, round(top * _DPI) / _DPI
    height = top + side + 0.08 + depth + 0.25 + _MARGIN
    figure, sheet = _sheet(width, height)

    _put(sheet, _MARGIN, _MARGIN, title, 14, va="top", weight="bold")
    for line, text in enumerate(note_lines):
        _put(sheet, _MARGIN, _MARGIN + 0.32 + 0.19 * line, text, 9, _FAINT, va="top")

    norm = PowerNorm(1 / 2 if named else 1 / 3, 0, 1)
    sheet.imshow(
        shares,
        cmap=_COLOURS,
        norm=norm,
        extent=(left, left + side, top + side, top),
        aspect="auto",
        interpolation="nearest" if cell * _DPI >= 1 else "antialiased",
    )
    if not written:
        guides = np.arange(step, classes, step)
        sheet.hlines(top + guides * cell, left, left + side, color=_TRACK, linewidth=0.6)
        sheet.vlines(left + guides * cell, top, top + side, color=_TRACK, linewidth=0.6)
    sheet.add_patch(Rectangle((left, top), side, side, fill=False, edgecolor=_FAINT, linewidth=0.6))
    for k, mark in marks.items():
        middle = (k + 0.5) * cell
        _put(sheet, left - 0.08, top + middle, mark, size, ha="right", va="center_baseline")
        if flat:
            _put(sheet, left + middle, top + side + 0.08, mark, size, ha="center", va="top")
        else:
            _put(
                sheet,
                left + middle + (0.06 if written else 0),
                top + side + 0.08,
                mark,
                size,
                ha="right",
                va="top" if written else "center",
                rotation=angle,
                rotation_mode="anchor",
            )
        if not named:
            for xs, ys in (((-0.05, 0), (middle, middle)), ((middle, middle), (side, side + 0.05))):
                sheet.plot([left + x for x in xs], [top + y for y in ys], color=_FAINT, linewidth=0.6)
    axis_size = max(size, 9)
    _put(sheet, _MARGIN + 0.1, top + side / 2, "true class", axis_size, _FAINT, ha="center", va="center", rotation=90)
    _put(sheet, left + side / 2, height - _MARGIN, "predicted class", axis_size, _FAINT, ha="center", va="bottom")

    if written:
        for i, j in np.ndindex(counts.shape):
            ink = _ZERO if not counts[i, j] else _ink_on(_COLOURS(norm(shares[i, j])))
            _put(
                sheet,
                left + (j + 0.5) * cell,
                top + (i + 0.5) * cell,
                str(counts[i, j]),
                size,
                ink,
                ha="center",
                va="center_baseline",
            )
    if named:
        _put(sheet, bars, top - 0.06, "accuracy", axis_size, _FAINT, va="bottom")
        for k, (accuracy, score) in enumerate(zip(accuracies, scores, strict=True)):
            y = top + (k + 0.5) * cell
            thickness = min(0.5 * cell, 0.2)
            _bar(sheet, bars, y - thickness / 2, 0.95, thickness, float(accuracy))
            _put(sheet, bars + 1.03, y, score, size, va="center_baseline")
    if not written:
        _colour_key(sheet, beside, top, norm)
        y = top + 0.8
        for listing in listings:
            y = listing.draw(sheet, beside, y) + 0.25
    return figure


def draw_contact_sheet(
    paths: Sequence[str | os.PathLike[str]],
    class_names: Sequence[str],
    probabilities: Sequence[float],
    *,
    max_pictures: int = 36,
) -> Figure:
    """Draws pictures as thumbnails, each with its predicted class, probability and file name beneath.

    Pictures keep their aspect and are turned as their EXIF orientation says. A file that cannot be read
    leaves a grey tile that says so. Of more than ``max_pictures``, so many evenly spaced ones are drawn.

    Args:
        paths: N picture files.
        class_names: N names, the predicted class of each picture.
        probabilities: N probabilities of those classes, in [0, 1].
        max_pictures: the most pictures to draw.

    Returns:
        A figure of its own size, bound to no pyplot state.

    Raises:
        InputError: if there are no pictures, or the three sequences differ in length.
    """
    total = len(paths)
    if not total or not total == len(class_names) == len(probabilities):
        raise InputError(
            f"paths, class_names and probabilities have lengths {total}, {len(class_names)} and "
            f"{len(probabilities)}: expected the same length, at least 1"
        )
    if max_pictures < 1:
        raise InputError(f"max_pictures={max_pictures}: expected at least 1")
    chosen = np.linspace(0, total - 1, min(total, max_pictures)).round().astype(int).tolist()
    shown = len(chosen)
    root = math.sqrt(shown)
    # Of the shapes between square and twice as wide, the one whose last row is fullest.
    columns = min(range(math.ceil(root), math.ceil(1.4 * root) + 1), key=lambda n: -shown % n)
    tile = min(max(10 / columns, 1.6), 3.0)
    gap, caption = 0.25, 0.52

    thumbnails = [_thumbnail(Path(paths[k]), round(2 * tile * _DPI)) for k in chosen]
    sizes = [picture.size if picture else (3, 2) for picture in thumbnails]
    extents = [(width * tile / max(width, height), height * tile / max(width, height)) for width, height in sizes]
    rows = [range(start, min(start + columns, shown)) for start in range(0, shown, columns)]
    row_heights = [max(extents[k][1] for k in row) for row in rows]

    title = f"{total} prediction{'s' if total > 1 else ''}"
    if shown < total:
        title = f"{shown} of {total} predictions, evenly spaced"
    width = max(columns * (tile + gap) - gap, _width(title, 14, "bold") + 0.1) + 2 * _MARGIN
    height = _MARGIN + 0.42 + sum(row_heights) + len(rows) * (caption + gap) - gap + _MARGIN
    figure, sheet = _sheet(width, height)
    _put(sheet, _MARGIN, _MARGIN, title, 14, va="top", weight="bold")
    y: float = _MARGIN + 0.42
    for row, row_height in zip(rows, row_heights, strict=True):
        floor = y + row_height
        for column, k in enumerate(row):
            x = _MARGIN + column * (tile + gap)
            w, h = extents[k]
            picture, index = thumbnails[k], chosen[k]
            if picture:
                sheet.imshow(np.asarray(picture), extent=(x, x + w, floor, floor - h), aspect="auto")
                sheet.add_patch(Rectangle((x, floor - h), w, h, fill=False, edgecolor=_TRACK, linewidth=0.6))
            else:
                sheet.add_patch(Rectangle((x, floor - h), w, h, color=_TRACK))
                _put(sheet, x + w / 2, floor - h / 2, "cannot be read", 9, _FAINT, ha="center", va="center")
            probability = float(probabilities[index])
            percent = f"{probability:.1%}"
            _bar(sheet, x, floor + 0.06, tile, 0.045, probability)
            _put(sheet, x + tile, floor + 0.29, percent, 9, ha="right", va="baseline")
            name = _shorten(class_names[index], tile - _width(percent, 9) - 0.1, 9, "bold")
            _put(sheet, x, floor + 0.29, name, 9, weight="bold", va="baseline")
            _put(sheet, x, floor + 0.46, _shorten(Path(paths[index]).name, tile, 7.5), 7.5, _FAINT, va="baseline")
        y = floor + caption + gap
    return figure


def save_png(path: Path, figure: Figure) -> None:
    """Writes a figure as PNG, with one warning if the fonts lack characters of its names."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(path, format="png", dpi=_DPI)
    for warning in caught:
        if not re.search(_NO_GLYPH, str(warning.message)):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if any(re.search(_NO_GLYPH, str(warning.message)) for warning in caught):
        warnings.warn(
            "the installed fonts lack some characters of the names, which are drawn as boxes (the CSV file has "
            "them right); installing a font such as Noto Sans CJK mends the picture",
            stacklevel=2,
        )


def _confused_pairs(counts: npt.NDArray[Any], limit: int) -> list[tuple[int, int]]:
    """The (true, predicted) pairs off the diagonal with the most images, most first."""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:limit]
    return [(i, j) for i, j in (divmod(int(k), len(counts)) for k in order) if wrong[i, j]]


def _thumbnail(path: Path, side: int) -> Image.Image | None:
    """The picture in RGB, upright, at most ``side`` pixels long; None if it cannot be read."""
    try:
        with Image.open(path) as file:
            # Lets the JPEG decoder skip most of a large photograph.
            file.draft("RGB", (side, side))
            picture = ImageOps.exif_transpose(file)
            if picture.mode.startswith(("I", "F")):
                values = np.asarray(picture, dtype=np.float64)
                span = max(float(np.ptp(values)), 1e-12)
                picture = Image.fromarray(((values - values.min()) / span * 255).astype(np.uint8))
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            picture = picture.convert("RGB")
            picture.thumbnail((side, side))
            return picture
    except Exception:  # Pillow's decoders raise nearly anything, and a broken picture must not cost the others
        return None


def _sheet(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of that size and axes over all of it, in inches from the top left corner."""
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    sheet = figure.add_axes((0, 0, 1, 1))
    sheet.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False)
    sheet.axis("off")
    return figure, sheet


def _put(sheet: Axes, x: float, y: float, text: str, size: float, colour: str = _INK, **options: Any) -> None:
    sheet.text(
        x, y, _printable(text), fontsize=size, color=colour, family=_FONTS, parse_math=False, usetex=False, **options
    )


def _bar(sheet: Axes, x: float, y: float, width: float, height: float, share: float) -> None:
    sheet.add_patch(Rectangle((x, y), width, height, color=_TRACK, linewidth=0))
    sheet.add_patch(Rectangle((x, y), width * share, height, color=_BAR, linewidth=0))


def _colour_key(sheet: Axes, x: float, y: float, norm: Normalize) -> None:
    _put(sheet, x, y, "share of the row's images", 9, _FAINT, va="top")
    ramp, bounds = np.linspace(0, 1, 256)[None], (x, x + _KEY_WIDTH, y + 0.36, y + 0.2)
    sheet.imshow(ramp, cmap=_COLOURS, vmin=0, vmax=1, extent=bounds, aspect="auto")
    sheet.add_patch(Rectangle((x, y + 0.2), _KEY_WIDTH, 0.16, fill=False, edgecolor=_FAINT, linewidth=0.6))
    for share in (0, 0.05, 0.25, 0.5, 1):
        place = x + _KEY_WIDTH * float(norm(share))
        _put(sheet, place, y + 0.4, f"{share:.0%}", 8, _FAINT, ha="center", va="top")


class _Listing(NamedTuple):
    """Lines of figures and names to stand beside a heat map; ``width`` is where the names end, in inches."""

    title: str
    figures: list[str]
    names: list[str]

    @property
    def indent(self) -> float:
        return max((_width(text, 9) for text in self.figures), default=0) + 0.15

    @property
    def width(self) -> float:
        longest = max((_width(text, 9) for text in self.names), default=0)
        return max(self.indent + longest, _width(self.title, 9.5, "bold"))

    def draw(self, sheet: Axes, x: float, y: float) -> float:
        """Draws the listing from its title's baseline y on; returns the y below it."""
        _put(sheet, x, y, self.title, 9.5, weight="bold", va="baseline")
        indent = self.indent
        for figures, name in zip(self.figures, self.names, strict=True):
            y += _LINE
            _put(sheet, x + indent - 0.15, y, figures, 9, _FAINT, ha="right", va="baseline")
            _put(sheet, x + indent, y, name, 9, va="baseline")
        return y + _LINE


def _pair(true: str, predicted: str) -> str:
    """Both names, shortened to at most 4 inches together, either having the room that the other leaves."""
    room, half = 4.0, 2.0
    true = _shorten(true, max(half, room - _width(predicted, 9)), 9)
    return f"{true} → {_shorten(predicted, room - _width(true, 9), 9)}"


def _ink_on(colour: tuple[float, float, float, float]) -> str:
    """Black or white, whichever has the larger contrast (relative luminance of WCAG 2) on the colour."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "white" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else _INK


def _printable(text: str) -> str:
    """One line without the control characters and undecodable bytes that no font can draw."""
    return "".join(c if c.isprintable() else " " for c in text)


def _width(text: str, size: float, weight: str = "normal") -> float:
    """Width in inches of a text as drawn by _put."""
    font = FontProperties(family=_FONTS, size=size, weight=weight)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _NO_GLYPH)
        points = text_to_path.get_text_width_height_descent(_printable(text), font, ismath=False)[0]
    # Measured without hinting, which on screen may widen every letter by a part of a pixel.
    return 1.04 * points / 72


def _shorten(text: str, inches: float, size: float, weight: str = "normal") -> str:
    """The text, or as much of its head and tail as fits, since names often differ at their ends."""
    text = _printable(text)
    width = _width(text, size, weight)
    if width <= inches:
        return text
    for kept in range(min(len(text) - 1, int(len(text) * inches / width) + 4), 0, -1):
        tail = kept * 2 // 5
        shorter = f"{text[: kept - tail].rstrip()}…{text[len(text) - tail :].lstrip()}"
        if _width(shorter, size, weight) <= inches:
            return shorter
    return "…"


def _wrap(text: str, inches: float, size: float) -> list[str]:
    return textwrap.wrap(text, max(20, int(len(text) * inches / _width(text, size)))) if text else []
