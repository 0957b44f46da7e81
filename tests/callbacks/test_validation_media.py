"""ClassificationMedia and DetectionMedia through real trainers: what they choose to show, and when."""

import json
import math
import re
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CIFAR10
from torchvision.ops import box_iou

import miniature
from awconv.callbacks import ClassificationMedia, DetectionMedia, validation_media
from awconv.callbacks.canvas import spread_rank
from awconv.callbacks.validation_media import _pictures, count_mistakes
from awconv.data import CIFAR10DataModule, COCODataModule, DigitsDataModule
from awconv.data.loading import EvaluationSet
from awconv.errors import InputError
from awconv.metrics import BoxMeanAveragePrecision

K, SIDE = 4, 6
NAMES = ["cat", "dog", "owl", "cow"]


class Classifier(pl.LightningModule):
    """The contract of a classification task; an image holds its own logits in its first pixels."""

    def __init__(self, class_names=NAMES, **broken):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.broken = broken
        if class_names is not None:
            self.class_names = class_names

    def training_step(self, batch):
        return self.weight**2

    def validation_step(self, batch):
        return {"logits": batch[0].flatten(1)[:, :K].float()} | self.broken

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Listed(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def some_pictures(n=37, channels=1, ignored=()):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(n, channels, SIDE, SIDE, generator=generator) * 2
    targets = torch.randint(0, K, (n,), generator=generator)
    targets[list(ignored)] = -100
    return Listed([(image, int(target)) for image, target in zip(images, targets, strict=True)])


def losses_of(data):
    logits = torch.stack([image.flatten()[:K] for image, _ in data.items])
    targets = torch.tensor([target for _, target in data.items])
    losses = torch.nn.functional.cross_entropy(logits, targets.clamp(min=0), reduction="none")
    return logits, targets, losses.where(targets >= 0, torch.tensor(-math.inf))


@pytest.fixture
def drawn(monkeypatch):
    """What is handed to those who draw, by the name of the function, one entry a drawing."""
    calls = {}

    def record(name):
        def draw(*args, **kwargs):
            calls.setdefault(name, []).append((args, kwargs))
            return Figure(figsize=(1, 1))

        monkeypatch.setattr(validation_media, name, draw)

    for name in ("draw_prediction_sheet", "draw_confusion_matrix", "draw_detection_sheet", "draw_precision_recall"):
        record(name)
    return calls


def fit(tmp_path, module, validation, callback, command="fit", **options):
    options = {"max_epochs": 1, "num_sanity_val_steps": 2, "logger": False} | options
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[callback],
        **options,
    )
    if command == "fit":
        trainer.fit(module, DataLoader(Listed([0.0] * 4), 2), validation)
    else:
        trainer.validate(module, validation, verbose=False)
    return trainer


# ---- classification --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 5, 37])
def test_the_worst_a_fixed_sample_and_the_counts(tmp_path, drawn, batch_size):
    data = some_pictures(ignored=(3, 30))
    fit(tmp_path, Classifier(), DataLoader(data, batch_size), ClassificationMedia(max_pictures=4), max_epochs=2)
    logits, targets, losses = losses_of(data)
    for (parts, names), _ in drawn["draw_prediction_sheet"]:
        fixed, worst = parts.values()
        assert names == NAMES
        order = losses.argsort(descending=True)[:4].tolist()
        assert [shown.loss for shown in worst] == pytest.approx(losses[order].tolist())
        assert [shown.target for shown in worst] == targets[order].tolist()
        assert [shown.predicted for shown in worst] == logits[order].argmax(1).tolist()
        probabilities = logits.softmax(1)
        assert [shown.probability for shown in worst] == pytest.approx(probabilities[order].amax(1).tolist())
        assert [shown.of_target for shown in worst] == pytest.approx(probabilities[order, targets[order]].tolist())
        sample = sorted(sorted(range(37), key=spread_rank)[:4])
        assert [shown.loss for shown in fixed] == pytest.approx([losses[k].item() for k in sample if targets[k] >= 0])
    first, second = (call[0][0]["A fixed sample"] for call in drawn["draw_prediction_sheet"])
    assert [np.asarray(s.picture).tolist() for s in first] == [np.asarray(s.picture).tolist() for s in second]
    for (confusion, names), options in drawn["draw_confusion_matrix"]:
        expected = np.zeros((K, K), dtype=int)
        for row, target in zip(logits, targets.tolist(), strict=True):
            if target >= 0:
                expected[target, int(row.argmax())] += 1
        assert confusion.tolist() == expected.tolist()
        assert (names, options) == (NAMES, {"of": "validation images"})
    assert {path.name for path in (tmp_path / "media").iterdir()} == {"val_pictures.png", "val_confusion_matrix.png"}


@pytest.mark.parametrize(
    "options",
    [
        {"fast_dev_run": True},
        {"limit_val_batches": 0},
        {"max_epochs": 0},
        {"command": "validate"},
        {"barebones": True, "log_every_n_steps": 0, "num_sanity_val_steps": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("callback", [ClassificationMedia, DetectionMedia])
def test_when_nothing_is_drawn(tmp_path, drawn, options, callback):
    module, data = (Classifier(), DataLoader(some_pictures(), 5))
    if callback is DetectionMedia:
        module, data = Detector(evaluated()[1]), scene_batches(evaluated()[0])
    fit(tmp_path, module, data, callback(), **options)
    assert not drawn
    assert not (tmp_path / "media").exists()


@pytest.mark.parametrize(("every", "drawings"), [(0, 0), (1, 5), (2, 2), (5, 1), (6, 0)])
def test_every_n_epochs(tmp_path, drawn, every, drawings):
    callback = ClassificationMedia(every_n_epochs=every)
    fit(tmp_path, Classifier(), DataLoader(some_pictures(), 5), callback, max_epochs=5)
    assert len(drawn.get("draw_prediction_sheet", [])) == drawings
    assert callback._worst is None, "nothing stays behind"


def test_an_epoch_that_is_not_drawn_keeps_nothing(tmp_path, drawn, monkeypatch):
    monkeypatch.setattr(validation_media, "_judge", pytest.fail)
    fit(tmp_path, Classifier(), DataLoader(some_pictures(), 5), ClassificationMedia(every_n_epochs=2), max_epochs=1)
    assert not drawn


def test_a_loss_that_is_no_number_comes_first(tmp_path, drawn):
    data = some_pictures()
    data.items[11] = (torch.full((1, SIDE, SIDE), math.nan), 1)
    fit(tmp_path, Classifier(), DataLoader(data, 5), ClassificationMedia(max_pictures=3))
    ((parts, _), _) = drawn["draw_prediction_sheet"][0]
    assert [math.isnan(shown.loss) for shown in parts["Highest loss"]] == [True, False, False]


@pytest.mark.parametrize(
    ("module", "data"),
    [
        (Classifier(logits=None), some_pictures()),
        (Classifier(logits=torch.zeros(5)), some_pictures()),
        (Classifier(logits=torch.zeros(1, K)), some_pictures()),
        (Classifier(), Listed([(torch.zeros(1, SIDE, SIDE), torch.zeros(K)) for _ in range(10)])),
        (Classifier(), Listed([(torch.zeros(SIDE), 1) for _ in range(10)])),
        (Classifier(), Listed([(torch.zeros(1, SIDE, SIDE), -100) for _ in range(10)])),
    ],
    ids=["no logits", "one axis", "another number", "soft targets", "no pictures", "no targets"],
)
def test_what_is_no_classification_is_left_alone(tmp_path, drawn, module, data):
    fit(tmp_path, module, DataLoader(data, 5), ClassificationMedia())
    assert not drawn


@pytest.mark.parametrize("output", [None, torch.zeros(()), {"loss": torch.zeros(())}], ids=str)
@pytest.mark.parametrize("callback", [ClassificationMedia, DetectionMedia])
def test_modules_of_a_fork(tmp_path, drawn, output, callback):
    module = Classifier(class_names=None)
    module.validation_step = lambda batch: output
    fit(tmp_path, module, DataLoader(some_pictures(), 5), callback())
    assert not drawn


def test_classes_without_names_are_numbered(tmp_path, drawn):
    fit(tmp_path, Classifier(class_names=None), DataLoader(some_pictures(), 5), ClassificationMedia())
    assert drawn["draw_confusion_matrix"][0][0][1] == ["0", "1", "2", "3"]


def test_of_several_loaders_the_first_counts(tmp_path, drawn):
    class Two(Classifier):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            return super().validation_step(batch)

    loaders = [DataLoader(some_pictures(7), 5), DataLoader(some_pictures(30), 5)]
    fit(tmp_path, Two(), loaders, ClassificationMedia())
    assert drawn["draw_confusion_matrix"][0][0][0].sum() == 7


# ---- the pictures ----------------------------------------------------------------------------------------------------


def test_digits_look_as_they_did(tmp_path):
    from sklearn.datasets import load_digits

    data = DigitsDataModule(image_size=8, batch_size=32)
    data.setup("validate")
    images = next(iter(data.val_dataloader()))[0]
    pictures = np.stack([np.asarray(picture) for picture in _pictures(images, data)])
    assert pictures.dtype == np.uint8
    assert pictures.shape == (32, 8, 8)
    originals = (load_digits().images * (255 / 16)).round().astype(np.uint8)
    assert all((originals == picture).all(axis=(1, 2)).any() for picture in pictures)


def test_colours_are_brought_back(cifar10_root):
    data = CIFAR10DataModule(root=str(cifar10_root), batch_size=8, num_workers=0)
    data.setup("test")
    normalised = next(iter(data.test_dataloader()))[0]
    originals = CIFAR10(cifar10_root, train=False).data
    for picture, pixels in zip(_pictures(normalised, data), originals, strict=False):
        assert picture.mode == "RGB"
        assert (np.asarray(picture) == pixels).all()


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "L"), (3, "RGB"), (5, "RGB")])
def test_pictures_of_unknown_normalisation_are_stretched(channels, mode):
    images = torch.randn(3, channels, 9, 7) * 100
    for picture, image in zip(_pictures(images, None), images, strict=True):
        assert picture.mode == mode
        assert picture.size == (7, 9)
        shown = np.asarray(picture).astype(float)
        first = (image - image.min()) / (image.max() - image.min()) * 255
        assert np.abs(shown.reshape(9, 7, -1)[..., 0] - first[0].numpy()).max() <= 1


def test_bytes_stay_as_they_are_and_large_pictures_become_smaller():
    images = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8)
    (picture, _) = _pictures(images, SimpleNamespace(mean=(0.5,) * 3, std=(0.2,) * 3))
    assert (np.asarray(picture) == images[0].permute(1, 2, 0).numpy()).all()
    assert _pictures(torch.zeros(1, 3, 1400, 700), None)[0].size == (320, 640)
    assert _pictures(torch.full((1, 1, 4, 4), math.nan), None)[0].size == (4, 4)


# ---- detection -------------------------------------------------------------------------------------------------------


class Detector(pl.LightningModule):
    """The contract of a detection task, without a network."""

    class_names, category_ids = NAMES, [2, 3, 5, 7]

    def __init__(self, detections, metric=True):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.detections = detections
        if metric:
            self.val_map = BoxMeanAveragePrecision()

    def training_step(self, batch):
        return self.weight**2

    def on_validation_epoch_start(self):
        if hasattr(self, "val_map"):
            self.val_map.reset()

    def validation_step(self, batch):
        targets = batch[1]
        detections = [self.detections[int(target["image_id"])] for target in targets]
        if hasattr(self, "val_map"):
            self.val_map.update(detections, targets)
        return {"detections": detections}

    def on_validation_epoch_end(self):
        if hasattr(self, "val_map"):
            self.val_map.compute()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def boxes(generator, n, side=60):
    corner = torch.rand(n, 2, generator=generator) * side * 0.6
    return torch.cat([corner, corner + 5 + torch.rand(n, 2, generator=generator) * side * 0.3], dim=1)


def evaluated(n=21):
    generator = torch.Generator().manual_seed(2)
    samples, detections = [], {}
    for k in range(n):
        truth = {"boxes": boxes(generator, k % 5), "labels": torch.randint(1, K + 1, (k % 5,), generator=generator)}
        more = boxes(generator, k % 3)
        detections[7 * k] = {
            "boxes": torch.cat([truth["boxes"] + 0.5, more]),
            "labels": torch.cat([truth["labels"], torch.randint(1, K + 1, (len(more),), generator=generator)]),
            "scores": torch.rand(k % 5 + k % 3, generator=generator),
        }
        image = torch.randint(0, 256, (3, 60, 70 + k), dtype=torch.uint8, generator=generator)
        samples.append((image, {"image_id": torch.tensor(7 * k), **truth}))
    return samples, detections


def scene_batches(samples, size=4):
    return DataLoader(Listed(samples), size, collate_fn=lambda pairs: tuple(map(list, zip(*pairs, strict=True))))


@pytest.mark.parametrize("batch_size", [1, 4, 21])
def test_the_most_mistakes_and_a_fixed_sample(tmp_path, drawn, batch_size):
    samples, detections = evaluated()
    padded = EvaluationSet(Listed(samples))
    again = [padded[len(samples)], *samples, padded[len(samples) + 1]]  # an image that comes three times
    module = Detector(detections)
    fit(tmp_path, module, scene_batches(again, batch_size), DetectionMedia(max_pictures=5), max_epochs=2)
    wrong = {
        k: count_mistakes(detections[k], target, 0.5) for k, target in ((int(t["image_id"]), t) for _, t in samples)
    }
    sheets = drawn["draw_detection_sheet"]
    assert len(sheets) == 4
    for (fixed, names, title), options in sheets[::2]:
        ids = sorted(sorted(wrong, key=spread_rank)[:5])
        assert [entry.caption.split(",")[0] for entry in fixed] == [f"image {k}" for k in ids]
        assert (names, title, options) == (NAMES, "5 validation pictures, always the same", {"min_score": 0.5})
        by_id = {int(target["image_id"]): (image, target) for image, target in samples}
        for entry, k in zip(fixed, ids, strict=True):
            assert (np.asarray(entry.picture) == by_id[k][0].permute(1, 2, 0).numpy()).all()
            assert entry.size == entry.picture.size
            assert torch.equal(entry.target["boxes"], by_id[k][1]["boxes"])
            assert torch.equal(entry.detections["boxes"], detections[k]["boxes"])
    for (worst, _, title), _ in sheets[1::2]:
        order = sorted(wrong, key=lambda k: (-wrong[k], k))[:5]
        assert [entry.caption for entry in worst] == [f"image {k}, {wrong[k]} mistakes" for k in order]
        assert title == "5 validation pictures with the most mistakes"
    assert len(drawn["draw_precision_recall"]) == 2
    assert {path.name for path in (tmp_path / "media").iterdir()} == {
        "val_pictures.png", "val_worst_pictures.png", "val_precision_recall.png",
    }  # fmt: skip


def test_images_are_called_as_in_the_annotation_file(tmp_path, drawn):
    root = miniature.make_coco(tmp_path / "coco", train=2, val=5, test=1)
    path = root / "annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    for entry in content["images"]:
        entry["id"] = f"n{entry['id']}"
    for entry in content["annotations"]:
        entry["image_id"] = f"n{entry['image_id']}"
    path.write_text(json.dumps(content))
    data = COCODataModule(str(root), num_workers=0)
    data.setup("validate")
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
    fit(tmp_path, Detector(dict.fromkeys(range(5), nothing), metric=False), data.val_dataloader(), DetectionMedia())
    names = {entry["id"] for entry in content["images"]}
    for (shown, *_), _ in drawn["draw_detection_sheet"]:
        assert {re.split(r"[ ,]+", entry.caption)[1] for entry in shown} == names
    assert len(drawn["draw_detection_sheet"]) == 2


def test_detections_without_a_metric_or_names(tmp_path, drawn):
    samples, detections = evaluated()

    class Nameless(Detector):
        class_names = category_ids = None

    fit(tmp_path, Nameless(detections, metric=False), scene_batches(samples), DetectionMedia())
    assert "draw_precision_recall" not in drawn
    assert drawn["draw_detection_sheet"][0][0][1] == ["1", "2", "3", "4"]


@pytest.mark.parametrize(
    "output",
    [
        {"detections": "something of its own"},
        {"detections": [1, 2]},
        {"detections": []},
        {"detections": [{"boxes": torch.zeros(0, 4)}] * 2},
    ],
    ids=str,
)
def test_detections_of_another_kind_are_left_alone(tmp_path, drawn, output):
    samples, _ = evaluated(2)
    module = Detector({}, metric=False)
    module.validation_step = lambda batch: output
    fit(tmp_path, module, scene_batches(samples), DetectionMedia())
    assert not drawn


def test_pictures_without_any_object(tmp_path, drawn):
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    samples = [(torch.zeros(3, 20, 20), {"image_id": k, **empty}) for k in range(3)]
    found = {**empty, "scores": torch.zeros(0)}
    fit(tmp_path, Detector(dict.fromkeys(range(3), found)), scene_batches(samples), DetectionMedia())
    assert "draw_precision_recall" not in drawn
    assert [len(call[0][0]) for call in drawn["draw_detection_sheet"]] == [3, 3]


def detected(*rows):
    rows = torch.tensor(rows).view(-1, 6)
    return {"boxes": rows[:, :4], "scores": rows[:, 4], "labels": rows[:, 5].long()}


def truth(*rows):
    rows = torch.tensor(rows).view(-1, 6)
    return {"boxes": rows[:, :4], "labels": rows[:, 4].long(), "iscrowd": rows[:, 5].long()}


@pytest.mark.parametrize(
    ("found", "objects", "mistakes"),
    [
        (detected(), truth(), 0),
        (detected(), truth([0.0, 0, 10, 10, 1, 0]), 1),
        (detected([0.0, 0, 10, 10, 0.9, 1]), truth(), 1),
        (detected([0.0, 0, 10, 10, 0.9, 1]), truth([0.0, 0, 10, 9, 1, 0]), 0),
        (detected([0.0, 0, 10, 10, 0.4, 1]), truth([0.0, 0, 10, 9, 1, 0]), 1),
        (detected([0.0, 0, 10, 10, 0.9, 2]), truth([0.0, 0, 10, 9, 1, 0]), 2),
        (detected([0.0, 0, 10, 10, 0.9, 1], [0.0, 0, 10, 9, 0.8, 1]), truth([0.0, 0, 10, 9, 1, 0]), 1),
        (detected([0.0, 0, 10, 10, 0.9, 1]), truth([0.0, 0, 10, 4, 1, 0]), 2),
        (detected([0.0, 0, 10, 10, 0.9, 1], [2.0, 2, 5, 5, 0.9, 1]), truth([0.0, 0, 40, 40, 1, 1]), 0),
        (detected([0.0, 0, 10, 10, 0.9, 2]), truth([0.0, 0, 40, 40, 1, 1]), 1),
        (detected(), truth([0.0, 0, 40, 40, 1, 1]), 0),
    ],
)
def test_mistakes(found, objects, mistakes):
    assert count_mistakes(found, objects, 0.5) == mistakes


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31))
def test_mistakes_by_a_plain_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    n, m = (int(torch.randint(0, 7, (), generator=generator)) for _ in range(2))
    target = {"boxes": boxes(generator, m), "labels": torch.randint(1, 3, (m,), generator=generator)}
    near = target["boxes"][torch.randint(0, m, (n,), generator=generator)] if m else boxes(generator, n)
    found = {
        "boxes": near + torch.rand(n, 4, generator=generator) * 4,
        "scores": torch.rand(n, generator=generator),
        "labels": torch.randint(1, 3, (n,), generator=generator),
    }
    left, wrong = set(range(m)), 0
    for k in sorted(range(n), key=lambda k: -float(found["scores"][k])):
        if found["scores"][k] < 0.3:
            continue
        overlaps = {
            j: float(box_iou(target["boxes"][j : j + 1], found["boxes"][k : k + 1]))
            for j in left
            if target["labels"][j] == found["labels"][k]
        }
        best = max(overlaps, key=overlaps.get, default=None)
        if best is not None and overlaps[best] >= 0.5:
            left.discard(best)
        else:
            wrong += 1
    assert count_mistakes(found, target, 0.3) == wrong + len(left)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ClassificationMedia(max_pictures=0), "max_pictures=0"),
        (lambda: ClassificationMedia(every_n_epochs=-1), "every_n_epochs=-1: expected a whole number, 0 for never"),
        (lambda: DetectionMedia(min_score=1.5), "min_score=1.5"),
        (lambda: DetectionMedia(every_n_epochs=1.5), "every_n_epochs=1.5"),
    ],
)
def test_arguments_out_of_range(make, says):
    with pytest.raises(InputError, match=says):
        make()
