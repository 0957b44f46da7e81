"""Turns a classifier's checkpoint into files that run without this project: ONNX and a torch.export program.

Run it as ``python -m awconv.analysis.export CHECKPOINT``.
"""

import copy
import io
import json
import logging
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from awconv.analysis.command import OneLineParser
from awconv.checkpoint import DATA_HPARAMS, HPARAMS, make_harmless, read_checkpoint
from awconv.errors import InputError

if TYPE_CHECKING:  # they import Lightning and timm, which takes seconds: a wrong argument should not wait for it
    from awconv.data import ClassificationDataModule
    from awconv.tasks import ClassificationTask

TOLERANCE = 1e-4
_BATCHES = (1, 3, 8)
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_INPUT, _OUTPUT = "pictures", "logits"
_ONNX, _PROGRAM = "model.onnx", "model.pt2"
_ANY_SIZE, _BATCH = {0: "batch", 2: "height", 3: "width"}, {0: "batch"}

# How each step of preprocessing.json is done; the file holds what its own steps need.
_HOW = {
    "decode": "8 bits a sample; of 16 bits the upper 8. The image is turned as its EXIF orientation says. "
    "Transparency is dropped.",
    "convert": "To RGB: grey is repeated three times. To grey: (19595 R + 38470 G + 7471 B) / 65536, rounded to a "
    "whole number, as Pillow does.",
    "invert": "255 minus each sample.",
    "resize": "To height and width; or the shorter side to shorter_side and the longer one to "
    "int(longer * shorter_side / shorter), nothing where the shorter side has that length already. With antialias, "
    "bilinear and bicubic are those of Pillow's Image.resize. 8-bit samples are rounded to whole numbers.",
    "center_crop": "From row round((picture's height - height) / 2) and column round((picture's width - width) / 2), "
    "where a half goes to the even number. A smaller picture first gets zeros on all sides, on the bottom and the "
    "right one more where their number is odd.",
    "scale": "Samples as float32, divided by divide_by.",
    "normalise": "(sample - mean) / std, with one mean and one std for each channel.",
    "other": "A transform of Python that this file cannot describe: see its text.",
}


class DisagreementError(RuntimeError):
    """An exported network computes something else than the checkpoint's; nothing is wrong with the input."""


@dataclass
class ExportedFile:
    """One exported form of the network, checked.

    Attributes:
        content: The file's bytes.
        any_size: Whether pictures may have any height and width, or those of evaluation only.
        differences: Largest absolute difference from eager for each number of pictures and size.
        reason: Why not any size; empty if any.
        rounding: By how much eager itself differs from float64, where a difference is larger than the tolerance and
            passes for rounding; else 0.
    """

    content: bytes = field(repr=False)
    any_size: bool
    differences: dict[tuple[int, str], float]
    reason: str = ""
    rounding: float = 0.0


def export_classifier(
    task: "ClassificationTask", data: "ClassificationDataModule", *, onnx: bool = True
) -> dict[str, ExportedFile]:
    """Exports a classifier and checks it against eager mode on random pictures, 1, 3 and 8 at a time.

    The input is named ``pictures``, float32 (batch, C, height, width), normalised as ``data`` normalises them; the
    output is ``logits``, float32 (batch, K). The batch is dynamic, and so are height and width where the exporters
    can do that and the result is right for another size too. AW-convolution is exported in its gemm form.

    Args:
        task: The classifier. It is put into evaluation mode, its parameters need no gradients and its AW layers choose
            their backends from now on.
        data: What its pictures come from; the data themselves need not be there.
        onnx: Make ``model.onnx`` too.

    Returns:
        File names, ``model.onnx`` and ``model.pt2``, and what goes into them.

    Raises:
        InputError: If the network cannot be exported, or its logits are not finite.
        DisagreementError: If an exported network differs from eager by more than 1e-4, and by more than four times as
            much as eager in float32 differs from eager in float64.
    """
    from awconv.layers import AWConv2d

    task.eval().requires_grad_(False)
    network = task.network.to(memory_format=torch.contiguous_format)
    for module in network.modules():
        if isinstance(module, AWConv2d):
            module.backend = "auto"  # which is gemm while exporting, whatever the checkpoint computed with
    height, width = _evaluation_size(data)
    # odd, and larger on both sides: a network whose feature maps end in a single pixel may be unable to get smaller
    other_size = (height + height // 4) | 1, (width + width // 2) | 1
    own = _Eager(task, data, (height, width))
    reason, other = "", None
    try:
        other = _Eager(task, data, other_size)
    except Exception as error:  # whatever the network raises at a size that it is not made for
        reason = f"the network itself refuses {other_size[0]}x{other_size[1]}: {_in_a_line(error)}"

    @cache
    def program(any_size: bool) -> torch.export.ExportedProgram:
        sizes = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC} if any_size else {}
        example = own.pictures[-1][:2]  # of a single one the exporter would take the batch to be always 1
        with torch.no_grad():
            exported = torch.export.export(
                network, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1), **sizes},), strict=False
            )
        for node in exported.graph.nodes:
            node.meta.pop("stack_trace", None)  # the paths of this machine
        return exported

    forms: dict[str, tuple[_Build, _Load]] = {
        _PROGRAM: (lambda any_size: _save_program(program(any_size)), _load_program)
    }
    if onnx:
        forms = {_ONNX: (lambda any_size: _save_onnx(program(any_size), any_size), _load_onnx), **forms}
    with _quiet():
        return {
            name: _first_that_agrees(name, build, load, own, other, reason) for name, (build, load) in forms.items()
        }


_Build = Callable[[bool], bytes]
_Load = Callable[[bytes], Callable[[Tensor], Tensor]]


class _Eager:
    """Random pictures of one size, 1, 3 and 8 of them, and what the network makes of them in eager mode."""

    def __init__(self, task: "ClassificationTask", data: "ClassificationDataModule", size: tuple[int, int]) -> None:
        generator = torch.Generator().manual_seed(0)
        mean, std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (data.mean, data.std))
        self._task, self.size = task, f"{size[0]}x{size[1]}"
        self.pictures: list[Tensor] = []
        for batch in _BATCHES:
            # noise alone has the same averages in all pictures, and so the same attention
            colours = F.interpolate(
                torch.rand(batch, data.in_channels, 3, 3, generator=generator), size, mode="bilinear"
            )
            noise = torch.rand(batch, data.in_channels, *size, generator=generator) - 0.5
            self.pictures.append(((colours + 0.3 * noise).clamp(0, 1) - mean) / std)
        with torch.no_grad():
            self.logits: list[Tensor] = [task(pictures).float() for pictures in self.pictures]
        if not all(torch.isfinite(logits).all() for logits in self.logits):
            raise InputError(
                "the network's logits are not all finite numbers, even on random pictures: its weights are broken; "
                "export another checkpoint"
            )

    def differences(self, run: Callable[[Tensor], Tensor]) -> list[float]:
        """Largest absolute difference of ``run`` for each number of pictures."""
        pairs = zip(self.pictures, self.logits, strict=True)
        return [(run(pictures) - logits).abs().max().item() for pictures, logits in pairs]

    @cached_property
    def rounding(self) -> float:
        """By how much float32 itself is wrong: the largest difference from float64, 0 where that does not work."""
        try:
            precise = copy.deepcopy(self._task).double()
            with torch.no_grad():
                return max(self.differences(lambda pictures: precise(pictures.double())))
        except Exception:  # a network of the user's may hold what cannot be copied, or insists on float32
            return 0.0


def _first_that_agrees(
    name: str, build: _Build, load: _Load, own: _Eager, other: _Eager | None, reason: str
) -> ExportedFile:
    """Exports for pictures of any size, or else for those of evaluation."""
    for sizes in [[own, other], [own]] if other is not None else [[own]]:
        any_size = len(sizes) > 1
        try:
            content = build(any_size)
            run = load(content)
            found = [(eager, eager.differences(run)) for eager in sizes]
        except Exception as error:  # exporters, converters, serialisers and runtimes each raise their own kinds
            if not any_size:
                raise InputError(f"{name}: this network cannot be exported ({_in_a_line(error)})") from error
            reason = _in_a_line(error)
            continue
        file = ExportedFile(content, any_size, {}, "" if any_size else reason)
        disagreement = ""
        for eager, differences in found:
            file.differences.update({(batch, eager.size): d for batch, d in zip(_BATCHES, differences, strict=True)})
            if all(difference <= TOLERANCE for difference in differences):  # of which NaN is none
                continue
            file.rounding = max(file.rounding, eager.rounding)
            worst = max(differences, key=lambda difference: math.inf if math.isnan(difference) else difference)
            if not worst <= 4 * eager.rounding:
                disagreement = f"random pictures of {eager.size} give logits that differ by {worst:.1e}"
        if not disagreement:
            return file
        reason = disagreement
    raise DisagreementError(f"{name} does not compute what the checkpoint's network does: {reason}")


def _evaluation_size(data: "ClassificationDataModule") -> tuple[int, int]:
    channels = 3 if data.in_channels in (1, 3) else data.in_channels
    prepared: Tensor = data.eval_transform()(torch.zeros(channels, 256, 256, dtype=torch.uint8))
    height, width = prepared.shape[-2:]
    return height, width


def _save_program(program: torch.export.ExportedProgram) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def _load_program(content: bytes) -> Callable[[Tensor], Tensor]:
    module = torch.export.load(io.BytesIO(content)).module()

    def run(pictures: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = module(pictures)
        return logits

    return run


def _save_onnx(program: torch.export.ExportedProgram, any_size: bool) -> bytes:
    exported: Any = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        input_names=[_INPUT],
        output_names=[_OUTPUT],
        dynamic_shapes=(_ANY_SIZE if any_size else _BATCH,),  # their names; which are dynamic, the program says
    )
    model = exported.model_proto
    for part in (*model.graph.node, *model.graph.value_info, *model.graph.initializer):
        del part.metadata_props[:]  # where in which source file it came from, half of the file
    content: bytes = model.SerializeToString()
    return content


def _load_onnx(content: bytes) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised as well
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(pictures: Tensor) -> Tensor:
        (logits,) = session.run([_OUTPUT], {_INPUT: pictures.numpy()})
        return torch.from_numpy(logits)

    return run


@contextmanager
def _quiet() -> Iterator[None]:
    """Drops what the exporters say on their way: what they give is checked."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# ---- what lies beside the network ------------------------------------------------------------------------------------


def describe_preprocessing(data: "ClassificationDataModule") -> dict[str, Any]:
    """Says what ``data`` does to a picture before the network gets it, so that it can be done without Python.

    Returns:
        ``steps``, a list with one mapping for each step of evaluation; ``prediction_steps``, where
        ``lightning_cli.py predict`` does something else; and ``how``, what the steps mean.
    """
    described = {"steps": _steps(data.eval_transform())}
    if (of_prediction := _steps(data.predict_transform())) != described["steps"]:
        described["prediction_steps"] = of_prediction
    used = {step["step"] for steps in described.values() for step in steps}
    return {**described, "how": {name: text for name, text in _HOW.items() if name in used}}


def _steps(transform: Any) -> list[dict[str, Any]]:
    from torchvision.transforms import v2

    from awconv.data.transforms import ToImage

    def described(part: Any) -> list[dict[str, Any]]:
        match part:
            case v2.Compose():
                return [step for inner in part.transforms for step in described(inner)]
            case ToImage():
                channels = {1: "grey", 3: "RGB"}.get(part.channels, f"{part.channels} channels as in the data set")
                return [{"step": "convert", "to": channels}]
            case v2.Resize() if part.size is not None and part.max_size is None:
                size = dict(zip(("height", "width"), part.size, strict=True)) if len(part.size) == 2 else {}
                mode = getattr(part.interpolation, "value", part.interpolation)
                kind = {"interpolation": mode, "antialias": part.antialias}
                return [{"step": "resize", **(size or {"shorter_side": part.size[0]}), **kind}]
            case v2.CenterCrop():
                return [{"step": "center_crop", "height": part.size[0], "width": part.size[1]}]
            case v2.RandomInvert(p=1.0):
                return [{"step": "invert"}]
            case v2.ToDtype(dtype=torch.float32, scale=True):
                return [{"step": "scale", "divide_by": 255}]
            case v2.Normalize():
                return [{"step": "normalise", "mean": list(part.mean), "std": list(part.std)}]
            case v2.ToPureTensor() | v2.Identity():
                return []
        return [{"step": "other", "text": " ".join(repr(part).split())}]

    return [{"step": "decode", "bits": 8}, *described(transform)]


def _preprocessing(
    task: "ClassificationTask", data: "ClassificationDataModule", exported: Mapping[str, ExportedFile]
) -> dict[str, Any]:
    height, width = _evaluation_size(data)
    classes = len(task.class_names)
    return {
        "input": {
            "name": _INPUT,
            "dtype": "float32",
            "layout": "batch, channel, row, column",
            "shape": ["batch", data.in_channels, "height", "width"],
            "height": height,
            "width": width,
            "any_height_and_width": {name: file.any_size for name, file in exported.items()},
        },
        "output": {
            "name": _OUTPUT,
            "dtype": "float32",
            "shape": ["batch", classes],
            "meaning": "one logit for each name in labels.json, in its order; their softmax is the probabilities",
        },
        **describe_preprocessing(data),
    }


_README = """\
{what}, exported by `python -m awconv.analysis.export` of awconv, torch {torch}.

{files}
labels.json         the names of the classes, in the order of the logits
preprocessing.json  what to do to a picture before the network gets it, step by step

The input, "{input}", is float32 (batch, {channels}, height, width): pictures that are normalised already, as
preprocessing.json says. The output, "{output}", is float32 (batch, {classes}). The batch may be of any size.
{sizes}

{usage}

{table}
"""

_USAGE = {
    _ONNX: """\
    import json, onnxruntime
    session = onnxruntime.InferenceSession("model.onnx")
    [logits] = session.run(None, {"pictures": pictures})  # a NumPy array
    names = json.load(open("labels.json", encoding="utf-8"))
    print([names[k] for k in logits.argmax(1)])""",
    _PROGRAM: """\
    import torch
    network = torch.export.load("model.pt2").module()
    logits = network(pictures)  # a tensor""",
}
_DESCRIPTIONS = {
    _ONNX: "model.onnx          the network for ONNX Runtime and others",
    _PROGRAM: "model.pt2           the network for torch.export.load of that version of torch; others may refuse it",
}


def differences_table(exported: Mapping[str, ExportedFile]) -> str:
    """Lays the differences from eager out, a line for each number of pictures and size, a column for each file."""
    head = ["pictures", "size", *exported]
    keys = dict.fromkeys(key for file in exported.values() for key in file.differences)
    cells = [
        [
            str(batch),
            size,
            *(f"{d:.1e}" if (d := f.differences.get((batch, size))) is not None else "-" for f in exported.values()),
        ]
        for batch, size in keys
    ]
    widths = [max(len(line[column]) for line in [head, *cells]) for column in range(len(head))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in [head, *cells]]
    rounding = max(file.rounding for file in exported.values())
    if rounding:
        lines.append(f"More than {TOLERANCE} passes for rounding: eager mode in float32 is {rounding:.1e} off float64.")
    return "\n".join(["Largest absolute differences from eager mode, on random pictures:", *lines])


def _size_lines(size: tuple[int, int], exported: Mapping[str, ExportedFile]) -> list[str]:
    """Says for each file which pictures it takes, in a line."""
    lines = []
    for name, file in exported.items():
        if not file.any_size:
            lines.append(f"{name} takes pictures of {size[0]}x{size[1]} only ({file.reason})")
        elif name == _PROGRAM:
            # torch.export takes for granted that what was larger than 1 in its example always is
            lines.append(f"{name} takes pictures of any size at which every feature map keeps more than a pixel a side")
        else:
            lines.append(f"{name} takes pictures of any size")
    return lines


def write_export(
    folder: Path,
    task: "ClassificationTask",
    data: "ClassificationDataModule",
    exported: Mapping[str, ExportedFile],
    what: str,
) -> None:
    """Writes what was exported into ``folder``, with ``labels.json``, ``preprocessing.json`` and ``README.txt``.

    Args:
        folder: Where to; an empty folder that exists.
        task: The classifier.
        data: What its pictures come from.
        exported: What :func:`export_classifier` gave.
        what: What it is, in a few words; ``README.txt`` begins with them.
    """
    readme = _README.format(
        what=what,
        torch=torch.__version__,
        files="\n".join(_DESCRIPTIONS[name] for name in exported),
        input=_INPUT,
        output=_OUTPUT,
        channels=data.in_channels,
        classes=len(task.class_names),
        sizes="\n".join(f"{line}." for line in _size_lines(_evaluation_size(data), exported)),
        usage="\n\n".join(_USAGE[name] for name in exported),
        table=differences_table(exported),
    )
    for name, file in exported.items():
        (folder / name).write_bytes(file.content)
    contents = {"labels.json": task.class_names, "preprocessing.json": _preprocessing(task, data, exported)}
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "README.txt").write_text(readme, encoding="utf-8")


# ---- the command line ------------------------------------------------------------------------------------------------


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line; ``args`` replaces ``sys.argv[1:]``.

    Bad input ends in one line and exit code 2, an exported network that differs from the checkpoint's in one line and
    exit code 1; nothing is then left behind.
    """
    parser = OneLineParser(
        prog="python -m awconv.analysis.export",
        description="Turn a classifier's checkpoint into model.onnx and model.pt2 (torch.export), check both against "
        "eager mode, and write them with labels.json, preprocessing.json and README.txt into a new folder.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a .ckpt file of lightning_cli.py fit")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="a new folder (default: <checkpoint>_export beside the checkpoint)"
    )
    parser.add_argument(
        "--no-onnx", action="store_true", help="leave model.onnx out, for which three packages are needed"
    )
    parser.add_argument(
        "--trust-checkpoint-config", action="store_true", help="import whatever classes the checkpoint names"
    )
    options = parser.parse_args(args)
    try:
        _export(options.checkpoint, options.out, onnx=not options.no_onnx, believed=options.trust_checkpoint_config)
    except InputError as error:
        parser.error(str(error))
    except DisagreementError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "interrupted\n")


def _export(checkpoint: Path, out: Path | None, *, onnx: bool, believed: bool) -> None:
    content = _read(checkpoint, believed)
    folder = checkpoint.with_name(f"{checkpoint.stem}_export") if out is None else out
    missing = [name for name in _ONNX_PACKAGES if find_spec(name) is None] if onnx else []
    if missing:
        raise InputError(
            f"model.onnx needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            f"pip install {' '.join(missing)}, or leave it out with --no-onnx"
        )
    with _appearing(folder) as scratch:
        task, data = _rebuild(checkpoint, content, believed)
        size = _evaluation_size(data)
        network = task.hparams.get("backbone", type(task.network).__name__)
        what = f"{checkpoint.name}: {network}, {len(task.class_names)} classes, evaluated at {size[0]}x{size[1]}"
        print(what, flush=True)
        exported = export_classifier(task, data, onnx=onnx)
        write_export(scratch, task, data, exported, what)
        names = sorted(entry.name for entry in scratch.iterdir())
    print(*_size_lines(size, exported), "", differences_table(exported), "", sep="\n")
    described = describe_preprocessing(data)
    others = [
        step["text"] for key in ("steps", "prediction_steps") for step in described.get(key, []) if "text" in step
    ]
    if others:
        print(
            f"preprocessing.json has steps that only Python knows: {', '.join(dict.fromkeys(others))}", file=sys.stderr
        )
    print(f"{folder}: {', '.join(names)}")


def _read(path: Path, believed: bool) -> dict[str, Any]:
    content = read_checkpoint(path, "CHECKPOINT")
    keys = (HPARAMS, DATA_HPARAMS)
    lacking = [f"{key}['_class_path']" if key in content else key for key in keys if not _class_path(content, key)]
    if lacking:
        raise InputError(
            f"CHECKPOINT={str(path)!r} lacks {', '.join(lacking)}; give a checkpoint that lightning_cli.py fit wrote, "
            "or call awconv.analysis.export.export_classifier(task, data) in Python"
        )
    if not believed:
        for key in keys:
            kind = str(_class_path(content, key))
            make_harmless(kind, content[key], f"CHECKPOINT={str(path)!r}", "--trust-checkpoint-config")
    return content


def _class_path(content: Mapping[str, Any], key: str) -> Any:
    return content.get(key, {}).get("_class_path")


def _rebuild(
    path: Path, content: Mapping[str, Any], believed: bool
) -> "tuple[ClassificationTask, ClassificationDataModule]":
    """Makes the task and the data module that the checkpoint is from."""
    from awconv.data import ClassificationDataModule
    from awconv.tasks import ClassificationTask, DetectionTask

    task_class, data_class = (_class(path, _class_path(content, key)) for key in (HPARAMS, DATA_HPARAMS))
    if issubclass(task_class, DetectionTask):
        raise InputError(
            f"CHECKPOINT {path}: is a detector, of which torchvision's suppression of overlapping boxes cannot be "
            f"exported; load it in Python with {task_class.__name__}.load_from_checkpoint(path)"
        )
    for found, wanted in ((task_class, ClassificationTask), (data_class, ClassificationDataModule)):
        if not issubclass(found, wanted):
            raise InputError(
                f"CHECKPOINT {path}: {found.__name__} is no {wanted.__name__}; only classifiers are exported"
            )
    with _quiet():
        try:
            task, data = (
                made.load_from_checkpoint(path, map_location="cpu", trust_config=believed)
                for made in (task_class, data_class)
            )
        except InputError as error:
            raise InputError(f"CHECKPOINT {path}: {error}") from error
        except Exception as error:  # the classes are anyone's
            raise InputError(f"CHECKPOINT {path}: cannot be rebuilt ({_in_a_line(error)})") from error
    return task, data


def _class(path: Path, name: Any) -> Any:
    module, _, attribute = str(name).rpartition(".")
    try:
        found = getattr(import_module(module), attribute)
    except Exception as error:  # importing a file of the user's can raise anything
        raise InputError(
            f"CHECKPOINT {path}: its class {name} cannot be imported ({_in_a_line(error)}); run this where it was "
            "trained, in the folder of lightning_cli.py"
        ) from error
    if not isinstance(found, type):
        raise InputError(f"CHECKPOINT {path}: {name} is no class; only classifiers are exported")
    return found


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """Gives a folder to write into, which becomes ``folder`` in one move, or vanishes where something goes wrong."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        what = "is not empty" if folder.is_dir() else "is a file"
        raise InputError(f"--out {folder}: {what}, and nothing is written over; name a new folder")
    target = folder.resolve()
    if not target.parent.is_dir():
        raise InputError(f"--out {folder}: there is no folder {folder.parent}; make it first")
    # in the same folder: a move is whole only within one file system
    scratch = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        scratch.mkdir()
        yield scratch
        os.replace(scratch, target)
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be written ({error.strerror or error}); name another") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _in_a_line(error: BaseException, most: int = 200) -> str:
    """The kind of an exception and what it says first."""
    said = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {said}"[:most] if said else type(error).__name__


if __name__ == "__main__":
    main()
