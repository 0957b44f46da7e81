"""Leaving files in a run's folder: whole or not at all, over nobody else's, by one process, and told at the end."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Callback

from awconv.data.pictures import Unreadable
from awconv.errors import InputError, printable
from awconv.files import atomic_write, write_csv

if TYPE_CHECKING:
    import lightning.pytorch as pl

# What each file (or folder) is called, for people, and how its contents get into a given path.
Files = dict[str, tuple[str, Callable[[Path], None]]]


def folder_of(trainer: pl.Trainer) -> Path:
    """The run's folder; a collective."""
    return Path(trainer.log_dir or trainer.default_root_dir)


class RunFiles(Callback):
    """What the reports share: a callback that writes into the run's folder and prints the paths at the end.

    The folder is ``trainer.log_dir``, or ``trainer.default_root_dir`` where there is none.

    Every file appears whole or not at all. A file that this callback wrote itself is replaced when the same
    trainer tests or predicts again; a file that was there before is never touched, and the new ones are then
    numbered (``predictions_2.csv``, ``predictions_2.png``). Tables are CSV files of :func:`awconv.files.write_csv`, for
    a spreadsheet; :func:`awconv.files.read_csv` reads them as they were. With ``fast_dev_run`` everything is computed
    and drawn, but nothing is written, as Lightning writes no logs and checkpoints then.
    """

    def __init__(self) -> None:
        self._written: set[Path] = set()
        self._announcements: list[str] = []

    def write(self, trainer: pl.Trainer, files: Files, remarks: Sequence[str] = ()) -> None:
        """Writes files, all with the same number, and keeps ``remarks`` and the paths to be printed.

        Every process must call it, since to find the folder is a collective; the first one writes.

        Args:
            trainer: whose folder it is.
            files: file name to what it is and the function that writes it, or makes a folder, at a given path.
            remarks: lines to print above the paths.
        """
        folder = folder_of(trainer)
        if not trainer.is_global_zero:
            return
        if getattr(trainer, "fast_dev_run", False):
            with TemporaryDirectory() as scratch:
                for name, (_, write) in files.items():
                    write(Path(scratch, name))
            return
        folder.mkdir(parents=True, exist_ok=True)
        for number in count(1):
            paths = [folder / _numbered(name, number) for name in files]
            if all(path in self._written or not path.exists() for path in paths):
                break
        self._announcements += remarks
        for path, (label, write) in zip(paths, files.values(), strict=True):
            with atomic_write(path) as temporary:
                write(temporary)
            self._written.add(path)
            shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
            self._announcements.append(f"{label}: {shown}")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Prints the paths, below Lightning's own table of results."""
        for line in self._announcements:
            print(printable(line))
        self._announcements = []


class PredictionFiles(RunFiles):
    """What the reports of predictions share: they keep what comes, leave out what could not be read, and tell of it.

    While a prediction runs, each process adds a line of JSON for every image to a file of its own in the run's folder,
    ``predictions.partial.jsonl`` (``predictions.partial.1.jsonl`` is the second process's). They go when all has been
    written in its final form, and so hold what a prediction found that did not come to its end.

    A report says what it needs with :meth:`read`, :meth:`line` and :meth:`files`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._predicted: list[Any] = []
        self._skipped: list[tuple[str, str]] = []
        self._partial: _Partial | None = None

    def read(self, pl_module: pl.LightningModule, outputs: Any, batch: Any) -> list[Any] | None:
        """Gives one prediction for each image of a batch, each a tuple with its path first; None of another task's."""
        raise NotImplementedError

    def line(self, pl_module: pl.LightningModule, prediction: Any) -> dict[str, Any]:
        """Gives a prediction as JSON."""
        raise NotImplementedError

    def files(self, pl_module: pl.LightningModule, predicted: list[Any]) -> Files:
        """Gives the files to write of all predictions, sorted by path; there is at least one."""
        raise NotImplementedError

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forgets what an earlier, perhaps interrupted, prediction left."""
        self._predicted, self._skipped = [], []
        folder = folder_of(trainer)
        self._partial = None if getattr(trainer, "fast_dev_run", False) else _Partial(folder, trainer.global_rank)

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the predictions of one batch."""
        predictions = self.read(pl_module, outputs, batch) or []
        self._skipped += [(p[0].path, p[0].reason) for p in predictions if isinstance(p[0], Unreadable)]
        kept = [prediction for prediction in predictions if prediction[0]]
        self._predicted += kept
        if self._partial is not None and kept:
            self._partial.add([self.line(pl_module, prediction) for prediction in kept])

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Closes the file of what came so far."""
        if self._partial is not None:
            self._partial.close()

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gathers all processes' predictions on the first one, once, and writes them.

        Raises:
            InputError: if no image could be read.
        """
        any_skipped, any_predicted = (any(of_all(trainer, bool(kept))) for kept in (self._skipped, self._predicted))
        predicted = sorted(gather(trainer, self._predicted), key=lambda prediction: prediction[0])
        skipped = sorted(gather(trainer, self._skipped))
        self._predicted, self._skipped = [], []
        files = self.files(pl_module, predicted) if predicted else {}
        remarks = []
        if skipped:
            files["skipped.csv"] = ("skipped", lambda path: write_csv(path, ["path", "reason"], skipped))
            total = len(predicted) + len(skipped)
            remarks = [f"{len(skipped)} of {total} images skipped, such as {skipped[0][0]}: {skipped[0][1]}"]
        # Every process calls it, though only the first has predictions now: to find the folder is a collective.
        self.write(trainer, files, remarks)
        trainer.strategy.barrier()
        if self._partial is not None:
            self._partial.remove()
        if any_skipped and not any_predicted:
            first = f", such as {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
            raise InputError(f"predict_dir: none of its images can be read{first}")


class _Partial:
    """A file of lines of JSON, which is made when the first one comes.

    Args:
        folder: The run's folder.
        rank: Number of the process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank
        self._file: IO[str] | None = None

    def add(self, lines: Sequence[dict[str, Any]]) -> None:
        """Adds lines, and hands them to the operating system, which keeps them whatever happens to the process."""
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = self._new()
        self._file.write("".join(json.dumps(line) + "\n" for line in lines))
        self._file.flush()

    def _new(self) -> IO[str]:
        name = f"predictions.partial{f'.{self._rank}' if self._rank else ''}.jsonl"
        for number in count(1):
            try:  # a prediction that was interrupted may have left one
                return (self._folder / _numbered(name, number)).open("x", encoding="ascii")
            except FileExistsError:
                continue
        raise AssertionError

    def close(self) -> None:
        """Leaves the file as it is."""
        if self._file is not None:
            self._file.close()

    def remove(self) -> None:
        """Removes the file."""
        if self._file is not None:
            self._file.close()
            Path(self._file.name).unlink(missing_ok=True)


def _numbered(name: str, number: int) -> str:
    """The name of a file where others of it may be there already; the first one has no number."""
    path = Path(name)
    return name if number == 1 else f"{path.stem}_{number}{path.suffix}"


def gather(trainer: pl.Trainer, items: list[Any]) -> list[Any]:
    """All processes' items on the first one, in the order of the processes; nothing on the others.

    A collective: a process without items must call it too, as the others wait for it.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return items
    gathered: list[Any] | None = [None] * trainer.world_size if trainer.is_global_zero else None
    torch.distributed.gather_object(items, gathered)
    return [item for of_rank in gathered or [] for item in of_rank]


def of_all(trainer: pl.Trainer, item: Any) -> list[Any]:
    """What every process has, on every process, in their order; a collective, as :func:`gather` is."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [item]
    items: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(items, item)
    return items


def class_names_of(pl_module: pl.LightningModule, classes: int) -> list[str]:
    """The module's ``class_names``; numbers from 0 where it has none.

    Raises:
        InputError: if there are not as many names as ``classes``.
    """
    names: Any = getattr(pl_module, "class_names", None)
    if names is None:
        return [str(k) for k in range(classes)]
    if len(names) != classes:
        raise InputError(
            f"class_names of {type(pl_module).__name__} has {len(names)} names: "
            f"expected {classes}, one for each output of the model"
        )
    return [str(name) for name in names]
