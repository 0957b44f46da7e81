"""Learning-rate schedules, which follow the run as it is: its length, its steps an epoch, and its learning rate."""

import math
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from awconv.errors import InputError

# OneCycleLR's defaults: the peak over the first learning rate, that over the last one, and the range of the momentum
_FIRST, _LAST, _MOMENTUM = 25.0, 1e4, (0.85, 0.95)


def accumulation_scheduler(trainer: L.Trainer) -> GradientAccumulationScheduler | None:
    """Finds the callback that changes from epoch to epoch how many batches make a step."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((c for c in callbacks if isinstance(c, GradientAccumulationScheduler)), None)


class Timeline:
    """Where the epochs of a run begin, counted in optimiser steps.

    It is read off the trainer when it is made. Whatever changes batch size, accumulation or length needs a new one.

    Attributes:
        batches: Batches of a process in an epoch of training.
        total: Optimiser steps of the run.

    Raises:
        InputError: If the run has no end, or if epochs are asked for whose length is unknown.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        if trainer.train_dataloader is None:
            trainer.fit_loop.setup_data()
        self.batches: float = trainer.num_training_batches
        self._changing, self._accumulated = accumulation_scheduler(trainer), trainer.accumulate_grad_batches
        epochs, steps = trainer.max_epochs, trainer.max_steps
        endless = epochs in (-1, None) or math.isinf(self.batches)
        if endless and steps == -1:
            raise InputError(
                f"trainer.max_epochs={epochs} has no end for the schedule to aim at; give max_epochs or max_steps"
            )
        by_epochs = math.inf if endless else self.step_at(max(epochs or 0, 1))
        self.total = int(by_epochs if steps == -1 else min(by_epochs, steps))
        self.ends_by_steps = steps != -1 and steps < by_epochs

    def accumulated(self, epoch: int) -> int:
        """Batches of a process whose gradients make one step in an epoch."""
        return self._accumulated if self._changing is None else self._changing.get_accumulate_grad_batches(epoch)

    def steps_in(self, epoch: int) -> int:
        """Optimiser steps in an epoch; its last batches make a step too, however few they are."""
        return 1 if math.isinf(self.batches) else max(1, math.ceil(self.batches / self.accumulated(epoch)))

    def step_at(self, epoch: float) -> int:
        """Optimiser steps before a point of time in epochs, such as 2.5, the middle of the third."""
        whole = int(epoch)
        if math.isinf(self.batches) and epoch > 0:
            raise InputError(
                f"the schedule refers to epoch {epoch}, and the data do not tell how long an epoch is; give "
                "model.warmup_steps and trainer.max_steps, and no milestones"
            )
        before = whole * self.steps_in(0) if self._changing is None else sum(map(self.steps_in, range(whole)))
        return round(before + (epoch - whole) * self.steps_in(whole))

    def epoch_of(self, step: int) -> int:
        """The epoch in which an optimiser step is made."""
        if math.isinf(self.batches):
            return 0
        epoch = 0 if self._changing is not None else step // self.steps_in(0)
        while self.step_at(epoch + 1) <= step:
            epoch += 1
        return epoch


class Schedule(LRScheduler):
    """The learning rate of every optimiser step, as the hyperparameters of a task say.

    The learning rate of a parameter group is that of the schedule times the group's own share of ``lr``. Only the
    number of steps is kept in checkpoints: of a resumed run its own arguments count.

    Args:
        optimizer: Whose groups are scheduled.
        hparams: The task's hyperparameters, read when they are used.
        trainer: Of the run.

    Attributes:
        timeline: The run's, as of the last call of :meth:`follow`.
    """

    def __init__(self, optimizer: Optimizer, hparams: Mapping[str, Any], trainer: L.Trainer) -> None:
        self._hparams = hparams
        self._built_for = hparams["lr"]
        self.follow(trainer)
        super().__init__(optimizer)

    def follow(self, trainer: L.Trainer) -> None:
        """Takes over what has changed: the learning rate, and the length of epochs and run."""
        self.timeline = Timeline(trainer)

    def get_lr(self) -> list[float | Any]:
        """Learning rate of each group at the present step."""
        lr = self._hparams["lr"]
        shares = [base / self._built_for if self._built_for else 1.0 for base in self.base_lrs]
        return [self._rate(lr * share) for share in shares]

    def apply(self) -> None:
        """Gives the groups the learning rate, and with ``onecycle`` the momentum, of the present step."""
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate
        if self._hparams["lr_schedule"] == "onecycle":
            low, high = _MOMENTUM
            momentum = self._cycle(high, low, high)
            for group in self.optimizer.param_groups:
                if "betas" in group:
                    group["betas"] = (momentum, *group["betas"][1:])
                elif group.get("momentum"):
                    group["momentum"] = momentum

    def step(self, epoch: int | None = None) -> None:
        """Goes on to the next step."""
        super().step(epoch)
        self.apply()

    def state_dict(self) -> dict[str, Any]:
        """The number of steps."""
        return {"last_epoch": self.last_epoch, "_step_count": self._step_count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from the number of steps; earlier versions kept more.

        Raises:
            InputError: If there is none.
        """
        steps: list[Any] = [state_dict.get(name) for name in ("last_epoch", "_step_count")]
        if not all(isinstance(number, int) and 0 <= number < 2**63 for number in steps):
            raise InputError(
                f"the checkpoint does not say at which step its schedule was, but {str(steps)[:80]}; start from its "
                "weights with --model.initial_weights"
            )
        self.last_epoch, self._step_count = steps

    def _warmup(self) -> int:
        by_epochs, by_steps = self.timeline.step_at(self._hparams["warmup_epochs"]), self._hparams["warmup_steps"]
        return int(min(max(by_epochs, by_steps), self.timeline.total))

    def _rate(self, peak: float) -> float:
        hparams, step, warmup = self._hparams, self.last_epoch, self._warmup()
        schedule, total = hparams["lr_schedule"], self.timeline.total
        if schedule == "onecycle":
            return self._cycle(peak / _FIRST, peak, peak / _FIRST / _LAST)
        if step < warmup:
            return peak * (0.01 + 0.99 * step / warmup)
        if schedule == "cosine":
            floor = hparams["min_lr"] / hparams["lr"] if hparams["lr"] else 0.0
            progress = min((step - warmup) / max(total - warmup, 1), 1.0)
            return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)
        if schedule == "multistep":
            drops = sum(step >= self.timeline.step_at(epoch) for epoch in hparams["milestones"] or [])
            return peak * float(hparams["gamma"] ** drops)
        return peak

    def _cycle(self, first: float, middle: float, last: float) -> float:
        """OneCycleLR's two halves of a cosine, the first one as long as the warm-up; it stays at its end."""
        total, warmup = self.timeline.total, self._warmup()
        # of the two parts, of a step less each, neither may be empty
        rise = min(max(warmup, 2), total - 2) / total if warmup and total > 3 else 0.3
        turn, end = rise * total - 1.0, max(total - 1.0, 0.0)
        step = min(self.last_epoch, end)
        begin, start, until, stop = (0.0, first, turn, middle) if step <= turn else (turn, middle, end, last)
        share = (step - begin) / (until - begin) if until > begin else 1.0
        return stop + (start - stop) / 2.0 * (1.0 + math.cos(math.pi * share))
