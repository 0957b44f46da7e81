"""What watches a run, in two processes: together they must show what one shows."""

import json
import os
from pathlib import Path

import lightning.pytorch as pl
import pytest
import wandb
from matplotlib.figure import Figure
from test_training_monitor import Clock, Module, Recorder, Slow
from test_validation_media import Classifier, Detector, Listed, evaluated, scene_batches, some_pictures
from torch.utils.data import DataLoader

from awconv.callbacks import ClassificationMedia, DetectionMedia, TrainingMonitor, WandbRun, training_monitor
from awconv.callbacks import validation_media as media
from awconv.data.loading import EvaluationSampler, EvaluationSet
from processes import spawn_two

PICTURES = 13  # of which two processes get seven each, one of them a padding sample


class Sampled(Classifier):
    def __init__(self, world):
        super().__init__()
        self.world = world

    def val_dataloader(self):
        data = some_pictures(PICTURES)
        if self.world == 1:
            return DataLoader(data, 3)
        sampler = EvaluationSampler(data, self.world, self.trainer.global_rank)
        return DataLoader(EvaluationSet(data), 3, sampler=sampler)


class Scenes(Detector):
    def __init__(self, world):
        super().__init__(evaluated(9)[1])
        self.world = world

    def val_dataloader(self):
        samples = evaluated(9)[0]
        if self.world == 2:
            padded, rank = EvaluationSet(Listed(samples)), self.trainer.global_rank
            samples = [padded[k] for k in range(rank, 10, 2)]  # the tenth is the first again
        return scene_batches(samples, 2)


def _trainer(folder, world, **options):
    options = {"max_epochs": 1, "logger": False, "use_distributed_sampler": False} | options
    return pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )


def _shown(folder, world):
    """All that is drawn, as it is told to those who draw; on the first process only."""
    told = {}

    def tell(name, what):
        def draw(*args, **kwargs):
            told.setdefault(name, []).append(what(*args))
            return Figure(figsize=(1, 1))

        setattr(media, name, draw)

    def rounded(parts, names):
        numbers = [[(shown[1:3], shown[3:]) for shown in part] for part in parts.values()]
        return [[[*classes, *(round(n, 5) for n in others)] for classes, others in part] for part in numbers]

    tell("draw_prediction_sheet", rounded)
    tell("draw_confusion_matrix", lambda confusion, names: confusion.tolist())
    tell("draw_detection_sheet", lambda entries, names, title: [entry.caption for entry in entries])
    tell("draw_precision_recall", lambda precision, *args: precision.round(8).tolist())
    for module, callback, train in (
        (Sampled(world), ClassificationMedia(max_pictures=4), DataLoader(Listed([0.0] * 4), 2)),
        (Scenes(world), DetectionMedia(max_pictures=4), DataLoader(Listed([0.0] * 4), 2)),
        # a module without logits, on every process
        (Module(Clock()), ClassificationMedia(), DataLoader(Slow(Clock(), 8), 4)),
    ):
        logger = WandbRun(save_dir=str(folder / type(module).__name__), mode="offline")
        _trainer(folder, world, callbacks=[callback], logger=logger).fit(module, train)
        wandb.finish()
    return told


def _rates(folder, rank):
    clock = Clock()
    training_monitor.time = clock
    # the second process waits longer, and the first computes longer
    module, data = Module(clock, seconds=3.0 - rank), Slow(clock, 48, seconds=0.25 * (1 + rank))
    recorder = Recorder()
    options = {"log_every_n_steps": 2, "logger": recorder, "use_distributed_sampler": True}
    _trainer(folder, 2, callbacks=[TrainingMonitor()], **options).fit(module, DataLoader(data, 4))
    return [row for _, row in recorder.rows if row]


def _watch(rank, folder):
    os.environ |= {"WANDB_SILENT": "true", "WANDB_DATA_DIR": str(folder / "data")}
    found = {"rates": _rates(folder, rank), "shown": _shown(folder / "two", 2)}
    (folder / f"{rank}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_two_processes_show_what_one_shows(tmp_path, monkeypatch):
    spawn_two(_watch, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))

    assert len(first["rates"]) == 3
    for row in first["rates"]:
        # steps of 1 + 3 and of 2 + 2 seconds, in each of which both processes train on 4 samples
        assert row["train/samples_per_second"] == pytest.approx(8 / 4)
        assert row["train/data_wait"] == pytest.approx(2 / 4)
        assert row["train/grad_norm"] > 0
    assert not second["shown"], "the first process alone draws"
    assert len(list((tmp_path / "two").glob("*/wandb/offline-run-*"))) == 3, "and records, a run a trainer"

    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    for name in ("draw_prediction_sheet", "draw_confusion_matrix", "draw_detection_sheet", "draw_precision_recall"):
        monkeypatch.setattr(media, name, None)  # so that what takes their place is taken back
    alone = json.loads(json.dumps(_shown(Path(tmp_path, "one"), 1)))
    assert first["shown"] == alone
    assert sum(map(sum, alone["draw_confusion_matrix"][0])) == PICTURES
