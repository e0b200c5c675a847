"""Make the U-Net call for pictures of one size, and isolate those that cannot be predicted.

No picture takes a step here, so a call that failed can be repeated. A call that does not fit into
memory is split into halves, again and again, down to single rows.

Legend: B pictures, C latent channels, h w latent cells.
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
from dreambooth.serving.engine.pictures_in_work import PictureInWork, gather
from dreambooth.serving.engine.row_limits import (
    RowLimit,
    free_caches,
    is_device_lost,
    is_out_of_memory,
)

logger = logging.getLogger(__name__)

_REMEMBERED_SIZES = 8

Lost = list[tuple[PictureInWork, Exception]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Predicted:
    """The result of a call. preds: float32 [B, C, h, w] for `pictures`; None if there are none.

    lost: the pictures that cannot be predicted, each with its error. Where not even a single row
    fits into memory, these are all pictures of one job; for other errors, each picture that fails
    in a call of its own.
    """

    pictures: list[PictureInWork]
    preds: Tensor | None
    lost: Lost


class UNetCaller:
    """Makes the U-Net calls.

    most_rows: the most rows of one call. batch_rows: the rows of EVERY call in exact mode, None in
    elastic mode. out_of_memory_total: how often memory ran out, here or in the worker.
    """

    def __init__(self, unet: Any, *, most_rows: int, batch_rows: int | None) -> None:
        self.most_rows = most_rows
        self.batch_rows = batch_rows
        self.out_of_memory_total = 0
        self._unet = unet
        self._caps: dict[tuple[int, int], RowLimit] = {}  # only of sizes that once did not fit
        self._texts: OrderedDict[tuple[int, int], tuple[list[PictureInWork], int | None, TextRows]]
        self._texts = OrderedDict()

    def allowed_rows(self, size: tuple[int, int]) -> int:
        """Return how many rows may run at this size.

        In exact mode it is always `batch_rows`: a call that does not fit is split instead.
        """
        return self.batch_rows or self._allowed(size)

    def predict(self, pictures: Sequence[PictureInWork]) -> Predicted:
        """Predict pictures of one size; raise only if the device is lost."""
        pending, lost = list(pictures), Lost()
        while pending:
            preds = self._try(pending)
            if isinstance(preds, Tensor):
                return Predicted(pictures=pending, preds=preds, lost=lost)
            if is_device_lost(preds):
                raise preds
            if is_out_of_memory(preds):
                if not self._make_room(pending):
                    job = pending[0].job
                    lost += [(picture, preds) for picture in pending if picture.job is job]
                    pending = [picture for picture in pending if picture.job is not job]
            elif len(pending) == 1:
                lost.append((pending.pop(), preds))
            else:
                return _joined([self.predict([picture]) for picture in pending], lost)
        return Predicted(pictures=[], preds=None, lost=lost)

    def forget(self) -> None:
        """Drop the texts and pictures of past calls, which would stay in memory while idle."""
        self._texts.clear()

    def call_rows(self, pictures: Sequence[PictureInWork]) -> int:
        """Return how many rows the U-Net call of these pictures has, padding included."""
        return self._padded(pictures[0].size) or sum(each.unet_rows for each in pictures)

    def _try(self, pictures: list[PictureInWork]) -> Tensor | Exception:
        size = pictures[0].size
        allowed = self._allowed(size)
        moving = [each.trajectory for each in pictures if each.trajectory is not None]
        try:
            text = self._text(pictures)
            preds = predictions(self._unet, moving, text, most_rows=allowed)
        except Exception as error:  # of the model's folder: the pictures of this call fail alone
            if not is_out_of_memory(error):
                logger.exception("A U-Net call of %d picture(s) failed.", len(pictures))
            return error.with_traceback(None)  # the traceback holds the call's tensors
        if size in self._caps:
            self._caps[size].succeeded(self.call_rows(pictures))
        if self.batch_rows is not None and allowed < self.batch_rows:
            for picture in pictures:
                picture.exact = False
        return preds

    def _make_room(self, pictures: list[PictureInWork]) -> bool:
        """Free what can be freed and halve the call; return False if it was a single row."""
        self.out_of_memory_total += 1
        size = pictures[0].size
        tried = min(self.call_rows(pictures), self._allowed(size))
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
        """Return exact mode's number of rows; None in elastic mode or if they do not fit."""
        exact = self.batch_rows is not None and self._allowed(size) >= self.batch_rows
        return self.batch_rows if exact else None

    def _text(self, pictures: list[PictureInWork]) -> TextRows:
        size = pictures[0].size
        padded = self._padded(size)
        known = self._texts.get(size)
        if known is not None and known[0] == pictures and known[1] == padded:
            return known[2]
        text = gather(pictures, call_rows=padded)
        self._texts[size] = (list(pictures), padded, text)
        self._texts.move_to_end(size)
        if len(self._texts) > _REMEMBERED_SIZES:
            self._texts.popitem(last=False)
        return text


def _joined(alone: Sequence[Predicted], lost: Lost) -> Predicted:
    preds = [each.preds for each in alone if each.preds is not None]
    return Predicted(
        pictures=[picture for each in alone for picture in each.pictures],
        preds=torch.cat(preds) if preds else None,
        lost=lost + [picture for each in alone for picture in each.lost],
    )


class HostThrottle:
    """Keeps the host at most one call ahead of a CUDA device, so that measured times are true."""

    def __init__(self, device: torch.device) -> None:
        """device: if it is not CUDA, no method waits, since calls return when they are done."""
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
