"""What was measured of one model against another: errors with the confidence that the samples allow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from lowrank.calibration.metrics import SampledMetric
from lowrank.calibration.metrics.variation import CONSTANT
from lowrank.io.numbers import percent

__all__ = ["Comparison", "Measurement", "finite_or_none", "named"]

# Of the squared size of an output: where less than this varies over the samples, the rest hides what is lost.
MOSTLY_CONSTANT = 0.5


def named(path: str) -> str:
    """Name an output for the reader.

    Example:
        >>> named("output"), named("1.score")
        ('the output', 'output 1.score')
    """
    return "the output" if path == "output" else f"output {path}"


@dataclass(frozen=True)
class Measurement:
    """A ratio of sums over samples, and what it says about data not seen.

    Attributes:
        metric: makes a value of the ratio.
        numerators, denominators: (samples,) float64: squared error and squared size, or nats and tokens.

    Example:
        >>> from lowrank.calibration.metrics import OUTPUT
        >>> m = Measurement(OUTPUT, torch.tensor([1.0, 1.1, 0.9]), torch.tensor([100.0, 100.0, 100.0]))
        >>> round(m.value, 3), m.value < m.upper() < 0.12, m.passes(0.12), m.passes(0.1)
        (0.1, True, True, False)
    """

    metric: SampledMetric
    numerators: Tensor
    denominators: Tensor

    @property
    def value(self) -> float:
        """The point estimate."""
        whole = float(self.denominators.sum())
        lost = float(self.numerators.sum())
        if not math.isfinite(lost):
            # Of several outputs the largest is asked for, and NaN is larger than nothing.
            return math.inf
        if whole <= 0.0:
            return 0.0 if lost <= 0.0 else math.inf
        return self._unit(lost / whole)

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Two-sided interval by Fieller's theorem: all ratios e for which mean(dᵢ − e·sᵢ) = 0 is not rejected by a t test."""
        quantile = float(stats.t.ppf((1.0 + confidence) / 2.0, max(len(self.numerators) - 1, 1)))
        low, high = self._fieller(quantile)
        return self._unit(low), self._unit(high)

    def upper(self, confidence: float = 0.95) -> float:
        """One-sided upper bound: the smallest ε whose test mean(dᵢ − ε²sᵢ) ≤ 0 passes; inf where the samples are too few."""
        if len(self.numerators) < 2:
            return math.inf
        quantile = float(stats.t.ppf(confidence, len(self.numerators) - 1))
        return self._unit(self._fieller(quantile)[1])

    def passes(self, budget: float, confidence: float = 0.95) -> bool:
        """Tell whether the one-sided test keeps the budget."""
        return self.upper(confidence) <= budget

    @property
    def ratio(self) -> float:
        """Σ numerators / Σ denominators, at least 0: the scale on which the errors of layers add up."""
        lost, whole = float(self.numerators.sum()), float(self.denominators.sum())
        if not math.isfinite(lost):
            return math.inf
        if whole <= 0.0:
            return 0.0 if lost <= 0.0 else math.inf
        return max(lost / whole, 0.0)

    def samples_needed(self, budget: float, confidence: float = 0.95) -> int | None:
        """Estimate how many samples like these would let the test keep the budget; ``None`` where no number would.

        n ≥ (t · sd(z) / mean(z))² for z = d − ε²s, whose mean must be below 0.
        """
        if not math.isfinite(budget) or len(self.numerators) < 2:
            return None
        z = self.numerators - self.metric.ratio(budget) * self.denominators
        mean, deviation = float(z.mean()), float(z.std())
        if not mean < 0.0 or not math.isfinite(deviation):
            return None
        # Beyond a few samples the t quantile is close to that of 30; a tenth more, since mean and spread are estimates too.
        needed = math.ceil(1.1 * (float(stats.t.ppf(confidence, 30)) * deviation / mean) ** 2)
        return max(needed, len(self.numerators) + 1)

    def per_sample(self) -> Tensor:
        """Give each sample's own error, (samples,) float64; of those that have a size."""
        sized = self.denominators > 0.0
        ratios = (self.numerators[sized] / self.denominators[sized]).clamp_min(0.0)
        return torch.tensor([self._unit(ratio) for ratio in ratios.tolist()], dtype=torch.float64)

    def _unit(self, ratio: float) -> float:
        if not math.isfinite(ratio):
            return ratio
        return self.metric.value(ratio)

    def _fieller(self, quantile: float) -> tuple[float, float]:
        lost, whole = self.numerators, self.denominators
        count = len(lost)
        if not bool(torch.isfinite(lost).all()) or count < 2:
            return -math.inf, math.inf
        mean_lost, mean_whole = float(lost.mean()), float(whole.mean())
        if mean_whole <= 0.0:
            return (0.0, 0.0) if float(lost.abs().sum()) == 0.0 else (-math.inf, math.inf)
        # Scaled by the mean size, so that the quadratic's terms are of one order.
        lost, whole = lost / mean_whole, whole / mean_whole
        centre = mean_lost / mean_whole
        factor = quantile**2 / count
        variance_lost, variance_whole = float(lost.var()), float(whole.var())
        covariance = float(((lost - lost.mean()) * (whole - whole.mean())).sum() / (count - 1))
        a = 1.0 - factor * variance_whole
        b = centre - factor * covariance
        c = centre**2 - factor * variance_lost
        if a <= 0.0:
            return -math.inf, math.inf
        root = math.sqrt(max(b * b - a * c, 0.0))
        return (b - root) / a, (b + root) / a


@dataclass(frozen=True)
class Comparison:
    """The errors of a model in each of its outputs; what is said of the whole is said of the worst.

    A budget holds if it holds for every output. Each is tested at 95 %, and all must pass: an intersection-union test (Berger 1982).
    Were the budget broken in any one output, that output's own test alone would let it through in at most 5 % of cases, and the
    others can only stop more: so no correction for their number is needed, and the largest of the bounds is a 95 % bound on the
    largest error.

    Attributes:
        parts: by the path of the output.
        varying: by the path, the share of the squared size that varies over the samples.
        same_top1: samples whose likeliest class is unchanged, and samples; of models that give one vector of scores a sample.

    Example:
        >>> from lowrank.calibration.metrics import OUTPUT
        >>> one = Measurement(OUTPUT, torch.tensor([1.0, 1.1, 0.9]), torch.tensor([100.0, 100.0, 100.0]))
        >>> both = Comparison({"box": one, "score": Measurement(one.metric, one.numerators * 4, one.denominators)})
        >>> both.worst, round(both.value, 3)
        ('score', 0.2)
    """

    parts: Mapping[str, Measurement]
    varying: Mapping[str, float | None] = field(default_factory=dict)
    same_top1: tuple[int, int] | None = None

    @property
    def worst(self) -> str:
        """The output with the largest error."""
        return max(self.parts, key=lambda path: self.parts[path].value)

    @property
    def value(self) -> float:
        """The largest point estimate."""
        return self.parts[self.worst].value

    @property
    def ratio(self) -> float:
        """The largest ratio."""
        return max(part.ratio for part in self.parts.values())

    @property
    def samples(self) -> int:
        """How many samples the output (and the group) with the fewest was measured on."""
        return min(len(part.numerators) for part in self.parts.values())

    @property
    def counted(self) -> int:
        """How many samples were measured on."""
        return max(len(part.numerators) for part in self.parts.values())

    def upper(self, confidence: float = 0.95) -> float:
        """One-sided upper bound that holds for every output."""
        return max(part.upper(confidence) for part in self.parts.values())

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Two-sided interval of the output with the largest error."""
        return self.parts[self.worst].interval(confidence)

    def passes(self, budget: float, confidence: float = 0.95) -> bool:
        """Tell whether the one-sided test keeps the budget for every output."""
        return self.upper(confidence) <= budget

    def samples_needed(self, budget: float, confidence: float = 0.95) -> int | None:
        """Estimate how many samples like these would settle it for every output; ``None`` where no number would."""
        needed = [
            part.samples_needed(budget, confidence)
            for part in self.parts.values()
            if not part.passes(budget, confidence)
        ]
        return None if None in needed else max((count for count in needed if count is not None), default=None)

    def standing(self, budget: float) -> str:
        """Say, after an error, in which output it is, where there are several; "" where there is one."""
        return f" in {named(self.worst)}, the worst of {len(self.parts)}" if len(self.parts) > 1 else ""

    def too_few(self, budget: float) -> str:
        """Say that the samples are too few to prove that the budget is kept, and how many would do; "" where that is not the reason."""
        needed = None if self.passes(budget) else self.samples_needed(budget)
        if needed is None:
            return ""
        return (
            f"the {self.samples:,} verification samples are too few, or too unlike, to prove that it keeps the budget: about "
            f"{needed:,} like them would settle it (four times as many calibration samples, of which a quarter verifies)"
        )

    def figures(self) -> dict[str, Any]:
        """Give what a report says beside the error and its bound, as plain JSON.

        ``outputs``: the error, bound and varying share of each; ``error_median``, ``error_worst_tenth`` (the 90th percentile) and
        ``error_worst`` of the samples' own errors in the worst output; ``error_of_variation``: the error against what varies, in the
        output where that is largest; ``top1_unchanged``: a share.
        """
        worst = self.parts[self.worst]
        found: dict[str, Any] = {"outputs": {path: self._of(path) for path in self.parts}}
        own = worst.per_sample()
        if len(own) > 1 and bool(torch.isfinite(own).all()):
            found["error_median"] = float(own.quantile(0.5))
            found["error_worst_tenth"] = float(own.quantile(0.9))
            found["error_worst"] = float(own.max())
        against = [
            item["error_of_variation"] for item in found["outputs"].values() if item["error_of_variation"] is not None
        ]
        if against:
            found["error_of_variation"] = max(against)
        if self.same_top1 is not None and self.same_top1[1]:
            found["top1_unchanged"] = self.same_top1[0] / self.same_top1[1]
        return found

    def notes(self) -> list[str]:
        """Say where an output is mostly constant over the samples, which hides what is lost of the rest."""
        told = []
        for path in self.parts:
            item = self._of(path)
            if not float(self.parts[path].denominators.sum()) > 0.0:
                told.append(
                    f"{named(path)} is zero on all verification samples, so that its error says nothing of other inputs"
                )
                continue
            if (
                self.parts[path].metric.name != "output"
                or item["varying"] is None
                or item["varying"] >= MOSTLY_CONSTANT
            ):
                continue
            if item["error_of_variation"] is None:
                told.append(
                    f"{named(path)} is constant over the samples: its error says nothing of what may vary on other inputs"
                )
                continue
            told.append(
                f"{named(path)} is mostly constant over the samples: {percent(item['varying'])} of its squared size varies, and the "
                f'error is {percent(item["error_of_variation"])} of what varies; metric="variation" promises that instead'
            )
        return told

    def _of(self, path: str) -> dict[str, float | None]:
        part, varying = self.parts[path], self.varying.get(path)
        against = None
        if varying is not None and part.metric.name == "output" and math.isfinite(part.value):
            against = part.value / math.sqrt(varying) if varying > CONSTANT else None
        upper = part.upper()
        return {
            "error": finite_or_none(part.value),
            "upper": finite_or_none(upper),
            "varying": varying,
            "error_of_variation": finite_or_none(against),
        }


def finite_or_none(value: float | None) -> float | None:
    """Give a number, or ``None`` for one that JSON has no word for."""
    return value if value is not None and math.isfinite(value) else None
