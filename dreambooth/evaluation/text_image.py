"""Measures with a whole CLIP model how well pictures fit their prompts.

Legend: N pictures, D width of an embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dreambooth.diffusion import text_encoders
from dreambooth.errors import ModelArtifactError
from dreambooth.evaluation import features, vision_model
from dreambooth.evaluation.features import FeatureNetwork
from dreambooth.evaluation.measures import of_length_one
from dreambooth.model_folder import configuration, layout
from dreambooth.model_folder.component_classes import CLIP


@dataclass(frozen=True, slots=True, kw_only=True)
class TextImage:
    """The two halves of a CLIP model, on one device."""

    pictures: FeatureNetwork
    _tokenizer: Any
    _text: Any

    def fit(self, embeddings: npt.NDArray[np.float64], prompt: str) -> npt.NDArray[np.float64]:
        """Return [N] the cosine of each picture's embedding [N,D] to the prompt's (CLIP-T).

        Prompts are cut at the length that the model reads.
        """
        length = text_encoders.prompt_length(self._tokenizer, self._text)
        ids = self._tokenizer(
            [prompt], max_length=length, truncation=True, padding="max_length", return_tensors="pt"
        ).input_ids
        with torch.no_grad():
            embedding = self._text(ids.to(self._text.device)).text_embeds
        of_text = of_length_one(embedding.double().cpu().numpy())
        fits: npt.NDArray[np.float64] = (of_length_one(embeddings) @ of_text.T)[:, 0]
        return fits


def load(folder: str, device: torch.device) -> TextImage:
    """Load a folder of a whole CLIP model in transformers' layout, with its tokenizer.

    Raises ModelArtifactError, and UserError for an address.
    """
    vision = vision_model.read(folder, setting="--text_image")
    path = vision.folder / "config.json"
    config = configuration.checked(path, layout.read_json(path), "vision_model")
    text = config.get("text_config")
    if vision.kind != "clip" or not isinstance(text, dict):
        raise ModelArtifactError(
            f"{path} is not of a whole CLIP model, of pictures and text: give --text_image the "
            "folder of one."
        )
    settings = {**text, "projection_dim": config.get("projection_dim", 512)}
    network = features.load_network(
        vision.folder,
        "CLIPTextConfig",
        "CLIPTextModelWithProjection",
        settings,
        setting=vision.setting,
    )
    return TextImage(
        pictures=features.of_vision_model(vision, device),
        _tokenizer=text_encoders.load_tokenizer(CLIP, Path(vision.folder)),
        _text=network.to(device=device, dtype=torch.float32).eval(),
    )
