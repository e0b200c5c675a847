"""Finds the pretrained model and makes a model folder of it.

Standard library only, and quick, because a dry run makes its training plan without importing torch.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from dreambooth import tiny
from dreambooth.errors import ModelArtifactError, ResourceError, one_line, quoted
from dreambooth.limits import LIMITS, MIB, Limits
from dreambooth.model_folder import archives, hub
from dreambooth.model_folder.facts import ModelFacts, check_trainable, read_facts
from dreambooth.model_folder.layout import INDEX, validate_folder
from dreambooth.model_folder.mistaken_files import refuse_single_file, single_file_fault
from dreambooth.process import addresses, temporary_folder

__all__ = [
    "ModelFacts",
    "ModelSource",
    "locate",
    "open_source",
    "peek",
    "peek_facts",
    "read_facts",
    "validate_folder",
]

_ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
# The largest archive that `peek_facts` extracts, which takes about a second.
_PEEK_BYTES = 64 * MIB
_PEEK_EXTRACTED_BYTES = 512 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A pretrained model that was found; `path` is None for a hub id.

    linked_weights: whether weights may lie behind links that lead out of the folder. This is
    allowed in a folder that a user named, not in one that a platform or an archive brought.
    """

    kind: Literal["folder", "archive", "hub"]
    location: str
    path: Path | None
    linked_weights: bool = False


def locate(
    pretrained_model: str | None,
    channel: Path | None = None,
    *,
    given: str = "with --pretrained-model",
    limits: Limits = LIMITS,
) -> ModelSource:
    """Find the model that `pretrained_model` names or, without it, that the channel's folder holds.

    Archives are listed only where several lie in a folder and none is called model.tar.gz.
    given: how the user gives a model ("with --model"), for the messages. Raises
    ModelArtifactError with one sentence that says how to give a model.
    """
    how = (
        f"give one {given} (a diffusers folder, a tarball of one, a hub id such as owner/name, or "
        "`tiny` for the small embedded model)"
    )
    if pretrained_model:
        return _by_name(pretrained_model, how, limits)
    if channel is None or not channel.exists():
        where = "" if channel is None else f" at {channel}"
        raise ModelArtifactError(f"There is no model{where}: {how}.")
    return _at(channel, how, limits)


def _by_name(name: str, how: str, limits: Limits) -> ModelSource:
    if name == "tiny":
        return ModelSource(kind="folder", location=name, path=tiny.WEIGHTS)
    if addresses.is_remote(name):
        raise ModelArtifactError(
            f"The model {quoted(name)} is an address, and nothing is fetched from there: copy the "
            f"model to this machine, and {how}."
        )
    try:
        path = addresses.to_path(name, "The model")
        if path.exists():
            return replace(_at(path, how, limits), linked_weights=True)
    except (OSError, ValueError) as error:  # a closed parent folder, too long, a null character
        why = getattr(error, "strerror", None) or error
        raise ModelArtifactError(
            f"The model {one_line(name, 300)} cannot be read: {why}."
        ) from error
    if _HUB_ID.fullmatch(name) and not name.lower().endswith(_ARCHIVE_SUFFIXES):
        return ModelSource(kind="hub", location=name, path=None)
    raise ModelArtifactError(f"There is no model at {one_line(name, 300)}: {how}.")


def _at(path: Path, how: str, limits: Limits) -> ModelSource:
    if path.is_file():
        if path.name.lower().endswith(_ARCHIVE_SUFFIXES):
            return ModelSource(kind="archive", location=str(path), path=path)
        refuse_single_file(path)
        raise ModelArtifactError(f"{path} is neither a folder nor a tarball: {how}.")
    try:
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise ModelArtifactError(f"The model folder {path} cannot be read: {error}.") from error
    if folder := _unpacked(path, entries):
        return ModelSource(kind="folder", location=str(folder), path=folder)
    tarballs = [
        entry
        for entry in entries
        if entry.name.lower().endswith(_ARCHIVE_SUFFIXES) and entry.is_file()
    ]
    if tarballs:
        archive = _choose(path, tarballs, limits)
        return ModelSource(kind="archive", location=str(archive), path=archive)
    for entry in entries:
        refuse_single_file(entry)
    inside = ", ".join(entry.name for entry in entries[:5]) or "nothing"
    raise ModelArtifactError(
        f"{path} holds no model: neither {INDEX} nor a tarball is in it, but {inside}; {how}."
    )


def _unpacked(path: Path, entries: Iterable[Path]) -> Path | None:
    """Return the folder with model_index.json: `path` or the only such folder in it, else None."""
    if (path / INDEX).is_file():
        return path
    inner = [entry for entry in entries if entry.is_dir() and (entry / INDEX).is_file()]
    if len(inner) > 1:
        names = ", ".join(entry.name for entry in inner)
        raise ModelArtifactError(
            f"{path} holds several models ({names}): give one of them by its own path."
        )
    return inner[0] if inner else None


def _choose(folder: Path, tarballs: list[Path], limits: Limits) -> Path:
    if len(tarballs) == 1:
        return tarballs[0]
    for archive in tarballs:
        if archive.name == "model.tar.gz":
            return archive
    models = [archive for archive in tarballs if _holds_model(archive, limits)]
    if len(models) == 1:
        return models[0]
    names = ", ".join(archive.name for archive in models or tarballs)
    fault = "more than one tarball that holds a model" if models else "no tarball with a model"
    raise ModelArtifactError(
        f"{folder} holds {fault} ({names}): name the one that is meant model.tar.gz, or give it by "
        "its own path."
    )


def _holds_model(archive: Path, limits: Limits) -> bool:
    try:
        names = archives.member_names(archive, limits=limits, top_level_only=True, stop_at=(INDEX,))
    except ModelArtifactError:
        return False  # not a readable archive: another one may be
    return INDEX in names


def open_source(source: ModelSource, workspace: Path, *, limits: Limits = LIMITS) -> Path:
    """Return a source as a diffusers folder: as it is, extracted into `workspace`, or downloaded.

    Raises ModelArtifactError for a folder or archive that holds no Stable Diffusion model, and
    ResourceError where the hub cannot be reached or the disk is full.
    """
    if source.path is None:
        folder = hub.download(source.location)
    elif source.kind == "archive":
        folder = workspace / "pretrained_model"
        if folder.exists():  # left by an earlier attempt
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        archives.extract(source.path, folder, limits=limits)
        entries = sorted(folder.iterdir())
        inside = _unpacked(folder, entries)
        if inside is None:
            for entry in entries:
                if fault := single_file_fault(entry, limits=limits):
                    raise ModelArtifactError(f"{source.path} holds {entry.name}, which {fault}")
            raise ModelArtifactError(
                f"{source.path} holds no {INDEX}: it is not a tarball of a diffusers folder."
            )
        folder = inside
    else:
        folder = source.path
    linked_weights = source.kind == "folder" and source.linked_weights
    validate_folder(folder, linked_weights=linked_weights, limits=limits)
    return folder


def peek(source: ModelSource, *, limits: Limits = LIMITS) -> ModelFacts | None:
    """Return the facts of a folder or a small archive for a dry run, None for other sources.

    Raises ModelArtifactError for a faulty folder and for a model that cannot be trained.
    """
    if source.path is None:
        return None
    if source.kind == "archive":
        return peek_facts(source.path, limits=limits)
    validate_folder(source.path, linked_weights=source.linked_weights, limits=limits)
    return read_facts(source.path, limits=limits)


def peek_facts(archive: Path, *, limits: Limits = LIMITS) -> ModelFacts | None:
    """Return the facts of the model in a small archive; None where reading it would take long.

    Also None for a faulty archive, which the job itself reports when it opens it. Raises
    ModelArtifactError for a sound model that cannot be trained.
    """
    small = replace(limits, archive_max_bytes=min(limits.archive_max_bytes, _PEEK_EXTRACTED_BYTES))
    try:
        if archive.stat().st_size > _PEEK_BYTES:
            return None
        with temporary_folder.temporary() as workspace:
            source = ModelSource(kind="archive", location=str(archive), path=archive)
            folder = open_source(source, workspace, limits=small)
            facts = read_facts(folder, to_train=False, limits=small)
    except (ModelArtifactError, ResourceError, OSError):
        return None
    check_trainable(facts, archive)
    return facts
