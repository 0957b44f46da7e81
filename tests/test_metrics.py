"""COCO mAP: pycocotools is the oracle, to 1e-9; batches, order and processes must not change it at all."""

import contextlib
import copy
import io
import json
import logging
import pickle
import warnings
from collections.abc import Sequence
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.data import DataLoader

from awconv.errors import InputError
from awconv.metrics import BoxMeanAveragePrecision

Sample = tuple[dict[str, Any], dict[str, Any]]
STATS = ["map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_1", "mar_10", "mar_100"]
# where "small" ends and "medium" does, the numbers next to them, and where the ranges end
AREAS = [
    0,
    1023.9999,
    1024,
    1024.0001,
    np.nextafter(1024, 0),
    9216,
    np.nextafter(9216, 1e9),
    9215.9,
    9216.1,
    1e10,
    2e10,
]


def pycocotools(
    samples: list[Sample], *, results: list[dict[str, Any]] | None = None, categories: Sequence[int] | None = None
) -> tuple[dict[str, float], COCOeval]:
    """The official evaluation of samples, by way of the two JSON files it wants; -1s are left out."""
    labels = categories or {int(c) for pred, target in samples for c in (*pred["labels"], *target["labels"])}
    dataset: dict[str, Any] = {"info": {}, "images": [], "annotations": [], "categories": [{"id": c} for c in labels]}
    detections = []
    for pred, target in samples:
        image_id = int(target["image_id"])
        dataset["images"].append({"id": image_id})
        area = target.get("area")
        crowd = target.get("iscrowd")
        for i, ((x1, y1, x2, y2), label) in enumerate(
            zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True)
        ):
            dataset["annotations"].append(
                {
                    "id": len(dataset["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": label,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1) if area is None else area[i].item(),
                    "iscrowd": 0 if crowd is None else int(crowd[i]),
                }
            )
        for (x1, y1, x2, y2), label, score in zip(
            pred["boxes"].tolist(), pred["labels"].tolist(), pred["scores"].tolist(), strict=True
        ):
            box = [x1, y1, x2 - x1, y2 - y1]
            detections.append({"image_id": image_id, "category_id": label, "bbox": box, "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = dataset
        truth.createIndex()
        if detections := detections if results is None else results:
            found = truth.loadRes(detections)
        else:  # loadRes takes no empty list
            found = COCO()
            found.dataset = {**dataset, "annotations": []}
            found.createIndex()
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: value for name, value in zip(STATS, evaluation.stats, strict=False) if value > -1}, evaluation


def make_scene(
    seed: int,
    *,
    images: int = 5,
    classes: int = 2,
    grid: int | None = None,
    score_levels: int | None = 20,
    crowds: float = 0.3,
    areas: str = "edges",
    many: bool = False,
    ids: Sequence[int] = range(10),
    dtype: torch.dtype = torch.float32,
) -> list[Sample]:
    """Images with detections near their ground truth, and all the oddities that real ones have."""
    rng = np.random.default_rng(seed)

    def snap(boxes: np.ndarray) -> np.ndarray:
        return boxes if grid is None else np.round(boxes / grid) * grid

    samples = []
    for image_id in ids[:images]:
        kind = rng.choice(["both", "both", "both", "empty", "only predictions", "only ground truth"])
        m = int(rng.integers(1, 7)) if kind in ("both", "only ground truth") else 0
        side = rng.choice([8.0, 32.0, 60.0, 96.0, 150.0], (m, 2))
        side[:, 1] = np.where(rng.random(m) < 0.5, side[:, 0], side[:, 1])  # squares of 32 and 96 pixels among them
        corner = snap(rng.uniform(0, 200, (m, 2)))
        truth = np.concatenate([corner, corner + side], axis=1)
        d = int(rng.integers(0, 12)) if kind in ("both", "only predictions") else 0
        if d and many:
            d = int(rng.integers(90, 230))
        if m:
            boxes = truth[rng.integers(m, size=d)] + rng.normal(0, 8, (d, 4)) * rng.choice([0, 0.2, 1, 3], (d, 1))
        else:
            boxes = rng.uniform(0, 200, (d, 4))
        boxes = snap(boxes)
        boxes = np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], axis=1)
        scores = rng.random(d) if score_levels is None else rng.integers(0, score_levels, d) / score_levels
        target = {
            "boxes": torch.tensor(truth, dtype=dtype),
            "labels": torch.tensor(rng.integers(1, classes + 1, m)),
            "image_id": int(image_id) if rng.random() < 0.5 else torch.tensor(int(image_id)),
        }
        if crowds:
            target["iscrowd"] = torch.tensor((rng.random(m) < crowds).astype(np.int64))
        if areas == "edges":
            target["area"] = torch.tensor(rng.choice(AREAS, m), dtype=dtype)
        elif areas == "masks":
            target["area"] = torch.tensor(side.prod(1) * rng.uniform(0.3, 1, m), dtype=dtype)
        pred = {
            "boxes": torch.tensor(boxes, dtype=dtype),
            "scores": torch.tensor(scores, dtype=dtype),
            "labels": torch.tensor(rng.integers(1, classes + 2, d)),  # one class never has ground truth
        }
        samples.append((pred, target))
    return samples


scenes = st.builds(
    make_scene,
    st.integers(0, 2**32 - 1),
    images=st.integers(1, 6),
    classes=st.sampled_from([1, 2, 5]),
    grid=st.sampled_from([None, 1, 8]),  # coarse coordinates bring IoUs that lie on the thresholds
    score_levels=st.sampled_from([1, 3, 20, None]),
    crowds=st.sampled_from([0.0, 0.3, 1.0]),
    areas=st.sampled_from(["absent", "edges", "masks"]),
    many=st.booleans(),
    ids=st.sampled_from([range(10), (-7, 3, -(2**40), 2**53 + 1, 0, 5), (9, 8, 7, 6, 5, 4)]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)


def updated(samples: Sequence[Sample], batch_size: int = 2, **options: Any) -> BoxMeanAveragePrecision:
    metric = BoxMeanAveragePrecision(**options)
    for start in range(0, len(samples), batch_size):
        preds, targets = zip(*samples[start : start + batch_size], strict=True)
        metric.update(preds, targets)
    return metric


def floats(values: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in values.items()}


def image(
    image_id: int, found: list[list[float]], truth: list[list[float]], *, label: int = 1, **target: list[Any]
) -> Sample:
    """One image of one class; a detection is x1, y1, x2, y2, score."""
    detections, boxes = torch.tensor(found).reshape(-1, 5), torch.tensor(truth).reshape(-1, 4)
    pred = {"boxes": detections[:, :4], "scores": detections[:, 4], "labels": torch.full((len(found),), label)}
    extra = {key: torch.tensor(value) for key, value in target.items()}
    return pred, {"boxes": boxes, "labels": torch.full((len(truth),), label), "image_id": image_id, **extra}


# ---- the official numbers -----------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(scenes)
def test_equals_pycocotools(samples):
    expected, official = pycocotools(samples)
    metric = updated(samples)
    assert floats(metric.compute()) == pytest.approx(expected, abs=1e-9)

    # the curves too, class by class; -1 is pycocotools' mark of a class without ground truth
    curves = official.eval["precision"][:, :, :, 0, 2]
    with_truth = [k for k in range(curves.shape[2]) if (curves[:, :, k] > -1).any()]
    assert metric.classes == [official.params.catIds[k] for k in with_truth]
    np.testing.assert_allclose(metric.precision, curves[:, :, with_truth], rtol=0, atol=1e-9)
    np.testing.assert_array_equal(metric.iou_thresholds, official.params.iouThrs)
    np.testing.assert_array_equal(metric.recall_thresholds, official.params.recThrs)


@settings(max_examples=25, deadline=None)
@given(scenes)
def test_each_class_equals_pycocotools_on_that_class_alone(samples):
    metric = updated(samples, class_metrics=True)
    values = floats(metric.compute())
    for label in metric.classes:
        alone = []
        for pred, target in samples:
            of_class, truths = pred["labels"] == label, target["labels"] == label
            alone.append(
                (
                    {key: value[of_class] for key, value in pred.items()},
                    {key: value if key == "image_id" else value[truths] for key, value in target.items()},
                )
            )
        expected, _ = pycocotools(alone)
        assert metric.per_class[label] == pytest.approx(expected, abs=1e-9)
        assert values[f"map/{label}"] == metric.per_class[label]["map"]
    assert {name for name in values if "/" in name} == {f"map/{label}" for label in metric.classes}


def test_average_precision_by_hand():
    """Right, wrong, right: precision 1 up to recall 0.5 (51 of the 101 thresholds), and 2/3 from there to 1."""
    samples = [
        image(
            1,
            [[0, 0, 10, 10, 0.9], [50, 50, 60, 60, 0.8], [20, 20, 30, 30, 0.7]],
            [[0, 0, 10, 10], [20, 20, 30, 30]],
        )
    ]
    ap = (51 + 50 * 2 / 3) / 101
    assert floats(updated(samples).compute()) == pytest.approx(
        {"map": ap, "map_50": ap, "map_75": ap, "map_small": ap, "mar_1": 0.5, "mar_10": 1, "mar_100": 1}, abs=1e-12
    )


def test_a_loose_box_counts_at_the_thresholds_below_its_iou():
    """62 of 100 pixels: right at 0.50, 0.55 and 0.60, wrong at the other seven."""
    values = floats(updated([image(1, [[0, 0, 10, 6.2, 0.9]], [[0, 0, 10, 10]])]).compute())
    assert values == pytest.approx(
        {"map": 0.3, "map_50": 1, "map_75": 0, "map_small": 0.3, "mar_1": 0.3, "mar_10": 0.3, "mar_100": 0.3}
    )


@pytest.mark.parametrize(("rank", "precision"), [(100, 1 / 100), (101, 0.0)])
def test_only_the_hundred_best_of_an_image_and_class_count(rank, precision):
    wrong = [[200, 200, 210, 210, 0.9 - i / 1000] for i in range(rank - 1)]
    values = floats(updated([image(1, [[0, 0, 10, 10, 0.1], *wrong], [[0, 0, 10, 10]])]).compute())
    assert values["map"] == pytest.approx(precision)
    assert values["mar_100"] == (rank <= 100)


def test_a_detection_in_a_crowd_is_neither_right_nor_wrong():
    found = [[52, 52, 58, 58, 0.9], [54, 54, 60, 60, 0.8], [0, 0, 10, 10, 0.7]]
    truth = [[0, 0, 10, 10], [50, 50, 90, 90]]
    assert floats(updated([image(1, found, truth, iscrowd=[0, 1])]).compute())["map"] == pytest.approx(1)
    assert floats(updated([image(1, found, truth, iscrowd=[False, False])]).compute())["map"] < 0.5


def test_the_area_given_decides_the_size():
    """A mask of 1000 pixels is small, whatever its box; 32² exactly belongs to both sides, as in pycocotools."""
    box = [[0, 0, 100, 100]]
    found = [[*box[0], 0.9]]

    def sizes(**target: list[float]) -> set[str]:
        names = updated([image(1, found, box, **target)]).compute().keys()
        return names & {"map_small", "map_medium", "map_large"}

    assert sizes() == {"map_large"}
    assert sizes(area=[1000.0]) == {"map_small"}
    assert sizes(area=[1024.0]) == {"map_small", "map_medium"}
    assert sizes(area=[9216.0]) == {"map_medium", "map_large"}


def test_ids_and_labels_as_large_as_they_come():
    """A double cannot tell 2^62 from 2^62 + 1."""
    box, elsewhere = [0, 0, 10, 10], [50, 50, 60, 60]
    samples = [
        image(2**62, [[*box, 0.9]], [box], label=2**62),
        image(2**62 + 1, [[*elsewhere, 0.8], [*box, 0.7]], [box], label=2**62 + 1),
        image(-(2**62), [], [box], label=-(2**62)),
    ]
    metric = updated(samples)
    expected, _ = pycocotools(samples)
    assert floats(metric.compute()) == pytest.approx(expected, abs=1e-9)
    assert metric.classes == [-(2**62), 2**62, 2**62 + 1]
    assert [metric.per_class[label]["map"] for label in metric.classes] == pytest.approx([0, 1, 0.5])


# ---- what must not matter -----------------------------------------------------------------------------------------


class Processes:
    """Stands for torch.distributed among metrics of one process; test_ddp_metrics.py has real ones."""

    def __init__(self, metrics: list[BoxMeanAveragePrecision]) -> None:
        self.metrics = metrics
        self.rank = 0
        self.sent: list[Any] = []

    def compute(self) -> list[dict[str, float]]:
        values = []
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            patch.setattr("awconv.metrics.dist", self)
            warnings.filterwarnings("ignore", ".*was called before the ``update`` method")
            for rank, metric in enumerate(self.metrics):
                self.rank = rank
                values.append(floats(metric.compute()))
        return values

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def get_world_size(self) -> int:
        return len(self.metrics)

    def get_rank(self) -> int:
        return self.rank

    def gather_object(self, mine: Any, gathered: list[Any] | None, dst: int) -> None:
        assert (gathered is None) == (self.rank != dst)
        if gathered is not None:
            gathered[:] = [pickle.loads(pickle.dumps(metric.images)) for metric in self.metrics]

    def broadcast_object_list(self, outcome: list[Any], src: int) -> None:
        if self.rank == src:
            self.sent = list(outcome)
        outcome[:] = self.sent


@settings(max_examples=40, deadline=None)
@given(scenes, st.data())
def test_neither_batches_nor_order_nor_processes_change_a_digit(samples, data):
    """Ties included, and with the images that a sampler repeats to fill up the last batch."""
    expected = floats(updated(samples, batch_size=len(samples)).compute())
    shuffled = data.draw(st.permutations(samples))
    assert floats(updated(shuffled, batch_size=data.draw(st.integers(1, 4))).compute()) == expected

    world = data.draw(st.integers(1, 3))
    owner = data.draw(st.lists(st.integers(0, world - 1), min_size=len(samples), max_size=len(samples)))
    parts = [[sample for sample, rank in zip(shuffled, owner, strict=True) if rank == r] for r in range(world)]
    for part in parts:
        part.extend(data.draw(st.lists(st.sampled_from(samples), max_size=2)))
    metrics = [updated(part) for part in parts]
    assert Processes(metrics).compute() == [expected] * world
    alone = updated(samples)
    alone.compute()
    assert metrics[0].results() == alone.results()
    assert all(metric.results() is None and metric.precision is None for metric in metrics[1:])


def test_of_an_image_that_comes_twice_the_first_counts():
    right, wrong = ([[0, 0, 10, 10, 0.9]], [[0, 0, 10, 10]]), ([[30, 30, 40, 40, 0.9]], [[0, 0, 10, 10]])
    assert floats(updated([image(3, *right), image(3, *wrong)]).compute())["map"] == 1
    assert floats(updated([image(3, *wrong), image(3, *right)]).compute())["map"] == 0


def test_a_failure_on_process_0_reaches_all(monkeypatch):
    """The others must not wait for values that never come."""
    metrics = [updated(make_scene(rank)) for rank in range(2)]
    processes = Processes(metrics)
    monkeypatch.setattr("awconv.metrics.dist", processes)
    monkeypatch.setattr("awconv.metrics.COCOeval_faster", None)
    with pytest.raises(TypeError):
        metrics[0].compute()
    processes.rank = 1
    with pytest.raises(RuntimeError, match="process 0 could not compute mAP: TypeError"):
        metrics[1].compute()


# ---- what else it hands out ---------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(scenes, st.randoms(use_true_random=False))
def test_results_are_what_pycocotools_takes(samples, random):
    """Its own loadRes reads them from JSON, and finds the same AP."""
    labels = 6
    category_ids = random.sample(range(1, 91), labels)
    metric = updated(samples)
    values = floats(metric.compute())
    results = json.loads(json.dumps(metric.results(category_ids)))
    assert len(results) == sum(len(pred["scores"]) for pred, _ in samples)
    assert [r["image_id"] for r in results] == sorted(r["image_id"] for r in results)
    renamed = [
        (pred, {**target, "labels": torch.tensor([category_ids[c - 1] for c in target["labels"]], dtype=torch.long)})
        for pred, target in samples
    ]
    official, _ = pycocotools(renamed, results=results, categories=category_ids)
    assert official == pytest.approx(values, abs=1e-9)


def test_without_ground_truth_there_are_results_but_no_scores():
    metric = updated([image(7, [[1, 2, 4, 8, 0.25], [0, 0, 1, 1, 0.5]], []), image(4, [], [])], class_metrics=True)
    assert metric.compute() == {}
    assert metric.results([11]) == [
        {"image_id": 7, "category_id": 11, "bbox": [0, 0, 1, 1], "score": 0.5},
        {"image_id": 7, "category_id": 11, "bbox": [1, 2, 3, 6], "score": 0.25},
    ]
    assert metric.classes == []
    assert metric.per_class == {}
    assert metric.precision.shape == (10, 101, 0)


def test_only_crowds_are_no_ground_truth():
    metric = updated([image(7, [[1, 2, 4, 8, 0.25]], [[0, 0, 9, 9]], iscrowd=[1])])
    assert metric.compute() == {}


def test_a_label_without_a_category_id_is_named():
    metric = updated([image(7, [[1, 2, 4, 8, 0.25]], [[1, 2, 4, 8]], label=3)])
    metric.compute()
    assert metric.results()[0]["category_id"] == 3
    with pytest.raises(InputError, match="label 3, detected on image 7, has no category id: expected 1 to 2"):
        metric.results([1, 2])


def test_what_compute_leaves_goes_with_update_and_reset():
    first, second = image(1, [[0, 0, 10, 10, 0.9]], [[0, 0, 10, 10]]), image(2, [], [[0, 0, 10, 10]])
    metric = updated([first])
    assert metric.results() is metric.classes is metric.precision is metric.per_class is None
    assert floats(metric.compute())["map"] == 1
    assert len(metric.results()) == 1
    metric.update([second[0]], [second[1]])
    assert metric.results() is metric.classes is metric.precision is metric.per_class is None
    assert floats(metric.compute())["mar_100"] == 0.5
    metric.reset()
    assert metric.results() is None
    metric.update([second[0]], [second[1]])
    assert floats(metric.compute())["map"] == 0


# ---- as part of a module ------------------------------------------------------------------------------------------


def test_copies_pickles_and_moves_with_what_it_holds():
    samples = make_scene(0)
    metric = updated(samples)
    copies = [copy.deepcopy(metric), pickle.loads(pickle.dumps(metric)), metric.clone()]
    module = torch.nn.ModuleDict({"map": metric})
    assert module.state_dict() == {}
    module.to("cpu").half().to(torch.bfloat16)
    expected, _ = pycocotools(samples)
    for other in (metric, *copies):
        assert floats(other.compute()) == pytest.approx(expected, abs=1e-9)


def test_keeps_copies_of_what_it_was_given():
    pred, target = image(1, [[0, 0, 10, 10, 0.9]], [[0, 0, 10, 10]])
    metric = updated([(pred, target)])
    for tensor in (pred["boxes"], pred["scores"], target["boxes"], target["labels"]):
        tensor.zero_()
    assert floats(metric.compute())["map"] == 1


def test_forward_updates():
    pred, target = image(1, [[0, 0, 10, 10, 0.9]], [[0, 0, 10, 10]])
    metric = BoxMeanAveragePrecision()
    assert metric([pred], [target]) is None
    assert floats(metric.compute())["map"] == 1


def test_takes_half_precision_and_tensors_with_gradients():
    pred, target = image(1, [[0, 0, 10, 10, 0.5]], [[0, 0, 10, 10]])
    pred = {**pred, "boxes": pred["boxes"].requires_grad_(), "scores": pred["scores"].bfloat16()}
    metric = updated([(pred, {**target, "boxes": target["boxes"].long()})])
    assert floats(metric.compute())["map"] == 1
    assert metric.results()[0]["score"] == 0.5


def test_says_nothing(capfd, caplog):
    caplog.set_level(logging.INFO)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        updated(make_scene(1)).compute()
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


class Validated(L.LightningModule):
    """Shows what it is given as its detections."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.val_map = BoxMeanAveragePrecision(class_metrics=True)

    def training_step(self, batch, batch_idx):
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        preds, targets = zip(*batch, strict=True)
        self.val_map.update(preds, targets)

    def on_validation_epoch_end(self):
        self.log_dict({f"val/{name}": value for name, value in self.val_map.compute().items()})
        self.val_map.reset()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_inside_lightning(tmp_path):
    samples = make_scene(3)
    expected, _ = pycocotools(samples)
    module = Validated()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(tmp_path, monitor="val/map", mode="max")],
    )
    loader = DataLoader(samples, batch_size=2, collate_fn=list)
    trainer.fit(module, DataLoader(torch.zeros(2, 1)), loader)
    logged = {name.removeprefix("val/"): value.item() for name, value in trainer.callback_metrics.items()}
    assert {name: logged[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert logged.keys() - expected.keys() == {"map/1", "map/2"}
    assert trainer.callback_metrics["val/map"].dtype.is_floating_point
    checkpoint = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
    assert checkpoint["state_dict"].keys() == {"layer.weight", "layer.bias"}


# ---- wrong input --------------------------------------------------------------------------------------------------

PRED = {"boxes": torch.zeros(2, 4), "scores": torch.zeros(2), "labels": torch.ones(2, dtype=torch.long)}
TARGET = {"boxes": torch.zeros(1, 4), "labels": torch.ones(1, dtype=torch.long), "image_id": 5}


@pytest.mark.parametrize(
    ("pred", "target", "message"),
    [
        ({"scores": None}, {}, r"preds\[1\] has no 'scores': .* keys \['boxes', 'labels'\]"),
        ({}, {"boxes": None}, r"targets\[1\] has no 'boxes'"),
        ({}, {"image_id": None}, r"targets\[1\] has no 'image_id'"),
        ({}, {"image_id": "a.jpg"}, r"targets\[1\]\['image_id'\]='a.jpg': expected an integer"),
        ({}, {"image_id": torch.tensor([1, 2])}, "expected an integer, or a tensor of one"),
        ({}, {"image_id": torch.tensor(1.5)}, "expected an integer, or a tensor of one"),
        ({}, {"image_id": True}, "expected an integer, or a tensor of one"),
        ({"boxes": torch.zeros(2, 5)}, {}, r"preds\[1\]\['boxes'\] has shape \(2, 5\): expected \(N, 4\)"),
        ({}, {"boxes": torch.zeros(0)}, r"targets\[1\]\['boxes'\] has shape \(0,\): expected \(N, 4\)"),
        ({"scores": torch.zeros(3)}, {}, r"preds\[1\]\['scores'\] has shape \(3,\): expected \(2,\)"),
        ({}, {"labels": torch.ones(1, 1).long()}, r"targets\[1\]\['labels'\] has shape \(1, 1\): expected \(1,\)"),
        ({}, {"area": torch.zeros(2)}, r"targets\[1\]\['area'\] has shape \(2,\): expected \(1,\)"),
        ({}, {"iscrowd": torch.zeros(2).long()}, r"targets\[1\]\['iscrowd'\] has shape"),
        ({"labels": torch.ones(2)}, {}, r"preds\[1\]\['labels'\]=torch.float32: expected integers"),
        ({"labels": [1, 1]}, {}, r"preds\[1\]\['labels'\] is a list: expected a tensor"),
        ({"scores": torch.tensor([0.5, torch.nan])}, {}, r"preds\[1\]\['scores'\]='NaN or infinite'"),
        ({}, {"boxes": torch.tensor([[9.0, 9.0, 4.0, 12.0]])}, r"holds \[9.0, 9.0, 4.0, 12.0\]: expected corners"),
    ],
)
def test_wrong_input_is_named_in_one_line_and_nothing_of_the_batch_kept(pred, target, message):
    def changed(good: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in {**good, **change}.items() if value is not None}

    metric = BoxMeanAveragePrecision()
    with pytest.raises(InputError, match=message) as error:
        metric.update([PRED, changed(PRED, pred)], [TARGET, changed(TARGET, target)])
    assert "\n" not in str(error.value)
    assert not metric.images


@pytest.mark.parametrize(
    ("preds", "targets", "message"),
    [
        ([PRED], [TARGET, TARGET], "preds has 1 images, targets 2"),
        (PRED, [TARGET], "preds='dict': expected a list of dicts"),
        ([PRED], [torch.zeros(1)], "targets='list': expected a list of dicts"),
    ],
)
def test_batches_of_the_wrong_form_are_named(preds, targets, message):
    with pytest.raises(InputError, match=message):
        BoxMeanAveragePrecision().update(preds, targets)
