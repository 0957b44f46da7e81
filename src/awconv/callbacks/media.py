"""Where what a run draws while it trains goes: into its folder as PNG, and to Weights & Biases where that is on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from awconv.callbacks.canvas import DPI, one_warning_about_glyphs
from awconv.callbacks.run_files import folder_of
from awconv.files import atomic_write

if TYPE_CHECKING:
    import lightning.pytorch as pl


def publish(
    trainer: pl.Trainer,
    figures: Mapping[str, Callable[[], Figure]],
    wandb_objects: Mapping[str, Callable[[], Any]] | None = None,
) -> None:
    """Shows figures and W&B's own objects, each under a name such as ``val/confusion_matrix``.

    A figure becomes ``media/val_confusion_matrix.png`` in the run's folder (``trainer.log_dir``, or
    ``trainer.default_root_dir``), in the place of the one before: the folder shows the run as it stands, and W&B its
    history. A file appears whole or not at all. Nothing is drawn during the sanity check and with ``fast_dev_run``.

    Every process must call it, since to find the folder is a collective; the first one draws and writes.

    Args:
        trainer: whose run it is.
        figures: by name, what draws them; called on the first process only.
        wandb_objects: by name, what makes objects for W&B (``wandb.Table``, ``wandb.Histogram``, ...); called only
            where a W&B logger is.
    """
    folder = folder_of(trainer)
    if not trainer.is_global_zero or trainer.sanity_checking or getattr(trainer, "fast_dev_run", False):
        return
    runs = [run for logger in trainer.loggers if (run := _wandb_run(logger)) is not None]
    objects: dict[str, Any] = {}
    for name, draw in figures.items():
        pixels = _pixels(draw())
        path = folder / "media" / f"{name.replace('/', '_')}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            Image.fromarray(pixels).save(temporary, "PNG")
        if runs:
            import wandb

            objects[name] = wandb.Image(pixels)
    if runs:
        objects |= {name: make() for name, make in (wandb_objects or {}).items()}
        for run in runs:
            run.log({**objects, "epoch": trainer.current_epoch, "trainer/global_step": trainer.global_step})


def _wandb_run(logger: Any) -> Any:
    from lightning.pytorch.loggers import WandbLogger

    return logger.experiment if isinstance(logger, WandbLogger) else None


def _pixels(figure: Figure) -> np.ndarray:
    """A figure as RGB, uint8 (H, W, 3)."""
    figure.set_dpi(DPI)
    canvas: Any = FigureCanvasAgg(figure)
    with one_warning_about_glyphs():
        canvas.draw()
    pixels: np.ndarray = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    return pixels
