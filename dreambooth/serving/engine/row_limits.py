"""Out of memory: how it is told from other errors, and how the batch shrinks and grows again."""

from __future__ import annotations

import math

import torch

from dreambooth.diffusion.device_memory import free_caches, is_out_of_memory

__all__ = ["RowLimit", "advice", "free_caches", "is_device_lost", "is_out_of_memory"]

# Full calls that must succeed before the cap is raised; doubled each time that this goes wrong.
PATIENCE = 50
MOST_PATIENCE = 6400


def is_device_lost(error: BaseException) -> bool:
    """Whether the accelerator itself failed, after which only a new process can use it."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)


class RowLimit:
    """How many rows of one latent size a U-Net call may have, after it once had too many."""

    def __init__(self, most: int) -> None:
        """`most` is what the cap starts at, and may rise to again."""
        self.most = most
        self.rows = most
        self._patience = PATIENCE
        self._successes = 0
        self._raised = False

    def halve(self, tried: int) -> bool:
        """A call of `tried` rows failed: allow half of them; False if it was a single row."""
        if self._raised:  # the last raise was too bold
            self._patience = min(2 * self._patience, MOST_PATIENCE)
        self._raised, self._successes = False, 0
        tried = min(tried, self.rows)
        self.rows = max(1, tried // 2)
        return tried > 1

    def succeeded(self, rows: int) -> None:
        """A call succeeded; after enough full ones, twice as many rows are tried again."""
        if self.rows >= self.most or rows < self.rows:
            return
        self._successes += 1
        if self._successes >= self._patience:
            self.rows, self._successes, self._raised = min(2 * self.rows, self.most), 0, True


def advice(width: int, height: int, *, unit: int, known_pixels: int) -> str:
    """Say for a size (pixels) that did not fit which one should.

    The area that is known to fit in the same proportions, if any is smaller; else half the sides.
    """
    scale = 0.5
    if 0 < known_pixels < width * height:
        scale = max(scale, math.sqrt(known_pixels / (width * height)))
    sides = [max(unit, int(side * scale) // unit * unit) for side in (width, height)]
    if sides == [width, height]:
        return "no smaller size is left: use a device with more memory"
    return f"{sides[0]} x {sides[1]} should fit: lower width and height"
