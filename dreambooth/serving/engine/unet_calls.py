"""One U-Net call for the rows of one size; where it fails, who is to blame and what still fits.

Nothing here moves a picture: a call that failed can be made again. Rows are as in `rows`; a call
that does not fit into memory is made in halves, and again in halves, down to single rows.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dreambooth.diffusion.denoising import TextRows, predictions
from dreambooth.serving.engine.picture_rows import PictureRow, gather
from dreambooth.serving.engine.row_limits import (
    RowLimit,
    free_caches,
    is_device_lost,
    is_out_of_memory,
)

logger = logging.getLogger(__name__)

_REMEMBERED_SIZES = 8

Lost = list[tuple[PictureRow, Exception]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """What became of a call. preds: float32 [B, C, h, w], of `rows`; None if there are none.

    lost: those that cannot be predicted, with what is in their way: one picture alone that does
    not fit into memory, or one alone whose call fails for another reason.
    """

    rows: list[PictureRow]
    preds: Tensor | None
    lost: Lost


class UNetCaller:
    """Makes the U-Net calls.

    most_rows: of one call. batch_rows: exact mode's rows of EVERY call, None in elastic mode.
    out_of_memory_total: calls that did not fit.
    """

    def __init__(self, unet: Any, *, most_rows: int, batch_rows: int | None) -> None:
        self.most_rows = most_rows
        self.batch_rows = batch_rows
        self.out_of_memory_total = 0
        self._unet = unet
        self._caps: dict[tuple[int, int], RowLimit] = {}  # of the sizes that once did not fit
        self._texts: OrderedDict[tuple[int, int], tuple[list[PictureRow], int | None, TextRows]]
        self._texts = OrderedDict()

    def room(self, size: tuple[int, int]) -> int:
        """How many rows may run at this size; in exact mode always all: calls are cut instead."""
        return self.batch_rows or self._allowed(size)

    def predict(self, rows: Sequence[PictureRow]) -> Outcome:
        """Predict rows of one size; raises only when the device is lost."""
        pending, lost = list(rows), Lost()
        while pending:
            preds = self._try(pending)
            if isinstance(preds, Tensor):
                return Outcome(rows=pending, preds=preds, lost=lost)
            if is_device_lost(preds):
                raise preds
            if is_out_of_memory(preds):
                if not self._make_room(pending):
                    job = pending[0].job
                    lost += [(row, preds) for row in pending if row.job is job]
                    pending = [row for row in pending if row.job is not job]
            elif len(pending) == 1:
                lost.append((pending.pop(), preds))
            else:
                return _joined([self.predict([row]) for row in pending], lost)
        return Outcome(rows=[], preds=None, lost=lost)

    def forget(self) -> None:
        """Let go of the pictures of past calls: nothing runs."""
        self._texts.clear()

    def call_rows(self, rows: Sequence[PictureRow]) -> int:
        """How many rows the U-Net call of these pictures has, with padding."""
        return self._padded(rows[0].size) or sum(row.unet_rows for row in rows)

    def _try(self, rows: list[PictureRow]) -> Tensor | Exception:
        size = rows[0].size
        allowed = self._allowed(size)
        pictures = [row.trajectory for row in rows if row.trajectory is not None]
        try:
            text = self._text(rows)
            preds = predictions(self._unet, pictures, text, most_rows=allowed)
        except Exception as error:
            if not is_out_of_memory(error):
                logger.exception("A U-Net call of %d picture(s) failed.", len(rows))
            return error.with_traceback(None)  # its frames hold the call's tensors
        if size in self._caps:
            self._caps[size].succeeded(self.call_rows(rows))
        if self.batch_rows is not None and allowed < self.batch_rows:
            for row in rows:
                row.exact = False
        return preds

    def _make_room(self, rows: list[PictureRow]) -> bool:
        """Free what can be freed and halve the call; False if it was one row already."""
        self.out_of_memory_total += 1
        size = rows[0].size
        tried = min(self.call_rows(rows), self._allowed(size))
        cap = self._caps.setdefault(size, RowLimit(self.most_rows))
        shrunk = cap.halve(tried)
        self._texts.clear()
        free_caches()
        logger.warning(
            "Out of memory with %d row(s) of %d x %d pixels in a U-Net call; %s.",
            tried,
            *size,
            f"going on with {cap.rows}" if shrunk else "one row does not fit",
        )
        return shrunk

    def _allowed(self, size: tuple[int, int]) -> int:
        cap = self._caps.get(size)
        return self.most_rows if cap is None else cap.rows

    def _padded(self, size: tuple[int, int]) -> int | None:
        """Exact mode's number of rows, unless memory is too short for it at this size."""
        exact = self.batch_rows is not None and self._allowed(size) >= self.batch_rows
        return self.batch_rows if exact else None

    def _text(self, rows: list[PictureRow]) -> TextRows:
        size = rows[0].size
        padded = self._padded(size)
        known = self._texts.get(size)
        if known is not None and known[0] == rows and known[1] == padded:
            return known[2]
        text = gather(rows, call_rows=padded)
        self._texts[size] = (list(rows), padded, text)
        self._texts.move_to_end(size)
        if len(self._texts) > _REMEMBERED_SIZES:
            self._texts.popitem(last=False)
        return text


def _joined(alone: Sequence[Outcome], lost: Lost) -> Outcome:
    preds = [each.preds for each in alone if each.preds is not None]
    return Outcome(
        rows=[row for each in alone for row in each.rows],
        preds=torch.cat(preds) if preds else None,
        lost=lost + [row for each in alone for row in each.lost],
    )


class HostThrottle:
    """Keeps the host at most one call ahead of a CUDA device, so that measured times are true."""

    def __init__(self, device: torch.device) -> None:
        """On other devices it does nothing: their calls return when they are done."""
        self._device = device
        self._last: torch.cuda.Event | None = None

    def after_call(self) -> None:
        """Wait until the device has finished the call before the last one."""
        if self._device.type != "cuda":
            return
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        if self._last is not None:
            self._last.synchronize()
        self._last = event

    def wait(self) -> None:
        """Wait until the device has finished everything."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
