"""DetectionReport through real trainers: its files by pycocotools and plain Python, its figures by what they show."""

import csv
import itertools
import json
import os
import warnings
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger
from matplotlib.colors import to_rgb
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.data import DataLoader, Dataset

from awconv.callbacks import (
    ClassificationReport,
    DetectionReport,
    SheetPicture,
    detection_figures,
    draw_detection_sheet,
    draw_detections,
    draw_precision_recall,
)
from awconv.callbacks.canvas import ink_on
from awconv.callbacks.detection_figures import PALETTE, colour_of
from awconv.data import COCODataModule
from awconv.data.pictures import Unreadable
from awconv.errors import InputError, printable
from awconv.metrics import BoxMeanAveragePrecision
from processes import spawn_two

NAMES = ["cat", "Straße_$x$", "日本", "dog, or $\\frac{", "a, b\n c"]
IDS = [3, 7, 8, 21, 90]
NOTHING = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}


class Detector(pl.LightningModule):
    """The contract of a detection task, without a network: what it detects is told by the target, or by the path."""

    def __init__(self, detections, class_names=NAMES, category_ids=IDS):
        super().__init__()
        self.detections = detections
        if class_names is not None:
            self.class_names = class_names
        if category_ids is not None:
            self.category_ids = category_ids
        self.test_map = BoxMeanAveragePrecision()

    def on_test_epoch_start(self):
        self.test_map.reset()

    def test_step(self, batch):
        _, targets = batch
        detections = [self.detections[int(target["image_id"])] for target in targets]
        self.test_map.update(detections, targets)
        return {"detections": detections}

    def on_test_epoch_end(self):
        self.test_map.compute()

    def predict_step(self, batch):
        _, paths = batch
        return {"path": paths, "detections": [self.detections.get(path, NOTHING) for path in paths]}


class Classifier(pl.LightningModule):
    def test_step(self, batch):
        return {"detections": "something of its own"}

    def predict_step(self, batch):
        return {"path": ["a"], "probabilities": torch.zeros(1, 2)}


class Listed(Dataset):
    """A list whose items are left alone."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def batches(pairs, size=4):
    return DataLoader(
        Listed(pairs), batch_size=size, collate_fn=lambda pairs: tuple(map(list, zip(*pairs, strict=True)))
    )


def some_detections(generator, n, classes=5, side=90):
    corner = torch.rand(n, 2, generator=generator) * side * 0.6
    extent = 3 + torch.rand(n, 2, generator=generator) * side * 0.35
    return {
        "boxes": torch.cat([corner, corner + extent], dim=1),
        "scores": torch.rand(n, generator=generator),
        "labels": torch.randint(1, classes + 1, (n,), generator=generator),
    }


def evaluated(n=15, annotated=True, classes=5):
    """Samples with image ids 10, 20, ..., and what is detected on each: the truth, moved, and something else."""
    generator = torch.Generator().manual_seed(3)
    samples, detections = [], {}
    for k in range(1, n + 1):
        truth = some_detections(generator, k % 4 if annotated else 0, classes)
        found, wrong = truth["boxes"] + torch.randn(len(truth["boxes"]), 4, generator=generator), k % 3
        other = some_detections(generator, wrong, classes)
        detections[10 * k] = {
            "boxes": torch.cat([found, other["boxes"]]),
            "scores": torch.cat([truth["scores"] / 2 + 0.5, other["scores"]]),
            "labels": torch.cat([truth["labels"], other["labels"]]),
        }
        target = {
            "image_id": torch.tensor(10 * k),
            "boxes": truth["boxes"],
            "labels": truth["labels"],
            "area": (truth["boxes"][:, 2:] - truth["boxes"][:, :2]).prod(dim=1),
            "iscrowd": torch.zeros(len(truth["labels"]), dtype=torch.int64),
        }
        image = torch.randint(0, 256, (3, 60 + k, 90), dtype=torch.uint8, generator=generator)
        samples.append((image, target))
    return samples, detections


def pictures_in(folder, names):
    pairs = []
    for k, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.new("RGB", (120 + k, 80), (200, 10 * k % 255, 90))
        picture.save(path, "JPEG" if path.suffix.lower() in {".jpg", ".jpeg"} else None)
        pairs.append((torch.zeros(3, 80, 120 + k, dtype=torch.uint8), str(path)))
    return pairs


def make_trainer(folder, *callbacks, **options):
    options = {"logger": False, "default_root_dir": folder} | options
    return pl.Trainer(
        accelerator="cpu",
        devices=options.pop("devices", 1),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=list(callbacks),
        **options,
    )


def names_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def coco_truth(samples):
    """The annotation file of a test set, as COCO would have it."""
    annotations = []
    for _, target in samples:
        for (x0, y0, x1, y1), label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": int(target["image_id"]),
                    "category_id": IDS[label - 1],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                }
            )
    truth = COCO()
    truth.dataset = {
        "images": [{"id": int(target["image_id"])} for _, target in samples],
        "annotations": annotations,
        "categories": [{"id": k, "name": name} for k, name in zip(IDS, NAMES, strict=True)],
    }
    truth.createIndex()
    return truth


# --- after test ---


def test_results_file_scores_in_pycocotools_what_the_table_says(tmp_path, capsys):
    samples, detections = evaluated()
    trainer = make_trainer(tmp_path, DetectionReport(), logger=CSVLogger(tmp_path, name="run"))
    trainer.test(Detector(detections), batches(samples), verbose=False)
    folder = Path(trainer.log_dir)
    printed = capsys.readouterr().out.splitlines()
    assert names_in(folder) == ["ap_table.csv", "precision_recall.png", "results.json", "test_pictures.png"]

    truth = coco_truth(samples)
    evaluation = COCOeval(truth, truth.loadRes(str(folder / "results.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    first, *classes = rows_of(folder / "ap_table.csv")
    measures = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100"]
    assert list(first) == ["category_id", "class", *measures]
    assert first["class"] == "all classes"
    for measure, expected in zip(measures, evaluation.stats[:9], strict=True):
        assert first[measure] == ("" if expected == -1 else f"{expected:.6f}"), measure

    assert [(row["category_id"], row["class"]) for row in classes] == [
        (str(k), name) for k, name in zip(IDS, NAMES, strict=True)
    ]
    precision = evaluation.eval["precision"][:, :, :, 0, 2]
    for k, row in enumerate(classes):
        absent = (precision[:, :, k] == -1).all()
        assert row["AP"] == ("" if absent else f"{precision[:, :, k].mean():.6f}")
        assert row["AP50"] == ("" if absent else f"{precision[0, :, k].mean():.6f}")
    assert "" in [row["AP"] for row in classes]

    head = next(n for n, line in enumerate(printed) if line.split() == measures)
    table = [line.rsplit(None, 9) for line in printed[head + 1 : head + 2 + len(NAMES)]]
    assert [row[0].strip() for row in table] == ["all classes", *(printable(name) for name in NAMES)]
    for printed_row, row in zip(table, [first, *classes], strict=True):
        assert printed_row[1:] == [f"{float(row[m]):.3f}" if row[m] else "-" for m in measures]
    assert f"COCO results: {folder / 'results.json'}" in printed
    assert f"AP of every class: {folder / 'ap_table.csv'}" in printed
    assert f"precision and recall: {folder / 'precision_recall.png'}" in printed
    assert f"test pictures: {folder / 'test_pictures.png'}" in printed


def test_results_are_in_the_terms_of_the_annotation_file(tmp_path, sheets):
    """With image ids that are text and sizes as stored, the detected ground truth is the file's own boxes."""
    (tmp_path / "pictures").mkdir()
    content = {"images": [], "categories": [{"id": "7", "name": "cat"}], "annotations": []}
    for number, orientation in ((10, 1), (9, 6), (100, 3)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (40, 30)).save(tmp_path / "pictures" / f"{number}.png", exif=exif)
        image_id = f"scan {number}"
        content["images"].append({"id": image_id, "file_name": f"{number}.png", "width": 40, "height": 30})
        content["annotations"].append({"image_id": image_id, "category_id": "7", "bbox": [20, 5, 15, 10]})
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    files = {"val_annotations": "boxes.json", "val_images": "pictures"}
    data = COCODataModule(str(tmp_path), **files, num_workers=0)
    data.setup("test")
    detections = {
        int(target["image_id"]): {"boxes": target["boxes"], "labels": target["labels"], "scores": torch.tensor([0.5])}
        for _, targets in data.test_dataloader()
        for target in targets
    }
    assert [found["boxes"].tolist() for found in detections.values()][1] == [[15, 20, 25, 35]]
    given = ({"datamodule": data}, {"dataloaders": data.test_dataloader()}, {"dataloaders": [data.test_dataloader()]})
    for number, where in enumerate(given):
        module = Detector(detections, data.class_names, data.category_ids)
        make_trainer(tmp_path / str(number), DetectionReport()).test(module, **where, verbose=False)
        results = json.loads((tmp_path / str(number) / "results.json").read_text())
        assert sorted(results, key=lambda found: found["image_id"]) == [
            {"image_id": f"scan {k}", "category_id": "7", "bbox": [20, 5, 15, 10], "score": 0.5} for k in (10, 100, 9)
        ]
        assert [entry.caption for entry in sheets[-1]] == ["image scan 10", "image scan 100", "image scan 9"]
        assert rows_of(tmp_path / str(number) / "ap_table.csv")[1]["category_id"] == "7"


def test_results_file_holds_every_detection_once_although_padding_repeats_samples(tmp_path):
    samples, detections = evaluated()
    trainer = make_trainer(tmp_path, DetectionReport())
    trainer.test(Detector(detections), batches([*samples, *samples[:2]]), verbose=False)
    results = json.loads((tmp_path / "results.json").read_text())
    expected = [
        (image_id, IDS[label - 1], (x0, y0, x1 - x0, y1 - y0), score)
        for image_id, of_image in detections.items()
        for (x0, y0, x1, y1), label, score in zip(
            *(of_image[key].double().tolist() for key in ("boxes",)),
            of_image["labels"].tolist(),
            of_image["scores"].double().tolist(),
            strict=True,
        )
    ]
    assert sorted((r["image_id"], r["category_id"], tuple(r["bbox"]), r["score"]) for r in results) == sorted(expected)


def test_a_test_set_without_annotations_is_predicted_and_not_scored(tmp_path, capsys):
    samples, detections = evaluated(annotated=False)
    make_trainer(tmp_path, DetectionReport()).test(Detector(detections), batches(samples), verbose=False)
    assert names_in(tmp_path) == ["results.json", "test_pictures.png"]
    assert len(json.loads((tmp_path / "results.json").read_text())) == sum(
        len(d["labels"]) for d in detections.values()
    )
    printed = capsys.readouterr().out.splitlines()
    assert sum("no annotations" in line for line in printed) == 1
    assert not any("AP50" in line for line in printed)


def test_nothing_detected_at_all(tmp_path, capsys):
    samples, detections = evaluated(4)
    make_trainer(tmp_path, DetectionReport()).test(
        Detector(dict.fromkeys(detections, NOTHING)), batches(samples), verbose=False
    )
    assert json.loads((tmp_path / "results.json").read_text()) == []
    assert rows_of(tmp_path / "ap_table.csv")[0]["AP"] == "0.000000"
    assert len(names_in(tmp_path)) == 4


@pytest.mark.parametrize("classes", [1, 80])
def test_number_of_classes(tmp_path, capsys, classes):
    samples, detections = evaluated(160 if classes > 1 else 6, classes=classes)
    names = [f"class {k}" for k in range(1, classes + 1)]
    model = Detector(detections, names, None)
    make_trainer(tmp_path, DetectionReport()).test(model, batches(samples, 32), verbose=False)
    rows = rows_of(tmp_path / "ap_table.csv")
    assert [row["class"] for row in rows] == ["all classes", *names]
    assert [row["category_id"] for row in rows[1:]] == [str(k) for k in range(1, classes + 1)]
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("class ")]
    scored = sorted((float(row["AP"]) for row in rows[1:] if row["AP"]), reverse=True)
    if classes == 1:
        assert printed == []
    else:
        assert [line.split()[2] for line in printed] == [f"{ap:.3f}" for ap in scored[:10] + scored[-10:]]


@pytest.fixture
def sheets(monkeypatch):
    """What was given to the function that draws sheets, still drawing them."""
    given = []

    def spy(pictures, *args, **kwargs):
        given.append(pictures)
        return draw_detection_sheet(pictures, *args, **kwargs)

    monkeypatch.setattr("awconv.callbacks.detection_report.draw_detection_sheet", spy)
    return given


def test_pictures_shown_do_not_depend_on_batches_or_order(tmp_path, sheets):
    samples, detections = evaluated(40)
    for size, order in ((1, samples), (3, samples[::-1]), (40, [*samples, samples[3]])):
        callback = DetectionReport(max_pictures=5)
        make_trainer(tmp_path / str(size), callback).test(Detector(detections), batches(order, size), verbose=False)
    images = {f"image {int(target['image_id'])}": image for image, target in samples}
    for shown in sheets:
        captions = [entry.caption for entry in shown]
        assert captions == [entry.caption for entry in sheets[0]]
        assert len(set(captions)) == 5
        # evenly: from the first to the last quarter of the images
        places = [int(caption.removeprefix("image ")) // 10 for caption in captions]
        assert places == sorted(places)
        assert min(places) <= 10
        assert max(places) > 30
        assert max(np.diff(places)) <= 20
        for entry in shown:
            expected = images[entry.caption].permute(1, 2, 0).numpy()
            np.testing.assert_array_equal(np.asarray(entry.picture), expected)
            image_id = int(entry.caption.removeprefix("image "))
            torch.testing.assert_close(entry.detections["boxes"], detections[image_id]["boxes"])


def test_bfloat16_detections(tmp_path):
    samples, detections = evaluated(3)
    model = Detector(detections)
    step = model.test_step
    model.test_step = lambda batch: {
        "detections": [
            {key: value.bfloat16() if key != "labels" else value for key, value in of_image.items()}
            for of_image in step(batch)["detections"]
        ]
    }
    make_trainer(tmp_path, DetectionReport()).test(model, batches(samples), verbose=False)
    assert (tmp_path / "test_pictures.png").stat().st_size > 1000


def test_files_of_another_run_are_not_touched_and_own_ones_are_replaced(tmp_path):
    (tmp_path / "out/predictions").mkdir(parents=True)
    (tmp_path / "out/predictions/precious.jpg").write_text("precious")
    (tmp_path / "out/results.json").write_text("precious")
    pairs = pictures_in(tmp_path / "in", ["a.jpg", "b.png", "c.png"])
    samples, detections = evaluated(5)
    trainer = make_trainer(tmp_path / "out", DetectionReport())
    for n in (3, 2):
        trainer.test(Detector(detections), batches(samples[:n]), verbose=False)
        trainer.predict(Detector({}), batches(pairs[:n]))
    assert (tmp_path / "out/results.json").read_text() == "precious"
    assert names_in(tmp_path / "out") == [
        "ap_table_2.csv",
        "pictures_2.json",
        "precision_recall_2.png",
        "predictions",
        "predictions/precious.jpg",
        "predictions_2",
        "predictions_2.json",
        "predictions_2.png",
        "predictions_2/a.jpg",
        "predictions_2/b.png",
        "results.json",
        "results_2.json",
        "test_pictures_2.png",
    ]
    assert len(json.loads((tmp_path / "out/pictures_2.json").read_text())["images"]) == 2


def test_an_interrupted_write_keeps_what_was_whole(tmp_path, monkeypatch):
    pairs = pictures_in(tmp_path / "in", ["a.jpg", "b.png"])
    drawn = []

    def interrupted(*args, **kwargs):
        if drawn:
            raise KeyboardInterrupt
        drawn.append(draw_detections(*args, **kwargs))
        return drawn[0]

    monkeypatch.setattr("awconv.callbacks.detection_report.draw_detections", interrupted)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        make_trainer(tmp_path / "out", DetectionReport()).predict(Detector({}), batches(pairs))
    assert drawn
    assert names_in(tmp_path / "out") == [
        "pictures.json",
        "predictions.json",
        "predictions.partial.jsonl",
        "predictions.png",
    ]


@pytest.mark.parametrize("logger", [True, False])
def test_fast_dev_run_draws_but_writes_nothing(tmp_path, monkeypatch, capsys, sheets, logger):
    monkeypatch.chdir(tmp_path)
    pairs = pictures_in(tmp_path / "in", ["a.jpg"])
    samples, detections = evaluated(5)
    trainer = make_trainer(tmp_path, DetectionReport(), fast_dev_run=True, logger=logger)
    trainer.test(Detector(detections), batches(samples), verbose=False)
    trainer.predict(Detector({}), batches(pairs))
    assert len(sheets) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    printed = capsys.readouterr().out
    assert ".png" not in printed
    assert "AP50" not in printed


def test_other_tasks_are_left_alone(tmp_path, capsys):
    trainer = make_trainer(tmp_path, DetectionReport())
    trainer.test(Classifier(), DataLoader([1, 2]), verbose=False)
    trainer.predict(Classifier(), DataLoader([1, 2]))
    assert list(tmp_path.iterdir()) == []
    assert "png" not in capsys.readouterr().out


def test_beside_the_classification_report(tmp_path):
    samples, detections = evaluated(3)
    trainer = make_trainer(tmp_path / "out", ClassificationReport(), DetectionReport())
    trainer.test(Detector(detections), batches(samples), verbose=False)
    trainer.predict(Detector({}), batches(pictures_in(tmp_path / "in", ["a.png"])))
    assert names_in(tmp_path / "out") == [
        "ap_table.csv",
        "pictures.json",
        "precision_recall.png",
        "predictions",
        "predictions.json",
        "predictions.png",
        "predictions/a.png",
        "results.json",
        "test_pictures.png",
    ]


def test_names_and_ids_that_do_not_fit(tmp_path):
    samples, detections = evaluated(3)
    trainer = make_trainer(tmp_path, DetectionReport())
    trainer.test(Detector(detections, None), batches(samples), verbose=False)
    assert [row["class"] for row in rows_of(tmp_path / "ap_table.csv")[1:]] == [str(k) for k in IDS]
    with pytest.raises(InputError, match="class_names of Detector has 2 names: expected 5"):
        trainer.test(Detector(detections, ["a", "b"]), batches(samples), verbose=False)
    with pytest.raises(InputError, match="Detector has neither class_names nor category_ids"):
        trainer.test(Detector(detections, None, None), batches(samples), verbose=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_score": 1.5}, "min_score=1.5: expected a number from 0 to 1"),
        ({"min_score": float("nan")}, "min_score=nan"),
        ({"max_pictures": 0}, "max_pictures=0: expected a whole number, at least 1"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(InputError, match=message):
        DetectionReport(**options)


# --- after predict ---


def check_predictions(folder, pairs, detections):
    """The JSON files by pycocotools, against what was detected."""
    paths = sorted(path for _, path in pairs if path)
    truth = COCO(str(folder / "pictures.json"))
    loaded = truth.loadRes(str(folder / "predictions.json"))
    assert {k: image["file_name"] for k, image in truth.imgs.items()} == dict(enumerate(paths, start=1))
    sizes = {path: (image.shape[2], image.shape[1]) for image, path in pairs}
    assert all((image["width"], image["height"]) == sizes[image["file_name"]] for image in truth.imgs.values())
    assert {k: category["name"] for k, category in loaded.cats.items()} == dict(zip(IDS, NAMES, strict=True))
    for image_id, path in enumerate(paths, start=1):
        expected = detections.get(path, NOTHING)
        annotations = loaded.loadAnns(loaded.getAnnIds(image_id))
        assert all(a["file_name"] == path for a in annotations)
        assert [a["category_id"] for a in annotations] == [IDS[k - 1] for k in expected["labels"].tolist()]
        assert [a["score"] for a in annotations] == expected["scores"].tolist()
        boxes = torch.tensor([a["bbox"] for a in annotations]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        torch.testing.assert_close(boxes, expected["boxes"], atol=1e-4, rtol=0)


def prediction(tmp_path, names):
    pairs = pictures_in(tmp_path / "in", names)
    generator = torch.Generator().manual_seed(0)
    return pairs, {path: some_detections(generator, k % 3) for k, (_, path) in enumerate(pairs)}


def test_files_after_predict(tmp_path, capsys, sheets):
    names = ["z.jpg", "a.png", "sub/a.png", "sub/b.webp", "m.bmp", "n.gif", "o.tif"]
    pairs, detections = prediction(tmp_path, names)
    padded = [*pairs[:3], (torch.zeros(3, 8, 8, dtype=torch.uint8), ""), *pairs[3:]]
    trainer = make_trainer(tmp_path / "out", DetectionReport(min_score=0.9, max_pictures=4))
    trainer.predict(Detector(detections), batches(padded, 3))
    folder = tmp_path / "out"
    check_predictions(folder, pairs, detections)
    drawn = ["a.png", "m.png", "n.png", "o.png", "sub", "sub/a.png", "sub/b.png", "z.jpg"]
    assert names_in(folder / "predictions") == drawn
    for (_, path), name in zip(sorted(pairs, key=lambda pair: pair[1]), (n for n in drawn if n != "sub"), strict=True):
        with Image.open(path) as before, Image.open(folder / "predictions" / name) as after:
            assert before.size == after.size
            assert after.format == ("JPEG" if name.endswith("jpg") else "PNG")
    (shown,) = sheets
    assert [entry.caption for entry in shown] == ["a.png", "n.gif", "sub/a.png"[4:], "z.jpg"]
    printed = capsys.readouterr().out.splitlines()
    for line in ("COCO results: predictions.json", "contact sheet: predictions.png", "pictures: predictions"):
        label, name = line.split(": ")
        assert f"{label}: {folder / name}" in printed


def test_exotic_file_names(tmp_path):
    undecodable = os.fsdecode(b"\xff\xfe-caf\xc3\xa9.png")
    names = [
        undecodable,
        "$\\frac{.jpg",
        "日本 語.PNG",
        "A.png",
        "a.bmp",
        "a.png",
        "a_2.png",
        "x." + "y" * 240 + ".webp",
    ]
    pairs, detections = prediction(tmp_path, names)
    detections[pairs[0][1]] = some_detections(torch.Generator(), 2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*installed fonts lack")
        make_trainer(tmp_path / "out", DetectionReport()).predict(Detector(detections), batches(pairs))
    check_predictions(tmp_path / "out", pairs, detections)
    drawn = [path.name for path in (tmp_path / "out/predictions").iterdir()]
    assert len(drawn) == len(names)
    assert len({name.casefold() for name in drawn}) == len(names)
    assert {undecodable, "$\\frac{.jpg", "日本 語.png", "A.png"} <= set(drawn)


def test_pictures_of_several_folders_and_relative_paths(tmp_path, monkeypatch):
    pictures_in(tmp_path, ["one/a.png", "two/deep/a.png"])
    monkeypatch.chdir(tmp_path)
    pairs = [(torch.zeros(3, 80, 120, dtype=torch.uint8), path) for path in ("one/a.png", "two/deep/a.png")]
    make_trainer(Path("out"), DetectionReport()).predict(Detector({}), batches(pairs))
    assert names_in(Path("out/predictions")) == ["one", "one/a.png", "two", "two/deep", "two/deep/a.png"]
    assert json.loads(Path("out/pictures.json").read_text())["images"][1]["file_name"] == "two/deep/a.png"


def test_pictures_are_drawn_upright(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6  # to be turned by a quarter to the right
    Image.new("RGB", (100, 60), "white").save(tmp_path / "a.jpg", exif=exif)
    box = {"boxes": torch.tensor([[10.0, 20, 50, 90]]), "scores": torch.ones(1), "labels": torch.ones(1).long()}
    pairs = [(torch.zeros(3, 100, 60, dtype=torch.uint8), str(tmp_path / "a.jpg"))]
    make_trainer(tmp_path / "out", DetectionReport()).predict(Detector({pairs[0][1]: box}), batches(pairs))
    with Image.open(tmp_path / "out/predictions/a.jpg") as drawn:
        assert drawn.size == (60, 100)
        assert drawn.getexif().get(0x112) is None
        pixels = np.asarray(drawn).astype(int)
    assert np.abs(pixels[60, 50] - np.array(to_rgb(colour_of(1))) * 255).max() < 25
    assert pixels[60, 30].min() > 230


def test_pictures_that_vanish_are_told_and_cost_no_others(tmp_path):
    pairs, detections = prediction(tmp_path, ["a.png", "b.png", "c.png"])
    Path(pairs[1][1]).unlink()
    with pytest.warns(UserWarning, match=r"1 of 3 pictures can no longer be read and were not drawn.*b\.png"):
        make_trainer(tmp_path / "out", DetectionReport()).predict(Detector(detections), batches(pairs))
    assert names_in(tmp_path / "out/predictions") == ["a.png", "c.png"]
    check_predictions(tmp_path / "out", pairs, detections)


def test_only_padding_writes_nothing(tmp_path):
    pairs = [(torch.zeros(3, 8, 8, dtype=torch.uint8), "")] * 3
    make_trainer(tmp_path, DetectionReport()).predict(Detector({}), batches(pairs))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_prediction_leaves_nothing_to_the_next(tmp_path):
    pairs, detections = prediction(tmp_path, ["a.png", "b.png", "c.png"])
    trainer, model = make_trainer(tmp_path / "out", DetectionReport()), Detector(detections)
    step = model.predict_step

    def broken_at_c(batch):
        if any(path.endswith("c.png") for path in batch[1]):
            raise RuntimeError("truncated")
        return step(batch)

    model.predict_step = broken_at_c
    with pytest.raises(RuntimeError, match="truncated"):
        trainer.predict(model, batches(pairs, 1))
    assert names_in(tmp_path / "out") == ["predictions.partial.jsonl"]
    lines = [json.loads(line) for line in (tmp_path / "out/predictions.partial.jsonl").read_text().splitlines()]
    assert [Path(line["file_name"]).name for line in lines] == ["a.png", "b.png"]
    for line, (_, path) in zip(lines, pairs, strict=False):
        assert [found["score"] for found in line["detections"]] == detections[path]["scores"].tolist()
        assert all(found.keys() == {"category_id", "bbox", "score"} for found in line["detections"])
    trainer.predict(model, batches(pairs[:1]))
    assert "predictions.partial_2.jsonl" not in names_in(tmp_path / "out")
    assert names_in(tmp_path / "out/predictions") == ["a.png"]


def test_missing_glyphs_are_told_once_for_all_pictures(tmp_path):
    pairs, _ = prediction(tmp_path, ["a.png", "b.png", "c.png"])
    box = {"boxes": torch.tensor([[1.0, 2, 50, 60]]), "scores": torch.ones(1), "labels": torch.ones(1).long()}
    model = Detector({path: box for _, path in pairs}, ["\U00013000" + name for name in NAMES])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(tmp_path / "out", DetectionReport()).predict(model, batches(pairs))
    messages = [str(warning.message) for warning in caught]
    assert not any("missing from font" in message for message in messages)
    # once for the sheet and once for the folder
    assert sum("installed fonts lack" in message for message in messages) == 2


def bad(path):
    """A sample of prediction whose file cannot be read."""
    return torch.zeros(3, 8, 8, dtype=torch.uint8), Unreadable.of(path, InputError(f"{path}: is broken"))


def test_what_was_skipped_is_listed_and_counted(tmp_path, capsys):
    pairs, detections = prediction(tmp_path, ["a.png", "b.png"])
    make_trainer(tmp_path / "out", DetectionReport()).predict(
        Detector(detections), batches([pairs[0], bad("x"), pairs[1]])
    )
    assert (tmp_path / "out/skipped.csv").read_text().splitlines() == ["path,reason", "x,is broken"]
    assert "1 of 3 images skipped, such as x: is broken" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out/pictures.json").read_text())["images"]) == 2
    assert not any("partial" in name for name in names_in(tmp_path / "out"))


# --- two processes ---


def _in_one_of_two_processes(rank, folder, pairs, predicted):
    callbacks = ClassificationReport(), DetectionReport(max_pictures=6)
    trainer = make_trainer(folder, *callbacks, devices=2, strategy="ddp", use_distributed_sampler=False)
    samples, detections = evaluated()
    samples.append(samples[0])
    trainer.test(Detector(detections), batches(samples[rank::2]), verbose=False)

    pairs = [*pairs, (torch.zeros(3, 8, 8, dtype=torch.uint8), ""), bad("x.png"), bad("w.png")]
    trainer.predict(Detector(predicted), batches(pairs[rank::2]))
    assert bool(callbacks[1]._written) == (rank == 0)


@pytest.mark.slow
def test_two_processes_write_what_one_does(tmp_path):
    pairs, predicted = prediction(tmp_path, [f"{k}.png" for k in range(7)])
    spawn_two(_in_one_of_two_processes, tmp_path / "two", pairs, predicted)

    samples, detections = evaluated()
    alone = make_trainer(tmp_path / "one", DetectionReport(max_pictures=6))
    alone.test(Detector(detections), batches(samples), verbose=False)
    alone.predict(Detector(predicted), batches([*pairs, bad("w.png"), bad("x.png")]))
    names = names_in(tmp_path / "one")
    assert names == names_in(tmp_path / "two")
    assert len(names) == 16
    assert (tmp_path / "two/skipped.csv").read_text().splitlines() == [
        "path,reason",
        "w.png,is broken",
        "x.png,is broken",
    ]
    for name in names:
        if (tmp_path / "one" / name).is_file():
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


# --- boxes on a picture ---


def detected(boxes, labels=None, scores=None):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    labels = torch.tensor(labels if labels is not None else [1] * len(boxes), dtype=torch.int64)
    scores = torch.tensor(scores if scores is not None else [0.9] * len(boxes), dtype=torch.float32)
    return {"boxes": boxes, "labels": labels, "scores": scores}


@pytest.mark.parametrize("size", [(640, 480), (479, 641), (2001, 1503), (301, 97)])
def test_only_what_is_drawn_changes_the_picture(size):
    generator = np.random.default_rng(0)
    picture = Image.fromarray(generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    before = np.asarray(picture)
    drawn = np.asarray(draw_detections(picture, detected([]), ["a"]))
    np.testing.assert_array_equal(drawn, before)
    width, height = size
    box = [0.25 * width, 0.4 * height, 0.75 * width, 0.9 * height]
    drawn = np.asarray(draw_detections(picture, detected([box, box], scores=[0.9, 0.3]), ["a"]))
    changed = (drawn != before).any(axis=2)
    font = 5 + (width * height) ** 0.5 / 60
    reach = 2 * max(font, 9)
    rows, columns = np.nonzero(changed)
    assert columns.min() >= box[0] - reach
    assert columns.max() <= box[2] + reach
    assert rows.min() >= box[1] - reach
    assert rows.max() <= box[3] + reach
    assert not changed[int(0.6 * height) : int(0.8 * height), int(0.35 * width) : int(0.65 * width)].any()
    # the frame's middle lies on the box's edge
    colour = np.array(to_rgb(colour_of(1))) * 255
    for x, y in ((box[0], 0.7 * height), (box[2], 0.7 * height), (0.5 * width, box[3])):
        assert np.abs(drawn[int(y), int(x)] - colour).max() < 30


def test_scores_below_the_threshold_are_not_drawn():
    picture = Image.new("RGB", (100, 100), "black")
    boxes = detected([[10, 10, 50, 50]], scores=[0.5])
    assert np.asarray(draw_detections(picture, boxes, ["a"], min_score=0.5)).any()
    assert not np.asarray(draw_detections(picture, boxes, ["a"], min_score=0.51)).any()


def texts_of(figure):
    return [text for axes in figure.axes for text in axes.texts]


def strings_of(figure):
    return [text.get_text() for text in texts_of(figure)]


def inside(figure, texts):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        figure.canvas.draw()
        boxes = [text.get_window_extent() for text in texts]
    page = figure.bbox
    return all(page.x0 - 1 <= b.x0 < b.x1 <= page.x1 + 1 and page.y0 - 1 <= b.y0 < b.y1 <= page.y1 + 1 for b in boxes)


corner = st.floats(-30, 330)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(corner, corner, corner, corner), max_size=8),
    st.sampled_from(["a", "日本", "a name so long that it cannot stand in so small a picture", "$\\frac{", "\n", ""]),
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
)
def test_no_name_leaves_the_picture(boxes, name, size):
    boxes = [[min(a, c), min(b, d), max(a, c), max(b, d)] for a, b, c, d in boxes]
    made = []
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        new_sheet = detection_figures.new_sheet
        patch.setattr(detection_figures, "new_sheet", lambda *a, **k: made.append(new_sheet(*a, **k)) or made[-1])
        drawn = draw_detections(Image.new("L", size), detected(boxes), [name])
    assert drawn.size == size
    assert drawn.mode == "RGB"
    figure = made[0][0]
    assert inside(figure, [text for text in texts_of(figure) if text.get_text().strip()])


def sheet_of(picture, detections, names, target=None, caption="image 1", **options):
    return draw_detection_sheet(
        [SheetPicture(picture, picture.size, detections, target, caption)], names, "One", **options
    )


def tags_of(figure):
    """Names on the picture with the colour of their ground, from the rectangles behind them."""
    axes = figure.axes[0]
    found = {}
    for text in axes.texts:
        x, y = text.get_position()
        for patch in axes.patches:
            if patch.get_fill() and patch.get_linewidth() == 0:
                left, top = patch.get_xy()
                if abs(left + patch.get_width() / 2 - x) < 1e-6 and top < y < top + patch.get_height():
                    found[text.get_text()] = (patch, text)
    return found


def test_names_do_not_cover_each_other_where_there_is_room():
    picture = Image.new("RGB", (640, 480), "grey")
    boxes = detected([[100, 100, 300, 300], [102, 103, 290, 310], [98, 99, 305, 280], [0, 0, 640, 480]], [1, 2, 3, 4])
    figure = sheet_of(picture, boxes, ["bicycle", "person", "hot dog", "refrigerator"])
    tags = [patch for patch, _ in tags_of(figure).values()]
    assert len(tags) == 4
    for a, b in itertools.combinations(tags, 2):
        assert not a.get_bbox().padded(-1e-6).overlaps(b.get_bbox().padded(-1e-6))


def test_names_are_written_in_an_ink_that_stands_out():
    def luminance(colour):
        c = np.array(to_rgb(colour))
        return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722] + 0.05

    assert len(set(PALETTE)) == 20
    for colour in PALETTE:
        low, high = sorted([luminance(colour), luminance(ink_on(to_rgb(colour)))])
        assert high / low >= 4.5, colour
    assert [colour_of(k) for k in (1, 20, 21)] == [PALETTE[0], PALETTE[-1], PALETTE[0]]


# --- sheets ---


def test_ground_truth_is_named_only_where_it_was_missed():
    picture = Image.new("RGB", (200, 100))
    boxes = detected([[10, 10, 50, 50], [100, 10, 150, 60], [100, 10, 150, 60]], [1, 2, 1], [0.9, 0.8, 0.2])
    target = {
        "boxes": torch.tensor([[12.0, 10, 52, 50], [101, 11, 150, 60], [160, 60, 180, 90], [0, 0, 200, 100]]),
        "labels": torch.tensor([1, 1, 3, 2]),
        "iscrowd": torch.tensor([0, 0, 0, 1]),
    }
    figure = sheet_of(picture, boxes, ["cat", "dog", "owl"], target)
    tags = tags_of(figure)
    assert set(tags) == {"cat 90%", "dog 80%", "cat", "owl"}
    grounds = {name: to_rgb(patch.get_facecolor()) for name, (patch, _) in tags.items()}
    assert grounds["cat"] == grounds["owl"] == (1, 1, 1)
    assert grounds["dog 80%"] == to_rgb(colour_of(2))
    assert "1 of 3 found, 2 boxes" in strings_of(figure)
    dashed = [patch for patch in figure.axes[0].patches if patch.get_linestyle() not in ("-", "solid")]
    assert len(dashed) == 4


def test_captions_without_ground_truth_or_objects():
    picture = Image.new("RGB", (200, 100))
    assert "1 box" in strings_of(sheet_of(picture, detected([[1, 1, 9, 9]]), ["a"]))
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    assert "no objects, 0 boxes" in strings_of(sheet_of(picture, detected([]), ["a"], nothing))


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (2000, 100), (10, 300), (1, 1), (64, 64)])
@pytest.mark.parametrize("count", [1, 5, 12])
def test_sheets_are_readable(size, count):
    width, height = size
    box = [0.1 * width, 0.2 * height, 0.7 * width, 0.8 * height]
    entry = SheetPicture(Image.new("RGB", size), size, detected([box]), None, "a long file name " * 5 + ".png")
    unreadable = entry._replace(picture=None)
    figure = draw_detection_sheet([entry] * (count - 1) + [unreadable], ["some name"], f"{count} pictures")
    strings = strings_of(figure)
    assert strings[0] == f"{count} pictures"
    assert strings.count("cannot be read") == 1
    assert all(text.get_fontsize() >= 7 for text in texts_of(figure))
    assert inside(figure, texts_of(figure))
    for image in figure.axes[0].images:
        left, right, bottom, top = image.get_extent()
        assert (right - left) / (bottom - top) == pytest.approx(width / height, rel=1e-6)


def test_a_sheet_of_ground_truth_alone_speaks_of_no_detections():
    picture = Image.new("RGB", (100, 100))
    one = {"boxes": torch.tensor([[10.0, 10, 50, 50]]), "labels": torch.tensor([1])}
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    figure = draw_detection_sheet(
        [SheetPicture(picture, picture.size, None, target, "a") for target in (one, none, None)], ["cat"], "Scenes"
    )
    strings = strings_of(figure)
    assert "Dashed: ground truth." in strings
    assert strings.count("cat") == strings.count("1 object") == strings.count("no objects") == 1
    assert not any("box" in string or "found" in string for string in strings)


def test_boxes_stand_where_they_are_in_the_picture():
    picture = Image.new("RGB", (200, 100))
    figure = draw_detection_sheet(
        # a thumbnail of a picture of twice the size
        [SheetPicture(picture, (400, 200), detected([[100, 50, 300, 150]]), None, "a")],
        ["cat"],
        "One",
    )
    (image,) = figure.axes[0].images
    left, right, bottom, top = image.get_extent()
    frame = next(
        p for p in figure.axes[0].patches if p.get_edgecolor()[:3] == to_rgb(colour_of(1)) and not p.get_fill()
    )
    assert frame.get_x() == pytest.approx(left + (right - left) / 4)
    assert frame.get_width() == pytest.approx((right - left) / 2)
    assert frame.get_y() == pytest.approx(top + (bottom - top) / 4)
    assert frame.get_height() == pytest.approx((bottom - top) / 2)


def test_an_empty_sheet_is_refused():
    with pytest.raises(InputError, match="pictures is empty"):
        draw_detection_sheet([], ["a"], "None")


# --- precision and recall ---

IOUS, RECALLS = np.linspace(0.5, 0.95, 10), np.linspace(0, 1, 101)


def some_precision(classes):
    generator = np.random.default_rng(0)
    reach = generator.uniform(0.2, 1, (10, 1, classes)) * np.linspace(1, 0.3, 10)[:, None, None]
    return np.clip(1 - (RECALLS[None, :, None] / reach) ** 3, 0, 1)


@pytest.mark.parametrize("classes", [1, 2, 10, 11, 80])
def test_precision_recall_says_what_it_draws(classes):
    precision = some_precision(classes)
    names = [f"class {k}" for k in range(classes)]
    figure = draw_precision_recall(precision, names, IOUS, RECALLS)
    assert inside(figure, texts_of(figure))
    assert all(text.get_fontsize() >= 7 for text in texts_of(figure))
    strings = strings_of(figure)
    for name, expected in (
        ("IoU 0.50", precision[0].mean()),
        ("IoU 0.75", precision[5].mean()),
        ("IoU 0.50 to 0.95", precision.mean()),
    ):
        assert strings[strings.index(name) - 1] == f"{expected:.3f}"
    listed = [s for s in strings if s.startswith("class ")]
    of_class = dict(zip(names, precision[0].mean(axis=0), strict=True))
    ranked = sorted(names, key=of_class.get)
    if classes == 1:
        assert strings[0] == "Precision and recall of class 0"
        assert listed == []
    else:
        assert listed == (ranked[::-1] if classes <= 10 else ranked[:10])
        assert all(strings[strings.index(name) - 1] == f"{of_class[name]:.3f}" for name in listed)
    curves = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 101]
    assert len(curves) == 3 + (classes if classes > 1 else 0)


def test_curves_run_over_the_square():
    precision = np.zeros((10, 101, 1))
    precision[:, :51] = 1
    figure = draw_precision_recall(precision, ["a"], IOUS, RECALLS)
    curve = next(line for line in figure.axes[0].lines if len(line.get_xdata()) == 101)
    x, y = curve.get_data()
    axis = next(line for line in figure.axes[0].lines if len(line.get_xdata()) == 3)
    (left, _, right), (top, bottom, _) = axis.get_data()
    assert x[0] == pytest.approx(left)
    assert x[-1] == pytest.approx(right)
    assert y[50] == pytest.approx(top)
    assert y[51] == pytest.approx(bottom)


def test_any_class_names():
    names = ["$\\frac{", "日本", "", "\n", "a" * 300]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        figure = draw_precision_recall(some_precision(5), names, IOUS, RECALLS)
        assert inside(figure, [text for text in texts_of(figure) if text.get_text().strip()])


@pytest.mark.parametrize(("shape", "names"), [((10, 101, 2), ["a"]), ((10, 100, 1), ["a"]), ((10, 101, 0), [])])
def test_precision_recall_refuses(shape, names):
    with pytest.raises(InputError, match=r"precision of shape .*: expected"):
        draw_precision_recall(np.zeros(shape), names, IOUS, RECALLS)
