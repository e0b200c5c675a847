"""Checks the layout of a model folder: files, classes and weights (standard library only).

A folder is only data: its JSON is checked here against fixed lists, and nothing in it ever names
code that we would import.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth.errors import ModelArtifactError, one_line, quoted
from dreambooth.limits import LIMITS, Limits
from dreambooth.model_folder import configuration
from dreambooth.model_folder.component_classes import (
    CLIP,
    COMPONENTS,
    FAMILIES_LISTED,
    PIPELINES,
    TEXT_FAMILIES,
    TextFamily,
)
from dreambooth.model_folder.mistaken_files import (
    refuse_pointer,
    refuse_single_file,
    refuse_stand_in,
)
from dreambooth.model_folder.pipeline_settings import corrected, refuse_undrawable

INDEX = "model_index.json"
MODEL_INFO = "__model_info__.json"
TRAINED_PARTS = ("unet", "vae", "text_encoder")
SAMPLES = "samples"
# The files that weights are written to.
WRITTEN_WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "safety_checker": "model.safetensors",
}
WEIGHT_SUFFIXES = (".safetensors", ".bin")
LEADS_OUT = (
    "{} is a link, or lies behind one, that leads out of the model: copy the file itself there."
)
OTHER_FILES = ("hyperparameters.json", "README.md")
OPTIONAL_PARTS = ("safety_checker", "feature_extractor")

_STEM = r"(?P<stem>diffusion_pytorch_model|pytorch_model|model)"
_WEIGHTS = re.compile(_STEM + r"(?:\.(?P<variant>[\w-]+))?\.(?P<suffix>safetensors|bin)")
_SHARD_INDEX = re.compile(
    _STEM + r"(?:\.(?P<early>[\w-]+))?\.(?P<suffix>safetensors|bin)\.index"
    r"(?:\.(?P<variant>[\w-]+))?\.json"
)
# The order of preference among copies: the plain name, then full precision, then half.
_VARIANTS = ("", "fp32", "fp16", "bf16")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFiles:
    """The copy of a component's weights that is read: one file, or an index and its shards."""

    name: str
    variant: str
    pickled: bool
    sharded: bool


def choose_weights(part: str, names: Iterable[str]) -> WeightFiles | None:
    """Choose the weights among a component's file names; None where there are none.

    Where StableDiffusionPipeline finds weights, it is its choice: plain names before variants, then
    safetensors before .bin. Of a single file and shards, diffusers takes the shards, transformers
    the file. Among variants, full precision is preferred to half.
    """
    is_of_diffusers = part in ("unet", "vae")
    found = []
    for name in names:
        if match := _WEIGHTS.fullmatch(name):
            variant, sharded = match["variant"] or "", False
        elif match := _SHARD_INDEX.fullmatch(name):
            variant, sharded = match["variant"] or match["early"] or "", True
        else:
            continue
        files = WeightFiles(
            name=name, variant=variant, pickled=match["suffix"] == "bin", sharded=sharded
        )
        rank = _VARIANTS.index(variant) if variant in _VARIANTS else len(_VARIANTS)
        usual_stem = "pytorch_model" if files.pickled else "model"
        if is_of_diffusers:
            usual_stem = "diffusion_pytorch_model"
        shards_first = is_of_diffusers and not files.pickled
        preference = (
            *(rank, match["stem"] != usual_stem, files.pickled),
            *(sharded != shards_first, name),
        )
        found.append((preference, files))
    return min(found, key=lambda each: each[0])[1] if found else None


def weight_files(component: Path, *, limits: Limits = LIMITS) -> tuple[WeightFiles, list[Path]]:
    """Return the chosen weights of a component folder, and the files that hold their tensors.

    Raises ModelArtifactError where there are none, or where an index names a file that is missing
    or lies outside the folder.
    """
    names = [path.name for path in component.iterdir()] if component.is_dir() else []
    chosen = choose_weights(component.name, names)
    if chosen is None:
        others = ", ".join(sorted(name for name in names if name != "config.json")[:5]) or "nothing"
        raise ModelArtifactError(
            f"{component} holds no weights that can be read ({others} is there): "
            "diffusion_pytorch_model.safetensors or model.safetensors is expected; no pickle but "
            "an old .bin is ever opened."
        )
    if not chosen.sharded:
        return chosen, _present([component / chosen.name])
    index = component / chosen.name
    weight_map = read_json(index, limits=limits).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelArtifactError(f"{index} has no weight_map that says which file holds what.")
    suffix = ".bin" if chosen.pickled else ".safetensors"
    files = sorted({str(name) for name in weight_map.values()})
    for name in files:
        if Path(name).name != name or not name.endswith(suffix) or name not in names:
            raise ModelArtifactError(
                f"{index} names the weight file {quoted(name)}, which is missing."
            )
    if len(files) > limits.max_weight_files:
        raise ModelArtifactError(f"{index} names {len(files)} weight files.")
    return chosen, _present([component / name for name in files])


def _present(files: list[Path]) -> list[Path]:
    for path in files:
        if not path.is_file():
            what = "a link to nothing" if path.is_symlink() else "no regular file"
            raise ModelArtifactError(f"{path} is {what}: copy the model with the files themselves.")
        refuse_stand_in(path, "a weight file")
    return files


def read_json(path: Path, *, limits: Limits = LIMITS) -> dict[str, Any]:
    """Read one JSON object from a file of a model folder.

    Raises ModelArtifactError for a file that is missing, too large or not a JSON object.
    """
    number = _int_of_at_most(limits.max_json_number_characters)
    try:
        if not path.is_file():
            raise ModelArtifactError(f"The model has no {path.parent.name}/{path.name} ({path}).")
        if path.stat().st_size > limits.max_config_bytes:
            raise ModelArtifactError(f"{path} is larger than {limits.max_config_bytes} bytes.")
        data = path.read_bytes()
        refuse_pointer(path, data)
        content = json.loads(data.decode("utf-8-sig"), parse_int=number)
    except OSError as error:
        raise ModelArtifactError(f"{path} cannot be read: {error}.") from error
    except (ValueError, RecursionError) as error:
        raise ModelArtifactError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ModelArtifactError(f"{path} must hold one JSON object.")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write one JSON object. Raises OSError."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _int_of_at_most(digits: int) -> Callable[[str], int]:
    """Return a parser for the whole numbers of JSON that raises ValueError for longer ones.

    They are refused before anything is computed with them, which could take very long.
    """

    def read(text: str) -> int:
        if len(text) > digits:
            raise ValueError(f"a number has {len(text)} digits")
        return int(text)

    return read


def component_config(folder: Path, part: str, *, limits: Limits = LIMITS) -> dict[str, Any]:
    """Read and check a component's configuration; return it `corrected`, without what runs code.

    Raises ModelArtifactError for a foreign class, for what `configuration.checked` refuses, and for
    a model of more than text to image.
    """
    path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    config = configuration.checked(path, read_json(path, limits=limits), part)
    allowed = {name for _, name in COMPONENTS[part]}
    architectures = config.get("architectures")
    named = architectures if isinstance(architectures, list) else [architectures]
    for name in (config.get("_class_name"), *named):
        if name is not None and (not isinstance(name, str) or name not in allowed):
            raise ModelArtifactError(
                f"{path} is of the class {quoted(name)}; only {_listed(allowed)} can be used here."
            )
    config = corrected(config, part)
    refuse_undrawable(config, part, path)
    return config


def read_index(folder: Path, *, limits: Limits = LIMITS) -> dict[str, Any]:
    """Read model_index.json; refuse pipelines and classes outside the fixed lists."""
    path = folder / INDEX
    index = read_json(path, limits=limits)
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in PIPELINES:
        raise ModelArtifactError(
            f"{path} describes a {quoted(pipeline)}; only {_listed(PIPELINES, ' or ')} "
            "(Stable Diffusion 1.x or 2.x, text to image) can be used."
        )
    for part in TRAINED_PARTS:
        if part in index and _entry(index, part) is None:
            raise ModelArtifactError(
                f"{path} says {part} = {json.dumps(index[part])[:200]}: a model needs one."
            )
    for part, entry in index.items():
        if not isinstance(entry, (list, dict)) or entry in ([None, None], []):
            continue  # a plain setting, or a component that this folder does not have
        if _entry(index, part) not in COMPONENTS.get(part, ()):
            names = FAMILIES_LISTED if part in ("text_encoder", "tokenizer") else ""
            raise ModelArtifactError(
                f"{path} asks for {one_line(part, 60)} = {json.dumps(entry)[:200]}, which is not "
                f"among the classes of Stable Diffusion that are allowed here{names}."
            )
    return index


def text_family(folder: Path, *, limits: Limits = LIMITS) -> TextFamily:
    """Return the family that a folder's text encoder and tokenizer belong to.

    Raises ModelArtifactError where these two and the pipeline do not belong together.
    """
    index = read_index(folder, limits=limits)
    text_encoder, tokenizer = _entry(index, "text_encoder"), _entry(index, "tokenizer")
    for family in TEXT_FAMILIES:
        if (
            index["_class_name"] in family.pipelines
            and text_encoder in family.text_encoder
            and tokenizer in family.tokenizer
        ):
            return family
    raise ModelArtifactError(
        f"{folder / INDEX} pairs the text encoder {quoted(text_encoder and text_encoder[1])} with "
        f"the tokenizer {quoted(tokenizer and tokenizer[1])} in a {index['_class_name']}, which do "
        f"not belong together{FAMILIES_LISTED}."
    )


def names_part(index: Mapping[str, Any], part: str) -> bool:
    """Return whether a model_index.json that `read_index` has checked names a class for a part."""
    return _entry(index, part) is not None


def _entry(index: Mapping[str, Any], part: str) -> tuple[str, str] | None:
    match index.get(part):
        case [str(library), str(name)]:
            return library, name
    return None


def validate_folder(folder: Path, *, linked_weights: bool = True, limits: Limits = LIMITS) -> None:
    """Check that a folder is a Stable Diffusion model in the diffusers layout, but open no weights.

    linked_weights: whether weights may lie behind links that lead out of the folder.

    Raises ModelArtifactError with one sentence for a single-file checkpoint, a missing part, a
    class outside the fixed lists, configurations that ask for code, weights in any other pickle
    than an old .bin, text behind a link that leads out of the folder, and pipes and devices.
    """
    refuse_single_file(folder)
    refuse_foreign_files(folder, _files_that_are_read(folder), linked_weights=linked_weights)
    index = read_index(folder, limits=limits)
    for part in (*TRAINED_PARTS, "tokenizer", "scheduler"):
        if not isinstance(index.get(part), list) or not (folder / part).is_dir():
            raise ModelArtifactError(
                f"{folder} is not a whole Stable Diffusion model: {part}/ is missing from it or "
                f"from its {INDEX}."
            )
    family = text_family(folder, limits=limits)
    for part in (*TRAINED_PARTS, "scheduler"):
        config = component_config(folder, part, limits=limits)
        if part == "text_encoder" and family is CLIP and config.get("eos_token_id", 0) is None:
            raise ModelArtifactError(
                f"{folder / part / 'config.json'} gives eos_token_id as null, and CLIP finds the "
                "end of a prompt by it: give the tokenizer's, which is 49407 in Stable Diffusion."
            )
    if _entry(index, "safety_checker") and (folder / "safety_checker").is_dir():
        component_config(folder, "safety_checker", limits=limits)
    for part in TRAINED_PARTS:
        weight_files(folder / part, limits=limits)


def refuse_foreign_files(
    folder: Path, files: Iterable[Path], *, linked_weights: bool = True
) -> None:
    """Raise ModelArtifactError for pipes, devices and links that lead out of the folder.

    A link in a downloaded folder may lead to any file of this machine, which would be copied into
    whatever is made of the folder; reading a pipe would block. Links within the folder are allowed,
    and so are those of the hub client's cache, whose snapshots consist of links.

    linked_weights: whether weights may lie behind links that lead out of the folder.
    """
    home = home_of(folder)
    for path in files:
        try:
            mode = path.stat().st_mode
        except OSError:
            continue  # a link to nothing, reported where the file is needed
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise ModelArtifactError(f"{path} is no regular file: remove it.")
        may_lead_out = linked_weights and path.suffix in WEIGHT_SUFFIXES
        if not may_lead_out and leads_out(path, home):
            raise ModelArtifactError(LEADS_OUT.format(path))


def home_of(folder: Path) -> str:
    """Return the folder that a model's links may not lead out of: its real path or hub cache."""
    real = os.path.realpath(folder)
    snapshots = os.path.dirname(real)
    cache = os.path.dirname(snapshots)
    is_cached = os.path.basename(snapshots) == "snapshots"
    return cache if is_cached and os.path.basename(cache).startswith("models--") else real


def leads_out(path: Path, home: str) -> bool:
    """Return whether a file lies outside `home`, because it or a folder above it is a link."""
    return not Path(os.path.realpath(path)).is_relative_to(home)


def _files_that_are_read(folder: Path) -> Iterator[Path]:
    """Yield the files of a model folder that this package opens, and all files beside them."""
    yield from (folder / name for name in (INDEX, MODEL_INFO, *OTHER_FILES))
    for part in (*COMPONENTS, SAMPLES):
        try:
            yield from sorted((folder / part).iterdir())
        except OSError:
            continue  # it is not there, or no folder


def _listed(names: Iterable[str], between: str = ", ") -> str:
    return between.join(sorted(names))
