"""Show what a run's model and its base draw for the same prompts from the same seeds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from nicegui import ui

from dreambooth.limits import LIMITS
from dreambooth.runs.run_folder import Run
from dreambooth.runs.run_list import RunList
from dreambooth.studio import drafts, parts
from dreambooth.studio.drawings import Drawing, Drawings
from dreambooth.studio.routes import drawing_address
from dreambooth.training import meter_budget

_FIELD: Final = "outlined dense stack-label"
_WHOSE: Final = ("base", "fine-tuned")


def draw(runs: RunList, run: Run) -> Callable[[], Awaitable[None]]:
    """Draw the section, and return the function that brings it up to date."""
    found = Drawings(runs, None)

    async def start() -> None:
        settings = {
            "seed": seed.value or "",
            "num_inference_steps": steps.value or "",
            "guidance_scale": guidance.value or "",
        }
        await asyncio.to_thread(found.compare, run, prompts_of(run, free.value or ""), settings)

    async def cancel() -> None:
        for drawing in reversed(await asyncio.to_thread(found.comparison, run)):
            await asyncio.to_thread(drawing.cancel)

    with parts.tag("section") as section:
        parts.text("h2", "Compare with the base model")
        parts.text(
            "p",
            "Both draw the subject, the subject on a beach, its class, and what you write here, "
            "each from the same seed.",
            classes="note",
        )
        free = ui.input("One more prompt (optional)").classes("wide")
        free.props(f"{_FIELD} maxlength={LIMITS.max_prompt_characters}")
        with parts.tag("div", classes="row-of-buttons"):
            seed = ui.input("Seed of both", value="7", placeholder="random")
            steps = ui.input("Steps of both", placeholder="50")
            guidance = ui.input("Guidance of both", placeholder="7.5")
            for field in (seed, steps, guidance):
                field.props(f"{_FIELD} maxlength=20").classes("short")
            start_button = parts.second_button("Draw with both", start)
            cancel_button = parts.second_button("Cancel the comparison", cancel)
        sentence = parts.text("p", "", role="status")
        place = parts.tag("div", classes="pairs")
    section.set_visibility(False)
    drawn: object = None

    async def update() -> None:
        nonlocal drawn
        has_model = run.has_model()
        section.set_visibility(has_model)
        if not has_model:
            return
        await asyncio.to_thread(found.advance)
        pair = await asyncio.to_thread(found.comparison, run)
        is_to_come = any(one.is_drawing or one.is_waiting for one in pair)
        start_button.set_visibility(not is_to_come)
        cancel_button.set_visibility(is_to_come)
        sentence.text = " ".join(
            f"{whose.capitalize()}: {one.sentence}"
            for whose, one in zip(_WHOSE, pair, strict=False)
        )
        pictures = [(one.name, one.prompts(), one.by_number()) for one in pair]
        if pictures != drawn:
            drawn = pictures
            place.clear()
            with place:
                _pairs(pair)

    return update


def prompts_of(run: Run, free: str) -> list[str]:
    """Return what is compared: subject, subject elsewhere, class, and a prompt of the user."""
    instance, of_class = drafts.prompts_of(run)
    place = instance + meter_budget.PLACE if instance else ""
    return [prompt for prompt in (instance, place, of_class, free.strip()) if prompt]


def _pairs(pair: list[Drawing]) -> None:
    prompts = pair[0].prompts() if pair else []
    pictures = [one.by_number() for one in pair]
    for number, prompt in enumerate(prompts):
        with parts.tag("div", role="group", aria_label=prompt):
            parts.text("h3", prompt)
            with parts.tag("div", classes="pictures two"):
                for whose, drawing, drawn in zip(_WHOSE, pair, pictures, strict=False):
                    with parts.tag("figure"):
                        if number in drawn:
                            address = drawing_address(drawing.name, drawn[number].name)
                            parts.tag("img", src=address, alt=f"{whose}: {prompt}")
                        parts.text("figcaption", whose)
