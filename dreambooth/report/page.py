"""Writes `report.html`, one page that shows what a training run did.

The page contains everything itself (style, SVG charts, pictures as data URIs), loads nothing from
the network, needs no JavaScript and is readable on a phone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from dreambooth.process import files
from dreambooth.report import charts, pictures
from dreambooth.report.html import STYLE, duration, section, table, text
from dreambooth.report.pictures import Thumbnails
from dreambooth.report.report_data import MetricsRow, ReportData
from dreambooth.settings.hyperparameters import KNOBS, Hyperparameters

MAX_PICTURE_BYTES = 8_000_000
"""Of all data URIs together: several times what an ordinary run takes; a phone still opens it."""
MAX_WARNINGS = 40


def write(path: Path, data: ReportData, *, max_picture_bytes: int = MAX_PICTURE_BYTES) -> None:
    """Write the page, wholly or not at all. Raises OSError where it cannot be written."""
    page = render(data, max_picture_bytes=max_picture_bytes)
    files.write_whole(path, page.encode("utf-8", "backslashreplace"))


def render(data: ReportData, *, max_picture_bytes: int = MAX_PICTURE_BYTES) -> str:
    """Return the page as HTML.

    Pictures whose URIs would pass `max_picture_bytes` are left out and counted. Pictures that can
    no longer be read are left out too.
    """
    thumbnails = Thumbnails(max_picture_bytes)
    # The smallest sections come first: what they leave of their share goes to the larger ones.
    with thumbnails.share_of(3):
        class_images = pictures.class_images(data, thumbnails)
    with thumbnails.share_of(2):
        drawn = pictures.drawn(data, thumbnails)
    with thumbnails.share_of(1):
        instance_images = pictures.instance_images(data, thumbnails)
    sections = [
        _head(data),
        _warnings(data.warnings),
        drawn,
        _curves(data),
        instance_images,
        class_images,
        '<div class="twin">',
        section("Time and memory", _costs(data)),
        section("Plan", table(data.plan)),
        section("Hyperparameters", _hyperparameters(data.settings)),
        section("Versions", _versions(data)),
        "</div>",
    ]
    if thumbnails.left_out:
        sections.append(
            f'<p class="note">{thumbnails.left_out} more pictures are left out to keep this page '
            f"small ({max_picture_bytes / 1e6:g} MB of pictures at most).</p>"
        )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # The browser enforces that the page loads nothing and runs no script.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{text(data.instance_prompt)} – training report</title>"
        f"<style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(part for part in sections if part)
        + "\n</main></body></html>\n"
    )


def _head(data: ReportData) -> str:
    tiles = [("steps", f"{data.steps}"), ("in all", duration(data.seconds))]
    if data.steps != data.planned_steps:
        tiles[0] = ("steps of " + str(data.planned_steps), str(data.steps))
    per_step = _seconds_per_step(data.metrics)
    if per_step is not None:
        tiles.append(("per step (median)", duration(per_step)))
    average = _average_loss(data)
    if average is not None:
        tiles.append(("train_avg_loss", f"{average:.4g}"))
    if data.fid_score is not None:
        tiles.append(("fid_score", f"{data.fid_score:.4g}"))
    tiles += [(name, text) for name, text in data.memory if name.startswith("peak")][-1:]
    shown_tiles = "".join(
        f"<div><b>{text(value)}</b><span>{text(name)}</span></div>" for name, value in tiles
    )
    stopped = ""
    if data.stopped is not None:
        stopped = f'<p class="alarm"><b>The run was stopped.</b> {text(data.stopped[1])}</p>'
    return (
        f'<header><p class="kicker">DreamBooth training report</p>'
        f"<h1>{text(data.instance_prompt)}</h1>"
        f"<p>Fine-tuned from <b>{text(data.base)}</b> on {text(data.device)}, "
        f"{text(data.finished_at)}.</p>{stopped}"
        f'<div class="tiles">{shown_tiles}</div></header>'
    )


def _warnings(warnings: Sequence[str]) -> str:
    if not warnings:
        return ""
    items = "".join(f"<li>{text(warning)}</li>" for warning in warnings[:MAX_WARNINGS])
    if len(warnings) > MAX_WARNINGS:
        items += f"<li>and {len(warnings) - MAX_WARNINGS} more in the log</li>"
    return section("Warnings", f'<ul class="warnings">{items}</ul>')


def _curves(data: ReportData) -> str:
    rows = data.metrics
    steps = [row.step for row in rows]
    marks = []
    if data.stopped is not None:
        marks.append((float(data.stopped[0]), "stopped"))
    losses = [("instance loss", [row.instance_loss for row in rows])]
    if any(row.class_loss is not None for row in rows):
        class_loss = [math.nan if row.class_loss is None else row.class_loss for row in rows]
        losses.append(("class loss", class_loss))
    curves = [
        ("Loss", losses, True),
        ("Gradient norm", [("before clipping", [row.grad_norm for row in rows])], True),
        ("Learning rate", [("learning rate", [row.learning_rate for row in rows])], False),
    ]
    figures = []
    for title, named, smoothed in curves:
        series = [
            charts.Series(label=label, x=steps, y=values, smoothed=smoothed)
            for label, values in named
        ]
        chart = charts.line_chart(series, label=_summary(title, named), marks=marks)
        key = "".join(
            f'<span class="key"><i style="background:{charts.legend_colour(number)}"></i>'
            f"{label}</span>"
            for number, (label, _) in enumerate(named)
            if label != title.lower()
        )
        figures.append(f"<figure><figcaption><b>{title}</b> {key}</figcaption>{chart}</figure>")
    window = charts.smoothing_window(len(rows))
    dots = f"Dots are single steps, lines their means over {window} steps. " if window > 1 else ""
    note = (
        f"{dots}The loss hangs mostly on the timestep that a step happens to draw: look at the "
        "line, and at the pictures more than at either."
    )
    return section("Curves", f'<div class="charts">{"".join(figures)}</div>', note)


def _summary(title: str, named: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Return a description of a chart for those who cannot see it."""
    sentences = []
    for label, values in named:
        finite = [value for value in values if math.isfinite(value)]
        if finite:
            fifth = max(1, len(finite) // 5)
            first, last = statistics.fmean(finite[:fifth]), statistics.fmean(finite[-fifth:])
            sentences.append(
                f"{label}: mean of the first fifth {first:.3g}, of the last {last:.3g}"
            )
    return f"{title} over the steps. " + "; ".join(sentences)


def _costs(data: ReportData) -> str:
    outside = data.seconds - sum(seconds for _, seconds in data.phases)
    phases = [("before and between the phases", max(0.0, outside)), *data.phases]
    longest = max(seconds for _, seconds in phases) or 1.0
    rows = "".join(
        f'<tr><th>{text(name)}</th><td class="num">{duration(seconds)}</td><td class="bar">'
        f'<i style="width:{100 * seconds / longest:.1f}%"></i></td></tr>'
        for name, seconds in phases
    )
    more = []
    timed = sorted(row.seconds for row in data.metrics if row.seconds is not None)
    if timed:
        slow = timed[min(len(timed) - 1, math.ceil(0.9 * len(timed)) - 1)]
        more.append(
            (
                "seconds per step",
                f"median {statistics.median(timed):.3g}, nine of ten at most {slow:.3g}",
            )
        )
    return f'<table class="phases">{rows}</table>' + table((*more, *data.memory))


def _hyperparameters(settings: Hyperparameters) -> str:
    rows, changed = [], []
    for knob in KNOBS:
        value = getattr(settings, knob.name)
        kind, note = "", ""
        if value != knob.default:
            kind, note = ' class="changed"', f"default {_breakable(knob.default)}"
        row = (
            f'<tr{kind}><th title="{text(knob.sentence)}">{_breakable(knob.name)}</th>'
            f"<td>{_breakable(value)}</td><td>{note}</td></tr>"
        )
        rows.append(row)
        if note:
            changed.append(row)
    first = (
        f'<table class="settings">{"".join(changed)}</table>'
        if changed
        else "<p>All are at their defaults.</p>"
    )
    return (
        f"{first}<details><summary>All {len(KNOBS)}; those off their default are marked</summary>"
        f'<table class="settings">{"".join(rows)}</table></details>'
    )


def _breakable(value: object) -> str:
    """Return a name or value as HTML that a narrow screen may break after underscores."""
    return text(value).replace("_", "_<wbr>")


def _versions(data: ReportData) -> str:
    return table((*data.versions, ("fingerprint of the data", data.data_fingerprint)))


def _average_loss(data: ReportData) -> float | None:
    """Return the mean loss of all steps, the log's train_avg_loss; None where steps are missing."""
    losses = [row.loss for row in data.metrics]
    return statistics.fmean(losses) if losses and len(losses) == data.steps else None


def _seconds_per_step(rows: Sequence[MetricsRow]) -> float | None:
    timed = [row.seconds for row in rows if row.seconds is not None]
    return statistics.median(timed) if timed else None
