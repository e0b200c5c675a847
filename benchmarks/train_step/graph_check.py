"""Check on a GPU that replays of the fast step's CUDA graph are bit-equal to eager calls.

Losses and all gradients are compared, with deterministic kernels. If eager calls themselves do not
repeat bit for bit, nothing follows from the comparison.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth.diffusion.loss import dreambooth_loss
from dreambooth.fast.cuda_graphs import CapturedCall
from dreambooth.fast.graphed_passes import Capture, GraphedPasses
from dreambooth.model_folder.facts import read_facts
from dreambooth.model_folder.layout import component_config
from dreambooth.training.loop import predict
from dreambooth.training.mixed_precision import DTYPES

BATCHES = 3
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphCheck:
    """The result of the check, over all batches and bit for bit.

    captured: whether a graph was captured at all. error: the exception that ended the check, if
    any.
    """

    captured: bool = False
    eager_repeats: bool = False
    graph_equals_eager: bool = False
    error: str | None = None

    @property
    def in_words(self) -> str:
        """Return the result as one line."""
        if self.fault is not None:
            return self.fault
        if not self.eager_repeats:
            return "eager calls do not give their own bits twice: replays cannot be judged by them"
        return "replays of the CUDA graph are bit-equal to eager calls"

    @property
    def fault(self) -> str | None:
        """Return what is wrong with the fast step, None if nothing was found."""
        if self.error is not None:
            return self.error
        if not self.captured:
            return "the passes could not be captured as a CUDA graph"
        wrong = self.eager_repeats and not self.graph_equals_eager
        return "replays of the CUDA graph are not bit-equal to eager calls" if wrong else None


def check(
    model: Path, device: torch.device, *, mixed_precision: str, pictures: int, capture: Capture
) -> GraphCheck:
    """Check the U-Net of a model folder's configuration, with random weights and batches."""
    captures: list[CapturedCall] = []

    def noted(call: Callable[[], Tensor], prepare: Callable[[], None]) -> CapturedCall:
        captures.append(capture(call, prepare))
        return captures[-1]

    with _deterministic():
        unet = _unet(model, device, DTYPES[mixed_precision])
        weights = list(unet.parameters())

        def one_pass(noisy: Tensor, timesteps: Tensor, text: Tensor, target: Tensor) -> Tensor:
            model_pred = predict(unet, noisy, timesteps, text)
            total = dreambooth_loss(
                model_pred, target, instances=pictures, prior_loss_weight=1.0
            ).total
            total.backward()  # type: ignore[no-untyped-call]
            return total.detach()[None]

        def eager(given: Inputs) -> list[Tensor]:
            for weight in weights:
                weight.grad = None
            return [one_pass(*given), *map(_gradient, weights)]

        graphed = GraphedPasses(one_pass, weights, noted)
        repeats = equals = True
        for number in range(BATCHES):
            given = _inputs(model, unet, device, pictures=pictures, seed=number)
            losses = graphed(*given)
            held = [_gradient(weight) for weight in weights]
            replayed = [losses, *(gradient.clone() for gradient in held)]
            first = eager(given)
            equals = equals and _equal(first, replayed)
            repeats = repeats and _equal(first, eager(given))
            for weight, gradient in zip(weights, held, strict=True):
                weight.grad = gradient  # the tensor that a replay writes to
    return GraphCheck(captured=bool(captures), eager_repeats=repeats, graph_equals_eager=equals)


def _unet(model: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device(device):
        unet: Any = UNet2DConditionModel.from_config(component_config(model, "unet"))
    nn.Module.to(unet, dtype)
    trained: nn.Module = unet.train()
    return trained


def _inputs(model: Path, unet: Any, device: torch.device, *, pictures: int, seed: int) -> Inputs:
    facts = read_facts(model)
    side = facts.resolution // facts.vae_scale_factor
    tokens = component_config(model, "text_encoder")["max_position_embeddings"]
    draw = torch.Generator().manual_seed(seed)
    shape = (pictures, unet.config.in_channels, side, side)
    drawn = (
        torch.randn(shape, generator=draw),
        torch.randint(1000, (pictures,), generator=draw),
        torch.randn(pictures, tokens, unet.config.cross_attention_dim, generator=draw),
        torch.randn(shape, generator=draw),
    )
    noisy, timesteps, text, target = (tensor.to(device) for tensor in drawn)
    return noisy, timesteps, text, target


def _gradient(weight: nn.Parameter) -> Tensor:
    assert weight.grad is not None
    return weight.grad


def _equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@contextmanager
def _deterministic() -> Iterator[None]:
    # cuBLAS reads this variable when its first handle is created.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    # With warn_only the backward passes of flash and memory-efficient attention stay as they are.
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
