"""The rooms: who may import whom, and that everything imported is required."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from support import ROOT

PARTS = sorted(path for path in (ROOT / "balancer").rglob("*.py") if path.stem != "__init__")
ROOMS = sorted(path for path in (ROOT / "balancer").rglob("__init__.py"))
LOADTEST = sorted((ROOT / "loadtest").glob("*.py"))
DEMO = sorted((ROOT / "demo").glob("*.py"))
PROGRAMS = [ROOT / name for name in ("load_balancer.py", "backend_server.py", "start_all.py", "test_client.py")]
MOST_IN_THE_ROOT = 9
# What a request passes through, or is told of: it works without a web framework, a server of ours or settings.
DATA_PATH = ("protocol", "balancing", "upstream", "observe", "forwarding", "filters")


def imports(node: ast.AST) -> Iterator[str]:
    """Everything imported, also inside functions and for type checkers only: a reader has to know it all the same."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert not child.level, "relative import"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)


def imported_by(path: Path) -> set[str]:
    return set(imports(ast.parse(path.read_text(encoding="utf-8"))))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {module_of(path): path for path in PARTS}


def parts_imported_by(path: Path) -> set[str]:
    """Modules of the package, by their whole name."""
    names = imported_by(path)
    return {module for module in MODULES for name in names if name == module or name.rpartition(".")[0] == module}


def room_of(module: str) -> str:
    """`balancer` for the root."""
    return module.split(".")[-2]


def table_of_rooms() -> dict[str, tuple[set[str], set[str]]]:
    """Of docs/architecture.md: by room, its modules and the rooms it may import."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text.partition("\n## Rooms\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| `")]
    named = [[set(re.findall(r"`(\w+)/?`", cell)) for cell in row] for row in rows]
    return {room.pop(): (modules, allowed) for room, _, modules, allowed in named}


def test_the_table_of_rooms_names_each_module_once_where_it_is() -> None:
    table = table_of_rooms()
    found: dict[str, set[str]] = {}
    for module in MODULES:
        found.setdefault(room_of(module), set()).add(module.rpartition(".")[2])
    assert {room: modules for room, (modules, _) in table.items()} == found


def test_a_room_imports_only_what_the_table_allows() -> None:
    table = table_of_rooms()
    forbidden = [
        f"{module} -> {other}"
        for module, path in MODULES.items()
        for other in parts_imported_by(path)
        if room_of(module) != "balancer"
        and other != "balancer.errors"
        and room_of(other) not in {room_of(module), "protocol"} | table[room_of(module)][1]
    ]
    assert forbidden == []


def test_no_room_needs_itself_by_way_of_others() -> None:
    graph = {room: allowed - {room} for room, (_, allowed) in table_of_rooms().items()}
    assert set(TopologicalSorter(graph).static_order()) == set(graph)  # raises CycleError


def test_no_module_needs_itself_by_way_of_others() -> None:
    graph = {module: parts_imported_by(path) - {module} for module, path in MODULES.items()}
    assert set(TopologicalSorter(graph).static_order()) == set(graph)  # raises CycleError


def test_the_root_stays_small() -> None:
    assert len(list((ROOT / "balancer").glob("*.py"))) <= MOST_IN_THE_ROOT


@pytest.mark.parametrize("module", [module for module in MODULES if room_of(module) in DATA_PATH])
def test_the_data_path_knows_neither_flask_nor_granian_nor_the_settings(module: str) -> None:
    assert not {name.split(".")[0] for name in imported_by(MODULES[module])} & {"flask", "granian", "pydantic"}


def test_nothing_imports_load_balancer() -> None:
    for path in [*PARTS, *PROGRAMS]:
        assert not any(name.split(".")[0] == "load_balancer" for name in imported_by(path)), path.name


@pytest.mark.parametrize(
    ("program", "package", "parts", "more"),
    [("test_client", "loadtest", LOADTEST, []), ("start_all", "demo", DEMO, ["protocol/texts", "edge/startup"])],
    ids=["test_client", "start_all"],
)
def test_what_runs_before_anything_is_installed_needs_the_standard_library_alone(
    program: str, package: str, parts: list[Path], more: list[str]
) -> None:
    """`more` are parts of the balancer that need no more than that either; its face imports only what is asked for."""
    borrowed = {ROOT / "balancer" / f"{name}.py" for name in more}
    found = {module for module, path in MODULES.items() if path in borrowed} | {"balancer"}
    graph = {path.stem: imported_by(path) for path in [*parts, ROOT / f"{program}.py"]}
    graph = {stem: {name for name in names if name.rpartition(".")[0] not in found} for stem, names in graph.items()}
    roots = {name.split(".")[0] for names in [*graph.values(), *map(imported_by, borrowed)] for name in names}
    assert roots <= set(sys.stdlib_module_names) | {package}
    stems = {path.stem for path in parts}
    inner = {
        stem: {name.split(".")[1] for name in names if name.startswith(f"{package}.")} & stems
        for stem, names in graph.items()
    }
    assert list(TopologicalSorter(inner).static_order())[-1] == program  # raises CycleError


@pytest.mark.parametrize(
    "path", [*PARTS, *ROOMS, *LOADTEST, *DEMO, *PROGRAMS], ids=lambda path: str(path.relative_to(ROOT))
)
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def required(name: str) -> set[str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = (re.match(r"[A-Za-z0-9._-]+", line) for line in lines if not line.startswith(("#", "-")))
    return {re.sub(r"[-_.]+", "-", match.group()).lower() for match in found if match}


def extras() -> set[str]:
    """Imported once they are needed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [line for extra in project["optional-dependencies"].values() for line in extra]
    return {re.split(r"[<>=]", line)[0] for line in lines}


@pytest.mark.parametrize(
    "path",
    [*PARTS, ROOT / "load_balancer.py", ROOT / "backend_server.py"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_requirements_cover_what_is_imported(path: Path) -> None:
    owners = packages_distributions()
    foreign = {name.split(".")[0] for name in imported_by(path)} - set(sys.stdlib_module_names)
    foreign -= {"balancer", "_typeshed"}  # the latter is for type checkers alone
    foreign -= {"pytest"} if path.stem == "testing" else set()  # which loads it
    for module in foreign:
        distributions = {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners.get(module, [module])}
        # Werkzeug and the like come with Flask, which pins what it works with.
        known = required("requirements.txt") | extras() | {"werkzeug"}
        assert distributions & known, f"{path.name} imports {module}"
