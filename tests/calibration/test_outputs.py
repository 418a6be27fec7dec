"""Which tensors of an output count, each by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from lowrank.calibration.outputs import model_tensor, model_tensors
from lowrank.errors import CalibrationError


@dataclass
class Found:
    boxes: Tensor
    scores: Tensor
    count: int = 3


ONE, TWO = torch.ones(2, 4), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("output", "paths"),
    [
        (ONE, ["output"]),
        ((ONE, TWO), ["0", "1"]),
        ([ONE, {"score": TWO}], ["0", "1.score"]),
        (Found(ONE, TWO), ["boxes", "scores"]),
        ((ONE.long(), ONE, ONE > 0), ["1"]),
        ((torch.tensor(0.5), ONE), ["1"]),
        (torch.tensor(0.5), ["output"]),
        ({"loss": torch.ones(2), "logits": ONE, "hidden_states": (TWO,), "attentions": (TWO,)}, ["logits"]),
        ({"past_key_values": ((TWO, TWO),), "last_hidden_state": ONE, "logits": TWO}, ["last_hidden_state", "logits"]),
        # Someone's own dict: its state is a result; transformers' is a cache.
        ({"state": ONE, "states": TWO}, ["state", "states"]),
        # The same tensor under two names is one output; nothing else than a by-product counts after all.
        ({"logits": ONE, "output": ONE}, ["logits"]),
        ({"hidden_states": ONE}, ["hidden_states"]),
        (torch.distributions.Normal(ONE, ONE + 1.0), ["loc", "scale"]),
    ],
)
def test_every_floating_tensor_that_is_a_result_counts(output: Any, paths: list[str]) -> None:
    assert list(model_tensors(output)) == paths


def test_a_cache_is_no_output_also_without_a_name() -> None:
    cache = DynamicCache()
    cache.update(torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3, 4), 0)
    assert list(model_tensors((ONE, cache))) == ["0"]
    named = CausalLMOutputWithPast(loss=torch.tensor(1.0), logits=ONE, past_key_values=cache, hidden_states=(TWO,))
    assert list(model_tensors(named)) == ["logits"] and model_tensor(named) is ONE


@pytest.mark.parametrize("output", [ONE.long(), torch.complex(ONE, ONE), {"ids": ONE.long()}, None, "text"])
def test_an_output_without_a_floating_tensor_is_refused_by_name(output: Any) -> None:
    with pytest.raises(CalibrationError, match=f"type {type(output).__name__} holds no floating tensor.*output_fn"):
        model_tensors(output)


def test_modules_in_an_output_are_not_looked_into() -> None:
    @dataclass
    class Carrier:
        model: nn.Module
        value: Tensor

    assert list(model_tensors(Carrier(nn.Linear(2, 2), ONE))) == ["value"]
