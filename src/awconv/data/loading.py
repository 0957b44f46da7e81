"""Which sample goes to which process, with which random numbers, and how its errors come back.

Two guarantees live here. In training, what a sample looks like depends on the run's seed, the epoch and the
sample's index, and on nothing else: not on the number of workers, not on the process that loads it, not on
whether the run was resumed. In evaluation, every sample is counted exactly once, however many processes
share the work.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate

from awconv.errors import InputError

Array: TypeAlias = npt.NDArray[Any]

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


class Part(NamedTuple):
    """What was trained on of an epoch with one batch size and number of processes."""

    batch_size: int
    processes: int
    taken: int
    """Samples, of all processes together."""


class TrainingSampler(DistributedSampler[tuple[int, int]]):
    """Shuffles like torch's own `DistributedSampler`, for one process as for many, and yields (epoch, index).

    The epoch travels with the index because workers that persist have no other way to learn of it. Lightning
    leaves a `DistributedSampler` alone and sets its epoch, so that a resumed run sees the order of the
    uninterrupted one; without a trainer the epoch counts the passes.

    Args:
        dataset: The samples.
        num_replicas: Number of processes.
        rank: Number of this process.
        seed: Seed of the order.
        batch_size: Samples per batch and process.

    Attributes:
        samples: Number of samples.
        begin_epoch: Called when Lightning sets the epoch, before it counts or fetches a batch of it.
        parts: Called at the start of a pass with its epoch; gives the seed of that epoch's order, and what was trained
            on already with which batch size and number of processes, the present ones last. That is left out.
    """

    begin_epoch: Callable[[int], None] = staticmethod(lambda epoch: None)
    parts: Callable[[int], tuple[int, Sequence[Part]]]

    def __init__(self, dataset: Sized, num_replicas: int, rank: int, *, seed: int, batch_size: int = 1) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, seed=seed)  # type: ignore[arg-type]
        self.samples = len(dataset)
        self.parts = lambda epoch: (seed, [Part(batch_size, num_replicas, 0)])

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, of which seed and order are."""
        super().set_epoch(epoch)
        self.begin_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, order = self.epoch, self.remaining(*self.parts(self.epoch))
        self.epoch += 1
        return ((epoch, index) for index in order[self.rank :: self.num_replicas].tolist())

    def remaining(self, seed: int, parts: Sequence[Part]) -> Array:
        """Samples of the present epoch that were not trained on yet, of all processes, in the order of training.

        As in torch's sampler, the first samples come again at the end where the processes would not get equally many.
        """
        rest = torch.randperm(self.samples, generator=torch.Generator().manual_seed(seed + self.epoch)).numpy()
        for place, (batch_size, processes, taken) in enumerate(parts):
            order = self.arrange(np.resize(rest, -(-len(rest) // processes) * processes), batch_size * processes)
            done, rest = order[:taken], order[taken:]
            if place + 1 < len(parts):  # without what the processes of this part would have got twice
                rest = rest[np.sort(np.unique(rest, return_index=True)[1])]
                rest = rest[~np.isin(rest, done)]
        return rest

    def arrange(self, order: Array, batch: int) -> Array:
        """Puts shuffled samples into batches, each of so many samples of all processes."""
        return order


class GroupedSampler(TrainingSampler):
    """Shuffles like :class:`TrainingSampler`, and then fills each batch with samples of one group.

    The shuffled samples fall into one bucket per group, and a bucket is emptied into the order whenever it holds a
    batch, counted over all processes, so that they have the same group at the same time. What is left in the buckets
    comes last, as shuffled, so that no group is favoured where the last batch is dropped.

    Args:
        dataset: The samples.
        num_replicas: Number of processes.
        rank: Number of this process.
        seed: Seed of the order.
        groups: Group of each sample, whole numbers.
        batch_size: Samples per batch and process.
    """

    def __init__(
        self, dataset: Sized, num_replicas: int, rank: int, *, seed: int, groups: Array, batch_size: int
    ) -> None:
        super().__init__(dataset, num_replicas, rank, seed=seed, batch_size=batch_size)
        self._groups = groups

    def arrange(self, order: Array, batch: int) -> Array:
        """Puts shuffled samples into batches, each of so many samples of all processes."""
        groups = self._groups[order]
        # when a sample leaves its bucket: with the one that completes the batch
        leaves = np.full(len(order), len(order))
        for group in np.unique(groups):
            bucket = np.flatnonzero(groups == group)
            full = bucket[: len(bucket) - len(bucket) % batch]
            leaves[full] = np.repeat(full[batch - 1 :: batch], batch)
        return order[np.argsort(leaves, kind="stable")]


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

    A padding sample is a copy of the first picture: with path "" where the label is a path, with the first
    picture's target, image id included, where the target is a dict, and else with target :data:`IGNORE_INDEX`.
    """

    def __init__(self, dataset: MapDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if index < len(self.dataset):
            return self.dataset[index]
        image, label = self.dataset[0]
        if isinstance(label, dict):
            return image, label
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

    The two methods by which Lightning knows a loader that can be resumed inside an epoch do nothing: where to go on
    follows from Lightning's own count of batches and the state of the data module, see
    :attr:`TrainingSampler.parts`.
    """

    def state_dict(self) -> dict[str, Any]:
        """Gives nothing to keep."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Needs nothing that was kept."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except InputError as error:
            text = str(error.args[0])  # and not str(error), in which the lines are one
            if not text.startswith("Caught "):
                raise
            name = f"{type(error).__module__}.{type(error).__qualname__}"
            raise InputError(text.rstrip().rpartition("\n")[2].removeprefix(f"{name}: ")) from None
