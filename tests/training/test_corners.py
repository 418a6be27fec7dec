"""Runs at the edges: what is saved besides an adapter, whose random numbers, losses without a way back."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from training_batches import batches

import lowrank
from lowrank.errors import CheckpointError, NumericsError
from lowrank.integrations.accelerate import Processes
from lowrank.layers import QuantizedLinear
from lowrank.lora import LoRAConfig, add_lora, merge_lora, set_adapter
from lowrank.training import TrainingResult, finetune
from lowrank.training.blocks import checkpointed
from lowrank.training.data import read_example
from lowrank.training.ranks import rank_scores


def base() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 24), nn.LayerNorm(24), nn.Linear(24, 3))


CONFIG = LoRAConfig(r=2, target_modules=["0", "2"])


def test_what_is_trained_beside_the_adapter_is_saved_too(tmp_path: Path) -> None:
    model = add_lora(base(), CONFIG)
    model[1].requires_grad_(True)
    finetune(model, batches(), steps=3, lr=0.05, output_dir=tmp_path / "run", progress=False)
    files = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert {"adapter_model.safetensors", "trained.safetensors"} <= set(files)
    again = add_lora(base(), CONFIG)
    again[1].requires_grad_(True)
    finetune(again, batches(), steps=3, lr=0.05, output_dir=tmp_path / "run", resume=True, progress=False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_two_adapters_trained_together_are_saved(tmp_path: Path) -> None:
    model = add_lora(add_lora(base(), CONFIG, "a"), CONFIG, "b")
    set_adapter(model, ["a", "b"])
    finetune(model, batches(), steps=2, lr=0.05, output_dir=tmp_path / "run", progress=False)
    assert (tmp_path / "run" / "trained.safetensors").is_file()
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_a_merged_model_is_refused_by_name() -> None:
    model = merge_lora(add_lora(base(), CONFIG))
    with pytest.raises(NumericsError, match="no trainable parameter got a gradient"):
        finetune(model, batches(), steps=1, progress=False)


def loader() -> torch.utils.data.DataLoader[object]:
    pairs = batches(1, size=24)[0]
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*pairs), batch_size=8, shuffle=True)


def test_loaders_draw_nothing_from_the_callers_random_numbers() -> None:
    model = base()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    finetune(model, loader(), loader(), steps=3, progress=False)
    assert torch.equal(torch.get_rng_state(), before)


class Stopped(RuntimeError):
    """Stands for a killed process."""


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
        finetune(add_lora(base(), CONFIG), batches(), batches(2, seed=1), **options)
    config = CONFIG.replace(lora_alpha=32) if different == "alpha" else CONFIG
    train, checks = batches(), batches(2, seed=4 if different == "validation" else 1)
    if different == "later batch":
        for x, _ in train:
            x[-1] += 1 if x is train[-1][0] else 0
    with pytest.raises(CheckpointError, match="another"):
        finetune(add_lora(base(), config), train, checks, **options)


def test_all_parameters_are_counted_as_elsewhere() -> None:
    model = base()
    model[0] = QuantizedLinear.from_linear(model[0])
    model = add_lora(model, CONFIG)
    result = finetune(model, batches(), steps=1, progress=False)
    assert (result.trainable, result.total) == lowrank.trainable_parameters(model)


def test_labels_of_several_tensors_are_shared_out_with_their_inputs() -> None:
    labels = (torch.arange(6), {"other": torch.arange(12).view(6, 2)})
    example = read_example((torch.arange(6.0)[:, None], labels), "train", own_loss=False)
    mine = example.share(1, 2)
    assert mine is not None
    assert mine.labels[0].tolist() == [1, 3, 5]
    assert mine.labels[1]["other"].tolist() == [[2, 3], [6, 7], [10, 11]]


def test_sums_over_processes_go_by_the_device_of_their_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    operations = pytest.importorskip("accelerate.utils", reason="the extra hf is not installed")
    seen: list[str] = []

    def reduce(tensor: Tensor, reduction: str) -> Tensor:
        seen.append(tensor.device.type)
        return torch.full(tensor.shape, 3.0)

    monkeypatch.setattr(operations, "reduce", reduce)
    team = Processes(0, 2, SimpleNamespace(device=torch.device("meta")))
    assert team.total(torch.ones(2)).tolist() == [3.0, 3.0]
    assert seen == ["meta"]


def test_a_forward_set_on_the_instance_comes_back() -> None:
    block = lambda: nn.Sequential(nn.Linear(2, 2))  # noqa: E731
    model = nn.Sequential(block(), block())
    own = model[0].forward
    model[0].forward = own
    with checkpointed(model) as count:
        assert count == 2
        assert model[0].forward is not own
    assert model[0].__dict__["forward"] is own
    assert "forward" not in model[1].__dict__


def test_checkpointing_goes_with_a_model_that_caches_keys() -> None:
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    from tiny_models import make_causal_model

    ids = torch.randint(4, 20, (4, 9), generator=torch.Generator().manual_seed(0))
    losses = []
    for checkpointing in (False, True):
        model = make_causal_model()
        data = [{"input_ids": ids, "labels": ids}]
        result = finetune(model, data, steps=2, lr=1e-2, gradient_checkpointing=checkpointing, progress=False)
        losses.append([row["loss"] for row in result.history])
    assert losses[0] == losses[1]


def test_a_history_that_is_none_is_refused() -> None:
    with pytest.raises(CheckpointError, match="history"):
        TrainingResult.from_json('{"no_such_field": 1}')
    with pytest.raises(CheckpointError, match="history"):
        TrainingResult.from_json("3")


def test_kernels_count_for_the_rank_a_convolution_can_use() -> None:
    model = nn.Sequential(nn.Conv2d(2, 16, 3), nn.Flatten(), nn.Linear(16, 3))
    data = [(torch.randn(4, 2, 3, 3), torch.randint(3, (4,)))]
    _, limits, _ = rank_scores(model, LoRAConfig(r=2, target_modules=["0", "2"]), data)
    assert limits == {"0": 16, "2": 3}


def test_a_metric_with_state_is_not_copied(tmp_path: Path) -> None:
    class Metric:
        def __call__(self, model: nn.Module) -> float:
            return 0.0

        def __deepcopy__(self, memo: object) -> object:
            raise AssertionError("copied")

    result = finetune(base(), batches(), steps=1, metric=Metric(), output_dir=tmp_path / "run", progress=False)
    assert result.best_value == 0.0
