"""Training and evaluating AW-augmented classifiers."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from awconv.errors import InputError, printable
from awconv.models import WeightsReport, create_backbone, load_initial_weights
from awconv.tasks.base import BaseTask

# what torch's cross entropy ignores by default; evaluation data pads with it, see awconv.data
_IGNORE_INDEX = -100


class ClassificationTask(BaseTask):
    """Image classification: cross entropy, top-1 and top-5 accuracy, a confusion matrix at test.

    It logs ``train/loss``, and ``loss``, ``acc1`` and ``acc5`` under ``val/`` and ``test/`` (top-5 is over all classes
    where there are fewer than five). Batches are ``(images, targets)`` with images (N, C, H, W) and targets (N,) class
    indices, or (N, num_classes) probabilities while training with MixUp or CutMix. Targets of -100 pad evaluation
    batches and count nowhere. To train a network of your own, override :meth:`build_network`.

    Args:
        backbone: Name of the network, see :func:`awconv.models.create_backbone`: any timm CNN, or ``resnet20``, ...
        attention: Activation attention on top: ``se``, ``eca``, ``cbam``, ``ge`` or ``bam``.
        aw: AW-convolution: null or false for none, true for the defaults, or a mapping of
            :class:`awconv.layers.AWConv2d` options, ``include``, ``exclude`` and ``preserve_function``.
        stem: ``imagenet``, or ``cifar`` for the 3x3 stride-1 stem of small pictures.
        initial_weights: A checkpoint or state-dict file to start from, or ``pretrained`` for timm's weights. A plain
            network's weights enter an AW network function-preservingly. Not for resuming: that is ``--ckpt_path``.
        num_classes: Number of classes; the command line takes it from the data.
        class_names: Names of the classes, in index order; the command line takes them from the data.
        in_channels: Number of image channels; the command line takes it from the data.
        image_size: Side of the pictures the network is made for, in pixels; the command line takes it from the data.
        label_smoothing: Cross-entropy label smoothing, from 0 up to but not including 1.
        **kwargs: Optimisation, see :class:`awconv.tasks.BaseTask`.

    Raises:
        InputError: If an argument is unknown or out of range.
    """

    monitor = "val/acc1"

    def __init__(
        self,
        backbone: str,
        *,
        attention: Literal["se", "eca", "cbam", "ge", "bam"] | None = None,
        aw: bool | dict[str, Any] | None = None,
        stem: Literal["imagenet", "cifar"] = "imagenet",
        initial_weights: str | None = None,
        num_classes: int = 1000,
        class_names: list[str] | None = None,
        in_channels: int = 3,
        image_size: int | None = None,
        label_smoothing: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if num_classes < 1:
            raise InputError(f"num_classes={num_classes} must be at least 1")
        if class_names is not None and len(class_names) != num_classes:
            raise InputError(
                f"class_names has {len(class_names)} names for num_classes={num_classes}; give one a class"
            )
        if not 0 <= label_smoothing < 1:
            raise InputError(f"label_smoothing={label_smoothing} must be from 0 up to but not including 1")
        self.class_names = class_names or [str(index) for index in range(num_classes)]
        self.set_network(self.build_network())
        if image_size is not None:
            self.example_input_array = torch.zeros(1, in_channels, image_size, image_size)

        for split in ("val", "test"):
            accuracy: dict[str, Metric | MetricCollection] = {
                f"acc{k}": MulticlassAccuracy(
                    num_classes, top_k=min(k, num_classes), average="micro", ignore_index=_IGNORE_INDEX
                )
                for k in (1, 5)
            }
            setattr(self, f"{split}_metrics", MetricCollection(accuracy, prefix=f"{split}/", compute_groups=False))
            setattr(self, f"{split}_loss", MeanMetric())
        self.test_confusion = MulticlassConfusionMatrix(num_classes, ignore_index=_IGNORE_INDEX)

    def build_network(self) -> torch.nn.Module:
        """Builds the network that the arguments name: images (N, in_channels, H, W) to logits (N, num_classes)."""
        hparams = self.hparams
        pretrained = hparams["initial_weights"] == "pretrained"
        network = create_backbone(
            hparams["backbone"],
            attention=hparams["attention"],
            aw=hparams["aw"],
            stem=hparams["stem"],
            pretrained=pretrained,
            num_classes=hparams["num_classes"],
            in_channels=hparams["in_channels"],
        )
        self.weights_report = _report(network, hparams)
        if hparams["initial_weights"]:
            rank_zero_info(printable(self.weights_report.text))
        return network

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Computes the loss of one batch."""
        images, targets = batch
        with self.seeded_step():
            logits = self(images)
        loss = F.cross_entropy(logits, targets, label_smoothing=self.hparams["label_smoothing"])
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images))
        return self.check_loss(loss)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Adds one batch to the validation metrics; gives ``logits``, (N, num_classes) in float32, for who draws."""
        logits, _ = self._evaluate("val", batch)
        return {"logits": logits}

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Adds one batch to the test metrics and the confusion matrix."""
        logits, targets = self._evaluate("test", batch)
        self.test_confusion.update(logits, targets)

    def on_test_epoch_start(self) -> None:
        """Empties the confusion matrix: unlike the logged metrics, nothing else would between two tests."""
        self.test_confusion.reset()

    def predict_step(self, batch: tuple[Tensor, list[str]], batch_idx: int) -> dict[str, Any]:
        """Gives ``path``, a list of N file names, and ``probabilities``, (N, num_classes) in float32."""
        images, paths = batch
        return {"path": paths, "probabilities": self(images).float().softmax(dim=1)}

    def _evaluate(self, split: Literal["val", "test"], batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, targets = batch
        logits = self(images).float()
        losses = F.cross_entropy(logits, targets, reduction="none", ignore_index=_IGNORE_INDEX)
        metrics, mean_loss = getattr(self, f"{split}_metrics"), getattr(self, f"{split}_loss")
        # weights, so that the mean is over pictures whatever the batch size and the number of processes
        mean_loss.update(losses, weight=(targets != _IGNORE_INDEX).float())
        metrics.update(logits, targets)
        self.log(f"{split}/loss", mean_loss, on_epoch=True, on_step=False)
        self.log_dict(metrics, on_epoch=True, on_step=False, prog_bar=True)
        return logits, targets


def _report(network: Any, hparams: Mapping[str, Any]) -> WeightsReport:
    """Loads the initial weights, unless they are in ``network`` already, and says what they are."""
    given = hparams["initial_weights"]
    if given is None:
        return WeightsReport("initial weights: random", complete=False)
    if given != "pretrained":
        return load_initial_weights(network, given)
    same_classes = network.pretrained_cfg.get("num_classes") == hparams["num_classes"]
    complete = same_classes and hparams["attention"] is None
    text = f"initial weights: timm's of {hparams['backbone']}"
    return WeightsReport(text if complete else f"{text}; left at initialisation: what they do not cover", complete)
