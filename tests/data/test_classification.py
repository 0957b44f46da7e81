import inspect
import os
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import Dataset
from torchvision.transforms import v2

from awconv.callbacks import LastCheckpoint
from awconv.data import (
    IGNORE_INDEX,
    CIFAR10DataModule,
    CIFAR100DataModule,
    ClassificationDataModule,
    DigitsDataModule,
    ImageNetDataModule,
)
from awconv.data.transforms import Normalise, RandomMirror, ShiftedCrop
from awconv.errors import InputError

MODULES = [DigitsDataModule, CIFAR10DataModule, CIFAR100DataModule, ImageNetDataModule]


class Patches(Dataset):
    """PIL pictures of one colour per class; an own data set as a user writes it."""

    def __init__(self, size, transform, mode="RGB"):
        self.size, self.transform, self.mode = size, transform, mode

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        pixels = np.full((20, 24, 3), (40 + 50 * (index % 3), 10 * (index % 20), 90), dtype=np.uint8)
        return self.transform(PIL.Image.fromarray(pixels).convert(self.mode)), index % 3


class PatchesDataModule(ClassificationDataModule):
    class_names: ClassVar = ["dark", "medium", "bright"]

    def __init__(self, size: int = 33, *, image_size: int = 16, num_workers: int = 0, **common: Any) -> None:
        super().__init__(image_size=image_size, num_workers=num_workers, **common)
        self.size = size

    def load(self, split, transform):
        return Patches(self.size if split == "train" else 7, transform)


class Watch(LightningModule):
    """A linear network that keeps what it is given."""

    def __init__(self, pixels=3 * 16 * 16, classes=3):
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes))
        self.batches = {"train": [], "val": [], "test": [], "predict": []}

    def training_step(self, batch):
        self.batches["train"].append(batch)
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch):
        self.batches["val"].append(batch)

    def test_step(self, batch):
        self.batches["test"].append(batch)

    def predict_step(self, batch):
        self.batches["predict"].append(batch)
        return batch[1]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def trainer(tmp_path, epochs=1, **options):
    return Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": epochs,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
            **options,
        }
    )


def training_pictures(module, passes=1):
    loader = module.train_dataloader()
    return [torch.cat([images for images, _ in loader]) for _ in range(passes)]


# ---- a data set of one's own


def test_a_subclass_is_all_it_takes(tmp_path):
    module = PatchesDataModule(batch_size=5)
    assert (module.num_classes, module.in_channels, module.image_size) == (3, 3, 16)
    watch = Watch()
    run = trainer(tmp_path, num_sanity_val_steps=0)
    run.fit(watch, module)
    run.test(watch, module, verbose=False)
    # 33 samples are 6 full batches and a rest of 3
    assert [len(targets) for _, targets in watch.batches["train"]] == [5] * 6
    assert torch.cat([targets for _, targets in watch.batches["val"]]).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert [tuple(images.shape) for images, _ in watch.batches["test"]] == [(5, 3, 16, 16), (2, 3, 16, 16)]


def test_the_only_batch_is_kept_if_it_is_not_full():
    assert [len(targets) for _, targets in PatchesDataModule(size=3, batch_size=5).train_dataloader()] == [3]
    assert [len(targets) for _, targets in PatchesDataModule(size=5, batch_size=5).train_dataloader()] == [5]


def test_a_subclass_without_its_parts():
    class Bare(ClassificationDataModule):
        pass

    with pytest.raises(NotImplementedError, match="Bare has to define class_names"):
        _ = Bare().class_names
    with pytest.raises(NotImplementedError, match="Bare has to define load"):
        Bare().setup("fit")


def test_an_empty_split_is_named():
    with pytest.raises(InputError, match="PatchesDataModule: the train split holds no samples"):
        PatchesDataModule(size=0).setup("fit")


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_any_mode_get_the_channels_of_the_network(mode, channels):
    module = PatchesDataModule()
    module.in_channels = channels
    module.mean, module.std = (0.5,) * channels, (0.5,) * channels
    image, _ = Patches(1, module.eval_transform(), mode)[0]
    assert image.shape == (channels, 16, 16)
    assert type(image) is torch.Tensor
    assert image.dtype == torch.float32


@pytest.mark.parametrize("shape", [(1, 20, 20), (2, 20, 20), (3, 20, 20), (4, 20, 20)])
@pytest.mark.parametrize("channels", [1, 3])
def test_so_do_tensors(shape, channels):
    module = PatchesDataModule()
    module.in_channels = channels
    module.mean, module.std = (0.0,) * channels, (1.0,) * channels
    picture = torch.full(shape, 51, dtype=torch.uint8)
    if shape[0] in (2, 4):
        picture[-1] = 200  # transparency
    image = module.eval_transform()(picture)
    assert torch.allclose(image, torch.full((channels, 16, 16), 0.2), atol=2 / 255)


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_sixteen_bits_are_scaled_and_of_thirty_two_refused(channels):
    module = PatchesDataModule()
    module.in_channels = channels
    module.mean, module.std = (0.0,) * channels, (1.0,) * channels
    deep = PIL.Image.fromarray(np.full((16, 16), 51 * 256 + 7, dtype=np.uint16))
    assert torch.allclose(module.eval_transform()(deep), torch.full((channels, 16, 16), 0.2))
    with pytest.raises(InputError, match=r"^a picture: .* 32-bit floats; save it with 8 or 16 bits$"):
        module.eval_transform()(PIL.Image.fromarray(np.ones((16, 16), dtype=np.float32)))


def test_given_normalisation():
    module = PatchesDataModule(mean=[0.5, 0.4, 0.3], std=[0.5, 0.25, 1])
    assert (module.mean, module.std) == ((0.5, 0.4, 0.3), (0.5, 0.25, 1))
    image = module.eval_transform()(torch.full((3, 16, 16), 255, dtype=torch.uint8))
    assert torch.allclose(image[:, 3, 4], torch.tensor([1.0, 2.4, 0.7]))
    # each on its own, and the class's defaults are untouched
    assert PatchesDataModule(std=[1.0, 1.0, 1.0]).mean == ClassificationDataModule.mean == (0.485, 0.456, 0.406)
    assert DigitsDataModule(mean=[0.5]).mean == (0.5,)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DigitsDataModule, "data")
    assert parser.parse_args(["--data.mean=[0.25]"]).data.mean == [0.25]


@pytest.mark.parametrize("std", [[0.5, 0.0, 0.5], [0.5, -1.0, 0.5], [0.5, float("nan"), 0.5]])
def test_a_standard_deviation_is_above_zero(std):
    with pytest.raises(InputError, match=r"^std=\[0.5, .*\]: expected "):
        PatchesDataModule(std=std)


def test_normalisation():
    module = PatchesDataModule()
    image = module.eval_transform()(torch.full((3, 16, 16), 128, dtype=torch.uint8))
    expected = (128 / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(image[:, 3, 4], expected, atol=1e-6)


# ---- arguments


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("batch_size", 0),
        ("batch_size", -3),
        ("num_workers", -1),
        ("image_size", 0),
        ("random_erasing", 2.0),
        ("random_erasing", -0.1),
        ("random_erasing", float("nan")),
        ("mixup_alpha", -1.0),
        ("cutmix_alpha", -0.5),
        ("augment", "autoaugmnt"),
        ("seed", -1),
        ("seed", 1.5),
        ("batch_size", 2.5),
        ("batch_size", "8"),
        ("num_workers", None),
        ("image_size", True),
        ("random_erasing", "0.1"),
        ("mixup_alpha", float("inf")),
        ("cutmix_alpha", True),
        ("mean", [0.5, 0.5]),
        ("mean", 0.5),
        ("std", ["a", "b", "c"]),
    ],
)
@pytest.mark.parametrize("module", MODULES)
def test_bad_values_are_named(module, argument, value):
    with pytest.raises(InputError) as caught:
        module(**{argument: value})
    assert str(caught.value).startswith(f"{argument}={value!r}: expected ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("module", MODULES)
def test_a_misspelt_argument_is_refused(module):
    with pytest.raises(TypeError, match="batchsize"):
        module(batchsize=3)


@pytest.mark.parametrize("module", MODULES)
def test_the_command_line_sees_every_argument(module):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ClassificationDataModule, "data")
    name = f"{module.__module__}.{module.__name__}"
    parsed = parser.parse_args([f"--data={name}", "--data.batch_size=3", "--data.augment=randaugment"])
    arguments = parsed.data.init_args
    common = set(inspect.signature(ClassificationDataModule.__init__).parameters) - {"self"}
    assert common <= set(arguments.keys())
    assert (arguments.batch_size, arguments.augment) == (3, "randaugment")
    for wrong in ("--data.augment=randaugmnt", "--data.batchsize=3", "--data.batch_size=many"):
        with pytest.raises(Exception, match=r"(?i)augment|batchsize|batch_size"):
            parser.parse_args([f"--data={name}", wrong])


def test_arguments_are_documented():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ImageNetDataModule, "data")
    text = " ".join(parser.format_help().split())
    for phrase in ("Folder that holds ``train``", "Probability of erasing", "Samples per batch and process"):
        assert phrase in text


@pytest.mark.parametrize("module", MODULES)
def test_hyperparameters_are_all_there_and_primitive(module):
    hparams = dict(module(batch_size=7, mixup_alpha=0.2).hparams)
    common = set(inspect.signature(ClassificationDataModule.__init__).parameters) - {"self"}
    own = set(inspect.signature(module.__init__).parameters) - {"self", "common"}
    assert set(hparams) == common | own
    assert (hparams["batch_size"], hparams["mixup_alpha"]) == (7, 0.2)
    assert all(value is None or isinstance(value, (bool, int, float, str)) for value in hparams.values())


def test_checkpoints_hold_them_and_load_with_weights_only(tmp_path):
    run = trainer(tmp_path, num_sanity_val_steps=0)
    run.fit(Watch(), PatchesDataModule(size=9, batch_size=3, augment="none"))
    run.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert checkpoint["datamodule_hyper_parameters"]["augment"] == "none"
    again = PatchesDataModule.load_from_checkpoint(tmp_path / "a.ckpt")
    assert (again.size, again.batch_size, again.augment) == (9, 3, "none")


# ---- augmentation


def test_without_augmentation_training_pictures_are_evaluation_pictures():
    class Noise(Patches):
        def __getitem__(self, index):
            pixels = np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8)
            return self.transform(PIL.Image.fromarray(pixels)), index % 3

    class NoiseDataModule(PatchesDataModule):
        def load(self, split, transform):
            return Noise(7, transform)

    module = NoiseDataModule(augment="none", batch_size=7)
    expected, targets = next(iter(module.val_dataloader()))
    loader = module.train_dataloader()
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        order = [index for _, index in loader.sampler]
        assert sorted(order) == list(range(7))
        loader.sampler.set_epoch(epoch)
        images, found = next(iter(loader))
        assert torch.equal(images, expected[order])
        assert torch.equal(found, targets[order])


@pytest.mark.parametrize(
    ("augment", "kind"),
    [("autoaugment", v2.AutoAugment), ("randaugment", v2.RandAugment), ("trivialaugment", v2.TrivialAugmentWide)],
)
def test_policies_follow_the_basic_augmentation(augment, kind):
    steps = PatchesDataModule(augment=augment).train_transform().transforms
    kinds = [type(step) for step in steps]
    assert kinds.index(ShiftedCrop) < kinds.index(RandomMirror) < kinds.index(kind)
    # the policies are made for bytes
    assert kinds.index(kind) < kinds.index(Normalise)
    assert kind not in [type(step) for step in PatchesDataModule(augment=augment).eval_transform().transforms]


@pytest.mark.parametrize("augment", ["basic", "autoaugment", "randaugment", "trivialaugment"])
def test_augmentation_follows_from_the_runs_seed_and_not_from_the_workers(augment):
    seed_everything(11)
    first, second = training_pictures(PatchesDataModule(augment=augment), passes=2)
    assert not torch.equal(first, second)
    seed_everything(11)
    again = training_pictures(PatchesDataModule(augment=augment, num_workers=2), passes=2)
    assert torch.equal(again[0], first)
    assert torch.equal(again[1], second)
    seed_everything(12)
    assert not torch.equal(training_pictures(PatchesDataModule(augment=augment))[0], first)


def test_random_erasing():
    module = PatchesDataModule(augment="none", random_erasing=1.0)
    (images,) = training_pictures(module)
    # the patches are of one colour, and an erased rectangle is zero
    erased = (images == 0).all(dim=1).flatten(1).sum(dim=1)
    assert (erased > 0).float().mean() > 0.9
    assert not (next(iter(module.val_dataloader()))[0] == 0).any()


@pytest.mark.parametrize("options", [{"mixup_alpha": 0.4}, {"cutmix_alpha": 1.0}])
def test_mixing_happens_in_training_only(tmp_path, options):
    watch = Watch()
    run = trainer(tmp_path, epochs=2, num_sanity_val_steps=1)
    module = PatchesDataModule(batch_size=6, **options)
    run.fit(watch, module)
    run.test(watch, module, verbose=False)
    assert all(targets.shape == (6, 3) for _, targets in watch.batches["train"])
    mixed = torch.cat([targets for _, targets in watch.batches["train"]])
    assert torch.allclose(mixed.sum(dim=1), torch.ones(len(mixed)))
    assert ((mixed > 0.02) & (mixed < 0.98)).any()
    for split in ("val", "test"):
        assert all(targets.dtype == torch.int64 for _, targets in watch.batches[split])


def test_mixup_mixes_pictures_as_it_mixes_targets(tmp_path):
    watch = Watch()
    trainer(tmp_path, num_sanity_val_steps=0).fit(
        watch, PatchesDataModule(batch_size=6, mixup_alpha=1.0, augment="none")
    )
    levels = (torch.tensor([40.0, 90.0, 140.0]) / 255 - 0.485) / 0.229
    for images, targets in watch.batches["train"]:
        # the red of a patch tells its class, and is linear in it
        assert torch.allclose(images[:, 0].mean(dim=(1, 2)), targets @ levels, atol=1e-4)


def test_both_mixes_take_turns(tmp_path):
    seed_everything(0)
    watch = Watch()
    module = PatchesDataModule(batch_size=6, mixup_alpha=1.0, cutmix_alpha=1.0, augment="none")
    trainer(tmp_path, epochs=6, num_sanity_val_steps=0).fit(watch, module)
    # a mixed patch of MixUp is of one colour, one of CutMix is not
    cut = [
        bool((images.amax(dim=(2, 3)) - images.amin(dim=(2, 3)) > 1e-4).any()) for images, _ in watch.batches["train"]
    ]
    assert 5 < sum(cut) < 25
    assert len(cut) == 30


# ---- under Lightning


def weights(watch):
    return torch.cat([parameter.flatten() for parameter in watch.parameters()])


def test_a_resumed_run_sees_what_the_uninterrupted_one_saw(tmp_path):
    def module(workers=0):
        return PatchesDataModule(batch_size=6, mixup_alpha=0.5, augment="trivialaugment", num_workers=workers)

    seed_everything(4)
    whole = Watch()
    trainer(tmp_path, epochs=4).fit(whole, module())
    seed_everything(4)
    half = Watch()
    run = trainer(tmp_path, epochs=2, enable_checkpointing=True, callbacks=[ModelCheckpoint(tmp_path, save_last=True)])
    run.fit(half, module())
    assert not torch.equal(weights(half), weights(whole))
    seed_everything(4)
    torch.rand(17)
    rest = Watch()
    trainer(tmp_path, epochs=4).fit(rest, module(workers=2), ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(weights(rest), weights(whole))
    for ours, theirs in zip(rest.batches["train"], whole.batches["train"][10:], strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


class Numbered(PatchesDataModule):
    """Every sample has a class of its own, by which it is known."""

    def __init__(self, size: int, **common: Any) -> None:
        super().__init__(size, image_size=2, num_workers=0, **common)
        self.class_names = [str(index) for index in range(size)]

    def load(self, split, transform):
        samples = Patches(self.size, transform)
        return [(samples[index][0], index) for index in range(self.size)]


class Interrupted(Watch):
    """Notes which samples it has trained on, and which of them the last checkpoint knows of."""

    def __init__(self, size: int, stop_after: int | None) -> None:
        super().__init__(3 * 2 * 2, size)
        self.seen, self.saved, self.stop_after = [], [], stop_after

    def training_step(self, batch):
        if self.stop_after is not None and len(self.seen) >= self.stop_after:
            raise InterruptedError
        self.seen.append((self.current_epoch, batch[1].tolist()))
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def on_save_checkpoint(self, checkpoint):
        self.saved = list(self.seen)


@given(
    size=st.integers(6, 40),
    runs=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 3), st.integers(1, 6)), min_size=1, max_size=3),
    last=st.tuples(st.integers(1, 7), st.integers(1, 3), st.none()),
)
@settings(max_examples=30, deadline=None, phases=[Phase.reuse, Phase.generate])
def test_an_interrupted_epoch_is_trained_on_once_whatever_changes(tmp_path_factory, size, runs, last):
    """Each run: batch size, accumulated batches, and how many batches until it is interrupted."""
    folder = tmp_path_factory.mktemp("run")
    seen, checkpoint = [], None
    for batch_size, accumulated, stop_after in [*runs, last]:
        seed_everything(4)
        module = Interrupted(size, stop_after)
        left = size - sum(len(batch) for epoch, batch in seen if epoch == seen[-1][0])
        run = trainer(
            folder,
            epochs=2,
            accumulate_grad_batches=accumulated,
            enable_checkpointing=True,
            callbacks=[LastCheckpoint(str(folder), every_n_steps=1)],
            limit_val_batches=0,
        )
        data, refused = Numbered(size, batch_size=batch_size), None
        with suppress(InterruptedError):
            try:
                run.fit(module, data, ckpt_path=checkpoint, weights_only=True)
            except InputError as error:
                refused = str(error)
        if refused is not None:
            assert f"batch_size={batch_size}: {left} samples a process are left of the epoch" in refused
            assert left < batch_size
            return
        seen += module.seen if stop_after is None else module.saved
        if (folder / "last.ckpt").is_file():
            checkpoint = folder / "last.ckpt"
    for epoch in (0, 1):
        counts = Counter(index for number, batch in seen if number == epoch for index in batch)
        assert set(counts.values()) <= {1}
        assert size - len(counts) < max(batch_size for batch_size, *_ in [*runs, last])


@pytest.mark.parametrize("batch_size", [4, 7, 12, 2])
@pytest.mark.parametrize("at_the_end", [False, True])
def test_after_a_checkpoint_of_the_last_batch_comes_a_whole_epoch(tmp_path, batch_size, at_the_end):
    """As Lightning's own callback writes them: before and after the epoch counts as done, or without its end."""
    options = {"every_n_epochs": 1, "save_on_train_epoch_end": False} if at_the_end else {"every_n_train_steps": 6}
    keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, **options)
    module, data = Interrupted(24, None), Numbered(24, batch_size=4)
    trainer(tmp_path, 1, enable_checkpointing=True, callbacks=[keep]).fit(module, data)
    resumed = Interrupted(24, None)
    data, checkpoint = Numbered(24, batch_size=batch_size), tmp_path / "step=6.ckpt"
    trainer(tmp_path, 2).fit(resumed, data, ckpt_path=checkpoint, weights_only=True)
    counts = Counter(index for epoch, batch in resumed.seen for index in batch)
    assert [epoch for epoch, _ in resumed.seen] == [1] * (24 // batch_size)
    assert set(counts.values()) == {1}
    assert 24 - len(counts) < batch_size


def test_overfit_batches(tmp_path):
    watch = Watch()
    with pytest.warns(UserWarning, match="requested to overfit"):
        trainer(tmp_path, epochs=2, overfit_batches=2, num_sanity_val_steps=0).fit(
            watch, PatchesDataModule(batch_size=3)
        )
    first, second = watch.batches["train"][:2], watch.batches["train"][2:]
    assert all(torch.equal(ours[0], theirs[0]) for ours, theirs in zip(first, second, strict=True))


def test_data_sets_are_built_by_setup_and_once(monkeypatch):
    built = []
    original = PatchesDataModule.load
    monkeypatch.setattr(
        PatchesDataModule,
        "load",
        lambda self, split, transform: built.append(split) or original(self, split, transform),
    )
    module = PatchesDataModule()
    module.setup("fit")
    assert built == ["train", "val"]
    module.setup("validate")
    module.train_dataloader()
    module.setup("test")
    assert built == ["train", "val", "test"]


def test_options_of_the_loaders():
    module = PatchesDataModule(num_workers=2, batch_size=5)
    train, val, test = module.train_dataloader(), module.val_dataloader(), module.test_dataloader()
    assert (train.num_workers, val.num_workers, test.num_workers) == (2, 2, 2)
    assert (train.persistent_workers, val.persistent_workers) == (True, True)
    assert not train.pin_memory
    module.trainer = SimpleNamespace(
        world_size=1,
        global_rank=0,
        strategy=SimpleNamespace(root_device=torch.device("cuda"), broadcast=lambda value: value),
    )
    assert module.train_dataloader().pin_memory


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [1, 7, 12])
def test_processes_share_training_and_evaluation(world, size):
    class Sized(PatchesDataModule):
        def load(self, split, transform):
            return Patches(size, transform)

    def rank_module(rank):
        module = Sized(batch_size=2, augment="none")
        strategy = SimpleNamespace(root_device=torch.device("cpu"), broadcast=lambda value: 77)
        fresh = SimpleNamespace(restarted_mid_epoch=False)
        module.trainer = SimpleNamespace(world_size=world, global_rank=rank, strategy=strategy, fit_loop=fresh)
        return module

    modules = [rank_module(rank) for rank in range(world)]
    for name in ("val", "test"):
        ranks = [list(getattr(module, f"{name}_dataloader")()) for module in modules]
        assert len({len(batches) for batches in ranks}) == 1
        targets = torch.cat([targets for batches in ranks for _, targets in batches])
        assert sorted(targets[targets != IGNORE_INDEX].tolist()) == sorted(index % 3 for index in range(size))
    indices = [{index for _, index in module.train_dataloader().sampler} for module in modules]
    assert set().union(*indices) == set(range(size))
    if size % world == 0:
        assert sum(len(part) for part in indices) == size


# ---- prediction


def test_predict_through_the_trainer(tmp_path, picture_folder):
    watch = Watch()
    module = PatchesDataModule(batch_size=2, predict_dir=str(picture_folder))
    paths = [path for batch in trainer(tmp_path).predict(watch, module) for path in batch]
    expected = ["a.jpg", "c.webp", "d grey.jpeg", "more/b.PNG", "more/e.gif"]
    assert [os.path.relpath(path, picture_folder) for path in paths] == expected
    images = torch.cat([images for images, _ in watch.batches["predict"]])
    assert images.shape == (5, 3, 16, 16)


def test_predicted_pictures_are_treated_like_test_pictures(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "a.png")
    module = PatchesDataModule(predict_dir=str(tmp_path), augment="randaugment")
    images, paths = next(iter(module.predict_dataloader()))
    assert paths == [str(tmp_path / "a.png")]
    assert torch.equal(images[0], module.eval_transform()(PIL.Image.fromarray(pixels)))


@pytest.mark.parametrize("kind", ["unset", "missing", "file", "empty"])
def test_a_folder_that_cannot_be_predicted(tmp_path, kind):
    path = tmp_path / "folder"
    if kind == "file":
        path.touch()
    elif kind == "empty":
        path.mkdir()
        (path / "notes.txt").touch()
    module = PatchesDataModule(predict_dir=None if kind == "unset" else str(path))
    with pytest.raises(InputError) as caught:
        module.setup("predict")
    message = str(caught.value)
    assert message.startswith("predict_dir=None" if kind == "unset" else f"predict_dir={str(path)!r}")
    assert "--data.predict_dir FOLDER" in message
    assert "\n" not in message


def test_an_unreadable_picture_stops_prediction_by_name_where_that_is_asked_for(tmp_path, picture_folder):
    (picture_folder / "more" / "zz.jpg").write_text("not a picture")
    options = {"batch_size": 2, "num_workers": 2, "predict_dir": str(picture_folder)}
    module = PatchesDataModule(**options, on_bad_image="stop")
    with pytest.raises(InputError) as caught:
        trainer(tmp_path).predict(Watch(), module)
    assert (
        str(caught.value) == f"{picture_folder / 'more' / 'zz.jpg'}: this file is not a picture; replace or remove it"
    )
    watch = Watch()
    trainer(tmp_path).predict(watch, PatchesDataModule(**options))
    skipped = [path for _, paths in watch.batches["predict"] for path in paths if not path]
    assert [path.path for path in skipped] == [str(picture_folder / "more" / "zz.jpg")]


def test_a_pil_image_is_turned_as_a_file_is(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    module = PatchesDataModule(batch_size=1, predict_dir=str(tmp_path))
    ((image,), _) = next(iter(module.predict_dataloader()))
    with PIL.Image.open(tmp_path / "a.png") as picture:
        # torchvision's data sets convert, and what the file says of its orientation stays
        assert torch.equal(module.eval_transform()(picture.convert("RGB")), image)
    assert torch.equal(module.eval_transform()(PIL.Image.fromarray(np.rot90(pixels, -1).copy())), image)


# ---- two real processes

TWO_PROCESSES = """
import sys
sys.path[:0] = [{here!r}, {tests!r}]
import torch
from lightning.pytorch import seed_everything
from test_classification import PatchesDataModule, Watch, trainer

class Count(Watch):
    def summary(self, name):
        found = [None, None]
        labels = [labels for _, labels in self.batches[name]]
        mine = [part if name == "predict" else part.tolist() for part in labels]
        torch.distributed.all_gather_object(found, mine)
        if self.global_rank == 0:
            print(name, found, flush=True)
    def on_train_epoch_end(self): self.summary("train")
    def on_validation_end(self): self.summary("val")
    def on_test_end(self): self.summary("test")
    def on_predict_end(self): self.summary("predict")

if __name__ == "__main__":
    seed_everything(1)
    run = trainer({out!r}, devices=2, strategy="ddp_fork", num_sanity_val_steps=0)
    data = PatchesDataModule(size=10, batch_size=3, predict_dir={pictures!r})
    model = Count()
    run.fit(model, data)
    run.test(model, data, verbose=False)
    run.predict(model, data, return_predictions=False)
"""


@pytest.mark.slow
def test_two_processes_count_every_sample_once(tmp_path, picture_folder):
    here = Path(__file__).parent
    script = tmp_path / "run.py"
    script.write_text(
        TWO_PROCESSES.format(
            here=str(here), tests=str(here.parent), out=str(tmp_path / "out"), pictures=str(picture_folder)
        )
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.split(" ")[0] in Watch().batches)
    found = {name: eval(text) for name, text in lines.items()}
    for name in ("val", "test"):
        ranks = found[name]
        assert [len(batches) for batches in ranks] == [2, 2]
        targets = [target for batches in ranks for batch in batches for target in batch]
        assert sorted(targets) == [IGNORE_INDEX, 0, 0, 0, 1, 1, 2, 2]
    paths = [path for batches in found["predict"] for batch in batches for path in batch]
    assert paths.count("") == 1
    assert len(set(paths) - {""}) == 5
    assert len(paths) == 6
    # 5 training samples each, of which the full batch of 3 is used
    assert [[len(batch) for batch in batches] for batches in found["train"]] == [[3], [3]]
