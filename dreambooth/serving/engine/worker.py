"""The work of the engine's thread, round by round; there are no threads and no locks here.

In one round the rows of the next size (those that may join come first) take one step in one U-Net
call; then the oldest finished picture is decoded layer by layer, until half of the time that the
step took has passed. So decoding holds the others up for half a step and the rest of one layer at
most, and no layer of Stable Diffusion takes half of a single row's step (`diffusion.decoding`). A
schedule that nobody has asked for yet is read over several rounds.
"""

from __future__ import annotations

import functools
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dreambooth.diffusion import sampling, trajectories
from dreambooth.diffusion.model import DiffusionModel
from dreambooth.diffusion.safety import SafetyChecker
from dreambooth.diffusion.sampling_request import SamplingRequest, picture_size
from dreambooth.errors import DreamBoothError, ModelArtifactError, ResourceError, in_one_line
from dreambooth.fast import served_unet
from dreambooth.serving.contract.reply import Picture
from dreambooth.serving.engine import finishing, warm_up
from dreambooth.serving.engine.batch_queue import DECODING_SHARE, BatchQueue
from dreambooth.serving.engine.device_probe import DeviceProbe
from dreambooth.serving.engine.drawing_jobs import DrawingJob
from dreambooth.serving.engine.picture_rows import PictureRow, TextCache, places_of
from dreambooth.serving.engine.row_limits import (
    advice,
    free_caches,
    is_device_lost,
    is_out_of_memory,
)
from dreambooth.serving.engine.unet_calls import HostThrottle, UNetCaller
from dreambooth.serving.engine.warm_up import WarmUp

logger = logging.getLogger(__name__)

_MOST_RESTARTS = 3
_NEWEST = 0.2  # the share of the newest time in a running mean


class Worker:
    """The engine without its thread: one thread at a time may call it."""

    def __init__(
        self,
        model: DiffusionModel,
        *,
        batch_rows: int | None,
        max_rows: int,
        safety_checker: SafetyChecker | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """batch_rows: exact mode's rows of every call. max_rows: elastic mode's most.

        clock: seconds, by which decoding is rationed.
        """
        for part in (model.unet, model.vae, model.text_encoder):
            part.eval()
        self.facts = sampling.sampling_facts(model)
        self.unet_caller = UNetCaller(
            model.unet, most_rows=batch_rows or max_rows, batch_rows=batch_rows
        )
        self.batch_queue: BatchQueue[PictureRow] = BatchQueue(self.unet_caller.room)
        self.undecoded: deque[PictureRow] = deque()
        self.steps_done_total = 0
        self.pictures_total = 0
        self.seconds_per_step: dict[int, float] = {}
        self.seconds_per_decode = 0.0
        self.job_cancelled = False  # set by any thread: a job was given up
        self._model = model
        self._safety_checker = safety_checker
        self._clock = clock
        self._texts = TextCache(model)
        self._schedules = sampling.schedules_of(model)
        self._may_read = True  # part of a new schedule, in this round
        self._host_throttle = HostThrottle(model.device)
        self._device_probe = DeviceProbe(model, self._texts, self._host_throttle)
        self._known_pixels = 0  # the largest picture that ever fitted

    @property
    def has_work(self) -> bool:
        """Return whether a round would do anything."""
        return bool(self.batch_queue.waiting_count or self.undecoded or self.batch_queue.busy)

    @torch.inference_mode()
    def add(self, job: DrawingJob) -> None:
        """Put a job's pictures, which have been checked, at the end of their queues."""
        if job.done:  # given up before it came here
            return
        for index, request in enumerate(job.requests):
            row = PictureRow(job=job, index=index, size=picture_size(self.facts, request))
            batch_rows = self.unet_caller.batch_rows
            if batch_rows is not None and self.positions_matter(row.size):
                row.places = places_of(request, batch_rows)
            self.batch_queue.add(row)

    @torch.inference_mode()
    def run_round(self) -> None:
        """Take one step of the next size, then go on decoding a picture."""
        if self.job_cancelled:
            self.job_cancelled = False
            self._drop(lambda row: row.job.done)
        # Pictures that wait to be decoded hold memory: more of them than a call has rows, and no
        # new ones begin.
        admit = len(self.undecoded) < self.unet_caller.most_rows
        rows, _ = self.batch_queue.next(admit=admit)
        self._may_read = True
        for row in rows:
            if row.trajectory is None and not row.job.done:
                self._guarded(row, functools.partial(self._begin, row), "beginning")
        rows = [row for row in rows if row.trajectory is not None and not row.job.done]
        began = self._clock()
        if rows:
            self._step(rows)
        if self.undecoded:
            self._host_throttle.wait()
            self._decode(DECODING_SHARE * (self._clock() - began) if rows else 0.0)
        if not self.has_work:
            self.unet_caller.forget()

    def fail_everything(self, error: BaseException) -> None:
        """End every job that is not done with an error."""

        def fail(row: PictureRow) -> bool:
            row.job.fail(error)
            return True

        self._drop(fail)

    @torch.inference_mode()
    def positions_matter(self, size: tuple[int, int]) -> bool:
        """Exact mode: whether pictures of this size, pixels, must keep to rows of their own.

        Their seed chooses these.
        """
        rows = self.unet_caller.batch_rows or 1
        return self._device_probe.positions_matter(size, rows=rows)

    @torch.inference_mode()
    def warm_up(self, budget_s: float) -> WarmUp:
        """Draw one picture, then measure U-Net calls for at most about `budget_s` seconds.

        With 0 only single rows are measured and `max_rows` is taken as it is.

        Raises ModelArtifactError for a model that draws nothing, or nothing finite, ResourceError
        where memory is too short.
        """
        request = SamplingRequest(prompt="", num_inference_steps=2, guidance_scale=1.0, seed=0)
        job = DrawingJob([request])
        self.add(job)
        while self.has_work:
            self.run_round()
        try:
            (picture,) = job.result(timeout=0)
        except DreamBoothError:
            raise
        except Exception as error:  # of a folder that says what its networks cannot do
            reason = in_one_line(error)
            raise ModelArtifactError(f"{self._model.folder} draws no picture: {reason}.") from error
        if picture.finish_reason == "NOT_FINITE":
            half = self._model.unet.dtype != torch.float32
            instead = "choose the precision fp32" if half else "its weights are of no use"
            raise ModelArtifactError(
                f"{self._model.folder} draws pictures that are not finite as "
                f"{self._model.unet.dtype}: {instead}."
            )
        size = picture_size(self.facts, request)
        unet_caller, positions_matter = self.unet_caller, False
        curve: tuple[tuple[int, float], ...]
        if unet_caller.batch_rows is not None:
            positions_matter = self.positions_matter(size)
            began = time.perf_counter()
            self._device_probe.call(size, unet_caller.batch_rows)
            curve = ((unet_caller.batch_rows, time.perf_counter() - began),)
        else:
            curve = warm_up.measure(
                lambda rows: self._device_probe.timed_call(size, rows),
                most_rows=unet_caller.most_rows,
                budget_s=budget_s,
            )
            if budget_s > 0:
                unet_caller.most_rows = min(unet_caller.most_rows, warm_up.rows_of_a_call(curve))
        self.seconds_per_step = dict(curve)
        self.steps_done_total = self.pictures_total = 0
        return WarmUp(
            seconds_per_step=curve,
            rows=unet_caller.most_rows,
            seconds_per_decode=self.seconds_per_decode,
            positions_matter=positions_matter,
        )

    def _begin(self, row: PictureRow) -> None:
        """Let a picture begin; not yet, where that would hold the others up for longer."""
        request = row.request
        steps, eta = request.num_inference_steps, request.eta
        if self._schedules.take_known(steps, eta=eta) is None and self._may_read:
            self._may_read = False
            self._schedules.read_on(steps, eta=eta)
        if self._schedules.take_known(steps, eta=eta) is None:
            return
        row.prompt = self._texts.get(request.prompt)
        if request.guided:
            row.negative_prompt = self._texts.get(request.negative_prompt)
        row.trajectory = sampling.start(self._model, request, self._schedules)

    def _step(self, rows: list[PictureRow]) -> None:
        began = time.perf_counter()
        outcome = self.unet_caller.predict(rows)
        if outcome.preds is not None:
            self._step_rows(outcome.rows, outcome.preds)
        for row, error in outcome.lost:
            self._fail_job(row, error)
        self._host_throttle.after_call()
        self.steps_done_total += 1
        if outcome.rows and rows[0].size == (self.facts.resolution, self.facts.resolution):
            self._note_time(self.unet_caller.call_rows(rows), time.perf_counter() - began)

    def _step_rows(self, rows: list[PictureRow], preds: Tensor) -> None:
        """Take the step of all pictures of a call, at once where that can be done."""
        if not self._stepped_together(rows, preds):
            for row, pred in zip(rows, torch.split(preds, 1), strict=True):
                move = functools.partial(self._step_alone, row, pred)
                self._guarded(row, move, "stepping", retry=False)
        for row in rows:
            if row.trajectory is not None and row.trajectory.finished and not row.job.done:
                self.batch_queue.leave(row)
                self.undecoded.append(row)

    def _stepped_together(self, rows: list[PictureRow], preds: Tensor) -> bool:
        """Whether all have taken their step; if not, none has."""
        pictures = [row.trajectory for row in rows if row.trajectory is not None]
        if not trajectories.can_step_together(pictures):
            return False
        try:
            trajectories.step(pictures, preds)
            return True
        except Exception as error:
            if is_device_lost(error):
                raise
            short = is_out_of_memory(error)
            if not short:
                logger.exception("A step of %d picture(s) failed.", len(rows))
        if short:
            self.unet_caller.out_of_memory_total += 1
            free_caches()
        return False

    def _step_alone(self, row: PictureRow, pred: Tensor) -> None:
        assert row.trajectory is not None
        try:
            trajectories.step([row.trajectory], pred)
        except Exception as error:
            # Half of a step cannot be taken back; the same picture can be begun anew.
            if not is_out_of_memory(error) or row.restarts >= _MOST_RESTARTS:
                raise
            row.restarts += 1
            logger.warning("Out of memory in a noise scheduler: a picture is begun anew.")
            row.trajectory = None
            self._begin(row)

    def _decode(self, most_s: float) -> None:
        """Decode of the oldest picture one layer, and more until so many seconds have passed."""
        row = self.undecoded[0]
        if row.job.done:
            self.undecoded.popleft()
            return
        began = self._clock()
        done: list[Picture] = []
        decode_until = functools.partial(self._decode_until, row, began + most_s, done)
        self._guarded(row, decode_until, "decoding", retry=not row.decoding_failed)
        row.decoding_s += self._clock() - began
        if not done:
            return
        self.undecoded.popleft()
        if row.size == (self.facts.resolution, self.facts.resolution):
            before = self.seconds_per_decode or row.decoding_s
            self.seconds_per_decode = before + _NEWEST * (row.decoding_s - before)
        self._known_pixels = max(self._known_pixels, row.size[0] * row.size[1])
        self.pictures_total += 1
        row.job.deliver(row.index, done[0])

    def _decode_until(self, row: PictureRow, end: float, done: list[Picture]) -> None:
        """Decode until the clock says `end`, or to the end: then the picture is put into `done`."""
        assert row.trajectory is not None
        if row.decoding is None:
            row.decoding = finishing.finish(
                self._model,
                row.trajectory.latents,
                seed=row.request.seed,
                exact=row.exact,
                safety_checker=self._safety_checker,
            )
        try:
            while True:
                next(row.decoding)
                self._host_throttle.wait()
                if self._clock() >= end:
                    return
        except StopIteration as last:
            done.append(last.value)
        except Exception:
            row.decoding, row.decoding_failed = None, True
            raise

    def _guarded(
        self, row: PictureRow, work: Callable[[], Any], what: str, *, retry: bool = True
    ) -> None:
        """Do a picture's work; out of memory, once more with what can be freed; else it is lost."""
        for last in (False, True):
            try:
                work()
                return
            except Exception as error:
                if is_device_lost(error):
                    raise
                short = is_out_of_memory(error)
                if not short:
                    logger.exception("A picture failed while %s it.", what)
                failure = error.with_traceback(None)
            # Outside of `except`, which holds the tensors of the frames that failed.
            if short:
                self.unet_caller.out_of_memory_total += 1
                self._texts.clear()
                served_unet.release(self._model.unet)
                free_caches()
            if last or not short or not retry:
                self._fail_job(row, failure)
                return

    def _fail_job(self, row: PictureRow, error: Exception) -> None:
        if is_out_of_memory(error):
            width, height = row.size
            fits = advice(width, height, unit=self.facts.unit, known_pixels=self._known_pixels)
            error = ResourceError(
                "The device ran out of memory while drawing a single picture of "
                f"{width} x {height} pixels; {fits}."
            )
        row.job.fail(error)
        self._drop(lambda other: other.job is row.job)

    def _drop(self, unwanted: Callable[[PictureRow], bool]) -> None:
        self.batch_queue.drop(unwanted)
        self.undecoded = deque(row for row in self.undecoded if not unwanted(row))

    def _note_time(self, rows: int, seconds: float) -> None:
        before = self.seconds_per_step.get(rows, seconds)
        self.seconds_per_step[rows] = before + _NEWEST * (seconds - before)
