"""Draw sheets of the pictures of an interview.

`overview` shows a few pictures of each question; `disagreements` those in which the judge did not
read what was asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from PIL import Image

from dreambooth.report import contact_sheet
from dreambooth.report.contact_sheet import Picture
from tiny_world.asking import Interview
from tiny_world.judge import Verdict
from tiny_world.questions import Question

ROW = 12
CELL = 64
_WRONG = 24  # at most this many pictures of one wrong reading are shown


def overview(interview: Interview, title: str) -> Image.Image:
    """Draw one row for each question: its first pictures, its share and the wrong readings.

    A wrong reading is given with the picture's place in the row, from 1.
    """
    rows: list[tuple[str, Sequence[Picture]]] = []
    for question, share in interview.answers.shares:
        verdicts = interview.verdicts[question.prompt][:ROW]
        wrong = [
            f"#{place} {_reading(question, verdict)}"
            for place, verdict in enumerate(verdicts, start=1)
            if not _is_met(question, verdict)
        ]
        label = f"{question.prompt}: {question.asked}, {share.value:.2f}"
        if wrong:
            label += f" - read: {'; '.join(wrong)}"
        rows.append((label, list(interview.pictures[question.prompt][:ROW])))
    return contact_sheet.draw(rows, cell=CELL, title=title)


def disagreements(interview: Interview, title: str) -> Image.Image:
    """Draw a row for each wrong reading of a question, and one of pictures that were read as asked.

    A human can then see whether the model or the judge is wrong. Questions without a wrong reading
    are left out.
    """
    rows: list[tuple[str, Sequence[Picture]]] = []
    for question, share in interview.answers.shares:
        pictures = interview.pictures[question.prompt]
        verdicts = interview.verdicts[question.prompt]
        wrong = [place for place in range(share.of) if not _is_met(question, verdicts[place])]
        if not wrong:
            continue
        readings = Counter(_reading(question, verdicts[place]) for place in wrong)
        for reading, count in readings.most_common():
            places = [p for p in wrong if _reading(question, verdicts[p]) == reading][:_WRONG]
            label = f"{question.prompt}: asked {question.asked}, READ {reading} ({count})"
            rows.append((label, [pictures[place] for place in places]))
        right = [place for place in range(share.of) if place not in wrong][:ROW]
        if right:
            label = f"{question.prompt}: read as asked ({share.right} of {share.of})"
            rows.append((label, [pictures[place] for place in right]))
    return contact_sheet.draw(rows, cell=CELL, title=title)


def _is_met(question: Question, verdict: Verdict | None) -> bool:
    return verdict is not None and question.is_met(verdict)


def _reading(question: Question, verdict: Verdict | None) -> str:
    return "not finite" if verdict is None else question.reading(verdict)
