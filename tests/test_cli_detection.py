"""Detection at the command line, as a user meets it: one's own data, and one clear line for whatever is wrong."""

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image, ImageDraw

from awconv.data import COCODataModule
from awconv.tasks import DetectionTask
from miniature import COCO_CATEGORIES
from refusals import refused

DETECTOR = ["-c", "configs/recipes/coco_1x.yaml", "-c", "configs/models/aw_faster_rcnn_resnet18_small.yaml"]
SHORT = [
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=2",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.log_every_n_steps=1",
    "--data.batch_size=2",
    "--data.num_workers=0",
    "--data.image_size=64",
    "--data.max_size=96",
    "--model.initial_weights=null",
    "--model.norm=batch",
    "--model.trainable_stages=null",
]
TRAIN = Path("annotations", "instances_train2017.json")
VAL = Path("annotations", "instances_val2017.json")


@pytest.fixture
def fit(cli, tmp_path, coco_root):
    """Trains for two steps on the miniature COCO."""

    def run(*extra: object, short: list[str] = SHORT) -> tuple[int, str, str]:
        runs = f"--trainer.default_root_dir={tmp_path / 'runs'}"
        return cli("fit", *DETECTOR, *short, f"--data.root={coco_root}", runs, *extra)

    return run


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    content = change(content) or content
    path.write_text(json.dumps(content))


def without(key: str):
    return lambda content: content.pop(key) and None


def first_annotation(**changes):
    return lambda content: content["annotations"][0].update(changes)


# ---- bad input --------------------------------------------------------------------------------------


def test_an_annotation_file_that_is_missing(fit, coco_root):
    (coco_root / TRAIN).unlink()
    refused(fit(), "train_annotations", str(coco_root / TRAIN))


def test_an_annotation_file_that_is_not_json(fit, coco_root):
    (coco_root / TRAIN).write_text("{oops")
    refused(fit(), "train_annotations", "JSON")


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_an_annotation_file_without_a_section(fit, coco_root, key):
    edit(coco_root / TRAIN, without(key))
    refused(fit(), "train_annotations", f"no {key}")


def test_an_annotation_of_an_unknown_category(fit, coco_root):
    edit(coco_root / TRAIN, first_annotation(id=77777, category_id=4321))
    refused(fit(), "77777", "4321")


def test_an_annotation_of_an_image_that_is_not_listed(fit, coco_root, caplog):
    edit(coco_root / TRAIN, first_annotation(id=77777, image_id=987654))
    code, _, err = fit()
    assert code == 0, err
    assert caplog.text.count("such as annotation 77777 of image 987654") == 1


def test_a_picture_that_is_missing(fit, coco_root):
    name = json.loads((coco_root / VAL).read_text())["images"][0]["file_name"]
    (coco_root / "val2017" / name).unlink()
    refused(fit(), name)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_is_truncated(fit, coco_root, workers):
    for picture in (coco_root / "val2017").iterdir():
        picture.write_bytes(picture.read_bytes()[:200])
    refused(fit(f"--data.num_workers={workers}"), "val2017", "cannot be read")


def test_categories_that_differ(fit, coco_root):
    edit(coco_root / VAL, lambda content: content["categories"][0].update(name="unicorn"))
    refused(fit(), "unicorn")


def test_a_folder_without_pictures(cli, fit, tmp_path):
    code, _, err = fit()
    assert code == 0, err
    (checkpoint,) = (tmp_path / "runs").glob("*/*/checkpoints/last.ckpt")
    (tmp_path / "empty").mkdir()
    refused(cli("predict", f"--ckpt_path={checkpoint}", f"--data.predict_dir={tmp_path / 'empty'}"), "predict_dir")


def test_half_precision_weights(fit):
    refused(fit("--trainer.precision=bf16-true"), "bf16-mixed")


def test_frozen_statistics_of_random_weights(fit):
    refused(fit("--model.norm=frozen"), "frozen", "initial_weights")


def test_a_head_that_is_unknown(fit):
    refused(fit("--model.head=yolo"), "yolo", "faster_rcnn", "retinanet", "fcos")


def test_an_option_that_is_unknown(fit):
    refused(fit("--model.options.box_score_treshold=0.1"), "box_score_treshold", "box_score_thresh")


def test_a_checkpoint_of_the_other_kind(cli, fit, tmp_path):
    digits = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1"]
    code, _, err = cli("fit", *digits, f"--trainer.default_root_dir={tmp_path / 'digits'}")
    assert code == 0, err
    (classifier,) = (tmp_path / "digits").glob("*/*/checkpoints/last.ckpt")
    refused(fit(f"--ckpt_path={classifier}"), "of a classifier")
    code, _, err = fit()
    assert code == 0, err
    (detector,) = (tmp_path / "runs").glob("*/*/checkpoints/last.ckpt")
    recipe = ["-c", "configs/recipes/digits.yaml", "-c", "configs/models/aw_resnet20.yaml"]
    runs = f"--trainer.default_root_dir={tmp_path / 'digits'}"
    refused(cli("test", *recipe, f"--ckpt_path={detector}", runs), "of a detector")
    refused(cli("fit", *recipe, *digits, f"--model.initial_weights={detector}", runs), "of a detector")


@pytest.mark.parametrize("command", ["test", "predict", "validate"])
def test_weights_of_a_part_are_not_measured(cli, tmp_path, coco_root, command):
    """A classifier's file fills the backbone: the heads above it would be random."""
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "resnet18.pth")
    data = [f"--data.root={coco_root}", f"--data.predict_dir={coco_root / 'val2017'}"]
    weights = f"--model.initial_weights={tmp_path / 'resnet18.pth'}"
    refused(
        cli(command, *DETECTOR, *SHORT, *data, weights, f"--trainer.default_root_dir={tmp_path / 'runs'}"),
        f"{command} needs trained weights, and these are not all of them",
        "resnet18.pth",
        "--ckpt_path",
    )


def test_resuming_with_more_frozen(cli, fit, tmp_path):
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "resnet18.pth")
    code, _, err = fit(f"--model.initial_weights={tmp_path / 'resnet18.pth'}", "--model.trainable_stages=3")
    assert code == 0, err
    (checkpoint,) = (tmp_path / "runs").glob("*/*/checkpoints/last.ckpt")
    again = ["fit", f"--ckpt_path={checkpoint}", "--trainer.max_epochs=2"]
    again.append(f"--trainer.default_root_dir={tmp_path / 'runs'}")
    refused(cli(*again, "--model.trainable_stages=1"), "something else is frozen", "model.initial_weights")
    code, _, err = cli(*again)
    assert code == 0, err


def test_no_checkpoint_leaves_the_initial_weights(fit, tmp_path):
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "resnet18.pth")
    (tmp_path / "mine.yaml").write_text(f"model: {{init_args: {{initial_weights: {tmp_path / 'resnet18.pth'}}}}}")
    words = [*(word for word in SHORT if "initial_weights" not in word), "--model.lr=0"]
    code, _, err = fit("-c", tmp_path / "mine.yaml", "--ckpt_path=null", short=words)
    assert code == 0, err
    (path,) = (tmp_path / "runs").glob("*/*/checkpoints/last.ckpt")
    stem = torch.load(path, weights_only=True)["state_dict"]["network.backbone.body.conv1.weight"]
    assert torch.equal(stem, torch.load(tmp_path / "resnet18.pth")["conv1.weight"])


@pytest.mark.parametrize(
    ("data", "model"),
    [("digits", "aw_faster_rcnn_resnet18_small"), ("digit_scenes", "aw_resnet20")],
)
def test_a_recipe_of_another_kind_than_the_model(cli, data, model):
    result = cli("fit", "-c", f"configs/recipes/{data}.yaml", "-c", f"configs/models/{model}.yaml")
    refused(result, "for classification", "for detection", "one kind, such as -c configs/recipes/")


def test_a_recipe_without_a_model(cli):
    result = cli("fit", "-c", "configs/recipes/coco_1x.yaml")
    refused(result, "head and backbone are required: add a detector, such as -c configs/models/")


def test_a_batch_of_one_for_a_norm_over_the_batch(fit):
    refused(fit("--model.attention=bam", "--data.batch_size=1"), "batch of one image", "--data.batch_size")


def test_a_metric_that_is_not_measured(fit):
    options = "--trainer.num_sanity_val_steps=1"
    refused(fit("--checkpoint.monitor=val/acc1", options), "checkpoint.monitor='val/acc1'", "val/map")


# ---- what works --------------------------------------------------------------------------------------


def test_a_test_set_without_annotations_is_predicted_and_not_scored(cli, fit, tmp_path, coco_root):
    code, _, err = fit()
    assert code == 0, err
    (checkpoint,) = (tmp_path / "runs").glob("*/*/checkpoints/last.ckpt")
    images = json.loads((coco_root / VAL).read_text())
    images.pop("annotations")
    (coco_root / "info.json").write_text(json.dumps(images))
    test = ["--data.test_annotations=info.json", "--data.test_images=val2017"]
    code, out, err = cli("test", f"--ckpt_path={checkpoint}", *test, f"--trainer.default_root_dir={tmp_path / 'runs'}")
    assert code == 0, err
    assert "the test set has no annotations: there is no AP" in out
    (results,) = (tmp_path / "runs").glob("*/*-test/results.json")
    assert isinstance(json.loads(results.read_text()), list)


def test_without_a_recipe_the_best_is_chosen_by_map(cli, tmp_path, coco_root):
    model = ["-c", "configs/models/aw_faster_rcnn_resnet18_small.yaml", "--data", "COCODataModule"]
    runs = f"--trainer.default_root_dir={tmp_path / 'runs'}"
    code, _, err = cli("fit", *model, *SHORT, f"--data.root={coco_root}", runs)
    assert code == 0, err
    (best,) = (tmp_path / "runs").glob("*/*/checkpoints/best.ckpt")
    monitors = [s["monitor"] for s in torch.load(best, weights_only=True)["callbacks"].values() if "monitor" in s]
    assert "val/map" in monitors


def test_a_run_loads_in_plain_python(fit, tmp_path, coco_root):
    code, _, err = fit()
    assert code == 0, err
    (path,) = (tmp_path / "runs").glob("*/*/checkpoints/last.ckpt")
    task = DetectionTask.load_from_checkpoint(path, weights_only=True)
    assert task.class_names == [COCO_CATEGORIES[number] for number in sorted(COCO_CATEGORIES)]
    state = torch.load(path, weights_only=True)["state_dict"]
    assert all(torch.equal(value, task.state_dict()[key]) for key, value in state.items())
    data = COCODataModule.load_from_checkpoint(path, weights_only=True)
    assert data.root == str(coco_root)


def test_a_run_is_resumed_and_ends_as_the_uninterrupted_one(cli, tmp_path):
    configs = ["-c", "configs/recipes/digit_scenes.yaml", "-c", "configs/models/aw_faster_rcnn_resnet18_small.yaml"]
    data = [
        f"--data.root={tmp_path / 'scenes'}",
        "--data.train_scenes=8",
        "--data.val_scenes=5",
        "--data.test_scenes=5",
    ]
    options = [*SHORT[2:5], "--data.batch_size=2", "--data.image_size=64", "--data.max_size=96", *data]
    code, _, err = cli(
        "fit", *configs, *options, "--trainer.max_epochs=2", f"--trainer.default_root_dir={tmp_path / 'whole'}"
    )
    assert code == 0, err
    (whole,) = (tmp_path / "whole").glob("*/*/checkpoints/last.ckpt")
    # as a crash would end it: the schedule is that of two epochs
    half = ["--trainer.max_epochs=2", "--trainer.callbacks+=test_survival.StopAfterAnEpoch"]
    code, _, err = cli("fit", *configs, *options, *half, f"--trainer.default_root_dir={tmp_path / 'half'}")
    assert code == 0, err
    (checkpoint,) = (tmp_path / "half").glob("*/*/checkpoints/last.ckpt")
    assert torch.load(checkpoint, weights_only=True)["epoch"] == 0
    code, _, err = cli(
        "fit",
        f"--ckpt_path={checkpoint}",
        "--trainer.callbacks=null",
        f"--trainer.default_root_dir={tmp_path / 'resumed'}",
    )
    assert code == 0, err
    (resumed,) = (tmp_path / "resumed").glob("*/*/checkpoints/last.ckpt")
    one, two = (torch.load(path, weights_only=True) for path in (whole, resumed))
    assert one["global_step"] == two["global_step"] == 8
    for key, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][key]), key


def test_three_pictures_and_a_json_written_by_hand(cli, tmp_path):
    """What a newcomer does first: their own pictures, the least that COCO's format asks for."""
    root = tmp_path / "mine"
    (root / "pictures").mkdir(parents=True)
    images, annotations = [], []
    for number in range(3):
        picture = Image.new("RGB", (120, 80), (200, 200, 190))
        box = [10 + 12 * number, 15, 40, 50]
        ImageDraw.Draw(picture).ellipse([box[0], box[1], box[0] + box[2], box[1] + box[3]], fill=(160, 30, 30))
        picture.save(root / "pictures" / f"apple {number}.jpg")
        images.append({"id": number, "file_name": f"apple {number}.jpg"})
        annotations.append({"image_id": number, "category_id": 7, "bbox": box})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 7, "name": "apple"}]}
    (root / "apples.json").write_text(json.dumps(content))
    data = [f"--data.root={root}"]
    for split in ("train", "val"):
        data += [f"--data.{split}_annotations=apples.json", f"--data.{split}_images=pictures"]
    code, out, err = cli(
        "fit", *DETECTOR, *SHORT, *data, "--test_after_fit=true", f"--trainer.default_root_dir={tmp_path / 'runs'}"
    )
    assert code == 0, err
    assert "test/map: " in out
    (run,) = (tmp_path / "runs").glob("*/*")
    code, out, err = cli(
        "predict",
        "--ckpt_path=best",
        f"--data.predict_dir={root / 'pictures'}",
        f"--data.root={tmp_path / 'gone'}",
        f"--trainer.default_root_dir={tmp_path / 'runs'}",
    )
    assert code == 0, err
    (predicted,) = (tmp_path / "runs").glob("*/*-predict")
    for found in json.loads((predicted / "predictions.json").read_text()):
        assert found["category_id"] == 7
    assert len(list((predicted / "predictions").iterdir())) == 3
    assert (run / "results.json").is_file()
