"""Adapter files that are damaged, of another model, or not to be trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_bases import randomise
from lora_models import Encoder, random_adapter, rows, two_linear
from safetensors.torch import save_file
from torch import Tensor, nn

import lowrank
from lowrank.io import read_safetensors_header, read_tensor, write_safetensors
from lowrank.lora.adapters import adapter_names, lora_layers, saved_modules


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    adapted = lowrank.add_lora(model(), lowrank.LoRAConfig(r=2, use_dora=True))
    randomise(adapted)
    return lowrank.save_adapter(adapted, tmp_path / "adapter")


def rewrite(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    header = read_safetensors_header(path)
    tensors = {name: read_tensor(header, name) for name in header.tensors}
    change(tensors)
    path.unlink()
    write_safetensors(path, tensors, header.metadata)


def set_nan(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.2.lora_B.weight"][0, 0] = float("nan")


def reshape(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.0.lora_A.weight"] = torch.zeros(2, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("base_model.model.0.lora_A.weight"), "layer 0: must have lora_A, lora_B, lora_magnitude_vector, got"),
        (lambda t: t.pop("base_model.model.2.lora_magnitude_vector"), "layer 2: must have"),
        (reshape, r"layer 0.lora_A: the model needs shape \(2, 6\), the file holds \(2, 7\)"),
        (set_nan, "layer 2.lora_B: holds NaN or Inf"),
        (lambda t: t.update({"base_model.model.5.lora_A.weight": torch.zeros(2, 2)}), "an adapter for 5 .*no such module"),
        (lambda t: t.update({"base_model.model.1.lora_A.weight": torch.zeros(2, 2)}), "an adapter for 1 .*no adapter fits a Tanh"),
        (lambda t: t.update({"base_model.model.0.weight": torch.zeros(2)}), "1 tensors have no place in this model, .*0.weight"),
    ],
    ids=["no A", "no magnitude", "shape", "NaN", "no module", "wrong module", "rest"],
)  # fmt: skip
def test_tensors_that_do_not_fit(saved: Path, change: Any, message: str) -> None:
    rewrite(saved, change)
    base = model()
    before = {name: id(module) for name, module in base.named_modules()}
    with pytest.raises(lowrank.CheckpointError, match=message) as caught:
        lowrank.load_adapter(base, saved, inplace=True)
    assert caught.value.exit_code == 3
    assert {name: id(module) for name, module in base.named_modules()} == before


def test_files_that_are_not_there_or_not_read(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(lowrank.CheckpointError, match="not a directory with an adapter"):
        lowrank.load_adapter(model(), tmp_path / "nowhere")
    (saved / "adapter_model.safetensors").rename(saved / "adapter_model.bin")
    with pytest.raises(lowrank.CheckpointError, match="a pickle, which is never read"):
        lowrank.load_adapter(model(), saved)
    (saved / "adapter_model.bin").unlink()
    with pytest.raises(lowrank.CheckpointError, match=r"adapter_model\.safetensors: missing"):
        lowrank.load_adapter(model(), saved)


@pytest.mark.parametrize("text", ["", "[]", '{"r": NaN}', '{"r": 1, "r": 2}', '{"peft_type": "LORA", "r": -3}'])
def test_configurations_that_are_damaged(saved: Path, text: str) -> None:
    (saved / "adapter_config.json").write_text(text)
    with pytest.raises(lowrank.LowRankError) as caught:
        lowrank.load_adapter(model(), saved)
    assert caught.value.exit_code == 3


def test_a_truncated_file(saved: Path) -> None:
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(lowrank.CheckpointError, match="cut short"):
        lowrank.load_adapter(model(), saved)


def test_saving_is_whole_or_not_at_all_and_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    adapted = lowrank.load_adapter(model(), saved)
    with pytest.raises(lowrank.UsageError, match="not empty"):
        lowrank.save_adapter(adapted, saved)
    lowrank.save_adapter(adapted, tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()
    lowrank.save_adapter(adapted, saved, overwrite=True)
    assert sorted(path.name for path in saved.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    with pytest.raises(lowrank.StorageError):
        lowrank.save_adapter(adapted, tmp_path / "missing" / "adapter")


def test_which_adapter_is_saved(tmp_path: Path) -> None:
    adapted = lowrank.add_lora(model(), lowrank.LoRAConfig(r=1), "one")
    lowrank.add_lora(adapted, lowrank.LoRAConfig(r=2, target_modules=["2"]), "two", inplace=True)
    lowrank.save_adapter(adapted, tmp_path / "active")
    document = json.loads((tmp_path / "active" / "adapter_config.json").read_text())
    assert document["r"] == 2 and document["target_modules"] == ["2"]
    lowrank.save_adapter(adapted, tmp_path / "one", "one")
    # "all-linear" is written out: on the compressed model the words would cover other layers.
    assert json.loads((tmp_path / "one" / "adapter_config.json").read_text())["target_modules"] == ["0", "2"]
    lowrank.set_adapter(adapted, ["one", "two"])
    with pytest.raises(lowrank.UsageError, match="which of one, two"):
        lowrank.save_adapter(adapted, tmp_path / "which")
    with pytest.raises(lowrank.AdapterError, match="'three': not on this model"):
        lowrank.save_adapter(adapted, tmp_path / "which", "three")


def test_several_adapters_load_beside_each_other(saved: Path) -> None:
    x = torch.randn(3, 6)
    adapted = lowrank.load_adapter(model(), saved, "first")
    alone = adapted(x)
    lowrank.load_adapter(adapted, saved, "second", inplace=True)
    assert adapter_names(adapted) == ["first", "second"]
    assert torch.equal(adapted(x), alone)
    with pytest.raises(lowrank.UsageError, match="already has an adapter 'second'"):
        lowrank.load_adapter(adapted, saved, "second")


class Nested(nn.Module):
    """``fc`` is also the end of another layer's name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"fc": nn.Linear(4, 4)})

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner["fc"](self.fc(x))
        return out


def test_whole_names_are_no_suffixes(tmp_path: Path) -> None:
    config = lowrank.LoRAConfig(r=2, exclude_modules=["inner.fc"])
    adapted = lowrank.add_lora(Nested(), config)
    lowrank.add_lora(adapted, lowrank.LoRAConfig(r=1, target_modules="inner.fc"), "second", inplace=True)
    lowrank.add_weighted_adapter(adapted, ["default"], [2.0], "twice")
    for name in ("default", "twice"):
        lowrank.save_adapter(adapted, tmp_path / name, name)
        loaded = lowrank.load_adapter(Nested(), tmp_path / name)
        assert list(lora_layers(loaded)) == ["fc"]
    assert json.loads((tmp_path / "twice" / "adapter_config.json").read_text())["target_modules"] == "fc"


def test_a_file_without_anything_for_the_model_is_refused(tmp_path: Path) -> None:
    lowrank.save_adapter(lowrank.add_lora(two_linear(), random_adapter("0")), tmp_path / "adapter")
    with pytest.raises(lowrank.CheckpointError, match=r"holds an adapter for 0 .* which this model cannot take"):
        lowrank.load_adapter(nn.ModuleDict({"a": nn.Linear(8, 12)}), tmp_path / "adapter")
    save_file({}, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(lowrank.CheckpointError, match="holds no adapter of a layer"):
        lowrank.load_adapter(nn.ModuleDict({"a": nn.Linear(8, 12)}), tmp_path / "adapter")


def test_an_adapter_that_does_not_load_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    adapted = lowrank.add_lora(two_linear(), random_adapter("0", modules_to_save=["2"]), "a")
    lowrank.save_adapter(adapted, tmp_path / "good")
    stored = lowrank.add_lora(two_linear(), random_adapter("0", modules_to_save=["2"]), "b")
    with torch.no_grad():
        stored[0].lora_A["b"].weight[0, 0] = float("nan")
        saved_modules(adapted)["2"].modules_to_save["a"].weight.add_(1.0)
        before = adapted(rows())
    lowrank.save_adapter(stored, tmp_path / "bad")
    flags = {name: parameter.requires_grad for name, parameter in adapted.named_parameters()}
    with pytest.raises(lowrank.CheckpointError, match="NaN"):
        lowrank.load_adapter(adapted, tmp_path / "bad", "b", inplace=True)
    with torch.no_grad():
        assert torch.equal(adapted(rows()), before)
    assert {name: parameter.requires_grad for name, parameter in adapted.named_parameters()} == flags
    plain = two_linear()
    with pytest.raises(lowrank.CheckpointError, match="NaN"):
        lowrank.load_adapter(plain, tmp_path / "bad", inplace=True)
    assert all(parameter.requires_grad for parameter in plain.parameters())
    assert list(plain.state_dict()) == list(two_linear().state_dict())


def test_a_rank_other_than_the_configuration_says_is_refused(tmp_path: Path) -> None:
    lowrank.save_adapter(lowrank.add_lora(two_linear(), random_adapter("0")), tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 4}))
    with pytest.raises(lowrank.CheckpointError, match=r"layer 0: .*rank 4.*rank 2"):
        lowrank.load_adapter(two_linear(), tmp_path / "a")


def test_nesting_without_end_in_the_metadata_is_damage(saved: Path) -> None:
    path = saved / "adapter_model.safetensors"
    header = read_safetensors_header(path)
    tensors = {name: read_tensor(header, name) for name in header.tensors}
    for note in (
        "[" * 100_000 + "]" * 100_000,
        '{"a":' * 100_000,
        "NaN",
        '{"zero_padded": 3}',
        '{"undilated": {}}',
        "[]",
    ):
        path.unlink()
        write_safetensors(path, tensors, {"format": "pt", "lowrank": note})
        with pytest.raises(lowrank.CheckpointError, match=r"adapter_model\.safetensors: its metadata on lowrank is"):
            lowrank.load_adapter(model(), saved)


def without(tensors: dict[str, Tensor], layer: str) -> None:
    for name in [name for name in tensors if f".{layer}." in name]:
        del tensors[name]


def test_layers_that_the_configuration_names_and_the_file_lacks_are_named(saved: Path, tmp_path: Path) -> None:
    rewrite(saved, lambda tensors: without(tensors, "2"))
    with pytest.warns(
        UserWarning, match=r"holds nothing for 1 layers that target_modules names \(2\); no adapter is on them"
    ):
        loaded = lowrank.load_adapter(model(), saved)
    assert list(lora_layers(loaded)) == ["0"]
    # Saved again, the file names what it holds.
    lowrank.save_adapter(loaded, tmp_path / "again")
    lowrank.load_adapter(model(), tmp_path / "again")


def test_what_a_pattern_of_layers_leaves_out_is_not_missed(tmp_path: Path) -> None:
    config = lowrank.LoRAConfig(r=1, target_modules=["query"], layers_to_transform=[0, 2], exclude_modules=["2.query"])
    with pytest.raises(lowrank.UsageError, match="no target module in layer 2"):
        lowrank.add_lora(Encoder(), config)
    config = config.replace(exclude_modules=None)
    lowrank.save_adapter(lowrank.add_lora(Encoder(), config), tmp_path / "a")
    lowrank.load_adapter(Encoder(), tmp_path / "a")  # warnings are errors here
    rewrite(tmp_path / "a", lambda tensors: without(tensors, "layers.2.query"))
    with pytest.warns(UserWarning, match=r"1 layers that target_modules names \(encoder\.layers\.2\.query\)"):
        lowrank.load_adapter(Encoder(), tmp_path / "a")
