"""Broken variables of launchers are one sentence, and sound ones are no fault."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import pytest

from dreambooth.errors import UserError
from dreambooth.job import launcher
from dreambooth.job.run import run_job
from dreambooth.tiny import DATA

TORCHRUN = {
    **{"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
    **{"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
}
ALONE = {**TORCHRUN, "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
COUNTS = (*launcher._COUNTS, *launcher._LOCAL_COUNTS)
NO_NUMBERS = (
    *("abc", "", " ", "2 ", "1.0", "0x2", "two", "²", "\N{FULLWIDTH DIGIT ONE}", "1,2", "1e0"),
    *("None", "+1", "1\n", "1;2", "--1"),
)


@pytest.mark.parametrize("seed", range(40))
def test_a_number_that_is_none_is_one_sentence(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dice = random.Random(seed)
    environ = dict(dice.choice((TORCHRUN, ALONE, MPI, {})))
    name = dice.choice((*COUNTS, *launcher._RANKS))
    digits = ("0", "-1", "9" * 7) if name in COUNTS else ("-2", "9" * 7)
    environ[name] = dice.choice((*NO_NUMBERS, *digits))
    argv = ["--pretrained-model=tiny", f"--train={DATA / 'cat'}", f"--model_dir={tmp_path / 'm'}"]
    dry = dice.choice(([], ["--dry-run"]))
    root = {"SAGEMAKER_BASE_DIR": str(tmp_path / "none")}
    assert run_job([*argv, *dry], {**environ, **root}) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert f"error: The variable {name} is {environ[name]!r}" in line
    assert "torchrun" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"RANK": "2"}, "RANK is '2'"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK is '2'"),
        ({"WORLD_SIZE": "1"}, "RANK is '1'"),
        ({"WORLD_SIZE": None}, "RANK is '1'"),
        ({"WORLD_SIZE": None, "RANK": None}, "LOCAL_RANK is '1'"),
        ({"WORLD_SIZE": None, "RANK": "0", "LOCAL_RANK": "0"}, "WORLD_SIZE is not"),
        *(({name: None}, f"{name} is not set") for name in ("RANK", "LOCAL_RANK", "MASTER_PORT")),
        *(
            ({"MASTER_PORT": port}, f"MASTER_PORT is '{port}'")
            for port in ("0", "65536", "x", "-1")
        ),
        ({"MASTER_PORT": "tcp://10.0.0.1:80"}, "MASTER_PORT is 'tcp://10.0.0.1:80'"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"MASTER_ADDR": "no.such.host.invalid"}, "MASTER_ADDR is 'no.such.host.invalid'"),
        ({"MASTER_ADDR": "http://host"}, "MASTER_ADDR is 'http://host'"),
        ({"MASTER_ADDR": "a" * 70}, "MASTER_ADDR is 'aaa"),
    ],
)
def test_variables_that_do_not_fit_together_are_one_sentence(
    changes: Mapping[str, str | None], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "_NAME_SECONDS", 0.0)
    merged = {**TORCHRUN, **changes}
    environ = {name: value for name, value in merged.items() if value is not None}
    with pytest.raises(UserError, match="torchrun") as caught:
        launcher.refuse_a_lone_process(launcher.read(environ), environ)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("environ", "processes", "is_main"),
    [
        ({}, 1, True),
        (TORCHRUN, 2, False),
        ({**TORCHRUN, "RANK": "0"}, 2, True),
        (ALONE, 1, True),
        ({"LOCAL_RANK": "-1"}, 1, True),  # as JumpStart's default
        ({"RANK": "0", "WORLD_SIZE": "1"}, 1, True),
        ({"MASTER_PORT": "tcp://10.0.0.1:80"}, 1, True),  # a Kubernetes service called master
        ({"LOCAL_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "0"}, 1, True),
    ],
)
def test_sound_variables_are_no_fault(
    environ: Mapping[str, str], processes: int, is_main: bool
) -> None:
    launch = launcher.read(environ)
    launcher.refuse_a_lone_process(launch, environ)
    assert (launch.processes, launch.is_main_process) == (processes, is_main)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_TORCH_DEVICE", "toaster"),
        ("ACCELERATE_USE_DEEPSPEED", "true"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "many"),
        ("ACCELERATE_DEBUG_MODE", "maybe"),
        ("FORK_LAUNCHED", "perhaps"),
    ],
)
def test_what_accelerate_cannot_read_is_one_sentence(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.state import AcceleratorState, PartialState

    before = dict(PartialState._shared_state), dict(AcceleratorState._shared_state)
    AcceleratorState._reset_state(True)
    monkeypatch.setenv(name, value)
    try:
        with pytest.raises(UserError, match=r"cannot be joined \(.*\): check the variables"):
            launcher.join(launcher.read({}), on_cpu=True)
    finally:
        AcceleratorState._reset_state(True)
        PartialState._shared_state.update(before[0])
        AcceleratorState._shared_state.update(before[1])
