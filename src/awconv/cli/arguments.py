"""What was typed, put in order: the base config, the configs, the flags, so that each wins over the one before."""

import difflib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import reduce
from importlib.resources import files
from itertools import zip_longest
from operator import or_
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin

import yaml

from awconv import config_text
from awconv.callbacks import BestCheckpoint
from awconv.callbacks.checkpoints import direction, find_newest, find_run
from awconv.checkpoint import DATA_HPARAMS, HPARAMS, make_harmless, read_checkpoint
from awconv.errors import InputError, is_number, printable

SUBCOMMANDS = ("fit", "validate", "test", "predict")
# what the model learns from the data, so that nobody has to type it
LINKED = ("num_classes", "class_names", "category_ids", "in_channels", "image_size", "max_size")


def complete(args: list[str]) -> list[str]:
    """Puts the base config and the configs before the flags, and names the checkpoint file that is meant.

    The base is the config that the checkpoint carries where ``--ckpt_path`` or ``--resume`` is given, else the embedded
    default where no config names a model or data. A checkpoint's data and model are the base of every command, and for
    ``fit`` what its trainer counts too. What acts beyond that (loggers, callbacks, plugins, ...), and classes that are
    neither this project's nor beside its script, come from a checkpoint only by ``--resume``, which is for runs of
    one's own, or after ``--trust_checkpoint_config true``.

    Args:
        args: The words after the program's name.

    Returns:
        The words for the parser.

    Raises:
        InputError: If a config or the checkpoint cannot be read, or an argument is given that the data decide.
    """
    if not args or args[0] not in SUBCOMMANDS:
        return args
    subcommand, *words = args
    words = [f"--config={word[2:]}" if re.match(r"-c[^=]", word) else word for word in words]  # -cFILE
    paths, flags = _split(words, "-c|--config")
    configs = [_read_config(Path(path)) for path in paths]
    _refuse_linked(flags, configs)

    asked, flags = _split(flags, "--ckpt_path")
    resumed, flags = _split(flags, "--resume")
    resumed += [] if resumed else [str(c["resume"]) for c in configs if c.get("resume") is not None]
    if resumed:
        if subcommand != "fit" or asked:
            raise InputError(
                f"resume={resumed[-1]!r} lets a run go on in its own folder, by fit and without ckpt_path; for a new "
                "run from its checkpoint, or to test it, give --ckpt_path alone"
            )
        run_dir, start = find_run(Path(resumed[-1]))
        flags.append(f"--resume={run_dir}")
        if start.suffix == ".ckpt":
            asked = [str(start)]
        else:  # it was ended before its first checkpoint, and begins again
            paths = [str(start), *paths]
            configs = [_read_config(start), *configs]
    asked += [] if asked else [str(c["ckpt_path"]) for c in configs if c.get("ckpt_path") is not None]
    trust, _ = _split(flags, "--trust_checkpoint_config")
    said = trust or [str(c["trust_checkpoint_config"]) for c in configs if "trust_checkpoint_config" in c]
    believed = bool(resumed) or (bool(said) and config_text.load(said[-1]) is True)
    base = checkpoint = None
    if asked and asked[-1] not in ("null", "None"):
        roots = [
            str(c["trainer"]["default_root_dir"])
            for c in configs
            if isinstance(c.get("trainer"), dict) and "default_root_dir" in c["trainer"]
        ]
        roots += _split(flags, r"--trainer\.default_root_dir")[0]
        checkpoint = _resolve_checkpoint(asked[-1], Path(roots[-1] if roots else "runs"))
        flags.append(f"--ckpt_path={checkpoint}")
        base = _checkpoint_config(checkpoint, subcommand, _Typed(configs, flags, believed))
    elif not any(_names_a_class(config) for config in configs):
        base = files("awconv.cli").joinpath("default.yaml").read_text(encoding="utf-8")
    ordered = [base, *paths] if base else paths
    if checkpoint and any(_initial_weights(config) for config in configs):
        # the checkpoint's weights replace those that a recipe starts from, which nobody should have to fetch again
        ordered.append("model: {init_args: {initial_weights: null}}")
    return [subcommand, *(f"--config={config}" for config in ordered), *flags]


def count_in_whole_numbers(function: Callable[..., Any]) -> None:
    """Lets ``1`` be a number of things, and only ``1.0`` all of them, wherever ``function`` takes either.

    typing holds ``Union[int, float]`` and ``Union[float, int]`` for equal and hands out the one that it made first, in
    whatever library. Where that was the latter, ``--trainer.limit_train_batches 1`` would train on all batches.

    Args:
        function: Whose annotations are put in order.
    """
    annotations = inspect.unwrap(function).__annotations__
    for name, hint in annotations.items():
        kinds = list(get_args(hint))
        either = get_origin(hint) in (Union, UnionType) and {int, float} <= set(kinds)
        if either and kinds.index(float) < kinds.index(int):
            kinds.remove(int)
            kinds.insert(kinds.index(float), int)
            annotations[name] = reduce(or_, kinds)


class _Typed(NamedTuple):
    """What was typed, and whether the checkpoint's config is believed like it."""

    configs: list[dict[str, Any]]
    flags: list[str]
    believed: bool

    def names(self, option: str) -> bool:
        """Whether an option such as ``trainer.logger`` was typed."""
        section, _, name = option.partition(".")
        in_configs = any(name in (config.get(section) or {}) if name else section in config for config in self.configs)
        return in_configs or any(flag.startswith(f"--{option}") for flag in self.flags)

    def texts(self) -> Iterator[str]:
        """All values that were typed."""
        yield from (leaf for leaf in _leaves(self.configs) if isinstance(leaf, str))
        for flag in self.flags:
            yield flag.partition("=")[2] or flag

    def classes(self) -> Iterator[str]:
        """The classes that were typed: all that are called so, and the model and the data."""
        for section in ("model", "data"):
            yield from (config[section] for config in self.configs if isinstance(config.get(section), str))
        yield from _class_paths(self.configs)
        for flag, following in zip_longest(self.flags, self.flags[1:], fillvalue=""):
            name, _, value = flag.partition("=")
            if name in ("--model", "--data") or name.endswith("class_path"):
                yield value or following
            with suppress(yaml.YAMLError):
                yield from _class_paths(config_text.load(value or flag))


def _class_paths(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (inner for key, inner in value.items() if key == "class_path" and isinstance(inner, str))
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _class_paths(inner)


def _names_a_class(config: dict[str, Any]) -> bool:
    # overlays alone go on top of the embedded default
    sections = [config.get("model"), config.get("data")]
    return any(
        isinstance(section, str) or (isinstance(section, dict) and "class_path" in section) for section in sections
    )


def _initial_weights(config: dict[str, Any]) -> Any:
    return _init_args(config).get("initial_weights")


def _init_args(config: dict[str, Any]) -> dict[str, Any]:
    """The options of a config's model, where it gives any and they are options."""
    model = config.get("model")
    options = model.get("init_args") if isinstance(model, dict) else None
    return options if isinstance(options, dict) else {}


def _split(words: list[str], option: str) -> tuple[list[str], list[str]]:
    """Takes an option out of the words: all its values, in order, and the words that are left."""
    values, rest = [], []
    queue = iter(words)
    for word in queue:
        match = re.fullmatch(rf"(?:{option})(?:=(.*))?", word, re.DOTALL)
        if not match:
            rest.append(word)
            continue
        value = match[1] if match[1] is not None else next(queue, None)
        if not value:
            raise InputError(f"{word.rstrip('=')} has no value; give it one, as in {word.rstrip('=')} FILE")
        values.append(value)
    return values, rest


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        there = {p.name: str(p) for p in Path("configs").glob("**/*.yaml")}
        near = difflib.get_close_matches(path.name, there, n=1)
        hint = f"; did you mean {there[near[0]]}?" if near else "; give a YAML file"
        what = "is a folder" if path.is_dir() else "is no regular file" if path.exists() else "does not exist"
        raise InputError(f"config {str(path)!r} {what}{hint}")
    content = config_text.load_file(path)
    # the parser would pass over them
    if content.get("config") is not None and not isinstance(content["config"], str):
        raise InputError(f"config {str(path)!r}: config is no path; name further configs with -c")
    for name in ("trainer", "checkpoint", "last_checkpoint"):
        section = content.get(name, {})
        if not isinstance(section, dict | str):
            kind = "nothing" if section is None else type(section).__name__
            raise InputError(f"config {str(path)!r}: {name} holds {kind}, not options; give some, or leave it out")
    return content


def _refuse_linked(flags: list[str], configs: list[dict[str, Any]]) -> None:
    typed = {match[1] for flag in flags if (match := re.match(r"--model\.(?:init_args\.)?(\w+)(?:=|$)", flag))}
    for config in configs:
        typed |= set(_init_args(config))
    if given := typed & set(LINKED):
        raise InputError(
            f"model.{sorted(given)[0]} is taken from the data and cannot be given; change the data instead"
        )


def _resolve_checkpoint(value: str, root: Path) -> Path:
    if value in ("last", "best"):
        folder = find_newest(root)
        if folder is None:
            raise InputError(f"ckpt_path={value!r}: no run under {root}/ has a checkpoint; train one or give its path")
        path = folder / f"{value}.ckpt"
        if not path.is_file():
            other = folder / ("last.ckpt" if value == "best" else "best.ckpt")
            why = "nothing was validated, or only NaN was measured" if value == "best" else "no epoch has ended"
            raise InputError(
                f"ckpt_path={value!r}: the newest run, {folder.parent}, has no {path.name} ({why}); give {other}, or "
                "the checkpoint of another run"
            )
        print(printable(f"ckpt_path={value}: {path}"), file=sys.stderr)
        return path
    path = Path(value)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"ckpt_path={value!r} {what}; give a .ckpt file, or last or best for the newest run's")
    return path


def _checkpoint_config(path: Path, subcommand: str, typed: _Typed) -> str | None:
    """Gives what a checkpoint's config says, as far as it may say it, as the base of what was typed."""
    checkpoint = read_checkpoint(path, "ckpt_path")
    config = checkpoint.get("config")
    if config is None:
        if typed.configs:
            return None
        raise InputError(f"ckpt_path={str(path)!r} carries no config; give with -c the configs it was trained with")
    config.pop("weights_only", None)  # which no file decides of itself
    if subcommand == "fit":
        # earlier versions took all options of Lightning's ModelCheckpoint
        known = set(inspect.signature(BestCheckpoint).parameters)
        if "save_top_k" in (config.get("checkpoint") or {}) and direction(str(config["checkpoint"].get("monitor"))):
            known.discard("mode")  # which nobody needed to give
        config["checkpoint"] = {key: value for key, value in (config.get("checkpoint") or {}).items() if key in known}
        _keep_what_was_found(config, checkpoint)
        if not typed.believed:
            config = _without_what_acts(config, path, typed)
    else:
        config = {key: config[key] for key in ("seed_everything", "data", "model") if key in config}
    parts = {name: [config[name].get(key) or {} for key in ("init_args", "dict_kwargs")] for name in ("model", "data")}
    for data in parts["data"]:
        if "check_images" not in data and data.get("on_bad_image") == "stop":
            data["on_bad_image"] = None  # version 0.1.0 had no other default
    for model in parts["model"]:
        if "initial_weights" in model:
            model["initial_weights"] = None  # they are in the checkpoint
    if not typed.believed:
        named, trust = f"ckpt_path={str(path)!r}: its config", "--trust_checkpoint_config true"
        texts, classes = set(typed.texts()), set(typed.classes())
        for section, arguments in ((name, part) for name, both in parts.items() for part in both):
            make_harmless(config[section]["class_path"], arguments, named, trust, texts, classes)
    for data in parts["data"]:
        for name in {"class_names", "category_ids"} & data.keys():
            # the classes that the network knows: pictures can be predicted where the data set itself is not
            known = checkpoint.get("hyper_parameters", {}).get(name)
            data[name] = known if isinstance(known, list) else None  # a text may name a file
    return config_text.dump(config)


_ACTING = ("logger", "callbacks", "plugins", "strategy", "profiler", "model_registry", "default_root_dir")
# what a trainer is told by a checkpoint that nobody vouches for: numbers, switches, and words such as bf16-mixed, which
# are no path, no address and no YAML
_NUMBERS = (int, float, type(None))
_WORD = re.compile(r"[\w:,-]*")
_SECTIONS = ("seed_everything", "trainer", "checkpoint", "last_checkpoint", "test_after_fit", "data", "model")


def _without_what_acts(config: dict[str, Any], path: Path, typed: _Typed) -> dict[str, Any]:
    """Leaves out of a checkpoint's config what acts beyond training: who is called, where things are sent or written.

    Those are loggers, callbacks, plugins, strategy, profiler, and folders that are written to. A line says what was
    left out and differs from what a run has anyway.
    """
    trainer = config.get("trainer") or {}
    kept = {
        name: value
        for name, value in trainer.items()
        if name not in _ACTING and all(isinstance(leaf, _NUMBERS) or _WORD.fullmatch(leaf) for leaf in _leaves(value))
    }
    for name in ("devices", "num_nodes"):  # as many processes
        if (number := str(kept.get(name))).isdecimal() and int(number) > (os.cpu_count() or 1):
            del kept[name]
    sections = {name: config[name] for name in _SECTIONS if name in config}
    for name in ("checkpoint", "last_checkpoint"):
        options = sections.get(name) or {}
        sections[name] = {key: value for key, value in options.items() if isinstance(value, (*_NUMBERS, str))}
        sections[name].pop("dirpath", None)
    left = {f"trainer.{name}": value for name, value in trainer.items() if name not in kept}
    left |= {f"{name}.dirpath": (config.get(name) or {}).get("dirpath") for name in ("checkpoint", "last_checkpoint")}
    left |= {str(name): value for name, value in config.items() if name not in _SECTIONS}
    usual: list[Any] = [None, [], {}, False, "auto", "runs"]
    told = [name for name, value in left.items() if value not in usual and not _is_usual_logger(value)]
    if told := [name for name in told if not typed.names(name)]:
        said = (
            f"left out of the config of {path}: {', '.join(told)}; give again what you want of it, or believe the file "
            "with --trust_checkpoint_config true"
        )
        print(printable(said), file=sys.stderr)
    return {**sections, "trainer": kept}


def _is_usual_logger(value: Any) -> bool:
    return isinstance(value, dict) and value.get("class_path") == "awconv.callbacks.MetricsFile"


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _leaves(inner)
    else:
        yield value


def _keep_what_was_found(config: dict[str, Any], checkpoint: Mapping[str, Any]) -> None:
    """Lets a run go on with the learning rate and batch size that it found, and not look for them again."""
    trainer = config.setdefault("trainer", {}) or {}
    callbacks = trainer.get("callbacks") or []
    callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
    sought = {
        "LearningRateFinder": ("model", HPARAMS, "attr_name", "lr"),
        "BatchSizeFinder": ("data", DATA_HPARAMS, "batch_arg_name", "batch_size"),
    }
    for callback in list(callbacks):
        options = callback if isinstance(callback, dict) else {"class_path": callback}
        name = str(options.get("class_path")).rpartition(".")[2]
        if name in sought:
            callbacks.remove(callback)
            section, source, option, usual = sought[name]
            init_args = options.get("init_args")
            argument = str(init_args.get(option) or usual if isinstance(init_args, dict) else usual)
            found = checkpoint.get(source, {}).get(argument)
            if is_number(found) and argument.isidentifier():
                arguments = config[section].get("init_args") or {}
                config[section]["init_args"] = {**arguments, argument: found}
                print(f"{section}.{argument}={found:.6g}, as {name} found it when the run began", file=sys.stderr)
    config["trainer"] = {**trainer, "callbacks": callbacks or None}
