"""NetworkSummary: the numbers of parameters, counted by hand."""

import re

import torch

from awconv.callbacks.network_summary import count_parameters
from awconv.layers import AWConv2d


def test_parameters_are_counted():
    layer = AWConv2d(32, 32, 3)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 1), layer, torch.nn.LazyLinear(4))
    model[0].weight.requires_grad_(False)
    attention = sum(p.numel() for p in layer.attention.parameters())
    total = (3 * 32 + 32) + (32 * 32 * 9 + 32) + attention
    assert count_parameters(model) == {"total": total, "trainable": total - 3 * 32, "added_by_aw": attention}


def test_fit_says_what_it_trains(cli, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("awconv.callbacks.network_summary.rank_zero_info", said.append)
    options = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1"]
    options += ["--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={tmp_path / 'runs'}"]
    code, out, err = cli("fit", *options, "--model.aw.include", '["layer3.*"]')
    assert code == 0, err
    (line,) = said
    added = r"\(\d+\.?\d* K of them the attention of 6 AW layers\)"
    assert re.fullmatch(rf"CIFARResNet: 27\d K parameters {added}, 27\d K learn", line)
    assert "FLOPs" not in out
    code, out, err = cli("fit", *options, "--trainer.enable_model_summary=false")
    assert code == 0, err
    assert len(said) == 1
