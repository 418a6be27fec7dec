"""Runs in float16: steps that loss scaling leaves out, in the history, in files and in what goes on from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from training_batches import Stoppable, Stopped, batches

from lowrank.integrations.matplotlib import draw_history
from lowrank.training import TrainingResult, finetune

SETTINGS = {"epochs": 3, "lr": 0.02, "mixed_precision": "fp16", "evaluate_every": 2, "progress": False}


class Net(Stoppable):
    """Its gradients are so large that the first loss scales overflow."""

    def __init__(self, stop_at: int = 0) -> None:
        super().__init__(stop_at)
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def loss_fn(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return 10 * F.cross_entropy(output, labels)


def run(model: Net, directory: Path, **more: Any) -> TrainingResult:
    return finetune(model, batches(), batches(2, seed=1), loss_fn, output_dir=directory, **SETTINGS, **more)


def strict(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_step_that_the_scaler_left_out_says_so_in_json(tmp_path: Path) -> None:
    result = run(Net(), tmp_path / "run")
    skipped = [row for row in result.history if row.get("skipped")]
    done = [row for row in result.history if not row.get("skipped")]
    assert skipped and done and result.history[0] is skipped[0]
    assert all(row["gradient_norm"] is None and row["loss"] > 0 for row in skipped)
    assert all(row["gradient_norm"] > 0 and "skipped" not in row for row in done)
    assert strict((tmp_path / "run" / "history.json").read_text())["history"] == result.history
    assert TrainingResult.from_json(result.to_json()).history == result.history
    with pytest.raises(ValueError, match="JSON"):
        TrainingResult(history=[{"step": 1, "loss": float("nan")}]).to_json()


def test_a_finished_run_in_half_precision_is_read_back(tmp_path: Path) -> None:
    first, second = Net(), Net(stop_at=1)
    result = run(first, tmp_path / "run")
    assert run(second, tmp_path / "run", resume=True) == result
    assert torch.equal(first.body[0].weight, second.body[0].weight)


@pytest.mark.parametrize("stop_at", [3, 6, 13])
def test_continuation_in_half_precision_is_identical(tmp_path: Path, stop_at: int) -> None:
    whole, resumed = Net(), Net()
    expected = run(whole, tmp_path / "whole")
    with pytest.raises(Stopped):
        run(Net(stop_at), tmp_path / "parts")
    strict((tmp_path / "parts" / "checkpoint" / "state.json").read_text())
    assert run(resumed, tmp_path / "parts", resume=True).to_json() == expected.to_json()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    for name in ("history.json", "state.json", "trained.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_a_step_without_a_loss_leaves_a_gap_in_the_plot() -> None:
    pytest.importorskip("matplotlib")
    history = [{"step": step, "loss": None if step == 2 else 1 / step, "learning_rate": 0.1} for step in (1, 2, 3)]
    assert draw_history(history, [], "loss", "svg").startswith(b"<?xml")
