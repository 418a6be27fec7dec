"""Layers that a model reaches by other ways than its children: followed, or refused by name; what is loaded is what was measured."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowrank

BATCHES = [torch.randn(16, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
REGISTRY: dict[str, Any] = {}


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)
        self.way: Any = None
        object.__setattr__(self, "way", self.hold())

    def hold(self) -> Any:
        return None

    def first(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.first(x).relu())


def pair(hold: Callable[[Any], Any], first: Callable[[Any, torch.Tensor], torch.Tensor]) -> type[Pair]:
    return type("Net", (Pair,), {"hold": hold, "first": first})


FOLLOWED = {
    "list in a dict": pair(lambda m: {"x": [m.a]}, lambda m, x: m.way["x"][0](x)),
    "tuple": pair(lambda m: (m.a,), lambda m, x: m.way[0](x)),
    "partial": pair(lambda m: functools.partial(m.a), lambda m, x: m.way(x)),
    "bound method": pair(lambda m: m.a.__call__, lambda m, x: m.way(x)),
    "closure": pair(lambda m: (lambda layer: lambda x: layer(x))(m.a), lambda m, x: m.way(x)),
    "default": pair(lambda m: lambda x, held=[m.a]: held[0](x), lambda m, x: m.way(x)),
    "weak reference": pair(lambda m: weakref.ref(m.a), lambda m, x: m.way()(x)),
}
REFUSED = {
    "global module": pair(lambda m: REGISTRY.__setitem__("a", m.a), lambda m, x: REGISTRY["a"](x)),
    "global weight": pair(
        lambda m: REGISTRY.__setitem__("w", m.a.weight), lambda m, x: nn.functional.linear(x, REGISTRY["w"])
    ),
    "proxy": pair(lambda m: weakref.proxy(m.a), lambda m, x: m.way(x)),
    "unregistered": pair(lambda m: [nn.Linear(32, 32)], lambda m, x: m.way[0](m.a(x))),
}


def compressed(model: nn.Module) -> lowrank.CompressionResult:
    return lowrank.compress_model(model, error_budget=0.1, calibration=BATCHES, progress=False, loss_aware=False)


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_layer_is_replaced_whatever_way_leads_to_it(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = FOLLOWED[name]().eval()
    result = compressed(model)
    assert type(result.model.a) is not nn.Linear
    result.save(tmp_path / "out")
    loaded = lowrank.load_model(tmp_path / "out", model=FOLLOWED[name])
    with torch.no_grad():
        assert torch.equal(loaded(BATCHES[0]), result.model(BATCHES[0]))
        assert torch.equal(model(BATCHES[0]), model.b(model.a(BATCHES[0]).relu()))


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_copy_can_follow_is_refused_by_name(name: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(lowrank.LowRankError, match=r"layer a|a\.weight|model\.way"):
        compressed(REFUSED[name]().eval())


def test_extra_state_is_saved_and_loaded(tmp_path: Path) -> None:
    class Counting(Pair):
        steps = 3

        def get_extra_state(self) -> Any:
            return {"steps": self.steps}

        def set_extra_state(self, state: Any) -> None:
            self.steps = state["steps"]

    model = Counting()
    model.steps = 7
    compressed(model).save(tmp_path / "out")
    assert lowrank.load_model(tmp_path / "out", model=Counting).steps == 7


def test_extra_state_that_is_not_json_is_refused_before_the_search() -> None:
    class Odd(Pair):
        def get_extra_state(self) -> Any:
            return {"steps": {1, 2}}

    with pytest.raises(lowrank.CheckpointError, match="get_extra_state"):
        compressed(Odd())


def test_a_script_and_a_tensor_subclass_are_refused_by_name() -> None:
    class Marked(torch.Tensor):
        pass

    marked = nn.Sequential(nn.Linear(16, 8))
    marked[0].weight = nn.Parameter(marked[0].weight.data.as_subclass(Marked))
    with pytest.raises(lowrank.LowRankError, match=r"0\.weight.*Marked"):
        lowrank.compress_model(marked, error_budget=0.1, progress=False)
