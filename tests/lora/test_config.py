"""An adapter's configuration: ranges, patterns, and PEFT's fields."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowrank
from lowrank.errors import AdapterError
from lowrank.lora import (
    LoRAConfig,
)
from lowrank.lora.adapters import adapter_names
from lowrank.lora.bases import base_of


@pytest.mark.parametrize(
    "arguments",
    [
        {"r": 0}, {"r": -1}, {"r": 2.0}, {"r": True}, {"r": "8"}, {"r": None}, {"r": math.inf}, {"r": math.nan},
        {"lora_alpha": math.nan}, {"lora_alpha": math.inf}, {"lora_alpha": "16"}, {"lora_alpha": True},
        {"lora_dropout": 1.0}, {"lora_dropout": -0.1}, {"lora_dropout": math.nan}, {"lora_dropout": "0"},
        {"rank_pattern": {"a": 0}}, {"rank_pattern": ["a"]}, {"rank_pattern": {"(": 2}}, {"alpha_pattern": {"a": math.nan}},
        {"init_lora_weights": "olora"}, {"init_lora_weights": 2}, {"use_dora": 1}, {"target_modules": "("}, {"target_modules": [""]},
        {"layers_to_transform": [0]}, {"layers_pattern": "h"},
        {"layers_to_transform": [-1], "target_modules": ["a"]},
    ],
    ids=str,
)  # fmt: skip
def test_out_of_range_is_bad_input(arguments: dict[str, Any]) -> None:
    name = next(iter(arguments))
    with pytest.raises(lowrank.LowRankError, match=name) as caught:
        lowrank.LoRAConfig(**arguments)
    assert caught.value.exit_code == 3


def test_a_rank_over_the_smaller_side_is_a_warning() -> None:
    model = nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 12))
    with pytest.warns(UserWarning, match=r"r: over min\(out, in\) on 1 layers \(first 0\)"):
        adapted = lowrank.add_lora(model, lowrank.LoRAConfig(r=8))
    assert lowrank.trainable_parameters(adapted)[0] == 8 * (4 + 9) + 8 * (9 + 12)


def test_a_rank_that_would_take_all_memory_is_refused_before_anything_is_allocated() -> None:
    model = nn.Sequential(nn.Linear(4, 9), nn.Conv1d(8, 6, 3), nn.Embedding(50, 12))
    for config, layer, limit in (
        (lowrank.LoRAConfig(r=10**12), "0", 2**20 // 13),
        (lowrank.LoRAConfig(r=4, rank_pattern={"1": 10**12}, target_modules=["1"]), "1", 2**20 // 30),
        (lowrank.LoRAConfig(r=10**12, target_modules=["2"]), "2", 2**20 // 62),
    ):
        with pytest.raises(
            lowrank.RankError, match=rf"r: layer {layer}: must be between 1 and {limit:,}, got 1,000,000,000,000; an"
        ) as caught:
            lowrank.add_lora(model, config)
        assert caught.value.exit_code == 3
    with pytest.raises(lowrank.RankError, match="layer 0"):
        lowrank.add_lora(
            nn.Sequential(lowrank.SVDCompressedLinear.from_linear(nn.Linear(4, 9), rank=2)),
            lowrank.LoRAConfig(r=10**12),
        )


@pytest.mark.parametrize("rank", [10**12, 10**5000], ids=["1e12", "1e5000"])
def test_no_copy_of_the_model_is_made_for_a_rank_that_is_refused(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("copy.deepcopy", lambda _: pytest.fail("copied"))
    with pytest.raises(lowrank.RankError, match="r: layer 1: must be between 1 and"):
        lowrank.add_lora(
            nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 12)), lowrank.LoRAConfig(r=2, rank_pattern={"1": rank})
        )


def test_the_largest_rank_allowed_is_what_the_message_says() -> None:
    layer = nn.Linear(1024, 512, device="meta")  # 16 · 2¹⁹ numbers over 1536 for each component
    base_of(layer).require_rank(2**23 // 1536, "layer")
    with pytest.raises(lowrank.RankError, match=r"between 1 and 5,461, got 5,462; an adapter may hold 16 times"):
        base_of(layer).require_rank(2**23 // 1536 + 1, "layer")


def test_a_sum_of_adapters_of_too_large_a_rank_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(4, 9))
    with pytest.warns(UserWarning, match="over min"):
        lowrank.add_lora(model, lowrank.LoRAConfig(r=60_000, target_modules=["1"]), "wide", inplace=True)
    lowrank.add_lora(model, lowrank.LoRAConfig(r=2), "thin", inplace=True)
    with pytest.raises(lowrank.RankError, match="r: layer 1: must be between 1 and 80,659, got 120,002"):
        lowrank.add_weighted_adapter(model, ["thin", "wide", "wide"], [1.0, 1.0, 1.0], "sum")
    assert adapter_names(model) == ["thin", "wide"]


@pytest.mark.parametrize("field", [{"r": 10**12}, {"rank_pattern": {"0": 10**12}}], ids=str)
def test_an_adapter_file_with_such_a_rank_is_refused_by_its_layer(field: dict[str, Any], tmp_path: Path) -> None:
    lowrank.save_adapter(lowrank.add_lora(nn.Sequential(nn.Linear(4, 9)), lowrank.LoRAConfig(r=2)), tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | field))
    with pytest.raises(
        lowrank.RankError, match=r"adapter_model\.safetensors: r: layer 0: must be between 1 and 80,659, got"
    ) as caught:
        lowrank.load_adapter(nn.Sequential(nn.Linear(4, 9)), tmp_path / "a")
    assert caught.value.exit_code == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_seed_leaves_random_numbers_of_cuda() -> None:
    torch.cuda.init()
    state = torch.cuda.get_rng_state()
    lowrank.add_lora(nn.Sequential(nn.Linear(4, 9)), lowrank.LoRAConfig(r=2), seed=1)
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_a_seed_says_nothing_to_cuda_that_has_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    # Until then seeds are put off, and nothing would put the caller's back.
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: False)
    monkeypatch.setattr("torch.cuda.manual_seed_all", lambda _: pytest.fail("seeded"))
    lowrank.add_lora(nn.Sequential(nn.Linear(4, 9)), lowrank.LoRAConfig(r=2), seed=1)


def test_a_seed_starts_the_same_adapter_and_leaves_the_callers_random_numbers() -> None:
    model = nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 12))

    def start(seed: int | None) -> torch.Tensor:
        return lowrank.add_lora(model, lowrank.LoRAConfig(r=2), seed=seed)[0].lora_A["default"].weight.detach()  # type: ignore[index]

    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, again, other = start(1), start(1), start(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again) and not torch.equal(first, other)
    drawn = start(None)
    torch.manual_seed(3)
    assert torch.equal(start(None), drawn) and not torch.equal(torch.get_rng_state(), state)
    for seed in (-1, 2**63, 1.0, True):
        rule = rf"seed: must be an integer from 0 to 2\*\*63 - 1, or None, got {seed}"
        with pytest.raises(lowrank.UsageError, match=rule):
            start(seed)  # type: ignore[arg-type]


def test_scalings_and_patterns() -> None:
    config = lowrank.LoRAConfig(
        r=4, lora_alpha=8, rank_pattern={"query": 16, r"1\.key": 2}, alpha_pattern={"layer.0.query": 32}
    )
    names = ("layer.0.query", "layer.1.query", "layer.1.key", "layer.0.key", "subquery")
    assert [config.rank_of(name) for name in names] == [16, 16, 2, 4, 4]
    assert [config.scaling_of(name) for name in names] == [2.0, 0.5, 4.0, 2.0, 2.0]
    assert config.replace(use_rslora=True).scaling_of("layer.0.query") == 8.0


def test_defaults_are_those_of_peft() -> None:
    peft = pytest.importorskip("peft")
    theirs = peft.LoraConfig().to_dict()
    ours = lowrank.LoRAConfig().to_peft()
    differ = {name for name in ours if ours[name] != theirs[name]}
    # Saved files say inference_mode true, also PEFT's; the version is that of PEFT where it wrote the file.
    assert differ == {"inference_mode", "peft_version"}
    assert set(ours) == set(theirs)


def test_peft_fields_round_trip() -> None:
    config = lowrank.LoRAConfig(
        r=3, lora_alpha=5.5, lora_dropout=0.25, target_modules=["a", "b"], exclude_modules=["c"], use_rslora=True,
        use_dora=True, rank_pattern={"a": 2}, alpha_pattern={"b": 1}, modules_to_save=["head"], layers_to_transform=[0, 2],
        layers_pattern="h", extra={"task_type": "CAUSAL_LM", "revision": "main"},
    )  # fmt: skip
    document = json.loads(json.dumps(config.to_peft()))
    again = lowrank.LoRAConfig.from_peft(document)
    assert again.to_peft() == document
    assert again.target_modules == ["a", "b"] and again.task_type == "CAUSAL_LM"


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("bias", "none", True), ("bias", "all", False),
        ("lora_bias", False, True), ("lora_bias", True, False),
        ("use_qalora", True, False), ("layer_replication", [[0, 2]], False), ("trainable_token_indices", [1], False),
        ("target_parameters", ["experts.weight"], False), ("alora_invocation_tokens", [3], False),
        ("init_lora_weights", "olora", False), ("init_lora_weights", "orthogonal", True), ("init_lora_weights", "pissa", True),
        ("not_yet_invented", None, True), ("not_yet_invented", {}, True), ("not_yet_invented", 3, False),
        ("task_type", "SEQ_CLS", True), ("peft_version", "9.9", True),
    ],
)  # fmt: skip
def test_a_field_that_would_be_ignored_is_refused_by_name(field: str, value: object, accepted: bool) -> None:
    document = {"peft_type": "LORA", "r": 2, field: value}
    if accepted:
        assert lowrank.LoRAConfig.from_peft(document).r == 2
        return
    with pytest.raises(lowrank.AdapterError, match=field):
        lowrank.LoRAConfig.from_peft(document, "f.json")


def test_other_kinds_of_adapter_are_refused() -> None:
    with pytest.raises(lowrank.AdapterError, match=r"f\.json: peft_type must be 'LORA', got 'IA3'"):
        lowrank.LoRAConfig.from_peft({"peft_type": "IA3"}, "f.json")


@pytest.mark.parametrize("value", [5, 1.5, True, {"a": 1}])
@pytest.mark.parametrize("name", ["target_modules", "exclude_modules", "modules_to_save"])
def test_names_that_are_no_list_are_refused(name: str, value: object) -> None:
    with pytest.raises(AdapterError, match=f"{name}: must be .*a list of module names, got"):
        LoRAConfig(**{name: value})


def test_layers_to_transform_is_whole_numbers_or_all() -> None:
    for value in (1.5, "2", [0.5]):
        with pytest.raises(AdapterError, match="layers_to_transform: must be layer indices"):
            LoRAConfig(target_modules=["a"], layers_to_transform=value)  # type: ignore[arg-type]
    assert LoRAConfig(target_modules=["a"], layers_to_transform=[]).layers_to_transform is None


def test_an_alpha_beyond_any_float_is_bad_input() -> None:
    with pytest.raises(lowrank.AdapterError, match="lora_alpha"):
        lowrank.LoRAConfig(lora_alpha=10**400)


@pytest.mark.parametrize("field", ["r", "lora_alpha"])
def test_a_number_too_long_to_print_is_bad_input_all_the_same(field: str) -> None:
    with pytest.raises(
        lowrank.LowRankError, match=f"{field}: must be .*, got an integer of over 4,000 digits"
    ) as caught:
        lowrank.LoRAConfig(**{field: -(10**5000)})
    assert caught.value.exit_code == 3
