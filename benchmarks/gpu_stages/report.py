"""Write the tables and verdicts of recorded facts as Markdown, and all of it as one record."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu_stages.found import NOT_ASKED, Found
from benchmarks.gpu_stages.goals import of_expected
from benchmarks.gpu_stages.stages import NAMES
from benchmarks.gpu_stages.verdicts import lever_verdicts, verdicts
from benchmarks.train_step.conditions import GIB

TABLE_NAME, RECORD_NAME = "table.md", "record.json"
_MACHINE = ("device", "driver", "torch", "cuda", "cudnn", "diffusers", "bitsandbytes", "commit")
_OF_MACHINE = (*_MACHINE, "python", "cores", "compute_capability", "date")


def write(out: Path, found: Found) -> str:
    """Write table.md and record.json beside the facts; return the table."""
    text = "\n".join(_lines(found)) + "\n"
    (out / TABLE_NAME).write_text(text, encoding="utf-8")
    document = json.dumps(record(found), indent=1) + "\n"
    (out / RECORD_NAME).write_text(document, encoding="utf-8")
    return text


def record(found: Found) -> dict[str, Any]:
    """Return the record that is committed: the machine, the verdicts and every fact."""
    return {
        "benchmark": "gpu",
        "dry": found.dry,
        **{name: found.machine.get(name) for name in _OF_MACHINE},
        "incomplete": [*found.incomplete()],
        "goals": [asdict(each) for each in verdicts(found)],
        "levers": [
            {**asdict(each), "becomes_default": each.becomes_default}
            for each in lever_verdicts(found)
        ],
        "facts": [asdict(fact) for fact in found.facts],
    }


def _lines(found: Found) -> Iterator[str]:
    machine = found.machine
    yield f"# {machine.get('device', 'Unknown device')}, {str(machine.get('date', ''))[:10]}"
    yield ""
    if found.dry:
        yield "A dry run: everything in miniature, and no figure says anything about a GPU."
        yield ""
    known = {**machine, "compute_capability": found.compute_capability}
    stated = [(name, known[name]) for name in _OF_MACHINE if known.get(name) is not None]
    yield ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in stated) + "."
    tables = (
        ("Stages", ("stage", "seconds", "end"), _stage_rows(found)),
        ("Ceilings", ("what", "measured"), _ceiling_rows(found)),
        (
            "Steps",
            ("setting", "ms", "p10 to p90", "GiB allocated/reserved", "of expected", "cosine"),
            (*_step_rows(found, "steps"), *_step_rows(found, "levers")),
        ),
        ("Jobs", ("job", "plan", "step, ms", "first step", "whole", "GiB"), _job_rows(found)),
        (
            "Pictures",
            ("U-Net calls", "a picture, s", "8 at once, pictures/s", "call of 2 rows, ms", "GiB"),
            _picture_rows(found),
        ),
        (
            "Levers",
            ("lever", "10 % faster", "memory", "equality", "tests/gpu", "decision"),
            _lever_rows(found),
        ),
    )
    for title, columns, rows in tables:
        yield from _table(title, columns, rows)
    yield "\n## Goals\n"
    yield from (f"* {each.in_words}" for each in verdicts(found))
    yield "\n## Cut off, left out or failed\n"
    yield from (f"* {line}" for line in [*found.incomplete()] or ["nothing"])


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield a Markdown table under its heading; nothing if it has no rows."""
    lines = [_row(row) for row in rows]
    if lines:
        yield f"\n## {title}\n"
        yield _row(columns)
        yield "|" + "---|" * len(columns)
        yield from lines


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def _stage_rows(found: Found) -> Iterator[Sequence[str]]:
    for stage in NAMES:
        ended, seconds, why = found.end(stage)
        if ended != NOT_ASKED:
            yield stage, f"{seconds:.0f}", ended + (f": {why}" if why else "")


def _ceiling_rows(found: Found) -> Iterator[Sequence[str]]:
    for fact in found.all("ceilings", "ceiling"):
        yield fact.name, f"{fact.figures['value']:.4g} {fact.figures['unit']}"


def _step_rows(found: Found, stage: str) -> Iterator[Sequence[str]]:
    for fact in found.all(stage, "step"):
        if stage == "levers" and not fact.figures["levers"]:
            continue  # measured again beside its levers
        times, share = fact.figures["times"], of_expected(fact.figures)
        cosine = fact.figures["cosine"]
        yield (
            fact.name,
            f"{times['median_ms']:.1f}",
            f"{times['p10_ms']:.1f} to {times['p90_ms']:.1f}",
            _gib(fact.figures["allocated"], fact.figures["reserved"]),
            "-" if share is None else f"{share:.1%}",
            "-" if cosine is None else f"{cosine:.5f}",
        )


def _job_rows(found: Found) -> Iterator[Sequence[str]]:
    for stage in ("job", "t4", "peer"):
        for fact in found.all(stage, "job"):
            figures, memory = fact.figures, fact.figures["memory"] or {}
            yield (
                f"{stage}, {fact.name}",
                figures.get("memory_plan", "-"),
                f"{figures['times']['median_ms']:.1f}",
                f"{figures['first_step_s']:.1f} s",
                f"{figures['run_s']:.1f} s",
                _gib(memory.get("allocated"), memory.get("reserved")),
            )


def _picture_rows(found: Found) -> Iterator[Sequence[str]]:
    for fact in found.all("serving", "pictures"):
        figures = fact.figures
        peak = figures.get("peak") or {}
        burst = figures.get("burst_per_s")
        calls = [call["ms"] for call in figures.get("calls", ()) if call["rows"] == 2]
        yield (
            fact.name,
            f"{figures['picture_s']:.3f}",
            "-" if burst is None else f"{burst:.2f}",
            "".join(f"{ms:.2f}" for ms in calls) or "-",
            _gib(peak.get("allocated"), peak.get("reserved")),
        )


def _lever_rows(found: Found) -> Iterator[Sequence[str]]:
    words = {None: "?", True: "yes", False: "no"}
    for each in lever_verdicts(found):
        measured = (each.speed, each.memory, each.equality)
        cells = (f"{words[one.holds]}: {one.found}" for one in measured)
        yield each.lever, *cells, words[each.tests.holds], each.decision


def _gib(*sizes: int | None) -> str:
    return "/".join(f"{size / GIB:.2f}" for size in sizes if size) or "-"
