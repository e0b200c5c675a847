"""Shrink U-Net calls that ran out of memory and grow them again, and recognise device errors."""

from __future__ import annotations

import math

import torch

from dreambooth.diffusion.device_memory import free_caches
from dreambooth.process.memory import is_out_of_memory

__all__ = ["RowLimit", "advice", "free_caches", "is_device_lost", "is_out_of_memory"]

# Full calls that must succeed before the cap is raised; doubled whenever a raised cap fails.
CALLS_BEFORE_RAISE = 50
MOST_CALLS_BEFORE_RAISE = 6400


def is_device_lost(error: BaseException) -> bool:
    """Return whether the accelerator itself failed, after which only a new process can use it."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)


class RowLimit:
    """The cap on the rows of a U-Net call at one picture size, set after a call was too large."""

    def __init__(self, most: int) -> None:
        """most: the initial cap, to which it may rise again."""
        self.most = most
        self.rows = most
        self._calls_before_raise = CALLS_BEFORE_RAISE
        self._successes = 0
        self._raised = False

    def halve(self, tried: int) -> bool:
        """Halve the cap after a call of `tried` rows failed; return False if that was one row."""
        if self._raised:  # the last raise went too far
            self._calls_before_raise = min(2 * self._calls_before_raise, MOST_CALLS_BEFORE_RAISE)
        self._raised, self._successes = False, 0
        tried = min(tried, self.rows)
        self.rows = max(1, tried // 2)
        return tried > 1

    def succeeded(self, rows: int) -> None:
        """Note that a call succeeded; after enough full ones, allow twice as many rows."""
        if self.rows >= self.most or rows < self.rows:
            return
        self._successes += 1
        if self._successes >= self._calls_before_raise:
            self.rows, self._successes, self._raised = min(2 * self.rows, self.most), 0, True


def advice(width: int, height: int, *, unit: int, fitted_pixels: int) -> str:
    """Return a clause that names a size that should fit, given one (in pixels) that did not.

    The sides keep their proportions and are multiples of `unit`; their area is the one that has
    fitted (`fitted_pixels`). Each side shrinks to no less than half, and to exactly half where no
    smaller picture has been drawn.
    """
    scale = 0.5
    if 0 < fitted_pixels < width * height:
        scale = max(scale, math.sqrt(fitted_pixels / (width * height)))
    sides = [max(unit, int(side * scale) // unit * unit) for side in (width, height)]
    if sides == [width, height]:
        return "no smaller size is left: use a device with more memory"
    return f"{sides[0]} x {sides[1]} should fit: lower width and height"
