"""Products with packed codes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank.errors import RankError, UsageError
from lowrank.kernels import native
from lowrank.kernels.packed import FEW_TOKENS, PackedWeight
from lowrank.numerics.grids import Grid, dequantize_groups
from lowrank.numerics.packing import pack_rows

EPS = torch.finfo(torch.float32).eps


def made(
    rows: int, columns: int, bits: int, group: int | None, *, zeros: bool = False, dtype: torch.dtype = torch.float16
) -> tuple[PackedWeight, Tensor]:
    """A weight and its numbers in float64."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns + bits)
    grid = Grid(bits, group, zeros)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator).to(torch.uint8)
    scale = (torch.randn(rows, grid.groups(columns), generator=generator) * 0.1).to(dtype)
    zero = torch.randint(0, 2**bits, scale.shape, generator=generator).to(torch.uint8) if zeros else None
    packed = None if zero is None else pack_rows(zero, bits)
    weight = PackedWeight(pack_rows(codes, bits), scale, packed, bits=bits, group=group, columns=columns)
    return weight, dequantize_groups(codes, scale, zero, grid, torch.float64)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, FEW_TOKENS, FEW_TOKENS + 1, 40])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", [None, 32, 64, 128])
@pytest.mark.parametrize("bits", range(2, 9))
def test_products_are_those_of_the_numbers(bits: int, group: int | None, zeros: bool, tokens: int) -> None:
    for rows, columns in ((5, 200), (1, 7), (33, 96)):
        weight, dense = made(rows, columns, bits, group, zeros=zeros)
        generator = torch.Generator().manual_seed(tokens)
        x, bias = torch.randn(tokens, columns, generator=generator), torch.randn(rows, generator=generator)
        found = weight.product(x, bias)
        expected = x.double() @ dense.T + bias.double()
        # A sum of K products in float32 errs by at most K half units in the last place of the sum of their sizes.
        bound = (columns + 4) * EPS * (x.double().abs() @ dense.abs().T + bias.double().abs())
        assert bool(((found.double() - expected).abs() <= bound).all())
        assert found.shape == (tokens, rows) and found.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_every_way_in_gives_the_same_numbers(dtype: torch.dtype) -> None:
    weight, dense = made(20, 150, 5, 64, zeros=True, dtype=dtype)
    x = torch.randn(3, 2, 150, generator=torch.Generator().manual_seed(1))
    found = weight.product(x, None)
    assert found.shape == (3, 2, 20)
    assert torch.equal(found, weight.product(x.view(6, 150), None).view(3, 2, 20))
    # Rows of a wider matrix, and columns that lie apart.
    wide = torch.zeros(6, 300)
    wide[:, 100:250] = x.view(6, 150)
    assert torch.equal(weight.product(wide[:, 100:250], None), found.view(6, 20))
    assert torch.equal(weight.product(x.view(6, 150).T.contiguous().T, None), found.view(6, 20))
    twice = weight.product(x.double(), None)
    assert twice.dtype is torch.float64
    torch.testing.assert_close(twice.view(6, 20), x.view(6, 150).double() @ dense.T, rtol=1e-12, atol=1e-12)
    half = weight.product(x.half(), None)
    assert half.dtype is torch.float16
    torch.testing.assert_close(half.float(), found, rtol=2e-3, atol=2e-2)
    assert weight.product(x[:0], None).shape == (0, 2, 20)


@pytest.mark.parametrize("tokens", [2, FEW_TOKENS + 1])
def test_the_number_of_threads_and_where_things_lie_change_nothing(tokens: int) -> None:
    weight, _ = made(700, 1000, 4, 64)
    x = torch.randn(tokens * 1000 + 3, generator=torch.Generator().manual_seed(0))
    first = weight.product(x[: tokens * 1000].view(tokens, 1000), None)
    moved = torch.empty(tokens * 1000 + 3)
    moved[3:] = x[: tokens * 1000]
    assert torch.equal(weight.product(moved[3:].view(tokens, 1000), None), first)
    if tokens <= FEW_TOKENS:
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1 if threads > 1 else 2)
            assert torch.equal(weight.product(x[: tokens * 1000].view(tokens, 1000), None), first)
        finally:
            torch.set_num_threads(threads)


def test_torch_does_the_same_without_the_library() -> None:
    for bits in range(2, 9):
        weight, dense = made(30, 130, bits, 32, zeros=True)
        x = torch.randn(4, 130, generator=torch.Generator().manual_seed(2))
        with native.torch_route():
            found = weight.product(x, None)
        bound = 134 * EPS * (x.double().abs() @ dense.abs().T)
        assert bool(((found.double() - x.double() @ dense.T).abs() <= bound).all())


def test_only_the_rows_that_are_asked_for_are_decoded() -> None:
    weight, dense = made(9, 50, 3, 32, zeros=True)
    ids = torch.tensor([[8, 0], [3, 3]])
    assert torch.equal(weight.rows(ids, torch.float64), dense[ids])


def test_what_does_not_fit_is_refused() -> None:
    weight, _ = made(4, 64, 4, 32)
    with pytest.raises(UsageError, match=r"shape \(..., 64\)"):
        weight.product(torch.zeros(2, 63), None)
    with pytest.raises(UsageError, match="int64"):
        weight.product(torch.zeros(2, 64, dtype=torch.int64), None)
    with pytest.raises(RankError, match="group: 32, 64 or 128"):
        made(4, 64, 4, 16)
    with pytest.raises(RankError, match="codes: 4 rows of 40 codes"):
        PackedWeight(torch.zeros(4, 32, dtype=torch.uint8), torch.ones(4, 1), bits=4, group=None, columns=40)
