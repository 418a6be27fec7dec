"""What a layer is stored as, in one value: the format's name and its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["SPEC_FIELDS", "HoldsSpec", "LayerSpec", "parts_of"]


@dataclass(frozen=True)
class LayerSpec:
    """Name a format with its numbers; what a candidate, a plan's entry, a report's row, an override and a built layer share.

    Compared and hashed by value. Which fields a format takes, and their legal values, is the format's to say
    (:mod:`lowrank.compression.formats`); here any value is held.

    Attributes:
        format: a registered format's name.
        rank: number of rank components (of each group of a convolution), where the format has factors.
        bits: that a code uses, where the format has codes.
        activations: how the products are made where there are codes: ``"int8"`` (activations are rounded), ``"float"``
            (weight-only), or ``None`` (nothing is multiplied, or the format's own default).
        scheme: how a convolution's kernel is cut in two, where there are factors.
        group: inputs that share a scale; ``None`` is a whole row.
        rounding: the method that chose the codes; ``None`` is the format's own.
        zero_point: whether each group has a zero of its own; ``None`` where the middle of the codes is the zero of all.
        parts: of a module of several matrices, each matrix's own spec by its name; ``None`` where all are alike.

    Example:
        >>> spec = LayerSpec("lowrank", rank=4)
        >>> spec.to_json(), LayerSpec.from_json(spec.to_json()) == spec
        ({'format': 'lowrank', 'rank': 4, 'bits': None, 'activations': None}, True)
    """

    format: str
    rank: int | None = None
    bits: int | None = None
    activations: str | None = None
    scheme: str | None = None
    group: int | None = None
    rounding: str | None = None
    zero_point: bool | None = None
    parts: tuple[tuple[str, LayerSpec], ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON; of those after ``activations`` only such as are set."""
        found = {
            item.name: getattr(self, item.name)
            for item in fields(self)
            if item.name in _ALWAYS or getattr(self, item.name) is not None
        }
        if self.parts is not None:
            found["parts"] = [{"name": name} | part.to_json() for name, part in self.parts]
        return found

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LayerSpec:
        """Read the fields out of a map that may hold others beside them."""
        found = {name: data[name] for name in SPEC_FIELDS if name in data}
        return cls(**found | ({"parts": parts_of(found["parts"])} if "parts" in found else {}))


def parts_of(value: Any) -> Any:
    """Read the specs of matrices out of a list of maps, each with the matrix's "name" too, or out of a map from names to maps.

    Anything else is given back as it is: it is for the format to refuse.

    Example:
        >>> parts_of({"weight_ih_l0": {"format": "dense"}}) == (("weight_ih_l0", LayerSpec("dense")),)
        True
        >>> parts_of([{"name": "weight_ih_l0", "format": "dense"}]) == (("weight_ih_l0", LayerSpec("dense")),)
        True
    """
    pairs: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        pairs = list(value.items())
    elif isinstance(value, list):
        pairs = [(part.get("name"), part) if isinstance(part, Mapping) else (None, None) for part in value]
    known = {"name", "scale_dtype", *SPEC_FIELDS}
    for name, part in pairs:
        if not isinstance(name, str) or not isinstance(part, Mapping) or "format" not in part or not set(part) <= known:
            return value
    return tuple((name, LayerSpec.from_json(part)) for name, part in pairs) if pairs else value


_ALWAYS = ("format", "rank", "bits", "activations")
SPEC_FIELDS = tuple(item.name for item in fields(LayerSpec))


class HoldsSpec:
    """Read the fields of a :class:`LayerSpec` off whatever holds one as ``spec``."""

    spec: LayerSpec

    @property
    def format(self) -> str:
        """The format's name."""
        return self.spec.format

    @property
    def rank(self) -> int | None:
        """Number of rank components (of each group of a convolution); ``None`` where the format has none."""
        return self.spec.rank

    @property
    def bits(self) -> int | None:
        """Bits that a code uses; ``None`` where the format has no codes."""
        return self.spec.bits

    @property
    def activations(self) -> str | None:
        """``"int8"`` (integer products), ``"float"`` (weight-only) or ``None`` (neither)."""
        return self.spec.activations

    @property
    def scheme(self) -> str | None:
        """``"channel"`` or ``"spatial"`` for a factored convolution, ``None`` for all else."""
        return self.spec.scheme
