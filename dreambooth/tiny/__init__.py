"""Gives the paths of the embedded default model and its data sets, and its settings.

Standard library only, so that a path does not cost an import of torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

WEIGHTS = Path(__file__).parent / "weights"
DATA = Path(__file__).parent / "data"

DEFAULTS: Mapping[str, str] = MappingProxyType(
    {
        "learning_rate": "0.00015",
        "max_steps": "800",  # early_stopping ends the cat's near 500
        "with_prior_preservation": "True",
        "prior_preservation_mode": "prediction",
        "training_guidance_scale": "1.5",
        "early_stopping": "True",
        "meter_pictures_share": "0.2",  # the start, one turn and the end
        "guidance_scale": "3.5",
        "num_inference_steps": "25",
    }
)
"""The embedded model's own settings, as strings; the published defaults stay what they are. Used by
the demo alone.
"""


def vocabulary() -> dict[str, int]:
    """Return ids by token.

    A model with this vocabulary belongs to the embedded world: fine-tuning, exporting, copying and
    packing keep it.
    """
    content = (WEIGHTS / "tokenizer" / "vocab.json").read_text(encoding="utf-8")
    tokens: dict[str, int] = json.loads(content)
    return tokens
