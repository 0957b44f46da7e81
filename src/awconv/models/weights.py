"""Starting a network from the weights in a file."""

import re
from collections.abc import Callable, Collection, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from awconv.errors import InputError
from awconv.layers import AWConv2d
from awconv.layers.convert import tied_kernels


def load_initial_weights(network: nn.Module, path: str | PathLike[str]) -> str:
    """Loads the weights in a file into a network, completely or not at all.

    A file from a plain network goes into an AW network too: its convolutions match by name, and the AW layers then
    start function-preserving, so that the network computes what the file's network computed.

    Args:
        network: The network to fill, in place. A classifier with another number of classes keeps its initialisation.
        path: A checkpoint of this project, or a plain state dictionary: ``.safetensors``, or a file of
            ``torch.save``, possibly nested under ``state_dict``, ``model_state_dict`` or ``model``, possibly with the
            prefixes of DataParallel or ``torch.compile``. Files are read as weights only; no code in them runs.

    Returns:
        One line that says what was loaded and what was left out.

    Raises:
        InputError: If the file is missing, is not a checkpoint, carries code, or belongs to another architecture; the
            network is then unchanged.
    """
    path = Path(path)
    wanted = network.state_dict()
    given = _strip_prefixes(_state_dict(_read(path), path), wanted)

    new_head = _keys_of_new_classifier(network, given, wanted)
    plain_convs, head_keys = _aw_layers_absent_from(given, network)
    # older files lack BatchNorm's counter, which matters only for momentum=None
    optional = head_keys | {key for key in wanted if key.endswith("num_batches_tracked")}
    if difference := _difference(given, wanted, optional, new_head):
        raise InputError(f"initial_weights={str(path)!r} does not fit the {type(network).__name__}: {difference}")

    try:
        kernels = tied_kernels(network, plain_convs)
    except ValueError as error:
        raise InputError(
            f"initial_weights={str(path)!r} is of a plain network, whose function the AW layers cannot keep: {error}"
        ) from None

    state = {key: value for key, value in given.items() if key not in new_head}
    network.load_state_dict(state, strict=False)
    for first, *others in kernels:
        first.preserve_function_(*others)

    report = f"initial weights: {len(state)} of {len(wanted)} tensors from {path}"
    if new_head:
        classes = f"the file has {given[new_head[0]].shape[0]} classes, the network {wanted[new_head[0]].shape[0]}"
        report += f"; left at initialisation: {', '.join(new_head)} ({classes})"
    if plain_convs:
        report += f"; {len(plain_convs)} AW layers start function-preserving"
    return report


def describe_mismatch(module: nn.Module, state_dict: Mapping[str, Tensor]) -> str:
    """Says how a state dictionary differs from what ``module`` holds, and why that may be; empty if it fits."""
    return _difference(state_dict, module.state_dict())


def _read(path: Path) -> Any:
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"initial_weights={str(path)!r} {found}; give a checkpoint file (.ckpt, .pth, .safetensors)")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler, the zip and tar readers and safetensors each raise their own kinds
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        found = f"carries code or objects ({code[1]})" if code else f"is not a checkpoint ({type(error).__name__})"
        raise InputError(
            f"initial_weights={str(path)!r} {found}; only weights-only files are loaded: where you trust the file, "
            "convert it with torch.save(model.state_dict(), 'weights.pth')"
        ) from None


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        for key in ("state_dict", "model_state_dict", "model"):
            if isinstance(content.get(key), Mapping):
                content = content[key]
                break
    is_dict = isinstance(content, Mapping) and len(content) > 0
    if not is_dict or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        held = f"a dict with {', '.join(map(repr, list(content)[:5]))}" if is_dict else f"a {type(content).__name__}"
        raise InputError(
            f"initial_weights={str(path)!r} holds no state dictionary but {held}; expected names and tensors, plain or "
            "under 'state_dict', 'model_state_dict' or 'model', as torch.save(model.state_dict(), path) writes them"
        )
    return dict(content)


def _strip_prefixes(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    for prefix in ("network.", "module."):
        # a task holds metrics and losses beside its network: only what has the prefix counts
        bare = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if bare and len(bare.keys() & wanted.keys()) >= len(state.keys() & wanted.keys()):
            state = bare
    return state


def _keys_of_new_classifier(network: nn.Module, given: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    """Lists the classifier's keys if its number of classes is all that differs."""
    get_classifier: Any = getattr(network, "get_classifier", None)
    linears = [module for module in network.modules() if isinstance(module, nn.Linear)]
    head = get_classifier() if get_classifier else linears[-1] if linears else None
    name = next((name for name, module in network.named_modules() if module is head), "")
    keys = [key for key in wanted if name and key.startswith(f"{name}.") and key in given]
    differ = [key for key in keys if given[key].shape[:1] != wanted[key].shape[:1]]
    return keys if differ and all(given[key].shape[1:] == wanted[key].shape[1:] for key in keys) else []


def _aw_layers_absent_from(given: dict[str, Tensor], network: nn.Module) -> tuple[list[AWConv2d], set[str]]:
    """Finds the AW layers of which the file has no attention at all, and the names of their missing tensors."""
    layers: dict[AWConv2d, None] = {}
    keys: set[str] = set()
    for name, module in network.named_modules(remove_duplicate=False):
        if isinstance(module, AWConv2d):
            head = {f"{name}.{key}".lstrip(".") for key in module.state_dict() if key not in ("weight", "bias")}
            if head.isdisjoint(given):
                layers[module] = None
                keys |= head
    return list(layers), keys


def _difference(
    given: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    optional: Collection[str] = (),
    new_head: Collection[str] = (),
) -> str:
    """Says what differs and the likely cause; empty if nothing does."""

    def listing(what: str, keys: list[str], describe: Callable[[str], str]) -> str:
        more = ", ..." if len(keys) > 3 else ""
        return f"{len(keys)} {what} ({', '.join(describe(key) for key in keys[:3])}{more})" if keys else ""

    missing = [key for key in wanted if key not in given and key not in optional]
    unexpected = [key for key in given if key not in wanted]
    reshaped = [k for k in given if k in wanted and k not in new_head and given[k].shape != wanted[k].shape]
    if not missing and not unexpected and not reshaped:
        return ""
    parts = [
        listing("missing from the file", missing, lambda k: f"{k} {tuple(wanted[k].shape)}"),
        listing("unknown to the network", unexpected, lambda k: f"{k} {tuple(given[k].shape)}"),
        listing("of another shape", reshaped, lambda k: f"{k}: {tuple(given[k].shape)}, not {tuple(wanted[k].shape)}"),
    ]
    return f"{'; '.join(filter(None, parts))}; likely cause: {_likely_cause(missing, unexpected, reshaped)}"


def _likely_cause(missing: list[str], unexpected: list[str], reshaped: list[str]) -> str:
    aw_head = re.compile(r"\.attention\.(conv|norm)[12]\.")
    activation_attention = re.compile(r"\.(se|bam)\.")
    explained = {key for key in missing + unexpected + reshaped if aw_head.search(key)}
    causes = []
    if explained & set(unexpected):
        causes.append("the file is of an AW network: set aw, with the options and places it was trained with")
    elif explained & set(missing):
        causes.append("the file is of a plain network, or has AW in other places: set aw as it was trained")
    elif explained:
        causes.append("other AW options: set the reduction, share and head_groups it was trained with")
    if attention := {key for key in missing + unexpected if activation_attention.search(key)}:
        explained |= attention
        causes.append("another activation attention: set the attention it was trained with")
    if unexplained := [key for key in missing + unexpected + reshaped if key not in explained]:
        stem = unexplained == reshaped and len(reshaped) == 1
        return "another stem or number of image channels" if stem else "another architecture"
    return " and ".join(causes)
