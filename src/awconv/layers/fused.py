"""AW-convolution that never writes the samples' kernels: one operator, with Triton on CUDA and another way on a CPU.

``awconv::aw_conv2d`` and its gradient are opaque to ``torch.compile``, which takes them whole. Memory grows with the
unexpanded attention, which is ``share`` times smaller than the kernels of all samples; the gradient forms again what
the forward pass formed.

The sigmoid that ends the attention head can be left to the operator: it is then computed where a scale is read, and the
head's output is all that is held, and read, of the attention.
"""

import os
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from awconv.layers import fused_cpu

HAS_TRITON = find_spec("triton") is not None
# the types that the kernels multiply on CUDA; a CPU takes any
_CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported(input: Tensor) -> str | None:
    """Says in a line why the operator cannot take ``input``, or None if it can."""
    if input.device.type in ("cpu", "meta"):
        return None
    if input.device.type != "cuda":
        return f"runs on cpu and cuda, and the input is on {input.device.type}"
    if not HAS_TRITON:
        return "needs Triton on CUDA, and it is not installed"
    if input.dtype not in _CUDA_DTYPES:
        return f"takes {', '.join(str(d).removeprefix('torch.') for d in _CUDA_DTYPES)} on CUDA, not {input.dtype}"
    return None


@torch.library.custom_op("awconv::aw_conv2d", mutates_args=())
def fused_aw_conv2d(
    input: Tensor,
    weight: Tensor,
    attention: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    residual: bool,
    logits: bool,
) -> Tensor:
    """Convolves every sample with ``weight`` scaled by its attention, unexpanded; a batch has at least one sample.

    The sum over a map's channels is linear in input, weight and scale, which is what its derivatives below rest on.

    Args:
        input: Shape (N, C1, H, W), any strides.
        weight: Shape (C2, C1 / groups, kh, kw), of the same dtype.
        attention: Shape (N, C2, C1 / groups / share, kh, kw), of the same dtype.
        stride: Two numbers of pixels, as are ``padding``, the same on both sides, and ``dilation``.
        padding: See ``stride``.
        dilation: See ``stride``.
        groups: Number of blocks of channels that are convolved apart.
        residual: Scale by 1 + attention rather than by attention.
        logits: ``attention`` is given by its logits, whose sigmoid it is.

    Returns:
        Shape (N, C2, H', W'), in the input's memory format.
    """
    output = _new_output(input, weight, stride, padding, dilation)
    geometry = (stride, padding, dilation, groups, residual, logits)
    _implementation(input).forward(input, weight, attention, output, *geometry)
    return output


@torch.library.custom_op("awconv::aw_conv2d_backward", mutates_args=())
def fused_aw_conv2d_backward(
    gradient: Tensor,
    input: Tensor,
    weight: Tensor,
    attention: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    residual: bool,
    logits: bool,
    wants_input: bool,
    wants_kernel: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Derives :func:`fused_aw_conv2d` by input, and by weight and attention; a part that is not wanted is empty.

    Weight and attention share nearly all of their work, so that they are wanted together.

    Args:
        gradient: By the output, shape (N, C2, H', W'), any strides.
        input: As in the forward pass, like everything up to ``logits``.
        weight: See ``input``.
        attention: See ``input``.
        stride: See ``input``.
        padding: See ``input``.
        dilation: See ``input``.
        groups: See ``input``.
        residual: See ``input``.
        logits: See ``input``.
        wants_input: Whether the gradient by the input is wanted.
        wants_kernel: Whether those by weight and attention are.

    Returns:
        Gradients shaped and strided like ``input``, ``weight`` and ``attention``.
    """
    by_input = torch.empty_like(input) if wants_input else None
    geometry = (stride, padding, dilation, groups, residual, logits)
    by_kernel = _implementation(input).gradients(input, weight, attention, gradient, by_input, wants_kernel, *geometry)
    by_weight, by_attention = by_kernel or (weight.new_empty(0), attention.new_empty(0))
    return input.new_empty(0) if by_input is None else by_input, by_weight, by_attention


@fused_aw_conv2d.register_fake
def _(
    input: Tensor,
    weight: Tensor,
    attention: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    residual: bool,
    logits: bool,
) -> Tensor:
    return _new_output(input, weight, stride, padding, dilation)


@fused_aw_conv2d_backward.register_fake
def _(
    gradient: Tensor,
    input: Tensor,
    weight: Tensor,
    attention: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    residual: bool,
    logits: bool,
    wants_input: bool,
    wants_kernel: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(input) if wants_input else input.new_empty(0),
        torch.empty_like(weight) if wants_kernel else weight.new_empty(0),
        torch.empty_like(attention) if wants_kernel else attention.new_empty(0),
    )


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, attention, *ctx.geometry = inputs
    ctx.save_for_backward(input, weight, attention)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    needs_input, needs_weight, needs_attention, *_ = ctx.needs_input_grad
    by_input, by_weight, by_attention = fused_aw_conv2d_backward(
        gradient, *ctx.saved_tensors, *ctx.geometry, needs_input, needs_weight or needs_attention
    )
    return (
        by_input if needs_input else None,
        by_weight if needs_weight else None,
        by_attention if needs_attention else None,
        *(None for _ in ctx.geometry),
    )


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    gradient, input, weight, attention, *ctx.geometry, ctx.wants_input, ctx.wants_kernel = inputs
    ctx.save_for_backward(gradient, input, weight, attention)


def _double_backward(
    ctx: Any, along_input: Tensor, along_weight: Tensor, along_attention: Tensor
) -> tuple[Tensor | None, ...]:
    """Derives the gradients: again convolutions and their gradients, since a convolution is linear in each argument.

    With O(I, K, S) the convolution for the scale S = 1 + A, what is derived is the scalar product of dO with
    O(along_input, K, S) + O(I, along_weight, S) + O(I, K, along_attention). Where A is given by its logits Y, the last
    one goes along A'(Y) along_Y, which has a derivative of its own.
    """
    gradient, input, weight, given = ctx.saved_tensors
    *geometry, residual, logits = ctx.geometry
    attention = given.sigmoid() if logits else given
    slope = attention * (1 - attention) if logits else None
    along_scale = along_attention if slope is None else along_attention * slope
    # each term is its three arguments and whether 1 is added to the last one
    terms: list[tuple[Tensor, Tensor, Tensor, bool]] = []
    if ctx.wants_input:
        terms.append((along_input, weight, attention, residual))
    if ctx.wants_kernel:
        terms.append((input, along_weight, attention, residual))
        terms.append((input, weight, along_scale, False))
    by_gradient = sum(fused_aw_conv2d(i, k, a, *geometry, one, False) for i, k, a, one in terms)
    totals: list[Any] = [None, None, None]
    derived: tuple[Tensor, ...] = ()
    for term in terms:
        *arguments, one = term
        derived = fused_aw_conv2d_backward(gradient, *arguments, *geometry, one, False, True, True)
        for index, saved in enumerate((input, weight, attention)):
            if arguments[index] is saved:
                totals[index] = derived[index] if totals[index] is None else totals[index] + derived[index]
    if slope is not None:
        totals[2] = None if totals[2] is None else totals[2] * slope
        if ctx.wants_kernel:
            # the last term's derivative by the scale, which does not depend on the scale
            bend = along_scale * (1 - 2 * attention) * derived[2]
            totals[2] = bend if totals[2] is None else totals[2] + bend
    return (by_gradient, *totals, *(None for _ in (*ctx.geometry, ctx.wants_input, ctx.wants_kernel)))


fused_aw_conv2d.register_autograd(_backward, setup_context=_save_forward)
fused_aw_conv2d_backward.register_autograd(_double_backward, setup_context=_save_backward)


def _implementation(input: Tensor) -> ModuleType:
    """Triton's kernels on CUDA, and on a CPU that interprets them."""
    on_cuda = input.device.type == "cuda"
    if on_cuda or (HAS_TRITON and "TRITON_INTERPRET" in os.environ):
        from awconv.layers import fused_triton

        if on_cuda or fused_triton.INTERPRETED:
            return fused_triton
    return fused_cpu


def is_channels_last(input: Tensor) -> bool:
    """Whether ``input`` (N, C, H, W) is in channels_last rather than in channels_first."""
    # a tensor with one channel or one pixel is contiguous in both formats: it counts as channels first
    return input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()


def _new_output(input: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> Tensor:
    size = [
        (pixels + 2 * pad - dil * (elements - 1) - 1) // step + 1
        for pixels, pad, dil, elements, step in zip(
            input.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True
        )
    ]
    if min(size) < 1:
        raise ValueError(
            f"input of {input.shape[2]}x{input.shape[3]} pixels with padding={tuple(padding)} is smaller than the "
            f"kernel of {weight.shape[2]}x{weight.shape[3]} with dilation={tuple(dilation)}"
        )
    memory_format = torch.channels_last if is_channels_last(input) else torch.contiguous_format
    return input.new_empty((input.shape[0], weight.shape[0], *size)).contiguous(memory_format=memory_format)
