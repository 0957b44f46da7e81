"""What the attention of a network does on given pictures: the maps A of its AW layers, and statistics of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from awconv.errors import InputError, require_int
from awconv.layers import AWConv2d

DEAD_BELOW = 0.01
"""A map is dead whose values differ between samples by less (root mean square over the kernel): 1 + A hardly does."""
SATURATED_BELOW, SATURATED_ABOVE = 0.05, 0.95
"""A value outside is saturated: a sigmoid passes on less than a fifth of the gradient that it does at 1/2."""
HISTOGRAM_BINS = 60
"""Equal bins over [0, 1]; 1/2 and the bounds of saturation are edges."""

Images = Tensor | Sequence[Tensor]


@dataclass(frozen=True, eq=False)
class AttentionStatistics:
    """What a layer's attention A was over N samples: the compact maps (N, C2, C1 / groups / share, kh, kw).

    None of it depends on how the samples were cut into batches (to rounding). What compares samples is NaN for one
    sample.

    Attributes:
        samples: N.
        mean: Mean of all values.
        std: Standard deviation of all values of all samples about that mean (divided by their number).
        spread: How much A differs between samples: the root mean square, over all positions (channels and kernel), of
            the standard deviation between samples at a position (divided by N - 1). At most about 1/2.
        dead: Share of the maps (kh, kw) whose own such root mean square, over the kernel, is below 0.01: they scale
            every sample's kernel alike.
        saturated: Share of all values below 0.05 or above 0.95.
        histogram: Number of values in each of 60 equal bins over [0, 1], int64; 1 counts to the last.
        average: The mean sample: (C2, C1 / groups / share, kh, kw), float32.
    """

    samples: int
    mean: float
    std: float
    spread: float
    dead: float
    saturated: float
    histogram: npt.NDArray[np.int64]
    average: npt.NDArray[np.float32]


def collect_attention(
    network: nn.Module, images: Images, layers: str | Sequence[str] | None = None, *, batch_size: int = 32
) -> dict[str, Tensor]:
    """Computes the attention maps of all pictures: for each AW layer, all N sets of them.

    The network runs in evaluation mode, without gradients and uncompiled, and is left as it was: modes, running
    statistics and random numbers included. Of a torchvision detector only what comes before the heads runs.

    The maps of a large network are many: 5 MB a picture for a ResNet-101 with the defaults. For statistics of them
    use :func:`measure_attention`, which keeps none.

    Args:
        network: A network, or a LightningModule with a ``network`` or a ``forward`` of its own.
        images: What the network takes, on any device: (N, C, H, W), or N pictures (C, H, W) of any sizes; uint8 is
            divided by 255. Pictures of other sizes run apart, so that none is padded to another's size.
        layers: Glob pattern or patterns of module names (``"layer3.*"``); None takes every AW layer.
        batch_size: Pictures that run at a time.

    Returns:
        By the layer's name in the network, float32 on the CPU: (N, C2, C1 / groups / share, kh, kw), one value for
        each ``share`` consecutive input channels. Layers that the pictures do not reach are left out; of a layer that
        they reach several times, the first time counts.

    Raises:
        InputError: If there are no pictures or no AW layers, a pattern matches none (the message lists what there
            is), or a layer sees something else than the pictures (regions of them, say).
    """
    collected: dict[str, Tensor] = {}
    total = len(images)

    def keep(name: str, places: list[int], maps: Tensor) -> None:
        if name not in collected:
            collected[name] = torch.empty((total, *maps.shape[1:]))
        collected[name][places] = maps

    chosen = run_attention(network, images, layers, keep, batch_size=batch_size)
    return {name: collected[name] for name in chosen if name in collected}


def measure_attention(
    network: nn.Module, images: Images, layers: str | Sequence[str] | None = None, *, batch_size: int = 32
) -> dict[str, AttentionStatistics]:
    """Computes statistics of each AW layer's attention, reduced on the fly; see :func:`collect_attention`.

    Returns:
        By the layer's name, its statistics over all pictures.

    Raises:
        InputError: As :func:`collect_attention` does.
    """
    running: dict[str, RunningStatistics] = {}

    def reduce(name: str, places: list[int], maps: Tensor) -> None:
        running.setdefault(name, RunningStatistics()).add(maps)

    chosen = run_attention(network, images, layers, reduce, batch_size=batch_size)
    return {name: running[name].result() for name in chosen if name in running}


class RunningStatistics:
    """The sums from which :class:`AttentionStatistics` follow, so that no more than a batch is ever held."""

    def __init__(self) -> None:
        self.samples = 0
        self._saturated = 0
        self._histogram = torch.zeros(HISTOGRAM_BINS, dtype=torch.int64)

    def add(self, maps: Tensor) -> None:
        """Adds (n, C2, C1 / groups / share, kh, kw), n at least 1."""
        values = maps.detach().to("cpu", torch.float64)
        if not self.samples:
            # Deviations from a sample, unlike the values, are of the size of what is to be found: their squares
            # lose nothing, and are exactly zero where nothing differs.
            self._first = values[0].clone()
            self._sum, self._squares = torch.zeros_like(self._first), torch.zeros_like(self._first)
        deviations = values - self._first
        self._sum += deviations.sum(dim=0)
        self._squares += deviations.square_().sum(dim=0)
        self._saturated += int(((values < SATURATED_BELOW) | (values > SATURATED_ABOVE)).sum())
        self._histogram += torch.histc(values, HISTOGRAM_BINS, 0, 1).long()
        self.samples += len(values)

    def result(self) -> AttentionStatistics:
        """Gives the statistics of all that was added."""
        n = self.samples
        average = self._first + self._sum / n
        squares = (self._squares - self._sum.square() / n).clamp(min=0)
        mean = average.mean()
        # between samples / (n - 1), mean over the kernel of each map
        variances = (squares / (n - 1) if n > 1 else torch.full_like(squares, torch.nan)).mean(dim=(-2, -1))
        dead = (variances.sqrt() < DEAD_BELOW).double().mean()
        return AttentionStatistics(
            samples=n,
            mean=mean.item(),
            std=(squares / n + (average - mean).square()).mean().sqrt().item(),
            spread=variances.mean().sqrt().item(),
            dead=dead.item() if n > 1 else float("nan"),
            saturated=self._saturated / (n * average.numel()),
            histogram=self._histogram.numpy().copy(),
            average=average.float().numpy(),
        )


# ---- running a network, and listening to it --------------------------------------------------------------------------


def network_of(module: nn.Module) -> nn.Module:
    """The ``network`` of a task; whatever else is given, as it is."""
    network = getattr(module, "network", None)
    return network if isinstance(network, nn.Module) else module


def aw_layers(network: nn.Module) -> dict[str, AWConv2d]:
    """The AW layers by their names, which do not tell whether the network is compiled."""
    return {
        name.replace("_orig_mod.", "").removesuffix("_orig_mod") or type(module).__name__: module
        for name, module in network.named_modules()
        if isinstance(module, AWConv2d)
    }


def choose_layers(
    argument: str, patterns: str | Sequence[str] | None, there: Mapping[str, AWConv2d]
) -> dict[str, AWConv2d]:
    """The layers whose names match a glob pattern; all for None.

    Raises:
        InputError: If a pattern matches none.
    """
    if patterns is None:
        return dict(there)
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in there):
            raise InputError(f"{argument} pattern {pattern!r} matches no AW layer; there are {', '.join(there)}")
    return {name: layer for name, layer in there.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}


@contextmanager
def listening(layers: Mapping[str, AWConv2d], hear: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Hands every A that the layers compute, (N, C2, C1 / groups / share, kh, kw), to ``hear(name, A)``.

    What is compiled runs uncompiled meanwhile: to compiled code such a listener would come too late, or stay for ever.
    """

    def listener(name: str, layer: AWConv2d) -> Callable[[Any, Any, Any], None]:
        maps = layer.in_channels // layer.groups // layer.share

        def hook(module: Any, inputs: Any, output: Any) -> None:
            # distributed tensors are left alone: one process cannot look at them without the others
            if type(output) is Tensor:
                # a head of one's own may give its maps as channels
                hear(name, output.detach().reshape(len(output), layer.out_channels, maps, *output.shape[-2:]))

        return hook

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.attention.register_forward_hook(listener(name, layer)).remove)
        # what nobody has imported has compiled nothing, and takes seconds to import
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def run_attention(
    network: nn.Module,
    images: Images,
    layers: str | Sequence[str] | None,
    receive: Callable[[str, list[int], Tensor], None],
    *,
    batch_size: int = 32,
) -> list[str]:
    """Runs a network on pictures for its attention alone; arguments and errors as :func:`collect_attention`.

    Args:
        network: See there.
        images: See there.
        layers: See there.
        receive: Called with a layer's name, the places of some pictures among ``images``, and their maps (n, C2,
            C1 / groups / share, kh, kw), float32 on the CPU, while the network runs: what it does not keep is gone.
        batch_size: See there.

    Returns:
        The names of the layers that were chosen, in the order of the network's modules.
    """
    network = network_of(network)
    require_int("batch_size", batch_size, "a whole number of pictures, at least 1", low=1)
    there = aw_layers(network)
    if not there:
        raise InputError(f"network={type(network).__name__} has no AW layers; awconv.layers.convert_to_aw makes some")
    chosen = choose_layers("layers", layers, there)
    pictures = _checked(images)
    places: list[int] = []
    heard: set[str] = set()

    def hear(name: str, maps: Tensor) -> None:
        if name in heard:
            return
        if len(maps) != len(places):
            raise InputError(
                f"layer {name!r} sees {len(maps)} inputs for {len(places)} pictures: leave it out with layers=, which "
                f"matches {', '.join(chosen)}"
            )
        heard.add(name)
        receive(name, places, maps.to("cpu", torch.float32))

    forward = _part_before_heads(network, chosen)
    with _evaluating(network), listening(chosen, hear):
        for places in _batches(pictures, batch_size):
            heard.clear()
            forward([pictures[place] for place in places])
    return list(chosen)


def _checked(images: Images) -> Sequence[Tensor]:
    shapes = [tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__ for image in images]
    if not shapes:
        raise InputError("images is empty: expected at least one picture")
    if wrong := [shape for shape in shapes if not isinstance(shape, tuple) or len(shape) != 3]:
        raise InputError(
            f"images holds {wrong[0]}: expected a tensor (N, C, H, W) or a list of pictures, tensors (C, H, W)"
        )
    return list(images)


def _batches(pictures: Sequence[Tensor], batch_size: int) -> Iterator[list[int]]:
    """Cuts pictures into batches of one size each."""
    of_size: dict[torch.Size, list[int]] = {}
    for place, picture in enumerate(pictures):
        of_size.setdefault(picture.shape, []).append(place)
    for places in of_size.values():
        yield from (places[start : start + batch_size] for start in range(0, len(places), batch_size))


def _part_before_heads(network: Any, layers: Mapping[str, AWConv2d]) -> Callable[[list[Tensor]], Any]:
    """What computes the attention of some pictures: the network, or what of a torchvision detector has the layers."""
    like = next(p for p in network.parameters() if p.is_floating_point())

    def floats(pictures: Sequence[Tensor]) -> list[Tensor]:
        return [p.to(like.device, like.dtype) / (1 if p.is_floating_point() else 255) for p in pictures]

    detector = isinstance(getattr(network, "transform", None), GeneralizedRCNNTransform)
    if not detector:
        return lambda pictures: network(torch.stack(floats(pictures)))
    inside = set(network.backbone.modules())
    if all(layer in inside for layer in layers.values()):
        return lambda pictures: network.backbone(network.transform(floats(pictures))[0].tensors)
    return lambda pictures: network(floats(pictures))


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, after which every module and the random numbers are as they were."""
    modes = {module: module.training for module in network.modules()}
    devices = {parameter.device for parameter in network.parameters() if parameter.device.type == "cuda"}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=list(devices)):
            network.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
