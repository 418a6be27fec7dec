"""A torch newer than tested is named once, on the logger, and nothing else changes."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch

from lowrank.kernels import int_matmul, reset_routes, tested

CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"


@pytest.fixture(autouse=True)
def _nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tested, "_noted", [])


@pytest.mark.parametrize("version", ["2.13.1", "2.14.0+cpu", "2.15.0a0+git0123456", "3.0", "10.0.0"])
def test_a_newer_torch_is_named_once_at_the_first_product(
    version: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    codes = torch.tensor([[2, -128]], dtype=torch.int8)
    with caplog.at_level(logging.WARNING, logger="lowrank"):
        for _ in range(2):
            reset_routes()
            assert int_matmul(codes, codes).tolist() == [[4 + 128 * 128]]
    (record,) = caplog.records
    assert record.name == "lowrank"
    assert f"torch {version} was not tested" in record.getMessage()


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0", "2.13.0+cpu", "2.9", "unknown"])
def test_a_tested_or_older_torch_is_not_named(
    version: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    tested.note_untested_torch()
    assert not caplog.records


def test_the_constraints_name_the_torch_that_counts_as_tested() -> None:
    found = re.search(r"^torch==([\d.]+)$", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    assert tuple(map(int, found[1].split("."))) == tested.NEWEST_TESTED
