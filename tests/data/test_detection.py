import inspect
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import typing
from collections import Counter
from pathlib import Path
from typing import ClassVar

import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torchvision import tv_tensors
from torchvision.models.detection.transform import GeneralizedRCNNTransform

import miniature
from awconv.data import BaseDataModule, COCODataModule
from awconv.data.loading import EvaluationSampler, EvaluationSet, GroupedSampler, Loader, TrainingSampler
from awconv.errors import InputError


def coco(root, **options):
    return COCODataModule(str(root), **{"num_workers": 0, "image_size": 64, "max_size": 100, **options})


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def train_json(root):
    return root / "annotations/instances_train2017.json"


def val_json(root):
    return root / "annotations/instances_val2017.json"


def error_of(call, *args):
    with pytest.raises(InputError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def samples(module, split):
    module.setup({"train": "fit", "val": "validate", "test": "test"}[split])
    return list(module._dataset(split))


def training_batches(module):
    return list(module.train_dataloader())


class Watch(LightningModule):
    """Keeps what it is given, and trains one number."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.batches = {"train": [], "val": [], "test": [], "predict": []}

    def training_step(self, batch):
        self.batches["train"].append(batch)
        return sum(image.float().mean() for image in batch[0]) * self.weight

    def validation_step(self, batch):
        self.batches["val"].append(batch)

    def test_step(self, batch):
        self.batches["test"].append(batch)

    def predict_step(self, batch):
        self.batches["predict"].append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def trainer(tmp_path, epochs=1, **options):
    return Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": epochs,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": tmp_path,
            **options,
        }
    )


# ---- through a trainer


def test_all_stages(coco_root, tmp_path, picture_folder):
    watch, run = Watch(), trainer(tmp_path)
    module = coco(
        coco_root,
        batch_size=3,
        num_workers=2,
        test_annotations="annotations/image_info_test2017.json",
        test_images=str(coco_root / "test2017"),
        predict_dir=str(picture_folder),
    )
    run.fit(watch, module)
    run.test(watch, module, verbose=False)
    run.predict(watch, module)
    # two of the 12 have no boxes to train on, and the last batch of one is left out
    assert [len(images) for images, _ in watch.batches["train"]] == [3, 3, 3]
    assert [len(images) for images, _ in watch.batches["val"]] == [3, 3, 1]
    for split, batches in watch.batches.items():
        for images, labels in batches:
            assert isinstance(images, list)
            assert isinstance(labels, list)
            assert all(type(image) is torch.Tensor and image.dtype == torch.uint8 for image in images)
            if split == "predict":
                assert all(os.path.isfile(path) for path in labels)
            else:
                assert all(type(value) is torch.Tensor for target in labels for value in target.values())
    assert [len(target["boxes"]) for _, targets in watch.batches["test"] for target in targets] == [0, 0, 0]
    assert [path for _, paths in watch.batches["predict"] for path in paths] == sorted(
        str(path) for path in picture_folder.rglob("*.*") if path.suffix != ".txt"
    )


def test_the_test_set_is_the_validation_set_unless_there_is_one(coco_root):
    known = coco(coco_root)
    # from a checkpoint, whose classes are known: the file of training is then left alone
    module = coco(coco_root, class_names=known.class_names, category_ids=known.category_ids)
    val, test = samples(module, "val"), samples(module, "test")
    assert [int(target["image_id"]) for _, target in val] == [int(target["image_id"]) for _, target in test]
    assert len(module._read) == 1


def test_pictures_to_predict_stand_upright(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.new("RGB", (40, 30)).save(tmp_path / "phone.jpg", exif=exif)
    # of a network whose classes are known, where nothing but the pictures is at hand
    module = COCODataModule("nowhere", predict_dir=str(tmp_path), class_names=["a", "b"], category_ids=[4, 90])
    module.setup("predict")
    ((images, paths),) = module.predict_dataloader()
    assert images[0].shape == (3, 40, 30)
    assert paths == [str(tmp_path / "phone.jpg")]
    assert (module.num_classes, module.class_names, module.category_ids) == (2, ["a", "b"], [4, 90])


def test_own_files_with_one_folder_of_pictures(tmp_path):
    miniature.make_coco(tmp_path / "coco")
    own = tmp_path / "own"
    shutil.copytree(tmp_path / "coco/train2017", own / "pictures")
    shutil.copytree(tmp_path / "coco/val2017", own / "pictures", dirs_exist_ok=True)
    shutil.copy(train_json(tmp_path / "coco"), own / "train.json")
    shutil.copy(val_json(tmp_path / "coco"), own / "val.json")
    module = coco(
        own,
        train_annotations="train.json",
        val_annotations=str(own / "val.json"),
        train_images="pictures",
        val_images="pictures",
    )
    module.setup("fit")
    assert len(module._dataset("train")) == 10
    assert len(module._dataset("val")) == 7


# ---- arguments


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("image_size", 0),
        ("image_size", 2.5),
        ("max_size", 799),
        ("max_size", None),
        ("batch_size", 0),
        ("num_workers", -1),
        ("scale_jitter", [1.0]),
        ("scale_jitter", [1.2, 0.8]),
        ("scale_jitter", [0.0, 1.0]),
        ("scale_jitter", [0.5, float("inf")]),
        ("scale_jitter", 0.5),
        ("scale_jitter", "ab"),
        ("horizontal_flip", 1.5),
        ("horizontal_flip", True),
        ("seed", -1),
    ],
)
def test_bad_values_are_named(argument, value):
    assert error_of(lambda: COCODataModule(**{argument: value})).startswith(f"{argument}={value!r}: expected ")


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"test_annotations": "a.json"}, "test_images=None: expected a value, since test_annotations is given"),
        ({"test_images": "a"}, "test_annotations=None: expected a value, since test_images is given; give both, or ne"),
        ({"class_names": ["a"]}, "category_ids=None: expected a value, since class_names is given; give both, or"),
        ({"category_ids": [1]}, "class_names=None: expected a value"),
        ({"class_names": [], "category_ids": []}, "class_names=[]: expected at least one name"),
        ({"class_names": ["a", "a"], "category_ids": [1, 2]}, "class_names=['a', 'a']: expected each name once"),
        ({"class_names": ["a", "b"], "category_ids": [1]}, "category_ids=[1]: expected one id for each of the 2 class"),
        ({"class_names": ["a", "b"], "category_ids": [2, 1]}, "category_ids=[2, 1]: expected one id for each of the 2"),
        ({"class_names": ["a", "b"], "category_ids": [2, 2]}, "category_ids=[2, 2]: expected"),
        (
            {"class_names": ["a", "b"], "category_ids": ["2", "10"]},
            "category_ids=['2', '10']: expected one id for each",
        ),
        ({"class_names": ["a", "b"], "category_ids": ["2", 10]}, "category_ids=['2', 10]: expected one id for each"),
        ({"class_names": ["a"], "category_ids": [1.5]}, "category_ids=[1.5]: expected whole numbers or text"),
    ],
)
def test_arguments_that_go_together(options, phrase):
    assert error_of(lambda: COCODataModule(**options)).startswith(phrase)


def test_the_command_line_sees_every_argument():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(BaseDataModule, "data")
    words = ["--data=awconv.data.COCODataModule", "--data.scale_jitter=[0.5, 2]", "--data.category_ids=[1, 3]"]
    parsed = parser.parse_args(words)
    own = set(inspect.signature(COCODataModule.__init__).parameters) - {"self", "common"}
    common = set(inspect.signature(BaseDataModule.__init__).parameters) - {"self"}
    assert set(parsed.data.init_args.keys()) == own | common
    again = yaml.safe_load(parser.dump(parsed))["data"]["init_args"]
    assert (again["scale_jitter"], again["category_ids"]) == ([0.5, 2.0], [1, 3])
    # text stays text and numbers stay numbers, whatever is asked for first elsewhere: typing takes both for one type
    assert typing.Optional[list[int | str]] is not None  # noqa: UP045
    for ids in ([1, 3], ["1", "3"], [3, "3"], ["true", "null"], [2**70]):
        parsed = parser.parse_args([words[0], f"--data.category_ids={json.dumps(ids)}"])
        again = parser.parse_string(parser.dump(parsed, format="json"))
        assert parsed.data.init_args.category_ids == again.data.init_args.category_ids == ids
    for wrong in ("--data.scale_jitter=[0.5]", "--data.batchsize=3", "--data.photometric=maybe"):
        with pytest.raises(Exception, match=r"scale_jitter|batchsize|photometric"):
            parser.parse_args([words[0], wrong])


def test_hyperparameters_are_all_there_and_survive_a_checkpoint(coco_root, tmp_path):
    run = trainer(tmp_path)
    run.fit(Watch(), coco(coco_root, scale_jitter=[0.9, 1.1]))
    run.save_checkpoint(tmp_path / "a.ckpt")
    hparams = torch.load(tmp_path / "a.ckpt", weights_only=True)["datamodule_hyper_parameters"]
    own = set(inspect.signature(COCODataModule.__init__).parameters) - {"self", "common"}
    common = set(inspect.signature(BaseDataModule.__init__).parameters) - {"self"}
    assert own | common <= set(hparams)
    assert yaml.safe_load(yaml.safe_dump(dict(hparams)))["scale_jitter"] == [0.9, 1.1]
    again = COCODataModule.load_from_checkpoint(tmp_path / "a.ckpt")
    assert (again.root, again.image_size, list(again.scale_jitter)) == (str(coco_root), 64, [0.9, 1.1])


# ---- categories


def test_categories_are_numbered_by_their_ids(coco_root):
    module = coco(coco_root)
    assert module.category_ids == [1, 3, 18, 44, 90]
    assert module.class_names == ["person", "car", "dog", "bottle", "toothbrush"]
    assert module.num_classes == 5
    # no pictures were needed for this, and of the files that of training alone
    assert [Path(path).name for path in module._read] == ["instances_train2017.json"]


def test_categories_come_from_whichever_file_is_there(coco_root):
    train_json(coco_root).unlink()
    assert coco(coco_root).category_ids == [1, 3, 18, 44, 90]
    val_json(coco_root).unlink()
    tests = {"test_annotations": "annotations/image_info_test2017.json", "test_images": "test2017"}
    assert coco(coco_root, **tests).category_ids == [1, 3, 18, 44, 90]
    message = error_of(lambda: coco(coco_root).class_names)
    assert message.startswith(
        f"val_annotations='{val_json(coco_root)}': expected a COCO annotation file, and there is "
    )
    assert "get COCO 2017 from https://cocodataset.org" in message
    assert f"root='{coco_root}'" in message


def lists(*categories, annotated=()):
    """Changes a file's list of categories, and annotates the first picture with those of the ids `annotated`."""

    def change(content):
        content["categories"] = [{"id": number, "name": name} for number, name in categories]
        place = {"image_id": content["images"][0]["id"], "bbox": [1, 1, 9, 9]}
        content["annotations"] = [{**place, "category_id": number} for number in annotated]

    return change


ALL = sorted(miniature.COCO_CATEGORIES.items())


@pytest.mark.parametrize(
    ("train", "val", "labels"),
    [
        # what occurs, as some tools list it: labels stay those of training
        (lists(*ALL, annotated=[3]), lists((90, "toothbrush"), (3, "car"), annotated=[90, 3]), [5, 2]),
        # besides, but annotated nowhere
        (lists(*ALL, annotated=[3]), lists(*ALL, (7, "kite"), (100, "cup"), annotated=[90]), [5]),
        (lists(*ALL[:2], annotated=[3]), lists(*ALL, annotated=[3, 1]), [2, 1]),
        # in another order
        (lists(*ALL, annotated=[3]), lists(*ALL[::-1], annotated=[90]), [5]),
        # numbers as whole floats
        (lists(*ALL, annotated=[3]), lists((90.0, "toothbrush"), annotated=[90]), [5]),
        (
            lists(*ALL, annotated=[3]),
            lists(*ALL, (7, "kite"), annotated=[7]),
            "found 'kite' (id 7); give both the same",
        ),
        (lists(*ALL, annotated=[3]), lists((44, "cup"), annotated=[]), "found 'cup' (id 44); give both the same ids"),
        (lists(*ALL, annotated=[3]), lists((5, "bottle"), annotated=[5]), "found 'bottle' (id 5); give"),
        (lists(*ALL, annotated=[3]), lists(("44", "bottle"), annotated=["44"]), "found 'bottle' (id '44'); give"),
        (
            lists(*ALL, annotated=[3]),
            lists(*((200 + n, f"n{n}") for n in range(5)), annotated=range(200, 205)),
            "found 'n0' (id 200), 'n1' (id 201), 'n2' (id 202), ... (5 in all); give",
        ),
    ],
)
def test_the_list_of_training_is_the_truth(coco_root, train, val, labels):
    edit(train_json(coco_root), train)
    edit(val_json(coco_root), val)
    module = coco(coco_root)
    names, ids = module.class_names, module.category_ids
    start = f"val_annotations='{val_json(coco_root)}': expected no categories besides the {len(ids)} of "
    if isinstance(labels, str):
        assert error_of(module.setup, "fit").startswith(f"{start}train_annotations='{train_json(coco_root)}', {labels}")
        # and where they are given
        message = error_of(coco(coco_root, class_names=names, category_ids=ids).setup, "test")
        assert message.startswith(
            f"{start}class_names and category_ids (those of the checkpoint, if one is given), {labels}"
        )
        return
    assert samples(module, "val")[0][1]["labels"].tolist() == labels
    assert (module.class_names, module.category_ids) == (names, ids)
    given = coco(coco_root, class_names=names, category_ids=ids)
    assert samples(given, "test")[0][1]["labels"].tolist() == labels


@pytest.fixture
def said(monkeypatch):
    """The lines that the data module says."""
    lines = []
    monkeypatch.setattr("awconv.data.detection.inform", lines.append)
    return lines


def rooted(*categories, annotated):
    """A list of (id, name, supercategory), and annotations of the ids `annotated` in the first picture."""

    def change(content):
        lists(*((number, name) for number, name, _ in categories), annotated=annotated)(content)
        for category, (*_, above) in zip(content["categories"], categories, strict=True):
            category["supercategory"] = above

    return change


ROOT = (0, "fruit", "none")
APPLE, PEAR = (1, "apple", "fruit"), (2, "pear", "fruit")


@pytest.mark.parametrize(
    ("categories", "train", "val", "left_out"),
    [
        # as Roboflow writes them
        ((ROOT, APPLE, PEAR), [1, 2], [2], [(0, "fruit")]),
        ((APPLE, PEAR, (7, "fruit", None)), [1, 2], [2], [(7, "fruit")]),
        (((0, "apple", "none"), (1, "apple", "apple")), [1], [1], [(0, "apple")]),
        # one that merely does not occur
        ((APPLE, PEAR), [1], [1], []),
        ((ROOT, APPLE, (2, "nut", "seed")), [1], [1], []),
        (((0, "fruit", "fruit"), APPLE, PEAR), [1], [1], []),
        # one that is annotated, be it in validation alone
        ((ROOT, APPLE, PEAR), [0, 1], [1], []),
        ((ROOT, APPLE, PEAR), [1], [0], []),
    ],
)
def test_a_root_of_all_categories_that_owns_nothing_is_left_out(coco_root, said, categories, train, val, left_out):
    edit(train_json(coco_root), rooted(*categories, annotated=train))
    edit(val_json(coco_root), rooted(*categories, annotated=val))
    module = coco(coco_root)
    kept = [(number, name) for number, name, _ in categories if (number, name) not in left_out]
    assert list(zip(module.category_ids, module.class_names, strict=True)) == kept
    module.setup("fit")
    start = f"train_annotations='{train_json(coco_root)}': category "
    assert [line.partition(" left out: it has no annotations")[0] for line in said if " left out: " in line] == [
        f"{start}{name!r} (id {number})" for number, name in left_out
    ]
    labels = module._dataset("val").annotations.labels.tolist()
    assert [module.category_ids[label - 1] for label in labels] == val


def test_a_root_with_boxes_whose_name_is_anothers_is_refused(coco_root):
    categories = (0, "apple", "none"), (1, "apple", "apple")
    edit(train_json(coco_root), rooted(*categories, annotated=[1]))
    edit(val_json(coco_root), rooted(*categories, annotated=[0]))
    assert "every name of a category once, found 'apple' several times" in error_of(coco(coco_root).setup, "fit")


def test_categories_without_boxes_are_said_before_training(coco_root, said):
    edit(train_json(coco_root), lists(*ALL, annotated=[3, 90]))
    module = coco(coco_root)
    module.setup("fit")
    assert said[0] == (
        f"train_annotations='{train_json(coco_root)}': 3 of the 5 categories have no boxes: 'person' (id 1), "
        "'dog' (id 18), 'bottle' (id 44)"
    )
    assert not [line for line in said[1:] if "categories have" in line]
    # nothing at all to learn from
    edit(train_json(coco_root), lists(*ALL))
    assert "none of its 12 pictures has a box" in error_of(coco(coco_root, keep_empty=True).setup, "fit")


def test_prediction_skips_what_cannot_be_read(tmp_path):
    PIL.Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_bytes(b"no picture")
    options = {"predict_dir": str(tmp_path), "class_names": ["a"], "category_ids": [1], "num_workers": 0}
    ((images, paths),) = COCODataModule(**options).predict_dataloader()
    assert paths == [str(tmp_path / "a.png"), ""]
    assert paths[1].path == str(tmp_path / "b.jpg")
    assert [image.dtype for image in images] == [torch.uint8, torch.uint8]
    assert "b.jpg: this file is not a picture" in error_of(
        list, COCODataModule(**options, on_bad_image="stop").predict_dataloader()
    )


def test_all_images_are_checked_where_that_is_asked_for(coco_root):
    bad = sorted((coco_root / "val2017").iterdir())[2]
    bad.write_bytes(bad.read_bytes()[:-300])
    coco(coco_root).setup("fit")
    message = error_of(coco(coco_root, check_images=True).setup, "fit")
    assert message.startswith("check_images=True: 1 of the ")
    assert f"images of train and val cannot be read: {bad}: this picture cannot be read (" in message


def test_bad_images_are_left_out_of_training_alone_and_only_where_asked_for(coco_root, said):
    def skipping():
        return coco(coco_root, keep_empty=True, on_bad_image="skip")

    files = sorted((coco_root / "train2017").iterdir())
    files[3].unlink()
    files[4].write_bytes(b"no picture")
    assert " are missing, such as " in error_of(coco(coco_root).setup, "fit")
    module = skipping()
    module.setup("fit")
    assert len(module._dataset("train")) == 10
    start = f"train_annotations='{train_json(coco_root)}': 1 of its "
    assert [line.split(", such as")[0] for line in said if "left out" in line] == [
        f"{start}12 images left out, which are missing",
        f"{start}11 images left out, which cannot be read",
    ]
    # one that turns out to be damaged later
    files[5].write_bytes(files[5].read_bytes()[:-900])
    with pytest.warns(UserWarning, match=f"skipped {files[5]}"):
        assert len(samples(module, "train")) == 10
    # the average precision of fewer images would be another one
    val = sorted((coco_root / "val2017").iterdir())[3]
    whole = val.read_bytes()
    val.write_bytes(whole[:-900])
    module = skipping()
    module.setup("validate")
    assert error_of(lambda: list(module._dataset("val"))).startswith(f"{val}: ")
    val.unlink()
    assert "1 of the 7 pictures of val_annotations=" in error_of(skipping().setup, "validate")


def test_given_categories_that_agree_change_nothing(coco_root):
    plain = coco(coco_root)
    given = coco(coco_root, class_names=plain.class_names, category_ids=plain.category_ids)
    for (_, first), (_, second) in zip(samples(plain, "val"), samples(given, "val"), strict=True):
        assert torch.equal(first["labels"], second["labels"])


def test_a_subclass_with_constants_and_a_file_of_its_own_making(tmp_path):
    class Made(COCODataModule):
        class_names: ClassVar = [miniature.COCO_CATEGORIES[number] for number in sorted(miniature.COCO_CATEGORIES)]
        category_ids: ClassVar = sorted(miniature.COCO_CATEGORIES)

        def prepare_data(self):
            miniature.make_coco(self.root)

    module = Made(str(tmp_path / "made"), image_size=64, max_size=100, num_workers=0)
    assert module.num_classes == 5
    watch = Watch()
    trainer(tmp_path).fit(watch, module)
    assert len(watch.batches["val"]) == 4


# ---- bad data, said at setup


@pytest.mark.parametrize("split", ["train", "val"])
def test_bad_data_are_said_before_anything_runs(coco_root, split):
    path, folder = coco_root / f"annotations/instances_{split}2017.json", coco_root / f"{split}2017"
    good = path.read_text()
    module = coco(coco_root, class_names=coco(coco_root).class_names, category_ids=coco(coco_root).category_ids)

    def said():
        fresh = coco(coco_root, **{name: module.hparams[name] for name in ("class_names", "category_ids")})
        return error_of(fresh.setup, "fit")

    path.write_text("{")
    assert said().startswith(f"{split}_annotations='{path}': this file is not JSON")
    path.unlink()
    assert said().startswith(f"{split}_annotations='{path}': expected a COCO annotation file, and there is none; get ")
    path.write_text(good)
    edit(path, lambda c: c.pop("annotations"))
    assert "and there are no annotations; choose another file" in said()
    edit(path, lambda c: c.__setitem__("annotations", []))
    assert f"none of its {12 if split == 'train' else 7} pictures has a box (that is not a crowd's)" in said()
    path.write_text(good)
    edit(path, lambda c: [a.__setitem__("iscrowd", 1) for a in c["annotations"]])
    assert "pictures has a box (that is not a crowd's)" in said()
    path.write_text(good)
    sorted(folder.iterdir())[2].unlink()
    assert said().startswith(
        f"{split}_images='{folder}': 1 of the {12 if split == 'train' else 7} pictures of {split}_"
    )
    shutil.rmtree(folder)
    message = said()
    assert message.startswith(f"{split}_images='{folder}': expected a folder of pictures, and there is none; get COCO")
    assert f"--data.{split}_images" in message


def test_a_truncated_picture_is_named_when_it_is_read(coco_root):
    module = coco(coco_root, num_workers=2)
    module.setup("fit")
    path = sorted((coco_root / "val2017").glob("*.png"))[0]
    path.write_bytes(path.read_bytes()[:-2000])
    assert error_of(lambda: list(module.val_dataloader())).startswith(f"{path}: this picture cannot be read")


def test_predict_needs_pictures(tmp_path):
    module = COCODataModule(predict_dir=str(tmp_path), class_names=["a"], category_ids=[1])
    assert error_of(module.setup, "predict").startswith(f"predict_dir='{tmp_path}': expected images (")


def test_what_was_clipped_and_dropped_is_said_once(coco_root, said):
    module = coco(coco_root)
    for stage in ("fit", "validate", "test"):
        module.setup(stage)
    assert [line.split("=")[0] for line in said] == ["train_annotations", "val_annotations"]
    assert all(
        line.endswith(
            ": 1 of its boxes clipped, which reached out of their pictures, and 1 dropped, which had no area in them "
            "(a bbox is x, y, width, height)"
        )
        for line in said
    )
    assert (module._dataset("val").annotations.clipped, module._dataset("val").annotations.dropped) == (1, 1)


# ---- training samples


def test_crowds_and_empty_pictures_do_not_train(coco_root):
    occupied = samples(coco(coco_root), "train")
    kept = samples(coco(coco_root, keep_empty=True), "train")
    assert (len(occupied), len(kept)) == (10, 12)
    assert all(len(target["boxes"]) > 0 and not target["iscrowd"].any() for _, target in occupied)
    empty = [target for _, target in kept if len(target["boxes"]) == 0]
    assert [target["boxes"].shape for target in empty] == [(0, 4), (0, 4)]
    assert [target["labels"].dtype for target in empty] == [torch.int64] * 2


@given(
    height=st.integers(8, 200),
    width=st.integers(8, 200),
    image_size=st.integers(8, 96),
    room=st.floats(1, 3),
    low=st.floats(0.3, 1.5),
    spread=st.floats(1, 2),
    seed=st.integers(0, 999),
)
@settings(max_examples=100, deadline=None)
def test_a_training_picture_is_brought_to_size(height, width, image_size, room, low, spread, seed):
    max_size = round(image_size * room)
    module = COCODataModule(
        image_size=image_size, max_size=max_size, scale_jitter=(low, low * spread), horizontal_flip=0.0
    )
    torch.manual_seed(seed)
    boxes = torch.tensor([[0.0, 0.0, width, height], [width / 4, height / 4, width / 2, height]])
    target = {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
        "labels": torch.tensor([1, 2]),
        "area": torch.tensor([1.0, 2.0]) * height * width,
        "iscrowd": torch.tensor([0, 0]),
        "image_id": torch.tensor(5),
    }
    image = tv_tensors.Image(torch.zeros(3, height, width, dtype=torch.uint8))
    found, out = module.train_transform()(image, target)
    new_height, new_width = found.shape[1:]
    assert max(new_height, new_width) <= max_size
    at_evaluation = min(image_size / min(height, width), max_size / max(height, width))
    limits = [min(factor * at_evaluation, max_size / max(height, width)) for factor in (low, low * spread)]
    for old, new in ((height, new_height), (width, new_width)):
        assert max(1, round(old * limits[0])) <= new <= max(1, round(old * limits[1]))
    # the boxes and their areas are scaled with the pixels; those below a pixel are gone
    scaled = boxes * torch.tensor([new_width / width, new_height / height] * 2)
    kept = [label - 1 for label in out["labels"].tolist()]
    assert set(kept) == {n for n in (0, 1) if (scaled[n, 2:] - scaled[n, :2]).min() >= 1}
    assert torch.allclose(out["boxes"], scaled[kept], atol=1e-3)
    assert torch.allclose(out["area"], (torch.tensor([1.0, 2.0]) * new_height * new_width)[kept], rtol=1e-4)


@pytest.mark.parametrize("size", [(48, 64), (64, 48), (20, 90), (50, 50), (481, 640)])
def test_without_jitter_the_size_is_that_of_evaluation(size):
    module = COCODataModule(image_size=64, max_size=100)
    target = {
        "boxes": tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=size),
        "labels": torch.zeros(0, dtype=torch.int64),
        "area": torch.zeros(0),
        "iscrowd": torch.zeros(0, dtype=torch.int64),
    }
    image, _ = module.train_transform()(tv_tensors.Image(torch.zeros(3, *size, dtype=torch.uint8)), target)
    detector = GeneralizedRCNNTransform(64, 100, [0.0] * 3, [1.0] * 3)
    expected = detector([torch.zeros(3, *size)])[0].image_sizes[0]
    # which rounds down
    assert all(0 <= found - other <= 1 for found, other in zip(image.shape[1:], expected, strict=True))


def test_flips_take_the_boxes_along(coco_root):
    plain = samples(coco(coco_root, horizontal_flip=0.0), "train")
    flipped = samples(coco(coco_root, horizontal_flip=1.0), "train")
    for (image, target), (mirrored, other) in zip(plain, flipped, strict=True):
        assert torch.equal(mirrored, image.flip(-1))
        x1, y1, x2, y2 = target["boxes"].T
        width = image.shape[-1]
        assert torch.allclose(other["boxes"], torch.stack([width - x2, y1, width - x1, y2], dim=1), atol=1e-4)
        assert torch.equal(other["labels"], target["labels"])


def test_boxes_of_training_lie_in_their_pictures(coco_root):
    for image, target in samples(coco(coco_root, scale_jitter=(0.3, 2.0)), "train"):
        height, width = image.shape[1:]
        x1, y1, x2, y2 = target["boxes"].T
        assert min(x1.min(), y1.min()) >= 0
        assert x2.max() <= width
        assert y2.max() <= height
        assert ((x2 > x1) & (y2 > y1)).all()
        assert len({len(target[key]) for key in ("boxes", "labels", "area", "iscrowd")}) == 1


def test_a_box_that_leaves_its_picture_a_little_is_cut_off_and_kept(coco_root):
    """Picture 5 of the miniature has one that ends 0.4 pixels beyond the right edge."""
    (files,) = (json.loads(train_json(coco_root).read_text()),)
    image_id = files["images"][5]["id"]
    boxes = [a["bbox"] for a in files["annotations"] if a["image_id"] == image_id]
    module = coco(coco_root, image_size=64, max_size=96, horizontal_flip=0.0)
    (found,) = [(i, t) for i, t in samples(module, "train") if int(t["image_id"]) == image_id]
    image, target = found
    assert len(target["boxes"]) == len(boxes) == 2
    assert target["boxes"][:, 2].max() == image.shape[-1]


def test_photometric_changes_colours_alone(coco_root):
    seed_everything(3)
    plain = samples(coco(coco_root, horizontal_flip=0.0), "train")
    loud = samples(coco(coco_root, horizontal_flip=0.0, photometric=True), "train")
    changed = 0
    for (image, target), (other, same) in zip(plain, loud, strict=True):
        assert other.dtype == torch.uint8
        assert image.shape == other.shape
        assert torch.equal(target["boxes"], same["boxes"])
        changed += not torch.equal(image, other)
    assert changed >= 8


def test_boxes_that_shrink_below_a_pixel_are_left_out(coco_root):
    edit(
        train_json(coco_root),
        lambda c: c["annotations"].append(
            {"image_id": c["images"][0]["id"], "category_id": 90, "bbox": [3, 3, 1.2, 30]}
        ),
    )
    assert 5 in samples(coco(coco_root), "train")[0][1]["labels"]
    small = samples(coco(coco_root, image_size=32, max_size=64), "train")
    assert 5 not in small[0][1]["labels"]
    assert len(small[0][1]["labels"]) == len(small[0][1]["area"]) == 1


def flat(batches):
    return [(image, target) for images, targets in batches for image, target in zip(images, targets, strict=True)]


def test_augmentation_follows_from_the_runs_seed_and_not_from_the_workers(coco_root):
    def passes(workers, seed=4):
        seed_everything(seed)
        loader = coco(coco_root, photometric=True, scale_jitter=(0.7, 1.3), num_workers=workers).train_dataloader()
        return [flat(loader) for _ in range(2)]

    first, again, other = passes(0), passes(2), passes(0, seed=5)
    for one, two in zip(first, again, strict=True):
        for (image, target), (image_again, target_again) in zip(one, two, strict=True):
            assert torch.equal(image, image_again)
            assert all(torch.equal(target[key], target_again[key]) for key in target)

    def key(run):
        return [(int(target["image_id"]), image.shape, image.sum().item()) for image, target in run]

    assert key(first[0]) != key(first[1])
    assert key(first[0]) != key(other[0])


def test_overfitting_takes_the_same_pictures_every_epoch(coco_root, tmp_path):
    watch = Watch()
    trainer(tmp_path, epochs=2, overfit_batches=2).fit(watch, coco(coco_root, scale_jitter=(0.7, 1.3)))
    first, second = (flat(watch.batches["train"][at : at + 2]) for at in (0, 2))
    assert len(first) == 4
    for (image, target), (other, same) in zip(first, second, strict=True):
        assert torch.equal(image, other)
        assert torch.equal(target["boxes"], same["boxes"])


def test_data_sets_travel_to_spawned_workers(coco_root):
    module = coco(coco_root, photometric=True)
    for split in ("train", "val"):
        dataset = module.load_split(split)
        copied = pickle.loads(pickle.dumps(dataset))
        assert [int(target["image_id"]) for _, target in copied] == dataset.annotations.image_ids.tolist()


def test_a_resumed_run_sees_what_the_uninterrupted_one_saw(coco_root, tmp_path):
    def seen(watch):
        return [(int(target["image_id"]), image.sum().item()) for image, target in flat(watch.batches["train"])]

    whole, first, second = Watch(), Watch(), Watch()
    seed_everything(2)
    trainer(tmp_path, epochs=3).fit(whole, coco(coco_root, num_workers=1))
    seed_everything(2)
    run = trainer(tmp_path, epochs=1)
    run.fit(first, coco(coco_root, num_workers=1))
    run.save_checkpoint(tmp_path / "first.ckpt")
    seed_everything(2)
    trainer(tmp_path, epochs=3).fit(second, coco(coco_root), ckpt_path=tmp_path / "first.ckpt", weights_only=True)
    assert seen(first) + seen(second) == seen(whole)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("grouped", [False, True])
def test_a_run_resumed_inside_an_epoch_goes_on_where_it_stopped(tmp_path, recwarn, workers, grouped):
    root = miniature.make_coco(tmp_path / "coco", train=23)

    def module():
        return coco(root, batch_size=2, num_workers=workers, group_aspect_ratio=grouped)

    def seen(watch):
        return [[int(target["image_id"]) for target in targets] for _, targets in watch.batches["train"]]

    seed_everything(2)
    whole, keep = Watch(), ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    # 10 steps an epoch; a checkpoint is also written after the validation in the middle
    run = trainer(tmp_path, 3, enable_checkpointing=True, callbacks=[keep], val_check_interval=0.5)
    run.fit(whole, module())
    assert len(seen(whole)) == 30
    for step in (1, 5, 10, 14, 20, 29):
        seed_everything(2)
        rest = Watch()
        trainer(tmp_path, 3, val_check_interval=0.5).fit(
            rest, module(), ckpt_path=tmp_path / f"step={step}.ckpt", weights_only=True
        )
        assert seen(rest) == seen(whole)[step:], step
    assert not [w for w in recwarn if "not resumable" in str(w.message)]


# ---- batches of one shape


def is_wide(image):
    return image.shape[-1] >= image.shape[-2]


def test_batches_are_wide_or_tall(tmp_path):
    root = miniature.make_coco(tmp_path / "coco", train=43)
    mixed = {True: 0, False: 0}
    for grouped in mixed:
        module = coco(root, batch_size=4, group_aspect_ratio=grouped)
        loader = module.train_dataloader()
        for _ in range(3):
            batches = list(loader)
            assert len(batches) == 41 // 4
            kinds = [{is_wide(image) for image in images} for images, _ in batches]
            mixed[grouped] += sum(len(kind) == 2 for kind in kinds)
            if grouped:
                assert all(len(kind) == 1 for kind in kinds[:-1])
    assert mixed[True] <= 3 < mixed[False]


@given(
    groups=st.lists(st.integers(0, 2), min_size=1, max_size=60),
    world=st.integers(1, 4),
    batch_size=st.integers(1, 5),
    epoch=st.integers(0, 3),
    seed=st.integers(0, 2**61),
)
@settings(max_examples=200, deadline=None)
def test_grouped_order(groups, world, batch_size, epoch, seed):
    groups = np.array(groups)

    def order(kind, **options):
        samplers = [kind(groups, num_replicas=world, rank=rank, seed=seed, **options) for rank in range(world)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        keys = [list(sampler) for sampler in samplers]
        assert [len(mine) for mine in keys] == [len(sampler) for sampler in samplers]
        assert all(number == epoch for mine in keys for number, _ in mine)
        return [[index for _, index in mine] for mine in keys]

    grouped = order(GroupedSampler, groups=groups, batch_size=batch_size)
    assert grouped == order(GroupedSampler, groups=groups, batch_size=batch_size)
    # the same samples, as often, as without groups
    plain = order(TrainingSampler)
    assert Counter(itertools.chain(*grouped)) == Counter(itertools.chain(*plain))
    # batches of all processes together: pure, and at the end what fills none
    everyone = [[mine[at : at + batch_size] for mine in grouped] for at in range(0, len(grouped[0]), batch_size)]
    kinds = [{int(groups[index]) for mine in batch for index in mine} for batch in everyone]
    drawn = Counter(int(groups[index]) for mine in grouped for index in mine)
    full = sum(count // (batch_size * world) for count in drawn.values())
    assert all(len(kind) == 1 for kind in kinds[:full])
    if len(drawn) == 1:
        assert grouped == plain
    # epochs follow each other by themselves, as a resumed run expects
    sampler = GroupedSampler(groups, world, 0, seed=seed, groups=groups, batch_size=batch_size)
    runs = [list(sampler) for _ in range(epoch + 1)]
    assert [index for _, index in runs[-1]] == grouped[0]


# ---- evaluation by several processes


@pytest.mark.parametrize("world", [2, 3, 5])
def test_padding_repeats_an_image_id(coco_root, world):
    module = coco(coco_root, batch_size=2)
    dataset = module.load_split("val")
    ids = []
    for rank in range(world):
        sampler = EvaluationSampler(dataset, world, rank)
        loader = Loader(EvaluationSet(dataset), sampler=sampler, batch_size=2, collate_fn=module.collate)
        targets = [target for _, targets in loader for target in targets]
        assert all(set(target) == {"boxes", "labels", "image_id", "area", "iscrowd"} for target in targets)
        ids.append([int(target["image_id"]) for target in targets])
    assert len({len(mine) for mine in ids}) == 1
    counts = Counter(itertools.chain(*ids))
    assert sorted(counts) == sorted(dataset.annotations.image_ids.tolist())
    padding = {number: count for number, count in counts.items() if count > 1}
    first = int(dataset.annotations.image_ids[0])
    assert padding == ({first: 1 + -7 % world} if 7 % world else {})


TWO_PROCESSES = """
import sys
sys.path[:0] = [{here!r}, {tests!r}]
import torch
from lightning.pytorch import seed_everything
from test_detection import Watch, coco, is_wide, trainer

class Tell(Watch):
    def tell(self, name):
        mine = [[(int(t["image_id"]), is_wide(i)) for i, t in zip(*batch)] for batch in self.batches[name]]
        found = [None, None]
        torch.distributed.all_gather_object(found, mine)
        if self.global_rank == 0:
            print(name, found, flush=True)
    def on_train_epoch_end(self): self.tell("train")
    def on_validation_end(self): self.tell("val")

if __name__ == "__main__":
    seed_everything(1)
    run = trainer({out!r}, devices=2, strategy="ddp_fork")
    run.fit(Tell(), coco({root!r}, batch_size=2))
"""


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path):
    root = miniature.make_coco(tmp_path / "coco", train=23)
    here = Path(__file__).parent
    script = tmp_path / "run.py"
    script.write_text(
        TWO_PROCESSES.format(here=str(here), tests=str(here.parent), out=str(tmp_path / "out"), root=str(root))
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.split(" ")[0] in Watch().batches)
    found = {name: eval(text) for name, text in lines.items()}
    # 21 pictures with boxes: 11 for each, in 5 full batches, of one shape in both processes but for the leftover
    first, second = found["train"]
    assert [len(batch) for batch in first] == [len(batch) for batch in second] == [2] * 5
    shapes = [{wide for _, wide in one + other} for one, other in zip(first, second, strict=True)]
    assert all(len(kinds) == 1 for kinds in shapes[:-1])
    assert max(Counter(number for batch in first + second for number, _ in batch).values()) <= 2
    ids = Counter(number for batches in found["val"] for batch in batches for number, _ in batch)
    assert len(ids) == 7
    assert sum(ids.values()) == 8
    # once for the run and not once for each process
    assert done.stderr.count("val_annotations=") == 1


def test_training_and_evaluation_pictures_are_made_smaller_alike(tmp_path):
    """Smoothed in the one and not in the other, they would be pictures of two kinds."""
    noise = tv_tensors.Image(torch.randint(0, 256, (3, 240, 320), dtype=torch.uint8))
    target = {"boxes": tv_tensors.BoundingBoxes([[10, 20, 200, 220]], format="XYXY", canvas_size=(240, 320))}
    target |= {"labels": torch.tensor([1]), "area": torch.tensor([38000.0]), "iscrowd": torch.tensor([0])}
    module = COCODataModule(str(tmp_path), image_size=60, max_size=80, horizontal_flip=0.0)
    trained, _ = module.train_transform()(noise, target)
    evaluated, _ = GeneralizedRCNNTransform(60, 80, [0.0] * 3, [1.0] * 3).resize(noise.float() / 255, None)
    assert trained.shape == evaluated.shape
    # a byte is rounded, a float is not
    assert (trained.float() / 255 - evaluated).abs().max() < 1.01 / 255
