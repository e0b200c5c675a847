"""When a job writes its checkpoints, and how it goes on from them."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dreambooth.training import state as states
from dreambooth.training.plan import TrainingPlan
from dreambooth.training.state import TrainingState

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Checkpoints:
    """The checkpoints of one job, in `folder`; without a folder there are none.

    mode: "auto" or "fresh" (the hyperparameter `resume`). identity: what a run that goes on must
    share. keep: how many stay. bytes_per_second: how fast the last one was written.
    """

    folder: Path | None
    mode: str
    identity: Mapping[str, str]
    plan: TrainingPlan
    keep: int
    bytes_per_second: float | None = None
    _saved_at: float = field(default_factory=time.monotonic)

    def check(self) -> None:
        """Refuse a changed job before an hour of class images or an earlier model is lost to it."""
        if self.folder is not None and self.mode != "fresh":
            states.refuse_another_job(self.folder, identity=self.identity)

    def resume(self, state: TrainingState, *, tidies: bool) -> None:
        """Bring the state to the newest whole checkpoint; the first time, `fresh` removes them all
        instead.

        tidies: whether this process may remove what killed runs left.
        """
        if self.folder is None:
            return
        if self.mode == "fresh":
            self.mode = "auto"  # what lies there from now on is of this run
            if tidies:
                states.clear(self.folder)
            return
        if states.load_newest(state, self.folder, identity=self.identity):
            log.info("resumed at step %d from %s", state.step, self.folder)
        if tidies:
            states.tidy(state, self.folder, keep=self.keep)

    def due(self, step: int) -> bool:
        """Whether the plan wants one after this step."""
        if self.folder is None:
            return False
        every, minutes = self.plan.checkpointing_steps, self.plan.checkpointing_minutes
        if every is not None and step % every == 0:
            return True
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def save(self, state: TrainingState) -> None:
        """Write one of the state as it is."""
        assert self.folder is not None
        began = time.monotonic()
        path = states.save(state, self.folder, identity=self.identity, keep=self.keep)
        self._saved_at = time.monotonic()
        written = states.written_bytes(state, path)
        self.bytes_per_second = written / max(self._saved_at - began, 1e-6)

    def holds(self, state: TrainingState) -> bool:
        """Whether the state's own step has one already."""
        mine = states.folder_name(state.step)
        return state.checkpoint is not None and state.checkpoint.name == mine
