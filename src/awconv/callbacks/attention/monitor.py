"""A run's attention, watched: statistics and figures of every AW layer after each validation."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from awconv.callbacks.attention.figures import draw_attention_layers, draw_attention_maps, thumbnail_of
from awconv.callbacks.attention.statistics import (
    HISTOGRAM_BINS,
    AttentionStatistics,
    RunningStatistics,
    aw_layers,
    choose_layers,
    listening,
    network_of,
)
from awconv.callbacks.canvas import counted, evenly_spaced
from awconv.callbacks.media import publish
from awconv.errors import require_int
from awconv.layers import AWConv2d

if TYPE_CHECKING:
    import lightning.pytorch as pl

SHOWN_SAMPLES = 6  # whose maps are drawn
HEAT_MAP_LAYERS = 3  # by default
DRAWING_SHARE = 0.05  # of the time: where epochs take seconds, figures skip some


class AttentionMonitor(Callback):
    """Logs and draws, at each validation of ``fit``, what the attention of the AW layers does.

    It listens while the first pictures are validated, so that it sees what validation sees (averaged weights, mixed
    precision, a detector's padded batches) and runs nothing itself. Every validation has the same pictures, unless its
    data loader shuffles. With several processes only the first one's share of them counts. With ``torch.compile``,
    the batches that hold these pictures run uncompiled.

    - Logged for every layer, where defined (see :class:`awconv.callbacks.AttentionStatistics`):
      ``attention/LAYER/spread``, ``attention/LAYER/mean``, ``attention/LAYER/saturated``, ``attention/LAYER/dead``.
    - Published (see :func:`awconv.callbacks.media.publish`): the figures ``attention/layers`` (all layers at a glance)
      and ``attention/maps`` (heat maps of the first 6 samples), and for W&B a histogram
      ``attention/LAYER/histogram`` of every layer. Figures take at most a twentieth of the time: where epochs take
      seconds, some are skipped, but never the first and the last.

    A layer's name is its name in ``pl_module.network``, or in the module where that has no AW layers. A module without
    AW layers is left alone, and so are layers that see something else than pictures (regions of them, say). Of a layer
    that sees a batch several times the first time counts.

    Args:
        every_n_epochs: Epochs between two looks; the first is after so many.
        samples: Pictures to look at.
        layers: Glob pattern or patterns of layers to look at; None looks at all.
        heat_map_layers: Glob pattern or patterns of layers to draw maps of; None draws 3, evenly spaced.

    Raises:
        InputError: If a number is below 1, or, when training starts, a pattern matches no AW layer of a module that
            has some.
    """

    def __init__(
        self,
        every_n_epochs: int = 1,
        samples: int = 64,
        layers: str | list[str] | None = None,
        heat_map_layers: str | list[str] | None = None,
    ) -> None:
        require_int("every_n_epochs", every_n_epochs, "a whole number of epochs, at least 1", low=1)
        require_int("samples", samples, "a whole number of pictures, at least 1", low=1)
        self.every_n_epochs = every_n_epochs
        self.samples = samples
        self.layers = layers
        self.heat_map_layers = heat_map_layers
        self._listening = ExitStack()
        self._probe: _Probe | None = None
        self._drawable: _Probe | None = None
        self._drawn = False
        self._quiet_until = 0.0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses patterns that match nothing; forgets an earlier fit."""
        self._drawable, self._quiet_until = None, 0.0
        if there := _layers_of(pl_module):
            self._heat_mapped(choose_layers("layers", self.layers, there))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts with nothing, if this is a validation to look at."""
        self._probe = None
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        if not fitting or (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        if there := _layers_of(pl_module):
            chosen = choose_layers("layers", self.layers, there)
            # the others only take part in publishing, which is a collective
            samples = self.samples if trainer.is_global_zero else 0
            self._probe = _Probe(chosen, self._heat_mapped(chosen), samples, trainer.current_epoch)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Listens, as long as pictures are wanted."""
        if self._probe is not None and self._probe.wanted:
            self._listening.enter_context(listening(self._probe.layers, self._probe.hear))

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stops listening."""
        self._listening.close()
        if self._probe is not None and self._probe.wanted:
            self._probe.end_batch(batch, getattr(pl_module, "class_names", None))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs the numbers."""
        if self._probe is None or not trainer.is_global_zero:
            return
        # of one process alone: nothing is reduced, and sync_dist=True but keeps Lightning from recommending it
        options: dict[str, Any] = {"batch_size": 1, "rank_zero_only": True, "sync_dist": True}
        for name, statistics in self._probe.statistics.items():
            for key in ("spread", "mean", "saturated", "dead"):
                if np.isfinite(value := getattr(statistics, key)):
                    pl_module.log(f"attention/{name}/{key}", value, **options)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Publishes histograms, and figures if the last ones are old enough."""
        if self._probe is None:
            return
        self._drawable, self._probe = self._probe, None
        self._publish(trainer, self._drawable, time.monotonic() >= self._quiet_until, histograms=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Publishes the figures of the last look, unless they are published."""
        if self._drawable is not None:
            self._publish(trainer, self._drawable, not self._drawn, histograms=False)
            self._drawable = None

    def _publish(self, trainer: pl.Trainer, probe: _Probe, figures: bool, histograms: bool) -> None:
        """Every process calls it, since that is a collective; what clocks say counts on the first process only."""
        started = time.monotonic()
        publish(trainer, probe.figures() if figures else {}, probe.histograms() if histograms else {})
        self._drawn = figures
        if figures:
            self._quiet_until = started + (time.monotonic() - started) / DRAWING_SHARE

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stops listening where validation broke off."""
        self._listening.close()
        self._probe = None

    def _heat_mapped(self, layers: Mapping[str, AWConv2d]) -> list[str]:
        if self.heat_map_layers is not None:
            return list(choose_layers("heat_map_layers", self.heat_map_layers, layers))
        names = list(layers)
        return [names[k] for k in evenly_spaced(len(names), HEAT_MAP_LAYERS)]


class _Probe:
    """What a validation has shown so far.

    Args:
        layers: Whom to listen to.
        heat_mapped: Names of those of which maps are kept.
        samples: How many pictures are wanted.
        epoch: Stands in the titles.
    """

    def __init__(self, layers: Mapping[str, AWConv2d], heat_mapped: list[str], samples: int, epoch: int) -> None:
        self.layers = layers
        self.wanted = samples
        self.maps: dict[str, Tensor] = {}
        self._heat_mapped = heat_mapped
        self._epoch = epoch
        self._running = {name: RunningStatistics() for name in layers}
        self._pictures: list[Image.Image | None] = []
        self._captions: list[str] = []
        self._heard: set[str] = set()
        self._rows: int | None = None

    def hear(self, name: str, maps: Tensor) -> None:
        """Adds the maps (n, C2, C1 / groups / share, kh, kw) of a batch."""
        if self._rows is None:
            self._rows = len(maps)
        if name in self._heard or len(maps) != self._rows or not self._rows:
            return
        self._heard.add(name)
        maps = maps[: self.wanted].float().cpu()
        self._running[name].add(maps)
        if name in self._heat_mapped:
            shown = self.maps.get(name, maps[:0])
            self.maps[name] = torch.cat([shown, maps[: SHOWN_SAMPLES - len(shown)]])

    def end_batch(self, batch: Any, class_names: Any) -> None:
        """Notes the pictures of the batch whose maps were heard."""
        rows = self._rows or 0
        missing = min(rows, self.wanted, SHOWN_SAMPLES - len(self._pictures))
        if missing:
            pictures, captions = _pictures_of(batch, rows, class_names)
            self._pictures += pictures[:missing]
            self._captions += captions[:missing]
        # where no layer is run nothing will be heard, and compiled code need not wait for it
        self.wanted -= min(rows, self.wanted) if rows else self.wanted
        self._heard, self._rows = set(), None

    def figures(self) -> dict[str, Callable[[], Figure]]:
        """What draws what was heard, by name; nothing where nothing was."""
        figures: dict[str, Callable[[], Figure]] = {}
        if self.statistics:
            figures["attention/layers"] = self._draw_layers
        if self.maps.keys() & self.statistics.keys():
            figures["attention/maps"] = self._draw_maps
        return figures

    def histograms(self) -> dict[str, Callable[[], Any]]:
        """What makes W&B's histograms, by name."""
        return {
            f"attention/{name}/histogram": partial(_wandb_histogram, statistics)
            for name, statistics in self.statistics.items()
        }

    @cached_property
    def statistics(self) -> dict[str, AttentionStatistics]:
        """Of the layers that saw every picture."""
        seen = max(running.samples for running in self._running.values())
        return {name: running.result() for name, running in self._running.items() if seen and running.samples == seen}

    def _draw_layers(self) -> Figure:
        samples = max(statistics.samples for statistics in self.statistics.values())
        layers, pictures = counted(len(self.statistics), "layer"), counted(samples, "validation picture")
        return draw_attention_layers(self.statistics, f"Attention of {layers} on {pictures}, epoch {self._epoch}")

    def _draw_maps(self) -> Figure:
        maps = {name: maps for name, maps in self.maps.items() if name in self.statistics}
        return draw_attention_maps(
            maps,
            {name: self.statistics[name].average for name in maps},
            pictures=self._pictures,
            captions=self._captions,
            title=f"Attention maps of validation pictures, epoch {self._epoch}",
        )


def _pictures_of(batch: Any, rows: int, class_names: Any) -> tuple[list[Image.Image | None], list[str]]:
    """A thumbnail and a caption for each of a batch's pictures, as far as the batch says what they are."""
    parts = list(batch) if isinstance(batch, tuple | list) else [batch]
    images, targets = (*parts, None, None)[:2]
    pictures: list[Image.Image | None] = [None] * rows
    if isinstance(images, Tensor | list | tuple) and len(images) == rows:
        shown = images[:SHOWN_SAMPLES]
        if all(isinstance(image, Tensor) and image.ndim == 3 and image.numel() for image in shown):
            pictures[: len(shown)] = [thumbnail_of(image) for image in shown]
    captions = [f"picture {k + 1}" for k in range(rows)]
    if isinstance(targets, Tensor) and targets.shape == (rows,) and not targets.is_floating_point():
        names = list(class_names) if isinstance(class_names, list | tuple) else []
        labels = targets[:SHOWN_SAMPLES].tolist()
        captions[: len(labels)] = [str(names[k]) if 0 <= k < len(names) else str(k) for k in labels]
    return pictures, captions


def _wandb_histogram(statistics: AttentionStatistics) -> Any:
    import wandb

    edges = np.linspace(0, 1, HISTOGRAM_BINS + 1)
    return wandb.Histogram(np_histogram=(statistics.histogram, edges))


def _layers_of(pl_module: pl.LightningModule) -> dict[str, AWConv2d]:
    return aw_layers(network_of(pl_module)) or aw_layers(pl_module)
