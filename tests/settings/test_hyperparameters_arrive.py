"""Every hyperparameter with a value other than its default must have its effect.

`EFFECTS` names the test of each knob; a knob without one fails the suite.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

from dreambooth.job import run
from dreambooth.model_folder import conversion
from dreambooth.settings.hyperparameters import Hyperparameters
from dreambooth.training import optimizer

Folder = Callable[..., Path]


class Run:
    """A job on the miniature model and the files that it wrote."""

    def __init__(self, out: Path) -> None:
        self.model = out / "model"
        self.output = out / "model-output"

    @property
    def metrics(self) -> list[dict[str, Any]]:
        lines = (self.output / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def weights(self, part: str = "unet") -> torch.Tensor:
        name = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        tensors = load_file(self.model / part / f"{name}.safetensors")
        return torch.cat([tensors[key].flatten().float() for key in sorted(tensors)])


Start = Callable[..., Run]


@pytest.fixture(scope="module")
def start_job(
    class_images_of_four_steps: None,
    small_model_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Start:
    """Return a function that runs a job of two steps with the settings that it is given."""
    place = tmp_path_factory.mktemp("arrive")
    photos = place / "photos"
    for folder, count in ((photos, 3), (photos / "class_data_dir", 2), (photos / "mine", 2)):
        folder.mkdir()
        generator = np.random.default_rng(len(folder.name))
        for number in range(count):
            pixels = generator.integers(0, 255, (40, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    prompts = {"instance_prompt": "a photo of riobugger cat", "class_prompt": "a photo of cat"}
    (photos / "dataset_info.json").write_text(json.dumps(prompts))
    count = iter(range(100))

    def start(**settings: object) -> Run:
        out = place / f"run{next(count)}"
        settings = {
            **{"pretrained_model": small_model_folder, "max_steps": 2, "learning_rate": 1e-3},
            **{"num_class_images": 2, **settings},
        }
        options = [f"--{name}={value}" for name, value in settings.items()]
        argv = [f"--train={photos}", f"--model_dir={out / 'model'}", *options]
        assert run.run_job(argv, {}) == 0
        return Run(out)

    return start


@pytest.fixture(scope="module")
def run_job(start_job: Start) -> Start:
    """Return a function like `start_job`'s that runs equal settings once and returns that run."""
    runs: dict[str, Run] = {}

    def run_once(**settings: object) -> Run:
        key = repr(sorted(settings.items()))
        if key not in runs:
            runs[key] = start_job(**settings)
        return runs[key]

    return run_once


@pytest.fixture
def built_optimizers(monkeypatch: pytest.MonkeyPatch) -> list[torch.optim.Optimizer]:
    """Return a list that collects the optimizers which jobs build."""
    built: list[torch.optim.Optimizer] = []
    original = optimizer.build

    def build(*arguments: Any, **keywords: Any) -> torch.optim.Optimizer:
        built.append(original(*arguments, **keywords))
        return built[-1]

    monkeypatch.setattr(optimizer, "build", build)
    return built


PRIOR = {"with_prior_preservation": True}


def test_with_prior_preservation(run_job: Start) -> None:
    assert run_job().metrics[0]["class_loss"] is None
    assert run_job(**PRIOR).metrics[0]["class_loss"] > 0


def test_num_class_images(run_job: Start) -> None:
    run = run_job(**PRIOR, num_class_images=5)  # two are given already
    assert len(list((run.output / "class_images").glob("*.png"))) == 3


def test_epochs_and_max_steps(run_job: Start) -> None:
    assert len(run_job(max_steps=None, epochs=2).metrics) == 6
    assert len(run_job(max_steps=3, epochs=2).metrics) == 3


def test_batch_size(start_job: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    from dreambooth.diffusion import sampling

    batches: list[int] = []
    original = sampling.advance

    def advance(unet: Any, pictures: Any, text: Any) -> None:
        batches.append(len(pictures))
        original(unet, pictures, text)

    monkeypatch.setattr(sampling, "advance", advance)
    monkeypatch.setattr("dreambooth.training.expected_memory.CLASS_BATCH", 2)
    run = start_job(**PRIOR, num_class_images=5, batch_size=3)
    assert run.metrics[0]["epoch"] == 1.0
    assert batches[0] == 3  # class images are sampled in batches of this size


def test_learning_rate(run_job: Start) -> None:
    run = run_job(learning_rate=3e-4)
    assert [row["learning_rate"] for row in run.metrics] == [3e-4, 3e-4]


def test_prior_loss_weight(run_job: Start) -> None:
    row = run_job(**PRIOR, prior_loss_weight=0.5).metrics[0]
    assert row["loss"] == pytest.approx(row["instance_loss"] + 0.5 * row["class_loss"], rel=1e-5)


def test_center_crop(run_job: Start) -> None:
    random, centre = run_job(), run_job(center_crop=True)
    assert random.metrics[0]["loss"] != centre.metrics[0]["loss"]


def test_lr_scheduler_and_lr_warmup_steps(run_job: Start) -> None:
    rates = [r["learning_rate"] for r in run_job(lr_scheduler="linear", max_steps=4).metrics]
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    warm = run_job(lr_scheduler="constant_with_warmup", lr_warmup_steps=2, max_steps=4)
    assert [r["learning_rate"] for r in warm.metrics] == pytest.approx([0, 5e-4, 1e-3, 1e-3])


def test_adam_settings(
    run_job: Start, start_job: Start, built_optimizers: list[torch.optim.Optimizer]
) -> None:
    odd = {"adam_weight_decay": 0.3, "adam_beta1": 0.6, "adam_beta2": 0.7, "adam_epsilon": 1e-3}
    changed = start_job(**odd)
    group = built_optimizers[0].param_groups[0]
    assert (group["weight_decay"], *group["betas"], group["eps"]) == (0.3, 0.6, 0.7, 1e-3)
    assert built_optimizers[0].param_groups[1]["weight_decay"] == 0.0
    assert not torch.equal(run_job().weights(), changed.weights())


def test_gradient_accumulation_steps(run_job: Start) -> None:
    assert run_job(gradient_accumulation_steps=3).metrics[0]["epoch"] == 1.0


def test_max_grad_norm(run_job: Start) -> None:
    # AdamW's update does not depend on a common scale of all gradients, except through epsilon.
    plain = run_job(adam_epsilon=1e-2)
    clipped = run_job(adam_epsilon=1e-2, max_grad_norm=1e-4)
    # The norm before clipping.
    assert clipped.metrics[0]["grad_norm"] == plain.metrics[0]["grad_norm"]
    start = run_job(learning_rate=1e-30).weights()
    moved = (clipped.weights() - start).norm() / (plain.weights() - start).norm()
    assert moved < 0.1


def test_seed(run_job: Start) -> None:
    assert not torch.equal(run_job().weights(), run_job(seed=1).weights())


def test_train_text_encoder(run_job: Start) -> None:
    assert torch.equal(run_job().weights("text_encoder"), run_job(seed=1).weights("text_encoder"))
    trained = run_job(train_text_encoder=True)
    assert not torch.equal(trained.weights("text_encoder"), run_job().weights("text_encoder"))


def test_gradient_checkpointing(start_job: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    asked: list[bool] = []
    original = diffusers.UNet2DConditionModel.enable_gradient_checkpointing

    def enable(self: Any) -> None:
        asked.append(True)
        original(self)

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "enable_gradient_checkpointing", enable)
    plain = start_job()
    assert not asked
    assert torch.equal(start_job(gradient_checkpointing=True).weights(), plain.weights())
    assert asked


def test_use_8bit_adam_and_memory_plan(
    start_job: Start, built_optimizers: list[torch.optim.Optimizer]
) -> None:
    start_job(use_8bit_adam=True)
    start_job(memory_plan="8bit_adamw")
    start_job()
    assert [type(made).__name__ for made in built_optimizers] == [
        *("NonBlockingAdamW8bit", "NonBlockingAdamW8bit", "AdamW"),
    ]


def test_mixed_precision(run_job: Start) -> None:
    fp32, bf16 = run_job(), run_job(mixed_precision="bf16")
    assert fp32.metrics[0]["loss"] != bf16.metrics[0]["loss"]
    assert fp32.metrics[0]["loss"] == pytest.approx(bf16.metrics[0]["loss"], rel=0.02)


def test_prior_generation_precision(start_job: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    from dreambooth.diffusion import model as models

    loaded: list[torch.dtype] = []
    original = models.load

    def load(*arguments: Any, **keywords: Any) -> Any:
        loaded.append(keywords.get("dtype", torch.float32))
        return original(*arguments, **keywords)

    monkeypatch.setattr(models, "load", load)
    start_job(**PRIOR, num_class_images=3, prior_generation_precision="bf16")
    assert loaded == [torch.bfloat16, torch.float32]  # first the sampler, then the model to train


def test_class_data_dir(run_job: Start) -> None:
    default, mine = run_job(**PRIOR), run_job(**PRIOR, class_data_dir="mine")
    assert default.metrics[0]["class_loss"] != mine.metrics[0]["class_loss"]


def test_pretrained_model(run_job: Start, make_model_folder: Folder) -> None:
    other = make_model_folder(seed=9)
    run = run_job(pretrained_model=other)
    assert f"{other}" in (run.model / "README.md").read_text()
    assert not torch.equal(run.weights(), run_job().weights())


@pytest.fixture(scope="module")
def single_file(small_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the miniature model as one file."""
    path = tmp_path_factory.mktemp("file") / "small.safetensors"
    conversion.convert(small_model_folder, path)
    return path


def test_base(run_job: Start, single_file: Path, small_model_folder: Path) -> None:
    run = run_job(pretrained_model=single_file, base=small_model_folder)
    assert torch.equal(run.weights(), run_job().weights())


def test_prediction_type(run_job: Start, single_file: Path, small_model_folder: Path) -> None:
    settings = {"pretrained_model": single_file, "base": small_model_folder}
    run = run_job(**settings, prediction_type="v_prediction")
    scheduler = json.loads((run.model / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"
    assert not torch.equal(run.weights(), run_job().weights())


def test_keep_subjects(run_job: Start, small_model_folder: Path, tmp_path: Path) -> None:
    """A copy of the base that says that it was taught a dog."""
    taught = shutil.copytree(small_model_folder, tmp_path / "taught")
    info = {"instance_prompt": "a photo of doppler dog", "class_prompt": "a photo of dog"}
    (taught / "__model_info__.json").write_text(json.dumps(info))
    runs = {
        how: run_job(pretrained_model=taught, keep_subjects=how)
        for how in ("auto", "true", "False")
    }
    assert "kept_loss" in runs["auto"].metrics[0]
    assert torch.equal(runs["auto"].weights(), runs["true"].weights())
    assert "kept_loss" not in runs["False"].metrics[0]
    assert torch.equal(runs["False"].weights(), run_job().weights())
    assert not torch.equal(runs["auto"].weights(), runs["False"].weights())


def test_export_single_file(run_job: Start, small_model_folder: Path, tmp_path: Path) -> None:
    assert not (run_job().output / "model.safetensors").exists()
    run = run_job(export_single_file=True)
    conversion.convert(run.output / "model.safetensors", tmp_path / "m", base=str(run.model))
    for part in ("unet", "vae", "text_encoder"):
        [mine], [other] = ((f / part).glob("*.safetensors") for f in (run.model, tmp_path / "m"))
        first, second = load_file(mine), load_file(other)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert not (run.model / "model.safetensors").exists()


def test_resolution(run_job: Start) -> None:
    run = run_job(resolution=64)
    assert json.loads((run.model / "__model_info__.json").read_text())["resolution"] == 64
    [sample] = (run.model / "samples").iterdir()
    with Image.open(sample) as picture:
        assert picture.size == (64, 64)


def test_checkpointing_steps_and_checkpoints_total_limit(run_job: Start) -> None:
    run = run_job(checkpointing_steps=1, max_steps=4)
    assert [path.name for path in (run.output / "checkpoints").iterdir()] == ["step-00000004"]
    run = run_job(checkpointing_steps=1, max_steps=4, checkpoints_total_limit=3)
    assert len(list((run.output / "checkpoints").iterdir())) == 3


def test_keep_last_checkpoint(run_job: Start) -> None:
    run = run_job(keep_last_checkpoint=True)
    assert [path.name for path in (run.output / "checkpoints").iterdir()] == ["step-00000002"]
    assert not (run_job().output / "checkpoints").exists()


def test_checkpointing_minutes(run_job: Start) -> None:
    run = run_job(checkpointing_minutes=1e-6)
    assert [path.name for path in (run.output / "checkpoints").iterdir()] == ["step-00000002"]
    assert not (run_job().output / "checkpoints").exists()


def test_sample_steps_and_sample_prompt(run_job: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_job(sample_steps=1, sample_prompt="a photo of dog")
    assert len(list((run.output / "samples").iterdir())) == 2
    assert "a photo of dog" in (run.model / "README.md").read_text()
    # Drawing previews does not change training.
    assert torch.equal(run.weights(), run_job().weights())


def test_export_precision(run_job: Start) -> None:
    run = run_job(export_precision="fp16")
    for part in ("unet", "vae"):
        tensors = load_file(run.model / part / "diffusion_pytorch_model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_deterministic(start_job: Start) -> None:
    try:
        start_job()
        assert not torch.are_deterministic_algorithms_enabled()
        start_job(deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_fast_step(
    start_job: Start, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bf16 = {"mixed_precision": "bf16", "max_steps": 5}
    left_out = start_job(**bf16, fast_step=True)
    assert "fast_step is left out: there is no CUDA graph on CPU." in capsys.readouterr().err
    plain = start_job(**bf16)
    assert torch.equal(left_out.weights(), plain.weights())
    # Everything but the capture works on a CPU, too.
    monkeypatch.setattr("dreambooth.training.memory_plan.fast_step_obstacle", lambda *_, **__: None)
    fast = start_job(**bf16, fast_step=True, sample_steps=3)
    assert len(list((fast.output / "samples").iterdir())) == 1
    assert [row["step"] for row in fast.metrics] == [1, 2, 3, 4, 5]
    losses = [row["loss"] for row in fast.metrics]
    assert losses == pytest.approx([row["loss"] for row in plain.metrics], rel=0.02)
    assert losses != [row["loss"] for row in plain.metrics]
    near = (fast.weights() - plain.weights()).abs().mean()
    assert 0 < float(near) < 1e-3  # after five steps of 1e-3
    tensors = load_file(fast.model / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    halves = sum(int(torch.equal(t, t.bfloat16().float())) for t in tensors.values())
    assert halves < len(tensors) / 2  # fp32 masters are saved, not the half-precision weights


def test_prior_preservation_mode(run_job: Start) -> None:
    run = run_job(**PRIOR, prior_preservation_mode="prediction")
    assert run.metrics[0]["class_loss"] == pytest.approx(0, abs=1e-9)
    assert run.metrics[1]["class_loss"] > 0


def test_training_guidance_scale(run_job: Start) -> None:
    prediction = {**PRIOR, "prior_preservation_mode": "prediction"}
    plain, guided = (run_job(**prediction, training_guidance_scale=scale) for scale in (1, 4))
    # The first prediction is the base's own, from which the target is a quarter as far.
    first, quarter = plain.metrics[0]["instance_loss"], guided.metrics[0]["instance_loss"]
    assert quarter < first / 4
    # At odd steps the empty prompt is held in the class prompt's place.
    assert guided.metrics[0]["class_loss"] == pytest.approx(0, abs=1e-9)
    assert guided.metrics[1]["class_loss"] > 0
    assert guided.metrics[1]["class_loss"] != plain.metrics[1]["class_loss"]


def test_compute_fid_and_fid_features(
    start_job: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start_job()
    shown = capsys.readouterr()
    assert "fid_score" not in shown.out + shown.err
    start_job(compute_fid=True)
    shown = capsys.readouterr()
    [score] = re.findall(r"fid_score=([-+]?\d\.?\d*)", shown.out)  # the tuner's regular expression
    assert float(score) >= 0
    assert "fid_score=" not in shown.err
    assert "features: EfficientNet-Lite0, trained on ImageNet" in shown.err
    config = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        projection_dim=8,
    )
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "clip")
    start_job(compute_fid=True, fid_features=tmp_path / "clip")
    assert "features: CLIPVisionModelWithProjection" in capsys.readouterr().err


def test_compute_scores(
    start_job: Start, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dreambooth.job.scoring.SCORED_STEPS", 2)
    monkeypatch.setattr("dreambooth.job.scoring.SCORED_PICTURES", 2)
    start_job(compute_scores=True)
    shown = capsys.readouterr()
    for name in ("subject_score", "class_kept"):
        (score,) = re.findall(rf"^{name}=(\d\.\d+)$", shown.out, re.MULTILINE)
        assert 0 <= float(score) <= 1
    assert "features: EfficientNet-Lite0, trained on ImageNet" in shown.err


def test_meter(start_job: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dreambooth.training.meter.SHARE", 9.0)  # two steps are too few for a tenth
    assert "meter" in start_job().metrics[-1]
    assert "meter" not in start_job(meter=False).metrics[-1]


def test_meter_pictures_share(start_job: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dreambooth.training.plan.SCORED_STEPS", 2)
    monkeypatch.setattr("dreambooth.training.meter_budget.PICTURE_ROWS", 0.5)  # of the run's six
    names = ("subject", "place", "class", "other_class")
    for share, steps in ((0, []), (0.4, [2]), (0.8, [0, 2])):
        meter = start_job(meter_pictures_share=share).output / "meter"
        expected = {f"step-{step:06d}-{name}.png" for step in steps for name in names}
        assert {path.name for path in meter.glob("*.png")} == expected


def test_early_stopping_and_keep_states(start_job: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dreambooth.training.meter.SHARE", 9.0)
    settings = {"max_steps": 3, "early_stopping": True, "keep_last_checkpoint": True}
    for keep, steps in ((1, ["step-00000003"]), (2, ["step-00000002", "step-00000003"])):
        run = start_job(**settings, keep_states=keep)
        kept = run.output / "checkpoints" / "states"
        assert sorted(path.name for path in kept.iterdir()) == steps
    monkeypatch.setattr("dreambooth.training.early_stopping.GUIDANCE_LIMIT", -1.0)
    assert len(start_job(**settings).metrics) == 2


def test_processes(start_job: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """That they train is seen in tests/job/test_processes.py; here, that they are started."""
    started = []

    def note(*arguments: Any, **keywords: Any) -> None:
        started.append(arguments[2].on_each_host)

    monkeypatch.setattr("dreambooth.job.workers.run", note)
    start_job(processes=3)
    start_job(processes=1)
    assert started == [3]


EFFECTS = {
    "compute_fid": "test_compute_fid_and_fid_features",
    "compute_scores": "test_compute_scores",
    "early_stopping": "test_early_stopping_and_keep_states",
    "keep_states": "test_early_stopping_and_keep_states",
    "fid_features": "test_compute_fid_and_fid_features",
    "epochs": "test_epochs_and_max_steps",
    "max_steps": "test_epochs_and_max_steps",
    "lr_scheduler": "test_lr_scheduler_and_lr_warmup_steps",
    "lr_warmup_steps": "test_lr_scheduler_and_lr_warmup_steps",
    "adam_weight_decay": "test_adam_settings",
    "adam_beta1": "test_adam_settings",
    "adam_beta2": "test_adam_settings",
    "adam_epsilon": "test_adam_settings",
    "use_8bit_adam": "test_use_8bit_adam_and_memory_plan",
    "memory_plan": "test_use_8bit_adam_and_memory_plan",
    "checkpointing_steps": "test_checkpointing_steps_and_checkpoints_total_limit",
    "checkpoints_total_limit": "test_checkpointing_steps_and_checkpoints_total_limit",
    "sample_steps": "test_sample_steps_and_sample_prompt",
    "sample_prompt": "test_sample_steps_and_sample_prompt",
    # See tests/job/test_run.py.
    "resume": "test_a_changed_setting_refuses_to_resume_unless_resume_is_fresh",
}


def test_every_hyperparameter_has_a_test_of_its_effect() -> None:
    jobs = Path(__file__).parents[1] / "job"
    elsewhere = "".join((jobs / f"test_{name}.py").read_text() for name in ("run", "masked_loss"))
    for knob in fields(Hyperparameters):
        name = EFFECTS.get(knob.name, f"test_{knob.name}")
        assert name in globals() or f"def {name}(" in elsewhere, knob.name
