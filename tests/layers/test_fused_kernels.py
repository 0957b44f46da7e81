"""The Triton kernels of backend "fused", on a CUDA device, or on a CPU that interprets them.

Triton decides at its import whether it interprets, so that this file runs on a CPU in a process of its own, with
TRITON_INTERPRET=1: test_fused.py starts one.
"""

import os

import pytest
import torch
from oracle import unfolded_aw_conv

from awconv.analysis.measurement import peak_memory
from awconv.layers import AWConv2d, aw_conv2d, aw_conv2d_with_logits, fused

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
INTERPRETED = not CUDA and os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (CUDA or INTERPRETED), reason="needs a CUDA device, or TRITON_INTERPRET=1"),
]

# relative error in the norm, of sums of a few hundred products
ERRORS = {torch.float32: 1e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}

# samples, channels in, channels out, kernel, groups, share, size; stride, padding, dilation; residual
CASES = {
    "3x3": (2, 32, 24, (3, 3), 1, 16, (9, 7), 1, 1, 1, True),
    "1x1": (3, 16, 16, (1, 1), 1, 16, (5, 3), 1, 0, 1, True),
    "5x5, one map": (1, 32, 16, (5, 5), 1, 32, (6, 6), 1, 2, 1, True),
    "even and rectangular": (2, 16, 20, (2, 3), 2, 4, (8, 5), (2, 1), (0, 2), (1, 2), False),
    "same": (2, 16, 16, (2, 4), 1, 8, (6, 5), 1, "same", (2, 1), True),
    "no sharing": (2, 8, 16, (3, 3), 1, 1, (6, 5), 2, 1, 1, True),
    "share is no power of two": (2, 12, 8, (3, 2), 2, 3, (7, 5), (1, 2), (1, 0), 1, True),
    "a map wider than a tile": (2, 80, 16, (1, 1), 1, 80, (5, 3), 1, 0, 1, True),
    "depthwise": (2, 3, 6, (3, 3), 3, 1, (4, 4), 1, 1, 1, False),
    "several ragged tiles": (1, 80, 72, (3, 1), 1, 16, (9, 9), 1, 1, 1, True),
    "stride beyond the picture": (2, 16, 16, (2, 2), 1, 16, (2, 3), (3, 4), 1, 1, True),
    "a few samples a program": (6, 32, 24, (3, 3), 1, 16, (5, 4), 1, 1, 1, True),
    "three samples, not whole maps": (3, 24, 16, (2, 2), 2, 6, (4, 3), (2, 1), 1, 1, False),
    "more samples than one sum takes": (9, 16, 16, (2, 2), 1, 8, (3, 3), 1, 0, 1, True),
}


@pytest.fixture(autouse=True)
def exact_float32():
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def problem(samples, in_channels, out_channels, kernel, groups, share, size, *_):
    generator = torch.Generator().manual_seed(0)
    channels = in_channels // groups
    shapes = [
        (samples, in_channels, *size),
        (out_channels, channels, *kernel),
        (samples, out_channels, channels // share, *kernel),
        (out_channels,),
    ]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def reference(values, arguments, residual):
    """Output from the oracle, and gradients from a backend that is held against finite differences, in float64."""
    expected = torch.from_numpy(unfolded_aw_conv(*(v.numpy() for v in values), *arguments, residual))
    leaves = [v.clone().requires_grad_() for v in values]
    output = aw_conv2d(*leaves, *arguments, residual=residual, backend="gemm")
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return expected, gradient, torch.autograd.grad(output, leaves, gradient)


def fused_results(values, gradient, arguments, residual, dtype=torch.float32, memory_format=torch.contiguous_format):
    leaves = [v.to(DEVICE, dtype).requires_grad_() for v in values]
    leaves[0] = leaves[0].detach().contiguous(memory_format=memory_format).requires_grad_()
    output = aw_conv2d(*leaves, *arguments, residual=residual, backend="fused")
    given = gradient.to(DEVICE, dtype).contiguous(memory_format=memory_format)
    return output, torch.autograd.grad(output, leaves, given)


def assert_near(got, expected, error):
    for name, a, b in zip(("output", "input", "weight", "attention", "bias"), got, expected, strict=False):
        assert a.shape == b.shape
        relative = (a.detach().cpu().double() - b).norm() / b.norm()
        assert relative < error, f"{name}: {relative:.1e}"


def compare(case, dtype=torch.float32, memory_format=torch.contiguous_format):
    *_, stride, padding, dilation, residual = case
    arguments, values = (stride, padding, dilation, case[4]), problem(*case)
    expected, gradient, gradients = reference(values, arguments, residual)
    output, got = fused_results(values, gradient, arguments, residual, dtype, memory_format)
    assert output.dtype == dtype
    assert all(g.dtype == dtype for g in got)
    assert_near([output, *got], [expected, *gradients], ERRORS[dtype])
    return output, got


def test_triton_is_what_computes():
    from awconv.layers import fused_triton

    assert fused._implementation(torch.empty(0, device=DEVICE)) is fused_triton
    assert fused_triton.INTERPRETED == INTERPRETED


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_output_and_gradients(case):
    compare(case)


@pytest.mark.parametrize("name", ["3x3", "even and rectangular", "no sharing"])
def test_channels_last_stays_channels_last(name):
    output, (by_input, *_) = compare(CASES[name], memory_format=torch.channels_last)
    for tensor in (output, by_input):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert not tensor.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["3x3", "share is no power of two", "more samples than one sum takes"])
def test_low_precision_accumulates_in_float32(name, dtype):
    compare(CASES[name], dtype)


def test_half_precision_sums_do_not_saturate():
    """4096 ones: float16 counts to 2048, bfloat16 to 256."""
    for dtype in (torch.float16, torch.bfloat16):
        image = torch.ones(1, 512, 2, 4, device=DEVICE, dtype=dtype, requires_grad=True)
        weight = torch.ones(16, 512, 2, 4, device=DEVICE, dtype=dtype)
        attention = torch.zeros(1, 16, 32, 2, 4, device=DEVICE, dtype=dtype)
        assert (aw_conv2d(image, weight, attention, backend="fused") == 4096).all()


@pytest.mark.skipif(not CUDA, reason="the interpreter multiplies exactly")
def test_tf32_where_convolutions_are_allowed_to():
    case = (2, 64, 64, (3, 3), 1, 16, (16, 16), 1, 1, 1, True)
    values = problem(*case)
    expected, gradient, _ = reference(values, (1, 1, 1, 1), True)
    errors = {}
    for precision in ("ieee", "tf32"):
        torch.backends.cudnn.conv.fp32_precision = precision
        output, _ = fused_results(values, gradient, (1, 1, 1, 1), True)
        errors[precision] = (output.detach().cpu().double() - expected).norm() / expected.norm()
    assert errors["ieee"] < 1e-6
    if torch.cuda.get_device_capability() >= (8, 0):
        assert 1e-5 < errors["tf32"] < 2e-3


def test_tensors_of_any_layout():
    """Transposed, sliced and expanded tensors hold the same numbers, and so does an expanded gradient."""
    case = (2, 16, 16, (3, 2), 1, 8, (5, 6), 2, 1, 1, True)
    image, weight, attention, bias = (v.to(DEVICE, torch.float32) for v in problem(*case))
    arguments = (bias, 2, 1)

    def results(*values):
        leaves = [v.detach().requires_grad_() for v in values]
        output = aw_conv2d(*leaves, *arguments, backend="fused")
        return output, *torch.autograd.grad(output.sum(), leaves)

    expected = results(image, weight, attention)
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
    variants = [
        (image.transpose(2, 3).contiguous().transpose(2, 3), weight, attention),
        (padded[:, :, 1:-1, 1:-1], weight, attention),
        (image.repeat_interleave(2, 3)[..., ::2], weight.transpose(0, 1).contiguous().transpose(0, 1), attention),
        (image, weight.contiguous(memory_format=torch.channels_last), attention),
        (image, weight, attention.transpose(1, 4).contiguous().transpose(1, 4)),
    ]
    for variant in variants:
        for got, wanted in zip(results(*variant), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    one = attention[:1].expand(2, -1, -1, -1, -1)
    for got, wanted in zip(results(image, weight, one), results(image, weight, one.clone()), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_offsets_beyond_32_bits():
    """Channels that lie 2**27 numbers apart: the last one starts at 15 * 2**27, the one after it would be at 2**31."""
    try:
        storage = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip("needs 4 GiB of memory, nearly all of which is never touched")
    image = storage.as_strided((1, 17, 2, 2), (0, 2**27, 2, 1))
    values = [torch.randn(s, dtype=torch.float16) for s in ((1, 17, 2, 2), (16, 17, 2, 2), (1, 16, 17, 2, 2))]
    image.copy_(values[0])
    weight, attention = (v.to(DEVICE) for v in values[1:])
    expected = aw_conv2d(*(v.double() for v in values), backend="gemm")
    got = aw_conv2d(image, weight, attention, backend="fused")
    assert_near([got], [expected], ERRORS[torch.float16])
    gradient = torch.ones_like(got)
    by_weight = fused.fused_aw_conv2d_backward(
        gradient, image, weight, attention, [1, 1], [0, 0], [1, 1], 1, True, False, False, True
    )[1]
    wanted = values[0].double() * (1 + attention.cpu().double()[0])
    assert_near([by_weight], [wanted], ERRORS[torch.float16])


def test_autocast():
    case = CASES["3x3"]
    values = problem(*case)
    expected, gradient, gradients = reference(values, (1, 1, 1, 1), True)
    leaves = [v.to(DEVICE, torch.float32).requires_grad_() for v in values]
    with torch.autocast(DEVICE, torch.bfloat16):
        output = aw_conv2d(*leaves, 1, 1, backend="fused")
    got = torch.autograd.grad(output, leaves, gradient.to(DEVICE, torch.bfloat16))
    assert output.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in got)
    assert_near([output, *got], [expected, *gradients], ERRORS[torch.bfloat16])


def test_gradients_are_the_same_bits_every_time():
    """And the samples' sums are split, which is where an order could vary."""
    from awconv.layers import fused_triton

    case = CASES["more samples than one sum takes"]
    values = problem(*case)
    _, gradient, _ = reference(values, (1, 0, 1, 1), True)
    splits = []
    launch = fused_triton._Problem.launch

    def watched(self, kernel, programs, sizes, *more, **fixed):
        splits.extend(more[0].shape[:1] if more else [])
        launch(self, kernel, programs, sizes, *more, **fixed)

    torch.use_deterministic_algorithms(True)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fused_triton._Problem, "launch", watched)
            first, second = (fused_results(values, gradient, (1, 0, 1, 1), True)[1] for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert splits == [2, 2]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("wanted", range(3))
def test_only_what_is_asked_for(wanted):
    values = [v.to(DEVICE, torch.float32) for v in problem(*CASES["1x1"])[:3]]
    values[wanted].requires_grad_()
    aw_conv2d(*values, backend="fused").square().sum().backward()
    assert [v.grad is not None for v in values] == [index == wanted for index in range(3)]
    assert values[wanted].grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        *(CASES[name] for name in ("3x3", "even and rectangular", "a map wider than a tile", "depthwise")),
        (5, 32, 32, (2, 2), 2, 16, (4, 3), 1, 1, 1, True),
        (7, 18, 24, (3, 1), 3, 6, (3, 5), (2, 1), 1, 1, False),
    ],
    ids=["3x3", "even and rectangular", "a map wider than a tile", "depthwise", "5 samples", "7 samples"],
)
def test_logits(case, dtype):
    """As the attention head makes them: its maps lie in memory with the output channels innermost."""
    *_, stride, padding, dilation, residual = case
    arguments, (image, weight, logits, bias) = (stride, padding, dilation, case[4]), problem(*case)
    leaves = [v.clone().requires_grad_() for v in (image, weight, logits, bias)]
    attention = 1 / (1 + torch.exp(-leaves[2]))
    expected = aw_conv2d(*leaves[:2], attention, leaves[3], *arguments, residual=residual, backend="gemm")
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad(expected, leaves, gradient)
    inner = logits.permute(0, 3, 4, 2, 1).contiguous().permute(0, 4, 3, 1, 2)
    given = [v.to(DEVICE, dtype).requires_grad_() for v in (image, weight, inner, bias)]
    output = aw_conv2d_with_logits(*given, *arguments, residual=residual, backend="fused")
    got = torch.autograd.grad(output, given, gradient.to(DEVICE, dtype))
    assert got[2].stride() == given[2].stride()
    assert_near([output, *got], [expected, *gradients], ERRORS[dtype])


@pytest.mark.skipif(CUDA, reason="float64 is not for CUDA")
@pytest.mark.parametrize("convolve", [aw_conv2d, aw_conv2d_with_logits])
def test_derivatives_against_finite_differences(convolve):
    values = [v.requires_grad_() for v in problem(1, 2, 2, (2, 1), 1, 2, (3, 2))[:3]]

    def function(*values):
        return convolve(*values, None, (2, 1), (1, 0), backend="fused")

    assert torch.autograd.gradcheck(function, values, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, values, fast_mode=True)


@pytest.mark.parametrize("logits", [True, False])
def test_operator_keeps_its_contracts(logits):
    image, weight, attention, _ = (v.to(DEVICE, torch.float32) for v in problem(*CASES["1x1"]))
    leaves = [v.requires_grad_() for v in (image, weight, attention)]
    torch.library.opcheck(fused.fused_aw_conv2d, (*leaves, [2, 1], [1, 0], [1, 1], 1, True, logits))


def test_compiles_without_graph_breaks():
    torch.manual_seed(0)
    layer = AWConv2d(16, 16, 3, 2, 1, backend="fused").to(DEVICE)
    image = torch.randn(2, 16, 6, 5, device=DEVICE).contiguous(memory_format=torch.channels_last)
    expected = layer(image)
    wanted = torch.autograd.grad(expected.square().sum(), list(layer.parameters()))
    compiled = torch.compile(layer, fullgraph=True, backend="inductor" if CUDA else "aot_eager")
    got = compiled(image)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(got.square().sum(), list(layer.parameters()))
    for a, b in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_memory_does_not_hold_the_samples_kernels():
    case = (32, 32, 32, (2, 2), 1, 16, (2, 2), 1, 0, 1, True)
    image, weight, attention, _ = (v.to(DEVICE, torch.float32) for v in problem(*case))
    kernels = 32 * weight.nbytes
    leaves = [v.requires_grad_() for v in (image, weight, attention)]

    def forward():
        return aw_conv2d(*leaves, backend="fused")

    gradient = torch.ones_like(forward())
    assert peak_memory(forward, DEVICE) < kernels / 8
    # a few sums of the weight's gradient, and the attention's
    assert peak_memory(lambda: torch.autograd.grad(forward(), leaves, gradient), DEVICE) < kernels / 2


def test_tuned_tiles_give_the_same_numbers(monkeypatch):
    from awconv.layers import fused_triton

    case = (2, 48, 64, (1, 2), 1, 16, (5, 7), 1, 0, 1, True)
    before = {kernel: len(tuned.cache) for kernel, tuned in fused_triton._TUNED.items()}
    compare(case)
    assert before == {kernel: len(tuned.cache) for kernel, tuned in fused_triton._TUNED.items()}
    monkeypatch.setenv(fused_triton.AUTOTUNE_VARIABLE, "1")
    compare(case)
    for kernel, tuned in fused_triton._TUNED.items():
        assert len(tuned.cache) == before[kernel] + 1
        *_, best = tuned.cache.values()
        assert best in tuned.configs
    # the same class of shapes again: nothing is timed
    monkeypatch.setattr(
        fused_triton.triton.runtime.autotuner.Autotuner, "_bench", lambda *_, **__: pytest.fail("timed again")
    )
    compare((2, 48, 60, (1, 2), 1, 16, (7, 5), 1, 0, 1, True))


def test_all_tiles_of_the_table_compute_the_same():
    from awconv.layers import fused_triton

    # one sample more than programs take
    values = problem(5, 16, 16, (1, 1), 1, 16, (4, 4))
    expected, gradient, gradients = reference(values, (1, 0, 1, 1), True)
    for kernel, tuned in fused_triton._TUNED.items():
        assert tuned.base_fn.__name__ == kernel.fn.__name__
        for config in tuned.configs:
            with pytest.MonkeyPatch.context() as patch:
                defaults = fused_triton._default_tiles

                def tiles(other, *given, kernel=kernel, config=config, defaults=defaults):
                    return config.all_kwargs() if other is kernel else defaults(other, *given)

                patch.setattr(fused_triton, "_default_tiles", tiles)
                output, got = fused_results(values, gradient, (1, 0, 1, 1), True)
                assert_near([output, *got], [expected, *gradients], ERRORS[torch.float32])


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_auto_is_fused_on_cuda():
    values = [v.to(DEVICE, torch.float32) for v in problem(*CASES["3x3"])[:3]]
    with torch.profiler.profile() as profile:
        aw_conv2d(*values, padding=1)
    assert any(event.name == "awconv::aw_conv2d" for event in profile.events())
    with pytest.raises(ValueError, match="float64") as error:
        aw_conv2d(*(v.double() for v in values), padding=1, backend="fused")
    assert "grouped" in str(error.value)
    assert aw_conv2d(*(v.double() for v in values), padding=1).shape == (2, 24, 9, 7)
