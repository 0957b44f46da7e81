"""What every task shares: optimisation, weight averaging, compilation, and checkpoints that can be trusted."""

import difflib
import hashlib
import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from awconv.checkpoint import ChecksCheckpoint
from awconv.errors import InputError
from awconv.models import WeightsReport, describe_mismatch
from awconv.tasks.schedule import Schedule, accumulation_scheduler

_OPTIMIZERS: dict[str, type[Optimizer]] = {
    name.lower(): value
    for name, value in vars(torch.optim).items()
    if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer
}


class BaseTask(ChecksCheckpoint, L.LightningModule):
    """A ``network`` with its optimiser, learning-rate schedule, EMA and compilation, all from plain arguments.

    A subclass calls ``super().__init__(**kwargs)``, hands its network to :meth:`set_network`, and writes its steps. All
    arguments are kept as hyperparameters and must be primitives, so that checkpoints load with
    ``torch.load(weights_only=True)``; state-dict keys never contain ``_orig_mod``.

    Args:
        optimizer: Name of any optimiser of ``torch.optim``, in any case: ``sgd``, ``adamw``, ``rmsprop``, ...
        lr: Peak learning rate for the global batch, exactly as given: it is never scaled by devices or batch size.
        weight_decay: Weight decay, as the optimiser defines it.
        decay_norm_and_bias: Decay normalisation weights and biases too (all parameters with one dimension or none).
        optimizer_options: Further arguments of the optimiser, such as ``{momentum: 0.9, nesterov: true}``. On CUDA it
            is a ``fused`` one where there is one, unless gradients are clipped or scaled, or weights are sharded.
        lr_schedule: ``constant``, ``cosine`` (to ``min_lr``), ``multistep`` (times ``gamma`` at each milestone) or
            ``onecycle`` (Smith & Topin 2018, as ``torch.optim.lr_scheduler.OneCycleLR``). Steps are optimiser steps.
            The schedule follows what changes in a run: a learning rate or batch size that a tuner finds, accumulation
            that changes from epoch to epoch, a resumed run with longer epochs or more of them.
        warmup_epochs: Epochs of linear warm-up from ``lr`` / 100; for ``onecycle``, the rising part.
        warmup_steps: The same in optimiser steps; the longer of the two counts.
        milestones: Epochs at which ``multistep`` drops.
        gamma: Factor of each drop.
        min_lr: The learning rate at which ``cosine`` ends.
        ema_decay: Keep an exponential moving average of weights and buffers with this decay a step, which validates,
            tests and is what checkpoints hold under ``state_dict``. None keeps none.
        compile: Compile the network in place with ``torch.compile``.
        channels_last: Keep images and network in channels-last memory format.

    Raises:
        InputError: If an option is unknown or out of range.
    """

    network: nn.Module
    monitor: ClassVar[str]
    """The metric by which the best checkpoint is chosen; of higher values, unless its name says otherwise (a loss)."""
    weights_report: WeightsReport | None = None
    """What the network starts from; None where nobody knows."""

    def __init__(
        self,
        *,
        optimizer: str = "sgd",
        lr: float = 0.1,
        weight_decay: float = 0.0,
        decay_norm_and_bias: bool = True,
        optimizer_options: dict[str, Any] | None = None,
        lr_schedule: Literal["constant", "cosine", "multistep", "onecycle"] = "cosine",
        warmup_epochs: float = 0.0,
        warmup_steps: int = 0,
        milestones: list[int] | None = None,
        gamma: float = 0.1,
        min_lr: float = 0.0,
        ema_decay: float | None = None,
        compile: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()  # those of the subclass too: it reads the arguments of every __init__ under way
        self._drop_foreign_hyperparameters()
        if optimizer.lower() not in _OPTIMIZERS:
            near = difflib.get_close_matches(optimizer.lower(), _OPTIMIZERS, n=1)
            choices = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(sorted(_OPTIMIZERS))}"
            raise InputError(f"optimizer={optimizer!r} is unknown; {choices}")
        if lr_schedule not in ("constant", "cosine", "multistep", "onecycle"):
            raise InputError(
                f"lr_schedule={lr_schedule!r} is unknown; choose one of constant, cosine, multistep, onecycle"
            )
        warmups = (("warmup_epochs", warmup_epochs, 0), ("warmup_steps", warmup_steps, 0))
        for name, value, low in (("lr", lr, 0), ("weight_decay", weight_decay, 0), *warmups):
            if not value >= low or not math.isfinite(value):
                raise InputError(f"{name}={value} must be a number of at least {low}")
        if gamma <= 0 or not 0 <= min_lr <= lr or any(epoch < 0 for epoch in milestones or []):
            raise InputError(
                f"gamma={gamma}, min_lr={min_lr}, milestones={milestones}: expected a positive factor, a learning rate "
                f"from 0 to lr={lr}, and epochs of at least 0"
            )
        if fixed := {"lr", "weight_decay"} & set(optimizer_options or {}):
            raise InputError(f"optimizer_options holds {min(fixed)}; give it as model.{min(fixed)}")
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise InputError(f"ema_decay={ema_decay} must lie between 0 and 1, or be null for no averaging")
        if lr_schedule == "multistep" and not milestones:
            raise InputError(
                "lr_schedule='multistep' needs milestones, the epochs of its drops, such as [60, 120, 160]"
            )
        self._optimizer_options = dict(optimizer_options or {})
        self._non_finite_steps: dict[str, Tensor] = {}
        self._compiled = False
        self._fit_has_begun = False
        self._said_accumulation: int | None = None
        self._resumed_from: dict[str, float] | None = None

    def _drop_foreign_hyperparameters(self) -> None:
        """Drops what the command line links from the data to every task, and this one does not take.

        Lightning notes it all the same, and ``load_from_checkpoint`` would then refuse the checkpoint.
        """
        inits = [vars(cls)["__init__"] for cls in type(self).__mro__ if "__init__" in vars(cls)]
        taken = {name for init in inits for name in inspect.signature(init).parameters}
        for name in set(self.hparams) - taken:
            if not name.startswith("_"):  # Lightning's own
                del self.hparams[name]

    def set_network(self, network: nn.Module) -> None:
        """Takes ``network`` as the module that is trained, in the memory format asked for."""
        if self.hparams["channels_last"]:
            network = network.to(memory_format=torch.channels_last)
        self.network = network

    def forward(self, images: Tensor) -> Any:
        """Applies the network to ``images`` (N, C, H, W)."""
        if self.hparams["channels_last"]:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.network(images)

    def setup(self, stage: str) -> None:
        """Compiles the network when asked to."""
        if self.hparams["compile"] and not self._compiled:
            # in place: torch.compile(network) would wrap it and put _orig_mod into every state-dict key
            self.module_to_compile().compile()
            self._compiled = True

    def module_to_compile(self) -> nn.Module:
        """Gives the part of the network that ``compile`` means: all of it, unless a subclass knows better."""
        return self.network

    def configure_model(self) -> None:
        """Shards weights, gradients and optimiser state over the processes under ``ModelParallelStrategy`` (FSDP2)."""
        # Lightning also calls it where a checkpoint is loaded without a trainer
        if self._trainer is None or not isinstance(self._trainer.strategy, ModelParallelStrategy):
            return
        if isinstance(self.network, FSDPModule):
            return
        if self.hparams["ema_decay"] is not None:
            raise InputError("ema_decay: the average cannot be kept of sharded weights; set it to null, or use ddp")
        mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
        if mesh.size() != self._trainer.world_size:
            raise InputError(
                f"trainer.strategy.data_parallel_size={mesh.size()} ('auto': the number of machines): weights are "
                f"sharded over all processes; give {self._trainer.world_size}, and tensor_parallel_size 1"
            )
        # what is gathered at a time: each direct part of the network, a stage say
        for part in [*self.network.children(), self.network]:
            is_called = not isinstance(part, nn.ModuleList | nn.ModuleDict)
            if is_called and any(True for _ in part.parameters()):
                fully_shard(part, mesh=mesh)

    def configure_callbacks(self) -> list[L.Callback]:
        """Adds the exponential moving average to training when one is asked for."""
        decay = self.hparams["ema_decay"]
        if decay is None or self.trainer.state.fn != "fit":
            return []
        precision = self.trainer.precision
        if precision != "32-true" and not precision.endswith("-mixed"):
            raise InputError(
                f"trainer.precision={precision!r} with model.ema_decay={decay}: the average needs weights in 32 bits; "
                "give --trainer.precision bf16-mixed or 32-true, or --model.ema_decay null"
            )
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            averages = isinstance(callback, WeightAveraging | StochasticWeightAveraging)
            if averages and not isinstance(callback, _WeightAverage):
                raise InputError(
                    f"trainer.callbacks: {type(callback).__name__} with model.ema_decay={decay}: both replace the "
                    "weights by an average; leave one of the two out"
                )
        return [_WeightAverage(decay=decay)]

    # ---- optimisation -------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Builds the optimiser and a schedule that steps once an optimiser step."""
        optimizer = self._build_optimizer()
        schedule = Schedule(optimizer, self.hparams, self.trainer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _build_optimizer(self) -> Optimizer:
        hparams = self.hparams
        groups: list[dict[str, Any]] = [{"params": parameters} for parameters in self._learning_parameters()]
        if not hparams["decay_norm_and_bias"] and hparams["weight_decay"]:
            groups[1]["weight_decay"] = 0.0
        optimizer = _OPTIMIZERS[hparams["optimizer"].lower()]
        options = {"lr": hparams["lr"], **self._optimizer_options}
        if self._may_be_fused():
            options["fused"] = True
        # passed even when it is zero: AdamW's own default is not
        if hparams["weight_decay"] or "weight_decay" in inspect.signature(optimizer).parameters:
            options["weight_decay"] = hparams["weight_decay"]
        try:
            return optimizer(groups, **options)
        except (TypeError, ValueError) as error:
            raise InputError(f"optimizer={hparams['optimizer']!r} does not take {options}: {error}") from error

    def _may_be_fused(self) -> bool:
        """Whether one kernel can take the whole step, which torch leaves to its users to ask for."""
        there_is_one = "fused" in inspect.signature(_OPTIMIZERS[self.hparams["optimizer"].lower()]).parameters
        asked = {"fused", "foreach", "capturable", "differentiable"} & self._optimizer_options.keys()
        # the strategy's device: where a checkpoint is loaded, the module is not there yet
        if not there_is_one or asked or self.trainer.strategy.root_device.type != "cuda":
            return False
        # it would unscale gradients itself (16-mixed), after they were looked at, and Lightning refuses to clip them
        # even where there is nothing to unscale; not every optimiser has one for sharded parameters (FSDP2)
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        sharded = isinstance(self.trainer.strategy, ModelParallelStrategy)
        return not (scaled or sharded or self.trainer.gradient_clip_val)

    def _learning_parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Lists kernels and matrices, and apart from them norms and biases: a resumed run may decay those or not."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        return [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]

    # ---- a training step ------------------------------------------------------------------------------------------

    @contextmanager
    def seeded_step(self) -> Iterator[None]:
        """Draws the random numbers of one training step from the run's seed, the process and the batch's number.

        Dropout, stochastic depth and a detector's sampling of proposals are then the same in a resumed run as in an
        uninterrupted one, for which nothing else would care.
        """
        batch = self.trainer.fit_loop.epoch_loop.total_batch_idx if self._trainer is not None else 0
        key = repr((torch.initial_seed(), self.global_rank, batch)).encode()
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") % 2**63)
            yield

    def check_loss(self, loss: Tensor, parts: Mapping[str, Tensor] | None = None) -> Tensor:
        """Notes whether ``loss`` is finite and returns it; training stops, and says where, if it was not.

        Nothing waits for the device here: the note is read every step on a CPU, and on accelerators or several
        processes every ``log_every_n_steps`` steps and before any checkpoint is written.

        Args:
            loss: What is minimised.
            parts: The losses of which it is the sum, by name; the message then tells which was not finite.
        """
        for name, value in (parts or {"the loss": loss}).items():
            seen = self._non_finite_steps.get(name, torch.full((), -1, device=loss.device, dtype=torch.long))
            first = (seen < 0) & ~torch.isfinite(value.detach()).all()
            self._non_finite_steps[name] = torch.where(first, self.global_step, seen)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stops training on a loss that is no number."""
        if not self._fit_has_begun:  # a tuner looks for the learning rate at which it is none
            return
        at_once = self.device.type == "cpu" and self.trainer.world_size == 1
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if at_once or (every and (batch_idx + 1) % every == 0):
            self._stop_if_not_finite()

    def _stop_if_not_finite(self) -> None:
        if not self._non_finite_steps:
            return
        # every process must leave together, or the others wait for ever in their next collective
        noted = torch.stack(list(self._non_finite_steps.values())).float()
        steps = dict(
            zip(self._non_finite_steps, self.trainer.strategy.reduce(noted, reduce_op="max").tolist(), strict=True)
        )
        if wrong := {name: int(step) for name, step in steps.items() if step >= 0}:
            step = min(wrong.values())
            schedule = self.lr_schedulers()
            epoch = schedule.timeline.epoch_of(step) if isinstance(schedule, Schedule) else self.current_epoch
            names = " and ".join(name for name in wrong if wrong[name] == step)
            raise InputError(
                f"{names} was not finite at step {step} (epoch {epoch}); training stopped and wrote no checkpoint "
                f"after it. Lower model.lr (now {self.hparams['lr']}), lengthen model.warmup_epochs, or clip with "
                "trainer.gradient_clip_val"
            )

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses to save broken weights, and leaves out where the initial weights came from: they are inside now."""
        self._stop_if_not_finite()
        if self._fit_has_begun:
            checkpoint["position"] = self._position()
        hparams = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        if "initial_weights" in hparams:
            hparams["initial_weights"] = None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lets this run's optimiser arguments win over those that the checkpoint would restore."""
        saved = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        states = checkpoint.get("optimizer_states", [])
        if "optimizer" not in saved or not states or self._trainer is None or self.trainer.state.fn != "fit":
            return
        if "state_dict" in checkpoint:  # a strategy that shards has taken it out, and loaded it
            self._require_fit(checkpoint["state_dict"])  # the cause, where the optimiser's state is but a symptom
        if any(getattr(type(self), name) is not getattr(BaseTask, name) for name in _BUILDS_THE_OPTIMIZER):
            self._resumed_from = checkpoint.get("position")  # of optimisers of its own nothing is known
            return
        now = self.hparams
        optimizer, schedule = str(saved["optimizer"]), str(saved.get("lr_schedule"))
        if optimizer.lower() != now["optimizer"].lower() or (schedule == "onecycle") != (
            now["lr_schedule"] == "onecycle"
        ):
            raise InputError(
                f"the checkpoint was trained with optimizer={optimizer!r}, lr_schedule={schedule!r}, whose state "
                f"does not fit optimizer={now['optimizer']!r}, lr_schedule={now['lr_schedule']!r}; to start afresh "
                "from its weights use model.initial_weights"
            )
        here = [len(parameters) for parameters in self._learning_parameters()]
        for state in states:
            there = [len(group["params"]) for group in state["param_groups"]]
            if there != here:
                raise InputError(
                    f"the checkpoint was trained with {sum(there)} tensors that learn, and this run has {sum(here)}: "
                    "something else is frozen; set norm and trainable_stages as they were, or start afresh from its "
                    "weights with model.initial_weights"
                )
        decays = (now["weight_decay"], now["weight_decay"] if now["decay_norm_and_bias"] else 0.0)
        for state in states:
            for group, decay in zip(state["param_groups"], decays, strict=True):
                if "weight_decay" in group:
                    group["weight_decay"] = decay
                # how a step is computed is this run's affair, and its device's
                how = {**_USUAL_STEP, "fused": True if self._may_be_fused() else None}
                group.update({k: v for k, v in {**how, **self._optimizer_options}.items() if k in group})
        parameters = [parameter for group in self._learning_parameters() for parameter in group]
        for state in states:
            if wrong := _what_hinders_a_step(_OPTIMIZERS[optimizer.lower()], state, parameters):
                raise InputError(
                    f"{optimizer} cannot go on from its state in the checkpoint ({wrong[:200]}); give the "
                    "model.optimizer_options of that run, or start afresh from its weights with model.initial_weights"
                )
        self._resumed_from = checkpoint.get("position")

    def _position(self) -> dict[str, float]:
        """Where the run is, so that one that is resumed with other epochs finds the place in its schedule."""
        loop: Any = self.trainer.fit_loop
        epochs, batches = loop.epoch_progress.current, loop.epoch_loop.batch_progress.current
        begun = epochs.processed < epochs.ready and not math.isinf(self.trainer.num_training_batches)
        part = batches.ready / max(self.trainer.num_training_batches, 1) if begun else 0
        return {
            "epochs": epochs.processed + part,
            "batches": self.trainer.num_training_batches,
            "accumulated": self.trainer.accumulate_grad_batches,
        }

    def on_fit_start(self) -> None:
        """Notes that what comes next is training, and no trial of a tuner any more."""
        self._fit_has_begun = True
        self._non_finite_steps.clear()

    def on_train_start(self) -> None:
        """Takes over what has changed since the optimiser was built, and says what the learning rate is for."""
        if not self._fit_has_begun:
            return
        if (changing := accumulation_scheduler(self.trainer)) is not None:
            # it does so at the start of every epoch but the one inside which a run is resumed
            self.trainer.accumulate_grad_batches = changing.get_accumulate_grad_batches(self.current_epoch)
        schedule = self.lr_schedulers()
        if isinstance(schedule, Schedule):
            schedule.follow(self.trainer)
            self._find_place(schedule)
            schedule.apply()
        self._say_global_batch()

    def _find_place(self, schedule: Schedule) -> None:
        """Moves the schedule of a resumed run to where the run is, if its epochs have another number of steps now."""
        at, self._resumed_from = self._resumed_from, None
        timeline = schedule.timeline
        if at is None or timeline.ends_by_steps or math.isinf(at["batches"]):
            return
        if (at["batches"], at["accumulated"]) != (timeline.batches, timeline.accumulated(int(at["epochs"]))):
            schedule.last_epoch = timeline.step_at(at["epochs"])

    def on_train_epoch_start(self) -> None:
        """Says it where accumulation has changed."""
        if self._fit_has_begun and self._said_accumulation != self.trainer.accumulate_grad_batches:
            self._say_global_batch()

    def _say_global_batch(self) -> None:
        size = getattr(self.trainer.train_dataloader, "batch_size", None)
        processes, accumulated = self.trainer.world_size, self.trainer.accumulate_grad_batches
        self._said_accumulation = accumulated
        if size:
            parts = [(size, "a batch"), (processes, "processes"), (accumulated, "accumulated")]
            product = " x ".join(f"{number} {what}" for number, what in parts if number > 1 or what == "a batch")
            rank_zero_info(
                f"global batch: {size * processes * accumulated} pictures ({product}); "
                f"model.lr={self.hparams['lr']} is for that, and is never scaled"
            )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads ``state_dict``; under ``strict`` a network of another architecture is an :class:`InputError`."""
        if strict:
            self._require_fit(state_dict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _require_fit(self, state_dict: Mapping[str, Any]) -> None:
        if difference := describe_mismatch(self, state_dict):
            raise InputError(
                f"the checkpoint holds another network than this one: {difference}; leave out what changes the "
                "network, or start from the weights that fit with model.initial_weights"
            )


_USUAL_STEP = {"fused": None, "foreach": None, "capturable": False, "differentiable": False}
_BUILDS_THE_OPTIMIZER = ("configure_optimizers", "_build_optimizer")


def _what_hinders_a_step(optimizer: type[Optimizer], state: dict[str, Any], parameters: list[nn.Parameter]) -> str:
    """Tries a step with the state of each parameter, alone and on the CPU; empty if an optimiser can go on from it."""
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    if not all(isinstance(number, int | str) for number in numbers):
        return f"params is {str(numbers)[:40]}"
    if strange := state["state"].keys() - set(numbers):
        return f"there is no parameter {str(strange.pop())[:40]}"
    shapes = iter(parameters)
    for group in state["param_groups"]:
        # how a step is computed changes nothing of what it needs
        options: dict[str, Any] = {**group, **{k: v for k, v in _USUAL_STEP.items() if k in group}, "params": [0]}
        for number in group["params"]:
            like = next(shapes)
            parameter = nn.Parameter(torch.zeros(like.shape, dtype=like.dtype))
            parameter.grad = torch.zeros_like(parameter)
            kept = {0: state["state"][number]} if number in state["state"] else {}
            try:
                trial = optimizer([parameter], lr=1.0)  # type: ignore[call-arg]
                trial.load_state_dict(deepcopy({"state": kept, "param_groups": [options]}))
                trial.step()
            except Exception as error:  # a damaged state may fail on anything
                return f"{type(error).__name__}: {error}"
    return ""


class _WeightAverage(WeightAveraging):
    """Lightning's average, exponential, all weights at once, kept to training and to the device that trains.

    Left attached after ``fit``, the original would swap its weights into a ``validate`` of another checkpoint, and
    replace the average that ``test`` has just loaded by the weights it was averaged from.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # the module itself is still on the CPU here, where the original would leave the average for good
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            super().on_validation_epoch_start(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            super().on_validation_epoch_end(trainer, pl_module)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit":
            try:
                super().on_load_checkpoint(trainer, pl_module, checkpoint)
            except (RuntimeError, TypeError, AttributeError) as error:
                raise InputError(
                    "the averaged weights in the checkpoint are not those of this network "
                    f"({str(error).strip().splitlines()[-1].strip()[:200]}); start from its weights with "
                    "--model.initial_weights"
                ) from error
