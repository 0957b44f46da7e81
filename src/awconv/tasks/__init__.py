"""LightningModules: a network with its losses, metrics, optimiser and schedule."""

from awconv.tasks.base import BaseTask
from awconv.tasks.classification import ClassificationTask
from awconv.tasks.detection import DetectionTask

__all__ = ["BaseTask", "ClassificationTask", "DetectionTask"]
