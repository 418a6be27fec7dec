from __future__ import annotations

import contextlib
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lowrank.cli.data import load_batches, read_data
from lowrank.errors import CalibrationError, CheckpointError, LowRankError, ResourceError


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4).to(torch.bfloat16)

    def forward(self, ids: Tensor, scale: Tensor, keep: Tensor | None = None, **extra: object) -> Tensor:
        return self.table(ids) * scale[:, None, None]


def test_arrays_become_the_dtypes_that_the_model_reads(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "a.npz",
        ids=np.arange(10, dtype=">i4").reshape(5, 2),
        scale=np.linspace(0, 1, 5, dtype=np.float64),
        keep=np.ones((5, 2), bool),
    )
    data = read_data(tmp_path / "a.npz")
    batches = load_batches(data, TwoInputs(), None, source="a.npz", batch_size=3)
    assert [len(batch["ids"]) for batch in batches] == [3, 2]
    first = batches[0]
    assert (first["ids"].dtype, first["scale"].dtype, first["keep"].dtype) == (torch.int64, torch.bfloat16, torch.bool)
    assert torch.cat([batch["ids"] for batch in batches]).tolist() == np.arange(10).reshape(5, 2).tolist()
    assert TwoInputs()(**first).shape == (3, 2, 4)


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "f2", "f4", "f8", ">f4"])
def test_every_honest_number_is_read(tmp_path: Path, dtype: str) -> None:
    values = np.arange(6).reshape(3, 2).astype(dtype)
    np.savez_compressed(tmp_path / "x.npz", x=values)
    data = read_data(tmp_path / "x.npz")
    assert isinstance(data, dict)
    assert data["x"].double().tolist() == values.tolist()


def test_names_that_the_model_does_not_take(tmp_path: Path) -> None:
    data = {"ids": torch.zeros(4, 2, dtype=torch.int64), "scales": torch.ones(4)}
    with pytest.raises(CalibrationError, match="ids, scales together; it takes ids, scale, keep"):
        load_batches(data, TwoInputs(), None, source="a.npz")


def test_one_array_may_have_any_name() -> None:
    (batch,) = load_batches({"images": torch.zeros(4, 3)}, nn.Linear(3, 2), None, source="a.npz")
    assert isinstance(batch, Tensor)
    assert batch.shape == (4, 3)


def test_labels_are_left_out_where_the_model_takes_none() -> None:
    data = {"labels": torch.zeros(4), "ids": torch.zeros(4, 2, dtype=torch.int64), "scale": torch.ones(4)}
    (batch,) = load_batches(data, TwoInputs(), None, source="a.npz")
    assert sorted(batch) == ["ids", "scale"]
    (alone,) = load_batches({"labels": torch.ones(4), "any": torch.zeros(4, 3)}, nn.Linear(3, 2), None, source="a.npz")
    assert torch.equal(alone, torch.zeros(4, 3))


def test_text_without_a_tokenizer() -> None:
    with pytest.raises(CalibrationError, match="needs a tokenizer"):
        load_batches(["the cat"], nn.Linear(3, 2), None, source="a.txt")


def test_an_archive_that_unpacks_to_a_thousand_times_its_size(tmp_path: Path) -> None:
    with (
        zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x.npy", "w") as file,
    ):
        header = "{'descr': '<f8', 'fortran_order': False, 'shape': (20000000,), }"
        file.write(b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + header.ljust(117).encode() + b"\n")
        for _ in range(160):
            file.write(bytes(1_000_000))
    with pytest.raises(ResourceError, match="unpack to 160"):
        read_data(tmp_path / "bomb.npz")


def test_damaged_safetensors_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises((CalibrationError, CheckpointError), match=r"x\.safetensors"):
        read_data(tmp_path / "x.safetensors")


def archive(
    header: str = "{'descr': '<f4', 'fortran_order': False, 'shape': (64, 8), }", payload: bytes = bytes(2048)
) -> bytearray:
    text = (header + " " * (-(len(header) + 11) % 64) + "\n").encode()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("x.npy", b"\x93NUMPY\x01\0" + len(text).to_bytes(2, "little") + text + payload)
    return bytearray(file.getvalue())


def set_field(local: int, central: int, value: int) -> bytearray:
    content = archive()
    content[local] = content[content.find(b"PK\x01\x02") + central] = value
    return content


@pytest.mark.parametrize(
    "content",
    [
        set_field(6, 8, 1),  # encrypted
        set_field(8, 10, 7),  # an unknown method
        set_field(8, 10, 14),  # said to be LZMA
        archive()[:35] + b"\xff" * 25 + archive()[60:],
        archive("{'descr': '<f4', 'fortran_order': False, 'shape': (100000000000000,), }", b""),
        archive("{'descr': '<f4', 'fortran_order': False, 'shape': (0, 99999999999999999999), }", b""),
        archive("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 8), }"),
        archive("{'descr': '|O', 'fortran_order': False, 'shape': (2,), }"),
        archive("{'descr': '<f4', 'fortran_order': False, 'shape': "),
        archive("[" * 150 + "]" * 150),
        archive("{'descr': [('a', '<f4')] , 'fortran_order': False, 'shape': (2,), }"),
        archive()[:-30],
        b"PK\x05\x06" + bytes(18),
    ],
    ids=range(13),
)
def test_damaged_archives_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(CalibrationError, match=r"a\.npz") as caught:
        read_data(tmp_path / "a.npz")
    assert caught.value.exit_code == 3


def test_every_byte_of_an_archive_may_be_damaged(tmp_path: Path) -> None:
    whole = archive()
    for place in range(len(whole)):
        for value in (255, whole[place] ^ 1):
            (tmp_path / "a.npz").write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            with contextlib.suppress(LowRankError):
                read_data(tmp_path / "a.npz")
