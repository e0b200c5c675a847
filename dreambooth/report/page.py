"""Writes `report.html`, one page that shows what a training run did.

The page contains everything itself (style, SVG charts, pictures as data URIs), loads nothing from
the network, needs no JavaScript and is readable on a phone. `page.html.jinja` is its template.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from dreambooth.process import files
from dreambooth.report import charts, pictures
from dreambooth.report.report_data import MetricsRow, ReportData
from dreambooth.settings.hyperparameters import KNOBS

MAX_PICTURE_BYTES = 8_000_000
"""Of all data URIs together: several times what an ordinary run takes; a phone still opens it."""
MAX_WARNINGS = 40
METER_CURVES: Sequence[tuple[str, Mapping[str, str]]] = (
    (
        "Loss at fixed noise, of the base's",
        {
            "loss_1": "first quarter of the timesteps",
            "loss_2": "second",
            "loss_3": "third",
            "loss_4": "last",
        },
    ),
    (
        "Drift from the base, of the subject's",
        {"drift_class": "class", "drift_other_class": "other class", "drift_empty": "empty prompt"},
    ),
    ("What guidance multiplies, of the base's", {"guidance": "subject less empty prompt"}),
)
"""Title and, by the name of each figure of the meter, the label of each curve."""
MAX_SUBJECTS = 16  # whose losses are drawn
MAX_TEXT = 2_000  # characters of one prompt, name or setting


def write(path: Path, data: ReportData, *, max_picture_bytes: int = MAX_PICTURE_BYTES) -> None:
    """Write the page, wholly or not at all. Raises OSError where it cannot be written."""
    page = render(data, max_picture_bytes=max_picture_bytes)
    files.write_whole(path, page.encode("utf-8", "backslashreplace"))


def render(data: ReportData, *, max_picture_bytes: int = MAX_PICTURE_BYTES) -> str:
    """Return the page as HTML.

    Pictures whose URIs would pass `max_picture_bytes` are left out and counted. Pictures that can
    no longer be read are left out too.
    """
    outside = data.seconds - sum(seconds for _, seconds in data.phases)
    phases = [("before and between the phases", max(0.0, outside)), *data.phases]
    settings = [(knob, getattr(data.settings, knob.name)) for knob in KNOBS]
    return (
        templates()
        .get_template("page.html.jinja")
        .render(
            data=data,
            tiles=_tiles(data),
            prompts_differ=len({picture.prompt for picture in data.instance_pictures}) > 1,
            max_warnings=MAX_WARNINGS,
            pictures=pictures.choose(data, max_bytes=max_picture_bytes),
            max_crops=pictures.MAX_CROPS,
            max_picture_bytes=max_picture_bytes,
            curves=_curves(data),
            smoothing_window=charts.smoothing_window(len(data.metrics)),
            phases=phases,
            longest=max(seconds for _, seconds in phases) or 1.0,
            memory=(*_seconds_per_step(data), *data.memory),
            settings=[(knob, value, value != knob.default) for knob, value in settings],
            versions=(*data.versions, ("fingerprint of the data", data.data_fingerprint)),
        )
    )


@functools.cache
def templates() -> jinja2.Environment:
    """Return the room's templates, which pass every value through `printable` and escape it.

    Prompts, file names and settings come from strangers.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=printable,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"breakable": breakable, "duration": duration}
    return environment


def printable(value: object) -> str:
    """Return a value's text, printable and cut after MAX_TEXT characters; our own HTML as it is."""
    if isinstance(value, Markup):
        return value
    plain = str(value)
    if len(plain) > MAX_TEXT:
        plain = plain[:MAX_TEXT] + " …"
    return "".join(c if c.isprintable() else _spelled(c) for c in plain)


def _spelled(letter: str) -> str:
    """Return a space or the escape code for a character that must not reach a page as it is.

    These are control characters, writing-direction marks and lone surrogates.
    """
    return " " if letter.isspace() else letter.encode("unicode_escape").decode("ascii")


def breakable(value: object) -> Markup:
    """Return a name or value as HTML that a narrow screen may break after underscores."""
    return escape(printable(value)).replace("_", Markup("_<wbr>"))


def duration(seconds: float) -> str:
    """Return a time with its unit: "34 ms", "8.2 s", "2 min 30 s" or "2 h 1 min"."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _tiles(data: ReportData) -> list[tuple[str, str]]:
    """Return (name, value) of the most important numbers."""
    ended_early = data.steps != data.planned_steps
    name = f"steps of {data.planned_steps}" if ended_early else "steps"
    tiles = [(name, f"{data.steps}"), ("in all", duration(data.seconds))]
    timed = [row.seconds for row in data.metrics if row.seconds is not None]
    if timed:
        tiles.append(("per step (median)", duration(statistics.median(timed))))
    losses = [row.loss for row in data.metrics]
    if losses and len(losses) == data.steps:  # else the mean were not the log's
        tiles.append(("train_avg_loss", f"{statistics.fmean(losses):.4g}"))
    if data.fid_score is not None:
        tiles.append(("fid_score", f"{data.fid_score:.4g}"))
    return tiles + [(name, text) for name, text in data.memory if name.startswith("peak")][-1:]


def _curves(data: ReportData) -> list[tuple[str, list[tuple[str, str]], str]]:
    """Return each chart's title, (colour, label) of its legend, and SVG."""
    rows = data.metrics
    steps = [row.step for row in rows]
    marks = [] if data.stopped is None else [(float(data.stopped[0]), "stopped")]
    if data.kept_step is not None:
        marks.append((float(data.kept_step), "kept"))
    losses = [("instance loss", [row.instance_loss for row in rows])]
    if any(row.class_loss is not None for row in rows):
        class_loss = [math.nan if row.class_loss is None else row.class_loss for row in rows]
        losses.append(("class loss", class_loss))
    if any(row.kept_loss is not None for row in rows):
        kept_loss = [math.nan if row.kept_loss is None else row.kept_loss for row in rows]
        losses.append(("kept subjects' loss", kept_loss))
    read = [row for row in rows if row.meter]
    at = [row.step for row in read]
    named_curves = [
        ("Loss", steps, losses, True),
        *((title, steps, named, True) for title, named in _losses_of_subjects(data)),
        *((title, at, meter_curves(read, names), False) for title, names in METER_CURVES if read),
        ("Gradient norm", steps, [("before clipping", [row.grad_norm for row in rows])], True),
        ("Learning rate", steps, [("learning rate", [row.learning_rate for row in rows])], False),
    ]
    curves = []
    for title, x, named, smoothed in named_curves:
        series = [
            charts.Series(label=label, x=x, y=values, smoothed=smoothed) for label, values in named
        ]
        legend = [
            (charts.legend_colour(number), label)
            for number, (label, _) in enumerate(named)
            if label != title.lower()
        ]
        chart = charts.line_chart(series, label=_summary(title, named), marks=marks)
        curves.append((title, legend, chart))
    return curves


def meter_curves(
    rows: Sequence[MetricsRow], names: Mapping[str, str]
) -> list[tuple[str, list[float]]]:
    """Return (label, values) of those figures of the meter that there are."""
    return [
        (label, [row.meter.get(name, math.nan) for row in rows])
        for name, label in names.items()
        if any(name in row.meter for row in rows)
    ]


def _losses_of_subjects(
    data: ReportData,
) -> list[tuple[str, list[tuple[str, list[float]]]]]:
    """Return the chart of the instance loss of each of several subjects; none of a single one.

    A step that has no sample of a subject says nothing of it.
    """
    names = dict.fromkeys(name for row in data.metrics for name in row.subject_losses)
    curves = [
        (name, [row.subject_losses.get(name, math.nan) for row in data.metrics])
        for name in itertools.islice(names, MAX_SUBJECTS)
    ]
    return [("Instance loss of each subject", curves)] if curves else []


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


def _seconds_per_step(data: ReportData) -> list[tuple[str, str]]:
    timed = sorted(row.seconds for row in data.metrics if row.seconds is not None)
    if not timed:
        return []
    slow = timed[min(len(timed) - 1, math.ceil(0.9 * len(timed)) - 1)]
    text = f"median {statistics.median(timed):.3g}, nine of ten at most {slow:.3g}"
    return [("seconds per step", text)]
