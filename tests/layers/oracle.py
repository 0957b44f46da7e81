"""Oracles of AW-convolution in plain Python and NumPy, written from the definition and from nothing else.

    O[n,c2,y,x] = sum over c1,i,j of  I[n,c1,y+i,x+j] * K[c2,c1,i,j] * (1 + A[n,c2,c1,i,j])
    A = sigmoid(BN(PointConv2(ReLU(BN(PointConv1(adaptive average pool of I))))))

`literal_aw_conv` and `literal_attention` are loops over scalars. `unfolded_aw_conv` is the fast second opinion:
index arrays and one einsum per sample; test_functional.py holds it against the loops before anything relies on it.
"""

import math

import numpy as np
import torch
from torch import nn

BACKENDS = ("grouped", "gemm", "fused")


def pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)


def paddings(padding, kernel, dilation):
    """((top, bottom), (left, right)): `same` puts the odd pixel at the end, as torch says it does."""
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((p, p) for p in pair(padding))


def source(index, size, mode):
    """Which pixel of a row of `size` stands at `index`, which may lie outside; None is a zero."""
    if 0 <= index < size:
        return index
    if mode == "zeros":
        return None
    if mode == "circular":
        return index % size
    if mode == "replicate":
        return 0 if index < 0 else size - 1
    if mode == "reflect":
        return -index if index < 0 else 2 * (size - 1) - index
    raise AssertionError(mode)


def literal_aw_conv(image, weight, attention, bias, stride, padding, dilation, groups, residual, padding_mode="zeros"):
    """One scalar product per sample and output pixel. Attention is (N, C2, C1/groups/share, kh, kw)."""
    samples, _, height, width = image.shape
    out_channels, group_channels, kh, kw = weight.shape
    share = group_channels // attention.shape[2]
    stride, dilation = pair(stride), pair(dilation)
    (top, bottom), (left, right) = paddings(padding, (kh, kw), dilation)
    out_height = (height + top + bottom - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    out_width = (width + left + right - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    pixels, kernel, maps = image.tolist(), weight.tolist(), attention.tolist()
    output = np.zeros((samples, out_channels, out_height, out_width))
    for n in range(samples):
        for c2 in range(out_channels):
            first = (c2 // (out_channels // groups)) * group_channels
            for y in range(out_height):
                for x in range(out_width):
                    total = 0.0 if bias is None else float(bias[c2])
                    for i in range(kh):
                        row = source(y * stride[0] + i * dilation[0] - top, height, padding_mode)
                        if row is None:
                            continue
                        for j in range(kw):
                            column = source(x * stride[1] + j * dilation[1] - left, width, padding_mode)
                            if column is None:
                                continue
                            for c1 in range(group_channels):
                                a = maps[n][c2][c1 // share][i][j]
                                k = kernel[c2][c1][i][j] * ((1.0 + a) if residual else a)
                                total += pixels[n][first + c1][row][column] * k
                    output[n, c2, y, x] = total
    return output


def unfolded_aw_conv(image, weight, attention, bias, stride, padding, dilation, groups, residual, padding_mode="zeros"):
    """The same sum by fancy indexing and one einsum per sample and group."""
    samples = image.shape[0]
    out_channels, group_channels, kh, kw = weight.shape
    (sy, sx), (dy, dx) = pair(stride), pair(dilation)
    vertical, horizontal = paddings(padding, (kh, kw), (dy, dx))
    mode = {"zeros": "constant", "circular": "wrap", "replicate": "edge", "reflect": "reflect"}[padding_mode]
    padded = np.pad(image, ((0, 0), (0, 0), vertical, horizontal), mode=mode)
    out_height = (padded.shape[2] - dy * (kh - 1) - 1) // sy + 1
    out_width = (padded.shape[3] - dx * (kw - 1) - 1) // sx + 1
    rows = np.arange(out_height)[:, None] * sy + np.arange(kh) * dy
    columns = np.arange(out_width)[:, None] * sx + np.arange(kw) * dx
    patches = padded[:, :, rows[:, None, :, None], columns[None, :, None, :]]  # N, C1, H', W', kh, kw
    gate = np.repeat(attention, group_channels // attention.shape[2], axis=2)
    kernels = weight[None] * ((1.0 + gate) if residual else gate)
    output = np.empty((samples, out_channels, out_height, out_width))
    per_group = out_channels // groups
    for n in range(samples):
        for g in range(groups):
            out = slice(g * per_group, (g + 1) * per_group)
            patch = patches[n, g * group_channels : (g + 1) * group_channels]
            output[n, out] = np.einsum("cyxij,ocij->oyx", patch, kernels[n, out])
    if bias is not None:
        output += bias[None, :, None, None]
    return output


def attention_head(layer):
    """The two point convolutions and two normalisations of an AWConv2d, in the order of section 2."""
    convolutions = [m for m in layer.modules() if m is not layer and isinstance(m, nn.Conv2d)]
    norms = [m for m in layer.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(convolutions) == 2, convolutions
    assert len(norms) == 2, norms
    return convolutions[0], norms[0], convolutions[1], norms[1]


def adaptive_average_pool(image, kh, kw):
    samples, channels, height, width = image.shape
    pooled = np.zeros((samples, channels, kh, kw))
    for i in range(kh):
        top, bottom = math.floor(i * height / kh), math.ceil((i + 1) * height / kh)
        for j in range(kw):
            left, right = math.floor(j * width / kw), math.ceil((j + 1) * width / kw)
            pooled[:, :, i, j] = image[:, :, top:bottom, left:right].mean(axis=(2, 3))
    return pooled


def point_conv(image, conv):
    weight = conv.weight.detach().double().numpy()[:, :, 0, 0]
    bias = None if conv.bias is None else conv.bias.tolist()
    out_channels, group_channels = weight.shape
    output = np.zeros((image.shape[0], out_channels, *image.shape[2:]))
    for o in range(out_channels):
        first = (o // (out_channels // conv.groups)) * group_channels
        for c in range(group_channels):
            output[:, o] += weight[o, c] * image[:, first + c]
        if bias is not None:
            output[:, o] += bias[o]
    return output


def batch_norm(image, norm, training):
    output = np.empty_like(image)
    weight, bias = norm.weight.tolist(), norm.bias.tolist()
    for c in range(image.shape[1]):
        if training:
            mean, variance = image[:, c].mean(), image[:, c].var()
        else:
            mean, variance = float(norm.running_mean[c]), float(norm.running_var[c])
        normalised = (image[:, c] - mean) / math.sqrt(variance + norm.eps)
        output[:, c] = normalised * weight[c] + bias[c]
    return output


def literal_attention(layer, image, share):
    """A of section 2 at full size (N, C2, C1/groups, kh, kw), with the layer's present numbers and mode."""
    conv1, norm1, conv2, norm2 = attention_head(layer)
    kh, kw = layer.kernel_size
    a0 = adaptive_average_pool(image, kh, kw)
    a1 = np.maximum(batch_norm(point_conv(a0, conv1), norm1, layer.training), 0.0)
    a2 = 1.0 / (1.0 + np.exp(-batch_norm(point_conv(a1, conv2), norm2, layer.training)))
    groups = layer.in_channels // layer.groups
    maps = np.zeros((image.shape[0], layer.out_channels, groups, kh, kw))
    for c2 in range(layer.out_channels):
        for c1 in range(groups):
            maps[:, c2, c1] = a2[:, c2 * (groups // share) + c1 // share]
    return maps


def randomise(module, seed=0):
    """Give every parameter and every BatchNorm statistic a value of its own, so that nothing is trivially 1/2."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                if m.affine:
                    m.weight.copy_(0.5 + torch.rand(m.weight.shape, generator=generator))
                    m.bias.copy_(0.3 * torch.randn(m.bias.shape, generator=generator))
                m.running_mean.copy_(0.2 * torch.randn(m.running_mean.shape, generator=generator))
                m.running_var.copy_(0.5 + torch.rand(m.running_var.shape, generator=generator))
    return module
