from __future__ import annotations

from dreambooth.serving.supervision.restart_policy import backoff_s


def test_the_first_restart_is_at_once_and_the_others_wait_longer_and_longer() -> None:
    assert [backoff_s(failed_starts) for failed_starts in range(4)] == [0.0, 0.0, 0.25, 0.5]
    pauses = [backoff_s(failed_starts) for failed_starts in range(100)]
    assert pauses == sorted(pauses)
    assert pauses[-1] == 8.0
