"""Convolutional models from end to end: compressed, measured, saved, planned again, BatchNorm folded or not."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conv_models import ResNet, TextConv, pictures, resnet, with_falling_spectra
from helpers import assert_same_state, seeded
from torch import Tensor, nn

import lowrank
from lowrank.checkpoint import save_compressed, stored_tensors
from lowrank.compression.plan import Plan
from lowrank.errors import CheckpointError, LowRankError, RankError, UsageError
from lowrank.layers import CompressedLayer
from lowrank.targets.batchnorm import FoldedBatchNorm


def compress(model: nn.Module, **options: Any) -> lowrank.CompressionResult:
    return lowrank.compress_model(model, progress=False, **options)


@pytest.fixture(scope="module")
def original() -> ResNet:
    return resnet()


@pytest.fixture(scope="module")
def plain(original: ResNet) -> lowrank.CompressionResult:
    return compress(original, error_budget=0.15, calibration=pictures(160))


@pytest.fixture(scope="module")
def folded(original: ResNet) -> lowrank.CompressionResult:
    return compress(original, error_budget=0.15, calibration=pictures(160), fold_batchnorm=True)


def relative(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        expected = model(x).double()
        return float(torch.linalg.vector_norm(other(x).double() - expected) / torch.linalg.vector_norm(expected))


def compressed_layers(model: nn.Module) -> dict[str, CompressedLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, CompressedLayer)}


@pytest.mark.parametrize("kind", ["plain", "folded"])
def test_the_budget_is_kept_and_every_byte_is_accounted_for(
    kind: str, original: ResNet, request: pytest.FixtureRequest
) -> None:
    result: lowrank.CompressionResult = request.getfixturevalue(kind)
    totals = result.report.totals
    assert totals["error_upper"] <= 0.15
    assert relative(original, result.model, torch.cat(pictures(64, seed=9))) <= 0.2
    assert totals["bytes_before"] == sum(tensor.nbytes for tensor in stored_tensors(original).values())
    assert totals["bytes_after"] == sum(tensor.nbytes for tensor in stored_tensors(result.model).values())
    assert totals["size_ratio"] < 0.3
    formats = Counter(row.format for row in result.report.rows if row.kind == "Conv2d")
    assert formats["int8"] + formats["lowrank"] + formats["lowrank-int8"] >= 8
    assert {entry.name for entry in result.plan.entries if entry.format != "dense"} == compressed_layers(
        result.model
    ).keys()
    for entry in result.plan.entries:
        assert (entry.scheme is not None) == (entry.kind == "conv" and "lowrank" in entry.format)
        if entry.format != "dense":
            layer = compressed_layers(result.model)[entry.name]
            assert layer.stored_bytes == entry.bytes
            assert (layer.format, layer.rank) == (entry.format, entry.rank)


def count_forwards(model: nn.Module, x: Tensor) -> Counter[str]:
    """How often each module's own forward ran, whatever way it was called."""
    ran: Counter[str] = Counter()
    patched = []
    for name, module in model.named_modules():
        if not any(True for _ in module.children()):

            def counted(*args: Any, _name: str = name, _forward: Any = module.forward, **kwargs: Any) -> Any:
                ran[_name] += 1
                return _forward(*args, **kwargs)

            module.forward = counted  # type: ignore[method-assign]
            patched.append(module)
    try:
        with torch.no_grad():
            model(x)
    finally:
        for module in patched:
            del module.forward
    return ran


@pytest.mark.parametrize("kind", ["plain", "folded"])
def test_every_replaced_layer_runs_as_often_as_the_one_it_stands_for(
    kind: str, original: ResNet, request: pytest.FixtureRequest
) -> None:
    result: lowrank.CompressionResult = request.getfixturevalue(kind)
    x = torch.cat(pictures(2))
    before, after = count_forwards(original, x), count_forwards(result.model, x)
    layers = compressed_layers(result.model)
    assert len(layers) >= 8
    for name in layers:
        assert after[name] == before[name] > 0, name
    # The block that stands in two places runs twice.
    assert before["layer1.0.conv1"] == 2


def test_a_folded_model_has_no_batchnorm_and_says_so(original: ResNet, folded: lowrank.CompressionResult) -> None:
    norms = [name for name, module in original.named_modules() if isinstance(module, nn.BatchNorm2d)]
    gone = [name for name, module in folded.model.named_modules() if isinstance(module, FoldedBatchNorm)]
    rows = {row.name: row for row in folded.report.rows}
    # The block used twice is left as it is: its BatchNorm runs twice.
    assert set(norms) - set(gone) == {"layer1.0.bn1", "layer1.0.bn2"}
    assert rows["bn1"].bytes_after == 0 and rows["bn1"].reason == "folded into conv1"
    assert rows["layer1.0.bn1"].bytes_after == rows["layer1.0.bn1"].bytes_before > 0
    assert any("folded into the convolution" in note and "layer1.0.bn1" in note for note in folded.report.notes)
    assert folded.plan.metadata["fold_batchnorm"] is True
    assert "fold_batchnorm" in folded.plan.to_json()


def test_without_the_request_batchnorm_stays(plain: lowrank.CompressionResult) -> None:
    assert isinstance(plain.model.bn1, nn.BatchNorm2d)
    assert "fold_batchnorm" not in plain.plan.metadata


@pytest.mark.parametrize("kind", ["plain", "folded"])
def test_saved_and_loaded_models_agree_bit_for_bit(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, original: ResNet
) -> None:
    result: lowrank.CompressionResult = request.getfixturevalue(kind)
    result.save(tmp_path / "out")
    x = torch.cat(pictures(5, seed=2))
    with torch.no_grad():
        expected = result.model(x)
        for skeleton in (ResNet, ResNet(), original):
            loaded = lowrank.load_model(tmp_path / "out", model=skeleton)
            assert torch.equal(loaded(x), expected)
    manifest = json.loads((tmp_path / "out" / "lowrank_config.json").read_text())
    assert ("folded" in manifest) == (kind == "folded")
    # A model that was loaded is saved to the same bytes again.
    save_compressed(loaded, tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
    assert json.loads((tmp_path / "again/lowrank_config.json").read_text()) == manifest


def test_a_file_of_a_folded_model_fits_no_other_structure(folded: lowrank.CompressionResult, tmp_path: Path) -> None:
    folded.save(tmp_path / "out")
    path = tmp_path / "out" / "lowrank_config.json"
    manifest = json.loads(path.read_text())
    for wrong, message in (
        ([], "missing"),
        (["conv1"], "folded BatchNorm"),
        (["nothing"], "nothing"),
        ("bn1", "a list"),
    ):
        path.write_text(json.dumps(manifest | {"folded": wrong}))
        with pytest.raises(CheckpointError, match=message):
            lowrank.load_model(tmp_path / "out", model=ResNet)


@pytest.mark.parametrize("kind", ["plain", "folded"])
def test_a_plan_makes_the_same_model_again(kind: str, original: ResNet, request: pytest.FixtureRequest) -> None:
    result: lowrank.CompressionResult = request.getfixturevalue(kind)
    plan = Plan.from_json(result.plan.to_json())
    assert plan == result.plan
    again = lowrank.apply_plan(original, plan, calibration=pictures(160))
    wanted = result.model.state_dict()
    assert list(again.state_dict()) == list(wanted)
    assert_same_state(again, wanted)


def test_inplace_folds_the_model_itself() -> None:
    model, kept = resnet(), resnet()
    result = compress(model, error_budget=0.15, calibration=pictures(96), fold_batchnorm=True, inplace=True)
    assert result.model is model and isinstance(model.bn1, FoldedBatchNorm)
    assert isinstance(model.conv1, CompressedLayer) or model.conv1.bias is not None
    assert relative(kept, model, torch.cat(pictures(64, seed=9))) <= 0.2


def test_a_model_that_cannot_be_traced_is_refused_before_any_work() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if x.sum() > 0 else self.conv(-x)

    with pytest.raises(UsageError, match=r"fold_batchnorm: torch\.fx cannot trace"):
        compress(Branching(), error_budget=0.1, fold_batchnorm=True)
    with pytest.raises(UsageError, match="fold_batchnorm: must be True or False"):
        compress(Branching(), error_budget=0.1, fold_batchnorm="yes")


def test_impossible_edits_of_a_plan_are_refused(original: ResNet, plain: lowrank.CompressionResult) -> None:
    edit = plain.plan.with_entry
    with pytest.raises(RankError, match="from 1 to 32"):
        edit("layer2.1.conv2", format="lowrank", rank=33, scheme="channel")
    spatial = edit("layer2.1.conv2", format="lowrank", rank=40, scheme="spatial")
    built = lowrank.apply_plan(original, spatial).get_submodule("layer2.1.conv2")
    assert isinstance(built, CompressedLayer) and (built.rank, built.scheme) == (40, "spatial")
    with pytest.raises(LowRankError, match=r'scheme .* must be "channel" or "spatial"'):
        edit("layer2.1.conv2", format="lowrank", rank=4, scheme="diagonal")
    with pytest.raises(LowRankError, match="must be null"):
        edit("fc", format="lowrank", rank=4, scheme="channel")
    # Two groups of 16: what the shape alone would allow, the model does not.
    with pytest.raises(RankError, match=r"layer2\.1\.conv1, rank: must be from 1 to 16"):
        lowrank.apply_plan(original, edit("layer2.1.conv1", format="lowrank", rank=17, scheme="channel"))
    # A kernel of one pixel has no sides to cut along: the shape tells, before any model is asked.
    with pytest.raises(LowRankError, match=r'scheme .* must be "channel", got '):
        edit("layer2.0.downsample.0", format="lowrank", rank=2, scheme="spatial")
    with pytest.raises(CheckpointError, match="not fewer than"):
        lowrank.apply_plan(original, edit("layer2.1.conv2", format="lowrank", rank=32, scheme="channel"))


def test_overrides_name_the_scheme(original: ResNet) -> None:
    wanted = {"layer2.1.conv2": {"format": "lowrank-int8", "rank": 6, "scheme": "spatial"}, "conv1": "dense"}
    result = compress(original, error_budget=0.9, calibration=pictures(96), overrides=wanted)
    entry = result.plan.entry("layer2.1.conv2")
    assert (entry.format, entry.rank, entry.scheme) == ("lowrank-int8", 6, "spatial")
    assert result.plan.entry("conv1").format == "dense"
    for wrong, message in (
        ({"layer2.1.conv2": {"format": "int8", "scheme": "spatial"}}, "scheme of format 'int8' must be left out"),
        ({"fc": {"format": "lowrank", "rank": 2, "scheme": "channel"}}, "must be left out"),
        ({"layer2.1.conv2": {"format": "lowrank", "scheme": "both"}}, "channel or spatial"),
    ):
        with pytest.raises(UsageError, match=message):
            compress(original, error_budget=0.9, calibration=pictures(96), overrides=wrong)


def test_size_budgets_count_a_folded_model_right(original: ResNet) -> None:
    for fold in (False, True):
        result = compress(original, size_budget=0.2, calibration=pictures(96), fold_batchnorm=fold)
        assert 0.15 <= result.report.totals["size_ratio"] <= 0.2


def test_without_data_the_weight_error_is_kept(original: ResNet) -> None:
    result = compress(original, error_budget=0.05)
    lost = whole = 0.0
    for entry in result.plan.entries:
        weight: Tensor = original.get_submodule(entry.name).weight  # type: ignore[assignment]
        layer = result.model.get_submodule(entry.name)
        whole += float(weight.detach().double().square().sum())
        if isinstance(layer, CompressedLayer):
            lost += float((layer.dense_weight().double() - weight.detach().double()).square().sum())
    assert abs((lost / whole) ** 0.5 - result.report.totals["error_measured"]) <= 1e-6
    assert result.report.totals["error_measured"] <= 0.05


def test_convolutions_along_a_text_with_a_mask() -> None:
    torch.manual_seed(0)
    model = with_falling_spectra(TextConv())
    ids = torch.randint(20, (96, 14), generator=seeded(1))
    mask = (torch.arange(14) < torch.randint(5, 15, (96, 1), generator=seeded(2))).long()
    batches = [{"input_ids": ids[i : i + 16], "attention_mask": mask[i : i + 16]} for i in range(0, 96, 16)]
    result = compress(model, error_budget=0.2, calibration=batches)
    layers = compressed_layers(result.model)
    assert {"narrow", "wide"} <= set(layers)
    with torch.no_grad():
        expected, found = model(ids, mask), result.model(ids, mask)
    assert float((found - expected).norm() / expected.norm()) <= 0.25


def test_models_used_in_other_dtypes_and_unusual_geometry() -> None:
    torch.manual_seed(0)
    model = with_falling_spectra(
        nn.Sequential(
            nn.Conv2d(3, 16, (3, 5), stride=(2, 1), padding=(2, 0), dilation=(1, 2), padding_mode="circular"),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding="same", padding_mode="reflect", groups=4),
            nn.ReLU(),
            nn.Conv2d(16, 8, (1, 3)),
            nn.Flatten(),
        )
    ).to(torch.bfloat16)
    batches = [x.to(torch.bfloat16) for x in pictures(96)]
    result = compress(model, error_budget=0.3, calibration=batches)
    assert len(compressed_layers(result.model)) >= 2
    assert result.model(batches[0]).dtype == torch.bfloat16
    assert relative(copy.deepcopy(model).float(), result.model.float(), batches[0].float()) <= 0.35


@pytest.mark.parametrize("seed", ["x", 1.5, -1, True, None])
def test_a_plan_with_an_impossible_seed_is_refused(seed: object) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    plan = lowrank.Plan((), metadata={"seed": seed})
    with pytest.raises(lowrank.LowRankError, match="metadata: seed must be an integer"):
        lowrank.apply_plan(model, plan)
