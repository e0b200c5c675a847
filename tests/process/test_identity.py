from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace

import pytest

from dreambooth.process.identity import ProcessIdentity


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def test_a_signal_reaches_the_process_that_is_meant(sleeper: subprocess.Popen[bytes]) -> None:
    identity = ProcessIdentity.of(sleeper.pid)
    assert identity.start_time.isdecimal()
    assert ProcessIdentity.from_json(identity.as_json()) == identity
    assert identity.is_running
    assert identity.send(signal.SIGTERM)
    assert sleeper.wait(10) == -signal.SIGTERM
    assert not identity.is_running
    assert not identity.send(signal.SIGTERM)


@pytest.mark.parametrize(
    "change", [{"start_time": "1"}, {"boot_id": "another"}, {"start_time": ""}]
)
@pytest.mark.parametrize("with_handles", [True, False])
def test_a_stranger_with_the_same_id_is_never_sent_anything(
    sleeper: subprocess.Popen[bytes],
    change: dict[str, str],
    with_handles: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not with_handles:
        monkeypatch.delattr(os, "pidfd_open")
    former = replace(ProcessIdentity.of(sleeper.pid), **change)
    assert not former.is_running
    assert not former.send(signal.SIGKILL)
    with pytest.raises(subprocess.TimeoutExpired):
        sleeper.wait(0.1)


def test_without_handles_the_process_itself_is_still_reached(
    sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "pidfd_open")
    assert ProcessIdentity.of(sleeper.pid).send(signal.SIGTERM)
    assert sleeper.wait(10) == -signal.SIGTERM


@pytest.mark.parametrize("pid", [0, -1, 2**31, True, "7", None])
def test_ids_that_name_no_single_process_are_no_identity(pid: object) -> None:
    assert ProcessIdentity.from_json({"pid": pid}) is None
