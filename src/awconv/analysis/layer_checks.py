"""Whether the fused kernels compute what they should, and what a layer launches: what is asked before and after timing.

Run it as ``python -m awconv.analysis.benchmark check`` and ``profile``.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from awconv.analysis.command import aligned_table
from awconv.analysis.measurement import PASSES, Call, memory_format_of
from awconv.layers import AWConv2d, aw_conv2d, aw_conv2d_with_logits

# How float32 is multiplied, and the relative error in the norm that is taken for rounding: of sums of some thousand
# products, whose factors have 24, 11 and 8 bits.
_PRECISIONS = {
    "float32": (torch.float32, "ieee", 1e-5),
    "float32 by tf32": (torch.float32, "tf32", 2e-3),
    "bfloat16": (torch.bfloat16, "ieee", 1e-2),
}
_PARTS = ("output", "input", "weight", "maps")
# from so many on the head of a layer leaves its maps with the output channels innermost
_MANY_MAPS = 4096
_LAYER_PARTS = ("layer", "convolution")
_SHOWN = 12
# operators that touch no numbers
_METADATA = re.compile(
    "_unsafe_view|alias|as_strided|detach|empty|expand|narrow|permute|resize|resolve|select|slice|split|squeeze|t$|"
    "transpose|unsqueeze|view"
)


Row = dict[str, Any]
Report = Callable[[list[Row]], object]


def check_numerics(
    shapes: Sequence[tuple[int, int]],
    *,
    device: str,
    batch: int,
    deadline: float = math.inf,
    report: Report = lambda rows: None,
) -> list[Row]:
    """Compares backend ``fused``, output and gradients, with backend ``gemm`` in float64, on 3x3 layers of stride 1.

    Backend ``fused`` is given logits, which lie in memory as a layer's head leaves them; on the last shape also the
    attention itself. The reference is given the same rounded numbers, and the attention that they mean. Memory that the
    operators are likely to be given holds NaN before, so that what they do not write shows.

    Args:
        shapes: Channels in and out, and height and width in pixels; the last ones are looked at first.
        device: ``"cpu"`` or ``"cuda"``.
        batch: Number of samples.
        deadline: Value of ``time.perf_counter``; a shape is begun where the slowest one so far would end before.
        report: Called with all records before the first shape and after each.

    Returns:
        One record for each shape, what is given, and precision: ``channels``, ``size``, ``given`` (``logits`` or
        ``attention``), ``precision``, ``ok`` (None for what ``deadline`` left out), ``errors`` (by the name of a part;
        relative, in the norm; None where it is not a number) and ``bound``.
    """
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision
    keys = [
        {"channels": channels, "size": size, "given": given, "precision": precision}
        for channels, size in reversed(shapes)
        for given in (("logits", "attention") if (channels, size) == shapes[-1] else ("logits",))
        for precision, (_, products, _) in _PRECISIONS.items()
        if products != "tf32" or device == "cuda"
    ]

    def check(channels: int, size: int) -> Iterator[Row]:
        exact, gradient = _random_arguments(channels, size, device, batch, torch.float64)
        for key in keys:
            if (key["channels"], key["size"]) == (channels, size):
                yield _compared([*exact, gradient], str(key["given"]), str(key["precision"]))

    try:
        return _shape_by_shape(shapes, check, [{**key, "ok": None} for key in keys], deadline, report)
    finally:
        convolutions.fp32_precision = before


def errors_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lays the records of :func:`check_numerics` out as an aligned Markdown table."""
    body = []
    for row in rows:
        name = [_name(row), row["given"], row["precision"]]
        if row["ok"] is None:
            body.append([*name, "not reached", *[""] * len(_PARTS), ""])
            continue
        errors = ["not a number" if e is None else f"{e:.1e}" for e in row["errors"].values()]
        verdict = "ok" if row["ok"] else "TOO LARGE"
        body.append([*name, verdict, *errors, f"{row['bound']:.0e}"])
    return aligned_table(["3x3 layer", "given", "precision", "error", *_PARTS, "bound"], body, left=4)


def profile_layers(
    shapes: Sequence[tuple[int, int]],
    *,
    device: str,
    batch: int,
    dtype: torch.dtype,
    deadline: float = math.inf,
    report: Report = lambda rows: None,
) -> list[Row]:
    """Lists what ``AWConv2d`` with its default backend launches, whole, and its convolution with the logits given.

    What the whole layer launches beyond the convolution is the head's. On CUDA a launch is a kernel, a copy or a fill;
    on a CPU it is an operator of torch that computes by itself, and not by others.

    Args:
        shapes: Channels in and out, and height and width in pixels; the last ones are looked at first.
        device: ``"cpu"`` or ``"cuda"``.
        batch: Number of samples.
        dtype: Type of inputs and parameters.
        deadline: Value of ``time.perf_counter``; a shape is begun where the slowest one so far would end before.
        report: Called with all records before the first shape and after each.

    Returns:
        One record for each shape, pass and part (``layer`` or ``convolution``): ``channels``, ``size``, ``pass``,
        ``part``, ``launches`` (None for what ``deadline`` left out) and ``us`` (microseconds, of all of them, one after
        the other), and ``kernels``, each with ``name``, ``calls`` and ``us``, the slowest one first.
    """
    torch.manual_seed(0)

    def profile(channels: int, size: int) -> Iterator[Row]:
        for (name, part), call in _parts_of_layer(channels, size, device, batch, dtype):
            kernels = _launches(call, device)
            yield {
                "channels": channels,
                "size": size,
                "pass": name,
                "part": part,
                "launches": sum(kernel["calls"] for kernel in kernels),
                "us": sum(kernel["us"] for kernel in kernels),
                "kernels": kernels,
            }

    unreached = [
        {"channels": channels, "size": size, "pass": name, "part": part, "launches": None}
        for channels, size in reversed(shapes)
        for name in PASSES
        for part in _LAYER_PARTS
    ]
    return _shape_by_shape(shapes, profile, unreached, deadline, report)


def launches_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lays out how many launches, and how much time in them, a layer and its parts take, as a Markdown table."""
    found = {(_name(row), row["pass"], row["part"]): row for row in rows}
    body = []
    for layer, name, part in found:
        if part == "layer":
            whole, convolution = found[layer, name, "layer"], found[layer, name, "convolution"]
            if whole["launches"] is None:
                body.append([layer, name, "not reached", *[""] * 5])
                continue
            cells = [
                cell
                for key, text in (("launches", "{:.0f}"), ("us", "{:.1f}"))
                for cell in (
                    text.format(whole[key]),
                    text.format(convolution[key]),
                    text.format(whole[key] - convolution[key]),
                )
            ]
            body.append([layer, name, *cells])
    return aligned_table(
        ["3x3 layer", "pass", "launches", "convolution", "head", "all, us", "convolution", "head"], body, left=2
    )


def slowest_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lays out the slowest kernels of each layer's forward and backward pass together, as a Markdown table."""
    body = [
        [_name(row), kernel["name"][:60], str(kernel["calls"]), f"{kernel['us']:.1f}"]
        for row in rows
        if row["part"] == "layer" and row["pass"] == PASSES[1] and row["launches"] is not None
        for kernel in row["kernels"][:_SHOWN]
    ]
    return aligned_table(["3x3 layer", "kernel", "calls", "us"], body, left=2)


def _shape_by_shape(
    shapes: Sequence[tuple[int, int]],
    rows_of: Callable[[int, int], Iterator[Row]],
    unreached: list[Row],
    deadline: float,
    report: Report,
) -> list[Row]:
    """Replaces the records of one shape after the other, the last one first, as long as there is time."""
    rows, slowest = unreached, 0.0
    report(rows)
    for shape in reversed(shapes):
        start = perf_counter()
        if start + slowest >= deadline:
            break
        found = list(rows_of(*shape))
        slowest = max(slowest, perf_counter() - start)
        place = next(i for i, row in enumerate(rows) if (row["channels"], row["size"]) == shape)
        rows = [*rows[:place], *found, *rows[place + len(found) :]]
        report(rows)
    return rows


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['channels']} ch, {row['size']}x{row['size']}"


def _random_arguments(
    channels: int, size: int, device: str, batch: int, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """Draws input, weight and logits of the attention as leaves, and a gradient of the output.

    The logits, unexpanded, lie in memory as a layer's head leaves them.
    """
    generator = torch.Generator(device).manual_seed(0)
    maps = channels // AWConv2d(channels, channels, 3, device="meta").share

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    memory_format = getattr(torch, memory_format_of(device))
    input, gradient = (draw(batch, channels, size, size).contiguous(memory_format=memory_format) for _ in range(2))
    weight = (draw(channels, channels, 3, 3) / (3 * math.sqrt(channels))).contiguous(memory_format=memory_format)
    if channels * maps >= _MANY_MAPS:
        logits = draw(batch, 3, 3, maps, channels).permute(0, 4, 3, 1, 2)
    else:  # a 1x1 convolution in channels_last
        logits = draw(batch, 3, 3, channels, maps).permute(0, 3, 4, 1, 2)
    return [value.requires_grad_() for value in (input, weight, logits)], gradient


def _compared(exact: Sequence[Tensor], given: str, precision: str) -> Row:
    """The record of one comparison; ``exact`` are input, weight, logits, and the gradient of the output."""
    dtype, products, bound = _PRECISIONS[precision]
    channels, size = exact[0].shape[1:3]
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    convolutions.fp32_precision = products
    input, weight, maps, gradient = (value.detach() for value in exact)
    if given == "attention":
        maps = maps.sigmoid().contiguous()
    rounded = [value.to(dtype) for value in (input, weight, maps, gradient)]
    compute = aw_conv2d_with_logits if given == "logits" else aw_conv2d

    def plainly(input: Tensor, weight: Tensor, maps: Tensor) -> Tensor:
        return aw_conv2d(input, weight, maps.sigmoid() if given == "logits" else maps, padding=1, backend="gemm")

    wanted = _results([value.double() for value in rounded], plainly)
    poison = [torch.full_like(value, math.nan) for value in (*rounded, rounded[0])]
    del poison
    got = _results(rounded, partial(compute, padding=1, backend="fused"))
    errors = {name: float((a.double() - b).norm() / b.norm()) for name, a, b in zip(_PARTS, got, wanted, strict=True)}
    return {
        "channels": channels,
        "size": size,
        "given": given,
        "precision": precision,
        "errors": {name: e if math.isfinite(e) else None for name, e in errors.items()},
        "bound": bound,
        "ok": all(error <= bound for error in errors.values()),
    }


def _results(values: Sequence[Tensor], compute: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    *arguments, gradient = values
    # detached: float64 of float64 is the same tensor, and not a leaf of its own
    leaves = [value.detach().requires_grad_() for value in arguments]
    output = compute(*leaves)
    return output.detach(), *torch.autograd.grad(output, leaves, gradient)


def _parts_of_layer(
    channels: int, size: int, device: str, batch: int, dtype: torch.dtype
) -> Iterator[tuple[tuple[str, str], Call]]:
    (input, weight, logits), gradient = _random_arguments(channels, size, device, batch, dtype)
    layer = AWConv2d(channels, channels, 3, padding=1, bias=False).to(device, dtype)
    layer = layer.to(memory_format=getattr(torch, memory_format_of(device)))
    parts = {
        "layer": (partial(layer, input), [input, *layer.parameters()]),
        "convolution": (partial(aw_conv2d_with_logits, input, weight, logits, padding=1), [input, weight, logits]),
    }
    for name in PASSES:
        training = name != "forward"
        layer.train(training)
        for part, (forward, leaves) in parts.items():
            yield (name, part), partial(_run, forward, leaves, gradient if training else None)


def _run(forward: Callable[[], Tensor], leaves: list[Tensor], gradient: Tensor | None) -> None:
    if gradient is None:
        with torch.no_grad():
            forward()
    else:
        torch.autograd.grad(forward(), leaves, gradient)


def _launches(call: Call, device: str) -> list[dict[str, Any]]:
    for _ in range(2):  # what is compiled or chosen at first is not what a training repeats
        call()
    on_cuda = device == "cuda"
    if on_cuda:
        torch.cuda.synchronize()
    # as in peak_memory
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        call()
        if on_cuda:
            torch.cuda.synchronize()
    calls: Counter[str] = Counter()
    microseconds: Counter[str] = Counter()
    for event in profile.events():
        if event.device_type.name == "CUDA" if on_cuda else _computes(event):
            calls[event.name] += 1
            microseconds[event.name] += event.self_device_time_total if on_cuda else event.self_cpu_time_total
    return [{"name": name, "calls": calls[name], "us": time} for name, time in microseconds.most_common()]


def _computes(event: Any) -> bool:
    """Whether an event of a CPU's profile is an operator that computes by itself, rather than by others."""
    operator = event.name.removeprefix("aten::")
    if operator == event.name or _METADATA.match(operator):
        return False
    return not any(map(_computes, event.cpu_children))
