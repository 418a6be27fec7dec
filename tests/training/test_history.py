"""The history of a run: plain data, drawn as a picture, read back or refused."""

from __future__ import annotations

import pytest
from training_batches import batches, classifier

from lowrank.errors import CheckpointError, UsageError
from lowrank.integrations.matplotlib import draw_history
from lowrank.training import TrainingResult, finetune


def test_a_history_that_is_none_is_refused() -> None:
    with pytest.raises(CheckpointError, match="history"):
        TrainingResult.from_json('{"no_such_field": 1}')
    with pytest.raises(CheckpointError, match="history"):
        TrainingResult.from_json("3")


def test_the_history_is_plain_data_and_can_be_drawn() -> None:
    pytest.importorskip("matplotlib")
    result = finetune(
        classifier(), batches(), batches(seed=1), steps=4, evaluate_every=2, metric="accuracy", progress=False
    )
    assert TrainingResult.from_json(result.to_json()) == result
    assert [row["step"] for row in result.evaluations] == [0, 2, 4]
    assert result.plot("svg").startswith(b"<?xml") and result.plot("svg") == result.plot("svg")
    with pytest.raises(UsageError, match="png, svg or pdf"):
        result.plot("gif")


@pytest.mark.parametrize("validation", [False, True])
@pytest.mark.parametrize("metric", ["loss", "output error"])
@pytest.mark.parametrize("rates", [False, True])
def test_a_plot_shows_and_names_every_series(validation: bool, metric: str, rates: bool) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    history = [{"step": step, "loss": 1 / step} | ({"learning_rate": 0.1} if rates else {}) for step in (1, 2, 3)]
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        text = draw_history(history, [{"step": 0, "value": 2.0}] if validation else [], metric, "svg").decode()
    assert "training loss" in text
    assert (f"validation {metric}" in text) is validation
    assert ("Learning rate" in text) is rates
    assert ">2<" in text and ">1.5<" not in text  # there is no half step
