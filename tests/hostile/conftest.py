"""Runs a job on one hostile input: it must fail with one sentence and touch nothing else."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreambooth.job.run import run_job

PROMPTS = {"instance_prompt": "a photo of riobugger cat", "class_prompt": "a photo of cat"}


@dataclass
class Sandbox:
    """A training folder, a model folder and the job's output folder, side by side."""

    root: Path
    capsys: pytest.CaptureFixture[str]
    photos: Path
    model: Path

    def argv(self, *more: str) -> list[str]:
        out = self.root / "out"
        return [
            *("--pretrained-model", str(self.model), "--train", str(self.photos)),
            *("--model_dir", str(out / "model"), "--output_data_dir", str(out / "output" / "data")),
            *("--max_steps=1", *more),
        ]

    def refuses(self, name: str, *more: str) -> str:
        """Run the job in this process and return its error message, which must contain `name`."""
        sentence = self.runs(name, *more)
        assert sentence is not None
        return sentence

    def runs(self, name: str, *more: str) -> str | None:
        """Run the job; return None if it wrote a model, else its error message as `refuses`."""
        (self.root / "out" / "output").mkdir(parents=True)
        before = self.seen()
        self.capsys.readouterr()
        code = run_job(self.argv(*more), {"SAGEMAKER_BASE_DIR": str(self.root / "out")})
        shown = self.capsys.readouterr().err
        if code == 0:
            assert (self.root / "out" / "model" / "model_index.json").is_file()
            assert self.seen() == before, "something outside of the output folders was touched"
            return None
        assert code == 1
        failure = (self.root / "out" / "output" / "failure").read_text()
        return self.check(shown, failure, name, before)

    def check(self, shown: str, failure: str, name: str, before: set[object]) -> str:
        assert "Traceback" not in shown
        sentences = [line for line in shown.splitlines() if line.startswith("error: ")]
        assert len(sentences) == 1, shown
        sentence = sentences[0].removeprefix("error: ")
        assert name in sentence
        assert sentence.endswith((".", ".)"))
        assert sentence.isprintable()
        assert failure.removesuffix("…") in " ".join(sentence.split())
        assert self.seen() == before, "something outside of the output folders was touched"
        assert list((self.root / "tmp").iterdir()) == []
        assert not (self.root / "out" / "model" / "model_index.json").exists()
        return sentence

    def seen(self) -> set[object]:
        """Return everything outside the output folder, with its size and time."""
        found: set[object] = set()
        for path in self.root.rglob("*"):
            if not path.is_relative_to(self.root / "out") and path.name != "tmp":
                status = path.lstat()
                found.add((str(path), status.st_mode, status.st_size, status.st_mtime_ns))
        return found


@pytest.fixture
def sandbox(
    small_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Sandbox:
    for name in ("tmp", "photos", "victim"):
        (tmp_path / name).mkdir()
    (tmp_path / "victim" / "precious").write_text("do not touch")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "photos" / "dataset_info.json").write_text(json.dumps(PROMPTS))
    write_photo(tmp_path / "photos" / "good.png")
    return Sandbox(tmp_path, capsys, tmp_path / "photos", small_model_folder)


@pytest.fixture
def own_model(sandbox: Sandbox, make_model_folder: Callable[..., Path]) -> Callable[..., Path]:
    """Return a function that gives the sandbox a model folder of its own, to be damaged."""

    def make(**options: object) -> Path:
        sandbox.model = sandbox.root / "base"
        make_model_folder(sandbox.model, **options)
        return sandbox.model

    return make


def write_photo(path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "PNG")
