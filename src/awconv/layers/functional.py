"""The AW-convolution as a function of its kernel and attention maps, and the backends that compute it."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from awconv.layers import fused


class _Geometry(NamedTuple):
    """How the kernel moves over the input: every field as ``torch.nn.functional.conv2d`` takes it."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


# (input, per-sample kernels (N, C2, C1/groups, kh, kw), geometry) -> output
_Expanding = Callable[[Tensor, Tensor, _Geometry], Tensor]


def aw_conv2d(
    input: Tensor,
    weight: Tensor,
    attention: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    residual: bool = True,
    backend: str = "auto",
) -> Tensor:
    r"""Convolves every sample with its own, attended kernel (Zhu et al., ICANN 2021, arXiv 2108.08205).

    .. math:: O_{n,c_2,y,x} = \sum_{c_1,i,j} I_{n,c_1,y+i,x+j} \, K_{c_2,c_1,i,j} \, (1 + A_{n,c_2,c_1,i,j})

    with :math:`K A` in place of :math:`K (1 + A)` when ``residual`` is false. All other arguments mean what they
    mean in :func:`torch.nn.functional.conv2d`. Under autocast the kernel is cast before it is multiplied, so that
    the per-sample kernels are only ever held in the low-precision type.

    Args:
        input: Images or features, shape (N, C1, H, W); any memory format, which the output keeps.
        weight: The kernel K shared by all samples, shape (C2, C1 / groups, kh, kw).
        attention: The attention maps A, shape (N, C2, C1 / groups / share, kh, kw): each value serves ``share``
            consecutive input channels, and ``share`` is read from the shapes.
        bias: Shape (C2,), or None.
        stride: Step of the kernel, in pixels.
        padding: Zero padding in pixels on each side, or ``"same"`` (stride 1 only) or ``"valid"``.
        dilation: Distance between kernel elements, in pixels.
        groups: Number of blocks of channels that are convolved apart.
        residual: Scale the kernel by 1 + A rather than by A.
        backend: ``"grouped"`` (the batch folded into the groups of one convolution), ``"gemm"`` (unfold and batched
            matrix product; exports with a dynamic batch, height and width), ``"fused"`` (never holds the samples'
            kernels in memory: Triton kernels on CUDA, sample by sample on a CPU), or ``"auto"`` (the fastest one for
            these shapes).

    Returns:
        The output O, shape (N, C2, H', W').

    Raises:
        ValueError: If shapes do not fit together, or the backend is unknown or cannot compute this; the message names
            the argument.
    """
    return _convolve(
        input,
        weight,
        attention,
        bias,
        stride,
        padding,
        dilation,
        groups,
        residual=residual,
        backend=backend,
        logits=False,
    )


def aw_conv2d_with_logits(
    input: Tensor,
    weight: Tensor,
    logits: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    residual: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Is :func:`aw_conv2d` with ``attention = sigmoid(logits)``, in less memory and time where it is fused.

    The fused backend takes the sigmoid where it reads a scale, so that neither the attention nor its gradient is ever
    held beside the logits and theirs.

    Args:
        input: As in :func:`aw_conv2d`, like all arguments but ``logits``.
        weight: See ``input``.
        logits: The attention maps before their sigmoid, shape (N, C2, C1 / groups / share, kh, kw).
        bias: See ``input``.
        stride: See ``input``.
        padding: See ``input``.
        dilation: See ``input``.
        groups: See ``input``.
        residual: See ``input``.
        backend: See ``input``.

    Returns:
        The output O, shape (N, C2, H', W').

    Raises:
        ValueError: As :func:`aw_conv2d`.
    """
    return _convolve(
        input, weight, logits, bias, stride, padding, dilation, groups, residual=residual, backend=backend, logits=True
    )


def _convolve(
    input: Tensor,
    weight: Tensor,
    attention: Tensor,
    bias: Tensor | None,
    stride: int | tuple[int, int],
    padding: int | tuple[int, int] | str,
    dilation: int | tuple[int, int],
    groups: int,
    *,
    residual: bool,
    backend: str,
    logits: bool,
) -> Tensor:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; choose one of {', '.join(map(repr, BACKENDS))}")
    name = "logits" if logits else "attention"
    _check_shapes(input, weight, attention, bias, groups, name)
    geometry_stride, geometry_dilation = _pair(stride), _pair(dilation)
    input, symmetric = _resolve_padding(input, padding, weight, geometry_stride, geometry_dilation)
    geometry = _Geometry(geometry_stride, symmetric, geometry_dilation, groups)

    device_type = input.device.type
    dtype = None
    if autocast_is_known(device_type) and torch.is_autocast_enabled(device_type) and input.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        input, weight = input.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    elif attention.dtype != weight.dtype:
        raise ValueError(
            f"{name} has dtype {attention.dtype} but weight has {weight.dtype}; cast one to the other's dtype"
        )

    if input.shape[0] == 0:
        # No backend can fold zero samples into groups. The plain convolution has the right shape, and the empty
        # sum keeps attention in the graph, so that it receives a gradient of zeros.
        return F.conv2d(input, weight, bias, *geometry) + attention.sum().to(weight.dtype)

    if backend == "auto":
        backend = _fastest_backend(input, weight, geometry)
    if backend == "fused":
        reason = fused.unsupported(input)
        if reason is not None:
            raise ValueError(f"backend='fused' {reason}; choose 'grouped' or 'auto'")
        if input.dtype != weight.dtype:
            raise ValueError(
                f"input has dtype {input.dtype} but weight has {weight.dtype}; cast one to the other's dtype"
            )
        output = fused.fused_aw_conv2d(
            input, weight, attention.to(weight.dtype), *map(list, geometry[:3]), groups, residual, logits
        )
    else:
        attention = attention.sigmoid() if logits else attention
        scale = 1 + attention if residual else attention
        kernels = _attended_kernels(weight, scale if dtype is None else scale.to(dtype))
        output = _EXPANDING[backend](input, kernels, geometry)
    if bias is not None:
        output = output + bias[:, None, None]
    if fused.is_channels_last(input):
        output = output.contiguous(memory_format=torch.channels_last)
    return output


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch 2.11 cannot trace it
def autocast_is_known(device_type: str) -> bool:
    """Whether autocast may be asked about a device at all; of "meta", among others, it knows nothing."""
    return torch.amp.is_autocast_available(device_type)


def _attended_kernels(weight: Tensor, scale: Tensor) -> Tensor:
    """Scales K (C2, C1/groups, kh, kw) by (N, C2, G, kh, kw) into (N, C2, C1/groups, kh, kw)."""
    out_channels, in_channels, *kernel_size = weight.shape
    maps = scale.shape[2]
    blocks = weight.reshape(out_channels, maps, in_channels // maps, *kernel_size)
    return (blocks * scale.unsqueeze(3)).flatten(2, 3)


def _grouped(input: Tensor, kernels: Tensor, geometry: _Geometry) -> Tensor:
    """One convolution over N * groups groups, with the batch folded into the channels."""
    batch = input.shape[0]
    # contiguous: with strides as reshaping leaves those of one channels_last sample, torch 2.15 gives wrong gradients
    folded = input.contiguous().view(1, -1, *input.shape[2:])
    output = F.conv2d(folded, kernels.flatten(0, 1), None, *geometry._replace(groups=batch * geometry.groups))
    return output.view(batch, -1, *output.shape[2:])


def _gemm(input: Tensor, kernels: Tensor, geometry: _Geometry) -> Tensor:
    """Patches as columns, multiplied by each sample's kernel as a matrix."""
    batch, out_channels, _, kh, kw = kernels.shape
    groups, dilation, padding, stride = geometry.groups, geometry.dilation, geometry.padding, geometry.stride
    unfold = _exportable_unfold if torch.compiler.is_exporting() else F.unfold
    columns = unfold(input, (kh, kw), dilation, padding, stride)
    height, width = (
        (size + 2 * pad - dil * (kernel - 1) - 1) // step + 1
        for size, pad, dil, kernel, step in zip(input.shape[2:], padding, dilation, (kh, kw), stride, strict=True)
    )
    matrices = kernels.reshape(batch, groups, out_channels // groups, -1)
    columns = columns.reshape(batch, groups, matrices.shape[-1], -1)
    return torch.matmul(matrices, columns).reshape(batch, out_channels, height, width)


def _exportable_unfold(
    input: Tensor,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[int, int],
    stride: tuple[int, int],
) -> Tensor:
    """``F.unfold`` as a convolution with kernels of one 1 each, which gives the same numbers.

    An exported ``F.unfold`` is a dozen operations on indices.
    """
    channels, elements = input.shape[1], math.prod(kernel_size)
    picks = torch.eye(elements, dtype=input.dtype, device=input.device).view(elements, 1, *kernel_size)
    return F.conv2d(input, picks.repeat(channels, 1, 1, 1), None, stride, padding, dilation, channels).flatten(2)


# what holds the kernels of all samples at once
_EXPANDING: dict[str, _Expanding] = {"grouped": _grouped, "gemm": _gemm}
BACKENDS: tuple[str, ...] = ("auto", *_EXPANDING, "fused")


def _fastest_backend(input: Tensor, weight: Tensor, geometry: _Geometry) -> str:
    if torch.compiler.is_exporting():
        return "gemm"  # the number of groups of an exported convolution cannot follow the batch
    if input.device.type == "cuda":
        # A guess, since no GPU has been measured. A tile of Triton's holds 16 channels at least: groups of fewer would
        # leave most of it empty.
        channels = min(weight.shape[0] // geometry.groups, weight.shape[1])
        return "fused" if channels >= 16 and fused.unsupported(input) is None else "grouped"
    # On an AMD EPYC with 32 MiB of cache (torch 2.15, float32, batch 16) "fused" was as fast as "grouped" at 128
    # channels (9 MiB of kernels), and two and four times as fast at 256 and 512, in a quarter to a tenth of the memory;
    # at 64 channels (2 MiB) "grouped" was faster by a tenth. "gemm" was slower than "fused" throughout.
    return "fused" if input.shape[0] * weight.numel() * weight.element_size() >= 2**22 else "grouped"


def _check_shapes(
    input: Tensor, weight: Tensor, attention: Tensor, bias: Tensor | None, groups: int, name: str
) -> None:
    if input.dim() != 4:
        raise ValueError(f"input has shape {tuple(input.shape)}; expected four dimensions (N, C1, H, W)")
    if weight.dim() != 4:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected four dimensions (C2, C1/groups, kh, kw)")
    out_channels, group_channels, height, width = weight.shape
    if groups < 1 or out_channels % groups:
        raise ValueError(f"groups={groups} must be at least 1 and divide the {out_channels} output channels")
    if input.shape[1] != group_channels * groups:
        raise ValueError(
            f"input has {input.shape[1]} channels; weight of shape {tuple(weight.shape)} with groups={groups} "
            f"expects {group_channels * groups}"
        )
    fits = (
        attention.dim() == 5
        and attention.shape[0] == input.shape[0]
        and attention.shape[1] == out_channels
        and attention.shape[2] > 0
        and group_channels % attention.shape[2] == 0
        and attention.shape[3:] == weight.shape[2:]
    )
    if not fits:
        raise ValueError(
            f"{name} has shape {tuple(attention.shape)}; expected (N, C2, C1/groups/share, kh, kw) = "
            f"({input.shape[0]}, {out_channels}, {group_channels}/share, {height}, {width}) "
            f"with share a divisor of {group_channels}"
        )
    if bias is not None and bias.shape != (out_channels,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected ({out_channels},)")


def _resolve_padding(
    input: Tensor,
    padding: int | tuple[int, int] | str,
    weight: Tensor,
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[Tensor, tuple[int, int]]:
    """Turns ``padding`` into pixels that are the same on both sides, padding the input where they are not."""
    if not isinstance(padding, str):
        return input, _pair(padding)
    if padding == "valid":
        return input, (0, 0)
    if padding != "same":
        raise ValueError(f"padding={padding!r} is unknown; give pixels, 'same' or 'valid'")
    if stride != (1, 1):
        raise ValueError(f"padding='same' needs stride=1, got stride={stride}; give the padding in pixels")
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if any(t % 2 for t in total):
        # an even kernel: the extra row and column go to the bottom and the right, as in torch's own "same"
        input = F.pad(input, (0, total[1] % 2, 0, total[0] % 2))
    return input, (total[0] // 2, total[1] // 2)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(value, int):
        return (value, value)
    if len(value) == 1:
        return (value[0], value[0])
    height, width = value
    return (height, width)
