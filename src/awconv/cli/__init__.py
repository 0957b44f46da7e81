"""The command line: LightningCLI with composed configs, run folders, and checkpoints that carry their config."""

import contextlib
import logging
import os
import re
import secrets
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor, ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger

from awconv.callbacks import BestCheckpoint, ClassificationReport, LastCheckpoint
from awconv.cli.arguments import LINKED, complete
from awconv.cli.messages import one_line
from awconv.errors import InputError


def main(args: Sequence[str] | None = None) -> None:
    """Runs one command, ``fit``, ``validate``, ``test`` or ``predict``.

    Bad input ends the process with exit code 2 and one line on standard error; anything else that goes wrong is a
    fault of the code and keeps its traceback.

    Args:
        args: The words after the program's name; ``sys.argv[1:]`` if None.
    """
    _silence_libraries()
    try:
        AWConvCLI(sys.argv[1:] if args is None else list(args))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if said := _bad_input(error):
            _fail(said)
        raise


class AWConvCLI(LightningCLI):
    """LightningCLI in subclass mode, with what this project adds to it.

    * The base of every command is a whole config: that of the checkpoint where ``--ckpt_path`` is given, the embedded
      default where no config is. What is typed wins over it: flags over configs, later configs over earlier ones.
    * Every run writes into a folder of its own, ``DEFAULT_ROOT_DIR/DATA-MODEL/TIME``.
    * The best and the last checkpoint, a progress bar, the learning rate and the classification report come without
      being asked for, unless the trainer's own callbacks hold one of their kind.

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

    # ---- arguments ---------------------------------------------------------------------------------

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the checkpoint's options, the links from data to model, and the defaults."""
        parser.add_lightning_class_args(BestCheckpoint, "checkpoint")
        # everywhere, so that the config of a run can be given to every command
        parser.add_argument(
            "--test_after_fit", type=bool, default=False, help="Let fit test the best checkpoint when it has trained."
        )
        for name in LINKED:
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
        """Loads checkpoints as weights only, whatever the command."""
        super().setup_parser(*args, **kwargs)
        for parser in self._subcommand_parsers.values():
            parser.set_defaults({"weights_only": True})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses ``args`` on top of the base config."""
        self.config = parser.parse_args(complete(args))

    def _parse_ckpt_path(self) -> None:
        """Does nothing: the checkpoint's config lies under what was typed, where Lightning would lay it on top."""

    # ---- the run folder ------------------------------------------------------------------------------

    def instantiate_classes(self) -> None:
        """Instantiates the classes so that all they write lands in the run folder.

        What is saved of the config stays as it was typed, so that it can be run again into a folder of its own.
        """
        typed, self.config = self.config, self.config.clone()
        config = self.config[self.subcommand]
        self._require_weights(config)
        self.run_dir = _run_dir(_writable(config.trainer.default_root_dir), config, str(self.subcommand))
        config.trainer.default_root_dir = self.run_dir
        loggers = config.trainer.logger
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            init_args = logger.get("init_args") if hasattr(logger, "get") else None
            if init_args is not None and init_args.get("save_dir", None) in ("runs", ".", None):
                init_args["save_dir"] = self.run_dir
        if config.checkpoint.dirpath is None:
            config.checkpoint.dirpath = str(Path(self.run_dir, "checkpoints"))
        self.save_config_kwargs = {"run_dir": self.run_dir, "typed": typed[self.subcommand]}
        super().instantiate_classes()
        self.config = typed

    def _require_weights(self, config: Any) -> None:
        weights = config.ckpt_path or (config.model.get("init_args") or {}).get("initial_weights", None)
        if self.subcommand != "fit" and not weights:
            raise InputError(
                f"{self.subcommand} needs trained weights; give --ckpt_path best (the newest run's), --ckpt_path FILE, "
                "or --model.initial_weights FILE"
            )

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[L.Callback]) -> L.Trainer:
        given = config.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        best = self._get(self.config_init, "checkpoint")
        ours: list[L.Callback] = [best, LastCheckpoint(best.dirpath), ClassificationReport()]
        if config.get("enable_checkpointing") is False:
            ours = [callback for callback in ours if not isinstance(callback, BestCheckpoint | LastCheckpoint)]
        if config.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in given):
            ours.append(RichProgressBar())
        if config.get("logger"):
            ours.append(LearningRateMonitor())
        if config.get("barebones"):
            ours = []
        ours = [callback for callback in ours if not any(type(callback) is type(other) for other in given)]
        try:
            return super()._instantiate_trainer(config, ours)
        except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
            said = " ".join(str(error).split())
            hint = "; this machine has none: --trainer.accelerator cpu" if "backend found" in said else ""
            raise InputError(f"the trainer refuses its settings: {said}{hint}") from error

    # ---- running ---------------------------------------------------------------------------------------

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            with self._reporting_interrupts():
                super()._run_subcommand(subcommand)
        finally:
            if Path(self.run_dir).is_dir() and self.trainer.is_global_zero:
                print(f"run folder: {self.run_dir}")

    def after_fit(self) -> None:
        """Tests the best checkpoint when asked to."""
        if not self.config[self.subcommand].test_after_fit or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        # by its path: "best" makes Lightning warn that there are two checkpoint callbacks
        best = getattr(self._get(self.config_init, "checkpoint"), "best_model_path", "")
        if not best and self.trainer.is_global_zero:
            print("no best checkpoint was written (nothing was validated): testing the last weights", file=sys.stderr)
        results = self.trainer.test(
            self.model, datamodule=self.datamodule, ckpt_path=best or None, weights_only=True if best else None
        )
        if self.trainer.is_global_zero:
            for measured in results:
                print(", ".join(f"{name}: {value:.4f}" for name, value in measured.items()))

    @contextlib.contextmanager
    def _reporting_interrupts(self) -> Iterator[None]:
        try:
            yield
        except SystemExit:  # what Lightning makes of Ctrl-C, once everything is shut down
            if not self.trainer.interrupted:
                raise
            last = Path(self.config_init[self.subcommand].checkpoint.dirpath or "", "last.ckpt")
            found = f"the last checkpoint is {last}" if last.is_file() else "no checkpoint had been written yet"
            print(f"interrupted: {found}" if self.subcommand == "fit" else "interrupted", file=sys.stderr)
            sys.exit(130)


class _Parser(LightningArgumentParser):
    """A parser that answers bad input with one line in place of pages of usage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # abbreviations would slip past what looks for --ckpt_path and --config
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        _fail(one_line(message, self))


class _RunRecorder(SaveConfigCallback):
    """Keeps the resolved config in the run folder, in every checkpoint and in Weights & Biases."""

    # what belongs to one call of one command, and would be refused or misunderstood by the next
    _NOT_KEPT = ("ckpt_path", "verbose", "return_predictions")

    def __init__(self, parser: LightningArgumentParser, config: Any, *, run_dir: str, typed: Any) -> None:
        super().__init__(parser, config, save_to_log_dir=False)
        self._run_dir = Path(run_dir)
        dumped: dict[str, Any] = yaml.safe_load(parser.dump(typed, skip_none=False))
        self._resolved = {key: value for key, value in dumped.items() if key not in self._NOT_KEPT}

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._run_dir.mkdir(parents=True, exist_ok=True)
        (self._run_dir / "config.yaml").write_text(yaml.safe_dump(self._resolved, sort_keys=False))
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.config.update(self._resolved, allow_val_change=True)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self._resolved


def _writable(root: str | None) -> str:
    if not root:
        raise InputError("trainer.default_root_dir is empty; give the folder that runs go to, such as runs")
    there = Path(root)
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "is no folder" if not there.is_dir() else "cannot be written to"
        raise InputError(f"trainer.default_root_dir={root!r}: {there} {what}; give another")
    return root


def _run_dir(root: str, config: Any, subcommand: str) -> str:
    def short(section: Any, suffix: str) -> str:
        return str(section.class_path).rsplit(".", 1)[-1].removesuffix(suffix).lower()

    init_args = config.model.get("init_args") or {}
    words = [init_args.get(key, None) for key in ("attention", "backbone")]
    attention, backbone = (word if isinstance(word, str) else "" for word in words)
    aw = "aw" if init_args.get("aw", None) else ""
    model = "_".join(filter(None, [aw, attention, backbone or short(config.model, "Task")]))
    name = re.sub(r"[^\w.+-]+", "-", f"{short(config.data, 'DataModule')}-{model}")
    # processes and users that start in the same second must not share a folder
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    return str(Path(root, name, stamp if subcommand == "fit" else f"{stamp}-{subcommand}"))


def _bad_input(error: BaseException) -> str | None:
    """Finds what the user did wrong behind an exception; the parser wraps those of constructors in its own."""
    text = " ".join(str(error).split())
    if isinstance(error, InputError):
        return text
    if isinstance(error, MisconfigurationException) and "monitor" in text:
        return f"{text} (--checkpoint.monitor names the metric that best.ckpt follows)"
    if type(error).__module__.startswith("wandb.") and type(error).__name__ == "UsageError":
        return f"{text} (log in with `wandb login`, or set WANDB_MODE=offline)"
    if error.__cause__ is not None:
        return _bad_input(error.__cause__)
    if error.__context__ is not None and "Does not validate against any of the Union subtypes" in text:
        return _bad_input(error.__context__)
    return None


def _silence_libraries() -> None:
    """Drops what a user can do nothing about: advertisements, deprecations inside libraries, worker counts."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in str(record.msg))
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
    # another logger may have made the run folder, which is this run's alone
    warnings.filterwarnings("ignore", message=r"Experiment logs directory .* exists and is not empty")
    # digits live in memory, where worker processes only cost
    warnings.filterwarnings("ignore", message=r".*does not have many workers")
    warnings.filterwarnings("ignore", message="The image decoding and encoding", category=DeprecationWarning)


def _fail(message: str) -> NoReturn:
    rank = os.environ.get("LOCAL_RANK", "0")
    print(f"error: {message}" if rank == "0" else f"error in process {rank}: {message}", file=sys.stderr)
    sys.exit(2)
