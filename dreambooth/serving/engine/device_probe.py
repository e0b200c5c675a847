"""Make test calls of the U-Net, and find whether a row's position in a call matters."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from dreambooth.diffusion.model import DiffusionModel
from dreambooth.serving.engine.pictures_in_work import TextCache
from dreambooth.serving.engine.row_limits import free_caches, is_device_lost, is_out_of_memory
from dreambooth.serving.engine.unet_calls import HostThrottle

logger = logging.getLogger(__name__)


class DeviceProbe:
    """Makes test calls of the U-Net. Sizes are (width, height) in pixels."""

    def __init__(
        self, model: DiffusionModel, texts: TextCache, host_throttle: HostThrottle
    ) -> None:
        self._model = model
        self._texts = texts
        self._host_throttle = host_throttle
        self._positions_matter: dict[tuple[int, int], bool] = {}

    def positions_matter(self, size: tuple[int, int], *, rows: int) -> bool:
        """Return whether equal rows of one call have unequal outputs on this device at this size.

        That happens on CPUs with several threads, which split a call's work within rows. The first
        time that a size is used, one call of `rows` rows (always the same number) decides; if it
        fails, the answer is True.
        """
        if size not in self._positions_matter:
            outcome = True
            try:
                output = self.call(size, rows)
                outcome = not all(torch.equal(row, output[0]) for row in output)
            except Exception as error:  # too large: drawing the pictures will report it
                if is_device_lost(error):
                    raise
                logger.warning("The rows of a call could not be compared: %s", error)
            self._positions_matter[size] = outcome
        return self._positions_matter[size]

    def call(self, size: tuple[int, int], rows: int) -> Tensor:
        """Make one U-Net call of equal rows, wait for it and return its output [rows, C, h, w]."""
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

    def call_or_memory_error(self, size: tuple[int, int], rows: int) -> None:
        """Make a `call`; raise MemoryError if the rows do not fit, as `warm_up.measure` expects."""
        try:
            self.call(size, rows)
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        free_caches()
        raise MemoryError
