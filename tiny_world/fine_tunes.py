"""Fine-tune with the real job, keep states on the way, judge some of them, and keep the results.

In the folder of a command, `NAME.json` is the record of one fine-tune: the meter's readings, the
steps that were chosen, and what was measured of each. `pictures/NAME-step-N.png` holds the first
pictures of each prompt. The model is removed once its record is there, unless others start from it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dreambooth import tiny
from dreambooth.errors import UserError
from dreambooth.job.run import run_job
from dreambooth.model_folder import layout
from dreambooth.tiny.judge_network import Pictures
from dreambooth.training.meter import MeterReading
from tiny_world import asking
from tiny_world.asking import Interview
from tiny_world.brush import SIZE
from tiny_world.data_sets import DataSet, write_data_set
from tiny_world.questions import Questions

EVERY = 50
"""Steps between two kept states; a shorter run keeps its last one alone."""
SHOWN = 4
"""Pictures of each prompt that are kept for a sheet, at most."""

Readings = Sequence[MeterReading]
Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTune:
    """One fine-tune: what it is called, and what it trains on.

    job: further options of the training job. base: the fine-tune that it starts from; None for the
    embedded model. is_base: whether others start from it, so that its model is kept.
    """

    name: str
    data: DataSet
    seed: int
    steps: int
    job: tuple[str, ...]
    base: FineTune | None = None
    is_base: bool = False

    @property
    def every(self) -> int:
        """Return the number of steps between two kept states."""
        return min(EVERY, self.steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judging:
    """How the states of a fine-tune are judged.

    questions: what each state is asked. pictures: of each prompt. chosen: the steps whose states
    are judged, each by a name, from the meter's readings. measure: numbers by name.
    """

    questions: Questions
    pictures: int
    chosen: Callable[[Readings], Mapping[str, int]]
    measure: Callable[[Interview], Mapping[str, float]]


def judged(tune: FineTune, judging: Judging, out: Path) -> Record:
    """Return the record of a fine-tune, from disk if it was judged before.

    Raises UserError where the training job fails.
    """
    path, folder = out / f"{tune.name}.json", out / tune.name
    if not path.exists():
        model = trained(tune, out)
        write_json(path, _judge_states(tune, judging, model, out))
    shutil.rmtree(folder / "checkpoints" if tune.is_base else folder, ignore_errors=True)
    record: Record = json.loads(path.read_text(encoding="utf-8"))
    return record


def trained(tune: FineTune, out: Path) -> Path:
    """Return the model folder of a fine-tune, which is made unless it is there."""
    folder = out / tune.name
    model = folder / "model"
    if not (model / layout.INDEX).exists():
        base = "tiny" if tune.base is None else str(trained(tune.base, out))
        train(
            folder,
            *("--pretrained-model", base, "--train", str(_pictures_of(tune.data, out))),
            *("--checkpoint_dir", str(folder / "checkpoints"), "--seed", str(tune.seed)),
            *("--checkpointing_steps", str(tune.every)),
            *("--checkpoints_total_limit", str(tune.steps // tune.every)),
            *("--keep_last_checkpoint", "True", "--max_steps", str(tune.steps), *tune.job),
        )
    return model


def train(folder: Path, *options: str) -> None:
    """Run the training job with these options; its results go to `model` and `output` in `folder`.

    It draws no pictures of the meter. Raises UserError where it fails.
    """
    places = ("--model_dir", str(folder / "model"), "--output_data_dir", str(folder / "output"))
    code = run_job([*places, "--meter_pictures_share", "0", *options], os.environ)
    if code != 0:
        raise UserError(f"The fine-tune in {folder} ended with exit code {code}; see above.")


def _pictures_of(data: DataSet, out: Path) -> Path:
    """Return the folder of a data set: the shipped one, or one that is drawn into `out`."""
    shipped = tiny.DATA / data.folder
    if shipped.exists():
        return shipped
    write_data_set(data, out / "data" / data.folder)
    return out / "data" / data.folder


def _judge_states(tune: FineTune, judging: Judging, model: Path, out: Path) -> dict[str, object]:
    checkpoints = out / tune.name / "checkpoints"
    manifest = checkpoints / f"step-{tune.steps:08d}" / "manifest.json"
    raw = json.loads(manifest.read_text(encoding="utf-8"))["readings"]
    picks = judging.chosen([MeterReading.from_json(one) for one in raw])
    guidance_scale, num_inference_steps = asking.SAMPLINGS["7.5"]
    settings = asking.Settings(
        pictures=judging.pictures,
        guidance_scale=guidance_scale,
        num_inference_steps=num_inference_steps,
        seed=0,
        batch_size=16,
    )
    found = {}
    for step in sorted({*picks.values()}):
        state = checkpoints / f"step-{step:08d}" / "unet.safetensors"
        shutil.copyfile(state, model / "unet" / "diffusion_pytorch_model.safetensors")
        label = f"{tune.name}, step {step}"
        interview = asking.ask(model, judging.questions, settings, label=label)
        keep_pictures(out, tune.name, step, interview.pictures)
        found[step] = dict(judging.measure(interview))
    return {"readings": raw, "chosen": dict(picks), "judged": found}


def keep_pictures(out: Path, name: str, step: int, pictures: Mapping[str, Pictures]) -> None:
    """Write the first pictures (uint8 [N,64,64,3]) of each prompt, a row each, as one picture."""
    rows = [np.concatenate([*drawn[:SHOWN]], axis=1) for drawn in pictures.values()]
    path = _shown(out, name, step)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(path)


def kept_pictures(out: Path, name: str, step: int, row: int) -> list[Image.Image]:
    """Return the kept pictures of one prompt, the first of which is row 0."""
    with Image.open(_shown(out, name, step)) as atlas:
        pixels = np.asarray(atlas.convert("RGB"))
    strip = pixels[row * SIZE : (row + 1) * SIZE]
    return [
        Image.fromarray(strip[:, left : left + SIZE]) for left in range(0, strip.shape[1], SIZE)
    ]


def _shown(out: Path, name: str, step: int) -> Path:
    return out / "pictures" / f"{name}-step-{step}.png"


def keep_settings(path: Path, settings: object) -> None:
    """Write the settings of what a folder holds, which is created if necessary.

    Raises UserError where it holds other ones, or cannot be created.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {path.parent} cannot be created: {error.strerror}.") from error
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != settings:
        raise UserError(f"{path.parent} holds a study with other settings; give another --out.")
    write_json(path, settings)


def write_json(path: Path, content: object) -> None:
    """Write a JSON file whole; several processes may write the same one."""
    partial = path.with_suffix(f".partial-{os.getpid()}")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
