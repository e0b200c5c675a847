"""Look up in recorded facts what was found, and why something was not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.gpu_stages.facts import Fact
from benchmarks.gpu_stages.running import CRASHED, CUT_OFF, DONE, KILLED
from benchmarks.gpu_stages.stages import NAMES

NOT_ASKED = "not asked for"


class Found:
    """The facts of one folder; a stage that was run again has replaced what it had found before."""

    def __init__(self, facts: Sequence[Fact]) -> None:
        self.facts = tuple(facts)
        self._latest: dict[tuple[str, str, str], Fact] = {}
        for fact in facts:
            if fact.kind == "begins":
                earlier = [key for key in self._latest if _is_of(fact.name, key)]
                for key in earlier:
                    del self._latest[key]
            self._latest[fact.stage, fact.kind, fact.name] = fact

    def figures(self, stage: str, kind: str, name: str) -> Mapping[str, Any] | None:
        """Return the figures of one fact, None if it was not found."""
        fact = self._latest.get((stage, kind, name))
        return None if fact is None else fact.figures

    def all(self, stage: str, kind: str) -> Iterator[Fact]:
        """Yield the facts of one kind that a stage has found, in the order they came first."""
        return (
            fact for (its, kinds, _), fact in self._latest.items() if (its, kinds) == (stage, kind)
        )

    @property
    def machine(self) -> Mapping[str, Any]:
        """Return the facts of the machine, as far as they are known."""
        call = self.figures("run", "call", "gpu") or {}
        return next((fact.figures for fact in self.all("ceilings", "machine")), call)

    @property
    def dry(self) -> bool:
        """Return whether the last run was in miniature."""
        return bool((self.figures("run", "call", "gpu") or {}).get("dry"))

    @property
    def compute_capability(self) -> str:
        """Return the compute capability as in "9.0", "none" for a CPU."""
        known = self.machine.get("compute_capability")
        return "none" if known is None else ".".join(map(str, known))

    def end(self, stage: str) -> tuple[str, float, str | None]:
        """Return how a stage ended, after how many seconds, and why."""
        begins = self._latest.get(("run", "begins", stage))
        end = self._latest.get(("run", "stage", stage))
        if begins is None and end is None:
            return NOT_ASKED, 0.0, None
        if end is None:
            return CUT_OFF, 0.0, "the run ended while it was running"
        return end.figures["ended"], end.figures["seconds"], end.figures["why"]

    def why_missing(self, stage: str, name: str | None = None) -> str:
        """Return why a fact of a stage, which may have a name, was not found."""
        error = self.figures(stage, "error", name or stage) or self.figures(stage, "error", stage)
        if error is not None:
            return str(error["error"])
        ended, _, why = self.end(stage)
        if ended == DONE:
            note = next((fact.name for fact in self.all(stage, "note")), "it was not found")
            return f"stage {stage}: {note}"
        return f"stage {stage} {ended}" + (f": {why}" if why else "")

    def incomplete(self) -> Iterator[str]:
        """Yield a line about each stage that did not come to its end, and each error."""
        for stage in NAMES:
            ended, _, why = self.end(stage)
            if ended not in (DONE, NOT_ASKED):
                yield f"{stage}: {ended}" + (f": {why}" if why else "")
            for fact in self.all(stage, "error"):
                yield f"{stage}, {fact.name}: {fact.figures['error']}"

    @property
    def failed(self) -> bool:
        """Return whether a stage crashed or hung, found an error or saw a test fail."""
        return any(
            self.end(stage)[0] in (CRASHED, KILLED)
            or any(self.all(stage, "error"))
            or any(fact.figures["outcome"] == "failed" for fact in self.all(stage, "test"))
            for stage in NAMES
        )


def _is_of(stage: str, key: tuple[str, str, str]) -> bool:
    """Return whether a fact was found by a stage, or is about its end."""
    return key[0] == stage or key == ("run", "stage", stage)
