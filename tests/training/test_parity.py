"""Learning parity with a plain loop written from the DreamBooth paper.

At the published learning rate of 2e-06 rounding eats small updates and loss curves are blind, so
what is compared is the displacement of the weights (after minus before) over 50 steps.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from dreambooth.data import cache, pairs
from dreambooth.data.dataset_info import DatasetInfo
from dreambooth.diffusion import model as models
from dreambooth.hyperparameters import KNOBS, MEMORY_PLANS, Hyperparameters
from dreambooth.training import loop, optimizer
from dreambooth.training import plan as plans
from dreambooth.training.device import CPU as CPU_FACTS
from dreambooth.training.precision import Precision
from dreambooth.training.state import TrainingState

CPU = torch.device("cpu")
STEPS = 50
INSTANCE, CLASS = "a photo of riobugger cat", "a photo of cat"


@dataclass
class World:
    model: models.DiffusionModel
    instances: list[Path]
    classes: list[Path]


@pytest.fixture(scope="module")
def world(small_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    paths = []
    for number in range(7):
        paths.append(folder / f"{number}.png")
        pixels = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(paths[-1])
    model = models.load(small_model_folder, device=CPU)
    return World(model=model, instances=paths[:3], classes=paths[3:])


def reference(world: World, unet: nn.Module, settings: Hyperparameters) -> None:
    """DreamBooth (Ruiz et al. 2022) in plain words: everything encoded at every step, in fp32."""
    model = world.model
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    no_decay = {
        id(p)
        for module in unet.modules()
        for name, p in module.named_parameters(recurse=False)
        if name == "bias" or isinstance(module, nn.LayerNorm)
    }
    decayed = [p for p in unet.parameters() if id(p) not in no_decay]
    exempt = [p for p in unet.parameters() if id(p) in no_decay]
    adamw = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": settings.adam_weight_decay},
            {"params": exempt, "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        foreach=False,
        fused=False,
    )
    accumulation = settings.gradient_accumulation_steps
    halves = [("instance", world.instances, INSTANCE, 1.0)]
    if settings.with_prior_preservation:
        halves.append(("class", world.classes, CLASS, settings.prior_loss_weight))
    for step in range(STEPS):
        adamw.zero_grad()
        for micro_batch in range(accumulation):
            for stream, paths, prompt, weight in halves:
                numbers = range(
                    (step * accumulation + micro_batch) * settings.batch_size,
                    (step * accumulation + micro_batch + 1) * settings.batch_size,
                )
                drawn = pairs.draw(  # the same noise, timesteps and batches; all else is our own
                    numbers,
                    seed=settings.seed,
                    stream=stream,
                    crops=[1] * len(paths),
                    latent_shape=(4, 16, 16),
                    train_timesteps=1000,
                )
                pictures = [Image.open(paths[int(i)]).convert("RGB") for i in drawn.images]
                pixels = torch.stack(
                    [torch.tensor(np.array(p)).permute(2, 0, 1) / 127.5 - 1 for p in pictures]
                )
                with torch.no_grad():
                    posterior = model.vae.encode(pixels).latent_dist
                    latents = posterior.mean + posterior.std * drawn.posterior_noise
                    latents = latents * model.vae.config.scaling_factor
                    ids = model.tokenizer(
                        [prompt] * len(numbers), padding="max_length", return_tensors="pt"
                    ).input_ids
                    text = model.text_encoder(ids)[0]
                a = alpha_bar[drawn.timesteps][:, None, None, None]
                noisy = a.sqrt() * latents + (1 - a).sqrt() * drawn.noise
                predicted = unet(noisy, drawn.timesteps, text).sample
                loss = weight * ((predicted - drawn.noise) ** 2).mean()
                (loss / accumulation).backward()
        norm = sum((p.grad**2).sum() for p in unet.parameters()).sqrt()
        for p in unet.parameters():
            p.grad *= min(1.0, float(settings.max_grad_norm / norm))
        adamw.step()


def ours(world: World, unet: nn.Module, settings: Hyperparameters) -> None:
    model = copy.copy(world.model)
    model.unet = unet
    posteriors = [
        cache.build(
            paths,
            resolution=32,
            center_crop=False,
            crops=4,
            seed=0,
            stream=stream,
            encode_image=lambda pixels: models.encode_posterior(model, pixels),
        )
        for stream, paths in (("instance", world.instances), ("class", world.classes))
    ]
    texts = [
        models.encode_text(model, models.tokenize(model, [prompt])) for prompt in (INSTANCE, CLASS)
    ]
    with_class = settings.with_prior_preservation
    data = loop.TrainingData(
        instance=posteriors[0],
        class_=posteriors[1] if with_class else None,
        instance_text=texts[0],
        class_text=texts[1] if with_class else None,
        latent_scale=model.vae.config.scaling_factor,
    )
    dataset = DatasetInfo(
        folder=world.instances[0].parent,
        instance_prompt=INSTANCE,
        class_prompt=CLASS,
        instance_images=tuple(world.instances),
        class_images=tuple(world.classes),
        warnings=(),
    )
    plan = plans.make(settings, dataset, None, CPU_FACTS)
    if settings.fast_step:  # which is CUDA's, but for the capture
        plan = replace(plan, fast_step=True)
    if plan.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if plan.rounds_stochastically:
        nn.Module.to(unet, torch.bfloat16)
    state = TrainingState(
        unet=unet,
        text_encoder=None,
        optimizer=optimizer.build(
            [unet],
            settings,
            use_8bit_adam=plan.use_8bit_adam,
            rounds_stochastically=plan.rounds_stochastically,
        ),
        precision=Precision.of(plan, CPU),
    )
    steps = loop.train(
        state,
        data,
        plan,
        settings,
        noise_scheduler=models.training_noise_scheduler(model),
        encode_text=lambda ids: models.text_features(model, ids),
        accelerator=Accelerator(cpu=True),
    )
    assert [metrics.step for metrics in steps] == list(range(1, STEPS + 1))


def displacement(before: nn.Module, after: nn.Module) -> torch.Tensor:
    pairs_of_weights = zip(before.parameters(), after.parameters(), strict=True)
    return torch.cat([(b.double() - a.double()).flatten() for a, b in pairs_of_weights]).detach()


def compare(world: World, settings: Hyperparameters) -> tuple[float, float]:
    """(cosine, ratio of norms) of our displacement against the reference's."""
    theirs, own = copy.deepcopy(world.model.unet), copy.deepcopy(world.model.unet)
    for unet in (theirs, own):
        unet.requires_grad_(True).train()
    reference(world, theirs, settings)
    ours(world, own, settings)
    a, b = displacement(world.model.unet, own), displacement(world.model.unet, theirs)
    return float(a @ b / (a.norm() * b.norm())), float(a.norm() / b.norm())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"with_prior_preservation": True, "prior_loss_weight": 0.7},
        {"batch_size": 2, "gradient_accumulation_steps": 2},
        {"max_grad_norm": 0.01, "adam_weight_decay": 1.0},
    ],
    ids=["defaults", "prior preservation", "accumulation", "clipping and decay"],
)
def test_fp32_displacement_equals_the_references(world: World, changes: dict[str, object]) -> None:
    settings = Hyperparameters(max_steps=STEPS, **changes)  # type: ignore[arg-type]
    cosine, ratio = compare(world, settings)
    assert cosine >= 0.999
    assert ratio == pytest.approx(1.0, abs=0.01)


# Measured 2026-11-22 on two cores: cosines 0.99982, 0.99999, 0.99979, 0.99961; norms within 0.1 %.
# The fast step on 2026-11-23: 0.99982, 0.99999, 0.99961, 0.99988; norms within 0.05 %.
# 8bit_adamw_in_backward has the very weights of 8bit_adamw, so each figure is that of both.
@pytest.mark.parametrize(
    ("changes", "least_cosine", "norm_within"),
    [
        ({"mixed_precision": "bf16"}, 0.999, 0.01),
        ({"mixed_precision": "fp16"}, 0.9995, 0.01),
        ({"use_8bit_adam": True}, 0.999, 0.01),
        ({"memory_plan": "8bit_adamw_in_backward", "mixed_precision": "bf16"}, 0.999, 0.01),
        ({"fast_step": True, "mixed_precision": "bf16"}, 0.999, 0.01),
        ({"fast_step": True, "mixed_precision": "fp16"}, 0.9995, 0.01),
        ({"fast_step": True, "mixed_precision": "bf16", "use_8bit_adam": True}, 0.999, 0.01),
        (
            {"fast_step": True, "mixed_precision": "bf16", "with_prior_preservation": True},
            *(0.999, 0.01),
        ),
    ],
    ids=[
        *("bf16", "fp16 with loss scaling", "8-bit AdamW", "the smallest plan in bf16"),
        *("fast step", "fast step in fp16", "fast step, 8-bit", "fast step, prior preservation"),
    ],
)
def test_cheaper_arithmetic_keeps_to_its_stated_figure(
    world: World, changes: dict[str, object], least_cosine: float, norm_within: float
) -> None:
    settings = Hyperparameters(max_steps=STEPS, **changes)  # type: ignore[arg-type]
    cosine, ratio = compare(world, settings)
    assert cosine >= least_cosine
    assert ratio == pytest.approx(1.0, abs=norm_within)


# Measured 2026-11-23: cosine 0.266, norm 3.75 (counted from its own bf16 start: 0.347, 2.87); at a
# learning rate of 1e-5 0.610 and 1.63, at 1e-4 0.925 and 1.08.
def test_stochastic_rounding_is_offered_by_name_alone_for_its_stated_figure(world: World) -> None:
    name = "8bit_adamw_stochastic_rounding"
    assert not MEMORY_PLANS[name].is_automatic
    cosine, ratio = compare(world, Hyperparameters(max_steps=STEPS, memory_plan=name))
    (sentence,) = [knob.sentence for knob in KNOBS if knob.name == "memory_plan"]
    found = re.search(r"cosine (0\.\d\d) with fp32's, those of others at 0\.999", sentence)
    assert found is not None
    assert cosine == pytest.approx(float(found[1]), abs=0.02)
    assert ratio == pytest.approx(3.75, abs=0.3)


@pytest.mark.parametrize(
    ("changes", "cosine_below", "norm_off"),
    [({"learning_rate": 2.1e-6}, 1.1, 0.03), ({"seed": 1}, 0.99, 0.0)],
    ids=["learning rate", "noise"],
)
def test_the_comparison_notices_each_fault(
    world: World, changes: dict[str, object], cosine_below: float, norm_off: float
) -> None:
    theirs, own = copy.deepcopy(world.model.unet), copy.deepcopy(world.model.unet)
    for unet in (theirs, own):
        unet.requires_grad_(True).train()
    reference(world, theirs, Hyperparameters(max_steps=STEPS))
    ours(world, own, Hyperparameters(max_steps=STEPS, **changes))  # type: ignore[arg-type]
    a, b = displacement(world.model.unet, own), displacement(world.model.unet, theirs)
    assert float(a @ b / (a.norm() * b.norm())) < cosine_below
    assert abs(float(a.norm() / b.norm()) - 1.0) >= norm_off
