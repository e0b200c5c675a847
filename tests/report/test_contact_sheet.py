from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dreambooth.report import contact_sheet
from dreambooth.report.contact_sheet import Picture


def block(colour: tuple[int, int, int], height: int = 64, width: int = 64) -> Picture:
    return np.full((height, width, 3), colour, np.uint8)


def count(sheet: Image.Image, colour: tuple[int, int, int]) -> int:
    return int((np.asarray(sheet) == colour).all(axis=2).sum())


RED, BLUE = (255, 0, 0), (0, 0, 255)


def test_every_picture_has_its_cell() -> None:
    sheet = contact_sheet.draw([("one", [block(RED)] * 3), ("two", [block(BLUE)])], cell=128)
    assert sheet.mode == "RGB"
    assert count(sheet, RED) == 3 * 128 * 128
    assert count(sheet, BLUE) == 128 * 128
    rows = np.asarray(sheet)
    first_red = (rows == RED).all(2).any(1).argmax()
    first_blue = (rows == BLUE).all(2).any(1).argmax()
    assert first_red + 128 < first_blue


def test_labels_are_dark_on_light_above_their_row() -> None:
    sheet = contact_sheet.draw([("a photo of a cat", [block(RED)])], cell=128)
    top = int((np.asarray(sheet) == RED).all(2).any(1).argmax())
    label = np.asarray(sheet.convert("L"))[:top]
    assert label.max() > 240
    assert label.min() < 80
    assert np.asarray(sheet.convert("L"))[top + 130 :].min() > 200


def test_small_pictures_are_enlarged_with_hard_edges_and_whole_factors() -> None:
    checks = np.zeros((10, 10, 3), np.uint8)
    checks[::2, ::2] = RED
    sheet = contact_sheet.draw([("", [checks])], cell=128)
    assert count(sheet, RED) == 25 * 12 * 12


def test_large_and_oblong_pictures_are_shrunk_in_their_shape() -> None:
    sheet = contact_sheet.draw([("", [Image.new("RGB", (1000, 500), RED)])], cell=100)
    assert count(sheet, RED) == 100 * 50


def test_long_labels_wrap_and_stay_on_the_sheet() -> None:
    label = "a photo of a riobugger cat on a beach with a hat " * 4 + "x" * 300
    sheet = contact_sheet.draw([(label, [block(RED)])], cell=128)
    short = contact_sheet.draw([("a", [block(RED)])], cell=128)
    assert sheet.width == short.width
    assert sheet.height > short.height
    margin = np.asarray(sheet.convert("L"))[:, -8:]
    assert margin.min() > 240


def test_heads_stand_above_the_columns_that_they_share() -> None:
    rows = [("row", [block(RED)] * 4)]
    plain = contact_sheet.draw(rows, cell=64)
    headed = contact_sheet.draw(rows, cell=64, heads=["first", "second"])
    assert headed.width == plain.width
    above = np.asarray(headed)[: headed.height - plain.height]
    half = headed.width // 2
    assert above[:, :half].min() < 90
    assert above[:, half:].min() < 90
    assert np.array_equal(np.asarray(headed)[-64:], np.asarray(plain)[-64:])


def test_title_empty_rows_and_pil_pictures() -> None:
    rows = [("none", []), ("some", [Image.new("L", (64, 64), 9), Image.new("RGBA", (64, 64))])]
    plain = contact_sheet.draw(rows, cell=64)
    titled = contact_sheet.draw(rows, cell=64, title="A title")
    assert titled.height > plain.height
    assert contact_sheet.draw([], cell=64).mode == "RGB"
    assert contact_sheet.draw([("Ünïcode 猫 \n two", [])], cell=64).mode == "RGB"


def test_a_tiny_cell_is_our_own_fault() -> None:
    with pytest.raises(ValueError, match="too small"):
        contact_sheet.draw([], cell=4)
