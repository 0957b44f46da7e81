"""Miniature data sets in the on-disk formats of the real ones; used as fixtures, and in subprocesses as functions."""

import hashlib
import json
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


# sparse ids in no order, as COCO's 80 categories have ids up to 90
COCO_CATEGORIES = {44: "bottle", 1: "person", 90: "toothbrush", 3: "car", 18: "dog"}
# width, height and file name of each picture in turn
_COCO_PICTURES = [
    (96, 64, "{:012}.jpg"),
    (60, 90, "{:012}.jpg"),
    (80, 80, "{:012}.png"),
    (72, 96, "{:012} grey.jpg"),
    (100, 56, "{:012} grey.png"),
]


def make_coco(root: str | Path, train: int = 12, val: int = 7, test: int = 3) -> Path:
    """Write a miniature COCO 2017 with its oddities and return `root`.

    Pictures are wide, tall and square, in colour and grey, JPEG and PNG; an object is a rectangle in the colour of its
    category. In ``train`` and ``val`` each, for those present: picture 1 (counted from 0) has no annotations, picture
    2 one crowd alone, as RLE, and picture 3 an object and a crowd around it; picture 4 has a box that reaches 10 pixels
    out of the picture and one of no width, and picture 5 one that reaches 0.4 pixels out. ``test`` comes with
    ``image_info_test2017.json``, which has images and categories alone.
    """
    colours = {number: np.random.default_rng(number).integers(0, 256, 3) for number in COCO_CATEGORIES}
    numbers = sorted(COCO_CATEGORIES)
    annotations_folder = Path(root) / "annotations"
    annotations_folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("val", val), ("test", test)):
        folder = Path(root) / f"{split}2017"
        folder.mkdir()
        rng = np.random.default_rng(len(split) + count)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(count):
            width, height, name = _COCO_PICTURES[index % len(_COCO_PICTURES)]
            # neither consecutive nor in the order of the file
            image_id = 581929 - 7919 * index + len(split)
            name = name.format(image_id)
            images.append({"id": image_id, "width": width, "height": height, "file_name": name, "license": 1})
            pixels = rng.integers(90, 166, size=(height, width, 3)).astype(np.uint8)
            for x, y, w, h, category, iscrowd in _coco_objects(rng, index, width, height, numbers):
                left, top = round(x), round(y)
                pixels[top : round(y + h), left : round(x + w)] = colours[category] // (2 if iscrowd else 1)
                annotation = {
                    "id": 900000 + 17 * len(annotations) + index,
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": [x, y, w, h],
                    "area": round(w * h * 0.7, 4),
                    "iscrowd": iscrowd,
                    "segmentation": [[x, y, x + w, y, x + w, y + h]],
                }
                if iscrowd:
                    runs = [height * left, height, height * (width - left - 1)]
                    annotation["segmentation"] = {"size": [height, width], "counts": runs}
                annotations.append(annotation)
            picture = PIL.Image.fromarray(pixels)
            options = {} if name.endswith("png") else {"quality": 95}
            picture.convert("L" if "grey" in name else "RGB").save(folder / name, **options)
        # the annotations of one picture do not lie together in COCO's files
        annotations = [annotations[place] for place in rng.permutation(len(annotations))]
        content: dict[str, Any] = {"info": {"year": 2017}, "licenses": [{"id": 1}], "images": images}
        content["categories"] = [
            {"id": number, "name": name, "supercategory": "thing"} for number, name in COCO_CATEGORIES.items()
        ]
        if split != "test":
            content["annotations"] = annotations
        file = f"image_info_{split}2017.json" if split == "test" else f"instances_{split}2017.json"
        (annotations_folder / file).write_text(json.dumps(content))
    return Path(root)


def _coco_objects(
    rng: np.random.Generator, index: int, width: int, height: int, numbers: list[int]
) -> list[tuple[float, float, float, float, int, int]]:
    """x, y, width, height, category and iscrowd of the objects of a picture of :func:`make_coco`."""

    def somewhere() -> tuple[float, float, float, float]:
        w, h = rng.uniform(0.25, 0.45, 2) * (width, height)
        return tuple(float(round(value, 2)) for value in (*rng.uniform(0, 1, 2) * (width - w, height - h), w, h))

    if index == 1:
        return []
    if index == 2:
        return [(5.0, 8.0, 40.0, 30.0, numbers[0], 1)]
    category = numbers[index % len(numbers)]
    objects = [(*somewhere(), category, 0)]
    if index == 3:
        objects.insert(0, (2.0, 2.0, width - 4.0, height - 4.0, category, 1))
    elif index == 4:
        objects += [(width - 20.0, 3.0, 30.0, 20.0, numbers[0], 0), (30.0, 20.0, 0.0, 12.5, numbers[1], 0)]
    elif index == 5:
        objects.append((width - 19.6, 4.25, 20.0, 24.0, numbers[2], 0))
    elif index % 2:
        objects.append((*somewhere(), numbers[(index + 2) % len(numbers)], 0))
    return objects
