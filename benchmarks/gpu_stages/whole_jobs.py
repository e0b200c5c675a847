"""The stages that run whole training jobs, by the same code as `python -m benchmarks train`."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.gpu_stages.facts import FactFile
from benchmarks.gpu_stages.running import StageContext
from benchmarks.train_step import full_size, ours
from benchmarks.train_step import peer as peers
from benchmarks.train_step.conditions import T4_MEMORY_GIB, Conditions
from benchmarks.train_step.ours import RunOutcome, RunScale, Setting, Subject
from dreambooth import tiny
from dreambooth.training import device as devices

_MINIATURE = RunScale(steps=2, warm_up=1, class_images=1)


def model(context: StageContext, facts: FactFile) -> None:
    """Write the full-size model, unless a model folder was given."""
    if context.model.exists():
        facts.add("note", "a model was given", folder=str(context.model))
        return
    partial = context.model.with_name("partial")
    # Random numbers for 1.3 billion weights take a GPU no time and a CPU half a minute.
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        full_size.write_model(partial)
    partial.rename(context.model)


def job(context: StageContext, facts: FactFile) -> None:
    """Run a whole job with prior preservation in the memory plan that it chooses itself."""
    scale = _MINIATURE if context.dry else RunScale(steps=45, warm_up=5, class_images=16)
    _whole_job(context, facts, Conditions(), scale)


def t4(context: StageContext, facts: FactFile) -> None:
    """Run a whole job as a T4 runs it; without a GPU no memory is capped."""
    scale = _MINIATURE if context.dry else RunScale(steps=15, warm_up=5, class_images=8)
    memory_gib = T4_MEMORY_GIB if torch.cuda.is_available() else None
    _whole_job(context, facts, Conditions(memory_gib=memory_gib, as_t4=True), scale)


def peer(context: StageContext, facts: FactFile) -> None:
    """Run the peer's script and ours on the same work, in the plan that is its default."""
    if context.peer is None:
        facts.add("note", "no --peer FILE was given")
        return
    scale = _MINIATURE if context.dry else RunScale(steps=25, warm_up=5, class_images=2)
    subject = _subject(context)
    with tempfile.TemporaryDirectory(dir=context.work) as place:
        setting = Setting(with_prior_preservation=True, memory_plan="fp32_adamw")
        outcome = ours.run(setting, subject, scale, Path(place) / "ours")
        _add(facts, "ours", outcome, scale)
        if outcome.figures is None:
            return
        theirs = peers.run(context.peer, outcome, subject, scale, Path(place) / "peer")
    if theirs.figures is None:
        facts.add("error", "theirs", error=theirs.fault)
    else:
        facts.add("job", "theirs", **asdict(theirs.figures))


def _whole_job(
    context: StageContext, facts: FactFile, conditions: Conditions, scale: RunScale
) -> None:
    setting = Setting(with_prior_preservation=True, memory_plan="auto", whole_job=True)
    with tempfile.TemporaryDirectory(dir=context.work) as place:
        outcome = ours.run(setting, _subject(context, conditions), scale, Path(place))
    _add(facts, "whole", outcome, scale)


def _subject(context: StageContext, conditions: Conditions | None = None) -> Subject:
    return Subject(
        model=context.model,
        photos=tiny.DATA / "dog1_8",
        device=devices.from_torch(torch),
        conditions=conditions or Conditions(),
    )


def _add(facts: FactFile, name: str, outcome: RunOutcome, scale: RunScale) -> None:
    figures = outcome.figures
    if figures is None:
        facts.add("error", name, error=outcome.fault)
    else:
        of_expected = figures.of_expected
        facts.add("job", name, **asdict(figures), of_expected=of_expected, scale=asdict(scale))
