"""Send with every reply what its page may load and run: nothing but its own.

The page's library builds its parts from texts in the browser, hence 'unsafe-eval', and makes styles
as it goes. Its HTML has scripts inside: these are allowed by their hashes, so that no other script
runs, be it in an attribute or put in later.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import re
from collections.abc import Iterable
from typing import Final

from starlette.types import Message, Send

_POLICY: Final = (
    "default-src 'self'; script-src 'self' 'unsafe-eval'{hashes}; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data:; font-src 'self' data:; "
    "connect-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-src 'none'; worker-src 'none'; manifest-src 'none'; frame-ancestors 'none'"
)
_NAME: Final = b"content-security-policy"
_HEADERS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    # Without any referrer, browsers would send `Origin: null` with a form.
    (b"referrer-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
)
_SCRIPT: Final = re.compile(rb"<script\b([^>]*)>(.*?)</script", re.DOTALL | re.IGNORECASE)
_SOURCE: Final = re.compile(rb"\bsrc\s*=", re.IGNORECASE)


def with_headers(send: Send) -> Send:
    """Return a `send` that adds our headers to one reply and takes out what opens it to others.

    A reply with a policy of its own keeps it. HTML is held until it is whole, for its hashes.
    """
    held: list[Message] = []

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            start = _closed(message)
            if not _has(start, _NAME, b"") and _has(start, b"content-type", b"text/html"):
                held.append(start)
                return
            message = start if _has(start, _NAME, b"") else _with_policy(start, ())
        elif held:
            held.append(message)
            if message.get("more_body"):
                return
            html = b"".join(part.get("body", b"") for part in held[1:])
            is_packed = _has(held[0], b"content-encoding", b"gzip")
            hashes = _script_hashes(gzip.decompress(html) if is_packed else html)
            await send(_with_policy(held[0], hashes))
            message = {"type": "http.response.body", "body": html}
            held.clear()
        await send(message)

    return send_with_headers


def _closed(start: Message) -> Message:
    ours = {name for name, _ in _HEADERS}
    kept = [
        (name, value)
        for name, value in start.get("headers", ())
        if name.lower() not in ours and not name.lower().startswith(b"access-control-")
    ]
    return {**start, "headers": [*kept, *_HEADERS]}


def _has(start: Message, name: bytes, beginning: bytes) -> bool:
    return any(
        key.lower() == name and value.lower().startswith(beginning)
        for key, value in start["headers"]
    )


def _with_policy(start: Message, hashes: Iterable[str]) -> Message:
    policy = _POLICY.format(hashes="".join(f" 'sha256-{found}'" for found in hashes))
    return {**start, "headers": [*start["headers"], (_NAME, policy.encode())]}


def _script_hashes(html: bytes) -> list[str]:
    """Return the hashes of the scripts that stand in a page, as its policy names them."""
    return [
        base64.b64encode(hashlib.sha256(content).digest()).decode()
        for attributes, content in _SCRIPT.findall(html)
        if not _SOURCE.search(attributes)
    ]
