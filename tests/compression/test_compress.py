"""The main path on small models: the promise, the report's arithmetic, plans applied again, and what goes wrong."""

from __future__ import annotations

import copy
import math
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import assert_same_state
from torch import Tensor, nn

import lowrank
from lowrank.calibration.evaluation import Evaluator
from lowrank.calibration.preparing import prepare_batches
from lowrank.checkpoint import stored_tensors
from lowrank.compression.candidates import Plan
from lowrank.compression.formats import is_plain_rounding
from lowrank.errors import BudgetError, CalibrationError, LowRankError, NumericsError, RankError, UsageError
from lowrank.layers import CompressedLayer, QuantizedLinear
from lowrank.numerics import linalg


def mlp(seed: int = 0, *, low_rank: bool = False, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(48, 96, bias=bias), nn.GELU(), nn.LayerNorm(96), nn.Linear(96, 40, bias=bias))
    if low_rank:
        with torch.no_grad():
            for layer in (model[0], model[3]):
                u, s, v = torch.linalg.svd(layer.weight, full_matrices=False)
                layer.weight.copy_(u * s * torch.logspace(0, -5, len(s)) @ v)
    return model.eval()


def data(samples: int = 256, features: int = 48, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(samples, features, generator=generator).split(32))


class Tied(nn.Module):
    """Embedding and head share a weight; ids in, logits out."""

    def __init__(self, seed: int = 0, vocabulary: int = 60, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(vocabulary, width)
        self.body = nn.Linear(width, width)
        self.unused = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(input_ids))))


def ids(samples: int = 64, vocabulary: int = 60) -> list[Tensor]:
    return list(torch.randint(0, vocabulary, (samples, 9), generator=torch.Generator().manual_seed(2)).split(16))


def compress(model: nn.Module, **options: Any) -> lowrank.CompressionResult:
    return lowrank.compress_model(model, progress=False, **options)


def assert_adds_up(model: nn.Module, result: lowrank.CompressionResult) -> None:
    """Rows sum to totals, totals to the tensors that a file would hold, predicted bytes to built bytes."""
    totals = result.report.totals
    result.report.check_totals()
    assert totals["bytes_before"] == sum(tensor.nbytes for tensor in stored_tensors(model).values())
    assert totals["bytes_after"] == sum(tensor.nbytes for tensor in stored_tensors(result.model).values())
    assert totals["bytes_integer"] + totals["bytes_weight_only"] + totals["bytes_dense"] == totals["bytes_after"]
    named = {name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None}
    assert {row.name for row in result.report.rows} == named
    for entry in result.plan.entries:
        module = result.model.get_submodule(entry.name)
        built = (
            module.stored_bytes if isinstance(module, CompressedLayer) else sum(p.nbytes for p in module.parameters())
        )
        biases = [
            other.bias.nbytes
            for name, other in result.model.named_modules()
            if name != entry.name
            and getattr(other, "codes", None) is getattr(module, "codes", 0)
            and getattr(other, "bias", None) is not None
        ]
        assert entry.bytes == built + sum(biases), entry.name


@pytest.mark.parametrize("budget", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("low_rank", [False, True])
def test_the_error_budget_is_kept_on_unseen_data_and_used(budget: float, low_rank: bool) -> None:
    model = mlp(low_rank=low_rank)
    before = copy.deepcopy(model.state_dict())
    result = compress(model, error_budget=budget, calibration=data(512))
    totals = result.report.totals
    assert totals["error_measured"] <= totals["error_upper"] <= budget
    unseen = Evaluator(model, prepare_batches(model, data(512, seed=9)), "output").measure(result.model)
    assert unseen.value <= budget
    assert totals["size_ratio"] < 0.6
    assert_adds_up(model, result)
    assert_same_state(model, before)
    assert result.model.training == model.training


def test_low_rank_wins_where_the_spectrum_falls_and_int8_where_it_does_not() -> None:
    steep = compress(mlp(low_rank=True), error_budget=0.05, calibration=data())
    assert {entry.format for entry in steep.plan.entries} == {"lowrank-int8"}
    flat = compress(mlp(), error_budget=0.02, calibration=data())
    assert "lowrank" not in {entry.format for entry in flat.plan.entries}


def test_the_result_is_never_larger_than_uniform_int8_where_that_keeps_the_budget() -> None:
    model = mlp()
    uniform = copy.deepcopy(model)
    uniform[0], uniform[3] = QuantizedLinear.from_linear(model[0]), QuantizedLinear.from_linear(model[3])
    batches = prepare_batches(model, data(512, seed=5))
    error = Evaluator(model, batches, "output").measure(uniform).upper()
    result = compress(model, error_budget=1.3 * error, calibration=data(512))
    assert result.report.totals["bytes_after"] <= sum(tensor.nbytes for tensor in stored_tensors(uniform).values())


def test_same_seed_same_bytes_and_another_seed_another_split() -> None:
    one, two = (compress(mlp(), error_budget=0.1, calibration=data(), seed=7) for _ in range(2))
    assert one.plan.to_json() == two.plan.to_json()
    assert one.report.to_json() == two.report.to_json()
    assert_same_state(one.model, two.model)


def test_a_plan_applied_again_with_its_calibration_gives_the_same_bits() -> None:
    model = mlp(low_rank=True)
    result = compress(model, error_budget=0.05, calibration=data(), seed=3)
    again = lowrank.apply_plan(model, Plan.from_json(result.plan.to_json()), calibration=data())
    assert {row.format for row in result.report.rows} >= {"lowrank-int8"}
    assert_same_state(result.model, again)


def test_a_plan_made_with_validation_data_applies_to_the_same_bits_too() -> None:
    model = mlp(low_rank=True)
    result = compress(model, error_budget=0.05, calibration=data(), validation=data(64, seed=6))
    again = lowrank.apply_plan(model, result.plan, calibration=data())
    assert_same_state(result.model, again)


def test_a_hand_edited_plan_applies_without_calibration_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp(low_rank=True)
    plan = compress(model, error_budget=0.05, calibration=data()).plan.with_entry("0", rank=5)
    applied = lowrank.apply_plan(model, plan)
    assert applied[0].rank == 5
    assert "plain SVD" in caplog.text
    measured = compress(model, plan=plan, calibration=data())
    assert measured.model[0].rank == 5
    assert measured.report.totals["error_measured"] > 0.0
    assert_adds_up(model, measured)


def test_plans_for_another_model_or_with_impossible_ranks_are_refused() -> None:
    model = mlp(low_rank=True)
    plan = compress(model, error_budget=0.05, calibration=data()).plan
    with pytest.raises(LowRankError, match="another"):
        lowrank.apply_plan(nn.Sequential(nn.Linear(48, 96)), plan)
    with pytest.raises(RankError, match="from 1 to 48"):
        plan.with_entry("0", rank=10**12)
    text = plan.to_json().replace(f'"rank": {plan.entry("0").rank}', '"rank": 48', 1)
    with pytest.raises(LowRankError, match="not fewer than"):
        lowrank.apply_plan(
            model,
            Plan.from_json(
                text.replace('"lowrank-int8"', '"lowrank"', 1)
                .replace('"bits": 8', '"bits": null', 1)
                .replace('"activations": "int8"', '"activations": null', 1)
                .replace('"activations": "float"', '"activations": null', 1)
            ),
        )


def test_tied_weights_change_together_and_count_once() -> None:
    model = Tied()
    result = compress(model, error_budget=0.1, calibration=ids())
    assert_adds_up(model, result)
    rows = {row.name: row for row in result.report.rows}
    assert rows["head"].bytes_before == 0 == rows["head"].bytes_after
    new_embed, new_head = result.model.embed, result.model.head
    assert isinstance(new_embed, CompressedLayer) and isinstance(new_head, CompressedLayer)
    assert torch.equal(new_embed.dense_weight(), new_head.dense_weight())
    assert rows["embed"].format == rows["head"].format


@pytest.mark.parametrize("form", ["int8", "lowrank", "lowrank-int8"])
def test_tied_weights_share_their_tensors_in_every_format(form: str) -> None:
    model = Tied(vocabulary=100)
    override: dict[str, Any] = {"embed": form if form == "int8" else {"format": form, "rank": 10}}
    result = compress(model, size_budget=0.99, calibration=ids(vocabulary=100), overrides=override)
    name = {"int8": "codes", "lowrank": "left", "lowrank-int8": "left_codes"}[form]
    assert getattr(result.model.embed, name) is getattr(result.model.head, name)
    assert_adds_up(model, result)


def test_a_module_used_twice_is_replaced_in_both_places() -> None:
    torch.manual_seed(0)
    shared = nn.Linear(48, 48)
    model = nn.Sequential(shared, nn.GELU(), shared)
    result = compress(model, error_budget=0.1, calibration=data())
    assert result.model[0] is result.model[2]
    assert isinstance(result.model[0], CompressedLayer)
    assert_adds_up(model, result)


def test_layers_the_metric_does_not_see_are_not_taken_below_int8_and_are_named() -> None:
    model = Tied()
    result = compress(model, error_budget=0.3, calibration=ids())
    assert result.plan.entry("unused").format == "int8"
    assert any("unused" in note for note in result.report.notes)

    class WithPooler(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.pooler = mlp(low_rank=True), nn.Linear(40, 40)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.body(x)
            self.pooler(y)
            return {"last_hidden_state": y}

    pooled = compress(WithPooler(), error_budget=0.3, calibration=data())
    assert pooled.plan.entry("pooler").format == "int8"
    assert any("pooler" in note and "does not depend" in note for note in pooled.report.notes)


def test_unseen_embedding_rows_are_rounded_like_the_others_and_take_no_low_rank() -> None:
    model = nn.Sequential(nn.Embedding(500, 32), nn.Linear(32, 16))
    result = compress(model, error_budget=0.5, calibration=ids())
    entry = result.plan.entry("0")
    # A rounding acts row by row, so that what the data met tells what the others lose.
    assert entry.format == "dense" or is_plain_rounding(entry.format)
    assert any("never looked up" in note for note in result.report.notes)


def test_weight_metric_needs_no_data_and_is_exact() -> None:
    model = mlp(low_rank=True)
    result = compress(model, error_budget=0.03)
    lost = whole = 0.0
    for name in ("0", "3"):
        original = model.get_submodule(name).weight.detach().double()
        module = result.model.get_submodule(name)
        new = module.dense_weight() if isinstance(module, CompressedLayer) else module.weight.detach()
        lost += float((original - new.double()).square().sum())
        whole += float(original.square().sum())
    totals = result.report.totals
    assert totals["metric"] == "weight"
    assert math.isclose(totals["error_measured"], math.sqrt(lost / whole), rel_tol=1e-9)
    assert totals["error_measured"] == totals["error_upper"] <= 0.03
    assert totals["error_measured"] >= 0.5 * 0.03
    assert_adds_up(model, result)


def test_weight_metric_leaves_calibration_data_unused() -> None:
    model = mlp()
    with_data = compress(model, error_budget=0.03, metric="weight", calibration=[torch.randn(3, 48)])
    assert with_data.plan.to_json() == compress(model, error_budget=0.03).plan.to_json()


def test_size_budget_alone_and_both() -> None:
    model = mlp(low_rank=True)
    small = compress(model, size_budget=0.15, calibration=data())
    assert small.report.totals["size_ratio"] <= 0.15
    assert_adds_up(model, small)
    both = compress(model, size_budget=0.5, error_budget=0.1, calibration=data())
    assert both.report.totals["size_ratio"] <= 0.5 and both.report.totals["error_upper"] <= 0.1
    with pytest.raises(BudgetError, match="smallest"):
        compress(model, size_budget=0.001, calibration=data())
    with pytest.raises(BudgetError, match="raise one of the two") as raised:
        compress(mlp(), size_budget=0.05, error_budget=0.02, calibration=data())
    assert raised.value.plan is not None


def test_callable_metric_counts_its_own_value() -> None:
    model = mlp(low_rank=True)
    probe = torch.cat(data(64, seed=8))
    reference = model(probe).detach()

    def score(candidate: nn.Module) -> float:
        assert not candidate.training
        with torch.no_grad():
            return 2.0 - float((candidate(probe) - reference).norm() / reference.norm())

    result = compress(model, error_budget=0.03, metric=score, higher_is_better=True, calibration=data())
    totals = result.report.totals
    assert totals["metric"] == "score"
    assert totals["error_measured"] <= 0.03
    assert math.isclose(totals["error_measured"], (2.0 - score(result.model)) / 2.0, rel_tol=1e-6)


@pytest.mark.parametrize("metric", ["kl", "perplexity"])
def test_language_model_metrics(metric: str) -> None:
    model = Tied()
    result = compress(model, error_budget=0.05, metric=metric, calibration=ids(128))
    assert result.report.totals["error_upper"] <= 0.05
    assert result.report.totals["metric"] == metric
    assert result.report.totals["size_ratio"] < 0.5


def test_overrides_ignore_and_targets() -> None:
    model = mlp(low_rank=True)
    result = compress(
        model,
        error_budget=0.5,
        calibration=data(),
        overrides={"0": "dense", "3": {"format": "lowrank-int8", "rank": 11, "bits": 7}},
    )
    assert result.plan.entry("0").format == "dense"
    assert (result.plan.entry("3").rank, result.plan.entry("3").bits) == (11, 7)
    assert_adds_up(model, result)
    ignored = compress(model, error_budget=0.5, calibration=data(), ignore=["0"])
    assert {row.name: row.reason for row in ignored.report.rows}["0"] == "ignored"
    for overrides, error, message in (
        ({"nope": "dense"}, UsageError, "matches no module"),
        ({"0": {"format": "lowrank", "rank": 10**12}}, RankError, "from 1 to 48"),
        ({"0": {"format": "lowrank", "rank": True}}, RankError, "integer"),
        ({"0": {"format": "lowrank", "rank": 48}}, UsageError, "bytes"),
        ({"0": {"format": "int8", "bits": 9}}, UsageError, "2 to 8"),
        ({"0": {"rank": 3}}, UsageError, "format"),
        ({"0": "fp4"}, UsageError, "must be out of"),
    ):
        with pytest.raises(error, match=message):
            compress(model, error_budget=0.5, calibration=data(), overrides=overrides)


def test_activations_modes() -> None:
    model = mlp()
    for mode in ("int8", "float"):
        result = compress(model, error_budget=0.3, calibration=data(), activations=mode)
        assert {entry.activations for entry in result.plan.entries if entry.bits} == {mode}
    assert result.report.totals["bytes_integer"] == 0


def test_integer_products_are_preferred_where_weight_only_saves_nothing() -> None:
    result = compress(mlp(), error_budget=0.05, calibration=data(512), formats=("int8",))
    totals = result.report.totals
    assert totals["bytes_weight_only"] == 0 < totals["bytes_integer"]


def test_inplace_replaces_in_the_model_itself_only_on_success() -> None:
    model = mlp()
    with pytest.raises(BudgetError):
        compress(model, error_budget=1e-7, calibration=data(), inplace=True)
    assert isinstance(model[0], nn.Linear)
    result = compress(model, error_budget=0.1, calibration=data(), inplace=True)
    assert result.model is model
    assert isinstance(model[0], CompressedLayer)


def test_the_result_shares_no_memory_with_the_original() -> None:
    model = mlp()
    result = compress(model, error_budget=0.1, calibration=data(), ignore=["3"])
    with torch.no_grad():
        for tensor in result.model.state_dict().values():
            tensor.zero_()
    assert all(bool(parameter.detach().any()) for parameter in (model[0].weight, model[3].weight, model[2].weight))


def test_budgets_out_of_reach_carry_the_best_plan() -> None:
    with pytest.raises(BudgetError, match="cannot be met") as raised:
        compress(mlp(), error_budget=1e-5, calibration=data())
    assert raised.value.exit_code == 4
    assert raised.value.plan is not None and raised.value.error is not None and raised.value.error > 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one"),
        ({"error_budget": 0.0}, "positive"),
        ({"error_budget": -0.1}, "positive"),
        ({"error_budget": float("nan")}, "positive"),
        ({"error_budget": True}, "positive"),
        ({"error_budget": 1.5}, "at most 1"),
        ({"size_budget": 1.5}, "at most 1"),
        ({"error_budget": 0.1, "metric": "accuracy"}, "metric"),
        ({"error_budget": 0.1, "metric": "kl"}, "needs calibration"),
        ({"error_budget": 0.1, "formats": ("int9",)}, "formats"),
        ({"error_budget": 0.1, "formats": "int8"}, "formats"),
        ({"error_budget": 0.1, "activations": "int4"}, "activations"),
        ({"error_budget": 0.1, "seed": -1}, "seed"),
        ({"error_budget": 0.1, "device": "cuda:99"}, "device"),
        ({"error_budget": 0.1, "ignore": ["nothing.*"]}, "matches no module"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        compress(mlp(), **options)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    "options",
    [
        {"formats": ("pruned",)},
        {"overrides": {"0": "pruned"}},
    ],
)
def test_later_formats_say_that_they_are_later(options: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match="not in this version"):
        compress(mlp(), error_budget=0.1, **options)


def test_models_without_targets_are_refused() -> None:
    with pytest.raises(UsageError, match="no layer that can be compressed"):
        compress(nn.Sequential(nn.LayerNorm(3), nn.ReLU()), error_budget=0.1)


def test_nonfinite_weights_are_refused_or_copied_by_name() -> None:
    model = mlp()
    with torch.no_grad():
        model[0].weight[3, 4] = float("nan")
    with pytest.raises(NumericsError, match=r"layer 0.*3, 4") as raised:
        compress(model, error_budget=0.1)
    assert raised.value.exit_code == 4
    result = compress(model, error_budget=0.1, on_nonfinite="copy")
    rows = {row.name: row for row in result.report.rows}
    assert rows["0"].format == "dense" and "left as it is" in (rows["0"].reason or "")
    assert rows["3"].format != "dense"


def test_strange_weights_keep_the_budget_and_stay_finite() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Linear(64, 8)
    ).eval()
    with torch.no_grad():
        model[0].weight[:, 3] *= 1e4  # one channel far above the others
        model[2].weight.zero_()
        model[4].weight[5] = 1e-6 * torch.randn(64)
        model[4].weight[6] = 0.0
    result = compress(model, error_budget=0.1, calibration=data())
    assert result.report.totals["error_upper"] <= 0.1
    assert all(bool(torch.isfinite(value.float()).all()) for value in result.model.state_dict().values())
    assert_adds_up(model, result)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_come_out_as_they_went_in(dtype: torch.dtype) -> None:
    model = mlp().to(dtype)
    result = compress(model, error_budget=0.2, calibration=[batch.to(dtype) for batch in data()])
    assert result.model(data()[0].to(dtype)).dtype == dtype
    assert_adds_up(model, result)


@pytest.mark.parametrize("shape", [(1, 48), (3, 1)])
def test_thin_layers(shape: tuple[int, int]) -> None:
    model = nn.Sequential(nn.Linear(48, shape[1]), nn.Linear(shape[1], shape[0]), nn.Linear(shape[0], 48)).eval()
    result = compress(model, error_budget=0.3, calibration=data())
    assert_adds_up(model, result)
    for row in result.report.rows:
        assert row.bytes_after <= row.bytes_before


def test_calibration_that_is_thin_or_strange_works_and_is_told() -> None:
    model = mlp()
    result = compress(model, error_budget=0.5, calibration=[torch.randn(20, 48)])
    assert any("fewer tokens than input channels" in note for note in result.report.notes)
    constant = compress(model, error_budget=0.5, calibration=[torch.ones(32, 48)])
    assert constant.report.totals["error_upper"] <= 0.5
    with pytest.raises(CalibrationError, match="16 samples"):
        compress(model, error_budget=0.5, calibration=[torch.randn(3, 48)])
    validated = compress(model, error_budget=0.5, calibration=[torch.randn(12, 48)], validation=data(64, seed=4))
    assert any("64 for verification" in note for note in validated.report.notes)


def test_a_model_that_computes_with_a_weight_itself_is_right_and_one_that_writes_to_it_keeps_that_layer() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(48, 48), nn.Linear(48, 48)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.b(x), self.a.weight)

    class Writes(Reads):
        def forward(self, x: Tensor) -> Tensor:
            self.a.weight.clamp_(-1.0, 1.0)
            return super().forward(x)

    model = Reads()
    result = compress(model, error_budget=0.2, calibration=data())
    rows = {row.name: row for row in result.report.rows}
    assert rows["a"].compressed and rows["b"].compressed
    assert relative_error(model, result.model) <= 0.2
    assert result.model.a.weight_decodings > 0
    rows = {row.name: row for row in compress(Writes(), error_budget=0.2, calibration=data()).report.rows}
    assert rows["a"].format == "dense" and "cannot be written to" in (rows["a"].reason or "")
    assert rows["b"].compressed


def relative_error(model: nn.Module, other: nn.Module) -> float:
    with torch.no_grad():
        x = torch.cat(list(data(512, seed=9)))
        return float((model(x) - other(x)).norm() / model(x).norm())


def test_fallbacks_are_counted_printed_and_refused_when_strict() -> None:
    failing = mock.patch.object(torch.linalg, "eigh", side_effect=torch.linalg.LinAlgError("no convergence"))
    with failing:
        result = compress(mlp(), error_budget=0.3, calibration=data())
    assert any("fallback" in note for note in result.report.notes)
    assert linalg.fallback_counts()
    with failing, pytest.raises(NumericsError, match="strict") as raised:
        compress(mlp(), error_budget=0.3, calibration=data(), strict=True)
    assert raised.value.exit_code == 4


def test_no_layer_is_larger_than_it_was_and_every_skip_has_a_reason() -> None:
    model = nn.Sequential(nn.Linear(48, 2), nn.Linear(2, 2), nn.ConvTranspose1d(1, 1, 1), nn.Flatten(0))

    class Wrap(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner[1](self.inner[0](x))
            return self.inner[2](y[:, None])[:, 0]

    result = compress(Wrap(), error_budget=0.3, calibration=data())
    for row in result.report.rows:
        assert row.bytes_after <= row.bytes_before
        assert row.format != "dense" or row.reason
    assert "transposed" in ({row.name: row.reason for row in result.report.rows}["inner.2"] or "")


def test_an_override_that_takes_most_of_the_budget_is_no_reason_to_refuse() -> None:
    # No plan fits a tenth of the budget; those that fit all of it are tried all the same.
    result = compress(mlp(), error_budget=0.3, calibration=data(), overrides={"0": {"format": "int3", "group": None}})
    assert result.plan.entry("0").spec.format == "int3"
    assert result.report.totals["error_upper"] <= 0.3
