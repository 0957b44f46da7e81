"""`AWConv2d` against the literal F1 and F2 of DESIGN section 2, and as the nn.Conv2d it promises to be."""

import copy
import io
import itertools
import math
import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import (
    BACKENDS,
    attention_head,
    literal_attention,
    literal_aw_conv,
    randomise,
    unfolded_aw_conv,
)
from torch import nn

from awconv.layers import AWConv2d
from awconv.layers.aw_conv import _exportable_pool

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def make(*arguments, seed=0, **options):
    """A float64 layer whose every number is its own; in eval mode."""
    torch.manual_seed(seed)
    return randomise(AWConv2d(*arguments, **options), seed).double().eval()


def images(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def used_share(layer):
    """How many input channels one value serves, read from the size of the head's last convolution."""
    maps = attention_head(layer)[2].out_channels
    return layer.out_channels * (layer.in_channels // layer.groups) // maps


def expected_output(layer, x, share, residual, function=unfolded_aw_conv):
    full = literal_attention(layer, x.numpy(), share)
    weight, bias = (None if v is None else v.detach().numpy() for v in (layer.weight, layer.bias))
    return function(
        x.numpy(),
        weight,
        full,
        bias,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        residual,
        layer.padding_mode,
    )


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


def plain_twin(layer):
    """The nn.Conv2d with the layer's arguments, kernel and bias."""
    conv = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        layer.bias is not None,
        layer.padding_mode,
    ).to(layer.weight)
    conv.load_state_dict({k: v for k, v in layer.state_dict().items() if k in ("weight", "bias")})
    return conv


# ---------------------------------------------------------------------------------------------- F1, the attention


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kernel", [1, 3, (3, 2), (2, 5)])
@pytest.mark.parametrize("size", [(7, 5), (8, 8), (2, 2)])
def test_attention_is_the_formula(kernel, size, training):
    """Also with fewer pixels than the kernel has, where the bins of the pool overlap."""
    for (groups, share), head_groups in itertools.product([(1, 1), (1, 4), (2, 2), (8, 1)], [1, 2, 4]):
        layer = make(8, 16, kernel, groups=groups, share=share, head_groups=head_groups, padding=4)
        layer.train(training)
        x = images(3, 8, *size)
        expected = literal_attention(layer, x.numpy(), share)
        got = layer.attention_maps(x)
        assert got.shape == (3, 16, 8 // groups, *layer.kernel_size)
        np.testing.assert_allclose(got.detach().numpy(), expected, rtol=1e-9, atol=1e-11)
        assert got.std() > 1e-3


@pytest.mark.parametrize(
    ("channels", "reduction", "hidden"), [(64, 16, 4), (256, 16, 16), (8, 16, 4), (200, 3, 66), (16, 2, 8), (6, 1, 6)]
)
def test_hidden_width(channels, reduction, hidden):
    """From all input channels, however many groups the convolution has."""
    for groups in (1, 2):
        conv1, norm1, conv2, norm2 = attention_head(AWConv2d(channels, 8, 3, groups=groups, reduction=reduction))
        assert (conv1.in_channels, conv1.out_channels, norm1.num_features) == (channels, hidden, hidden)
        assert conv2.in_channels == hidden
        assert conv2.out_channels == norm2.num_features
        assert conv1.kernel_size == conv2.kernel_size == (1, 1)


@pytest.mark.parametrize(
    ("channels", "groups", "share"),
    [
        (64, 1, 16),
        (16, 1, 16),
        (8, 1, 8),
        (24, 1, 12),
        (34, 1, 2),
        (17, 1, 1),
        (64, 32, 2),
        (60, 2, 15),
        (8, 8, 1),
        (45, 1, 15),
    ],
)
def test_default_share_is_the_largest_divisor_up_to_16(channels, groups, share):
    layer = AWConv2d(channels, groups * 2, 3, groups=groups)
    assert used_share(layer) == share
    assert used_share(AWConv2d(channels, groups * 2, 3, groups=groups, share=1)) == 1


def test_shared_channels_see_equal_values_and_neighbours_do_not():
    maps = make(12, 4, 3, share=3).attention_maps(images(2, 12, 6, 6))
    blocks = maps.unflatten(2, (4, 3))
    assert torch.equal(blocks, blocks[:, :, :, :1].expand_as(blocks))
    assert (blocks[:, :, 1:, 0] - blocks[:, :, :-1, 0]).abs().max() > 1e-4


@pytest.mark.parametrize("kernel", [1, 3, (5, 2)])
@pytest.mark.parametrize("residual", [True, False])
def test_zero_init_starts_as_a_scaled_convolution(kernel, residual):
    torch.manual_seed(0)
    layer = AWConv2d(32, 8, kernel, padding=1, residual=residual).double()
    x = images(3, 32, 7, 6)
    factor = 1.5 if residual else 0.5
    for training in (False, True):
        layer.train(training)
        maps = layer.attention_maps(x)
        assert torch.equal(maps, torch.full_like(maps, 0.5))
        twin = plain_twin(layer)
        with torch.no_grad():
            twin.weight.mul_(factor)
        torch.testing.assert_close(layer(x), twin(x), rtol=1e-12, atol=1e-12)


def test_zero_init_can_learn_and_the_usual_init_does_not_start_constant():
    layer = AWConv2d(8, 8, 3, padding=1)
    layer(images(4, 8, 6, 6, dtype=torch.float32)).square().sum().backward()
    norm2 = attention_head(layer)[3]
    assert norm2.weight.grad.abs().max() > 0
    assert norm2.bias.grad.abs().max() > 0
    usual = AWConv2d(8, 8, 3, padding=1, zero_init=False)
    assert usual.attention_maps(images(4, 8, 6, 6, dtype=torch.float32)).std() > 1e-3


# ---------------------------------------------------------------------------------------------- F2, the convolution


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("padding", [0, 1, (1, 2), "same", "valid"])
def test_output_is_the_literal_sum(padding, padding_mode):
    geometries = [(3, 1, 1), ((2, 3), 1, (2, 1)), (1, 1, 1)]
    geometries += [] if padding == "same" else [(3, 2, 1), ((3, 2), (1, 2), 2)]
    for (kernel, stride, dilation), (groups, share, head_groups) in itertools.product(
        geometries, [(1, None, 1), (1, 2, 2), (2, 1, 4), (4, 1, 1)]
    ):
        for training, residual, bias in [(False, True, True), (True, False, False), (True, True, True)]:
            layer = make(
                4, 8, kernel, stride, padding, dilation, groups, bias, padding_mode,
                share=share, head_groups=head_groups, residual=residual,
            ).train(training)  # fmt: skip
            x = images(2, 4, 7, 6)
            expected = expected_output(layer, x, share or 4 // groups, residual)
            for backend in (*BACKENDS, "auto"):
                layer.backend = backend
                got = layer(x).detach().numpy()
                np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9, err_msg=f"{layer} {training=}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding_mode", PADDING_MODES)
def test_output_is_the_fully_literal_sum(padding_mode, backend):
    """The six nested loops themselves, attention and all."""
    layer = make(4, 6, (3, 2), 1, "same", (1, 2), 2, padding_mode=padding_mode, share=2, backend=backend)
    x = images(2, 4, 5, 5)
    expected = expected_output(layer, x, 2, True, literal_aw_conv)
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-10, atol=1e-10)


@st.composite
def layers(draw):
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    group_channels = draw(st.integers(1, 6))
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    padding = (draw(st.integers(0, 2)), draw(st.integers(0, 2)))
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    # reflection needs more pixels than it adds
    size = tuple(max(n - 2 * p, p + 1) + draw(st.integers(0, 4)) for n, p in zip(reach, padding, strict=True))
    return {
        "arguments": (
            groups * group_channels,
            groups * draw(st.integers(1, 3)),
            kernel,
            (draw(st.integers(1, 2)), draw(st.integers(1, 2))),
            padding,
            dilation,
            groups,
            draw(st.booleans()),
            draw(st.sampled_from(PADDING_MODES)),
        ),
        "share": draw(st.sampled_from([d for d in range(1, group_channels + 1) if group_channels % d == 0])),
        "residual": draw(st.booleans()),
        "reduction": draw(st.integers(1, 4)),
        "training": draw(st.booleans()),
        "batch": draw(st.integers(1, 3)),
        "size": size,
        "seed": draw(st.integers(0, 1000)),
    }


@given(drawn=layers())
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_drawn_layers(drawn):
    options = {k: drawn[k] for k in ("share", "residual", "reduction")}
    layer = make(*drawn["arguments"], **options, seed=drawn["seed"])
    positions = math.prod(layer.kernel_size)
    # BatchNorm cannot train on a single value per channel, here as anywhere
    layer.train(drawn["training"] and drawn["batch"] * positions > 1)
    x = images(drawn["batch"], layer.in_channels, *drawn["size"], seed=drawn["seed"])
    expected = expected_output(layer, x, drawn["share"], drawn["residual"])
    for backend in BACKENDS:
        layer.backend = backend
        got = layer(x)
        assert got.shape == plain_twin(layer)(x).shape
        np.testing.assert_allclose(got.detach().numpy(), expected, rtol=1e-7, atol=1e-8, err_msg=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_do_not_mix_in_eval_mode(backend):
    layer = make(8, 8, 3, padding=1, share=4, backend=backend)
    x = images(5, 8, 7, 7)
    whole = layer(x)
    changed = x.clone()
    changed[2] = images(8, 7, 7, seed=9)
    after = layer(changed)
    torch.testing.assert_close(after[[0, 1, 3, 4]], whole[[0, 1, 3, 4]], rtol=1e-12, atol=1e-12)
    assert (after[2] - whole[2]).abs().max() > 1e-2
    torch.testing.assert_close(layer(x[3:4]), whole[3:4], rtol=1e-12, atol=1e-12)
    sample = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(layer(sample)[1].square().sum(), sample)
    assert gradient[[0, 2, 3, 4]].abs().max() == 0


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_the_batch_permutes_the_output(backend, training):
    layer = make(8, 8, 3, padding=1, share=4, backend=backend).train(training)
    x, order = images(5, 8, 7, 7), torch.tensor([4, 2, 0, 1, 3])
    torch.testing.assert_close(layer(x[order]), layer(x)[order], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_through_the_whole_layer(backend, training):
    layer = make(4, 4, (2, 3), 2, 1, 1, 2, share=2, backend=backend).train(training)
    names = [n for n, _ in layer.named_parameters()]
    buffers = {k: v.clone() for k, v in layer.named_buffers()}

    def function(x, *parameters):
        values = dict(zip(names, parameters, strict=True)) | {k: v.clone() for k, v in buffers.items()}
        return torch.func.functional_call(layer, values, (x,))

    x = images(2, 4, 5, 4).requires_grad_()
    parameters = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(function, (x, *parameters))


def test_backends_agree_in_output_and_gradients():
    x = images(3, 32, 9, 7, dtype=torch.float32)
    results = {}
    for backend in (*BACKENDS, "auto"):
        torch.manual_seed(0)
        layer = randomise(AWConv2d(32, 16, 3, 2, 1, backend=backend))
        image = x.clone().requires_grad_()
        output = layer(image)
        output.square().mean().backward()
        results[backend] = [output.detach(), image.grad, *(p.grad for p in layer.parameters())]
    for backend in BACKENDS:
        for a, b in zip(results[backend], results["auto"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------- corners


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("padding_mode", PADDING_MODES)
def test_empty_batch(padding_mode, backend, training):
    layer = make(4, 8, 3, 2, 1, groups=2, padding_mode=padding_mode, backend=backend).train(training)
    x = torch.zeros(0, 4, 7, 7, dtype=torch.float64, requires_grad=True)
    output = layer(x)
    assert output.shape == (0, 8, 4, 4)
    assert layer.attention_maps(x).shape == (0, 8, 2, 3, 3)
    output.sum().backward()
    assert x.grad.shape == x.shape
    assert all(torch.isfinite(b).all() for b in layer.buffers())
    assert all(p.grad is None or torch.count_nonzero(p.grad) == 0 for p in layer.parameters())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_of_one(backend, training):
    """In training the statistics are those of the kh * kw positions of the one sample."""
    layer = make(8, 4, 3, padding=1, share=2, backend=backend).train(training)
    x = images(1, 8, 6, 6)
    expected = expected_output(layer, x, 2, True)
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_unbatched_image_is_a_batch_of_one(backend, padding_mode, training):
    layer = make(4, 6, 3, padding=1, padding_mode=padding_mode, backend=backend).train(training)
    x = images(1, 4, 6, 5)
    with torch.no_grad():
        alone, batched = copy.deepcopy(layer)(x[0]), layer(x)
    assert alone.shape == (6, 6, 5)
    torch.testing.assert_close(alone, batched[0], rtol=1e-12, atol=1e-12)


def test_one_forward_updates_the_statistics_once():
    layer = make(8, 8, 3, padding=1).train()
    x = images(4, 8, 6, 6)
    conv1, norm1, _, norm2 = attention_head(layer)
    before = norm1.running_mean.clone()
    pooled = torch.nn.functional.adaptive_avg_pool2d(x, 3)
    batch_mean = conv1(pooled).mean((0, 2, 3))
    layer(x)
    assert norm1.num_batches_tracked == norm2.num_batches_tracked == 1
    expected = (1 - norm1.momentum) * before + norm1.momentum * batch_mean
    torch.testing.assert_close(norm1.running_mean, expected)
    layer.eval()(x)
    assert norm1.num_batches_tracked == 1


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("groups", [1, 16])
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_memory_format_is_what_a_plain_convolution_gives(padding_mode, groups, backend):
    torch.manual_seed(0)
    layer = randomise(AWConv2d(16, 32, 3, padding=1, groups=groups, padding_mode=padding_mode, backend=backend))
    layer.eval()
    x = images(2, 16, 9, 7, dtype=torch.float32)
    reference = layer(x)
    for fmt in (torch.contiguous_format, torch.channels_last):
        for kernel_too in (False, True):
            module = copy.deepcopy(layer).to(memory_format=fmt if kernel_too else torch.contiguous_format)
            image = x.contiguous(memory_format=fmt)
            output = module(image)
            torch.testing.assert_close(output, reference, rtol=1e-4, atol=1e-5)
            assert output.is_contiguous(memory_format=fmt) == plain_twin(module)(image).is_contiguous(memory_format=fmt)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_images(backend):
    layer = make(4, 4, 3, padding=1, backend=backend)
    x = images(2, 4, 6, 5)
    expected = layer(x)
    for view in (x.transpose(1, 3).contiguous().transpose(1, 3), x.repeat_interleave(2, 2)[:, :, ::2]):
        assert not view.is_contiguous()
        torch.testing.assert_close(layer(view), expected, rtol=1e-12, atol=1e-12)
    expanded = x[:1].expand(3, -1, -1, -1)
    torch.testing.assert_close(layer(expanded), layer(expanded.contiguous()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_autocast(backend, training):
    layer = make(32, 16, 3, padding=1, backend=backend).float().train(training)
    x = images(4, 32, 8, 8, dtype=torch.float32)
    expected = layer(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
        plain = plain_twin(layer)(x)
    assert output.dtype == plain.dtype == torch.bfloat16
    assert (output.float() - expected).norm() / expected.norm() < 3e-2
    output.float().square().mean().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None, name
        assert p.grad.dtype == torch.float32, name
        assert torch.isfinite(p.grad).all(), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    reference = make(16, 8, 3, padding=1)
    x = images(2, 16, 6, 6)
    got = copy.deepcopy(reference).to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    expected = reference(x)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    assert (got.double() - expected).norm() / expected.norm() < tolerance


# ---------------------------------------------------------------------------------------------- a drop-in nn.Conv2d


def test_is_a_conv2d_with_its_names_and_shapes():
    for arguments in [(8, 16, 3), (8, 16, (3, 5), 2, 1, 1, 4, False), (8, 8, 3, 1, "same", 2, 8, True, "reflect")]:
        layer, conv = AWConv2d(*arguments), nn.Conv2d(*arguments)
        assert isinstance(layer, nn.Conv2d)
        own = dict(layer.named_parameters())
        assert all(own[name].shape == p.shape for name, p in conv.named_parameters())
        assert ("bias" in own) == (conv.bias is not None)
        for name in ("stride", "padding", "dilation", "groups", "padding_mode", "kernel_size", "in_channels"):
            assert getattr(layer, name) == getattr(conv, name)


def test_takes_conv2ds_arguments_by_keyword():
    options = {"stride": 2, "padding": 1, "dilation": 2, "groups": 2, "bias": False, "padding_mode": "circular"}
    layer = AWConv2d(in_channels=8, out_channels=4, kernel_size=3, **options)
    assert layer(torch.randn(2, 8, 9, 9)).shape == nn.Conv2d(8, 4, 3, **options)(torch.randn(2, 8, 9, 9)).shape


def test_options_of_its_own_are_keyword_only():
    with pytest.raises(TypeError):
        AWConv2d(8, 8, 3, 1, 1, 1, 1, True, "zeros", 16)


def test_refuses_what_conv2d_refuses():
    for arguments in [
        {"groups": 3},
        {"padding": "full"},
        {"padding": "same", "stride": 2},
        {"padding_mode": "mirror"},
        {"groups": 0},
    ]:
        with pytest.raises(ValueError):  # noqa: PT011 - torch's own message
            nn.Conv2d(8, 8, 3, **arguments)
        with pytest.raises(ValueError):  # noqa: PT011
            AWConv2d(8, 8, 3, **arguments)


@pytest.mark.parametrize("bias", [True, False])
def test_plain_checkpoint_loads_and_only_attention_is_missing(bias):
    conv, layer = nn.Conv2d(16, 8, 3, bias=bias), AWConv2d(16, 8, 3, bias=bias)
    report = layer.load_state_dict(conv.state_dict(), strict=False)
    assert report.unexpected_keys == []
    assert report.missing_keys
    assert not {"weight", "bias"} & set(report.missing_keys)
    assert len({key.split(".")[0] for key in report.missing_keys}) == 1
    assert torch.equal(layer.weight, conv.weight)
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict(conv.state_dict())


def test_state_dict_round_trip():
    layer, other = make(16, 8, 3, share=4, seed=1), make(16, 8, 3, share=4, seed=2)
    x = images(2, 16, 6, 6)
    assert not torch.equal(layer(x), other(x))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_copies_are_equal_and_independent(backend):
    layer = make(16, 8, 3, share=4, head_groups=2, residual=False, backend=backend)
    x = images(2, 16, 6, 6)
    expected = layer(x)
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(clone(x), expected)
        assert repr(clone) == repr(layer)
        with torch.no_grad():
            for p in clone.parameters():
                p.add_(1.0)
        assert torch.equal(layer(x), expected)


def test_repr_shows_the_options():
    layer = AWConv2d(32, 16, 3, padding=1, reduction=8, share=4, head_groups=2, residual=False, backend="gemm")
    text = layer.extra_repr()
    for part in ("32, 16", "kernel_size=(3, 3)", "padding=(1, 1)", "reduction=8", "share=4", "head_groups=2"):
        assert part in text
    assert "residual=False" in text
    assert "gemm" in text
    default = AWConv2d(32, 16, 3).extra_repr()
    assert "share=16" in default
    assert "head_groups" not in default


def test_numbers_follow_the_seed():
    torch.manual_seed(3)
    first = AWConv2d(8, 8, 3, zero_init=False)
    torch.manual_seed(3)
    second = AWConv2d(8, 8, 3, zero_init=False)
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_device_and_dtype_reach_every_part():
    for layer in (
        AWConv2d(8, 8, 3).to("meta", torch.float64),
        AWConv2d(8, 8, 3, device="meta", dtype=torch.float64),
    ):
        state = layer.state_dict()
        assert all(v.device.type == "meta" for v in state.values())
        assert all(v.dtype == torch.float64 for v in state.values() if v.is_floating_point())


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(("channels", "groups", "share"), [(12, 1, 8), (16, 4, 16), (8, 8, 2), (8, 1, 0), (8, 1, -2)])
def test_share_that_does_not_divide(channels, groups, share):
    with pytest.raises(ValueError, match="share") as error:
        AWConv2d(channels, 16, 3, groups=groups, share=share)
    message = one_line(error)
    assert str(share) in message
    assert str(channels // groups) in message


@pytest.mark.parametrize("head_groups", [3, 5, 0, -1])
def test_head_groups_that_do_not_divide(head_groups):
    with pytest.raises(ValueError, match="head_groups") as error:
        AWConv2d(64, 16, 3, head_groups=head_groups)
    assert str(head_groups) in one_line(error)


def test_head_groups_must_divide_the_maps_too():
    """hidden = 4 is divisible by 4, but the single output map is not."""
    with pytest.raises(ValueError, match="head_groups") as error:
        AWConv2d(16, 1, 3, share=16, head_groups=4)
    assert "4" in one_line(error)


@pytest.mark.parametrize("reduction", [0, -4])
def test_impossible_reduction(reduction):
    with pytest.raises(ValueError, match="reduction") as error:
        AWConv2d(16, 16, 3, reduction=reduction)
    assert str(reduction) in one_line(error)


@pytest.mark.parametrize("backend", ["gem", "", "Grouped"])
def test_unknown_backend_lists_the_choices(backend):
    with pytest.raises(ValueError, match="backend") as error:
        AWConv2d(16, 16, 3, backend=backend)
    message = one_line(error)
    assert all(name in message for name in (repr(backend), "auto", "grouped", "gemm"))


def test_wrong_images_are_refused():
    layer = AWConv2d(4, 8, 3)
    for shape in [(2, 3, 8, 8), (4, 8), (1, 2, 4, 8, 8), (2, 4, 2, 2)]:
        with pytest.raises((ValueError, RuntimeError)):
            layer(torch.randn(shape))
    with pytest.raises((ValueError, RuntimeError)):
        layer.attention_maps(torch.randn(2, 3, 8, 8))


# ---------------------------------------------------------------------------------------------- compile and export


def small_network(backend):
    torch.manual_seed(0)
    return randomise(
        nn.Sequential(
            AWConv2d(3, 16, 3, 2, 1, backend=backend),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            AWConv2d(16, 16, 3, padding="same", groups=4, share=2, padding_mode="reflect", backend=backend),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_compiles_without_graph_breaks(backend, training):
    torch.compiler.reset()  # what was compiled for other backends and modes counts towards a limit
    network = small_network(backend).train(training)
    reference = copy.deepcopy(network)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    for samples in (2, 5):
        x = images(samples, 3, 12, 10, dtype=torch.float32)
        expected, got = reference(x), compiled(x)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        for model, output in ((reference, expected), (network, got)):
            model.zero_grad()
            output.square().sum().backward()
        for a, b in zip(network.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_compiles_with_inductor():
    network = small_network("gemm").eval()
    x = images(3, 3, 12, 10, dtype=torch.float32)
    torch.testing.assert_close(torch.compile(network, fullgraph=True)(x), network(x), rtol=1e-4, atol=1e-5)


def test_exports_with_a_dynamic_batch():
    network = small_network("gemm").eval()
    example = images(2, 3, 12, 10, dtype=torch.float32)
    program = torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    for samples in (1, 2, 3, 8):
        x = images(samples, 3, 12, 10, dtype=torch.float32)
        torch.testing.assert_close(program.module()(x), network(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "grouped"])
def test_exports_with_a_fixed_batch(backend):
    network = small_network(backend).eval()
    x = images(2, 3, 12, 10, dtype=torch.float32)
    program = torch.export.export(network, (x,))
    torch.testing.assert_close(program.module()(x), network(x), rtol=1e-4, atol=1e-5)


def dynamic_program(module, example):
    """Exports with a dynamic batch, height and width."""
    any_pixels = torch.export.Dim.DYNAMIC
    shapes = {0: torch.export.Dim("batch", min=1), 2: any_pixels, 3: any_pixels}
    return torch.export.export(module, (example,), dynamic_shapes=(shapes,))


@pytest.mark.parametrize("cells", [(3, 3), (5, 2), (1, 7), (7, 1)], ids=str)
def test_pool_that_is_exported_is_the_adaptive_pool(cells):
    """Also where there are fewer pixels than cells."""
    for height, width in [(n, m) for n in (1, 2, 3, 4, 5, 7, 8, 19, 56) for m in (1, 2, 3, 6, 11, 32)]:
        x = images(2, 3, height, width)
        expected = torch.nn.functional.adaptive_avg_pool2d(x, cells)
        torch.testing.assert_close(_exportable_pool(x, cells), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cells", [(3, 3), (5, 2)], ids=str)
def test_exported_pool_takes_any_size(cells):
    class Pool(nn.Module):
        def forward(self, x):
            return _exportable_pool(x, cells)

    program = dynamic_program(Pool(), images(2, 3, 9, 8)).module()
    for height, width in [(9, 8), (2, 2), (3, 2), (4, 5), (31, 17)]:
        x = images(3, 3, height, width)
        expected = torch.nn.functional.adaptive_avg_pool2d(x, cells)
        torch.testing.assert_close(program(x), expected, rtol=1e-12, atol=1e-12)


def test_exports_with_dynamic_sizes():
    """In float64, where a mistake is larger than rounding."""
    network = small_network("auto").eval().double()
    program = dynamic_program(network, images(2, 3, 12, 10)).module()
    for samples, height, width in [(1, 12, 10), (3, 5, 7), (8, 40, 6), (2, 33, 64)]:
        x = images(samples, 3, height, width)
        torch.testing.assert_close(program(x), network(x), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_onnx_with_a_dynamic_batch(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    network = small_network("gemm").eval()
    example = images(2, 3, 12, 10, dtype=torch.float32)
    path = tmp_path / "network.onnx"
    program = torch.onnx.export(
        network, (example,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), verbose=False
    )
    program.save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    for samples in (1, 3, 8):
        x = images(samples, 3, 12, 10, dtype=torch.float32)
        (got,) = session.run(None, {name: x.numpy()})
        np.testing.assert_allclose(got, network(x).detach().numpy(), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------- corner cases


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(2, 4, 9, 7), (4, 9, 7)], ids=["batch", "image"])
def test_meta_device_gives_the_shape(backend, size):
    """Autocast does not know the device, which is no reason to fail."""
    layer = AWConv2d(4, 6, 3, stride=2, backend=backend, device="meta")
    output = layer(torch.empty(size, device="meta"))
    assert output.device.type == "meta"
    assert output.shape == torch.nn.Conv2d(4, 6, 3, stride=2)(torch.empty(size)).shape


def test_hooks_run_once_for_an_unbatched_image():
    layer, shapes = AWConv2d(4, 6, 3), []
    layer.register_forward_hook(lambda module, inputs, output: shapes.append((inputs[0].shape, output.shape)))
    layer(torch.randn(4, 5, 5))
    assert shapes == [((4, 5, 5), (6, 3, 3))]


@pytest.mark.parametrize("argument", ["reduction", "share", "head_groups"])
@pytest.mark.parametrize("value", [2.5, 2.0, "2", True])
def test_options_that_are_no_integers(argument, value):
    with pytest.raises(ValueError, match=rf"^{argument}={re.escape(repr(value))} must be an integer"):
        AWConv2d(8, 8, 3, **{argument: value})


def test_integers_of_numpy_are_integers():
    layer = AWConv2d(16, 16, 3, reduction=np.int64(2), share=np.int64(4), head_groups=np.int64(2))
    assert layer.attention_maps(torch.randn(2, 16, 5, 5)).shape == (2, 16, 16, 3, 3)


def test_1x1_kernel_needs_two_samples_in_training_only():
    layer = AWConv2d(8, 8, 1)
    assert layer(torch.randn(2, 8, 4, 4)).shape == (2, 8, 4, 4)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.randn(1, 8, 4, 4))
    assert layer.eval()(torch.randn(1, 8, 4, 4)).shape == (1, 8, 4, 4)


@pytest.mark.parametrize("residual", [True, False])
def test_preserve_function_of_a_layer_whose_normalisation_was_replaced(residual):
    layer = nn.SyncBatchNorm.convert_sync_batchnorm(make(4, 6, 3, residual=residual))
    assert isinstance(layer.attention.norm2, nn.SyncBatchNorm)
    x = images(2, 4, 6, 6)
    expected = nn.functional.conv2d(x, layer.weight, layer.bias).detach()
    assert layer.preserve_function_() is layer
    # in eval mode: SyncBatchNorm trains on accelerators only
    torch.testing.assert_close(layer(x), expected)
    assert set(layer.attention.norm2.weight.tolist() + layer.attention.norm2.bias.tolist()) == {0.0}


def test_preserve_function_divides_a_tied_kernel_once():
    first, second = make(4, 4, 3), make(4, 4, 3, seed=1)
    second.weight = first.weight
    x = images(2, 4, 6, 6)
    expected = [nn.functional.conv2d(x, layer.weight, layer.bias).detach() for layer in (first, second)]
    first.preserve_function_(second)
    for layer, plain in zip((first, second), expected, strict=True):
        torch.testing.assert_close(layer(x), plain)
