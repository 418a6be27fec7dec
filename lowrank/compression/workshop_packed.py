"""The workshop of recurrent layers and attention: several matrices in one module, int8 or dense."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from lowrank.compression.workshop import Choice, Workshop
from lowrank.layers import RECURRENT, CompressedLayer, QuantizedMultiheadAttention
from lowrank.numerics.moments import InputStatistics, TokenCounts
from lowrank.numerics.rounding import dequantize_rows, quantize_rows
from lowrank.targets.packed import weight_matrices
from lowrank.targets.survey import Target

__all__ = ["PackedWorkshop"]


class PackedWorkshop(Workshop):
    """As :class:`lowrank.compression.workshop.Workshop`, of an ``nn.LSTM``, ``nn.GRU``, ``nn.RNN``, a cell or attention.

    Errors are those of the weights alone; what they cost the model is measured by the probes. Recurrent layers are
    weight-only whatever is asked.

    Example:
        >>> from lowrank.targets.survey import survey
        >>> shop = PackedWorkshop(survey(nn.Sequential(nn.LSTM(8, 4))).targets[0], None, None)
        >>> shop.bytes(Choice("dense")), shop.bytes(Choice("int8", bits=8)), shop.modes("int8")
        (896, 448, ('float',))
    """

    formats = ("int8",)

    def __init__(
        self,
        target: Target,
        inputs: InputStatistics | None,
        lookups: TokenCounts | None,
        *,
        data_aware: bool = True,
        gradients: Tensor | None = None,
    ) -> None:
        self.target = target
        self.inputs = self.lookups = self.gradients = None
        self.matrices = {name: weight.detach() for name, weight in weight_matrices(target.owner).items()}
        # One row with all weights: norms are sums over it.
        self.weight = torch.cat([weight.flatten() for weight in self.matrices.values()])[None]
        self.rows, self.columns = next(iter(self.matrices.values())).shape
        self.centred = False
        self._built: dict[Choice, dict[str, nn.Module]] = {}

    @property
    def reached(self) -> bool:
        """Nothing is gathered from the calibration data; a layer that it does not reach shows as one of no effect."""
        return True

    def modes(self, activations: str) -> tuple[str | None, ...]:
        """See :meth:`Workshop.modes`."""
        return ("float",) if self.target.kind == "recurrent" else super().modes(activations)

    @cached_property
    def rounding(self) -> float:
        """Squared relative error of rounding all weights to 8 bits."""
        lost = 0.0
        for weight in self.matrices.values():
            rounded = dequantize_rows(*quantize_rows(weight, 8))
            lost += float((weight.to(torch.float64) - rounded.to(torch.float64)).square().sum())
        return lost / self.square_sum if self.square_sum > 0.0 else 0.0

    def errors_of(self, layer: CompressedLayer) -> tuple[float, float | None]:
        """(weight_error, None): the activations between the matrices are not looked at."""
        return self.error_of(layer.dense_weight())[0], None

    def bytes(self, choice: Choice) -> int:
        """Bytes of the tensors that the file will hold for this choice (codes, scales, biases)."""
        whole = sum(tensor.nbytes for tensor in self.target.owner.parameters())
        if choice.format == "dense":
            return whole
        biases = whole - sum(weight.nbytes for weight in self.matrices.values())
        return biases + sum(weight.numel() + 4 * weight.shape[0] for weight in self.matrices.values())

    def by_size(self, format: str) -> list[Choice]:
        """None: there are no factors of several matrices."""
        return []

    def choices(self, formats: Sequence[str], activations: str, *, never_below_int8: bool = False) -> list[Choice]:
        """int8 where that is smaller than dense."""
        found = [Choice("int8", None, 8, mode) for mode in self.modes(activations)] if "int8" in formats else []
        return [choice for choice in found if self.bytes(choice) < self.bytes(Choice("dense"))]

    def _build(self, choice: Choice) -> dict[str, nn.Module]:
        (member,) = self.target.members
        return {member.name: _layer(member.module, choice)}


def _layer(module: nn.Module, choice: Choice) -> CompressedLayer:
    bits = choice.bits or 8
    if isinstance(module, nn.MultiheadAttention):
        return QuantizedMultiheadAttention.from_module(module, bits=bits, activations=choice.activations or "int8")
    return RECURRENT[type(module)].from_module(module, bits=bits)
