"""Mixtures of experts of transformers: rounded expert by expert, run by their own forward, saved and loaded to the last bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import seeded
from torch import Tensor, nn

import lowrank
from lowrank.calibration.batches import Batch
from lowrank.calibration.experts import ExpertInputs, collect_expert_inputs
from lowrank.compression.stacks import few_tokens
from lowrank.layers import PackedExperts, QuantizedExperts
from lowrank.layers.experts import ExpertsLayer, is_turned
from lowrank.numerics.grids import Grid
from lowrank.targets import kind_of
from lowrank.targets.copying import become

transformers = pytest.importorskip("transformers")

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "num_experts_per_tok": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SIZES, intermediate_size=48, num_local_experts=4)
    return transformers.MixtralForCausalLM(config).eval()


def qwen() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        **SIZES, head_dim=16, intermediate_size=48, moe_intermediate_size=48, num_experts=4
    )
    return transformers.Qwen3MoeForCausalLM(config).eval()


def gpt_oss() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GptOssConfig(**SIZES, head_dim=16, intermediate_size=48, num_local_experts=4)
    model = transformers.GptOssForCausalLM(config).eval()
    for parameter in model.parameters():
        # Biases start empty.
        nn.init.normal_(parameter, std=0.1, generator=seeded(5))
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {"mixtral": mixtral, "qwen": qwen, "gpt-oss": gpt_oss}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def ids(samples: int, seed: int = 1, length: int = 12) -> Tensor:
    return torch.randint(3, 64, (samples, length), generator=seeded(seed))


def experts_in(model: nn.Module) -> tuple[str, nn.Module]:
    return next((name, module) for name, module in model.named_modules() if name.endswith(".experts"))


def logits(model: nn.Module, tokens: Tensor, **kwargs: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens, **kwargs).logits
    return found


@every_model
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "rows"])
def test_its_own_forward_runs_and_never_decodes_all(
    make: Callable[[], nn.Module], implementation: str, packed: bool
) -> None:
    model = make()
    model.set_experts_implementation(implementation)
    _, module = experts_in(model)
    assert kind_of(module).name == "experts"
    layer = PackedExperts.from_rounded(module, {}, Grid(4, 32)) if packed else QuantizedExperts.from_module(module)
    become(module, layer)
    dense = copy.deepcopy(model)
    _, inner = experts_in(dense)
    become(inner, inner.dequantize())
    tokens, mask = ids(3), torch.ones(3, 12, dtype=torch.long)
    mask[1, :5] = 0
    expected = logits(dense, tokens, attention_mask=mask)
    found = logits(model, tokens, attention_mask=mask)
    assert float((found - expected).abs().max()) <= 64 * torch.finfo(torch.float32).eps * float(expected.abs().max())
    torch.testing.assert_close(logits(model, tokens[:1]), logits(dense, tokens[:1]), rtol=1e-5, atol=1e-6)
    assert experts_in(model)[1].weight_decodings == 0


def test_gpt_oss_keeps_its_matrices_the_other_way_and_its_biases_as_floats() -> None:
    _, module = experts_in(gpt_oss())
    assert is_turned(module) and not is_turned(experts_in(mixtral())[1])
    assert kind_of(module).weights(module)["down_proj"].shape == (4, 32, 48)
    layer = QuantizedExperts.from_module(module)
    assert layer.gate_up_proj_codes.shape == (4, 96, 32)
    assert layer.gate_up_proj_bias.dtype == torch.float32
    made, weight = layer.dequantize().down_proj.detach(), module.down_proj.detach()
    assert float((made - weight).abs().max()) <= float(weight.abs().max()) / 127


@every_model
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_moments_are_those_of_the_tokens_routed_to_each_expert(
    make: Callable[[], nn.Module], implementation: str
) -> None:
    """Against the module's arguments, padding left out."""
    model = make()
    model.set_experts_implementation(implementation)
    name, module = experts_in(model)
    tokens, mask = ids(3), torch.ones(3, 12, dtype=torch.long)
    mask[1, :5] = 0
    seen: list[tuple[Tensor, Tensor]] = []
    with module.register_forward_pre_hook(lambda _, args: seen.append((args[0].detach(), args[1]))):
        logits(model, tokens, attention_mask=mask)
    hidden, chosen = seen[0]
    batches = [Batch((), {"input_ids": tokens, "attention_mask": mask}, 3, ("input_ids", "attention_mask"))]
    found = collect_expert_inputs(model, batches, {name: kind_of(module).weights(module)})[name]
    kept = mask.reshape(-1).bool()
    for expert in range(4):
        rows = hidden[kept & (chosen == expert).any(dim=1)].double()
        assert found.count("gate_up_proj", expert) == found.count("down_proj", expert) == len(rows)
        statistics = found.of("gate_up_proj", expert)
        if len(rows):
            torch.testing.assert_close(statistics.gram, rows.T @ rows / len(rows), rtol=1e-6, atol=1e-9)


def without_expert(model: nn.Module, expert: int) -> nn.Module:
    """Nothing is routed to this expert: its logit is always the least."""
    gate = next(module for name, module in model.named_modules() if name.endswith("mlp.gate"))

    class Without(type(gate)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
            scores = nn.functional.linear(hidden_states.reshape(-1, hidden_states.shape[-1]), self.weight)
            left = torch.cat(
                [scores[:, :expert], torch.full_like(scores[:, :1], -30.0), scores[:, expert + 1 :]], dim=1
            )
            value, index = torch.topk(torch.softmax(left, dim=-1), 2, dim=-1)
            return left, value / value.sum(dim=-1, keepdim=True), index

    gate.__class__ = Without
    return model


def test_an_expert_without_tokens_is_rounded_without_data_and_named(tmp_path: Path) -> None:
    model = without_expert(mixtral(), 2)
    result = lowrank.compress_model(
        model,
        calibration=[{"input_ids": each} for each in ids(32).split(8)],
        error_budget=0.2,
        formats=("int4",),
        targets=("experts",),
        progress=False,
    )
    layer = experts_in(result.model)[1]
    assert isinstance(layer, ExpertsLayer) and layer.format == "int4"
    assert any("experts 2 (no token)" in note for note in result.report.notes)
    _, module = experts_in(model)
    plain = PackedExperts.from_rounded(module, {}, layer.grid)
    assert torch.equal(layer.expert("down_proj", 2), plain.expert("down_proj", 2))
    assert not torch.equal(layer.expert("gate_up_proj", 0), plain.expert("gate_up_proj", 0))
    assert "of the weights were within reach" in result.report.summary()[0]
    assert 0.3 < result.report.reached < 1.0
    lowrank.checkpoint.save_compressed(result.model, tmp_path / "saved")
    loaded = lowrank.load_model(tmp_path / "saved", model=mixtral())
    assert torch.equal(experts_in(loaded)[1].dense_weight(), layer.dense_weight())


@pytest.mark.parametrize("make", [mixtral, qwen], ids=["mixtral", "qwen"])
def test_a_directory_loads_without_a_model_and_generates(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = make()
    _, module = experts_in(model)
    become(module, PackedExperts.from_rounded(module, {}, Grid(3, 32, zero_point=True)))
    lowrank.checkpoint.save_compressed(model, tmp_path / "saved")
    loaded = lowrank.load_model(tmp_path / "saved")
    tokens = ids(2)
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    cached = loaded.generate(tokens, max_new_tokens=4, do_sample=False)
    assert torch.equal(cached, model.generate(tokens, max_new_tokens=4, do_sample=False, use_cache=False))
    copied = copy.deepcopy(loaded)
    for tensor in experts_in(copied)[1].buffers():
        tensor.zero_()
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


def test_gradients_reach_what_lies_before_the_experts() -> None:
    model = mixtral()
    _, module = experts_in(model)
    become(module, PackedExperts.from_rounded(module, {}, Grid(4)))
    dense = copy.deepcopy(model)
    _, inner = experts_in(dense)
    become(inner, inner.dequantize())
    for each in (model, dense):
        each(input_ids=ids(2)).logits.square().sum().backward()
    found, expected = model.model.embed_tokens.weight.grad, dense.model.embed_tokens.weight.grad
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_few_tokens_are_named_by_expert() -> None:
    stacks = {"up": torch.ones(2, 3, 4)}
    assert few_tokens("moe", stacks, ExpertInputs())[0].startswith("moe: experts 0 (no token), 1 (no token)")
