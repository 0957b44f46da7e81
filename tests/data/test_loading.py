import random
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, DistributedSampler

from awconv.data.loading import (
    IGNORE_INDEX,
    EvaluationSampler,
    EvaluationSet,
    GroupedSampler,
    Loader,
    Part,
    TrainingSampler,
    TrainingSet,
    collate,
    seeded,
)
from awconv.errors import InputError


class Numbers(Dataset):
    """Sample i is (picture full of i, label i), or (picture, path "i")."""

    def __init__(self, size, as_paths=False):
        self.size = size
        self.as_paths = as_paths

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if not 0 <= index < self.size:
            raise IndexError(index)
        return torch.full((1, 2, 2), float(index)), str(index) if self.as_paths else index


class Noise(Numbers):
    """Sample i is (random picture, label i)."""

    def __getitem__(self, index):
        return torch.rand(1, 2, 2), index


class Broken(Numbers):
    def __getitem__(self, index):
        if index == 3:
            try:
                raise OSError("a cause with\nlines of its own")
            except OSError as error:
                raise InputError("cat.jpg: this picture: cannot be read; remove it") from error
        return super().__getitem__(index)


class Buggy(Numbers):
    def __getitem__(self, index):
        raise ZeroDivisionError("a bug")


def evaluation_batches(size, world, batch_size, as_paths=False):
    """The batches of every rank."""
    dataset = Numbers(size, as_paths)
    return [
        list(
            Loader(
                EvaluationSet(dataset),
                sampler=EvaluationSampler(dataset, world, rank),
                batch_size=batch_size,
                collate_fn=collate,
            )
        )
        for rank in range(world)
    ]


@given(size=st.integers(1, 40), world=st.integers(1, 9), batch_size=st.integers(1, 7))
@settings(max_examples=150, deadline=None)
def test_every_sample_is_evaluated_exactly_once(size, world, batch_size):
    ranks = evaluation_batches(size, world, batch_size)
    assert len({len(batches) for batches in ranks}) == 1
    assert len({tuple(len(targets) for _, targets in batches) for batches in ranks}) == 1
    images = torch.cat([images for batches in ranks for images, _ in batches])
    targets = torch.cat([targets for batches in ranks for _, targets in batches])
    assert targets.dtype == torch.int64
    real = targets != IGNORE_INDEX
    assert sorted(targets[real].tolist()) == list(range(size))
    assert torch.equal(images[real][:, 0, 0, 0], targets[real].float())
    # no more padding than it takes to make the shares equal
    assert (~real).sum() == -size % world


@given(size=st.integers(1, 12), world=st.integers(1, 5), batch_size=st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_every_path_is_predicted_exactly_once(size, world, batch_size):
    ranks = evaluation_batches(size, world, batch_size, as_paths=True)
    paths = [path for batches in ranks for _, batch in batches for path in batch]
    assert all(isinstance(batch, list) for batches in ranks for _, batch in batches)
    assert sorted(path for path in paths if path) == sorted(map(str, range(size)))
    assert paths.count("") == -size % world


def test_evaluation_sampler_length_is_what_it_yields():
    for size, world in [(1, 3), (7, 2), (8, 2), (2, 5)]:
        for rank in range(world):
            sampler = EvaluationSampler(Numbers(size), world, rank)
            assert len(list(sampler)) == len(sampler)


@given(size=st.integers(1, 30), world=st.integers(1, 4), epoch=st.integers(0, 5), seed=st.integers(0, 2**61))
@settings(max_examples=50, deadline=None)
def test_training_order_is_that_of_torchs_distributed_sampler(size, world, epoch, seed):
    dataset = Numbers(size)
    seen = []
    for rank in range(world):
        reference = DistributedSampler(dataset, world, rank, shuffle=True, seed=seed)
        sampler = TrainingSampler(dataset, world, rank, seed=seed)
        reference.set_epoch(epoch)
        sampler.set_epoch(epoch)
        keys = list(sampler)
        assert [index for _, index in keys] == list(reference)
        assert {number for number, _ in keys} == {epoch}
        seen += [index for _, index in keys]
    assert set(seen) == set(range(size))


@given(
    groups=st.lists(st.integers(0, 2), min_size=1, max_size=60),
    grouped=st.booleans(),
    parts=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(0, 4)), min_size=1, max_size=4),
    epoch=st.integers(0, 3),
)
@settings(max_examples=200, deadline=None)
def test_an_epoch_in_parts_of_other_batches_and_processes_misses_and_repeats_no_sample(groups, grouped, parts, epoch):
    """Each part: batch size, processes, and how many batches until the run is interrupted."""
    groups, options = np.array(groups), {"groups": np.array(groups)} if grouped else {}
    kind = GroupedSampler if grouped else TrainingSampler
    seen, before = [], []
    for batch_size, processes, batches in parts:
        samplers = [
            kind(groups, processes, rank, seed=9, batch_size=batch_size, **options) for rank in range(processes)
        ]
        now = [*before, Part(batch_size, processes, 0)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
            sampler.parts = lambda _, now=now: (9, now)
        shares = [[index for _, index in sampler] for sampler in samplers]
        assert len({len(share) for share in shares}) == 1
        batches = min(batches, len(shares[0]) // batch_size)
        seen += [index for share in shares for index in share[: batches * batch_size]]
        before.append(Part(batch_size, processes, batches * batch_size * processes))
        rest = [index for share in shares for index in share[batches * batch_size :]]
    # only what fills the processes up to equally many comes again
    again = [index for index, count in Counter(seen + rest).items() if count > 1]
    assert sorted({*seen, *rest}) == list(range(len(groups)))
    assert len(again) <= sum(processes - 1 for _, processes, _ in parts)
    if all(processes == 1 for _, processes, _ in parts):
        assert again == []


def training_loader(size=24, workers=0, seed=5, batch_size=4):
    dataset = Noise(size)
    return Loader(
        TrainingSet(dataset, seed),
        sampler=TrainingSampler(dataset, 1, 0, seed=seed),
        batch_size=batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=collate,
    )


def by_index(loader):
    """{label: picture} of one pass."""
    return {
        int(target): image.clone() for images, targets in loader for image, target in zip(images, targets, strict=True)
    }


def test_augmentation_differs_between_epochs_samples_and_seeds():
    loader = training_loader()
    first, second = by_index(loader), by_index(loader)
    other = by_index(training_loader(seed=6))
    pictures = [tuple(picture.flatten().tolist()) for run in (first, second, other) for picture in run.values()]
    assert len(set(pictures)) == 3 * 24


def test_the_order_differs_between_epochs():
    loader = training_loader()
    first, second = ([targets.tolist() for _, targets in loader] for _ in range(2))
    assert first != second


def test_workers_change_nothing_and_neither_does_a_late_start():
    alone, shared = training_loader(), training_loader(workers=2)
    late = training_loader()
    late.sampler.set_epoch(2)
    for epoch in range(3):
        expected = [(images.clone(), targets) for images, targets in alone]
        found = [(images.clone(), targets) for images, targets in shared]
        if epoch == 2:
            found += list(late)
            expected += expected
        assert len(found) == len(expected)
        for (images, targets), (other_images, other_targets) in zip(found, expected, strict=True):
            assert torch.equal(targets, other_targets)
            assert torch.equal(images, other_images)


def test_plain_indices_are_augmented_alike_in_every_epoch():
    # Trainer(overfit_batches=...) swaps in a sampler of plain indices
    dataset = TrainingSet(Noise(4), seed=0)
    assert torch.equal(dataset[2][0], dataset[2][0])
    assert torch.equal(dataset[2][0], dataset[0, 2][0])
    assert not torch.equal(dataset[2][0], dataset[1, 2][0])
    assert len(dataset) == 4


def test_seeded_leaves_the_generators_as_they_were():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with seeded(1, 2):
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.initial_seed() == 3
    with seeded(1, 2):
        again = torch.rand(3)
    with seeded(2, 1):
        swapped = torch.rand(3)
    assert torch.equal(first, again)
    assert not torch.equal(first, swapped)
    with pytest.raises(ZeroDivisionError), seeded(1):
        1 / 0  # noqa: B018
    assert torch.equal(torch.get_rng_state(), before)


def test_seeded_leaves_python_and_numpy_alone():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    expected = random.random(), np.random.rand()  # noqa: NPY002
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    with seeded(9):
        assert (random.random(), np.random.rand()) == expected  # noqa: NPY002


@pytest.mark.parametrize("workers", [0, 2])
def test_an_input_error_arrives_as_it_was_raised(workers):
    loader = Loader(Broken(6), batch_size=2, num_workers=workers, collate_fn=collate)
    with pytest.raises(InputError) as caught:
        list(loader)
    assert str(caught.value) == "cat.jpg: this picture: cannot be read; remove it"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_keeps_its_traceback(workers):
    loader = Loader(Buggy(2), num_workers=workers, collate_fn=collate)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        list(loader)


def test_no_worker_starts_before_the_first_batch():
    loader = training_loader(workers=1)
    iterator = iter(loader)
    assert loader._iterator is None
    loader.sampler.set_epoch(7)
    reference = training_loader()
    reference.sampler.set_epoch(7)
    images, targets = next(iterator)
    expected_images, expected_targets = next(iter(reference))
    assert torch.equal(targets, expected_targets)
    assert torch.equal(images, expected_images)


def test_a_pass_may_be_left_early():
    loader = training_loader(workers=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next(iter(loader))
        assert len(list(loader)) == len(loader) == 6


def test_collate():
    images, targets = collate([(torch.zeros(1, 2, 2), 4), (torch.ones(1, 2, 2), torch.tensor(5))])
    assert images.shape == (2, 1, 2, 2)
    assert targets.dtype == torch.int64
    assert targets.tolist() == [4, 5]
    assert collate([(torch.zeros(1), "a"), (torch.ones(1), "")])[1] == ["a", ""]
