"""Factors by what they cost the output, and healing, inside ``compress_model``: smaller at the same promise, and said so."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_state, seeded
from residual_model import Net, inputs
from torch import Tensor, nn

import lowrank
from lowrank.calibration.evaluation import Evaluator
from lowrank.calibration.preparing import prepare_batches
from lowrank.errors import CheckpointError, UsageError


class Narrowing(nn.Module):
    """The second layer reads few of the first one's outputs: an error in the others costs nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(32, 96), nn.Linear(96, 12)
        with torch.no_grad():
            self.second.weight.mul_(torch.logspace(0, -3, 96)[torch.randperm(96, generator=seeded(3))])

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def data(samples: int = 512, seed: int = 1) -> list[Tensor]:
    mix = torch.randn(32, 32, generator=seeded(9)) * torch.logspace(0.5, -1.0, 32)[:, None]
    return list((torch.randn(samples, 32, generator=seeded(seed)) @ mix).split(32))


def compress(model: nn.Module, **options: Any) -> lowrank.CompressionResult:
    return lowrank.compress_model(model, calibration=data(), progress=False, **options)


def unseen_error(model: nn.Module, result: lowrank.CompressionResult) -> float:
    return Evaluator(model, prepare_batches(model, data(1024, 77)), "output").measure(result.model).value


FACTORED = ("int8", "lowrank", "lowrank-int8")


def test_factors_by_their_cost_to_the_output_make_the_model_smaller() -> None:
    model = Narrowing().eval()
    # Codes of few bits are smaller still here; this is about the factors.
    plain = compress(model, error_budget=0.1, loss_aware=False, formats=FACTORED)
    aware = compress(model, error_budget=0.1, loss_aware=True, formats=FACTORED)
    assert aware.report.totals["size_ratio"] < 0.95 * plain.report.totals["size_ratio"]
    assert unseen_error(model, aware) <= 0.1 * 1.05
    assert any("whose error costs the output least" in note for note in aware.report.notes)
    assert not any("costs the output" in note for note in plain.report.notes)
    assert aware.plan.metadata["loss_aware"] == "output" and "loss_aware" not in plain.plan.metadata
    auto = compress(model, error_budget=0.1, formats=FACTORED)
    assert auto.plan == aware.plan


@pytest.mark.parametrize("metric", ["output", "kl"])
def test_a_plan_of_such_factors_applies_again_to_the_same_bits(metric: str) -> None:
    class Logits(Narrowing):
        def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {"logits": super().forward(x)}

    model = Logits().eval()
    result = compress(model, error_budget=0.05, metric=metric, formats=FACTORED)
    assert result.plan.metadata["loss_aware"] == {"output": "output", "kl": "labels"}[metric]
    assert any(entry.rank is not None for entry in result.plan.entries)
    plan = lowrank.Plan.from_json(result.plan.to_json())
    for again in (
        lowrank.apply_plan(model, plan, data()),
        lowrank.compress_model(model, plan=plan, calibration=data(), metric=metric, progress=False).model,
    ):
        state = again.state_dict()
        assert_same_state(result.model, state)
    damaged = lowrank.Plan(plan.entries, metadata={**plan.metadata, "loss_aware": "everything"})
    with pytest.raises(CheckpointError, match="loss_aware must be one of output, labels, got 'everything'"):
        lowrank.apply_plan(model, damaged, data())


def test_a_plan_made_for_a_tensor_of_the_output_needs_to_know_which() -> None:
    class Two(Narrowing):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            y = super().forward(x)
            return y.sum(dim=1, keepdim=True), y

    def second(output: tuple[Tensor, Tensor]) -> Tensor:
        return output[1]

    model = Two().eval()
    result = compress(model, error_budget=0.1, output_fn=second)
    with pytest.raises(UsageError, match=r"output_fn=.*second picks; pass the same output_fn"):
        lowrank.apply_plan(model, result.plan, data())
    again = lowrank.apply_plan(model, result.plan, data(), output_fn=second).state_dict()
    assert_same_state(result.model, again)


def test_a_model_that_cannot_be_differentiated_is_told_of() -> None:
    class Detached(Narrowing):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return super().forward(x)

    class Refusing(Narrowing):
        def forward(self, x: Tensor) -> Tensor:
            return self.second(_NoBackward.apply(self.first(x)))

    for model, reason in ((Detached(), "is it detached"), (Refusing(), "cannot be differentiated")):
        with pytest.raises(UsageError, match=reason):
            compress(model.eval(), error_budget=0.2, loss_aware=True)
    assert "loss_aware" not in compress(Detached().eval(), error_budget=0.2).plan.metadata
    notes = compress(Refusing().eval(), error_budget=0.2).report.notes
    assert any("fitted to the layers' inputs alone" in note for note in notes)


class _NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise RuntimeError("this operation has no derivative")


HEAL = {"steps": 120, "lr": 5e-3}


def healable(model: nn.Module, **options: Any) -> lowrank.CompressionResult:
    return lowrank.compress_model(model, calibration=inputs(512), progress=False, **options)


def unseen(model: nn.Module, result: lowrank.CompressionResult) -> float:
    return Evaluator(model, prepare_batches(model, inputs(1024, 77)), "output").measure(result.model).value


def test_healing_finds_a_smaller_model_that_keeps_the_budget_on_data_never_seen() -> None:
    model = Net().eval()
    before = copy.deepcopy(model.state_dict())
    plain = healable(model, error_budget=0.1)
    healed = healable(model, error_budget=0.1, heal=HEAL)
    assert healed.report.totals["size_ratio"] < 0.9 * plain.report.totals["size_ratio"]
    assert healed.report.totals["error_upper"] <= 0.1
    assert unseen(model, healed) <= 0.1 * 1.05
    assert_same_state(model, before)
    told = healed.report.totals["heal"]
    assert told["steps"] == 120 and told["error_after"] < told["error_before"]
    assert healed.report.totals["error_predicted"] == pytest.approx(told["error_after"], rel=1e-9)
    assert any(note.startswith("healed: 120 steps on 256 samples") for note in healed.report.notes)
    assert healed.plan.metadata["healed"] == {"steps": 120}
    assert sum(row.bytes_after for row in healed.report.rows) == healed.report.totals["bytes_after"]
    assert not {id(p) for p in healed.model.parameters()} & {id(p) for p in model.parameters()}
    assert [p.requires_grad for p in healed.model.parameters()] == [True] * len(list(healed.model.parameters()))


def test_what_was_healed_is_saved_loaded_and_written_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, x = Net().eval(), inputs(64, 5)[0]
    result = healable(model, error_budget=0.1, heal=HEAL)
    again = healable(model, error_budget=0.1, heal=HEAL)
    assert all(torch.equal(t, again.model.state_dict()[n]) for n, t in result.model.state_dict().items())
    result.save(tmp_path / "small")
    loaded = lowrank.load_model(tmp_path / "small", model=model)
    with torch.no_grad():
        expected = result.model(x)
        assert torch.equal(loaded(x), expected)
        own = copy.deepcopy(model)
        inside = healable(own, error_budget=0.1, heal=HEAL, inplace=True)
        assert inside.model is own and torch.equal(own(x), expected)
    with caplog.at_level(logging.WARNING, logger="lowrank"):
        lowrank.apply_plan(model, result.plan, inputs(512))
    assert "was healed afterwards" in caplog.text


def test_a_size_budget_and_a_given_plan_are_healed_too() -> None:
    model = Net().eval()
    size = 0.12
    plain, healed = healable(model, size_budget=size), healable(model, size_budget=size, heal=HEAL)
    assert healed.report.totals["size_ratio"] <= size
    assert unseen(model, healed) < 0.8 * unseen(model, plain)
    given = healable(model, plan=plain.plan, heal=HEAL)
    assert given.report.totals["bytes_after"] == plain.report.totals["bytes_after"]
    assert given.plan.metadata["healed"] == {"steps": 120} and "healed" not in plain.plan.metadata
    assert unseen(model, given) < 0.8 * unseen(model, plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heal": {"step": 3}}, "heal: unknown argument step; it takes steps, epochs, lr"),
        ({"heal": {"steps": 0}}, "steps: must be an integer of at least 1, got 0"),
        ({"heal": "yes"}, "heal: must be True, False or a dict"),
        ({"heal": True, "metric": "weight"}, "heal: needs calibration batches"),
        ({"loss_aware": True, "metric": "weight"}, "loss_aware=True: needs calibration batches"),
    ],
)
def test_what_means_nothing_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        compress(Narrowing(), error_budget=0.1, **options)
