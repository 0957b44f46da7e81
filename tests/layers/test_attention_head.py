"""The attention head where PointConv2 and its normalisation are computed as one, against the two of them apart."""

import copy

import pytest
import torch
from oracle import literal_attention, randomise
from torch import nn

from awconv.layers import AWConv2d, attention_head, aw_conv2d

# channels in and out, kernel, and options of the layer
LAYERS = {
    "plain": ((12, 10, 3), {"share": 4, "reduction": 2}),
    "share 1, rectangular": ((6, 8, (2, 3)), {"share": 1}),
    "groups": ((12, 8, 3), {"groups": 2, "share": 3}),
    "head groups": ((16, 8, 3), {"share": 4, "reduction": 4, "head_groups": 4}),
    "hidden groups": ((16, 12, (3, 1)), {"share": 1, "head_groups": 4}),
}


@pytest.fixture
def as_one(monkeypatch):
    """Lets every head compute as one, and lists what they were given when they did."""
    monkeypatch.setattr(attention_head, "_MANY_MAPS", 0)
    monkeypatch.setattr(attention_head, "_VALUES_A_WEIGHT", 0)
    taken = []
    compute = attention_head.AttentionHead._normalised

    def spy(self, hidden, *parts):
        taken.append(hidden)
        return compute(self, hidden, *parts)

    monkeypatch.setattr(attention_head.AttentionHead, "_normalised", spy)
    return taken


@pytest.fixture
def apart(monkeypatch):
    monkeypatch.setattr(attention_head, "_MANY_MAPS", 2**60)


def layer_of(name, dtype=torch.float64):
    arguments, options = LAYERS[name]
    torch.manual_seed(0)
    return randomise(AWConv2d(*arguments, **options)).to(dtype)


def images(layer, samples=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, layer.in_channels, 7, 6, generator=generator, dtype=torch.float64).to(dtype)


def gradients(layer, x):
    """Of a weighted sum of the maps, by the input and by every parameter of the head."""
    x = x.clone().requires_grad_()
    maps = layer.attention_maps(x)
    weights = torch.randn(maps.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    names, parameters = zip(*layer.attention.named_parameters(), strict=True)
    return dict(zip(("input", *names), torch.autograd.grad((maps * weights).sum(), [x, *parameters]), strict=True))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_is_the_formula(name, training, as_one):
    layer = layer_of(name).train(training)
    x = images(layer)
    expected = torch.from_numpy(literal_attention(layer, x.numpy(), layer.share))
    torch.testing.assert_close(layer.attention_maps(x), expected, rtol=1e-11, atol=1e-12)
    assert len(as_one) == 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_the_two_apart(name, training, as_one, monkeypatch):
    layer = layer_of(name).train(training)
    x = images(layer)
    got = gradients(layer, x)
    assert len(as_one) == 1
    monkeypatch.setattr(attention_head, "_MANY_MAPS", 2**60)
    expected = gradients(layer, x)
    assert len(as_one) == 1
    for part, gradient in got.items():
        torch.testing.assert_close(gradient, expected[part], rtol=1e-9, atol=1e-11, msg=part)


def test_derivatives_against_finite_differences(as_one):
    layer = AWConv2d(8, 6, 2, share=4).double()
    randomise(layer)
    names, parameters = zip(*layer.attention.named_parameters(), strict=True)
    parameters = [p.detach().requires_grad_() for p in parameters]
    x = images(layer, samples=3).requires_grad_()

    def maps(x, *parameters):
        return torch.func.functional_call(layer.attention, dict(zip(names, parameters, strict=True)), x[..., :2, :2])

    assert torch.autograd.gradcheck(maps, (x, *parameters))
    assert torch.autograd.gradgradcheck(maps, (x, *parameters))
    assert as_one


def test_a_silent_head_is_one_half_and_learns(as_one):
    layer = AWConv2d(16, 8, 3)  # zero_init: the last normalisation is zero
    maps = layer.attention_maps(torch.randn(4, 16, 8, 8))
    assert torch.equal(maps, torch.full_like(maps, 0.5))
    (maps * torch.randn_like(maps)).sum().backward()
    assert layer.attention.norm2.weight.grad.abs().sum() > 0
    assert as_one


@pytest.mark.parametrize("name", ["plain", "head groups"])
def test_running_statistics_are_batch_norms_own(name, as_one, monkeypatch):
    layer = layer_of(name)
    layer.attention.norm2.momentum = 0.3
    twin = copy.deepcopy(layer)
    for step in range(3):
        layer(images(layer, seed=step))
    assert len(as_one) == 3
    monkeypatch.setattr(attention_head, "_MANY_MAPS", 2**60)
    for step in range(3):
        twin(images(layer, seed=step))
    assert len(as_one) == 3
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[key], value, rtol=1e-11, atol=1e-12, msg=key)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("way", ["autocast", "bfloat16"])
def test_low_precision_is_as_exact_as_the_two_apart(way, training, as_one, monkeypatch):
    layer = layer_of("plain", torch.float32).train(training)
    x = images(layer, samples=16, dtype=torch.float32)
    exact = copy.deepcopy(layer).double().attention_maps(x.double())

    def error():
        network = copy.deepcopy(layer)
        if way == "bfloat16":
            return (network.bfloat16().attention_maps(x.bfloat16()) - exact).abs().max().item()
        with torch.autocast("cpu", torch.bfloat16):
            return (network.attention_maps(x) - exact).abs().max().item()

    taken = len(as_one)
    got = error()
    assert len(as_one) == taken + 1
    monkeypatch.setattr(attention_head, "_MANY_MAPS", 2**60)
    assert got < 1.5 * error() < 0.03


def replace_norm(norm):
    def change(head):
        head.norm2 = norm(head.norm2)

    return change


def hear(part):
    def change(head):
        getattr(head, part).register_forward_hook(lambda module, inputs, output: output * 2)

    return change


@pytest.mark.parametrize(
    "change",
    [
        hear("conv2"),
        hear("norm2"),
        replace_norm(lambda norm: nn.BatchNorm2d(norm.num_features, affine=False)),
        replace_norm(lambda norm: nn.BatchNorm2d(norm.num_features, momentum=None)),
        replace_norm(lambda norm: nn.BatchNorm2d(norm.num_features, track_running_stats=False)),
        replace_norm(lambda norm: nn.GroupNorm(1, norm.num_features)),
        replace_norm(lambda norm: nn.Identity()),
        lambda head: nn.utils.parametrizations.weight_norm(head.conv2),
        lambda head: setattr(head, "conv2", nn.Conv2d(head.conv2.in_channels, head.conv2.out_channels, 1, bias=True)),
    ],
    ids=[
        "hook on conv2",
        "hook on norm2",
        "no affine",
        "cumulative",
        "no statistics",
        "GroupNorm",
        "no norm",
        "weight norm",
        "bias",
    ],
)
def test_what_was_changed_is_called(change, as_one):
    """A part that does something else than at first, or that somebody listens to, is not passed over."""
    head = layer_of("plain", torch.float32).attention
    pooled = torch.randn(4, 12, 3, 3)
    change(head)
    expected = head.sigmoid(head.norm2(head.conv2(head.relu(head.norm1(head.conv1(pooled))))))
    torch.testing.assert_close(head(pooled), expected.unflatten(1, (10, 3)))
    assert not as_one


@pytest.mark.parametrize("spread", [1e-1, 1e-2, 1e-3])
def test_hidden_channels_that_are_much_alike(spread, as_one, monkeypatch):
    """In float32: a map that hardly sees what the channels share has a variance that is a small difference."""
    torch.manual_seed(0)
    head = AWConv2d(64, 64, 3, share=1, reduction=2).attention
    head.norm1 = head.relu = nn.Identity()
    randomise(head.norm2)
    nn.init.eye_(head.conv1.weight.data[:, :, 0, 0])
    shared = torch.randn(16, 1, 3, 3)
    pooled = (shared + spread * torch.randn(16, 64, 3, 3)).contiguous()
    with torch.no_grad():  # most rows see hardly anything of the shared direction
        head.conv2.weight -= (1 - spread) * head.conv2.weight.mean(1, keepdim=True)
    exact = copy.deepcopy(head).double()(pooled.double())
    torch.set_float32_matmul_precision("medium")
    try:
        got = head(pooled)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(as_one) == 2
    monkeypatch.setattr(attention_head, "_MANY_MAPS", 2**60)
    apart = (head(pooled) - exact).abs().max()
    assert (got - exact).abs().max() < 5 * apart + 1e-5
    assert head.norm2.running_var.min() >= 0


def kept(call):
    """Bytes of the distinct tensors that autograd keeps."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    return sum(storages.values()), output


def test_the_maps_are_kept_once():
    """At 512 channels they are six times as many numbers as the picture has, so that this is what training holds."""
    layer = AWConv2d(512, 512, 3)
    pooled = torch.randn(16, 512, 3, 3)
    constant = sum(p.nbytes for p in layer.attention.parameters())
    found, attention = kept(lambda: layer.attention(pooled))
    assert attention.nbytes < found < 1.1 * attention.nbytes + 3 * constant  # and weights, scaled and multiplied
    apart, _ = kept(lambda: layer.attention.norm2(layer.attention.conv2(torch.randn(16, 32, 3, 3))).sigmoid())
    assert apart > 2 * attention.nbytes
    # as the fused kernels read them
    assert attention.shape == (16, 512, 32, 3, 3)
    assert attention.movedim(1, -1).movedim(1, 3).is_contiguous()


class Warmer(attention_head.AttentionHead):
    """A head of one's own, which reads its logits at half their size."""

    def forward(self, pooled):
        return (self.logits(pooled) / 2).sigmoid()


def halved(layer):
    torch.manual_seed(0)
    layer.attention.__class__ = Warmer


def wrapped(layer):
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inner, name)

        def forward(self, pooled):
            return self.inner(pooled) / 2

    layer.attention = Wrapper(layer.attention)


def sequential(layer):
    maps = layer.out_channels * layer.in_channels // layer.share
    layer.attention = nn.Sequential(nn.Conv2d(layer.in_channels, maps, 1), nn.Sigmoid())


def on_the_instance(layer):
    compute = layer.attention.forward
    layer.attention.forward = lambda pooled: compute(pooled) / 2


@pytest.mark.parametrize("change", [halved, wrapped, sequential, on_the_instance])
def test_another_head_is_the_one_that_counts(change):
    torch.manual_seed(0)
    layer = randomise(AWConv2d(16, 12, 3, padding=1)).eval()
    image = torch.randn(2, 16, 8, 8)
    before = layer(image)
    change(layer)
    maps = layer.attention(nn.functional.adaptive_avg_pool2d(image, 3)).reshape(2, 12, 1, 3, 3)
    output = layer(image)
    torch.testing.assert_close(output, aw_conv2d(image, layer.weight, maps, layer.bias, padding=1))
    torch.testing.assert_close(layer.attention_maps(image), maps.repeat_interleave(16, dim=2))
    assert not torch.allclose(output, before, atol=1e-3)


def test_few_maps_or_few_values_are_computed_apart(monkeypatch):
    def refuse(self, *arguments):
        raise AssertionError

    monkeypatch.setattr(attention_head.AttentionHead, "_normalised", refuse)
    AWConv2d(64, 64, 3)(torch.randn(16, 64, 8, 8))
    AWConv2d(512, 512, 3).eval()(torch.randn(1, 512, 7, 7))
    with pytest.raises(AssertionError):
        AWConv2d(256, 256, 3)(torch.randn(16, 256, 8, 8))


@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_graph_breaks(training, as_one):
    layer = layer_of("plain", torch.float32).train(training)
    x = images(layer, dtype=torch.float32)
    expected = copy.deepcopy(layer)(x)
    output = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_on_the_meta_device(as_one):
    layer = AWConv2d(16, 8, 3, share=4, device="meta")
    assert layer.attention_maps(torch.empty(4, 16, 8, 8, device="meta")).shape == (4, 8, 16, 3, 3)
    assert as_one


def test_names_are_those_of_every_checkpoint_so_far():
    names = set(AWConv2d(16, 16, 3).state_dict())
    norms = {
        f"norm{i}.{k}" for i in (1, 2) for k in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    assert names == {"weight", "bias"} | {f"attention.{k}" for k in norms | {"conv1.weight", "conv2.weight"}}
