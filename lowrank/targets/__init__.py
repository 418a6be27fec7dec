"""Which modules of a model can be replaced, and why the others cannot.

A layer kind is one file here and one line below. The order is the one in which modules are asked and messages list the kinds.
"""

from __future__ import annotations

from lowrank.targets.attention import Attention
from lowrank.targets.conv import Conv
from lowrank.targets.decoded import Decoded, DecodedConv, DecodedEmbedding
from lowrank.targets.embedding import Embedding
from lowrank.targets.experts import Experts
from lowrank.targets.kind import (
    LayerKind,
    kind_named,
    kind_of,
    layer_kinds,
    register_kind,
    resemblance,
    target_names,
)
from lowrank.targets.linear import Linear
from lowrank.targets.recurrent import Recurrent

__all__ = [
    "ATTENTION",
    "CONV",
    "DECODED",
    "EMBEDDING",
    "EXPERTS",
    "LINEAR",
    "RECURRENT",
    "LayerKind",
    "kind_named",
    "kind_of",
    "layer_kinds",
    "register_kind",
    "resemblance",
    "target_names",
]

LINEAR = register_kind(Linear())
CONV = register_kind(Conv())
EMBEDDING = register_kind(Embedding())
RECURRENT = register_kind(Recurrent())
ATTENTION = register_kind(Attention())
EXPERTS = register_kind(Experts())
# Last, for what no other kind takes; the most particular ones first.
DECODED = (register_kind(DecodedConv()), register_kind(DecodedEmbedding()), register_kind(Decoded()))
