"""Turn errors into replies: one JSON body for every fault, with a request id."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Final

from dreambooth.errors import RequestError, ResourceError, UnavailableError

INTERNAL_ERROR: Final = "internal error"


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorReply:
    """One fault as the client sees it.

    retry_after_s: seconds until the client may ask again. allow: the methods that the path takes,
    for a request with another one.
    """

    status: int
    type: str
    message: str
    retry_after_s: float | None = None
    allow: str | None = None

    def body(self, request_id: str) -> bytes:
        """Return the JSON object that replies of every status from 400 on have as their body."""
        fields: dict[str, object] = {
            "code": self.status,
            "type": self.type,
            "message": self.message,
            "error": self.message,  # the Hugging Face hub's client shows only this
            "request_id": request_id,
        }
        if self.retry_after_s is not None:
            fields["retry_after_s"] = round(self.retry_after_s, 3)
        return json.dumps(fields).encode("ascii")


def new_request_id() -> str:
    """Return twelve random hexadecimal digits: short enough to read out, yet in practice unique."""
    return secrets.token_hex(6)


def of(error: Exception) -> ErrorReply:
    """Return the reply for an exception.

    RequestError and ResourceError give their own message. All others give `internal error`: no
    client can mend them, and they may name folders of this machine.
    """
    if isinstance(error, RequestError):
        status = error.status
    elif isinstance(error, UnavailableError):
        return ErrorReply(
            status=503,
            type=UnavailableError.__name__,
            message=str(error),
            retry_after_s=error.retry_after_s,
        )
    elif isinstance(error, ResourceError):
        status = 507
    else:
        return ErrorReply(status=500, type="InternalError", message=INTERNAL_ERROR)
    return ErrorReply(status=status, type=type(error).__name__, message=str(error))
