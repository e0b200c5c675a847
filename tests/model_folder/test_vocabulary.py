from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dreambooth.errors import ModelArtifactError
from dreambooth.model_folder import vocabulary


@pytest.fixture
def tokenizer_folder(small_model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_model_folder / "tokenizer", tmp_path / "tokenizer"))


def test_both_layouts_hold_the_same_tables(tokenizer_folder: Path, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    plain = vocabulary.read(tokenizer_folder)
    assert plain.ids["cat</w>"] < len(plain.ids)
    assert ("c", "a") in plain.merges
    CLIPTokenizer.from_pretrained(tokenizer_folder).save_pretrained(tmp_path / "single")
    assert (tmp_path / "single" / "tokenizer.json").exists()
    assert not (tmp_path / "single" / "vocab.json").exists()
    assert vocabulary.read(tmp_path / "single") == plain
    vocabulary.write(tmp_path / "single", plain)
    (tmp_path / "single" / "tokenizer.json").unlink()
    assert vocabulary.read(tmp_path / "single") == plain


def _vocab(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "vocab.json").write_text(text, encoding="utf-8")


def _merges(raw: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "merges.txt").write_bytes(raw)


def _single(model: object) -> Callable[[Path], object]:
    text = json.dumps({"model": model})
    return lambda folder: (folder / "tokenizer.json").write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    "spoil",
    [
        _vocab('{"a":'),
        _vocab("[1]"),
        _vocab('{"a": "b"}'),
        _vocab('{"a": -1}'),
        _merges(b"#version: 0.2\nxx yy\n"),
        _merges(b"#version: 0.2\nc a t\n"),
        _merges(b"\xff\xfe\x00"),
        _single(None),
        _single({"vocab": {}, "merges": 3}),
        _single({"vocab": {"a": 0}, "merges": [["a"]]}),
        lambda folder: (folder / "merges.txt").unlink(),
        lambda folder: (folder / "vocab.json").unlink(),
        lambda folder: (folder / "tokenizer_config.json").write_text('{"auto_map": {"a": "b"}}'),
    ],
)
def test_tables_that_do_not_fit_are_refused(
    tokenizer_folder: Path, spoil: Callable[[Path], object]
) -> None:
    spoil(tokenizer_folder)
    with pytest.raises(ModelArtifactError, match="tokenizer"):
        vocabulary.read(tokenizer_folder)
