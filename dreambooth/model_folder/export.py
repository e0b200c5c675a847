"""Write the model folder (which becomes model.tar.gz) of a training, finished or stopped.

The folder is written into `<model_dir>/.partial-*`, on the same file system (model_dir itself may
be a mount point, which cannot be renamed). It is flushed to the disk and then moved entry by entry,
`model_index.json` last: a folder without that file is no model.

Trained weights are written from memory, frozen parts from the base folder's files. The precision
holds for every weight of the folder, because libraries cannot run parts of several float types
together. "fp32" keeps the trained weights bit for bit, and the frozen ones exactly, since fp32
holds every fp16 number; "fp16" casts them all.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from dreambooth.errors import ModelArtifactError, TrainingDivergedError, UserError
from dreambooth.model_folder import destination, facts, layout, model_card, vocabulary, weights
from dreambooth.model_folder.component_classes import BERT, CLIP, COMPONENTS, TextFamily
from dreambooth.model_folder.destination import ENTRIES, check, clear
from dreambooth.model_folder.model_card import ModelCard, licence_of
from dreambooth.model_folder.weight_names import exported_name
from dreambooth.process.files import fsync

__all__ = [
    "ENTRIES",
    "ModelCard",
    "TrainedParts",
    "add_samples",
    "check",
    "clear",
    "licence_of",
    "write",
]

_PLAIN_FILES = {
    "tokenizer": (
        *("vocab.json", "merges.txt", "vocab.txt", "sentencepiece.bpe.model"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
        "added_tokens.json",
    ),
    "feature_extractor": ("preprocessor_config.json",),
}
_SPECIAL_TOKENS = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token"),
    "mask_token",
)
# torch.compile puts this prefix into the names of a module's weights.
_COMPILED = "_orig_mod."


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedParts:
    """The trained modules; `text_encoder` is None where it stayed frozen."""

    unet: torch.nn.Module
    text_encoder: torch.nn.Module | None = None


def write(
    model_dir: Path,
    *,
    base_folder: Path,
    trained: TrainedParts,
    resolution: int,
    card: ModelCard,
    hyperparameters_json: str,
    precision: Literal["fp32", "fp16"] = "fp32",
    elsewhere: str = destination.ELSEWHERE,
) -> None:
    """Write the model folder, wholly or not at all.

    An earlier model in `model_dir` stays until the new one is complete on the disk (a training job
    removes it before its first step, with `clear`). Raises TrainingDivergedError where a trained
    weight is not finite, UserError where a weight is too large for fp16, ModelArtifactError where
    a part of the base model is gone, and ResourceError where the disk is full or model_dir cannot
    be written. elsewhere: as in `check`.
    """
    with destination.disk_faults_named(model_dir, elsewhere):
        model_dir.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=destination.PARTIAL, dir=model_dir))
        try:
            _write_parts(stage, base_folder, trained, precision, card.steps)
            _write_sample_size(stage / "unet" / "config.json", base_folder, resolution)
            _write_index(stage, base_folder)
            _write_model_info(stage, base_folder, card, resolution)
            (stage / "hyperparameters.json").write_text(
                hyperparameters_json.rstrip("\n") + "\n", encoding="utf-8"
            )
            (stage / "README.md").write_text(model_card.render(card), encoding="utf-8")
            _flush(stage)
            destination.move(stage, model_dir)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def add_samples(
    model_dir: Path,
    *,
    card: ModelCard,
    samples: Mapping[str, Image.Image],
    elsewhere: str = destination.ELSEWHERE,
) -> None:
    """Add sample pictures by caption (usually the prompt) to a model that `write` has written.

    They come last, because drawing them may fail and the model is complete without them. Raises
    ResourceError where the disk is full or model_dir cannot be written. elsewhere: as in `check`.
    """
    with destination.disk_faults_named(model_dir, elsewhere):
        stage = Path(tempfile.mkdtemp(prefix=destination.PARTIAL, dir=model_dir))
        try:
            named = _write_samples(stage, samples)
            text = model_card.render(card, samples=named)
            (stage / "README.md").write_text(text, encoding="utf-8")
            _flush(stage)
            destination.remove(model_dir / "samples")
            for name in ("samples", "README.md"):
                os.replace(stage / name, model_dir / name)
            fsync(model_dir)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def _write_parts(
    stage: Path, base: Path, trained: TrainedParts, precision: str, steps: int
) -> None:
    dtype = torch.float16 if precision == "fp16" else torch.float32
    family = layout.text_family(base)
    for part in _parts(base):
        target = stage / part
        target.mkdir()
        for name in _PLAIN_FILES.get(part, ()):
            if (base / part / name).is_file():
                shutil.copyfile(base / part / name, target / name)
        if part == "scheduler":
            layout.write_json(target / "scheduler_config.json", layout.component_config(base, part))
        if part not in layout.WRITTEN_WEIGHTS:
            continue
        module = getattr(trained, part, None)
        state = {}
        if module is None or part == "text_encoder":  # keep weights that the module lacks
            state = {
                _name(part, family, key): tensor if part != "vae" else _vae_weight(key, tensor)
                for _, key, tensor in weights.read_tensors(base / part)
            }
        if module is not None:
            changed = _trained_state(module, part, steps)
            state |= {_name(part, family, key): tensor for key, tensor in changed.items()}
        weights.save(_cast(state, dtype, part), target / layout.WRITTEN_WEIGHTS[part])
        _write_config(base / part / "config.json", target / "config.json", part)
    _complete_tokenizer(base / "tokenizer", stage / "tokenizer", family)


def _name(part: str, family: TextFamily, key: str) -> str:
    return exported_name(family, key) if part == "text_encoder" else key


def _vae_weight(key: str, tensor: torch.Tensor) -> torch.Tensor:
    return weights.as_linear(tensor) if ".attentions." in key else tensor


def _trained_state(module: torch.nn.Module, part: str, steps: int) -> dict[str, torch.Tensor]:
    """Return a trained module's float weights on the CPU, without torch.compile's prefix."""
    state = {}
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            state[key.replace(_COMPILED, "")] = tensor.detach().cpu()
            if not bool(torch.isfinite(tensor).all()):
                raise TrainingDivergedError(
                    f"The training diverged: {key!r} of the {part} is not finite after {steps} "
                    "steps, and no model was written; lower learning_rate.",
                    steps,
                )
    return state


def _cast(
    state: Mapping[str, torch.Tensor], dtype: torch.dtype, part: str
) -> dict[str, torch.Tensor]:
    """Return the weights with floats cast to `dtype`; integer tables and `state` stay the same."""
    cast = {
        key: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for key, tensor in state.items()
    }
    for key, tensor in cast.items():
        if dtype == torch.float16 and not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"{key!r} of the {part} does not fit into half precision: use "
                "export_precision=fp32."
            )
    return cast


def _write_config(origin: Path, target: Path, part: str) -> None:
    """Copy a configuration as `component_config` reads it; transformers' get torch_dtype float32.

    Otherwise transformers 5 would compute in the float type of the file and diffusers in float32,
    and a pipeline of fp16 weights would not run.
    """
    config = layout.component_config(origin.parents[1], part)
    if "_class_name" not in config:  # transformers
        config.pop("dtype", None)
        config["torch_dtype"] = "float32"  # the name that 4.x and 5.x read
    layout.write_json(target, config)


def _write_sample_size(path: Path, base: Path, resolution: int) -> None:
    """Let plain diffusers draw at the trained resolution too: it reads the U-Net's sample_size."""
    scale = facts.read_facts(base, to_train=False).vae_scale_factor
    config = layout.read_json(path)
    if config.get("sample_size") != (size := facts.drawn_side(resolution, scale) // scale):
        # The pipeline takes a small size of a version before 0.9 for a mistake.
        version = importlib.metadata.version("diffusers")
        layout.write_json(path, {**config, "sample_size": size, "_diffusers_version": version})


def _complete_tokenizer(base: Path, target: Path, family: TextFamily) -> None:
    """Add the files that transformers 4.x needs and a base written by transformers 5 lacks.

    SentencePiece's own file cannot be made from tokenizer.json, but the fast tokenizer reads that.
    """
    if family is CLIP and not all((target / n).exists() for n in ("vocab.json", "merges.txt")):
        vocabulary.write(target, vocabulary.read(base))
    if family is BERT and not (target / vocabulary.WORDPIECE).exists():
        vocabulary.write_wordpiece(target, vocabulary.read_wordpiece(base))
    special = target / "special_tokens_map.json"
    settings = target / "tokenizer_config.json"
    if not special.exists() and settings.exists():
        known = layout.read_json(settings)
        layout.write_json(
            special, {name: known[name] for name in _SPECIAL_TOKENS if known.get(name)}
        )


def _write_index(stage: Path, base: Path) -> None:
    index = layout.read_index(base)
    index.pop("_name_or_path", None)  # a path on the machine that saved the base
    for part in layout.OPTIONAL_PARTS:
        if not (stage / part).exists() and part in index:
            index[part] = [None, None]
    layout.write_json(stage / layout.INDEX, index)


def _write_model_info(stage: Path, base: Path, card: ModelCard, resolution: int) -> None:
    path = base / layout.MODEL_INFO
    info = layout.read_json(path) if path.exists() else {}
    own = {
        "resolution": resolution,
        "base_model": card.base,
        "instance_prompt": card.subjects[0].instance_prompt,
        "class_prompt": card.subjects[0].class_prompt,
        "subjects": [asdict(subject) for subject in card.subjects],
        "steps": card.steps,
        "training": card.facts,
        **destination.MARK,
    }
    layout.write_json(stage / layout.MODEL_INFO, {**info, **own})


def _write_samples(stage: Path, samples: Mapping[str, Image.Image]) -> list[tuple[str, str]]:
    (stage / "samples").mkdir()
    named = []
    for number, (caption, picture) in enumerate(samples.items(), start=1):
        slug = re.sub(r"[^a-z0-9]+", "_", caption.lower()).strip("_")[:60]
        name = f"{number:02d}_{slug}.png".replace("_.", ".")
        picture.save(stage / "samples" / name)
        named.append((name, caption))
    return named


def _flush(stage: Path) -> None:
    for folder, _, names in os.walk(stage, topdown=False):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # it was not ours, and is gone
                fsync(Path(folder, name))
        fsync(Path(folder))


def _parts(base: Path) -> Iterator[str]:
    index = layout.read_index(base)
    for part in COMPONENTS:
        if part in layout.OPTIONAL_PARTS:
            if index.get(part) in (None, [], [None, None]) or not (base / part).is_dir():
                continue
        elif not (base / part).is_dir():
            raise ModelArtifactError(f"{base / part} of the base model is not there any more.")
        yield part
