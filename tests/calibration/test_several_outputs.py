"""The error of models with several outputs, of outputs that hardly vary, and of single samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank.calibration.batches import Batch
from lowrank.calibration.evaluation import Comparison, Evaluator, Measurement, compare_models
from lowrank.calibration.gradients import output_gradients
from lowrank.calibration.metrics import OUTPUT
from lowrank.calibration.metrics.variation import Centre
from lowrank.errors import CalibrationError, UsageError
from lowrank.training.distillation import Distillation


class Told(nn.Module):
    """Two heads, and whatever is made of them."""

    def __init__(self, made: Callable[[Tensor, Tensor], Any] = lambda a, b: (a, b), seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(6, 4), nn.Linear(6, 3)
        self.made = made

    def forward(self, x: Tensor) -> Any:
        return self.made(self.first(x), self.second(x))


def inputs(size: int = 8, count: int = 4, seed: int = 0) -> list[Batch]:
    torch.manual_seed(seed)
    return [Batch((torch.randn(size, 6),), size=size) for _ in range(count)]


def off(model: Told, head: str, factor: float, made: Callable[[Tensor, Tensor], Any] | None = None) -> Told:
    """The same model with one head scaled."""
    other = Told(made or model.made)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in other.get_submodule(head).parameters():
            parameter *= factor
    return other


@pytest.mark.parametrize("head", ["first", "second"])
def test_an_error_in_any_output_is_the_error(head: str) -> None:
    model = Told()
    found = Evaluator(model, inputs(), "output").measure(off(model, head, 1.25))
    assert math.isclose(found.value, 0.25, rel_tol=1e-5) and found.worst == {"first": "0", "second": "1"}[head]
    assert not found.passes(0.2) and found.passes(0.26)
    other = {"0": "1", "1": "0"}[found.worst]
    assert found.parts[other].value == 0.0


def test_nan_in_one_output_is_not_hidden_by_another() -> None:
    model = Told()
    for first, second in ((lambda a: a, lambda b: b / 0.0), (lambda a: a / 0.0 * 0.0, lambda b: b)):
        broken = Told(lambda a, b, f=first, s=second: (f(a), s(b)))
        broken.load_state_dict(model.state_dict())
        found = Evaluator(model, inputs(), "output").measure(broken)
        assert found.value == math.inf and found.ratio == math.inf and not found.passes(0.5)


def test_the_bound_of_all_outputs_breaks_a_promise_in_one_of_twenty_cases() -> None:
    """Ten outputs whose true errors lie at the budget: the worst bound is below it in at most 5 % of draws."""
    generator = torch.Generator().manual_seed(0)
    draws, kept = 400, 0
    for _ in range(draws):
        parts = {}
        for index in range(10):
            # Nine are far within the budget of 0.1, and the tenth is at it.
            level = 0.01 if index else 1.0
            squares = level * (1.0 + 0.3 * torch.randn(40, generator=generator, dtype=torch.float64))
            parts[str(index)] = Measurement(OUTPUT, squares, torch.full((40,), 100.0, dtype=torch.float64))
        kept += Comparison(parts).passes(0.1)
    assert 0.02 * draws < kept < 0.08 * draws


@pytest.mark.parametrize(
    "made",
    [
        lambda a, b: {"state": a, "reward": b},
        lambda a, b: (a.round().long(), [b, {"inner": a}], None),
        lambda a, b: (a.reshape(-1, 2), b),
        lambda a, b: (b.square().mean(), a, b),
    ],
    ids=["dict", "nested", "more rows than samples", "loss beside"],
)
def test_outputs_of_every_shape_are_measured(made: Callable[[Tensor, Tensor], Any]) -> None:
    model = Told(made)
    judge = Evaluator(model, inputs(), "output")
    assert len(judge.outputs) == 2
    for head in ("first", "second"):
        assert math.isclose(judge.measure(off(model, head, 1.1)).value, 0.1, rel_tol=1e-4)


def test_an_output_that_is_missing_or_of_another_shape_is_named() -> None:
    model = Told()
    judge = Evaluator(model, inputs(), "output")
    with pytest.raises(CalibrationError, match="lacks output 1 of the original; it has 0"):
        judge.measure(off(model, "first", 1.0, lambda a, b: (a,)))
    with pytest.raises(CalibrationError, match=r"output 1 of the compressed model has shape \(8, 2\).*\(8, 3\)"):
        judge.measure(off(model, "first", 1.0, lambda a, b: (a, b[:, :2])))
    with pytest.raises(CalibrationError, match="lacks output 1"):
        compare_models(model, off(model, "first", 1.0, lambda a, b: (a,)), inputs())


def test_gradients_see_every_output_by_its_own_size() -> None:
    model = Told(lambda a, b: (1e6 * a, b))
    found = output_gradients(model, inputs(), {"first": model.first, "second": model.second})
    assert set(found) == {"first", "second"}
    # What an error costs relative to its output: the large one does not drown the small one, 1e12 times in squares.
    cost = {name: float(found[name].trace()) for name in found}
    sizes = {
        name: float(torch.cat([model.get_submodule(name)(batch.args[0]) for batch in inputs()]).detach().norm() ** 2)
        for name in found
    }
    assert 0.2 < (cost["first"] * sizes["first"] / 4) / (cost["second"] * sizes["second"] / 3) < 5.0


def test_healing_draws_every_output_to_the_original() -> None:
    model = Told()
    for head in ("first", "second"):
        other = off(model, head, 1.5)
        loss = Distillation(other, model, 0.0).loss(inputs()[0])
        loss.backward()
        gradient = other.get_submodule(head).weight.grad
        assert gradient is not None and float(gradient.abs().max()) > 0.0


# Outputs that hardly vary.


def constant(a: Tensor, b: Tensor) -> Tensor:
    return a + torch.tensor([1000.0, -500.0, 0.0, 3.0])


def test_what_varies_is_the_spread_about_the_mean_of_each_number() -> None:
    model, batches = Told(constant), inputs()
    with torch.no_grad():
        whole = torch.cat([model(batch.args[0]) for batch in batches]).double()
    spread = (whole - whole.mean(dim=0)).square().sum()
    found = Evaluator(model, batches, "output").measure(off(model, "first", 1.5))
    assert math.isclose(found.varying["output"] or 0.0, float(spread / whole.square().sum()), rel_tol=1e-4)
    against = Evaluator(model, batches, "variation").measure(off(model, "first", 1.5)).value
    assert math.isclose(found.figures()["error_of_variation"], against, rel_tol=1e-4)
    assert found.value < 0.001 < 0.4 < against
    (note,) = found.notes()
    assert "mostly constant" in note and 'metric="variation"' in note
    assert not Evaluator(model, batches, "variation").measure(off(model, "first", 1.5)).notes()


@pytest.mark.parametrize(
    "made",
    [
        lambda a, b: a.reshape(-1, 2, 2) + torch.arange(4.0).reshape(1, 2, 2) * 1000.0,
        lambda a, b: a.reshape(-1, 1, 2, 2) + torch.arange(4.0).reshape(1, 1, 2, 2) * 1000.0,
        lambda a, b: a.sum(dim=1) + 1000.0,
    ],
    ids=["anchors", "image", "one number a sample"],
)
def test_a_constant_of_its_own_in_each_place_is_constant(made: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = Told(made)
    found = Evaluator(model, inputs(), "output").measure(off(model, "first", 1.5))
    assert found.value < 0.01 and found.figures()["error_of_variation"] > 0.3
    assert "mostly constant" in found.notes()[0]


def test_texts_of_many_lengths_have_a_mean_a_feature() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    batches = [Batch((torch.randn(8, length, 6),), size=8) for length in (3, 5)]
    with torch.no_grad():
        whole = torch.cat([model(batch.args[0]).flatten(0, 1) for batch in batches]).double()
    centre = Centre()
    for batch in batches:
        centre.add(model(batch.args[0]).detach(), batch)
    assert centre.mean is not None
    torch.testing.assert_close(centre.mean, whole.mean(dim=0))


def test_an_output_without_a_mean_is_measured_but_for_variation() -> None:
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score = nn.Linear(6, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.score(x)[..., 0]

    model = Scores()
    batches = [Batch((torch.randn(8, length, 6),), size=8) for length in (3, 5)]
    found = Evaluator(model, batches, "output").measure(model)
    assert found.value == 0.0 and found.varying == {"output": None} and found.notes() == []
    with pytest.raises(UsageError, match=r"the output has another number of features.*no mean"):
        Evaluator(model, batches, "variation")
    assert "variation_error" not in compare_models(model, model, batches)


def test_an_output_that_is_constant_or_zero_is_named() -> None:
    model = Told(lambda a, b: (a, torch.full_like(b, 3.0)))
    (note,) = Evaluator(model, inputs(), "output").measure(model).notes()
    assert note.startswith("output 1 is constant over the samples")
    with pytest.raises(UsageError, match=r"metric 'variation': output 1 is constant.*output_fn"):
        Evaluator(model, inputs(), "variation")
    model = Told(lambda a, b: (a, torch.zeros_like(b)))
    (note,) = Evaluator(model, inputs(), "output").measure(model).notes()
    assert note.startswith("output 1 is zero on all")
    assert Evaluator(model, inputs(), "output").measure(off(model, "first", 1.1)).value == pytest.approx(0.1)


# Single samples.


def test_loud_samples_do_not_hide_the_errors_of_the_others() -> None:
    """Nine samples of size 1 lose half, one of size 100 loses nothing: pooled that is 1.5 %."""
    lost = torch.tensor([0.25] * 9 + [0.0], dtype=torch.float64)
    figures = Comparison({"output": Measurement(OUTPUT, lost, torch.tensor([1.0] * 9 + [10_000.0]).double())}).figures()
    assert figures["outputs"]["output"]["error"] < 0.016
    assert figures["error_median"] == figures["error_worst"] == figures["error_worst_tenth"] == 0.5


@pytest.mark.parametrize("size", [1, 8])
def test_unchanged_labels_are_counted_whatever_the_batch_size(size: int) -> None:
    model = Told(lambda a, b: a)
    batches = inputs(size, 32 // size)
    other = Told(lambda a, b: a, seed=5)
    found = Evaluator(model, batches, "output").measure(other)
    with torch.no_grad():
        rows = torch.cat([batch.args[0] for batch in batches])
        same = int((model(rows).argmax(dim=1) == other(rows).argmax(dim=1)).sum())
    assert found.same_top1 == (same, 32) and found.figures()["top1_unchanged"] == same / 32
    assert Evaluator(Told(), batches, "output").measure(Told()).same_top1 is None
