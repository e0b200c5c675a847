"""Applies the options for CUDA graphs (`graphed_unet`) and channels_last to a loaded model."""

from __future__ import annotations

import logging
from typing import Any

import torch

from dreambooth.diffusion.model import DiffusionModel
from dreambooth.fast.cuda_graphs import CudaGraphCapturer
from dreambooth.fast.graphed_unet import GraphBounds, GraphedUNet

__all__ = ["GraphBounds", "GraphedUNet", "prepare", "release"]

logger = logging.getLogger(__name__)


def prepare(model: DiffusionModel, *, cuda_graphs: bool, channels_last: bool) -> None:
    """Speed up a loaded model's networks as the options say; without options nothing changes.

    channels_last: convolutions of U-Net and VAE use this layout, which changes pictures by
    rounding. cuda_graphs: on a GPU the U-Net becomes a GraphedUNet; elsewhere the log warns that
    the option has no effect.
    """
    if channels_last:
        for part in (model.unet, model.vae):
            part.to(memory_format=torch.channels_last)
    if not cuda_graphs:
        return
    if model.device.type == "cuda":
        model.unet = GraphedUNet(model.unet, CudaGraphCapturer(model.device)).eval()
    else:
        logger.warning("CUDA graphs are asked for and left out: the model is on %s.", model.device)


def release(unet: Any) -> None:
    """Free the memory of a U-Net's graphs, if it has any, after other work ran out of memory."""
    if isinstance(unet, GraphedUNet):
        unet.release("other work ran out of memory")
