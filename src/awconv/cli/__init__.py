"""The command line: LightningCLI with composed configs, run folders, and checkpoints that carry their config."""

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn

import lightning as L
from jsonargparse import set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, ModelSummary, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins import CheckpointIO, TorchSyncBatchNorm
from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn

from awconv import config_text
from awconv.callbacks import (
    AttentionMonitor,
    BestCheckpoint,
    CheckpointFiles,
    ClassificationMedia,
    ClassificationReport,
    DetectionMedia,
    DetectionReport,
    LastCheckpoint,
    NetworkSummary,
    Preempted,
    TrainingMonitor,
)
from awconv.callbacks.wandb_run import describe_runs
from awconv.checkpoint import LAST, begins_afresh, read_checkpoint
from awconv.cli.arguments import LINKED, complete, count_in_whole_numbers
from awconv.cli.checks import construct, refused_by_library, require_sensible_options, require_sensible_trainer
from awconv.cli.messages import PEER_IS_GONE, bad_input, fail, one_line
from awconv.cli.run_folder import RunFolder, RunRecorder, experiment_name, lead_loggers
from awconv.cli.surroundings import keep_wandb_files_in, progress_bar, replace_what_cannot_be_shown
from awconv.data import ClassificationDataModule, COCODataModule
from awconv.errors import InputError
from awconv.quiet import silence_libraries
from awconv.tasks import ClassificationTask, DetectionTask

# Lightning switches it on: an option's value could be an address, and what it gives would be a config
set_parsing_settings(config_read_mode_urls_enabled=False, config_read_mode_fsspec_enabled=False)

_INTERRUPTED = 130  # as shells say of Ctrl-C


def main(args: Sequence[str] | None = None) -> None:
    """Runs one command, ``fit``, ``validate``, ``test`` or ``predict``.

    Bad input ends the process with exit code 2 and one line on standard error; anything else that goes wrong is a
    fault of the code and keeps its traceback.

    Args:
        args: The words after the program's name; ``sys.argv[1:]`` if None.
    """
    silence_libraries()
    replace_what_cannot_be_shown()
    try:
        AWConvCLI(sys.argv[1:] if args is None else list(args))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    except Exception as error:
        if said := bad_input(error):
            fail(said)
        if isinstance(error, RuntimeError) and PEER_IS_GONE.search(str(error)):
            rank = os.environ.get("LOCAL_RANK", "0")
            print(f"process {rank} stops: another process ended, and has said why", file=sys.stderr)
            sys.exit(1)
        raise


class AWConvCLI(LightningCLI):
    """LightningCLI in subclass mode, with what this project adds to it.

    * The base of every command is a whole config: that of the checkpoint where ``--ckpt_path`` is given, the embedded
      default where no config is. What is typed wins over it: flags over configs, later configs over earlier ones.
    * Every run writes into a folder of its own, ``DEFAULT_ROOT_DIR/DATA-MODEL/TIME`` or ``--run_dir``, and goes on
      there by ``--resume``.
    * The best and the last checkpoint, a progress bar, the learning rate and the reports come without
      being asked for, unless the trainer's own callbacks hold one of their kind.

    Args:
        args: The words after the program's name.
    """

    def __init__(self, args: list[str]) -> None:
        count_in_whole_numbers(L.Trainer.__init__)
        self._folder: RunFolder | None = None
        try:
            super().__init__(
                L.LightningModule,
                L.LightningDataModule,
                save_config_callback=RunRecorder,
                parser_class=_Parser,
                subclass_mode_model=True,
                subclass_mode_data=True,
                seed_everything_default=0,
                auto_configure_optimizers=False,
                args=args,
            )
        finally:
            if self._folder is not None:
                self._folder.release()

    # ---- arguments ---------------------------------------------------------------------------------

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the checkpoint's options, the links from data to model, and the defaults."""
        parser.add_lightning_class_args(BestCheckpoint, "checkpoint")
        parser.add_lightning_class_args(LastCheckpoint, "last_checkpoint")
        parser.add_argument(
            "--run_dir", type=str | None, help="Folder of the run; null makes DEFAULT_ROOT_DIR/DATA-MODEL/TIME."
        )
        parser.add_argument(
            "--resume", type=str | None, help="Folder of a run that is to go on there, or a checkpoint in it; for fit."
        )
        parser.add_argument(
            "--trust_checkpoint_config",
            type=bool,
            default=False,
            help="Take loggers, callbacks, paths and classes from the config of a checkpoint; see SECURITY.md.",
        )
        # everywhere, so that the config of a run can be given to every command
        parser.add_argument(
            "--test_after_fit", type=bool, default=False, help="Let fit test the best checkpoint when it has trained."
        )
        for name in LINKED:
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")
        parser.set_defaults(
            {
                "trainer.default_root_dir": "runs",
                "trainer.logger": {
                    "class_path": "awconv.callbacks.MetricsFile",
                    "init_args": {"save_dir": "runs", "name": "", "version": ""},
                },
            }
        )

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """Loads checkpoints as weights only, whatever the command."""
        super().setup_parser(*args, **kwargs)
        for parser in self._subcommand_parsers.values():
            parser.set_defaults({"weights_only": True})

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            seed = self.config[self.subcommand].seed_everything
            raise InputError(f"seed_everything={seed}: expected a whole number from 0 to 4294967295") from error

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
        _require_one_kind(config)
        require_sensible_options(config, str(self.subcommand))
        self._folder = RunFolder(config, str(self.subcommand))
        self.run_dir = self._folder.path
        config.trainer.default_root_dir = self.run_dir
        lead_loggers(config, self.run_dir)
        keep_wandb_files_in(self.run_dir)
        keepers = {name: config[name] for name in ("checkpoint", "last_checkpoint")}
        for keeper in keepers.values():
            if keeper.dirpath is None:
                keeper.dirpath = config.checkpoint.dirpath or str(Path(self.run_dir, "checkpoints"))
        _lead_checkpoints(config.trainer.callbacks, str(config.checkpoint.dirpath))
        self._folder.claim_checkpoints({name: str(keeper.dirpath) for name, keeper in keepers.items()})
        self.save_config_kwargs = {
            "run_dir": self.run_dir,
            "command": str(self.subcommand),
            "typed": typed[self.subcommand],
        }
        try:
            super().instantiate_classes()
        except ValueError:
            # jsonargparse goes on to the other types of the argument, and may tell of the first of them alone
            if self._refused is not None:
                raise self._refused from None
            raise
        require_sensible_trainer(self.trainer)
        describe_runs(
            self.trainer.loggers,
            experiment_name(config),
            command=str(self.subcommand),
            seed=config.seed_everything,
            model=self.model,
        )
        self._require_complete(config)
        self.config = typed

    def _add_instantiators(self) -> None:
        super()._add_instantiators()
        self.parser.add_instantiator(self._construct, object)

    _refused: InputError | None = None

    def _construct(self, cls: type, *args: Any, **kwargs: Any) -> Any:
        self._refused = None
        try:
            return construct(cls, *args, **kwargs)
        except InputError as error:
            self._refused = error
            raise

    def _require_weights(self, config: Any) -> None:
        weights = config.ckpt_path or (config.model.get("init_args") or {}).get("initial_weights", None)
        if self.subcommand != "fit" and not weights:
            raise InputError(f"{self.subcommand} needs trained weights; {_HOW_TO_GIVE_WEIGHTS}")

    def _require_complete(self, config: Any) -> None:
        """Refuses to measure a network whose initial weights leave something at random, a detector's heads say."""
        report = getattr(self.model, "weights_report", None)
        if self.subcommand != "fit" and not config.ckpt_path and report is not None and not report.complete:
            raise InputError(
                f"{self.subcommand} needs trained weights, and these are not all of them ({report.text}); "
                f"{_HOW_TO_GIVE_WEIGHTS} of a whole network"
            )

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[L.Callback]) -> L.Trainer:
        given = config.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        best, last = (self._get(self.config_init, name) for name in ("checkpoint", "last_checkpoint"))
        ours: list[L.Callback] = [best, last, ClassificationReport(), DetectionReport()]
        ours += [TrainingMonitor(), AttentionMonitor(), ClassificationMedia(), DetectionMedia()]
        if config.get("enable_checkpointing") is False:
            ours = [callback for callback in ours if not isinstance(callback, BestCheckpoint | LastCheckpoint)]
        if config.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in given):
            ours.append(progress_bar())
        if config.get("enable_model_summary") is not False and not any(isinstance(c, ModelSummary) for c in given):
            ours.append(NetworkSummary())
            config = {**config, "enable_model_summary": False}
        if config.get("logger"):
            ours.append(LearningRateMonitor())
        if config.get("barebones"):
            ours = []
        ours = [callback for callback in ours if not any(isinstance(other, type(callback)) for other in given)]
        plugins = config.get("plugins") or []
        plugins = list(plugins) if isinstance(plugins, list) else [plugins]
        if config.get("sync_batchnorm"):
            plugins.append(_SyncBatchNorm())
        # a strategy that shards writes its own kind of checkpoint
        shards = re.search("fsdp|deepspeed|model_?parallel", str(config.get("strategy")), re.IGNORECASE)
        if not shards and not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(CheckpointFiles())
        config = {**config, "plugins": plugins}
        try:
            return super()._instantiate_trainer(config, ours)
        except (MisconfigurationException, ValueError, TypeError, ImportError, OverflowError) as error:
            said = " ".join(str(error).split())
            hint = "; this machine has none: --trainer.accelerator cpu" if "backend found" in said else ""
            raise InputError(f"the trainer refuses its settings: {said}{hint}") from error

    # ---- running ---------------------------------------------------------------------------------------

    def _run_subcommand(self, subcommand: str) -> None:
        assert self._folder is not None
        try:
            self._run_or_explain(subcommand)
        except (InputError, KeyboardInterrupt, SystemExit) as error:
            # Other ends leave the config: the report of a bug needs it, and so does a run that a scheduler stops and
            # starts again.
            if not isinstance(error, SystemExit) or error.code == _INTERRUPTED:
                self._folder.remove_if_nothing_ran()
            raise
        finally:
            if self.trainer.is_global_zero and not self._folder.is_empty:
                print(f"run folder: {self.run_dir}")

    def _run_or_explain(self, subcommand: str) -> None:
        try:
            with self._reporting_interrupts():
                super()._run_subcommand(subcommand)
        except Preempted:
            if self.trainer.is_global_zero:
                print(f"to go on: python lightning_cli.py fit --resume {shlex.quote(self.run_dir)}", file=sys.stderr)
            raise
        except Exception as error:
            # a misconfiguration says less than who was misconfigured
            explanations = [bad_input, refused_by_library]
            if isinstance(error, MisconfigurationException):
                explanations.reverse()
            said = explanations[0](error) or explanations[1](error)
            if not said and isinstance(error, FileNotFoundError) and self._has_lost_its_folder():
                said = f"{error.filename}: somebody has removed or renamed the run's folder while it was writing there"
            if not said:
                raise
            raise InputError(said) from error

    def _has_lost_its_folder(self) -> bool:
        return self.trainer.is_global_zero and not os.path.isdir(self.run_dir)

    _resumed_step: int | None = None

    def before_fit(self) -> None:
        """Notes where a resumed run begins."""
        if path := self.config[self.subcommand].ckpt_path:
            checkpoint = read_checkpoint(Path(path), "ckpt_path")
            if {"loops", "optimizer_states"}.isdisjoint(checkpoint):
                raise InputError(
                    f"ckpt_path={path} holds weights, and not the state of a run; start from them with "
                    "--model.initial_weights"
                )
            if (afresh := begins_afresh(checkpoint)) and self.trainer.is_global_zero:
                print(f"ckpt_path={path} lacks {', '.join(afresh)}, which begin afresh", file=sys.stderr)
            self._resumed_step = checkpoint["global_step"]
            epochs = self.trainer.max_epochs
            if epochs is not None and -1 < epochs < checkpoint["epoch"]:
                raise InputError(
                    f"trainer.max_epochs={epochs}: {path} is of epoch number {checkpoint['epoch'] + 1}; give more"
                )

    def after_fit(self) -> None:
        """Says where there was nothing left to train, and tests the best checkpoint when asked to."""
        path = self.config[self.subcommand].ckpt_path
        if self._resumed_step == self.trainer.global_step and self.trainer.is_global_zero:
            print(
                f"nothing was trained: {path} is at the end of its run already; give a larger --trainer.max_epochs",
                file=sys.stderr,
            )
        if not self.config[self.subcommand].test_after_fit or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        # by its path: "best" makes Lightning warn that there are two checkpoint callbacks
        keepers = [c for c in self.trainer.checkpoint_callbacks if isinstance(c, BestCheckpoint)]
        best = keepers[0].best_model_path if keepers else ""
        why = "no best checkpoint was written (nothing was validated)"
        if self.trainer.strategy.broadcast(bool(best) and not Path(best).is_file()):
            best, why = "", f"{best} is not there any more"
        if not best and self.trainer.is_global_zero:
            print(f"{why}: testing the last weights", file=sys.stderr)
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
        except Preempted:
            raise
        except SystemExit:  # what Lightning makes of Ctrl-C, once everything is shut down
            if not self.trainer.interrupted:
                raise
            last = Path(self.config_init[self.subcommand].last_checkpoint.dirpath or "", LAST)
            found = f"the last checkpoint is {last}" if last.is_file() else "no checkpoint had been written yet"
            print(f"interrupted: {found}" if self.subcommand == "fit" else "interrupted", file=sys.stderr)
            sys.exit(_INTERRUPTED)


class _Parser(LightningArgumentParser):
    """A parser that answers bad input with one line in place of pages of usage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # abbreviations would slip past what looks for --ckpt_path and --config
        super().__init__(*args, allow_abbrev=False, **{**kwargs, "parser_mode": config_text.MODE})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        fail(one_line(message, self))


class _SyncBatchNorm(TorchSyncBatchNorm):
    """SyncBatchNorm for timm's networks too, whose BatchNorm may hold the activation: torch's conversion drops it."""

    def apply(self, model: nn.Module) -> nn.Module:
        converted: nn.Module = convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return converted

    def revert(self, model: nn.Module) -> nn.Module:
        # nothing to revert: in evaluation, and in a single process, SyncBatchNorm is BatchNorm
        return model


_HOW_TO_GIVE_WEIGHTS = "give --ckpt_path best (the newest run's), --ckpt_path FILE, or --model.initial_weights FILE"
_KINDS = {
    "classification": (ClassificationTask, ClassificationDataModule, "recipes/digits.yaml", "models/aw_resnet20.yaml"),
    "detection": (
        DetectionTask,
        COCODataModule,
        "recipes/digit_scenes.yaml",
        "models/aw_faster_rcnn_resnet18_small.yaml",
    ),
}


def _lead_checkpoints(callbacks: Any, folder: str) -> None:
    """Lets Lightning's own checkpoint callbacks write beside best.ckpt, whatever the loggers are."""
    for callback in callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []:
        kind = resolve_name(callback.class_path)
        if isinstance(kind, type) and issubclass(kind, ModelCheckpoint) and callback.init_args.dirpath is None:
            callback.init_args.dirpath = folder


def _require_one_kind(config: Any) -> None:
    """Refuses a classifier on boxes, or a detector on classes."""
    task, data = (resolve_name(config[section].class_path) for section in ("model", "data"))
    if not (isinstance(task, type) and isinstance(data, type)):  # functions that make them
        return
    for kind, (task_base, _, *configs) in _KINDS.items():
        other = next((name for name in _KINDS if name != kind and issubclass(data, _KINDS[name][1])), None)
        if issubclass(task, task_base) and other:
            fitting = " ".join(f"-c configs/{path}" for path in configs)
            raise InputError(
                f"model={task.__name__} is for {kind} and data={data.__name__} for {other}; "
                f"give a recipe and a model of one kind, such as {fitting}"
            )
