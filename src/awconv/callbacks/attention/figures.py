"""Figures of attention: all layers at a glance, the maps of some samples, what they change in the kernels."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from awconv.callbacks.attention.statistics import (
    DEAD_BELOW,
    HISTOGRAM_BINS,
    SATURATED_ABOVE,
    SATURATED_BELOW,
    AttentionStatistics,
    aw_layers,
    choose_layers,
    collect_attention,
    measure_attention,
    network_of,
)
from awconv.callbacks.canvas import (
    DPI,
    FAINT,
    MARGIN,
    TRACK,
    Tile,
    counted,
    evenly_spaced,
    new_sheet,
    put_picture,
    put_text,
    shorten,
    text_width,
    upright_picture,
    wrap,
)
from awconv.data.pictures import to_tensor
from awconv.errors import InputError, require_int

Array = npt.NDArray[Any]
Pictures = Tensor | Sequence[Tensor | Image.Image | str | os.PathLike[str]]

ALIVE_COLOUR, DEAD_COLOUR, SATURATED_COLOUR = "#5b76a2", "#a8a8a8", "#e07b1a"
_FULL_SPREAD = 0.3  # what fills a bar, in every epoch: values that are uniform over [0, 1] have a little less
LEAST_CHANGE = 0.05  # colours that show differences span at least this much: what is dead stays pale

_STRIP = 4.8  # inches, as are all lengths below that are no font sizes
_PATCH, _PITCH = 0.36, 1.55
_THUMBNAIL = 400  # pixels: no thumbnail is longer
# Straight lines in Oklab: equal steps look equally large.
_VALUES = LinearSegmentedColormap.from_list(
    "attention", ["#ffffff", "#dce2ed", "#bbc6da", "#9aabc7", "#7a90b5", "#5b76a2", "#3e5c8f", "#20427c", "#022869"]
)
_CHANGES = LinearSegmentedColormap.from_list(
    "change", ["#0b3b7a", "#4f74ab", "#9fb3d3", "#f7f7f7", "#f0b27d", "#d06d19", "#7a3300"]
)
_KERNELS = LinearSegmentedColormap.from_list("kernel", ["#000000", "#ffffff"])


# ---- all layers at a glance ------------------------------------------------------------------------------------------


def draw_attention_layers(statistics: Mapping[str, AttentionStatistics], title: str | None = None) -> Figure:
    """Draws for every layer the histogram of its attention and how much that differs between samples.

    A layer most of whose maps are dead is grey, one most of whose values are saturated is orange.

    Args:
        statistics: what :func:`awconv.callbacks.measure_attention` gives, of at least one layer.
        title: stands above; by default the number of layers and of pictures.

    Returns:
        A figure of its own size, bound to no pyplot state.

    Raises:
        InputError: if there are no layers.
    """
    if not statistics:
        raise InputError("statistics is empty: expected at least one layer")
    layers = list(statistics.items())
    samples = max(s.samples for s in statistics.values())
    if title is None:
        title = f"Attention of {counted(len(layers), 'layer')} on {counted(samples, 'picture')}"
    # Side by side, so that the page is never much higher than wide.
    blocks = math.ceil(math.sqrt(len(layers) / 26))
    rows = math.ceil(len(layers) / blocks)
    row = 0.3
    names = [shorten(name, 2.3, 9) for name, _ in layers]
    name_width = max(text_width(text, 9) for text in ["layer", *names])
    shapes = ["x".join(map(str, s.average.shape)) for _, s in layers]
    shape_width = max(text_width(text, 8) for text in ["maps", *shapes])
    columns = _Columns(name_width, shape_width)
    shown = [colour_of_layer(s) for _, s in layers]
    note = (
        f"Histogram: all values of A, from 0 to 1. Spread: how much a value differs between pictures (standard "
        f"deviation). Dead: maps with a spread below {DEAD_BELOW}. Saturated: values below {SATURATED_BELOW} or above "
        f"{SATURATED_ABOVE}. A layer that is dead by half is grey ({shown.count(DEAD_COLOUR)} of {len(layers)}), one "
        f"that is saturated by half is orange ({shown.count(SATURATED_COLOUR)})."
    )
    if samples < 2:
        note += " One picture has no spread."
    width = max(2 * MARGIN + blocks * (columns.width + 0.5) - 0.5, text_width(title, 14, "bold") + 2 * MARGIN + 0.1)
    note_lines = wrap(note, width - 2 * MARGIN, 9)
    top = MARGIN + 0.36 + 0.19 * len(note_lines) + 0.42
    figure, sheet = new_sheet(width, top + rows * row + MARGIN)
    put_heading(sheet, title, note_lines)

    outlines, ticks, tracks, bars = [], [], [], []
    for number, (name, (_, s), shape) in enumerate(zip(names, layers, shapes, strict=True)):
        block, line = divmod(number, rows)
        x, y = MARGIN + block * (columns.width + 0.5), top + line * row
        if line == 0:
            columns.put_headings(sheet, x, y - 0.1)
        floor = y + row - 0.05
        middle = (y + floor) / 2
        put_text(sheet, x, middle, name, 9, va="center_baseline")
        put_text(sheet, x + columns.shape, middle, shape, 8, FAINT, va="center_baseline")

        left = x + columns.histogram
        heights = s.histogram / max(int(s.histogram.max()), 1) * (floor - y)
        edges = left + np.linspace(0, columns.HISTOGRAM, HISTOGRAM_BINS + 1)
        steps = np.stack([np.repeat(edges, 2)[1:-1], floor - np.repeat(heights, 2)], axis=1)
        outlines.append(np.concatenate([[[edges[0], floor]], steps, [[edges[-1], floor]]]))
        ticks += [[(left, floor), (left + columns.HISTOGRAM, floor)]]
        ticks += [[(left + columns.HISTOGRAM / 2, y), (left + columns.HISTOGRAM / 2, floor)]]

        left = x + columns.spread
        if s.spread == s.spread:
            tracks.append(_box(left, middle - 0.05, columns.SPREAD, 0.1))
            bars.append(_box(left, middle - 0.05, columns.SPREAD * min(s.spread / _FULL_SPREAD, 1), 0.1))
        for place, value in (
            (columns.spread + columns.SPREAD + 0.48, _decimal(s.spread)),
            (columns.dead, _percent(s.dead)),
            (columns.saturated, _percent(s.saturated)),
            (columns.mean, _decimal(s.mean)),
        ):
            alarming = (place == columns.dead and s.dead > 0.5) or (place == columns.saturated and s.saturated > 0.5)
            weight = "bold" if alarming else "normal"
            # of 9 points, bold digits come out as if they had serifs
            size = 9.5 if alarming else 9
            put_text(sheet, x + place, middle, value, size, ha="right", va="center_baseline", weight=weight)
    sheet.add_collection(LineCollection(ticks, colors="#c4c4c4", linewidths=0.7), autolim=False)
    known = [colour for colour, (_, s) in zip(shown, layers, strict=True) if s.spread == s.spread]
    for shapes_of_kind, colour_or_colours in ((outlines, shown), (tracks, TRACK), (bars, known)):
        polygons = PolyCollection(shapes_of_kind, facecolors=colour_or_colours, linewidths=0)
        sheet.add_collection(polygons, autolim=False)
    return figure


def colour_of_layer(statistics: AttentionStatistics) -> str:
    """Orange for a layer most of whose values are saturated, grey for one most of whose maps are dead, else blue."""
    if statistics.saturated > 0.5:
        return SATURATED_COLOUR
    return DEAD_COLOUR if statistics.dead > 0.5 else ALIVE_COLOUR


class _Columns:
    """Where the columns of a block of layers stand, from its left edge; of numbers, the right edge."""

    HISTOGRAM, SPREAD = 1.6, 0.8

    def __init__(self, name: float, shape: float) -> None:
        self.shape = name + 0.18
        self.histogram = self.shape + shape + 0.2
        self.spread = self.histogram + self.HISTOGRAM + 0.25
        self.dead = self.spread + self.SPREAD + 0.48 + 0.52
        self.saturated = self.dead + 0.75
        self.mean = self.saturated + 0.6
        self.width = self.mean

    def put_headings(self, sheet: Axes, x: float, y: float) -> None:
        """Writes them at a baseline."""
        for place, text in ((0.0, "layer"), (self.shape, "maps"), (self.spread, "spread")):
            put_text(sheet, x + place, y, text, 8.5, FAINT, va="baseline")
        for share, text in ((0, "0"), (0.5, "0.5"), (1, "1")):
            place = x + self.histogram + share * self.HISTOGRAM
            put_text(sheet, place, y, text, 8.5, FAINT, ha="center", va="baseline")
        end = x + self.spread + self.SPREAD
        put_text(sheet, end, y, f"{_FULL_SPREAD:g}", 8.5, FAINT, ha="right", va="baseline")
        for place, text in ((self.dead, "dead"), (self.saturated, "saturated"), (self.mean, "mean")):
            put_text(sheet, x + place, y, text, 8.5, FAINT, ha="right", va="baseline")


# ---- maps of some samples --------------------------------------------------------------------------------------------


def draw_attention_maps(
    maps: Mapping[str, npt.ArrayLike],
    averages: Mapping[str, npt.ArrayLike],
    *,
    pictures: Sequence[Image.Image | None] | None = None,
    captions: Sequence[str] | None = None,
    title: str | None = None,
) -> Figure:
    """Draws the attention of some samples below each other: the values, and their difference from the mean sample.

    A kernel's map stands as it is, kh rows by kw columns: output channels run to the right, groups of input channels
    (that share a value) down. Where that is finer than the figure, a map is drawn as its mean over the kernel.

    Args:
        maps: of S samples, by layer: (S, C2, C1 / groups / share, kh, kw); of at least one layer and sample.
        averages: of the same layers, the mean sample: (C2, C1 / groups / share, kh, kw).
        pictures: S thumbnails; None, here or in a place, draws none.
        captions: S lines to stand beside them.
        title: stands above.

    Returns:
        A figure of its own size, bound to no pyplot state.

    Raises:
        InputError: if there is nothing to draw, or the shapes do not fit each other.
    """
    values = {name: _array(array) for name, array in maps.items()}
    means = {name: _array(averages[name]) for name in values if name in averages}
    samples = len(next(iter(values.values()))) if values else 0
    if not samples:
        raise InputError("maps is empty: expected at least one layer and one sample")
    for name, array in values.items():
        if array.ndim != 5 or name not in means or array.shape != (samples, *means[name].shape):
            there = means[name].shape if name in means else None
            raise InputError(
                f"maps[{name!r}] of shape {array.shape}, averages of shape {there}: expected ({samples}, C2, "
                "C1/groups/share, kh, kw) and the same without the first"
            )
    for argument, given in (("pictures", pictures), ("captions", captions)):
        if given is not None and len(given) != samples:
            raise InputError(f"{argument} has length {len(given)}: expected {samples}, one for each sample")
    if captions is None:
        captions = [f"sample {k + 1}" for k in range(samples)]
    if title is None:
        title = f"Attention maps of {counted(samples, 'sample')}"
    note = (
        "Each small block is the map A of one kernel, as the kernel lies; output channels run to the right, groups of "
        "input channels down. Left: A. Right: A less the mean sample's."
    )
    if any(_is_averaged(mean) for mean in means.values()):
        note += " Layers marked (mean over the kernel) have too many to be drawn so: a cell is the mean of a map."
    label_width = min(max(text_width("mean sample", 9, "bold"), *(text_width(c, 9) for c in captions)), 1.6)
    picture_width = 0.5 if pictures is not None and any(picture is not None for picture in pictures) else 0.0
    left = MARGIN + label_width + 0.1 + picture_width
    width = left + 2 * _STRIP + 0.2 + MARGIN
    note_lines = wrap(note, width - 2 * MARGIN, 9)
    heights = {name: _strip_height(mean) for name, mean in means.items()}
    pitches = {name: max(height, 0.36 if picture_width else 0.17) + 0.07 for name, height in heights.items()}
    heading, gap = 0.3, 0.26
    y = MARGIN + 0.4 + 0.19 * len(note_lines)
    figure, sheet = new_sheet(
        max(width, text_width(title, 14, "bold") + 2 * MARGIN + 0.1),
        y + sum(heading + gap + (samples + 1) * pitch for pitch in pitches.values()) - gap - 0.07 + MARGIN,
    )
    put_heading(sheet, title, note_lines)
    for name, array in values.items():
        mean, pitch, height = means[name], pitches[name], heights[name]
        changes = array - mean
        limit = max(_largest(changes if not _is_averaged(mean) else changes.mean(axis=(-2, -1))), LEAST_CHANGE)
        shape = "x".join(map(str, mean.shape))
        marked = f"{shape} (mean over the kernel)" if _is_averaged(mean) else shape
        right = left + _STRIP + 0.2
        baseline = y + heading - 0.1
        room = left + _STRIP - MARGIN - 1.3 - text_width(marked, 8)
        shown = shorten(name, room, 10, "bold")
        put_text(sheet, MARGIN, baseline, shown, 10, va="baseline", weight="bold")
        put_text(sheet, MARGIN + text_width(shown, 10, "bold") + 0.12, baseline, marked, 8, FAINT, va="baseline")
        _put_key(sheet, left + _STRIP, baseline, _VALUES, "0", "1")
        _put_key(sheet, right + _STRIP, baseline, _CHANGES, f"-{limit:.2g}", f"+{limit:.2g}")
        y += heading
        for k, (caption, one) in enumerate(zip(["mean sample", *captions], [mean, *array], strict=True)):
            middle = y + (pitch - 0.07) / 2
            strip = middle - height / 2
            weight = "normal" if k else "bold"
            text = shorten(caption, label_width, 9, weight)
            put_text(sheet, MARGIN, middle, text, 9, va="center_baseline", weight=weight)
            picture = pictures[k - 1] if k and pictures is not None else None
            if picture is not None:
                put_thumbnail(sheet, picture, left - 0.1 - 0.18, middle, 0.36)
            _put_strip(sheet, left, strip, height, _as_strip(one), _VALUES, Normalize(0, 1), mean)
            if k:
                _put_strip(sheet, right, strip, height, _as_strip(one - mean), _CHANGES, _about_zero(limit), mean)
            y += pitch
        y += gap
    return figure


def _is_averaged(maps: Array) -> bool:
    return bool(maps.shape[0] * maps.shape[-1] > _STRIP * DPI)


def _as_strip(maps: Array) -> Array:
    """(C2, G, kh, kw) as an image: kernels beside each other, input groups below each other."""
    outputs, groups, kh, kw = maps.shape
    if _is_averaged(maps):
        return np.asarray(maps.mean(axis=(-2, -1)).T)
    return np.asarray(maps.transpose(1, 2, 0, 3).reshape(groups * kh, outputs * kw))


def _strip_height(maps: Array) -> float:
    rows, columns = _as_strip(maps).shape
    return float(min(max(rows * min(max(_STRIP / columns, 0.045), 0.09), 0.2), 0.6))


def _put_strip(
    sheet: Axes, x: float, y: float, height: float, strip: Array, colours: Colormap, norm: Normalize, maps: Array
) -> None:
    """Draws an image of :func:`_as_strip`, with a fine line between kernels where there is room for lines."""
    _put_image(sheet, (x, y, _STRIP, height), strip, colours, norm)
    outputs, groups = maps.shape[:2]
    if _is_averaged(maps) or outputs > 64 or groups > 8:
        return
    lines = [[(x + k * _STRIP / outputs, y), (x + k * _STRIP / outputs, y + height)] for k in range(1, outputs)]
    lines += [[(x, y + k * height / groups), (x + _STRIP, y + k * height / groups)] for k in range(1, groups)]
    sheet.add_collection(LineCollection(lines, colors="white", linewidths=min(0.8, 24 / outputs)), autolim=False)


# ---- what changes in a kernel ----------------------------------------------------------------------------------------


def draw_attention(
    network: nn.Module,
    images: Pictures,
    *,
    reference: Pictures | None = None,
    layers: str | Sequence[str] | None = None,
    transform: Callable[[Any], Tensor] | None = None,
    captions: Sequence[str] | None = None,
    max_pictures: int = 4,
    max_layers: int = 6,
    batch_size: int = 32,
) -> Figure:
    """Draws what attention does to each kernel for some pictures, compared with the mean picture.

    What a picture's attention multiplies a kernel by is 1 + A (A without the residual form); the figure shows by how
    much that is more or less than with the mean of A over all pictures: for every kernel, as a heat map of its mean
    over kh, kw, and for the kernels that change most, value by value.

    Args:
        network: a trained task, or a network; see :func:`awconv.callbacks.collect_attention`.
        images: tensors as the network takes them, or picture files or PIL images, that ``transform`` makes into such.
        reference: the pictures that are averaged, in the same form; None takes ``images``.
        layers: glob pattern or patterns of module names; None takes every AW layer.
        transform: what makes of a picture what the network takes: ``predict_transform()`` of the data module. A
            detector needs none. Tensors are not transformed.
        captions: a line for each of ``images``; by default the file's name or a number.
        max_pictures: of more, so many evenly spaced ones are drawn.
        max_layers: of more, so many evenly spaced ones are drawn.
        batch_size: pictures that run at a time.

    Returns:
        A figure of its own size, bound to no pyplot state.

    Raises:
        InputError: if there is only one picture and no ``reference``, a file cannot be read, files have no
            ``transform``, and as :func:`awconv.callbacks.collect_attention` does.
    """
    require_int("max_pictures", max_pictures, "a whole number, at least 1", low=1)
    require_int("max_layers", max_layers, "a whole number, at least 1", low=1)
    network = network_of(network)
    given = read_pictures(network, "images", images, transform, captions)
    others = given if reference is None else read_pictures(network, "reference", reference, transform, None)
    if reference is None and len(given) == 1:
        raise InputError(
            "images holds one picture, which is its own mean: expected several, or reference=, the pictures to "
            "compare it with"
        )
    chosen = list(choose_layers("layers", layers, aw_layers(network)))
    # where there are none, that is said by what runs the network
    names = [chosen[k] for k in evenly_spaced(len(chosen), max_layers)] or None
    statistics = measure_attention(network, [p.tensor for p in others], names, batch_size=batch_size)
    shown = [given[k] for k in evenly_spaced(len(given), max_pictures)]
    maps = collect_attention(network, [p.tensor for p in shown], names, batch_size=batch_size)
    there = aw_layers(network)
    changes = [_Changes.of(name, there[name], maps[name].double().numpy(), statistics[name].average) for name in maps]

    title = f"What attention does to the kernels, compared with the mean of {counted(len(others), 'picture')}"
    left = MARGIN + 1.55
    kernels = left + _STRIP + 0.4
    width = kernels + 4 * _PITCH - 0.2 + MARGIN
    note = (
        "Heat map: by how much a kernel is scaled more (orange) or less (blue), mean over its positions; output "
        "channels run to the right, groups of input channels down. Beside it, by input and output channel, the kernels "
        "that change most: with the mean picture's attention, with this picture's, and the change at each position."
    )
    parts = [(len(maps), len(chosen), "layers"), (len(shown), len(given), "pictures")]
    if fewer := [f"{some} of {all_of_them} {what}" for some, all_of_them, what in parts if some < all_of_them]:
        note += f" Drawn are {' and '.join(fewer)}, evenly spaced."
    note_lines = wrap(note, width - 2 * MARGIN, 9)
    section = max(1.75, sum(change.height for change in changes))
    top = MARGIN + 0.45 + 0.19 * len(note_lines)
    figure, sheet = new_sheet(width, top + len(shown) * (section + 0.25) - 0.25 + MARGIN)
    put_heading(sheet, title, note_lines)
    for number, picture in enumerate(shown):
        y = top + number * (section + 0.25)
        if number:
            sheet.plot([MARGIN, width - MARGIN], [y - 0.16] * 2, color=TRACK, linewidth=0.8)
        tile = put_thumbnail(sheet, picture.thumbnail, MARGIN + 0.65, y + 0.68, 1.3)
        caption = shorten(picture.caption, 1.4, 9)
        put_text(sheet, tile.x, tile.floor + 0.19, caption, 9, va="baseline")
        for change in changes:
            change.draw(sheet, left, kernels, y, number)
            y += change.height
    return figure


class _Changes(NamedTuple):
    """How a layer's kernels are scaled for S pictures, over how they are for the mean picture, less 1.

    Attributes:
        name: of the layer.
        relative: (S, C2, G, kh, kw), G = C1 / groups / share.
        limit: the largest magnitude of its mean over kh, kw, at least 5%.
        limit_of_values: the largest magnitude, at least 5%.
        scale: (S, C2, G, kh, kw), what the kernels are multiplied by.
        average: (C2, G, kh, kw), what the mean picture's are.
        kernel: (C2, C1 / groups, kh, kw).
        groups: of the convolution.
    """

    name: str
    relative: Array
    limit: float
    limit_of_values: float
    scale: Array
    average: Array
    kernel: Array
    groups: int

    @classmethod
    def of(cls, name: str, layer: Any, maps: Array, average: Array) -> _Changes:
        scale = maps + 1 if layer.residual else maps
        mean = average.astype(np.float64) + (1 if layer.residual else 0)
        relative = scale / np.maximum(mean, 1e-12) - 1
        limit = max(_largest(relative.mean(axis=(-2, -1))), LEAST_CHANGE)
        kernel = layer.weight.detach().double().cpu().numpy()
        return cls(name, relative, limit, max(_largest(relative), LEAST_CHANGE), scale, mean, kernel, layer.groups)

    @property
    def strip(self) -> float:
        """Height of the heat map."""
        return float(min(max(0.08 * self.relative.shape[2], _PATCH), 0.6))

    @property
    def height(self) -> float:
        return 0.22 + max(self.strip, _PATCH + 0.17) + 0.12

    def draw(self, sheet: Axes, x: float, kernels: float, y: float, picture: int) -> None:
        """Draws one picture's row: the heat map from ``x`` on, the most changed kernels from ``kernels`` on."""
        means = self.relative[picture].mean(axis=(-2, -1))
        baseline = y + 0.14
        facts = f"{means.shape[0]}x{means.shape[1]}, typically {np.sqrt((means**2).mean()):.1%}"
        facts += f", colours ±{_rounded(self.limit)}"
        name = shorten(self.name, _STRIP - text_width(facts, 8) - 0.15, 9.5, "bold")
        put_text(sheet, x, baseline, name, 9.5, va="baseline", weight="bold")
        put_text(sheet, x + _STRIP, baseline, facts, 8, FAINT, ha="right", va="baseline")
        strip = _largest_of_blocks(means.T, int(_STRIP * DPI))
        _put_image(sheet, (x, y + 0.22, _STRIP, self.strip), strip, _CHANGES, _about_zero(self.limit))
        put_text(
            sheet, kernels, baseline, f"values, colours ±{_rounded(self.limit_of_values)}", 8, FAINT, va="baseline"
        )
        order = np.argsort(-np.abs(means), axis=None, kind="stable")[:4]
        share = self.kernel.shape[1] // means.shape[1]
        for place, (output, group) in enumerate(divmod(int(k), means.shape[1]) for k in order):
            left = kernels + place * _PITCH
            members = self.kernel[output, group * share : (group + 1) * share]
            # of the kernels that share the map, the one that matters most
            inside = int((members**2).sum(axis=(1, 2)).argmax())
            before = members[inside] * self.average[output, group]
            after = members[inside] * self.scale[picture, output, group]
            norm = _about_zero(max(_largest(before), _largest(after), 1e-12))
            patches = [(before, _KERNELS, norm), (after, _KERNELS, norm)]
            patches.append((self.relative[picture, output, group], _CHANGES, _about_zero(self.limit_of_values)))
            for step, (patch, colours, scale) in enumerate(patches):
                box = (left + step * (_PATCH + 0.06), y + 0.22, _PATCH, _PATCH)
                _put_image(sheet, box, patch, colours, scale)
            block = output * self.groups // len(self.kernel)
            channel = block * self.kernel.shape[1] + group * share + inside
            text = f"{channel} → {output}: {means[output, group]:+.1%}"
            put_text(sheet, left, y + 0.22 + _PATCH + 0.13, text, 7.5, FAINT, va="baseline")


# ---- pictures --------------------------------------------------------------------------------------------------------


class Picture(NamedTuple):
    """A picture as the network takes it, as it looks, and what it is called."""

    tensor: Tensor
    thumbnail: Image.Image
    caption: str


def thumbnail_of(image: Tensor) -> Image.Image:
    """A tensor (C, H, W) as a picture: normalised floats are stretched from black to white; three channels, or one."""
    pixels = image.detach().cpu()
    pixels = pixels[:3] if len(pixels) >= 3 else pixels[:1].expand(3, -1, -1)
    if pixels.dtype != torch.uint8:
        pixels = pixels.float().nan_to_num(0, 0, 0)
        low, high = pixels.min(), pixels.max()
        if low < 0 or high > 1:
            pixels = (pixels - low) / (high - low).clamp(min=1e-12)
        pixels = (pixels * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def read_pictures(
    network: nn.Module,
    argument: str,
    images: Pictures,
    transform: Callable[[Any], Tensor] | None,
    captions: Sequence[str] | None,
) -> list[Picture]:
    """Makes of what a user gives what the network takes; see :func:`draw_attention`.

    Raises:
        InputError: if a picture cannot be read or made into a tensor (C, H, W); the message names ``argument``.
    """
    if isinstance(images, str | os.PathLike):
        raise InputError(f"{argument}={os.fspath(images)!r}: expected a list of pictures; put it in brackets")
    if captions is not None and len(captions) != len(images):
        raise InputError(f"captions has length {len(captions)}: expected {len(images)}, one for each picture")
    detector = isinstance(getattr(network_of(network), "transform", None), GeneralizedRCNNTransform)
    pictures = []
    for number, image in enumerate(images):
        caption = f"picture {number + 1}" if captions is None else captions[number]
        if isinstance(image, Tensor):
            if image.ndim != 3:
                raise InputError(
                    f"{argument} holds tensors of shape {tuple(image.shape)}: expected a tensor (N, C, H, W) or a "
                    "list of pictures (C, H, W)"
                )
            pictures.append(Picture(image, _small(thumbnail_of(image)), caption))
            continue
        picture: Image.Image | None
        if isinstance(image, Image.Image):
            picture = to_pil_image(to_tensor(image, f"{argument}[{number}]"))
        else:
            picture = upright_picture(Path(image))
            if captions is None:
                caption = Path(image).name
        if picture is None:
            raise InputError(f"{argument} holds {str(image)!r}, which cannot be read as a picture; leave it out")
        if transform is None and not detector:
            raise InputError(
                f"{argument} holds pictures that are no tensors, and transform=None: expected what makes of a picture "
                "what the network takes, predict_transform() of its data module"
            )
        tensor = pil_to_tensor(picture) if transform is None else transform(picture)
        pictures.append(Picture(tensor, _small(picture), caption))
    return pictures


def _small(picture: Image.Image) -> Image.Image:
    picture = picture.copy()
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return picture


def put_thumbnail(
    sheet: Axes, picture: Image.Image, x: float, y: float, side: float, zorder: float | None = None
) -> Tile:
    """Draws a picture about a point, at most ``side`` long, and returns its place."""
    width, height = picture.size
    wide, high = (side * extent / max(width, height) for extent in (width, height))
    tile = Tile(x - wide / 2, y - high / 2, wide, high)
    before = len(sheet.images)
    put_picture(sheet, tile, picture)
    if zorder is not None:
        for image in sheet.images[before:]:
            image.set_zorder(zorder)
    return tile


# ---- drawing ---------------------------------------------------------------------------------------------------------


def put_heading(sheet: Axes, title: str, note_lines: Sequence[str]) -> None:
    """Writes a title and lines of explanation from the top left corner on."""
    put_text(sheet, MARGIN, MARGIN, title, 14, va="top", weight="bold")
    for line, text in enumerate(note_lines):
        put_text(sheet, MARGIN, MARGIN + 0.32 + 0.19 * line, text, 9, FAINT, va="top")


def _put_image(
    sheet: Axes, box: tuple[float, float, float, float], values: Array, colours: Colormap, norm: Normalize
) -> None:
    x, y, width, height = box
    sheet.imshow(
        values,
        cmap=colours,
        norm=norm,
        extent=(x, x + width, y + height, y),
        aspect="auto",
        interpolation="nearest" if values.shape[1] <= width * DPI else "antialiased",
    )
    sheet.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor="#c4c4c4", linewidth=0.6))


def _put_key(sheet: Axes, right: float, baseline: float, colours: Colormap, low: str, high: str) -> None:
    """A ramp of colours with what its ends mean, up to a right edge."""
    end = right - text_width(high, 8)
    put_text(sheet, right, baseline, high, 8, FAINT, ha="right", va="baseline")
    start = end - 0.06 - 0.7
    box = (start, start + 0.7, baseline, baseline - 0.09)
    sheet.imshow(np.linspace(0, 1, 128)[None], cmap=colours, vmin=0, vmax=1, extent=box, aspect="auto")
    sheet.add_patch(Rectangle((start, baseline - 0.09), 0.7, 0.09, fill=False, edgecolor="#c4c4c4", linewidth=0.6))
    put_text(sheet, start - 0.06, baseline, low, 8, FAINT, ha="right", va="baseline")


def _about_zero(limit: float) -> Normalize:
    return Normalize(-limit, limit)


def _largest(values: Array) -> float:
    """The largest finite magnitude; 0 where there is none."""
    finite = np.abs(values[np.isfinite(values)])
    return float(finite.max()) if finite.size else 0.0


def _largest_of_blocks(values: Array, most: int) -> Array:
    """At most ``most`` columns: of each block of neighbours the value of largest magnitude, so that none is lost."""
    block = math.ceil(values.shape[1] / most)
    if block == 1:
        return values
    rows = len(values)
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % block))).reshape(rows, -1, block)
    places = np.abs(padded).argmax(axis=-1, keepdims=True)
    return np.asarray(np.take_along_axis(padded, places, axis=-1)[..., 0])


def _array(values: npt.ArrayLike) -> Array:
    return values.detach().float().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _box(x: float, y: float, width: float, height: float) -> list[tuple[float, float]]:
    return [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]


def _rounded(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"


def _decimal(value: float) -> str:
    return f"{value:.3f}" if value == value else "-"


def _percent(share: float) -> str:
    return f"{share:.0%}" if share == share else "-"
