"""Whether wrong kernels are found out, and whether launches are counted right."""

import json

import pytest
import torch

from awconv.analysis import benchmark, layer_checks
from awconv.layers import aw_conv2d

SHAPES = ((16, 6), (32, 4))


def check(monkeypatch=None, change=None):
    if change is not None:

        def changed(*arguments, backend, **options):
            output = aw_conv2d(*arguments, backend=backend, **options)
            return change(output) if backend == "fused" else output

        monkeypatch.setattr(layer_checks, "aw_conv2d", changed)
    return layer_checks.check_numerics(SHAPES, device="cpu", batch=2)


def test_right_numbers_are_told_as_right():
    before = torch.backends.cudnn.conv.fp32_precision
    rows = check()
    assert [(row["channels"], row["precision"]) for row in rows] == [
        (channels, precision) for channels in (32, 16) for precision in ("float32", "bfloat16")
    ]
    for row in rows:
        assert row["ok"]
        assert list(row["errors"]) == ["output", "input", "weight", "attention"]
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
    assert out.count("TOO LARGE") == 2
    rows = json.loads((tmp_path / "check.json").read_text())["rows"]
    assert [row["ok"] for row in rows] == [False, True] * 2


def test_a_time_limit_leaves_shapes_out():
    assert layer_checks.check_numerics(SHAPES, device="cpu", batch=1, deadline=0.0) == []
    options = {"device": "cpu", "batch": 1, "dtype": torch.float32, "deadline": 0.0}
    assert layer_checks.profile_layers(SHAPES, **options) == []


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
