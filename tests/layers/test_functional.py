"""`aw_conv2d` against the literal sum of DESIGN section 2, in float64, over every argument and all backends."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import BACKENDS, literal_aw_conv, unfolded_aw_conv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from awconv.layers import aw_conv2d
from awconv.layers.functional import _exportable_unfold

TIGHT = {"rtol": 1e-11, "atol": 1e-11}


def tensors(samples, in_channels, out_channels, kernel, groups, share, size, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    group_channels = in_channels // groups
    image = torch.randn(samples, in_channels, *size, generator=generator, dtype=dtype)
    weight = torch.randn(out_channels, group_channels, *kernel, generator=generator, dtype=dtype)
    maps = (samples, out_channels, group_channels // share, *kernel)
    attention = torch.rand(maps, generator=generator, dtype=dtype)
    bias = torch.randn(out_channels, generator=generator, dtype=dtype)
    return image, weight, attention, bias


def short(value):
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def arrays(*values):
    return [None if v is None else v.numpy() for v in values]


KERNELS = [(1, 1), (3, 3), (3, 2)]
STRIDES = [1, 2, (1, 2)]
PADDINGS = [0, 1, (2, 1), "same", "valid"]
DILATIONS = [1, 2, (2, 1)]
GEOMETRIES = [
    (kernel, stride, padding, dilation)
    for kernel, stride, padding, dilation in itertools.product(KERNELS, STRIDES, PADDINGS, DILATIONS)
    if padding != "same" or stride == 1  # torch defines "same" for stride 1 only
]


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), GEOMETRIES, ids=short)
def test_every_combination_equals_the_literal_loop(kernel, stride, padding, dilation):
    compared = 0
    for groups, size, residual in itertools.product([1, 2, 4], [(5, 5), (6, 5)], [True, False]):
        for share in (s for s in (1, 2, 4) if (4 // groups) % s == 0):
            image, weight, attention, bias = tensors(2, 4, 4, kernel, groups, share, size, seed=compared)
            arguments = (stride, padding, dilation, groups)
            without = literal_aw_conv(*arrays(image, weight, attention), None, *arguments, residual=residual)
            for backend, b in itertools.product(BACKENDS, (None, bias)):
                got = aw_conv2d(image, weight, attention, b, *arguments, residual=residual, backend=backend)
                expected = without if b is None else without + b.numpy()[None, :, None, None]
                np.testing.assert_allclose(
                    got.numpy(),
                    expected,
                    **TIGHT,
                    err_msg=f"{groups=} {share=} {size=} {residual=} {backend=} bias={b is not None}",
                )
                compared += 1
    assert compared == 6 * 2 * 2 * 2 * len(BACKENDS)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), GEOMETRIES[::7], ids=short)
def test_the_two_oracles_agree(kernel, stride, padding, dilation, padding_mode):
    for groups, share, residual in [(1, 2, True), (2, 1, False), (4, 1, True)]:
        values = arrays(*tensors(2, 4, 8, kernel, groups, share, (5, 6)))
        arguments = (stride, padding, dilation, groups, residual, padding_mode)
        np.testing.assert_allclose(unfolded_aw_conv(*values, *arguments), literal_aw_conv(*values, *arguments), **TIGHT)


@pytest.mark.parametrize("kernel", KERNELS, ids=short)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_unfold_that_is_exported_gives_the_same_numbers(kernel, dtype):
    image = tensors(2, 6, 6, kernel, 1, 1, (7, 8), dtype=dtype)[0]
    for dilation, padding, stride in itertools.product([(1, 1), (2, 1)], [(0, 0), (2, 1)], [(1, 1), (1, 2), (3, 2)]):
        expected = F.unfold(image, kernel, dilation, padding, stride)
        assert torch.equal(_exportable_unfold(image, kernel, dilation, padding, stride), expected)


def test_the_oracle_without_attention_is_torchs_convolution():
    image, weight, attention, bias = tensors(2, 4, 6, (3, 2), 2, 1, (7, 6))
    for stride, padding, dilation in [(1, "same", 2), (2, (1, 0), 1), ((2, 1), "valid", (2, 1))]:
        plain = F.conv2d(image, weight, bias, stride, padding, dilation, groups=2)
        arguments = (stride, padding, dilation, 2, True)
        values = arrays(image, weight, torch.zeros_like(attention), bias)
        np.testing.assert_allclose(literal_aw_conv(*values, *arguments), plain.numpy(), **TIGHT)


@st.composite
def problems(draw):
    groups = draw(st.integers(1, 4))
    group_channels = draw(st.integers(1, 8))
    share = draw(st.sampled_from([d for d in range(1, group_channels + 1) if group_channels % d == 0]))
    kernel = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    stride = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    dilation = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    padding = draw(
        st.one_of(
            st.tuples(st.integers(0, 3), st.integers(0, 3)),
            st.just("valid"),
            *([st.just("same")] if stride == (1, 1) else []),
        )
    )
    needed = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    if padding == "same":
        needed = [1, 1]
    elif padding != "valid":
        needed = [max(1, n - 2 * p) for n, p in zip(needed, padding, strict=True)]
    size = tuple(n + draw(st.integers(0, 5)) for n in needed)
    return {
        "shape": (draw(st.integers(0, 3)), groups * group_channels, groups * draw(st.integers(1, 3))),
        "kernel": kernel,
        "share": share,
        "size": size,
        "arguments": (stride, padding, dilation, groups),
        "bias": draw(st.booleans()),
        "residual": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**16)),
    }


@given(problem=problems())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_drawn_shapes(problem):
    kernel, share, size, arguments = (problem[k] for k in ("kernel", "share", "size", "arguments"))
    image, weight, attention, bias = tensors(*problem["shape"], kernel, arguments[3], share, size, seed=problem["seed"])
    bias = bias if problem["bias"] else None
    expected = unfolded_aw_conv(*arrays(image, weight, attention, bias), *arguments, problem["residual"])
    for backend in (*BACKENDS, "auto"):
        got = aw_conv2d(image, weight, attention, bias, *arguments, residual=problem["residual"], backend=backend)
        assert got.shape == expected.shape
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-10, atol=1e-10, err_msg=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(
    ("channels", "groups", "share", "stride", "padding", "dilation"),
    [
        ((4, 4), 1, 1, 1, 1, 1),
        ((4, 2), 1, 4, 2, "valid", 1),
        ((4, 4), 2, 2, 1, "same", 2),
        ((4, 8), 4, 1, (2, 1), (0, 1), 1),
    ],
)
def test_gradients(channels, groups, share, stride, padding, dilation, residual, backend):
    values = [v.requires_grad_() for v in tensors(2, *channels, (3, 2), groups, share, (5, 4))]

    def function(image, weight, attention, bias):
        return aw_conv2d(
            image, weight, attention, bias, stride, padding, dilation, groups, residual=residual, backend=backend
        )

    assert torch.autograd.gradcheck(function, values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_gradients(backend):
    values = [v.requires_grad_() for v in tensors(1, 2, 2, (2, 1), 1, 2, (3, 2))]

    def function(image, weight, attention, bias):
        return aw_conv2d(image, weight, attention, bias, padding=(1, 0), backend=backend)

    assert torch.autograd.gradgradcheck(function, values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_flow_only_where_they_are_asked_for(backend):
    """Fine-tuning freezes the kernel and trains the attention, and the other way round."""
    for wanted in range(4):
        values = list(tensors(2, 4, 4, (3, 3), 1, 2, (5, 5)))
        values[wanted].requires_grad_()
        aw_conv2d(*values, padding=1, backend=backend).square().sum().backward()
        assert [v.grad is not None for v in values] == [i == wanted for i in range(4)]
        assert values[wanted].grad.abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_constant_attention_scales_a_plain_convolution(backend, groups):
    image, weight, _, bias = tensors(3, 4, 8, (3, 3), groups, 1, (7, 6))
    for value in (0.0, 0.25, 1.0):
        attention = torch.full((3, 8, 4 // groups, 3, 3), value, dtype=torch.float64)
        for residual, factor in ((True, 1 + value), (False, value)):
            got = aw_conv2d(image, weight, attention, bias, 2, 1, 1, groups, residual=residual, backend=backend)
            plain = F.conv2d(image, weight * factor, bias, 2, 1, 1, groups)
            torch.testing.assert_close(got, plain, **TIGHT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_sample_has_its_own_kernel(backend):
    image, weight, attention, bias = tensors(4, 4, 6, (3, 3), 2, 2, (6, 7))
    together = aw_conv2d(image, weight, attention, bias, padding=1, groups=2, backend=backend)
    for n in range(4):
        kernel = weight * (1 + attention[n].repeat_interleave(2, dim=1))
        alone = F.conv2d(image[n : n + 1], kernel, bias, padding=1, groups=2)
        torch.testing.assert_close(together[n : n + 1], alone, **TIGHT)
    order = torch.tensor([2, 0, 3, 1])
    permuted = aw_conv2d(image[order], weight, attention[order], bias, padding=1, groups=2, backend=backend)
    torch.testing.assert_close(permuted, together[order], **TIGHT)


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("groups", [1, 4])
def test_empty_batch(backend, groups):
    values = [v.requires_grad_() for v in tensors(0, 4, 8, (3, 3), groups, 1, (5, 5))]
    output = aw_conv2d(*values, 2, 1, 1, groups, backend=backend)
    assert output.shape == (0, 8, 3, 3)
    output.sum().backward()
    for v in values:
        assert v.grad.shape == v.shape
        assert torch.count_nonzero(v.grad) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_tensors_of_any_layout(backend):
    """Transposed, sliced, expanded and channels_last inputs hold the same numbers, so they give the same output."""
    image, weight, attention, bias = tensors(2, 4, 6, (3, 3), 1, 2, (6, 5))
    expected = aw_conv2d(image, weight, attention, bias, 2, 1, backend=backend)
    padded = F.pad(image, (1, 1, 1, 1))
    variants = {
        "transposed": (image.transpose(2, 3).contiguous().transpose(2, 3), weight, attention),
        "sliced": (padded[:, :, 1:-1, 1:-1], weight, attention),
        "strided": (image.repeat_interleave(2, 3)[..., ::2], weight, attention),
        "channels_last": (image.contiguous(memory_format=torch.channels_last), weight, attention),
        "kernel": (image, weight.transpose(0, 1).contiguous().transpose(0, 1), attention),
        "kernel channels_last": (image, weight.contiguous(memory_format=torch.channels_last), attention),
        "attention": (image, weight, attention.transpose(1, 4).contiguous().transpose(1, 4)),
    }
    for name, (x, k, a) in variants.items():
        got = aw_conv2d(x, k, a, bias, 2, 1, backend=backend)
        torch.testing.assert_close(got, expected, **TIGHT, msg=lambda text, name=name: f"{name}: {text}")
    one_map = attention[:1].expand(2, -1, -1, -1, -1)
    same = aw_conv2d(image, weight, one_map, bias, 2, 1, backend=backend)
    torch.testing.assert_close(same, F.conv2d(image, weight * (1 + one_map[0].repeat_interleave(2, 1)), bias, 2, 1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions(backend, dtype):
    values = tensors(2, 16, 8, (3, 3), 1, 4, (8, 8))
    expected = aw_conv2d(*values, padding=1, backend=backend)
    got = aw_conv2d(*(v.to(dtype) for v in values), padding=1, backend=backend)
    assert got.dtype == dtype
    relative = (got.double() - expected).norm() / expected.norm()
    assert relative < (1e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_autocast_computes_in_the_compute_dtype(backend):
    values = [v.float().requires_grad_() for v in tensors(2, 16, 8, (3, 3), 1, 4, (8, 8))]
    expected = aw_conv2d(*values, padding=1, backend=backend).detach()
    with torch.autocast("cpu", torch.bfloat16):
        got = aw_conv2d(*values, padding=1, backend=backend)
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).norm() / expected.norm() < 2e-2
    got.float().sum().backward()
    assert all(v.grad is not None and v.grad.dtype == torch.float32 for v in values)


class Largest(TorchDispatchMode):
    """The size of the largest float32 tensor that any operation returned."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.numbers = max(self.numbers, tensor.numel())
        return result


@pytest.mark.parametrize("backend", ["grouped", "gemm", "auto"])
def test_autocast_never_holds_the_samples_kernels_in_float32(backend):
    """DESIGN section 7, 17: the kernel is cast before it is multiplied, or the memory doubles."""
    values = [v.float() for v in tensors(4, 16, 16, (3, 3), 1, 4, (4, 4))]
    kernels = 4 * values[1].numel()
    with Largest() as plain:
        aw_conv2d(*values, padding=1, backend=backend)
    with torch.autocast("cpu", torch.bfloat16), Largest() as cast:
        aw_conv2d(*values, padding=1, backend=backend)
    assert plain.numbers >= kernels, "the watch sees them where they are made in float32"
    assert cast.numbers < kernels


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_arguments_are_left_alone(backend):
    values = tensors(2, 4, 4, (3, 3), 1, 2, (5, 5))
    copies = [v.clone() for v in values]
    aw_conv2d(*values, padding=1, backend=backend)
    assert all(torch.equal(v, c) for v, c in zip(values, copies, strict=True))


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    assert message.strip()
    return message


@pytest.mark.parametrize(
    ("shape", "wrong"),
    [
        ((3, 6, 4, 3, 3), "batch"),
        ((2, 4, 4, 3, 3), "output channels"),
        ((2, 6, 3, 3, 3), "share"),
        ((2, 6, 8, 3, 3), "more maps than channels"),
        ((2, 6, 0, 3, 3), "no maps"),
        ((2, 6, 4, 1, 3), "kernel height"),
        ((2, 6, 4, 3, 5), "kernel width"),
        ((2, 24, 3, 3), "dimensions"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_wrong_attention_shapes(shape, wrong, backend):
    image, weight, _, bias = tensors(2, 4, 6, (3, 3), 1, 1, (5, 5))
    with pytest.raises(ValueError, match="attention") as error:
        aw_conv2d(image, weight, torch.rand(shape, dtype=torch.float64), bias, backend=backend)
    assert all(str(s) in one_line(error) for s in shape), "the message shows the shape it was given"


def test_unknown_backend_lists_the_choices():
    with pytest.raises(ValueError, match="backend") as error:
        aw_conv2d(*tensors(2, 4, 4, (3, 3), 1, 1, (5, 5)), backend="gem")
    message = one_line(error)
    assert all(name in message for name in ("gem", "grouped", "auto"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_channels_that_do_not_fit_are_refused_as_conv2d_refuses_them(backend):
    image, weight, attention, bias = tensors(2, 4, 6, (3, 3), 1, 1, (5, 5))
    with pytest.raises((ValueError, RuntimeError)):
        aw_conv2d(image[:, :3], weight, attention, bias, backend=backend)
    with pytest.raises((ValueError, RuntimeError)):
        aw_conv2d(image, weight, attention, bias, groups=2, backend=backend)
    with pytest.raises((ValueError, RuntimeError)):
        aw_conv2d(image, weight, attention, bias[:5], backend=backend)
    with pytest.raises((ValueError, RuntimeError)):
        aw_conv2d(image, weight, attention, bias, 2, "same", backend=backend)
    with pytest.raises((ValueError, RuntimeError)):
        aw_conv2d(image[..., :2], weight, attention, bias, backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize(("groups", "share"), [(1, 4), (4, 2), (16, 1)])
def test_cuda_agrees_with_the_oracle(backend, groups, share):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    values = tensors(3, 16, 32, (3, 3), groups, share, (9, 8))
    expected = torch.from_numpy(unfolded_aw_conv(*arrays(*values), 2, 1, 1, groups, True))
    on_device = [v.cuda().requires_grad_() for v in values]
    got = aw_conv2d(*on_device, 2, 1, 1, groups, backend=backend)
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-10, atol=1e-10)
    got.sum().backward()
    assert all(v.grad is not None for v in on_device)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cuda", dtype):
            low = aw_conv2d(*(v.float() for v in on_device), 2, 1, 1, groups, backend=backend)
        assert low.dtype == dtype
        assert (low.cpu().double() - expected).norm() / expected.norm() < 2e-2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("samples", [1, 2])
def test_gradients_of_channels_last_tensors_with_groups(samples, backend):
    """One channels_last sample folded into groups has strides by which torch's own convolution errs."""
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((samples, 12, 6, 5), (8, 6, 3, 3), (samples, 8, 2, 3, 3))
    ]
    plain = [leaf.clone().requires_grad_() for leaf in leaves]
    moved = [leaf.to(memory_format=torch.channels_last) for leaf in leaves[:2]] + [leaves[2].clone()]
    for leaf in moved:
        leaf.requires_grad_()
    expected = torch.autograd.grad(aw_conv2d(*plain, None, 1, 1, 1, 2, backend="gemm").square().sum(), plain)
    got = torch.autograd.grad(aw_conv2d(*moved, None, 1, 1, 1, 2, backend=backend).square().sum(), moved)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
