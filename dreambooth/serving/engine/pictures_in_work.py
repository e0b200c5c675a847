"""Hold the pictures that the engine works on, and arrange them as rows of U-Net calls.

Legend: L tokens, D text width.
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
class PictureInWork:
    """One picture of a job, from the queue until it is decoded.

    size: (width, height) in pixels. places: the rows of a call that it must occupy (the negative
    prompt's, then the prompt's), None where the position does not matter. trajectory: None until
    the picture begins. exact: False once memory was too short for exact mode. restarts: how often
    it began again because memory ran out in a step of its noise scheduler. decoding: the VAE's
    work once begun; it has taken decoding_s seconds so far. decoding_failed: whether memory ran
    out in it; the next time the job fails.
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
        """Return the request for this picture."""
        return self.job.requests[self.index]

    @property
    def unet_rows(self) -> int:
        """Return how many rows of a U-Net call the picture occupies."""
        return self.request.unet_rows


def places_of(request: SamplingRequest, rows: int) -> tuple[int, ...]:
    """Return the rows that a picture occupies in every call of `rows` rows, chosen by its seed.

    The pictures of one request have consecutive seeds, so up to rows // 2 guided ones, or `rows`
    unguided ones, get different rows.
    """
    if not request.guided:
        return (request.seed % rows,)
    pairs = rows // 2
    return (request.seed % pairs, request.seed % pairs + pairs)


class TextCache:
    """A cache of the most recently used strings in encoded form.

    Each string is encoded alone, so that no other string in a batch can change its bits.
    """

    def __init__(self, model: DiffusionModel, *, most: int = 128) -> None:
        """most: how many strings to keep; one takes 2 * L * D bytes in half precision (158 kB)."""
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
        """Drop all strings to free memory."""
        self._known.clear()


def gather(pictures: Sequence[PictureInWork], *, call_rows: int | None) -> TextRows:
    """Return the text of a call's pictures, padded to `call_rows` rows if that is given.

    Every picture must have its encoded text. With `call_rows`, pictures with `places` get them.
    """
    guided = [i for i, each in enumerate(pictures) if each.request.guided]
    hidden = [pictures[i].negative_prompt for i in guided] + [each.prompt for each in pictures]
    text = [each for each in hidden if each is not None]
    assert len(text) == len(guided) + len(pictures)
    device = text[0].device
    placement = None
    if call_rows is not None:
        places = list(range(len(text)))
        if any(each.places is not None for each in pictures):
            of_each = [each.places or () for each in pictures]
            places = [of_each[i][0] for i in guided] + [each[-1] for each in of_each]
        sources = [0] * call_rows
        for source, place in enumerate(places):
            sources[place] = source
        text = [text[source] for source in sources]
        placement = Placement(
            places=torch.tensor(places, device=device), sources=torch.tensor(sources, device=device)
        )
    scales = [pictures[i].request.guidance_scale for i in guided]
    return TextRows(
        encoder_hidden_states=torch.stack(text),
        guided=torch.tensor(guided, dtype=torch.int64, device=device),
        guidance_scale=torch.tensor(scales, device=device).reshape(-1, 1, 1, 1),
        placement=placement,
    )
