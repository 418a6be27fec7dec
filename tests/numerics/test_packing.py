"""Codes side by side in bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowrank.errors import RankError
from lowrank.numerics.packing import PLANES, pack_rows, row_bytes, unpack_rows


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 27, 64, 100])
def test_codes_come_back_from_the_bytes_that_they_need(bits: int, columns: int) -> None:
    codes = torch.randint(0, 2**bits, (5, columns), generator=torch.Generator().manual_seed(columns))
    codes[0], codes[1] = 0, 2**bits - 1
    packed = pack_rows(codes, bits)
    assert packed.shape == (5, row_bytes(columns, bits)) == (5, -(-columns // 8) * bits)
    assert torch.equal(unpack_rows(packed, columns, bits), codes.to(torch.uint8))
    # Rows, and any leading shape, come back alone.
    assert torch.equal(unpack_rows(packed[[3, 1]][None], columns, bits)[0], codes[[3, 1]].to(torch.uint8))


@pytest.mark.parametrize("bits", range(2, 9))
def test_planes_are_what_the_file_says(bits: int) -> None:
    # Written with NumPy's own bit packing, as somebody would who reads the format's description.
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 13))
    filled = np.pad(codes, ((0, 0), (0, 3)))
    rows, shift = [], 0
    for width in PLANES[bits]:
        bit = (filled[:, :, None] >> (shift + np.arange(width))) & 1
        rows.append(np.packbits(bit.reshape(3, -1).astype(np.uint8), axis=1, bitorder="little"))
        shift += width
    assert shift == bits
    assert pack_rows(torch.from_numpy(codes), bits).numpy().tolist() == np.concatenate(rows, axis=1).tolist()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(RankError, match="3 bits hold 0 to 7, got 0 to 8"):
        pack_rows(torch.tensor([[0, 8]]), 3)
    with pytest.raises(RankError, match="-1"):
        pack_rows(torch.tensor([[0, -1]]), 3)
    with pytest.raises(RankError, match="take 8 bytes, got 7"):
        unpack_rows(torch.zeros(2, 7, dtype=torch.uint8), 16, 4)
