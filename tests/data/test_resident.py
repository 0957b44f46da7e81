"""Pictures that live on the device: the same batches as from a loader of samples, whatever the process or the batch."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st

from awconv.data import IGNORE_INDEX, CIFAR10DataModule
from awconv.data.loading import EvaluationSampler, TrainingSampler
from awconv.data.resident import ResidentBatches, ResidentSplit, shift_and_flip
from awconv.errors import InputError


def split_of(size=23, side=6, padding=2, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (size, 3, side, side), generator=generator, dtype=torch.uint8)
    split = ResidentSplit(pictures, torch.arange(size), lambda b: b, lambda b: b.float(), padding)
    return split.to(torch.device(device))


def by_target(batches):
    """Each picture under its target, which here tells which one it is."""
    return {int(t): image for images, targets in batches for image, t in zip(images, targets, strict=True)}


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(0, 3), st.integers(0, 99)
)
def test_each_picture_is_shifted_and_mirrored_as_it_says(batch, channels, height, width, padding, seed):
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (batch, channels, height, width)).astype(np.uint8)
    down, right = generator.integers(0, 2 * padding + 1, (2, batch))
    mirrored = generator.integers(0, 2, batch).astype(bool)
    found = shift_and_flip(torch.from_numpy(images), padding, *map(torch.from_numpy, (down, right, mirrored)))
    for n in range(batch):
        padded = np.pad(images[n], ((0, 0), (padding, padding), (padding, padding)))
        crop = padded[:, down[n] : down[n] + height, right[n] : right[n] + width]
        assert np.array_equal(found[n].numpy(), crop[..., ::-1] if mirrored[n] else crop)


def test_shifts_and_flips_are_drawn_evenly():
    """60 epochs of 100 pictures, a crop of 3x3 places: each of the 18 ways 333 times, give or take."""
    picture = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3).expand(100, 1, 3, 3)
    split = ResidentSplit(picture, torch.zeros(100, dtype=torch.int64), lambda b: b, lambda b: b, padding=1)
    batches = ResidentBatches(split, seed=0)
    counts = {}
    for epoch in range(60):
        for image in batches.__getitems__([(epoch, index) for index in range(100)])[0]:
            counts[image.numpy().tobytes()] = counts.get(image.numpy().tobytes(), 0) + 1
    assert len(counts) == 18
    chi_squared = sum((count - 6000 / 18) ** 2 / (6000 / 18) for count in counts.values())
    assert chi_squared < 40.8, "the 99.9th percentile of 17 degrees of freedom"


def test_augmentation_follows_from_seed_epoch_and_index_alone():
    split = split_of()
    whole = ResidentBatches(split, seed=5).__getitems__([(1, index) for index in range(23)])[0]
    again = ResidentBatches(split, seed=5)
    again.__getitems__([(0, 3), (0, 4)])
    pieces = [again.__getitems__([(1, index) for index in part])[0] for part in ([22, 3, 7], [0], [11, 7])]
    assert torch.equal(torch.cat(pieces), whole[[22, 3, 7, 0, 11, 7]])
    assert torch.equal(again[1, 9][0], whole[9])
    # as Trainer(overfit_batches=...) asks for them, the same every time
    plain = [again.__getitems__(list(range(23)))[0] for _ in range(2)]
    assert torch.equal(*plain)
    assert torch.equal(plain[0], again.__getitems__([(0, index) for index in range(23)])[0])
    for other in (ResidentBatches(split, seed=6), again):
        epoch = 1 if other is not again else 2
        assert not torch.equal(other.__getitems__([(epoch, index) for index in range(23)])[0], whole)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_work(processes):
    split = split_of()
    alone = by_target([ResidentBatches(split, seed=0).__getitems__([(0, index) for index in range(23)])])
    shared = {}
    for rank in range(processes):
        keys = list(TrainingSampler(split, processes, rank, seed=0))
        shared |= by_target([ResidentBatches(split, seed=0).__getitems__(keys)])
    assert shared.keys() == alone.keys()
    assert all(torch.equal(shared[key], alone[key]) for key in alone)
    targets = torch.cat(
        [
            ResidentBatches(split, None).__getitems__(list(EvaluationSampler(split, processes, rank)))[1]
            for rank in range(processes)
        ]
    )
    assert sorted(targets[targets != IGNORE_INDEX].tolist()) == list(range(23))
    assert len(targets) == -(-23 // processes) * processes


# ---- CIFAR ----------------------------------------------------------------------------------------------------------


def module_of(root, **options):
    options = {"num_workers": 2, "val_size": 13, "batch_size": 8, **options}
    return CIFAR10DataModule(str(root), **options)


@pytest.mark.parametrize("image_size", [32, 40])
def test_evaluation_is_bit_equal_to_the_loader_of_samples(cifar10_root, image_size):
    for split in ("val", "test"):
        loaders = [
            getattr(module_of(cifar10_root, image_size=image_size, keep_on_device=keep), f"{split}_dataloader")()
            for keep in (False, True)
        ]
        for (images, targets), (resident, theirs) in zip(*loaders, strict=True):
            assert torch.equal(images, resident)
            assert torch.equal(targets, theirs)
            assert resident.dtype == torch.float32


def test_training_has_the_order_of_the_loader_of_samples(cifar10_root):
    torch.manual_seed(3)
    found = []
    for keep in (False, True):
        loader = module_of(cifar10_root, augment="none", keep_on_device=keep).train_dataloader()
        found.append([list(loader), list(loader)])  # two epochs
    for ordinary, resident in zip(*found, strict=True):
        assert len(ordinary) == len(resident) == 47 // 8
        for (images, targets), (theirs, their_targets) in zip(ordinary, resident, strict=True):
            assert torch.equal(images, theirs)
            assert torch.equal(targets, their_targets)


@pytest.mark.parametrize("image_size", [32, 40])
def test_basic_augmentation_is_a_padded_crop_and_a_flip(cifar10_root, image_size):
    module = module_of(cifar10_root, image_size=image_size, batch_size=47, keep_on_device=True)
    images, targets = next(iter(module.train_dataloader()))
    mean, std = torch.tensor(module.mean).view(3, 1, 1), torch.tensor(module.std).view(3, 1, 1)
    images = ((images * std + mean) * 255).round()
    stored = module._datasets["train"]
    padding = image_size // 8
    enlarged = TF.resize(stored.pictures, [image_size, image_size]).float()
    padded = torch.nn.functional.pad(enlarged, [padding] * 4)
    seen = set()
    for image, target in zip(images, targets, strict=True):
        matches = [
            (top, left, flip)
            for top in range(2 * padding + 1)
            for left in range(2 * padding + 1)
            for flip in (False, True)
            for of in (padded[stored.targets == target][..., top : top + image_size, left : left + image_size],)
            if ((image.flip(-1) if flip else image) == of).flatten(1).all(dim=1).any()
        ]
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) > 25


def test_no_worker_is_started_but_for_pictures_of_a_folder(cifar10_root, picture_folder):
    module = module_of(cifar10_root, keep_on_device=True, predict_dir=str(picture_folder))
    loaders = (module.train_dataloader(), module.val_dataloader(), module.test_dataloader())
    assert [loader.num_workers for loader in loaders] == [0, 0, 0]
    predict = module.predict_dataloader()
    assert predict.num_workers == 2
    assert len(next(iter(predict))[1]) == 5


def test_without_validation_pictures_all_are_trained_on(cifar10_root):
    module = module_of(cifar10_root, keep_on_device=True, val_size=0, batch_size=60)
    with pytest.warns(UserWarning, match="validation runs on the test set"):
        module.setup("fit")
    assert len(next(iter(module.train_dataloader()))[1]) == 60
    assert torch.equal(next(iter(module.val_dataloader()))[0], next(iter(module.test_dataloader()))[0])


def test_pictures_follow_the_trainer_to_its_device(cifar10_root):
    """Also those of a module that was looked at before there was one, as in a notebook."""
    module = module_of(cifar10_root, keep_on_device=True)
    assert next(iter(module.val_dataloader()))[0].device.type == "cpu"
    strategy = SimpleNamespace(root_device=torch.device("meta"), broadcast=lambda seed: seed)
    fit_loop = SimpleNamespace(restarted_mid_epoch=False)
    module.trainer = SimpleNamespace(strategy=strategy, global_rank=0, world_size=1, fit_loop=fit_loop)
    for loader in (module.train_dataloader(), module.val_dataloader(), module.test_dataloader()):
        assert {part.device.type for part in next(iter(loader))} == {"meta"}


@pytest.mark.parametrize("method", ["load", "train_geometry"])
def test_a_class_that_loads_or_augments_otherwise_is_refused(method):
    other = type("Other", (CIFAR10DataModule,), {method: lambda self, *given: None})
    other()
    with pytest.raises(InputError, match=f"keep_on_device=True: expected false, since Other has a {method} of its own"):
        other(keep_on_device=True)


@pytest.mark.parametrize("option", [{"augment": "randaugment"}, {"random_erasing": 0.1}])
def test_what_works_picture_by_picture_is_refused(option):
    (name,) = option
    with pytest.raises(InputError, match=rf"keep_on_device=True: expected false, since {name}"):
        CIFAR10DataModule(keep_on_device=True, **option)


def test_a_run_is_resumed_inside_an_epoch(resumes_inside_an_epoch, cifar10_root):
    """The same weights as uninterrupted: the pictures that are left come as they would have."""
    options = ["-c", "configs/recipes/cifar10.yaml", "-c", "configs/models/resnet20.yaml"]
    options += [f"--data.root={cifar10_root}", "--data.keep_on_device=true", "--data.val_size=12"]
    options += ["--data.batch_size=8", "--data.cutmix_alpha=1.0", "--trainer.max_epochs=2", "--trainer.accelerator=cpu"]
    resumes_inside_an_epoch(*options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_makes_the_batches_that_a_cpu_makes():
    keys = [(2, index) for index in range(23)]
    on_cpu, on_gpu = (ResidentBatches(split_of(device=device), seed=1).__getitems__(keys) for device in ("cpu", "cuda"))
    assert all(theirs.is_cuda for theirs in on_gpu)
    assert all(torch.equal(ours, theirs.cpu()) for ours, theirs in zip(on_cpu, on_gpu, strict=True))
