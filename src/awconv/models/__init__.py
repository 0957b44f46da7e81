"""Backbones and detectors by name, with activation attention and AW-convolution, and their initial weights."""

from awconv.models.backbone import create_backbone
from awconv.models.cifar_resnet import CIFARResNet
from awconv.models.detector import create_detector
from awconv.models.weights import WeightsReport, describe_mismatch, load_initial_weights

__all__ = [
    "CIFARResNet",
    "WeightsReport",
    "create_backbone",
    "create_detector",
    "describe_mismatch",
    "load_initial_weights",
]
