"""Draw sample pictures, and those of the scores, with the model in training."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from dreambooth.data.seeds import derive_seed
from dreambooth.diffusion import safety, sampling
from dreambooth.diffusion.model import DiffusionModel
from dreambooth.diffusion.sampling_request import SamplingRequest
from dreambooth.errors import in_one_line
from dreambooth.job.task import Task
from dreambooth.limits import LIMITS
from dreambooth.process import failure
from dreambooth.process.memory import is_out_of_memory
from dreambooth.training.mixed_precision import Precision

log = logging.getLogger(__name__)

NUM_INFERENCE_STEPS = 25
GUIDANCE_SCALE = 7.5


def failure_reason(error: Exception) -> str:
    """Return in one line why something could not be drawn, for a warning."""
    if is_out_of_memory(error):
        return "memory ran out while it was drawn"
    known = failure.for_the_user(error)
    if known is not None:
        return str(known)
    log.debug("what went wrong while drawing", exc_info=error)
    return f"{type(error).__name__}: {in_one_line(error)}"


def side_by_side(samples: Mapping[str, Image.Image]) -> Image.Image | None:
    """Return sample pictures of one size as one picture; None without any."""
    pictures = list(samples.values())
    if len(pictures) < 2:
        return pictures[0] if pictures else None
    width, height = pictures[0].size
    row = Image.new("RGB", (width * len(pictures), height))
    for number, picture in enumerate(pictures):
        row.paste(picture, (number * width, 0))
    return row


@dataclass(frozen=True, slots=True, kw_only=True)
class Previews:
    """Draws pictures with the model in training, with noise from random generators of its own.

    text: prompt -> encoder_hidden_states, empty where the text encoder is trained.
    """

    task: Task
    model: DiffusionModel
    precision: Precision
    text: Mapping[str, torch.Tensor]

    def sample(self) -> dict[str, Image.Image]:
        """Return a sample picture of each of the task's sample prompts, drawn with a fixed seed.

        One is left out, with a warning, where it is not finite, is hidden by the model's safety
        checker or cannot be drawn: a failed picture must not end the training.
        """
        return self.pictures(
            self.task.sample_prompts,
            seed=derive_seed(self.task.hyperparameters.seed, "sample picture"),
            num_inference_steps=NUM_INFERENCE_STEPS,
            what="sample picture",
        )

    def pictures(
        self, prompts: Iterable[str], *, seed: int, num_inference_steps: int, what: str
    ) -> dict[str, Image.Image]:
        """Return a picture of each prompt, as `sample` does. what: their name in a warning."""
        found = {
            prompt: self._picture(prompt, seed, num_inference_steps, what) for prompt in prompts
        }
        return {prompt: picture for prompt, picture in found.items() if picture is not None}

    def _picture(
        self, prompt: str, seed: int, num_inference_steps: int, what: str
    ) -> Image.Image | None:
        reason = None
        try:
            picture = next(self.draw(prompt, [seed], num_inference_steps=num_inference_steps))
            if picture is None:
                reason = "it is not finite"
            elif self._is_hidden(picture):
                reason = "the model's safety checker hides it"
        except Exception as error:  # a model's own noise scheduler may raise anything
            picture, reason = None, failure_reason(error)
        if picture is None or reason is not None:
            log.warning("no %s: %s", what, reason)
            return None
        return Image.fromarray(picture)

    def _is_hidden(self, picture: npt.NDArray[np.uint8]) -> bool:
        # Loaded anew each time, so that it takes no memory while the model is trained.
        checker = safety.load(
            self.task.model_folder, device=torch.device("cpu"), dtype=torch.float32
        )
        return checker is not None and checker.hides(picture)

    def draw(
        self, prompt: str, seeds: Sequence[int], *, num_inference_steps: int | None = None
    ) -> Iterator[npt.NDArray[np.uint8] | None]:
        """Yield one picture uint8 [H,W,3] per seed, None where it is not finite.

        num_inference_steps: None for those of sample pictures. The VAE is on the device only while
        pictures are drawn.
        """
        requests = [
            SamplingRequest(
                prompt=prompt,
                num_inference_steps=num_inference_steps or NUM_INFERENCE_STEPS,
                guidance_scale=GUIDANCE_SCALE,
                width=self.task.resolution,
                height=self.task.resolution,
                seed=seed,
            )
            for seed in seeds
        ]
        batch_size = min(self.task.hyperparameters.batch_size, LIMITS.max_generated_batch)
        self.model.vae.to(self.task.device)
        try:
            with self.precision.autocast():
                yield from sampling.generate(
                    self.model, requests, batch_size=batch_size, text=self.text
                )
        finally:
            self.model.vae.to("cpu")
