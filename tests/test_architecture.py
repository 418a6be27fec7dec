"""The house keeps its floors: imports go down, the front door is light, files are short, nothing unsafe is called."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank.compression.formats import FORMATS
from lowrank.layers.base import INTEGER_ACTIVATIONS

PACKAGE = Path(__file__).resolve().parent.parent / "lowrank"
MAX_LINES = 400

README = PACKAGE.parent / "README.md"
MOST_ENTRIES = 18


def floors() -> dict[str, int]:
    """The table of README's section "Design": folder (or file) -> floor; the front doors stand above all."""
    section = README.read_text(encoding="utf-8").split("## Design\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \| `([a-z_]+)(?:/|\.py)` \|", section, flags=re.MULTILINE)
    found = {name: int(floor) for floor, name in rows}
    return found | {"__main__": max(found.values()) + 1, "__init__": max(found.values()) + 2}


FLOORS = floors()
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


def test_the_package_has_few_entries() -> None:
    listed = {path.name for path in PACKAGE.iterdir() if not path.name.startswith(("__pycache__", "."))}
    assert len(listed) <= MOST_ENTRIES, sorted(listed)


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=lambda path: path.name)
def test_no_two_names_of_a_folder_look_alike(folder: Path) -> None:
    """None differs from another by a plural, or by the order of its words."""

    def essence(name: str) -> tuple[str, ...]:
        return tuple(sorted(word.rstrip("s") for word in name.split("_")))

    names = [path.stem for path in folder.glob("*.py")] + [path.name for path in folder.iterdir() if path.is_dir()]
    seen: dict[tuple[str, ...], str] = {}
    for name in names:
        other = seen.setdefault(essence(name), name)
        assert other == name, f"{folder.name}/: {other} and {name}"


def docstrings_of(tree: ast.AST) -> list[ast.Constant]:
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, holders) and node.body and isinstance(node.body[0], ast.Expr):
            value = node.body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                found.append(value)
    return found


@pytest.mark.parametrize("path", FILES, ids=IDENTIFIERS)
def test_docstrings_cite_sources_and_no_document_from_elsewhere(path: Path) -> None:
    for docstring in docstrings_of(ast.parse(path.read_text(encoding="utf-8"))):
        assert "DESIGN" not in docstring.value, f"line {docstring.lineno}"


# Where a string that is a format's name means something else: the package's own name, and how activations are taken.
MEANS_THE_PACKAGE = {"io/version.py"}
MEANS_ACTIVATIONS = {"layers/checks.py"}


@pytest.mark.parametrize("path", FILES, ids=IDENTIFIERS)
def test_no_format_is_named_outside_the_formats(path: Path) -> None:
    """A format's name is written in its own file alone; all others ask the registry."""
    place = path.relative_to(PACKAGE).as_posix()
    if place.startswith("compression/formats/") or place in MEANS_THE_PACKAGE:
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    told = {id(docstring) for docstring in docstrings_of(tree)}
    # logging.getLogger("lowrank") names the package.
    told |= {
        id(argument)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "logging.getLogger"
        for argument in node.args
    }
    allowed = {INTEGER_ACTIVATIONS} if place in MEANS_ACTIVATIONS else set()
    wrong = [
        f"line {node.lineno}: {node.value!r}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in set(FORMATS) - allowed and id(node) not in told
    ]
    assert not wrong


def test_whole_numbers_are_told_apart_in_one_place() -> None:
    pattern = re.compile(
        r"isinstance\((\w+(?:\.\w+)*), bool\) or not isinstance\(\1, int\)|isinstance\((\w+), int\) and not isinstance\(\2, bool\)"
    )
    found = [path.relative_to(PACKAGE).as_posix() for path in FILES if pattern.search(path.read_text(encoding="utf-8"))]
    assert found == ["errors.py"]


def test_every_module_says_what_it_is_for() -> None:
    silent = [str(path) for path in FILES if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
    assert silent == []


def test_the_front_door_is_light() -> None:
    code = f"import sys, lowrank; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    assert done.stdout.strip() == "[]", done.stderr
