"""Draws pictures side by side on one sheet, in rows with or without labels.

Legend: H W pixels, uint8 0..255.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Picture = npt.NDArray[np.uint8] | Image.Image
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_PAPER = (250, 249, 246)
_EMPTY = (236, 234, 229)
_INK = (34, 34, 38)
_MAX_ROW_PICTURES = 64  # the first ones; a wider sheet is of no use


def draw(
    rows: Sequence[tuple[str, Sequence[Picture]]],
    *,
    cell: int,
    title: str = "",
    heads: Sequence[str] = (),
) -> Image.Image:
    """Return an RGB sheet with one row of square cells per (label, pictures), labels above rows.

    Pictures (uint8 [H,W,3] or PIL) keep their shape: those smaller than `cell` pixels are enlarged
    by a whole factor with hard edges, larger ones are shrunk. Long labels wrap. heads: labels above
    the columns, which they share evenly: of 4 columns, the first of 2 stands above the first 2.
    Raises ValueError for a cell below 16 pixels.
    """
    if cell < 16:
        raise ValueError(f"a cell of {cell} pixels is too small for a sheet")
    gap = max(4, cell // 24)
    margin = 3 * gap
    columns = min(_MAX_ROW_PICTURES, max((len(pictures) for _, pictures in rows), default=1))
    inner = max(columns * (cell + gap) - gap, 20 * gap)
    font = ImageFont.load_default(size=max(12, min(28, cell // 8)))
    title_font = ImageFont.load_default(size=max(16, min(40, cell // 6)))
    head = _wrapped(title, title_font, inner)
    labels = [_wrapped(label, font, inner) for label, _ in rows]
    share = columns // max(1, len(heads)) * (cell + gap)
    above = [_wrapped(each, font, share - gap) for each in heads]

    heads_top = margin + _text_height(head, title_font) + (2 * gap if head else 0)
    height = heads_top + max((_text_height(lines, font) + gap for lines in above), default=0)
    tops = []
    for label in labels:
        tops.append(height)
        height += _text_height(label, font) + gap + cell + 2 * gap
    sheet = Image.new(
        "RGB", (inner + 2 * margin, height - (2 * gap if rows else 0) + margin), _PAPER
    )
    pen = ImageDraw.Draw(sheet)
    _write(pen, (margin, margin), head, title_font)
    for number, lines in enumerate(above):
        _write(pen, (margin + number * share, heads_top), lines, font)
    for top, label, (_, pictures) in zip(tops, labels, rows, strict=True):
        _write(pen, (margin, top), label, font)
        at = top + _text_height(label, font) + gap
        for column, picture in enumerate(pictures[:_MAX_ROW_PICTURES]):
            _place(sheet, picture, margin + column * (cell + gap), at, cell)
    return sheet


def _image(picture: Picture) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    return Image.fromarray(np.ascontiguousarray(picture, dtype=np.uint8)).convert("RGB")


def _place(sheet: Image.Image, picture: Picture, left: int, top: int, cell: int) -> None:
    """Paste a picture into the middle of its cell, scaled without changing its shape."""
    image = _image(picture)
    longest = max(image.size)
    if longest > cell:
        size = [max(1, round(side * cell / longest)) for side in image.size]
        image = image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    elif (factor := cell // longest) > 1:
        size = [side * factor for side in image.size]
        image = image.resize((size[0], size[1]), Image.Resampling.NEAREST)
    sheet.paste(_EMPTY, (left, top, left + cell, top + cell))
    sheet.paste(image, (left + (cell - image.width) // 2, top + (cell - image.height) // 2))


def _wrapped(text: str, font: _Font, width: int) -> list[str]:
    """Break a text into lines of at most `width` pixels; only too long words are broken."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        while font.getlength(word) > width and len(word) > 1:
            fits = next(
                n
                for n in range(len(word) - 1, 0, -1)
                if n == 1 or font.getlength(word[:n]) <= width
            )
            lines.append(word[:fits])
            word = word[fits:]
        lines.append(word)
    return lines


def _line_height(font: _Font) -> int:
    return math.ceil(getattr(font, "size", 12) * 1.3)


def _text_height(lines: Sequence[str], font: _Font) -> int:
    return len(lines) * _line_height(font)


def _write(
    pen: ImageDraw.ImageDraw, at: tuple[int, int], lines: Sequence[str], font: _Font
) -> None:
    for number, line in enumerate(lines):
        pen.text((at[0], at[1] + number * _line_height(font)), line, fill=_INK, font=font)
