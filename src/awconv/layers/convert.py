"""Turning a plain network into an AW network."""

import re
import warnings
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import Tensor, nn

from awconv.layers.aw_conv import AWConv2d

_Model = TypeVar("_Model", bound=nn.Module)
_Conv = TypeVar("_Conv", bound=nn.Conv2d)

# The unit that torchvision, timm and most research code repeat, by the name of its class: BasicBlock, Bottleneck,
# PreActBottleneck, InvertedResidual, MBConv, CNBlock, ConvNeXtBlock, _DenseLayer, DepthwiseSeparableConv, ...; and
# timm's units of other names. ConvBnAct is EfficientNetV2's first block, but elsewhere a name for any convolution.
BLOCK = re.compile(
    r"(?i:block|bottle2?neck|residual|mbconv|denselayer|separableconv|^dlabasic$|^selectivekernelbasic$)|^ConvBnAct$"
)
# Activation attention acts beside AW-convolution, not through it: CBAM's 7x7, GE's depthwise and BAM's dilated
# convolutions stay as they are, and so do the subsampling convolutions of self-attention. ResNeSt's SplitAttn is no
# such thing: it holds the 3x3 convolution of its block; nor is a whole AttentionBlock or SEBottleneck.
_ACTIVATION_ATTENTION = re.compile(
    r"(?<!split)att(entio)?n(2d|2ddownsample)?$|^(light)?cbam(module|layer|block)?$|^bam$|gatherexcite|squeezeexcit"
    r"|^(effective)?se(module|layer|block)$|^c?eca(module|layer|block)?$|^globalcontext$",
    re.IGNORECASE,
)
# Some networks (RepVGG, say) build even their stem from blocks; it is known by the name of its attribute.
_STEM = re.compile(r"(^|[._])stem([._]|$)")
# What changes the resolution or the width beside or between the blocks, also where it sits inside one; and the
# convolution that stands for a VGG's first fully connected layer.
_BETWEEN_BLOCKS = re.compile(r"(^|\.)(downsample|shortcut|transition|patch_embed\w*|pre_logits)(\.|$)")
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def convert_to_aw(
    model: _Model,
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    preserve_function: bool = False,
    **options: Any,
) -> _Model:
    """Replaces convolutions of ``model`` by AW-convolutions, in place.

    Without ``include``, it replaces every ``nn.Conv2d`` with a kernel larger than 1 inside a residual (or dense, or
    inverted-residual) block: conv2 of a bottleneck, conv1 and conv2 of a basic block, the depthwise convolution of a
    MobileNet; never the stem, a 1x1, a shortcut, a convolution between stages, or one inside an SE, CBAM, GE or BAM
    module. Blocks are known by the names of their classes; in a network that has no convolution in a block (a VGG,
    say) every convolution with a kernel larger than 1 but the first is replaced. Weights, biases, device, dtype,
    training mode, frozen parameters, and forward and backward hooks are kept.

    AW-convolutions are left alone, so that converting twice is harmless as long as something is left to convert. So
    are convolutions that compute something else than ``nn.Conv2d`` with its ``weight``: subclasses (timm's
    ``Conv2dSame`` in its ``tf_`` networks), and those under weight or spectral normalisation or pruning. One warning
    names them.

    Args:
        model: Any network; a bare ``nn.Conv2d`` is returned as a new layer.
        include: Glob pattern or patterns of module names (``"layer3.*"``): exactly the matching convolutions with a
            kernel larger than 1 are replaced, in a block or not.
        exclude: Glob pattern or patterns of module names that are left alone. Every pattern, here and in ``include``,
            must match a convolution.
        preserve_function: Let the converted network compute what ``model`` computed, to rounding: the attention
            starts at exactly 1/2 everywhere and the kernels are divided by the scale that this gives.
        **options: Options of :class:`awconv.layers.AWConv2d`: ``reduction``, ``share``, ``head_groups``,
            ``residual``, ``zero_init``, ``backend``.

    Returns:
        ``model``, now with AW-convolutions.

    Raises:
        ValueError: If a pattern matches no convolution or nothing is left to convert (the message lists what there
            was), an option does not fit a layer, or ``preserve_function`` would divide a kernel that a module which
            is not converted shares; the model is then unchanged.

    Warns:
        UserWarning: If convolutions in the chosen places are left alone because they are no plain ``nn.Conv2d``.
    """
    include, exclude = _patterns(include), _patterns(exclude)
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    found = {name: conv for name, conv in convs.items() if not isinstance(conv, AWConv2d)}
    large = [name for name, conv in found.items() if max(conv.kernel_size) > 1]
    for argument, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in convs):
                raise ValueError(
                    f"{argument} pattern {pattern!r} matches no convolution of {type(model).__name__}; "
                    f"{_what_there_is(found, large)}"
                )
    places = [name for name in large if _matches(name, include)] if include else _default_places(model, large)
    places = [name for name in places if not _matches(name, exclude)]
    chosen = [name for name in places if _is_plain(found[name])]
    if not chosen:
        asked = "".join(f"{key}={value!r} " for key, value in (("include", include), ("exclude", exclude)) if value)
        there = _what_there_is(found, large)
        raise ValueError(f"{asked}leaves nothing of {type(model).__name__} to convert; {there}")

    tied = tied_kernels(model, [found[name] for name in chosen]) if preserve_function else []
    replacements: dict[nn.Module, AWConv2d] = {}
    for name in chosen:
        try:
            replacements[found[name]] = _as_aw_conv(found[name], options)
        except ValueError as error:
            raise ValueError(f"{name or type(model).__name__}: {error}") from None
    for first, *others in tied:
        replacements[first].preserve_function_(*(replacements[other] for other in others))
    if skipped := [name for name in places if name not in chosen]:
        names = ", ".join(f"{name} ({type(found[name]).__name__})" for name in skipped[:3])
        warnings.warn(
            f"{len(skipped)} of {len(places)} convolutions of {type(model).__name__} were not converted, because they "
            f"are no plain nn.Conv2d: {names}{', ...' if len(skipped) > 3 else ''}",
            stacklevel=2,
        )
    if model in replacements:
        return replacements[model]  # type: ignore[return-value]
    for parent in model.modules():
        for child_name, child in list(parent._modules.items()):
            if child in replacements:
                setattr(parent, child_name, replacements[child])
    return model


def tied_kernels(model: nn.Module, convs: Collection[_Conv]) -> list[list[_Conv]]:
    """Groups convolutions of ``model`` by the ``weight`` that they share; most are alone.

    Raises:
        ValueError: If a kernel cannot be rescaled for ``convs``, because a module outside them uses it too, or one
            among them divides it by something else; the message names both.
    """
    names = {module: name or type(module).__name__ for name, module in model.named_modules()}
    groups: dict[Tensor, list[_Conv]] = {}
    for conv in dict.fromkeys(convs):
        groups.setdefault(conv.weight, []).append(conv)
    for module in names:
        for kernel in filter(lambda parameter: parameter in groups, module._parameters.values()):
            first = groups[kernel][0]
            if module not in groups[kernel] or getattr(module, "residual", None) != getattr(first, "residual", None):
                raise ValueError(
                    f"{names[first]} and {names[module]} share one kernel, which cannot be rescaled to preserve the "
                    "function of both; convert both with the same options, or untie them"
                )
    return list(groups.values())


def _is_plain(conv: nn.Conv2d) -> bool:
    # weight_norm, spectral_norm and prune compute the weight from a parameter of another name
    return type(conv) is nn.Conv2d and "weight" in conv._parameters


def _as_aw_conv(conv: nn.Conv2d, options: dict[str, Any]) -> AWConv2d:
    layer = AWConv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        conv.groups,
        conv.bias is not None,
        conv.padding_mode,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
        **options,
    )
    # the very parameters, not copies: an optimiser or a tied layer that holds them keeps holding them
    layer.weight, layer.bias = conv.weight, conv.bias
    for hooks in _HOOKS:
        setattr(layer, hooks, getattr(conv, hooks))  # and the very hooks, so that their handles can still remove them
    return layer.train(conv.training)


def _default_places(model: nn.Module, names: list[str]) -> list[str]:
    def lineage(name: str) -> list[str]:
        parts = name.split(".")
        return [type(model.get_submodule(".".join(parts[:i]))).__name__ for i in range(len(parts))]

    def inside(name: str, kind: re.Pattern[str], skip: int = 0) -> bool:
        return any(map(kind.search, lineage(name)[skip:]))

    # the model itself may be called anything, "SqueezeNet" or "AttentionResNet" included
    in_any_block = [n for n in names if inside(n, BLOCK, skip=1)]
    candidates = [
        n
        for n in names
        if not (_STEM.search(n) or _BETWEEN_BLOCKS.search(n) or inside(n, _ACTIVATION_ATTENTION, skip=1))
    ]
    if in_any_block:
        return [n for n in candidates if n in in_any_block]
    if names == [""] or BLOCK.search(type(model).__name__):
        return candidates
    return [n for n in candidates if n != names[0]]


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _patterns(value: str | Sequence[str] | None) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


def _what_there_is(found: dict[str, nn.Conv2d], large: list[str]) -> str:
    plain = [name for name in large if _is_plain(found[name])]
    if plain:
        return f"its convolutions with a kernel larger than 1 are {', '.join(plain)}"
    if large:
        kinds = ", ".join(dict.fromkeys(type(found[name]).__name__ for name in large))
        return f"its {len(large)} convolutions with a kernel larger than 1 are no plain nn.Conv2d ({kinds})"
    if found:
        return "its plain convolutions all have a 1x1 kernel"
    return "it has no plain nn.Conv2d (subclasses and AW-convolutions are left alone)"
