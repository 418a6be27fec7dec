"""Groups of samples, such as news and captions: a promise on one is none on another, so it can be asked for in each."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from lowrank.calibration.batches import MIN_VERIFICATION_SAMPLES, Batch, Batches, ForwardFn, sample_count
from lowrank.calibration.binding import signature_of
from lowrank.calibration.evaluation import CACHE_BYTES, Comparison, Evaluator
from lowrank.calibration.measurement import finite_or_none, named
from lowrank.calibration.metrics import METRICS, ErrorMetric, SampledMetric
from lowrank.calibration.outputs import OutputFn
from lowrank.calibration.preparing import prepare_batches
from lowrank.calibration.samples import coarsest_dtype, sample_digests
from lowrank.errors import CalibrationError, UsageError

__all__ = [
    "GroupComparison",
    "GroupEvaluator",
    "check_group_name",
    "evaluator_of",
    "fewest",
    "groups_of",
    "read_samples",
    "refuse_untested",
]

LONGEST_NAME = 60


def read_samples(
    model: nn.Module,
    data: Iterable[Any],
    name: str = "calibration",
    *,
    output_fn: OutputFn | None = None,
    forward_fn: ForwardFn | None = None,
) -> Batches:
    """Read data as :func:`lowrank.calibration.preparing.prepare_batches` does, or ``{group: data}``, each group by itself.

    A mapping given as ``validation`` is groups; one given as ``calibration`` is where it cannot be one batch of keyword arguments.

    Raises:
        CalibrationError: what :func:`prepare_batches` raises, a group that is empty or has no name to speak of, two groups with a
            sample in common, a mapping that looks like one batch of keyword arguments.

    Example:
        >>> import torch
        >>> found = read_samples(nn.Linear(3, 2), {"a": [torch.rand(4, 3)], "b": [torch.rand(5, 3)]}, "validation")
        >>> [(batch.group, batch.size) for batch in found]
        [('a', 4), ('b', 5)]
    """
    called: dict[str, Any] = {"output_fn": output_fn, "forward_fn": forward_fn}
    if not isinstance(data, Mapping) or not _is_groups(model, data, name):
        return prepare_batches(model, data, name, **called)
    found = Batches()
    for group, samples in data.items():
        check_group_name(group, name)
        where = f"{name}, group {group!r}"
        if samples is None or (isinstance(samples, (list, tuple, Mapping)) and not len(samples)):
            raise CalibrationError(f"{where}: is empty; give it samples, or leave it out")
        read = prepare_batches(model, samples, where, **called)
        if name == "validation" and sample_count(read) < MIN_VERIFICATION_SAMPLES:
            raise CalibrationError(
                f"{where}: has {sample_count(read)} samples; each group passes a test of its own, for which at least "
                f"{MIN_VERIFICATION_SAMPLES} are needed, and some hundred make its bound a close one"
            )
        found += [replace(batch, group=group) for batch in read]
        found.notes += read.notes
        found.warnings += read.warnings
    _refuse_common(found, name)
    return found


def _is_groups(model: nn.Module, data: Mapping[Any, Any], name: str) -> bool:
    """Whether a mapping is groups of samples, not one batch of keyword arguments.

    Raises:
        CalibrationError: it is to be groups and looks like such a batch.
    """
    if not data:
        raise CalibrationError(f"{name}: is empty; give it samples, or {{group: samples}}")
    form = signature_of(model)
    arrays = all(isinstance(value, (Tensor, np.ndarray)) for value in data.values())
    if name != "validation":
        return not arrays or (form.keywords is not None and form.keywords.isdisjoint(data))
    taken = [str(key) for key in data if key in (form.keywords or form.names or _parameters(model))]
    if arrays and taken:
        what = f"{', '.join(taken)} {'is an argument' if len(taken) == 1 else 'are arguments'} of the model's forward"
        raise CalibrationError(
            f"{name}: a mapping is {{group: samples}}, and {what}: pass a list of dicts, [{{{taken[0]!r}: …}}], for batches of keyword "
            f"arguments; a group of that name holds a list of batches, {{{taken[0]!r}: [tensor]}}"
        )
    return True


def _parameters(model: nn.Module) -> frozenset[str]:
    """The names that a forward spells out, where it takes any others too."""
    try:
        return frozenset(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        return frozenset()


def check_group_name(group: Any, name: str) -> None:
    """Refuse a name that a command line or a report cannot show.

    Raises:
        CalibrationError: it is no text, empty, too long, or holds "=" or a control character.

    Example:
        >>> check_group_name("news", "validation")
    """
    if not isinstance(group, str) or not group.strip() or len(group) > LONGEST_NAME:
        raise CalibrationError(
            f"{name}: a group's name must be a text of 1 to {LONGEST_NAME} characters such as 'news', got {group!r:.80}"
        )
    if "=" in group or not group.isprintable():
        raise CalibrationError(
            f"{name}: group {group!r}: a name holds no '=' and no control character, since the command line writes NAME=FILE; call it "
            f"{''.join(c if c.isprintable() and c != '=' else '-' for c in group)!r}"
        )


def _refuse_common(batches: Sequence[Batch], name: str) -> None:
    """Refuse a sample that is in two groups: what is said of one of them would be said of the other."""
    floating = coarsest_dtype(batches)
    owners: dict[bytes, tuple[str, int]] = {}
    counts: dict[tuple[str, str], int] = {}
    first: dict[tuple[str, str], tuple[int, int]] = {}
    place: dict[str, int] = {}
    for batch in batches:
        for digest in sample_digests(batch, floating):
            index = place.get(batch.group, 0)
            place[batch.group] = index + 1
            owner, where = owners.setdefault(digest, (batch.group, index))
            if owner != batch.group:
                pair = owner, batch.group
                counts[pair] = counts.get(pair, 0) + 1
                first.setdefault(pair, (where, index))
    if counts:
        (one, other), count = next(iter(counts.items()))
        at, to = first[one, other]
        raise CalibrationError(
            f"{name}: groups {one!r} and {other!r} have {count:,} {'sample' if count == 1 else 'samples'} in common (the first: distinct "
            f"sample {at} of {one!r} is sample {to} of {other!r}); take them out of one of the two"
        )


def refuse_untested(metric: ErrorMetric, validation: object, batches: Sequence[Batch] = ()) -> None:
    """Refuse to promise something of each group by a metric that measures nothing on samples.

    Args:
        metric: of the promise.
        validation: as it was given.
        batches: that were read.

    Raises:
        UsageError: there are groups, and the metric is no :class:`SampledMetric`.

    Example:
        >>> from lowrank.calibration.metrics import OUTPUT
        >>> refuse_untested(OUTPUT, {"news": []})
    """
    if isinstance(metric, SampledMetric) or not (isinstance(validation, Mapping) or set(groups_of(batches)) - {""}):
        return
    choices = ", ".join(name for name, each in METRICS.items() if isinstance(each, SampledMetric))
    raise UsageError(
        f"metric {metric.label!r}: is not measured sample by sample, so that it holds for no group by itself; choose {choices}, or "
        "give the samples without groups"
    )


def groups_of(batches: Sequence[Batch]) -> dict[str, list[Batch]]:
    """Give the batches of each group, in the order of the groups; of samples without any under "".

    Example:
        >>> list(groups_of([Batch((), group="a"), Batch((), group="b"), Batch((), group="a")]))
        ['a', 'b']
    """
    found: dict[str, list[Batch]] = {}
    for batch in batches:
        found.setdefault(batch.group, []).append(batch)
    return found


def fewest(batches: Sequence[Batch]) -> int:
    """Count the samples of the smallest group, whose bound is the widest.

    Example:
        >>> fewest([Batch((), size=4, group="a"), Batch((), size=9, group="b")])
        4
    """
    return min(map(sample_count, groups_of(batches).values()), default=0)


@dataclass(frozen=True)
class GroupComparison(Comparison):
    """The errors of a model in each group of samples; what is said of the whole is said of the worst group.

    As with several outputs each group is tested at 95 % by itself and all must pass (intersection-union, Berger 1982), so that no
    correction for their number is needed: were the budget broken in one group, that group's own test alone would let it through in at
    most 5 % of cases.

    Attributes:
        parts: of every output in every group, by names of both.
        groups: what was measured in each.

    Example:
        >>> import torch
        >>> from lowrank.calibration.metrics import OUTPUT
        >>> from lowrank.calibration.measurement import Measurement
        >>> one = Measurement(OUTPUT, torch.tensor([1.0, 1.1, 0.9]), torch.tensor([100.0, 100.0, 100.0]))
        >>> two = Measurement(OUTPUT, one.numerators * 4, one.denominators)
        >>> both = GroupComparison.of({"news": Comparison({"output": one}), "captions": Comparison({"output": two})})
        >>> both.worst_group, round(both.value, 3), both.passes(0.15)
        ('captions', 0.2, False)
    """

    groups: Mapping[str, Comparison] = field(default_factory=dict)

    @classmethod
    def of(cls, groups: Mapping[str, Comparison]) -> GroupComparison:
        """Put the comparisons of all groups together."""
        parts = {f"{group}: {path}": part for group, each in groups.items() for path, part in each.parts.items()}
        return cls(parts, groups=dict(groups))

    @property
    def worst_group(self) -> str:
        """The group with the largest error."""
        return max(self.groups, key=lambda group: self.groups[group].value)

    def standing(self, budget: float) -> str:
        """Say which groups fail and what each reaches, and which keep the budget."""
        told = {True: [], False: []}  # type: dict[bool, list[str]]
        for group, each in self.groups.items():
            metric = each.parts[each.worst].metric
            value, upper = metric.show_beside(each.value, budget), each.upper()
            text = f"{group!r} ({value}, at most {metric.show_beside(upper, budget)}"
            if len(each.parts) > 1:
                text += f", in {named(each.worst)}"
            told[upper <= budget].append(text + ")")
        failed, kept = told[False], told[True]
        words = []
        if failed:
            words.append(f"{'group' if len(failed) == 1 else 'groups'} {', '.join(failed)} {_verb(failed, 'fail')}")
        if kept:
            words.append(f"{', '.join(kept)} {_verb(kept, 'keep')} it")
        return (
            f" in the worst of {len(self.groups)} groups: {'; '.join(words)}"
            if len(self.groups) > 1
            else (f" in {words[0]}")
        )

    def too_few(self, budget: float) -> str:
        """Say of which groups the samples are too few."""
        told = []
        for group, each in self.groups.items():
            needed = None if each.passes(budget) else each.samples_needed(budget)
            if needed is not None:
                told.append(f"group {group!r} has {each.samples:,} and needs about {needed:,} like them")
            elif not each.passes(budget):
                return ""
        return f"the verification samples are too few, or too unlike, to prove it: {'; '.join(told)}" if told else ""

    def figures(self) -> dict[str, Any]:
        """Give what a report says: the figures of the worst group, what was measured in each, and each output in its worst group."""
        each = {group: comparison.figures() for group, comparison in self.groups.items()}
        found = dict(each[self.worst_group])
        outputs: dict[str, Any] = {}
        for figures in each.values():
            for path, item in figures["outputs"].items():
                if path not in outputs or _larger(item["error"], outputs[path]["error"]):
                    outputs[path] = item
        found["outputs"] = outputs
        found["samples"] = sum(comparison.counted for comparison in self.groups.values())
        found["groups"] = {
            group: {
                "samples": comparison.counted,
                "error": finite_or_none(comparison.value),
                "upper": finite_or_none(comparison.upper()),
                **{key: value for key, value in each[group].items() if key.startswith(("error_", "top1_"))},
                **({"outputs": each[group]["outputs"]} if len(comparison.parts) > 1 else {}),
            }
            for group, comparison in self.groups.items()
        }
        found["worst_group"] = self.worst_group
        return found

    def notes(self) -> list[str]:
        """Say in which group an output is mostly constant."""
        return [f"group {group!r}: {note}" for group, each in self.groups.items() for note in each.notes()]


class GroupEvaluator:
    """The original's outputs on the samples of each group, and the errors of other models against them.

    Args:
        evaluators: by group.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(3, 2))
        >>> batches = [Batch((torch.rand(4, 3),), size=4, group=name) for name in ("a", "b")]
        >>> list(evaluator_of(model, batches, "output").measure(model).groups)
        ['a', 'b']
    """

    def __init__(self, evaluators: Mapping[str, Evaluator]) -> None:
        self.evaluators = dict(evaluators)

    def measure(self, model: nn.Module, *, desc: str | None = None) -> GroupComparison:
        """Run the model on the samples of every group and compare."""
        return GroupComparison.of({group: each.measure(model, desc=desc) for group, each in self.evaluators.items()})


def evaluator_of(
    original: nn.Module, batches: Sequence[Batch], metric: SampledMetric | str, output_fn: OutputFn | None = None
) -> Evaluator | GroupEvaluator:
    """Give what measures errors on these samples: in each of their groups, where they have any.

    Raises:
        UsageError, NumericsError: as :class:`lowrank.calibration.evaluation.Evaluator`.

    Example:
        >>> import torch
        >>> type(evaluator_of(nn.Linear(3, 2), [Batch((torch.rand(4, 3),), size=4)], "output")).__name__
        'Evaluator'
    """
    groups = groups_of(batches)
    if set(groups) <= {""}:
        return Evaluator(original, batches, metric, output_fn)
    share = CACHE_BYTES // len(groups)
    return GroupEvaluator(
        {group: Evaluator(original, own, metric, output_fn, cache_bytes=share) for group, own in groups.items()}
    )


def _verb(subjects: Sequence[str], verb: str) -> str:
    return f"{verb}s" if len(subjects) == 1 else verb


def _larger(one: float | None, other: float | None) -> bool:
    """Whether an error is larger; ``None`` stands for one without bound."""
    return other is not None and (one is None or one > other)
