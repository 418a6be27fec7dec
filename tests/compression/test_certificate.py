"""The certificate of a result: what was proved, on which data, for which tensors; the same for the same run."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank.checkpoint import describe, save_compressed, stored_tensors
from lowrank.cli.text import info_text
from lowrank.io.digests import document_digest, tensor_digest


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 12)).eval()


def rows(samples: int, seed: int) -> Tensor:
    return torch.randn(samples, 48, generator=torch.Generator().manual_seed(seed))


def compress(**kwargs: Any) -> lowrank.CompressionResult:
    arguments: dict[str, Any] = {"calibration": [rows(192, 1)], "error_budget": 0.05, "progress": False}
    return lowrank.compress_model(mlp(), **(arguments | kwargs))


def test_it_states_what_was_promised_and_measured() -> None:
    result = compress(validation={"a": [rows(40, 2)], "b": [rows(50, 3)]})
    found, totals = result.certificate, result.report.totals
    assert found["metric"] == "output" and found["budget"] == 0.05 and found["confidence"] == 0.95
    assert (found["measured"], found["upper"]) == (totals["error_measured"], totals["error_upper"])
    assert found["samples"] == 90 and {name: item["samples"] for name, item in found["groups"].items()} == {
        "a": 40,
        "b": 50,
    }
    assert max(item["upper"] for item in found["groups"].values()) == found["upper"] <= 0.05
    assert set(found["data"]["verification"]) == {"a", "b"} and len(found["data"]["statistics"]) == 64
    assert found["versions"].keys() >= {"lowrank", "torch", "python"} and found["processor"]["flags"]
    digests = {name: tensor_digest(tensor) for name, tensor in stored_tensors(result.model).items()}
    assert found["tensors"] == document_digest(digests)
    assert len(json.dumps(found)) < 4000


def test_the_same_run_gives_the_same_and_other_data_another() -> None:
    one, two = compress(), compress()
    assert one.certificate == two.certificate
    other = compress(calibration=[rows(191, 1)])
    assert all(other.certificate["data"][part] != one.certificate["data"][part] for part in one.certificate["data"])
    # What was not seen by anything but the test has no part in the model.
    checked = compress(validation=[rows(40, 2)]), compress(validation=[rows(40, 4)])
    assert checked[0].certificate["data"]["search"] == checked[1].certificate["data"]["search"]
    assert checked[0].certificate["data"]["verification"] != checked[1].certificate["data"]["verification"]


def test_it_is_saved_and_says_whether_it_is_of_these_tensors(tmp_path: Path) -> None:
    result = compress()
    result.save(tmp_path / "out")
    document = json.loads((tmp_path / "out" / "lowrank_config.json").read_text())
    assert document["certificate"] == result.certificate
    found = describe(tmp_path / "out")
    assert found["certificate"] == result.certificate and "certificate" in info_text(found)
    assert hashlib.sha256((tmp_path / "out" / "plan.json").read_bytes()).hexdigest() == result.certificate["plan"]
    loaded = lowrank.load_model(tmp_path / "out", model=mlp())
    digests = {name: tensor_digest(tensor) for name, tensor in stored_tensors(loaded).items()}
    assert document["certificate"]["tensors"] == document_digest(digests)


def test_a_model_that_was_changed_takes_no_certificate_along(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = compress()
    with torch.no_grad():
        next(result.model.parameters()).add_(1.0)
    with caplog.at_level(logging.WARNING, logger="lowrank"):
        result.save(tmp_path / "out")
    assert "certificate is for other tensors" in caplog.text
    assert "certificate" not in json.loads((tmp_path / "out" / "lowrank_config.json").read_text())
    assert describe(tmp_path / "out")["certificate"] is None


def test_a_directory_without_one_is_described_too(tmp_path: Path) -> None:
    save_compressed(compress().model, tmp_path / "out")
    assert describe(tmp_path / "out")["certificate"] is None


@pytest.mark.parametrize(
    ("kwargs", "method"),
    [
        ({"calibration": None}, "computed from the weights"),
        ({"metric": lambda model: 1.0}, "the callable's own value"),
    ],
)
def test_where_nothing_is_tested_it_claims_no_confidence(kwargs: dict[str, Any], method: str) -> None:
    found = compress(**kwargs).certificate
    assert found["confidence"] is None and found["method"].startswith(method) and found["samples"] == 0


def test_objects_that_show_nothing_of_themselves_have_no_digest() -> None:
    class Pointer:
        __slots__ = ("index",)

        def __init__(self, index: int) -> None:
            self.index = index

    table = rows(96, 5)
    found = compress(
        calibration=[[Pointer(index) for index in range(start, start + 8)] for start in range(0, 96, 8)],
        forward_fn=lambda model, batch: model(table[[each.index for each in batch]]),
    ).certificate
    assert found["data"] == {"statistics": None, "search": None, "verification": None}


@pytest.mark.parametrize("inplace", [False, True])
def test_inplace_and_given_plans_have_one(inplace: bool) -> None:
    plan = compress().plan
    result = compress(plan=plan, inplace=inplace)
    digests = {name: tensor_digest(tensor) for name, tensor in stored_tensors(result.model).items()}
    assert result.certificate["tensors"] == document_digest(digests)
