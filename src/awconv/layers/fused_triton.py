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

Input channels are laid out in *slots*: ``share`` rounded up to a power of two for each map, the rest masked. A tile
then always covers whole maps or lies inside one, and one load of (rows, maps) spreads over it in registers.
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
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """M: output channels of a group; N: output pixels of a sample; K: slots, with the kernel's elements innermost."""
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
    sample = (sample_group // groups).to(tl.int64)
    group = (sample_group % groups).to(tl.int64)

    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_exists = rows < out_channels
    pixel = pixel_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    pixel_exists = pixel < pixels
    if INT64:
        rows = rows.to(tl.int64)
        pixel = pixel.to(tl.int64)
    out_y = pixel // out_width
    out_x = pixel % out_width
    x += sample * x_n + group * maps * SHARE * x_c
    weight += group * out_channels * w_o
    attention += sample * a_n + group * out_channels * a_o
    output += sample * o_n + group * out_channels * o_c

    MAPS: tl.constexpr = (BLOCK_K + SLOTS - 1) // SLOTS
    total = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for step in range(tl.cdiv(maps * SLOTS, BLOCK_K) * KH * KW):
        first = step // (KH * KW) * BLOCK_K
        element = step % (KH * KW)
        i = element // KW
        j = element % KW
        channel, channel_exists = _slots_to_channels(first, maps, SHARE, SLOTS, BLOCK_K, INT64)
        y = out_y * STRIDE_H + (i * DIL_H - PAD_H)
        z = out_x * STRIDE_W + (j * DIL_W - PAD_W)
        inside = pixel_exists & (y >= 0) & (y < height) & (z >= 0) & (z < width)
        patches = tl.load(
            x + channel[:, None] * x_c + (y * x_h + z * x_w)[None, :],
            mask=channel_exists[:, None] & inside[None, :],
            other=0.0,
        )
        kernel = tl.load(
            weight + rows[:, None] * w_o + channel[None, :] * w_c + i * w_h + j * w_w,
            mask=row_exists[:, None] & channel_exists[None, :],
            other=0.0,
        )
        map_ = first // SLOTS + tl.arange(0, MAPS)
        scale = tl.load(
            attention + rows[:, None] * a_o + map_[None, :] * a_m + i * a_h + j * a_w,
            mask=row_exists[:, None] & (map_ < maps)[None, :],
            other=0.0,
        ).to(ACC)
        if RESIDUAL:
            scale += 1.0
        spread = tl.broadcast_to(scale[:, :, None], (BLOCK_M, MAPS, BLOCK_K // MAPS))
        kernel = (kernel.to(ACC) * tl.reshape(spread, (BLOCK_M, BLOCK_K))).to(patches.dtype)
        total = tl.dot(kernel.to(OPERAND), patches.to(OPERAND), total, input_precision=PRECISION, out_dtype=ACC)
    tl.store(
        output + rows[:, None] * o_c + (out_y * o_h + out_x * o_w)[None, :],
        total.to(output.dtype.element_ty),
        mask=row_exists[:, None] & pixel_exists[None, :],
    )


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
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """M: slots of a group; N: input pixels; K: output channels, with the kernel's elements innermost.

    ``output`` is the given gradient, ``x`` the one that is written. A program's pixels lie ``STRIDE`` apart: all of
    them are reached by the same elements of the kernel, and the others are skipped.
    """
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
    sample = (sample_group // groups).to(tl.int64)
    group = (sample_group % groups).to(tl.int64)

    channel, row_exists = _slots_to_channels(row_tile * BLOCK_M, maps, SHARE, SLOTS, BLOCK_M, INT64)
    pixel = pixel_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    # a picture narrower than the stride has no pixel at all for some programs
    columns = tl.maximum((width - first_x + STRIDE_W - 1) // STRIDE_W, 1)
    if INT64:
        pixel = pixel.to(tl.int64)
    step_y = pixel // columns
    step_x = pixel % columns
    y = first_y + step_y * STRIDE_H
    z = first_x + step_x * STRIDE_W
    pixel_exists = (y < height) & (z < width)
    x += sample * x_n + group * maps * SHARE * x_c
    weight += group * out_channels * w_o
    attention += sample * a_n + group * out_channels * a_o
    output += sample * o_n + group * out_channels * o_c

    MAPS: tl.constexpr = (BLOCK_M + SLOTS - 1) // SLOTS
    map_ = row_tile * BLOCK_M // SLOTS + tl.arange(0, MAPS)
    total = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for step in range(tl.cdiv(out_channels, BLOCK_K) * KH * KW):
        element = step % (KH * KW)
        i = element // KW
        j = element % KW
        # kept from being negative, where the signs of quotient and remainder would depend on who divides
        distance_y = first_y + PAD_H - i * DIL_H + STRIDE_H * DIL_H * KH
        distance_x = first_x + PAD_W - j * DIL_W + STRIDE_W * DIL_W * KW
        if (distance_y % STRIDE_H == 0) & (distance_x % STRIDE_W == 0):
            rows = step // (KH * KW) * BLOCK_K + tl.arange(0, BLOCK_K)
            exists = rows < out_channels
            if INT64:
                rows = rows.to(tl.int64)
            out_y = step_y + (distance_y // STRIDE_H - DIL_H * KH)
            out_x = step_x + (distance_x // STRIDE_W - DIL_W * KW)
            inside = pixel_exists & (out_y >= 0) & (out_y < out_height) & (out_x >= 0) & (out_x < out_width)
            gradient = tl.load(
                output + rows[:, None] * o_c + (out_y * o_h + out_x * o_w)[None, :],
                mask=exists[:, None] & inside[None, :],
                other=0.0,
            )
            kernel = tl.load(
                weight + channel[:, None] * w_c + rows[None, :] * w_o + i * w_h + j * w_w,
                mask=row_exists[:, None] & exists[None, :],
                other=0.0,
            )
            scale = tl.load(
                attention + map_[:, None] * a_m + rows[None, :] * a_o + i * a_h + j * a_w,
                mask=(map_ < maps)[:, None] & exists[None, :],
                other=0.0,
            ).to(ACC)
            if RESIDUAL:
                scale += 1.0
            spread = tl.broadcast_to(scale[:, None, :], (MAPS, BLOCK_M // MAPS, BLOCK_K))
            kernel = (kernel.to(ACC) * tl.reshape(spread, (BLOCK_M, BLOCK_K))).to(gradient.dtype)
            total = tl.dot(kernel.to(OPERAND), gradient.to(OPERAND), total, input_precision=PRECISION, out_dtype=ACC)
    tl.store(
        x + channel[:, None] * x_c + (y * x_h + z * x_w)[None, :],
        total.to(x.dtype.element_ty),
        mask=row_exists[:, None] & pixel_exists[None, :],
    )


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
    weight_gradient,
    attention_gradient,
    samples,
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
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """M: output channels of a group; N: slots; K: output pixels, of one sample after the other.

    A split is a run of samples with a sum of its own, ``weight_gradient[split]``: adding them up afterwards, rather
    than atomically, gives the same bits every time. BLOCK_N comes from the caller, whose buffer for
    ``attention_gradient`` depends on it: a map wider than a tile has ``da_part`` between the sums of its tiles.
    """
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
    pixels = out_height * out_width
    first_sample = (split * samples_a_split).to(tl.int64)
    for index in range(tl.minimum(samples_a_split, samples - split * samples_a_split)):
        sample = first_sample + index
        product = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        for start in range(0, pixels, BLOCK_K):
            pixel = start + tl.arange(0, BLOCK_K)
            pixel_exists = pixel < pixels
            if INT64:
                pixel = pixel.to(tl.int64)
            out_y = pixel // out_width
            out_x = pixel % out_width
            y = out_y * STRIDE_H + (i * DIL_H - PAD_H)
            z = out_x * STRIDE_W + (j * DIL_W - PAD_W)
            inside = pixel_exists & (y >= 0) & (y < height) & (z >= 0) & (z < width)
            gradient = tl.load(
                output + sample * o_n + rows[:, None] * o_c + (out_y * o_h + out_x * o_w)[None, :],
                mask=row_exists[:, None] & pixel_exists[None, :],
                other=0.0,
            )
            patches = tl.load(
                x + sample * x_n + channel[None, :] * x_c + (y * x_h + z * x_w)[:, None],
                mask=channel_exists[None, :] & inside[:, None],
                other=0.0,
            )
            product = tl.dot(
                gradient.to(OPERAND), patches.to(OPERAND), product, input_precision=PRECISION, out_dtype=ACC
            )
        scale = tl.load(
            attention + sample * a_n + rows[:, None] * a_o + map_[None, :] * a_m, mask=map_exists, other=0.0
        ).to(ACC)
        if RESIDUAL:
            scale += 1.0
        spread = tl.broadcast_to(scale[:, :, None], (BLOCK_M, MAPS, BLOCK_N // MAPS))
        total += product * tl.reshape(spread, (BLOCK_M, BLOCK_N))
        sums = tl.sum(tl.reshape(product * kernel, (BLOCK_M, MAPS, BLOCK_N // MAPS)), axis=2)
        tl.store(
            attention_gradient + sample * da_n + rows[:, None] * da_o + map_[None, :] * da_m,
            sums.to(attention_gradient.dtype.element_ty),
            mask=map_exists,
        )
    weight_gradient += split.to(tl.int64) * dw_s + group * out_channels * dw_o + i * dw_h + j * dw_w
    tl.store(weight_gradient + rows[:, None] * dw_o + channel[None, :] * dw_c, total, mask=kernel_exists)


class _Sizes(NamedTuple):
    """How many rows, columns and summands the matrix product of a sample and group has, up to powers of two."""

    rows: int
    columns: int
    depth: int


def _tile(block: int, size: int) -> int:
    """``block``, or ``size`` where that is smaller; tensor cores take 16 and more."""
    return max(16, min(block, size))


def _default_tiles(sizes: _Sizes, dtype: torch.dtype) -> dict[str, int]:
    low = dtype.itemsize == 2
    wide = low and sizes.rows >= 128 and sizes.columns >= 128
    return {
        "BLOCK_M": _tile(128 if wide else 64, sizes.rows),
        "BLOCK_N": _tile(128 if wide else 64, sizes.columns),
        "BLOCK_K": _tile(64 if low else 32, sizes.depth),
        "num_warps": 8 if wide else 4,
        "num_stages": 3,
    }


_TABLE = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
    for m, n, k, warps, stages in (
        (32, 32, 32, 2, 4),
        (32, 64, 32, 4, 4),
        (64, 32, 32, 4, 4),
        (64, 64, 32, 4, 3),
        (64, 64, 64, 4, 3),
        (64, 128, 32, 4, 3),
        (128, 64, 32, 4, 3),
        (128, 64, 64, 4, 3),
        (128, 128, 32, 8, 3),
        (128, 128, 64, 8, 3),
        (128, 256, 64, 8, 3),
    )
]
# the kernel's gradients: N comes from the caller
_TABLE_WITHOUT_N = [
    triton.Config({"BLOCK_M": m, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
    for m, k, warps, stages in (
        (32, 32, 4, 4),
        (32, 64, 4, 3),
        (64, 32, 8, 4),
        (64, 64, 8, 3),
        (128, 32, 8, 3),
        (128, 64, 8, 3),
    )
]


def _prune(configs: Sequence[triton.Config], named_args: dict[str, Any], **meta: Any) -> list[triton.Config]:
    """Leaves out tiles that are larger than what they would cover."""
    arguments = {**named_args, **meta}
    sizes = _Sizes(*arguments["SIZES"])
    fitting = [
        config
        for config in configs
        if all(
            config.kwargs.get(block, 16) <= max(32, size)
            for block, size in zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), sizes, strict=True)
        )
    ]
    return fitting or [configs[0]]


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
            "PRECISION": _precision(),
            # The interpreter multiplies the bits of bfloat16 as if they were integers; float32 holds the same products.
            "OPERAND": tl.float32 if INTERPRETED and self.dtype == torch.bfloat16 else _TRITON_DTYPES[self.dtype],
            "ACC": tl.float64 if self.dtype == torch.float64 else tl.float32,
            # the offsets of a sample and of a group are always 64 bits wide
            "INT64": any(_extent(tensor) >= 2**31 for tensor in tensors),
        }

    def launch(
        self,
        kernel: Any,
        programs: Callable[[dict[str, int]], int],
        sizes: _Sizes,
        *more: Any,
        warps: int | None = None,
        **fixed: int,
    ) -> None:
        """Runs ``kernel`` with tiles of its own choice, ``fixed`` ones excepted; ``warps`` is for the default ones."""
        sizes = _Sizes(*map(triton.next_power_of_2, sizes))
        # another device may be the current one
        with torch.cuda.device_of(self.arguments[0]):
            constants = {"SIZES": tuple(sizes), **self.constants, **fixed}
            if os.environ.get(AUTOTUNE_VARIABLE, "0") not in ("", "0"):
                _TUNED[kernel][lambda meta: (programs(meta),)](*self.arguments, *more, **constants)
            else:
                tiles = {**_default_tiles(sizes, self.dtype), **fixed}
                tiles["num_warps"] = warps or tiles["num_warps"]
                kernel[(programs(tiles),)](*self.arguments, *more, **{**constants, **tiles})


def forward(input: Tensor, weight: Tensor, attention: Tensor, output: Tensor, *geometry: Any) -> None:
    """Writes O into ``output``; ``geometry`` is stride, padding, dilation, groups and residual."""
    problem = _Problem(input, weight, attention, output, *geometry)

    def programs(tiles: dict[str, int]) -> int:
        row_tiles = triton.cdiv(problem.rows, tiles["BLOCK_M"])
        return row_tiles * triton.cdiv(problem.pixels, tiles["BLOCK_N"]) * problem.samples * problem.groups

    problem.launch(_forward_kernel, programs, _Sizes(problem.rows, problem.pixels, problem.maps * problem.slots))


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
        return triton.cdiv(slots, tiles["BLOCK_M"]) * pixel_tiles * problem.samples * problem.groups

    problem.launch(_input_gradient_kernel, programs, _Sizes(slots, pixels, problem.rows))


def _kernel_gradients(
    input: Tensor, weight: Tensor, attention: Tensor, gradient: Tensor, *geometry: Any
) -> tuple[Tensor, Tensor]:
    problem = _Problem(input, weight, attention, gradient, *geometry)
    slots = problem.maps * problem.slots
    sizes = _Sizes(problem.rows, slots, problem.pixels)
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

    more = (sums, part_sums, problem.samples, samples_a_split, sums.stride(), part_sums.stride())
    # three tiles live in registers at once, which four warps cannot hold: compiled for sm_90, float32 spills
    problem.launch(_kernel_gradients_kernel, programs, sizes, *more, warps=8, BLOCK_N=block_n)
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


def _extent(tensor: Tensor) -> int:
    """Largest offset within a sample, or within a kernel."""
    return sum((size - 1) * step for size, step in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))
