"""Output directories that appear whole or not at all, also when the power goes.

A directory is written under a hidden sibling name, synced, and then renamed into place; where there was one before the
two are exchanged in one step (``renameat2``, Linux) or, where the system cannot, renamed one after the other.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
import stat
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from lowrank.errors import StorageError, UsageError
from lowrank.io.ownership import is_ours, overlaps
from lowrank.io.parsing import printable

__all__ = ["atomic_directory", "check_destination", "lock_destination", "write_text"]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# Two lines a directory that is written; a lock file that holds more is not ours.
_LARGEST_RECORD = 1 << 16
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)

_held: dict[str, tuple[int, int]] = {}  # lock file -> (thread, depth)
_held_guard = threading.Lock()


def check_destination(
    path: str | os.PathLike[str],
    overwrite: bool = False,
    forbidden: Sequence[str | os.PathLike[str]] = (),
    needed_bytes: int = 0,
) -> Path:
    """Find out before the work whether a directory can be written at ``path``.

    Args:
        path: the directory to be; its parent must exist.
        overwrite: allow a directory that is not empty, if it is one that this package wrote.
        forbidden: inputs of the run; the output may not be one of them, lie inside one or hold one.
        needed_bytes: free space that writing will take.

    Returns:
        The absolute path with links resolved.

    Raises:
        UsageError: not empty without ``overwrite``, holding what others wrote, equal to or nested with an input, or a
            directory that must not be replaced (the root, the home directory, the current one or one above it).
        StorageError: the parent is missing or read-only, the target is a file, a mount point or read-only, or there is
            too little space.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     check_destination(Path(folder, "out")).name
    'out'
    """
    where = printable(path)
    if not os.fspath(path) or "\0" in os.fsdecode(path):
        raise UsageError(f"output {where!r}: not a legal directory name")
    real = Path(os.path.realpath(path))
    for source in forbidden:
        if overlaps(real, source):
            raise UsageError(
                f"output {where} and input {printable(source)} are the same or lie in one another; write somewhere else"
            )
    cwd = Path(os.path.realpath(os.getcwd()))
    if cwd.is_relative_to(real) or real == Path(os.path.realpath(os.path.expanduser("~"))):
        raise UsageError(f"output {where} is the home or current directory, or above it; name one of its own")
    try:
        _check_target(real, where, overwrite)
        _check_parent(real.parent, where)
        free_bytes = shutil.disk_usage(real.parent).free
    except OSError as error:
        raise StorageError(f"output {where}: {error.strerror}") from error
    if free_bytes < needed_bytes:
        raise StorageError(f"output {where}: {needed_bytes} bytes are needed, {free_bytes} are free; make room first")
    return real


def _check_target(real: Path, where: str, overwrite: bool) -> None:
    try:
        mode = os.stat(real).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(mode):
        raise StorageError(f"output {where}: there is a file of that name; the output is a directory")
    if os.path.ismount(real):
        raise StorageError(f"output {where}: a mount point cannot be replaced; name a directory inside it")
    if _read_only(real, mode):
        raise StorageError(f"output {where}: read-only (mode {stat.S_IMODE(mode):04o})")
    if not os.listdir(real):
        return
    if not overwrite:
        raise UsageError(f"output {where} exists and is not empty; give another name, or overwrite=True (--overwrite)")
    if not is_ours(real):
        raise UsageError(
            f"output {where}: holds files that lowrank did not write, and only what it wrote is replaced; give another name, "
            "or empty the directory yourself"
        )


def _check_parent(parent: Path, where: str) -> None:
    try:
        mode = os.stat(parent).st_mode
    except FileNotFoundError as error:
        raise StorageError(f"output {where}: its parent directory does not exist; create it first") from error
    if not stat.S_ISDIR(mode):
        raise StorageError(f"output {where}: its parent is not a directory")
    if _read_only(parent, mode):
        raise StorageError(f"output {where}: its parent directory is read-only (mode {stat.S_IMODE(mode):04o})")


def _read_only(directory: Path, mode: int) -> bool:
    # os.access says yes to root whatever the mode; a directory nobody may write is meant to stay as it is.
    return not mode & 0o222 or not os.access(directory, os.W_OK | os.X_OK)


def _sibling(real: Path, suffix: str) -> Path:
    # A digest of the name, not the name: that may have 255 bytes already.
    digest = hashlib.sha256(os.fsencode(real.name)).hexdigest()[:24]
    return real.parent / f".lowrank-{digest}.{suffix}"


@contextlib.contextmanager
def lock_destination(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Hold an output for this run; a second run into the same one is turned away.

    Advisory, by ``flock`` on a hidden file beside the output, gone afterwards (and with the process). One thread may
    take it again within itself. What a killed run left behind is cleared away on entry.

    Raises:
        StorageError: another run holds it, or the lock file cannot be made.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, lock_destination(Path(folder, "out")) as real:
    ...     real.name
    'out'
    """
    real = Path(os.path.realpath(path))
    lock = os.fspath(_sibling(real, "lock"))
    me = threading.get_ident()
    busy = StorageError(f"output {printable(path)}: another run is writing to it; wait, or name another directory")
    with _held_guard:
        thread, depth = _held.get(lock, (me, 0))
        if thread != me:
            raise busy
        _held[lock] = (me, depth + 1)
    descriptor = None
    try:
        if depth == 0:
            try:
                descriptor = _acquire(lock)
                if descriptor is None:
                    raise busy
                _recover(real, _recorded(descriptor))
            except OSError as error:
                raise StorageError(f"output {printable(path)}: cannot be locked ({error.strerror})") from error
        yield real
    finally:
        with _held_guard:
            _held[lock] = (me, depth)
            if depth == 0:
                del _held[lock]
        if descriptor is not None:
            with contextlib.suppress(OSError):
                os.unlink(lock)
            os.close(descriptor)


def _acquire(lock: str) -> int | None:
    """Open and lock the file; ``None`` if somebody else has it."""
    if sys.platform == "win32":
        raise OSError(errno.ENOTSUP, "advisory locks need a POSIX system")
    import fcntl

    while True:
        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder may have unlinked the file between our open and our lock: then it guards nothing.
            if os.fstat(descriptor).st_ino == os.stat(lock).st_ino:
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            pass
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _record(real: Path, directory: Path) -> None:
    """Note in the lock file that a directory is this run's own, under whatever name a kill may leave it."""
    status = os.stat(directory)
    descriptor = os.open(_sibling(real, "lock"), os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.write(descriptor, f"{status.st_dev} {status.st_ino}\n".encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _recorded(descriptor: int) -> set[str]:
    """What a killed run had noted; its lock file outlives it."""
    found = os.pread(descriptor, _LARGEST_RECORD, 0).decode("ascii", errors="replace")
    return {line for line in found.split("\n") if line}


def _recover(real: Path, recorded: set[str]) -> None:
    """Finish what a killed run began: put back an output that was moved aside, drop a half-written one.

    Only what such a run noted as its own: the names can be foreseen, and whoever may write beside the output can take them.
    """

    def is_own(path: Path) -> bool:
        status = os.lstat(path)
        return stat.S_ISDIR(status.st_mode) and f"{status.st_dev} {status.st_ino}" in recorded

    aside, partial = _sibling(real, "aside"), _sibling(real, "partial")
    if os.path.lexists(aside) and is_own(aside):
        if real.exists():
            shutil.rmtree(aside)
        else:
            os.rename(aside, real)
    if os.path.lexists(partial):
        if is_own(partial):
            shutil.rmtree(partial)
        elif partial.is_dir() and not partial.is_symlink() and not os.listdir(partial):
            # Killed between making it and noting it.
            os.rmdir(partial)
        else:
            raise StorageError(
                f"{printable(partial)}: in the way, and not noted by any run as its own; move it away, or delete it"
            )


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty hidden directory that becomes ``path`` when the block ends, and vanishes when it raises.

    Modes follow the umask; a directory or file that replaces one of the same name takes over its mode. Everything is
    synced before the name changes.

    Raises:
        UsageError, StorageError: as :func:`check_destination` and :func:`lock_destination`; every ``OSError`` of the
            block comes out as ``StorageError``.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic_directory(Path(folder, "out")) as partial:
    ...         write_text(partial / "a.txt", "done")
    ...     Path(folder, "out", "a.txt").read_text()
    'done'
    """
    real = check_destination(path, overwrite)
    with lock_destination(real):
        partial = _sibling(real, "partial")
        made = False
        try:
            os.mkdir(partial)
            made = True
            _record(real, partial)
            yield partial
            # A run that did not know of us may have filled it meanwhile.
            _check_target(real, printable(path), overwrite)
            _sync_tree(partial)
            _copy_modes(real, partial)
            _commit(partial, real)
        except OSError as error:
            raise StorageError(f"output {printable(path)}: writing failed ({error.strerror or error})") from error
        finally:
            if made:
                shutil.rmtree(partial, ignore_errors=True)
            if made and partial.exists():
                warnings.warn(f"{printable(partial)} could not be removed entirely; delete it by hand", stacklevel=3)


def _copy_modes(old: Path, new: Path) -> None:
    if not old.is_dir():
        return
    os.chmod(new, stat.S_IMODE(os.stat(old).st_mode))
    for path in new.rglob("*"):
        counterpart = old / path.relative_to(new)
        if counterpart.is_symlink() or not counterpart.exists() or counterpart.is_dir() != path.is_dir():
            continue
        os.chmod(path, stat.S_IMODE(os.stat(counterpart).st_mode))


def _sync_tree(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        _sync(path)


def _commit(partial: Path, real: Path) -> None:
    if not real.exists() or not os.listdir(real):
        os.rename(partial, real)
        _sync(real.parent)
        return
    # Noted before it moves: it will have the other's name, or one aside.
    _record(real, real)
    if not _exchange(partial, real):
        aside = _sibling(real, "aside")
        os.rename(real, aside)
        try:
            os.rename(partial, real)
        except OSError:
            os.rename(aside, real)
            raise
        shutil.rmtree(aside)
    _sync(real.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; ``False`` where the system has no such call."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code))


def write_text(path: Path, text: str) -> None:
    """Write a new UTF-8 file with ``\\n`` line ends, synced to disk; the mode follows the umask.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_text(Path(folder, "a.txt"), "ä")
    ...     Path(folder, "a.txt").stat().st_size
    2
    """
    with open(path, "x", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
