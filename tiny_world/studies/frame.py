"""Run a study and write its part of a page: the frame that all of them share.

A study says which fine-tunes it makes, which of their states are judged and how, and what it shows
of the results.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from html import escape
from pathlib import Path
from typing import ClassVar

import torch
from PIL import Image

from dreambooth import tiny
from dreambooth.errors import UserError
from dreambooth.report import charts, contact_sheet
from dreambooth.report.charts import Series
from tiny_world import fine_tunes, score, stopping, tables
from tiny_world.asking import Interview
from tiny_world.clean import Critic
from tiny_world.data_sets import DATA_SETS, DataSet
from tiny_world.fine_tunes import FineTune, Judging, Readings, Record
from tiny_world.questions import Questions

SHIPPED: Mapping[str, DataSet] = {each.folder: each for each in DATA_SETS}
RATE = ("--learning_rate", tiny.DEFAULTS["learning_rate"])
METHOD = tuple(
    word
    for name in ("with_prior_preservation", "prior_preservation_mode", "training_guidance_scale")
    for word in (f"--{name}", tiny.DEFAULTS[name])
)
DEMO = (*RATE, *METHOD)
"""The demo's options of the training job; no fine-tune of a study stops early."""
SCORE_NOTE = "The score is the harmonic mean of the five parts, each of which is a share."
PAGE_PICTURES = "studies"
_CELL, _TITLE, _LEGEND = 64, 20, 18  # pixels; units of the figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How large a study is: its seeds, the pictures of each prompt, and the steps of a run."""

    seeds: int
    pictures: int
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """The records of a study's fine-tunes, by their names, and the folder of their pictures."""

    out: Path
    scale: Scale
    records: Mapping[str, Record]

    def of_seeds(self, prefix: str) -> list[Record]:
        """Return the records of the fine-tunes `PREFIX-SEED`, one a seed."""
        return [self.records[f"{prefix}-{seed}"] for seed in range(self.scale.seeds)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What a study shows: tables in Markdown, a sheet, and a figure as SVG where there is one.

    note: what a reader must know of the numbers.
    """

    table: str
    note: str
    sheet: Image.Image
    sheet_says: str
    figure: str | None = None
    figure_says: str = ""


class Study(ABC):
    """A published experiment; what is overridden says where it differs from the four prompts.

    states: the steps whose states are judged.
    """

    name: ClassVar[str]
    scale: ClassVar[Scale]
    states: ClassVar[Sequence[int]] = stopping.CONSTANT

    @abstractmethod
    def fine_tunes(self, scale: Scale) -> list[FineTune]:
        """Return all fine-tunes, each after the one that it starts from."""

    @abstractmethod
    def findings(self, results: Results) -> Findings:
        """Return the tables and pictures of all records."""

    def questions(self, tune: FineTune) -> Questions:
        """Return what each judged state is asked."""
        return score.questions_on(tune.data.subject)

    def chosen(self, tune: FineTune, readings: Readings) -> Mapping[str, int]:
        """Return the steps that are judged, each by a name."""
        return stopping.constants(tune.steps, self.states)

    def measure(self, tune: FineTune, interview: Interview, critic: Critic) -> dict[str, float]:
        """Return what is measured of a judged state."""
        return score.parts(interview, critic)


def run(study: Study, scale: Scale, out: Path) -> Findings:
    """Do what is not done yet; return what was found.

    Raises UserError for a folder of another study and for steps at which no state is kept.
    """
    if scale.steps > fine_tunes.EVERY and scale.steps % fine_tunes.EVERY:
        raise UserError(f"--steps must be at most {fine_tunes.EVERY} or a multiple of it.")
    tunes = study.fine_tunes(scale)
    one_seed = study.fine_tunes(replace(scale, seeds=1))
    settings = {"pictures": scale.pictures, "fine_tunes": [asdict(tune) for tune in one_seed]}
    fine_tunes.keep_settings(out / "study.json", json.loads(json.dumps(settings)))
    critic = Critic.of_the_world()
    records = {
        tune.name: fine_tunes.judged(tune, _judging(study, tune, scale, critic), out)
        for tune in tunes
    }
    for tune in tunes:
        if tune.is_base:
            shutil.rmtree(out / tune.name, ignore_errors=True)
    return study.findings(Results(out=out, scale=scale, records=records))


def _judging(study: Study, tune: FineTune, scale: Scale, critic: Critic) -> Judging:
    return Judging(
        questions=study.questions(tune),
        pictures=scale.pictures,
        chosen=lambda readings: study.chosen(tune, readings),
        measure=lambda interview: study.measure(tune, interview, critic),
    )


def sheet_row(
    results: Results, study: Study, tune: FineTune, prompt: str, steps: Sequence[int], each: int
) -> list[Image.Image]:
    """Return `each` pictures of a prompt from each of the states of these steps."""
    row = study.questions(tune).prompts.index(prompt)
    return [
        picture
        for step in steps
        for picture in fine_tunes.kept_pictures(results.out, tune.name, step, row)[:each]
    ]


def mean_curve(
    label: str, records: Sequence[Record], value: Callable[[Mapping[str, float]], float]
) -> Series:
    """Return the mean over seeds of a value of each judged state, by its step."""
    steps = list(records[0]["judged"])
    means = [
        statistics.fmean(value(record["judged"][step]) for record in records) for step in steps
    ]
    return Series(label=label, x=[int(step) for step in steps], y=means)


def sheet(
    rows: Sequence[tuple[str, Sequence[contact_sheet.Picture]]], columns: Sequence[str]
) -> Image.Image:
    """Return a contact sheet in 256 colours, its rows and columns labelled."""
    drawn = contact_sheet.draw(rows, cell=_CELL, heads=columns)
    return drawn.quantize(256, kmeans=1)


def figure(
    panels: Sequence[tuple[str, Sequence[Series], Sequence[tuple[float, str]]]], *, across: int
) -> str:
    """Return an SVG file of charts, so many side by side.

    panels: the title, the curves and the marked steps of each. The curves of all panels have the
    labels of the first one's, which are its legend.
    """
    width, height = charts.WIDTH, charts.HEIGHT + _TITLE
    rows = -(-len(panels) // across)
    parts = []
    for number, (title, series, marks) in enumerate(panels):
        left, top = number % across * width, number // across * height
        chart = charts.line_chart(series, label=title, marks=marks)
        parts.append(
            f'<text x="{left + 50}" y="{top + 16}" font-weight="bold">{escape(title)}</text>'
            f'<svg x="{left}" y="{top + _TITLE}" width="{width}" height="{charts.HEIGHT}">'
            f"{chart}</svg>"
        )
    for number, one in enumerate(panels[0][1]):
        parts.append(
            f'<text x="{50 + 180 * number}" y="{rows * height + 12}" '
            f'fill="{charts.legend_colour(number)}">{escape(one.label)}</text>'
        )
    size = f"{across * width} {rows * height + _LEGEND}"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" color="#222226" '
        'fill="currentColor" font-family="sans-serif" font-size="13">'
        '<rect width="100%" height="100%" fill="#ffffff"/>'
    )
    # Outside a page the colours have no variables, only their defaults.
    return re.sub(r"var\(--[\w-]+,(#\w+)\)", r"\1", head + "".join(parts) + "</svg>\n")


def write(study: Study, scale: Scale, found: Findings, out: Path, page: Path | None) -> None:
    """Write the study's part of a page into its folder, and between its marks on `page` if given.

    The pictures go beside it. The date is that of the first time that these figures were written.
    Raises UserError for a page without marks.
    """
    kept = out / "results.json"
    results = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    if results.get("table") != found.table:
        device = "CUDA" if torch.cuda.is_available() else "CPU"
        measured = f"{date.today().isoformat()}, {device}, embedded model"
        results = {"measured": measured, "table": found.table}
        fine_tunes.write_json(kept, results)
    measured = results["measured"]
    _save_pictures(found, out / "sheet")
    text = section(study, scale, found, measured, pictures="sheet")
    (out / "section.md").write_text(text, encoding="utf-8")
    if page is not None:
        before, after = place_on(page, study)
        (page.parent / PAGE_PICTURES).mkdir(exist_ok=True)
        _save_pictures(found, page.parent / PAGE_PICTURES / study.name)
        pictures = f"{PAGE_PICTURES}/{study.name}"
        text = section(study, scale, found, measured, pictures=pictures)
        page.write_text(f"{before}{text}{after}", encoding="utf-8")


def place_on(page: Path, study: Study) -> tuple[str, str]:
    """Return a page up to the end of the study's first mark, and from its second mark on.

    Raises UserError where the page has no such marks.
    """
    begin, end = f"<!-- study {study.name} -->\n", f"<!-- /study {study.name} -->"
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    before, begun, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not begun or not ended:
        raise UserError(
            f"{page} has no place for this study; write what was found, and below it the lines "
            f"{begin.strip()} and {end}"
        )
    return before + begun, ended + after


def _save_pictures(found: Findings, stem: Path) -> None:
    found.sheet.save(stem.with_suffix(".png"), optimize=True)
    if found.figure is not None:
        stem.with_suffix(".svg").write_text(found.figure, encoding="utf-8")


def section(study: Study, scale: Scale, found: Findings, measured: str, *, pictures: str) -> str:
    """Return a study's part of a page; `pictures`: the path of its pictures without an ending."""
    words = [f"python -m tiny_world study {study.name} --out out/{study.name}"]
    words += [
        f"--{name} {value}"
        for name, value in asdict(scale).items()
        if value != getattr(study.scale, name)
    ]
    seeds = "1 seed" if scale.seeds == 1 else f"{scale.seeds} seeds"
    spread = f"; {how}" if (how := tables.spread(scale.seeds)) else ""
    lines = [
        f"{measured}: `{' '.join(words)}`. {seeds}, {scale.pictures} pictures "
        f"of each prompt at the served defaults (guidance 7.5, 50 steps){spread}. {found.note}",
        found.table,
        f"![{found.sheet_says}]({pictures}.png)",
    ]
    if found.figure is not None:
        lines.append(f"![{found.figure_says}]({pictures}.svg)")
    return "\n\n".join(lines) + "\n"
