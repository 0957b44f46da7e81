"""Miniature data sets in the on-disk formats of the real ones; used as fixtures, and in subprocesses as functions."""

import hashlib
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from torchvision import datasets

CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

# the 20 superclasses of five classes, as its authors list them; the classes are numbered alphabetically
_CIFAR100 = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}
CIFAR100_NAMES = sorted(name for names in _CIFAR100.values() for name in names.split())


def _pictures(targets: np.ndarray, size: tuple[int, int], seed: int) -> np.ndarray:
    """Noise around one colour per class, uint8 (N, H, W, 3)."""
    noise = np.random.default_rng(seed).integers(-40, 41, size=(len(targets), *size, 3))
    colours = np.random.default_rng(0).integers(60, 196, size=(1000, 3))
    return (colours[targets][:, None, None] + noise).astype(np.uint8)


def _write_pickle(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=2))


def _rows(targets: np.ndarray, seed: int) -> np.ndarray:
    """CIFAR's layout of a picture: a row of 3072 bytes, all reds before all greens before all blues."""
    return _pictures(targets, (32, 32), seed).transpose(0, 3, 1, 2).reshape(len(targets), 3072)


def make_cifar10(root: str | Path, train: int = 60, test: int = 23) -> Path:
    """Write a miniature CIFAR-10 (`train` pictures over five batch files) and return `root`."""
    folder = Path(root) / "cifar-10-batches-py"
    for number, size in enumerate([*(len(part) for part in np.array_split(range(train), 5)), test]):
        name = "test_batch" if number == 5 else f"data_batch_{number + 1}"
        targets = (np.arange(size) + number) % 10
        rows = _rows(targets, seed=number)
        _write_pickle(folder / name, {"batch_label": name, "labels": targets.tolist(), "data": rows})
    _write_pickle(folder / "batches.meta", {"label_names": CIFAR10_NAMES, "num_vis": 3072})
    return Path(root)


def make_cifar100(root: str | Path, train: int = 200, test: int = 101) -> Path:
    """Write a miniature CIFAR-100 and return `root`."""
    folder = Path(root) / "cifar-100-python"
    for name, size in (("train", train), ("test", test)):
        targets = np.arange(size) % 100
        content = {"fine_labels": targets.tolist(), "coarse_labels": (targets // 5).tolist()}
        _write_pickle(folder / name, {**content, "data": _rows(targets, seed=size)})
    _write_pickle(folder / "meta", {"fine_label_names": CIFAR100_NAMES, "coarse_label_names": list(_CIFAR100)})
    return Path(root)


def cifar_checksums(source: type[datasets.CIFAR10], root: str | Path) -> dict[str, Any]:
    """Class attributes that make torchvision's class accept the miniature files below `root`."""

    def md5(name: str) -> str:
        return hashlib.md5((Path(root) / source.base_folder / name).read_bytes()).hexdigest()

    return {
        "train_list": [[name, md5(name)] for name, _ in source.train_list],
        "test_list": [[name, md5(name)] for name, _ in source.test_list],
        "meta": {**source.meta, "md5": md5(source.meta["filename"])},
    }


def patch_cifar(root: str | Path) -> None:
    """Let torchvision accept the miniatures below `root`; for subprocesses, where no fixture reaches."""
    for source in (datasets.CIFAR10, datasets.CIFAR100):
        if (Path(root) / source.base_folder).is_dir():
            for attribute, value in cifar_checksums(source, root).items():
                setattr(source, attribute, value)


def make_class_folders(
    root: str | Path,
    classes: Sequence[str] = ("cat", "dog", "owl"),
    train: int = 4,
    val: int = 3,
    size: tuple[int, int] = (48, 40),
) -> Path:
    """Write ``root/{train,val}/CLASS/*`` with JPEGs, every third a PNG, and return `root`."""
    for split, count in (("train", train), ("val", val)):
        for index, name in enumerate(classes):
            folder = Path(root) / split / name
            folder.mkdir(parents=True)
            pixels = _pictures(np.full(count, index), size, seed=index)
            for number in range(count):
                extension = "png" if number % 3 == 2 else "JPEG"
                PIL.Image.fromarray(pixels[number]).save(folder / f"{name}_{number:04}.{extension}")
    return Path(root)


def make_picture_folder(root: str | Path, count: int = 5) -> Path:
    """Write a folder of pictures such as a user may have: formats, modes, sizes and subfolders mixed."""
    folder = Path(root)
    (folder / "more").mkdir(parents=True)
    for number in range(count):
        size = (30 + 7 * number, 50 - 3 * number)
        picture = PIL.Image.fromarray(_pictures(np.array([number]), size, seed=number)[0])
        name = ("a.jpg", "more/b.PNG", "c.webp", "d grey.jpeg", "more/e.gif")[number % 5]
        mode = ("RGB", "RGBA", "RGB", "L", "P")[number % 5]
        path = folder / name
        path = path.with_name(f"{path.stem}{number // 5 or ''}{path.suffix}")
        picture.convert(mode).save(path)
    (folder / "notes.txt").write_text("no picture")
    return folder
