"""`python -m dreambooth demo` fine-tunes the embedded model and draws a sheet of the result."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dreambooth import tiny
from dreambooth.commands import evaluate
from dreambooth.job.run import run_job
from dreambooth.process import addresses
from dreambooth.settings import hyperparameter_text

if TYPE_CHECKING:
    import numpy as np

    from dreambooth.diffusion.model import DiffusionModel

PROMPTS = (
    "a photo of a riobugger cat",
    "a photo of a riobugger cat on a beach",
    "a photo of a cat",
    "a photo of a dog",
)
PICTURES_PER_ROW = 8
SEED = 1000
SAMPLE_STEPS = 100  # for report.html: four pictures, about 4 s of one thread


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's only option, where to write."""
    parser.add_argument("--out", default="out/demo", help="default: out/demo")


def main(arguments: argparse.Namespace) -> int:
    """Fine-tune on the shipped cat, then draw base and fine-tuned model side by side."""
    out = addresses.to_path(arguments.out, "--out")
    model_dir, dataset = out / "model", tiny.DATA / "cat"
    knobs = hyperparameter_text.defaults()
    settings = [f"--{name}={value}" for name, value in tiny.DEFAULTS.items() if name in knobs]
    code = run_job(
        [
            *("--pretrained-model", "tiny", "--train", str(dataset)),
            *("--model_dir", str(model_dir), "--output_data_dir", str(out / "output")),
            *settings,
            f"--sample_steps={SAMPLE_STEPS}",
        ],
        os.environ,
    )
    if code != 0:
        return code
    sheet = out / "sheet.png"
    _draw_sheet(dataset, model_dir, sheet)
    print(f"\nThe contact sheet: {sheet}\nThe same with your own photographs and a real model:\n")
    python = os.path.relpath(sys.executable) if sys.prefix != sys.base_prefix else "python3"
    print(
        f"  {python} transfer_learning.py --pretrained-model FOLDER_OF_STABLE_DIFFUSION"
        " --train FOLDER_OF_PHOTOGRAPHS --max_steps 400 --model_dir out/mine"
    )
    print(f'  {python} -m dreambooth generate --model out/mine --prompt "a photo of ..."')
    return 0


def _draw_sheet(dataset: Path, model_dir: Path, path: Path) -> None:
    import torch

    from dreambooth.data import dataset_info, images
    from dreambooth.diffusion import model as models
    from dreambooth.report import contact_sheet

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    info = dataset_info.read(dataset)
    rows: list[tuple[str, Sequence[np.ndarray]]] = [
        (
            f"instance images: {info.instance_prompt}",
            [images.to_array(images.open_image(path)) for path in info.instance_images],
        )
    ]
    base = _draw(models.load(tiny.WEIGHTS, device=device), "drawing, base model")
    tuned = _draw(models.load(model_dir, device=device), "drawing, fine-tuned model")
    for prompt in PROMPTS:
        rows.append((f"base: {prompt}", base[prompt]))
        rows.append((f"fine-tuned: {prompt}", tuned[prompt]))
    contact_sheet.draw(rows, cell=128).save(path)


def _draw(model: DiffusionModel, label: str) -> dict[str, list[np.ndarray]]:
    """Return the finite pictures by prompt; base and fine-tuned model start from the same noise."""
    from dreambooth.evaluation.shares import finite

    drawn = evaluate.draw(
        model,
        PROMPTS,
        label,
        pictures=PICTURES_PER_ROW,
        num_inference_steps=int(tiny.DEFAULTS["num_inference_steps"]),
        guidance_scale=float(tiny.DEFAULTS["guidance_scale"]),
        seed=SEED,
        batch_size=PICTURES_PER_ROW,
    )
    return {prompt: finite(pictures) for prompt, pictures in drawn.items()}
