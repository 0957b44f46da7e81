"""Test and predict as files a person reads: confusion matrix, per-class accuracy, predictions, contact sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from awconv.callbacks.canvas import save_png
from awconv.callbacks.classification_figures import draw_confusion_matrix, draw_contact_sheet
from awconv.callbacks.run_files import Files, PredictionFiles, class_names_of
from awconv.errors import InputError
from awconv.files import write_csv

if TYPE_CHECKING:
    import lightning.pytorch as pl

TOP = 5  # classes told for every prediction

# A picture's path and its most probable classes with their probabilities, best first.
_Prediction = tuple[str, list[tuple[str, float]]]


class ClassificationReport(PredictionFiles):
    """Writes what a test and a prediction found into the run's folder, and prints the paths at the end.

    The folder is ``trainer.log_dir``, or ``trainer.default_root_dir`` where there is none.

    - After ``test``: ``confusion_matrix.png`` and ``per_class_accuracy.csv``, from
      ``pl_module.test_confusion`` (a torchmetrics ``MulticlassConfusionMatrix``) and
      ``pl_module.class_names``.
    - After ``predict``: ``predictions.csv`` and ``predictions.png`` (a contact sheet), from the dictionaries
      ``{"path": list of N str, "probabilities": (N, K) float tensor}`` that ``predict_step`` returns.
      Samples whose path is empty are padding and are dropped; the rest is sorted by path, so that the files
      do not depend on the number of processes. What ``predict`` skipped is in ``skipped.csv``; see
      :class:`PredictionFiles`, also for what an interrupted prediction leaves.

    A module without these is left alone, so the callback may stand in a trainer shared with other tasks.

    What becomes of files that are there already, and of ``fast_dev_run``, see :class:`RunFiles`.

    Args:
        max_pictures: the most pictures on the contact sheet; of more predictions, so many are shown, evenly
            spaced in the order of ``predictions.csv``.

    Raises:
        InputError: if ``max_pictures`` is below 1.
    """

    def __init__(self, max_pictures: int = 36) -> None:
        if max_pictures < 1:
            raise InputError(f"max_pictures={max_pictures}: expected at least 1")
        super().__init__()
        self.max_pictures = max_pictures
        self._confusion: npt.NDArray[np.int64] | None = None

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reads the confusion matrix, on every rank since that is a collective, before anyone resets it."""
        metric: Any = getattr(pl_module, "test_confusion", None)
        self._confusion = None if metric is None else metric.compute().cpu().numpy()

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the confusion matrix and the per-class accuracies."""
        if self._confusion is None:
            return
        confusion, self._confusion = self._confusion, None
        names = class_names_of(pl_module, len(confusion))
        self.write(
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

    def read(self, pl_module: pl.LightningModule, outputs: Any, batch: Any) -> list[_Prediction] | None:
        """Gives the paths and the most probable classes of one batch.

        Raises:
            InputError: if ``pl_module.class_names`` has not one name for each of the K probabilities.
        """
        if not isinstance(outputs, Mapping) or not {"path", "probabilities"} <= outputs.keys():
            return None
        probabilities = outputs["probabilities"].detach().float().cpu()
        names = class_names_of(pl_module, probabilities.shape[1])
        # A stable sort, unlike topk, gives ties to the lower class on every device.
        values, classes = (
            ordered[:, :TOP].tolist() for ordered in probabilities.sort(dim=1, descending=True, stable=True)
        )
        return [
            (path, [(names[k], value) for k, value in zip(*top, strict=True)])
            for path, *top in zip(outputs["path"], classes, values, strict=True)
        ]

    def line(self, pl_module: pl.LightningModule, prediction: _Prediction) -> dict[str, Any]:
        """Gives a prediction as JSON: the path, and the classes with their probabilities."""
        path, top = prediction
        return {"path": path, "classes": [{"class": name, "probability": value} for name, value in top]}

    def files(self, pl_module: pl.LightningModule, predicted: list[_Prediction]) -> Files:
        """Gives the table and the contact sheet."""
        return {
            "predictions.csv": ("predictions", lambda path: _write_predictions(path, predicted)),
            "predictions.png": (
                "contact sheet",
                lambda path: save_png(
                    path,
                    draw_contact_sheet(
                        [file for file, _ in predicted],
                        [top[0][0] for _, top in predicted],
                        [top[0][1] for _, top in predicted],
                        max_pictures=self.max_pictures,
                    ),
                ),
            ),
        }


def _write_accuracies(path: Path, confusion: npt.NDArray[np.int64], names: Sequence[str]) -> None:
    write_csv(
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
    write_csv(path, header, rows)
