"""Adapters in PEFT's own files: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.errors import AdapterError, CheckpointError, RankError, UsageError
from lowrank.io import (
    atomic_directory,
    check_destination,
    parse_json,
    printable,
    read_json,
    read_safetensors_header,
    read_tensor,
    write_safetensors,
    write_text,
)
from lowrank.io.version import PACKAGE, __version__
from lowrank.layers.source import is_conv1d
from lowrank.lora.adapter_layer import DEPARTURES, LoRALayer
from lowrank.lora.adapters import (
    activate,
    active_adapters,
    adapter_names,
    check_new_name,
    check_unmerged,
    lora_layers,
    require_adapter,
)
from lowrank.lora.bases import base_of
from lowrank.lora.config import LoRAConfig
from lowrank.lora.model import install, remove
from lowrank.lora.tables import brought_tables, put_tables, tables_to_save
from lowrank.lora.target_modules import asks_for_all_linear, find_targets
from lowrank.lora.tensors import PREFIX, adapter_tensors, by_layer, fill, fill_saved, rank_of_parts
from lowrank.targets.copying import copy_model
from lowrank.targets.model import unwrapped

__all__ = ["CONFIG_NAME", "TENSORS_NAME", "load_adapter", "reread_adapter", "save_adapter"]

log = logging.getLogger("lowrank")

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
_SIDE_BYTES = 1 << 20


def save_adapter(
    model: nn.Module,
    directory: str | Path,
    adapter_name: str | None = None,
    *,
    overwrite: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> Path:
    """Write one adapter as PEFT does; ``directory`` appears complete or stays as it was.

    PEFT loads the result on the dense model, and computes the same but for convolutions with groups, dilation or another padding
    than zeros (the log names them). ``target_modules`` is written as the user gave it, or as the list of adapted
    names where that was ``"all-linear"``: on a compressed model the same words cover other layers.

    Args:
        model: an adapted model.
        directory: where to; its parent must exist.
        adapter_name: default the active one.
        overwrite: replace a directory that is not empty.
        save_embedding_layers: write the token tables (input and output embeddings) as well. ``"auto"`` does so where the adapter
            is on them, where the vocabulary was resized after the model was loaded from a directory, and where they came with
            the adapter's own file.

    Returns:
        The directory as an absolute path.

    Raises:
        UsageError: no or several active adapters and no name given; the directory is not empty; an option that there is not.
        AdapterError: no adapter of that name.
        StorageError: writing failed.
    """
    adapter = _chosen(model, adapter_name)
    tensors = adapter_tensors(model, adapter)
    tensors |= {PREFIX + name: table for name, table in tables_to_save(model, adapter, save_embedding_layers).items()}
    document = _config_of(model, adapter).to_peft()
    layers = {name: layer for name, layer in lora_layers(model).items() if adapter in layer.configs}
    note = {
        "version": __version__,
        "learnable_scale": _own_config(model, adapter).learnable_scale,
    } | {how: [name for name, layer in layers.items() if how in layer.departures(adapter)] for how in DEPARTURES}
    metadata = {"format": "pt", PACKAGE: json.dumps(note, sort_keys=True)}
    needed_bytes = sum(tensor.nbytes for tensor in tensors.values()) + _SIDE_BYTES
    check_destination(directory, overwrite, needed_bytes=needed_bytes)
    own = [name for name, layer in layers.items() if layer.differs_in_peft(adapter)]
    if own:
        log.warning(
            "save_adapter: PEFT builds the adapters of %d convolutions otherwise (the first is %s: groups, dilation, or padding that "
            "is not zeros): load this adapter with lowrank",
            len(own),
            printable(own[0]),
        )
    with atomic_directory(directory, overwrite=overwrite) as partial:
        write_safetensors(partial / TENSORS_NAME, tensors, metadata)
        write_text(partial / CONFIG_NAME, json.dumps(document, indent=2, sort_keys=True) + "\n")
    return Path(directory).absolute()


def reread_adapter(model: nn.Module, adapter: str, file: Path) -> None:
    """Read into an adapter that the model has what was saved of it; a learned scale becomes 1, since B holds it."""
    header = read_safetensors_header(file)
    layers, rest = by_layer({name: read_tensor(header, name) for name in header.tensors})
    for name, layer in lora_layers(model).items():
        if adapter in layer.configs:
            if adapter in layer.lora_scale:
                torch.nn.init.ones_(layer.lora_scale[adapter])
            where = f"{printable(file)}: layer {printable(name)}"
            fill(layer, adapter, layers.get(name, {}), where, ())
    left = fill_saved(model, adapter, rest, printable(file))
    put_tables(model, adapter, *brought_tables(model, adapter, left, printable(file)))


def load_adapter(
    model: nn.Module, directory: str | Path, adapter_name: str = "default", inplace: bool = False
) -> nn.Module:
    """Put an adapter from PEFT's files (PEFT's own or :func:`save_adapter`'s) on a model, dense or compressed.

    Its adapters go where the file has tensors; every tensor must find its place. A token table that the file brings (new words)
    takes the place of the model's, also of a compressed one, which is dense from then on. The adapter becomes the active one.

    Args:
        model: the model it was trained on, or that model compressed.
        directory: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        adapter_name: to switch by.
        inplace: adapt the model itself instead of a copy.

    Returns:
        The adapted model: a copy unless ``inplace``.

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit the model (the tensors are named).
        AdapterError: a configuration that this package does not compute.
        RankError: a configuration with a rank that would take all memory.
        UsageError: the name is taken, or adapters are merged.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise CheckpointError(f"{printable(folder)}: not a directory with an adapter")
    if (folder / _PICKLED).exists() and not (folder / TENSORS_NAME).exists():
        raise CheckpointError(
            f"{printable(folder / _PICKLED)}: a pickle, which is never read; save it as safetensors with PEFT"
        )
    for name in (CONFIG_NAME, TENSORS_NAME):
        if not (folder / name).is_file():
            inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
            hint = f"; there are adapters in its folders {', '.join(map(printable, inside[:5]))}" if inside else ""
            raise CheckpointError(
                f"{printable(folder / name)}: missing; an adapter has {CONFIG_NAME} and {TENSORS_NAME}{hint}"
            )
    file = _AdapterFile.read(folder)
    model = unwrapped(model)
    check_new_name(model, adapter_name)
    check_unmerged(model, "load_adapter")
    if not inplace:
        model = copy_model(model)
    _load(model, adapter_name, file)
    return model


@dataclass(frozen=True)
class _AdapterFile:
    """What an adapter's directory holds: configuration, tensors by layer, tensors of modules trained whole, our own note."""

    config: LoRAConfig
    layers: dict[str, dict[str, Tensor]]
    rest: dict[str, Tensor]
    note: dict[str, Any]
    where: str

    @classmethod
    def read(cls, folder: Path) -> _AdapterFile:
        """Read both files.

        Raises:
            CheckpointError: damaged.
            AdapterError: a configuration that this package does not compute.
        """
        config = LoRAConfig.from_peft(read_json(folder / CONFIG_NAME), printable(folder / CONFIG_NAME))
        where = printable(folder / TENSORS_NAME)
        header = read_safetensors_header(folder / TENSORS_NAME)
        note = _note(header.metadata, where)
        layers, rest = by_layer({name: read_tensor(header, name) for name in header.tensors})
        return cls(_without_missing_head(config, rest, where), layers, rest, note, where)

    def check_rank(self, name: str, base: nn.Module) -> None:
        """Refuse a rank that would take all memory, or that the tensors do not have.

        Raises:
            RankError, CheckpointError: name the file and the layer.
        """
        parts, wanted = self.layers[name], self.config.rank_of(name)
        try:
            base_of(base).require_rank(wanted, printable(name))
        except RankError as error:
            raise RankError(f"{self.where}: {error}") from error
        has_rank = "lora_A" in parts or "lora_embedding_A" in parts
        if has_rank and rank_of_parts(parts) != wanted:
            raise CheckpointError(
                f"{self.where}: layer {printable(name)}: {CONFIG_NAME} says rank {wanted}, the tensors are of rank "
                f"{rank_of_parts(parts)}"
            )

    def exact_config(self) -> LoRAConfig:
        """Give the configuration that names the layers the tensors are of, whole and no others."""
        return self.config.replace(target_modules=_exactly(self.layers), layers_to_transform=None, layers_pattern=None)

    def config_here(self) -> LoRAConfig:
        """Give the same with the rank and alpha of each layer, and our own note."""
        longest_first = sorted(self.layers, key=lambda name: -len(name))
        return self.exact_config().replace(
            rank_pattern={re.escape(name): rank_of_parts(self.layers[name]) for name in longest_first},
            alpha_pattern={re.escape(name): self.config.alpha_of(name) for name in longest_first},
            learnable_scale=bool(self.note.get("learnable_scale", False)),
        )

    def departures(self, name: str) -> tuple[str, ...]:
        """Say where the adapter of a convolution departs from its base's geometry: in all of PEFT's, wherever it can."""
        return tuple(how for how in DEPARTURES if not self.note or name in self.note[how])


def _load(model: nn.Module, adapter: str, file: _AdapterFile) -> None:
    # The tensors say where adapters go.
    targets = find_targets(model, file.exact_config() if file.layers else file.config, strict=False)
    places = {name: place for place in targets.adapted for name in place.names}
    missing = [layer for layer in file.layers if layer not in places]
    if missing:
        reason = targets.left.get(missing[0]) or _why_not(model, missing[0])
        raise CheckpointError(
            f"{file.where}: holds an adapter for {printable(missing[0])} ({len(missing)} such layers), which this model "
            f"cannot take: {reason}"
        )
    if not targets.adapted and not targets.saved:
        raise CheckpointError(
            f"{file.where}: holds no adapter of a layer, and no module of its configuration is in this model"
        )
    lacking = [
        place.name
        for place in find_targets(model, file.config, strict=False).adapted
        if not set(place.names) & set(file.layers)
    ]
    before = active_adapters(model)
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for name in file.layers:
        module = places[name].module
        file.check_rank(name, module.base_layer if isinstance(module, LoRALayer) else module)
    here = file.config_here()
    install(model, here, adapter, targets, decoded=True)
    try:
        for place in targets.adapted:
            layer = model.get_submodule(place.name)
            key = next((name for name in place.names if name in file.layers), None)
            if key is None:
                continue
            assert isinstance(layer, LoRALayer)
            where = f"{file.where}: layer {printable(key)}"
            fill(layer, adapter, file.layers[key], where, file.departures(key))
            layer.configs[adapter] = file.config.replace(learnable_scale=here.learnable_scale)
        left = fill_saved(model, adapter, file.rest, file.where)
        put_tables(model, adapter, *brought_tables(model, adapter, left, file.where))
    except CheckpointError:
        remove(model, adapter)
        activate(model, before)
        for parameter, flag in trainable.items():
            parameter.requires_grad_(flag)
        raise
    if lacking:
        shown = ", ".join(printable(name) for name in lacking[:5]) + (", ..." if len(lacking) > 5 else "")
        warnings.warn(
            f"{file.where}: holds nothing for {len(lacking)} layers that target_modules names ({shown}); no adapter is on them",
            UserWarning,
            stacklevel=3,
        )


def _without_missing_head(config: LoRAConfig, rest: Mapping[str, Tensor], where: str) -> LoRAConfig:
    """Forget the task of an adapter whose file has no head for it: 0.3.0 wrote the task down and left the head alone."""
    heads = config.head_names
    listed = any(entry in heads for entry in config.modules_to_save or ())
    if not heads or listed or any(part.endswith(heads) for key in rest for part in key.split(".")[:-1]):
        return config
    warnings.warn(
        f"{where}: holds no head for task_type={config.task_type}; the model's own is used, and stays as it is",
        UserWarning,
        stacklevel=4,
    )
    return config.replace(task_type=None)


def _exactly(names: Iterable[str]) -> str:
    """A regular expression that matches these names and no others."""
    return "|".join(re.escape(name) for name in names)


def _why_not(model: nn.Module, name: str) -> str:
    try:
        return f"no adapter fits a {type(model.get_submodule(name)).__name__}"
    except AttributeError:
        return "the model has no such module"


def _note(metadata: Mapping[str, str], where: str) -> dict[str, Any]:
    """What :func:`save_adapter` wrote beside the tensors; empty for a file of PEFT's."""
    if PACKAGE not in metadata:
        return {}
    try:
        note = parse_json(metadata[PACKAGE], source=where)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: its metadata on lowrank is damaged ({error})") from error
    if not isinstance(note, dict) or not all(isinstance(note.setdefault(how, []), list) for how in DEPARTURES):
        raise CheckpointError(f"{where}: its metadata on lowrank is not a map with lists {' and '.join(DEPARTURES)}")
    return note


def _chosen(model: nn.Module, adapter: str | None) -> str:
    if adapter is not None:
        require_adapter(model, adapter)
        return adapter
    running = active_adapters(model)
    if len(running) == 1:
        return running[0]
    known = adapter_names(model)
    if len(known) == 1:
        return known[0]
    raise UsageError(
        f"adapter_name: which of {', '.join(known) or 'no adapters'}? Active are {', '.join(running) or 'none'}"
    )


def _own_config(model: nn.Module, adapter: str) -> LoRAConfig:
    for layer in lora_layers(model).values():
        if adapter in layer.configs:
            return layer.configs[adapter]
    raise AdapterError(f"adapter {adapter!r}: adapts no layer; save the trained modules with the model")


def _config_of(model: nn.Module, adapter: str) -> LoRAConfig:
    """The configuration as PEFT will read it: resolved names, and how the bases store their weights."""
    config = _own_config(model, adapter)
    layers = {name: layer for name, layer in lora_layers(model).items() if adapter in layer.configs}
    if asks_for_all_linear(config):
        config = config.replace(target_modules=sorted(layers))
    if {place.name for place in find_targets(model, config, strict=False).adapted} != set(layers):
        # A name that is also the end of another's: only an expression can tell them apart.
        config = config.replace(target_modules=_exactly(sorted(layers)), layers_to_transform=None, layers_pattern=None)
    transposed = any(is_conv1d(layer.unmerged_base) for layer in layers.values())
    path = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    return config.replace(
        fan_in_fan_out=config.fan_in_fan_out or transposed,
        base_model_name_or_path=config.base_model_name_or_path or path,
    )
