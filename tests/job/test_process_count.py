"""How many processes `processes` means on a host with some GPUs."""

from __future__ import annotations

import pytest

from benchmarks.train_step.full_size import FACTS
from dreambooth.data import dataset_info
from dreambooth.errors import HyperparameterError
from dreambooth.job import process_count
from dreambooth.settings.hyperparameters import Hyperparameters
from dreambooth.tiny import DATA
from dreambooth.training import plan as plans
from dreambooth.training.device import DeviceFacts
from dreambooth.training.plan import TrainingPlan

GIB = 2**30


def gpus(count: int, gibibytes: int = 22) -> list[DeviceFacts]:
    return [
        DeviceFacts(
            kind="cuda",
            name="a GPU",
            compute_capability=(8, 6),
            memory_bytes=gibibytes * GIB,
            free_bytes=gibibytes * GIB,
        )
    ] * count


def chosen(
    devices: list[DeviceFacts], hosts: int = 1, **settings: object
) -> process_count.ProcessCount:
    asked = Hyperparameters(**settings)  # type: ignore[arg-type]
    data = dataset_info.read(DATA / "cat", class_data_dir="class_data_dir")

    def make(processes: int, device: DeviceFacts) -> TrainingPlan:
        return plans.make(asked, data, FACTS, device, processes=processes)

    return process_count.choose(asked, devices, hosts, make)


@pytest.mark.parametrize(
    ("devices", "hosts", "processes", "expected"),
    [
        ([], 1, "auto", (1, 1)),
        ([], 2, "auto", (1, 2)),
        ([], 1, "2", (2, 1)),
        (gpus(1), 1, "auto", (1, 1)),
        (gpus(4), 2, "auto", (4, 2)),
        (gpus(20), 1, "auto", (16, 1)),
        (gpus(4), 2, "2", (2, 2)),
        (gpus(4), 2, "1", (1, 1)),
    ],
)
def test_auto_is_one_per_gpu_and_1_is_one_for_the_job(
    devices: list[DeviceFacts], hosts: int, processes: str, expected: tuple[int, int]
) -> None:
    count = chosen(devices, hosts, processes=processes)
    assert (count.on_each_host, count.hosts) == expected
    assert count.warnings == ()


@pytest.mark.parametrize(
    ("gibibytes", "settings", "reason"),
    [
        (22, {"memory_plan": "fp32_adamw_in_backward"}, "frees gradients"),
        (22, {"fast_step": True}, "fast_step works in a single process"),
        (7, {}, "only the memory plans of a single process fit"),
    ],
)
def test_auto_is_one_where_only_one_process_can_do_what_is_asked(
    gibibytes: int, settings: dict[str, object], reason: str
) -> None:
    count = chosen(gpus(4, gibibytes), **settings)
    assert count.total == 1
    (warning,) = count.warnings
    assert warning.startswith("One process trains this job, where 4 could: ")
    assert reason in warning


def test_two_processes_share_no_gpu() -> None:
    with pytest.raises(HyperparameterError, match=r"processes=2 needs as many GPUs, .* shows 1"):
        chosen(gpus(1), processes="2")
