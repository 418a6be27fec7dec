"""What a file is, by its first bytes: whoever was given the wrong one is told which, and what to do with it."""

from __future__ import annotations

import io
import os
import zipfile

from lowrank.io.parsing import open_regular, printable

__all__ = ["describe_content"]

_HEAD_BYTES = 512
_TO_SAFETENSORS = "load it where you trust it and save its tensors with safetensors.torch.save_file"
_STARTS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"version https://git-lfs", "a Git LFS pointer, not the tensors; run `git lfs pull` where it came from"),
    (0, b"version ", "a Git LFS pointer, not the tensors; run `git lfs pull` where it came from"),
    (0, b"GGUF", "a GGUF file of llama.cpp, quantised already; start from the original model in safetensors"),
    (0, b"ggml", "a GGML file of llama.cpp, quantised already; start from the original model in safetensors"),
    (0, b"lmgg", "a GGML file of llama.cpp, quantised already; start from the original model in safetensors"),
    (0, b"\x93NUMPY", "a NumPy array (.npy); put it into an .npz under the name of the model's input"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras); load it there and save its tensors as safetensors"),
    (4, b"TFL3", "a TensorFlow Lite model; start from the original in PyTorch"),
    (0, b"\x1f\x8b", "a gzip archive; unpack it first"),
    (0, b"BZh", "a bzip2 archive; unpack it first"),
    (0, b"\xfd7zXZ", "an xz archive; unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "a Zstandard archive; unpack it first"),
    (257, b"ustar", "a tar archive; unpack it first"),
    (0, b"\x08", "perhaps an ONNX or other protobuf file; start from the original model in safetensors"),
    (0, b"<!DOCTYPE", "a web page, such as a failed download leaves; fetch the file anew"),
    (0, b"<html", "a web page, such as a failed download leaves; fetch the file anew"),
    (0, b"{", "JSON text, not tensors"),
)


def describe_content(path: str | os.PathLike[str]) -> str | None:
    """Say what a file is that is no safetensors file, with the remedy; ``None`` where its first bytes say nothing.

    Raises:
        CheckpointError, StorageError: as :func:`lowrank.io.read_bounded`.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "a.safetensors")
        ...     _ = path.write_bytes(b"GGUF" + bytes(60))
        ...     describe_content(path)
        'a GGUF file of llama.cpp, quantised already; start from the original model in safetensors'
    """
    with open(open_regular(path), "rb") as file:
        head = file.read(_HEAD_BYTES)
        if head[:4] == b"PK\x03\x04":
            return _archive(file)
    # A header's length may happen to spell anything; the header itself begins with a brace.
    if len(head) > 8 and head[8:9] == b"{":
        return None
    if head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return f"a pickle, which can run code and is not read; {_TO_SAFETENSORS}"
    for start, sign, text in _STARTS:
        if head[start : start + len(sign)] == sign:
            return text
    return None


def _archive(file: io.BufferedReader) -> str:
    """What is in a zip archive: torch writes its pickles and TorchScript models as such, NumPy its arrays."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return "a zip archive (torch's, or an .npz) that is damaged or was cut short"
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner:
        return (
            "a TorchScript model, which is code and is not run; load the module that it was made from and save that, or its "
            "state_dict, with safetensors.torch.save_file"
        )
    if "data.pkl" in inner:
        return f"a pickle archive that torch.save wrote; it can run code and is not read; {_TO_SAFETENSORS}"
    if names and all(name.endswith(".npy") for name in names):
        return "an archive of NumPy arrays (.npz); that is data, not a model"
    if "[Content_Types].xml" in names or "metadata.json" in inner | set(names):
        return "a zip archive of another program (Keras, or a document); save its tensors as safetensors"
    return (
        f"a zip archive of {len(names)} files, the first {printable(names[0])!r}; unpack it first"
        if names
        else "an empty zip archive"
    )
