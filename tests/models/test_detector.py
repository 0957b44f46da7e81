"""create_detector: torchvision's own detectors as the oracle, and everything a user can get wrong."""

import copy
import itertools
import re
from collections import OrderedDict
from functools import partial

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d, GroupNormAct, SyncBatchNormAct
from torch import nn
from torch.utils._pytree import tree_flatten
from torchvision.models import _api, detection, resnet18
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor, resnet_fpn_backbone
from torchvision.models.resnet import resnet50

from awconv.errors import InputError
from awconv.layers import AWConv2d
from awconv.models import create_backbone, create_detector, describe_mismatch, load_initial_weights
from awconv.models import detector as detector_module
from awconv.models.detector import FrozenNorm

HEADS = ["faster_rcnn", "retinanet", "fcos"]
THEIRS = {
    "faster_rcnn": (detection.fasterrcnn_resnet50_fpn, detection.FasterRCNN),
    "retinanet": (detection.retinanet_resnet50_fpn, detection.RetinaNet),
    "fcos": (detection.fcos_resnet50_fpn, detection.FCOS),
}
# so that networks that have learned nothing detect something
ANYTHING = {"faster_rcnn": {"box_score_thresh": 0.0}, "retinanet": {"score_thresh": 0.0}, "fcos": {"score_thresh": 0.0}}
SIZES = {"image_size": 64, "max_size": 96}

small = partial(create_detector, num_classes=3, fpn_channels=32, **SIZES)


def lived_in(network, seed=0):
    """Gives every tensor a value of its own, as after training."""
    generator = torch.Generator().manual_seed(seed)
    for key, value in network.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
        elif key.endswith("num_batches_tracked"):
            value.fill_(7)
        elif value.dim() == 1:
            # timm starts each residual branch at zero, where any two networks would agree
            value.copy_((value if key.endswith("bias") else 1) + 0.1 * torch.randn(value.shape, generator=generator))
    return network


def pictures(seed=0, sizes=((64, 80), (72, 64))):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(3, *size, generator=generator) for size in sizes]


def targets(empty=False):
    boxes = torch.tensor([[5.0, 5, 40, 50], [20, 10, 60, 30]])[: 0 if empty else 2]
    return [{"boxes": boxes, "labels": torch.tensor([1, 3])[: len(boxes)]} for _ in range(2)]


def detect(detector, images=None):
    with torch.no_grad():
        return detector.eval()(pictures() if images is None else images)


def assert_same_detections(ours, theirs, **tolerance):
    for mine, other in zip(ours, theirs, strict=True):
        assert len(other["boxes"]) > 0
        assert mine.keys() == other.keys()
        for key in other:
            torch.testing.assert_close(mine[key], other[key], **tolerance)


def shapes(state):
    return {key: value.shape for key, value in state.items()}


def aw_layers(network):
    return [module for module in network.modules() if isinstance(module, AWConv2d)]


# ---- torchvision's detectors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_plain_resnet50_is_torchvisions_detector(head):
    torch.manual_seed(0)
    theirs = THEIRS[head][0](weights=None, weights_backbone=None, min_size=64, max_size=96, **ANYTHING[head])
    lived_in(theirs)
    if head != "faster_rcnn":
        # theirs may predict label 0, ours never; a trained one does neither
        nn.init.constant_(theirs.head.classification_head.cls_logits.bias[::91], -100.0)
    ours = create_detector(head, "resnet50", num_classes=90, options=ANYTHING[head], **SIZES)
    assert shapes(ours.state_dict()) == shapes(theirs.state_dict())
    assert {k: p.shape for k, p in ours.named_parameters()} == {k: p.shape for k, p in theirs.named_parameters()}
    ours.load_state_dict(theirs.state_dict())
    for mine, other in zip(detect(ours), detect(theirs), strict=True):
        assert len(other["boxes"]) > 10
        assert all(torch.equal(mine[key], other[key]) for key in other)
    losses = []
    for network in (ours.train(), theirs.train()):
        torch.manual_seed(1)  # which draws the proposals that are trained on
        losses.append(network(pictures(), targets()))
    assert losses[0].keys() == losses[1].keys()
    assert all(torch.equal(losses[0][key], losses[1][key]) for key in losses[1])


@pytest.mark.parametrize("head", HEADS)
def test_frozen_norm_is_torchvisions(head):
    """Their detector over BatchNorm as a constant, in training mode, where it shows."""
    torch.manual_seed(0)
    top = None if head == "faster_rcnn" else detection.retinanet.LastLevelP6P7(256, 256)
    returned = None if head == "faster_rcnn" else [2, 3, 4]
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, trainable_layers=5, returned_layers=returned, extra_blocks=top
    )
    theirs = THEIRS[head][1](backbone, 4, min_size=64, max_size=96)
    lived_in(theirs)
    ours = create_detector(head, "resnet18", num_classes=3, norm="frozen", loaded_later=True, **SIZES)
    assert shapes(ours.state_dict()) == shapes(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    losses = []
    for network in (ours.train(), theirs.train()):
        torch.manual_seed(1)
        losses.append(network(pictures(), targets()))
    for key in losses[1]:
        torch.testing.assert_close(losses[0][key], losses[1][key])


@pytest.mark.parametrize("head", HEADS)
def test_default_anchors_are_torchvisions(head):
    ours, theirs = (
        getattr(network, "rpn", network).anchor_generator
        for network in (small(head, "resnet18"), THEIRS[head][0](weights=None, weights_backbone=None))
    )
    assert all(torch.equal(a, b) for a, b in zip(ours.cell_anchors, theirs.cell_anchors, strict=True))


@pytest.mark.parametrize("head", HEADS)
def test_published_parameter_counts(head):
    weights = {
        "faster_rcnn": detection.FasterRCNN_ResNet50_FPN_Weights,
        "retinanet": detection.RetinaNet_ResNet50_FPN_Weights,
        "fcos": detection.FCOS_ResNet50_FPN_Weights,
    }[head].COCO_V1
    with torch.device("meta"):
        detector = create_detector(head, "resnet50", num_classes=90, norm="frozen", loaded_later=True)
    # frozen scales are no parameters
    assert sum(p.numel() for p in detector.parameters()) == weights.meta["num_params"]


# ---- backbones ------------------------------------------------------------------------------------------------------

LEVELS = {"resnet20": [1, 2, 4], "hrnet_w18_small": [4, 8, 16]}


@pytest.mark.parametrize(
    ("head", "backbone", "kwargs"),
    [
        ("faster_rcnn", "resnet18", {"aw": True, "attention": "se"}),
        ("retinanet", "resnet18", {"aw": {"share": 4}, "attention": "eca", "norm": "sync"}),
        ("fcos", "resnet18", {"aw": True, "attention": "cbam", "norm": "group"}),
        ("faster_rcnn", "resnet18", {"attention": "ge", "levels": [8, 16]}),
        ("fcos", "resnet18", {"aw": True, "attention": "bam", "norm": "group"}),
        ("faster_rcnn", "resnet20", {"aw": True}),
        ("retinanet", "mobilenetv2_100", {"aw": True, "attention": "bam", "norm": "group"}),
        ("faster_rcnn", "regnety_004", {"aw": True, "norm": "group"}),
        ("fcos", "convnext_atto", {"aw": {"include": "stages.3.*"}}),
        ("faster_rcnn", "efficientnet_b0", {"levels": [8, 16]}),
        ("retinanet", "densenet121", {}),
        # whose last level leaves a part of its stage without a use
        ("fcos", "hrnet_w18_small", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)),
)
def test_any_backbone_learns_with_every_parameter(head, backbone, kwargs):
    torch.manual_seed(0)
    detector = small(head, backbone, **{"levels": LEVELS.get(backbone, [8, 16, 32])} | kwargs).train()
    sum(detector(pictures(), targets()).values()).backward()
    for key, parameter in detector.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
    assert bool(aw_layers(detector)) == bool(kwargs.get("aw"))
    found = detect(detector)
    assert all(box["boxes"].isfinite().all() for box in found)


@pytest.mark.parametrize("backbone", ["resnet18", "resnet20", "mobilenetv2_100", "regnety_004", "convnext_atto"])
def test_levels_are_maps_of_those_strides(backbone):
    levels = LEVELS.get(backbone, [4, 8, 16, 32])
    pyramid = small("faster_rcnn", backbone, levels=levels).backbone.eval()
    with torch.no_grad():
        maps = pyramid(torch.rand(1, 3, 64, 96))
    expected = {str(i): (1, 32, 64 // stride, 96 // stride) for i, stride in enumerate(levels)}
    assert {key: tuple(m.shape) for key, m in maps.items() if key != "pool"} == expected
    assert maps["pool"].shape[-1] == (96 // levels[-1] + 1) // 2


def test_unused_stages_and_classifier_are_gone():
    detector = small("faster_rcnn", "resnet18", levels=[4, 8, 16])
    names = [key.split(".")[0] for key in detector.backbone.body.state_dict()]
    assert list(OrderedDict.fromkeys(names)) == ["conv1", "bn1", "layer1", "layer2", "layer3"]
    assert {name.split(".")[0] for name in detector.backbone.pruned} == {"layer4", "fc"}


def test_building_leaves_statistics_and_mode_alone():
    detector = small("fcos", "resnet18")
    fresh = create_backbone("resnet18")
    for key, value in detector.backbone.body.named_buffers():
        assert torch.equal(value, fresh.get_buffer(key))
    assert all(module.training for module in detector.modules())
    assert all(parameter.grad is None for parameter in detector.parameters())


@pytest.mark.parametrize("indices", [None, 1, [0, 2], [1], [0]])
def test_cifar_resnet_tells_its_feature_maps(indices):
    network = lived_in(create_backbone("resnet20")).eval()
    x = torch.randn(2, 3, 32, 32)
    expected = [network.act1(network.bn1(network.conv1(x)))]
    for stage in (network.layer1, network.layer2, network.layer3):
        expected.append(stage(expected[-1]))
    taken = {None: [0, 1, 2], 1: [2]}.get(indices if not isinstance(indices, list) else 0, indices)
    last, maps = network.forward_intermediates(x, indices=indices)
    assert torch.equal(last, network.forward_features(x))
    assert all(torch.equal(m, expected[i + 1]) for m, i in zip(maps, taken, strict=True))

    whole = set(network.state_dict())
    assert network.prune_intermediate_layers(indices if indices is not None else 3) == taken
    kept = {f"layer{i + 1}" for i in range(max(taken) + 1)} | {"conv1", "bn1"}
    assert set(network.state_dict()) == {key for key in whole if key.split(".")[0] in kept}
    maps = network.forward_intermediates(x, indices=taken, stop_early=True, intermediates_only=True)
    assert all(torch.equal(m, expected[i + 1]) for m, i in zip(maps, taken, strict=True))
    assert [m.shape[1] for m in maps] == [network.feature_info[i]["num_chs"] for i in taken]


# ---- norms and stages -----------------------------------------------------------------------------------------------


def kinds(network):
    """The classes of norms in the plain network, and in what AW and attention added."""
    gained = {
        id(inner)
        for module in network.modules()
        if isinstance(module, AWConv2d) or type(module).__name__ in ("BAM", "CbamModule")
        for inner in module.modules()
    }
    norms = [m for m in network.modules() if "norm" in type(m).__name__.lower()]
    return ({type(m) for m in norms if id(m) not in gained}, {type(m) for m in norms if id(m) in gained})


@pytest.mark.parametrize(
    ("backbone", "norm", "plain", "gained"),
    [
        ("resnet18", "batch", nn.BatchNorm2d, nn.BatchNorm2d),
        ("resnet18", "frozen", FrozenNorm, nn.BatchNorm2d),
        ("resnet18", "sync", nn.SyncBatchNorm, nn.SyncBatchNorm),
        ("resnet18", "group", nn.GroupNorm, nn.GroupNorm),
        ("mobilenetv2_100", "frozen", FrozenNorm, nn.BatchNorm2d),
        ("mobilenetv2_100", "sync", SyncBatchNormAct, nn.SyncBatchNorm),
        ("mobilenetv2_100", "group", GroupNormAct, nn.GroupNorm),
    ],
)
def test_kinds_of_norms(backbone, norm, plain, gained):
    body = small("fcos", backbone, aw=True, attention="bam", norm=norm, loaded_later=True).backbone.body
    assert kinds(body) == ({plain}, {gained})


def test_group_norm_has_32_groups_or_fewer_of_two_channels_and_one_in_heads():
    body = small("fcos", "resnet18", aw=True, attention="bam", norm="group").backbone.body
    assert body.layer4[0].bn1.num_groups == body.layer1[0].bn1.num_groups == 32
    assert body.layer1[0].conv1.attention.norm1.num_groups == body.layer1.bam.channel.norm.num_groups == 1
    widths = small("fcos", "mobilenetv2_100", norm="group").backbone.body
    assert (widths.bn1.num_groups, widths.blocks[2][0].bn1.num_groups) == (16, 24)  # of 32 and of 144 channels


@pytest.mark.parametrize("backbone", ["mobilenetv2_100", "efficientnet_b0"])
@pytest.mark.parametrize("norm", ["frozen", "sync", "group"])
def test_norms_keep_their_activation(backbone, norm):
    torch.manual_seed(0)
    plain = small("fcos", backbone).backbone.body
    body = small("fcos", backbone, norm=norm, loaded_later=True).backbone.body
    for name, module in plain.named_modules():
        if isinstance(module, BatchNormAct2d):
            assert type(body.get_submodule(name).act) is type(module.act), name
            assert type(body.get_submodule(name).drop) is type(module.drop), name


def test_a_frozen_norm_drops_what_its_norm_dropped():
    norm = BatchNormAct2d(4, drop_layer=lambda: nn.Dropout(1.0)).eval()
    frozen = FrozenNorm(norm)
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(frozen.eval()(x), norm(x))
    assert not frozen.train()(x).any()


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenetv2_100"])
@pytest.mark.parametrize("norm", ["frozen", "sync"])
def test_frozen_and_sync_compute_what_batch_norm_computes_in_evaluation(backbone, norm):
    torch.manual_seed(0)
    source = lived_in(small("fcos", backbone, aw=True, options=ANYTHING["fcos"]))
    other = small("fcos", backbone, aw=True, norm=norm, loaded_later=True, options=ANYTHING["fcos"])
    assert describe_mismatch(other, source.state_dict()) == ""
    other.load_state_dict(source.state_dict())
    assert_same_detections(detect(other), detect(source), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", ["batch", "group", "sync"])
def test_silent_start_survives_the_norm(norm):
    """The attention is exactly 1/2 at first, and its last norm learns."""
    detector = small("fcos", "resnet18", aw=True, norm=norm)
    for block in detector.backbone.body.layer1:
        nn.init.ones_(block.bn2.weight)  # which timm starts at zero, with the whole branch
    layer = aw_layers(detector)[0]
    assert (layer.attention_maps(torch.randn(2, layer.in_channels, 8, 8)) == 0.5).all()
    sum(detector(pictures(), targets()).values()).backward()
    assert layer.attention.norm2.weight.grad.abs().sum() > 0


def test_frozen_norm_keeps_the_type_of_its_input_under_autocast():
    body = small("fcos", "resnet18", norm="frozen", loaded_later=True).backbone.body
    with torch.autocast("cpu", torch.bfloat16):
        seen = body.bn1(body.conv1(torch.rand(1, 3, 32, 32)))
    assert seen.dtype == torch.bfloat16


@pytest.mark.parametrize("head", ["faster_rcnn", "fcos"])
@pytest.mark.parametrize("trainable", [0, 1, 3, 4, 5])
def test_trainable_stages_are_torchvisions(head, trainable):
    returned = None if head == "faster_rcnn" else [2, 3, 4]
    with torch.device("meta"):
        theirs = _resnet_fpn_extractor(resnet50(weights=None), trainable, returned_layers=returned)
        kwargs = {"trainable_stages": trainable, "loaded_later": True}
        ours = create_detector(head, "resnet50", **kwargs).backbone
    mine = {name for name, p in ours.body.named_parameters() if p.requires_grad}
    assert mine == {name for name, p in theirs.body.named_parameters() if p.requires_grad}
    assert all(p.requires_grad for p in ours.fpn.parameters())


@pytest.mark.parametrize(
    ("backbone", "count"),
    [("resnet20", 4), ("mobilenetv2_100", 6), ("regnety_004", 5), ("convnext_atto", 5)],
)
def test_stages_of_other_networks(backbone, count):
    pyramid = small("faster_rcnn", backbone, levels=LEVELS.get(backbone, [4, 8, 16, 32])).backbone
    sets = [pyramid.stages_before(n) for n in range(count + 1)]
    everything = {name for name, _ in pyramid.body.named_parameters()}
    assert sets[0] == everything
    assert sets[-1] == set() == pyramid.stages_before(None)
    assert all(after < before for before, after in itertools.pairwise(sets))
    # the stem alone is the first stage
    assert not any(".0." in name.split("conv", 1)[0] for name in sets[-2] if not name.startswith("stem"))
    with pytest.raises(InputError, match=f"0 to {count}, or null"):
        pyramid.stages_before(count + 1)


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenetv2_100"])
@pytest.mark.parametrize("norm", ["batch", "frozen", "sync"])
def test_stages_that_do_not_train_are_constant(backbone, norm):
    torch.manual_seed(0)
    options = {"norm": norm, "trainable_stages": 2, "loaded_later": True}
    detector = lived_in(small("fcos", backbone, aw=True, attention="bam", **options)).train()
    frozen = {name for name in detector.backbone.stages_before(2) if not re.search(r"\.(bam|attention)\.", name)}
    before = copy.deepcopy(detector.backbone.body.state_dict())
    optimizer = torch.optim.SGD(detector.parameters(), lr=0.1, weight_decay=0.1)
    sum(detector(pictures(), targets()).values()).backward()
    optimizer.step()
    after = detector.backbone.body.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    places = {name.rsplit(".", 1)[0] for name in frozen}
    assert not {key for key in changed if key.rsplit(".", 1)[0] in places}
    trained = {name for name, p in detector.backbone.body.named_parameters() if p.requires_grad}
    assert trained
    assert trained.isdisjoint(frozen)
    assert {name for name in trained if before[name].dim() == 4} <= changed


# ---- empty batches, mixed precision ---------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("empty", [False, True], ids=["boxes", "empty"])
@pytest.mark.parametrize("head", HEADS)
def test_a_step_with_and_without_boxes_and_in_mixed_precision(head, empty, autocast):
    torch.manual_seed(0)
    detector = small(head, "resnet18", aw=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = detector(pictures(), targets(empty))
    for name, loss in losses.items():
        assert loss.isfinite(), name
        assert loss.dtype == torch.float32, name
    sum(losses.values()).backward()
    for key, parameter in detector.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    predicted = []
    for module in (getattr(detector, "rpn", detector).head, *filter(None, [getattr(detector, "roi_heads", None)])):
        module = getattr(module, "box_predictor", module)
        module.register_forward_hook(lambda module, inputs, output: predicted.append(output))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = detect(detector)
    # boxes are decoded from what the heads predict, in its type
    assert {tensor.dtype for tensor in tree_flatten(predicted)[0]} == {torch.float32}
    assert {value.dtype for one in found for key, value in one.items() if key != "labels"} == {torch.float32}


@pytest.mark.parametrize("head", HEADS)
def test_anchors_are_exact_in_mixed_precision(head):
    """bfloat16 knows every integer up to 256 only: torchvision's anchors would be off by pixels in large pictures."""
    seen = []
    detector = small(head, "resnet18").eval()
    generator = getattr(detector, "rpn", detector).anchor_generator
    generator.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    picture = [torch.rand(3, 64, 600)]
    detector.transform.max_size = 600
    for enabled in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            detector(picture)
    assert seen[0].max() > 512
    assert torch.equal(*seen)


@pytest.mark.parametrize("head", HEADS)
def test_degenerate_boxes_are_still_refused(head):
    wrong = targets()
    wrong[1]["boxes"] = torch.tensor([[5.0, 5, 5, 50], [20, 10, 60, 30]])
    with pytest.raises(AssertionError, match=r"positive height and width.*target at index 1"):
        small(head, "resnet18")(pictures(), wrong)


# ---- initial weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(3, 3000), (3000, 3), (1, 1)])
def test_pictures_that_would_shrink_to_nothing(size):
    torch.manual_seed(0)
    detector = create_detector("fcos", "resnet18", num_classes=3, options={"score_thresh": 0.0}, **SIZES)
    for found in detect(detector, [torch.rand(3, *size), torch.rand(3, 64, 64)])[:1]:
        assert len(found["boxes"]) > 0
        height, width = size
        assert (found["boxes"] <= torch.tensor([width, height, width, height]) + 1e-3).all()
        assert (found["boxes"] >= 0).all()
    boxes = torch.tensor([[0.0, 0, size[1], size[0]]])
    image, target = detector.train().transform.resize(torch.rand(3, *size), {"boxes": boxes})
    height, width = image.shape[-2:]
    assert min(height, width) >= 1
    torch.testing.assert_close(target["boxes"], torch.tensor([[0.0, 0, width, height]]))


@pytest.fixture
def classifier(tmp_path):
    """A trained classifier, and its checkpoint as ClassificationTask writes it."""
    torch.manual_seed(3)
    network = lived_in(create_backbone("resnet18", num_classes=7)).eval()
    state = {f"network.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"backbone": "resnet18"}}, tmp_path / "classifier.ckpt")
    return network, tmp_path / "classifier.ckpt"


@pytest.fixture
def plain_detector(tmp_path):
    """A trained plain detector, and its checkpoint as DetectionTask writes it."""
    torch.manual_seed(4)
    network = lived_in(small("faster_rcnn", "resnet18", options=ANYTHING["faster_rcnn"])).eval()
    state = {f"network.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "detector.ckpt")
    return network, tmp_path / "detector.ckpt"


@pytest.mark.parametrize("levels", [[4, 8, 16, 32], [8, 16]])
@pytest.mark.parametrize("aw", [None, True], ids=["plain", "aw"])
@pytest.mark.parametrize("norm", ["batch", "frozen", "sync"])
def test_a_classifiers_checkpoint_fills_the_body(classifier, norm, aw, levels):
    network, path = classifier
    detector = small("faster_rcnn", "resnet18", aw=aw, norm=norm, levels=levels, initial_weights=str(path))
    x = torch.randn(2, 3, 64, 64)
    strides = [4, 8, 16, 32]
    expected = network.forward_intermediates(x, indices=[1 + strides.index(v) for v in levels], intermediates_only=True)
    maps = detector.backbone.eval()._feature_maps(x)
    for ours, theirs in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert "classifier.ckpt" in detector.weights_report.text
    assert "\n" not in detector.weights_report.text
    assert ("AW layers start function-preserving" in detector.weights_report.text) == bool(aw)


def test_an_aw_classifiers_checkpoint_is_exact(tmp_path):
    source = lived_in(create_backbone("resnet18", attention="bam", aw=True, num_classes=7))
    torch.save({"state_dict": {f"network.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "aw.ckpt")
    kwargs = {"attention": "bam", "aw": True, "initial_weights": str(tmp_path / "aw.ckpt")}
    for more in ({}, {"norm": "frozen"}, {"trainable_stages": 2}):
        detector = small("fcos", "resnet18", **kwargs | more)
        for key, value in detector.backbone.body.state_dict().items():
            assert torch.equal(value, source.state_dict()[key]), key
        assert "function-preserving" not in detector.weights_report.text


@pytest.mark.parametrize("kwargs", [{}, {"norm": "frozen"}, {"trainable_stages": 1}, {"norm": "frozen", "aw": None}])
def test_a_detectors_checkpoint_fills_everything(plain_detector, kwargs):
    """An AW detector computes what the plain one computed."""
    network, path = plain_detector
    options = {"aw": True, "options": ANYTHING["faster_rcnn"], "initial_weights": str(path)} | kwargs
    detector = small("faster_rcnn", "resnet18", **options)
    assert_same_detections(detect(detector), detect(network), rtol=1e-3, atol=1e-3)
    assert len(aw_layers(detector)) == (16 if options["aw"] else 0)


@pytest.mark.parametrize("head", HEADS)
def test_a_detector_of_other_classes_keeps_only_its_predictor(tmp_path, head):
    source = lived_in(small(head, "resnet18", num_classes=5))
    torch.save(source.state_dict(), tmp_path / "five.pth")
    torch.manual_seed(9)
    initial = small(head, "resnet18").state_dict()
    torch.manual_seed(9)
    detector = small(head, "resnet18", initial_weights=str(tmp_path / "five.pth"))
    kept = [key for key, value in detector.state_dict().items() if not torch.equal(value, initial[key])]
    predictor = {"faster_rcnn": "roi_heads.box_predictor."}.get(head, "head.classification_head.cls_logits.")
    for key, value in detector.state_dict().items():
        expected = initial if key.startswith(predictor) else source.state_dict()
        assert torch.equal(value, expected[key]), key
    assert kept
    assert predictor in detector.weights_report.text
    assert "another number of classes" in detector.weights_report.text


OLD = {
    "faster_rcnn": lambda key: key.replace("rpn.head.conv.0.0.", "rpn.head.conv."),
    "retinanet": lambda key: (
        key.replace(f"conv.{key.split('.conv.')[1][0]}.0.", f"conv.{2 * int(key.split('.conv.')[1][0])}.")
        if "_head.conv." in key
        else key
    ),
    "fcos": lambda key: key,
}


@pytest.mark.parametrize("head", HEADS)
def test_torchvisions_detector_files_old_and_new(tmp_path, head):
    """Their COCO files are of before a change of names, which their own loading undoes."""
    theirs = lived_in(THEIRS[head][0](weights=None, weights_backbone=None, num_classes=4))
    state = theirs.state_dict()
    torch.save(state, tmp_path / "new.pth")
    old = {}
    for key, value in state.items():
        if not key.endswith("num_batches_tracked"):
            key = key.replace(".0.weight", ".weight") if "fpn.inner" in key or "fpn.layer_b" in key else key
            key = key.replace(".0.bias", ".bias") if "fpn.inner" in key or "fpn.layer_b" in key else key
            old[OLD[head](key)] = value
    assert len(old) == len({key for key in state if not key.endswith("num_batches_tracked")})
    theirs.load_state_dict(OrderedDict(old))  # they are what torchvision takes for its own
    torch.save(old, tmp_path / "old.pth")
    for file in ("new.pth", "old.pth"):
        detector = create_detector(head, "resnet50", num_classes=3, initial_weights=str(tmp_path / file))
        for key, value in detector.state_dict().items():
            assert torch.equal(value, state[key]) or key.endswith("num_batches_tracked"), (file, key)


@pytest.fixture
def torchvisions_resnet18(monkeypatch):
    """torchvision's own network, whose weights the download gives."""
    torch.manual_seed(5)
    network = lived_in(resnet18()).eval()
    asked = []

    def load(url, *args, **kwargs):
        asked.append((url, kwargs))
        return network.state_dict()

    monkeypatch.setattr(_api, "load_state_dict_from_url", load)
    network.asked = asked
    return network


@pytest.mark.parametrize("attention", [None, "se", "bam"])
@pytest.mark.parametrize("backbone", ["resnet18", "resnet18.a1_in1k"])
def test_torchvisions_imagenet_weights(torchvisions_resnet18, backbone, attention):
    kwargs = {"attention": attention, "norm": "frozen", "aw": True, "initial_weights": "torchvision"}
    detector = small("fcos", backbone, **kwargs)
    ((url, options),) = torchvisions_resnet18.asked
    assert url.endswith("resnet18-f37072fd.pth")  # IMAGENET1K_V1
    assert options["weights_only"]
    assert "torchvision (ResNet18_Weights.IMAGENET1K_V1)" in detector.weights_report.text
    body = detector.backbone.body
    torch.testing.assert_close(body.layer2[0].conv1.weight * 1.5, torchvisions_resnet18.layer2[0].conv1.weight)
    if attention is None:
        x = torch.randn(1, 3, 64, 64)
        theirs = nn.Sequential(OrderedDict(list(torchvisions_resnet18.named_children())[:-2]))
        (*_, deepest) = detector.backbone.eval()._feature_maps(x)
        torch.testing.assert_close(deepest, theirs(x), rtol=1e-4, atol=1e-4)
    else:
        assert "left at initialisation" in detector.weights_report.text


@pytest.mark.parametrize(("attention", "aw"), [("se", True), ("bam", True), ("bam", None), (None, True)])
def test_attention_that_imagenet_weights_lack_learns_in_every_stage(torchvisions_resnet18, attention, aw):
    kwargs = {"norm": "frozen", "trainable_stages": 3, "initial_weights": "torchvision"}
    body = small("fcos", "resnet18", attention=attention, aw=aw, **kwargs).backbone.body
    early = {name: p.requires_grad for name, p in body.named_parameters() if name < "layer2"}
    gained = re.compile(rf"\.({attention}|attention)\.")
    assert {name for name, learns in early.items() if learns} == set(filter(gained.search, early)) != set()
    assert not any(isinstance(m, FrozenNorm) for name, m in body.named_modules() if gained.search(f"{name}."))


@pytest.mark.parametrize("attention", ["se", "bam"])
def test_a_plain_classifiers_file_starts_a_detector_with_attention(classifier, attention):
    network, path = classifier
    detector = small("fcos", "resnet18", attention=attention, initial_weights=str(path))
    body = detector.backbone.body.state_dict()
    assert all(torch.equal(value, body[key]) for key, value in network.state_dict().items() if key in body)
    assert "of the activation attention" in detector.weights_report.text


@pytest.mark.parametrize("backbone", ["resnet20", "regnety_004", "seresnet50"])
def test_torchvision_has_no_such_network(backbone):
    with pytest.raises(InputError, match=f"'torchvision'.*no ImageNet weights.*'{backbone}'.*pretrained") as caught:
        small("fcos", backbone, levels=LEVELS.get(backbone), initial_weights="torchvision")
    assert "\n" not in str(caught.value)


def test_torchvisions_network_of_that_name_is_another(torchvisions_resnet18):
    with pytest.raises(InputError, match=r"initial_weights='torchvision \(ConvNeXt_Tiny.*does not fit the ConvNeXt"):
        small("fcos", "convnext_tiny", initial_weights="torchvision")


def test_torchvisions_weights_that_cannot_be_fetched(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no route\nto host")

    monkeypatch.setattr(_api, "load_state_dict_from_url", fail)
    with pytest.raises(InputError, match=r"could not be fetched.*OSError: no route to host.*give a file") as caught:
        small("fcos", "resnet18", initial_weights="torchvision")
    assert "\n" not in str(caught.value)


def stub_pretrained(monkeypatch, **config):
    def build(name, *, pretrained, **kwargs):
        network = create_backbone(name, **kwargs)
        network.pretrained_cfg = network.pretrained_cfg | config
        build.pretrained = pretrained
        return network

    monkeypatch.setattr(detector_module, "create_backbone", build)
    return build


def test_timms_weights_come_through_create_backbone(monkeypatch):
    build = stub_pretrained(monkeypatch)
    assert "timm's of resnet18" in small("fcos", "resnet18", initial_weights="pretrained").weights_report.text
    assert build.pretrained
    small("fcos", "resnet18")
    assert not build.pretrained


def test_timms_weights_with_another_normalisation_need_it_said(monkeypatch):
    stub_pretrained(monkeypatch, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    with pytest.raises(InputError, match=r"normalised with mean=\[0.5, 0.5, 0.5\], std=\[0.5, 0.5, 0.5\].*give both"):
        small("fcos", "resnet18", initial_weights="pretrained")
    half = [0.5, 0.5, 0.5]
    detector = small("fcos", "resnet18", initial_weights="pretrained", mean=half, std=half)
    assert detector.transform.image_mean == detector.transform.image_std == half


def one_line_error(call, *says):
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in says if part not in message] == []


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"head": "retinanet"}, ["detector.ckpt", "RetinaNet", "another head"]),
        ({"head": "retinanet", "levels": [4, 8, 16, 32]}, ["another head"]),
        ({"levels": [8, 16, 32]}, ["other levels or fpn_channels"]),
        ({"fpn_channels": 64}, ["other levels or fpn_channels"]),
        ({"roi_size": 5}, ["other anchors or RoIs", "fc6"]),
        ({"aspect_ratios": [1.0]}, ["other anchors or RoIs", "rpn.head"]),
        ({"backbone": "resnet34"}, ["another architecture"]),
        ({"norm": "group"}, ["network with BatchNorm", "batch, frozen or sync"]),
        ({"attention": "se"}, ["another activation attention"]),
    ],
)
def test_detector_files_that_do_not_fit(plain_detector, kwargs, says):
    options = {"head": "faster_rcnn", "backbone": "resnet18"} | kwargs
    one_line_error(lambda: small(**options, initial_weights=str(plain_detector[1])), *says)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"backbone": "resnet34"}, ["classifier.ckpt", "does not fit the ResNet", "another architecture"]),
        ({"backbone": "resnet20", "levels": [1, 2, 4]}, ["does not fit the CIFARResNet"]),
        ({"norm": "group"}, ["network with BatchNorm"]),
    ],
)
def test_classifier_files_that_do_not_fit(classifier, kwargs, says):
    options = {"backbone": "resnet18"} | kwargs
    one_line_error(lambda: small("fcos", **options, initial_weights=str(classifier[1])), *says)


def test_a_group_norm_detector_starts_from_its_own_kind(tmp_path):
    source = lived_in(small("fcos", "resnet18", norm="group", aw=True, options=ANYTHING["fcos"]))
    torch.save(source.state_dict(), tmp_path / "group.pth")
    kwargs = {"aw": True, "options": ANYTHING["fcos"], "initial_weights": str(tmp_path / "group.pth")}
    detector = small("fcos", "resnet18", norm="group", trainable_stages=1, **kwargs)
    assert_same_detections(detect(detector), detect(source))
    one_line_error(lambda: small("fcos", "resnet18", norm="frozen", **kwargs), "another norm")


def test_a_detectors_file_given_to_a_classifier(plain_detector):
    network, path = plain_detector
    other = create_backbone("resnet18")
    one_line_error(lambda: load_initial_weights(other, path), "detector.ckpt", "it is of a detector", "classifier")
    assert "it is of a detector" in describe_mismatch(other, network.state_dict())


def test_a_classifiers_checkpoint_loaded_as_a_detectors(classifier):
    network, _ = classifier
    detector = small("fcos", "resnet18")
    difference = describe_mismatch(detector, network.state_dict())
    assert "it is of a classifier" in difference
    assert "initial_weights" in difference
    assert describe_mismatch(detector, detector.state_dict()) == ""


@pytest.mark.parametrize("kwargs", [{"norm": "frozen"}, {"trainable_stages": 3}, {"norm": "frozen", "aw": True}])
def test_a_checkpoint_that_follows_allows_what_random_weights_forbid(kwargs):
    one_line_error(lambda: small("fcos", "resnet18", **kwargs), "random weights", "initial_weights")
    trained = lived_in(small("fcos", "resnet18", loaded_later=True, **kwargs))
    again = small("fcos", "resnet18", loaded_later=True, **kwargs)
    assert not again.weights_report.complete
    again.load_state_dict(trained.state_dict(), strict=True)
    assert shapes(again.state_dict()) == shapes(trained.state_dict())


# ---- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"head": "yolo"}, ["head='yolo'", "faster_rcnn, retinanet, fcos"]),
        ({"head": "faster-rcnn"}, ["did you mean 'faster_rcnn'"]),
        ({"backbone": "resnet51"}, ["backbone='resnet51'"]),
        ({"attention": "sse"}, ["attention='sse'"]),
        ({"aw": {"shares": 8}}, ["no option 'shares'", "'share'"]),
        ({"norm": "bn"}, ["norm='bn'", "frozen, batch, sync, group"]),
        ({"norm": "frozen"}, ["norm='frozen' over random weights", "pretrained, torchvision or a file"]),
        ({"norm": "group", "initial_weights": "pretrained"}, ["norm='group'", "frozen, batch or sync"]),
        ({"norm": "group", "initial_weights": "torchvision"}, ["norm='group'", "frozen, batch or sync"]),
        ({"norm": "group", "backbone": "convnext_atto"}, ["no BatchNorm", "leave norm at batch"]),
        ({"trainable_stages": 3}, ["trainable_stages=3 over random weights"]),
        ({"trainable_stages": 6}, ["trainable_stages=6", "0 to 5"]),
        ({"trainable_stages": -1}, ["trainable_stages=-1", "5 stages"]),
        ({"num_classes": 0}, ["num_classes=0", "without the background"]),
        ({"levels": [4, 16]}, ["levels=[4, 16]", "each twice the one before"]),
        ({"levels": []}, ["levels=[]"]),
        ({"levels": 8}, ["levels=8"]),
        ({"levels": [32, 64]}, ["no feature map of stride 64", "its strides are 2, 4, 8, 16, 32"]),
        ({"backbone": "resnet20"}, ["no feature map of stride 8 and 16 and 32", "1, 2, 4"]),
        ({"backbone": "inception_v4"}, ["inception_v4", "pictures of any size"]),
        ({"backbone": "efficientformer_l1"}, ["efficientformer_l1", "pictures of any size"]),
        ({"fpn_channels": 0}, ["fpn_channels=0"]),
        ({"head": "fcos", "fpn_channels": 48}, ["fpn_channels=48", "multiple of 32"]),
        ({"image_size": 0}, ["image_size=0"]),
        ({"max_size": 32}, ["max_size=32", "at least image_size=64"]),
        ({"anchor_sizes": [32, 64]}, ["anchor_sizes=[32, 64]", "5 levels", "4, 8, 16, 32, 64"]),
        ({"head": "retinanet", "anchor_sizes": [32] * 3}, ["5 levels", "the last 2 are what retinanet adds"]),
        ({"anchor_sizes": [[8, 9], 16, 32, 64, 128]}, ["as many at each level"]),
        ({"anchor_sizes": [8, 16, 32, 64, -1]}, ["anchor_sizes"]),
        ({"anchor_sizes": [8, 16, 32, 64, "big"]}, ["anchor_sizes"]),
        ({"anchor_sizes": [[], [], [], [], []]}, ["anchor_sizes"]),
        ({"anchor_sizes": 32}, ["anchor_sizes=32"]),
        ({"aspect_ratios": []}, ["aspect_ratios=[]"]),
        ({"aspect_ratios": [0.5, 0]}, ["aspect_ratios"]),
        ({"head": "fcos", "anchor_sizes": [8, 16, 32, 64, 128]}, ["anchor_sizes", "fcos", "no anchors"]),
        ({"head": "fcos", "aspect_ratios": [1.0]}, ["aspect_ratios", "fcos", "no anchors"]),
        ({"head": "fcos", "roi_size": 5}, ["roi_size=5", "fcos", "pools no regions"]),
        ({"roi_size": 0}, ["roi_size=0"]),
        ({"mean": [0.5]}, ["mean=[0.5]", "three numbers"]),
        ({"std": [1, 1, 0]}, ["std=[1, 1, 0]"]),
        ({"options": {"box_score_tresh": 0.1}}, ["options has no 'box_score_tresh'", "'box_score_thresh'"]),
        ({"options": {"min_size": 100}}, ["options has no 'min_size' for FasterRCNN"]),
        ({"options": {"box_score_thresh": "high"}}, ["options.box_score_thresh='high'", "from 0 to 1"]),
        ({"options": {"box_nms_thresh": 5}}, ["options.box_nms_thresh=5", "from 0 to 1"]),
        ({"options": {"rpn_batch_size_per_image": 0}}, ["options.rpn_batch_size_per_image=0", "at least 1"]),
        ({"options": {"box_detections_per_img": 1.5}}, ["options.box_detections_per_img=1.5", "whole number"]),
        ({"options": {"rpn_fg_iou_thresh": 0.2}}, ["options={'rpn_fg_iou_thresh': 0.2} do not fit the FasterRCNN"]),
        ({"options": ["box_nms_thresh"]}, ["options"]),
        ({"head": "fcos", "options": {"box_score_thresh": 0.1}}, ["for FCOS", "score_thresh"]),
        ({"initial_weights": "nowhere.ckpt"}, ["initial_weights='nowhere.ckpt' does not exist"]),
    ],
    ids=str,
)
def test_bad_arguments(kwargs, says):
    options = {"head": "faster_rcnn", "backbone": "resnet18"} | kwargs
    one_line_error(lambda: small(**options), *says)


def test_a_backbone_without_feature_maps():
    class Bare(nn.Module):
        pass

    one_line_error(
        lambda: detector_module.PyramidBackbone(Bare(), "bare", [8], 32, None),
        "backbone='bare' cannot give feature maps",
        "cifar_resnet.py",
    )


@pytest.mark.parametrize("wrong", [{"num_chs": 100}, {"reduction": 4}])
def test_a_backbone_that_is_wrong_about_its_feature_maps(wrong):
    network = create_backbone("resnet18")
    network.feature_info = [*network.feature_info[:2], network.feature_info[2] | wrong, *network.feature_info[3:]]
    one_line_error(
        lambda: detector_module.PyramidBackbone(network, "resnet18", [wrong.get("reduction", 8)], 32, None),
        "backbone='resnet18' gives feature maps of shapes",
        "on a 64x64 picture",
    )


def test_arguments_reach_torchvision():
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    options = {"box_detections_per_img": 5, "rpn_nms_thresh": 0.6}
    detector = small(
        "faster_rcnn",
        "resnet18",
        levels=[8, 16],
        anchor_sizes=[16, [24.0], 48],
        aspect_ratios=[1.0, 2.0],
        roi_size=5,
        mean=mean,
        std=std,
        options=options,
        resize_in_training=False,
    )
    transform = detector.transform
    assert (transform.image_mean, transform.image_std) == (mean, std)
    assert (transform.min_size, transform.max_size) == ((64,), 96)
    assert detector.rpn.anchor_generator.sizes == ((16,), (24.0,), (48,))
    assert detector.rpn.anchor_generator.aspect_ratios == ((1.0, 2.0),) * 3
    assert detector.rpn.head.cls_logits.out_channels == 2
    assert detector.rpn.nms_thresh == 0.6
    assert detector.roi_heads.box_roi_pool.output_size == (5, 5)
    assert detector.roi_heads.box_roi_pool.featmap_names == ["0", "1"]
    assert detector.roi_heads.box_head.fc6.in_features == 32 * 25
    assert detector.roi_heads.box_predictor.cls_score.out_features == 4
    assert all(len(one["boxes"]) <= 5 for one in detect(detector))


@pytest.mark.parametrize("resize", [True, False])
def test_pictures_are_resized_in_training_only_if_asked(resize):
    seen = []
    detector = small("fcos", "resnet18", resize_in_training=resize)
    detector.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape[-2:])))
    images = pictures(sizes=((32, 32), (32, 32)))
    boxes = targets()
    for target in boxes:
        target["boxes"] = target["boxes"] / 2
    detector.train()(images, boxes)
    detect(detector, images)
    assert seen == [(64, 64) if resize else (32, 32), (64, 64)]


@pytest.mark.parametrize("head", HEADS)
def test_labels_are_from_1(head):
    """Also where the column of label 0, which RetinaNet and FCOS have, would win everywhere."""
    detector = small(head, "resnet18", options=ANYTHING[head])
    if head != "faster_rcnn":
        nn.init.constant_(detector.head.classification_head.cls_logits.bias[::4], 100.0)
    for found in detect(detector):
        assert len(found["labels"]) > 10
        assert set(found["labels"].tolist()) <= {1, 2, 3}
    losses = detector.train()(pictures(), targets())
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("head", HEADS)
def test_a_copy_is_a_detector_of_its_own(head):
    """Weight averaging copies the network."""
    detector = small(head, "resnet18", aw=True, options=ANYTHING[head])
    clone = copy.deepcopy(detector)
    assert_same_detections(detect(clone), detect(detector))
    nn.init.zeros_(clone.backbone.body.conv1.weight)
    assert detector.backbone.body.conv1.weight.abs().sum() > 0


def test_boxes_come_in_the_pictures_own_pixels():
    detector = small("faster_rcnn", "resnet18", options=ANYTHING["faster_rcnn"])
    picture = torch.rand(3, 256, 320)
    (found,) = detect(detector, [picture])
    assert found["boxes"][:, 2].max() <= 320
    assert found["boxes"][:, 2:].max() > 96


@pytest.mark.slow
def test_a_detector_overfits_one_picture():
    """The labels, the losses and the boxes mean the same thing in training and in evaluation."""
    torch.manual_seed(0)
    detector = small("faster_rcnn", "resnet20", levels=[2, 4], anchor_sizes=[16, 24, 32], aw=True, image_size=32)
    picture, box = torch.zeros(3, 32, 32), [6.0, 8.0, 24.0, 22.0]
    picture[:, 8:22, 6:24] = 1
    target = {"boxes": torch.tensor([box]), "labels": torch.tensor([2])}
    optimizer = torch.optim.AdamW(detector.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        sum(detector([picture] * 2, [target] * 2).values()).backward()
        optimizer.step()
    (found,) = detect(detector, [picture])
    assert found["labels"][0] == 2
    assert found["scores"][0] > 0.8
    torch.testing.assert_close(found["boxes"][0], torch.tensor(box), atol=2.0, rtol=0)
