"""The request for a picture, and the check of what a model allows (standard library only)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth.errors import ModelArtifactError, RequestError, quoted
from dreambooth.limits import LIMITS, Limits
from dreambooth.model_folder import facts as model_facts
from dreambooth.model_folder.component_classes import TWO_CALLS_PER_STEP
from dreambooth.model_folder.layout import component_config, read_index


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRequest:
    """A request for one picture.

    width, height: pixels, multiples of 8; None: the model's resolution. guidance_scale: w of
    equation (2) of Imagen (arXiv 2205.11487); 1 and below: no guidance and half the work. seed:
    0..2**64-1, of this picture alone. eta: 0..1, the eta of DDIM (arXiv 2010.02502); noise
    schedulers that have none ignore it.
    """

    prompt: str
    negative_prompt: str = ""
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    width: int | None = None
    height: int | None = None
    seed: int
    eta: float = 0.0

    @property
    def guided(self) -> bool:
        """Return whether classifier-free guidance applies."""
        return self.guidance_scale > 1.0

    @property
    def unet_rows(self) -> int:
        """Return how many rows of a U-Net call the picture takes: 2 with guidance, else 1."""
        return 2 if self.guided else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingFacts:
    """The sizes and step counts that a model allows.

    resolution: side in pixels if the request names none. unit: every side is a multiple of this
    many pixels. min_steps, max_steps: the num_inference_steps that the noise schedule has room for.
    calls_per_step: U-Net calls per step; 2 with noise schedulers of second order.
    """

    resolution: int
    unit: int
    min_steps: int = 1
    max_steps: int
    calls_per_step: int = 1


def facts_from(
    *,
    resolution: int,
    vae_scale_factor: int,
    scheduler_class: str,
    scheduler_config: Mapping[str, Any],
) -> SamplingFacts:
    """Derive the facts from a model's resolution (pixels), VAE and noise schedule."""
    steps = step_range(scheduler_class, scheduler_config)
    return SamplingFacts(
        resolution=model_facts.drawn_side(resolution, vae_scale_factor),
        unit=max(model_facts.SMALLEST_UNIT, vae_scale_factor),
        min_steps=steps[0],
        max_steps=steps[-1],
        calls_per_step=2 if scheduler_class in TWO_CALLS_PER_STEP else 1,
    )


def read_facts(folder: Path, *, limits: Limits = LIMITS) -> SamplingFacts:
    """Read the facts of a model folder from its JSON files and weight headers, in milliseconds.

    Raises ModelArtifactError for a folder that is no Stable Diffusion model.
    """
    facts = model_facts.read_facts(folder, to_train=False, limits=limits)
    return facts_from(
        resolution=facts.resolution,
        vae_scale_factor=facts.vae_scale_factor,
        scheduler_class=read_index(folder, limits=limits)["scheduler"][1],
        scheduler_config=component_config(folder, "scheduler", limits=limits),
    )


def check(facts: SamplingFacts, request: SamplingRequest, *, limits: Limits = LIMITS) -> None:
    """Raise RequestError, in one sentence, if a model of these facts cannot serve the request."""
    unit, longest = facts.unit, limits.max_generated_side_pixels
    width, height = picture_size(facts, request)
    for name, side in (("width", width), ("height", height)):
        if side < unit or side % unit or side > longest:
            raise RequestError(
                f"{name} must be a multiple of {unit} from {unit} to {longest}, not {side}."
            )
    if width * height > limits.max_generated_pixels:
        raise RequestError(
            f"width x height must be at most {limits.max_generated_pixels} pixels, "
            f"not {width} x {height}."
        )
    if not facts.min_steps <= request.num_inference_steps <= facts.max_steps:
        raise RequestError(
            f"num_inference_steps must lie between {facts.min_steps} and {facts.max_steps}, "
            f"not {request.num_inference_steps}."
        )
    if not abs(request.guidance_scale) <= limits.max_guidance_scale:  # `not` catches NaN
        raise RequestError(
            f"guidance_scale must lie between -{limits.max_guidance_scale:.0f} and "
            f"{limits.max_guidance_scale:.0f}, not {request.guidance_scale}."
        )
    if not 0.0 <= request.eta <= 1.0:
        raise RequestError(f"eta must lie between 0 and 1, not {request.eta}.")
    if not 0 <= request.seed < 2**64:
        raise RequestError(f"seed must lie between 0 and 2**64 - 1, not {request.seed}.")


def step_range(scheduler_class: str, scheduler_config: Mapping[str, Any]) -> range:
    """Return the num_inference_steps that a noise schedule can be set to.

    PNDM's Runge-Kutta steps, unless they are skipped, need four. With more steps than the last,
    steps_offset would push the first timestep past the end of the schedule. Raises
    ModelArtifactError for a configuration whose numbers are not whole or leave no room for a step.
    """
    timesteps = scheduler_config.get("num_train_timesteps", 1000)
    offset = scheduler_config.get("steps_offset", 0)
    if type(timesteps) is not int or type(offset) is not int:
        raise ModelArtifactError(
            "scheduler_config.json must give whole numbers as num_train_timesteps and "
            f"steps_offset, not {quoted(timesteps)} and {quoted(offset)}."
        )
    has_runge_kutta = scheduler_class == "PNDMScheduler" and not scheduler_config.get(
        "skip_prk_steps"
    )
    least = 4 if has_runge_kutta else 1
    if timesteps - offset < least:
        raise ModelArtifactError(
            f"scheduler_config.json gives {timesteps} num_train_timesteps and a steps_offset of "
            f"{offset}, which leaves no step to take."
        )
    return range(least, timesteps - offset + 1)


def picture_size(facts: SamplingFacts, request: SamplingRequest) -> tuple[int, int]:
    """Return (width, height) in pixels: as requested, or else the model's resolution."""
    width = facts.resolution if request.width is None else request.width
    height = facts.resolution if request.height is None else request.height
    return width, height
