"""Real processes on a CPU: two must measure what one measures."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).parents[2]
COMMON = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.num_sanity_val_steps=0",
]


def run(*args: object) -> str:
    done = subprocess.run(
        [sys.executable, "lightning_cli.py", *map(str, args)], cwd=PROJECT, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def metrics(folder: Path) -> dict[str, float]:
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {key: float(row[key]) for row in rows for key in row if row[key] and key.startswith(("val/", "test/"))}


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(tmp_path):
    """180 digits to validate and 360 to test, in batches of 7 and 11: neither divides over two processes."""
    fit = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=8", "--data.image_size=8"]
    log = run(
        "fit",
        *COMMON,
        *fit,
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        f"--trainer.default_root_dir={tmp_path / 'fit'}",
    )
    (checkpoint,) = (tmp_path / "fit").glob("*/*/checkpoints/last.ckpt")
    assert len(list((tmp_path / "fit").glob("*/*"))) == 1, "every process must write into the same run folder"
    assert log.count("run folder:") == 1
    trained = metrics(checkpoint.parents[1])
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 8

    results = {}
    for devices in (1, 2):
        for command, split, batch_size in (("validate", "val", 7), ("test", "test", 11)):
            root = tmp_path / f"{command}{devices}"
            strategy = ["--trainer.strategy=ddp"] if devices == 2 else []
            run(
                command,
                f"--ckpt_path={checkpoint}",
                *COMMON,
                f"--data.batch_size={batch_size}",
                f"--trainer.devices={devices}",
                *strategy,
                f"--trainer.default_root_dir={root}",
            )
            (folder,) = root.glob("*/*")
            results[devices, split] = metrics(folder)
            if split == "test":
                with (folder / "per_class_accuracy.csv").open() as file:
                    results[devices, "classes"] = list(csv.DictReader(file))
    for split in ("val", "test"):
        one, two = results[1, split], results[2, split]
        assert one.keys() == two.keys() == {f"{split}/{m}" for m in ("loss", "acc1", "acc5")}
        assert one[f"{split}/acc1"] == two[f"{split}/acc1"]
        assert one[f"{split}/acc5"] == two[f"{split}/acc5"]
        assert one[f"{split}/loss"] == pytest.approx(two[f"{split}/loss"], rel=1e-5)
    assert results[1, "classes"] == results[2, "classes"]
    assert sum(int(row["images"]) for row in results[1, "classes"]) == 360
    # validation inside fit, in batches of 64 over two processes
    assert trained["val/acc1"] == results[1, "val"]["val/acc1"]
