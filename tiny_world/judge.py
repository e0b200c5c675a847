"""Train and use the judge, a small classifier of drawn and generated 64x64 pictures.

It reads species, colour, marking, collar, seat (the colour of the ottoman that the animal sits on),
setting and style.

`python -m tiny_world judge train` draws pictures, trains the judge, measures it on held-out
drawings and writes weights and recipe.json. `python -m tiny_world evaluate` reads a model's
pictures with it. The judge must choose a label even for a blurred picture, so figures for blurred
pictures are approximate; blur and noise in its training make them less so. A pencil sketch does not
show the colours of coat, collar and seat, so they are not trained on sketches.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dreambooth.settings.command_line import Parser
from dreambooth.tiny.judge_network import JUDGE_WEIGHTS, Judge, Pictures, load, save, to_pixels
from tiny_world import world
from tiny_world.lr_schedule import TimedLrSchedule

logger = logging.getLogger(__name__)

RECIPE_FILE = "recipe.json"
HELD_OUT = 4000
"""Drawings that a judge is measured on; no judge is trained on them."""
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "species": world.SPECIES,
    "color": tuple(world.COLORS),
    "marking": world.MARKINGS,
    "collar": tuple(world.COLLARS),
    "seat": ("none", *world.COLORS),
    "setting": world.SETTINGS,
    "style": world.STYLES,
}
_UNSEEN_IN_SKETCHES = ("color", "collar", "seat")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The labels that the judge reads in one picture."""

    species: str
    color: str
    marking: str
    collar: str
    seat: str
    setting: str
    style: str


def labels_of(scenes: Sequence[world.Scene]) -> dict[str, Tensor]:
    """Return label numbers [N] by attribute; -100 (ignored by the loss) where a sketch hides it."""
    numbers: dict[str, list[int]] = {name: [] for name in ATTRIBUTES}
    for scene in scenes:
        for name, labels in ATTRIBUTES.items():
            unseen = scene.style == "sketch" and name in _UNSEEN_IN_SKETCHES
            numbers[name].append(-100 if unseen else labels.index(_shown(scene, name)))
    return {name: torch.tensor(values) for name, values in numbers.items()}


def _shown(scene: world.Scene, attribute: str) -> str:
    if attribute == "seat":
        return "none" if scene.seat is None else scene.seat.color
    source = scene if attribute in ("setting", "style") else scene.look
    shown: str = getattr(source, attribute)
    return shown


def soften(pixels: Tensor) -> Tensor:
    """Blur every other pair of a batch, one picture once and one twice, and add noise to all."""
    kernel = torch.tensor([1.0, 2.0, 1.0])
    blur = (kernel[:, None] * kernel[None] / 16).expand(3, 1, 3, 3)
    result = pixels.clone()
    once = functional.conv2d(pixels, blur, padding=1, groups=3)
    result[0::4] = once[0::4]
    result[1::4] = functional.conv2d(once, blur, padding=1, groups=3)[1::4]
    return result + 0.04 * torch.randn_like(result)


def train(
    scenes: Sequence[world.Scene], pictures: Pictures, *, seconds: float, seed: int
) -> tuple[Judge, int]:
    """Train a judge on the given pictures until the time is spent; return (judge, steps)."""
    torch.manual_seed(seed)
    judge = Judge({name: len(labels) for name, labels in ATTRIBUTES.items()})
    labels = labels_of(scenes)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule, step = TimedLrSchedule(seconds, 2e-3), 0
    while not schedule.time_is_up:
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate()
        rows = torch.randint(len(pictures), (64,))
        pixels = soften(to_pixels(pictures[rows.numpy()]))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = judge(pixels)
        total = torch.stack(
            [functional.cross_entropy(logits[name].float(), labels[name][rows]) for name in logits]
        ).sum()
        optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        step += 1
        if step % 100 == 0:
            logger.info("judge step %d, %.0f s, loss %.4f", step, schedule.spent_s, total.item())
    return judge.eval(), step


@torch.no_grad()
def _choices(judge: Judge, pictures: Pictures) -> dict[str, Tensor]:
    """Return the likeliest label number [N] of each attribute."""
    batches = [judge(to_pixels(pictures[at : at + 256])) for at in range(0, len(pictures), 256)]
    return {
        name: torch.cat([logits[name].argmax(dim=1) for logits in batches]) for name in ATTRIBUTES
    }


def read(judge: Judge, pictures: Pictures) -> list[Verdict]:
    """Return what the judge reads in each of the pictures, uint8 [N,64,64,3]."""
    if not len(pictures):
        return []
    chosen = {
        name: [ATTRIBUTES[name][index] for index in numbers.tolist()]
        for name, numbers in _choices(judge, pictures).items()
    }
    rows = zip(*chosen.values(), strict=True)
    return [Verdict(**dict(zip(chosen, row, strict=True))) for row in rows]


def accuracy(judge: Judge, scenes: Sequence[world.Scene], pictures: Pictures) -> dict[str, float]:
    """Return the share of right readings by attribute, over the scenes that show it."""
    labels = labels_of(scenes)
    return {
        name: float((numbers == labels[name])[labels[name] >= 0].float().mean())
        for name, numbers in _choices(judge, pictures).items()
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeSettings:
    """Everything that a trained judge depends on, except the machine's speed."""

    seed: int = 0
    pictures: int = 24_000
    minutes: float = 7.0


def drawings(seed: str, count: int) -> tuple[list[world.Scene], Pictures]:
    """Return random scenes of the world and their pictures, uint8 [N,64,64,3]."""
    scenes = [world.random_scene(f"{seed}/{index}") for index in range(count)]
    return scenes, np.stack([np.asarray(world.draw(scene), dtype=np.uint8) for scene in scenes])


def write_recipe(path: Path, settings: JudgeSettings, steps: int) -> dict[str, Any]:
    """Measure the judge in `path` on held-out drawings and write recipe.json beside it."""
    shares = accuracy(load(path), *drawings("judge held out", HELD_OUT))
    recipe = {
        "command": "python -m tiny_world judge train",
        "settings": asdict(settings),
        "steps": steps,
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("torch", "numpy", "pillow")},
        },
        "hardware": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "held_out": {
            "drawings": HELD_OUT,
            "accuracy": {name: round(share, 4) for name, share in shares.items()},
        },
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    (path.parent / RECIPE_FILE).write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
    return recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Train the judge and print its recipe as one JSON line."""
    defaults = JudgeSettings()
    parser = Parser(prog="python -m tiny_world judge", description=main.__doc__)
    parser.add_argument("--judge", type=Path, default=JUDGE_WEIGHTS, help="file to write")
    parser.add_argument("--threads", type=int, default=2)
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train")
    training.add_argument("--minutes", type=float, default=defaults.minutes)
    training.add_argument("--pictures", type=int, default=defaults.pictures)
    training.add_argument("--seed", type=int, default=defaults.seed)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    settings = JudgeSettings(
        seed=arguments.seed, pictures=arguments.pictures, minutes=arguments.minutes
    )
    scenes, pictures = drawings(f"judge/{settings.seed}", settings.pictures)
    judge, steps = train(scenes, pictures, seconds=settings.minutes * 60, seed=settings.seed)
    save(judge, arguments.judge)
    print(json.dumps(write_recipe(arguments.judge, settings, steps)))
    return 0
