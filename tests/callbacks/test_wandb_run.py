"""WandbRun: what a real offline run records, read back from its file, and what a missing server does."""

import json
import os
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import wandb
from PIL import Image

from awconv.callbacks import WandbRun
from awconv.callbacks.wandb_run import _ask
from awconv.errors import InputError
from awconv.tasks import ClassificationTask
from wandb_records import history, merged, of_kind, records_of

PROJECT = Path(__file__).parents[2]
# a few steps on a few digits
SHORT = [
    "--trainer.max_epochs=2",
    "--trainer.limit_train_batches=3",
    "--trainer.limit_val_batches=2",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--data.image_size=8",
    "--data.batch_size=16",
]
DIGITS = ["-c", "configs/recipes/digits.yaml", "-c", "configs/models/aw_resnet20.yaml"]
WANDB = ["-c", "configs/overlays/wandb.yaml"]


@pytest.fixture(autouse=True)
def _away_from_home(away_from_home):
    """W&B as on a machine where nobody has used it."""


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")


def only_run(tmp_path):
    (folder,) = (tmp_path / "runs").glob("*/*")
    return folder


def pictures_of_tables(records, column):
    """The files behind a picture column of all tables whose name holds ``column``."""
    found = []
    for artifact in of_kind(records, "artifact"):
        if column in artifact["name"]:
            contents = artifact["manifest"]["contents"]
            found += [entry["local_path"] for entry in contents if entry["path"].endswith(".png")]
    return found


def tables(records, name):
    """The tables logged under a name, as lists of rows."""
    entries = [entry for artifact in of_kind(records, "artifact") for entry in artifact["manifest"]["contents"]]
    paths = [Path(entry["local_path"]) for entry in entries if entry["path"] == f"{name}.table.json"]
    return [json.loads(path.read_text()) for path in paths]


def checkpoints_of(records):
    """The artifacts of checkpoints, by the aliases that they were given; W&B adds its own "latest"."""
    kept = [artifact for artifact in of_kind(records, "artifact") if artifact["type"] == "model"]
    return [(sorted({*artifact["aliases"]} - {"latest"}), artifact) for artifact in kept]


# ---- a real run ------------------------------------------------------------------------------------------------------


def test_a_classifier_is_recorded_whole(cli, tmp_path, offline):
    options = [*SHORT, f"--trainer.default_root_dir={tmp_path / 'runs'}", "--trainer.logger.log_checkpoints=true"]
    code, _, err = cli("fit", *DIGITS, *WANDB, *options, "--model.attention=se", "--test_after_fit=true")
    assert code == 0, err
    folder = only_run(tmp_path)
    records = records_of(next(folder.glob("wandb/offline-run-*")))
    assert (folder / "metrics.csv").is_file()
    assert not (PROJECT / "wandb").exists()

    # what it is called
    run = {key: value for record in of_kind(records, "run") for key, value in record.items()}
    assert run["display_name"] == "digits-aw_se_resnet20-s0"
    assert run["run_group"] == "digits-aw_se_resnet20"
    assert run["job_type"] == "fit"
    assert run["project"] == "awconv"
    assert sorted(run["tags"]) == ["aw", "classification", "digits", "resnet20", "se"]

    # what it is made of
    config = merged(records, "config")
    assert config["model"]["init_args"]["backbone"] == "resnet20"
    assert config["trainer"]["max_epochs"] == 2
    assert config["environment"]["torch"] == torch.__version__.split("+")[0]
    assert {"python", "lightning", "awconv", "cuda", "host", "platform"} <= config["environment"].keys()
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=PROJECT, capture_output=True, text=True)
    if head.returncode == 0:
        assert config["git"]["commit"] == head.stdout.strip()
        assert isinstance(config["git"]["dirty"], bool)
    checkpoint = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    added = sum(
        value.numel()
        for name, value in checkpoint.items()
        if ".attention." in name and not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    )
    assert config["parameters"]["added_by_aw"] == added > 0
    assert config["parameters"]["total"] == config["parameters"]["trainable"] > added

    # what was measured, over what, and the best of it
    rows = history(records)
    values = {name: [row[name] for row in rows if name in row] for row in rows for name in row}
    for name in ("train/loss", "train/grad_norm"):
        assert len(values[name]) == 6
    assert len(values["train/samples_per_second"]) == len(values["train/data_wait"]) == 5
    assert len(values["val/acc1"]) == len(values["val/loss"]) == 2
    assert any(name.startswith("lr-") for name in values)
    assert all("trainer/global_step" in row for row in rows)
    assert all("epoch" in row for row in rows if any(name.startswith("val/") for name in row))
    defined = {metric.get("name", metric.get("glob_name")): metric for metric in of_kind(records, "metric")}
    assert defined["*"]["step_metric"] == "trainer/global_step"
    for name, best in (("val/acc1", "max"), ("val/acc5", "max"), ("val/loss", "min"), ("train/loss", "min")):
        assert defined[name]["step_metric"] == "trainer/global_step"
        assert defined[name]["summary"] == {best: True, "last": True}
    assert "test/acc1" not in defined
    summary = merged(records, "summary")
    assert summary["val/acc1"] == {"max": max(values["val/acc1"]), "last": values["val/acc1"][-1]}
    assert summary["val/loss"] == {"min": min(values["val/loss"]), "last": values["val/loss"][-1]}
    assert summary["test/acc1"] == values["test/acc1"][-1]

    # pictures, tables, charts and histograms
    for name in ("pictures", "confusion_matrix"):
        assert (folder / f"media/val_{name}.png").is_file()
        shown = list(folder.glob(f"wandb/offline-run-*/files/media/images/val/{name}_*.png"))
        assert len(shown) == 2
        assert all(np.asarray(Image.open(path)).std() > 10 for path in shown)
    files = pictures_of_tables(records, "valpredictions")
    assert len(files) > 20
    for path in files:
        pixels = np.asarray(Image.open(path))
        assert pixels.min() < 40
        assert pixels.max() > 200, "a digit that is black on black"
    predictions = tables(records, "val/predictions")
    assert len(predictions) == 2
    assert predictions[0]["columns"][:4] == ["shown", "picture", "true", "predicted"]
    assert {row[0] for row in predictions[0]["data"]} == {"fixed", "worst"}
    accuracy = tables(records, "val/class_accuracy")[-1]["data"]
    images, correct = (sum(row[k] for row in accuracy) for k in (1, 2))
    assert images == 32
    assert correct / images == pytest.approx(values["val/acc1"][-1])
    confusion = tables(records, "val/confusion_table")[-1]["data"]
    assert len(confusion) == 100
    assert sum(row[2] for row in confusion if row[0] == row[1]) == correct
    histogram = {name: row[name] for row in rows for name in row if name.startswith("val/confidence")}
    assert histogram["val/confidence._type"] == "histogram"
    assert sum(histogram["val/confidence.values"]) == 32

    # what the attention does
    for name in ("attention/layers", "attention/maps"):
        assert (folder / f"media/{name.replace('/', '_')}.png").is_file()
        assert list(folder.glob(f"wandb/offline-run-*/files/media/images/{name}_*.png"))
    layer = "layer1.0.conv1"
    assert len(values[f"attention/{layer}/histogram._type"]) == 2
    assert sum(values[f"attention/{layer}/histogram.values"][-1]) > 0
    assert {f"attention/{layer}/{what}" for what in ("spread", "mean", "saturated", "dead")} <= values.keys()

    # the checkpoints
    kept = checkpoints_of(records)
    assert sorted(alias for aliases, _ in kept for alias in aliases) == ["best", "last"]
    for aliases, artifact in kept:
        assert artifact["name"] == f"model-{run['run_id']}"
        (entry,) = artifact["manifest"]["contents"]
        assert entry["path"] == "model.ckpt"
        copy = Path(entry["local_path"]).read_bytes()
        assert copy == (folder / "checkpoints" / f"{aliases[0]}.ckpt").read_bytes()


def test_a_detector_is_recorded_whole(cli, tmp_path, offline):
    scenes = ["-c", "configs/recipes/digit_scenes.yaml", "-c", "configs/models/aw_faster_rcnn_resnet18_small.yaml"]
    code, _, err = cli(
        "fit",
        *scenes,
        *WANDB,
        *(option for option in SHORT if "image_size" not in option and "batch_size" not in option),
        f"--trainer.default_root_dir={tmp_path / 'runs'}",
        f"--data.root={tmp_path / 'scenes'}",
        "--data.train_scenes=8",
        "--data.val_scenes=7",
        "--data.test_scenes=1",
        "--data.batch_size=4",
        "--data.num_workers=0",
        "--trainer.max_epochs=1",
        "--trainer.limit_train_batches=1",
    )
    assert code == 0, err
    folder = only_run(tmp_path)
    assert {path.name for path in (folder / "media").iterdir()} == {
        "val_pictures.png", "val_worst_pictures.png", "val_precision_recall.png",
        "attention_layers.png", "attention_maps.png",
    }  # fmt: skip
    records = records_of(next(folder.glob("wandb/offline-run-*")))
    run = {key: value for record in of_kind(records, "run") for key, value in record.items()}
    assert run["display_name"] == "digitscenes-faster_rcnn_aw_resnet18-s0"
    assert sorted(run["tags"]) == ["aw", "detection", "digitscenes", "faster_rcnn", "resnet18"]
    defined = {metric.get("name"): metric for metric in of_kind(records, "metric")}
    assert all(defined[f"val/{name}"]["summary"]["max"] for name in ("map", "map_50", "mar_100"))
    assert defined["train/loss_classifier"]["summary"]["min"]
    (shown,) = tables(records, "val/boxes")
    assert [row[0] for row in shown["data"]] == ["fixed"] * 7 + ["worst"] * 7
    for row in shown["data"]:
        overlay = row[1]["boxes"]
        assert len(overlay["ground_truth"]) == row[3]
        for box in overlay["ground_truth"] + overlay["predictions"]:
            position = box["position"]
            assert 0 <= position["minX"] < position["maxX"] <= 1.001
            assert 0 <= position["minY"] < position["maxY"] <= 1.001
            assert 1 <= box["class_id"] <= 10
    assert all(np.asarray(Image.open(path)).std() > 5 for path in pictures_of_tables(records, "valboxes"))
    (ap,) = tables(records, "val/class_ap")
    assert ap["columns"][:3] == ["class", "AP", "AP50"]
    assert [row[0] for row in ap["data"]] == [str(digit) for digit in range(10)]
    assert len(tables(records, "val/precision_recall_chart_table")) == 1


# ---- going on with a run ---------------------------------------------------------------------------------------------


def test_the_id_is_readable_and_goes_on_with_the_same_run(tmp_path, offline):
    first = WandbRun(save_dir=str(tmp_path))
    assert first.run_id is None
    first.log_metrics({"val/acc1": 0.5}, step=3)
    run_id = first.run_id
    wandb.finish()
    time.sleep(1.1)  # folders are named by the second
    second = WandbRun(save_dir=str(tmp_path), id=run_id)
    assert second.run_id == run_id
    second.log_metrics({"val/acc1": 0.75}, step=9)
    assert second.run_id == second.experiment.id == run_id
    folders = sorted(tmp_path.glob("wandb/offline-run-*"))
    assert len(folders) == 2
    steps = []
    for folder in folders:
        records = records_of(folder)
        assert {record["run_id"] for record in of_kind(records, "run")} == {run_id}
        steps += [(row["trainer/global_step"], row["val/acc1"]) for row in history(records)]
    assert steps == [(3, 0.5), (9, 0.75)]


def test_the_id_is_an_argument_of_the_command_line(cli, tmp_path, offline):
    options = [*SHORT, f"--trainer.default_root_dir={tmp_path / 'runs'}", "--trainer.logger.id=abcd1234"]
    code, _, err = cli("fit", *DIGITS, *WANDB, *options, "--trainer.logger.name=mine", "--trainer.max_epochs=1")
    assert code == 0, err
    records = records_of(next(only_run(tmp_path).glob("wandb/offline-run-*-abcd1234")))
    (run,) = of_kind(records, "run")
    assert (run["run_id"], run["display_name"], run["run_group"]) == ("abcd1234", "mine", "digits-aw_resnet20")


def test_resume_goes_on_with_the_same_run_and_a_checkpoint_begins_another(cli, tmp_path, offline):
    options = [*SHORT, f"--trainer.default_root_dir={tmp_path / 'runs'}"]
    code, _, err = cli("fit", *DIGITS, *WANDB, *options, "--trainer.max_epochs=1")
    assert code == 0, err
    folder = only_run(tmp_path)
    run_id = (folder / "wandb_run_id").read_text().strip()
    wandb.finish()
    time.sleep(1.1)  # folders are named by the second
    code, _, err = cli("fit", "--resume", folder, "--trainer.max_epochs=2")
    assert code == 0, err
    assert (folder / "wandb_run_id").read_text().strip() == run_id
    assert run_id not in (folder / "config.yaml").read_text(), "which others may run again"
    folders = sorted(folder.glob("wandb/offline-run-*"))
    assert [part.name.rsplit("-", 1)[-1] for part in folders] == [run_id] * 2
    steps = []
    for part in folders:
        records = records_of(part)
        assert {record["run_id"] for record in of_kind(records, "run")} == {run_id}
        steps.append([row["trainer/global_step"] for row in history(records) if "train/loss" in row])
    assert steps == [[0, 1, 2], [3, 4, 5]]

    root = f"--trainer.default_root_dir={tmp_path / 'runs'}"
    code, _, err = cli("fit", *WANDB, "--ckpt_path", folder / "checkpoints/last.ckpt", "--trainer.max_epochs=3", root)
    assert code == 0, err
    (other,) = set((tmp_path / "runs").glob("*/*")) - {folder}
    assert (other / "wandb_run_id").read_text().strip() != run_id


# ---- without a server ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [wandb.errors.CommError("Timed out while dialling\nConsider this"), TimeoutError("late")], ids=repr
)
def test_a_server_that_cannot_be_reached_costs_one_line(cli, tmp_path, monkeypatch, recwarn, error):
    asked, init = [], wandb.init

    def unreachable(**options):
        asked.append(options)
        if options.get("mode") != "offline":
            raise error
        return init(**options)

    monkeypatch.setattr(wandb, "init", unreachable)
    monkeypatch.setattr("awconv.callbacks.wandb_run._ask", lambda *args: None)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    options = [*SHORT, f"--trainer.default_root_dir={tmp_path / 'runs'}", "--trainer.max_epochs=1"]
    code, _, err = cli("fit", *DIGITS, *WANDB, *options)
    assert code == 0, err
    assert [options.get("mode") for options in asked] == [None, "offline"]
    assert asked[0]["settings"]["init_timeout"] + 10 <= 30
    assert asked[0]["settings"]["finish_timeout"] == 5
    warned = [str(w.message) for w in recwarn if "Weights & Biases" in str(w.message)]
    assert len(warned) == 1
    assert "\n" not in warned[0]
    reason = "late" if isinstance(error, TimeoutError) else "Timed out while dialling"
    assert f"cannot be used now ({reason})" in warned[0]
    folder = next(only_run(tmp_path).glob("wandb/offline-run-*"))
    assert f"`wandb sync {folder}`" in warned[0]
    assert any("val/acc1" in row for row in history(records_of(folder)))


@pytest.fixture
def server():
    """A server on this machine; how it answers is put into ``status``, and None lets it wait for ever."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.server.asked.append(self.headers)
            if self.server.status is None:
                self.server.waiting.wait(60)
            else:
                self.send_error(self.server.status)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.waiting, server.status = [], threading.Event(), None
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.waiting.set()
        server.shutdown()


def names_take_for_ever(*args, **kwargs):
    time.sleep(60)


@pytest.mark.parametrize(
    ("status", "says"),
    [(None, "does not answer within 0.3 s"), ("closed", "refused"), ("name", "does not answer")],
)
def test_a_server_that_is_away_is_not_asked_twice(tmp_path, monkeypatch, recwarn, server, status, says):
    url = f"http://127.0.0.1:{server.server_port}"
    if status == "closed":
        url = "http://127.0.0.1:9"
    elif status == "name":
        monkeypatch.setattr("socket.getaddrinfo", names_take_for_ever)
    else:
        server.status = status
    asked, init = [], wandb.init
    monkeypatch.setattr(wandb, "init", lambda **options: asked.append(options) or init(**options))
    monkeypatch.setattr("awconv.callbacks.wandb_run._SERVER_SECONDS", 0.3)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    logger = WandbRun(save_dir=str(tmp_path), settings={"base_url": url})
    logger.log_metrics({"val/acc1": 0.5}, step=3)
    assert [options.get("mode") for options in asked] == ["offline"]
    assert "authorization" not in str(server.asked).lower(), "a key is for W&B to send"
    (warned,) = (str(w.message) for w in recwarn if "recorded offline" in str(w.message))
    assert says in warned


@pytest.mark.parametrize("status", [400, 401, 404, 503])
def test_a_server_that_answers_is_there(monkeypatch, server, status):
    server.status = status
    _ask(f"http://127.0.0.1:{server.server_port}", {})
    # whatever the name is, where a proxy leads to it
    _ask("http://wandb.invalid", {"http": f"http://127.0.0.1:{server.server_port}"})
    assert len(server.asked) == 2


def test_behind_a_socks_proxy_nothing_is_asked(monkeypatch):
    _ask("https://wandb.invalid", {"https": "socks5h://127.0.0.1:9"})
    monkeypatch.setenv("HTTPS_PROXY", "socks5://127.0.0.1:9")
    _ask("https://wandb.invalid", {})


def test_what_is_not_uploaded_in_time_stays(tmp_path):
    def seconds(**options):
        return WandbRun(save_dir=str(tmp_path), **options)._wandb_init["settings"]["finish_timeout"]

    assert seconds() == 5
    assert seconds(log_checkpoints=True) == 600
    assert seconds(log_checkpoints=True, finish_timeout=20) == 20


def test_nobody_answers(tmp_path, monkeypatch, recwarn):
    """Nothing is patched here: the port is closed."""
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    wandb.teardown()
    logger = WandbRun(save_dir=str(tmp_path), init_timeout=2)
    began = time.monotonic()
    logger.log_metrics({"val/acc1": 0.5}, step=3)
    assert time.monotonic() - began < 30
    assert sum("recorded offline" in str(w.message) for w in recwarn) == 1
    began = time.monotonic()
    wandb.finish()
    assert time.monotonic() - began < 5


def test_without_a_key_and_a_mode_there_is_one_line(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("awconv.callbacks.wandb_run._ask", lambda *args: None)
    code, _, err = cli("fit", *DIGITS, *WANDB, *SHORT, f"--trainer.default_root_dir={tmp_path / 'runs'}")
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(lines) == 1
    assert "wandb login" in lines[0]
    assert "WANDB_MODE=offline" in lines[0]
    assert "Traceback" not in err


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_without_the_network_nothing_waits(tmp_path, monkeypatch, mode):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    wandb.teardown()
    logger = WandbRun(save_dir=str(tmp_path / "run"), mode=mode, log_checkpoints=True)
    began = time.monotonic()
    logger.log_graph(torch.nn.Linear(2, 2))
    logger.log_metrics({"val/loss": 0.5, "val/acc1": float("nan")}, step=3)
    logger.finalize("success")
    wandb.finish()
    assert time.monotonic() - began < 8
    assert len(list((tmp_path / "run").glob("wandb/offline-run-*"))) == (mode == "offline")


# ---- by itself -------------------------------------------------------------------------------------------------------


def test_what_is_no_number_does_not_spoil_the_best(tmp_path, offline):
    logger = WandbRun(save_dir=str(tmp_path))
    for step, value in enumerate([float("nan"), 0.5, 0.75, 0.25]):
        logger.log_metrics({"val/map": value, "epoch": step}, step=step)
    records = records_of(next(tmp_path.glob("wandb/offline-run-*")))
    assert merged(records, "summary")["val/map"] == {"max": 0.75, "last": 0.25}
    assert [row["epoch"] for row in history(records)] == [0, 1, 2, 3]


def described(monkeypatch, seed=3, command="fit", **given):
    logger = WandbRun(**given)
    model = ClassificationTask("resnet20", aw=True, num_classes=2)
    logger.describe("digits-aw_resnet20", command=command, seed=seed, model=model)
    return {key: logger._wandb_init.get(key) for key in ("name", "group", "job_type", "tags")}


def test_what_the_user_gives_stays(monkeypatch):
    given = {"name": "mine", "group": "ours", "job_type": "trial", "tags": ["new"]}
    assert described(monkeypatch, **given) == given
    for variable in ("WANDB_NAME", "WANDB_RUN_GROUP", "WANDB_JOB_TYPE", "WANDB_TAGS"):
        monkeypatch.setenv(variable, "from the environment")
    assert set(described(monkeypatch).values()) == {None}


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "digits-aw_resnet20-s3"),
        ({"seed": False}, "digits-aw_resnet20"),
        ({"command": "test"}, "digits-aw_resnet20-s3-test"),
    ],
)
def test_names(monkeypatch, options, name):
    assert described(monkeypatch, **options)["name"] == name


def test_in_a_sweep_wandb_numbers_the_runs(monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    assert described(monkeypatch)["name"] is None
    assert described(monkeypatch)["group"] == "digits-aw_resnet20"


def test_arguments_out_of_range():
    with pytest.raises(InputError, match="mode='on': expected one of online, offline, disabled, or null"):
        WandbRun(mode="on")
    with pytest.raises(InputError, match="init_timeout=0"):
        WandbRun(init_timeout=0)
    assert WandbRun(name="")._wandb_init["name"] is None
    assert WandbRun(offline=True)._wandb_init["mode"] == "offline"
    assert "WANDB_MODE" not in os.environ


class Module(pl.LightningModule):
    def __init__(self, stop=None):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.stop = stop

    def training_step(self, batch):
        if self.stop is not None and self.current_epoch == 1:
            raise self.stop
        loss = self.layer(batch).square().mean()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("stop", [None, KeyboardInterrupt(), RuntimeError("broken"), SystemExit(75)], ids=repr)
def test_checkpoints_are_kept_however_training_ends(tmp_path, offline, stop):
    best = pl.callbacks.ModelCheckpoint(tmp_path / "own", "best", monitor="train/loss", save_last=True)
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=1,
        logger=WandbRun(save_dir=str(tmp_path), log_checkpoints=True),
        callbacks=[best],
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir=tmp_path,
    )
    batches = torch.utils.data.DataLoader(torch.randn(8, 2), 4)
    try:
        trainer.fit(Module(stop), batches)
    except (RuntimeError, SystemExit, KeyboardInterrupt):
        assert stop is not None
    records = records_of(next(tmp_path.glob("wandb/offline-run-*")))
    kept = checkpoints_of(records)
    assert sorted(alias for aliases, _ in kept for alias in aliases) == ["best", "last"]
    metadata = next(json.loads(artifact["metadata"]) for aliases, artifact in kept if "best" in aliases)
    assert metadata["monitor"] == "train/loss"
    assert metadata["score"] == pytest.approx(float(best.best_model_score))


def test_no_checkpoint_is_kept_unless_asked(tmp_path, offline):
    logger = WandbRun(save_dir=str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.ckpt").write_bytes(b"x")
    logger.log_metrics({"a": 1.0})
    logger.after_save_checkpoint(SimpleNamespace(state_key="a"))
    logger.finalize("success")
    assert not of_kind(records_of(next(tmp_path.glob("wandb/offline-run-*"))), "artifact")


def test_a_last_checkpoint_of_another_kind_is_found_in_its_folder(tmp_path, offline):
    logger = WandbRun(save_dir=str(tmp_path), log_checkpoints=True)
    (tmp_path / "checkpoints").mkdir()
    last = tmp_path / "checkpoints/last.ckpt"
    last.write_bytes(b"x")
    logger.log_metrics({"a": 1.0})
    for content in (None, b"again"):
        if content:
            last.write_bytes(content)
            os.utime(last, (1e9, 1e9))
        logger.finalize("failed")
        logger.finalize("success")
    kept = checkpoints_of(records_of(next(tmp_path.glob("wandb/offline-run-*"))))
    assert [aliases for aliases, _ in kept] == [["last"], ["last"]], "each content once"
