"""Choose the model of a run among its states: draw with one, read its numbers, keep it.

Each state draws the same prompts from the same seeds at the defaults of `generate`, once: what has
been drawn lies among the drawings, with a stamp of the weights. All is read from the disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from dreambooth.errors import UserError
from dreambooth.process import files
from dreambooth.report import report_data
from dreambooth.runs import run_folder, run_states
from dreambooth.runs.run_folder import Run
from dreambooth.runs.run_list import RunList
from dreambooth.runs.run_states import StateFiles
from dreambooth.studio import drafts
from dreambooth.studio.drawings import CHOICE, MODEL, STAMP, Drawing, Drawings, keeping
from dreambooth.studio.model_server import ModelServer
from dreambooth.studio.own_process import OwnProcess, object_of
from dreambooth.training import meter_budget

SEED: Final = "7"

_ELSEWHERE: Final = "start the page with another --dir"


@dataclass(frozen=True, slots=True)
class Choices:
    """The states of one run, and what they have drawn."""

    runs: RunList
    run: Run

    @property
    def drawings(self) -> Drawings:
        """Return all drawings beside the runs."""
        return Drawings(self.runs, None)

    def states(self) -> list[StateFiles]:
        """Return the states in the order of their steps; the model's is one of them."""
        return run_states.states_of(self.run)

    def model_step(self) -> int | None:
        """Return the step of the run's model."""
        model = run_states.model_state(self.run)
        return model.step if model is not None else None

    def prompts(self) -> list[str]:
        """Return what is drawn: subject, subject on a beach, its class, and another class."""
        instance, of_class = drafts.prompts_of(self.run)
        place = instance + meter_budget.PLACE if instance else ""
        other_class = meter_budget.other_class((instance, of_class))
        found = (instance, place, of_class, other_class)
        return [prompt for prompt in found if prompt]

    def readings(self) -> dict[int, Mapping[str, float]]:
        """Return what the meter has read, by step."""
        rows = report_data.read_metrics(self.run.folder / run_folder.METRICS)
        return {row.step: row.meter for row in rows if row.meter}

    def drawn(self, state: StateFiles | None) -> Drawing | None:
        """Return what a state has drawn or is to draw; None before it is asked to.

        state: None for the base.
        """
        wanted, prompts = self._request(state), self.prompts()
        for found in self.drawings.all():
            if found.request() == wanted and found.prompts() == prompts:
                return found
        return None

    def draw(self, state: StateFiles) -> None:
        """Draw with a state, and with the model and its base for comparison, each only once.

        What can no longer be shown is deleted. Raises UserError.
        """
        states = self.states()
        shown = [self.drawn(one) for one in (None, *states)]
        for old in self._of_this_choice():
            if old.has_ended and not (old in shown and old.is_whole):
                old.delete()
        wanted: list[StateFiles | None] = [state]
        wanted += [one for one in states if one.step == self.model_step() and one != state]
        wanted += [None] if self.drawings.names_base(self.run) else []
        for one in wanted:
            if self.drawn(one) is None:
                self.drawings.add(self._request(one), self.prompts())
        self.drawings.advance()

    def advance(self) -> None:
        """Start what waits: the next drawing, else the scores of one that is whole.

        Raises ResourceError.
        """
        self.drawings.advance()
        base = self.drawn(None)
        if base is None or any(not one.has_ended for one in self.drawings.all()):
            return
        mine = [one for one in self._of_this_choice() if one.is_whole]
        processes = [scoring(one) for one in mine]
        if base not in mine or any(process.is_running for process in processes):
            return
        for one, process in zip(mine, processes, strict=True):
            if one != base and not process.was_started and STAMP in one.request():
                self._score(one, base, process)
                return

    def _score(self, drawing: Drawing, base: Drawing, process: OwnProcess) -> None:
        """Measure what a state has drawn, in a process of its own."""
        options = self.drawings.options_of(self.drawings.base_of(self.run))
        *_, other_class = self.prompts()
        with files.disk_faults_named("The scores", process.folder, elsewhere=_ELSEWHERE):
            try:
                process.folder.mkdir()
            except FileExistsError:  # another page does it
                return
            process.start(
                "evaluate",
                f"--model={self.run.folder / run_folder.MODEL}",
                f"--data={self.run.settings().get('train', '')}",
                f"--base={options[MODEL]}",
                f"--drawn={drawing.folder}",
                f"--base_drawn={base.folder}",
                f"--other_prompt={other_class}",
                f"--out={process.folder}",
            )

    def scores(self, drawing: Drawing) -> dict[str, float]:
        """Return the measures of what a state has drawn, by name; none before they are there."""
        found = object_of(scoring(drawing).folder / "evaluation.json").get("measures")
        if not isinstance(found, dict):
            return {}
        means = {name: one.get("mean") for name, one in found.items() if isinstance(one, dict)}
        return {name: mean for name, mean in means.items() if isinstance(mean, float)}

    def cancel(self) -> None:
        """Cancel what is drawn or to be drawn for this run's choice."""
        for found in self._of_this_choice():
            found.cancel()

    def keep(self, state: StateFiles) -> None:
        """Begin to make a state the run's model, in a process of its own.

        Raises UserError while its model is served or drawn with.
        """
        server = ModelServer(self.runs)
        if server.run_name == self.run.name and server.process.is_running:
            raise UserError(f"The model of {self.run.name} is being served: stop the server first.")
        if self.drawings.draws_with(self.run):
            raise UserError(
                f"Pictures are being drawn with the model of {self.run.name}: let them be drawn, "
                "or cancel them."
            )
        process = keeping(self.run)
        if process.is_running:
            raise UserError("Another state is being made the model: wait until that is done.")
        with files.disk_faults_named("The choice", process.folder, elsewhere=_ELSEWHERE):
            process.folder.mkdir(exist_ok=True)
            process.forget()
            process.start(
                *("runs", "keep", f"--dir={self.runs.folder}"),
                *("--", self.run.name, str(state.step)),
                then=self.drawings.advance,
            )

    def _of_this_choice(self) -> list[Drawing]:
        found = self.drawings.all()
        return [one for one in found if one.request().get(CHOICE) == self.run.name]

    def _request(self, state: StateFiles | None) -> dict[str, str]:
        """Return what is asked of a state, or of the base, beside the prompts."""
        request = {"seed": SEED, CHOICE: self.run.name}
        if state is None:
            return {**request, MODEL: self.drawings.base_of(self.run)}
        model = self.drawings.state_of(self.run, state.step)
        return {**request, MODEL: model, STAMP: state.stamp}


def scoring(drawing: Drawing) -> OwnProcess:
    """Return the process that measures what was drawn."""
    return OwnProcess(drawing.folder / "scores")


def reading_at(
    readings: Mapping[int, Mapping[str, float]], step: int
) -> tuple[int, Mapping[str, float]] | None:
    """Return the newest reading up to a step, and its own step; None before the first one."""
    before = [at for at in readings if at <= step]
    return (max(before), readings[max(before)]) if before else None
