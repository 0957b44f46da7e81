"""What watches a run: callbacks that turn training, testing and predicting into things a person looks at."""

from awconv.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from awconv.callbacks.figures import draw_confusion_matrix, draw_contact_sheet
from awconv.callbacks.report import ClassificationReport

__all__ = ["BestCheckpoint", "ClassificationReport", "LastCheckpoint", "draw_confusion_matrix", "draw_contact_sheet"]
