"""States the configurations of the published Stable Diffusion 1.x and 2.x.

A single-file checkpoint holds none. The values are those of the published folders (facts of 1.5,
2.1 base and 2.1) and of the code's configurations. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from dreambooth.model_folder.published_layout import Family

_VERSION: Final = {"_diffusers_version": "0.9.0"}
_UNET: Final[Mapping[str, Any]] = {
    "_class_name": "UNet2DConditionModel",
    **_VERSION,
    "act_fn": "silu",
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}
# attention_head_dim counts heads, in spite of its name; 2.x has heads of 64 channels.
_UNETS: Final[Mapping[Family, Mapping[str, Any]]] = {
    "1.x": {"attention_head_dim": 8, "cross_attention_dim": 768},
    "2.x": {
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
}
_VAE: Final[Mapping[str, Any]] = {
    "_class_name": "AutoencoderKL",
    **_VERSION,
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
_TEXT_ENCODER: Final[Mapping[str, Any]] = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "pad_token_id": 1,
    "torch_dtype": "float32",
    "vocab_size": 49_408,
}
_TEXT_ENCODERS: Final[Mapping[Family, Mapping[str, Any]]] = {
    "1.x": {
        "hidden_act": "quick_gelu",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "projection_dim": 768,
    },
    # open_clip's ViT-H has 24 layers; the U-Net reads what the last but one makes.
    "2.x": {
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 23,
        "projection_dim": 512,
    },
}
_SCHEDULER: Final[Mapping[str, Any]] = {
    **_VERSION,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
INDEX: Final[Mapping[str, Any]] = {
    "_class_name": "StableDiffusionPipeline",
    **_VERSION,
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def networks(family: Family) -> dict[str, dict[str, Any]]:
    """Return the configurations of the family's U-Net, VAE and text encoder."""
    return {
        "unet": {**_UNET, **_UNETS[family]},
        "vae": {**_VAE, "sample_size": 512 if family == "1.x" else 768},
        "text_encoder": {**_TEXT_ENCODER, **_TEXT_ENCODERS[family]},
    }


def sample_side(family: Family, prediction_type: str) -> int:
    """Return the side in pixels at which a model was published: 768 for 2.x with v-prediction."""
    return 768 if family == "2.x" and prediction_type == "v_prediction" else 512


def scheduler(family: Family, prediction_type: str) -> dict[str, Any]:
    """Return the noise scheduler's configuration: DDIM for 2.x with v-prediction, else PNDM."""
    is_768 = family == "2.x" and prediction_type == "v_prediction"
    return {
        "_class_name": "DDIMScheduler" if is_768 else "PNDMScheduler",
        **_SCHEDULER,
        "prediction_type": prediction_type,
    }
