"""create_backbone: every combination it promises, against published counts and timm's own networks."""

import contextlib
import itertools
import sys

import pytest
import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

from awconv.errors import InputError
from awconv.layers import BAM, AWConv2d
from awconv.models import create_backbone

NAMES = ["resnet20", "resnet56", "resnet18", "resnet50", "mobilenetv2_100"]
ATTENTIONS = [None, "se", "eca", "cbam", "ge", "bam"]
ATTENTION_CLASSES = {"se": "SEModule", "eca": "EcaModule", "cbam": "CbamModule", "ge": "GatherExcite", "bam": "BAM"}
BLOCKS = {"resnet20": 9, "resnet56": 27, "resnet18": 8, "resnet50": 16, "resnet101": 33, "mobilenetv2_100": 17}
AW_LAYERS = {"resnet20": 18, "resnet56": 54, "resnet18": 16, "resnet50": 16, "resnet101": 33, "mobilenetv2_100": 17}
BAMS = {"resnet20": 2, "resnet56": 2, "resnet18": 3, "resnet50": 3, "resnet101": 3, "mobilenetv2_100": 4}


def millions(network):
    return sum(p.numel() for p in network.parameters()) / 1e6


def aw_layers(network):
    return [name for name, module in network.named_modules() if isinstance(module, AWConv2d)]


def randomise_norms(network):
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)


@pytest.mark.parametrize("aw", [None, True], ids=["plain", "aw"])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", [*NAMES, pytest.param("resnet101", marks=pytest.mark.slow)])
def test_every_combination_builds_and_learns(name, attention, aw):
    torch.manual_seed(0)
    network = create_backbone(name, attention=attention, aw=aw, num_classes=10)
    logits = network(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 10)
    logits.square().sum().backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key

    assert len(aw_layers(network)) == (AW_LAYERS[name] if aw else 0)
    for kind, class_name in ATTENTION_CLASSES.items():
        there = [m for m in network.modules() if type(m).__name__ == class_name]
        expected = 0 if kind != attention else BAMS[name] if kind == "bam" else BLOCKS[name]
        assert len(there) == expected
        assert not any(isinstance(m, AWConv2d) for module in there for m in module.modules())


@pytest.mark.parametrize(
    ("name", "kwargs", "expected"),
    [
        ("resnet50", {}, 25.56),
        ("resnet101", {}, 44.55),
        ("mobilenetv2_100", {}, 3.505),
        ("resnet50", {"attention": "se"}, 28.09),
        ("resnet101", {"attention": "se"}, 49.33),
        ("resnet50", {"attention": "cbam"}, 28.09),
        ("resnet101", {"attention": "cbam"}, 49.33),
        ("resnet50", {"attention": "bam"}, 25.92),
        ("resnet101", {"attention": "bam"}, 44.91),
        ("resnet50", {"attention": "eca"}, 25.56),
        # GE-theta-minus has no parameters
        ("resnet50", {"attention": "ge"}, 25.56),
        ("resnet18", {"stem": "cifar", "num_classes": 100}, 11.22),
        ("resnet50", {"stem": "cifar", "num_classes": 100}, 23.71),
    ],
)
def test_parameter_counts_are_the_published_ones(name, kwargs, expected):
    with torch.device("meta"):
        network = create_backbone(name, **kwargs)
    # 0.1%: published counts differ in whether the perceptrons of CBAM have biases
    assert millions(network) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("name", "expected"), [("resnet50", 2.08), ("resnet101", 3.26)])
def test_aw_adds_what_the_design_says(name, expected):
    with torch.device("meta"):
        network = create_backbone(name, aw={"share": 16})
    heads = [m.attention for m in network.modules() if isinstance(m, AWConv2d)]
    added = sum(m.weight.numel() for head in heads for m in head.modules() if isinstance(m, nn.Conv2d))
    assert added / 1e6 == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("name", "attention", "timms"), [("resnet50", "se", "seresnet50"), ("resnet50d", "eca", "ecaresnet50d")]
)
def test_attention_is_where_timm_puts_it(name, attention, timms):
    torch.manual_seed(0)
    ours, theirs = create_backbone(name, attention=attention), timm.create_model(timms)
    randomise_norms(theirs)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_attention_weights_start_as_in_timms_networks():
    torch.manual_seed(0)
    ours, theirs = create_backbone("resnet50", attention="se"), timm.create_model("seresnet50")
    for layer in ("fc1", "fc2"):
        a, b = (getattr(network.layer4[0].se, layer) for network in (ours, theirs))
        assert a.weight.std().item() == pytest.approx(b.weight.std().item(), rel=0.02)


def test_mobilenet_attention_follows_the_depthwise_convolution():
    network = create_backbone("mobilenetv2_100", attention="se")
    block = network.blocks[3][1]
    seen = {}
    block.se.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0], y=output))
    block.bn2.register_forward_hook(lambda module, inputs, output: seen.update(depthwise=output))
    block.conv_pwl.register_forward_pre_hook(lambda module, inputs: seen.update(projected=inputs[0]))
    network(torch.randn(2, 3, 64, 64))
    assert torch.equal(seen["x"], seen["depthwise"])
    assert torch.equal(seen["y"], seen["projected"])
    assert seen["x"].shape[1] == block.conv_dw.out_channels


def test_ge_is_gather_excite_without_parameters():
    network = create_backbone("resnet18", attention="ge")
    x = torch.randn(2, 64, 5, 7)
    expected = x * torch.sigmoid(x.mean(dim=(2, 3), keepdim=True))
    torch.testing.assert_close(network.layer1[0].se(x), expected)


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("resnet20", ["layer1.bam", "layer2.bam"]),
        ("resnet50", ["layer1.bam", "layer2.bam", "layer3.bam"]),
        ("mobilenetv2_100", ["blocks.0.bam", "blocks.1.bam", "blocks.2.bam", "blocks.4.bam"]),
        ("regnetx_002", ["s1.bam", "s2.bam", "s3.bam"]),
        # its last stage is a 1x1 convolution
        ("mobilenetv3_large_100", ["blocks.0.bam", "blocks.1.bam", "blocks.2.bam", "blocks.4.bam"]),
    ],
)
def test_bam_stands_before_each_downsampling(name, places):
    network = create_backbone(name, attention="bam")
    assert [n for n, m in network.named_modules() if isinstance(m, BAM)] == places
    shapes = []
    for place in places:
        network.get_submodule(place).register_forward_hook(lambda m, i, output: shapes.append(output.shape[-1]))
    features = network.forward_features(torch.randn(2, 3, 64, 64))
    shapes.append(features.shape[-1])
    assert all(before == 2 * after for before, after in itertools.pairwise(shapes))


# name: its blocks, and its stages but the last
WHOLE = {
    "resnet18d": (8, 3),
    "resnext50_32x4d": (16, 3),
    "mobilenetv1_100": (13, 4),
    "mnasnet_100": (17, 4),
    "hardcorenas_a": (None, 4),  # has SE of its own
    "tf_mobilenetv3_small_minimal_100": (11, 3),
    "regnetx_002": (13, 3),
    "regnety_002": (None, 3),
    "hrnet_w18_small": (23, None),
    "mobilenetv4_conv_small": None,
    "mobilenetv4_conv_medium": None,
    "mobilenetv4_hybrid_medium": None,
    "efficientnetv2_rw_t": None,
    "densenet121": None,
    "dla34": None,
    "skresnet18": None,
    "res2net50_26w_4s": None,
}


@pytest.mark.parametrize("attention", ATTENTIONS[1:])
@pytest.mark.parametrize("name", WHOLE)
def test_attention_is_in_every_block_or_refused(name, attention):
    """Never in some of the blocks only: the table row would carry the wrong name."""
    try:
        with torch.device("meta"):
            network = create_backbone(name, attention=attention)
    except InputError as error:
        message = str(error)
        assert "\n" not in message
        assert f"attention={attention!r}" in message
        assert name in message
        added = None
    else:
        attentions = [m for m in network.modules() if type(m).__name__ == ATTENTION_CLASSES[attention]]
        added = len(attentions)
        # timm's blocks are what has stochastic depth
        blocks = [m for m in network.modules() if hasattr(m, "drop_path")]
        if attention != "bam":
            assert added == len([m for m in blocks if any(max(c.kernel_size) > 1 for c in convolutions(m))])
    assert added == (WHOLE[name] or (None, None))[attention == "bam"]


def convolutions(module):
    return [m for m in module.modules() if isinstance(m, nn.Conv2d)]


@pytest.mark.parametrize("name", ["mobilenetv1_100", "regnetx_002", "tf_mobilenetv3_small_minimal_100"])
def test_every_bam_runs(name):
    network = create_backbone(name, attention="bam").eval()
    modules, ran = [m for m in network.modules() if isinstance(m, BAM)], []
    for module in modules:
        module.register_forward_hook(lambda module, inputs, output: ran.append(module))
    network(torch.randn(1, 3, 64, 64))
    assert ran == modules


@pytest.mark.parametrize(
    "name", ["resnet20", "resnet18", "resnet18d", "mobilenetv2_100", "mobilenetv3_small_050", "mixnet_s"]
)
def test_cifar_stem_keeps_a_quarter_of_the_stride(name):
    network = create_backbone(name, stem="cifar", num_classes=10, in_channels=1).eval()
    x = torch.randn(2, 1, 32, 32)
    assert network(x).shape == (2, 10)
    size = network.forward_features(x).shape[-1]
    assert size == (8 if name == "resnet20" else 4)
    # what the network says of its features is still true
    sizes = {}
    for info in network.feature_info:
        module = network.get_submodule(info["module"])
        module.register_forward_hook(lambda m, i, output, info=info: sizes.update({info["module"]: output.shape}))
    network(x)
    for info in network.feature_info:
        assert sizes[info["module"]][1:] == (info["num_chs"], 32 // info["reduction"], 32 // info["reduction"])


def test_cifar_stem_of_resnet_is_one_3x3_convolution_without_pooling():
    network = create_backbone("resnet18", stem="cifar")
    assert (network.conv1.kernel_size, network.conv1.stride, network.conv1.padding) == ((3, 3), (1, 1), (1, 1))
    assert isinstance(network.maxpool, nn.Identity)


def test_aw_options_reach_the_layers():
    options = {"reduction": 8, "share": 4, "head_groups": 2, "residual": False, "backend": "gemm"}
    network = create_backbone("resnet18", aw=options | {"include": ["layer[34].*"], "exclude": "layer4.1.*"})
    blocks = ("layer3.0", "layer3.1", "layer4.0")
    assert aw_layers(network) == [f"{block}.{conv}" for block in blocks for conv in ("conv1", "conv2")]
    for name in aw_layers(network):
        layer = network.get_submodule(name)
        assert {key: getattr(layer, key) for key in options} == options


def test_aw_false_is_a_plain_network():
    assert not aw_layers(create_backbone("resnet20", aw=False))


@pytest.mark.parametrize("attention", ["cbam", "bam"])
def test_no_pattern_reaches_into_activation_attention(attention):
    network = create_backbone("resnet18", attention=attention, aw={"include": "*"})
    converted = aw_layers(network)
    assert "conv1" in converted
    assert len(converted) == 17
    assert not any(".se." in name or ".bam." in name for name in converted)


@pytest.mark.parametrize("preserve", [True, False])
def test_preserve_function(preserve):
    torch.manual_seed(0)
    plain = create_backbone("resnet18", num_classes=10).eval()
    torch.manual_seed(0)
    network = create_backbone("resnet18", num_classes=10, aw={"preserve_function": preserve}).eval()
    x = torch.randn(2, 3, 64, 64)
    factor = 1.5 if preserve else 1.0
    torch.testing.assert_close(network.layer1[0].conv1.weight * factor, plain.layer1[0].conv1.weight)
    # timm starts each residual branch at zero, where any two ResNets would agree
    for net in (plain, network):
        for module in net.modules():
            if isinstance(module, BasicBlock):
                nn.init.ones_(module.bn2.weight)
    assert torch.allclose(network(x), plain(x), rtol=1e-4, atol=1e-5) == preserve


@pytest.fixture
def toy_with_weights(tmp_path, monkeypatch):
    """A network registered from outside, whose pretrained weights are a file."""
    torch.manual_seed(0)
    source = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=6)
    randomise_norms(source)
    path = tmp_path / "toy.pth"
    torch.save(source.state_dict(), path)
    cfg = {"file": str(path), "num_classes": 6, "classifier": "fc", "first_conv": "conv1", "input_size": (3, 32, 32)}

    def toy_resnet10(pretrained=False, **kwargs):
        return build_model_with_cfg(ResNet, "toy_resnet10", pretrained, block=BasicBlock, layers=(1, 1, 1, 1), **kwargs)

    module = sys.modules[__name__]
    monkeypatch.setattr(module, "default_cfgs", generate_default_cfgs({"toy_resnet10.test": cfg}), raising=False)
    with pytest.warns(UserWarning, match="Overwriting") if timm.is_model("toy_resnet10") else contextlib.nullcontext():
        register_model(toy_resnet10)
    return source.eval()


def test_pretrained_weights_arrive(toy_with_weights):
    x = torch.randn(2, 3, 32, 32)
    for name in ("toy_resnet10", "toy_resnet10.test"):
        network = create_backbone(name, pretrained=True, num_classes=6).eval()
        assert torch.equal(network(x), toy_with_weights(x))


def test_pretrained_aw_network_preserves_the_function_unless_told_otherwise(toy_with_weights):
    x = torch.randn(2, 3, 32, 32)
    preserved = create_backbone("toy_resnet10", aw=True, pretrained=True, num_classes=6).eval()
    assert len(aw_layers(preserved)) == 8
    torch.testing.assert_close(preserved(x), toy_with_weights(x), rtol=1e-4, atol=1e-5)
    scaled = create_backbone("toy_resnet10", aw={"preserve_function": False}, pretrained=True, num_classes=6)
    assert torch.equal(scaled.layer1[0].conv1.weight, toy_with_weights.layer1[0].conv1.weight)


def test_pretrained_trunk_serves_other_classes_stem_and_attention(toy_with_weights):
    network = create_backbone("toy_resnet10", attention="se", stem="cifar", pretrained=True, num_classes=4)
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 4)
    assert torch.equal(network.layer2[0].conv2.weight, toy_with_weights.layer2[0].conv2.weight)


def test_pretrained_weights_that_cannot_be_fetched(toy_with_weights, tmp_path):
    (tmp_path / "toy.pth").unlink()
    with pytest.raises(InputError, match=r"weights of 'toy_resnet10' could not be fetched.*initial_weights") as caught:
        create_backbone("toy_resnet10", pretrained=True, num_classes=6)
    assert "\n" not in str(caught.value)


def test_a_registered_network_is_a_backbone():
    class Toy(nn.Module):
        def __init__(self, num_classes, in_chans):
            super().__init__()
            self.stem = nn.Conv2d(in_chans, 8, 3)
            self.body = nn.Conv2d(8, 16, 3)
            self.fc = nn.Linear(16, num_classes)

        def forward(self, x):
            return self.fc(self.body(self.stem(x)).mean(dim=(2, 3)))

    def forkers_toy(pretrained=False, num_classes=1000, in_chans=3, **kwargs):
        return Toy(num_classes, in_chans)

    register_model(forkers_toy)
    network = create_backbone("forkers_toy", aw=True, num_classes=5, in_channels=2)
    assert network(torch.randn(3, 2, 9, 9)).shape == (3, 5)
    assert aw_layers(network) == ["body"]


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"name": "resnet05"}, ["backbone='resnet05'", "'resnet50'"]),
        ({"name": "resnett56"}, ["'resnet56'"]),
        ({"name": "resnet50.a1_in2k"}, ["backbone='resnet50.a1_in2k'", "'a1_in1k'"]),
        ({"name": "zzz"}, ["backbone='zzz'", "timm.list_models"]),
        ({"attention": "sse"}, ["attention='sse'", "'se'", "eca, cbam, ge, bam"]),
        ({"name": "densenet121", "attention": "se"}, ["attention='se'", "densenet121", "mobilenetv2_100"]),
        ({"name": "densenet121", "attention": "bam"}, ["attention='bam'", "densenet121", "mobilenetv2_100"]),
        (
            {"name": "mobilenetv4_conv_medium", "attention": "se"},
            ["attention='se'", "only 1 of the 18 blocks", "UniversalInvertedResidual", "mobilenetv2_100"],
        ),
        ({"name": "mobilenetv4_conv_medium", "attention": "bam"}, ["attention='bam'", "UniversalInvertedResidual"]),
        ({"name": "hrnet_w18_small", "attention": "bam"}, ["attention='bam'", "hrnet_w18_small", "stages"]),
        ({"name": "seresnet18", "attention": "eca"}, ["seresnet18", "attention of its own"]),
        ({"name": "mobilenetv3_small_050", "attention": "se"}, ["attention of its own"]),
        ({"stem": "cfar"}, ["stem='cfar'", "'cifar'", "imagenet, cifar"]),
        ({"name": "densenet121", "stem": "cifar"}, ["stem='cifar'", "densenet121", "mobilenetv2_100"]),
        ({"name": "efficientnet_blur_b0", "stem": "cifar"}, ["stem='cifar'", "efficientnet_blur_b0"]),
        ({"aw": "yes"}, ["aw='yes'", "mapping"]),
        ({"aw": {"shar": 4}}, ["'shar'", "did you mean 'share'"]),
        ({"aw": {"device": "cpu"}}, ["'device'", "choose one of"]),
        ({"aw": {"share": 5}}, ["share=5 must divide", "layer1.0.conv1", "[1, 2, 4, 8, 16, 32, 64]"]),
        ({"aw": {"reduction": "x"}}, ["aw={'reduction': 'x'}"]),
        ({"aw": {"backend": "fast"}}, ["backend='fast'", "'gemm'"]),
        ({"aw": {"include": ["layer9.*"]}}, ["layer9", "layer1.0.conv1"]),
        ({"aw": {"exclude": ["layer1.*", "layer9.*"]}}, ["exclude pattern 'layer9.*'", "layer1.0.conv1"]),
        ({"aw": {"share": 2.0}}, ["share=2.0 must be an integer"]),
        ({"name": "vit_tiny_patch16_224", "aw": True}, ["aw=True", "vit_tiny_patch16_224", "nothing"]),
        ({"name": "resnet20", "pretrained": True}, ["pretrained=True", "'resnet20'", "initial_weights"]),
        ({"num_classes": 0}, ["num_classes=0"]),
        ({"in_channels": 0}, ["in_channels=0"]),
    ],
)
def test_bad_input_gets_one_line(kwargs, says):
    with pytest.raises(InputError) as caught:
        create_backbone(**{"name": "resnet18"} | kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in says if part not in message] == []
