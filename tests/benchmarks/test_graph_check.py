from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dreambooth.benchmarks.train_step import graph_check
from dreambooth.benchmarks.train_step.graph_check import GraphCheck
from dreambooth.diffusion.cuda_graphs import Recording
from dreambooth.training.graphed_passes import by_calling


def check(model: Path, record: Callable[..., Recording]) -> GraphCheck:
    return graph_check.check(
        model, torch.device("cpu"), mixed_precision="bf16", pictures=1, record=record
    )


def test_a_recording_that_makes_the_same_calls_is_equal(small_model_folder: Path) -> None:
    found = check(small_model_folder, by_calling)
    assert found == GraphCheck(recorded=True, eager_repeats=True, graph_equals_eager=True)
    assert found.fault is None
    assert found.told == "replays of the CUDA graph are bit-equal to eager calls"
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("wrong", ["loss", "gradient", "never replayed"])
def test_a_recording_that_differs_is_found_out(small_model_folder: Path, wrong: str) -> None:
    def record(call: Any, prepare: Any) -> Recording:
        recording = by_calling(call, prepare)

        def replay() -> None:
            if wrong == "never replayed":
                return
            recording.replay()
            if wrong == "loss":
                recording.output.mul_(1 + 2**-20)
            else:
                call.__self__._weights[-1].grad.view(-1)[0] += 0.5

        return Recording(replay=replay, output=recording.output)

    found = check(small_model_folder, record)
    assert (found.eager_repeats, found.graph_equals_eager) == (True, False)
    assert found.fault == "replays of the CUDA graph are not bit-equal to eager calls"


def test_calls_made_for_want_of_a_graph_prove_nothing(small_model_folder: Path) -> None:
    def fails(call: object, prepare: object) -> Recording:
        raise RuntimeError("not permitted")

    found = check(small_model_folder, fails)
    assert not found.recorded
    assert found.fault == "the passes could not be recorded as a CUDA graph"


def test_kernels_that_do_not_repeat_say_nothing_about_graphs() -> None:
    found = GraphCheck(recorded=True)
    assert found.fault is None
    assert "cannot be judged" in found.told
    assert GraphCheck(error="no room").told == "no room"
