"""Classification backbones by name, with activation attention and AW-convolution, and their initial weights."""

from awconv.models.backbone import create_backbone
from awconv.models.cifar_resnet import CIFARResNet
from awconv.models.weights import describe_mismatch, load_initial_weights

__all__ = ["CIFARResNet", "create_backbone", "describe_mismatch", "load_initial_weights"]
