"""Out of memory and other faults in the middle of drawing: which requests fail and which do not."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from dreambooth.diffusion import model as models
from dreambooth.diffusion import trajectories
from dreambooth.diffusion.model import DiffusionModel
from dreambooth.diffusion.sampling_request import SamplingRequest
from dreambooth.errors import ResourceError
from dreambooth.serving.contract.reply import Picture
from dreambooth.serving.engine.drawing_jobs import DrawingJob
from dreambooth.serving.engine.worker import Worker


@pytest.fixture(scope="module")
def model(small_model_folder: Path) -> DiffusionModel:
    return models.load(small_model_folder, device=torch.device("cpu"))


def request(seed: int, **options: Any) -> SamplingRequest:
    given: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 4} | options
    return SamplingRequest(seed=seed, **given)


def worker(model: DiffusionModel, **options: Any) -> Worker:
    given: dict[str, Any] = {"batch_rows": None, "max_rows": 8, "safety_checker": None} | options
    return Worker(model, **given)


def run(worker: Worker, *requests: Sequence[SamplingRequest]) -> list[DrawingJob]:
    """Add one job per list of requests and run the worker until all are done."""
    jobs = [DrawingJob(each) for each in requests]
    for job in jobs:
        worker.add(job)
    for _ in range(2000):
        if not worker.has_work:
            break
        worker.run_round()
    assert not worker.has_work
    assert worker.batch_queue.running_rows == worker.batch_queue.waiting_count == 0
    return jobs


def pictures(jobs: Sequence[DrawingJob]) -> list[Picture]:
    return [picture for job in jobs for picture in job.result(timeout=0)]


def difference(some: Sequence[Picture], others: Sequence[Picture]) -> int:
    pairs = list(zip(some, others, strict=True))
    assert all(one.finish_reason == other.finish_reason == "SUCCESS" for one, other in pairs)
    return max(int(np.abs(one.pixels.astype(int) - two.pixels).max()) for one, two in pairs)


class Allocator:
    """A forward pre-hook that notes each call's rows and raises where `fails(rows)` is true."""

    def __init__(self, fails: Callable[[int], bool], error: Exception | None = None) -> None:
        self.fails, self.error = fails, error or torch.OutOfMemoryError("CUDA out of memory")
        self.calls: list[int] = []

    def __call__(self, module: object, inputs: tuple[Any, ...]) -> None:
        self.calls.append(len(inputs[0]))
        if self.fails(len(inputs[0])):
            raise self.error


@contextlib.contextmanager
def failing(
    module: torch.nn.Module, fails: Callable[[int], bool], error: Exception | None = None
) -> Iterator[Allocator]:
    allocator = Allocator(fails, error)
    hook = module.register_forward_pre_hook(allocator)
    try:
        yield allocator
    finally:
        hook.remove()


def once(at: int) -> Callable[[int], bool]:
    """Return a predicate that is true only in its at-th call (counted from 1)."""
    count = 0

    def fails(rows: int) -> bool:
        nonlocal count
        count += 1
        return count == at

    return fails


@pytest.mark.parametrize("at", range(1, 6))
@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "DPMSolverMultistepScheduler"])
def test_a_call_that_does_not_fit_is_made_in_halves_at_any_step(
    model: DiffusionModel, scheduler: str, at: int
) -> None:
    model.scheduler_class = scheduler
    wanted = [[request(seed)] for seed in range(4)]
    expected = pictures(run(worker(model), *wanted))
    engine = worker(model)
    with failing(model.unet, once(at)) as allocator:
        got = pictures(run(engine, *wanted))
    assert difference(got, expected) <= 2
    assert all(picture.exact for picture in got)  # elastic mode has no exactness to give up
    if at <= len(allocator.calls) // 2:
        assert allocator.calls[at - 1 : at + 2] == [8, 4, 4]
        assert engine.unet_caller.out_of_memory_total == 1
    model.scheduler_class = "PNDMScheduler"


def test_exact_rows_keep_every_byte_when_a_call_is_halved(model: DiffusionModel) -> None:
    """Each call has one row before and after, so nothing can change."""
    wanted = [[request(seed, guidance_scale=1.0)] for seed in range(2)]
    expected = pictures(run(worker(model, max_rows=1), *wanted))
    with failing(model.unet, lambda rows: rows > 1):
        got = pictures(run(worker(model, max_rows=2), *wanted))
    assert difference(got, expected) == 0


def test_the_halves_of_one_guided_picture_may_go_separately(model: DiffusionModel) -> None:
    expected = pictures(run(worker(model), [request(1)]))
    with failing(model.unet, lambda rows: rows > 1):
        assert difference(pictures(run(worker(model), [request(1)])), expected) <= 2


def test_after_a_while_larger_calls_are_tried_again(model: DiffusionModel) -> None:
    engine = worker(model, max_rows=4)
    with failing(model.unet, once(1)) as allocator:
        run(engine, [request(seed, num_inference_steps=55) for seed in range(2)])
    assert allocator.calls[:3] == [4, 2, 2]
    assert allocator.calls[-1] == 4
    assert engine.unet_caller.out_of_memory_total == 1


def test_other_sizes_keep_their_rows(model: DiffusionModel) -> None:
    large = [[request(seed, width=64, height=64, guidance_scale=1.0)] for seed in range(2)]
    small = [[request(seed)] for seed in range(2)]
    engine = worker(model)
    area = 0

    def note(module: object, inputs: tuple[Any, ...]) -> None:
        nonlocal area
        area = inputs[0].shape[-1]

    hook = model.unet.register_forward_pre_hook(note)
    with failing(model.unet, lambda rows: area == 32 and rows > 1) as allocator:
        run(engine, *large, *small)
    hook.remove()
    assert 4 in allocator.calls
    assert engine.unet_caller.allowed_rows((32, 32)) == 8
    assert engine.unet_caller.allowed_rows((64, 64)) == 1


def test_what_does_not_fit_alone_fails_with_the_size_that_would(model: DiffusionModel) -> None:
    engine = worker(model)
    run(engine, [request(1)])
    area = 0

    def note(module: object, inputs: tuple[Any, ...]) -> None:
        nonlocal area
        area = inputs[0].shape[-1]

    hook = model.unet.register_forward_pre_hook(note)
    with failing(model.unet, lambda _: area == 20):
        too_large, fine = run(
            engine, [request(2), request(3, width=40, height=40), request(4)], [request(5)]
        )
    hook.remove()
    with pytest.raises(ResourceError, match="40 x 40 pixels; 32 x 32 should fit"):
        too_large.result(timeout=0)
    assert difference(pictures([fine]), pictures(run(worker(model), [request(5)]))) <= 2


def test_exact_mode_says_when_memory_has_lifted_it(model: DiffusionModel) -> None:
    engine = worker(model, batch_rows=4)
    wanted = [[request(1)], [request(2)]]
    expected = pictures(run(engine, *wanted))
    with failing(model.unet, once(2)) as allocator:
        got = pictures(run(engine, *wanted))
    assert allocator.calls[:4] == [4, 4, 2, 2]
    assert [picture.exact for picture in got] == [False, False]
    assert difference(got, expected) <= 2


def test_exact_mode_comes_back_with_the_memory(model: DiffusionModel) -> None:
    engine = worker(model, batch_rows=4)
    expected = pictures(run(engine, [request(1)]))
    with failing(model.unet, once(1)):
        run(engine, [request(seed, num_inference_steps=52) for seed in (5, 6)])
    got = pictures(run(engine, [request(1)]))
    assert got[0].exact
    assert difference(got, expected) == 0


def test_memory_short_for_the_text_is_tried_once_more(model: DiffusionModel) -> None:
    wanted = [[request(1)], [request(2, prompt="snow")]]
    expected = pictures(run(worker(model), *wanted))
    layer = model.text_encoder.get_submodule("encoder.layers.0")
    with failing(layer, once(2)):
        assert difference(pictures(run(worker(model), *wanted)), expected) == 0


def test_text_that_never_fits_fails_its_job_alone(model: DiffusionModel) -> None:
    engine = worker(model)
    expected = pictures(run(engine, [request(1)]))
    layer = model.text_encoder.get_submodule("encoder.layers.0")
    with failing(layer, lambda _: True):
        known, unknown = run(engine, [request(1)], [request(2, prompt="snow")])
        with pytest.raises(ResourceError):
            unknown.result(timeout=0)
    # The text cache was emptied meanwhile; a picture being drawn no longer needs it.
    assert difference(pictures([known]), expected) <= 2


def test_memory_short_for_decoding_is_tried_once_more(model: DiffusionModel) -> None:
    wanted = [[request(1)], [request(2)]]
    expected = pictures(run(worker(model), *wanted))
    with failing(model.vae.decoder.mid_block, once(2)):
        assert difference(pictures(run(worker(model), *wanted)), expected) == 0


def test_a_picture_that_cannot_be_decoded_fails_its_job_alone(model: DiffusionModel) -> None:
    expected = pictures(run(worker(model), [request(1)], [request(2)]))
    with failing(
        model.vae.decoder.mid_block, (lambda counts: lambda _: next(counts) < 2)(iter(range(99)))
    ):
        lost, fine = run(worker(model), [request(1)], [request(2)])
    with pytest.raises(ResourceError, match="32 x 32 pixels; 16 x 16 should fit"):
        lost.result(timeout=0)
    assert difference(pictures([fine]), expected[1:]) == 0


@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_noise_scheduler_without_memory_begins_its_picture_anew(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """This noise scheduler clips and therefore has no table."""
    settings = model.scheduler_config | {"clip_sample": True}
    model = dataclasses.replace(model, scheduler_class="DDIMScheduler", scheduler_config=settings)
    wanted = [[request(1)], [request(2)]]
    expected = pictures(run(worker(model), *wanted))
    engine = worker(model)
    run(engine, [request(3)])
    step, fails = diffusers.DDIMScheduler.step, once(at)

    def half_a_step(self: Any, *args: Any, **options: Any) -> Any:
        result = step(self, *args, **options)
        if fails(1):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    monkeypatch.setattr(diffusers.DDIMScheduler, "step", half_a_step)
    before = engine.calls_total
    assert difference(pictures(run(engine, *wanted)), expected) <= 2
    assert engine.calls_total - before == 4 + (at + 1) // 2


@pytest.mark.parametrize("at", [1, 2, 4])
@pytest.mark.parametrize("batch_rows", [None, 4])
def test_a_step_of_all_without_memory_is_taken_one_by_one(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch, at: int, batch_rows: int | None
) -> None:
    model = dataclasses.replace(model, scheduler_class="EulerAncestralDiscreteScheduler")
    wanted = [[request(1)], [request(2)]]
    engine = worker(model, batch_rows=batch_rows)
    expected = pictures(run(engine, *wanted))
    before = engine.calls_total
    sizes: list[int] = []
    step, fails = trajectories.step, once(at)

    def no_memory(company: Sequence[Any], preds: torch.Tensor) -> None:
        sizes.append(len(company))
        with monkeypatch.context() as patched:
            if fails(1):
                patched.setattr(torch, "mul", full)
            step(company, preds)

    def full(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trajectories, "step", no_memory)
    got = pictures(run(engine, *wanted))
    assert difference(got, expected) == 0
    assert all(picture.exact for picture in got)
    assert engine.calls_total - before == 4  # no picture had to start again
    assert engine.unet_caller.out_of_memory_total == 1
    if at == 1:
        assert sizes == [2, 1, 1, 2, 2, 2]


def test_any_other_fault_of_a_shared_call_hurts_only_its_cause(model: DiffusionModel) -> None:
    engine = worker(model)
    expected = pictures(run(worker(model), [request(1)], [request(3)]))
    hidden = engine._texts.get("dog")
    bad = float(hidden[1, 0])

    def poisoned(_: object, args: Any, options: dict[str, Any]) -> None:
        if (options["encoder_hidden_states"][:, 1, 0] == bad).any():
            raise RuntimeError("a kernel failed")

    hook = model.unet.register_forward_pre_hook(poisoned, with_kwargs=True)
    first, cause, last = run(engine, [request(1)], [request(2, prompt="dog")], [request(3)])
    hook.remove()
    with pytest.raises(RuntimeError, match="a kernel failed"):
        cause.result(timeout=0)
    assert difference(pictures([first, last]), expected) <= 2


def test_a_lost_device_is_not_lived_with(model: DiffusionModel) -> None:
    engine = worker(model)
    engine.add(DrawingJob([request(1)]))
    with (
        failing(model.unet, lambda _: True, torch.AcceleratorError("device-side assert")),
        pytest.raises(torch.AcceleratorError),
    ):
        engine.run_round()
