"""What was saved is what is loaded: every tensor, the manifest and the configuration have a digest that loading compares."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowrank
from lowrank.checkpoint import MANIFEST_NAME, describe
from lowrank.errors import CheckpointError
from lowrank.io import read_safetensors_header


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 8))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    lowrank.compress_model(make_model(), error_budget=0.1, progress=False).save(tmp_path / "out")
    return tmp_path / "out"


def test_a_changed_byte_of_any_tensor_is_named(saved: Path) -> None:
    file = saved / "model.safetensors"
    header = read_safetensors_header(file)
    content = file.read_bytes()
    assert len(header.tensors) > 4
    for name, entry in header.tensors.items():
        # The lowest bit of the last byte but one: a scale stays positive, a code within its range.
        place = header.data_start + entry.end - 2
        changed = bytearray(content)
        changed[place] ^= 1
        file.write_bytes(changed)
        with pytest.raises(CheckpointError, match=f"tensor {name!r}") as caught:
            lowrank.load_model(saved, model=make_model())
        assert caught.value.exit_code == 3
    file.write_bytes(content)
    lowrank.load_model(saved, model=make_model())


def test_two_tensors_that_changed_places_are_noticed(saved: Path) -> None:
    file = saved / "model.safetensors"
    header = read_safetensors_header(file)
    content = bytearray(file.read_bytes())
    one, other = header.tensors["1.weight"], header.tensors["1.bias"]
    parts = [bytes(content[header.data_start + entry.start : header.data_start + entry.end]) for entry in (one, other)]
    for entry, part in zip((other, one), parts, strict=True):
        content[header.data_start + entry.start : header.data_start + entry.end] = part
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tensor '1\.(weight|bias)' is not the one that was saved"):
        lowrank.load_model(saved, model=make_model())


def first(document: dict[str, Any]) -> dict[str, Any]:
    return next(iter(document["layers"].values()))


@pytest.mark.parametrize(
    "change",
    [
        lambda document: first(document).update(activations="float"),
        lambda document: document.update(lowrank_version="9.9"),
        lambda document: document["digests"]["tensors"].pop("1.weight"),
        lambda document: document["digests"].update(algorithm="crc32"),
        lambda document: document.pop("digests"),
        lambda document: document.update(digest="0" * 64),
        lambda document: document.update(digest=1),
        lambda document: document.update(digests=[]),
    ],
)
def test_an_edited_manifest_is_named(saved: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = saved / MANIFEST_NAME
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=MANIFEST_NAME) as caught:
        lowrank.load_model(saved, model=make_model())
    assert caught.value.exit_code == 3


def test_a_directory_without_digests_loads(saved: Path) -> None:
    path = saved / MANIFEST_NAME
    document = json.loads(path.read_text())
    del document["digests"], document["digest"]
    path.write_text(json.dumps(document))
    assert isinstance(lowrank.load_model(saved, model=make_model()), nn.Module)


def test_layout_of_the_manifest_does_not_matter(saved: Path) -> None:
    path = saved / MANIFEST_NAME
    path.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items()))))
    assert isinstance(lowrank.load_model(saved, model=make_model()), nn.Module)


@pytest.mark.parametrize(
    "totals",
    [
        1,
        [],
        "x",
        {"size_ratio": "a half"},
        {"error_upper": [0.1], "metric": "x"},
        {"bytes_before": True},
        {"metric": 3},
    ],
)
def test_a_damaged_report_beside_a_model_is_named(saved: Path, totals: object) -> None:
    report = saved / "report.json"
    for damaged in (json.dumps(json.loads(report.read_text()) | {"totals": totals}), "{", "[]", '{"totals": NaN}'):
        report.write_text(damaged)
        with pytest.raises(CheckpointError, match=r"report\.json") as caught:
            describe(saved)
        assert caught.value.exit_code == 3
        report.write_text("{}")
    assert describe(saved)["totals"] is None
