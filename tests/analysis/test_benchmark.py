"""The benchmark's meters against known answers, and its command line; nothing here asserts how fast anything is."""

import json
import os
import re
import select
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from awconv.analysis import benchmark, loader_benchmark, network_benchmark
from awconv.layers import BACKENDS

CONTENDERS = ["Conv2d", *(f"AWConv2d {backend}" for backend in BACKENDS), "CondConv2d"]


class Clock:
    """Stands in for time: it moves only while a contender runs, by what that contender is said to take."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.visited = []
        monkeypatch.setattr(benchmark, "perf_counter", lambda: self.now)
        # one call, as the real meter makes, without the profiler
        monkeypatch.setattr(benchmark, "peak_memory", lambda call, device: call() and 0)

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
    results = benchmark.measure_interleaved(cases, repeats=repeats, seed=seed)
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
    [result] = benchmark.measure_interleaved([{"slow": slow, "other": clock.contender("other", 1.0)}], repeats=4)
    assert result["slow"].times == pytest.approx([0.1, 0.4, 0.2, 0.3])
    assert result["slow"].quartiles == pytest.approx((0.175, 0.25, 0.325))
    assert result["other"].times == pytest.approx([1.0] * 4)


def test_short_calls_are_repeated_within_a_visit(monkeypatch):
    clock = Clock(monkeypatch)
    call = clock.contender("short", 0.003)
    [result] = benchmark.measure_interleaved([{"short": call}], repeats=5)
    # 10 ms are filled by four calls of 3 ms; three calls are made before
    assert len(clock.visited) == 3 + 5 * 4
    assert result["short"].times == pytest.approx([0.003] * 5)


def limited(monkeypatch, deadline, seconds=1.0, repeats=12, **contenders):
    clock = Clock(monkeypatch)
    cases = [{name: clock.contender(name, contenders.get(name, seconds)) for name in names} for names in ("abc", "xy")]
    return benchmark.measure_interleaved(cases, repeats=repeats, deadline=deadline), clock


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
    [result] = benchmark.measure_interleaved([case], repeats=5, deadline=240.0)
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
    monkeypatch.setattr(benchmark, "_captured", lambda call, pool: captured.get(call))
    [result] = benchmark.measure_interleaved([calls], repeats=3, device="cuda", replay=True)
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
    results = benchmark.measure_interleaved(cases, repeats=3, deadline=100.0, kinds=kinds)
    assert [list(r) for r in results] == [["slow"], ["fast", "fast too"]]
    # where all are of one kind, nothing is known of what makes one slow
    assert [list(r) for r in benchmark.measure_interleaved(cases, repeats=3, deadline=100.0)] != results


def test_the_first_of_a_kind_is_given_the_time_of_the_slowest_one_of_all(monkeypatch):
    clock = Clock(monkeypatch)
    cases = [{"unknown": clock.contender("unknown", 1.0)}, {"slow": clock.contender("slow", 60.0, 0.1)}]
    results = benchmark.measure_interleaved(cases, repeats=3, deadline=100.0, kinds=("one", "another"))
    assert [list(r) for r in results] == [[], ["slow"]]
    assert "unknown" not in clock.visited


def test_what_has_nothing_to_be_compared_with_is_not_begun(monkeypatch):
    clock = Clock(monkeypatch)
    case = {"plain": clock.contender("plain", 30.0), "other": clock.contender("other", 0.1)}
    assert benchmark.measure_interleaved([case], repeats=3, deadline=100.0) == [{}]
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

    assert benchmark._captured(call, "pool") is None
    assert graph.stream == "before"


def test_too_little_memory_is_not_taken_for_what_cannot_be_captured(monkeypatch):
    graph = Graph(monkeypatch)

    def call():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        benchmark._captured(call, "pool")
    assert graph.stream == "before"


def test_one_repeat_has_quartiles():
    assert benchmark.Measurement([2.0], 0).quartiles == (2.0, 2.0, 2.0)


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
    assert benchmark.peak_memory(call) == expected


def test_peak_memory_includes_what_backward_holds():
    leaf = torch.zeros(250_000, requires_grad=True)
    gradient = torch.ones_like(leaf)

    def call():
        # exp keeps its result for backward, whose product is the second megabyte; nothing else is needed
        return torch.autograd.grad(leaf.exp(), [leaf], gradient)

    assert benchmark.peak_memory(call) == 2_000_000


def test_releasing_what_was_there_before_does_not_lower_the_peak():
    kept = [torch.empty(1_000_000)]
    # allocated under an earlier measurement, so that the profiler knows its size
    benchmark.peak_memory(lambda: kept.append(torch.empty(1_000_000)))

    def call():
        kept.clear()
        return torch.empty(500_000)

    assert benchmark.peak_memory(call) == 2_000_000


def test_peak_memory_sees_the_columns_of_unfold():
    image = torch.randn(4, 8, 16, 16)
    columns = 4 * (8 * 9) * (16 * 16) * 4
    peak = benchmark.peak_memory(lambda: F.unfold(image, 3, padding=1).sum())
    # a copy of the image beside them is torch's own affair
    assert columns <= peak <= columns + 2 * image.nbytes


def test_peak_memory_is_repeatable():
    layer, image = nn.Conv2d(8, 8, 3), torch.randn(2, 8, 12, 12)
    layer(image)
    output_bytes = 2 * 8 * 10 * 10 * 4
    peaks = {benchmark.peak_memory(lambda: layer(image)) for _ in range(3)}
    assert len(peaks) == 1
    assert peaks.pop() >= output_bytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_on_cuda():
    # a multiple of the caching allocator's granularity
    assert benchmark.peak_memory(lambda: torch.empty(4 * 2**20, device="cuda"), "cuda") == 16 * 2**20


# --- the layers' calls ----------------------------------------------------------------------------------------------


class Probe(nn.Module):
    """A convolution that remembers in which mode it was called."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.seen = []

    def forward(self, input):
        self.seen.append((self.training, torch.is_grad_enabled()))
        return self.conv(input)


def test_forward_is_inference():
    probe, image = Probe(), torch.randn(2, 3, 5, 5)
    output = benchmark._layer_call(probe, image, training=False)()
    assert probe.seen == [(False, False)]
    assert not output.requires_grad
    torch.testing.assert_close(output, probe.conv(image))


def test_backward_reaches_input_and_every_parameter():
    probe, image = Probe(), torch.randn(2, 3, 5, 5)
    call = benchmark._layer_call(probe, image, training=True)
    gradients = call()
    assert probe.seen == [(True, True)]
    assert [g.shape for g in gradients] == [image.shape, probe.conv.weight.shape, probe.conv.bias.shape]
    assert all(g.abs().sum() > 0 for g in gradients)
    # a second call neither accumulates nor leaves gradients behind
    torch.testing.assert_close(call(), gradients)
    assert probe.conv.weight.grad is None
    assert not image.requires_grad


def test_routed_condconv_is_the_sample_by_sample_mixture():
    layer, images = benchmark.RoutedCondConv2d(6, num_experts=3), torch.randn(4, 6, 7, 5)
    output = layer(images)
    experts = layer.conv.weight.view(3, 6, 6, 3, 3)
    for image, result in zip(images, output, strict=True):
        routing = torch.sigmoid(layer.routing(image.mean(dim=(1, 2))))
        kernel = sum(r * e for r, e in zip(routing, experts, strict=True))
        torch.testing.assert_close(result, F.conv2d(image[None], kernel, padding=1)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layer_records(dtype):
    rows = benchmark.benchmark_layers(((16, 6), (32, 5)), device="cpu", batch=2, dtype=dtype, repeats=2)
    keys = [(r["channels"], r["size"], r["pass"], r["contender"]) for r in rows]
    shapes_and_passes = [(c, s, p) for c, s in ((16, 6), (32, 5)) for p in ("forward", "forward+backward")]
    assert keys == [(*key, contender) for key in shapes_and_passes for contender in CONTENDERS]
    plain = {key[:3]: row for key, row in zip(keys, rows, strict=True) if key[3] == "Conv2d"}
    for key, row in zip(keys, rows, strict=True):
        assert len(row["times_ms"]) == 2
        assert 0 < min(row["times_ms"]) <= row["quartiles_ms"][0] <= row["median_ms"]
        assert row["median_ms"] <= row["quartiles_ms"][1] <= max(row["times_ms"])
        assert row["ratio"] == pytest.approx(row["median_ms"] / plain[key[:3]]["median_ms"])
        # the output is held in every pass, and in training every gradient too
        output_bytes = 2 * row["channels"] * row["size"] ** 2 * dtype.itemsize
        assert row["peak_memory"] >= (output_bytes if row["pass"] == "forward" else 2 * output_bytes)
    assert len({row["ratio"] for row in plain.values()}) == 1


def test_least_work_is_counted_by_hand():
    """Two samples of 16 channels, 6x6: 1152 numbers; a kernel of 2304; maps of 2 x 16 x 1 x 9 = 288 numbers."""
    rows = benchmark.benchmark_layers(((16, 6),), device="cpu", batch=2, dtype=torch.float32, repeats=1)
    work = {(row["contender"], row["pass"]): (row["flops"], row["bytes"]) for row in rows}
    flops = 2 * 2 * 16 * 16 * 9 * 36
    assert work["Conv2d", "forward"] == (flops, 4 * (1152 + 1152 + 2304))
    assert work["AWConv2d grouped", "forward"] == (flops, 4 * (1152 + 1152 + 2304 + 288))
    assert work["AWConv2d fused", "forward+backward"] == (3 * flops, 4 * (5 * 1152 + 3 * (2304 + 288)))


def test_floor_is_the_slower_of_computing_and_moving():
    row = {"flops": 6e9, "bytes": 2e9}
    assert benchmark.floor_ms(row, benchmark.Ceilings(1e12, 1e12)) == pytest.approx(6)
    assert benchmark.floor_ms(row, benchmark.Ceilings(1e12, 1e11)) == pytest.approx(20)


def test_ceilings_count_what_was_done(monkeypatch):
    monkeypatch.setattr(benchmark, "_time", lambda call, calls, device: (call(), 0.5)[1])
    ceilings = benchmark.measure_ceilings("cpu", torch.float32, repeats=1)
    assert ceilings == (2 * 1024**3 / 0.5, 2 * 2**27 / 0.5)


def test_what_a_device_cannot_compute_is_left_out(monkeypatch):
    monkeypatch.setattr(benchmark, "unsupported", lambda input: "needs Triton on CUDA")
    contenders = benchmark._layer_contenders(16, torch.empty(0))
    assert "AWConv2d grouped" in contenders
    assert "AWConv2d fused" not in contenders


# --- table ----------------------------------------------------------------------------------------------------------


def test_table_is_aligned_markdown():
    def row(name, contender, median, ratio, mib):
        quartiles = [0.9 * median, 1.1 * median]
        return {"channels": 64, "size": 56, "pass": name, "contender": contender, "median_ms": median, "ratio": ratio,
                "quartiles_ms": quartiles, "peak_memory": mib * 2**20, "floor_ms": median / 4}  # fmt: skip

    table = benchmark.layers_table(
        [
            row("forward", "Conv2d", 10.0, 1.0, 12.5),
            row("forward", "AW gemm", 123.456, 12.3456, 1024),
            row("forward+backward", "Conv2d", 30.0, 1.0, 25),
            row("forward+backward", "AW gemm", 60.0, 2.0, 50.04),
        ]
    )
    layer, plain, gemm = ["3x3 layer", "contender"], ["64 ch, 56x56", "Conv2d"], ["64 ch, 56x56", "AW gemm"]
    head, rule, *body = table.splitlines()
    assert len({len(line) for line in (head, rule, *body)}) == 1
    assert rule.replace("-", "") == "|  |  | : | : | : | : | : | : | : | : |"
    assert [re.split(r" *\| *", line.strip("| ")) for line in (head, *body)] == [
        [*layer, "forward, ms", "floor", "ratio", "MiB", "forward+backward, ms", "floor", "ratio", "MiB"],
        [*plain, "10.00 (9.00-11.00)", "2.50", "1.00", "12.5", "30.00 (27.00-33.00)", "7.50", "1.00", "25.0"],
        [*gemm, "123.46 (111.11-135.80)", "30.86", "12.35", "1024.0", "60.00 (54.00-66.00)", "15.00", "2.00", "50.0"],
    ]
    # numbers end, and names begin, at the same column
    assert {line.index("| Conv2d") for line in body[:1]} == {line.index("| AW gemm") for line in body[1:]}
    assert body[0].index("25.0 |") == body[1].index("50.0 |")


def test_what_was_not_reached_is_said_in_the_table(monkeypatch, capsys):
    measure = benchmark.measure_interleaved

    def without_gemm(cases, **options):
        return [{n: m for n, m in r.items() if n != "AWConv2d gemm"} for r in measure(cases, **options)]

    monkeypatch.setattr(benchmark, "measure_interleaved", without_gemm)
    monkeypatch.setattr(benchmark, "RESNET50_SHAPES", ((16, 5),))
    monkeypatch.setattr(benchmark, "measure_ceilings", lambda *_: benchmark.Ceilings(1e9, 1e9))
    benchmark.main(["layers", "--batch", "1", "--quick", "--minutes", "5"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert [line.count("not reached") for line in lines if "AWConv2d gemm" in line] == [2]
    assert sum(line.count("not reached") for line in lines) == 2


def test_a_call_has_no_ratio_to_a_replay(monkeypatch, capsys, tmp_path):
    measure = benchmark.measure_interleaved

    def with_replays(cases, **options):
        return [
            {name: m._replace(replayed=name != "AWConv2d gemm") for name, m in result.items()}
            for result in measure(cases, **options)
        ]

    monkeypatch.setattr(benchmark, "measure_interleaved", with_replays)
    monkeypatch.setattr(benchmark, "RESNET50_SHAPES", ((16, 5),))
    monkeypatch.setattr(benchmark, "measure_ceilings", lambda *_: benchmark.Ceilings(1e9, 1e9))
    file = tmp_path / "rows.json"
    benchmark.main(["layers", "--batch", "1", "--quick", "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert {row["contender"] for row in rows if row["ratio"] is None} == {"AWConv2d gemm"}
    assert all(row["median_ms"] > 0 for row in rows)
    out = capsys.readouterr().out
    assert [line.split("|")[5].strip() == "none" for line in out.splitlines() if "| AWConv2d gemm" in line] == [True]
    assert "ratio: to Conv2d (none: only one of the two is a replay" in out


# --- everything, within a number of minutes -------------------------------------------------------------------------


@pytest.fixture
def all_in_this_process(monkeypatch):
    """Runs the parts of `all` on little, here rather than in processes; gives what was run, each with its limit."""
    networks = {"resnet18": {"name": "resnet18"}}
    monkeypatch.setattr(network_benchmark, "NETWORKS", networks)
    monkeypatch.setattr(benchmark, "RESNET50_SHAPES", ((16, 5),))
    monkeypatch.setattr(benchmark, "measure_ceilings", lambda *_: benchmark.Ceilings(1e9, 1e9))
    monkeypatch.setattr(loader_benchmark, "benchmark_loaders", lambda *_, **__: [])
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: None)
    ran = []

    def run(command, environment, seconds):
        ran.append((command, environment, seconds))
        small = {"network": ["--size", "32", "--batch", "2", "--repeats", "1"], "layers": ["--batch", "1", "--quick"]}
        benchmark.main([*command, *small.get(command[0], [])])
        return "done"

    monkeypatch.setattr(benchmark, "_run_part", run)
    return ran


def test_all_writes_a_record_of_every_part(all_in_this_process, tmp_path, capsys):
    folder = tmp_path / "records"
    benchmark.main(["all", "--out", str(folder), "--minutes", "2"])
    names = ["check", "layers", "network", "profile", "loader", "network_compiled"]
    assert {file.stem for file in folder.iterdir()} == {*names, "all"}
    for name in names:
        record = json.loads((folder / f"{name}.json").read_text())
        assert record["benchmark"] == name.removesuffix("_compiled")
        assert 0 < record["arguments"]["minutes"] < 2
    summary = json.loads((folder / "all.json").read_text())
    assert [(part["part"], part["outcome"]) for part in summary["parts"]] == [(name, "done") for name in names]
    assert json.loads((folder / "network_compiled.json").read_text())["arguments"]["compile"]
    # each is told to end before it is ended
    minutes = [float(command[command.index("--minutes") + 1]) for command, _, _ in all_in_this_process]
    limits = [seconds for *_, seconds in all_in_this_process]
    assert all(60 * m < seconds for m, seconds in zip(minutes, limits, strict=True))
    assert "=== layers: done" in capsys.readouterr().out


def test_parts_share_what_is_left(tmp_path, monkeypatch):
    """However long each takes up to its limit, the sum is the whole; a part leaves to others what it does not use."""
    now, taken, limits = [0.0], {"check": 0.0}, {}

    def run(command, environment, seconds):
        limits[command[command.index("--json") + 1].split("/")[-1]] = seconds
        now[0] += taken.get(command[0], seconds)
        return "ended at its limit"

    monkeypatch.setattr(benchmark, "perf_counter", lambda: now[0])
    monkeypatch.setattr(benchmark, "_run_part", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit) as caught:
        benchmark.main(["all", "--device", "cuda", "--dtype", "bfloat16", "--out", str(tmp_path / "new")])
    assert caught.value.code == 1
    assert now[0] == pytest.approx(8 * 60)
    assert len(limits) == len(benchmark._PARTS)
    assert limits["layers.json"] == pytest.approx(8 * 60 * 16 / sum(w for _, w, *_ in benchmark._PARTS[1:]))


def test_a_part_that_lacks_a_package_is_left_out_and_said(all_in_this_process, tmp_path, monkeypatch, capsys):
    find = benchmark.find_spec
    monkeypatch.setattr(benchmark, "find_spec", lambda name: None if name == "lightning" else find(name))
    with pytest.raises(SystemExit) as caught:
        benchmark.main(["all", "--out", str(tmp_path / "new")])
    assert caught.value.code == 1
    assert "loader: left out: lightning is not installed" in capsys.readouterr().out
    assert all(command[0] != "loader" for command, *_ in all_in_this_process)
    assert (tmp_path / "new" / "network_compiled.json").exists()


def test_each_part_is_a_process_and_all_go_on_whatever_one_does(tmp_path, monkeypatch):
    seen = []

    class Process:
        pid = 12345678

        def __init__(self, command, *, env, start_new_session):
            assert start_new_session
            seen.append((command[3], env.get("AWCONV_AUTOTUNE")))
            self.place = len(seen)

        def wait(self, timeout=None):
            if self.place == 1 and timeout is not None:
                raise subprocess.TimeoutExpired("command", timeout)
            return 3 if self.place == 2 else 0

    killed = []
    monkeypatch.setattr(benchmark.subprocess, "Popen", Process)
    monkeypatch.setattr(benchmark.os, "killpg", lambda group, signal: killed.append(group))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("AWCONV_AUTOTUNE", raising=False)
    with pytest.raises(SystemExit):
        benchmark.main(["all", "--device", "cuda", "--out", str(tmp_path / "new")])
    assert [name for name, tuned in seen if tuned == "1"] == ["layers", "check"]
    outcomes = [part["outcome"] for part in json.loads((tmp_path / "new" / "all.json").read_text())["parts"]]
    assert outcomes[:3] == ["ended at its limit", "failed with exit code 3", "done"]
    assert killed == [Process.pid]


def test_what_a_part_started_ends_with_it(tmp_path, monkeypatch):
    """A pipe is at its end when nobody can write into it any more."""
    pipe, program = tmp_path / "pipe", tmp_path / "program"
    os.mkfifo(pipe)
    program.write_text(f"#!/bin/sh\n(echo begun; exec sleep 60) > {pipe} &\nwait\n")
    program.chmod(0o755)
    monkeypatch.setattr(benchmark.sys, "executable", str(program))
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert benchmark._run_part([], {}, 1.0) == "ended at its limit"
        assert os.read(reader, 100) == b"begun\n"
        assert select.select([reader], [], [], 30)[0], "a process still holds the pipe"
        assert os.read(reader, 100) == b""
    finally:
        os.close(reader)


def test_all_writes_into_no_existing_folder(tmp_path, capsys):
    assert "exists" in refused(["all", "--out", str(tmp_path)], capsys)
    assert "nowhere" in refused(["all", "--out", str(tmp_path / "nowhere" / "records")], capsys)


# --- command line ---------------------------------------------------------------------------------------------------


def test_shapes_are_those_of_resnet50():
    with torch.device("meta"):
        network, image = torchvision.models.resnet50(), torch.randn(1, 3, 224, 224)
    seen = set()

    def note(layer, inputs, output):
        seen.add((layer.in_channels, layer.out_channels, *inputs[0].shape[2:]))

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3) and layer.stride == (1, 1):
            layer.register_forward_hook(note)
    network(image)
    assert seen == {(channels, channels, size, size) for channels, size in benchmark.RESNET50_SHAPES}


def test_quick_run_prints_the_table_and_writes_the_records(tmp_path, capsys, monkeypatch):
    # the real shapes take longer and tell no more
    monkeypatch.setattr(benchmark, "RESNET50_SHAPES", ((16, 9), (32, 7)))
    file = tmp_path / "records.json"
    benchmark.main(["layers", "--quick", "--batch", "1", "--json", str(file)])
    out, err = capsys.readouterr()
    header, blank, *table, second_blank, legend, floor_legend = out.splitlines()
    records = json.loads(file.read_text())

    assert err == ""
    assert blank == second_blank == ""
    assert f"torch {torch.__version__}, float32, batch 1, {records['date']}" in header
    assert header.startswith(records["machine"])
    assert re.search(r"\b\d+ threads?$", records["machine"])
    assert "3 interleaved repeats" in legend
    assert len({len(line) for line in table}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    layers = ["16 ch, 9x9", "32 ch, 7x7"]
    assert [line[:2] for line in cells[2:]] == [[layer, contender] for layer in layers for contender in CONTENDERS]
    assert [line[4] for line in cells[2:] if line[1] == "Conv2d"] == ["1.00"] * 2

    assert records["benchmark"] == "layers"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", records["date"])
    assert records["versions"]["torch"] == torch.__version__
    assert set(records["versions"]) == {"python", "torch", "torchvision", "timm", "awconv"}
    assert records["arguments"] == {
        "device": "cpu", "batch": 1, "dtype": "float32", "repeats": 3, "memory_format": "contiguous_format",
    }  # fmt: skip
    assert len(records["rows"]) == 2 * 2 * len(CONTENDERS)
    first = records["rows"][0]
    assert cells[2][2].startswith(f"{first['median_ms']:.2f} (")
    assert cells[2][3] == f"{first['floor_ms']:.2f}"
    assert cells[2][5] == f"{first['peak_memory'] / 2**20:.1f}"
    ceilings = benchmark.Ceilings(*records["ceilings"].values())
    assert all(row["floor_ms"] == benchmark.floor_ms(row, ceilings) for row in records["rows"])
    assert f"{ceilings.flops / 1e9:.0f} GFLOP/s" in floor_legend


@pytest.fixture
def no_measuring(monkeypatch):
    def measure(shapes, **arguments):
        raise AssertionError(f"measured with {arguments} before the arguments were checked")

    monkeypatch.setattr(benchmark, "benchmark_layers", measure)


def refused(args, capsys):
    with pytest.raises(SystemExit) as exit:
        benchmark.main(args)
    out, err = capsys.readouterr()
    assert exit.value.code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err


@pytest.mark.usefixtures("no_measuring")
@pytest.mark.parametrize(
    ("args", "told"),
    [
        ([], ["required", "layers"]),
        (["layer"], ["'layer'", "layers"]),
        (["layers", "--batch", "0"], ["--batch", "'0'", "from 1"]),
        (["layers", "--batch", str(2**64)], ["--batch", str(2**64), "to 2147483647"]),
        (["layers", "--batch", "many"], ["--batch", "'many'", "whole number"]),
        (["layers", "--repeats", "-3"], ["--repeats", "'-3'", "from 1"]),
        (["layers", "--dtype", "int8"], ["--dtype", "int8", "float32", "bfloat16", "float16"]),
        (["layers", "--device", "tpu"], ["--device", "tpu", "cpu", "cuda"]),
        (["layers", "--fast"], ["--fast"]),
        (["layers", "--minutes", "0"], ["--minutes", "'0'", "above 0"]),
        (["layers", "--minutes", "nan"], ["--minutes", "'nan'"]),
        (["all"], ["--out"]),
        (["loader", "--workers", "0"], ["--workers", "'0'", "from 1"]),
        (["loader", "--dtype", "float32"], ["--dtype"]),
        (["draw", "nowhere.json", "--out", "picture.png"], ["nowhere.json", "cannot be read"]),
        (["draw", "README.md", "--out", "picture.png"], ["README.md", "cannot be read as a record"]),
        (["draw", "README.md"], ["--out"]),
        (["draw", "README.md", "--out", "README.md"], ["--out README.md", "exists"]),
    ],
)
def test_wrong_arguments_are_told_in_one_line(args, told, capsys):
    message = refused(args, capsys)
    assert all(word in message for word in told), message


@pytest.mark.usefixtures("no_measuring")
def test_missing_cuda_is_told_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = refused(["layers", "--device", "cuda"], capsys)
    assert "--device cuda" in message
    assert "--device cpu" in message


@pytest.mark.usefixtures("no_measuring")
def test_an_existing_file_is_not_written_over(tmp_path, capsys):
    file = tmp_path / "records.json"
    file.write_text("mine")
    message = refused(["layers", "--json", str(file)], capsys)
    assert str(file) in message
    assert "exists" in message
    assert file.read_text() == "mine"


@pytest.mark.usefixtures("no_measuring")
def test_a_missing_folder_is_told_before_anything_is_measured(tmp_path, capsys):
    message = refused(["layers", "--json", str(tmp_path / "nowhere" / "records.json")], capsys)
    assert str(tmp_path / "nowhere") in message
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_appears_meanwhile_is_not_written_over(tmp_path, capsys, monkeypatch):
    file = tmp_path / "records.json"

    def measure(shapes, **arguments):
        file.write_text("another run's")
        return []

    monkeypatch.setattr(benchmark, "benchmark_layers", measure)
    with pytest.raises(SystemExit) as exit:
        benchmark.main(["layers", "--json", str(file)])
    assert exit.value.code == 2
    assert str(file) in capsys.readouterr().err
    assert file.read_text() == "another run's"


def out_of_cpu_memory(shapes, **arguments):
    torch.empty(2**60, dtype=torch.uint8)


def out_of_cuda_memory(shapes, **arguments):
    raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("measure", [out_of_cpu_memory, out_of_cuda_memory])
def test_a_batch_that_does_not_fit_is_told_in_one_line(measure, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "benchmark_layers", measure)
    with pytest.raises(SystemExit) as exit:
        benchmark.main(["layers", "--batch", "77"])
    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "--batch 77" in err


def test_other_errors_are_not_blamed_on_memory(monkeypatch):
    def measure(shapes, **arguments):
        raise RuntimeError("something else")

    monkeypatch.setattr(benchmark, "benchmark_layers", measure)
    with pytest.raises(RuntimeError, match="something else"):
        benchmark.main(["layers"])


def test_runs_as_a_module():
    command = [sys.executable, "-m", "awconv.analysis.benchmark", "layers", "--batch", "x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("python -m awconv.analysis.benchmark")
    assert done.stderr.count("\n") == 1
