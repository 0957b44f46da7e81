"""Training and evaluating AW-augmented detectors."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from awconv.errors import InputError, printable, require
from awconv.metrics import BoxMeanAveragePrecision
from awconv.models import create_detector
from awconv.tasks.base import BaseTask

_Target = dict[str, Tensor]
_Detections = dict[str, Tensor]


class DetectionTask(BaseTask):
    """Object detection: torchvision's heads over an FPN over any backbone, and COCO's average precision.

    It logs ``train/loss`` and each of its parts (``train/loss_classifier``, ``train/loss_rpn_box_reg``, ...), and under
    ``val/`` and ``test/`` the metrics of :class:`awconv.metrics.BoxMeanAveragePrecision`: ``map``, ``map_50``,
    ``map_75``, ``map_small``, ``map_medium``, ``map_large``, ``mar_1``, ``mar_10``, ``mar_100``. A size that does not
    occur is left out. Batches are ``(images, targets)``: a list of N pictures (3, H, W), uint8 or float in [0, 1], of
    any sizes, and a list of N dictionaries with ``boxes`` (M, 4) as x1, y1, x2, y2 in pixels, ``labels`` (M,) from 1
    (0 is the background) and ``image_id``; evaluation also takes ``area`` and ``iscrowd``. To train a network of your
    own, override :meth:`build_network`.

    Args:
        head: ``faster_rcnn`` (Ren et al. 2015), ``retinanet`` (Lin et al. 2017) or ``fcos`` (Tian et al. 2019).
        backbone: Name of the network below the FPN, see :func:`awconv.models.create_backbone`.
        attention: Activation attention in the backbone: ``se``, ``eca``, ``cbam``, ``ge`` or ``bam``.
        aw: AW-convolution in the backbone: null or false for none, true for the defaults, or a mapping of
            :class:`awconv.layers.AWConv2d` options, ``include``, ``exclude`` and ``preserve_function``.
        initial_weights: What to start from: a checkpoint or state-dict file of a classifier (for the backbone) or of a
            detector, ``pretrained`` for timm's ImageNet weights, or ``torchvision`` for torchvision's. A plain
            network's weights enter an AW network function-preservingly. Not for resuming: that is ``--ckpt_path``.
        norm: Normalisation of the backbone: ``frozen`` (statistics and scales of the initial weights, for the small
            batches of detection; the AW heads' own still learn), ``batch``, ``sync`` (over all GPUs) or ``group``
            (Wu and He 2018).
        trainable_stages: How many of the backbone's last stages learn, null for all; of the others only what ``aw`` and
            ``attention`` add.
        levels: Strides of the backbone's feature maps that the FPN takes; null means the head's own.
        fpn_channels: Channels of the FPN and of the heads.
        anchor_sizes: Sides of the anchors in pixels, a number or a list of numbers for each level of the FPN.
        aspect_ratios: Heights over widths of the anchors.
        roi_size: Side of the pooled regions of ``faster_rcnn``, in cells.
        mean: Mean of each channel that normalisation subtracts; null means ImageNet's.
        std: Standard deviation of each channel that normalisation divides by; null means ImageNet's.
        options: Further arguments of torchvision's detector class, such as ``{box_detections_per_img: 300}``.
        resize_in_training: Let the detector resize training pictures too, for data that come in any size; this
            project's data modules bring them to size themselves.
        num_classes: Number of classes K without the background; the command line takes it from the data.
        class_names: Names of the classes, label 1 first; the command line takes them from the data.
        category_ids: The data set's own id of each class, a whole number or text, label 1 first; the command line takes
            them from the data.
        image_size: Short side of the pictures in pixels; the command line takes it from the data.
        max_size: Longest side of the pictures in pixels; the command line takes it from the data.
        **kwargs: Optimisation, see :class:`awconv.tasks.BaseTask`.

    Raises:
        InputError: If an argument is unknown or out of range.
    """

    monitor = "val/map"

    def __init__(
        self,
        head: Literal["faster_rcnn", "retinanet", "fcos"],
        backbone: str,
        *,
        attention: Literal["se", "eca", "cbam", "ge", "bam"] | None = None,
        aw: bool | dict[str, Any] | None = None,
        initial_weights: str | None = None,
        norm: Literal["frozen", "batch", "sync", "group"] = "batch",
        trainable_stages: int | None = None,
        levels: list[int] | None = None,
        fpn_channels: int = 256,
        anchor_sizes: list[Any] | None = None,
        aspect_ratios: list[float] | None = None,
        roi_size: int = 7,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        options: dict[str, Any] | None = None,
        resize_in_training: bool = False,
        num_classes: int = 80,
        class_names: list[str] | None = None,
        # str first: jsonargparse would take the text "1" for the number, where it may
        category_ids: list[str | int] | None = None,
        image_size: int = 800,
        max_size: int = 1333,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, values in (("class_names", class_names), ("category_ids", category_ids)):
            fits = values is None or len(values) == num_classes
            require(fits, name, values, f"one entry for each of num_classes={num_classes} classes")
        self.class_names = list(class_names or map(str, range(1, num_classes + 1)))
        self.category_ids = list(category_ids or range(1, num_classes + 1))
        self._restored = False
        self.set_network(self.build_network())
        self.val_map = BoxMeanAveragePrecision()
        self.test_map = BoxMeanAveragePrecision()

    def build_network(self) -> nn.Module:
        """Builds the detector that the arguments name, with torchvision's interface.

        In training, (list of images (3, H, W), list of targets) to a dictionary of losses; in evaluation, a list of
        images to a list of ``boxes`` (D, 4) in pixels of the image, ``scores`` (D,) and ``labels`` (D,).
        """
        hparams = self.hparams
        same = (
            "attention", "aw", "num_classes", "norm", "trainable_stages", "levels", "fpn_channels",
            "anchor_sizes", "aspect_ratios", "roi_size", "image_size", "max_size", "mean", "std",
            "options", "resize_in_training",
        )  # fmt: skip
        network: Any = create_detector(
            hparams["head"],
            hparams["backbone"],
            initial_weights=hparams["initial_weights"],
            loaded_later=True,  # a checkpoint may follow: whether one does is known when fit starts
            **{name: hparams[name] for name in same},
        )
        self.weights_report = network.weights_report
        if hparams["initial_weights"]:
            rank_zero_info(printable(network.weights_report.text))
        assert isinstance(network, nn.Module)
        return network

    def forward(self, images: Sequence[Tensor], targets: Sequence[_Target] | None = None) -> Any:  # type: ignore[override]
        """Applies the detector to N images (3, H, W), uint8 or float in [0, 1]."""
        return self.network([i if i.is_floating_point() else i.float() / 255 for i in images], targets)

    def set_network(self, network: nn.Module) -> None:
        """Takes ``network`` as the detector that is trained, in the memory format asked for."""
        super().set_network(network)
        if self.hparams["channels_last"]:
            # images arrive one by one: it is their padded batch that has a memory format
            self.module_to_compile().register_forward_pre_hook(_to_channels_last)

    def module_to_compile(self) -> nn.Module:
        """Gives the backbone with its FPN: what follows has shapes that depend on the data."""
        backbone: nn.Module = getattr(self.network, "backbone", self.network)
        return backbone

    def setup(self, stage: str) -> None:
        """Refuses what cannot work: half-precision weights, and synchronised statistics without GPUs."""
        precision = str(self.trainer.precision)
        if precision in ("bf16-true", "16-true", "64-true", "transformer-engine", "transformer-engine-float16"):
            raise InputError(
                f"trainer.precision={precision!r}: non-maximum suppression and RoIAlign need float32; use bf16-mixed"
            )
        if stage == "fit" and self.hparams["norm"] == "sync" and self.trainer.strategy.root_device.type == "cpu":
            raise InputError("norm='sync' works on GPUs only; use batch or group on a CPU")
        super().setup(stage)

    def on_fit_start(self) -> None:
        """Refuses to train a network that is partly frozen at random."""
        super().on_fit_start()
        norm, stages = self.hparams["norm"], self.hparams["trainable_stages"]
        random = self.hparams["initial_weights"] is None and not self._restored
        if random and (norm == "frozen" or stages is not None):
            frozen = "norm='frozen'" if norm == "frozen" else f"trainable_stages={stages}"
            raise InputError(
                f"{frozen} needs initial_weights (torchvision, pretrained or a file): what is frozen at random never "
                "learns; to train from scratch use norm batch or group and trainable_stages null"
            )

    # ---- steps ------------------------------------------------------------------------------------------------------

    def training_step(self, batch: tuple[list[Tensor], list[_Target]], batch_idx: int) -> Tensor:
        """Computes the losses of one batch and their sum."""
        images, targets = batch
        with self.seeded_step():
            losses: dict[str, Tensor] = self(images, targets)
        # FCOS and RetinaNet leave the prefix out
        parts = {f"loss_{name.removeprefix('loss_')}": value for name, value in losses.items()}
        loss = torch.stack(list(parts.values())).sum()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images))
        self.log_dict({f"train/{name}": value for name, value in parts.items()}, batch_size=len(images))
        return self.check_loss(loss, parts)

    def validation_step(
        self, batch: tuple[list[Tensor], list[_Target]], batch_idx: int
    ) -> dict[str, list[_Detections]]:
        """Adds one batch to the validation metric; gives ``detections``, a list of N dictionaries."""
        images, targets = batch
        detections = self(images)
        self.val_map.update(detections, targets)
        return {"detections": detections}

    def on_validation_epoch_start(self) -> None:
        """Empties the validation metric."""
        self.val_map.reset()

    def on_validation_epoch_end(self) -> None:
        """Logs average precision over all pictures of all processes."""
        # a few batches may hold no object; what follows val/map has to find it all the same
        absent = ("map", "map_small", "map_medium", "map_large") if self.trainer.sanity_checking else ("map",)
        nan = torch.tensor(torch.nan, device=self.device)
        self._log_map("val", {**dict.fromkeys(absent, nan), **self.val_map.compute()})

    def test_step(self, batch: tuple[list[Tensor], list[_Target]], batch_idx: int) -> dict[str, list[_Detections]]:
        """Adds one batch to the test metric; gives ``detections``, a list of N dictionaries."""
        images, targets = batch
        detections = self(images)
        self.test_map.update(detections, targets)
        return {"detections": detections}

    def on_test_epoch_start(self) -> None:
        """Empties the test metric, which stays full after a test, for those who report on it."""
        self.test_map.reset()

    def on_test_epoch_end(self) -> None:
        """Logs average precision; a test set without annotations has none."""
        self._log_map("test", self.test_map.compute())

    def predict_step(self, batch: tuple[list[Tensor], list[str]], batch_idx: int) -> dict[str, Any]:
        """Gives ``path``, a list of N file names, and ``detections``, a list of N dictionaries on the CPU."""
        images, paths = batch
        detections = [{key: value.cpu() for key, value in found.items()} for found in self(images)]
        return {"path": paths, "detections": detections}

    def _log_map(self, split: str, metrics: dict[str, Tensor]) -> None:
        for name, value in metrics.items():
            # every process has the same value; "max" keeps it, where a mean over processes would round
            self.log(
                f"{split}/{name}",
                value.to(torch.float32),
                prog_bar=name in ("map", "map_50"),
                sync_dist=True,
                reduce_fx="max",
            )

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint whose labels mean other classes."""
        self._restored = True
        saved = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        for name, here in (("class_names", self.class_names), ("category_ids", self.category_ids)):
            there = saved.get(name) if "head" in saved else None  # what differs in a classifier is said of its tensors
            if isinstance(there, list) and there != here:
                pairs = list(zip(there, here, strict=False))
                first = next((f"{a!r}, not {b!r}" for a, b in pairs if a != b), f"{len(there)}, not {len(here)}")
                raise InputError(
                    f"the checkpoint was trained on other classes than the data have ({name}: {first}); give data with "
                    "its classes, or start from its weights with model.initial_weights"
                )
        super().on_load_checkpoint(checkpoint)


def _to_channels_last(module: nn.Module, images: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(batch.contiguous(memory_format=torch.channels_last) for batch in images)
