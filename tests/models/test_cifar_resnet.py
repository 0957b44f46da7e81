"""The CIFAR ResNets against the paper's table and a literal re-computation."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from awconv.models import CIFARResNet, create_backbone
from awconv.models.cifar_resnet import ShortcutA


@pytest.mark.parametrize(
    ("depth", "millions"),
    # He et al. 2016, table 6
    [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)],
)
def test_parameter_counts_are_those_of_the_paper(depth, millions):
    network = create_backbone(f"resnet{depth}", num_classes=10)
    count = sum(p.numel() for p in network.parameters()) / 1e6
    assert round(count, 1 if depth == 110 else 2) == millions


@pytest.mark.parametrize("depth", [20, 56, 110])
def test_depth_counts_weighted_layers(depth):
    network = CIFARResNet(depth)
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in network.modules()) == depth


@pytest.mark.parametrize("depth", [2, 18, 21, 101])
def test_depths_that_do_not_exist_are_refused(depth):
    with pytest.raises(ValueError, match=f"depth={depth} must be 6n \\+ 2"):
        CIFARResNet(depth)


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 1)])
def test_shortcut_a_pixel_by_pixel(size):
    x = torch.randn(2, 3, *size)
    shortcut = ShortcutA(extra_channels=4, stride=2)
    y = shortcut(x)
    height, width = (size[0] + 1) // 2, (size[1] + 1) // 2
    expected = torch.zeros(2, 7, height, width)
    for c in range(3):
        for i in range(height):
            for j in range(width):
                expected[:, c, i, j] = x[:, c, 2 * i, 2 * j]
    assert torch.equal(y, expected)
    assert not list(shortcut.parameters())


def literal_resnet20(state, x):
    """ResNet-20 in evaluation mode from its tensors alone, written from section 4.2."""

    def norm(name, x):
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"])

    x = norm("bn1", F.conv2d(x, state["conv1.weight"], padding=1)).clamp(min=0)
    for stage in (1, 2, 3):
        for block in (0, 1, 2):
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            y = F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            y = norm(f"{name}.bn1", y).clamp(min=0)
            y = norm(f"{name}.bn2", F.conv2d(y, state[f"{name}.conv2.weight"], padding=1))
            if stride == 2:
                x = x[:, :, ::2, ::2]
                x = torch.cat([x, torch.zeros_like(x)], dim=1)
            x = (x + y).clamp(min=0)
    return x.mean(dim=(2, 3)) @ state["fc.weight"].T + state["fc.bias"]


def test_forward_equals_a_literal_computation():
    torch.manual_seed(0)
    network = CIFARResNet(20, num_classes=7, in_chans=2).eval().double()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    x = torch.randn(3, 2, 31, 33, dtype=torch.float64)
    torch.testing.assert_close(network(x), literal_resnet20(network.state_dict(), x))


def test_registered_in_timm_like_any_other_network():
    assert isinstance(timm.create_model("resnet20", num_classes=5), CIFARResNet)
    assert set(timm.list_models("resnet[1-9]*")) >= {"resnet20", "resnet32", "resnet44", "resnet56", "resnet110"}
