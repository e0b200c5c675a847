"""Runs diffusers' unchanged `train_dreambooth.py` and saves all its random draws.

`recorded_draws.py DRAWS_FILE SCRIPT [ARGUMENT ...]` runs the script's own `main` with one picture a
step. The computation is not changed: three functions that it calls are wrapped to save what they
draw or receive.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dreambooth.data.sample_draws import SampleDraws

STREAMS = ("instance", "class")


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """The draws of S steps of K halves: the instance half alone, or the class half after it.

    pictures: for each step the file names [K]. timesteps: int64 [S,K]. posterior_noise, noise:
    float32 [S,K,C,h,w].
    """

    pictures: list[list[str]]
    timesteps: torch.Tensor
    posterior_noise: torch.Tensor
    noise: torch.Tensor

    @classmethod
    def load(cls, path: Path) -> Draws:
        return cls(**torch.load(path, weights_only=True))

    def replayed(self, names: dict[str, Sequence[str]]) -> Callable[..., SampleDraws]:
        """Return a replacement for `sample_draws.draw`.

        names: the file names of each stream, in our order.
        """

        def draw(samples: range, *, stream: str, **_: object) -> SampleDraws:
            rows, half = list(samples), STREAMS.index(stream)
            images = [names[stream].index(self.pictures[row][half]) for row in rows]
            return SampleDraws(
                images=torch.tensor(images),
                crop_indices=torch.zeros(len(rows), dtype=torch.long),
                timesteps=self.timesteps[rows, half],
                posterior_noise=self.posterior_noise[rows, half],
                noise=self.noise[rows, half],
            )

        return draw


def main(draws_file: str, script: str, *arguments: str) -> None:
    spec = importlib.util.spec_from_file_location("train_dreambooth", script)
    assert spec is not None
    assert spec.loader is not None
    peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)

    from diffusers.models.autoencoders import vae

    pictures: list[list[str]] = []
    posterior_noise: list[torch.Tensor] = []
    noised: list[tuple[torch.Tensor, torch.Tensor]] = []
    take, draw_normal = peer.DreamBoothDataset.__getitem__, vae.randn_tensor
    add_noise = peer.DDPMScheduler.add_noise

    def take_and_tell(dataset: Any, index: int) -> Any:
        lists = [dataset.instance_images_path]
        if dataset.class_data_root:
            lists.append(dataset.class_images_path[: dataset.num_class_images])
        pictures.append([paths[index % len(paths)].name for paths in lists])
        return take(dataset, index)

    def draw_normal_and_tell(*given: Any, **named: Any) -> torch.Tensor:
        drawn: torch.Tensor = draw_normal(*given, **named)
        posterior_noise.append(drawn.cpu().clone())
        return drawn

    def add_noise_and_tell(
        scheduler: Any, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        noised.append((noise.cpu().clone(), timesteps.cpu().clone()))
        noisy: torch.Tensor = add_noise(scheduler, latents, noise, timesteps)
        return noisy

    peer.DreamBoothDataset.__getitem__ = take_and_tell
    vae.randn_tensor = draw_normal_and_tell
    peer.DDPMScheduler.add_noise = add_noise_and_tell
    peer.main(peer.parse_args(list(arguments)))
    draws = Draws(
        pictures=pictures[: len(noised)],  # accelerate loads one batch ahead
        timesteps=torch.stack([timesteps for _, timesteps in noised]),
        posterior_noise=torch.stack(posterior_noise),
        noise=torch.stack([noise for noise, _ in noised]),
    )
    torch.save(asdict(draws), draws_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
