"""Before a finished model is handed back: nothing of the original runs in it, and what a user will load is what was measured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowrank.calibration.batches import Batch, evaluating
from lowrank.calibration.outputs import tensors_in
from lowrank.calibration.untouched import set_modes
from lowrank.checkpoint.rebuilding import rebuilt
from lowrank.errors import UsageError
from lowrank.layers import DecodedLayer, PaddedLayer
from lowrank.targets.references import other_ways, reachable

__all__ = ["rehearse"]

# Of one batch: enough to call what the model calls.
SAMPLES = 16
# Times the dtype's epsilon: what a model that folds weights on eval() loses by folding them once more.
ROUNDING = 256.0


def rehearse(finished: nn.Module, original: nn.Module, batch: Batch | None, modes: Mapping[str, bool] | None) -> None:
    """Save a finished model to memory, build it anew, and compare the two; refuse one that the original runs in.

    Args:
        finished: in eval mode; leaves with ``modes``.
        original: it was made from this one, whose structure loading starts with.
        batch: to run; ``None`` where there is no data, so that only what is stored is checked.
        modes: those in which the caller gets the model and saves it; ``None`` to leave them.

    Raises:
        UsageError: names the module or tensor and what to do.
        CheckpointError: no file can hold the model.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> rehearse(model, nn.Sequential(nn.Linear(2, 2)), Batch((torch.ones(1, 2),)), None)
    """
    if batch is not None and batch.size > SAMPLES:
        batch = batch.select(torch.arange(SAMPLES))
    measured: list[Tensor] = []
    if batch is not None:
        _refuse_strangers(finished, original, batch)
        measured = _outputs(finished, batch)
    if modes is not None:
        set_modes(finished, modes)
    again = rebuilt(finished, original)
    if batch is None:
        return
    try:
        loaded = _outputs(again, batch)
    except (RuntimeError, NotImplementedError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(
            f"model: saved and loaded again it would not run ({(str(error).splitlines() or [''])[0]}): it computes with weights that are "
            f"in no state_dict{_hidden(finished)}; register them (nn.Parameter, nn.ModuleList, register_buffer) and try again"
        ) from error
    if _alike(measured, loaded, exact=not _own_modes(finished)):
        return
    with _seeded():
        twice = _outputs(finished, batch)
    if not _alike(measured, twice, exact=True) and not _own_modes(finished) and _as_finite(measured, loaded):
        # It answers differently each time; what was loaded cannot be told from that.
        return
    where = _first_difference(finished, again, batch)
    remedy = (
        "its train() or eval() changes weights, so that what is saved depends on the mode: pass model.train() and save in that mode"
        if _own_modes(finished)
        else "it keeps something between calls, or in places, that no state_dict holds (a cached result, an unregistered tensor): register "
        "it, or clear it before compression"
    )
    raise UsageError(
        f"model: loaded again it would compute other outputs than were measured, first in {where}: {remedy}"
    )


def _refuse_strangers(finished: nn.Module, original: nn.Module, batch: Batch) -> None:
    """Refuse where the finished model calls modules of the original, or unregistered ones with weights, or reads the original's weights."""
    own = {id(module) for module in finished.modules()}
    # The forward of a decoded or padded layer is its module's own, which it keeps beside its codes.
    own_forward = (DecodedLayer, PaddedLayer)
    kept = [
        module.source for module in finished.modules() if isinstance(module, own_forward) and module.source is not None
    ]
    own |= {id(module) for source in kept for module in source.modules()}
    foreign = {id(module): name for name, module in original.named_modules() if id(module) not in own}
    hidden = {
        id(value): path
        for path, value in reachable(finished)
        if isinstance(value, nn.Module) and id(value) not in own and id(value) not in foreign
    }
    weights = {_address(tensor): name for name, tensor in original.named_parameters() if _address(tensor)}
    for tensor in (*finished.parameters(), *finished.buffers()):
        weights.pop(_address(tensor), None)
    ran: dict[int, nn.Module] = {}

    def note(module: nn.Module, args: Any) -> None:
        ran[id(module)] = module

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        with _Read(weights) as reading:
            _outputs(finished, batch)
    finally:
        handle.remove()
    for key in ran:
        if key in foreign:
            raise UsageError(
                f"layer {foreign[key]}: the model calls it by a way that leads out of every copy (a global variable, a class attribute, a "
                "weak proxy), so that the compressed model would run the original's; call it as an attribute of the module that it is in"
            )
        if key in hidden and any(True for _ in ran[key].parameters()):
            raise UsageError(
                f"{hidden[key]}: a {type(ran[key]).__name__} that the model calls but has not registered, so that its weights are in no "
                "state_dict and no file; put it into an nn.ModuleList or nn.ModuleDict, or assign it to an attribute"
            )
    if reading.found:
        name = reading.found[0]
        raise UsageError(
            f"weight {name}: the compressed model reads the original's, by a way that leads out of every copy (a global variable, a class "
            f"attribute{''.join(f', {way}' for way in _ways(original, name))}); read it as an attribute of its module"
        )


class _Read(TorchDispatchMode):
    """Notes which of some tensors an operator is given, by the memory that they are in."""

    def __init__(self, weights: Mapping[int, str]) -> None:
        super().__init__()
        self.weights = weights
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and _address(value) in self.weights:
                self.found.append(self.weights[_address(value)])
        return func(*args, **(kwargs or {}))


def _address(tensor: Tensor) -> int:
    """Of the memory that a plain tensor is in; 0 where it has none."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_meta
    return tensor.untyped_storage().data_ptr() if plain and tensor.numel() else 0


def _ways(model: nn.Module, name: str) -> list[str]:
    path, _, leaf = name.rpartition(".")
    return other_ways(model, getattr(model.get_submodule(path), leaf))[:3]


def _hidden(model: nn.Module) -> str:
    """Where parameters are that the model has not registered, for the message."""
    known = {id(parameter) for parameter in model.parameters()}
    paths = [path for path, value in reachable(model) if isinstance(value, nn.Parameter) and id(value) not in known]
    return f" ({', '.join(paths[:3])})" if paths else ""


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """The same random numbers each time, and the caller's afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _outputs(model: nn.Module, batch: Batch) -> list[Tensor]:
    with evaluating(model), _seeded():
        return [tensor.detach().clone() for tensor in tensors_in(batch.run(model))]


def _own_modes(model: nn.Module) -> bool:
    """Whether a module does more in ``train()`` than to set flags, or may."""
    return any(
        type(module).train is not nn.Module.train or type(module).eval is not nn.Module.eval
        for module in model.modules()
    )


def _as_finite(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape and not b.is_meta and bool(torch.isfinite(a).all()) == bool(torch.isfinite(b).all())
        for a, b in zip(one, other, strict=True)
    )


def _alike(one: list[Tensor], other: list[Tensor], *, exact: bool) -> bool:
    if len(one) != len(other) or any(a.shape != b.shape or a.dtype != b.dtype for a, b in zip(one, other, strict=True)):
        return False
    for a, b in zip(one, other, strict=True):
        if b.is_meta:
            return False
        if torch.equal(a, b) or (a.is_floating_point() and torch.equal(a.nan_to_num(), b.nan_to_num())):
            continue
        if exact or not a.is_floating_point():
            return False
        size, lost = float(a.double().norm()), float((a.double() - b.double()).norm())
        if not lost <= ROUNDING * torch.finfo(a.dtype).eps * size:
            return False
    return True


def _first_difference(finished: nn.Module, again: nn.Module, batch: Batch) -> str:
    """The first module without children whose output differs, for the message."""
    found: list[dict[str, list[Tensor]]] = []
    for model in (finished, again):
        seen: dict[str, list[Tensor]] = {}
        with contextlib.ExitStack() as stack:
            for name, module in model.named_modules():
                if not any(True for _ in module.children()):
                    stack.callback(module.register_forward_hook(_keeping(seen, name)).remove)
            _outputs(model, batch)
        found.append(seen)
    for name, tensors in found[0].items():
        if not _alike(tensors, found[1].get(name, []), exact=True):
            return f"layer {name}"
    return f"what {type(finished).__name__} itself computes"


def _keeping(seen: dict[str, list[Tensor]], name: str) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        seen.setdefault(name, [tensor.detach().clone() for tensor in tensors_in(output)])

    return hook
