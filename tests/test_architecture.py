"""The house keeps its floors: imports go down, the front door is light, files are short, nothing unsafe is called."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "lowrank"
MAX_LINES = 400

# A folder imports only from floors strictly below its own; README's section "Design" holds the table.
FLOORS: dict[str, int] = {
    "errors": 0,
    "io": 1,
    "numerics": 1,
    "calibration": 2,
    "kernels": 2,
    "reporting": 2,
    "integrations": 2,
    "layers": 3,
    "targets": 4,
    "checkpoint": 5,
    "lora": 6,
    "training": 7,
    "compression": 8,
    "analysis": 9,
    "cli": 10,
    "__main__": 11,
    "__init__": 12,
}
HEAVY = ("transformers", "matplotlib", "sklearn", "peft", "accelerate")
FILES = sorted(PACKAGE.rglob("*.py"))
IDENTIFIERS = [str(path.relative_to(PACKAGE)) for path in FILES]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(tree: ast.AST) -> set[str]:
    """Modules that are imported, as absolute dotted names; ``from lowrank import x`` gives ``lowrank.x``."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            assert node.module is not None
            found |= {f"lowrank.{alias.name}" for alias in node.names} if node.module == "lowrank" else {node.module}
    return found


def rooms_used(path: Path) -> set[str]:
    names = imports_of(ast.parse(path.read_text(encoding="utf-8")))
    return {name.split(".")[1] for name in names if name.startswith("lowrank.")} - {room_of(path)}


def test_every_room_has_a_floor_and_every_floor_a_room() -> None:
    rooms = {room_of(path) for path in FILES}
    assert rooms - set(FLOORS) == set(), "rooms without a floor; add them to FLOORS"
    assert set(FLOORS) - rooms == set(), "floors of rooms that do not exist"


@pytest.mark.parametrize("path", FILES, ids=IDENTIFIERS)
def test_imports_go_strictly_down(path: Path) -> None:
    floor = FLOORS[room_of(path)]
    if room_of(path) in ("__init__", "__main__"):
        return
    wrong = {room: FLOORS.get(room) for room in rooms_used(path) if FLOORS.get(room, floor) >= floor}
    assert not wrong, f"{path.name} on floor {floor} imports from {wrong}"


@pytest.mark.parametrize("path", FILES, ids=IDENTIFIERS)
def test_no_file_is_long(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{path.name} has {lines} lines; split it"


@pytest.mark.parametrize("path", FILES, ids=IDENTIFIERS)
def test_nothing_unsafe(path: Path) -> None:
    """No pickle, no torch.load without weights_only, no bare except, no eval or exec, future annotations everywhere."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: bare except"
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in {"eval", "exec", "torch.save"}, f"line {node.lineno}: {name}"
            if name == "torch.load":
                safe = any(key.arg == "weights_only" and ast.unparse(key.value) == "True" for key in node.keywords)
                assert safe, f"line {node.lineno}: torch.load without weights_only=True"
    assert not {name for name in imports_of(tree) if name.split(".")[0] in {"pickle", "cloudpickle", "dill", "shelve"}}
    if any(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in tree.body):
        assert "__future__" in imports_of(tree), "from __future__ import annotations is missing"


@pytest.mark.parametrize("path", FILES, ids=IDENTIFIERS)
def test_heavy_packages_are_imported_only_where_they_are_used(path: Path) -> None:
    """At the top of a file none of them, so that importing any room is light."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = ast.Module([node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
    assert not {name for name in imports_of(top) if name.split(".")[0] in HEAVY}
    if room_of(path) != "integrations":
        assert not {name for name in imports_of(tree) if name.split(".")[0] in {"transformers", "peft", "accelerate"}}


def test_every_module_says_what_it_is_for() -> None:
    silent = [str(path) for path in FILES if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
    assert silent == []


def test_the_front_door_is_light() -> None:
    code = f"import sys, lowrank; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    assert done.stdout.strip() == "[]", done.stderr
