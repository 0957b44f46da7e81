"""Data modules: pictures and labels on their way to a network."""

from awconv.data.base import BaseDataModule
from awconv.data.cifar import CIFAR10DataModule, CIFAR100DataModule
from awconv.data.classification import ClassificationDataModule
from awconv.data.detection import COCODataModule
from awconv.data.digit_scenes import DigitScenesDataModule
from awconv.data.digits import DigitsDataModule
from awconv.data.imagenet import ImageNetDataModule
from awconv.data.loading import IGNORE_INDEX

__all__ = [
    "IGNORE_INDEX",
    "BaseDataModule",
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "COCODataModule",
    "ClassificationDataModule",
    "DigitScenesDataModule",
    "DigitsDataModule",
    "ImageNetDataModule",
]
