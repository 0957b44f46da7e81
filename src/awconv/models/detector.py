"""One function that builds any detector of this project from primitives."""

import inspect
import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from timm.layers.cbam import CbamModule
from timm.layers.norm_act import BatchNormAct2d, GroupNormAct, convert_sync_batchnorm
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from awconv.errors import InputError, is_number, require, require_int, require_number
from awconv.layers import BAM, AWConv2d
from awconv.models.backbone import Attention, check_choice, create_backbone, nearest
from awconv.models.weights import WeightsReport, fetch_torchvision_state, holds_detector, load_state, read_state

Head = Literal["faster_rcnn", "retinanet", "fcos"]
Norm = Literal["frozen", "batch", "sync", "group"]

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class _HeadKind:
    """What torchvision's three detectors differ in."""

    detector: type[nn.Module]
    levels: tuple[int, ...]
    # how many levels the pyramid adds on top
    extra_levels: int
    # sides of the default anchors over the stride of their level
    anchor_scales: tuple[float, ...] = ()


_HEADS = {
    "faster_rcnn": _HeadKind(detection.FasterRCNN, (4, 8, 16, 32), 1, (8,)),
    "retinanet": _HeadKind(detection.RetinaNet, (8, 16, 32), 2, (4, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3))),
    "fcos": _HeadKind(detection.FCOS, (8, 16, 32), 2),
}
# Arguments of torchvision's classes that are modules, or that `create_detector` sets by arguments of its own.
_NOT_OPTIONS = {
    "backbone", "num_classes", "min_size", "max_size", "image_mean", "image_std", "rpn_anchor_generator", "rpn_head",
    "box_roi_pool", "box_head", "box_predictor", "anchor_generator", "head", "proposal_matcher", "kwargs",
}  # fmt: skip


def create_detector(
    head: Head,
    backbone: str,
    *,
    attention: Attention | None = None,
    aw: bool | Mapping[str, Any] | None = None,
    num_classes: int = 80,
    initial_weights: str | None = None,
    norm: Norm = "batch",
    trainable_stages: int | None = None,
    levels: Sequence[int] | None = None,
    fpn_channels: int = 256,
    anchor_sizes: Sequence[float | Sequence[float]] | None = None,
    aspect_ratios: Sequence[float] | None = None,
    roi_size: int = 7,
    image_size: int = 800,
    max_size: int = 1333,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    options: Mapping[str, Any] | None = None,
    resize_in_training: bool = True,
    loaded_later: bool = False,
) -> nn.Module:
    """Builds a detector: one of torchvision's heads over a feature pyramid (Lin et al. 2017) over a backbone.

    With ``resnet50`` and the defaults it is, name by name and number by number, torchvision's
    ``fasterrcnn_resnet50_fpn``, ``retinanet_resnet50_fpn`` or ``fcos_resnet50_fpn`` with ``num_classes + 1`` classes.
    ``detector.backbone.body`` is the classification network without its classifier, ``detector.backbone.fpn`` the
    pyramid. Two things differ: boxes, scores and losses stay in float32 under autocast, and label 0 is never predicted,
    as torchvision's RetinaNet and FCOS do while they have learned little.

    Args:
        head: ``"faster_rcnn"`` (Ren et al., *Faster R-CNN*, 2015, with FPN: Lin et al., *Feature Pyramid Networks*,
            2017), ``"retinanet"`` (Lin et al., *Focal Loss*, 2017) or ``"fcos"`` (Tian et al. 2019).
        backbone: Name of the network, see :func:`awconv.models.create_backbone`. Any that tells its feature maps the
            way timm's CNNs do (``feature_info``, ``forward_intermediates``).
        attention: Activation attention, see :func:`awconv.models.create_backbone`.
        aw: AW-convolution in the backbone, see :func:`awconv.models.create_backbone`. On initial weights of a plain
            network it starts function-preserving.
        num_classes: Number of classes K without the background. Labels are 1..K for every head.
        initial_weights: None for random weights; ``"pretrained"`` for timm's ImageNet weights of the backbone;
            ``"torchvision"`` for torchvision's (``IMAGENET1K_V1``); or a file, see
            :func:`awconv.models.load_initial_weights`: a classifier's, which fills the body, or a detector's, ours or
            torchvision's, which fills all of it (but for the class predictor, where the number of classes differs).
            What ``attention`` adds, and a classifier's file lacks, keeps its initialisation.
        norm: The body's normalisation. ``"batch"`` is the network's own. ``"frozen"`` makes BatchNorm a constant
            (statistics and scales, as torchvision does), which small batches need and random weights forbid; the
            norms inside AW heads, BAM and CBAM are not the pretrained network's and keep learning. ``"sync"`` shares
            the statistics of all processes (GPU only). ``"group"`` is GroupNorm (Wu and He, *Group Normalization*,
            2018) in its place: 32 groups, or as many fewer as divide the channels into groups of at least 2; one
            group inside AW heads, BAM and CBAM, where a channel has few positions.
        trainable_stages: How many of the body's last stages learn, None for all: with ResNets 5 is everything, the
            stem included, and 0 nothing; what follows the last of ``levels`` is no stage. The rest is constant, norms
            included; only what ``aw`` and ``attention`` add learns in every stage, because ImageNet weights do not
            hold it.
        levels: Strides in pixels of the feature maps that enter the pyramid, each twice the one before. Default
            4, 8, 16, 32 for ``faster_rcnn`` and 8, 16, 32 for the others. ``faster_rcnn`` adds one level on top
            (subsampled), the others two (P6 and P7, by convolutions on P5).
        fpn_channels: Channels of the pyramid and of the heads.
        anchor_sizes: Sides of the anchors in pixels, a number or a list of numbers for each level, the added ones
            included. Default 8 strides for ``faster_rcnn``; 4, 5.04 and 6.35 strides for ``retinanet``.
        aspect_ratios: Heights of the anchors over their widths, at every level. Default 0.5, 1, 2.
        roi_size: Side of the pooled regions of ``faster_rcnn``, in cells.
        image_size: Length in pixels to which the shorter side of a picture is scaled.
        max_size: Limit in pixels of the longer side, which wins over ``image_size``.
        mean: Mean of red, green and blue that is subtracted, in [0, 1]; default ImageNet's.
        std: Standard deviation of red, green and blue, by which is divided; default ImageNet's.
        options: Further arguments of torchvision's ``FasterRCNN``, ``RetinaNet`` or ``FCOS``: thresholds, numbers of
            proposals, of samples and of detections.
        resize_in_training: Whether pictures are scaled in training mode too; not where the data come scaled.
        loaded_later: Allow what is refused over random weights: the caller loads all weights afterwards.

    Returns:
        A module with torchvision's interface. In training mode it maps N pictures (3, H, W), float in [0, 1], and N
        targets with ``boxes`` (M, 4), x1 y1 x2 y2 in pixels, and ``labels`` (M,) to a dictionary of losses; in
        evaluation mode it maps N pictures to N dictionaries with ``boxes`` (D, 4) in the picture's own pixels,
        ``scores`` (D,) and ``labels`` (D,). Its ``weights_report``, an :class:`awconv.models.WeightsReport`, says where
        its weights came from.

    Raises:
        InputError: If an argument is unknown or does not fit the others, the backbone has no such feature maps, the
            initial weights cannot be had or do not fit, or ``norm="frozen"``, or stages that do not train, are asked
            for over random weights.
    """
    check_choice("head", head, get_args(Head))
    check_choice("norm", norm, get_args(Norm))
    kind = _HEADS[head]
    levels = _checked_levels(kind.levels if levels is None else levels)
    require_int("num_classes", num_classes, "the number of classes without the background, at least 1", low=1)
    require_int("fpn_channels", fpn_channels, "an integer of at least 1", low=1)
    if head == "fcos":
        expected = "a multiple of 32 with head='fcos', whose convolutions end in GroupNorm of 32 groups"
        require(fpn_channels % 32 == 0, "fpn_channels", fpn_channels, expected)
    require_int("image_size", image_size, "the shorter side of pictures in pixels, at least 1", low=1)
    require_int("max_size", max_size, f"at least image_size={image_size}", low=image_size)
    strides = [*levels, *(levels[-1] * 2 ** (i + 1) for i in range(kind.extra_levels))]
    anchors = _anchors(head, strides, anchor_sizes, aspect_ratios)
    pretrained = initial_weights == "pretrained"
    random = initial_weights is None and not loaded_later
    if norm == "group" and initial_weights in ("pretrained", "torchvision"):
        raise InputError(
            f"norm='group' over initial_weights={initial_weights!r}: GroupNorm would not compute what those weights "
            "learned with BatchNorm; use norm frozen, batch or sync, or set initial_weights to null"
        )
    if norm == "frozen" and random:
        raise InputError(
            "norm='frozen' over random weights: their statistics mean nothing; give initial_weights (pretrained, "
            "torchvision or a file), or use norm batch or group"
        )

    network: Any = create_backbone(backbone, attention=attention, aw=aw, pretrained=pretrained)
    mean, std = _normalisation(mean, std, network if pretrained else None, backbone)
    pyramid = PyramidBackbone(network, backbone, levels, fpn_channels, _top(head, fpn_channels))
    frozen = pyramid.stages_before(trainable_stages) - _added(network, attention) - _aw_heads(network)
    if frozen and random:
        raise InputError(
            f"trainable_stages={trainable_stages} over random weights: the other stages would never learn; give "
            "initial_weights (pretrained, torchvision or a file), or set trainable_stages to null"
        )
    pyramid.set_norm(norm, backbone, frozen)

    options = _checked_options(kind.detector, options)
    arguments: dict[str, Any] = {}
    if head == "faster_rcnn":
        require_int("roi_size", roi_size, "an integer of at least 1", low=1)
        names = [str(index) for index in range(len(levels))]
        arguments["rpn_anchor_generator"] = anchors
        arguments["box_roi_pool"] = MultiScaleRoIAlign(names, output_size=roi_size, sampling_ratio=2)
    else:
        require(roi_size == 7, "roi_size", roi_size, f"no such option with head={head!r}, which pools no regions")
        arguments["anchor_generator"] = anchors
    try:
        detector: Any = kind.detector(
            pyramid,
            num_classes=num_classes + 1,
            min_size=image_size,
            max_size=max_size,
            image_mean=mean,
            image_std=std,
            _skip_resize=not resize_in_training,
            **arguments,
            **options,
        )
    except AssertionError as error:  # what torchvision says of thresholds in the wrong order, say
        raise InputError(f"options={options} do not fit the {kind.detector.__name__}: {error}") from None
    detector.transform = _Transform.like(detector.transform)
    if head == "faster_rcnn":
        for module in (detector.rpn.head, detector.roi_heads.box_predictor):
            module.register_forward_hook(_give_float32)
    else:
        detector.head.register_forward_hook(_give_float32)
        detector.head.register_forward_hook(_never_predict_background)

    detector.weights_report = _load(detector, backbone, attention, initial_weights)
    assert isinstance(detector, nn.Module)
    return detector


class _Transform(GeneralizedRCNNTransform):  # type: ignore[misc]
    """torchvision's transform, for pictures too that are a thousand times as long as wide."""

    @classmethod
    def like(cls, given: GeneralizedRCNNTransform) -> "_Transform":
        """Makes one of the same settings."""
        return cls(
            given.min_size,
            given.max_size,
            given.image_mean,
            given.image_std,
            given.size_divisible,
            given.fixed_size,
            _skip_resize=given._skip_resize,
        )

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Scales a picture, but to no less than one pixel across, where torchvision would raise an error."""
        sides = image.shape[-2:]
        scale = min(min(self.min_size) / min(sides), self.max_size / max(sides))
        if self.fixed_size is not None or min(sides) * scale >= 1 or (self.training and self._skip_resize):
            resized: tuple[Tensor, dict[str, Tensor] | None] = super().resize(image, target)
            return resized
        size = [max(1, int(side * scale)) for side in sides]
        image = F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]
        if target is not None:
            target = {**target, "boxes": resize_boxes(target["boxes"], list(sides), size)}
        return image, target


class PyramidBackbone(nn.Module):
    """A classification network without its classifier, and a feature pyramid on its feature maps.

    Feature Pyramid Networks: Lin, Dollár, Girshick, He, Hariharan, Belongie, CVPR 2017; the pyramid is torchvision's.

    Args:
        network: The classification network; its classifier, and its stages after the last level, are removed.
        name: Its name, for error messages.
        levels: Strides of the feature maps that enter the pyramid, in pixels.
        channels: Channels of the pyramid.
        top: What adds levels on top.

    Shape:
        Input (N, 3, H, W); output a dictionary of maps (N, channels, H / stride, W / stride), the finest first.

    Attributes:
        body: What is left of the network.
        fpn: The pyramid.
        out_channels: Channels of every output.
        pruned: Names of the network's tensors that are left no more.

    Raises:
        InputError: If the network does not tell its feature maps, has none of such a stride, or is wrong about them.
    """

    def __init__(self, network: Any, name: str, levels: Sequence[int], channels: int, top: ExtraFPNBlock) -> None:
        super().__init__()
        info: list[dict[str, Any]] = list(getattr(network, "feature_info", ()))
        if not info or not all(hasattr(network, m) for m in ("forward_intermediates", "prune_intermediate_layers")):
            raise InputError(
                f"backbone={name!r} cannot give feature maps, which a detector needs: it has no feature_info, "
                "forward_intermediates and prune_intermediate_layers as timm's CNNs do (resnet50, say); take such a "
                "network, or write them for yours as awconv/models/cifar_resnet.py does"
            )
        # the last feature map of a stride is the deepest
        at_stride = {entry["reduction"]: index for index, entry in enumerate(info)}
        if absent := [level for level in levels if level not in at_stride]:
            there = ", ".join(map(str, sorted(at_stride)))
            raise InputError(
                f"levels={list(levels)}: backbone {name!r} has no feature map of stride "
                f"{' and '.join(map(str, absent))}; its strides are {there}"
            )
        self.indices = [at_stride[level] for level in levels]
        before = network.state_dict().keys()
        network.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)
        self.pruned = frozenset(before - network.state_dict().keys())
        self.body = network
        self._stage_ends = [entry["module"] for entry in info[: max(self.indices) + 1]]
        widths = [info[index]["num_chs"] for index in self.indices]
        self._try_out(name, levels, widths)
        self.fpn = FeaturePyramidNetwork(widths, channels, extra_blocks=top)
        self.out_channels = channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Computes the pyramid of a batch of pictures."""
        maps: dict[str, Tensor] = self.fpn(OrderedDict((str(i), m) for i, m in enumerate(self._feature_maps(x))))
        return maps

    def stages_before(self, trainable: int | None) -> set[str]:
        """Names the parameters of the body that are not in its last ``trainable`` stages; None means all stages.

        A stage ends with a feature map; what lies before the first block is a stage of its own, the stem.
        """
        names = [name for name, _ in self.body.named_parameters()]
        spans = [[i for i, name in enumerate(names) if name.startswith(f"{end}.")] for end in self._stage_ends]
        spans = [span for span in spans if span]
        starts = sorted({0, *(span[0] for span in spans[:1]), *(span[-1] + 1 for span in spans[:-1])})
        if trainable is None:
            return set()
        expected = f"how many of the {len(starts)} stages train, 0 to {len(starts)}, or null for all"
        require_int("trainable_stages", trainable, expected, low=0, high=len(starts))
        return set(names[: [*starts, len(names)][len(starts) - trainable]])

    def set_norm(self, norm: Norm, name: str, frozen: set[str]) -> None:
        """Gives the body its normalisation, and makes the parameters named ``frozen``, norms included, constant."""
        for key, parameter in self.body.named_parameters():
            if key in frozen:
                parameter.requires_grad_(False)
        norms = [(key, module) for key, module in self.body.named_modules() if isinstance(module, nn.BatchNorm2d)]
        if norm != "batch" and not norms:
            raise InputError(f"norm={norm!r}: backbone {name!r} has no BatchNorm to replace; leave norm at batch")
        gained = {
            id(inner)
            for module in self.body.modules()
            if isinstance(module, AWConv2d | BAM | CbamModule)
            for inner in module.modules()
        }
        for key, module in norms:
            constant = f"{key}.weight" in frozen
            replacement: nn.Module = module
            if norm == "group":
                replacement = _group_norm(module, one_group=id(module) in gained)
            elif constant or (norm == "frozen" and id(module) not in gained):
                replacement = FrozenNorm(module)
            elif norm == "sync":
                replacement = convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
            self.body.set_submodule(key, replacement)

    def _feature_maps(self, x: Tensor) -> list[Tensor]:
        maps: list[Tensor] = self.body.forward_intermediates(
            x, indices=self.indices, stop_early=True, intermediates_only=True
        )
        return maps

    @torch.enable_grad()
    def _try_out(self, name: str, levels: Sequence[int], widths: Sequence[int]) -> None:
        """Checks the feature maps on a small picture, and freezes what they do not depend on.

        A parameter without a gradient would stop training on several processes: DistributedDataParallel waits for it.
        """
        side = max(64, 2 * levels[-1])
        modes = {module: module.training for module in self.body.modules()}
        try:
            maps = self._feature_maps_of_zeros(side)
        except (AssertionError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"backbone={name!r} cannot take pictures of any size, which a detector needs (on {side}x{side}: "
                f"{reason}); take a fully convolutional one, resnet50 say"
            ) from None
        finally:
            for module, mode in modes.items():
                module.training = mode
        shapes = [tuple(m.shape[1:]) for m in maps]
        expected = [(width, side // level, side // level) for width, level in zip(widths, levels, strict=True)]
        if shapes != expected:
            raise InputError(
                f"backbone={name!r} gives feature maps of shapes {shapes} on a {side}x{side} picture, and not "
                f"{expected} as strides {list(levels)} mean; take another, resnet50 say"
            )
        parameters = [parameter for parameter in self.body.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(sum(m.sum() for m in maps), parameters, allow_unused=True)  # type: ignore[arg-type]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                parameter.requires_grad_(False)

    def _feature_maps_of_zeros(self, side: int) -> list[Tensor]:
        self.body.eval()
        parameter = next(self.body.parameters())
        return self._feature_maps(torch.zeros(1, 3, side, side, device=parameter.device, dtype=parameter.dtype))


class FrozenNorm(FrozenBatchNorm2d):  # type: ignore[misc]
    """BatchNorm as a constant: torchvision's FrozenBatchNorm2d, with what timm's norms hold besides.

    That is dropout and activation of ``BatchNormAct2d``. The output has the type of the input: torchvision's would
    turn a network under autocast to float32.

    Args:
        norm: The BatchNorm whose weight, bias and statistics it takes.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm.num_features, eps=norm.eps)
        for key in self.state_dict():
            value = getattr(norm, key)
            if value is not None:
                setattr(self, key, value.detach())
        self.drop, self.act = getattr(norm, "drop", None), getattr(norm, "act", None)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises ``x`` (N, C, H, W)."""
        y: Tensor = super().forward(x).to(x.dtype)
        for then in (self.drop, self.act):
            y = y if then is None else then(y)
        return y


class _Float32Anchors(AnchorGenerator):  # type: ignore[misc]
    """torchvision's anchors, in float32 also under autocast: bfloat16 knows only every fourth pixel beyond 512."""

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        super().set_cell_anchors(torch.float32, device)


def _give_float32(module: nn.Module, inputs: Any, output: Any) -> Any:
    # boxes are decoded in the type of what the heads predict
    if isinstance(output, Tensor):
        return output.float()
    if isinstance(output, Mapping):
        return {key: _give_float32(module, inputs, value) for key, value in output.items()}
    return type(output)(_give_float32(module, inputs, value) for value in output)


def _never_predict_background(head: nn.Module, inputs: Any, output: dict[str, Tensor]) -> dict[str, Tensor]:
    # these two have a column for label 0, which no target has: trained a little, they may still give it the best score
    if head.training:
        return output
    logits = output["cls_logits"]
    return output | {"cls_logits": logits.index_fill(-1, logits.new_zeros(1, dtype=torch.long), float("-inf"))}


def _group_norm(norm: nn.BatchNorm2d, one_group: bool) -> nn.GroupNorm:
    channels = norm.num_features
    most = 1 if one_group else max(1, min(32, channels // 2))
    groups = max(divisor for divisor in range(1, most + 1) if channels % divisor == 0)
    replacement = nn.GroupNorm(groups, channels, eps=norm.eps, affine=norm.affine)
    if isinstance(norm, BatchNormAct2d):
        replacement = GroupNormAct(channels, groups, eps=norm.eps, affine=norm.affine)
        replacement.drop, replacement.act = norm.drop, norm.act
    if norm.affine:
        # zeros, where a residual branch or an AW head starts silent
        replacement.weight, replacement.bias = norm.weight, norm.bias
    return replacement


def _load(detector: Any, backbone: str, attention: str | None, initial_weights: str | None) -> WeightsReport:
    if initial_weights is None:
        return WeightsReport("initial weights: random", complete=False)
    if initial_weights == "pretrained":
        return WeightsReport(f"initial weights: timm's of {backbone}, for the backbone", complete=False)
    body, pruned = detector.backbone.body, detector.backbone.pruned
    if initial_weights == "torchvision":
        state, weights = fetch_torchvision_state(backbone)
        source = f"torchvision ({weights})"
    else:
        state, source = read_state(initial_weights), initial_weights
        if holds_detector(state):
            return load_state(detector, state, source=source)
    loaded = load_state(body, state, source=source, surplus=pruned, fresh=_added(body, attention))
    return replace(loaded, complete=False)


def _added(body: nn.Module, attention: str | None) -> set[str]:
    """Names the tensors of the attention that `create_backbone` added; a network's own is in its weights."""
    return {key for key in body.state_dict() if attention and re.search(r"\.(se|bam)\.", key)}


def _aw_heads(body: nn.Module) -> set[str]:
    """Names the parameters that AW-convolution adds to a plain network."""
    layers = ((name, module) for name, module in body.named_modules() if isinstance(module, AWConv2d))
    return {f"{name}.attention.{key}" for name, layer in layers for key, _ in layer.attention.named_parameters()}


def _top(head: str, channels: int) -> ExtraFPNBlock:
    # on P5, as in torchvision's detectors and in FCOS; the RetinaNet of the paper takes C5
    return LastLevelMaxPool() if head == "faster_rcnn" else LastLevelP6P7(channels, channels)


def _checked_levels(levels: Sequence[int]) -> list[int]:
    are_strides = isinstance(levels, Sequence) and len(levels) > 0 and all(type(v) is int and v > 0 for v in levels)
    doubling = are_strides and all(b == 2 * a for a, b in pairwise(levels))
    require(doubling, "levels", levels, "strides in pixels, each twice the one before, such as [4, 8, 16, 32]")
    return list(levels)


def _anchors(
    head: str,
    strides: Sequence[int],
    sizes: Sequence[float | Sequence[float]] | None,
    ratios: Sequence[float] | None,
) -> AnchorGenerator:
    if head == "fcos":
        for argument, value in (("anchor_sizes", sizes), ("aspect_ratios", ratios)):
            require(
                value is None, argument, value, "null with head='fcos', which has one point and no anchors a position"
            )
        return _Float32Anchors(tuple((stride,) for stride in strides), ((1.0,),) * len(strides))

    if sizes is None:
        sizes = [[int(stride * scale) for scale in _HEADS[head].anchor_scales] for stride in strides]
    there = (
        f"a side in pixels, or a list of them, for each of the {len(strides)} levels of strides "
        f"{', '.join(map(str, strides))} (the last {_HEADS[head].extra_levels} are what {head} adds on top)"
    )
    require(_is_list(sizes) and len(sizes) == len(strides), "anchor_sizes", sizes, there)
    per_level = [tuple(size) if isinstance(size, Sequence) else (size,) for size in sizes]
    positive = all(level and all(is_number(side) and side > 0 for side in level) for level in per_level)
    require(positive and len(set(map(len, per_level))) == 1, "anchor_sizes", sizes, f"{there}, as many at each level")
    ratios = (0.5, 1.0, 2.0) if ratios is None else ratios
    are_ratios = _is_list(ratios) and len(ratios) > 0 and all(is_number(ratio) and ratio > 0 for ratio in ratios)
    require(are_ratios, "aspect_ratios", ratios, "a list of heights over widths, such as [0.5, 1.0, 2.0]")
    return _Float32Anchors(tuple(per_level), (tuple(ratios),) * len(strides))


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _normalisation(
    mean: Sequence[float] | None, std: Sequence[float] | None, pretrained: Any, backbone: str
) -> tuple[list[float], list[float]]:
    for argument, values in (("mean", mean), ("std", std)):
        if values is not None:
            are_three = _is_list(values) and len(values) == 3 and all(map(is_number, values))
            positive = are_three and (argument == "mean" or min(values) > 0)
            expected = "three numbers, for red, green and blue"
            require(positive, argument, values, f"{expected} above 0" if argument == "std" else expected)
    config = getattr(pretrained, "pretrained_cfg", {})
    theirs = [list(config.get(key, ours)) for key, ours in (("mean", _IMAGENET_MEAN), ("std", _IMAGENET_STD))]
    if (mean is None or std is None) and theirs != [list(_IMAGENET_MEAN), list(_IMAGENET_STD)]:
        raise InputError(
            f"initial_weights='pretrained': timm's weights of {backbone!r} were trained on pictures normalised with "
            f"mean={theirs[0]}, std={theirs[1]}, which is not ImageNet's own, the default; give both"
        )
    return list(_IMAGENET_MEAN if mean is None else mean), list(_IMAGENET_STD if std is None else std)


def _checked_options(detector: type[nn.Module], options: Mapping[str, Any] | None) -> dict[str, Any]:
    require(options is None or isinstance(options, Mapping), "options", options, "a mapping, or null")
    known = {
        name: parameter.default
        for name, parameter in inspect.signature(detector).parameters.items()
        if name not in _NOT_OPTIONS
    }
    for key, value in (options or {}).items():
        if key not in known:
            raise InputError(
                f"options has no {key!r} for {detector.__name__}; {nearest(str(key), known, choices=True)}"
            )
        if type(known[key]) is int:
            require_int(f"options.{key}", value, "a whole number of at least 1", low=1)
        elif type(known[key]) is float:
            # thresholds and shares, but for FCOS's radius in strides
            high = math.inf if key == "center_sampling_radius" else 1
            require_number(f"options.{key}", value, f"a number from 0 to {high}", low=0, high=high)
    return dict(options or {})
