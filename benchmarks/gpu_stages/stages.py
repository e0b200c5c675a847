"""The stages in their order, the most valuable fact first, and how much of the budget each gets."""

from __future__ import annotations

from dataclasses import dataclass

# Kept for the table after the last stage.
RESERVE_S = 10.0
# Starting Python, torch and diffusers takes about ten seconds; with less left nothing is found.
LEAST_S = 25.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage, run in a process of its own.

    sentence: what it finds out. expected_s: its seconds on an H200 (estimated, not measured).
    limit_s: the seconds after which it is killed. needs_model: it uses what the stage "model"
    writes.
    """

    name: str
    sentence: str
    expected_s: int
    limit_s: int
    needs_model: bool = True


STAGES = (
    Stage(
        name="ceilings",
        sentence="matrix products, convolutions, memory bandwidth, launch latency",
        expected_s=20,
        limit_s=60,
        needs_model=False,
    ),
    Stage(
        name="model",
        sentence="writes the full-size model with random weights that the other stages use",
        expected_s=25,
        limit_s=90,
    ),
    Stage(
        name="steps",
        sentence="step time, memory and learning of every memory plan and of the fast step",
        expected_s=100,
        limit_s=180,
    ),
    Stage(
        name="graphs",
        sentence="replays of the training step's CUDA graph beside eager calls, bit for bit",
        expected_s=25,
        limit_s=60,
    ),
    Stage(
        name="learning",
        sentence="tests/gpu/test_training.py: every plan learns what the plain loop learns",
        expected_s=80,
        limit_s=130,
        needs_model=False,
    ),
    Stage(
        name="job",
        sentence="a whole job with class images, checkpoints, sample pictures and fid_score",
        expected_s=60,
        limit_s=150,
    ),
    Stage(
        name="serving",
        sentence="pictures with and without CUDA graphs and channels last, beside diffusers",
        expected_s=60,
        limit_s=110,
    ),
    Stage(
        name="t4",
        sentence="a whole job as a T4 runs it: fp16, 13 GiB, no flash attention",
        expected_s=45,
        limit_s=120,
    ),
    Stage(
        name="peer",
        sentence="diffusers' train_dreambooth.py beside ours, where --peer gives the file",
        expected_s=45,
        limit_s=90,
    ),
    Stage(
        name="levers",
        sentence="channels last, cuDNN's search, attention kernels and TF32, one by one",
        expected_s=60,
        limit_s=120,
    ),
    Stage(
        name="memory",
        sentence="tests/gpu/test_memory.py: whole jobs in every memory plan, within its goal",
        expected_s=240,
        limit_s=420,
        needs_model=False,
    ),
)
NAMES = tuple(stage.name for stage in STAGES)


def seconds_for(stage: Stage, left_s: float) -> float | None:
    """Return the seconds that a stage may take of those that are left; None if it must not start.

    A stage that may find only some of its facts is started: they are written one by one.
    """
    usable = left_s - RESERVE_S
    if usable < min(stage.expected_s, LEAST_S):
        return None
    return min(float(stage.limit_s), usable)
