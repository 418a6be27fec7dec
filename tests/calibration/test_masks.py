"""Padding: each mask for its own sequence, however it is named and on whichever side it stands."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank.calibration.batches import Batch
from lowrank.calibration.masks import DECODER, mask_of, masks_in
from lowrank.calibration.metrics.perplexity import PERPLEXITY
from lowrank.calibration.metrics.sums import position_mask

KEPT = torch.tensor([[True, True, False], [True, False, False]])


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("attention_mask", KEPT.long()),
        ("attention_mask", torch.where(KEPT, 0.0, -1e9)),
        ("src_key_padding_mask", ~KEPT),
        ("key_padding_mask", torch.where(KEPT, 0.0, float("-inf"))),
        ("key_padding_mask", torch.where(KEPT, 0.0, -1e4)),
        ("padding_mask", ~KEPT),
    ],
)
def test_padding_by_any_name(name: str, mask: Tensor) -> None:
    found = mask_of(masks_in({name: mask}), (2, 3, 5))
    assert found is not None
    assert found.equal(KEPT)


def test_torch_masks_stand_the_other_way_where_time_comes_first() -> None:
    found = mask_of(masks_in({"src_key_padding_mask": ~KEPT}), (3, 2, 5))
    assert found is not None
    assert found.equal(KEPT.T)
    assert mask_of(masks_in({"attention_mask": KEPT}), (3, 2, 5)) is None


def test_two_sequences_of_one_length_keep_their_masks_apart() -> None:
    other = KEPT.flip(0)
    masks = masks_in({"attention_mask": KEPT, "decoder_attention_mask": other})
    for name, wanted in (
        ("encoder.block.0.layer.0.SelfAttention.q", KEPT),
        ("shared", KEPT),
        ("decoder.block.0.layer.1.EncDecAttention.k", KEPT),
        ("decoder.layers.0.encoder_attn.v_proj", KEPT),
        ("decoder.layers.0.encoder_attn.q_proj", other),
        ("decoder.block.0.layer.2.DenseReluDense.wi", other),
        ("lm_head", other),
    ):
        found = mask_of(masks, (2, 3, 5), name)
        assert found is not None, name
        assert found.equal(wanted), name


def test_the_encoders_mask_is_not_the_decoders() -> None:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    masks = masks_in({"attention_mask": KEPT, "decoder_input_ids": ids})
    found = mask_of(masks, (2, 3, 5), side=DECODER)
    assert found is not None
    assert bool(found.all())


def test_a_length_tells_more_than_a_name() -> None:
    masks = masks_in({"attention_mask": KEPT, "decoder_attention_mask": torch.ones(2, 4)})
    found = mask_of(masks, (2, 3, 5), "decoder.layers.0.reads.linear")
    assert found is not None
    assert found.equal(KEPT)


def test_labels_of_minus_100_are_padding_of_what_a_decoder_writes() -> None:
    labels = torch.tensor([[5, 6, -100]])
    arguments = {"input_ids": torch.ones(1, 3, dtype=torch.int64), "attention_mask": torch.ones(1, 3), "labels": labels}
    batch = Batch((), arguments, 1, writes=True)
    kept = position_mask(torch.zeros(1, 3, 9), batch)
    assert kept is not None
    assert kept.tolist() == [[True, True, False]]
    causal = Batch((), arguments, 1)
    tokens = PERPLEXITY.terms(torch.zeros(1, 3, 9), torch.zeros(1, 3, 9), causal)[1]
    assert float(tokens) == 1.0


def test_perplexity_is_the_same_for_padding_on_either_side() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 20))
    values = []
    for left in (False, True):
        ids, mask = torch.zeros(4, 6, dtype=torch.int64), torch.zeros(4, 6, dtype=torch.int64)
        for row, length in enumerate((6, 3, 4, 5)):
            where = slice(6 - length, 6) if left else slice(0, length)
            ids[row, where], mask[row, where] = torch.arange(1, length + 1) + row, 1
        logits = model(ids).detach()
        batch = Batch((), {"input_ids": ids, "attention_mask": mask}, 4)
        lost, tokens = PERPLEXITY.terms(logits, logits * 0.5, batch)
        values.append((float(lost.sum()), float(tokens.sum())))
    assert values[0] == pytest.approx(values[1])
    assert values[0][1] == 6 + 3 + 4 + 5 - 4


def test_statistics_leave_torch_padding_out() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(20, 8), nn.Linear(8, 4)
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

        def forward(self, ids: Tensor, src_key_padding_mask: Tensor | None = None) -> Tensor:
            return self.out(self.encoder(self.table(ids), src_key_padding_mask=src_key_padding_mask))

    model, padded, ids = Net().eval(), torch.zeros(8, 6, dtype=torch.bool), torch.randint(0, 20, (8, 6))
    padded[:, 2:] = True
    for batch in ({"ids": ids, "src_key_padding_mask": padded}, (ids, padded)):
        found = lowrank.collect_statistics(model, [batch], {"out": model.out})
        assert found["out"].count == 16
