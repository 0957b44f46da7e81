"""Which sample goes to which process, with which random numbers, and how its errors come back.

Two guarantees live here. In training, what a sample looks like depends on the run's seed, the epoch and the
sample's index, and on nothing else: not on the number of workers, not on the process that loads it, not on
whether the run was resumed. In evaluation, every sample is counted exactly once, however many processes
share the work.
"""

import hashlib
from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate

from awconv.errors import InputError

IGNORE_INDEX = -100
"""Target of a padding sample, which no metric and no loss may count (cross entropy's own default)."""


class MapDataset(Protocol):
    """A data set with a length, whose samples are reached by their index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Draw torch's CPU random numbers from a stream of their own, named by `key`, and restore the old one.

    Only the CPU generator is touched: ``torch.manual_seed`` would reset the generators of the GPUs as well,
    and dropout would repeat itself.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(int.from_bytes(digest, "little"))
    try:
        yield
    finally:
        generator.set_state(state)


class TrainingSampler(DistributedSampler[tuple[int, int]]):
    """Shuffles like torch's own `DistributedSampler`, for one process as for many, and yields (epoch, index).

    The epoch travels with the index because workers that persist have no other way to learn of it. Lightning
    leaves a `DistributedSampler` alone and sets its epoch, so that a resumed run sees the order of the
    uninterrupted one; without a trainer the epoch counts the passes.
    """

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        # torch's sampler yields plain indices, whatever its type parameter says
        indices: Iterator[Any] = super().__iter__()
        self.epoch += 1
        return ((epoch, index) for index in indices)


class TrainingSet(Dataset[Any]):
    """Samples of `dataset`, each augmented with the random numbers of (seed, epoch, index)."""

    def __init__(self, dataset: MapDataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int] | int) -> Any:
        # Trainer(overfit_batches=...) replaces the sampler by one of plain indices: the same pictures every epoch
        epoch, index = key if isinstance(key, tuple) else (0, key)
        with seeded(self.seed, epoch, index):
            return self.dataset[index]


class EvaluationSampler(DistributedSampler[int]):
    """Deals the samples out to the processes, each its own, and rounds the shares up to the same length.

    The indices beyond the last sample stand for padding, which :class:`EvaluationSet` supplies. Being a
    `DistributedSampler`, it is left alone by Lightning, whose own one would repeat samples.
    """

    def __init__(self, dataset: Sized, num_replicas: int, rank: int) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=False)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.total_size, self.num_replicas))


class EvaluationSet(Dataset[Any]):
    """Samples of `dataset`; behind the last one stand padding samples, labelled as such.

    A padding sample is a copy of the first picture, with target :data:`IGNORE_INDEX`, or path "" where the
    label is a path.
    """

    def __init__(self, dataset: MapDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if index < len(self.dataset):
            return self.dataset[index]
        image, label = self.dataset[0]
        return image, "" if isinstance(label, str) else IGNORE_INDEX


def collate(samples: Sequence[tuple[Tensor, Any]]) -> tuple[Tensor, Tensor | list[str]]:
    """Stack (image, label) samples into images (N, C, H, W) and int64 targets (N,), or a list of N paths."""
    images, labels = zip(*samples, strict=True)
    # torch's own stacks in shared memory, which saves a copy per batch of a worker
    stacked: Tensor = default_collate(list(images))
    if isinstance(labels[0], str):
        return stacked, list(labels)
    # a padding sample's label is an int where the data set's own may be tensors
    return stacked, torch.tensor([int(label) for label in labels])


class Loader(DataLoader[Any]):
    """A `DataLoader` that raises a worker's `InputError` as it was, on one line.

    torch hands on an exception with the worker's traceback pasted into its message. Being a generator, the
    iteration also starts no worker before the first batch is asked for; Lightning calls ``iter`` before it
    tells the sampler the epoch of a resumed run, and workers started then would load the wrong samples.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except InputError as error:
            text = str(error)
            if not text.startswith("Caught "):
                raise
            name = f"{type(error).__module__}.{type(error).__qualname__}"
            raise InputError(text.rstrip().rpartition("\n")[2].removeprefix(f"{name}: ")) from None
