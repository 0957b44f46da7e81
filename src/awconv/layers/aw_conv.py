"""The AW-convolution layer: a drop-in Conv2d that computes its own attention maps."""

import math
from collections.abc import Callable
from numbers import Integral
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awconv.layers.attention_head import AttentionHead
from awconv.layers.functional import BACKENDS, aw_conv2d, aw_conv2d_with_logits

_Pair = int | tuple[int, int]


class AWConv2d(nn.Conv2d):
    """A convolution whose kernel every sample rescales by its own attention maps.

    The layer computes ``A = F1(input)`` and convolves with ``K * (1 + A)`` (Zhu, Hofstee, Lee, Al-Ars, *An Attention
    Module for Convolutional Neural Networks*, ICANN 2021). The paper confirms that A has the shape of the kernel,
    one set a sample; the form of F1 is this project's reading::

        A0 = adaptive average pool of the input to (kh, kw)       (N, C1, kh, kw)
        A1 = ReLU(BN(PointConv1(A0)))                             (N, hidden, kh, kw), hidden = max(C1 // reduction, 4)
        A  = Sigmoid(BN(PointConv2(A1)))                          (N, C2 * C1/groups/share, kh, kw)

    and each value of A serves ``share`` consecutive input channels. ``weight`` and ``bias`` have the names and shapes
    of :class:`torch.nn.Conv2d`, so that the checkpoint of a plain convolution loads into the layer; everything that
    is new sits under ``attention``.

    The head's normalisations see kh * kw values of every sample and channel: in training mode, a layer with a 1x1
    kernel needs more than one sample, or BatchNorm refuses the batch.

    Args:
        in_channels: Number of input channels C1.
        out_channels: Number of output channels C2.
        kernel_size: Height and width of the kernel, in pixels.
        stride: Step of the kernel, in pixels.
        padding: Padding in pixels on each side, or ``"same"`` or ``"valid"``.
        dilation: Distance between kernel elements, in pixels.
        groups: Number of blocks of channels that are convolved apart; must divide C1 and C2.
        bias: Add a learned bias to the output. The attention head has none: normalisations follow its convolutions.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        reduction: C1 over the head's hidden width, which is at least 4.
        share: Consecutive input channels that share one attention value; must divide C1 / groups. None takes the
            largest divisor that is at most 16.
        head_groups: Groups of PointConv2; must divide the hidden width and the number of maps.
        residual: Scale the kernel by 1 + A (rather than by A).
        zero_init: Start the head's last normalisation at zero: A is exactly 1/2 at first, so that training starts
            from a plain, scaled convolution and learns its attention.
        backend: How it is computed, see :func:`awconv.layers.aw_conv2d`; no backend changes the result.
        device: Where the parameters live.
        dtype: Type of the parameters.

    Shape:
        Input (N, C1, H, W) or (C1, H, W); output (N, C2, H', W') or (C2, H', W').

    Raises:
        ValueError: If an option does not fit the channels; the message names it and what would fit.

    Example:
        >>> layer = AWConv2d(64, 64, 3, padding=1)
        >>> layer(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
        >>> layer.attention_maps(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 64, 3, 3])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Pair,
        stride: _Pair = 1,
        padding: _Pair | str = 0,
        dilation: _Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        *,
        reduction: int = 16,
        share: int | None = None,
        head_groups: int = 1,
        residual: bool = True,
        zero_init: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device=device,
            dtype=dtype,
        )
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r} is unknown; choose one of {', '.join(map(repr, BACKENDS))}")
        for argument, value in (("reduction", reduction), ("share", share), ("head_groups", head_groups)):
            is_integer = isinstance(value, Integral) and not isinstance(value, bool)
            if not is_integer and not (argument == "share" and value is None):
                none = ", or None" if argument == "share" else ""
                raise ValueError(f"{argument}={value!r} must be an integer{none}")
        if reduction < 1:
            raise ValueError(f"reduction={reduction} must be at least 1")
        group_channels = in_channels // groups
        if share is None:
            share = max(d for d in range(1, 17) if group_channels % d == 0)
        elif share < 1 or group_channels % share:
            divisors = [d for d in range(1, group_channels + 1) if group_channels % d == 0]
            raise ValueError(
                f"share={share} must divide the {group_channels} input channels of a group; choose one of {divisors}, "
                "or None for the largest divisor that is at most 16"
            )
        hidden = max(in_channels // reduction, 4)
        maps = out_channels * (group_channels // share)
        if head_groups < 1 or hidden % head_groups or maps % head_groups:
            raise ValueError(
                f"head_groups={head_groups} must divide both the head's hidden width {hidden} and its {maps} maps; "
                f"choose a divisor of {math.gcd(hidden, maps)}"
            )
        self.reduction, self.share, self.head_groups = reduction, share, head_groups
        self.residual, self.backend = residual, backend
        self.attention = AttentionHead(
            in_channels, hidden, out_channels, group_channels // share, head_groups, device=device, dtype=dtype
        )
        if zero_init:
            self._silence_attention()

    def forward(self, input: Tensor) -> Tensor:
        """Convolves ``input`` (N, C1, H, W) or (C1, H, W) with its attended kernels."""
        if input.dim() == 3:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        pooled = self._pool(input)
        compute: Callable[..., Tensor] = aw_conv2d
        if AttentionHead.can_spare_its_sigmoid(self.attention):
            # what takes the sigmoid as it goes need not hold the attention besides the logits
            compute, maps = aw_conv2d_with_logits, self.attention.logits(pooled)
        else:
            maps = self._compact_attention(pooled)
        padding: _Pair | str = self.padding  # type: ignore[assignment]
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return compute(
            input,
            self.weight,
            maps,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            residual=self.residual,
            backend=self.backend,
        )

    def attention_maps(self, input: Tensor) -> Tensor:
        """Computes A = F1(input), shape (N, C2, C1 / groups, kh, kw), values in (0, 1).

        Args:
            input: Shape (N, C1, H, W). As in any forward pass, in training mode the batch's own statistics are used
                and the head's running statistics are updated.
        """
        return self._compact_attention(self._pool(input)).repeat_interleave(self.share, dim=2)

    @torch.no_grad()
    def preserve_function_(self, *tied: "AWConv2d") -> "AWConv2d":
        """Makes the layer compute, now, the plain convolution with the present ``weight``; returns the layer.

        Silences the head (A = 1/2 everywhere) and divides ``weight`` by the scale that this gives: 3/2, or 1/2
        without ``residual``. The head still learns, since its last normalisation receives gradients.

        Args:
            tied: The other layers that share ``weight``, if any: the kernel is divided once for all of them.
        """
        for layer in (self, *tied):
            layer._silence_attention()
        self.weight.div_(1.5 if self.residual else 0.5)
        return self

    def extra_repr(self) -> str:
        """Shows the options of the convolution and of its attention."""
        options = [f"reduction={self.reduction}", f"share={self.share}"]
        if self.head_groups != 1:
            options.append(f"head_groups={self.head_groups}")
        if not self.residual:
            options.append("residual=False")
        return ", ".join([super().extra_repr(), *options, f"backend={self.backend}"])  # type: ignore[no-untyped-call]

    def _pool(self, input: Tensor) -> Tensor:
        pool = _exportable_pool if torch.compiler.is_exporting() else F.adaptive_avg_pool2d
        height, width = self.kernel_size
        return pool(input, (height, width))

    def _compact_attention(self, pooled: Tensor) -> Tensor:
        """Computes A without repeating shared values: (N, C2, C1 / groups / share, kh, kw)."""
        attention: Tensor = self.attention(pooled)
        # a head of one's own may give its maps as channels
        maps = self.in_channels // self.groups // self.share
        return attention.reshape(len(attention), self.out_channels, maps, *self.kernel_size)

    def _silence_attention(self) -> None:
        norm: Any = self.attention.get_submodule("norm2")  # SyncBatchNorm by now, perhaps
        nn.init.zeros_(norm.weight)
        nn.init.zeros_(norm.bias)


def _exportable_pool(input: Tensor, size: tuple[int, int]) -> Tensor:
    """Adaptive average pool as two matrix products, for graphs that take any picture size.

    ONNX has no adaptive pool, and the exporter unrolls torch's for the height and width of its example: the graph
    then fails on all others.
    """
    height, width = (_averaging(pixels, cells, input) for pixels, cells in zip(input.shape[2:], size, strict=True))
    # one matrix product each, where height @ input @ width.T would be one for every sample and channel
    rows = F.linear(input.transpose(2, 3), height)
    return F.linear(rows.transpose(2, 3), width)


def _averaging(pixels: int, cells: int, like: Tensor) -> Tensor:
    """A matrix (cells, pixels) whose row i averages pixels floor(i * pixels / cells) to ceil((i + 1) * pixels / cells).

    Built from comparisons, since ``pixels`` is a symbol while exporting.
    """
    cell = torch.arange(cells, device=like.device).unsqueeze(1)
    pixel = torch.arange(pixels, device=like.device)
    first, end = cell * pixels // cells, ((cell + 1) * pixels + cells - 1) // cells
    return ((first <= pixel) & (pixel < end)).to(like.dtype) / (end - first).to(like.dtype)
