"""Files that somebody else wrote: each fault of BAD_INPUTS gets its message and its exit code."""

from __future__ import annotations

import json
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.errors import CheckpointError, LowRankError, ResourceError, StorageError
from lowrank.io import (
    copy_side_files,
    open_tensors,
    parse_json,
    printable,
    read_bounded,
    read_index,
    read_json,
    read_safetensors_header,
    read_tensor,
    require_int,
    write_safetensors,
)


def write_raw(path: Path, header: object, payload: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + payload)
    return path


def entry(dtype: str = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refused(path: Path, words: str, code: int = 3) -> LowRankError:
    with pytest.raises(LowRankError, match=words) as caught:
        read_safetensors_header(path)
    assert caught.value.exit_code == code
    assert "\n" not in str(caught.value)
    return caught.value


# JSON (15), integers (14), names (7)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
        ("9" * 5_000, "5000 digits"),
        ("-" + "9" * 5_000, "digits"),
        ("NaN", "NaN"),
        ("[Infinity]", "Infinity"),
        ("[-Infinity]", "-Infinity"),
        ("1e400", "64-bit float"),
        ('{"a": 1, "b": 2, "a": 1}', "'a' is given twice"),
        ("\ufeff{}", "byte-order mark"),
        ("\ufeff{}".encode(), "byte-order mark"),
        (b"\xff\xfe{\x00}\x00", "UTF-8; byte 0"),
        ("{", "line 1, column 2"),
        ("", "not JSON"),
        ("{} {}", "not JSON"),
        ('{"a": "\\ud800"}', "surrogate"),
        ('{"\\udfff": 1}', "surrogate"),
    ],
    ids=range(17),
)
def test_json_that_two_readers_could_read_differently_is_refused(text: str | bytes, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        parse_json(text, source="pl\nan.json")
    assert caught.value.exit_code == 3
    assert str(caught.value).startswith("pl\\nan.json: ")
    assert "\n" not in str(caught.value)


def test_json_keeps_what_is_legal() -> None:
    text = '{"a": [1, 2.5, true, null, "\\ud83d\\ude00"], "n": 1000000000000000019884624838656}'
    expected = {"a": [1, 2.5, True, None, "😀"], "n": 1000000000000000019884624838656}
    assert parse_json(text.encode(), source="x") == expected


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_json_round_trips(value: Any) -> None:
    assert parse_json(json.dumps(value), source="x") == value


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_json_of_any_bytes_parses_or_says_why(data: bytes) -> None:
    try:
        parse_json(data, source="x")
    except CheckpointError as error:
        assert str(error).startswith("x: ")  # noqa: PT017 - most inputs raise, some may not


@pytest.mark.parametrize("value", [10**12, 0, -1, "8", True, False, 8.0, float("inf"), float("nan"), None, [8]])
def test_a_rank_is_an_integer_in_range(value: object) -> None:
    with pytest.raises(CheckpointError, match="rank must be an integer from 1 to 64") as caught:
        require_int(value, "rank", 1, 64)
    assert caught.value.exit_code == 3
    assert require_int(64, "rank", 1, 64) == 64


def test_a_json_file_must_be_an_object_and_small_enough(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="object; holds a list"):
        read_json(tmp_path / "list.json")
    with pytest.raises(ResourceError, match="larger than 2 bytes") as caught:
        read_bounded(tmp_path / "list.json", 2)
    assert caught.value.exit_code == 6
    with pytest.raises(CheckpointError, match="no such file"):
        read_json(tmp_path / "absent.json")
    with pytest.raises(CheckpointError, match="not a legal file name"):
        read_json("a\0b")


def test_names_are_escaped_for_the_terminal() -> None:
    assert printable("a\x1b[31m\r\n\u202eb") == "a\\x1b[31m\\r\\n\\u202eb"
    assert printable(os.fsdecode(b"caf\xe9")) == "caf\\udce9"
    assert printable(Path("gr\u00fcn")) == "gr\u00fcn"
    assert len(printable("x" * 10_000)) == 203


# safetensors: one file (1-7, 11, 13)


def test_what_is_written_is_read_back_by_us_and_by_the_library(tmp_path: Path) -> None:
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
    dtypes += [torch.int8, torch.uint8, torch.bool, torch.uint16, torch.complex64, torch.float8_e4m3fn]
    tensors = {str(dtype): (torch.randn(3, 5) * 3).to(dtype) for dtype in dtypes}
    tensors |= {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 7),
        "transposed": torch.randn(4, 3).T,
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
    }
    write_safetensors(tmp_path / "a.safetensors", tensors)
    header = read_safetensors_header(tmp_path / "a.safetensors")
    library = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert header.metadata == {"format": "pt"}
    assert header.tensor_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert set(header.tensors) == set(library) == set(tensors)
    for name, tensor in tensors.items():
        for found in (read_tensor(header, name), library[name]):
            assert found.dtype == tensor.dtype
            assert found.shape == tensor.shape
            assert found.tolist() == tensor.resolve_conj().tolist()


def test_the_same_tensors_give_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3), "a": torch.randn(2), "c": torch.ones(3, dtype=torch.int8)}
    write_safetensors(tmp_path / "one", tensors)
    write_safetensors(tmp_path / "two", dict(reversed(tensors.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_what_the_library_wrote_is_read(tmp_path: Path) -> None:
    tensors = {"x": torch.randn(3, 4), "y": torch.arange(5)}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    source = open_tensors(tmp_path / "a.safetensors")
    assert all(torch.equal(source.read(name), tensor) for name, tensor in tensors.items())


def test_empty_short_and_lfs_files(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"")
    refused(path, "empty")
    path.write_bytes(b"1234567")
    refused(path, "7 bytes")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    refused(path, "Git LFS pointer")


@pytest.mark.parametrize("length", [2**64 - 1, 100_000_001, 40, 2**63])
def test_a_header_that_cannot_be(tmp_path: Path, length: int) -> None:
    refused(write_raw(tmp_path / "a", b"{}", b"12345678", length), "damaged or not a safetensors file")


GOOD = {"x": entry(), "y": entry(offsets=(4, 8))}


@pytest.mark.parametrize(
    ("header", "payload_bytes", "words"),
    [
        (GOOD, 7, "cut short"),
        (GOOD, 9, "belong to no tensor"),
        ({"x": entry(), "y": entry(offsets=(3, 7))}, 7, "overlaps"),
        ({"x": entry(), "y": entry(offsets=(5, 9))}, 9, "hole"),
        ({"x": entry(offsets=(4, 8))}, 8, "hole"),
        ({"x": entry(offsets=(4, 0))}, 4, "do not fit"),
        ({"x": entry(shape=(2,))}, 4, "do not fit"),
        ({"x": entry(shape=(2**60, 0), offsets=(0, 0))}, 0, "larger than any memory"),
        ({"x": entry(shape=(2**70,), offsets=(0, 0))}, 0, "larger than any memory"),
        ({"x": entry(shape=(-1,))}, 4, "at least 0"),
        ({"x": entry(shape=(1.0,))}, 4, "integer"),
        ({"x": entry(shape=(True,))}, 4, "integer"),
        ({"x": entry(shape="1")}, 4, "list"),
        ({"x": entry(shape=(1,) * 65)}, 4, "list of at most 64"),
        ({"x": entry(offsets=(0,))}, 4, "start, end"),
        ({"x": entry(offsets=("0", "4"))}, 4, "integer"),
        ({"x": entry(offsets=(-4, 0))}, 0, "at least 0"),
        ({"x": {"dtype": "F32", "shape": [1]}}, 4, "exactly"),
        ({"x": {**entry(), "extra": 1}}, 4, "exactly"),
        ({"x": {**entry(), "dtype": 32}}, 4, "dtype must be text"),
        ({"x": 3}, 0, "exactly"),
        ({"": entry()}, 4, "must not be empty"),
        ({"a\0b": entry()}, 4, "NUL"),
        ({"__metadata__": {"a": 1}}, 0, "__metadata__"),
        ([], 0, "not a JSON object"),
        (b'{"x":' + json.dumps(entry()).encode() + b',"x":' + json.dumps(entry()).encode() + b"}", 4, "given twice"),
        (b"\xef\xbb\xbf{}", 0, "not a JSON object"),
        (b"\x00\x00", 0, "not a JSON object"),
    ],
    ids=range(28),
)
def test_headers_that_contradict_themselves(tmp_path: Path, header: object, payload_bytes: int, words: str) -> None:
    refused(write_raw(tmp_path / "a.safetensors", header, bytes(payload_bytes)), words)


def test_hostile_names_are_escaped_and_never_paths(tmp_path: Path) -> None:
    names = {"../../etc/passwd": (0, 4), "\x1b[2J": (4, 8)}
    path = write_raw(tmp_path / "a", {name: entry(offsets=o) for name, o in names.items()}, bytes(8))
    assert set(read_safetensors_header(path).tensors) == set(names)
    broken = write_raw(tmp_path / "b", {"\x1b[2J": entry(offsets=(0, 5))}, bytes(5))
    assert "\x1b" not in str(refused(broken, "do not fit"))
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_unknown_dtypes_are_listed_but_not_read(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "a", {"x": entry("F4", (8,)), "y": entry("Q7", (3,), (4, 8))}, bytes(8))
    header = read_safetensors_header(path)
    assert [found.torch_dtype for found in header.tensors.values()] == [None, None]
    with pytest.raises(CheckpointError, match="dtype Q7"):
        read_tensor(header, "y")
    refused(write_raw(tmp_path / "b", {"x": entry("F4", (9,))}, bytes(4)), "do not fit")


def test_a_bool_is_0_or_1(tmp_path: Path) -> None:
    header = read_safetensors_header(write_raw(tmp_path / "a", {"x": entry("BOOL", (4,))}, b"\0\1\2\0"))
    with pytest.raises(CheckpointError, match="0 or 1"):
        read_tensor(header, "x")


def test_only_regular_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, words in (("pipe", "a pipe"), ("folder", "a directory"), ("absent", "no such file")):
        refused(tmp_path / name, words)
    refused(Path("/dev/zero"), "a device")


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"x": torch.zeros(100)})
    header = read_safetensors_header(path)
    os.truncate(path, header.data_start + 8)
    with pytest.raises(StorageError, match="while it was read") as caught:
        read_tensor(header, "x")
    assert caught.value.exit_code == 5


def test_a_header_of_millions_of_entries_costs_neither_time_nor_memory(tmp_path: Path) -> None:
    one = b'"%d":{"dtype":"I8","shape":[0],"data_offsets":[0,0]}'
    for count in (1_700_000, 250_000):
        path = write_raw(tmp_path / str(count), b"{" + b",".join(one % n for n in range(count)) + b"}")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with mock.patch("lowrank.io.tensors.parse_json", side_effect=AssertionError("parsed")):
            refused(path, "a header of", code=6)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, 200), value=st.integers(0, 255))
def test_one_changed_byte_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    path = tmp_path_factory.mktemp("byte") / "a.safetensors"
    write_safetensors(path, {"x": torch.zeros(3, 2), "y": torch.zeros(5, dtype=torch.int8)})
    data = bytearray(path.read_bytes())
    data[position % len(data)] = value
    path.write_bytes(data)
    try:
        header = read_safetensors_header(path)
    except LowRankError as error:
        assert error.exit_code == 3  # noqa: PT017 - either outcome is right
    else:
        assert header.tensor_bytes == 29


# indexes (8, 9) and other sources (10)


def sharded(directory: Path, weight_map: object = None, metadata: object = ()) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name in "ab":
        (directory / f"{name}.safetensors").unlink(missing_ok=True)
        write_safetensors(directory / f"{name}.safetensors", {name: torch.full((2,), ord(name))})
    index: dict[str, object] = {
        "weight_map": {"a": "a.safetensors", "b": "b.safetensors"} if weight_map is None else weight_map
    }
    if metadata is not None:
        index["metadata"] = dict(metadata)  # type: ignore[call-overload]
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    source = open_tensors(sharded(tmp_path))
    assert source.names == ("a", "b")
    assert source.tensor_bytes == 32
    assert source.read("b").tolist() == [98, 98]
    with pytest.raises(CheckpointError, match="no tensor 'c'"):
        source.read("c")


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a": "../a.safetensors", "b": "b.safetensors"}, "plain name"),
        ({"a": "/etc/passwd", "b": "b.safetensors"}, "plain name"),
        ({"a": "..", "b": "b.safetensors"}, "plain name"),
        ({"a": "", "b": "b.safetensors"}, "plain name"),
        ({"a": "c.safetensors", "b": "b.safetensors"}, "missing"),
        ({"a": "a.safetensors", "b": "a.safetensors"}, "'b' is not in a.safetensors"),
        ({"a": "a.safetensors", "b": "b.safetensors", "c": "b.safetensors"}, "'c' is not in b"),
        ({"a": "a.safetensors", "c": "b.safetensors"}, "does not list 'b'"),
        ([["a", "a.safetensors"]], "weight_map must map"),
        ({"a": 3}, "weight_map must map"),
    ],
)
def test_an_index_that_lies(tmp_path: Path, weight_map: Mapping[str, str], words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        read_index(sharded(tmp_path / "model", weight_map))
    assert caught.value.exit_code == 3


def test_an_index_needs_metadata_and_one_place_a_tensor(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="metadata"):
        read_index(sharded(tmp_path, metadata=None))
    sharded(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    write_safetensors(tmp_path / "b.safetensors", {"a": torch.zeros(2), "b": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"'a' is in a.safetensors and in b.safetensors"):
        read_index(tmp_path)


def test_links_may_lead_only_into_the_cache(tmp_path: Path) -> None:
    cache = tmp_path / "models--x"
    snapshot, blobs = cache / "snapshots" / "main", cache / "blobs"
    sharded(snapshot)
    blobs.mkdir()
    (snapshot / "a.safetensors").rename(blobs / "0123")
    (snapshot / "a.safetensors").symlink_to("../../blobs/0123")
    assert read_index(snapshot).read("a").tolist() == [97, 97]
    outside = sharded(tmp_path / "plain")
    (outside / "a.safetensors").unlink()
    (outside / "a.safetensors").symlink_to(blobs / "0123")
    with pytest.raises(CheckpointError, match="leads out of the directory"):
        read_index(outside)


def test_pickles_are_named_and_not_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(CheckpointError, match="pickle"):
            open_tensors(path)


def test_open_tensors_needs_few_file_handles(tmp_path: Path) -> None:
    names = [f"{number:03d}.safetensors" for number in range(100)]
    for name in names:
        write_safetensors(tmp_path / name, {name: torch.zeros(2)})
    index = {"metadata": {}, "weight_map": {name: name for name in names}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    code = (
        "import resource, sys; from lowrank.io import open_tensors\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "source = open_tensors(sys.argv[1]); print(sum(source.read(n).numel() for n in source.names))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "200"


# side files


def test_side_files_are_an_allow_list(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for name in ("tokenizer.json", "vocab.txt", "modeling_x.py", "model.safetensors", "config.json", "notes.txt"):
        (source / name).write_text(name)
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    (source / "1_Pooling" / "pytorch_model.bin").write_text("{}")
    (tmp_path / "secret").write_text("secret")
    (source / "merges.txt").symlink_to(tmp_path / "secret")
    os.chmod(source / "vocab.txt", 0o600)
    assert copy_side_files(source, target) == ("1_Pooling/config.json", "tokenizer.json", "vocab.txt")
    copied = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert copied == {"1_Pooling/config.json", "tokenizer.json", "vocab.txt"}
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((target / "vocab.txt").stat().st_mode) == 0o666 & ~umask
