"""List what each measure that speeds up training should gain, and what it gained if measured.

Predictions are counted operations and bytes on an H100 at 800 TFLOP/s and 3 TB/s, for 1 picture a
step, or 2 with prior preservation. As of 2026-11-30 none has been measured on a GPU. CPU figures
are rough: the embedded model on one thread of a machine that did other work too.
"""

from __future__ import annotations

import itertools
import json
import textwrap
from dataclasses import asdict, dataclass

from benchmarks.train_step.goals import step_ms

NOT_MEASURED = "not measured: needs a GPU"

# The break-even of torch.compile: the seconds of a cold compile of the U-Net, the share of a step
# that it saves (PyTorch's figures for inference on a T4 and an A10), and the goal per step on an
# H100.
COMPILE_S = (60, 180)
COMPILE_GAIN = (0.02, 0.14)
STEP_MS = step_ms("H100", "fast fp32_adamw plain")


def compile_break_even() -> tuple[int, int]:
    """Return (fewest, most) steps after which the shortest cold compile has paid off."""
    few, many = (1000 * COMPILE_S[0] / (gain * STEP_MS) for gain in reversed(COMPILE_GAIN))
    return int(round(few, -3)), int(round(many, -3))


@dataclass(frozen=True, slots=True, kw_only=True)
class Lever:
    """One measure that speeds up training.

    where: plain (always on), fast (with fast_step), a setting, or not built.
    """

    lever: str
    predicted: str
    measured: str
    where: str


def _compile() -> Lever:
    few, many = compile_break_even()
    (least, most), (shortest, longest) = COMPILE_GAIN, COMPILE_S
    gains = f"{100 * least:g}-{100 * most:g} % of a {STEP_MS:g} ms step are"
    gains += f" {least * STEP_MS:g}-{most * STEP_MS:g} ms"
    return Lever(
        lever="torch.compile",
        predicted=f"cold {shortest}-{longest} s; {gains}, "
        f"so {shortest} s are back after {few:,} to {many:,} steps: never within 400",
        measured="CPU 2026-11-23: compiled in 113 s, 105 ms a step against 85 ms eager: failed; "
        "on a GPU not measured",
        where="not built",
    )


LEVERS = (
    Lever(
        lever="latent posteriors cached",
        predicted="1.12 of 3.57 TFLOP per picture are gone (31 %)",
        measured="CPU 2026-11-23, with the next: a step takes 73 ms instead of 84 (process time, "
        "medians of 12 alternated runs of 5; encoding a picture 8.7 ms)",
        where="plain",
    ),
    Lever(
        lever="text embeddings cached",
        predicted="1.3 % of the FLOPs and about 300 launches are gone",
        measured="CPU 2026-11-23: in the figure above (encoding a prompt 2.5 ms)",
        where="plain",
    ),
    Lever(
        lever="freed memory kept by glibc",
        predicted="no figure; a CPU's alone",
        measured="CPU 2026-11-23 or before: some 5 % of a step",
        where="plain",
    ),
    Lever(
        lever="half weights, no autocast",
        predicted="a step's 3,347 launches become 2,614 and its 61.2 GB 49.1 (4.0 ms less), with "
        "prior 72.6 GB become 56.9 (5.2)",
        measured=NOT_MEASURED,
        where="fast",
    ),
    Lever(
        lever="passes as one CUDA graph",
        predicted="some 1,840 launches become 1: 60-120 ms of launching are gone, and the GPU's "
        "own 12-25 ms remain",
        measured=NOT_MEASURED,
        where="fast",
    ),
    Lever(
        lever="unscale and clip in the cast, fused AdamW on fp32 masters",
        predicted="42 bytes per parameter (norm 2, cast 6, AdamW 28, copy back 6): 12.1 ms, where "
        "autocast's take 52 (norm 4, clip 8, AdamW 28, casts 12): 15.0 ms",
        measured="CPU 2026-11-23, fused AdamW alone: 6.9 ms where foreach takes 39 (4.8 million "
        "parameters, process time); on a GPU not measured",
        where="fast",
    ),
    Lever(
        lever="losses read every 10 steps",
        predicted="the host prepares the next steps meanwhile; no figure",
        measured=NOT_MEASURED,
        where="fast",
    ),
    Lever(
        lever="convolutions channels_last",
        predicted="no transposes around tensor-core kernels; no figure",
        measured="CPU 2026-11-23: 63.4 ms against 65.8 (batch 1), 115.7 against 119.1 (batch 2) "
        "in one probe, 93 against 85 in another: no gain; on a GPU not measured",
        where="not built",
    ),
    Lever(
        lever="floor of all these",
        predicted="15.1 ms, with prior 18.1 (goals 25 and 30)",
        measured=NOT_MEASURED,
        where="fast",
    ),
    Lever(
        lever="8-bit AdamW besides",
        predicted="30 bytes per parameter: 8.7 ms, but launched one by one",
        measured=NOT_MEASURED,
        where="fast",
    ),
    Lever(
        lever="class images in 25 steps of DPM-Solver++",
        predicted="100 of them 4.2 PFLOP instead of 8.3 with 50 steps",
        measured="CPU 2026-11-23 or before: 0.6 of the time of PNDM's 50 steps",
        where="plain",
    ),
    Lever(
        lever="prior prediction instead of class images",
        predicted="0.32 PFLOP in 400 steps instead of 8.3: 26 times less",
        measured=NOT_MEASURED,
        where="prior_preservation_mode=prediction",
    ),
    Lever(
        lever="AdamW on half gradients by a kernel of our own",
        predicted="30 bytes per parameter instead of 42: 3.5 ms less",
        measured=NOT_MEASURED,
        where="not built",
    ),
    Lever(
        lever="norm and AdamW in the graph",
        predicted="about 1500 launches a step fewer: some 8 ms of the host, hidden while the GPU "
        "is the slower of the two",
        measured=NOT_MEASURED,
        where="not built",
    ),
    _compile(),
)

_WIDTHS = {"lever": 30, "predicted": 48, "measured": 48, "where": 14}


def show() -> None:
    """Print the table and, as the last line, the JSON document."""
    print("PREDICTED for an H100 from counts; measured by nobody on a GPU\n")
    print("  ".join(f"{name:<{width}}" for name, width in _WIDTHS.items()).rstrip())
    for lever in LEVERS:
        columns = [textwrap.wrap(asdict(lever)[name], width) for name, width in _WIDTHS.items()]
        for cells in itertools.zip_longest(*columns, fillvalue=""):
            padded = zip(cells, _WIDTHS.values(), strict=True)
            print("  ".join(f"{cell:<{width}}" for cell, width in padded).rstrip())
    document = {"benchmark": "train levers", "levers": [asdict(lever) for lever in LEVERS]}
    print(json.dumps(document), flush=True)
