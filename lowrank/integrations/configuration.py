"""What a ``config.json`` may ask for: sizes that its tensors have, and no file or source but the ones that were checked.

Plain dictionaries only, so that everything here is known before transformers is asked to build anything.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_modules

from lowrank.errors import CheckpointError
from lowrank.io import printable

__all__ = ["CONFIG_NAME", "bounded_building", "refuse_sizes", "refuse_sources", "without_origins"]

CONFIG_NAME = "config.json"
# A count of layers, which are built one by one; also as a list with a count a stage.
_COUNT = re.compile(r"(^|_)(layers?|depths?|blocks|stages)$|^(n|num)_(layers?|blocks|stages)")
# What tables and loops are made of, though no tensor need have the number.
_LENGTH = re.compile(r"position|length|frames|samples|seq|ctx|context|max_|window|chunk|period|steps")
_FREE = re.compile(r"theta|base|factor|scal|rate|seed|flos|wavelength|token|(^|_)(id|ids|idx|index|freq)$|eps|version")
_ROTARY = re.compile(r"rope|rotary|alibi|relative")
# Models have a few layers that their file knows nothing of (defaults of the half that is not there); so few cost nothing.
_FEW_LAYERS = 256
# Labels, channels, bins: below this whatever is made of a number is small.
_SMALL = 1 << 16
_LONGEST = 1 << 31
# One tensor of a file may be several parameters (experts kept apart, tied tables) and each has a few modules around it.
_PARAMETERS_PER_TENSOR = 16
_MODULES_PER_TENSOR = 32
_ALWAYS = 4096
# A model may hold buffers that no file does (masks, positions); far beyond its weights they are an attack or a mistake.
_BUFFER_BYTES_PER_STORED_BYTE = 64
_BUFFER_BYTES_ALWAYS = 256 << 20

# Where a model came from; says nothing about what it is, and nothing may follow it.
_ORIGINS = ("_name_or_path", "name_or_path")
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
_EXPERTS = ("eager", "batched_mm", "grouped_mm")
_TEXTS = ("id2label", "label2id", "auto_map", "task_specific_params", "finetuning_task", "license", "architectures")
_SOURCE_KEY = re.compile(r"(^|_)(path|paths|file|files|filename|url|uri|repo|repo_id|dir|directory|weights|revision)$")
_SOURCE_TEXT = re.compile(r"://|^[~/\\]|\\|/|\.(safetensors|bin|pt|pth|ckpt|pkl|gguf|json|py)$", re.IGNORECASE)

_PLAIN_NAME = re.compile(r"[\w.]+\Z")


def refuse_sizes(config: Mapping[str, Any], shapes: Sequence[Sequence[int]], where: str) -> None:
    """Refuse every number in a configuration that is a size and that no tensor could have.

    Args:
        config: the content of ``config.json``, parts within parts included.
        shapes: of all tensors of the file.
        where: the file, for messages.

    Raises:
        CheckpointError: says which field, its value and what the file holds.

    Example:
        >>> refuse_sizes({"num_hidden_layers": 2}, [(8, 8)] * 12, "config.json")
    """
    largest = max((size for shape in shapes for size in shape), default=0)
    rotary = any(_ROTARY.search(key) for key in _keys(config))
    for key, value in _numbers(config):
        if not math.isfinite(value):
            # A bound that is none (Mamba's time_step_limit); a size it cannot be, and transformers refuses it as one.
            continue
        if _COUNT.search(key) and not key.startswith("max_"):
            limit, what = max(len(shapes), _FEW_LAYERS), f"the file holds {len(shapes)} tensors"
        elif _FREE.search(key):
            continue
        elif _LENGTH.search(key) and rotary:
            limit, what = _LONGEST, "no sequence is as long"
        else:
            limit, what = max(largest, _SMALL), f"the largest dimension in the file is {largest}"
        if value > limit:
            raise CheckpointError(
                f"{where}: {printable(key)} is {value:g} but {what}; the configuration belongs to another model"
            )


def _keys(config: Mapping[str, Any]) -> Iterator[str]:
    for key, value in config.items():
        yield key
        if isinstance(value, Mapping):
            yield from _keys(value)


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    """Every number with the innermost name it stands under; of floats only those that could be meant as a count."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            if name not in _TEXTS:
                yield from _numbers(item, str(name))
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, key)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield key, value


def refuse_sources(config: Mapping[str, Any], where: str) -> None:
    """Refuse what would make transformers open another file than the checked ones, or ask a hub for weights or code.

    Raises:
        CheckpointError: says which field, and what to do.

    Example:
        >>> refuse_sources({"_name_or_path": "somebody/model", "hidden_act": "gelu"}, "config.json")
    """
    for key, value in _fields(config):
        fault = _source_fault(key, value)
        if fault:
            raise CheckpointError(
                f"{where}: {printable(key)} is {printable(repr(value)[:80])}: {fault}; take the field out if the tensors "
                "beside it are the whole model"
            )


def _fields(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            if name not in _TEXTS and name not in _ORIGINS:
                yield str(name), item
                yield from _fields(item, str(name))
    elif isinstance(value, list):
        for item in value:
            if not isinstance(item, str) or _SOURCE_TEXT.search(item):
                yield key, item
                yield from _fields(item, key)


def _source_fault(key: str, value: Any) -> str:
    if key.endswith("attn_implementation"):
        named = value.values() if isinstance(value, Mapping) else [value]
        known = all(item is None or item in _ATTENTION for item in named)
        return "" if known else f"attention is one of {', '.join(_ATTENTION)}; code of others would be fetched"
    if key.endswith("experts_implementation"):
        return "" if value is None or value in _EXPERTS else f"experts run as one of {', '.join(_EXPERTS)}"
    if key == "use_kernels":
        return "kernels are code that would be fetched" if value else ""
    if not isinstance(value, str) or not value:
        return ""
    if key == "backbone" and not _PLAIN_NAME.match(value):
        return "a backbone is the plain name of one that timm has; others would be asked for at the hub"
    if _SOURCE_KEY.search(key):
        return "it names a file or a source, and only the checked files of the directory are read"
    if _SOURCE_TEXT.search(value):
        return "it reads as a path or an address, and only the checked files of the directory are read"
    return ""


def without_origins(config: Mapping[str, Any], drop: Sequence[str] = ()) -> dict[str, Any]:
    """Copy a configuration without what says where it came from, at any depth; ``drop`` names more keys of the top.

    Example:
        >>> without_origins({"_name_or_path": "x", "a": {"_name_or_path": "y", "b": 1}})
        {'a': {'b': 1}}
    """
    return {
        key: without_origins(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _ORIGINS and key not in drop
    }


@contextlib.contextmanager
def bounded_building(tensors: int, tensor_bytes: int, where: str) -> Iterator[None]:
    """Stop the building of modules that grow far beyond the file that is to fill them, whatever field asks for it.

    Args:
        tensors: in the file.
        tensor_bytes: of them all.
        where: the file of the configuration, for messages.

    Raises:
        CheckpointError: from within the block, once there are too many modules or parameters, or too large buffers.

    Example:
        >>> with bounded_building(2, 24, "config.json"):
        ...     _ = nn.Linear(2, 2)
    """
    counts = {"parameters": 0, "modules": 0, "bytes of buffers": 0}
    limits = {
        "parameters": _PARAMETERS_PER_TENSOR * tensors + _ALWAYS,
        "modules": _MODULES_PER_TENSOR * tensors + 2 * _ALWAYS,
        "bytes of buffers": _BUFFER_BYTES_PER_STORED_BYTE * tensor_bytes + _BUFFER_BYTES_ALWAYS,
    }

    def count(what: str, number: int) -> None:
        counts[what] += number
        if counts[what] > limits[what]:
            raise CheckpointError(
                f"{where}: the model it describes has over {limits[what]} {what}, but the file holds {tensors} tensors "
                f"({tensor_bytes} bytes); a size in it is wrong"
            )

    def parameter(owner: nn.Module, name: str, value: nn.Parameter | None) -> None:
        count("parameters", 1)

    def submodule(owner: nn.Module, name: str, value: nn.Module | None) -> None:
        count("modules", 1)

    def buffer(owner: nn.Module, name: str, value: torch.Tensor | None) -> None:
        count("bytes of buffers", 0 if value is None else value.nbytes)

    handles = [
        torch_modules.register_module_parameter_registration_hook(parameter),
        torch_modules.register_module_module_registration_hook(submodule),
        torch_modules.register_module_buffer_registration_hook(buffer),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
