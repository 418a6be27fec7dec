"""Files: strict readers, safetensors in and out, and directories that appear whole or not at all."""

from __future__ import annotations

from lowrank.io.destination import atomic_directory, check_destination, lock_destination, write_text
from lowrank.io.index import INDEX_NAME, WEIGHTS_NAME, TensorSource, open_tensors, read_index
from lowrank.io.parsing import parse_json, printable, read_bounded, read_json, require_int
from lowrank.io.side_files import copy_side_files
from lowrank.io.tensors import (
    SafetensorsHeader,
    TensorEntry,
    dtype_name,
    read_safetensors_header,
    read_tensor,
    write_safetensors,
)

__all__ = [
    # text from elsewhere
    "parse_json",
    "printable",
    "read_bounded",
    "read_json",
    "require_int",
    # safetensors
    "INDEX_NAME",
    "WEIGHTS_NAME",
    "SafetensorsHeader",
    "TensorEntry",
    "TensorSource",
    "dtype_name",
    "open_tensors",
    "read_index",
    "read_safetensors_header",
    "read_tensor",
    "write_safetensors",
    # directories that are written
    "atomic_directory",
    "check_destination",
    "copy_side_files",
    "lock_destination",
    "write_text",
]
