"""How transformers is called: without the network, without its own output, and its failures as one line."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lowrank.errors import CheckpointError, UsageError
from lowrank.io import printable

__all__ = ["as_checkpoint_error", "local_and_quiet", "utf8_name"]


@contextlib.contextmanager
def utf8_name(directory: Path) -> Iterator[Path]:
    """The directory under a name that is UTF-8: safetensors and tokenizers read no other, file systems hold any."""
    try:
        str(directory).encode("utf-8")
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory() as folder:
            link = Path(folder, "model")
            link.symlink_to(directory.absolute(), target_is_directory=True)
            yield link
        return
    yield directory


@contextlib.contextmanager
def local_and_quiet() -> Iterator[None]:
    """Without the network, log lines and progress bars of transformers; what matters in them is raised as an error here."""
    try:
        from transformers.utils import logging
    except ImportError as error:
        raise UsageError(
            "Hugging Face models need transformers, which is not installed; pip install 'lowrank[hf]'"
        ) from error
    from huggingface_hub import constants

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    offline, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def as_checkpoint_error(what: str) -> Iterator[None]:
    """Turn whatever a library makes of a bad directory into one line."""
    try:
        yield
    except (CheckpointError, KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{what}: {printable(lines[0])}") from error
