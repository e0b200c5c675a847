"""A small classifier that reads drawn and generated 64x64 pictures: species, fur, marking, collar,
setting and style.

`python -m dreambooth.tiny.judge train` draws pictures and trains it; `... measure --model FOLDER`
asks a model for each word of the world and prints how often the judge reads what was asked. It
must choose a label even where a picture is soft, so figures for soft pictures are approximate; it
was trained with blur and noise for their sake. The fur and the collar of a pencil sketch cannot be
told and are not taught.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dreambooth.tiny import WEIGHTS, packaging, world
from dreambooth.tiny.judge_network import JUDGE_WEIGHTS, Judge, Pictures, load, save, to_pixels
from dreambooth.tiny.pace import Pace

logger = logging.getLogger(__name__)

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "species": world.SPECIES,
    "fur": tuple(world.FURS),
    "marking": world.MARKINGS,
    "collar": tuple(world.COLLARS),
    "setting": world.SETTINGS,
    "style": world.STYLES,
}
_UNTOLD_IN_SKETCHES = ("fur", "collar")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the judge reads in one picture."""

    species: str
    fur: str
    marking: str
    collar: str
    setting: str
    style: str

    def is_like(self, look: world.Look) -> bool:
        """Whether species, fur, marking and collar are all those of `look`."""
        return (self.species, self.fur, self.marking, self.collar) == look.combination


def labels_of(scenes: Sequence[world.Scene]) -> dict[str, Tensor]:
    """What the scenes show: label numbers [N] by attribute; -100 where it cannot be told."""
    numbers: dict[str, list[int]] = {name: [] for name in ATTRIBUTES}
    for scene in scenes:
        for name, labels in ATTRIBUTES.items():
            source = scene if name in ("setting", "style") else scene.look
            untold = scene.style == "sketch" and name in _UNTOLD_IN_SKETCHES
            numbers[name].append(-100 if untold else labels.index(getattr(source, name)))
    return {name: torch.tensor(values) for name, values in numbers.items()}


def soften(pixels: Tensor) -> Tensor:
    """Blurs half of a batch, by turns a little and more, and adds a little noise to all of it."""
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
    """A judge trained on the given pictures until the time is spent; (judge, steps)."""
    torch.manual_seed(seed)
    judge = Judge({name: len(labels) for name, labels in ATTRIBUTES.items()})
    labels = labels_of(scenes)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=1e-2)
    pace, step = Pace(seconds, 2e-3), 0
    while not pace.over:
        for group in optimizer.param_groups:
            group["lr"] = pace.learning_rate()
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
            logger.info("judge step %d, %.0f s, loss %.4f", step, pace.spent, total.item())
    return judge.eval(), step


@torch.no_grad()
def read(judge: Judge, pictures: Pictures) -> list[Verdict]:
    """What the judge sees in each picture, uint8 [N,64,64,3]."""
    verdicts: list[Verdict] = []
    for start in range(0, len(pictures), 256):
        logits = judge(to_pixels(pictures[start : start + 256]))
        chosen = {
            name: [ATTRIBUTES[name][index] for index in values.argmax(dim=1).tolist()]
            for name, values in logits.items()
        }
        rows = zip(*chosen.values(), strict=True)
        verdicts += [Verdict(**dict(zip(chosen, row, strict=True))) for row in rows]
    return verdicts


@torch.no_grad()
def accuracy(judge: Judge, scenes: Sequence[world.Scene], pictures: Pictures) -> dict[str, float]:
    """Share of right readings for each attribute, where it can be told."""
    logits, labels = judge(to_pixels(pictures)), labels_of(scenes)
    result = {}
    for name, values in logits.items():
        told = labels[name] >= 0
        result[name] = float((values.argmax(dim=1) == labels[name])[told].float().mean())
    return result


def questions() -> list[tuple[str, str, str]]:
    """(prompt, attribute, label that the judge should read) for each word of the world."""
    asked = [(f"a photo of a {species}", "species", species) for species in world.SPECIES]
    for species in world.SPECIES:
        asked += [(f"a photo of {_a(fur)} {species}", "fur", fur) for fur in world.FURS]
        asked += [(f"a photo of a {kind} {species}", "marking", kind) for kind in world.MARKINGS]
        asked += [
            (f"a photo of a {species} with a {collar} collar", "collar", collar)
            for collar in world.COLLARS
            if collar != "none"
        ]
        asked += [
            (f"a photo of a {species} {phrases[0]}", "setting", setting)
            for setting, phrases in world.SETTING_PHRASES.items()
        ]
        asked.append((f"a pencil sketch of a {species}", "style", "sketch"))
    return asked


def _a(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def measure(judge: Judge, pipeline: Any, pictures: int) -> dict[str, float]:
    """Asked-for shares by question, at the embedded model's own settings; `pictures` of each."""
    from dreambooth.tiny import DEFAULTS

    shares: dict[str, float] = {}
    for prompt, attribute, label in questions():
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in range(pictures)]
        images = pipeline(
            [prompt] * pictures,
            num_inference_steps=int(DEFAULTS["num_inference_steps"]),
            guidance_scale=float(DEFAULTS["guidance_scale"]),
            generator=generators,
            output_type="np",
        ).images
        verdicts = read(judge, (images * 255).round().astype(np.uint8))
        shares[prompt] = (
            sum(getattr(verdict, attribute) == label for verdict in verdicts) / pictures
        )
        logger.info("%-50s %s %.2f", prompt, attribute, shares[prompt])
    return shares


def by_attribute(shares: Mapping[str, float]) -> dict[str, float]:
    """The mean share of each attribute."""
    groups: dict[str, list[float]] = {}
    for prompt, attribute, _ in questions():
        groups.setdefault(attribute, []).append(shares[prompt])
    return {attribute: round(sum(group) / len(group), 4) for attribute, group in groups.items()}


def _train_command(arguments: argparse.Namespace) -> None:
    count = arguments.pictures
    scenes = [world.random_scene(f"judge/{arguments.seed}/{index}") for index in range(count)]
    pictures = np.stack([np.asarray(world.draw(scene), dtype=np.uint8) for scene in scenes])
    judge, steps = train(scenes, pictures, seconds=arguments.minutes * 60, seed=arguments.seed)
    save(judge, arguments.judge)
    held_out = [world.random_scene(f"judge held out/{index}") for index in range(1000)]
    drawn = np.stack([np.asarray(world.draw(scene), dtype=np.uint8) for scene in held_out])
    print(json.dumps({"steps": steps, **accuracy(load(arguments.judge), held_out, drawn)}))


def _measure_command(arguments: argparse.Namespace) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(arguments.model, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    shares = measure(load(arguments.judge), pipeline, arguments.pictures)
    result = {
        "pictures_per_prompt": arguments.pictures,
        "attributes": by_attribute(shares),
        "prompts": {prompt: round(share, 4) for prompt, share in shares.items()},
    }
    if arguments.record:
        packaging.add_to_report(arguments.model, {"judged": result})
    print(json.dumps(result))


def main(argv: Sequence[str] | None = None) -> None:
    """Trains the judge, or measures a model with it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--judge", type=Path, default=JUDGE_WEIGHTS)
    parser.add_argument("--threads", type=int, default=2)
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train")
    training.add_argument("--minutes", type=float, default=4.0)
    training.add_argument("--pictures", type=int, default=16_000)
    training.add_argument("--seed", type=int, default=0)
    training.set_defaults(run=_train_command)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--model", type=Path, default=WEIGHTS)
    measuring.add_argument("--pictures", type=int, default=32)
    measuring.add_argument("--record", action="store_true", help="add to the model's recipe.json")
    measuring.set_defaults(run=_measure_command)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
