"""Which modules an adapter goes on and why not on the others, by PEFT's rules; what matches nothing is an error."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.errors import AdapterError, UsageError
from lowrank.layers import CompressedLayer, PaddedLayer
from lowrank.layers.source import is_conv1d
from lowrank.lora.adapter_layer import LoRALayer
from lowrank.lora.bases import family
from lowrank.lora.config import LoRAConfig, pattern_key
from lowrank.lora.saved_module import SavedModule

__all__ = [
    "ALL_LINEAR",
    "Place",
    "Targets",
    "asks_for_all_linear",
    "find_targets",
    "matches",
    "outer_modules",
    "token_table",
]

ALL_LINEAR = "all-linear"
_HEAD = 'the output head, which "all-linear" leaves out; name it to adapt it'
# Where PEFT looks for the head of a sequence classifier that has no output embeddings.
_CLASSIFIER_HEADS = ("score", "classifier")
_PLAIN: tuple[type[nn.Module], ...] = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class Place:
    """A module and every name it goes by, the first one first."""

    names: tuple[str, ...]
    module: nn.Module
    parent: nn.Module | None

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]


@dataclass(frozen=True)
class Targets:
    """Where adapters go, which modules are trained whole, and why the other modules with weights are left alone."""

    adapted: tuple[Place, ...]
    saved: tuple[Place, ...]
    left: dict[str, str]


def outer_modules(model: nn.Module) -> list[Place]:
    """List every module of the model but the model itself and what lies inside an adapted or a saved module."""
    names: dict[int, list[str]] = {}
    found: dict[int, tuple[nn.Module, nn.Module | None]] = {}
    inside: list[str] = []
    parents = {id(child): module for module in model.modules() for child in module.children()}
    for name, module in model.named_modules(remove_duplicate=False):
        if not name or any(name.startswith(prefix) for prefix in inside):
            continue
        if isinstance(module, (LoRALayer, SavedModule)):
            inside.append(f"{name}.")
        names.setdefault(id(module), []).append(name)
        found[id(module)] = module, parents.get(id(module))
    return [Place(tuple(names[key]), module, parent) for key, (module, parent) in found.items()]


def find_targets(model: nn.Module, config: LoRAConfig, *, strict: bool = True) -> Targets:
    """Resolve ``target_modules``, ``exclude_modules``, ``modules_to_save`` and the patterns.

    Args:
        strict: an entry that matches nothing is an error, and so is a model with nothing to adapt; off where a file of
            tensors says what there is.

    Raises:
        UsageError: an entry or pattern that matches nothing (near misses are listed), or nothing but modules that no
            adapter fits, or that are trained whole.
        AdapterError: a module that is to be trained whole, and cannot.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> [place.name for place in find_targets(model, LoRAConfig(target_modules=["0"])).adapted]
        ['0']
    """
    places = outer_modules(model)
    every_name = [name for place in places for name in place.names]
    saved = tuple(place for place in places if any(_is_saved(config, name) for name in place.names))
    whole = tuple(f"{name}." for place in saved for name in place.names)
    # What lies inside another of them is trained with it.
    saved = tuple(place for place in saved if not place.name.startswith(whole))
    for place in saved:
        _check_trainable_whole(place)
    head = _output_head(model, config)
    adapted: list[Place] = []
    left: dict[str, str] = {}
    for place in places:
        if place in saved or any(name.startswith(whole) for name in place.names):
            if _holds_weights(place.module):
                left[place.name] = "trained whole (modules_to_save)"
            continue
        reason = _unwanted(place, config, head) or _unfit(place)
        if reason is None:
            adapted.append(place)
        elif _holds_weights(place.module):
            left[place.name] = reason
    if strict:
        _check_entries(places, adapted, left, config, every_name)
    if strict and not adapted:
        raise UsageError("target_modules: nothing in the model fits it; " + _why_nothing(left))
    return Targets(tuple(adapted), saved, left)


def _hit(entries: Sequence[str], name: str) -> bool:
    return any(name == entry or name.endswith(f".{entry}") for entry in entries)


def _is_saved(config: LoRAConfig, name: str) -> bool:
    """As PEFT matches: an entry is any end of a name, not only a whole part of it ("norm" is "input_layernorm" too)."""
    return name.endswith(tuple(config.trained_whole))


def matches(wanted: str | Sequence[str] | None, name: str) -> bool:
    """Tell whether a module's name fits a regular expression, or one of a list of names and their ends."""
    if wanted is None:
        return False
    return re.fullmatch(wanted, name) is not None if isinstance(wanted, str) else _hit(wanted, name)


def asks_for_all_linear(config: LoRAConfig) -> bool:
    """Tell whether ``target_modules`` is ``"all-linear"``, or left out."""
    wanted = config.target_modules
    return wanted is None or (isinstance(wanted, str) and wanted.lower() == ALL_LINEAR)


def _check_trainable_whole(place: Place) -> None:
    """Refuse a module that no copy can stand in for."""
    module = place.module.original_module if isinstance(place.module, SavedModule) else place.module
    if type(module).forward is nn.Module.forward or isinstance(module, (nn.ModuleDict, nn.ModuleList)):
        inside = ", ".join(f"{place.name}.{name}" for name, _ in module.named_children()) or "the modules that run"
        raise AdapterError(
            f"modules_to_save: {place.name} is a {type(module).__name__}, which is never called itself; name what it holds "
            f"({inside})"
        )
    for name, part in module.named_modules():
        if isinstance(part, (LoRALayer, SavedModule)):
            where = f"{place.name}.{name}" if name else place.name
            adapters = ", ".join(part.configs if isinstance(part, LoRALayer) else part.modules_to_save)
            raise AdapterError(
                f"modules_to_save: {where} carries the adapter {adapters} already, and cannot be trained whole by another one; "
                "delete that adapter, or leave the module out"
            )


def _unwanted(place: Place, config: LoRAConfig, head: nn.Module | None) -> str | None:
    """Why the configuration does not ask for this module."""
    if any(matches(config.exclude_modules, name) for name in place.names):
        return "excluded by exclude_modules"
    if asks_for_all_linear(config):
        if head is not None and (
            place.module is head or (isinstance(place.module, LoRALayer) and place.module.base_layer is head)
        ):
            return _HEAD
        kind = place.module.family if isinstance(place.module, LoRALayer) else family(place.module)
        return None if kind == "linear" else "not a linear layer"
    hits = [name for name in place.names if matches(config.target_modules, name)]
    if not hits:
        return "not among target_modules"
    wanted = config.layers_to_transform
    if wanted is not None and not any(_layer_index(name, config) in wanted for name in hits):  # type: ignore[operator]
        return "not among layers_to_transform"
    return None


def _layer_index(name: str, config: LoRAConfig) -> int | None:
    """The first number after the layers' name, as PEFT reads it."""
    patterns = config.layers_pattern
    expressions = [r".*?\.[^.]*\.(?P<index>\d+)\."]
    if patterns:
        listed = [patterns] if isinstance(patterns, str) else list(patterns)
        expressions = [rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\." for pattern in listed]
    for expression in expressions:
        found = re.match(expression, name)
        if found:
            return int(found["index"])
    return None


def _unfit(place: Place) -> str | None:
    """Why no adapter can go on this module."""
    module, parent = place.module, place.parent
    if isinstance(module, LoRALayer):
        return None
    if isinstance(module, SavedModule):
        return f"the adapter {', '.join(module.modules_to_save)} trains it whole (modules_to_save)"
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads this weight without calling the layer"
    if isinstance(parent, nn.TransformerEncoderLayer) and parent.activation_relu_or_gelu != 0:
        return "the fast path of nn.TransformerEncoderLayer reads this weight without calling the layer"
    if isinstance(module, PaddedLayer):
        return f"pads in a forward of its own; the layer inside takes adapters: {place.names[0]}.product"
    if family(module) is None:
        return f"no adapter fits a {type(module).__name__}"
    if isinstance(module, CompressedLayer):
        return None
    if not any(type(module).forward is kind.forward for kind in _PLAIN if isinstance(module, kind)) and not is_conv1d(
        module
    ):
        return f"{type(module).__name__} has a forward of its own, which an adapter's product need not follow"
    if torch.nn.utils.parametrize.is_parametrized(module) or any(
        hasattr(module, name) for name in ("weight_g", "weight_orig", "weight_u")
    ):
        return "parametrized (weight_norm, spectral_norm, pruning …): remove the parametrization first"
    weight: Any = module._parameters.get("weight")
    if not isinstance(weight, Tensor) or type(weight.data) is not Tensor or not weight.is_floating_point():
        return f"weight is a {type(getattr(weight, 'data', weight)).__name__}, not a plain floating tensor"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "nn.Embedding with max_norm changes its weight while it runs"
    return None


def _holds_weights(module: nn.Module) -> bool:
    return isinstance(module, CompressedLayer) or next(module.parameters(recurse=False), None) is not None


def token_table(model: nn.Module, getter: str) -> nn.Module | None:
    """Ask a model of transformers for its input or output embeddings; ``None`` where it has none (or no such method).

    Args:
        getter: ``"get_input_embeddings"`` or ``"get_output_embeddings"``.

    Example:
        >>> token_table(nn.Sequential(nn.Linear(2, 2)), "get_input_embeddings") is None
        True
    """
    find = getattr(model, getter, None)
    if find is None:
        return None
    try:
        found = find()
    except (AttributeError, NotImplementedError):
        # transformers raises these for models of images and sound.
        return None
    return found if isinstance(found, nn.Module) else None


def _output_head(model: nn.Module, config: LoRAConfig) -> nn.Module | None:
    """The module that "all-linear" leaves out, found as PEFT finds it."""
    if not hasattr(model, "get_output_embeddings"):
        return None
    head = token_table(model, "get_output_embeddings")
    if head is None and config.task_type == "SEQ_CLS":
        head = next((getattr(model, name) for name in _CLASSIFIER_HEADS if hasattr(model, name)), None)
    return head if isinstance(head, nn.Module) else None


def _check_entries(
    places: Sequence[Place], adapted: Sequence[Place], left: dict[str, str], config: LoRAConfig, names: Sequence[str]
) -> None:
    targets = [] if asks_for_all_linear(config) else _listed(config.target_modules)
    fitting = [name for place in adapted for name in place.names]
    for argument, entries in (
        ("target_modules", targets),
        ("exclude_modules", _listed(config.exclude_modules)),
        ("modules_to_save", _listed(config.modules_to_save)),
    ):
        for entry, is_expression in entries:
            if argument == "modules_to_save":
                if entry in config.head_names:
                    # PEFT writes down both names of a task's head, of which a model has one.
                    continue
                matched = [name for name in names if name.endswith(entry)]
            else:
                matched = [name for name in names if matches(entry if is_expression else [entry], name)]
            if not matched:
                owner = next((place for place in places if entry in place.module._parameters), None)
                near = (
                    _near(entry, names, is_expression)
                    if owner is None
                    else f": it is a parameter of {owner.name}, a {type(owner.module).__name__}, and adapters go on modules"
                )
                raise UsageError(f"{argument}: {entry!r} matches no module of the model{near}")
            if argument == "target_modules" and not set(matched) & set(fitting):
                if fitting and all(_is_saved(config, name) for name in matched):
                    # As in PEFT, where that counts; add_lora says so.
                    continue
                reasons = _reasons(matched, places, config, left)
                raise UsageError(f"target_modules: {entry!r} matches {matched[0]}, but {reasons}")
    for argument, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for pattern in patterns:
            if not any(pattern_key({pattern: 0}, name) for name in fitting):
                raise UsageError(f"{argument}: {pattern!r} matches no adapted module{_near(pattern, fitting)}")
    if config.layers_to_transform is not None:
        present = {_layer_index(name, config) for name in fitting}
        for index in config.layers_to_transform:  # type: ignore[union-attr]
            if index not in present:
                raise UsageError(
                    f"layers_to_transform: no target module in layer {index}; there are layers "
                    f"{sorted(known for known in present if known is not None)}"
                )


def _listed(wanted: str | Sequence[str] | None) -> list[tuple[str, bool]]:
    """Entries, and whether each is a regular expression."""
    if wanted is None:
        return []
    return [(wanted, True)] if isinstance(wanted, str) else [(entry, False) for entry in wanted]


def _reasons(matched: Sequence[str], places: Sequence[Place], config: LoRAConfig, left: dict[str, str]) -> str:
    """Why not one of the modules an entry matches can be adapted; the first of them speaks for all."""
    place = next(place for place in places if matched[0] in place.names)
    return (
        left.get(place.name)
        or _unwanted(place, config, None)
        or _unfit(place)
        or "it is trained whole (modules_to_save)"
    )


def _near(entry: str, names: Iterable[str], is_expression: bool = False) -> str:
    listed = list(dict.fromkeys(names))
    if is_expression and any(_hit([entry], name) for name in listed):
        return f", as text is a regular expression of the whole name; write [{entry!r}] or r'.*\\.{entry}'"
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in listed))
    near = list(dict.fromkeys(difflib.get_close_matches(entry, [*ends, *listed], n=4, cutoff=0.4)))
    return f"; did you mean {', '.join(near)}?" if near else ""


def _why_nothing(left: dict[str, str]) -> str:
    shown = [f"{name}: {reason}" for name, reason in list(left.items())[:3]]
    return "; ".join(shown) if shown else "it holds no weights"
