from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import lowrank
from lowrank.cli.app import app

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


def test_the_python_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = blocks("python")
    assert len(code) == 6
    names: dict[str, object] = {"__name__": "readme"}
    for number, block in enumerate(code):
        exec(compile(block, f"README.md, Python block {number}", "exec"), names)
    assert names["result"].report.totals["error_upper"] <= 0.05  # type: ignore[attr-defined]
    assert (tmp_path / "smaller" / "model.safetensors").is_file()
    assert "of the original size" in capsys.readouterr().out


def test_the_two_commands_stand_first_and_are_one_line_each() -> None:
    first, second = blocks("sh")[:2]
    assert first.count("\n") == second.count("\n") == 1
    assert first.startswith("python3 -m venv ")
    assert first.rstrip().endswith("/lowrank demo")
    assert second.startswith("python3 -m venv ")
    assert second.rstrip().endswith(" -m pytest")


def test_every_command_line_parses() -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("lowrank ")]
    assert len(lines) >= 4
    for line in lines:
        _, command, *arguments = shlex.split(line)
        app.commands[command].make_context(command, arguments)  # type: ignore[attr-defined]


def test_paths_and_names_that_the_readme_mentions_exist() -> None:
    paths = re.findall(r"`((?:reports|lowrank|tests)/[\w./-]*)`", TEXT)
    names = re.findall(r"`lowrank\.(\w+)", TEXT)
    table = TEXT[TEXT.index("| floor | folder |") :].split("\n\n")[0]
    rooms = re.findall(r"^\| \d+ \| `([a-z_]+)(?:/|\.py)` \|", table, re.MULTILINE)
    assert paths and names and len(rooms) > 10
    for path in paths:
        assert (README.parent / path).exists(), path
    for name in names:
        assert hasattr(lowrank, name), name
    for room in rooms:
        assert (README.parent / "lowrank" / room).is_dir() or (README.parent / "lowrank" / f"{room}.py").is_file(), room
