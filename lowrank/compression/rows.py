"""The rows of a compression report: one per module that holds weights, and what they sum to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from lowrank.errors import CheckpointError
from lowrank.reporting.text import Column, count_text, human_bytes, one_line, percent

__all__ = [
    "COLUMNS",
    "FINALIST_COLUMNS",
    "LayerRow",
    "finalist_texts",
    "row_from_json",
    "row_texts",
    "same_total",
    "sum_rows",
    "total_texts",
]

SUMMED = ("bytes_before", "bytes_after", "weights", "bytes_integer", "bytes_weight_only", "bytes_dense")
COLUMNS = (
    Column("layer", keep="right", least=30),
    Column("format"),
    Column("rank", numeric=True),
    Column("before", numeric=True, drop=3),
    Column("after", numeric=True),
    Column("bits/w", numeric=True, drop=4),
    Column("weight err", numeric=True, drop=2),
    Column("act. err", numeric=True, drop=6),
    Column("kind", drop=1),
    Column("shape", drop=5),
    Column("remarks", keep="left", drop=7),
)


FINALIST_COLUMNS = (
    Column("plan", keep="left", least=20),
    Column("size", numeric=True),
    Column("error (search)", numeric=True),
    Column("error (verified)", numeric=True),
    Column("at most (95 %)", numeric=True),
)


@dataclass(frozen=True)
class LayerRow:
    """One module that holds weights.

    Attributes:
        name: full module name.
        kind: what it was, e.g. ``"Linear"``.
        shape: of the weight, (out, in) for linear layers.
        format: ``"dense"``, ``"int8"``, ``"lowrank"``, ``"lowrank-int8"``.
        rank, bits: ``None`` where the format has none.
        bytes_before, bytes_after: stored bytes of the module's own tensors; a tied tensor counts in its first row.
        bits_per_weight: 8 · bytes_after / weights.
        weight_error: ‖ΔW‖_F / ‖W‖_F.
        activation_error: the same in the norm of the calibration inputs, of the weights alone.
        reason: why the layer was left alone, or what else is to be said about it.
        activations: ``"int8"`` (integer products), ``"float"`` (weight-only), ``None`` (neither).
        weights: number of original weights that this row counts.
        scheme: of a factored convolution, ``"channel"`` or ``"spatial"``; ``None`` for all else.
        error_share: the part of the model's error, in the unit in which layers' errors add up, that the plan predicts from
            this layer; from 0 to 1.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    format: str = "dense"
    rank: int | None = None
    bits: int | None = None
    bytes_before: int = 0
    bytes_after: int = 0
    bits_per_weight: float | None = None
    weight_error: float | None = None
    activation_error: float | None = None
    reason: str | None = None
    activations: str | None = None
    weights: int = 0
    scheme: str | None = None
    error_share: float | None = None

    @property
    def route(self) -> str:
        """``"integer"``, ``"weight_only"`` or ``"dense"``: what arithmetic the layer's bytes take part in."""
        if self.activations == "int8":
            return "integer"
        return "weight_only" if self.bits is not None else "dense"


def sum_rows(rows: Iterable[LayerRow]) -> dict[str, Any]:
    """The totals that follow from rows alone: bytes (before, after, by arithmetic), weights, size ratio, bits a weight.

    Example:
        >>> row = LayerRow("a", "Linear", (2, 2), "int8", None, 8, 16, 12, activations="int8", weights=4)
        >>> totals = sum_rows([row])
        >>> totals["size_ratio"], totals["bits_per_weight"], totals["bytes_integer"]
        (0.75, 24.0, 12)
    """
    totals: dict[str, Any] = dict.fromkeys(SUMMED, 0)
    for row in rows:
        totals["bytes_before"] += row.bytes_before
        totals["bytes_after"] += row.bytes_after
        totals["weights"] += row.weights
        totals[f"bytes_{row.route}"] += row.bytes_after
    totals["size_ratio"] = totals["bytes_after"] / totals["bytes_before"] if totals["bytes_before"] else None
    totals["bits_per_weight"] = 8 * totals["bytes_after"] / totals["weights"] if totals["weights"] else None
    return totals


def same_total(value: object, expected: float | int | None) -> bool:
    """Whether a stated total is the sum: integers exactly, ratios up to rounding."""
    if expected is None or isinstance(expected, int):
        return value == expected
    return isinstance(value, (int, float)) and math.isclose(value, expected, rel_tol=1e-12)


def row_texts(row: LayerRow, name: str) -> list[str]:
    """The cells of one row under :data:`COLUMNS`, with the name as it is to be shown."""
    return [
        name or "(the model itself)",
        _format_text(row),
        "" if row.rank is None else str(row.rank),
        human_bytes(row.bytes_before),
        human_bytes(row.bytes_after),
        "" if row.bits_per_weight is None else f"{row.bits_per_weight:.2f}",
        "" if row.weight_error is None else percent(row.weight_error),
        "" if row.activation_error is None else percent(row.activation_error),
        one_line(row.kind),
        "x".join(map(str, row.shape)),
        _remarks(row),
    ]


def total_texts(rows: Sequence[LayerRow]) -> list[str]:
    """The cells of the totals line."""
    sums = sum_rows(rows)
    bits = sums["bits_per_weight"]
    return [
        f"{count_text(len(rows))} modules",
        "",
        "",
        human_bytes(sums["bytes_before"]),
        human_bytes(sums["bytes_after"]),
        "" if bits is None else f"{bits:.2f}",
        "",
        "",
        "",
        "",
        f"{percent(sums['size_ratio'], 3)} of the size" if sums["size_ratio"] is not None else "",
    ]


def finalist_texts(totals: Mapping[str, Any], show: Callable[[float], str]) -> list[list[str]]:
    """The cells under :data:`FINALIST_COLUMNS` of the plans that were measured, where the totals tell of any.

    Args:
        totals: of a report; ``totals["finalists"]`` holds maps of ``label``, ``size_ratio`` and errors.
        show: an error as text.
    """
    keys = ("error_search", "error_measured", "error_upper")
    return [
        [
            one_line(str(item.get("label", ""))),
            percent(item.get("size_ratio"), 3),
            *("" if item.get(key) is None else show(item[key]) for key in keys),
        ]
        for item in totals.get("finalists") or ()
    ]


def row_from_json(item: object, source: str) -> LayerRow:
    """A row from its map in ``report.json``.

    Raises:
        CheckpointError: not such a map.
    """
    if not isinstance(item, dict):
        raise CheckpointError(f"{source}: each row must be a map, got a {type(item).__name__}")
    known = {entry.name for entry in fields(LayerRow)}
    unknown, missing = sorted(set(item) - known), sorted({"name", "kind", "shape"} - set(item))
    if unknown or missing:
        raise CheckpointError(f"{source}: row {item.get('name')!r} lacks {missing} or has unknown fields {unknown}")
    if not isinstance(item["shape"], list):
        raise CheckpointError(f"{source}: row {item['name']!r}: shape must be a list, got {item['shape']!r}")
    return LayerRow(**{**item, "shape": tuple(item["shape"])})


def _format_text(row: LayerRow) -> str:
    details = [
        *([one_line(row.scheme)] if row.scheme else []),
        *([f"{row.bits} bits"] if row.bits not in (None, 8) else []),
    ]
    return one_line(row.format) + (f" ({', '.join(details)})" if details else "")


def _remarks(row: LayerRow) -> str:
    how = {"integer": "integer", "weight_only": "weight-only", "dense": ""}[row.route]
    if row.format == "dense":
        how = ""
    return "; ".join(text for text in (how, one_line(row.reason or "")) if text)
