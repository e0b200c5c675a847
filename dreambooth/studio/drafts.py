"""Make a run out of what a form says: presets, settings, prompts, and the plan before the start.

The contents of the form lie in the draft's folder; a page that is loaded anew reads them there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from dreambooth import tiny
from dreambooth.data import prompts
from dreambooth.data.prompts import INFO_NAME, Prompts
from dreambooth.errors import UserError, one_line
from dreambooth.process import addresses, child_process, files
from dreambooth.runs import run_folder, run_list
from dreambooth.runs.run_folder import Run
from dreambooth.runs.run_list import RunList
from dreambooth.settings.hyperparameters import KNOBS
from dreambooth.settings.knob import unwrapped
from dreambooth.studio import uploads

INSTANCE_PROMPT: Final = "instance_prompt"
CLASS_PROMPT: Final = "class_prompt"
PRESET: Final = "preset"
SETTINGS: Final = "settings"
EMBEDDED: Final = "tiny"

_PLAN_S: Final = 300.0
_NAMES: Final = frozenset(knob.name for knob in KNOBS)
_ERROR: Final = "error: "
_WARNING: Final = re.compile(r"^[0-9:]+ WARNING (?:\[[^]]*\] )?(.*)$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """Settings to begin with. prompts: of instance and class, for a form that has none yet."""

    title: str
    sentence: str
    settings: Mapping[str, str]
    prompts: tuple[str, str] = ("", "")


PRESETS: Final[Mapping[str, Preset]] = {
    "minute": Preset(
        title="Try it in a minute",
        sentence="The embedded model, which draws small pictures; no GPU is needed.",
        settings={
            "pretrained_model": EMBEDDED,
            "max_steps": "200",
            "sample_steps": "50",
            "keep_states": "6",
            **{
                name: tiny.DEFAULTS[name]
                for name in (
                    "learning_rate",
                    "with_prior_preservation",
                    "prior_preservation_mode",
                    "training_guidance_scale",
                    "early_stopping",
                )
            },
        },
        prompts=("a photo of a riobugger cat", "a photo of a cat"),
    ),
    "object": Preset(
        title="Object or pet",
        sentence="400 steps on the subject's pictures alone.",
        settings={"max_steps": "400", "sample_steps": "100", "keep_states": "4"},
    ),
    "face": Preset(
        title="Face",
        sentence="800 steps with prior preservation, so that other faces stay what they were.",
        settings={
            "max_steps": "800",
            "sample_steps": "200",
            "keep_states": "4",
            "with_prior_preservation": "True",
            "num_class_images": "200",
        },
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftPlan:
    """What a dry run says: rows of the plan, warnings, and the fault with which no job begins."""

    rows: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    fault: str

    @property
    def steps(self) -> int | None:
        """Return how many steps are planned, None where the plan does not say it."""
        found = re.match("[0-9]{1,12}", dict(self.rows).get("steps", ""))
        return int(found[0]) if found else None


def contents_at_first(model: str | None) -> dict[str, Any]:
    """Return the contents of a new form; without a base model, the embedded one is tried."""
    if model is None:
        return with_preset({}, "minute")
    return with_preset({SETTINGS: {"pretrained_model": model}}, "object")


def with_preset(contents: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the contents of a form with the settings of a preset; texts of the user stay."""
    preset, old = PRESETS[name], text_settings(contents)
    kept = {key: old[key] for key in ("pretrained_model", "prediction_type", "base") if key in old}
    if kept.get("pretrained_model") == EMBEDDED:
        kept = {}
    texts = dict(zip((INSTANCE_PROMPT, CLASS_PROMPT), preset.prompts, strict=True))
    return {
        **contents,
        **{key: text(contents, key) or prompt for key, prompt in texts.items()},
        PRESET: name,
        SETTINGS: {**kept, **preset.settings},
    }


def text(contents: Mapping[str, Any], key: str) -> str:
    """Return one text of a form, "" where there is none."""
    found = contents.get(key)
    return found if isinstance(found, str) else ""


def text_settings(contents: Mapping[str, Any]) -> dict[str, str]:
    """Return the hyperparameters of a form that are set, as texts."""
    found = contents.get(SETTINGS)
    if not isinstance(found, dict):
        return {}
    return {
        name: value for name, value in found.items() if isinstance(value, str) and name in _NAMES
    }


def side_of(contents: Mapping[str, Any]) -> int:
    """Return the side in pixels at which training will probably see the pictures."""
    settings = text_settings(contents)
    given = settings.get("resolution", "")
    if given.isdecimal() and len(given) <= 4 and 64 <= int(given) <= 2_048:
        return int(given)
    return 64 if settings.get("pretrained_model") == EMBEDDED else 512


def prompt_hint(contents: Mapping[str, Any]) -> str:
    """Return a sentence on what the prompts lack, "" if nothing."""
    instance, of_class = text(contents, INSTANCE_PROMPT).strip(), text(contents, CLASS_PROMPT)
    if not instance:
        return "Write what the pictures show, with a name that no other thing has."
    if instance.casefold() == of_class.strip().casefold():
        return (
            "Both prompts are the same: put a rare word before the class in the first one, which "
            "becomes the subject's name."
        )
    return ""


def again(runs: RunList, run: Run) -> Run:
    """Return a new draft with the settings, prompts and pictures of a run, to be changed.

    Raises UserError for a run with several subjects, which the form has no fields for.
    """
    found = _prompts(run)
    if found is not None and found.are_listed:
        raise UserError(
            f"The run {run.name} has several subjects, for which the page has no form: run it "
            "again as it was, or change it on the command line (`python -m dreambooth runs again`)."
        )
    settings = run.settings()
    texts = {name: unwrapped(settings[name]) for name in settings if name in _NAMES}
    instance, of_class = prompts_of(run)
    draft = runs.new_draft(
        {
            INSTANCE_PROMPT: instance,
            CLASS_PROMPT: of_class,
            SETTINGS: {name: value for name, value in texts.items() if value},
        },
        name=re.sub("^[0-9]+-?", "", run.name),
    )
    with contextlib.suppress(UserError):  # a job would not find them either
        uploads.copy_from(draft, addresses.to_path(str(settings.get("train", "")), "train"))
    return draft


def prompts_of(run: Run) -> tuple[str, str]:
    """Return the instance and class prompts beside a run's pictures, "" for one that is not there.

    They may lie elsewhere, and may have been deleted since. Of several subjects the first counts.
    """
    found = _prompts(run)
    if found is None:
        return "", ""
    return found.subjects[0].instance_prompt, found.subjects[0].class_prompt or ""


def _prompts(run: Run) -> Prompts | None:
    train = str(run.settings().get("train", ""))
    try:
        folder = addresses.to_path(train, "train")
        return prompts.read(folder, with_prior_preservation=False, inside="")
    except UserError:
        return None


def prepare(run: Run) -> dict[str, object]:
    """Write the prompts of a draft beside its pictures, and return its settings.

    Raises UserError where a prompt is missing or a setting is wrong.
    """
    contents = run.draft()
    texts = {
        key: text(contents, key).strip()
        for key in (INSTANCE_PROMPT, CLASS_PROMPT)
        if text(contents, key).strip()
    }
    if INSTANCE_PROMPT not in texts:
        raise UserError("The instance prompt is missing: write what the pictures show.")
    pictures = run.folder / run_folder.PICTURES
    settings: dict[str, object] = {"train": str(pictures), **text_settings(contents)}
    run_list.check_settings(settings)
    with files.disk_faults_named("The draft", run.folder, elsewhere="start with another --dir"):
        pictures.mkdir(exist_ok=True)
        content = json.dumps(texts, ensure_ascii=False, indent=2)
        files.write_whole(pictures / INFO_NAME, content.encode("utf-8", "surrogatepass"))
    return settings


async def plan(run: Run) -> DraftPlan:
    """Return what a job would do with a draft, from a dry run in a process of its own."""
    try:
        settings = await asyncio.to_thread(prepare, run)
    except UserError as error:
        return DraftPlan(rows=(), warnings=(), fault=str(error))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "dreambooth", "train", "--dry_run"),
        *(f"--{name}={value}" for name, value in settings.items()),
        # Nothing is written; without one, the job would look for a container's folders.
        f"--model_dir={run.folder / run_folder.MODEL}",
        env=child_process.environment(os.environ),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(_PLAN_S):
            out, log = await process.communicate()
    except TimeoutError:
        fault = f"The dry run did not end within {_PLAN_S:g} seconds."
        return DraftPlan(rows=(), warnings=(), fault=fault)
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    texts = (output.decode("utf-8", "replace") for output in (out, log))
    return _read(process.returncode or 0, *texts)


def _read(code: int, out: str, log: str) -> DraftPlan:
    rows = [line.strip().partition("  ") for line in out.splitlines()]
    fault = ""
    if code != 0:
        errors = [line.removeprefix(_ERROR) for line in log.splitlines() if line[:7] == _ERROR]
        fault = one_line(errors[-1]) if errors else f"The dry run ended with the code {code}."
    return DraftPlan(
        rows=tuple((name, value.strip()) for name, _, value in rows if value),
        warnings=tuple(one_line(warning) for warning in _WARNING.findall(log)),
        fault=fault,
    )
