"""The rules of the house, proven: who may import whom, what loads which library, how things are called."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.making.warm.python import run_python

ROOT = Path(__file__).resolve().parents[2]
CORE_MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "tasks/core").rglob("*.py")
)
LIGHT_PACKAGES = (
    "tasks.core.config",
    "tasks.core.runs",
    "tasks.core.metrics",
    "tasks.core.evaluation",
    "tasks.core.report",
)
LIGHT_MODULES = (
    "tasks.core.errors",
    "tasks.core.records",
    "tasks.core.files",
)
ROOMS = (
    "config", "storage", "data", "prompts", "memory", "models", "runs", "training", "generation", "metrics",
    "evaluation", "report", "promotion",
)  # fmt: skip
MOST_FILES_OF_A_FOLDER = 17
HEAVY_LIBRARIES = ("torch", "transformers", "datasets", "peft")
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "misc", "common", "manager", "managers", "stuff"}


def loaded_by(modules: list[str], libraries: tuple[str, ...]) -> str:
    """Import modules one by one in a process of their own; tell the first that loads one of the libraries.

    For Prefect it is one that has the others loaded, for others it is a fresh interpreter.
    """
    script = f"""
import importlib, sys
for module in {modules!r}:
    importlib.import_module(module)
    loaded = [name for name in {libraries!r} if name in sys.modules]
    if loaded:
        print(module, "loads", ", ".join(loaded))
        break
"""
    if libraries == ("prefect",):
        done = run_python(["-c", script], cwd=ROOT)
    else:
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@functools.cache
def imports(path: Path) -> set[str]:
    """All modules that a file imports, anywhere in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    plain = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    return plain | {
        node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module
    }


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def tracked_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for line in listed.stdout.splitlines() if (path := ROOT / line).is_file()]


def test_importing_any_core_module_loads_no_prefect() -> None:
    assert loaded_by(CORE_MODULES, ("prefect",)) == ""


def test_config_records_ledger_and_evaluation_load_no_model_library() -> None:
    light = [name for name in CORE_MODULES if name.startswith(LIGHT_PACKAGES) or name in LIGHT_MODULES]
    assert set(LIGHT_MODULES) <= set(light)
    assert loaded_by(light, HEAVY_LIBRARIES) == ""


def test_importing_the_flows_loads_no_model_library_so_that_deploying_is_quick() -> None:
    of_reports_and_servers = (
        "scipy",
        "pandas",
        "pyarrow",
        "jinja2",
        "openai",
        "fastapi",
        "sqlalchemy",
        "uvicorn",
    )
    assert loaded_by(["flows.pipeline"], (*HEAVY_LIBRARIES, *of_reports_and_servers)) == ""


def test_the_library_doors_load_no_prefect() -> None:
    assert loaded_by(["tasks.inferencer", "tasks.finetuner", "tasks.evaluator"], ("prefect",)) == ""


def test_the_core_imports_neither_prefect_nor_what_is_built_on_it() -> None:
    def outside(name: str) -> bool:
        own = name.split(".")[0] == "tasks" and name != "tasks"
        return name.split(".")[0] in ("prefect", "flows") or (own and not name.startswith("tasks.core"))

    assert not [
        (path.name, name) for path in sources("tasks/core") for name in imports(path) if outside(name)
    ]


def test_tasks_import_no_flow() -> None:
    assert not [path for path in sources("tasks") if any(n.split(".")[0] == "flows" for n in imports(path))]


@pytest.mark.parametrize("package", ["flows", "tasks"])
def test_the_two_generic_packages_stay_empty_at_their_top(package: str) -> None:
    assert (ROOT / package / "__init__.py").read_text() == ""


def test_no_module_has_a_name_that_says_nothing() -> None:
    names = {path for folder in ("flows", "tasks", "tests", "bench") for path in sources(folder)}
    assert not [path for path in names if path.stem in VAGUE_NAMES or path.parent.name in VAGUE_NAMES]


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    # Written in pieces, so that this file does not find itself.
    starts = ["home/[a-z]", "root/", "work/", "Users/[A-Za-z]"]
    places = re.compile("|".join([*("/" + start for start in starts), "[A-Z]:" + "[\\\\/][A-Za-z]"]))
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in places.finditer(text)]
    assert not found


@functools.cache
def module_graph() -> dict[str, set[str]]:
    """Our modules and which of ours each imports, at its top, inside functions or for types only."""
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in sources("flows") + sources("tasks")
    }
    paths = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    graph: dict[str, set[str]] = {}
    for name, path in paths.items():
        found: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= (inner & paths.keys()) or {node.module}
        graph[name] = (found & paths.keys()) - {name}
    return graph


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[2] if parts[:2] == ["tasks", "core"] and len(parts) > 2 and parts[2] in ROOMS else None


def test_each_room_imports_only_rooms_that_stand_before_it() -> None:
    wrong = [
        f"{module} -> {imported}"
        for module, found in module_graph().items()
        for imported in found
        if (room := room_of(module))
        and (other := room_of(imported))
        and ROOMS.index(room) < ROOMS.index(other)
    ]
    assert not wrong


def test_what_all_rooms_share_imports_no_room() -> None:
    shared = {name for name in module_graph() if name.startswith("tasks.core.") and room_of(name) is None}
    assert not [
        (module, imported) for module, found in module_graph().items() for imported in found
        if module in shared and room_of(imported)
    ]  # fmt: skip


def test_no_modules_import_each_other_in_a_circle() -> None:
    TopologicalSorter(module_graph()).prepare()  # raises CycleError, which names them


def test_each_room_says_what_goes_in_and_out_and_names_files_that_are_there() -> None:
    for room in (path for path in (ROOT / "tasks/core").rglob("*") if (path / "__init__.py").is_file()):
        told = ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8")))
        assert told, room
        missing = [name for name in re.findall(r"`([a-z_]+\.py)`", told) if not (room / name).is_file()]
        assert not missing, (room, missing)


def test_no_folder_holds_more_files_than_one_sees_at_once() -> None:
    folders = {path.parent for folder in ("flows", "tasks", "tests") for path in sources(folder)}
    assert not [(path, n) for path in folders if (n := len(list(path.glob("*.py")))) > MOST_FILES_OF_A_FOLDER]
