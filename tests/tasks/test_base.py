"""Optimisation, averaging, resuming and checkpoints of every task, on a network small enough to compute by hand."""

import math

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from awconv.errors import InputError
from awconv.tasks import ClassificationTask

BATCH, CLASSES = 8, 3


class TinyTask(ClassificationTask):
    """A network without batch statistics, so that what it computes depends on its weights alone."""

    def build_network(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.LayerNorm(6), nn.Linear(6, CLASSES))


class Order(L.Callback):
    """Records, at every optimiser step, the learning rate it was taken with and the weights it led to."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.lrs: list[float] = []
        self.weights: list[torch.Tensor] = []
        self.momenta: list[float] = []
        self.stop_after = stop_after

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.lrs.append(optimizer.param_groups[0]["lr"])
        self.momenta.append(optimizer.param_groups[0].get("momentum", optimizer.param_groups[0].get("betas", [0])[0]))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append(flat(pl_module))
        if trainer.global_step == self.stop_after:
            trainer.should_stop = True


class Data(L.LightningDataModule):
    """Fixed pictures in a fixed order."""

    def __init__(self, batches: int = 5, scale: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        images = torch.randn(batches * BATCH, 3, 2, 2, generator=generator) * scale
        self.data = TensorDataset(images, torch.randint(CLASSES, (len(images),), generator=generator))

    def train_dataloader(self):
        return DataLoader(self.data, BATCH)

    val_dataloader = test_dataloader = train_dataloader


def flat(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


def task(**kwargs) -> TinyTask:
    torch.manual_seed(0)
    return TinyTask("tiny", num_classes=CLASSES, **{"lr": 0.5, **kwargs})


def trainer(tmp_path, *callbacks, **kwargs) -> L.Trainer:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    checkpointing = any(isinstance(c, L.pytorch.callbacks.ModelCheckpoint) for c in callbacks)
    options = {"max_epochs": 4, "accelerator": "cpu", "num_sanity_val_steps": 0, "enable_checkpointing": checkpointing}
    return L.Trainer(default_root_dir=tmp_path, callbacks=list(callbacks), **quiet, **{**options, **kwargs})


# ---- schedules: the learning rate of every step, from the formulas -------------------------------


def warmed(steps: int, warmup: int, after) -> list[float]:
    return [0.01 + 0.99 * s / warmup if s < warmup else after(s) for s in range(steps)]


@pytest.mark.parametrize(
    ("options", "accumulate", "expected"),
    [
        ({"lr_schedule": "constant"}, 1, [1.0] * 20),
        (
            {"lr_schedule": "cosine", "warmup_epochs": 1, "min_lr": 0.05},
            1,
            warmed(20, 5, lambda s: 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (s - 5) / 15))),
        ),
        ({"lr_schedule": "cosine"}, 1, [0.5 * (1 + math.cos(math.pi * s / 20)) for s in range(20)]),
        (
            {"lr_schedule": "multistep", "milestones": [2, 3], "gamma": 0.2},
            1,
            [1.0] * 10 + [0.2] * 5 + [0.04] * 5,
        ),
        ({"lr_schedule": "multistep", "milestones": [2], "warmup_epochs": 0.5}, 5, [1.0, 1.0, 0.1, 0.1]),
        # five batches in twos make three steps an epoch
        ({"lr_schedule": "multistep", "milestones": [2]}, 2, [1.0] * 6 + [0.1] * 6),
    ],
)
def test_learning_rate_of_every_step(tmp_path, options, accumulate, expected):
    order = Order()
    trainer(tmp_path, order, accumulate_grad_batches=accumulate).fit(task(**options), Data())
    np.testing.assert_allclose(np.array(order.lrs) / 0.5, expected, rtol=1e-12)


@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_onecycle_is_torchs_own(tmp_path, warmup):
    order = Order()
    trainer(tmp_path, order).fit(
        task(lr_schedule="onecycle", warmup_epochs=warmup, optimizer_options={"momentum": 0.9}), Data()
    )
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0, momentum=0.9)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.5, total_steps=20, pct_start=0.25 if warmup else 0.3
    )
    lrs, momenta = [], []
    for _ in range(20):
        lrs.append(optimizer.param_groups[0]["lr"])
        momenta.append(optimizer.param_groups[0]["momentum"])
        optimizer.step()
        reference.step()
    np.testing.assert_allclose(order.lrs, lrs, rtol=1e-12)
    np.testing.assert_allclose(order.momenta, momenta, rtol=1e-12)
    assert order.lrs[-1] < 1e-4


def test_cosine_reaches_min_lr_when_the_last_step_is_done(tmp_path):
    model = task(lr_schedule="cosine", min_lr=0.02)
    trainer(tmp_path).fit(model, Data())
    assert model.optimizers().param_groups[0]["lr"] == pytest.approx(0.02, rel=1e-12)


def test_a_schedule_without_end_is_refused(tmp_path):
    with pytest.raises(InputError, match="max_epochs"):
        trainer(tmp_path, max_epochs=-1).fit(task(), Data())


# ---- optimisers ----------------------------------------------------------------------------------


class Endless(Data):
    """Batches of which nobody knows the number."""

    def train_dataloader(self):
        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self):
                return iter([(torch.zeros(3, 2, 2), 0)] * 4 * BATCH)

        return DataLoader(Stream(), BATCH)


@pytest.mark.parametrize("options", [{"lr_schedule": "multistep", "milestones": [2]}, {"warmup_epochs": 1}])
def test_epochs_of_unknown_length_are_no_measure(tmp_path, options):
    with pytest.raises(InputError, match=r"the data do not tell how long an epoch is; give model.warmup_steps"):
        trainer(tmp_path, max_steps=6).fit(task(**options), Endless())


def test_epochs_of_unknown_length_do_where_steps_are_given(tmp_path):
    order = Order()
    trainer(tmp_path, order, max_steps=6).fit(task(lr_schedule="cosine", warmup_steps=2), Endless())
    assert len(order.lrs) == 6
    assert order.lrs[2] == max(order.lrs) == 0.5


def test_a_schedule_of_ones_own_needs_no_end(tmp_path):
    class Own(TinyTask):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    order = Order(stop_after=7)
    torch.manual_seed(0)
    trainer(tmp_path, order, max_epochs=-1).fit(Own("tiny", num_classes=CLASSES), Data())
    assert order.lrs == [0.1] * 7


def test_weight_decay_can_spare_norms_and_biases(tmp_path):
    model = task(weight_decay=0.1, decay_norm_and_bias=False, optimizer="AdamW")
    trainer(tmp_path, max_epochs=1).fit(model, Data())
    optimizer = model.optimizers().optimizer
    assert type(optimizer) is torch.optim.AdamW
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    by_name = {name: decay[id(p)] for name, p in model.named_parameters()}
    assert by_name == {
        "network.1.weight": 0.1,
        "network.1.bias": 0.0,
        "network.2.weight": 0.0,
        "network.2.bias": 0.0,
        "network.3.weight": 0.1,
        "network.3.bias": 0.0,
    }


def test_decay_is_zero_unless_asked_for(tmp_path):
    model = task(optimizer="adamw")  # whose own default is 0.01
    trainer(tmp_path, max_epochs=1).fit(model, Data())
    assert {group["weight_decay"] for group in model.optimizers().param_groups} == {0.0}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"optimizer": "adamm"}, ["'adamm'", "did you mean 'adam"]),
        ({"optimizer": "xyzzy"}, ["choose one of", "sgd"]),
        ({"lr": -1.0}, ["lr=-1.0"]),
        ({"lr": math.nan}, ["lr=nan"]),
        ({"weight_decay": -0.1}, ["weight_decay=-0.1"]),
        ({"warmup_epochs": -1}, ["warmup_epochs=-1"]),
        ({"ema_decay": 1.5}, ["ema_decay=1.5", "between 0 and 1"]),
        ({"lr_schedule": "multistep"}, ["milestones"]),
        ({"lr_schedule": "cosin"}, ["'cosin'", "cosine"]),
        ({"gamma": -1.0}, ["gamma=-1.0"]),
        ({"min_lr": 5.0}, ["min_lr=5.0", "lr=0.1"]),
        ({"milestones": [-1]}, ["milestones=[-1]"]),
        ({"optimizer_options": {"lr": 3}}, ["optimizer_options holds lr", "model.lr"]),
        ({"label_smoothing": 1.0}, ["label_smoothing=1.0"]),
        ({"class_names": ["a", "b"]}, ["2 names", "num_classes=3"]),
        ({"num_classes": 0}, ["num_classes=0"]),
    ],
)
def test_bad_arguments(options, says):
    with pytest.raises(InputError) as caught:
        TinyTask("tiny", **{"num_classes": CLASSES, **options})
    assert [part for part in says if part not in str(caught.value)] == []
    assert "\n" not in str(caught.value)


def test_an_option_that_the_optimiser_does_not_take(tmp_path):
    with pytest.raises(InputError, match=r"optimizer='sgd' does not take .*betas"):
        trainer(tmp_path).fit(task(optimizer_options={"betas": [0.9, 0.99]}), Data())


@pytest.mark.parametrize(
    ("options", "run", "fused"),
    [
        ({}, {}, True),
        ({"optimizer": "adamw"}, {}, True),
        ({"optimizer": "adadelta"}, {}, None),  # has none
        ({"optimizer_options": {"foreach": True}}, {}, None),
        ({"optimizer_options": {"fused": False}}, {}, False),
        ({}, {"gradient_clip_val": 1.0}, None),
    ],
)
def test_an_optimiser_is_fused_on_cuda_where_it_can_be(tmp_path, monkeypatch, options, run, fused):
    model = task(lr_schedule="constant", **options)
    run = trainer(tmp_path, max_epochs=1, **run)
    run.fit(model, Data())
    assert not model._build_optimizer().defaults.get("fused")
    monkeypatch.setattr(type(run.strategy), "root_device", torch.device("cuda"))
    assert model._build_optimizer().defaults.get("fused") == fused
    if fused and not options:
        with monkeypatch.context() as patch:
            patch.setattr(run.precision_plugin, "scaler", object(), raising=False)
            assert not model._build_optimizer().defaults.get("fused")
        sharding = L.pytorch.strategies.ModelParallelStrategy
        monkeypatch.setattr(sharding, "root_device", torch.device("cuda"))
        monkeypatch.setattr(run._accelerator_connector, "strategy", sharding())
        assert not model._build_optimizer().defaults.get("fused")


@pytest.mark.parametrize("before", [None, True])
@pytest.mark.parametrize("now", [None, {"foreach": True}, {"fused": True}])
def test_how_a_step_is_computed_is_not_resumed(tmp_path, before, now):
    checkpoint = L.pytorch.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    first = {"optimizer_options": {"fused": True}} if before else {}
    trainer(tmp_path, checkpoint, max_epochs=1).fit(task(lr_schedule="constant", **first), Data())
    model = task(lr_schedule="constant", optimizer_options=now)
    run = trainer(tmp_path, max_epochs=2)
    run.fit(model, Data(), ckpt_path=str(tmp_path / "last.ckpt"))
    for group in run.optimizers[0].param_groups:
        assert (group["fused"], group["foreach"]) == ((now or {}).get("fused"), (now or {}).get("foreach"))


# ---- averaging -----------------------------------------------------------------------------------


def test_ema_is_what_checkpoints_hold_and_what_is_tested(tmp_path):
    order, checkpoint = Order(), L.pytorch.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    model = task(ema_decay=0.8, lr_schedule="constant")
    run = trainer(tmp_path, order, checkpoint, max_epochs=1)
    run.fit(model, Data())
    average = order.weights[0]  # the average starts as a copy of the first step's weights
    for weights in order.weights[1:]:
        average = 0.8 * average + 0.2 * weights
    loaded = TinyTask.load_from_checkpoint(tmp_path / "last.ckpt")
    torch.testing.assert_close(flat(loaded), average)
    assert not torch.allclose(average, order.weights[-1], atol=1e-3)
    for evaluate in (run.test, run.validate):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        evaluate(model, datamodule=Data(), ckpt_path=str(tmp_path / "last.ckpt"), verbose=False)
        torch.testing.assert_close(flat(model), average)


# ---- compilation and memory format ---------------------------------------------------------------


def test_channels_last_reaches_network_and_images():
    class Probe(nn.Conv2d):
        def forward(self, images):
            self.seen = images.is_contiguous(memory_format=torch.channels_last)
            return super().forward(images)

    class Conv(ClassificationTask):
        def build_network(self):
            return Probe(3, 4, 3)

    model = Conv("conv", num_classes=4, channels_last=True)
    model(torch.randn(2, 3, 5, 5))
    assert model.network.seen
    assert model.network.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
def test_compiled_training_keeps_clean_keys_and_the_same_result(tmp_path):
    runs = []
    for compiled in (False, True):
        model = task(compile=compiled)
        checkpoint = L.pytorch.callbacks.ModelCheckpoint(tmp_path / str(compiled), save_last=True)
        trainer(tmp_path, checkpoint, max_epochs=1).fit(model, Data())
        state = torch.load(tmp_path / str(compiled) / "last.ckpt", weights_only=True)["state_dict"]
        assert not any("_orig_mod" in key for key in state)
        runs.append(flat(model))
    torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-5)


# ---- a loss that is no number --------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_and_names_the_step(tmp_path):
    data = Data()
    data.data.tensors[0][3 * BATCH] = math.nan  # the fourth batch of every epoch
    checkpoint = L.pytorch.callbacks.ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1, save_top_k=-1)
    with pytest.raises(InputError, match=r"not finite at step 3 \(epoch 0\).*model.lr \(now 0.5\)"):
        trainer(tmp_path, checkpoint).fit(task(), data)
    steps = [torch.load(path, weights_only=True)["global_step"] for path in tmp_path.glob("*.ckpt")]
    assert max(steps) == 3  # the three good steps
    assert all(
        torch.load(path, weights_only=True)["state_dict"]["network.1.weight"].isfinite().all()
        for path in tmp_path.glob("*.ckpt")
    )


# ---- resuming ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"lr_schedule": "cosine", "optimizer_options": {"momentum": 0.9, "nesterov": True}},
        {
            "lr_schedule": "onecycle",
            "optimizer": "adamw",
            "weight_decay": 0.1,
            "decay_norm_and_bias": False,
            "lr": 0.01,
        },
        {"lr_schedule": "multistep", "milestones": [1, 3], "warmup_epochs": 1, "ema_decay": 0.9},
    ],
)
def test_resume_equals_the_uninterrupted_run(tmp_path, options):
    whole_order, whole = Order(), task(**options)
    run = trainer(tmp_path, whole_order)
    run.fit(whole, Data())

    first = task(**options)
    checkpoint = L.pytorch.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, Order(stop_after=10), checkpoint).fit(first, Data())
    order, second = Order(), task(**options)
    torch.manual_seed(1)
    for parameter in second.parameters():  # nothing may come from a lucky initialisation
        nn.init.normal_(parameter)
    resumed = trainer(tmp_path, order)
    resumed.fit(second, Data(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(flat(second), flat(whole))
    assert order.lrs == whole_order.lrs[10:]
    assert order.momenta == whole_order.momenta[10:]
    assert resumed.global_step == run.global_step == 20


class Dropping(TinyTask):
    """A network that draws random numbers while it trains."""

    def build_network(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, CLASSES))


@pytest.mark.parametrize("workers_draw", [False, True])
def test_dropout_of_a_resumed_run_is_that_of_the_uninterrupted_one(tmp_path, workers_draw):
    class Noisy(L.Callback):
        def on_train_batch_start(self, *args):
            if workers_draw:  # whatever else draws from the generator between the steps
                torch.rand(3)

    def fit(*callbacks, **options) -> Dropping:
        L.seed_everything(7)
        module = Dropping("tiny", num_classes=CLASSES, lr=0.5)
        trainer(tmp_path, *callbacks).fit(module, Data(), **options)
        return module

    whole = fit(Noisy())
    fit(Order(stop_after=10), L.pytorch.callbacks.ModelCheckpoint(tmp_path, save_last=True))
    resumed = fit(Noisy(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(flat(whole), flat(resumed))


def test_each_step_draws_numbers_of_its_own(tmp_path):
    drawn = []

    class Recording(Dropping):
        def forward(self, images):
            drawn.append(torch.rand(4))
            return super().forward(images)

    L.seed_everything(7)
    trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(Recording("tiny", num_classes=CLASSES, lr=0.5), Data())
    assert len(drawn) == 5
    assert len({tuple(row.tolist()) for row in drawn}) == 5


def resumed_optimizer(tmp_path, before: dict, after: dict, max_epochs: int = 4):
    checkpoint = L.pytorch.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, Order(stop_after=10), checkpoint).fit(task(**before), Data())
    order, model = Order(), task(**after)
    run = trainer(tmp_path, order, max_epochs=max_epochs)
    run.fit(model, Data(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    return order, model.optimizers().optimizer


def test_arguments_of_the_resumed_run_win(tmp_path):
    before = {
        "lr_schedule": "multistep",
        "milestones": [3],
        "weight_decay": 0.1,
        "optimizer_options": {"momentum": 0.9},
    }
    after = before | {"lr": 0.05, "weight_decay": 0.2, "optimizer_options": {"momentum": 0.5}, "gamma": 0.5}
    order, optimizer = resumed_optimizer(tmp_path, before, after)
    np.testing.assert_allclose(order.lrs, [0.05] * 5 + [0.025] * 5)
    assert optimizer.param_groups[0]["weight_decay"] == 0.2
    assert order.momenta == [0.5] * 10


def test_resuming_onecycle_with_another_peak(tmp_path):
    before = {"lr_schedule": "onecycle", "optimizer_options": {"momentum": 0.9}}
    plain, _ = resumed_optimizer(tmp_path, before, before)
    scaled, _ = resumed_optimizer(tmp_path, before, before | {"lr": 0.05})
    np.testing.assert_allclose(scaled.lrs, np.array(plain.lrs) / 10, rtol=1e-9)


@pytest.mark.parametrize("schedule", ["onecycle", "cosine"])
def test_resuming_to_train_longer_follows_the_longer_schedule(tmp_path, schedule):
    options = {"lr_schedule": schedule, "optimizer_options": {"momentum": 0.9}}
    longer = Order()
    trainer(tmp_path, longer, max_epochs=6).fit(task(**options), Data())
    resumed, _ = resumed_optimizer(tmp_path, options, options, max_epochs=6)
    np.testing.assert_allclose(resumed.lrs, longer.lrs[10:], rtol=1e-9)
    np.testing.assert_allclose(resumed.momenta, longer.momenta[10:], rtol=1e-9)


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "multistep"])
@pytest.mark.parametrize(
    "change",
    [{"limit_train_batches": 1}, {"accumulate_grad_batches": 2}, {"limit_train_batches": 3, "max_epochs": 6}],
    ids=["shorter epochs", "accumulated", "fewer batches and more epochs"],
)
def test_a_resumed_run_with_other_epochs_is_as_far_in_its_schedule_as_in_its_epochs(tmp_path, schedule, change):
    options = {"lr_schedule": schedule, "optimizer_options": {"momentum": 0.9}, "milestones": [1, 3]}
    checkpoint = L.pytorch.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, Order(stop_after=10), checkpoint).fit(task(**options), Data())  # two epochs of five steps
    resumed, whole = Order(), Order()
    trainer(tmp_path, resumed, **change).fit(task(**options), Data(), ckpt_path=tmp_path / "last.ckpt")
    run = trainer(tmp_path, whole, **change)
    run.fit(task(**options), Data())
    per_epoch = run.global_step // run.max_epochs
    assert resumed.lrs == whole.lrs[2 * per_epoch :]
    assert resumed.momenta == whole.momenta[2 * per_epoch :]


def test_a_run_that_ends_by_steps_goes_on_by_steps(tmp_path):
    options = {"max_epochs": None, "max_steps": 20}
    checkpoint = L.pytorch.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    whole, resumed = Order(), Order()
    trainer(tmp_path, whole, **options).fit(task(), Data())
    trainer(tmp_path, Order(stop_after=10), checkpoint, **options).fit(task(), Data())
    trainer(tmp_path, resumed, limit_train_batches=1, **options).fit(task(), Data(), ckpt_path=tmp_path / "last.ckpt")
    assert resumed.lrs == whole.lrs[10:]


@pytest.mark.parametrize("schedule", ["onecycle", "cosine"])
def test_accumulation_that_changes_from_epoch_to_epoch(tmp_path, caplog, schedule):
    order = Order()
    accumulation = L.pytorch.callbacks.GradientAccumulationScheduler({0: 5, 1: 2, 3: 1})
    with caplog.at_level("INFO"):
        trainer(tmp_path, order, accumulation).fit(task(lr_schedule=schedule), Data())
    said = [record.message for record in caplog.records if "global batch" in record.message]
    assert [int(line.split()[2]) for line in said] == [5 * BATCH, 2 * BATCH, BATCH]
    assert len(order.lrs) == 1 + 3 + 3 + 5
    plain = Order()  # twelve epochs of a step
    trainer(tmp_path, plain, limit_train_batches=1, max_epochs=12).fit(task(lr_schedule=schedule), Data())
    assert order.lrs == plain.lrs


def test_milestones_are_epochs_where_accumulation_changes(tmp_path):
    order = Order()
    accumulation = L.pytorch.callbacks.GradientAccumulationScheduler({0: 5, 1: 1})
    trainer(tmp_path, order, accumulation).fit(task(lr_schedule="multistep", milestones=[1, 3]), Data())
    np.testing.assert_allclose(order.lrs, [0.5] + [0.05] * 10 + [0.005] * 5)


@pytest.mark.parametrize("schedule", ["constant", "onecycle", "cosine"])
def test_the_learning_rate_that_a_tuner_finds_is_the_peak_of_the_schedule(tmp_path, caplog, schedule):
    order = Order(stop_after=10)
    finder = L.pytorch.callbacks.LearningRateFinder(max_lr=1e30, num_training_steps=60, early_stop_threshold=None)
    model = task(lr_schedule=schedule)
    with caplog.at_level("INFO"):
        trainer(tmp_path, order, finder, max_epochs=12).fit(model, Data())
    assert not np.isfinite(finder.optimal_lr.results["loss"]).all(), "no loss that is no number on the way"
    found = finder.optimal_lr.suggestion()
    assert model.hparams["lr"] == found != 0.5
    (said,) = (record.message for record in caplog.records if "global batch" in record.message)
    assert f"model.lr={found}" in said
    plain = Order(stop_after=10)
    trainer(tmp_path, plain, max_epochs=12).fit(task(lr_schedule=schedule, lr=found), Data())
    np.testing.assert_allclose(order.lrs, plain.lrs, rtol=1e-12)


def test_resuming_with_another_schedule_follows_it_from_the_first_step(tmp_path):
    resumed, _ = resumed_optimizer(tmp_path, {"lr_schedule": "cosine"}, {"lr_schedule": "constant", "lr": 0.2})
    np.testing.assert_allclose(resumed.lrs, [0.2] * 10)


def test_resuming_with_weight_decay_where_there_was_none(tmp_path):
    after = {"weight_decay": 0.1, "decay_norm_and_bias": False}
    _, optimizer = resumed_optimizer(tmp_path, {"lr_schedule": "constant"}, {"lr_schedule": "constant", **after})
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize(
    ("optimizer", "options"), [("sgd", {}), ("adagrad", {}), ("adamw", {}), ("sgd", {"momentum": 0.9})]
)
@pytest.mark.parametrize("warmup", [0.0, 0.2, 4.0])
def test_onecycle_takes_any_optimiser_and_warmup(tmp_path, optimizer, options, warmup):
    order, model = (
        Order(),
        task(lr_schedule="onecycle", optimizer=optimizer, optimizer_options=options, warmup_epochs=warmup),
    )
    trainer(tmp_path, order).fit(model, Data())
    assert max(order.lrs) <= 0.5 * (1 + 1e-9)
    assert order.lrs[-1] < order.lrs[1]
    if optimizer == "sgd" and not options:
        assert set(order.momenta) == {0}


@pytest.mark.parametrize("change", [{"optimizer": "adamw"}, {"lr_schedule": "onecycle"}])
def test_resuming_with_another_kind_of_state_is_refused(tmp_path, change):
    with pytest.raises(InputError, match=r"does not fit optimizer=.*initial_weights"):
        resumed_optimizer(tmp_path, {}, change)


class OwnOptimizer(TinyTask):
    """Optimises in one group, with an optimiser that has no name here."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.5)


class OwnGroups(TinyTask):
    """Learns at a rate of its own in each layer."""

    def _build_optimizer(self):
        return torch.optim.Adam([{"params": [p], "lr": 0.1 / k} for k, p in enumerate(self.parameters(), 1)])


@pytest.mark.parametrize("kind", [OwnOptimizer, OwnGroups])
def test_a_fork_with_an_optimiser_of_its_own_resumes(tmp_path, kind):
    whole, begun, resumed = Order(), Order(stop_after=10), Order()
    saving = L.pytorch.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    for callbacks in ([whole], [begun, saving]):
        torch.manual_seed(0)
        trainer(tmp_path, *callbacks).fit(kind("tiny", num_classes=CLASSES), Data())
    run = trainer(tmp_path, resumed)
    run.fit(kind("tiny", num_classes=CLASSES), Data(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert len(resumed.weights) == 10
    torch.testing.assert_close(resumed.weights, whole.weights[10:], rtol=0, atol=0)


@pytest.mark.parametrize(
    "name",
    [
        *("sgd", "adam", "adamw", "nadam", "radam", "adamax"),
        *("adagrad", "adadelta", "rmsprop", "rprop", "asgd", "adafactor"),
    ],
)
def test_any_optimiser_resumes(tmp_path, name):
    order, _ = resumed_optimizer(tmp_path, {"optimizer": name}, {"optimizer": name})
    assert len(order.weights) == 10


UNFIT = {
    "a moment is missing": lambda state: state["state"][0].pop("exp_avg"),
    "a moment is nothing": lambda state: state["state"][0].update(exp_avg=None),
    "a moment of another shape": lambda state: state["state"][0].update(exp_avg_sq=torch.ones(7)),
    "no step": lambda state: state["state"][0].pop("step"),
    "the step is a text": lambda state: state["state"][0].update(step="x"),
    "many steps": lambda state: state["state"][0].update(step=torch.ones(3)),
    "an option is missing": lambda state: state["param_groups"][0].pop("betas"),
    "an option too short": lambda state: state["param_groups"][1].update(betas=(0.9,)),
    "an option is nothing": lambda state: state["param_groups"][1].update(eps=None),
    "a state of nothing": lambda state: state["state"].update({99: {}}),
    "a state that is none": lambda state: state["state"].update({0: 3}),
    "no numbers": lambda state: state["param_groups"][0]["params"].__setitem__(0, [1]),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_state_that_no_optimiser_goes_on_from(tmp_path, case):
    checkpoint = L.pytorch.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, checkpoint, max_epochs=1).fit(task(optimizer="adamw"), Data())
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    UNFIT[case](content["optimizer_states"][0])
    torch.save(content, tmp_path / "unfit.ckpt")
    with pytest.raises(InputError, match=r"adamw cannot go on from its state in the checkpoint \(.+initial_weights"):
        trainer(tmp_path).fit(task(optimizer="adamw"), Data(), ckpt_path=tmp_path / "unfit.ckpt", weights_only=True)


def test_a_state_of_another_device_is_gone_on_from(tmp_path):
    checkpoint = L.pytorch.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, checkpoint, max_epochs=1).fit(task(optimizer="adamw"), Data())
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for group in content["optimizer_states"][0]["param_groups"]:
        group.update(capturable=True, foreach=True, fused=True, differentiable=True)
    torch.save(content, tmp_path / "cuda.ckpt")
    order = Order()
    trainer(tmp_path, order).fit(task(optimizer="adamw"), Data(), ckpt_path=tmp_path / "cuda.ckpt", weights_only=True)
    assert len(order.weights) == 15


def test_options_that_need_another_state(tmp_path):
    before = {"optimizer": "rmsprop"}
    with pytest.raises(InputError, match=r"KeyError: 'momentum_buffer'.*optimizer_options of that run"):
        resumed_optimizer(tmp_path, before, before | {"optimizer_options": {"momentum": 0.9}})


# ---- checkpoints ---------------------------------------------------------------------------------


def test_a_checkpoint_of_another_network_says_what_differs(tmp_path):
    checkpoint = L.pytorch.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, checkpoint, max_epochs=1).fit(task(), Data())
    other = ClassificationTask("resnet20", num_classes=CLASSES)
    with pytest.raises(InputError, match=r"another network.*missing.*network\.conv1.*another architecture"):
        trainer(tmp_path).test(other, datamodule=Data(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)


def test_checkpoints_hold_primitives_and_load_in_plain_python(tmp_path):
    source = ClassificationTask("resnet20", num_classes=CLASSES)
    torch.save(source.network.state_dict(), tmp_path / "weights.pth")
    model = ClassificationTask(
        "resnet20",
        aw={"reduction": 8},
        num_classes=CLASSES,
        class_names=["a", "b", "c"],
        initial_weights=str(tmp_path / "weights.pth"),
    )
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model.eval()(images), source.eval()(images), rtol=1e-4, atol=1e-5)
    run = trainer(tmp_path, max_epochs=1)
    run.strategy.connect(model)
    run.save_checkpoint(tmp_path / "model.ckpt")
    (tmp_path / "weights.pth").unlink()

    content = torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert content["hyper_parameters"]["aw"] == {"reduction": 8}
    loaded = ClassificationTask.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert loaded.class_names == ["a", "b", "c"]
    torch.testing.assert_close(loaded.eval()(images), model(images), rtol=0, atol=0)
