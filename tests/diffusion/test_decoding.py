from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from dreambooth.diffusion import model as models
from dreambooth.diffusion.decoding import decode, decode_in_parts
from dreambooth.diffusion.model import DiffusionModel
from dreambooth.tiny import WEIGHTS

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def embedded() -> DiffusionModel:
    return models.load(WEIGHTS, device=CPU)


def latents(size: int, *, count: int = 1) -> torch.Tensor:
    return torch.randn(count, 4, size, size + 1, generator=torch.Generator().manual_seed(size))


def whole(model: DiffusionModel, latents: torch.Tensor) -> np.ndarray:
    """Decode latents in one call and round as diffusers does."""
    scaled = latents.to(model.vae.dtype) / model.vae.config.scaling_factor
    pixels = model.vae.decode(scaled, return_dict=False)[0].float()
    levels = (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255
    return np.asarray(levels.round().astype("uint8"))


def count_parts(parts: Generator[None, None, np.ndarray | None]) -> tuple[int, np.ndarray | None]:
    pauses = 0
    while True:
        try:
            next(parts)
            pauses += 1
        except StopIteration as end:
            return pauses + 1, end.value


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_picture_in_parts_is_the_same_to_the_byte(dtype: torch.dtype) -> None:
    model = models.load(WEIGHTS, device=CPU, dtype=dtype)
    for size in (3, 8, 16):
        given = latents(size, count=2)
        expected = whole(model, given)
        picture = decode(model, given)
        assert np.array_equal(expected, np.asarray(picture))


@torch.no_grad()
def test_pixels_in_parts_are_the_same_to_the_bit(embedded: DiffusionModel) -> None:
    pixels: list[torch.Tensor] = []
    hook = embedded.vae.decoder.conv_out.register_forward_hook(
        lambda _, inputs, output: pixels.append(output)
    )
    try:
        whole(embedded, latents(16))
        decode(embedded, latents(16))
    finally:
        hook.remove()
    assert torch.equal(*pixels)


@torch.no_grad()
def test_every_layer_is_a_part(embedded: DiffusionModel) -> None:
    # conv_in, the mid block, 3 blocks of 2 resnets, 2 upsamplers, and the output.
    assert count_parts(decode_in_parts(embedded, latents(4)))[0] == 2 + 6 + 2 + 1


@torch.no_grad()
def test_no_part_of_stable_diffusions_decoder_outweighs_half_a_row_of_its_unet() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
        hidden = torch.empty(1, 4, 64, 64)
    from dreambooth.diffusion import decoding

    operations = []
    for layer in decoding._layers(vae.decoder):
        with FlopCounterMode(display=False) as counter:
            hidden = layer(hidden)
        operations.append(counter.get_total_flops())
    assert len(operations) == 18
    assert sum(operations) == pytest.approx(2.5e12, rel=0.02)
    assert max(operations) < 0.5 * 0.803e12


@torch.no_grad()
def test_blocks_of_another_kind_are_one_part(make_model_folder: Callable[..., Path]) -> None:
    model = models.load(make_model_folder(), device=CPU)
    blocks = ("AttnUpDecoderBlock2D", "UpDecoderBlock2D")
    model.vae = AutoencoderKL.from_config({**model.vae.config, "up_block_types": blocks}).eval()
    picture = decode(model, latents(8))
    assert np.array_equal(np.asarray(picture), whole(model, latents(8)))


@torch.no_grad()
def test_what_is_not_finite_is_no_picture(embedded: DiffusionModel) -> None:
    broken = latents(8)
    broken[0, 0, 0, 0] = float("nan")
    assert count_parts(decode_in_parts(embedded, broken)) == (1, None)


@torch.no_grad()
def test_a_vae_that_overflows_is_asked_again_in_float32() -> None:
    model = models.load(WEIGHTS, device=CPU, dtype=torch.bfloat16)
    calls: list[torch.dtype] = []

    def overflow(_: object, inputs: object, output: torch.Tensor) -> torch.Tensor:
        calls.append(output.dtype)
        return torch.full_like(output, float("inf")) if len(calls) == 1 else output

    model.vae.decoder.conv_out.register_forward_hook(overflow)
    assert decode(model, latents(8)) is not None
    assert calls == [torch.bfloat16, torch.float32]


@torch.no_grad()
def test_under_autocast_an_overflow_is_decoded_again_in_float32(embedded: DiffusionModel) -> None:
    """Sample pictures of a run with mixed precision are drawn with fp32 weights under autocast."""
    calls: list[torch.dtype] = []

    def overflow(_: object, inputs: object, output: torch.Tensor) -> torch.Tensor:
        calls.append(output.dtype)
        return torch.full_like(output, float("inf")) if len(calls) == 1 else output

    exact = decode(embedded, latents(8))
    hook = embedded.vae.decoder.conv_out.register_forward_hook(overflow)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            again = decode(embedded, latents(8))
            assert torch.is_autocast_enabled("cpu")
    finally:
        hook.remove()
    assert calls == [torch.bfloat16, torch.float32]
    assert np.array_equal(np.asarray(again), np.asarray(exact))
