"""The bottleneck attention module, the one common activation attention that timm lacks."""

from collections import OrderedDict

from torch import Tensor, nn


class BAM(nn.Module):
    """Bottleneck attention module (Park, Woo, Lee, Kweon, *BAM*, BMVC 2018, arXiv 1807.06514).

    ``output = x + x * sigmoid(Mc(x) + Ms(x))``: a channel branch (global average, two-layer perceptron, equation 3)
    and a spatial branch (1x1 reduction, two dilated 3x3 convolutions, 1x1 to one map, equation 4), broadcast over
    each other (equation 2). As in the authors' released code, each hidden layer is normalised and the last of each
    branch is not. It stands between the stages of a network.

    Args:
        channels: Number of channels C.
        reduction: C over the hidden width of both branches.
        dilation: Distance between the elements of the spatial branch's 3x3 kernels, in pixels.

    Shape:
        Input and output (N, C, H, W).

    Raises:
        ValueError: If ``reduction`` leaves no hidden channel, or ``dilation`` is less than 1.
    """

    def __init__(self, channels: int, reduction: int = 16, dilation: int = 4) -> None:
        super().__init__()
        hidden = channels // reduction if reduction > 0 else 0
        if hidden < 1:
            raise ValueError(f"reduction={reduction} must be from 1 to the number of channels, {channels}")
        if dilation < 1:
            raise ValueError(f"dilation={dilation} must be at least 1")
        self.channel = nn.Sequential(
            OrderedDict(
                pool=nn.AdaptiveAvgPool2d(1),
                reduce=nn.Conv2d(channels, hidden, 1, bias=False),
                norm=nn.BatchNorm2d(hidden),
                relu=nn.ReLU(inplace=True),
                expand=nn.Conv2d(hidden, channels, 1),
            )
        )
        spatial: OrderedDict[str, nn.Module] = OrderedDict()
        for index, kernel_size in enumerate((1, 3, 3)):
            spatial[f"conv{index}"] = nn.Conv2d(
                channels if index == 0 else hidden,
                hidden,
                kernel_size,
                padding=dilation * (kernel_size // 2),
                dilation=dilation if kernel_size > 1 else 1,
                bias=False,
            )
            spatial[f"norm{index}"] = nn.BatchNorm2d(hidden)
            spatial[f"relu{index}"] = nn.ReLU(inplace=True)
        spatial["expand"] = nn.Conv2d(hidden, 1, 1)
        self.spatial = nn.Sequential(spatial)

    def forward(self, x: Tensor) -> Tensor:
        """Refines ``x`` (N, C, H, W) by its channel and spatial attention."""
        return x + x * (self.channel(x) + self.spatial(x)).sigmoid()
