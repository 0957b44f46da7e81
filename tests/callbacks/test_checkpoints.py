"""Which checkpoint is the best, and which is the one before the last: against runs whose every validation is noted."""

import math
import shutil
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import EarlyStopping, LearningRateFinder, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from awconv.callbacks import BestCheckpoint, LastCheckpoint
from awconv.callbacks.checkpoints import direction
from awconv.errors import InputError
from awconv.tasks import BaseTask

BATCHES, EPOCHS = 4, 3


class Seen(NamedTuple):
    """A value of the metric, and what it was measured of."""

    step: int
    value: float
    weights: torch.Tensor


class Killed(Exception):
    """Ends a run as a crash does."""


class Scripted(BaseTask):
    """Measures, after so many optimiser steps, the value that a list has in that place."""

    def __init__(self, values: list[float], metric: str, kill_at: int | None = None, **kwargs: Any) -> None:
        super().__init__(**{"lr": 0.1, "lr_schedule": "constant", **kwargs})
        torch.manual_seed(0)
        self.set_network(nn.Linear(1, 1))
        self.values, self.metric, self.kill_at = values, metric, kill_at
        self.seen: list[Seen] = []

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        if self.global_step == self.kill_at:
            raise Killed
        if "/" not in self.metric:  # as the mean over the epoch, whose last value validations see too
            self.log(self.metric, self.values[self.current_epoch], on_step=False, on_epoch=True)
        return self(batch[0]).mean()

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        if self.metric.startswith("val/"):
            self.measure()

    def on_train_epoch_end(self) -> None:
        if self.metric.startswith("train/"):
            self.measure()
        elif not self.metric.startswith("val/"):
            self.see(self.values[self.current_epoch])

    def measure(self) -> None:
        self.log(self.metric, self.values[self.global_step])
        if not self.trainer.sanity_checking:
            self.see(self.values[self.global_step])

    def see(self, value: float) -> None:
        self.seen.append(Seen(self.global_step, value, flat(self.network.state_dict().values())))


def flat(tensors: Any) -> torch.Tensor:
    return torch.cat([tensor.flatten().clone() for tensor in tensors])


def loader() -> DataLoader:
    return DataLoader(TensorDataset(torch.linspace(-1, 2, BATCHES)[:, None]))


def run(
    module: Scripted, folder: Path, monitor: str | None, resume: Path | None = None, callbacks=(), **options: Any
) -> BestCheckpoint:
    """Fits, until the end or until it is killed."""
    every = options.pop("every_n_steps", None)
    best = BestCheckpoint(folder, monitor=monitor, mode=options.pop("mode", None))
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[best, LastCheckpoint(str(folder), every_n_steps=every), *callbacks],
        **{**quiet, "max_epochs": EPOCHS, **options},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with suppress(Killed):
            trainer.fit(module, loader(), loader(), ckpt_path=resume, weights_only=True)
    return best


def best_of(seen: list[Seen], mode: str) -> Seen | None:
    """The oracle: the first of the best, and never a NaN."""
    numbers = [one for one in seen if not math.isnan(one.value)]
    if not numbers:
        return None
    top = (min if mode == "min" else max)(one.value for one in numbers)
    return next(one for one in numbers if one.value == top)


def assert_holds(folder: Path, best: BestCheckpoint, expected: Seen | None, compare_weights: bool) -> None:
    path = folder / "best.ckpt"
    assert path.is_file() == (expected is not None)
    assert best.best_model_path == (str(path) if expected else "")
    if expected is not None:
        held = torch.load(path, weights_only=True)
        assert held["global_step"] == expected.step
        assert float(best.best_model_score) == expected.value
        if compare_weights:
            torch.testing.assert_close(flat(held["state_dict"].values()), expected.weights, rtol=0, atol=0)
    if (folder / "previous.ckpt").is_file():
        last, previous = (torch.load(folder / f"{name}.ckpt", weights_only=True) for name in ("last", "previous"))
        assert previous["global_step"] < last["global_step"]


# name, mode as given, and which value is the better
METRICS = [
    ("val/acc1", None, "max"),
    ("val/loss", None, "min"),
    ("val/loss", "min", "min"),
    ("val/taste", "max", "max"),
    ("val/taste", "min", "min"),
    ("train/loss", None, "min"),
    ("goodness", "max", "max"),
]
VALUES = st.sampled_from([0.0, 0.25, 0.5, 0.5, 0.75, 1.0, math.nan, math.nan, math.inf, -math.inf])
OPTIONS = {
    "val_check_interval": st.sampled_from([1.0, 1.0, 0.5, 1, 3]),
    "check_val_every_n_epoch": st.sampled_from([1, 1, 2]),
    "accumulate_grad_batches": st.sampled_from([1, 1, 3]),
    "num_sanity_val_steps": st.sampled_from([0, 1]),
    "every_n_steps": st.sampled_from([None, 1, 3]),
}


@settings(max_examples=60, deadline=None, phases=[Phase.reuse, Phase.generate])
@given(data=st.data())
def test_best_ckpt_holds_the_best_validation(tmp_path_factory, data):
    """Whatever the options and the values, and wherever a run was killed and from whichever checkpoint it goes on."""
    folder = tmp_path_factory.mktemp("run")
    metric, mode, better = data.draw(st.sampled_from(METRICS), "metric")
    values = data.draw(st.lists(VALUES, min_size=17, max_size=17), "values")
    options = {**data.draw(st.fixed_dictionaries(OPTIONS), "options"), "mode": mode}
    averaged = data.draw(st.sampled_from([None, 0.5]), "ema_decay")
    kill_at = data.draw(st.sampled_from([None, *range(1, 12)]), "kill_at")
    # at the end of an epoch of training the checkpoint holds the average, and the epoch has seen the weights themselves
    weights = averaged is None or metric.startswith("val/")

    module = Scripted(values, metric, kill_at, ema_decay=averaged)
    best = run(module, folder, metric, **options)
    seen = module.seen
    assert_holds(folder, best, best_of(seen, better), weights)
    resumable = [name for name in ("last", "previous", "best") if (folder / f"{name}.ckpt").is_file()]
    if not resumable:
        return

    source = folder / f"{data.draw(st.sampled_from(resumable), 'resumed from')}.ckpt"
    in_place = data.draw(st.booleans(), "in place")
    resumed = Scripted(values, metric, ema_decay=averaged)
    begins = torch.load(source, weights_only=True)["global_step"]
    held = best_of(seen, better)
    if not in_place:
        folder = folder.with_name(folder.name + "-goes-on")
        # of the run before counts what had happened; a best of later, which replaced that of then, does not
        seen = [] if held is None or held.step > begins else [held]
    best = run(resumed, folder, metric, source, **{**options, "max_epochs": EPOCHS + 1 - (kill_at is not None)})
    assert_holds(folder, best, best_of([*seen, *resumed.seen], better), weights)


def test_a_run_that_is_over_takes_its_best_along(tmp_path):
    module = Scripted([1.0, 0.5, 0.0, *[0.75] * 14], "val/loss")
    run(module, tmp_path / "run", "val/loss")
    again = Scripted([0.0] * 17, "val/loss")
    best = run(again, tmp_path / "again", "val/loss", tmp_path / "run/last.ckpt")
    assert again.seen == []
    assert_holds(tmp_path / "again", best, best_of(module.seen, "min"), compare_weights=True)


@pytest.mark.parametrize(
    ("metric", "better"),
    [
        ("val/loss", "min"),
        ("val/loss_classifier", "min"),
        ("val_top1_err", "min"),
        ("val/ece", "min"),
        ("val/acc1", "max"),
        ("val/top5_acc", "max"),
        ("val/map_50", "max"),
        ("val/f1", "max"),
        ("MulticlassAUROC", None),
        ("val/temperature", None),
        ("val/neg_loss", None),
        ("val/acc_drop", None),
        ("val/loss_rpn_box_reg", "min"),
        ("val/maple", None),
    ],
)
def test_direction_of_a_metric(metric, better):
    assert direction(metric) == better


@pytest.mark.parametrize(
    ("monitor", "mode", "callbacks", "says"),
    [
        ("val/acc1", "min", [], "checkpoint.mode='min': a higher val/acc1 is better; leave mode out"),
        ("val/loss", "max", [], "checkpoint.mode='max': a lower val/loss is better"),
        ("val/taste", None, [], "checkpoint.monitor='val/taste': the name does not tell"),
        ("val/los", "min", [], "checkpoint.monitor='val/los' is not measured; choose one of val/acc1"),
        ("val/acc1", None, [EarlyStopping("val/acc1")], "EarlyStopping.mode='min': a higher val/acc1 is better"),
        ("val/acc1", None, [EarlyStopping("val/taste")], "EarlyStopping.monitor='val/taste' is not measured"),
        ("val/acc1", None, [ModelCheckpoint(save_last=True)], "save_last=True: last.ckpt is kept anyway"),
        ("val/acc1", None, [ModelCheckpoint(filename="best")], "filename='best': the run writes that file itself"),
    ],
)
def test_what_contradicts_itself_is_refused_before_the_first_step(tmp_path, monitor, mode, callbacks, says):
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint):
            callback.dirpath = str(tmp_path)
    module = Scripted([0.0] * 17, "val/acc1", kill_at=0)
    with pytest.raises(InputError) as raised:
        run(module, tmp_path, monitor, callbacks=callbacks, mode=mode)
    assert says in str(raised.value)
    assert not list(tmp_path.glob("*.ckpt"))


def test_a_metric_that_nobody_measures_is_refused_without_a_sanity_check_too(tmp_path):
    with pytest.raises(InputError, match=r"checkpoint.monitor='val/loss' is not measured; choose one of val/acc1"):
        run(Scripted([0.0] * 17, "val/acc1"), tmp_path, "val/loss", num_sanity_val_steps=0)


def test_a_tuner_that_restores_what_it_has_saved_is_no_resumed_run(tmp_path):
    values = [0.0] * 4 + [0.5] * 4 + [0.3] * 9
    finder = LearningRateFinder(num_training_steps=6, early_stop_threshold=None)
    best = run(Scripted(values, "val/acc1"), tmp_path, None, callbacks=[finder])
    assert (best.best_step, float(best.best_model_score)) == (4, 0.5)


def test_a_tuner_in_a_resumed_run_is_refused(tmp_path):
    """Lightning would forget the checkpoint over it, and train from the first step again."""
    run(Scripted([0.0] * 17, "val/acc1"), tmp_path, None)
    with pytest.raises(InputError, match="LearningRateFinder: a tuner in a resumed run would begin it anew"):
        run(Scripted([0.0] * 17, "val/acc1"), tmp_path, None, tmp_path / "last.ckpt", [LearningRateFinder()])


def test_step_and_epoch_may_be_followed_by_other_checkpoints(tmp_path):
    keep = ModelCheckpoint(tmp_path, "{step}", monitor="step", mode="max", save_top_k=2)
    run(Scripted([0.0] * 17, "val/acc1"), tmp_path, None, callbacks=[keep])
    assert sorted(path.name for path in tmp_path.glob("step=*")) == ["step=12.ckpt", "step=8.ckpt"]


def test_a_tasks_own_metric_is_better_when_higher_unless_its_name_says_otherwise(tmp_path):
    module = Scripted([-3.0] * 8 + [-1.0] * 4 + [-2.0] * 5, "val/neg_loss")
    module.monitor = "val/neg_loss"
    best = run(module, tmp_path, None)
    assert (best.best_step, float(best.best_model_score)) == (8, -1.0)


def test_the_best_of_several_files_of_the_first_version_goes_on(tmp_path):
    old = tmp_path / "old"
    values = [0.0] * 4 + [0.5] * 4 + [0.9] * 4 + [0.7] * 5
    run(Scripted(values, "val/acc1"), old, None)
    state = torch.load(old / "last.ckpt", weights_only=True)
    held = state["callbacks"].pop("BestCheckpoint")
    del held["mode"], held["best_step"]
    held["best_model_path"] = str(old / "mine.ckpt")
    state["callbacks"]["BestCheckpoint{'monitor': 'val/acc1', 'mode': 'max'}"] = held
    torch.save(state, old / "last.ckpt")
    torch.save({**state, "global_step": 8}, old / "mine.ckpt")
    (old / "best.ckpt").unlink()
    best = run(Scripted([0.8] * 17, "val/acc1"), tmp_path / "new", None, old / "last.ckpt", max_epochs=4)
    assert float(best.best_model_score) == pytest.approx(0.9)
    assert torch.load(tmp_path / "new/best.ckpt", weights_only=True)["global_step"] == 8


def test_other_checkpoints_beside_the_best(tmp_path):
    values = [0.0, 0.0, 0.0, 0.0, 0.2, 0.0, 0.0, 0.0, 0.9, 0.0, 0.0, 0.0, 0.5]
    best_two = ModelCheckpoint(tmp_path, "{step}", monitor="val/acc1", mode="max", save_top_k=2)
    run(Scripted(values, "val/acc1"), tmp_path, None, callbacks=[best_two])
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {
        "best.ckpt", "last.ckpt", "previous.ckpt", "step=8.ckpt", "step=12.ckpt"}  # fmt: skip
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"] == 8


def test_another_metric_is_followed_in_a_new_folder_only(tmp_path):
    class Both(Scripted):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.log("val/loss", self.values[self.global_step])

    values = [0.0] * 4 + [0.1] * 4 + [0.2] * 4 + [0.3] * 5
    old, new = tmp_path / "old", tmp_path / "new"
    run(Both(values, "val/acc1"), old, "val/acc1")
    with pytest.raises(InputError, match=r"monitor='val/loss' .mode min.: best.ckpt of this run follows val/acc1"):
        run(Both(values, "val/acc1"), old, "val/loss", old / "last.ckpt", max_epochs=4)
    best = run(Both(values, "val/acc1"), new, "val/loss", old / "last.ckpt", max_epochs=4)
    assert (best.best_step, float(best.best_model_score)) == (16, pytest.approx(0.3))


def test_a_best_that_was_deleted_is_told(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    values = [0.0] * 4 + [0.5] * 8 + [0.3] * 5
    run(Scripted(values, "val/acc1"), old, None)
    (old / "best.ckpt").unlink()
    shutil.copytree(old, new)
    module = Scripted(values, "val/acc1")
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        max_epochs=4,
        callbacks=[best := BestCheckpoint(new), LastCheckpoint(str(new))],
    )
    with pytest.warns(UserWarning, match=r"best.ckpt .val/acc1=0.5. is not there any more"):
        trainer.fit(module, loader(), loader(), ckpt_path=new / "last.ckpt", weights_only=True)
    assert best.best_step == 16
