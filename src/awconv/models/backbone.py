"""One function that builds any classification network of this project from primitives."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from itertools import dropwhile
from typing import Any, Literal, get_args

import timm
from timm.layers.cbam import CbamModule
from timm.layers.eca import EcaModule
from timm.layers.gather_excite import GatherExcite
from timm.layers.squeeze_excite import SEModule
from timm.models import regnet
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, EdgeResidual, InvertedResidual
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from awconv.errors import InputError
from awconv.layers import BAM, AWConv2d, convert_to_aw
from awconv.layers.convert import BLOCK
from awconv.models.cifar_resnet import CIFARResNet

Attention = Literal["se", "eca", "cbam", "ge", "bam"]
Stem = Literal["imagenet", "cifar"]

# The blocks with a place for attention (their attribute ``se``), and how many channels pass there.
_CHANNELS_AT_SLOT: dict[type[nn.Module], Callable[[Any], int]] = {
    BasicBlock: lambda block: block.conv2.out_channels,
    Bottleneck: lambda block: block.conv3.out_channels,
    regnet.Bottleneck: lambda block: block.conv3.conv.in_channels,
    DepthwiseSeparableConv: lambda block: block.conv_pw.in_channels,
    InvertedResidual: lambda block: block.conv_pwl.in_channels,
    EdgeResidual: lambda block: block.conv_pwl.in_channels,
}
_SLOT_ATTENTION: dict[str, Callable[[int], nn.Module]] = {
    "se": SEModule,
    "eca": EcaModule,
    "cbam": CbamModule,
    # GE-theta-minus over the whole map, the paper's variant without parameters: with parameters timm's class raises
    # in some releases (1.0.31 among them), and its default, an MLP on the global average, would be SE again.
    "ge": lambda channels: GatherExcite(channels, use_mlp=False),
}
_FAMILIES = (
    "the CIFAR ResNets (resnet20, ...), timm's ResNets (resnet18, resnet50d, resnext50_32x4d, ...), its "
    "MobileNets V1 to V3, EfficientNets and MNASNets (mobilenetv2_100, ...)"
)


def create_backbone(
    name: str,
    *,
    attention: Attention | None = None,
    aw: bool | Mapping[str, Any] | None = None,
    stem: Stem = "imagenet",
    pretrained: bool = False,
    num_classes: int = 1000,
    in_channels: int = 3,
) -> nn.Module:
    """Builds a classification network.

    Activation attention and AW-convolution are independent: the first rescales feature maps, the second kernels, and
    ``attention="se", aw=True`` on ``resnet50`` is AW-SE-ResNet-50.

    Your own backbone needs no change here: decorate its constructor with ``timm.models.register_model``, import its
    file, and its function's name is a backbone name. The function takes ``pretrained=False, **kwargs``, where
    ``num_classes`` and ``in_chans`` matter and the rest may be ignored; ``awconv/models/cifar_resnet.py`` is an
    example.

    Args:
        name: Any timm model name, with or without the tag of its weights (``"resnet50"``, ``"resnet50.a1_in1k"``), or
            a CIFAR ResNet of He et al. 2016: ``"resnet20"``, ``"resnet32"``, ``"resnet44"``, ``"resnet56"``,
            ``"resnet110"``.
        attention: Activation attention. ``"se"`` (squeeze-and-excitation, Hu et al. 2018), ``"eca"`` (Wang et al.
            2020), ``"cbam"`` (Woo et al. 2018) and ``"ge"`` (gather-excite, Hu et al. 2018, the parameter-free
            GE-theta-minus with global extent) are timm's modules and act in every block: in ResNets on the residual
            branch before the addition, in RegNets, MobileNets and EfficientNets after the 3x3 convolution, where
            RegNetY, MobileNetV3 and EfficientNet have theirs. ``"bam"`` (Park et al. 2018) acts between the stages.
        aw: Convert to AW-convolution: None or False for no, True for yes with the defaults, or a mapping of options
            of :class:`awconv.layers.AWConv2d` (``reduction``, ``share``, ``head_groups``, ``residual``,
            ``zero_init``, ``backend``), of where (``include``, ``exclude``: glob patterns of module names; by default
            every convolution with a kernel larger than 1 inside a block; every pattern must match a convolution) and
            ``preserve_function`` (start from the function of the plain network; by default True if ``pretrained``).
            Modules of ``attention`` are never converted.
        stem: ``"imagenet"`` leaves the network as published. ``"cifar"`` makes it fit 32x32 images, a quarter of the
            original stride: timm's ResNets get a 3x3 stem convolution of stride 1 (a deep stem keeps its three) and
            lose the max-pool; MobileNets and EfficientNets get stride 1 in the stem and in the first strided block.
            The CIFAR ResNets are the same with either.
        pretrained: Start from timm's weights, which are downloaded or taken from its cache. What they cannot cover
            (another number of classes, the stem of ``"cifar"``, ``attention``) starts at its initialisation.
        num_classes: Number of logits K.
        in_channels: Number of image channels C.

    Returns:
        A network from images (N, C, H, W) to logits (N, K).

    Raises:
        InputError: If a name or option is unknown, ``attention`` or ``stem`` does not exist for this family (or
            ``attention`` not in all of its blocks), there is nothing to convert, an AW option does not fit a layer, or
            there are no pretrained weights.
    """
    check_choice("attention", attention, (None, *get_args(Attention)))
    check_choice("stem", stem, get_args(Stem))
    for argument, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if value < 1:
            raise InputError(f"{argument}={value} must be at least 1")
    aw_options = _aw_options(aw, pretrained)

    network = _create_timm(name, pretrained, num_classes, in_channels)
    if stem == "cifar":
        _use_cifar_stem(name, network)
    if aw_options is not None:
        try:
            network = convert_to_aw(network, **aw_options)
        except (TypeError, ValueError) as error:
            raise InputError(f"aw={aw!r} on backbone {name!r}: {error}") from None
    # after the conversion, so that no pattern of `include` can reach the attention's own convolutions
    if attention == "bam":
        _insert_bam(name, network)
    elif attention is not None:
        _insert_in_blocks(name, network, attention)
    return network


def _create_timm(name: str, pretrained: bool, num_classes: int, in_channels: int) -> nn.Module:
    if not timm.is_model(name):
        raise InputError(
            f"backbone={name!r} is unknown; {nearest(name, timm.list_models())} "
            "(timm.list_models() lists the names; your own come from timm.models.register_model)"
        )
    architecture, _, tag = name.partition(".")
    tags = [known.partition(".")[2] for known in timm.list_models(architecture, include_tags=True)]
    if tag and tag not in tags:
        raise InputError(
            f"backbone={name!r}: {architecture} has no weights tagged {tag!r}; {nearest(tag, tags)}, or use no tag"
        )
    if not pretrained:
        network = timm.create_model(name, num_classes=num_classes, in_chans=in_channels)
        assert isinstance(network, nn.Module)
        return network
    if not timm.models.is_model_pretrained(name):
        raise InputError(
            f"pretrained=True (initial_weights: pretrained): there are no weights of {name!r}; leave it out, "
            "or give a file as initial_weights"
        )
    try:
        network = timm.create_model(name, pretrained=True, num_classes=num_classes, in_chans=in_channels)
    except Exception as error:  # the hub client, its HTTP library and urllib each raise their own kinds
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"pretrained=True (initial_weights: pretrained): the weights of {name!r} could not be fetched "
            f"({type(error).__name__}: {reason}); check the network and the proxy, or give a file as initial_weights"
        ) from error
    assert isinstance(network, nn.Module)
    return network


def _aw_options(aw: bool | Mapping[str, Any] | None, pretrained: bool) -> dict[str, Any] | None:
    """Returns the arguments of ``convert_to_aw``, or None for a plain network."""
    if aw is None or aw is False:
        return None
    if aw is not True and not isinstance(aw, Mapping):
        raise InputError(f"aw={aw!r} must be null, true, false or a mapping of options, for example {{share: 8}}")
    options = {"preserve_function": pretrained} | ({} if aw is True else dict(aw))
    parameters = inspect.signature(AWConv2d).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ("device", "dtype")]
    known += ["include", "exclude", "preserve_function"]
    for key in options:
        if key not in known:
            raise InputError(f"aw has no option {key!r}; {nearest(str(key), known, choices=True)}")
    return options


def _insert_in_blocks(name: str, network: nn.Module, attention: str) -> None:
    blocks = _blocks(name, network, attention)
    if any(not isinstance(block.se, nn.Identity | None) for block, _ in blocks):
        raise InputError(
            f"attention={attention!r}: backbone {name!r} has attention of its own; leave attention unset, or take a "
            "network without"
        )
    for block, channels in blocks:
        block.se = _SLOT_ATTENTION[attention](channels)
        for module in block.se.modules():
            if isinstance(module, nn.Conv2d):
                # what these networks do for all their convolutions when timm builds them with attention
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def _insert_bam(name: str, network: Any) -> None:
    blocks = {block for block, _ in _blocks(name, network, "bam")}
    try:
        stages = [(network.get_submodule(info["module"]), info["num_chs"]) for info in network.feature_info]
    except AttributeError:  # some networks describe features that they only have when built as feature extractors
        stages = []
    # a stem has no blocks; nor has MobileNetV3's last stage, a 1x1 convolution, which is a stage for all that
    stages = list(dropwhile(lambda stage: not blocks.intersection(stage[0].modules()), stages))
    # only these run what is added to them
    if len(stages) < 2 or not all(isinstance(stage, nn.Sequential | regnet.RegStage) for stage, _ in stages):
        raise InputError(
            f"attention='bam': backbone {name!r} has no sequence of stages to put it between; it works for "
            f"{_FAMILIES}, and RegNets"
        )
    # the paper's placement: at every bottleneck, that is, before each downsampling, so none after the last stage
    for stage, channels in stages[:-1]:
        stage.add_module("bam", BAM(channels, reduction=min(16, channels)))


def _blocks(name: str, network: nn.Module, attention: str) -> list[tuple[Any, int]]:
    found = [
        (module, channels_at_slot(module))
        for module in network.modules()
        for kind, channels_at_slot in _CHANNELS_AT_SLOT.items()
        if isinstance(module, kind)
    ]
    if not found:
        raise InputError(
            f"attention={attention!r} has no place in backbone {name!r}; it works for {_FAMILIES}, and RegNets"
        )
    if without := _blocks_without_slot(network, {block for block, _ in found}):
        kinds = ", ".join(dict.fromkeys(type(block).__name__ for block in without))
        raise InputError(
            f"attention={attention!r} has a place in only {len(found)} of the {len(found) + len(without)} blocks "
            f"with a kernel larger than 1 of backbone {name!r} (not in {kinds}); it works for {_FAMILIES}, and RegNets"
        )
    return found


def _blocks_without_slot(network: nn.Module, with_slot: set[nn.Module]) -> list[nn.Module]:
    """Finds the blocks that neither are, nor hold, nor lie in one of ``with_slot``."""
    inside = {module for block in with_slot for module in block.modules()}
    without: list[nn.Module] = []
    for module in network.modules():  # outer blocks come before what they hold
        within = set(module.modules())
        convolves = any(isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1 for m in within)
        if BLOCK.search(type(module).__name__) and convolves and module not in inside and not within & with_slot:
            without.append(module)
            inside |= within
    return without


def _use_cifar_stem(name: str, network: Any) -> None:
    if isinstance(network, CIFARResNet):
        return
    is_resnet, is_mobile = isinstance(network, ResNet), isinstance(network, EfficientNet | MobileNetV3)
    if is_resnet:
        old = network.conv1
        if isinstance(old, nn.Conv2d):
            network.conv1 = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        else:
            old[0].stride = (1, 1)
        network.maxpool = nn.Identity()
    else:
        strided: list[nn.Conv2d] = []
        if is_mobile:
            in_blocks = ([*filter(_is_strided, block.modules())] for stage in network.blocks for block in stage)
            strided = next(filter(None, in_blocks), [])
        if not strided:
            raise InputError(f"stem='cifar' does not exist for backbone {name!r}; it works for {_FAMILIES}")
        for conv in (network.conv_stem, *strided):
            conv.stride = (1, 1)
    for info in network.feature_info:
        info["reduction"] = max(1, info["reduction"] // 4)


def _is_strided(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and max(module.stride) > 1


def check_choice(argument: str, value: str | None, choices: tuple[str | None, ...]) -> None:
    """Raises an :class:`InputError` that names what is near, unless ``value`` is one of ``choices``."""
    if value not in choices:
        names = [choice for choice in choices if choice is not None]
        none = ", or null" if None in choices else ""
        raise InputError(f"{argument}={value!r} is unknown; {nearest(str(value), names, choices=True)}{none}")


def nearest(name: str, known: Iterable[str], choices: bool = False) -> str:
    """Says which known names are close to a wrong one, and, where they are few, which there are."""
    known = list(known)
    close = get_close_matches(name.lower(), known, n=5, cutoff=0.6)
    near = f"did you mean {' or '.join(map(repr, close))}?" if close else ""
    there = f"choose one of {', '.join(known)}" if choices or (not close and len(known) <= 20) else ""
    return " ".join(filter(None, (near, there))) or "nothing is named like it"
