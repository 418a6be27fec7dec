"""Output directories: refused before the work, and whole or untouched whatever happens during it."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from lowrank.errors import LowRankError, StorageError, UsageError
from lowrank.io import atomic_directory, check_destination, destination, lock_destination, write_text
from lowrank.io.ownership import MARKER_NAME, is_ours, marker_text, overlaps


def snapshot(root: Path) -> dict[str, tuple[bytes | None, int]]:
    return {
        os.fspath(path.relative_to(root)): (path.read_bytes() if path.is_file() else None, path.stat().st_mode)
        for path in root.rglob("*")
    }


@contextlib.contextmanager
def unchanged(root: Path) -> Iterator[None]:
    before = snapshot(root)
    yield
    assert snapshot(root) == before


def refused(code: int, path: Path, words: str, **options: object) -> None:
    with pytest.raises(LowRankError, match=words) as caught:
        check_destination(path, **options)  # type: ignore[arg-type]
    assert caught.value.exit_code == code
    assert isinstance(caught.value, UsageError if code == 2 else StorageError)


def fill(path: Path, text: str, overwrite: bool = False) -> None:
    with atomic_directory(path, overwrite) as partial:
        write_text(partial / MARKER_NAME, marker_text())
        write_text(partial / "a.txt", text)
        (partial / "folder").mkdir()
        write_text(partial / "folder" / "b.txt", text)


# before the work (12, 42, 43, 45)


def test_output_and_input_must_be_apart(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (tmp_path / "link").symlink_to(model)
    with unchanged(tmp_path):
        for path in (model, model / "out", tmp_path / "link", tmp_path / "link" / "out", tmp_path):
            refused(2, path, "input", forbidden=[model], overwrite=True)
        assert check_destination(tmp_path / "model2", forbidden=[model]) == tmp_path / "model2"


def test_a_full_directory_needs_overwrite(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    check_destination(tmp_path / "out")
    (tmp_path / "out" / "x").write_text("x")
    with unchanged(tmp_path):
        refused(2, tmp_path / "out", "--overwrite")
        refused(2, tmp_path / "out", "lowrank did not write", overwrite=True)
    (tmp_path / "out" / MARKER_NAME).write_text(marker_text())
    with unchanged(tmp_path):
        check_destination(tmp_path / "out", overwrite=True)


def test_targets_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    for name in ("closed", "closed_out"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o555)
    with unchanged(tmp_path):
        refused(5, tmp_path / "absent" / "out", "parent directory does not exist")
        refused(5, tmp_path / "file", "file of that name")
        refused(5, tmp_path / "file" / "out", "not a directory|Not a directory")
        refused(5, tmp_path / "closed" / "out", "read-only")
        refused(5, tmp_path / "closed_out", "read-only", overwrite=True)
        refused(5, tmp_path / ("x" * 300), "too long")
        refused(5, tmp_path / "out", "bytes are needed", needed_bytes=10**18)
        refused(5, Path("/proc"), "mount point", overwrite=True)
    refused(2, Path("/"), "above it", overwrite=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    refused(2, tmp_path, "home", overwrite=True)
    monkeypatch.chdir(tmp_path)
    refused(2, Path("."), "current directory", overwrite=True)
    refused(2, Path("a\0b"), "legal")


NAMES = ["with space", "new\nline", "-dash", "--", "x" * 255, os.fsdecode(b"caf\xe9"), "gr\u00fcn", "*", "$HOME", "~"]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_any_name_that_the_system_takes(tmp_path: Path, name: str) -> None:
    fill(tmp_path / name, "one")
    fill(tmp_path / name, "two", overwrite=True)
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name / "folder" / "b.txt").read_text() == "two"


# the commit


def test_a_link_to_a_directory_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    fill(tmp_path / "link", "one")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a.txt").read_text() == "one"


@pytest.mark.parametrize("exchange", [True, False])
def test_overwriting_replaces_everything(tmp_path: Path, exchange: bool) -> None:
    fill(tmp_path / "out", "one")
    (tmp_path / "out" / "old.txt").write_text("old")
    with contextlib.ExitStack() as stack:
        if not exchange:
            stack.enter_context(mock.patch.object(destination, "_exchange", return_value=False))
        fill(tmp_path / "out", "two", overwrite=True)
    names = ["out", "out/a.txt", "out/folder", "out/folder/b.txt", f"out/{MARKER_NAME}"]
    assert sorted(snapshot(tmp_path)) == names
    assert (tmp_path / "out" / "a.txt").read_text() == "two"


def test_the_exchange_is_one_step_here(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not destination._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this system or file system cannot exchange two names")
    assert os.listdir(tmp_path / "a") == ["b"]
    with pytest.raises(OSError, match="No such file"):
        destination._exchange(tmp_path / "a", tmp_path / "absent")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), ValueError("x"), KeyboardInterrupt()])
@pytest.mark.parametrize("exists", [True, False])
def test_a_failing_block_leaves_no_trace(tmp_path: Path, error: BaseException, exists: bool) -> None:
    if exists:
        fill(tmp_path / "out", "one")
    expected = StorageError if isinstance(error, OSError) else type(error)

    def interrupted() -> None:
        with atomic_directory(tmp_path / "out", overwrite=True) as partial:
            write_text(partial / "a.txt", "two")
            raise error

    with unchanged(tmp_path), pytest.raises(expected):
        interrupted()


@pytest.mark.parametrize("step", ["mkdir", "fsync", "rename", "chmod"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_failing_system_call_leaves_the_old_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, code: int
) -> None:
    fill(tmp_path / "out", "one")
    monkeypatch.setattr(destination, "_exchange", lambda one, other: False)
    failing = mock.patch.object(os, step, side_effect=OSError(code, os.strerror(code)))
    with unchanged(tmp_path), failing, pytest.raises(StorageError, match=os.strerror(code)) as caught:
        fill(tmp_path / "out", "two", overwrite=True)
    assert caught.value.exit_code == 5


def test_the_second_rename_failing_puts_the_old_output_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "out", "one")
    real_rename, calls = os.rename, iter([False, True, False])

    def rename(old: Path, new: Path) -> None:
        if next(calls):
            raise OSError(errno.EIO, "Input/output error")
        real_rename(old, new)

    monkeypatch.setattr(destination, "_exchange", lambda one, other: False)
    with unchanged(tmp_path), mock.patch.object(os, "rename", rename), pytest.raises(StorageError, match="put error"):
        fill(tmp_path / "out", "two", overwrite=True)


def test_an_output_that_was_filled_meanwhile_is_kept(tmp_path: Path) -> None:
    def late() -> None:
        with atomic_directory(tmp_path / "out"):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").touch()

    with pytest.raises(UsageError, match="not empty"):
        late()
    assert os.listdir(tmp_path / "out") == ["theirs"]


# modes (49)


def test_modes_follow_the_umask_and_then_the_old_files(tmp_path: Path) -> None:
    def modes() -> dict[str, int]:
        return {name: stat.S_IMODE(mode) for name, (_, mode) in snapshot(tmp_path).items()}

    before = os.umask(0o027)
    try:
        fill(tmp_path / "out", "one")
        marker = {f"out/{MARKER_NAME}": 0o640}
        assert modes() == marker | {"out": 0o750, "out/a.txt": 0o640, "out/folder": 0o750, "out/folder/b.txt": 0o640}
        (tmp_path / "out").chmod(0o711)
        (tmp_path / "out" / "a.txt").chmod(0o604)
        fill(tmp_path / "out", "two", overwrite=True)
        assert modes() == marker | {"out": 0o711, "out/a.txt": 0o604, "out/folder": 0o750, "out/folder/b.txt": 0o640}
    finally:
        os.umask(before)


# two runs (53), killed runs (50)


def test_the_second_run_is_turned_away(tmp_path: Path) -> None:
    code = (
        "import sys; from lowrank.io import lock_destination\n"
        "with lock_destination(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "out")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(StorageError, match="another run") as caught, lock_destination(tmp_path / "out"):
            pass
        assert caught.value.exit_code == 5
        with lock_destination(tmp_path / "another"):
            pass
        other.communicate("")
    fill(tmp_path / "out", "one")
    assert os.listdir(tmp_path) == ["out"]


def test_the_lock_is_a_threads_own(tmp_path: Path) -> None:
    seen: list[str] = []

    def second() -> None:
        try:
            with lock_destination(tmp_path / "out"):
                seen.append("entered")
        except StorageError:
            seen.append("turned away")

    with lock_destination(tmp_path / "out"):
        fill(tmp_path / "out", "one")
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    second()
    assert seen == ["turned away", "entered"]
    assert os.listdir(tmp_path) == ["out"]


_KILLED = """
import os, signal, sys
from pathlib import Path
from lowrank.io import atomic_directory, destination, write_text
out, exchange = Path(sys.argv[1]), sys.argv[2] == "exchange"
names = ["mkdir", "open", "fsync", "chmod", "rename", "stat", "unlink", "rmdir", "close"]
if not exchange:
    destination._exchange = lambda one, other: False

def fill(text):
    with atomic_directory(out, True) as partial:
        for name in ("a", "lowrank_config.json"):
            write_text(partial / name, text)

killed = 0
for number in range(400):
    child = os.fork()
    if child == 0:
        left = number
        def counted(real):
            def call(*arguments, **options):
                global left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)
            return call
        for name in names:
            setattr(os, name, counted(getattr(os, name)))
        fill(f"run {number}")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.path.exists(out):
        texts = {Path(out, name).read_text() for name in os.listdir(out)}
        assert sorted(os.listdir(out)) == ["a", "lowrank_config.json"] and len(texts) == 1, (number, os.listdir(out), texts)
    else:
        assert number < 30 or not exchange, number
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0
        break
    killed += 1
    if number == 30:
        fill("first")
fill("last")
assert os.listdir(out.parent) == [out.name], os.listdir(out.parent)
assert Path(out, "a").read_text() == "last"
print(killed)
"""


@pytest.mark.parametrize("how", ["exchange", "rename"])
def test_killed_at_any_call_the_output_is_old_or_new(tmp_path: Path, how: str) -> None:
    arguments = [sys.executable, "-W", "ignore", "-c", _KILLED, str(tmp_path / "out"), how]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 40


def test_an_output_moved_aside_by_a_killed_run_comes_back(tmp_path: Path) -> None:
    fill(tmp_path / "out", "one")
    destination._sibling(tmp_path / "out", "lock").touch()
    destination._record(tmp_path / "out", tmp_path / "out")
    os.rename(tmp_path / "out", destination._sibling(tmp_path / "out", "aside"))
    with lock_destination(tmp_path / "out"):
        assert (tmp_path / "out" / "a.txt").read_text() == "one"
    shutil.rmtree(tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("role", ["aside", "partial"])
def test_what_no_run_noted_as_its_own_is_neither_moved_nor_deleted(tmp_path: Path, role: str, exchange: bool) -> None:
    strange = destination._sibling(tmp_path / "out", role)
    strange.mkdir()
    (strange / "model.safetensors").write_text("from a stranger")

    def failing() -> None:
        with contextlib.ExitStack() as stack:
            if not exchange:
                stack.enter_context(mock.patch.object(destination, "_exchange", return_value=False))
            with atomic_directory(tmp_path / "out"):
                raise ValueError("the run fails")

    with unchanged(tmp_path), pytest.raises(ValueError if role == "aside" else StorageError, match=r"fails|in the way"):
        failing()
    (tmp_path / "link").symlink_to(strange)
    os.rename(strange, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", strange)
    with unchanged(tmp_path), pytest.raises(ValueError if role == "aside" else StorageError, match=r"fails|in the way"):
        failing()


# whose a directory is


@pytest.mark.parametrize(
    ("names", "ours"),
    [
        (["lowrank_config.json", "notes.txt"], True),
        ([MARKER_NAME], True),
        (["frontier.json", "frontier.md"], True),
        (["frontier.json", "thesis.txt"], False),
        (["state.json", "history.json"], True),
        (["state.json", "thesis.txt"], False),
        (["config.json", "model.safetensors"], False),
        (["adapter_config.json", "adapter_model.safetensors"], False),
        (["report.json"], False),
    ],
)
def test_which_directories_are_ours(tmp_path: Path, names: list[str], ours: bool) -> None:
    for name in names:
        (tmp_path / name).write_text("{}")
    assert is_ours(tmp_path) == ours


def test_a_file_by_another_name_is_the_same_file(tmp_path: Path) -> None:
    model, store = tmp_path / "model", tmp_path / "store"
    for folder in (model, store):
        folder.mkdir()
    (store / "blob").write_text("weights")
    (model / "model.safetensors").symlink_to(store / "blob")
    (model / "config.json").write_text("{}")
    os.link(model / "config.json", tmp_path / "hard")
    for output in (store / "blob", tmp_path / "hard", model / "new.json", store, tmp_path):
        assert overlaps(output, model), output
    for output in (store / "other", tmp_path / "new.json", tmp_path / "model2"):
        assert not overlaps(output, model), output
