"""The Triton kernels of AW-convolution: kernel tiles that are scaled in registers, and never written.

Imported where they are used, since Triton is not on every machine. Numerics are tested through Triton's interpreter;
**no GPU has been measured yet**, so that tiles, tables and splits below are reasoned guesses until one has.

Let S = 1 + B, or B without ``residual``, with B the unexpanded attention (N, C2, maps, kh, kw), of which every map
serves ``share`` consecutive input channels. All three kernels are implicit matrix products, accumulated in float32:

- forward: ``O[n] = (K * S[n]) @ patches(I[n])``, a tile of output channels and pixels a program;
- gradient of the input: ``dI[n] = scatter((K * S[n]).T @ dO[n])``, as a gather of input channels and pixels;
- gradients of weight and attention: a program owns a tile of output and input channels at one kernel element, walks
  through samples, forms ``G = dO[n] @ patches(I[n]).T`` in registers, adds ``S[n] * G`` to its tile of dK, and writes
  ``dB[n] = sum over a map's channels of K * G``.

Given its logits, B is their sigmoid, taken of a tile of them before it is spread, and ``dB`` is by the logits.

Input channels are laid out in *slots*: ``share`` rounded up to a power of two for each map, the rest masked. A tile
then always covers whole maps or lies inside one, and one load of (rows, maps) spreads over it in registers.

What follows was reasoned from counts and from what the compiler makes of it for an H200 (bfloat16, batch 256,
channels_last, the 3x3 layers of ResNet-50), and not measured. Each layer is 59 GFLOP a product, 75 us at 790 TFLOP/s.
Input and output are 205, 103, 51 and 26 MB at 64, 128, 256 and 512 channels, and the attention up to 75 MB: 20 to 50 us
at 4.3 TB/s. L2 is what binds. It is read by every program: a kernel tile for every sample and tile of pixels, and every
pixel for each of nine elements (0.9 GB at 64 channels, for one row tile). Therefore:

- A tile of the kernel serves 256 pixels, or four samples of a small picture: at 512 channels and 7x7 pixels the kernel
  is read 256 / 4 times, 0.3 GB, where one sample a program reads 1.2 GB, 220 us at 5.5 TB/s.
- Elements are innermost, so that the nine reads of a pixel follow each other and can come from L1.
- The scaled kernel is formed from registers, two numbers an instruction, ``K + K * A`` rounded once.
- What changes from step to step is one number for all lanes, added to pointers that do not change; masks are left out
  where tiles end with what they cover. The next step's attention is loaded by hand: its numbers of two bytes lie apart,
  and the compiler fetches ahead only four bytes and more.
- The gradients of the kernel run through samples and pixels in one loop: loads of the next sample are under way while
  this one is summed up.
"""

import os
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Whether the kernels below run on CPU tensors, by TRITON_INTERPRET=1 at the time of this import.
INTERPRETED: bool = triton.knobs.runtime.interpret
# Set to 1, the first call of each class of shapes times the table of tiles and remembers the fastest one, on disk and
# for each kind of device. Off by default: the first steps of a training would wait for it.
AUTOTUNE_VARIABLE = "AWCONV_AUTOTUNE"
_TRITON_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def _slots_to_channels(first, maps, SHARE: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr, INT64: tl.constexpr):
    """Channels at BLOCK slots from ``first`` on, and which of them exist."""
    slot = first + tl.arange(0, BLOCK)
    if SLOTS == SHARE:
        channel = slot
        exists = slot < maps * SHARE
    else:
        channel = slot // SLOTS * SHARE + slot % SLOTS
        exists = (slot % SLOTS < SHARE) & (slot < maps * SLOTS)
    if INT64:
        channel = channel.to(tl.int64)
    return channel, exists


@triton.jit
def _scaled(kernel, scale, RESIDUAL: tl.constexpr, PACKED: tl.constexpr, ACC: tl.constexpr):
    """``kernel * (1 + scale)``, or ``kernel * scale``, of one shape, rounded to the type of the kernel."""
    if PACKED:
        # two numbers an instruction; and K + K * A is rounded once, though 1 + A is never there
        return tl.fma(kernel, scale, kernel) if RESIDUAL else kernel * scale
    else:
        scale = scale.to(ACC)
        if RESIDUAL:
            scale += 1.0
        return (kernel.to(ACC) * scale).to(kernel.dtype)


@triton.jit
def _step(
    total,
    kernel,
    scale,
    pixels,
    mask,
    RESIDUAL: tl.constexpr,
    LOGITS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
):
    """Adds to ``total`` the product of the kernel tile, scaled for one sample, and the tile of its pixels."""
    # ".ca": the kernel's elements read the same pixels again and again, from L1 where the compiler obeys
    columns = tl.load(pixels, mask=mask, other=0.0, cache_modifier=".ca")
    M: tl.constexpr = kernel.shape[0]
    K: tl.constexpr = kernel.shape[1]
    if LOGITS:
        # before it is spread: share times fewer exponentials
        scale = tl.sigmoid(scale.to(ACC)).to(scale.dtype)
    if scale.shape[0] == M:
        spread = tl.broadcast_to(scale[:, :, None], (M, scale.shape[1], K // scale.shape[1]))
    else:
        spread = tl.broadcast_to(scale[:, None, :], (scale.shape[0], M // scale.shape[0], K))
    kernel = _scaled(kernel, tl.reshape(spread, (M, K)), RESIDUAL, PACKED, ACC).to(OPERAND)
    return tl.dot(kernel, columns.to(OPERAND), total, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def _forward_kernel(
    x,
    weight,
    attention,
    output,
    height,
    width,
    out_height,
    out_width,
    groups,
    out_channels,
    maps,
    x_strides,
    w_strides,
    a_strides,
    o_strides,
    samples,
    SIZES: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    SHARE: tl.constexpr,
    SLOTS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    LOGITS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    INT64: tl.constexpr,
    ROWS_POWER: tl.constexpr,
    SLOTS_POWER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SAMPLES: tl.constexpr,
    NARROW: tl.constexpr,
):
    """M: output channels of a group; N: output pixels of a sample; K: slots, with the kernel's elements innermost.

    A program computes the same tile of SAMPLES samples, 1, 2 or 4, from one tile of the kernel at a time.
    """
    # whether tiles end where what they cover ends: masks cost an instruction for each copy
    WHOLE_ROWS: tl.constexpr = ROWS_POWER % BLOCK_M == 0
    WHOLE_SLOTS: tl.constexpr = SLOTS_POWER % BLOCK_K == 0
    x_n, x_c, x_h, x_w = x_strides
    w_o, w_c, w_h, w_w = w_strides
    a_n, a_o, a_m, a_h, a_w = a_strides
    o_n, o_c, o_h, o_w = o_strides
    row_tiles = tl.cdiv(out_channels, BLOCK_M)
    pixels = out_height * out_width
    pixel_tiles = tl.cdiv(pixels, BLOCK_N)
    program = tl.program_id(0)
    row_tile = program % row_tiles
    pixel_tile = program // row_tiles % pixel_tiles
    sample_group = program // row_tiles // pixel_tiles
    # the last program may compute again what the one before it does
    sample = tl.minimum(sample_group // groups * SAMPLES, samples - SAMPLES)
    group = (sample_group % groups).to(tl.int64)

    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_exists = rows < out_channels
    pixel = pixel_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    pixel_exists = pixel < pixels
    MAPS: tl.constexpr = (BLOCK_K + SLOTS - 1) // SLOTS
    map_ = tl.arange(0, MAPS)
    slot = tl.arange(0, BLOCK_K)
    channel = slot if SLOTS == SHARE else slot // SLOTS * SHARE + slot % SLOTS
    if NARROW:
        channel = tl.max_contiguous(channel, 64 // x.dtype.element_ty.primitive_bitwidth)
    if INT64:
        rows = rows.to(tl.int64)
        pixel = pixel.to(tl.int64)
        channel = channel.to(tl.int64)
    out_y = pixel // out_width
    out_x = pixel % out_width
    y = out_y * STRIDE_H - PAD_H
    z = out_x * STRIDE_W - PAD_W
    x += sample.to(tl.int64) * x_n + group * maps * SHARE * x_c
    attention += sample.to(tl.int64) * a_n + group * out_channels * a_o
    # what depends on the step is a number that all lanes share: a tile of pointers costs one addition each
    patches = x + channel[:, None] * x_c + (y * x_h + z * x_w)[None, :]
    kernels = weight + (group * out_channels + rows)[:, None] * w_o + channel[None, :] * w_c
    scales = attention + rows[:, None] * a_o + map_[None, :] * a_m
    # beyond the picture wherever the kernel moves
    y = tl.where(pixel_exists, y, -(2**30))

    scale_mask = row_exists[:, None] & (map_ < maps)[None, :]
    scale0 = tl.load(scales, mask=scale_mask, other=0.0)
    if SAMPLES > 1:
        scale1 = tl.load(scales + a_n, mask=scale_mask, other=0.0)
    if SAMPLES > 2:
        scale2 = tl.load(scales + 2 * a_n, mask=scale_mask, other=0.0)
        scale3 = tl.load(scales + 3 * a_n, mask=scale_mask, other=0.0)

    total0 = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    if SAMPLES > 1:
        total1 = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    if SAMPLES > 2:
        total2 = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        total3 = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for step in range(tl.cdiv(maps * SLOTS, BLOCK_K) * KH * KW):
        first = step // (KH * KW) * BLOCK_K
        element = step % (KH * KW)
        i = element // KW
        j = element % KW
        first_channel = first if SLOTS == SHARE else first // SLOTS * SHARE + first % SLOTS
        if INT64:
            first_channel = first_channel.to(tl.int64)
        inside = ((y + i * DIL_H).to(tl.uint32) < height.to(tl.uint32)) & (
            (z + j * DIL_W).to(tl.uint32) < width.to(tl.uint32)
        )
        mask = inside[None, :]
        if not WHOLE_SLOTS:
            channel_exists = ((first + slot) % SLOTS < SHARE) & (first + slot < maps * SLOTS)
            mask = mask & channel_exists[:, None]
        at = patches + (i * DIL_H * x_h + j * DIL_W * x_w + first_channel * x_c)
        kernel_at = kernels + (i * w_h + j * w_w + first_channel * w_c)
        if WHOLE_ROWS and WHOLE_SLOTS:
            kernel = tl.load(kernel_at)
        elif WHOLE_SLOTS:
            kernel = tl.load(kernel_at, mask=row_exists[:, None], other=0.0)
        else:
            kernel = tl.load(kernel_at, mask=row_exists[:, None] & channel_exists[None, :], other=0.0)

        # The next step's, since numbers of two bytes that lie apart are not fetched ahead by the compiler.
        next_step = step + 1
        next_map = next_step // (KH * KW) * BLOCK_K // SLOTS
        element = next_step % (KH * KW)
        offset = next_map * a_m + element // KW * a_h + element % KW * a_w
        scale_mask = row_exists[:, None] & (next_map + map_ < maps)[None, :]
        next0 = tl.load(scales + offset, mask=scale_mask, other=0.0)
        total0 = _step(total0, kernel, scale0, at, mask, RESIDUAL, LOGITS, PACKED, PRECISION, OPERAND, ACC)
        scale0 = next0
        if SAMPLES > 1:
            next1 = tl.load(scales + (a_n + offset), mask=scale_mask, other=0.0)
            total1 = _step(total1, kernel, scale1, at + x_n, mask, RESIDUAL, LOGITS, PACKED, PRECISION, OPERAND, ACC)
            scale1 = next1
        if SAMPLES > 2:
            next2 = tl.load(scales + (2 * a_n + offset), mask=scale_mask, other=0.0)
            total2 = _step(
                total2, kernel, scale2, at + 2 * x_n, mask, RESIDUAL, LOGITS, PACKED, PRECISION, OPERAND, ACC
            )
            scale2 = next2
            next3 = tl.load(scales + (3 * a_n + offset), mask=scale_mask, other=0.0)
            total3 = _step(
                total3, kernel, scale3, at + 3 * x_n, mask, RESIDUAL, LOGITS, PACKED, PRECISION, OPERAND, ACC
            )
            scale3 = next3
    output += sample.to(tl.int64) * o_n + group * out_channels * o_c
    output_at = output + rows[:, None] * o_c + (out_y * o_h + out_x * o_w)[None, :]
    stored = row_exists[:, None] & pixel_exists[None, :]
    tl.store(output_at, total0.to(output.dtype.element_ty), mask=stored)
    if SAMPLES > 1:
        tl.store(output_at + o_n, total1.to(output.dtype.element_ty), mask=stored)
    if SAMPLES > 2:
        tl.store(output_at + 2 * o_n, total2.to(output.dtype.element_ty), mask=stored)
        tl.store(output_at + 3 * o_n, total3.to(output.dtype.element_ty), mask=stored)


@triton.jit
def _input_gradient_kernel(
    x,
    weight,
    attention,
    output,
    height,
    width,
    out_height,
    out_width,
    groups,
    out_channels,
    maps,
    x_strides,
    w_strides,
    a_strides,
    o_strides,
    samples,
    SIZES: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    SHARE: tl.constexpr,
    SLOTS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    LOGITS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    INT64: tl.constexpr,
    ROWS_POWER: tl.constexpr,
    SLOTS_POWER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SAMPLES: tl.constexpr,
    NARROW: tl.constexpr,
):
    """M: slots of a group; N: input pixels; K: output channels, with the kernel's elements innermost.

    ``output`` is the given gradient, ``x`` the one that is written. A program's pixels lie ``STRIDE`` apart: all of
    them are reached by the same elements of the kernel, and the others are skipped.
    """
    # whether tiles end where what they cover ends: masks cost an instruction for each copy
    WHOLE_ROWS: tl.constexpr = ROWS_POWER % BLOCK_K == 0
    WHOLE_SLOTS: tl.constexpr = SLOTS_POWER % BLOCK_M == 0
    x_n, x_c, x_h, x_w = x_strides
    w_o, w_c, w_h, w_w = w_strides
    a_n, a_o, a_m, a_h, a_w = a_strides
    o_n, o_c, o_h, o_w = o_strides
    row_tiles = tl.cdiv(maps * SLOTS, BLOCK_M)
    pixel_tiles = tl.cdiv(tl.cdiv(height, STRIDE_H) * tl.cdiv(width, STRIDE_W), BLOCK_N)
    program = tl.program_id(0)
    row_tile = program % row_tiles
    pixel_tile = program // row_tiles % pixel_tiles
    program = program // row_tiles // pixel_tiles
    first_y = program % STRIDE_H
    first_x = program // STRIDE_H % STRIDE_W
    sample_group = program // (STRIDE_H * STRIDE_W)
    sample = tl.minimum(sample_group // groups * SAMPLES, samples - SAMPLES)
    group = (sample_group % groups).to(tl.int64)

    channel, channel_exists = _slots_to_channels(row_tile * BLOCK_M, maps, SHARE, SLOTS, BLOCK_M, INT64)
    pixel = pixel_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_K)
    # a picture narrower than the stride has no pixel at all for some programs
    columns = tl.maximum((width - first_x + STRIDE_W - 1) // STRIDE_W, 1)
    MAPS: tl.constexpr = (BLOCK_M + SLOTS - 1) // SLOTS
    map_ = row_tile * BLOCK_M // SLOTS + tl.arange(0, MAPS)
    if INT64:
        pixel = pixel.to(tl.int64)
        rows = rows.to(tl.int64)
    step_y = pixel // columns
    step_x = pixel % columns
    y = first_y + step_y * STRIDE_H
    z = first_x + step_x * STRIDE_W
    pixel_exists = (y < height) & (z < width)
    x += sample.to(tl.int64) * x_n + group * maps * SHARE * x_c
    attention += sample.to(tl.int64) * a_n + group * out_channels * a_o
    output += sample.to(tl.int64) * o_n + group * out_channels * o_c
    depth = tl.max_contiguous(rows, 64 // x.dtype.element_ty.primitive_bitwidth) if NARROW else rows
    # as in the forward pass
    gradients = output + depth[:, None] * o_c + (step_y * o_h + step_x * o_w)[None, :]
    kernels = weight + (group * out_channels + rows)[None, :] * w_o + channel[:, None] * w_c
    scales = attention + map_[:, None] * a_m + rows[None, :] * a_o
    # beyond the picture wherever the kernel moves
    step_y = tl.where(pixel_exists, step_y, -(2**30))

    scale_mask = (map_ < maps)[:, None] & (rows < out_channels)[None, :]
    scale0 = tl.load(scales, mask=scale_mask, other=0.0)
    if SAMPLES > 1:
        scale1 = tl.load(scales + a_n, mask=scale_mask, other=0.0)
    if SAMPLES > 2:
        scale2 = tl.load(scales + 2 * a_n, mask=scale_mask, other=0.0)
        scale3 = tl.load(scales + 3 * a_n, mask=scale_mask, other=0.0)

    total0 = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    if SAMPLES > 1:
        total1 = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    if SAMPLES > 2:
        total2 = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        total3 = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for step in range(tl.cdiv(out_channels, BLOCK_K) * KH * KW):
        first = step // (KH * KW) * BLOCK_K
        element = step % (KH * KW)
        i = element // KW
        j = element % KW
        next_step = step + 1
        next_first = next_step // (KH * KW) * BLOCK_K
        element = next_step % (KH * KW)
        offset = element // KW * a_h + element % KW * a_w
        if INT64:
            first = first.to(tl.int64)
            next_first = next_first.to(tl.int64)
        offset += next_first * a_o
        scale_mask = (map_ < maps)[:, None] & (next_first + rows < out_channels)[None, :]
        next0 = tl.load(scales + offset, mask=scale_mask, other=0.0)
        if SAMPLES > 1:
            next1 = tl.load(scales + (a_n + offset), mask=scale_mask, other=0.0)
        if SAMPLES > 2:
            next2 = tl.load(scales + (2 * a_n + offset), mask=scale_mask, other=0.0)
            next3 = tl.load(scales + (3 * a_n + offset), mask=scale_mask, other=0.0)
        # kept from being negative, where the signs of quotient and remainder would depend on who divides
        distance_y = first_y + PAD_H - i * DIL_H + STRIDE_H * DIL_H * KH
        distance_x = first_x + PAD_W - j * DIL_W + STRIDE_W * DIL_W * KW
        if (distance_y % STRIDE_H == 0) & (distance_x % STRIDE_W == 0):
            shift_y = distance_y // STRIDE_H - DIL_H * KH
            shift_x = distance_x // STRIDE_W - DIL_W * KW
            inside = ((step_y + shift_y).to(tl.uint32) < out_height.to(tl.uint32)) & (
                (step_x + shift_x).to(tl.uint32) < out_width.to(tl.uint32)
            )
            mask = inside[None, :]
            if not WHOLE_ROWS:
                mask = mask & (first + rows < out_channels)[:, None]
            at = gradients + (shift_y * o_h + shift_x * o_w + first * o_c)
            kernel_at = kernels + (i * w_h + j * w_w + first * w_o)
            if WHOLE_ROWS and WHOLE_SLOTS:
                kernel = tl.load(kernel_at)
            else:
                kernel = tl.load(
                    kernel_at, mask=channel_exists[:, None] & (first + rows < out_channels)[None, :], other=0.0
                )
            total0 = _step(total0, kernel, scale0, at, mask, RESIDUAL, LOGITS, PACKED, PRECISION, OPERAND, ACC)
            if SAMPLES > 1:
                total1 = _step(
                    total1, kernel, scale1, at + o_n, mask, RESIDUAL, LOGITS, PACKED, PRECISION, OPERAND, ACC
                )
            if SAMPLES > 2:
                total2 = _step(
                    total2, kernel, scale2, at + 2 * o_n, mask, RESIDUAL, LOGITS, PACKED, PRECISION, OPERAND, ACC
                )
                total3 = _step(
                    total3, kernel, scale3, at + 3 * o_n, mask, RESIDUAL, LOGITS, PACKED, PRECISION, OPERAND, ACC
                )
        scale0 = next0
        if SAMPLES > 1:
            scale1 = next1
        if SAMPLES > 2:
            scale2 = next2
            scale3 = next3
    written = x + channel[:, None] * x_c + (y * x_h + z * x_w)[None, :]
    stored = channel_exists[:, None] & pixel_exists[None, :]
    tl.store(written, total0.to(x.dtype.element_ty), mask=stored)
    if SAMPLES > 1:
        tl.store(written + x_n, total1.to(x.dtype.element_ty), mask=stored)
    if SAMPLES > 2:
        tl.store(written + 2 * x_n, total2.to(x.dtype.element_ty), mask=stored)
        tl.store(written + 3 * x_n, total3.to(x.dtype.element_ty), mask=stored)


@triton.jit
def _kernel_gradients_kernel(
    x,
    weight,
    attention,
    output,
    height,
    width,
    out_height,
    out_width,
    groups,
    out_channels,
    maps,
    x_strides,
    w_strides,
    a_strides,
    o_strides,
    samples,
    weight_gradient,
    attention_gradient,
    samples_a_split,
    dw_strides,
    da_strides,
    SIZES: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    SHARE: tl.constexpr,
    SLOTS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    LOGITS: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    INT64: tl.constexpr,
    ROWS_POWER: tl.constexpr,
    SLOTS_POWER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """M: output channels of a group; N: slots; K: output pixels, of one sample after the other.

    A split is a run of samples with a sum of its own, ``weight_gradient[split]``: adding them up afterwards, rather
    than atomically, gives the same bits every time. BLOCK_N comes from the caller, whose buffer for
    ``attention_gradient`` depends on it: a map wider than a tile has ``da_part`` between the sums of its tiles.
    """
    # whether tiles end where what they cover ends: masks cost an instruction for each copy
    WHOLE_ROWS: tl.constexpr = ROWS_POWER % BLOCK_M == 0
    WHOLE_SLOTS: tl.constexpr = SLOTS_POWER % BLOCK_N == 0
    ONE_TILE: tl.constexpr = SIZES[2] <= BLOCK_K
    x_n, x_c, x_h, x_w = x_strides
    w_o, w_c, w_h, w_w = w_strides
    a_n, a_o, a_m, a_h, a_w = a_strides
    o_n, o_c, o_h, o_w = o_strides
    dw_s, dw_o, dw_c, dw_h, dw_w = dw_strides
    da_n, da_o, da_m, da_part, da_h, da_w = da_strides
    row_tiles = tl.cdiv(out_channels, BLOCK_M)
    column_tiles = tl.cdiv(maps * SLOTS, BLOCK_N)
    program = tl.program_id(0)
    row_tile = program % row_tiles
    column_tile = program // row_tiles % column_tiles
    program = program // row_tiles // column_tiles
    element = program % (KH * KW)
    group = (program // (KH * KW) % groups).to(tl.int64)
    split = program // (KH * KW) // groups
    i = element // KW
    j = element % KW

    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_exists = rows < out_channels
    if INT64:
        rows = rows.to(tl.int64)
    channel, channel_exists = _slots_to_channels(column_tile * BLOCK_N, maps, SHARE, SLOTS, BLOCK_N, INT64)
    MAPS: tl.constexpr = (BLOCK_N + SLOTS - 1) // SLOTS
    map_ = column_tile * BLOCK_N // SLOTS + tl.arange(0, MAPS)
    part = column_tile * BLOCK_N % SLOTS // BLOCK_N
    map_exists = row_exists[:, None] & (map_ < maps)[None, :]
    x += group * maps * SHARE * x_c
    weight += group * out_channels * w_o + i * w_h + j * w_w
    attention += group * out_channels * a_o + i * a_h + j * a_w
    output += group * out_channels * o_c
    attention_gradient += group * out_channels * da_o + part * da_part + i * da_h + j * da_w

    kernel_exists = row_exists[:, None] & channel_exists[None, :]
    kernel = tl.load(weight + rows[:, None] * w_o + channel[None, :] * w_c, mask=kernel_exists, other=0.0).to(ACC)
    total = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    product = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    pixels = out_height * out_width
    first_sample = (split * samples_a_split).to(tl.int64)
    x += first_sample * x_n
    output += first_sample * o_n
    attention += first_sample * a_n
    attention_gradient += first_sample * da_n
    scales = attention + rows[:, None] * a_o + map_[None, :] * a_m
    sums_at = attention_gradient + rows[:, None] * da_o + map_[None, :] * da_m
    gradients = output + rows[:, None] * o_c
    patches = x + channel[None, :] * x_c
    lane = tl.arange(0, BLOCK_K)
    first_y = lane // out_width
    first_x = lane % out_width
    out_y = first_y
    out_x = first_x
    tiles = 1 if ONE_TILE else tl.cdiv(pixels, BLOCK_K)
    tile = 0
    mine = tl.minimum(samples_a_split, samples - split * samples_a_split)
    scale = tl.load(scales, mask=map_exists, other=0.0)
    # samples and their tiles of pixels in one loop, which is what the compiler fetches ahead in
    left = mine
    for _ in range(mine * tiles):
        pixel_exists = out_y < out_height
        y = out_y * STRIDE_H + (i * DIL_H - PAD_H)
        z = out_x * STRIDE_W + (j * DIL_W - PAD_W)
        inside = pixel_exists & (y.to(tl.uint32) < height.to(tl.uint32)) & (z.to(tl.uint32) < width.to(tl.uint32))
        if INT64:
            from_output = out_y.to(tl.int64) * o_h + out_x.to(tl.int64) * o_w
            from_x = y.to(tl.int64) * x_h + z.to(tl.int64) * x_w
        else:
            from_output = out_y * o_h + out_x * o_w
            from_x = y * x_h + z * x_w
        gradient = tl.load(
            gradients + from_output[None, :],
            mask=pixel_exists[None, :] if WHOLE_ROWS else row_exists[:, None] & pixel_exists[None, :],
            other=0.0,
        )
        columns = tl.load(
            patches + from_x[:, None],
            mask=inside[:, None] if WHOLE_SLOTS else channel_exists[None, :] & inside[:, None],
            other=0.0,
        )
        product = tl.dot(gradient.to(OPERAND), columns.to(OPERAND), product, input_precision=PRECISION, out_dtype=ACC)
        # where the next step reads is told apart from what follows, or nothing could be fetched ahead
        if ONE_TILE:
            last = True
            patches += x_n
            gradients += o_n
        else:
            tile += 1
            last = tile == tiles
            tile = tl.where(last, 0, tile)
            patches += tl.where(last, x_n, 0)
            gradients += tl.where(last, o_n, 0)
            # BLOCK_K pixels on, or back to the first ones
            out_x += BLOCK_K % out_width
            carry = out_x >= out_width
            out_x = tl.where(last, first_x, tl.where(carry, out_x - out_width, out_x))
            out_y = tl.where(last, first_y, out_y + (BLOCK_K // out_width + carry.to(tl.int32)))
        if last:
            left -= 1
            scales += tl.where(left > 0, a_n, 0)
            factor = scale.to(ACC)
            if LOGITS:
                factor = tl.sigmoid(factor)
                slope = factor * (1.0 - factor)
            # of the next sample, or again of the last one
            scale = tl.load(scales, mask=map_exists, other=0.0)
            if RESIDUAL:
                factor += 1.0
            spread = tl.broadcast_to(factor[:, :, None], (BLOCK_M, MAPS, BLOCK_N // MAPS))
            total += product * tl.reshape(spread, (BLOCK_M, BLOCK_N))
            sums = tl.sum(tl.reshape(product * kernel, (BLOCK_M, MAPS, BLOCK_N // MAPS)), axis=2)
            if LOGITS:
                sums *= slope
            tl.store(sums_at, sums.to(attention_gradient.dtype.element_ty), mask=map_exists)
            sums_at += da_n
            product = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    weight_gradient += split.to(tl.int64) * dw_s + group * out_channels * dw_o + i * dw_h + j * dw_w
    tl.store(weight_gradient + rows[:, None] * dw_o + channel[None, :] * dw_c, total, mask=kernel_exists)


class _Sizes(NamedTuple):
    """How many rows, columns and summands the matrix product of a sample and group has, and how many samples there are.

    What decides about tiles are powers of two, and whether there are 4 samples.
    """

    rows: int
    columns: int
    depth: int
    samples: int


def _tile(block: int, size: int) -> int:
    """``block``, or ``size`` where that is smaller; tensor cores take 16 and more."""
    return max(16, min(block, size))


def _default_tiles(kernel: Any, sizes: _Sizes, dtype: torch.dtype) -> dict[str, Any]:
    low = dtype.itemsize == 2
    if kernel is _kernel_gradients_kernel:
        # three tiles live in registers at once, which four warps cannot hold
        rows, depth = _tile(128 if low else 64, sizes.rows), _tile(64 if low else 32, sizes.depth)
        return {"BLOCK_M": rows, "BLOCK_K": depth, "num_warps": 8, "num_stages": 3}
    # Pictures of up to 64 pixels: the tile of the kernel, which is most of what is read, then serves several samples.
    together = 1 if sizes.columns > 64 or sizes.samples < 4 else 4 if low else 2
    rows = _tile(128 if low else 64, sizes.rows)
    columns = _tile(256 if low and sizes.columns >= 256 else 128, sizes.columns)
    return {
        "BLOCK_M": rows,
        "BLOCK_N": columns,
        # what fits into registers beside four samples' sums
        "BLOCK_K": _tile(64 if low and together == 1 else 32, sizes.depth),
        "SAMPLES": together,
        "NARROW": False,
        "num_warps": 8 if rows * columns * together >= 2**14 else 4,
        "num_stages": 3 if together == 1 else 4,
    }


# What may be best for some shape: wide tiles of pixels read the kernel less often, narrow ones waste less of a small
# picture; NARROW trades twice the copies for L1, where Triton lets only copies of 8 bytes in (3.6; not 3.9).
_TABLE = [
    triton.Config(
        {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "SAMPLES": samples, "NARROW": narrow},
        num_warps=warps,
        num_stages=stages,
    )
    for m, n, k, samples, narrow, warps, stages in (
        (64, 64, 32, 1, False, 4, 4),
        (64, 64, 64, 2, False, 4, 3),
        (64, 64, 32, 4, False, 4, 4),
        (128, 64, 64, 2, False, 8, 3),
        (128, 64, 32, 4, False, 8, 4),
        (128, 64, 32, 4, True, 8, 4),
        (64, 128, 32, 1, False, 4, 4),
        (64, 128, 64, 1, False, 4, 3),
        (64, 128, 64, 1, True, 4, 3),
        (64, 256, 64, 1, False, 8, 3),
        (64, 256, 64, 1, True, 8, 3),
        (128, 128, 64, 1, False, 8, 3),
        (128, 256, 64, 1, False, 8, 3),
        (128, 256, 64, 1, True, 8, 3),
    )
]
# the kernel's gradients: N comes from the caller
_TABLE_WITHOUT_N = [
    triton.Config({"BLOCK_M": m, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
    for m, k, warps, stages in (
        (64, 32, 8, 4),
        (64, 64, 4, 3),
        (64, 64, 8, 3),
        (128, 32, 8, 4),
        (128, 64, 8, 3),
        (128, 64, 8, 4),
    )
]
# of a multiprocessor of compute capability 8.0 or 9.0
_SHARED_MEMORY = 160 * 2**10


def _prune(configs: Sequence[triton.Config], named_args: dict[str, Any], **meta: Any) -> list[triton.Config]:
    """Leaves out tiles that are larger than what they would cover, or than shared memory."""
    arguments = {**named_args, **meta}
    sizes = _Sizes(*arguments["SIZES"])

    def fits(config: triton.Config) -> bool:
        tiles = config.kwargs
        together = tiles.get("SAMPLES", 1)
        blocks = [tiles.get(block, arguments.get(block)) for block in ("BLOCK_M", "BLOCK_N", "BLOCK_K")]
        m, n, k = blocks
        numbers = config.num_stages * (m * k + together * k * n)
        return (
            all(block <= max(64, size) for block, size in zip(blocks, sizes, strict=False))
            and (together == 1 or (sizes.columns <= 64 and sizes.samples >= 4))
            and numbers * arguments["x"].element_size() <= _SHARED_MEMORY
        )

    return [config for config in configs if fits(config)] or [configs[0]]


def _time_interpreted(call: Callable[[], object], quantiles: Sequence[float]) -> list[float]:
    start = perf_counter()
    call()
    return [perf_counter() - start] * len(quantiles)


# A class of shapes is what decides about tiles: the product's sizes to powers of two, the kernel and its stride, and
# the dtypes, which Triton adds itself.
_KEY = ["SIZES", "KH", "KW", "STRIDE_H", "STRIDE_W", "SHARE", "PRECISION"]


def _tuned(kernel: Any, table: list[triton.Config]) -> Any:
    return triton.autotune(
        table,
        key=_KEY,
        prune_configs_by={"early_config_prune": _prune},
        do_bench=_time_interpreted if INTERPRETED else None,
        cache_results=True,
    )(kernel)


_TUNED = {
    kernel: _tuned(kernel, table)
    for kernel, table in (
        (_forward_kernel, _TABLE),
        (_input_gradient_kernel, _TABLE),
        (_kernel_gradients_kernel, _TABLE_WITHOUT_N),
    )
}


class _Problem:
    """What the three kernels have in common: the arguments that they are called with."""

    def __init__(
        self,
        input: Tensor,
        weight: Tensor,
        attention: Tensor,
        output: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        residual: bool,
        logits: bool,
    ) -> None:
        # one copy of the kernel that all samples share, for loads along the channels: it is small, and read often
        weight = weight.contiguous(memory_format=torch.channels_last)
        self.samples, self.groups = input.shape[0], groups
        self.out_channels, self.group_channels, self.kh, self.kw = weight.shape
        self.rows, self.maps = self.out_channels // groups, attention.shape[2]
        self.share = self.group_channels // self.maps
        self.slots: int = triton.next_power_of_2(self.share)
        self.height, self.width = input.shape[2:]
        self.pixels = output.shape[2] * output.shape[3]
        self.stride = stride
        self.dtype, self.device = input.dtype, input.device
        tensors = (input, weight, attention, output)
        self.arguments = (
            *tensors,
            self.height,
            self.width,
            *output.shape[2:],
            groups,
            self.rows,
            self.maps,
            *(tensor.stride() for tensor in tensors),
            self.samples,
        )
        self.constants = {
            "KH": self.kh,
            "KW": self.kw,
            "STRIDE_H": stride[0],
            "STRIDE_W": stride[1],
            "PAD_H": padding[0],
            "PAD_W": padding[1],
            "DIL_H": dilation[0],
            "DIL_W": dilation[1],
            "SHARE": self.share,
            "SLOTS": self.slots,
            "RESIDUAL": residual,
            "LOGITS": logits,
            # Python's floats, which the interpreter computes in, are not packed
            "PACKED": self.dtype.itemsize == 2 and not INTERPRETED,
            "PRECISION": _precision(),
            # The interpreter multiplies the bits of bfloat16 as if they were integers; float32 holds the same products.
            "OPERAND": tl.float32 if INTERPRETED and self.dtype == torch.bfloat16 else _TRITON_DTYPES[self.dtype],
            "ACC": tl.float64 if self.dtype == torch.float64 else tl.float32,
            # the offsets of a sample and of a group are always 64 bits wide
            "INT64": any(_extent(tensor) >= 2**31 for tensor in tensors),
            "ROWS_POWER": _power_of_two(self.rows),
            # slots that are no channels are not whole
            "SLOTS_POWER": _power_of_two(self.maps * self.slots) if self.slots == self.share else 1,
        }

    def launch(
        self, kernel: Any, programs: Callable[[dict[str, int]], int], sizes: _Sizes, *more: Any, **fixed: int
    ) -> None:
        """Runs ``kernel`` with tiles of its own choice, ``fixed`` ones excepted."""
        rows, columns, depth = map(triton.next_power_of_2, sizes[:3])
        sizes = _Sizes(rows, columns, depth, 4 if sizes.samples >= 4 else 1)
        # another device may be the current one
        with torch.cuda.device_of(self.arguments[0]):
            constants = {"SIZES": tuple(sizes), **self.constants, **fixed}
            if kernel is _kernel_gradients_kernel:
                del constants["PACKED"]
            if os.environ.get(AUTOTUNE_VARIABLE, "0") not in ("", "0"):
                _TUNED[kernel][lambda meta: (programs(meta),)](*self.arguments, *more, **constants)
            else:
                tiles = {**_default_tiles(kernel, sizes, self.dtype), **fixed}
                kernel[(programs(tiles),)](*self.arguments, *more, **{**constants, **tiles})


def forward(input: Tensor, weight: Tensor, attention: Tensor, output: Tensor, *geometry: Any) -> None:
    """Writes O into ``output``; ``geometry`` is stride, padding, dilation, groups, residual and logits."""
    problem = _Problem(input, weight, attention, output, *geometry)

    def programs(tiles: dict[str, int]) -> int:
        kernel_tiles = triton.cdiv(problem.rows, tiles["BLOCK_M"]) * problem.groups
        sample_tiles = triton.cdiv(problem.samples, tiles["SAMPLES"])
        return kernel_tiles * triton.cdiv(problem.pixels, tiles["BLOCK_N"]) * sample_tiles

    problem.launch(
        _forward_kernel, programs, _Sizes(problem.rows, problem.pixels, problem.maps * problem.slots, problem.samples)
    )


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
    if by_input is not None:
        _input_gradient(by_input, weight, attention, gradient, *geometry)
    return _kernel_gradients(input, weight, attention, gradient, *geometry) if wants_kernel else None


def _input_gradient(input: Tensor, weight: Tensor, attention: Tensor, gradient: Tensor, *geometry: Any) -> None:
    problem = _Problem(input, weight, attention, gradient, *geometry)
    step_y, step_x = problem.stride
    # the pixels that one element of the kernel reaches
    pixels = triton.cdiv(problem.height, step_y) * triton.cdiv(problem.width, step_x)
    slots = problem.maps * problem.slots

    def programs(tiles: dict[str, int]) -> int:
        pixel_tiles = triton.cdiv(pixels, tiles["BLOCK_N"]) * step_y * step_x
        kernel_tiles = triton.cdiv(slots, tiles["BLOCK_M"]) * problem.groups
        return kernel_tiles * pixel_tiles * triton.cdiv(problem.samples, tiles["SAMPLES"])

    problem.launch(_input_gradient_kernel, programs, _Sizes(slots, pixels, problem.rows, problem.samples))


def _kernel_gradients(
    input: Tensor, weight: Tensor, attention: Tensor, gradient: Tensor, *geometry: Any
) -> tuple[Tensor, Tensor]:
    problem = _Problem(input, weight, attention, gradient, *geometry)
    slots = problem.maps * problem.slots
    sizes = _Sizes(problem.rows, slots, problem.pixels, problem.samples)
    block_n = _tile(64, triton.next_power_of_2(slots))
    tiles_of_kernel = (
        triton.cdiv(problem.rows, 64) * triton.cdiv(slots, block_n) * problem.kh * problem.kw * problem.groups
    )
    splits = min(triton.cdiv(_programs_wanted(problem.device), tiles_of_kernel), max(1, problem.samples // 4))
    samples_a_split = triton.cdiv(problem.samples, splits)
    splits = triton.cdiv(problem.samples, samples_a_split)
    exact = torch.float64 if problem.dtype == torch.float64 else torch.float32

    weight_gradient = torch.empty_like(weight, dtype=exact)
    sums = weight_gradient.unsqueeze(0) if splits == 1 else weight.new_empty(splits, *weight.shape, dtype=exact)
    attention_gradient = torch.empty_like(attention)
    parts = max(1, problem.slots // block_n)
    if parts == 1:
        part_sums = attention_gradient.unsqueeze(3)
    else:
        part_sums = attention.new_empty(*attention.shape[:3], parts, problem.kh, problem.kw, dtype=exact)

    def programs(tiles: dict[str, int]) -> int:
        kernel_tiles = triton.cdiv(problem.rows, tiles["BLOCK_M"]) * triton.cdiv(slots, block_n)
        return kernel_tiles * problem.kh * problem.kw * problem.groups * splits

    more = (sums, part_sums, samples_a_split, sums.stride(), part_sums.stride())
    problem.launch(_kernel_gradients_kernel, programs, sizes, *more, BLOCK_N=block_n)
    if splits > 1:
        torch.sum(sums, 0, out=weight_gradient)
    if parts > 1:
        attention_gradient.copy_(part_sums.sum(3))
    return weight_gradient.to(weight.dtype), attention_gradient


def _programs_wanted(device: torch.device) -> int:
    """As many programs as give every multiprocessor a few."""
    if device.type == "cpu":
        return 64  # interpreted: enough for splits to be tested
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count


def _precision() -> str:
    """How float32 is multiplied: as torch's own convolutions do it on the same machine."""
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return "tf32" if convolutions.fp32_precision == "tf32" else "ieee"


def _power_of_two(number: int) -> int:
    """The largest one that divides ``number``, up to what a tile may be."""
    return min(number & -number, 256)


def _extent(tensor: Tensor) -> int:
    """Largest offset within a sample, or within a kernel."""
    return sum((size - 1) * step for size, step in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))
