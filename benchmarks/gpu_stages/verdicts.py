"""Hold the recorded facts against the goals, and decide about each lever.

A verdict is also given where figures are missing: it then says why they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu_stages.found import Found
from benchmarks.gpu_stages.goals import TEST_FILES, goals, of_expected, tests
from benchmarks.train_step.conditions import GIB, T4_MEMORY_GIB

# What makes a lever the default, for the compute capability that was measured.
FASTER = 1.10
MOST_OF_PLAN = 1.05
LEAST_COSINE = 0.99


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuVerdict:
    """What was found of one goal; met: None if it was not measured, and `found` says why."""

    name: str
    wanted: str
    found: str
    met: bool | None
    source: str

    @property
    def in_words(self) -> str:
        """Return the verdict as one line: "a step: goal 25 ms (its source): 27.3 ms, missed"."""
        end = "not measured" if self.met is None else "met" if self.met else "missed"
        return f"{self.name}: goal {self.wanted} ({self.source}): {self.found}, {end}"


def verdicts(found: Found) -> Iterator[GpuVerdict]:
    """Yield a verdict for each goal of the measured device."""
    for goal in goals(str(found.machine.get("device", ""))):
        judged = goal.judge(found)
        text, met = judged or (found.why_missing(goal.stage, goal.fact), None)
        yield GpuVerdict(
            name=goal.name, wanted=goal.wanted, found=text, met=met, source=goal.source
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One of the conditions for a default: what was found, and whether it holds, None: unknown."""

    found: str
    holds: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LeverVerdict:
    """The decision about one lever, for one compute capability.

    speed: at least 10 % faster. memory: at most 5 % over the plan. equality: training learns the
    same, served pictures are the same. tests: all of tests/gpu pass.
    """

    lever: str
    compute_capability: str
    speed: Condition
    memory: Condition
    equality: Condition
    tests: Condition

    @property
    def conditions(self) -> Mapping[str, Condition]:
        """Return all conditions by name."""
        names = ("speed", "memory", "equality", "tests")
        return {name: getattr(self, name) for name in names}

    @property
    def becomes_default(self) -> bool | None:
        """Return the decision; None while something is unknown that could still decide it."""
        return _together(condition.holds for condition in self.conditions.values())

    @property
    def decision(self) -> str:
        """Return the decision in words."""
        if self.becomes_default:
            return f"the default for compute capability {self.compute_capability}"
        wanted = self.becomes_default  # False: name what failed; None: name what is unknown
        names = [name for name, each in self.conditions.items() if each.holds is wanted]
        return f"{'undecided' if wanted is None else 'stays off'}: {', '.join(names)}"


def lever_verdicts(found: Found) -> Iterator[LeverVerdict]:
    """Yield the decision about the fast step, each lever of a step, and each way of serving."""
    for plan in ("fp32_adamw", "8bit_adamw"):
        yield _step_lever(
            found, "steps", f"fast_step, {plan}", f"{plan} prior", f"fast {plan} prior"
        )
    for fact in found.all("levers", "step"):
        if fact.figures["levers"]:
            base, _, lever = fact.name.partition(" + ")
            yield _step_lever(found, "levers", f"{lever}, {base}", base, fact.name)
    for option, way in (("--cuda_graphs", "graphs"), ("--channels_last", "channels_last")):
        yield _serving_lever(found, option, way)


def _step_lever(found: Found, stage: str, lever: str, base: str, name: str) -> LeverVerdict:
    before, after = (found.figures(stage, "step", each) for each in (base, name))
    missing = Condition(found=found.why_missing(stage, name if before else base), holds=None)
    speed = memory = equality = missing
    if before and after:
        speed = _speed(before["times"]["median_ms"], after["times"]["median_ms"])
    if after:
        share, cosine = of_expected(after), after["cosine"]
        memory = _NO_GPU
        if share is not None:
            memory = Condition(found=f"{share:.1%} of the plan", holds=share <= MOST_OF_PLAN)
        equality = Condition(found="the fp32 loop did not run", holds=None)
        if cosine is not None:
            equality = Condition(found=f"cosine {cosine:.4f}", holds=cosine >= LEAST_COSINE)
    return LeverVerdict(
        lever=lever,
        compute_capability=found.compute_capability,
        speed=speed,
        memory=memory,
        equality=equality,
        tests=_all_tests(found),
    )


def _serving_lever(found: Found, option: str, way: str) -> LeverVerdict:
    before, after = (found.figures("serving", "pictures", each) for each in ("eager", way))
    missing = Condition(found=found.why_missing("serving", way if before else "eager"), holds=None)
    speed = memory = equality = missing
    if before and after:
        speed = _speed(1000 * before["picture_s"], 1000 * after["picture_s"])
    if after:
        memory, equality = _served_memory(after["peak"]), _served_equality(after, way)
    return LeverVerdict(
        lever=option,
        compute_capability=found.compute_capability,
        speed=speed,
        memory=memory,
        equality=equality,
        tests=_all_tests(found),
    )


_NO_GPU = Condition(found="not measured on a CPU", holds=None)


def _speed(before_ms: float, after_ms: float) -> Condition:
    ratio = before_ms / after_ms
    words = f"{before_ms:.1f} to {after_ms:.1f} ms, {100 * (ratio - 1):+.0f} %"
    return Condition(found=words, holds=ratio >= FASTER)


def _served_memory(peak: Mapping[str, Any] | None) -> Condition:
    """Return whether a way of serving fits where it must: a T4's memory, as graphs are bounded."""
    if peak is None:
        return _NO_GPU
    share = peak["reserved"] / (T4_MEMORY_GIB * GIB)
    words = f"{peak['reserved'] / GIB:.2f} of {T4_MEMORY_GIB:g} GiB"
    return Condition(found=words, holds=share <= MOST_OF_PLAN)


def _served_equality(figures: Mapping[str, Any], way: str) -> Condition:
    """Return whether pictures stay the same in traffic, and graphs were not given up."""
    if way == "graphs" and not figures["graphs"]:
        return Condition(found="the graphs were given up", holds=False)
    differing = figures["exact"]["bytes_differing"]
    return Condition(found=f"{differing} bytes differ in exact mode", holds=differing == 0)


def _all_tests(found: Found) -> Condition:
    judged = {name: tests(found, stage) for stage, name in TEST_FILES.items()}
    words = [f"{name}: {each[0] if each else 'not run'}" for name, each in judged.items()]
    held = [None if each is None else each[1] for each in judged.values()]
    return Condition(found="; ".join(words), holds=_together(held))


def _together(held: Iterable[bool | None]) -> bool | None:
    """Return False if any does not hold, else None if any is unknown, else True."""
    found = [*held]
    return False if False in found else None if None in found else True
