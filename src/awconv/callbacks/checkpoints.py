"""Which checkpoints a run keeps, how they reach the disk whole, and how a run ends that is taken off its machine."""

import copy
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import BatchSizeFinder, Checkpoint, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import Tensor

from awconv import config_text
from awconv.checkpoint import BEST, LAST, PREVIOUS, begins_afresh, read_checkpoint, what_no_run_writes
from awconv.errors import InputError, printable, require_int, require_number
from awconv.files import atomic_write

CONFIG = "config.yaml"
# Windows has no SIGUSR1
_PREEMPTIONS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]


# words in the names of metrics; a loss or an error rate is one, whatever of
_LOWER_IS_BETTER = frozenset("loss err error mse rmse mae nll perplexity ece".split())  # noqa: SIM905
_HIGHER_IS_BETTER = frozenset(
    "acc accuracy top map mar ap ar auc auroc f iou miou dice precision recall psnr ssim".split()  # noqa: SIM905
)
_SAYS_NOTHING = frozenset(
    "train val valid validation test epoch rate mean macro micro weighted small medium large score multiclass "  # noqa: SIM905
    "binary cls classifier classification box bbox reg regression rpn objectness ctrness mask".split()
)


class BestCheckpoint(ModelCheckpoint):
    """Keeps ``best.ckpt``, the checkpoint of the best validation of a run.

    After every validation of ``fit`` the file is replaced if the monitored metric is better than in all validations
    before. On a tie the earlier one stays, and NaN is never the best. A metric of training is read at the end of every
    epoch instead: one whose name starts with ``train/``, or that validation does not log.

    A resumed run must beat the best of the run that it continues: of everything that ``best.ckpt`` says it holds. A
    folder that holds another run's checkpoints is refused. For further checkpoints (the best five, one every thousand
    steps, ...) add Lightning's ``ModelCheckpoint`` to the trainer.

    Args:
        dirpath: Folder of the file; the command line gives it the run's ``checkpoints/``.
        monitor: Name of the metric; null takes the task's own.
        mode: ``min`` or ``max``; null follows from the metric's name, see :func:`direction`.

    Raises:
        InputError: If nothing tells whether a higher value of the metric is better.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] | None = None,
    ) -> None:
        super().__init__(
            dirpath,
            filename="best",
            monitor=monitor,
            mode=mode or "max",
            enable_version_counter=False,
        )
        self._mode_is_given = mode is not None
        self.best_step: int | None = None
        """Optimiser steps before the best validation."""
        self._resumed = self._is_better = False
        self._reads_training: bool | None = None
        self._to_copy: Path | None = None

    @property
    def state_key(self) -> str:
        """The same whatever the metric, so that a resumed run finds what it continues."""
        return "BestCheckpoint"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Finds the folder, the metric, and its direction."""
        super().setup(trainer, pl_module, stage)
        own = getattr(pl_module, "monitor", "val/acc1")
        self.monitor = self.monitor or own
        better = direction(self.monitor)
        if not self._mode_is_given:
            if better is None and self.monitor != own:
                raise InputError(
                    f"checkpoint.monitor={self.monitor!r}: the name does not tell whether a higher or a lower value is "
                    "better; give --checkpoint.mode max or min"
                )
            self.mode = better or "max"
        elif better not in (None, self.mode):
            raise InputError(
                f"checkpoint.mode={self.mode!r}: a {'higher' if better == 'max' else 'lower'} {self.monitor} is "
                "better; leave mode out"
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses to write over the checkpoints of another run, and what contradicts itself."""
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._refuse_those_of_another_run()
        _check_monitors(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses checkpoints of another run where the strategy restores only now; takes over the file of the best."""
        super().on_train_start(trainer, pl_module)
        self._refuse_those_of_another_run()
        self._take_over_the_best()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes over the file of the best of a run that was over, of which nothing more is trained."""
        self._take_over_the_best()

    def _take_over_the_best(self) -> None:
        if self._to_copy is not None:  # not before the whole of the checkpoint was found to fit
            _copy(str(self._to_copy), self.best_model_path)
            self._to_copy = None

    def _refuse_those_of_another_run(self) -> None:
        if self._resumed:
            return
        for name in (BEST, LAST, PREVIOUS):
            there = Path(self.dirpath or "", name)
            if there.exists():
                raise InputError(
                    f"checkpoint.dirpath={str(self.dirpath)!r} holds {name} of another run; give another folder, or go "
                    f"on with that run by --resume {there.parents[1]}"
                )

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses metrics that do not exist, before an epoch is lost on them."""
        logs: list[Any] = [pl_module, *trainer.callbacks]  # type: ignore[attr-defined]
        ours = all(type(one).__module__.startswith(("awconv.", "lightning.")) for one in logs)
        for name, monitor in _monitors(trainer):
            # what training logs is not known yet, but for this project's own tasks, whose names say it
            known = monitor.startswith("val/") or (ours and not monitor.startswith("train/"))
            if known and monitor not in {*trainer.callback_metrics, "epoch", "step"}:
                raise _not_measured(name, monitor, trainer)

    # ---- the best ------------------------------------------------------------------------------------------------

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Looks at the metric of a validation."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self._reads_training is None:
            # callback_metrics also holds what training has logged before
            results = trainer.fit_loop.epoch_loop.val_loop._results.values()
            validated = {result.meta.name for result in results}
            training = str(self.monitor).startswith("train/") or self.monitor not in validated
            self._reads_training = trainer.strategy.broadcast(training)
        if not self._reads_training:
            self._compare(trainer)
            # at the end of an epoch the checkpoint is written a moment later, when Lightning counts the epoch as done
            if not trainer.is_last_batch:
                self._write(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Looks at the metric of an epoch of training, and writes what is the best."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self._reads_training or (self._reads_training is None and self.monitor in trainer.callback_metrics):
            self._compare(trainer)
        self._write(trainer)

    def _compare(self, trainer: L.Trainer) -> None:
        value = trainer.callback_metrics.get(str(self.monitor))
        # where processes disagree the first one decides for all: to write a checkpoint takes them all
        score: Tensor | None = trainer.strategy.broadcast(None if value is None else value.detach().cpu())
        if score is None:
            raise _not_measured("checkpoint", str(self.monitor), trainer)
        self.current_score = score
        if self._beats(score, self.best_model_score):
            self.best_model_score, self.best_step, self._is_better = score, trainer.global_step, True

    def _beats(self, score: Tensor, other: Tensor | None) -> bool:
        if score.isnan():
            return False
        return other is None or bool(score < other if self.mode == "min" else score > other)

    def _write(self, trainer: L.Trainer) -> None:
        if self._is_better:
            self._is_better = False
            self.best_model_path = str(Path(self.dirpath or "", BEST))
            self._save_checkpoint(trainer, self.best_model_path)

    # ---- resuming ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The metric, and the value and step of its best validation."""
        names = ("monitor", "mode", "best_model_score", "best_model_path", "best_step")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Does nothing: see :meth:`on_load_checkpoint`, which also knows of which step the state is."""

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes over the best of the run that is resumed, value and file."""
        of_tuner = Path(str(trainer.ckpt_path)).name.startswith((".lr_find_", ".scale_batch_size_"))
        if trainer.state.fn != "fit" or of_tuner:  # which restores what it has saved before its trials
            return
        finder = next((c for c in trainer.callbacks if isinstance(c, LearningRateFinder | BatchSizeFinder)), None)  # type: ignore[attr-defined]
        if finder is not None:
            raise InputError(
                f"{_called(finder)}: a tuner in a resumed run would begin it anew; leave it out, or start from its "
                "weights with model.initial_weights"
            )
        source, here = Path(str(trainer.ckpt_path)), Path(self.dirpath or "", BEST)
        in_place = _is_same(source.parent, here.parent)
        if not in_place:
            self._refuse_those_of_another_run()
        self._resumed = True
        saved = _Best.of(checkpoint)
        held = source.with_name(BEST if saved is None else saved.file)
        # the file counts, since it may be newer than the checkpoint
        found = _Best.read(held)
        if found is not None and not in_place and found.step > checkpoint["global_step"]:
            found = None
        for best in (saved, found):
            if best is not None and (best.monitor, best.mode) != (self.monitor, self.mode):
                self._follow_another_metric(best, source, in_place)
                return
        candidates = {} if found is None else {held: found}
        if saved is not None and saved.step == checkpoint["global_step"]:
            candidates[source] = saved
        if not candidates:
            if saved is None:
                return
            gone = f"{held} ({self.monitor}={float(saved.score):.4g}) is not there any more"
            rank_zero_warn(printable(f"{gone}: best.ckpt follows the validations from here on"))
            return
        chosen = next(iter(candidates))
        for path, best in candidates.items():
            if self._beats(best.score, candidates[chosen].score):
                chosen = path
        self._to_copy = None if _is_same(chosen, here) else chosen
        self.best_model_path = str(here)
        self.best_model_score, self.best_step = candidates[chosen].score, candidates[chosen].step

    def _follow_another_metric(self, saved: "_Best", source: Path, in_place: bool) -> None:
        if in_place:
            raise InputError(
                f"checkpoint.monitor={self.monitor!r} (mode {self.mode}): best.ckpt of this run follows "
                f"{saved.monitor} (mode {saved.mode}); leave it so, or start a new run with --ckpt_path {source}"
            )
        rank_zero_info(f"best.ckpt follows {self.monitor} from here on, and no longer {saved.monitor}")


class _Best(NamedTuple):
    """What a checkpoint says of the best validation of its run."""

    monitor: str
    mode: str
    score: Tensor
    step: int
    file: str

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any]) -> "_Best | None":
        """What the state of :class:`BestCheckpoint` says; None where nothing was validated."""
        states = checkpoint.get("callbacks") or {}
        # in checkpoints of version 0.1.0 the key goes on with the options, the state has no mode and no step, and the
        # best of several files may have another name
        key = next((key for key in states if key.startswith("BestCheckpoint")), None)
        if key is None or states[key].get("best_model_score") is None:
            return None
        state = {"mode": "min" if "'mode': 'min'" in key else "max", "best_step": -1, **states[key]}
        try:
            score = torch.as_tensor(state["best_model_score"]).detach().cpu().clone()  # not of a mapped file
            best = cls(state["monitor"], state["mode"], score, state["best_step"], Path(state["best_model_path"]).name)
            sound = score.numel() == 1 and best.mode in ("min", "max") and isinstance(best.monitor, str)
            sound = sound and type(best.step) is int and best.file != ""
        except (KeyError, TypeError, ValueError, RuntimeError):
            sound = False
        if not sound:
            raise InputError(
                "the checkpoint does not say rightly which was the best of its run; start from its weights with "
                "--model.initial_weights"
            )
        return best

    @classmethod
    def read(cls, path: Path) -> "_Best | None":
        """What ``best.ckpt`` says of itself; None where it cannot be read or is not there."""
        try:
            checkpoint = read_checkpoint(path, "checkpoint") if path.is_file() else {}
            best = cls.of(checkpoint)
        except InputError:
            return None
        return None if best is None else best._replace(step=checkpoint["global_step"])


def direction(metric: str) -> Literal["min", "max"] | None:
    """Whether a lower or a higher value of a metric is better, by the words of its name; None where they do not say.

    ``val/loss`` and ``val_error_rate`` are better when lower, ``val/acc1``, ``val/map_50`` and ``auroc`` when higher;
    of ``neg_loss`` and ``acc_drop``, in which another word may turn it round, nothing is known.
    """
    words = set(re.findall("[a-z]+", metric.lower()))
    lower, higher = words & _LOWER_IS_BETTER, words & _HIGHER_IS_BETTER
    if words - _LOWER_IS_BETTER - _HIGHER_IS_BETTER - _SAYS_NOTHING or not (lower or higher):
        return None
    return "min" if lower else "max"


def _monitors(trainer: L.Trainer) -> Iterator[tuple[str, str]]:
    """The callbacks that follow a metric, and which."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str):
            yield "checkpoint" if isinstance(callback, BestCheckpoint) else _called(callback), monitor


def _called(callback: L.Callback) -> str:
    return f"trainer.callbacks: {type(callback).__name__}"


def _not_measured(name: str, monitor: str, trainer: L.Trainer) -> InputError:
    there = sorted(metric for metric in trainer.callback_metrics if "/" in metric) or sorted(trainer.callback_metrics)
    return InputError(f"{name}.monitor={monitor!r} is not measured; choose one of {', '.join(there)}")


def _check_monitors(trainer: L.Trainer) -> None:
    """Refuses callbacks that would follow a metric in the wrong direction, or write over this project's files."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    folder = next(c.dirpath for c in callbacks if isinstance(c, BestCheckpoint))
    for callback in callbacks:
        if isinstance(callback, BestCheckpoint):
            continue
        name = _called(callback)
        monitor, mode = getattr(callback, "monitor", None), getattr(callback, "mode", None)
        # Lightning's default is min; the other way round somebody has typed it
        if mode == "min" and isinstance(monitor, str) and direction(monitor) == "max":
            raise InputError(f"{name}.mode='min': a higher {monitor} is better; give mode max")
        filename = Path(getattr(callback, "filename", None) or "")
        if isinstance(callback, ModelCheckpoint) and (filename.is_absolute() or ".." in filename.parts):
            raise InputError(
                f"{name}.filename={callback.filename!r} leads out of its folder; give another folder with dirpath"
            )
        if isinstance(callback, ModelCheckpoint) and _is_same(callback.dirpath or "", folder or ""):
            if callback.save_last:
                raise InputError(f"{name}.save_last={callback.save_last}: {LAST} is kept anyway; leave save_last out")
            if f"{callback.filename}.ckpt" in (BEST, LAST, PREVIOUS):
                raise InputError(
                    f"{name}.filename={callback.filename!r}: the run writes that file itself; give another"
                )


def _is_same(one: str | Path, other: str | Path) -> bool:
    """Whether two paths lead to one place, be it there or not."""
    return os.path.realpath(one) == os.path.realpath(other)


class Preempted(SystemExit):
    """Ends a process whose machine is wanted back, with a code on which schedulers start it again.

    The code is 75, which ``sysexits.h`` calls EX_TEMPFAIL: try again later.
    """

    def __init__(self) -> None:
        super().__init__(75)


class LastCheckpoint(Checkpoint):
    """Keeps ``last.ckpt``, from which a run goes on, and ``previous.ckpt``, the one before it.

    It is written at the end of every epoch; inside an epoch every so many steps or minutes where asked; and when the
    process gets SIGTERM or SIGUSR1, as schedulers send them some time before they take a machine away: training then
    stops at the next step with :class:`Preempted`, on all processes at the same one. A signal that comes during
    validation waits for its end, because Lightning cannot resume a validation whose beginning it has forgotten, and a
    checkpoint that falls due before one is written after it.

    Args:
        dirpath: The folder it goes to.
        every_n_steps: Optimiser steps between two checkpoints inside an epoch; None for none.
        every_minutes: Minutes between two checkpoints inside an epoch; None for none.

    Raises:
        InputError: If a number is out of range.
    """

    def __init__(
        self, dirpath: str | None = None, every_n_steps: int | None = None, every_minutes: float | None = None
    ) -> None:
        if every_n_steps is not None:
            require_int("every_n_steps", every_n_steps, "a whole number of at least 1, or null", low=1)
        if every_minutes is not None:
            require_number("every_minutes", every_minutes, "a number of minutes from 0, or null", low=0)
        self.dirpath = dirpath
        self.every_n_steps = every_n_steps
        self.every_minutes = every_minutes
        self._signal: int | None = None
        self._due = self._leaving = self._step_is_saved = False
        self._step = 0
        self._time = 0.0
        # the newest checkpoint of this folder that is known to be whole, and its step
        self._newest: tuple[Path, int] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Finds the folder, the same for all processes."""
        if "://" in str(self.dirpath):
            raise InputError(f"last_checkpoint.dirpath={self.dirpath!r}: expected a folder of this machine")
        strategy: Any = trainer.strategy
        if getattr(strategy, "_save_distributed_checkpoint", False) or (
            getattr(strategy, "_state_dict_type", "full") == "sharded"
        ):
            raise InputError(
                f"trainer.strategy={type(strategy).__name__} writes checkpoints in shards, from which no run could go "
                "on; give --trainer.strategy.save_distributed_checkpoint false, or state_dict_type full"
            )
        self.dirpath = trainer.strategy.broadcast(self.dirpath or str(Path(trainer.default_root_dir, "checkpoints")))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts to count, and to listen for signals."""
        self._signal = None
        self._due = self._leaving = self._step_is_saved = False
        self._step, self._time = trainer.global_step, time.monotonic()
        # one that nobody has read may be damaged, or of a later step than the one that the run goes on from
        resumed = Path(str(trainer.ckpt_path))
        in_place = _is_same(resumed.parent, str(self.dirpath))
        self._newest = (resumed, trainer.global_step) if in_place and resumed.is_file() else None
        if self._newest is not None and resumed.name not in (LAST, PREVIOUS):
            # it may be replaced before last.ckpt is
            previous = resumed.with_name(PREVIOUS)
            if trainer.is_global_zero:
                _keep_as(resumed, previous)
            self._newest = previous, trainer.global_step
        if threading.current_thread() is threading.main_thread():
            for number in _PREEMPTIONS:
                # in the place of Lightning's own, which in several processes calls a collective out of turn; Lightning
                # puts back what was there before the run
                signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self._signal = number

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Leaves where the machine is wanted back: only now Lightning has logged the step that the checkpoint is of."""
        if self._step_is_saved:
            _flush(trainer)
            self._step_is_saved = False
        if self._leaving:
            self._leave(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes the checkpoint where it is due, or where the machine is wanted back."""
        stepped = trainer.global_step != self._step
        self._step = trainer.global_step
        if stepped and self.every_n_steps is not None and self._step % self.every_n_steps == 0:
            self._due = True
        if self.every_minutes is not None and time.monotonic() - self._time >= 60 * self.every_minutes:
            self._due = True
        # clocks and signals differ between processes
        due = (
            self._due if self.every_minutes is None else trainer.strategy.reduce_boolean_decision(self._due, all=False)
        )
        wanted_back = trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False)
        if not stepped or trainer.is_last_batch or _validates_after(trainer, batch_idx):
            return
        if due or wanted_back:
            self._save(trainer)
            self._step_is_saved, self._leaving = True, wanted_back

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the checkpoint, and leaves where the machine is wanted back."""
        self._save(trainer)
        finished = trainer.max_epochs is not None and trainer.current_epoch + 1 >= trainer.max_epochs > 0
        if trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False) and not finished:
            self._leave(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        self._due, self._time = False, time.monotonic()
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        last, previous = (Path(str(self.dirpath), name) for name in (LAST, PREVIOUS))
        if trainer.is_global_zero and self._newest is not None:
            newest, step = self._newest
            if newest != previous and step < trainer.global_step:
                _keep_as(newest, previous)
        trainer.save_checkpoint(last, weights_only=False)
        self._newest = last, trainer.global_step
        _flush(trainer)

    def _leave(self, trainer: L.Trainer) -> None:
        if trainer.is_global_zero:
            name = signal.Signals(self._signal).name if self._signal is not None else "a signal to another process"
            print(f"preempted ({name}): saved {self.dirpath}/{LAST} at step {trainer.global_step}", file=sys.stderr)
        raise Preempted


class CheckpointFiles(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all: a full disk or a killed process leaves the one before it untouched."""

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint as :func:`awconv.checkpoint.read_checkpoint` does, unless told that it is no stranger's.

        Raises:
            InputError: If it is damaged or no checkpoint of a run.
        """
        if "://" in str(path) or weights_only is False:
            return super().load_checkpoint(path, map_location, weights_only)
        # the file may be replaced, or cut short, while its tensors are used
        content = copy.deepcopy(read_checkpoint(Path(path), "ckpt_path"))
        for name in begins_afresh(content):
            if name == "loops":
                content.pop("position", None)
            else:
                content[name] = {} if name == "callbacks" else []
        return content

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes ``checkpoint`` to ``path``, on the disk when it returns.

        Raises:
            InputError: If it cannot be written.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        if wrong := what_no_run_writes(checkpoint):
            raise InputError(
                f"{path}: no run could go on from this checkpoint, and it was not written: {wrong}; keep that out of "
                "what is saved"
            )
        content = BytesIO()
        torch.save(checkpoint, content)
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(Path(path)) as temporary, temporary.open("wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            there = [name for name in (LAST, BEST) if Path(path).with_name(name).is_file()]
            kept = f"; {' and '.join(there)} of before {'is' if len(there) == 1 else 'are'} untouched" if there else ""
            raise InputError(
                f"{path}: this checkpoint of {len(content.getbuffer()) / 2**20:.0f} MiB could not be written "
                f"({error.strerror or error}){kept}; make room, or name another folder with "
                "--trainer.default_root_dir"
            ) from error


def find_run(given: Path) -> tuple[Path, Path]:
    """Finds the run that is to go on, and the file from which it does.

    Args:
        given: A run's folder, or a checkpoint in its ``checkpoints/``.

    Returns:
        The run's folder, and the path of its last checkpoint; that of its ``config.yaml`` where it was ended before
        it had written one.

    Raises:
        InputError: If there is neither.
    """
    if given.is_file():
        if given.absolute().parent.name == "checkpoints":
            return given.absolute().parents[1], given
        raise InputError(
            f"resume={str(given)!r} lies in no run's folder checkpoints; give the folder of a run, or for a new run "
            "from this file --ckpt_path"
        )
    for folder in _checkpoint_folders(given):
        for path in (folder / LAST, folder / PREVIOUS):
            if path.is_file():
                return given, path
    config = given / CONFIG
    if config.is_file() and config_text.read(config).startswith(config_heading("fit")):
        return given, config
    what = "holds no checkpoint, and is not of a fit that was about to begin" if given.is_dir() else "does not exist"
    raise InputError(f"resume={str(given)!r} {what}; give the folder of a run")


def find_newest(root: Path) -> Path | None:
    """Finds the newest run below a folder that has a checkpoint.

    Returns:
        The folder that holds its ``best.ckpt`` or ``last.ckpt``, or both; None if no run has any.
    """
    folders = {path.parent for path in root.glob("**/checkpoints/*.ckpt")}
    heading = config_heading("fit")
    for config in root.glob(f"**/{CONFIG}"):
        if config.is_file() and not (config.parent / "checkpoints").is_dir():  # they may lie elsewhere
            with config.open(encoding="utf-8", errors="replace") as file:
                if file.readline(len(heading)) == heading:
                    folders.update(_checkpoint_folders(config.parent))
    written = [path for folder in folders for path in (folder / BEST, folder / LAST) if path.is_file()]
    return max(written, key=lambda path: path.stat().st_mtime).parent if written else None


def _checkpoint_folders(run: Path) -> list[Path]:
    """Where the checkpoints of a run may lie: below it, or where its config says."""
    sections: list[Any] = []
    if (run / CONFIG).is_file():
        with suppress(InputError):  # of an editor's making; whoever parses it will say so
            content = config_text.load_file(run / CONFIG)
            sections = [content.get(name) for name in ("last_checkpoint", "checkpoint")]
    elsewhere = [section.get("dirpath") for section in sections if isinstance(section, dict)]
    return [run / "checkpoints", *(Path(folder) for folder in elsewhere if folder and isinstance(folder, str))]


def config_heading(command: str) -> str:
    """The first line of a run's ``config.yaml``, by which one sees what made it."""
    return f"# everything that lightning_cli.py {command} was given, and all defaults\n"


def _flush(trainer: L.Trainer) -> None:
    """Lets what is logged reach as far as the checkpoint, even if the process is killed next."""
    for logger in trainer.loggers:
        logger.save()


def _validates_after(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether a validation follows upon this training batch."""
    every: Any = trainer.val_check_batch
    if not trainer.enable_validation or every is None or every == float("inf"):
        return False
    done = trainer.fit_loop.total_batch_idx if trainer.check_val_every_n_epoch is None else batch_idx
    return bool((done + 1) % every == 0)


def _keep_as(path: Path, name: Path) -> None:
    """Gives a file a second name, so that it stays when the first is given to another; one that is gone has none."""
    with suppress(FileNotFoundError), atomic_write(name) as temporary:
        try:
            os.link(path, temporary)
        except FileNotFoundError:  # somebody has moved it away
            raise
        except OSError:  # a file system without hard links
            shutil.copyfile(path, temporary)


@rank_zero_only
def _copy(old: str, new: str) -> None:
    Path(new).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(Path(new)) as temporary:
        shutil.copyfile(old, temporary)
