"""From pictures to a reply: which format the Accept header asks for, and its bytes."""

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
from dreambooth.serving.contract.request import SEEDS, GenerationRequest
from dreambooth.serving.contract.strict_json import shown

FinishReason = Literal["SUCCESS", "CONTENT_FILTERED", "NOT_FINITE", "BLACK"]
FINISH_REASONS: tuple[FinishReason, ...] = get_args(FinishReason)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Picture:
    """One picture as the engine hands it over.

    pixels: uint8 [H, W, 3], 0..255, contiguous; zeros unless finish_reason is SUCCESS. seed: the
    one it was drawn with. exact: False after an out-of-memory halving lifted exactness.
    """

    pixels: npt.NDArray[np.uint8]
    seed: int
    finish_reason: FinishReason
    exact: bool = True


Kind = Literal["nested", "base64", "raw"]
Codec = Literal["PNG", "JPEG", "WEBP"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyFormat:
    """How pictures are written: lists of numbers or base64 text in JSON, or one picture's bytes.

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
# What published clients write behind `application/json;`; verbose has no effect, there as here.
_WORDS = {"jpeg": JSON_JPEG, "png": JSON_PNG}
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
# Pixels that one byte holds at most. Deflate shrinks to 1/1032; 16 x 16 pixels of JPEG take four
# luma blocks of 6 bits and two chroma blocks of 4.
_MOST_PIXELS_PER_BYTE: dict[Codec, int] = {"PNG": 1032 // 3, "JPEG": 64}
# So many pixels of JPEG take no longer than above. Handing them to a thread and back takes 0.4 ms
# on cores that are free, and the scheduler's slices of several ms where they are not.
_QUICK_PIXELS = 512 * 512
_QUALITY = re.compile(r"[01](\.\d*)?")
_MediaRange = tuple[str, frozenset[str]]  # the type, and the bare words behind it


def negotiate(
    accept: str | None, request: GenerationRequest, *, max_response_bytes: int
) -> ReplyFormat:
    """Choose the format of a reply before any work: the most wanted that is offered and fits.

    An absent or empty Accept means ``*/*``. Raises RequestError: 406 where nothing that is wanted
    is offered, 400 where what is offered cannot hold these pictures.
    """
    refusal: RequestError | None = None
    # Each format once: a header has room for thousands of ranges that stand for the same.
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
        f"Accept {shown(accept)} names nothing that is offered; offered are {offered}.", 406
    )


def _wanted(accept: str | None) -> list[_MediaRange]:
    """The media ranges of an Accept header, most wanted first; q=0 and malformed q are left out."""
    found: list[tuple[float, _MediaRange]] = []
    for part in (accept or "").lower().split(","):
        kind, *parameters = [field.strip() for field in part.split(";")]
        quality, words = 1.0, set[str]()
        for parameter in parameters:
            name, equals, value = (field.strip() for field in parameter.partition("="))
            if name == "q" and equals:
                quality = float(value) if _QUALITY.fullmatch(value) else 0.0
            elif name and not equals:
                words.add(name)
        if kind and quality > 0:
            found.append((quality, (kind, frozenset(words))))
    if not (accept or "").strip():
        return [("*/*", frozenset())]
    return [media_range for _, media_range in sorted(found, key=lambda entry: -entry[0])]


def _offered(media_range: _MediaRange, request: GenerationRequest) -> ReplyFormat | None:
    """The format that a media range stands for, None if there is none."""
    kind, words = media_range
    words -= {"verbose"}
    if kind in _JSON_RANGES and not words:
        return HUGGINGFACE if request.form == "huggingface" else NESTED
    if kind == "application/json" and len(words) == 1:
        return _WORDS.get(next(iter(words)))
    return None if words else _IMAGES.get(kind)


def _check_fit(format: ReplyFormat, request: GenerationRequest, max_response_bytes: int) -> None:
    """Refuse pictures that the format cannot hold, or whose reply would certainly be too long."""
    count, size = request.picture_count, f"{request.width} x {request.height}"
    if format.kind == "raw" and count > 1:
        raise RequestError(
            f"{format.media_type} holds one picture, and {count} are asked for: accept "
            f"{JSON_PNG.media_type} or {JSON_JPEG.media_type}, or ask for one picture."
        )
    length = count * _least_bytes(format, request)
    if format.kind != "raw":
        longest = _Facts(
            seeds=[SEEDS - 1] * count,
            finish_reasons=[max(FINISH_REASONS, key=len)] * count,
            exact=False,
        )
        length += len(_in_json(request, [b""] * count, longest))
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


def _least_bytes(format: ReplyFormat, request: GenerationRequest) -> int:
    """Bytes of one picture: for nested lists the most, as they vary little, else the fewest."""
    width, height = request.width, request.height
    if format.codec is None:
        return nested_lists.most_bytes(width, height)
    if format.codec not in _MOST_PIXELS_PER_BYTE:
        return 0
    fewest = width * height // _MOST_PIXELS_PER_BYTE[format.codec]
    return fewest if format.kind == "raw" else fewest * 4 // 3


def is_quick(pictures: Sequence[Picture], format: ReplyFormat) -> bool:
    """Whether `encode` may run in the event loop: one JPEG of 512 x 512 holds it up for 2 ms."""
    pixels = sum(picture.pixels.size for picture in pictures) // 3
    return format.codec == "JPEG" and pixels <= _QUICK_PIXELS


def encode(
    request: GenerationRequest,
    pictures: Sequence[Picture],
    format: ReplyFormat,
    *,
    base_seed: int,
    max_response_bytes: int | None = None,
) -> tuple[bytes, str]:
    """Return the reply's body and content type; CPU work for a thread unless `is_quick`.

    Raises RequestError (400) for a body beyond `max_response_bytes` (None: any length will do):
    how far picture files shrink is known only now, and SageMaker would cut a longer one off.

    JSON forms: ``generated_image`` (text) or ``generated_images``, ``prompt`` as it was sent,
    ``seeds``, ``finish_reasons`` and, where an out-of-memory halving lifted exactness,
    ``"exact": false``. Hugging Face form: a base64 string, or a list of them where several
    pictures or a list of inputs are asked for. Raw formats: the picture's bytes.
    """
    if format.codec is None:
        shown_pictures = [nested_lists.text(picture.pixels) for picture in pictures]
    else:
        files = [_file(picture.pixels, format.codec) for picture in pictures]
        if format.kind == "raw":
            _check_length(files[0], format, max_response_bytes)
            return files[0], format.media_type
        shown_pictures = [b'"' + base64.b64encode(file) + b'"' for file in files]
    facts = _Facts(
        seeds=[(base_seed + i) % SEEDS for i in range(len(pictures))],
        finish_reasons=[picture.finish_reason for picture in pictures],
        exact=all(picture.exact for picture in pictures),
    )
    body = _in_json(request, shown_pictures, facts)
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
    """The bytes of a picture file of uint8 [H, W, 3]."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=codec, **_OPTIONS[codec])
    return file.getvalue()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    """What a JSON reply says about its pictures, beside the published keys."""

    seeds: Sequence[int]
    finish_reasons: Sequence[FinishReason]
    exact: bool


def _in_json(request: GenerationRequest, pictures: Sequence[bytes], facts: _Facts) -> bytes:
    """Lay out a JSON reply; `pictures` are JSON texts already."""
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
        "seeds": facts.seeds,
        "finish_reasons": facts.finish_reasons,
    }
    if not facts.exact:
        rest["exact"] = False
    return b"{" + images + b", " + json.dumps(rest).encode("ascii")[1:]
