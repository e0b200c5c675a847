"""Subpackages ("rooms") may import only from rooms of lower layers ("floors").

This is read from the source. A new file needs no entry here: its room decides what it may import.
"""

from __future__ import annotations

import ast
import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("dreambooth", "benchmarks", "tiny_world")
ENTRY_POINTS = ("transfer_learning", "inference")
# Modules at the top of the package that count as rooms of their own.
ALONE = ("errors", "limits", "__main__")

# From the bottom up; a room may import rooms of the floors below its own.
FLOORS = (
    ("dreambooth", "errors", "limits"),
    ("process", "tiny"),
    ("data", "settings"),
    ("model_folder", "diffusion", "report", "runs"),
    ("training", "evaluation"),
    ("fast", "job", "serving.contract", "serving.engine", "serving.supervision", "serving.http"),
    ("commands", "studio", "__main__", *ENTRY_POINTS),
    ("benchmarks", "tiny_world"),
)
# The only imports allowed within a floor.
ALONG = {
    ("diffusion", "model_folder"),
    ("job", "fast"),
    ("serving.engine", "fast"),
    ("serving.engine", "serving.contract"),
    ("serving.supervision", "serving.contract"),
    ("serving.supervision", "serving.engine"),  # only in the child process, once it runs
    ("serving.http", "serving.supervision"),
    ("serving.http", "serving.contract"),
    ("__main__", "commands"),
    ("__main__", "studio"),
    ("transfer_learning", "commands"),
}
# Imports that point down but are forbidden all the same.
NEVER = [("serving", "training"), ("serving", "data"), ("serving", "evaluation")]
# Rooms that are imported wherever only a path, a setting or a plan is needed: their modules import
# no third-party package at the top, except where weights are read and written.
LIGHT_ROOMS = ("errors", "limits", "process", "settings", "model_folder", "runs")
LIGHT_PACKAGES = ("safetensors",)  # it imports in milliseconds, without torch
HEAVY_MODULES = {
    f"dreambooth.model_folder.{name}" for name in ("weights", "export", "single_file_export")
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path): path
    for place in (*(ROOT / package for package in PACKAGES),)
    for path in sorted(place.rglob("*.py"))
} | {name: ROOT / f"{name}.py" for name in ENTRY_POINTS}


def room(module: str) -> str:
    """Return a module's room: `dreambooth.job.run` gives `job`; serving has four rooms inside."""
    parts = module.split(".")
    if parts[0] != "dreambooth" or len(parts) == 1:
        return parts[0]
    if parts[1] == "serving" and len(parts) > 2:
        return ".".join(parts[1:3])
    return parts[1]


FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def parsed(path: Path) -> ast.Module:
    # Python 3.11 miscounts its recursion depth if the garbage collector runs other code while an
    # AST is built.
    gc.disable()
    try:
        return ast.parse(path.read_text("utf-8"))
    finally:
        gc.enable()


def imports(path: Path, *, top_level: bool = False) -> Iterator[str]:
    """Yield the modules that a file imports, including those under TYPE_CHECKING."""
    tree = parsed(path)
    nodes = tree.body if top_level else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def edges(*, top_level: bool = False) -> Iterator[tuple[str, str]]:
    for module, path in MODULES.items():
        for imported in imports(path, top_level=top_level):
            if imported in MODULES and imported != module:
                yield module, imported


def test_nothing_lies_loose_at_the_top_of_the_package() -> None:
    top = {path.stem for path in (ROOT / "dreambooth").glob("*.py")}
    assert top == {"__init__", *ALONE}
    made_here = {".git", ".venv", ".hypothesis", "out", "__pycache__"}
    entries = {path.name for path in ROOT.iterdir() if not path.name.endswith("_cache")}
    assert len(entries - made_here) <= 20


def test_every_module_lies_in_a_room_that_has_a_floor() -> None:
    empty = {"serving"}  # the package that holds the four rooms
    assert {room(module) for module in MODULES} - FLOOR_OF.keys() == empty
    assert len(FLOOR_OF) <= 26


def test_imports_point_down_or_along_a_known_arrow() -> None:
    wrong = [
        (a, b)
        for a, b in edges()
        if room(a) != room(b)
        and FLOOR_OF[room(a)] <= FLOOR_OF[room(b)]
        and (room(a), room(b)) not in ALONG
    ]
    assert wrong == []


def test_what_must_stay_apart_does() -> None:
    for upper, lower in NEVER:
        found = [(a, b) for a, b in edges() if room(a).startswith(upper) and room(b) == lower]
        assert found == []


def test_the_supervision_imports_the_engine_in_its_childs_functions_alone() -> None:
    arrow = ("serving.supervision", "serving.engine")
    assert {a for a, b in edges() if (room(a), room(b)) == arrow} == {
        "dreambooth.serving.supervision.child"
    }
    assert not [a for a, b in edges(top_level=True) if (room(a), room(b)) == arrow]


def test_there_are_no_cycles() -> None:
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for a, b in edges():
        graph[a].add(b)
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for imported in graph[module]:
                visit(imported, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_the_light_rooms_need_the_standard_library_alone() -> None:
    for module, path in MODULES.items():
        if room(module) in LIGHT_ROOMS and module not in HEAVY_MODULES:
            for imported in imports(path, top_level=True):
                top = imported.partition(".")[0]
                known = top in ("dreambooth", *LIGHT_PACKAGES) or top in sys.stdlib_module_names
                assert known, (module, imported)


@pytest.mark.parametrize(
    "module",
    [
        *("dreambooth", "dreambooth.job.run", "dreambooth.__main__", "transfer_learning"),
        *("dreambooth.serving.http.server", "dreambooth.serving.supervision.child"),
        *("dreambooth.training.plan", "dreambooth.runs.runner", "dreambooth.commands.runs"),
    ],
)
def test_importing_it_loads_nothing_heavy(module: str) -> None:
    code = (
        f"import sys, {module}; "
        "print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"


def test_no_drawer_modules() -> None:
    assert not [
        m for m in MODULES if m.rpartition(".")[2] in ("utils", "common", "helpers", "misc")
    ]


def test_every_file_says_what_it_is() -> None:
    for module, path in MODULES.items():
        assert ast.get_docstring(parsed(path)), f"{module} has no docstring"


def test_no_two_classes_and_no_two_modules_have_one_name() -> None:
    product = {name: path for name, path in MODULES.items() if name.startswith("dreambooth.")}
    classes = [
        node.name
        for path in product.values()
        for node in parsed(path).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    names = [path.stem for path in product.values() if path.stem != "__init__"]
    for found in (classes, names):
        assert sorted({name for name in found if found.count(name) > 1}) == []


def test_the_tests_mirror_the_rooms() -> None:
    # Kinds of tests that span several rooms.
    others = {"container", "examples", "gpu", "hostile", "slow_disk"}
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()}
    folders -= {"__pycache__", *others}
    assert folders <= {name.partition(".")[0] for name in FLOOR_OF} | {"serving"}


def test_no_two_classes_have_one_name() -> None:
    places: dict[str, list[str]] = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.ClassDef):
                    places.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
