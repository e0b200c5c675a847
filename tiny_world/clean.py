"""Measure whether pictures of the drawn world are clean, and check the measure against labels.

`python -m tiny_world clean --out DIR` reads the labelled pictures, measures them in two ways and
prints how well each way tells clean pictures from others: on the half that the formula was chosen
on, on the other half, and by subject; and it writes a sheet of the worst, middle and best pictures.

The labels (`tiny_world/labelled`): 232 pictures of 16 models (the base, and fine-tunes on all five
subjects at guidance 7.5 and 50 steps; `run` is the data set and the steps), labelled by eye, by one
reader before any measure was tried and by a second who saw neither labels nor measures. clean: what
the painter could have painted. burnt: right shapes in overdriven colours. broken: noise or
blotches. mushy: smeared, parts missing or melted into each other. Where the readers differ on clean
or not, a picture counts in neither group. Pictures of even number are the half that is chosen on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from dreambooth import tiny
from dreambooth.diffusion import model as models
from dreambooth.diffusion.model import DiffusionModel
from dreambooth.evaluation.clean import denoising_loss
from dreambooth.evaluation.measures import Values
from dreambooth.report import contact_sheet
from dreambooth.settings.command_line import Parser
from dreambooth.tiny import judge_network
from dreambooth.tiny.judge_network import Judge, Pictures
from tiny_world import world

LABELLED = Path(__file__).parent / "labelled"
SUBJECTS = ("cat", "dog1", "dog2", "chair", "ottoman")

_PAINTED = 100  # drawings of each species
_SIDE, _COLUMNS = 64, 16
# Each part's mean and standard deviation over the clean pictures of the half that is chosen on, and
# its weight, chosen there.
_LOSS, _DOUBT, _TEXTURE = (-0.017, 0.232, 1.0), (-2.651, 0.615, 0.5), (3.434, 0.661, 1.0)
CLEAN_BELOW = 1.5
"""The `strangeness` up to which a picture counts as clean; chosen on the same half."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """A labelled picture: what drew it, and the labels of both readers."""

    number: int
    run: str
    prompt: str
    labels: tuple[str, str]

    @property
    def is_clean(self) -> bool | None:
        """Return what both readers say, None where they differ."""
        first, second = (label == "clean" for label in self.labels)
        return first if first == second else None

    @property
    def subject(self) -> str | None:
        """Return the subject whose fine-tune drew it; None for a dog of the base model."""
        if self.run == "base":
            return next((name for name in SUBJECTS if name in self.prompt.split()), None)
        return self.run.split("_")[-2 if self.run.endswith("-lr3") else 0].split("-")[0]


def labelled() -> tuple[list[Labelled], Pictures]:
    """Return the labelled pictures' facts and the pictures uint8 [N,64,64,3]."""
    lines = (LABELLED / "labels.jsonl").read_text(encoding="utf-8").splitlines()
    facts = []
    for number, line in enumerate(lines):
        row = json.loads(line)
        labels = (row["first"], row["second"])
        facts.append(Labelled(number=number, run=row["run"], prompt=row["prompt"], labels=labels))
    with Image.open(LABELLED / "pictures.png") as atlas:
        pixels = np.asarray(atlas.convert("RGB"))
    corners = [(n // _COLUMNS * _SIDE, n % _COLUMNS * _SIDE) for n in range(len(facts))]
    pictures = [pixels[y : y + _SIDE, x : x + _SIDE] for y, x in corners]
    return facts, np.stack(pictures)


@dataclass(frozen=True, slots=True, kw_only=True)
class Critic:
    """Tells clean pictures of the drawn world from others.

    means [species,64] and inverse [64,64], of the covariance within a species: how the painter's
    drawings look to the judge's first layer, after the VAE has coded them.
    """

    base: DiffusionModel
    judge: Judge
    means: torch.Tensor
    inverse: torch.Tensor

    @classmethod
    def of_the_world(cls) -> Critic:
        """Load the embedded model and the judge, and let the painter draw."""
        base = models.load(tiny.WEIGHTS, device=torch.device("cpu"))
        judge = judge_network.load()
        groups = []
        for species in world.SPECIES:
            pixels = judge_network.to_pixels(_drawings(species))
            with torch.no_grad():
                mean, _ = models.encode_posterior(base, pixels)
                coded = base.vae.decode(mean).sample.clamp(-1, 1)
            groups.append(_texture(judge, coded))
        means = torch.stack([group.mean(dim=0) for group in groups])
        within = torch.cat([group - mean for group, mean in zip(groups, means, strict=True)])
        covariance = within.T @ within / len(within)
        covariance += 0.02 * covariance.diagonal().mean() * torch.eye(len(covariance))
        return cls(base=base, judge=judge, means=means, inverse=torch.linalg.inv(covariance))

    def parts(self, pictures: Pictures) -> tuple[Values, Values, Values]:
        """Return three measures of strange pictures, each [N].

        The base's denoising loss; the judge's doubt, the entropy of all that it reads but the
        style; and the Mahalanobis distance of the texture from the painter's drawings of the
        species that it reads. All as logarithms.
        """
        pixels = judge_network.to_pixels(pictures)
        with torch.no_grad():
            read = self.judge(pixels)
        entropy = torch.zeros(len(pictures))
        for name, logits in read.items():
            if name != "style":
                entropy -= (logits.softmax(dim=1) * logits.log_softmax(dim=1)).sum(dim=1)
        # The judge's labels of species are numbered as the world's.
        off = _texture(self.judge, pixels) - self.means[read["species"].argmax(dim=1)]
        distance = ((off @ self.inverse) * off).sum(dim=1)
        loss = denoising_loss(self.base, list(pictures))
        doubt, texture = ((0.05 + entropy).log(), distance.log())
        return loss, doubt.double().numpy(), texture.double().numpy()

    def clean_share(self, pictures: Pictures) -> float:
        """Return the share of clean pictures; sketches have another texture and are not clean."""
        return float((strangeness(self.parts(pictures)) <= CLEAN_BELOW).mean())


def _drawings(species: str) -> Pictures:
    found: list[npt.NDArray[np.uint8]] = []
    number = 0
    while len(found) < _PAINTED:
        scene = world.random_scene(f"clean/{species}/{number}")
        number += 1
        if scene.look.species == species and scene.style == "photo" and scene.seat is None:
            found.append(np.asarray(world.draw(scene)))
    return np.stack(found)


def _texture(judge: Judge, pixels: torch.Tensor) -> torch.Tensor:
    """Return the mean and deviation [N,64] of the judge's first layer over the picture."""
    with torch.no_grad():
        maps = judge.features[:3](pixels)
    return torch.cat([maps.mean(dim=(2, 3)), maps.std(dim=(2, 3))], dim=1)


def strangeness(parts: tuple[Values, Values, Values]) -> Values:
    """Return [N] the weighted sum of the parts, each in deviations from clean pictures."""
    total = np.zeros(len(parts[0]))
    for values, (mean, deviation, weight) in zip(parts, (_LOSS, _DOUBT, _TEXTURE), strict=True):
        total += weight * (values - mean) / deviation
    return total


def auc(values: Values, is_clean: npt.NDArray[np.bool_]) -> float:
    """Return the share of pairs in which the picture that is not clean has the larger value."""
    clean, other = values[is_clean], values[~is_clean]
    if not len(clean) or not len(other):
        return float("nan")
    return float((other[:, None] > clean[None]).mean())


def main(argv: Sequence[str]) -> int:
    """Measure the labelled pictures, print the tables and write the sheets."""
    parser = Parser(prog="python -m tiny_world clean", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/clean"))
    out: Path = parser.parse_args(argv).out
    facts, pictures = labelled()
    measured = Critic.of_the_world().parts(pictures)
    out.mkdir(parents=True, exist_ok=True)
    for name, values in (("any model", measured[0]), ("drawn world", strangeness(measured))):
        print(f"{name:<12} " + "  ".join(_row(values, facts)))
        path = out / f"{name.replace(' ', '-')}.png"
        _sheet(values, pictures).save(path)
        print(path)
    return 0


def groups(facts: Sequence[Labelled]) -> dict[str, npt.NDArray[np.bool_]]:
    """Return the pictures [N] that both readers agree on: each half, and each subject's."""
    agreed = np.array([fact.is_clean is not None for fact in facts])
    even = np.arange(len(facts)) % 2 == 0
    halves = {"chosen on": agreed & even, "other half": agreed & ~even}
    return halves | {
        name: agreed & np.array([fact.subject == name for fact in facts]) for name in SUBJECTS
    }


def _row(values: Values, facts: Sequence[Labelled]) -> list[str]:
    is_clean = np.array([bool(fact.is_clean) for fact in facts])
    return [
        f"{name} {auc(values[which], is_clean[which]):.3f}" for name, which in groups(facts).items()
    ]


def _sheet(values: Values, pictures: Pictures) -> Image.Image:
    """Return the worst, middle and best eight pictures, a row each."""
    order = np.argsort(-values)
    middle = len(order) // 2 - 4
    rows = [("worst", order[:8]), ("middle", order[middle : middle + 8]), ("best", order[-8:])]
    shown = [(name, list(pictures[which])) for name, which in rows]
    return contact_sheet.draw(shown, cell=128)
