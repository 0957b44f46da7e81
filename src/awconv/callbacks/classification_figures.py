"""Figures of a classifier's results, drawn without pyplot's global state: for callbacks, loggers and notebooks."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from awconv.callbacks.canvas import (
    DPI,
    FAINT,
    INK,
    MARGIN,
    TRACK,
    Tile,
    Tiles,
    evenly_spaced,
    ink_on,
    new_sheet,
    put_bar,
    put_picture,
    put_text,
    shorten,
    text_width,
    upright_picture,
    wrap,
)
from awconv.errors import InputError

COUNTS_UP_TO = 20  # classes: counts are written into the cells
NAMES_UP_TO = 100  # classes: every row and column carries its class's name

_LINE, _KEY_WIDTH = 0.2, 2.4  # inches, as are all lengths below that are no font sizes
_ZERO, _WRONG = "#9a9a9a", "#c8102e"
# Nine points of a straight line in Oklab from white to dark blue: equal steps look equally large.
_COLOURS = LinearSegmentedColormap.from_list(
    "share",
    ["#ffffff", "#dce2ed", "#bbc6da", "#9aabc7", "#7a90b5", "#5b76a2", "#3e5c8f", "#20427c", "#022869"],
)


def draw_confusion_matrix(matrix: npt.ArrayLike, class_names: Sequence[str], *, of: str = "test images") -> Figure:
    """Draws a confusion matrix, its colours normalised by row, with the accuracy of every class beside it.

    Up to 20 classes every cell shows its count. Up to 100 classes every row and column shows its name and
    every row its accuracy. Above 20 classes the most confused pairs are listed at the side, and above 100
    the classes of lowest accuracy too. Colours grow with a root of the share, so that a confusion of
    one in a hundred can be seen.

    Args:
        matrix: counts (K, K); rows are true classes, columns predicted ones.
        class_names: K names, in the matrix's order. Mathtext in them is not interpreted.
        of: what the images are, for the title.

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
        cell = min(max(text_width(str(counts.max()), size) + 0.16, 3.6 / classes, 0.38), 1.0)
    elif named:
        cell = max(0.14, 7.0 / classes)
    else:
        # A whole number of pixels, lest some classes look wider than others.
        cell = min(math.ceil(1200 / classes) / DPI, 24 / classes)
    side = classes * cell
    step = 10 if named else 20 if classes <= 250 else 50 if classes <= 500 else 100 * math.ceil(classes / 1500)
    if named:
        marks = {k: shorten(name, 2.4, size) for k, name in enumerate(class_names)}
    else:
        size = 9.0
        marks = {k: str(k) for k in range(0, classes, step)}
    longest = max(text_width(mark, size) for mark in marks.values())
    flat = not named or (written and longest < cell - 0.08)
    angle = 0 if flat else 45 if written else 90
    depth = 0.2 if flat else longest * math.sin(math.radians(angle)) + (0.15 if written else 0.05)

    title = f"Top-1 {correct.sum() / total:.2%} on {total:,} {of}" if total else f"No {of}"
    note = ""
    if written:
        note = "Number: images. Colour: share of the row's images."
    elif not named:
        note = "Classes are numbered from 0, in the order of the model's class names."

    left = MARGIN + 0.3 + longest + 0.08
    scores = [f"{accuracy:.1%} of {n}" if n else "no images" for accuracy, n in zip(accuracies, images, strict=True)]
    bars = left + side + 0.15
    right = bars + 1.05 + max(text_width(score, size) for score in scores) if named else left + side
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
            _Listing("Lowest accuracy", [scores[k] for k in worst], [shorten(class_names[k], 4.0, 9) for k in worst])
        )
    beside = right + 0.4
    if listings:
        right = beside + max(_KEY_WIDTH + 0.15, *(listing.width for listing in listings))
    width = max(right + MARGIN, text_width(title, 14, "bold") + 2 * MARGIN + 0.1)
    note_lines = wrap(note, width - 2 * MARGIN, 9)
    top = MARGIN + 0.3 + 0.19 * len(note_lines) + (0.35 if named else 0.2)
    # Whole pixels here too.
    left, top = round(left * DPI) / DPI, round(top * DPI) / DPI
    height = top + side + 0.08 + depth + 0.25 + MARGIN
    figure, sheet = new_sheet(width, height)

    put_text(sheet, MARGIN, MARGIN, title, 14, va="top", weight="bold")
    for line, text in enumerate(note_lines):
        put_text(sheet, MARGIN, MARGIN + 0.32 + 0.19 * line, text, 9, FAINT, va="top")

    norm = PowerNorm(1 / 2 if named else 1 / 3, 0, 1)
    sheet.imshow(
        shares,
        cmap=_COLOURS,
        norm=norm,
        extent=(left, left + side, top + side, top),
        aspect="auto",
        interpolation="nearest" if cell * DPI >= 1 else "antialiased",
    )
    if not written:
        guides = np.arange(step, classes, step)
        sheet.hlines(top + guides * cell, left, left + side, color=TRACK, linewidth=0.6)
        sheet.vlines(left + guides * cell, top, top + side, color=TRACK, linewidth=0.6)
    sheet.add_patch(Rectangle((left, top), side, side, fill=False, edgecolor=FAINT, linewidth=0.6))
    for k, mark in marks.items():
        middle = (k + 0.5) * cell
        put_text(sheet, left - 0.08, top + middle, mark, size, ha="right", va="center_baseline")
        if flat:
            put_text(sheet, left + middle, top + side + 0.08, mark, size, ha="center", va="top")
        else:
            put_text(
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
                sheet.plot([left + x for x in xs], [top + y for y in ys], color=FAINT, linewidth=0.6)
    axis_size = max(size, 9)
    put_text(sheet, MARGIN + 0.1, top + side / 2, "true class", axis_size, FAINT, ha="center", va="center", rotation=90)
    put_text(sheet, left + side / 2, height - MARGIN, "predicted class", axis_size, FAINT, ha="center", va="bottom")

    if written:
        for i, j in np.ndindex(counts.shape):
            ink = _ZERO if not counts[i, j] else ink_on(_COLOURS(norm(shares[i, j])))
            put_text(
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
        put_text(sheet, bars, top - 0.06, "accuracy", axis_size, FAINT, va="bottom")
        for k, (accuracy, score) in enumerate(zip(accuracies, scores, strict=True)):
            y = top + (k + 0.5) * cell
            thickness = min(0.5 * cell, 0.2)
            put_bar(sheet, bars, y - thickness / 2, 0.95, thickness, float(accuracy))
            put_text(sheet, bars + 1.03, y, score, size, va="center_baseline")
    if not written:
        _colour_key(sheet, beside, top, norm)
        y = top + 0.8
        for listing in listings:
            y = listing.draw(sheet, beside, y) + 0.25
    return figure


class PredictedPicture(NamedTuple):
    """A picture of :func:`draw_prediction_sheet`.

    Attributes:
        picture: grey or RGB.
        target: index of the true class.
        predicted: index of the predicted class.
        probability: of the predicted class, in [0, 1].
        of_target: probability of the true class.
        loss: cross entropy.
    """

    picture: Image.Image
    target: int
    predicted: int
    probability: float
    of_target: float
    loss: float


def draw_prediction_sheet(parts: Mapping[str, Sequence[PredictedPicture]], class_names: Sequence[str]) -> Figure:
    """Draws pictures in rows, each with its prediction and, in red where that is wrong, the truth.

    Args:
        parts: pictures below a heading each; a part without pictures is left out.
        class_names: K names.

    Returns:
        A figure of its own size, bound to no pyplot state.

    Raises:
        InputError: if there are no pictures.
    """
    parts = {heading: pictures for heading, pictures in parts.items() if pictures}
    if not parts:
        raise InputError("parts holds no pictures: expected at least one")
    tiles = Tiles(max(map(len, parts.values())), page=8, smallest=1.4, largest=1.6, caption=0.52)
    placed, top = [], 0.0
    for pictures in parts.values():
        places, bottom = tiles.place([shown.picture.size for shown in pictures], heading=top + 0.42)
        placed.append((top, places))
        top = bottom - MARGIN
    widest = max(text_width(heading, 14, "bold") for heading in parts)
    figure, sheet = new_sheet(max(tiles.width, widest + 0.1 + 2 * MARGIN), top + MARGIN)
    for (heading, pictures), (top, places) in zip(parts.items(), placed, strict=True):
        put_text(sheet, MARGIN, MARGIN + top, heading, 14, va="top", weight="bold")
        for shown, place in zip(pictures, places, strict=True):
            _put_prediction(sheet, shown, place, tiles.side, class_names)
    return figure


def _put_prediction(sheet: Axes, shown: PredictedPicture, place: Tile, side: float, names: Sequence[str]) -> None:
    put_picture(sheet, place, shown.picture.convert("RGB"))
    x, floor = place.x, place.floor
    right = shown.predicted == shown.target
    put_bar(sheet, x, floor + 0.06, side, 0.045, min(max(shown.probability, 0.0), 1.0))
    lines = [(0.29, names[shown.predicted], shown.probability, 9.0, "bold", INK if right else _WRONG)]
    if not right:
        lines.append((0.46, f"is {names[shown.target]}", shown.of_target, 8.0, "normal", FAINT))
    for below, name, probability, size, weight, ink in lines:
        percent = f"{probability:.1%}"
        put_text(sheet, x + side, floor + below, percent, size, ink, ha="right", va="baseline")
        name = shorten(name, side - text_width(percent, size) - 0.1, size, weight)
        put_text(sheet, x, floor + below, name, size, ink, weight=weight, va="baseline")


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
    chosen = evenly_spaced(total, max_pictures)
    shown = len(chosen)
    tiles = Tiles(shown, page=10, smallest=1.6, largest=3.0, caption=0.52)
    thumbnails = [upright_picture(Path(paths[k]), round(2 * tiles.side * DPI)) for k in chosen]
    places, height = tiles.place([picture.size if picture else (3, 2) for picture in thumbnails])

    title = f"{total} prediction{'s' if total > 1 else ''}"
    if shown < total:
        title = f"{shown} of {total} predictions, evenly spaced"
    figure, sheet = new_sheet(max(tiles.width, text_width(title, 14, "bold") + 0.1 + 2 * MARGIN), height)
    put_text(sheet, MARGIN, MARGIN, title, 14, va="top", weight="bold")
    for index, picture, place in zip(chosen, thumbnails, places, strict=True):
        put_picture(sheet, place, picture)
        x, floor, side = place.x, place.floor, tiles.side
        probability = float(probabilities[index])
        percent = f"{probability:.1%}"
        put_bar(sheet, x, floor + 0.06, side, 0.045, probability)
        put_text(sheet, x + side, floor + 0.29, percent, 9, ha="right", va="baseline")
        name = shorten(class_names[index], side - text_width(percent, 9) - 0.1, 9, "bold")
        put_text(sheet, x, floor + 0.29, name, 9, weight="bold", va="baseline")
        put_text(sheet, x, floor + 0.46, shorten(Path(paths[index]).name, side, 7.5), 7.5, FAINT, va="baseline")
    return figure


def _confused_pairs(counts: npt.NDArray[Any], limit: int) -> list[tuple[int, int]]:
    """The (true, predicted) pairs off the diagonal with the most images, most first."""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:limit]
    return [(i, j) for i, j in (divmod(int(k), len(counts)) for k in order) if wrong[i, j]]


def _colour_key(sheet: Axes, x: float, y: float, norm: Normalize) -> None:
    put_text(sheet, x, y, "share of the row's images", 9, FAINT, va="top")
    ramp, bounds = np.linspace(0, 1, 256)[None], (x, x + _KEY_WIDTH, y + 0.36, y + 0.2)
    sheet.imshow(ramp, cmap=_COLOURS, vmin=0, vmax=1, extent=bounds, aspect="auto")
    sheet.add_patch(Rectangle((x, y + 0.2), _KEY_WIDTH, 0.16, fill=False, edgecolor=FAINT, linewidth=0.6))
    for share in (0, 0.05, 0.25, 0.5, 1):
        place = x + _KEY_WIDTH * float(norm(share))
        put_text(sheet, place, y + 0.4, f"{share:.0%}", 8, FAINT, ha="center", va="top")


class _Listing(NamedTuple):
    """Lines of figures and names to stand beside a heat map; ``width`` is where the names end, in inches."""

    title: str
    figures: list[str]
    names: list[str]

    @property
    def indent(self) -> float:
        return max((text_width(text, 9) for text in self.figures), default=0) + 0.15

    @property
    def width(self) -> float:
        longest = max((text_width(text, 9) for text in self.names), default=0)
        return max(self.indent + longest, text_width(self.title, 9.5, "bold"))

    def draw(self, sheet: Axes, x: float, y: float) -> float:
        """Draws the listing from its title's baseline y on; returns the y below it."""
        put_text(sheet, x, y, self.title, 9.5, weight="bold", va="baseline")
        indent = self.indent
        for figures, name in zip(self.figures, self.names, strict=True):
            y += _LINE
            put_text(sheet, x + indent - 0.15, y, figures, 9, FAINT, ha="right", va="baseline")
            put_text(sheet, x + indent, y, name, 9, va="baseline")
        return y + _LINE


def _pair(true: str, predicted: str) -> str:
    """Both names, shortened to at most 4 inches together, either having the room that the other leaves."""
    room, half = 4.0, 2.0
    true = shorten(true, max(half, room - text_width(predicted, 9)), 9)
    return f"{true} → {shorten(predicted, room - text_width(true, 9), 9)}"
