"""Models that take objects go through everything that takes batches, by ``forward_fn``; models without one input embedding, too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank.calibration.preparing import input_embedding


@dataclass
class Graph:
    nodes: Tensor


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 48), nn.Linear(48, 4)

    def forward(self, nodes: Tensor, *, scale: float) -> Tensor:
        return self.b(torch.relu(self.a(nodes))).mean(dim=-2) * scale


def call(model: nn.Module, graphs: Any) -> Any:
    return model(torch.stack([graph.nodes for graph in graphs]), scale=2.0)


@pytest.fixture
def graphs() -> list[list[Graph]]:
    torch.manual_seed(0)
    return [[Graph(torch.randn(5, 16)) for _ in range(8)] for _ in range(8)]


def test_objects_are_compressed_healed_compared_timed_and_analysed(graphs: list[list[Graph]]) -> None:
    model = Net().eval()
    result = lowrank.compress_model(model, error_budget=0.2, calibration=graphs, forward_fn=call, progress=False)
    assert "16 for verification" in " ".join(result.report.notes)
    again = lowrank.apply_plan(model, result.plan, graphs, forward_fn=call)
    assert torch.equal(call(again, graphs[0]), call(result.model, graphs[0]))
    compared = lowrank.compare_models(model, result.model, graphs, forward_fn=call)
    assert 0.0 < compared["output_error"]["value"] < 0.2
    assert compared["samples"]["value"] == 64
    healed = lowrank.heal(result.model, model, graphs, steps=2, forward_fn=call, progress=False)
    assert healed.report.steps == 2
    timed = lowrank.benchmark(result.model, model, inputs=graphs[:1] * 2, rounds=1, at_least=0.0, forward_fn=call)
    assert timed.inputs.startswith("2 batches")
    seen = lowrank.analyze_model(model, graphs, forward_fn=call, progress=False)
    assert {row.tokens for row in seen.rows} == {320}


def test_objects_are_trained_on(graphs: list[list[Graph]]) -> None:
    model = Net()
    data = [(batch, torch.randint(0, 4, (8,))) for batch in graphs]
    result = lowrank.finetune(model, data, data, epochs=4, lr=0.02, forward_fn=call, progress=False)
    assert result.best_value is not None
    assert result.best_value < result.evaluations[0]["value"]


def test_models_without_one_input_embedding_are_never_asked_for_it() -> None:
    class Pictures(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 48), nn.Linear(48, 4)

        def get_input_embeddings(self) -> nn.Module:
            raise NotImplementedError("no single embedding")

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))

    model = Pictures().eval()
    assert input_embedding(model) is None
    result = lowrank.compress_model(
        model, error_budget=0.2, calibration=torch.randn(64, 16), heal={"steps": 2}, progress=False
    )
    assert result.report.totals["size_ratio"] < 1.0
