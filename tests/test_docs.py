"""README, docs/*.md, benchmarks/LOG.md and CHANGELOG agree with the code."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import dreambooth
from benchmarks import __main__ as benchmarks_cli
from dreambooth import __main__ as cli
from dreambooth.data import prompts
from dreambooth.settings import container, hyperparameter_text
from dreambooth.settings.command_line import Parser
from dreambooth.settings.hyperparameters import Hyperparameters, normalised
from tests.documents import BLOCKS, DOCUMENTS, README, ROOT, blocks, shell_lines
from tiny_world import __main__ as tiny_world_cli

ALL = "\n".join(DOCUMENTS.values())
ONE_LINE = re.sub(r"\s+", " ", ALL)  # commands within sentences may be wrapped
MAKEFILE = (ROOT / "Makefile").read_text()
FIGURES = ("docs/measurements.md", "benchmarks/LOG.md")


def test_the_readme_is_read_in_ten_minutes() -> None:
    assert len(README.split()) <= 3_000


def test_the_documents_are_these_and_each_begins_with_whom_it_is_for() -> None:
    names = ("hyperparameters", "measurements", "sagemaker", "serving", "training")
    assert list(DOCUMENTS) == ["README.md", *(f"docs/{name}.md" for name in names), FIGURES[1]]
    for name, text in DOCUMENTS.items():
        if name != "README.md":
            assert re.match(r"# .+\n\nFor who", text), name
            assert f"[{name}]({name})" in README


def test_the_readmes_picture_is_small() -> None:
    (name,) = re.findall(r"!\[[^]]+\]\((\S+)\)", README)
    assert (ROOT / name).stat().st_size <= 200_000
    with Image.open(ROOT / name) as picture:
        assert picture.format == "PNG"
    assert f".save('{name}'" in MAKEFILE


def anchors(text: str) -> set[str]:
    """Return what GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def links() -> list[tuple[str, str]]:
    return [
        (name, target)
        for name, text in DOCUMENTS.items()
        for target in re.findall(r"\]\(([^)\s]+)\)", text)
        if not target.startswith("https://")
    ]


@pytest.mark.parametrize(("name", "target"), links())
def test_a_relative_link_leads_to_a_file_and_a_heading(name: str, target: str) -> None:
    path, _, anchor = target.partition("#")
    place = (ROOT / name).parent / path if path else ROOT / name
    assert place.is_file()
    if anchor:
        assert anchor in anchors(place.read_text("utf-8"))


def test_figures_carry_a_date_and_a_command_and_stand_in_one_place() -> None:
    for name, text in DOCUMENTS.items():
        if name not in FIGURES:
            assert not re.search(r"\b20\d\d-\d\d-\d\d\b", text), name
    sections = re.split(r"^##+ ", DOCUMENTS[FIGURES[0]], flags=re.MULTILINE)[1:]
    assert len(sections) > 12
    for section in sections:
        title, _, body = section.partition("\n")
        if title != "The embedded model":  # its figures stand in subsections
            assert re.search(r"\b20\d\d-\d\d-\d\d\b", body), title
            assert re.search(r"`[^`]*\b(python -m|make)\s", body), title


def test_the_table_of_hyperparameters_is_the_printed_one() -> None:
    mark = "hyperparameters"
    found = re.search(rf"<!-- {mark} -->\n(.*?)<!-- /{mark} -->", ALL, re.DOTALL)
    assert found
    assert found[1].strip() == hyperparameter_text.as_markdown().strip()
    assert found[1] in DOCUMENTS["docs/hyperparameters.md"]


def test_the_changelog_begins_with_this_version() -> None:
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == dreambooth.__version__


def targets() -> list[str]:
    """Return the targets that `make` prints; a test runs it."""
    return re.findall(r"^([\w-]+):.* ## ", MAKEFILE, re.MULTILINE)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_prints_its_targets_and_the_readme_repeats_them() -> None:
    command = ["make", "--no-print-directory"]  # `make test` would have it printed
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert [line.split()[1] for line in done.stdout.splitlines()] == targets()
    assert done.stdout in blocks("")
    (phony,) = re.findall(r"^\.PHONY: (.+)$", MAKEFILE, re.MULTILINE)
    assert sorted(phony.split()) == sorted(["help", *targets()])


def test_the_projects_check_makes_what_the_readme_says() -> None:
    script = (ROOT / ".ci/run").read_text()
    made = re.findall(r"^ *make ([\w-]+)", script, re.MULTILINE)
    (sentence,) = re.findall(r"`\.ci/run`, makes ([^.]+)\.", README)
    assert made == re.findall(r"`([\w-]+)`", sentence)
    assert set(made) <= set(targets())
    assert not re.search(r"pytest|ruff|mypy", script)


def test_every_block_is_of_a_kind_that_a_test_runs_or_parses() -> None:
    assert {kind for kind, _ in BLOCKS} == {"sh", "shell", "python", ""}
    assert 2 * len(BLOCKS) == ALL.count("```")
    # What `make` prints, two training folders and the file map: each has its test.
    assert len(blocks("")) == 4


def test_the_drawn_training_folders_have_a_valid_dataset_info(tmp_path: Path) -> None:
    drawn, several = [block for block in blocks("") if "dataset_info.json" in block]
    text = drawn.replace("│", " ")
    info, _ = json.JSONDecoder().raw_decode(text[text.index("{") :])
    assert set(info) == {"instance_prompt", "class_prompt"}
    assert Hyperparameters().class_data_dir in drawn
    (tmp_path / prompts.INFO_NAME).write_text(several[several.index("{") :])
    read = prompts.read(tmp_path, with_prior_preservation=True, inside="")
    assert [each.folder for each in read.subjects] == ["dog1", "dog2"]
    assert all(f"├── {each.folder}/" in several for each in read.subjects)


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_shell_blocks_are_shell() -> None:
    # The build line's <index ...> stands for an address.
    script = "\n".join([*blocks("sh"), *blocks("shell")]).replace("<index with a", "INDEX #")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def commands() -> list[list[str]]:
    inline = [
        shlex.split(code)
        for code in re.findall(
            r"`(python -m (?:dreambooth|benchmarks|tiny_world) [^`]+)`", ONE_LINE
        )
        if "..." not in code
    ]
    others = ("curl", "docker")  # test_readme.py and tests/container run these
    lines = [words for words in shell_lines() if words[0] not in others and "=" not in words[0]]
    return [*lines, *inline]


class Parsed(Exception):
    """Raised in place of what would follow the reading of a command line."""


def stop_after_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    parse = Parser.parse_known_args

    def parse_and_stop(self: Parser, *arguments: Any) -> None:
        _, unknown = parse(self, *arguments)
        assert not unknown
        raise Parsed

    monkeypatch.setattr(Parser, "parse_known_args", parse_and_stop)


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words)[:90])
def test_every_command_parses(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if words[0] == "make":
        assert words[1] in targets()
        return
    if "transfer_learning.py" in words:
        assert words[0] in ("python", "torchrun", "accelerate")
        environment = container.read(words[words.index("transfer_learning.py") + 1 :], {})
        known = {field.name for field in fields(Hyperparameters)}
        assert {normalised(name) for name in environment.settings} <= known
        return
    assert words[:2] == ["python", "-m"]
    if words[2] == "tiny_world":
        stop_after_parsing(monkeypatch)
        with pytest.raises(Parsed):
            tiny_world_cli.main(words[3:])
        return
    parser = {"dreambooth": cli.parser, "benchmarks": benchmarks_cli.parser}[words[2]]()
    if words[-1] == "--help":
        with pytest.raises(SystemExit, match=r"^0$"):
            parser.parse_args(words[3:])
        return
    parser.parse_args(words[3:])


def test_every_make_target_and_test_that_is_named_exists() -> None:
    assert set(re.findall(r"`make ([\w-]+)", ONE_LINE)) <= set(targets())
    named = re.findall(r"-m pytest ([^\s`]+)", ONE_LINE)
    assert len(named) >= 2
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_docker_lines_run_verbs_of_the_image() -> None:
    lines = [words for words in shell_lines() if words[:2] == ["docker", "run"]]
    assert len(lines) >= 2
    for words in lines:
        *_, image, verb = words
        assert (image, verb in ("train", "serve")) == ("dreambooth", True), words


def test_python_blocks_are_python() -> None:
    assert len(blocks("python")) >= 5
    for block in blocks("python"):
        compile(block, "a document", "exec")


def test_the_tuners_expression_reads_the_whole_score() -> None:
    (block,) = [block for block in blocks("python") if "HyperparameterTuner(" in block]
    published, better = re.findall(r'r"(fid_score=\S+)"', block)
    assert published == r"fid_score=([-+]?\d\.?\d*)"
    for score in ("0.031250", "9.500000", "12.750000", "123.456789"):
        assert re.findall(better, f"fid_score={score}\n") == [score]
    assert re.findall(published, "fid_score=12.750000\n") == ["12"]


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
    texts = [*ROOT.glob("*.md"), *(ROOT / name for name in DOCUMENTS)]
    for path in [*texts, *(ROOT / "dreambooth").rglob("*.py")]:
        assert not re.search(r"(?<![\w.])/(work|root|home)/", path.read_text()), path
