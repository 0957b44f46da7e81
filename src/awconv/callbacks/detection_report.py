"""A detector's test and prediction as files a person reads and others' tools load."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from rich.cells import cell_len, set_cell_size
from torch import Tensor
from torchvision.transforms.v2.functional import to_dtype

from awconv.callbacks.canvas import (
    counted,
    evenly_spaced,
    one_warning_about_glyphs,
    save_png,
    spread_rank,
    upright_picture,
)
from awconv.callbacks.detection_figures import (
    SheetPicture,
    draw_detection_sheet,
    draw_detections,
    draw_precision_recall,
)
from awconv.callbacks.run_files import Files, PredictionFiles, class_names_of, gather, of_all
from awconv.data.coco import COCODataset
from awconv.errors import InputError, printable, require_int, require_number
from awconv.files import write_csv

if TYPE_CHECKING:
    import lightning.pytorch as pl

# COCO's names of what awconv.metrics.BoxMeanAveragePrecision computes.
MEASURES = {
    "map": "AP",
    "map_50": "AP50",
    "map_75": "AP75",
    "map_small": "APs",
    "map_medium": "APm",
    "map_large": "APl",
    "mar_1": "AR1",
    "mar_10": "AR10",
    "mar_100": "AR100",
}
_PRINTED_CLASSES = 20
_JPEG = (".jpg", ".jpeg")
_THUMBNAIL = 1200  # pixels: no tile of a sheet is longer


class _Seen(NamedTuple):
    """A test picture: uint8 (3, H, W), with its detections and ground truth, all on the CPU."""

    image_id: int
    image: Tensor
    detections: dict[str, Tensor]
    target: dict[str, Tensor]


class _Predicted(NamedTuple):
    """A picture file, its width and height as the network saw it, and the detections, on the CPU."""

    path: str
    size: tuple[int, int]
    detections: dict[str, Tensor]


class DetectionReport(PredictionFiles):
    """Writes what a detector's test and prediction found into the run's folder, and prints the AP table and the paths.

    The folder is ``trainer.log_dir``, or ``trainer.default_root_dir`` where there is none.

    - After ``test``, from ``pl_module.test_map`` (an :class:`awconv.metrics.BoxMeanAveragePrecision`, which must
      not be reset before the next test), ``class_names``, ``category_ids`` (1..K where the module has none) and
      the ``{"detections": list of torchvision's dicts}`` that ``test_step`` returns for its batch
      ``(images, targets)``: ``results.json`` (COCO's results format, of a :class:`awconv.data.coco.COCODataset` in
      the ids and the pixels of its annotation file), ``ap_table.csv``, ``precision_recall.png`` and
      ``test_pictures.png``. Without ground truth, only the first and the last, and
      a line that says so.
    - After ``predict``, from the ``{"path": list of str, "detections": list of dicts}`` that ``predict_step``
      returns for its batch ``(images, paths)``: ``predictions.json`` (COCO's results format, with the file name
      added), ``pictures.json`` (the images and categories that those results refer to), ``predictions.png`` (a
      contact sheet) and the folder ``predictions/`` with every picture and its boxes. Samples whose path is empty
      are padding and are dropped; the rest is sorted by path. What was skipped is in ``skipped.csv``; see
      :class:`PredictionFiles`, also for what an interrupted prediction leaves.

    None of these depends on the batch size or the number of processes. A module without ``test_map``, or without
    detections to predict, is left alone, so the callback may stand in a trainer shared with other tasks.

    What becomes of files that are there already, and of ``fast_dev_run``, see :class:`RunFiles`.

    Args:
        min_score: detections below it are not drawn; the JSON files hold all.
        max_pictures: the most pictures on a sheet.

    Raises:
        InputError: if an argument is out of range.
    """

    def __init__(self, min_score: float = 0.5, max_pictures: int = 12) -> None:
        require_number("min_score", min_score, "a number from 0 to 1", low=0, high=1)
        require_int("max_pictures", max_pictures, "a whole number, at least 1", low=1)
        super().__init__()
        self.min_score = min_score
        self.max_pictures = max_pictures
        self._seen: dict[int, _Seen] = {}

    # ---- test ------------------------------------------------------------------------------------------------------

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forgets what an earlier, perhaps interrupted, test left."""
        self._seen = {}

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the pictures that are to be on the sheet, as far as is known yet."""
        if not hasattr(pl_module, "test_map") or not isinstance(outputs, Mapping) or "detections" not in outputs:
            return
        for image, target, detections in zip(*batch, outputs["detections"], strict=True):
            image_id = int(target["image_id"])
            ranks = sorted(map(spread_rank, self._seen))[: self.max_pictures]
            if image_id in self._seen or (len(ranks) == self.max_pictures and spread_rank(image_id) > ranks[-1]):
                continue
            self._seen[image_id] = _Seen(image_id, image.cpu().clone(), on_cpu(detections), on_cpu(target))
            self._keep_first(list(self._seen))

    def _keep_first(self, image_ids: Sequence[int]) -> None:
        """Drops what is not among the first of these images."""
        first = set(sorted(set(image_ids), key=spread_rank)[: self.max_pictures])
        self._seen = {image_id: seen for image_id, seen in self._seen.items() if image_id in first}

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the results, the AP table and the figures."""
        metric: Any = getattr(pl_module, "test_map", None)
        if metric is None:
            return
        # What the module has computed already, unless it has not: then this is a collective.
        overall = {name: float(value) for name, value in metric.compute().items()}
        names, ids = classes_of(pl_module)
        # Before the pictures travel, so that only those do that are drawn.
        self._keep_first([image_id for of_rank in of_all(trainer, list(self._seen)) for image_id in of_rank])
        gathered: list[_Seen] = gather(trainer, list(self._seen.values()))
        self._seen = {}
        seen = {entry.image_id: entry for entry in gathered}
        own_id, own_results = own_terms(trainer.test_dataloaders)
        files: Files = {}
        remarks: list[str] = []
        if trainer.is_global_zero:
            files["results.json"] = ("COCO results", lambda path: _write_json(path, own_results(metric.results(ids))))
            if metric.classes:
                remarks = _ap_lines(overall, metric.per_class, names)
                files["ap_table.csv"] = (
                    "AP of every class",
                    lambda path: _write_ap_table(path, overall, metric.per_class, names, ids),
                )
                files["precision_recall.png"] = (
                    "precision and recall",
                    lambda path: save_png(
                        path,
                        draw_precision_recall(
                            metric.precision,
                            [names[label - 1] for label in metric.classes],
                            metric.iou_thresholds,
                            metric.recall_thresholds,
                        ),
                    ),
                )
            else:
                remarks = ["the test set has no annotations: there is no AP, but results.json holds the detections"]
            if seen:
                files["test_pictures.png"] = (
                    "test pictures",
                    lambda path: self._write_test_sheet(
                        path, {own_id(k): seen[k] for k in sorted(seen)}, names, bool(metric.classes)
                    ),
                )
        self.write(trainer, files, remarks)

    def _write_test_sheet(self, path: Path, seen: Mapping[Any, _Seen], names: Sequence[str], scored: bool) -> None:
        pictures = [
            SheetPicture(
                Image.fromarray(to_dtype(entry.image, torch.uint8, scale=True).permute(1, 2, 0).numpy()),
                (entry.image.shape[2], entry.image.shape[1]),
                entry.detections,
                entry.target if scored else None,
                f"image {own_id}",
            )
            for own_id, entry in seen.items()
        ]
        title = counted(len(seen), "test picture")
        save_png(path, draw_detection_sheet(pictures, names, title, min_score=self.min_score))

    # ---- predict ---------------------------------------------------------------------------------------------------

    def read(self, pl_module: pl.LightningModule, outputs: Any, batch: Any) -> list[_Predicted] | None:
        """Gives the detections of one batch."""
        if not isinstance(outputs, Mapping) or not {"path", "detections"} <= outputs.keys():
            return None
        return [
            _Predicted(path, (image.shape[-1], image.shape[-2]), on_cpu(detections))
            for path, detections, image in zip(outputs["path"], outputs["detections"], batch[0], strict=True)
        ]

    def line(self, pl_module: pl.LightningModule, prediction: _Predicted) -> dict[str, Any]:
        """Gives the detections in an image as JSON: COCO's results, with the file's name."""
        _, ids = classes_of(pl_module)
        results = _coco_results([prediction], ids)
        kept = ("category_id", "bbox", "score")
        return {"file_name": prediction.path, "detections": [{key: found[key] for key in kept} for found in results]}

    def files(self, pl_module: pl.LightningModule, predicted: list[_Predicted]) -> Files:
        """Gives the JSON files first: to draw a folder of images takes a while, in which a run may be interrupted."""
        names, ids = classes_of(pl_module)
        return {
            "predictions.json": ("COCO results", lambda path: _write_json(path, _coco_results(predicted, ids))),
            "pictures.json": (
                "what they refer to",
                lambda path: _write_json(path, _coco_pictures(predicted, names, ids)),
            ),
            "predictions.png": ("contact sheet", lambda path: self._write_sheet(path, predicted, names)),
            "predictions": ("pictures", lambda path: self._write_pictures(path, predicted, names)),
        }

    def _write_sheet(self, path: Path, predicted: Sequence[_Predicted], names: Sequence[str]) -> None:
        shown = [predicted[k] for k in evenly_spaced(len(predicted), self.max_pictures)]
        title = counted(len(predicted), "picture")
        if len(shown) < len(predicted):
            title = f"{len(shown)} of {len(predicted)} pictures, evenly spaced"
        pictures = [
            SheetPicture(
                upright_picture(Path(entry.path), _THUMBNAIL), entry.size, entry.detections, None, Path(entry.path).name
            )
            for entry in shown
        ]
        save_png(path, draw_detection_sheet(pictures, names, title, min_score=self.min_score))

    def _write_pictures(self, folder: Path, predicted: Sequence[_Predicted], names: Sequence[str]) -> None:
        folder.mkdir()
        unreadable = []
        with one_warning_about_glyphs():
            for entry, file in zip(predicted, _mirrored([entry.path for entry in predicted]), strict=True):
                picture = upright_picture(Path(entry.path))
                if picture is None:
                    unreadable.append(entry.path)
                    continue
                drawn = draw_detections(picture, entry.detections, names, min_score=self.min_score)
                target = folder / file
                target.parent.mkdir(parents=True, exist_ok=True)
                if target.suffix.lower() in _JPEG:
                    # Chroma at full resolution, without which the edges of the letters fray.
                    drawn.save(target, "JPEG", quality=92, subsampling=0)
                else:
                    drawn.save(target, "PNG")
        if unreadable:
            warnings.warn(
                f"{len(unreadable)} of {len(predicted)} pictures can no longer be read and were not drawn, "
                f"the first is {printable(unreadable[0])}",
                stacklevel=2,
            )


def own_terms(loaders: Any) -> tuple[Callable[[int], Any], Callable[[Any], Any]]:
    """Functions that put an image id and COCO results into the terms of the annotation file.

    They change nothing where the first loader does not read a :class:`awconv.data.coco.COCODataset`.
    """
    dataset = loaders[0] if isinstance(loaders, list | tuple) and loaders else loaders
    while dataset is not None:
        if isinstance(dataset, COCODataset):
            return dataset.own_id, dataset.own_results
        dataset = getattr(dataset, "dataset", None)
    return lambda image_id: image_id, lambda results: results


def classes_of(pl_module: pl.LightningModule) -> tuple[list[str], list[int | str]]:
    """Names and category ids, label 1 first."""
    names: Any = getattr(pl_module, "class_names", None)
    ids: Any = getattr(pl_module, "category_ids", None)
    if names is None and ids is None:
        raise InputError(
            f"{type(pl_module).__name__} has neither class_names nor category_ids: DetectionReport needs one of them "
            "to know the classes"
        )
    ids = list(range(1, len(names) + 1)) if ids is None else [k if isinstance(k, str) else int(k) for k in ids]
    return [str(category_id) for category_id in ids] if names is None else class_names_of(pl_module, len(ids)), ids


def on_cpu(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """What is drawn and written; as copies, since a slice would keep, and send, all that it was cut from."""
    kept = {key: tensors[key].detach().cpu().clone() for key in ("labels", "iscrowd") if key in tensors}
    return kept | {key: tensors[key].detach().float().cpu().clone() for key in ("boxes", "scores") if key in tensors}


# ---- the AP table ------------------------------------------------------------------------------------------------


def _write_ap_table(
    path: Path,
    overall: Mapping[str, float],
    per_class: Mapping[int, Mapping[str, float]],
    names: Sequence[str],
    ids: Sequence[int | str],
) -> None:
    """All classes, then each in the order of the labels; what has no ground truth is left blank."""
    rows = [["", "all classes", *_cells(overall, 6, "")]]
    for label, (category_id, name) in enumerate(zip(ids, names, strict=True), start=1):
        rows.append([str(category_id), name, *_cells(per_class.get(label, {}), 6, "")])
    write_csv(path, ["category_id", "class", *MEASURES.values()], rows)


def _ap_lines(
    overall: Mapping[str, float], per_class: Mapping[int, Mapping[str, float]], names: Sequence[str]
) -> list[str]:
    """The table as aligned text; of more than 20 classes, the 10 of highest and the 10 of lowest AP."""
    rows: list[tuple[str, list[str]]] = [("", list(MEASURES.values())), ("all classes", _cells(overall, 3, "-"))]

    def add(labels: Sequence[int]) -> None:
        rows.extend((printable(names[label - 1]), _cells(per_class.get(label, {}), 3, "-")) for label in labels)

    if len(names) > _PRINTED_CLASSES and len(per_class) > _PRINTED_CLASSES:
        half = _PRINTED_CLASSES // 2
        ranked = sorted(per_class, key=lambda label: -per_class[label]["map"])
        rows.append((f"the {half} of highest AP", []))
        add(ranked[:half])
        rows.append((f"the {half} of lowest AP, of {len(ranked)}", []))
        add(ranked[-half:])
    elif len(names) > 1:
        add(sorted(per_class) if len(names) > _PRINTED_CLASSES else range(1, len(names) + 1))
    # In cells of a terminal, of which a Chinese character takes two.
    rows = [(set_cell_size(name, 30) if cell_len(name) > 30 else name, cells) for name, cells in rows]
    widest = max(cell_len(name) for name, _ in rows)
    return [
        (name + " " * (widest - cell_len(name)) + "".join(f"{cell:>7}" for cell in cells)).rstrip()
        for name, cells in rows
    ]


def _cells(measured: Mapping[str, float], digits: int, absent: str) -> list[str]:
    return [f"{measured[key]:.{digits}f}" if key in measured else absent for key in MEASURES]


# ---- COCO's formats ----------------------------------------------------------------------------------------------


def _coco_results(predicted: Sequence[_Predicted], ids: Sequence[int | str]) -> list[dict[str, Any]]:
    """All detections; image ids count the pictures from 1."""
    results = []
    for image_id, entry in enumerate(predicted, start=1):
        boxes, scores, labels = (entry.detections[key].tolist() for key in ("boxes", "scores", "labels"))
        results += [
            {
                "image_id": image_id,
                "category_id": ids[label - 1],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": score,
                "file_name": entry.path,
            }
            for (x0, y0, x1, y1), score, label in zip(boxes, scores, labels, strict=True)
        ]
    return results


def _coco_pictures(predicted: Sequence[_Predicted], names: Sequence[str], ids: Sequence[int | str]) -> dict[str, Any]:
    """The annotation file, without annotations, that ``loadRes`` wants."""
    images = [
        {"id": image_id, "file_name": entry.path, "width": entry.size[0], "height": entry.size[1]}
        for image_id, entry in enumerate(predicted, start=1)
    ]
    categories = [{"id": category_id, "name": name} for category_id, name in zip(ids, names, strict=True)]
    return {"info": {}, "images": images, "annotations": [], "categories": categories}


def _write_json(path: Path, content: Any) -> None:
    # ASCII, in whose escapes undecodable bytes of file names survive
    path.write_text(json.dumps(content), encoding="ascii")


def _mirrored(paths: Sequence[str]) -> list[Path]:
    """Relative paths as below the pictures' common folder, JPEG or PNG, no two alike even where case is ignored."""
    absolute = [Path(os.path.abspath(path)) for path in paths]
    root = os.path.commonpath([path.parent for path in absolute])
    taken: set[str] = set()
    mirrored = []
    for path in absolute:
        wanted = path.relative_to(root)
        if wanted.suffix.lower() not in _JPEG:
            wanted = wanted.with_suffix(".png")
        file, number = wanted, 1
        while str(file).casefold() in taken:
            number += 1
            file = wanted.with_stem(f"{wanted.stem}_{number}")
        taken.add(str(file).casefold())
        mirrored.append(file)
    return mirrored
