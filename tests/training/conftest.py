"""Fixtures that train a small real U-Net on random latents, without pictures."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from dreambooth.data.cache import LatentPosteriors
from dreambooth.data.dataset_info import DatasetInfo
from dreambooth.diffusion import model as models
from dreambooth.fast import captured_loop
from dreambooth.fast.graphed_passes import Capture, without_capture
from dreambooth.settings.hyperparameters import Hyperparameters
from dreambooth.training import freed_gradients, loop, optimizer
from dreambooth.training import plan as plans
from dreambooth.training.device import CPU as CPU_FACTS
from dreambooth.training.mixed_precision import Precision
from dreambooth.training.state import TrainingState
from dreambooth.training.step_metrics import StepMetrics

CPU = torch.device("cpu")


@dataclass
class Training:
    model: models.DiffusionModel
    settings: Hyperparameters
    plan: plans.TrainingPlan
    state: TrainingState
    data: loop.TrainingData

    def steps(self, capture: Capture = without_capture) -> Iterator[StepMetrics]:
        settings = self.settings
        precision = self.state.precision
        by_prediction = settings.prior_preservation_mode == "prediction"
        train: Callable[..., Iterator[StepMetrics]] = loop.train
        if self.plan.frees_gradients:
            train = freed_gradients.train
        if self.plan.fast_step:
            train = functools.partial(captured_loop.train, capture=capture)
        return train(
            self.state,
            self.data,
            self.plan,
            settings,
            noise_scheduler=models.training_noise_scheduler(self.model),
            encode_text=lambda ids: models.text_features(self.model, ids),
            prior_unet=precision.frozen_copy(self.model.unet) if by_prediction else None,
            accelerator=Accelerator(cpu=True),
        )

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.state.unet.parameters()]).clone()


def dataset(instances: int = 3, classes: int = 4) -> DatasetInfo:
    return DatasetInfo(
        folder=Path("pictures"),
        instance_prompt="a photo of riobugger cat",
        class_prompt="a photo of cat",
        instance_images=tuple(Path(f"{n}.png") for n in range(instances)),
        class_images=tuple(Path(f"class/{n}.png") for n in range(classes)),
        warnings=(),
    )


def random_posteriors(count: int, seed: int) -> LatentPosteriors:
    generator = torch.Generator().manual_seed(seed)
    return LatentPosteriors(
        mean=torch.randn(count, 4, 8, 8, generator=generator),
        std=torch.rand(count, 4, 8, 8, generator=generator) * 0.1,
        first_rows=tuple(range(count)),
        crop_counts=(1,) * count,
    )


@pytest.fixture(scope="session")
def loaded_small_model(small_model_folder: Path) -> models.DiffusionModel:
    return models.load(small_model_folder, device=CPU)


@pytest.fixture
def make_training(loaded_small_model: models.DiffusionModel) -> Callable[..., Training]:
    def make(*, frees_gradients: bool = False, **changes: object) -> Training:
        settings = Hyperparameters(**{"max_steps": 4, "learning_rate": 1e-3, **changes})  # type: ignore[arg-type]
        model = copy.copy(loaded_small_model)
        model.unet = copy.deepcopy(loaded_small_model.unet).requires_grad_(True).train()
        trained = [model.unet]
        if settings.train_text_encoder:
            model.text_encoder = copy.deepcopy(model.text_encoder).requires_grad_(True).train()
            trained.append(model.text_encoder)
        plan = plans.make(settings, dataset(), None, CPU_FACTS)
        if frees_gradients:
            plan = replace(plan, frees_gradients=True)
        if settings.fast_step:  # the CPU allows everything of the fast step except the capture
            plan = replace(plan, fast_step=True)
        if plan.gradient_checkpointing:
            model.unet.enable_gradient_checkpointing()
        with_class = settings.with_prior_preservation
        ids = models.tokenize(model, ["a photo of riobugger cat", "a photo of cat", ""])
        text = ids if settings.train_text_encoder else models.encode_text(model, ids)
        data = loop.TrainingData(
            instance=random_posteriors(3, seed=1),
            class_=random_posteriors(4, seed=2)
            if with_class and settings.prior_preservation_mode == "images"
            else None,
            instance_text=text[:1],
            class_text=text[1:2] if with_class else None,
            latent_scale=0.5,
            prior_text=models.encode_text(model, ids)[1:2] if with_class else None,
            empty_text=text[2:] if with_class else None,
            prior_empty_text=models.encode_text(model, ids)[2:] if with_class else None,
        )
        state = TrainingState(
            unet=model.unet,
            text_encoder=model.text_encoder if settings.train_text_encoder else None,
            optimizer=optimizer.build(
                trained,
                settings,
                use_8bit_adam=plan.use_8bit_adam,
            ),
            precision=Precision.for_plan(plan, CPU),
        )
        return Training(model=model, settings=settings, plan=plan, state=state, data=data)

    return make
