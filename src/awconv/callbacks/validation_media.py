"""What validation looks like while a run trains: pictures with what was predicted, and where the classes stand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import Tensor
from torch.utils.data import DistributedSampler
from torchvision.ops import box_iou
from torchvision.transforms.v2.functional import to_dtype

from awconv.callbacks.canvas import counted, spread_rank
from awconv.callbacks.classification_figures import PredictedPicture, draw_confusion_matrix, draw_prediction_sheet
from awconv.callbacks.detection_figures import SheetPicture, draw_detection_sheet, draw_precision_recall
from awconv.callbacks.detection_report import MEASURES, classes_of, on_cpu, own_terms
from awconv.callbacks.media import publish
from awconv.callbacks.run_files import class_names_of, gather, of_all
from awconv.errors import require_int, require_number
from awconv.metrics import BoxMeanAveragePrecision

if TYPE_CHECKING:
    import lightning.pytorch as pl

CHART_UP_TO = 30  # classes: W&B's own confusion matrix is made, whose table has a row a cell
_BINS = 20  # of confidences from 0 to 1
_LONGEST, _SHORTEST = 640, 96  # pixels: sides of the pictures that are kept; and that W&B shows small ones at
_LOWEST_SCORE, _MOST_BOXES = 0.05, 100  # of the boxes that W&B is given, which has a slider of its own
_FOUND_AT = 0.5  # intersection over union


class _ValidationMedia(Callback):
    """Draws after the validations of every n-th epoch of ``fit``, and at no other time.

    Nothing is measured, kept or drawn during the sanity check, with ``fast_dev_run``, with ``barebones``, and in
    ``validate``.
    """

    def __init__(self, max_pictures: int, every_n_epochs: int) -> None:
        require_int("max_pictures", max_pictures, "a whole number, at least 1", low=1)
        require_int("every_n_epochs", every_n_epochs, "a whole number, 0 for never", low=0)
        self.max_pictures = max_pictures
        self.every_n_epochs = every_n_epochs

    def _is_due(self, trainer: pl.Trainer) -> bool:
        idle = trainer.sanity_checking or trainer.barebones or getattr(trainer, "fast_dev_run", False)
        every = self.every_n_epochs
        return trainer.state.fn == "fit" and not idle and every > 0 and (trainer.current_epoch + 1) % every == 0


# ---- classification --------------------------------------------------------------------------------------------------


class _Samples(NamedTuple):
    """N samples and what there is to say of each, on the device; ``valid`` is false for padding."""

    image: Tensor
    position: Tensor
    loss: Tensor
    target: Tensor
    predicted: Tensor
    probability: Tensor
    of_target: Tensor
    valid: Tensor

    def at(self, index: Any) -> _Samples:
        return _Samples(*(column[index] for column in self))

    def and_of(self, other: _Samples) -> _Samples:
        return _Samples(*map(torch.cat, zip(self, other, strict=True)))

    def worst(self, most: int) -> _Samples:
        losses = self.loss.masked_fill(~self.valid, -math.inf)
        return self.at(losses.topk(min(most, len(losses))).indices)


class _Candidate(NamedTuple):
    """A sample that may be shown, with its position in the validation set."""

    position: int
    shown: PredictedPicture

    @property
    def badness(self) -> tuple[float, int]:
        """Sorts the highest loss first, and before it one that is no number."""
        return (-math.inf if math.isnan(self.shown.loss) else -self.shown.loss, self.position)


class ClassificationMedia(_ValidationMedia):
    """Shows what a classifier makes of the validation set, epoch by epoch.

    Into the run's folder, ``media/``, each in the place of the one before, and to Weights & Biases where that is on:

    - ``val/pictures``: a fixed sample of pictures, and those of the highest loss, with truth, prediction and
      probabilities.
    - ``val/confusion_matrix``, with the accuracy of every class.

    To Weights & Biases alone: the tables ``val/predictions`` (the same pictures) and ``val/class_accuracy``, the chart
    ``val/confusion`` of up to 100 classes, and the histogram ``val/confidence`` of the predicted classes'
    probabilities.

    It takes ``{"logits": (N, K) tensor}`` from ``validation_step``, ``(images, targets)`` from its batch, with images
    (N, C, H, W) and targets (N,) class indices, and the names from ``pl_module.class_names``. A module without logits
    is left alone. Targets below 0 are padding, as is what a distributed sampler adds to the data set. Of several
    validation loaders the first counts. Pictures are brought back to what they were by the ``mean`` and ``std`` of the
    data module; where it has none, each is stretched from black to white.

    What is shown does not depend on the batch size or the number of processes.

    Args:
        max_pictures: the most pictures of either kind.
        every_n_epochs: epochs between two drawings; 0 draws nothing and costs nothing.

    Raises:
        InputError: if an argument is out of range.
    """

    def __init__(self, max_pictures: int = 12, every_n_epochs: int = 1) -> None:
        super().__init__(max_pictures, every_n_epochs)
        self._share = _Share(math.inf, 1, 0)
        self._forget()

    def _forget(self) -> None:
        self._seen = 0
        self._confusion: Tensor | None = None
        self._confidences: Tensor | None = None
        self._fixed: dict[int, _Samples] = {}
        self._worst: _Samples | None = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forgets what an earlier, perhaps interrupted, validation left."""
        self._forget()
        if self._is_due(trainer):
            self._share = _share_of(trainer)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Counts one batch, and keeps the pictures that may be shown; the device is not waited for."""
        if dataloader_idx or not self._is_due(trainer) or not isinstance(outputs, Mapping):
            return
        logits = outputs.get("logits")
        if not isinstance(logits, Tensor) or logits.ndim != 2 or not _is_classified(batch, len(logits)):
            return
        images, targets = (part.detach() for part in batch[:2])
        positions = self._share.positions(self._seen, len(logits))
        self._seen += len(logits)
        samples = _judge(images, targets, logits.detach().float(), positions)
        self._count(samples, logits.shape[1])
        self._keep_fixed(samples, positions)
        worst = samples.worst(self.max_pictures)
        self._worst = worst if self._worst is None else self._worst.and_of(worst).worst(self.max_pictures)

    def _count(self, samples: _Samples, classes: int) -> None:
        if self._confusion is None or self._confidences is None:
            # a cell more, into which padding goes: to leave it out would wait for the device
            self._confusion = samples.target.new_zeros(classes * classes + 1)
            self._confidences = samples.target.new_zeros(_BINS + 1)
        cells = samples.target * classes + samples.predicted
        bins = (samples.probability.nan_to_num() * _BINS).long().clamp(0, _BINS - 1)
        for counts, cell in ((self._confusion, cells), (self._confidences, bins)):
            cell = cell.masked_fill(~samples.valid, len(counts) - 1)
            counts.index_add_(0, cell, torch.ones_like(cell))

    def _keep_fixed(self, samples: _Samples, positions: Sequence[int]) -> None:
        here = [position for position in positions if position >= 0]
        chosen = set(sorted([*self._fixed, *here], key=spread_rank)[: self.max_pictures])
        self._fixed = {position: kept for position, kept in self._fixed.items() if position in chosen}
        for k, position in enumerate(positions):
            if position in chosen:
                kept = samples.at(slice(k, k + 1))
                self._fixed[position] = kept._replace(image=kept.image.clone())  # a slice would keep the whole batch

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gathers what all processes found, once, and shows it."""
        if not self._is_due(trainer):
            return
        most = self.max_pictures
        fixed = [c for kept in self._fixed.values() for c in _candidates(kept, trainer)]
        worst = [] if self._worst is None else _candidates(self._worst, trainer)
        offers = of_all(trainer, ([c.position for c in fixed], [c.badness for c in worst], self._confusion is not None))
        if not any(some for *_, some in offers):  # a module without logits
            return
        shown_fixed = set(sorted((p for positions, *_ in offers for p in positions), key=spread_rank)[:most])
        shown_worst = set(sorted(badness for _, badnesses, _ in offers for badness in badnesses)[:most])
        # only what is shown travels, and of the counts only what is not zero
        found = gather(
            trainer,
            [
                (
                    [c for c in fixed if c.position in shown_fixed],
                    [c for c in worst if c.badness in shown_worst],
                    *(None if counts is None else _sparse(counts) for counts in (self._confusion, self._confidences)),
                )
            ],
        )
        self._forget()
        shown = self._compose(pl_module, found) if trainer.is_global_zero else ({}, {})
        publish(trainer, *shown)

    def _compose(self, pl_module: pl.LightningModule, found: Sequence[tuple[Any, ...]]) -> _Shown:
        all_fixed, all_worst, confusions, confidences = zip(*found, strict=True)
        fixed = sorted((c for of_one in all_fixed for c in of_one), key=lambda c: c.position)
        worst = sorted((c for of_one in all_worst for c in of_one), key=lambda c: c.badness)
        cells, bins = _dense(confusions)[:-1], _dense(confidences)[:-1]
        if not cells.any():  # all of it padding, or without labels
            return {}, {}
        classes = math.isqrt(len(cells))
        confusion = cells.reshape(classes, classes)
        names = class_names_of(pl_module, classes)
        parts = {"A fixed sample": [c.shown for c in fixed], "Highest loss": [c.shown for c in worst]}
        figures = {
            "val/confusion_matrix": lambda: draw_confusion_matrix(confusion, names, of="validation images"),
        }
        if fixed or worst:
            figures["val/pictures"] = lambda: draw_prediction_sheet(parts, names)
        objects = {
            "val/predictions": lambda: _predictions_table({"fixed": fixed, "worst": worst}, names),
            "val/class_accuracy": lambda: _accuracy_table(confusion, names),
            "val/confidence": lambda: _histogram(bins),
        }
        if classes <= CHART_UP_TO:
            objects["val/confusion"] = lambda: _confusion_chart(confusion, names)
        return figures, objects


# What `publish` takes: figures and W&B's objects, by name.
_Shown = tuple[dict[str, Callable[[], Any]], dict[str, Callable[[], Any]]]


class _Share(NamedTuple):
    """Which samples of the validation set this process sees: ``first``, and from there on every ``step``-th."""

    length: float
    step: int
    first: int

    def positions(self, seen: int, count: int) -> list[int]:
        """The places of the next samples in the data set; -1 for padding beyond its end."""
        places = (k * self.step + self.first for k in range(seen, seen + count))
        return [place if place < self.length else -1 for place in places]


def _share_of(trainer: pl.Trainer) -> _Share:
    loader: Any = trainer.val_dataloaders
    loader = loader[0] if isinstance(loader, list | tuple) and loader else loader
    length: float
    try:
        length = len(loader.dataset)
    except (AttributeError, TypeError):  # no DataLoader, or an iterable data set
        length = math.inf
    sampler = getattr(loader, "sampler", None)
    if isinstance(sampler, DistributedSampler):
        return _Share(length, sampler.num_replicas, sampler.rank)
    # where nothing deals the samples out, every process has them all, and the first one's count
    return _Share(length if trainer.is_global_zero else 0, 1, 0)


def _is_classified(batch: Any, count: int) -> bool:
    """Whether a batch is pictures (N, C, H, W) and class indices (N,)."""
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        return False
    images, targets = batch[:2]
    if not isinstance(images, Tensor) or not isinstance(targets, Tensor) or images.ndim != 4:
        return False
    return len(images) == count and targets.shape == (count,) and not targets.is_floating_point()


def _judge(images: Tensor, targets: Tensor, logits: Tensor, positions: Sequence[int]) -> _Samples:
    places = torch.tensor(positions).to(targets.device, non_blocking=True)
    index = targets.long().clamp(min=0)
    probabilities = logits.softmax(dim=1)
    probability, predicted = probabilities.max(dim=1)
    return _Samples(
        image=images,
        position=places,
        loss=F.cross_entropy(logits, index, reduction="none"),
        target=index,
        predicted=predicted,
        probability=probability,
        of_target=probabilities.gather(1, index[:, None])[:, 0],
        valid=(targets >= 0) & (places >= 0),
    )


def _candidates(samples: _Samples, trainer: pl.Trainer) -> list[_Candidate]:
    """Those samples that are no padding, as plain numbers and pictures."""
    kept = samples.at(samples.valid)
    pictures = _pictures(kept.image, getattr(trainer, "datamodule", None))
    rows = zip(*(column.tolist() for column in kept[1:-1]), strict=True)
    return [
        _Candidate(position, PredictedPicture(picture, target, predicted, probability, of_target, loss))
        for picture, (position, loss, target, predicted, probability, of_target) in zip(pictures, rows, strict=True)
    ]


def _pictures(images: Tensor, data: Any) -> list[Image.Image]:
    """Pictures (N, C, H, W) as they were before the data module normalised them, grey or RGB, at most 640 pixels."""
    images = images.cpu()
    channels = images.shape[1]
    if images.dtype != torch.uint8:
        images = images.float().nan_to_num()
        mean, std = (getattr(data, name, None) for name in ("mean", "std"))
        if _is_for(mean, channels) and _is_for(std, channels):
            images = images * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
        elif len(images):
            low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
            images = (images - low) / (high - low).clamp(min=1e-12)
        images = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    images = images[:, :3] if channels >= 3 else images[:, 0]
    pictures = [Image.fromarray(np.moveaxis(i.numpy(), 0, -1) if i.ndim == 3 else i.numpy()) for i in images]
    for picture in pictures:
        picture.thumbnail((_LONGEST, _LONGEST))
    return pictures


def _is_for(values: Any, channels: int) -> bool:
    return isinstance(values, list | tuple) and len(values) == channels


def _sparse(counts: Tensor) -> tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    dense = counts.cpu().numpy()
    places = np.flatnonzero(dense)
    return len(dense), places, dense[places]


def _dense(counts: Sequence[Any]) -> npt.NDArray[np.int64]:
    """The sum of what :func:`_sparse` made on all processes."""
    there = [of_one for of_one in counts if of_one is not None]
    total = np.zeros(there[0][0], dtype=np.int64)
    for _, places, values in there:
        total[places] += values
    return total


def _predictions_table(shown: Mapping[str, Sequence[_Candidate]], names: Sequence[str]) -> Any:
    import wandb

    table = wandb.Table(
        columns=["shown", "picture", "true", "predicted", "correct", "probability", "of true", "loss", "position"]
    )
    for kind, candidates in shown.items():
        for position, (picture, target, predicted, probability, of_target, loss) in candidates:
            table.add_data(
                kind,
                wandb.Image(_enlarged(picture)),
                names[target],
                names[predicted],
                target == predicted,
                probability,
                of_target,
                loss,
                position,
            )
    return table


def _enlarged(picture: Image.Image) -> Image.Image:
    """A small picture in larger pixels: the web page shows every picture at its own size."""
    factor = math.ceil(_SHORTEST / min(picture.size))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _accuracy_table(confusion: npt.NDArray[np.int64], names: Sequence[str]) -> Any:
    import wandb

    images, correct = confusion.sum(axis=1).tolist(), confusion.diagonal().tolist()
    rows = [[name, n, hits, hits / n if n else None] for name, n, hits in zip(names, images, correct, strict=True)]
    return wandb.Table(columns=["class", "images", "correct", "accuracy"], data=rows)


def _confusion_chart(confusion: npt.NDArray[np.int64], names: Sequence[str]) -> Any:
    import wandb

    # as wandb.plot.confusion_matrix makes it, which takes single predictions
    columns: list[str | int] = ["Actual", "Predicted", "nPredictions"]
    rows = [[names[i], names[j], int(confusion[i, j])] for i, j in np.ndindex(confusion.shape)]
    return wandb.plot_table(
        "wandb/confusion_matrix/v1",
        wandb.Table(columns=columns, data=rows),
        {str(column): column for column in columns},
        {"title": "Confusion matrix of the validation images"},
    )


def _histogram(bins: npt.NDArray[np.int64]) -> Any:
    import wandb

    return wandb.Histogram(np_histogram=(bins.tolist(), np.linspace(0, 1, len(bins) + 1).tolist()))


# ---- detection -------------------------------------------------------------------------------------------------------


class _Scene(NamedTuple):
    """A picture that may be shown, with width and height of what its boxes refer to; tensors on the CPU."""

    image_id: Any
    picture: Image.Image
    size: tuple[int, int]
    detections: dict[str, Tensor]
    target: dict[str, Tensor]
    mistakes: int

    @property
    def badness(self) -> tuple[int, int]:
        """Sorts the most mistakes first."""
        return _by_mistakes(self.image_id, self.mistakes)


class DetectionMedia(_ValidationMedia):
    """Shows what a detector makes of the validation set, epoch by epoch.

    Into the run's folder, ``media/``, each in the place of the one before, and to Weights & Biases where that is on:

    - ``val/pictures``: a fixed sample of pictures with their boxes.
    - ``val/worst_pictures``: those with the most mistakes, objects missed and boxes that are on none, at ``min_score``
      and an IoU of 0.5.
    - ``val/precision_recall``: the curves.

    To Weights & Biases alone: the table ``val/boxes`` of the same pictures with their boxes as an overlay, whose
    classes and scores can be chosen on the web page (down to a score of 0.05), the table ``val/class_ap``, and the
    chart ``val/precision_recall_chart``.

    It takes ``{"detections": list of torchvision's dicts}`` from ``validation_step``, ``(images, targets)`` from its
    batch, ``class_names`` and ``category_ids`` as :class:`DetectionReport` does, and, where there is one, the
    :class:`awconv.metrics.BoxMeanAveragePrecision` ``pl_module.val_map``. A module without detections is left alone.
    Of several validation loaders the first counts.

    What is shown does not depend on the batch size or the number of processes.

    Args:
        min_score: detections below it are not drawn, and no mistakes.
        max_pictures: the most pictures of either kind.
        every_n_epochs: epochs between two drawings; 0 draws nothing and costs nothing.

    Raises:
        InputError: if an argument is out of range.
    """

    def __init__(self, min_score: float = 0.5, max_pictures: int = 8, every_n_epochs: int = 1) -> None:
        require_number("min_score", min_score, "a number from 0 to 1", low=0, high=1)
        super().__init__(max_pictures, every_n_epochs)
        self.min_score = min_score
        self._forget()

    def _forget(self) -> None:
        self._fixed: dict[int, _Scene] = {}
        self._worst: dict[int, _Scene] = {}

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forgets what an earlier, perhaps interrupted, validation left."""
        self._forget()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the pictures that may be shown."""
        if dataloader_idx or not self._is_due(trainer):
            return
        if not isinstance(outputs, Mapping) or not _is_detected(batch, outputs.get("detections")):
            return
        for image, target, detections in zip(*batch[:2], outputs["detections"], strict=True):
            self._consider(int(target["image_id"]), image, on_cpu(detections), on_cpu(target))

    def _consider(self, image_id: int, image: Tensor, detections: dict[str, Tensor], target: dict[str, Tensor]) -> None:
        mistakes = count_mistakes(detections, target, self.min_score)
        for kept, rank in ((self._fixed, _by_spread), (self._worst, _by_mistakes)):
            places = {k: rank(k, scene.mistakes) for k, scene in kept.items()}
            places[image_id] = rank(image_id, mistakes)
            last = max(places, key=lambda k: places[k]) if len(places) > self.max_pictures else None
            if image_id not in kept and last != image_id:
                there = self._fixed.get(image_id)
                kept[image_id] = there or _scene(image_id, image, detections, target, mistakes)
                kept.pop(last, None)  # type: ignore[arg-type]

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gathers what all processes found, once, and shows it."""
        if not self._is_due(trainer):
            return
        most = self.max_pictures
        offers = of_all(trainer, (list(self._fixed), [scene.badness for scene in self._worst.values()]))
        fixed = set(sorted({k for ids, _ in offers for k in ids}, key=spread_rank)[:most])
        worst = {k for _, k in sorted({badness for _, badnesses in offers for badness in badnesses})[:most]}
        if not fixed:  # a module without detections
            return
        metric: Any = getattr(pl_module, "val_map", None)
        if isinstance(metric, BoxMeanAveragePrecision):
            metric.compute()  # what the module has computed already, unless it has not: then this is a collective
        else:
            metric = None
        found: list[_Scene] = gather(
            trainer, [scene for k, scene in {**self._fixed, **self._worst}.items() if k in fixed | worst]
        )
        self._forget()
        shown: _Shown = ({}, {})
        if trainer.is_global_zero:
            by_id = {scene.image_id: scene for scene in found}  # a padding sample comes twice
            chosen = [by_id[k] for k in sorted(fixed)], sorted((by_id[k] for k in worst), key=lambda s: s.badness)
            # now that their order is settled, they are called as in the annotation file
            own_id, _ = own_terms(trainer.val_dataloaders)
            named = [[scene._replace(image_id=own_id(scene.image_id)) for scene in scenes] for scenes in chosen]
            shown = self._compose(pl_module, metric, *named)
        publish(trainer, *shown)

    def _compose(
        self, pl_module: pl.LightningModule, metric: Any, fixed: Sequence[_Scene], worst: Sequence[_Scene]
    ) -> _Shown:
        names = _names(pl_module, [*fixed, *worst])
        sheets = {
            "val/pictures": (f"{counted(len(fixed), 'validation picture')}, always the same", fixed),
            "val/worst_pictures": (f"{counted(len(worst), 'validation picture')} with the most mistakes", worst),
        }
        figures: dict[str, Callable[[], Any]] = {
            name: lambda title=title, scenes=scenes: draw_detection_sheet(  # type: ignore[misc]
                [_sheet_picture(scene) for scene in scenes], names, title, min_score=self.min_score
            )
            for name, (title, scenes) in sheets.items()
        }
        objects = {"val/boxes": lambda: _boxes_table({"fixed": fixed, "worst": worst}, names)}
        if metric is not None and metric.classes:
            curves = (
                metric.precision,
                [names[label - 1] for label in metric.classes],
                metric.iou_thresholds,
                metric.recall_thresholds,
            )
            figures["val/precision_recall"] = lambda: draw_precision_recall(*curves)
            objects["val/precision_recall_chart"] = lambda: _precision_recall_chart(metric)
            objects["val/class_ap"] = lambda: _ap_table(metric.per_class, names)
        return figures, objects


def count_mistakes(detections: Mapping[str, Tensor], target: Mapping[str, Tensor], min_score: float) -> int:
    """Counts the objects that no box finds, and the boxes that find none.

    A box of at least that score finds the object of its class that it overlaps most, by an IoU of at least 0.5, unless
    a box of higher score has found it. Crowds need not be found, and boxes within one of their class are no mistake.

    Args:
        detections: ``boxes`` (D, 4) xyxy, ``scores`` (D,) and ``labels`` (D,), on the CPU.
        target: ``boxes`` (M, 4) and ``labels`` (M,), optionally ``iscrowd`` (M,), on the CPU.
        min_score: boxes below it do not count.
    """
    order = detections["scores"].argsort(descending=True, stable=True)
    order = order[detections["scores"][order] >= min_score]
    boxes, labels = detections["boxes"][order], detections["labels"][order]
    crowds = target["iscrowd"].bool() if "iscrowd" in target else torch.zeros_like(target["labels"], dtype=torch.bool)
    same = target["labels"][:, None] == labels[None]
    overlaps = box_iou(target["boxes"], boxes) * same
    inside = (_intersections(target["boxes"], boxes) * same)[crowds].sum(dim=0)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    overlaps[crowds] = 0
    found = wrong = 0
    for k in range(len(boxes)):
        if len(overlaps) and float(overlaps[:, k].max()) >= _FOUND_AT:
            overlaps[overlaps[:, k].argmax()] = 0
            found += 1
        elif float(inside[k]) < _FOUND_AT * float(areas[k]):
            wrong += 1
    return wrong + int((~crowds).sum()) - found


def _is_detected(batch: Any, detections: Any) -> bool:
    """Whether a batch is lists of pictures and of targets, with as many detections."""
    if not isinstance(batch, tuple | list) or len(batch) < 2 or not isinstance(detections, list | tuple):
        return False
    images, targets = batch[:2]
    if not isinstance(targets, list | tuple) or not len(images) == len(targets) == len(detections):
        return False
    parts = [(found, {"boxes", "labels", "scores"}) for found in detections]
    parts += [(target, {"boxes", "labels", "image_id"}) for target in targets]
    return all(isinstance(part, Mapping) and keys <= part.keys() for part, keys in parts)


def _intersections(some: Tensor, others: Tensor) -> Tensor:
    """Areas (M, D) that boxes (M, 4) and (D, 4) have in common."""
    start = torch.maximum(some[:, None, :2], others[None, :, :2])
    end = torch.minimum(some[:, None, 2:], others[None, :, 2:])
    return (end - start).clamp(min=0).prod(dim=2)


def _by_spread(image_id: int, mistakes: int) -> int:
    return spread_rank(image_id)


def _by_mistakes(image_id: int, mistakes: int) -> tuple[int, int]:
    return (-mistakes, image_id)


def _scene(
    image_id: int, image: Tensor, detections: dict[str, Tensor], target: dict[str, Tensor], mistakes: int
) -> _Scene:
    picture = Image.fromarray(to_dtype(image.detach(), torch.uint8, scale=True).permute(1, 2, 0).cpu().numpy())
    size = picture.size
    picture.thumbnail((_LONGEST, _LONGEST))
    return _Scene(image_id, picture, size, detections, target, mistakes)


def _names(pl_module: pl.LightningModule, scenes: Sequence[_Scene]) -> list[str]:
    if getattr(pl_module, "class_names", None) is not None or getattr(pl_module, "category_ids", None) is not None:
        return classes_of(pl_module)[0]
    labels = [part["labels"] for scene in scenes for part in (scene.detections, scene.target)]
    return [str(k) for k in range(1, max((int(some.max()) for some in labels if len(some)), default=0) + 1)]


def _sheet_picture(scene: _Scene) -> SheetPicture:
    caption = f"image {scene.image_id}, {counted(scene.mistakes, 'mistake')}"
    return SheetPicture(scene.picture, scene.size, scene.detections, scene.target, caption)


def _boxes_table(shown: Mapping[str, Sequence[_Scene]], names: Sequence[str]) -> Any:
    import wandb

    table = wandb.Table(columns=["shown", "picture", "image id", "objects", "mistakes"])
    for kind, scenes in shown.items():
        for scene in scenes:
            objects = len(scene.target["labels"])
            table.add_data(kind, _overlay(scene, names), scene.image_id, objects, scene.mistakes)
    return table


def _overlay(scene: _Scene, names: Sequence[str]) -> Any:
    import wandb

    scores = scene.detections["scores"]
    best = scores.argsort(descending=True, stable=True)[:_MOST_BOXES]
    best = best[scores[best] >= _LOWEST_SCORE]
    found = {key: scene.detections[key][best].tolist() for key in ("boxes", "labels", "scores")}
    predictions = [
        {**_box(box, label, scene.size, f"{names[label - 1]} {score:.0%}"), "scores": {"score": score}}
        for box, label, score in zip(*found.values(), strict=True)
    ]
    truth = [
        _box(box, label, scene.size, names[label - 1])
        for box, label in zip(scene.target["boxes"].tolist(), scene.target["labels"].tolist(), strict=True)
    ]
    labels = dict(enumerate(names, start=1))
    return wandb.Image(
        scene.picture,
        boxes={
            "predictions": {"box_data": predictions, "class_labels": labels},
            "ground_truth": {"box_data": truth, "class_labels": labels},
        },
        classes=[{"id": label, "name": name} for label, name in labels.items()],
    )


def _box(box: Sequence[float], label: int, size: tuple[int, int], caption: str) -> dict[str, Any]:
    (x0, y0, x1, y1), (width, height) = box, size
    position = {"minX": x0 / width, "minY": y0 / height, "maxX": x1 / width, "maxY": y1 / height}
    return {"position": position, "class_id": label, "box_caption": caption}


def _ap_table(per_class: Mapping[int, Mapping[str, float]], names: Sequence[str]) -> Any:
    import wandb

    rows = [
        [name, *(per_class.get(label, {}).get(key) for key in MEASURES)] for label, name in enumerate(names, start=1)
    ]
    return wandb.Table(columns=["class", *MEASURES.values()], data=rows)


def _precision_recall_chart(metric: BoxMeanAveragePrecision) -> Any:
    import wandb

    assert metric.precision is not None
    overall = metric.precision.mean(axis=2)
    half, three_quarters = (int(np.argmin(np.abs(metric.iou_thresholds - iou))) for iou in (0.5, 0.75))
    return wandb.plot.line_series(
        metric.recall_thresholds.tolist(),
        [overall[half].tolist(), overall[three_quarters].tolist(), overall.mean(axis=0).tolist()],
        keys=["IoU 0.50", "IoU 0.75", "IoU 0.50 to 0.95"],
        title="Precision over recall, mean over the classes",
        xname="recall",
    )
