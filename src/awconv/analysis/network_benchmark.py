"""What whole networks cost in time and memory, AW beside their plain twins and beside SE.

Run it as ``python -m awconv.analysis.benchmark network``.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

from awconv.analysis.command import aligned_table
from awconv.analysis.measurement import MIB, PASSES, Call, measure_interleaved, memory_format_of

# what create_backbone is given; the first one is what the others are compared with
NETWORKS: dict[str, dict[str, Any]] = {
    "resnet50": {"name": "resnet50"},
    "aw_resnet50": {"name": "resnet50", "aw": True},
    "se_resnet50": {"name": "resnet50", "attention": "se"},
    "aw_resnet101": {"name": "resnet101", "aw": True},
}
_CLASSES = 1000


def benchmark_networks(
    *,
    device: str,
    batch: int,
    size: int,
    dtype: torch.dtype,
    repeats: int,
    compiled: bool = False,
    deadline: float = math.inf,
) -> list[dict[str, Any]]:
    """Compares whole networks: inference, and a step of training with SGD.

    ``forward`` is in evaluation mode without a graph; ``forward+backward`` is a step of training: forward, cross
    entropy, backward, and SGD with momentum on all parameters at once. With another dtype than float32
    it is mixed precision by autocast. On CUDA pictures and networks are in channels_last. All networks see the same
    pictures.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        batch: Number of pictures N.
        size: Height and width in pixels.
        dtype: Type that is computed in; parameters are float32.
        repeats: Visits to each network.
        compiled: Measure every network compiled by ``torch.compile`` too; it is compiled before it is timed.
        deadline: See :func:`awconv.analysis.benchmark.measure_interleaved`.

    Returns:
        One record for each network, mode and pass: ``network``, ``mode`` (``eager`` or ``compiled``), ``pass``,
        ``parameters``, ``median_ms`` and ``quartiles_ms`` of a batch, ``ratio`` (the median over that of resnet50 in
        the same mode), ``peak_memory`` (bytes beyond pictures and parameters), ``memory_ratio``, and ``times_ms``; the
        median is None for what ``deadline`` left out.
    """
    from awconv.models import create_backbone

    torch.manual_seed(0)
    memory_format = getattr(torch, memory_format_of(device))
    pictures = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=memory_format)
    labels = torch.randint(_CLASSES, (batch,), device=device)
    parameters: dict[str, int] = {}
    keys, cases = [], []
    # Last cases are warmed up first: eager ones, which take seconds, do not wait for a compiler.
    for mode in ("compiled", "eager") if compiled else ("eager",):
        for name in PASSES:
            calls: dict[str, Call] = {}
            for network_name, options in NETWORKS.items():
                network: nn.Module = create_backbone(**options, num_classes=_CLASSES).to(device)
                network = network.to(memory_format=memory_format)
                parameters[network_name] = sum(p.numel() for p in network.parameters())
                if mode == "compiled":
                    network.compile()
                calls[network_name] = _call(network, pictures, labels, dtype, training=name != "forward")
            keys.append({"mode": mode, "pass": name})
            cases.append(calls)
    # every network is compiled from the code of one class, and what is beyond the limit would silently run eagerly
    limit = torch._dynamo.config.patch(recompile_limit=64) if compiled else nullcontext()
    with limit:
        # a compiler takes minutes, and for a step of training twice as long: neither foretells the others' warm-ups
        measured = measure_interleaved(
            cases,
            repeats=repeats,
            device=device,
            deadline=deadline,
            kinds=[f"{key['mode']} {key['pass']}" for key in keys],
        )
    rows = []
    # eager ones first; the sort leaves the passes of a mode in order
    for key, results in sorted(zip(keys, measured, strict=True), key=lambda pair: pair[0]["mode"] != "eager"):
        plain = results.get(next(iter(NETWORKS)))
        for network_name in NETWORKS:
            row: dict[str, Any] = {
                "network": network_name,
                **key,
                "parameters": parameters[network_name],
                "median_ms": None,
            }
            rows.append(row)
            if network_name in results and plain is not None:
                result = results[network_name]
                first, median, third = result.quartiles
                row |= {
                    "median_ms": 1e3 * median,
                    "quartiles_ms": [1e3 * first, 1e3 * third],
                    "ratio": median / plain.quartiles[1],
                    "peak_memory": result.peak_memory,
                    "memory_ratio": result.peak_memory / plain.peak_memory,
                    "times_ms": [1e3 * t for t in result.times],
                }
    return rows


def networks_table(rows: Sequence[Mapping[str, Any]], batch: int) -> str:
    """Lays the records of :func:`benchmark_networks` out as an aligned Markdown table, both passes side by side.

    Args:
        rows: The records.
        batch: Number of pictures that were computed at a time.
    """
    head = ["network", "mode", "parameters, M"]
    for name in ("inference", "training step"):
        head += [f"{name}, ms", "pictures/s", "ratio", "MiB", "ratio"]
    lines: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        start = [row["network"], row["mode"], f"{row['parameters'] / 1e6:.2f}"]
        cells = lines.setdefault((row["mode"], row["network"]), start)
        if row["median_ms"] is None:
            cells += ["not reached", "", "", "", ""]
            continue
        low, high = row["quartiles_ms"]
        cells.extend(
            [
                f"{row['median_ms']:.1f} ({low:.1f}-{high:.1f})",
                f"{1e3 * batch / row['median_ms']:.1f}",
                f"{row['ratio']:.2f}",
                f"{row['peak_memory'] / MIB:.0f}",
                f"{row['memory_ratio']:.2f}",
            ]
        )
    return aligned_table(head, list(lines.values()), left=2)


def _call(network: nn.Module, pictures: Tensor, labels: Tensor, dtype: torch.dtype, *, training: bool) -> Call:
    network.train(training)

    def precision() -> AbstractContextManager[Any]:
        return nullcontext() if dtype == torch.float32 else torch.autocast(pictures.device.type, dtype)

    if not training:

        def infer() -> Tensor:
            with torch.no_grad(), precision():
                logits: Tensor = network(pictures)
            return logits

        return infer
    all_at_once = {"fused": True} if pictures.is_cuda else {"foreach": True}
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, **all_at_once)

    def train() -> None:
        with precision():
            loss = F.cross_entropy(network(pictures), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # at the end: gradients are what every step has to find room for

    return train
