"""Compares how two runs moved the weights: the displacement is the weights after minus before."""

from __future__ import annotations

from collections.abc import Mapping

import torch

Weights = Mapping[str, torch.Tensor]


def displacement(before: Weights, after: Weights) -> torch.Tensor:
    """Return after minus before of all weights, flattened, in float64; names must match."""
    assert set(before) == set(after)
    return torch.cat([(after[n].double() - before[n].double()).flatten() for n in sorted(before)])


def agreement(before: Weights, own: Weights, theirs: Weights) -> tuple[float, float]:
    """Return (cosine, ratio of norms) of our displacement against theirs."""
    a, b = displacement(before, own).detach(), displacement(before, theirs).detach()
    return float(a @ b / (a.norm() * b.norm())), float(a.norm() / b.norm())
