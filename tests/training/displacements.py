"""What a run did to the weights, after minus before, and how alike two runs' doings are."""

from __future__ import annotations

from collections.abc import Mapping

import torch

Weights = Mapping[str, torch.Tensor]


def displacement(before: Weights, after: Weights) -> torch.Tensor:
    """After minus before of all weights in one line, float64; both must name the same ones."""
    assert set(before) == set(after)
    return torch.cat([(after[n].double() - before[n].double()).flatten() for n in sorted(before)])


def agreement(before: Weights, own: Weights, theirs: Weights) -> tuple[float, float]:
    """(cosine, ratio of norms) of our displacement against theirs."""
    a, b = displacement(before, own).detach(), displacement(before, theirs).detach()
    return float(a @ b / (a.norm() * b.norm())), float(a.norm() / b.norm())
