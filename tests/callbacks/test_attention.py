"""Attention, measured and drawn: by NumPy from the layers' own maps, through real trainers, and by what figures say."""

import csv
import itertools
import math

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from matplotlib.collections import PathCollection, PolyCollection
from matplotlib.colors import to_rgb
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from awconv.callbacks import (
    AttentionMonitor,
    attention_distances,
    collect_attention,
    draw_attention,
    draw_attention_layers,
    draw_attention_maps,
    draw_attention_neighbours,
    measure_attention,
)
from awconv.callbacks.attention.figures import ALIVE_COLOUR, DEAD_COLOUR, SATURATED_COLOUR
from awconv.callbacks.detection_figures import colour_of
from awconv.data import DigitsDataModule
from awconv.errors import InputError
from awconv.layers import AWConv2d
from awconv.models import create_detector
from awconv.tasks import ClassificationTask
from processes import spawn_two

KEYS = ("spread", "mean", "saturated", "dead")


class Network(nn.Module):
    """Two AW layers of different shapes, one grouped, behind a plain one; dropout and BatchNorm between."""

    def __init__(self, classes=3, zero_init=False, residual=True):
        super().__init__()
        torch.manual_seed(3)
        options = {"zero_init": zero_init, "residual": residual}
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.first = AWConv2d(8, 4, 3, padding=1, share=2, **options)
        self.drop = nn.Dropout(0.5)
        self.second = AWConv2d(4, 8, (1, 3), groups=2, share=1, **options)
        self.head = nn.Linear(8, classes)
        for layer in (self.first, self.second):
            if not zero_init:
                nn.init.normal_(layer.attention.norm2.weight, 0, 10)
                nn.init.normal_(layer.attention.norm2.bias, 0, 2)

    def forward(self, x):
        x = self.drop(self.first(self.norm(self.stem(x)).relu()))
        return self.head(self.second(x).mean((2, 3)))


class Task(pl.LightningModule):
    """A fork's module: it validates its network and knows nothing of attention."""

    class_names = ("cat", "dog", "owl")

    def __init__(self, network=None):
        super().__init__()
        self.network = Network() if network is None else network

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch):
        self.log("val/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]), batch_size=len(batch[0]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


def pictures(n=10, size=(6, 7), seed=0):
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(seed))


def data(n=10, seed=0):
    return TensorDataset(pictures(n, seed=seed), torch.arange(n) % 3)


def loader(n=10, batch_size=4):
    return DataLoader(data(n), batch_size=batch_size)


def fit(folder, callback, task=None, val=None, **options):
    callbacks = [callback, *options.pop("callbacks", [])]
    options = {"max_epochs": 1, "logger": CSVLogger(folder, name="", version="")} | options
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=options.pop("devices", 1),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        callbacks=callbacks,
        **options,
    )
    task = task or Task()
    trainer.fit(task, loader(8), val or loader())
    return trainer, task


def expanded(network, images):
    """A of both layers, every value as often as it is used, computed from the layers' inputs one by one."""
    network.eval()
    with torch.no_grad():
        x = network.norm(network.stem(images)).relu()
        first = network.first.attention_maps(x)
        second = network.second.attention_maps(network.first(x))
    return {"first": first.double().numpy(), "second": second.double().numpy()}


def same_values(statistics, a):
    """Checks statistics against plain NumPy on (N, C2, C1 / groups, kh, kw)."""
    between = a.std(axis=0, ddof=1)
    assert statistics.samples == len(a)
    assert statistics.mean == pytest.approx(a.mean(), abs=1e-6)
    assert statistics.std == pytest.approx(a.std(), abs=1e-6)
    assert statistics.spread == pytest.approx(math.sqrt((between**2).mean()), abs=1e-6)
    of_maps = np.sqrt((between**2).mean(axis=(-2, -1)))
    assert statistics.dead == pytest.approx((of_maps < 0.01).mean())
    assert statistics.saturated == pytest.approx(((a < 0.05) | (a > 0.95)).mean())
    share = a[0].size // statistics.average.size
    counts, _ = np.histogram(a, 60, (0, 1))
    np.testing.assert_array_equal(statistics.histogram * share, counts)
    np.testing.assert_allclose(statistics.average.repeat(share, axis=1), a.mean(axis=0), atol=1e-6)


# --- collecting and measuring ---


def test_statistics_are_those_of_the_maps_that_the_layers_use():
    network, images = Network(), pictures()
    measured = measure_attention(network, images)
    oracle = expanded(network, images)
    assert list(measured) == list(oracle)
    for name, a in oracle.items():
        same_values(measured[name], a)
    assert 0 < measured["first"].dead < 1
    assert 0 < measured["first"].saturated < 1
    # a std that says nothing of samples is not the spread
    assert measured["first"].std > 1.5 * measured["first"].spread > 0


def test_collected_maps_are_compact_and_those_of_the_layers():
    network, images = Network(), pictures()
    collected = collect_attention(network, images, batch_size=3)
    oracle = expanded(network, images)
    assert collected["first"].shape == (10, 4, 4, 3, 3)
    assert collected["second"].shape == (10, 8, 2, 1, 3)
    np.testing.assert_allclose(collected["first"].repeat_interleave(2, dim=2), oracle["first"], atol=1e-6)
    np.testing.assert_allclose(collected["second"], oracle["second"], atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 10, 64])
def test_neither_depends_on_the_batch_size(batch_size):
    network = Network()
    images = [*pictures(7), *pictures(5, size=(9, 4))]
    images = [images[k] for k in np.random.default_rng(1).permutation(12)]
    alone = collect_attention(network, images, batch_size=1)
    together = collect_attention(network, images, batch_size=batch_size)
    measured = measure_attention(network, images, batch_size=batch_size)
    for name, maps in alone.items():
        np.testing.assert_allclose(together[name], maps, atol=1e-6)
        same_values(measured[name], maps.double().numpy())


def test_a_constant_is_exactly_dead_whatever_its_batches():
    network = Network()
    for batch_size in (1, 4, 9):
        statistics = measure_attention(network, pictures(1).expand(9, -1, -1, -1), batch_size=batch_size)["first"]
        assert statistics.spread < 1e-7  # what convolutions of several batch sizes differ by
        assert statistics.dead == 1
        assert statistics.std > 0.1


def test_an_untrained_head_is_dead_at_one_half():
    statistics = measure_attention(Network(zero_init=True), pictures())["first"]
    assert statistics.mean == 0.5
    assert statistics.std == statistics.spread == statistics.saturated == 0
    assert statistics.dead == 1
    assert statistics.histogram.tolist() == [0] * 30 + [10 * 4 * 4 * 9] + [0] * 29


def test_one_picture_has_no_spread():
    statistics = measure_attention(Network(), pictures(1))["first"]
    assert math.isnan(statistics.spread)
    assert math.isnan(statistics.dead)
    same = expanded(Network(), pictures(1))["first"]
    assert statistics.mean == pytest.approx(same.mean(), abs=1e-6)
    assert statistics.std == pytest.approx(same.std(), abs=1e-6)


def test_saturation_and_its_bounds():
    network = Network()
    nn.init.constant_(network.first.attention.norm2.weight, 0)
    for bias, saturated in ((50.0, 1), (-50.0, 1), (math.log(0.96 / 0.04), 1), (math.log(0.94 / 0.06), 0)):
        nn.init.constant_(network.first.attention.norm2.bias, bias)
        statistics = measure_attention(network, pictures())["first"]
        assert statistics.saturated == saturated
        assert statistics.histogram.sum() == 10 * 4 * 4 * 9  # exact zeros and ones count too


def state_of(network):
    return (
        {key: value.clone() for key, value in network.state_dict().items()},
        [module.training for module in network.modules()],
        torch.get_rng_state(),
        [parameter.grad for parameter in network.parameters()],
        [len(module._forward_hooks) for module in network.modules()],
    )


def test_training_state_is_left_as_it_was_bit_for_bit():
    class Noisy(Network):
        def forward(self, x):
            return super().forward(x + torch.randn(()))

    network = Noisy().train()
    network.second.eval()
    before = state_of(network)
    collect_attention(network, pictures())
    measure_attention(network, pictures(), "first")
    draw_attention(network, pictures())
    draw_attention_neighbours(network, pictures())
    after = state_of(network)
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(value, after[0][key]) for key, value in before[0].items())
    assert before[1] == after[1]
    assert torch.equal(before[2], after[2])
    assert before[3:] == after[3:]


def test_state_is_restored_after_an_error_too():
    network = Network().train()
    before = state_of(network)
    with pytest.raises(RuntimeError):
        collect_attention(network, torch.zeros(2, 5, 6, 7))
    after = state_of(network)
    assert before[1] == after[1]
    assert before[3:] == after[3:]


def test_patterns_choose_layers():
    network = nn.ModuleDict({"a": Network(), "b": Network()})
    network.forward = lambda x: network["b"](x) + network["a"](x)
    images = pictures(2)
    assert list(measure_attention(network, images)) == ["a.first", "a.second", "b.first", "b.second"]
    assert list(collect_attention(network, images, "b.*")) == ["b.first", "b.second"]
    assert list(collect_attention(network, images, ["*.first", "b.second"])) == ["a.first", "b.first", "b.second"]


def test_a_task_stands_for_its_network_and_a_bare_layer_for_itself():
    class WithoutNetwork(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.inner = Network()

        def forward(self, x):
            return self.inner(x)

    images = pictures(3)
    of_network = collect_attention(Network(), images)
    for task, prefix in ((Task(), ""), (WithoutNetwork(), "inner.")):
        of_task = collect_attention(task, images)
        assert list(of_task) == [prefix + name for name in of_network]
        assert all(torch.equal(of_task[prefix + name], maps) for name, maps in of_network.items())
    assert list(collect_attention(AWConv2d(3, 4, 3), images)) == ["AWConv2d"]


def test_integers_are_scaled_and_types_are_the_networks():
    network = Network().double()
    images = torch.randint(0, 256, (3, 3, 6, 7), dtype=torch.uint8)
    maps = collect_attention(network, images)["first"]
    assert maps.dtype == torch.float32
    assert torch.equal(maps, collect_attention(network, images.double() / 255)["first"])


@pytest.mark.parametrize("wrap", [lambda network: network.compile(backend="eager") or network, torch.compile])
def test_compiled_networks_are_listened_to_and_stay_compiled(wrap):
    images, expected = pictures(4), collect_attention(Network(), pictures(4))
    network = Network().eval()
    if wrap is torch.compile:
        network = torch.compile(network, backend="eager")
    else:
        wrap(network)
    with torch.no_grad():
        outputs = network(images)
    collected = collect_attention(network, images)
    assert collected.keys() == expected.keys()
    for name, maps in expected.items():
        np.testing.assert_allclose(collected[name], maps, atol=1e-6)
    from torch._dynamo.utils import counters

    frames = counters["frames"]["total"]
    with torch.no_grad():
        assert torch.equal(network(images), outputs)
    assert counters["frames"]["total"] == frames, "listening made it compile again"


def test_a_detector_runs_up_to_its_heads_and_pads_no_picture_to_anothers_size():
    torch.manual_seed(0)
    options = {"num_classes": 2, "levels": [8, 16, 32], "image_size": 64, "max_size": 128, "fpn_channels": 32}
    detector = create_detector("fcos", "resnet18", aw={"include": "layer[23].0.*", "zero_init": False}, **options)
    detector.head.register_forward_hook(lambda *_: pytest.fail("the heads ran"))
    images = [torch.rand(3, 64, 96), torch.rand(3, 70, 70), torch.rand(3, 64, 96)]
    together = collect_attention(detector, images, batch_size=8)
    assert list(together) == [f"backbone.body.layer{k}.0.conv{c}" for k in (2, 3) for c in (1, 2)]
    for k, image in enumerate(images):
        for name, maps in collect_attention(detector, [image]).items():
            np.testing.assert_allclose(together[name][k : k + 1], maps, atol=1e-6)
    # by hand, from the pictures as the detector resizes, normalises and pads them
    detector.eval()
    batch, _ = detector.transform([images[1]])
    layer = detector.backbone.body.layer2[0].conv1
    seen = []
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        detector.backbone(batch.tensors)
        by_hand = layer.attention_maps(seen[0])
    mine = together["backbone.body.layer2.0.conv1"][1:2].repeat_interleave(layer.share, dim=2)
    np.testing.assert_allclose(mine, by_hand, atol=1e-6)


def test_layers_that_are_not_reached_are_left_out_and_the_first_call_counts():
    network = Network()
    network.unused = AWConv2d(3, 3, 3)
    twice = nn.Sequential(network)
    twice.forward = lambda x: network(x) + network(2 * x)
    collected = collect_attention(twice, pictures())
    np.testing.assert_array_equal(collected["0.first"], collect_attention(Network(), pictures())["first"])
    assert set(collected) == {"0.first", "0.second"}


@pytest.mark.parametrize(
    ("images", "layers", "message"),
    [
        ([], None, "images is empty"),
        (torch.zeros(3, 6, 7), None, r"images holds \(6, 7\): expected a tensor \(N, C, H, W\)"),
        (["a.png"], None, "images holds str: expected a tensor"),
        (pictures(2), "third", "layers pattern 'third' matches no AW layer; there are first, second"),
        (pictures(2), ["first", "x*"], r"layers pattern 'x\*' matches no AW layer"),
    ],
)
def test_collecting_refuses(images, layers, message):
    for function in (collect_attention, measure_attention):
        with pytest.raises(InputError, match=message):
            function(Network(), images, layers)


def test_collecting_refuses_a_network_without_attention_and_layers_that_see_no_pictures():
    with pytest.raises(InputError, match=r"network=Conv2d has no AW layers; awconv\.layers\.convert_to_aw makes some"):
        collect_attention(nn.Conv2d(3, 3, 3), pictures())
    regions = nn.Sequential(Network().stem, AWConv2d(8, 4, 3))
    regions.forward = lambda x: regions[1](regions[0](x).repeat(5, 1, 1, 1))
    with pytest.raises(InputError, match="layer '1' sees 10 inputs for 2 pictures: leave it out"):
        collect_attention(regions, pictures(2))
    with pytest.raises(InputError, match="batch_size=0"):
        collect_attention(Network(), pictures(), batch_size=0)


# --- the callback ---


def rows_of(folder):
    with (folder / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def logged(folder):
    """What was logged of attention, row by row: layer and key to value."""
    rows = [{k: v for k, v in row.items() if k.startswith("attention/")} for row in rows_of(folder)]
    return [row for row in rows if row]


def check_logged(row, network, images):
    measured = measure_attention(network, images)
    assert row.keys() == {f"attention/{name}/{key}" for name in measured for key in KEYS}
    for name, statistics in measured.items():
        for key in KEYS:
            assert row[f"attention/{name}/{key}"] == pytest.approx(getattr(statistics, key), abs=1e-5)


def test_a_run_logs_what_the_network_that_was_validated_does(tmp_path):
    trainer, task = fit(tmp_path, AttentionMonitor(samples=7), max_epochs=3)
    rows = logged(tmp_path)
    assert len(rows) == 3
    # nothing trains after the last validation
    check_logged(rows[-1], task.network, pictures()[:7])
    assert rows[0] != rows[1] != rows[2]
    assert sorted(path.name for path in (tmp_path / "media").iterdir()) == [
        "attention_layers.png",
        "attention_maps.png",
    ]
    assert trainer.callback_metrics["attention/first/spread"] == pytest.approx(rows[-1]["attention/first/spread"])


def test_it_sees_the_averaged_weights(tmp_path):
    average = EMAWeightAveraging(decay=0.5)
    _, task = fit(tmp_path, AttentionMonitor(), max_epochs=2, callbacks=[average])
    # at its end fit leaves the average in the network
    check_logged(logged(tmp_path)[-1], task.network, pictures())


def test_validation_results_are_the_same_with_and_without(tmp_path):
    losses = []
    for name, callback in (("with", AttentionMonitor()), ("without", pl.Callback())):
        torch.manual_seed(5)
        fit(tmp_path / name, callback, max_epochs=2)
        losses.append([row["val/loss"] for row in rows_of(tmp_path / name) if "val/loss" in row])
    assert losses[0] == losses[1]


class Spy:
    """Stands for `publish`; keeps what it was given, and draws it."""

    def __init__(self, monkeypatch):
        self.calls = []
        monkeypatch.setattr("awconv.callbacks.attention.monitor.publish", self)

    def __call__(self, trainer, figures, wandb_objects=None):
        drawn = {name: draw() for name, draw in figures.items()}
        self.calls.append((drawn, {name: make() for name, make in (wandb_objects or {}).items()}))


def strings_of(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_figures_and_histograms_are_published(tmp_path, monkeypatch):
    spy = Spy(monkeypatch)
    _, task = fit(tmp_path, AttentionMonitor(heat_map_layers="second"))
    figures, objects = spy.calls[0]
    assert strings_of(figures["attention/layers"])[0] == "Attention of 2 layers on 10 validation pictures, epoch 0"
    strings = strings_of(figures["attention/maps"])
    assert strings[0] == "Attention maps of validation pictures, epoch 0"
    assert "second" in strings
    assert "first" not in strings
    first = strings.index("mean sample")
    assert strings[first + 1 : first + 7] == ["cat", "dog", "owl", "cat", "dog", "owl"]
    assert objects.keys() == {"attention/first/histogram", "attention/second/histogram"}
    measured = measure_attention(task.network, pictures())
    for name, statistics in measured.items():
        histogram = objects[f"attention/{name}/histogram"]
        assert list(histogram.histogram) == statistics.histogram.tolist()
        np.testing.assert_allclose(histogram.bins, np.linspace(0, 1, 61))
    assert spy.calls[1:] == [({}, {})]  # the end of training, with nothing left to draw


@pytest.mark.parametrize(("share", "drawn"), [(1e9, [0, 1, 2, 3, 4]), (1e-9, [0, 4])])
def test_drawing_takes_its_share_of_the_time_but_the_last_look_is_drawn(tmp_path, monkeypatch, share, drawn):
    spy = Spy(monkeypatch)
    monkeypatch.setattr("awconv.callbacks.attention.monitor.DRAWING_SHARE", share)
    callback = AttentionMonitor()
    for _ in range(2):  # the second fit starts anew
        spy.calls.clear()
        fit(tmp_path, callback, max_epochs=5)
        titles = [strings_of(figures["attention/layers"])[0] for figures, _ in spy.calls if figures]
        assert [int(title.rsplit(" ", 1)[1]) for title in titles] == drawn
        assert len([objects for _, objects in spy.calls if objects]) == 5
        assert len(logged(tmp_path)) == 5


def test_every_n_epochs(tmp_path, monkeypatch):
    spy = Spy(monkeypatch)
    fit(tmp_path, AttentionMonitor(every_n_epochs=2), max_epochs=5)
    assert len(logged(tmp_path)) == 2
    assert len([objects for _, objects in spy.calls if objects]) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"limit_val_batches": 0},
        {"fast_dev_run": True},
        {"num_sanity_val_steps": 2, "max_steps": 0},
        {"logger": False},
        {"check_val_every_n_epoch": 2},
        {"precision": "bf16-mixed"},
        {"val_check_interval": 0.5},
        {"overfit_batches": 1},
    ],
)
def test_whatever_the_trainer_does_it_goes_on(tmp_path, options):
    trainer, task = fit(tmp_path, AttentionMonitor(), **options)
    quiet = options.keys() & {"limit_val_batches", "fast_dev_run", "num_sanity_val_steps", "check_val_every_n_epoch"}
    assert (tmp_path / "media").exists() == (not quiet)
    assert not any(module._forward_hooks for module in task.modules())
    if "precision" in options:
        exact = measure_attention(task.network, pictures())["first"].spread
        assert trainer.callback_metrics["attention/first/spread"] == pytest.approx(exact, rel=0.1)


def test_a_validation_outside_fit_is_none_of_its_business(tmp_path, monkeypatch):
    spy = Spy(monkeypatch)
    trainer, task = fit(tmp_path, AttentionMonitor())
    spy.calls.clear()
    trainer.validate(task, loader(), verbose=False)
    assert not spy.calls
    assert not any(key.startswith("attention/") for key in trainer.callback_metrics)


def test_a_network_without_attention_is_left_alone(tmp_path):
    plain = nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    fit(tmp_path, AttentionMonitor(layers="layer4.*"), Task(plain))
    assert not logged(tmp_path)
    assert not (tmp_path / "media").exists()


class Odd(pl.LightningModule):
    """No `network`, no `forward`, batches of its own kind, and a layer on regions, called twice."""

    def __init__(self):
        super().__init__()
        self.inner, self.network, self.regions = Network(), "a name", AWConv2d(3, 2, 3)

    def training_step(self, batch):
        return self.inner(batch["image"]).sum() + self.regions(batch["image"].repeat(3, 1, 1, 1)).sum()

    def validation_step(self, batch):
        for _ in range(2):
            self.training_step(batch)
            batch = {"image": -batch["image"]}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.001)


def test_a_module_of_another_kind_is_understood_as_far_as_it_goes(tmp_path):
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, enable_progress_bar=False, enable_model_summary=False, callbacks=[
            AttentionMonitor(samples=6)
        ], enable_checkpointing=False, default_root_dir=tmp_path, logger=CSVLogger(tmp_path, name="", version=""),
    )  # fmt: skip
    batches = DataLoader([{"image": image} for image in pictures()], batch_size=4)
    task = Odd()
    trainer.fit(task, batches, batches)
    (row,) = logged(tmp_path)
    measured = measure_attention(task.inner, pictures()[:6])
    assert row.keys() == {f"attention/inner.{name}/{key}" for name in measured for key in KEYS}
    assert row["attention/inner.second/spread"] == pytest.approx(measured["second"].spread, abs=1e-5)
    assert (tmp_path / "media/attention_maps.png").exists()


def test_one_picture_logs_what_is_defined(tmp_path):
    fit(tmp_path, AttentionMonitor(samples=1))
    (row,) = logged(tmp_path)
    assert row.keys() == {f"attention/{name}/{key}" for name in ("first", "second") for key in ("mean", "saturated")}


def test_attention_that_is_no_number_stops_nothing(tmp_path):
    task = Task()
    task.configure_optimizers = lambda: None
    nn.init.constant_(task.network.first.attention.norm2.bias, math.nan)
    fit(tmp_path, AttentionMonitor(), task)
    (row,) = logged(tmp_path)
    assert not any(math.isnan(value) for value in row.values())
    assert (tmp_path / "media/attention_layers.png").exists()


def test_a_validation_that_breaks_off_leaves_nothing_behind(tmp_path):
    task = Task()

    def broken(batch):
        raise RuntimeError("truncated")

    task.validation_step = broken
    with pytest.raises(RuntimeError, match="truncated"):
        fit(tmp_path, AttentionMonitor(), task, num_sanity_val_steps=0)
    assert not any(module._forward_hooks for module in task.modules())


def test_patterns_and_numbers_are_checked(tmp_path):
    with pytest.raises(InputError, match="layers pattern 'third' matches no AW layer; there are first, second"):
        fit(tmp_path, AttentionMonitor(layers="third"))
    with pytest.raises(InputError, match="heat_map_layers pattern 'second' matches no AW layer; there are first"):
        fit(tmp_path, AttentionMonitor(layers=["first"], heat_map_layers=["second"]))
    with pytest.raises(InputError, match="samples=0"):
        AttentionMonitor(samples=0)
    with pytest.raises(InputError, match="every_n_epochs=0"):
        AttentionMonitor(every_n_epochs=0)


def test_compiled_tasks_are_watched_and_compiled_no_more_often(tmp_path):
    from torch._dynamo.utils import counters

    frames = []
    for name, callback in (("without", pl.Callback()), ("with", AttentionMonitor())):
        torch._dynamo.reset()
        counters.clear()
        task = Task()
        task.network.compile(backend="eager")
        fit(tmp_path / name, callback, task, max_epochs=2)
        frames.append(counters["frames"]["total"])
    assert frames[1] <= frames[0]
    assert frames[1] > 0
    check_logged(logged(tmp_path / "with")[-1], task.network, pictures())


def test_this_projects_classifier_in_its_precisions_and_formats(tmp_path):
    digits = DigitsDataModule(batch_size=16, image_size=8)
    task = ClassificationTask(
        "resnet20", aw={"include": "layer1.*", "zero_init": False}, num_classes=10, in_channels=1,
        class_names=digits.class_names, channels_last=True, ema_decay=0.5, lr=0.01,
    )  # fmt: skip
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, limit_train_batches=3, limit_val_batches=3, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, precision="bf16-mixed",
        callbacks=[AttentionMonitor(samples=20)], logger=CSVLogger(tmp_path, name="", version=""),
    )  # fmt: skip
    trainer.fit(task, digits)
    (row,) = logged(tmp_path)
    images = torch.cat([images for images, _ in digits.val_dataloader()])[:20]
    for name, statistics in measure_attention(task, images).items():
        assert row[f"attention/{name}/mean"] == pytest.approx(statistics.mean, abs=0.02)
        assert row[f"attention/{name}/spread"] == pytest.approx(statistics.spread, rel=0.2)
    assert len(row) == 6 * 4


def _in_one_of_two_processes(rank, folder):
    # the second process validates one batch, the first three
    val = DataLoader(data(10 if rank == 0 else 3, seed=rank), batch_size=4)
    options = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False, "max_epochs": 2}
    _, task = fit(folder, AttentionMonitor(samples=9), val=val, **options)
    if rank == 0:
        check_logged(logged(folder)[-1], task.network, pictures()[:9])


@pytest.mark.slow
def test_two_processes_with_uneven_shares(tmp_path, capfd):
    spawn_two(_in_one_of_two_processes, tmp_path)
    assert sorted(path.name for path in (tmp_path / "media").iterdir()) == [
        "attention_layers.png",
        "attention_maps.png",
    ]
    # Lightning advises to reduce what only one process logs, unless it is told that this is meant
    assert "self.log('attention" not in capfd.readouterr().err


# --- figures ---


def texts_of(figure):
    return [text for axes in figure.axes for text in axes.texts]


def images_of(figure):
    """Every image of a figure with its extent, as (left, top, right, bottom) in inches."""
    found = []
    for image in figure.axes[0].images:
        left, right, bottom, top = image.get_extent()
        found.append((np.asarray(image.get_array()), (left, top, right, bottom), image))
    return found


def assert_readable(figure):
    """Every text is inside the page, no two overlap by more than a pixel, and none is smaller than 7 points."""
    figure.canvas.draw()
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts_of(figure) if text.get_text().strip()]
    assert min(text.get_fontsize() for text in texts_of(figure)) >= 7
    page = figure.bbox
    for text, box in boxes:
        assert page.x0 <= box.x0 < box.x1 <= page.x1, text
        assert page.y0 <= box.y0 < box.y1 <= page.y1, text
    for (a, box_a), (b, box_b) in itertools.combinations([(t, box.padded(-1)) for t, box in boxes], 2):
        assert min(box_a.x1, box_b.x1) <= max(box_a.x0, box_b.x0) or min(box_a.y1, box_b.y1) <= max(
            box_a.y0, box_b.y0
        ), (a, b)


def three_kinds(samples=10):
    """A layer that is alive, one that is dead, and one that is saturated."""
    network = nn.Sequential(*(AWConv2d(8, 8, 3, padding=1, share=4) for _ in range(3)))
    torch.manual_seed(0)
    for layer, weight, bias in zip(network, (50.0, 0.0, 0.0), (0.0, 1.0, 5.0), strict=True):
        nn.init.normal_(layer.attention.norm2.weight, 0, weight)
        nn.init.constant_(layer.attention.norm2.bias, bias)
    return measure_attention(network, torch.randn(samples, 8, 6, 6))


def test_dead_and_saturated_layers_show_at_a_glance():
    statistics = dict(zip(["alive", "dead", "saturated"], three_kinds().values(), strict=True))
    figure = draw_attention_layers(statistics)
    assert_readable(figure)
    strings = strings_of(figure)
    assert strings[0] == "Attention of 3 layers on 10 pictures"
    assert "grey (1 of 3)" in " ".join(strings)
    assert "orange (1)" in " ".join(strings)
    histograms, tracks, bars = (c for c in figure.axes[0].collections if isinstance(c, PolyCollection))
    colours = [to_rgb(colour) for colour in (ALIVE_COLOUR, DEAD_COLOUR, SATURATED_COLOUR)]
    for kind in (histograms, bars):
        np.testing.assert_allclose(kind.get_facecolors()[:, :3], colours)
    rows = {text.get_text(): text.get_position()[1] for text in texts_of(figure) if text.get_text() in statistics}
    assert rows["alive"] < rows["dead"] < rows["saturated"]
    for (name, s), histogram, bar, track in zip(
        statistics.items(), *(kind.get_paths() for kind in (histograms, bars, tracks)), strict=True
    ):
        in_row = sorted(
            (text for text in texts_of(figure) if abs(text.get_position()[1] - rows[name]) < 1e-6),
            key=lambda text: text.get_position()[0],
        )
        expected = [name, "8x2x3x3", f"{s.spread:.3f}", f"{s.dead:.0%}", f"{s.saturated:.0%}", f"{s.mean:.3f}"]
        assert [text.get_text() for text in in_row] == expected
        bold = [text.get_text() for text in in_row if text.get_weight() == "bold"]
        # what never changes is dead, whether or not it is saturated
        assert bold == {"alive": [], "dead": ["100%"], "saturated": ["100%", "100%"]}[name]
        filled = np.ptp(bar.vertices[:, 0]) / np.ptp(track.vertices[:, 0])
        assert filled == pytest.approx(s.spread / 0.3, abs=1e-6)
        # heights over the floor, bin by bin
        tops = histogram.vertices[1:121:2, 1]
        heights = histogram.vertices[0, 1] - tops
        np.testing.assert_allclose(heights / heights.max(), s.histogram / s.histogram.max(), atol=1e-9)


@pytest.mark.parametrize("layers", [1, 2, 18, 50, 110])
def test_the_overview_is_readable_for_any_number_of_layers(layers):
    kinds = list(three_kinds().values())
    statistics = {f"backbone.body.layer{k // 9}.{k % 9}.conv2": kinds[k % 3] for k in range(layers)}
    figure = draw_attention_layers(statistics)
    width, height = figure.get_size_inches()
    assert 0.3 < width / height < 5
    assert height < 14
    assert set(statistics) <= set(strings_of(figure))
    if layers < 100:  # comparing each text with each takes its time
        assert_readable(figure)


def test_the_overview_of_one_picture_says_what_is_not_known():
    figure = draw_attention_layers(three_kinds(1))
    assert_readable(figure)
    strings = strings_of(figure)
    assert strings[0] == "Attention of 3 layers on 1 picture"
    assert "One picture has no spread" in " ".join(strings)
    assert strings.count("-") == 6
    with pytest.raises(InputError, match="statistics is empty"):
        draw_attention_layers({})


def test_maps_stand_as_the_kernels_lie():
    generator = np.random.default_rng(0)
    maps = generator.random((2, 5, 3, 2, 4))
    average = maps.mean(axis=0)
    figure = draw_attention_maps({"conv": maps}, {"conv": average}, captions=["cat", "$x$"])
    assert_readable(figure)
    assert [s for s in strings_of(figure) if s in ("conv", "5x3x2x4", "mean sample", "cat", "$x$")] == [
        *("conv", "5x3x2x4", "mean sample", "cat", "$x$")
    ]
    drawn = [(array, box, image) for array, box, image in images_of(figure) if array.shape == (6, 20)]
    mean, first, first_change, second, second_change = (array for array, _, _ in drawn)
    for array, expected in (
        *((mean, average), (first, maps[0]), (second, maps[1])),
        *((first_change, maps[0] - average), (second_change, maps[1] - average)),
    ):
        for c, g, i, j in np.ndindex(5, 3, 2, 4):
            assert array[g * 2 + i, c * 4 + j] == pytest.approx(expected[c, g, i, j])
    boxes = [box for _, box, _ in drawn]
    assert boxes[0][0] == boxes[1][0] == boxes[3][0] < boxes[2][0] == boxes[4][0]
    assert boxes[0][1] < boxes[1][1] == boxes[2][1] < boxes[3][1]
    limit = np.abs(maps - average).max()
    assert f"+{limit:.2g}" in strings_of(figure)
    assert drawn[2][2].norm.vmin == pytest.approx(-limit)
    assert (drawn[1][2].norm.vmin, drawn[1][2].norm.vmax) == (0, 1)


def test_large_maps_are_drawn_as_their_means_and_differences_that_are_none_stay_pale():
    maps = np.full((2, 300, 20, 3, 3), 0.5, dtype=np.float32)
    maps[1, 0, 0] += 0.004
    figure = draw_attention_maps({"a": maps, "b": maps[:, :4, :1]}, {"a": maps[0], "b": maps[0, :4, :1]})
    assert_readable(figure)
    assert "300x20x3x3 (mean over the kernel)" in strings_of(figure)
    shapes = {array.shape for array, _, _ in images_of(figure)}
    assert {(20, 300), (3, 12)} <= shapes
    assert "+0.05" in strings_of(figure)


def test_pictures_stand_beside_their_maps():
    maps = np.random.default_rng(0).random((3, 4, 1, 3, 3))
    thumbnails = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime")]
    figure = draw_attention_maps({"a": maps}, {"a": maps[0]}, pictures=[thumbnails[0], None, thumbnails[1]])
    assert_readable(figure)
    found = [(array[0, 0].tolist(), box) for array, box, _ in images_of(figure) if array.ndim == 3]
    assert [colour for colour, _ in found] == [[255, 0, 0], [0, 255, 0]]
    for _, (left, top, right, bottom) in found:
        assert (right - left) / (bottom - top) == pytest.approx(2)
    rows = {text.get_text(): text.get_position()[1] for text in texts_of(figure)}
    for (_, (_, top, _, bottom)), caption in zip(found, ("sample 1", "sample 3"), strict=True):
        assert top < rows[caption] < bottom


def test_drawing_maps_refuses():
    maps = np.zeros((2, 4, 1, 3, 3))
    with pytest.raises(InputError, match="maps is empty"):
        draw_attention_maps({}, {})
    with pytest.raises(InputError, match=r"maps\['a'\] of shape \(2, 4, 1, 3, 3\), averages of shape None"):
        draw_attention_maps({"a": maps}, {})
    with pytest.raises(InputError, match=r"averages of shape \(4, 1, 3\): expected \(2, C2"):
        draw_attention_maps({"a": maps}, {"a": maps[0, ..., 0]})
    with pytest.raises(InputError, match="captions has length 1: expected 2"):
        draw_attention_maps({"a": maps}, {"a": maps[0]}, captions=["a"])


@pytest.mark.parametrize("residual", [True, False])
def test_changes_of_kernels_are_those_that_the_layer_makes(residual):
    network, images = Network(residual=residual), pictures(7)
    figure = draw_attention(network, images[:2], reference=images, captions=["cat", "dog"])
    assert_readable(figure)
    strings = strings_of(figure)
    assert strings[0] == "What attention does to the kernels, compared with the mean of 7 pictures"
    rows = ["cat", "first", "second", "dog", "first", "second"]
    assert [s for s in strings if s in rows] == rows
    drawn = images_of(figure)
    for name, shape in (("first", (4, 4)), ("second", (2, 8))):
        layer = getattr(network, name)
        # the kernels that the layer convolves with, of each picture and of the mean picture
        a = expanded(network, images)[name]
        kernel = layer.weight.detach().double().numpy()
        of_all, of_mean = (kernel * (m + 1 if residual else m) for m in (a, a.mean(axis=0)))
        change = of_all / of_mean - 1
        by_group = change.reshape(7, change.shape[1], -1, layer.share, *change.shape[3:])[:, :, :, 0]
        means = by_group.mean(axis=(-2, -1))
        heat = [array for array, _, image in drawn if array.shape == shape and image.cmap.name == "change"]
        assert len(heat) == 2
        for k, array in enumerate(heat):
            np.testing.assert_allclose(array, means[k].T, atol=1e-6)
    # the last layer's most changed kernel of the second picture, from its label back to its patches
    output, group = np.unravel_index(np.abs(means[1]).argmax(), means[1].shape)
    channel = (output // 4) * 2 + group
    label = f"{channel} → {output}: {means[1][output, group]:+.1%}"
    (place,) = [text.get_position() for text in texts_of(figure) if text.get_text() == label][-1:]
    x, y = place
    before, after, relative = (array for array, box, _ in drawn if x - 0.01 < box[0] < x + 1.2 and 0 < y - box[1] < 0.6)
    np.testing.assert_allclose(before, of_mean[output, group], rtol=1e-5)
    np.testing.assert_allclose(after, of_all[1, output, group], rtol=1e-5)
    np.testing.assert_allclose(relative, change[1, output, group], atol=1e-5)


def test_the_mean_picture_is_that_of_the_pictures_themselves_and_some_are_chosen():
    figure = draw_attention(Network(), pictures(9), max_pictures=3, max_layers=1)
    assert_readable(figure)
    strings = strings_of(figure)
    assert strings[0].endswith("mean of 9 pictures")
    assert [s for s in strings if s.startswith("picture ")] == ["picture 1", "picture 5", "picture 9"]
    assert "Drawn are 1 of 2 layers and 3 of 9 pictures, evenly spaced." in " ".join(strings)


def test_attention_that_does_nothing_is_drawn_pale():
    figure = draw_attention(Network(zero_init=True), pictures(3), max_pictures=1)
    assert_readable(figure)
    for array, _, image in images_of(figure):
        if array.ndim == 2 and image.cmap.name == "change":
            assert np.abs(array).max() < 1e-6
            assert image.norm.vmax == 0.05
    assert "typically 0.0%" in " ".join(strings_of(figure))


def test_files_are_read_upright_and_transformed(tmp_path):
    for k in range(2):
        Image.new("RGB", (30, 20), (200 * k, 0, 90)).save(tmp_path / f"{k}.png")
    paths = [tmp_path / "0.png", str(tmp_path / "1.png")]
    shapes = []

    def transform(picture):
        shapes.append(picture.size)
        return torch.rand(3, 6, 7)

    figure = draw_attention(Task(), [*paths, Image.new("L", (10, 40)), torch.rand(3, 8, 8)], transform=transform)
    assert shapes == [(30, 20), (30, 20), (10, 40)]
    strings = strings_of(figure)
    assert [s for s in strings if s in ("0.png", "1.png", "picture 3", "picture 4")] == [
        *("0.png", "1.png", "picture 3", "picture 4")
    ]
    (second,) = [array for array, _, _ in images_of(figure) if array.ndim == 3 and array[0, 0].tolist() == [200, 0, 90]]
    assert second.shape[:2] == (20, 30)
    with pytest.raises(InputError, match=r"images holds pictures that are no tensors, and transform=None"):
        draw_attention(Network(), paths)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(InputError, match=r"reference holds '.*text\.png', which cannot be read"):
        draw_attention(Network(), pictures(1), reference=[tmp_path / "text.png"], transform=transform)
    with pytest.raises(InputError, match="put it in brackets"):
        draw_attention(Network(), str(tmp_path / "0.png"))


def test_a_detector_takes_files_without_a_transform(tmp_path):
    options = {"num_classes": 2, "image_size": 32, "max_size": 64, "fpn_channels": 32, "levels": [8, 16]}
    detector = create_detector("fcos", "resnet18", aw={"include": "layer2.0.*"}, **options)
    for k in range(2):
        Image.new("RGB", (40 + 9 * k, 32), (9, 99, 200)).save(tmp_path / f"{k}.png")
    figure = draw_attention(detector, sorted(tmp_path.iterdir()))
    assert "backbone.body.layer2.0.conv2" in strings_of(figure)


def test_drawing_changes_refuses():
    with pytest.raises(InputError, match="images holds one picture, which is its own mean"):
        draw_attention(Network(), pictures(1))
    with pytest.raises(InputError, match="images is empty"):
        draw_attention(Network(), [])
    with pytest.raises(InputError, match="network=Conv2d has no AW layers"):
        draw_attention(nn.Conv2d(3, 3, 3), pictures())
    with pytest.raises(InputError, match="captions has length 1: expected 2"):
        draw_attention(Network(), pictures(2), captions=["a"])
    with pytest.raises(InputError, match=r"images holds tensors of shape \(6, 7\)"):
        draw_attention(Network(), pictures(1)[0])
    for argument in ("max_pictures", "max_layers"):
        with pytest.raises(InputError, match=f"{argument}=0"):
            draw_attention(Network(), pictures(), **{argument: 0})


# --- who is near whom ---


def distances_by_hand(network, images):
    a = expanded(network, images)
    n = len(images)
    squares = np.zeros((n, n))
    for maps in a.values():
        flat = maps.reshape(n, -1)
        spread = math.sqrt((flat.std(axis=0, ddof=1) ** 2).mean())
        squares += ((flat[:, None] - flat[None]) ** 2).sum(axis=-1) / spread**2 / flat.shape[1]
    off_diagonal = squares[~np.eye(n, dtype=bool)]
    return np.sqrt(squares / off_diagonal.mean())


@pytest.mark.parametrize("budget", [2**29, 1])
def test_distances_are_euclidean_between_standardised_maps(monkeypatch, budget):
    monkeypatch.setattr("awconv.callbacks.attention.space._BUDGET", budget)
    network, images = Network(), pictures(8)
    ran = []
    network.register_forward_hook(lambda *_: ran.append(1))
    distances = attention_distances(network, images)
    assert len(ran) == (1 if budget > 1 else 2)  # a layer at a time
    np.testing.assert_allclose(distances, distances_by_hand(network, images), atol=1e-5)
    assert np.array_equal(distances, distances.T)
    assert not distances.diagonal().any()


def test_pictures_alike_have_no_distance():
    images = pictures(2)[[0, 1, 0, 0]]
    distances = attention_distances(Network(), images)
    assert distances[0, 2] < 1e-3
    assert distances[0, 1] > 1
    assert not attention_distances(Network(zero_init=True), images).any()
    with pytest.raises(InputError, match="images holds one picture: expected at least two"):
        attention_distances(Network(), pictures(1))


def on_a_plane(monkeypatch, points):
    """Lets pictures lie at these points of the plane, however the network sees them."""
    points = np.asarray(points, dtype=float)
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    monkeypatch.setattr("awconv.callbacks.attention.space.attention_distances", lambda *_, **__: distances)
    return distances


def dots_of(figure):
    """Where the pictures belong, in inches, in their order (all are shown)."""
    return np.asarray(figure.axes[0].collections[-1].get_offsets())


def test_places_keep_the_distances(monkeypatch):
    points = np.random.default_rng(0).random((12, 2)) * (5, 2)
    distances = on_a_plane(monkeypatch, points)
    figure = draw_attention_neighbours(Network(), pictures(12))
    assert_readable(figure)
    dots = dots_of(figure)
    on_page = np.linalg.norm(dots[:, None] - dots[None], axis=-1)
    factor = on_page.max() / distances.max()
    np.testing.assert_allclose(on_page, distances * factor, atol=1e-6)
    assert "100%" not in " ".join(strings_of(figure))
    assert np.ptp(dots[:, 0]) > np.ptp(dots[:, 1])  # the longer way runs to the right


def frames_of(figure):
    """Frames of the thumbnails, those on the map before those that are listed, as (left, top, side, colour)."""
    frames = [p for p in figure.axes[0].patches if not p.get_fill() and p.get_zorder() == 4]
    return [(*p.get_xy(), p.get_width(), to_rgb(p.get_edgecolor())) for p in frames]


def test_thumbnails_do_not_cover_each_other_and_frames_tell_the_class(monkeypatch):
    kinds = [k % 3 for k in range(40)]
    points = np.random.default_rng(0).normal(size=(40, 2)) * 0.02 + np.array([[0, 0], [1, 0], [0, 1]])[kinds]
    on_a_plane(monkeypatch, points)
    figure = draw_attention_neighbours(Network(), pictures(40), labels=kinds, class_names=["cat", "dog", "owl"])
    assert_readable(figure)
    frames = frames_of(figure)
    on_map = frames[:40]
    assert [colour for *_, colour in on_map] == [to_rgb(colour_of(kind + 1)) for kind in kinds]
    for (x, y, side, _), (u, v, _, _) in itertools.combinations(on_map, 2):
        assert abs(x - u) > 0.97 * side or abs(y - v) > 0.97 * side * 6 / 7
    strings = strings_of(figure)
    assert {"cat", "dog", "owl"} <= set(strings)
    text = " ".join(strings)
    assert "The nearest neighbour is of the same class for 40 of 40 (by chance 13)." in text
    first = strings.index("farthest apart")
    assert float(strings[first + 2]) > 1
    assert float(strings[strings.index("closest together") + 2]) < 0.1


def test_pairs_are_listed_in_order_and_each_picture_once(monkeypatch):
    distances = on_a_plane(monkeypatch, [[0, 0], [1, 0], [10, 0], [12.5, 0], [30, 0]])
    figure = draw_attention_neighbours(Network(), pictures(5), captions=list("abcde"))
    assert_readable(figure)
    strings = strings_of(figure)
    far = strings[strings.index("farthest apart") + 2 : strings.index("closest together")]
    near = strings[strings.index("closest together") + 2 :]
    assert far == [f"{distances[0, 4]:.2f}", "a, e", f"{distances[1, 3]:.2f}", "b, d"]
    assert near == [f"{distances[0, 1]:.2f}", "a, b", f"{distances[2, 3]:.2f}", "c, d"]


def test_many_pictures_are_dots_and_equal_ones_are_told(monkeypatch):
    on_a_plane(monkeypatch, np.random.default_rng(0).random((30, 2)))
    figure = draw_attention_neighbours(Network(), pictures(30), max_thumbnails=10)
    assert "10 of them are shown, evenly spaced" in " ".join(strings_of(figure))
    assert len(frames_of(figure)) == 10 + 2 * 2 * 6
    dots = [collection for collection in figure.axes[0].collections if isinstance(collection, PathCollection)]
    assert [len(collection.get_offsets()) for collection in dots] == [20, 10]
    monkeypatch.undo()
    figure = draw_attention_neighbours(Network(zero_init=True), pictures(4))
    assert_readable(figure)
    strings = strings_of(figure)
    assert strings[0] == "4 pictures by their attention"
    assert "The attention is the same for all pictures" in " ".join(strings)
    assert "farthest apart" not in strings
    assert len(frames_of(figure)) == 4


def test_names_of_classes_are_the_tasks_and_labels_are_checked():
    figure = draw_attention_neighbours(Task(), pictures(4), labels=torch.tensor([0, 2, 2, 0]))
    strings = strings_of(figure)
    assert {"cat", "owl"} <= set(strings)
    assert "dog" not in strings
    with pytest.raises(InputError, match="labels has length 1: expected 4"):
        draw_attention_neighbours(Task(), pictures(4), labels=[0])
    with pytest.raises(InputError, match="labels reach from 0 to 3: expected 0 to 2"):
        draw_attention_neighbours(Task(), pictures(2), labels=[0, 3])
    with pytest.raises(InputError, match="images holds one picture"):
        draw_attention_neighbours(Task(), pictures(1))


def test_a_head_that_gives_its_maps_as_channels_is_heard():
    """As a head of one's own may, which the layer takes too."""
    torch.manual_seed(0)
    layer = AWConv2d(8, 6, 3, padding=1, share=4)
    layer.attention = nn.Sequential(nn.Conv2d(8, 12, 1), nn.Sigmoid())
    network = nn.Sequential(layer).eval()
    images = torch.randn(3, 8, 5, 5)
    (maps,) = collect_attention(network, images).values()
    assert maps.shape == (3, 6, 2, 3, 3)
    torch.testing.assert_close(maps.repeat_interleave(4, dim=2), layer.attention_maps(images).detach())
