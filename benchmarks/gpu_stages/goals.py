"""The goals that only a GPU can show, each with its source, and how a fact is held against it.

Those of step times and reserved memory stand in train_step/goals.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.gpu_stages.found import Found
from benchmarks.train_step.conditions import GIB, T4_MEMORY_GIB
from benchmarks.train_step.goals import GOAL, RESERVED_GIB, STEP_GOALS, StepGoal
from dreambooth.settings.hyperparameters import MEMORY_PLANS

_PLAN = "the memory plan's own expectation"


Judged = tuple[str, bool | None] | None
"""The figure in words and whether the goal is met (None: unknown); None: it was not found."""
NO_GPU: Judged = ("a CPU's memory is not measured", None)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuGoal:
    """One goal.

    stage, fact: where its figure is found. wanted: in words. judge: returns what was found.
    """

    name: str
    wanted: str
    source: str
    stage: str
    fact: str
    judge: Callable[[Found], Judged]


_FAST_CARDS = ("H100", "H200")


def goals(device: str) -> Iterator[GpuGoal]:
    """Yield the goals that hold for a device of this name, in the order of the stages."""
    for goal in STEP_GOALS:
        if goal.card in device:
            yield _step_goal(goal)
    for plan in MEMORY_PLANS:
        yield _expected_memory(plan)
    for plan, switches in MEMORY_PLANS.items():
        if switches.can_step_fast:
            yield _expected_memory(f"fast {plan}")
    for plan, gib in RESERVED_GIB.items():
        yield _reserved(plan, gib)
    for precision in ("bf16", "fp16"):
        yield GpuGoal(
            name=f"replays of the training step's graph, {precision}",
            wanted="bit-equal to eager calls",
            source=GOAL,
            stage="graphs",
            fact=precision,
            judge=partial(_graphs, precision=precision),
        )
    yield from (_tests(stage, name) for stage, name in TEST_FILES.items())
    if any(card in device for card in _FAST_CARDS):
        yield from _job_goals()
    for way in ("eager", "graphs", "channels_last", "channels_last+graphs"):
        yield GpuGoal(
            name=f"pictures drawn again in exact mode, {way}",
            wanted="0 bytes differ",
            source=GOAL,
            stage="serving",
            fact=way,
            judge=partial(_exact, way=way),
        )
    yield GpuGoal(
        name="a whole job as on a T4",
        wanted=f"{T4_MEMORY_GIB:g} GiB reserved",
        source=GOAL,
        stage="t4",
        fact="whole",
        judge=_t4,
    )


TEST_FILES = {"learning": "test_training.py", "memory": "test_memory.py"}


def tests(found: Found, stage: str) -> Judged:
    """Return how many tests of a stage passed; unknown if some were skipped or cut off."""
    ends = [fact.figures["outcome"] for fact in found.all(stage, "test")]
    if not ends:
        return None
    counts = {name: ends.count(name) for name in ("passed", "failed", "skipped")}
    words = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    is_over = found.figures(stage, "tests", TEST_FILES[stage]) is not None
    if not is_over:
        words += f", the others not run ({found.why_missing(stage)})"
    if counts["failed"]:
        return words, False
    return words, True if is_over and not counts["skipped"] else None


def _tests(stage: str, name: str) -> GpuGoal:
    return GpuGoal(
        name=f"tests/gpu/{name}",
        wanted="all pass",
        source="tests/gpu/README.md",
        stage=stage,
        fact=name,
        judge=partial(tests, stage=stage),
    )


def _step_goal(goal: StepGoal) -> GpuGoal:
    def judge(found: Found) -> Judged:
        figures = found.figures("steps", "step", goal.setting)
        if figures is None:
            return None
        ms = figures["times"]["median_ms"]
        return f"{ms:.1f} ms", ms <= goal.ms

    return GpuGoal(
        name=f"a step, {goal.setting}",
        wanted=f"{goal.ms:g} ms",
        source=goal.source,
        stage="steps",
        fact=goal.setting,
        judge=judge,
    )


def of_expected(figures: Mapping[str, Any]) -> float | None:
    """Return a trial's allocated peak / what its plan expected; None on a CPU."""
    expected, allocated = figures["expected_bytes"], figures["allocated"]
    return allocated / expected if expected and allocated else None


def _expected_memory(plan: str) -> GpuGoal:
    setting = f"{plan} prior"

    def judge(found: Found) -> Judged:
        figures = found.figures("steps", "step", setting)
        if figures is None:
            return None
        share = of_expected(figures)
        return NO_GPU if share is None else (f"{share:.1%} of it", abs(share - 1) <= 0.1)

    return GpuGoal(
        name=f"memory of {plan}",
        wanted="within 10 % of the expected",
        source=_PLAN,
        stage="steps",
        fact=setting,
        judge=judge,
    )


def _reserved(plan: str, gib: float) -> GpuGoal:
    setting = f"{plan} prior"

    def judge(found: Found) -> Judged:
        figures = found.figures("steps", "step", setting)
        return None if figures is None else _at_most(figures["reserved"], gib)

    return GpuGoal(
        name=f"reserved by {plan}",
        wanted=f"{gib:g} GiB",
        source=GOAL,
        stage="steps",
        fact=setting,
        judge=judge,
    )


def _at_most(reserved: int | None, gib: float) -> Judged:
    return (f"{reserved / GIB:.2f} GiB", reserved <= gib * GIB) if reserved else NO_GPU


def _graphs(found: Found, precision: str) -> Judged:
    figures = found.figures("graphs", "graphs", precision)
    if figures is None:
        return None
    equal = figures["captured"] and figures["eager_repeats"] and figures["graph_equals_eager"]
    return str(figures["in_words"]), bool(equal)


def _exact(found: Found, way: str) -> Judged:
    figures = found.figures("serving", "pictures", way)
    if figures is None:
        return None
    exact = figures["exact"]
    words = f"{exact['bytes_differing']} in {exact['pictures']} pictures"
    given_up = "graphs" in way and not figures["graphs"]
    words += ", the graphs were given up" * given_up
    return words, not exact["bytes_differing"] and not given_up


def _t4(found: Found) -> Judged:
    job = found.figures("t4", "job", "whole")
    if job is not None:
        return _at_most(job["memory"]["reserved"], T4_MEMORY_GIB)
    error = found.figures("t4", "error", "whole")  # above all: memory ran out
    return None if error is None else (error["error"], False)


def _job_goals() -> Iterator[GpuGoal]:
    """Yield the goals for whole jobs on an H100 or H200."""

    def first_step(found: Found) -> Judged:
        job = found.figures("job", "job", "whole")
        if job is None:
            return None
        return f"{job['first_step_s']:.1f} s", job["first_step_s"] <= 20

    def whole(found: Found) -> Judged:
        job = found.figures("job", "job", "whole")
        if job is None:
            return None
        scale = job["scale"]
        missing_steps = 400 - scale["warm_up"] - scale["steps"]
        missing_images = 100 - scale["class_images"]
        seconds = job["run_s"] + missing_steps * job["times"]["median_ms"] / 1000
        seconds += missing_images * (job["class_image_s"] or 0.0)
        return f"{seconds:.0f} s, extrapolated", seconds <= 60

    def ratio(found: Found) -> Judged:
        ours, theirs = (found.figures("peer", "job", name) for name in ("ours", "theirs"))
        if ours is None or theirs is None:
            return None
        times = theirs["times"]["median_ms"] / ours["times"]["median_ms"]
        return f"{times:.2f} times", times >= 4

    yield GpuGoal(
        name="first step of a job",
        wanted="20 s",
        source=GOAL,
        stage="job",
        fact="whole",
        judge=first_step,
    )
    yield GpuGoal(
        name="400 steps with 100 class images",
        wanted="60 s",
        source=GOAL,
        stage="job",
        fact="whole",
        judge=whole,
    )
    yield GpuGoal(
        name="a step beside diffusers' script",
        wanted="4 times as fast",
        source=GOAL,
        stage="peer",
        fact="theirs",
        judge=ratio,
    )
