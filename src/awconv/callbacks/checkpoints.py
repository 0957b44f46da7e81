"""Which checkpoints a run keeps, how they reach the disk whole, and how a run ends that is taken off its machine."""

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only

from awconv.callbacks.run_files import whole
from awconv.errors import InputError, require_int, require_number

LAST, PREVIOUS, CONFIG = "last.ckpt", "previous.ckpt", "config.yaml"
_PREEMPTIONS = (signal.SIGTERM, signal.SIGUSR1)


class BestCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, whose best survives a resumption in another run folder.

    A resumed run takes over the best checkpoints of the run it goes on with, scores and files, and its own must beat
    them. A folder that holds another run's checkpoints is refused.
    """

    _stage = ""
    _resumed = False
    _trainer: L.Trainer

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Finds the folder."""
        super().setup(trainer, pl_module, stage)
        self._stage, self._trainer = stage, trainer

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses to write over the checkpoints of another run, before anything of it is touched."""
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._refuse_unless_resumed()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses it where the strategy has read only now what the run goes on with."""
        super().on_train_start(trainer, pl_module)
        self._refuse_unless_resumed()

    def _refuse_unless_resumed(self) -> None:
        if not self._resumed:
            self._refuse_those_of_another_run()

    def _refuse_those_of_another_run(self) -> None:
        for name in (f"{self.filename}.ckpt", LAST):
            there = Path(self.dirpath or "", name)
            if there.exists():
                raise InputError(
                    f"checkpoint.dirpath={str(self.dirpath)!r} holds {name} of another run; give another folder, or go "
                    f"on with that run by --resume {there.parents[1]}"
                )

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses a metric of the validation that does not exist before an epoch is lost on it."""
        there = [name for name in trainer.callback_metrics if name.startswith("val/")]
        if str(self.monitor).startswith("val/") and there and self.monitor not in there:
            raise InputError(f"checkpoint.monitor={self.monitor!r} is not measured; choose one of {', '.join(there)}")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the best checkpoints of the run that is resumed."""
        if self._stage != "fit":
            return
        self._resumed = True
        here = Path(self.dirpath or "")
        there = Path(str(self._trainer.ckpt_path)).parent  # what the state says of its folder is of before it was moved
        if os.path.realpath(there) != os.path.realpath(here):
            self._refuse_those_of_another_run()
        moved, found = {}, {}
        for old in state_dict["best_k_models"]:
            moved[old] = str(here / Path(old).name)
            found[old] = next((p for p in (there / Path(old).name, Path(old)) if p.is_file()), None)
        if not all(found.values()):
            return  # they were deleted: the best starts anew
        self._trainer.strategy.barrier()  # all have looked before the first one writes
        for old, new in moved.items():
            if os.path.realpath(str(found[old])) != os.path.realpath(new):
                _copy(str(found[old]), new)
        self._trainer.strategy.barrier()
        super().load_state_dict(
            {
                **state_dict,
                "dirpath": self.dirpath,
                "best_model_path": moved.get(state_dict["best_model_path"], ""),
                "kth_best_model_path": moved.get(state_dict["kth_best_model_path"], ""),
                "best_k_models": {moved[old]: score for old, score in state_dict["best_k_models"].items()},
                "last_model_path": "",
            }
        )


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
        self._due = self._leaving = self._is_whole = self._step_is_saved = False
        self._step = 0
        self._time = 0.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Finds the folder, the same for all processes, and clears away what a killed process left half written."""
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
        if stage == "fit" and trainer.is_global_zero:
            for unfinished in Path(str(self.dirpath)).glob(".*.ckpt.*.tmp"):
                unfinished.unlink(missing_ok=True)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts to count, and to listen for signals."""
        self._signal = None
        self._due = self._leaving = self._step_is_saved = False
        self._step, self._time = trainer.global_step, time.monotonic()
        # one that nobody has read may be damaged, and must not take the place of the one before
        self._is_whole = str(trainer.ckpt_path) == str(Path(str(self.dirpath), LAST))
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
        if trainer.is_global_zero and self._is_whole:
            _keep_as(last, previous)
        trainer.save_checkpoint(last, weights_only=False)
        self._is_whole = True
        _flush(trainer)

    def _leave(self, trainer: L.Trainer) -> None:
        if trainer.is_global_zero:
            name = signal.Signals(self._signal).name if self._signal is not None else "a signal to another process"
            print(f"preempted ({name}): saved {self.dirpath}/{LAST} at step {trainer.global_step}", file=sys.stderr)
        raise Preempted


class CheckpointFiles(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all: a full disk or a killed process leaves the one before it untouched."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes ``checkpoint`` to ``path``, on the disk when it returns.

        Raises:
            InputError: If it cannot be written.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        content = BytesIO()
        torch.save(checkpoint, content)
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with whole(Path(path)) as temporary, temporary.open("wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            there = [name for name in (LAST, "best.ckpt") if Path(path).with_name(name).is_file()]
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
    config = given / CONFIG
    text = config.read_text() if config.is_file() else ""
    content = yaml.safe_load(text) or {}
    elsewhere = [(content.get(section) or {}).get("dirpath") for section in ("last_checkpoint", "checkpoint")]
    for folder in (given / "checkpoints", *map(Path, filter(None, elsewhere))):
        for path in (folder / LAST, folder / PREVIOUS):
            if path.is_file():
                return given, path
    if text.startswith(config_heading("fit")):
        return given, config
    what = "holds no checkpoint, and is not of a fit that was about to begin" if given.is_dir() else "does not exist"
    raise InputError(f"resume={str(given)!r} {what}; give the folder of a run")


def config_heading(command: str) -> str:
    """The first line of a run's ``config.yaml``, by which one sees what made it."""
    return f"# everything that lightning_cli.py {command} was given, and all defaults\n"


def read_checkpoint(path: Path, argument: str) -> Mapping[str, Any]:
    """Reads a checkpoint as weights only, its tensors left on the disk.

    Args:
        path: The file.
        argument: What named it, for messages.

    Raises:
        InputError: If it is damaged or no checkpoint of a run; the message names the one before it if that is whole.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the unpickler, the zip reader and the file system each raise their own kinds
        raise InputError(
            f"{argument}={str(path)!r} is not a checkpoint that can be loaded as weights only "
            f"({type(error).__name__}); it is damaged, another kind of file, or carries code, which is never run"
            f"{_offer_the_one_before(path)}"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise InputError(
            f"{argument}={str(path)!r} is no checkpoint of a run; bare weights go into --model.initial_weights"
        )
    return checkpoint


def _offer_the_one_before(path: Path) -> str:
    before = path.with_name(PREVIOUS)
    if path.name != LAST or not before.is_file():
        return ""
    try:
        step = torch.load(before, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    except Exception:  # damaged as well
        return ""
    return f"; the one before it, of step {step}, is whole: give {before}"


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
    """Gives a file a second name, so that it stays when the first is given to another."""
    with whole(name) as temporary:
        try:
            os.link(path, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, temporary)


@rank_zero_only
def _copy(old: str, new: str) -> None:
    Path(new).parent.mkdir(parents=True, exist_ok=True)
    with whole(Path(new)) as temporary:
        shutil.copyfile(old, temporary)
