"""What ``overrides`` asks of single layers, checked against what they can become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lowrank.compression.formats import DENSE, FORMATS, Request, WeightFormat, check_format, format_named
from lowrank.compression.formats.factored import FactoredFormat
from lowrank.compression.layer_data import LayerData
from lowrank.errors import UsageError, is_whole
from lowrank.layers.spec import SPEC_FIELDS, LayerSpec, parts_of
from lowrank.numerics.factors import check_rank
from lowrank.numerics.rounding import LEAST_BITS, MOST_BITS
from lowrank.targets.model import matching

__all__ = ["forced_specs"]


def forced_specs(overrides: Mapping[str, Any] | None, layers: Mapping[str, LayerData]) -> dict[str, list[LayerSpec]]:
    """Give the only specs of the layers that ``overrides`` names.

    Raises:
        UsageError: a pattern that matches no target, an unknown key or format, a layer that would not get smaller.
        RankError: a rank outside the layer's range.
    """
    found: dict[str, list[LayerSpec]] = {}
    if not overrides:
        return found
    aliases = {name: data for data in layers.values() for member in data.target.members for name in member.names}
    covered = matching(list(overrides), aliases, "overrides")
    for pattern, value in overrides.items():
        for name in sorted(covered[pattern]):
            data = aliases[name]
            found[data.name] = _forced(data, value, f"overrides: {pattern!r}, layer {name}")
    return found


def _forced(data: LayerData, value: Any, where: str) -> list[LayerSpec]:
    wanted: Any = {"format": value} if isinstance(value, str) else value
    if not isinstance(wanted, Mapping) or not set(wanted) <= set(SPEC_FIELDS) or "format" not in wanted:
        others = ", ".join(f'"{name}"' for name in SPEC_FIELDS[1:])
        raise UsageError(f'{where}: must be a format or a dict with "format" and maybe {others}, got {value!r}')
    check_format(wanted["format"], where)
    format = format_named(wanted["format"])
    if format.dense:
        return [DENSE]
    fitting = [name for name, each in FORMATS.items() if each.fits(data)]
    if format.name not in fitting:
        names = [name for name in fitting if not FORMATS[name].dense]
        raise UsageError(
            f"{where}: this {data.kind.name} layer can be dense or {', '.join(names)}, got {format.name!r}"
        )
    specs = _spelled(data, format, wanted, where)
    small = [spec for spec in specs if format.stored_bytes(data, spec) < _dense_bytes(data)]
    if not small:
        smallest = min((format.stored_bytes(data, spec) for spec in specs), default=0)
        raise UsageError(
            f"{where}: {value!r} would take {smallest:,} bytes, the dense layer takes {_dense_bytes(data):,}"
        )
    return small


def _dense_bytes(data: LayerData) -> int:
    return FORMATS[DENSE.format].stored_bytes(data, DENSE)


def _spelled(data: LayerData, format: WeightFormat, wanted: Mapping[str, Any], where: str) -> list[LayerSpec]:
    """Every spec of the format that has what is wanted, in each way of taking the activations that is left open."""
    modes: list[str | None] = [None]
    if format.rounded and data.target.multiplying:
        modes = list(format.modes(data, wanted.get("activations", "auto")))
        if wanted.get("activations", modes[0]) not in modes:
            raise UsageError(f"{where}: this {data.kind.name} layer is weight-only, got {wanted['activations']!r}")
    plain = _plain_specs(data, format, wanted, where)
    bits = wanted.get("bits")
    if bits is not None:
        if not format.rounded or not is_whole(bits, LEAST_BITS, MOST_BITS):
            rounded = " and ".join(name for name, each in FORMATS.items() if each.rounded)
            raise UsageError(
                f"{where}: bits must be an integer from {LEAST_BITS} to {MOST_BITS}, for the formats {rounded}, got {bits!r}"
            )
        plain = [replace(spec, bits=bits) for spec in plain]
    for name in ("group", "rounding", "zero_point", "parts"):
        if wanted.get(name) is not None and name not in format.fields:
            raise UsageError(f"{where}: format {format.name!r} has no {name}, got {wanted[name]!r}")
        if name in wanted and name in format.fields:
            asked = parts_of(wanted[name]) if name == "parts" else wanted[name]
            # Also None: a whole row, no zero point, the format's own rounding.
            plain = list(dict.fromkeys(replace(spec, **{name: asked}) for spec in plain))
    for spec in plain:
        format.check_fields(spec, data.kind.name, data.target.shape, where)
    found = [(spec, mode) for spec in plain for mode in modes if mode in (None, *format.modes(data, "auto", spec))]
    if not found:
        raise UsageError(f"{where}: {wanted!r} is weight-only, got activations {wanted.get('activations')!r}")
    return [replace(spec, activations=mode) for spec, mode in found]


def _plain_specs(data: LayerData, format: WeightFormat, wanted: Mapping[str, Any], where: str) -> list[LayerSpec]:
    """The format's specs with the rank and scheme that are wanted, activations left open."""
    rank, scheme = wanted.get("rank"), wanted.get("scheme")
    if scheme is not None and (not format.factored or scheme not in data.schemes):
        possible = [each for each in data.schemes if each is not None] if format.factored else []
        raise UsageError(
            f"{where}: scheme of format {format.name!r} must be {' or '.join(possible) or 'left out'}, got {scheme!r}"
        )
    if not isinstance(format, FactoredFormat):
        if rank is not None:
            raise UsageError(f"{where}: format {format.name!r} has no rank, got {rank!r}")
        specs = format.specs(data, Request("auto"))
        return list(dict.fromkeys(replace(spec, activations=None) for spec in specs))
    schemes = data.schemes if scheme is None else (scheme,)
    if rank is None:
        return [format.spec(each, cut) for cut in schemes for each in format.ranks(data, cut)]
    check_rank(rank, max(map(data.max_rank, schemes)), f"{where}, rank")
    return [format.spec(rank, cut) for cut in schemes if rank <= data.max_rank(cut)]
