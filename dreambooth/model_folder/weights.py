"""Reads the weights of a component in any published layout, and writes them as safetensors.

Readable are safetensors and the old pickled `.bin`, in one file or in shards, plain or as a variant
such as fp16. A `.bin` is opened only with `torch.load(weights_only=True)`, which builds tensors and
runs no code.
"""

from __future__ import annotations

import functools
import logging
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dreambooth.errors import ModelArtifactError, quoted, some_of
from dreambooth.limits import LIMITS, Limits
from dreambooth.model_folder import layout
from dreambooth.model_folder.headers import read_header

logger = logging.getLogger(__name__)

# Tables of 0, 1, 2, ... that transformers up to 4.30 saved with a text encoder.
_HARMLESS = "position_ids"
# The types that safetensors headers may name (`headers.DTYPES`).
_DTYPES = frozenset(
    (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.bool),
        *(torch.int64, torch.int32, torch.int16, torch.int8),
        *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    )
)
# Bytes of tensors per byte of a pickle, at most: tied weights are tensors that share their data.
_MOST_SHARED = 4
# What libraries raise for damaged or malicious files.
_LIBRARY_FAULTS = (
    *(RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError),
    *(ArithmeticError, AssertionError, MemoryError, struct.error),
)


def load_into(
    module: torch.nn.Module,
    component: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    rename: Callable[[str], str | None] = str,
    limits: Limits = LIMITS,
) -> None:
    """Load a module's weights from a component folder; its parameters may be on "meta".

    The names in the files, after `rename`, must be exactly the module's, and every shape must fit.
    Libraries only warn where they do not, and fill the gaps with random weights; here this raises
    ModelArtifactError, and so do numbers that are not finite. rename: returns None for a weight
    that the module does not need.
    """
    expected = module.state_dict()
    state: dict[str, torch.Tensor] = {}
    foreign: list[str] = []
    for path, key, tensor in read_tensors(component, limits=limits):
        name = rename(key)
        if name is None:
            continue
        if name not in expected:
            if not name.endswith(_HARMLESS):
                foreign.append(key)
            continue
        if expected[name].ndim == 2:
            tensor = as_linear(tensor)
        _check(path, key, tensor, expected[name])
        if name in state:
            raise ModelArtifactError(f"{path} holds {quoted(name)} a second time.")
        # A copy, never a view of the mapped file: the file may be replaced while we train.
        state[name] = tensor.to(device=device, dtype=dtype, copy=True)
        if not bool(torch.isfinite(state[name]).all()):
            raise ModelArtifactError(
                f"{path} holds numbers that are not finite as {dtype} in {quoted(key)}: it is "
                "damaged, or comes from a run that diverged."
            )
    missing = [name for name in expected if name not in state and not name.endswith(_HARMLESS)]
    for fault, names in (("lacks", missing), ("holds the foreign", foreign)):
        if names:
            raise ModelArtifactError(
                f"{component} does not fit its config.json: it {fault} {some_of(names)}."
            )
    module.load_state_dict(state, strict=False, assign=True)


def as_linear(tensor: torch.Tensor) -> torch.Tensor:
    """Return the weight of a 1 x 1 convolution [O,I,1,1] as that of a linear layer [O,I].

    The first VAEs store their attention as convolutions. Other tensors are returned as they are.
    """
    return tensor[:, :, 0, 0] if tensor.ndim == 4 and tensor.shape[2:] == (1, 1) else tensor


def read_tensors(
    component: Path, *, limits: Limits = LIMITS
) -> Iterator[tuple[Path, str, torch.Tensor]]:
    """Yield (file, name, tensor on the CPU) of a component folder; tensors may map the file."""
    chosen, files = layout.weight_files(component, limits=limits)
    if chosen.pickled:
        _warn_of_pickles(component.parent)
    for path in files:
        if chosen.pickled:
            yield from ((path, key, tensor) for key, tensor in read_bin(path).items())
        else:
            yield from _read_safetensors(path, limits)


@functools.cache
def _warn_of_pickles(folder: Path) -> None:
    """Warn once per model and process, since a job reads the parts of its model several times."""
    logger.warning(
        "%s holds old pickled weights (.bin): only tensors are read from them, and any model that "
        "is written from them is safetensors (`python -m dreambooth convert` makes it so for good)",
        folder,
    )


def _read_safetensors(path: Path, limits: Limits) -> Iterator[tuple[Path, str, torch.Tensor]]:
    read_header(path, limits=limits)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                yield path, key, file.get_tensor(key)
    except (SafetensorError, *_LIBRARY_FAULTS) as error:
        raise ModelArtifactError(f"{path} cannot be read as safetensors: {error}.") from error


def read_bin(path: Path, *, inside: str | None = None) -> dict[str, torch.Tensor]:
    """Read the tensors of an old `.bin`, only with `torch.load(weights_only=True)`.

    inside: the name of a table within the pickle, which is read instead if it is there. Raises
    ModelArtifactError for a pickle that holds anything but named tensors.
    """
    try:
        packed = zipfile.is_zipfile(path)
        if packed:
            _refuse_compressed(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=packed)
    except (pickle.UnpicklingError, zipfile.BadZipFile, *_LIBRARY_FAULTS) as error:
        raise ModelArtifactError(
            f"{path} is a pickle that holds more than weights, or is damaged: it is not loaded, "
            "for it could run code; give the model as safetensors."
        ) from error
    if inside is not None and isinstance(state, dict):
        state = state.get(inside, state)
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        raise ModelArtifactError(f"{path} does not hold a plain table of named tensors.")
    for key, tensor in state.items():
        if not _is_plain(tensor):
            raise ModelArtifactError(
                f"{path} holds {quoted(key)}, which is no plain table of numbers (but sparse, "
                "nested, quantized, of an odd type or shape, without data, or larger than its "
                "data): give the model as safetensors."
            )
    total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if total > _MOST_SHARED * path.stat().st_size:
        raise ModelArtifactError(f"{path} names the same data again and again: {total} bytes.")
    return state


def _refuse_compressed(path: Path) -> None:
    """Raise ModelArtifactError for compressed records.

    torch never compresses its records, so a compressed one could only be a decompression bomb.
    """
    with zipfile.ZipFile(path) as archive:
        if any(item.compress_type != zipfile.ZIP_STORED for item in archive.infolist()):
            raise ModelArtifactError(f"{path} holds compressed records, which torch never writes.")


def _is_plain(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is a dense table of a known dtype, all of it in CPU memory."""
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
        return False
    if tensor.dtype not in _DTYPES or tensor.ndim > LIMITS.max_tensor_rank:
        return False
    there = tensor.device.type == "cpu"
    return there and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def save(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write tensors as one safetensors file, with the metadata that transformers requires."""
    path.touch()
    mode = path.stat().st_mode  # the library makes files that only their owner may read
    whole: dict[str, torch.Tensor] = {}
    taken: set[int] = set()
    for key, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        whole[key] = tensor.clone() if memory in taken else tensor  # pickles may share memory
        taken.add(memory)
    save_file(whole, path, {"format": "pt"})
    path.chmod(mode)


def _check(path: Path, key: str, tensor: torch.Tensor, expected: torch.Tensor) -> None:
    if tensor.shape != expected.shape:
        raise ModelArtifactError(
            f"{path} holds {quoted(key)} in the shape {list(tensor.shape)}, where its config.json "
            f"asks for {list(expected.shape)}."
        )
    if not tensor.is_floating_point():
        raise ModelArtifactError(
            f"{path} holds {quoted(key)} as {tensor.dtype}, which are no weights."
        )
