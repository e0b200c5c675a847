"""What the processes of one job do together: share work, compare notes, stop at the same step.

With a single process each function does what that process does alone.
"""

from __future__ import annotations

import functools
import platform
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from dreambooth.data.class_images import SamplingShare
from dreambooth.errors import UserError
from dreambooth.process.stop import Stopped, StopSignals
from dreambooth.training.state import TrainingState
from dreambooth.training.step_metrics import StepMetrics

Value = TypeVar("Value")


def gathered(accelerator: Accelerator, value: Value) -> list[Value]:
    """Return this value of every process, in the order of their ranks."""
    return list(gather_object([value])) if accelerator.num_processes > 1 else [value]


def share(accelerator: Accelerator) -> SamplingShare:
    """Return this process's part in sampling class images."""
    return SamplingShare(
        process=accelerator.process_index,
        processes=accelerator.num_processes,
        gather=functools.partial(gathered, accelerator),
        writes=accelerator.is_local_main_process,
    )


def refuse_unequal_processes(accelerator: Accelerator, identity: Mapping[str, str]) -> None:
    """Raise UserError where the processes do not train on the same data, model and settings."""
    mine = {**identity, "host": platform.node()}
    first, *others = gathered(accelerator, mine)
    for other in others:
        if different := sorted(name for name in identity if first[name] != other[name]):
            raise UserError(
                f"Host {other['host']} does not train as host {first['host']} does: its "
                f"{', '.join(different)} {'is' if len(different) == 1 else 'are'} different. All "
                "hosts need the same pictures (S3 data distribution FullyReplicated), model and "
                "settings."
            )


def refuse_unequal_steps(accelerator: Accelerator, step: int) -> None:
    """Raise UserError where not all hosts have the checkpoint from which the run goes on."""
    (first, main), *others = gathered(accelerator, (step, platform.node()))
    for other, host in others:
        if other != first:
            raise UserError(
                f"Host {main} goes on from step {first}, and host {host} from step {other}: give "
                "all hosts the same checkpoints, or set resume=fresh."
            )


def until_stopped(
    steps: Iterator[StepMetrics],
    state: TrainingState,
    stop: StopSignals,
    accelerator: Accelerator,
    is_enough: Callable[[], bool] = lambda: False,
) -> Iterator[StepMetrics]:
    """Yield the step metrics; raise Stopped on all processes after a step with a stop signal.

    A signal that arrives once the processes have asked each other counts at the next step.
    is_enough: whether to end before the last step; what the main process says counts.
    """
    if any(gathered(accelerator, is_enough())):  # a resumed run that had been ended
        return
    for metrics in steps:
        yield metrics
        if metrics.step < state.step:  # `captured_loop` yields up to ten steps' metrics at once
            continue
        if accelerator.num_processes == 1:
            stop.check()
            if is_enough():
                return
            continue
        asked = torch.tensor([float(stop.asked), float(is_enough())], device=accelerator.device)
        stopped, enough = accelerator.reduce(asked, "sum").tolist()
        if stopped > 0:
            raise Stopped(stop.number or signal.SIGTERM)
        if enough > 0:
            return


def follow(steps: Iterator[StepMetrics], accelerator: Accelerator) -> None:
    """Make the steps of a process that writes nothing, and wait for the main process's last file.

    A launcher, or the end of another host's container, would otherwise end that process.
    """
    try:
        for _ in steps:
            pass
    except Stopped:
        accelerator.wait_for_everyone()
        raise
    accelerator.wait_for_everyone()
