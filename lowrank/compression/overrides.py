"""What ``overrides`` asks of single layers, checked against what they can become."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowrank.compression.options import check_format
from lowrank.compression.workshop import Choice, Workshop
from lowrank.errors import UsageError
from lowrank.numerics.factors import check_rank
from lowrank.targets.survey import matching

__all__ = ["forced_choices"]


def forced_choices(overrides: Mapping[str, Any] | None, workshops: Mapping[str, Workshop]) -> dict[str, list[Choice]]:
    """The only choices of the layers that ``overrides`` names.

    Raises:
        UsageError: a pattern that matches no target, an unknown key or format, a layer that would not get smaller.
        RankError: a rank outside the layer's range.
    """
    found: dict[str, list[Choice]] = {}
    if not overrides:
        return found
    aliases = {
        member_name: shop
        for shop in workshops.values()
        for member in shop.target.members
        for member_name in member.names
    }
    covered = matching(list(overrides), aliases, "overrides")
    for pattern, value in overrides.items():
        for name in sorted(covered[pattern]):
            shop = aliases[name]
            found[shop.name] = _forced(shop, value, f"overrides: {pattern!r}, layer {name}")
    return found


def _forced(shop: Workshop, value: Any, where: str) -> list[Choice]:
    wanted: Any = {"format": value} if isinstance(value, str) else value
    known = {"format", "rank", "bits", "activations", "scheme"}
    if not isinstance(wanted, Mapping) or not set(wanted) <= known or "format" not in wanted:
        raise UsageError(
            f'{where}: must be a format or a dict with "format" and maybe "rank", "bits", "activations", "scheme", got {value!r}'
        )
    name = wanted["format"]
    check_format(name, where)
    if name == "dense":
        return [Choice("dense")]
    if name not in shop.formats:
        raise UsageError(
            f"{where}: this {shop.target.kind} layer can be dense or {', '.join(shop.formats)}, got {name!r}"
        )
    factored, rounded = "lowrank" in name, "int8" in name
    rank, bits, scheme = wanted.get("rank"), wanted.get("bits"), wanted.get("scheme")
    if scheme is not None and (not factored or scheme not in shop.schemes):
        possible = [each for each in shop.schemes if each is not None] if factored else []
        raise UsageError(
            f"{where}: scheme of format {name!r} must be {' or '.join(possible) or 'left out'}, got {scheme!r}"
        )
    schemes = shop.schemes if scheme is None else (scheme,)
    if rank is not None:
        if not factored:
            raise UsageError(f"{where}: format {name!r} has no rank, got {rank!r}")
        check_rank(rank, max(map(shop.max_rank, schemes)), f"{where}, rank")
        schemes = tuple(each for each in schemes if rank <= shop.max_rank(each))
    if bits is not None and (not rounded or isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8):
        raise UsageError(
            f"{where}: bits must be an integer from 2 to 8, for the formats int8 and lowrank-int8, got {bits!r}"
        )
    modes: list[str | None] = [None]
    if rounded and shop.target.linears:
        modes = list(shop.modes(wanted.get("activations", "auto")))
        if wanted.get("activations", modes[0]) not in modes:
            raise UsageError(f"{where}: this {shop.target.kind} layer is weight-only, got {wanted['activations']!r}")
    thin: list[tuple[int | None, str | None]] = [(None, None)]
    if factored:
        thin = [(each, cut) for cut in schemes for each in ([rank] if rank is not None else shop.ranks(name, cut))]
    choices = [Choice(name, each, (bits or 8) if rounded else None, mode, cut) for each, cut in thin for mode in modes]
    small = [choice for choice in choices if shop.bytes(choice) < shop.bytes(Choice("dense"))]
    if not small:
        smallest = min((shop.bytes(choice) for choice in choices), default=0)
        raise UsageError(
            f"{where}: {value!r} would take {smallest:,} bytes, the dense layer takes {shop.bytes(Choice('dense')):,}"
        )
    return small
