"""Choose how many processes train a job. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dreambooth.errors import HyperparameterError
from dreambooth.settings.hyperparameters import MEMORY_PLANS, Hyperparameters
from dreambooth.training import memory_plan
from dreambooth.training.device import DeviceFacts, in_common
from dreambooth.training.plan import TrainingPlan

_MOST = 16  # as many as the hyperparameter allows


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessCount:
    """The processes of a job: on each host, and the hosts that train.

    warnings: a sentence where `auto` leaves GPUs or hosts without work.
    """

    on_each_host: int
    hosts: int
    warnings: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Return how many processes train together."""
        return self.on_each_host * self.hosts


def choose(
    hyperparameters: Hyperparameters,
    gpus: Sequence[DeviceFacts],
    hosts: int,
    make_plan: Callable[[int, DeviceFacts], TrainingPlan],
) -> ProcessCount:
    """Return how many processes train a job on hosts with these GPUs.

    `auto` takes one per GPU, and one for the whole job where only a single process can do what is
    asked for. make_plan: (processes, device) -> the training plan. Raises HyperparameterError for
    more processes than GPUs.
    """
    if hyperparameters.processes != "auto":
        on_each_host = int(hyperparameters.processes)
        refuse_missing_gpus(on_each_host, gpus)
        return ProcessCount(on_each_host=on_each_host, hosts=hosts if on_each_host > 1 else 1)
    every = ProcessCount(on_each_host=max(1, min(_MOST, len(gpus))), hosts=hosts)
    if every.total == 1:
        return every
    reason = _reason_for_one(hyperparameters)
    if reason is None:
        device = in_common(gpus[: every.on_each_host])
        if _fits(make_plan(every.total, device)) or not _fits(make_plan(1, in_common(gpus[:1]))):
            return every
        reason = "only the memory plans of a single process fit the GPU's memory"
    return ProcessCount(
        on_each_host=1,
        hosts=1,
        warnings=(f"One process trains this job, where {every.total} could: {reason}.",),
    )


def refuse_missing_gpus(processes: int, gpus: Sequence[DeviceFacts]) -> None:
    """Raise HyperparameterError where two processes would share a GPU."""
    if gpus and processes > len(gpus):
        raise HyperparameterError(
            f"processes={processes} needs as many GPUs, and this host shows {len(gpus)}: set "
            "processes=auto, or CUDA_VISIBLE_DEVICES=-1 to train on the CPU."
        )


def _reason_for_one(hyperparameters: Hyperparameters) -> str | None:
    """Return why a single process trains a job with these settings, None where several can."""
    named = MEMORY_PLANS.get(hyperparameters.memory_plan)
    if named is not None and named.frees_gradients:
        return f"memory_plan={hyperparameters.memory_plan} frees gradients that others would need"
    return "fast_step works in a single process" if hyperparameters.fast_step else None


def _fits(plan: TrainingPlan) -> bool:
    return memory_plan.fits(plan.phases, plan.device, plan.processes)
