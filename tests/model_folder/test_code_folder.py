from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from dreambooth.errors import UserError
from dreambooth.model_folder import code_folder

ROOT = Path(__file__).parents[2]
DISTRIBUTIONS = {"PIL": "pillow", "huggingface_hub": "huggingface-hub"}
# Imported by diffusers for one of the noise schedulers.
BEHIND_THE_SCENES = {"scipy"}


def write(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for folder in {path.parent for path in root.rglob("*.py")} - {root}:
        (folder / "__init__.py").touch()
    return root


def test_imports_are_followed_from_the_entry_point_on(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        inference="from dreambooth.a import b\nimport torch",
        dreambooth__a__b="def late():\n    import dreambooth.c.d\n",
        dreambooth__a__unused="import dreambooth.e",
        dreambooth__c__d="from dreambooth.c.d import NAME\nfrom dreambooth import f",
        dreambooth__e="",
        dreambooth__f="from __future__ import annotations",
        torch="raise SystemExit",
    )
    assert [str(path) for path in code_folder.sources(root)] == [
        *("dreambooth/__init__.py", "dreambooth/a/__init__.py", "dreambooth/a/b.py"),
        *("dreambooth/c/__init__.py", "dreambooth/c/d.py", "dreambooth/f.py", "inference.py"),
    ]


def test_a_missing_entry_point_is_reported(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=re.escape(f"no inference.py beside the package in {tmp_path}")
    ):
        code_folder.sources(tmp_path)


def test_serving_needs_no_training() -> None:
    names = [path.as_posix() for path in code_folder.sources()]
    assert "dreambooth/serving/engine/engine.py" in names
    foreign = ("dreambooth/training", "dreambooth/data", "dreambooth/report", "dreambooth/job")
    assert [name for name in names if name.startswith((*foreign, "dreambooth/__main__"))] == []
    assert [name for name in names if name.endswith("serving/server.py")] == []


def test_requirements_name_exactly_what_is_imported() -> None:
    needed = set(BEHIND_THE_SCENES)
    for path in code_folder.sources():
        for name in code_folder.imports(ROOT / path):
            top = name.partition(".")[0]
            if top != "dreambooth" and top not in sys.stdlib_module_names:
                needed.add(DISTRIBUTIONS.get(top, top))
    lines = code_folder.REQUIREMENTS.splitlines()
    assert {re.split("[<>=]", line)[0] for line in lines} == needed


def test_requirements_allow_the_versions_of_the_image() -> None:
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "requirements.txt").read_text(), re.M))
    for line in code_folder.REQUIREMENTS.splitlines():
        name, _, least = line.partition(">=")
        assert version(pinned[name]) >= version(least), line


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part)
