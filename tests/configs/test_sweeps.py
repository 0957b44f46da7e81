"""Every sweep: the trials that W&B's agent would start from it."""

import itertools
import sys
from pathlib import Path

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args
from wandb.sdk.lib.config_util import save_config_file_from_dict

from awconv.layers import AWConv2d
from awconv.models import create_backbone
from wandb_records import history, merged, of_kind, records_of

PROJECT = Path(__file__).parents[2]
SWEEPS = sorted((PROJECT / "configs/sweeps").glob("*.yaml"))
MINIATURE = [
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=1",
    "--trainer.limit_val_batches=1",
    "--trainer.limit_test_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--data.batch_size=4",
    "--data.val_size=20",
    "--data.num_workers=0",
]


def values_of(parameter):
    """What a trial may get: all values of a list, both ends of a range."""
    return parameter.get("values") or [parameter["min"], parameter["max"]]


def command_of(sweep, trial):
    """The command of one trial, as W&B's agent fills it in."""
    args = create_sweep_command_args({"args": {name: {"value": value} for name, value in trial.items()}})["args"]
    macros = {"${env}": ["/usr/bin/env"], "${interpreter}": [sys.executable], "${program}": [sweep["program"]]}
    macros["${args}"] = args
    return list(itertools.chain.from_iterable(macros.get(word, [word]) for word in sweep["command"]))


def name(path):
    return path.stem


@pytest.mark.parametrize("path", SWEEPS, ids=name)
def test_a_sweep_says_what_it_is_for_and_what_it_looks_for(path):
    sweep = yaml.safe_load(path.read_text())
    first, second, *_ = path.read_text().splitlines()
    assert first.startswith("# ")
    assert f"wandb sweep configs/sweeps/{path.name}" in second
    assert (PROJECT / sweep["program"]).is_file()
    assert sweep["method"] in ("grid", "random", "bayes")
    assert sweep["metric"] == {"name": "val/acc1", "goal": "maximize"}
    assert sweep["command"].count("${args}") == 1
    assert sweep["project"] == "awconv"
    for word in sweep["command"]:
        if word.startswith("--config="):
            assert (PROJECT / word.removeprefix("--config=")).is_file()
    grid = all("values" in parameter for parameter in sweep["parameters"].values())
    assert grid or sweep["method"] != "grid", "a range has no grid"


@pytest.mark.parametrize("path", SWEEPS, ids=name)
def test_every_value_is_understood(cli, path):
    """Each value in turn beside the first ones of the others, in the resolved config of its trial."""
    sweep = yaml.safe_load(path.read_text())
    first = {name: values_of(parameter)[0] for name, parameter in sweep["parameters"].items()}
    for name_, parameter in sweep["parameters"].items():
        for value in values_of(parameter):
            words = command_of(sweep, {**first, name_: value})
            words = words[words.index("fit") :]
            code, out, err = cli(*words, "--print_config")
            assert code == 0, err
            found = yaml.safe_load(out)
            section, *rest = name_.split(".")
            found = found[section]["init_args"] if section == "model" else found[section]
            for key in rest:
                found = found[key]
            assert found == (yaml.safe_load(value) if isinstance(value, str) else value)


def test_the_rows_of_the_ablation_build_networks_that_differ():
    sweep = yaml.safe_load((PROJECT / "configs/sweeps/ablation.yaml").read_text())
    rows = {}
    for value in sweep["parameters"]["model.aw"]["values"]:
        network = create_backbone("resnet50", aw=yaml.safe_load(value), stem="cifar", num_classes=100)
        layers = [(n, m) for n, m in network.named_modules() if isinstance(m, AWConv2d)]
        # its text has its options, all but how it starts
        rows[value] = tuple((n, repr(m), bool(m.attention.get_submodule("norm2").weight.any())) for n, m in layers)
    assert rows["null"] == ()
    assert len(rows["true"]) == 16
    assert len(set(rows.values())) == len(rows)


@pytest.mark.parametrize("path", SWEEPS, ids=name)
def test_a_trial_runs(cli, path, tmp_path, cifar100_root, monkeypatch, away_from_home):
    """With the environment and the file that W&B's agent gives it."""
    sweep = yaml.safe_load(path.read_text())
    trial = {name: values_of(parameter)[-1] for name, parameter in sweep["parameters"].items()}
    parameters = tmp_path / "config-abcd1234.yaml"
    save_config_file_from_dict(str(parameters), {name: {"value": value} for name, value in trial.items()})
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep123")
    monkeypatch.setenv("WANDB_RUN_ID", "abcd1234")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(parameters))
    words = command_of(sweep, trial)
    assert words[:3] == ["/usr/bin/env", sys.executable, "lightning_cli.py"]
    code, _, err = cli(
        *words[3:], *MINIATURE, f"--data.root={cifar100_root}", f"--trainer.default_root_dir={tmp_path / 'runs'}"
    )
    assert code == 0, err
    (run,) = (tmp_path / "runs").glob("*/*")
    assert (run / "wandb_run_id").read_text().strip() == "abcd1234"
    records = records_of(next(run.glob("wandb/offline-run-*-abcd1234")))
    assert {record["sweep_id"] for record in of_kind(records, "run")} == {"sweep123"}
    config = merged([*records, *of_kind(records, "run")], "config")
    assert {name: config[name] for name in trial} == trial
    assert any("val/acc1" in row for row in history(records))
