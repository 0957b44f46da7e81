"""The ResNets that He et al. designed for CIFAR, registered in timm as ``resnet20`` to ``resnet110``."""

from typing import Any

import torch.nn.functional as F
from timm.models import register_model
from timm.models._features import feature_take_indices
from timm.models.resnet import BasicBlock
from torch import Tensor, nn


class ShortcutA(nn.Module):
    """The parameter-free shortcut, option A of He et al. 2016, section 3.3.

    Takes every second pixel when the block has stride 2, and appends channels of zeros for the new ones.

    Shape:
        Input (N, C, H, W); output (N, C + extra_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, extra_channels: int, stride: int) -> None:
        super().__init__()
        self.extra_channels, self.stride = extra_channels, stride

    def forward(self, x: Tensor) -> Tensor:
        """Subsamples and pads ``x``."""
        return F.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra_channels))


class CIFARResNet(nn.Module):
    """ResNet for 32x32 images (He, Zhang, Ren, Sun, *Deep Residual Learning*, CVPR 2016, section 4.2).

    A 3x3 stem of 16 channels, three stages of n basic blocks with 16, 32 and 64 channels at strides 1, 2 and 4,
    parameter-free shortcuts, global average pooling and one linear layer: 6n + 2 weighted layers. Weights start from
    He's normal initialisation, as in the paper. The blocks are timm's :class:`~timm.models.resnet.BasicBlock`.

    Args:
        depth: 6n + 2: 20, 32, 44, 56, 110, ...
        num_classes: Number of logits K.
        in_chans: Number of image channels C (timm's name for it).

    Shape:
        Input (N, C, H, W), of any size; output (N, K).
    """

    def __init__(self, depth: int, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth={depth} must be 6n + 2, for example 20, 32, 44, 56 or 110")
        self.num_classes, self.num_features = num_classes, 64
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.act1 = nn.ReLU(inplace=True)
        self.layer1 = self._stage(16, 16, 1, blocks)
        self.layer2 = self._stage(16, 32, 2, blocks)
        self.layer3 = self._stage(32, 64, 2, blocks)
        self.feature_info = [{"num_chs": 16 * 2**i, "reduction": 2**i, "module": f"layer{i + 1}"} for i in range(3)]
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.fc: nn.Module = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(in_channels: int, channels: int, stride: int, blocks: int) -> nn.Sequential:
        shortcut = ShortcutA(channels - in_channels, stride) if stride > 1 else None
        return nn.Sequential(
            BasicBlock(in_channels, channels, stride, downsample=shortcut),
            *(BasicBlock(channels, channels) for _ in range(blocks - 1)),
        )

    def get_classifier(self) -> nn.Module:
        """Returns the linear layer that makes the logits."""
        return self.fc

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Computes feature maps of several stages at once, as timm's networks do.

        Args:
            x: Images (N, C, H, W).
            indices: Which entries of ``feature_info``, from 0; a number n takes the last n, None takes all.
            norm: For timm's sake: there is no last normalisation here.
            stop_early: Do not compute the stages after the last one that is asked for.
            output_fmt: For timm's sake: only ``"NCHW"`` exists.
            intermediates_only: Return the list alone.

        Returns:
            The last feature map that was computed and the list of those asked for, or only the list.
        """
        take, last = feature_take_indices(3, indices)
        features: list[Tensor] = []
        x = self.act1(self.bn1(self.conv1(x)))
        for index, stage in enumerate((self.layer1, self.layer2, self.layer3)):
            if stop_early and index > last:
                break
            x = stage(x)
            if index in take:
                features.append(x)
        return features if intermediates_only else (x, features)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops what the feature maps of ``indices`` do not need, as timm's networks do, and returns the indices.

        Args:
            indices: As in :meth:`forward_intermediates`.
            prune_norm: For timm's sake: there is no last normalisation here.
            prune_head: Drop the linear layer too; it goes in any case where the last stage goes.
        """
        take, last = feature_take_indices(3, indices)
        for index in range(last + 1, 3):
            setattr(self, f"layer{index + 1}", nn.Sequential())
        if prune_head or last < 2:
            self.num_features = self.feature_info[last]["num_chs"]
            self.fc = nn.Identity()
        return list(take)

    def forward_features(self, x: Tensor) -> Tensor:
        """Computes the last feature map, (N, 64, ceil(H / 4), ceil(W / 4))."""
        x = self.act1(self.bn1(self.conv1(x)))
        features: Tensor = self.layer3(self.layer2(self.layer1(x)))
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Computes logits (N, K) of images (N, C, H, W)."""
        logits: Tensor = self.fc(self.global_pool(self.forward_features(x)).flatten(1))
        return logits


def _create(depth: int, num_classes: int = 10, in_chans: int = 3, **_timm: Any) -> CIFARResNet:
    # timm hands every entry point its pretrained configuration and cache folder; these networks have none
    return CIFARResNet(depth, num_classes, in_chans)


@register_model
def resnet20(pretrained: bool = False, **kwargs: Any) -> CIFARResNet:
    """CIFAR ResNet with 20 layers, 0.27M parameters."""
    return _create(20, **kwargs)


@register_model
def resnet32(pretrained: bool = False, **kwargs: Any) -> CIFARResNet:
    """CIFAR ResNet with 32 layers, 0.46M parameters."""
    return _create(32, **kwargs)


@register_model
def resnet44(pretrained: bool = False, **kwargs: Any) -> CIFARResNet:
    """CIFAR ResNet with 44 layers, 0.66M parameters."""
    return _create(44, **kwargs)


@register_model
def resnet56(pretrained: bool = False, **kwargs: Any) -> CIFARResNet:
    """CIFAR ResNet with 56 layers, 0.85M parameters."""
    return _create(56, **kwargs)


@register_model
def resnet110(pretrained: bool = False, **kwargs: Any) -> CIFARResNet:
    """CIFAR ResNet with 110 layers, 1.7M parameters."""
    return _create(110, **kwargs)
