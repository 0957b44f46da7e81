"""Whether wrong kernels are found out, and whether launches are counted right."""

import json
from types import SimpleNamespace

import pytest
import torch

from awconv.analysis import benchmark, layer_checks
from awconv.errors import InputError
from awconv.layers import AWConv2d, aw_conv2d, aw_conv2d_with_logits

SHAPES = ((16, 6), (32, 4))


def check(monkeypatch=None, change=None):
    if change is not None:

        def changed(compute):
            def call(*arguments, backend, **options):
                output = compute(*arguments, backend=backend, **options)
                return change(output) if backend == "fused" else output

            return call

        for compute in (aw_conv2d, aw_conv2d_with_logits):
            monkeypatch.setattr(layer_checks, compute.__name__, changed(compute))
    return layer_checks.check_numerics(SHAPES, device="cpu", batch=2)


def test_right_numbers_are_told_as_right():
    before = torch.backends.cudnn.conv.fp32_precision
    rows = check()
    assert [(row["channels"], row["given"], row["precision"]) for row in rows] == [
        (channels, given, precision)
        for channels, given in ((32, "logits"), (32, "attention"), (16, "logits"))
        for precision in ("float32", "bfloat16")
    ]
    for row in rows:
        assert row["ok"]
        assert list(row["errors"]) == ["output", "input", "weight", "maps"]
        low, high = (1e-9, 1e-6) if row["precision"] == "float32" else (1e-4, 1e-2)
        assert all(low < error < high for error in row["errors"].values())
    assert torch.backends.cudnn.conv.fp32_precision == before


@pytest.mark.parametrize("factor", [1.02, -1.0, 0.0])
def test_wrong_numbers_are_found_out(monkeypatch, factor):
    for row in check(monkeypatch, lambda output: output * factor):
        assert not row["ok"]
        assert row["errors"]["output"] == pytest.approx(abs(1 - factor), rel=0.2)


def test_what_was_not_written_is_found_out(monkeypatch):
    def with_a_hole(output):
        return output.masked_fill(torch.arange(output.shape[-1]) == 1, torch.nan)

    rows = check(monkeypatch, with_a_hole)
    assert all(not row["ok"] and row["errors"]["output"] is None for row in rows)
    assert "not a number" in layer_checks.errors_table(rows)
    json.dumps(rows, allow_nan=False)


def test_an_error_ends_the_command_with_1_after_its_record(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "RESNET50_SHAPES", SHAPES)
    monkeypatch.setitem(layer_checks._PRECISIONS, "float32", (torch.float32, "ieee", 1e-12))
    with pytest.raises(SystemExit) as caught:
        benchmark.main(["check", "--batch", "1", "--json", str(tmp_path / "check.json")])
    assert caught.value.code == 1
    out = capsys.readouterr().out
    assert out.count("TOO LARGE") == 3
    rows = json.loads((tmp_path / "check.json").read_text())["rows"]
    assert [row["ok"] for row in rows] == [False, True] * 3


@pytest.mark.parametrize("channels", [16, 256])
def test_logits_lie_in_memory_as_a_layer_leaves_them(channels):
    head = AWConv2d(channels, channels, 3, device="meta").attention.to_empty(device="cpu")
    pooled = torch.randn(16, channels, 3, 3).contiguous(memory_format=torch.channels_last)
    (_, _, logits), _ = layer_checks._random_arguments(channels, 5, "cpu", 16, torch.float32)
    expected = head.logits(pooled)
    assert logits.is_leaf
    assert logits.shape == expected.shape
    # an axis of one element may have any stride
    strides = [(a, b) for a, b, n in zip(logits.stride(), expected.stride(), logits.shape, strict=True) if n > 1]
    assert all(a == b for a, b in strides), strides


def shapes_of(rows, key):
    return [row["channels"] for row in rows if row[key] is not None]


def test_a_time_limit_leaves_shapes_out_and_says_so():
    rows = layer_checks.check_numerics(SHAPES, device="cpu", batch=1, deadline=0.0)
    assert [row["ok"] for row in rows] == [None] * 6
    table = layer_checks.errors_table(rows).splitlines()
    assert [line.count("not reached") for line in table] == [0, 0, *[1] * 6]
    options = {"device": "cpu", "batch": 1, "dtype": torch.float32, "deadline": 0.0}
    rows = layer_checks.profile_layers(SHAPES, **options)
    assert [row["launches"] for row in rows] == [None] * 8
    table = layer_checks.launches_table(rows).splitlines()
    assert [line.count("not reached") for line in table] == [0, 0, *[1] * 4]
    assert len(layer_checks.slowest_table(rows).splitlines()) == 2


@pytest.mark.parametrize(("deadline", "begun"), [(100.0, [32]), (200.5, [32, 16])])
def test_a_shape_is_begun_only_where_the_slowest_one_would_fit(monkeypatch, deadline, begun):
    now, reported = [0.0], []
    compared = layer_checks._compared

    def slowly(exact, given, precision):
        now[0] += 25.0
        return compared(exact, given, precision)

    monkeypatch.setattr(layer_checks, "_compared", slowly)
    monkeypatch.setattr(layer_checks, "perf_counter", lambda: now[0])
    rows = layer_checks.check_numerics(SHAPES, device="cpu", batch=1, deadline=deadline, report=reported.append)
    assert list(dict.fromkeys(shapes_of(rows, "ok"))) == begun
    # what is written before and after each shape tells of all shapes
    assert [len(told) for told in reported] == [6] * (1 + len(begun))
    assert [len(shapes_of(told, "ok")) for told in reported] == [0, 4, 6][: 1 + len(begun)]
    assert reported[-1] == rows


def test_nothing_checked_is_a_failure(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "RESNET50_SHAPES", SHAPES)
    monkeypatch.setattr(layer_checks, "perf_counter", lambda: float("inf"))
    with pytest.raises(SystemExit) as caught:
        benchmark.main(["check", "--minutes", "1", "--json", str(tmp_path / "check.json")])
    # which Python prints as one line, with exit code 1
    assert caught.value.code.startswith("nothing was checked")
    assert "\n" not in caught.value.code
    assert capsys.readouterr().out.count("not reached") == 6
    assert len(json.loads((tmp_path / "check.json").read_text())["rows"]) == 6


@pytest.mark.parametrize("command", ["check", "profile"])
def test_what_breaks_off_leaves_the_shapes_before(command, monkeypatch, tmp_path):
    file, calls = tmp_path / "record.json", []
    monkeypatch.setattr(benchmark, "RESNET50_SHAPES", SHAPES)
    draw = layer_checks._random_arguments

    def broken(channels, *arguments):
        if calls:
            raise KeyboardInterrupt
        calls.append(channels)
        return draw(channels, *arguments)

    monkeypatch.setattr(layer_checks, "_random_arguments", broken)
    with pytest.raises(KeyboardInterrupt):
        benchmark.main([command, "--batch", "1", "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert shapes_of(rows, {"check": "ok", "profile": "launches"}[command]) == [32] * 4
    assert {row["channels"] for row in rows} == {32, 16}


def test_a_record_is_written_over_only_by_its_own_run(tmp_path):
    file = tmp_path / "record.json"
    mine = SimpleNamespace(json=file)
    benchmark._end(mine, {"rows": [1]})
    benchmark._end(mine, {"rows": [2]})
    assert json.loads(file.read_text()) == {"rows": [2]}
    with pytest.raises(InputError, match="cannot be written"):
        benchmark._end(SimpleNamespace(json=file), {"rows": [3]})
    assert json.loads(file.read_text()) == {"rows": [2]}


def test_operators_that_compute_are_counted():
    left, right = torch.randn(4, 4), torch.randn(4, 4)

    def call():
        # the product is one operator, though it is called through others; views are none
        return (left.view(2, 8).view(4, 4) @ right).exp().exp().unsqueeze(0)

    kernels = {kernel["name"]: kernel["calls"] for kernel in layer_checks._launches(call, "cpu")}
    assert kernels == {"aten::mm": 1, "aten::exp": 2}


def test_profile_sets_the_head_apart_from_the_convolution(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "RESNET50_SHAPES", SHAPES)
    benchmark.main(["profile", "--batch", "2", "--json", str(tmp_path / "profile.json")])
    rows = json.loads((tmp_path / "profile.json").read_text())["rows"]
    keys = [(row["channels"], row["pass"], row["part"]) for row in rows]
    assert keys == [
        (channels, name, part)
        for channels in (32, 16)
        for name in ("forward", "forward+backward")
        for part in ("layer", "convolution")
    ]
    for row in rows:
        assert row["launches"] == sum(kernel["calls"] for kernel in row["kernels"])
        assert row["us"] == pytest.approx(sum(kernel["us"] for kernel in row["kernels"]))
    for layer, convolution in zip(rows[::2], rows[1::2], strict=True):
        assert layer["launches"] > convolution["launches"] > 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells[:2] == ["32 ch, 4x4", "forward"]
    assert int(cells[4]) == int(cells[2]) - int(cells[3]) == rows[0]["launches"] - rows[1]["launches"]
