"""Which checkpoints a run keeps: the best one by its metric, and the last one."""

import os
import shutil
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only

from awconv.errors import InputError


class BestCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, whose best survives a resumption in another run folder.

    A resumed run takes over the best checkpoints of the run it goes on with, scores and files, and its own must beat
    them. A folder that holds another run's checkpoints is refused.
    """

    _stage = ""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses to write over the checkpoints of another run."""
        super().setup(trainer, pl_module, stage)
        self._stage = stage
        for name in (self.filename, "last"):
            there = Path(self.dirpath or "", f"{name}.ckpt")
            if stage == "fit" and trainer.ckpt_path is None and there.exists():
                raise InputError(
                    f"checkpoint.dirpath={str(self.dirpath)!r} holds {there.name} of another run; give another folder, "
                    f"or go on with that run by --ckpt_path {there}"
                )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the best checkpoints of the run that is resumed."""
        if self._stage != "fit":
            return
        moved = {old: str(Path(self.dirpath or "", Path(old).name)) for old in state_dict["best_k_models"]}
        if not all(Path(old).is_file() for old in moved):
            return  # they were deleted or moved: the best starts anew
        for old, new in moved.items():
            if old != new:
                _copy(old, new)
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


class LastCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt`` at the end of every epoch.

    ModelCheckpoint's own ``save_last`` writes only when it also writes a better best, so its last is the last best.

    Args:
        dirpath: The folder it goes to.
    """

    def __init__(self, dirpath: str | None) -> None:
        super().__init__(dirpath, filename="last", save_on_train_epoch_end=True, enable_version_counter=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps nothing of the resumed run: its last checkpoint is its own."""


@rank_zero_only
def _copy(old: str, new: str) -> None:
    temporary = f"{new}.{os.getpid()}.tmp"
    Path(new).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(old, temporary)
    os.replace(temporary, new)
