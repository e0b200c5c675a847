"""Checks the memory expected of each phase against live bytes counted on tensors without data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from benchmarks.train_step import full_size
from benchmarks.train_step.counted_step import Counting, stand_ins
from benchmarks.train_step.full_size import FACTS as FULL_SIZE
from dreambooth.settings.hyperparameters import MEMORY_PLANS, Hyperparameters
from dreambooth.training import expected_memory, memory_plan
from dreambooth.training.device import DeviceFacts

GIB = 2**30
PRIOR = {"with_prior_preservation": True}


def live_peak(network: str, call: str, *shapes: tuple[int, ...]) -> float:
    """Return a call's peak of live elements, for a full-size fp32 network without gradients."""
    build = {"vae": AutoencoderKL, "unet": UNet2DConditionModel}[network]
    config = {"vae": full_size.VAE, "unet": full_size.UNET}[network]
    counting = Counting()
    with torch.no_grad(), stand_ins(counting), torch.device("meta"), counting:
        module: Any = build(**config).eval()
        given = [torch.empty(shape) for shape in shapes]
        counting.begin()
        before = counting.peak_bytes
        getattr(module, call)(*given)
    return (counting.peak_bytes - before) / 4


def test_the_vaes_part_is_counted_at_full_size() -> None:
    side = full_size.SIDE
    encoded = live_peak("vae", "encode", (1, 3, side, side))
    assert encoded / side**2 == pytest.approx(expected_memory.ENCODED_PIXEL, rel=0.01)
    decoded = live_peak("vae", "decode", (1, 4, side // 8, side // 8))
    assert decoded / side**2 == pytest.approx(expected_memory.DECODED_PIXEL, rel=0.01)


def test_a_row_of_the_unet_is_counted_at_full_size_and_a_half_more() -> None:
    cells, text = full_size.SIDE // 8, (full_size.TOKENS, full_size.WIDTH)
    row = live_peak("unet", "forward", (1, 4, cells, cells), (1,), (1, *text))
    assert row * 2 / 2**20 == pytest.approx(65, rel=0.01)  # in half precision
    with_workspaces = expected_memory.ROW_TENSORS * FULL_SIZE.unet_layer_elements
    assert with_workspaces == pytest.approx(1.5 * row, rel=0.05)


def phases(plan: str, *, fast_step: bool = False, **changes: object) -> dict[str, float]:
    """Return the GiB expected of each phase of a job in fp16.

    With prior preservation it samples class images.
    """
    settings = Hyperparameters(**changes)  # type: ignore[arg-type]
    found = expected_memory.of_phases(
        settings,
        FULL_SIZE,
        mixed_precision="fp16",
        prior_precision="fp16",
        memory_plan=MEMORY_PLANS[plan],
        fast_step=fast_step,
        class_batch=8 if settings.with_prior_preservation else 0,
    )
    return {peak.phase: peak.bytes / GIB for peak in found}


def test_phases_are_those_of_the_job_in_its_order() -> None:
    assert list(phases("8bit_adamw")) == ["encoding", "training", "sample pictures", "export"]
    assert list(phases("8bit_adamw", compute_fid=True, **PRIOR)) == [
        *("class images", "encoding", "training", "sample pictures", "export", "fid_score")
    ]
    assert list(phases("8bit_adamw", compute_scores=True))[-2:] == ["export", "scores"]
    assert expected_memory.largest(()) is None


# Derived from counts, as in test_memory_plan.py, and not measured on a GPU.
def test_the_smallest_plan_stays_within_its_goal_in_every_phase() -> None:
    found = phases(
        "8bit_adamw_in_backward", sample_steps=50, compute_fid=True, compute_scores=True, **PRIOR
    )
    assert found == {
        "class images": pytest.approx(3.92, abs=0.01),
        "encoding": pytest.approx(4.81 + 0.63, abs=0.01),  # fp32 weights, then the VAE's encoding
        "training": pytest.approx(5.61, abs=0.01),
        "sample pictures": pytest.approx(3.23 + 1.64 + 0.31 + 0.75, abs=0.02),
        "export": pytest.approx(3.23, abs=0.01),
        "fid_score": pytest.approx(3.23 + 0.31 + 0.75, abs=0.01),
        "scores": pytest.approx(3.23 + 0.31 + 0.75, abs=0.01),
    }
    assert max(found.values()) <= 6.0
    # Without sample pictures between steps only the last one is drawn, after AdamW's states are
    # freed.
    assert phases("8bit_adamw_in_backward")["sample pictures"] == found["fid_score"]


def test_training_decides_in_plans_that_keep_gradients_and_drawing_in_those_that_free_them() -> (
    None
):
    most = {
        name: max(found, key=lambda phase: found[phase])
        for name in MEMORY_PLANS
        for found in [phases(name, sample_steps=50, **PRIOR)]
    }
    assert most == {
        **{"fp32_adamw": "training", "8bit_adamw": "training"},
        "8bit_adamw_checkpointing": "training",
        "fp32_adamw_in_backward": "sample pictures",
        "8bit_adamw_in_backward": "sample pictures",
    }


def test_pictures_drawn_between_fast_steps_are_drawn_beside_all_that_these_keep() -> None:
    plain, fast = (
        phases("8bit_adamw", fast_step=fast_step, sample_steps=50, **PRIOR)["sample pictures"]
        for fast_step in (False, True)
    )
    # Half-precision weights take 1.61; the rest is the larger of saved activations (1.74) and
    # gradients with some of the activations.
    assert fast - plain == pytest.approx(1.61 + 1.61 + 0.3 * 1.74, abs=0.03)


def test_what_a_phase_needs_grows_with_what_it_is_made_of() -> None:
    plain = phases("8bit_adamw", **PRIOR)
    larger = phases("8bit_adamw", resolution=768, **PRIOR)
    assert all(larger[name] > plain[name] for name in plain if name != "export")
    text = phases("8bit_adamw", train_text_encoder=True, **PRIOR)
    assert text["export"] - plain["export"] == pytest.approx(1.27, abs=0.01)
    prediction = phases("8bit_adamw", prior_preservation_mode="prediction", **PRIOR)
    assert prediction["export"] - plain["export"] == pytest.approx(1.61, abs=0.01)


def card(free_gib: float) -> DeviceFacts:
    return DeviceFacts(kind="cuda", name="GPU", free_bytes=int(free_gib * GIB))


def test_a_plan_whose_sample_pictures_do_not_fit_is_not_taken() -> None:
    def chosen(**changes: object) -> memory_plan.MemoryChoice:
        settings = Hyperparameters(fast_step=True, **PRIOR, **changes)  # type: ignore[arg-type]
        return memory_plan.choose(settings, FULL_SIZE, card(11.5), mixed_precision="fp16")[0]

    assert (chosen().name, chosen().fast_step) == ("8bit_adamw", True)
    # Drawing beside the fast step does not fit.
    assert chosen(sample_steps=50).name == "8bit_adamw_checkpointing"


@pytest.mark.parametrize(
    ("free_gib", "precision", "pictures"),
    [(80, "fp16", 8), (4.5, "fp16", 6), (3.5, "fp16", 1), (0.1, "fp16", 1), (7, "no", 3)],
)
def test_class_images_share_a_call_as_far_as_they_fit(
    free_gib: float, precision: str, pictures: int
) -> None:
    usable = memory_plan.usable_bytes(card(free_gib), 1)
    settings = Hyperparameters(**PRIOR)  # type: ignore[arg-type]
    assert expected_memory.class_batch(settings, FULL_SIZE, precision, usable) == pictures
    choices = memory_plan.choose(
        settings,
        FULL_SIZE,
        card(free_gib),
        mixed_precision="fp16",
        prior_precision=precision,
        class_images_to_sample=100,
    )
    (sampling,) = [one for one in choices[-1].phases if one.phase == "class images"]
    assert usable is not None
    assert sampling.bytes <= usable or pictures == 1
