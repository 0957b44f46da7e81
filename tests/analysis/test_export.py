"""Exported networks in their own runtimes against eager mode, preprocessing done anew from its file, and bad input."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from sklearn.datasets import load_sample_image
from torch import nn

from awconv.analysis import export
from awconv.data import CIFAR10DataModule, COCODataModule, DigitsDataModule, ImageNetDataModule
from awconv.data.pictures import PictureDataset
from awconv.layers import AWConv2d
from awconv.tasks import ClassificationTask, DetectionTask

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module", autouse=True)
def beside_the_script():
    """The classes of this file lie beside the script that runs, as those of a fork do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(Path(__file__).with_name("script.py"))])
        yield


FILES = ["README.txt", "labels.json", "model.onnx", "model.pt2", "preprocessing.json"]


def wake(network, *batches):
    """Statistics of BatchNorm measured on pictures, and attention that differs from sample to sample.

    No norm keeps the weight of zero with which some begin: nothing of what lies before it would show.
    """
    generator = torch.Generator().manual_seed(0)
    heads = {m.attention.norm2 for m in network.modules() if isinstance(m, AWConv2d)}
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None  # the plain average
            with torch.no_grad():
                norm.weight.copy_(0.5 + torch.rand(norm.weight.shape, generator=generator))
                if norm in heads:
                    norm.bias.copy_(torch.randn(norm.bias.shape, generator=generator))
    for pictures in batches:
        with torch.no_grad():
            network.train()(pictures)
    return network.eval()


def pictures_like(batch, channels, height, width, seed=1):
    """Pictures of different colours and contrasts, as if normalised."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randn(batch, channels, 2, 2, generator=generator)
    blurred = nn.functional.interpolate(colours, (height, width), mode="bicubic")
    return blurred + 0.5 * torch.randn(batch, channels, height, width, generator=generator)


def write_checkpoint(path, task, data):
    """What lightning_cli.py fit writes, as far as an export needs it; test_cli's checkpoint is the real one."""

    def hyper_parameters(module):
        kind = type(module)
        own = {
            "_class_path": f"{kind.__module__}.{kind.__name__}",
            "_instantiator": "lightning.pytorch.cli.instantiate_module",
        }
        return {**dict(module.hparams), **own}

    content = {
        "state_dict": task.state_dict(),
        "pytorch-lightning_version": "2.6.4",
        "hparams_name": "kwargs",
        "hyper_parameters": hyper_parameters(task),
        "datamodule_hparams_name": "kwargs",
        "datamodule_hyper_parameters": hyper_parameters(data),
    }
    torch.save(content, path)
    return path


def run(args, capfd):
    """Exit code, standard output and standard error of the command line."""
    capfd.readouterr()
    code = 0
    try:
        export.main([str(arg) for arg in args])
    except SystemExit as error:
        code = error.code
    out, err = capfd.readouterr()
    return code, out, err


def in_onnxruntime(folder):
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return lambda pictures: torch.from_numpy(session.run(["logits"], {"pictures": pictures.numpy()})[0])


def in_torch(folder):
    module = torch.export.load(folder / "model.pt2").module()
    return lambda pictures: module(pictures).detach()


RUNTIMES = {"model.onnx": in_onnxruntime, "model.pt2": in_torch}


class TinyTask(ClassificationTask):
    """A network of the test's own: two small AW layers, the second depthwise."""

    def build_network(self):
        torch.manual_seed(0)
        network = nn.Sequential(
            AWConv2d(self.hparams["in_channels"], 8, 3, 2, 1, reduction=1, backend="grouped"),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            AWConv2d(8, 8, (3, 2), padding="same", groups=8, padding_mode="replicate"),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, self.hparams["num_classes"]),
        )
        return wake(network, pictures_like(16, self.hparams["in_channels"], 12, 12))


class OneSizeTask(TinyTask):
    """Looks at each pixel with a weight of its own, so that only one size fits."""

    def build_network(self):
        channels = self.hparams["in_channels"]
        return nn.Sequential(AWConv2d(channels, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 12 * 12, 3))


class PooledTask(TinyTask):
    """Pools to 2x2, which ONNX can only do for one size, and a torch.export program for all."""

    def build_network(self):
        channels = self.hparams["in_channels"]
        return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))


class OtherwiseTask(TinyTask):
    """Validates with something else than its network."""

    def forward(self, images):
        return 1.01 * super().forward(images)


def tiny(kind=TinyTask, **data):
    names = ["cat", "dög", "owl"]
    task = kind("none", num_classes=3, class_names=names, in_channels=3, image_size=12)
    return task, ImageNetDataModule(image_size=12, class_names=names, **data)


# ---- the networks ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "data", "other_size"),
    [
        ("resnet10t", ImageNetDataModule(image_size=48, class_names=["a", "b", "c"]), (67, 55)),
        ("mobilenetv3_small_050", ImageNetDataModule(image_size=64, class_names=["a", "b"]), (70, 129)),
    ],
)
def test_aw_networks_equal_eager_mode(backbone, data, other_size, tmp_path, capfd):
    torch.manual_seed(0)
    channels, size = data.in_channels, data.image_size
    task = ClassificationTask(
        backbone, aw={"backend": "grouped"}, num_classes=data.num_classes, in_channels=channels, image_size=size
    )
    # both sizes, or the logits of one grow so large that rounding is more than 1e-4 of them
    network = wake(task.network, *(pictures_like(32, channels, *s) for s in ((size, size), other_size)))
    code, out, err = run([write_checkpoint(tmp_path / "best.ckpt", task, data)], capfd)
    assert (code, err) == (0, "")
    assert out.count("any size") == 2

    runs = {name: load(tmp_path / "best_export") for name, load in RUNTIMES.items()}
    for batch in (1, 3, 8):
        for height, width in ((size, size), other_size):
            pictures = pictures_like(batch, channels, height, width, seed=batch)
            with torch.no_grad():
                expected = network(pictures)
            for name, run_in in runs.items():
                difference = (run_in(pictures) - expected).abs().max().item()
                assert difference < 1e-4, (name, batch, height, width)

    # were it all the same which sample has which kernels, a mistake with them would not show
    layers = [module for module in network.modules() if isinstance(module, AWConv2d)]
    assert len(layers) >= 8
    for layer in layers:
        layer.attention.register_forward_hook(lambda module, inputs, maps: maps.roll(1, dims=0))
    with torch.no_grad():
        assert (network(pictures) - expected).abs().max() > 0.1


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Folder, task, data and printed lines of one export of the tiny network."""
    folder = tmp_path_factory.mktemp("tiny")
    task, data = tiny()
    checkpoint = write_checkpoint(folder / "last.ckpt", task, data)
    command = [sys.executable, "-m", "awconv.analysis.export", str(checkpoint), "--out", str(folder / "out")]
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": paths}
    where = Path(__file__).parent  # as a fork is exported in the folder of its classes
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment, cwd=where)
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "out", task.eval(), data, done.stdout


@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize("batch", [1, 3, 8, 13])
@pytest.mark.parametrize("size", [(12, 12), (15, 18), (5, 31), (224, 3)])
def test_tiny_network_equals_eager_mode(exported, name, batch, size):
    folder, task, *_ = exported
    pictures = pictures_like(batch, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(RUNTIMES[name](folder)(pictures), task(pictures), rtol=0, atol=1e-5)


def test_folder_holds_what_it_says_and_nothing_else(exported):
    folder, *_ = exported
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert json.loads((folder / "labels.json").read_text(encoding="utf-8")) == ["cat", "dög", "owl"]
    assert sorted(path.name for path in folder.parent.iterdir()) == ["last.ckpt", "out"]


def test_table_shows_small_differences_for_every_batch_and_size(exported):
    *_, out = exported
    rows = [line.split() for line in out.splitlines() if line.split() and line.split()[0] in {"1", "3", "8"}]
    assert [row[:2] for row in rows] == [[str(n), size] for size in ("12x12", "15x19") for n in (1, 3, 8)]
    differences = [float(cell) for row in rows for cell in row[2:]]
    assert len(differences) == 12
    assert max(differences) < 1e-5
    assert any(differences)


def test_readme_is_true(exported):
    """Its two listings run as they stand."""
    folder, task, *_ = exported
    pictures = pictures_like(2, 3, 12, 12)
    text = (folder / "README.txt").read_text(encoding="utf-8")
    listings = text.partition("Largest absolute")[0].splitlines()
    code = "\n".join(line.removeprefix("    ") for line in listings if line.startswith("    "))
    onnx_code, torch_code = code.split("import torch")
    known = {"pictures": pictures.numpy(), "print": lambda names: known.update(names=names)}
    before = os.getcwd()
    os.chdir(folder)
    try:
        exec(onnx_code, known)
        program = {"pictures": pictures}
        exec("import torch" + torch_code, program)
    finally:
        os.chdir(before)
    with torch.no_grad():
        best = task(pictures).argmax(1).tolist()
    assert known["names"] == [["cat", "dög", "owl"][k] for k in best]
    assert program["logits"].argmax(1).tolist() == best
    assert all(
        line in text for line in ("(batch, 3, height, width)", "(batch, 3)", "model.onnx takes pictures of any size.")
    )


def test_names_and_shapes_are_those_of_the_description(exported):
    folder, *_ = exported
    described = json.loads((folder / "preprocessing.json").read_text())
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    for (found,), said in ((session.get_inputs(), described["input"]), (session.get_outputs(), described["output"])):
        assert found.name == said["name"]
        assert found.shape == said["shape"]
        assert found.type == "tensor(float)"
        assert said["dtype"] == "float32"
    assert (described["input"]["height"], described["input"]["width"]) == (12, 12)
    assert described["input"]["any_height_and_width"] == {"model.onnx": True, "model.pt2": True}


def test_files_do_not_tell_where_they_were_made(exported):
    folder, *_ = exported
    for path in folder.iterdir():
        content = path.read_bytes()
        for place in ("site-packages", str(Path(export.__file__).parents[1]), str(folder.parent)):
            assert place.encode() not in content, (path.name, place)


def test_network_of_one_size_keeps_it(tmp_path, capfd):
    task, data = tiny(OneSizeTask)
    code, out, err = run([write_checkpoint(tmp_path / "a.ckpt", task, data), "--out", tmp_path / "out"], capfd)
    assert (code, err) == (0, "")
    assert "model.onnx takes pictures of 12x12 only (the network itself refuses 15x19: RuntimeError: " in out
    assert "model.pt2 takes pictures of 12x12 only" in out
    described = json.loads((tmp_path / "out" / "preprocessing.json").read_text())
    assert described["input"]["any_height_and_width"] == {"model.onnx": False, "model.pt2": False}
    for batch in (1, 3, 8):
        pictures = pictures_like(batch, 3, 12, 12)
        with torch.no_grad():
            expected = task.eval()(pictures)
        for load in RUNTIMES.values():
            torch.testing.assert_close(load(tmp_path / "out")(pictures), expected, rtol=0, atol=1e-5)


def test_each_file_takes_any_size_where_it_can(tmp_path):
    task, data = tiny(PooledTask)
    files = export.export_classifier(task, data)
    assert {name: file.any_size for name, file in files.items()} == {"model.onnx": False, "model.pt2": True}
    assert files["model.onnx"].reason
    assert [key[1] for key in files["model.onnx"].differences] == ["12x12"] * 3


def test_memory_format_and_backend_of_training_do_not_matter(tmp_path):
    torch.manual_seed(0)
    task = TinyTask("none", num_classes=3, in_channels=3, image_size=12, channels_last=True)
    (file,) = export.export_classifier(task, tiny()[1], onnx=False).values()
    assert file.any_size


def test_without_onnx(tmp_path, capfd, monkeypatch):
    task, data = tiny()
    checkpoint = write_checkpoint(tmp_path / "a.ckpt", task, data)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    code, out, err = run([checkpoint], capfd)
    assert (code, out) == (2, "")
    assert "pip install onnxscript onnxruntime" in err
    assert "--no-onnx" in err
    code, out, err = run([checkpoint, "--no-onnx"], capfd)
    assert (code, err) == (0, "")
    assert sorted(path.name for path in (tmp_path / "a_export").iterdir()) == [n for n in FILES if n != "model.onnx"]
    assert "onnx" not in (tmp_path / "a_export" / "README.txt").read_text()


def test_disagreement_is_exit_code_1_and_leaves_nothing(tmp_path, capfd):
    task, data = tiny(OtherwiseTask)
    code, _, err = run([write_checkpoint(tmp_path / "a.ckpt", task, data), "--no-onnx"], capfd)
    assert code == 1
    assert err.count("\n") == 1
    assert "model.pt2 does not compute what the checkpoint's network does: random pictures of 12x12" in err
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


class AmplifyingTask(TinyTask):
    """Makes so much of the last digit that float32 cannot tell."""

    def build_network(self):
        network = super().build_network()
        network[-1].weight.data *= 1e6
        return network


def test_what_float32_cannot_tell_is_no_disagreement(tmp_path, capfd):
    task, data = tiny(AmplifyingTask)
    code, out, err = run([write_checkpoint(tmp_path / "a.ckpt", task, data)], capfd)
    assert (code, err) == (0, "")
    assert "any size" in out
    assert "float64" in out
    assert "float64" in (tmp_path / "a_export" / "README.txt").read_text()


def test_broken_weights_are_told(tmp_path, capfd):
    task, data = tiny()
    with torch.no_grad():
        task.network[-1].bias[1] = math.nan
    code, _, err = run([write_checkpoint(tmp_path / "a.ckpt", task, data)], capfd)
    assert code == 2
    assert err.count("\n") == 1
    assert "not all finite" in err
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


# ---- preprocessing --------------------------------------------------------------------------------------------------


def prepare(path, steps):
    """One picture file as steps of preprocessing.json have it, with Pillow and NumPy alone: (C, H, W)."""
    with PIL.Image.open(path) as file:
        picture = np.asarray(PIL.ImageOps.exif_transpose(file).convert("RGB"))
    for step in steps:
        match step:
            case {"step": "decode", "bits": 8}:
                assert picture.dtype == np.uint8
            case {"step": "convert", "to": "RGB"}:
                pass
            case {"step": "convert", "to": "grey"}:
                grey = picture @ np.array([19595, 38470, 7471]) / 65536
                picture = np.floor(grey + 0.5).astype(np.uint8)[..., None]
            case {"step": "invert"}:
                picture = 255 - picture
            case {"step": "resize", "shorter_side": side, "interpolation": "bilinear", "antialias": True}:
                height, width = picture.shape[:2]
                size = (side, int(width * side / height)) if height <= width else (int(height * side / width), side)
                if min(height, width) != side:
                    planes = [PIL.Image.fromarray(plane) for plane in picture.transpose(2, 0, 1)]
                    planes = [plane.resize(size[::-1], PIL.Image.Resampling.BILINEAR) for plane in planes]
                    picture = np.stack([np.asarray(plane) for plane in planes], axis=-1)
            case {"step": "center_crop", "height": height, "width": width}:
                rows, columns = picture.shape[:2]
                top, left = round((rows - height) / 2), round((columns - width) / 2)
                picture = picture[top : top + height, left : left + width]
            case {"step": "scale", "divide_by": divisor}:
                picture = picture.astype(np.float32) / divisor
            case {"step": "normalise", "mean": mean, "std": std}:
                picture = (picture - np.array(mean)) / np.array(std)
            case _:
                raise AssertionError(step)
    return picture.transpose(2, 0, 1)


@pytest.mark.parametrize(
    "data",
    [
        ImageNetDataModule(image_size=96),
        ImageNetDataModule(image_size=32, eval_image_size=51, eval_resize_size=64, mean=[0.1, 0.2, 0.3], std=[1, 2, 3]),
        CIFAR10DataModule(),
        DigitsDataModule(),
        DigitsDataModule(image_size=28, invert=True),
    ],
    ids=["imagenet", "imagenet_own", "cifar10", "digits", "digits_invert"],
)
@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_preprocessing_can_be_done_from_its_file_alone(data, name, tmp_path):
    described = json.loads(json.dumps(export.describe_preprocessing(data)))
    picture = PIL.Image.fromarray(load_sample_image(name))
    path = tmp_path / "picture.png"
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 6
    picture.crop((0, 0, 500, 333)).save(path, exif=exif)
    # a level of grey, for the resizing of the one and of the other may round another way
    level = 1.01 / 255 / min(data.std)
    evaluated, _ = PictureDataset([str(path)], [0], data.eval_transform())[0]
    mine = prepare(path, described["steps"])
    assert mine.shape == tuple(evaluated.shape)
    np.testing.assert_allclose(mine, evaluated, rtol=0, atol=level)
    predicted, _ = PictureDataset([str(path)], None, data.predict_transform())[0]
    mine = prepare(path, described.get("prediction_steps", described["steps"]))
    np.testing.assert_allclose(mine, predicted, rtol=0, atol=level)


def test_every_step_is_explained():
    described = export.describe_preprocessing(DigitsDataModule(invert=True))
    used = {step["step"] for steps in (described["steps"], described["prediction_steps"]) for step in steps}
    assert set(described["how"]) == used
    assert used == {"decode", "convert", "invert", "resize", "center_crop", "scale", "normalise"}
    assert "prediction_steps" not in export.describe_preprocessing(ImageNetDataModule())


class Solarised(ImageNetDataModule):
    """Has a transform that no file can describe."""

    def eval_geometry(self):
        return [*super().eval_geometry(), torch.nn.Dropout(0.0)]


def test_steps_of_ones_own_are_named_and_not_passed_over():
    steps = export.describe_preprocessing(Solarised(image_size=12))["steps"]
    assert steps[4] == {"step": "other", "text": "Dropout(p=0.0, inplace=False)"}


# ---- bad input ------------------------------------------------------------------------------------------------------


def refused(args, capfd, folder):
    """The one line that is said, after which ``folder`` is as it was."""
    before = {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
    code, out, err = run(args, capfd)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert before == {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
    return err


class Code:
    def __reduce__(self):
        return os.mkdir, ("it_ran",)


def foreign(**changes):
    content = {
        "state_dict": {},
        "hyper_parameters": {"_class_path": "awconv.tasks.ClassificationTask"},
        "datamodule_hyper_parameters": {"_class_path": "awconv.data.DigitsDataModule"},
    }
    return {**content, **changes}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"no checkpoint at all", ["weights only", "another kind of file"]),
        (b"", ["weights only", "damaged"]),
        ({"state_dict": {}, "extra": Code()}, ["weights-only", "carries code"]),
        ([1, 2], ["no checkpoint of a run"]),
        ({"conv.weight": torch.zeros(1)}, ["no checkpoint of a run"]),
        ({"state_dict": {}}, ["lacks hyper_parameters, datamodule_hyper_parameters", "lightning_cli.py fit"]),
        (foreign(hyper_parameters={"lr": 1.0}), ["lacks hyper_parameters['_class_path']", "export_classifier"]),
        (foreign(hyper_parameters={"_class_path": "no.such.Task"}), ["no.such.Task", "where it was trained"]),
        (foreign(hyper_parameters={"_class_path": "os.path.join"}), ["os.path.join", "no class"]),
        (foreign(hyper_parameters={"_class_path": "subprocess.Popen"}), ["Popen is no ClassificationTask"]),
        (foreign(datamodule_hyper_parameters={"_class_path": "json.JSONDecoder"}), ["JSONDecoder is no Classific"]),
        (foreign(), ["cannot be rebuilt", "arguments are required: backbone)"]),
    ],
    ids=[
        "text",
        "empty",
        "code",
        "list",
        "weights",
        "no_hyperparameters",
        "no_class",
        "unknown",
        "function",
        "popen",
        "data",
        "no_arguments",
    ],
)
def test_wrong_checkpoints_are_told_in_one_line(content, told, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "wrong.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    named = refused([path], capfd, tmp_path)
    message = refused([path, "--trust-checkpoint-config"], capfd, tmp_path)
    assert all(word in message for word in [str(path), *told]), message
    # nothing that a file names is imported without the flag
    assert named == message or "neither of awconv nor beside" in named


def test_what_the_script_has_imported_is_no_more_its_own(tmp_path, capfd):
    content = foreign(hyper_parameters={"_class_path": f"{__name__}.subprocess.Popen"})
    torch.save(content, tmp_path / "a.ckpt")
    assert "subprocess.Popen, which is neither" in refused([tmp_path / "a.ckpt"], capfd, tmp_path)


def test_weights_of_another_network_are_told_in_one_line(tmp_path, capfd):
    task, data = tiny()
    path = write_checkpoint(tmp_path / "a.ckpt", task, data)
    content = torch.load(path, weights_only=True)
    content["state_dict"]["network.9.weight"] = content["state_dict"].pop("network.6.weight")
    torch.save(content, path)
    message = refused([path], capfd, tmp_path)
    assert "another network" in message
    assert "likely cause" in message


def test_detectors_are_refused_with_what_to_do_instead(tmp_path, capfd):
    kinds = ((DetectionTask, "awconv.tasks.DetectionTask"), (COCODataModule, "awconv.data.COCODataModule"))
    hyper_parameters = [{"_class_path": path} for _, path in kinds]
    torch.save(
        foreign(hyper_parameters=hyper_parameters[0], datamodule_hyper_parameters=hyper_parameters[1]),
        tmp_path / "detector.ckpt",
    )
    message = refused([tmp_path / "detector.ckpt"], capfd, tmp_path)
    assert "DetectionTask.load_from_checkpoint" in message


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ([], ["required", "CHECKPOINT"]),
        (["{there}", "--quick"], ["--quick"]),
        (["{folder}/nothing.ckpt"], ["nothing.ckpt", "does not exist"]),
        (["{folder}"], ["is a folder"]),
        (["{there}", "--out", "{folder}"], ["--out", "is not empty", "new folder"]),
        (["{there}", "--out", "{there}"], ["--out", "is a file"]),
        (["{there}", "--out", "{folder}/no/where"], ["--out", "no folder", "make it first"]),
    ],
)
def test_wrong_arguments_are_told_in_one_line(args, told, tmp_path, capfd):
    torch.save(foreign(), tmp_path / "there.ckpt")
    args = [arg.format(there=tmp_path / "there.ckpt", folder=tmp_path) for arg in args]
    message = refused(args, capfd, tmp_path)
    assert all(word in message for word in told), message


@pytest.mark.parametrize("step", ["mkdir", "write_bytes"])
def test_what_cannot_be_written_is_told_in_one_line(step, tmp_path, capfd, monkeypatch):
    task, data = tiny()
    checkpoint = write_checkpoint(tmp_path / "a.ckpt", task, data)
    monkeypatch.setattr(export, "export_classifier", lambda *_, **__: {"model.pt2": export.ExportedFile(b"", True, {})})

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, step, fail)
    code, _, err = run([checkpoint], capfd)
    monkeypatch.undo()
    assert code == 2
    assert err.count("\n") == 1
    assert "No space left on device" in err
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_folder_that_fills_meanwhile_is_left_alone(tmp_path, capfd, monkeypatch):
    task, data = tiny()
    checkpoint = write_checkpoint(tmp_path / "a.ckpt", task, data)

    def export_meanwhile(*args, **options):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("another's")
        return {"model.pt2": export.ExportedFile(b"", True, {})}

    monkeypatch.setattr(export, "export_classifier", export_meanwhile)
    code, _, err = run([checkpoint, "--out", tmp_path / "out"], capfd)
    assert code == 2
    assert err.count("\n") == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ckpt", "out"]


def test_ctrl_c_leaves_nothing(tmp_path, capfd, monkeypatch):
    task, data = tiny()
    checkpoint = write_checkpoint(tmp_path / "a.ckpt", task, data)

    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "export_classifier", interrupt)
    code, _, err = run([checkpoint], capfd)
    assert (code, err) == (130, "interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


# ---- the whole way --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_trained_checkpoint_with_averaged_weights(cli, tmp_path, capfd):
    code, _, err = cli(
        "fit", "--trainer.default_root_dir", tmp_path, "--trainer.max_epochs", 1, "--trainer.limit_train_batches", 3,
        "--trainer.limit_val_batches", 1, "--trainer.enable_progress_bar", "false", "--model.ema_decay", 0.5,
        "--model.aw.include", '["layer1.0.*"]', "--data.mean", "[0.25]",
    )  # fmt: skip
    assert code == 0, err
    (checkpoint,) = tmp_path.glob("**/best.ckpt")
    code, _, err = run([checkpoint, "--no-onnx"], capfd)
    assert (code, err) == (0, "")
    folder = checkpoint.with_name("best_export")
    task = ClassificationTask.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True).eval()
    pictures = pictures_like(4, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(in_torch(folder)(pictures), task(pictures), rtol=0, atol=1e-4)
    described = json.loads((folder / "preprocessing.json").read_text())
    assert described["steps"][-1] == {"step": "normalise", "mean": [0.25], "std": [0.376]}
    assert json.loads((folder / "labels.json").read_text()) == [str(digit) for digit in range(10)]
