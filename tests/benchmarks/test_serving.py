from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.serving_load import measuring, overhead, redrawing, traffic
from benchmarks.serving_load.measuring import Loads
from benchmarks.serving_load.policies import VirtualClock, alike, batch_by_batch, oldest
from benchmarks.serving_load.redrawing import Agreement
from benchmarks.serving_load.traffic import Arrival
from dreambooth.diffusion import model as models
from dreambooth.diffusion.model import DiffusionModel
from dreambooth.diffusion.sampling_request import SamplingRequest
from dreambooth.serving.engine.engine import Engine
from dreambooth.serving.engine.warm_up import WarmUp

exact_engine = partial(Engine, batch_rows=4, warm_up_budget_s=0.0)


@pytest.fixture
def model(small_model_folder: Path) -> DiffusionModel:
    return models.load(small_model_folder, device=torch.device("cpu"))


def request(steps: int = 4, guidance_scale: float = 5.0) -> SamplingRequest:
    return SamplingRequest(
        prompt="a dog", num_inference_steps=steps, guidance_scale=guidance_scale, seed=0
    )


def test_one_run_measures_everything_and_ends_in_one_json_line(
    small_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(small_model_folder), "--steps", "2", "3", "--seconds", "0.2"]
    assert main(["serving", "--quick", *options]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    runs = [(each["load"], each["policy"]) for each in summary["figures"]]
    assert runs == [
        (load, policy)
        for load in (0.5, 0.8, 1.3)
        for policy in ("serial", "request-level", "step-level")
    ]
    for each in summary["figures"]:
        assert 0 < each["p50_s"] <= each["p95_s"] <= each["p99_s"]
        assert each["throughput_per_s"] > 0
    assert summary["serial_per_s"] > 0
    assert [each["rows"] for each in summary["overhead"]] == [1, 2, 4, 8]
    assert summary["redrawn"]["exact"] == {
        "pictures": 8,
        "bytes_differing": 0,
        "largest_difference": 0,
        "not_exact": 0,
    }
    assert summary["redrawn"]["elastic"]["largest_difference"] <= 2


@pytest.mark.on_demand
def test_exact_pictures_drawn_again_in_traffic_differ_in_no_byte(model: DiffusionModel) -> None:
    with exact_engine(model) as engine:
        engine.start()
        found = redrawing.compare(engine, pictures=16, seed=3)
    assert found == Agreement(pictures=16, bytes_differing=0, largest_difference=0, not_exact=0)


def test_pictures_that_change_are_seen(model: DiffusionModel) -> None:
    model.vae.decoder.conv_out.register_forward_hook(
        lambda _, inputs, output: output + torch.randn_like(output)
    )
    with exact_engine(model) as engine:
        engine.start()
        found = redrawing.compare(engine, pictures=4, seed=0)
    assert found.bytes_differing > 1000
    assert found.largest_difference > 10


def test_an_exact_picture_that_changed_is_exit_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    warm_up = WarmUp(seconds_per_call=((1, 0.01),), rows=2, seconds_per_decode=0.01)
    loads = Loads(warm_up=warm_up, serial_per_s=1.0, figures=[])
    changed = Agreement(pictures=9, bytes_differing=1, largest_difference=1, not_exact=0)
    monkeypatch.setattr(measuring, "measure_loads", lambda *_, **__: loads)
    monkeypatch.setattr(measuring, "measure_overhead", lambda *_: [])
    monkeypatch.setattr(measuring, "measure_agreement", lambda *_, **__: {"exact": changed})
    assert main(["serving"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["redrawn"]["exact"]["pictures"] == 9


def test_the_engines_own_time_is_that_of_calls_with_all_rows(model: DiffusionModel) -> None:
    for rows, guided in ((1, False), (2, True), (4, False)):
        assert 0 < overhead.measure(model, rows=rows, guided=guided, steps=10) < 1000


def test_requests_that_are_alike_are_drawn_together_up_to_the_rows() -> None:
    waiting = [request(), request(5), request(), request(guidance_scale=1.0), request(), request()]
    assert alike(6)(waiting) == [0, 2, 4]
    assert alike(1)(waiting) == [0]
    assert alike(2)([request(guidance_scale=1.0)] * 3) == [0, 1]
    assert oldest(waiting) == [0]


def test_batches_follow_each_other_and_who_comes_meanwhile_waits() -> None:
    clock = VirtualClock()
    batches: list[int] = []

    def draw(requests: list[SamplingRequest]) -> Iterator[None]:
        batches.append(len(requests))
        clock.seconds += 10
        for _ in requests:
            clock.seconds += 1
            yield

    arrivals = [Arrival(seconds=at, request=request()) for at in (1.0, 2.0, 3.0, 100.0)]
    finished = batch_by_batch(arrivals, alike(8), draw, clock)
    assert batches == [1, 2, 1]
    assert finished == [12.0, 23.0, 24.0, 111.0]


def test_figures_count_from_the_arrival_and_take_the_nearest_rank() -> None:
    arrivals = [Arrival(seconds=float(number), request=request()) for number in range(1, 101)]
    finished = [arrival.seconds + place for place, arrival in enumerate(arrivals, 1)]
    found = traffic.figures("serial", 0.5, arrivals, finished)
    assert (found.p50_s, found.p95_s, found.p99_s) == (50.0, 95.0, 99.0)
    assert (found.pictures, found.throughput_per_s, found.offered_per_s) == (100, 0.5, 1.0)


def test_one_seed_is_one_trace_with_some_pictures_not_guided() -> None:
    arrivals = traffic.poisson(2.0, 400, steps=(4, 5), seed=1)
    assert arrivals == traffic.poisson(2.0, 400, steps=(4, 5), seed=1)
    assert arrivals != traffic.poisson(2.0, 400, steps=(4, 5), seed=2)
    assert arrivals[-1].seconds == pytest.approx(200, rel=0.2)
    assert 50 < sum(not arrival.request.guided for arrival in arrivals) < 150
    assert {arrival.request.num_inference_steps for arrival in arrivals} == {4, 5}
