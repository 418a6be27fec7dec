"""What is known of a format by its name; a stand-in for the registry of formats, and the only place with names."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank.layers.spec import LayerSpec

__all__ = ["LEFT_ALONE", "colour_of", "is_dense", "is_factored", "is_rounded"]

# What a layer that nothing was done to is stored as.
LEFT_ALONE = LayerSpec("dense")


@dataclass(frozen=True)
class _Facts:
    factored: bool
    rounded: bool
    colour: str


_FACTS = {
    "dense": _Facts(False, False, "3"),
    "int8": _Facts(False, True, "1"),
    "lowrank-int8": _Facts(True, True, "2"),
    "lowrank": _Facts(True, False, "4"),
}
# A format that a later version writes still shows.
_UNKNOWN = _Facts(True, False, "4")


def is_dense(name: str) -> bool:
    """Tell whether a format leaves a layer as it was."""
    return name == LEFT_ALONE.format


def is_factored(name: str) -> bool:
    """Tell whether a format holds a product of factors."""
    return _FACTS.get(name, _UNKNOWN).factored


def is_rounded(name: str) -> bool:
    """Tell whether a format holds codes."""
    return _FACTS.get(name, _UNKNOWN).rounded


def colour_of(name: str) -> str:
    """Name the format's colour among the page's variables ``--s1`` to ``--s8``."""
    return _FACTS.get(name, _UNKNOWN).colour
