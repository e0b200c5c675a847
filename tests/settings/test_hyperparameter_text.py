from __future__ import annotations

import json

from dreambooth.settings import command_line, hyperparameter_text
from dreambooth.settings.hyperparameters import KNOBS, PUBLISHED, Hyperparameters, parse


def test_options_of_argparse_in_both_spellings() -> None:
    parser = command_line.Parser()
    command_line.add_arguments(parser, KNOBS)

    raw = vars(parser.parse_args(["--max-steps", "4", "--batch_size=2", "--center-crop"]))

    assert list(raw) == ["max_steps", "batch_size", "center_crop"]
    assert parse(raw).hyperparameters == Hyperparameters(
        max_steps=4, batch_size=2, center_crop=True
    )
    for knob in KNOBS:
        assert f"--{knob.name} " in parser.format_help()


def test_json_is_one_flat_object_of_the_defaults() -> None:
    assert json.loads(hyperparameter_text.as_json()) == hyperparameter_text.defaults()
    changed = Hyperparameters(max_steps=4)
    assert json.loads(hyperparameter_text.as_json(changed))["max_steps"] == "4"
    assert parse(json.loads(hyperparameter_text.as_json(changed))).hyperparameters == changed


def test_markdown_has_one_row_per_knob() -> None:
    header, rule, *rows = hyperparameter_text.as_markdown().splitlines()

    assert header.count("|") == rule.count("|") == 6
    assert len(rows) == len(KNOBS)
    for knob, row in zip(KNOBS, rows, strict=True):
        assert row.count("|") == 6
        assert f"`{knob.name}`" in row
        assert f"`{knob.default}`" in row
        assert ("✓" in row) == (knob.origin == PUBLISHED)


def test_text_names_every_knob_and_value() -> None:
    text = hyperparameter_text.as_text()
    for knob in KNOBS:
        assert f"{knob.name} = {knob.default}" in text
        assert knob.values in text
