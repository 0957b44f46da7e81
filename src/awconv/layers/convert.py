"""Turning a plain network into an AW network."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import Tensor, nn

from awconv.layers.aw_conv import AWConv2d

_Model = TypeVar("_Model", bound=nn.Module)

# The unit that torchvision, timm and most research code repeat, by the name of its class: BasicBlock, Bottleneck,
# PreActBottleneck, InvertedResidual, MBConv, CNBlock, ConvNeXtBlock, _DenseLayer, DepthwiseSeparableConv, ...
_BLOCK = re.compile(r"block|bottle2?neck|residual|mbconv|denselayer|separableconv", re.IGNORECASE)
# Activation attention acts beside AW-convolution, not through it: CBAM's 7x7, GE's depthwise and BAM's dilated
# convolutions stay as they are.
_ACTIVATION_ATTENTION = re.compile(r"attn|attention|cbam|^bam$|gatherexcite|squeezeexc", re.IGNORECASE)
# Some networks (RepVGG, say) build even their stem from blocks; it is known by the name of its attribute.
_STEM = re.compile(r"(^|[._])stem([._]|$)")


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
    MobileNet; never the stem, a 1x1, a convolution between stages, or one inside an SE, CBAM, GE or BAM module. Blocks
    are known by the names of their classes; in a network that has none (a VGG, say) every convolution with a kernel
    larger than 1 but the first is replaced. Weights, biases, device, dtype, training mode and frozen parameters are
    kept. Subclasses of ``nn.Conv2d`` are left alone, AW-convolutions among them, so that converting twice is harmless
    as long as something is left to convert.

    Args:
        model: Any network; a bare ``nn.Conv2d`` is returned as a new layer.
        include: Glob pattern or patterns of module names (``"layer3.*"``): exactly the matching convolutions with a
            kernel larger than 1 are replaced, in a block or not.
        exclude: Glob pattern or patterns of module names that are left alone.
        preserve_function: Let the converted network compute what ``model`` computed, to rounding: the attention
            starts at exactly 1/2 everywhere and the kernels are divided by the scale that this gives.
        **options: Options of :class:`awconv.layers.AWConv2d`: ``reduction``, ``share``, ``head_groups``,
            ``residual``, ``zero_init``, ``backend``.

    Returns:
        ``model``, now with AW-convolutions.

    Raises:
        ValueError: If nothing matches (the message lists what there was) or an option does not fit a layer.
    """
    include, exclude = _patterns(include), _patterns(exclude)
    found = {name: module for name, module in model.named_modules() if type(module) is nn.Conv2d}
    large = [name for name, conv in found.items() if max(conv.kernel_size) > 1]
    chosen = [name for name in large if _matches(name, include)] if include else _default_places(model, large)
    chosen = [name for name in chosen if not _matches(name, exclude)]
    if not chosen:
        raise ValueError(_nothing_to_convert(model, found, large, include, exclude))

    replacements: dict[nn.Module, AWConv2d] = {}
    for name in chosen:
        try:
            replacements[found[name]] = _as_aw_conv(found[name], options)
        except ValueError as error:
            raise ValueError(f"{name or type(model).__name__}: {error}") from None
    if preserve_function:
        scaled: set[Tensor] = set()
        for layer in replacements.values():
            kernel = layer.weight
            layer.preserve_function_(rescale=kernel not in scaled)  # a kernel tied between layers is divided once
            scaled.add(kernel)
    if model in replacements:
        return replacements[model]  # type: ignore[return-value]
    for parent in model.modules():
        for child_name, child in list(parent._modules.items()):
            if child in replacements:
                setattr(parent, child_name, replacements[child])
    return model


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
    return layer.train(conv.training)


def _default_places(model: nn.Module, names: list[str]) -> list[str]:
    def lineage(name: str) -> list[str]:
        parts = name.split(".")
        return [type(model.get_submodule(".".join(parts[:i]))).__name__ for i in range(len(parts))]

    def inside(name: str, kind: re.Pattern[str], skip: int = 0) -> bool:
        return any(map(kind.search, lineage(name)[skip:]))

    # the model itself may be called anything, "SqueezeNet" or "AttentionResNet" included
    candidates = [n for n in names if not _STEM.search(n) and not inside(n, _ACTIVATION_ATTENTION, skip=1)]
    in_blocks = [n for n in candidates if inside(n, _BLOCK, skip=1)]
    if in_blocks or names == [""]:
        return in_blocks or names
    if _BLOCK.search(type(model).__name__):
        return candidates
    return [n for n in candidates if n != names[0]]


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _patterns(value: str | Sequence[str] | None) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


def _nothing_to_convert(
    model: nn.Module, found: dict[str, nn.Conv2d], large: list[str], include: list[str], exclude: list[str]
) -> str:
    asked = "".join(f"{key}={value!r} " for key, value in (("include", include), ("exclude", exclude)) if value)
    if large:
        there = f"its convolutions with a kernel larger than 1 are {', '.join(large)}"
    elif found:
        there = "its plain convolutions all have a 1x1 kernel"
    else:
        there = "it has no plain nn.Conv2d (subclasses and AW-convolutions are left alone)"
    return f"{asked}leaves nothing of {type(model).__name__} to convert; {there}"
