"""Malformed inputs by the dozen, made by a seeded generator: each is answered by one line, or it is what was meant.

None ends in a traceback, hangs, takes much memory, or leaves a folder behind.
"""

import math
import os
import random
import resource
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

import awconv.cli  # noqa: F401 - the log of Lightning goes where standard error goes when it is imported
from awconv import config_text
from refusals import refused

GIGABYTE = 2**30 if sys.platform == "darwin" else 2**20  # in the unit of ru_maxrss

# a run of a second; flags that keep it so whatever a config says
SHORT = [
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.limit_train_batches=1",
    "--trainer.limit_val_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


@pytest.fixture
def bounded():
    """Holds a test to a gigabyte over what the process took before."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GIGABYTE


def answered(result: tuple[int, str, str], runs: Path) -> bool:
    """Whether the input was accepted; if not, it was refused by one line, and nothing is left behind."""
    code, out, err = result
    assert "Traceback" not in out + err
    if code == 0:
        return True
    refused(result)
    assert max(map(len, err.splitlines())) < 2000
    assert not [path for path in runs.glob("**/*") if not path.is_dir() or path.name == "checkpoints"]
    return False


# ---- configs -----------------------------------------------------------------------------------------------------

MARKER = "hunter2"  # in a comment, which no message may show
CONFIG = f"""\
seed_everything: 1
# password {MARKER}
trainer:
  max_epochs: 1  # password {MARKER}
  log_every_n_steps: 1
  callbacks:
    - class_path: EarlyStopping
      init_args: {{monitor: val/loss, patience: 3}}  # password {MARKER}
model:  # password {MARKER}
  class_path: ClassificationTask
  init_args:
    backbone: resnet20
    lr: 0.01
    optimizer_options: {{betas: [0.9, 0.99]}}
# password {MARKER}
data:
  class_path: DigitsDataModule
  init_args: {{batch_size: 8, image_size: 8}}  # password {MARKER}
"""
ODD: list[Any] = [
    *(None, True, -1, 0, 10**30, 1e308, math.nan, math.inf, "", "x" * 5000, "../../x", "/dev/zero", "a\0b", "\x1b[31m"),
    *([], {}, [[1]], [None], {"": 1}, {"class_path": "os.system"}, {"class_path": 1}, {"__path__": "x"}, {1: 2}),
]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each place in a config: a mapping or list, and a key or index of it."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def bend_a_value(text: str, rng: random.Random) -> bytes:
    config = yaml.safe_load(text)
    inside, key = rng.choice(list(places(config)))
    inside[key] = deepcopy(rng.choice(ODD))
    return config_text.dump(config).encode()


def rename_a_key(text: str, rng: random.Random) -> bytes:
    config = yaml.safe_load(text)
    inside, key = rng.choice([place for place in places(config) if isinstance(place[0], dict)])
    inside[rng.choice([f"{key}x", f" {key}", f"{key}.", "", "..", 1, None, "class_path"])] = inside.pop(key)
    return config_text.dump(config).encode()


def spoil_bytes(text: str, rng: random.Random) -> bytes:
    content = bytearray(text.encode())
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(content))
        content[at : at + rng.randint(0, 2)] = rng.choice(
            [b"\0", b"\x1b", b"\xff", b"\t", b"[", b"}", b"*a", b"&a ", b"!!set ", b"<<: ", b": ", b"- ", b"\r", b"'"]
        )
    return bytes(content)


def cut_off(text: str, rng: random.Random) -> bytes:
    return text[: rng.randrange(len(text))].encode()


def double_a_line(text: str, rng: random.Random) -> bytes:
    lines = text.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    return "".join([*lines[:at], lines[at], *lines[rng.randrange(at + 1) :]]).encode()


def write_otherwise(text: str, rng: random.Random) -> bytes:
    return f"{text}# é\n".encode(rng.choice(["utf-16", "utf-32", "latin-1", "utf-8-sig"]))


def holds(config: Any, part: Any) -> bool:
    """Whether all of a file's content is in the config of the run."""
    if isinstance(part, dict):
        return isinstance(config, dict) and all(key in config and holds(config[key], part[key]) for key in part)
    if isinstance(part, list):
        return isinstance(config, list) and len(config) == len(part) and all(map(holds, config, part))
    # a class is written by its whole name
    return config == part or (isinstance(config, str) and config.endswith(f".{part}")) or part in (None, {})


@pytest.mark.timeout(60)
@pytest.mark.parametrize("seed", range(40))
def test_malformed_configs(cli, tmp_path, bounded, seed):
    rng = random.Random(seed)
    kinds: list[Callable[[str, random.Random], bytes]] = [
        *(bend_a_value, bend_a_value, bend_a_value, rename_a_key, spoil_bytes, cut_off, double_a_line, write_otherwise)
    ]
    path, runs = tmp_path / "my.yaml", tmp_path / "runs"
    path.write_bytes(kinds[seed % len(kinds)](CONFIG, rng))
    result = cli("fit", "-c", path, *SHORT, f"--trainer.default_root_dir={runs}")
    assert MARKER not in result[1] + result[2]
    if answered(result, runs):
        (config,) = runs.glob("*/*/config.yaml")
        assert holds(yaml.safe_load(config.read_text()), config_text.load_file(path))


# ---- flags -------------------------------------------------------------------------------------------------------

OPTIONS = [
    *("trainer", "trainer.max_epochs", "trainer.max_time", "trainer.precision", "trainer.callbacks"),
    *("trainer.callbacks+", "trainer.plugins", "trainer.val_check_interval", "trainer.accumulate_grad_batches"),
    *("trainer.gradient_clip_val", "trainer.logger", "checkpoint", "checkpoint.mode", "checkpoint.dirpath"),
    *("last_checkpoint.every_n_steps", "model", "model.backbone", "model.aw", "model.lr", "model.optimizer_options"),
    *("model.initial_weights", "data", "data.image_size", "data.batch_size", "run_dir", "resume", "ckpt_path", "c"),
]
VALUES = [
    *("", "-1", "0x" + "f" * 5000, "9" * 5000, "nan", ".nan", "1e400", "null", "[]", "{}", "[1]", "{a: 1}", "x" * 3000),
    *("[" * 3000, "{a: &a [*a]}", "!!python/object:os.system x", "!!binary aGk=", "../../../x", "/dev/null"),
    *("/dev/zero", "{class_path: os.system}", "@PIPE", "@LOOP", "@SECRET", "@LIST", "\x1b[31m"),
]  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("seed", range(32))
def test_malformed_flags(cli, tmp_path, monkeypatch, bounded, seed):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(seed)
    option, value = OPTIONS[seed % len(OPTIONS)], rng.choice(VALUES)
    runs, secret, loop = tmp_path / "runs", tmp_path / "secret.yaml", tmp_path / "loop"
    secret.write_text(f"{MARKER}\n{MARKER}: {MARKER}")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    loop.symlink_to(loop)
    if value == "@PIPE":
        os.mkfifo(tmp_path / "pipe")
    named = {"@PIPE": tmp_path / "pipe", "@LOOP": loop, "@SECRET": secret, "@LIST": tmp_path / "list.yaml"}
    flag = f"--{option}={named.get(value, value)}"
    short = ["--trainer.fast_dev_run=1", "--data.image_size=8", *SHORT, f"--trainer.default_root_dir={runs}"]
    result = cli("fit", *short, "-" + flag[2:] if option == "c" else flag)
    assert MARKER not in result[1] + result[2]
    answered(result, runs)
