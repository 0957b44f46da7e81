"""Times and memory of calls, side by side, and what a device reaches at best."""

import gc
import math
import os
import random
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

PASSES = ("forward", "forward+backward")
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


def memory_format_of(device: str) -> str:
    """Names the memory format that is the faster one to train in on a device."""
    return "channels_last" if device == "cuda" else "contiguous_format"


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
