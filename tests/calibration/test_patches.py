"""Moments of patches: against unfolding, shared, drawn with a seed, without padding."""

from __future__ import annotations

import pytest
import torch
from helpers import seeded
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank.calibration import observers
from lowrank.calibration.batches import Batch
from lowrank.calibration.inputs import collect_statistics
from lowrank.errors import NumericsError
from lowrank.numerics.moments import InputStatistics


def of(found: object) -> InputStatistics:
    assert isinstance(found, InputStatistics)
    return found


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"padding": (2, 1), "dilation": 2}])
def test_moments_are_those_of_the_unfolded_input(options: dict[str, object]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, (3, 2), **options))  # type: ignore[arg-type]
    x = torch.randn(6, 3, 9, 8, generator=seeded())
    found = of(collect_statistics(model, [x[:4], x[4:]], {"0": model[0]})["0"])
    rows = F.unfold(x.double(), (3, 2), **options).transpose(1, 2).reshape(-1, 18)  # type: ignore[arg-type]
    assert found.count == found.offered == len(rows)
    torch.testing.assert_close(found.gram, rows.T @ rows / len(rows), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.mean, rows.mean(dim=0), rtol=1e-10, atol=1e-12)


def test_groups_keep_only_their_own_blocks() -> None:
    whole, grouped = nn.Conv1d(6, 6, 3), nn.Conv1d(6, 6, 3, groups=3)
    x = torch.randn(5, 6, 10, generator=seeded())
    every = of(collect_statistics(nn.Sequential(whole), [x], {"0": whole})["0"])
    blocked = of(collect_statistics(nn.Sequential(grouped), [x], {"0": grouped})["0"])
    assert blocked.blocks == 3
    for index in range(3):
        torch.testing.assert_close(blocked.block(index, 3).gram, every.block(index, 3).gram, rtol=1e-12, atol=1e-12)


class Branches(nn.Module):
    """Four convolutions of one input, two of them of the same geometry."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.reflected = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
        self.point = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.two(x) + self.reflected(x) + self.point(x)


def test_convolutions_of_one_input_and_geometry_share() -> None:
    model = Branches()
    found = collect_statistics(model, [torch.randn(2, 3, 6, 6, generator=seeded())], dict(model.named_children()))
    assert found["one"] is found["two"]
    assert len({id(statistics) for statistics in found.values()}) == 3
    assert of(found["point"]).n_features == 3


def test_patches_beyond_the_cap_are_drawn_with_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observers, "PATCHES_PER_LAYER", 240)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2))
    x = torch.randn(16, 2, 10, 10, generator=seeded())

    def grams(seed: int, batch: int) -> tuple[Tensor, InputStatistics]:
        found = of(collect_statistics(model, list(x.split(batch)), {"0": model[0], "2": model[2]}, seed=seed)["0"])
        return found.gram, found

    one, statistics = grams(0, 8)
    assert (statistics.count, statistics.offered) == (240, 1600)
    assert torch.equal(one, grams(0, 8)[0]) and not torch.equal(one, grams(1, 8)[0])
    rows = F.unfold(x.double(), 3, padding=1).transpose(1, 2).reshape(-1, 18)
    whole = rows.T @ rows / len(rows)
    # The error of a mean over 240 draws: the entries' own spread over the root of that.
    assert float((one - whole).abs().max()) <= 6.0 * float(rows.square().std()) / 240**0.5


def test_padding_of_texts_is_left_out() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 4, 3, padding=1)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.conv(x)

    model, x = Text(), torch.randn(2, 4, 6, generator=seeded())
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    found = of(
        collect_statistics(model, [Batch((), {"x": x, "attention_mask": mask}, 2)], {"conv": model.conv})["conv"]
    )
    padded = F.pad(x.double(), (1, 1))
    rows = torch.stack([padded[b, :, p : p + 3].flatten() for b, p in mask.nonzero().tolist()])
    assert found.count == 8
    torch.testing.assert_close(found.gram, rows.T @ rows / 8, rtol=1e-10, atol=1e-12)


def test_inputs_without_a_batch_and_constant_ones_work() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3))
    found = of(collect_statistics(model, [Batch((torch.ones(2, 5, 5),))], {"0": model[0]})["0"])
    assert found.count == 9 and bool((found.gram == 1.0).all())
    assert float(found.covariance.abs().max()) == 0.0


def test_the_first_convolution_that_makes_nan_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 1))
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(NumericsError, match="layer 0: is the first"):
        collect_statistics(model, [torch.randn(2, 2, 6, 6)], {"0": model[0], "2": model[2]})


def test_statistics_are_gathered_in_inference_mode_too() -> None:
    model = nn.ModuleDict({"a": nn.Conv2d(3, 4, 3), "b": nn.Conv2d(3, 4, 3), "c": nn.Linear(4, 4)})
    model.forward = lambda x: model["c"]((model["a"](x) + model["b"](x)).flatten(2).mT)  # type: ignore[method-assign, operator]
    inputs, targets = [torch.randn(4, 3, 6, 6)], dict(model.items())
    plain = collect_statistics(model, inputs, targets)
    with torch.inference_mode():
        found = collect_statistics(model, [inputs[0].clone()], targets)
    assert plain.keys() == found.keys() == targets.keys()
    for name, value in plain.items():
        assert torch.equal(of(found[name]).gram, of(value).gram), name
