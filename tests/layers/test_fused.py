"""Backend "fused": its operator and its two ways on a CPU, and, in processes of their own, its Triton kernels.

test_functional.py and test_aw_conv.py hold every backend, this one included, against the oracle; here the CPU's ways
are forced, whatever the size, and what only this backend promises is tested.
"""

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracle import unfolded_aw_conv
from torch._subclasses import FakeTensorMode
from torch.torch_version import TorchVersion

from awconv.analysis.measurement import peak_memory
from awconv.layers import AWConv2d, aw_conv2d, aw_conv2d_with_logits, functional, fused, fused_cpu


@pytest.fixture(params=["by sample", "by chunk", "by sample, in blocks"])
def way(request, monkeypatch):
    """Each way of computing on a CPU, with kernels of any size, and chunks of a sample or two."""
    monkeypatch.setattr(fused_cpu, "_LARGE_KERNEL", math.inf if request.param == "by chunk" else 0)
    monkeypatch.setattr(fused_cpu, "_CHUNK_OF_KERNELS", 4000)
    if request.param == "by sample, in blocks":
        monkeypatch.setattr(fused_cpu, "_BLOCK_OF_KERNEL", 1)
    return request.param


def tensors(samples, in_channels, out_channels, kernel, groups, share, size, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    channels = in_channels // groups
    shapes = [
        (samples, in_channels, *size),
        (out_channels, channels, *kernel),
        (samples, out_channels, channels // share, *kernel),
    ]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


# channels in and out, kernel, groups, share, size; stride, padding, dilation
CASES = [
    ((12, 8, (3, 3), 1, 4, (7, 5)), (1, 1, 1)),
    ((12, 8, (3, 2), 2, 3, (7, 6)), ((2, 1), (1, 2), (1, 2))),
    ((4, 8, (5, 5), 4, 1, (6, 7)), (2, 2, 1)),
    ((6, 4, (1, 1), 1, 6, (3, 1)), (1, 0, 1)),
    ((4, 4, (2, 4), 1, 2, (5, 6)), (1, "same", 1)),
    ((4, 2, (3, 3), 2, 2, (2, 2)), (3, 1, 1)),
]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(("shape", "geometry"), CASES)
def test_output_and_gradients(shape, geometry, residual, memory_format, way):
    values = tensors(3, *shape)
    arguments = (*geometry, shape[3])
    leaves = [v.clone().requires_grad_() for v in values]
    wanted = aw_conv2d(*leaves, None, *arguments, residual=residual, backend="gemm")
    expected = unfolded_aw_conv(*(v.numpy() for v in values), None, *arguments, residual)
    values[0] = values[0].contiguous(memory_format=memory_format)
    for value in values:
        value.requires_grad_()
    output = aw_conv2d(*values, None, *arguments, residual=residual, backend="fused")
    np.testing.assert_allclose(output.detach().numpy(), expected, rtol=1e-11, atol=1e-11)
    gradient = torch.randn_like(output)
    got = torch.autograd.grad(output, values, gradient)
    for a, b in zip(got, torch.autograd.grad(wanted, leaves, gradient), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    if min(values[0].shape[1:]) > 1:
        assert output.is_contiguous(memory_format=memory_format)
        assert got[0].is_contiguous(memory_format=memory_format)


def test_channels_last_weights_and_maps_in_any_order(way):
    """A network in channels_last has such kernels, and the attention head makes its maps with C2 innermost."""
    leaves = [v.requires_grad_() for v in tensors(3, 12, 8, (3, 2), 2, 3, (7, 6))]
    orders = [(0, 2, 3, 1), (0, 2, 3, 1), (0, 3, 4, 2, 1)]
    moved = []
    for leaf, order in zip(leaves, orders, strict=True):
        memory = leaf.detach().permute(order).contiguous()
        moved.append(memory.permute([order.index(i) for i in range(leaf.dim())]).requires_grad_())
    arguments = (None, (2, 1), (1, 2), (1, 2), 2)
    wanted = aw_conv2d(*leaves, *arguments, backend="gemm")
    output = aw_conv2d(*moved, *arguments, backend="fused")
    torch.testing.assert_close(output, wanted, rtol=1e-11, atol=1e-11)
    gradient = torch.randn_like(output)
    got, expected = torch.autograd.grad(output, moved, gradient), torch.autograd.grad(wanted, leaves, gradient)
    for a, b, value in zip(got, expected, moved, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
        assert a.stride() == value.stride()


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(("shape", "geometry"), CASES)
def test_logits_are_what_the_sigmoid_is_taken_of(shape, geometry, residual, way):
    leaves = [v.requires_grad_() for v in tensors(3, *shape)]
    image, weight, logits = leaves
    attention = 1 / (1 + torch.exp(-logits))
    options = {"groups": shape[3], "residual": residual}
    wanted = aw_conv2d(image, weight, attention, None, *geometry, **options, backend="gemm")
    gradient = torch.randn_like(wanted)
    expected = torch.autograd.grad(wanted, leaves, gradient)
    for backend in ("fused", "grouped"):
        output = aw_conv2d_with_logits(*leaves, None, *geometry, **options, backend=backend)
        torch.testing.assert_close(output, wanted, rtol=1e-11, atol=1e-11)
        for a, b in zip(torch.autograd.grad(output, leaves, gradient), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("convolve", [aw_conv2d, aw_conv2d_with_logits])
def test_derivatives_against_finite_differences(convolve, way):
    values = [v.requires_grad_() for v in tensors(2, 4, 4, (2, 3), 2, 2, (3, 4))]

    def function(*values):
        return convolve(*values, None, (2, 1), 1, 1, 2, backend="fused")

    assert torch.autograd.gradcheck(function, values)
    assert torch.autograd.gradgradcheck(function, values)


@pytest.mark.parametrize("convolve", [aw_conv2d, aw_conv2d_with_logits])
@pytest.mark.parametrize("frozen", range(3))
def test_second_derivatives_where_a_part_is_frozen(frozen, convolve):
    values = tensors(2, 4, 4, (2, 3), 2, 2, (3, 4))
    leaves = [v.requires_grad_() for index, v in enumerate(values) if index != frozen]

    def function(*leaves):
        return convolve(*values, None, 1, 1, 1, 2, backend="fused")

    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_sums_over_samples_in_float32(dtype, way):
    """The gradient of 512 samples: bfloat16 alone would count to 256."""
    image = torch.ones(512, 2, 2, 2, dtype=dtype)
    weight = torch.ones(2, 2, 1, 1, dtype=dtype, requires_grad=True)
    attention = torch.zeros(512, 2, 1, 1, 1, dtype=dtype)
    aw_conv2d(image, weight, attention, backend="fused").sum().backward()
    assert weight.grad.dtype == dtype
    assert (weight.grad == 512 * 4).all()


@pytest.mark.parametrize("channels", [32, 256], ids=["by chunk", "by sample"])
def test_memory_does_not_grow_by_the_samples_kernels(channels):
    """Of any layer: what more samples need is less than their kernels by far."""

    def peaks(samples):
        values = tensors(samples, channels, channels, (3, 3), 1, 16, (2, 2), dtype=torch.float32)
        leaves = [v.requires_grad_() for v in values]
        gradient = torch.ones_like(values[0])

        def forward():
            return aw_conv2d(*leaves, None, 1, 1, backend="fused")

        forward()
        return peak_memory(forward), peak_memory(lambda: torch.autograd.grad(forward(), leaves, gradient))

    few, many = (256, 512) if channels == 32 else (4, 12)
    kernels = (many - few) * channels * channels * 9 * 4
    for before, after in zip(peaks(few), peaks(many), strict=True):
        assert after - before < kernels / 4


def test_a_layer_neither_holds_the_attention_nor_its_gradient_twice():
    """At 512 channels the maps of 16 samples are as many numbers as the kernel."""
    layer = AWConv2d(512, 512, 3, padding=1, bias=False, backend="fused")
    image = torch.randn(16, 512, 7, 7)
    parameters = list(layer.parameters())
    maps = 16 * 512 * 32 * 9 * 4
    gradient = torch.randn_like(image)

    def train():
        return torch.autograd.grad(layer(image), parameters, gradient)

    train()
    # logits and their gradient, the kernel's gradient, and some ten buffers for a part of one sample's kernel
    assert peak_memory(train) < 5 * maps


@pytest.mark.parametrize("listened", ["attention", "attention.sigmoid"])
def test_who_listens_to_the_attention_hears_it_and_may_change_it(listened):
    layer = AWConv2d(16, 16, 3, padding=1, zero_init=False, backend="fused").eval()
    image = torch.randn(2, 16, 8, 8)
    expected = aw_conv2d(image, layer.weight, torch.full((2, 16, 1, 3, 3), 0.25), layer.bias, padding=1)
    assert not torch.allclose(layer(image), expected)
    hook = lambda module, inputs, output: torch.full_like(output, 0.25)  # noqa: E731
    layer.get_submodule(listened).register_forward_hook(hook)
    torch.testing.assert_close(layer(image), expected)


def test_another_gate_than_the_sigmoid_is_used():
    layer = AWConv2d(16, 16, 3, padding=1, backend="fused").eval()
    layer.attention.sigmoid = torch.nn.Tanh()
    image = torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(layer(image), torch.nn.functional.conv2d(image, layer.weight, layer.bias, padding=1))


def test_logits_of_the_wrong_shape_are_named():
    image, weight, logits = tensors(2, 8, 4, (3, 3), 1, 4, (5, 5))
    with pytest.raises(ValueError, match="logits has shape") as error:
        aw_conv2d_with_logits(image, weight, logits[:1])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("logits", [True, False])
def test_operator_keeps_its_contracts(logits, way):
    image, weight, attention = (v.requires_grad_() for v in tensors(2, 4, 4, (2, 3), 2, 2, (3, 4)))
    geometry = ([1, 2], [1, 1], [1, 1], 2, True, logits)
    torch.library.opcheck(fused.fused_aw_conv2d, (image, weight, attention, *geometry))
    gradient = torch.randn(2, 4, 4, 2, dtype=torch.float64, requires_grad=True)
    arguments = (gradient, image, weight, attention, *geometry)
    torch.library.opcheck(fused.fused_aw_conv2d_backward, (*arguments, True, True))
    # a part that is not wanted has no gradient, which one of the checks would ask for
    for wants in ((True, False), (False, True)):
        torch.library.opcheck(
            fused.fused_aw_conv2d_backward,
            (*(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments), *wants),
        )


def test_too_small_an_input_is_told_in_one_line():
    for device in ("cpu", "meta"):
        values = [v.to(device) for v in tensors(1, 4, 4, (3, 3), 1, 2, (2, 5))]
        with pytest.raises(ValueError, match="2x5") as error:
            aw_conv2d(*values, backend="fused")
        assert "3x3" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("device", "dtype", "triton", "told"),
    [
        ("cuda", torch.float32, False, "Triton"),
        ("cuda", torch.float64, True, "float64"),
        ("xpu", torch.float32, True, "xpu"),
    ],
)
def test_what_cannot_be_computed_is_told_in_one_line(device, dtype, triton, told, monkeypatch):
    monkeypatch.setattr(fused, "HAS_TRITON", triton)
    reason = fused.unsupported(SimpleNamespace(device=torch.device(device), dtype=dtype))
    assert told in reason
    monkeypatch.setattr(fused, "unsupported", lambda input: reason)
    with pytest.raises(ValueError, match="backend='fused'") as error:
        aw_conv2d(*tensors(1, 4, 4, (3, 3), 1, 2, (5, 5)), backend="fused")
    assert "\n" not in str(error.value)
    assert "grouped" in str(error.value)


@pytest.mark.parametrize(
    ("device", "shape", "dtype", "triton", "chosen"),
    [
        ("cuda", (2, 32, 64, (3, 3), 1, 16, (4, 4)), torch.float32, True, "fused"),
        ("cuda", (2, 32, 64, (3, 3), 1, 16, (4, 4)), torch.bfloat16, True, "fused"),
        ("cuda", (2, 32, 64, (3, 3), 1, 16, (4, 4)), torch.float64, True, "grouped"),
        ("cuda", (2, 32, 64, (3, 3), 1, 16, (4, 4)), torch.float32, False, "grouped"),
        ("cuda", (2, 32, 64, (3, 3), 8, 4, (4, 4)), torch.float32, True, "grouped"),
        ("cpu", (2, 32, 64, (3, 3), 1, 16, (4, 4)), torch.float32, True, "grouped"),
        ("cpu", (64, 32, 64, (3, 3), 1, 16, (4, 4)), torch.float32, True, "fused"),
    ],
)
def test_auto(device, shape, dtype, triton, chosen, monkeypatch):
    monkeypatch.setattr(fused, "HAS_TRITON", triton)
    with FakeTensorMode():
        image = torch.empty(shape[0], shape[1], *shape[6], device=device, dtype=dtype)
        weight = torch.empty(shape[2], shape[1] // shape[4], *shape[3], device=device, dtype=dtype)
    geometry = functional._Geometry((1, 1), (1, 1), (1, 1), shape[4])
    assert functional._fastest_backend(image, weight, geometry) == chosen


# --- the kernels ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="test_fused_kernels.py runs on the GPU by itself")
def test_kernels_through_tritons_interpreter():
    triton = pytest.importorskip("triton")
    if TorchVersion(triton.__version__) < "3.7" and TorchVersion(np.__version__) >= "2.4":
        pytest.skip("Triton 3.6 interprets loops by int(array of one number), which NumPy refuses from 2.4 on")
    file = Path(__file__).with_name("test_fused_kernels.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert int(done.stdout.split(" passed")[0].split()[-1]) > 30


def compiled(kernel, arguments, constants, tiles, capability):
    """Compiles ``kernel`` for a GPU that need not be there, for arguments as Triton would specialise it."""
    import triton

    names = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
    options = {key: tiles.pop(key) for key in ("num_warps", "num_stages")}
    constants = {**constants, **tiles}
    signature, values, attributes = {}, {}, {}

    def kind(path, value):
        if value == 1:
            values[path] = 1
            return "constexpr"
        if value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32"

    given = iter(arguments)
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(index,)] = "constexpr", constants[name]
            continue
        argument = next(given)
        if isinstance(argument, torch.Tensor):
            signature[name], attributes[(index,)] = names[argument.dtype], [["tt.divisibility", 16]]
        elif isinstance(argument, tuple):
            signature[name] = tuple(kind((index, position), value) for position, value in enumerate(argument))
        else:
            signature[name] = kind((index,), argument)
    source = triton.compiler.ASTSource(kernel, signature, values, attributes)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=options)


def compile_all(monkeypatch, shape, dtype, capability, precision="tf32"):
    """Compiles the three kernels for a GPU that is not here, with the tiles that they would be given."""
    from awconv.layers import fused_triton

    found = {}

    def compile_instead(self, kernel, programs, sizes, *more, **fixed):
        *product, samples = (1 << (size - 1).bit_length() for size in sizes)
        sizes = fused_triton._Sizes(*product, min(samples, 4))
        tiles = {**fused_triton._default_tiles(kernel, sizes, dtype), **fixed}
        constants = {"SIZES": tuple(sizes), **self.constants, "PRECISION": precision}
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        assert programs(tiles) > 0
        found[kernel.fn.__name__] = compiled(kernel, (*self.arguments, *more), constants, tiles, capability)

    monkeypatch.setattr(fused_triton._Problem, "launch", compile_instead)
    monkeypatch.setattr(fused_triton, "_programs_wanted", lambda device: 400)
    samples, channels, size = shape
    with FakeTensorMode():
        image = torch.empty(samples, channels, size, size, dtype=dtype).to(memory_format=torch.channels_last)
        weight = torch.empty(channels, channels, 3, 3, dtype=dtype)
        # as the attention head makes its logits: output channels innermost where the maps are many
        if channels >= 256:
            logits = torch.empty(samples, 3, 3, channels // 16, channels, dtype=dtype).permute(0, 4, 3, 1, 2)
        else:
            logits = torch.empty(samples, 3, 3, channels, channels // 16, dtype=dtype).permute(0, 3, 4, 1, 2)
        output = torch.empty_like(image)
        geometry = ([1, 1], [1, 1], [1, 1], 1, True, True)
        fused_triton.forward(image, weight, logits, output, *geometry)
        fused_triton.gradients(image, weight, logits, output, torch.empty_like(image), True, *geometry)
    assert list(found) == ["_forward_kernel", "_input_gradient_kernel", "_kernel_gradients_kernel"]
    return found


@pytest.fixture
def triton(tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    if "TRITON_INTERPRET" in os.environ:
        pytest.skip("interprets")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return triton


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "shared"), [(80, 163), (89, 99)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_kernels_compile_for_gpus_that_are_not_here(triton, dtype, capability, shared, monkeypatch):
    """The interpreter takes much that a compiler refuses. It also shows that tensor cores are used."""
    for shape in ((16, 64, 14), (256, 128, 28), (256, 512, 7)):
        for name, binary in compile_all(monkeypatch, shape, dtype, capability).items():
            assert binary.asm["cubin"]
            assert "mma" in binary.asm["ptx"]
            assert binary.metadata.shared <= shared * 2**10, (name, shape)


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "size"), [(64, 56), (128, 28), (256, 14), (512, 7)])
def test_kernels_suit_hopper_on_the_layers_of_resnet50(triton, channels, size, monkeypatch, tmp_path):
    """Hopper's own matrix instructions, whose loads are asynchronous and wide; everything in registers; two stages."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    for dtype in (torch.bfloat16, torch.float32):
        for name, binary in compile_all(monkeypatch, (256, channels, size), dtype, 90).items():
            ptx, cubin = binary.asm["ptx"], tmp_path / f"{name}.cubin"
            assert "wgmma.mma_async" in ptx
            assert "mma.sync" not in ptx
            # float32 of the last kernel is turned round on its way, number by number
            wide = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^;]*, 0x10,", ptx)
            assert len(wide) >= 8 or (dtype == torch.float32 and name == "_kernel_gradients_kernel"), name
            # several groups of copies are under way
            assert max(map(int, re.findall(r"async_wait .*num = (\d+)", binary.asm["ttgir"]))) >= 2, name
            assert 0 < binary.metadata.shared <= 227 * 2**10
            if not cuobjdump.exists():
                continue
            cubin.write_bytes(binary.asm["cubin"])
            said = subprocess.run([cuobjdump, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
            # what spills lies in local memory, on the stack
            assert re.search(r"STACK:(\d+)", said)[1] == re.search(r"LOCAL:(\d+)", said)[1] == "0", name
