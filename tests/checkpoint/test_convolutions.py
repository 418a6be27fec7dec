"""Every kind of convolution saved and loaded bit for bit, and nothing believed that the tensors contradict."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors.torch
import torch
from helpers import seeded
from torch import Tensor, nn

from lowrank.checkpoint import load_model, save_compressed
from lowrank.errors import CheckpointError, LowRankError
from lowrank.io import write_safetensors
from lowrank.layers import (
    CompressedLayer,
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedLowRankConv1d,
    QuantizedLowRankConv2d,
    SVDCompressedConv1d,
    SVDCompressedConv2d,
    compressed_layers,
)


class Net(nn.Module):
    """One convolution of each kind, in both forms, with groups, strides and margins of all sorts."""

    def __init__(self) -> None:
        super().__init__()
        self.dense8 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.channel = nn.Conv2d(8, 8, 3, padding="same", groups=2)
        self.spatial = nn.Conv2d(8, 12, (3, 5), stride=(1, 2), padding=(1, 2), padding_mode="reflect")
        self.channel8 = nn.Conv2d(12, 12, 3, padding=2, dilation=2)
        self.spatial8 = nn.Conv2d(12, 8, 3, groups=4, bias=False)
        self.plain = nn.Conv2d(8, 8, 1)
        self.line8 = nn.Conv1d(8, 6, 3, padding=1)
        self.line = nn.Conv1d(6, 6, 5, padding=4, dilation=2, groups=2)
        self.thin8 = nn.Conv1d(6, 4, 3, padding_mode="circular", padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.dense8, self.channel, self.spatial, self.channel8, self.spatial8, self.plain):
            x = torch.tanh(layer(x))
        return self.thin8(torch.tanh(self.line(torch.tanh(self.line8(x.flatten(2))))))


def compressed(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    net = Net().to(dtype).eval()

    def thin(conv: nn.Module, rank: int, scheme: str = "channel") -> SVDCompressedConv2d:
        return SVDCompressedConv2d.from_conv2d(conv, rank=rank, scheme=scheme)

    layers: dict[str, CompressedLayer] = {
        "dense8": QuantizedConv2d.from_conv2d(net.dense8, bits=6),
        "channel": thin(net.channel, 3),
        "spatial": thin(net.spatial, 15, "spatial"),
        "channel8": QuantizedLowRankConv2d.from_factors(thin(net.channel8, 4), activations="float"),
        "spatial8": QuantizedLowRankConv2d.from_factors(thin(net.spatial8, 2, "spatial")),
        "line8": QuantizedConv1d.from_conv1d(net.line8),
        "line": SVDCompressedConv1d.from_conv1d(net.line, rank=2),
        "thin8": QuantizedLowRankConv1d.from_factors(SVDCompressedConv1d.from_conv1d(net.thin8, rank=3)),
    }
    for name, layer in layers.items():
        setattr(net, name, layer)
    return net.eval()


INPUT = torch.randn(3, 3, 12, 14, generator=seeded(7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_kind_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    net = compressed(dtype)
    save_compressed(net, tmp_path / "out")
    with torch.no_grad():
        expected = net(INPUT.to(dtype))
        for make in (lambda: Net().to(dtype), Net().to(dtype)):
            loaded = load_model(tmp_path / "out", model=make)  # type: ignore[arg-type]
            assert torch.equal(loaded(INPUT.to(dtype)), expected)
    for name, layer in net.named_children():
        assert type(loaded.get_submodule(name)) is type(layer)
    configs = {name: layer.config() for name, layer in compressed_layers(net).items()}
    assert configs and configs == {name: layer.config() for name, layer in compressed_layers(loaded).items()}
    save_compressed(loaded, tmp_path / "again")
    for file in ("model.safetensors", "lowrank_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_compressed(compressed(), tmp_path / "out")


def edit(path: Path, layer: str, **changes: Any) -> None:
    document = json.loads((path / "lowrank_config.json").read_text())
    document["layers"][layer].update(changes)
    (path / "lowrank_config.json").write_text(json.dumps(document))


def geometry(**changes: Any) -> dict[str, Any]:
    plain = {"kernel_size": [3, 3], "stride": [1, 1], "padding": "same", "dilation": [1, 1], "groups": 2}
    return plain | {"padding_mode": "zeros"} | changes


@pytest.mark.parametrize(
    ("layer", "changes", "words"),
    [
        ("channel", {"rank": 5}, "rank"),  # 4 outputs a group
        ("channel", {"rank": 9}, "rank must be an integer from 1 to 8"),
        ("spatial", {"rank": 25}, "rank must be an integer from 1 to 24"),
        ("spatial", {"scheme": "channel"}, "rank must be an integer from 1 to 12"),
        ("channel", {"scheme": "spatial"}, "the configuration says"),
        ("channel", {"scheme": "diagonal"}, "scheme"),
        ("channel", {"scheme": None}, "scheme"),
        ("line", {"scheme": "spatial"}, "scheme"),
        ("dense8", {"bits": 9}, "bits must be an integer from 2 to 8"),
        ("dense8", {"shape": [8, 3, 3]}, "shape"),
        ("dense8", {"shape": [8, 3, 3, 3, 1]}, "shape|cannot be built"),
        ("dense8", {"shape": [8, 3, 3, 5]}, "shape"),
        ("dense8", {"shape": [9, 3, 3, 3]}, "the configuration says"),
        ("dense8", {"activations": "int4"}, "activations"),
        ("dense8", {"kind": "QuantizedConv1d"}, "is not a QuantizedConv1d"),
        ("dense8", {"kind": "QuantizedConv3d"}, "unknown: written by a newer lowrank"),
        ("channel", {"geometry": geometry(groups=3)}, "groups"),
        ("channel", {"geometry": geometry(groups=10**12)}, "groups|cannot be built"),
        ("channel", {"geometry": geometry(groups=True)}, "groups"),
        ("channel", {"geometry": geometry(stride=[0, 1])}, "stride"),
        ("channel", {"geometry": geometry(stride=[2, 2])}, "same"),
        ("channel", {"geometry": geometry(padding="full")}, "padding"),
        ("channel", {"geometry": geometry(padding_mode="mirror")}, "padding_mode"),
        ("channel", {"geometry": geometry(dilation=[1])}, "dilation"),
        ("channel", {"geometry": {"kernel_size": [3, 3]}}, "missing"),
        ("channel", {"geometry": [3, 3]}, "missing"),
    ],
)
def test_a_manifest_that_lies(saved: Path, layer: str, changes: dict[str, Any], words: str) -> None:
    edit(saved, layer, **changes)
    with (
        mock.patch("lowrank.io.index.read_tensor", side_effect=AssertionError("read")),
        pytest.raises(CheckpointError, match=words) as caught,
    ):
        load_model(saved, model=mock.Mock(side_effect=AssertionError("built")))
    assert layer in str(caught.value) and "\n" not in str(caught.value)


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    change(tensors)
    (path / "model.safetensors").unlink()
    write_safetensors(path / "model.safetensors", tensors)


@pytest.mark.parametrize("layer", ["dense8", "channel8", "spatial8", "line8", "thin8"])
@pytest.mark.parametrize("damage", ["zero", "negative", "nan", "shape", "dtype", "missing"])
def test_scales_that_are_wrong(saved: Path, layer: str, damage: str) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        name = next(name for name in tensors if name.startswith(f"{layer}.") and name.endswith("scale"))
        scale = tensors.pop(name)
        values = {"zero": 0.0, "negative": -1.0, "nan": float("nan")}
        if damage in values:
            scale[0] = values[damage]
        if damage != "missing":
            tensors[name] = {"shape": scale[1:].clone(), "dtype": scale.double()}.get(damage, scale)

    rewrite(saved, change)
    with pytest.raises(CheckpointError, match="scale") as caught:
        load_model(saved, model=Net)
    assert layer in str(caught.value)


def test_codes_beyond_their_bits_are_refused(saved: Path) -> None:
    rewrite(saved, lambda tensors: tensors["dense8.codes"][0, 0, 0].fill_(32))
    with pytest.raises(CheckpointError, match=r"dense8\.codes.*\[-31, 31\]"):
        load_model(saved, model=Net)


def test_the_skeleton_must_have_the_same_kernel(saved: Path) -> None:
    def other() -> Net:
        net = Net()
        # The same sizes in another order are another convolution.
        net.spatial = nn.Conv2d(8, 12, (5, 3))
        return net

    with pytest.raises(LowRankError, match=r"spatial.*\[12, 8, 5, 3\] in the model"):
        load_model(saved, model=other)


@pytest.mark.parametrize(
    "change", [{"stride": 1}, {"padding": 5}, {"groups": 2, "in_channels": 6}, {"padding_mode": "circular"}]
)
def test_a_skeleton_whose_convolution_works_otherwise_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"in_channels": 3, "out_channels": 8, "kernel_size": 3, "stride": 2, "padding": 1}
    net = nn.Sequential(QuantizedConv2d.from_conv2d(nn.Conv2d(**arguments)))
    save_compressed(net, tmp_path / "out")
    assert load_model(tmp_path / "out", nn.Sequential(nn.Conv2d(**arguments)))
    with pytest.raises(CheckpointError, match=f"'0' has {next(iter(change))} .* in the model, but"):
        load_model(tmp_path / "out", nn.Sequential(nn.Conv2d(**(arguments | change))))
