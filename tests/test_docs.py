"""README and CHANGELOG say what the code does."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

import dreambooth
from dreambooth import __main__ as cli
from dreambooth import container, hyperparameter_text
from dreambooth.hyperparameters import Hyperparameters, normalised

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
        for code in re.findall(r"`(python -m dreambooth [^`]+)`", README)
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
    assert words[:3] == ["python", "-m", "dreambooth"]
    cli.parser().parse_args(words[3:])


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


def test_the_file_map_names_every_top_level_module() -> None:
    for path in (ROOT / "dreambooth").iterdir():
        if path.name.startswith("__") or path.name == "benchmarks":
            continue
        assert path.name in README, path.name


@pytest.mark.parametrize(
    "package", ["data", "diffusion", "evaluation", "report", "serving", "training"]
)
def test_the_file_map_names_every_module_of(package: str) -> None:
    found = re.search(rf"^├── {package}/(.*?)^├── ", README, re.DOTALL | re.MULTILINE)
    assert found
    named = set(re.findall(r"\w+", found[1]))
    modules = {path.stem for path in (ROOT / "dreambooth" / package).glob("*.py")} - {"__init__"}
    assert modules <= named, modules - named


def test_requirements_are_pinned_with_their_reason() -> None:
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            assert re.fullmatch(r"[a-z0-9-]+==[\w.]+ +# .+", line), line


def test_the_package_names_no_machine_of_ours() -> None:
    for path in [*ROOT.glob("*.md"), *(ROOT / "dreambooth").rglob("*.py")]:
        assert not re.search(r"(?<![\w.])/(work|root|home)/", path.read_text()), path
