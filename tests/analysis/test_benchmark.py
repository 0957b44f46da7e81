"""The benchmark's command line."""

import json
import os
import re
import select
import subprocess
import sys

import pytest
import torch
import torchvision
from torch import nn

from awconv.analysis import benchmark, layer_benchmark, loader_benchmark, measurement, network_benchmark
from awconv.layers import BACKENDS


def test_what_was_not_reached_is_said_in_the_table(monkeypatch, capsys):
    measure = measurement.measure_interleaved

    def without_gemm(cases, **options):
        return [{n: m for n, m in r.items() if n != "AWConv2d gemm"} for r in measure(cases, **options)]

    monkeypatch.setattr(layer_benchmark, "measure_interleaved", without_gemm)
    monkeypatch.setattr(benchmark, "RESNET50_SHAPES", ((16, 5),))
    monkeypatch.setattr(benchmark, "measure_ceilings", lambda *_: measurement.Ceilings(1e9, 1e9))
    benchmark.main(["layers", "--batch", "1", "--quick", "--minutes", "5"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert [line.count("not reached") for line in lines if "AWConv2d gemm" in line] == [2]
    assert sum(line.count("not reached") for line in lines) == 2


def test_a_call_has_no_ratio_to_a_replay(monkeypatch, capsys, tmp_path):
    measure = measurement.measure_interleaved

    def with_replays(cases, **options):
        return [
            {name: m._replace(replayed=name != "AWConv2d gemm") for name, m in result.items()}
            for result in measure(cases, **options)
        ]

    monkeypatch.setattr(layer_benchmark, "measure_interleaved", with_replays)
    monkeypatch.setattr(benchmark, "RESNET50_SHAPES", ((16, 5),))
    monkeypatch.setattr(benchmark, "measure_ceilings", lambda *_: measurement.Ceilings(1e9, 1e9))
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
    monkeypatch.setattr(benchmark, "measure_ceilings", lambda *_: measurement.Ceilings(1e9, 1e9))
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
    assert seen == {(channels, channels, size, size) for channels, size in layer_benchmark.RESNET50_SHAPES}


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
    contenders = ["Conv2d", *(f"AWConv2d {backend}" for backend in BACKENDS), "CondConv2d"]
    assert [line[:2] for line in cells[2:]] == [[layer, contender] for layer in layers for contender in contenders]
    assert [line[4] for line in cells[2:] if line[1] == "Conv2d"] == ["1.00"] * 2

    assert records["benchmark"] == "layers"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", records["date"])
    assert records["versions"]["torch"] == torch.__version__
    assert set(records["versions"]) == {"python", "torch", "torchvision", "timm", "awconv"}
    assert records["arguments"] == {
        "device": "cpu", "batch": 1, "dtype": "float32", "repeats": 3, "memory_format": "contiguous_format",
    }  # fmt: skip
    assert len(records["rows"]) == 2 * 2 * len(contenders)
    first = records["rows"][0]
    assert cells[2][2].startswith(f"{first['median_ms']:.2f} (")
    assert cells[2][3] == f"{first['floor_ms']:.2f}"
    assert cells[2][5] == f"{first['peak_memory'] / 2**20:.1f}"
    ceilings = measurement.Ceilings(*records["ceilings"].values())
    assert all(row["floor_ms"] == layer_benchmark.floor_ms(row, ceilings) for row in records["rows"])
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
