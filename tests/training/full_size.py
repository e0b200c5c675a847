"""The facts of Stable Diffusion 2.1 base that training plans are derived from."""

from __future__ import annotations

from dreambooth.model_folder.facts import ModelFacts

FULL_SIZE = ModelFacts(
    prediction_type="epsilon",
    resolution=512,
    latent_channels=4,
    vae_scale_factor=8,
    unet_layer_elements=5 * (320 * 64**2 + 640 * 32**2 + 1280 * 16**2 + 1280 * 8**2),
    unet_parameters=865_910_724,
    text_encoder_parameters=340_387_840,
    vae_parameters=83_653_863,
)
