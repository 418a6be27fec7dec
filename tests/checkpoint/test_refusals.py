"""Loading what is damaged, hostile or somebody else's: nothing is believed that the tensors contradict."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors.torch
import torch
from compressed_models import Tiny, compressed
from torch import nn

from lowrank.checkpoint import load_model, loading, save_compressed
from lowrank.errors import CheckpointError, LowRankError, StorageError, UsageError
from lowrank.io import write_safetensors


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_compressed(compressed(), tmp_path / "out")


# loading: refusals. Nothing may be read of the tensors, or built, for any of these.


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((path / "lowrank_config.json").read_text())
    change(document)
    (path / "lowrank_config.json").write_text(json.dumps(document))


def refused(path: Path, words: str, code: int = 3, model: Any = None) -> None:
    builder = mock.Mock(side_effect=AssertionError("built"))
    with (
        mock.patch("lowrank.io.index.read_tensor", side_effect=AssertionError("read")),
        pytest.raises(LowRankError, match=words) as caught,
    ):
        load_model(path, model=model or builder)
    assert caught.value.exit_code == code
    assert "\n" not in str(caught.value)


RANKS = [10**12, 0, -1, "8", True, 8.0, float("inf"), float("nan")]


@pytest.mark.parametrize("rank", RANKS, ids=map(str, RANKS))
def test_impossible_ranks(saved: Path, rank: object) -> None:
    edit(saved, lambda document: document["layers"]["up"].update(rank=rank))
    refused(saved, "layer 'up': rank must be an integer from 1 to 8|not JSON")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(format_version=2), "written by a newer lowrank .format_version 2"),
        (lambda d: d.update(format_version="1"), "format_version must be"),
        (lambda d: d.pop("format_version"), "format_version must be"),
        (lambda d: d.update(quant_method="gptq"), "quant_method must be 'lowrank'"),
        (lambda d: d["layers"]["up"].update(kind="Hologram"), "'Hologram' is unknown: written by a newer lowrank"),
        (lambda d: d["layers"]["up"].update(kind=["SVDCompressedLinear"]), "written by a newer lowrank"),
        (lambda d: d["layers"]["up"].pop("kind"), "written by a newer lowrank"),
        (lambda d: d["layers"]["up"].update(rank=3), "'up': tensor 'up.left' is"),
        (lambda d: d["layers"]["up"].update(shape=[12, 2**40]), "'up': tensor"),
        (lambda d: d["layers"]["up"].update(shape=[12, 10**30]), "'up': a size in shape"),
        (lambda d: d["layers"]["up"].update(shape=[12]), "shape must be a list"),
        (lambda d: d["layers"]["up"].update(shape=None), "shape must be a list"),
        (lambda d: d["layers"]["up"].update(dtype="float64"), "'up': tensor 'up.left' is"),
        (lambda d: d["layers"]["up"].update(dtype="nonsense"), "layer 'up'"),
        (lambda d: d["layers"]["up"].update(dtype=3), "layer 'up'"),
        (lambda d: d["layers"]["mid"].update(bits=9), "bits must be an integer from 2 to 8"),
        (lambda d: d["layers"].update(ghost=d["layers"]["up"]), "'ghost': its tensor 'ghost.left' is missing"),
        (lambda d: d["layers"].pop("up"), "built"),
        (lambda d: d.update(layers=[]), "layers must map"),
        (lambda d: d.update(layers={"up": 3}), "layers must map"),
        (lambda d: d.pop("layers"), "layers must map"),
        (lambda d: d.update(layers={str(n): {} for n in range(10_000)}), "10000 layers"),
        (lambda d: d["ties"].update({"head.codes": "nowhere"}), "tie 'head.codes'"),
        (lambda d: d["ties"].update({"norm.weight": "norm.bias"}), "tie 'norm.weight'"),
        (lambda d: d.update(ties=3), "ties must map"),
        (lambda d: d.update(guard="norm.weight"), "guard"),
        (lambda d: d.update(guard="nowhere"), "guard"),
        (lambda d: d.update(guard=3), "guard"),
    ],
)
def test_a_manifest_that_lies(saved: Path, change: Callable[[dict[str, Any]], object], words: str) -> None:
    edit(saved, change)
    if words == "built":  # the factory is reached: only the skeleton can tell that a layer is missing
        refused(saved, "'up.weight' of the model is missing; near: up", model=Tiny)
    else:
        refused(saved, words)


def test_ten_million_layers_are_refused_unread(saved: Path) -> None:
    one = b'"%d":{}'
    layers = b",".join(one % number for number in range(10_000_000))
    text = b'{"quant_method":"lowrank","format_version":1,"layers":{' + layers + b"}}"
    (saved / "lowrank_config.json").write_bytes(text)
    with mock.patch("lowrank.checkpoint.manifest.read_json", side_effect=AssertionError("read")):
        refused(saved, "bytes of layers for 15 tensors")


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    change(tensors)
    (path / "model.safetensors").unlink()
    write_safetensors(path / "model.safetensors", tensors)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("down.scale"), "'down': its tensor 'down.scale' is missing"),
        (lambda t: t.update({"down.scale": torch.ones(6)}), "'down.scale' is torch.float32 .6."),
        (lambda t: t.update({"down.scale": torch.ones(5, dtype=torch.float64)}), "'down.scale' is torch.float64"),
        (lambda t: t.update({"down.extra": torch.ones(5)}), "'down.extra' is not one"),
        (lambda t: t.update({"down.weight": torch.ones(5)}), "'down.weight' is not one"),
    ],
)
def test_tensors_that_do_not_fit_their_layer(
    saved: Path, change: Callable[[dict[str, torch.Tensor]], object], words: str
) -> None:
    rewrite(saved, change)
    refused(saved, words)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_are_positive_and_finite(saved: Path, value: float) -> None:
    rewrite(saved, lambda tensors: tensors["down.scale"].__setitem__(2, value))
    with pytest.raises(CheckpointError, match=r"'down\.scale': every scale must be positive and finite") as caught:
        load_model(saved, model=Tiny)
    assert caught.value.exit_code == 3


def test_codes_are_symmetric(saved: Path) -> None:
    rewrite(saved, lambda tensors: tensors["down.left_codes"].__setitem__((0, 0), -128))
    with pytest.raises(CheckpointError, match=r"'down.left_codes': codes must lie in \[-127, 127\]"):
        load_model(saved, model=Tiny)


def test_the_skeleton_must_fit(saved: Path) -> None:
    def grown(**changes: Any) -> Tiny:
        skeleton = Tiny()
        for name, module in changes.items():
            setattr(skeleton, name, module)
        return skeleton

    cases = [
        (grown(up=nn.Linear(8, 13)), "layer 'up' is .13, 8. in the model, but .12, 8. in the file"),
        (grown(norm=nn.LayerNorm(9)), "'norm.weight' is .9. in the model, but .8. in the file"),
        (grown(norm=nn.Identity()), "the model has no tensor 'norm.bias'"),
        (grown(extra=nn.Linear(2, 2)), "'extra.weight' of the model is missing"),
        (nn.Sequential(nn.Linear(2, 2)), "the model has no layer 'embed'"),
    ]
    for skeleton, words in cases:
        refused(saved, words, model=skeleton)
    renamed = grown(ups=nn.Linear(8, 12))
    del renamed.up
    refused(saved, "no layer 'up'; near: ups", model=renamed)


def test_what_is_no_compressed_model(tmp_path: Path, saved: Path) -> None:
    refused(tmp_path / "absent", "no such directory")
    refused(tmp_path, r"has no lowrank_config\.json; give a directory that `save`")
    for name, words in {
        "config.json": "a model that is not compressed",
        "adapter_config.json": "but an adapter",
    }.items():
        (tmp_path / name).write_text("{}", encoding="utf-8")
        refused(tmp_path, words)
    (saved / "model.safetensors").unlink()
    refused(saved, "neither model.safetensors")
    with pytest.raises(UsageError, match="function that makes one; it made a int"):
        load_model(save_compressed(compressed(), tmp_path / "other"), model=lambda: 3)  # type: ignore[arg-type,return-value]
    with pytest.raises(UsageError, match=r"pass model=: .*Tiny"):
        load_model(tmp_path / "other")


def test_a_skeleton_that_cannot_be_copied_is_refused_by_name(saved: Path) -> None:
    class Stubborn(Tiny):
        def __deepcopy__(self, memo: dict[int, Any]) -> Tiny:
            raise TypeError("cannot pickle '_thread.lock' object")

    with pytest.raises(UsageError, match="Stubborn cannot be copied"):
        load_model(saved, model=Stubborn())


def test_a_skeleton_is_copied_without_its_weights() -> None:
    skeleton = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    copied = loading._copy_without_weights(skeleton)
    assert all(tensor.is_meta for tensor in copied.state_dict().values())
    assert not any(tensor.is_meta for tensor in skeleton.state_dict().values())


def test_reading_that_fails_leaves_the_skeleton(saved: Path) -> None:
    skeleton = Tiny()
    with (
        mock.patch("lowrank.io.index.read_tensor", side_effect=StorageError("gone")),
        pytest.raises(StorageError, match="gone"),
    ):
        load_model(saved, model=skeleton)
    assert type(skeleton.up) is nn.Linear
