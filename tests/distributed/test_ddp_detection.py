"""Detection in real processes on a CPU: two must measure what one measures, and write the same files.

Pictures are evaluated one at a time: together in a batch they are padded to one size, and what a detector finds depends
a little on the padding, so that it would depend on who shares a batch with whom.
"""

import json
import subprocess
import sys

import pytest
from test_ddp import COMMON, PROJECT, metrics, run

DATA = ["--data.train_scenes=6", "--data.val_scenes=7", "--data.test_scenes=9", "--data.num_workers=0"]


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(tmp_path, picture_folder):
    configs = ["-c", "configs/recipes/digit_scenes.yaml", "-c", "configs/models/aw_faster_rcnn_resnet18_small.yaml"]
    data = [*DATA, f"--data.root={tmp_path / 'scenes'}"]
    two = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    # enough boxes of every class that some are right by chance: of a network that has learned nothing all AP are zero
    anything = ["--model.options.box_score_thresh=0.0", "--model.options.box_detections_per_img=1000"]
    fit = ["--trainer.max_epochs=1", "--data.batch_size=1", *anything]
    run("fit", *configs, *COMMON, *data, *fit, *two, f"--trainer.default_root_dir={tmp_path / 'fit'}")
    (checkpoint,) = (tmp_path / "fit").glob("*/*/checkpoints/last.ckpt")

    found = {}
    for devices in (1, 2):
        for command in ("test", "predict"):
            root = tmp_path / f"{command}{devices}"
            options = [f"--ckpt_path={checkpoint}", f"--data.predict_dir={picture_folder}"]
            run(command, *COMMON, *options, *(two if devices == 2 else []), f"--trainer.default_root_dir={root}")
            (found[command, devices],) = root.glob("*/*")
    one, both = found["test", 1], found["test", 2]
    assert metrics(one) == metrics(both)
    assert metrics(one)["test/map_50"] > 0
    assert metrics(one)["test/mar_100"] > 0
    for name in ("results.json", "ap_table.csv", "precision_recall.png", "test_pictures.png"):
        assert (one / name).read_bytes() == (both / name).read_bytes(), name
    for name in ("predictions.json", "pictures.json"):
        assert (found["predict", 1] / name).read_bytes() == (found["predict", 2] / name).read_bytes(), name
    assert len(json.loads((found["predict", 2] / "pictures.json").read_text())["images"]) == 5
    # validation inside fit by two processes, each of its own share
    trained = metrics(checkpoint.parents[1])
    assert trained["val/map_50"] > 0
    assert trained["val/mar_100"] > 0
    root = tmp_path / "validate"
    run("validate", f"--ckpt_path={checkpoint}", *COMMON, f"--trainer.default_root_dir={root}")
    (folder,) = root.glob("*/*")
    assert metrics(folder) == {key: value for key, value in trained.items() if key.startswith("val/")}


@pytest.mark.slow
def test_what_only_one_process_finds_wrong_is_said_once(tmp_path, coco_root):
    """The picture that process 1 alone reads is broken: no process may bury that under a traceback, or wait."""
    content = json.loads((coco_root / "annotations/instances_val2017.json").read_text())
    broken = coco_root / "val2017" / content["images"][1]["file_name"]
    broken.write_bytes(broken.read_bytes()[:-300])  # its head, which all read before training, is whole
    configs = ["-c", "configs/recipes/coco_1x.yaml", "-c", "configs/models/aw_faster_rcnn_resnet18_small.yaml"]
    data = [f"--data.root={coco_root}", "--data.batch_size=1", "--data.image_size=64", "--data.max_size=96"]
    model = ["--model.initial_weights=null", "--model.norm=batch", "--model.trainable_stages=null"]
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--data.num_workers=0"]
    runs = ["--trainer.devices=2", "--trainer.strategy=ddp", f"--trainer.default_root_dir={tmp_path / 'runs'}"]
    done = subprocess.run(
        [sys.executable, "lightning_cli.py", "fit", *COMMON, *configs, *data, *model, *short, *runs],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    assert f"error in process 1: {broken}: this picture cannot be read" in done.stderr
    assert "Traceback" not in done.stderr
