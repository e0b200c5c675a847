"""Show one run: how far it is, its curve and samples, its log, and what can be done with it."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Awaitable, Callable
from typing import Any, Final

from nicegui import ui

from dreambooth.errors import one_line
from dreambooth.limits import size_in_words
from dreambooth.report import report_data
from dreambooth.runs import run_folder, run_list, stop_run
from dreambooth.runs.run_folder import Run, RunState
from dreambooth.runs.run_list import RunList
from dreambooth.runs.run_status import RunStatus
from dreambooth.studio import choose_view, compare_view, drafts, parts, ship_view
from dreambooth.studio.routes import METERS, run_address

_LOG_LINES: Final = 30
_ROWS: Final = 12
_ACTIVE: Final = (RunState.RUNNING, RunState.WAITING)


def draw(runs: RunList, run: Run) -> Callable[[], Awaitable[None]]:
    """Draw a run, and return the function that brings it up to date."""
    parts.text("h1", run.name)
    sentence = parts.text("p", "", role="status")
    bar = ui.linear_progress(value=0, show_value=False, size="10px")
    bar.props["aria-label"] = "steps done"
    facts = parts.text("p", "", classes="note")
    shown = _Buttons(runs, run)
    updates = [
        _changing(_prompts_over_steps, "Pictures over the steps"),
        _changing(_samples, "Samples"),
        _changing(_curve, "Loss"),
        _changing(_numbers, "The numbers of the curve", folded=True),
        _changing(_meter, "Meter"),
        _changing(_plan, "Plan and settings", folded=True),
    ]
    update_choice = choose_view.draw(runs, run)
    update_comparison = compare_view.draw(runs, run)
    update_shipping = ship_view.draw(runs, run)
    with parts.tag("section"):
        parts.text("h2", "Log")
        log = parts.text("pre", "", tabindex="0", aria_label="the last lines of the log")

    async def update() -> None:
        status = await asyncio.to_thread(RunStatus.of, run)
        sentence.text = status.sentence
        bar.value = min(1.0, status.step / status.steps) if status.steps else 0
        bar.set_visibility(status.state in _ACTIVE)
        facts.text = _facts(status)
        shown.update(status)
        for one in updates:
            one(run)
        await update_choice(status.state)
        await update_comparison()
        await update_shipping()
        log.text = "\n".join(one_line(line, 500) for line in run.log_tail(_LOG_LINES))

    return update


class _Buttons:
    """What can be done with a run in its state."""

    def __init__(self, runs: RunList, run: Run) -> None:
        self._runs, self._run = runs, run
        with parts.tag("div", classes="row-of-buttons"):
            self._stop = ui.button("Stop", on_click=parts.told(self._do_stop))
            with parts.tag("div", classes="row-of-buttons") as self._ended:
                self._steps = ui.input("Steps in all").props(
                    "outlined dense stack-label inputmode=numeric maxlength=12"
                )
                ui.button("Continue", on_click=parts.told(self._do_continue))
                parts.second_button("Run it again", self._do_again)
                parts.second_button("Change and run again", self._do_change)
                parts.delete_button(runs, run)
            self._report = ui.link("Report", run_address(run.name, run_folder.REPORT), new_tab=True)

    def update(self, status: RunStatus) -> None:
        """Show the buttons that fit."""
        is_active = status.state in _ACTIVE
        self._stop.set_visibility(is_active)
        self._stop.set_enabled(not status.stopping)
        self._ended.set_visibility(not is_active)
        self._report.set_visibility((self._run.folder / run_folder.REPORT).is_file())

    async def _do_stop(self) -> None:
        result = await asyncio.to_thread(stop_run.stop, self._run)
        ui.notify(result.sentence)

    async def _do_continue(self) -> None:
        steps = (self._steps.value or "").strip()
        changes = {"max_steps": steps} if steps else {}
        await asyncio.to_thread(run_list.go_on, self._run, changes)
        await asyncio.to_thread(self._runs.start)

    async def _do_again(self) -> None:
        new = await asyncio.to_thread(self._runs.again, self._run, {})
        await asyncio.to_thread(self._runs.start)
        ui.navigate.to(run_address(new.name))

    async def _do_change(self) -> None:
        draft = await asyncio.to_thread(drafts.again, self._runs, self._run)
        ui.navigate.to(run_address(draft.name))


def _facts(status: RunStatus) -> str:
    facts = []
    if status.steps:
        facts.append(f"step {status.step} of {status.steps}")
    if status.loss is not None:
        facts.append(f"loss {status.loss:.4f}")
    if status.state == RunState.RUNNING and status.steps_per_second:
        facts.append(f"{status.steps_per_second:.2f} steps per second")
    if status.seconds_left is not None:
        facts.append(f"{_duration(status.seconds_left)} left")
    sizes = {"model": status.sizes.model, "checkpoints": status.sizes.checkpoints}
    facts += [f"{name} {size_in_words(size)}" for name, size in sizes.items() if size]
    return ", ".join([*facts, f"{size_in_words(status.sizes.total)} on the disk in all"])


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _changing(
    content: Callable[[Run], tuple[object, Callable[[], None]]], title: str, *, folded: bool = False
) -> Callable[[Run], None]:
    """Return the update of a section that is drawn anew only where its content has changed."""
    with parts.tag("section") as section:
        if folded:
            with parts.fold(title):
                place = parts.tag("div")
        else:
            parts.text("h2", title)
            place = parts.tag("div")
    section.set_visibility(False)
    drawn: object = None

    def update(run: Run) -> None:
        nonlocal drawn
        found, draw_it = content(run)
        if found != drawn:
            drawn = found
            section.set_visibility(bool(found))
            place.clear()
            with place:
                draw_it()

    return update


def _samples(run: Run) -> tuple[object, Callable[[], None]]:
    samples = [(path.name, path.stat().st_mtime_ns) for path in run.samples()]

    def draw_it() -> None:
        with parts.tag("div", classes="pictures"):
            for name, changed in samples:
                step = _step_of(name)
                _figure(
                    f"{run_address(run.name, run_folder.SAMPLES, name)}?{changed}",
                    f"sample after step {step}",
                    f"step {step}",
                )

    return samples, draw_it


def _prompts_over_steps(run: Run) -> tuple[object, Callable[[], None]]:
    """Draw the meter's pictures, one row for each step, and its scores where there are some."""
    folder = run.folder / run_folder.METER
    pictures = [(one, one.path.stat().st_mtime_ns) for one in report_data.meter_pictures(folder)]
    scores = report_data.meter_scores(folder) if pictures else {}

    def draw_it() -> None:
        for step, row in itertools.groupby(pictures, key=lambda picture: picture[0].step):
            parts.text("h3", f"Step {step}")
            with parts.tag("div", classes="pictures four"):
                for one, changed in row:
                    prompt = one.name.replace("_", " ")
                    _figure(
                        f"{run_address(run.name, run_folder.METER, one.path.name)}?{changed}",
                        f"{prompt} after step {step}",
                        prompt,
                    )
            if step in scores:
                parts.text("p", report_data.in_words(scores[step]), classes="note")

    return (pictures, scores) if pictures else (), draw_it


def _step_of(name: str) -> str:
    """Return the step in the name of a picture, without leading zeros."""
    return name.removesuffix(".png").split("-")[1].lstrip("0") or "0"


def _figure(address: str, alt: str, caption: str) -> None:
    with parts.tag("figure"):
        parts.tag("img", src=address, alt=alt)
        parts.text("figcaption", caption)


def _curve(run: Run) -> tuple[object, Callable[[], None]]:
    step = run.last_metrics().get("step")

    def draw_it() -> None:
        parts.tag(
            "img",
            classes="curve",
            src=f"{run_address(run.name, 'loss.svg')}?{step}",
            alt="the loss over the steps; its numbers stand in the table below",
        )

    return step, draw_it


def _numbers(run: Run) -> tuple[object, Callable[[], None]]:
    def draw_it() -> None:
        rows = report_data.read_metrics(run.folder / run_folder.METRICS)
        chosen = rows[:: -max(1, -(-len(rows) // _ROWS))][::-1]  # the last one is always there
        parts.table(
            "Loss over the steps",
            ("Step", "Loss", "Learning rate"),
            [(str(row.step), f"{row.loss:.4f}", f"{row.learning_rate:.2e}") for row in chosen],
        )

    return run.last_metrics().get("step"), draw_it


def _meter(run: Run) -> tuple[object, Callable[[], None]]:
    """Draw the curves of the meter, each with its numbers in a table."""

    def draw_it() -> None:
        rows = report_data.read_metrics(run.folder / run_folder.METRICS)
        rows = [row for row in rows if row.meter]
        if not rows:
            parts.text("p", "It has not been read yet; a short run has no reading.", classes="note")
            return
        for file, (title, names) in METERS.items():
            there = {name: label for name, label in names.items() if name in rows[-1].meter}
            parts.text("h3", title)
            with parts.tag("p", classes="legend"):
                for number, label in enumerate(there.values(), start=1):
                    parts.text("span", "", classes=f"key-{number}", aria_hidden="true")
                    parts.text("span", label)
            parts.tag(
                "img",
                classes="curve",
                src=f"{run_address(run.name, f'{file}.svg')}?{rows[-1].step}",
                alt=f"{title}; its numbers stand in the table below",
            )
            numbers = [
                (str(row.step), *(f"{row.meter.get(name, math.nan):.3f}" for name in there))
                for row in rows[-_ROWS:]
            ]
            parts.table(title, ("Step", *there.values()), numbers)

    return run.last_metrics().get("step"), draw_it


def _plan(run: Run) -> tuple[object, Callable[[], None]]:
    settings: dict[str, Any] = run.settings()
    rows = [*run.plan(), *((f"--{name}", str(value)) for name, value in settings.items())]
    return rows, lambda: parts.table("Plan and settings", (), rows)
