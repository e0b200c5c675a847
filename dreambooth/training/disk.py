"""How many bytes a run will have on the disk, computed before anything is written.

Standard library only: the plan of a job prints this before anything heavy is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

from dreambooth.model_folder.facts import ModelFacts
from dreambooth.settings.hyperparameters import Hyperparameters

REST_BYTES = 16 * 2**20  # report.html, metrics, the model's vocabulary and sample pictures


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskBudget:
    """Bytes at the peak of a run; all 0 where the model is not known yet.

    base: what the pretrained model's tarball unpacks to. checkpoint: one of them; checkpoints: how
    many there are at once, those kept and the one being written.
    """

    base: int = 0
    model: int = 0
    checkpoint: int = 0
    checkpoints: int = 0
    class_images: int = 0
    rest: int = 0

    @property
    def all_checkpoints(self) -> int:
        """Bytes of all checkpoints."""
        return self.checkpoint * self.checkpoints

    @property
    def total(self) -> int:
        """Bytes of everything."""
        return self.base + self.model + self.all_checkpoints + self.class_images + self.rest


def expected(
    hyperparameters: Hyperparameters,
    facts: ModelFacts | None,
    *,
    class_images: int,
    use_8bit_adam: bool,
    keeps_checkpoints: bool,
    base_bytes: int = 0,
    copied_bytes: int = 0,
) -> DiskBudget:
    """The budget; nothing but base_bytes is expected of an unknown model.

    class_images: how many are to be sampled. base_bytes: of the unpacked tarball. copied_bytes: of
    parts that go into the new model as they are (a safety checker).
    """
    if facts is None:
        return DiskBudget(base=base_bytes)
    text_encoder = facts.text_encoder_parameters
    trained = facts.unet_parameters + text_encoder * hyperparameters.train_text_encoder
    every = facts.unet_parameters + text_encoder + facts.vae_parameters
    resolution = hyperparameters.resolution or facts.resolution
    return DiskBudget(
        base=base_bytes,
        model=(2 if hyperparameters.export_precision == "fp16" else 4) * every + copied_bytes,
        # fp32 weights, and AdamW's two moments of 4 bytes or of 1
        checkpoint=(4 + (2 if use_8bit_adam else 8)) * trained if keeps_checkpoints else 0,
        checkpoints=hyperparameters.checkpoints_total_limit + 1 if keeps_checkpoints else 0,
        class_images=class_images * 2 * resolution**2,  # a PNG takes some 2 bytes per pixel
        rest=REST_BYTES,
    )
