"""F1, the head that computes a sample's attention maps from its pooled input."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awconv.layers.functional import autocast_is_known

# When PointConv2 and its normalisation are computed as one: where there are many maps, and many values of each beside
# the numbers in a row of PointConv2's weight. Else the maps are sooner normalised than the weights are scaled.
_MANY_MAPS = 4096
_VALUES_A_WEIGHT = 4


class AttentionHead(nn.Module):
    """Two 1x1 convolutions with their normalisations, from pooled input to attention maps.

    This project's reading of F1 (Zhu et al., ICANN 2021, tell only that A = F1(I))::

        A1 = ReLU(BN(PointConv1(A0)))        (N, hidden, kh, kw)
        A  = Sigmoid(BN(PointConv2(A1)))     (N, C2 * C1/groups/share, kh, kw)

    Its parts are called ``conv1``, ``norm1``, ``relu``, ``conv2``, ``norm2`` and ``sigmoid``. Another normalisation may
    take the place of ``norm2``, and anything may listen to a part.

    The output of PointConv2 can outweigh the layer's own activations, and BatchNorm would read it twice and keep it for
    its gradient. Where both are torch's own, and the maps many, it is never formed: it is linear in A1, so that its
    mean and variance follow from the mean and the covariance of A1's few channels, and BN(PointConv2(A1)) is one 1x1
    convolution with scaled weights. The maps then lie in memory with the output channels innermost, as the kernels of
    ``backend="fused"`` read them.

    Args:
        in_channels: Number of channels C1 of the pooled input.
        hidden: Number of channels of A1.
        out_channels: Number of output channels C2 of the convolution that the maps are for.
        maps: Number of maps of each of these, C1 / groups / share.
        head_groups: Groups of PointConv2.
        device: Where the parameters live.
        dtype: Type of the parameters.

    Shape:
        Input (N, C1, kh, kw); output (N, C2, C1 / groups / share, kh, kw), values in (0, 1).
    """

    def __init__(
        self,
        in_channels: int,
        hidden: int,
        out_channels: int,
        maps: int,
        head_groups: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.out_channels, self.maps = out_channels, maps
        total = out_channels * maps
        self.conv1: nn.Module = nn.Conv2d(in_channels, hidden, 1, bias=False, device=device, dtype=dtype)
        self.norm1: nn.Module = nn.BatchNorm2d(hidden, device=device, dtype=dtype)
        self.relu: nn.Module = nn.ReLU(inplace=True)
        self.conv2: nn.Module = nn.Conv2d(hidden, total, 1, groups=head_groups, bias=False, device=device, dtype=dtype)
        self.norm2: nn.Module = nn.BatchNorm2d(total, device=device, dtype=dtype)
        self.sigmoid: nn.Module = nn.Sigmoid()

    def forward(self, pooled: Tensor) -> Tensor:
        """Computes the maps of ``pooled`` (N, C1, kh, kw)."""
        attention: Tensor = self.sigmoid(self.logits(pooled))
        return attention

    def logits(self, pooled: Tensor) -> Tensor:
        """Computes what :meth:`forward` takes the sigmoid of."""
        hidden = self.relu(self.norm1(self.conv1(pooled)))
        conv, norm = self.conv2, self.norm2
        if self._computed_as_one(hidden) and isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            return self._normalised(hidden, conv, norm)
        logits: Tensor = norm(conv(hidden)).unflatten(1, (self.out_channels, self.maps))
        return logits

    @staticmethod
    def can_spare_its_sigmoid(head: nn.Module) -> bool:
        """Whether ``head``, whatever took its place, is such a one, and nobody would miss its call or its sigmoid's."""
        if type(head) is not AttentionHead or "forward" in vars(head) or type(head.sigmoid) is not nn.Sigmoid:
            return False
        return not _is_watched(head) and not _is_watched(head.sigmoid)

    def _computed_as_one(self, hidden: Tensor) -> bool:
        parts = (self.conv2, self.norm2)
        # an exported graph is plainer, and faster where it runs, with the two as they are
        if self.out_channels * self.maps < _MANY_MAPS or torch.compiler.is_exporting():
            return False
        # what was put in their place, or listens to them, needs them called
        if (type(self.conv2), type(self.norm2)) != (nn.Conv2d, nn.BatchNorm2d) or any(map(_is_watched, parts)):
            return False
        norm: Any = self.norm2
        if hidden.device.type == "mps":  # which has no float64
            return False
        conv: Any = self.conv2
        values = hidden.shape[0] * hidden.shape[2] * hidden.shape[3]
        pays = values >= _VALUES_A_WEIGHT * conv.in_channels // conv.groups
        return pays and conv.bias is None and norm.affine and norm.track_running_stats and norm.momentum is not None

    def _normalised(self, hidden: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
        """BN(PointConv2(hidden)) as (N, C2, maps, kh, kw), without the output of PointConv2."""
        samples, channels, *kernel_size = hidden.shape
        exact = torch.promote_types(hidden.dtype, torch.float32)
        groups = conv.groups
        weight = conv.weight.view(groups, -1, channels // groups).to(exact)
        gain, shift = norm.weight.to(exact), norm.bias.to(exact)
        with _full_precision(hidden.device.type):
            if norm.training:
                centre = hidden.to(exact).mean((0, 2, 3), keepdim=True)
                hidden = hidden - centre  # which the shift of BatchNorm would else have to take out again
                values = hidden.double().transpose(0, 1).reshape(groups, channels // groups, -1)
                variance = _Variance.apply(weight, values @ values.mT / values.shape[-1]).flatten()
                mean = weight.detach().double() @ centre.detach().double().view(groups, -1, 1)
                _track(norm, mean.flatten(), variance, values.shape[-1])
                gain = gain * torch.rsqrt(variance + norm.eps).to(exact)
            else:
                gain = gain * torch.rsqrt(_exactly(norm.running_var, exact) + norm.eps)
                shift = shift - _exactly(norm.running_mean, exact) * gain
        weight = (weight.flatten(0, 1) * gain.unsqueeze(1)).view(self.out_channels, self.maps, -1)
        shift = shift.view(self.out_channels, self.maps)
        innermost = groups == 1  # a group's maps are those of a range of output channels
        if innermost:
            weight, shift = weight.transpose(0, 1), shift.t()
        logits = F.conv2d(
            hidden.to(conv.weight.dtype).contiguous(memory_format=torch.channels_last),
            weight.reshape(-1, channels // groups, 1, 1).to(conv.weight.dtype),
            shift.reshape(-1).to(conv.weight.dtype),
            groups=groups,
        )
        if innermost:
            return logits.view(samples, self.maps, self.out_channels, *kernel_size).transpose(1, 2)
        return logits.view(samples, self.out_channels, self.maps, *kernel_size)


class _Variance(torch.autograd.Function):
    """Variance of each row of ``weight`` (..., maps, d) times random columns with ``covariance`` (..., d, d).

    In float64: where the columns' entries are much alike, little is left of what is summed, and the fast products of
    float32 would leave less than nothing. Nothing of it is kept but the weight, as large as it is.
    """

    @staticmethod
    def forward(weight: Tensor, covariance: Tensor) -> Tensor:
        precise = weight.double()
        return ((precise @ covariance) * precise).sum(-1).clamp_min(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        weight, covariance = ctx.saved_tensors
        precise = weight.double()
        scaled = precise * gradient.unsqueeze(-1)
        return (2 * scaled @ covariance).to(weight.dtype), scaled.mT @ precise


@torch.no_grad()
def _track(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, values: int) -> None:
    """Moves the running statistics of ``norm`` as its own forward pass would."""
    assert norm.momentum is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    for running, batch in ((norm.running_mean, mean), (norm.running_var, variance * (values / (values - 1)))):
        assert running is not None
        running.lerp_(batch.to(running.dtype), norm.momentum)


def _exactly(statistic: Tensor | None, dtype: torch.dtype) -> Tensor:
    assert statistic is not None
    return statistic.to(dtype)


def _is_watched(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _full_precision(device_type: str) -> AbstractContextManager[Any]:
    return torch.autocast(device_type, enabled=False) if autocast_is_known(device_type) else nullcontext()
