"""From one process to several machines: the same weights and figures, and a batch script that goes on by itself."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_ddp import COMMON, PROJECT, metrics

from awconv.tasks import ClassificationTask

# BatchNorm sees the pictures of its own process alone: training is compared with a network that has none
WITHOUT_BATCHNORM = ["--model.backbone=convnext_atto", "--model.aw=false", "--data.image_size=32"]
FIT = [
    *COMMON,
    *WITHOUT_BATCHNORM,
    "--trainer.max_epochs=2",
    "--trainer.limit_train_batches=4",
    "--trainer.log_every_n_steps=1",
    "--model.optimizer=sgd",
    "--model.optimizer_options={momentum: 0.9}",
    "--model.lr=0.05",
    "--model.lr_schedule=cosine",
    # the digits' own augmentation is drawn for a batch at once, and so differs with its size
    "--data.augment=none",
]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(*args: object, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, *map(str, args)],
        cwd=PROJECT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes: "subprocess.Popen[str]") -> str:
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(said)
    return "\n".join(said)


def two_nodes(*args: object) -> str:
    """Runs the command line as two machines with one process each would."""
    rendezvous = ["--master_addr", "127.0.0.1", "--master_port", free_port()]
    nodes = ["--trainer.num_nodes=2", "--trainer.devices=1", "--trainer.strategy=ddp"]
    return finish(
        *(
            start(
                *["-m", "torch.distributed.run", "--nnodes", 2, "--node_rank", rank, "--nproc_per_node", 1],
                *[*rendezvous, "lightning_cli.py", *args, *nodes],
            )
            for rank in (0, 1)
        )
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def assert_close(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The run of one process with a global batch of 32, and what it said."""
    run = tmp_path_factory.mktemp("one") / "run"
    said = finish(start("lightning_cli.py", "fit", *FIT, "--data.batch_size=32", f"--run_dir={run}"))
    return run, said


@pytest.mark.slow
def test_two_nodes_train_and_measure_as_one_process(tmp_path, one_process):
    alone, said = one_process
    assert "global batch: 32 pictures (32 a batch); model.lr=0.05 is for that" in said
    run = tmp_path / "run"
    said = two_nodes("fit", *FIT, "--data.batch_size=16", f"--run_dir={run}")
    assert said.count("global batch: 32 pictures (16 a batch x 2 processes)") == 1
    assert said.count("run folder:") == 1
    initial = ClassificationTask.load_from_checkpoint(run / "checkpoints/last.ckpt", weights_only=True)
    torch.manual_seed(0)
    untrained = ClassificationTask(**{k: v for k, v in initial.hparams.items() if not k.startswith("_")})
    name, learnt = next((k, v) for k, v in weights(run).items() if k.endswith("weight") and v.ndim > 1)
    assert not torch.allclose(learnt, untrained.state_dict()[name]), "it must have learned something"
    assert_close(weights(alone), weights(run))

    # the same checkpoint measured by both, in batches that do not divide over them
    checkpoint = f"--ckpt_path={alone / 'checkpoints/last.ckpt'}"
    two_nodes("test", *COMMON, checkpoint, "--data.batch_size=11", f"--run_dir={tmp_path / 'two'}")
    finish(
        start("lightning_cli.py", "test", *COMMON, checkpoint, "--data.batch_size=7", f"--run_dir={tmp_path / 'one'}")
    )
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert one.pop("test/loss") == pytest.approx(two.pop("test/loss"), rel=1e-5)
    assert one == two
    for name in ("per_class_accuracy.csv", "confusion_matrix.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_train_as_one(tmp_path, one_process, accumulate):
    run = tmp_path / "run"
    size = 16 // accumulate
    batches = [f"--data.batch_size={size}", f"--trainer.accumulate_grad_batches={accumulate}"]
    batches.append(f"--trainer.limit_train_batches={4 * accumulate}")
    strategy = ["--trainer.devices=2", "--trainer.strategy.class_path=lightning.pytorch.strategies.DDPStrategy"]
    strategy.append("--trainer.strategy.gradient_as_bucket_view=true")
    said = finish(start("lightning_cli.py", "fit", *FIT, *batches, *strategy, f"--run_dir={run}"))
    product = f"{size} a batch x 2 processes" + f" x {accumulate} accumulated" * (accumulate > 1)
    assert f"global batch: 32 pictures ({product})" in said
    assert_close(weights(one_process[0]), weights(run))


@pytest.mark.slow
def test_sharded_over_two_processes(tmp_path, one_process):
    """FSDP2: the same weights, in a checkpoint that loads in plain Python, and from which the run goes on."""
    run = tmp_path / "run"
    overlay = ["-c", "configs/recipes/digits.yaml", "-c", "configs/models/resnet20.yaml"]
    overlay += ["-c", "configs/overlays/model_parallel.yaml", "--trainer.accelerator=cpu", "--trainer.devices=2"]
    overlay += ["--trainer.strategy.data_parallel_size=2"]
    options = ["fit", *overlay, *FIT, "--model.weight_decay=0.05", "--model.label_smoothing=0.1"]
    options += ["--data.batch_size=16", "--trainer.callbacks+=test_survival.StopAfterAnEpoch"]
    finish(start("lightning_cli.py", *options, f"--run_dir={run}", PYTHONPATH=str(PROJECT / "tests")))
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
    again = ["fit", f"--resume={run}", "--trainer.callbacks=null"]
    finish(start("lightning_cli.py", *again, PYTHONPATH=str(PROJECT / "tests")))
    task = ClassificationTask.load_from_checkpoint(run / "checkpoints/last.ckpt", weights_only=True)
    assert_close(weights(one_process[0]), task.state_dict())


# ---- SLURM ------------------------------------------------------------------------------------------------------

SRUN = """#!/bin/bash
echo "$@" >> {log}
shift
exec "$@" --trainer.accelerator=cpu --trainer.devices=1 --trainer.num_nodes=1 --trainer.sync_batchnorm=false
"""


@pytest.mark.slow
def test_the_batch_script_requeues_a_preempted_job_and_goes_on(tmp_path):
    for name, text in (("srun", SRUN), ("scontrol", '#!/bin/bash\necho "scontrol $@" >> {log}\n')):
        (tmp_path / name).write_text(text.format(log=tmp_path / "log"))
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(PROJECT / "tests"),
        "RUN_DIR": str(tmp_path / "run"),
        # what the script's own options make SLURM set; nothing by which Lightning would take this for a cluster
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NTASKS_PER_NODE": "8",
    }
    words = ["-c", "configs/recipes/digits.yaml", "-c", "configs/models/resnet20.yaml", *COMMON[1:]]
    words += ["--trainer.max_epochs=1", "--trainer.limit_train_batches=6", "--trainer.limit_val_batches=1"]
    words += ["--data.image_size=8", "--trainer.callbacks+=test_survival.SignalAt"]
    words += ["--trainer.callbacks.step=3", f"--trainer.callbacks.number={int(signal.SIGUSR1)}"]
    codes = []
    for _ in range(2):
        done = subprocess.run(
            ["bash", "configs/slurm/train.sbatch", *words], cwd=PROJECT, env=environment, capture_output=True, text=True
        )
        codes.append(done.returncode)
    assert codes == [75, 0], done.stderr
    first, requeued, second = (tmp_path / "log").read_text().splitlines()
    assert "--trainer.num_nodes 2 --trainer.devices 8" in first
    assert requeued == "scontrol requeue 17"
    assert "--kill-on-bad-exit=0" in second
    assert "--trainer.max_epochs=1" in second, "what was given once more goes along"
    assert second.endswith(f"--resume {tmp_path / 'run'}")
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 6


def test_the_batch_script_asks_for_what_it_uses():
    text = (PROJECT / "configs/slurm/train.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, re.MULTILINE))
    assert options["signal"].startswith("USR1@"), "to every process, not to the script alone (B:)"
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert {"requeue", "nodes", "time"} <= options.keys()


# ---- what needs GPUs --------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_synchronised_batchnorm_trains_as_one_process(tmp_path):
    runs = {}
    for devices, size in ((1, 32), (2, 16)):
        runs[devices] = tmp_path / f"run{devices}"
        options = [*FIT[4:], "--model.backbone=resnet20", "--model.aw=true", f"--data.batch_size={size}"]
        options += ["-c", "configs/recipes/digits.yaml", "-c", "configs/overlays/ddp.yaml"]
        finish(start("lightning_cli.py", "fit", *options, f"--trainer.devices={devices}", f"--run_dir={runs[devices]}"))
    assert_close(weights(runs[1]), weights(runs[2]))
