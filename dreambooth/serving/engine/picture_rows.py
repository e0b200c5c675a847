"""The pictures of the engine as rows of U-Net calls, and the text that goes with them.

Legend: B pictures of a call, G of them guided, R rows of a call, L tokens, D text width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dreambooth.diffusion.denoising import Placement, TextRows
from dreambooth.diffusion.model import DiffusionModel, encode_text, tokenize
from dreambooth.diffusion.sampling_request import SamplingRequest
from dreambooth.diffusion.trajectories import Trajectory
from dreambooth.serving.contract.reply import Picture
from dreambooth.serving.engine.drawing_jobs import DrawingJob


@dataclass(slots=True, kw_only=True, eq=False)
class PictureRow:
    """One picture of a job, from the queue to its last step.

    size: (width, height) in pixels. places: the rows of a call that it must have (the negative
    prompt's, then the prompt's), where the place matters. trajectory: None while it waits.
    restarts: how often it began anew because a step of its noise scheduler failed halfway.
    decoding: the VAE's work, once begun; it has taken decoding_s seconds. decoding_failed: it was
    begun anew, as memory ran out.
    """

    job: DrawingJob
    index: int
    size: tuple[int, int]
    places: tuple[int, ...] | None = None
    trajectory: Trajectory | None = None
    prompt: Tensor | None = None
    negative_prompt: Tensor | None = None
    exact: bool = True
    restarts: int = 0
    decoding: Generator[None, None, Picture] | None = None
    decoding_s: float = 0.0
    decoding_failed: bool = False

    @property
    def request(self) -> SamplingRequest:
        """What was asked for."""
        return self.job.requests[self.index]

    @property
    def unet_rows(self) -> int:
        """Rows of a U-Net call: 2 with guidance, else 1."""
        return 2 if self.request.guided else 1


def places_of(request: SamplingRequest, rows: int) -> tuple[int, ...]:
    """Return the rows that a picture has in every call of `rows` rows: its seed decides.

    Consecutive seeds, as the pictures of one request have, get different rows.
    """
    if not request.guided:
        return (request.seed % rows,)
    pairs = rows // 2
    return (request.seed % pairs, request.seed % pairs + pairs)


class TextCache:
    """Encoded strings, each encoded alone so that no neighbour can change it; the latest stay."""

    def __init__(self, model: DiffusionModel, *, most: int = 128) -> None:
        """`most`: strings to remember; one takes 2 * L * D bytes in half precision (158 kB)."""
        self._model = model
        self._most = most
        self._known: OrderedDict[str, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, string: str) -> Tensor:
        """Return the encoder_hidden_states [L, D] of a string, as the U-Net takes them."""
        if string not in self._known:
            model = self._model
            hidden = encode_text(model, tokenize(model, [string]))[0]
            self._known[string] = hidden.to(device=model.device, dtype=model.unet.dtype)
            if len(self._known) > self._most:
                self._known.popitem(last=False)
        self._known.move_to_end(string)
        return self._known[string]

    def clear(self) -> None:
        """Forget all strings: memory is short."""
        self._known.clear()


def gather(rows: Sequence[PictureRow], *, call_rows: int | None) -> TextRows:
    """Return the text of a call's pictures; `call_rows` pads it to so many rows.

    Every picture has its text. With `call_rows`, pictures that have places get them.
    """
    guided = [i for i, row in enumerate(rows) if row.request.guided]
    hidden = [rows[i].negative_prompt for i in guided] + [row.prompt for row in rows]
    text = [each for each in hidden if each is not None]
    assert len(text) == len(guided) + len(rows)
    device = text[0].device
    placement = None
    if call_rows is not None:
        places = list(range(len(text)))
        if any(row.places is not None for row in rows):
            of_each = [row.places or () for row in rows]
            places = [of_each[i][0] for i in guided] + [each[-1] for each in of_each]
        sources = [0] * call_rows
        for source, place in enumerate(places):
            sources[place] = source
        text = [text[source] for source in sources]
        placement = Placement(
            places=torch.tensor(places, device=device), sources=torch.tensor(sources, device=device)
        )
    scales = [rows[i].request.guidance_scale for i in guided]
    return TextRows(
        encoder_hidden_states=torch.stack(text),
        guided=torch.tensor(guided, dtype=torch.int64, device=device),
        guidance_scale=torch.tensor(scales, device=device).reshape(-1, 1, 1, 1),
        placement=placement,
    )
