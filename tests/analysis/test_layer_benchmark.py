"""The benchmark of the layers: what is called, counted and laid out."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from awconv.analysis import layer_benchmark, measurement
from awconv.layers import BACKENDS

CONTENDERS = ["Conv2d", *(f"AWConv2d {backend}" for backend in BACKENDS), "CondConv2d"]

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
    output = layer_benchmark._layer_call(probe, image, training=False)()
    assert probe.seen == [(False, False)]
    assert not output.requires_grad
    torch.testing.assert_close(output, probe.conv(image))


def test_backward_reaches_input_and_every_parameter():
    probe, image = Probe(), torch.randn(2, 3, 5, 5)
    call = layer_benchmark._layer_call(probe, image, training=True)
    gradients = call()
    assert probe.seen == [(True, True)]
    assert [g.shape for g in gradients] == [image.shape, probe.conv.weight.shape, probe.conv.bias.shape]
    assert all(g.abs().sum() > 0 for g in gradients)
    # a second call neither accumulates nor leaves gradients behind
    torch.testing.assert_close(call(), gradients)
    assert probe.conv.weight.grad is None
    assert not image.requires_grad


def test_routed_condconv_is_the_sample_by_sample_mixture():
    layer, images = layer_benchmark.RoutedCondConv2d(6, num_experts=3), torch.randn(4, 6, 7, 5)
    output = layer(images)
    experts = layer.conv.weight.view(3, 6, 6, 3, 3)
    for image, result in zip(images, output, strict=True):
        routing = torch.sigmoid(layer.routing(image.mean(dim=(1, 2))))
        kernel = sum(r * e for r, e in zip(routing, experts, strict=True))
        torch.testing.assert_close(result, F.conv2d(image[None], kernel, padding=1)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "shapes"),
    [(torch.float32, ((16, 6), (32, 5))), (torch.bfloat16, ((16, 6),)), (torch.float16, ((32, 5),))],
    ids=str,
)
def test_layer_records(dtype, shapes):
    rows = layer_benchmark.benchmark_layers(shapes, device="cpu", batch=2, dtype=dtype, repeats=2)
    keys = [(r["channels"], r["size"], r["pass"], r["contender"]) for r in rows]
    shapes_and_passes = [(c, s, p) for c, s in shapes for p in ("forward", "forward+backward")]
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
    rows = layer_benchmark.benchmark_layers(((16, 6),), device="cpu", batch=2, dtype=torch.float32, repeats=1)
    work = {(row["contender"], row["pass"]): (row["flops"], row["bytes"]) for row in rows}
    flops = 2 * 2 * 16 * 16 * 9 * 36
    assert work["Conv2d", "forward"] == (flops, 4 * (1152 + 1152 + 2304))
    assert work["AWConv2d grouped", "forward"] == (flops, 4 * (1152 + 1152 + 2304 + 288))
    assert work["AWConv2d fused", "forward+backward"] == (3 * flops, 4 * (5 * 1152 + 3 * (2304 + 288)))


def test_floor_is_the_slower_of_computing_and_moving():
    row = {"flops": 6e9, "bytes": 2e9}
    assert layer_benchmark.floor_ms(row, measurement.Ceilings(1e12, 1e12)) == pytest.approx(6)
    assert layer_benchmark.floor_ms(row, measurement.Ceilings(1e12, 1e11)) == pytest.approx(20)


def test_what_a_device_cannot_compute_is_left_out(monkeypatch):
    monkeypatch.setattr(layer_benchmark, "unsupported", lambda input: "needs Triton on CUDA")
    contenders = layer_benchmark._layer_contenders(16, torch.empty(0))
    assert "AWConv2d grouped" in contenders
    assert "AWConv2d fused" not in contenders


# --- table ----------------------------------------------------------------------------------------------------------


def test_table_is_aligned_markdown():
    def row(name, contender, median, ratio, mib):
        quartiles = [0.9 * median, 1.1 * median]
        return {"channels": 64, "size": 56, "pass": name, "contender": contender, "median_ms": median, "ratio": ratio,
                "quartiles_ms": quartiles, "peak_memory": mib * 2**20, "floor_ms": median / 4}  # fmt: skip

    table = layer_benchmark.layers_table(
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
