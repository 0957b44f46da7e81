"""COCO mAP on real gloo processes: one, two and three must return the same digits, and nobody may wait for ever.

Run as a script, this file is what the processes do: it writes what each of them got into a folder.
"""

import datetime
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing
from torch.utils.data import DataLoader

from awconv import metrics
from test_metrics import Sample, Validated, floats, make_scene, pycocotools, updated

SCENES = 6
# what each process holds, as indices into the samples; the last image comes twice where a sampler would repeat it
SHARES = {
    "one": [[0, 1, 2, 3, 4]],
    "two, padded": [[0, 2, 4], [1, 3, 0]],
    "two, all at the second": [[], [4, 3, 2, 1, 0]],
    "three, padded": [[0, 3], [1, 4], [2, 0]],
    "three, one with nothing": [[3, 0], [], [1, 4, 2]],
    "three, nobody with anything": [[], [], []],
}


def samples_of(scene: int) -> list[Sample]:
    # scores of three levels: ties in plenty
    return make_scene(scene, score_levels=3)


def process(rank: int, world: int, name: str, folder: Path) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / name}.rendezvous",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    # process 0 may have no images, of which torchmetrics warns
    warnings.filterwarnings("ignore", ".*was called before the ``update`` method")
    got: list[Any] = []
    for scene in range(SCENES):
        samples = samples_of(scene)
        metric = updated([samples[i] for i in SHARES[name][rank]], batch_size=2, class_metrics=True)
        values = floats(metric.compute())
        # a second call must not gather anew: it may come from one process alone
        again = floats(metric.compute()) if rank == 0 else values
        got.append({"values": values, "again": again, "results": metric.results(), "per_class": metric.per_class})
    # process 0 fails; the others must learn of it
    if rank == 0:
        metrics.COCOeval_faster = None
    failing = updated(samples_of(0))
    try:
        failing.compute()
    except Exception as error:
        got.append(f"{type(error).__name__}: {error}")
    (folder / f"{name}.{rank}.json").write_text(json.dumps(got))
    dist.destroy_process_group()


@pytest.mark.slow
def test_processes_agree_to_the_last_digit(tmp_path):
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    got = {
        name: [json.loads((tmp_path / f"{name}.{rank}.json").read_text()) for rank in range(len(shares))]
        for name, shares in SHARES.items()
    }
    for scene in range(SCENES):
        samples = samples_of(scene)
        alone = updated(samples, class_metrics=True)
        expected = floats(alone.compute())
        official, _ = pycocotools(samples)
        assert {k: v for k, v in expected.items() if "/" not in k} == pytest.approx(official, abs=1e-9)
        for name, processes in got.items():
            nothing = not any(SHARES[name])
            for rank, outcomes in enumerate(processes):
                outcome = outcomes[scene]
                assert outcome["values"] == outcome["again"] == ({} if nothing else expected), (name, rank)
                if rank == 0:
                    assert outcome["results"] == ([] if nothing else alone.results())
                    assert len(outcome["per_class"]) == (0 if nothing else len(alone.per_class))
                else:
                    assert outcome["results"] is outcome["per_class"] is None
    for processes in got.values():
        first, *others = (outcomes[SCENES] for outcomes in processes)
        assert first.startswith("TypeError")
        assert all(other.startswith("RuntimeError: process 0 could not compute mAP: TypeError") for other in others)


@pytest.mark.slow
def test_lightning_on_two_processes_measures_what_one_measures(tmp_path):
    """Five images on two processes: Lightning's sampler repeats one, which must count once."""
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path), "lightning"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    logged = json.loads((tmp_path / "logged.json").read_text())
    seen = [json.loads((tmp_path / f"seen.{rank}.json").read_text()) for rank in range(2)]
    assert sorted(seen[0] + seen[1]) == [0, 0, 1, 2, 3, 4]
    expected, _ = pycocotools(samples_of(3))
    assert {name: logged[f"val/{name}"] for name in expected} == pytest.approx(expected, abs=1e-6)


class Watched(Validated):
    """Notes which images its process saw."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_validation_epoch_end(self) -> None:
        seen = [image.image_id for image in self.val_map.images]
        (self.folder / f"seen.{self.global_rank}.json").write_text(json.dumps(seen))
        super().on_validation_epoch_end()


def validate(folder: Path) -> None:
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp_fork", logger=False, default_root_dir=folder)
    (values,) = trainer.validate(Watched(folder), DataLoader(samples_of(3), batch_size=2, collate_fn=list))
    (folder / "logged.json").write_text(json.dumps(values))


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    if sys.argv[2:] == ["lightning"]:
        validate(out)
    else:
        for share, parts in SHARES.items():
            # forked, so that each starts at once with everything imported
            multiprocessing.start_processes(
                process, (len(parts), share, out), nprocs=len(parts), start_method="fork", join=True
            )
