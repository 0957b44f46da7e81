"""Which pictures lie near each other, and which far apart, in the space of their attention."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from awconv.callbacks.attention.figures import Picture, Pictures, put_heading, put_thumbnail, read_pictures
from awconv.callbacks.attention.statistics import aw_layers, choose_layers, collect_attention, network_of
from awconv.callbacks.canvas import FAINT, MARGIN, TRACK, evenly_spaced, new_sheet, put_text, shorten, text_width, wrap
from awconv.callbacks.detection_figures import PALETTE, colour_of
from awconv.errors import InputError, require_int

Array = npt.NDArray[Any]

_BUDGET = 2**29  # bytes of attention maps that are held at a time


def draw_attention_neighbours(
    network: nn.Module,
    images: Pictures,
    *,
    labels: Sequence[int] | Tensor | None = None,
    class_names: Sequence[str] | None = None,
    layers: str | Sequence[str] | None = None,
    transform: Callable[[Any], Tensor] | None = None,
    captions: Sequence[str] | None = None,
    max_thumbnails: int = 120,
    batch_size: int = 32,
) -> Figure:
    """Draws pictures where their attention puts them, and lists those farthest apart and closest together.

    Distances are those of :func:`attention_distances`; their best picture in two dimensions is a principal component
    analysis (classical multidimensional scaling). Thumbnails that would cover each other are moved apart, with a line
    to where they belong.

    Args:
        network: see :func:`draw_attention`.
        images: see :func:`draw_attention`; at least two.
        labels: N classes from 0, which colour the frames.
        class_names: by default the task's ``class_names``, if it has some.
        layers: glob pattern or patterns of module names; None takes every AW layer.
        transform: see :func:`draw_attention`.
        captions: a line for each picture, for the listings; by default its class, its file's name, or a number.
        max_thumbnails: of more pictures, so many evenly spaced ones are drawn, and the others as dots.
        batch_size: pictures that run at a time.

    Returns:
        A figure of its own size, bound to no pyplot state.

    Raises:
        InputError: as :func:`draw_attention` does, or if lengths do not fit each other.
    """
    require_int("max_thumbnails", max_thumbnails, "a whole number, at least 1", low=1)
    names = class_names if class_names is not None else getattr(network, "class_names", None)
    kinds = None if labels is None else [int(label) for label in labels]
    if kinds is not None and len(kinds) != len(images):
        raise InputError(f"labels has length {len(kinds)}: expected {len(images)}, one for each picture")
    if kinds is not None:
        names = list(map(str, range(max(kinds, default=0) + 1))) if names is None else list(map(str, names))
        if min(kinds, default=0) < 0 or max(kinds, default=0) >= len(names):
            raise InputError(f"labels reach from {min(kinds)} to {max(kinds)}: expected 0 to {len(names) - 1}")
        if captions is None and not any(isinstance(image, str | os.PathLike) for image in images):
            captions = [names[kind] for kind in kinds]
    given = read_pictures(network, "images", images, transform, captions)
    distances = attention_distances(network, [p.tensor for p in given], layers, batch_size=batch_size)
    places, shares = _embedded(distances)
    return _Neighbours(given, distances, places, shares, kinds, list(names or ())).draw(max_thumbnails)


def attention_distances(
    network: nn.Module,
    images: Tensor | Sequence[Tensor],
    layers: str | Sequence[str] | None = None,
    *,
    batch_size: int = 32,
) -> npt.NDArray[np.float64]:
    """Computes how far apart pictures lie in attention space.

    The distance is Euclidean, between all values of A of all layers, each layer divided by its spread (see
    :class:`awconv.callbacks.AttentionStatistics`) and the root of its number of values, so that all count the same;
    a layer whose spread is below 1e-5 is left out. The unit is the root mean square over all pairs.

    A network whose maps of all pictures do not fit into half a GiB runs more than once, on a part of its layers at a
    time.

    Args:
        network: see :func:`awconv.callbacks.collect_attention`.
        images: see there; at least two.
        layers: see there.
        batch_size: pictures that run at a time.

    Returns:
        (N, N); all zero where attention is the same for all pictures.

    Raises:
        InputError: if there are fewer than two pictures, and as :func:`awconv.callbacks.collect_attention` does.
    """
    total = len(images)
    if total == 1:
        raise InputError("images holds one picture: expected at least two to compare")
    chosen = choose_layers("layers", layers, aw_layers(network_of(network)))
    groups: list[list[str]] = [[]]
    room = _BUDGET
    for name, layer in chosen.items():
        size = 4 * total * layer.weight.numel() // layer.share
        if size > room and groups[-1]:
            groups.append([])
            room = _BUDGET
        groups[-1].append(name)
        room -= size
    products = np.zeros((total, total))
    for group in groups:
        collected = collect_attention(network, images, group or layers, batch_size=batch_size)
        for name in list(collected):
            values = collected.pop(name).flatten(1)
            values -= values.mean(dim=0)
            product = (values @ values.T).double().numpy()
            variance = product.trace() / (total - 1)
            if variance > values.shape[1] * 1e-5**2:
                products += product / variance
    squares = np.diag(products)[:, None] + np.diag(products)[None] - 2 * products
    np.fill_diagonal(squares, 0)
    squares = np.maximum((squares + squares.T) / 2, 0)
    mean = squares.sum() / (total * (total - 1))
    return np.asarray(np.sqrt(squares / mean) if mean else squares)


def _embedded(distances: Array) -> tuple[Array, Array]:
    """Coordinates (N, 2) whose distances are nearest to those given, and the share of the variance of either."""
    n = len(distances)
    centre = np.eye(n) - 1 / n
    strengths, directions = np.linalg.eigh(-centre @ distances**2 @ centre / 2)
    first = np.argsort(-strengths, kind="stable")[:2]
    kept = np.maximum(strengths[first], 0)
    places = directions[:, first] * np.sqrt(kept)
    # which way round is arbitrary: the longest way is to the right and up
    signs = np.sign(places[np.abs(places).argmax(axis=0), [0, 1]])
    total = np.maximum(strengths, 0).sum()
    return places * np.where(signs == 0, 1, signs), kept / total if total else kept * 0


class _Neighbours:
    """The figure of :func:`draw_attention_neighbours`."""

    _SIDE, _INSET, _LISTED, _LISTING = 7.2, 0.08, 6, 2.9

    def __init__(
        self,
        pictures: Sequence[Picture],
        distances: Array,
        places: Array,
        shares: Array,
        kinds: list[int] | None,
        names: list[str],
    ) -> None:
        self._pictures, self._distances, self._kinds, self._names = pictures, distances, kinds, names
        self._shares = shares
        self._colours = [FAINT if kinds is None else colour_of(kinds[k] + 1) for k in range(len(pictures))]
        self._places = places

    def draw(self, max_thumbnails: int) -> Figure:
        total = len(self._pictures)
        same = not self._distances.any()
        title = f"{total} pictures by their attention"
        note = "Near each other are pictures that the network gives similar attention, over all layers. "
        if same:
            note = "The attention is the same for all pictures: there is nothing to tell them apart by. "
        else:
            note += (
                f"The two directions hold {self._shares[0]:.0%} and {self._shares[1]:.0%} of the variance; distance 1 "
                "is the average over all pairs (root mean square). "
            )
            if self._kinds is not None:
                note += self._agreement()
        if total > max_thumbnails:
            note += f" {max_thumbnails} of them are shown, evenly spaced; dots are the others."
        side = min(max(0.5 * self._SIDE / math.sqrt(min(total, max_thumbnails)), 0.3), 0.7)
        extents = np.ptp(self._places, axis=0)
        scale = (self._SIDE - side - 2 * self._INSET) / max(extents.max(), 1e-12) if not same else 0.0
        height = min(max(extents[1] * scale + side + 2 * self._INSET, 4.6), self._SIDE)
        beside = MARGIN + self._SIDE + 0.4
        width = MARGIN + self._SIDE + MARGIN if same else beside + self._LISTING + MARGIN
        note_lines = wrap(note, width - 2 * MARGIN, 9)
        top = MARGIN + 0.5 + 0.19 * len(note_lines)
        present = sorted(set(self._kinds or ()))
        if len(present) > len(PALETTE):
            present = []
        legend = _Legend.laid_out([self._names[kind] for kind in present], self._SIDE)
        listings = 0.0 if same else 0.2 + 2 * (0.22 + 0.38 * min(self._LISTED, total // 2))
        figure, sheet = new_sheet(width, top + max(height + 0.15 + legend.height, listings) + MARGIN)
        put_heading(sheet, title, note_lines)
        corner = np.array([MARGIN, top])
        room = np.array([self._SIDE, height])
        sheet.add_patch(Rectangle((MARGIN, top), *room, facecolor="#fafafa", edgecolor=TRACK, linewidth=0.8))
        middle = (self._places.max(axis=0) + self._places.min(axis=0)) / 2
        # up is up, though the sheet's y runs downwards
        spots = corner + room / 2 + (self._places - middle) * scale * [1, -1]
        shown = evenly_spaced(total, max_thumbnails)
        tiles = _apart(spots[shown], side + 0.06, corner + self._INSET, room - 2 * self._INSET)
        hidden = sorted(set(range(total)) - set(shown))
        sheet.scatter(
            spots[hidden, 0], spots[hidden, 1], s=9, c=[self._colours[k] for k in hidden], linewidths=0, zorder=2
        )
        lines = [(spot, tile) for spot, tile in zip(spots[shown], tiles, strict=True)]
        colours = [self._colours[k] for k in shown]
        sheet.add_collection(LineCollection(lines, colors=colours, linewidths=0.9, zorder=2), autolim=False)
        sheet.scatter(spots[shown, 0], spots[shown, 1], s=7, c=colours, linewidths=0, zorder=2)
        for k, (x, y) in zip(shown, tiles, strict=True):
            self._put(sheet, k, x, y, side)
        legend.draw(sheet, MARGIN, top + height + 0.15, [colour_of(kind + 1) for kind in present])
        if not same:
            y = self._list(sheet, beside, top, "farthest apart", -1)
            self._list(sheet, beside, y + 0.2, "closest together", 1)
        return figure

    def _put(self, sheet: Axes, k: int, x: float, y: float, side: float) -> None:
        tile = put_thumbnail(sheet, self._pictures[k].thumbnail, x, y, side, zorder=3)
        frame = Rectangle((tile.x, tile.y), tile.width, tile.height, fill=False, edgecolor=self._colours[k])
        frame.set(linewidth=1.8 if self._kinds is not None else 0.6, joinstyle="miter", zorder=4)
        sheet.add_patch(frame)

    def _agreement(self) -> str:
        """How many have a nearest neighbour of their own class, and how many would by chance."""
        kinds = np.array(self._kinds)
        apart = self._distances.copy()
        np.fill_diagonal(apart, np.inf)
        agree = int((kinds[apart.argmin(axis=1)] == kinds).sum())
        chance = ((kinds[:, None] == kinds[None]).sum() - len(kinds)) / (len(kinds) - 1)
        return f"The nearest neighbour is of the same class for {agree} of {len(kinds)} (by chance {chance:.0f})."

    def _list(self, sheet: Axes, x: float, y: float, heading: str, sign: int) -> float:
        """Draws pairs, a picture in one at most, and returns the y below them."""
        put_text(sheet, x, y + 0.12, heading, 9.5, va="baseline", weight="bold")
        put_text(
            sheet, x + text_width(heading, 9.5, "bold") + 0.1, y + 0.12, "each picture once", 8, FAINT, va="baseline"
        )
        y += 0.22
        taken: set[int] = set()
        pairs = np.argwhere(np.triu(np.ones_like(self._distances, dtype=bool), 1))
        values = self._distances[pairs[:, 0], pairs[:, 1]]
        listed = 0
        for number in np.argsort(sign * values, kind="stable"):
            i, j = map(int, pairs[number])
            if taken & {i, j}:
                continue
            taken |= {i, j}
            for k, left in ((i, x + 0.16), (j, x + 0.52)):
                self._put(sheet, k, left, y + 0.16, 0.32)
            put_text(sheet, x + 1.08, y + 0.16, f"{values[number]:.2f}", 9, ha="right", va="center_baseline")
            text = f"{self._pictures[i].caption}, {self._pictures[j].caption}"
            put_text(sheet, x + 1.2, y + 0.16, shorten(text, self._LISTING - 1.2, 8.5), 8.5, va="center_baseline")
            y += 0.38
            listed += 1
            if listed == self._LISTED:
                break
        return y


class _Legend(NamedTuple):
    """Names with coloured squares, in lines."""

    entries: list[tuple[str, float, float]]
    height: float

    @classmethod
    def laid_out(cls, names: Sequence[str], width: float) -> _Legend:
        x = y = 0.0
        entries = []
        for name in names:
            text = shorten(name, 2, 9)
            needed = 0.18 + text_width(text, 9) + 0.22
            if x and x + needed > width:
                x, y = 0.0, y + 0.22
            entries.append((text, x, y))
            x += needed
        return cls(entries, y + 0.22 if entries else 0.0)

    def draw(self, sheet: Axes, x: float, y: float, colours: Sequence[str]) -> None:
        for (text, dx, dy), colour in zip(self.entries, colours, strict=True):
            sheet.add_patch(Rectangle((x + dx, y + dy + 0.02), 0.12, 0.12, color=colour, linewidth=0))
            put_text(sheet, x + dx + 0.18, y + dy + 0.13, text, 9, va="baseline")


def _apart(spots: Array, side: float, corner: Array, room: Array) -> Array:
    """Moves centres of squares apart until none covers another, or not much, and inside a box."""
    places = spots.astype(np.float64)
    # coincident ones need a direction to part in: a sunflower's, the same every time
    angles = np.arange(len(places)) * math.pi * (3 - math.sqrt(5))
    places += 1e-3 * side * np.sqrt(np.arange(len(places)))[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
    low, high = corner + side / 2, np.maximum(corner + room - side / 2, corner + side / 2)
    for _ in range(300):
        gaps = places[:, None] - places[None]
        overlap = side - np.abs(gaps)
        np.fill_diagonal(overlap[..., 0], 0)
        covered: Array = np.all(overlap > 1e-3, axis=-1)
        if not covered.any():
            break
        # along the axis on which less is to be moved
        across = overlap[..., 0] < overlap[..., 1]
        moves = np.where(covered[..., None], np.sign(gaps) * overlap / 2, 0)
        moves[..., 0] *= across
        moves[..., 1] *= ~across
        places = np.clip(places + 0.6 * moves.sum(axis=1), low, high)
    return places
