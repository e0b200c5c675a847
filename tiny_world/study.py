"""Run one of the published experiments: `python -m tiny_world study NAME --out DIR`.

Finished fine-tunes are kept in DIR, so a stopped command can be started again and continues; so is
one with more seeds. The tables are printed; DIR/section.md is the study's part of a page, with its
pictures sheet.png and, for some, sheet.svg. `--write PAGE` puts that part between the study's marks
on a page, with the pictures in `studies` beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from dreambooth.process import logs
from dreambooth.settings.command_line import Parser
from tiny_world import evaluate
from tiny_world.studies import frame
from tiny_world.studies.data import Data
from tiny_world.studies.feats import Feats
from tiny_world.studies.frame import Scale, Study
from tiny_world.studies.overfitting import Overfitting
from tiny_world.studies.prior import Prior
from tiny_world.studies.sequential import Sequential

STUDIES: Mapping[str, Study] = {
    each.name: each for each in (Overfitting(), Sequential(), Prior(), Data(), Feats())
}


def main(argv: Sequence[str]) -> int:
    """Run one of the published experiments and print what was found."""
    parser = Parser(prog="python -m tiny_world study", description=main.__doc__)
    parser.add_argument("name", choices=STUDIES)
    parser.add_argument("--out", type=Path, required=True, help="where results are kept")
    for option, of in (("seeds", ""), ("pictures", "of each prompt; "), ("steps", "of a run; ")):
        defaults = ", ".join(f"{getattr(each.scale, option)} {n}" for n, each in STUDIES.items())
        parser.add_argument(f"--{option}", type=evaluate.count, help=f"{of}default: {defaults}")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="such as docs/studies.md")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(argv)
    study = STUDIES[given.name]
    scale = Scale(
        seeds=given.seeds or study.scale.seeds,
        pictures=given.pictures or study.scale.pictures,
        steps=given.steps or study.scale.steps,
    )
    logs.to_stderr("warning")
    torch.set_num_threads(given.threads)
    if given.write is not None:
        frame.place_on(given.write, study)  # a page without a place is found before hours of work
    found = frame.run(study, scale, given.out)
    frame.write(study, scale, found, given.out, given.write)
    print(found.table)
    print(given.out / "section.md")
    return 0
