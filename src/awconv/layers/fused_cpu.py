"""AW-convolution on a CPU, with the kernels of a few samples in memory, and in cache, at a time.

Two ways to compute the same, by the size of a group's kernel:

- small: a chunk of samples folded into the groups of one convolution, like the grouped backend;
- large: a sample and a group at a time, a part of whose kernel is scaled into one buffer for all of them and then
  multiplied, as a matrix, with the patches. The kernel is laid out so that neither the product nor the scaling, by a
  number for every ``share`` channels, meets short rows.

The gradients scale the kernel again rather than keep what the forward pass formed.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

# On an AMD EPYC with 1 MiB of second-level cache a core, folding was faster up to 128 channels (kernels of 0.6 MiB),
# multiplying from 256 on (2.3 MiB), where a convolution first brings each sample's kernel into an order of its own.
_LARGE_KERNEL = 2**20
_CHUNK_OF_KERNELS = 2**21
# How much of a sample's kernel is scaled at a time. More leaves the cache, and results are returned to the system and
# fetched again, page by page, for every sample; less makes many small products. 1 and 2 MiB were the fastest there.
_BLOCK_OF_KERNEL = 2**21


def forward(input: Tensor, weight: Tensor, attention: Tensor, output: Tensor, *geometry: Any) -> None:
    """Writes O into ``output``; ``geometry`` is stride, padding, dilation, groups, residual and logits."""
    compute = _forward_by_sample if _is_large(weight, geometry[3]) else _forward_by_chunk
    compute(input, weight, attention, output, *geometry)


def gradients(
    input: Tensor,
    weight: Tensor,
    attention: Tensor,
    gradient: Tensor,
    by_input: Tensor | None,
    wants_kernel: bool,
    *geometry: Any,
) -> tuple[Tensor, Tensor] | None:
    """Writes dI into ``by_input``, if there, and returns dK and dB, if wanted; the rest is as in :func:`forward`."""
    compute = _gradients_by_sample if _is_large(weight, geometry[3]) else _gradients_by_chunk
    by_attention = torch.empty_like(attention) if wants_kernel else None
    by_weight = compute(input, weight, attention, gradient, by_input, by_attention, *geometry)
    return None if by_weight is None or by_attention is None else (by_weight.to(weight.dtype), by_attention)


def _exact(weight: Tensor) -> torch.dtype:
    # a sum over samples and pixels loses too much in half precision
    return torch.promote_types(weight.dtype, torch.float32)


def _is_large(weight: Tensor, groups: int) -> bool:
    return weight.nbytes >= _LARGE_KERNEL * groups


# ------------------------------------------------------------------------------------------- a chunk of samples


def _chunks(weight: Tensor, samples: int) -> Iterator[slice]:
    length = max(1, _CHUNK_OF_KERNELS // weight.nbytes)
    return (slice(first, min(first + length, samples)) for first in range(0, samples, length))


def _by_map(kernels: Tensor, maps: int) -> Tensor:
    """Views (..., C1 / groups, kh, kw) as (..., maps, share, kh, kw)."""
    return kernels.unflatten(-3, (maps, kernels.shape[-3] // maps))


def _slope(attention: Tensor) -> Tensor:
    """Derivative of a sigmoid, from its values."""
    return attention * (1 - attention)


def _folded(images: Tensor) -> Tensor:
    return images.reshape(1, -1, *images.shape[2:])


def _forward_by_chunk(
    input: Tensor,
    weight: Tensor,
    attention: Tensor,
    output: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    residual: bool,
    logits: bool,
) -> None:
    kernel = _by_map(weight, attention.shape[2])
    for chunk in _chunks(weight, input.shape[0]):
        images, gate = input[chunk], attention[chunk].unsqueeze(3)
        gate = gate.sigmoid() if logits else gate
        kernels = (kernel * (1 + gate if residual else gate)).flatten(2, 3).flatten(0, 1)
        result = F.conv2d(_folded(images), kernels, None, stride, padding, dilation, groups * images.shape[0])
        output[chunk] = result.reshape(output[chunk].shape)


def _gradients_by_chunk(
    input: Tensor,
    weight: Tensor,
    attention: Tensor,
    gradient: Tensor,
    by_input: Tensor | None,
    by_attention: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    residual: bool,
    logits: bool,
) -> Tensor | None:
    maps = attention.shape[2]
    kernel = _by_map(weight, maps)
    by_weight = None if by_attention is None else torch.zeros_like(weight, dtype=_exact(weight))
    for chunk in _chunks(weight, input.shape[0]):
        images, given, gate = _folded(input[chunk]), _folded(gradient[chunk]), attention[chunk].unsqueeze(3)
        gate = gate.sigmoid() if logits else gate
        scale = 1 + gate if residual else gate
        kernels = (kernel * scale).flatten(2, 3).flatten(0, 1)
        arguments = (given, stride, padding, dilation, groups * scale.shape[0])
        if by_input is not None:
            by_input[chunk] = conv2d_input(images.shape, kernels, *arguments).reshape(input[chunk].shape)
        if by_attention is not None and by_weight is not None:
            product = conv2d_weight(images, kernels.shape, *arguments)
            product = _by_map(product.view(scale.shape[0], *weight.shape), maps).to(by_weight.dtype)
            sums = (product * kernel).sum(3)
            by_attention[chunk] = sums.mul_(_slope(gate.squeeze(3))) if logits else sums
            by_weight += (product * scale).sum(0).flatten(1, 2)
    return by_weight


# ------------------------------------------------------------------------------------------- a sample and a group


def _groups(weight: Tensor, groups: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Of each group: its input and output channels, and its kernel as (C2, C1, kh, kw)."""
    out_channels, in_channels, *_ = weight.shape
    rows = out_channels // groups
    for group in range(groups):
        inputs = slice(group * in_channels, (group + 1) * in_channels)
        outputs = slice(group * rows, (group + 1) * rows)
        yield inputs, outputs, weight[outputs].contiguous()


def _forward_by_sample(
    input: Tensor,
    weight: Tensor,
    attention: Tensor,
    output: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    residual: bool,
    logits: bool,
) -> None:
    (height, width), (kh, kw), maps = input.shape[2:], weight.shape[2:], attention.shape[2]
    share = weight.shape[1] // maps
    for inputs, outputs, weights in _groups(weight, groups):
        rows = len(weights)
        # The reduced axis innermost, as the product wants it, and in it the channels of a map outermost: a scale is
        # then spread over long rows of numbers.
        kernel = weights.view(rows, maps, share, kh * kw).permute(0, 2, 3, 1).contiguous().flatten(2)
        parts = list(_ranges(rows, kernel.nbytes))
        scaled, scale = torch.empty_like(kernel[parts[-1]]), torch.empty_like(kernel[:, :1])
        padded = input.new_zeros(height + 2 * padding[0], width + 2 * padding[1], share, maps)
        inside = padded[padding[0] : padding[0] + height, padding[1] : padding[1] + width]
        patches = _patches(padded.permute(2, 3, 0, 1), output.shape[2:], (kh, kw), stride, dilation)
        patches = patches.permute(4, 5, 0, 2, 3, 1)
        for image, gate, written in zip(input[:, inputs], attention[:, outputs], output[:, outputs], strict=True):
            inside.copy_(image.unflatten(0, (maps, share)).permute(2, 3, 1, 0))
            columns = patches.reshape(-1, share * kh * kw * maps)
            scale[:, 0].copy_(gate.permute(2, 3, 1, 0).reshape(-1, rows).t())
            if logits:
                scale.sigmoid_()
            if residual:
                scale += 1
            for part in parts:
                own = torch.mul(kernel[part], scale[part], out=scaled[: part.stop - part.start])
                written[part] = _product(columns, own.flatten(1)).t().unflatten(1, written.shape[1:])


def _gradients_by_sample(
    input: Tensor,
    weight: Tensor,
    attention: Tensor,
    gradient: Tensor,
    by_input: Tensor | None,
    by_attention: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    residual: bool,
    logits: bool,
) -> Tensor | None:
    kernel_size, size, maps = weight.shape[2:], input.shape[2:], attention.shape[2]
    share, window = weight.shape[1] // maps, (tuple(dilation), tuple(padding), tuple(stride))
    by_weight = None if by_attention is None else torch.empty_like(weight, dtype=_exact(weight))
    for inputs, outputs, weights in _groups(weight, groups):
        rows = len(weights)
        # Output channels innermost, so that neither product has to transpose the kernel; a few maps at a time, whose
        # kernel, scaled kernel, its gradient and their sum stay in cache from one sample to the next.
        for some in _ranges(maps, weights.nbytes):
            channels = slice(some.start * share, some.stop * share)
            images = input[:, inputs][:, channels]
            kernel = weights[:, channels].reshape(rows, -1).t().contiguous().view(-1, share, *kernel_size, rows)
            total = None if by_weight is None else torch.zeros_like(kernel, dtype=by_weight.dtype)
            scaled, scale = torch.empty_like(kernel), torch.empty_like(kernel[:, :1])
            padded = F.pad(torch.zeros_like(images[0]), (padding[1], padding[1], padding[0], padding[0]))
            inside = padded[:, padding[0] : padding[0] + size[0], padding[1] : padding[1] + size[1]]
            patches = _patches(padded, gradient.shape[2:], kernel_size, stride, dilation)
            for sample, gate in enumerate(_output_channels_last(attention[:, outputs, some])):
                given = gradient[sample, outputs].reshape(rows, -1)
                gate = gate.sigmoid() if logits else gate
                torch.add(gate, 1 if residual else 0, out=scale[:, 0])
                if by_input is not None:
                    torch.mul(kernel, scale, out=scaled)
                    columns = _product(scaled.view(-1, rows), given.t().contiguous())
                    folded = F.fold(columns.unsqueeze(0), size, kernel_size, *window)
                    by_input[sample, inputs][channels] = folded[0]
                    del columns, folded  # else those of two samples would be held at once
                if by_attention is not None and total is not None:
                    inside.copy_(images[sample])
                    product = _product(patches.reshape(-1, given.shape[1]), given)
                    product = product.view(kernel.shape).to(total.dtype)
                    total.addcmul_(product, scale)
                    sums = product.mul_(kernel).sum(1)
                    sums = sums.mul_(_slope(gate)) if logits else sums
                    _output_channels_last(by_attention[:, outputs, some])[sample] = sums
                    del product
            if by_weight is not None and total is not None:
                # in two steps, since torch is quick to transpose matrices, and slow to copy otherwise
                by_weight[outputs, channels] = total.view(-1, rows).t().contiguous().view(rows, -1, *kernel_size)
    return by_weight


def _ranges(length: int, nbytes: int) -> Iterator[slice]:
    """Cuts an axis of a kernel into parts of at most ``_BLOCK_OF_KERNEL`` bytes, of which the last is a largest one."""
    parts = min(length, math.ceil(nbytes / _BLOCK_OF_KERNEL))
    return (slice(part * length // parts, (part + 1) * length // parts) for part in range(parts))


def _output_channels_last(attention: Tensor) -> Tensor:
    """Views (N, C2, maps, kh, kw) as (N, maps, kh, kw, C2)."""
    return attention.movedim(1, -1)


def _patches(
    padded: Tensor, out_size: torch.Size, kernel_size: Sequence[int], stride: list[int], dilation: list[int]
) -> Tensor:
    """Views (..., H, W) as (..., kh, kw, H', W'), as often as the kernel's elements see each pixel."""
    *channels, down, right = padded.stride()
    return padded.as_strided(
        (*padded.shape[:-2], *kernel_size, *out_size),
        (*channels, down * dilation[0], right * dilation[1], down * stride[0], right * stride[1]),
    )


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T``, of (M, K) and (N, K), both contiguous."""
    if a.dtype == torch.float32 and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        # torch multiplies float32 matrices by MKL, which takes two to three times as long on AMD as oneDNN does. This
        # is the operator that torch.compile puts in the place of a linear layer.
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return a @ b.t()
