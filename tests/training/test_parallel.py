"""Two processes under torchrun, joined by gloo through accelerate, against one process on the same batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lowrank.integrations.accelerate import Processes
from lowrank.training.data import read_example

pytest.importorskip("accelerate")

SCRIPT = """
import json, sys, torch
from torch import nn
from lowrank.training import finetune
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
x = torch.randn(23, 6); y = torch.randint(3, (23,))
data = [(x[:8], y[:8]), (x[8:17], y[8:17]), (x[17:22], y[17:22]), (x[22:], y[22:])]
result = finetune(model, data, data, epochs=3, lr=0.02, gradient_accumulation=2, output_dir=sys.argv[1], progress=False)
line = json.dumps({"history": result.history, "evaluations": result.evaluations,
                   "weights": [p.flatten().tolist() for p in model.parameters()]})
# In one piece: two processes share the stream.
sys.stdout.write(line + "\\n")
sys.stdout.flush()
"""


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        environment.pop(name, None)
    one = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "one")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert one.returncode == 0, one.stderr
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    two = subprocess.run(
        [*command, str(script), str(tmp_path / "two")], capture_output=True, text=True, env=environment, check=False
    )
    assert two.returncode == 0, two.stderr
    expected = json.loads(one.stdout)
    found = [json.loads(line) for line in two.stdout.splitlines() if line.startswith("{")]
    assert len(found) == 2
    assert found[0] == found[1]
    for mine, theirs in zip(expected["history"], found[0]["history"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    assert [row["value"] for row in expected["evaluations"]] == pytest.approx(
        [row["value"] for row in found[0]["evaluations"]], rel=1e-4
    )
    for mine, theirs in zip(expected["weights"], found[0]["weights"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(
        path.name for path in (tmp_path / "one").iterdir()
    )


def test_labels_of_several_tensors_are_shared_out_with_their_inputs() -> None:
    labels = (torch.arange(6), {"other": torch.arange(12).view(6, 2)})
    example = read_example((torch.arange(6.0)[:, None], labels), "train", own_loss=False)
    mine = example.share(1, 2)
    assert mine is not None
    assert mine.labels[0].tolist() == [1, 3, 5]
    assert mine.labels[1]["other"].tolist() == [[2, 3], [6, 7], [10, 11]]


def test_sums_over_processes_go_by_the_device_of_their_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    operations = pytest.importorskip("accelerate.utils", reason="the extra hf is not installed")
    seen: list[str] = []

    def reduce(tensor: Tensor, reduction: str) -> Tensor:
        seen.append(tensor.device.type)
        return torch.full(tensor.shape, 3.0)

    monkeypatch.setattr(operations, "reduce", reduce)
    team = Processes(0, 2, SimpleNamespace(device=torch.device("meta")))
    assert team.total(torch.ones(2)).tolist() == [3.0, 3.0]
    assert seen == ["meta"]
