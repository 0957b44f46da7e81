"""Starting a network from the weights in a file, or from torchvision's."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from awconv.checkpoint import is_plain, read_tensors
from awconv.errors import InputError
from awconv.layers import AWConv2d
from awconv.layers.convert import tied_kernels

_COUNTER = ".num_batches_tracked"
_CLASS_PREDICTOR = re.compile(
    r"(roi_heads\.box_predictor\.(cls_score|bbox_pred)|head\.classification_head\.cls_logits)\."
)
_DETECTION = re.compile(r"(^|\.)(backbone\.fpn|rpn\.head|roi_heads|head\.(classification|regression)_head)\.")


@dataclass(frozen=True)
class WeightsReport:
    """What a network's initial weights are.

    Attributes:
        text: One line that says where they came from and what was left at its initialisation.
        complete: Whether nothing that a trained network has learned was left at its initialisation. An AW head that
            starts function-preserving counts as trained: the network computes what it did without it.
    """

    text: str
    complete: bool


def load_initial_weights(network: nn.Module, path: str | PathLike[str]) -> WeightsReport:
    """Loads the weights in a file into a network, completely or not at all.

    A file from a plain network goes into an AW network too: its convolutions match by name, and the AW layers then
    start function-preserving, so that the network computes what the file's network computed.

    Args:
        network: The network to fill, in place. A classifier, or a detector's class predictor, with another number of
            classes keeps its initialisation.
        path: A checkpoint of this project, or a plain state dictionary: ``.safetensors``, or a file of
            ``torch.save``, possibly nested under ``state_dict``, ``model_state_dict`` or ``model``, possibly with the
            prefixes of DataParallel or ``torch.compile``. Files are read as weights only; no code in them runs.

    Returns:
        What was loaded and what was left out.

    Raises:
        InputError: If the file is missing, is not a checkpoint, carries code, or belongs to another architecture (a
            detector's file to a classifier, say); the network is then unchanged.
    """
    return load_state(network, read_state(path), source=str(path))


def read_state(path: str | PathLike[str]) -> dict[str, Tensor]:
    """Reads the state dictionary in a file, as :func:`load_initial_weights` does, and with its errors."""
    path = Path(path)
    return {key.replace("_orig_mod.", ""): value for key, value in _state_dict(_read(path), path).items()}


def fetch_torchvision_state(backbone: str) -> tuple[dict[str, Tensor], str]:
    """Downloads torchvision's ImageNet weights of a network, or takes them from its cache.

    These are ``IMAGENET1K_V1``, of torchvision's first training recipe: what published detectors mostly start from.

    Args:
        backbone: The network's name, the same in timm and torchvision; timm's tag of weights is ignored.

    Returns:
        The state dictionary, and the name of the weights.

    Raises:
        InputError: If torchvision has no such weights, or they could not be downloaded.
    """
    name = backbone.partition(".")[0]
    try:
        weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
    except (KeyError, ValueError):
        raise InputError(
            f"initial_weights='torchvision': torchvision has no ImageNet weights of a network named {name!r}; take "
            "'pretrained' for timm's, or give a file"
        ) from None
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True, weights_only=True)), str(weights)
    except Exception as error:  # urllib, its sockets, the hash check and the unpickler each raise their own kinds
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"initial_weights='torchvision': {weights} could not be fetched from {weights.url} "
            f"({type(error).__name__}: {reason}); check the network and the proxy, or give a file"
        ) from error


def holds_detector(state: Collection[str]) -> bool:
    """Whether the names of tensors in ``state`` are of a detector, ours or torchvision's."""
    return any("backbone.body." in key for key in state)


def load_state(
    network: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str,
    surplus: Collection[str] = (),
    fresh: Collection[str] = (),
) -> WeightsReport:
    """Loads a state dictionary as :func:`load_initial_weights` loads a file.

    Args:
        network: The network to fill, in place.
        state: Names and tensors, with whatever prefixes files have.
        source: What the error messages and the report call it.
        surplus: Names of tensors that only ``state`` may hold, because the network lost them (its classifier).
        fresh: Names of tensors that only the network may hold, because it gained them; they keep their
            initialisation.

    Returns:
        What was loaded and what was left out.

    Raises:
        InputError: If ``state`` belongs to another architecture; the network is then unchanged.
    """
    wanted = network.state_dict()
    given = _in_present_names(_strip_prefixes(dict(state), wanted), wanted)
    given = {key: value for key, value in _without_stray_counters(given, wanted).items() if key not in surplus}

    new_head = _keys_of_new_classifier(network, given, wanted)
    plain_convs, head_keys = _aw_layers_absent_from(given, network)
    fresh = [] if any(key in given for key in fresh) else list(fresh)
    # older files lack BatchNorm's counter, which matters only for momentum=None
    optional = head_keys | {key for key in wanted if key.endswith(_COUNTER)} | set(fresh)
    if difference := _difference(given, wanted, optional, new_head):
        raise InputError(f"initial_weights={source!r} does not fit the {type(network).__name__}: {difference}")

    try:
        kernels = tied_kernels(network, plain_convs)
    except ValueError as error:
        raise InputError(
            f"initial_weights={source!r} is of a plain network, whose function the AW layers cannot keep: {error}"
        ) from None

    loaded = {key: value for key, value in given.items() if key not in new_head}
    network.load_state_dict(loaded, strict=False)
    for first, *others in kernels:
        first.preserve_function_(*others)

    report = f"initial weights: {len(loaded)} of {len(wanted)} tensors from {source}"
    if new_head:
        classes = f"the file has {given[new_head[0]].shape[0]} classes, the network {wanted[new_head[0]].shape[0]}"
        classes = "of another number of classes" if holds_detector(wanted) else classes
        report += f"; left at initialisation: {', '.join(new_head)} ({classes})"
    if fresh:
        report += f"; left at initialisation: {len(fresh)} tensors of the activation attention"
    if plain_convs:
        report += f"; {len(plain_convs)} AW layers start function-preserving"
    return WeightsReport(report, complete=not new_head and not fresh)


def describe_mismatch(module: nn.Module, state_dict: Mapping[str, Tensor]) -> str:
    """Says how a state dictionary differs from what ``module`` holds, and why that may be; empty if it fits."""
    wanted = module.state_dict()
    return _difference(_without_stray_counters(state_dict, wanted), wanted)


def _read(path: Path) -> Any:
    if path.suffix != ".safetensors" or not path.is_file():
        return read_tensors(path, "initial_weights")
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises kinds of its own
        raise InputError(
            f"initial_weights={str(path)!r} is not a checkpoint ({type(error).__name__}): it is damaged, or another "
            "kind of file; give another"
        ) from None


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        for key in ("state_dict", "model_state_dict", "model"):
            if isinstance(content.get(key), Mapping):
                content = content[key]
                break
    is_dict = isinstance(content, Mapping) and len(content) > 0
    if not is_dict or not all(isinstance(key, str) and is_plain(value) for key, value in content.items()):
        held = f"a dict with {', '.join(map(repr, list(content)[:5]))}" if is_dict else f"a {type(content).__name__}"
        raise InputError(
            f"initial_weights={str(path)!r} holds no state dictionary but {held}; expected names and tensors, plain or "
            "under 'state_dict', 'model_state_dict' or 'model', as torch.save(model.state_dict(), path) writes them"
        )
    return dict(content)


def _strip_prefixes(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in ("network.", "module."):
        # a task holds metrics and losses beside its network: only what has the prefix counts
        bare = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if bare and len(bare.keys() & wanted.keys()) >= len(state.keys() & wanted.keys()):
            state = bare
    return state


def _without_stray_counters(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leaves out BatchNorm's counters of those norms that are frozen in the network and count no batches."""

    def stray(key: str) -> bool:
        return key.endswith(_COUNTER) and key not in wanted and key.replace(_COUNTER, ".weight") in wanted

    return {key: value for key, value in given.items() if not stray(key)}


def _in_present_names(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames what torchvision's detectors once called otherwise, as their own loading does."""

    def renamed(key: str) -> str:
        new = re.sub(r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$", r"\1.0.\2", key)
        new = re.sub(r"^(rpn\.head\.conv)\.(weight|bias)$", r"\1.0.0.\2", new)
        if match := re.match(r"^(head\.(?:classification|regression)_head\.conv)\.(\d+)\.(weight|bias)$", new):
            new = f"{match[1]}.{int(match[2]) // 2}.0.{match[3]}"
        return new if key not in wanted and new in wanted else key

    return {renamed(key): value for key, value in state.items()}


def _keys_of_new_classifier(network: nn.Module, given: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    """Lists the keys of the classifier, or of a detector's class predictor, if only their number of classes differs."""
    if holds_detector(wanted):
        keys = [key for key in wanted if _CLASS_PREDICTOR.match(key) and key in given]
        return keys if _differ_in_rows(keys, given, wanted) else []
    get_classifier: Any = getattr(network, "get_classifier", None)
    linears = [module for module in network.modules() if isinstance(module, nn.Linear)]
    head = get_classifier() if get_classifier else linears[-1] if linears else None
    name = next((name for name, module in network.named_modules() if module is head), "")
    keys = [key for key in wanted if name and key.startswith(f"{name}.") and key in given]
    return keys if _differ_in_rows(keys, given, wanted) else []


def _differ_in_rows(keys: list[str], given: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    differ = [key for key in keys if given[key].shape[:1] != wanted[key].shape[:1]]
    return bool(differ) and all(given[key].shape[1:] == wanted[key].shape[1:] for key in keys)


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

    def shape(value: Any) -> tuple[int, ...]:
        return tuple(value.shape) if isinstance(value, Tensor) else ()  # a module's extra state

    def listing(what: str, keys: list[str], describe: Callable[[str], str]) -> str:
        more = ", ..." if len(keys) > 3 else ""
        return f"{len(keys)} {what} ({', '.join(describe(key) for key in keys[:3])}{more})" if keys else ""

    if given and holds_detector(given) != holds_detector(wanted):
        if holds_detector(given):
            return "it is of a detector, and this is a classifier, which starts from a classifier's file"
        return "it is of a classifier, and this is a detector; a new detector starts from it by initial_weights"
    missing = [key for key in wanted if key not in given and key not in optional]
    unexpected = [key for key in given if key not in wanted]
    reshaped = [k for k in given if k in wanted and k not in new_head and shape(given[k]) != shape(wanted[k])]
    if not missing and not unexpected and not reshaped:
        return ""
    parts = [
        listing("missing from the file", missing, lambda k: f"{k} {shape(wanted[k])}"),
        listing("unknown to the network", unexpected, lambda k: f"{k} {shape(given[k])}"),
        listing("of another shape", reshaped, lambda k: f"{k}: {shape(given[k])}, not {shape(wanted[k])}"),
    ]
    return f"{'; '.join(filter(None, parts))}; likely cause: {_likely_cause(missing, unexpected, reshaped)}"


def _likely_cause(missing: list[str], unexpected: list[str], reshaped: list[str]) -> str:
    aw_head = re.compile(r"\.attention\.(conv|norm)[12]\.")
    activation_attention = re.compile(r"\.(se|bam)\.")
    causes = []
    differ = set(missing + unexpected)
    running = re.compile(r"(running_(mean|var)|num_batches_tracked)$")
    # of a norm that both have: the statistics of a norm that one side lacks altogether say nothing
    explained = {key for key in differ if running.search(key) and running.sub("weight", key) not in differ}
    if explained:
        group_norm = any("running" in key for key in explained & set(unexpected))
        causes.append(
            "the file is of a network with BatchNorm, of which group normalisation cannot start: set norm to batch, "
            "frozen or sync"
            if group_norm
            else "the file is of a network with another norm: set the norm it was trained with"
        )
    if heads := {key for key in missing + unexpected + reshaped if aw_head.search(key)} - explained:
        explained |= heads
        if heads & set(unexpected):
            causes.append("the file is of an AW network: set aw, with the options and places it was trained with")
        elif heads & set(missing):
            causes.append("the file is of a plain network, or has AW in other places: set aw as it was trained")
        else:
            causes.append("other AW options: set the reduction, share and head_groups it was trained with")
    if attention := {key for key in missing + unexpected if activation_attention.search(key)} - explained:
        explained |= attention
        causes.append("another activation attention: set the attention it was trained with")
    if detection := {key for key in missing + unexpected + reshaped if _DETECTION.search(key)} - explained:
        explained |= detection
        if any("backbone.fpn." in key for key in detection):
            causes.append("other levels or fpn_channels, or another head: set those it was trained with")
        elif detection <= set(reshaped):
            causes.append("other anchors or RoIs: set the anchor_sizes, aspect_ratios and roi_size it was trained with")
        else:
            causes.append("another detection head: set the head it was trained with")
    if unexplained := [key for key in missing + unexpected + reshaped if key not in explained]:
        stem = unexplained == reshaped and len(reshaped) == 1
        return "another stem or number of image channels" if stem else "another architecture"
    return " and ".join(causes)
