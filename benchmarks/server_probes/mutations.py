"""Make requests that are nearly right: good ones with random changes to bytes, headers and heads.

`broken_head` changes whole heads, so that nobody can say where the body ends. `broken_request`
keeps the head well-formed and breaks anything else.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Final

from dreambooth.serving.contract import openapi

_SMALL: Final = {"width": 64, "height": 64, "num_inference_steps": 1, "num_images_per_prompt": 1}
_EVERY_KEY: Final = openapi.document()["paths"]["/invocations"]["post"]["requestBody"]["content"][
    "application/json"
]["examples"]["every key"]
_BODIES: Final = (
    b"a cat",
    b'"a cat"',
    json.dumps({"prompt": "a cat", **_SMALL}).encode(),
    json.dumps({"prompt": ["a", "b"], "negative_prompt": ["c", "d"], **_SMALL}).encode(),
    json.dumps({"inputs": "a cat", "parameters": {**_SMALL, "seed": 2**64 - 1}}).encode(),
    json.dumps({**_EVERY_KEY["value"], **_SMALL, "prompt": "a", "eta": 0.5}).encode(),
    json.dumps({**dict.fromkeys(_EVERY_KEY["value"]), **_SMALL, "prompt": "a"}).encode(),
    json.dumps({"prompt": "a cat", "num_inference_steps": 999, "width": 2_048}).encode(),
)
_TYPES: Final = (
    *("application/json", "application/json; charset=utf-8", "APPLICATION/JSON;charset=UTF-8"),
    *(
        "application/x-text",
        "application/x-text; charset=utf-8",
        "application/json; charset=utf-16",
    ),
    *("text/plain", "application/octet-stream", "image/png", "multipart/form-data; boundary=x"),
    *("application/x-www-form-urlencoded", "application/json;;;", "application/", "", "*/*"),
    *("application/json, application/x-text", "application/json; charset=" + "x" * 500),
)
_ACCEPTS: Final = (
    *("application/json", "application/json;jpeg", "application/json;png", "image/png"),
    *("image/jpeg", "image/webp", "*/*", "", "text/html", "image/*", "application/*;q=0"),
    *("application/json;q=0.1, image/png;q=0.9", "application/json;jpeg;verbose", "a/b" * 300),
    *(";;;,,,", "application/json;q=nan", "image/png;q=1e999", "*"),
    *("*/*;q=0", "image/*;q=0, image/png", "image/png;q=0, */*", "application/json;jpeg;q=0, */*"),
    *("*/*, application/json;q=0", "image/*;q=0.5, image/webp;q=0.5", "image/png;q=0.001"),
)
_ENCODINGS: Final = ("identity", "gzip", "br", "deflate, gzip", "", "GZIP", "x" * 200)
_METHODS: Final = ("GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "QUERY")
_PATHS: Final = (
    *("/ping", "/metrics", "/openapi.json", "/execution-parameters", "/", "//invocations"),
    *("/invocations/", "/invocations?x=1", "/%69nvocations", "/../invocations", "/" + "a" * 2_000),
    *("/%00", "/%ff%fe", "/ping#x", "/models", "/invocations;x"),
)
_TOKENS: Final = (
    *(b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-0", b"0.0", b"true", b"null", b"[]", b"{}"),
    *(b"9" * 5_000, b"-1", b"18446744073709551616", b"1e400", b"64.0", b"4096", b"999", b"1000"),
    *(b'"\\ud800"', b"\\u0000", b"\xef\xbb\xbf", b"\xff\xfe", b"\x00", b"\xed\xa0\x80", b"\r\n"),
    *(b"[" * 2_000, b'{"a":' * 500, b'"prompt":"x",', b'"width":8,', b",", b'"', b"\\", b"]" * 9),
    *(b'"seed":-1,', b'"seed":1.5,', b'"batch_size":0,', b"/* */", b"'", b"a" * 11_000),
)
_HEAD_TOKENS: Final = (
    *(b"\r\n", b"\n", b"\r", b"\x00", b" ", b"\t", b":", b"\xff", b"HTTP/1.1", b"HTTP/9.9", b";"),
    *(b"Transfer-Encoding: chunked\r\n", b"Content-Length: 5\r\n", b"Content-Length: -1\r\n"),
    *(b"Content-Length: 99999999999999999999\r\n", b"Expect: 100-continue\r\n", b"Host: y\r\n"),
    *(b"Connection: upgrade\r\nUpgrade: h2c\r\n", b"Connection: close\r\n", b"X: " + b"y" * 40_000),
    *(b"Transfer-Encoding: gzip\r\n", b"A: b\r\n" * 120, b"POST / HTTP/1.1\r\n\r\n", b"CONNECT x "),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One request as bytes; method: needed to read the reply."""

    method: str
    sent: bytes


def broken_request(generator: random.Random) -> Case:
    """Return a request with a well-formed head; anything else in it may be wrong."""
    method, path = "POST", "/invocations"
    if generator.random() < 0.1:
        method = generator.choice(_METHODS)
    if generator.random() < 0.1:
        path = generator.choice(_PATHS)
    body = _mutated(generator, generator.choice(_BODIES), _TOKENS)
    headers = {"Content-Type": _or_random(generator, _TYPES), "Accept": generator.choice(_ACCEPTS)}
    if generator.random() < 0.05:
        headers["Content-Encoding"] = generator.choice(_ENCODINGS)
    for name in tuple(headers):
        if generator.random() < 0.05:
            del headers[name]
    chunked = generator.random() < 0.1
    if chunked:
        headers["Transfer-Encoding"] = "chunked"
        body = _chunked(generator, body)
    else:
        headers["Content-Length"] = str(len(body))
    return Case(method=method, sent=_head(method, path, headers) + body)


def broken_head(generator: random.Random) -> Case:
    """Return a request whose head was changed byte by byte, so that its end is unknown."""
    body = generator.choice(_BODIES)
    headers = {
        "Content-Type": generator.choice(_TYPES[:5]),
        "Accept": "application/json;jpeg",
        "Content-Length": str(len(body)),
    }
    if generator.random() < 0.1:
        headers["Content-Length"] = str(max(0, len(body) + generator.randint(-20, 20)))
    head = _mutated(generator, _head("POST", "/invocations", headers), _HEAD_TOKENS)
    return Case(method="HEAD" if head.startswith(b"HEAD ") else "POST", sent=head + body)


def _head(method: str, path: str, headers: dict[str, str]) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: x", *(f"{n}: {v}" for n, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _mutated(generator: random.Random, data: bytes, tokens: tuple[bytes, ...]) -> bytes:
    """Return the data with one to four changes, now and then with none."""
    changed = bytearray(data)
    for _ in range(generator.choice((0, 1, 1, 1, 2, 2, 3, 4))):
        start = generator.randrange(len(changed) + 1)
        stop = min(len(changed), start + generator.choice((0, 1, 1, 2, 5, 20)))
        kind = generator.randrange(6)
        if kind == 0:
            changed[start:stop] = b""
        elif kind == 1:
            changed[start:stop] = generator.choice(tokens)
        elif kind == 2:
            changed[start:start] = generator.choice(tokens)
        elif kind == 3:
            changed[start:stop] = generator.randbytes(stop - start)
        elif kind == 4:
            changed[start:start] = changed[start:stop] * generator.choice((1, 2, 50))
        elif stop > start:
            changed[start] ^= 1 << generator.randrange(8)
    return bytes(changed)


def _or_random(generator: random.Random, values: tuple[str, ...]) -> str:
    """Return mostly a value that the server accepts, and sometimes any value."""
    if generator.random() < 0.7:
        return generator.choice(values[:5])
    return generator.choice(values)


def _chunked(generator: random.Random, body: bytes) -> bytes:
    sent, rest = bytearray(), body
    while rest:
        size = generator.randint(1, len(rest))
        sent += b"%x\r\n" % size + rest[:size] + b"\r\n"
        rest = rest[size:]
    return bytes(sent) + b"0\r\n\r\n"
