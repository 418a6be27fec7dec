"""Adapters and PEFT: the same files, the same keys, the same outputs, both ways."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import eps
from torch import Tensor, nn

import lowrank
from lowrank.lora.adapters import adapter_names, lora_layers

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Net(nn.Module):
    """Embedding, convolutions of both kinds, linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 8, 3, stride=2, padding=1)
        self.image = nn.Conv2d(8, 6, (2, 3), padding=(1, 1), bias=False)
        self.fc = nn.Linear(6, 10)
        self.head = nn.Linear(10, 5, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.tanh(self.conv(self.table(ids).transpose(1, 2)))
        hidden = torch.tanh(self.image(hidden.unsqueeze(2))).mean(dim=(2, 3))
        out: Tensor = self.head(torch.tanh(self.fc(hidden)))
        return out


IDS = torch.arange(24).reshape(3, 8) % 11
TARGETS = ["table", "conv", "image", "fc", "head"]


@pytest.fixture(autouse=True)
def _quiet_peft() -> Iterator[None]:
    """PEFT's own warnings (no configuration, embeddings saved) are not ours to fail on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*embedding layer")
        yield


def net(dtype: torch.dtype, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().to(dtype).eval()


def fill(parameters: Any, seed: int = 1) -> None:
    """Give trained-looking values to whatever trains; magnitudes stay positive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_((0.1 * noise).to(parameter.dtype))


def train_step(model: nn.Module, ids: Tensor) -> None:
    fill(model.parameters())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model(ids).float().square().mean().backward()
    optimizer.step()


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == expected.dtype
    scale = float(expected.detach().double().abs().max())
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0.0, atol=16 * eps(dtype) * scale)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"fc": 6, "conv": 2}, "alpha_pattern": {"head": 3}},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_a_peft_adapter_gives_the_same_outputs_here(option: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = net(dtype)
    config = peft.LoraConfig(r=4, target_modules=TARGETS, **({"lora_alpha": 16} | OPTIONS[option]))
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    train_step(theirs, IDS)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = lowrank.load_adapter(base, tmp_path / "adapter")
    assert set(lora_layers(ours)) == set(TARGETS)
    expected = theirs.eval()(IDS)
    assert not torch.equal(expected, base(IDS))
    close(ours(IDS), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_an_adapter_from_here_gives_the_same_outputs_in_peft(option: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = net(dtype)
    config = lowrank.LoRAConfig(r=4, target_modules=TARGETS, **({"lora_alpha": 16} | OPTIONS[option]))
    ours = lowrank.add_lora(base, config)
    train_step(ours, IDS)
    lowrank.save_adapter(ours, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # not one missing or unexpected key
        warnings.filterwarnings("ignore", message=".*embedding layer")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    assert not torch.equal(ours(IDS), base(IDS))
    close(theirs.eval()(IDS), ours(IDS), dtype)


def test_keys_shapes_and_fields_are_those_of_peft(tmp_path: Path) -> None:
    base = net(torch.float32)
    arguments: dict[str, Any] = {"r": 2, "use_dora": True, "target_modules": TARGETS[:4], "modules_to_save": ["head"]}
    ours = lowrank.add_lora(base, lowrank.LoRAConfig(**arguments))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**arguments))
    lowrank.save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    headers = [
        lowrank.io.read_safetensors_header(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")
    ]
    shapes = [{name: entry.shape for name, entry in header.tensors.items()} for header in headers]
    assert shapes[0] == shapes[1]
    documents = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    assert set(documents[0]) == set(documents[1])
    differ = {name for name in documents[0] if documents[0][name] != documents[1][name]}
    # Order of a set, who wrote it, and the class of the model.
    assert differ <= {"target_modules", "peft_version", "auto_mapping"}, differ
    assert lowrank.trainable_parameters(ours) == theirs.get_nb_trainable_parameters()


def test_the_same_seed_draws_the_same_adapters() -> None:
    base = net(torch.float64)
    torch.manual_seed(7)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=3, target_modules=TARGETS))
    torch.manual_seed(7)
    ours = lowrank.add_lora(base, lowrank.LoRAConfig(r=3, target_modules=TARGETS))
    expected = {name.removeprefix("base_model.model."): p for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize("start", [True, "gaussian", False], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_same_seed_draws_the_same_adapters_over_half_precision(dtype: torch.dtype, start: bool | str) -> None:
    base = net(dtype)
    arguments: dict[str, Any] = {"r": 3, "target_modules": TARGETS, "init_lora_weights": start}
    torch.manual_seed(7)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**arguments))
    torch.manual_seed(7)
    ours = lowrank.add_lora(base, lowrank.LoRAConfig(**arguments))
    expected = {name.removeprefix("base_model.model."): p for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert parameter.dtype is expected[name].dtype and torch.equal(parameter, expected[name]), name


def test_training_follows_peft_step_by_step() -> None:
    base = net(torch.float32)
    arguments: dict[str, Any] = {"r": 4, "target_modules": TARGETS, "lora_alpha": 16}
    torch.manual_seed(3)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**arguments))
    torch.manual_seed(3)
    ours = lowrank.add_lora(base, lowrank.LoRAConfig(**arguments))
    losses: list[list[float]] = []
    for model in (theirs, ours):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        curve = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = (model(IDS) - 1.0).square().mean()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        losses.append(curve)
    assert losses[0][0] > 1.2 * losses[0][-1]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0.0)


def gpt2(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    return transformers.GPT2LMHeadModel(config).to(dtype).eval()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv1d_of_gpt2_both_ways(dtype: torch.dtype, tmp_path: Path) -> None:
    base = gpt2(dtype)
    ids = torch.arange(12).reshape(2, 6)
    config = peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    fill(theirs.parameters())
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lowrank.load_adapter(base, tmp_path / "theirs")
    expected = theirs.eval()(ids).logits
    assert not torch.equal(expected, base(ids).logits)
    close(ours(ids).logits, expected, dtype)
    lowrank.save_adapter(ours, tmp_path / "ours")
    document = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert document["fan_in_fan_out"] is True and document["task_type"] == "CAUSAL_LM"
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    close(again(ids).logits, expected, dtype)


@pytest.mark.parametrize("option", [{"use_dora": True}, {"use_rslora": True, "lora_alpha": 3}], ids=["dora", "rslora"])
def test_gpt2_with_its_embedding(option: dict[str, Any], tmp_path: Path) -> None:
    base, ids = gpt2(), torch.arange(12).reshape(2, 6)
    targets = ["c_attn", "c_fc", "wte"]
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=targets, fan_in_fan_out=True, **option)
    )
    fill(theirs.parameters())
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)  # the tables themselves as well
    header = lowrank.io.read_safetensors_header(tmp_path / "theirs" / "adapter_model.safetensors")
    assert any(name.endswith("wte.base_layer.weight") for name in header.tensors)
    ours = lowrank.load_adapter(base, tmp_path / "theirs")
    close(ours(ids).logits, theirs.eval()(ids).logits, torch.float32)


def test_all_linear_means_the_same_modules_as_in_peft() -> None:
    base = gpt2()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules="all-linear", fan_in_fan_out=True))
    ours = lowrank.add_lora(base, lowrank.LoRAConfig(target_modules="all-linear"))
    assert set(lora_layers(ours)) == set(theirs.targeted_module_names)
    assert "lm_head" in lowrank.adapter_summary(ours).left
    printed = str(lowrank.adapter_summary(ours)).splitlines()[-1]
    trainable, total = theirs.get_nb_trainable_parameters()
    assert (
        printed
        == f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        {"target_modules": r".*h\.1\..*c_attn"},
        {"target_modules": ["attn.c_proj", "c_fc"], "exclude_modules": ["h.0.mlp.c_fc"]},
        {"target_modules": ["c_attn"], "layers_to_transform": [1]},
        {"target_modules": ["c_attn"], "layers_to_transform": [0], "layers_pattern": "h"},
    ],
    ids=["expression", "suffixes", "layers", "pattern"],
)
def test_targets_are_chosen_as_in_peft(arguments: dict[str, Any]) -> None:
    base = gpt2()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(fan_in_fan_out=True, **arguments))
    ours = lowrank.add_lora(base, lowrank.LoRAConfig(**arguments))
    assert set(lora_layers(ours)) == set(theirs.targeted_module_names)


def test_a_peft_adapter_runs_on_the_compressed_model(tmp_path: Path) -> None:
    base = net(torch.float64)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=3, target_modules=["fc", "table"]))
    train_step(theirs, IDS)
    theirs.save_pretrained(tmp_path / "adapter")
    small = copy.deepcopy(base)
    small.fc = lowrank.SVDCompressedLinear.from_linear(small.fc, rank=6)  # type: ignore[assignment]
    small.table = lowrank.LowRankEmbedding.from_embedding(small.table, rank=6)  # type: ignore[assignment]
    ours = lowrank.load_adapter(small, tmp_path / "adapter")
    # Full rank: the compressed model is the dense one to rounding.
    torch.testing.assert_close(ours(IDS), theirs.eval()(IDS), rtol=0.0, atol=1e-13)


def test_pissa_matches_peft_and_its_file_loads(tmp_path: Path) -> None:
    base = net(torch.float32)
    arguments: dict[str, Any] = {"r": 3, "target_modules": ["fc", "head"], "init_lora_weights": "pissa"}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**arguments))
    ours = lowrank.add_lora(base, lowrank.LoRAConfig(**arguments))
    torch.testing.assert_close(ours(IDS), base(IDS), rtol=0.0, atol=1e-5)
    for name in ("fc", "head"):
        torch.testing.assert_close(
            lora_layers(ours)[name].base_layer.weight, theirs.get_submodule(f"base_model.model.{name}").base_layer.weight,
            rtol=0.0, atol=1e-6,
        )  # fmt: skip
    fill(theirs.parameters())
    theirs.save_pretrained(tmp_path / "theirs")
    close(lowrank.load_adapter(base, tmp_path / "theirs")(IDS), theirs.eval()(IDS), torch.float32)


def test_modules_to_save_both_ways(tmp_path: Path) -> None:
    base = net(torch.float32)
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["fc"], modules_to_save=["head"])
    )
    train_step(theirs, IDS)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lowrank.load_adapter(base, tmp_path / "theirs")
    assert not torch.equal(ours.head.weight, base.head.weight)
    close(ours(IDS), theirs.eval()(IDS), torch.float32)
    lowrank.save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    close(again(IDS), ours(IDS), torch.float32)


def test_what_changes_the_computation_is_refused_by_name(tmp_path: Path) -> None:
    base = net(torch.float32)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["fc"], lora_bias=True))
    theirs.save_pretrained(tmp_path / "adapter")
    with pytest.raises(lowrank.LowRankError, match="lora_bias = True changes what the adapter computes"):
        lowrank.load_adapter(base, tmp_path / "adapter")
    assert adapter_names(base) == []


@pytest.mark.parametrize(
    "conv",
    [
        lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1),
        lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"),
    ],
    ids=["groups", "padding mode"],
)
def test_convolutions_that_peft_adapts_otherwise_load_as_peft_trained_them(conv: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(conv())
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=["0"]))
    fill(theirs.parameters())
    theirs.save_pretrained(tmp_path / "adapter")
    ours = lowrank.load_adapter(base, tmp_path / "adapter")
    x = torch.randn(2, *(4, 6, 5)[: base[0].weight.ndim - 1])
    close(ours(x), theirs.eval()(x), torch.float32)
    with pytest.raises(lowrank.AdapterError, match=r"groups=2|pads with zeros"):
        lowrank.merge_lora(ours)
