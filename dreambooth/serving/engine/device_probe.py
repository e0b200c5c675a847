"""What is asked of the device itself: how long calls take, and whether a row's place matters."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from dreambooth.diffusion.model import DiffusionModel
from dreambooth.serving.engine.picture_rows import TextCache
from dreambooth.serving.engine.row_limits import free_caches, is_device_lost, is_out_of_memory
from dreambooth.serving.engine.unet_calls import HostThrottle

logger = logging.getLogger(__name__)


class DeviceProbe:
    """Makes U-Net calls that draw nothing. Sizes are (width, height) in pixels."""

    def __init__(
        self, model: DiffusionModel, texts: TextCache, host_throttle: HostThrottle
    ) -> None:
        self._model = model
        self._texts = texts
        self._host_throttle = host_throttle
        self._positions_matter: dict[tuple[int, int], bool] = {}

    def positions_matter(self, size: tuple[int, int], *, rows: int) -> bool:
        """Whether equal rows of one call, always of so many, come out unequal here at this size.

        So it is on CPUs with several threads, which cut a call's work at places that do not fall
        between rows. Asked of the device by one call, the first time that a size is wanted.
        """
        if size not in self._positions_matter:
            outcome = True
            try:
                output = self.call(size, rows)
                outcome = not all(torch.equal(row, output[0]) for row in output)
            except Exception as error:  # too large: the pictures themselves will say so
                if is_device_lost(error):
                    raise
                logger.warning("The rows of a call could not be compared: %s", error)
            self._positions_matter[size] = outcome
        return self._positions_matter[size]

    def call(self, size: tuple[int, int], rows: int) -> Tensor:
        """One U-Net call of equal rows, finished when this returns: [rows, C, h, w]."""
        model = self._model
        scale = model.vae_scale_factor
        shape = (1, model.latent_channels, size[1] // scale, size[0] // scale)
        noise = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(0))
        text = self._texts.get("")
        output: Tensor = model.unet(
            noise.to(model.device, model.unet.dtype).repeat(rows, 1, 1, 1),
            torch.full((rows,), 500, device=model.device),
            encoder_hidden_states=text.repeat(rows, 1, 1),
            return_dict=False,
        )[0]
        self._host_throttle.wait()
        return output

    def timed_call(self, size: tuple[int, int], rows: int) -> None:
        """The same, for `warm_up.measure`: raises MemoryError where so many rows do not fit."""
        try:
            self.call(size, rows)
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        free_caches()
        raise MemoryError
