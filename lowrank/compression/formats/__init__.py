"""The formats that a layer's weights can be stored in.

A format is one file here and one line below. The order is the one in which messages list them, candidates are offered
and layers are probed.
"""

from __future__ import annotations

from lowrank.compression.formats.base import Measured, Probe, Request, WeightFormat
from lowrank.compression.formats.dense import DENSE, Dense
from lowrank.compression.formats.int8 import Int8
from lowrank.compression.formats.lowrank import LowRank
from lowrank.compression.formats.lowrank_int8 import LowRankInt8
from lowrank.compression.formats.mixed import Mixed
from lowrank.compression.formats.packed import Packed
from lowrank.compression.formats.registry import (
    FORMATS,
    check_format,
    colour_of,
    compressing_formats,
    format_named,
    format_of,
    is_dense,
    is_plain_rounding,
    register_format,
)

__all__ = [
    "DENSE",
    "FORMATS",
    "INT8",
    "LOWRANK",
    "LOWRANK_INT8",
    "REFERENCE",
    "Measured",
    "Probe",
    "Request",
    "WeightFormat",
    "check_format",
    "colour_of",
    "compressing_formats",
    "format_named",
    "format_of",
    "is_dense",
    "is_plain_rounding",
    "register_format",
]

register_format(Dense())
INT8 = register_format(Int8())
for _bits in range(7, 1, -1):
    register_format(Packed(_bits))
register_format(Mixed())
LOWRANK = register_format(LowRank())
LOWRANK_INT8 = register_format(LowRankInt8(LOWRANK, INT8))

# What rounding costs the model is measured in this format, for all that round; uniform plans are made of it.
REFERENCE = INT8
