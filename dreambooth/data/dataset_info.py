"""Read a training folder: prompts, instance images, class images and what was skipped.

The layout is JumpStart's: pictures and `dataset_info.json` side by side, class images in an
optional sub-folder. JumpStart took every file there for a picture; here everything else is
skipped with a warning. With several subjects each has its pictures in a sub-folder, which the file
lists. Nothing is ever written into the folder.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dreambooth.data import captions, masks
from dreambooth.data.captions import Captions
from dreambooth.data.folder import Pictures, read_pictures, skipped
from dreambooth.data.images import ImageFacts, warnings_for
from dreambooth.data.picture_files import FORMATS_TEXT, listed, printable, why
from dreambooth.data.prompts import INFO_NAME, Prompts, SubjectPrompts
from dreambooth.data.prompts import read as read_prompts
from dreambooth.errors import DatasetError
from dreambooth.limits import LIMITS, Limits
from dreambooth.process import addresses


@dataclass(frozen=True, slots=True, kw_only=True)
class SubjectData:
    """A subject with its pictures, sorted; `instance_facts[i]` belongs to `instance_images[i]`.

    name: its folder inside the training folder, "" for a single subject whose pictures lie in the
    training folder itself. class_prompt: None if the folder gives none. captions, masks,
    mask_facts: of each picture, None for one without; empty if none has one.
    """

    name: str = ""
    instance_prompt: str
    class_prompt: str | None
    instance_images: tuple[Path, ...]
    instance_facts: tuple[ImageFacts, ...] = ()
    captions: tuple[str | None, ...] = ()
    masks: tuple[Path | None, ...] = ()
    mask_facts: tuple[ImageFacts | None, ...] = ()

    @property
    def prompts(self) -> tuple[str, ...]:
        """Return the prompt of each picture: its caption, or the instance prompt."""
        captions = self.captions or (None,) * len(self.instance_images)
        return tuple(caption or self.instance_prompt for caption in captions)

    def name_of(self, picture: Path) -> str:
        """Return a picture's name inside the training folder."""
        return f"{self.name}/{picture.name}" if self.name else picture.name


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassSet:
    """The given class images of one class prompt, sorted; none if there are none or none is needed.

    `facts[i]` belongs to `images[i]`.
    """

    class_prompt: str
    images: tuple[Path, ...] = ()
    facts: tuple[ImageFacts, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetInfo:
    """The content of a training folder; all listed pictures have been decoded once as a check.

    subjects: one at least. class_sets: one for each distinct class prompt of theirs, in their
    order. `warnings` are whole sentences.
    """

    folder: Path
    subjects: tuple[SubjectData, ...]
    class_sets: tuple[ClassSet, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def are_several(self) -> bool:
        """Return whether there is more than one subject."""
        return len(self.subjects) > 1

    @property
    def instance_prompt(self) -> str:
        """Return the instance prompt of the first subject."""
        return self.subjects[0].instance_prompt

    @property
    def class_prompt(self) -> str | None:
        """Return the class prompt of the first subject; None if the folder gives none."""
        return self.subjects[0].class_prompt

    @property
    def instance_images(self) -> tuple[Path, ...]:
        """Return the pictures of all subjects, one subject after the other."""
        return tuple(path for each in self.subjects for path in each.instance_images)

    @property
    def instance_facts(self) -> tuple[ImageFacts, ...]:
        """Return the facts of all instance images, in their order."""
        return tuple(facts for each in self.subjects for facts in each.instance_facts)

    @property
    def prompts(self) -> tuple[str, ...]:
        """Return the prompt of each instance image, in their order."""
        return tuple(prompt for each in self.subjects for prompt in each.prompts)

    @property
    def masks(self) -> dict[Path, Path]:
        """Return the mask that lies beside a picture, by the picture's path."""
        return {
            picture: mask
            for each in self.subjects
            for picture, mask in zip(each.instance_images, each.masks, strict=False)
            if mask is not None
        }

    @property
    def class_images(self) -> tuple[Path, ...]:
        """Return the given class images of all classes, one class after the other."""
        return tuple(path for each in self.class_sets for path in each.images)

    @property
    def class_facts(self) -> tuple[ImageFacts, ...]:
        """Return the facts of all class images, in their order."""
        return tuple(facts for each in self.class_sets for facts in each.facts)

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
    missing, and is read only with prior preservation and if class images are needed at all. Of
    several subjects each names its own instead.
    `given` says how the user gives the folder, for messages, and `inside` how to give one inside.
    Raises DatasetError, one clear sentence, for the first fault that cannot be skipped, and
    UserError for a `class_data_dir` that is no local path.
    """
    _require_folder(folder, given)
    prompts = read_prompts(
        folder, with_prior_preservation=with_prior_preservation, inside=inside, limits=limits
    )
    reads_class_images = with_prior_preservation and needs_class_images
    if prompts.are_listed:
        return _read_several(folder, prompts, reads_class_images, limits)
    class_folder = Path(
        os.path.normpath(folder / addresses.to_path(class_data_dir, "class_data_dir"))
    )
    inside = os.path.relpath(class_folder, os.path.normpath(folder)).split(os.sep)[0]
    found = read_pictures(folder, ignored=(inside,), most=limits.max_instance_images, limits=limits)
    if not found.paths:
        raise DatasetError(_no_pictures(folder, found))
    (given_prompts,) = prompts.subjects
    found_captions = captions.read(folder, found, given_prompts, limits=limits)
    notes = [
        *prompts.warnings,
        *skipped(found_captions.pictures, "the training folder"),
        *found_captions.warnings,
    ]
    class_images: Pictures | None = None
    if reads_class_images:
        class_images, class_notes = _class_images(folder, class_folder, limits)
        notes += class_notes
    return DatasetInfo(
        folder=folder,
        subjects=(_subject(given_prompts, found_captions),),
        class_sets=_class_sets([(given_prompts, class_images)]),
        warnings=tuple(notes),
    )


def _subject(prompts: SubjectPrompts, found: Captions) -> SubjectData:
    return SubjectData(
        name=prompts.folder,
        instance_prompt=prompts.instance_prompt,
        class_prompt=prompts.class_prompt,
        instance_images=found.pictures.paths,
        instance_facts=found.pictures.facts,
        captions=found.texts if any(found.texts) else (),
        masks=found.pictures.masks,
        mask_facts=found.pictures.mask_facts,
    )


def _class_sets(found: Sequence[tuple[SubjectPrompts, Pictures | None]]) -> tuple[ClassSet, ...]:
    """Return the class images of each distinct class prompt; a folder given twice counts once."""
    sets: dict[str, dict[Path, ImageFacts]] = {}
    for prompts, pictures in found:
        if prompts.class_prompt is not None:
            images = sets.setdefault(prompts.class_prompt, {})
            if pictures is not None:
                images |= dict(zip(pictures.paths, pictures.facts, strict=True))
    return tuple(
        ClassSet(class_prompt=prompt, images=tuple(images), facts=tuple(images.values()))
        for prompt, images in sets.items()
    )


def _read_several(
    folder: Path, prompts: Prompts, reads_class_images: bool, limits: Limits
) -> DatasetInfo:
    """Read a training folder whose subjects have sub-folders, which dataset_info.json lists."""
    inside = {
        name.split("/")[0]
        for each in prompts.subjects
        for name in (each.folder, each.class_data_dir or each.folder)
    }
    beside = read_pictures(folder, ignored=inside, most=limits.max_instance_images, limits=limits)
    names = listed([each.folder for each in prompts.subjects])
    if beside.paths:
        raise DatasetError(
            f"{listed([printable(path.name) for path in beside.paths])} in {printable(folder)} "
            f"lies beside the folders of the subjects ({names}): move each picture into the folder "
            "of its subject, or remove it."
        )
    if captions.LIST_NAME in beside.others:
        raise DatasetError(
            f"{captions.LIST_NAME} lies beside the folders of the subjects ({names}): each of them "
            "has its own, for the pictures beside it."
        )
    notes = [*prompts.warnings, *skipped(beside, "the training folder")]
    subjects: list[SubjectData] = []
    class_images: list[tuple[SubjectPrompts, Pictures | None]] = []
    for each in prompts.subjects:
        place = _sub_folder(folder, each, "folder", each.folder)
        own = _first_part_inside(each.class_data_dir, each.folder)
        most = limits.max_instance_images - sum(len(one.instance_images) for one in subjects)
        found = read_pictures(place, ignored=(own,), most=most, limits=limits)
        if not found.paths:
            raise DatasetError(
                _no_pictures(place, found, "there", f" of the subject {each.folder}")
            )
        found_captions = captions.read(place, found, each, limits=limits)
        notes += skipped(found_captions.pictures, f"the folder of the subject {each.folder}")
        notes += found_captions.warnings
        subjects.append(_subject(each, found_captions))
        pictures: Pictures | None = None
        if reads_class_images and each.class_data_dir is not None:
            place = _sub_folder(folder, each, "class_data_dir", each.class_data_dir)
            pictures, class_notes = _class_images(folder, place, limits)
            notes += [note for note in class_notes if note not in notes]
        class_images.append((each, pictures))
    _refuse_same_places(subjects)
    return DatasetInfo(
        folder=folder,
        subjects=tuple(subjects),
        class_sets=_class_sets(class_images),
        warnings=tuple(notes),
    )


def _first_part_inside(class_data_dir: str | None, folder: str) -> str:
    """Return the entry of a subject's folder in which its class images lie; "" for elsewhere."""
    is_inside = class_data_dir is not None and class_data_dir.startswith(f"{folder}/")
    return class_data_dir[len(folder) + 1 :].split("/")[0] if is_inside and class_data_dir else ""


def _sub_folder(folder: Path, subject: SubjectPrompts, key: str, name: str) -> Path:
    """Return the path of a sub-folder; refuse links, which may lead out of the training folder.

    A class_data_dir may be missing; then its images are sampled.
    """
    place = folder
    for part in name.split("/"):
        place /= part
        if os.path.islink(place):
            raise DatasetError(
                f"{key} of the subject {subject.folder} leads over a link, {printable(place)}: "
                "put the folder itself there."
            )
    if key == "folder" and not os.path.isdir(place):
        state = "is not a folder" if os.path.lexists(place) else "is not there"
        raise DatasetError(
            f"The folder of the subject {subject.folder}, {printable(place)}, {state}: put the "
            "pictures of the subject there."
        )
    return place


def _refuse_same_places(subjects: Sequence[SubjectData]) -> None:
    """Refuse a folder with two names, as file systems that ignore case have them, and mounts."""
    places: dict[tuple[int, int], str] = {}
    for subject in subjects:
        status = os.stat(subject.instance_images[0].parent)
        other = places.setdefault((status.st_dev, status.st_ino), subject.name)
        if other != subject.name:
            raise DatasetError(
                f"The folders of the subjects {other} and {subject.name} are one folder: give each "
                "subject a folder of its own."
            )


def check_masks(info: DatasetInfo) -> None:
    """Raise DatasetError for a mask beside a picture that is not of the picture's size."""
    for subject in info.subjects:
        found = zip(subject.masks, subject.mask_facts, subject.instance_facts, strict=False)
        for mask, of_mask, of_picture in found:
            if mask is not None and of_mask is not None:
                masks.check_size(
                    f"The mask {printable(subject.name_of(mask))}",
                    (of_mask.width, of_mask.height),
                    (of_picture.width, of_picture.height),
                )


def size_warnings(info: DatasetInfo, resolution: int) -> tuple[str, ...]:
    """Return one sentence per instance image that is too small or narrow for this resolution."""
    sentences = []
    for subject in info.subjects:
        for path, facts in zip(subject.instance_images, subject.instance_facts, strict=True):
            fault = warnings_for(facts.width, facts.height, resolution)
            if fault is not None:
                sentences.append(f"{printable(subject.name_of(path))} {fault}.")
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


def _no_pictures(
    folder: Path, found: Pictures, where: str = f"beside {INFO_NAME}", of: str = ""
) -> str:
    reasons = []
    if found.unusable:
        reasons.append(f"unusable: {listed(found.unusable)}")
    if found.others:
        reasons.append(f"no pictures: {listed(found.others)}; sub-folders are not searched")
    seen = f" ({'; '.join(reasons)})" if reasons else ""
    return (
        f"The folder{of} {printable(folder)} holds no picture to train on{seen}: put 4 to 20 "
        f"pictures of the subject {where}, as {FORMATS_TEXT}."
    )
