"""The house's floors, read from the source: imports point down, siblings stay apart, no cycles."""

from __future__ import annotations

import ast
import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dreambooth"

# The floor of each module, by its longest matching prefix; 0 is the ground.
FLOORS = {
    "dreambooth": 0,
    "dreambooth.errors": 0,
    "dreambooth.addresses": 0,
    "dreambooth.limits": 0,
    "dreambooth.archives": 0,
    "dreambooth.tar_stream": 0,
    "dreambooth.progress": 0,
    "dreambooth.logs": 0,
    "dreambooth.durable": 0,
    "dreambooth.stop": 0,
    "dreambooth.workspace": 0,
    "dreambooth.sources": 0,
    "dreambooth.knob": 0,
    "dreambooth.hyperparameters": 0,
    "dreambooth.hyperparameter_text": 0,
    "dreambooth.container": 0,
    "dreambooth.report": 0,
    "dreambooth.report.charts": 0,
    "dreambooth.report.timings": 0,
    "dreambooth.report.html": 0,
    "dreambooth.failure": 0,
    "dreambooth.gpu_driver": 0,
    "dreambooth.code_folder": 0,
    "dreambooth.tiny": 0,
    "dreambooth.data": 1,
    "dreambooth.diffusion": 1,
    "dreambooth.contact_sheet": 1,
    "dreambooth.training": 2,
    "dreambooth.serving": 2,
    "dreambooth.export": 2,
    "dreambooth.model_card": 2,
    "dreambooth.report.record": 2,
    "dreambooth.report.pictures": 2,
    "dreambooth.report.page": 2,
    "dreambooth.job": 3,
    "dreambooth.pack": 3,
    "dreambooth.outputs": 3,
    "dreambooth.previews": 3,
    "dreambooth.fid": 3,
    "dreambooth.tiny.judge_network": 1,
    "dreambooth.evaluation": 2,
    "dreambooth.task": 3,
    "dreambooth.class_sampling": 3,
    "dreambooth.encoding": 3,
    "dreambooth.checkpoints": 3,
    "dreambooth.handover": 3,
    "dreambooth.fine_tune": 3,
    "dreambooth.recorder": 3,
    "dreambooth.generate": 3,
    "dreambooth.generate_options": 3,
    "dreambooth.demo": 4,
    "dreambooth.__main__": 4,
    "dreambooth.benchmarks": 4,
}
TINY_LEAVES_FLOOR = 4  # everything of dreambooth.tiny but its __init__
STDLIB_ONLY_FILES = {  # above the ground, but read by the plan before anything heavy is loaded
    "dreambooth.diffusion.source",
    "dreambooth.diffusion.facts",
    "dreambooth.diffusion.layout",
    "dreambooth.diffusion.headers",
    "dreambooth.diffusion.sampling_request",
    "dreambooth.training.plan",
    "dreambooth.training.device",
    "dreambooth.training.memory",
    "dreambooth.training.expected_memory",
    "dreambooth.training.plan_warnings",
    "dreambooth.training.disk",
    "dreambooth.training.lr_schedulers",
    "dreambooth.evaluation.vision_model",
    "dreambooth.serving.strict_json",
    "dreambooth.serving.request",
}
SIBLINGS = [
    ("dreambooth.data", "dreambooth.diffusion"),
    ("dreambooth.training", "dreambooth.export"),
    ("dreambooth.serving", "dreambooth.training"),
    ("dreambooth.serving", "dreambooth.export"),
    ("dreambooth.serving", "dreambooth.data"),
]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def test_every_module_has_a_floor() -> None:
    packages = ("dreambooth.data.", "dreambooth.diffusion.", "dreambooth.training.")
    packages += ("dreambooth.evaluation.", "dreambooth.tiny.", "dreambooth.benchmarks.")
    packages += ("dreambooth.serving.",)
    assert not [m for m in MODULES if m not in FLOORS and not f"{m}.".startswith(packages)]


def floor(module: str) -> int:
    if module.startswith("dreambooth.tiny.") and module not in FLOORS:
        return TINY_LEAVES_FLOOR
    while module not in FLOORS:
        module = module.rpartition(".")[0]
    return FLOORS[module]


def parsed(path: Path) -> ast.Module:
    # Python 3.11 miscounts its depth where the collector runs others' code while a tree is built.
    gc.disable()
    try:
        return ast.parse(path.read_text("utf-8"))
    finally:
        gc.enable()


def imports(path: Path, *, top_level: bool = False) -> Iterator[str]:
    """The modules that a file imports; those under TYPE_CHECKING count, as edges for a reader."""
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


def edges() -> Iterator[tuple[str, str]]:
    for module, path in MODULES.items():
        for imported in imports(path):
            if imported in MODULES and imported != module:
                yield module, imported


def test_imports_point_down() -> None:
    upward = [(a, b) for a, b in edges() if floor(b) > floor(a)]
    assert upward == []


def test_siblings_stay_apart() -> None:
    for left, right in SIBLINGS:
        for a, b in edges():
            pair = {a.startswith(left) and "l", b.startswith(right) and "r"}
            assert pair != {"l", "r"}, (a, b)
            pair = {a.startswith(right) and "l", b.startswith(left) and "r"}
            assert pair != {"l", "r"}, (a, b)


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


def test_the_ground_and_the_plan_need_the_standard_library_alone() -> None:
    for module, path in MODULES.items():
        if floor(module) == 0 or module in STDLIB_ONLY_FILES:
            for imported in imports(path, top_level=True):
                top = imported.partition(".")[0]
                assert top == "dreambooth" or top in sys.stdlib_module_names, (module, imported)


@pytest.mark.parametrize("module", ["dreambooth", "dreambooth.job", "dreambooth.__main__"])
def test_importing_the_entry_points_loads_nothing_heavy(module: str) -> None:
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


def test_files_have_one_job_and_say_it() -> None:
    for module, path in MODULES.items():
        tree = parsed(path)
        assert ast.get_docstring(tree), f"{module} has no docstring"
        assert len(path.read_text().splitlines()) <= 400, f"{module} is too long for one job"
