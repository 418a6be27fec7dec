"""A run that was stopped goes on to the very bytes of one that was not, out of files without a pickle."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from training_batches import BOTH_LAYERS, Stoppable, Stopped, batches, loader, normed

from lowrank.errors import CheckpointError, StorageError, UsageError
from lowrank.lora import add_lora
from lowrank.training import TrainingResult, finetune

SETTINGS = {"epochs": 4, "lr": 0.02, "warmup": 3, "gradient_accumulation": 2, "evaluate_every": 2, "progress": False}


class Net(Stoppable):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 3))


@pytest.mark.parametrize("data", ["list", "loader"])
@pytest.mark.parametrize("stop_at", [2, 6, 11, 19])
def test_continuation_is_identical(tmp_path: Path, data: str, stop_at: int) -> None:
    train = batches() if data == "list" else loader(44)
    whole = Net()
    expected = finetune(whole, train, batches(2, seed=1), output_dir=tmp_path / "whole", **SETTINGS)
    stopped = Net()
    stopped.stop_at = stop_at
    with pytest.raises(Stopped):
        finetune(stopped, train, batches(2, seed=1), output_dir=tmp_path / "parts", resume=True, **SETTINGS)
    resumed = Net()
    result = finetune(resumed, train, batches(2, seed=1), output_dir=tmp_path / "parts", resume=True, **SETTINGS)
    assert result.to_json() == expected.to_json()
    assert resumed.calls == whole.calls - (stop_at - 1) // 4 * 4 if data == "list" else resumed.calls <= whole.calls
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert files == ["history.json", "state.json", "trained.safetensors"]
    for name in files:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_a_finished_run_is_read_back(tmp_path: Path) -> None:
    first, second = Net(), Net()
    result = finetune(first, batches(), batches(seed=1), output_dir=tmp_path / "run", **SETTINGS)
    second.stop_at = 1
    again = finetune(second, batches(), batches(seed=1), output_dir=tmp_path / "run", resume=True, **SETTINGS)
    assert again == result
    assert torch.equal(first.body[0].weight, second.body[0].weight)
    assert TrainingResult.from_json((tmp_path / "run" / "history.json").read_text()).best_step == result.best_step


@pytest.mark.parametrize("different", ["lr", "model", "data"])
def test_the_state_of_another_run_is_refused(tmp_path: Path, different: str) -> None:
    finetune(Net(), batches(), output_dir=tmp_path / "run", **{**SETTINGS, "evaluate_every": None})
    model = nn.Sequential(Net()) if different == "model" else Net()
    settings = {**SETTINGS, "evaluate_every": None, "lr": 0.03 if different == "lr" else 0.02}
    train = batches(seed=5 if different == "data" else 0)
    with pytest.raises(CheckpointError, match=f"another {different} .*; resume with the same arguments"):
        finetune(model, train, output_dir=tmp_path / "run", resume=True, **settings)


def test_what_is_there_is_not_overwritten_unasked(tmp_path: Path) -> None:
    kept = tmp_path / "run"
    kept.mkdir()
    (kept / "mine.txt").write_text("mine")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(UsageError, match=r"not empty|did not write"):
            finetune(Net(), batches(), steps=1, output_dir=kept, progress=False, **options)
    assert (kept / "mine.txt").read_text() == "mine"
    (kept / "mine.txt").rename(kept / "state.json")
    finetune(Net(), batches(), steps=1, output_dir=kept, overwrite=True, progress=False)
    assert not (kept / "mine.txt").exists()


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "run" / "checkpoint"
    state.mkdir(parents=True)
    (state / "state.json").write_text('{"facts": 3}')
    with pytest.raises(CheckpointError, match="is no training state"):
        finetune(Net(), batches(), steps=1, output_dir=tmp_path / "run", resume=True, progress=False)


def test_a_second_run_into_the_same_directory_is_turned_away(tmp_path: Path) -> None:
    refused: list[str] = []

    def second_run(model: nn.Module) -> float:
        def work() -> None:
            with pytest.raises(StorageError, match="another run is writing to it") as caught:
                finetune(Net(), batches(), steps=1, output_dir=tmp_path / "run", overwrite=True, progress=False)
            refused.append(str(caught.value))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return 0.0

    finetune(Net(), batches(), steps=2, metric=second_run, output_dir=tmp_path / "run", progress=False)
    assert refused
    assert (tmp_path / "run" / "trained.safetensors").is_file()


@pytest.mark.parametrize("different", ["alpha", "later batch", "validation"])
def test_a_run_is_not_resumed_with_other_adapters_or_data(tmp_path: Path, different: str) -> None:
    calls = 0

    def loss_fn(output: Tensor, labels: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise Stopped
        return nn.functional.cross_entropy(output, labels)

    options = {"loss_fn": loss_fn, "epochs": 3, "output_dir": tmp_path / "run", "resume": True, "progress": False}
    with pytest.raises(Stopped):
        finetune(add_lora(normed(), BOTH_LAYERS), batches(), batches(2, seed=1), **options)
    config = BOTH_LAYERS.replace(lora_alpha=32) if different == "alpha" else BOTH_LAYERS
    train, checks = batches(), batches(2, seed=4 if different == "validation" else 1)
    if different == "later batch":
        for x, _ in train:
            x[-1] += 1 if x is train[-1][0] else 0
    with pytest.raises(CheckpointError, match="another"):
        finetune(add_lora(normed(), config), train, checks, **options)
