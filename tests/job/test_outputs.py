from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from dreambooth.errors import HyperparameterError, ResourceError
from dreambooth.job import outputs
from dreambooth.job.run import run_job
from dreambooth.settings import container


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    made = {name: tmp_path / name for name in ("train", "model_dir", "output", "base")}
    made["train"].mkdir()
    made["base"].mkdir()
    return made


def read(places: Mapping[str, Path], **changes: Path) -> container.Environment:
    chosen = {**places, **changes}
    argv = [f"--train={chosen['train']}", f"--model_dir={chosen['model_dir']}"]
    argv.append(f"--output_data_dir={chosen['output']}")
    if "checkpoint_dir" in chosen:
        argv.append(f"--checkpoint_dir={chosen['checkpoint_dir']}")
    return container.read(argv, {})


def test_separate_folders_are_fine(places: dict[str, Path]) -> None:
    outputs.check(read(places), places["base"])
    outputs.check(read(places, checkpoint_dir=places["output"]), None)


@pytest.mark.parametrize(
    ("option", "inside"),
    [
        ("model_dir", "train"),
        ("output", "train"),
        ("checkpoint_dir", "train"),
        ("model_dir", "base"),
        ("output", "base"),
        ("output", "model_dir"),
        ("checkpoint_dir", "model_dir"),
    ],
)
@pytest.mark.parametrize("below", ["", "below/it"])
def test_outputs_never_lie_in_what_is_read_or_in_the_model(
    places: dict[str, Path], option: str, inside: str, below: str
) -> None:
    with pytest.raises(HyperparameterError, match="choose another folder"):
        outputs.check(read(places, **{option: places[inside] / below}), places["base"])


def test_a_symlink_does_not_hide_it(places: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(places["train"])
    with pytest.raises(HyperparameterError, match="training folder"):
        outputs.check(read(places, model_dir=tmp_path / "link" / "out"), None)


def test_a_size_is_counted_while_others_write_and_remove(tmp_path: Path) -> None:
    """SageMaker's agent writes and removes files in the folders that it uploads."""
    (tmp_path / "ours").write_bytes(b"12345")
    ended = threading.Event()

    def others() -> None:
        while not ended.is_set():
            (tmp_path / "folder").mkdir()
            (tmp_path / "folder" / "marker").touch()
            (tmp_path / "folder" / "marker").unlink()
            (tmp_path / "folder").rmdir()

    thread = threading.Thread(target=others)
    thread.start()
    try:
        sizes = {outputs.size([tmp_path]) for _ in range(2000)}
    finally:
        ended.set()
        thread.join()
    assert sizes == {5}


@pytest.mark.parametrize("option", ["output", "checkpoint_dir"])
def test_what_cannot_be_written_is_found_at_once(
    places: dict[str, Path], tmp_path: Path, option: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match=r"give another folder with --\w+_dir"):
        outputs.make(read(places, **{option: tmp_path / "file"}))


def test_the_job_refuses_before_anything_is_touched(
    places: dict[str, Path], small_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    train = places["train"]
    Image.new("RGB", (32, 32)).save(train / "1.png")
    (train / "dataset_info.json").write_text(json.dumps({"instance_prompt": "a photo of x"}))
    before = sorted(train.rglob("*"))
    argv = [f"--train={train}", f"--pretrained-model={small_model_folder}"]
    assert run_job([*argv, f"--model_dir={train}", "--dry-run"], {}) == 1
    assert run_job([*argv, f"--model_dir={train / 'out'}"], {}) == 1
    assert "lies in the training folder" in capsys.readouterr().err
    assert sorted(train.rglob("*")) == before
