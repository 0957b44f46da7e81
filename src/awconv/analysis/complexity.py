"""What a network costs: parameters, floating-point operations and activation memory, per layer and in total.

Run it as ``python -m awconv.analysis.complexity -c RECIPE -c MODEL``, with the flags of ``lightning_cli.py fit``.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from awconv.analysis.command import OneLineParser, aligned_table
from awconv.errors import InputError
from awconv.layers import AWConv2d
from awconv.quiet import silence_libraries

_BATCH = 2  # of one picture a normalisation makes no mean


@dataclass
class LayerCost:
    """What one layer costs.

    Attributes:
        name: Its name in the network.
        kind: Its class.
        output: Shape of its output for one picture, without the batch; empty where that is no tensor.
        parameters: Number of parameters, its children's included.
        flops: Floating-point operations for one picture, forward.
        activations: Bytes that it keeps for the backward pass, for one picture.
    """

    name: str
    kind: str
    output: tuple[int, ...]
    parameters: int
    flops: int
    activations: int


def measure_complexity(network: nn.Module, pictures: Sequence[Tensor], targets: Any = None) -> list[LayerCost]:
    """Counts what every layer of a network costs for one picture.

    Operations are those of convolutions and matrix products, two for a multiplication with its addition (many papers
    call those one), and of AW layers also what scales the kernels, one for each of their weights and each picture:
    every picture has kernels of its own. Normalisations, activations and pooling are not counted. An AW layer is one
    row, its attention head included.

    Activation memory is what autograd keeps after a forward pass in training mode, each storage once, in the layer that
    first keeps it; parameters and buffers do not count. AW layers keep what their backend does, and with ``"auto"``
    what the fused one does, which large layers and GPUs take.

    Args:
        network: The network; it is put back into its mode, and its statistics stay as they were.
        pictures: N pictures (C, H, W) of one size, N at least 2.
        targets: What a detector needs in training mode: N dictionaries of ``boxes`` and ``labels``. What its heads
            cost depends on how many regions are proposed, so that an untrained one may differ from a trained one.

    Returns:
        A row for each layer that has parameters or operations, in the order of the forward pass, and a last one with
        the name ``total``.
    """
    rows = _Rows(network)
    detector = targets is not None
    state = {name: value.clone() for name, value in network.state_dict().items()}
    mode = network.training
    backends = {module: module.backend for module in network.modules() if isinstance(module, AWConv2d)}
    try:
        for module in backends:
            module.backend = "grouped"  # whose operations the counter knows
        inputs: Any = list(pictures) if detector else torch.stack(list(pictures))
        network.eval()
        with torch.no_grad(), rows.watching(), FlopCounterMode(display=False) as counter:
            network(inputs)
        flops = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
        prefix = type(network).__name__
        for module, backend in backends.items():
            module.backend = "fused" if backend == "auto" else backend
        network.train()
        with rows.watching(), torch.autograd.graph.saved_tensors_hooks(rows.keep, lambda kept: kept):
            network(inputs, targets) if detector else network(inputs)
    finally:
        for module, backend in backends.items():
            module.backend = backend
        network.load_state_dict(state)
        network.train(mode)
    scaling = {name: layer.weight.numel() for name, layer in rows.layers.items() if isinstance(layer, AWConv2d)}
    batch = len(pictures)
    found = [
        LayerCost(
            name,
            type(layer).__name__,
            rows.outputs.get(name, ()),
            sum(p.numel() for p in layer.parameters()),
            flops.get(f"{prefix}.{name}", 0) // batch + scaling.get(name, 0) * (name in rows.outputs),
            rows.kept.get(name, 0) // batch,
        )
        for name, layer in rows.in_order()
    ]
    total = LayerCost(
        "total",
        prefix,
        (),
        sum(p.numel() for p in network.parameters()),
        flops.get("Global", 0) // batch + sum(scaling[name] for name in scaling if name in rows.outputs),
        sum(rows.kept.values()) // batch,
    )
    return [row for row in found if row.parameters or row.flops or row.activations] + [total]


class _Rows:
    """The layers that make up a table's rows, and what is seen of them while the network runs."""

    def __init__(self, network: nn.Module) -> None:
        self.layers: dict[str, nn.Module] = {}
        self._collect(network, "")
        self.outputs: dict[str, tuple[int, ...]] = {}
        self.kept: dict[str, int] = {}
        self._running: list[str] = []
        self._seen: set[int] = set()
        self._alive: list[Tensor] = []
        constant = [*network.parameters(), *network.buffers()]
        self._constant = {tensor.untyped_storage().data_ptr() for tensor in constant}

    def _collect(self, module: nn.Module, name: str) -> None:
        if isinstance(module, AWConv2d) or not any(True for _ in module.children()):
            self.layers[name] = module
            return
        for child_name, child in module.named_children():
            self._collect(child, f"{name}.{child_name}" if name else child_name)

    def in_order(self) -> Iterator[tuple[str, nn.Module]]:
        """Gives the layers as they ran, then those that did not."""
        for name in self.outputs:
            yield name, self.layers[name]
        for name, layer in self.layers.items():
            if name not in self.outputs:
                yield name, layer

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Notes which layer runs, and what it gives."""

        def enter(name: str) -> Callable[..., None]:
            return lambda module, inputs: self._running.append(name)

        def leave(name: str) -> Callable[..., None]:
            def note(module: nn.Module, inputs: Any, output: Any) -> None:
                self._running.pop()
                self.outputs.setdefault(name, tuple(output.shape[1:]) if isinstance(output, Tensor) else ())

            return note

        hooks = [
            hook
            for name, layer in self.layers.items()
            for hook in (layer.register_forward_pre_hook(enter(name)), layer.register_forward_hook(leave(name)))
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def keep(self, tensor: Tensor) -> Tensor:
        """Counts a tensor that autograd saves."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._constant | self._seen:
            self._seen.add(storage.data_ptr())
            self._alive.append(tensor.detach())  # or its address could be another's next
            name = self._running[-1] if self._running else "(between the layers)"
            self.kept[name] = self.kept.get(name, 0) + storage.nbytes()
        return tensor


def main(args: Sequence[str] | None = None) -> None:
    """Prints the table of a config.

    Args:
        args: The words after the program's name; ``sys.argv[1:]`` if None.
    """
    from awconv.cli.messages import bad_input, fail

    parser = OneLineParser(
        prog="python -m awconv.analysis.complexity",
        description="Parameters, operations and activation memory of a config's network, for one picture of the size "
        "at which it is evaluated, per layer and in total.",
        epilog="All other arguments are those of lightning_cli.py fit: -c RECIPE -c MODEL --flags. The data must be "
        "there, since they decide on the classes; without them call measure_complexity in Python.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to a new file too")
    parser.add_argument("--total", action="store_true", help="the last row alone")
    own, rest = parser.parse_known_args(sys.argv[1:] if args is None else list(args))
    silence_libraries()
    try:
        if own.json is not None and (own.json.exists() or not own.json.parent.is_dir()):
            raise InputError(f"json={str(own.json)!r}: expected a new file in a folder that is there; name another")
        rows, size = _of_config(rest)
    except Exception as error:
        if said := bad_input(error):
            fail(said)
        raise
    print(f"one picture of {size}; an operation is a multiplication or an addition")
    print(format_table(rows[-1:] if own.total else rows))
    if own.json is not None:
        own.json.write_text(
            json.dumps({"picture": size, "layers": [asdict(row) for row in rows]}, indent=1) + "\n", encoding="utf-8"
        )


def format_table(rows: Sequence[LayerCost]) -> str:
    """Formats rows as a Markdown table."""
    titles = ["layer", "class", "output", "parameters", "operations, M", "activations, MiB"]
    cells = [
        [
            row.name,
            row.kind,
            "x".join(map(str, row.output)),
            f"{row.parameters:,}",
            f"{row.flops / 1e6:,.2f}",
            f"{row.activations / 2**20:,.2f}",
        ]
        for row in rows
    ]
    return aligned_table(titles, cells, left=3)


def _of_config(words: Sequence[str]) -> tuple[list[LayerCost], str]:
    from awconv.cli import AWConvCLI
    from awconv.tasks import DetectionTask

    class Built(AWConvCLI):
        """Builds what a config says, and runs nothing."""

        def _run_subcommand(self, subcommand: str) -> None:
            pass

    anywhere = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto"]
    anywhere += ["--trainer.logger=false", "--trainer.sync_batchnorm=false", "--trainer.precision=32-true"]
    task: Any = Built(["fit", *words, *anywhere]).model
    if isinstance(task, DetectionTask):
        transform: Any = task.network.transform
        height, width = int(transform.min_size[-1]), int(transform.max_size)
        pictures = [torch.rand(3, height, width) for _ in range(_BATCH)]
        box = torch.tensor([[0.25 * width, 0.25 * height, 0.75 * width, 0.75 * height]])
        targets = [{"boxes": box, "labels": torch.tensor([1])} for _ in range(_BATCH)]
        return measure_complexity(task.network, pictures, targets), f"3x{height}x{width}"
    example = task.example_input_array
    if not isinstance(example, Tensor) or example.dim() != 4:
        raise InputError(
            f"model={type(task).__name__} has no example_input_array (N, C, H, W); set it, or call measure_complexity"
        )
    picture = torch.rand(example.shape[1:])
    return measure_complexity(task.network, [picture] * _BATCH), "x".join(map(str, picture.shape))


if __name__ == "__main__":
    main()
