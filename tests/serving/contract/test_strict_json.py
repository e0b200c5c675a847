from __future__ import annotations

import contextlib
import json
import math
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dreambooth.errors import RequestError
from dreambooth.limits import LIMITS
from dreambooth.serving.contract import strict_json

DEPTH = LIMITS.max_json_depth

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**90), 10**90)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


def refused(body: bytes | str) -> str:
    with pytest.raises(RequestError) as error:
        strict_json.loads(body)
    assert error.value.status == 400
    message = str(error.value)
    assert message.endswith(".")
    assert len(message) < 300
    assert message.isprintable()
    return message


@given(values, st.booleans())
def test_what_is_plain_json_is_read(value: Any, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert strict_json.loads(text.encode()) == value
    assert strict_json.loads(bytearray(text.encode())) == value
    assert strict_json.loads(text) == value


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"NaN", "holds NaN"),
        (b'{"a": [Infinity]}', "holds Infinity"),
        (b"-Infinity", "holds -Infinity"),
        (b"1e999", "holds the number 1e999"),
        (b"[-1e400]", "out of range"),
        (b"[" + b"9" * 5_000 + b"]", "a number of 5000 characters"),
        (b"0." + b"1" * 5_000, "a number of 5002 characters"),
        (b'{"a": 1, "a": 1}', "gives the key a twice"),
        (b'[{"x": {"a": 1, "\\u0061": 2}}]', "gives the key a twice"),
        (b'"\\ud800"', "lone surrogate"),
        (b'{"a": ["\\udc00\\ud800"]}', "lone surrogate"),
        (b'{"\\ud800": 1}', "lone surrogate"),
        (b'"\xed\xa0\x80"', "not valid UTF-8"),
        (b'"\xff"', "not valid UTF-8"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        ("\ufeff{}", "byte order mark"),
        ('"\ud800"', "not valid UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not valid UTF-8"),
        ('{"a": 1}'.encode("utf-16-le"), "not valid JSON"),
        ('{"a": 1}'.encode("utf-32"), "not valid UTF-8"),
        ('{"a": 1}'.encode("utf-32-be"), "not valid JSON"),
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
        (b'{"a": 1,}', "not valid JSON"),
        (b'{"a": 1} x', "not valid JSON: Extra data (line 1, column 10)"),
        (b'"a\nb"', "not valid JSON: Invalid control character"),
        (b"True", "not valid JSON"),
        (b"01", "not valid JSON"),
        (b"+1", "not valid JSON"),
        (b"[" * 100_000, "nested deeper than 16 levels"),
        (b"[" * 1_000, "nested deeper than 16 levels"),
        (b'{"a":' * 1_000 + b"1" + b"}" * 1_000, "nested deeper than 16 levels"),
        (b"[" + b"1," * 2_000 + b"1]", "more than 1000 values"),
        (b"[" * 17 + b"]" * 17, "nested deeper than 16 levels"),
        (b"]" * 5 + b"[" * 17, "not valid JSON"),
    ],
)
def test_what_is_doubtful_is_refused(body: bytes | str, words: str) -> None:
    assert words in refused(body)


def test_what_stands_at_the_bounds_is_read() -> None:
    nested: Any = strict_json.loads(b"[" * DEPTH + b"]" * DEPTH)
    for _ in range(DEPTH - 1):
        (nested,) = nested
    assert nested == []
    assert strict_json.loads(json.dumps([[0] * 490] * 2)) == [[0] * 490] * 2
    assert strict_json.loads(b"9" * 100) == 10**100 - 1
    assert strict_json.loads(b"1.7976931348623157e308") == math.nextafter(math.inf, 0)
    assert strict_json.loads(b'"\\ud83d\\ude00"') == "\N{GRINNING FACE}"
    assert strict_json.loads(b' {"a" : "[[[[[[[[[[[[[[[[[[[[[[ \\" [[[["}\n') == {
        "a": '[[[[[[[[[[[[[[[[[[[[[[ " [[[['
    }


@pytest.mark.parametrize(
    ("item", "count"),
    [
        *(("[]", 999), ("{}", 999), ("[ ]", 999), ("0", 999), ('",[]"', 999), ("null", 999)),
        *(("[0]", 499), ('{"a": "b"}', 499), ('{"a": {}, "b": [\n]}', 333)),
    ],
)
def test_the_bound_on_values_is_exact(item: str, count: int) -> None:
    text = ",".join([item] * count)
    assert len(strict_json.loads(f"[{text}]")) == count
    assert strict_json.loads(json.dumps({f"k{n}": 0 for n in range(999)}))
    for more in (f"[{text},[0]]", json.dumps({f"k{n}": 0 for n in range(1000)})):
        assert "more than 1000 values" in refused(more)


@given(values)
def test_values_are_counted_as_they_are(value: Any) -> None:
    def count(value: Any) -> int:
        items = value.values() if isinstance(value, dict) else value
        return 1 + sum(map(count, items)) if isinstance(value, dict | list) else 1

    text = json.dumps(value)
    assert strict_json.loads(text, limits=replace(LIMITS, max_json_values=count(value))) == value
    if count(value) > 1:
        with pytest.raises(RequestError, match="more than"):
            strict_json.loads(text, limits=replace(LIMITS, max_json_values=count(value) - 1))


def test_the_caps_are_those_given() -> None:
    assert strict_json.loads(b"[[]]", limits=replace(LIMITS, max_json_depth=2)) == [[]]
    with pytest.raises(RequestError, match="deeper than 1 levels"):
        strict_json.loads(b"[[]]", limits=replace(LIMITS, max_json_depth=1))


@given(st.binary())
@example(b'"\\')
@example(b'"' * 7)
@example(b"[}" * 1_000)
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    try:
        strict_json.loads(body)
    except RequestError:
        refused(body)


@given(st.text(alphabet='[]{}",:\\u0d8 \n1e+-.tn'))
def test_what_is_read_is_what_the_standard_library_reads(body: str) -> None:
    try:
        value = strict_json.loads(body)
    except RequestError:
        return
    assert value == json.loads(body)


@pytest.mark.parametrize(
    "unit",
    [
        b"[],",
        b"[]",
        b"]",
        b"[ ",
        b'"\\"',
        b'"',
        b"\\",
        b"[[[[]]]],",
        b'{"a":1},',
        b"1,",
        b'"\\u0061",',
        b"{}",
    ],
)
def test_time_is_linear(unit: bytes) -> None:
    body = b"[" + unit * (LIMITS.max_body_bytes // len(unit)) + b"0]"
    started = time.perf_counter()
    with contextlib.suppress(RequestError):
        strict_json.loads(body)
    # Measured: at most 0.1 s; quadratic time would be hours.
    assert time.perf_counter() - started < 5


def test_names_are_shown_short_and_printable() -> None:
    assert strict_json.printable("a\nb\x00\x1b[31m") == "a\N{REPLACEMENT CHARACTER}b" + (
        "\N{REPLACEMENT CHARACTER}" * 2 + "[31m"
    )
    assert strict_json.printable("x" * 100) == "x" * 100
    assert strict_json.printable("x" * 101) == "x" * 100 + "…"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (1.0, "1.0"),
        (1e300, "1e+300"),
        ("50", '"50" (a string)'),
        ("", '"" (a string)'),
        ('a "b"', r'"a \"b\"" (a string)'),
        ("ü\x7f\u2028\U000e0001", r'"ü\u007f\u2028\udb40\udc01" (a string)'),
        ({"a": [None, "x"]}, '{"a": [null, "x"]}'),
        ("x" * 98, f'"{"x" * 98}" (a string)'),
        ("x" * 99, f'"{"x" * 99}…" (a string)'),
        (["x"] * 100, '["x", ' + '"x", ' * 18 + '"x",…'),
    ],
)
def test_values_are_shown_as_json(value: object, text: str) -> None:
    assert strict_json.shown(value) == text
