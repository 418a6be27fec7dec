"""From predictions to a plan whose promise was tested: calibrate on the search part, then verify from safe to small."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from tqdm import tqdm

from lowrank.compression.healed_plans import heal_plan, healed_plans
from lowrank.compression.passes import Passes
from lowrank.compression.plan import Plan, same_specs
from lowrank.compression.sequence import before_the_knee, is_dear, neighbours_of, safe_to_small, size_of
from lowrank.compression.trial import ErrorMeasure, Healer, Outcome, Reading, Trial, corrected
from lowrank.compression.working_copy import WorkingCopy
from lowrank.errors import BudgetError
from lowrank.reporting.text import beside, counted, rounded_up

__all__ = ["Search", "Step"]

# Fractions of the calibrated budget at which plans are made, those near it first: with each the predictions get better. The small ones
# are there for the day when predictions are far off or samples so few that the test's margin is wide.
FRACTIONS = (1.0, 0.95, 0.88, 0.75, 0.5, 0.25, 1.04)
# Fractions at which plans are made beside these where what is within the budget seems hardly smaller.
TIMID_FRACTIONS = (0.1, 0.05, 0.03, 0.01)
# A plan this near to one that was measured, in error, tells nothing new.
ALIKE = 0.015
# End-to-end measurements that calibrate the predictions; seen to settle within 3 on MiniLM and small GPT and Llama models.
CALIBRATION_ROUNDS = 4
CALIBRATION_TOLERANCE = 0.02
# Doublings of the predicted error that is let through while everything is predicted to be over the budget.
WIDENING_ROUNDS = 12
# Where a plan broke the model, or nothing was predicted to fit, predictions are off by more than measuring can tell.
FAR_OFF = 4.0
# Uniform plans that are measured, boldest first, as long as one may be within the target though it is predicted so far beyond it.
UNIFORM_STEPS = 6
UNIFORM_REACH = 1.3
# Gaps between trials near the target that are filled, by measuring at most so many plans more.
GAP_WIDTH = 1.06
GAP_STEPS = 4
# How far beyond the predicted end of the budget plans are tried where all turned out too timid.
REACH_FACTOR = 1.6
REACH_STEPS = 5
# Trials whose bound on the search part is below this share of the budget will pass; only the smallest of them is verified.
SURE_SHARE = 0.6
# Times a plan for a size budget is made anew with what was measured.
SIZE_ROUNDS = 3
# Layers whose reason an error names.
MOST_REASONS = 8


class Step(NamedTuple):
    """One round of :meth:`Search.approach`: the plan, what was measured of it (``None`` where it changes nothing), and the scale before."""

    plan: Plan
    reading: Reading | None
    scale: float


@dataclass
class Search:
    """Hold what a search for plans needs, and remember what was tried.

    Attributes:
        copy: into which plans are installed.
        plan_for: the best plan whose *predicted* contributions sum to at most this.
        measure: the error on the search part.
        verify: the error on the verification part, from which no plan is made.
        total: from a value of the metric to the unit in which predicted contributions add up.
        verify_samples: how many samples ``verify`` measures on; 0 where that means nothing.
        foreseen: the search part holds samples of every group that is verified, so that what is far within the budget there will pass.
        heal: trains the model of a plan; healed models are tried too. It may see neither part that is measured on.
        progress: bars on standard error.
        reasons: from the scale to why each layer would stay dense, for the error that says so.
        target: the error on the search part to aim at.
        scale: measured over predicted contributions, as far as is known.
        trials: every plan that was measured and is worth choosing from.
        predicted: contributions of a plan by what is known so far.
        learn: takes in a plan, what it was measured to cost and what plans are wanted for (in contributions): :attr:`plan_for` and
            :attr:`predicted` then know better. ``None``: they never do.
        passes: counted here; no more plans are measured than it allows.
        rest_bytes: of the file beside the targets.
        smallest: take what is smallest, whatever a step costs.
    """

    copy: WorkingCopy
    plan_for: Callable[[float], Plan]
    measure: ErrorMeasure
    verify: ErrorMeasure
    total: Callable[[float], float]
    verify_samples: int = 0
    foreseen: bool = True
    heal: Healer | None = None
    progress: bool = False
    reasons: Callable[[float], Mapping[str, str]] = lambda scale: {}
    target: float = math.inf
    scale: float = 1.0
    trials: list[Trial] = field(default_factory=list)
    predicted: Callable[[Plan], float] = lambda plan: plan.error
    learn: Callable[[Plan, float, float], None] | None = None
    passes: Passes = field(default_factory=Passes)
    rest_bytes: int = 0
    smallest: bool = False

    def attempt(self, label: str, plan: Plan) -> Trial:
        """Install a plan and measure it on the search part; a plan that was measured is not measured again."""
        known = next((item for item in self.trials if same_specs(item.plan, plan)), None)
        if known is not None:
            return known
        foreseen = self.predicted(plan)
        self.passes.add("trials")
        trial = Trial(label, plan, self.measure(self.copy.install_plan(plan)), predicted=foreseen)
        if self.learn is not None and math.isfinite(trial.searched.value):
            self.learn(plan, self.total(trial.searched.value), self.total(self.target))
        return trial

    def _try(self, label: str, plan: Plan) -> Trial | None:
        """Measure a plan and keep it among the trials; ``None`` where it changes nothing, or nothing may be measured any more."""
        if not self.passes.left or not any(entry.compressed for entry in plan.entries):
            return None
        trial = self.attempt(label, plan)
        if trial not in self.trials:
            self.trials.append(trial)
        return trial

    def approach(self, rounds: int) -> Iterator[Step]:
        """Make the plan that should reach :attr:`target`, measure it, correct :attr:`scale` by what came out, and go on.

        Ends after so many measurements, or where the corrected plan is the one that was just measured.

        Args:
            rounds: measurements at most.
        """
        last: Plan | None = None
        measured = 0
        rounds = min(rounds, self.passes.left)
        for _ in range(rounds + WIDENING_ROUNDS):
            plan, before = self.plan_for(self.total(self.target) / self.scale), self.scale
            if plan.error <= 0.0:
                # Nothing is predicted to fit; the predictions may be too high.
                self.scale /= FAR_OFF
                yield Step(plan, None, before)
                continue
            if measured == rounds or (last is not None and same_specs(plan, last)):
                return
            last, measured = plan, measured + 1
            trial = self._try(f"towards the budget, step {measured}", plan)
            if trial is None:
                return
            reading = trial.searched
            if not math.isfinite(reading.value):
                # A plan that breaks the model says nothing about the scale but that it is far too bold.
                self.scale *= FAR_OFF
            elif reading.value <= 0.0:
                self.scale /= FAR_OFF
            else:
                self.scale = corrected(self.predicted(plan), reading, self.scale, self.total)
            yield Step(plan, reading, before)

    def keep_error_budget(self, budget: float, uniform: Sequence[tuple[str, Plan]]) -> Outcome:
        """Find the smallest plan whose verification bound is within the budget.

        The order of the trials is fixed by the search part alone, from the smallest error to the smallest size, and verification stops
        at the first that fails: so testing several plans leaves the 95 % of the test intact (fixed-sequence testing, Maurer, Hothorn and
        Lehmacher 1995).

        Args:
            budget: in the metric's unit.
            uniform: named plans that are always among the trials.

        Raises:
            BudgetError: not even the safest trial passed, or nothing can be compressed.
        """
        self.target = budget
        for label, plan in uniform[:2]:
            self._try(label, plan)
        tried = self._calibrate(budget)
        self._uniform(uniform[2:])
        for label, plan in self._by_fractions():
            if not self._is_told(plan):
                self._try(label, plan)
        if not self.trials and tried is not None:
            # So that the refusal can say what the mildest compression costs.
            self.trials = [self.attempt("the mildest plan tried", tried)]
        self._reach()
        self._fill_gaps()
        if not self.smallest:
            self._timid()
        if self.heal is not None:
            self.trials += healed_plans(self)
        if not self.trials:
            raise BudgetError(
                f"error budget {budget:g}: nothing could be compressed within it; every layer stays dense{self._why()}",
                plan=None,
                error=0.0,
            )
        passed = self._verify(budget)
        self.copy.install_plan(passed.plan)
        return Outcome(passed, self.scale, self.trials, neighbours=neighbours_of(passed, self.trials))

    def _by_fractions(self) -> Iterator[tuple[str, Plan]]:
        """Make the plans of the fractions; of a small one there may be none, where overrides force an error."""
        refused: BudgetError | None = None
        made = False
        for fraction in FRACTIONS:
            try:
                named = self._at(fraction)
            except BudgetError as error:
                refused = error
            else:
                made = True
                yield named
        if refused is not None and not made:
            raise refused

    def _at(self, fraction: float) -> tuple[str, Plan]:
        """Make and name the plan that should err by a fraction of the target."""
        return f"{fraction:.0%} of the budget", self.plan_for(self.total(self.target * fraction) / self.scale)

    def least_error(self, plans: Iterable[tuple[str, Plan]]) -> Outcome:
        """Find the plan with the smallest error on the search part, and measure it on the verification part; the best is healed.

        Args:
            plans: that keep the size budget; where predictions learn, more are made with what these tell.
        """

        def value(trial: Trial) -> tuple[float, int]:
            return trial.searched.value, trial.plan.bytes

        for label, plan in plans:
            trial = self.attempt(label, plan)
            self.trials += [] if trial in self.trials else [trial]
        for step in range(SIZE_ROUNDS if self.learn is not None else 0):
            trial = self.attempt(f"size budget, step {step + 2}", self.plan_for(math.inf))
            if trial in self.trials:
                break
            self.trials.append(trial)
        if self.heal is not None:
            healed = heal_plan(self.copy, min(self.trials, key=value).plan, self.measure, self.heal)
            self.trials += [] if healed is None else [healed]
        chosen = min(self.trials, key=value)
        self.copy.install_plan(chosen.plan)
        chosen.verified = self.verify(chosen.model(self.copy))
        foreseen = self.predicted(chosen.plan)
        self.scale = self.total(chosen.searched.value) / foreseen if foreseen > 0.0 else 1.0
        return Outcome(chosen, self.scale, self.trials)

    def _calibrate(self, budget: float) -> Plan | None:
        """Find the scale, and the error to aim at: where the verification bound is expected to touch the budget. Gives the last plan."""
        self.target, last = budget, None
        for step in self.approach(CALIBRATION_ROUNDS):
            reading = step.reading
            if reading is None:
                continue
            last = step.plan
            if not 0.0 < reading.value < math.inf:
                continue
            margin = reading.upper / reading.value - 1.0 if math.isfinite(reading.upper) else 1.0
            if self.verify_samples and reading.samples:
                margin *= math.sqrt(reading.samples / self.verify_samples)
            self.target = budget / (1.0 + margin)
            if abs(math.log(reading.value / self.target)) < CALIBRATION_TOLERANCE:
                break
        return last

    def _uniform(self, plans: Iterable[tuple[str, Plan]]) -> None:
        """Measure those that may be smaller than anything within the target, and within it: the boldest first."""
        waiting = list(plans)
        for _ in range(UNIFORM_STEPS):
            within = [size_of(item.plan) for item in self.trials if item.searched.value <= self.target]
            offered = [
                (label, plan)
                for label, plan in waiting
                if self.predicted(plan) <= self.total(UNIFORM_REACH * self.target)
                and not (within and size_of(plan) >= min(within))
            ]
            if not offered:
                return
            label, plan = min(offered, key=lambda each: size_of(each[1]))
            waiting.remove((label, plan))
            self._try(label, plan)

    def _is_told(self, plan: Plan) -> bool:
        """Whether a plan that was measured is as large and errs as much, as far as can be foreseen."""
        foreseen = self.predicted(plan)
        if not foreseen > 0.0:
            return False
        near = [
            item
            for item in self.trials
            if abs(item.plan.bytes / max(plan.bytes, 1) - 1.0) < ALIKE / 5
            and abs(math.log(max(self.predicted(item.plan), 1e-300) / foreseen)) < 2.0 * ALIKE
        ]
        return bool(near)

    def _verify(self, budget: float) -> Trial:
        """Test the trials from the safest to the smallest, and give the last that passes before the first that fails."""
        sequence = safe_to_small(self.trials)
        if not self.smallest:
            sequence = before_the_knee(sequence, budget, self.rest_bytes)
        sure = [item for item in sequence if self.foreseen and item.searched.upper <= SURE_SHARE * budget]
        sequence = sequence[max(len(sure) - 1, 0) :]
        passed: Trial | None = None
        for trial in tqdm(sequence, desc="verifying plans", delay=2, disable=not self.progress):
            trial.verified = self.verify(trial.model(self.copy))
            if not trial.verified.upper <= budget:
                break
            passed = trial
        if passed is not None:
            return passed
        raise self._refusal(sequence[0], budget)

    def _refusal(self, first: Trial, budget: float) -> BudgetError:
        """Say what the safest plan reaches, and what would help: a larger budget, or so many samples."""
        assert first.verified is not None
        value, upper = first.verified.value, first.verified.upper
        bound = f", at most {beside(upper, budget)} with 95 % confidence" if math.isfinite(upper) else ""
        text = (
            f"error budget {budget:g}: cannot be met; the safest plan that compresses anything ({first.label}, "
            f"{first.plan.bytes:,} bytes in the targets) reaches {beside(value, budget)}{bound}"
        )
        comparison = first.verified.comparison
        if comparison is not None:
            text += comparison.standing(budget) + "".join(f"; {note}" for note in comparison.notes())
        few = "" if comparison is None else comparison.too_few(budget)
        if few:
            text += f"; {few}"
        elif not math.isfinite(upper) and value <= budget:
            text += "; the verification samples are too few, or too unlike each other, to bound it: give more samples"
        elif math.isfinite(value):
            reached = rounded_up(upper if math.isfinite(upper) else value)
            text += f"; raise the budget to {reached}, or leave layers out with ignore"
        else:
            text += "; no budget allows that: leave layers out with ignore, or choose with output_fn what is measured"
        # By what was just measured: where nothing was predicted to fit, the scale was let go far below it.
        self.scale = corrected(self.predicted(first.plan), first.verified, self.scale, self.total)
        return BudgetError(text + self._why(), plan=first.plan, error=upper)

    def _why(self) -> str:
        """What keeps each layer dense, for an error."""
        reasons = self.reasons(self.scale)
        listed = [f"{name}: {reason}" for name, reason in list(reasons.items())[:MOST_REASONS]]
        more = [f"and {counted(len(reasons) - MOST_REASONS, 'more layer')}"] if len(reasons) > MOST_REASONS else []
        return f" ({'; '.join([*listed, *more])})" if listed else ""

    def _reach(self) -> None:
        """Bolder and bolder plans, where predictions were too high, until one lies beyond the target or nothing smaller is left."""
        if not self.trials:
            return
        boldest = min(self.trials, key=lambda item: size_of(item.plan))
        allowed = self.predicted(boldest.plan)
        for step in range(REACH_STEPS):
            if not boldest.searched.value < self.target:
                return
            allowed *= REACH_FACTOR
            plan = self.plan_for(allowed)
            if plan.error > 0.0 and size_of(plan) < size_of(boldest.plan):
                bolder = self._try(f"bolder, step {step + 1}", plan)
                if bolder is None:
                    return
                boldest = bolder

    def _timid(self) -> None:
        """Plans that err far less and are predicted to be hardly larger than the smallest within the target."""
        for fraction in TIMID_FRACTIONS:
            within = [item for item in self.trials if item.searched.value <= self.target]
            if not within:
                return
            smallest = min(within, key=lambda item: size_of(item.plan))
            errors = fraction * self.target, smallest.searched.value
            with contextlib.suppress(BudgetError):
                # Overrides may force an error that no plan of so small a one can have.
                label, plan = self._at(fraction)
                if is_dear(errors, self.target, plan, smallest.plan, self.rest_bytes) and not self._is_told(plan):
                    self._try(label, plan)

    def _fill_gaps(self) -> None:
        """Bisect the widest gaps between trials near the target: where predictions are off, their steps are uneven."""
        closed: set[tuple[float, float]] = set()
        for step in range(GAP_STEPS):
            near = sorted(
                (item for item in self.trials if 0.75 * self.target <= item.searched.value <= 1.1 * self.target),
                key=lambda item: item.searched.value,
            )
            gaps = [
                (above.searched.value / below.searched.value, below, above)
                for below, above in pairwise(near)
                if (below.searched.value, above.searched.value) not in closed
            ]
            width, below, above = max(gaps, key=lambda gap: gap[0], default=(0.0, None, None))
            if below is None or above is None or width <= GAP_WIDTH or not self.passes.left:
                return
            plan = self.plan_for(math.sqrt(self.predicted(below.plan) * self.predicted(above.plan)))
            closed.add((below.searched.value, above.searched.value))
            self._try(f"between, step {step + 1}", plan)
