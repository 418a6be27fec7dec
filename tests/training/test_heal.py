"""heal: less error at the same bytes, formats kept, nobody else's model touched."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import seeded
from residual_model import Block, Net, inputs
from torch import nn
from training_batches import original_and_compressed

import lowrank
from lowrank.calibration.batches import Batch
from lowrank.calibration.evaluation import Evaluator
from lowrank.errors import CalibrationError, UsageError
from lowrank.layers import (
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedLinear,
    QuantizedLowRankConv1d,
    QuantizedLowRankConv2d,
    QuantizedLowRankLayer,
    SVDCompressedLinear,
)
from lowrank.training import heal
from lowrank.training.blocks import repeated_blocks
from lowrank.training.distillation import Distillation, tapped_modules
from lowrank.training.forms import RoundedForm, TrainableForm
from lowrank.training.sample_pool import SamplePool


def compressed(original: nn.Module, kind: str, rank: int = 8) -> nn.Module:
    model = copy.deepcopy(original)
    for block in model.blocks:
        for name in ("up", "down"):
            layer: nn.Module = SVDCompressedLinear.from_linear(getattr(block, name), rank=rank)
            if kind == "lowrank-int8":
                layer = QuantizedLowRankLayer.from_factors(layer)
            elif kind == "int8":
                layer = QuantizedLinear.from_linear(getattr(block, name), bits=3)
            setattr(block, name, layer)
    return model


def error(model: nn.Module, original: nn.Module, seed: int) -> float:
    batches = [Batch((x,), size=len(x)) for x in inputs(128, seed)]
    return Evaluator(original, batches, "output").measure(model).value


@pytest.mark.parametrize(("kind", "gain"), [("lowrank", 0.55), ("lowrank-int8", 0.6), ("int8", 0.5)])
def test_healing_lowers_the_error_on_data_not_seen_at_the_same_bytes(kind: str, gain: float) -> None:
    original = Net()
    model = compressed(original, kind)
    states = copy.deepcopy(original.state_dict()), copy.deepcopy(model.state_dict())
    result = heal(model, original, inputs(), steps=150, lr=5e-3, progress=False)
    before, after = error(model, original, 77), error(result.model, original, 77)
    assert after < gain * before
    assert result.report.kept == "after"
    assert result.report.error_after < result.report.error_before
    healed = result.model.state_dict()
    assert {name: (t.shape, t.dtype) for name, t in healed.items()} == {
        name: (t.shape, t.dtype) for name, t in states[1].items()
    }
    for state, owner in zip(states, (original, model), strict=True):
        assert all(torch.equal(state[name], tensor) for name, tensor in owner.state_dict().items())
    kinds = [type(module) for module in model.modules()]
    assert [type(module) for module in result.model.modules()] == kinds
    assert [p.requires_grad for p in result.model.parameters()] == [p.requires_grad for p in model.parameters()]
    codes = [name for name in healed if name.endswith("codes") and not torch.equal(healed[name], states[1][name])]
    assert bool(codes) == (kind != "lowrank")


def test_the_same_seed_gives_the_same_bytes() -> None:
    original = Net()
    model = compressed(original, "lowrank")
    one = heal(model, original, inputs(), steps=5, progress=False)
    torch.manual_seed(123)
    two = heal(model, original, inputs(), steps=5, progress=False)
    assert one.report == two.report
    assert one.report.to_json() == two.report.to_json()
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))


def test_training_that_harms_is_thrown_away() -> None:
    original = Net()
    model = compressed(original, "lowrank", rank=20)
    result = heal(model, original, inputs(), steps=3, lr=5.0, progress=False)
    assert result.report.kept == "before"
    assert result.report.error_after == result.report.error_before
    assert result.model is not model
    assert all(torch.equal(a, b) for a, b in zip(result.model.parameters(), model.parameters(), strict=True))


def test_modes_and_flags_come_back() -> None:
    original = Net().train()
    model = compressed(original, "lowrank")
    model.blocks[0].up.left.requires_grad_(False)
    result = heal(model, original, inputs(), steps=2, progress=False)
    assert original.training
    assert not result.model.blocks[0].up.left.requires_grad
    assert result.model.blocks[0].up.right.requires_grad
    assert result.model.blocks[0].up.truncation_error is None


def test_a_language_model_is_matched_by_kl_on_varied_text() -> None:
    pytest.importorskip("transformers")
    from tiny_models import make_causal_model

    original = make_causal_model()
    model = copy.deepcopy(original)
    for layer in model.model.layers:
        layer.mlp.up_proj = SVDCompressedLinear.from_linear(layer.mlp.up_proj, rank=6)
        layer.mlp.down_proj = SVDCompressedLinear.from_linear(layer.mlp.down_proj, rank=6)
    ids = torch.randint(4, 25, (96, 9), generator=seeded())
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(16)]
    report = heal(model, original, batches, epochs=12, lr=5e-3, vary=True, progress=False).report
    assert (report.metric, report.kept, report.steps) == ("kl", "after", 36)
    assert report.error_after < 0.8 * report.error_before
    assert (report.samples, report.samples_held_out) == (86, 10)


def test_taps_are_the_blocks_that_both_have_else_the_compressed_layers() -> None:
    original = Net()
    assert repeated_blocks(original) == ["blocks.0", "blocks.1", "blocks.2"]
    assert tapped_modules(compressed(original, "lowrank"), original) == ["blocks.0", "blocks.1", "blocks.2"]
    flat = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    smaller = nn.Sequential(SVDCompressedLinear.from_linear(flat[0], rank=2), flat[1])
    assert tapped_modules(smaller, flat) == ["0"]


def test_the_loss_is_zero_for_the_original_and_padding_counts_nowhere() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.body = nn.Embedding(20, 8), nn.ModuleList([Block(8), Block(8)])

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
            x = self.embed(input_ids)
            for block in self.body:
                x = block(x)
            return {"last_hidden_state": x}

    torch.manual_seed(0)
    original = Tokens().eval()
    assert float(Distillation(original, original, 1.0).loss(_tokens([[1, 5, 6], [1, 7, 0]])).detach()) == 0.0
    other = copy.deepcopy(original)
    with torch.no_grad():
        other.embed.weight[0] += 3.0
    loss = Distillation(other, original, 1.0)
    assert float(loss.loss(_tokens([[1, 5, 6], [1, 7, 0]])).detach()) == 0.0
    assert float(loss.loss(_tokens([[1, 5, 6], [1, 0, 7]])).detach()) > 0.0


def test_the_original_sees_a_batch_that_comes_again_once() -> None:
    original = Net().eval()
    model = compressed(original, "lowrank")
    calls = []
    original.register_forward_hook(lambda *_: calls.append(1))
    batch, other = (Batch((x,), size=len(x)) for x in inputs(64))
    kept, fresh = Distillation(model, original, 1.0, again=(batch,)), Distillation(model, original, 1.0)
    first = kept.loss(batch)
    assert torch.equal(first, kept.loss(batch)) and torch.equal(first, fresh.loss(batch))
    assert len(calls) == 2
    kept.loss(other), kept.loss(other)
    assert len(calls) == 4


def _tokens(rows: list[list[int]]) -> Batch:
    ids = torch.tensor(rows)
    mask = torch.ones_like(ids)
    mask[:, -1] = (ids[:, -1] != 0).long()
    return Batch((), {"input_ids": ids, "attention_mask": mask}, len(rows))


def test_the_pool_gives_every_sample_once_an_epoch_unpadded_and_in_the_ids_of_the_vocabulary() -> None:
    generator = seeded()
    rows = [torch.randint(3, 50, (int(length),), generator=generator) for length in torch.randint(2, 12, (40,))]
    rows = [torch.cat([torch.tensor([1]), row, torch.tensor([2])]) for row in rows]
    batches = []
    for start in range(0, 40, 8):
        part = rows[start : start + 8]
        ids = nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=49)
        mask = torch.stack([(torch.arange(ids.shape[1]) < len(row)).long() for row in part])
        batches.append(Batch((), {"input_ids": ids, "attention_mask": mask}, 8))
    plain = SamplePool.of(batches)
    seen = []
    for batch in plain.epoch(7, seeded(1)):
        for ids, mask in zip(batch.kwargs["input_ids"], batch.kwargs["attention_mask"], strict=True):
            seen.append(tuple(ids[mask.bool()].tolist()))
            assert set(ids[~mask.bool()].tolist()) <= {49}
    assert sorted(seen) == sorted(tuple(row.tolist()) for row in rows)
    varied = SamplePool.of(batches, vocabulary=60)
    changed = 0
    for batch in varied.epoch(7, seeded(2)):
        for ids, mask in zip(batch.kwargs["input_ids"], batch.kwargs["attention_mask"], strict=True):
            row = ids[mask.bool()]
            assert int(row[0]) == 1 and int(row[-1]) == 2 and 0 <= int(row.min()) <= int(row.max()) < 60
            changed += tuple(row.tolist()) not in seen
    assert 15 < changed < 40


def integer_layers() -> list[tuple[nn.Module, torch.Tensor]]:
    """Every kind that is rounded while it is trained, with an input."""
    torch.manual_seed(0)
    linear, line, image = nn.Linear(12, 9), nn.Conv1d(6, 8, 3, groups=2), nn.Conv2d(6, 8, 3, padding=1)
    x, signal, picture = (torch.randn(*shape, generator=seeded(4)) for shape in ((7, 12), (3, 6, 11), (3, 6, 8, 7)))
    return [
        (QuantizedLowRankLayer.from_linear(linear, rank=5), x),
        (QuantizedLinear.from_linear(linear), x),
        (QuantizedLinear.from_linear(linear, bits=4), x),
        (QuantizedLowRankConv1d.from_conv1d(line, rank=2), signal),
        (QuantizedLowRankConv2d.from_conv2d(image, rank=3), picture),
        (QuantizedLowRankConv2d.from_conv2d(image, rank=4, scheme="spatial"), picture),
        (QuantizedConv1d.from_conv1d(line), signal),
        (QuantizedConv2d.from_conv2d(image), picture),
    ]


@pytest.mark.parametrize("index", range(8))
def test_rounding_in_the_forward_pass_is_the_rounding_of_the_format(index: int) -> None:
    layer, x = integer_layers()[index]
    form = RoundedForm(layer)
    again = form.rounded()
    state = layer.state_dict()
    for name, tensor in again.state_dict().items():
        # The product of two steps is rounded once more.
        torch.testing.assert_close(tensor, state[name], rtol=0.0 if "codes" in name else 1e-6, atol=0.0)
    names = ("left", "right") if form.factored else ("weight",)
    before = [form.floats.get_parameter(name).detach().clone() for name in names]
    with torch.no_grad():
        for name in names:
            parameter = form.floats.get_parameter(name)
            parameter.mul_(1.3).add_(torch.randn(parameter.shape, generator=seeded(8)) * 0.01)
    rounded = form.rounded()
    assert type(rounded) is type(layer) and rounded.stored_bytes == layer.stored_bytes
    # The float layer of the codes, in float64, is the judge.
    judge = rounded.dequantize().double()
    torch.testing.assert_close(form(x).detach().double(), judge(x.double()).detach(), rtol=1e-5, atol=1e-5)
    form(x).sum().backward()
    judge(x.double()).sum().backward()
    # Straight through: the gradient of what was rounded, as if it were free. The two sides of a factored layer share their
    # scale another way in the codes, component by component.
    for name in names:
        own, wanted = form.floats.get_parameter(name), judge.get_parameter(name)
        assert own.grad is not None and wanted.grad is not None
        products = (own.grad.double() * own.detach().double()).sum(), (wanted.grad * wanted.detach()).sum()
        torch.testing.assert_close(*products, rtol=0.05, atol=0.05)
    assert all(not torch.equal(form.floats.get_parameter(name), old) for name, old in zip(names, before, strict=True))


def test_dense_int8_starts_from_the_numbers_before_they_were_rounded_where_they_are_its_own() -> None:
    torch.manual_seed(0)
    dense, other = nn.Linear(12, 9), nn.Linear(12, 9)
    layer = QuantizedLinear.from_linear(dense)
    assert torch.equal(RoundedForm(layer, dense).floats.weight, dense.weight)
    assert torch.equal(RoundedForm(layer, other).floats.weight, layer.dequantize().weight)


def test_images_and_other_floats_are_varied_only_where_that_is_asked_for() -> None:
    images = torch.randn(24, 3, 16, 16, generator=seeded(2))
    batches = [Batch((part,), size=len(part)) for part in images.split(8)]
    plain = SamplePool.of(batches, vary=False)
    assert not plain.varies
    seen = torch.cat([batch.args[0] for batch in plain.epoch(6, seeded(1))])
    assert sorted(seen.sum(dim=(1, 2, 3)).tolist()) == sorted(images.sum(dim=(1, 2, 3)).tolist())
    pool = SamplePool.of(batches)
    assert pool.varies
    first, again, other = (torch.cat([b.args[0] for b in pool.epoch(6, seeded(n))]) for n in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == images.shape and float(first.abs().max()) <= float(images.abs().max())
    # Integers mean something: they are left alone.
    mixed = [Batch((part, torch.arange(len(part))), size=len(part)) for part in images.split(8)]
    assert not SamplePool.of(mixed).varies


def test_arguments_and_data_that_mean_nothing_are_refused() -> None:
    original = Net()
    model = compressed(original, "lowrank")
    for arguments, message in (
        ({"steps": 1, "epochs": 1}, "at most one of them"),
        ({"steps": 0}, "steps: must be an integer of at least 1, got 0"),
        ({"lr": float("nan")}, "lr: must be a finite number above 0"),
        ({"what": "all"}, "what: must be one of auto, factors, adapters"),
        ({"what": "adapters"}, r"no adapters to train; add one with lowrank\.add_lora"),
    ):
        with pytest.raises(UsageError, match=message):
            heal(model, original, inputs(), progress=False, **arguments)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(CalibrationError, match="at least 8 are needed"):
        heal(model, original, [torch.randn(4, 24)], progress=False)
    with pytest.raises(CalibrationError, match="is empty"):
        heal(model, original, [], progress=False)
    with pytest.raises(UsageError, match="no factors to train; compress the model first"):
        TrainableForm(nn.Sequential(nn.Linear(4, 4, bias=False)), "factors")


def test_healing_leaves_the_running_statistics_of_an_original_in_training_mode() -> None:
    original = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    model = copy.deepcopy(original)
    model[0] = QuantizedLowRankLayer.from_linear(original[0], rank=4)
    before = copy.deepcopy(original.state_dict())
    x = [torch.randn(64, 8) + 3]
    reports = [heal(model, original, x, steps=5, progress=False).report.to_json() for _ in range(2)]
    assert reports[0] == reports[1]
    assert all(torch.equal(tensor, original.state_dict()[name]) for name, tensor in before.items())
    assert original.training


def test_a_model_in_float16_is_healed_in_float32_and_stays_what_it_was() -> None:
    original, model = original_and_compressed(torch.float16)
    x = [torch.randn(256, 12).half()]
    result = heal(model, original, x, steps=30, lr=3e-3, progress=False)
    assert result.report.kept == "after"
    assert result.report.error_after < 0.8 * result.report.error_before
    assert [t.dtype for t in result.model.state_dict().values()] == [t.dtype for t in model.state_dict().values()]
    assert [m.dtype for m in result.model if hasattr(m, "dtype")] == [torch.float16] * 3
    assert result.model(x[0]).dtype is torch.float16
    assert {parameter.dtype for parameter in original.parameters()} == {torch.float16}


def test_compression_heals_a_model_in_float16() -> None:
    original, _ = original_and_compressed(torch.float16)
    x = [torch.randn(512, 12).half()]
    result = lowrank.compress_model(original, error_budget=0.1, calibration=x, heal={"steps": 20}, progress=False)
    assert result.report.totals["error_upper"] <= 0.1
    assert {tensor.dtype for tensor in result.model.parameters()} == {torch.float16}


def test_a_seed_that_is_no_number_is_refused() -> None:
    original, model = original_and_compressed()
    with pytest.raises(UsageError, match="seed: must be an integer of at least 0, got 'a'"):
        heal(model, original, [torch.randn(64, 12)], steps=5, seed="a", progress=False)  # type: ignore[arg-type]
