"""The house has floors: a package imports only from packages below it, and no modules in a circle.

Imports inside functions count; those for type hints alone (under TYPE_CHECKING) do not.
"""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import vicuna

ROOT = Path(vicuna.__file__).parent
# From the ground up; what stands on one floor does not import its neighbours. Single modules of
# `vicuna` itself that are not named here are on the ground floor.
FLOORS = (
    {"files", "hub", "errors", "i18n", "messages", "terminal"},
    {"config", "gguf"},
    {"data", "weights"},
    {"llamacpp"},
    {"model"},
    {"memory", "export", "verify"},
    {"generate", "convert"},
    {"train", "runs", "api", "quantize"},
    {"commands", "serve"},
    {"web"},
    {"cli"},
)
ABOVE = {"__main__"}


def modules() -> dict[str, Path]:
    """Every module's dotted name below `vicuna`, and its file."""
    return {
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
        for p in ROOT.rglob("*.py")
        if p != ROOT / "__init__.py"
    }


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of `vicuna` that a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hints: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            hints |= {id(inner) for part in node.body for inner in ast.walk(part)}
    names = set()
    for node in ast.walk(tree):
        if id(node) in hints:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {n.removeprefix("vicuna.") for n in names if n.startswith("vicuna.")} & set(known)


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(path, known) - {name} for name, path in known.items()}


def floor(module: str) -> int:
    top = module.split(".")[0]
    return next((n for n, packages in enumerate(FLOORS) if top in packages), 0)


def test_every_package_has_a_floor() -> None:
    packages = {p.name for p in ROOT.iterdir() if any(p.glob("[a-z]*.py"))}
    assert packages == {n for floor in FLOORS for n in floor if (ROOT / n).is_dir()}


def test_imports_go_down(graph: dict[str, set[str]]) -> None:
    up = []
    for module, imported in graph.items():
        here = module.split(".")[0]
        for other in imported:
            there = other.split(".")[0]
            below = floor(other) < floor(module) or floor(other) == floor(module) == 0
            if here != there and here not in ABOVE and not below:
                up.append(f"{module} imports {other}")
    assert not up


def test_no_modules_import_each_other_in_a_circle(graph: dict[str, set[str]]) -> None:
    # A package's __init__ stands for the package; it is not a member of circles by being a parent.
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as e:
        pytest.fail(" -> ".join(e.args[1]))
