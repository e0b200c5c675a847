"""What the engine's thread does, turn by turn; no threads and no locks here.

A turn: the next size's rows, those that may join first, take one step in one U-Net call; then at
most one finished picture is decoded, so that decoding never holds the others up for longer.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dreambooth.diffusion import sampling
from dreambooth.diffusion.denoising import SchedulerTemplates
from dreambooth.diffusion.model import DiffusionModel, sampling_scheduler
from dreambooth.diffusion.safety import SafetyChecker
from dreambooth.diffusion.sampling_request import SamplingRequest, picture_size
from dreambooth.diffusion.text_encoders import in_one_line
from dreambooth.errors import DreamBoothError, ModelArtifactError, ResourceError
from dreambooth.serving import decoding, warm_up
from dreambooth.serving.jobs import Job
from dreambooth.serving.memory import advice, free_caches, is_device_lost, is_out_of_memory
from dreambooth.serving.reply import Picture
from dreambooth.serving.rows import PictureRow, TextCache, places_of
from dreambooth.serving.stepping import Pace, Stepper
from dreambooth.serving.turns import Turns
from dreambooth.serving.warm_up import WarmUp

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
    ) -> None:
        """batch_rows: exact mode's rows of every call. max_rows: elastic mode's most."""
        for part in (model.unet, model.vae, model.text_encoder):
            part.eval()
        self.facts = sampling.sampling_facts(model)
        self.stepper = Stepper(model.unet, most_rows=batch_rows or max_rows, batch_rows=batch_rows)
        self.turns: Turns[PictureRow] = Turns(self.stepper.room)
        self.undecoded: deque[PictureRow] = deque()
        self.steps_done_total = 0
        self.pictures_total = 0
        self.seconds_per_step: dict[int, float] = {}
        self.seconds_per_decode = 0.0
        self.someone_left = False  # set by any thread: a job was given up
        self._model = model
        self._safety_checker = safety_checker
        self._texts = TextCache(model)
        self._templates = SchedulerTemplates(lambda: sampling_scheduler(model))
        self._pace = Pace(model.device)
        self._positions_matter: dict[tuple[int, int], bool] = {}
        self._known_pixels = 0  # the largest picture that ever fitted

    @property
    def has_work(self) -> bool:
        """Whether a turn would do anything."""
        return bool(self.turns.waiting_count or self.undecoded or self.turns.busy)

    @torch.inference_mode()
    def add(self, job: Job) -> None:
        """Put a job's pictures, which have been checked, at the end of their queues."""
        if job.done:  # given up before it came here
            return
        for index, request in enumerate(job.requests):
            row = PictureRow(job=job, index=index, size=picture_size(self.facts, request))
            batch_rows = self.stepper.batch_rows
            if batch_rows is not None and self.positions_matter(row.size):
                row.places = places_of(request, batch_rows)
            self.turns.add(row)

    @torch.inference_mode()
    def turn(self) -> None:
        """Take one step of the next size, then decode one picture."""
        if self.someone_left:
            self.someone_left = False
            self._drop(lambda row: row.job.done)
        # Pictures that wait to be decoded hold memory: more of them than a call has rows, and no
        # new ones begin.
        admit = len(self.undecoded) < self.stepper.most_rows
        rows, joined = self.turns.next(admit=admit)
        for row in joined:
            self._guarded(row, lambda row=row: self._begin(row), "beginning")  # type: ignore[misc]
        rows = [row for row in rows if row.trajectory is not None and not row.job.done]
        if rows:
            self._step(rows)
        if self.undecoded:
            self._decode(self.undecoded.popleft())
        if not self.has_work:
            self.stepper.forget()

    def fail_everything(self, error: BaseException) -> None:
        """End every job that is not done with an error."""

        def fail(row: PictureRow) -> bool:
            row.job.fail(error)
            return True

        self._drop(fail)

    @torch.inference_mode()
    def positions_matter(self, size: tuple[int, int]) -> bool:
        """Exact mode: whether equal rows of one call come out unequal here at this size, pixels.

        So it is on CPUs with several threads, which cut a call's work at places that do not fall
        between rows. Pictures then keep to rows that their seed chooses. Asked of the device by
        one call, the first time that a size is wanted.
        """
        if size not in self._positions_matter:
            outcome = True
            try:
                output = self._probe(size, self.stepper.batch_rows or 1)
                outcome = not all(torch.equal(row, output[0]) for row in output)
            except Exception as error:  # too large: the pictures themselves will say so
                if is_device_lost(error):
                    raise
                logger.warning("The rows of a call could not be compared: %s", error)
            self._positions_matter[size] = outcome
        return self._positions_matter[size]

    @torch.inference_mode()
    def warm_up(self, budget_s: float) -> WarmUp:
        """Draw one picture, then measure U-Net calls for at most about `budget_s` seconds.

        With 0 only single rows are measured and `max_rows` is taken as it is.

        Raises ModelArtifactError for a model that draws nothing, or nothing finite, ResourceError
        where memory is too short.
        """
        request = SamplingRequest(prompt="", num_inference_steps=2, guidance_scale=1.0, seed=0)
        job = Job([request])
        self.add(job)
        while self.has_work:
            self.turn()
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
        stepper, positions_matter = self.stepper, False
        curve: tuple[tuple[int, float], ...]
        if stepper.batch_rows is not None:
            positions_matter = self.positions_matter(size)
            began = time.perf_counter()
            self._probe(size, stepper.batch_rows)
            curve = ((stepper.batch_rows, time.perf_counter() - began),)
        else:
            curve = warm_up.measure(
                lambda rows: self._measured(size, rows),
                most_rows=stepper.most_rows,
                budget_s=budget_s,
            )
            if budget_s > 0:
                # Fewer than two would tear the halves of a guided picture apart.
                pay = max(2, warm_up.rows_that_pay(curve))
                stepper.most_rows = min(stepper.most_rows, pay)
        self.seconds_per_step = dict(curve)
        self.steps_done_total = self.pictures_total = 0
        return WarmUp(
            seconds_per_step=curve,
            rows=stepper.most_rows,
            seconds_per_decode=self.seconds_per_decode,
            positions_matter=positions_matter,
        )

    def _begin(self, row: PictureRow) -> None:
        request = row.request
        row.prompt = self._texts.get(request.prompt)
        if request.guided:
            row.negative_prompt = self._texts.get(request.negative_prompt)
        prepared = self._templates.take(request.num_inference_steps)
        row.trajectory = sampling.start(self._model, [request], prepared=prepared)

    def _step(self, rows: list[PictureRow]) -> None:
        began = time.perf_counter()
        predicted, lost = self.stepper.predict(rows)
        for row, pred in predicted:
            self._guarded(row, lambda row=row, pred=pred: self._move(row, pred), "stepping")  # type: ignore[misc]
        for row, error in lost:
            self._lose(row, error)
        self._pace.after_call()
        self.steps_done_total += 1
        if predicted and rows[0].size == (self.facts.resolution, self.facts.resolution):
            self._record(self.stepper.call_rows(rows), time.perf_counter() - began)

    def _move(self, row: PictureRow, pred: Tensor) -> None:
        trajectory = row.trajectory
        assert trajectory is not None
        try:
            trajectory.step(pred)
        except Exception as error:
            # Half of a step cannot be taken back; the same picture can be begun anew.
            if not is_out_of_memory(error) or row.restarts >= _MOST_RESTARTS:
                raise
            row.restarts += 1
            logger.warning("Out of memory in a noise scheduler: a picture is begun anew.")
            del trajectory
            self._begin(row)
            return
        if trajectory.finished:
            self.turns.leave(row)
            self.undecoded.append(row)

    def _decode(self, row: PictureRow) -> None:
        if row.job.done:
            return
        began = time.perf_counter()
        picture: list[Picture] = []
        self._guarded(row, lambda: picture.append(self._finish(row)), "decoding")
        if not picture:
            return
        if row.size == (self.facts.resolution, self.facts.resolution):
            taken = time.perf_counter() - began
            before = self.seconds_per_decode or taken
            self.seconds_per_decode = before + _NEWEST * (taken - before)
        self._known_pixels = max(self._known_pixels, row.size[0] * row.size[1])
        self.pictures_total += 1
        row.job.deliver(row.index, picture[0])

    def _finish(self, row: PictureRow) -> Picture:
        assert row.trajectory is not None
        return decoding.finish(
            self._model,
            row.trajectory.latents,
            seed=row.request.seed,
            exact=row.exact,
            safety_checker=self._safety_checker,
        )

    def _guarded(self, row: PictureRow, work: Callable[[], Any], what: str) -> None:
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
                self.stepper.out_of_memory_total += 1
                self._texts.clear()
                free_caches()
            if last or not short or what == "stepping":
                self._lose(row, failure)
                return

    def _lose(self, row: PictureRow, error: Exception) -> None:
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
        self.turns.drop(unwanted)
        self.undecoded = deque(row for row in self.undecoded if not unwanted(row))

    def _probe(self, size: tuple[int, int], rows: int) -> Tensor:
        """One U-Net call of equal rows, finished when this returns."""
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
        self._pace.wait()
        return output

    def _measured(self, size: tuple[int, int], rows: int) -> None:
        try:
            self._probe(size, rows)
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        free_caches()
        raise MemoryError

    def _record(self, rows: int, seconds: float) -> None:
        before = self.seconds_per_step.get(rows, seconds)
        self.seconds_per_step[rows] = before + _NEWEST * (seconds - before)
