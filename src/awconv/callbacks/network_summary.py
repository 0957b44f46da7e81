"""What a network is made of, in a line: its parameters, how many learn, and how many AW adds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_summary.model_summary import get_human_readable_count
from torch import nn
from torch.nn.parameter import is_lazy

from awconv.layers import AWConv2d

if TYPE_CHECKING:
    import lightning.pytorch as pl


class NetworkSummary(Callback):
    """Says when ``fit`` begins what is trained, in place of Lightning's table, most of whose rows are metrics."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says it."""
        counted = {name: get_human_readable_count(number) for name, number in count_parameters(pl_module).items()}
        layers = sum(isinstance(module, AWConv2d) for module in pl_module.modules())
        added = f" ({counted['added_by_aw']} of them the attention of {layers} AW layers)" if layers else ""
        network = type(getattr(pl_module, "network", pl_module)).__name__
        rank_zero_info(f"{network}: {counted['total']} parameters{added}, {counted['trainable']} learn")


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Counts parameters: ``total``, ``trainable``, and ``added_by_aw``, which plain convolutions would not have."""
    counted = {id(p): p for p in model.parameters() if not is_lazy(p)}
    added = {
        id(p): p
        for layer in model.modules()
        if isinstance(layer, AWConv2d)
        for child in layer.children()
        for p in child.parameters()
    }
    return {
        "total": sum(p.numel() for p in counted.values()),
        "trainable": sum(p.numel() for p in counted.values() if p.requires_grad),
        "added_by_aw": sum(p.numel() for p in added.values()),
    }
