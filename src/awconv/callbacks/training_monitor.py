"""How fast training goes and what holds it up: gradient norm, samples a second, waiting for data, GPU memory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor

if TYPE_CHECKING:
    import lightning.pytorch as pl

_FETCH = "train_dataloader_next"  # how Lightning's name ends of what its profilers time when a batch is fetched


class TrainingMonitor(Callback):
    """Logs, at the steps at which Lightning logs, what training did since the last of them.

    * ``train/grad_norm``: the 2-norm of all gradients of this step, before clipping. Not under ``FSDPStrategy``, where
      no process has all gradients.
    * ``train/samples_per_second``: of all processes together. A sample is an element of the batch's first part: a row
      of a tensor of pictures, or a picture of a list of them.
    * ``train/data_wait``: the share of the time, from 0 to 1, in which training waited for the next batch; of several
      processes that of the one which waited longest, since the others wait for it.
    * ``train/gpu_memory_gb``: the most memory that tensors ever took up on one GPU, in 10⁹ bytes. On CUDA only.

    Time is the wall clock's, without validation and what lies between two epochs (checkpoints, figures). The first
    batch of a run, which pays for compilation and the start of workers, counts nowhere. The device is waited for, and
    processes talk to each other, only when something is logged. With ``barebones`` and without ``log_every_n_steps``
    nothing is measured.
    """

    def __init__(self) -> None:
        self._restore: Any = None
        self._forget()

    def _forget(self) -> None:
        self._since: float | None = None
        self._paused_at: float | None = None
        self._fetching_since: float | None = None
        self._paused = self._waited = 0.0
        self._samples = 0
        self._countable = True
        self._stepped = False

    # ---- what happens when ---------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts to listen to when Lightning fetches batches."""
        self._forget()
        self._let_go()
        if _every(trainer):
            self._listen(trainer.profiler)  # type: ignore[attr-defined]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Notes that the optimiser has not stepped yet."""
        self._stepped = False

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Logs the gradient norm."""
        self._stepped = True
        if _is_due(trainer) and not isinstance(trainer.strategy, FSDPStrategy):
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            gradients = [g.coalesce().values() if g.is_sparse else g for g in gradients]
            if gradients:
                norm: Any = torch.nn.utils.get_total_norm(gradients)
                norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # a sharded model's
                pl_module.log("train/grad_norm", norm, on_step=True, on_epoch=False, batch_size=1)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the batch, and logs what was measured where it is due."""
        if not _every(trainer):
            return
        if self._since is None:
            _wait_for(pl_module.device)
            self._since = time.perf_counter()
            self._waited = 0.0
            return
        samples = _samples_of(batch)
        self._samples += samples or 0
        self._countable &= samples is not None
        # with several optimisers of its own, a module need not step at every batch
        if _is_due(trainer) and (self._stepped or not pl_module.automatic_optimization):
            self._log(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops the clock until the next training batch is fetched."""
        if trainer.state.fn == "fit" and self._since is not None:
            _wait_for(pl_module.device)  # what is still under way belongs to training
            self._pause()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops the clock until the next epoch's first batch is fetched."""
        if self._since is not None:
            _wait_for(pl_module.device)
            self._pause()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops listening."""
        self._let_go()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stops listening."""
        self._let_go()

    # ---- the clock -------------------------------------------------------------------------------------------------

    def _pause(self) -> None:
        if self._paused_at is None:
            self._paused_at = time.perf_counter()

    def _listen(self, profiler: Any) -> None:
        """Times the fetching of batches, of which Lightning tells its profiler alone."""
        start, stop = profiler.start, profiler.stop

        def started(action_name: str) -> None:
            if action_name.endswith(_FETCH):
                now = time.perf_counter()
                self._fetching_since = now
                if self._paused_at is not None:
                    self._paused += now - self._paused_at
                    self._paused_at = None
            start(action_name)

        def stopped(action_name: str) -> None:
            stop(action_name)
            if action_name.endswith(_FETCH) and self._fetching_since is not None:
                self._waited += time.perf_counter() - self._fetching_since
                self._fetching_since = None

        def restore() -> None:
            del profiler.start, profiler.stop

        profiler.start, profiler.stop = started, stopped
        self._restore = restore

    def _let_go(self) -> None:
        if self._restore is not None:
            self._restore()
            self._restore = None

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        device = pl_module.device
        _wait_for(device)
        now = time.perf_counter()
        assert self._since is not None
        seconds = max(now - self._since - self._paused, 1e-9)
        on_cuda = device.type == "cuda"
        memory = torch.cuda.max_memory_allocated(device) / 1e9 if on_cuda else 0.0
        measured = torch.tensor([self._samples, self._countable, seconds, self._waited / seconds, memory])
        of_each = [measured.to(device)]
        if trainer.world_size > 1:
            of_each = [torch.empty_like(of_each[0]) for _ in range(trainer.world_size)]
            torch.distributed.all_gather(of_each, measured.to(device))
        of_all = torch.stack(of_each).cpu()
        samples, countable, seconds_of, wait, memory_of = of_all.unbind(dim=1)
        values = {"train/data_wait": min(float(wait.max()), 1.0)}
        if bool(countable.all()):
            values["train/samples_per_second"] = float(samples.sum() / seconds_of.max())
        if on_cuda:
            values["train/gpu_memory_gb"] = float(memory_of.max())
        pl_module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)
        self._since, self._paused, self._waited = now, 0.0, 0.0
        self._samples, self._countable = 0, True


def _every(trainer: pl.Trainer) -> int:
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return 0 if trainer.barebones else every


def _is_due(trainer: pl.Trainer) -> bool:
    """Whether Lightning logs the values of this training batch, by its own count of steps."""
    every = _every(trainer)
    steps: int = trainer.fit_loop.epoch_loop._batches_that_stepped
    return bool(every) and (steps + 1) % every == 0


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _samples_of(batch: Any) -> int | None:
    """The number of samples in a batch; None where that cannot be told."""
    if isinstance(batch, Mapping):
        batch = next(iter(batch.values()), None)
    elif isinstance(batch, tuple | list) and batch:
        batch = batch[0]
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else None
    return len(batch) if isinstance(batch, tuple | list) else None
