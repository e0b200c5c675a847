"""Time training steps within one process: every memory plan, the fast step, then single levers.

A process per setting, as in `python -m benchmarks train`, costs half a minute each on a fast GPU,
most of it for reading and writing the model. Here the model is loaded and encoded once, each trial
starts from the same weights, and the job's own functions build, train and log it.

The learning of a trial is compared with that of the first one, the plain loop in fp32: by the
cosine of the displacements of a sample of the weights.
"""

from __future__ import annotations

import copy
import io
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from benchmarks.gpu_stages.facts import FactFile
from benchmarks.gpu_stages.running import StageContext
from benchmarks.train_step import ours
from benchmarks.train_step.figures import StepTimes
from benchmarks.train_step.ours import RunScale
from dreambooth import tiny
from dreambooth.data import dataset_info
from dreambooth.diffusion import model as models
from dreambooth.diffusion.device_memory import free_caches
from dreambooth.errors import DreamBoothError
from dreambooth.job import encoding, fine_tune
from dreambooth.job.task import Task
from dreambooth.model_folder.facts import read_facts
from dreambooth.settings import container
from dreambooth.settings.hyperparameters import MEMORY_PLANS, Hyperparameters
from dreambooth.training import device as devices
from dreambooth.training import plan as plans
from dreambooth.training.device import DeviceFacts
from dreambooth.training.gpu_peaks import GpuPeaks
from dreambooth.training.loop import TrainingData
from dreambooth.training.run_log import RunLog

# Of the weights, every eleventh tensor is compared, unless it has more elements than this.
_COMPARED_ELEMENTS = 2**21
# The plans of a dry run are made for this GPU, so that the fast step is tried on a CPU as well.
_IMAGINED = DeviceFacts(
    kind="cuda",
    name="imagined",
    compute_capability=(9, 0),
    memory_bytes=140 * 2**30,
    free_bytes=140 * 2**30,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One setting: its hyperparameters, among them memory_plan, and levers, names of `LEVERS`."""

    hyperparameters: Mapping[str, Any]
    with_prior_preservation: bool = True
    levers: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Return the name of the trial in tables."""
        given = self.hyperparameters
        precision = given.get("mixed_precision")
        words = ["fast"] * bool(given.get("fast_step")) + [given["memory_plan"]]
        if precision is not None:
            words.append(f"in {'fp32' if precision == 'no' else precision}")
        words.append("prior" if self.with_prior_preservation else "plain")
        return " ".join(words) + "".join(f" + {lever}" for lever in self.levers)


@contextmanager
def _set(owner: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _without_cudnn_attention() -> Iterator[None]:
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


CHANNELS_LAST, TF32 = "channels last", "TF32 products"
LEVERS: Mapping[str, Callable[[], AbstractContextManager[None]]] = {
    CHANNELS_LAST: nullcontext,  # a matter of the U-Net's layout, which each trial sets
    "cuDNN's search": lambda: _set(torch.backends.cudnn, "benchmark", True),
    "no cuDNN attention": _without_cudnn_attention,
    TF32: lambda: _set(torch.backends.cuda.matmul, "allow_tf32", True),
}

REFERENCE = Trial(hyperparameters={"memory_plan": "fp32_adamw", "mixed_precision": "no"})


def steps_trials() -> Iterator[Trial]:
    """Yield the reference, then every memory plan and the fast step, the likeliest defaults first.

    The half precision is the device's own; the last ones are fp16, as a T4 trains.
    """
    yield REFERENCE
    able = [name for name, plan in MEMORY_PLANS.items() if plan.can_step_fast]
    for name in able:
        yield Trial(hyperparameters={"memory_plan": name})
        yield Trial(hyperparameters={"memory_plan": name, "fast_step": True})
    for fast in ({}, {"fast_step": True}):
        yield Trial(
            hyperparameters={"memory_plan": "fp32_adamw", **fast}, with_prior_preservation=False
        )
    for name in MEMORY_PLANS:
        if name not in able:
            yield Trial(hyperparameters={"memory_plan": name})
    for name, fast in (("8bit_adamw", {}), ("fp32_adamw", {"fast_step": True})):
        yield Trial(hyperparameters={"memory_plan": name, "mixed_precision": "fp16", **fast})


def levers_trials() -> Iterator[Trial]:
    """Yield the plain and the fast step without and with each lever, one by one."""
    yield REFERENCE
    plain = {"memory_plan": "fp32_adamw"}
    for given in (plain, {**plain, "fast_step": True}):
        yield Trial(hyperparameters=given)
        # A half-precision step has no fp32 products to speak of.
        for lever in filter(TF32.__ne__, LEVERS):
            yield Trial(hyperparameters=given, levers=(lever,))
    yield replace(REFERENCE, levers=(TF32,))


def steps(context: StageContext, facts: FactFile) -> None:
    """Measure every memory plan and the fast step."""
    trials = [*steps_trials()]
    if context.dry:  # CPUs compute fp16 ten times slower
        trials = [t for t in trials if t.hyperparameters.get("mixed_precision") != "fp16"]
    _measure_all(context, facts, trials)


def levers(context: StageContext, facts: FactFile) -> None:
    """Measure the levers one by one."""
    _measure_all(context, facts, [*levers_trials()])


def _measure_all(context: StageContext, facts: FactFile, trials: Sequence[Trial]) -> None:
    bench = StepBench(context)
    for trial in trials:
        try:
            figures = bench.measure(trial)
        except (RuntimeError, MemoryError, DreamBoothError) as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            facts.add("error", trial.name, error=text[:500])
        else:
            facts.add("step", trial.name, **asdict(figures))
        bench.free()


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialFigures:
    """The figures of a trial.

    hyperparameters, levers: as in `Trial`. first_step_s: with the capture of a graph, if any.
    allocated, reserved: torch's peaks in training in bytes, 0 on a CPU. expected_bytes: what the
    plan expected to be allocated. cosine, norm_ratio: of the displacement of the weights beside the
    reference's; None for trials on other data than the reference's. losses: the first and the last.
    """

    hyperparameters: Mapping[str, Any]
    levers: Sequence[str]
    with_prior_preservation: bool
    memory_plan: str
    mixed_precision: str
    fast_step: bool
    times: StepTimes
    first_step_s: float
    allocated: int
    reserved: int
    expected_bytes: int
    cosine: float | None
    norm_ratio: float | None
    losses: tuple[float, float]
    skipped_steps: int


@dataclass(slots=True)
class _Displacement:
    """The weights that are compared, as they were before training."""

    weights: list[nn.Parameter]
    before: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.before = [weight.detach().float().cpu().clone() for weight in self.weights]

    def now(self) -> Tensor:
        """Return by how much they have moved, flattened, in float64 on the CPU."""
        return torch.cat(
            [
                (weight.detach().double().cpu() - before.double()).flatten()
                for weight, before in zip(self.weights, self.before, strict=True)
            ]
        )


class StepBench:
    """A loaded model and encoded pictures, on which trials are run one after another."""

    def __init__(self, context: StageContext) -> None:
        """Load the model and encode eight pictures, as instance and as class images."""
        self._scale = RunScale(steps=30, warm_up=10, class_images=8)
        self._facts = devices.from_torch(torch)
        if context.dry:
            self._scale = RunScale(steps=2, warm_up=1, class_images=8)
            if self._facts.kind == "cpu":
                self._facts = _IMAGINED
        self._work = context.work
        self._accelerator = Accelerator(mixed_precision="no")
        self._device = self._accelerator.device
        self._model_folder = context.model
        self._model = models.load(context.model, device=self._device)
        task = self._task(REFERENCE)
        # Nothing is sampled here: no stored latents are looked for, by a hash of the whole model.
        task = replace(task, plan=replace(task.plan, class_images_to_sample=0))
        self._data, _ = encoding.encode(task, self._model, task.dataset.instance_images)
        for part in (self._model.unet, self._model.vae, self._model.text_encoder):
            part.to("cpu")
        self._reference: Tensor | None = None
        free_caches()

    def measure(self, trial: Trial) -> TrialFigures:
        """Train for some steps. Raises what the job raises, as when memory runs out."""
        task = self._task(trial)
        with ExitStack() as stack:
            for lever in trial.levers:
                stack.enter_context(LEVERS[lever]())
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=self._work)))
            unet = copy.deepcopy(self._model.unet).to(self._device)
            if CHANNELS_LAST in trial.levers:
                unet.to(memory_format=torch.channels_last)
            state = fine_tune.training_state(task, replace(self._model, unet=unet))
            moved = _Displacement(
                [
                    weight
                    for number, weight in enumerate(state.unet.parameters())
                    if number % 11 == 0 and weight.numel() <= _COMPARED_ELEMENTS
                ]
            )
            peaks = GpuPeaks()
            peaks.begin_training()
            losses = []
            log = RunLog(folder, task.plan, first_step=0, stream=io.StringIO())
            began = time.monotonic()
            first_step_s = 0.0
            with log:
                for metrics in fine_tune.training_loop(task)(
                    state,
                    self._training_data(trial),
                    task.plan,
                    task.hyperparameters,
                    noise_scheduler=models.training_noise_scheduler(self._model),
                    encode_text=lambda ids: ids,
                    accelerator=self._accelerator,
                ):
                    first_step_s = first_step_s or time.monotonic() - began
                    log.step(metrics)
                    losses.append(metrics.loss)
            times = ours.times(folder, warm_up=self._scale.warm_up)
            peak = peaks.training
        cosine, norm_ratio = self._agreement(trial, moved.now())
        return TrialFigures(
            hyperparameters=trial.hyperparameters,
            levers=trial.levers,
            with_prior_preservation=trial.with_prior_preservation,
            memory_plan=task.plan.memory_plan,
            mixed_precision=task.plan.mixed_precision,
            fast_step=task.plan.fast_step,
            times=times,
            first_step_s=first_step_s,
            allocated=peak.allocated,
            reserved=peak.reserved,
            expected_bytes=task.plan.memory_bytes,
            cosine=cosine,
            norm_ratio=norm_ratio,
            losses=(losses[0], losses[-1]),
            skipped_steps=state.skipped_steps,
        )

    def free(self) -> None:
        """Free what a trial has left on the device; call it when nothing of it is in use."""
        self._accelerator.free_memory()
        free_caches()

    def _task(self, trial: Trial) -> Task:
        """Return the job that a trial is taken from; its folders are in the work folder."""
        settings = Hyperparameters(
            max_steps=self._scale.all_steps,
            with_prior_preservation=trial.with_prior_preservation,
            num_class_images=self._scale.class_images,
            **trial.hyperparameters,
        )
        photos = tiny.DATA / "dog1_8"
        dataset = dataset_info.read(
            photos,
            with_prior_preservation=trial.with_prior_preservation,
            needs_class_images=False,
        )
        facts = read_facts(self._model_folder)
        return Task(
            environment=container.read([], {"SAGEMAKER_BASE_DIR": str(self._work)}),
            hyperparameters=settings,
            dataset=dataset,
            plan=plans.make(settings, dataset, facts, self._facts),
            model_folder=self._model_folder,
            base_name=self._model_folder.name,
            device=self._device,
        )

    def _training_data(self, trial: Trial) -> TrainingData:
        if trial.with_prior_preservation:
            return self._data
        return replace(self._data, class_=None, class_text=None, prior_text=None)

    def _agreement(self, trial: Trial, moved: Tensor) -> tuple[float | None, float | None]:
        """Return the cosine with the reference's displacement, and the ratio of the norms."""
        if trial == REFERENCE:
            self._reference = moved
        if self._reference is None or not trial.with_prior_preservation:
            return None, None
        norms = moved.norm(), self._reference.norm()
        return float(moved @ self._reference / (norms[0] * norms[1])), float(norms[0] / norms[1])
