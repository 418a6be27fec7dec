"""A plan: what every layer of one model becomes. Plain data, checked entry by entry wherever it comes from.

It round-trips through JSON byte for byte and may be edited by hand; applying it decides nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from lowrank.compression.formats import FORMATS
from lowrank.compression.formats.base import shown
from lowrank.errors import CheckpointError, LowRankError, is_whole
from lowrank.io import parse_json
from lowrank.layers.base import FLOAT_ACTIVATIONS
from lowrank.layers.spec import SPEC_FIELDS, HoldsSpec, LayerSpec

__all__ = ["Plan", "PlanEntry", "same_specs"]

PLAN_VERSION = 1

_LARGEST = 2**63 - 1
# Plan has a property of that name, which would hide the type in the class body.
_Text: TypeAlias = "str | bytes"


@dataclass(frozen=True)
class PlanEntry(HoldsSpec):
    """The choice for one layer; checked when it is made, also from JSON.

    Attributes:
        name, kind, shape: of the module and its weight, (out, in, …).
        spec: the format and its numbers.
        bytes: predicted size of the layer's tensors.
        error: predicted additive share of the model's error.

    Raises:
        RankError: a rank or number of bits that the format or the shape does not allow.
        LowRankError: any other field that is not what it has to be; one line, naming the layer.

    Example:
        >>> PlanEntry("fc", "linear", (8, 4), LayerSpec("lowrank", rank=2), 96, 0.01).rank
        2
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    spec: LayerSpec
    bytes: int
    error: float

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise LowRankError(f"plan: name must be a non-empty string, got {shown(self.name)}")
        where = f"plan, layer {self.name!r}"
        if not isinstance(self.kind, str) or not self.kind:
            raise LowRankError(f"{where}: kind must be a non-empty string, got {shown(self.kind)}")
        if (
            not isinstance(self.shape, (list, tuple))
            or not self.shape
            or not all(is_whole(n, 0, _LARGEST) for n in self.shape)
        ):
            raise LowRankError(f"{where}: shape must be a list of integers from 0, got {shown(self.shape)}")
        object.__setattr__(self, "shape", tuple(self.shape))
        known = FORMATS.get(self.spec.format) if isinstance(self.spec.format, str) else None
        if known is None:
            raise LowRankError(
                f"{where}: format must be one of {', '.join(FORMATS)}, got {shown(self.spec.format)}; "
                "another one was written by a newer lowrank: update lowrank"
            )
        object.__setattr__(self, "spec", known.completed(self.spec, self.kind, self.shape))
        known.check_fields(self.spec, self.kind, self.shape, where)
        if not is_whole(self.bytes, 0, _LARGEST):
            raise LowRankError(f"{where}: bytes must be an integer from 0 to {_LARGEST}, got {shown(self.bytes)}")
        if isinstance(self.error, bool) or not isinstance(self.error, (int, float)) or not 0 <= self.error < math.inf:
            raise LowRankError(f"{where}: error must be a finite number from 0, got {shown(self.error)}")
        object.__setattr__(self, "error", float(self.error))

    @property
    def compressed(self) -> bool:
        """Whether the layer does not stay as it is."""
        return not FORMATS[self.spec.format].dense

    def to_json(self) -> dict[str, Any]:
        """Return one flat map of the fields and the spec's."""
        own = {"name": self.name, "kind": self.kind, "shape": self.shape, "bytes": self.bytes, "error": self.error}
        return own | self.spec.to_json()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PlanEntry:
        """Read :meth:`to_json`'s map back."""
        return cls(data["name"], data["kind"], data["shape"], LayerSpec.from_json(data), data["bytes"], data["error"])


_ENTRY_FIELDS = ("name", "kind", "shape", "bytes", "error")
# What to_json always writes; the other fields of a spec are written where they are set.
_REQUIRED = {*_ENTRY_FIELDS, "format", "rank", "bits", "activations"}


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
        >>> plan = Plan((PlanEntry("fc", "linear", (8, 4), LayerSpec("int8", bits=8, activations="int8"), 64, 0.01),))
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
            raise CheckpointError(f"plan: objective {shown(self.objective)} is unknown; written by a newer lowrank?")
        for key in ("objective_value", "duality_gap"):
            value = getattr(self, key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise CheckpointError(f"plan: {key} must be null or a finite number from 0, got {shown(value)}")
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
    def weight_only_bytes(self) -> int:
        """Predicted bytes of the layers that multiply codes with activations as they are."""
        return sum(entry.bytes for entry in self.entries if entry.activations == FLOAT_ACTIVATIONS)

    @property
    def relative_duality_gap(self) -> float | None:
        """``duality_gap / objective_value``; 0 where both are 0, ``None`` after a change by hand."""
        if self.duality_gap is None or self.objective_value is None:
            return None
        return self.duality_gap / self.objective_value if self.objective_value > 0 else 0.0

    def entry(self, name: str) -> PlanEntry:
        """Find the entry of one layer.

        Raises:
            LowRankError: the plan has no such layer.
        """
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise LowRankError(f"plan: has no layer {name!r} among its {len(self.entries)}")

    def with_entry(self, name: str, **changes: Any) -> Plan:
        """Make a copy with one entry changed, as by hand.

        Fields that a new ``format`` does not take become ``None`` and bits it needs become 8, unless given. ``bytes``
        and ``error`` stay the old predictions unless given: what is built is measured anyway.

        Raises:
            LowRankError: no such layer or field, or a value that :class:`PlanEntry` refuses.
        """
        old = self.entry(name)
        known = {*_ENTRY_FIELDS, *SPEC_FIELDS}
        for key in changes:
            if key not in known:
                raise LowRankError(f"plan, layer {name!r}: has no field {key!r}; fields: {', '.join(sorted(known))}")
        wanted = {key: changes.pop(key) for key in SPEC_FIELDS if key in changes}
        spec = old.spec if wanted.get("format", old.format) == old.format else _respelled(old.spec, wanted["format"])
        new = replace(old, spec=replace(spec, **wanted), **changes)
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
            "entries": [entry.to_json() for entry in self.entries],
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
        if not is_whole(version, 1, _LARGEST):
            raise CheckpointError(f"{source}: format_version must be {PLAN_VERSION}, got {shown(version)}")
        if version > PLAN_VERSION:
            raise CheckpointError(
                f"{source}: format_version {shown(version)} was written by a newer lowrank; "
                f"this one reads {PLAN_VERSION}"
            )
        if not isinstance(content["entries"], list):
            raise CheckpointError(f"{source}: entries must be a list, got {shown(content['entries'])}")
        metadata = content.get("metadata", {})
        if not isinstance(metadata, dict):
            raise CheckpointError(f"{source}: metadata must be an object, got {shown(metadata)}")
        entries = []
        for index, raw in enumerate(content["entries"]):
            name = raw.get("name") if isinstance(raw, dict) else None
            where = f"{source}: entry {index}" + (f" ({name!r})" if isinstance(name, str) else "")
            _check_keys(raw, _REQUIRED, set(SPEC_FIELDS), where)
            entries.append(PlanEntry.from_json(raw))
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


def _respelled(spec: LayerSpec, format: object) -> LayerSpec:
    """The spec in another format: fields that it does not take are dropped, bits that it needs are 8."""
    known = FORMATS.get(format) if isinstance(format, str) else None
    if known is None:
        return spec
    kept = {name: getattr(spec, name) for name in known.fields}
    if "bits" in known.fields and kept.get("bits") is None:
        kept["bits"] = 8
    return LayerSpec(known.name, **kept)


def same_specs(one: Plan, other: Plan) -> bool:
    """Tell whether two plans make every layer the same."""
    return [(entry.name, entry.spec) for entry in one.entries] == [(entry.name, entry.spec) for entry in other.entries]


def _check_keys(content: object, required: set[str], optional: set[str], where: str) -> None:
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: must be a JSON object, got {shown(content)}")
    missing = sorted(required - content.keys())
    if missing:
        raise CheckpointError(f"{where}: lacks {', '.join(missing)}")
    unknown = sorted(content.keys() - required - optional)
    if unknown:
        raise CheckpointError(
            f"{where}: unknown field {shown(unknown[0])}; written by a newer lowrank, or a slip of the hand"
        )
