"""What torchmetrics lacks: COCO mAP that equals the official one and does not depend on batches or processes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster  # type: ignore[import-untyped]
from torch import Tensor
from torch import distributed as dist
from torchmetrics import Metric

from awconv.errors import InputError, require

_AREAS = ("all", "small", "medium", "large")
_AREA_RANGES = ((0, 1e5**2), (0, 32**2), (32**2, 96**2), (96**2, 1e5**2))
_MAX_DETECTIONS = (1, 10, 100)


# eq=False keeps the hash of the object's identity: torchmetrics hashes every element of a state
@dataclass(frozen=True, eq=False, slots=True)
class _Image:
    """Detections (D) and ground truth (M) of one image; boxes are xyxy, in the precision they came in."""

    image_id: int
    boxes: np.ndarray  # (D, 4)
    scores: np.ndarray  # (D,)
    labels: np.ndarray  # (D,)
    target_boxes: np.ndarray  # (M, 4)
    target_labels: np.ndarray  # (M,)
    target_areas: np.ndarray  # (M,) float64
    target_crowds: np.ndarray  # (M,) bool

    @property
    def counts(self) -> np.ndarray:
        """(M,) which ground truth there is to find: no crowds, and nothing beyond COCO's largest range of areas."""
        low, high = _AREA_RANGES[_AREAS.index("all")]
        return ~self.target_crowds & (self.target_areas >= low) & (self.target_areas <= high)


class BoxMeanAveragePrecision(Metric):
    """COCO's mean average precision of boxes, as pycocotools computes it and several times faster.

    AP is averaged over the IoU thresholds 0.50, 0.55, ..., 0.95 and 101 recall thresholds, for the 100 best detections
    of an image and class; crowds are ignored as COCO says (Lin et al. 2014, arXiv 1405.0312; pycocotools'
    ``COCOeval``). Everything is computed once, from all images of the epoch, so that neither the batch size, nor the
    order of the images, nor the number of processes changes a digit. An image that comes twice, as it does where a
    sampler pads the last batch, counts once, the first time.

    Call :meth:`update` on every batch, :meth:`compute` once after the epoch on **every** process, then ``reset()``.
    Under several processes all images are gathered in one go on process 0, which computes; the others are sent the
    values. The state stays on the CPU and is no part of checkpoints.

    After :meth:`compute`, until the next ``update`` or ``reset``, process 0 also has the following, which are None
    everywhere else and at any other time:

    Attributes:
        classes: The labels that have ground truth (crowds apart), sorted. K is their number.
        precision: Interpolated precision (10 IoU thresholds, 101 recall thresholds, K) for objects of every size and
            100 detections: ``precision[0, :, k]`` is the precision-recall curve of ``classes[k]`` at an IoU of 0.50.
        per_class: The values of :meth:`compute` for each class by itself, as ``{label: {"map": ..., ...}}``.
        iou_thresholds: (10,) what ``precision``'s first axis stands for; always there.
        recall_thresholds: (101,) what its second axis stands for; always there.

    Args:
        class_metrics: Also return each class's AP, under ``map/<label>``.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    iou_thresholds = np.linspace(0.5, 0.95, 10)
    recall_thresholds = np.linspace(0.0, 1.0, 101)

    images: list[_Image]

    def __init__(self, class_metrics: bool = False) -> None:
        # torchmetrics would gather the state tensor by tensor
        super().__init__(sync_on_compute=False)
        self.class_metrics = class_metrics
        self.add_state("images", default=[], dist_reduce_fx=None, persistent=False)
        self._forget()

    def _forget(self) -> None:
        self._evaluated: list[_Image] | None = None
        self.classes: list[int] | None = None
        self.precision: np.ndarray | None = None
        self.per_class: dict[int, dict[str, float]] | None = None

    def update(self, preds: Sequence[Mapping[str, Tensor]], targets: Sequence[Mapping[str, Any]]) -> None:
        """Takes in the detections and the ground truth of a batch, in torchvision's format.

        Args:
            preds: One mapping an image: ``boxes`` (D, 4) xyxy in pixels, ``scores`` (D,) and ``labels`` (D,).
            targets: One mapping an image, in the same order: ``image_id`` (an integer), ``boxes`` (M, 4) xyxy in
                pixels and ``labels`` (M,); optionally ``area`` (M,), which decides between small, medium and large
                (width times height if absent), and ``iscrowd`` (M,) (none if absent). An image without annotations
                has boxes of shape (0, 4).

        Raises:
            InputError: If a key is missing, or a shape, type or value is not as above. Nothing of the batch is kept.
        """
        for name, value in (("preds", preds), ("targets", targets)):
            require(
                isinstance(value, Sequence) and all(isinstance(item, Mapping) for item in value),
                name,
                type(value).__name__,
                "a list of dicts, one an image",
            )
        if len(preds) != len(targets):
            raise InputError(f"preds has {len(preds)} images, targets {len(targets)}: expected one of each an image")
        read = [_read(n, pred, target) for n, (pred, target) in enumerate(zip(preds, targets, strict=True))]
        self._forget()
        self.images.extend(read)

    def forward(self, preds: Sequence[Mapping[str, Tensor]], targets: Sequence[Mapping[str, Any]]) -> None:
        """Updates, and returns nothing: AP is no mean over batches, so that of a batch would say nothing."""
        self.update(preds, targets)

    def compute(self) -> dict[str, Tensor]:
        """Computes AP and AR of all images seen since the last reset, on all processes.

        Returns:
            Scalars from 0 to 1: ``map``, ``map_50`` and ``map_75`` (AP over all IoU thresholds, at 0.50 and at 0.75),
            ``map_small``, ``map_medium`` and ``map_large`` (objects of up to 32², 96² and more square pixels),
            ``mar_1``, ``mar_10`` and ``mar_100`` (recall at 1, 10 and 100 detections an image and class). What has no
            ground truth is left out: a size, or with no ground truth at all everything.

        Raises:
            RuntimeError: On every process, if process 0 failed; process 0 raises what it met.
        """
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            values = self._evaluate_together()
        else:
            values = self._evaluate(self.images)
        # MPS knows no float64
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        return {name: torch.tensor(value, dtype=dtype, device=self.device) for name, value in values.items()}

    def _evaluate_together(self) -> dict[str, float]:
        first = dist.get_rank() == 0
        gathered: list[Any] | None = [None] * dist.get_world_size() if first else None
        dist.gather_object(self.images, gathered, dst=0)
        # values and what went wrong: a process 0 that raised before it broadcast would leave the others waiting
        outcome: list[Any] = [{}, None]
        failure = None
        if gathered is not None:
            try:
                outcome[0] = self._evaluate([image for images in gathered for image in images])
            except Exception as error:
                failure = error
                outcome[1] = f"{type(error).__name__}: {error}"
        dist.broadcast_object_list(outcome, src=0)
        if failure is not None:
            raise failure
        if outcome[1] is not None:
            raise RuntimeError(f"process 0 could not compute mAP: {outcome[1]}")
        values: dict[str, float] = outcome[0]
        return values

    def _evaluate(self, images: Sequence[_Image]) -> dict[str, float]:
        unique: dict[int, _Image] = {}
        for image in images:
            unique.setdefault(image.image_id, image)
        # ties between scores are broken by the order of the images, as in pycocotools
        evaluated = [unique[image_id] for image_id in sorted(unique)]
        classes = sorted({label for image in evaluated for label in image.target_labels[image.counts].tolist()})
        precision, recall = _precision_and_recall(evaluated, classes, self.iou_thresholds, self.recall_thresholds)
        per_class = {
            label: _summary(precision[:, :, k : k + 1], recall[:, k : k + 1]) for k, label in enumerate(classes)
        }
        self._evaluated, self.classes, self.per_class = evaluated, classes, per_class
        self.precision = precision[..., _AREAS.index("all"), _MAX_DETECTIONS.index(100)]
        values = _summary(precision, recall)
        if self.class_metrics:
            values |= {f"map/{label}": scores["map"] for label, scores in per_class.items()}
        return values

    def results(self, category_ids: Sequence[int | str] | None = None) -> list[dict[str, Any]] | None:
        """Gives all detections in COCO's results format, ready for ``json.dump`` and for pycocotools' ``loadRes``.

        They are there even if no image has ground truth.

        Args:
            category_ids: The data set's category ids in the order of the labels: label 1 is ``category_ids[0]``. None
                takes the label itself as the id.

        Returns:
            ``{"image_id", "category_id", "bbox": [x, y, width, height], "score"}`` for every detection, by image id
            and falling score, each image once. None except on process 0 after :meth:`compute`.

        Raises:
            InputError: If a label has no category id.
        """
        if self._evaluated is None:
            return None
        results = []
        for image in self._evaluated:
            order = np.argsort(-image.scores, kind="stable")
            for label, box, score in _rows(image.labels[order], _xywh(image.boxes[order]), image.scores[order]):
                if category_ids is not None and not 1 <= label <= len(category_ids):
                    raise InputError(
                        f"label {label}, detected on image {image.image_id}, has no category id: expected 1 to "
                        f"{len(category_ids)}, the number of category_ids"
                    )
                category_id = label if category_ids is None else category_ids[label - 1]
                category_id = category_id if isinstance(category_id, str) else int(category_id)
                results.append({"image_id": image.image_id, "category_id": category_id, "bbox": box, "score": score})
        return results

    def reset(self) -> None:
        """Forgets all images and what was computed from them."""
        super().reset()
        self._forget()

    def _apply(self, fn: Any, exclude_state: Sequence[str] = ()) -> Any:
        # the state is numpy's, and has no device to move to
        return super()._apply(fn, exclude_state=(*exclude_state, "images"))


def _precision_and_recall(
    images: Sequence[_Image], classes: Sequence[int], iou_thresholds: np.ndarray, recall_thresholds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Runs COCO's evaluation; -1 stands for a class without ground truth of a size.

    Returns:
        Precision (T, R, K, A, M) and recall (T, K, A, M) over T IoU thresholds, R recall thresholds, K classes, the A
        of `_AREAS` and the M of `_MAX_DETECTIONS`.
    """
    sizes = (len(classes), len(_AREAS), len(_MAX_DETECTIONS))
    if not classes:
        return np.empty((len(iou_thresholds), len(recall_thresholds), *sizes)), np.empty((len(iou_thresholds), *sizes))
    # Ids of its own: faster-coco-eval holds the user's as doubles, and takes an annotation's 0 for "unmatched".
    category = {label: k for k, label in enumerate(classes, start=1)}
    truths: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []
    for n, image in enumerate(images, start=1):
        for label, box, area, crowd in _rows(
            image.target_labels, _xywh(image.target_boxes), image.target_areas, image.target_crowds
        ):
            if label in category:
                truths.append(
                    {
                        "id": len(truths) + 1,
                        "image_id": n,
                        "category_id": category[label],
                        "bbox": box,
                        "area": area,
                        "iscrowd": int(crowd),
                    }
                )
        for label, box, score in _rows(image.labels, _xywh(image.boxes), image.scores):
            # a class without ground truth has no AP, however much of it was detected
            if label in category:
                detections.append(
                    {
                        "id": len(detections) + 1,
                        "image_id": n,
                        "category_id": category[label],
                        "bbox": box,
                        "area": box[2] * box[3],
                        "score": score,
                    }
                )
    common = {
        "images": [{"id": n} for n in range(1, len(images) + 1)],
        "categories": [{"id": k} for k in category.values()],
    }
    evaluator = COCOeval_faster(
        COCO({**common, "annotations": truths}, print_function=_silent),
        COCO({**common, "annotations": detections}, print_function=_silent),
        "bbox",
        print_function=_silent,
    )
    parameters = evaluator.params
    parameters.iouThrs, parameters.recThrs = iou_thresholds, recall_thresholds
    parameters.maxDets = list(_MAX_DETECTIONS)
    parameters.areaRng, parameters.areaRngLbl = [list(bounds) for bounds in _AREA_RANGES], list(_AREAS)
    evaluator.evaluate()
    evaluator.accumulate()
    return evaluator.eval["precision"], evaluator.eval["recall"]


def _summary(precision: np.ndarray, recall: np.ndarray) -> dict[str, float]:
    """Averages precision (T, R, K, A, M) and recall (T, K, A, M) to COCO's summary, less what has no ground truth."""
    best, every = _MAX_DETECTIONS.index(100), _AREAS.index("all")
    numbers = {"map": precision[:, :, :, every, best]}
    numbers["map_50"], numbers["map_75"] = numbers["map"][:1], numbers["map"][5:6]
    numbers |= {f"map_{size}": precision[:, :, :, a, best] for a, size in enumerate(_AREAS) if size != "all"}
    numbers |= {f"mar_{count}": recall[:, :, every, m] for m, count in enumerate(_MAX_DETECTIONS)}
    return {name: float(values[values > -1].mean()) for name, values in numbers.items() if (values > -1).any()}


def _xywh(boxes: np.ndarray) -> np.ndarray:
    """Turns corners (N, 4) into x, y, width and height, in double precision: float32 would lose digits."""
    boxes = boxes.astype(np.float64)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def _rows(*columns: np.ndarray) -> Iterator[tuple[Any, ...]]:
    """Goes through arrays of one length side by side, as Python's own numbers."""
    return zip(*(column.tolist() for column in columns), strict=True)


def _silent(*_: Any) -> None:
    pass


# ---- what comes in ------------------------------------------------------------------------------------------------


def _read(n: int, pred: Mapping[str, Tensor], target: Mapping[str, Any]) -> _Image:
    """Checks and copies what image `n` of a batch brings."""
    found, truth = f"preds[{n}]", f"targets[{n}]"
    boxes = _read_boxes(found, pred)
    target_boxes = _read_boxes(truth, target)
    if target.get("area") is None:
        sides = _xywh(target_boxes)
        areas = sides[:, 2] * sides[:, 3]
    else:
        areas = _read_numbers(truth, target, "area", (len(target_boxes),)).astype(np.float64)
    if target.get("iscrowd") is None:
        crowds = np.zeros(len(target_boxes), dtype=bool)
    else:
        crowds = _read_integers(truth, target, "iscrowd", len(target_boxes)) != 0
    return _Image(
        image_id=_read_image_id(truth, target),
        boxes=boxes,
        scores=_read_numbers(found, pred, "scores", (len(boxes),)),
        labels=_read_integers(found, pred, "labels", len(boxes)),
        target_boxes=target_boxes,
        target_labels=_read_integers(truth, target, "labels", len(target_boxes)),
        target_areas=areas,
        target_crowds=crowds,
    )


def _read_image_id(owner: str, source: Mapping[str, Any]) -> int:
    if "image_id" not in source:
        raise InputError(f"{owner} has no 'image_id': expected an integer that tells the image from all others")
    value = source["image_id"]
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    ok = isinstance(value, int | np.integer) and not isinstance(value, bool)
    require(ok, f"{owner}['image_id']", value, "an integer, or a tensor of one")
    return int(value)


def _read_tensor(owner: str, source: Mapping[str, Any], key: str, shape: tuple[int | None, ...]) -> Tensor:
    if key not in source:
        raise InputError(f"{owner} has no {key!r}: expected a tensor, and found the keys {sorted(map(str, source))}")
    value, name = source[key], f"{owner}[{key!r}]"
    if not isinstance(value, Tensor):
        raise InputError(f"{name} is a {type(value).__name__}: expected a tensor")
    if value.ndim != len(shape) or any(size not in (None, got) for size, got in zip(shape, value.shape, strict=True)):
        expected = f"({', '.join('N' if size is None else str(size) for size in shape)}{',' * (len(shape) == 1)})"
        raise InputError(f"{name} has shape {tuple(value.shape)}: expected {expected}")
    return value.detach().cpu()


def _read_numbers(owner: str, source: Mapping[str, Any], key: str, shape: tuple[int | None, ...]) -> np.ndarray:
    value = _read_tensor(owner, source, key, shape)
    narrow = value.dtype in (torch.float32, torch.float16, torch.bfloat16)
    # a copy: the caller may go on to change its tensor
    numbers = np.array(value.to(torch.float32 if narrow else torch.float64).numpy())
    require(bool(np.isfinite(numbers).all()), f"{owner}[{key!r}]", "NaN or infinite", "finite numbers")
    return numbers


def _read_integers(owner: str, source: Mapping[str, Any], key: str, length: int) -> np.ndarray:
    value = _read_tensor(owner, source, key, (length,))
    ok = not value.is_floating_point() and not value.is_complex()
    require(ok, f"{owner}[{key!r}]", value.dtype, "integers")
    return np.array(value.to(torch.int64).numpy())


def _read_boxes(owner: str, source: Mapping[str, Any]) -> np.ndarray:
    boxes = _read_numbers(owner, source, "boxes", (None, 4))
    if (boxes[:, 2:] < boxes[:, :2]).any():
        worst = boxes[(boxes[:, 2:] < boxes[:, :2]).any(axis=1)][0].tolist()
        raise InputError(f"{owner}['boxes'] holds {worst}: expected corners x1, y1, x2, y2 with x1 <= x2 and y1 <= y2")
    return boxes
