"""The goals for a training step on each card, with their sources; nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

GOAL: Final = "the project's goal"
COUNTED: Final = "derived from counts at full size"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepGoal:
    """The milliseconds of a step on a card, for devices whose name contains the card's.

    setting: fast for the fast step, the memory plan, prior or plain: with or without prior
    preservation. The precision is the card's own.
    """

    card: str
    setting: str
    ms: float
    source: str


STEP_GOALS: Final = (
    StepGoal(card="H100", setting="fast fp32_adamw plain", ms=25, source=GOAL),
    StepGoal(card="H100", setting="fast fp32_adamw prior", ms=30, source=GOAL),
    StepGoal(card="H200", setting="fast fp32_adamw plain", ms=25, source=f"{GOAL} for an H100"),
    StepGoal(card="H200", setting="fast fp32_adamw prior", ms=30, source=f"{GOAL} for an H100"),
    StepGoal(card="H200", setting="fp32_adamw prior", ms=65, source=COUNTED),
    StepGoal(card="A10G", setting="fp32_adamw prior", ms=200, source=GOAL),
    StepGoal(card="A10G", setting="fast fp32_adamw prior", ms=180, source=COUNTED),
    StepGoal(card="T4", setting="8bit_adamw prior", ms=300, source=GOAL),
    StepGoal(card="T4", setting="fast 8bit_adamw prior", ms=280, source=COUNTED),
)

RESERVED_GIB: Final = {"8bit_adamw": 10.0, "8bit_adamw_in_backward": 6.0}
"""What torch may reserve in training with prior preservation at 512 x 512."""


def step_ms(card: str, setting: str) -> float:
    """Return the goal of a card for a setting."""
    (ms,) = (goal.ms for goal in STEP_GOALS if (goal.card, goal.setting) == (card, setting))
    return ms
