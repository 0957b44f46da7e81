"""A run in Weights & Biases: named, described, summed up, and never in the way of training."""

from __future__ import annotations

import math
import os
import platform
import ssl
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import torch
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import nn

from awconv.callbacks.checkpoints import direction
from awconv.callbacks.network_summary import count_parameters
from awconv.checkpoint import LAST
from awconv.errors import require, require_number
from awconv.tasks import ClassificationTask, DetectionTask

if TYPE_CHECKING:
    import lightning.pytorch as pl

_MODES = ("online", "offline", "disabled")
_AXIS = "trainer/global_step"
_ONLINE = ("online", "run", "shared")
_GIT_SECONDS = _SERVER_SECONDS = 5


class WandbRun(WandbLogger):
    """Lightning's logger of Weights & Biases, with what a run needs to be found, compared and continued.

    * A server that cannot be reached, or that refuses, costs one line of warning: the run is then recorded offline, to
      be uploaded later by ``wandb sync``. Offline and disabled runs never touch the network.
    * The configuration also holds the ``environment``, the ``git`` commit of the working directory (``dirty`` where
      tracked files differ from it) and the number of ``parameters``: in all, trainable, and added by AW-convolution.
    * Every metric is drawn over ``trainer/global_step``; ``epoch`` is recorded beside it, and a chart of the web page
      can be switched to it. The summary keeps the best value beside the last: ``max`` of accuracies, mAP and mAR,
      ``min`` of losses. Of ``test/`` metrics it keeps the last alone, since the best of several tests is none. (When
      a run is gone on with, W&B itself may leave the old summary; the curves are whole: wandb/wandb#9684.)
    * Only the first process of several records anything.

    Args:
        project: The project; ``WANDB_PROJECT``, or ``awconv``, if null.
        name: What the run is called; the command line gives it ``DATA-MODEL-sSEED`` if null.
        group: The runs that belong together; the command line gives it ``DATA-MODEL``, all seeds, if null.
        job_type: The command line gives it the command (``fit``, ``test``, ...) if null.
        tags: Labels to filter by; the command line gives it the task, the data and the parts of the model if null.
        notes: A description.
        entity: The user or team; the account's own if null.
        mode: ``online``, ``offline`` (recorded in the run's folder alone) or ``disabled``; ``WANDB_MODE``, or
            ``online``, if null.
        save_dir: The folder that the ``wandb`` folder goes into; the command line gives it the run's own.
        id: The id of the run to go on with; a new one if null. Offline, the record is a second file of that id, which
            ``wandb sync`` appends to the first.
        log_checkpoints: Keep the best and the last checkpoint as an artifact ``model-ID`` with the aliases ``best`` and
            ``last``, when training ends or is interrupted. The file in it is called ``model.ckpt``.
        init_timeout: Seconds to wait for ``wandb.init`` before the run goes offline. A server that does not answer at
            all is given five of them.
        finish_timeout: Seconds to wait at the end for what is not uploaded yet; the rest stays in the folder for
            ``wandb sync``, and W&B warns of it. 0 waits for ever. Null is 5, and 600 with ``log_checkpoints``. W&B
            reads it once, when the run begins, and tells nobody before the end what is still to be uploaded: so the 5
            seconds, which bound what a server costs that went away meanwhile, hold for one that answers as well. Give
            600 where media and tables go over a slow link. Where runs are preempted, it has to be shorter than what
            the scheduler gives them.
        **kwargs: Further arguments of Lightning's logger and of ``wandb.init``.

    Raises:
        InputError: If ``mode`` or a timeout is none.
    """

    def __init__(
        self,
        project: str | None = None,
        *,
        name: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: list[str] | None = None,
        notes: str | None = None,
        entity: str | None = None,
        mode: Literal["online", "offline", "disabled"] | None = None,
        save_dir: str = ".",
        id: str | None = None,
        log_checkpoints: bool = False,
        init_timeout: float = 20,
        finish_timeout: float | None = None,
        **kwargs: Any,
    ) -> None:
        require(mode is None or mode in _MODES, "mode", mode, f"one of {', '.join(_MODES)}, or null")
        require_number("init_timeout", init_timeout, "a number of seconds, at least 1", low=1)
        if finish_timeout is None:  # W&B's own shutdown may add four seconds
            finish_timeout = 600 if log_checkpoints else 5
        require_number("finish_timeout", finish_timeout, "a number of seconds, 0 or more, or null", low=0)
        if kwargs.pop("offline", False):  # which would set WANDB_MODE for all that follows in this process
            mode = "offline"
        settings = kwargs.pop("settings", None) or {}
        if isinstance(settings, Mapping):
            settings = {"init_timeout": init_timeout, "finish_timeout": finish_timeout, **settings}
        given: dict[str, Any] = {
            "group": group,
            "job_type": job_type,
            "tags": list(tags) if tags else None,
            "notes": notes,
            "entity": entity,
            "mode": mode,
        }
        super().__init__(
            name=name or None,  # the command line's default logger has an empty one, which a config may inherit
            project=project or os.environ.get("WANDB_PROJECT", "awconv"),
            save_dir=save_dir,
            id=id,
            **{key: value for key, value in given.items() if value is not None},
            **kwargs,
            settings=settings,
        )
        if self._wandb_init.get("anonymous") is None:
            del self._wandb_init["anonymous"]  # of which W&B warns, whatever it is
        self.log_checkpoints = log_checkpoints
        self._described = False
        self._defined: set[str] = set()
        self._savers: dict[str, Any] = {}
        self._kept: dict[Path, float] = {}

    # ---- the run ---------------------------------------------------------------------------------------------------

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """W&B's own object, made when it is first asked for; a stand-in that does nothing on other processes."""
        run: Any = self._experiment
        if run is None:
            import wandb

            self._point_to_repository()
            try:
                self._require_an_answer()
                run = super().experiment
            except (wandb.errors.CommError, TimeoutError, ConnectionError) as error:
                reason = " ".join(str(error).split("\n")[0].split())
                self._wandb_init["mode"] = "offline"
                run = super().experiment
                rank_zero_warn(
                    f"Weights & Biases cannot be used now ({reason}): this run is recorded offline, to be uploaded "
                    f"later by `wandb sync {Path(run.dir).parent}`"
                )
        if not self._described:
            self._described = True
            about: dict[str, Any] = {"environment": _environment()}
            if commit := _git("rev-parse", "HEAD"):
                about["git"] = {"commit": commit, "dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))}
            run.config.update(about, allow_val_change=True)
        return run

    def _require_an_answer(self) -> None:
        """Raises where no server answers, for which ``wandb.init`` would wait ten seconds beside its timeout."""
        import wandb

        settings = wandb.setup().settings.model_copy()
        given = self._wandb_init["settings"]
        if isinstance(given, Mapping):
            settings.update_from_dict(dict(given))
        else:
            settings.update_from_settings(given)
        mode = self._wandb_init.get("mode") or settings.mode
        begun = wandb.run is not None or getattr(self, "_attach_id", None) is not None
        if mode in _ONLINE and not begun:
            proxies = {"http": settings.http_proxy, "https": settings.https_proxy}
            _ask(settings.base_url, {scheme: proxy for scheme, proxy in proxies.items() if proxy})

    def _point_to_repository(self) -> None:
        """Lets W&B's own account of the code be of the working directory; it would look around ``save_dir``."""
        settings = self._wandb_init["settings"]
        if isinstance(settings, dict) and (root := _git("rev-parse", "--show-toplevel")):
            settings.setdefault("git_root", root)
        with suppress(OSError):  # where that fails, W&B takes a temporary folder, and says so
            Path(self.save_dir or ".").mkdir(parents=True, exist_ok=True)

    @property
    def run_id(self) -> str | None:
        """The id by which the run can be gone on with: hand it back as ``id``.

        None before :attr:`experiment` is first asked for, and on all processes but the first, unless it was given.
        """
        return self.version

    def describe(self, experiment: str, *, command: str, seed: Any, model: pl.LightningModule) -> None:
        """Names the run where the user has not; without effect once it has begun.

        In a sweep the run keeps the name that W&B numbers it by.

        Args:
            experiment: What all its seeds have in common, such as ``digits-aw_resnet20``; the data come first.
            command: ``fit``, ``validate``, ``test`` or ``predict``.
            seed: The run's seed; one that is no whole number is left out.
            model: Whose kind and hyperparameters the tags tell.
        """
        parts = [experiment]
        if isinstance(seed, int) and not isinstance(seed, bool):
            parts.append(f"s{seed}")
        if command != "fit":
            parts.append(command)
        kinds = {"classification": ClassificationTask, "detection": DetectionTask}
        tags = [kind for kind, task in kinds.items() if isinstance(model, task)]
        tags.append(experiment.split("-")[0])
        hparams: Mapping[str, Any] = model.hparams
        tags += [word for key in ("head", "backbone", "attention") if isinstance(word := hparams.get(key), str)]
        tags += ["aw"] if hparams.get("aw") else []
        defaults = {
            "name": (None if "WANDB_SWEEP_ID" in os.environ else "-".join(parts), "WANDB_NAME"),
            "group": (experiment, "WANDB_RUN_GROUP"),
            "job_type": (command, "WANDB_JOB_TYPE"),
            "tags": (list(dict.fromkeys(tags)), "WANDB_TAGS"),
        }
        for key, (value, variable) in defaults.items():
            if value is not None and self._wandb_init.get(key) is None and variable not in os.environ:
                self._wandb_init[key] = value

    @rank_zero_only
    def log_graph(self, model: nn.Module, input_array: torch.Tensor | None = None) -> None:
        """Notes the number of parameters; Lightning hands over the module here, before the first step."""
        self.experiment.config.update({"parameters": count_parameters(model)}, allow_val_change=True)

    # ---- metrics ---------------------------------------------------------------------------------------------------

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Records metrics, and says of each that is new how it is to be summed up."""
        for name in metrics.keys() - self._defined:
            self._defined.add(name)
            if best := _best(name):
                shown = f"{self._prefix}{self.LOGGER_JOIN_CHAR}{name}" if self._prefix else name
                self.experiment.define_metric(shown, step_metric=_AXIS, step_sync=True, summary=f"{best},last")
        # W&B's maximum of a number and NaN is NaN for good
        known = {name: value for name, value in metrics.items() if not (_best(name) and _is_nan(value))}
        super().log_metrics(known, step)

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Notes who writes checkpoints."""
        super().after_save_checkpoint(checkpoint_callback)
        self._savers[checkpoint_callback.state_key] = checkpoint_callback

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Hands over the checkpoints where asked to, however the run ended."""
        super().finalize(status)
        if not self.log_checkpoints or self._experiment is None:
            return
        aliases: dict[Path, list[str]] = {}
        for alias, path in self._checkpoints().items():
            aliases.setdefault(path, []).append(alias)
        for path, names in aliases.items():
            try:
                self._keep(path, names)
            except OSError as error:
                rank_zero_warn(f"{path} could not be kept as an artifact of Weights & Biases: {error}")

    def _checkpoints(self) -> dict[str, Path]:
        """The newest best and last checkpoint there are."""
        found: dict[str, list[Path]] = {"last": [], "best": []}
        folders = {Path(self.save_dir or ".", "checkpoints")}
        for saver in self._savers.values():
            found["best" if saver.monitor is not None else "last"].append(Path(saver.best_model_path))
            found["last"].append(Path(saver.last_model_path))
            folders.add(Path(saver.dirpath or "."))
        found["last"] += [folder / LAST for folder in folders]
        there = {alias: [path for path in paths if path.is_file()] for alias, paths in found.items()}
        return {alias: max(paths, key=lambda path: path.stat().st_mtime) for alias, paths in there.items() if paths}

    def _keep(self, path: Path, aliases: Sequence[str]) -> None:
        import wandb

        written = path.stat().st_mtime
        if self._kept.get(path) == written:
            return
        metadata: dict[str, Any] = {"file": path.name}
        for saver in self._savers.values():
            if "best" in aliases and str(path) == saver.best_model_path and saver.best_model_score is not None:
                metadata |= {"monitor": saver.monitor, "score": float(saver.best_model_score)}
        artifact = wandb.Artifact(f"model-{self.experiment.id}", type="model", metadata=metadata)
        # a copy, which is W&B's: the file may be replaced before it is uploaded
        artifact.add_file(str(path), name="model.ckpt", policy="mutable")
        self.experiment.log_artifact(artifact, aliases=list(aliases))
        self._kept[path] = written


def describe_runs(loggers: Sequence[Logger], experiment: str, **about: Any) -> None:
    """Calls :meth:`WandbRun.describe` of those loggers that have it."""
    for logger in loggers:
        if isinstance(logger, WandbRun):
            logger.describe(experiment, **about)


def _ask(url: str, proxies: dict[str, str]) -> None:
    """Asks a server for anything at all, without a key; every answer is good, a refusal or a fault as well.

    Behind a SOCKS proxy, which urllib cannot use, nothing is asked.

    Raises:
        ConnectionError: If there is no answer in time.
    """
    proxies = {**urllib.request.getproxies(), **proxies}
    if proxies.get(urlsplit(url).scheme, "").startswith("socks"):
        return
    outcome: list[str | None] = [f"{url} does not answer within {_SERVER_SECONDS} s"]

    def ask() -> None:
        # whether its certificate is good is for W&B to say, which may know of others
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        ways = urllib.request.ProxyHandler(proxies)
        opener = urllib.request.build_opener(ways, urllib.request.HTTPSHandler(context=context))
        try:
            opener.open(f"{url.rstrip('/')}/graphql", b"{}", timeout=_SERVER_SECONDS).close()
        except urllib.error.HTTPError:
            outcome[0] = None
        except Exception as error:  # whatever is wrong with the name, the way or the answer
            outcome[0] = f"{url}: {getattr(error, 'reason', None) or error}"
        else:
            outcome[0] = None

    # in a thread, since to find a name and to try each of its addresses have timeouts of their own
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_SERVER_SECONDS)
    if outcome[0] is not None:
        raise ConnectionError(outcome[0])


def _best(name: str) -> str | None:
    """``max`` or ``min``, whichever is the better of a metric's values; None where neither is."""
    return None if name.startswith(("test/", "attention/")) else direction(name)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _environment() -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("awconv", "torch", "torchvision", "lightning", "timm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from its source
            continue
    found |= {"host": platform.node(), "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    return found


def _git(*words: str) -> str | None:
    """What git says of the working directory; None without git, a repository, a commit, or an answer in time."""
    try:
        done = subprocess.run(["git", *words], capture_output=True, text=True, check=True, timeout=_GIT_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
