"""What all layers with integer codes and rounded activations share, linear layers and convolutions."""

from __future__ import annotations

from operator import is_
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowrank.errors import UsageError
from lowrank.layers.base import CompressedLayer, check_activations

__all__ = ["IntegerLayer"]


class IntegerLayer(CompressedLayer):
    """Base of the layers whose weight is held as int8 codes, with a bias or without.

    Attributes:
        activations: ``"int8"`` rounds what comes in and multiplies integers; ``"float"`` leaves the activations as they are
            (weight-only). May be set at any time.
        error_bound_value: bound of ‖W − W'‖_F, or ``None`` for a layer made from scratch.
    """

    _is_integer: ClassVar[bool] = True
    bias: nn.Parameter | None
    scale: Tensor

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "activations":
            value = check_activations(value)
        super().__setattr__(name, value)

    def codes_and_scale(self) -> tuple[Tensor, ...]:
        """The integer tensors and, last, the scale."""
        raise NotImplementedError

    def derive(self) -> Any:
        """What :meth:`prepared` keeps."""
        raise NotImplementedError

    def prepared(self) -> Any:
        """What is derived from the codes and the scale, made anew when one of them is replaced or written to.

        Tensors made in inference mode do not tell that they were written to: replace such a one instead.
        """
        tensors = self.codes_and_scale()
        versions = [0 if tensor.is_inference() else tensor._version for tensor in tensors]
        kept: tuple[tuple[Tensor, ...], list[int], Any] | None = self.__dict__.get("_derived")
        if kept is not None and kept[1] == versions and all(map(is_, kept[0], tensors)):
            return kept[2]
        made = self.derive()
        self.__dict__["_derived"] = (tensors, versions, made)
        return made

    def config(self) -> dict[str, Any]:
        """See :meth:`CompressedLayer.config`."""
        return super().config() | {
            "bias": self.bias is not None,
            "activations": self.activations,
            "error_bound": self.error_bound_value,
        }

    def error_bound(self) -> float:
        """A bound of ‖W − W'‖_F, W the weight that the layer was made from: truncation plus half a step of every scale.

        Raises:
            UsageError: the layer was made from scratch, so there is nothing to compare with.
        """
        if self.error_bound_value is None:
            raise UsageError(
                f"error_bound: this {self.kind} was not made from a weight; make it from the dense or the factored layer"
            )
        return self.error_bound_value

    def allocate_bias(self, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Register ``bias`` and note the dtype of the model."""
        self.dtype = dtype or torch.get_default_dtype()
        self.bias = nn.Parameter(torch.zeros(self.shape[0], device=device, dtype=self.dtype)) if bias else None

    def take_bias(self, bias: Tensor | None) -> None:
        """Take a copy of another layer's bias, ``requires_grad`` included."""
        if bias is None or self.bias is None:
            return
        with torch.no_grad():
            self.bias.copy_(bias)
        self.bias.requires_grad_(bias.requires_grad)

    activations: str
    error_bound_value: float | None
