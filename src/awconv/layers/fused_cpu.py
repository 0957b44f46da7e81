"""AW-convolution on a CPU, with the kernels of a few samples in memory, and in cache, at a time.

Two ways to compute the same, by the size of a group's kernel:

- small: a chunk of samples folded into the groups of one convolution, like the grouped backend;
- large: a sample and a group at a time, whose kernel is scaled into one buffer for all of them and then multiplied, as
  a matrix, with the patches. One scale serves the ``share`` channels of a map, so that these *slots* become an outer
  axis of the kernel: all that is left of the scaling is long rows of numbers times long rows of numbers.

The gradients scale the kernel again rather than keep what the forward pass formed.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

# On an AMD EPYC with 1 MiB of second-level cache a core, folding was faster up to 128 channels (kernels of 0.6 MiB),
# multiplying from 256 on (2.3 MiB), where a convolution first brings each sample's kernel into an order of its own.
_LARGE_KERNEL = 2**20
_CHUNK_OF_KERNELS = 2**21
# Larger results are returned to the system and fetched again, page by page, for every sample.
_BLOCK_OF_KERNEL = 2**22


def forward(input: Tensor, weight: Tensor, attention: Tensor, output: Tensor, *geometry: Any) -> None:
    """Writes O into ``output``; ``geometry`` is stride, padding, dilation, groups and residual."""
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


def _scale(attention: Tensor, residual: bool) -> Tensor:
    """Shape (n, C2, maps, 1, kh, kw)."""
    return (1 + attention if residual else attention).unsqueeze(3)


def _by_map(kernels: Tensor, maps: int) -> Tensor:
    """Views (..., C1 / groups, kh, kw) as (..., maps, share, kh, kw)."""
    return kernels.unflatten(-3, (maps, kernels.shape[-3] // maps))


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
) -> None:
    kernel = _by_map(weight, attention.shape[2])
    for chunk in _chunks(weight, input.shape[0]):
        images, scale = input[chunk], _scale(attention[chunk], residual)
        kernels = (kernel * scale).flatten(2, 3).flatten(0, 1)
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
) -> Tensor | None:
    maps = attention.shape[2]
    kernel = _by_map(weight, maps)
    by_weight = None if by_attention is None else torch.zeros_like(weight, dtype=_exact(weight))
    for chunk in _chunks(weight, input.shape[0]):
        images, given, scale = _folded(input[chunk]), _folded(gradient[chunk]), _scale(attention[chunk], residual)
        kernels = (kernel * scale).flatten(2, 3).flatten(0, 1)
        arguments = (given, stride, padding, dilation, groups * scale.shape[0])
        if by_input is not None:
            by_input[chunk] = conv2d_input(images.shape, kernels, *arguments).reshape(input[chunk].shape)
        if by_attention is not None and by_weight is not None:
            product = conv2d_weight(images, kernels.shape, *arguments)
            product = _by_map(product.view(scale.shape[0], *weight.shape), maps).to(by_weight.dtype)
            by_attention[chunk] = (product * kernel).sum(3)
            by_weight += (product * scale).sum(0).flatten(1, 2)
    return by_weight


# ------------------------------------------------------------------------------------------- a sample and a group


def _groups(weight: Tensor, attention: Tensor, groups: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Of each group: its input and output channels, and its kernel as (C2, maps, share, kh * kw)."""
    out_channels, in_channels, *_ = weight.shape
    maps, rows = attention.shape[2], out_channels // groups
    for group in range(groups):
        inputs = slice(group * in_channels, (group + 1) * in_channels)
        outputs = slice(group * rows, (group + 1) * rows)
        yield inputs, outputs, weight[outputs].reshape(rows, maps, in_channels // maps, -1)


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
) -> None:
    (_, _, height, width), (kh, kw) = input.shape, weight.shape[2:]
    out_height, out_width = output.shape[2:]
    for inputs, outputs, weights in _groups(weight, attention, groups):
        rows, maps, share, elements = weights.shape
        kernel = weights.permute(0, 2, 3, 1).contiguous()  # C2, share, kh * kw, maps
        scaled, scale = torch.empty_like(kernel), kernel.new_empty(rows, 1, elements, maps)
        padded = input.new_zeros(height + 2 * padding[0], width + 2 * padding[1], share, maps)
        interior = padded[padding[0] : padding[0] + height, padding[1] : padding[1] + width]
        down, right, *inner = padded.stride()
        patches = padded.as_strided(
            (out_height, out_width, share, kh, kw, maps),
            (down * stride[0], right * stride[1], inner[0], down * dilation[0], right * dilation[1], inner[1]),
        )
        for image, gate, written in zip(input[:, inputs], attention[:, outputs], output[:, outputs], strict=True):
            interior.copy_(image.unflatten(0, (maps, share)).permute(2, 3, 1, 0))
            scale.copy_(gate.flatten(2).transpose(1, 2).unsqueeze(1))
            torch.mul(kernel, scale.add_(1) if residual else scale, out=scaled)
            columns = patches.reshape(out_height * out_width, -1)
            written.copy_(_product(scaled.view(rows, -1), columns).view(written.shape))


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
) -> Tensor | None:
    kernel_size, size = weight.shape[2:], input.shape[2:]
    window = tuple(dilation), tuple(padding), tuple(stride)
    by_weight = None
    for inputs, outputs, weights in _groups(weight, attention, groups):
        rows, maps, share, elements = weights.shape
        # Output channels innermost: then neither product has to transpose the kernel. Through C2, share, maps, kh * kw,
        # since torch is quick to transpose matrices, and slow to permute.
        kernel = weights.transpose(1, 2).flatten(1).t().contiguous().view(share, maps * elements, rows)
        total = None if by_attention is None else torch.zeros_like(kernel, dtype=_exact(weight))
        blocks = torch.split(kernel, max(1, _BLOCK_OF_KERNEL // kernel[0].nbytes))
        scaled = torch.empty_like(blocks[0])
        for sample in range(input.shape[0]):
            given = gradient[sample, outputs].reshape(rows, -1)
            scale = attention[sample, outputs].reshape(rows, -1).t().contiguous()
            if residual:
                scale += 1
            if by_input is not None:
                transposed = given.t().contiguous()
                columns = torch.cat(
                    [
                        _product(torch.mul(block, scale, out=scaled[: len(block)]).view(-1, rows), transposed)
                        for block in blocks
                    ]
                )
                folded = F.fold(columns.unsqueeze(0), size, kernel_size, *window)
                by_input[sample, inputs] = folded.view(share, maps, *size).transpose(0, 1).flatten(0, 1)
            if by_attention is not None and total is not None:
                image = input[sample, inputs].unflatten(0, (maps, share)).transpose(0, 1)
                columns = F.unfold(image.reshape(1, -1, *size), kernel_size, *window)[0]
                columns = columns.view(share, maps * elements, -1)
                sums = torch.zeros_like(scale, dtype=total.dtype)
                done = 0
                for block in blocks:
                    part = slice(done, done + len(block))
                    product = _product(columns[part].flatten(0, 1), given).view(block.shape).to(total.dtype)
                    total[part].addcmul_(product, scale)
                    sums += product.mul_(block).sum(0)
                    done += len(block)
                by_attention[sample, outputs] = sums.t().contiguous().view(rows, maps, *kernel_size).to(weight.dtype)
        if total is not None:
            del kernel, blocks, scaled  # what follows needs their memory
            total = total.view(-1, rows).t().contiguous().view(rows, share, maps, *kernel_size)
            by_weight = torch.empty_like(weight, dtype=total.dtype) if by_weight is None else by_weight
            by_weight[outputs] = total.transpose(1, 2).flatten(1, 2)
    return by_weight


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T``, of (M, K) and (N, K), both contiguous."""
    if a.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return a @ b.t()
    # torch multiplies float32 matrices by MKL, which takes two to three times as long on AMD as oneDNN does. That does
    # convolutions, so this is one: the rows of ``a`` are the pixels of a channels_last image, those of ``b`` 1x1
    # kernels. Dilating these changes nothing, but without it torch would take its own way for a single image.
    image = a.view(1, 1, *a.shape).permute(0, 3, 1, 2)
    result = F.conv2d(image, b.view(*b.shape, 1, 1), dilation=2)
    return result.permute(0, 2, 3, 1).reshape(a.shape[0], -1)
