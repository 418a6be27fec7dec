"""What a training run leaves behind besides the trained tensors: its history as plain data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lowrank.errors import CheckpointError
from lowrank.integrations.matplotlib import draw_history
from lowrank.io import parse_json

__all__ = ["Row", "TrainingResult"]

# Of one step.
Row = dict[str, float | None]


@dataclass
class TrainingResult:
    """The history of a run and its best step.

    Attributes:
        history: a dict a step: ``step`` (counted from 1), ``epoch`` (a fraction), ``loss`` (mean over the step's
            batches), ``learning_rate``, ``gradient_norm`` (before clipping). A step that updated nothing has ``skipped``:
            True and no norm (``None``): float16 overflowed, or none of its labels counts (then ``loss`` is ``None`` too).
        evaluations: a dict an evaluation: ``step`` (0 is before training) and ``value`` of the metric.
        metric: its name.
        best_step: the step whose tensors the model holds now; the last one where nothing was evaluated.
        best_value: the metric there; ``None`` where nothing was evaluated.
        steps: that were run.
        stopped_early: whether patience ran out.
        trainable, total: numbers of parameters.
        directory: where the adapter (or the trained tensors) were saved.
        run: what differs from run to run: seconds.

    Example:
        >>> result = TrainingResult(history=[{"step": 1, "loss": 0.5}], metric="loss", best_step=1, steps=1)
        >>> TrainingResult.from_json(result.to_json()) == result
        True
    """

    history: list[Row] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    metric: str = "loss"
    best_step: int = 0
    best_value: float | None = None
    steps: int = 0
    stopped_early: bool = False
    trainable: int = 0
    total: int = 0
    directory: Path | None = None
    run: dict[str, float] = field(default_factory=dict, compare=False)

    def to_json(self) -> str:
        """Write all but where it was written and how long it took, which differ between equal runs."""
        return json.dumps(
            {key: value for key, value in asdict(self).items() if key not in ("directory", "run")},
            indent=1,
            allow_nan=False,
        )

    @classmethod
    def from_json(cls, text: str, source: str = "history.json") -> TrainingResult:
        """Read what :meth:`to_json` wrote.

        Raises:
            CheckpointError: not JSON, or no such history.
        """
        found: Any = parse_json(text, source=source)
        if not isinstance(found, dict) or not set(found) <= {entry.name for entry in fields(cls)}:
            raise CheckpointError(f"{source}: is no training history")
        return cls(**found)

    def plot(self, kind: str = "png") -> bytes:
        """Draw loss, evaluations and learning rate over the steps as a picture (extra ``plot``).

        Args:
            kind: png, svg or pdf.
        """
        return draw_history(self.history, self.evaluations, self.metric, kind)
