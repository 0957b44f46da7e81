"""What AW-convolution costs in time and memory, beside a plain convolution and its peers.

Run it as ``python -m awconv.analysis.benchmark layers``, ``network`` or ``loader``; ``check`` compares numbers with
float64, ``profile`` counts launches, ``all`` does everything within a number of minutes, and ``draw`` draws a record.
"""

import argparse
import gc
import json
import math
import os
import platform
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awconv.analysis.command import OneLineParser, aligned_table
from awconv.errors import InputError
from awconv.layers import BACKENDS, AWConv2d
from awconv.layers.fused import unsupported

# The 3x3 convolutions of ResNet-50's four stages: channels in and out; height and width in pixels.
RESNET50_SHAPES: tuple[tuple[int, int], ...] = ((64, 56), (128, 28), (256, 14), (512, 7))
_BASELINE = "Conv2d"
PASSES = ("forward", "forward+backward")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BATCHES = {"cpu": 16, "cuda": 256}
_REPEATS, _QUICK_REPEATS = 20, 3
# Fewer have no quartiles to speak of: a time limit rather leaves contenders out.
_LEAST_REPEATS = 3
# Shorter visits would time the clock and, on CUDA, the launch of the first kernel.
_SECONDS_A_VISIT = 0.01
MIB = 2**20

Call = Callable[[], object]


class Measurement(NamedTuple):
    """What one contender took.

    Attributes:
        times: Seconds a call, one value for each repeat, in the order of the repeats.
        peak_memory: Largest number of bytes that one call held at once, beyond what was there before it; 0 where it was
            not metered.
        replayed: Whether the times are those of a CUDA graph, which the host launches at once, rather than of calls.
    """

    times: list[float]
    peak_memory: int
    replayed: bool = False

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """First quartile, median and third quartile of ``times``, in seconds."""
        times = torch.tensor(self.times, dtype=torch.float64)
        first, median, third = times.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
        return first, median, third


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


def measure_interleaved(
    cases: Sequence[Mapping[str, Call]],
    *,
    repeats: int,
    device: str = "cpu",
    seed: int = 0,
    meter_memory: bool = True,
    replay: bool = False,
    deadline: float = math.inf,
    kinds: Sequence[str] | None = None,
) -> list[dict[str, Measurement]]:
    """Times contenders side by side: every repeat visits every contender of every case.

    A machine that slows down or is disturbed thereby disturbs all contenders alike. Each contender is first run twice
    to warm up, then once to meter its memory; then every repeat walks through the cases and, within each, through
    its contenders, both in an order shuffled from ``seed``. A visit makes as many calls as fill 10 ms, at least one.

    Contenders are warmed up in the order of their importance: the first ones of all cases, last case first, then the
    second ones. One is left out where, before ``deadline``, it could not be warmed up (it is given twice the time of
    the slowest one of its kind so far, the first of a kind that of the slowest one of all) and visited 3 times with all
    others, or where the first one of its case was; then repeats are made as long as there is time.

    Args:
        cases: Each maps the names of contenders that are compared with the first one to calls without arguments.
        repeats: Number of visits to each contender, at least 1.
        device: ``"cpu"`` or ``"cuda"``: where the calls compute.
        seed: Of the order of the visits.
        meter_memory: Whether peak memory is wanted too.
        replay: Whether calls on CUDA are captured in graphs, whose replays are timed. Python takes longer to launch the
            kernels of a small layer than a GPU to compute them. What cannot be captured is called.
        deadline: Value of ``time.perf_counter`` at which there should be an end.
        kinds: For each case, a name of those whose warm-ups take about as long; None where all do.

    Returns:
        For each case, a measurement under each contender's name; without those that were left out.
    """
    least = min(repeats, _LEAST_REPEATS)
    pool = torch.cuda.graph_pool_handle() if replay and device == "cuda" else None
    calls: dict[tuple[int, str], Call] = {}
    calls_a_visit: dict[tuple[int, str], int] = {}
    peaks: dict[tuple[int, str], int] = {}
    times: dict[tuple[int, str], list[float]] = {}
    replayed: dict[tuple[int, str], bool] = {}
    longest: dict[str, float] = {}
    a_round = 0.0
    for index, name in _by_importance(cases):
        kind = "" if kinds is None else kinds[index]
        wanted = 2 * longest[kind] if kind in longest else max(longest.values(), default=0.0)
        first = next(iter(cases[index]))
        start = perf_counter()
        if start + wanted + least * a_round >= deadline or (name != first and (index, first) not in calls):
            continue
        call = cases[index][name]
        _time(call, 1, device)
        seconds = _time(call, 1, device)
        peak = peak_memory(call, device) if meter_memory else 0
        graph = None if pool is None else _captured(call, pool)
        if graph is not None:
            call, seconds = graph, _time(graph, 1, device)
        number = max(1, math.ceil(_SECONDS_A_VISIT / seconds))
        now = perf_counter()
        if now + least * (a_round + number * seconds) >= deadline:
            continue
        longest[kind] = max(longest.get(kind, 0.0), now - start)
        a_round += number * seconds
        key = index, name
        calls[key], calls_a_visit[key], peaks[key], times[key], replayed[key] = (
            call,
            number,
            peak,
            [],
            graph is not None,
        )
    order = random.Random(seed)
    for repeat in range(repeats):
        if repeat >= least and perf_counter() + a_round >= deadline:
            break
        for index in order.sample(range(len(cases)), len(cases)):
            for name in order.sample(list(cases[index]), len(cases[index])):
                key = index, name
                if key in calls:
                    times[key].append(_time(calls[key], calls_a_visit[key], device))
    return [
        {
            name: Measurement(times[index, name], peaks[index, name], replayed[index, name])
            for name in case
            if (index, name) in times
        }
        for index, case in enumerate(cases)
    ]


def peak_memory(call: Call, device: str = "cpu") -> int:
    """Finds the largest number of bytes that ``call`` holds at once, its result included.

    Counted is what torch's allocators hand out during the call, oneDNN's and cuDNN's working memory included; what was
    allocated before it is not, and neither are buffers that other libraries take from the system by themselves.

    Args:
        call: A call without arguments.
        device: ``"cpu"`` or ``"cuda"``: whose memory is meant.

    Returns:
        Bytes.
    """
    # garbage of earlier calls that is collected during this one would count as its own
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # the profiler's own remarks ("no GPU found") would stand in the middle of a table
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    return _highest_sum(_cpu_allocations(profile))


class Ceilings(NamedTuple):
    """The highest rates that a device was seen to reach, for one dtype.

    Attributes:
        flops: Additions and multiplications a second, of a large matrix product.
        bandwidth: Bytes read and written a second, of a large copy.
    """

    flops: float
    bandwidth: float


def measure_ceilings(device: str, dtype: torch.dtype, *, repeats: int = 30) -> Ceilings:
    """Measures what a device reaches at best, as opposed to what its maker says.

    The product is tried as torch's own and as a 1x1 convolution, of which the faster one counts: on a CPU they are
    computed by different libraries.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        dtype: Type of the matrices.
        repeats: Calls of each, of which the fastest counts.
    """
    size = 8192 if device == "cuda" else 1024
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    # as many pixels as rows, in pictures of 8x8
    images = torch.randn(size // 64, size, 8, 8, device=device, dtype=dtype)
    products: tuple[Call, ...] = (lambda: matrix @ matrix, lambda: F.conv2d(images, matrix.view(size, size, 1, 1)))
    # Until something as large has been freed, a C library may fetch the memory of each result from the system, page by
    # page, which was seen to take half as long as the product itself.
    torch.empty(2**24, dtype=torch.uint8, device=device)
    # well beyond any cache
    source = torch.zeros(2**30 if device == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)

    def fastest(call: Call) -> float:
        _time(call, 1, device)
        return min(_time(call, 1, device) for _ in range(repeats))

    with torch.no_grad():
        flops = 2 * size**3 / min(map(fastest, products))
        return Ceilings(flops, 2 * source.nbytes / fastest(lambda: target.copy_(source)))


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
            if contender in results and _BASELINE in results:
                result, baseline = results[contender], results[_BASELINE]
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


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line; ``args`` replaces ``sys.argv[1:]``. Bad input ends in one line and exit code 2."""
    parser = OneLineParser(prog="python -m awconv.analysis.benchmark", description=__doc__)
    commands = parser.add_subparsers(required=True)
    layers = commands.add_parser("layers", help="the four 3x3 convolutions of ResNet-50", description=_layers.__doc__)
    layers.set_defaults(run=_layers)
    layers.add_argument("--batch", type=_positive, metavar="N", help="samples (default: 16 on cpu, 256 on cuda)")
    network = commands.add_parser("network", help="whole ResNets, plain, AW and SE", description=_network.__doc__)
    network.set_defaults(run=_network)
    network.add_argument("--batch", type=_positive, metavar="N", help="pictures (default: 4 on cpu, 128 on cuda)")
    network.add_argument("--size", type=_positive, metavar="PIXELS", help="default: 64 on cpu, 224 on cuda")
    network.add_argument("--compile", action="store_true", help="measure the networks compiled too")
    loader = commands.add_parser("loader", help="pictures on their way to a network", description=_loader.__doc__)
    loader.set_defaults(run=_loader)
    loader.add_argument("--batch", type=_positive, metavar="N", help="pictures (default: 64 on cpu, 256 on cuda)")
    loader.add_argument("--workers", type=_positive, metavar="W", help="processes (default: one a core, 16 at most)")
    loader.add_argument("--root", type=Path, metavar="FOLDER", help="holds train/CLASS/*.jpg (default: drawn pictures)")
    check = commands.add_parser("check", help="errors of the fused kernels", description=_check.__doc__)
    check.set_defaults(run=_check)
    profile = commands.add_parser("profile", help="launches and kernels of a layer", description=_profile.__doc__)
    profile.set_defaults(run=_profile)
    for command in (check, profile):
        command.add_argument(
            "--batch", type=_positive, metavar="N", help="samples (default: 2 on cpu, 16 or 256 on cuda)"
        )
    draw = commands.add_parser("draw", help="a picture of a record of layers", description=_draw.__doc__)
    draw.set_defaults(run=_draw)
    draw.add_argument("record", type=Path, help="what layers --json FILE wrote")
    draw.add_argument("--out", type=Path, required=True, metavar="PNG", help="the picture; never over a file")
    everything = commands.add_parser("all", help="everything, within a number of minutes", description=_all.__doc__)
    everything.set_defaults(run=_all)
    everything.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for the records; a new folder")
    everything.add_argument(
        "--minutes", type=_minutes, default=8, metavar="M", help="for everything together (default: 8)"
    )
    for command in (layers, network, profile, everything):
        command.add_argument("--dtype", choices=list(_DTYPES), default="float32", help="default: float32")
    for command in (layers, network, loader, check, profile, everything):
        command.add_argument("--device", choices=sorted(_BATCHES), default="cpu", help="default: cpu")
    for command in (layers, network, loader):
        command.add_argument("--repeats", type=_positive, metavar="R", help=f"visits each (default: {_REPEATS})")
        command.add_argument("--quick", action="store_true", help=f"{_QUICK_REPEATS} repeats: rough figures, soon")
    for command in (layers, network, loader, check, profile):
        command.add_argument("--json", type=Path, metavar="FILE", help="write the records there too; never over a file")
        command.add_argument(
            "--minutes", type=_minutes, metavar="M", help="make fewer repeats, and leave contenders out, to end in time"
        )
    options = parser.parse_args(args)
    minutes = getattr(options, "minutes", None)
    options.deadline = math.inf if minutes is None else perf_counter() + 60 * minutes
    try:
        options.run(options)
    except InputError as error:
        parser.error(str(error))


def _layers(options: argparse.Namespace) -> None:
    """Compare Conv2d, AWConv2d with each backend, and timm's CondConv2d on the 3x3 convolutions of ResNet-50."""
    device, batch, repeats, record = _begin(options, _BATCHES, memory_format=memory_format_of(options.device))
    dtype = _DTYPES[options.dtype]
    # first, since a time limit is for what follows
    ceilings = measure_ceilings(device, dtype)
    with _blaming_the_batch(batch, device):
        rows = benchmark_layers(
            RESNET50_SHAPES, device=device, batch=batch, dtype=dtype, repeats=repeats, deadline=options.deadline
        )
    record["ceilings"] = {"flops_per_second": ceilings.flops, "bytes_per_second": ceilings.bandwidth}
    for row in rows:
        if row["median_ms"] is not None:
            row["floor_ms"] = floor_ms(row, ceilings)
    print(layers_table(rows))
    replayed = {row["replayed"] for row in rows if row["median_ms"] is not None}
    how = {
        frozenset([True]): ", replayed from CUDA graphs",
        frozenset([True, False]): ", some replayed from CUDA graphs",
    }
    incomparable = any(row["median_ms"] is not None and row["ratio"] is None for row in rows)
    none = " (none: only one of the two is a replay, the other is called from Python)" if incomparable else ""
    print(
        f"\nTime a call: {_repeated(rows)}{how.get(frozenset(replayed), '')}. ratio: to {_BASELINE}{none}. "
        "MiB: peak memory of a call, beyond input and parameters.\n"
        "floor, ms: what the convolution alone, with its maps given, would take at the rates of a large matrix product "
        f"and a large copy, here {ceilings.flops / 1e9:.0f} GFLOP/s and {ceilings.bandwidth / 1e9:.1f} GB/s."
    )
    _end(options, {"benchmark": "layers", **record, "rows": rows})


def _network(options: argparse.Namespace) -> None:
    """Compare ResNet-50, its AW and SE twins and AW-ResNet-101: inference, and a step of training."""
    from awconv.analysis.network_benchmark import benchmark_networks, networks_table

    size = options.size or {"cpu": 64, "cuda": 224}[options.device]
    if options.batch == 1:
        raise InputError("--batch 1: BatchNorm trains on two pictures at least; give more")
    device, batch, repeats, record = _begin(
        options,
        {"cpu": 4, "cuda": 128},
        size=size,
        compile=options.compile,
        memory_format=memory_format_of(options.device),
    )
    with _blaming_the_batch(batch, device):
        rows = benchmark_networks(
            device=device,
            batch=batch,
            size=size,
            dtype=_DTYPES[options.dtype],
            repeats=repeats,
            compiled=options.compile,
            deadline=options.deadline,
        )
    if options.compile:
        # of which a compiled network should have none
        record["graph_breaks"] = sum(torch._dynamo.utils.counters["graph_break"].values())
    print(networks_table(rows, batch))
    print(
        f"\nTime a batch of {batch} pictures of {size}x{size}: {_repeated(rows)}. "
        "ratio: to resnet50 in the same mode. MiB: peak memory of a batch, beyond pictures and parameters."
    )
    if options.compile:
        print(f"Graph breaks while compiling: {record['graph_breaks']}.")
    _end(options, {"benchmark": "network", **record, "rows": rows})


def _loader(options: argparse.Namespace) -> None:
    """Compare how fast the data modules and torchvision's own pipelines deliver training pictures."""
    from awconv.analysis.loader_benchmark import benchmark_loaders, loaders_table

    workers = options.workers or min(os.cpu_count() or 1, 16)
    root = None if options.root is None else str(options.root)
    device, batch, repeats, record = _begin(options, {"cpu": 64, "cuda": 256}, workers=workers, root=root)
    rows = benchmark_loaders(
        options.root, device=device, batch=batch, workers=workers, repeats=repeats, deadline=options.deadline
    )
    print(loaders_table(rows))
    made = sorted({len(row["times_ms"]) for row in rows if row["pictures_per_second"] is not None})
    print(
        f"\nPictures a second in batches on the device, {workers} worker processes: median (quartiles) of "
        f"{', '.join(map(str, made)) or 'no'} interleaved passes. ratio: to torchvision's."
    )
    _end(options, {"benchmark": "loader", **record, "rows": rows})


def _check(options: argparse.Namespace) -> None:
    """Compare the fused kernels with float64 on the convolutions of ResNet-50; exit code 1 where an error is large.

    The record is written after every shape, so that what ends this early leaves those before. Where there was no time
    for any shape the exit code is 1 too.
    """
    from awconv.analysis.layer_checks import check_numerics, errors_table

    device, batch, _, record = _begin(options, {"cpu": 2, "cuda": 16}, memory_format=memory_format_of(options.device))
    with _blaming_the_batch(batch, device):
        rows = check_numerics(
            RESNET50_SHAPES,
            device=device,
            batch=batch,
            deadline=options.deadline,
            report=lambda rows: _end(options, {"benchmark": "check", **record, "rows": rows}),
        )
    print(errors_table(rows))
    print(
        "\nRelative errors in the norm, of the same numbers in float64 through backend gemm; bound: what is taken for "
        "rounding."
    )
    verdicts = [row["ok"] for row in rows if row["ok"] is not None]
    if not verdicts:
        raise SystemExit("nothing was checked: there was no time for any shape; give more --minutes")
    if not all(verdicts):
        raise SystemExit(1)


def _profile(options: argparse.Namespace) -> None:
    """Count what AWConv2d launches on the convolutions of ResNet-50, and list its kernels (on a CPU: its operators).

    The record is written after every shape, so that what ends this early leaves those before.
    """
    from awconv.analysis.layer_checks import launches_table, profile_layers, slowest_table

    device, batch, _, record = _begin(options, {"cpu": 2, "cuda": 256}, memory_format=memory_format_of(options.device))
    with _blaming_the_batch(batch, device):
        rows = profile_layers(
            RESNET50_SHAPES,
            device=device,
            batch=batch,
            dtype=_DTYPES[options.dtype],
            deadline=options.deadline,
            report=lambda rows: _end(options, {"benchmark": "profile", **record, "rows": rows}),
        )
    what = (
        "kernels, copies and fills on the GPU" if device == "cuda" else "operators of torch that compute by themselves"
    )
    print(f"{launches_table(rows)}\n\nLaunches: {what}. convolution: with the head's logits given.\n")
    print(slowest_table(rows))


# What `all` runs, in this order: the name of the record; its part of the time, of what is left when its turn comes; the
# command; packages without which it is left out; and whether tiles are tuned. The last one gets what others left over:
# how long a compiler takes is least known.
_PARTS: tuple[tuple[str, int, list[str], tuple[str, ...], bool], ...] = (
    ("check", 7, ["check"], (), False),
    ("layers", 16, ["layers", "--dtype"], ("timm",), False),
    ("network", 12, ["network", "--dtype"], ("timm",), False),
    ("profile", 5, ["profile", "--dtype"], (), False),
    ("layers_tuned", 20, ["layers", "--dtype"], ("timm",), True),
    ("check_tuned", 6, ["check"], (), True),
    ("loader", 10, ["loader", "--batch", "128", "--quick"], ("lightning", "torchvision"), False),
    ("network_compiled", 34, ["network", "--compile", "--dtype"], ("timm",), False),
)


def _all(options: argparse.Namespace) -> None:
    """Run all benchmarks within a number of minutes, each in a process of its own that writes its record when it ends.

    Each has a part of the time: it is told to be done a little earlier, by fewer repeats and fewer contenders, and is
    ended when the part is used up. What has been written stays, whatever happens to those that follow.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device here; use --device cpu")
    folder: Path = options.out
    try:
        folder.mkdir()
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be made ({error.strerror}); name a new folder") from None
    parts = _PARTS if options.device == "cuda" else [part for part in _PARTS if not part[-1]]
    summary: list[dict[str, Any]] = []
    for place, (name, weight, command, packages, tuned) in enumerate(parts):
        left = options.deadline - perf_counter()
        seconds = left * weight / sum(w for _, w, *_ in parts[place:])
        command = [*command, options.dtype] if command[-1] == "--dtype" else command
        # its last table, a record, and the start of Python come on top of what it measures
        minutes = max(0.85 * seconds - 6, 0.5 * seconds) / 60
        given = ["--device", options.device, "--minutes", f"{minutes:.3f}", "--json", str(folder / f"{name}.json")]
        missing = [package for package in packages if find_spec(package) is None]
        environment = {"AWCONV_AUTOTUNE": "1"} if tuned else {}
        print(f"=== {name}: {' '.join([*(f'{k}={v}' for k, v in environment.items()), *command, *given])}", flush=True)
        start = perf_counter()
        outcome = f"left out: {missing[0]} is not installed" if missing else None
        outcome = outcome or _run_part([*command, *given], environment, seconds)
        summary.append({"part": name, "outcome": outcome, "seconds": perf_counter() - start, "limit": seconds})
        print(f"=== {name}: {outcome} ({summary[-1]['seconds']:.0f} of {seconds:.0f} s)\n", flush=True)
        (folder / "all.json").write_text(json.dumps({"benchmark": "all", "parts": summary}, indent=1) + "\n")
    if any(part["outcome"] != "done" for part in summary):
        raise SystemExit(1)


def _run_part(command: list[str], environment: Mapping[str, str], seconds: float) -> str:
    """Runs one of this module's commands in a process of its own; says how it ended."""
    # a group of its own: what it started, a loader's workers or a compiler's, has to end with it
    process = subprocess.Popen(
        [sys.executable, "-m", "awconv.analysis.benchmark", *command],
        env={**os.environ, **environment},
        start_new_session=True,
    )
    try:
        code = process.wait(seconds)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise  # an interrupt from the keyboard, say, which reaches this process alone
        return "ended at its limit"
    return "done" if code == 0 else f"failed with exit code {code}"


def _draw(options: argparse.Namespace) -> None:
    """Draw a record of the layers: time and peak memory of a training step, as multiples of a plain convolution's."""
    from awconv.analysis.benchmark_figure import draw_layers

    _check_new_file("--out", options.out)
    try:
        record = json.loads(options.record.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{options.record}: cannot be read as a record ({error})") from None
    if not isinstance(record, dict) or record.get("benchmark") != "layers":
        raise InputError(f"{options.record}: is no record that `layers --json FILE` wrote")
    try:
        picture = draw_layers(record)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{options.record}: lacks what is drawn ({type(error).__name__}: {error})") from None
    _write_file("--out", options.out, picture)


def _begin(
    options: argparse.Namespace, batches: Mapping[str, int], **arguments: Any
) -> tuple[str, int, int, dict[str, Any]]:
    """Checks what all benchmarks are given, and says what is measured: device, batch, repeats and the record's head."""
    device: str = options.device
    batch: int = options.batch or batches[device]
    repeats: int = 0
    if "repeats" in options:
        repeats = options.repeats or (_QUICK_REPEATS if options.quick else _REPEATS)
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device here; use --device cpu")
    if options.json is not None:
        _check_new_file("--json", options.json)
    record = _circumstances(device)
    dtype = {} if getattr(options, "dtype", None) is None else {"dtype": options.dtype}
    limit = {} if options.minutes is None else {"minutes": options.minutes}
    given = {"device": device, "batch": batch, **dtype, **({"repeats": repeats} if repeats else {}), **limit}
    record["arguments"] = {**given, **arguments}
    measured = ", ".join([*dtype.values(), f"batch {batch}"])
    print(f"{record['machine']}, torch {record['versions']['torch']}, {measured}, {record['date']}\n", flush=True)
    return device, batch, repeats, record


def _repeated(rows: Sequence[Mapping[str, Any]]) -> str:
    """Says how many repeats there were; with a time limit they are fewer than were asked for."""
    made = sorted({len(row["times_ms"]) for row in rows if row["median_ms"] is not None})
    return f"median (quartiles) of {', '.join(map(str, made)) or 'no'} interleaved repeats"


def memory_format_of(device: str) -> str:
    """Names the memory format that is the faster one to train in on a device."""
    return "channels_last" if device == "cuda" else "contiguous_format"


def _end(options: argparse.Namespace, record: Mapping[str, Any]) -> None:
    """Writes the record, if one is wanted: into a new file, or, where this run has written it before, over that."""
    if options.json is not None:
        content = (json.dumps(record, indent=1) + "\n").encode()
        _write_file("--json", options.json, content, new=not getattr(options, "written", False))
        options.written = True


@contextmanager
def _blaming_the_batch(batch: int, device: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # torch.OutOfMemoryError is for CUDA alone
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise InputError(f"--batch {batch}: does not fit into the memory of the {device}; take a smaller one") from None


def _layer_contenders(channels: int, input: Tensor) -> dict[str, nn.Module]:
    contenders: dict[str, nn.Module] = {_BASELINE: nn.Conv2d(channels, channels, 3, padding=1, bias=False)}
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


def _by_importance(cases: Sequence[Mapping[str, Call]]) -> list[tuple[int, str]]:
    """All contenders: the first ones of every case, then the second ones; within them the last case comes first."""
    places = max((len(case) for case in cases), default=0)
    return [
        (index, list(cases[index])[place])
        for place in range(places)
        for index in reversed(range(len(cases)))
        if place < len(cases[index])
    ]


def _captured(call: Call, pool: Any) -> Call | None:
    """Captures ``call`` in a CUDA graph, if it can be; all graphs take turns with the memory of ``pool``."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool):
            call()
        graph.replay()
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        # the end of a capture that broke off fails by itself, and hides why
        if isinstance(error.__context__, torch.OutOfMemoryError):
            raise error.__context__ from None
        return None
    finally:
        # which torch does not do where the end of the capture fails
        torch.cuda.set_stream(stream)
    return graph.replay


def _time(call: Call, calls: int, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = perf_counter()
    for _ in range(calls):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (perf_counter() - start) / calls


def _cpu_allocations(profile: torch.autograd.profiler.profile) -> list[tuple[int, int]]:
    """Lists (address, bytes) of every allocation, and (address, -bytes) of every release, in order of time."""
    found: list[tuple[int, int, int]] = []
    assert profile.kineto_results is not None
    waiting = list(profile.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.tag == torch._C._profiler._EventType.Allocation:
            fields: Any = event.extra_fields
            if fields.device.type == "cpu":
                found.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    return [(address, size) for _, address, size in sorted(found, key=lambda allocation: allocation[0])]


def _highest_sum(allocations: list[tuple[int, int]]) -> int:
    held: dict[int, int] = {}
    now = highest = 0
    for address, size in allocations:
        if size > 0:
            held[address] = size
            now += size
            highest = max(highest, now)
        else:
            # what was there before the call is not its own to give back
            now -= held.pop(address, 0)
    return highest


def _circumstances(device: str) -> dict[str, Any]:
    if device == "cuda":
        machine = torch.cuda.get_device_name()
    else:
        threads = torch.get_num_threads()
        machine = f"{_cpu_model()}, {threads} thread{'s' if threads > 1 else ''}"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("torchvision", "timm", "awconv", *(["triton"] if device == "cuda" else [])):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # run from a source tree that was not installed
            versions[package] = "unknown"
    return {"machine": machine, "versions": versions, "date": datetime.now(UTC).date().isoformat()}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _check_new_file(argument: str, path: Path) -> None:
    if path.exists():
        raise InputError(f"{argument} {path}: exists already and is not written over; name a new file")
    if not path.parent.is_dir():
        raise InputError(f"{argument} {path}: there is no folder {path.parent}; make it first")


def _write_file(argument: str, path: Path, content: bytes, *, new: bool = True) -> None:
    try:
        with path.open("xb" if new else "wb") as file:
            file.write(content)
    except OSError as error:
        raise InputError(f"{argument} {path}: cannot be written ({error.strerror}); name a new file") from None


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes above 0")
    return value


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 2147483647")
    return value


if __name__ == "__main__":
    main()
