"""Say in one look how a run stands, for people, pages and scripts. Standard library only."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

from dreambooth.errors import one_line
from dreambooth.process.identity import ProcessIdentity
from dreambooth.runs.run_folder import Run, RunSizes, RunState

_LONGEST_REASON: Final = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """How a run stands; what is not known yet is None.

    step: the last step in the metrics, of `steps` that are planned. loss: of that step. seconds:
    how long a running one still trains. stopping: whether its trainer was sent a stop signal.
    model_step: that of its model. is_chosen: whether a user has chosen that step. ended_early: the
    sentence of early stopping, "" where it has not ended the run.
    begun_at: when its last trainer began, in seconds since 1970.
    """

    name: str
    folder: str
    state: RunState
    stopping: bool
    step: int
    steps: int | None
    loss: float | None
    steps_per_second: float | None
    seconds_left: float | None
    has_model: bool
    model_step: int | None
    is_chosen: bool
    ended_early: str
    checkpoint_step: int | None
    exit_code: int | None
    failure: str
    begun_at: float | None
    process: ProcessIdentity | None
    sizes: RunSizes

    @classmethod
    def of(cls, run: Run) -> RunStatus:
        """Read how a run stands. Raises UserError if there is none."""
        state = run.state()
        is_running = state == RunState.RUNNING
        metrics, steps = run.last_metrics(), run.planned_steps()
        step, speed = metrics.get("step", 0), _number(metrics.get("steps_per_second"))
        info, left = run.model_info(), None
        facts = info.get("training")
        facts = facts if isinstance(facts, dict) else {}
        if is_running and steps is not None and speed:
            left = max(steps - step, 0) / speed
        return cls(
            name=run.name,
            folder=str(run.folder.absolute()),
            state=state,
            stopping=is_running and run.is_told_to_stop(),
            step=step,
            steps=steps,
            loss=_number(metrics.get("loss")),
            steps_per_second=speed,
            seconds_left=left,
            has_model=run.has_model(),
            model_step=info["steps"] if isinstance(info.get("steps"), int) else None,
            is_chosen=facts.get("is_chosen") is True,
            ended_early=one_line(str(facts.get("ended_early") or ""), _LONGEST_REASON),
            checkpoint_step=run.checkpoint_step(),
            exit_code=run.exit_code(),
            failure=run.failure(),
            begun_at=run.begun_at(),
            process=run.process(),
            sizes=run.sizes(),
        )

    @property
    def sentence(self) -> str:
        """Return the state in words, with what can be done about it."""
        where = f"at step {self.step}" + (f" of {self.steps}" if self.steps else "")
        left = (
            "it begins anew" if self.checkpoint_step is None else "it goes on from its checkpoint"
        )
        said = {
            RunState.RUNNING: f"It is being trained, {where}"
            + (", and was told to stop." if self.stopping else "."),
            RunState.DONE: "It is done.",
            RunState.FAILED: f"It failed: {self.failure or 'its log says why'}",
            RunState.STOPPED: f"It was stopped {where}; with `continue` {left}.",
            RunState.DIED: f"Its trainer died {where}: it was killed, or the machine went down. "
            f"With `continue` {left}.",
            RunState.WAITING: "It waits for the runner.",
            RunState.DRAFT: "It is a draft that was not sent off yet.",
        }[self.state]
        is_past = self.state in (RunState.DONE, RunState.STOPPED, RunState.FAILED, RunState.DIED)
        more = [self.ended_early] if self.state == RunState.DONE and self.ended_early else []
        if is_past and self.is_chosen:
            more.append(f"Since then the state of step {self.model_step} was chosen as its model.")
        return " ".join([said, *more])

    def as_json(self) -> dict[str, Any]:
        """Return all of it for a JSON document."""
        sizes = {**asdict(self.sizes), "total": self.sizes.total}
        return {**asdict(self), "sizes": sizes, "sentence": self.sentence}


def _number(found: object) -> float | None:
    return float(found) if isinstance(found, int | float) else None
