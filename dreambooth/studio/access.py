"""Let only the page's own user reach the page: checks of Host, Origin and password.

Any web site that the user visits may send requests to 127.0.0.1 (as a form, a picture or a
websocket), or give its own name this address (DNS rebinding). The first kind carries a foreign
Origin, the second one a foreign Host. The checks stand in front of everything, websockets too,
because the library behind accepts any Host and any Origin.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Iterable
from http.cookies import CookieError, SimpleCookie
from typing import Final
from urllib.parse import parse_qs

from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from dreambooth.settings.studio_options import is_loopback
from dreambooth.studio import policy

LOGIN: Final = "/login"
TRY_S: Final = 1.0
"""Seconds that each try of a password takes; one is made at a time."""

_COOKIE: Final = "dreambooth_studio"
_HOST: Final = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")
_SAFE_METHODS: Final = ("GET", "HEAD")
_MOST_LOGIN_BYTES: Final = 4_096
_MOST_WAITING_TRIES: Final = 8

log = logging.getLogger(__name__)


class Access:
    """An ASGI application that passes on what the page's user asks for, and refuses the rest."""

    def __init__(self, app: ASGIApp, *, password: str = "") -> None:
        self._app = app
        self._password = _digest(password) if password else None
        self._session = secrets.token_urlsafe(32)
        self._one_try = asyncio.Lock()
        self._tries = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request or websocket."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        send = policy.with_headers(send)
        fault = self._fault(scope)
        if fault is not None:
            log.warning("refused a request: %s", fault)
            await _refuse(scope, receive, send, PlainTextResponse(f"{fault}\n", 403))
        elif self._password is None or self._is_logged_in(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http" and scope["path"] == LOGIN and scope["method"] == "POST":
            await (await self._log_in(receive))(scope, receive, send)
        else:
            await _refuse(scope, receive, send, _login_page("", 401))

    def _fault(self, scope: Scope) -> str | None:
        """Return why a request may come from a foreign page, None if it cannot."""
        hosts = _values(scope, b"host")
        found = _HOST.fullmatch(hosts[0].lower()) if len(hosts) == 1 else None
        if found is None:
            return "a request needs one Host."
        # Who logs in under another name has meant it: that name has no cookie of ours.
        if self._password is None and not is_loopback(found[1].strip("[]")):
            return "the Host is not this machine's own: open the page as http://127.0.0.1."
        # A picture or a frame of a foreign page has no Origin; a link that is followed is no fault.
        sites, modes = _values(scope, b"sec-fetch-site"), _values(scope, b"sec-fetch-mode")
        if {*sites} & {"cross-site", "same-site"} and modes != ["navigate"]:
            return "another web site has asked for it."
        origins = _values(scope, b"origin")
        if not origins:
            if scope["type"] == "websocket" or scope["method"] not in _SAFE_METHODS:
                return "the request names no Origin, as browsers do."
        elif {origin.lower() for origin in origins} - {
            f"{scheme}://{hosts[0].lower()}" for scheme in ("http", "https")
        }:
            return "the request comes from another web site."
        return None

    def _is_logged_in(self, scope: Scope) -> bool:
        return any(
            hmac.compare_digest(_digest(value), _digest(self._session))
            for header in _values(scope, b"cookie")
            for value in _cookies(header)
        )

    async def _log_in(self, receive: Receive) -> Response:
        """Answer one try of the password; tries wait for each other, so that guessing is slow."""
        given = parse_qs((await _body(receive)).decode("latin-1")).get("password", [""])[0]
        if self._tries >= _MOST_WAITING_TRIES:
            return _login_page("Too many tries at once: wait a little.", 429)
        self._tries += 1
        try:
            async with self._one_try:
                await asyncio.sleep(TRY_S)
        finally:
            self._tries -= 1
        if self._password is None or not hmac.compare_digest(_digest(given), self._password):
            log.warning("a wrong password was given")
            return _login_page("This is not the password.", 401)
        reply = RedirectResponse("/", 303)
        reply.set_cookie(_COOKIE, self._session, httponly=True, samesite="strict")
        return reply


def _digest(text: str) -> bytes:
    """Return a hash of a fixed length: comparing two of them does not tell how long a text is."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name]


def _cookies(header: str) -> Iterable[str]:
    try:
        found = SimpleCookie(header).get(_COOKIE)
    except CookieError:
        return ()
    return () if found is None else (found.value,)


async def _body(receive: Receive) -> bytes:
    body = b""
    while len(body) <= _MOST_LOGIN_BYTES:
        message = await receive()
        body += message.get("body", b"")
        if message["type"] != "http.request" or not message.get("more_body"):
            break
    return body[:_MOST_LOGIN_BYTES]


async def _refuse(scope: Scope, receive: Receive, send: Send, reply: Response) -> None:
    if scope["type"] == "websocket":  # before it is accepted, a server answers this with 403
        await receive()
        await send({"type": "websocket.close", "code": 1008})
    else:
        await reply(scope, receive, send)


def _login_page(fault: str, status: int) -> Response:
    """Return the form for the password; `fault` is a sentence of ours."""
    return HTMLResponse(
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>DreamBooth studio</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }}
main {{ max-width: 24rem; margin: 4rem auto; padding: 0 1rem }}</style></head>
<body><main><h1>DreamBooth studio</h1><form method="post" action="{LOGIN}">
<p><label for="password">Password</label><br>
<input id="password" name="password" type="password" autocomplete="current-password" required></p>
<p role="alert">{fault}</p><button>Open</button></form></main></body></html>""",
        status,
    )
