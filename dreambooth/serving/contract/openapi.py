"""Read the server's OpenAPI 3.1 document: `openapi.json`, which its test holds against the code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dreambooth import __version__


def document() -> dict[str, Any]:
    """Return the document, with the package's version in it."""
    found: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))
    found["info"]["version"] = __version__
    return found
