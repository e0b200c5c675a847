"""Downloads models from a hub; no other module contacts one.

It asks once, waits seconds at most for the answer, and hides the client's raw log lines. The client
is not in the standard library and slow to import, so it is imported only when it is needed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from dreambooth.errors import ModelArtifactError, ResourceError
from dreambooth.model_folder.layout import (
    INDEX,
    MODEL_INFO,
    OPTIONAL_PARTS,
    TRAINED_PARTS,
    choose_weights,
)
from dreambooth.process import files

# A reachable hub answers in a fraction of this.
_SECONDS = 6.0
# The owners of 1.5 and of 2.x have removed theirs by November 2025.
BASES = (
    "Stable Diffusion 1.5 is mirrored on the hub as stable-diffusion-v1-5/stable-diffusion-v1-5 "
    "(licence CreativeML Open RAIL-M), 2.x under sd2-community (CreativeML Open RAIL++-M); nothing "
    "is fetched unless it is named"
)
_LOGGERS = ("huggingface_hub", "httpx", "httpcore", "httpx2", "httpcore2", "urllib3")


def download(name: str) -> Path:
    """Download the model `owner/name` into the hub client's cache and return its folder there.

    Where the hub does not answer within seconds, an earlier download is used. Raises
    ModelArtifactError where the hub has no such model, and ResourceError where it cannot be reached
    or the disk is full.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,
        RepositoryNotFoundError,
    )

    # Most often such a name is a mistyped path.
    nothing_here = f"There is no folder or file {name} in {os.getcwd()}"
    with _quiet(_LOGGERS):
        try:
            names = _file_names(name)
            if INDEX not in names:
                raise ModelArtifactError(
                    f"The hub's {name} is not a whole model in the diffusers layout: it has no "
                    f"{INDEX} (a LoRA is fused into its base model first, a single-file checkpoint "
                    "is downloaded and given by its path)."
                )
            wanted = needed_files(names)
            return Path(snapshot_download(name, allow_patterns=wanted))
        except (RepositoryNotFoundError, GatedRepoError, HFValidationError) as error:
            moved = f" {BASES}." if "stable-diffusion" in name.lower() else ""
            raise ModelArtifactError(
                f"{nothing_here}, and the hub has no model of that name that can be read without "
                "logging in: check the path or the name, or log in with `hf auth login`."
                f"{moved}"
            ) from error
        except (HTTPError, OSError, ValueError) as error:
            if files.is_disk_full(error):
                raise files.disk_fault(
                    f"The download of {name}",
                    "the hub's cache",
                    error,
                    elsewhere="set HF_HOME to a folder on another disk",
                ) from error
        # No network, or the hub is down: an earlier download may be there.
        try:
            return Path(snapshot_download(name, local_files_only=True))
        except (OSError, ValueError) as error:
            raise ResourceError(
                f"{nothing_here}; taken as the name of a model on the hub, it cannot be downloaded "
                "either, for the hub cannot be reached and no earlier download is there: check "
                "the path, or give a folder or a tarball."
            ) from error


def needed_files(names: Iterable[str]) -> list[str]:
    """Return the files of a hub repository that a job needs, with only one copy of the weights."""
    names = sorted(names)
    needed = [name for name in names if name in (INDEX, MODEL_INFO, "README.md")]
    for part in (*TRAINED_PARTS, *OPTIONAL_PARTS, "tokenizer", "scheduler"):
        inside = [name for name in names if PurePosixPath(name).parent.as_posix() == part]
        needed += [
            n for n in inside if n.endswith((".json", ".txt", ".model")) and ".index." not in n
        ]
        chosen = choose_weights(part, (PurePosixPath(name).name for name in inside))
        if chosen is None:
            continue
        needed.append(f"{part}/{chosen.name}")
        if chosen.sharded:
            suffix = ".bin" if chosen.pickled else ".safetensors"
            needed += [
                name
                for name in inside
                if "-of-" in name and name.endswith(suffix) and f".{chosen.variant}" in name
            ]
    return needed


def _file_names(name: str) -> list[str]:
    """Ask once for the names of a repository's files. Raises TimeoutError after `_SECONDS`."""
    from huggingface_hub import HfApi

    answers: queue.SimpleQueue[list[str] | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            found = HfApi().model_info(name, timeout=_SECONDS).siblings or ()
            answers.put([file.rfilename for file in found])
        except Exception as error:  # it is raised again in the thread that asked
            answers.put(error)

    # The client's own timeout starts anew for each address of the hub and leaves out name lookup.
    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"no answer within {_SECONDS} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


@contextlib.contextmanager
def _quiet(names: Iterable[str]) -> Iterator[None]:
    """Limit these loggers to errors; our own messages report what fails."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
