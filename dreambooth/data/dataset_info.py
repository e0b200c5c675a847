"""Read a training folder: prompts, instance images, class images and what was skipped.

The layout is JumpStart's: pictures and `dataset_info.json` side by side, class images in an
optional sub-folder. JumpStart took every file there for a picture; here everything else is
skipped with a warning. Nothing is ever written into the folder.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dreambooth.data.folder import Pictures, read_pictures, skipped
from dreambooth.data.images import ImageFacts, warnings_for
from dreambooth.data.picture_files import FORMATS_TEXT, listed, printable, why
from dreambooth.data.prompts import INFO_NAME
from dreambooth.data.prompts import read as read_prompts
from dreambooth.errors import DatasetError
from dreambooth.limits import LIMITS, Limits
from dreambooth.process import addresses


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetInfo:
    """The content of a training folder; all listed pictures have been decoded once as a check.

    Paths are sorted; `instance_facts[i]` belongs to `instance_images[i]`, `class_facts` likewise.
    `class_prompt` is None if the folder gives none; `warnings` are whole sentences.
    """

    folder: Path
    instance_prompt: str
    class_prompt: str | None
    instance_images: tuple[Path, ...]
    class_images: tuple[Path, ...]
    warnings: tuple[str, ...]
    instance_facts: tuple[ImageFacts, ...] = ()
    class_facts: tuple[ImageFacts, ...] = ()

    @property
    def sha256(self) -> Mapping[Path, bytes]:
        """Return the hashes of all picture files, taken when they were checked."""
        images = (*self.instance_images, *self.class_images)
        facts = (*self.instance_facts, *self.class_facts)
        return {path: each.sha256 for path, each in zip(images, facts, strict=True)}


def read(
    folder: Path,
    *,
    class_data_dir: str = "class_data_dir",
    with_prior_preservation: bool = False,
    needs_class_images: bool = True,
    given: str = "with --train",
    inside: str = "give that folder with --train",
    limits: Limits = LIMITS,
) -> DatasetInfo:
    """Read a training folder (layout: facts of the JumpStart notebook, "Dataset layout").

    `class_data_dir` is relative to the folder (an absolute path is taken as it is). It may be
    missing, and is read only with prior preservation and if class images are needed at all.
    `given` says how the user gives the folder, for messages, and `inside` how to give one inside.
    Raises DatasetError, one clear sentence, for the first fault that cannot be skipped, and
    UserError for a `class_data_dir` that is no local path.
    """
    _require_folder(folder, given)
    prompts = read_prompts(
        folder, with_prior_preservation=with_prior_preservation, inside=inside, limits=limits
    )
    class_folder = Path(
        os.path.normpath(folder / addresses.to_path(class_data_dir, "class_data_dir"))
    )
    inside = os.path.relpath(class_folder, os.path.normpath(folder)).split(os.sep)[0]
    found = read_pictures(folder, ignored=inside, most=limits.max_instance_images, limits=limits)
    if not found.paths:
        raise DatasetError(_no_pictures(folder, found))
    notes = [*prompts.warnings, *skipped(found, "the training folder")]
    class_images: Pictures | None = None
    if with_prior_preservation and needs_class_images:
        class_images, class_notes = _class_images(folder, class_folder, limits)
        notes += class_notes
    return DatasetInfo(
        folder=folder,
        instance_prompt=prompts.instance_prompt,
        class_prompt=prompts.class_prompt,
        instance_images=found.paths,
        instance_facts=found.facts,
        class_images=class_images.paths if class_images else (),
        class_facts=class_images.facts if class_images else (),
        warnings=tuple(notes),
    )


def size_warnings(info: DatasetInfo, resolution: int) -> tuple[str, ...]:
    """Return one sentence per instance image that is too small or narrow for this resolution."""
    sentences = []
    for path, facts in zip(info.instance_images, info.instance_facts, strict=True):
        fault = warnings_for(facts.width, facts.height, resolution)
        if fault is not None:
            sentences.append(f"{printable(path.name)} {fault}.")
    return tuple(sentences)


def _require_folder(folder: Path, given: str) -> None:
    try:
        mode = os.stat(folder).st_mode
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"The training folder {printable(folder)} cannot be opened ({why(error)}): "
            f"give a folder with pictures and {INFO_NAME} {given}."
        ) from error
    if not stat.S_ISDIR(mode):
        raise DatasetError(
            f"{printable(folder)} is a file, not a folder: "
            f"give the folder that holds the pictures and {INFO_NAME} {given}."
        )


def _class_images(
    folder: Path, class_folder: Path, limits: Limits
) -> tuple[Pictures | None, list[str]]:
    if "\0" not in str(class_folder) and not os.path.lexists(class_folder):
        return None, []
    if not class_folder.is_dir():
        raise DatasetError(
            f"class_data_dir points at {printable(class_folder)}, which is not a folder: "
            "name a folder of class images, or leave it out to have them sampled."
        )
    if class_folder.samefile(folder):
        raise DatasetError(
            f"class_data_dir points at the training folder itself, {printable(folder)}: "
            "put the class images into a folder of their own."
        )
    found = read_pictures(class_folder, most=limits.max_class_images, limits=limits)
    return found, skipped(found, f"the class images' folder {printable(class_folder)}")


def _no_pictures(folder: Path, found: Pictures) -> str:
    reasons = []
    if found.unusable:
        reasons.append(f"unusable: {listed(found.unusable)}")
    if found.others:
        reasons.append(f"no pictures: {listed(found.others)}; sub-folders are not searched")
    seen = f" ({'; '.join(reasons)})" if reasons else ""
    return (
        f"The folder {printable(folder)} holds no picture to train on{seen}: put 4 to 20 pictures "
        f"of the subject beside {INFO_NAME}, as {FORMATS_TEXT}."
    )
