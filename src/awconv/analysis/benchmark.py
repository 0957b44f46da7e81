"""What AW-convolution costs in time and memory, beside a plain convolution and its peers.

Run it as ``python -m awconv.analysis.benchmark layers``, ``network`` or ``loader``; ``check`` compares numbers with
float64, ``profile`` counts launches, ``all`` does everything within a number of minutes, and ``draw`` draws a record.
"""

import argparse
import json
import math
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from awconv.analysis.command import OneLineParser
from awconv.analysis.layer_benchmark import BASELINE, RESNET50_SHAPES, benchmark_layers, floor_ms, layers_table
from awconv.analysis.measurement import measure_ceilings, memory_format_of
from awconv.errors import InputError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BATCHES = {"cpu": 16, "cuda": 256}
_REPEATS, _QUICK_REPEATS = 20, 3


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
        f"\nTime a call: {_repeated(rows)}{how.get(frozenset(replayed), '')}. ratio: to {BASELINE}{none}. "
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
        (folder / "all.json").write_text(
            json.dumps({"benchmark": "all", "parts": summary}, indent=1) + "\n", encoding="utf-8"
        )
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
        record = json.loads(options.record.read_text(encoding="utf-8"))
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
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
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
