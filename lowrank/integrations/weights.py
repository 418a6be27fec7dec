"""Tensors into models of transformers: every one of a file has its place, or the class that was named is the wrong one."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowrank.errors import CheckpointError
from lowrank.integrations.configuration import CONFIG_NAME, bounded_building
from lowrank.integrations.library import as_checkpoint_error, local_and_quiet
from lowrank.io import TensorSource, printable
from lowrank.io.version import PACKAGE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["load_as", "load_as_another_class", "refuse_changed_kinds"]


def load_as(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    tensors: Mapping[str, torch.Tensor],
    source: TensorSource,
    dtype: torch.dtype | None,
    directory: Path,
) -> tuple[PreTrainedModel, list[str], list[str]]:
    """The model, the weights it has and the file has not, and the other way round but for what the class passes over."""
    failed = f"{printable(directory)}: transformers cannot load the weights as {model_class.__name__}"
    bounds = bounded_building(len(source.names), source.tensor_bytes, printable(directory / CONFIG_NAME))
    with local_and_quiet(), as_checkpoint_error(failed), bounds:
        loaded: Any = model_class.from_pretrained(
            None,
            config=config,
            state_dict=dict(tensors),
            dtype="auto" if dtype is None else dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    model, info = loaded
    recomputed = {name for name in info.get("unexpected_keys", ()) if _is_recomputed(model, name, tensors.get(name))}
    return model, sorted(info.get("missing_keys", ())), sorted(set(info.get("unexpected_keys", ())) - recomputed)


def _is_recomputed(model: nn.Module, name: str, stored: torch.Tensor | None) -> bool:
    """Whether the class makes a tensor anew that older versions of it stored (masks, tables of positions), and the same."""
    prefix = getattr(model, "base_model_prefix", "")
    buffers = dict(model.named_buffers())
    for spelled in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        made = buffers.get(spelled)
        if made is not None and stored is not None and made.shape == stored.shape:
            return torch.allclose(made.double(), stored.double(), rtol=1e-3, atol=1e-3)
    return False


def load_as_another_class(
    named: type[PreTrainedModel],
    missing: Sequence[str],
    unexpected: Sequence[str],
    config: PreTrainedConfig,
    tensors: Mapping[str, torch.Tensor],
    source: TensorSource,
    dtype: torch.dtype | None,
    directory: Path,
) -> PreTrainedModel:
    """The model as the class that takes every tensor of the file, where the one that was named leaves some out."""
    found: dict[str, PreTrainedModel] = {}
    for model_class in _classes_of(config):
        if model_class is named or model_class.__name__ in found:
            continue
        failed = f"{printable(directory)}: transformers cannot build {model_class.__name__}"
        bounds = bounded_building(len(source.names), source.tensor_bytes, printable(directory / CONFIG_NAME))
        with local_and_quiet(), as_checkpoint_error(failed), bounds, torch.device("meta"):
            wanted = model_class(copy.deepcopy(config)).state_dict()
        if any(name not in wanted or wanted[name].shape != tensors[name].shape for name in unexpected):
            continue
        model, lacking, left = load_as(model_class, config, tensors, source, dtype, directory)
        if not lacking and not left:
            found[model_class.__name__] = model
    if len(found) > 1 and not getattr(config, "is_decoder", False):
        # The same tensors as the masked model's; only a decoder is meant by it.
        found = {name: model for name, model in found.items() if not name.endswith("LMHeadModel")}
    where = (
        f"{printable(directory)}: {len(unexpected)} tensors of the file have no place in {named.__name__}, the first "
    )
    where += f"{printable(unexpected[0])!r}"
    if missing:
        where += f", and {len(missing)} weights of that class are not in the file, the first {printable(missing[0])!r}"
    if len(found) > 1:
        raise CheckpointError(
            f'{where}; several classes have one ({", ".join(found)}): name the right one in "architectures" of {CONFIG_NAME}'
        )
    if not found:
        raise CheckpointError(
            f"{where}, and nothing is left out in silence; {CONFIG_NAME} says fewer layers than the file holds, or "
            '"architectures" names another class than the one that was saved'
        )
    ((name, model),) = found.items()
    logging.getLogger(PACKAGE).warning("%s; read as %s, which has one for each", where, name)
    model.config.architectures = [name]
    return model


def _classes_of(config: PreTrainedConfig) -> list[type[PreTrainedModel]]:
    """Every class that transformers lists for a configuration: the plain one and those with heads."""
    import transformers
    from transformers.models.auto import modeling_auto

    names: dict[str, None] = {}
    for table in sorted(name for name in vars(modeling_auto) if name.endswith("MAPPING_NAMES")):
        listed = getattr(modeling_auto, table).get(config.model_type, ())
        names.update(dict.fromkeys([listed] if isinstance(listed, str) else listed))
    found = [getattr(transformers, name, None) for name in names]
    return [kind for kind in found if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)]


def refuse_changed_kinds(model: nn.Module, source: TensorSource, where: str) -> None:
    """A weight that the file holds in integers or 8-bit floats is codes of somebody's, which a cast makes another number."""
    parameters = dict(model.named_parameters())
    for name, entry in source.entries.items():
        kind = entry.torch_dtype
        parameter = parameters.get(name)
        if parameter is None or kind is None or not parameter.is_floating_point():
            continue
        if not kind.is_floating_point or kind.itemsize == 1:
            raise CheckpointError(
                f"{where}: tensor {printable(name)!r} is {entry.dtype} where the model wants floating-point weights: "
                "quantised by something else; save the original, or its weights in float16 or wider"
            )
