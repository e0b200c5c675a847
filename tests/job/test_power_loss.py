"""After a loss of power at any moment, every file under its final name is whole on the disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dreambooth.job.run import run_job


class Disk:
    """Records each rename to a final name, and the paths that were not flushed before it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._flushed: dict[tuple[int, int], tuple[int, int]] = {}
        self.named: dict[str, list[str]] = {}
        self._unflushed: set[str] = set()
        fsync, rename, replace = os.fsync, os.rename, os.replace

        def flush(descriptor: int) -> None:
            fsync(descriptor)
            status = os.fstat(descriptor)
            self._flushed[_identity(status)] = _version(status)
            self._unflushed.discard(os.readlink(f"/proc/self/fd/{descriptor}"))

        def name(move: Callable[..., None]) -> Callable[..., None]:
            def named(source: Any, target: Any, **options: Any) -> None:
                unflushed = [path for path in _below(Path(source)) if not self._is_flushed(path)]
                self.named[str(target)] = [str(path) for path in unflushed]
                move(source, target, **options)
                self._unflushed.add(os.path.dirname(os.path.abspath(target)))

            return named

        monkeypatch.setattr(os, "fsync", flush)
        monkeypatch.setattr(os, "rename", name(rename))
        monkeypatch.setattr(os, "replace", name(replace))

    def _is_flushed(self, path: Path) -> bool:
        status = path.stat()
        return self._flushed.get(_identity(status)) == _version(status)

    def unflushed_names(self, folder: Path) -> list[str]:
        """Return the folders below `folder` that were not flushed after a rename into them."""
        return [path for path in self._unflushed if Path(path).is_relative_to(folder)]


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _version(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _below(path: Path) -> list[Path]:
    return [path, *path.rglob("*")] if path.is_dir() else [path]


def test_everything_is_flushed_before_it_gets_its_name(
    small_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, model, checkpoints = (tmp_path / name for name in ("photos", "model", "checkpoints"))
    photos.mkdir()
    Image.fromarray(np.zeros((40, 40, 3), dtype=np.uint8)).save(photos / "1.png")
    prompts = {"instance_prompt": "a photo of riobugger cat", "class_prompt": "a photo of cat"}
    (photos / "dataset_info.json").write_text(json.dumps(prompts))
    argv = ["--pretrained-model", str(small_model_folder), "--train", str(photos)]
    argv += ["--model_dir", str(model), "--checkpoint_dir", str(checkpoints), "--max_steps=2"]
    argv += ["--checkpointing_steps=1", "--with_prior_preservation", "--num_class_images=1"]
    disk = Disk(monkeypatch)
    assert run_job(argv, {}) == 0
    named = {Path(path).name: unflushed for path, unflushed in disk.named.items()}
    for name in ("step-00000001", "step-00000002", "class_00000.png", "unet", "model_index.json"):
        assert named[name] == [], name
    assert disk.unflushed_names(model) == []
    assert [path for path in disk.unflushed_names(checkpoints) if "class_images" not in path] == []
