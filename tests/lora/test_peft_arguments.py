"""Every argument of ``peft.LoraConfig``: taken where it changes nothing, refused by name where it would be ignored."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from torch import nn

import lowrank
from lowrank.lora import LoRAConfig, add_lora, save_adapter
from lowrank.lora.peft_arguments import HEADS, NEUTRAL, PEFT_DESCRIPTIVE

# A value of each argument that would change what the adapter computes.
OTHER: dict[str, Any] = {
    "alora_invocation_tokens": [1, 2], "arrow_config": {"top_k": 2}, "bias": "all", "corda_config": {"corda_method": "kpm"},
    "ensure_weight_tying": True, "eva_config": {"rho": 2.0}, "inference_mode": True, "kasa_config": {"beta": 1.0},
    "layer_replication": [(0, 1)], "loftq_config": {"loftq_bits": 4}, "lora_bias": True, "lora_ga_config": {"direction": "ArBr"},
    "megatron_config": {"tp": 2}, "monteclora_config": {"n": 1}, "runtime_config": {"ephemeral_gpu_offload": True},
    "target_parameters": ["experts.down_proj"], "trainable_token_indices": [3], "use_bdlora": {"a": 1}, "use_qalora": True,
    "velora_config": {"rank": 1},
}  # fmt: skip


def peft_fields() -> dict[str, Any]:
    """Name and default of every field of ``peft.LoraConfig``."""
    peft = pytest.importorskip("peft", reason="the extra peft is not installed")
    config = peft.LoraConfig()
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def test_there_is_an_argument_for_every_field_of_peft() -> None:
    ours = {field.name for field in dataclasses.fields(LoRAConfig)}
    assert set(peft_fields()) <= ours
    assert ours - set(peft_fields()) == {"learnable_scale", "extra"}
    assert set(NEUTRAL) == set(OTHER)


def test_every_default_of_peft_is_taken_and_means_the_default_here() -> None:
    # PEFT checks r, alpha and dropout; its defaults of these are ours.
    # It fills in its own version.
    assert LoRAConfig(**peft_fields()) == LoRAConfig(peft_version=peft_fields()["peft_version"])


def test_a_whole_configuration_of_peft_is_taken() -> None:
    peft = pytest.importorskip("peft", reason="the extra peft is not installed")
    theirs = peft.LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=["q_proj"],
        task_type=peft.TaskType.CAUSAL_LM,
        bias="none",
        inference_mode=False,
    )
    fields = {field.name: getattr(theirs, field.name) for field in dataclasses.fields(theirs)}
    expected = LoRAConfig(
        r=4, lora_alpha=16, target_modules=["q_proj"], task_type="CAUSAL_LM", peft_version=fields["peft_version"]
    )
    assert LoRAConfig(**fields) == expected
    assert LoRAConfig.from_peft(theirs.to_dict()) == expected


@pytest.mark.parametrize("name", OTHER)
def test_a_value_that_would_be_ignored_is_refused_by_name_with_what_to_do(name: str) -> None:
    with pytest.raises(lowrank.AdapterError, match=f"^{name}: must be .*, which is not supported here; .{{10}}"):
        LoRAConfig(**{name: OTHER[name]})


@pytest.mark.parametrize("name", sorted(set(OTHER) - {"eva_config", "inference_mode", "runtime_config"}))
def test_in_a_file_the_message_names_file_and_way_out(name: str) -> None:
    with pytest.raises(
        lowrank.AdapterError, match=f"^a/config.json: {name} = .*changes.*load it with PEFT, merge it there"
    ):
        LoRAConfig.from_peft({"peft_type": "LORA", name: OTHER[name]}, "a/config.json")


@pytest.mark.parametrize("name", NEUTRAL)
def test_every_neutral_value_is_taken(name: str) -> None:
    for value in NEUTRAL[name][0]:
        assert LoRAConfig(**{name: value}) == LoRAConfig()
        assert LoRAConfig.from_peft({"peft_type": "LORA", name: value}) == LoRAConfig()


def test_what_only_describes_is_kept_and_written() -> None:
    described: dict[str, Any] = {
        "task_type": "CAUSAL_LM", "auto_mapping": {"base_model_class": "Net"}, "base_model_name_or_path": "gpt2",
        "megatron_core": "megatron.core", "peft_version": "0.21.2", "qalora_group_size": 16, "revision": "main",
    }  # fmt: skip
    assert set(described) == set(PEFT_DESCRIPTIVE)
    config = LoRAConfig(**described)
    assert {name: getattr(config, name) for name in described} == described
    assert described.items() <= config.to_peft().items()
    assert LoRAConfig.from_peft(config.to_peft()) == config
    # As 0.3.0 wrote it.
    assert LoRAConfig(extra=described) == config


@pytest.mark.parametrize("start", ["olora", "corda", "loftq", "lora_ga", "pissa_niter_4"])
def test_a_start_that_changes_the_base_is_refused_with_file_and_way_out(start: str) -> None:
    with pytest.raises(
        lowrank.AdapterError, match=r"^f\.json: init_lora_weights = .*path_initial_model_for_weight_conv"
    ):
        LoRAConfig.from_peft({"peft_type": "LORA", "init_lora_weights": start}, "f.json")


@pytest.mark.parametrize(
    "field", [{"init_lora_weights": "unheard_of"}, {"lora_dropout": 3}, {"modules_to_save": "head"}, {"r": 0}, {"task_type": "X"}], ids=str
)  # fmt: skip
def test_whatever_is_wrong_in_a_file_the_message_begins_with_the_file(field: dict[str, Any]) -> None:
    with pytest.raises(lowrank.LowRankError, match=rf"^f\.json: {next(iter(field))}") as caught:
        LoRAConfig.from_peft({"peft_type": "LORA", **field}, "f.json")
    assert caught.value.exit_code == 3


def test_a_task_names_its_heads() -> None:
    peft = pytest.importorskip("peft", reason="the extra peft is not installed")
    assert set(HEADS) == {task.value for task in peft.TaskType}
    assert LoRAConfig(task_type="QUESTION_ANS").trained_whole == ["qa_outputs"]
    assert LoRAConfig(task_type="TOKEN_CLS", modules_to_save=["norm"]).to_peft()["modules_to_save"] == [
        "norm", "classifier", "score",
    ]  # fmt: skip
    with pytest.raises(lowrank.AdapterError, match=r"task_type: must be one of CAUSAL_LM, .*, or None, got 'seq_cls'"):
        LoRAConfig(task_type="seq_cls")


def test_peft_reads_what_such_a_configuration_wrote(tmp_path: Any) -> None:
    peft = pytest.importorskip("peft", reason="the extra peft is not installed")
    config = LoRAConfig(r=2, target_modules=["0"], bias="none", inference_mode=False, base_model_name_or_path="gpt2")
    save_adapter(add_lora(nn.Sequential(nn.Linear(4, 4)), config), tmp_path / "a")
    again = peft.LoraConfig.from_pretrained(tmp_path / "a")
    assert (again.bias, again.base_model_name_or_path, again.r) == ("none", "gpt2", 2)
