"""Learning-rate curves: the factor on the learning rate at each step.

Standard library only, so that the training plan can print the curve without loading torch. The
curves equal those of diffusers' `get_scheduler` (a test checks this), except that warm-up is 0
unless asked for.
"""

from __future__ import annotations

import math

POLYNOMIAL_END = 1e-7  # the final learning rate of diffusers' polynomial curve, in absolute terms


def default_warmup_steps(lr_scheduler: str, steps: int) -> int:
    """Return a tenth of the steps for constant_with_warmup, whose purpose it is, else 0."""
    if lr_scheduler != "constant_with_warmup":
        return 0
    return min(math.ceil(steps / 10), steps - 1)  # a run of one step learns at the full rate


def depends_on_length(lr_scheduler: str, *, warmup_is_given: bool) -> bool:
    """Return whether the rate of a step depends on how many steps the run has in all."""
    if lr_scheduler == "constant_with_warmup":
        return not warmup_is_given
    return lr_scheduler != "constant"


def factor(
    lr_scheduler: str, step: int, *, steps: int, warmup_steps: int, learning_rate: float
) -> float:
    """Return the factor, 0..1, for the update of step number `step`, counted from 0.

    `constant` has no warm-up; every other curve rises linearly from 0 over warmup_steps.
    cosine_with_restarts has one cycle and polynomial has power 1, because the published table
    exposes neither.
    """
    if lr_scheduler == "constant":
        return 1.0
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    if lr_scheduler == "constant_with_warmup":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    if lr_scheduler == "linear":
        return 1.0 - progress
    if lr_scheduler in ("cosine", "cosine_with_restarts"):
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    # A learning rate that is already below the customary end falls to zero.
    end = POLYNOMIAL_END / learning_rate if learning_rate > POLYNOMIAL_END else 0.0
    return (1.0 - end) * (1.0 - progress) + end


def sketch(lr_scheduler: str, *, steps: int, warmup_steps: int, learning_rate: float) -> str:
    """Return the curve in one line: its name and the learning rate at up to six steps."""
    points = sorted({0, warmup_steps, steps // 4, steps // 2, 3 * steps // 4, steps - 1})
    shown = []
    for point in points:
        if 0 <= point < steps:
            rate = learning_rate * factor(
                lr_scheduler,
                point,
                steps=steps,
                warmup_steps=warmup_steps,
                learning_rate=learning_rate,
            )
            shown.append(f"{point + 1}: {rate:.3g}")
    return f"{lr_scheduler} (step: rate) {', '.join(shown)}"
