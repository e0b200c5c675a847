from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path

import pytest
from PIL import Image, features

from dreambooth.data import picture_files
from dreambooth.data.picture_files import FORMATS, PictureError, format_of, listed, printable


@pytest.mark.parametrize("kind", FORMATS)
def test_what_pillow_writes_is_recognised(kind: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    file = io.BytesIO()
    Image.new("RGB", (20, 20)).save(file, kind)
    assert format_of(io.BytesIO(file.getvalue())) == kind


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "AVIF"),
        (b"\0\0\0\x18ftypisom\0\0\0\0isommp42", None),
        (b"8BPS\0\1", "Photoshop"),
        (b"\xff\x0a\0", "JPEG XL"),
        (b"BM, said the text, and no header followed", None),
        (b"%!PS-Adobe-3.0 EPSF-3.0", None),
        (b"<svg>", None),
        (b"", None),
    ],
)
def test_the_first_bytes_decide(start: bytes, kind: str | None) -> None:
    assert format_of(io.BytesIO(start)) == kind


def test_names_are_made_fit_for_a_log_line() -> None:
    assert printable("a\nb\x1b[31m.png") == "a\\nb\\x1b[31m.png"
    assert printable("caf\udce9.png") == "caf\\udce9.png"
    assert printable(Path("Фото 猫.png")) == "Фото 猫.png"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(2, "No such file or directory", "a.png"), "No such file or directory"),
        (
            OSError("cannot identify image file <_io.BufferedReader name=5>"),
            "cannot identify image file",
        ),
        (OSError("cannot open <PIL.X object at 0x7f0> twice"), "cannot open twice"),
        (SyntaxError("broken PNG file (chunk b'IHDX')"), "broken PNG file (chunk IHDX)"),
        (AttributeError("'NoneType' object has no attribute 'x'"), "its content makes no sense"),
        (KeyError(("RGB", 3)), "its content makes no sense"),
        (struct.error("unpack requires a buffer of 4 bytes"), "its content makes no sense"),
        (EOFError(), "its content makes no sense"),
        (ValueError("size 3 < 5, 7 > 6"), "size 3 < 5, 7 > 6"),
    ],
)
def test_reasons_are_words_and_no_python(error: Exception, words: str) -> None:
    assert picture_files.why(error) == words


def test_long_lists_are_counted() -> None:
    assert listed(list("abcde")) == "a, b, c, d, e"
    assert listed(list("abcdefg")) == "a, b, c, d, e and 2 more"


def test_the_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(PictureError(Path("a.png"), "is damaged")))
    assert (error.path, error.reason) == (Path("a.png"), "is damaged")
    assert str(error) == "The picture a.png is damaged: replace or remove it."


def test_errors_while_reading_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"x")
    with pytest.raises(PictureError, match=r"a\.png cannot be read"), picture_files.opened(path):
        raise OSError(5, "Input/output error")
