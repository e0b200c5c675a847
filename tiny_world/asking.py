"""Draw prompts with a model, using this project's sampler, and let the judge read the pictures."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dreambooth.commands import evaluate
from dreambooth.diffusion import model as models
from dreambooth.diffusion.model import DiffusionModel
from dreambooth.errors import UserError
from dreambooth.tiny import judge_network
from dreambooth.tiny.judge_network import Pictures
from tiny_world import answers, judge
from tiny_world.answers import Answers
from tiny_world.brush import SIZE
from tiny_world.judge import Verdict
from tiny_world.questions import Questions

SAMPLINGS = {"3.5": (3.5, 25), "7.5": (7.5, 50)}
"""(guidance_scale, num_inference_steps): the embedded model's own, and the served defaults."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The sampling settings of an interview.

    Picture i of every prompt and model has the seed `seed` + i, so that prompts and models are
    compared on the same noise. pictures: per prompt. precision: fp32, or bf16 by autocast.
    """

    pictures: int
    guidance_scale: float
    num_inference_steps: int
    seed: int
    batch_size: int
    precision: str = "fp32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Interview:
    """The questions, pictures, verdicts and answers of one model.

    pictures: uint8 [N,64,64,3] by prompt; a picture that is not finite is shown black, and its
    verdict is None. seconds: for drawing and reading.
    """

    questions: Questions
    pictures: Mapping[str, Pictures]
    verdicts: Mapping[str, Sequence[Verdict | None]]
    answers: Answers
    seconds: float

    @property
    def drawn(self) -> int:
        """Return the number of pictures of all prompts."""
        return sum(len(pictures) for pictures in self.pictures.values())


def ask(folder: Path, questions: Questions, settings: Settings, *, label: str) -> Interview:
    """Interview the model in `folder`, showing progress on stderr under `label`.

    Raises UserError for a model whose pictures are not 64x64, the size of the drawn world.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = models.load(folder, device=device)
    if model.resolution != SIZE:
        raise UserError(
            f"{folder} draws {model.resolution} x {model.resolution} pixels; the judge reads "
            f"pictures of the embedded world, {SIZE} x {SIZE}."
        )
    start = time.monotonic()
    pictures = _draw(model, questions.prompts, settings, label)
    network = judge_network.load()
    black = np.zeros((SIZE, SIZE, 3), dtype=np.uint8)
    shown = {
        prompt: np.stack([black if picture is None else picture for picture in row])
        for prompt, row in pictures.items()
    }
    verdicts = {
        prompt: [
            None if picture is None else verdict
            for picture, verdict in zip(row, judge.read(network, shown[prompt]), strict=True)
        ]
        for prompt, row in pictures.items()
    }
    return Interview(
        questions=questions,
        pictures=shown,
        verdicts=verdicts,
        answers=answers.count(questions, verdicts),
        seconds=time.monotonic() - start,
    )


def _draw(
    model: DiffusionModel, prompts: Sequence[str], settings: Settings, label: str
) -> dict[str, list[Pictures | None]]:
    with torch.autocast(model.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
        return evaluate.draw(
            model,
            prompts,
            label,
            pictures=settings.pictures,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            seed=settings.seed,
            batch_size=settings.batch_size,
        )
