"""How many pictures a second the data modules deliver, beside torchvision's own pipelines.

Run it as ``python -m awconv.analysis.benchmark loader``.
"""

import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from awconv.analysis.command import aligned_table
from awconv.analysis.measurement import measure_interleaved
from awconv.data import CIFAR10DataModule, ClassificationDataModule, ImageNetDataModule
from awconv.data.base import BaseDataModule, Transform
from awconv.errors import InputError

# Every worker fills so many batches in a pass, so that its start and its end weigh little.
_BATCHES_A_WORKER = 4
# The drawn pictures: about the size and the bytes of ImageNet's.
_WIDTH, _HEIGHT, _DRAWN = 500, 375, 64
_SIZE = 224
# More than caches hold (61 MB), as the 50000 are, and soon delivered.
_CIFAR_PICTURES = 20000


def benchmark_loaders(
    root: Path | None, *, device: str, batch: int, workers: int, repeats: int, deadline: float = math.inf
) -> list[dict[str, Any]]:
    """Compares training pipelines, on pictures in class folders and on CIFAR-10.

    Every pipeline crops at random, flips, normalises, batches, and brings the batches to the device. torchvision's are
    those of its reference trainings: pictures decoded and transformed by PIL, a worker process each, pinned memory on
    CUDA. What is decoded on the device is, with ``"cpu"``, decoded by the process itself. A pass delivers 4 batches for
    each worker, at least 8, from class folders, and 20000 pictures of CIFAR-10's size.

    Args:
        root: Folder that holds ``train/CLASS/*.jpg``; None draws JPEG pictures of 500x375 pixels and some 100 kB.
        device: ``"cpu"`` or ``"cuda"``: where batches are wanted.
        batch: Pictures a batch.
        workers: Worker processes of each pipeline; 0 loads in the process itself.
        repeats: Timed passes of each pipeline.
        deadline: See :func:`awconv.analysis.benchmark.measure_interleaved`; what it leaves out has no rate.

    Returns:
        One record for each pipeline: ``data``, ``pipeline``, ``pictures_per_second`` (the median; None for what
        ``deadline`` left out, and for what there is nothing to compare with), ``pictures`` (in a pass),
        ``quartiles_per_second``, ``ratio`` (to torchvision's pipeline of the same data) and ``times_ms`` of each pass.
    """
    pictures = batch * _BATCHES_A_WORKER * max(workers, 2)
    rows = []
    with _trainer(device) as trainer, _folder_of_pictures(root, pictures, batch) as folder:
        options = {"batch_size": batch, "num_workers": workers}
        cases = {
            f"JPEG to {_SIZE}x{_SIZE}": _class_folders(folder, trainer, options),
            "CIFAR-10": _cifar10(trainer, options),
        }
        delivered: list[dict[str, int]] = [{} for _ in cases]
        calls = [
            {name: _counting(_pass(loader, device), counts, name) for name, loader in loaders.items()}
            for loaders, counts in zip(cases.values(), delivered, strict=True)
        ]
        results = measure_interleaved(calls, repeats=repeats, device=device, meter_memory=False, deadline=deadline)
    for (data, loaders), counts, result in zip(cases.items(), delivered, results, strict=True):
        per_second = {name: counts[name] / measured.quartiles[1] for name, measured in result.items()}
        theirs = per_second.get(next(iter(loaders)))
        for name in loaders:
            row: dict[str, Any] = {"data": data, "pipeline": name, "pictures_per_second": None}
            rows.append(row)
            if name in result and theirs is not None:
                first, _, third = result[name].quartiles
                row |= {
                    "pictures": counts[name],
                    "pictures_per_second": per_second[name],
                    "quartiles_per_second": [counts[name] / third, counts[name] / first],
                    "ratio": per_second[name] / theirs,
                    "times_ms": [1e3 * t for t in result[name].times],
                }
    return rows


def loaders_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lays the records of :func:`benchmark_loaders` out as an aligned Markdown table."""
    body = []
    for row in rows:
        if row["pictures_per_second"] is None:
            body.append([row["data"], row["pipeline"], "not reached", ""])
            continue
        low, high = row["quartiles_per_second"]
        rate = f"{row['pictures_per_second']:,.0f} ({low:,.0f}-{high:,.0f})"
        body.append([row["data"], row["pipeline"], rate, f"{row['ratio']:.2f}"])
    return aligned_table(["data", "pipeline", "pictures/s", "ratio"], body, left=2)


def _class_folders(folder: Path, trainer: Trainer, options: Mapping[str, Any]) -> dict[str, Any]:
    ours, decoding = (
        ImageNetDataModule(str(folder), image_size=_SIZE, decode_on_device=on_device, **options)
        for on_device in (False, True)
    )
    pil = _by_pil(transforms.RandomResizedCrop(_SIZE), ours)
    theirs = datasets.ImageFolder(str(folder / "train"), pil)
    loaders = {
        "torchvision ImageFolder": _plain_loader(theirs, trainer, options),
        "ImageNetDataModule": _training_loader(ours, trainer),
    }
    with suppress(InputError):  # of a device on which torchvision decodes nothing
        loaders["ImageNetDataModule decode_on_device"] = _training_loader(decoding, trainer)
    return loaders


def _cifar10(trainer: Trainer, options: Mapping[str, Any]) -> dict[str, Any]:
    class Noise(datasets.CIFAR10):  # type: ignore[misc]
        """torchvision's class without its download."""

        def __init__(self, root: str = "", train: bool = True, transform: Transform | None = None) -> None:
            generator = np.random.default_rng(0)
            self.data = generator.integers(0, 256, (_CIFAR_PICTURES, 32, 32, 3), dtype=np.uint8)
            self.targets = generator.integers(0, 10, _CIFAR_PICTURES).tolist()
            self.classes = ours.class_names
            self.transform, self.target_transform = transform, None

    class NoiseDataModule(CIFAR10DataModule):
        _source = Noise

    ours = NoiseDataModule(val_size=0, **options)
    pil = _by_pil(transforms.RandomCrop(32, padding=4), ours)
    return {
        "torchvision CIFAR10": _plain_loader(Noise(transform=pil), trainer, options),
        "CIFAR10DataModule": _training_loader(ours, trainer),
        "CIFAR10DataModule keep_on_device": _training_loader(
            NoiseDataModule(val_size=0, keep_on_device=True, **options), trainer
        ),
    }


def _by_pil(crop: Any, ours: ClassificationDataModule) -> Any:
    normalise = transforms.Normalize(ours.mean, ours.std)
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalise])


def _plain_loader(dataset: Any, trainer: Trainer, options: Mapping[str, Any]) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        **options,
        shuffle=True,
        pin_memory=trainer.strategy.root_device.type == "cuda",
        drop_last=True,
        persistent_workers=options["num_workers"] > 0,
    )


def _training_loader(module: BaseDataModule, trainer: Trainer) -> Any:
    module.trainer = trainer  # which knows the device, of which pinned memory and resident pictures depend
    return module.train_dataloader()


def _pass(loader: Any, device: str) -> Callable[[], int]:
    """A call that draws all batches, and says how many pictures they held."""

    def call() -> int:
        pictures = 0
        for images, targets in loader:
            images.to(device, non_blocking=True)
            targets.to(device, non_blocking=True)
            pictures += len(images)
        return pictures

    return call


def _counting(call: Callable[[], int], counts: dict[str, int], name: str) -> Callable[[], None]:
    """The same call, which notes what it delivered: as much in every pass."""

    def counting() -> None:
        counts[name] = call()

    return counting


@contextmanager
def _trainer(device: str) -> Iterator[Trainer]:
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield Trainer(
            accelerator=device,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    finally:
        log.setLevel(level)


@contextmanager
def _folder_of_pictures(root: Path | None, pictures: int, batch: int) -> Iterator[Path]:
    """Class folders of so many pictures: of `root`, or of fewer if it has no more, or drawn ones."""
    with tempfile.TemporaryDirectory(prefix="awconv-pictures-") as name:
        if root is not None:
            _link_pictures(root, Path(name), pictures, batch)
            yield Path(name)
            return
        classes = [Path(name, "train", kind) for kind in ("even", "odd")]
        for folder in classes:
            folder.mkdir(parents=True)
        paths = [classes[index % 2] / f"{index:06}.jpg" for index in range(pictures)]
        generator = np.random.default_rng(0)
        for index, path in enumerate(paths):
            if index < _DRAWN:
                _draw_picture(generator).save(path, quality=96)
            else:  # another name of the same file: what is measured is not how the disk reads
                os.link(paths[index % _DRAWN], path)
        yield Path(name)


def _link_pictures(root: Path, folder: Path, pictures: int, batch: int) -> None:
    dataset: Any = ImageNetDataModule(str(root)).load("train", torch.nn.Identity())
    if len(dataset) < batch:
        raise InputError(f"--root {root}: holds {len(dataset)} pictures to train on, less than a batch")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    for number, index in enumerate(order[:pictures].tolist()):
        path = Path(dataset.path(index))
        link = folder / "train" / path.relative_to(root / "train").parts[0] / f"{number:06}{path.suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.absolute())


def _draw_picture(generator: np.random.Generator) -> Image.Image:
    """Noise of every scale, finer ones fainter, as in photographs."""
    picture = np.zeros((_HEIGHT, _WIDTH, 3))
    for step in (1, 4, 16, 64):
        coarse = generator.integers(0, 256, (-(-_HEIGHT // step), -(-_WIDTH // step), 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((_WIDTH, _HEIGHT), Image.Resampling.BICUBIC)
        picture += np.sqrt(step) * np.asarray(smooth)
    return Image.fromarray((picture / 15).astype(np.uint8))
