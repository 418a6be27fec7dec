"""The first bytes of a file say what it is, and the user is told what to do with it."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lowrank.errors import CheckpointError, ResourceError
from lowrank.io import open_tensors, parse_json, read_safetensors_header
from lowrank.io.sniffing import describe_content


def saved(value: object, **options: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)  # type: ignore[arg-type]
    return file.getvalue()


def zipped(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return file.getvalue()


def arrays() -> bytes:
    file = io.BytesIO()
    np.savez(file, x=np.zeros(3))
    return file.getvalue()


CONTENTS = {
    "torch": (saved({"a": torch.zeros(2)}), "torch.save wrote.*save_file"),
    "old torch": (saved({"a": torch.zeros(2)}, _use_new_zipfile_serialization=False), "pickle.*save_file"),
    "whole module": (saved(nn.Linear(2, 2)), "torch.save wrote"),
    "script": (zipped("m/constants.pkl", "m/data.pkl", "m/code/x.py"), "TorchScript.*not run"),
    "pickle": (pickle.dumps({"a": 1}), "a pickle, which can run code"),
    "arrays": (arrays(), "NumPy arrays"),
    "array": (b"\x93NUMPY\x01\x00" + bytes(60), "NumPy array .\\.npy"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer.*git lfs pull"),
    "gguf": (b"GGUF" + bytes(60), "GGUF"),
    "keras": (b"\x89HDF\r\n\x1a\n" + bytes(60), "HDF5"),
    "gzip": (b"\x1f\x8b\x08" + bytes(60), "gzip"),
    "page": (b"<!DOCTYPE html><html></html>", "web page"),
    "json": (b'{"a": 1}' + b" " * 60, "JSON text"),
    "cut zip": (zipped("a/data.pkl")[:-20], "damaged or was cut short"),
}


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "noname"])
def test_the_first_bytes_say_what_a_file_is(tmp_path: Path, kind: str, name: str) -> None:
    content, words = CONTENTS[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        open_tensors(tmp_path / name)
    assert caught.value.exit_code == 3
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_of_something_else_says_of_what(tmp_path: Path) -> None:
    for name, kind in (("model.pt", "script"), ("model.gguf", "gguf")):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / name).write_bytes(CONTENTS[kind][0])
        with pytest.raises(CheckpointError, match=f"{name} is .*{CONTENTS[kind][1]}"):
            open_tensors(folder)


@pytest.mark.parametrize(
    "text",
    [
        "[" + ",".join(["[]"] * 2_000_000) + "]",
        "[" + ",".join(["1"] * 4_000_000) + "]",
        "{" + ",".join(f'"{number}":0' for number in range(1_300_000)) + "}",
    ],
    ids=["lists", "numbers", "names"],
)
def test_json_of_millions_of_values_is_not_parsed(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "loads", None)
    with pytest.raises(ResourceError, match="values"):
        parse_json(text, source="a.json")
    header = f'{{"x":{text}}}'.encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ResourceError, match="values") as caught:
        read_safetensors_header(tmp_path / "a.safetensors")
    assert caught.value.exit_code == 6


@pytest.mark.parametrize("length", [0x480, 0x4D42, 0x5A42, 0x8B1F, 8])
def test_a_header_whose_length_spells_something_else_is_still_a_header(tmp_path: Path, length: int) -> None:
    path = tmp_path / "model.safetensors"
    header = b"{}".ljust(length)
    path.write_bytes(length.to_bytes(8, "little") + header)
    assert describe_content(path) is None
