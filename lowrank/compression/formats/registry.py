"""The registry of formats."""

from __future__ import annotations

from typing import TypeVar

from lowrank.compression.formats.base import WeightFormat
from lowrank.errors import UsageError
from lowrank.layers import LAYER_KINDS, declare_format
from lowrank.layers.spec import LayerSpec

__all__ = [
    "FORMATS",
    "check_format",
    "colour_of",
    "compressing_formats",
    "format_named",
    "format_of",
    "is_dense",
    "is_plain_rounding",
    "register_format",
]

FORMATS: dict[str, WeightFormat] = {}
# Names that a later version will know.
LATER_FORMATS = ("int4+lowrank", "int3+lowrank", "int2+lowrank", "lowrank-int4", "pruned")
_Format = TypeVar("_Format", bound=WeightFormat)


def register_format(format: _Format) -> _Format:
    """Add a format: its layers take its name, and files that hold them can be loaded.

    Raises:
        UsageError: the name is taken.
    """
    if format.name in FORMATS:
        raise UsageError(f"format {format.name!r}: is registered already, by {type(FORMATS[format.name]).__name__}")
    FORMATS[format.name] = format
    for layers in format.layers.values():
        for layer in layers:
            LAYER_KINDS.setdefault(layer.__name__, layer)
            declare_format(layer, format.name, format.holds)
    return format


def compressing_formats() -> tuple[str, ...]:
    """List the names of all formats but the one that leaves layers as they are, in order.

    Example:
        >>> compressing_formats()
        ('int8', 'int7', 'int6', 'int5', 'int4', 'int3', 'int2', 'mixed', 'lowrank', 'lowrank-int8')
    """
    return tuple(name for name, format in FORMATS.items() if not format.dense)


def format_named(name: str) -> WeightFormat:
    """Find a format.

    Raises:
        UsageError: none is registered under this name.
    """
    found = FORMATS.get(name)
    if found is None:
        raise UsageError(f"format: must be one of {', '.join(FORMATS)}, got {name!r}")
    return found


def is_dense(name: str) -> bool:
    """Tell whether a format leaves a layer as it was; one that a later version wrote does not.

    Example:
        >>> is_dense("dense"), is_dense("int8"), is_dense("written later")
        (True, False, False)
    """
    return name in FORMATS and FORMATS[name].dense


def is_plain_rounding(name: str) -> bool:
    """Tell whether a format holds codes and no factors."""
    return name in FORMATS and FORMATS[name].rounded and not FORMATS[name].factored


def colour_of(name: str) -> str:
    """Name the format's colour among a page's variables ``--s1`` to ``--s8``; one that a later version wrote still shows."""
    return FORMATS[name].colour if name in FORMATS else WeightFormat.colour


def format_of(spec: LayerSpec) -> WeightFormat:
    """Find the format of a spec; see :func:`format_named`."""
    return format_named(spec.format)


def check_format(name: object, argument: str) -> None:
    """Refuse a format that this version does not know.

    Raises:
        NotImplementedError: one that a later version brings.
        UsageError: any other.

    Example:
        >>> check_format("int8", "formats")
    """
    if name in FORMATS:
        return
    if name in LATER_FORMATS:
        raise NotImplementedError(
            f"{argument}: format {name!r} is not in this version of lowrank; it knows {', '.join(FORMATS)}"
        )
    raise UsageError(f"{argument}: must be out of {', '.join(FORMATS)}, got {name!r}")
