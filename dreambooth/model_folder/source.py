"""Finds the pretrained model and makes a model folder of it.

Standard library only, and quick, because a dry run makes its training plan without importing torch.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from dreambooth import tiny
from dreambooth.errors import ModelArtifactError, ResourceError, one_line, quoted
from dreambooth.limits import LIMITS, MIB, Limits
from dreambooth.model_folder import archives, hub, layout, single_file
from dreambooth.model_folder.facts import ModelFacts, check_trainable, read_facts
from dreambooth.model_folder.layout import INDEX, validate_folder
from dreambooth.model_folder.mistaken_files import (
    is_checkpoint,
    refuse_single_file,
    single_file_fault,
)
from dreambooth.process import addresses, files, temporary_folder

logger = logging.getLogger(__name__)

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
    prediction_type: what the user says of the model, if anything. base: the folder whose
    configurations and vocabulary a single file takes, None for the published ones.
    """

    kind: Literal["folder", "archive", "hub", "single_file"]
    location: str
    path: Path | None
    linked_weights: bool = False
    prediction_type: str | None = None
    base: Path | None = None


def locate(
    pretrained_model: str | None,
    channel: Path | None = None,
    *,
    given: str = "with --pretrained-model",
    prediction_type: str | None = None,
    base: str | None = None,
    limits: Limits = LIMITS,
) -> ModelSource:
    """Find the model that `pretrained_model` names or, without it, that the channel's folder holds.

    Archives are listed only where several lie in a folder and none is called model.tar.gz.
    given: how the user gives a model ("with --model"), for the messages. prediction_type, base: as
    in ModelSource, but base is a path or `tiny`. Raises ModelArtifactError with one sentence that
    says how to give a model.
    """
    how = (
        f"give one {given} (a diffusers folder, a tarball of one, a single-file checkpoint, a hub "
        "id such as owner/name, or `tiny` for the small embedded model)"
    )
    found = _found(pretrained_model, channel, how, limits)
    folder = None if not base else _base(base)
    return replace(found, prediction_type=prediction_type, base=folder)


def _base(name: str) -> Path:
    path = tiny.WEIGHTS if name == "tiny" else addresses.to_path(name, "--base")
    if not os.path.isfile(path / INDEX):  # False for what cannot be read, too
        raise ModelArtifactError(
            f"--base {one_line(name, 300)} is no diffusers folder: it holds no {INDEX}."
        )
    return path


def _found(
    pretrained_model: str | None, channel: Path | None, how: str, limits: Limits
) -> ModelSource:
    if pretrained_model:
        return _by_name(pretrained_model, how, limits)
    if channel is None or not channel.exists():
        where = "" if channel is None else f" at {channel}"
        raise ModelArtifactError(f"There is no model{where}: {how}. {hub.BASES}.")
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
        if is_checkpoint(path, limits=limits):
            return ModelSource(kind="single_file", location=str(path), path=path)
        refuse_single_file(path, limits=limits)
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
    if file := _checkpoint_in(path, entries, limits):
        return ModelSource(kind="single_file", location=str(file), path=file)
    for entry in entries:
        refuse_single_file(entry, limits=limits)
    inside = ", ".join(entry.name for entry in entries[:5]) or "nothing"
    raise ModelArtifactError(
        f"{path} holds no model: neither {INDEX} nor a tarball is in it, but {inside}; {how}."
    )


def _checkpoint_in(path: Path, entries: Iterable[Path], limits: Limits) -> Path | None:
    """Return the only single-file checkpoint among a folder's entries, None without one."""
    found = [entry for entry in entries if is_checkpoint(entry, limits=limits)]
    if len(found) > 1:
        names = ", ".join(one_line(entry.name, 100) for entry in found[:5])
        raise ModelArtifactError(
            f"{path} holds {len(found)} single-file checkpoints ({names}): give one of them by its "
            "own path, or leave one alone there."
        )
    return found[0] if found else None


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
    """Return a source as a diffusers folder: as it is, written into `workspace`, or downloaded.

    Raises ModelArtifactError for a folder, archive or file that holds no Stable Diffusion model,
    or another one than was said, and ResourceError where the hub cannot be reached or the disk is
    full.
    """
    folder = _opened(source, workspace, limits)
    linked_weights = source.kind == "folder" and source.linked_weights
    validate_folder(folder, linked_weights=linked_weights, limits=limits)
    _check_as_said(source, folder, limits)
    return folder


def _opened(source: ModelSource, workspace: Path, limits: Limits) -> Path:
    if source.path is None:
        return hub.download(source.location)
    if source.kind == "folder":
        return source.path
    folder = workspace / "pretrained_model"
    if folder.exists():  # left by an earlier attempt
        shutil.rmtree(folder)
    if source.kind == "single_file":
        return _converted(source, folder, limits)
    folder.mkdir(parents=True)
    archives.extract(source.path, folder, limits=limits)
    entries = sorted(folder.iterdir())
    if inside := _unpacked(folder, entries):
        return inside
    for entry in entries:
        if fault := single_file_fault(entry, limits=limits):
            raise ModelArtifactError(f"{source.path} holds {entry.name}, which {fault}")
    raise ModelArtifactError(
        f"{source.path} holds no {INDEX}: it is not a tarball of a diffusers folder."
    )


def _converted(
    source: ModelSource, folder: Path, limits: Limits, *, headers_only: bool = False
) -> Path:
    """Write a single-file checkpoint as a folder, and log what was decided."""
    assert source.path is not None
    home = os.path.realpath(source.path.parent)
    if not source.linked_weights and layout.leads_out(source.path, home):
        raise ModelArtifactError(layout.LEADS_OUT.format(source.path))
    checkpoint = single_file.read(
        source.path, prediction_type=source.prediction_type, base=source.base, limits=limits
    )
    for remark in checkpoint.remarks:
        logger.info(remark)
    with files.disk_faults_named(
        f"The folder made of {source.path}", folder, elsewhere="let TMPDIR name another folder"
    ):
        single_file.write_folder(checkpoint, folder, headers_only=headers_only)
    return folder


def _check_as_said(source: ModelSource, folder: Path, limits: Limits) -> None:
    """Refuse what was said of a model that says it by itself, and differently."""
    config = layout.component_config(folder, "scheduler", limits=limits)
    stated = config.get("prediction_type", "epsilon")
    if source.prediction_type not in (None, stated):
        raise ModelArtifactError(
            f"--prediction_type says {source.prediction_type}, and {source.location} says "
            f"{quoted(stated)} in scheduler/scheduler_config.json: correct the wrong one."
        )
    if source.base is not None and source.kind != "single_file":
        raise ModelArtifactError(
            f"--base {source.base} gives a single-file checkpoint its configurations, and "
            f"{source.location} has its own: leave --base away."
        )


def peek(source: ModelSource, *, limits: Limits = LIMITS) -> ModelFacts | None:
    """Return the facts of a folder, file or small archive for a dry run, None for other sources.

    Raises ModelArtifactError for a faulty folder and for a model that cannot be trained.
    """
    if source.path is None:
        return None
    if source.kind == "archive":
        return peek_facts(source.path, limits=limits)
    if source.kind == "single_file":
        with temporary_folder.temporary() as workspace:
            folder = _converted(source, workspace / "headers", limits, headers_only=True)
            return read_facts(folder, limits=limits)
    validate_folder(source.path, linked_weights=source.linked_weights, limits=limits)
    _check_as_said(source, source.path, limits)
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
