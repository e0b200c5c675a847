from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.train_step import graph_check
from benchmarks.train_step.graph_check import GraphCheck
from dreambooth.fast.cuda_graphs import CapturedCall
from dreambooth.fast.graphed_passes import without_capture


def check(model: Path, capture: Callable[..., CapturedCall]) -> GraphCheck:
    return graph_check.check(
        model, torch.device("cpu"), mixed_precision="bf16", pictures=1, capture=capture
    )


def test_a_capture_that_makes_the_same_calls_is_equal(small_model_folder: Path) -> None:
    found = check(small_model_folder, without_capture)
    assert found == GraphCheck(captured=True, eager_repeats=True, graph_equals_eager=True)
    assert found.fault is None
    assert found.in_words == "replays of the CUDA graph are bit-equal to eager calls"
    assert not torch.are_deterministic_algorithms_enabled()


def test_kernels_that_do_not_repeat_are_refused_and_not_only_warned_of(
    small_model_folder: Path,
) -> None:
    """Attention's backward passes on CUDA are deterministic only then."""
    asked = []

    def capture(call: Any, prepare: Any) -> CapturedCall:
        asked.append(torch.are_deterministic_algorithms_enabled())
        asked.append(torch.is_deterministic_algorithms_warn_only_enabled())
        return without_capture(call, prepare)

    check(small_model_folder, capture)
    assert asked == [True, False]


@pytest.mark.parametrize("wrong", ["loss", "gradient", "never replayed"])
def test_a_capture_that_differs_is_found_out(small_model_folder: Path, wrong: str) -> None:
    def capture(call: Any, prepare: Any) -> CapturedCall:
        captured = without_capture(call, prepare)

        def replay() -> None:
            if wrong == "never replayed":
                return
            captured.replay()
            if wrong == "loss":
                captured.output.mul_(1 + 2**-20)
            else:
                call.__self__._weights[-1].grad.view(-1)[0] += 0.5

        return CapturedCall(replay=replay, output=captured.output)

    found = check(small_model_folder, capture)
    assert (found.eager_repeats, found.graph_equals_eager) == (True, False)
    assert found.fault == "replays of the CUDA graph are not bit-equal to eager calls"


def test_calls_made_for_want_of_a_graph_prove_nothing(small_model_folder: Path) -> None:
    def fails(call: object, prepare: object) -> CapturedCall:
        raise RuntimeError("not permitted")

    found = check(small_model_folder, fails)
    assert not found.captured
    assert found.fault == "the passes could not be captured as a CUDA graph"


def test_kernels_that_do_not_repeat_say_nothing_about_graphs() -> None:
    found = GraphCheck(captured=True)
    assert found.fault is None
    assert "cannot be judged" in found.in_words
    assert GraphCheck(error="no room").in_words == "no room"
