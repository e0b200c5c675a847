from __future__ import annotations

import pytest

from dreambooth.diffusion.facts import ModelFacts
from dreambooth.hyperparameters import MEMORY_PLANS, Hyperparameters
from dreambooth.training import memory
from dreambooth.training.device import CPU, DeviceFacts

GIB = 2**30
FULL_SIZE = ModelFacts(  # Stable Diffusion 2.1 base
    prediction_type="epsilon",
    resolution=512,
    latent_channels=4,
    vae_scale_factor=8,
    unet_layer_elements=5 * (320 * 64**2 + 640 * 32**2 + 1280 * 16**2 + 1280 * 8**2),
    unet_parameters=865_910_724,
    text_encoder_parameters=340_387_840,
    vae_parameters=83_653_863,
)


def peak_gib(plan: str = "fp32_adamw", precision: str = "fp16", **changes: object) -> float:
    eight_bit, checkpointing = MEMORY_PLANS[plan]
    peak = memory.expected_memory_bytes(
        Hyperparameters(**changes),  # type: ignore[arg-type]
        FULL_SIZE,
        mixed_precision=precision,
        use_8bit_adam=eight_bit,
        gradient_checkpointing=checkpointing,
    )
    return peak / GIB


def test_expected_memory_is_near_the_known_figures() -> None:
    # Simulated live bytes of the full-size U-Net under autocast, latents and text cached.
    assert peak_gib() == pytest.approx(13.2, rel=0.05)
    assert peak_gib("8bit_adamw") == pytest.approx(8.4, rel=0.05)
    assert peak_gib(with_prior_preservation=True) == pytest.approx(13.6, rel=0.05)
    assert peak_gib("8bit_adamw", with_prior_preservation=True) == pytest.approx(8.8, rel=0.1)


def test_what_needs_more_memory_is_expected_to() -> None:
    plain = peak_gib()
    assert peak_gib(batch_size=8) > plain
    assert peak_gib(resolution=1024) > plain
    assert peak_gib(train_text_encoder=True) > plain + 3
    prediction = {"with_prior_preservation": True, "prior_preservation_mode": "prediction"}
    assert peak_gib(**prediction) > peak_gib(with_prior_preservation=True) + 3
    assert peak_gib(batch_size=8) > peak_gib("8bit_adamw_checkpointing", batch_size=8)


def test_the_first_plan_that_fits_is_chosen() -> None:
    def chosen(gib: float) -> str:
        gpu = DeviceFacts(
            kind="cuda", name="GPU", compute_capability=(8, 0), memory_bytes=int(gib * GIB)
        )
        return memory.choose_plan(Hyperparameters(), FULL_SIZE, gpu, "bf16")[0]

    assert [chosen(gib) for gib in (80, 22, 12, 8)] == [
        *("fp32_adamw", "fp32_adamw", "8bit_adamw", "8bit_adamw_checkpointing"),
    ]
    assert memory.choose_plan(Hyperparameters(), FULL_SIZE, CPU, "no")[0] == "fp32_adamw"


def test_nothing_is_expected_of_an_unknown_model() -> None:
    settings = Hyperparameters()
    assert (
        memory.expected_memory_bytes(
            settings, None, mixed_precision="no", use_8bit_adam=False, gradient_checkpointing=False
        )
        == 0
    )
    gpu = DeviceFacts(kind="cuda", name="GPU", compute_capability=(8, 0), memory_bytes=GIB)
    assert memory.choose_plan(settings, None, gpu, "bf16")[0] == "fp32_adamw"
