"""Reads the weights of a component in any published layout, and writes them as safetensors.

Readable are safetensors and the old pickled `.bin`, in one file or in shards, plain or as a variant
such as fp16. A `.bin` is opened only with `torch.load(weights_only=True)`, which builds tensors and
runs no code.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import pickle
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dreambooth.errors import ModelArtifactError, one_line, quoted
from dreambooth.limits import LIMITS, Limits
from dreambooth.model_folder import layout, source
from dreambooth.model_folder.headers import read_header
from dreambooth.process import files

logger = logging.getLogger(__name__)

# Tables of 0, 1, 2, ... that transformers up to 4.30 saved with a text encoder.
_HARMLESS = "position_ids"
_OTHER_PICKLES = (".ckpt", ".pt", ".pth", ".pkl", ".pickle")
_NAMED_AT_MOST = 3
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
                f"{component} does not fit its config.json: it {fault} {_some(names)}."
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


def read_bin(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of an old `.bin`, only with `torch.load(weights_only=True)`.

    Raises ModelArtifactError for a pickle that holds anything but named tensors.
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


def convert(origin: Path | str, destination: Path, *, limits: Limits = LIMITS) -> None:
    """Copy a model folder (or a tarball of one) with every old `.bin` turned into safetensors.

    Nothing else is changed. `destination` must be empty or absent; it appears only when complete.
    Raises ModelArtifactError for anything but a model on this machine (nothing is downloaded), for
    links to folders, and for pickles that hold more than weights or are not called `.bin`. Raises
    ResourceError where the disk is full or `destination` cannot be written.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ModelArtifactError(f"{destination} exists already: give a new or an empty folder.")
    found = source.locate(str(origin), given="as IN", limits=limits)
    if found.path is None:  # it could be the name of a model on a hub
        raise ModelArtifactError(
            f"There is no folder or file {origin} in {Path.cwd()}: give a model folder or a "
            "tarball of one."
        )
    parent = destination.absolute().parent
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            files.disk_faults_named(
                "The converted model", destination, elsewhere="choose another place"
            )
        )
        parent.mkdir(parents=True, exist_ok=True)
        workspace = stack.enter_context(tempfile.TemporaryDirectory(prefix=".partial-", dir=parent))
        folder = source.open_source(found, Path(workspace) / "opened", limits=limits)
        if parent.resolve().is_relative_to(folder.resolve()):
            raise ModelArtifactError(f"{destination} lies inside of {folder}, which is read.")
        whole = Path(workspace) / "converted"
        _convert_folder(folder, whole, layout.home_of(folder), limits)
        layout.validate_folder(whole, limits=limits)
        if destination.exists():
            destination.rmdir()
        files.put_in_place(whole, destination)


def _convert_folder(folder: Path, target: Path, home: str, limits: Limits) -> None:
    """Copy a folder with its content. home: the folder that links may not lead out of."""
    target.mkdir()
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue  # .git, .cache and the like are not part of a model
        copy = target / _safetensors_name(entry.name)
        if entry.is_dir():
            if entry.is_symlink():  # it may lead anywhere, even in a circle
                raise ModelArtifactError(
                    f"{entry} is a link to a folder, which is not followed: put the folder itself "
                    "there, or remove the link."
                )
            _convert_folder(entry, copy, home, limits)
            continue
        _refuse_foreign(entry, home, limits)
        if copy.name != entry.name and (folder / copy.name).exists():
            continue  # a safetensors twin is there already
        elif entry.suffix in _OTHER_PICKLES:
            raise ModelArtifactError(
                f"{entry} is a pickle, which is never opened: remove it first."
            )
        elif entry.name.endswith(".bin"):
            save(read_bin(entry), copy)
        elif copy.name != entry.name:
            index = layout.read_json(entry, limits=limits)
            weight_map = index.get("weight_map")
            if isinstance(weight_map, dict):
                index["weight_map"] = {
                    key: _safetensors_name(str(name)) for key, name in weight_map.items()
                }
            copy.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(entry, copy)


def _refuse_foreign(entry: Path, home: str, limits: Limits) -> None:
    """Raise ModelArtifactError for what is not a file, and for links that lead out of the model.

    Links to weights may lead out. Safetensors there are checked: they might be any text.
    """
    if not entry.is_file():
        raise ModelArtifactError(f"{entry} is no regular file, or a link to nothing.")
    if layout.leads_out(entry, home):
        if entry.suffix not in layout.WEIGHT_SUFFIXES:
            raise ModelArtifactError(layout.LEADS_OUT.format(entry))
        if entry.suffix == ".safetensors":
            read_header(entry, limits=limits)


def _safetensors_name(name: str) -> str:
    """Return the safetensors name of an old weight file or index; other names stay as they are."""
    if not (name.endswith(".bin") or ".bin.index" in name):
        return name
    if name.startswith("pytorch_model"):  # only pickles have the prefix
        name = name.removeprefix("pytorch_")
    return name.replace(".bin", ".safetensors")


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


def _some(names: list[str]) -> str:
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(one_line(name, 100) for name in names[:_NAMED_AT_MOST]) + (
        f" and {more} more" if more > 0 else ""
    )
