"""Batches of which no label counts: left out beside others, refused where there is nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from training_batches import batches, classifier

from lowrank.errors import CalibrationError
from lowrank.training import finetune


def blank(size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """No label of it counts."""
    return torch.ones(size, 6), torch.full((size,), -100)


class Stream:
    """Batches in the order given, readable again: no sequence, so not shuffled."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Any:
        return iter(self.items)


def test_a_batch_without_a_counting_label_adds_nothing_to_its_step() -> None:
    one, two = classifier(), classifier()
    pair = batches(1)[0]
    settings = {"steps": 2, "lr": 0.05, "progress": False}
    plain = finetune(one, Stream([pair]), **settings)
    mixed = finetune(two, Stream([pair, blank()]), gradient_accumulation=2, **settings)
    assert [row["loss"] for row in plain.history] == [row["loss"] for row in mixed.history]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_a_step_without_a_counting_label_is_left_out() -> None:
    first, second = batches(2)
    one, two = classifier(), classifier()
    settings = {"lr": 0.05, "schedule": "constant", "progress": False}
    finetune(one, Stream([first, second]), steps=2, **settings)
    result = finetune(two, Stream([first, blank(), second]), steps=3, **settings)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert result.steps == 3
    skipped = result.history[1]
    assert (skipped["loss"], skipped["gradient_norm"], skipped["skipped"]) == (None, None, True)
    assert [("skipped" in row) for row in result.history] == [False, True, False]
    assert type(result).from_json(result.to_json()) == result


@pytest.mark.parametrize("listed", [False, True])
def test_training_data_without_a_counting_label_is_refused_by_its_batches(listed: bool) -> None:
    model = classifier()
    before = copy.deepcopy(model.state_dict())
    data = [blank(), blank(4)]
    with pytest.raises(
        CalibrationError, match=r"train: batch 0: none of its 8 labels counts .*, nor does one of any other batch"
    ):
        finetune(model, data if listed else Stream(data), steps=2, progress=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_what_the_data_draws_is_the_same_after_a_look_at_it() -> None:
    drawn: list[float] = []

    class Augmented:
        def __len__(self) -> int:
            return 3

        def __iter__(self) -> Any:
            for x, y in batches(3):
                drawn.append(float(torch.rand(())))
                yield x, y

    finetune(classifier(), Augmented(), epochs=2, progress=False)
    assert drawn[-6:-3] != drawn[-3:]
    assert len(set(drawn)) == 6


@pytest.mark.parametrize("metric", ["loss", "accuracy", "perplexity"])
def test_validation_without_a_counting_label_is_refused(metric: str) -> None:
    with pytest.raises(CalibrationError, match=r"validation: batch 0: none of its 8 labels counts"):
        finetune(classifier(), batches(), [blank()], steps=1, metric=metric, progress=False)
    # Beside others it is left out, and a metric of one's own does not look at it.
    values = [
        finetune(classifier(), batches(), checks, steps=1, metric=metric, progress=False).evaluations[0]["value"]
        for checks in ([batches(1)[0]], [blank(), batches(1)[0]])
    ]
    assert values[0] == pytest.approx(values[1])
    finetune(classifier(), batches(), [blank()], steps=1, metric=lambda model: 1.0, progress=False)


def test_texts_of_one_token_are_no_texts_for_a_causal_model() -> None:
    pytest.importorskip("transformers")
    from tiny_models import make_causal_model

    ids = torch.tensor([[5], [6]])
    texts = [{"input_ids": ids, "labels": ids}]
    good = torch.randint(4, 20, (2, 6), generator=torch.Generator().manual_seed(0))
    with pytest.raises(CalibrationError, match=r"train: batch 0: .*first token"):
        finetune(make_causal_model(), texts, steps=1, progress=False)
    with pytest.raises(CalibrationError, match=r"validation: batch 0: .*first token"):
        finetune(make_causal_model(), [{"input_ids": good, "labels": good}], texts, steps=1, progress=False)
