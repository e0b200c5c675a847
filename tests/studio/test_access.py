from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import re
import time

import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from dreambooth.studio import access
from dreambooth.studio.access import LOGIN, Access
from tests.studio.asgi import HOST, ORIGIN, handshake, send, sent

PASSWORD = "correct horse battery"


async def page(scope: Scope, receive: Receive, send: Send) -> None:
    """Stand in for the page: it accepts any Host and any Origin, as its library does."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        return
    headers = {"Access-Control-Allow-Origin": "*", "x-frame-options": "ALLOWALL"}
    await PlainTextResponse("page", headers=headers)(scope, receive, send)


@pytest.mark.parametrize("host", [HOST, "localhost:7860", "LOCALHOST", "[::1]:9000", "127.0.0.2"])
def test_the_machines_own_names_are_answered_on_any_port(host: str) -> None:
    assert send(Access(page), "GET", "/", host=host, origin=None).body == b"page"
    assert send(Access(page), "POST", "/", host=host, origin=f"http://{host}").status == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:7860", "127.0.0.1.evil.example", "localhost.evil.example"),
        *("evil.example:127.0.0.1", "10.0.0.1", "0.0.0.0", "2130706433", "127.0.0.1@evil.example"),
        *("127.0.0.1:7860/x", "localhost:7860#", " 127.0.0.1", "127.0.0.1,evil", "[::1", "", None),
    ],
)
def test_a_foreign_host_is_refused(host: str | None) -> None:
    assert send(Access(page), "GET", "/", host=host, origin=None).status == 403
    named = [("host", host)] if host else []
    assert handshake(Access(page), [*named, ("origin", ORIGIN)]) == "websocket.close"


def test_two_hosts_are_refused() -> None:
    more = [("host", "evil.example")]
    assert send(Access(page), "GET", "/", more=more).status == 403


@pytest.mark.parametrize(
    "origin",
    [
        *("http://evil.example", "null", "http://localhost:7860", "http://127.0.0.1:3000", "*"),
        *("http://127.0.0.1:7860.evil.example", "http://127.0.0.1:7860@evil.example", "file://"),
        *("http://127.0.0.1", "http://127.0.0.1:7860/", "ftp://127.0.0.1:7860"),
    ],
)
def test_a_foreign_origin_is_refused(origin: str) -> None:
    for method in ("GET", "POST", "OPTIONS", "DELETE"):
        reply = send(Access(page), method, "/", origin=origin)
        assert reply.status == 403
        assert "access-control-allow-origin" not in reply.headers
    assert handshake(Access(page), [("host", HOST), ("origin", origin)]) == "websocket.close"


def test_two_origins_are_refused() -> None:
    two = [("origin", ORIGIN), ("origin", "http://evil.example")]
    assert handshake(Access(page), [("host", HOST), *two]) == "websocket.close"


def test_what_changes_something_must_name_its_origin() -> None:
    assert send(Access(page), "GET", "/", origin=None).status == 200
    assert send(Access(page), "POST", "/", origin=None).status == 403
    assert handshake(Access(page), [("host", HOST)]) == "websocket.close"
    assert handshake(Access(page), [("host", HOST), ("origin", ORIGIN)]) == "websocket.accept"


def test_every_reply_carries_the_headers_and_opens_nothing_to_other_sites() -> None:
    for reply in (send(Access(page), "GET", "/"), send(Access(page), "GET", "/", host="evil")):
        policy = reply.headers["content-security-policy"]
        assert policy.startswith("default-src 'self';")
        assert "frame-ancestors 'none'" in policy
        assert "http" not in policy
        assert "*" not in policy
        assert reply.headers["x-frame-options"] == "DENY"
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert not [name for name in reply.headers if name.startswith("access-control")]


def test_a_page_that_shows_ours_as_a_picture_gets_nothing() -> None:
    for site, mode, status in (
        ("cross-site", "no-cors", 403),
        ("same-site", "no-cors", 403),
        ("cross-site", "navigate", 200),
        ("same-origin", "no-cors", 200),
        ("none", "navigate", 200),
    ):
        more = [("sec-fetch-site", site), ("sec-fetch-mode", mode)]
        assert send(Access(page), "GET", "/", origin=None, more=more).status == status


@pytest.mark.parametrize("packed", [False, True])
def test_only_the_scripts_of_the_page_itself_may_run(packed: bool) -> None:
    html = b"""<script src="/x.js"></script><script type="module">run("<b>")\n</script>
        <SCRIPT>more()</SCRIPT><img onerror="alert(1)">"""
    body = gzip.compress(html) if packed else html

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        encoding = [(b"content-encoding", b"gzip")] if packed else []
        headers = [(b"content-type", b"text/html; charset=utf-8"), *encoding]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for part in (body[:40], body[40:]):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    reply = send(Access(app), "GET", "/")
    assert reply.body == body
    named = re.findall("'sha256-([^']+)'", reply.headers["content-security-policy"])
    assert named == [
        base64.b64encode(hashlib.sha256(script).digest()).decode()
        for script in (b'run("<b>")\n', b"more()")
    ]
    script = reply.headers["content-security-policy"].partition("script-src")[2].partition(";")[0]
    assert "unsafe-inline" not in script


def logged_in(app: Access, password: str) -> str:
    """Give a password; return the cookie that the reply sets, "" if it sets none."""
    reply = send(app, "POST", LOGIN, body=[f"password={password}".replace(" ", "+").encode()])
    cookie = reply.headers.get("set-cookie", "")
    assert (reply.status == 303) == bool(cookie)
    return cookie


def test_with_a_password_only_its_cookie_opens_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "TRY_S", 0)
    app = Access(page, password=PASSWORD)
    named = {"host": "box.example:7860", "origin": "http://box.example:7860"}
    reply = send(app, "GET", "/", **named)
    assert (reply.status, b"<label" in reply.body, b"page" in reply.body) == (401, True, False)
    sites = [("host", named["host"]), ("origin", named["origin"])]
    assert handshake(app, sites) == "websocket.close"
    for wrong in ("", "x", PASSWORD + "x", PASSWORD[:-1], "%00", "ü"):
        assert logged_in(app, wrong) == ""
    cookie = logged_in(app, PASSWORD)
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert PASSWORD not in cookie
    pair = cookie.partition(";")[0]
    assert send(app, "GET", "/", more=[("cookie", f"a=b; {pair}")], **named).body == b"page"
    assert handshake(app, [*sites, ("cookie", pair)]) == "websocket.accept"
    for forged in (pair[:-1], f"{pair}x", "dreambooth_studio=", "dreambooth_studio", "=;=", "ü"):
        assert send(app, "GET", "/", more=[("cookie", forged)]).status == 401
    # The cookie of another start of the page.
    assert send(Access(page, password=PASSWORD), "GET", "/", more=[("cookie", pair)]).status == 401


def test_tries_are_slow_wait_for_each_other_and_do_not_pile_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(access, "TRY_S", 0.02)
    app = Access(page, password=PASSWORD)

    async def guess() -> list[int]:
        tries = (sent(app, "POST", LOGIN, body=[b"password=x"]) for _ in range(20))
        return [reply.status for reply in await asyncio.gather(*tries)]

    began = time.monotonic()
    found = asyncio.run(guess())
    assert time.monotonic() - began >= 8 * 0.02
    assert (found.count(401), found.count(429)) == (8, 12)


def test_a_long_login_is_cut() -> None:
    app = Access(page, password=PASSWORD)
    assert send(app, "POST", LOGIN, body=[b"x" * 3_000] * 1_000).status == 401
