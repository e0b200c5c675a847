from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from dreambooth.errors import HyperparameterError
from dreambooth.settings import studio_options
from dreambooth.settings.studio_options import PASSWORD, StudioSettings

GOOD = "correct horse battery"


def read(*words: str, **environ: str) -> StudioSettings:
    parser = argparse.ArgumentParser()
    studio_options.add_arguments(parser)
    return studio_options.read(parser.parse_args(words), environ)


def test_the_defaults_reach_this_machine_alone() -> None:
    assert read() == StudioSettings()
    assert StudioSettings().host == "127.0.0.1"
    given = read("--port", "0", "--dir", "x/y", "--model", "tiny", "--host", "::1")
    assert given == StudioSettings(port=0, dir=Path("x/y"), model="tiny", host="::1")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "box.example", "127.0.0.1.x"])
def test_another_address_needs_a_password(host: str) -> None:
    with pytest.raises(HyperparameterError, match=f"set a password in {PASSWORD}"):
        read("--host", host)
    given = read("--host", host, **{PASSWORD: GOOD})
    assert (given.host, given.password) == (host, GOOD)
    assert GOOD not in repr(given)


def test_a_short_password_is_none() -> None:
    for host in ("127.0.0.1", "0.0.0.0"):
        with pytest.raises(HyperparameterError, match="take at least 12"):
            read("--host", host, **{PASSWORD: "short"})


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(HyperparameterError) as caught:
        read("--port", "70000", "--host", "0.0.0.0")
    assert len(caught.value.faults) == 2
