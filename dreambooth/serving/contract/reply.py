"""Choose the format of a reply by the Accept header, and encode pictures in it."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from dreambooth.errors import RequestError
from dreambooth.serving.contract import nested_lists
from dreambooth.serving.contract.request import SEED_COUNT, GenerationRequest
from dreambooth.serving.contract.strict_json import printable

FinishReason = Literal["SUCCESS", "CONTENT_FILTERED", "NOT_FINITE", "BLACK"]
FINISH_REASONS: tuple[FinishReason, ...] = get_args(FinishReason)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Picture:
    """One finished picture, as the engine returns it.

    pixels: uint8 [H, W, 3], 0..255, contiguous; zeros unless finish_reason is SUCCESS. seed: the
    one it was drawn with. exact: False where its U-Net calls had to be halved for lack of memory,
    so that exact mode did not hold.
    """

    pixels: npt.NDArray[np.uint8]
    seed: int
    finish_reason: FinishReason
    exact: bool = True


Kind = Literal["nested", "base64", "raw"]
Codec = Literal["PNG", "JPEG", "WEBP"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyFormat:
    """The form of a reply: lists of numbers or base64 text in JSON, or one picture's bytes.

    codec: Pillow's name of the picture format, None for numbers. media_type: of the reply.
    """

    kind: Kind
    codec: Codec | None
    media_type: str


NESTED = ReplyFormat(kind="nested", codec=None, media_type="application/json")
JSON_JPEG = ReplyFormat(kind="base64", codec="JPEG", media_type="application/json;jpeg")
JSON_PNG = ReplyFormat(kind="base64", codec="PNG", media_type="application/json;png")
PNG = ReplyFormat(kind="raw", codec="PNG", media_type="image/png")
JPEG = ReplyFormat(kind="raw", codec="JPEG", media_type="image/jpeg")
WEBP = ReplyFormat(kind="raw", codec="WEBP", media_type="image/webp")
FORMATS = (NESTED, JSON_JPEG, JSON_PNG, PNG, JPEG, WEBP)
# The Hugging Face toolkit's application/json: base64 PNG without an object around it.
HUGGINGFACE = ReplyFormat(kind="base64", codec="PNG", media_type="application/json")
# Pillow's options. Measured 2026-11-22 on one core of an x86 CPU, a soft and a noisy picture of
# 512 x 512: JPEG 0.9 to 1.9 ms; PNG 50 ms at level 1, up to 336 ms at 6; WebP 38 ms, 80 by default.
_OPTIONS: dict[Codec, dict[str, int]] = {
    "PNG": {"compress_level": 1},
    "JPEG": {"quality": 95},
    "WEBP": {"quality": 90, "method": 0},
}
# The most pixels that one byte can hold. Deflate shrinks to 1/1032 at best; 16 x 16 pixels of JPEG
# take at least four luma blocks of 6 bits and two chroma blocks of 4.
_MOST_PIXELS_PER_BYTE: dict[Codec, int] = {"PNG": 1032 // 3, "JPEG": 64}
# JPEG of at most this many pixels takes at most 2 ms. A thread would add 0.4 ms where
# cores are free, and several ms (the scheduler's time slices) where they are not.
_QUICK_PIXELS = 512 * 512
_QUALITY = re.compile(r"[01](\.\d*)?")


def negotiate(
    accept: str | None, request: GenerationRequest, *, max_response_bytes: int
) -> ReplyFormat:
    """Choose a reply's format before any work: the client's first choice that is offered and fits.

    An absent or empty Accept means ``*/*``. Raises RequestError: 406 where nothing that is wanted
    is offered, 400 where what is offered cannot hold these pictures. In place of JSON that does
    not fit, ``*/*`` gives no bare picture, which who named JSON could not read.
    """
    refusal: RequestError | None = None
    for media_range, format in _wanted(accept):
        if refusal is not None and media_range == "*/*" and format.kind == "raw":
            continue
        if format is NESTED and request.form == "huggingface":
            format = HUGGINGFACE
        try:
            _check_fit(format, request, max_response_bytes)
        except RequestError as error:
            refusal = refusal or error
        else:
            return format
    offered = ", ".join(format.media_type for format in FORMATS)
    raise refusal or RequestError(
        f"Accept {printable(accept or '')} names nothing that is offered; offered are {offered}.",
        406,
    )


def _wanted(accept: str | None) -> list[tuple[str, ReplyFormat]]:
    """Return the formats that an Accept header asks for, each with its range, best first.

    By RFC 9110, section 12.5.1, the most specific range that matches a format decides on its
    quality, and q=0 refuses it. A range stands for the first format that it decides on. Of equal
    quality the named formats come before those of wildcards, then the header's order counts.
    """
    qualities = _qualities(accept or "") if (accept or "").strip() else {"*/*": 1.0}
    wanted: dict[str, ReplyFormat] = {}
    for format in FORMATS:
        whole = format.media_type
        kind = whole.partition(";")[0]
        for media_range in (whole, kind, kind.partition("/")[0] + "/*", "*/*"):
            if media_range in qualities:
                wanted.setdefault(media_range, format)
                break
    found = [(name, wanted[name]) for name, q in qualities.items() if q > 0 and name in wanted]
    return sorted(found, key=lambda entry: (-qualities[entry[0]], entry[0].endswith("*")))


def _qualities(accept: str) -> dict[str, float]:
    """Return the quality of each media range of an Accept header, in its order.

    The words of published clients belong to a range, as in ``application/json;jpeg``, but their
    `verbose` has no effect, nor have other parameters. Ranges with a malformed q are left out.
    """
    found: dict[str, float] = {}
    for part in accept.lower().split(","):
        media_type, *parameters = [field.strip() for field in part.split(";")]
        quality, words = "1", set[str]()
        for parameter in parameters:
            name, equals, value = (field.strip() for field in parameter.partition("="))
            if name == "q" and equals:
                quality = value
            elif name not in ("", "verbose") and not equals:
                words.add(name)
        if media_type == "image/jpg":
            media_type = "image/jpeg"
        if _QUALITY.fullmatch(quality):
            media_range = ";".join((media_type, *sorted(words)))
            found[media_range] = max(min(float(quality), 1.0), found.get(media_range, 0.0))
    return found


def _check_fit(format: ReplyFormat, request: GenerationRequest, max_response_bytes: int) -> None:
    """Refuse pictures that the format cannot hold, or whose reply would be too long.

    Nested lists vary little, so the longest ones must fit; of picture files the shortest must.
    """
    count, size = request.picture_count, f"{request.width} x {request.height}"
    if format.kind == "raw" and count > 1:
        raise RequestError(
            f"{format.media_type} holds one picture, and {count} are asked for: accept "
            f"{JSON_PNG.media_type} or {JSON_JPEG.media_type}, or ask for one picture."
        )
    length = count * _bytes_to_expect(format, request)
    if format.kind != "raw":
        longest = format.kind == "nested"  # as `_bytes_to_expect` does
        fields = _ReplyFields(
            seeds=[SEED_COUNT - 1 if longest else 0] * count,
            finish_reasons=[(max if longest else min)(FINISH_REASONS, key=len)] * count,
            exact=not longest,
        )
        length += len(_in_json(request, [b""] * count, fields))
    if length <= max_response_bytes:
        return
    if format.kind == "nested":
        as_jpeg = request.width * request.height * count // 2
        also = ", or" if as_jpeg <= max_response_bytes else " and"
        raise RequestError(
            f"{count} picture(s) of {size} pixels as nested lists take up to {length} bytes, and a "
            f"reply may have {max_response_bytes}: accept {JSON_JPEG.media_type} (some {as_jpeg} "
            f"bytes){also} ask for fewer or smaller pictures."
        )
    raise RequestError(
        f"{count} picture(s) of {size} pixels take at least {length} bytes as {format.media_type}, "
        f"and a reply may have {max_response_bytes}: ask for fewer or smaller pictures."
    )


def _bytes_to_expect(format: ReplyFormat, request: GenerationRequest) -> int:
    """Return the fewest bytes a picture can take; for nested lists, which vary little, the most."""
    width, height = request.width, request.height
    if format.codec is None:
        return nested_lists.most_bytes(width, height)
    if format.codec not in _MOST_PIXELS_PER_BYTE:
        return 0
    fewest = width * height // _MOST_PIXELS_PER_BYTE[format.codec]
    return fewest if format.kind == "raw" else fewest * 4 // 3


def is_quick(pictures: Sequence[Picture], format: ReplyFormat) -> bool:
    """Return whether `encode` may run in the event loop, which it then blocks for 2 ms at most."""
    pixels = sum(picture.pixels.size for picture in pictures) // 3
    return format.codec == "JPEG" and pixels <= _QUICK_PIXELS


def encode(
    request: GenerationRequest,
    pictures: Sequence[Picture],
    format: ReplyFormat,
    *,
    max_response_bytes: int | None = None,
) -> tuple[bytes, str]:
    """Return the reply's body and content type. Run it in a thread unless `is_quick`.

    Raises RequestError (400) for a body of more than `max_response_bytes` (None: no limit): the
    length of picture files is known only now, and SageMaker would cut a longer body off.

    JSON forms: ``generated_image`` (text) or ``generated_images``, ``prompt`` as it was sent,
    ``seeds``, ``finish_reasons`` and ``"exact": false`` where a picture is not exact. Hugging Face
    form: a base64 string, or a list of them where several pictures or a list of inputs are asked
    for. Raw formats: the picture's bytes.
    """
    if format.codec is None:
        in_json = [nested_lists.text(picture.pixels) for picture in pictures]
    else:
        files = [_file(picture.pixels, format.codec) for picture in pictures]
        if format.kind == "raw":
            _check_length(files[0], format, max_response_bytes)
            return files[0], format.media_type
        in_json = [b'"' + base64.b64encode(file) + b'"' for file in files]
    fields = _ReplyFields(
        seeds=[picture.seed for picture in pictures],
        finish_reasons=[picture.finish_reason for picture in pictures],
        exact=all(picture.exact for picture in pictures),
    )
    body = _in_json(request, in_json, fields)
    _check_length(body, format, max_response_bytes)
    return body, format.media_type


def _check_length(body: bytes, format: ReplyFormat, max_response_bytes: int | None) -> None:
    if max_response_bytes is None or len(body) <= max_response_bytes:
        return
    jpeg = JPEG if format.kind == "raw" else JSON_JPEG
    instead = "" if format.codec == "JPEG" else f"accept {jpeg.media_type}, "
    raise RequestError(
        f"The reply came to {len(body)} bytes as {format.media_type}, and one may have "
        f"{max_response_bytes} (--max_response_bytes): {instead}ask for fewer or smaller pictures."
    )


def _file(pixels: npt.NDArray[np.uint8], codec: Codec) -> bytes:
    """Return the bytes of the picture file of pixels uint8 [H, W, 3]."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=codec, **_OPTIONS[codec])
    return file.getvalue()


@dataclass(frozen=True, slots=True, kw_only=True)
class _ReplyFields:
    """The facts about its pictures that a JSON reply gives beyond the published keys."""

    seeds: Sequence[int]
    finish_reasons: Sequence[FinishReason]
    exact: bool


def _in_json(request: GenerationRequest, pictures: Sequence[bytes], fields: _ReplyFields) -> bytes:
    """Return the JSON reply; each of `pictures` is JSON text already."""
    listed = b"[" + b",".join(pictures) + b"]"
    if request.form == "huggingface":
        several = len(pictures) > 1 or isinstance(request.echo, tuple)
        return listed if several else pictures[0]
    if request.form == "json":
        images = b'"generated_images": ' + listed
    else:
        images = b'"generated_image": ' + pictures[0]
    rest: dict[str, object] = {
        "prompt": request.echo,
        "seeds": fields.seeds,
        "finish_reasons": fields.finish_reasons,
    }
    if not fields.exact:
        rest["exact"] = False
    return b"{" + images + b", " + json.dumps(rest).encode("ascii")[1:]
