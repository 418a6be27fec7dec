from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

import lowrank
from lowrank.checkpoint import save_compressed
from lowrank.cli.shell import check_file, emit, note, run, write_file
from lowrank.errors import StorageError


def lowrank_process(*arguments: str, **options: object) -> subprocess.Popen[bytes]:
    """The command line in a process of its own, with the package of this test wherever it is installed."""
    root = str(Path(lowrank.__file__).parent.parent)
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **options.pop("env", {})}  # type: ignore[dict-item]
    settings = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([sys.executable, "-m", "lowrank", *arguments], env=env, **settings)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_signals_end_through_the_clean_up(
    number: signal.Signals, code: int, word: str, capfd: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    # A shell starts its background jobs with interrupts ignored, and what is ignored stays so (the next test).
    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    found = signal.signal(number, usual)
    request.addfinalizer(lambda: signal.signal(number, found))
    cleaned = []

    def body() -> None:
        try:
            os.kill(os.getpid(), number)
        finally:
            cleaned.append(True)

    before = signal.getsignal(number)
    assert run(body) == code
    assert cleaned == [True]
    assert signal.getsignal(number) == before
    assert capfd.readouterr().err == f"lowrank: error: {word}\n"


def test_an_ignored_interrupt_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run(lambda: os.kill(os.getpid(), signal.SIGINT)) == 0
    finally:
        signal.signal(signal.SIGINT, before)


def with_standard_output(target: object, body: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> int:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", target)
        return run(body)


def test_a_reader_that_has_gone_away_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = []

    def body() -> None:
        emit("gone")
        emit("again")
        done.append(True)

    with os.fdopen(writer, "w") as pipe:
        assert with_standard_output(pipe, body, monkeypatch) == 0
    assert done == [True]
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_under_standard_output_is_a_storage_error(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full:
        assert with_standard_output(full, lambda: emit("text"), monkeypatch) == 5
    assert "standard output" in capfd.readouterr().err


def test_no_standard_output_at_all(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert with_standard_output(None, lambda: emit("text"), monkeypatch) == 0
    assert capfd.readouterr() == ("", "")


def test_our_warnings_are_one_line_and_those_of_others_are_not_shown(capfd: pytest.CaptureFixture[str]) -> None:
    def body() -> None:
        warnings.simplefilter("default")
        warnings.warn_explicit("rank is high", UserWarning, f"{os.sep}lowrank{os.sep}layers.py", 1)
        warnings.warn_explicit("old", DeprecationWarning, f"{os.sep}torch{os.sep}x.py", 1)

    assert run(body) == 0
    assert capfd.readouterr().err == "lowrank: warning: rank is high\n"


def test_a_failure_is_one_printable_line(capfd: pytest.CaptureFixture[str]) -> None:
    def body() -> None:
        raise StorageError("a\n  b \x1b[2J \u202e")

    assert run(body) == 5
    assert capfd.readouterr().err == "lowrank: error: a b \\x1b[2J \\u202e\n"


def test_files_are_written_whole_with_an_ordinary_mode(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    before = os.umask(0o027)
    try:
        write_file(path, b"one")
        assert path.stat().st_mode & 0o777 == 0o640
        path.chmod(0o604)
        write_file(path, b"two")
    finally:
        os.umask(before)
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"two", 0o604)
    assert list(tmp_path.iterdir()) == [path]
    write_file(Path(os.devnull), b"x")
    with pytest.raises(StorageError, match="cannot be written"):
        write_file(tmp_path / "absent" / "x", b"x")


def test_files_are_checked_before_the_work(tmp_path: Path) -> None:
    check_file(tmp_path / "a.json")
    with pytest.raises(StorageError, match="is a directory"):
        check_file(tmp_path)
    with pytest.raises(StorageError, match="does not exist"):
        check_file(tmp_path / "absent" / "a.json")


def test_notes_go_to_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    note("reading")
    assert capfd.readouterr() == ("", "lowrank: reading\n")


def test_a_process_in_a_c_locale_without_a_terminal_or_standard_output(tmp_path: Path) -> None:
    name = "mod\u00e8le \udcff"
    save_compressed(nn.Linear(2, 2), tmp_path / name)
    env = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": ""}
    with lowrank_process("info", str(tmp_path / name), env=env, cwd=tmp_path) as plain:
        out, err = plain.communicate(timeout=120)
    assert (plain.returncode, err) == (0, b"")
    assert b"Linear" in out
    script = 'exec "$@" >&- '
    root = str(Path(lowrank.__file__).parent.parent)
    command = ["bash", "-c", script, "sh", sys.executable, "-m", "lowrank", "info", str(tmp_path / name)]
    closed = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": root}, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, timeout=120
    )
    assert (closed.returncode, closed.stderr) == (0, b"")


@pytest.mark.parametrize("entry", ["module", "script"])
def test_an_interrupt_while_torch_is_imported_is_one_line(tmp_path: Path, entry: str) -> None:
    # A stand-in for torch that says when it is imported, and waits.
    (tmp_path / "torch.py").write_text("import sys, time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    script = tmp_path / "lowrank"
    script.write_text("import sys\nfrom lowrank.cli import main\nsys.exit(main())\n")
    root = str(Path(lowrank.__file__).parent.parent)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), root])}
    how = ["-m", "lowrank"] if entry == "module" else [str(script)]
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [sys.executable, *how, "info", "x"],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, usual)
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == "lowrank: error: interrupted\n"
    assert process.returncode == 130
