"""A picture of what ``python -m awconv.analysis.benchmark layers --json FILE`` recorded."""

from collections.abc import Mapping
from io import BytesIO
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_PLAIN, _PASS = "Conv2d", "forward+backward"
# in the order of the bars; what is not among them is not drawn
_COLOURS = {
    "AWConv2d auto": "#1f4e9c",
    "AWConv2d fused": "#6c93d1",
    "AWConv2d grouped": "#b9cbe9",
    "AWConv2d gemm": "#dde6f4",
    "CondConv2d": "#d9a05b",
}
_INK, _FAINT = "#1a1a1a", "#777777"


def draw_layers(record: Mapping[str, Any]) -> bytes:
    """Draws time and peak memory of forward and backward as multiples of the plain convolution's.

    Args:
        record: What the benchmark of the layers wrote. What has no ratio there, since a time limit left it out or it
            was measured in another way, is not drawn.

    Returns:
        A PNG.
    """
    rows = [row for row in record["rows"] if row["pass"] == _PASS and row.get("ratio") is not None]
    shapes = list(dict.fromkeys((row["channels"], row["size"]) for row in rows))
    contenders = [name for name in _COLOURS if any(row["contender"] == name for row in rows)]
    by_key = {(row["channels"], row["size"], row["contender"]): row for row in rows}
    figure = Figure(figsize=(9.0, 1.2 + 1.05 * len(shapes)), dpi=120, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    time, memory = figure.subplots(1, 2, sharey=True)
    for axes, title in ((time, "time"), (memory, "peak memory")):
        ratios = {}
        for (channels, size, name), row in by_key.items():
            plain = by_key[channels, size, _PLAIN]
            key = "median_ms" if axes is time else "peak_memory"
            ratios[channels, size, name] = row[key] / plain[key]
        _draw_bars(axes, shapes, contenders, ratios)
        axes.set_title(f"{title}, multiples of {_PLAIN}'s", fontsize=10, color=_INK, loc="left")
    time.set_yticks(range(len(shapes)), [f"{channels} channels\n{size}x{size}" for channels, size in shapes])
    for axes in (time, memory):
        axes.tick_params(axis="y", length=0, labelsize=9)
    time.invert_yaxis()
    handles, labels = time.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8.5, frameon=False)
    arguments = record["arguments"]
    repeats = ", ".join(map(str, sorted({len(row["times_ms"]) for row in rows})))
    about = (
        f"3x3 layers, forward and backward, batch {arguments['batch']}, {arguments['dtype']}; {record['machine']}, "
        f"torch {record['versions']['torch']}, {record['date']}; medians of {repeats} interleaved repeats"
    )
    figure.supxlabel(about, fontsize=7.5, color=_FAINT)
    content = BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def _draw_bars(
    axes: Axes, shapes: list[tuple[int, int]], contenders: list[str], ratios: Mapping[tuple[int, int, str], float]
) -> None:
    thickness = 0.8 / len(contenders)
    for place, name in enumerate(contenders):
        offset = (place + 0.5) * thickness - 0.4
        rows = [row for row, shape in enumerate(shapes) if (*shape, name) in ratios]
        widths = [ratios[(*shapes[row], name)] for row in rows]
        bars = axes.barh(
            [row + offset for row in rows],
            [width - 1 for width in widths],
            left=1,
            height=0.9 * thickness,
            color=_COLOURS[name],
            label=name,
        )
        axes.bar_label(bars, [f"{width:.2f}" if width < 10 else f"{width:.1f}" for width in widths], padding=2, size=7)
    axes.set_xscale("log")
    axes.set_xlim(min(0.7, 0.7 * min(ratios.values())), 1.6 * max(ratios.values()))
    ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50, 100) if axes.get_xlim()[0] < tick < axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
    axes.minorticks_off()
    axes.axvline(1, color=_INK, linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
