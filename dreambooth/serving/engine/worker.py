"""Do the work of the engine's thread in rounds; this module has no threads and no locks.

In one round the pictures of the next size, including those that have just joined, take one step in
one U-Net call. Then the oldest finished picture is decoded layer by layer, until half of the step's
time has passed. So decoding delays the other pictures by at most half a step and the rest of one
layer, and no layer of Stable Diffusion takes half as long as a step of a single picture
(`diffusion.decoding`). A new schedule is read over several rounds.
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
from dreambooth.serving.engine.pictures_in_work import PictureInWork, TextCache, places_of
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
_NEWEST = 0.2  # the weight of the newest time in a running mean


class Worker:
    """The engine without its thread; only one thread at a time may call it."""

    def __init__(
        self,
        model: DiffusionModel,
        *,
        batch_rows: int | None,
        max_rows: int,
        safety_checker: SafetyChecker | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """batch_rows: the rows of every call in exact mode. max_rows: the most in elastic mode.

        clock: returns seconds; it limits how long a round decodes.
        """
        for part in (model.unet, model.vae, model.text_encoder):
            part.eval()
        self.facts = sampling.sampling_facts(model)
        self.unet_caller = UNetCaller(
            model.unet, most_rows=batch_rows or max_rows, batch_rows=batch_rows
        )
        self.batch_queue: BatchQueue[PictureInWork] = BatchQueue(self.unet_caller.allowed_rows)
        self.undecoded: deque[PictureInWork] = deque()
        self.calls_total = 0
        self.pictures_total = 0
        self.seconds_per_call: dict[int, float] = {}
        self.seconds_per_decode = 0.0
        self.job_cancelled = False  # set by any thread when a job was cancelled
        self._model = model
        self._safety_checker = safety_checker
        self._clock = clock
        self._texts = TextCache(model)
        self._schedules = sampling.schedules_of(model)
        self._may_read_schedule = True  # whether this round may still read a part of a new schedule
        self._host_throttle = HostThrottle(model.device)
        self._device_probe = DeviceProbe(model, self._texts, self._host_throttle)
        self._largest_fitted_pixels = 0  # of the largest picture that has fitted so far

    @property
    def has_work(self) -> bool:
        """Return whether a round would do anything."""
        return bool(self.batch_queue.waiting_count or self.undecoded or self.batch_queue.busy)

    @torch.inference_mode()
    def add(self, job: DrawingJob) -> None:
        """Put a job's pictures at the end of their queues; they must have been checked."""
        if job.done:  # cancelled before it came here
            return
        for index, request in enumerate(job.requests):
            picture = PictureInWork(job=job, index=index, size=picture_size(self.facts, request))
            batch_rows = self.unet_caller.batch_rows
            if batch_rows is not None and self.positions_matter(picture.size):
                picture.places = places_of(request, batch_rows)
            self.batch_queue.add(picture)

    @torch.inference_mode()
    def run_round(self) -> None:
        """Take one step for the next size, then go on decoding a picture."""
        if self.job_cancelled:
            self.job_cancelled = False
            self._drop(lambda picture: picture.job.done)
        # Pictures that wait to be decoded hold memory: once there are as many as a call has rows,
        # no new ones begin.
        admit = len(self.undecoded) < self.unet_caller.most_rows
        pictures, _ = self.batch_queue.next(admit=admit)
        self._may_read_schedule = True
        for picture in pictures:
            if picture.trajectory is None and not picture.job.done:
                self._guarded(picture, functools.partial(self._begin, picture), "beginning")
        pictures = [
            picture
            for picture in pictures
            if picture.trajectory is not None and not picture.job.done
        ]
        began = self._clock()
        if pictures:
            self._step(pictures)
        if self.undecoded:
            self._host_throttle.wait()
            self._decode(DECODING_SHARE * (self._clock() - began) if pictures else 0.0)
        if not self.has_work:
            self.unet_caller.forget()

    def fail_everything(self, error: BaseException) -> None:
        """Fail every unfinished job with `error`."""

        def fail(picture: PictureInWork) -> bool:
            picture.job.fail(error)
            return True

        self._drop(fail)

    @torch.inference_mode()
    def positions_matter(self, size: tuple[int, int]) -> bool:
        """Return whether pictures of this size, in pixels, need fixed rows in exact mode.

        Their seed chooses the rows.
        """
        rows = self.unet_caller.batch_rows or 1
        return self._device_probe.positions_matter(size, rows=rows)

    @torch.inference_mode()
    def warm_up(self, budget_s: float) -> WarmUp:
        """Draw one picture, then measure U-Net calls for at most about `budget_s` seconds.

        With 0 only a single picture is measured, and `max_rows` is used as it is. In exact mode one
        call is measured in any case.

        Raises ModelArtifactError for a model that draws nothing, or nothing finite, ResourceError
        if memory is too short.
        """
        steps = max(2, self.facts.min_steps)
        request = SamplingRequest(prompt="", num_inference_steps=steps, guidance_scale=1.0, seed=0)
        job = DrawingJob([request])
        self.add(job)
        while self.has_work:
            self.run_round()
        try:
            (picture,) = job.result(timeout=0)
        except DreamBoothError:
            raise
        except Exception as error:  # the folder's settings do not fit its networks
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
                lambda rows: self._device_probe.call_or_memory_error(size, rows),
                most_rows=unet_caller.most_rows,
                budget_s=budget_s,
            )
            if budget_s > 0:
                unet_caller.most_rows = min(unet_caller.most_rows, warm_up.rows_of_a_call(curve))
        self.seconds_per_call = dict(curve)
        self.calls_total = self.pictures_total = 0
        return WarmUp(
            seconds_per_call=curve,
            rows=unet_caller.most_rows,
            seconds_per_decode=self.seconds_per_decode,
            positions_matter=positions_matter,
        )

    def _begin(self, picture: PictureInWork) -> None:
        """Begin a picture, or leave it waiting while its schedule is not read.

        One round reads only one part of a schedule, so as not to delay the other pictures.
        """
        request = picture.request
        steps, eta = request.num_inference_steps, request.eta
        if self._schedules.take_known(steps, eta=eta) is None and self._may_read_schedule:
            self._may_read_schedule = False
            self._schedules.read_on(steps, eta=eta)
        if self._schedules.take_known(steps, eta=eta) is None:
            return
        picture.prompt = self._texts.get(request.prompt)
        if request.guided:
            picture.negative_prompt = self._texts.get(request.negative_prompt)
        picture.trajectory = sampling.start(self._model, request, self._schedules)

    def _step(self, pictures: list[PictureInWork]) -> None:
        began = time.perf_counter()
        outcome = self.unet_caller.predict(pictures)
        if outcome.preds is not None:
            self._step_pictures(outcome.pictures, outcome.preds)
        for picture, error in outcome.lost:
            self._fail_job(picture, error)
        self._host_throttle.after_call()
        self.calls_total += 1
        if outcome.pictures and pictures[0].size == (self.facts.resolution, self.facts.resolution):
            self._note_time(self.unet_caller.call_rows(pictures), time.perf_counter() - began)

    def _step_pictures(self, pictures: list[PictureInWork], preds: Tensor) -> None:
        """Take the step of all pictures of a call, together where that is possible."""
        if not self._stepped_together(pictures, preds):
            for picture, pred in zip(pictures, torch.split(preds, 1), strict=True):
                move = functools.partial(self._step_alone, picture, pred)
                self._guarded(picture, move, "stepping", retry=False)
        for picture in pictures:
            if (
                picture.trajectory is not None
                and picture.trajectory.finished
                and not picture.job.done
            ):
                self.batch_queue.leave(picture)
                self.undecoded.append(picture)

    def _stepped_together(self, pictures: list[PictureInWork], preds: Tensor) -> bool:
        """Step all pictures at once; return whether that worked. If not, none has moved."""
        moving = [picture.trajectory for picture in pictures if picture.trajectory is not None]
        if not trajectories.can_step_together(moving):
            return False
        try:
            trajectories.step(moving, preds)
            return True
        except Exception as error:  # each picture is then stepped alone
            if is_device_lost(error):
                raise
            short = is_out_of_memory(error)
            if not short:
                logger.exception("A step of %d picture(s) failed.", len(pictures))
        if short:
            self.unet_caller.out_of_memory_total += 1
            free_caches()
        return False

    def _step_alone(self, picture: PictureInWork, pred: Tensor) -> None:
        assert picture.trajectory is not None
        try:
            trajectories.step([picture.trajectory], pred)
        except (RuntimeError, MemoryError) as error:
            # Half a step cannot be undone, but the picture can be begun again.
            if not is_out_of_memory(error) or picture.restarts >= _MOST_RESTARTS:
                raise
            picture.restarts += 1
            logger.warning("Out of memory in a noise scheduler: a picture is begun anew.")
            picture.trajectory = None
            self._begin(picture)

    def _decode(self, most_s: float) -> None:
        """Decode one layer of the oldest picture, and more until `most_s` seconds have passed."""
        picture = self.undecoded[0]
        if picture.job.done:
            self.undecoded.popleft()
            return
        began = self._clock()
        done: list[Picture] = []
        decode_until = functools.partial(self._decode_until, picture, began + most_s, done)
        self._guarded(picture, decode_until, "decoding", retry=not picture.decoding_failed)
        picture.decoding_s += self._clock() - began
        if not done:
            return
        self.undecoded.popleft()
        if picture.size == (self.facts.resolution, self.facts.resolution):
            before = self.seconds_per_decode or picture.decoding_s
            self.seconds_per_decode = before + _NEWEST * (picture.decoding_s - before)
        self._largest_fitted_pixels = max(
            self._largest_fitted_pixels, picture.size[0] * picture.size[1]
        )
        self.pictures_total += 1
        picture.job.deliver(picture.index, done[0])

    def _decode_until(self, picture: PictureInWork, end: float, done: list[Picture]) -> None:
        """Decode until the clock reaches `end`; append the picture to `done` if it is complete."""
        assert picture.trajectory is not None
        if picture.decoding is None:
            picture.decoding = finishing.finish(
                self._model,
                picture.trajectory.latents,
                seed=picture.request.seed,
                exact=picture.exact,
                safety_checker=self._safety_checker,
            )
        try:
            while True:
                next(picture.decoding)
                self._host_throttle.wait()
                if self._clock() >= end:
                    return
        except StopIteration as last:
            done.append(last.value)
        except Exception:  # `_guarded` handles it
            picture.decoding, picture.decoding_failed = None, True
            raise

    def _guarded(
        self, picture: PictureInWork, work: Callable[[], Any], what: str, *, retry: bool = True
    ) -> None:
        """Do a picture's work, and fail its job if that raises.

        If memory runs out, free what can be freed and, with `retry`, try once more. Raises only
        if the device is lost.
        """
        for last in (False, True):
            try:
                work()
                return
            except Exception as error:  # one picture's fault must not reach the others
                if is_device_lost(error):
                    raise
                short = is_out_of_memory(error)
                if not short:
                    logger.exception("A picture failed while %s it.", what)
                failure = error.with_traceback(None)
            # After the `except` block, which keeps the tensors of the failed frames alive.
            if short:
                self.unet_caller.out_of_memory_total += 1
                self._texts.clear()
                served_unet.release(self._model.unet)
                free_caches()
            if last or not short or not retry:
                self._fail_job(picture, failure)
                return

    def _fail_job(self, picture: PictureInWork, error: Exception) -> None:
        if is_out_of_memory(error):
            width, height = picture.size
            fits = advice(
                width, height, unit=self.facts.unit, fitted_pixels=self._largest_fitted_pixels
            )
            error = ResourceError(
                "The device ran out of memory while drawing a single picture of "
                f"{width} x {height} pixels; {fits}."
            )
        picture.job.fail(error)
        self._drop(lambda other: other.job is picture.job)

    def _drop(self, unwanted: Callable[[PictureInWork], bool]) -> None:
        self.batch_queue.drop(unwanted)
        self.undecoded = deque(picture for picture in self.undecoded if not unwanted(picture))

    def _note_time(self, rows: int, seconds: float) -> None:
        before = self.seconds_per_call.get(rows, seconds)
        self.seconds_per_call[rows] = before + _NEWEST * (seconds - before)
