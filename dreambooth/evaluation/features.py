"""Computes features of pictures for the Fréchet distance, with one of several networks.

Legend: N pictures, H W pixels, D width of a feature. Nothing is ever downloaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from safetensors import SafetensorError

from dreambooth import tiny
from dreambooth.diffusion.model import DiffusionModel
from dreambooth.diffusion.text_encoders import BUILD_ERRORS
from dreambooth.errors import ModelArtifactError, in_one_line
from dreambooth.evaluation import efficientnet
from dreambooth.evaluation.vision_model import CLIP, VisionModel
from dreambooth.tiny import judge_network

Picture = npt.NDArray[np.uint8]
Head = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]
"""A linear layer that reads labels in features: weights [K,D] and biases [K] of K labels."""

# By the kind of a folder: the classes of its configuration and of its network, and the network's
# options. A ViT's pooler is not used: many folders, such as DINO's, come without its weights.
_CLASSES: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    **dict.fromkeys(CLIP, ("CLIPVisionConfig", "CLIPVisionModelWithProjection", {})),
    "dinov2": ("Dinov2Config", "Dinov2Model", {}),
    "vit": ("ViTConfig", "ViTModel", {"add_pooling_layer": False}),
}
_JUDGED_SIDE = 64  # pixels of the embedded world's pictures
# Endings of names: a weight that no feature depends on, and a table that is no weight.
_UNREAD = ("mask_token", "position_ids")


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureNetwork:
    """A network that turns pictures into features. name: for the log.

    one: maps a picture uint8 0..255 [H,W,3] to a feature [D] on the CPU. heads: what it was trained
    to read in them, by attribute, if anything.
    """

    name: str
    one: Callable[[Picture], torch.Tensor]
    heads: Mapping[str, Head] = field(default_factory=dict)

    def __call__(self, pictures: Sequence[Picture]) -> npt.NDArray[np.float64]:
        """Return features float64 [N,D]; one picture is in the network at a time.

        Raises ModelArtifactError where a feature is not finite.
        """
        with torch.no_grad():
            rows = [self.one(picture).double() for picture in pictures]
        stacked: npt.NDArray[np.float64] = torch.stack(rows).numpy()
        if not np.isfinite(stacked).all():
            raise ModelArtifactError(f"Features of {self.name} are not finite.")
        return stacked


def labels(features: npt.NDArray[np.float64], head: Head) -> npt.NDArray[np.int64]:
    """Return the number of the likeliest label [N] in features [N,D] as the network gives them."""
    weights, biases = head
    found: npt.NDArray[np.int64] = (features @ weights.T + biases).argmax(axis=1)
    return found


def choose(
    given: VisionModel | None, model: DiffusionModel, *, resolution: int, device: torch.device
) -> FeatureNetwork:
    """Return the network whose features are compared, for pictures that a model draws.

    It is the one that is given, else the judge for models of the embedded world, else
    EfficientNet-Lite0.
    """
    if given is not None:
        return of_vision_model(given, device)
    if resolution == _JUDGED_SIDE and model.tokenizer.get_vocab() == tiny.vocabulary():
        return of_judge()
    return of_photographs(device)


def of_photographs(device: torch.device) -> FeatureNetwork:
    """Return EfficientNet-Lite0's pooled features, which tell subjects in photographs apart."""
    network = efficientnet.load(device)
    size = (efficientnet.SIDE, efficientnet.SIDE)

    def one(picture: Picture) -> torch.Tensor:
        resized = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
        pixels = torch.tensor(np.asarray(resized), device=device).permute(2, 0, 1)[None]
        return network.features(pixels / 127.5 - 1.0)[0].cpu()

    return FeatureNetwork(
        name="EfficientNet-Lite0, trained on ImageNet",
        one=one,
        heads={"class": _head(network.classes)},
    )


def of_judge() -> FeatureNetwork:
    """Return the hidden layer of the embedded world's own classifier; pictures are [64,64,3]."""
    network = judge_network.load()

    def one(picture: Picture) -> torch.Tensor:
        return network.embed(judge_network.to_pixels(picture[None]))[0]

    heads = {name: _head(head) for name, head in network.heads.items()}
    return FeatureNetwork(name="the judge of the embedded world", one=one, heads=heads)


def _head(layer: Any) -> Head:
    weights, biases = (part.detach().double().cpu().numpy() for part in (layer.weight, layer.bias))
    return weights, biases


def of_vision_model(model: VisionModel, device: torch.device) -> FeatureNetwork:
    """Return a vision model in transformers' layout: CLIP, DINOv2 or ViT (also DINO's own).

    The feature is CLIP's image embedding, else the CLS token after the last layer norm. DINO's
    authors compare pictures by the latter, and it needs no pooler, whose weights may be missing.
    Raises ModelArtifactError where weights are missing, of another shape or not finite.
    """
    config_class, network_class, options = _CLASSES[model.kind]
    network = load_network(
        model.folder, config_class, network_class, model.config, setting=model.setting, **options
    )
    network.to(device=device, dtype=torch.float32).eval()
    mean, std = (
        torch.tensor(numbers, device=device).reshape(3, 1, 1) for numbers in (model.mean, model.std)
    )

    def one(picture: Picture) -> torch.Tensor:
        resized = Image.fromarray(picture).resize(
            (model.width, model.height), Image.Resampling.BICUBIC
        )
        pixels = torch.tensor(np.asarray(resized), device=device).permute(2, 0, 1) / 255.0
        output: Any = network(pixel_values=((pixels - mean) / std)[None])
        rows = output.image_embeds if model.kind in CLIP else output.last_hidden_state[:, 0]
        feature: torch.Tensor = rows[0].float().cpu()
        return feature

    return FeatureNetwork(name=f"{network.__class__.__name__} of {model.folder}", one=one)


def load_network(
    folder: Path,
    config_class: str,
    network_class: str,
    config: Mapping[str, Any],
    *,
    setting: str,
    **options: Any,
) -> Any:
    """Return a network of transformers, by its class's name, with a folder's weights, on the CPU.

    setting: the one that names the folder, for messages. Missing and misshapen weights, which the
    library only warns of and fills with random numbers, raise ModelArtifactError.
    """
    import transformers

    try:
        with _without_words(transformers.utils.logging):
            network, found = getattr(transformers, network_class).from_pretrained(
                folder,
                config=getattr(transformers, config_class).from_dict(dict(config)),
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below
                **options,
            )
    except (OSError, SafetensorError, *BUILD_ERRORS) as error:
        raise ModelArtifactError(
            f"{setting}: {folder} cannot be loaded: {in_one_line(error)}."
        ) from error
    others = [entry[0] for entry in found["mismatched_keys"]]
    missing = [
        name for name in found["missing_keys"] if not name.endswith(_UNREAD) and name not in others
    ]
    damaged = [
        name for name, weight in network.named_parameters() if not bool(weight.isfinite().all())
    ]
    faults = (
        ("lacks the weights", sorted(missing)),
        ("holds in other shapes than its config.json asks for", sorted(others)),
        ("holds numbers that are not finite in", damaged),
    )
    for fault, names in faults:
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ModelArtifactError(
                f"{setting}: {folder} {fault} {', '.join(names[:3])}{more}: "
                "its features would mean nothing."
            )
    return network


@contextlib.contextmanager
def _without_words(library: Any) -> Iterator[None]:
    """Silence transformers' progress bar and loading report; our own messages say what matters."""
    verbosity, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity_error()
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(verbosity)
        if bars:
            library.enable_progress_bar()
