"""The simulation of serving; the real engine must make exactly the calls that it predicts."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.serving_load import simulation
from benchmarks.serving_load.overhead import NoUNet
from benchmarks.serving_load.policies import REQUEST_LEVEL, SERIAL, STEP_LEVEL
from benchmarks.serving_load.simulation import CARDS, step_level
from benchmarks.serving_load.traffic import Arrival
from dreambooth.diffusion import model as models
from dreambooth.diffusion.model import DiffusionModel, encode_text, tokenize
from dreambooth.diffusion.sampling_request import SamplingRequest
from dreambooth.serving.engine.drawing_jobs import DrawingJob
from dreambooth.serving.engine.engine import Engine

ROOT = Path(__file__).parents[2]
WORDS = ("cat", "dog", "beach", "snow", "sketch", "black", "white")
PROMPTS = [" ".join(words) for words in itertools.product(WORDS, WORDS)]
DECODE_S = 3.1
PATIENCE_S = 60


def call_s(rows: int) -> float:
    return 1.0 + rows / 4


def trace(steps: Sequence[int], per_s: float, seed: int) -> list[Arrival]:
    """Return arrivals with different prompts, by which the U-Net distinguishes them."""
    draw, seconds, arrivals = random.Random(seed), 0.0, []
    for number, prompt in enumerate(PROMPTS):
        seconds += draw.expovariate(per_s)
        request = SamplingRequest(
            prompt=prompt,
            num_inference_steps=draw.choice(steps),
            guidance_scale=draw.choice((1.0, 5.0, 7.5)),
            width=draw.choice((None, None, 24)),
            seed=number,
        )
        arrivals.append(Arrival(seconds=seconds, request=request))
    return arrivals


def layers_of(model: DiffusionModel) -> list[torch.nn.Module]:
    """Return the layers of the model's decoder; the last includes all that follows it."""
    decoder = model.vae.decoder
    blocks = [[*block.resnets, *(block.upsamplers or ())] for block in decoder.up_blocks]
    return [decoder.conv_in, decoder.mid_block, *itertools.chain(*blocks), decoder.conv_out]


class CountedTime:
    """Runs an engine on a clock that its U-Net and VAE advance; requests arrive by that clock."""

    def __init__(self, model: DiffusionModel, arrivals: list[Arrival], most_rows: int) -> None:
        self.calls: list[list[int]] = []
        self.finished = [0.0] * len(arrivals)
        self._lock = threading.RLock()
        self._clock = 0.0
        self._arrivals = arrivals
        self._come = self._running = 0
        self._jobs: list[DrawingJob] = []
        self._numbers = {
            bytes(encode_text(model, tokenize(model, [prompt])).numpy()): number
            for number, prompt in enumerate(PROMPTS)
        }
        assert len(self._numbers) == len(PROMPTS)
        unet = NoUNet(model.unet)
        decode_parts = len(layers_of(model))
        self.engine = Engine(
            dataclasses.replace(model, unet=unet),
            max_rows=most_rows,
            warm_up_budget_s=0.0,
            clock=lambda: self._clock,
        )
        with self.engine:
            self.engine.start()
            unet.register_forward_pre_hook(self._call, with_kwargs=True)
            for layer in layers_of(model):
                layer.register_forward_hook(lambda *_: self._pass(DECODE_S / decode_parts))
            self._pass(arrivals[0].seconds)
            while len(self._jobs) < len(arrivals) or not all(job.done for job in self._jobs):
                self._jobs[-1].result(PATIENCE_S)

    def _call(self, _: object, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        texts = [bytes(text.numpy()) for text in options["encoder_hidden_states"]]
        self.calls.append([self._numbers[text] for text in texts if text in self._numbers])
        self._pass(call_s(len(inputs[0])))

    def _pass(self, seconds: float) -> None:
        with self._lock:  # the first request arrives on the test's own thread
            self._clock += seconds
            while self._come < len(self._arrivals):
                if self._arrivals[self._come].seconds > self._clock:
                    return
                self._come += 1
                self._running += 1
                self._jobs.append(self.engine.submit([self._arrivals[self._come - 1].request]))
                self._jobs[-1].add_done_callback(self._finisher(self._come - 1))

    def _finisher(self, number: int) -> Callable[[DrawingJob], None]:
        def finish(_: DrawingJob) -> None:
            self.finished[number] = self._clock
            self._running -= 1
            if not self._running and self._come < len(self._arrivals):
                self._pass(self._arrivals[self._come].seconds - self._clock)

        return finish


@pytest.mark.parametrize(
    ("scheduler", "steps", "more_calls"),
    [("PNDMScheduler", (2, 3, 6), 1), ("DDIMScheduler", (1, 1, 4), 0)],
)
@pytest.mark.parametrize(("per_s", "most_rows"), [(0.1, 4), (0.3, 6), (2.0, 3), (2.0, 16)])
def test_the_engine_makes_the_calls_that_the_simulation_makes(
    make_model_folder: Callable[..., Path],
    scheduler: str,
    steps: Sequence[int],
    more_calls: int,
    per_s: float,
    most_rows: int,
) -> None:
    model = models.load(make_model_folder(scheduler=scheduler), device=torch.device("cpu"))
    arrivals = trace(steps, per_s, seed=most_rows)
    calls: list[list[int]] = []
    finished = step_level(
        arrivals,
        call_s=call_s,
        decode_s=DECODE_S,
        most_rows=most_rows,
        more_calls=more_calls,
        decode_parts=len(layers_of(model)),
        on_call=calls.append,
    )
    real = CountedTime(model, arrivals, most_rows)
    assert real.calls == calls
    assert real.finished == pytest.approx(finished)
    assert max(len(call) for call in calls) > 1


def test_the_curves_are_the_published_points_within_4_percent() -> None:
    # Calls per second with 1, 4 and 16 guided pictures.
    published = {
        "T4": (7.56, 1.99, 1 / 1.99),
        "V100": (22.2, 6.9, 1.90),
        "A100": (49.7, 17.3, 4.68),
    }
    for card in CARDS:
        for pictures, per_s in zip((1, 4, 16), published.get(card.name, ()), strict=False):
            assert card.call_s(2 * pictures) == pytest.approx(1 / per_s, rel=0.04), card.name


def test_small_cards_do_not_batch_and_large_ones_gain() -> None:
    found = {card.name: simulation.simulate(card, pictures=300, seed=1) for card in CARDS}
    assert {name: each.rows for name, each in found.items()} == {
        "T4": 2,
        "V100": 8,
        "A100": 16,
        "H100": 16,
    }
    gains = [found[name].gain for name in ("T4", "V100", "A100", "H100")]
    assert gains == sorted(gains)
    assert gains[0] < 1.1
    assert gains[-1] > 1.7
    for name in ("A100", "H100"):
        p95 = {each.policy: each.p95_s for each in found[name].figures if each.load == 0.8}
        assert p95[STEP_LEVEL] < p95[REQUEST_LEVEL] < p95[SERIAL]


def test_it_needs_no_torch_and_ends_in_one_json_line() -> None:
    code = (
        "import sys; from benchmarks.__main__ import main; "
        "main(['serving', '--simulate', '--quick']); assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    summary = json.loads(lines[-1])
    assert [each["card"]["name"] for each in summary["cards"]] == ["T4", "V100", "A100", "H100"]
    assert sum(line.startswith("under more load") for line in lines) == 4
