"""The attention of AW layers: collected, measured, drawn, and watched while a network learns."""

from awconv.callbacks.attention.figures import draw_attention, draw_attention_layers, draw_attention_maps
from awconv.callbacks.attention.monitor import AttentionMonitor
from awconv.callbacks.attention.space import attention_distances, draw_attention_neighbours
from awconv.callbacks.attention.statistics import AttentionStatistics, collect_attention, measure_attention

__all__ = [
    "AttentionMonitor",
    "AttentionStatistics",
    "attention_distances",
    "collect_attention",
    "draw_attention",
    "draw_attention_layers",
    "draw_attention_maps",
    "draw_attention_neighbours",
    "measure_attention",
]
