from __future__ import annotations

import dataclasses
import inspect
import itertools
import re

import pytest

from dreambooth import limits
from dreambooth.limits import LIMITS, Limits


def test_every_cap_is_positive_and_frozen() -> None:
    for cap in dataclasses.fields(Limits):
        assert getattr(LIMITS, cap.name) > 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        LIMITS.max_image_pixels = 1  # type: ignore[misc]


def test_every_cap_has_its_reason() -> None:
    lines = inspect.getsource(limits.Limits).splitlines()
    for above, line in itertools.pairwise(lines):
        if re.match(r"    \w+: (int|float) = ", line):
            assert above.lstrip().startswith("#"), f"{line.strip()} has no reason above it"
