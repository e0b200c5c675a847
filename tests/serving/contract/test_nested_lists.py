from __future__ import annotations

import json

import numpy as np
import pytest

from dreambooth.serving.contract import nested_lists


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1), (8, 16), (64, 40)])
def test_the_text_is_the_standard_librarys_without_spaces(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    expected = json.dumps(pixels.tolist(), separators=(",", ":")).encode()
    assert nested_lists.text(pixels) == expected
    assert len(expected) <= nested_lists.most_bytes(shape[1], shape[0])


def test_every_value_is_written() -> None:
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    assert json.loads(nested_lists.text(pixels)) == pixels.tolist()


def test_the_longest_text_is_that_of_a_white_picture() -> None:
    for height, width in ((1, 1), (7, 5), (64, 32)):
        white = np.full((height, width, 3), 255, np.uint8)
        assert len(nested_lists.text(white)) == nested_lists.most_bytes(width, height)


def test_pixels_need_not_be_contiguous() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    assert json.loads(nested_lists.text(pixels[::2, ::-1])) == pixels[::2, ::-1].tolist()
