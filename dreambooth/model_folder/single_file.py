"""Makes a diffusers folder of Stable Diffusion 1.x or 2.x in one safetensors file.

The header alone shows the family and whether every tensor is there, so a dry run knows it too. The
folder's weights are the file's bytes under other names: nothing is computed, and torch is not
needed. What the file does not hold, configurations and vocabulary, comes from our own table and
from `clip_vocabulary`, or from another folder; nothing is downloaded.

Base and v-prediction models have the same tensors, so the prediction type must be stated
somewhere. Standard library only, but for a sidecar in YAML.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dreambooth.errors import ModelArtifactError, quoted, some_of
from dreambooth.limits import LIMITS, Limits
from dreambooth.model_folder import clip_vocabulary, layout, published_configurations
from dreambooth.model_folder.component_classes import CLIP
from dreambooth.model_folder.headers import TensorEntry, read_with_metadata
from dreambooth.model_folder.published_layout import (
    EMA,
    TEXT,
    UNET,
    VAE,
    Family,
    PublishedTensor,
    family_of,
    tensors,
)
from dreambooth.model_folder.safetensors_writer import NewTensor, slice_of, write
from dreambooth.settings.knob import PREDICTION_TYPES

logger = logging.getLogger(__name__)

_TOKENIZER_FILES: Final = (
    *("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json"),
)
SIDECAR: Final = ".yaml"
_DTYPES: Final = ("F64", "F32", "F16", "BF16")
_IN_WORDS: Final = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}
# By the U-Net's input channels: what else than noise it is given.
_OTHER_INPUTS: Final = {
    5: "a depth model, which needs a depth map",
    7: "an upscaler, which needs a small picture",
    8: "an instruct-pix2pix model, which needs a picture to change",
    9: "an inpainting model, which needs a picture and a mask",
}
# A name that no file of 1.x or 2.x has, and the kind of model that has it.
_OTHER_KINDS: Final = (
    (re.compile(r"conditioner\."), "Stable Diffusion XL"),
    (re.compile(r"(model\.diffusion_model\.)?joint_blocks\.|text_encoders\."), "newer than 2.x"),
    (re.compile(r"(model\.diffusion_model\.)?(double|single)_blocks\."), "Flux or a relative"),
    (re.compile(r"control_model\."), "a ControlNet"),
    (re.compile(r"model\.diffusion_model\.label_emb\."), "a model with more inputs than text"),
)
# Written by tools of 2022 and 2023, whose CLIPTextModel had no `text_model`.
_OLD_TEXT: Final = re.compile(
    r"(cond_stage_model\.transformer\.)(embeddings|encoder|final_layer_norm)\."
)
# Tensors that files hold beside the model, with a name for all of a kind and why they are not read.
_UNREAD: Final = (
    (
        re.compile(
            r"(alphas|betas|(log_|sqrt_)?\w*alphas_cumprod\w*|posterior_\w+|lvlb_weights|logvar"
            r"|log_one_minus_\w+|denoiser\.(log_)?sigmas|scale_factor)"
        ),
        "the noise schedule's tables",
        "they are made anew from its configuration",
    ),
    (
        re.compile(r"cond_stage_model\.(\w+\.)*position_ids"),
        "position_ids",
        "a table of 0, 1, 2, ..., which is made anew",
    ),
    (
        re.compile(
            r"cond_stage_model\.((model|transformer)\.)?(text_projection(\.weight)?|logit_scale)"
        ),
        "text_projection and logit_scale",
        "CLIP compares pictures with them, and none is drawn with them",
    ),
    (
        re.compile(r"cond_stage_model\.model\.attn_mask"),
        "attn_mask",
        "a table that is made anew",
    ),
    (
        re.compile(r"first_stage_model\.(loss|model_ema)\..+"),
        "first_stage_model.loss.* and model_ema.*",
        "the VAE was trained with them, and none is drawn with them",
    ),
)
# modelspec's values, and those of a sidecar's `parameterization`.
_STATED: Final = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
}
_BY_ARCHITECTURE: Final = {
    "stable-diffusion-v2-512": "epsilon",
    "stable-diffusion-v2-768-v": "v_prediction",
}
_RESOLUTION: Final = re.compile(r"([0-9]{2,4})x\1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """The networks of a model folder, and their tensors in one file."""

    family: Family
    networks: Mapping[str, Mapping[str, Any]]
    tensors: tuple[PublishedTensor, ...]


def structure_of(folder: Path, *, limits: Limits = LIMITS) -> Structure:
    """Return how a folder's model is stored in one file, by its configurations alone.

    Raises ModelArtifactError for a model that other tools have no such file for.
    """
    if layout.text_family(folder, limits=limits) is not CLIP:
        raise ModelArtifactError(
            f"{folder} has no CLIP text encoder, and other models have no layout in one file."
        )
    networks = {
        part: layout.component_config(folder, part, limits=limits) for part in layout.TRAINED_PARTS
    }
    family = family_of(networks["unet"], networks["text_encoder"], folder)
    return Structure(
        family=family, networks=networks, tensors=tensors(family, **networks, where=folder)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A single-file checkpoint whose header has been read and checked.

    entries: by the published name. configurations: by part, with the scheduler's. base: the folder
    that they and the vocabulary are from, None for the published ones. remarks: sentences about
    what was decided and what is not read.
    """

    path: Path
    family: Family
    tensors: tuple[PublishedTensor, ...]
    entries: Mapping[str, TensorEntry]
    configurations: Mapping[str, Mapping[str, Any]]
    base: Path | None
    remarks: tuple[str, ...]


def read(
    path: Path,
    *,
    prediction_type: str | None = None,
    base: Path | None = None,
    limits: Limits = LIMITS,
) -> Checkpoint:
    """Read a checkpoint's header, and settle what the file does not say.

    prediction_type: what the user says, if anything; else it is looked for in the metadata, in a
    `.yaml` of the same name beside the file and in `base`, a diffusers folder whose configurations
    and vocabulary are used. Raises ModelArtifactError with one sentence for any other file, for
    tensors that are missing, unknown or of another shape, and where the prediction type is not
    stated.
    """
    entries, metadata = read_with_metadata(path, limits=limits)
    named = _by_published_name(path, entries)
    family = _family(path, named)
    networks: Mapping[str, Mapping[str, Any]] = published_configurations.networks(family)
    expected = tensors(family, **networks, where=path)
    if base is not None:
        structure = _structure_of_base(base, family, limits)
        networks, expected = structure.networks, structure.tensors
    _check(path, family, named, expected, base)
    unread = _unread(path, family, named, expected)
    stated, reason = _prediction_type(
        path,
        family,
        asked=prediction_type,
        metadata=metadata,
        base=base,
        limits=limits,
    )
    dtypes = sorted({_IN_WORDS[named[tensor.name].dtype] for tensor in expected})
    origin = "as published" if base is None else f"from {base}"
    return Checkpoint(
        path=path,
        family=family,
        tensors=expected,
        entries=named,
        configurations=_settled(networks, family, stated, metadata, base, limits),
        base=base,
        remarks=(
            f"{path} is Stable Diffusion {family} in {' and '.join(dtypes)}: prediction_type is "
            f"{stated}, {reason}; configurations and vocabulary {origin}; it holds no safety "
            "checker",
            *(f"not read from {path}: {what}" for what in unread),
        ),
    )


def write_folder(checkpoint: Checkpoint, folder: Path, *, headers_only: bool = False) -> None:
    """Write a checkpoint as a diffusers folder, which must not exist.

    headers_only: leave holes for the weights, for a dry run, which reads only their headers.
    Raises OSError, ModelArtifactError for a file that changes meanwhile, and ResourceError where
    the vocabulary is not installed.
    """
    folder.mkdir(parents=True)
    for part in (*checkpoint.configurations, "tokenizer"):
        (folder / part).mkdir()
    for part, config in checkpoint.configurations.items():
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        layout.write_json(folder / part / name, config)
    if checkpoint.base is None:  # it may be missing, so it comes before the gigabytes
        clip_vocabulary.write(folder / "tokenizer", checkpoint.family)
    else:
        for path in _tokenizer_files(checkpoint.base):
            shutil.copyfile(path, folder / "tokenizer" / path.name)
    for part in layout.TRAINED_PARTS:
        content = [
            each
            for tensor in checkpoint.tensors
            if tensor.part == part
            for each in _in_folder(checkpoint, tensor, headers_only)
        ]
        write(folder / part / layout.WRITTEN_WEIGHTS[part], content, {"format": "pt"})
    scheduler = checkpoint.configurations["scheduler"]["_class_name"]
    index = {**published_configurations.INDEX, "scheduler": ["diffusers", scheduler]}
    layout.write_json(folder / layout.INDEX, index)


def _in_folder(
    checkpoint: Checkpoint, tensor: PublishedTensor, headers_only: bool
) -> Iterable[NewTensor]:
    """Yield what one tensor of the file is in the folder."""
    entry, count = checkpoint.entries[tensor.name], len(tensor.names)
    for number, name in enumerate(tensor.names):
        begin = entry.begin + number * (entry.size // count)
        yield NewTensor(
            entry=TensorEntry(name=name, dtype=entry.dtype, shape=tensor.folder_shape, begin=0),
            content=None if headers_only else slice_of(checkpoint.path, begin, entry.size // count),
        )


def _by_published_name(path: Path, entries: Iterable[TensorEntry]) -> dict[str, TensorEntry]:
    named: dict[str, TensorEntry] = {}
    for entry in entries:
        name = _OLD_TEXT.sub(r"\1text_model.\2.", entry.name)
        if name in named:
            raise ModelArtifactError(f"{path} holds {quoted(name)} twice, under two names.")
        named[name] = entry
    return named


def _family(path: Path, named: Mapping[str, TensorEntry]) -> Family:
    """Return the family, by the names of the text encoder; refuse what is neither."""
    for pattern, kind in _OTHER_KINDS:
        if found := next(filter(pattern.match, named), None):
            raise ModelArtifactError(
                f"{path} holds {quoted(found)}: it is {kind}, and only Stable Diffusion 1.x and "
                "2.x can be used."
            )
    first = named.get(f"{UNET}input_blocks.0.0.weight")
    channels = first.shape[1] if first is not None and len(first.shape) == 4 else 4
    if channels in _OTHER_INPUTS:
        raise ModelArtifactError(
            f"{path} is {_OTHER_INPUTS[channels]} ({channels} input channels); only text-to-image "
            "models can be used, which have 4."
        )
    families = [
        family for family, prefix in TEXT.items() if any(name.startswith(prefix) for name in named)
    ]
    missing = [
        what
        for what, prefixes in (
            ("U-Net (model.diffusion_model.*)", [UNET]),
            ("VAE (first_stage_model.*)", [VAE]),
            ("text encoder (cond_stage_model.*)", TEXT.values()),
        )
        if not any(name.startswith(prefix) for prefix in prefixes for name in named)
    ]
    if missing:
        raise ModelArtifactError(
            f"{path} is not a whole Stable Diffusion model: it has no {' and no '.join(missing)}."
        )
    if len(families) > 1:
        raise ModelArtifactError(
            f"{path} holds the text encoders of Stable Diffusion 1.x and of 2.x, and can be one "
            "model of the two alone."
        )
    return families[0]


def _structure_of_base(base: Path, family: Family, limits: Limits) -> Structure:
    """Return the structure of a folder whose files are to be copied, and check these."""
    structure = structure_of(base, limits=limits)
    if structure.family != family:
        raise ModelArtifactError(
            f"{base} is Stable Diffusion {structure.family}, and the file {family}: give a base of "
            "the same family."
        )
    layout.refuse_foreign_files(base, _tokenizer_files(base))
    return structure


def _tokenizer_files(base: Path) -> list[Path]:
    paths = (base / "tokenizer" / name for name in _TOKENIZER_FILES)
    return [path for path in paths if path.is_file()]


def _unread(
    path: Path,
    family: Family,
    named: Mapping[str, TensorEntry],
    expected: Iterable[PublishedTensor],
) -> list[str]:
    """Return what is not read, with the reasons; refuse tensors that no such model has."""
    names = {tensor.name for tensor in expected}
    averaged = {
        EMA + name.removeprefix("model.").replace(".", "") for name in names if UNET in name
    }
    averaged |= {f"{EMA}decay", f"{EMA}num_updates"}
    behind = _layer_behind(family, expected)
    counts: dict[tuple[str, str], int] = {}
    unknown = []
    for name in named:
        if name in names:
            continue
        kind = next((kind for pattern, *kind in _UNREAD if pattern.fullmatch(name)), None)
        if name in averaged:
            kind = [
                f"{EMA}*",
                "moving averages; the weights themselves are read, as by other tools",
            ]
        elif behind is not None and name.startswith(behind):
            kind = [f"{behind}*", "the layer behind the one that the U-Net reads"]
        if kind is None:
            unknown.append(name)
        else:
            counts[kind[0], kind[1]] = counts.get((kind[0], kind[1]), 0) + 1
    if unknown:
        raise ModelArtifactError(
            f"{path} holds {some_of(unknown)}, which Stable Diffusion {family} does not have: what "
            "would be left out might change its pictures."
        )
    return [
        f"{what} ({count} tensor{'s' * (count > 1)}), {why}"
        for (what, why), count in counts.items()
    ]


def _layer_behind(family: Family, expected: Iterable[PublishedTensor]) -> str | None:
    """Return the prefix of the text layer that 2.x files hold and no picture depends on."""
    if family == "1.x":
        return None
    prefix = f"{TEXT[family]}transformer.resblocks."
    names = (tensor.name for tensor in expected)
    numbers = [int(n.removeprefix(prefix).split(".")[0]) for n in names if n.startswith(prefix)]
    return f"{prefix}{max(numbers) + 1}."


def _check(
    path: Path,
    family: Family,
    named: Mapping[str, TensorEntry],
    expected: tuple[PublishedTensor, ...],
    base: Path | None,
) -> None:
    """Refuse a model with missing tensors, or with tensors of another shape or type."""
    missing = [tensor.name for tensor in expected if tensor.name not in named]
    model = f"Stable Diffusion {family}" if base is None else str(base)
    advice = "" if base else "; a model of other sizes needs its own configurations (--base FOLDER)"
    if missing:
        raise ModelArtifactError(
            f"{path} lacks {some_of(missing)} of the {len(expected)} tensors of {model}{advice}."
        )
    for tensor in expected:
        entry = named[tensor.name]
        # Some tools store the VAE's attention as linear layers, as folders do.
        is_linear = tensor.part == "vae" and entry.shape == tensor.folder_shape
        if entry.shape != tensor.shape and not is_linear:
            raise ModelArtifactError(
                f"{path} holds {quoted(tensor.name)} in the shape {list(entry.shape)}, where "
                f"{model} has {list(tensor.shape)}{advice}."
            )
        if entry.dtype not in _DTYPES:
            raise ModelArtifactError(
                f"{path} holds {quoted(tensor.name)} as {entry.dtype}: weights are read as fp32, "
                "fp16 or bf16, so take the file in one of these."
            )


def _prediction_type(
    path: Path,
    family: Family,
    *,
    asked: str | None,
    metadata: Mapping[str, str],
    base: Path | None,
    limits: Limits,
) -> tuple[str, str]:
    """Return the prediction type and which source states it."""
    if asked is not None:
        return asked, "as --prediction_type says"
    for key, known in (
        ("modelspec.prediction_type", _STATED),
        ("modelspec.architecture", _BY_ARCHITECTURE),
    ):
        text = metadata.get(key, "").strip().lower()
        if text in known:
            return known[text], f"as {key} in its metadata says"
        if text and known is _STATED:
            raise ModelArtifactError(
                f"{path} says {key} = {quoted(text)} in its metadata, which is neither epsilon nor "
                "v: say with --prediction_type which of epsilon and v_prediction it is."
            )
    sidecar = path.with_suffix(SIDECAR)
    if os.path.lexists(sidecar):
        return _of_sidecar(sidecar, limits), f"as {sidecar} says"
    if base is not None:
        config = layout.component_config(base, "scheduler", limits=limits)
        found = config.get("prediction_type", "epsilon")
        if found in PREDICTION_TYPES:
            return str(found), f"as {base} says"
    if family == "1.x":
        return "epsilon", "as in all published 1.x (--prediction_type can say otherwise)"
    raise ModelArtifactError(
        f"{path} is Stable Diffusion 2.x, which was published with both prediction types, and does "
        "not say which it has: give --prediction_type=epsilon (2.0 and 2.1 base, 512 pixels) or "
        "--prediction_type=v_prediction (2.0 and 2.1, 768 pixels)."
    )


def _of_sidecar(path: Path, limits: Limits) -> str:
    """Return the `parameterization` in the settings of a model, which is eps unless stated."""
    import yaml

    try:
        if not path.is_file() or path.stat().st_size > limits.max_sidecar_bytes:
            raise ValueError(f"it is no regular file of at most {limits.max_sidecar_bytes} bytes")
        text = path.read_text("utf-8")
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            starts = isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent))
            depth += starts - isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent))
            # An alias is a second name for a part: a few lines can grow to gigabytes by them.
            if isinstance(event, yaml.AliasEvent) or depth > limits.max_sidecar_depth:
                raise ValueError("it holds aliases, or is nested too deep")
        content = yaml.safe_load(text)
        stated = content["model"]["params"].get("parameterization", "eps")
        return _STATED[stated]
    except (
        *(OSError, ValueError, TypeError, LookupError, AttributeError),
        *(RecursionError, OverflowError, yaml.YAMLError),
    ) as error:
        raise ModelArtifactError(
            f"{path} lies beside the model and does not state its parameterization as the settings "
            "of Stable Diffusion do (model, params, parameterization: eps or v): remove it, or say "
            "it with --prediction_type."
        ) from error


def _settled(
    networks: Mapping[str, Mapping[str, Any]],
    family: Family,
    prediction_type: str,
    metadata: Mapping[str, str],
    base: Path | None,
    limits: Limits,
) -> dict[str, Mapping[str, Any]]:
    """Return all configurations, with the prediction type and the side of the pictures."""
    if base is not None:
        scheduler = layout.component_config(base, "scheduler", limits=limits)
        index = layout.read_index(base, limits=limits)
        stated = {"_class_name": index["scheduler"][1], "prediction_type": prediction_type}
        return {**networks, "scheduler": {**scheduler, **stated}}
    side = published_configurations.sample_side(family, prediction_type)
    found = _RESOLUTION.fullmatch(metadata.get("modelspec.resolution", ""))
    if found and int(found[1]) % 8 == 0 and 64 <= int(found[1]) <= 2048:
        side = int(found[1])
    unet = {**networks["unet"], "sample_size": side // 8}
    if family == "2.x" and prediction_type == "v_prediction":
        unet["upcast_attention"] = True  # of 2.1, whose attention overflows in fp16
    scheduler = published_configurations.scheduler(family, prediction_type)
    return {**networks, "unet": unet, "scheduler": scheduler}
