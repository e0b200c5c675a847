"""How many bytes a run will take, computed from the model's facts; the memory plan that fits.

Standard library only: the plan of a job prints these before anything heavy is loaded.
"""

from __future__ import annotations

from dreambooth.diffusion.facts import ModelFacts
from dreambooth.hyperparameters import MEMORY_PLANS, Hyperparameters
from dreambooth.training.device import DeviceFacts

MEMORY_SHARE = 0.85  # of the GPU: the rest is context, library workspaces and fragmentation

# Saved activations per latent cell, channel and layer, in tensors. Fitted to the live bytes of the
# full-size U-Net (1.74 GiB per 512 x 512 picture in fp32, 0.29 GiB with gradient checkpointing).
TENSORS_PER_LAYER = 39
TENSORS_PER_LAYER_CHECKPOINTED = 6.5


def choose_plan(
    hyperparameters: Hyperparameters,
    facts: ModelFacts | None,
    device: DeviceFacts,
    mixed_precision: str,
) -> tuple[str, bool, bool]:
    """(name, use_8bit_adam, gradient_checkpointing): the named plan, or the first that fits."""
    name = hyperparameters.memory_plan
    if name == "auto":
        name = "fp32_adamw"
        if device.memory_bytes is not None and facts is not None:
            usable = device.memory_bytes * MEMORY_SHARE
            for candidate, (eight_bit, checkpointing) in MEMORY_PLANS.items():
                name = candidate
                need = expected_memory_bytes(
                    hyperparameters,
                    facts,
                    mixed_precision=mixed_precision,
                    use_8bit_adam=eight_bit,
                    gradient_checkpointing=checkpointing,
                )
                if need <= usable:
                    break
    eight_bit, checkpointing = MEMORY_PLANS[name]
    # What is set by hand stands; the plan fills in the rest.
    if hyperparameters.use_8bit_adam is not None:
        eight_bit = hyperparameters.use_8bit_adam
    if hyperparameters.gradient_checkpointing is not None:
        checkpointing = hyperparameters.gradient_checkpointing
    return name, eight_bit, checkpointing


def expected_memory_bytes(
    hyperparameters: Hyperparameters,
    facts: ModelFacts | None,
    *,
    mixed_precision: str,
    use_8bit_adam: bool,
    gradient_checkpointing: bool,
) -> int:
    """Peak of the step: fp32 weights, gradients, optimizer states, activations; 0: unknown."""
    if facts is None:
        return 0
    trained = _trained_parameters(hyperparameters, facts)
    half = mixed_precision != "no"
    weights = 4 * trained
    optimizer = (2 if use_8bit_adam else 8) * trained
    halves = 2 if hyperparameters.with_prior_preservation else 1
    resolution = hyperparameters.resolution or facts.resolution
    tensors = TENSORS_PER_LAYER_CHECKPOINTED if gradient_checkpointing else TENSORS_PER_LAYER
    activations = (
        tensors
        * facts.unet_layer_elements
        * (resolution / facts.resolution) ** 2
        * (2.6 if half else 4)  # bytes: matrix products in half, normalisations in fp32
        * hyperparameters.batch_size
        * halves
    )
    if (
        hyperparameters.with_prior_preservation
        and hyperparameters.prior_preservation_mode == "prediction"
    ):
        weights += 4 * facts.unet_parameters  # the frozen copy whose prediction is the target
    # Gradients are whole just when the activations, and autocast's half copies of the weights, are
    # gone; what overlaps was fitted to the same simulation. The optimizer's states stay throughout.
    passing = activations + (2 * trained if half else 0)
    return int(weights + optimizer + max(passing, 4 * trained) + 0.3 * activations)


def _trained_parameters(hyperparameters: Hyperparameters, facts: ModelFacts) -> int:
    text_encoder = facts.text_encoder_parameters if hyperparameters.train_text_encoder else 0
    return facts.unet_parameters + text_encoder
