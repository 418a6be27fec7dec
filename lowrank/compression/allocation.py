"""The best plan for each sum of contributions, and the uniform plans that any plan has to beat."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowrank.compression.accounting import TargetBytes
from lowrank.compression.candidates import LayerChoices, plan_formats
from lowrank.compression.formats import REFERENCE
from lowrank.compression.layer_data import LayerData
from lowrank.compression.plan import Plan
from lowrank.compression.probes import uniform_specs
from lowrank.errors import BudgetError
from lowrank.layers.base import ACTIVATIONS, FLOAT_ACTIVATIONS

__all__ = ["Allocator"]

# A budget for plans that have one candidate a layer and nothing to choose.
UNLIMITED = 1e300


@dataclass(frozen=True)
class Allocator:
    """Make plans out of the candidates of every layer.

    Attributes:
        choices: of every layer.
        metadata: kept in every plan.
        sizes: bytes of the whole model; needed where there is a size budget.
        size_budget: stored bytes after / before.
        for_speed: seconds in place of bytes are what is minimised.
    """

    choices: Sequence[LayerChoices]
    metadata: Mapping[str, Any]
    sizes: TargetBytes | None = None
    size_budget: float | None = None
    for_speed: bool = False

    @property
    def allowed_bytes(self) -> int | None:
        """What the size budget leaves for the targets once everything else is stored as it is.

        Raises:
            BudgetError: less than the smallest candidates take.
        """
        if self.size_budget is None or self.sizes is None:
            return None
        allowed = int(self.sizes.before * self.size_budget) - self.sizes.rest
        least = sum(min(candidate.bytes for candidate in layer.candidates) for layer in self.choices)
        if allowed < least:
            raise BudgetError(
                f"size budget {self.size_budget:g}: cannot be met; the smallest these formats can make of the model is "
                f"{(least + self.sizes.rest) / self.sizes.before:.4g} of its bytes"
            )
        return allowed

    @property
    def plan_metadata(self) -> dict[str, Any]:
        """What goes into plans; of one made for speed within a size also what the size leaves, so that plans can be compared."""
        bound = self.for_speed and self.size_budget is not None
        return {**self.metadata, **({"target_bytes": self.allowed_bytes} if bound else {})}

    def plan(self, total: float) -> Plan:
        """Make the best plan whose predicted contributions sum to at most this (inf: the size budget decides).

        Where the budget has room for every layer in a compressed format, leaving layers as they are is no longer offered: a tiny layer
        kept so to spare a little error for integer activations elsewhere would make the model larger than plain codes.
        """
        metadata = self.plan_metadata
        if not math.isfinite(total):
            return plan_formats(self.choices, size_budget=self.allowed_bytes, metadata=metadata)
        if "target_bytes" in metadata:
            with contextlib.suppress(BudgetError):
                # Out of reach together; by the error alone then, and whatever keeps the size too is preferred.
                return plan_formats(
                    self.choices, error_budget=total, size_budget=metadata["target_bytes"], metadata=metadata
                )
        # For speed a layer may well stay as it is: the others then have more of the budget to get faster with.
        small = self.choices if self.for_speed else [_compressed_only(layer) for layer in self.choices]
        least = math.fsum(min(candidate.error for candidate in layer.candidates) for layer in small)
        return plan_formats(small if least <= total else self.choices, error_budget=total, metadata=metadata)

    def uniform(self, layers: Mapping[str, LayerData], activations: str) -> list[tuple[str, Plan]]:
        """Make the plans that give every layer the reference format; they are what a smarter plan has to beat."""
        plans = []
        for mode in ACTIVATIONS if activations == "auto" else (activations,):
            wanted = uniform_specs(layers.values(), mode)
            alike = []
            for layer in self.choices:
                fitting = [item for item in layer.candidates if item.spec == wanted[layer.name]]
                alike.append(replace(layer, candidates=tuple(fitting or layer.candidates[:1])))
            plans.append(
                (uniform_label(mode), plan_formats(alike, error_budget=UNLIMITED, metadata=self.plan_metadata))
            )
        return plans


def uniform_label(activations: str) -> str:
    """Name the plan that gives every layer the reference format.

    Example:
        >>> uniform_label("float")
        'int8 throughout, weight-only'
    """
    return f"{REFERENCE.name} throughout" + (", weight-only" if activations == FLOAT_ACTIVATIONS else "")


def _compressed_only(layer: LayerChoices) -> LayerChoices:
    kept = tuple(candidate for candidate in layer.candidates if candidate.compressed)
    return replace(layer, candidates=kept) if kept else layer
