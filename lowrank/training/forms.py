"""Compressed layers in a form that gradients can move, and back into the format and the bytes they had."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank.errors import UsageError
from lowrank.layers import CompressedLayer, QuantizedLowRankLayer
from lowrank.layers.quantized_lowrank import round_factors
from lowrank.modules import replace_module
from lowrank.quantization import largest_code

__all__ = ["RoundedFactors", "TrainableForm"]

WHAT = ("auto", "factors", "adapters")


class RoundedFactors(nn.Module):
    """A ``QuantizedLowRankLayer`` while its factors are trained: rounded in the forward pass, straight through in the
    backward.

    Args:
        layer: the layer that it stands in for.

    Example:
        >>> layer = QuantizedLowRankLayer.from_linear(nn.Linear(6, 4), rank=3)
        >>> again = RoundedFactors(layer).rounded()
        >>> torch.equal(again.left_codes, layer.left_codes), again.stored_bytes == layer.stored_bytes
        (True, True)
    """

    def __init__(self, layer: QuantizedLowRankLayer) -> None:
        super().__init__()
        floats = layer.dequantize()
        self.left, self.right, self.bias = floats.left, floats.right, floats.bias
        self.bits, self.activations, self.dtype = layer.n_bits, layer.activations, layer.dtype

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        right = _straight_through(self.right, 1, self.bits)
        return F.linear(F.linear(x, right), _straight_through(self.left, 0, self.bits), self.bias)

    def rounded(self) -> QuantizedLowRankLayer:
        """The layer of the factors as they are now: the same rank, bits and activations."""
        codes = round_factors(self.left, self.right, self.bits)
        return QuantizedLowRankLayer.from_tensors(
            *codes[:3], self.bias, bits=self.bits, activations=self.activations, dtype=self.dtype
        ).train(self.training)


class TrainableForm:
    """A model's tensors that healing may move, made ready for it.

    Args:
        model: changed in place; :meth:`close` puts every format back.
        what: "factors": of compressed layers, with the biases and norms of the whole model; "adapters": what the
            model's adapters have made trainable; "auto": adapters where there are any, else factors.

    Raises:
        UsageError: another ``what``, or nothing there to train.

    Example:
        >>> model = nn.Sequential(QuantizedLowRankLayer.from_linear(nn.Linear(6, 4), rank=3), nn.LayerNorm(4))
        >>> form = TrainableForm(model)
        >>> form.what, [tuple(parameter.shape) for parameter in form.parameters]
        ('factors', [(4, 3), (3, 6), (4,), (4,), (4,)])
        >>> form.close()
        >>> type(model[0]).__name__
        'QuantizedLowRankLayer'
    """

    def __init__(self, model: nn.Module, what: str = "auto") -> None:
        if what not in WHAT:
            raise UsageError(f"what: must be one of {', '.join(WHAT)}, got {what!r}")
        adapters = [p for name, p in model.named_parameters() if p.requires_grad and "lora_" in name]
        self.model = model
        self.what = what if what != "auto" else "adapters" if adapters else "factors"
        self._flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._places: dict[nn.Module, list[str]] = {}
        if self.what == "adapters":
            self.parameters = adapters
            remedy = "add one with lowrank.add_lora(model, config), or use what='factors'"
        else:
            self._open_layers()
            self.parameters = list(dict.fromkeys(_movable(model)))
            remedy = "compress the model first"
        if not self.parameters:
            self.close()
            raise UsageError(f"heal: the model has no {self.what} to train; {remedy}")
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    def _open_layers(self) -> None:
        found: dict[QuantizedLowRankLayer, list[str]] = {}
        for name, module in self.model.named_modules(remove_duplicate=False):
            # Codes that an embedding shares are not this layer's to move.
            if type(module) is QuantizedLowRankLayer and not _is_tied(module, self.model):
                found.setdefault(module, []).append(name)
        for layer, names in found.items():
            form = RoundedFactors(layer)
            replace_module(self.model, names, form)
            self._places[form] = names

    def close(self) -> None:
        """Round what was opened, and give every parameter its ``requires_grad`` back."""
        for form, names in self._places.items():
            assert isinstance(form, RoundedFactors)
            replace_module(self.model, names, form.rounded())
        self._places = {}
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
        for module in self.model.modules():
            # What these say is of the weight that the layer was made from; it has moved since.
            for stale in ("truncation_error", "error_bound_value"):
                if self.what == "factors" and hasattr(module, stale):
                    setattr(module, stale, None)


def _movable(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        whole = isinstance(module, (CompressedLayer, RoundedFactors)) or "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and (whole or name == "bias"):
                yield parameter


def _is_tied(layer: QuantizedLowRankLayer, model: nn.Module) -> bool:
    others = (module for module in model.modules() if module is not layer and isinstance(module, CompressedLayer))
    return any(getattr(module, "left_codes", None) is layer.left_codes for module in others)


def _straight_through(factor: Tensor, dim: int, bits: int) -> Tensor:
    """The factor rounded component by component (components along the other dimension), with the gradient of itself."""
    step = factor.detach().abs().amax(dim=dim, keepdim=True) / largest_code(bits)
    step = torch.where(step > 0, step, torch.ones_like(step))
    rounded = torch.round(factor.detach() / step) * step
    return factor + (rounded - factor.detach())
