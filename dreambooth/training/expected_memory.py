"""Computes how much device memory each phase of a run will take, from the model's facts.

Standard library only: a job prints these figures before anything heavy is loaded. All constants
were counted on tensors without data; they have not been measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dreambooth.limits import LIMITS
from dreambooth.model_folder.facts import ModelFacts
from dreambooth.settings.hyperparameters import Hyperparameters, MemoryPlan
from dreambooth.training import meter_budget

STATE_BYTES, STATE_BYTES_8BIT = 8.0, 2.03  # two moments; in 8 bits with a scale per 256 elements
# Activations saved for the backward pass, as a multiple of `unet_layer_elements`. Fitted to the
# live bytes of the full-size U-Net (1.74 GiB per 512 x 512 picture in fp32, 0.29 GiB with gradient
# checkpointing).
TENSORS_PER_LAYER = 39
TENSORS_PER_LAYER_CHECKPOINTED = 6.5
# Share of the largest block in all activations; checkpointing recomputes one block at a time.
LARGEST_BLOCK = 1 / 6
# Gradients that the fast step holds in fp32 at a time (`master_weights.PART_ELEMENTS`).
PART_BYTES = 2**28
# Bytes per activation; under autocast matrix products are in half and normalisations in fp32.
FP32_BYTES, AUTOCAST_BYTES, HALF_BYTES = 4.0, 2.6, 2.0

# Live elements at the peak of a U-Net call without gradients, per row, as a multiple of
# `unet_layer_elements`: counted at full size (65 MiB per row in half precision), plus half as much
# again for workspaces.
ROW_TENSORS = 4.3
# Live elements of Stable Diffusion's VAE, per pixel: 0.63 and 0.75 GiB at 512 x 512 in fp32. Under
# autocast decoding takes 0.72 GiB, because its widest layer is a normalisation.
ENCODED_PIXEL, DECODED_PIXEL = 640, 768

CLASS_BATCH = 8  # 16 U-Net rows with guidance; more gain little on any device


@dataclass(frozen=True, slots=True, kw_only=True)
class PhasePeak:
    """The peak memory of a phase of the job; phases are named as in the log and the report."""

    phase: str
    bytes: int


def of_step(
    hyperparameters: Hyperparameters,
    facts: ModelFacts | None,
    *,
    mixed_precision: str,
    memory_plan: MemoryPlan,
    fast_step: bool = False,
    keeps_subjects: bool = False,
) -> int:
    """Return the peak of a step in bytes; 0 if the model is unknown.

    It consists of weights, gradients, optimizer states and activations. keeps_subjects: whether the
    base model's subjects are held.
    """
    if facts is None:
        return 0
    trained = _trained_parameters(hyperparameters, facts)
    under_autocast = mixed_precision != "no" and not fast_step
    weights = _weights(hyperparameters, facts, mixed_precision, fast_step, keeps_subjects)
    gradients = (2 if fast_step else 4) * trained
    optimizer = states_bytes(memory_plan) * trained
    each = AUTOCAST_BYTES if under_autocast else HALF_BYTES if fast_step else FP32_BYTES
    whole = each * _saved_activations(hyperparameters, facts, keeps_subjects)
    kept, block = whole, 0.0
    if memory_plan.gradient_checkpointing:
        kept *= TENSORS_PER_LAYER_CHECKPOINTED / TENSORS_PER_LAYER
        block = whole * LARGEST_BLOCK
    if fast_step:
        weights += PART_BYTES
    copies = _autocast_copies(trained, mixed_precision, memory_plan, fast_step)
    # The peak is at the start of the backward pass, or at its end, when all gradients exist and the
    # activations of the last blocks are still held (0.3: fitted to the same simulation).
    start, end = kept + copies + block, gradients + 0.3 * kept
    return int(weights + optimizer + (start if memory_plan.frees_gradients else max(start, end)))


def of_phases(
    hyperparameters: Hyperparameters,
    facts: ModelFacts | None,
    *,
    mixed_precision: str,
    prior_precision: str,
    memory_plan: MemoryPlan,
    fast_step: bool = False,
    class_batch: int = 0,
    keeps_subjects: bool = False,
    steps: int = 0,
    meter_prompts: int = 0,
) -> tuple[PhasePeak, ...]:
    """Return the peaks of all phases in the order of the job; none if the model is unknown.

    class_batch: class images per U-Net call; 0 if none is sampled. keeps_subjects: whether the base
    model's subjects are held. steps, meter_prompts: of the run and of the meter's pictures, which
    decide when these are drawn. The network of fid_features is not counted: it may be any.
    """
    if facts is None:
        return ()
    found = []
    if class_batch:
        found.append(
            ("class images", _class_images(hyperparameters, facts, prior_precision, class_batch))
        )
    found.append(("encoding", _encoding(hyperparameters, facts)))
    step = of_step(
        hyperparameters,
        facts,
        mixed_precision=mixed_precision,
        memory_plan=memory_plan,
        fast_step=fast_step,
        keeps_subjects=keeps_subjects,
    )
    found.append(("training", step))
    weights = _weights(hyperparameters, facts, mixed_precision, False, keeps_subjects)
    drawing = weights + _drawing(hyperparameters, facts, mixed_precision, memory_plan)
    beside = _beside_the_weights(hyperparameters, facts, memory_plan, fast_step, keeps_subjects)
    moments = meter_budget.moments(
        hyperparameters, steps=steps, prompts=meter_prompts, memory_plan=memory_plan
    )
    if moments:  # those at the start and the end stand alone
        found.append(("meter pictures", drawing + beside * (moments > 2)))
    found.append(("sample pictures", drawing + beside * bool(hyperparameters.sample_steps)))
    found.append(("export", weights))
    if hyperparameters.compute_fid:
        found.append(("fid_score", drawing))
    if hyperparameters.compute_scores:  # the base's weights take the place of the trained ones
        found.append(("scores", drawing))
    return tuple(PhasePeak(phase=name, bytes=int(count)) for name, count in found)


def largest(phases: Sequence[PhasePeak]) -> PhasePeak | None:
    """Return the phase that takes the most memory; None if none is known."""
    return max(phases, key=lambda peak: peak.bytes, default=None)


def depends_on_the_memory_plan(peak: PhasePeak) -> bool:
    """Return whether another memory plan would change this peak."""
    return peak.phase not in ("class images", "encoding")


def class_batch(
    hyperparameters: Hyperparameters, facts: ModelFacts, precision: str, usable: int | None
) -> int:
    """Return how many class images share a U-Net call: what fits beside the weights, at least one.

    usable: bytes on the device; None if memory sets no limit.
    """
    wanted = min(max(CLASS_BATCH, hyperparameters.batch_size), LIMITS.max_generated_batch)
    if usable is None:
        return wanted
    element = _element(precision)
    # Decoding is not counted: pictures are decoded one by one after the U-Net call.
    beside = usable - element * _all_parameters(facts)
    return max(1, min(wanted, int(beside // _drawn(hyperparameters, facts, element))))


def _class_images(
    hyperparameters: Hyperparameters, facts: ModelFacts, precision: str, pictures: int
) -> float:
    """Return the peak of sampling class images.

    The whole model without gradients, and the larger of a U-Net call and the decoding of one
    picture.
    """
    element = _element(precision)
    decoded = element * DECODED_PIXEL * _pixels(hyperparameters, facts)
    drawn = pictures * _drawn(hyperparameters, facts, element)
    return element * _all_parameters(facts) + max(drawn, decoded)


def _encoding(hyperparameters: Hyperparameters, facts: ModelFacts) -> float:
    """Return the peak of encoding: all parts are on the device in fp32, pictures go one by one."""
    encoded = FP32_BYTES * ENCODED_PIXEL * _pixels(hyperparameters, facts)
    return FP32_BYTES * _all_parameters(facts) + encoded


def _drawing(
    hyperparameters: Hyperparameters,
    facts: ModelFacts,
    mixed_precision: str,
    memory_plan: MemoryPlan,
) -> float:
    """Return what drawing a picture takes beside the trained weights.

    The VAE in fp32, autocast's copies, and the larger of a U-Net call and a decoding.
    """
    trained = _trained_parameters(hyperparameters, facts)
    copies = _autocast_copies(trained, mixed_precision, memory_plan, fast_step=False)
    pictures = min(hyperparameters.batch_size, LIMITS.max_generated_batch)
    drawn = pictures * _drawn(hyperparameters, facts, _element(mixed_precision))
    decoded = FP32_BYTES * DECODED_PIXEL * _pixels(hyperparameters, facts)
    return FP32_BYTES * facts.vae_parameters + copies + max(drawn, decoded)


def _beside_the_weights(
    hyperparameters: Hyperparameters,
    facts: ModelFacts,
    memory_plan: MemoryPlan,
    fast_step: bool,
    keeps_subjects: bool,
) -> float:
    """Return what stays allocated beside the weights between two steps.

    The optimizer states; with the fast step also its half weights and the memory of its captured
    passes, in which the gradients stay and which nothing else can use.
    """
    trained = _trained_parameters(hyperparameters, facts)
    states = states_bytes(memory_plan) * trained
    if not fast_step:
        return states
    half = 2 * trained
    kept = HALF_BYTES * _saved_activations(hyperparameters, facts, keeps_subjects)
    return states + half + max(kept, half + 0.3 * kept)


def _weights(
    hyperparameters: Hyperparameters,
    facts: ModelFacts,
    mixed_precision: str,
    fast_step: bool,
    keeps_subjects: bool,
) -> float:
    """Return the bytes of the weights in memory.

    The trained weights, half weights beside them, and the frozen base model if it predicts the
    class target or its own subjects.
    """
    trained = _trained_parameters(hyperparameters, facts)
    weights = 4.0 * trained
    if fast_step:
        weights += 2 * trained
    if hyperparameters.predicts_the_prior or keeps_subjects:  # by a frozen copy
        weights += (4 if mixed_precision == "no" else 2) * facts.unet_parameters
    return weights


def states_bytes(memory_plan: MemoryPlan) -> float:
    """Return the bytes of optimizer states per weight."""
    return STATE_BYTES_8BIT if memory_plan.use_8bit_adam else STATE_BYTES


def _autocast_copies(
    trained: int, mixed_precision: str, memory_plan: MemoryPlan, fast_step: bool
) -> int:
    """Return the bytes of autocast's half copies of the weights.

    They are not kept with gradient checkpointing: each block makes its own again.
    """
    makes = mixed_precision != "no" and not fast_step and not memory_plan.gradient_checkpointing
    return 2 * trained if makes else 0


def _drawn(hyperparameters: Hyperparameters, facts: ModelFacts, element: int) -> float:
    """Return one picture's share of a U-Net call without gradients: two rows, as it is guided."""
    area = _pixels(hyperparameters, facts) / facts.resolution**2
    return element * (2 * ROW_TENSORS * facts.unet_layer_elements * area)


def _saved_activations(
    hyperparameters: Hyperparameters, facts: ModelFacts, keeps_subjects: bool
) -> float:
    """Return how many activations the backward pass needs without gradient checkpointing."""
    area = _pixels(hyperparameters, facts) / facts.resolution**2
    rows = 1 + hyperparameters.with_prior_preservation + keeps_subjects
    pictures = hyperparameters.batch_size * rows
    return TENSORS_PER_LAYER * facts.unet_layer_elements * area * pictures


def _pixels(hyperparameters: Hyperparameters, facts: ModelFacts) -> int:
    """Return the pixels of one picture."""
    return (hyperparameters.resolution or facts.resolution) ** 2


def _trained_parameters(hyperparameters: Hyperparameters, facts: ModelFacts) -> int:
    text_encoder = facts.text_encoder_parameters if hyperparameters.train_text_encoder else 0
    return facts.unet_parameters + text_encoder


def _all_parameters(facts: ModelFacts) -> int:
    return facts.unet_parameters + facts.text_encoder_parameters + facts.vae_parameters


def _element(precision: str) -> int:
    """Return the bytes of one number."""
    return 2 if precision in ("fp16", "bf16") else 4
