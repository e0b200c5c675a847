"""The helpers that write the report page's HTML."""

from __future__ import annotations

import pytest

from dreambooth.report import html


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0342, "34 ms"),
        (8.25, "8.2 s"),
        (59.97, "1 min 0 s"),
        (150, "2 min 30 s"),
        (7260, "2 h 1 min"),
    ],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert html.duration(seconds) == words


def test_text_is_escaped_printable_and_bounded() -> None:
    assert html.text("<b a=\"1\" c='2'>&") == "&lt;b a=&quot;1&quot; c=&#x27;2&#x27;&gt;&amp;"
    assert html.text("a\nb\u00a0c\u202e\x00\udc80") == "a b c\\u202e\\x00\\udc80"
    assert html.text("ein Kätzchen 猫 🐈") == "ein Kätzchen 猫 🐈"
    assert len(html.text("x" * 100_000)) < html.MAX_TEXT + 10


def test_a_row_without_a_name_is_one_wide_cell() -> None:
    assert '<td colspan="2">a &lt; b</td>' in html.table([("", "a < b")])
