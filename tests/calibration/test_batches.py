"""Batches of every shape, and samples cut into parts that share none."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from lowrank.calibration.batches import Batch, evaluating, sample_count, split_batches
from lowrank.calibration.outputs import model_tensor
from lowrank.calibration.preparing import prepare_batches
from lowrank.errors import CalibrationError


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.fc(x if y is None else x + y)


def _plain() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2))


def test_tensor_tuple_dict_and_loader_items() -> None:
    x = torch.randn(4, 3)
    assert prepare_batches(_plain(), [x])[0].args[0] is x
    assert len(prepare_batches(TwoInputs(), [(x, x)])[0].args) == 2
    assert prepare_batches(TwoInputs(), [{"x": x, "y": x}])[0].kwargs.keys() == {"x", "y"}
    assert prepare_batches(_plain(), [(x, torch.zeros(4))])[0].args == (x,)
    assert prepare_batches(TwoInputs(), [{"x": x, "y": x, "labels": x}])[0].kwargs.keys() == {"x", "y"}
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.zeros(4)), batch_size=2)
    found = prepare_batches(TwoInputs(), loader)
    assert [batch.size for batch in found] == [2, 2]
    assert all(len(batch.args) == 1 for batch in found)


def test_an_iterator_that_can_be_read_once_works() -> None:
    assert sample_count(prepare_batches(_plain(), iter([torch.randn(2, 3), torch.randn(5, 3)]))) == 7


def _failing() -> Iterator[Tensor]:
    yield torch.randn(2, 3)
    raise OSError("disk gone")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "is empty"),
        ([torch.zeros(0, 3)], "is empty"),
        (_failing(), "batch 1 failed with OSError: disk gone"),
        (["text"], "must be a tensor, a tuple or a dict, got str"),
        (torch.tensor(2.0), "a single number"),
        (7, "must be an iterable of batches"),
        ("texts.txt", "must be an iterable of batches"),
        ({"x": [1, 2]}, "a dict must hold tensors or arrays of one length"),
        ([{"x": 3}], "holds no tensor"),
        ([{1: torch.zeros(2, 3)}], "refused batch 0"),
        ([torch.zeros(2, 4)], "refused batch 0"),
    ],
)
def test_unusable_data_is_refused(data: object, message: str) -> None:
    with pytest.raises(CalibrationError, match=message) as raised:
        prepare_batches(_plain(), data)  # type: ignore[arg-type]
    assert raised.value.exit_code == 3


def test_token_ids_outside_the_vocabulary_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
    with pytest.raises(CalibrationError, match="vocabulary"):
        prepare_batches(model, [torch.tensor([[1, 12]])])


def test_a_batch_is_one_sample_where_the_output_has_another_dimension_0() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x).mean(dim=0, keepdim=True)

    assert [batch.size for batch in prepare_batches(Pooled(), [torch.randn(8, 3), torch.randn(4, 3)])] == [1, 1]


def test_parts_share_no_sample_and_lose_none() -> None:
    batches = [Batch((torch.arange(start, start + 10).float()[:, None],), size=10) for start in (0, 10, 20, 30)]
    parts = split_batches(batches, None, seed=3)
    values = [
        [float(v) for batch in part for v in batch.args[0].flatten()]
        for part in (parts.statistics, parts.search, parts.verification)
    ]
    assert [len(part) for part in values] == [20, 10, 10]
    assert sorted(value for part in values for value in part) == [float(v) for v in range(40)]
    again = split_batches(batches, None, seed=3)
    assert torch.equal(
        torch.cat([b.args[0] for b in again.verification]), torch.cat([b.args[0] for b in parts.verification])
    )
    other = split_batches(batches, None, seed=4)
    assert not torch.equal(
        torch.cat([b.args[0] for b in other.statistics]), torch.cat([b.args[0] for b in parts.statistics])
    )


def test_validation_batches_are_the_verification_part() -> None:
    batches = [Batch((torch.zeros(12, 1),), size=12)]
    validation = [Batch((torch.ones(9, 1),), size=9)]
    parts = split_batches(batches, validation, seed=0)
    assert parts.verification == validation
    assert (sample_count(parts.statistics), sample_count(parts.search)) == (8, 4)


@pytest.mark.parametrize(("total", "verify"), [(15, True), (1, False)])
def test_too_few_samples_are_refused(total: int, verify: bool) -> None:
    with pytest.raises(CalibrationError, match="samples"):
        split_batches([Batch((torch.zeros(total, 1),), size=total)], None, 0, verify=verify)


def test_modes_are_restored_also_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
    model[1].eval()
    with pytest.raises(ValueError, match="stop"), evaluating(model):
        assert not model[0].training
        assert not torch.is_grad_enabled()
        raise ValueError("stop")
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert torch.is_grad_enabled()


def test_model_tensor_prefers_logits_then_hidden_state_then_the_first_floating_tensor() -> None:
    logits, hidden, other = torch.ones(1), torch.zeros(1), torch.full((1,), 2.0)
    assert model_tensor(SimpleNamespace(last_hidden_state=hidden, logits=logits)) is logits
    assert model_tensor({"past": None, "last_hidden_state": hidden}) is hidden
    assert model_tensor((torch.tensor([1]), other)) is other
    assert model_tensor([{"x": other}]) is other
    with pytest.raises(CalibrationError, match="output_fn"):
        model_tensor(object())
