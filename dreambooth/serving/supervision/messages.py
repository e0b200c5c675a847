"""Define the messages between the server process and the engine process, and their bytes.

The server sends Generate, Cancel and Close. The engine sends Ready or LoadFailed once, then a Drawn
per picture as each is finished, and a Done or a Failed at the end of each request that was not
cancelled. From its start on it sends an EngineStatus about twice a second, and whenever a request
ends.

A frame is ``DBf1``, the header's length and the payload's (both uint32, network order), the header
(one JSON object: the message's kind and its fields) and the payload (the RGB bytes of a Drawn's
picture, whose header has their shape, else empty). Pickle is not used: a frame can hold nothing but
these messages. Every field is checked against its annotation, and a mismatch raises WireError. This
module needs no torch.
"""

from __future__ import annotations

import json
import math
import struct
import types
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt

from dreambooth.diffusion.sampling_request import SamplingRequest
from dreambooth.errors import (
    DreamBoothError,
    ModelArtifactError,
    RequestError,
    ResourceError,
    UnavailableError,
    UserError,
)
from dreambooth.limits import LIMITS, MIB
from dreambooth.serving.contract.engine_status import EngineStatus
from dreambooth.serving.contract.reply import Picture

# The 128 texts of 64 pictures, of 4,000 characters each, take 3 MB if all are escaped.
MAX_HEADER_BYTES: Final = 16 * MIB
MAX_PAYLOAD_BYTES: Final = 3 * LIMITS.max_generated_pixels

_MAGIC: Final = b"DBf1"
_PREFIX: Final = struct.Struct("!4sII")
PREFIX_BYTES: Final = _PREFIX.size


class WireError(Exception):
    """Bytes are no frame or no message of ours, or a message is too long for a frame."""


class EngineFaultError(RuntimeError):
    """An error in the engine that is our fault; the log has its trace, the client no details."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate:
    """The command to draw the pictures of one request.

    batch_size: the most of them in one U-Net call, None without a limit.
    """

    request_id: int
    pictures: tuple[SamplingRequest, ...]
    batch_size: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """The command to stop a request at the next step, since nobody waits for it any more."""

    request_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """The command to drop all remaining work and exit with 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The message that the model is loaded and has drawn a warm-up picture.

    seconds_per_call: (rows, seconds) of U-Net calls, measured at the model's own resolution.
    seconds_per_decode: of one picture. rows: the most rows that one call will have.
    """

    seconds_per_call: tuple[tuple[int, float], ...]
    seconds_per_decode: float
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """One finished picture of a request."""

    request_id: int
    index: int
    picture: Picture


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The message that all pictures of a request have been sent."""

    request_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """An error as it is sent between processes: class name, message and numbers."""

    error: str
    message: str
    status: int | None = None
    retry_after_s: float | None = None

    @classmethod
    def of(cls, error: BaseException) -> Fault:
        """Describe an error; of one that is no DreamBoothError keep only the class name."""
        if not isinstance(error, DreamBoothError):
            return cls(error=EngineFaultError.__name__, message=type(error).__name__)
        return cls(
            error=type(error).__name__,
            message=str(error),
            status=error.status if isinstance(error, RequestError) else None,
            retry_after_s=error.retry_after_s if isinstance(error, UnavailableError) else None,
        )

    def exception(self) -> Exception:
        """Return the error as an exception, EngineFaultError for a class unknown here."""
        if self.error == RequestError.__name__:
            return RequestError(self.message, 400 if self.status is None else self.status)
        if self.error == UnavailableError.__name__:
            return UnavailableError(self.message, self.retry_after_s or 1.0)
        known = {kind.__name__: kind for kind in (UserError, ModelArtifactError, ResourceError)}
        return known.get(self.error, EngineFaultError)(self.message)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFailed:
    """The message that the engine could not be opened; its process ends after this."""

    fault: Fault


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The message that a request ended in an error."""

    request_id: int
    fault: Fault


ToEngine = Generate | Cancel | Close
FromEngine = Ready | LoadFailed | Drawn | Done | Failed | EngineStatus
_KINDS: Final = {
    kind.__name__: kind for union in (ToEngine, FromEngine) for kind in get_args(union)
}


def pack(message: ToEngine | FromEngine) -> tuple[bytes, bytes | memoryview]:
    """Return a message's bytes in two parts: the prefix with the header, and the payload.

    Raises WireError for a message that is too long for a frame.
    """
    content = {"kind": type(message).__name__, **_plain(message)}
    text = json.dumps(content, allow_nan=False, ensure_ascii=False)
    header = text.encode("utf-8", "surrogatepass")  # as json.loads decodes
    payload = message.picture.pixels.data.cast("B") if isinstance(message, Drawn) else b""
    _check_lengths(len(header), len(payload))
    return _PREFIX.pack(_MAGIC, len(header), len(payload)) + header, payload


def unpack(header: bytes, payload: bytes | bytearray, kinds: Any) -> ToEngine | FromEngine:
    """Return the message, of the union `kinds`, in the two parts of a frame, or raise WireError."""
    try:
        content = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise WireError(f"a header is not JSON: {error}") from error
    named = content.pop("kind", None) if isinstance(content, dict) else None
    kind = _KINDS.get(named) if isinstance(named, str) else None
    if kind is None or kind not in get_args(kinds):
        raise WireError(f"a message of the kind {str(named)[:80]!r} is not expected here")
    if payload and kind is not Drawn:
        raise WireError(f"{kind.__name__} came with a payload")
    message: ToEngine | FromEngine = _read(kind, content, kind.__name__, payload)
    return message


def lengths(prefix: bytes | bytearray) -> tuple[int, int]:
    """Return the lengths of a frame's header and payload in bytes, or raise WireError."""
    magic, header, payload = _PREFIX.unpack(prefix)
    if magic != _MAGIC:
        raise WireError(f"a frame begins with {magic!r}")
    _check_lengths(header, payload)
    return header, payload


def _check_lengths(header: int, payload: int) -> None:
    if header > MAX_HEADER_BYTES or payload > MAX_PAYLOAD_BYTES:
        raise WireError(f"a frame of {header} + {payload} bytes is too long")


@cache
def _hints(kind: Any) -> dict[str, Any]:
    """Return the annotations of a message's fields."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _plain(value: Any) -> Any:
    """Return what stands for a value in JSON: an object for a dataclass, its shape for an array."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return value.shape
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return value


def _read(wanted: Any, value: Any, where: str, payload: bytes | bytearray) -> Any:
    """Return a value from JSON as an object of the annotation `wanted`, or raise WireError.

    payload: the bytes of an array, whose shape is the value.
    """
    origin, arguments = get_origin(wanted), get_args(wanted)
    if is_dataclass(wanted) and isinstance(wanted, type) and isinstance(value, dict):
        hints = _hints(wanted)
        if value.keys() == hints.keys():
            read = {n: _read(h, value[n], f"{where}.{n}", payload) for n, h in hints.items()}
            return wanted(**read)
    elif origin is tuple and isinstance(value, list):
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) == len(value):
            pairs = zip(kinds, value, strict=True)
            return tuple(_read(kind, item, where, payload) for kind, item in pairs)
    elif origin is np.ndarray:
        return _pixels(value, where, payload)
    elif origin in (Union, types.UnionType):  # in our messages always X | None
        inner = next(argument for argument in arguments if argument is not types.NoneType)
        return None if value is None else _read(inner, value, where, payload)
    elif origin is Literal and value in arguments:
        return value
    elif wanted is float:
        if type(value) is float and math.isfinite(value):
            return value
        if type(value) is int and value.bit_length() < 1000:
            return float(value)
    elif type(value) is wanted:
        return value
    raise WireError(f"{where} cannot be {str(value)[:80]!r}")


def _pixels(shape: Any, where: str, payload: bytes | bytearray) -> npt.NDArray[np.uint8]:
    """Return the payload as pixels [H, W, 3] of this shape, without a copy."""
    height, width, channels = _read(tuple[int, int, int], shape, where, b"")
    if min(height, width) < 1 or channels != 3 or len(payload) != 3 * height * width:
        raise WireError(f"{len(payload)} bytes are no {width} x {height} picture")
    return np.frombuffer(payload, np.uint8).reshape(height, width, 3)
