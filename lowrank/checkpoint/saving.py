"""Writing a compressed model: the tensors that the model holds, once each, and everything needed to load them again."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from lowrank.checkpoint.manifest import (
    CERTIFICATE,
    FORMAT_VERSION,
    MANIFEST_NAME,
    manifest_limit_bytes,
    prefix_of,
    sealed,
)
from lowrank.errors import CheckpointError, UsageError
from lowrank.io import (
    INDEX_NAME,
    WEIGHTS_NAME,
    atomic_directory,
    check_destination,
    copy_side_files,
    dtype_name,
    printable,
    write_safetensors,
    write_text,
)
from lowrank.io.version import PACKAGE, __version__
from lowrank.layers import CompressedLayer, compressed_layers
from lowrank.targets.batchnorm import FoldedBatchNorm
from lowrank.targets.model import refuse_adapters

__all__ = ["described", "is_extra_state", "require_storable", "says_tied_wrongly", "save_compressed", "stored_tensors"]

_SHARD_BYTES = 5_000_000_000
_EXTRA_STATE_REMEDY = "let it give numbers, text, lists and dicts of them, or a tensor"
# Headers and reports beside the tensors; measured 2 MB for a model of 10,000 layers.
_SIDE_BYTES = 16 << 20


def stored_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Give the tensors that a file of the model holds: its ``state_dict``, a tied tensor once, under its first name.

    Args:
        model: any module.

    Returns:
        Name to tensor, in the order of the ``state_dict``; the sum of their ``nbytes`` is the size that reports state.

    Raises:
        CheckpointError: an entry that safetensors cannot hold (not a tensor, sparse, quantised by torch, on the meta
            device, a tensor subclass, an exotic dtype).

    >>> layer = nn.Linear(2, 2, bias=False)
    >>> list(stored_tensors(nn.Sequential(layer, nn.ReLU(), layer)))
    ['0.weight']
    """
    return _owners(model)[0]


def _owners(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Stored tensors, and for every further name of one of them the name it is stored under."""
    tensors: dict[str, torch.Tensor] = {}
    ties: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict().items():
        if is_extra_state(name, tensor):
            continue
        _require_storable(name, tensor)
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj())
        if tensor.numel() and key in first:
            ties[name] = first[key]
            continue
        first.setdefault(key, name)
        tensors[name] = tensor
    return tensors, ties


def is_extra_state(name: str, value: Any) -> bool:
    """Tell whether an entry of a ``state_dict`` is what ``get_extra_state`` of a module gives, and no tensor.

    >>> is_extra_state("head._extra_state", {"steps": 3}), is_extra_state("head.weight", torch.ones(1))
    (True, False)
    """
    return name.rpartition(".")[2] == "_extra_state" and not isinstance(value, torch.Tensor)


def require_storable(model: nn.Module) -> None:
    """Refuse a model with an entry in its ``state_dict`` that no file of tensors can hold, before any work is done on it.

    Raises:
        CheckpointError: names the entry, what it is and what to do.

    >>> require_storable(nn.Linear(2, 2))
    """
    for name, value in model.state_dict(keep_vars=True).items():
        if not is_extra_state(name, value) and not isinstance(value, (UninitializedParameter, UninitializedBuffer)):
            _require_storable(name, value)
    _extra_states(model)


def _extra_states(model: nn.Module) -> dict[str, Any]:
    """What ``get_extra_state`` gives that is no tensor, by name; it has to be plain JSON."""
    found = {name: value for name, value in model.state_dict().items() if is_extra_state(name, value)}
    for name, value in found.items():
        label = f"module {printable(name.rpartition('.')[0]) or 'model'}: what its get_extra_state gives ({type(value).__name__})"
        try:
            same = _same_json(json.loads(json.dumps(value, allow_nan=False)), value)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{label} is not plain JSON ({error}); {_EXTRA_STATE_REMEDY}") from error
        if not same:
            raise CheckpointError(
                f"{label} comes back otherwise from JSON (a tuple, a key that is no text); {_EXTRA_STATE_REMEDY}"
            )
    return found


def _same_json(read: Any, value: Any) -> bool:
    if type(read) is not type(value):
        return False
    if isinstance(value, dict):
        return read.keys() == value.keys() and all(_same_json(read[key], value[key]) for key in value)
    if isinstance(value, list):
        return len(read) == len(value) and all(_same_json(one, other) for one, other in zip(read, value, strict=True))
    return bool(read == value)


def _require_storable(name: str, tensor: Any) -> None:
    label = f"tensor {printable(name)!r}"
    if not isinstance(tensor, torch.Tensor):
        raise CheckpointError(f"{label}: the state_dict holds a {type(tensor).__name__}; only tensors can be saved")
    if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.is_quantized or tensor.layout != torch.strided:
        kind = f"{type(tensor).__name__} of layout {tensor.layout}"
        raise CheckpointError(
            f"{label}: a {kind} cannot be saved; make it a plain dense tensor (`nn.Parameter(x.as_subclass(torch.Tensor))`, "
            "`.dequantize()`), or load the model unquantised"
        )
    if tensor.is_meta:
        raise CheckpointError(f"{label}: on the meta device, so it has no values; load the weights first")
    if dtype_name(tensor.dtype) is None:
        raise CheckpointError(f"{label}: safetensors cannot hold dtype {tensor.dtype}")


def save_compressed(
    model: nn.Module,
    directory: str | Path,
    *,
    plan: Any = None,
    report: Any = None,
    overwrite: bool = False,
    source: str | Path | None = None,
    extra: Mapping[str, Any] | None = None,
    certificate: Mapping[str, Any] | None = None,
    max_shard_bytes: int = _SHARD_BYTES,
) -> Path:
    """Write a compressed model; ``directory`` appears complete or stays as it was.

    Args:
        model: a module whose layers include :class:`lowrank.layers.CompressedLayer` instances; one with a
            ``config`` (transformers) gets a ``config.json`` and needs no skeleton to be loaded.
        directory: where to; its parent must exist.
        plan: written by its ``to_json()``.
        report: written as its ``files()`` gives it: texts by file name.
        overwrite: replace a directory that is not empty, in one step.
        source: the directory of the original model, whose tokenizer and processor files are copied.
        extra: plain JSON for ``lowrank_config.json``, under ``"extra"``; the same for the same run.
        certificate: what was proved of the model, by default what came with it from a file; written where its digest is of these tensors.
        max_shard_bytes: more than this and the tensors are spread over several files.

    Returns:
        The directory as an absolute path.

    Raises:
        UsageError: the directory is not empty, or nested with ``source``, or the model still has adapters.
        CheckpointError: a tensor that cannot be saved, or a report that was made for another model.
        StorageError: writing failed; nothing has changed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save_compressed(nn.Linear(2, 2), Path(folder, "out"))
    ...     sorted(file.name for file in path.iterdir())
    ['README.md', 'lowrank_config.json', 'model.safetensors']
    """
    if max_shard_bytes < 1:
        raise UsageError(f"max_shard_bytes must be at least 1; got {max_shard_bytes}")
    model = getattr(model, "_orig_mod", model)
    refuse_adapters(model, "a model's directory cannot hold")
    tensors, ties = _owners(model)
    total = sum(tensor.nbytes for tensor in tensors.values())
    _check_report(report, total)
    forbidden = [] if source is None else [source]
    real = check_destination(directory, overwrite, forbidden, total + _SIDE_BYTES)
    # A layer that is part of another one is built with it.
    layers = compressed_layers(model)
    config = hugging_face_config(model)
    guard = None
    if config is not None and layers:
        first, layer = next(iter(layers.items()))
        guard = prefix_of(first) + layer.original_key
        if guard in tensors or guard in ties:
            raise CheckpointError(f"tensor {printable(guard)!r}: a compressed layer must not store a `weight`")
        tensors = {guard: torch.empty(0), **tensors}
    # As a reader finds it: what JSON makes of it is what is digested.
    written = None if config is None else json.loads(_to_json(config, "config.json"))
    document = _manifest(model, layers, ties, guard, extra)
    certificate = certificate or vars(model).get(CERTIFICATE)
    if certificate:
        document["certificate"] = dict(certificate)
    manifest = sealed(json.loads(_to_json(document, MANIFEST_NAME)), tensors, written)
    manifest_text = _to_json(manifest, MANIFEST_NAME)
    if len(manifest_text.encode()) > manifest_limit_bytes(len(tensors)):
        raise UsageError(f"{MANIFEST_NAME} would have {len(manifest_text)} characters; pass less in extra=")
    with atomic_directory(real, overwrite) as partial:
        _write_tensors(partial, tensors, max_shard_bytes)
        write_text(partial / MANIFEST_NAME, manifest_text)
        if config is not None:
            pointer = {key: manifest[key] for key in ("quant_method", "format_version", "lowrank_version")}
            write_text(partial / "config.json", _to_json({**config, "quantization_config": pointer}, "config.json"))
        write_text(partial / "README.md", _readme(hugging_face=config is not None))
        if plan is not None:
            write_text(partial / "plan.json", plan.to_json())
        if report is not None:
            for name, text in report.files().items():
                write_text(partial / name, text)
        if source is not None and Path(source).is_dir():
            copy_side_files(source, partial)
    return real


def described(model: nn.Module) -> tuple[str, dict[str, torch.Tensor]]:
    """Give what a file of a model would hold: the manifest as text, and the tensors by name.

    Raises:
        CheckpointError: as :func:`stored_tensors`.

    >>> text, tensors = described(nn.Linear(2, 2))
    >>> list(tensors)
    ['weight', 'bias']
    """
    tensors, ties = _owners(model)
    return _to_json(_manifest(model, compressed_layers(model), ties, None, None), MANIFEST_NAME), tensors


def _check_report(report: Any, total: int) -> None:
    stated = None if report is None else report.totals.get("bytes_after")
    if stated is not None and stated != total:
        raise CheckpointError(
            f"the report counts {stated} bytes, the model holds {total}: it was changed after the report was made; "
            "save it without the report"
        )


def _manifest(
    model: nn.Module,
    layers: Mapping[str, CompressedLayer],
    ties: Mapping[str, str],
    guard: str | None,
    extra: Mapping[str, Any] | None,
) -> dict[str, Any]:
    document: dict[str, Any] = {
        "quant_method": PACKAGE,
        "format_version": FORMAT_VERSION,
        "lowrank_version": __version__,
        "torch_version": torch.__version__,
        "model_class": type(model).__qualname__,
        "layers": {name: layer.config() for name, layer in layers.items()},
        "ties": dict(ties),
        "buffers": _unstored_buffers(model, layers),
    }
    if guard is not None:
        document["guard"] = guard
    folded = [
        name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, FoldedBatchNorm)
    ]
    if folded:
        document["folded"] = folded
    states = _extra_states(model)
    if states:
        document["extra_state"] = states
    if extra:
        document["extra"] = dict(extra)
    return document


def _unstored_buffers(model: nn.Module, layers: Mapping[str, CompressedLayer]) -> dict[str, str]:
    # A skeleton makes them anew, but not always in the dtype that `model.half()` had left them in.
    stored = model.state_dict().keys()
    own = tuple(prefix_of(name) for name in layers)
    return {
        name: str(buffer.dtype).removeprefix("torch.")
        for name, buffer in model.named_buffers()
        if name not in stored and not name.startswith(own)
    }


def _write_tensors(directory: Path, tensors: Mapping[str, torch.Tensor], max_shard_bytes: int) -> None:
    shards: list[dict[str, torch.Tensor]] = [{}]
    room = max_shard_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    if len(shards) == 1:
        write_safetensors(directory / WEIGHTS_NAME, shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / file_name, shard)
        weight_map.update(dict.fromkeys(shard, file_name))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_text(directory / INDEX_NAME, _to_json(index, INDEX_NAME))


def hugging_face_config(model: nn.Module) -> dict[str, Any] | None:
    """Give ``config.json`` of a Hugging Face model as it is now, embeddings tied or not; ``None`` for any other module."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_json_string"):
        return None
    # By way of text, because transformers spells infinities and dtypes there as its own reader expects them.
    document: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    # Where it was loaded from says nothing about what it is; auto_map names code that is not copied.
    for key in ("_name_or_path", "auto_map"):
        document.pop(key, None)
    document["architectures"] = document.get("architectures") or [type(model).__name__]
    if says_tied_wrongly(model):
        document["tie_word_embeddings"] = False
    return document


def says_tied_wrongly(model: nn.Module) -> bool:
    """Tell whether the configuration calls two embedding tables tied that are not, and may be told so.

    Some models (Switch Transformers, UDOP) scale the inputs of their head where the configuration says tied: there the word
    is part of the computation and has to stay. transformers keeps differing tables apart as it loads them all the same.
    """
    config = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False) or _embeddings_tied(model):
        return False
    try:
        return "tie_word_embeddings" not in inspect.getsource(type(model).forward)
    except (OSError, TypeError):
        # No source to read, as in a frozen application.
        return True


def _embeddings_tied(model: nn.Module) -> bool:
    """False only where there are two embedding tables and they share no tensor."""
    pointers: list[set[int]] = []
    for side in ("input", "output"):
        try:
            table = getattr(model, f"get_{side}_embeddings", lambda: None)()
        except (NotImplementedError, AttributeError, KeyError, TypeError):
            # Models of images, sounds, or of two kinds of input have none of that name, and say so by raising.
            return True
        if table is None:
            return True
        pointers.append({tensor.data_ptr() for tensor in table.state_dict().values()})
    return bool(pointers[0] & pointers[1])


def _to_json(document: Mapping[str, Any], name: str) -> str:
    try:
        return json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{name}: holds something that is not plain JSON ({error})") from error


def _readme(*, hugging_face: bool) -> str:
    call = "load_model(directory)" if hugging_face else "load_model(directory, model=make_model)"
    note = "" if hugging_face else "`make_model`: the module as it was before compression, or a function making it.\n"
    return f"""# A model compressed by lowrank

```python
import lowrank
model = lowrank.{call}
```
{note}
`report.md` lists every layer with its size and error; `plan.json` can be edited and applied again.
`lowrank info` prints what is here. Plain transformers refuses to load it: it does not know these layers.
"""
