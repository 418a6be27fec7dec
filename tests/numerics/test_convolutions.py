"""Geometry of convolutions: patches times weight is what torch computes, for every geometry."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from conv_models import conv_of, geometries, image_for
from helpers import seeded
from torch import nn

from lowrank.errors import UsageError
from lowrank.numerics.convolutions import ConvGeometry, pad_input, patches, sample_patches

CASES = geometries()
# torch's own remark on "same" with even kernels.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@pytest.mark.parametrize("conv", [conv for _, conv in CASES], ids=[name for name, _ in CASES])
def test_patches_times_weight_is_the_convolution(conv: nn.Module) -> None:
    geometry = ConvGeometry.of(conv)
    x = image_for(conv)
    with torch.no_grad():
        expected = conv(x)
    assert geometry.output_size(x.shape[2:]) == tuple(expected.shape[2:])
    found = patches(x, geometry)
    assert found.shape == (2, math.prod(expected.shape[2:]), x.shape[1] * math.prod(geometry.kernel_size))
    groups = geometry.groups
    weight = conv.weight.detach().flatten(1).unflatten(0, (groups, -1))
    rows = torch.einsum("bpgf,gof->bgop", found.unflatten(2, (groups, -1)), weight).flatten(1, 2)
    if conv.bias is not None:
        rows = rows + conv.bias.detach()[:, None]
    torch.testing.assert_close(rows.view(expected.shape), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(patches(x[0], geometry), found[:1])
    assert ConvGeometry.from_json(json.loads(json.dumps(geometry.to_json()))) == geometry
    assert hash(ConvGeometry.of(conv)) == hash(geometry)


def test_the_grid_is_not_thin() -> None:
    found = [ConvGeometry.of(conv) for _, conv in CASES]
    assert {geometry.padding_mode for geometry in found} == {"zeros", "reflect", "replicate", "circular"}
    assert {geometry.groups for geometry in found} == {1, 2, 4}
    assert sum(geometry.padding == "same" for geometry in found) > 5
    assert any(before != after for geometry in found for before, after in geometry.pads)
    assert len(found) > 100


def test_integer_codes_have_patches_too() -> None:
    geometry = ConvGeometry((3, 2), (2, 1), (1, 1), (1, 2))
    codes = torch.randint(-128, 128, (2, 3, 8, 9), dtype=torch.int8, generator=seeded())
    assert torch.equal(patches(codes, geometry), patches(codes.double(), geometry).to(torch.int8))
    assert patches(codes, geometry).dtype == torch.int8


def test_margins_take_the_value_asked_for() -> None:
    x = torch.ones(1, 1, 2, 2, dtype=torch.int8)
    padded = pad_input(x, ConvGeometry((2, 2), padding="same"), value=-7)
    assert padded[0, 0].tolist() == [[1, 1, -7], [1, 1, -7], [-7, -7, -7]]
    assert pad_input(x, ConvGeometry((2, 2))) is x


def test_samples_are_patches_each_at_most_once() -> None:
    geometry = ConvGeometry((3, 3), padding=(1, 1))
    x = torch.randn(3, 2, 6, 5, generator=seeded(1))
    every = patches(x, geometry).flatten(0, 1)
    some = sample_patches(x, geometry, 20, seeded(2))
    assert some.shape == (20, 18)
    where = (some[:, None] == every[None]).all(dim=2).nonzero()[:, 1]
    assert len(set(where.tolist())) == 20
    assert torch.equal(some, sample_patches(x, geometry, 20, seeded(2)))
    assert not torch.equal(some, sample_patches(x, geometry, 20, seeded(3)))
    assert torch.equal(sample_patches(x, geometry, 10**9, seeded(2)), every)


def test_halves_of_a_separable_convolution() -> None:
    conv = conv_of(2, (2, 3), (3, 4), stride=(2, 1), padding=(1, 2), dilation=(1, 2))
    geometry = ConvGeometry.of(conv)
    tall, wide = geometry.along(0), geometry.along(1)
    assert (tall.kernel_size, tall.stride, tall.padding, tall.dilation) == ((3, 1), (2, 1), (1, 0), (1, 1))
    assert (wide.kernel_size, wide.stride, wide.padding, wide.dilation) == ((1, 4), (1, 1), (0, 2), (1, 2))
    size = (11, 12)
    assert wide.output_size(tall.output_size(size)) == geometry.output_size(size)
    same = ConvGeometry((3, 4), padding="same")
    assert same.along(0).pads == ((1, 1), (0, 0))
    assert same.along(1).pads == ((0, 0), (1, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_size": (0, 3)}, "kernel_size"),
        ({"kernel_size": (3, 3), "stride": (1,)}, "stride"),
        ({"kernel_size": (3, 3), "padding": (-1, 0)}, "padding"),
        ({"kernel_size": (3, 3), "padding": "full"}, "same"),
        ({"kernel_size": (3, 3), "padding": "same", "stride": (2, 1)}, "stride of 1"),
        ({"kernel_size": (3, 3), "dilation": (1, True)}, "dilation"),
        ({"kernel_size": (3, 3), "groups": 0}, "groups"),
        ({"kernel_size": (3, 3), "padding_mode": "mirror"}, "padding_mode"),
        ({"kernel_size": ()}, "kernel_size"),
    ],
)
def test_geometries_out_of_range_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ConvGeometry(**arguments)  # type: ignore[arg-type]


def test_inputs_that_do_not_fit_are_refused() -> None:
    geometry = ConvGeometry((3, 3))
    with pytest.raises(UsageError, match="smaller than the kernel"):
        patches(torch.zeros(1, 1, 2, 9), geometry)
    with pytest.raises(UsageError, match="spatial sizes"):
        patches(torch.zeros(4, 4), geometry)
    for other in (nn.Linear(2, 2), nn.ConvTranspose2d(2, 2, 3), nn.Conv3d(2, 2, 3), nn.MaxPool2d(3), nn.Identity()):
        with pytest.raises(UsageError, match=rf"nn\.Conv1d or nn\.Conv2d, got {type(other).__name__}"):
            ConvGeometry.of(other)
    with pytest.raises(UsageError, match="stride missing"):
        ConvGeometry.from_json({key: value for key, value in geometry.to_json().items() if key != "stride"})


def test_sizes_that_numpy_worked_out_are_whole_numbers() -> None:
    conv = nn.Conv2d(4, 8, np.int64(3), stride=np.int32(2), padding=np.int64(1), groups=np.int64(2))  # type: ignore[arg-type]
    assert ConvGeometry.of(conv) == ConvGeometry((3, 3), (2, 2), (1, 1), groups=2)
    json.dumps(ConvGeometry.of(conv).to_json())
