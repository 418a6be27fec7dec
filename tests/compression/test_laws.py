"""The laws: what every registered format owes on every registered kind of layer that it builds.

A new format is tested here by being registered, without an edit; a new kind by an example below.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from helpers import assert_same_state, seeded
from torch import Tensor, nn

import lowrank
from lowrank.calibration.batches import Batch
from lowrank.calibration.experts import collect_expert_inputs
from lowrank.calibration.inputs import collect_statistics
from lowrank.compression.formats import DENSE, FORMATS, Request, WeightFormat
from lowrank.compression.layer_data import LayerData
from lowrank.compression.overrides import forced_specs
from lowrank.compression.plan import Plan, PlanEntry
from lowrank.compression.probes import stored_bytes
from lowrank.errors import AdapterError, LowRankError, UsageError
from lowrank.layers import CompressedLayer, compressed_layers
from lowrank.layers.base import ACTIVATIONS, INTEGER_ACTIVATIONS
from lowrank.layers.spec import LayerSpec
from lowrank.lora import LoRAConfig
from lowrank.numerics.moments import InputStatistics, TokenCounts
from lowrank.targets import kind_of, layer_kinds
from lowrank.targets.survey import survey


class Holder(nn.Module):
    """A layer and a head behind it; of a layer that gives more than a tensor the first counts."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Tanh()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        attends = isinstance(self.layer, nn.MultiheadAttention) or hasattr(self.layer, "num_heads")
        output = self.layer(x, x, x) if attends else self.layer(x)
        while isinstance(output, tuple):
            output = output[0]
        return self.head(output)


@dataclass(frozen=True)
class Example:
    """A module of some kind, and inputs of so many samples."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]


def floats(*shape: int) -> Callable[[int], Tensor]:
    def draw(samples: int) -> Tensor:
        # Neither white nor centred, so that data-aware factors differ from plain ones.
        noise = torch.randn(samples, *shape, generator=seeded(1))
        return noise * torch.linspace(1.0, 0.2, shape[-1]) + 0.3

    return draw


def ids(rows: int, length: int) -> Callable[[int], Tensor]:
    return lambda samples: torch.arange(samples * length).reshape(samples, length) % rows


class Standardised(nn.Linear):
    """Does with its weight what only it knows."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(dim=1, keepdim=True)
        return nn.functional.linear(input, weight / weight.std(dim=1, keepdim=True), self.bias)


class Experts(nn.Module):
    """Four experts of a mixture; a token goes to one by its largest number out of three, so that the last gets none."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 4
        self.gate_up_proj = nn.Parameter(torch.randn(4, 48, 40))
        self.down_proj = nn.Parameter(torch.randn(4, 36, 24))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        chosen = tokens[:, :3].argmax(dim=1)
        result = tokens.new_zeros(len(tokens), 36)
        for expert in range(self.num_experts):
            (rows,) = torch.where(chosen == expert)
            gate, up = nn.functional.linear(tokens[rows], self.gate_up_proj[expert]).chunk(2, dim=-1)
            result[rows] = nn.functional.linear(torch.tanh(gate) * up, self.down_proj[expert])
        return result.view(*x.shape[:-1], 36)


EXAMPLES: dict[str, Example] = {
    "linear": Example(lambda: nn.Linear(40, 48), floats(5, 40)),
    "linear-wide-no-bias": Example(lambda: nn.Linear(64, 24, bias=False), floats(64)),
    "conv-2d": Example(lambda: nn.Conv2d(8, 16, 3, padding=1), floats(8, 7, 7)),
    "conv-2d-groups": Example(lambda: nn.Conv2d(16, 32, (3, 2), stride=2, groups=2, bias=False), floats(16, 8, 8)),
    "conv-1d": Example(lambda: nn.Conv1d(8, 16, 5, dilation=2), floats(8, 20)),
    "embedding": Example(lambda: nn.Embedding(96, 24), ids(96, 12)),
    "recurrent-lstm": Example(lambda: nn.LSTM(12, 16, num_layers=2, batch_first=True), floats(6, 12)),
    "recurrent-gru-cell": Example(lambda: nn.GRUCell(12, 16), floats(12)),
    "decoded-conv-transposed": Example(lambda: nn.ConvTranspose1d(8, 12, 5), floats(8, 9)),
    "decoded-embedding-bag": Example(lambda: nn.EmbeddingBag(96, 24), ids(96, 12)),
    "decoded-own-forward": Example(lambda: Standardised(40, 12), floats(40)),
    "experts": Example(Experts, floats(5, 40)),
    "attention": Example(lambda: nn.MultiheadAttention(16, 4, batch_first=True), floats(6, 16)),
}


def model_of(example: str) -> Holder:
    torch.manual_seed(0)
    made = EXAMPLES[example]
    layer = made.make()
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.ndim > 1:
                # A falling spectrum, as trained weights have, so that factors are worth something.
                left, sigma, right = torch.linalg.svd(parameter.flatten(1), full_matrices=False)
                sigma = sigma * torch.logspace(0, -2, len(sigma))
                parameter.copy_((left * sigma @ right).view(parameter.shape))
    return Holder(layer, 1).eval()


def data_of(model: nn.Module, example: str) -> LayerData:
    (target,) = survey(model).targets
    known = experts = None
    if target.kind.stacked:
        batches = [Batch((EXAMPLES[example].inputs(48),))]
        experts = collect_expert_inputs(model, batches, {target.name: target.kind.weights(target.owner)})[target.name]
    if target.kind.observer(target.owner) is not None:
        known = collect_statistics(model, [EXAMPLES[example].inputs(48)], {target.name: target.owner})[target.name]
    return LayerData(
        target,
        known if isinstance(known, InputStatistics) else None,
        known if isinstance(known, TokenCounts) else None,
        experts=experts,
    )


def sampled_specs(format: WeightFormat, data: LayerData) -> list[LayerSpec]:
    """The first, a middle and the last candidate, in each way of taking activations."""
    offered = [
        spec for spec in format.specs(data, Request("auto")) if stored_bytes(data, spec) < stored_bytes(data, DENSE)
    ]
    by_mode: dict[str | None, list[LayerSpec]] = {}
    for spec in offered:
        by_mode.setdefault(spec.activations, []).append(spec)
    return [specs[at] for specs in by_mode.values() for at in sorted({0, len(specs) // 2, len(specs) - 1})]


def fitting() -> Iterator[tuple[str, str]]:
    for name, format in FORMATS.items():
        for example in EXAMPLES:
            kind = kind_of(EXAMPLES[example].make())
            if kind is not None and not format.dense and kind.name in format.layers:
                yield name, example


CASES = [pytest.param(*case, id="-".join(case)) for case in fitting()]


@dataclass(frozen=True)
class Case:
    format: WeightFormat
    model: Holder
    data: LayerData
    specs: list[LayerSpec]
    inputs: Tensor

    def applied(self, spec: LayerSpec) -> Holder:
        """The model with the layer in this spec."""
        entry = PlanEntry(
            self.data.name, self.data.kind.name, self.data.target.shape, spec, stored_bytes(self.data, spec), 0.0
        )
        made = lowrank.apply_plan(self.model, Plan((entry,)))
        assert isinstance(made, Holder)
        return made


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    name, example = request.param
    model = model_of(example)
    data = data_of(model, example)
    specs = sampled_specs(FORMATS[name], data)
    assert specs, f"{name} offers nothing smaller than {example}"
    return Case(FORMATS[name], model, data, specs, EXAMPLES[example].inputs(16))


every_case = pytest.mark.parametrize(
    "case", [param.values for param in CASES], indirect=True, ids=[p.id for p in CASES]
)


def test_every_kind_that_a_format_builds_has_an_example() -> None:
    built = {kind for format in FORMATS.values() for kind in format.layers}
    shown = {kind.name for example in EXAMPLES.values() if (kind := kind_of(example.make())) is not None}
    assert built <= shown
    assert built <= {kind.name for kind in layer_kinds()}


def test_names_are_unique_and_a_second_registration_is_refused() -> None:
    assert FORMATS and layer_kinds()
    for name, format in FORMATS.items():
        assert format.name == name
        with pytest.raises(UsageError, match="registered already"):
            lowrank.compression.formats.register_format(format)
    for kind in layer_kinds():
        with pytest.raises(UsageError, match="registered already"):
            lowrank.targets.register_kind(kind)


@every_case
def test_predicted_bytes_are_built_bytes(case: Case) -> None:
    for spec in case.specs:
        built = case.format.build(case.data, spec)[case.data.name]
        assert isinstance(built, CompressedLayer)
        assert built.stored_bytes == case.format.stored_bytes(case.data, spec) < stored_bytes(case.data, DENSE), spec


@every_case
def test_a_built_layer_says_what_it_is(case: Case) -> None:
    for spec in case.specs:
        built = case.format.build(case.data, spec)[case.data.name]
        assert isinstance(built, tuple(case.format.layers[case.data.kind.name]))
        assert (built.format, built.rank, built.bits) == (spec.format, spec.rank, spec.bits)
        assert LayerSpec.from_json(built.config() | {"activations": spec.activations}) == spec
        empty = type(built).from_config(built.config(), device="meta")
        assert {name: (t.shape, t.dtype) for name, t in empty.state_dict().items()} == {
            name: (t.shape, t.dtype) for name, t in built.state_dict().items()
        }


@every_case
def test_predicted_local_errors_are_those_of_the_built_weights(case: Case) -> None:
    for spec in case.specs:
        built = case.format.build(case.data, spec)[case.data.name]
        assert isinstance(built, CompressedLayer)
        weight_error, activation_error = case.data.errors_of(built)
        measured = (weight_error if activation_error is None else activation_error) ** 2
        predicted = case.format.local_error(case.data, spec)
        # Rounding errors of components are taken to be independent, and the ridge moves truncation a little.
        assert 0.4 * measured - 1e-4 <= predicted <= 2.5 * measured + 1e-4, spec


@every_case
def test_the_forward_pass_is_that_of_the_weight(case: Case) -> None:
    """With float activations to rounding, with integer ones within what rounding every input to 255 levels can do."""
    dense = copy.deepcopy(case.model)
    for spec in case.specs:
        applied = case.applied(spec)
        layer = applied.layer
        assert isinstance(layer, CompressedLayer)
        with torch.no_grad():
            found = applied(case.inputs)
            if spec.parts is not None or case.data.kind.stacked:
                # Matrices of few bits are far from the dense ones, but the layer does what theirs do.
                dense.layer = layer.dequantize()  # type: ignore[operator]
            elif not case.data.kind.composite:
                weight = layer.dense_weight().detach().reshape(case.data.target.shape)
                dense.layer.weight.copy_(weight)  # type: ignore[union-attr, operator]
                if getattr(dense.layer, "bias", None) is not None:
                    dense.layer.bias.copy_(layer.bias)  # type: ignore[union-attr, operator, arg-type]
            expected = dense(case.inputs)
        distance = float((found - expected).norm() / expected.norm())
        whole = case.data.kind.composite and spec.parts is None and not case.data.kind.stacked
        rounded = whole or spec.activations == INTEGER_ACTIVATIONS
        assert distance <= (0.05 if rounded else 1e-5), (spec, distance)


@every_case
def test_plans_hold_it_and_read_it_back(case: Case) -> None:
    for spec in case.specs:
        entry = PlanEntry("layer", case.data.kind.name, case.data.target.shape, spec, 1, 0.0)
        plan = Plan((entry,))
        assert Plan.from_json(plan.to_json()) == plan
        assert plan.entries[0].spec == spec


@every_case
def test_saved_and_loaded_it_answers_bit_for_bit(case: Case, tmp_path: Path) -> None:
    for index, spec in enumerate(case.specs):
        applied = case.applied(spec)
        lowrank.checkpoint.save_compressed(applied, tmp_path / str(index))
        loaded = lowrank.load_model(tmp_path / str(index), model=case.model)
        with torch.no_grad():
            assert torch.equal(loaded(case.inputs), applied(case.inputs)), spec
        assert_same_state(applied, loaded)
        assert [layer.format for layer in compressed_layers(loaded).values()] == [spec.format]


@every_case
def test_a_copy_is_its_own(case: Case) -> None:
    applied = case.applied(case.specs[0])
    copied = copy.deepcopy(applied)
    with torch.no_grad():
        before = applied(case.inputs)
        for tensor in copied.state_dict().values():
            tensor.zero_()
        assert torch.equal(applied(case.inputs), before)


@every_case
def test_overrides_ask_for_it_by_name(case: Case) -> None:
    layers = {case.data.name: case.data}
    offered = forced_specs({"layer": case.format.name}, layers)[case.data.name]
    assert {spec.format for spec in offered} == {case.format.name}
    for spec in case.specs:
        wanted = {"format": spec.format} | {name: getattr(spec, name) for name in case.format.fields}
        assert forced_specs({"layer": wanted}, layers)[case.data.name] == [spec]


@every_case
def test_fields_that_it_does_not_take_are_refused(case: Case) -> None:
    wrong = {
        "rank": 10**6,
        "bits": 9,
        "activations": "int3",
        "scheme": "odd",
        "group": -1,
        "rounding": "odd",
        "zero_point": "odd",
        "parts": "odd",
    }
    assert set(wrong) == {item.name for item in fields(LayerSpec)} - {"format"}
    for name, value in wrong.items():
        with pytest.raises(LowRankError, match=name):
            PlanEntry(
                "layer", case.data.kind.name, case.data.target.shape, replace(case.specs[0], **{name: value}), 1, 0.0
            )


@every_case
def test_adapters_on_it_merge_to_the_sum_or_say_why_not(case: Case) -> None:
    applied = case.applied(case.specs[-1])
    config = LoRAConfig(r=2, target_modules=["layer"])
    if case.data.kind.composite:
        with pytest.raises(UsageError, match="layer"):
            lowrank.add_lora(applied, config, seed=0)
        return
    adapted = lowrank.add_lora(applied, config, seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=seeded(3)))
        separate = adapted(case.inputs)
        before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
        if case.data.blocks > 1 or case.specs[-1].scheme not in (None, case.data.schemes[0]):
            # An adapter mixes channels of different groups, and its kernel is no product of two one-dimensional ones.
            with pytest.raises(AdapterError, match="layer"):
                lowrank.merge_lora(adapted, requantize=True)
            return
        merged = lowrank.merge_lora(adapted, requantize=True)
        distance = float((merged(case.inputs) - separate).norm() / separate.norm())
        # The sum is rounded anew, with steps that double with each bit less.
        bits = case.specs[-1].bits or 8
        assert distance <= max(0.05, 1.5 * 2.0**-bits)
        lowrank.unmerge_lora(adapted)
        assert_same_state(adapted, before)


@every_case
def test_healing_trains_it_and_keeps_its_form(case: Case) -> None:
    applied = case.applied(case.specs[0])
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in applied.state_dict().items()}
    layer = applied.layer
    assert isinstance(layer, CompressedLayer)
    if not layer.trains_rounded and not any(parameter.requires_grad for parameter in applied.parameters()):
        # What it holds is codes that no gradient reaches, and it says so.
        with pytest.raises(UsageError, match="no factors to train"):
            lowrank.heal(applied, case.model, [case.inputs], steps=2, progress=False)
        return
    healed = lowrank.heal(applied, case.model, [case.inputs, case.inputs + 0], steps=2, progress=False, seed=0)
    assert healed.report.error_after <= healed.report.error_before
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in healed.model.state_dict().items()} == shapes


@pytest.mark.slow
@every_case
def test_compiled_and_exported_it_answers_bit_for_bit(case: Case) -> None:
    applied = case.applied(case.specs[0]).eval()
    torch.compiler.reset()
    with torch.no_grad():
        expected = applied(case.inputs)
        assert torch.equal(torch.compile(applied, backend="aot_eager", fullgraph=True)(case.inputs), expected)
        exported = torch.export.export(applied, (case.inputs,))
        assert torch.equal(exported.module()(case.inputs), expected)


def test_activations_have_one_name_each() -> None:
    assert len(set(ACTIVATIONS)) == len(ACTIVATIONS) == 2
