"""What a sample is: found by asking the model, counted once, and never both chosen by and verified on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank.calibration.batches import Batch, Batches, sample_count
from lowrank.calibration.preparing import prepare_batches
from lowrank.calibration.samples import distinct, sample_digests, without_shared
from lowrank.errors import CalibrationError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)


class Loop(Net):
    """A recurrence with time first."""

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = torch.zeros_like(x[0]), []
        for now in x:
            state = 0.5 * state + self.a(now)
            outputs.append(self.b(state))
        return torch.stack(outputs)


class Centred(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x - x.mean(dim=0)))


class Edges(Net):
    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        hidden = self.a(nodes)
        return self.b(torch.zeros_like(hidden).index_add_(0, edges[1], hidden[edges[0]]))


class Looked(Net):
    """A table that all samples share stands before them."""

    def forward(self, table: Tensor, rows: Tensor) -> Tensor:
        return self.b(self.a(table[rows]))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(8, 4, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]


def _encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 1, enable_nested_tensor=False)


@pytest.mark.parametrize(
    ("model", "item", "size"),
    [
        (Loop(), torch.randn(6, 6, 8), 1),
        (Centred(), torch.randn(6, 8), 1),
        (_encoder(), torch.randn(6, 3, 8), 1),
        (Edges(), (torch.randn(6, 8), torch.randint(0, 6, (2, 9))), 1),
        (Looked(), (torch.randn(9, 8), torch.arange(6)), 6),
        (Packed(), (torch.randn(6, 5, 8), torch.tensor([5, 4, 4, 3, 2, 1])), 6),
        (nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)).train(), torch.randn(6, 8), 6),
        (nn.Sequential(*(nn.Linear(8, 8) for _ in range(8))).bfloat16(), torch.randn(6, 8).bfloat16(), 6),
        (nn.Sequential(nn.Linear(8, 8)), torch.randn(8), 1),
    ],
)
def test_dimension_0_counts_samples_where_the_model_treats_them_one_by_one(
    model: nn.Module, item: object, size: int
) -> None:
    found = prepare_batches(model, [item])
    assert [batch.size for batch in found] == [size]
    assert (len(found.notes) == 1 and "one sample" in found.notes[0]) == (size == 1)


def test_a_model_that_draws_numbers_teaches_nothing_and_a_note_says_so() -> None:
    class Noisy(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x + torch.randn_like(x)))

    found = prepare_batches(Noisy(), [torch.randn(6, 8)])
    assert found[0].size == 6
    assert "call to call" in found.notes[0]


def test_a_whole_sequence_keeps_its_length_in_what_is_promised() -> None:
    seen = set()
    model = Loop().eval()
    model.register_forward_pre_hook(lambda _, args: seen.add(len(args[0])))
    result = lowrank.compress_model(
        model, error_budget=0.2, calibration=[torch.randn(6, 3, 8) for _ in range(24)], progress=False
    )
    assert any("one sample" in note for note in result.report.notes)
    # Parts of it were tried once, to find that out.
    assert seen == {6, 3}


def test_copies_are_seen_through_dtype_names_and_padding() -> None:
    x = torch.randn(5, 8)
    once = sample_digests(Batch((x,), size=5, names=("x",)))
    assert sample_digests(Batch((), {"x": x.double().flip(0)}, 5)) == once[::-1]
    half = x.half()
    assert sample_digests(Batch((half,), size=5, names=("x",)), torch.float16) == sample_digests(
        Batch((half.float(),), size=5, names=("x",)), torch.float16
    )
    assert [sample_digests(Batch((row[None],)))[0] for row in x] == sample_digests(Batch((x,), size=5))
    ids, mask = torch.tensor([[4, 5, 0, 0]]), torch.tensor([[1, 1, 0, 0]])
    padded = Batch((), {"input_ids": ids, "attention_mask": mask, "labels": ids}, 1)
    assert sample_digests(padded) == sample_digests(Batch((), {"input_ids": ids[:, :2].int()}, 1))
    assert sample_digests(padded) != sample_digests(Batch((), {"input_ids": ids}, 1))


def test_copies_count_once_and_few_distinct_samples_are_said_aloud() -> None:
    x = torch.randn(20, 8)
    kept, said = distinct([Batch((x,), size=20), Batch((x[:4],), size=4)], "calibration")
    assert sample_count(kept) == 20
    assert "of 24 samples 20 are distinct" in said[0]
    for rows, words in ((1, "the same sample"), (3, "only 3 are distinct")):
        _, said = distinct([Batch((x[:rows].repeat(24 // rows, 1),), size=24)], "calibration")
        assert words in said[0]
        assert "proves nothing" in said[0]
    assert "zero" in distinct([Batch((torch.zeros(4, 8),), size=4)], "calibration")[1][0]


def test_the_headline_says_that_one_sample_proves_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    same = torch.randn(1, 8).expand(32, -1)
    report = lowrank.compress_model(model, error_budget=0.1, calibration=[same] * 2, progress=False).report
    assert any("the same sample" in line for line in report.summary())


def test_what_chooses_does_not_verify() -> None:
    x, other = torch.randn(24, 8), torch.randn(12, 8)
    calibration = Batches([Batch((x,), size=24)])
    with pytest.raises(CalibrationError, match="24 of 24 samples are calibration samples too"):
        without_shared(Batches([Batch((x.flip(0).double(),), size=24)]), calibration)
    mixed = without_shared(Batches([Batch((torch.cat([x[:6], other]),), size=18)]), calibration)
    assert sample_count(mixed) == 12
    assert "6 of 18" in mixed.warnings[0]
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    with pytest.raises(CalibrationError, match="calibration samples too"):
        lowrank.compress_model(
            model, error_budget=0.1, calibration=[x], validation=[(x.flip(0).numpy(),)], progress=False
        )


def test_too_few_samples_are_told_how_many_would_settle_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)).eval()
    loud = torch.randn(20, 64) * torch.logspace(-2, 1, 20)[torch.randperm(20)][:, None]
    with pytest.raises(lowrank.BudgetError, match=r"about \d+ like them would settle it") as raised:
        lowrank.compress_model(model, error_budget=0.1, calibration=[loud], progress=False)
    assert "inf" not in str(raised.value)
