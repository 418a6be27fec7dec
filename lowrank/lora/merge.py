"""Merging adapters into a model and taking them out again: all layers or none, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate
from torch import nn

from lowrank.checkpoint.saving import says_tied_wrongly
from lowrank.errors import AdapterError, RankError, UsageError, is_whole
from lowrank.layers import CompressedLayer
from lowrank.lora.adapter_layer import LoRALayer
from lowrank.lora.adapters import activate, check_one_copy, lora_layers, require_adapter
from lowrank.lora.base_update import MergeOptions, merged_base
from lowrank.lora.changes import MergeRow
from lowrank.lora.saved_module import SavedModule
from lowrank.lora.target_modules import outer_modules
from lowrank.targets.model import replace_module

__all__ = ["MergeReport", "merge_lora", "merge_report", "unload_lora", "unmerge_lora"]


@dataclass(frozen=True)
class MergeReport:
    """What merging did, one row a layer.

    Attributes:
        rows: ``name, kind, adapters, rank_before, rank_after, bytes_before, bytes_after, error, note``; ``error`` is
            ‖merged − exact‖_F / ‖exact − before‖_F, the part of the adapters' change that rounding or truncation lost.
    """

    rows: tuple[MergeRow, ...]

    @property
    def bytes_before(self) -> int:
        """Of the layers listed."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """Of the layers listed."""
        return sum(row.bytes_after for row in self.rows)

    @property
    def lost(self) -> tuple[str, ...]:
        """Names of the layers that keep less than half of the adapters' change: its numbers are below their codes' steps."""
        return tuple(row.name for row in self.rows if row.error > 0.5)

    @property
    def worst(self) -> MergeRow | None:
        """The row of the largest error."""
        return max(self.rows, key=lambda row: row.error, default=None)

    def __str__(self) -> str:
        if not self.rows:
            return "nothing is merged"
        table = [
            (
                row.name,
                row.kind,
                row.rank_before,
                row.rank_after,
                row.bytes_before,
                row.bytes_after,
                f"{row.error:.2e}",
                row.note,
            )
            for row in self.rows
        ]
        headers = ["layer", "kind", "rank", "after", "bytes", "after", "error", ""]
        return tabulate(table, headers=headers, missingval="-", disable_numparse=True)


def merge_lora(
    model: nn.Module,
    adapters: str | Sequence[str] | None = None,
    *,
    rank: int | None = None,
    max_error: float | None = None,
    requantize: bool = False,
) -> nn.Module:
    """Put the adapters into the weights, every layer in the format it has: the model runs as fast as without them.

    Dense layers get the sum. Float low-rank layers get the adapter's components appended, ``[left, s·B]`` and ``[right;
    A]``; int8 low-rank layers likewise, codes and scales of the base unchanged and the appended components rounded.
    No rank grows past min(out, in): there the product is truncated again. Acts on the model itself;
    :func:`unmerge_lora` brings everything back bit for bit. Merging what is merged already does nothing.
    :func:`merge_report` says what it cost, :func:`unload_lora` leaves a model without adapters.

    Args:
        adapters: names, which become the active ones; default those that are.
        rank: truncate factored layers to this rank afterwards.
        max_error: truncate factored layers as far as ‖ΔW‖/‖W‖ stays within this.
        requantize: let layers be rounded anew where their codes leave no room (dense int8, DoRA on int8).

    Raises:
        AdapterError: a layer cannot take its adapter; every such layer is listed with the reason, and nothing is merged.
        NumericsError: NaN or Inf in an adapter or a result; nothing is merged.
        UsageError: other adapters are merged already, nothing is there to merge, or several train the same module whole.

    Example:
        >>> from lowrank.lora import LoRAConfig, add_lora
        >>> model = merge_lora(add_lora(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=1)))
        >>> merge_report(model).rows[0].note
        'added to the weight'
    """
    options = _options(rank, max_error, requantize)
    layers = lora_layers(model)
    if adapters is not None:
        adapters = (adapters,) if isinstance(adapters, str) else tuple(adapters)
        if not adapters:
            raise UsageError("merge_lora: adapters is empty; name one, or leave it out for the active ones")
        for adapter in adapters:
            require_adapter(model, adapter)
        check_one_copy(model, adapters, "merge_lora")
    made: list[tuple[LoRALayer, nn.Module, tuple[str, ...], MergeRow]] = []
    refused: dict[str, list[str]] = {}
    for name, layer in layers.items():
        wanted = tuple(adapter for adapter in (adapters or layer.active_adapters) if adapter in layer.configs)
        if layer.merged_adapters:
            if wanted and set(wanted) != set(layer.merged_adapters):
                raise UsageError(
                    f"merge_lora: {', '.join(layer.merged_adapters)} merged already (layer {name}); unmerge_lora first"
                )
            continue
        if not wanted:
            continue
        try:
            made.append((layer, *_with_names(merged_base(name, layer, wanted, options), wanted)))
        except AdapterError as error:
            refused.setdefault(str(error).removeprefix(f"layer {name}: "), []).append(name)
    if refused:
        raise AdapterError("merge_lora: nothing was merged. " + " | ".join(map(_refusal, refused, refused.values())))
    if not made and not any(layer.merged_adapters for layer in layers.values()):
        raise UsageError("merge_lora: no adapter is active; name one, or set_adapter first")
    if adapters is not None and made:
        # A layer without them runs its base alone, and a module trained whole is theirs.
        activate(model, adapters)
    for layer, merged, names, row in made:
        layer.take_merged(merged, names, row)
    return model


def _refusal(reason: str, layers: Sequence[str]) -> str:
    others = f" (and {len(layers) - 1} more layers)" if len(layers) > 1 else ""
    return f"layer {layers[0]}{others}: {reason}"


def _with_names(
    result: tuple[nn.Module, MergeRow], names: tuple[str, ...]
) -> tuple[nn.Module, tuple[str, ...], MergeRow]:
    return result[0], names, result[1]


def _options(rank: object, max_error: object, requantize: bool) -> MergeOptions:
    if rank is not None and not is_whole(rank, 1):
        raise RankError(f"rank: must be an integer of at least 1, got {rank!r}")
    if max_error is not None and (
        isinstance(max_error, bool) or not isinstance(max_error, (int, float)) or not 0.0 <= max_error < math.inf
    ):
        raise RankError(f"max_error: must be a finite number of at least 0, got {max_error!r}")
    return MergeOptions(rank, max_error, bool(requantize))


def unmerge_lora(model: nn.Module) -> nn.Module:
    """Take merged adapters out again: bases as they were bit for bit, adapters beside them. Acts on the model itself."""
    for layer in lora_layers(model).values():
        layer.unmerge()
    return model


def merge_report(model: nn.Module) -> MergeReport:
    """Report what the adapters that are merged at the moment cost."""
    rows = [layer.merge_row for layer in lora_layers(model).values()]
    return MergeReport(tuple(row for row in rows if row is not None))


def unload_lora(model: nn.Module) -> nn.Module:
    """Take the adapter layers off the model itself: merged adapters stay in the weights, others are dropped.

    A module trained whole stays as trained where its adapter is active. Where merging changed one end of a tied pair, the model's
    configuration says so from here on (``tie_word_embeddings`` false), so that transformers keeps both; what else of a dense
    model was tied gets copies of its own.

    Example:
        >>> from lowrank.lora import LoRAConfig, add_lora
        >>> unload_lora(merge_lora(add_lora(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=1))))
        Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
        )
    """
    for place in outer_modules(model):
        if isinstance(place.module, LoRALayer):
            replace_module(model, place.names, place.module.base_layer)
        elif isinstance(place.module, SavedModule):
            replace_module(model, place.names, place.module.running)
    if says_tied_wrongly(model):
        config: Any = model.config
        config.tie_word_embeddings = False
        # A compressed model's own files say which tensors are shared.
        if not any(isinstance(module, CompressedLayer) for module in model.modules()):
            _part_shared(model)
    return model


def _part_shared(model: nn.Module) -> None:
    """Every module its own copy of a parameter that it shares.

    With ``tie_word_embeddings`` false transformers ties none, while its files hold a shared tensor once: without this the
    further tables of an encoder-decoder would be missing there, and random where it is loaded.
    """
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in seen:
                own = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                module._parameters[name] = own
            elif parameter is not None:
                seen.add(id(parameter))
