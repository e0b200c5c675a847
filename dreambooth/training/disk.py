"""Computes how much disk space a run will take, before anything is written.

Standard library only: a job prints this before anything heavy is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

from dreambooth.model_folder.facts import ModelFacts
from dreambooth.settings.hyperparameters import Hyperparameters

REST_BYTES = 16 * 2**20  # report.html, metrics, the model's vocabulary and sample pictures


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskBudget:
    """Bytes on disk at the peak of a run; while the model is unknown, all but base are 0.

    base: the pretrained model, unpacked from its tarball or file. single_file: the model a second
    time, for other tools. checkpoint: one checkpoint. checkpoints:
    how many exist at once, those that are kept and the one being written. states: those that
    are kept to choose from.
    """

    base: int = 0
    model: int = 0
    single_file: int = 0
    checkpoint: int = 0
    checkpoints: int = 0
    states: int = 0
    class_images: int = 0
    rest: int = 0

    @property
    def all_checkpoints(self) -> int:
        """Return the bytes of all checkpoints."""
        return self.checkpoint * self.checkpoints

    @property
    def total(self) -> int:
        """Return the bytes of everything."""
        models = self.base + self.model + self.single_file
        return models + self.all_checkpoints + self.states + self.class_images + self.rest


def expected(
    hyperparameters: Hyperparameters,
    facts: ModelFacts | None,
    *,
    class_images: int,
    use_8bit_adam: bool,
    keeps_checkpoints: bool,
    base_bytes: int = 0,
    copied_bytes: int = 0,
    meter_pictures: int = 0,
) -> DiskBudget:
    """Return the disk budget; of an unknown model only base_bytes is counted.

    class_images: how many are to be sampled. base_bytes: of the unpacked base. copied_bytes: of
    the parts that are copied unchanged into the new model (a safety checker). meter_pictures: the
    most that the meter draws.
    """
    if facts is None:
        return DiskBudget(base=base_bytes)
    text_encoder = facts.text_encoder_parameters
    trained = facts.unet_parameters + text_encoder * hyperparameters.train_text_encoder
    every = facts.unet_parameters + text_encoder + facts.vae_parameters
    weights = (2 if hyperparameters.export_precision == "fp16" else 4) * every
    resolution = hyperparameters.resolution or facts.resolution
    picture = 2 * resolution**2  # a PNG takes some 2 bytes per pixel
    states = hyperparameters.states_kept
    return DiskBudget(
        base=base_bytes,
        model=weights + copied_bytes,
        single_file=weights if hyperparameters.export_single_file else 0,
        # fp32 weights, and AdamW's two moments of 4 bytes or of 1
        checkpoint=(4 + (2 if use_8bit_adam else 8)) * trained if keeps_checkpoints else 0,
        checkpoints=hyperparameters.checkpoints_total_limit + 1 if keeps_checkpoints else 0,
        # in fp16; one more while the next is written
        states=2 * trained * (states + 1) if states else 0,
        class_images=class_images * picture,
        rest=REST_BYTES + meter_pictures * picture,
    )
