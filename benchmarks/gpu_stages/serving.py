"""The stage that draws pictures, by the code of `python -m benchmarks serving --full_size`."""

from __future__ import annotations

from dataclasses import asdict

import torch

from benchmarks.gpu_stages.facts import FactFile
from benchmarks.gpu_stages.running import StageContext
from benchmarks.serving_load import full_size_pictures
from benchmarks.serving_load.full_size_pictures import Effort, WayFigures

_EFFORT = Effort(
    calls=10, steps=20, alone=3, burst=16, redrawn=8, batch_rows=8, warm_up_budget_s=5.0
)
_MINIATURE = Effort(
    calls=1, steps=2, alone=1, burst=2, redrawn=1, batch_rows=2, warm_up_budget_s=0.0
)


def serving(context: StageContext, facts: FactFile) -> None:
    """Measure each way of making U-Net calls; each becomes a fact when it is done."""

    def found(figures: WayFigures | float) -> None:
        if isinstance(figures, WayFigures):
            facts.add("pictures", figures.way, **asdict(figures))
        else:
            facts.add("pictures", "diffusers", picture_s=figures)

    full_size_pictures.measure(
        context.model,
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        _MINIATURE if context.dry else _EFFORT,
        say=lambda what: print(what, flush=True),
        found=found,
    )
