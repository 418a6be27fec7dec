"""Adapters on a whole model: add, switch, disable, delete, combine."""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from lowrank.errors import AdapterError, UsageError
from lowrank.lora.adapter_kinds import adapted
from lowrank.lora.adapter_layer import FORMS, LoRALayer
from lowrank.lora.adapters import (
    activate,
    active_adapters,
    adapter_names,
    check_new_name,
    check_one_copy,
    check_unmerged,
    lora_layers,
    require_adapter,
    saved_modules,
)
from lowrank.lora.bases import base_of
from lowrank.lora.config import LoRAConfig
from lowrank.lora.initialise import Residual, drawn_from, start_from_residual, start_from_singular_vectors
from lowrank.lora.overlooked import overlooked
from lowrank.lora.saved_module import SavedModule
from lowrank.lora.target_modules import Targets, find_targets, outer_modules
from lowrank.numerics.moments import InputStatistics, TokenCounts
from lowrank.targets.copying import copy_model
from lowrank.targets.model import replace_module, unwrapped

__all__ = [
    "add_lora",
    "add_weighted_adapter",
    "delete_adapter",
    "disable_adapter",
    "install",
    "remove",
    "set_adapter",
    "set_form",
]


def add_lora(
    model: nn.Module,
    config: LoRAConfig | None = None,
    adapter_name: str = "default",
    inplace: bool = False,
    *,
    original: nn.Module | None = None,
    statistics: Mapping[str, InputStatistics | TokenCounts] | None = None,
    seed: int | None = None,
) -> nn.Module:
    """Put adapters on a model; everything but the adapters (and ``modules_to_save``) is frozen.

    The new adapter becomes the active one. With the default initialisation the model's outputs are the same bit for bit.
    A model that has adapters already gets one more beside them.

    Args:
        model: dense or compressed.
        config: default ``LoRAConfig()``: rank 8 on every linear layer but the output head.
        adapter_name: to switch by.
        inplace: adapt the model itself instead of a copy.
        original: the model before compression, for ``init_lora_weights="residual"``.
        statistics: inputs of the layers by name, see :func:`lowrank.collect_statistics`; makes the residual's fit that of
            the least output error.
        seed: of the adapters' random start; torch's own random numbers stay as they are. By default they are drawn from those, in
            PEFT's order, so that the same ``torch.manual_seed`` starts the same adapter there.

    Returns:
        The adapted model: a copy unless ``inplace``.

    Raises:
        RankError: a rank that would take all memory.
        UsageError: an entry of the configuration that matches nothing, a name already taken, a merged model.
        AdapterError: a layer that cannot carry this adapter, or a module that cannot be trained whole.

    Example:
        >>> model = add_lora(nn.Sequential(nn.Linear(64, 10)), LoRAConfig(r=4))
        >>> sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        296
    """
    config = LoRAConfig() if config is None else config
    model = unwrapped(model)
    check_new_name(model, adapter_name)
    check_unmerged(model, "add_lora")
    if config.init_lora_weights == "residual" and original is None:
        raise UsageError('init_lora_weights="residual": needs original=, the model before compression')
    targets = find_targets(model, config)
    for place in targets.adapted:  # before a copy is made for nothing
        base = place.module.base_layer if isinstance(place.module, LoRALayer) else place.module
        base_of(base).require_rank(config.rank_of(place.name), place.name)
    said = overlooked(model, config, targets)
    if not inplace:
        model = copy_model(model)
    with drawn_from(seed):
        residual = None if original is None else Residual(original, statistics or {})
        wide = install(model, config, adapter_name, find_targets(model, config), residual)
    if wide:
        said.append(
            f"r: over min(out, in) on {len(wide)} layers (first {wide[0]}), where the rest adds parameters but no freedom"
        )
    for sentence in said:
        warnings.warn(sentence, UserWarning, stacklevel=2)
    return model


def install(
    model: nn.Module,
    config: LoRAConfig,
    adapter: str,
    targets: Targets,
    residual: Residual | None = None,
    *,
    decoded: bool = False,
) -> list[str]:
    """Add the adapter at these places; the model is as it was where that fails.

    Args:
        model: changed in place.
        config: of the adapter.
        adapter: its name.
        targets: of :func:`lowrank.lora.target_modules.find_targets`.
        residual: for ``init_lora_weights="residual"``, what it is fitted to.
        decoded: modules that are trained whole may hold codes, since a file brings their numbers: this adapter's copy is dense.

    Returns:
        Names of the layers whose smaller side is below the rank.
    """
    active = active_adapters(model)
    tied = _tied_weights(model) if config.init_lora_weights == "pissa" else frozenset()
    with contextlib.ExitStack() as undo:
        for parameter in model.parameters():
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
        undo.callback(activate, model, active)
        wide: list[str] = []
        for place in targets.adapted:
            layer = place.module if isinstance(place.module, LoRALayer) else adapted(place.module)
            undo.callback(layer.delete_adapter, adapter)
            layer.add_adapter(adapter, config, place.name)
            if layer.rank_of(adapter) > base_of(layer.unmerged_base).largest_rank:
                wide.append(place.name)
            if config.init_lora_weights == "pissa":
                _keep_weight(undo, layer, place.name, tied)
                start_from_singular_vectors(layer, adapter, place.name)
            elif config.init_lora_weights == "residual" and residual is not None:
                start_from_residual(layer, adapter, place.name, residual)
            layer.start_magnitude(adapter)
            if layer is not place.module:
                undo.callback(replace_module, model, place.names, place.module)
                replace_module(model, place.names, layer)
        for place in targets.saved:
            wrapper = place.module if isinstance(place.module, SavedModule) else SavedModule(place.module)
            undo.callback(wrapper.delete_adapter, adapter)
            wrapper.add_adapter(adapter, decoded=decoded)
            if wrapper is not place.module:
                undo.callback(replace_module, model, place.names, place.module)
                replace_module(model, place.names, wrapper)
        undo.pop_all()
    model.requires_grad_(False)
    activate(model, [adapter])
    return wide


def _keep_weight(undo: contextlib.ExitStack, layer: LoRALayer, name: str, tied: frozenset[int]) -> None:
    """Note the weight that PiSSA is about to change; refuse one that another module shares."""
    weight = getattr(layer.base_layer, "weight", None)
    if isinstance(weight, nn.Parameter):
        if id(weight) in tied:
            raise AdapterError(
                f'layer {name}: its weight is tied, and init_lora_weights="pissa" would change both ends'
            )
        undo.callback(setattr, weight, "data", weight.data)


def _tied_weights(model: nn.Module) -> frozenset[int]:
    """The ids of the parameters that several modules hold."""
    counts = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    return frozenset(key for key, count in counts.items() if count > 1)


def set_adapter(model: nn.Module, adapter: str | Sequence[str] | None) -> None:
    """Let this adapter (or these, summed) count and be trained; ``None`` for the base model alone.

    Raises:
        AdapterError: the model has no adapter of that name.
        UsageError: adapters are merged (unmerge first), or several of them train the same module whole.
    """
    wanted = [] if adapter is None else [adapter] if isinstance(adapter, str) else list(adapter)
    for name in wanted:
        require_adapter(model, name)
    check_unmerged(model, "set_adapter")
    check_one_copy(model, wanted, "set_adapter")
    activate(model, wanted)


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Run the base model within the ``with``, merged or not; adapters count again after it.

    Example:
        >>> model = add_lora(nn.Sequential(nn.Linear(2, 2)), LoRAConfig(r=1))
        >>> with disable_adapter(model):
        ...     lora_layers(model)["0"].disabled
        True
    """
    layers, modules = list(lora_layers(model).values()), list(saved_modules(model).values())
    before = [layer.disabled for layer in layers], [module.active for module in modules]
    try:
        for layer in layers:
            layer.disabled = True
        for module in modules:
            module.active = None
        yield
    finally:
        for layer, was in zip(layers, before[0], strict=True):
            layer.disabled = was
        for module, active in zip(modules, before[1], strict=True):
            module.active = active


def delete_adapter(model: nn.Module, adapter: str) -> None:
    """Remove an adapter; layers without any become the plain base again.

    Where it was the only active one, the first of the others becomes active, and a warning says so, as in PEFT. A base that
    ``"pissa"`` took directions out of stays without them.

    Raises:
        AdapterError: no adapter of that name.
        UsageError: adapters are merged; unmerge first.
    """
    require_adapter(model, adapter)
    check_unmerged(model, "delete_adapter")
    was_active = adapter in active_adapters(model)
    remove(model, adapter)
    others = adapter_names(model)
    if was_active and others and not active_adapters(model):
        activate(model, others[:1])
        warnings.warn(
            f"delete_adapter: {adapter!r} was active; {others[0]!r} is from here on", UserWarning, stacklevel=2
        )


def remove(model: nn.Module, adapter: str) -> None:
    """Take an adapter off the model, without a word on which others count."""
    for layer in lora_layers(model).values():
        layer.delete_adapter(adapter)
    for module in saved_modules(model).values():
        module.delete_adapter(adapter)
    _drop_empty(model)


def _drop_empty(model: nn.Module) -> None:
    for place in outer_modules(model):
        module = place.module
        if isinstance(module, LoRALayer) and not module.configs:
            replace_module(model, place.names, module.base_layer)
        if isinstance(module, SavedModule) and not module.modules_to_save:
            replace_module(model, place.names, module.original_module)


def add_weighted_adapter(
    model: nn.Module, adapters: Sequence[str], weights: Sequence[float], adapter_name: str
) -> None:
    """Add an adapter that is exactly ``Σ weight · adapter``, by concatenation; its rank is the sum of theirs.

    It becomes the active one.

    Args:
        adapters: names of adapters on the model.
        weights: a factor for each.
        adapter_name: of the combination.

    Raises:
        AdapterError: DoRA or grouped convolutions (no sum of theirs is an adapter), or trained modules, which differ.
        UsageError: another number of weights than adapters, a taken name, merged adapters.
        RankError: a sum of ranks that would take all memory.
    """
    if len(adapters) != len(weights) or not adapters:
        raise UsageError(f"weights: need one for each adapter, got {len(weights)} for {len(adapters)} adapters")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise UsageError(f"weights: must be finite numbers, got {weight!r}")
    for adapter in adapters:
        require_adapter(model, adapter)
        if any(adapter in module.modules_to_save for module in saved_modules(model).values()):
            raise AdapterError(f"adapter {adapter!r}: has whole modules (modules_to_save), which cannot be combined")
    check_new_name(model, adapter_name)
    check_unmerged(model, "add_weighted_adapter")
    sums = {}
    for name, layer in lora_layers(model).items():
        pairs = [pair for pair in zip(adapters, weights, strict=True) if pair[0] in layer.configs]
        present = [adapter for adapter, _ in pairs]
        if any(layer.configs[adapter].use_dora for adapter in present):
            raise AdapterError(f"layer {name}: DoRA adapters scale the base weight; a sum of them is no adapter")
        if len({layer.departures(adapter) for adapter in present}) > 1:
            raise AdapterError(
                f"layer {name}: some of the adapters pad with zeros (or have no dilation) and some do not; their sum is no adapter"
            )
        if present:
            each = [weight for adapter, weight in pairs for _ in range(layer.rank_of(adapter))]
            sums[name] = layer.change(present), each, layer.departures(present[0])
    ranks = {name: change.right.shape[0] for name, (change, *_) in sums.items()}
    for name, rank in ranks.items():
        base_of(lora_layers(model)[name].base_layer).require_rank(rank, name)
    top = max(ranks.values())
    patterns = {
        f"^{re.escape(name)}": rank
        for name, rank in sorted(ranks.items(), key=lambda item: -len(item[0]))
        if rank != top
    }
    config = LoRAConfig(
        r=top, lora_alpha=top, target_modules=list(ranks), rank_pattern=patterns, alpha_pattern=dict(patterns)
    )
    layers = lora_layers(model)
    for name, (change, each, departures) in sums.items():
        layer = layers[name]
        layer.add_adapter(adapter_name, config, name)
        layer.depart(adapter_name, departures)
        layer.set_pair(adapter_name, change.left * change.left.new_tensor(each), change.right)
    activate(model, [adapter_name])


def set_form(model: nn.Module, form: str) -> None:
    """Choose how adapted layers compute: ``"separate"`` thin products, or one ``"merged"`` product with ``W + scaling·BA``.

    Both give the same to rounding. Layers with integer codes compute separately in either, and so do convolutions whose adapter
    is no weight of the base's shape (groups, another padding).

    Raises:
        UsageError: another form.
    """
    if form not in FORMS:
        raise UsageError(f"form: must be one of {', '.join(FORMS)}, got {form!r}")
    for layer in lora_layers(model).values():
        layer.form = "separate" if base_of(layer.unmerged_base).has_codes else form
