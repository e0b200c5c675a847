"""README and CHANGELOG agree with the code."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

import dreambooth
from benchmarks import __main__ as benchmarks_cli
from dreambooth import __main__ as cli
from dreambooth.settings import container, hyperparameter_text
from dreambooth.settings.hyperparameters import Hyperparameters, normalised
from tiny_world import __main__ as tiny_world_cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def between(mark: str) -> str:
    found = re.search(rf"<!-- {mark} -->\n(.*?)<!-- /{mark} -->", README, re.DOTALL)
    assert found, mark
    return found[1]


def test_the_readmes_table_is_the_printed_one() -> None:
    assert between("hyperparameters").strip() == hyperparameter_text.as_markdown().strip()


def test_the_changelog_begins_with_this_version() -> None:
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == dreambooth.__version__


def commands() -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    inline = [
        shlex.split(code)
        for code in re.findall(r"`(python -m (?:dreambooth|benchmarks|tiny_world) [^`]+)`", README)
        if "..." not in code and "|" not in code
    ]
    others = ("curl", "docker", "-d")  # test_readme.py and tests/container run these
    words_of = [words for words in (*lines, *inline) if words]
    return [words for words in words_of if words[0] not in others and "=" not in words[0]]


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words)[:60])
def test_every_command_of_the_readme_parses(words: list[str]) -> None:
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
        return
    if words[:2] == ["python", "transfer_learning.py"]:
        environment = container.read(words[2:], {})
        known = {field.name for field in fields(Hyperparameters)}
        assert {normalised(name) for name in environment.settings} <= known
        return
    assert words[:2] == ["python", "-m"]
    if words[2] == "tiny_world":
        assert words[3] in tiny_world_cli.NAMES
        return
    parser = {"dreambooth": cli.parser, "benchmarks": benchmarks_cli.parser}[words[2]]()
    parser.parse_args(words[3:])


def test_docker_lines_of_the_readme_run_verbs_of_the_image() -> None:
    lines = re.findall(r"^docker run .*$", README, re.MULTILINE)
    assert len(lines) >= 2
    for line in lines:
        *_, image, verb = shlex.split(line)
        assert (image, verb in ("train", "serve")) == ("dreambooth", True), line


def test_python_blocks_of_the_readme_are_python() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 5
    for block in blocks:
        compile(block, "README.md", "exec")


def test_the_file_map_is_the_tree() -> None:
    found = re.search(r"## Where things are\n\n```\n(.*?)```", README, re.DOTALL)
    assert found
    drawn = set()
    parents = ["", "", ""]
    for line in found[1].splitlines():
        bars, names = re.match(r"((?:[│├└─]+ *)*)((?:[\w.]+/?(?:, )?)+)", line).groups()  # type: ignore[union-attr]
        depth = len(bars) // 4
        for name in names.split(", "):
            assert (ROOT / parents[depth] / name).exists(), line
            drawn.add(f"{parents[depth]}{name}".rstrip("/"))
            if name.endswith("/"):
                parents[depth + 1 :] = [f"{parents[depth]}{name}", ""]
    package = ROOT / "dreambooth"
    rooms = {path.parent for path in package.rglob("__init__.py")}
    loose = {path for path in package.glob("*.py") if path.name != "__init__.py"}
    assert {str(path.relative_to(ROOT)) for path in rooms | loose} <= drawn


def test_the_reading_routes_name_files() -> None:
    route = README.partition("To read how it works")[2].partition("\n\n")[0]
    names = re.findall(r"`([\w/.]+)`", route)
    assert len(names) > 10
    assert [name for name in names if not (ROOT / name).is_file()] == []


def test_requirements_are_pinned_with_their_reason() -> None:
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            assert re.fullmatch(r"[a-z0-9-]+==[\w.]+ +# .+", line), line


def test_the_package_names_no_machine_of_ours() -> None:
    for path in [*ROOT.glob("*.md"), *(ROOT / "dreambooth").rglob("*.py")]:
        assert not re.search(r"(?<![\w.])/(work|root|home)/", path.read_text()), path
