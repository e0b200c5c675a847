"""Decide when a job writes checkpoints, and resume a job from them."""

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

    mode: "auto" or "fresh" (the hyperparameter `resume`). identity: what a resumed run must share.
    keep: how many checkpoints are kept. elsewhere: how the user chooses another folder, for
    messages. bytes_per_second: how fast the last one was written.
    """

    folder: Path | None
    mode: str
    identity: Mapping[str, str]
    plan: TrainingPlan
    keep: int
    elsewhere: str
    bytes_per_second: float | None = None
    _saved_at: float = field(default_factory=time.monotonic)

    def check(self) -> None:
        """Refuse to resume a changed job before it samples class images or removes an old model.

        Raises HyperparameterError.
        """
        if self.folder is not None and self.mode != "fresh":
            states.refuse_another_job(self.folder, identity=self.identity)

    def resume(self, state: TrainingState, *, may_remove: bool) -> None:
        """Load the newest whole checkpoint into the state.

        In mode "fresh" the first call removes all checkpoints instead. may_remove: whether this
        process may remove old and half-written checkpoints.
        """
        if self.folder is None:
            return
        if self.mode == "fresh":
            self.mode = "auto"  # from now on the checkpoints there are this run's
            if may_remove:
                states.clear(self.folder)
            return
        if states.load_newest(state, self.folder, identity=self.identity):
            log.info("resumed at step %d from %s", state.step, self.folder)
        else:
            log.info("there is no checkpoint in %s: the run begins at step 0", self.folder)
        if may_remove:
            states.tidy(state, self.folder, keep=self.keep)

    def due(self, step: int) -> bool:
        """Return whether a checkpoint is due after this step."""
        if self.folder is None:
            return False
        if self.plan.keep_last_checkpoint and step == self.plan.steps:
            return True
        every, minutes = self.plan.checkpointing_steps, self.plan.checkpointing_minutes
        if every is not None and step % every == 0:
            return True
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def save(self, state: TrainingState) -> None:
        """Write a checkpoint of the state, and measure how fast."""
        assert self.folder is not None
        began = time.monotonic()
        path = states.save(
            state,
            self.folder,
            identity=self.identity,
            keep=self.keep,
            elsewhere=self.elsewhere,
        )
        self._saved_at = time.monotonic()
        written = states.written_bytes(state, path)
        self.bytes_per_second = written / max(self._saved_at - began, 1e-6)

    def holds(self, state: TrainingState) -> bool:
        """Return whether the state's step has a checkpoint already."""
        mine = states.folder_name(state.step)
        return state.checkpoint is not None and state.checkpoint.name == mine
