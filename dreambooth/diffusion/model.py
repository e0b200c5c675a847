"""A Stable Diffusion model in memory: loads it from a folder, encodes prompts and pictures.

Legend of shapes: B batch, C channels, H W pixels, h w latent cells, L tokens, D text width.

The folder is untrusted data: configurations are checked against fixed lists (`layout`), our code
chooses the classes, and weights are matched by name (`weights`). The libraries' own
`from_pretrained` is used for the tokenizer only, because it merely warns of unknown weights,
missing weights and unknown files.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch

from dreambooth.diffusion import text_encoders, trial
from dreambooth.diffusion.sampling_request import step_range
from dreambooth.diffusion.trial import faults_of
from dreambooth.errors import ModelArtifactError
from dreambooth.limits import LIMITS, Limits
from dreambooth.model_folder import layout, weights
from dreambooth.model_folder.facts import ModelFacts, read_facts
from dreambooth.model_folder.weight_names import current_vae_name

logger = logging.getLogger(__name__)

# Characters of a prompt that are logged; prompts are untrusted and may have thousands.
_LOGGED = 80
_MOST_REPORTED = 64  # truncated prompts that are remembered as reported
_SCHEDULER = "scheduler/scheduler_config.json"
_TRIED_STEPS = 50  # the default of num_inference_steps


@dataclass(slots=True, kw_only=True)
class DiffusionModel:
    """The parts of one model folder; each can be moved, cast or replaced on its own.

    `load` leaves `unet`, `vae` and `text_encoder` in eval mode and without gradients. `resolution`:
    the side in pixels that the model was trained on. `reported_prompts`: the prompts that
    `tokenize` has warned of.
    """

    folder: Path
    tokenizer: Any
    text_encoder: Any
    vae: Any
    unet: Any
    scheduler_config: dict[str, Any]
    scheduler_class: str
    resolution: int
    facts: ModelFacts
    reported_prompts: deque[str] = field(
        default_factory=lambda: deque(maxlen=_MOST_REPORTED), compare=False, repr=False
    )

    @property
    def latent_channels(self) -> int:
        """Return C, the channels of the latents: 4 for Stable Diffusion."""
        return self.facts.latent_channels

    @property
    def vae_scale_factor(self) -> int:
        """Return how many pixels one side of a latent cell spans: 8 for Stable Diffusion."""
        return self.facts.vae_scale_factor

    @property
    def prediction_type(self) -> str:
        """Return what the U-Net predicts: "epsilon", "v_prediction" or "sample"."""
        return str(self.scheduler_config.get("prediction_type", "epsilon"))

    @property
    def device(self) -> torch.device:
        """Return the device of the U-Net."""
        device: torch.device = next(iter(self.unet.parameters())).device
        return device

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        parts: Sequence[str] = layout.TRAINED_PARTS,
    ) -> DiffusionModel:
        """Move and cast the named parts (by default all three) in place; return the model."""
        for part in parts:
            getattr(self, part).to(device=device, dtype=dtype)
        return self


def load(
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    limits: Limits = LIMITS,
) -> DiffusionModel:
    """Load a diffusers folder without using the network or running code from the folder.

    Weights of any float type are loaded as `dtype` onto `device`, in eval mode, without gradients.
    Raises ModelArtifactError, naming the file, unless the folder is a complete and well-formed
    Stable Diffusion model.
    """
    layout.validate_folder(folder, limits=limits)
    index = layout.read_index(folder, limits=limits)
    facts = read_facts(folder, to_train=False, limits=limits)
    unet = _build(folder, "unet", diffusers.UNet2DConditionModel.from_config, limits)
    vae = _build(folder, "vae", diffusers.AutoencoderKL.from_config, limits)
    family = layout.text_family(folder, limits=limits)
    build_text_encoder = functools.partial(text_encoders.build, family)
    text_encoder = _build(folder, "text_encoder", build_text_encoder, limits)
    for part, module, rename in (
        ("unet", unet, str),
        ("vae", vae, current_vae_name),
        ("text_encoder", text_encoder, text_encoders.renamer(text_encoder)),
    ):
        weights.load_into(
            module, folder / part, device=device, dtype=dtype, rename=rename, limits=limits
        )
        module.requires_grad_(False).eval().to(device)  # buffers too
    model = DiffusionModel(
        folder=folder,
        tokenizer=text_encoders.load_tokenizer(family, folder / "tokenizer", limits),
        text_encoder=text_encoder,
        vae=vae,
        unet=unet,
        scheduler_config=layout.component_config(folder, "scheduler", limits=limits),
        scheduler_class=index["scheduler"][1],
        resolution=facts.resolution,
        facts=facts,
    )
    _check_fit(model)
    _try_all(model)
    return model


def training_noise_scheduler(model: DiffusionModel) -> Any:
    """Return a diffusers DDPMScheduler with the model's own betas and prediction type."""
    return _scheduler(model, "DDPMScheduler")


def sampling_scheduler(model: DiffusionModel) -> Any:
    """Return a new noise scheduler of the class and settings that the folder names."""
    return _scheduler(model, model.scheduler_class)


def tokenize(model: DiffusionModel, prompts: Sequence[str]) -> torch.Tensor:
    """Return the token ids of prompts, int64 [B, L], padded to the text encoder's length.

    Tokens of several vectors are `expanded`. Padding is marked where the text encoder takes a mask.
    Prompts of more than L tokens (77 for Stable Diffusion) are truncated. The log warns of each
    such prompt once, however often it comes.
    """
    length = text_encoders.prompt_length(model.tokenizer, model.text_encoder)
    expanded = [text_encoders.expanded(model.tokenizer, prompt) for prompt in prompts]
    rows = model.tokenizer(
        expanded,
        padding="max_length",
        max_length=length,
        truncation=True,
        return_tensors="pt",
        return_attention_mask=True,
    )
    for i, prompt in enumerate(prompts):
        if rows.encodings:  # a tokenizer in Rust, which returns what it cut off
            cut = bool(rows.encodings[i].overflowing)
        else:  # a tokenizer in Python; a row that has padding was not cut
            full = bool(rows.attention_mask[i].all())
            cut = full and len(model.tokenizer(expanded[i]).input_ids) > length
        if cut and prompt not in model.reported_prompts:
            model.reported_prompts.append(prompt)
            logger.warning(
                "A prompt is longer than the %d tokens that the text encoder reads; its end is "
                "ignored: %r",
                length,
                prompt[:_LOGGED] + "..." * (len(prompt) > _LOGGED),
            )
    return text_encoders.with_marked_padding(
        model.text_encoder, torch.as_tensor(rows.input_ids), torch.as_tensor(rows.attention_mask)
    )


@torch.no_grad()
def encode_text(model: DiffusionModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Return encoder_hidden_states [B, L, D] of token ids int64 [B, L], without gradients."""
    return text_features(model, input_ids)


def text_features(model: DiffusionModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Return what `encode_text` returns, with gradients, for training the text encoder."""
    input_ids = input_ids.to(next(iter(model.text_encoder.parameters())).device)
    return text_encoders.encode(model.text_encoder, input_ids)


@torch.no_grad()
def encode_posterior(
    model: DiffusionModel, pixels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the latent posterior, mean and std [B, C, h, w], of float32 [B, 3, H, W] pixels -1..1.

    Both are unscaled: latents for the U-Net are `(mean + std * noise) * vae.config.scaling_factor`.
    """
    posterior = model.vae.encode(pixels.to(model.vae.device, model.vae.dtype)).latent_dist
    return posterior.mean, posterior.std


def _build(
    folder: Path, part: str, construct: Callable[[dict[str, Any]], Any], limits: Limits
) -> Any:
    config = layout.component_config(folder, part, limits=limits)
    return trial.build(construct, config, folder / part / "config.json")


def _scheduler(model: DiffusionModel, name: str) -> Any:
    with faults_of(model.folder / _SCHEDULER, name):
        return copy.deepcopy(_unused_scheduler(name, json.dumps(model.scheduler_config)))


@functools.lru_cache(maxsize=8)
def _unused_scheduler(name: str, config: str) -> Any:
    # To build a KDPM2DiscreteScheduler takes 0.15 s, and to copy it less than a millisecond.
    return getattr(diffusers, name).from_config(json.loads(config))


def _check_fit(model: DiffusionModel) -> None:
    # Parts that load one by one may still not fit together.
    tokens = max(model.tokenizer.get_vocab().values()) + 1
    known = model.text_encoder.config.vocab_size
    if tokens > known:
        raise ModelArtifactError(
            f"{model.folder}: the tokenizer has {tokens} tokens, and the text encoder {known}."
        )
    unet = model.unet.config
    is_projected = unet.encoder_hid_dim_type == "text_proj"
    read = unet.encoder_hid_dim if is_projected else unet.cross_attention_dim
    for name, here, there in (
        ("text width", text_encoders.width(model.text_encoder), read),
        ("latent channels", model.vae.config.latent_channels, unet.in_channels),
    ):
        if any(here != each for each in (there if isinstance(there, (list, tuple)) else [there])):
            raise ModelArtifactError(
                f"{model.folder}: the U-Net's {name} is {there}, where the model's other parts "
                f"have {here}; only text-to-image models can be used."
            )


def _try_all(model: DiffusionModel) -> None:
    """Use each part once as drawing and training do (`trial`), so that neither fails later."""
    folder, channels = model.folder, model.latent_channels
    scheduler = sampling_scheduler(model)
    steps = min(_TRIED_STEPS, step_range(model.scheduler_class, model.scheduler_config)[-1])
    what = f"{model.scheduler_class} that can sample in {steps} steps"
    with faults_of(folder / _SCHEDULER, what):
        trial.sample(scheduler, channels=channels, num_inference_steps=steps)
    training = training_noise_scheduler(model)
    with faults_of(folder / _SCHEDULER, "noise schedule that can be trained with"):
        trial.add_noise(training, channels=channels)
    configs = {part: folder / part / "config.json" for part in layout.TRAINED_PARTS}
    with faults_of(configs["text_encoder"], "text encoder that can encode a prompt"):
        ids = tokenize(model, [""])
        text = (1, ids.shape[1], text_encoders.width(model.text_encoder))
        trial.expect("text", encode_text(model, ids), text)
    cells = max(1, model.resolution // model.vae_scale_factor)
    with faults_of(configs["unet"], "U-Net of latents, timestep and text"):
        trial.predict(model.unet, cells=cells, text=text)
    with faults_of(configs["vae"], "VAE of RGB pictures"):
        trial.encode_and_decode(model.vae, scale=model.vae_scale_factor)
