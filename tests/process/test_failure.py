from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from dreambooth.errors import DatasetError, HyperparameterError
from dreambooth.process import failure
from dreambooth.settings.hyperparameters import KNOBS, parse


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a container's /opt/ml as SageMaker makes it, without channels."""
    (tmp_path / "ml" / "input" / "config").mkdir(parents=True)
    return tmp_path / "ml"


def failure_of(root: Path, error: BaseException) -> bytes:
    path = root / "output" / "failure"
    assert failure.write_failure(path, error)
    return path.read_bytes()


def test_the_reason_comes_first(root: Path) -> None:
    assert failure_of(root, DatasetError("No\npictures.")) == b"No\\npictures."
    assert failure_of(root, ValueError("odd")) == b"InternalError: ValueError: odd"
    assert failure_of(root, KeyError()) == b"InternalError: KeyError"
    assert failure_of(root, DatasetError()) == b"DatasetError"


def test_an_earlier_failure_is_replaced(root: Path) -> None:
    failure_of(root, DatasetError("x" * 500))
    assert failure_of(root, DatasetError("short")) == b"short"


@pytest.mark.parametrize("character", ["x", "ä", "猫", "\N{DOG FACE}", "\ud800"])
def test_long_reasons_are_cut_between_characters(root: Path, character: str) -> None:
    data = failure_of(root, DatasetError(character * 5000))
    assert 1000 < len(data) <= 1024
    assert data.decode("utf-8").endswith("…")


def test_a_few_faults_are_all_reported_in_full(root: Path) -> None:
    faults = [f"knob_{i} must be a whole number, at least 1, not 'x'." for i in range(9)]
    told = failure_of(root, HyperparameterError(faults)).decode()
    assert all(fault in told for fault in faults)


def test_many_faults_are_shortened_so_that_each_is_named(root: Path) -> None:
    faults = [f"knob_{i} must be {'one of many things, ' * 5}not 'x'." for i in range(25)]
    told = failure_of(root, HyperparameterError(faults)).decode()
    assert len(told.encode()) <= 1024
    assert told.startswith("25 settings are wrong: (1) knob_0 ")
    assert all(f"({i + 1}) knob_{i} " in told for i in range(25))


def test_all_settings_wrong_at_once_still_fit(root: Path) -> None:
    with pytest.raises(HyperparameterError) as caught:
        parse({knob.name: ["x"] for knob in KNOBS})
    told = failure_of(root, caught.value).decode()
    assert len(told.encode()) <= 1024
    assert re.match(rf"{len(KNOBS)} settings are wrong: ", told)


def test_nothing_is_made_where_there_is_no_root(tmp_path: Path) -> None:
    path = tmp_path / "ml" / "output" / "failure"
    assert not failure.write_failure(path, ValueError("x"))
    assert list(tmp_path.iterdir()) == []


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def test_writing_never_raises(root: Path) -> None:
    assert b"UnprintableError" in failure_of(root, UnprintableError())
    (root / "output" / "failure").unlink()
    os.mkfifo(root / "output" / "failure")
    assert not failure.write_failure(root / "output" / "failure", ValueError("x"))
    assert not failure.write_failure(root / "input" / "config" / "a\0b", ValueError("x"))
    (root / "file").write_text("x")
    assert not failure.write_failure(root / "file" / "failure", ValueError("x"))
