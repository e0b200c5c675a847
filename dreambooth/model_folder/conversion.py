"""Turns a model into a folder in safetensors, or into one file (`python -m dreambooth convert`)."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Final, Literal

from dreambooth.errors import ModelArtifactError, UserError
from dreambooth.limits import LIMITS, Limits
from dreambooth.model_folder import layout, single_file, single_file_export, source, weights
from dreambooth.model_folder.headers import read_header
from dreambooth.model_folder.mistaken_files import refuse_stand_in
from dreambooth.process import files

_OTHER_PICKLES: Final = (".ckpt", ".pt", ".pth", ".pkl", ".pickle")


def convert(
    origin: Path | str,
    destination: Path,
    *,
    prediction_type: str | None = None,
    base: str | None = None,
    precision: Literal["fp32", "fp16"] | None = None,
    limits: Limits = LIMITS,
) -> None:
    """Make a model folder, or one file if `destination` ends in .safetensors, of a model.

    The model is a folder, a tarball of one or a single file, which may be a pickle. Of a folder,
    every old `.bin` is turned into safetensors, and nothing else is changed. `destination` must be
    absent, or an empty folder; it appears only when complete. prediction_type, base: as in
    `source.locate`. precision: of one file, as in `single_file_export.export`.
    Raises ModelArtifactError for anything but a model on this machine (nothing is downloaded), for
    links to folders, and for pickles that hold more than weights or, in a folder, are not called
    `.bin`. Raises ResourceError where the disk is full or `destination` cannot be written.
    """
    to_file = destination.suffix.lower() == ".safetensors"
    if precision and not to_file:
        raise UserError("--precision is for one file: let OUT end in .safetensors.")
    is_new = not destination.exists() or (destination.is_dir() and not any(destination.iterdir()))
    if not to_file and not is_new:
        raise ModelArtifactError(f"{destination} exists already: give a new or an empty folder.")
    parent = destination.absolute().parent
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            files.disk_faults_named(
                "The converted model", destination, elsewhere="choose another place"
            )
        )
        parent.mkdir(parents=True, exist_ok=True)
        workspace = stack.enter_context(tempfile.TemporaryDirectory(prefix=".partial-", dir=parent))
        found = source.locate(
            _unpickled(str(origin), Path(workspace)),
            given="as MODEL",
            prediction_type=prediction_type,
            base=base,
            limits=limits,
        )
        if found.path is None:  # it could be the name of a model on a hub
            raise ModelArtifactError(
                f"There is no folder or file {origin} in {Path.cwd()}: give a model folder, a "
                "tarball of one, or a single-file checkpoint."
            )
        folder = source.open_source(found, Path(workspace) / "opened", limits=limits)
        if parent.resolve().is_relative_to(folder.resolve()):
            raise ModelArtifactError(f"{destination} lies inside of {folder}, which is read.")
        if to_file:
            single_file_export.export(folder, destination, precision=precision, limits=limits)
            return
        whole = folder
        if found.kind != "single_file":
            whole = Path(workspace) / "converted"
            _convert_folder(folder, whole, layout.home_of(folder), limits)
            layout.validate_folder(whole, limits=limits)
        if destination.exists():
            destination.rmdir()
        files.put_in_place(whole, destination)


def _unpickled(origin: str, workspace: Path) -> str:
    """Turn a single-file checkpoint that is a pickle into safetensors; return others as they are.

    Training left more in such files than weights; what is no plain data is refused.
    """
    path = Path(origin)
    if path.suffix.lower() not in (*_OTHER_PICKLES, ".bin") or not path.is_file():
        return origin
    refuse_stand_in(path, "a weight file")
    copy = workspace / f"{path.stem}.safetensors"
    weights.save(weights.read_bin(path, inside="state_dict"), copy)
    sidecar = path.with_suffix(single_file.SIDECAR)
    if sidecar.is_file() and sidecar.stat().st_size <= LIMITS.max_sidecar_bytes:
        shutil.copyfile(sidecar, copy.with_suffix(single_file.SIDECAR))
    return str(copy)


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
            weights.save(weights.read_bin(entry), copy)
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
