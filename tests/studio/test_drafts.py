from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest

from dreambooth.errors import HyperparameterError, UserError
from dreambooth.runs import run_list
from dreambooth.runs.run_folder import Run, RunState
from dreambooth.runs.run_list import RunList
from dreambooth.settings.hyperparameters import parse
from dreambooth.studio import drafts, uploads
from dreambooth.tiny import DATA

PROMPTS = {"instance_prompt": " a photo of a riobugger cat ", "class_prompt": ""}


@pytest.fixture
def draft(tmp_path: Path) -> Run:
    run = RunList(tmp_path).new_draft({**PROMPTS, "settings": {"pretrained_model": "tiny"}})
    (run.folder / "pictures").mkdir()
    for path in (DATA / "cat").glob("*.png"):
        shutil.copy(path, run.folder / "pictures")
    return run


@pytest.mark.parametrize("name", drafts.PRESETS)
def test_a_preset_is_made_of_settings_that_a_job_takes(name: str) -> None:
    assert parse(drafts.PRESETS[name].settings).warnings == ()


def test_a_new_form_has_the_pages_model_or_tries_the_embedded_one() -> None:
    tried = drafts.contents_at_first(None)
    assert drafts.text_settings(tried)["pretrained_model"] == "tiny"
    assert drafts.side_of(tried) == 64
    given = drafts.contents_at_first("/models/sd")
    assert drafts.text_settings(given)["pretrained_model"] == "/models/sd"
    assert drafts.side_of(given) == 512


def test_a_preset_leaves_the_users_prompts_and_model() -> None:
    mine = {**PROMPTS, "settings": {"pretrained_model": "/sd", "batch_size": "4"}}
    face = drafts.with_preset(mine, "face")
    assert drafts.text(face, "instance_prompt") == PROMPTS["instance_prompt"]
    assert drafts.text_settings(face)["pretrained_model"] == "/sd"
    assert "batch_size" not in drafts.text_settings(face)
    back = drafts.with_preset(drafts.with_preset(mine, "minute"), "object")
    assert "pretrained_model" not in drafts.text_settings(back)


@pytest.mark.parametrize("contents", [{}, {"settings": []}, {"settings": {"x": "1", "seed": 3}}])
def test_a_strange_draft_is_an_empty_form(contents: dict[str, object]) -> None:
    assert drafts.text_settings(contents) == {}
    assert drafts.text({"instance_prompt": 3}, "instance_prompt") == ""
    assert drafts.side_of(contents) == 512


def test_the_hint_asks_for_a_rare_word() -> None:
    same = {"instance_prompt": "A photo of a cat", "class_prompt": "a photo of a cat "}
    assert "rare word" in drafts.prompt_hint(same)
    assert "Write what" in drafts.prompt_hint({})
    assert drafts.prompt_hint(PROMPTS) == ""


def test_a_draft_becomes_a_run_that_waits(draft: Run) -> None:
    settings = drafts.prepare(draft)
    run_list.submit(draft, settings)
    assert draft.state() == RunState.WAITING
    assert draft.settings() == settings
    info = (draft.folder / "pictures" / "dataset_info.json").read_text()
    assert json.loads(info) == {"instance_prompt": "a photo of a riobugger cat"}


def test_what_is_missing_or_wrong_is_said(draft: Run) -> None:
    draft.save_draft({"settings": {"pretrained_model": "tiny"}})
    with pytest.raises(UserError, match="instance prompt is missing"):
        drafts.prepare(draft)
    draft.save_draft({**PROMPTS, "settings": {"max_steps": "many", "batch_size": "0"}})
    with pytest.raises(HyperparameterError) as caught:
        drafts.prepare(draft)
    assert len(caught.value.faults) == 2
    assert "max_steps must be" in asyncio.run(drafts.plan(draft)).fault


def test_the_plan_is_that_of_a_dry_run_with_its_warnings(draft: Run) -> None:
    (draft.folder / "pictures" / "broken.png").write_bytes(b"no picture")
    before = sorted(draft.folder.rglob("*"))
    found = asyncio.run(drafts.plan(draft))
    assert found.fault == ""
    assert dict(found.rows)["resolution"] == "64 x 64"
    assert any("broken.png" in warning for warning in found.warnings)
    assert {path.name for path in draft.folder.rglob("*")} - {path.name for path in before} == {
        "dataset_info.json"
    }
    assert draft.state() == RunState.DRAFT


def test_a_plan_that_cannot_be_has_one_sentence(draft: Run) -> None:
    draft.save_draft({**PROMPTS, "settings": {"pretrained_model": "/nowhere"}})
    found = asyncio.run(drafts.plan(draft))
    assert found.fault.startswith("There is no model at /nowhere")
    assert found.rows == ()


def test_again_is_a_draft_with_all_that_the_run_was_given(draft: Run, tmp_path: Path) -> None:
    draft.save_draft({**PROMPTS, "settings": {"pretrained_model": "tiny", "max_steps": "60"}})
    run_list.submit(draft, {**drafts.prepare(draft), "log_level": "debug", "batch_size": 2})
    new = drafts.again(RunList(tmp_path), draft)
    assert new.state() == RunState.DRAFT
    assert new.draft() == {
        "instance_prompt": "a photo of a riobugger cat",
        "class_prompt": "",
        "settings": {"pretrained_model": "tiny", "max_steps": "60", "batch_size": "2"},
    }
    assert len(uploads.pictures(new)) == 8
    assert drafts.prepare(new)["train"] == str(new.folder / "pictures")


def test_a_run_with_several_subjects_has_no_form(draft: Run, tmp_path: Path) -> None:
    draft.save_draft({**PROMPTS, "settings": {"pretrained_model": "tiny"}})
    run_list.submit(draft, drafts.prepare(draft))
    subjects = [
        {"folder": name, "instance_prompt": f"a photo of a {name} cat"} for name in ("one", "two")
    ]
    info = draft.folder / "pictures" / "dataset_info.json"
    info.write_text(json.dumps({"subjects": subjects}))
    for name in ("one", "two"):
        (draft.folder / "pictures" / name).mkdir()
    with pytest.raises(UserError, match="has several subjects, for which the page has no form"):
        drafts.again(RunList(tmp_path), draft)
    assert drafts.prompts_of(draft)[0] == "a photo of a one cat"
