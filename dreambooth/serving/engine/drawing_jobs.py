"""Represent the pictures of one `Engine.submit` as a job to wait for or to cancel."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError

from dreambooth.diffusion.sampling_request import SamplingRequest
from dreambooth.serving.contract.reply import Picture

logger = logging.getLogger(__name__)

OnPicture = Callable[[int, Picture], None]


class DrawingJob:
    """The job of one `Engine.submit`; every method may be called from any thread."""

    def __init__(
        self,
        requests: Sequence[SamplingRequest],
        *,
        most_pictures: int | None = None,
        on_picture: OnPicture | None = None,
        on_cancel: Callable[[], None] | None = None,
    ) -> None:
        """Take the requests; at most `most_pictures` of them share a U-Net call."""
        self.requests = tuple(requests)
        self.most_pictures = most_pictures
        self._on_picture = on_picture
        self._on_cancel = on_cancel
        self._pictures: dict[int, Picture] = {}
        self._future: Future[list[Picture]] = Future()
        if not self.requests:
            self._future.set_result([])

    def result(self, timeout: float | None = None) -> list[Picture]:
        """Wait for all pictures, in the order of the requests.

        Raises the job's error (ResourceError where a picture does not fit into memory),
        concurrent.futures.CancelledError after `cancel`, TimeoutError after `timeout` seconds.
        """
        return self._future.result(timeout)

    def cancel(self) -> None:
        """Cancel the job, which frees its rows at the next step; do nothing if it is done."""
        if self._future.cancel() and self._on_cancel is not None:
            self._on_cancel()

    @property
    def done(self) -> bool:
        """Return whether the job has its pictures or an error, or was cancelled."""
        return self._future.done()

    def add_done_callback(self, callback: Callable[[DrawingJob], None]) -> None:
        """Call `callback(job)` once the job is done, or now if it is; it must not block."""
        self._future.add_done_callback(lambda _: callback(self))

    def deliver(self, index: int, picture: Picture) -> None:
        """Take picture `index`, which the engine has drawn."""
        if self.done:
            return
        self._pictures[index] = picture
        if self._on_picture is not None:
            try:
                self._on_picture(index, picture)
            except Exception:  # a callback's error must harm neither picture nor engine
                logger.exception("The callback for a finished picture failed.")
        if len(self._pictures) == len(self.requests):
            self._finish(lambda: self._future.set_result([self._pictures[i] for i in self._order]))

    def fail(self, error: BaseException) -> None:
        """End the job with an error of the engine; do nothing if it is done."""
        self._finish(lambda: self._future.set_exception(error))

    @property
    def _order(self) -> range:
        return range(len(self.requests))

    def _finish(self, finish: Callable[[], None]) -> None:
        try:
            finish()
        except InvalidStateError:
            logger.debug("The job was done already.")
