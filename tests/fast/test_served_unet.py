"""The effect of a served model's options; without a GPU, replays call the real U-Net again."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from benchmarks.serving_load import redrawing
from dreambooth.diffusion import model as models
from dreambooth.diffusion.model import DiffusionModel
from dreambooth.diffusion.sampling_request import SamplingRequest
from dreambooth.fast import served_unet
from dreambooth.fast.served_unet import GraphedUNet
from dreambooth.serving.engine.engine import Engine
from tests.fast.graph_stand_in import Recalls, call, inputs


@pytest.fixture
def model(small_model_folder: Path) -> DiffusionModel:
    return models.load(small_model_folder, device=torch.device("cpu"))


def test_other_work_out_of_memory_takes_the_graphs_memory(
    model: DiffusionModel, caplog: pytest.LogCaptureFixture
) -> None:
    capturer = Recalls()
    graphed = GraphedUNet(model.unet, capturer)
    call(graphed, inputs(1))
    for unet in (graphed, graphed, model.unet):
        served_unet.release(unet)
    call(graphed, inputs(1))
    assert (graphed.graphs, capturer.forgotten) == ((), 1)
    assert len(caplog.records) == 1


def test_warming_up_captures_every_row_count_of_the_curve(model: DiffusionModel) -> None:
    model.unet = graphed = GraphedUNet(model.unet, Recalls())
    with Engine(model, max_rows=4, warm_up_budget_s=100.0) as engine:
        warm_up = engine.start()
    assert [rows for rows, _ in warm_up.seconds_per_call] == [1, 2, 4]
    assert {key[0] for key in graphed.graphs} == {1, 2, 4}


def test_exact_pictures_are_the_same_bytes_with_and_without_graphs_in_any_traffic(
    model: DiffusionModel,
) -> None:
    request = SamplingRequest(prompt="a dog", num_inference_steps=3, guidance_scale=5.0, seed=7)
    capturer = Recalls()
    drawn = []
    for unet in (model.unet, GraphedUNet(model.unet, capturer)):
        model.unet = unet
        with Engine(model, batch_rows=4, warm_up_budget_s=0.0) as engine:
            engine.start()
            drawn.append(engine.submit([request]).result()[0].pixels.tobytes())
            found = redrawing.compare(engine, pictures=6, seed=1)
            assert (found.bytes_differing, found.not_exact) == (0, 0)
    assert drawn[0] == drawn[1]
    assert capturer.replayed > 6


def test_on_a_cpu_graphs_are_left_out_with_one_line_and_the_unet_stays(
    model: DiffusionModel, caplog: pytest.LogCaptureFixture
) -> None:
    unet = model.unet
    served_unet.prepare(model, cuda_graphs=True, channels_last=False)
    assert model.unet is unet
    assert [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING] == [
        "CUDA graphs are asked for and left out: the model is on cpu."
    ]


def test_channels_last_arrives_at_both_networks_and_changes_numbers_by_rounding(
    model: DiffusionModel,
) -> None:
    before = call(model.unet, inputs(2))
    served_unet.prepare(model, cuda_graphs=False, channels_last=False)
    assert model.unet.conv_in.weight.is_contiguous()
    served_unet.prepare(model, cuda_graphs=False, channels_last=True)
    for weight in (model.unet.conv_in.weight, model.vae.decoder.conv_in.weight):
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()
    torch.testing.assert_close(call(model.unet, inputs(2)), before, rtol=1e-4, atol=1e-5)
