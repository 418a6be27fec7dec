"""Loading a compressed model: everything is checked before anything is built, and read before anything is changed."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowrank.checkpoint.manifest import (
    CERTIFICATE,
    MANIFEST_NAME,
    Manifest,
    build_layer,
    check_documents,
    check_tensor,
    enclosing,
    open_checkpoint,
    roles_of,
)
from lowrank.errors import CheckpointError, UsageError
from lowrank.integrations.methods import guard_methods
from lowrank.io import TensorSource, printable
from lowrank.layers import LAYER_KINDS, CompressedLayer, DecodedLayer, PaddedLayer, call_every_layer
from lowrank.layers.roles import CODES, SCALE, damaged_scales
from lowrank.numerics.convolutions import ConvGeometry
from lowrank.numerics.rounding import largest_code
from lowrank.targets import kind_of
from lowrank.targets.batchnorm import fold_skeleton
from lowrank.targets.copying import become, copy_model

__all__ = ["fill", "load_model"]

_CONFIG_NAME = "config.json"


def load_model(
    directory: str | Path,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Load a compressed model, in eval mode; its outputs equal those of the saved one bit for bit.

    Args:
        directory: as written by ``result.save`` or :func:`lowrank.checkpoint.save_compressed`.
        model: the module as it was before compression (its weights are not used, it may be on the meta device and is
            left as it is: the result is a copy), or a function without arguments that makes one. Not needed for
            transformers models, whose ``config.json`` says how to build them.
        device: where the tensors go; the CPU unless given.
        dtype: convert floating-point tensors to it, but not quantisation scales; as stored unless given.

    Returns:
        The model with its compressed layers, ties restored.

    Raises:
        UsageError: no skeleton was given and none can be built.
        CheckpointError: the directory is damaged, was written by a newer lowrank, or does not fit the skeleton.
        ResourceError, StorageError: as the readers of :mod:`lowrank.io`.

    >>> import tempfile
    >>> from lowrank.checkpoint import save_compressed
    >>> linear = nn.Linear(2, 2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save_compressed(linear, Path(folder, "out"))
    ...     bool((load_model(path, model=lambda: nn.Linear(2, 2)).weight == linear.weight).all())
    True
    """
    directory = Path(directory)
    if dtype is not None and not dtype.is_floating_point:
        raise UsageError(f"dtype must be a floating-point dtype; got {dtype}")
    target = torch.device("cpu" if device is None else device)
    manifest, source = open_checkpoint(directory)
    skeleton = _skeleton(directory, model, manifest, source, dtype)
    fold_skeleton(skeleton, manifest.folded, source.entries, printable(directory))
    _check_fit(skeleton, manifest, source, printable(directory))
    _check_buffers(skeleton, manifest, printable(directory))
    check_documents(manifest, directory)
    # Scales first: they are small, and a bad one should not cost the reading of everything else.
    tensors = _read_all(manifest, source, target, dtype)
    return fill(skeleton, manifest, tensors, target, dtype, str(directory / MANIFEST_NAME))


def _skeleton(
    directory: Path,
    model: nn.Module | Callable[[], nn.Module] | None,
    manifest: Manifest,
    source: TensorSource,
    dtype: torch.dtype | None,
) -> nn.Module:
    if isinstance(model, nn.Module):
        return _copy_without_weights(model)
    if model is not None:
        made = model()
        if not isinstance(made, nn.Module):
            raise UsageError(f"model must be a module or a function that makes one; it made a {type(made).__name__}")
        return made
    if not (directory / _CONFIG_NAME).exists():
        made_from = printable(manifest.raw.get("model_class"))
        raise UsageError(
            f"{printable(directory)}: not a Hugging Face model, so pass model=: the module as it was before "
            f"compression ({made_from}), or a function that makes it"
        )
    from lowrank.integrations.transformers import build_from_config

    # On the meta device first: a configuration that does not fit the tensors costs no memory that way.
    with torch.device("meta"):
        trial = build_from_config(directory, source=source, dtype=dtype)
        fold_skeleton(trial, manifest.folded, source.entries, printable(directory))
    _check_fit(trial, manifest, source, printable(directory))
    return build_from_config(directory, source=source, dtype=dtype)


def _copy_without_weights(model: nn.Module) -> nn.Module:
    """A deep copy whose parameters and stored buffers are on the meta device, so that it takes next to no memory."""
    memo: dict[int, Any] = {}
    for value in model.state_dict(keep_vars=True).values():
        if isinstance(value, nn.Parameter):
            memo[id(value)] = nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=value.requires_grad)
        elif isinstance(value, torch.Tensor):
            memo[id(value)] = torch.empty_like(value, device="meta")
    try:
        return copy_model(model, memo)
    except UsageError as error:
        raise UsageError(f"{error}; or pass a function that makes the model") from error


def _check_fit(skeleton: nn.Module, manifest: Manifest, source: TensorSource, where: str) -> None:
    """Compare names and shapes of a skeleton with the manifest and the headers."""
    modules = dict(skeleton.named_modules(remove_duplicate=False))
    for name, config in manifest.layers.items():
        module = modules.get(name)
        if module is None:
            raise CheckpointError(f"{where}: the model has no layer {printable(name)!r}{_near(name, modules)}")
        found = _matrix_shape(module)
        # A Conv1D of transformers keeps its matrix transposed.
        order = sorted if found is not None and len(found) == 2 else list
        if found is not None and order(found) != order(config["shape"]):
            raise CheckpointError(
                f"{where}: layer {printable(name)!r} is {list(found)} in the model, but {config['shape']} in the file"
            )
        compared = isinstance(module, (nn.Conv1d, nn.Conv2d)) and LAYER_KINDS[config["kind"]] not in (
            DecodedLayer,
            PaddedLayer,
        )
        geometry = ConvGeometry.of(module).to_json() if compared else {}
        for option, value in geometry.items():
            stored = (config.get("geometry") or {}).get(option)
            if stored != value:
                raise CheckpointError(
                    f"{where}: layer {printable(name)!r} has {option} {value} in the model, but {printable(stored)} in the file"
                )
        for option, value in (config.get("options") or {}).items():
            # Of modules with several weights, whose first one does not tell how many there are; dropout may differ.
            if option != "dropout" and getattr(module, option, value) != value:
                raise CheckpointError(
                    f"{where}: layer {printable(name)!r} has {printable(option)} {getattr(module, option)} in the model, "
                    f"but {printable(value)} in the file"
                )
    entries = source.entries
    replaced = {id(modules[name]) for name in manifest.layers}
    inside = {name for name, module in modules.items() if id(module) in replaced}
    wanted = {name: tensor for name, tensor in skeleton.state_dict().items() if enclosing(name, inside) is None}
    for name in manifest.extra_state:
        if name not in wanted:
            raise CheckpointError(f"{where}: the model takes no extra state {printable(name)!r}{_near(name, wanted)}")
        del wanted[name]
    for name, tensor in wanted.items():
        entry = entries.get(manifest.resolve(name))
        if entry is None:
            raise CheckpointError(f"{where}: tensor {printable(name)!r} of the model is missing{_near(name, entries)}")
        if not isinstance(tensor, torch.Tensor) or entry.shape != tuple(tensor.shape):
            shape = list(getattr(tensor, "shape", ()))
            raise CheckpointError(
                f"{where}: tensor {printable(name)!r} is {shape} in the model, but {list(entry.shape)} in the file"
            )
    known = {manifest.resolve(name) for name in wanted}
    for name in entries:
        if name not in known and enclosing(name, inside) is None and name != manifest.guard:
            raise CheckpointError(f"{where}: the model has no tensor {printable(name)!r}{_near(name, wanted)}")


def _matrix_shape(module: nn.Module) -> tuple[int, ...] | None:
    if isinstance(module, CompressedLayer):
        return tuple(module.shape)
    kind = kind_of(module)
    if kind is not None and kind.composite:
        return kind.shape(module)
    weight = getattr(module, "weight", None)
    return tuple(weight.shape) if isinstance(weight, torch.Tensor) else None


def _near(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=3)
    return f"; near: {', '.join(printable(other) for other in near)}" if near else ""


def _check_buffers(skeleton: nn.Module, manifest: Manifest, where: str) -> None:
    stored = skeleton.state_dict().keys()
    for name, buffer in skeleton.named_buffers():
        if buffer.is_meta and name not in stored and manifest.layer_of(name) is None:
            raise UsageError(
                f"{where}: buffer {printable(name)!r} is in no file and on the meta device in the model, so it has no "
                "values; make the model on the CPU, or pass a function that does"
            )


def _read_all(
    manifest: Manifest, source: TensorSource, device: torch.device, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    roles = roles_of(manifest, str(source.path))
    scales = {name: role for name, role in roles.items() if role.kind == SCALE}
    # A packed byte holds several codes, so that every value of it is one.
    limits = {
        name: largest_code(role.bits)
        for name, role in roles.items()
        if role.kind == CODES and role.bits is not None and not role.packed
    }
    tensors: dict[str, torch.Tensor] = {}
    for stored in sorted(source.names, key=lambda name: name not in scales):
        if stored == manifest.guard:
            continue
        tensor = source.read(stored)
        label = f"{printable(source.path)}: tensor {printable(stored)!r}"
        raw = tensor
        if stored in scales:
            damaged, rule = damaged_scales(tensor, signed=scales[stored].signed)
            if bool(damaged.any()):
                raise CheckpointError(f"{label}: {rule}; the file is damaged")
        elif dtype is not None and tensor.is_floating_point() and tensor.element_size() > 1:
            tensor = tensor.to(dtype)
        limit = limits.get(stored)
        if limit is not None and tensor.numel() and (int(tensor.min()) < -limit or int(tensor.max()) > limit):
            raise CheckpointError(f"{label}: codes must lie in [-{limit}, {limit}]; the file is damaged")
        # After the checks that say what is wrong with a value, not only that something is.
        check_tensor(manifest, stored, raw, printable(source.path))
        tensors[stored] = tensor.to(device)
    return tensors


def fill(
    skeleton: nn.Module,
    manifest: Manifest,
    tensors: Mapping[str, torch.Tensor],
    device: torch.device,
    dtype: torch.dtype | None,
    origin: str,
) -> nn.Module:
    """Put layers and tensors into a skeleton that is known to fit.

    Args:
        skeleton: changed in place.
        tensors: by the names that they are stored under.
        dtype: of floating tensors, where it is another than the stored one.
        origin: of the manifest, for messages.
    """
    modules = dict(skeleton.named_modules(remove_duplicate=False))
    layers: dict[int, nn.Module] = {}
    for name, config in manifest.layers.items():
        if dtype is not None:
            config = {**config, "dtype": str(dtype).removeprefix("torch.")}
        layer = build_layer(name, config, printable(origin), torch.device("meta"))
        if isinstance(layer, (DecodedLayer, PaddedLayer)):
            layer.adopt(modules[name], printable(name))
        layers[id(modules[name])] = layer
    model = _replace(skeleton, layers)
    call_every_layer(model)
    state: dict[str, Any] = {
        name: tensors[manifest.resolve(name)] for name in model.state_dict() if name not in manifest.extra_state
    }
    state |= copy.deepcopy(dict(manifest.extra_state))
    model.load_state_dict(state, strict=True, assign=True)
    _tie(model, manifest)
    _move_unstored(model, manifest, device)
    if isinstance(manifest.raw.get("certificate"), dict):
        vars(model)[CERTIFICATE] = manifest.raw["certificate"]
    return guard_methods(model).eval()


def _replace(model: nn.Module, layers: Mapping[int, nn.Module]) -> nn.Module:
    """Put layers in the place of the modules with these ids, whatever way leads there."""
    for module in list(model.modules()):
        if id(module) in layers:
            become(module, layers[id(module)])
    return model


def _tie(model: nn.Module, manifest: Manifest) -> None:
    # Assigning gives each name a Parameter of its own; training must see one.
    for alias, owner in manifest.ties.items():
        alias_module, alias_leaf = _locate(model, alias)
        owner_module, owner_leaf = _locate(model, owner)
        for kind in ("_parameters", "_buffers"):
            if owner_leaf in getattr(owner_module, kind) and alias_leaf in getattr(alias_module, kind):
                getattr(alias_module, kind)[alias_leaf] = getattr(owner_module, kind)[owner_leaf]


def _locate(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _move_unstored(model: nn.Module, manifest: Manifest, device: torch.device) -> None:
    stored = model.state_dict().keys()
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        if name in stored:
            continue
        recorded = getattr(torch, manifest.buffers.get(name, ""), None)
        moved = buffer.to(device)
        if isinstance(recorded, torch.dtype) and buffer.is_floating_point() and recorded.is_floating_point:
            moved = moved.to(recorded)
        owner, leaf = _locate(model, name)
        owner._buffers[leaf] = moved
