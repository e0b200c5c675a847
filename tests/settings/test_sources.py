from __future__ import annotations

import pytest

from dreambooth.limits import LIMITS
from dreambooth.settings import sources
from dreambooth.settings.knob import BARE_FLAG, Knob


def test_arguments_keep_every_name_and_tell_stray_words() -> None:
    faults: list[str] = []
    argv = ["--max-steps", "-1", "--x=a=b", "stray", "--flag", "--dry-run", "folder"]
    assert sources.from_arguments(argv, faults) == {
        "max_steps": "-1",
        "x": "a=b",
        "flag": BARE_FLAG,
        "dry_run": BARE_FLAG,
    }
    assert [fault.split("'")[1] for fault in faults] == ["stray", "folder"]


def test_single_variables_count_more_than_the_whole() -> None:
    faults: list[str] = []
    environ = {"SM_HP_SEED": "2", "SM_HPS": '{"seed": 1, "max-steps": 3}', "SM_OTHER": "x"}
    found = sources.from_variables(environ, faults, LIMITS)
    assert found == {"seed": "2", "max_steps": "3"}
    assert faults == []


@pytest.mark.parametrize(
    ("text", "level"),
    [("10", "debug"), ("50", "critical"), ("Info", "info"), ("60", None), ("", None)],
)
def test_levels(text: str, level: str | None) -> None:
    assert sources.level_of(text) == level


def test_the_platform_stands_between_the_users_variables_and_the_file() -> None:
    faults: list[str] = []
    environ = {"SM_MODEL_DIR": "/platform"}
    rows = {"train": (), "model_dir": ("SM_MODEL_DIR",), "checkpoint_dir": ()}
    knobs = [
        Knob(name=name, kind="str", default=None, sentence="", variables=variables)
        for name, variables in rows.items()
    ]
    chosen = sources.OptionValues(
        *(knobs, {}, {"train": "/hp"}, environ, {"model_dir": "/file"}, faults), in_container=False
    )
    assert chosen.value("model_dir") == "/platform"
    assert chosen.is_platforms("model_dir")
    assert chosen.value("train") == "/hp"
    assert not chosen.is_platforms("train")
    assert chosen.value("checkpoint_dir") is None
    assert faults == []
