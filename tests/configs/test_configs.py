"""Every shipped YAML, found by glob, through every command on miniature data in the data sets' real formats."""

import itertools
import re
from pathlib import Path

import pytest
import timm
import torch
import yaml

PROJECT = Path(__file__).parents[2]
CONFIGS = PROJECT / "configs"
RECIPES = sorted((CONFIGS / "recipes").glob("*.yaml"))
MODELS = sorted((CONFIGS / "models").glob("*.yaml"))
OVERLAYS = sorted((CONFIGS / "overlays").glob("*.yaml"))
ATTENTION = ["se", "eca", "cbam", "ge", "bam"]


def is_detection(path: Path) -> bool:
    section = yaml.safe_load(path.read_text()).get("model", {})
    return section.get("class_path") == "awconv.tasks.DetectionTask"


CLASSIFIERS = [path for path in MODELS if not is_detection(path)]
DETECTORS = [path for path in MODELS if is_detection(path)]

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
    "coco_1x": ["--data.image_size=64", "--data.max_size=96"],
    "coco_2x": ["--data.image_size=64", "--data.max_size=96"],
    "digit_scenes": [
        "--data.train_scenes=4",
        "--data.val_scenes=5",
        "--data.test_scenes=5",
        "--data.image_size=64",
        "--data.max_size=96",
    ],
}
# what a machine without accelerators, a second node or a hub needs
ON_A_CPU = {
    "gpu": ["--trainer.accelerator=cpu"],
    "fast": ["--trainer.accelerator=cpu", "--model.compile=false"],  # which takes a minute, and has a test of its own
    "ddp": ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.sync_batchnorm=false"],
    "model_parallel": [
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--trainer.strategy.data_parallel_size=1",
    ],
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
def roots(tmp_path, cifar10_root, cifar100_root, imagenet_root, coco_root):
    return {
        "cifar10": cifar10_root,
        "cifar100": cifar100_root,
        "imagenet": imagenet_root,
        "coco_1x": coco_root,
        "coco_2x": coco_root,
        "digit_scenes": tmp_path / "digit_scenes",
    }


@pytest.fixture(scope="session")
def classifier_weights(tmp_path_factory):
    """Makes a file of a classifier's weights, by the backbone's name, in place of those that a hub would send."""
    folder = tmp_path_factory.mktemp("weights")

    def file(backbone: str) -> Path:
        path = folder / f"{backbone}.pth"
        if not path.exists():
            torch.save(timm.create_model(backbone).state_dict(), path)
        return path

    return file


@pytest.fixture
def recipe_options(roots, tmp_path, classifier_weights):
    """The options that run a recipe, by its name, for a step on miniature data."""

    def options(recipe: str, backbone: str = "resnet18") -> list[str]:
        root = [f"--data.root={roots[recipe]}"] if recipe in roots else []
        start = [f"--model.initial_weights={classifier_weights(backbone)}"] if "coco" in recipe else []
        return [*ONE_STEP, *MINIATURE[recipe], *root, *start, f"--trainer.default_root_dir={tmp_path / 'runs'}"]

    return options


def run_all(cli, tmp_path, configs: list[str], options: list[str], pictures: Path) -> None:
    code, _, err = cli("fit", *configs, *options)
    assert code == 0, err
    (checkpoint,) = (tmp_path / "runs").glob("*/*/checkpoints/last.ckpt")
    options = [option for option in options if "initial_weights" not in option]
    shown = {"validate": "val/acc1", "test": "test/acc5", "predict": "predictions.csv"}
    if is_detection(Path(configs[-1])):
        shown = {"validate": "val/map", "test": "results.json", "predict": "predictions.json"}
    for command in ("validate", "test", "predict"):
        code, out, err = cli(command, *configs, *options, f"--ckpt_path={checkpoint}", f"--data.predict_dir={pictures}")
        assert code == 0, err
        assert shown[command] in out


@pytest.mark.parametrize("path", [*RECIPES, *MODELS, *OVERLAYS], ids=name)
def test_the_first_line_says_what_it_is_for(path):
    lines = path.read_text().splitlines()
    assert re.match(r"# \S.{30,}", lines[0])
    assert isinstance(yaml.safe_load(path.read_text()), dict)
    assert not re.search(r"\b[A-Z]{6,}\b", lines[0]), "a place where a figure was to be filled in"


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_leaves_no_part_of_its_schedule_to_defaults(path):
    recipe = yaml.safe_load(path.read_text())
    assert {"optimizer", "lr", "weight_decay", "lr_schedule"} <= recipe["model"]["init_args"].keys()
    assert recipe["trainer"]["max_epochs"] > 0
    assert not {"backbone", "head"} & recipe["model"]["init_args"].keys(), "the network is a model config's business"


@pytest.mark.parametrize("path", MODELS, ids=name)
def test_each_model_has_its_twin(path):
    config = yaml.safe_load(path.read_text())["model"]["init_args"]
    is_aw = path.name.startswith("aw_")
    twin = path.with_name(path.name.removeprefix("aw_") if is_aw else f"aw_{path.name}")
    other = yaml.safe_load(twin.read_text())["model"]["init_args"]
    assert config == {**other, "aw": True if is_aw else None}


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_every_recipe_through_every_command(cli, tmp_path, recipe, recipe_options, picture_folder):
    model = "aw_faster_rcnn_resnet18_small" if is_detection(recipe) else "aw_resnet20"
    configs = ["-c", recipe, "-c", CONFIGS / f"models/{model}.yaml"]
    run_all(cli, tmp_path, configs, recipe_options(recipe.stem), picture_folder)


@pytest.mark.parametrize("model", CLASSIFIERS, ids=name)
def test_every_classifier_through_every_command(cli, tmp_path, model, recipe_options, picture_folder):
    configs = ["-c", CONFIGS / "recipes/cifar100.yaml", "-c", model]
    run_all(cli, tmp_path, configs, recipe_options("cifar100"), picture_folder)


@pytest.mark.slow
@pytest.mark.parametrize("model", DETECTORS, ids=name)
def test_every_detector_through_every_command(cli, tmp_path, model, recipe_options, picture_folder):
    configs = ["-c", CONFIGS / "recipes/coco_1x.yaml", "-c", model]
    backbone = yaml.safe_load(model.read_text())["model"]["init_args"]["backbone"]
    run_all(cli, tmp_path, configs, recipe_options("coco_1x", backbone), picture_folder)


@pytest.mark.parametrize("head", ["retinanet", "fcos"])
def test_every_head_trains_on_digit_scenes(cli, tmp_path, head, recipe_options):
    configs = ["-c", CONFIGS / "recipes/digit_scenes.yaml", "-c", CONFIGS / f"models/aw_{head}_resnet50_fpn.yaml"]
    code, _, err = cli("fit", *configs, *recipe_options("digit_scenes"), "--model.backbone=resnet18")
    assert code == 0, err


@pytest.mark.parametrize("overlay", [o for o in OVERLAYS if o.stem != "compile"], ids=name)
def test_every_overlay_trains(cli, tmp_path, overlay, recipe_options, monkeypatch, away_from_home):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    detection = overlay.stem.endswith("_detection")
    recipe, model = ("digit_scenes", "aw_faster_rcnn_resnet18_small") if detection else ("digits", "aw_resnet20")
    parts = (f"recipes/{recipe}.yaml", f"models/{model}.yaml", overlay)
    configs = itertools.chain.from_iterable(("-c", CONFIGS / part) for part in parts)
    options = [*recipe_options(recipe), *ON_A_CPU.get(overlay.stem, [])]
    if overlay.stem.startswith("overfit"):
        options = [o for o in options if "limit_train" not in o] + ["--trainer.max_epochs=2"]
    code, _, err = cli("fit", *configs, *options)
    assert code == 0, err
    (run,) = (tmp_path / "runs").glob("*/*")
    saved = yaml.safe_load((run / "config.yaml").read_text())
    for key, value in yaml.safe_load(overlay.read_text()).get("trainer", {}).items():
        if key == "logger" or any(f"trainer.{key}=" in option for option in options):
            continue
        if isinstance(value, dict):  # the rest of the class's arguments is saved beside those that were given
            assert saved["trainer"][key]["class_path"] == value["class_path"]
            given = {k: v for k, v in value["init_args"].items() if not any(f"{key}.{k}=" in o for o in options)}
            assert given.items() <= saved["trainer"][key]["init_args"].items()
        else:
            assert saved["trainer"][key] == value


@pytest.mark.parametrize("overlay", ["bf16", "debug", "wandb"])
def test_overlays_go_on_top_of_a_detector(cli, tmp_path, overlay, recipe_options, monkeypatch, away_from_home):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    parts = ("recipes/digit_scenes", "models/aw_faster_rcnn_resnet18_small", f"overlays/{overlay}")
    configs = itertools.chain.from_iterable(("-c", CONFIGS / f"{part}.yaml") for part in parts)
    code, _, err = cli("fit", *configs, *recipe_options("digit_scenes"))
    assert code == 0, err


@pytest.mark.slow
def test_the_compile_overlay_trains(cli, tmp_path, recipe_options):
    configs = [CONFIGS / f"{part}.yaml" for part in ("recipes/digits", "models/resnet20", "overlays/compile")]
    code, _, err = cli("fit", *(a for c in configs for a in ("-c", c)), *recipe_options("digits"))
    assert code == 0, err
    (checkpoint,) = (tmp_path / "runs").glob("*/*/checkpoints/last.ckpt")
    assert b"_orig_mod" not in checkpoint.read_bytes()


# every model with one of them; that every network takes and trains with each is shown in tests/models
COMBINATIONS = [(CONFIGS / "models/aw_resnet20.yaml", attention) for attention in ATTENTION]
COMBINATIONS += [
    (model, attention)
    for model, attention in zip(CLASSIFIERS, itertools.cycle(ATTENTION), strict=False)
    if (model, attention) not in COMBINATIONS
]


@pytest.mark.parametrize(
    ("model", "attention"),
    COMBINATIONS,
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


@pytest.mark.parametrize("attention", ATTENTION)
def test_activation_attention_is_one_flag_on_a_detector(cli, attention, recipe_options):
    configs = ["-c", CONFIGS / "recipes/digit_scenes.yaml", "-c", CONFIGS / "models/aw_faster_rcnn_resnet18_small.yaml"]
    code, _, err = cli("fit", *configs, "--model.attention", attention, *recipe_options("digit_scenes"))
    assert code == 0, err


def test_the_miniatures_are_in_the_real_formats(roots):
    assert (roots["cifar10"] / "cifar-10-batches-py/data_batch_5").is_file()
    assert (roots["cifar100"] / "cifar-100-python/train").is_file()
    assert {p.name for p in roots["imagenet"].iterdir()} == {"train", "val"}
