"""BAM (Park et al., BMVC 2018, arXiv 1807.06514): M = sigmoid(Mc + Ms), out = x + x * M, held to what the paper says.

Mc = channel branch: global average pool, C -> C/r, BN, ReLU, C/r -> C
Ms = spatial branch: 1x1 C -> C/r, BN, ReLU, two dilated 3x3 (each BN, ReLU), 1x1 to one map
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracle import randomise
from torch import nn

from awconv.layers import BAM


def bam(channels=16, seed=0, reduction=4, **options):
    torch.manual_seed(seed)
    return randomise(BAM(channels, reduction, **options), seed).double().eval()


def logits(module, x):
    """Mc + Ms, read back from the output of a positive input."""
    return torch.logit(module(x) / x - 1)


def positive(*shape, seed=0):
    return 0.5 + torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def branches(module, x):
    """The weighted layers that ran, told apart by what they saw: the channel branch sees no pixels."""
    seen = []
    hooks = [
        m.register_forward_pre_hook(lambda m, a: seen.append((m, a[0].dim() == 2 or a[0].shape[2:].numel() == 1)))
        for m in module.modules()
        if isinstance(m, nn.Conv2d | nn.Linear | nn.modules.batchnorm._BatchNorm)
    ]
    module(x)
    for hook in hooks:
        hook.remove()
    return [m for m, pooled in seen if pooled], [m for m, pooled in seen if not pooled]


def replay(layers, x):
    """The layers in the order they ran, a ReLU after every normalisation that another convolution follows."""
    for position, layer in enumerate(layers):
        if isinstance(layer, nn.Linear | nn.Conv2d):
            weight = layer.weight if layer.weight.dim() == 4 else layer.weight[:, :, None, None]
            side = weight.shape[-1]
            dilation = getattr(layer, "dilation", (1, 1))[0]
            x = F.conv2d(x, weight, layer.bias, padding=dilation * (side // 2), dilation=dilation)
        else:
            shape = (1, -1, 1, 1)
            scale = layer.weight / (layer.running_var + layer.eps).sqrt()
            x = (x - layer.running_mean.view(shape)) * scale.view(shape) + layer.bias.view(shape)
            if position < len(layers) - 1:
                x = x.clamp(min=0)
    return x


@pytest.mark.parametrize(("channels", "options"), [(16, {}), (32, {"reduction": 16}), (16, {"dilation": 2})])
def test_equals_the_formula(channels, options):
    module = bam(channels, **options)
    x = torch.randn(3, channels, 9, 7, dtype=torch.float64)
    channel, spatial = branches(module, x)
    mc = replay(channel, x.mean((2, 3), keepdim=True))
    ms = replay(spatial, x)
    assert mc.shape == (3, channels, 1, 1)
    assert ms.shape == (3, 1, 9, 7)
    torch.testing.assert_close(module(x), x * (1 + torch.sigmoid(mc + ms)))


@pytest.mark.parametrize(("channels", "reduction", "dilation"), [(64, 16, 4), (256, 16, 4), (48, 8, 2)])
def test_weights_are_the_papers(channels, reduction, dilation):
    """C*C/r twice for the MLP; 1x1, two 3x3 and 1x1 for the map (section 3 of the paper)."""
    module = BAM(channels, reduction=reduction, dilation=dilation)
    hidden = channels // reduction
    expected = 2 * channels * hidden + channels * hidden + 2 * 9 * hidden**2 + hidden
    assert sum(p.numel() for p in module.parameters() if p.dim() > 1) == expected
    dilated = [m for m in module.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert [m.dilation for m in dilated] == [(dilation, dilation)] * 2


def test_resnet50_with_three_bams_has_the_published_parameter_count():
    """25.92 M against 25.56 M: one BAM after each of the first three stages."""
    extra = sum(p.numel() for channels in (256, 512, 1024) for p in BAM(channels).parameters())
    assert abs(extra / 1e6 - 0.36) < 0.01


def test_logit_of_the_gate_is_a_channel_part_plus_a_spatial_part():
    values = logits(bam(), positive(2, 16, 7, 6))
    mixed = values - values[:, :1] - values[:, :, :1, :1] + values[:, :1, :1, :1]
    torch.testing.assert_close(mixed, torch.zeros_like(mixed), rtol=0, atol=1e-9)
    assert (values - values[:, :1]).abs().max() > 1e-3
    assert (values - values[:, :, :1, :1]).abs().max() > 1e-3


def test_channel_part_sees_only_channel_means():
    module, x = bam(), positive(2, 16, 6, 6)
    shuffled = x.flatten(2)[..., torch.randperm(36, generator=torch.Generator().manual_seed(1))].view_as(x)
    before, after = logits(module, x), logits(module, shuffled)
    torch.testing.assert_close((before - before[:, :1])[..., 0, 0], (after - after[:, :1])[..., 0, 0])
    moved = x.clone()
    moved[:, 3] += 1.0
    assert ((before - before[:, :1]) - (logits(module, moved) - logits(module, moved)[:, :1])).abs().max() > 1e-6


@pytest.mark.parametrize("dilation", [1, 2, 4])
def test_spatial_part_reaches_two_dilated_steps(dilation):
    """Two 3x3 convolutions of dilation d see the offsets -2d, -d, 0, d, 2d, and nothing between or beyond."""
    module = bam(dilation=dilation)
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            nn.init.constant_(m.bias, 5.0)  # no ReLU is silent, so whatever is connected has a gradient
    side = 4 * dilation + 5
    centre, other = (side // 2, side // 2), (side // 2, side // 2 + 1)
    x = positive(1, 16, side, side).requires_grad_()
    values = logits(module, x)
    (gradient,) = torch.autograd.grad(values[0, 0][centre] - values[0, 0][other], x)
    touched = {tuple(p) for p in gradient[0].abs().sum(0).gt(1e-12).nonzero().tolist()}
    steps = [k * dilation for k in range(-2, 3)]
    allowed = {(y + a, z + b) for y, z in (centre, other) for a in steps for b in steps}
    assert touched <= allowed
    for corner in ((-2, -2), (2, 2), (0, 2), (2, -2)):
        assert (centre[0] + corner[0] * dilation, centre[1] + corner[1] * dilation) in touched


def test_gate_lies_between_one_and_two():
    module, x = bam(), positive(4, 16, 5, 5)
    factor = module(x) / x
    assert factor.min() > 1
    assert factor.max() < 2
    assert factor.std() > 1e-3


def test_silent_branches_give_one_and_a_half():
    module = BAM(16).double().eval()
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(2, 16, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(module(x), 1.5 * x, rtol=1e-15, atol=0)


def test_samples_do_not_mix_in_eval_mode():
    module, x = bam(), torch.randn(4, 16, 6, 6, dtype=torch.float64)
    whole = module(x)
    torch.testing.assert_close(module(x[2:3]), whole[2:3])
    changed = x.clone()
    changed[1] = 7.0
    torch.testing.assert_close(module(changed)[[0, 2, 3]], whole[[0, 2, 3]])


def test_gradients_reach_every_parameter():
    module = bam().train()
    x = torch.randn(3, 16, 5, 5, dtype=torch.float64, requires_grad=True)
    # squares, because the mean over the batch is what the last normalisation removes
    module(x).square().sum().backward()
    assert x.grad.abs().sum() > 0
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert all(p.grad.abs().max() > 0 for p in module.parameters() if p.dim() > 1)
    small = bam(4, reduction=2, dilation=1)
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(small, x)


@pytest.mark.parametrize("samples", [0, 1, 3])
def test_shapes_and_dtypes(samples):
    module = BAM(32).eval()
    for shape in ((samples, 32, 1, 1), (samples, 32, 8, 5)):
        assert module(torch.randn(shape)).shape == shape
    assert module.double()(torch.randn(samples, 32, 4, 4).double()).dtype == torch.float64


def test_copies_and_state_dict_round_trip():
    module, x = bam(), torch.randn(2, 16, 5, 5, dtype=torch.float64)
    other = bam(seed=5)
    assert not torch.equal(module(x), other(x))
    other.load_state_dict(module.state_dict())
    assert torch.equal(module(x), other(x))
    assert torch.equal(module(x), copy.deepcopy(module)(x))


def test_channels_last_is_kept():
    x = torch.randn(2, 16, 6, 5).contiguous(memory_format=torch.channels_last)
    module = randomise(BAM(16)).eval()
    output = module(x)
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, module(x.contiguous()))


@pytest.mark.parametrize(("arguments", "name"), [((0,), "channels"), ((16, 0), "reduction"), ((16, 4, 0), "dilation")])
def test_impossible_options_are_refused(arguments, name):
    with pytest.raises(ValueError, match=name) as error:
        BAM(*arguments)
    assert "\n" not in str(error.value)
