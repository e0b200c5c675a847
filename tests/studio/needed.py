"""Imports what `make test-studio` installs."""

from __future__ import annotations

import os
from typing import Any

import pytest


def needed(module: str) -> Any:
    """Import a module; without it, the test is left out, but not by `make test-studio`."""
    if os.environ.get("DREAMBOOTH_STUDIO_TESTS"):
        return __import__(module, fromlist=["x"])
    return pytest.importorskip(module, reason=f"{module} is installed by `make test-studio`")
