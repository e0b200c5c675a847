"""Renames a text encoder's weights as every version of transformers reads them.

Standard library only.
"""

from __future__ import annotations

from dreambooth.model_folder.component_classes import BERT, XLM_ROBERTA, TextFamily

CLIP_PREFIX = "text_model."


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
