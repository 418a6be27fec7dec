"""Merging: into every base in its own format, out again bit for bit, all layers or none."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import eps, matrix_with_spectrum, seeded
from lora_bases import BASES, DENSE, DTYPES, INTEGER, RANK, adapted, build, close, inputs, only_layer, randomise
from lora_models import random_adapter, rows, two_linear
from torch import Tensor, nn

import lowrank
from lowrank.lora.adapters import active_adapters, lora_layers
from lowrank.lora.bases import exact_weight

# A spatial convolution cannot hold an adapter's kernel; see the test of refusals.
MERGEABLE = [kind for kind in BASES if kind != "spatial-conv2d"]
KINDS = pytest.mark.parametrize("kind", MERGEABLE)
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
DENSE_CODES = ("int8", "int8-embedding", "int8-conv1d", "int8-conv2d")


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    if set(now) != set(before):
        return False
    return all(torch.equal(now[name].view(torch.uint8), before[name].view(torch.uint8)) for name in before)


def exact_sum(model: nn.Module, **_: object) -> Tensor:
    layer = only_layer(model)
    change = layer.change(["default"])
    weight = exact_weight(layer.unmerged_base).flatten(1)
    rows = 1.0 if change.rows is None else change.rows[:, None]
    return weight * rows + change.left @ change.right


@KINDS
@ALL_DTYPES
@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
def test_merge_and_unmerge(kind: str, dtype: torch.dtype, dora: bool) -> None:
    model = adapted(kind, dtype, use_dora=dora)
    x, before = inputs(kind, dtype), bits(model)
    with torch.no_grad():
        separate = model(x)
    anew = kind in DENSE_CODES or (dora and kind in INTEGER)
    merged = lowrank.merge_lora(model, requantize=anew)
    assert merged is model
    layer = only_layer(model)
    assert type(layer.base_layer) is type(layer.unmerged_base)
    row = lowrank.merge_report(model).rows[0]
    exact, stored = exact_sum(model), exact_weight(layer.base_layer).flatten(1)
    change = exact - exact_weight(layer.unmerged_base).flatten(1)
    assert row.error == pytest.approx(float((stored - exact).norm() / change.norm()), rel=1e-6, abs=1e-12)
    if kind not in INTEGER:
        assert row.error < 16 * eps(dtype)
        with torch.no_grad():
            close(model(x), separate, dtype, safety=64)
    else:
        # Half a step of 127 in each entry, on both factors.
        assert row.error < 0.05
    lowrank.merge_lora(model, requantize=anew)  # idempotent
    assert lowrank.merge_report(model).rows[0] is row
    lowrank.unmerge_lora(model)
    assert same_bits(model, before)
    assert lowrank.merge_report(model).rows == ()
    with torch.no_grad():
        assert torch.equal(model(x), separate)


@ALL_DTYPES
def test_float_factors_are_concatenated(dtype: torch.dtype) -> None:
    model = adapted("lowrank", dtype)
    layer = only_layer(model)
    base, (up, down) = layer.base_layer, layer.pair("default")
    lowrank.merge_lora(model)
    after: Any = layer.base_layer
    assert after.rank == base.rank + RANK == lowrank.merge_report(model).rows[0].rank_after  # type: ignore[operator]
    assert torch.equal(after.left[:, : base.rank], base.left) and torch.equal(after.right[: base.rank], base.right)
    product = after.left[:, base.rank :].double() @ after.right[base.rank :].double()
    close(product, 2.0 * up.double() @ down.double(), dtype)
    assert torch.equal(after.bias, base.bias)


@pytest.mark.parametrize("kind", ["lowrank-int8", "lowrank-int8-weight-only", "lowrank-int8-embedding"])
def test_base_codes_and_scales_stay_and_only_appended_components_are_rounded(kind: str) -> None:
    model = adapted(kind)
    layer = only_layer(model)
    base: Any = layer.base_layer
    lowrank.merge_lora(model)
    after: Any = layer.base_layer
    assert after.rank == base.rank + RANK
    assert torch.equal(after.left_codes[:, : base.rank], base.left_codes)
    assert torch.equal(after.right_codes[: base.rank], base.right_codes)
    assert torch.equal(after.scale[: base.rank], base.scale)
    assert after.left_codes.dtype == after.right_codes.dtype == torch.int8
    added = exact_weight(after) - exact_weight(base)
    wanted = layer.change(["default"])
    lost = float((added - wanted.left @ wanted.right).norm())
    row = lowrank.merge_report(model).rows[0]
    assert 0.0 < lost == pytest.approx(row.error * float((wanted.left @ wanted.right).norm()), rel=1e-9)
    assert row.error < 0.02
    assert row.bytes_after - row.bytes_before == RANK * (10 + 12 + 4)


@pytest.mark.parametrize("kind", ["lowrank", "lowrank-int8", "lowrank-embedding", "lowrank-int8-embedding"])
def test_the_rank_never_passes_the_smaller_side(kind: str) -> None:
    model = adapted(kind, torch.float64, r=7)  # 5 + 7 > min(10, 12)
    x = inputs(kind, torch.float64)
    separate = model(x)
    lowrank.merge_lora(model)
    layer: Any = only_layer(model).base_layer
    row = lowrank.merge_report(model).rows[0]
    assert layer.rank == row.rank_after == 10
    assert "truncated from rank 12 to 10" in row.note
    if kind in INTEGER:
        assert "rounded anew" in row.note and 0.0 < row.error < 0.05
    else:
        # Full rank holds every matrix.
        assert row.error < 1e-13
        close(model(x), separate, torch.float64, safety=256)


def test_truncation_to_a_rank_or_an_error_is_the_best_and_reported() -> None:
    sigma = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.25])
    linear = nn.Linear(12, 10, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(matrix_with_spectrum(10, 12, sigma))
    base = nn.Sequential(lowrank.SVDCompressedLinear.from_linear(linear, rank=5))
    model = lowrank.add_lora(base, lowrank.LoRAConfig(r=3))
    randomise(model)
    exact = exact_sum(model)
    values = torch.linalg.svdvals(exact)
    lowrank.merge_lora(model, rank=5)
    layer: Any = only_layer(model).base_layer
    assert layer.rank == 5
    lost = float((exact_weight(layer) - exact).norm())
    assert lost == pytest.approx(float(values[5:].norm()), rel=1e-9)
    assert lowrank.merge_report(model).rows[0].error > 0.0
    lowrank.unmerge_lora(model)
    allowed = float(values[4:].norm() / values.norm()) * 1.0001
    lowrank.merge_lora(model, max_error=allowed)
    layer = only_layer(model).base_layer
    assert layer.rank == 4
    assert float((exact_weight(layer) - exact).norm() / exact.norm()) <= allowed


def test_several_adapters_merge_as_their_sum() -> None:
    model = adapted("linear", torch.float64)
    for name, seed in (("other", 4), ("third", 5)):
        config = lowrank.LoRAConfig(r=2, target_modules=["0"], use_dora=True)
        model = lowrank.add_lora(model, config, name)
        randomise(model, name, seed=seed)
    lowrank.set_adapter(model, ["default", "other", "third"])
    x = inputs("linear", torch.float64)
    separate = model(x)
    lowrank.merge_lora(model)
    assert lowrank.merge_report(model).rows[0].adapters == ("default", "other", "third")
    close(model(x), separate, torch.float64, safety=64)
    with pytest.raises(lowrank.UsageError, match="unmerge_lora first"):
        lowrank.merge_lora(model, "other")
    with pytest.raises(lowrank.UsageError, match="unmerge_lora first"):
        lowrank.set_adapter(model, "other")


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 6)
        self.grouped = nn.Conv1d(6, 6, 3, groups=2, padding=1)
        self.codes = lowrank.QuantizedLinear.from_linear(nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.grouped(self.first(x).transpose(-1, -2)).transpose(-1, -2)
        out: Tensor = self.codes(hidden)
        return out


def test_what_cannot_be_merged_is_refused_by_layer_and_nothing_is_merged() -> None:
    model = lowrank.add_lora(Mixed(), lowrank.LoRAConfig(r=2, target_modules=["first", "grouped", "codes"]))
    randomise(model)
    before = bits(model)
    with pytest.raises(lowrank.AdapterError, match=r"nothing was merged.*grouped: groups=2.*codes: .*requantize=True"):
        lowrank.merge_lora(model)
    assert same_bits(model, before)
    assert not any(layer.merged_adapters for layer in lora_layers(model).values())


def test_a_reason_that_many_layers_share_is_said_once() -> None:
    codes = [lowrank.QuantizedLinear.from_linear(nn.Linear(6, 6)) for _ in range(5)]
    model = lowrank.add_lora(nn.Sequential(*codes), lowrank.LoRAConfig(r=2, init_lora_weights=False))
    with pytest.raises(lowrank.AdapterError, match=r"layer 0 \(and 4 more layers\): a QuantizedLinear") as caught:
        lowrank.merge_lora(model)
    assert str(caught.value).count("requantize=True") == 1


def test_layers_whose_change_is_lost_in_rounding_are_named() -> None:
    torch.manual_seed(0)
    codes = [lowrank.QuantizedLinear.from_linear(nn.Linear(32, 32)) for _ in range(2)]
    model = lowrank.add_lora(nn.Sequential(*codes), lowrank.LoRAConfig(r=2, init_lora_weights=False))
    with torch.no_grad():
        model[1].lora_B["default"].weight.mul_(1e-4)
        model[0].lora_B["default"].weight.mul_(10.0)
    report = lowrank.merge_report(lowrank.merge_lora(model, requantize=True))
    assert report.lost == ("1",)


def test_a_spatial_convolution_is_refused_by_its_scheme() -> None:
    model = adapted("spatial-conv2d")
    with pytest.raises(lowrank.AdapterError, match=r'layer 0: scheme="spatial" .* scheme="channel"'):
        lowrank.merge_lora(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nonfinite_adapter_is_refused_and_nothing_is_merged(value: float) -> None:
    model = lowrank.add_lora(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), lowrank.LoRAConfig(r=2))
    randomise(model)
    with torch.no_grad():
        lora_layers(model)["1"].pair("default")[0][0, 0] = value
    before = bits(model)
    with pytest.raises(lowrank.NumericsError, match="layer 1: the adapter holds NaN or Inf"):
        lowrank.merge_lora(model)
    assert same_bits(model, before)
    assert not lora_layers(model)["0"].merged_adapters


def test_a_sum_beyond_the_dtype_is_refused() -> None:
    model = lowrank.add_lora(nn.Sequential(nn.Linear(4, 4, dtype=torch.float16)), lowrank.LoRAConfig(r=2))
    with torch.no_grad():
        for parameter in only_layer(model).adapter_parameters("default"):
            parameter.fill_(1e4)
    with pytest.raises(lowrank.NumericsError, match="layer 0: NaN or Inf after merging"):
        lowrank.merge_lora(model)
    assert not only_layer(model).merged_adapters


def test_a_tied_weight_keeps_its_other_end() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.head(self.embed(ids))
            return out

    model = lowrank.add_lora(Tied(), lowrank.LoRAConfig(r=2, target_modules=["head"]))
    randomise(model)
    ids = torch.arange(7)
    separate = model(ids)
    lowrank.merge_lora(model)
    torch.testing.assert_close(model(ids), separate)
    lowrank.unmerge_lora(model)
    assert lora_layers(model)["head"].base_layer.weight is model.embed.weight


@pytest.mark.parametrize("kind", [kind for kind in MERGEABLE if kind not in DENSE_CODES])
def test_unloading_leaves_plain_layers(kind: str) -> None:
    model = adapted(kind, torch.float64)
    x = inputs(kind, torch.float64)
    lowrank.merge_lora(model)
    merged = model(x)
    base = type(build(kind)[0])
    plain = lowrank.unload_lora(model)
    assert type(plain[0]) is base  # type: ignore[index]
    assert torch.equal(plain(x), merged)
    assert not any("lora" in name for name in plain.state_dict())


def test_the_base_alone_comes_back_while_disabled_even_when_merged() -> None:
    model = adapted("lowrank")
    x, base = inputs("lowrank"), build("lowrank")
    lowrank.merge_lora(model)
    with lowrank.disable_adapter(model):
        assert torch.equal(model(x), base(x))
    assert not torch.equal(model(x), base(x))


def test_a_merged_model_moves_and_copies() -> None:
    model = adapted("linear")
    x = inputs("linear", torch.float64)
    lowrank.merge_lora(model)
    other = copy.deepcopy(model).double()
    lowrank.unmerge_lora(other)
    assert only_layer(other).base_layer.weight.dtype == torch.float64
    lowrank.unmerge_lora(model)
    torch.testing.assert_close(other(x), model.double()(x))


@pytest.mark.parametrize(
    "arguments", [{"rank": 0}, {"rank": True}, {"rank": 2.0}, {"max_error": -1.0}, {"max_error": float("nan")}]
)
def test_options_out_of_range(arguments: dict[str, Any]) -> None:
    with pytest.raises(lowrank.RankError):
        lowrank.merge_lora(adapted("lowrank"), **arguments)


def test_no_active_adapter_is_an_error() -> None:
    model = adapted("linear")
    lowrank.set_adapter(model, None)
    with pytest.raises(lowrank.UsageError, match="no adapter is active"):
        lowrank.merge_lora(model)


def test_the_report_prints_every_layer() -> None:
    model = lowrank.add_lora(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), lowrank.LoRAConfig(r=2))
    randomise(model, seed=int(torch.randint(9, (1,), generator=seeded())))
    lowrank.merge_lora(model)
    report = lowrank.merge_report(model)
    assert [row.name for row in report.rows] == ["0", "2"]
    assert report.bytes_before == report.bytes_after == 4 * (30 + 5 + 15 + 3)
    assert report.worst in report.rows
    assert all(row.name in str(report) and row.note in str(report) for row in report.rows)


def test_dense_kinds_are_those_without_codes_or_factors() -> None:
    assert {kind for kind in BASES if not isinstance(build(kind)[0], lowrank.layers.CompressedLayer)} == DENSE


def test_merging_a_named_adapter_leaves_no_other_in_the_sum() -> None:
    adapted = lowrank.add_lora(two_linear(), random_adapter("0", "2", modules_to_save=None), "both")
    lowrank.add_lora(adapted, random_adapter("0"), "first", inplace=True)
    x = rows()
    with torch.no_grad():
        expected = adapted(x)
        lowrank.set_adapter(adapted, "both")
        before = adapted(x)
        lowrank.merge_lora(adapted, "first")
        torch.testing.assert_close(adapted(x), expected, rtol=1e-5, atol=1e-5)
        lowrank.unmerge_lora(adapted)
        assert torch.equal(adapted(x), expected)
        lowrank.set_adapter(adapted, "both")
        assert torch.equal(adapted(x), before)


def test_a_merge_that_is_refused_leaves_the_active_adapter_active() -> None:
    adapted = lowrank.add_lora(two_linear(), random_adapter("0"), "a")
    lowrank.add_lora(adapted, random_adapter("0"), "b", inplace=True)
    with torch.no_grad():
        adapted[0].lora_B["a"].weight.fill_(float("nan"))
    with pytest.raises(lowrank.NumericsError):
        lowrank.merge_lora(adapted, "a")
    assert active_adapters(adapted) == ["b"]


def test_a_rank_that_changes_nothing_leaves_the_codes() -> None:
    base = nn.Sequential(lowrank.QuantizedLowRankLayer.from_linear(nn.Linear(16, 16), rank=4))
    merged = lowrank.merge_lora(lowrank.add_lora(base, random_adapter("0")), rank=6)
    assert torch.equal(merged[0].base_layer.left_codes[:, :4], base[0].left_codes)
    assert "2 components appended" in lowrank.merge_report(merged).rows[0].note
