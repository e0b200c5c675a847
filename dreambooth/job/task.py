"""Define Task, which every heavy phase of a training job reads."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from dreambooth.data import fingerprint, images
from dreambooth.data.dataset_info import DatasetInfo
from dreambooth.model_folder import layout
from dreambooth.settings.container import Environment
from dreambooth.settings.hyperparameters import Hyperparameters
from dreambooth.training import subjects_kept
from dreambooth.training.plan import TrainingPlan

# Settings that do not change what is learned, so a resumed run may differ in them. The model and
# the pictures are compared by content, not by path.
_NOT_IDENTITY = frozenset(
    (
        *("checkpointing_steps", "checkpointing_minutes", "checkpoints_total_limit", "resume"),
        "keep_last_checkpoint",
        "keep_subjects",  # what it decides is part of the identity
        *("sample_steps", "sample_prompt", "export_precision", "export_single_file"),
        *("compute_fid", "compute_scores", "fid_features"),
        *("meter", "meter_pictures_share", "early_stopping", "keep_states"),
        *("class_data_dir", "pretrained_model", "base", "prediction_type"),
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A job that is ready to run.

    model_folder: the base model, a diffusers folder. base_name: what the user called it.
    warnings: those about the settings. started: when the job began, by time.monotonic. workspace: a
    folder for class images on a host that writes nothing into the job's own folders.
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
    workspace: Path | None = None

    @property
    def resolution(self) -> int:
        """Return the side of the training pictures in pixels, known once the model is unpacked."""
        assert self.plan.resolution is not None
        return self.plan.resolution

    @property
    def sample_prompts(self) -> tuple[str, ...]:
        """Return the prompts of sample pictures, by default the instance prompt of each subject."""
        given = self.hyperparameters.sample_prompt
        of_subjects = tuple(subject.instance_prompt for subject in self.dataset.subjects)
        return (given,) if given else of_subjects

    def model_fingerprint(self) -> str:
        """Return a hash of the weights of the base model's U-Net, VAE and text encoder."""
        files = [
            path
            for part in layout.TRAINED_PARTS
            for path in layout.weight_files(self.model_folder / part)[1]
        ]
        return fingerprint.of_weights(files)

    def prediction_type(self) -> str:
        """Return what the model predicts, which its weights do not show."""
        config = layout.component_config(self.model_folder, "scheduler")
        return str(config.get("prediction_type", "epsilon"))

    def identity(self) -> dict[str, str]:
        """Return the settings, data and model that a checkpoint shares with a job resuming it."""
        settings = {
            knob.name: str(getattr(self.hyperparameters, knob.name))
            for knob in fields(Hyperparameters)
            if knob.name not in _NOT_IDENTITY
        }
        return {
            **settings,
            "steps": str(self.plan.steps),
            "cached_crops": str(self.plan.cached_crops if self._crops_at_random() else 1),
            "mixed_precision": self.plan.mixed_precision,
            "use_8bit_adam": str(self.plan.use_8bit_adam),
            "processes": str(self.plan.processes),
            "resolution": str(self.plan.resolution),
            "prediction_type": self.prediction_type(),
            "kept_subjects": self._kept_subjects(),
            "data": fingerprint.of_dataset(self.dataset),
            "model": self.model_fingerprint(),
        }

    def _kept_subjects(self) -> str:
        """Return a hash of the prompts that are held for the base's subjects, or "none"."""
        in_turn = subjects_kept.prompts_in_turn(self.plan.kept_subjects, self.dataset)
        return fingerprint.of_texts(*in_turn) if in_turn else "none"

    def _crops_at_random(self) -> bool:
        """Return whether a picture has more than one crop."""
        square = (self.resolution, self.resolution)
        return not self.hyperparameters.center_crop and any(
            images.resized_size(facts.width, facts.height, self.resolution) != square
            for facts in (*self.dataset.instance_facts, *self.dataset.class_facts)
        )
