"""The embedded default model: where it and its data sets lie, and the settings that suit it.

Standard library only: whoever wants a path must not pay for torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

WEIGHTS = Path(__file__).parent / "weights"
DATA = Path(__file__).parent / "data"

DEFAULTS: Mapping[str, str] = MappingProxyType(
    {
        "learning_rate": "0.0001",
        "max_steps": "400",
        "guidance_scale": "3.5",
        "num_inference_steps": "25",
    }
)
"""The embedded model's own settings, as strings; the published defaults stay what they are. Used by
the demo alone.
"""
