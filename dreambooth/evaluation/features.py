"""Features of pictures for the Fréchet distance: which network, and how it is fed.

Legend: N pictures, H W pixels, D width of a feature. Nothing is ever downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from dreambooth.diffusion import headers, layout
from dreambooth.diffusion.model import DiffusionModel
from dreambooth.errors import ModelArtifactError
from dreambooth.tiny import judge_network

Picture = npt.NDArray[np.uint8]

# What OpenAI's CLIP and most vision models after it were fed; a folder's own values go first.
_MEAN, _STD = (0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)
_VISION_MODELS = {
    "clip": "CLIPVisionModelWithProjection",
    "clip_vision_model": "CLIPVisionModelWithProjection",
    "dinov2": "Dinov2Model",
    "vit": "ViTModel",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureNetwork:
    """name: what the log says. one: a picture uint8 0..255 [H,W,3] -> a feature [D] on the CPU."""

    name: str
    one: Callable[[Picture], torch.Tensor]

    def __call__(self, pictures: Sequence[Picture]) -> npt.NDArray[np.float64]:
        """Features float64 [N,D]; one picture is in the network at a time."""
        with torch.no_grad():
            rows = [self.one(picture).double() for picture in pictures]
        stacked: npt.NDArray[np.float64] = torch.stack(rows).numpy()
        return stacked


def of_vae(model: DiffusionModel) -> FeatureNetwork:
    """What is at hand without a download: the VAE encoder's last hidden layer, mean over space."""
    vae = model.vae

    def one(picture: Picture) -> torch.Tensor:
        pixels = torch.tensor(picture, device=vae.device).permute(2, 0, 1)[None].to(vae.dtype)
        hidden = vae.encoder.conv_in(pixels / 127.5 - 1.0)
        for block in vae.encoder.down_blocks:
            hidden = block(hidden)
        feature: torch.Tensor = vae.encoder.mid_block(hidden).float().mean(dim=(2, 3))[0].cpu()
        return feature

    return FeatureNetwork(name="the model's own VAE encoder", one=one)


def of_judge() -> FeatureNetwork:
    """The embedded world's own classifier; pictures [64,64,3]."""
    network = judge_network.load()

    def one(picture: Picture) -> torch.Tensor:
        return network.embed(judge_network.to_pixels(picture[None]))[0]

    return FeatureNetwork(name="the judge of the embedded world", one=one)


def of_vision_model(folder: Path, device: torch.device) -> FeatureNetwork:
    """A vision model in transformers' layout: CLIP, DINOv2 or ViT, safetensors only.

    The feature is the pooled output (CLIP's image embedding). Raises ModelArtifactError.
    """
    import transformers

    path = folder / "config.json"
    config = layout.read_json(path)
    kind = config.get("model_type")
    if kind not in _VISION_MODELS or config.get("auto_map"):
        raise ModelArtifactError(
            f"fid_features: {path} is of the type {kind!r}; a folder of one of "
            f"{', '.join(sorted(_VISION_MODELS))} in transformers' layout is expected."
        )
    for weights in sorted(folder.glob("*.safetensors")):
        headers.read_header(weights)
    try:
        network = getattr(transformers, _VISION_MODELS[kind]).from_pretrained(
            folder, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelArtifactError(f"fid_features: {folder} cannot be loaded: {error}.") from error
    network.to(device).eval()
    size = int(config.get("image_size") or config.get("vision_config", {}).get("image_size", 224))
    mean, std = _normalisation(folder, device)

    def one(picture: Picture) -> torch.Tensor:
        resized = Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC)
        pixels = torch.tensor(np.asarray(resized), device=device).permute(2, 0, 1) / 255.0
        output: Any = network(pixel_values=((pixels - mean) / std)[None])
        pooled = output.image_embeds if hasattr(output, "image_embeds") else output.pooler_output
        feature: torch.Tensor = pooled[0].float().cpu()
        return feature

    return FeatureNetwork(name=f"{network.__class__.__name__} of {folder}", one=one)


def _normalisation(folder: Path, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    path = folder / "preprocessor_config.json"
    settings = layout.read_json(path) if path.is_file() else {}
    values = []
    for name, default in (("image_mean", _MEAN), ("image_std", _STD)):
        given = settings.get(name, default)
        try:
            values.append(torch.tensor(given, device=device).float().reshape(3, 1, 1))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ModelArtifactError(
                f"fid_features: {path} gives {name} as {json.dumps(given)[:80]}; "
                "three numbers are expected."
            ) from error
    return values[0], values[1]
