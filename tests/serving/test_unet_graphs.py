"""Without a GPU: what is recorded, kept and given up; recordings call the real U-Net once more."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dreambooth.benchmarks.serving_load import redrawing
from dreambooth.diffusion import model as models
from dreambooth.diffusion.cuda_graphs import Recording
from dreambooth.diffusion.denoising import TextRows, predict
from dreambooth.diffusion.model import DiffusionModel
from dreambooth.diffusion.sampling_request import SamplingRequest
from dreambooth.serving import unet_graphs
from dreambooth.serving.engine import Engine, EngineSettings
from dreambooth.serving.unet_graphs import GraphBounds, GraphedUNet

TOKENS, WIDTH = 32, 32


class Recalls:
    """A recorder for any device: a replay is the call once more, on the tensors recorded."""

    def __init__(self) -> None:
        self.free, self.held = 1 << 40, 0
        self.recorded, self.replayed, self.forgotten = 0, 0, 0
        self.fault: Callable[[], BaseException] | None = None

    def record(self, call: Callable[[], Tensor]) -> Recording:
        if self.fault is not None:
            raise self.fault()
        self.recorded += 1
        # As in a capture, nothing is computed before the first replay.
        output = torch.full_like(call(), torch.nan)

        def replay() -> None:
            self.replayed += 1
            output.copy_(call())

        return Recording(replay=replay, output=output)

    def pool_bytes(self) -> int:
        return self.held

    def free_bytes(self) -> int:
        return self.free

    def forget(self) -> None:
        self.forgotten += 1


@pytest.fixture
def model(small_model_folder: Path) -> DiffusionModel:
    return models.load(small_model_folder, device=torch.device("cpu"))


def inputs(rows: int, *, cells: int = 16, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, 4, cells, cells, generator=draw),
        torch.randint(0, 1000, (rows,), generator=draw),
        torch.randn(rows, TOKENS, WIDTH, generator=draw),
    )


def call(unet: Any, given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    latents, timesteps, text = given
    with torch.inference_mode():
        output: Tensor = unet(latents, timesteps, encoder_hidden_states=text, return_dict=False)[0]
    return output


def test_replays_give_the_unets_own_bits_and_each_shape_is_recorded_once(
    model: DiffusionModel,
) -> None:
    recorder = Recalls()
    graphed = GraphedUNet(model.unet, recorder)
    for seed in range(3):
        for rows, cells in ((1, 16), (3, 16), (1, 8)):
            given = inputs(rows, cells=cells, seed=seed)
            assert torch.equal(call(graphed, given), call(model.unet, given))
    assert (recorder.recorded, recorder.replayed) == (3, 9)
    assert graphed.graphs == ((1, 16, 16, 32), (3, 16, 16, 32), (1, 8, 8, 32))


def test_whole_and_broken_timesteps_share_a_recording(model: DiffusionModel) -> None:
    recorder = Recalls()
    graphed = GraphedUNet(model.unet, recorder)
    latents, timesteps, text = inputs(2)
    for kind in (torch.int64, torch.float32, torch.float64):
        given = latents, timesteps.to(kind), text
        assert torch.equal(call(graphed, given), call(model.unet, given))
    given = latents, timesteps + 0.25, text
    assert torch.equal(call(graphed, given), call(model.unet, given))
    assert recorder.recorded == 1


def test_an_output_is_the_callers_and_no_later_call_changes_it(model: DiffusionModel) -> None:
    graphed = GraphedUNet(model.unet, Recalls())
    first = call(graphed, inputs(2, seed=1))
    kept = first.clone()
    call(graphed, inputs(2, seed=2))
    assert torch.equal(first, kept)


def test_a_call_cut_in_parts_of_equal_shape_is_put_together_right(model: DiffusionModel) -> None:
    latents, timesteps, text = inputs(4)
    rows = TextRows(
        encoder_hidden_states=text, guided=torch.tensor([]).long(), guidance_scale=torch.ones(0)
    )

    def predicted(unet: Any) -> Tensor:
        with torch.inference_mode():
            return predict(unet, latents, timesteps, rows, most_rows=2)

    recorder = Recalls()
    assert torch.equal(predicted(GraphedUNet(model.unet, recorder)), predicted(model.unet))
    assert (recorder.recorded, recorder.replayed) == (1, 2)


def test_it_looks_like_the_unet_that_it_holds(model: DiffusionModel) -> None:
    graphed = GraphedUNet(model.unet, Recalls())
    assert graphed.dtype == model.unet.dtype
    assert graphed.config.cross_attention_dim == WIDTH
    assert next(graphed.parameters()) is next(model.unet.parameters())
    assert not graphed.train().eval().unet.training


def test_calls_that_a_graph_cannot_stand_for_are_the_unets_own(model: DiffusionModel) -> None:
    recorder = Recalls()
    graphed = GraphedUNet(model.unet, recorder, GraphBounds(most_cells=2 * 16 * 16))
    latents, timesteps, text = inputs(2)
    with torch.inference_mode():
        whole = graphed(latents, timesteps, encoder_hidden_states=text)
        one = graphed(latents, 500, encoder_hidden_states=text, return_dict=False)[0]
        masked = graphed(
            latents,
            timesteps,
            text,
            return_dict=False,
            encoder_attention_mask=torch.ones(2, TOKENS),
        )[0]
    assert torch.equal(whole.sample, call(model.unet, inputs(2)))
    assert one.shape == masked.shape == latents.shape
    call(graphed, inputs(3))  # more cells than are recorded
    assert recorder.recorded == 0
    call(graphed, inputs(2))
    assert recorder.recorded == 1


def test_a_newcomer_takes_the_place_of_the_one_unused_for_longest_once_it_pays(
    model: DiffusionModel,
) -> None:
    recorder = Recalls()
    bounds = GraphBounds(most_graphs=2, calls_to_replace=3)
    graphed = GraphedUNet(model.unet, recorder, bounds)
    for rows in (1, 2, 1):
        call(graphed, inputs(rows))
    for _ in range(2):
        call(graphed, inputs(3))
    assert [key[0] for key in graphed.graphs] == [2, 1]
    assert torch.equal(call(graphed, inputs(3)), call(model.unet, inputs(3)))
    assert [key[0] for key in graphed.graphs] == [1, 3]
    for _ in range(3):  # it waits as long as the other did
        assert 2 not in [key[0] for key in graphed.graphs]
        call(graphed, inputs(2))
    assert [key[0] for key in graphed.graphs] == [3, 2]
    assert recorder.recorded == 4


@pytest.mark.parametrize("short", ["pool", "device"])
def test_where_memory_is_used_up_what_is_recorded_stays_and_the_log_says_it_once(
    model: DiffusionModel, caplog: pytest.LogCaptureFixture, short: str
) -> None:
    recorder = Recalls()
    graphed = GraphedUNet(model.unet, recorder)
    call(graphed, inputs(1))
    if short == "pool":
        recorder.held = graphed._bounds.pool_bytes
    else:
        recorder.free = graphed._bounds.spare_bytes - 1
    for rows in (2, 3, 2, 1):
        assert torch.equal(call(graphed, inputs(rows)), call(model.unet, inputs(rows)))
    assert [key[0] for key in graphed.graphs] == [1]
    assert (recorder.recorded, recorder.replayed) == (1, 2)
    assert [each.getMessage() for each in caplog.records] == [
        "Memory for CUDA graphs is used up with 1 of them: calls of other shapes are made without."
    ]


def ended_capture() -> BaseException:
    """As out of memory comes out of a capture whose end fails as well."""
    error = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    error.__context__ = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.")
    return error


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (lambda: torch.OutOfMemoryError("CUDA out of memory."), "memory ran out with 1 of them"),
        (ended_capture, "memory ran out with 1 of them"),
        (lambda: RuntimeError("not permitted"), "RuntimeError: not permitted"),
    ],
)
def test_a_recording_that_fails_ends_all_of_them_and_calls_go_on_without(
    model: DiffusionModel,
    caplog: pytest.LogCaptureFixture,
    fault: Callable[[], BaseException],
    told: str,
) -> None:
    recorder = Recalls()
    graphed = GraphedUNet(model.unet, recorder)
    call(graphed, inputs(1))
    recorder.fault = fault
    for rows in (2, 1, 3):
        assert torch.equal(call(graphed, inputs(rows)), call(model.unet, inputs(rows)))
    assert graphed.graphs == ()
    assert (recorder.recorded, recorder.replayed, recorder.forgotten) == (1, 1, 1)
    (line,) = [each.getMessage() for each in caplog.records]
    assert line.startswith("The U-Net is called without CUDA graphs from now on: ")
    assert told in line


def test_a_plain_call_out_of_memory_is_made_again_without_graphs(model: DiffusionModel) -> None:
    recorder = Recalls()
    graphed = GraphedUNet(model.unet, recorder, GraphBounds(most_cells=16 * 16))
    call(graphed, inputs(1))
    faults = [torch.OutOfMemoryError("CUDA out of memory.")]

    def short(*_: object) -> None:
        if faults:
            raise faults.pop()

    handle = model.unet.conv_in.register_forward_pre_hook(short)
    output = call(graphed, inputs(2))
    handle.remove()
    assert torch.equal(output, call(model.unet, inputs(2)))
    assert (graphed.graphs, recorder.forgotten) == ((), 1)


def test_a_plain_call_that_fails_otherwise_is_its_callers_matter(model: DiffusionModel) -> None:
    recorder = Recalls()
    graphed = GraphedUNet(model.unet, recorder, GraphBounds(most_cells=16 * 16))
    call(graphed, inputs(1))
    latents, timesteps, text = inputs(2)
    with pytest.raises(RuntimeError):
        call(graphed, (latents, timesteps, text[:, :, :-1]))
    assert len(graphed.graphs) == 1


def test_other_work_out_of_memory_takes_the_graphs_memory(
    model: DiffusionModel, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recalls()
    graphed = GraphedUNet(model.unet, recorder)
    call(graphed, inputs(1))
    for unet in (graphed, graphed, model.unet):
        unet_graphs.release(unet)
    call(graphed, inputs(1))
    assert (graphed.graphs, recorder.forgotten) == ((), 1)
    assert len(caplog.records) == 1


def test_warming_up_records_every_row_count_of_the_curve(model: DiffusionModel) -> None:
    model.unet = graphed = GraphedUNet(model.unet, Recalls())
    settings = EngineSettings(max_rows=4, warm_up_budget_s=100.0)
    with Engine(model, settings=settings) as engine:
        warm_up = engine.start()
    assert [rows for rows, _ in warm_up.seconds_per_step] == [1, 2, 4]
    assert {key[0] for key in graphed.graphs} == {1, 2, 4}


def test_exact_pictures_are_the_same_bytes_with_and_without_graphs_in_any_traffic(
    model: DiffusionModel,
) -> None:
    request = SamplingRequest(prompt="a dog", num_inference_steps=3, guidance_scale=5.0, seed=7)
    recorder = Recalls()
    drawn = []
    for unet in (model.unet, GraphedUNet(model.unet, recorder)):
        model.unet = unet
        settings = EngineSettings(batch_rows=4, warm_up_budget_s=0.0)
        with Engine(model, settings=settings) as engine:
            engine.start()
            drawn.append(engine.submit([request]).result()[0].pixels.tobytes())
            found = redrawing.compare(engine, pictures=6, seed=1)
            assert (found.bytes_differing, found.not_exact) == (0, 0)
    assert drawn[0] == drawn[1]
    assert recorder.replayed > 6


def test_on_a_cpu_graphs_are_left_out_with_one_line_and_the_unet_stays(
    model: DiffusionModel, caplog: pytest.LogCaptureFixture
) -> None:
    unet = model.unet
    unet_graphs.prepare(model, cuda_graphs=True, channels_last=False)
    assert model.unet is unet
    assert [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING] == [
        "CUDA graphs are asked for and left out: the model is on cpu."
    ]


def test_channels_last_arrives_at_both_networks_and_changes_numbers_by_rounding(
    model: DiffusionModel,
) -> None:
    before = call(model.unet, inputs(2))
    unet_graphs.prepare(model, cuda_graphs=False, channels_last=False)
    assert model.unet.conv_in.weight.is_contiguous()
    unet_graphs.prepare(model, cuda_graphs=False, channels_last=True)
    for weight in (model.unet.conv_in.weight, model.vae.decoder.conv_in.weight):
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()
    torch.testing.assert_close(call(model.unet, inputs(2)), before, rtol=1e-4, atol=1e-5)
