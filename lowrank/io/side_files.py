"""The small files beside the weights: tokenizer, processor, generation and sentence-embedding configuration."""

from __future__ import annotations

import fnmatch
import os
import shutil
from pathlib import Path

from lowrank.errors import StorageError
from lowrank.io.index import is_contained
from lowrank.io.parsing import printable

__all__ = ["copy_side_files"]

# Names, not "everything else": weights, code and whatever else lies there is not ours to spread.
_SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer*.model",
    "spiece.model",
    "sentencepiece*.model",
    "source.spm",
    "target.spm",
    "vocab.txt",
    "vocab.json",
    "vocab.bpe",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)
_SIDE_FOLDERS = ("[0-9]_Pooling", "[0-9]_Normalize")
_FOLDER_FILES = ("config.json",)
_LARGEST_BYTES = 256 << 20


def copy_side_files(source: str | os.PathLike[str], destination: str | os.PathLike[str]) -> tuple[str, ...]:
    """Copy the known side files of a Hugging Face directory; never weights, never code, nothing through a link out.

    Args:
        source: the directory of the original model.
        destination: an existing directory; nothing in it is overwritten.

    Returns:
        Relative names of what was copied, sorted.

    Raises:
        StorageError: reading or writing failed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
    ...     _ = Path(a, "vocab.txt").write_text("x")
    ...     _ = Path(a, "modeling_x.py").write_text("x")
    ...     copy_side_files(a, b)
    ('vocab.txt',)
    """
    source, destination = Path(source), Path(destination)
    copied: list[str] = []
    try:
        for path in sorted(source.iterdir()):
            if any(fnmatch.fnmatchcase(path.name, pattern) for pattern in _SIDE_FILES):
                copied += _copy(path, source, destination)
            elif path.is_dir() and any(fnmatch.fnmatchcase(path.name, pattern) for pattern in _SIDE_FOLDERS):
                for name in _FOLDER_FILES:
                    copied += _copy(path / name, source, destination)
                if path.name.endswith("_Normalize"):
                    (destination / path.name).mkdir(exist_ok=True)
    except OSError as error:
        raise StorageError(f"{printable(source)}: copying its side files failed ({error.strerror})") from error
    return tuple(copied)


def _copy(path: Path, source: Path, destination: Path) -> list[str]:
    if not path.is_file() or not is_contained(path, source) or path.stat().st_size > _LARGEST_BYTES:
        return []
    relative = path.relative_to(source)
    (destination / relative).parent.mkdir(exist_ok=True)
    with open(path, "rb") as original, open(destination / relative, "xb") as copy:
        shutil.copyfileobj(original, copy)
    return [relative.as_posix()]
