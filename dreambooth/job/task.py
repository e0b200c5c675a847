"""What every heavy phase of a training job reads."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from dreambooth.data import fingerprint
from dreambooth.data.dataset_info import DatasetInfo
from dreambooth.model_folder import layout
from dreambooth.settings.container import Environment
from dreambooth.settings.hyperparameters import Hyperparameters
from dreambooth.training.plan import TrainingPlan

# Settings that do not change what is learned: a resumed run may differ in them. The model and the
# pictures are compared by their content, not by where they lie.
_NOT_IDENTITY = frozenset(
    (
        *("checkpointing_steps", "checkpointing_minutes", "checkpoints_total_limit", "resume"),
        *("sample_steps", "sample_prompt", "export_precision", "compute_fid", "fid_features"),
        *("class_data_dir", "pretrained_model"),
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One job, ready to run.

    model_folder is a diffusers folder, base_name what the user called it; warnings are those of
    the settings. started: when the job began, by time.monotonic.
    """

    environment: Environment
    hyperparameters: Hyperparameters
    dataset: DatasetInfo
    plan: TrainingPlan
    model_folder: Path
    base_name: str
    device: torch.device
    warnings: tuple[str, ...] = ()
    started: float = field(default_factory=time.monotonic)

    @property
    def resolution(self) -> int:
        """Side of the training pictures in pixels; known, as the model is unpacked by now."""
        assert self.plan.resolution is not None
        return self.plan.resolution

    @property
    def sample_prompt(self) -> str:
        """The prompt of sample pictures."""
        return self.hyperparameters.sample_prompt or self.dataset.instance_prompt

    @property
    def samples_class_images(self) -> bool:
        """Whether the run trains on class images at all."""
        settings = self.hyperparameters
        return settings.with_prior_preservation and settings.prior_preservation_mode == "images"

    def model_fingerprint(self) -> str:
        """A hash of the base model's weights."""
        files = [
            path
            for part in layout.TRAINED_PARTS
            for path in layout.weight_files(self.model_folder / part)[1]
        ]
        return fingerprint.of_weights(files)

    def identity(self) -> dict[str, str]:
        """What a checkpoint must share with the job that goes on from it: settings, data, model."""
        settings = {
            knob.name: str(getattr(self.hyperparameters, knob.name))
            for knob in fields(Hyperparameters)
            if knob.name not in _NOT_IDENTITY
        }
        return {
            **settings,
            "steps": str(self.plan.steps),
            "mixed_precision": self.plan.mixed_precision,
            "use_8bit_adam": str(self.plan.use_8bit_adam),
            "processes": str(self.plan.processes),
            "resolution": str(self.plan.resolution),
            "data": fingerprint.of_dataset(self.dataset),
            "model": self.model_fingerprint(),
        }
