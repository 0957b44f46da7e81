"""The command line: LightningCLI with composed configs, run folders, checkpoints that carry their config."""

import contextlib
import difflib
import inspect
import logging
import re
import secrets
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger

from awconv.callbacks import ClassificationReport
from awconv.errors import InputError

# imported so that their short names can be typed: --data CIFAR10DataModule
import awconv.data  # isort: skip
import awconv.tasks  # isort: skip

_SUBCOMMANDS = ("fit", "validate", "test", "predict")
# what the model learns from the data, so that nobody has to type it twice
_LINKED = ("num_classes", "class_names", "in_channels", "image_size")


def main(args: Sequence[str] | None = None) -> None:
    """Runs one command, ``fit``, ``validate``, ``test`` or ``predict``.

    Bad input ends the process with exit code 2 and one line on standard error; anything else that goes wrong is a
    fault of the code and keeps its traceback.

    Args:
        args: The words after the program's name; ``sys.argv[1:]`` if None.
    """
    _silence_lightning()
    try:
        AWConvCLI(sys.argv[1:] if args is None else list(args))
    except Exception as error:
        if said := _input_error(error):
            _fail(said)
        raise


def _input_error(error: BaseException) -> str | None:
    """Finds what the user did wrong behind an exception; the parser wraps those of constructors in its own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, InputError):
            return " ".join(str(cause).split())
        if isinstance(cause, MisconfigurationException):
            said = " ".join(str(cause).split())
            hint = "; this machine has none: --trainer.accelerator cpu" if "backend found" in said else ""
            return f"the trainer refuses its settings: {said}{hint}"
        cause = cause.__cause__ or cause.__context__
    return None


def _silence_lightning() -> None:
    """Drops what a user can do nothing about: advertisements, deprecations inside libraries, worker counts."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in record.msg)
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
    # another logger may have made the run folder, which is this run's alone
    warnings.filterwarnings("ignore", message=r"Experiment logs directory .* exists and is not empty")
    # digits live in memory, where worker processes only cost
    warnings.filterwarnings("ignore", message=r".*does not have many workers")
    warnings.filterwarnings("ignore", message="The image decoding and encoding", category=DeprecationWarning)


class _Parser(LightningArgumentParser):
    """A parser that answers bad input with one line in place of pages of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        _fail(_one_line(message, self))


class _RunRecorder(SaveConfigCallback):
    """Keeps the resolved config in the run folder, in every checkpoint and in Weights & Biases."""

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.config.update(self._resolved(), allow_val_change=True)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self._resolved()

    def _resolved(self) -> dict[str, Any]:
        resolved: dict[str, Any] = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        return resolved


class AWConvCLI(LightningCLI):
    """LightningCLI in subclass mode, with what this project adds to it.

    * The base of every command is a whole config: that of the checkpoint where ``--ckpt_path`` is given, the embedded
      default where no config is. What is typed, in configs or flags, wins over the base.
    * Every run writes into a folder of its own, ``runs/DATA-MODEL/TIME``.

    Args:
        args: The words after the program's name.
    """

    def __init__(self, args: list[str]) -> None:
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            save_config_callback=_RunRecorder,
            parser_class=_Parser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            args=args,
        )

    # ---- arguments ---------------------------------------------------------------------------------------------

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the checkpoint's options, the links from data to model, and the defaults."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        for name in _LINKED:
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val/acc1",
                "checkpoint.mode": "max",
                "checkpoint.filename": "best",
                # a slash in a metric's name would become a folder
                "checkpoint.auto_insert_metric_name": False,
                # best.ckpt is replaced by a better one rather than joined by best-v1.ckpt
                "checkpoint.enable_version_counter": False,
                "trainer.default_root_dir": "runs",
                "trainer.logger": {
                    "class_path": "lightning.pytorch.loggers.CSVLogger",
                    "init_args": {"save_dir": "runs", "name": "", "version": ""},
                },
            }
        )

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """Adds what only ``fit`` takes, and weights-only loading everywhere."""
        super().setup_parser(*args, **kwargs)
        for parser in self._subcommand_parsers.values():
            parser.set_defaults({"weights_only": True})
        self._subcommand_parsers["fit"].add_argument(
            "--test_after_fit", type=bool, default=False, help="Test the best checkpoint when training has ended."
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses ``args`` on top of the base config."""
        _check_configs(args)
        self.config = parser.parse_args(_with_base_config(args))

    def _parse_ckpt_path(self) -> None:
        """Does nothing: the checkpoint's config lies under what was typed, where Lightning would lay it on top."""

    # ---- the run folder ------------------------------------------------------------------------------------------

    def instantiate_classes(self) -> None:
        """Instantiates the classes so that all they write lands in the run folder.

        The saved config keeps what was typed, so that it can be run again into a folder of its own.
        """
        typed, self.config = self.config, self.config.clone()
        config = self.config[self.subcommand]
        root = config.trainer.default_root_dir
        self.run_dir = _run_dir(root, config, str(self.subcommand))
        config.trainer.default_root_dir = self.run_dir
        loggers = config.trainer.logger
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            init_args = logger.get("init_args") if hasattr(logger, "get") else None
            if init_args is not None and init_args.get("save_dir", None) in ("runs", ".", None):
                init_args["save_dir"] = self.run_dir
        if config.checkpoint.dirpath is None:
            config.checkpoint.dirpath = str(Path(self.run_dir, "checkpoints"))
        self._typed = typed
        super().instantiate_classes()
        self.config = typed

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[L.Callback]) -> L.Trainer:
        # ModelCheckpoint's own save_last keeps the last best: it writes only when it also writes a better one
        last = ModelCheckpoint(
            self._get(self.config_init, "checkpoint").dirpath,
            filename="last",
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
        callbacks = [*callbacks, last, ClassificationReport()]
        if config.get("enable_progress_bar") is not False:
            callbacks.append(RichProgressBar())
        if config.get("logger"):
            callbacks.append(LearningRateMonitor())
        instantiated, self.config = self.config, self._typed  # what the recorder is given
        try:
            return super()._instantiate_trainer(config, callbacks)
        finally:
            self.config = instantiated

    # ---- running ---------------------------------------------------------------------------------------------------

    def fit(self, model: L.LightningModule, **kwargs: Any) -> None:
        """Trains, tests the best checkpoint when asked to, and says where the run lies."""
        with self._reporting_interrupts():
            self.trainer.fit(model, **kwargs)
        said = [f"run folder: {self.run_dir}"]
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self.config[self.subcommand].test_after_fit:
            # by its path: "best" makes Lightning warn that there are two checkpoint callbacks
            best = self._get(self.config_init, "checkpoint").best_model_path
            (measured,) = self.trainer.test(model, datamodule=self.datamodule, ckpt_path=best, weights_only=True)
            said.insert(0, ", ".join(f"{name}: {value:.4f}" for name, value in measured.items()))
        if self.trainer.is_global_zero:
            print("\n".join(said))

    @contextlib.contextmanager
    def _reporting_interrupts(self) -> Iterator[None]:
        try:
            yield
        except SystemExit:  # what Lightning makes of Ctrl-C, once everything is shut down
            last = Path(self.config_init[self.subcommand].checkpoint.dirpath or "", "last.ckpt")
            found = f"the last checkpoint is {last}" if last.is_file() else "no checkpoint had been written yet"
            print(f"interrupted: {found}", file=sys.stderr)
            sys.exit(130)


def _with_base_config(args: list[str]) -> list[str]:
    """Puts the base config before everything else that was typed."""
    if not args or args[0] not in _SUBCOMMANDS:
        return args
    subcommand, *rest = args
    given = _option(rest, "--ckpt_path")
    if given is not None:
        index, length, value = given
        path = _resolve_checkpoint(value, Path((_option(rest, "--trainer.default_root_dir") or (0, 0, "runs"))[2]))
        rest[index : index + length] = [f"--ckpt_path={path}"]
        base = _checkpoint_config(path, subcommand, has_config=_has_config(rest))
    elif _has_config(rest):
        base = None
    else:
        base = files("awconv").joinpath("default.yaml").read_text()
    return [subcommand, *(["--config", base] if base else []), *rest]


def _has_config(args: list[str]) -> bool:
    return any(re.match(r"(-c|--config)(=|$)", arg) for arg in args)


def _option(args: list[str], name: str) -> tuple[int, int, str] | None:
    """Finds an option: where it stands, how many words it takes, its value."""
    for index, arg in enumerate(args):
        if arg == name and index + 1 < len(args):
            return index, 2, args[index + 1]
        if arg.startswith(f"{name}="):
            return index, 1, arg.removeprefix(f"{name}=")
    return None


def _resolve_checkpoint(value: str, root: Path) -> Path:
    if value in ("last", "best"):
        found = sorted(root.glob(f"**/checkpoints/{value}.ckpt"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise InputError(
                f"ckpt_path={value!r}: no run under {root}/ has a {value}.ckpt; train one or give its path"
            )
        print(f"ckpt_path={value}: {found[-1]}", file=sys.stderr)
        return found[-1]
    path = Path(value)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"ckpt_path={value!r} {what}; give a .ckpt file, or last or best for the newest run's")
    return path


def _checkpoint_config(path: Path, subcommand: str, has_config: bool) -> str | None:
    """Reads the config that a checkpoint carries: all of it to go on training, its data and model otherwise."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the unpickler, the zip reader and the file system each raise their own kinds
        raise InputError(
            f"ckpt_path={str(path)!r} is not a checkpoint that can be loaded as weights only "
            f"({type(error).__name__}); it is damaged, another kind of file, or carries code, which is never run"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise InputError(
            f"ckpt_path={str(path)!r} is no checkpoint of a run; bare weights go into --model.initial_weights"
        )
    config = checkpoint.get("config")
    if config is None:
        if has_config:
            return None
        raise InputError(f"ckpt_path={str(path)!r} carries no config; give with -c the configs it was trained with")
    if subcommand != "fit":
        config = {key: config[key] for key in ("seed_everything", "data", "model")}
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    model["initial_weights"] = None  # they are in the checkpoint
    if "class_names" in data:
        # the classes that the network knows: pictures can be predicted where the data set itself is not
        data["class_names"] = checkpoint["hyper_parameters"].get("class_names")
    return yaml.safe_dump(config)


def _run_dir(root: str, config: Any, subcommand: str) -> str:
    def short(section: Any, suffix: str) -> str:
        return str(section.class_path).rsplit(".", 1)[-1].removesuffix(suffix).lower()

    init_args = config.model.init_args
    model = str(init_args.get("backbone", None) or short(config.model, "Task"))
    prefixes = ["aw" if init_args.get("aw", None) else "", init_args.get("attention", None) or ""]
    name = "_".join([*filter(None, prefixes), model])
    # processes and users that start in the same second must not share a folder
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    suffix = "" if subcommand == "fit" else f"-{subcommand}"
    return str(Path(root, f"{short(config.data, 'DataModule')}-{name}", stamp + suffix))


# ---- saying in one line what the parser says in many ---------------------------------------------------------------


def _one_line(message: str, parser: LightningArgumentParser) -> str:
    """Rewrites a message of jsonargparse as one line that ends in the remedy."""
    text = " ".join(message.split())
    if unknown := re.search(r"(?:[Oo]ption '|unrecognized arguments: -*)([\w.]+)", text):
        return f"unknown option {unknown[1]!r}{_nearest_option(unknown[1], parser)}"
    if "subcommand" in text and not text.startswith("Parser"):
        return f"{text.split(' (')[0].rstrip('.')}; choose one of {', '.join(_SUBCOMMANDS)}"
    if missing := re.search(r"required: (.+)", text):
        name = missing[1].rsplit(".", 1)[-1]
        return f"{name} is required{_HOW_TO_GIVE.get(name, '')}"
    key = re.search(r'Parser key "([\w.]+)"', text)
    value = re.search(r"(?:Given value|Got value): (.*?)$", text)
    if not key or not value:
        return text
    if key[1] in ("model", "data"):
        choices = [cls.__name__ for cls in _classes_for(key[1])]
        return f"{key[1]}={value[1]!r} is no known class; choose one of {', '.join(choices)}, or a dotted import path"
    literal = re.search(r"Literal\[(.*?)\]", text)
    if literal:
        near = difflib.get_close_matches(value[1], re.findall(r"'(.*?)'", literal[1]), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{key[1]}={value[1]!r} is unknown; choose one of {literal[1]}{hint}"
    subtypes = re.search(r"Subtypes: \[(.*?)\] Errors", text)
    expected = subtypes[1] if subtypes else text[: value.start()].split("Expected a ", 1)[-1].rstrip(". ")
    for pattern, plain in ((r"<class '(?:\w+\.)*(\w+)'>", r"\1"), (r"typing\.", ""), ("NoneType", "null")):
        expected = re.sub(pattern, plain, expected)
    return f"{key[1]}={value[1]!r} is not valid; expected {expected.replace(', ', ' or ')}"


_BASES = (awconv.tasks.BaseTask, awconv.data.ClassificationDataModule)
_HOW_TO_GIVE = {
    "backbone": ": add a model, such as -c configs/models/aw_resnet20.yaml or --model.backbone resnet50",
    "model": ": add a model, such as -c configs/models/aw_resnet20.yaml",
    "data": ": add a recipe, such as -c configs/recipes/cifar10.yaml",
}


def _classes_for(section: str) -> list[type]:
    """Lists the task or data module classes that can be named, this project's and those of imported forks."""
    found: set[type] = set()
    queue: list[type] = [L.LightningModule if section == "model" else L.LightningDataModule]
    while queue:
        subclasses: list[type] = queue.pop().__subclasses__()
        queue += subclasses
        found.update(subclasses)
    found = {cls for cls in found - set(_BASES) if not cls.__module__.startswith(("lightning.", "torchmetrics."))}
    return sorted(found, key=lambda cls: cls.__name__)


def _nearest_option(name: str, parser: LightningArgumentParser) -> str:
    subparsers = [a.choices.values() for a in parser._actions if isinstance(a.choices, dict)]
    options = {action.dest for one in [parser, *(p for group in subparsers for p in group)] for action in one._actions}
    for section in ("model", "data"):
        for cls in _classes_for(section):
            for ancestor in cls.__mro__:
                if not ancestor.__module__.startswith(("lightning.", "torch", "builtins")):
                    options |= {f"{section}.{name}" for name in inspect.signature(ancestor).parameters}
    tail = name.rsplit(".", 1)[-1]
    by_tail = {option.rsplit(".", 1)[-1]: option for option in sorted(options)}
    near = difflib.get_close_matches(tail, by_tail, n=1)
    return f"; did you mean {by_tail[near[0]]}?" if near else "; --help lists the options"


def _check_configs(args: list[str]) -> None:
    """Names a config file that is missing or is no YAML: the parser knows its text alone."""
    for index, arg in enumerate(args):
        match = re.match(r"(?:-c|--config)(?:=(.*))?$", arg, re.DOTALL)
        if not match or (match[1] is None and index + 1 == len(args)):
            continue
        path = Path(match[1] if match[1] is not None else args[index + 1])
        if not path.is_file():
            there = {p.name: str(p) for p in Path("configs").glob("**/*.yaml")}
            near = difflib.get_close_matches(path.name, there, n=1)
            hint = f"; did you mean {there[near[0]]}?" if near else ""
            raise InputError(f"config {str(path)!r} does not exist{hint}")
        try:
            content = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"config {str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict):
            raise InputError(
                f"config {str(path)!r} holds {type(content).__name__}, not sections such as model: and data:"
            )


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
