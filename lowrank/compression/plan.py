"""A plan: what every layer of one model becomes. Plain data, checked entry by entry wherever it comes from.

It round-trips through JSON byte for byte and may be edited by hand; applying it decides nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeAlias

from lowrank.errors import CheckpointError, LowRankError, RankError
from lowrank.io import parse_json

__all__ = ["FORMATS", "SCHEMES", "Plan", "PlanEntry"]

FORMATS = ("dense", "lowrank", "lowrank-int8", "int8")
# How a convolution is cut in two: k×k and 1×1, or k×1 and 1×k.
SCHEMES = ("channel", "spatial")
PLAN_VERSION = 1

_FACTORED = ("lowrank", "lowrank-int8")
_ROUNDED = ("int8", "lowrank-int8")
_LARGEST = 2**63 - 1
# Plan has a property of that name, which would hide the type in the class body.
_Text: TypeAlias = "str | bytes"


@dataclass(frozen=True)
class PlanEntry:
    """The choice for one layer; checked when it is made, also from JSON.

    Attributes:
        name, kind, shape: of the module and its weight, (out, in, …).
        format: one of ``FORMATS``.
        rank: for the factored formats, from 1 to the smaller side of the matrix that is factored; else ``None``. With groups, of each.
        bits: for the rounded formats, 2 to 8; else ``None``.
        activations: "int8", "float" or ``None`` for the rounded formats, else ``None``.
        bytes: predicted size of the layer's tensors.
        error: predicted additive share of the model's error.
        scheme: for factored convolutions "channel" (also where it is not given) or "spatial"; else ``None``.

    Raises:
        RankError: a rank or number of bits that the format or the shape does not allow.
        LowRankError: any other field that is not what it has to be; one line, naming the layer.

    Example:
        >>> PlanEntry("fc", "linear", (8, 4), "lowrank", 2, None, None, 96, 0.01).rank
        2
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    format: str
    rank: int | None
    bits: int | None
    activations: str | None
    bytes: int
    error: float
    scheme: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise LowRankError(f"plan: name must be a non-empty string, got {_show(self.name)}")
        where = f"plan, layer {self.name!r}"
        if not isinstance(self.kind, str) or not self.kind:
            raise LowRankError(f"{where}: kind must be a non-empty string, got {_show(self.kind)}")
        if not isinstance(self.shape, (list, tuple)) or not self.shape or not all(_whole(n, 0) for n in self.shape):
            raise LowRankError(f"{where}: shape must be a list of integers from 0, got {_show(self.shape)}")
        object.__setattr__(self, "shape", tuple(self.shape))
        if self.format not in FORMATS:
            raise LowRankError(
                f"{where}: format must be one of {', '.join(FORMATS)}, got {_show(self.format)}; "
                "another one was written by a newer lowrank: update lowrank"
            )
        self._check_scheme(where)
        if self.format in _FACTORED:
            limit = min(self.shape[0], math.prod(self.shape[1:]))
            if self.scheme == "spatial":
                limit = min(self.shape[1] * self.shape[2], self.shape[0] * self.shape[3])
            if not _whole(self.rank, 1, limit):
                raise RankError(
                    f"{where}: rank of format {self.format} must be an integer from 1 to {limit} "
                    f"(the smaller side of shape {list(self.shape)}), got {_show(self.rank)}"
                )
        elif self.rank is not None:
            raise RankError(f"{where}: rank of format {self.format} must be null, got {_show(self.rank)}")
        if self.format in _ROUNDED:
            if not _whole(self.bits, 2, 8):
                raise RankError(
                    f"{where}: bits of format {self.format} must be an integer from 2 to 8, got {_show(self.bits)}"
                )
        elif self.bits is not None:
            raise RankError(f"{where}: bits of format {self.format} must be null, got {_show(self.bits)}")
        allowed = (None, "int8", "float") if self.format in _ROUNDED else (None,)
        if self.activations not in allowed:
            names = " or ".join("null" if a is None else json.dumps(a) for a in allowed)
            raise LowRankError(
                f"{where}: activations of format {self.format} must be {names}, got {_show(self.activations)}"
            )
        if not _whole(self.bytes, 0):
            raise LowRankError(f"{where}: bytes must be an integer from 0 to {_LARGEST}, got {_show(self.bytes)}")
        if isinstance(self.error, bool) or not isinstance(self.error, (int, float)) or not 0 <= self.error < math.inf:
            raise LowRankError(f"{where}: error must be a finite number from 0, got {_show(self.error)}")
        object.__setattr__(self, "error", float(self.error))

    def _check_scheme(self, where: str) -> None:
        allowed: tuple[str | None, ...] = (None,)
        if self.format in _FACTORED and self.kind == "conv":
            allowed = SCHEMES if len(self.shape) == 4 else SCHEMES[:1]
            if self.scheme is None:
                object.__setattr__(self, "scheme", "channel")
        if self.scheme not in allowed:
            names = " or ".join("null" if a is None else json.dumps(a) for a in allowed)
            raise LowRankError(
                f"{where}: scheme of a {self.kind} layer of shape {list(self.shape)} in format {self.format} must be {names}, "
                f"got {_show(self.scheme)}"
            )


@dataclass(frozen=True)
class Plan:
    """What every layer becomes. Plain data, compared by value.

    Attributes:
        entries: one per layer, names unique.
        objective: "bytes", "cost" or "error": what was minimised; "edited" after a change by hand.
        objective_value: its total.
        duality_gap: no plan within the budget has an objective below ``objective_value − duality_gap``; in the
            objective's unit, 0 where the plan is proven optimal; ``None`` after a change by hand.
        metadata: JSON data of the caller's; kept, never read here. :func:`lowrank.apply_plan` reads what made the factors.

    Example:
        >>> plan = Plan((PlanEntry("fc", "linear", (8, 4), "int8", None, 8, "int8", 64, 0.01),))
        >>> Plan.from_json(plan.to_json()) == plan, plan.bytes, plan.error
        (True, 64, 0.01)
    """

    entries: tuple[PlanEntry, ...]
    objective: str = "edited"
    objective_value: float | None = None
    duality_gap: float | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "entries", tuple(self.entries))
        seen: set[str] = set()
        for entry in self.entries:
            if entry.name in seen:
                raise CheckpointError(f"plan, layer {entry.name!r}: stands there twice; every layer needs one entry")
            seen.add(entry.name)
        if self.objective not in ("bytes", "cost", "error", "edited"):
            raise CheckpointError(f"plan: objective {_show(self.objective)} is unknown; written by a newer lowrank?")
        for key in ("objective_value", "duality_gap"):
            value = getattr(self, key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise CheckpointError(f"plan: {key} must be null or a finite number from 0, got {_show(value)}")
            object.__setattr__(self, key, float(value))
        try:
            # Indented as in to_json, whose encoder nests less deeply than the plain one.
            copy = json.loads(json.dumps(dict(self.metadata), allow_nan=False, sort_keys=True, indent=2))
        except (TypeError, ValueError, RecursionError) as error:
            raise LowRankError(f"plan: metadata must be JSON data with string keys ({error})") from error
        object.__setattr__(self, "metadata", copy)

    @property
    def bytes(self) -> int:
        """Predicted bytes of all entries."""
        return sum(entry.bytes for entry in self.entries)

    @property
    def error(self) -> float:
        """Predicted error: the sum over all entries."""
        return math.fsum(entry.error for entry in self.entries)

    @property
    def relative_duality_gap(self) -> float | None:
        """``duality_gap / objective_value``; 0 where both are 0, ``None`` after a change by hand."""
        if self.duality_gap is None or self.objective_value is None:
            return None
        return self.duality_gap / self.objective_value if self.objective_value > 0 else 0.0

    def entry(self, name: str) -> PlanEntry:
        """The entry of one layer.

        Raises:
            LowRankError: the plan has no such layer.
        """
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise LowRankError(f"plan: has no layer {name!r} among its {len(self.entries)}")

    def with_entry(self, name: str, **changes: Any) -> Plan:
        """A copy with one entry changed, as by hand.

        Fields that a new ``format`` does not take become ``None`` and bits it needs become 8, unless given. ``bytes``
        and ``error`` stay the old predictions unless given: what is built is measured anyway.

        Raises:
            LowRankError: no such layer or field, or a value that :class:`PlanEntry` refuses.
        """
        old = self.entry(name)
        known = {item.name for item in fields(PlanEntry)}
        for key in changes:
            if key not in known:
                raise LowRankError(f"plan, layer {name!r}: has no field {key!r}; fields: {', '.join(sorted(known))}")
        new_format = changes.get("format", old.format)
        if new_format != old.format:
            if new_format not in _FACTORED:
                changes = {"rank": None, "scheme": None, **changes}
            if new_format in _ROUNDED:
                changes.setdefault("bits", old.bits or 8)
            else:
                changes = {"bits": None, "activations": None, **changes}
        new = replace(old, **changes)
        entries = tuple(new if entry.name == name else entry for entry in self.entries)
        return Plan(entries, metadata=self.metadata)

    def check_model(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Refuse a plan that was made for another model, before anything is allocated.

        Args:
            shapes: weight shapes of the model's layers by full name; layers that the plan leaves out are fine.

        Raises:
            LowRankError: names the first entry that the model lacks or whose shape differs.
        """
        for entry in self.entries:
            if entry.name not in shapes:
                raise LowRankError(
                    f"plan, layer {entry.name!r}: the model has no such layer; the plan is for another model"
                )
            actual = tuple(shapes[entry.name])
            if actual != entry.shape:
                raise LowRankError(
                    f"plan, layer {entry.name!r}: shape {list(entry.shape)} in the plan but {list(actual)} in the "
                    "model; the plan is for another model"
                )

    def to_json(self) -> str:
        """Deterministic text: sorted keys, entries in their order, one newline at the end."""
        content = {
            "format_version": PLAN_VERSION,
            "entries": [_as_json(entry) for entry in self.entries],
            "objective": self.objective,
            "objective_value": self.objective_value,
            "duality_gap": self.duality_gap,
            "total_bytes": self.bytes,
            "total_error": self.error,
            "metadata": self.metadata,
        }
        return json.dumps(content, sort_keys=True, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: _Text, *, source: str = "plan") -> Plan:
        """Read a plan, strictly; totals are counted anew from the entries.

        Args:
            text: what :meth:`to_json` wrote, perhaps edited.
            source: file name for messages.

        Raises:
            CheckpointError: not JSON, or not a plan's fields.
            LowRankError: an entry that :class:`PlanEntry` refuses.
        """
        content = parse_json(text, source=source)
        optional = {"objective", "objective_value", "duality_gap", "metadata", "total_bytes", "total_error"}
        _check_keys(content, {"format_version", "entries"}, optional, source)
        version = content["format_version"]
        if not _whole(version, 1):
            raise CheckpointError(f"{source}: format_version must be {PLAN_VERSION}, got {_show(version)}")
        if version > PLAN_VERSION:
            raise CheckpointError(
                f"{source}: format_version {_show(version)} was written by a newer lowrank; "
                f"this one reads {PLAN_VERSION}"
            )
        if not isinstance(content["entries"], list):
            raise CheckpointError(f"{source}: entries must be a list, got {_show(content['entries'])}")
        metadata = content.get("metadata", {})
        if not isinstance(metadata, dict):
            raise CheckpointError(f"{source}: metadata must be an object, got {_show(metadata)}")
        names = {item.name for item in fields(PlanEntry)}
        entries = []
        for index, raw in enumerate(content["entries"]):
            name = raw.get("name") if isinstance(raw, dict) else None
            where = f"{source}: entry {index}" + (f" ({name!r})" if isinstance(name, str) else "")
            _check_keys(raw, names - {"scheme"}, {"scheme"}, where)
            entries.append(PlanEntry(**raw))
        plan = cls(
            tuple(entries),
            content.get("objective", "edited"),
            content.get("objective_value"),
            content.get("duality_gap"),
            metadata,
        )
        totals = content.get("total_bytes", plan.bytes), content.get("total_error", plan.error)
        # Other totals than the text states: entries were edited, so what it says about the optimum no longer holds.
        return plan if totals == (plan.bytes, plan.error) else cls(plan.entries, metadata=metadata)


def _as_json(entry: PlanEntry) -> dict[str, Any]:
    """A map of the fields; no scheme where there is none."""
    return {key: value for key, value in asdict(entry).items() if key != "scheme" or value is not None}


def _whole(value: object, low: int, high: int = _LARGEST) -> bool:
    """An integer in [low, high]; ``True`` and 8.0 are none."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _show(value: object) -> str:
    """A value for a one-line message, whatever its size."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _check_keys(content: object, required: set[str], optional: set[str], where: str) -> None:
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: must be a JSON object, got {_show(content)}")
    missing = sorted(required - content.keys())
    if missing:
        raise CheckpointError(f"{where}: lacks {', '.join(missing)}")
    unknown = sorted(content.keys() - required - optional)
    if unknown:
        raise CheckpointError(
            f"{where}: unknown field {_show(unknown[0])}; written by a newer lowrank, or a slip of the hand"
        )
