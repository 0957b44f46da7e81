"""The folder that a run writes into: where it lies, what it is called, and what is kept in it for later."""

import inspect
import os
import re
import secrets
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from awconv import config_text
from awconv.callbacks import MetricsFile
from awconv.callbacks.checkpoints import CONFIG, config_heading
from awconv.cli.folder_lock import LOCK, FolderLock
from awconv.errors import InputError
from awconv.files import atomic_write

_WANDB_ID = "wandb_run_id"
_SETTINGS = {CONFIG, "hparams.yaml"}
# .NAME.PID.tmp of atomic_write, and what Lightning's finders of a learning rate and a batch size go back to
_UNFINISHED = re.compile(r"\..+\.\d+\.tmp|\.(lr_find|scale_batch_size)_.+\.ckpt")
# where Lightning or mpirun starts the processes
_NODE_RANKS = ("NODE_RANK", "GROUP_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


class RunFolder:
    """The folder that a command writes to, which is its own until it ends.

    It is where ``resume`` or ``run_dir`` say, else ``DEFAULT_ROOT_DIR/DATA-MODEL/TIME``. Only the first process of
    several makes and locks it.

    Args:
        config: The parsed config of the command.
        command: ``fit``, ``validate``, ``test`` or ``predict``.

    Raises:
        InputError: If nothing can be written there, another run is writing there, or ``run_dir`` holds something.
    """

    def __init__(self, config: Any, command: str) -> None:
        argument, given, self.path = _choose(config, command)
        self._command = command
        self._resumed = bool(config.resume)
        self._locks: list[FolderLock] = []
        self._is_new = False
        self._claim(self.path, f"{argument}={given!r}")
        self._is_new = bool(self._locks) and not self._resumed and self._locks[0].is_empty
        if argument == "run_dir" and self._locks and not self._is_new:
            self.release()
            raise InputError(
                f"run_dir={config.run_dir!r} is not empty; give a new folder, or let the run there go on by --resume"
            )

    def claim_checkpoints(self, folders: Mapping[str, str]) -> None:
        """Locks the folders that ``fit`` writes checkpoints to, and clears away what a killed run left half written.

        Args:
            folders: The folders, by the section of the config that names each.

        Raises:
            InputError: If another run is writing there, or nothing can be written there.
        """
        if self._command != "fit":
            return
        for section, folder in folders.items():
            if "://" not in folder:
                self._claim(folder, f"{section}.dirpath={folder!r}")
        if self._resumed:
            for lock in self._locks:
                _clear_unfinished(lock.folder)

    def _claim(self, folder: str, given: str) -> None:
        known = {os.path.realpath(lock.folder) for lock in self._locks}
        # the first process decides: another one may see what the first has begun to write
        if _is_first() and os.path.realpath(folder) not in known:
            self._locks.append(FolderLock(folder, given))

    @property
    def is_empty(self) -> bool:
        """Whether no file has been written into it."""
        return not any(path.name != LOCK and not path.is_dir() for path in Path(self.path).glob("**/*"))

    def remove_if_nothing_ran(self) -> None:
        """Empties a new folder in which there are no more than settings."""
        if not self._is_new:
            return
        inside = sorted(Path(self.path).glob("**/*"), reverse=True)  # what is in a folder before the folder
        files = [path for path in inside if path.name != LOCK and not path.is_dir()]
        if {path.name for path in files} <= _SETTINGS:
            for path in files:
                path.unlink(missing_ok=True)
            for path in inside:
                with suppress(OSError):  # one that still holds a lock goes with it
                    path.rmdir()

    def release(self) -> None:
        """Lets other runs in, and removes the folder and its parents if they are new and empty."""
        while self._locks:
            self._locks.pop().release()


def _choose(config: Any, command: str) -> tuple[str, str, str]:
    """Which argument says where the folder lies, its value, and the folder."""
    for argument in ("resume", "run_dir"):
        if config[argument]:
            return argument, config[argument], config[argument]
    root = config.trainer.default_root_dir
    if not root:
        raise InputError("trainer.default_root_dir is empty; give the folder that runs go to, such as runs")
    # processes and users that start in the same second must not share a folder
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    folder = Path(root, experiment_name(config), stamp if command == "fit" else f"{stamp}-{command}")
    return "trainer.default_root_dir", root, str(folder)


def _clear_unfinished(folder: Path) -> None:
    """Removes what a killed process left: the temporary files of :func:`atomic_write`, the checkpoints of tuners."""
    for place, folders, files in os.walk(folder):
        if Path(place) != folder and LOCK in files:  # another run's
            folders.clear()
            continue
        for name in filter(_UNFINISHED.fullmatch, files):
            Path(place, name).unlink(missing_ok=True)
        for name in filter(_UNFINISHED.fullmatch, folders):
            shutil.rmtree(Path(place, name), ignore_errors=True)
        folders[:] = [name for name in folders if name != "wandb" and not _UNFINISHED.fullmatch(name)]


def experiment_name(config: Any) -> str:
    """Names what all seeds of an experiment have in common, ``DATA-MODEL``: ``digits-aw_resnet20``, say."""

    def short(section: Any, suffix: str) -> str:
        return str(section.class_path).rsplit(".", 1)[-1].removesuffix(suffix).lower()

    init_args = config.model.get("init_args") or {}
    words = [init_args.get(key, None) for key in ("head", "attention", "backbone")]
    head, attention, backbone = (word if isinstance(word, str) else "" for word in words)
    aw = "aw" if init_args.get("aw", None) else ""
    model = "_".join(filter(None, [head, aw, attention, backbone or short(config.model, "Task")]))
    return re.sub(r"[^\w.+-]+", "-", f"{short(config.data, 'DataModule')}-{model}")[:100]


def lead_loggers(config: Any, run_dir: str) -> None:
    """Lets the loggers write into the run's folder, and a resumed run go on in Weights & Biases where it ended."""
    loggers = config.trainer.logger
    known = Path(run_dir, _WANDB_ID)
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        init_args = logger.get("init_args") if hasattr(logger, "get") else None
        if init_args is None:
            continue
        kind = resolve_name(logger.class_path)
        takes_folder = not isinstance(kind, type) or "save_dir" in inspect.signature(kind).parameters
        if takes_folder and init_args.get("save_dir", None) in ("runs", ".", None):
            init_args["save_dir"] = run_dir
        if isinstance(kind, type) and issubclass(kind, WandbLogger) and config.resume and known.is_file():
            init_args["id"] = init_args.get("id", None) or known.read_text(encoding="utf-8").strip()


def _is_first() -> bool:
    """Whether this is the first process of all; Lightning's own number does not count the nodes yet."""
    return getattr(rank_zero_only, "rank", 0) == 0 and all(os.environ.get(name, "0") == "0" for name in _NODE_RANKS)


class RunRecorder(SaveConfigCallback):
    """Keeps the resolved config in the run folder, in every checkpoint and in Weights & Biases, whose id it keeps too.

    Args:
        parser: The parser of the config.
        config: The config that the run's objects were made from.
        run_dir: The run's folder.
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        typed: The config as it was typed, which can be run again into another folder.
    """

    # what belongs to one call of one command, and would be refused or misunderstood by the next
    _NOT_KEPT = ("ckpt_path", "resume", "run_dir", "trust_checkpoint_config", "verbose", "return_predictions")

    def __init__(self, parser: LightningArgumentParser, config: Any, *, run_dir: str, command: str, typed: Any) -> None:
        super().__init__(parser, config, save_to_log_dir=False)
        self._heading = config_heading(command)
        self._run_dir = Path(run_dir)
        dumped: dict[str, Any] = config_text.load(parser.dump(typed, skip_none=False))
        self._resolved = {key: value for key, value in dumped.items() if key not in self._NOT_KEPT}

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Writes ``config.yaml`` and ``wandb_run_id``, on the first process alone."""
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self._write(CONFIG, self._heading + config_text.dump(self._resolved))
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.config.update(self._resolved, allow_val_change=True)
                if logger.version and not logger.experiment.disabled:
                    self._write(_WANDB_ID, f"{logger.version}\n")

    def _write(self, name: str, text: str) -> None:
        with atomic_write(self._run_dir / name) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes out of ``metrics.csv`` what a resumed run is about to log again."""
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.forget_from(trainer.global_step)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Puts the config into the checkpoint."""
        checkpoint["config"] = self._resolved
