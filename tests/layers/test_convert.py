"""`convert_to_aw`: which convolutions it takes, what it keeps, and that it can keep the function of a whole network."""

import contextlib
import copy

import pytest
import timm
import torch
import torchvision
from oracle import attention_head
from torch import nn

from awconv.layers import BAM, AWConv2d, convert_to_aw


def converted(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, AWConv2d)}


def wide_kernels(model, *prefixes):
    """Names of plain convolutions with more than one kernel position below the prefixes."""
    return {
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1 and name.startswith(prefixes)
    }


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.narrow = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return x + self.narrow(self.conv2(torch.relu(self.bn1(self.conv1(x)))))


class Network(nn.Module):
    def __init__(self, channels=8):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.Sequential(Block(channels), Block(channels))
        self.head = nn.Linear(channels, 5)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


ALL = ["blocks.*.conv1", "blocks.*.conv2"]
NAMES = {f"blocks.{b}.conv{c}" for b in (0, 1) for c in (1, 2)}


def network(seed=0):
    torch.manual_seed(seed)
    return Network()


# ---------------------------------------------------------------------------------------------- which convolutions


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_resnets_lose_exactly_their_block_convolutions(name):
    model = torchvision.models.get_model(name, weights=None)
    expected = wide_kernels(model, "layer")
    convert_to_aw(model)
    assert set(converted(model)) == expected
    assert type(model.conv1) is nn.Conv2d
    if name == "resnet18":
        assert len(expected) == 16
    else:
        assert expected == {n for n in expected if n.endswith("conv2")}
        assert len(expected) == 16


def test_mobilenet_converts_its_depthwise_convolutions():
    model = torchvision.models.mobilenet_v2(weights=None)
    expected = {n for n in wide_kernels(model, "features") if n != "features.0.0"}
    convert_to_aw(model)
    assert set(converted(model)) == expected
    assert len(expected) == 17
    assert all(m.groups == m.in_channels for m in converted(model).values())


def test_densenet_converts_inside_its_layers():
    model = torchvision.models.densenet121(weights=None)
    expected = wide_kernels(model, "features.denseblock")
    convert_to_aw(model)
    assert set(converted(model)) == expected
    assert len(expected) == 58


def test_convnext_keeps_patchify_stem_and_downsampling():
    """They lie outside the residual blocks."""
    model = timm.create_model("convnext_atto", pretrained=False)
    convert_to_aw(model)
    assert converted(model)
    assert all(name.endswith("conv_dw") for name in converted(model))


@pytest.mark.parametrize("name", ["resnet10t", "resnet26d"])
def test_deep_stems_are_stems(name):
    """Three convolutions in front, all of them the stem."""
    model = timm.create_model(name, pretrained=False)
    expected = wide_kernels(model, "layer")
    convert_to_aw(model)
    assert set(converted(model)) == expected


@pytest.mark.parametrize("attention", ["se", "cbam", "eca", "bam"])
def test_activation_attention_stays_where_it_is(attention):
    """It acts on activations: CBAM's 7x7 and BAM's dilated convolutions are no kernels to attend to."""
    # timm hands its attention layers a device and a dtype
    layer = (lambda channels, **_: BAM(channels)) if attention == "bam" else attention
    model = timm.create_model("resnet10t", pretrained=False, block_args={"attn_layer": layer})
    assert wide_kernels(model, "layer") > {"layer1.0.conv1"}
    convert_to_aw(model)
    assert set(converted(model)) == {f"layer{i}.0.conv{j}" for i in (1, 2, 3, 4) for j in (1, 2)}


class ResidualNetwork(nn.Module):
    """A user's network, whose own name says residual and whose stem is not called so."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.blocks = nn.Sequential(Block(8), Block(8))

    def forward(self, x):
        return self.blocks(self.first(x))


def test_the_name_of_the_network_does_not_make_its_stem_a_block():
    assert set(converted(convert_to_aw(ResidualNetwork()))) == NAMES


def test_a_single_block_can_be_converted():
    assert set(converted(convert_to_aw(Block(8)))) == {"conv1", "conv2"}


def test_include_and_exclude_are_globs_of_module_names():
    assert set(converted(convert_to_aw(network(), include=ALL))) == NAMES
    assert set(converted(convert_to_aw(network(), include=["*.conv2"]))) == {"blocks.0.conv2", "blocks.1.conv2"}
    assert set(converted(convert_to_aw(network(), include=["blocks.[1]*conv?"]))) == {
        "blocks.1.conv1",
        "blocks.1.conv2",
    }
    kept = convert_to_aw(network(), include=ALL, exclude=["blocks.0.*", "*.conv1"])
    assert set(converted(kept)) == {"blocks.1.conv2"}
    assert set(converted(convert_to_aw(network(), include=["stem"]))) == {"stem"}, "asked for by name"


def test_exclude_alone_takes_away_from_the_default():
    model = torchvision.models.resnet18(weights=None)
    convert_to_aw(model, exclude=["layer1.*", "layer[23].*"])
    assert set(converted(model)) == {f"layer4.{b}.conv{c}" for b in (0, 1) for c in (1, 2)}


@pytest.mark.parametrize(
    "patterns", [{"include": ["layer9.*"]}, {"include": ["head"]}, {"include": ALL, "exclude": ["*"]}]
)
def test_nothing_matching_lists_what_there_was(patterns):
    model = network()
    with pytest.raises(ValueError, match=r"blocks\.0\.conv1") as error:
        convert_to_aw(model, **patterns)
    assert "\n" not in str(error.value)
    assert not converted(model)


def test_network_without_convolutions_is_refused():
    with pytest.raises(ValueError) as error:  # noqa: PT011 - there is no name to look for
        convert_to_aw(nn.Sequential(nn.Linear(4, 4)))
    assert "\n" not in str(error.value)


def test_pattern_that_is_one_string_is_not_taken_letter_by_letter():
    """`include="*.conv2"` either means the one pattern or is refused; it must not mean `*`."""
    try:
        model = convert_to_aw(network(), include="*.conv2")
    except (TypeError, ValueError):
        return
    assert set(converted(model)) == {"blocks.0.conv2", "blocks.1.conv2"}


def test_converting_twice_does_not_nest():
    model = convert_to_aw(network(), include=ALL)
    before = model.state_dict().keys()
    layers = converted(model)
    with contextlib.suppress(ValueError):
        convert_to_aw(model, include=ALL)
    assert model.state_dict().keys() == before
    assert converted(model) == layers


def test_converting_in_two_steps():
    model = convert_to_aw(network(), include=["*.conv1"], share=4)
    convert_to_aw(model, include=["*.conv2"], share=2)
    shares = {n: m.extra_repr() for n, m in converted(model).items()}
    assert set(shares) == NAMES
    assert all(("share=4" if n.endswith("conv1") else "share=2") in text for n, text in shares.items())


def test_default_conversion_leaves_heads_of_earlier_conversions_alone():
    """The attention's own convolutions are no candidates."""
    model = torchvision.models.resnet18(weights=None)
    convert_to_aw(model, include=["layer1.0.conv1"])
    convert_to_aw(model, exclude=["layer1.0.conv1"])
    assert set(converted(model)) == wide_kernels(model, "layer")
    assert len(converted(model)) == 16


# ---------------------------------------------------------------------------------------------- what is kept


def test_replaces_in_place_and_keeps_every_number_and_setting():
    model = Network().double().eval()
    model.blocks[0].conv1.weight.requires_grad_(False)
    model.blocks[1].conv2.bias.requires_grad_(False)
    model.blocks[1].conv1.train()
    before = copy.deepcopy(model)
    assert convert_to_aw(model, include=ALL) is model
    for name in NAMES:
        old, new = before.get_submodule(name), model.get_submodule(name)
        assert type(new) is AWConv2d
        assert torch.equal(old.weight, new.weight)
        assert (old.bias is None) == (new.bias is None)
        assert old.bias is None or torch.equal(old.bias, new.bias)
        assert new.weight.requires_grad == old.weight.requires_grad
        assert old.bias is None or new.bias.requires_grad == old.bias.requires_grad
        assert all(m.training == old.training for m in new.modules())
        assert all(t.dtype == torch.float64 for t in new.state_dict().values() if t.is_floating_point())
        for setting in ("stride", "padding", "dilation", "groups", "padding_mode", "kernel_size"):
            assert getattr(old, setting) == getattr(new, setting)
    assert model(torch.randn(2, 3, 8, 8, dtype=torch.float64)).shape == (2, 5)
    report = model.load_state_dict(before.state_dict(), strict=False)
    assert report.unexpected_keys == []
    assert all(any(k.startswith(f"{n}.") for n in NAMES) for k in report.missing_keys)


def test_attention_of_a_frozen_kernel_can_still_learn():
    model = network().requires_grad_(False)
    convert_to_aw(model, include=ALL)
    for layer in converted(model).values():
        assert not layer.weight.requires_grad
        assert all(p.requires_grad for m in attention_head(layer) for p in m.parameters())


def test_keeps_the_device_and_lower_precision():
    model = convert_to_aw(Network().to(torch.bfloat16), include=ALL)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    on_meta = convert_to_aw(Network().to("meta"), include=ALL)
    assert all(t.device.type == "meta" for t in on_meta.state_dict().values())


def test_every_kind_of_convolution_is_carried_over():
    model = nn.Sequential(
        nn.Conv2d(8, 8, (3, 1), 1, "same", (2, 1), 2, False, "reflect"),
        nn.Conv2d(8, 16, 3, 2, (1, 0), 1, 8, True, "circular"),
        nn.Conv2d(16, 4, 2, (1, 2), "valid"),
    )
    x = torch.randn(2, 8, 9, 8)
    expected = model(x)
    convert_to_aw(model, include=["0", "1", "2"], preserve_function=True)
    assert len(converted(model)) == 3
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_options_reach_every_layer():
    model = convert_to_aw(
        network(), include=ALL, reduction=2, share=4, head_groups=2, residual=False, zero_init=False, backend="gemm"
    )
    for layer in converted(model).values():
        text = layer.extra_repr()
        assert all(part in text for part in ("reduction=2", "share=4", "head_groups=2", "residual=False", "gemm"))
        assert attention_head(layer)[3].weight.abs().max() > 0, "zero_init=False"


def test_wrong_options_leave_the_model_as_it_was():
    model = network()
    before = copy.deepcopy(model.state_dict())
    for options in ({"share": 3}, {"backend": "fast"}, {"reduction": 0}, {"head_groups": 3}):
        with pytest.raises(ValueError, match=next(iter(options))) as error:
            convert_to_aw(model, include=ALL, preserve_function=True, **options)
        assert "\n" not in str(error.value)
    with pytest.raises((TypeError, ValueError), match="shares"):
        convert_to_aw(model, include=ALL, shares=4)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_share_that_fits_some_layers_only_changes_none():
    """Half a conversion would be the worst answer to a wrong option."""
    model = nn.Sequential(nn.Conv2d(8, 12, 3), nn.Conv2d(12, 8, 3))
    with pytest.raises(ValueError, match="share"):
        convert_to_aw(model, include=["0", "1"], share=8)
    assert not converted(model)


def test_one_convolution_used_twice_stays_one():
    model = network()
    model.blocks[1].conv1 = model.blocks[0].conv1
    convert_to_aw(model, include=ALL)
    assert model.blocks[1].conv1 is model.blocks[0].conv1
    assert isinstance(model.blocks[0].conv1, AWConv2d)


def test_kernel_shared_by_two_convolutions_stays_shared():
    """And a function-preserving conversion must not divide it twice."""
    model = network().eval()
    model.blocks[1].conv1.weight = model.blocks[0].conv1.weight
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    convert_to_aw(model, include=ALL, preserve_function=True)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)


class Standardised(nn.Conv2d):
    """A convolution with a forward of its own, as timm's weight-standardised and TF-padded ones."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


@pytest.mark.parametrize("kind", ["subclass", "weight_norm"])
def test_convolution_with_its_own_forward_is_never_changed_silently(kind):
    model = network().eval()
    if kind == "subclass":
        model.blocks[0].conv1 = Standardised(8, 8, 3, padding=1, bias=False)
    else:
        nn.utils.parametrizations.weight_norm(model.blocks[0].conv1)
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    with contextlib.suppress(ValueError):
        convert_to_aw(model, include=ALL, preserve_function=True)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------- the same function


def shaken(model, seed=0):
    """Statistics and affine weights as a trained network has them: none at 0 or 1, all of them different."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(like, low, high):
        return low + (high - low) * torch.rand(like.shape, generator=generator)

    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.running_mean.copy_(uniform(m.running_mean, -0.2, 0.2))
                m.running_var.copy_(uniform(m.running_var, 0.5, 1.5))
                m.weight.copy_(uniform(m.weight, 0.6, 1.2))
                m.bias.copy_(uniform(m.bias, -0.2, 0.2))
    return model


def relative(got, expected):
    return float((got - expected).norm() / expected.norm())


NETWORKS = [
    ("torchvision", "resnet18", 64),
    ("torchvision", "resnext50_32x4d", 64),
    ("torchvision", "regnet_y_400mf", 64),
    ("torchvision", "mobilenet_v2", 64),
    ("torchvision", "efficientnet_b0", 64),
    ("torchvision", "densenet121", 64),
    ("timm", "resnet26", 64),
    ("timm", "convnext_atto", 64),
    ("timm", "mobilenetv3_small_050", 64),
    ("timm", "ecaresnet26t", 64),
    ("timm", "seresnet18", 64),
    ("timm", "regnetx_002", 64),
    ("timm", "tf_efficientnet_b0", 64),
]


def build(library, name):
    torch.manual_seed(0)
    if library == "timm":
        return timm.create_model(name, pretrained=False, num_classes=10)
    return torchvision.models.get_model(name, weights=None, num_classes=10)


@pytest.mark.parametrize(("library", "name", "side"), NETWORKS)
def test_network_keeps_its_function_and_can_learn(library, name, side):
    model = shaken(build(library, name)).eval()
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(x)
    assert expected.std() > 1e-4, "a constant output would prove nothing"
    convert_to_aw(model, preserve_function=True)
    layers = converted(model)
    assert layers
    assert not any(m.training for m in model.modules())
    got = model(x)
    assert relative(got.detach(), expected) < 1e-5
    got.square().sum().backward()
    for layer_name, layer in layers.items():
        maximum = max(float(p.grad.abs().max()) for m in attention_head(layer) for p in m.parameters())
        assert maximum > 0, layer_name


def test_conversion_without_it_does_change_the_function():
    model = shaken(build("torchvision", "resnet18")).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        assert relative(convert_to_aw(model)(x), expected) > 1e-2


@pytest.mark.parametrize("options", [{}, {"residual": False}, {"zero_init": False}, {"share": 1, "head_groups": 4}])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_function_is_kept_with_every_option(options, training):
    model = shaken(network()).double().train(training)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    expected = copy.deepcopy(model)(x)
    convert_to_aw(model, include=ALL, preserve_function=True, **options)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    for layer in converted(model).values():
        maps = layer.attention_maps(torch.randn(2, 8, 5, 5, dtype=torch.float64))
        assert torch.equal(maps, torch.full_like(maps, 0.5))


def test_preserved_network_learns_its_attention():
    """A few steps on the attention alone, all else frozen, lower the loss."""
    model = network().requires_grad_(False)
    convert_to_aw(model, include=ALL, preserve_function=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(0)
    x, target = torch.randn(8, 3, 8, 8), torch.randint(5, (8,))
    optimiser = torch.optim.Adam(parameters, lr=0.1)
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(x), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    layer = model.blocks[0].conv1
    assert layer.attention_maps(torch.randn(2, 8, 8, 8)).std() > 1e-3


# ---------------------------------------------------------------------------------------------- parameter counts


# (bottlenecks, width of their 3x3) per stage, He et al. 2016, table 1
STAGES = {
    "resnet50": [(3, 64), (4, 128), (6, 256), (3, 512)],
    "resnet101": [(3, 64), (4, 128), (23, 256), (3, 512)],
}


def extra_weights(name, share, head_groups):
    """Closed form: PointConv1 has C * hidden weights, PointConv2 hidden / head_groups * C * C / share."""
    total = 0
    for blocks, width in STAGES[name]:
        hidden = max(width // 16, 4)
        groups = hidden if head_groups == "hidden" else head_groups
        total += blocks * (width * hidden + hidden // groups * (width * width // share))
    return total


@pytest.mark.parametrize(
    ("name", "share", "head_groups", "millions"),
    [
        ("resnet50", 16, 1, 2.08),
        ("resnet101", 16, 1, 3.26),
        ("resnet50", 1, "hidden", 1.34),
        ("resnet101", 1, "hidden", 2.52),
        ("resnet50", 1, 1, 32.1),
        ("resnet101", 1, 1, 50.0),
    ],
)
def test_extra_parameters_of_resnets(name, share, head_groups, millions):
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None)
        before = sum(p.numel() for p in model.parameters())
        for stage, (_, width) in enumerate(STAGES[name], start=1):
            groups = max(width // 16, 4) if head_groups == "hidden" else head_groups
            convert_to_aw(model, include=[f"layer{stage}.*.conv2"], share=share, head_groups=groups)
    layers = converted(model)
    assert len(layers) == sum(blocks for blocks, _ in STAGES[name])
    point_convs = [conv for layer in layers.values() for conv in attention_head(layer)[::2]]
    counted = sum(conv.weight.numel() for conv in point_convs)
    assert counted == extra_weights(name, share, head_groups)
    assert counted == pytest.approx(millions * 1e6, rel=0.02)
    # biases and normalisations are all that the number leaves out
    left_out = sum(p.numel() for layer in layers.values() for m in attention_head(layer) for p in m.parameters())
    rest = sum(p.numel() for p in model.parameters()) - before
    assert rest == left_out
    assert all(
        p.dim() == 1 or any(p is conv.weight for conv in point_convs)
        for layer in layers.values()
        for m in attention_head(layer)
        for p in m.parameters()
    )


def test_default_conversion_of_resnet50_is_the_share_16_one():
    with torch.device("meta"):
        model = convert_to_aw(torchvision.models.resnet50(weights=None))
    point_convs = [conv for layer in converted(model).values() for conv in attention_head(layer)[::2]]
    assert sum(conv.weight.numel() for conv in point_convs) == extra_weights("resnet50", 16, 1)
