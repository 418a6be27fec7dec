"""Plans: known optima, budgets out of reach, JSON there and back, and every way to edit one wrongly."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lowrank.compression.candidates import Candidate, LayerChoices, Plan, PlanEntry, plan_formats
from lowrank.errors import BudgetError, CheckpointError, LowRankError, NumericsError, RankError, UsageError
from lowrank.layers.spec import LayerSpec

DENSE = Candidate(LayerSpec("dense"), 1000, 0.0)
INT8 = Candidate(LayerSpec("int8", bits=8, activations="int8"), 260, 0.002)
RANK4 = Candidate(LayerSpec("lowrank", rank=4), 300, 0.01)
RANK2 = Candidate(LayerSpec("lowrank-int8", rank=2, bits=8, activations="float"), 60, 0.04)


def layer(name: str, *candidates: Candidate, shape: tuple[int, ...] = (16, 12)) -> LayerChoices:
    return LayerChoices(name, "linear", shape, candidates or (DENSE, INT8, RANK4, RANK2))


def formats(plan: Plan) -> list[str]:
    return [entry.format for entry in plan.entries]


def example() -> Plan:
    layers = [layer("encoder.0"), layer("encoder.1"), layer("head", DENSE)]
    return plan_formats(layers, error_budget=0.05, metadata={"seed": 3, "budgets": (0.05, None), "model": "tiny ✓"})


# choosing


def test_no_error_means_dense_and_enough_means_smallest():
    layers = [layer("a"), layer("b")]
    assert formats(plan_formats(layers, error_budget=0.0)) == ["dense", "dense"]
    assert formats(plan_formats(layers, error_budget=0.08)) == ["lowrank-int8", "lowrank-int8"]
    assert formats(plan_formats(layers, error_budget=float("inf"))) == ["lowrank-int8", "lowrank-int8"]


def test_entries_carry_all_that_a_candidate_says():
    entry = plan_formats([layer("a", DENSE, RANK2)], error_budget=1.0).entry("a")
    assert entry == PlanEntry(
        "a", "linear", (16, 12), LayerSpec("lowrank-int8", rank=2, bits=8, activations="float"), 60, 0.04
    )


def test_a_candidate_above_the_hull_is_never_on_the_multiplier_path_but_may_top_up():
    # rank 4 lies above the line from dense to int8: only a leftover too small for int8 can make it worth having.
    above = Candidate(LayerSpec("lowrank", rank=8), 900, 0.001)
    assert formats(plan_formats([layer("a", DENSE, INT8, above)], error_budget=0.0015)) == ["lowrank"]
    assert formats(plan_formats([layer("a", DENSE, INT8, above)], error_budget=0.002)) == ["int8"]


def test_layers_that_the_metric_does_not_depend_on_cost_no_error():
    unused = tuple(Candidate(c.spec, c.bytes, 0.0) for c in (DENSE, INT8))
    plan = plan_formats([layer("pooler", *unused), layer("fc")], error_budget=0.0)
    assert formats(plan) == ["int8", "dense"]


def test_cost_is_minimised_where_it_is_given_and_bytes_are_reported():
    slow = Candidate(LayerSpec("int8", bits=8, activations="float"), 260, 0.001, cost=500.0)
    fast = Candidate(LayerSpec("int8", bits=8, activations="int8"), 260, 0.002, cost=260.0)
    plan = plan_formats([layer("a", DENSE, slow, fast)], error_budget=0.0015)
    assert (plan.entry("a").activations, plan.bytes, plan.objective, plan.objective_value) == (
        "float",
        260,
        "cost",
        500.0,
    )
    assert plan_formats([layer("a", DENSE, slow, fast)], error_budget=0.002).entry("a").activations == "int8"


def test_size_budget_alone_gives_the_least_error():
    plan = plan_formats([layer("a"), layer("b")], size_budget=1260)
    assert formats(plan) in (["dense", "int8"], ["int8", "dense"])
    assert (plan.bytes, plan.error, plan.objective, plan.duality_gap) == (1260, 0.002, "error", 0.0)


def test_both_budgets():
    layers = [layer("a"), layer("b")]
    both = plan_formats(layers, error_budget=0.05, size_budget=500)
    assert both.bytes <= 500
    assert both.error <= 0.05
    assert both.bytes == plan_formats(layers, error_budget=0.05).bytes
    with pytest.raises(BudgetError, match=r"^error_budget and size_budget: .*none takes under 520 bytes") as caught:
        plan_formats(layers, error_budget=0.01, size_budget=500)
    assert caught.value.plan.bytes == 520
    assert caught.value.error == pytest.approx(0.004)


def test_both_budgets_when_cost_is_not_bytes():
    small = Candidate(LayerSpec("int8", bits=8, activations="float"), 260, 0.001, cost=2000.0)
    layers = [layer(name, DENSE, small) for name in "abcd"]
    plan = plan_formats(layers, error_budget=1.0, size_budget=2600)
    assert sorted(formats(plan)) == ["dense", "dense", "int8", "int8"]
    assert plan.objective_value == 6000.0


def test_a_budget_out_of_reach_names_and_carries_what_can_be_had():
    with pytest.raises(
        BudgetError, match=r"^error_budget: .*at most 0\.001; the safest reaches 0\.002 with 260 bytes"
    ) as caught:
        plan_formats([layer("a", INT8, RANK2)], error_budget=0.001)
    assert formats(caught.value.plan) == ["int8"]
    assert (caught.value.error, caught.value.exit_code) == (0.002, 4)
    with pytest.raises(BudgetError, match=r"^size_budget: .*at most 59 bytes; the smallest takes 60 bytes") as caught:
        plan_formats([layer("a")], size_budget=59)
    assert formats(caught.value.plan) == ["lowrank-int8"]
    assert "\n" not in str(caught.value)


def test_impossible_candidates_are_passed_over():
    impossible = Candidate(LayerSpec("lowrank", rank=1), 1, float("inf"))
    assert formats(plan_formats([layer("a", impossible, DENSE)], error_budget=1e9)) == ["dense"]
    with pytest.raises(LowRankError, match=r"layer 'b': has no candidate of finite error"):
        plan_formats([layer("a"), layer("b", impossible)], error_budget=1.0)
    with pytest.raises(LowRankError, match=r"layer 'b': has no candidate"):
        plan_formats([layer("a"), LayerChoices("b", "linear", (4, 4), ())], error_budget=1.0)


@pytest.mark.parametrize("bad", [float("nan"), -1.0])
def test_candidates_that_are_not_numbers_are_refused_by_name(bad):
    for fields in ({"error": bad}, {"cost": bad}):
        values = {"spec": LayerSpec("int8", bits=8), "bytes": 9, "error": 0.1, **fields}
        with pytest.raises(NumericsError, match=rf"layer 'b': {next(iter(fields))} of candidate 1 \(int8\)"):
            plan_formats([layer("a"), layer("b", DENSE, Candidate(**values))], error_budget=1.0)


@pytest.mark.parametrize("bad", [float("nan"), -0.1])
def test_budgets_must_be_numbers_from_0(bad):
    with pytest.raises(UsageError, match=r"^error_budget: "):
        plan_formats([layer("a")], error_budget=bad)
    with pytest.raises(UsageError, match=r"^size_budget: "):
        plan_formats([layer("a")], size_budget=bad)
    with pytest.raises(UsageError, match=r"at least one must be given"):
        plan_formats([layer("a")])


def test_layers_of_one_name_are_refused():
    with pytest.raises(LowRankError, match=r"layer 'a': stands in the candidates twice"):
        plan_formats([layer("a"), layer("b"), layer("a")], error_budget=1.0)


def test_no_layers_give_an_empty_plan():
    plan = plan_formats([], error_budget=1.0)
    assert (plan.entries, plan.bytes, plan.error, plan.relative_duality_gap) == ((), 0, 0.0, 0.0)


def test_sums_that_only_just_fit():
    # 0.1 + 0.2 > 0.3 in floating point: the promise is on the sum as Plan.error counts it.
    layers = [
        layer("a", DENSE, Candidate(LayerSpec("int8", bits=8), 1, 0.1)),
        layer("b", DENSE, Candidate(LayerSpec("int8", bits=8), 1, 0.2)),
    ]
    assert plan_formats(layers, error_budget=0.3).error <= 0.3
    assert formats(plan_formats(layers, error_budget=0.1 + 0.2)) == ["int8", "int8"]


def test_the_same_input_gives_the_same_plan_ties_included():
    layers = [layer(f"l{i}") for i in range(30)]
    first = plan_formats(layers, error_budget=0.3)
    assert all(plan_formats(layers, error_budget=0.3).to_json() == first.to_json() for _ in range(3))


def many_layers(count: int, candidates: int) -> list[LayerChoices]:
    rng = np.random.default_rng(0)
    layers = []
    for index in range(count):
        sizes = np.sort(rng.integers(10, 4000, candidates - 1)).tolist()
        errors = (np.sort(rng.exponential(size=candidates - 1))[::-1] * rng.lognormal() / count).tolist()
        ranks = [
            Candidate(LayerSpec("lowrank", rank=rank + 1), size, error)
            for rank, (size, error) in enumerate(zip(sizes, errors, strict=True))
        ]
        dense = Candidate(LayerSpec("dense"), 4000, 0.0)
        layers.append(LayerChoices(f"layer.{index}", "linear", (64, 64), (dense, *ranks)))
    return layers


def test_ten_thousand_layers_of_forty_candidates_come_out_near_the_optimum():
    layers = many_layers(10_000, 40)
    for budgets in ({"error_budget": 0.1}, {"size_budget": 10_000_000}):
        plan = plan_formats(layers, **budgets)
        assert plan.error <= budgets.get("error_budget", np.inf)
        assert plan.bytes <= budgets.get("size_budget", np.inf)
        assert plan.relative_duality_gap is not None
        assert plan.relative_duality_gap < 1e-4


# plans as data


def test_json_goes_there_and_back_byte_for_byte():
    plan = example()
    text = plan.to_json()
    back = Plan.from_json(text, source="plan.json")
    assert back == plan
    assert back.to_json() == text
    assert Plan.from_json(text.encode()).to_json() == text
    assert text.endswith("}\n")
    assert text.isascii()
    assert back.metadata == {"seed": 3, "budgets": [0.05, None], "model": "tiny ✓"}
    assert back.duality_gap == plan.duality_gap == 0.0


def test_metadata_is_a_copy_and_must_be_json():
    budgets = {"error": 0.1}
    plan = plan_formats([layer("a")], error_budget=0.1, metadata={"budgets": budgets})
    budgets["error"] = 0.2
    assert plan.metadata["budgets"] == {"error": 0.1}
    nested: list[object] = []
    for _ in range(5000):
        nested = [nested]
    for bad in ({"x": float("nan")}, {"x": object()}, {"x": nested}, {1: 2, "x": 3}):
        with pytest.raises(LowRankError, match=r"^plan: metadata must be JSON"):
            Plan((), metadata=bad)


def test_editing_by_hand():
    plan = example()
    edited = plan.with_entry("head", format="lowrank-int8", rank=12, activations="int8", bytes=99, error=0.5)
    assert edited.entry("head") == PlanEntry(
        "head", "linear", (16, 12), LayerSpec("lowrank-int8", rank=12, bits=8, activations="int8"), 99, 0.5
    )
    assert edited.entry("encoder.0") == plan.entry("encoder.0")
    assert (edited.objective, edited.objective_value, edited.duality_gap, edited.relative_duality_gap) == (
        "edited",
        None,
        None,
        None,
    )
    assert edited.metadata == plan.metadata
    back = edited.with_entry("head", format="dense")
    assert (back.entry("head").rank, back.entry("head").bits, back.entry("head").activations) == (None, None, None)
    assert Plan.from_json(edited.to_json()) == edited
    with pytest.raises(LowRankError, match=r"plan: has no layer 'haed'"):
        plan.with_entry("haed", rank=1)
    with pytest.raises(LowRankError, match=r"layer 'head': has no field 'ranks'"):
        plan.with_entry("head", ranks=1)
    with pytest.raises(RankError, match=r"layer 'head': rank of format lowrank .*from 1 to 12 .*got 13"):
        plan.with_entry("head", format="lowrank", rank=13)


def test_edited_json_is_taken_and_its_totals_are_counted_anew():
    content = json.loads(example().to_json())
    content["entries"][0].update(format="dense", rank=None, bits=None, activations=None, bytes=1000, error=0)
    plan = Plan.from_json(json.dumps(content))
    assert plan.entry("encoder.0").format == "dense"
    assert plan.bytes == sum(entry["bytes"] for entry in content["entries"])
    assert (plan.objective, plan.duality_gap) == ("edited", None)
    minimal = json.dumps({"format_version": 1, "entries": content["entries"]})
    assert Plan.from_json(minimal).entries == plan.entries


@pytest.mark.parametrize(
    ("field", "literal", "match"),
    [
        *[("rank", value, "rank") for value in ("1000000000000", "0", "-1", '"8"', "true", "8.0", "13", "null", "[2]")],
        ("rank", "1" + "0" * 90, "rank"),
        ("bits", "1", "bits"),
        ("bits", "9", "bits"),
        ("bits", "8.0", "bits"),
        ("bits", "null", "bits"),
        ("format", '"int4+lowrank"', "newer lowrank"),
        ("format", '"lowrank-int4"', "newer lowrank"),
        ("format", "7", "format"),
        ("format", '"dense"', "rank of format dense must be null"),
        ("format", '"int8"', "rank of format int8 must be null"),
        ("format", '"lowrank"', "bits of format lowrank must be null"),
        ("activations", '"int16"', "activations"),
        ("activations", "8", "activations"),
        ("bytes", "-1", "bytes"),
        ("bytes", "1.5", "bytes"),
        ("bytes", "true", "bytes"),
        ("error", "-0.5", "error"),
        ("error", '"0"', "error"),
        ("error", "null", "error"),
        ("error", "false", "error"),
        ("shape", "[16, -12]", "shape"),
        ("shape", "[]", "shape"),
        ("shape", "16", "shape"),
        ("shape", "[16, 12.0]", "shape"),
        ("kind", "null", "kind"),
        ("kind", '""', "kind"),
    ],
)
def test_impossible_entries_are_refused_with_the_layers_name(field, literal, match):
    entry = {
        "name": "encoder.0",
        "kind": "linear",
        "shape": [16, 12],
        "format": "lowrank-int8",
        "rank": 8,
        "bits": 8,
        "activations": "int8",
        "bytes": 400,
        "error": 0.5,
    }
    text = json.dumps({"format_version": 1, "entries": [entry]})
    assert Plan.from_json(text).entry("encoder.0").rank == 8
    before = f'"{field}": {json.dumps(entry[field])}'
    assert text.count(before) == 1
    with pytest.raises(LowRankError, match=match) as caught:
        Plan.from_json(text.replace(before, f'"{field}": {literal}'))
    assert "'encoder.0'" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert caught.value.exit_code == 3
    assert isinstance(caught.value, RankError) == (match in ("rank", "bits") or "must be null" in match)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"rank": 2', '"rank": 1e400'),
        ('"rank": 2', '"rank": NaN'),
        ('"rank": 2', '"rank": ' + "9" * 5000),
        ('"rank": 2', '"rank": 2, "rank": 2'),
        ('"rank": 2', '"ranks": 2'),
        ('"rank": 2', '"rank": 2, "lora": 1'),
        ('"format_version": 1', '"format_version": 2'),
        ('"format_version": 1', '"format_version": true'),
        ('"format_version": 1', '"format_version": "1"'),
        ('"format_version": 1', '"format": 1'),
        ('"metadata": {}', '"metadata": []'),
        ('"metadata": {}', '"metadata": ' + "[" * 100_000 + "]" * 100_000),
        ('"objective": "bytes"', '"objective": "joy"'),
        ('"duality_gap": 0.0', '"duality_gap": -1'),
        ('"objective_value": 60.0', '"objective_value": "60"'),
        ('"name": "a"', '"name": ""'),
        ('"name": "a"', '"name": 3'),
        ("{", "\ufeff{"),
        ("{", "[1, {"),
    ],
)
def test_text_that_is_no_plan_is_refused(old, new):
    text = plan_formats([layer("a", RANK2)], error_budget=1.0).to_json()
    assert old in text
    with pytest.raises(LowRankError) as caught:
        Plan.from_json(text.replace(old, new, 1), source="plan.json")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    "text", ["[]", "null", '"plan"', '{"format_version": 1, "entries": {}}', '{"format_version": 1, "entries": [3]}']
)
def test_other_json_is_no_plan(text):
    with pytest.raises(CheckpointError, match=r"^plan\.json: "):
        Plan.from_json(text, source="plan.json")


def test_a_layer_stands_once():
    entry = example().entry("head")
    with pytest.raises(CheckpointError, match=r"layer 'head': stands there twice"):
        Plan((entry, entry))


def test_a_newer_plan_says_so():
    with pytest.raises(CheckpointError, match=r"format_version 2 was written by a newer lowrank"):
        Plan.from_json('{"format_version": 2, "entries": []}')


def test_names_are_escaped_in_messages():
    with pytest.raises(RankError) as caught:
        PlanEntry("a\x1b[31m\nb", "linear", (4, 4), LayerSpec("lowrank", rank=5), 1, 0.0)
    assert str(caught.value).isprintable()


def test_convolution_kernels_count_as_out_by_rest():
    assert PlanEntry("conv", "conv", (8, 3, 3, 3), LayerSpec("lowrank", rank=8), 1, 0.0).rank == 8
    with pytest.raises(RankError, match=r"from 1 to 8 "):
        PlanEntry("conv", "conv", (8, 3, 3, 3), LayerSpec("lowrank", rank=9), 1, 0.0)
    with pytest.raises(RankError, match=r"from 1 to 0 "):
        PlanEntry("empty", "linear", (0, 4), LayerSpec("lowrank", rank=1), 0, 0.0)


def test_a_plan_for_another_model_is_refused():
    plan = example()
    shapes = {"encoder.0": (16, 12), "encoder.1": [16, 12], "head": (16, 12), "other": (3,)}
    plan.check_model(shapes)
    with pytest.raises(LowRankError, match=r"layer 'encoder\.1': the model has no such layer"):
        plan.check_model({name: shape for name, shape in shapes.items() if name != "encoder.1"})
    with pytest.raises(
        LowRankError, match=r"layer 'head': shape \[16, 12\] in the plan but \[12, 16\] in the model"
    ) as caught:
        plan.check_model({**shapes, "head": (12, 16)})
    assert caught.value.exit_code == 3


def test_schemes_of_convolutions_are_checked_and_kept() -> None:
    entry = PlanEntry(
        "conv",
        "conv",
        (8, 4, 3, 5),
        LayerSpec("lowrank-int8", rank=12, bits=8, activations="int8", scheme="spatial"),
        96,
        0.01,
    )
    plan = Plan((entry, PlanEntry("fc", "linear", (8, 4), LayerSpec("lowrank", rank=2), 96, 0.01)))
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.to_json().count('"scheme"') == 1
    # A plan without the field, as by hand: the channel form.
    assert PlanEntry("conv", "conv", (8, 4, 3), LayerSpec("lowrank", rank=2), 96, 0.01).scheme == "channel"
    for scheme, rank, shape in (("spatial", 13, (8, 4, 3, 5)), ("channel", 9, (8, 4, 3, 5))):
        with pytest.raises(RankError, match="rank of format"):
            PlanEntry("conv", "conv", shape, LayerSpec("lowrank", rank=rank, scheme=scheme), 96, 0.01)
    for kind, shape, name, scheme in (
        ("conv", (8, 4, 3), "lowrank", "spatial"),
        ("conv", (8, 4, 3, 5), "int8", "channel"),
        ("linear", (8, 4), "lowrank", "channel"),
        ("conv", (8, 4, 3, 5), "lowrank", "both"),
    ):
        factored = name == "lowrank"
        with pytest.raises(LowRankError, match="scheme of a"):
            PlanEntry(
                "conv",
                kind,
                shape,
                LayerSpec(name, rank=2 if factored else None, bits=None if factored else 8, scheme=scheme),
                96,
                0.01,
            )
    changed = plan.with_entry("conv", format="int8")
    assert (changed.entry("conv").rank, changed.entry("conv").scheme) == (None, None)
