"""`convert_to_aw`: which convolutions it takes, what it keeps, and that it can keep the function of a whole network."""

import contextlib
import copy
import re
import warnings

import pytest
import timm
import torch
import torchvision
from oracle import attention_head
from torch import nn
from torch.nn.utils import prune

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


# name: how many AW-convolutions the default places, the first, the last, and how many plain wide ones stay (on timm)
PLACES = {
    "resnest14d": (4, "layer1.0.conv2.conv", "layer4.0.conv2.conv", 3),
    "resnest50d": (16, "layer1.0.conv2.conv", "layer4.2.conv2.conv", 3),
    "densenet121": (58, "features.denseblock1.denselayer1.conv2", "features.denseblock4.denselayer16.conv2", 1),
    "convnext_tiny": (18, "stages.0.blocks.0.conv_dw", "stages.3.blocks.2.conv_dw", 4),
    "senet154": (50, "layer1.0.conv2", "layer4.2.conv2", 6),
    "legacy_senet154": (50, "layer1.0.conv2", "layer4.2.conv2", 6),
    "ghostnet_100": (36, "blocks.0.0.ghost1.cheap_operation.0", "blocks.8.3.ghost2.cheap_operation.0", 6),
    "dla34": (24, "level2.tree1.conv1", "level5.tree2.conv2", 3),
    "dla60": (16, "level2.tree1.conv2", "level5.tree2.conv2", 3),
    "skresnet18": (24, "layer1.0.conv1.paths.0.conv", "layer4.1.conv2.conv", 1),
    "skresnet50": (32, "layer1.0.conv2.paths.0.conv", "layer4.2.conv2.paths.1.conv", 1),
    "efficientnetv2_rw_t": (39, "blocks.0.0.conv", "blocks.5.13.conv_dw", 1),
    "mobilenetv4_conv_small": (17, "blocks.0.0.conv", "blocks.3.5.dw_mid.conv", 1),
    "repvgg_a0": (21, "stages.0.0.conv_kxk.conv", "stages.3.0.conv_kxk.conv", 1),
    "regnety_004": (16, "s1.b1.conv2.conv", "s4.b6.conv2.conv", 1),
    "pvt_v2_b0": (8, "stages.0.blocks.0.mlp.dwconv", "stages.3.blocks.1.mlp.dwconv", 10),
}


@pytest.mark.parametrize("name", PLACES)
def test_default_places_in_each_family(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    convert_to_aw(model)
    layers = list(converted(model))
    left = {n for n in wide_kernels(model, "") if n not in layers}
    assert (len(layers), layers[0], layers[-1], len(left)) == PLACES[name]


@pytest.mark.parametrize("name", ["poolformer_s12", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_networks_without_convolutions_in_blocks_are_refused(name):
    """Patch embedding and downsampling are all they have: nothing to fall back on."""
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ValueError, match="leaves nothing"):
        convert_to_aw(model)


def test_filtered_candidates_are_no_reason_to_fall_back():
    """All the convolutions in blocks are shortcuts: the others are not taken in their stead."""
    model = network()
    for block in model.blocks:
        block.conv1, block.conv2 = nn.Identity(), nn.Identity()
        block.shortcut = nn.Conv2d(8, 8, 3, padding=1)
    model.neck = nn.Conv2d(8, 8, 3)
    with pytest.raises(ValueError, match="leaves nothing"):
        convert_to_aw(model)
    assert not converted(model)


@pytest.mark.parametrize(
    ("name", "count", "kind"), [("tf_efficientnet_b0", 4, "Conv2dSame"), ("tf_efficientnetv2_s", 4, "Conv2dSame")]
)
def test_one_warning_names_the_convolutions_left_alone(name, count, kind):
    with torch.device("meta"):
        model = timm.create_model(name)
    left = [n for n in wide_kernels(model, "blocks") if type(model.get_submodule(n)).__name__ == kind]
    assert len(left) == count
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        convert_to_aw(model)
    assert len(caught) == 1
    text = str(caught[0].message)
    assert caught[0].filename == __file__
    assert text.startswith(f"{count} of {count + len(converted(model))} convolutions of EfficientNet")
    assert sum(f"{n} ({kind})" in text for n in left) == 3
    assert "\n" not in text


def test_no_warning_about_places_that_nobody_asked_for():
    with torch.device("meta"):
        model = timm.create_model("tf_efficientnet_b0")
    subclasses = [n for n in wide_kernels(model, "blocks") if type(model.get_submodule(n)) is not nn.Conv2d]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_to_aw(model, exclude=subclasses)
        convert_to_aw(timm.create_model("resnet10t"))
    assert converted(model)


def test_network_of_subclasses_says_so():
    with torch.device("meta"):
        model = timm.create_model("nfnet_f0")
    with pytest.raises(ValueError, match=r"no plain nn\.Conv2d \(ScaledStdConv2d\)"):
        convert_to_aw(model)


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
    "patterns",
    [
        {"include": ["layer9.*"]},
        {"include": ["head"]},
        {"include": ALL, "exclude": ["*"]},
        {"include": [*ALL, "blocks.*.conv3"]},
        {"include": ALL, "exclude": ["blocks.0.*", "block.1.*"]},
        {"exclude": "block.1.*"},
    ],
)
def test_nothing_matching_lists_what_there_was(patterns):
    model = network()
    with pytest.raises(ValueError, match=r"blocks\.0\.conv1") as error:
        convert_to_aw(model, **patterns)
    assert "\n" not in str(error.value)
    assert not converted(model)


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_misspelt_pattern_is_named_though_others_match(argument):
    with pytest.raises(ValueError, match=rf"^{argument} pattern 'block\.1\.\*' matches no convolution"):
        convert_to_aw(network(), **{argument: ["blocks.0.*", "block.1.*"]})


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


def test_hooks_move_with_the_convolution():
    model, seen = network(), []
    conv = model.blocks[0].conv1
    handles = [
        conv.register_forward_hook(lambda module, inputs, output: seen.append(("forward", module))),
        conv.register_forward_pre_hook(lambda module, args, kwargs: seen.append(("pre", module)), with_kwargs=True),
        conv.register_full_backward_hook(lambda module, grad_input, grad_output: seen.append(("backward", module))),
    ]
    convert_to_aw(model, include=ALL)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    layer = model.blocks[0].conv1
    assert seen == [("pre", layer), ("forward", layer), ("backward", layer)]
    for handle in handles:
        handle.remove()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert len(seen) == 3


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


@pytest.mark.parametrize("other", ["conv", "linear", "aw"])
def test_kernel_shared_with_a_module_that_is_not_converted_is_refused(other):
    """Dividing the kernel would change what the other module computes."""
    model = network()
    kernel = model.blocks[0].conv1.weight
    if other == "linear":
        model.tied = nn.Linear(1, 1)
        model.tied.weight = kernel
        name = "tied"
    else:
        model.blocks[1].conv1.weight = kernel
        name = "blocks.1.conv1"
    if other == "aw":
        convert_to_aw(model, include=name)
    before, kinds = kernel.clone(), [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=rf"blocks\.0\.conv1 and {re.escape(name)} share one kernel") as error:
        convert_to_aw(model, include="blocks.0.*", preserve_function=True)
    assert "\n" not in str(error.value)
    assert torch.equal(kernel, before)
    assert [type(m) for m in model.modules()] == kinds
    convert_to_aw(model, include="blocks.0.*")
    assert "blocks.0.conv1" in converted(model), "nothing is divided, so nothing is in the way"


class Standardised(nn.Conv2d):
    """A convolution with a forward of its own, as timm's weight-standardised and TF-padded ones."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("kind", ["subclass", "weight_norm", "old_weight_norm", "spectral_norm", "prune"])
def test_convolution_with_its_own_forward_is_never_changed(kind):
    model = network().eval()
    conv = model.blocks[0].conv1
    if kind == "subclass":
        model.blocks[0].conv1 = Standardised(8, 8, 3, padding=1, bias=False)
    elif kind == "weight_norm":
        nn.utils.parametrizations.weight_norm(conv)
    elif kind == "old_weight_norm":
        nn.utils.weight_norm(conv)
    elif kind == "spectral_norm":
        nn.utils.spectral_norm(conv)
    else:
        prune.l1_unstructured(conv, "weight", 0.5)
    conv = model.blocks[0].conv1
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    with pytest.warns(UserWarning, match=r"^1 of 4 convolutions of Network .*blocks\.0\.conv1"):
        convert_to_aw(model, include=ALL, preserve_function=True)
    assert model.blocks[0].conv1 is conv
    assert len(converted(model)) == 3
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
    with pytest.warns(UserWarning, match="Conv2dSame") if name.startswith("tf_") else contextlib.nullcontext():
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
