"""A kind of compressed layer that the package does not have takes adapters, by what it says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import seeded
from lora_bases import close, only_layer, randomise
from lora_models import rows, two_linear
from torch import Tensor, nn

import lowrank
from lowrank.layers.base import CompressedLayer
from lowrank.layers.roles import ScaleForm
from lowrank.lora import set_form
from lowrank.lora.bases import base_of
from lowrank.numerics.rounding import quantize_rows

GROUP = 4


class GroupedSixBitLinear(CompressedLayer):
    """Codes of six bits with a scale for every four inputs."""

    format = "int6"
    weight_names = ("codes", "scale")
    n_bits = 6

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        codes, scale = quantize_rows(weight.detach().reshape(-1, GROUP), self.n_bits)
        self.register_buffer("codes", codes.view(weight.shape))
        self.register_buffer("scale", scale)
        self.bias = nn.Parameter(bias.detach().clone())
        self.dtype = bias.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    def scales(self) -> dict[str, ScaleForm]:
        return {"scale": ScaleForm(tuple(self.scale.shape))}

    def exact_weight(self) -> Tensor:
        return (self.codes.double().view(-1, GROUP) * self.scale.double()[:, None]).view(self.shape)

    def dense_weight(self) -> Tensor:
        return self.exact_weight().float()

    def with_weight(self, weight: Tensor) -> GroupedSixBitLinear:
        return type(self)(weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense_weight().to(x.dtype), self.bias)


def model() -> nn.Sequential:
    base = two_linear()
    base[0] = GroupedSixBitLinear(base[0].weight, base[0].bias)
    return base


def adapted(**options: object) -> nn.Module:
    config = lowrank.LoRAConfig(**({"r": 2, "target_modules": ["0"]} | options))  # type: ignore[arg-type]
    found = lowrank.add_lora(model(), config)
    randomise(found)
    return found


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
def test_beside_the_layer_the_output_is_that_of_the_sum(dora: bool) -> None:
    found, x = adapted(use_dora=dora), rows()
    layer = only_layer(found)
    change = layer.change()
    gains = 1.0 if change.rows is None else change.rows[:, None]
    weight = base_of(layer.base_layer).exact_weight() * gains + change.left @ change.right
    expected = x.double() @ weight.T + layer.base_layer.bias.double()
    close(layer(x), expected, torch.float32, safety=64)
    set_form(found, "merged")
    assert layer.form == "separate"


def test_training_moves_the_adapter_alone_and_reaches_what_is_before() -> None:
    found = adapted()
    x = rows().requires_grad_()
    before = {name: tensor.clone() for name, tensor in only_layer(found).base_layer.state_dict().items()}
    optimizer = torch.optim.SGD([parameter for parameter in found.parameters() if parameter.requires_grad], lr=0.05)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = found(x).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
    assert x.grad is not None and bool(x.grad.any())
    assert all(torch.equal(tensor, before[name]) for name, tensor in only_layer(found).base_layer.state_dict().items())


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
def test_it_merges_by_rounding_anew_where_that_is_asked_for_and_comes_back(dora: bool) -> None:
    found, x = adapted(use_dora=dora), rows()
    layer = only_layer(found)
    before = {name: tensor.clone() for name, tensor in layer.base_layer.state_dict().items()}
    with pytest.raises(lowrank.AdapterError, match=r"layer 0: a GroupedSixBitLinear holds one int6 matrix.*requantize"):
        lowrank.merge_lora(found)
    change = layer.change()
    gains = 1.0 if change.rows is None else change.rows[:, None]
    exact = base_of(layer.base_layer).exact_weight() * gains + change.left @ change.right
    lowrank.merge_lora(found, requantize=True)
    merged = layer.base_layer
    expected = GroupedSixBitLinear(exact, before["bias"])
    assert torch.equal(merged.codes, expected.codes) and torch.equal(merged.scale, expected.scale)
    (row,) = lowrank.merge_report(found).rows
    assert (row.kind, row.note, row.rank_before) == ("GroupedSixBitLinear", "rounded anew", None)
    assert row.bytes_before == row.bytes_after
    assert 0.0 < row.error < 0.1
    assert torch.equal(layer(x), expected(x))
    lowrank.unmerge_lora(found)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.base_layer.state_dict().items())


def test_it_is_counted_named_saved_and_loaded(tmp_path: Path) -> None:
    found, x = adapted(), rows()
    summary = lowrank.adapter_summary(found)
    assert summary.adapted == {"0": "GroupedSixBitLinear 8→12: default r=2"}
    weights = sum(tensor.numel() for tensor in two_linear().state_dict().values())
    assert (summary.trainable, summary.total) == (2 * (8 + 12), weights + 2 * (8 + 12))
    lowrank.save_adapter(found, tmp_path / "adapter")
    assert torch.equal(lowrank.load_adapter(model(), tmp_path / "adapter")(x), found(x))


def test_what_needs_a_dense_layer_is_refused_and_what_was_lost_is_fitted() -> None:
    with pytest.raises(lowrank.AdapterError, match="dense linear weight, and this is a GroupedSixBitLinear"):
        lowrank.add_lora(model(), lowrank.LoRAConfig(r=2, target_modules=["0"], init_lora_weights="pissa"))
    with pytest.raises(lowrank.AdapterError, match="GroupedSixBitLinear holds integer codes"):
        lowrank.add_lora(model(), lowrank.LoRAConfig(r=2, target_modules=["2"], modules_to_save=["0"]))
    config = lowrank.LoRAConfig(r=8, target_modules=["0"], init_lora_weights="residual")
    found = lowrank.add_lora(model(), config, original=two_linear())
    x = torch.randn(5, 8, generator=seeded(3))
    torch.testing.assert_close(found(x), two_linear()(x), rtol=1e-5, atol=1e-5)
