"""Saving and loading: bit for bit, whole or not at all."""

from __future__ import annotations

import copy
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors.torch
import torch
from compressed_models import TOKENS, Plan, Report, Tiny, compressed
from torch import nn

from lowrank.checkpoint import describe, load_model, save_compressed, stored_tensors
from lowrank.errors import CheckpointError, LowRankError, UsageError
from lowrank.layers import QuantizedLinear


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_compressed(compressed(), tmp_path / "out")


# round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_reload_is_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model = compressed(dtype)
    path = save_compressed(model, tmp_path / "out")
    loaded = load_model(path, model=lambda: Tiny().to(dtype))
    assert not loaded.training
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert loaded(TOKENS).dtype == dtype
    before, after = model.state_dict(), loaded.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_float32_skeleton_serves_a_half_model(tmp_path: Path, dtype: torch.dtype) -> None:
    model = compressed(dtype)
    loaded = load_model(save_compressed(model, tmp_path / "out"), model=Tiny())
    assert loaded.mask.dtype == dtype
    assert torch.equal(loaded(TOKENS), model(TOKENS))


def test_reload_in_another_process_is_bit_for_bit(tmp_path: Path, saved: Path) -> None:
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); torch.set_num_threads(1)\n"
        "from compressed_models import Tiny, TOKENS; from lowrank.checkpoint import load_model\n"
        "torch.save(load_model(sys.argv[2], model=Tiny)(TOKENS), sys.argv[3])"
    )
    arguments = [sys.executable, "-c", code, str(Path(__file__).parents[1]), str(saved), str(tmp_path / "y.pt")]
    subprocess.run(arguments, check=True)
    assert torch.equal(torch.load(tmp_path / "y.pt", weights_only=True), compressed()(TOKENS))


def test_ties_and_shared_modules_come_back(saved: Path) -> None:
    loaded = load_model(saved, model=Tiny)
    assert loaded.mid is loaded.again
    assert loaded.head.codes is loaded.embed.codes  # type: ignore[union-attr]
    assert loaded.head.scale is loaded.embed.scale  # type: ignore[union-attr]
    ties = json.loads((saved / "lowrank_config.json").read_text())["ties"]
    assert ties["head.codes"] == "embed.codes"


def test_tied_parameters_are_one_parameter_again(tmp_path: Path) -> None:
    model = Tiny()
    loaded = load_model(save_compressed(model, tmp_path / "out"), model=Tiny)
    assert loaded.head.weight is loaded.embed.weight  # type: ignore[union-attr]
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", ["module", "meta", "factory"])
def test_the_skeleton_is_not_touched(saved: Path, kind: str) -> None:
    skeleton = Tiny()
    if kind == "meta":
        # As `with torch.device("meta")` would, but with its unstored buffer in place.
        skeleton = copy.deepcopy(skeleton)
        for module in skeleton.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.to("meta"))
    before = {name: tensor.clone() for name, tensor in skeleton.state_dict().items()}
    loaded = load_model(saved, model=(lambda: Tiny()) if kind == "factory" else skeleton)
    assert torch.equal(loaded(TOKENS), compressed()(TOKENS))
    assert type(skeleton.up) is nn.Linear
    assert skeleton.training
    after = skeleton.state_dict()
    assert list(after) == list(before)
    assert kind == "meta" or all(torch.equal(after[name], before[name]) for name in before)


def test_a_buffer_without_values_is_named(saved: Path) -> None:
    with torch.device("meta"):
        skeleton = Tiny()
    with pytest.raises(UsageError, match="buffer 'mask'"):
        load_model(saved, model=skeleton)


def test_dtype_converts_all_but_scales(saved: Path) -> None:
    loaded = load_model(saved, model=lambda: Tiny().double(), dtype=torch.float64)
    for name, tensor in loaded.state_dict().items():
        expected = torch.float32 if name.endswith("scale") else torch.float64
        assert tensor.dtype == expected or not tensor.is_floating_point(), name
    torch.testing.assert_close(loaded(TOKENS).float(), compressed()(TOKENS), rtol=2e-2, atol=2e-2)
    with pytest.raises(UsageError, match="floating-point dtype"):
        load_model(saved, model=Tiny, dtype=torch.int8)


def test_a_bare_layer_is_a_model(tmp_path: Path) -> None:
    layer = QuantizedLinear.from_linear(nn.Linear(6, 5))
    loaded = load_model(save_compressed(layer, tmp_path / "out"), model=nn.Linear(6, 5))
    assert isinstance(loaded, QuantizedLinear)
    assert torch.equal(loaded.codes, layer.codes)


def test_shards(tmp_path: Path, saved: Path) -> None:
    model = compressed()
    path = save_compressed(model, tmp_path / "sharded", max_shard_bytes=300)
    shards = sorted(path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert not (path / "model.safetensors").exists()
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored_tensors(model).values())
    assert torch.equal(load_model(path, model=Tiny)(TOKENS), model(TOKENS))
    assert describe(path)["tensor_bytes"] == describe(saved)["tensor_bytes"]


# what is in the directory


def test_the_file_holds_exactly_the_stored_tensors(saved: Path) -> None:
    model = compressed()
    tensors = stored_tensors(model)
    in_file = safetensors.torch.load_file(saved / "model.safetensors")
    assert set(in_file) == set(tensors)
    assert all(torch.equal(in_file[name], tensor) for name, tensor in tensors.items())
    assert describe(saved)["tensor_bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert "mask" not in tensors
    assert "head.codes" not in tensors
    assert "again.codes" not in tensors
    factors = [name for name in tensors if name.partition(".")[0] in ("embed", "up", "mid", "down", "head")]
    assert not any("lora_" in name or name.endswith("weight") for name in factors)


def test_every_file_but_the_run_is_the_same_again(tmp_path: Path) -> None:
    total = sum(tensor.nbytes for tensor in stored_tensors(compressed()).values())
    paths = []
    for number in range(2):
        options: dict[str, Any] = {"plan": Plan(), "report": Report(total, float(number)), "extra": {"seed": 3}}
        paths.append(save_compressed(compressed(), tmp_path / str(number), **options))
    names = sorted(path.name for path in paths[0].iterdir())
    assert names == [
        "README.md", "lowrank_config.json", "model.safetensors", "plan.json",
        "report.html", "report.json", "report.md", "run.json",
    ]  # fmt: skip
    differing = [name for name in names if (paths[0] / name).read_bytes() != (paths[1] / name).read_bytes()]
    assert differing == ["run.json"]
    again = save_compressed(load_model(paths[0], model=Tiny), tmp_path / "again", extra={"seed": 3})
    for name in ("model.safetensors", "lowrank_config.json"):
        assert (again / name).read_bytes() == (paths[0] / name).read_bytes()
    assert describe(paths[0])["totals"]["error_budget"] == 0.1


def test_a_report_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the report counts 7 bytes"):
        save_compressed(compressed(), tmp_path / "out", report=Report(7))
    assert not (tmp_path / "out").exists()


def test_describe_reads_headers_only(saved: Path) -> None:
    with mock.patch("lowrank.io.index.read_tensor", side_effect=AssertionError):
        found = describe(saved)
    assert found["layers"] == 5
    assert found["formats"] == {"int8": 3, "lowrank": 1, "lowrank-int8": 1}
    assert found["ranks"] == [4, 5]
    assert found["totals"] is None
    assert json.loads(json.dumps(found)) == found


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = save_compressed(compressed(), tmp_path / "out")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o640}


# saving: refusals


def test_the_destination_is_checked_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").write_text("x")
    cases: list[tuple[Path, Path | None, int]] = [
        (tmp_path / "file", None, 5),
        (tmp_path / "absent" / "out", None, 5),
        (full, None, 2),
        (full / "out", full, 2),
        (full, full / "model", 2),
    ]
    for path, source, code in cases:
        with (
            mock.patch("lowrank.checkpoint.saving.write_safetensors", side_effect=AssertionError),
            pytest.raises(LowRankError) as caught,
        ):
            save_compressed(compressed(), path, source=source)
        assert caught.value.exit_code == code
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "x"]


def test_a_full_disk_leaves_the_old_output(tmp_path: Path, saved: Path) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    code = (
        "import resource, signal, sys; sys.path.insert(0, sys.argv[1])\n"
        "from compressed_models import compressed; from lowrank.checkpoint import save_compressed\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))\n"
        "try: save_compressed(compressed(), sys.argv[2], overwrite=True)\n"
        "except Exception as error: print(type(error).__name__, error.exit_code)"
    )
    arguments = [sys.executable, "-c", code, str(Path(__file__).parents[1]), str(saved)]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "StorageError 5"
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert os.listdir(tmp_path) == ["out"]


def test_tensors_that_cannot_be_saved_are_named(tmp_path: Path) -> None:
    class WithState(nn.Linear):
        def get_extra_state(self) -> dict[str, object]:
            return {"a": object()}

    with torch.device("meta"):
        meta = nn.Sequential(nn.Linear(2, 2))
    sparse = nn.Module()
    sparse.register_buffer("grid", torch.eye(3).to_sparse())
    exotic = nn.Module()
    exotic.register_buffer("wide", torch.zeros(2, dtype=torch.complex128))
    cases = [
        (meta, "'0.weight'.*meta"),
        (sparse, "'grid'.*sparse"),
        (WithState(2, 2), "get_extra_state gives .dict. is not plain JSON"),
    ]
    for model, words in [*cases, (exotic, "'wide'.*complex128")]:
        with pytest.raises(CheckpointError, match=words):
            save_compressed(model, tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["a b", "a\nb", "-a", "x" * 255, os.fsdecode(b"\xff")], ids=range(5))
def test_strange_paths(tmp_path: Path, name: str) -> None:
    path = save_compressed(compressed(), tmp_path / name)
    assert torch.equal(load_model(path, model=Tiny)(TOKENS), compressed()(TOKENS))
    assert "\n" not in str(describe(path)["directory"])
