"""Heads of a task (``task_type``) and modules trained whole: trained, switched, saved and loaded as PEFT does."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_models import IDS, Encoder, random_adapter, rows, run, two_linear
from torch import Tensor, nn

import lowrank
from lowrank.lora import (
    LoRAConfig,
    add_lora,
    delete_adapter,
    load_adapter,
    merge_lora,
    save_adapter,
    set_adapter,
    unload_lora,
)
from lowrank.lora.adapters import active_adapters, lora_layers, saved_modules

WORDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
SMALL: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0,
}  # fmt: skip


def model_of(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    family = "Bert" if kind.startswith("Bert") else "Roberta" if kind.startswith("Roberta") else "Llama"
    return getattr(transformers, kind)(getattr(transformers, f"{family}Config")(**SMALL)).eval()


@pytest.fixture(autouse=True)
def _quiet_peft() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


def first_output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return next(value for value in model(input_ids=WORDS).values() if isinstance(value, Tensor))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name.removeprefix("base_model.model."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def move(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(trained(model).items()):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize(
    ("kind", "task", "targets"),
    [
        ("BertForSequenceClassification", "SEQ_CLS", ["query"]),
        ("BertForTokenClassification", "TOKEN_CLS", ["query"]),
        ("BertForQuestionAnswering", "QUESTION_ANS", ["query"]),
        ("RobertaForSequenceClassification", "SEQ_CLS", ["query", "dense"]),
        ("LlamaForSequenceClassification", "SEQ_CLS", "all-linear"),
        ("LlamaForTokenClassification", "TOKEN_CLS", ["q_proj"]),
    ],
)
def test_the_head_of_a_task_trains_and_goes_both_ways(kind: str, task: str, targets: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the extra peft is not installed")
    base = model_of(kind)
    arguments: dict[str, Any] = {"task_type": task, "r": 2, "target_modules": targets}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**arguments)).eval()
    ours = add_lora(base, LoRAConfig(**arguments)).eval()
    assert {name: parameter.shape for name, parameter in trained(ours).items()} == {
        name: parameter.shape for name, parameter in trained(theirs).items()
    }
    assert any("modules_to_save" in name for name in trained(ours))
    move(ours)
    move(theirs)
    save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert torch.equal(first_output(again), first_output(ours))
    loaded = load_adapter(base, tmp_path / "theirs").eval()
    assert torch.equal(first_output(loaded), first_output(theirs))
    assert not torch.allclose(first_output(loaded), first_output(base))
    # What PEFT makes of a configuration is one that can be given to add_lora.
    read = LoRAConfig.from_peft(theirs.peft_config["default"].to_dict())
    assert set(trained(add_lora(base, read))) == set(trained(ours))
    plain = unload_lora(merge_lora(loaded))
    torch.testing.assert_close(first_output(plain), first_output(theirs), rtol=1e-4, atol=1e-5)


def test_a_task_without_its_head_is_said() -> None:
    with pytest.warns(UserWarning, match="QUESTION_ANS trains modules named qa_outputs whole, and this model has none"):
        add_lora(two_linear(), LoRAConfig(r=2, task_type="QUESTION_ANS"))


def test_a_target_that_is_the_head_is_trained_whole_and_said() -> None:
    with pytest.warns(UserWarning, match=r"target_modules: 'score' is trained whole \(task_type\)"):
        model = add_lora(Encoder(), LoRAConfig(r=2, task_type="SEQ_CLS", target_modules=["query", "score"]))
    assert "score" in saved_modules(model) and "score" not in lora_layers(model)


def test_an_adapter_of_a_task_whose_file_lacks_the_head_loads_without_it(tmp_path: Path) -> None:
    """As 0.3.0 wrote them: the task was written down, the head neither trained nor saved."""
    save_adapter(add_lora(Encoder(), random_adapter("query")), tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(path.read_text().replace('"task_type": null', '"task_type": "SEQ_CLS"'))
    with pytest.warns(UserWarning, match="holds no head for task_type=SEQ_CLS"):
        loaded = load_adapter(Encoder(), tmp_path / "a")
    assert not saved_modules(loaded)


def test_two_adapters_that_train_the_same_module_switch_and_leave_as_in_peft() -> None:
    peft = pytest.importorskip("peft", reason="the extra peft is not installed")
    base, x = two_linear(), rows()
    arguments: dict[str, Any] = {
        "r": 2, "target_modules": ["0"], "modules_to_save": ["2"], "init_lora_weights": False
    }  # fmt: skip
    torch.manual_seed(1)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**arguments), "a")
    theirs.add_adapter("b", peft.LoraConfig(**arguments))
    torch.manual_seed(1)
    ours = add_lora(add_lora(base, LoRAConfig(**arguments), "a"), LoRAConfig(**arguments), "b")
    for model in (theirs, ours):
        for name, parameter in model.named_parameters():
            if "modules_to_save.b" in name:
                parameter.data.add_(1.0)
    outputs = {}
    for adapter in ("a", "b"):
        theirs.set_adapter(adapter)
        set_adapter(ours, adapter)
        assert set(trained(ours)) == set(trained(theirs))
        outputs[adapter] = ours(x)
        assert torch.equal(outputs[adapter], theirs(x))
    assert not torch.allclose(outputs["a"], outputs["b"])
    for act in (lambda: set_adapter(ours, ["a", "b"]), lambda: merge_lora(ours, ["a", "b"])):
        with pytest.raises(lowrank.UsageError, match="a, b each train 2 whole"):
            act()
    with pytest.warns(UserWarning, match="'b' was active; 'a' is from here on"):
        delete_adapter(ours, "b")
    assert torch.equal(ours(x), outputs["a"])


def test_deleting_the_active_adapter_leaves_the_next_one_active() -> None:
    base, x = two_linear(), rows()
    model = add_lora(base, random_adapter("0"), "first")
    first = model(x)
    for name in ("second", "third"):
        add_lora(model, random_adapter("0"), name, inplace=True)
    delete_adapter(model, "second")  # not active: nothing to say
    assert active_adapters(model) == ["third"]
    with pytest.warns(UserWarning, match="delete_adapter: 'third' was active; 'first' is from here on"):
        delete_adapter(model, "third")
    assert torch.equal(model(x), first)
    assert all("lora" in name for name in trained(model)) and trained(model)
    delete_adapter(model, "first")
    assert torch.equal(model(x), base(x)) and not lora_layers(model)


def test_of_several_active_adapters_the_others_stay_active() -> None:
    model = add_lora(add_lora(two_linear(), random_adapter("0"), "a"), random_adapter("0"), "b")
    set_adapter(model, ["a", "b"])
    delete_adapter(model, "a")
    assert active_adapters(model) == ["b"]


def _module_dict() -> nn.Module:
    return nn.ModuleDict({"task": nn.Linear(8, 2)})


def _module_list() -> nn.Module:
    return nn.ModuleList([nn.Linear(8, 2)])


def _parameters() -> nn.Module:
    return nn.ParameterList([nn.Parameter(torch.ones(2))])


@pytest.mark.parametrize("container", [_module_dict, _module_list, _parameters])
def test_a_container_cannot_be_trained_whole(container: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "heads": container()})
    with pytest.raises(
        lowrank.AdapterError, match=r"modules_to_save: heads is a .*, which is never called itself; name"
    ):
        add_lora(model, LoRAConfig(r=2, target_modules=["body"], modules_to_save=["heads"]))
    save_adapter(add_lora(model, random_adapter("body")), tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(path.read_text().replace('"modules_to_save": null', '"modules_to_save": ["heads"]'))
    with pytest.raises(lowrank.AdapterError, match="modules_to_save: heads is a"):
        load_adapter(model, tmp_path / "a")


def test_a_sequential_is_trained_whole() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    adapted = add_lora(model, LoRAConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    assert torch.equal(adapted(rows()), model(rows()))


def test_a_module_in_both_lists_is_refused_where_nothing_else_is_adapted() -> None:
    with pytest.raises(
        lowrank.UsageError, match=r"target_modules: '2' matches 2, but .*trained whole \(modules_to_save\)"
    ):
        add_lora(two_linear(), LoRAConfig(r=2, target_modules=["2"], modules_to_save=["2"]))
    with pytest.raises(lowrank.UsageError, match="target_modules"):
        add_lora(two_linear(), LoRAConfig(r=2, target_modules="2", modules_to_save=["2"]))


def test_what_one_adapter_holds_another_cannot_hold_otherwise() -> None:
    whole = add_lora(two_linear(), random_adapter("0", modules_to_save=["2"]), "a")
    with pytest.raises(lowrank.UsageError, match="'2' matches 2, but the adapter a trains it whole"):
        add_lora(whole, random_adapter("2"), "b")
    with pytest.raises(lowrank.AdapterError, match="modules_to_save: 0 carries the adapter a already"):
        add_lora(whole, random_adapter("2", modules_to_save=["0"]), "b")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_head_of_another_type_is_cast(dtype: torch.dtype, tmp_path: Path) -> None:
    half = add_lora(Encoder().to(dtype), random_adapter("query", modules_to_save=["score"]))
    save_adapter(half, tmp_path / "a")
    loaded = load_adapter(Encoder(), tmp_path / "a")
    head = saved_modules(loaded)["score"].modules_to_save["default"].weight
    assert head.dtype is torch.float32
    assert torch.equal(head, saved_modules(half)["score"].modules_to_save["default"].weight.float())
    assert run(loaded).shape == (*IDS.shape, 4)


def test_a_head_of_a_file_takes_the_place_of_a_compressed_one(tmp_path: Path) -> None:
    adapted = add_lora(Encoder(), random_adapter("query", task_type="SEQ_CLS"))
    move(adapted)
    save_adapter(adapted, tmp_path / "a")
    small = Encoder()
    small.score = lowrank.QuantizedLinear.from_linear(small.score)  # type: ignore[assignment]
    with pytest.raises(
        lowrank.AdapterError, match="QuantizedLinear holds integer codes, which cannot be trained whole"
    ):
        add_lora(small, random_adapter("query", task_type="SEQ_CLS"))
    loaded = load_adapter(small, tmp_path / "a")
    assert torch.equal(run(loaded), run(adapted))
    with lowrank.disable_adapter(loaded):
        # nn.MultiheadAttention rounds otherwise once its weights are frozen.
        torch.testing.assert_close(run(loaded), run(small), rtol=0.02, atol=0.02)
    assert type(loaded.score.original_module) is lowrank.QuantizedLinear
