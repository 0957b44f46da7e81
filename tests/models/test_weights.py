"""load_initial_weights: every kind of file, and what does not fit."""

import os
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from awconv.errors import InputError
from awconv.layers import AWConv2d
from awconv.models import create_backbone, load_initial_weights


def lived_in(network, seed=0):
    """Gives every tensor a value of its own, as after training, and returns the network in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for key, value in network.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
        elif value.dim() == 1 and value.is_floating_point():
            value.normal_(0.0 if key.endswith(("bias", "mean")) else 1.0, 0.2, generator=generator)
        elif key.endswith("num_batches_tracked"):
            value.fill_(7)
    return network.eval()


@pytest.fixture
def source():
    return lived_in(create_backbone("resnet20", num_classes=5))


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_torchvision_resnet18_computes_the_same_in_timm(tmp_path):
    theirs = lived_in(torchvision.models.resnet18(num_classes=9))
    torch.save(theirs.state_dict(), tmp_path / "resnet18.pth")
    ours = create_backbone("resnet18", num_classes=9)
    report = load_initial_weights(ours, tmp_path / "resnet18.pth").text
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours.eval()(x), theirs(x))
    assert "122 of 122 tensors" in report
    assert "left at initialisation" not in report


LAYOUTS = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state},
    "model": lambda state: {"model": state, "optimizer": {}},
    "model_state_dict": lambda state: {"model_state_dict": state},
    "data parallel": lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
    "compiled": lambda state: {f"_orig_mod.{k}": v for k, v in state.items()},
    "lightning": lambda state: {
        "pytorch-lightning_version": "2.6.4",
        "hyper_parameters": {"backbone": "resnet20", "aw": None, "lr": 0.1},
        "callbacks": {},
        "state_dict": {f"network.{k}": v for k, v in state.items()} | {"loss.weight": torch.ones(5)},
    },
    "lightning, compiled": lambda state: {"state_dict": {f"network._orig_mod.{k}": v for k, v in state.items()}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_checkpoints(source, tmp_path, layout):
    torch.save(LAYOUTS[layout](source.state_dict()), tmp_path / "file.ckpt")
    network = create_backbone("resnet20", num_classes=5)
    report = load_initial_weights(network, str(tmp_path / "file.ckpt")).text
    for key, value in network.state_dict().items():
        assert torch.equal(value, source.state_dict()[key]), key
    assert "\n" not in report
    assert "file.ckpt" in report


def test_safetensors(source, tmp_path):
    save_file(source.state_dict(), tmp_path / "file.safetensors")
    network = create_backbone("resnet20", num_classes=5)
    load_initial_weights(network, tmp_path / "file.safetensors")
    assert torch.equal(network.eval()(images()), source(images()))


def test_a_network_whose_own_names_look_like_prefixes(tmp_path):
    source = nn.ModuleDict({"network": nn.Linear(2, 3), "head": nn.Linear(3, 2)})
    torch.save({"state_dict": source.state_dict()}, tmp_path / "bare.pth")
    torch.save({"state_dict": {f"network.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "task.ckpt")
    for file in ("bare.pth", "task.ckpt"):
        network = nn.ModuleDict({"network": nn.Linear(2, 3), "head": nn.Linear(3, 2)})
        load_initial_weights(network, tmp_path / file)
        assert torch.equal(network["network"].weight, source["network"].weight)
        assert torch.equal(network["head"].weight, source["head"].weight)


def test_files_from_before_batch_counters(source, tmp_path):
    state = {k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pth")
    network = create_backbone("resnet20", num_classes=5)
    load_initial_weights(network, tmp_path / "old.pth")
    assert torch.equal(network.eval()(images()), source(images()))


@pytest.mark.parametrize("zero_init", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_plain_file_into_aw_network_preserves_the_function(source, tmp_path, residual, zero_init):
    torch.save(source.state_dict(), tmp_path / "plain.pth")
    network = create_backbone("resnet20", num_classes=5, aw={"residual": residual, "zero_init": zero_init})
    report = load_initial_weights(network, tmp_path / "plain.pth").text
    torch.testing.assert_close(network.eval()(images()), source(images()), rtol=1e-4, atol=1e-5)
    assert "18 AW layers start function-preserving" in report
    layer = network.layer1[0].conv1
    assert isinstance(layer, AWConv2d)
    torch.testing.assert_close(layer.weight * (1.5 if residual else 0.5), source.layer1[0].conv1.weight)


def test_plain_file_into_aw_network_with_a_tied_kernel(source, tmp_path):
    """One kernel under two names is divided once."""

    def tie(network):
        network.layer1[1].conv1.weight = network.layer1[0].conv1.weight
        return network

    torch.save(tie(source).state_dict(), tmp_path / "plain.pth")
    network = tie(create_backbone("resnet20", num_classes=5, aw=True))
    load_initial_weights(network, tmp_path / "plain.pth")
    torch.testing.assert_close(network.eval()(images()), source(images()), rtol=1e-4, atol=1e-5)


def test_plain_file_into_a_network_that_ties_an_aw_kernel_to_a_plain_one(source, tmp_path):
    """No rescaling preserves both; nothing is loaded."""
    torch.save(source.state_dict(), tmp_path / "plain.pth")
    network = create_backbone("resnet20", num_classes=5, aw={"exclude": "layer1.1.conv1"})
    network.layer1[1].conv1.weight = network.layer1[0].conv1.weight
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(InputError, match=r"initial_weights=.*layer1\.0\.conv1 and layer1\.1\.conv1 share") as caught:
        load_initial_weights(network, tmp_path / "plain.pth")
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_aw_file_into_aw_network_is_exact(tmp_path):
    source = lived_in(create_backbone("resnet20", aw=True, num_classes=5))
    torch.save({"state_dict": {f"network.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "aw.ckpt")
    network = create_backbone("resnet20", aw=True, num_classes=5)
    report = load_initial_weights(network, tmp_path / "aw.ckpt").text
    for key, value in network.state_dict().items():
        assert torch.equal(value, source.state_dict()[key]), key
    assert "function-preserving" not in report


@pytest.mark.parametrize(("name", "head"), [("resnet20", "fc"), ("mobilenetv2_035", "classifier")])
def test_classifier_of_other_classes_keeps_its_initialisation(tmp_path, name, head):
    source = lived_in(create_backbone(name, num_classes=5))
    torch.save(source.state_dict(), tmp_path / "five.pth")
    network = create_backbone(name, num_classes=3)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    report = load_initial_weights(network, tmp_path / "five.pth").text
    for key, value in network.state_dict().items():
        expected = before if key.startswith(f"{head}.") else source.state_dict()
        assert torch.equal(value, expected[key]), key
    assert f"{head}.weight, {head}.bias" in report
    assert "the file has 5 classes, the network 3" in report


@pytest.mark.parametrize(
    ("file", "network", "says"),
    [
        ({"name": "resnet18"}, {"name": "resnet20"}, ["CIFARResNet", "likely cause: another architecture"]),
        ({"name": "resnet20"}, {"name": "resnet32"}, ["60 missing", "layer1.3.conv1.weight (16, 16, 3, 3)"]),
        ({"name": "resnet32"}, {"name": "resnet20"}, ["72 unknown", "another architecture"]),
        ({"aw": True}, {}, ["216 unknown", "the file is of an AW network"]),
        ({"aw": {"share": 8}}, {"aw": {"share": 4}}, ["of another shape", "other AW options"]),
        ({"attention": "se"}, {}, ["36 unknown", "another activation attention"]),
        ({}, {"attention": "se"}, ["36 missing", "another activation attention"]),
        ({}, {"attention": "bam"}, ["missing", "layer1.bam", "another activation attention"]),
        ({"aw": True, "attention": "se"}, {}, ["AW network", "and another activation attention"]),
        ({"in_channels": 1}, {}, ["(16, 1, 3, 3), not (16, 3, 3, 3)", "number of image channels"]),
        ({"name": "resnet18", "stem": "cifar"}, {"name": "resnet18"}, ["conv1.weight", "another stem"]),
    ],
)
def test_files_that_do_not_fit(tmp_path, file, network, says):
    base = {"name": "resnet20", "num_classes": 5}
    torch.save(create_backbone(**base | file).state_dict(), tmp_path / "other.pth")
    net = create_backbone(**base | network)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(InputError) as caught:
        load_initial_weights(net, tmp_path / "other.pth")
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in [*says, "other.pth"] if part not in message] == []
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key


class Payload:
    """An object whose unpickling leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_code_in_a_file_is_refused_and_not_run(source, tmp_path):
    mark = tmp_path / "mark"
    torch.save({"state_dict": source.state_dict(), "extra": Payload(mark)}, tmp_path / "evil.ckpt")
    with pytest.raises(InputError, match=r"carries code.*mkdir.*weights-only.*torch\.save"):
        load_initial_weights(source, tmp_path / "evil.ckpt")
    assert not mark.exists()
    # the payload is live: without the guard it would have run
    torch.load(tmp_path / "evil.ckpt", weights_only=False)
    assert mark.exists()


def test_a_pickled_network_is_refused_with_the_way_to_convert_it(source, tmp_path):
    torch.save(source, tmp_path / "whole.pth")
    with pytest.raises(InputError, match=r"CIFARResNet.*torch\.save\(model\.state_dict\(\)"):
        load_initial_weights(source, tmp_path / "whole.pth")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2000])


NOT_CHECKPOINTS = {
    "text.pth": (lambda path: path.write_text("hello"), "is not a checkpoint"),
    "empty.ckpt": (lambda path: path.write_bytes(b""), "is not a checkpoint"),
    "picture.pth": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99)), "is not a checkpoint"),
    "text.safetensors": (lambda path: path.write_text("hello"), "is not a checkpoint"),
    "cut.pth": (lambda path: (torch.save({"a": torch.ones(999)}, path), truncate(path)), "is not a checkpoint"),
    "list.pth": (lambda path: torch.save([1, 2], path), "holds no state dictionary but a list"),
    "dict.pth": (lambda path: torch.save({"epoch": 1, "w": torch.ones(2)}, path), "a dict with 'epoch', 'w'"),
    "none.pth": (lambda path: torch.save({"state_dict": {}}, path), "holds no state dictionary"),
    "folder.ckpt": (lambda path: path.mkdir(), "is a folder"),
    "missing.ckpt": (lambda path: None, "does not exist"),
}


@pytest.mark.parametrize("name", NOT_CHECKPOINTS)
def test_files_that_are_no_checkpoints(source, tmp_path: Path, name):
    make, says = NOT_CHECKPOINTS[name]
    make(tmp_path / name)
    with pytest.raises(InputError) as caught:
        load_initial_weights(source, tmp_path / name)
    assert says in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
