"""The names and shapes in one file, against those of the published code and of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils as theirs
from transformers import CLIPTextConfig, CLIPTextModel

from dreambooth.errors import ModelArtifactError
from dreambooth.model_folder import published_configurations, published_layout
from dreambooth.model_folder.published_layout import Family, PublishedTensor

Shapes = dict[str, tuple[int, ...]]
LIST = Path(__file__).with_name("published_tensors.tsv")
FAMILIES: tuple[Family, ...] = ("1.x", "2.x")
# What the published 2.x holds and the folder does not: the layer behind the one that is read.
BEHIND = ("transformer.resblocks.23.", "text_projection", "logit_scale")


def published(family: Family) -> Shapes:
    """Return the committed names and shapes of one family."""
    found: Shapes = {}
    for line in LIST.read_text("utf-8").splitlines():
        if line.startswith("#"):
            continue
        families, name, shape, *numbers = line.split("\t")
        size = tuple(int(n) for n in shape.split("x")) if shape != "-" else ()
        for each in (" ".join(numbers)).split(" ") if family in families.split("+") else ():
            left = name
            for number in filter(None, each.split(".")):
                left = left.replace("#", number, 1)
            found[left] = size
    return found


def ours(family: Family) -> tuple[PublishedTensor, ...]:
    networks = published_configurations.networks(family)
    return published_layout.tensors(family, **networks, where="x")


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_those_of_the_published_code(family: Family) -> None:
    expected = published(family)
    left_out = {
        name
        for name in expected
        if family == "2.x" and name.removeprefix("cond_stage_model.model.").startswith(BEHIND)
    }
    assert len(left_out) == (14 if family == "2.x" else 0)
    found = ours(family)
    assert {tensor.name: tensor.shape for tensor in found} == {
        name: shape for name, shape in expected.items() if name not in left_out
    }
    assert len(found) == len({tensor.name for tensor in found})
    counts = [sum(tensor.part == part for tensor in found) for part in ("unet", "vae")]
    assert counts == [686, 248]
    # With position_ids, 1.x comes to the 1,131 tensors of its published file without EMA.
    assert len(found) == {"1.x": 1_130, "2.x": 1_214}[family]


def modules(family: Family) -> dict[str, torch.nn.Module]:
    """Return the full-size networks without memory for their weights."""
    configs = published_configurations.networks(family)
    with torch.device("meta"):
        return {
            "unet": UNet2DConditionModel.from_config(configs["unet"]),
            "vae": AutoencoderKL.from_config(configs["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig.from_dict(configs["text_encoder"])),
        }


def state_of(part: str, module: torch.nn.Module) -> Shapes:
    prefix = "text_model." if part == "text_encoder" else ""
    return {
        prefix + key.removeprefix(prefix): tuple(value.shape)
        for key, value in module.state_dict().items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_full_size_folders_have_the_names_and_shapes_of_the_libraries(family: Family) -> None:
    networks, found = modules(family), ours(family)
    for part, module in networks.items():
        names = {
            name: tensor.folder_shape
            for tensor in found
            if tensor.part == part
            for name in tensor.names
        }
        assert names == state_of(part, module)


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_gives_the_published_names_the_same_meaning(family: Family) -> None:
    """Its converters, which drop what they do not know, make whole networks of our names."""
    networks = modules(family)
    file = {t.name: torch.empty(t.shape, device="meta") for t in ours(family)}
    converted: dict[str, Mapping[str, torch.Tensor]] = {
        "unet": theirs.convert_ldm_unet_checkpoint(file, dict(networks["unet"].config)),
        "vae": theirs.convert_ldm_vae_checkpoint(file, dict(networks["vae"].config)),
        "text_encoder": theirs.convert_ldm_clip_checkpoint(file)
        if family == "1.x"
        else theirs.convert_open_clip_checkpoint(networks["text_encoder"], file),
    }
    for part, module in networks.items():
        shapes = {key: tuple(value.shape) for key, value in converted[part].items()}
        assert shapes == state_of(part, module)


ODD: list[tuple[str, dict[str, Any]]] = [
    ("unet", {"down_block_types": ["SimpleCrossAttnDownBlock2D"] * 4}),
    ("unet", {"down_block_types": "DownBlock2D"}),
    ("unet", {"up_block_types": ["UpBlock2D"] * 4}),
    ("unet", {"mid_block_type": "UNetMidBlock2D"}),
    ("unet", {"transformer_layers_per_block": [1, 2, 10]}),
    ("unet", {"block_out_channels": [320, 640]}),
    ("unet", {"block_out_channels": [320, True, 1280, 1280]}),
    ("unet", {"layers_per_block": [2, 2, 2, 2]}),
    ("unet", {"cross_attention_dim": [768]}),
    ("unet", {"in_channels": 10**9}),
    ("vae", {"down_block_types": ["AttnDownEncoderBlock2D"] * 4}),
    ("vae", {"latent_channels": 4.0}),
    ("text_encoder", {"num_hidden_layers": "12"}),
]


@pytest.mark.parametrize(("part", "change"), ODD)
def test_networks_of_other_blocks_are_refused_by_the_settings_name(
    part: str, change: dict[str, Any]
) -> None:
    networks = published_configurations.networks("1.x")
    networks[part] |= change
    with pytest.raises(ModelArtifactError, match=f"its {part}'s "):
        published_layout.tensors("1.x", **networks, where="x")


def test_a_model_that_other_tools_would_misread_is_refused() -> None:
    networks = published_configurations.networks("1.x")
    for change in ({"hidden_act": "gelu"}, {"hidden_act": "relu"}, {"hidden_act": 3}):
        with pytest.raises(ModelArtifactError):
            published_layout.family_of(networks["unet"], networks["text_encoder"] | change, "x")
