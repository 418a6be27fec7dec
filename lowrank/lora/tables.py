"""Token tables (input and output embeddings) that travel with an adapter: which are saved, and what a file's are worth."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.errors import CheckpointError, UsageError
from lowrank.io import printable, read_json
from lowrank.layers import CompressedLayer
from lowrank.lora.adapter_layer import LoRALayer
from lowrank.lora.adapters import adapter_names, lora_layers
from lowrank.lora.bases import dense_twin, family
from lowrank.lora.saved_module import SavedModule
from lowrank.lora.target_modules import outer_modules, token_table
from lowrank.targets.model import replace_module

__all__ = ["BroughtTable", "brought_tables", "put_tables", "stands_for", "tables_to_save"]

log = logging.getLogger("lowrank")

_GETTERS = ("get_input_embeddings", "get_output_embeddings")
# PEFT's names of token tables, for models that have no methods to ask.
_NAMES = ("embed_tokens", "lm_head")
# A table and the factors that were made of it agree to this part of each row's norm once the table is brought into their space.
_SAME_SPACE = 0.1


def tables_to_save(model: nn.Module, adapter: str, wanted: bool | str) -> dict[str, Tensor]:
    """Find the token tables that are saved with an adapter, by their keys without PEFT's prefix.

    Args:
        adapter: its name.
        wanted: ``True``, ``False`` or ``"auto"``: where the adapter is on them, where the vocabulary is another one than in the
            directory that the model came from, and where a file brought them with the adapter.

    Raises:
        UsageError: ``wanted`` is something else.

    Example:
        >>> tables_to_save(nn.Sequential(nn.Embedding(3, 2)), "default", "auto")
        {}
    """
    if not (isinstance(wanted, bool) or wanted == "auto"):
        raise UsageError(f'save_embedding_layers: must be True, False or "auto", got {wanted!r}')
    if wanted is False:
        return {}
    layers = lora_layers(model)
    brought = {name for layer in layers.values() for name in layer.tables.get(adapter, ())}
    found = {place.name: place.module for place in outer_modules(model) if place.module in _asked(model)}
    adapted = {name for name, module in found.items() if isinstance(module, LoRALayer) and adapter in module.configs}
    resized = _vocabulary_changed(model)
    every = wanted is True or resized
    chosen = brought | adapted | (set(found) if every else set())
    others = [name for name, module in found.items() if name not in chosen and not _is_end_of(module, chosen, found)]
    if adapted and others:
        log.warning(
            "save_adapter: the adapter %s is on the token table %s, which is saved with it; %s is not. If words were added to the "
            "model, pass save_embedding_layers=True",
            adapter,
            min(adapted),
            others[0],
        )
    tables: dict[str, Tensor] = {}
    for name in sorted(chosen):
        module = model.get_submodule(name)
        if isinstance(module, SavedModule):
            if adapter in module.modules_to_save:
                continue
            module = module.original_module
        inner = f"{name}.base_layer" if isinstance(module, LoRALayer) else name
        module = module.unmerged_base if isinstance(module, LoRALayer) else module
        if isinstance(module, CompressedLayer):
            # Rounded numbers are no table to put over a dense one, but where there is no other.
            if every:
                tables[f"{inner}.weight"] = module.dense_weight().detach().to(module.dtype)
            continue
        tables |= {f"{inner}.{part}": tensor.detach() for part, tensor in module.named_parameters(recurse=False)}
    if tables:
        log.info("save_adapter: writes the token tables %s with the adapter %s", ", ".join(sorted(chosen)), adapter)
    return tables


def _asked(model: nn.Module) -> list[nn.Module]:
    """The input and output embeddings, as they are on the model."""
    tables = [token_table(model, getter) for getter in _GETTERS]
    return [table for table in tables if table is not None]


def _is_end_of(module: nn.Module, chosen: set[str], found: Mapping[str, nn.Module]) -> bool:
    """Whether a table is tied to one of those chosen."""
    own = getattr(_base(module), "weight", None)
    return own is not None and any(getattr(_base(found[name]), "weight", None) is own for name in chosen & set(found))


def _vocabulary_changed(model: nn.Module) -> bool:
    """Whether the model's vocabulary is of another size than in the directory that it was loaded from."""
    config: Any = getattr(model, "config", None)
    path = getattr(config, "_name_or_path", None)
    file = Path(path) / "config.json" if isinstance(path, str) and path else None
    if file is None or not file.is_file():
        return False
    document = read_json(file)
    nested = document.get("text_config") or {}
    before = document.get("vocab_size", nested.get("vocab_size") if isinstance(nested, dict) else None)
    now = getattr(config, "vocab_size", getattr(getattr(config, "text_config", None), "vocab_size", None))
    return before is not None and now is not None and before != now


@dataclass(frozen=True)
class BroughtTable:
    """A token table of a file that is not the model's.

    Attributes:
        names: of the module in the model, the first one first.
        parts: its tensors (``weight``, ``bias``).
    """

    names: tuple[str, ...]
    parts: dict[str, Tensor]


def brought_tables(
    model: nn.Module, adapter: str, rest: Mapping[str, Tensor], where: str
) -> tuple[list[BroughtTable], tuple[str, ...]]:
    """Sort what a file holds beside the adapter and the modules trained whole: tensors of the base model.

    Args:
        adapter: its name.
        rest: tensors by their keys without PEFT's prefix.
        where: how messages begin.

    Returns:
        The tables that are not the model's, and the names of all tables in the file.

    Raises:
        CheckpointError: a tensor that is none of the base model's, a changed one that is no token table, another shape, NaN or Inf,
            or a table that cannot be put under what the model has.
    """
    places = {name: place for place in outer_modules(model) for name in place.names}
    rest = _with_tied_end(model, rest)
    unplaced: list[str] = []
    changed: dict[str, BroughtTable] = {}
    named: dict[str, None] = {}
    for key, tensor in rest.items():
        path, _, part = key.rpartition(".")
        place = places.get(path.removesuffix(".base_layer"))
        module = None if place is None else _base(place.module)
        if place is None or module is None or not _has_part(module, part):
            unplaced.append(key)
            continue
        is_table = _is_table(model, place.name, place.module)
        if is_table:
            named[place.name] = None
            _check(_part_shape(module, part), tensor, f"{where}: {printable(key)}")
        fits = _part_shape(module, part) == tuple(tensor.shape)
        if fits and _is_same(module, part, tensor):
            continue
        if not is_table:
            unplaced.append(key)
            continue
        changed.setdefault(place.name, BroughtTable(place.names, {})).parts[part] = tensor
    if unplaced:
        raise CheckpointError(
            f"{where}: {len(unplaced)} tensors have no place in this model, the first is {printable(min(unplaced))}"
        )
    _check_ends(model, adapter, changed, where)
    return list(changed.values()), tuple(named)


def _with_tied_end(model: nn.Module, rest: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Where a model says that its tables are tied, a file may hold one end alone: its numbers are the other's as well."""
    tables = _asked(model)
    if len(tables) != len(_GETTERS) or not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return rest
    names = [place.name for table in tables for place in outer_modules(model) if place.module is table]
    given = [rest.get(f"{name}.base_layer.weight", rest.get(f"{name}.weight")) for name in names]
    if len(names) != len(_GETTERS) or (given[0] is None) == (given[1] is None):
        return rest
    lacking, tensor = (names[0], given[1]) if given[0] is None else (names[1], given[0])
    assert tensor is not None
    return {**rest, f"{lacking}.weight": tensor}


def put_tables(model: nn.Module, adapter: str, tables: list[BroughtTable], named: tuple[str, ...]) -> None:
    """Write a file's tables into the model, on both ends of a tie; a compressed one is dense from here on.

    Args:
        tables, named: what :func:`brought_tables` gave.
    """
    made: dict[int, nn.Parameter] = {}
    for table in tables:
        holder = model.get_submodule(table.names[0])
        module = _base(holder)
        if not isinstance(module, CompressedLayer):
            for part, tensor in table.parts.items():
                own = module._parameters[part]
                assert own is not None
                own.data = tensor.to(own.device, own.dtype)
            continue
        dense = dense_twin(module, table.parts)
        if "weight" in table.parts:
            # Both ends of a tie hold one parameter again.
            dense.weight = made.setdefault(id(table.parts["weight"]), dense.get_parameter("weight"))
        log.warning(
            "load_adapter: the file brings a token table of its own for %s, which is no longer compressed: %d bytes instead of %d. "
            "To keep it small, put the table into the dense model and compress that",
            printable(table.names[0]),
            sum(parameter.nbytes for parameter in dense.parameters()),
            module.stored_bytes,
        )
        if isinstance(holder, LoRALayer):
            holder.base_layer = dense
        elif isinstance(holder, SavedModule):
            holder.original_module = dense
        else:
            replace_module(model, table.names, dense)
    for layer in lora_layers(model).values():
        if adapter in layer.configs and named:
            layer.tables[adapter] = named


def stands_for(layer: CompressedLayer, table: Tensor) -> bool:
    """Tell whether a compressed table can have been made of this one: codes by their steps, factors by the space they span.

    Args:
        layer: an embedding or a linear layer.
        table: (rows, dim), as the dense module holds it.

    Returns:
        False also where that cannot be told.

    Example:
        >>> from lowrank.layers import QuantizedEmbedding
        >>> table = nn.Embedding(6, 4)
        >>> layer = QuantizedEmbedding.from_embedding(table)
        >>> stands_for(layer, table.weight), stands_for(layer, table.weight.flip(0))
        (True, False)
    """
    given = table.detach().double().cpu()
    holds = layer.exact_weight().detach().cpu()
    holds = holds.T if layer.looks_up else holds
    norms = torch.linalg.vector_norm(given, dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    pair = layer.factors()
    if pair is None:
        # Half a step off on average; three of them leave room for rounding that looks at errors together.
        steps = given.abs().amax(dim=1) / 127
        return bool(((given - holds).norm(dim=1) <= steps * math.sqrt(given.shape[1]) + norms * 1e-6).all())
    left, right = (side.detach().double().cpu() for side in pair)
    space = torch.linalg.qr(left if layer.looks_up else right.T)[0]
    apart = torch.linalg.vector_norm((given @ space) @ space.T - holds, dim=1)
    if bool((apart <= _SAME_SPACE * norms).all()):
        return True
    if layer.looks_up:
        return False
    outputs = torch.linalg.qr(left)[0]
    whole = torch.linalg.matrix_norm(outputs @ (outputs.T @ given) - holds) / torch.linalg.matrix_norm(given)
    return bool(whole <= 0.5 * _SAME_SPACE) and bool(((given - holds).norm(dim=1) <= norms).all())


def _base(module: nn.Module) -> nn.Module:
    module = module.original_module if isinstance(module, SavedModule) else module
    return module.unmerged_base if isinstance(module, LoRALayer) else module


def _has_part(module: nn.Module, part: str) -> bool:
    if isinstance(module, CompressedLayer) and part == "weight":
        return module.is_one_weight
    return module._parameters.get(part) is not None


def _part_shape(module: nn.Module, part: str) -> tuple[int, ...]:
    if isinstance(module, CompressedLayer) and part == "weight":
        return tuple(module.shape)
    return tuple(module.get_parameter(part).shape)


def _is_same(module: nn.Module, part: str, tensor: Tensor) -> bool:
    """Whether this is the base model's own tensor, rounded to another type or compressed."""
    if isinstance(module, CompressedLayer) and part == "weight":
        if not module.looks_up and len(module.shape) != 2:
            return False
        return stands_for(module, tensor)
    own = module.get_parameter(part).detach().cpu()
    return torch.equal(own.to(tensor.dtype), tensor) or torch.equal(own, tensor.to(own.dtype))


def _is_table(model: nn.Module, name: str, module: nn.Module) -> bool:
    if any(module is table for table in _asked(model)) or family(_base(module)) == "embedding":
        return True
    return name.rpartition(".")[2] in _NAMES and family(_base(module)) == "linear"


def _check(shape: tuple[int, ...], given: Tensor, where: str) -> None:
    if shape != tuple(given.shape):
        rows = given.ndim > 0 and shape[1:] == tuple(given.shape[1:])
        hint = (
            f"; it was trained with other words: call model.resize_token_embeddings({given.shape[0]}) first"
            if rows
            else ""
        )
        raise CheckpointError(f"{where}: the model needs shape {shape}, the file holds {tuple(given.shape)}{hint}")
    if not bool(torch.isfinite(given).all()):
        raise CheckpointError(f"{where}: holds NaN or Inf")


def _check_ends(model: nn.Module, adapter: str, changed: dict[str, BroughtTable], where: str) -> None:
    """Refuse tables that others on the model count on: other adapters, or the other end of a tie."""
    others = [name for name in adapter_names(model) if name != adapter]
    if changed and others:
        raise CheckpointError(
            f"{where}: brings another table for {printable(next(iter(changed)))} than the model has, under the adapters "
            f"{', '.join(others)} as well; load it on a copy of the model without them"
        )
    written: dict[int, Tensor] = {}
    for name, table in changed.items():
        module = _base(model.get_submodule(name))
        for part, tensor in table.parts.items():
            own = module._parameters.get(part)
            if own is not None and not torch.equal(written.setdefault(id(own), tensor), tensor):
                raise CheckpointError(
                    f"{where}: {printable(name)}.{part} is tied in this model, and the file gives its ends two values"
                )
        if isinstance(module, CompressedLayer):
            _check_compressed_tie(model, name, module, changed, where)


def _check_compressed_tie(
    model: nn.Module, name: str, module: CompressedLayer, changed: dict[str, BroughtTable], where: str
) -> None:
    own = {tensor.data_ptr() for tensor in module.state_dict().values()}
    for place in outer_modules(model):
        other = _base(place.module)
        if other is module or place.name in changed or not isinstance(other, CompressedLayer):
            continue
        if any(tensor.numel() and tensor.data_ptr() in own for tensor in other.state_dict().values()):
            raise CheckpointError(
                f"{where}: brings a table of its own for {printable(name)}, whose codes {printable(place.name)} shares; put the table "
                "into the dense model, and compress that"
            )
