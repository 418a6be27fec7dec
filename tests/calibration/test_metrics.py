"""Laws that hold for every registered metric, and a new one that is there by being registered."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from helpers import assert_same_state
from torch import Tensor, nn

import lowrank
from lowrank.analysis.frontier import default_budgets
from lowrank.calibration.batches import Batch
from lowrank.calibration.evaluation import Evaluator
from lowrank.calibration.gradients import DIRECTIONS
from lowrank.calibration.metrics import (
    METRICS,
    OUTPUT,
    CallableMetric,
    ErrorMetric,
    SampledMetric,
    metric_named,
    recorded_metric,
    register_metric,
    sampled_metric,
    sampled_metrics,
)
from lowrank.calibration.metrics.sums import count_kept, per_sample, position_mask
from lowrank.calibration.metrics.variation import Centre
from lowrank.compression.options import Options, check_budgets, metric_choices, metric_of
from lowrank.errors import UsageError

ALL = [*METRICS.values(), CallableMetric(lambda model: 1.0)]
SAMPLED = list(sampled_metrics().values())
NAMES = [metric.name for metric in ALL]


def tokens(generator: torch.Generator | None = None) -> Batch:
    """Three texts of five tokens out of seven, two of them padded."""
    generator = generator or torch.Generator().manual_seed(3)
    mask = torch.ones(3, 5, dtype=torch.int64)
    mask[0, 3:] = 0
    mask[2, 1:] = 0
    ids = torch.randint(0, 7, (3, 5), generator=generator)
    return Batch((), {"input_ids": ids, "attention_mask": mask}, 3)


def logits(seed: int) -> Tensor:
    return torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(seed))


def test_names_and_titles_are_unique_and_auto_is_nobodys() -> None:
    assert list(METRICS) == [metric.name for metric in METRICS.values()]
    assert list(METRICS)[:4] == ["output", "weight", "kl", "perplexity"]
    assert len({metric.title for metric in METRICS.values()}) == len(METRICS)
    assert len({metric.figure for metric in SAMPLED}) == len(SAMPLED)
    assert metric_choices()[:5] == ("auto", "weight", "output", "kl", "perplexity")
    with pytest.raises(UsageError, match="metric 'output': the name is taken by <OutputMetric 'output'>"):
        register_metric(OUTPUT)
    with pytest.raises(UsageError, match=r"must be one of output, weight, kl, perplexity.*, got 'accuracy'"):
        metric_named("accuracy")
    with pytest.raises(UsageError, match=r"metric: must be one of output, kl, perplexity.* here, got 'weight'"):
        Evaluator(nn.Linear(1, 1), [], "weight")


@pytest.mark.parametrize("metric", ALL, ids=NAMES)
def test_value_and_ratio_undo_each_other_and_grow(metric: ErrorMetric) -> None:
    values = [0.0, 1e-12, 1e-4, 0.01, 0.3, 1.0, 7.0, 1e6]
    for value in values:
        assert metric.value(metric.ratio(value)) == pytest.approx(value, rel=4e-16, abs=0.0)
    ratios = [metric.ratio(value) for value in values]
    assert ratios == sorted(ratios) and ratios[0] == 0.0 == metric.value(0.0)
    assert metric.ratio(math.inf) == math.inf == metric.value(math.inf)


@pytest.mark.parametrize("metric", ALL, ids=NAMES)
def test_what_a_metric_says_of_itself_fits_together(metric: ErrorMetric) -> None:
    low, high = metric.usual
    assert 0.0 < low < high and (high <= 1.0 or not metric.relative)
    assert metric.gradients is None or metric.gradients in DIRECTIONS
    assert isinstance(metric.probe, SampledMetric) and metric.probe.probe is metric.probe
    assert metric.show(0.0213).strip() and "0.0213" not in repr(metric)
    assert not (metric.needs_data and metric.weights_only)
    assert metric.needs_data == isinstance(metric, SampledMetric)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS.keys())
def test_budgets_span_the_usual_range_and_a_relative_one_is_at_most_everything(metric: ErrorMetric) -> None:
    budgets = default_budgets(metric.name)
    assert (budgets[0], budgets[-1]) == metric.usual
    refused = pytest.raises(UsageError, match="at most 1 for a relative error") if metric.relative else nullcontext()
    with refused:
        check_budgets(1.5, None, metric.name)


@pytest.mark.parametrize("metric", SAMPLED, ids=[metric.name for metric in SAMPLED])
def test_terms_are_zero_for_the_same_output_and_blind_to_padding(metric: SampledMetric) -> None:
    batch, reference, other = tokens(), logits(0), logits(1)
    metric.check(reference, batch)
    centre = Centre()
    centre.add(reference, batch)
    metric = metric.fitted(centre)
    assert metric.applies(reference, batch)
    lost, whole = metric.terms(reference, reference.clone(), batch)
    assert lost.shape == whole.shape == (3,) and lost.dtype == whole.dtype == torch.float64
    assert float(lost.abs().max()) == 0.0 and float(whole.min()) >= 0.0
    expected = metric.terms(reference, other, batch)
    assert float(expected[0].abs().sum()) > 0.0
    padding = batch.kwargs["attention_mask"] == 0
    noisy, noisier = reference.clone(), other.clone()
    noisy[padding], noisier[padding] = 1e3, -1e3
    for found, wanted in zip(metric.terms(noisy, noisier, batch), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0.0)
    # A sample counts alike alone and among others.
    for index in range(3):
        rows = slice(index, index + 1)
        alone = metric.terms(reference[rows], other[rows], batch.select(torch.tensor([index])))
        for found, wanted in zip(alone, expected, strict=True):
            torch.testing.assert_close(found, wanted[rows], rtol=1e-12, atol=0.0)


@pytest.mark.parametrize(("name", "order"), [("output", 2), ("kl", 2), ("perplexity", 1)])
def test_a_doubled_error_grows_as_the_unit_says(name: str, order: int) -> None:
    """A value that is the root of its ratio doubles with the error; a divergence is of second order, a likelihood of first."""
    metric = sampled_metric(name)
    batch, reference = tokens(), logits(0).double()
    step = 1e-6 * logits(2).double()

    def ratio(output: Tensor) -> float:
        lost, whole = metric.terms(reference, output, batch)
        return float(lost.sum() / whole.sum())

    assert ratio(reference + 2 * step) / ratio(reference + step) == pytest.approx(2.0**order, rel=1e-2)


def test_outputs_that_do_not_fit_are_refused() -> None:
    batch = tokens()
    with pytest.raises(UsageError, match=r"metric 'kl': needs logits .* has shape \(3,\)"):
        metric_named("kl").check(torch.zeros(3), batch)
    for output, inputs in ((torch.zeros(3, 7), batch), (torch.zeros(3, 5, 7), Batch((torch.zeros(3, 5),), size=3))):
        with pytest.raises(UsageError, match="metric 'perplexity': needs a causal language model"):
            metric_named("perplexity").check(output, inputs)
        assert not metric_named("perplexity").applies(output, inputs)
    OUTPUT.check(torch.zeros(3), batch)


def test_a_callable_is_a_metric_like_the_others() -> None:
    def accuracy(model: nn.Module) -> float:
        return float(model.weight.sum())

    metric = metric_of(accuracy, calibrated=True, higher_is_better=True)
    assert isinstance(metric, CallableMetric)
    assert (metric.name, metric.label, metric.title) == ("callable", "accuracy", "relative loss of accuracy")
    assert recorded_metric("accuracy").title == metric.title and recorded_metric("kl") is METRICS["kl"]
    one, better = nn.Linear(1, 1), nn.Linear(1, 1)
    with torch.no_grad():
        one.weight.fill_(2.0)
        better.weight.fill_(3.0)
    assert metric.loss_against(one)(better) == 0.0
    assert CallableMetric(accuracy).loss_against(one)(better) == 0.5
    with torch.no_grad():
        better.weight.fill_(math.nan)
        one.weight.zero_()
    assert CallableMetric(lambda model: 1.0 if model is one else math.nan).loss_against(one)(better) == math.inf
    with pytest.raises(UsageError, match=r"the callable gives 0\.0 for the original"):
        metric.loss_against(one)
    assert Options(metric=accuracy).contribution(0.5) == 0.25 and Options(metric=accuracy).value(0.25) == 0.5


# ---- a metric that nobody but this file knows


class Top1Disagreement(SampledMetric):
    """The share of samples whose likeliest class changed."""

    name = "top-1 disagreement"
    title = "top-1 disagreement"
    relative = True
    usual = (0.001, 0.2)
    needs_logits = True

    @property
    def probe(self) -> SampledMetric:
        # It answers in jumps.
        return OUTPUT

    def terms(self, reference: Tensor, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        changed = (reference.argmax(dim=-1) != output.argmax(dim=-1)).to(torch.float64)
        counted = count_kept(position_mask(reference, batch), changed)
        return per_sample(changed * counted, batch), per_sample(counted, batch)

    def value(self, ratio: float) -> float:
        return ratio

    def ratio(self, value: float) -> float:
        return value


@pytest.fixture
def registered() -> Iterator[SampledMetric]:
    metric = Top1Disagreement()
    register_metric(metric)
    try:
        yield metric
    finally:
        del METRICS[metric.name]


def test_a_metric_is_reachable_by_being_registered(registered: SampledMetric) -> None:
    class Classes(nn.Sequential):
        def forward(self, x: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=super().forward(x))

    model = Classes(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 6)).eval()
    inputs = [torch.randn(128, 32, generator=torch.Generator().manual_seed(index)) for index in range(4)]
    result = lowrank.compress_model(
        model, error_budget=0.1, metric=registered.name, calibration=inputs, formats=("int8",), progress=False
    )
    totals = result.report.totals
    assert totals["metric"] == registered.name == result.plan.metadata["metric"]
    assert totals["error_upper"] <= 0.1 and totals["size_ratio"] < 0.5
    assert "top-1 disagreement" in result.report.summary()[0] and " % measured" in result.report.summary()[0]
    assert "Top-1 disagreement" in result.report.to_html() and "error, %" in result.report.to_html()
    again = lowrank.apply_plan(model, result.plan, inputs).state_dict()
    assert_same_state(result.model, again)
    found = lowrank.compare_models(model, result.model, [Batch((rows,), size=128) for rows in inputs])
    assert found[registered.name]["value"] == pytest.approx(1.0 - found["top1_agreement"]["value"])

    assert metric_choices()[-1] == registered.name
    assert default_budgets(registered.name, 2) == (0.001, 0.2)
    report = lowrank.measure_frontier(
        model, calibration=inputs, budgets=[0.1], metric=registered.name, formats=("int8",), progress=False
    )
    assert "top-1 disagreement against size" in report.summary()[0]
    with pytest.raises(UsageError, match=r"perplexity.*, top-1 disagreement or a callable"):
        lowrank.compress_model(model, error_budget=0.1, metric="accuracy", calibration=inputs)


def test_it_is_gone_again() -> None:
    assert Top1Disagreement.name not in METRICS


def test_the_command_line_offers_what_is_registered() -> None:
    from lowrank.cli.app import app

    shown = CliRunner().invoke(app, ["compress", "--help"]).output
    assert "|".join(metric_choices()) in "".join(shown.split())
