"""Figures of a detector's results: boxes on pictures, sheets of such pictures, precision-recall curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou

from awconv.callbacks.canvas import (
    DPI,
    FAINT,
    MARGIN,
    TRACK,
    Tile,
    Tiles,
    counted,
    ink_on,
    new_sheet,
    put_picture,
    put_text,
    shorten,
    text_width,
    wrap,
)
from awconv.errors import InputError

# Ten hues far from each other: bright ones for frames, which are then seen on dark and, by their dark edge, on light
# pictures, and the same hues darker for lines on white and for the classes beyond ten.
_BRIGHT = (
    *("#ff5c70", "#4cb2ff", "#5fd35f", "#ff9f3f", "#cf83ff", "#2fd6c8", "#ff78dc", "#f2d22e", "#d9a36a", "#a0abff"),
)
_DARK = (
    *("#c8102e", "#0d68bb", "#177a27", "#b35200", "#8a2fd0", "#007570", "#b81d90", "#7c6500", "#7d4e1f", "#4a56c9"),
)
PALETTE = _BRIGHT + _DARK
COLOURED_UP_TO = 10  # classes: every precision-recall curve has a colour and a name
_FOUND_AT = 0.5  # intersection over union


_NO_DETECTIONS = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}


class SheetPicture(NamedTuple):
    """A picture of :func:`draw_detection_sheet`.

    Attributes:
        picture: RGB, of any resolution; None draws a grey tile that says that it cannot be read.
        size: width and height in pixels of the picture that the boxes refer to.
        detections: torchvision's dict of CPU tensors ``boxes`` (D, 4) xyxy, ``scores`` (D,) and ``labels`` (D,); None
            where no network has looked, and the ground truth is all there is to see.
        target: ``boxes`` (M, 4), ``labels`` (M,) and optionally ``iscrowd`` (M,); None if nobody knows them.
        caption: stands beneath.
    """

    picture: Image.Image | None
    size: tuple[int, int]
    detections: Mapping[str, Tensor] | None
    target: Mapping[str, Tensor] | None
    caption: str


def colour_of(label: int) -> str:
    """The colour of a class, the same in every picture; 20 of them, then again from the first."""
    return PALETTE[(label - 1) % len(PALETTE)]


def draw_detections(
    picture: Image.Image,
    detections: Mapping[str, Tensor],
    class_names: Sequence[str],
    *,
    target: Mapping[str, Tensor] | None = None,
    min_score: float = 0.5,
) -> Image.Image:
    """Draws boxes, class names and scores over a picture, at its own resolution.

    Lines and letters grow with the picture. No name leaves the picture, and names keep off each other where there is
    room. Ground truth is dashed black and white, and named on white where no drawn box of its class covers it (an
    intersection over union of 0.5).

    Args:
        picture: of any mode.
        detections: torchvision's dict of CPU tensors ``boxes`` (D, 4) xyxy in the picture's pixels, ``scores`` (D,)
            and ``labels`` (D,) in 1..K.
        class_names: K names; label 1 is the first. Mathtext in them is not interpreted.
        target: ground truth ``boxes`` (M, 4) and ``labels`` (M,), optionally ``iscrowd`` (M,).
        min_score: detections below it are not drawn.

    Returns:
        A new RGB picture of the same size.
    """
    width, height = picture.size
    font = max(9.0, 5 + (width * height) ** 0.5 / 60)
    # At 72 dots an inch a point is a pixel. The hundredth of a pixel is cut off again where the canvas rounds down.
    figure, sheet = new_sheet((width + 0.01) / 72, (height + 0.01) / 72, dpi=72)
    tile = Tile(0, 0, width / 72, height / 72)
    _put_boxes(sheet, tile, picture.size, detections, class_names, target, min_score, font, least=9)
    pixels = BytesIO()
    figure.savefig(pixels, format="rgba", dpi=72, transparent=True)
    overlay = Image.frombytes("RGBA", picture.size, pixels.getvalue())
    drawn = picture.convert("RGB")
    drawn.paste(overlay.convert("RGB"), mask=overlay.getchannel("A"))
    return drawn


def draw_detection_sheet(
    pictures: Sequence[SheetPicture],
    class_names: Sequence[str],
    title: str,
    *,
    min_score: float = 0.5,
) -> Figure:
    """Draws pictures with their boxes as :func:`draw_detections` does, in rows, each with a caption.

    Where the ground truth is known, the caption says how many of its objects were found, or, without detections, how
    many there are.

    Args:
        pictures: at least one.
        class_names: K names; label 1 is the first.
        title: stands above.
        min_score: detections below it are not drawn.

    Returns:
        A figure of its own size, bound to no pyplot state.

    Raises:
        InputError: if there are no pictures.
    """
    if not pictures:
        raise InputError("pictures is empty: expected at least one")
    tiles = Tiles(len(pictures), page=14, smallest=2.6, largest=4.5, caption=0.3)
    detected = any(entry.detections is not None for entry in pictures)
    notes = [f"Boxes of score {min_score:.0%} and more."] if detected else []
    if any(entry.target is not None for entry in pictures):
        where = "; its name is on white where no box of its class overlaps it by half (IoU 0.5)" if detected else ""
        notes.append(f"Dashed: ground truth{where}.")
    width = max(tiles.width, text_width(title, 14, "bold") + 0.1 + 2 * MARGIN, 5)
    note_lines = wrap(" ".join(notes), width - 2 * MARGIN, 9)
    places, height = tiles.place(
        [entry.size if entry.picture else (3, 2) for entry in pictures], heading=0.46 + 0.19 * len(note_lines)
    )
    figure, sheet = new_sheet(width, height)
    put_text(sheet, MARGIN, MARGIN, title, 14, va="top", weight="bold")
    for line, text in enumerate(note_lines):
        put_text(sheet, MARGIN, MARGIN + 0.32 + 0.19 * line, text, 9, FAINT, va="top")
    for entry, place in zip(pictures, places, strict=True):
        picture = entry.picture
        if picture is not None:
            # Smooth also where a small picture is enlarged, which matplotlib would draw in blocks.
            pixels = round(place.width * 2 * DPI), round(place.height * 2 * DPI)
            picture = picture.convert("RGB").resize((max(pixels[0], 1), max(pixels[1], 1)), Image.Resampling.BICUBIC)
        put_picture(sheet, place, picture)
        detections = _NO_DETECTIONS if entry.detections is None else entry.detections
        shown = int((detections["scores"] >= min_score).sum())
        counts = [] if entry.detections is None else [f"{shown} box{'' if shown == 1 else 'es'}"]
        if picture is not None:
            found = _put_boxes(
                sheet, place, entry.size, detections, class_names, entry.target, min_score, font=8, least=7
            )
            if entry.target is not None:
                of = f"{sum(found)} of {len(found)} found"
                there = counted(len(found), "object") if entry.detections is None else of
                counts.insert(0, there if found else "no objects")
        count = ", ".join(counts)
        put_text(sheet, place.x + tiles.side, place.floor + 0.2, count, 9, FAINT, ha="right", va="baseline")
        caption = shorten(entry.caption, tiles.side - text_width(count, 9) - 0.1, 9)
        put_text(sheet, place.x, place.floor + 0.2, caption, 9, va="baseline")
    return figure


def draw_precision_recall(
    precision: npt.NDArray[np.float64],
    class_names: Sequence[str],
    iou_thresholds: npt.NDArray[np.float64],
    recall_thresholds: npt.NDArray[np.float64],
) -> Figure:
    """Draws precision-recall curves: the mean over the classes, and every class by itself at an IoU of 0.50.

    Up to 10 classes each has a colour and a name; of more, the 10 of lowest AP50 have, and the others are grey. The
    number beside a curve is its mean over the recalls, which is the average precision.

    Args:
        precision: (T, R, K) interpolated precision at T IoU thresholds and R recalls of K classes, K at least 1.
        class_names: K names, in the order of ``precision``.
        iou_thresholds: (T,); 0.50 and 0.75 are among them.
        recall_thresholds: (R,) in [0, 1].

    Returns:
        A figure of its own size, bound to no pyplot state.

    Raises:
        InputError: if the shapes do not fit each other, or there is no class.
    """
    expected = (len(iou_thresholds), len(recall_thresholds), len(class_names))
    if precision.shape != expected or not len(class_names):
        raise InputError(f"precision of shape {precision.shape}: expected {expected}, of at least one class")
    half = int(np.argmin(np.abs(iou_thresholds - 0.5)))
    three_quarters = int(np.argmin(np.abs(iou_thresholds - 0.75)))
    classes = len(class_names)
    overall = precision.mean(axis=2)
    means: list[_Curve] = [
        ("IoU 0.50", overall[half], "#20427c"),
        ("IoU 0.75", overall[three_quarters], "#5b8fd6"),
        (f"IoU {iou_thresholds[0]:.2f} to {iou_thresholds[-1]:.2f}", overall.mean(axis=0), "#e07b1a"),
    ]
    title = f"Precision and recall of {shorten(class_names[0], 4, 14, 'bold')}"
    blocks: list[tuple[str, list[_Curve], str, list[npt.NDArray[np.float64]]]] = [
        ("at three overlaps", means, "AP", [])
    ]
    if classes > 1:
        title = f"Precision and recall of {classes} classes"
        at_half = precision[half]
        order = np.argsort(at_half.mean(axis=0), kind="stable").tolist()
        few = classes <= COLOURED_UP_TO
        named = order[::-1] if few else order[:COLOURED_UP_TO]
        blocks = [
            ("mean over the classes", means, "AP", []),
            (
                "each class at IoU 0.50",
                [(class_names[k], at_half[:, k], _DARK[k if few else n]) for n, k in enumerate(named)],
                "AP50" if few else "lowest AP50; others are grey",
                [at_half[:, k] for k in order if k not in named],
            ),
        ]
    panels = []
    right = MARGIN
    for subtitle, curves, heading, others in blocks:
        panels.append(_Panel(right + 0.55, MARGIN + 0.72, 4.2, subtitle, heading, curves, others))
        right = panels[-1].right + 0.35
    width = max(right - 0.35 + MARGIN, text_width(title, 14, "bold") + 2 * MARGIN + 0.1)
    figure, sheet = new_sheet(width, panels[0].top + panels[0].side + 0.46 + MARGIN)
    put_text(sheet, MARGIN, MARGIN, title, 14, va="top", weight="bold")
    for panel in panels:
        panel.draw(sheet, recall_thresholds)
    return figure


# A name, the precision at each recall, and a colour.
_Curve = tuple[str, npt.NDArray[np.float64], str]


class _Panel(NamedTuple):
    """A square of precision over recall, from its upper left corner in inches, with a key on its right."""

    left: float
    top: float
    side: float
    title: str
    heading: str
    curves: list[_Curve]
    others: list[npt.NDArray[np.float64]]

    @property
    def right(self) -> float:
        names = max(text_width(shorten(name, 2.2, 9), 9) for name, _, _ in self.curves)
        return self.left + self.side + 0.2 + max(0.83 + names, text_width(self.heading, 9))

    def draw(self, sheet: Axes, recall: npt.NDArray[np.float64]) -> None:
        left, top, side = self.left, self.top, self.side
        put_text(sheet, left, top - 0.12, self.title, 10, va="baseline")
        for share in (0, 0.2, 0.4, 0.6, 0.8, 1):
            x, y = left + share * side, top + (1 - share) * side
            sheet.plot([x, x], [top, top + side], color=TRACK, linewidth=0.6)
            sheet.plot([left, left + side], [y, y], color=TRACK, linewidth=0.6)
            put_text(sheet, x, top + side + 0.06, f"{share:g}", 8.5, FAINT, ha="center", va="top")
            put_text(sheet, left - 0.07, y, f"{share:g}", 8.5, FAINT, ha="right", va="center_baseline")
        sheet.plot([left, left, left + side], [top, top + side, top + side], color=FAINT, linewidth=0.8)
        put_text(sheet, left + side / 2, top + side + 0.4, "recall", 9, FAINT, ha="center", va="baseline")
        put_text(sheet, left - 0.42, top + side / 2, "precision", 9, FAINT, ha="center", va="center", rotation=90)

        beside = left + side + 0.2
        y = top + 0.1
        put_text(sheet, beside, y, self.heading, 9, FAINT, va="baseline")
        for curve in self.others:
            sheet.plot(left + recall * side, top + (1 - curve) * side, color="#bdbdbd", linewidth=0.7)
        line = 2 if len(self.curves) <= 3 else 1.2
        for name, curve, colour in self.curves:
            y += 0.22
            sheet.plot(left + recall * side, top + (1 - curve) * side, color=colour, linewidth=line)
            sheet.plot([beside, beside + 0.25], [y - 0.045] * 2, color=colour, linewidth=line)
            put_text(sheet, beside + 0.33, y, f"{curve.mean():.3f}", 9, va="baseline", weight="bold")
            put_text(sheet, beside + 0.83, y, shorten(name, 2.2, 9), 9, va="baseline")


class _Tag(NamedTuple):
    """A name beside a box: its upper left corner and extent in inches, and its colour."""

    x: float
    y: float
    width: float
    height: float
    text: str
    colour: str

    def overlap(self, other: _Tag) -> float:
        """The common area."""
        width = min(self.x + self.width, other.x + other.width) - max(self.x, other.x)
        height = min(self.y + self.height, other.y + other.height) - max(self.y, other.y)
        return max(width, 0) * max(height, 0)


def _put_boxes(
    sheet: Axes,
    tile: Tile,
    size: tuple[int, int],
    detections: Mapping[str, Tensor],
    class_names: Sequence[str],
    target: Mapping[str, Tensor] | None,
    min_score: float,
    font: float,
    least: float,
) -> list[bool]:
    """Draws the boxes and names over a picture of that size in its tile; says which objects (no crowds) were found."""
    order = detections["scores"].argsort(descending=True, stable=True)
    order = order[detections["scores"][order] >= min_score]
    boxes, labels = detections["boxes"][order].float(), detections["labels"][order]
    scores = [f" {score:.0%}" for score in detections["scores"][order].tolist()]
    # In a crowd names shrink, lest they cover the picture.
    longest = (text_width(class_names[k - 1] + score, font) for k, score in zip(labels.tolist(), scores, strict=True))
    share = sum(longest) * font / 72 / (tile.width * tile.height)
    font = max(font * min(1, (0.2 / max(share, 1e-9)) ** 0.5), min(font, least))
    line = max(1.2, font / 4.5)

    def in_inches(xyxy: Tensor) -> tuple[float, float, float, float]:
        """The box on the sheet, kept inside the picture by half a line."""
        inset = min(line / 144, tile.width / 4, tile.height / 4)
        sides = []
        for value, pixels, start, extent in zip(
            xyxy.tolist(), size * 2, (tile.x, tile.y) * 2, (tile.width, tile.height) * 2, strict=True
        ):
            sides.append(start + min(max(value / pixels * extent, inset), extent - inset))
        x0, y0, x1, y1 = sides
        return x0, y0, x1, y1

    places = [in_inches(box) for box in boxes]
    # The best last, so that it lies on top.
    for (x0, y0, x1, y1), label in reversed(list(zip(places, labels.tolist(), strict=True))):
        for colour, extra, alpha in (("black", line * 0.7, 0.35), (colour_of(label), 0, 1)):
            frame = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=line + extra)
            frame.set(alpha=alpha, joinstyle="miter", zorder=3)
            sheet.add_patch(frame)

    tags: list[_Tag] = []
    for place, label, score in zip(places, labels.tolist(), scores, strict=True):
        tags += _tag(tile, place, class_names[label - 1], score, colour_of(label), font, line, tags)
    found: list[bool] = []
    if target is not None:
        objects, kinds = target["boxes"].float(), target["labels"]
        covered = (box_iou(objects, boxes) >= _FOUND_AT) & (kinds[:, None] == labels[None])
        crowds = target["iscrowd"].bool() if "iscrowd" in target else kinds.new_zeros(len(kinds)).bool()
        for box, kind, hit, crowd in zip(
            objects, kinds.tolist(), covered.any(dim=1).tolist(), crowds.tolist(), strict=True
        ):
            x0, y0, x1, y1 = in_inches(box)
            for colour, style in (("white", "solid"), ("black", (0, (3, 3)))):
                frame = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linestyle=style)
                frame.set(linewidth=max(line * 0.45, 0.8), capstyle="butt", joinstyle="miter", zorder=4)
                sheet.add_patch(frame)
            if not crowd:
                found.append(hit)
            if not crowd and not hit:
                tags += _tag(tile, (x0, y0, x1, y1), class_names[kind - 1], "", "#ffffff", font, line, tags)
    # The best on top here too, then the names of what was missed.
    for depth, tag in enumerate(tags):
        above = 6 + (1 if tag.colour == "#ffffff" else -depth / len(tags))
        sheet.add_patch(Rectangle((tag.x, tag.y), tag.width, tag.height, color=tag.colour, linewidth=0, zorder=above))
        ink = ink_on(to_rgb(tag.colour))
        x, baseline = tag.x + tag.width / 2, tag.y + font / 72
        put_text(sheet, x, baseline, tag.text, font, ink, ha="center", va="baseline", zorder=above)
    return found


def _tag(
    tile: Tile,
    place: tuple[float, float, float, float],
    name: str,
    score: str,
    colour: str,
    font: float,
    line: float,
    others: Sequence[_Tag],
) -> list[_Tag]:
    """A name at the first place about its box where it covers no other, or the one where it covers least.

    A picture too narrow for the score gets none.
    """
    pad = 0.22 * font / 72
    # Small letters on a coarse grid are rounded to whole pixels, up to a twentieth wider than they measure.
    coarse = 1.06
    room = (tile.width - 2 * pad) / coarse - text_width(score, font)
    height = 1.35 * font / 72
    if room < text_width("…", font) or tile.height < height:
        return []
    text = shorten(name, room, font) + score
    width = min(coarse * text_width(text, font) + 2 * pad, tile.width)
    half = line / 144
    x0, y0, x1, y1 = place[0] - half, place[1] - half, place[2] + half, place[3] + half
    corners = [
        *((x0, y0 - height), (x0, y0), (x1 - width, y0 - height), (x0, y1), (x1 - width, y1)),
        *((x1, y0), (x0 - width, y0), (x0, y1 - height), (x1 - width, y1 - height)),
    ]

    def fitted(corner: tuple[float, float]) -> _Tag:
        x = min(max(corner[0], tile.x), tile.x + tile.width - width)
        return _Tag(x, min(max(corner[1], tile.y), tile.floor - height), width, height, text, colour)

    # Moved sideways into the picture a name still stands at its box; moved up or down it may not.
    within = [(x, y) for x, y in corners if tile.y <= y <= tile.floor - height]
    return [min(map(fitted, within or corners), key=lambda tag: sum(tag.overlap(other) for other in others))]
