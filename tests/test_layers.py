"""The import graph: arrows point one way, and there is no circle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "tta_ext"

# A room may import those above it in this list, and nothing below; rooms of one line are
# neighbours that do not know each other.
FLOORS = [
    {
        "_version",
        "rules",
        "rng",
        "build",
        "env",
        "files",
        "journal",
        "jobs",
        "intervals",
        "frames",
        "plots",
    },
    {"schemas"},
    {"dispatch"},
    {"backends", "ops"},
    {
        "doctor",
        "decoding.runtime",
        "decoding.classifier",
        "decoding.embedding",
        "decoding.rewards",
    },
    {"decoding.deferral", "decoding.search"},
    {"decoding"},
    {"hf", "evaluation", "problems", "sweep", "demo", "engines", "lm_eval", "tasks", "pages"},
    {"serving"},
    {"cli"},
    {""},
]


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(p for p in parts if p != "__init__")] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path], everywhere: bool) -> set[str]:
    """Modules of the package that a module imports when it is loaded, or anywhere."""
    tree, found = ast.parse(path.read_text()), set()
    typing_only = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.unparse(test.test)
        for node in ast.walk(test)
    }
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only or (id(node) in inside and not everywhere):
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{name} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for one in names:
            if one != "tta_ext" and not one.startswith("tta_ext."):
                continue
            target = one.removeprefix("tta_ext").removeprefix(".")
            if target not in known:
                target = target.rpartition(".")[0]
            if target != name:
                found.add(target)
    return found


def room(name: str) -> int:
    """The floor of a module."""
    best, floor = -1, None
    for level, rooms in enumerate(FLOORS):
        for one in rooms:
            if (name == one or name.startswith(one + ".") or one == "") and len(one) > best:
                best, floor = len(one), level
    assert floor is not None
    assert best > 0 or not name, f"tests/test_layers.py has no floor for tta_ext.{name}"
    return floor


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(name, path, known, True) for name, path in known.items()}


def test_no_import_points_up(graph: dict[str, set[str]]) -> None:
    wrong = [
        f"{name or 'tta_ext'} imports {other}"
        for name, others in graph.items()
        for other in others
        if other and room(other) > room(name)
    ]
    assert not wrong


def test_wings_do_not_know_each_other(graph: dict[str, set[str]]) -> None:
    wings = ("decoding.deferral", "decoding.search")
    wrong = [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in others
        for mine, theirs in (wings, wings[::-1])
        if name.startswith(mine) and other.startswith(theirs)
    ]
    assert not wrong


def test_no_circles(graph: dict[str, set[str]]) -> None:
    """Lazy imports count: what is imported inside a function is no way round."""
    done: set[str] = set()
    path: list[str] = []

    def visit(name: str) -> None:
        assert name not in path, " > ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for other in sorted(graph[name] - {""}):
            visit(other)
        path.pop()
        done.add(name)

    for name in graph:
        if name:
            visit(name)


def test_no_private_names_across_rooms() -> None:
    known, wrong = modules(), []
    for name, path in known.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tta_ext"):
                home = (node.module or "").removeprefix("tta_ext").removeprefix(".")
                for alias in node.names:
                    private = alias.name.startswith("_") and not alias.name.startswith("__")
                    package = (
                        home.rpartition(".")[0]
                        if known.get(home, path).stem != "__init__"
                        else home
                    )
                    if private and not name.startswith(package or "tta_ext"):
                        wrong.append(f"{name} imports {alias.name} of {home}")
    assert not wrong
