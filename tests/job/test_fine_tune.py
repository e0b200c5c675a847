"""Out of memory in training: real jobs on a miniature model whose optimizer runs out of memory."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import signal
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dreambooth.data import cache
from dreambooth.errors import ResourceError
from dreambooth.job import fine_tune
from dreambooth.job.run import run_job
from dreambooth.training import run_log
from dreambooth.training.step_metrics import StepMetrics

Start = Callable[..., int]
Optimizer = torch.optim.Optimizer
EIGHT_BIT = ("--memory_plan=8bit_adamw",)


@pytest.fixture
def start(small_model_folder: Path, tmp_path: Path) -> Start:
    photos = tmp_path / "photos"
    photos.mkdir()
    generator = np.random.default_rng(0)
    for number in range(3):
        pixels = generator.integers(0, 255, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{number}.png")
    prompts = {"instance_prompt": "a photo of riobugger cat", "class_prompt": "a photo of cat"}
    (photos / "dataset_info.json").write_text(json.dumps(prompts))

    def run(out: str, *options: str) -> int:
        argv = [f"--pretrained-model={small_model_folder}", f"--train={photos}"]
        argv += [f"--model_dir={tmp_path / out}", "--max_steps=4", "--learning_rate=1e-4"]
        return run_job([*argv, "--log_level=info", *options], {"SAGEMAKER_BASE_DIR": str(tmp_path)})

    return run


def weights(folder: Path) -> torch.Tensor:
    tensors = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    return torch.cat([tensors[key].flatten() for key in sorted(tensors)])


def steps(folder: Path) -> list[int]:
    lines = (folder.with_name(folder.name + "-output") / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


@contextmanager
def out_of_memory(where: Callable[[Optimizer, int], bool]) -> Iterator[list[str]]:
    """Make the optimizer steps chosen by `where(optimizer, its steps so far)` run out of memory.

    Yields a list to which each failing optimizer adds its type name.
    """
    failed: list[str] = []
    counts: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()

    def hook(optimizer: Optimizer, *_: object) -> None:
        done = counts.get(optimizer, 0)
        if where(optimizer, done):
            failed.append(type(optimizer).__name__)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
        counts[optimizer] = done + 1

    handle = register_optimizer_step_pre_hook(hook)
    try:
        yield failed
    finally:
        handle.remove()


def keeps_gradients(optimizer: Optimizer) -> bool:
    """Return whether an optimizer steps more than one weight at a time."""
    members = sum(len(group["params"]) for group in optimizer.param_groups)
    return members > 1


def test_it_goes_over_to_the_next_plan_from_the_start(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with out_of_memory(lambda adamw, done: type(adamw) is torch.optim.AdamW and done == 2):
        assert start("moved") == 0
    shown = capsys.readouterr().err
    assert "memory ran out with memory_plan fp32_adamw: going on with 8bit_adamw" in shown
    assert steps(tmp_path / "moved") == [1, 2, 3, 4]
    assert "memory ran out" in (tmp_path / "moved-output" / "report.html").read_text()
    assert start("named", *EIGHT_BIT) == 0
    assert torch.equal(weights(tmp_path / "moved"), weights(tmp_path / "named"))


def test_it_resumes_from_the_last_checkpoint(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str], small_model_folder: Path
) -> None:
    options = (f"--checkpoint_dir={tmp_path / 'kept'}", "--checkpointing_steps=2", "--resume=fresh")
    with out_of_memory(
        lambda adamw, done: type(adamw) is torch.optim.AdamW and done == 3
    ) as failed:
        assert start("moved", *options) == 0
    assert failed == ["AdamW"]
    assert "resumed at step 2" in capsys.readouterr().err
    assert steps(tmp_path / "moved") == [1, 2, 3, 4]
    assert start("whole") == 0
    base = weights(small_model_folder)
    moved, whole = weights(tmp_path / "moved") - base, weights(tmp_path / "whole") - base
    assert float(torch.nn.functional.cosine_similarity(moved, whole, dim=0)) > 0.99
    assert float(moved.norm() / whole.norm()) == pytest.approx(1, abs=0.02)


def test_a_job_that_moved_resumes_its_8_bit_checkpoint_under_any_automatic_plan(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str], small_model_folder: Path
) -> None:
    kept = tmp_path / "kept"
    options = (f"--checkpoint_dir={kept}", "--checkpointing_steps=2", "--checkpoints_total_limit=2")
    with out_of_memory(lambda adamw, _: type(adamw) is torch.optim.AdamW):
        assert start("moved", *options) == 0
    shutil.rmtree(kept / "step-00000004")
    capsys.readouterr()
    assert start("named", *options, *EIGHT_BIT) == 1
    assert "memory_plan was auto and is now 8bit_adamw" in capsys.readouterr().err
    with out_of_memory(lambda adamw, _: type(adamw) is torch.optim.AdamW):
        assert start("again", *options) == 0
    assert "resumed at step 2" in capsys.readouterr().err
    assert torch.equal(weights(tmp_path / "again"), weights(tmp_path / "moved"))
    shutil.rmtree(kept / "step-00000004")
    assert start("fp32", *options) == 0  # enough memory is free this time
    assert "resumed at step 2" in capsys.readouterr().err
    base = weights(small_model_folder)
    fp32, moved = weights(tmp_path / "fp32") - base, weights(tmp_path / "moved") - base
    assert float(torch.nn.functional.cosine_similarity(fp32, moved, dim=0)) > 0.99


def test_the_smallest_plan_is_reached(start: Start, tmp_path: Path) -> None:
    with out_of_memory(lambda adamw, _: keeps_gradients(adamw)) as failed:
        assert start("moved") == 0
    assert failed == ["AdamW", "NonBlockingAdamW8bit", "NonBlockingAdamW8bit"]
    assert start("named", *EIGHT_BIT) == 0
    assert torch.equal(weights(tmp_path / "moved"), weights(tmp_path / "named"))


def test_nothing_of_the_attempt_that_failed_is_kept(start: Start) -> None:
    attempts: list[weakref.ref[Any]] = []
    alive: list[bool] = []

    def first_step(adamw: Optimizer, done: int) -> bool:
        if done == 0 and keeps_gradients(adamw):
            gc.collect()
            alive.extend(attempt() is not None for attempt in attempts)
            attempts.append(weakref.ref(adamw.param_groups[0]["params"][0]))
        return type(adamw) is torch.optim.AdamW

    with out_of_memory(first_step):
        assert start("moved") == 0
    assert alive == [False]


def test_after_the_last_plan_the_job_ends_in_one_sentence(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with out_of_memory(lambda *_: True):
        assert start("none") == 1
    shown = capsys.readouterr().err
    assert "error: The GPU ran out of memory (memory_plan 8bit_adamw_in_backward): lower" in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "none" / "model_index.json").exists()


def test_a_named_plan_stays_and_the_smaller_ones_are_named(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    with out_of_memory(lambda *_: True) as failed:
        assert start("none", *EIGHT_BIT) == 1
    assert failed == ["NonBlockingAdamW8bit"]
    assert "memory_plan to 8bit_adamw_checkpointing or 8bit_adamw_in_backward" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("when", ["every step", "the last picture"])
def test_a_picture_that_memory_is_short_for_costs_no_training(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    options = ("--sample_steps=1",) * (when == "every step")
    assert start("whole", *options) == 0

    def generate(*_: object, **__: object) -> Iterator[None]:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except torch.OutOfMemoryError as error:
            raise ResourceError("The device ran out of memory while decoding.") from error
        yield

    monkeypatch.setattr("dreambooth.job.previews.sampling.generate", generate)
    with out_of_memory(lambda *_: False) as failed:
        assert start("some", *options) == 0
    assert failed == []
    assert steps(tmp_path / "some") == [1, 2, 3, 4]
    assert torch.equal(weights(tmp_path / "some"), weights(tmp_path / "whole"))
    assert list((tmp_path / "whole" / "samples").iterdir())
    assert not list(tmp_path.glob("some*/samples/*"))
    assert "no sample picture: memory ran out while it was drawn" in (
        (tmp_path / "some-output" / "report.html").read_text()
    )


def test_a_picture_that_cannot_be_drawn_costs_no_model(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("none is not supported")

    monkeypatch.setattr("dreambooth.job.previews.sampling.generate", fail)
    assert start("odd", "--sample_steps=2", "--compute_fid") == 0
    monkeypatch.undo()
    assert start("plain") == 0
    assert torch.equal(weights(tmp_path / "odd"), weights(tmp_path / "plain"))
    assert steps(tmp_path / "odd") == [1, 2, 3, 4]
    assert not list(tmp_path.glob("odd*/samples/*"))
    page = (tmp_path / "odd-output" / "report.html").read_text()
    assert "no sample picture: ValueError: none is not supported" in page
    assert "no fid_score: ValueError: none is not supported" in page


@pytest.mark.parametrize("kind", [ResourceError, OSError, ValueError])
def test_a_fault_in_reporting_the_last_step_costs_no_model(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    write_row = run_log.RunLog.step

    def step(self: run_log.RunLog, metrics: StepMetrics) -> None:
        write_row(self, metrics)
        if metrics.step == 4:
            raise kind("no room for this row")

    monkeypatch.setattr(run_log.RunLog, "step", step)
    assert start("model") == 0
    assert len(weights(tmp_path / "model"))
    assert "but not all of their report" in (tmp_path / "model-output" / "report.html").read_text()


def test_a_fault_in_reporting_an_earlier_step_ends_the_job(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(self: run_log.RunLog, metrics: StepMetrics) -> None:
        raise ResourceError("no room for this row")

    monkeypatch.setattr(run_log.RunLog, "step", step)
    assert start("model") == 1
    assert not (tmp_path / "model" / "model_index.json").exists()


def test_a_stop_during_the_export_is_not_kept_waiting_by_a_checkpoint(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = fine_tune.stopping.write_model

    def write_and_stop(*arguments: Any, **keywords: Any) -> None:
        write(*arguments, **keywords)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(fine_tune.stopping, "write_model", write_and_stop)
    options = (f"--checkpoint_dir={tmp_path / 'c'}", "--checkpointing_steps=2")
    assert start("model", *options) == 143
    assert len(weights(tmp_path / "model"))
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["step-00000002"]
    page = (tmp_path / "model-output" / "report.html").read_text()
    assert "The 4 steps were made and the model is whole; it has no sample picture." in page


def test_the_model_is_written_before_the_last_picture_is_drawn(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the process ends while it draws, as by a driver fault, the model is already written."""
    drawn: list[bool] = []

    def generate(*_: object, **__: object) -> Iterator[None]:
        drawn.append((tmp_path / "model" / "model_index.json").exists())
        if drawn[-1]:
            raise SystemExit(9)  # unlike an error, nothing catches this
        yield

    monkeypatch.setattr("dreambooth.job.previews.sampling.generate", generate)
    with pytest.raises(SystemExit):
        start("model", "--sample_steps=2")
    assert drawn == [False, True]
    assert len(weights(tmp_path / "model"))
    assert (tmp_path / "model" / "README.md").exists()


def test_a_picture_that_is_not_finite_is_left_out_with_a_warning(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dreambooth.job.previews.sampling.generate", lambda *_, **__: iter([None]))
    assert start("some", "--sample_steps=2") == 0
    assert not list(tmp_path.glob("some*/samples/*"))
    assert "no sample picture: it is not finite" in (
        (tmp_path / "some-output" / "report.html").read_text()
    )


def test_a_fresh_run_stays_fresh_when_memory_runs_out_early(
    start: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = (f"--checkpoint_dir={tmp_path / 'kept'}", "--checkpointing_steps=2")
    assert start("other", *options, "--seed=7") == 0
    build, calls = cache.build, []

    def once(*given: Any, **named: Any) -> cache.LatentPosteriors:
        calls.append(given)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return build(*given, **named)

    monkeypatch.setattr("dreambooth.job.encoding.cache.build", once)
    capsys.readouterr()
    assert start("moved", *options, "--resume=fresh") == 0
    assert "resumed at" not in capsys.readouterr().err
    assert start("named", *EIGHT_BIT) == 0
    assert torch.equal(weights(tmp_path / "moved"), weights(tmp_path / "named"))


def test_the_measured_peak_is_logged_beside_the_expected_one(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("plain") == 0
    shown = capsys.readouterr().err
    figure = r"\d+\.\d+ [GM]iB"
    assert re.search(rf"memory: {figure} expected by the plan, at the peak {figure} of", shown)


@pytest.mark.parametrize("name", ["8bit_adamw_in_backward", "8bit_adamw_checkpointing"])
def test_a_resumed_job_equals_the_unbroken_one_in_every_plan(
    start: Start, tmp_path: Path, name: str
) -> None:
    plan = f"--memory_plan={name}"
    assert start("whole", plan) == 0
    options = (plan, f"--checkpoint_dir={tmp_path / 'kept'}", "--checkpointing_steps=2")

    def third(optimizer: Optimizer, done: int) -> bool:
        return next(iter(optimizer.state.values()), {"step": 0})["step"] == 3

    with out_of_memory(third):  # a memory plan that was named is not replaced, so the job fails
        assert start("resumed", *options) == 1
    assert start("resumed", *options) == 0
    assert steps(tmp_path / "resumed") == [1, 2, 3, 4]
    assert torch.equal(weights(tmp_path / "resumed"), weights(tmp_path / "whole"))


@pytest.fixture
def fast_step(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Return options for the fast step and allow it on a CPU, where all but the capture works."""
    monkeypatch.setattr("dreambooth.training.memory_plan.fast_step_obstacle", lambda *_, **__: None)
    return ("--fast_step=True", "--mixed_precision=bf16")


def test_out_of_memory_in_the_fast_step_resumes_from_the_last_checkpoint(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str], fast_step: tuple[str, ...]
) -> None:
    def third(adamw: Optimizer, _: int) -> bool:
        steps_done = next(iter(adamw.state.values()), {"step": 0})["step"]
        return type(adamw) is torch.optim.AdamW and steps_done == 3

    options = (f"--checkpoint_dir={tmp_path / 'kept'}", "--checkpointing_steps=2")
    with out_of_memory(third) as failed:
        assert start("moved", *fast_step, *options) == 0
    assert failed == ["AdamW"]
    assert "resumed at step 2" in capsys.readouterr().err
    assert steps(tmp_path / "moved") == [1, 2, 3, 4]


def test_what_was_prepared_is_forgotten_even_where_torch_refuses_to_empty_its_caches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch does, before 2.12, after a capture of a CUDA graph that failed."""

    def refuse() -> None:
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    accelerator = Accelerator(cpu=True)
    trained = weakref.ref(accelerator.prepare(torch.nn.Linear(1, 1)))
    monkeypatch.setattr(accelerator, "free_memory", refuse)
    fine_tune._forget_training(accelerator)
    assert trained() is None
