"""Renames weights as today's diffusers and every version of transformers read them.

Standard library only.
"""

from __future__ import annotations

from dreambooth.model_folder.component_classes import BERT, XLM_ROBERTA, TextFamily

CLIP_PREFIX = "text_model."
# Names of the VAE's attention layers in diffusers up to 0.17; Stable Diffusion 1.x and 2.x were
# published with them.
_OLD_VAE_NAMES = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}


def current_vae_name(key: str) -> str:
    """Return today's diffusers name of a VAE weight, given that name or one of 0.17 or before."""
    if ".attentions." in key:
        for old, new in _OLD_VAE_NAMES.items():
            key = key.replace(old, new)
    return key


def exported_name(family: TextFamily, key: str) -> str:
    """Return the name of a weight that every version of transformers reads."""
    if family is BERT:
        return bert_name(key)
    if family is XLM_ROBERTA:
        return key
    return key if key.startswith(CLIP_PREFIX) else CLIP_PREFIX + key


def bert_name(key: str) -> str:
    """Return BertModel's name of a weight; the first BERT checkpoints use other names."""
    key = key.removeprefix("bert.")
    if key.endswith((".LayerNorm.gamma", ".LayerNorm.beta")):
        key = key.removesuffix(".gamma").removesuffix(".beta") + (
            ".weight" if key.endswith(".gamma") else ".bias"
        )
    return key
