"""Writes a model folder as one safetensors file, under the names that other tools read.

The names and shapes are those of `published_layout`, the metadata those of the model specification
(github.com/Stability-AI/ModelSpec, 1.0.1), which A1111 and ComfyUI show. Nothing is invented: what
the published files hold and a folder does not is left out, and so is what only a folder holds; both
are logged by name.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, Literal

import torch

from dreambooth.errors import ModelArtifactError, UserError, one_line, quoted
from dreambooth.limits import LIMITS, Limits
from dreambooth.model_folder import (
    layout,
    published_configurations,
    single_file,
    taught_subjects,
    weights,
)
from dreambooth.model_folder.component_classes import CLIP
from dreambooth.model_folder.facts import TRAINABLE, ModelFacts, read_facts
from dreambooth.model_folder.headers import TensorEntry
from dreambooth.model_folder.model_card import licence_of
from dreambooth.model_folder.published_layout import (
    TEXT,
    Family,
    PublishedTensor,
    tensors,
)
from dreambooth.model_folder.safetensors_writer import NewTensor, write
from dreambooth.model_folder.single_file import Structure
from dreambooth.model_folder.weight_names import current_vae_name, exported_name
from dreambooth.process import files

logger = logging.getLogger(__name__)

_DTYPES: Final[Mapping[torch.dtype, str]] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
_PRECISIONS: Final = {"fp32": torch.float32, "fp16": torch.float16}
_IMPLEMENTATION: Final[Mapping[Family, str]] = {
    "1.x": "https://github.com/CompVis/stable-diffusion",
    "2.x": "https://github.com/Stability-AI/stablediffusion",
}
_HASH: Final = "modelspec.hash_sha256"
# Settings that a file does not hold, for which other tools take the published values.
_SETTINGS: Final[Mapping[str, tuple[str, ...]]] = {
    "unet": ("act_fn", "attention_head_dim", "freq_shift", "norm_eps", "norm_num_groups"),
    "vae": ("act_fn", "norm_num_groups", "scaling_factor"),
    "text_encoder": ("layer_norm_eps", "num_attention_heads"),
    "scheduler": ("beta_end", "beta_schedule", "beta_start", "num_train_timesteps"),
}


def export(
    folder: Path,
    out: Path,
    *,
    precision: Literal["fp32", "fp16"] | None = None,
    title: str | None = None,
    limits: Limits = LIMITS,
) -> None:
    """Write the model of a folder as the new file `out`, wholly or not at all.

    precision: the float type of all weights, None for those of the folder. title: what tools show,
    None for the file's name. The same folder and title always give the same bytes. Raises UserError
    where `out` is there already or a weight is too large for fp16, ModelArtifactError for a model
    that other tools have no layout for, and ResourceError where the file cannot be written.
    """
    if os.path.lexists(out):
        raise UserError(f"{out} is there already: remove it, or give another name.")
    facts = read_facts(folder, to_train=False, limits=limits)
    if facts.prediction_type not in TRAINABLE:
        raise ModelArtifactError(
            f"{folder} predicts {quoted(facts.prediction_type)}, which no tool reads from one file."
        )
    structure = single_file.structure_of(folder, limits=limits)
    expected, family = structure.tensors, structure.family
    states = {part: _state(folder, part, limits) for part in layout.TRAINED_PARTS}
    _check(folder, expected, states)
    dtype = _PRECISIONS[precision] if precision else None
    content = [_new_tensor(tensor, states[tensor.part], dtype) for tensor in expected]
    metadata = _metadata(folder, family, facts, title or out.stem, limits)
    with files.disk_faults_named("The file", out, elsewhere="choose another place"):
        out.parent.mkdir(parents=True, exist_ok=True)
        part = out.with_name(f".{out.name}.part")
        try:
            write(part, content, metadata, hash_key=_HASH)
            files.put_in_place(part, out)
        finally:
            part.unlink(missing_ok=True)
    for remark in _remarks(folder, out, structure, facts.prediction_type, limits):
        logger.info(remark)


def _state(folder: Path, part: str, limits: Limits) -> dict[str, torch.Tensor]:
    """Return a component's weights under today's names; they may map the folder's files."""
    state: dict[str, torch.Tensor] = {}
    for path, key, tensor in weights.read_tensors(folder / part, limits=limits):
        name = key
        if part == "text_encoder":
            name = exported_name(CLIP, key)
        elif part == "vae":
            name = current_vae_name(key)
            if ".attentions." in name:
                tensor = weights.as_linear(tensor)
        if name in state:
            raise ModelArtifactError(f"{path} holds {quoted(name)} a second time.")
        if not name.endswith("position_ids"):  # a table that every tool makes anew
            state[name] = tensor
    return state


def _check(
    folder: Path,
    expected: tuple[PublishedTensor, ...],
    states: Mapping[str, Mapping[str, torch.Tensor]],
) -> None:
    """Refuse a folder whose weights are not exactly those of the layout."""
    wanted: dict[str, dict[str, tuple[int, ...]]] = {part: {} for part in states}
    for tensor in expected:
        wanted[tensor.part] |= dict.fromkeys(tensor.names, tensor.folder_shape)
    for part, state in states.items():
        if odd := sorted(state.keys() ^ wanted[part].keys()):
            fault = "lacks" if odd[0] in wanted[part] else "holds the foreign"
            raise ModelArtifactError(
                f"{folder / part} {fault} {one_line(odd[0], 100)}: other tools have no name for "
                "such a network in one file."
            )
        for name, weight in state.items():
            if tuple(weight.shape) != wanted[part][name] or weight.dtype not in _DTYPES:
                raise ModelArtifactError(
                    f"{folder / part} holds {quoted(name)} as {list(weight.shape)} of "
                    f"{weight.dtype}, where floats of {list(wanted[part][name])} are expected."
                )


def _new_tensor(
    tensor: PublishedTensor, state: Mapping[str, torch.Tensor], dtype: torch.dtype | None
) -> NewTensor:
    pieces = [state[name] for name in tensor.names]
    kept = pieces[0].dtype
    for piece in pieces:  # of q, k and v, which become one
        kept = torch.promote_types(kept, piece.dtype)
    kept = dtype or kept
    entry = TensorEntry(name=tensor.name, dtype=_DTYPES[kept], shape=tensor.shape, begin=0)
    return NewTensor(entry=entry, content=functools.partial(_bytes, tensor.name, pieces, kept))


def _bytes(name: str, pieces: list[torch.Tensor], dtype: torch.dtype) -> Iterator[memoryview]:
    for piece in pieces:
        cast = piece.to(dtype).contiguous()
        if dtype == torch.float16 and not bool(torch.isfinite(cast).all()):
            raise UserError(f"{name!r} does not fit into half precision: use --precision fp32.")
        yield cast.reshape(-1).view(torch.uint8).numpy().data


def _metadata(
    folder: Path, family: Family, facts: ModelFacts, title: str, limits: Limits
) -> dict[str, str]:
    is_v = facts.prediction_type == "v_prediction"
    architecture = "v1" if family == "1.x" else "v2-768-v" if is_v else "v2-512"
    stated = {
        "sai_model_spec": "1.0.1",
        "architecture": f"stable-diffusion-{architecture}",
        "implementation": _IMPLEMENTATION[family],
        "title": title,
        "resolution": f"{facts.resolution}x{facts.resolution}",
        "prediction_type": "v" if is_v else "epsilon",
        "license": licence_of(folder),
        "trigger_phrase": ", ".join(
            subject.instance_prompt for subject in taught_subjects.read(folder, limits=limits)
        ),
    }
    texts = {
        f"modelspec.{key}": one_line(text)
        for key, text in stated.items()
        if isinstance(text, str) and text
    }
    return {"format": "pt", **texts}


def _remarks(
    folder: Path, out: Path, structure: Structure, prediction_type: str, limits: Limits
) -> Iterator[str]:
    """Yield sentences about what is in the file, and what is not, with the reason."""
    family, networks, expected = structure.family, structure.networks, structure.tensors
    yield f"{out} is Stable Diffusion {family}, {prediction_type}, in {len(expected)} tensors"
    left = ["the noise schedule's tables and moving averages (a folder holds none)"]
    if family == "1.x":
        left.append("position_ids (a table that every tool makes anew)")
    else:
        layers = networks["text_encoder"].get("num_hidden_layers", 12)
        left.append(
            f"{TEXT[family]}transformer.resblocks.{layers}.*, text_projection and logit_scale "
            "(the folder holds none, and no picture depends on them)"
        )
    index = layout.read_index(folder, limits=limits)
    left += [
        f"{part} (no tool reads it from the file)"
        for part in layout.OPTIONAL_PARTS
        if layout.names_part(index, part) and (folder / part).is_dir()
    ]
    yield f"not in {out}: {'; '.join(left)}"
    published = published_configurations.networks(family)
    if expected != tensors(family, **published, where=folder):
        yield (
            f"the sizes of {folder} are none of the published ones: diffusers reads {out} with "
            "`config=` that folder, and most other tools do not read it"
        )
        return
    known = {
        **published,
        "scheduler": published_configurations.scheduler(family, prediction_type),
    }
    scheduler = layout.component_config(folder, "scheduler", limits=limits)
    for part, config in {**networks, "scheduler": scheduler}.items():
        for key in _SETTINGS[part]:
            value = config.get(key, known[part][key])
            if isinstance(value, list) and len({*map(str, value)}) == 1:
                value = value[0]
            if value != known[part][key]:
                yield (
                    f"not in {out}: {part}'s {key} = {quoted(value)}, for which other tools take "
                    f"{quoted(known[part][key])}"
                )
    if family == "1.x" and prediction_type == "v_prediction":
        yield f"other tools take 1.x for epsilon unless they read the metadata of {out}"
