"""What every data module shares: its splits, its loaders, several processes, and a folder to predict."""

import os
import signal
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from awconv.checkpoint import ChecksCheckpoint
from awconv.data.encoded import DecodingLoader, EncodedPictures
from awconv.data.loading import (
    EvaluationSampler,
    EvaluationSet,
    Loader,
    MapDataset,
    Part,
    TrainingSampler,
    TrainingSet,
)
from awconv.data.pictures import (
    EXTENSIONS_SHOWN,
    PassedOver,
    PictureDataset,
    find_pictures,
    limit_pixels,
    unreadable,
)
from awconv.data.resident import ResidentBatches, ResidentSplit, as_it_is
from awconv.errors import InputError, printable, require, require_int
from awconv.files import MAX_IMAGE_PIXELS

Split: TypeAlias = Literal["train", "val", "test"]
Transform: TypeAlias = Callable[..., Any]
OnBadImage: TypeAlias = Literal["stop", "skip"]

_SPLITS_OF_STAGE: dict[str | None, tuple[str, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
    None: ("train", "val", "test"),
}


class BaseDataModule(ChecksCheckpoint, LightningDataModule):
    """Base class of the data modules of every task; start from the one of your task.

    A task's base class supplies :meth:`load_split`, :meth:`predict_transform` and :meth:`collate`; its data sets
    yield (picture, target) and, for ``predict``, (picture, path).

    The order of the samples and their augmentation follow from the run's seed (``seed_everything``), the epoch
    and the sample, so that neither the number of workers nor a resumption, be it inside an epoch, changes them. A run
    that is resumed inside an epoch with another batch size or number of processes trains on the samples that are left.
    With several processes each evaluates its own share, and the shares are filled up to one length with padding
    samples (see :class:`awconv.data.loading.EvaluationSet`).

    Args:
        batch_size: Samples per batch and process.
        num_workers: Worker processes that load data, per process; 0 loads in the process itself.
        predict_dir: Folder of images for ``predict``, searched with all its subfolders but the hidden ones.
        on_bad_image: What to do at a file that cannot be read: "stop" with an error that names it, or "skip" it.
            ``predict`` skips it by going on without it, and lists it in ``skipped.csv``; training by taking the next
            one instead, with a warning. Null skips in ``predict`` alone. Validation and test stop at a file that turns
            out to be damaged, since their measures are of a set of images that is known.
        check_images: Decode every image file of the splits that a command uses before it begins, and stop if any cannot
            be read. It takes as long as an epoch of reading them. (``predict`` checks only with `on_bad_image` "stop".)
        max_image_pixels: An image file whose head tells of more pixels cannot be read: a file of a kilobyte may ask for
            all memory. It holds for all images that the process and its workers read, those of figures included, from
            when a data module is set up until another one is.
        seed: Seed of what the data module itself makes or cuts out; nothing else depends on it.

    Raises:
        InputError: An argument is of the wrong type or out of its range.
    """

    in_channels: int = 3

    def __init__(
        self,
        *,
        batch_size: int,
        num_workers: int,
        predict_dir: str | None = None,
        on_bad_image: OnBadImage | None = None,
        check_images: bool = False,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require_int("batch_size", batch_size, "a whole number, at least 1", low=1)
        require_int("num_workers", num_workers, "a whole number, 0 or more", low=0)
        require(on_bad_image in (None, *get_args(OnBadImage)), "on_bad_image", on_bad_image, "stop, skip or null")
        require(isinstance(check_images, bool), "check_images", check_images, "true or false")
        require_int("max_image_pixels", max_image_pixels, "a number of pixels, at least 1", low=1)
        require_int("seed", seed, "a whole number from 0 to 4294967295", low=0, high=2**32 - 1)
        # The logger gets none of them: Lightning refuses to log a name that the model has too with another
        # value, and `class_names` or `image_size` of a model may well differ.
        self.save_hyperparameters(logger=False)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.predict_dir = predict_dir
        self.on_bad_image = on_bad_image
        self.check_images = check_images
        self.max_image_pixels = max_image_pixels
        self.seed = seed
        self._datasets: dict[str, MapDataset] = {}
        self._checked_splits: set[str] = set()
        self._sampler: TrainingSampler | None = None
        self._loaded: dict[str, Any] = {}
        self._resumed: _Resumed | None = None

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of their indices."""
        raise self._lacking("class_names")

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def _lacking(self, what: str) -> Exception:
        name = type(self).__name__
        if type(self).__module__.startswith("awconv."):
            return InputError(f"{name} is a base for data modules of your own, and has no data; name one that has")
        return NotImplementedError(f"{name} has to define {what}")

    # ---- what the base class of a task supplies

    def load_split(self, split: Split) -> MapDataset:
        """Return one split as a map-style data set of (picture, target), transformed."""
        raise self._lacking("load_split(split)")

    def predict_transform(self) -> Transform:
        """What happens to a picture of `predict_dir`, a uint8 tensor (3, H, W)."""
        raise self._lacking("predict_transform()")

    @staticmethod
    def collate(samples: Sequence[tuple[Any, Any]]) -> tuple[Any, Any]:
        """Make one batch of (picture, target) or (picture, path) samples."""
        raise NotImplementedError("the base class of a task has to define collate(samples)")

    def train_sampler(self, dataset: MapDataset, processes: int, rank: int, seed: int) -> TrainingSampler:
        """Return the order of the training samples: shuffled anew in every epoch."""
        return TrainingSampler(dataset, processes, rank, seed=seed, batch_size=self.batch_size)

    # ---- loaders

    def setup(self, stage: str | None = None) -> None:
        """Build the data sets of a stage, so that what is wrong with the data is said before anything runs."""
        splits = _SPLITS_OF_STAGE[stage]
        for split in splits:
            self._dataset(split)
        # prediction leaves out what cannot be read, and says so
        checked = [split for split in splits if split != "predict" or self.on_bad_image == "stop"]
        if self.check_images:
            checked = [split for split in checked if split not in self._checked_splits]
            self._checked_splits.update(checked)
            self._check_images(checked)

    def train_dataloader(self) -> Loader:
        """Shuffled, augmented batches."""
        dataset = self._dataset("train")
        seed = torch.initial_seed()
        if self.trainer is not None:
            # every process has to shuffle alike, also in a run that nobody seeded
            seed = self.trainer.strategy.broadcast(seed)
        rank, processes = self._place()
        # torch adds the epoch to the sampler's seed, and takes 64 bits in all
        sampler = self._sampler = self.train_sampler(dataset, processes, rank, seed % 2**62)
        sampler.begin_epoch, sampler.parts = self._begin_epoch, self._parts
        samples = self._samples(dataset, seed)
        return self._loader(samples, sampler=sampler, drop_last=len(sampler) >= self.batch_size, persistent=True)

    def val_dataloader(self) -> Loader:
        """Batches of the validation set."""
        return self._evaluation_loader("val", persistent=True)

    def test_dataloader(self) -> Loader:
        """Batches of the test set."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> Loader:
        """Batches of the pictures below `predict_dir`, each picture with its path."""
        return self._evaluation_loader("predict")

    def _evaluation_loader(self, split: str, **options: Any) -> Loader:
        dataset = self._dataset(split)
        rank, processes = self._place()
        sampler = EvaluationSampler(dataset, processes, rank) if processes > 1 else None
        return self._loader(self._samples(dataset, None), sampler=sampler, **options)

    def _samples(self, dataset: MapDataset, seed: int | None) -> Any:
        """The samples of a split, augmented from ``seed``; None for evaluation."""
        if isinstance(dataset, ResidentSplit):
            return ResidentBatches(dataset.to(self.device), seed)
        return EvaluationSet(dataset) if seed is None else TrainingSet(dataset, seed)

    def _loader(self, samples: Any, persistent: bool = False, **options: Any) -> Loader:
        if isinstance(samples, ResidentBatches):  # no worker has a part in it
            return Loader(samples, batch_size=self.batch_size, collate_fn=as_it_is, **options)  # type: ignore[arg-type]
        encoded = isinstance(samples, EncodedPictures)
        return (DecodingLoader if encoded else Loader)(
            samples,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=persistent and self.num_workers > 0,
            collate_fn=samples.pack if encoded else self.collate,
            # the decoder reads ordinary memory, and pinning would only copy the bytes once more
            pin_memory=self.device.type == "cuda" and not encoded,
            worker_init_fn=partial(_begin_worker, self.max_image_pixels),
            **options,
        )

    @property
    def device(self) -> torch.device:
        """Where this process computes; the CPU where there is no trainer."""
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device

    # ---- resuming inside an epoch

    def state_dict(self) -> dict[str, Any]:
        """What was trained on of the present epoch, for a run that is resumed inside it."""
        loop = None if self.trainer is None else self.trainer.fit_loop
        if loop is None or self._sampler is None or not loop.epoch_progress.current.ready:
            return {}
        progress: Any = loop.epoch_progress.current
        epoch, batches = progress.processed, loop.epoch_loop.batch_progress.current.ready
        seed, (*before, now) = self._parts(epoch)
        first = self._resumed.first_batch if self._resumed is not None and self._resumed.epoch == epoch else 0
        now = now._replace(taken=now.taken + (batches - first) * now.batch_size * now.processes)
        return {
            "epoch": epoch,
            "seed": seed,
            "samples": self._sampler.samples,
            "batches": self.trainer.num_training_batches,  # type: ignore[union-attr]
            "parts": [list(part) for part in (*before, now)],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Notes what was trained on, until training begins.

        Raises:
            InputError: If it is not what :meth:`state_dict` gives.
        """
        if state_dict and not (isinstance(state_dict, dict) and _is_state(state_dict)):
            raise InputError(
                "the checkpoint does not say rightly how far its run was in its data; start from its weights with "
                "--model.initial_weights"
            )
        self._loaded = state_dict

    def _begin_epoch(self, epoch: int) -> None:
        """Leaves out what was trained on of an epoch inside which a run is resumed."""
        loop: Any = None if self.trainer is None else self.trainer.fit_loop
        if loop is None or not loop.restarted_mid_epoch:
            return
        sampler: Any = self._sampler
        loader: Any = self.trainer.train_dataloader  # type: ignore[union-attr]
        batches: Any = self.trainer.num_training_batches  # type: ignore[union-attr]
        progress = loop.epoch_loop.batch_progress.current
        done: int = progress.ready
        if self._loaded.get("epoch", epoch) != epoch:  # the checkpoint is of the last batch of an epoch, which is over
            progress.completed = max(progress.completed, batches - 1)
            return
        here = Part(self.batch_size, sampler.num_replicas, 0)
        # a checkpoint of version 0.1.0 says nothing
        before = [(*here[:2], done * here.batch_size * here.processes)]
        state = {"seed": sampler.seed, "samples": sampler.samples, "batches": batches, "parts": before, **self._loaded}
        if state["samples"] != sampler.samples:
            rank_zero_warn(
                f"the data hold {sampler.samples} training samples, and held {state['samples']} when this epoch began: "
                "until it ends some may be trained on twice, or not at all"
            )
        parts = [Part(*part) for part in state["parts"]]
        if changed := parts[-1][:2] != here[:2]:
            parts.append(here)
        if changed or state["batches"] != batches:
            samples = len(sampler.remaining(state["seed"], parts)) // here.processes
            if done >= state["batches"]:  # that epoch is over
                samples = 0
            elif samples < here.batch_size:
                raise InputError(
                    f"batch_size={here.batch_size}: {samples} samples a process are left of the epoch inside which the "
                    f"run is resumed; give a batch_size of at most {samples}"
                )
            left = samples // here.batch_size
            if batches < len(loader):  # trainer.limit_train_batches: as large a part of the epoch is done as was
                left = min(left, max(1, batches - round(done / state["batches"] * batches)))
            # Lightning goes on counting from here, in batches of the present size
            for name in ("ready", "started", "processed", "completed"):
                setattr(progress, name, getattr(progress, name) + batches - left - done)
        self._resumed = _Resumed(epoch, state["seed"], parts, progress.ready)

    def _parts(self, epoch: int) -> tuple[int, list[Part]]:
        """The seed of an epoch's order, and what was trained on of it before the run was resumed."""
        if self._resumed is not None and self._resumed.epoch == epoch:
            return self._resumed.seed, self._resumed.parts
        assert self._sampler is not None
        return self._sampler.seed, [Part(self.batch_size, self._sampler.num_replicas, 0)]

    def _place(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def _dataset(self, split: str) -> MapDataset:
        limit_pixels(self.max_image_pixels)
        if split not in self._datasets:
            # the stages name no other splits
            dataset = self._pictures_to_predict() if split == "predict" else self.load_split(split)  # type: ignore[arg-type]
            if len(dataset) == 0:
                raise InputError(f"{type(self).__name__}: the {split} split holds no samples")
            self._datasets[split] = dataset
        return self._datasets[split]

    def _paths(self, split: str) -> list[str]:
        """The image files of a split; none where a data set of the user's own does not name them."""
        dataset = self._dataset(split)
        path = getattr(dataset, "path", None)
        return [path(index) for index in range(len(dataset))] if callable(path) else []

    def _check_images(self, splits: Sequence[str]) -> None:
        """Decode all image files, each of several processes its share, and refuse them if any cannot be read."""
        paths = list(dict.fromkeys(path for split in splits for path in self._paths(split)))
        rank, processes = self._place()
        mine = [str(error) for error in unreadable(paths[rank::processes])]
        shares: list[Any] = [mine] * processes
        if processes > 1:
            torch.distributed.all_gather_object(shares, mine)
        errors = sorted(error for share in shares for error in share)
        if errors:
            first = "; ".join(error.removesuffix("; replace or remove it") for error in errors[:3])
            raise InputError(
                f"check_images=True: {len(errors)} of the {len(paths)} images of {' and '.join(splits)} "
                f"cannot be read{', such as' if len(errors) > 3 else ':'} {first}; replace or remove them"
            )

    def _pictures_to_predict(self) -> MapDataset:
        folder = self.predict_dir
        remedy = "name a folder of pictures with --data.predict_dir FOLDER"
        require(folder is not None, "predict_dir", folder, f"a folder of pictures to predict; {remedy}")
        assert folder is not None
        require(os.path.isdir(folder), "predict_dir", folder, f"a folder, and that is none; {remedy}")
        passed_over = PassedOver()
        paths = find_pictures(folder, passed_over)
        there = f" (but {passed_over})" if str(passed_over) else ""
        found = f"images ({EXTENSIONS_SHOWN}), and there are none in it or below{there}; {remedy}"
        require(bool(paths), "predict_dir", folder, found)
        tell(folder, passed_over)
        return PictureDataset(paths, None, self.predict_transform(), skip_bad=self.on_bad_image != "stop")


def inform(line: str) -> None:
    """Says a line, from the first process; control characters of the names in it are escaped."""
    rank_zero_info(printable(line))


def tell(folder: str | os.PathLike[str], passed_over: PassedOver) -> None:
    """Says in one line, from the first process, what a search of a folder for images passed over."""
    if str(passed_over):
        inform(f"{os.fspath(folder)}: passed over {passed_over}")


class _Resumed(NamedTuple):
    """The epoch inside which a run was resumed, the seed of its order, its parts, and the batch that came first."""

    epoch: int
    seed: int
    parts: list[Part]
    first_batch: int


def _begin_worker(max_image_pixels: int, worker: int) -> None:
    """Lets only the main process end a worker: schedulers signal all, and it still needs its batches then."""
    limit_pixels(max_image_pixels)
    if hasattr(signal, "SIGUSR1"):  # not on Windows
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS and Windows, where no scheduler is to be expected either
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_leave_when_told, args=(os.getppid(),), daemon=True).start()
    if os.environ.get("PL_SEED_WORKERS") == "1":  # what Lightning would have put in this place
        pl_worker_init_function(worker)


def _leave_when_told(main_process: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main_process:
        pass
    os._exit(0)


def _is_state(state: dict[str, Any]) -> bool:
    parts = state.get("parts")
    if not isinstance(parts, list) or not parts or not all(isinstance(p, list) and len(p) == 3 for p in parts):
        return False
    numbers = [state.get(name) for name in ("epoch", "seed", "samples", "batches")]
    least = [(number, 0) for number in numbers] + [(n, low) for p in parts for n, low in zip(p, (1, 1, 0), strict=True)]
    return all(type(number) is int and low <= number < 2**63 for number, low in least)
