"""Draw the submitted pictures step by step, in one thread that owns the device.

There are two modes. *Elastic*: the rows of a U-Net call follow the load, and a picture equals that
of the same request served alone up to rounding, at most 2/255 in fp32. For half precision nothing
is promised beyond what `python -m benchmarks serving` measures on the device at hand: in bf16 on
one CPU thread no byte of 64 pictures of the embedded model differed (1 to 30 steps; 2026-11-23); no
GPU has been measured. *Exact*, with `batch_rows`: every call is padded to that many rows, and a
picture's bytes depend only on model, request, seed and `batch_rows` (on one machine, with one
number of threads). The padding costs time.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Final

import torch

from dreambooth.diffusion import model as models
from dreambooth.diffusion import safety
from dreambooth.diffusion.float_types import dtype_for
from dreambooth.diffusion.model import DiffusionModel
from dreambooth.diffusion.safety import SafetyChecker
from dreambooth.diffusion.sampling_request import SamplingRequest, check
from dreambooth.errors import ResourceError, UnavailableError, UserError
from dreambooth.fast import served_unet
from dreambooth.limits import LIMITS, Limits
from dreambooth.process import gpu_driver
from dreambooth.serving.contract.engine_status import EngineStatus
from dreambooth.serving.engine.drawing_jobs import DrawingJob, OnPicture
from dreambooth.serving.engine.row_limits import free_caches, is_out_of_memory
from dreambooth.serving.engine.warm_up import WarmUp
from dreambooth.serving.engine.worker import Worker
from dreambooth.settings.serve_options import ServeSettings

logger = logging.getLogger(__name__)

_RETRY_AFTER_S = 5.0
MAX_ROWS: Final = 16  # of an elastic call
# About how many seconds the warm-up measures U-Net calls.
_WARM_UP_BUDGET_S = 10.0


class Engine:
    """Draws pictures; `submit`, `status` and `close` may be called from any thread."""

    def __init__(
        self,
        model: DiffusionModel,
        *,
        batch_rows: int | None = None,
        max_rows: int = MAX_ROWS,
        warm_up_budget_s: float = _WARM_UP_BUDGET_S,
        safety_checker: SafetyChecker | None = None,
        limits: Limits = LIMITS,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Take a model, which nothing else may use from now on.

        A guided picture takes two rows of a U-Net call, others take one. batch_rows: None for
        elastic mode; N, at least 2, for exact mode, where every U-Net call is padded to N rows.
        max_rows: the most rows of an elastic call; the warm-up chooses fewer if more do not pay.
        warm_up_budget_s: about how many seconds it measures; with 0 max_rows is used as it is.
        clock: as in `Worker`. Raises UserError for numbers of rows out of range.
        """
        for name, least, rows in (("batch_rows", 2, batch_rows), ("max_rows", 1, max_rows)):
            if rows is not None and not least <= rows <= LIMITS.max_generated_batch:
                raise UserError(
                    f"{name} must lie between {least} and {LIMITS.max_generated_batch}, not {rows}."
                )
        self._limits = limits
        self._warm_up_budget_s = warm_up_budget_s
        self._worker = Worker(
            model,
            batch_rows=batch_rows,
            max_rows=max_rows,
            safety_checker=safety_checker,
            clock=clock,
        )
        self.facts = self._worker.facts
        self._changed = threading.Condition()
        self._inbox: deque[DrawingJob] = deque()
        self._inbox_pictures = 0
        self._closing = False
        self._draining = False
        self.broken: str | None = None  # the error that ended the thread
        self._warm_up: Future[WarmUp] = Future()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    def start(self) -> WarmUp:
        """Start the thread, and return once it is warmed up and takes requests.

        Raises what `Worker.warm_up` raises.
        """
        atexit.register(self._abandon)
        self._thread.start()
        try:
            return self._warm_up.result()
        except BaseException:
            self.close(drain=False)  # or the exit hook would keep the model in memory
            raise

    @property
    def warm_up(self) -> WarmUp:
        """Return what `start`, which must have returned, has measured."""
        return self._warm_up.result(timeout=0)

    def submit(
        self,
        requests: Sequence[SamplingRequest],
        *,
        most_pictures: int | None = None,
        on_picture: OnPicture | None = None,
    ) -> DrawingJob:
        """Queue the pictures of `requests` and return their job at once.

        most_pictures: the most of them in one U-Net call. on_picture(i, picture) is called on the
        engine's thread as each is done, in any order; it must not block. Raises RequestError for
        what the model cannot draw, UnavailableError if the engine is closed or broken.
        """
        for request in requests:
            check(self.facts, request, limits=self._limits)
        job = DrawingJob(
            requests,
            most_pictures=most_pictures,
            on_picture=on_picture,
            on_cancel=self._job_cancelled,
        )
        with self._changed:
            if self.broken is not None:
                raise UnavailableError("The engine is down.", _RETRY_AFTER_S)
            if self._closing:
                raise UnavailableError("The engine is closing.", _RETRY_AFTER_S)
            if not job.done:
                self._inbox.append(job)
                self._inbox_pictures += len(job.requests)
                self._changed.notify()
        return job

    def close(self, *, drain: bool) -> None:
        """Take no more work, finish (drain) or abandon what there is, and join the thread."""
        with self._changed:
            self._closing = True
            self._draining = drain
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()
        atexit.unregister(self._abandon)

    def status(self) -> EngineStatus:
        """Return a snapshot without waiting for the device; it says nothing of the process."""
        worker = self._worker
        return EngineStatus(
            queued_pictures=self._inbox_pictures + worker.batch_queue.waiting_count,
            running_rows=worker.batch_queue.running_rows,
            undecoded=len(worker.undecoded),
            calls_total=worker.calls_total,
            pictures_total=worker.pictures_total,
            out_of_memory_total=worker.unet_caller.out_of_memory_total,
            seconds_per_call=tuple(sorted(worker.seconds_per_call.copy().items())),
            seconds_per_decode=worker.seconds_per_decode,
        )

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(drain=kind is None)

    def _main(self) -> None:
        worker = self._worker
        try:
            self._warm_up.set_result(worker.warm_up(self._warm_up_budget_s))
            while self._take_work():
                worker.run_round()
        except BaseException as error:  # the thread's end: whoever waits for it must be told
            self._give_up(error)

    def _take_work(self) -> bool:
        """Wait for work and take in new jobs; return False when the thread should end."""
        worker = self._worker
        with self._changed:
            while not (self._inbox or worker.has_work or self._closing):
                self._changed.wait()
            jobs = list(self._inbox)
            self._inbox.clear()
            self._inbox_pictures = 0
            if self._closing and not self._draining:
                self._abandon_jobs(jobs)
                return False
        try:
            for job in jobs:
                worker.add(job)
        except BaseException:
            self._inbox.extendleft(reversed(jobs))  # where `_give_up` finds and fails them
            raise
        return worker.has_work or not self._closing

    def _abandon_jobs(self, jobs: Sequence[DrawingJob]) -> None:
        closed = UnavailableError("The engine was closed.", _RETRY_AFTER_S)
        for job in jobs:
            job.fail(closed)
        self._worker.fail_everything(closed)

    def _give_up(self, error: BaseException) -> None:
        """Fail everything that waits for the thread, which ends by `error`."""
        if not self._warm_up.done():
            self._warm_up.set_exception(error)  # `start` raises it
        else:
            logger.critical("The engine's thread is broken.", exc_info=error)
        down = UnavailableError("The engine is down.", _RETRY_AFTER_S)
        with self._changed:
            self.broken = f"{type(error).__name__}: {error}"
            jobs = list(self._inbox)
            self._inbox.clear()
            self._inbox_pictures = 0
        for job in jobs:
            job.fail(down)
        self._worker.fail_everything(down)

    def _job_cancelled(self) -> None:
        self._worker.job_cancelled = True
        with self._changed:
            self._changed.notify()

    def _abandon(self) -> None:
        self.close(drain=False)


def open_engine(
    folder: Path,
    settings: ServeSettings,
    *,
    warm_up_budget_s: float = _WARM_UP_BUDGET_S,
    limits: Limits = LIMITS,
) -> Engine:
    """Load a model folder as the settings say, and start an engine for it.

    Raises ModelArtifactError for a folder that is not a Stable Diffusion model, ResourceError if it
    does not fit into memory, UserError for settings that no engine can have here.
    """
    chosen = settings.device
    if chosen == "auto":
        chosen = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(chosen)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "The device cuda is asked for, and no GPU can be used here: see that the container is "
            "given one and that the driver fits this torch, or choose the device auto or cpu."
        )
    if device.type == "cuda":
        gpu_driver.refuse_gpu_without_kernels(torch)
    dtype = dtype_for(settings.precision, device)
    try:
        model = models.load(folder, device=device, dtype=dtype, limits=limits)
        for warning in model.facts.warnings:
            logger.warning(warning)
        served_unet.prepare(
            model, cuda_graphs=settings.cuda_graphs, channels_last=settings.channels_last
        )
        checker = None
        if settings.safety_checker:
            checker = safety.load(folder, device=device, dtype=dtype, limits=limits)
        engine = Engine(
            model,
            batch_rows=settings.batch_rows,
            warm_up_budget_s=warm_up_budget_s,
            safety_checker=checker,
            limits=limits,
        )
        engine.start()
        return engine
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    free_caches()
    raise ResourceError(
        f"The model {folder} does not fit into the free memory of {device}; the precision fp16 "
        "halves its need."
    )
