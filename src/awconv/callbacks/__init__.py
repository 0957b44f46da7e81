"""What watches a run: callbacks that turn training, testing and predicting into things a person looks at."""

from awconv.callbacks.attention import (
    AttentionMonitor,
    AttentionStatistics,
    attention_distances,
    collect_attention,
    draw_attention,
    draw_attention_layers,
    draw_attention_maps,
    draw_attention_neighbours,
    measure_attention,
)
from awconv.callbacks.checkpoints import BestCheckpoint, CheckpointFiles, LastCheckpoint, Preempted
from awconv.callbacks.classification_figures import draw_confusion_matrix, draw_contact_sheet
from awconv.callbacks.classification_report import ClassificationReport
from awconv.callbacks.detection_figures import (
    SheetPicture,
    draw_detection_sheet,
    draw_detections,
    draw_precision_recall,
)
from awconv.callbacks.detection_report import DetectionReport
from awconv.callbacks.metrics_file import MetricsFile
from awconv.callbacks.network_summary import NetworkSummary
from awconv.callbacks.training_monitor import TrainingMonitor
from awconv.callbacks.validation_media import ClassificationMedia, DetectionMedia
from awconv.callbacks.wandb_run import WandbRun

__all__ = [
    "AttentionMonitor",
    "AttentionStatistics",
    "BestCheckpoint",
    "CheckpointFiles",
    "ClassificationMedia",
    "ClassificationReport",
    "DetectionMedia",
    "DetectionReport",
    "LastCheckpoint",
    "MetricsFile",
    "NetworkSummary",
    "Preempted",
    "SheetPicture",
    "TrainingMonitor",
    "WandbRun",
    "attention_distances",
    "collect_attention",
    "draw_attention",
    "draw_attention_layers",
    "draw_attention_maps",
    "draw_attention_neighbours",
    "draw_confusion_matrix",
    "draw_contact_sheet",
    "draw_detection_sheet",
    "draw_detections",
    "draw_precision_recall",
    "measure_attention",
]
