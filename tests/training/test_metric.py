"""A metric of the caller's own: called as it is, its value checked, its errors left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_batches import batches, classifier, normed

from lowrank.errors import UsageError
from lowrank.training import finetune


def test_a_metric_with_state_is_not_copied(tmp_path: Path) -> None:
    class Metric:
        def __call__(self, model: nn.Module) -> float:
            return 0.0

        def __deepcopy__(self, memo: object) -> object:
            raise AssertionError("copied")

    result = finetune(normed(), batches(), steps=1, metric=Metric(), output_dir=tmp_path / "run", progress=False)
    assert result.best_value == 0.0


@pytest.mark.parametrize(
    ("value", "what"), [(None, "NoneType"), ("good", "str"), (torch.ones(2), "Tensor"), ([1.0], "list")]
)
def test_a_metric_that_is_no_number_is_refused(value: Any, what: str) -> None:
    def mine(model: nn.Module) -> Any:
        return value

    with pytest.raises(UsageError, match=rf"metric mine: must return a number, got .*{what}"):
        finetune(classifier(), batches(), steps=1, metric=mine, progress=False)


def test_the_errors_of_a_callers_metric_stay_its_own() -> None:
    def mine(model: nn.Module) -> float:
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine"):
        finetune(classifier(), batches(), steps=1, metric=mine, progress=False)
    result = finetune(classifier(), batches(), steps=1, metric=lambda model: torch.tensor(0.5), progress=False)
    assert result.best_value == 0.5


def test_a_callable_metric_needs_no_validation_data() -> None:
    model = classifier()
    result = finetune(
        model,
        batches(),
        steps=6,
        lr=0.1,
        metric=lambda m: float(m[2].weight.norm()),
        higher_is_better=True,
        progress=False,
    )
    assert result.best_value == pytest.approx(float(model[2].weight.detach().norm()))
