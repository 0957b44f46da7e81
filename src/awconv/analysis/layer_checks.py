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

from awconv.analysis.benchmark import PASSES, Call, memory_format_of
from awconv.analysis.command import aligned_table
from awconv.layers import AWConv2d, aw_conv2d

# How float32 is multiplied, and the relative error in the norm that is taken for rounding: of sums of some thousand
# products, whose factors have 24, 11 and 8 bits.
_PRECISIONS = {
    "float32": (torch.float32, "ieee", 1e-5),
    "float32 by tf32": (torch.float32, "tf32", 2e-3),
    "bfloat16": (torch.bfloat16, "ieee", 1e-2),
}
_PARTS = ("output", "input", "weight", "attention")
_SHOWN = 12
# operators that touch no numbers
_METADATA = re.compile(
    "_unsafe_view|alias|as_strided|detach|empty|expand|narrow|permute|resize|resolve|select|slice|split|squeeze|t$|"
    "transpose|unsqueeze|view"
)


def check_numerics(
    shapes: Sequence[tuple[int, int]], *, device: str, batch: int, deadline: float = math.inf
) -> list[dict[str, Any]]:
    """Compares backend ``fused``, output and gradients, with backend ``gemm`` in float64, on 3x3 layers of stride 1.

    The reference is given the same rounded numbers. Memory that the operators are likely to be given holds NaN before,
    so that what they do not write shows.

    Args:
        shapes: Channels in and out, and height and width in pixels; the last ones are looked at first.
        device: ``"cpu"`` or ``"cuda"``.
        batch: Number of samples.
        deadline: Value of ``time.perf_counter`` from which on no other shape is begun.

    Returns:
        One record for each shape and precision: ``channels``, ``size``, ``precision``, ``errors`` (by the name of a
        part; relative, in the norm; None where it is not a number), ``bound`` and ``ok``.
    """
    rows = []
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision
    try:
        for channels, size in reversed(shapes):
            if perf_counter() >= deadline:
                break
            exact, gradient = _random_arguments(channels, size, device, batch, torch.float64)
            for precision, (dtype, products, bound) in _PRECISIONS.items():
                if products == "tf32" and device != "cuda":
                    continue
                convolutions.fp32_precision = products
                rounded = [value.detach().to(dtype) for value in (*exact, gradient)]
                wanted = _results([value.double() for value in rounded], "gemm")
                poison = [torch.full_like(value, math.nan) for value in (*rounded, rounded[0])]
                del poison
                got = _results(rounded, "fused")
                errors = {
                    name: float((a.double() - b).norm() / b.norm())
                    for name, a, b in zip(_PARTS, got, wanted, strict=True)
                }
                rows.append(
                    {
                        "channels": channels,
                        "size": size,
                        "precision": precision,
                        "errors": {name: e if math.isfinite(e) else None for name, e in errors.items()},
                        "bound": bound,
                        "ok": all(error <= bound for error in errors.values()),
                    }
                )
    finally:
        convolutions.fp32_precision = before
    return rows


def errors_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lays the records of :func:`check_numerics` out as an aligned Markdown table."""
    body = []
    for row in rows:
        errors = ["not a number" if e is None else f"{e:.1e}" for e in row["errors"].values()]
        verdict = "ok" if row["ok"] else "TOO LARGE"
        body.append([_name(row), row["precision"], verdict, *errors, f"{row['bound']:.0e}"])
    return aligned_table(["3x3 layer", "precision", "error", *_PARTS, "bound"], body, left=3)


def profile_layers(
    shapes: Sequence[tuple[int, int]], *, device: str, batch: int, dtype: torch.dtype, deadline: float = math.inf
) -> list[dict[str, Any]]:
    """Lists what ``AWConv2d`` with its default backend launches, whole, and its convolution with the maps given.

    What the whole layer launches beyond the convolution is the head's. On CUDA a launch is a kernel, a copy or a fill;
    on a CPU it is an operator of torch that computes by itself, and not by others.

    Args:
        shapes: Channels in and out, and height and width in pixels; the last ones are looked at first.
        device: ``"cpu"`` or ``"cuda"``.
        batch: Number of samples.
        dtype: Type of inputs and parameters.
        deadline: Value of ``time.perf_counter`` from which on no other shape is begun.

    Returns:
        One record for each shape, pass and part (``layer`` or ``convolution``): ``channels``, ``size``, ``pass``,
        ``part``, ``launches`` and ``us`` (microseconds, of all of them, one after the other), and ``kernels``, each
        with ``name``, ``calls`` and ``us``, the slowest one first.
    """
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for channels, size in reversed(shapes):
        if perf_counter() >= deadline:
            break
        for (name, part), call in _parts_of_layer(channels, size, device, batch, dtype):
            kernels = _launches(call, device)
            rows.append(
                {
                    "channels": channels,
                    "size": size,
                    "pass": name,
                    "part": part,
                    "launches": sum(kernel["calls"] for kernel in kernels),
                    "us": sum(kernel["us"] for kernel in kernels),
                    "kernels": kernels,
                }
            )
    return rows


def launches_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lays out how many launches, and how much time in them, a layer and its parts take, as a Markdown table."""
    found = {(_name(row), row["pass"], row["part"]): row for row in rows}
    body = []
    for layer, name, part in found:
        if part == "layer":
            whole, convolution = found[layer, name, "layer"], found[layer, name, "convolution"]
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
        if row["part"] == "layer" and row["pass"] == PASSES[1]
        for kernel in row["kernels"][:_SHOWN]
    ]
    return aligned_table(["3x3 layer", "kernel", "calls", "us"], body, left=2)


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['channels']} ch, {row['size']}x{row['size']}"


def _random_arguments(
    channels: int, size: int, device: str, batch: int, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """Draws input, weight and attention, unexpanded, as leaves, and a gradient of the output."""
    generator = torch.Generator(device).manual_seed(0)
    maps = channels // AWConv2d(channels, channels, 3, device="meta").share

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    memory_format = getattr(torch, memory_format_of(device))
    input, gradient = (draw(batch, channels, size, size).contiguous(memory_format=memory_format) for _ in range(2))
    weight = (draw(channels, channels, 3, 3) / (3 * math.sqrt(channels))).contiguous(memory_format=memory_format)
    attention = draw(batch, channels, maps, 3, 3).sigmoid()
    return [value.requires_grad_() for value in (input, weight, attention)], gradient


def _results(values: Sequence[Tensor], backend: str) -> tuple[Tensor, ...]:
    *arguments, gradient = values
    leaves = [value.requires_grad_() for value in arguments]
    output = aw_conv2d(*leaves, padding=1, backend=backend)  # type: ignore[arg-type, misc]
    return output.detach(), *torch.autograd.grad(output, leaves, gradient)


def _parts_of_layer(
    channels: int, size: int, device: str, batch: int, dtype: torch.dtype
) -> Iterator[tuple[tuple[str, str], Call]]:
    (input, weight, attention), gradient = _random_arguments(channels, size, device, batch, dtype)
    layer = AWConv2d(channels, channels, 3, padding=1, bias=False).to(device, dtype)
    layer = layer.to(memory_format=getattr(torch, memory_format_of(device)))
    parts = {
        "layer": (partial(layer, input), [input, *layer.parameters()]),
        "convolution": (partial(aw_conv2d, input, weight, attention, padding=1), [input, weight, attention]),
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
