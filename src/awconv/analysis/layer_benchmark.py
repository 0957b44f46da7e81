"""What AW-convolution costs in time and memory, beside a plain convolution and its peers.

Run it as ``python -m awconv.analysis.benchmark layers``.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awconv.analysis.command import aligned_table
from awconv.analysis.measurement import MIB, PASSES, Call, Ceilings, measure_interleaved, memory_format_of
from awconv.layers import BACKENDS, AWConv2d
from awconv.layers.fused import unsupported

# The 3x3 convolutions of ResNet-50's four stages: channels in and out; height and width in pixels.
RESNET50_SHAPES: tuple[tuple[int, int], ...] = ((64, 56), (128, 28), (256, 14), (512, 7))
BASELINE = "Conv2d"  # what the others are compared with


class RoutedCondConv2d(nn.Module):
    """timm's conditional convolution (Yang et al., NeurIPS 2019, arXiv 1904.04971) with the routing that it needs.

    Routing as in timm's ``CondConvResidual``: global average pool, one linear layer, sigmoid.

    Args:
        channels: Number of input and of output channels C.
        num_experts: Number of kernels that are mixed.

    Shape:
        Input and output (N, C, H, W).
    """

    def __init__(self, channels: int, num_experts: int = 4) -> None:
        super().__init__()
        # timm takes seconds to import: a wrong argument should not wait for it
        from timm.layers.cond_conv2d import CondConv2d

        self.routing = nn.Linear(channels, num_experts)
        self.conv = CondConv2d(channels, channels, 3, padding=1, num_experts=num_experts)

    def forward(self, input: Tensor) -> Tensor:
        """Convolves each sample of ``input`` (N, C, H, W) with its own mixture of the experts."""
        weights = torch.sigmoid(self.routing(F.adaptive_avg_pool2d(input, 1).flatten(1)))
        output: Tensor = self.conv(input, weights)
        return output


def benchmark_layers(
    shapes: Sequence[tuple[int, int]],
    *,
    device: str,
    batch: int,
    dtype: torch.dtype,
    repeats: int,
    deadline: float = math.inf,
) -> list[dict[str, Any]]:
    """Compares a plain convolution, AW-convolution with each backend, and CondConv on 3x3 layers of stride 1.

    ``forward`` is in evaluation mode without a graph; ``forward+backward`` is in training mode with gradients to
    the input and to every parameter. All contenders of a shape see the same input. On CUDA inputs and layers are in
    channels_last, and what is timed are replays of CUDA graphs: the kernels, and not how long Python takes to launch
    them (networks are timed as they are trained). An input that fits into the L2 cache is there from the call before.

    Args:
        shapes: Channels in and out, and height and width in pixels, of each layer.
        device: ``"cpu"`` or ``"cuda"``.
        batch: Number of samples N.
        dtype: Type of inputs and parameters.
        repeats: Visits to each contender.
        deadline: See :func:`measure_interleaved`.

    Returns:
        One record for each shape, pass and contender that was reached: ``channels``, ``size`` (pixels), ``pass``,
        ``contender``, ``median_ms`` and ``quartiles_ms`` a call, ``ratio`` (the median over that of the plain
        convolution; None where only one of the two is a replay), ``peak_memory`` (bytes beyond input and parameters),
        ``flops`` and ``bytes`` (what the convolution cannot do without, its attention maps included but not the head
        that makes them), ``replayed`` (whether from a CUDA graph), and ``times_ms``, one for each repeat; the median is
        None for what ``deadline`` left out.
    """
    torch.manual_seed(0)
    keys: list[dict[str, Any]] = []
    cases: list[dict[str, Call]] = []
    memory_format = getattr(torch, memory_format_of(device))
    for channels, size in shapes:
        for name in PASSES:
            input = torch.randn(batch, channels, size, size, device=device, dtype=dtype)
            input = input.contiguous(memory_format=memory_format)
            keys.append({"channels": channels, "size": size, "pass": name})
            calls = {}
            for contender, layer in _layer_contenders(channels, input).items():
                layer = layer.to(device, dtype).to(memory_format=memory_format)
                calls[contender] = _layer_call(layer, input, training=name != "forward")
            cases.append(calls)
    rows = []
    measured = measure_interleaved(cases, repeats=repeats, device=device, replay=True, deadline=deadline)
    for key, case, results in zip(keys, cases, measured, strict=True):
        for contender in case:
            row: dict[str, Any] = {**key, "contender": contender, "median_ms": None}
            rows.append(row)
            if contender in results and BASELINE in results:
                result, baseline = results[contender], results[BASELINE]
                first, median, third = result.quartiles
                # Python's time to launch, which only a call includes, is no property of a layer
                comparable = result.replayed == baseline.replayed
                row |= {
                    "median_ms": 1e3 * median,
                    "quartiles_ms": [1e3 * first, 1e3 * third],
                    "ratio": median / baseline.quartiles[1] if comparable else None,
                    "peak_memory": result.peak_memory,
                    **_least_work(key["channels"], key["size"], key["pass"], contender, batch, dtype.itemsize),
                    "replayed": result.replayed,
                    "times_ms": [1e3 * t for t in result.times],
                }
    return rows


def floor_ms(row: Mapping[str, Any], ceilings: Ceilings) -> float:
    """The time that no implementation of a record's convolution can beat at these rates (the roofline)."""
    flops, moved = float(row["flops"]), float(row["bytes"])
    return 1e3 * max(flops / ceilings.flops, moved / ceilings.bandwidth)


def layers_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lays the records of :func:`benchmark_layers` out as an aligned Markdown table, both passes side by side.

    Args:
        rows: The records, each with a ``floor_ms`` (see :func:`floor_ms`) besides.
    """
    head = ["3x3 layer", "contender"]
    for name in PASSES:
        head += [f"{name}, ms", "floor", "ratio", "MiB"]
    lines: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        layer = f"{row['channels']} ch, {row['size']}x{row['size']}"
        cells = lines.setdefault((layer, row["contender"]), [layer, row["contender"]])
        if row["median_ms"] is None:
            cells += ["not reached", "", "", ""]
            continue
        low, high = row["quartiles_ms"]
        cells += [
            f"{row['median_ms']:.2f} ({low:.2f}-{high:.2f})",
            f"{row['floor_ms']:.2f}",
            "none" if row["ratio"] is None else f"{row['ratio']:.2f}",
            f"{row['peak_memory'] / MIB:.1f}",
        ]
    return aligned_table(head, list(lines.values()), left=2)


def _layer_contenders(channels: int, input: Tensor) -> dict[str, nn.Module]:
    contenders: dict[str, nn.Module] = {BASELINE: nn.Conv2d(channels, channels, 3, padding=1, bias=False)}
    for backend in BACKENDS:
        if backend == "fused" and unsupported(input) is not None:
            continue  # a CUDA device without Triton
        contenders[f"AWConv2d {backend}"] = AWConv2d(channels, channels, 3, padding=1, bias=False, backend=backend)
    contenders["CondConv2d"] = RoutedCondConv2d(channels)
    return contenders


def _least_work(channels: int, size: int, name: str, contender: str, batch: int, itemsize: int) -> dict[str, int]:
    """Counts additions and multiplications, and bytes that are read once or written once."""
    numbers, kernel = batch * channels * size**2, 9 * channels**2
    if contender.startswith("AWConv2d"):
        layer = AWConv2d(channels, channels, 3, device="meta")
        kernel += batch * 9 * channels * (channels // layer.share)
    products = 1 if name == "forward" else 3
    # forward: input and kernel, to output; backward: gradient, input and kernel, to gradients of input and kernel
    tensors = 2 * numbers + kernel if name == "forward" else 5 * numbers + 3 * kernel
    return {"flops": products * 2 * numbers * 9 * channels, "bytes": itemsize * tensors}


def _layer_call(layer: nn.Module, input: Tensor, *, training: bool) -> Call:
    layer.train(training)
    if not training:

        def infer() -> Tensor:
            with torch.no_grad():
                output: Tensor = layer(input)
            return output

        return infer
    # a leaf of its own for each contender, of the same memory
    leaf = input.detach().requires_grad_()
    wanted = [leaf, *layer.parameters()]
    gradient = torch.randn_like(input)

    def train() -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(leaf), wanted, gradient)

    return train
