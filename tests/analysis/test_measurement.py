"""Interleaved times, peak memory and ceilings."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from awconv.analysis import measurement


class Clock:
    """Stands in for time: it moves only while a contender runs, by what that contender is said to take."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.visited = []
        monkeypatch.setattr(measurement, "perf_counter", lambda: self.now)
        # one call, as the real meter makes, without the profiler
        monkeypatch.setattr(measurement, "peak_memory", lambda call, device: call() and 0)

    def contender(self, name, *seconds):
        """Takes each of ``seconds`` in turn, the last one for ever."""
        left = list(seconds)

        def call():
            self.visited.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]
            return True

        return call


# --- interleaving ---------------------------------------------------------------------------------------------------


def interleaved(monkeypatch, repeats=12, seed=0):
    clock = Clock(monkeypatch)
    # every call outlasts a visit's minimum, so that a visit is one call
    cases = [{name: clock.contender(name, 1.0) for name in names} for names in ("abcd", "xyz")]
    results = measurement.measure_interleaved(cases, repeats=repeats, seed=seed)
    visited = "".join(clock.visited)
    return results, visited[: -7 * repeats], [visited[len(visited) - 7 * k :][:7] for k in range(repeats, 0, -1)]


def test_every_repeat_visits_every_contender_once(monkeypatch):
    results, _, repeats = interleaved(monkeypatch)
    assert [sorted(r) for r in repeats] == [list("abcdxyz")] * 12
    assert [list(r) for r in results] == [list("abcd"), list("xyz")]
    assert all(len(m.times) == 12 for r in results for m in r.values())


def test_contenders_of_a_case_stay_together(monkeypatch):
    _, _, repeats = interleaved(monkeypatch)
    assert all(set(r[:4]) == set("abcd") or set(r[3:]) == set("abcd") for r in repeats)


def test_order_is_shuffled_and_fixed_by_the_seed(monkeypatch):
    _, _, repeats = interleaved(monkeypatch)
    assert len(set(repeats)) > 6
    assert {r[0] in "abcd" for r in repeats} == {True, False}
    # no contender of the first case is always visited first, or always after the same neighbour
    assert len({re.sub("[xyz]", "", r)[0] for r in repeats}) == 4
    assert interleaved(monkeypatch)[2] == repeats
    assert interleaved(monkeypatch, seed=1)[2] != repeats


def test_every_contender_is_warmed_up_before_the_first_timed_visit(monkeypatch):
    _, warm_up, _ = interleaved(monkeypatch)
    assert all(warm_up.count(name) >= 2 for name in "abcdxyz")


def test_times_are_a_call_and_in_the_order_of_the_repeats(monkeypatch):
    clock = Clock(monkeypatch)
    # warm-up, calibration, memory; then the visits
    slow = clock.contender("slow", 9.0, 0.5, 0.5, 0.1, 0.4, 0.2, 0.3)
    [result] = measurement.measure_interleaved([{"slow": slow, "other": clock.contender("other", 1.0)}], repeats=4)
    assert result["slow"].times == pytest.approx([0.1, 0.4, 0.2, 0.3])
    assert result["slow"].quartiles == pytest.approx((0.175, 0.25, 0.325))
    assert result["other"].times == pytest.approx([1.0] * 4)


def test_short_calls_are_repeated_within_a_visit(monkeypatch):
    clock = Clock(monkeypatch)
    call = clock.contender("short", 0.003)
    [result] = measurement.measure_interleaved([{"short": call}], repeats=5)
    # 10 ms are filled by four calls of 3 ms; three calls are made before
    assert len(clock.visited) == 3 + 5 * 4
    assert result["short"].times == pytest.approx([0.003] * 5)


def limited(monkeypatch, deadline, seconds=1.0, repeats=12, **contenders):
    clock = Clock(monkeypatch)
    cases = [{name: clock.contender(name, contenders.get(name, seconds)) for name in names} for names in ("abc", "xy")]
    return measurement.measure_interleaved(cases, repeats=repeats, deadline=deadline), clock


def test_repeats_are_made_as_long_as_there_is_time(monkeypatch):
    # five contenders are warmed up by 3 calls each; then a round takes 5 seconds
    results, clock = limited(monkeypatch, 15 + 7 * 5 + 4)
    assert {len(m.times) for r in results for m in r.values()} == {7}
    assert clock.now == 15 + 7 * 5


def test_a_limit_leaves_contenders_out_rather_than_making_fewer_than_three_repeats(monkeypatch):
    results, clock = limited(monkeypatch, 23.0)
    # the first ones of both cases, and then, from the last case on, those that fit
    assert [list(r) for r in results] == [["a"], ["x", "y"]]
    assert min(len(m.times) for r in results for m in r.values()) >= 3
    assert clock.now <= 23.0


def test_a_contender_that_turns_out_too_slow_is_left_out_and_faster_ones_are_not(monkeypatch):
    results, clock = limited(monkeypatch, 150, y=30.0)
    assert [list(r) for r in results] == [["a", "b", "c"], ["x"]]
    assert clock.now <= 150


def test_what_cannot_be_warmed_up_in_time_is_not_begun(monkeypatch):
    """A compiler's minutes show in the first of them: the next one is given twice as much."""
    clock = Clock(monkeypatch)
    names = ("plain", "other", "last")
    case = {name: clock.contender(name, 60.0, 0.1) for name in names}
    [result] = measurement.measure_interleaved([case], repeats=5, deadline=240.0)
    assert list(result) == ["plain", "other"]
    assert clock.visited.count("last") == 0


def test_no_time_at_all_measures_nothing(monkeypatch):
    results, clock = limited(monkeypatch, 0.0)
    assert results == [{}, {}]
    assert clock.visited == []


def test_replays_of_graphs_are_what_is_timed(monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    graphs = {"captured": clock.contender("graph", 2.0)}
    calls = {name: clock.contender(name, 5.0) for name in ("captured", "not capturable")}
    captured = {calls[name]: graph for name, graph in graphs.items()}
    monkeypatch.setattr(measurement, "_captured", lambda call, pool: captured.get(call))
    [result] = measurement.measure_interleaved([calls], repeats=3, device="cuda", replay=True)
    assert result["captured"].times == [2.0] * 3
    assert result["captured"].replayed
    assert result["not capturable"].times == [5.0] * 3
    assert not result["not capturable"].replayed


def test_a_slow_kind_does_not_keep_another_one_out(monkeypatch):
    clock = Clock(monkeypatch)
    cases = [
        {name: clock.contender(name, 60.0, 0.1) for name in ("slow", "slow too")},
        {name: clock.contender(name, 1.0, 0.1) for name in ("fast", "fast too")},
    ]
    kinds = ("compiled", "eager")
    results = measurement.measure_interleaved(cases, repeats=3, deadline=100.0, kinds=kinds)
    assert [list(r) for r in results] == [["slow"], ["fast", "fast too"]]
    # where all are of one kind, nothing is known of what makes one slow
    assert [list(r) for r in measurement.measure_interleaved(cases, repeats=3, deadline=100.0)] != results


def test_the_first_of_a_kind_is_given_the_time_of_the_slowest_one_of_all(monkeypatch):
    clock = Clock(monkeypatch)
    cases = [{"unknown": clock.contender("unknown", 1.0)}, {"slow": clock.contender("slow", 60.0, 0.1)}]
    results = measurement.measure_interleaved(cases, repeats=3, deadline=100.0, kinds=("one", "another"))
    assert [list(r) for r in results] == [[], ["slow"]]
    assert "unknown" not in clock.visited


def test_what_has_nothing_to_be_compared_with_is_not_begun(monkeypatch):
    clock = Clock(monkeypatch)
    case = {"plain": clock.contender("plain", 30.0), "other": clock.contender("other", 0.1)}
    assert measurement.measure_interleaved([case], repeats=3, deadline=100.0) == [{}]
    assert "other" not in clock.visited


class Graph:
    """Stands in for ``torch.cuda.graph`` around a capture that breaks off: its end fails too, on its own stream."""

    stream = "before"

    def __init__(self, monkeypatch):
        for name, value in {
            "CUDAGraph": lambda: None,
            "current_stream": lambda: self.stream,
            "set_stream": lambda stream: setattr(self, "stream", stream),
            "graph": lambda graph, pool: self,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def __enter__(self):
        self.stream = "side"

    def __exit__(self, *error):
        raise RuntimeError("operation failed due to a previous error during capture")


def test_what_cannot_be_captured_leaves_the_stream_as_it_was(monkeypatch):
    graph = Graph(monkeypatch)

    def call():
        raise RuntimeError("operation not permitted when stream is capturing")

    assert measurement._captured(call, "pool") is None
    assert graph.stream == "before"


def test_too_little_memory_is_not_taken_for_what_cannot_be_captured(monkeypatch):
    graph = Graph(monkeypatch)

    def call():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        measurement._captured(call, "pool")
    assert graph.stream == "before"


def test_one_repeat_has_quartiles():
    assert measurement.Measurement([2.0], 0).quartiles == (2.0, 2.0, 2.0)


# --- memory ---------------------------------------------------------------------------------------------------------

MEGABYTE = torch.zeros(250_000)


def release_before_allocating():
    first = torch.empty(1_000_000)
    del first
    return torch.empty(500_000)


def hold_two_then_one():
    first, second = torch.empty(1_000_000), torch.empty(500_000)
    del first
    return second, torch.empty(100)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: torch.empty(1_000_000), 4_000_000),
        (lambda: torch.empty(1_000_000, dtype=torch.float64), 8_000_000),
        (release_before_allocating, 4_000_000),
        (hold_two_then_one, 6_000_000),
        (lambda: MEGABYTE.exp().neg(), 2_000_000),
        (lambda: [MEGABYTE.exp() for _ in range(5)], 5_000_000),
        (lambda: [MEGABYTE.exp().sum() for _ in range(5)][:0], 1_000_000 + 5 * 4),
        (lambda: MEGABYTE.neg_(), 0),
        (lambda: MEGABYTE.view(500, 500).t(), 0),
        (lambda: torch.cat([MEGABYTE, MEGABYTE]), 2_000_000),
    ],
)
def test_peak_memory_of_known_allocations(call, expected):
    assert measurement.peak_memory(call) == expected


def test_peak_memory_includes_what_backward_holds():
    leaf = torch.zeros(250_000, requires_grad=True)
    gradient = torch.ones_like(leaf)

    def call():
        # exp keeps its result for backward, whose product is the second megabyte; nothing else is needed
        return torch.autograd.grad(leaf.exp(), [leaf], gradient)

    assert measurement.peak_memory(call) == 2_000_000


def test_releasing_what_was_there_before_does_not_lower_the_peak():
    kept = [torch.empty(1_000_000)]
    # allocated under an earlier measurement, so that the profiler knows its size
    measurement.peak_memory(lambda: kept.append(torch.empty(1_000_000)))

    def call():
        kept.clear()
        return torch.empty(500_000)

    assert measurement.peak_memory(call) == 2_000_000


def test_peak_memory_sees_the_columns_of_unfold():
    image = torch.randn(4, 8, 16, 16)
    columns = 4 * (8 * 9) * (16 * 16) * 4
    peak = measurement.peak_memory(lambda: F.unfold(image, 3, padding=1).sum())
    # a copy of the image beside them is torch's own affair
    assert columns <= peak <= columns + 2 * image.nbytes


def test_peak_memory_is_repeatable():
    layer, image = nn.Conv2d(8, 8, 3), torch.randn(2, 8, 12, 12)
    layer(image)
    output_bytes = 2 * 8 * 10 * 10 * 4
    peaks = {measurement.peak_memory(lambda: layer(image)) for _ in range(3)}
    assert len(peaks) == 1
    assert peaks.pop() >= output_bytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_on_cuda():
    # a multiple of the caching allocator's granularity
    assert measurement.peak_memory(lambda: torch.empty(4 * 2**20, device="cuda"), "cuda") == 16 * 2**20


# --- ceilings -------------------------------------------------------------------------------------------------------


def test_ceilings_count_what_was_done(monkeypatch):
    monkeypatch.setattr(measurement, "_time", lambda call, calls, device: (call(), 0.5)[1])
    ceilings = measurement.measure_ceilings("cpu", torch.float32, repeats=1)
    assert ceilings == (2 * 1024**3 / 0.5, 2 * 2**27 / 0.5)
