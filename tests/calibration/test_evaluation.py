"""Measured errors against dense references, and bounds that hold as often as they say."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank.calibration.batches import Batch
from lowrank.calibration.evaluation import Evaluator, Measurement, compare_models
from lowrank.calibration.metrics import KL, OUTPUT
from lowrank.errors import NumericsError, UsageError


class Causal(nn.Module):
    """Embedding and head, with the calling convention of transformers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return SimpleNamespace(logits=self.head(self.embed(input_ids)))


def _batch() -> Batch:
    ids = torch.randint(0, 11, (5, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(5, 7, dtype=torch.int64)
    mask[0, 4:] = 0
    mask[3, 2:] = 0
    return Batch((), {"input_ids": ids, "attention_mask": mask}, 5)


def test_output_error_leaves_padding_out() -> None:
    one, other, batch = Causal(0), Causal(1), _batch()
    keep = batch.kwargs["attention_mask"].bool()
    with torch.no_grad():
        reference, output = (batch.run(model).logits.double()[keep] for model in (one, other))
    expected = float((output - reference).norm() / reference.norm())
    assert math.isclose(Evaluator(one, [batch], "output").measure(other).value, expected, rel_tol=1e-12)


def test_kl_and_perplexity_equal_the_dense_reference() -> None:
    one, other, batch = Causal(0), Causal(1), _batch()
    keep = batch.kwargs["attention_mask"].bool()
    with torch.no_grad():
        p, q = (F.log_softmax(batch.run(model).logits.double(), dim=-1) for model in (one, other))
    kl = float((p.exp() * (p - q)).sum(dim=-1)[keep].mean())
    assert math.isclose(Evaluator(one, [batch], "kl").measure(other).value, kl, rel_tol=1e-12)
    targets = batch.kwargs["input_ids"][:, 1:, None]
    nll = [-(logp[:, :-1].gather(-1, targets)[..., 0][keep[:, 1:]].mean()) for logp in (p, q)]
    expected = float(torch.exp(nll[1] - nll[0])) - 1.0
    assert math.isclose(Evaluator(one, [batch], "perplexity").measure(other).value, expected, rel_tol=1e-9)
    found = compare_models(one, other, [batch])
    assert math.isclose(found["perplexity_original"]["value"], float(torch.exp(nll[0])), rel_tol=1e-12)
    agreement = float((p.argmax(-1) == q.argmax(-1))[keep].double().mean())
    assert math.isclose(found["top1_agreement"]["value"], agreement, rel_tol=1e-12)
    for name in ("output_error", "kl", "perplexity_increase", "top1_agreement"):
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"]


def test_a_model_against_itself_is_without_error() -> None:
    model = Causal(0)
    for metric in ("output", "kl", "perplexity"):
        measured = Evaluator(model, [_batch()], metric).measure(model)
        assert measured.value == 0.0 == measured.upper()


def test_outputs_over_the_cache_limit_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cached = Evaluator(Causal(0), [_batch()], "output").measure(Causal(1)).value
    monkeypatch.setattr("lowrank.calibration.evaluation.CACHE_BYTES", 0)
    assert Evaluator(Causal(0), [_batch()], "output").measure(Causal(1)).value == cached


@pytest.mark.parametrize("metric", ["kl", "perplexity"])
def test_metrics_that_do_not_fit_are_refused(metric: str) -> None:
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum(dim=1)

    with pytest.raises(UsageError, match=metric):
        Evaluator(Flat(), [Batch((torch.randn(4, 3),), size=4)], metric)


def test_an_original_with_nan_outputs_is_refused_and_a_compressed_one_fails_its_test() -> None:
    good, bad, batch = Causal(0), Causal(0), _batch()
    with torch.no_grad():
        bad.head.bias[0] = float("nan")
    with pytest.raises(NumericsError, match="NaN"):
        Evaluator(bad, [batch], "output")
    measured = Evaluator(good, [batch], "output").measure(bad)
    assert not measured.passes(1e9)
    assert math.isnan(measured.value) or measured.value == math.inf


def test_the_upper_bound_holds_in_about_95_of_100_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(600):
        size = 50.0 + 10.0 * torch.rand(40, generator=generator, dtype=torch.float64)
        lost = 0.01 * size * -torch.log(torch.rand(40, generator=generator, dtype=torch.float64))  # exponential: skewed
        held += Measurement(OUTPUT, lost, size).upper() >= 0.1
    # Skewed losses cost a t test a little of its level; 600 draws have a standard error of 0.9 %.
    assert 0.90 <= held / 600 <= 0.985


def test_the_bound_is_the_smallest_budget_that_passes_the_test() -> None:
    lost = torch.tensor([1.0, 2.0, 1.5, 0.5, 1.2], dtype=torch.float64)
    size = torch.tensor([100.0, 140.0, 90.0, 80.0, 110.0], dtype=torch.float64)
    bound = Measurement(KL, lost, size).upper()
    from scipy import stats

    def statistic(budget: float) -> float:
        difference = lost - budget * size
        return float(difference.mean() / (difference.std() / math.sqrt(5)))

    assert math.isclose(statistic(bound), float(stats.t.ppf(0.05, 4)), rel_tol=1e-9)


def test_too_few_samples_bound_nothing() -> None:
    assert Measurement(OUTPUT, torch.tensor([1.0]), torch.tensor([4.0])).upper() == math.inf
    wild = Measurement(OUTPUT, torch.tensor([1.0, 0.0]), torch.tensor([1e-6, 1e6]))
    assert wild.upper() == math.inf
