"""finetune: the arithmetic against plain loops, what it keeps, and what it refuses."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from helpers import seeded
from torch import nn
from torch.nn import functional as F
from training_batches import batches, classifier, loader, normed

from lowrank.errors import CalibrationError, NumericsError, UsageError
from lowrank.layers import QuantizedLinear, SVDCompressedLinear
from lowrank.training import finetune
from lowrank.training.data import TrainingData
from lowrank.training.optimizer import build_optimizer
from lowrank.training.options import TrainingOptions, learning_rate_factor


def test_it_is_adamw_with_decay_on_matrices_only_warmup_schedule_and_clipping() -> None:
    ours, theirs = classifier(), classifier()
    data = batches(1)
    finetune(
        ours, data, steps=5, lr=0.05, weight_decay=0.1, warmup=2, schedule="linear", max_grad_norm=0.3, progress=False
    )
    matrices = [p for p in theirs.parameters() if p.ndim == 2]
    vectors = [p for p in theirs.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}])
    for factor in (0.5, 1.0, 1.0, 2 / 3, 1 / 3):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * factor
        optimizer.zero_grad()
        F.cross_entropy(theirs(data[0][0]), data[0][1]).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.3)
        optimizer.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_accumulation_is_one_larger_batch_also_where_sizes_differ() -> None:
    x, y = batches(1, size=20)[0]
    whole, parts = classifier(), classifier()
    one = finetune(whole, [(x, y)], steps=1, lr=0.01, progress=False)
    two = finetune(
        parts, [(x[:13], y[:13]), (x[13:], y[13:])], steps=1, lr=0.01, gradient_accumulation=2, progress=False
    )
    assert one.history[0]["loss"] == pytest.approx(two.history[0]["loss"], rel=1e-6)
    assert one.history[0]["gradient_norm"] == pytest.approx(two.history[0]["gradient_norm"], rel=1e-5)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_best_is_kept_and_training_past_it_is_undone() -> None:
    model = classifier()
    result = finetune(
        model, batches(), batches(seed=1), epochs=8, lr=5.0, schedule="constant", metric="accuracy", progress=False
    )
    values = {row["step"]: row["value"] for row in result.evaluations}
    assert result.best_value == max(values.values()) == values[result.best_step]
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches(seed=1))
    assert right / 48 == pytest.approx(result.best_value)
    assert list(values) == [0, *range(6, 49, 6)]


def test_a_run_that_only_harms_hands_the_first_tensors_back() -> None:
    model = classifier()
    data = batches()
    finetune(model, data, data, epochs=30, lr=0.02, progress=False)
    before = copy.deepcopy(model.state_dict())
    wrong = [(x, (y + 1) % 3) for x, y in data]
    result = finetune(model, wrong, data, epochs=3, lr=0.05, progress=False)
    assert result.best_step == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_patience_stops_the_run() -> None:
    data = batches()
    wrong = [(x, (y + 1) % 3) for x, y in data]
    model = classifier()
    finetune(model, data, steps=60, lr=0.02, progress=False)
    result = finetune(model, wrong, data, steps=60, lr=0.05, patience=2, evaluate_every=3, progress=False)
    assert (result.stopped_early, result.steps, result.best_step) == (True, 6, 0)


def test_the_same_seed_gives_the_same_bytes_and_the_callers_random_numbers_are_untouched() -> None:
    outcomes = []
    for _ in range(2):
        model = nn.Sequential(classifier(), nn.Dropout(0.2), nn.Linear(3, 3))
        torch.manual_seed(5)
        with torch.no_grad():
            model[2].weight.copy_(torch.eye(3))
            model[2].bias.zero_()
        state = torch.get_rng_state()
        finetune(model, batches(), epochs=2, lr=0.01, seed=7, progress=False)
        assert torch.equal(state, torch.get_rng_state())
        outcomes.append(model.state_dict())
        assert model.training
    assert all(torch.equal(outcomes[0][name], outcomes[1][name]) for name in outcomes[0])


def test_only_trainable_parameters_move_and_codes_never() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        QuantizedLinear.from_linear(nn.Linear(6, 16)),
        nn.Tanh(),
        SVDCompressedLinear.from_linear(nn.Linear(16, 3), rank=2),
    )
    model[2].left.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    result = finetune(model, batches(), epochs=2, lr=0.05, progress=False)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}
    assert moved == {"0.bias", "2.right", "2.bias"}
    assert (result.trainable, result.total) == (16 + 32 + 3, 16 + 32 + 6 + 3 + 96)
    assert result.history[-1]["loss"] < result.history[0]["loss"]


def test_running_statistics_of_a_frozen_norm_stay() -> None:
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))
    model[0].requires_grad_(False)
    finetune(model, batches(), epochs=1, lr=0.01, progress=False)
    assert float(model[0].running_mean.abs().sum()) == 0.0
    model[0].requires_grad_(True)
    finetune(model, batches(), epochs=1, lr=0.01, progress=False)
    assert float(model[0].running_mean.abs().sum()) > 0.0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_learns(precision: str) -> None:
    data = batches()
    result = finetune(classifier(), data, data, epochs=10, lr=0.02, mixed_precision=precision, progress=False)
    assert result.best_value < 0.6 * result.evaluations[0]["value"]


def test_a_causal_model_computes_its_own_loss_and_perplexity_is_its_exponential() -> None:
    pytest.importorskip("transformers")
    from tiny_models import make_causal_model

    ids = torch.randint(4, 20, (6, 9), generator=seeded())
    labels = ids.clone()
    labels[:, 6:] = -100
    data = [{"input_ids": ids[:4], "labels": labels[:4]}, {"input_ids": ids[4:], "labels": labels[4:]}]
    model = make_causal_model()
    with torch.no_grad():
        expected = float(model(input_ids=ids, labels=labels).loss)
    result = finetune(
        model, data, data, epochs=2, lr=1e-3, metric="perplexity", gradient_checkpointing=True, progress=False
    )
    assert result.evaluations[0]["value"] == pytest.approx(math.exp(expected), rel=1e-5)
    assert result.best_value < result.evaluations[0]["value"]
    assert "forward" not in vars(model.model.layers[0])


def test_loss_fn_gets_output_and_labels_also_out_of_a_dict() -> None:
    model = nn.Linear(6, 1)
    seen = []

    def loss_fn(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(labels.shape))
        return (output - labels).square().mean()

    finetune(
        model, [{"input": torch.randn(4, 6), "labels": torch.randn(4, 1)}], loss_fn=loss_fn, steps=2, progress=False
    )
    assert seen == [(4, 1), (4, 1)]


def test_a_data_loader_shuffles_the_same_way_each_time_and_anew_each_epoch() -> None:
    dataset = torch.utils.data.TensorDataset(torch.arange(10.0)[:, None], torch.arange(10))

    def order() -> list[list[int]]:
        data = TrainingData(torch.utils.data.DataLoader(dataset, batch_size=3, shuffle=True), seed=4, own_loss=True)
        return [[int(i) for n in range(4) for i in data.group(epoch, n, 1)[0].labels] for epoch in range(2)]

    first, second = order()
    assert order() == [first, second]
    assert first != second and sorted(first) == sorted(second) == list(range(10))


def test_what_can_be_read_once_is_read_once() -> None:
    data = batches()
    one, two = classifier(), classifier()
    finetune(one, (pair for pair in data), epochs=2, lr=0.01, progress=False)
    finetune(two, data, epochs=2, lr=0.01, progress=False)
    assert torch.equal(one[0].weight, two[0].weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of them, got neither"),
        ({"epochs": 1, "steps": 2}, "exactly one of them, got both"),
        ({"steps": 0}, "steps: must be an integer of at least 1, got 0"),
        ({"steps": 2, "lr": math.nan}, "lr: must be a finite number above 0"),
        ({"steps": 2, "warmup": 1.5}, r"warmup: a fraction of the steps is in \[0, 1\)"),
        ({"steps": 2, "schedule": "step"}, "schedule: must be one of cosine, linear, constant"),
        ({"steps": 2, "mixed_precision": "int8"}, "mixed_precision: must be one of"),
        ({"steps": 2, "metric": "f1"}, "metric: must be one of"),
        ({"steps": 2, "metric": "accuracy"}, "validation: patience"),
        ({"steps": 2, "lora_plus_ratio": 16.0}, "no trainable lora_B"),
        ({"steps": 2, "resume": True}, "output_dir: resume and overwrite need one"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        finetune(classifier(), batches(), progress=False, **arguments)


def test_data_that_cannot_be_used_is_refused() -> None:
    model = classifier()
    with pytest.raises(CalibrationError, match="train: is empty"):
        finetune(model, [], steps=1, progress=False)
    with pytest.raises(CalibrationError, match="train: batch 0: has no labels"):
        finetune(model, [torch.zeros(2, 6)], steps=1, progress=False)
    with pytest.raises(CalibrationError, match=r"batch 0: 2 samples, but labels of shape \(3,\)"):
        finetune(model, [(torch.zeros(2, 6), torch.zeros(3).long())], steps=1, progress=False)
    with pytest.raises(CalibrationError, match="wrap it in a list"):
        finetune(model, torch.zeros(2, 6), steps=1, progress=False)
    with pytest.raises(UsageError, match="labels: classes of shape"):
        finetune(model, [(torch.zeros(2, 6), torch.zeros(2, 2).long())], steps=1, progress=False)
    numbers = [(torch.zeros(2, 6), torch.zeros(2, model[-1].out_features))]
    for metric in ("accuracy", "perplexity"):
        with pytest.raises(UsageError, match=f"metric '{metric}': needs labels that are classes"):
            finetune(model, numbers, numbers, steps=1, metric=metric, progress=False)


def test_a_frozen_model_is_refused_with_the_remedy() -> None:
    with pytest.raises(UsageError, match=r"no trainable parameter; add an adapter with lowrank\.add_lora"):
        finetune(classifier().requires_grad_(False), batches(), steps=1, progress=False)


def test_a_loss_that_is_not_finite_names_the_step_and_the_model_is_as_before() -> None:
    model = classifier()
    before = copy.deepcopy(model.state_dict())
    calls = []

    def loss_fn(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return F.cross_entropy(output, labels) * (math.inf if len(calls) == 3 else 1.0)

    with pytest.raises(NumericsError, match="loss is inf at step 3; lower lr"):
        finetune(model, batches(), loss_fn=loss_fn, steps=5, lr=0.1, progress=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_lora_plus_moves_lora_b_faster() -> None:
    model = nn.Module()
    model.lora_A, model.lora_B = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    optimizer = build_optimizer(model, TrainingOptions(steps=1, lr=0.1, lora_plus_ratio=16.0))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(model.lora_A.weight)] == 0.1
    assert rates[id(model.lora_B.weight)] == pytest.approx(1.6)


def test_cosine_ends_near_zero() -> None:
    factors = [learning_rate_factor(step, 100, 10, "cosine") for step in range(100)]
    assert factors[9] == factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5)
    assert 0.0 < factors[99] < 1e-3


def test_labels_that_are_no_classes_are_bad_data_but_the_errors_of_a_callers_loss_stay_its_own() -> None:
    x = torch.randn(6, 6)
    data = [(x, torch.full((6,), 9))]
    with pytest.raises(CalibrationError, match=r"refused a batch .*a label not among the classes"):
        finetune(classifier(), data, steps=1, progress=False)

    def broken(output: Any, labels: Any) -> torch.Tensor:
        raise IndexError("mine")

    with pytest.raises(IndexError, match="mine"):
        finetune(classifier(), data, loss_fn=broken, steps=1, progress=False)


def test_loaders_draw_nothing_from_the_callers_random_numbers() -> None:
    model = normed()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    finetune(model, loader(24), loader(24), steps=3, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
