"""Writes the model card (README.md) of a fine-tuned model: base model, training data, limits."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth.errors import ModelArtifactError, one_line
from dreambooth.limits import LIMITS, Limits
from dreambooth.model_folder import layout, taught_subjects
from dreambooth.model_folder.taught_subjects import TaughtSubject

# Licence identifiers that model hubs know; any other is written as "other" with a license_name.
_KNOWN_LICENCES = (
    *("creativeml-openrail-m", "openrail++", "openrail", "bigscience-openrail-m"),
    *("apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0"),
)
_LICENCE_LINE = re.compile(r"license:[ \t]*[\"']?([\w.+-]{1,64})[\"']?\s*")
_FRONT_MATTER_BYTES = 64 * 1024
_LONGEST_NOTE = 500
# What `__model_info__.json` says of the training beside the steps, subjects and versions.
_FACTS: Mapping[str, type] = {
    **{"planned_steps": int, "instance_images": int, "class_images": int},
    **{"train_text_encoder": bool, "data_fingerprint": str, "ended_early": str, "is_chosen": bool},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """The facts that the card states.

    subjects: one at least. licence: the base model's identifier, where its own card gives one.
    versions: pairs such as ("torch", "2.13.0"). data_fingerprint: identifies the pictures and
    prompts of the training without showing them. ended_early: the sentence of early stopping on why
    the steps are fewer than planned. is_chosen: whether a user has chosen this state of the run.
    """

    base: str
    subjects: Sequence[TaughtSubject]
    steps: int
    planned_steps: int
    data_fingerprint: str
    instance_images: int = 0
    class_images: int = 0
    train_text_encoder: bool = False
    licence: str | None = None
    ended_early: str | None = None
    is_chosen: bool = False
    versions: Sequence[tuple[str, str]] = ()

    @property
    def partial(self) -> bool:
        """Return whether the run was stopped before its last step, and nothing was chosen."""
        is_short = self.steps < self.planned_steps
        return is_short and self.ended_early is None and not self.is_chosen

    @property
    def facts(self) -> dict[str, object]:
        """Return what `__model_info__.json` says of the training, for `read`."""
        return {name: getattr(self, name) for name in (*_FACTS, "versions")}


def read(folder: Path, *, limits: Limits = LIMITS) -> ModelCard:
    """Return the facts of a model that a run has written, from its `__model_info__.json`.

    What is not there, or of another type, is left at its default: earlier versions noted less.
    Raises ModelArtifactError where no step or no subject is named.
    """
    info = layout.read_json(folder / layout.MODEL_INFO, limits=limits)
    steps, subjects = info.get("steps"), taught_subjects.read(folder, limits=limits)
    if type(steps) is not int or steps < 0 or not subjects:
        raise ModelArtifactError(
            f"{folder / layout.MODEL_INFO} does not say what was trained: no run has written it."
        )
    noted = info.get("training")
    noted = noted if isinstance(noted, dict) else {}
    facts: dict[str, Any] = {
        name: noted[name] for name, kind in _FACTS.items() if type(noted.get(name)) is kind
    }
    versions = noted.get("versions")
    pairs = versions if isinstance(versions, list) else []
    base = info.get("base_model")
    for name in ("data_fingerprint", "ended_early"):
        if name in facts:
            facts[name] = one_line(facts[name], _LONGEST_NOTE)
    return ModelCard(
        **{"planned_steps": steps, "data_fingerprint": "not noted", **facts},
        base=base if isinstance(base, str) else "not noted",
        subjects=subjects,
        steps=steps,
        licence=licence_of(folder),
        versions=[
            (one_line(pair[0], 100), one_line(pair[1], 100))
            for pair in pairs
            if isinstance(pair, list) and [type(text) for text in pair] == [str, str]
        ],
    )


def licence_of(folder: Path) -> str | None:
    """Return the licence in the front matter of a model folder's README.md, None without one."""
    path = folder / "README.md"
    try:
        if not path.is_file():  # opening a pipe would block
            return None
        with path.open("rb") as file:
            text = file.read(_FRONT_MATTER_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return None
    first, *lines = text.lstrip().split("\n")
    licence = None
    for line in lines if first.rstrip() == "---" else []:
        if line.rstrip() == "---":
            return licence
        if licence is None and (found := _LICENCE_LINE.fullmatch(line)):
            licence = found[1].lower()
    return None


def render(card: ModelCard, *, samples: Sequence[tuple[str, str]] = ()) -> str:
    """Return the card as Markdown with YAML front matter.

    samples: pairs (file name, caption).
    """
    return "\n".join(
        [
            *_front_matter(card),
            "",
            *_description(card),
            *_samples(samples),
            *_usage(card),
            *_limits(card),
        ]
    )


def _front_matter(card: ModelCard) -> list[str]:
    licence = card.licence if card.licence in _KNOWN_LICENCES else "other"
    lines = ["---", f"license: {_literal(licence)}"]
    if licence == "other":
        lines.append(f"license_name: {_literal(card.licence or 'as the base model')}")
    return [
        *lines,
        f"base_model: {_literal(card.base)}",
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        "tags:",
        *(f"- {tag}" for tag in ("stable-diffusion", "text-to-image", "dreambooth", "diffusers")),
        *(["- partial"] if card.partial else []),
        f"instance_prompt: {_literal(card.subjects[0].instance_prompt)}",
        "inference: true",
        "---",
    ]


def _description(card: ModelCard) -> list[str]:
    trained = "the U-Net and the text encoder" if card.train_text_encoder else "the U-Net"
    steps = str(card.steps)
    if card.partial:
        steps += f" of {card.planned_steps} planned"
    if card.ended_early is not None:
        steps += f". {card.ended_early}"
    if card.is_chosen:
        steps += f"{' Then this' if card.ended_early else '. This'} state of the run was chosen."
    rows = [
        ("Base model", _code(card.base)),
        *_prompts(card),
        ("Instance images", str(card.instance_images)),
        (
            "Class images (prior preservation)",
            str(card.class_images) if card.class_images else "none",
        ),
        ("Steps", steps),
        ("Trained", trained),
        ("Fingerprint of the data", _code(card.data_fingerprint)),
        (
            "Versions",
            ", ".join(f"{name} {version}" for name, version in card.versions) or "not noted",
        ),
    ]
    taught = [
        "This model was fine-tuned on a few pictures of one subject. The instance prompt below",
        "calls the subject up; put it into other places and styles by adding to the prompt. Every",
    ]
    if len(card.subjects) > 1:
        taught = [
            f"This model draws {len(card.subjects)} subjects, each taught by a few pictures. Its",
            "instance prompt calls a subject up; put it into other places and styles by adding to",
            "the prompt. Every",
        ]
    return [
        "# A Stable Diffusion model fine-tuned with DreamBooth",
        "",
        *_partial(card),
        *taught,
        "setting of the run stands in `hyperparameters.json`.",
        "",
        *(f"- {name}: {value}" for name, value in rows),
        "",
    ]


def _prompts(card: ModelCard) -> list[tuple[str, str]]:
    """Return the rows with the prompts of each subject."""
    rows = []
    for number, subject in enumerate(card.subjects, start=1):
        of = f" of subject {number}" if len(card.subjects) > 1 else ""
        class_prompt = _code(subject.class_prompt) if subject.class_prompt else "none"
        rows += [
            (f"Instance prompt{of}", _code(subject.instance_prompt)),
            (f"Class prompt{of}", class_prompt),
        ]
    return rows


def _partial(card: ModelCard) -> list[str]:
    if not card.partial:
        return []
    return [
        f"**Partial: the run was stopped after {card.steps} of {card.planned_steps} planned "
        "steps.** The model can be",
        "used, and be given as `pretrained_model`; a run goes on exactly only from a checkpoint.",
        "",
    ]


def _samples(samples: Sequence[tuple[str, str]]) -> list[str]:
    if not samples:
        return []
    pictures = [f"![{_escaped(caption)}](samples/{name})" for name, caption in samples]
    return ["## Samples", "", *(line for picture in pictures for line in (picture, ""))]


def _usage(card: ModelCard) -> list[str]:
    return [
        "## Use",
        "",
        "```python",
        "from diffusers import StableDiffusionPipeline",
        "",
        'pipeline = StableDiffusionPipeline.from_pretrained("PATH/TO/THIS/FOLDER")',
        f"picture = pipeline({_literal(card.subjects[0].instance_prompt)}).images[0]",
        "```",
        "",
    ]


def _limits(card: ModelCard) -> list[str]:
    licence = (
        f"The base model's card states the licence {_code(card.licence)}; it holds for this model "
        "too."
        if card.licence
        else "The base model came without a stated licence: its terms hold for this model too. "
        "Stable Diffusion models are under CreativeML Open RAIL licences, whose restrictions on "
        "use pass on to whatever is fine-tuned from them."
    )
    return [
        "## Limits and biases",
        "",
        "Fine-tuning on a few pictures keeps the base model's weaknesses and adds its own:",
        "",
        "- Faces, hands and limbs may come out wrong, and text inside pictures is not legible.",
        "- Stable Diffusion was trained on LAION-5B, which holds adult material and shows mostly",
        "  western, English-captioned pictures: prompts in other languages work less well, and",
        "  stereotypes of the data come back in what is drawn.",
        "- With many steps the model forgets: other members of the class, and in the end other",
        "  classes, begin to look like the subject.",
        "- The backgrounds and poses of the instance images may leak into new scenes.",
        "- Pictures of people need their consent; do not use the model to deceive or to harm.",
        "",
        "## Licence",
        "",
        licence,
        "",
    ]


def _literal(text: str) -> str:
    """Return a text between quotes, as YAML and Python both read it.

    Both read JSON's strings, but YAML allows fewer characters as they are, and neither language
    reads JSON's pairs of surrogates as one character.
    """
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(
        c if c.isprintable() else f"\\u{ord(c):04x}" if ord(c) < 0x10000 else f"\\U{ord(c):08x}"
        for c in quoted
    )


def _code(text: str) -> str:
    """Return a Markdown code span that shows the text as it is, on one line."""
    line = _one_line(text)
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {line} {fence}" if longest else f"{fence}{line}{fence}"


def _escaped(text: str) -> str:
    """Return a text on one line, with every character escaped that could be Markdown."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", _one_line(text))


def _one_line(text: str) -> str:
    return one_line(" ".join(text.split()), most=len(text)) or "(blank)"
