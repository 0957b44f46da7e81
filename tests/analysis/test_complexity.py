"""Complexity: published numbers, and layers counted by hand."""

import json

import pytest
import torch
import torchvision
from torch import nn

from awconv.analysis.complexity import format_table, main, measure_complexity
from awconv.layers import AWConv2d, convert_to_aw


def pictures(size, channels=3):
    return [torch.rand(channels, size, size) for _ in range(2)]


@pytest.mark.parametrize("name", ["ResNet18_Weights", "ResNet50_Weights", "MobileNet_V2_Weights"])
def test_parameters_and_operations_are_the_published_ones(name):
    published = getattr(torchvision.models, name).IMAGENET1K_V1.meta
    network = getattr(torchvision.models, name.removesuffix("_Weights").lower())(weights=None)
    *rows, total = measure_complexity(network, pictures(224))
    assert total.parameters == published["num_params"] == sum(row.parameters for row in rows)
    assert total.flops / 2e9 == pytest.approx(published["_ops"], abs=1e-3)  # which calls two of them one
    assert total.flops == sum(row.flops for row in rows)


@pytest.mark.parametrize("groups", [1, 2])
def test_an_aw_layer_by_hand(groups):
    layer = AWConv2d(16, 32, 3, padding=1, groups=groups, share=4, reduction=2, backend="gemm")
    network = nn.Sequential(layer)
    row, total = measure_complexity(network, pictures(10, 16))
    weights, hidden = 32 * 16 // groups * 9, 8
    convolution = 2 * weights * 10 * 10
    head = 2 * 9 * (16 * hidden + hidden * 32 * (16 // groups // 4))
    assert (row.name, row.kind, row.output) == ("0", "AWConv2d", (32, 10, 10))
    assert row.flops == total.flops == convolution + head + weights
    assert row.parameters == total.parameters == sum(p.numel() for p in layer.parameters())
    assert layer.backend == "gemm"


def test_activations_by_hand():
    """What is kept: the input once, the convolution's output for the normalisation, and that of the ReLU."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    first, norm, relu, last, total = measure_complexity(network, pictures(6))
    plane = 6 * 6 * 4
    assert first.activations == 3 * plane
    assert norm.activations == pytest.approx(8 * plane, abs=100)  # and a mean and a deviation of each channel
    assert relu.activations == 8 * plane
    assert last.activations == 0, "its input is the ReLU's output, which is kept already"
    assert total.activations == sum(row.activations for row in (first, norm, relu, last))


@pytest.mark.parametrize("backend", ["auto", "fused", "grouped"])
def test_attention_costs_memory_as_its_backend_keeps_it(backend):
    """The maps, once or twice, and where each sample's kernel is formed, that too."""
    torch.manual_seed(0)
    plain = measure_complexity(torchvision.models.resnet18(weights=None), pictures(32))[-1]
    network = convert_to_aw(torchvision.models.resnet18(weights=None), backend=backend)
    aw = measure_complexity(network, pictures(32))[-1]
    layers = [m for m in network.modules() if isinstance(m, AWConv2d)]
    assert {layer.backend for layer in layers} == {backend}
    kernels = sum(layer.weight.nbytes for layer in layers)
    maps = sum(layer.weight.nbytes // layer.share for layer in layers)
    more = aw.activations - plain.activations
    if backend == "grouped":
        assert kernels < more < kernels + 4 * maps
    else:
        assert maps < more < 4 * maps


def test_the_network_is_left_as_it_was():
    network = torchvision.models.resnet18(weights=None).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    measure_complexity(network, pictures(32))
    assert not network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_the_command(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["--json", str(tmp_path / "rows.json"), "--model.aw.share=4"])
    said = capsys.readouterr().out
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["picture"] == "1x16x16"
    assert written["layers"][-1]["name"] == "total"
    assert sum(row["kind"] == "AWConv2d" for row in written["layers"]) == 18
    assert f"{written['layers'][-1]['parameters']:,}" in said
    assert {len(line) for line in said.splitlines() if line.startswith("|")} == {len(said.splitlines()[-1])}, (
        "a straight table"
    )
    assert list(tmp_path.iterdir()) == [tmp_path / "rows.json"], "it builds, and runs nothing"


def test_a_detector(capsys, tmp_path):
    options = ["--data.train_scenes=2", "--data.val_scenes=1", "--data.test_scenes=1", "--data.image_size=64"]
    configs = ["-c", "configs/recipes/digit_scenes.yaml", "-c", "configs/models/aw_faster_rcnn_resnet18_small.yaml"]
    main([*configs, *options, "--data.max_size=96", f"--data.root={tmp_path}"])
    said = capsys.readouterr().out
    assert "one picture of 3x64x96" in said
    assert "backbone.body.layer1.0.conv1" in said
    assert "roi_heads" in said


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--model.backbone=resnet21"], "resnet21"),
        (["--json=none/rows.json"], "json='none/rows.json': expected a new file"),
        (["-c", "configs/nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_bad_arguments(capsys, args, says):
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert says in line


def test_an_empty_table_is_a_header():
    assert len(format_table([]).splitlines()) == 2
