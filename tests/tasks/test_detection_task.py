"""What DetectionTask trains, measures, refuses and keeps."""

import re
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from torch.utils.data import DataLoader

from awconv.data import COCODataModule
from awconv.data.digit_scenes import write_digit_scenes
from awconv.errors import InputError
from awconv.tasks import ClassificationTask, DetectionTask

PROJECT = Path(__file__).parents[2]
SMALL = {
    "image_size": 64,
    "max_size": 96,
    "num_classes": 3,
    "levels": [8, 16],
    "fpn_channels": 32,
    "optimizer": "sgd",
    "lr": 0.01,
}
FASTER = {
    "anchor_sizes": [12, 24, 48],
    "options": {
        "rpn_pre_nms_top_n_train": 50,
        "rpn_post_nms_top_n_train": 50,
        "rpn_pre_nms_top_n_test": 50,
        "rpn_post_nms_top_n_test": 50,
        "box_detections_per_img": 20,
    },
}


def task(head="faster_rcnn", **changes) -> DetectionTask:
    torch.manual_seed(0)
    options = {**SMALL, **changes}
    options = {**(FASTER if head == "faster_rcnn" else {}), **options}
    return DetectionTask(head, options.pop("backbone", "resnet10t"), **options)


def scenes(count: int = 8, boxes: int = 2, seed: int = 0) -> list:
    """Pictures of noise with a bright rectangle in each box."""
    generator = np.random.default_rng(seed)
    samples = []
    for image_id in range(count):
        image = torch.tensor(generator.integers(0, 60, (3, 64, 72)), dtype=torch.uint8)
        corners = generator.integers(2, 30, (boxes, 2))
        found = np.concatenate([corners, corners + generator.integers(16, 30, (boxes, 2))], axis=1)
        for x1, y1, x2, y2 in found:
            image[:, y1:y2, x1:x2] = 230
        target = {
            "boxes": torch.tensor(found, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(generator.integers(1, 4, boxes), dtype=torch.int64),
            "image_id": torch.tensor(image_id),
            "area": torch.tensor((found[:, 2] - found[:, 0]) * (found[:, 3] - found[:, 1]), dtype=torch.float32),
            "iscrowd": torch.zeros(boxes, dtype=torch.int64),
        }
        samples.append((image, target))
    return samples


def loader(samples: list, batch_size: int = 2) -> DataLoader:
    return DataLoader(samples, batch_size, collate_fn=lambda batch: tuple(map(list, zip(*batch, strict=True))))


def trainer(tmp_path, **options) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return L.Trainer(
        **{"default_root_dir": tmp_path, "accelerator": "cpu", "logger": False, "max_epochs": 1, **quiet, **options}
    )


PARTS = {
    "faster_rcnn": {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"},
    "retinanet": {"loss_classification", "loss_bbox_regression"},
    "fcos": {"loss_classification", "loss_bbox_regression", "loss_bbox_ctrness"},
}


@pytest.mark.parametrize("head", PARTS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_losses_are_logged_by_component_and_add_up(tmp_path, head, precision):
    run = trainer(tmp_path, limit_train_batches=1, precision=precision)
    run.fit(task(head), loader(scenes()))
    logged = {k.removeprefix("train/"): float(v) for k, v in run.logged_metrics.items() if k.startswith("train/")}
    assert set(logged) == {"loss", *PARTS[head]}
    assert logged["loss"] == pytest.approx(sum(logged[name] for name in PARTS[head]), rel=1e-5)
    assert logged["loss"] > 0


class Oracle(DetectionTask):
    """A "detector" that knows the answer, and marks each rectangle's left half as well, with less conviction."""

    samples: list

    def forward(self, images, targets=None):
        found = []
        for image in images:
            (target,) = (t for i, t in self.samples if torch.equal(i, image))
            half = target["boxes"].clone()
            half[:, 2] = (half[:, 0] + half[:, 2]) / 2
            found.append(
                {
                    "boxes": torch.cat([target["boxes"], half]),
                    "scores": torch.linspace(1, 0.1, 2 * len(half)),
                    "labels": target["labels"].repeat(2),
                }
            )
        return found


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("repeated", [0, 3])
def test_every_picture_counts_once(tmp_path, batch_size, repeated):
    samples = scenes(8)
    oracle = Oracle("faster_rcnn", "resnet10t", **SMALL, **FASTER)
    oracle.samples = samples
    for split, run in (("val", trainer(tmp_path).validate), ("test", trainer(tmp_path).test)):
        (measured,) = run(oracle, loader(samples + samples[:repeated], batch_size), verbose=False)
        # all true boxes come first, so the false ones cost nothing
        assert measured[f"{split}/map"] == measured[f"{split}/map_50"] == pytest.approx(1)
        # with one box a picture and class, of several of a class one is found
        classes = [t["labels"].tolist() for _, t in samples]
        recalls = [sum(k in c for c in classes) / sum(c.count(k) for c in classes) for k in (1, 2, 3)]
        assert measured[f"{split}/mar_1"] == pytest.approx(sum(recalls) / 3)
        assert f"{split}/map_large" not in measured
    assert len(oracle.test_map.results()) == sum(2 * len(t["labels"]) for _, t in samples)


def test_batches_without_any_object_train_on(tmp_path):
    for head in PARTS:
        trainer(tmp_path).fit(task(head), loader(scenes(4, boxes=0)), loader(scenes(2, boxes=0)))


def test_a_validation_set_without_objects_is_not_a_number(tmp_path):
    """Whatever follows val/map, the best checkpoint say, has to find it."""
    (measured,) = trainer(tmp_path).validate(task(), loader(scenes(3, boxes=0)), verbose=False)
    assert measured.keys() == {"val/map"}
    assert np.isnan(measured["val/map"])


def test_each_validation_counts_its_own_detections_alone(tmp_path):
    """The sanity check sees the first pictures before the epoch's end does: its detections must be forgotten."""

    class Learner(Oracle):
        def forward(self, images, targets=None):
            found = super().forward(images)
            blind = self.trainer.sanity_checking
            return [{key: value[:0] for key, value in one.items()} if blind else one for one in found]

        def training_step(self, batch, batch_idx):
            return sum(parameter.sum() for parameter in self.parameters()) * 0

    learner = Learner("faster_rcnn", "resnet10t", **SMALL, **FASTER)
    learner.samples = scenes(4)
    run = trainer(tmp_path, limit_train_batches=1)
    run.fit(learner, loader(learner.samples), loader(learner.samples))
    assert float(run.callback_metrics["val/map"]) == pytest.approx(1)


def test_a_test_set_without_annotations_has_no_score(tmp_path):
    model = task()
    assert trainer(tmp_path).test(model, loader(scenes(3, boxes=0)), verbose=False) == [{}]


def test_bytes_and_floats_are_the_same_picture():
    model = task().eval()
    image = scenes(1)[0][0]
    with torch.no_grad():
        (one,), (two,) = model([image]), model([image.float() / 255])
    assert torch.equal(one["boxes"], two["boxes"])


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_half_precision_weights_are_refused(tmp_path, precision):
    with pytest.raises(InputError, match=f"{precision}.*bf16-mixed"):
        trainer(tmp_path, precision=precision).fit(task(), loader(scenes(2)))


def test_the_loss_that_is_not_finite_is_named(tmp_path):
    class Broken(DetectionTask):
        def forward(self, images, targets=None):
            losses = super().forward(images, targets)
            return {**losses, "loss_rpn_box_reg": losses["loss_rpn_box_reg"] * torch.nan}

    with pytest.raises(InputError, match=r"^loss_rpn_box_reg was not finite at step 0 \(epoch 0\)"):
        trainer(tmp_path).fit(Broken("faster_rcnn", "resnet10t", **SMALL, **FASTER), loader(scenes(4)))


def test_frozen_statistics_need_weights(tmp_path):
    with pytest.raises(InputError, match="norm='frozen' needs initial_weights"):
        trainer(tmp_path).fit(task(norm="frozen"), loader(scenes(2)))
    with pytest.raises(InputError, match="trainable_stages=2 needs initial_weights"):
        trainer(tmp_path).fit(task(trainable_stages=2), loader(scenes(2)))
    with pytest.raises(InputError, match="norm='sync' works on GPUs only"):
        trainer(tmp_path).fit(task(norm="sync"), loader(scenes(2)))


@pytest.mark.parametrize("aw", [None, True])
def test_a_frozen_run_is_kept_and_resumed(tmp_path, aw):
    weights = tmp_path / "classifier.ckpt"
    classifier = ClassificationTask("resnet10t", num_classes=5, lr=0.01)
    for name, parameter in classifier.named_parameters():
        if name.endswith("bn2.weight"):  # zero at first, which would silence the block for good
            torch.nn.init.ones_(parameter)
    torch.save({"state_dict": classifier.state_dict()}, weights)
    model = task(norm="frozen", initial_weights=str(weights), trainable_stages=2, aw=aw)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    run = trainer(tmp_path, max_epochs=2)
    run.fit(model, loader(scenes(4)))
    run.save_checkpoint(tmp_path / "run.ckpt")
    after = model.state_dict()
    frozen = [k for k in before if "backbone.body" in k and ("bn" in k or ".layer1." in k) and "attention" not in k]
    assert frozen
    assert all(torch.equal(before[k], after[k]) for k in frozen)
    learnt = [k for k in before if re.search(r"layer3\.\d\.conv\d\.weight", k)]
    assert learnt
    assert not any(torch.equal(before[k], after[k]) for k in learnt)
    if aw:
        heads = [k for k in before if "layer3" in k and k.endswith("attention.norm2.weight")]
        assert heads
        assert not any(torch.equal(before[k], after[k]) for k in heads)

    again = DetectionTask.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    assert again.hparams["initial_weights"] is None
    image = scenes(1)[0][0]
    with torch.no_grad():
        (one,), (two,) = model.eval()([image]), again.eval()([image])
    assert torch.equal(one["boxes"], two["boxes"])
    longer = trainer(tmp_path, max_epochs=3)
    longer.fit(again.train(), loader(scenes(4)), ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert longer.current_epoch == 3

    def resume(**changes):
        other = task(norm=changes.pop("norm", "frozen"), aw=aw, **changes)
        resumed = trainer(tmp_path, max_epochs=3)
        resumed.fit(other, loader(scenes(4)), ckpt_path=tmp_path / "run.ckpt", weights_only=True)

    with pytest.raises(InputError, match=r"something else is frozen; set norm and trainable_stages as they were"):
        resume(trainable_stages=1)
    for norm in ("batch", "group"):
        with pytest.raises(InputError, match=r"likely cause: the file is of a network with [^:]*: set [^:]*$"):
            resume(trainable_stages=2, norm=norm)


def test_a_checkpoint_of_other_classes_is_refused(tmp_path):
    run = trainer(tmp_path)
    run.fit(task(class_names=["a", "b", "c"], category_ids=[3, 5, 8]), loader(scenes(2)))
    run.save_checkpoint(tmp_path / "run.ckpt")
    for changed in ({"class_names": ["a", "b", "x"], "category_ids": [3, 5, 8]}, {"category_ids": [3, 5, 9]}):
        names = {"class_names": ["a", "b", "c"], **changed}
        with pytest.raises(InputError, match=r"other classes.*(class_names: 'c', not 'x'|category_ids: 8, not 9)"):
            trainer(tmp_path).test(
                task(**names), loader(scenes(2)), ckpt_path=tmp_path / "run.ckpt", weights_only=True, verbose=False
            )


@pytest.mark.parametrize(("first", "second"), [("detector", "classifier"), ("classifier", "detector")])
def test_one_kind_of_checkpoint_is_not_taken_for_the_other(tmp_path, first, second):
    kinds = {"detector": task, "classifier": lambda **options: ClassificationTask("resnet10t", **options)}
    run = trainer(tmp_path)
    run.strategy.connect(kinds[first]())
    run.save_checkpoint(tmp_path / "run.ckpt")
    path = str(tmp_path / "run.ckpt")
    with pytest.raises(InputError, match=rf"of a {first}"):
        kinds[second]().load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    if second == "classifier":
        with pytest.raises(InputError, match="of a detector"):
            kinds[second](initial_weights=path)


def test_channels_last_and_plain_agree():
    image = scenes(1)[0][0]
    formats = []
    found = []
    for channels_last in (False, True):
        model = task(channels_last=channels_last).eval()
        model.network.backbone.body.conv1[0].register_forward_pre_hook(
            lambda module, inputs: formats.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
        )
        with torch.no_grad():
            found += model([image])
    assert formats == [False, True]
    assert torch.allclose(found[0]["boxes"], found[1]["boxes"], atol=1e-3)


def test_the_names_must_fit_the_number_of_classes():
    with pytest.raises(InputError, match="class_names"):
        task(class_names=["a"])
    with pytest.raises(InputError, match="category_ids"):
        task(category_ids=[1, 2, 3, 4])


@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_resumed_run_ends_as_the_uninterrupted_one(tmp_path, stop_after):
    """Proposals are sampled at random: the numbers must be those that the uninterrupted run draws."""
    samples = scenes(8)

    def fit(epochs: int, ckpt_path=None) -> DetectionTask:
        model = task(lr_schedule="constant", aw=True)
        L.seed_everything(3)
        run = trainer(tmp_path, max_epochs=epochs)
        run.fit(model, loader(samples), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        run.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return model

    whole = fit(4)
    fit(stop_after)
    resumed = fit(4, ckpt_path=tmp_path / f"{stop_after}.ckpt")
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


@pytest.mark.slow
def test_it_overfits_eight_digit_scenes(tmp_path):
    folder = write_digit_scenes(str(tmp_path), seed=0, scenes={"train": 8, "val": 1, "test": 1})
    files = {"annotations": "annotations/train.json", "images": "train"}
    data = COCODataModule(
        folder,
        **{f"{split}_{kind}": name for split in ("train", "val") for kind, name in files.items()},
        image_size=128,
        max_size=192,
        batch_size=4,
        num_workers=0,
        horizontal_flip=0.0,
    )
    config = yaml.safe_load((PROJECT / "configs/models/aw_faster_rcnn_resnet18_small.yaml").read_text())
    L.seed_everything(0)
    model = DetectionTask(
        **config["model"]["init_args"], num_classes=10, image_size=128, max_size=192,
        optimizer="adamw", lr=2e-3, lr_schedule="onecycle",
    )  # fmt: skip
    run = trainer(tmp_path, max_epochs=60, limit_val_batches=0, gradient_clip_val=10.0)
    run.fit(model, data)
    (measured,) = trainer(tmp_path).validate(model, data, verbose=False)
    assert measured["val/map_50"] > 0.95
