"""One thread and a fixed seed for every test: the same numbers on every machine, and no fight over cores."""

from __future__ import annotations

import pytest
import torch

# It writes files by an older version of the package, which is not installed here.
collect_ignore = ["files_of_0_3_0/make.py"]
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
