"""Embeddings: the rows of the dense table that they stand for."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import eps, seeded
from torch import nn

from lowrank.errors import RankError, UsageError
from lowrank.layers import (
    LAYER_KINDS,
    CompressedLayer,
    LowRankEmbedding,
    QuantizedEmbedding,
    QuantizedLowRankEmbedding,
    check_scales,
)
from lowrank.numerics.moments import TokenCounts

IDS = torch.tensor([[0, 3, 3], [29, 1, 2]])


def embedding_of(dtype: torch.dtype = torch.float32, padding_idx: int | None = 2) -> nn.Embedding:
    embedding = nn.Embedding(30, 8, padding_idx=padding_idx, dtype=dtype)
    with torch.no_grad():
        embedding.weight.copy_(torch.randn(30, 8, generator=seeded(1)))
    return embedding.eval()


def layers_of(embedding: nn.Embedding, rank: int = 8) -> list[CompressedLayer]:
    return [
        LowRankEmbedding.from_embedding(embedding, rank),
        QuantizedEmbedding.from_embedding(embedding),
        QuantizedLowRankEmbedding.from_embedding(embedding, rank),
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_are_those_of_the_dense_weight(dtype: torch.dtype) -> None:
    embedding = embedding_of(dtype)
    for layer in layers_of(embedding):
        rows = layer(IDS)
        assert rows.dtype == dtype
        assert rows.shape == (2, 3, 8)
        dense = layer.dense_weight().detach().double()
        tolerance = 16 * max(eps(dtype), eps(torch.float32)) * float(dense.abs().max())
        torch.testing.assert_close(rows.detach().double(), dense[IDS], rtol=0, atol=tolerance)
        assert float(((dense - embedding.weight.double()).norm() / embedding.weight.double().norm()).detach()) < 0.02
        assert layer.padding_idx == 2
        assert not layer.training


@pytest.mark.parametrize("index", range(3))
def test_copies_are_exact(index: int) -> None:
    layer = layers_of(embedding_of(), 5)[index]
    expected = layer(IDS)
    rebuilt = LAYER_KINDS[layer.kind].from_config(layer.config())
    rebuilt.load_state_dict(layer.state_dict(), strict=True)
    for other in (rebuilt, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(IDS), expected)
        assert other.config() == layer.config()
    check_scales(layer, "table")
    if layer.bits is not None:
        half = copy.deepcopy(layer).half()
        assert torch.equal(half.scale, layer.scale)
        assert half(IDS).dtype == torch.float16


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_error_bounds(bits: int) -> None:
    embedding = embedding_of().requires_grad_(False)
    for layer in (
        QuantizedEmbedding.from_embedding(embedding, bits),
        QuantizedLowRankEmbedding.from_embedding(embedding, 4, bits=bits),
    ):
        measured = float((layer.dense_weight().double() - embedding.weight.double()).norm())
        assert measured <= layer.error_bound() <= 4 * measured


def test_trains_and_leaves_padding_alone() -> None:
    layer = LowRankEmbedding(30, 8, 4, padding_idx=2)
    layer(IDS).sum().backward()
    assert layer.left.grad is not None
    assert float(layer.left.grad[2].abs().sum()) == 0.0
    assert float(layer.left.grad[3].abs().sum()) > 0.0
    assert not bool(layer.dense_weight()[2].any())


def test_only_the_rows_asked_for_become_floats() -> None:
    layer = QuantizedEmbedding.from_embedding(embedding_of())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        layer(torch.tensor([4]))
    shapes = [event.input_shapes for event in profile.events() if event.name in ("aten::_to_copy", "aten::mul_")]
    assert shapes
    assert all(shape[0] != [30, 8] for shape in shapes if shape)


def test_max_error_and_counts() -> None:
    embedding = embedding_of()
    layer = LowRankEmbedding.from_embedding(embedding, max_error=0.5)
    assert 1 <= layer.rank < 8
    counts = TokenCounts(30)
    counts.update(IDS)
    weighted = QuantizedLowRankEmbedding.from_embedding(embedding, 3, statistics=counts)
    plain = QuantizedLowRankEmbedding.from_embedding(embedding, 3)
    seen = IDS.unique()

    def error(table: CompressedLayer) -> float:
        return float((table.dense_weight()[seen] - embedding.weight[seen]).norm().detach())

    assert error(weighted) < error(plain)
    with pytest.raises(RankError, match="full rank 8"):
        QuantizedLowRankEmbedding.from_embedding(embedding, max_error=1e-6)


def test_refusals_and_no_ids() -> None:
    embedding = embedding_of()
    for rank in (0, 9, True, "3"):
        with pytest.raises(RankError):
            LowRankEmbedding.from_embedding(embedding, rank)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="max_norm"):
        QuantizedEmbedding.from_embedding(nn.Embedding(4, 3, max_norm=1.0))
    with pytest.raises(UsageError, match=r"nn\.Embedding"):
        QuantizedEmbedding.from_embedding(nn.Linear(4, 3))
    for layer in layers_of(embedding):
        assert layer(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 8)
