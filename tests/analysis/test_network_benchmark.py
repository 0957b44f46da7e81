"""The benchmark of whole networks, on small ones: what is measured, and what is said of it."""

import json

import pytest
import torch

from awconv.analysis import benchmark, measurement, network_benchmark
from awconv.analysis.network_benchmark import NETWORKS, benchmark_networks
from awconv.layers import AWConv2d
from awconv.models import create_backbone


@pytest.fixture
def small(monkeypatch):
    networks = {"resnet18": {"name": "resnet18"}, "aw_resnet18": {"name": "resnet18", "aw": True}}
    monkeypatch.setattr(network_benchmark, "NETWORKS", networks)


def test_the_networks_are_those_that_their_names_say():
    built = {name: create_backbone(**options, num_classes=10) for name, options in NETWORKS.items()}
    attended = {name: sum(isinstance(m, AWConv2d) for m in network.modules()) for name, network in built.items()}
    assert attended == {"resnet50": 0, "aw_resnet50": 16, "se_resnet50": 0, "aw_resnet101": 33}
    assert any("se" in name for name, _ in built["se_resnet50"].named_modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_records(small, dtype):
    rows = benchmark_networks(device="cpu", batch=2, size=32, dtype=dtype, repeats=2)
    assert [(row["network"], row["pass"]) for row in rows] == [
        ("resnet18", "forward"),
        ("aw_resnet18", "forward"),
        ("resnet18", "forward+backward"),
        ("aw_resnet18", "forward+backward"),
    ]
    for row in rows:
        assert row["mode"] == "eager"
        assert len(row["times_ms"]) == 2
        low, high = row["quartiles_ms"]
        assert low <= row["median_ms"] <= high
        if row["network"] == "resnet18":
            assert row["ratio"] == row["memory_ratio"] == 1
    inference, training = rows[0], rows[2]
    # a training step has to hold every gradient at once
    assert training["peak_memory"] > 4 * training["parameters"]
    assert 0 < inference["peak_memory"] < training["peak_memory"]
    assert rows[1]["parameters"] > rows[0]["parameters"] > 1e7


def test_a_step_of_training_learns_and_inference_does_not():
    torch.manual_seed(0)
    pictures, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    network = create_backbone("resnet18", num_classes=4)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network_benchmark._call(network, pictures, labels, torch.float32, training=False)()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    step = network_benchmark._call(network, pictures, labels, torch.float32, training=True)
    loss = torch.nn.functional.cross_entropy(network(pictures), labels)
    for _ in range(10):
        step()
    assert torch.nn.functional.cross_entropy(network(pictures), labels) < loss
    assert all(p.grad is None for p in network.parameters())


def test_compiled_networks_are_measured_beside_eager_ones(small, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(type(module).__name__))
    rows = benchmark_networks(device="cpu", batch=2, size=32, dtype=torch.float32, repeats=1, compiled=True)
    assert [row["mode"] for row in rows] == ["eager"] * 4 + ["compiled"] * 4
    assert compiled == ["ResNet"] * 4


def test_eager_networks_do_not_wait_for_a_compiler(small, monkeypatch):
    """A contender's name, and not its place, says what it is."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: None)
    now, begun = [0.0], []
    monkeypatch.setattr(measurement, "perf_counter", lambda: now[0])
    monkeypatch.setattr(measurement, "peak_memory", lambda call, device: 1)
    measure, kinds = network_benchmark.measure_interleaved, []

    def timed(cases, **options):
        kinds.extend(options["kinds"])

        def contender(kind, name):
            # the first call compiles: a step of training for 40 s, inference for 15 s
            left = [{"compiled forward": 15.0, "compiled forward+backward": 40.0}.get(kind, 1.0)]

            def call():
                begun.append((kind, name))
                now[0] += left.pop() if left else 0.01

            return call

        fakes = [{name: contender(kind, name) for name in case} for kind, case in zip(kinds, cases, strict=True)]
        return measure(fakes, **options)

    monkeypatch.setattr(network_benchmark, "measure_interleaved", timed)
    rows = benchmark_networks(
        device="cpu", batch=2, size=32, dtype=torch.float32, repeats=3, compiled=True, deadline=120.0
    )
    modes = [(row["mode"], row["pass"], row["network"]) for row in rows]
    assert modes == [
        (mode, name, network)
        for mode in ("eager", "compiled")
        for name in measurement.PASSES
        for network in ("resnet18", "aw_resnet18")
    ]
    assert [kind for kind, _ in dict.fromkeys(begun)][:4] == [
        "eager forward+backward", "eager forward", "compiled forward+backward", "compiled forward",
    ]  # fmt: skip
    # a second step of training would perhaps be compiled for 80 s, which are not left; inference has 30 s
    reached = [(row["mode"], row["pass"]) for row in rows if row["median_ms"] and row["network"] == "aw_resnet18"]
    assert reached == [("eager", "forward"), ("eager", "forward+backward"), ("compiled", "forward")]
    assert now[0] <= 120


def test_the_command_prints_a_table_and_writes_the_records(small, tmp_path, capsys):
    file = tmp_path / "rows.json"
    benchmark.main(["network", "--repeats", "1", "--batch", "2", "--size", "32", "--json", str(file)])
    said = capsys.readouterr().out
    record = json.loads(file.read_text())
    assert record["benchmark"] == "network"
    assert record["arguments"] == {
        "device": "cpu", "batch": 2, "dtype": "float32", "repeats": 1, "size": 32, "compile": False,
        "memory_format": "contiguous_format",
    }  # fmt: skip
    assert len(record["rows"]) == 4
    lines = [line for line in said.splitlines() if line.startswith("|")]
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    assert f"{2e3 / record['rows'][0]['median_ms']:.1f}" in lines[2]


def test_networks_that_are_not_reached_have_no_times(small, monkeypatch):
    def nothing(cases, **options):
        assert options["deadline"] == 7.0
        return [{} for _ in cases]

    monkeypatch.setattr(network_benchmark, "measure_interleaved", nothing)
    rows = benchmark_networks(device="cpu", batch=2, size=32, dtype=torch.float32, repeats=1, deadline=7.0)
    assert [row["median_ms"] for row in rows] == [None] * 4
    table = network_benchmark.networks_table(rows, 2).splitlines()
    assert len({line.count("|") for line in table}) == 1
    assert [line.count("not reached") for line in table] == [0, 0, 2, 2]


WRONG = [["--batch", "0"], ["--batch", "1"], ["--size", "x"], ["--device", "cuda"], ["--quick", "--depth", "3"]]


@pytest.mark.parametrize("args", WRONG)
def test_wrong_arguments_are_told_in_one_line(args, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        benchmark.main(["network", *args])
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
