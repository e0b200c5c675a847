"""Pre-train the embedded model, from random weights to the folder that ships.

`python -m tiny_world recipe --work DIR [--minutes N] [--seed S]` draws the pictures, trains
the VAE, encodes the pictures, trains text encoder and U-Net together and writes
`dreambooth/tiny/weights`. Every stage keeps its result in DIR and every training keeps checkpoints,
so a stopped command can be started again and continues. `--minutes` is the time of the two
trainings together; each learning rate falls to 1 % of its peak by the end of its training, however
many steps the machine has made.

The shipped weights were made like this (2026-11-22, two cores of an AMD EPYC of the Zen 4
generation with AVX512_BF16, two threads, the other two cores of the machine busy with other work,
seed 0):

    stage                                     time        result
    draw 55 680 pictures                      1.0 min
    VAE, 9 575 steps                          16.2 min    27.6 dB
    encode them                               1.4 min
    text encoder and U-Net, 13 417 steps      118.8 min   loss 0.0252

Three settings of the environment matter on a CPU: `MALLOC_MMAP_MAX_=0`,
`MALLOC_TRIM_THRESHOLD_=8589934592` (which avoid page faults for every large tensor) and, where the
cores are free, `GOMP_SPINCOUNT=30000`. Never use more threads than there are free cores.

`weights/recipe.json` and docs/measurements.md state what the judge reads in its pictures
(`python -m tiny_world evaluate --record`). `--without MEASURE` leaves out one of the special
measures of the training, for ablations.

DreamBooth training itself is in `dreambooth.job`, for this model as for any other.
"""

from __future__ import annotations

import logging
import multiprocessing
import platform
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dreambooth.settings.command_line import Parser
from dreambooth.tiny import WEIGHTS
from tiny_world import captions, packaging, text_unet_training, tokenizer, vae_training, world
from tiny_world.brush import SIZE
from tiny_world.text_unet_training import LatentSet, TextUnetSettings, TokenizerFacts, Trained
from tiny_world.vae_training import VaeSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeSettings:
    """Everything that the result depends on, except the machine's speed."""

    seed: int = 0
    minutes: float = 135.0
    vae_share: float = 0.12
    pictures: int = 48_000
    individuals: int = 480
    pictures_each: int = 16
    captions_each: int = 6
    vae: VaeSettings = field(default_factory=VaeSettings)
    text_unet: TextUnetSettings = field(default_factory=TextUnetSettings)


MEASURES: dict[str, dict[str, float]] = {
    "probe": {"probe_weight": 0.0},
    "skew": {"timestep_power": 1.0},
    "weights": {"weight_cap": 1.0},
    "names": {"named_per_batch": 0},
}
"""The special measures of the training, with the settings that switch each of them off."""


def without(settings: TextUnetSettings, measures: Sequence[str]) -> TextUnetSettings:
    """Return the settings with the named measures switched off."""
    for measure in measures:
        settings = replace(settings, **MEASURES[measure])  # type: ignore[arg-type]
    return settings


def _draw(scene: world.Scene) -> npt.NDArray[np.uint8]:
    return np.asarray(world.draw(scene), dtype=np.uint8)


def _draw_all(scenes: Sequence[world.Scene], processes: int) -> npt.NDArray[np.uint8]:
    if len(scenes) < 1000:  # too few to be worth starting processes
        return np.stack([_draw(scene) for scene in scenes])
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return np.stack(pool.map(_draw, scenes, chunksize=64))


class Recipe:
    """Runs the stages of pre-training.

    Each stage returns its result, which is read from the work folder if an earlier start left it
    there.
    """

    def __init__(self, settings: RecipeSettings, work: Path) -> None:
        self._settings, self._work = settings, work
        work.mkdir(parents=True, exist_ok=True)

    def run(self, weights: Path, *, export_only: bool = False) -> None:
        """Run all stages in order.

        export_only: write the folder from the checkpoints, even of unfinished trainings.
        """
        vae, vae_steps = self.train_vae(seconds=0.0 if export_only else None)
        data = self.encode(vae)
        trained, steps, loss = self.train_text_unet(data, seconds=0.0 if export_only else None)
        pictures = np.array(self.pictures()[:256])
        figures = {
            "vae_steps": vae_steps,
            "vae_psnr_db": vae_training.psnr(pictures, vae_training.reconstruct(vae, pictures)),
            "text_unet_steps": steps,
            "text_unet_loss": loss,
        }
        self.export(weights, vae, trained, data.scaling_factor, figures)

    def scenes(self) -> list[world.Scene]:
        """Return the scenes of the training pictures."""
        settings = self._settings
        return list(
            world.corpus(
                settings.pictures, settings.individuals, settings.pictures_each, settings.seed
            )
        )

    def pictures(self) -> npt.NDArray[np.uint8]:
        """Return the training pictures, uint8 [N,64,64,3], memory-mapped from disk."""
        path = self._work / "pictures.npy"
        if not path.exists():
            with self._timed("draw"):
                _save_array(path, _draw_all(self.scenes(), torch.get_num_threads()))
        result: npt.NDArray[np.uint8] = np.load(path, mmap_mode="r")
        return result

    def tokenizer(self) -> Any:
        """Return the tokenizer, after writing it to the work folder if it is not there."""
        from transformers import CLIPTokenizer

        folder = self._work / "tokenizer"
        if not folder.exists():
            tokenizer.write(folder, world.WORDS)
        return CLIPTokenizer.from_pretrained(folder)

    def captions(self) -> npt.NDArray[np.int16]:
        """Return the token ids of several captions of every picture, int16 [N,captions,L]."""
        path = self._work / "captions.npy"
        if not path.exists():
            rng = random.Random(f"captions/{self._settings.seed}")
            each = self._settings.captions_each
            scenes = self.scenes()
            texts = [captions.caption(scene, rng) for scene in scenes for _ in range(each)]
            encoded = self.tokenizer()(texts, padding="max_length", truncation=True).input_ids
            _save_array(path, np.array(encoded, dtype=np.int16).reshape(len(scenes), each, -1))
        result: npt.NDArray[np.int16] = np.load(path)
        return result

    def train_vae(self, seconds: float | None = None) -> tuple[Any, int]:
        """Train the VAE; return (VAE, steps)."""
        settings = self._settings
        if seconds is None:
            seconds = settings.minutes * 60 * settings.vae_share
        return vae_training.train(
            self.pictures(),
            settings.vae,
            seconds=max(seconds, 1e-3),
            seed=settings.seed,
            checkpoint=self._work / "vae.pt",
        )

    def encode(self, vae: Any) -> LatentSet:
        """Encode the training set; the scaling factor makes the latents' standard deviation 1."""
        path = self._work / "latents.pt"
        if not path.exists():
            with self._timed("encode"):
                means, stds = vae_training.encode(vae, self.pictures())
            torch.save({"means": means, "stds": stds}, path)
        saved = torch.load(path, weights_only=True)
        means, stds = saved["means"], saved["stds"]
        variance = means.float().var() + stds.float().square().mean()
        return LatentSet(
            means=means,
            stds=stds,
            input_ids=torch.from_numpy(self.captions()),
            unnamed=self._settings.pictures,
            scaling_factor=round(float(variance.rsqrt()), 5),
        )

    def train_text_unet(
        self, data: LatentSet, seconds: float | None = None
    ) -> tuple[Trained, int, float]:
        """Train both; return (moving average of text encoder and U-Net, steps, smoothed loss)."""
        settings = self._settings
        if seconds is None:
            seconds = settings.minutes * 60 * (1 - settings.vae_share)
        words = self.tokenizer()
        vocabulary = TokenizerFacts(
            size=len(words),
            begin=words.bos_token_id,
            end=words.eos_token_id,
            max_length=words.model_max_length,
        )
        return text_unet_training.train(
            data,
            settings.text_unet,
            vocabulary,
            seconds=max(seconds, 1e-3),
            seed=settings.seed,
            checkpoint=self._work / "text_unet.pt",
        )

    def export(
        self,
        weights: Path,
        vae: Any,
        trained: Trained,
        scaling_factor: float,
        figures: dict[str, float],
    ) -> None:
        """Write the pipeline folder with its recipe.json."""
        packages = ("torch", "diffusers", "transformers", "numpy", "pillow")
        report = {
            "command": "python -m tiny_world recipe",
            "settings": asdict(self._settings),
            "versions": {
                "python": platform.python_version(),
                **{name: metadata.version(name) for name in packages},
            },
            "hardware": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "figures": {name: round(value, 4) for name, value in figures.items()},
        }
        packaging.write(
            weights,
            vae=vae,
            text_encoder=trained.text_encoder,
            unet=trained.unet,
            scaling_factor=scaling_factor,
            tokenizer=self._work / "tokenizer",
            resolution=SIZE,
            report=report,
        )
        logger.info("written: %s", weights)

    def _timed(self, stage: str) -> _Timed:
        return _Timed(stage)


class _Timed:
    """Logs how long a stage took."""

    def __init__(self, stage: str) -> None:
        self._stage = stage

    def __enter__(self) -> None:
        self._start = time.monotonic()

    def __exit__(self, *error: object) -> None:
        logger.info("%s: %.0f s", self._stage, time.monotonic() - self._start)


def _save_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Save the array completely or not at all, so that a stopped stage is made again."""
    partial = path.with_suffix(".partial.npy")
    np.save(partial, array)
    partial.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Train the embedded model."""
    defaults = RecipeSettings()
    parser = Parser(prog="python -m tiny_world recipe", description=main.__doc__)
    parser.add_argument("--work", type=Path, required=True, help="where stages keep their results")
    parser.add_argument(
        "--minutes", type=float, default=defaults.minutes, help="time of the trainings"
    )
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (free cores, no more)")
    parser.add_argument(
        "--weights", type=Path, default=WEIGHTS, help="where the pipeline is written"
    )
    parser.add_argument(
        "--export_only", action="store_true", help="pack the checkpoints as they are"
    )
    parser.add_argument(
        "--without",
        action="append",
        choices=MEASURES,
        default=[],
        help="leave out a special measure (ablation)",
    )
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    text_unet = without(defaults.text_unet, arguments.without)
    settings = RecipeSettings(seed=arguments.seed, minutes=arguments.minutes, text_unet=text_unet)
    Recipe(settings, arguments.work).run(arguments.weights, export_only=arguments.export_only)
    return 0
