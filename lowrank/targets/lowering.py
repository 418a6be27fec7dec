"""Modules of a user's own class that pad and then are a layer of torch's: seen at work, and taken apart for compression."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lowrank.calibration.batches import Batch, evaluating
from lowrank.calibration.outputs import tensors_in
from lowrank.errors import UsageError
from lowrank.layers import Around, CompressedLayer, PaddedLayer
from lowrank.layers.product_weight import PRODUCTS, ProductCall, call_of
from lowrank.layers.source import is_plain
from lowrank.targets.copying import become, same_module, sharing_copy

__all__ = ["INSIDE", "LIKE", "Like", "check_like", "lower", "lowered_again", "raised"]

Like = Mapping[type[nn.Module], type[nn.Module]]
LIKE = (nn.Conv1d, nn.Conv2d, nn.Linear)
# The layer inside, in names of the working copy.
INSIDE = "product"
# What may be asked of a weight without computing with it.
_ASKED = frozenset(
    {Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__}
    | {
        getattr(Tensor, name).__get__
        for name in (
            "shape",
            "dtype",
            "device",
            "ndim",
            "requires_grad",
            "is_cuda",
            "layout",
            "is_quantized",
            "is_meta",
        )
    }
)
_REMEDY = "leave the class out of like, and it is kept in int8 and decoded into its forward"


def check_like(like: Any) -> None:
    """Refuse what does not map classes of modules to ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Linear``.

    Raises:
        UsageError: names the entry.

    Example:
        >>> check_like({type("SameConv", (nn.Conv2d,), {}): nn.Conv2d})
    """
    allowed = ", ".join(f"nn.{each.__name__}" for each in LIKE)
    if not isinstance(like, Mapping):
        raise UsageError(f"like: must be a dict such as {{MyConv: nn.Conv2d}}, got {like!r}")
    for own, base in like.items():
        if not isinstance(own, type) or not issubclass(own, nn.Module):
            raise UsageError(f"like: {own!r} must be a class of modules, as in {{MyConv: nn.Conv2d}}")
        if base not in LIKE:
            raise UsageError(f"like: {own.__name__} can be like {allowed}, got {getattr(base, '__name__', base)!r}")


@dataclass
class _Seen:
    """What a module did on a batch."""

    runs: int = 0
    calls: list[ProductCall] = field(default_factory=list)
    functions: list[Any] = field(default_factory=list)
    result: Tensor | None = None
    hands_on: bool = True
    others: list[str] = field(default_factory=list)


class _Watch(TorchFunctionMode):
    """Notes what becomes of some weights."""

    def __init__(self, weights: Mapping[int, _Seen]) -> None:
        super().__init__()
        self.weights = weights

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _ASKED:
            return result
        touched = {id(value) for value in tree_leaves((args, kwargs)) if id(value) in self.weights}
        for key in touched:
            seen = self.weights[key]
            call = call_of(func, args, kwargs) if func in PRODUCTS else None
            if call is not None and id(call.weight) == key and id(call.input) != key:
                seen.calls.append(call)
                seen.functions.append(func)
                seen.result = result
            else:
                seen.others.append(getattr(func, "__name__", str(func)))
        return result


def lower(model: nn.Module, like: Like, batch: Batch, ignore: Sequence[str] = ()) -> tuple[nn.Module, dict[str, Any]]:
    """Make a copy that shares the model's parameters, in which modules of these classes are a layer of torch's inside their forward.

    Each is watched on the batch: its forward must call ``F.conv1d``, ``F.conv2d`` or ``F.linear`` once, with its own weight and bias,
    compute nothing else with them, and hand on what comes out; and the copy must compute the same.

    Args:
        model: in any mode; stays as it is.
        like: class -> ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Linear``.
        batch: to run.
        ignore: globs over names of modules that are left as they are.

    Returns:
        The copy, and by name of each such module the class and geometry of its layer, as plain JSON, for :func:`lowered_again`.

    Raises:
        UsageError: a class that no module is of, or a module that does something else: says what was seen.
    """
    check_like(like)
    chosen: dict[str, tuple[nn.Module, type[nn.Module]]] = {}
    for own, base in like.items():
        of_class = {name: module for name, module in model.named_modules() if type(module) is own}
        of_class = of_class or {name: module for name, module in model.named_modules() if isinstance(module, own)}
        if not of_class:
            raise UsageError(f"like: no module of the model is a {own.__name__}; correct the class or leave it out")
        chosen |= {
            name: (module, base)
            for name, module in of_class.items()
            if not is_plain(module, base) and not any(fnmatchcase(name, pattern) for pattern in ignore)
        }
    _refuse_unfit(model, chosen)
    seen = _watched(model, {name: module for name, (module, _) in chosen.items()}, batch)
    geometries = {name: _geometry(name, module, base, seen[name]) for name, (module, base) in chosen.items()}
    lowered = lowered_again(model, geometries)
    _refuse_difference(model, lowered, batch)
    return lowered, geometries


def _refuse_unfit(model: nn.Module, chosen: Mapping[str, tuple[nn.Module, type[nn.Module]]]) -> None:
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(name)
    for name, (module, base) in chosen.items():
        where, dims = (
            f"like: layer {name} ({type(module).__name__})",
            2 if base is nn.Linear else 3 + (base is nn.Conv2d),
        )
        weight = module._parameters.get("weight")
        held = {key for key, value in module._parameters.items() if value is not None} - {"weight", "bias"}
        held |= module.state_dict(keep_vars=True).keys() - {"weight", "bias"}
        reason = ""
        if weight is None or nn.utils.parametrize.is_parametrized(module):
            reason = "has no parameter named weight (parametrized? remove that first)"
        elif weight.dim() != dims:
            reason = f"its weight of shape {tuple(weight.shape)} is none of an nn.{base.__name__}"
        elif held:
            reason = f"holds {', '.join(sorted(held))} beside weight and bias"
        elif module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            reason = "has hooks, which would be lost"
        elif "forward" in vars(module):
            reason = "its forward was replaced on the instance"
        elif len(holders[id(weight)]) > 1:
            reason = f"its weight is that of {', '.join(other for other in holders[id(weight)] if other != name)} too"
        if reason:
            raise UsageError(f"{where}: {reason}; {_REMEDY}")


def _watched(model: nn.Module, modules: Mapping[str, nn.Module], batch: Batch) -> dict[str, _Seen]:
    """What each module does with its weight on a batch."""
    seen = {name: _Seen() for name in modules}
    handles = []

    def begin(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            seen[name].runs += 1
            seen[name].result = None

        return hook

    def end(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            result = seen[name].result
            same = isinstance(output, Tensor) and result is not None and output.shape == result.shape
            seen[name].hands_on &= same and (output is result or torch.equal(output, result))  # type: ignore[arg-type]

        return hook

    try:
        for name, module in modules.items():
            handles += [module.register_forward_pre_hook(begin(name)), module.register_forward_hook(end(name))]
        with evaluating(model), _Watch({id(module.weight): seen[name] for name, module in modules.items()}):
            batch.run(model)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _geometry(name: str, module: nn.Module, base: type[nn.Module], seen: _Seen) -> dict[str, Any]:
    """The layer's class and geometry, where the module is what it is said to be.

    Raises:
        UsageError: it is not: says what was seen.
    """
    calls, found = seen.calls, {PRODUCTS[function] for function in seen.functions}
    reason = ""
    if not seen.runs:
        reason = "the first batch does not reach it, so that nothing can be seen of it"
    elif seen.others:
        what = ", ".join(dict.fromkeys(seen.others))
        reason = f"its forward computes with the weight before the product, or beside it ({what})"
    elif not calls:
        reason = "its forward makes no product with its own weight (it makes another weight of it, or calls none of torch's functions)"
    elif len(calls) != seen.runs:
        reason = f"its forward makes {len(calls)} products in {seen.runs} calls"
    elif found != {base}:
        reason = f"its forward is an nn.{next(iter(found)).__name__}, not an nn.{base.__name__}"
    elif any(call.geometry != calls[0].geometry for call in calls):
        reason = "its forward makes products of different geometry"
    elif any(call.bias is not module._parameters.get("bias") for call in calls):
        reason = "its product is with another bias than its own"
    elif not seen.hands_on:
        reason = "its forward does more with what comes out of the product"
    if reason:
        raise UsageError(f"like: layer {name} ({type(module).__name__}): {reason}; {_REMEDY}")
    geometry = {key: list(value) if isinstance(value, tuple) else value for key, value in calls[0].geometry.items()}
    return {"of": base.__name__, **geometry}


def lowered_again(model: nn.Module, geometries: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Take a model apart as :func:`lower` did, whose findings are known.

    Raises:
        UsageError: the model has no such module, or it holds no such layer.
    """
    lowered = sharing_copy(model)
    modules = dict(lowered.named_modules())
    for name, geometry in geometries.items():
        module = modules.get(name)
        base = next((each for each in LIKE if each.__name__ == geometry.get("of")), None)
        if module is None or base is None or not isinstance(module._parameters.get("weight"), Tensor):
            raise UsageError(f"like: the model has no layer {name} with a weight that is like nn.{geometry.get('of')}")
        become(module, Around(same_module(module), _dense(module, base, geometry)))
    return lowered


def _dense(module: nn.Module, base: type[nn.Module], geometry: Mapping[str, Any]) -> nn.Module:
    """A layer of torch's with a module's own parameters."""
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None
    options = {
        key: tuple(value) if isinstance(value, list) else value for key, value in geometry.items() if key != "of"
    }
    if base is nn.Linear:
        sizes: tuple[Any, ...] = (weight.shape[1], weight.shape[0])
    else:
        sizes = (weight.shape[1] * options.get("groups", 1), weight.shape[0], tuple(weight.shape[2:]))
    with torch.device("meta"):
        layer = base(*sizes, bias=bias is not None, **options)
    layer._parameters["weight"], layer._parameters["bias"] = weight, bias
    return layer.train(module.training)


def _refuse_difference(model: nn.Module, lowered: nn.Module, batch: Batch) -> None:
    outputs = []
    for each in (model, lowered):
        with evaluating(each), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            outputs.append([tensor.detach().clone() for tensor in tensors_in(batch.run(each))])
    for one, other in zip(*outputs, strict=True):
        if one.shape != other.shape or not torch.equal(one.nan_to_num(), other.nan_to_num()):
            raise UsageError(
                f"like: with the layers inside their forwards the model computes other outputs on the first batch; {_REMEDY}"
            )


def raised(lowered: nn.Module) -> nn.Module:
    """Put together what :func:`lower` took apart: a user's forward around a compressed layer, or the module as it was.

    Args:
        lowered: changed in place.
    """
    for module in _arounds(lowered.modules()):
        product = module.product
        if isinstance(product, CompressedLayer):
            layer = PaddedLayer(product)
            layer.__dict__["source"] = module.__dict__["source"]
            layer.train(module.training)
            become(module, layer)
            layer._bind()
        else:
            become(module, module.restored())
    return lowered


def _arounds(modules: Iterable[nn.Module]) -> list[Around]:
    return [module for module in modules if isinstance(module, Around)]
