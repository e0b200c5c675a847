from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def samples_of_two_steps() -> Iterator[None]:
    """Draw sample pictures in 2 steps of 25: every job draws one, and most tests look at none.

    For compute_scores draw 2 pictures of 2 steps, of 8 and 50.
    """
    if "torch" not in sys.modules:  # then no test here trains
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dreambooth.job.previews.NUM_INFERENCE_STEPS", 2)
        patch.setattr("dreambooth.job.scoring.SCORED_STEPS", 2)
        patch.setattr("dreambooth.job.scoring.SCORED_PICTURES", 2)
        yield
