"""What an offline run of W&B has recorded, read back from its file."""

import json
import subprocess
import sys
from pathlib import Path

import wandb


def records_of(folder):
    """The records of an offline run's file, once it is finished."""
    wandb.finish()
    (file,) = Path(folder).glob("*.wandb")
    command = [Path(sys.executable).parent / "wandb", "leet", "inspect", "--json", file.parent]
    read = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in read.stdout.splitlines()]


def of_kind(records, kind):
    return [record[kind] for record in records if kind in record]


def merged(records, kind):
    values = {}
    for record in of_kind(records, kind):
        values |= record.get("update", {})
    return values


def history(records):
    return [record["item"] for record in of_kind(records, "history")]
