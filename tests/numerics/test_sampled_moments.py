"""Layers with very many inputs: rows in place of their moment give what the moment gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowrank
from lowrank.calibration.inputs import collect_statistics
from lowrank.calibration.observers import observer_of
from lowrank.numerics import sampled_moments
from lowrank.numerics.factors import factorize
from lowrank.numerics.moments import InputStatistics, activation_error
from lowrank.numerics.sampled_moments import SampledMoment, moment_squares, rows_to_keep, times_moment
from lowrank.numerics.spectrum import analyze_weight


def both(features: int = 12, blocks: int = 1) -> tuple[InputStatistics, InputStatistics]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, features, generator=generator) + 0.5
    whole, kept = InputStatistics(features, blocks=blocks), InputStatistics(features, blocks=blocks, sampled=True)
    for part in rows.split(15):
        whole.update(part)
        kept.update(part)
    return whole, kept


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_rows_are_the_moment(centred, ridge):
    whole, kept = both()
    matrix = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    moment, rows = whole.metric(centred=centred, ridge=ridge), kept.metric(centred=centred, ridge=ridge)
    assert isinstance(rows, SampledMoment) and isinstance(moment, torch.Tensor)
    torch.testing.assert_close(times_moment(matrix, rows), matrix @ moment)
    torch.testing.assert_close(rows.between(matrix), matrix @ moment @ matrix.T)
    torch.testing.assert_close(moment_squares(matrix, rows), moment_squares(matrix, moment))
    torch.testing.assert_close(kept.moment(centred=centred, ridge=ridge), moment)
    torch.testing.assert_close(kept.whitened_mean(0.1), whole.whitened_mean(0.1))


def test_groups_never_meet():
    whole, kept = both(blocks=3)
    parts = torch.randn(3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for centred in (False, True):
        expected = moment_squares(parts, whole.block_metric(3, centred=centred))
        torch.testing.assert_close(moment_squares(parts, kept.block_metric(3, centred=centred)), expected)
        one = kept.block(1, 3).metric(centred=centred)
        torch.testing.assert_close(moment_squares(parts[1], one), expected[1])
    torch.testing.assert_close(kept.gram, whole.gram)


def test_chunks_of_rows_add_up(monkeypatch):
    _, kept = both()
    matrix = torch.randn(5, 12, dtype=torch.float64)
    expected = kept.metric(centred=True).between(matrix)
    monkeypatch.setattr(sampled_moments, "_CHUNK", 30)
    torch.testing.assert_close(kept.metric(centred=True).between(matrix), expected)


@pytest.mark.parametrize("shape", [(5, 12), (20, 12)])
def test_factors_and_spectra_are_those_of_the_moment(shape):
    whole, kept = both()
    weight = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    one, other = (factorize(weight, each, ridge=1e-3) for each in (whole, kept))
    torch.testing.assert_close(one.errors, other.errors, atol=1e-6, rtol=1e-6)
    first, second = one.factors(3), other.factors(3)
    torch.testing.assert_close(first.left @ first.right, second.left @ second.right)
    torch.testing.assert_close(first.bias_shift, second.bias_shift)
    error = activation_error(weight, first.left @ first.right, kept.metric(centred=True, ridge=1e-3))
    assert error == pytest.approx(float(one.errors[3]))
    torch.testing.assert_close(
        analyze_weight(weight, kept).singular_values, analyze_weight(weight, whole).singular_values
    )


def test_when_rows_are_kept():
    assert rows_to_keep(2048, 8) is None
    assert rows_to_keep(4608, 512) is None  # Only half as many as there are features: the whole moment is no larger.
    assert rows_to_keep(8192, 16) == 1024
    assert rows_to_keep(65536, 128) * 65536 * 4 <= 2**29
    assert rows_to_keep(65536, 65536) is None  # No larger than twice the weight.
    assert rows_to_keep(64 * 4096, 64, blocks=64) is not None


def test_a_wide_layer_never_makes_its_moment(monkeypatch):
    """34 GB for CREPE's second convolution, or minutes for a layer of 16 outputs."""
    full = InputStatistics._full
    monkeypatch.setattr(
        InputStatistics, "_full", lambda self: full(self) if self.n_features <= 2048 else pytest.fail("made whole")
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(64, 4, 64), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 33, 8)).eval()
    wide = nn.Sequential(nn.Flatten(), nn.Linear(4096, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    grouped = nn.Sequential(nn.Conv1d(4, 4, 2500, groups=4), nn.Flatten(), nn.Linear(4 * 8, 4)).eval()
    for name, net, shape in (("0", model, (64, 96)), ("1", wide, (64, 64)), ("0", grouped, (4, 2507))):
        batches = [torch.randn(8, *shape) for _ in range(4)]
        layer = net.get_submodule(name)
        found = collect_statistics(net, batches, {name: layer})[name]
        assert found.sampled and found.count <= found.offered
        report = lowrank.compress_model(net, error_budget=0.5, calibration=batches * 8, progress=False).report
        assert report.totals["size_ratio"] < 0.3
        row = next(row for row in report.rows if row.name == name)
        assert row.activation_error is not None and 0 <= row.activation_error < 1.5
        analysed = next(row for row in lowrank.analyze_model(net, batches, progress=False).rows if row.name == name)
        assert (analysed.data_ranks is None) == (name == "0" and net is grouped)


def test_the_same_rows_are_drawn_again():
    module = nn.Linear(4096, 4)
    model = nn.Sequential(module)
    batches = [torch.randn(700, 4096) for _ in range(2)]
    one, other, third = (collect_statistics(model, batches, {"0": module}, seed=seed)["0"] for seed in (0, 0, 1))
    assert one.count == 1024 and one.offered == 1400
    assert torch.equal(one._joined(), other._joined()) and not torch.equal(one._joined(), third._joined())
    assert observer_of(nn.Linear(64, 4)).key is None
