from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from dreambooth.data import class_latents

SHAPE = (4, 8, 6)
LATENTS = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "class_00003.png"
    path.write_bytes(b"the bytes of a picture")
    place = class_latents.place_of(path)
    place.parent.mkdir()
    place.write_bytes(class_latents.content(LATENTS, picture=path.read_bytes(), origin="o"))
    return path


def test_what_was_written_is_read(picture: Path) -> None:
    latents = class_latents.read(picture, origin="o", shape=SHAPE)
    assert latents is not None
    assert latents.dtype == np.float32
    assert np.array_equal(latents, LATENTS)


def test_where_there_is_nothing_nothing_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert class_latents.read(tmp_path / "class_00000.png", origin="o", shape=SHAPE) is None
    assert caplog.text == ""


def changed(picture: Path, latents: np.ndarray) -> bytes:
    return class_latents.content(latents, picture=picture.read_bytes(), origin="o")


def nan() -> np.ndarray:
    return np.full(SHAPE, np.nan, np.float32)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda whole, picture: whole[:-7], "class_00003.safetensors is not used"),
        (lambda whole, picture: b"", "is not used"),
        (lambda whole, picture: b"\xff" * 200, "is not used"),
        (lambda whole, picture: whole + bytes(5000), "bytes"),
        (lambda whole, picture: save({"latents": LATENTS}), "another model, prompt or seed"),
        (lambda whole, picture: changed(picture, LATENTS[:2]), "(2, 8, 6)"),
        (lambda whole, picture: changed(picture, nan()), "not finite"),
    ],
)
def test_a_damaged_or_foreign_file_is_not_used(
    picture: Path,
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[bytes, Path], bytes],
    why: str,
) -> None:
    place = class_latents.place_of(picture)
    place.write_bytes(spoil(place.read_bytes(), picture))
    assert class_latents.read(picture, origin="o", shape=SHAPE) is None
    assert why in caplog.text
    assert "its class image encoded instead" in caplog.text


def test_latents_of_another_origin_or_picture_are_not_used(
    picture: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert class_latents.read(picture, origin="other", shape=SHAPE) is None
    picture.write_bytes(b"a picture that someone edited")
    assert class_latents.read(picture, origin="o", shape=SHAPE) is None
    assert "not the one that it was written for" in caplog.text


def test_a_folder_in_its_place_is_not_used(picture: Path) -> None:
    place = class_latents.place_of(picture)
    place.unlink()
    place.mkdir()
    assert class_latents.read(picture, origin="o", shape=SHAPE) is None
    place.rmdir()
    os.mkfifo(place)  # opening it would block forever
    assert class_latents.read(picture, origin="o", shape=SHAPE) is None
