"""metrics.csv, which goes on where a resumed run goes on."""

from pathlib import Path

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from awconv.files import atomic_write, read_csv, write_csv


class MetricsFile(CSVLogger):
    """Lightning's CSVLogger, which keeps what stands in ``metrics.csv`` when a run goes on in its own folder."""

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """What writes the file; a stand-in that does nothing on all processes but the first."""
        if self._experiment is None:
            self._fs.makedirs(self.root_dir, exist_ok=True)
            self._experiment = _AppendingWriter(self.log_dir)
        assert isinstance(self._experiment, ExperimentWriter)
        return self._experiment

    @rank_zero_only
    def forget_from(self, step: int) -> None:
        """Takes out what was logged at ``step`` and later: the run goes on from there, and logs it again."""
        path = Path(self.log_dir, ExperimentWriter.NAME_METRICS_FILE)
        if not path.is_file():
            return
        columns, rows = _read(path)
        _write(path, columns, [row for row in rows if row.get("step") and int(row["step"]) < step])


class _AppendingWriter(ExperimentWriter):
    """Lightning's writer, which would delete the file that it finds, and sort the columns by the alphabet."""

    def save(self) -> None:
        """Writes what was logged, into a new folder where somebody has removed the run's."""
        folder = Path(self.log_dir)
        if self.metrics and not folder.is_dir():
            rank_zero_warn(
                f"{folder} was removed while the run was writing there: it is made anew, and training goes on"
            )
            folder.mkdir(parents=True)
        try:
            super().save()
        except OSError as error:
            if error.errno is not None and error.filename is None:  # a full disk has no name
                error.filename = self.metrics_file_path
            raise

    def _record_new_keys(self) -> set[str]:
        there = list(self.metrics_keys)
        new: set[str] = super()._record_new_keys()
        # what is in the file already stays in its order unless it is written anew
        self.metrics_keys = sorted(self.metrics_keys, key=_place) if new else there
        path = Path(self.metrics_file_path)
        if not path.is_file():  # for which Lightning would write the names as they are
            _write(path, self.metrics_keys, [])
        return new

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        _write(path, fieldnames, _read(path)[1])

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.is_file():
            self.metrics_keys = _read(path)[0]


def _place(column: str) -> tuple[int, str]:
    """Time first, then what a person looks for, then the many columns of every layer's attention."""
    first = ("epoch", "step")
    return (first.index(column) if column in first else 3 if column.startswith("attention/") else 2), column


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns and the rows of a file, but for a last row that a killed process left unfinished."""
    columns, rows = read_csv(path)
    return columns, [dict(zip(columns, row, strict=True)) for row in rows if len(row) == len(columns)]


def _write(path: Path, columns: list[str], rows: list[dict[str, str]]) -> None:
    with atomic_write(path) as temporary:
        write_csv(temporary, columns, [[row.get(column, "") for column in columns] for row in rows])
