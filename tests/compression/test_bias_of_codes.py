"""Codes that are chosen by centred moments leave the mean of the error to the bias."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lowrank.calibration.inputs import collect_statistics
from lowrank.compression.formats import FORMATS
from lowrank.compression.layer_data import LayerData
from lowrank.layers.spec import LayerSpec
from lowrank.numerics.moments import InputStatistics
from lowrank.targets.survey import survey


def inputs(*size: int) -> Tensor:
    return 3.0 + torch.rand(*size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("module", "x"),
    [(nn.Linear(70, 9), inputs(50, 70)), (nn.Conv2d(8, 6, 3, groups=2), inputs(10, 8, 7, 7))],
    ids=["linear", "conv"],
)
@pytest.mark.parametrize("rounding", [None, "nearest"])
def test_the_mean_of_the_error_goes_into_the_bias(module: nn.Module, x: Tensor, rounding: str | None) -> None:
    model = nn.Sequential(module).eval()
    found = collect_statistics(model, [x], {"0": module})["0"]
    assert isinstance(found, InputStatistics)
    data = LayerData(survey(model).targets[0], found)
    assert data.centred
    spec = LayerSpec("int2", bits=2, group=32, activations="float", rounding=rounding)
    built = FORMATS["int2"].build(data, spec)["0"]
    with torch.no_grad():
        lost = (built(x) - module(x)).double().movedim(1, -1).flatten(0, -2) if x.ndim == 4 else built(x) - module(x)
        rms = lost.square().mean(dim=0).sqrt()
        mean = lost.mean(dim=0).abs()
    assert bool((rms > 1e-3).all()) and bool((mean < 1e-4 * (1.0 + rms)).all())


def test_a_layer_without_a_bias_keeps_none() -> None:
    layer = nn.Linear(70, 9, bias=False)
    model = nn.Sequential(layer).eval()
    found = collect_statistics(model, [inputs(50, 70)], {"0": layer})["0"]
    assert isinstance(found, InputStatistics)
    data = LayerData(survey(model).targets[0], found)
    built = FORMATS["int2"].build(data, LayerSpec("int2", bits=2, group=32, activations="float"))["0"]
    assert getattr(built, "bias", None) is None
