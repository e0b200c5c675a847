"""Trained parts and the base model's files -> the model folder (what becomes model.tar.gz).

The folder is written into `<model_dir>/.partial-*` on the same file system (model_dir may be a
mount point, which cannot be renamed itself), flushed to the disk, and moved entry by entry,
`model_index.json` last: a folder without that file is no model.

Weights that were trained are written from memory, frozen parts from the base folder's files. The
precision holds for every weight of the folder, for libraries cannot run parts of several float
types together: "fp32" gives the trained weights bit for bit (and frozen ones exactly, for every
half is a float), "fp16" casts them all.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from safetensors import SafetensorError

from dreambooth import model_card
from dreambooth.diffusion import layout, vocabulary, weights
from dreambooth.errors import ModelArtifactError, ResourceError, TrainingDivergedError, UserError
from dreambooth.model_card import ModelCard, licence_of

__all__ = ["ModelCard", "TrainedParts", "clear", "licence_of", "write"]

# In the order in which they are moved into place; cleared in the reverse order. The first one is
# the mark by which a later job knows that an earlier one wrote here.
_MARK = "hyperparameters.json"
ENTRIES = (
    *(_MARK, "README.md", "samples", layout.MODEL_INFO),
    *("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
    *(*layout.OPTIONAL_PARTS, layout.INDEX),
)
# Names that a folder which is not ours may well hold, too.
_COMMON_NAMES = ("README.md", "samples")
_PARTIAL = ".partial-"
_WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "safety_checker": "model.safetensors",
}
_PLAIN_FILES = {
    "tokenizer": (
        *("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"),
        *("special_tokens_map.json", "added_tokens.json"),
    ),
    "scheduler": ("scheduler_config.json",),
    "feature_extractor": ("preprocessor_config.json",),
}
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
# Wrappers that torch.compile leaves in the names of a module's weights.
_COMPILED = "_orig_mod."


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedParts:
    """The modules that were trained; `text_encoder` is None where it stayed frozen."""

    unet: torch.nn.Module
    text_encoder: torch.nn.Module | None = None


def clear(model_dir: Path, *, base_folder: Path | None = None) -> None:
    """Remove what an earlier run of ours left in `model_dir`; files of others stay.

    Only leftovers (`.partial-*`) and the names of ENTRIES go. Raises UserError rather than
    delete a model that no run of ours wrote, or the folder that the base model is read from.
    """
    if not model_dir.exists():
        return
    if base_folder is not None and _same_or_inside(base_folder, model_dir):
        raise UserError(
            f"The model would be written over the base model that it starts from ({base_folder}): "
            "choose another --model_dir."
        )
    with _told(model_dir):
        for leftover in sorted(model_dir.glob(_PARTIAL + "*")):
            _remove(leftover)
        ours = (model_dir / _MARK).exists()
        if not ours and _is_model(model_dir):
            raise UserError(
                f"{model_dir} holds a model that was not written by an earlier run: it is not "
                "overwritten; choose another --model_dir."
            )
        for name in reversed(ENTRIES):
            if ours or name not in _COMMON_NAMES:
                _remove(model_dir / name)


def write(
    model_dir: Path,
    *,
    base_folder: Path,
    trained: TrainedParts,
    resolution: int,
    card: ModelCard,
    hyperparameters_json: str,
    samples: Mapping[str, Image.Image] | None = None,
    precision: Literal["fp32", "fp16"] = "fp32",
) -> None:
    """Write the model folder: whole, or not at all.

    `samples` are pictures by caption (usually the prompt). An earlier model in `model_dir` stays
    until the new one is complete on the disk. Raises TrainingDivergedError where a trained weight
    is not finite, ResourceError where the disk is full or model_dir cannot be written.
    """
    with _told(model_dir):
        model_dir.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=model_dir))
        try:
            _write_parts(stage, base_folder, trained, precision, card.steps)
            _write_index(stage, base_folder)
            _write_model_info(stage, base_folder, card, resolution)
            (stage / _MARK).write_text(hyperparameters_json.rstrip("\n") + "\n", encoding="utf-8")
            named = _write_samples(stage, samples or {})
            text = model_card.render(card, samples=named)
            (stage / "README.md").write_text(text, encoding="utf-8")
            _flush(stage)
            _move(stage, model_dir)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def _write_parts(
    stage: Path, base: Path, trained: TrainedParts, precision: str, steps: int
) -> None:
    dtype = torch.float16 if precision == "fp16" else torch.float32
    for part in _parts(base):
        target = stage / part
        target.mkdir()
        for name in _PLAIN_FILES.get(part, ()):
            if (base / part / name).is_file():
                shutil.copyfile(base / part / name, target / name)
        if part not in _WEIGHTS:
            continue
        module = getattr(trained, part, None)
        if module is None:
            state = {key: tensor for _, key, tensor in weights.read_tensors(base / part)}
        else:
            state = _trained_state(module, part, steps)
        if part == "text_encoder":
            state = {weights.text_model_prefixed(key): tensor for key, tensor in state.items()}
        weights.save(_cast(state, dtype, part), target / _WEIGHTS[part])
        _write_config(base / part / "config.json", target / "config.json")
    _complete_tokenizer(base / "tokenizer", stage / "tokenizer")


def _trained_state(module: torch.nn.Module, part: str, steps: int) -> dict[str, torch.Tensor]:
    """A trained module's weights on the CPU under their plain names."""
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
    """Give the weights one float type; tables of integers stay, and so does the source."""
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


def _write_config(origin: Path, target: Path) -> None:
    """Copy a configuration, with float32 as the type to compute in where it states one.

    transformers 5 otherwise computes in the type of the file, diffusers in float32: a pipeline of
    halves would not run.
    """
    config = layout.read_json(origin)
    if "_class_name" not in config:  # transformers
        config.pop("dtype", None)
        config["torch_dtype"] = "float32"  # the name that 4.x and 5.x read
    _write_json(target, config)


def _complete_tokenizer(base: Path, target: Path) -> None:
    """Add what transformers 4.x needs where the base was written by transformers 5."""
    if not ((target / "vocab.json").exists() and (target / "merges.txt").exists()):
        vocabulary.write(target, vocabulary.read(base))
    special = target / "special_tokens_map.json"
    settings = target / "tokenizer_config.json"
    if not special.exists() and settings.exists():
        known = layout.read_json(settings)
        _write_json(special, {name: known[name] for name in _SPECIAL_TOKENS if known.get(name)})


def _write_index(stage: Path, base: Path) -> None:
    index = layout.read_index(base)
    index.pop("_name_or_path", None)  # a path on the machine that saved the base
    for part in layout.OPTIONAL_PARTS:
        if not (stage / part).exists() and part in index:
            index[part] = [None, None]
    _write_json(stage / layout.INDEX, index)


def _write_model_info(stage: Path, base: Path, card: ModelCard, resolution: int) -> None:
    path = base / layout.MODEL_INFO
    info = layout.read_json(path) if path.exists() else {}
    own = {
        "resolution": resolution,
        "base_model": card.base,
        "instance_prompt": card.instance_prompt,
        "class_prompt": card.class_prompt,
        "steps": card.steps,
    }
    _write_json(stage / layout.MODEL_INFO, {**info, **own})


def _write_samples(stage: Path, samples: Mapping[str, Image.Image]) -> list[tuple[str, str]]:
    if not samples:
        return []
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
        for path in (*(Path(folder) / name for name in names), Path(folder)):
            _fsync(path)


def _move(stage: Path, model_dir: Path) -> None:
    # The old model ends here, the new one begins with the last move.
    for name in reversed(ENTRIES):
        if name not in _COMMON_NAMES or (stage / name).exists():
            _remove(model_dir / name)
    for name in ENTRIES:
        if (stage / name).exists():
            if name == layout.INDEX:
                _fsync(model_dir)
            os.replace(stage / name, model_dir / name)
    _fsync(model_dir)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _told(model_dir: Path) -> Iterator[None]:
    """Turn a failing disk into a sentence for the user."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            why = f"the folder cannot be written ({error})"
        else:
            why = f"the disk is full or cannot be written ({error})"
        raise ResourceError(
            f"The model could not be written to {model_dir}: {why}; free some space, choose "
            "another --model_dir, or set export_precision=fp16, which halves its size."
        ) from error


def _parts(base: Path) -> Iterator[str]:
    index = layout.read_index(base)
    for part in layout.COMPONENTS:
        if part in layout.OPTIONAL_PARTS:
            if index.get(part) in (None, [], [None, None]) or not (base / part).is_dir():
                continue
        elif not (base / part).is_dir():
            raise ModelArtifactError(f"{base / part} of the base model is not there any more.")
        yield part


def _is_model(folder: Path) -> bool:
    try:
        layout.validate_folder(folder)
    except ModelArtifactError:
        return False
    return True


def _same_or_inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
