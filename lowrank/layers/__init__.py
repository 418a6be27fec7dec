"""The modules that take the place of dense ones: linear, embedding, convolution, recurrent and attention layers."""

from __future__ import annotations

from lowrank.layers import operators as _operators  # noqa: F401  (registers torch.ops.lowrank)
from lowrank.layers.attention import QuantizedMultiheadAttention, call_every_layer
from lowrank.layers.base import CompressedLayer, Role, declare_format
from lowrank.layers.conv import SVDCompressedConv1d, SVDCompressedConv2d
from lowrank.layers.conv_codes import QuantizedConv1d, QuantizedConv2d
from lowrank.layers.conv_factor_codes import QuantizedLowRankConv1d, QuantizedLowRankConv2d
from lowrank.layers.conv_packed import PackedConv1d, PackedConv2d
from lowrank.layers.decoded import DecodedLayer
from lowrank.layers.embedding import LowRankEmbedding
from lowrank.layers.embedding_codes import QuantizedEmbedding, QuantizedLowRankEmbedding
from lowrank.layers.embedding_packed import PackedEmbedding
from lowrank.layers.experts import PackedExperts, QuantizedExperts
from lowrank.layers.linear import SVDCompressedLinear
from lowrank.layers.linear_codes import QuantizedLinear
from lowrank.layers.linear_factor_codes import QuantizedLowRankLayer
from lowrank.layers.linear_packed import PackedLinear
from lowrank.layers.model import check_scales, compressed_layers
from lowrank.layers.padded import Around, PaddedLayer
from lowrank.layers.recurrent import (
    RECURRENT,
    QuantizedGRU,
    QuantizedGRUCell,
    QuantizedLSTM,
    QuantizedLSTMCell,
    QuantizedRecurrent,
    QuantizedRNN,
    QuantizedRNNCell,
)

__all__ = [
    # what all of them are
    "CompressedLayer",
    "LAYER_KINDS",
    "Role",
    "check_scales",
    "compressed_layers",
    "declare_format",
    # in place of nn.Linear
    "PackedLinear",
    "QuantizedLinear",
    "QuantizedLowRankLayer",
    "SVDCompressedLinear",
    # in place of nn.Conv1d and nn.Conv2d
    "PackedConv1d",
    "PackedConv2d",
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedLowRankConv1d",
    "QuantizedLowRankConv2d",
    "SVDCompressedConv1d",
    "SVDCompressedConv2d",
    # in place of nn.Embedding
    "LowRankEmbedding",
    "PackedEmbedding",
    "QuantizedEmbedding",
    "QuantizedLowRankEmbedding",
    # in place of any module that owns a matrix
    "DecodedLayer",
    # in place of a mixture's experts
    "PackedExperts",
    "QuantizedExperts",
    # around a layer, in place of a module that pads and then is that layer
    "Around",
    "PaddedLayer",
    # in place of recurrent layers and nn.MultiheadAttention
    "QuantizedGRU",
    "QuantizedGRUCell",
    "QuantizedLSTM",
    "QuantizedLSTMCell",
    "QuantizedMultiheadAttention",
    "QuantizedRNN",
    "QuantizedRNNCell",
    "QuantizedRecurrent",
    "RECURRENT",
    "call_every_layer",
]

LAYER_KINDS: dict[str, type[CompressedLayer]] = {
    layer.__name__: layer
    for layer in (
        SVDCompressedLinear,
        QuantizedLowRankLayer,
        QuantizedLinear,
        PackedLinear,
        PackedEmbedding,
        PackedConv1d,
        PackedConv2d,
        LowRankEmbedding,
        QuantizedEmbedding,
        QuantizedLowRankEmbedding,
        SVDCompressedConv1d,
        SVDCompressedConv2d,
        QuantizedConv1d,
        QuantizedConv2d,
        QuantizedLowRankConv1d,
        QuantizedLowRankConv2d,
        *RECURRENT.values(),
        QuantizedMultiheadAttention,
        DecodedLayer,
        QuantizedExperts,
        PackedExperts,
        PaddedLayer,
    )
}
