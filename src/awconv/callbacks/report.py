"""Test and predict as files a person reads: confusion matrix, per-class accuracy, predictions, contact sheet."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.callbacks import Callback

from awconv.callbacks.figures import draw_confusion_matrix, draw_contact_sheet, save_png
from awconv.errors import InputError

if TYPE_CHECKING:
    import lightning.pytorch as pl
TOP = 5  # classes told for every prediction

# A picture's path and its most probable classes with their probabilities, best first.
_Prediction = tuple[str, list[tuple[str, float]]]
# What each file is called, for people, and how its contents get into a given path.
_Files = dict[str, tuple[str, Callable[[Path], None]]]


class ClassificationReport(Callback):
    """Writes what a test and a prediction found into the run's folder, and prints the paths at the end.

    The folder is ``trainer.log_dir``, or ``trainer.default_root_dir`` where there is none.

    - After ``test``: ``confusion_matrix.png`` and ``per_class_accuracy.csv``, from
      ``pl_module.test_confusion`` (a torchmetrics ``MulticlassConfusionMatrix``) and
      ``pl_module.class_names``.
    - After ``predict``: ``predictions.csv`` and ``predictions.png`` (a contact sheet), from the dictionaries
      ``{"path": list of N str, "probabilities": (N, K) float tensor}`` that ``predict_step`` returns.
      Samples whose path is empty are padding and are dropped; the rest is sorted by path, so that the files
      do not depend on the number of processes.

    A module without these is left alone, so the callback may stand in a trainer shared with other tasks.

    Every file appears whole or not at all. A file that this callback wrote itself is replaced when the same
    trainer tests or predicts again; a file that was there before is never touched, and the new ones are then
    numbered (``predictions_2.csv``, ``predictions_2.png``). With ``fast_dev_run`` everything is computed and
    drawn, but nothing is written, as Lightning writes no logs and checkpoints then.

    Args:
        max_pictures: the most pictures on the contact sheet; of more predictions, so many are shown, evenly
            spaced in the order of ``predictions.csv``.

    Raises:
        InputError: if ``max_pictures`` is below 1.
    """

    def __init__(self, max_pictures: int = 36) -> None:
        if max_pictures < 1:
            raise InputError(f"max_pictures={max_pictures}: expected at least 1")
        self.max_pictures = max_pictures
        self._confusion: npt.NDArray[np.int64] | None = None
        self._predictions: list[_Prediction] = []
        self._written: set[Path] = set()
        self._announcements: list[str] = []

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reads the confusion matrix, on every rank since that is a collective, before anyone resets it."""
        metric: Any = getattr(pl_module, "test_confusion", None)
        self._confusion = None if metric is None else metric.compute().cpu().numpy()

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the confusion matrix and the per-class accuracies."""
        if self._confusion is None:
            return
        confusion, self._confusion = self._confusion, None
        names = _class_names(pl_module, len(confusion))
        self._write(
            trainer,
            {
                "per_class_accuracy.csv": (
                    "per-class accuracy",
                    lambda path: _write_accuracies(path, confusion, names),
                ),
                "confusion_matrix.png": (
                    "confusion matrix",
                    lambda path: save_png(path, draw_confusion_matrix(confusion, names)),
                ),
            },
        )

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forgets what an earlier, perhaps interrupted, prediction left."""
        self._predictions = []

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the paths and the most probable classes of one batch.

        Raises:
            InputError: if ``pl_module.class_names`` has not one name for each of the K probabilities.
        """
        if not isinstance(outputs, Mapping) or not {"path", "probabilities"} <= outputs.keys():
            return
        probabilities = outputs["probabilities"].detach().float().cpu()
        names = _class_names(pl_module, probabilities.shape[1])
        # A stable sort, unlike topk, gives ties to the lower class on every device.
        values, classes = (
            ordered[:, :TOP].tolist() for ordered in probabilities.sort(dim=1, descending=True, stable=True)
        )
        self._predictions += [
            (path, [(names[k], value) for k, value in zip(*top, strict=True)])
            for path, *top in zip(outputs["path"], classes, values, strict=True)
            if path
        ]

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gathers all processes' predictions on rank 0, once, and writes them."""
        predictions, self._predictions = self._predictions, []
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # Also where this rank has nothing: the others wait for it.
            gathered: list[Any] | None = [None] * trainer.world_size if trainer.is_global_zero else None
            torch.distributed.gather_object(predictions, gathered)
            predictions = [prediction for of_rank in gathered or [] for prediction in of_rank]
        predictions.sort(key=lambda prediction: prediction[0])
        files: _Files = {
            "predictions.csv": ("predictions", lambda path: _write_predictions(path, predictions)),
            "predictions.png": (
                "contact sheet",
                lambda path: save_png(
                    path,
                    draw_contact_sheet(
                        [file for file, _ in predictions],
                        [top[0][0] for _, top in predictions],
                        [top[0][1] for _, top in predictions],
                        max_pictures=self.max_pictures,
                    ),
                ),
            ),
        }
        # Every rank calls it, though only rank 0 has predictions now: to find the folder is a collective.
        self._write(trainer, files if predictions else {})

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Prints the paths, below Lightning's own table of results."""
        for line in self._announcements:
            print(line)
        self._announcements = []

    def _write(self, trainer: pl.Trainer, files: _Files) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        if not trainer.is_global_zero:
            return
        if getattr(trainer, "fast_dev_run", False):
            with TemporaryDirectory() as scratch:
                for name, (_, write) in files.items():
                    write(Path(scratch, name))
            return
        folder.mkdir(parents=True, exist_ok=True)
        for number in count(1):
            suffix = f"_{number}" if number > 1 else ""
            paths = [folder / f"{Path(name).stem}{suffix}{Path(name).suffix}" for name in files]
            if all(path in self._written or not path.exists() for path in paths):
                break
        for path, (label, write) in zip(paths, files.values(), strict=True):
            # Hidden, and in the same folder: os.replace is atomic only within one file system.
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            try:
                write(temporary)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            self._written.add(path)
            shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
            self._announcements.append(f"{label}: {shown}")


def _class_names(pl_module: pl.LightningModule, classes: int) -> list[str]:
    names: Any = getattr(pl_module, "class_names", None)
    if names is None:
        return [str(k) for k in range(classes)]
    if len(names) != classes:
        raise InputError(
            f"class_names of {type(pl_module).__name__} has {len(names)} names: "
            f"expected {classes}, one for each output of the model"
        )
    return [str(name) for name in names]


def _write_accuracies(path: Path, confusion: npt.NDArray[np.int64], names: Sequence[str]) -> None:
    _write_csv(
        path,
        ["class", "images", "correct", "accuracy"],
        [
            [name, images, correct, f"{correct / images:.6f}" if images else ""]
            for name, images, correct in zip(
                names, confusion.sum(axis=1).tolist(), confusion.diagonal().tolist(), strict=True
            )
        ],
    )


def _write_predictions(path: Path, predictions: Sequence[_Prediction]) -> None:
    ranks = range(1, len(predictions[0][1]) + 1)
    header = ["path", "class", "probability"]
    header += [f"{column}_{rank}" for rank in ranks for column in ("class", "probability")]
    rows = []
    for file, top in predictions:
        fields = [field for name, value in top for field in (name, f"{value:.6f}")]
        rows.append([file, *fields[:2], *fields])
    _write_csv(path, header, rows)


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    # surrogateescape: file names on Linux are bytes, and must come out as they went in.
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
