"""What is kept out of a notebook's outputs, and what is not."""

import subprocess
import sys

import pytest

CODE = """
import sys, tempfile, warnings
from awconv.quiet import silence_libraries

silence_libraries()
warnings.warn("IProgress not found. Please update jupyter and ipywidgets.")

import lightning as L
from awconv.data import DigitsDataModule
from awconv.tasks import ClassificationTask

def train():
    L.seed_everything(0)
    data = DigitsDataModule(batch_size=64)
    task = ClassificationTask("resnet20", num_classes=10, in_channels=1)
    options = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    options |= dict(limit_train_batches=1, log_every_n_steps=1, accelerator="cpu", default_root_dir=tempfile.mkdtemp())
    L.Trainer(max_epochs=1, **options).fit(task, data)

train()
print("--- and now without notes", file=sys.stderr)
silence_libraries(notes=False)
train()
warnings.warn("this one is for you")
"""


@pytest.mark.slow
def test_what_is_said():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert not done.stdout
    notes, rest = done.stderr.split("--- and now without notes\n")
    assert "Seed set to 0" in notes
    assert "global batch: 64" in notes
    assert "Tip:" not in notes
    assert "Warning" not in notes
    (said,) = (line for line in rest.splitlines() if "warnings.warn(" not in line)
    assert said.endswith("UserWarning: this one is for you")
