"""What processes do together, with stand-ins for the others."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from dreambooth.errors import UserError
from dreambooth.job import agreement
from dreambooth.process.stop import Stopped, StopSignals

SAME = {"data": "abc", "seed": "0", "processes": "2"}
Others = Callable[[Any], Any]


@pytest.fixture
def with_other(monkeypatch: pytest.MonkeyPatch) -> Callable[[Others], None]:
    """Return a function that sets what another process gathers beside this one's value."""

    def set_other(other: Others) -> None:
        monkeypatch.setattr(agreement, "gathered", lambda _, value: [value, other(value)])

    return set_other


def test_processes_that_train_on_other_data_are_refused(
    with_other: Callable[[Others], None],
) -> None:
    with_other(lambda mine: {**mine, "host": "algo-2"})
    agreement.refuse_unequal_processes(None, SAME)  # type: ignore[arg-type]
    with_other(lambda mine: {**mine, "host": "algo-2", "data": "xyz", "seed": "7"})
    with pytest.raises(UserError, match=r"^Host algo-2 .* its data, seed are different") as refused:
        agreement.refuse_unequal_processes(None, SAME)  # type: ignore[arg-type]
    assert "FullyReplicated" in str(refused.value)


def test_hosts_with_other_checkpoints_are_refused(with_other: Callable[[Others], None]) -> None:
    with_other(lambda mine: (mine[0], "algo-2"))
    agreement.refuse_unequal_steps(None, 4)  # type: ignore[arg-type]
    with_other(lambda mine: (0, "algo-2"))
    with pytest.raises(UserError, match="goes on from step 4, and host algo-2 from step 0"):
        agreement.refuse_unequal_steps(None, 4)  # type: ignore[arg-type]


def _steps(asked_by_others: list[float], stop: StopSignals, *, late: int = 0) -> list[int]:
    """Return the steps until the processes stop, of which this one is asked late in step `late`."""
    state, made = SimpleNamespace(step=0), []

    def train() -> Any:
        for step in range(1, len(asked_by_others) + 1):
            state.step = step
            yield SimpleNamespace(step=step)

    def reduce(asked: torch.Tensor, _: str) -> torch.Tensor:
        total = asked + asked_by_others[state.step - 1]
        if state.step == late:
            signal.raise_signal(signal.SIGTERM)
        return total

    accelerator: Any = SimpleNamespace(num_processes=2, device="cpu", reduce=reduce)
    given: Any = train()
    steps = agreement.until_stopped(given, state, stop, accelerator)  # type: ignore[arg-type]
    with pytest.raises(Stopped) as stopped, stop.listening(), stop.held():
        made += (metrics.step for metrics in steps)
    assert stopped.value.exit_code == 143
    return made


def test_all_stop_after_the_step_in_which_one_was_asked() -> None:
    assert _steps([0, 0, 1, 0], StopSignals()) == [1, 2, 3]


def test_a_signal_that_comes_too_late_for_a_step_counts_at_the_next() -> None:
    # A process that stopped alone would leave the others waiting in the next step.
    assert _steps([0, 0, 0, 0], StopSignals(), late=2) == [1, 2, 3]


def test_a_stop_in_the_fast_step_waits_for_the_figures_of_steps_that_are_made() -> None:
    stop, state, read = StopSignals(), SimpleNamespace(step=1), []

    def made() -> Iterator[Any]:
        yield SimpleNamespace(step=1)
        state.step = 4
        os.kill(os.getpid(), signal.SIGTERM)
        yield from (SimpleNamespace(step=step) for step in (2, 3, 4))

    followed = agreement.until_stopped(made(), state, stop, Accelerator(cpu=True))  # type: ignore[arg-type]
    with stop.listening(), pytest.raises(Stopped), stop.held():
        read.extend(metrics.step for metrics in followed)
    assert read == [1, 2, 3, 4]


@pytest.mark.parametrize("processes", [1, 2])
def test_all_end_after_the_step_that_was_enough_for_the_main_process(processes: int) -> None:
    def made() -> Iterator[SimpleNamespace]:
        for state.step in (1, 2, 3, 4):
            yield SimpleNamespace(step=state.step)

    def reduce(asked: torch.Tensor, _: str) -> torch.Tensor:  # the main process is the other one
        return asked + torch.tensor([0.0, float(state.step == 3)])

    state = SimpleNamespace(step=0)
    accelerator: Any = SimpleNamespace(num_processes=processes, device="cpu", reduce=reduce)
    steps = agreement.until_stopped(
        made(),  # type: ignore[arg-type]
        state,  # type: ignore[arg-type]
        StopSignals(),
        accelerator,
        lambda: processes == 1 and state.step == 3,
    )
    assert [metrics.step for metrics in steps] == [1, 2, 3]


@pytest.mark.parametrize(("enough", "steps"), [(True, []), (False, [1])])
def test_a_run_that_had_been_ended_makes_no_step(enough: bool, steps: list[int]) -> None:
    made = agreement.until_stopped(
        iter([SimpleNamespace(step=1)]),  # type: ignore[arg-type]
        SimpleNamespace(step=1),  # type: ignore[arg-type]
        StopSignals(),
        Accelerator(cpu=True),
        lambda: enough,
    )
    assert [metrics.step for metrics in made] == steps
