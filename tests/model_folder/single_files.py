"""Single-file checkpoints for tests: at full size, but with holes in place of their numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from dreambooth.model_folder import published_configurations
from dreambooth.model_folder.headers import TensorEntry
from dreambooth.model_folder.published_layout import Family, tensors
from dreambooth.model_folder.safetensors_writer import NewTensor, write

Shape = tuple[int, ...]
Tensors = dict[str, tuple[str, Shape]]  # (dtype, shape) by name

SCHEDULE = (
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod"),
    *("sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod"),
    *("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance"),
    *("posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
)


def published(family: Family, dtype: str = "F32") -> Tensors:
    """Return what a published file without EMA copies holds."""
    networks = published_configurations.networks(family)
    found = {t.name: (dtype, t.shape) for t in tensors(family, **networks, where="x")}
    found |= {name: ("F32", (1000,)) for name in SCHEDULE}
    if family == "1.x":
        name = "cond_stage_model.transformer.text_model.embeddings.position_ids"
        return found | {name: ("I64", (1, 77))}
    prefix = "cond_stage_model.model."
    layers = f"{prefix}transformer.resblocks."
    behind = {
        name.replace(f"{layers}22.", f"{layers}23."): found[name]
        for name in found
        if name.startswith(f"{layers}22.")
    }
    found |= {
        f"{prefix}text_projection": (dtype, (1024, 1024)),
        f"{prefix}logit_scale": (dtype, ()),
    }
    return found | behind


def averages(held: Tensors) -> Tensors:
    """Return the EMA copies of a U-Net, as training writes them."""
    found = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): value
        for name, value in held.items()
        if name.startswith("model.diffusion_model.")
    }
    return found | {"model_ema.decay": ("F32", ()), "model_ema.num_updates": ("I32", ())}


def write_holes(
    path: Path,
    held: Tensors,
    metadata: Mapping[str, str] | None = None,
    *,
    change: Callable[[Tensors], object] | None = None,
) -> Path:
    """Write a file whose tensors are holes: gigabytes by its size, and nothing on the disk."""
    if change is not None:
        change(held)
    content = [
        NewTensor(
            entry=TensorEntry(name=name, dtype=dtype, shape=shape, begin=0),
            content=None,
        )
        for name, (dtype, shape) in held.items()
    ]
    write(path, content, metadata or {})
    return path
