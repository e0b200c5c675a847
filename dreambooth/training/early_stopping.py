"""Decide from the meter's readings when to stop, and which state is the best.

A reading is good unless pictures burn or the class is being lost. Training ends after IN_A_ROW
readings that are not, and the model is that of the last good one before. The limits were chosen on
the embedded model (docs/measurements.md, "The meter"); they are proven for no other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dreambooth.training.meter import CLASS, OTHER_CLASS, MeterReading

GUIDANCE_LIMIT = 1.4
"""Of what guidance multiplies, in units of the base's: above it pictures burn."""
CLASS_RISE = 0.25
"""Of a class's drift above its lowest so far: the class had been held, and is let go."""
IN_A_ROW = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The end of a run: the step at which it stops, that of the state that is kept, and why.

    kept: None where no reading was good.
    """

    step: int
    kept: int | None
    reason: str

    def sentence(self, steps: int) -> str:
        """Return the decision in words; steps: how many were asked for."""
        kept = (
            f"the model is that of step {self.kept}"
            if self.kept is not None
            else "no earlier reading was better"
        )
        return f"stopped at step {self.step} of {steps}: {self.reason}; {kept}"


def fault(reading: MeterReading, earlier: Sequence[MeterReading]) -> str | None:
    """Return what is wrong at a reading, in words; None if it is good."""
    lowest: dict[str, float] = {}
    for one in earlier:
        _lower(lowest, one)
    return _fault(reading, lowest)


def decision(readings: Sequence[MeterReading]) -> Decision | None:
    """Return where a run with these readings ends early; None if it does not."""
    kept, bad = None, 0
    lowest: dict[str, float] = {}
    for reading in readings:
        reason = _fault(reading, lowest)
        _lower(lowest, reading)
        if reason is None:
            kept, bad = reading.step, 0
            continue
        bad += 1
        if bad == IN_A_ROW:
            return Decision(step=reading.step, kept=kept, reason=reason)
    return None


def _fault(reading: MeterReading, lowest: Mapping[str, float]) -> str | None:
    """Return what is wrong at a reading; lowest: the drift of each prompt so far."""
    if reading.guidance > GUIDANCE_LIMIT:
        return (
            f"what guidance multiplies is {reading.guidance:.2f} times the base's, and above "
            f"{GUIDANCE_LIMIT:g} pictures burn"
        )
    for name in (CLASS, OTHER_CLASS):
        if name not in reading.drifts:
            continue
        before = lowest.get(name, 1.0)
        if reading.drifts[name] > before + CLASS_RISE:
            return (
                f"the {name.replace('_', ' ')} is being lost: it moves {reading.drifts[name]:.2f} "
                f"of what the subject does, after {before:.2f}"
            )
    return None


def _lower(lowest: dict[str, float], reading: MeterReading) -> None:
    for name, drift in reading.drifts.items():
        lowest[name] = min(lowest.get(name, drift), drift)
