"""How models are called with what data holds: pairs of a loader, nested inputs, arrays, lists of objects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lowrank.calibration.preparing import prepare_batches
from lowrank.errors import CalibrationError


class Forward(nn.Module):
    """A model of 8 features whose forward is given."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)


class Two(Forward):
    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        return self.fc(u + v)


class Parts(Forward):
    def forward(self, parts: Any) -> Tensor:
        return self.fc(torch.cat(list(parts.values()) if isinstance(parts, dict) else parts, -1))


class Images(Forward):
    def forward(self, images: list[Tensor]) -> Tensor:
        return torch.stack([self.fc(image).mean(dim=0) for image in images])


class Masked(Forward):
    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        assert input_ids is not None
        return self.fc(input_ids.float())


@dataclass
class Graph:
    nodes: Tensor


class Graphs(Forward):
    def forward(self, graphs: list[Graph]) -> Tensor:
        return torch.stack([self.fc(graph.nodes).sum(dim=0) for graph in graphs])


def _loader(*tensors: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*tensors), 8)


def _x(rows: int = 16) -> Tensor:
    return torch.randn(rows, 8)


def test_a_loader_gives_what_the_forward_requires_and_a_note_says_what_is_left_out() -> None:
    found = prepare_batches(Two(), _loader(_x(), _x(), torch.zeros(16)))
    assert [(len(batch.args), batch.size) for batch in found] == [(2, 8), (2, 8)]
    assert len(found.notes) == 1
    assert "the third of 3 values" in found.notes[0]
    assert prepare_batches(Two(), _loader(_x(), _x())).notes == []


@pytest.mark.parametrize("listed", [False, True])
def test_inputs_of_a_pair_may_be_a_tuple_or_a_dict(listed: bool) -> None:
    for inputs in ((torch.randn(8), torch.randn(8)), {"u": torch.randn(8), "v": torch.randn(8)}):
        loader = DataLoader([(inputs, 1)] * 4, 4)
        found = prepare_batches(Two(), list(loader) if listed else loader, repeats=True)
        assert [batch.size for batch in found] == [4]
        assert "second" in found.notes[0]


def test_ids_and_their_mask_of_a_loader_are_told_from_ids_and_labels() -> None:
    ids, mask = torch.randint(1, 9, (16, 8)), torch.ones(16, 8, dtype=torch.int64)
    mask[:, 5:] = 0
    found = prepare_batches(Masked(), _loader(ids, mask))
    assert set(found[0].kwargs) == {"attention_mask"}
    labels = torch.randint(0, 2, (16, 8))
    found = prepare_batches(Masked(), _loader(ids, labels))
    assert not found[0].kwargs
    assert "labels" in found.notes[0]


@pytest.mark.parametrize(
    "item",
    [
        ([torch.ones(6, 4), torch.ones(6, 4)],),
        {"parts": [torch.ones(6, 4), torch.ones(6, 4)]},
        {"parts": {"a": torch.ones(6, 4), "b": torch.ones(6, 4)}},
        {"a": torch.ones(6, 4), "b": torch.ones(6, 4)},
        [torch.ones(6, 4), torch.ones(6, 4)],
        {"parts": [np.ones((6, 4)), np.ones((6, 4), np.float32)]},
    ],
)
def test_nested_inputs_are_one_argument(item: Any) -> None:
    assert [batch.size for batch in prepare_batches(Parts(), [item])] == [6]


def test_no_image_of_a_list_is_taken_for_a_label() -> None:
    found = prepare_batches(Images(), [[_x(3), _x(5), _x(2)]])
    assert len(found[0].args[0]) == 3
    assert found.notes == [] or "label" not in found.notes[0]


def test_a_list_of_objects_is_samples() -> None:
    model, items = Graphs(), [[Graph(_x(5)) for _ in range(6)] for _ in range(3)]
    found = prepare_batches(model, items)
    assert [batch.size for batch in found] == [6, 6, 6]
    part = found[0].select(torch.tensor([4, 1]))
    assert torch.equal(part.run(model), found[0].run(model)[[4, 1]])


@pytest.mark.parametrize(
    ("make", "sizes"),
    [
        (lambda: torch.randn(40, 8), [32, 8]),
        (lambda: np.random.default_rng(0).standard_normal((40, 8)), [32, 8]),
        (lambda: {"input": np.random.default_rng(0).standard_normal((40, 8))}, [32, 8]),
        (lambda: [torch.randn(8) for _ in range(3)], [1, 1, 1]),
        (lambda: [np.broadcast_to(np.arange(8.0)[None], (1, 8))], [1]),
    ],
)
def test_arrays_and_vectors_are_taken(make: Callable[[], Any], sizes: list[int]) -> None:
    model = nn.Sequential()
    model.append(nn.Linear(8, 4))
    data = make()
    assert [batch.size for batch in prepare_batches(model, data)] == sizes
    assert all(tensor.dtype is torch.float32 for batch in prepare_batches(model, data) for tensor in batch.tensors)


def test_one_array_is_samples_also_for_a_model_that_takes_one_at_a_time() -> None:
    class Flat(Forward):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.reshape(8))

    found = prepare_batches(Flat(), torch.randn(20, 2, 4))
    assert [batch.size for batch in found] == [1] * 20
    assert found[0].args[0].shape == (2, 4)


def test_forward_fn_calls_the_model_with_the_item_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    items = [{"graph": Graph(_x(5)), "name": "a"} for _ in range(2)]
    found = prepare_batches(model, items, forward_fn=lambda called, item: called(item["graph"].nodes))
    assert found[0].run(model).shape == (5, 4)


def test_an_argument_that_the_forward_does_not_take_is_named() -> None:
    with pytest.raises(CalibrationError, match="identity"):
        prepare_batches(Two(), [{"u": _x(), "v": _x(), "identity": torch.arange(16)}])
