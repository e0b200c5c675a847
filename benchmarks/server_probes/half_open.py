"""Hold half-open connections (no head, part of a head, dripping bodies) while /ping is asked."""

from __future__ import annotations

import selectors
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Final

from benchmarks.server_probes import processes
from benchmarks.server_probes.outcome import Figure, ProbeOutcome, percentile
from benchmarks.server_probes.server import Server

CLOSED_S: Final = 10.0
PING_MS: Final = 100.0
_PING_EVERY_S: Final = 0.05
_DRIP_EVERY_S: Final = 0.5
_GIVE_UP_S: Final = 30.0
_HEAD: Final = b"POST /invocations HTTP/1.1\r\nHost: x\r\n"
_BODY: Final = _HEAD + b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"


@dataclass(slots=True, kw_only=True)
class _Held:
    """One connection; closed_s: how long the server kept it open, None while it does."""

    connection: socket.socket
    opened: float
    drips: bool
    closed_s: float | None = None
    received: bytearray = field(default_factory=bytearray)


def run(server: Server, *, half_open: int = 1000, dripping: int = 100) -> ProbeOutcome:
    """Open the connections and hold them until the server closes them."""
    processes.allow_files(2 * (half_open + dripping) + 256)
    refused_before = _refused(server)
    stop, pings = threading.Event(), list[float]()
    pinging = threading.Thread(target=_ping, args=(server, stop, pings))
    held: list[_Held] = []
    try:
        for i in range(half_open):
            held.append(_open(server, _HEAD if i % 2 else b"", drips=False))
        held += [_open(server, _BODY, drips=True) for _ in range(dripping)]
        open_seen = server.metric("connections_open")
        pinging.start()
        _watch(held)
    finally:
        stop.set()
        for one in held:
            one.connection.close()
        if pinging.ident is not None:
            pinging.join()
    closed = [one.closed_s for one in held if one.closed_s is not None]
    return ProbeOutcome(
        probe="half_open",
        figures=(
            Figure(name="half_open", value=half_open),
            Figure(name="dripping", value=dripping),
            Figure(name="open_at_once", value=open_seen),
            Figure(name="never_closed", value=len(held) - len(closed), at_most=0),
            Figure(name="closed_after_max_s", value=max(closed, default=0.0), at_most=CLOSED_S),
            Figure(name="answered_408", value=sum(b" 408 " in one.received[:20] for one in held)),
            Figure(name="counted_by_guard", value=_refused(server) - refused_before),
            Figure(name="pings", value=len(pings), at_least=1),
            Figure(name="ping_p50_ms", value=percentile(pings, 50) * 1e3),
            Figure(name="ping_p99_ms", value=percentile(pings, 99) * 1e3, at_most=PING_MS),
            Figure(name="gauges_left", value=server.gauges_left(), at_most=0),
        ),
    )


def _open(server: Server, sent: bytes, *, drips: bool) -> _Held:
    connection = server.connect(sent)
    opened = time.monotonic()
    connection.setblocking(False)
    return _Held(connection=connection, opened=opened, drips=drips)


def _watch(held: list[_Held]) -> None:
    """Read replies and send drips until all connections are closed or _GIVE_UP_S is over."""
    end, next_drip = time.monotonic() + _GIVE_UP_S, time.monotonic()
    with selectors.DefaultSelector() as selector:
        for one in held:
            selector.register(one.connection, selectors.EVENT_READ, one)
        while selector.get_map() and time.monotonic() < end:
            for key, _ in selector.select(timeout=_DRIP_EVERY_S / 10):
                if _is_closed(key.data):
                    selector.unregister(key.fileobj)
            if time.monotonic() >= next_drip:
                next_drip += _DRIP_EVERY_S
                for one in held:
                    _drip(one)


def _is_closed(one: _Held) -> bool:
    try:
        came = one.connection.recv(65_536)
    except BlockingIOError:
        return False
    except OSError:
        came = b""
    one.received += came
    if came:
        return False
    one.closed_s = time.monotonic() - one.opened
    return True


def _drip(one: _Held) -> None:
    if one.drips and one.closed_s is None:
        try:
            one.connection.send(b" ")
        except BlockingIOError:
            pass
        except OSError:
            one.drips = False  # _is_closed finds out when it was closed


def _ping(server: Server, stop: threading.Event, seconds: list[float]) -> None:
    while not stop.wait(_PING_EVERY_S):
        reply = server.ping()
        assert reply.status == 200, reply
        seconds.append(reply.seconds)


def _refused(server: Server) -> float:
    return sum(n for name, n in server.metrics().items() if "connections_refused" in name)
