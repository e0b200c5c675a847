"""Which calls are captured, kept and given up; without a GPU, replays call the real U-Net again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dreambooth.diffusion import model as models
from dreambooth.diffusion.denoising import TextRows, predict
from dreambooth.diffusion.model import DiffusionModel
from dreambooth.fast.graphed_unet import GraphBounds, GraphedUNet
from tests.fast.graph_stand_in import TOKENS, WIDTH, Recalls, call, inputs


@pytest.fixture
def model(small_model_folder: Path) -> DiffusionModel:
    return models.load(small_model_folder, device=torch.device("cpu"))


def test_replays_give_the_unets_own_bits_and_each_shape_is_captured_once(
    model: DiffusionModel,
) -> None:
    capturer = Recalls()
    graphed = GraphedUNet(model.unet, capturer)
    for seed in range(3):
        for rows, cells in ((1, 16), (3, 16), (1, 8)):
            given = inputs(rows, cells=cells, seed=seed)
            assert torch.equal(call(graphed, given), call(model.unet, given))
    assert (capturer.captured, capturer.replayed) == (3, 9)
    assert graphed.graphs == ((1, 16, 16, 32), (3, 16, 16, 32), (1, 8, 8, 32))


def test_whole_and_broken_timesteps_share_a_capture(model: DiffusionModel) -> None:
    capturer = Recalls()
    graphed = GraphedUNet(model.unet, capturer)
    latents, timesteps, text = inputs(2)
    for kind in (torch.int64, torch.float32, torch.float64):
        given = latents, timesteps.to(kind), text
        assert torch.equal(call(graphed, given), call(model.unet, given))
    given = latents, timesteps + 0.25, text
    assert torch.equal(call(graphed, given), call(model.unet, given))
    assert capturer.captured == 1


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

    capturer = Recalls()
    assert torch.equal(predicted(GraphedUNet(model.unet, capturer)), predicted(model.unet))
    assert (capturer.captured, capturer.replayed) == (1, 2)


def test_it_looks_like_the_unet_that_it_holds(model: DiffusionModel) -> None:
    graphed = GraphedUNet(model.unet, Recalls())
    assert graphed.dtype == model.unet.dtype
    assert graphed.config.cross_attention_dim == WIDTH
    assert next(graphed.parameters()) is next(model.unet.parameters())
    assert not graphed.train().eval().unet.training


def test_calls_that_a_graph_cannot_stand_for_are_the_unets_own(model: DiffusionModel) -> None:
    capturer = Recalls()
    graphed = GraphedUNet(model.unet, capturer, GraphBounds(most_cells=2 * 16 * 16))
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
    call(graphed, inputs(3))  # more cells than may be captured
    assert capturer.captured == 0
    call(graphed, inputs(2))
    assert capturer.captured == 1


def test_a_newcomer_takes_the_place_of_the_one_unused_for_longest_once_it_pays(
    model: DiffusionModel,
) -> None:
    capturer = Recalls()
    bounds = GraphBounds(most_graphs=2, calls_to_replace=3)
    graphed = GraphedUNet(model.unet, capturer, bounds)
    for rows in (1, 2, 1):
        call(graphed, inputs(rows))
    for _ in range(2):
        call(graphed, inputs(3))
    assert [key[0] for key in graphed.graphs] == [2, 1]
    assert torch.equal(call(graphed, inputs(3)), call(model.unet, inputs(3)))
    assert [key[0] for key in graphed.graphs] == [1, 3]
    for _ in range(3):  # it must be called as often as 3 rows were
        assert 2 not in [key[0] for key in graphed.graphs]
        call(graphed, inputs(2))
    assert [key[0] for key in graphed.graphs] == [3, 2]
    assert capturer.captured == 4


@pytest.mark.parametrize("short", ["pool", "device"])
def test_where_memory_is_used_up_what_is_captured_stays_and_the_log_says_it_once(
    model: DiffusionModel, caplog: pytest.LogCaptureFixture, short: str
) -> None:
    capturer = Recalls()
    graphed = GraphedUNet(model.unet, capturer)
    call(graphed, inputs(1))
    if short == "pool":
        capturer.held = graphed._bounds.pool_bytes
    else:
        capturer.free = graphed._bounds.spare_bytes - 1
    for rows in (2, 3, 2, 1):
        assert torch.equal(call(graphed, inputs(rows)), call(model.unet, inputs(rows)))
    assert [key[0] for key in graphed.graphs] == [1]
    assert (capturer.captured, capturer.replayed) == (1, 2)
    assert [each.getMessage() for each in caplog.records] == [
        "Memory for CUDA graphs is used up with 1 of them: calls of other shapes are made without."
    ]


def ended_capture() -> BaseException:
    """Return the error that hides out of memory where ending the capture fails as well."""
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
def test_a_capture_that_fails_ends_all_of_them_and_calls_go_on_without(
    model: DiffusionModel,
    caplog: pytest.LogCaptureFixture,
    fault: Callable[[], BaseException],
    told: str,
) -> None:
    capturer = Recalls()
    graphed = GraphedUNet(model.unet, capturer)
    call(graphed, inputs(1))
    capturer.fault = fault
    for rows in (2, 1, 3):
        assert torch.equal(call(graphed, inputs(rows)), call(model.unet, inputs(rows)))
    assert graphed.graphs == ()
    assert (capturer.captured, capturer.replayed, capturer.forgotten) == (1, 1, 1)
    (line,) = [each.getMessage() for each in caplog.records]
    assert line.startswith("The U-Net is called without CUDA graphs from now on: ")
    assert told in line


def test_a_plain_call_out_of_memory_is_made_again_without_graphs(model: DiffusionModel) -> None:
    capturer = Recalls()
    graphed = GraphedUNet(model.unet, capturer, GraphBounds(most_cells=16 * 16))
    call(graphed, inputs(1))
    faults = [torch.OutOfMemoryError("CUDA out of memory.")]

    def short(*_: object) -> None:
        if faults:
            raise faults.pop()

    handle = model.unet.conv_in.register_forward_pre_hook(short)
    output = call(graphed, inputs(2))
    handle.remove()
    assert torch.equal(output, call(model.unet, inputs(2)))
    assert (graphed.graphs, capturer.forgotten) == ((), 1)


def test_a_plain_call_that_fails_otherwise_is_its_callers_matter(model: DiffusionModel) -> None:
    capturer = Recalls()
    graphed = GraphedUNet(model.unet, capturer, GraphBounds(most_cells=16 * 16))
    call(graphed, inputs(1))
    latents, timesteps, text = inputs(2)
    with pytest.raises(RuntimeError):
        call(graphed, (latents, timesteps, text[:, :, :-1]))
    assert len(graphed.graphs) == 1
