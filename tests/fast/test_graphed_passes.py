"""What a captured call reads and writes, without a GPU: a replay runs the real passes again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dreambooth.fast.cuda_graphs import CapturedCall
from dreambooth.fast.graphed_passes import GraphedPasses, OnePass, without_capture
from dreambooth.process.memory import is_out_of_memory
from dreambooth.training import loop

Make = Callable[..., Any]


class AsCaptured:
    """Imitates a CUDA graph: a replay writes to the gradients' first addresses, sets no `grad`."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        self.weights = weights
        self.captured = 0

    def capture(self, call: Callable[[], Tensor], prepare: Callable[[], None]) -> CapturedCall:
        self.captured += 1
        prepare()
        output = call().clone()
        places = [weight.grad for weight in self.weights]

        def replay() -> None:
            seen = [weight.grad for weight in self.weights]
            prepare()
            output.copy_(call())
            for weight, place, mine in zip(self.weights, places, seen, strict=True):
                assert place is not None
                assert weight.grad is not None
                place.copy_(weight.grad)
                weight.grad = mine

        return CapturedCall(replay=replay, output=output)


def unet_and_pass(training: Any) -> tuple[nn.Module, OnePass]:
    unet = training.state.unet.to(torch.bfloat16)

    def one_pass(noisy: Tensor, timesteps: Tensor, text: Tensor, target: Tensor) -> Tensor:
        squared = (loop.predict(unet, noisy, timesteps, text).float() - target) ** 2
        squared.mean().backward()
        return torch.stack((squared.mean(), squared.min(), squared.max())).detach()

    return unet, one_pass


def inputs(training: Any, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, 4, 8, 8, generator=draw)
    timesteps = torch.randint(0, 1000, (2,), generator=draw)
    text = training.data.instance_text.expand(2, -1, -1)
    return latents, timesteps, text, torch.randn(latents.shape, generator=draw)


@pytest.mark.parametrize("captured", [False, True])
def test_replays_are_bit_equal_to_eager_calls(make_training: Make, captured: bool) -> None:
    training = make_training()
    unet, one_pass = unet_and_pass(training)
    weights = list(unet.parameters())
    capturer = AsCaptured(weights)
    graphed = GraphedPasses(one_pass, weights, capturer.capture if captured else without_capture)
    kept = []
    for seed in (1, 2, 1):
        given = inputs(training, seed)
        kept.append(graphed(*given))
        gradients = [weight.grad for weight in weights]
        unet.zero_grad()
        assert torch.equal(kept[-1], one_pass(*given))
        for gradient, weight in zip(gradients, weights, strict=True):
            assert torch.equal(gradient, weight.grad)  # type: ignore[arg-type]
            weight.grad = gradient  # where the captured call left it
    assert torch.equal(kept[0], kept[2])  # it is the caller's: later calls do not change it
    assert not torch.equal(kept[0], kept[1])
    assert capturer.captured == int(captured)


def test_whole_runs_are_bit_equal_whatever_replays_the_passes(make_training: Make) -> None:
    changes = {"fast_step": True, "mixed_precision": "bf16", "with_prior_preservation": True}
    plain, captured = make_training(**changes), make_training(**changes)
    made: list[AsCaptured] = []

    def capture(call: Callable[[], Tensor], prepare: Callable[[], None]) -> CapturedCall:
        # A real capture finds the weights that have gradients after a call.
        prepare()
        call()
        half = [o for o in gradients_of(call) if o.grad is not None]
        made.append(AsCaptured(half))
        return made[0].capture(call, prepare)

    expected = list(plain.steps())
    assert list(captured.steps(capture)) == expected
    assert torch.equal(captured.weights(), plain.weights())
    assert [len(one.weights) for one in made] == [len(list(plain.state.unet.parameters()))]


def gradients_of(call: Any) -> list[nn.Parameter]:
    """Return the weights of the GraphedPasses that the bound method `call` belongs to."""
    weights: list[nn.Parameter] = call.__self__._weights
    return weights


def test_what_cannot_be_captured_is_called_as_ever(
    make_training: Make, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(call: object, prepare: object) -> CapturedCall:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    changes = {"fast_step": True, "mixed_precision": "bf16"}
    plain, failing = make_training(**changes), make_training(**changes)
    expected = list(plain.steps())
    with caplog.at_level(logging.WARNING):
        assert list(failing.steps(fails)) == expected
    assert torch.equal(failing.weights(), plain.weights())
    (line,) = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert "not permitted when stream is capturing): they are launched one by one" in line


def test_running_out_of_memory_is_left_to_the_memory_plans(make_training: Make) -> None:
    def fails(call: object, prepare: object) -> CapturedCall:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:  # as when ending a failed capture fails as well
            raise RuntimeError("operation failed due to a previous error during capture")

    training = make_training(fast_step=True, mixed_precision="bf16")
    with pytest.raises(RuntimeError, match="previous error during capture") as caught:
        next(training.steps(fails))
    assert is_out_of_memory(caught.value)
