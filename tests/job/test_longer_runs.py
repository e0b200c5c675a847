"""A run that kept a checkpoint goes on when only its length has grown, to the same bits."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from dreambooth.errors import HyperparameterError
from dreambooth.job.run import run_job
from dreambooth.training import state as states

Start = Callable[..., int]
SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup")


@pytest.fixture
def start(small_model_folder: Path, tmp_path: Path) -> Start:
    """Return a function that runs a job on three pictures; `name` is the model folder's."""
    generator = np.random.default_rng(0)
    for shape, size in (("square", (40, 40)), ("long", (40, 48))):
        (tmp_path / shape).mkdir()
        for number in range(3):
            pixels = generator.integers(0, 255, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / shape / f"{number}.png")
        info = {"instance_prompt": "a photo of riobugger cat", "class_prompt": "a photo of cat"}
        (tmp_path / shape / "dataset_info.json").write_text(json.dumps(info))

    def run(name: str, *options: str, pictures: str = "square") -> int:
        argv = [f"--pretrained-model={small_model_folder}", f"--train={tmp_path / pictures}"]
        argv += [f"--model_dir={tmp_path / name}", "--learning_rate=0.001", *options]
        return run_job(argv, {"SAGEMAKER_BASE_DIR": str(tmp_path / "none")})

    return run


def unet_of(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(
    ("pictures", "common", "short", "grown"),
    [
        ("square", ["--train_text_encoder", "--batch_size=2"], ["--epochs=1"], ["--epochs=3"]),
        (
            "long",
            ["--center_crop", "--lr_scheduler=constant_with_warmup", "--lr_warmup_steps=3"],
            ["--epochs=1"],
            ["--max_steps=5"],
        ),
        # Four steps on three pictures are two passes, rounded up: the random crops are as many.
        (
            "long",
            ["--with_prior_preservation", "--num_class_images=1"],
            ["--max_steps=4"],
            ["--epochs=2"],
        ),
    ],
)
def test_a_grown_run_equals_the_one_that_asked_for_all_at_once(
    start: Start,
    tmp_path: Path,
    pictures: str,
    common: list[str],
    short: list[str],
    grown: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for length in (short, grown):
        options = [*common, *length, "--keep_last_checkpoint"]
        assert start("grown", *options, pictures=pictures) == 0
    assert "resumed at step" in capsys.readouterr().err
    assert start("at_once", *common, *grown, pictures=pictures) == 0
    assert "set keep_last_checkpoint=True" in capsys.readouterr().err
    a, b = unet_of(tmp_path / "grown"), unet_of(tmp_path / "at_once")
    assert all(np.array_equal(a[name], b[name]) for name in b)
    rows = (tmp_path / "grown-output" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(1, len(rows) + 1))
    (kept,) = (tmp_path / "grown-output" / "checkpoints").iterdir()
    assert kept.name == f"step-{len(rows):08d}"


def test_what_a_longer_run_would_have_drawn_otherwise_is_refused(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("m", "--max_steps=3", "--keep_last_checkpoint", pictures="long") == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "m").rglob("*")}
    capsys.readouterr()
    assert start("m", "--max_steps=9", "--keep_last_checkpoint", pictures="long") == 1
    said = capsys.readouterr().err
    assert "cached_crops was 1 and is now 3" in said
    assert "grow with the steps, up to 8. Set resume=fresh" in said
    assert start("m", "--max_steps=2", "--keep_last_checkpoint", pictures="long") == 1
    assert "It has made 3 steps already." in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "m").rglob("*")}


def test_a_run_without_a_checkpoint_says_that_it_begins_anew(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for steps in (1, 2):
        assert start("m", f"--max_steps={steps}", f"--checkpoint_dir={tmp_path / 'c'}") == 0
        said = capsys.readouterr().err
        assert f"there is no checkpoint in {tmp_path / 'c'}: the run begins at step 0" in said
        assert "no checkpoint of the last step is kept: set keep_last_checkpoint=True" in said
    assert start("m", "--max_steps=2", "--keep_last_checkpoint") == 0
    assert "set keep_last_checkpoint" not in capsys.readouterr().err


def identity(
    steps: int, *, epochs: int | None, crops: int, lr_scheduler: str, warmup: str, seed: int = 0
) -> dict[str, str]:
    return {
        "max_steps": "None" if epochs else str(steps),
        "epochs": str(epochs or 20),
        "steps": str(steps),
        "cached_crops": str(crops),
        "lr_scheduler": lr_scheduler,
        "lr_warmup_steps": warmup,
        "seed": str(seed),
    }


def accepts(folder: Path, stored: dict[str, str], wanted: dict[str, str], step: int) -> str:
    """Return why a checkpoint is refused, an empty text if it is not."""
    checkpoint = folder / states.folder_name(step)
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "manifest.json").write_text(json.dumps({"identity": stored, "step": step}))
    try:
        states.refuse_another_job(folder, identity=wanted)
    except HyperparameterError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("seed", range(60))
def test_only_what_the_steps_made_do_not_depend_on_may_change(seed: int, tmp_path: Path) -> None:
    dice = random.Random(seed)
    curve = dice.choice(("constant", "constant", *SCHEDULERS))
    warmup = dice.choice(("None", "0", "7"))
    before, after = dice.randint(2, 40), dice.randint(2, 40)
    step = dice.randint(1, before)
    crops = dice.choice(((1, 1), (8, 8), (2, 4)))
    if before == after:
        crops = (crops[0], crops[0])
    other_seed = int(dice.random() < 0.2)
    shared = {"lr_scheduler": curve, "warmup": warmup}
    stored = identity(before, epochs=dice.choice((None, 3)), crops=crops[0], **shared)
    wanted = identity(
        after, epochs=dice.choice((None, 5)), crops=crops[1], seed=other_seed, **shared
    )
    said = accepts(tmp_path, stored, wanted, step)
    is_free = curve == "constant" or (curve == "constant_with_warmup" and warmup != "None")
    same_steps = before == after or (is_free and step <= after and crops[0] == crops[1])
    assert (not said) is (same_steps and other_seed == 0)
    if said and not other_seed:
        assert re.search(r"learning rate of each step depends|random crops|has made \d+ st", said)


def test_checkpoints_of_earlier_versions_go_on_at_their_length(tmp_path: Path) -> None:
    shared = {"epochs": None, "lr_scheduler": "constant", "warmup": "None"}
    stored = identity(9, crops=3, **shared)
    del stored["cached_crops"]
    assert accepts(tmp_path, stored, identity(9, crops=3, **shared), 4) == ""
    assert "cached_crops was unset" in accepts(tmp_path, stored, identity(12, crops=4, **shared), 4)


def test_a_run_says_so_where_it_does_not_go_on_from_what_is_kept(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "holds checkpoints of an earlier run, and this run begins at its first step"
    (tmp_path / "m-output" / "checkpoints" / "step-00000002").mkdir(parents=True)
    assert start("m", "--max_steps=1") == 0
    assert said in capsys.readouterr().err
    assert start("other", "--max_steps=1") == 0
    assert said not in capsys.readouterr().err
