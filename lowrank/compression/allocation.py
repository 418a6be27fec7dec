"""The best plan for each sum of contributions, and the uniform plans that any plan has to beat."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowrank.compression.accounting import TargetBytes
from lowrank.compression.candidates import Candidate, LayerChoices, plan_formats
from lowrank.compression.formats import FORMATS, is_plain_rounding
from lowrank.compression.plan import Plan
from lowrank.errors import BudgetError
from lowrank.layers.base import ACTIVATIONS, FLOAT_ACTIVATIONS
from lowrank.layers.spec import LayerSpec

__all__ = ["Allocator"]

# A budget for plans that have one candidate a layer and nothing to choose.
UNLIMITED = 1e306


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

    def uniform(self, formats: Iterable[str], activations: str) -> list[tuple[str, Plan]]:
        """Make the plans that give every layer the same rounding format; they are what a smarter plan has to beat.

        Args:
            formats: by name; those that are no plain rounding are passed over.
            activations: as of :class:`lowrank.compression.formats.Request`.
        """
        plans = []
        for name in rounding_formats(formats):
            for mode in ACTIVATIONS if activations == "auto" else (activations,):
                grid = _common_grid(self.choices, name, mode)
                alike = [replace(layer, candidates=(_alike(layer, name, mode, grid),)) for layer in self.choices]
                plan = plan_formats(alike, error_budget=UNLIMITED, metadata=self.plan_metadata)
                plans.append((uniform_label(name, mode), plan))
        return plans


def rounding_formats(formats: Iterable[str]) -> list[str]:
    """List those of these formats that hold codes and no factors, in the order of their registration.

    Example:
        >>> rounding_formats(("lowrank", "int8"))
        ['int8']
    """
    asked = set(formats)
    return [name for name in FORMATS if name in asked and is_plain_rounding(name)]


def uniform_label(format: str, activations: str) -> str:
    """Name the plan that gives every layer the same format.

    Example:
        >>> uniform_label("int8", "float")
        'int8 throughout, weight-only'
    """
    return f"{format} throughout" + (", weight-only" if activations == FLOAT_ACTIVATIONS else "")


def _grid(spec: LayerSpec) -> tuple[object, ...]:
    return spec.group, spec.zero_point, spec.rounding


def _common_grid(choices: Sequence[LayerChoices], format: str, mode: str) -> tuple[object, ...] | None:
    """The groups and zero points with which a format does best over all layers: error against bytes, at what a bit is worth."""
    count: Counter[tuple[object, ...]] = Counter()
    error: Counter[tuple[object, ...]] = Counter()
    size: Counter[tuple[object, ...]] = Counter()
    for layer in choices:
        for item in layer.candidates:
            if item.spec.format == format and item.spec.activations in (mode, None):
                grid, bits = _grid(item.spec), item.spec.bits or 8
                count[grid] += 1
                size[grid] += item.bytes
                weights = item.shares[0][1]
                error[grid] += min(weights, 1e290) ** (1.0 / bits)
    if not count:
        return None
    most = max(count.values())
    # A bit more takes 1/bits of the bytes and leaves a quarter of the squared error.
    return min(
        (grid for grid in count if count[grid] == most),
        key=lambda grid: math.log(size[grid]) + _worth(error[grid] / most),
    )


def _worth(error: float) -> float:
    return math.log(max(error, 1e-300)) / math.log(4.0)


def _alike(layer: LayerChoices, format: str, mode: str, grid: tuple[object, ...] | None) -> Candidate:
    """The candidate of a layer that is most like the others': of the format, with this way of taking activations and this grid.

    A layer that knows only other roundings takes the smallest of those that lose no more bits, and one that knows none stays as it is.
    """
    own = [item for item in layer.candidates if item.spec.format == format]
    if not own:
        others = [item for item in layer.candidates if is_plain_rounding(item.spec.format)]
        own = [min(others, key=lambda item: (item.error, item.bytes))] if others else []
    fitting = [item for item in own if item.spec.activations in (mode, None)] or own
    gridded = [item for item in fitting if _grid(item.spec) == grid] or fitting
    return gridded[0] if gridded else layer.candidates[0]


def _compressed_only(layer: LayerChoices) -> LayerChoices:
    kept = tuple(candidate for candidate in layer.candidates if candidate.compressed)
    return replace(layer, candidates=kept) if kept else layer
