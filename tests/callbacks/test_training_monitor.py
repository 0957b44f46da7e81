"""TrainingMonitor through real trainers and a clock that the test turns itself."""

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import SimpleProfiler
from torch.utils.data import DataLoader, Dataset

from awconv.callbacks import TrainingMonitor, training_monitor
from awconv.callbacks.training_monitor import _samples_of

FETCH, STEP, VALIDATE, LEAVE = 0.25, 1.0, 100.0, 1000.0  # seconds: a sample, a step, a validation step, an epoch's end


class Clock:
    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(training_monitor, "time", clock)
    return clock


class Slow(Dataset):
    """Samples that take their time."""

    def __init__(self, clock, n, seconds=FETCH):
        self.clock, self.n, self.seconds = clock, n, seconds
        self.samples = torch.randn(n, 3, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        self.clock.now += self.seconds
        return self.samples[index], index % 2


class Module(pl.LightningModule):
    def __init__(self, clock, seconds=STEP):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)
        torch.nn.init.constant_(self.layer.weight, 0.1)
        self.clock, self.seconds = clock, seconds

    def training_step(self, batch):
        self.clock.now += self.seconds
        return torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def validation_step(self, batch):
        self.clock.now += VALIDATE
        return None

    def on_train_epoch_end(self):
        self.clock.now += LEAVE

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


class Recorder(Logger):
    name, version = "recorder", 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step):
        self.rows.append((step, {k: v for k, v in metrics.items() if k.startswith("train/")}))


def fit(tmp_path, module, train, validation=None, monitor=None, **options):
    recorder = Recorder()
    options = {"max_epochs": 1, "log_every_n_steps": 2, "num_sanity_val_steps": 0, "logger": recorder} | options
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[monitor or TrainingMonitor()],
        **options,
    )
    trainer.fit(module, train, validation)
    return {step: row for step, row in recorder.rows if row}, trainer


def test_rate_and_waiting_are_of_the_time_between_two_logs(tmp_path, clock):
    rows, _ = fit(tmp_path, Module(clock), DataLoader(Slow(clock, 24), 4))
    # the first batch is left out: the first row is of one batch, the others are of two
    assert sorted(rows) == [1, 3, 5]
    for row in rows.values():
        assert row["train/samples_per_second"] == pytest.approx(4 / (4 * FETCH + STEP))
        assert row["train/data_wait"] == pytest.approx(4 * FETCH / (4 * FETCH + STEP))
        assert "train/gpu_memory_gb" not in row


def test_validation_and_the_end_of_an_epoch_do_not_count(tmp_path, clock):
    rows, _ = fit(
        tmp_path,
        Module(clock),
        DataLoader(Slow(clock, 20), 4),
        DataLoader(Slow(clock, 8, seconds=7.0), 4),
        max_epochs=3,
        val_check_interval=2,
        num_sanity_val_steps=1,
    )
    assert len(rows) == 7
    for row in rows.values():
        assert row["train/samples_per_second"] == pytest.approx(4 / (4 * FETCH + STEP))
        assert row["train/data_wait"] == pytest.approx(4 * FETCH / (4 * FETCH + STEP))


def test_what_another_callback_takes_counts_but_is_no_waiting(tmp_path, clock):
    class Slowpoke(Module):
        def on_train_batch_end(self, *args):
            self.clock.now += 2.0

    rows, _ = fit(tmp_path, Slowpoke(clock), DataLoader(Slow(clock, 24), 4))
    # the module's hook comes after the callback's, so that of the first batch, and not that of the last, is inside
    assert rows[3]["train/samples_per_second"] == pytest.approx(8 / (2 * (4 * FETCH + STEP + 2)))
    assert rows[3]["train/data_wait"] == pytest.approx(8 * FETCH / (2 * (4 * FETCH + STEP + 2)))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_gradient_norm_is_that_before_clipping_at_the_steps_that_are_logged(tmp_path, clock, accumulate):
    module = Module(clock)
    norms = {}
    original = module.configure_gradient_clipping

    def clip(optimizer, *args, **kwargs):
        norms[module.global_step] = torch.cat([p.grad.flatten() for p in module.parameters()]).double().norm().item()
        original(optimizer, *args, **kwargs)

    module.configure_gradient_clipping = clip
    rows, _ = fit(
        tmp_path,
        module,
        DataLoader(Slow(clock, 46), 4),
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1e-3,
    )
    assert sorted(rows) == ([1, 3, 5, 7, 9, 11] if accumulate == 1 else [1, 3])
    for step, row in rows.items():
        assert row["train/grad_norm"] == pytest.approx(norms[step], rel=1e-5)
    if accumulate == 3:
        # five batches of four since the first, then the last six, of which the last has two samples
        assert rows[1]["train/samples_per_second"] == pytest.approx(20 / (20 * FETCH + 5 * STEP))
        assert rows[3]["train/samples_per_second"] == pytest.approx(22 / (22 * FETCH + 6 * STEP))


def test_a_resumed_run_starts_its_clock_anew(tmp_path, clock):
    monitor = TrainingMonitor()
    module, data = Module(clock), DataLoader(Slow(clock, 24), 4)
    _, trainer = fit(tmp_path, module, data, monitor=monitor)
    path = tmp_path / "x.ckpt"
    trainer.save_checkpoint(path)
    clock.now += 1e6
    recorder = Recorder()
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=1,
        log_every_n_steps=2,
        logger=recorder,
        callbacks=[monitor],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, data, ckpt_path=path)
    rows = {step: row for step, row in recorder.rows if row}
    assert sorted(rows) == [7, 9, 11]
    assert {round(row["train/samples_per_second"], 6) for row in rows.values()} == {4 / (4 * FETCH + STEP)}


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        ((torch.zeros(5, 3, 8, 8), torch.zeros(5)), 5),
        ([torch.zeros(5, 3), torch.zeros(5)], 5),
        (([torch.zeros(3, 9, 8), torch.zeros(3, 5, 4)], [{}, {}]), 2),
        ({"image": torch.zeros(4, 3), "label": torch.zeros(4)}, 4),
        (torch.zeros(7, 2), 7),
        (torch.zeros(()), None),
        ((), 0),
        ("text", None),
        (None, None),
        ((SimpleNamespace(), 1), None),
    ],
    ids=str,
)
def test_samples_of_a_batch(batch, samples):
    assert _samples_of(batch) == samples


def test_batches_that_cannot_be_counted_have_no_rate(tmp_path, clock):
    class Opaque(Module):
        def training_step(self, batch):
            return super().training_step((batch[0]["x"].x, batch[1]))

    def collate(samples):
        images, targets = zip(*samples, strict=True)
        return {"x": SimpleNamespace(x=torch.stack(images))}, torch.tensor(targets)

    data = DataLoader(Slow(clock, 24), 4, collate_fn=collate)
    module = Opaque(clock)
    module.transfer_batch_to_device = lambda batch, device, dataloader_idx: batch
    rows, _ = fit(tmp_path, module, data)
    assert all(row.keys() == {"train/grad_norm", "train/data_wait"} or "train/loss" in row for row in rows.values())


@pytest.mark.parametrize(
    "options",
    [
        {"logger": False},
        {"logger": False, "barebones": True, "log_every_n_steps": 0},
        {"log_every_n_steps": 0},
        {"fast_dev_run": True},
        {"limit_val_batches": 0},
        {"overfit_batches": 2},
        {"precision": "bf16-mixed"},
        {"max_steps": 0},
    ],
    ids=str,
)
def test_it_is_safe_everywhere(tmp_path, clock, options):
    validation = DataLoader(Slow(clock, 8), 4)
    if options.get("barebones"):
        options = {**options, "num_sanity_val_steps": 0}
    fit(tmp_path, Module(clock), DataLoader(Slow(clock, 24), 4), validation, **options)


def test_a_module_that_steps_by_itself(tmp_path, clock):
    class Manual(Module):
        def __init__(self, clock):
            super().__init__(clock)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            loss = super().training_step(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    rows, _ = fit(tmp_path, Manual(clock), DataLoader(Slow(clock, 24), 4))
    assert sorted(rows) == [1, 3, 5]
    assert all(row["train/grad_norm"] > 0 for row in rows.values())


def test_nobody_is_left_listening(tmp_path, clock):
    profiler = SimpleProfiler(dirpath=tmp_path)
    fit(tmp_path, Module(clock), DataLoader(Slow(clock, 24), 4), profiler=profiler)
    assert "start" not in vars(profiler)
    assert "stop" not in vars(profiler)
    # and what it listened to still measured
    assert len(profiler.recorded_durations["[_TrainingEpochLoop].train_dataloader_next"]) == 6

    class Broken(Module):
        def training_step(self, batch):
            raise RuntimeError("broken")

    profiler = SimpleProfiler(dirpath=tmp_path)
    with pytest.raises(RuntimeError, match="broken"):
        fit(tmp_path, Broken(clock), DataLoader(Slow(clock, 24), 4), profiler=profiler)
    assert "start" not in vars(profiler)
