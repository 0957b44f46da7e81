"""AW-convolution in plain PyTorch: the layer, its functional form, network conversion, and BAM."""

from awconv.layers.aw_conv import AWConv2d
from awconv.layers.bam import BAM
from awconv.layers.convert import convert_to_aw
from awconv.layers.functional import BACKENDS, aw_conv2d, aw_conv2d_with_logits

__all__ = ["BACKENDS", "BAM", "AWConv2d", "aw_conv2d", "aw_conv2d_with_logits", "convert_to_aw"]
