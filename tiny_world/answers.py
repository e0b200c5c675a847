"""Count how often a model drew what was asked: shares with intervals, and the variety of colours.

Legend: n pictures of a prompt. A picture that is not finite has no verdict and counts as wrong.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tiny_world.judge import Verdict
from tiny_world.questions import Question, Questions

_Z = 1.959964  # 95 % of a normal distribution lies within this many standard deviations

Verdicts = Mapping[str, Sequence[Verdict | None]]
"""The judge's readings by prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A share of pictures: `right` out of `of`."""

    right: int
    of: int

    @property
    def value(self) -> float:
        """Return the share, 0..1; without pictures it is 0."""
        return self.right / self.of if self.of else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of Wilson (1927).

        It stays within 0..1 and holds for few pictures too.
        """
        if not self.of:
            return 0.0, 1.0
        share, spread = self.value, _Z**2 / self.of
        middle = (share + spread / 2) / (1 + spread)
        half = _Z / (1 + spread) * math.sqrt(share * (1 - share) / self.of + spread / self.of / 4)
        return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """The shares of all questions, in their order, and the variety of colours.

    variety_bits: entropy of the colours read in the pictures of the variety prompt; None without
    such a prompt.
    """

    shares: tuple[tuple[Question, Share], ...]
    variety_bits: float | None

    def by_measure(self) -> dict[str, Share]:
        """Return the share of each measure: the pictures of its questions are pooled.

        The prompts are drawn from the same noise, so a pooled interval is a little too narrow.
        """
        pooled: dict[str, Share] = {}
        for question, share in self.shares:
            sofar = pooled.get(question.measure, Share(right=0, of=0))
            pooled[question.measure] = Share(
                right=sofar.right + share.right, of=sofar.of + share.of
            )
        return pooled


def count(questions: Questions, verdicts: Verdicts) -> Answers:
    """Compare what was read with what the questions want."""
    shares = []
    for question in questions.asked:
        read = verdicts[question.prompt]
        right = sum(verdict is not None and question.is_met(verdict) for verdict in read)
        shares.append((question, Share(right=right, of=len(read))))
    bits = None
    if questions.variety_prompt is not None:
        seen = (verdict for verdict in verdicts[questions.variety_prompt] if verdict is not None)
        bits = entropy_bits(verdict.color for verdict in seen)
    return Answers(shares=tuple(shares), variety_bits=bits)


def entropy_bits(labels: Iterable[str]) -> float:
    """Return the entropy in bits: 0 if all labels are equal, log2 k for k equally frequent ones."""
    counts = Counter(labels)
    total = sum(counts.values())
    return -sum(n / total * math.log2(n / total) for n in counts.values()) + 0.0
