"""Judge the replies to hostile requests and count the verdicts."""

from __future__ import annotations

import collections
import threading
from dataclasses import dataclass, field
from typing import Final

# No accepted request may last longer: the server is started with --request_timeout_s 1.
HANG_S: Final = 2.0
# The guard closes a request whose end never comes within this time.
UNFINISHED_S: Final = 10.0
TRACEBACK: Final = b"Traceback (most recent call last)"
_TOLD: Final = 5  # faults of each kind that are kept in full


@dataclass(slots=True)
class Verdicts:
    """The verdicts of one run; `note` may be called from any thread."""

    cases: collections.Counter[str] = field(default_factory=collections.Counter)
    statuses: collections.Counter[str] = field(default_factory=collections.Counter)
    wrong: collections.Counter[str] = field(default_factory=collections.Counter)
    faults: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(
        self,
        source: str,
        sent: bytes,
        status: int | None,
        body: bytes,
        seconds: float,
        *,
        unfinished: bool = False,
    ) -> None:
        """Count one case.

        status: None if the connection was closed without a reply, which is right only for an
        unfinished request. unfinished: the head may announce a body that never comes, so a 408 or a
        closed connection within `UNFINISHED_S` is right, too.
        """
        with self._lock:
            self.cases[source] += 1
            self.statuses[str(status or "closed")] += 1
            if status is not None and status >= 500 and status != 503:
                self._wrong("server_errors", source, sent, f"status {status}")
            if TRACEBACK in body:
                self._wrong("tracebacks", source, sent, "a traceback")
            if status is None and not unfinished:
                self._wrong("unanswered", source, sent, "no reply")
            waited_for = unfinished and status in (None, 408)
            if not waited_for:
                self.slowest_s = max(self.slowest_s, seconds)
            if seconds > (UNFINISHED_S if waited_for else HANG_S):
                self._wrong("hangs", source, sent, f"{seconds:.1f} s, status {status}")

    def violation(self, fault: str) -> None:
        """Count a reply that does not match /openapi.json."""
        with self._lock:
            self._wrong("undescribed", "schemathesis", b"", fault)

    def _wrong(self, kind: str, source: str, sent: bytes, fault: str) -> None:
        self.wrong[kind] += 1
        if self.wrong[kind] <= _TOLD:
            shown = f" for {sent[:2_000]!r}" if sent else ""
            self.faults.append(f"{kind} ({source}): {fault}{shown}")
