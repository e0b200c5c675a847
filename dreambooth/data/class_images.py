"""Sample the class images that are missing from the requested count, and save them.

JumpStart's sampler drew all pictures from one random stream (so that the batch size changed them),
saved JPEGs into the input channel and trained on black ones too. Here picture i has its own seeds,
is saved as a PNG outside the channels, and is checked before it counts; the latents that it was
decoded from are saved with it. This module needs no torch: the sampler is passed in.
Legend: H W pixels, uint8 0..255; C latent channels, h w latent cells.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, PngImagePlugin

from dreambooth.data import class_latents
from dreambooth.data.images import read_note
from dreambooth.data.picture_files import PictureError, printable
from dreambooth.data.seeds import derive_seed
from dreambooth.errors import DatasetError
from dreambooth.process import files

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sampled:
    """A picture, uint8 [H,W,3], and the latents that it was decoded from, float32 [C,h,w]."""

    picture: Pixels
    latents: class_latents.Latents


Sampler = Callable[[Sequence[int]], Sequence[Sampled | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingShare:
    """The part of one process among those that sample together; of all of it without others.

    gather: a value -> the values of all processes, in the same order everywhere. writes: whether
    this process writes what its host lacks.
    """

    process: int = 0
    processes: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    writes: bool = True


ATTEMPTS = 4
"""Seeds that are tried for one picture: its first and up to three more."""

_EXCHANGED_AT_ONCE = 64  # pictures of 512 x 512 take 0.5 MB each
_BLACK_LEVEL = 4  # of 255: a picture without a brighter pixel is black
_NOTE_KEY = "dreambooth"


def ensure(
    folder: Path,
    *,
    given: Sequence[Path],
    count: int,
    batch_size: int,
    seed: int,
    sample: Sampler,
    fingerprint: str = "",
    elsewhere: str = "give another folder",
    on_image: Callable[[int], None] = lambda done: None,
    share: SamplingShare | None = None,
) -> tuple[Path, ...]:
    """Sample what the given class images lack of `count`; return all paths, the given ones first.

    `sample` takes up to `batch_size` seeds and returns one picture per seed, None for one that is
    not finite. Picture i becomes `folder/class_0000i.png`, written whole or not at all, after its
    latents (`class_latents`); its seed is `derived_seed(seed, i, attempt)`, whatever the batch
    size. Pictures of an earlier, stopped run are kept if they are readable and carry the same
    `fingerprint` and seed. Refused pictures (None, black) are sampled again with the next attempt's
    seed. `on_image` is called with the number of sampled pictures in the folder, old ones included;
    `elsewhere` says in messages how to have another folder. Several processes take the batches in
    turns; in the end all pictures are on the disk of each of them.

    Raises DatasetError if a picture was refused ATTEMPTS times, ResourceError if the folder cannot
    be written.
    """
    paths = [folder / f"class_{index:05d}.png" for index in range(max(0, count - len(given)))]

    def lacking() -> set[int]:
        return {
            index
            for index, path in enumerate(paths)
            if not _is_kept(path, {_note(fingerprint, seed, index, k) for k in range(ATTEMPTS)})
        }

    share = share or SamplingShare()
    missing: set[int] = share.gather(lacking())[0]
    samplers = dict.fromkeys(range(len(paths)), 0)  # by picture; 0 has those of an earlier run
    done, turn = len(paths) - len(missing), 0
    on_image(done)
    for start in range(0, len(paths), batch_size):
        # Keep the same batches even after a stop within one: the last bits of a picture depend on
        # the others in its batch, and may change the level of a pixel.
        pending = list(range(start, min(start + batch_size, len(paths))))
        if missing.isdisjoint(pending):
            continue
        process, turn = turn % share.processes, turn + 1
        samplers |= dict.fromkeys(missing.intersection(pending), process)
        if process != share.process:
            continue
        for attempt in range(ATTEMPTS):
            seeds = [derived_seed(seed, index, attempt) for index in pending]
            refused = []
            for index, sampled in zip(pending, sample(seeds), strict=True):
                if sampled is None or _is_black(sampled.picture):
                    refused.append(index)
                    continue
                if index in missing:
                    note = _note(fingerprint, seed, index, attempt)
                    _write(paths[index], sampled, note, fingerprint, elsewhere)
                    done += 1
                    on_image(done)
            pending = refused
            if not pending:
                break
        if pending:
            raise DatasetError(_refused(pending[0]))
    if share.processes > 1:
        share.gather(None)  # all pictures are sampled
        _exchange(paths, lacking(), samplers, share, elsewhere)
        on_image(len(paths))
    return (*given, *paths)


def _exchange(
    paths: Sequence[Path],
    lacking: set[int],
    samplers: Mapping[int, int],
    share: SamplingShare,
    elsewhere: str,
) -> None:
    """Write the pictures that other hosts have sampled, with their latents, onto this host's disk.

    lacking: of this host. samplers: picture -> the process that has it.
    """
    wanted = sorted(set().union(*share.gather(lacking)))
    for start in range(0, len(wanted), _EXCHANGED_AT_ONCE):
        part = [n for n in wanted[start:][:_EXCHANGED_AT_ONCE] if samplers[n] == share.process]
        for sent in share.gather({n: _read(paths[n]) for n in part}):
            for number in lacking.intersection(sent) if share.writes else ():
                picture, latents = sent[number]
                _put(paths[number], picture, latents, elsewhere)
    share.gather(None)  # all files are written


def _read(path: Path) -> tuple[bytes, bytes]:
    """Return the files of a sampled picture and of its latents, which may be lost."""
    latents = class_latents.place_of(path)
    return path.read_bytes(), latents.read_bytes() if latents.is_file() else b""


def derived_seed(seed: int, index: int, attempt: int = 0) -> int:
    """Return the 63-bit seed of class image `index`, which depends on these three numbers alone."""
    return derive_seed(seed, "class image", index, attempt)


def _note(fingerprint: str, seed: int, index: int, attempt: int) -> str:
    """Return the origin of a sampled picture, as its PNG carries it in a text chunk."""
    return f"{fingerprint} seed={derived_seed(seed, index, attempt)}"


def _is_kept(path: Path, notes: set[str]) -> bool:
    try:
        return read_note(path, _NOTE_KEY) in notes
    except PictureError:
        return False


def _is_black(picture: Pixels) -> bool:
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"a sampler must give uint8 [H,W,3], not {picture.dtype} {picture.shape}")
    return int(picture.max(initial=0)) <= _BLACK_LEVEL


def _write(path: Path, sampled: Sampled, note: str, fingerprint: str, elsewhere: str) -> None:
    """Write the latents, then the picture: even after a kill no picture lacks its latents."""
    text = PngImagePlugin.PngInfo()
    text.add_text(_NOTE_KEY, note)
    png = io.BytesIO()
    Image.fromarray(sampled.picture).save(png, "PNG", pnginfo=text)
    picture = png.getvalue()
    latents = class_latents.content(sampled.latents, picture=picture, origin=fingerprint)
    _put(path, picture, latents, elsewhere)


def _put(path: Path, picture: bytes, latents: bytes, elsewhere: str) -> None:
    with files.disk_faults_named(
        f"The class image {printable(path.name)}",
        printable(path.parent),
        elsewhere=elsewhere,
        smaller="lower num_class_images",
    ):
        for place, content in ((class_latents.place_of(path), latents), (path, picture)):
            if not content:
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            files.write_whole(place, content)


def _refused(index: int) -> str:
    return (
        f"Class image {index} came out black or not finite with each of {ATTEMPTS} seeds: set "
        "prior_generation_precision to fp32, change class_prompt, or put class images of your own "
        "into class_data_dir."
    )
