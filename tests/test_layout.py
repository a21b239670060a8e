"""The parts: who imports whom, and that everything imported is required."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from support import ROOT

PARTS = sorted((ROOT / "balancer").glob("*.py"))
LOADTEST = sorted((ROOT / "loadtest").glob("*.py"))
DEMO = sorted((ROOT / "demo").glob("*.py"))
PROGRAMS = [ROOT / name for name in ("load_balancer.py", "backend_server.py", "start_all.py", "test_client.py")]


def imports(node: ast.AST) -> Iterator[str]:
    """Modules imported at run time, also inside functions; imports for type checkers only do not count."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert not child.level, "relative import"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        else:
            yield from imports(child)


def imported_by(path: Path) -> set[str]:
    return set(imports(ast.parse(path.read_text(encoding="utf-8"))))


def parts_imported_by(path: Path) -> set[str]:
    names = {part.stem for part in PARTS}
    found = {name.split(".")[1] for name in imported_by(path) if name.startswith("balancer.")}
    return found & names


def module_rows() -> list[list[str]]:
    """The rows of the table of modules in docs/architecture.md, each a list of stems."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text.partition("\n## Modules\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return [re.findall(r"`(?:balancer/)?(\w+)\.py`", row) for row in rows]


def test_the_table_of_modules_names_each_once() -> None:
    named = [stem for row in module_rows() for stem in row]
    assert sorted(named) == sorted({"load_balancer", *(part.stem for part in PARTS)} - {"__init__"})


def test_imports_point_down_the_table_of_modules() -> None:
    row_of = {stem: number for number, row in enumerate(module_rows()) for stem in row}
    upward = [
        f"{part.stem} -> {other}"
        for part in [ROOT / "load_balancer.py", *PARTS]
        for other in parts_imported_by(part)
        if row_of[other] < row_of[part.stem]
    ]
    assert upward == []


def test_imports_point_down_one_way_with_no_cycle() -> None:
    graph = {part.stem: parts_imported_by(part) for part in PARTS}
    assert set(TopologicalSorter(graph).static_order()) == set(graph)  # raises CycleError


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("errors", {"texts"}),
        ("texts", set()),
        ("tables", set()),
        ("messages", {"errors", "tables"}),
        ("answer", {"errors", "messages"}),
        ("workers", set()),
        ("statistics", {"exchange", "histogram", "tally", "totals"}),
        ("origin", {"errors"}),
        ("ejection", set()),
        ("exchange", set()),
        ("histogram", set()),
        ("events", {"texts"}),
        ("tally", set()),
        ("totals", {"errors", "exchange", "histogram", "messages"}),
        ("waiting", set()),
        ("backends", {"ejection", "errors", "origin", "tally"}),
        ("news", set()),
        ("candidates", {"backends", "news"}),
        ("judge", {"backends", "ejection", "news"}),
        ("roster", {"backends", "errors", "news", "tally"}),
        ("strategies", {"backends", "errors"}),
        ("environment", {"errors"}),
        ("wording", {"backends"}),
        ("settings", {"backends", "ejection", "environment", "errors", "messages", "origin", "wording"}),
    ],
)
def test_the_lowest_parts_know_little(name: str, allowed: set[str]) -> None:
    assert parts_imported_by(ROOT / "balancer" / f"{name}.py") <= allowed


@pytest.mark.parametrize(
    "name",
    [
        *("ejection", "waiting", "backends", "candidates", "judge", "news", "roster", "pool", "strategies"),
        *("statistics", "messages", "transport", "health", "proxy", "forwarding", "attempts", "answer"),
    ],
)
def test_the_data_path_knows_neither_flask_nor_the_server_nor_the_settings(name: str) -> None:
    roots = {module.split(".")[0] for module in imported_by(ROOT / "balancer" / f"{name}.py")}
    assert not roots & {"flask", "granian", "pydantic"}
    assert not parts_imported_by(ROOT / "balancer" / f"{name}.py") & {"settings", "api", "control", "server"}


def test_nothing_imports_load_balancer() -> None:
    for path in [*PARTS, *PROGRAMS]:
        assert not any(name.split(".")[0] == "load_balancer" for name in imported_by(path)), path.name


@pytest.mark.parametrize(
    ("program", "package", "parts", "more"),
    [("test_client", "loadtest", LOADTEST, set()), ("start_all", "demo", DEMO, {"balancer.__version__"})],
    ids=["test_client", "start_all"],
)
def test_what_runs_before_anything_is_installed_needs_the_standard_library_alone(
    program: str, package: str, parts: list[Path], more: set[str]
) -> None:
    graph = {path.stem: imported_by(path) - more for path in [*parts, ROOT / f"{program}.py"]}
    roots = {name.split(".")[0] for names in graph.values() for name in names}
    assert roots <= set(sys.stdlib_module_names) | {package}
    stems = {path.stem for path in parts}
    inner = {
        stem: {name.split(".")[1] for name in names if name.startswith(f"{package}.")} & stems
        for stem, names in graph.items()
    }
    assert list(TopologicalSorter(inner).static_order())[-1] == program  # raises CycleError


@pytest.mark.parametrize("path", [*PARTS, *LOADTEST, *DEMO, *PROGRAMS], ids=lambda path: path.name)
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def required(name: str) -> set[str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = (re.match(r"[A-Za-z0-9._-]+", line) for line in lines if not line.startswith(("#", "-")))
    return {re.sub(r"[-_.]+", "-", match.group()).lower() for match in found if match}


@pytest.mark.parametrize("path", [*PARTS, ROOT / "load_balancer.py", ROOT / "backend_server.py"], ids=lambda p: p.name)
def test_requirements_cover_what_is_imported(path: Path) -> None:
    owners = packages_distributions()
    foreign = {name.split(".")[0] for name in imported_by(path)} - set(sys.stdlib_module_names) - {"balancer"}
    for module in foreign:
        distributions = {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners.get(module, [module])}
        # Werkzeug and the like come with Flask, which pins what it works with.
        assert distributions & (required("requirements.txt") | {"werkzeug"}), f"{path.name} imports {module}"
