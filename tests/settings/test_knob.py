from __future__ import annotations

import pytest

from dreambooth.errors import HyperparameterError
from dreambooth.settings.hyperparameters import KNOBS, parse
from dreambooth.settings.knob import BARE_FLAG


def value_of(name: str, raw: object) -> object:
    return getattr(parse({name: raw}).hyperparameters, name)


def faults_of(raw: dict[str, object]) -> tuple[str, ...]:
    with pytest.raises(HyperparameterError) as caught:
        parse(raw)
    assert all(fault in str(caught.value) for fault in caught.value.faults)
    return caught.value.faults


@pytest.mark.parametrize("raw", ["true", "TRUE", "True", "tRue", '"true"', "'True'", True])
def test_booleans_in_any_case(raw: object) -> None:
    assert value_of("center_crop", raw) is True
    assert value_of("gradient_checkpointing", raw) is True


@pytest.mark.parametrize("raw", ["yes", "1", 1, 0, "on", "truee", 1.0, "-", [], {}])
def test_what_is_no_boolean(raw: object) -> None:
    assert "center_crop must be True or False, not" in faults_of({"center_crop": raw})[0]


@pytest.mark.parametrize("raw", ["400", "400.0", "4e2", "+400", "0400", 400, 400.0, '"400"'])
def test_whole_numbers_in_any_spelling(raw: object) -> None:
    assert value_of("max_steps", raw) == 400


@pytest.mark.parametrize(
    "raw",
    ["0", "-1", "1.5", "nan", "inf", "1e400", "abc", "1_000", "0x10", "٤", True, "True", "4 00",
     "9" * 5000, "1e300", [400], {"a": 1}, b"400"],
)  # fmt: skip
def test_what_is_no_number_of_steps(raw: object) -> None:
    (fault,) = faults_of({"max_steps": raw})
    assert fault.startswith("max_steps must be a whole number, at least 1, not ")
    assert len(fault) < 130


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("learning_rate", "0"),
        ("learning_rate", "-2e-06"),
        ("learning_rate", "nan"),
        ("learning_rate", "inf"),
        ("learning_rate", "-Infinity"),
        ("learning_rate", "2e-06x"),
        ("learning_rate", "1_0.5"),
        ("learning_rate", True),
        ("learning_rate", float("nan")),
        ("learning_rate", "1.5"),
        ("prior_loss_weight", "-0.1"),
        ("max_grad_norm", "0"),
        ("adam_beta1", "1"),
        ("adam_beta1", "-0.1"),
        ("adam_beta2", "1.0"),
        ("adam_epsilon", "0"),
        ("adam_weight_decay", "-1"),
        ("checkpointing_minutes", "0"),
        ("resolution", "500"),
        ("resolution", "4096"),
        ("resolution", "56"),
        ("seed", "-1"),
        ("seed", str(2**32)),
        ("num_class_images", "0"),
        ("epochs", "0"),
        ("batch_size", "0"),
        ("gradient_accumulation_steps", "0"),
        ("sample_steps", "-1"),
        ("lr_warmup_steps", "-1"),
        ("lr_scheduler", "Constant"),
        ("lr_scheduler", "constnat"),
        ("mixed_precision", "fp32"),
        ("prior_generation_precision", "float16"),
        ("memory_plan", "small"),
        ("export_precision", "bf16"),
        ("resume", "never"),
        ("prior_preservation_mode", "both"),
        ("sample_prompt", "a\0b"),
        ("sample_prompt", "\ud800"),
        ("sample_prompt", ["a"]),
    ],
)
def test_a_wrong_value_is_reported_with_its_name_and_what_may_stand_there(
    name: str, raw: object
) -> None:
    (fault,) = faults_of({name: raw})
    knob = next(knob for knob in KNOBS if knob.name == name)
    assert fault.startswith(f"{name} must be {knob.values}, not ")


def test_bounds_that_include_their_end() -> None:
    for name, raw in {
        "adam_beta1": "0",
        "prior_loss_weight": "0",
        "resolution": "2048",
        "seed": str(2**32 - 1),
        "learning_rate": "1",
    }.items():
        assert value_of(name, raw) == float(raw)


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        *((raw, "True") for raw in (True, "True", "true", '"true"', "TRUE", BARE_FLAG)),
        *((raw, "False") for raw in (False, "false", "'False'")),
        *((raw, "auto") for raw in ("auto", "", None, '"auto"')),
    ],
)
def test_a_switch_that_may_be_left_to_the_job_is_read_as_a_switch(raw: object, value: str) -> None:
    assert value_of("keep_subjects", raw) == value
    assert faults_of({"keep_subjects": "yes"})


@pytest.mark.parametrize(
    ("raw", "prompt"),
    [
        ('"a photo of a \\"zwx\\" dog"', 'a photo of a "zwx" dog'),
        ("'a photo of zwx dog'", "a photo of zwx dog"),
        ('"so" and "so"', '"so" and "so"'),
        ("a dog's life", "a dog's life"),
        ("true", "true"),
        ("400", "400"),
        ('{"a": 1}', '{"a": 1}'),
        ("ein Foto von 猫 \N{DOG FACE}", "ein Foto von 猫 \N{DOG FACE}"),
        ("[" * 10_000, "[" * 10_000),
    ],
)
def test_prompts_stay_as_they_were_meant(raw: str, prompt: str) -> None:
    assert value_of("sample_prompt", raw) == prompt


def test_endless_values_are_refused_without_being_read() -> None:
    (fault,) = faults_of({"sample_prompt": "x" * 1_000_000})
    assert "1000000 characters" in fault


def test_a_bare_flag_is_true_for_booleans_and_a_fault_elsewhere() -> None:
    assert value_of("center_crop", BARE_FLAG) is True
    assert value_of("use_8bit_adam", BARE_FLAG) is True
    for name in ("max_steps", "learning_rate", "sample_prompt", "resume"):
        (fault,) = faults_of({name: BARE_FLAG})
        assert fault.startswith(f"{name} needs a value: ")


@pytest.mark.parametrize("raw", ["9" * 19, "1" + "0" * 18])
def test_a_number_without_a_bound_of_its_own_has_at_most_18_digits(raw: str) -> None:
    assert value_of("max_steps", "9" * 18) == 10**18 - 1
    assert faults_of({"max_steps": raw})[0].startswith("max_steps must be ")
