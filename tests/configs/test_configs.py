"""Every shipped YAML, found by glob, through every command on miniature data in the data sets' real formats."""

import itertools
import re
from pathlib import Path

import pytest
import yaml

PROJECT = Path(__file__).parents[2]
CONFIGS = PROJECT / "configs"
RECIPES = sorted((CONFIGS / "recipes").glob("*.yaml"))
MODELS = sorted((CONFIGS / "models").glob("*.yaml"))
OVERLAYS = sorted((CONFIGS / "overlays").glob("*.yaml"))
ATTENTION = ["se", "eca", "cbam", "ge", "bam"]

ONE_STEP = [
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=1",
    "--trainer.limit_val_batches=1",
    "--trainer.limit_test_batches=1",
    "--trainer.limit_predict_batches=1",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--data.batch_size=2",
    "--data.num_workers=0",
]
# what a recipe needs to run on the miniature of its data set
MINIATURE = {
    "digits": ["--data.image_size=8"],
    "cifar10": ["--data.val_size=10"],
    "cifar100": ["--data.val_size=20"],
    "imagenet": ["--data.image_size=32"],
}
# what a machine without accelerators, a second node or a hub needs
ON_A_CPU = {
    "ddp": ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.sync_batchnorm=false"],
    "multinode": [
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--trainer.num_nodes=1",
        "--trainer.sync_batchnorm=false",  # which only GPU modules have
    ],
}


def name(path: Path) -> str:
    return path.stem


@pytest.fixture
def roots(tmp_path, cifar10_root, cifar100_root, imagenet_root):
    return {"cifar10": cifar10_root, "cifar100": cifar100_root, "imagenet": imagenet_root}


@pytest.fixture
def recipe_options(roots, tmp_path):
    """The options that run a recipe, by its name, for a step on miniature data."""

    def options(recipe: str) -> list[str]:
        root = [f"--data.root={roots[recipe]}"] if recipe in roots else []
        return [*ONE_STEP, *MINIATURE[recipe], *root, f"--trainer.default_root_dir={tmp_path / 'runs'}"]

    return options


def run_all(cli, tmp_path, configs: list[str], options: list[str], pictures: Path) -> None:
    code, _, err = cli("fit", *configs, *options)
    assert code == 0, err
    (checkpoint,) = (tmp_path / "runs").glob("*/*/checkpoints/last.ckpt")
    for command in ("validate", "test", "predict"):
        code, out, err = cli(command, *configs, *options, f"--ckpt_path={checkpoint}", f"--data.predict_dir={pictures}")
        assert code == 0, err
        assert {"validate": "val/acc1", "test": "test/acc5", "predict": "predictions.csv"}[command] in out


@pytest.mark.parametrize("path", [*RECIPES, *MODELS, *OVERLAYS], ids=name)
def test_the_first_line_says_what_it_is_for(path):
    lines = path.read_text().splitlines()
    assert re.match(r"# \S.{30,}", lines[0])
    assert isinstance(yaml.safe_load(path.read_text()), dict)


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_leaves_no_part_of_its_schedule_to_defaults(path):
    recipe = yaml.safe_load(path.read_text())
    assert {"optimizer", "lr", "weight_decay", "lr_schedule"} <= recipe["model"]["init_args"].keys()
    assert recipe["trainer"]["max_epochs"] > 0
    assert "backbone" not in recipe["model"]["init_args"], "the network is a model config's business"


@pytest.mark.parametrize("path", MODELS, ids=name)
def test_each_model_has_its_twin(path):
    config = yaml.safe_load(path.read_text())["model"]["init_args"]
    is_aw = path.name.startswith("aw_")
    twin = path.with_name(path.name.removeprefix("aw_") if is_aw else f"aw_{path.name}")
    other = yaml.safe_load(twin.read_text())["model"]["init_args"]
    assert config == {**other, "aw": True if is_aw else None}


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_every_recipe_through_every_command(cli, tmp_path, recipe, recipe_options, picture_folder):
    configs = ["-c", recipe, "-c", CONFIGS / "models/aw_resnet20.yaml"]
    run_all(cli, tmp_path, configs, recipe_options(recipe.stem), picture_folder)


@pytest.mark.parametrize("model", MODELS, ids=name)
def test_every_model_through_every_command(cli, tmp_path, model, recipe_options, picture_folder):
    configs = ["-c", CONFIGS / "recipes/cifar100.yaml", "-c", model]
    run_all(cli, tmp_path, configs, recipe_options("cifar100"), picture_folder)


@pytest.mark.parametrize("overlay", [o for o in OVERLAYS if o.stem != "compile"], ids=name)
def test_every_overlay_trains(cli, tmp_path, overlay, recipe_options, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    configs = itertools.chain.from_iterable(
        ("-c", CONFIGS / part) for part in ("recipes/digits.yaml", "models/aw_resnet20.yaml", overlay)
    )
    options = [*recipe_options("digits"), *ON_A_CPU.get(overlay.stem, [])]
    if overlay.stem == "overfit":
        options = [o for o in options if "limit_train" not in o] + ["--trainer.max_epochs=2"]
    code, _, err = cli("fit", *configs, *options)
    assert code == 0, err
    (run,) = (tmp_path / "runs").glob("*/*")
    saved = yaml.safe_load((run / "config.yaml").read_text())
    for key, value in yaml.safe_load(overlay.read_text()).get("trainer", {}).items():
        if not any(f"trainer.{key}=" in option for option in options) and key != "logger":
            assert saved["trainer"][key] == value


@pytest.mark.slow
def test_the_compile_overlay_trains(cli, tmp_path, recipe_options):
    configs = [CONFIGS / f"{part}.yaml" for part in ("recipes/digits", "models/resnet20", "overlays/compile")]
    code, _, err = cli("fit", *(a for c in configs for a in ("-c", c)), *recipe_options("digits"))
    assert code == 0, err
    (checkpoint,) = (tmp_path / "runs").glob("*/*/checkpoints/last.ckpt")
    assert b"_orig_mod" not in checkpoint.read_bytes()


COMBINATIONS = [(model, attention) for model in MODELS for attention in ATTENTION]


@pytest.mark.parametrize(
    ("model", "attention"),
    [
        pytest.param(model, attention, marks=pytest.mark.slow if "101" in model.stem else [])
        for model, attention in COMBINATIONS
    ],
    ids=lambda value: value if isinstance(value, str) else value.stem,
)
def test_activation_attention_is_one_flag_on_top(cli, tmp_path, model, attention, recipe_options):
    code, _, err = cli(
        "fit",
        "-c",
        CONFIGS / "recipes/cifar10.yaml",
        "-c",
        model,
        "--model.attention",
        attention,
        *recipe_options("cifar10"),
        "--trainer.enable_checkpointing=false",
        "--trainer.logger=false",
    )
    assert code == 0, err
    assert not list((tmp_path / "runs").rglob("*.ckpt"))


def test_the_miniatures_are_in_the_real_formats(roots):
    assert (roots["cifar10"] / "cifar-10-batches-py/data_batch_5").is_file()
    assert (roots["cifar100"] / "cifar-100-python/train").is_file()
    assert {p.name for p in roots["imagenet"].iterdir()} == {"train", "val"}
