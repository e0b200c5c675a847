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
# What published clients write after `application/json;`. Their `verbose` has no effect.
_JSON_FORMAT_BY_WORD = {"jpeg": JSON_JPEG, "png": JSON_PNG}
_IMAGES = {"image/png": PNG, "image/*": PNG, "image/webp": WEBP}
_IMAGES |= dict.fromkeys(("image/jpeg", "image/jpg"), JPEG)
_JSON_RANGES = ("application/json", "application/*", "*/*")
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
_MediaRange = tuple[str, frozenset[str]]  # the type, and the bare words after it


def negotiate(
    accept: str | None, request: GenerationRequest, *, max_response_bytes: int
) -> ReplyFormat:
    """Choose a reply's format before any work: the client's first choice that is offered and fits.

    An absent or empty Accept means ``*/*``. Raises RequestError: 406 where nothing that is wanted
    is offered, 400 where what is offered cannot hold these pictures.
    """
    refusal: RequestError | None = None
    # Each format is checked once: a header may hold thousands of ranges of the same format.
    wanted = dict.fromkeys(_offered(media_range, request) for media_range in _wanted(accept))
    for format in wanted:
        if format is None:
            continue
        try:
            _check_fit(format, request, max_response_bytes)
        except RequestError as error:
            refusal = refusal or error
        else:
            return format
    offered = ", ".join(format.media_type for format in FORMATS)
    raise refusal or RequestError(
        f"Accept {printable(accept)} names nothing that is offered; offered are {offered}.", 406
    )


def _wanted(accept: str | None) -> list[_MediaRange]:
    """Return the media ranges of an Accept header, the one with the highest q first.

    Ranges with q=0 or a malformed q are left out.
    """
    found: list[tuple[float, _MediaRange]] = []
    for part in (accept or "").lower().split(","):
        media_type, *parameters = [field.strip() for field in part.split(";")]
        quality, words = 1.0, set[str]()
        for parameter in parameters:
            name, equals, value = (field.strip() for field in parameter.partition("="))
            if name == "q" and equals:
                quality = float(value) if _QUALITY.fullmatch(value) else 0.0
            elif name and not equals:
                words.add(name)
        if media_type and quality > 0:
            found.append((quality, (media_type, frozenset(words))))
    if not (accept or "").strip():
        return [("*/*", frozenset())]
    return [media_range for _, media_range in sorted(found, key=lambda entry: -entry[0])]


def _offered(media_range: _MediaRange, request: GenerationRequest) -> ReplyFormat | None:
    """Return the format that a media range stands for, None if there is none."""
    media_type, words = media_range
    words -= {"verbose"}
    if media_type in _JSON_RANGES and not words:
        return HUGGINGFACE if request.form == "huggingface" else NESTED
    if media_type == "application/json" and len(words) == 1:
        return _JSON_FORMAT_BY_WORD.get(next(iter(words)))
    return None if words else _IMAGES.get(media_type)


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
