"""The rows of a compression report: one per module that holds weights, and what they sum to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from lowrank.compression.formats import DENSE, is_dense
from lowrank.errors import CheckpointError
from lowrank.layers.spec import SPEC_FIELDS, HoldsSpec, LayerSpec
from lowrank.reporting.text import Column, counted, human_bytes, one_line, percent

__all__ = [
    "ARITHMETICS",
    "COLUMNS",
    "GROUP_COLUMNS",
    "TRIAL_COLUMNS",
    "Arithmetic",
    "LayerRow",
    "group_texts",
    "trial_texts",
    "row_from_json",
    "row_texts",
    "same_total",
    "sum_rows",
    "total_texts",
]


@dataclass(frozen=True)
class Arithmetic:
    """Say how the products of a layer are made, which is another thing than what the layer is stored as.

    Attributes:
        key: of the totals, under which the bytes are summed.
        words: for the bytes.
        remark: for one layer; empty where there is nothing to say.
        colour: on the page.
    """

    key: str
    words: str
    remark: str
    colour: str


INTEGER = Arithmetic("bytes_integer", "integer products", "integer", "1")
WEIGHT_ONLY = Arithmetic("bytes_weight_only", "weight-only codes", "weight-only", "2")
FLOATING = Arithmetic("bytes_dense", "floating point", "", "3")
ARITHMETICS = (INTEGER, WEIGHT_ONLY, FLOATING)
SUMMED = ("bytes_before", "bytes_after", "weights", *(each.key for each in ARITHMETICS))
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


TRIAL_COLUMNS = (
    Column("plan", keep="left", least=20),
    Column("size", numeric=True),
    Column("predicted", numeric=True),
    Column("error (search)", numeric=True),
    Column("error (verified)", numeric=True),
    Column("at most (95 %)", numeric=True),
    Column("outcome"),
)

GROUP_COLUMNS = (
    Column("group", keep="left", least=12),
    Column("samples", numeric=True),
    Column("error (verified)", numeric=True),
    Column("at most (95 %)", numeric=True),
    Column("median sample", numeric=True, drop=1),
    Column("worst sample", numeric=True, drop=2),
    Column("budget"),
)


@dataclass(frozen=True)
class LayerRow(HoldsSpec):
    """State what one module that holds weights was and became.

    Attributes:
        name: full module name.
        kind: what it was, e.g. ``"Linear"``.
        shape: of the weight, (out, in) for linear layers.
        spec: what it is stored as; by default as it was.
        bytes_before, bytes_after: stored bytes of the module's own tensors; a tied tensor counts in its first row.
        bits_per_weight: 8 · bytes_after / weights.
        weight_error: ‖ΔW‖_F / ‖W‖_F.
        activation_error: the same in the norm of the calibration inputs, of the weights alone.
        reason: why the layer was left alone, or what else is to be said about it.
        weights: number of original weights that this row counts.
        error_share: the part of the model's error, in the unit in which layers' errors add up, that the plan predicts from
            this layer; from 0 to 1.

    Example:
        >>> row = LayerRow("a", "Linear", (4, 4), LayerSpec("lowrank", rank=2), bytes_before=64, bytes_after=64)
        >>> row.format, row.rank, row.compressed, LayerRow("norm", "LayerNorm", (4,)).compressed
        ('lowrank', 2, True, False)
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    spec: LayerSpec = DENSE
    bytes_before: int = 0
    bytes_after: int = 0
    bits_per_weight: float | None = None
    weight_error: float | None = None
    activation_error: float | None = None
    reason: str | None = None
    weights: int = 0
    error_share: float | None = None

    @property
    def compressed(self) -> bool:
        """Tell whether the layer is stored otherwise than it was."""
        return not is_dense(self.spec.format)

    @property
    def arithmetic(self) -> Arithmetic:
        """Tell how the layer's products are made."""
        if self.activations not in (None, "float"):
            return INTEGER
        return WEIGHT_ONLY if self.bits is not None or self.spec.parts else FLOATING

    @property
    def route(self) -> str:
        """Name :attr:`arithmetic` as the totals do: ``"integer"``, ``"weight_only"`` or ``"dense"``."""
        return self.arithmetic.key.removeprefix("bytes_")

    def to_json(self) -> dict[str, Any]:
        """Return the row as plain data, the fields of its spec among its own; ``scheme`` stands even where it is null."""
        own = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "spec"}
        return own | self.spec.to_json() | {"scheme": self.scheme}


def sum_rows(rows: Iterable[LayerRow]) -> dict[str, Any]:
    """Sum up what follows from rows alone: bytes (before, after, by arithmetic), weights, size ratio, bits a weight.

    Example:
        >>> spec = LayerSpec("int8", bits=8, activations="int8")
        >>> row = LayerRow("a", "Linear", (2, 2), spec, bytes_before=16, bytes_after=12, weights=4)
        >>> totals = sum_rows([row])
        >>> totals["size_ratio"], totals["bits_per_weight"], totals["bytes_integer"]
        (0.75, 24.0, 12)
    """
    totals: dict[str, Any] = dict.fromkeys(SUMMED, 0)
    for row in rows:
        totals["bytes_before"] += row.bytes_before
        totals["bytes_after"] += row.bytes_after
        totals["weights"] += row.weights
        totals[row.arithmetic.key] += row.bytes_after
    totals["size_ratio"] = totals["bytes_after"] / totals["bytes_before"] if totals["bytes_before"] else None
    totals["bits_per_weight"] = 8 * totals["bytes_after"] / totals["weights"] if totals["weights"] else None
    return totals


def same_total(value: object, expected: float | int | None) -> bool:
    """Tell whether a stated total is the sum: integers exactly, ratios up to rounding."""
    if expected is None or isinstance(expected, int):
        return value == expected
    return isinstance(value, (int, float)) and math.isclose(value, expected, rel_tol=1e-12)


def row_texts(row: LayerRow) -> list[str]:
    """Write the cells of one row under :data:`COLUMNS`; the name of the model itself is empty."""
    return [
        one_line(row.name),
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
    """Write the cells of the totals line."""
    sums = sum_rows(rows)
    bits = sums["bits_per_weight"]
    return [
        counted(len(rows), "module"),
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


def trial_texts(totals: Mapping[str, Any], show: Callable[[float, float], str]) -> list[list[str]]:
    """Write the cells under :data:`TRIAL_COLUMNS` of the plans that were measured, where the totals tell of any.

    Args:
        totals: of a report; ``totals["finalists"]`` holds maps of ``label``, ``size_ratio`` and errors.
        show: an error as text, with the digits that tell it from the budget.
    """
    budget = totals.get("error_budget") or 0.0
    keys = ("error_foreseen", "error_search", "error_measured", "error_upper")
    return [
        [
            one_line(str(item.get("label", ""))),
            percent(item.get("size_ratio"), 3),
            *("" if item.get(key) is None else show(item[key], budget) for key in keys),
            one_line(str(item.get("outcome", ""))),
        ]
        for item in totals.get("finalists") or ()
    ]


def group_texts(
    totals: Mapping[str, Any], beside: Callable[[float, float], str], show: Callable[[float], str]
) -> list[list[str]]:
    """Write the cells under :data:`GROUP_COLUMNS` of the groups of samples, where the totals tell of any.

    Args:
        totals: of a report; ``totals["groups"]`` holds maps of ``samples``, ``error`` and ``upper``.
        beside: an error as text, with the digits that tell it from the budget.
        show: an error as text.
    """
    budget = totals.get("error_budget")
    rows = []
    for name, item in (totals.get("groups") or {}).items():
        error, upper = item.get("error"), item.get("upper")
        kept = upper is not None and budget is not None and upper <= budget
        rows.append(
            [
                one_line(name),
                f"{item.get('samples', 0):,}",
                "inf" if error is None else beside(error, budget or 0.0),
                "no bound" if upper is None else beside(upper, budget or 0.0),
                *("" if item.get(key) is None else show(item[key]) for key in ("error_median", "error_worst")),
                "" if budget is None else "kept" if kept else "not kept",
            ]
        )
    return rows


def row_from_json(item: object, source: str) -> LayerRow:
    """Read a row from its map in ``report.json``.

    Raises:
        CheckpointError: not such a map.
    """
    if not isinstance(item, dict):
        raise CheckpointError(f"{source}: each row must be a map, got a {type(item).__name__}")
    own = {entry.name for entry in fields(LayerRow)} - {"spec"}
    known = own.union(SPEC_FIELDS)
    unknown, missing = sorted(set(item) - known), sorted({"name", "kind", "shape"} - set(item))
    if unknown or missing:
        raise CheckpointError(f"{source}: row {item.get('name')!r} lacks {missing} or has unknown fields {unknown}")
    if not isinstance(item["shape"], list):
        raise CheckpointError(f"{source}: row {item['name']!r}: shape must be a list, got {item['shape']!r}")
    spec = LayerSpec.from_json({"format": DENSE.format} | item)
    return LayerRow(**{key: item[key] for key in own & set(item)} | {"shape": tuple(item["shape"]), "spec": spec})


def _format_text(row: LayerRow) -> str:
    details = [
        *([one_line(row.scheme)] if row.scheme else []),
        *([f"{row.bits} bits"] if row.bits not in (None, 8) else []),
        # Matrix by matrix, in the order of the module's own.
        *([" ".join(str(part.bits or "float") for _, part in row.spec.parts) + " bits"] if row.spec.parts else []),
    ]
    return one_line(row.format) + (f" ({', '.join(details)})" if details else "")


def _remarks(row: LayerRow) -> str:
    how = row.arithmetic.remark if row.compressed else ""
    return "; ".join(text for text in (how, one_line(row.reason or "")) if text)
