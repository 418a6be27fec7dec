"""The tensors of a model's output that an error is measured on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.errors import CalibrationError, UsageError

__all__ = ["OutputFn", "measured_tensors", "model_tensor", "model_tensors", "tensors_in"]

OutputFn = Callable[[Any], Tensor]
# What models of transformers hand out beside their results: caches, what went on inside, and the training loss.
_BY_PRODUCTS = frozenset(
    (
        "loss",
        "past_key_values",
        "past_key_value",
        "cache_params",
        "rope_deltas",
        "attentions",
        "cross_attentions",
        "decoder_attentions",
        "encoder_attentions",
        "hidden_states",
        "decoder_hidden_states",
        "encoder_hidden_states",
        "encoder_last_hidden_state",
        "aux_loss",
        "z_loss",
        "router_logits",
        "encoder_router_logits",
        "decoder_router_logits",
    )
)
# The same in a class of transformers; anywhere else a state may well be the result (a simulator's next one).
_CACHES_OF_TRANSFORMERS = frozenset(("mems", "state", "states", "cache"))
# Whole outputs of inner models (CLIP's ``text_model_output``) repeat what the outer one computes with.
_INNER_OUTPUT = "_model_output"
# Deeper than any real output; an object that holds itself ends here.
_DEEPEST = 8


def model_tensor(output: Any) -> Tensor:
    """Give the main tensor of an output: ``logits``, else ``last_hidden_state``, else the first floating tensor.

    Raises:
        CalibrationError: the output holds no floating tensor.

    Example:
        >>> model_tensor({"loss": None, "logits": torch.ones(2)})
        tensor([1., 1.])
    """
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state"):
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    return next(iter(model_tensors(output).values()))


def model_tensors(output: Any) -> dict[str, Tensor]:
    """Give every floating tensor of an output that counts, by its path; a lone tensor is called ``"output"``.

    Tuples, lists, dicts, dataclasses and plain objects are looked into. What transformers hands out beside its results (caches,
    attentions, hidden states, losses, whole outputs of inner models) does not count, nor does a single number beside larger tensors
    (a loss); where nothing else is there, they do count. A tensor handed out under several names counts once. Complex and integer
    tensors do not count.

    Raises:
        CalibrationError: there is none.

    Example:
        >>> list(model_tensors((torch.ones(2, 4), {"score": torch.ones(2)}, torch.ones(2, dtype=torch.int64))))
        ['0', '1.score']
        >>> list(model_tensors((torch.tensor(0.3), torch.ones(2, 4))))
        ['1']
        >>> list(model_tensors({"hidden_states": torch.ones(2, 4)}))
        ['hidden_states']
    """
    found = _floating(_walk(output, "", 0)) or _floating(_walk(output, "", 0, by_products=True))
    if not found:
        raise CalibrationError(
            f"the model's output of type {type(output).__name__} holds no floating tensor to measure; "
            "pass output_fn=lambda output: <tensor>"
        )
    return found


def measured_tensors(output: Any, output_fn: OutputFn | None) -> dict[str, Tensor]:
    """Give the tensors that an error is measured on: the one that ``output_fn`` picks, or all that count.

    Raises:
        UsageError: ``output_fn`` gives something else than a tensor.
        CalibrationError: the output holds no floating tensor.

    Example:
        >>> list(measured_tensors((torch.ones(2), torch.zeros(3)), lambda output: output[1]))
        ['output']
    """
    if output_fn is None:
        return model_tensors(output)
    picked = output_fn(output)
    if not isinstance(picked, Tensor):
        raise UsageError(f"output_fn: must return a tensor, got {type(picked).__name__}")
    return {"output": picked}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Give the tensors in nested lists, tuples, dicts, dataclasses and plain objects.

    Example:
        >>> [tensor.shape[0] for tensor in tensors_in([torch.ones(2), {"x": torch.ones(3)}])]
        [2, 3]
    """
    for _, tensor in _walk(value, "", 0, by_products=True):
        yield tensor


def _floating(walked: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Those that an error can be measured on, each once; without single numbers beside larger ones."""
    found: dict[str, Tensor] = {}
    for path, tensor in walked:
        if tensor.is_floating_point() and not any(tensor is other for other in found.values()):
            found[path] = tensor
    if any(tensor.ndim for tensor in found.values()):
        found = {path: tensor for path, tensor in found.items() if tensor.ndim}
    return found


def _walk(value: Any, path: str, depth: int, *, by_products: bool = False) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path or "output", value
        return
    if depth > _DEEPEST:
        return
    if not by_products and _is_cache(value):
        return
    for name, item in _children(value):
        if by_products or not _is_by_product(name, value):
            yield from _walk(item, f"{path}.{name}" if path else name, depth + 1, by_products=by_products)


def _of_transformers(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "transformers"


def _is_cache(value: Any) -> bool:
    """Whether a value holds keys and values for the next call, also where a tuple holds it without a name."""
    return _of_transformers(value) and type(value).__name__.endswith("Cache")


def _is_by_product(name: str, holder: Any) -> bool:
    if name in _BY_PRODUCTS or name.endswith(_INNER_OUTPUT):
        return True
    return name in _CACHES_OF_TRANSFORMERS and _of_transformers(holder)


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((str(name), item) for name, item in value.items())
    elif isinstance(value, (tuple, list)):
        names = getattr(value, "_fields", None) or map(str, range(len(value)))
        yield from zip(names, value, strict=True)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    elif not isinstance(value, (type, nn.Module, torch.device, torch.dtype)) and type(value).__module__ != "builtins":
        yield from getattr(value, "__dict__", {}).items()
