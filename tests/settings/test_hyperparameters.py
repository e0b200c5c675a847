from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dreambooth.errors import HyperparameterError
from dreambooth.settings import (
    container,
    generate_options,
    hyperparameter_text,
    hyperparameters,
    serve_options,
)
from dreambooth.settings.hyperparameters import KNOBS, Hyperparameters, parse
from dreambooth.settings.hyperparameters import PUBLISHED as PUBLISHED_ORIGIN

# Names and defaults as the article's retrieve_default() prints them, and compute_fid.
PUBLISHED = {
    "with_prior_preservation": "False",
    "num_class_images": "100",
    "epochs": "20",
    "max_steps": "None",
    "batch_size": "1",
    "learning_rate": "2e-06",
    "prior_loss_weight": "1.0",
    "center_crop": "False",
    "lr_scheduler": "constant",
    "adam_weight_decay": "0.01",
    "adam_beta1": "0.9",
    "adam_beta2": "0.999",
    "adam_epsilon": "1e-08",
    "gradient_accumulation_steps": "1",
    "max_grad_norm": "1.0",
    "seed": "0",
    "compute_fid": "False",
}
ACCEPTED = {
    "train_text_encoder": "False",
    "gradient_checkpointing": "None",
    "use_8bit_adam": "None",
    "mixed_precision": "None",
    "prior_generation_precision": "None",
    "lr_warmup_steps": "None",
    "class_data_dir": "class_data_dir",
}
OURS = {
    "pretrained_model": "None",
    "prediction_type": "None",
    "base": "None",
    "resolution": "None",
    "checkpointing_steps": "None",
    "checkpointing_minutes": "None",
    "checkpoints_total_limit": "1",
    "keep_last_checkpoint": "False",
    "resume": "auto",
    "sample_steps": "0",
    "sample_prompt": "None",
    "memory_plan": "auto",
    "export_precision": "fp32",
    "export_single_file": "False",
    "compute_scores": "False",
    "masked_loss": "False",
    "meter": "True",
    "meter_pictures_share": "0.15",
    "early_stopping": "False",
    "keep_states": "2",
    "fid_features": "None",
    "deterministic": "False",
    "prior_preservation_mode": "images",
    "training_guidance_scale": "1.0",
    "keep_subjects": "auto",
    "fast_step": "False",
    "processes": "auto",
}
# For every knob a value other than its default, and how a user would type it.
OFF_DEFAULT: dict[str, tuple[str, object]] = {
    "with_prior_preservation": ("True", True),
    "num_class_images": ("7", 7),
    "epochs": ("3", 3),
    "max_steps": ("400", 400),
    "batch_size": ("2", 2),
    "learning_rate": ("1.9e-06", 1.9e-06),
    "prior_loss_weight": ("0.5", 0.5),
    "center_crop": ("True", True),
    "lr_scheduler": ("cosine", "cosine"),
    "adam_weight_decay": ("0.02", 0.02),
    "adam_beta1": ("0.8", 0.8),
    "adam_beta2": ("0.99", 0.99),
    "adam_epsilon": ("1e-06", 1e-06),
    "gradient_accumulation_steps": ("4", 4),
    "max_grad_norm": ("0.3", 0.3),
    "seed": ("41", 41),
    "compute_fid": ("True", True),
    "train_text_encoder": ("True", True),
    "gradient_checkpointing": ("False", False),
    "use_8bit_adam": ("True", True),
    "mixed_precision": ("bf16", "bf16"),
    "prior_generation_precision": ("fp16", "fp16"),
    "lr_warmup_steps": ("0", 0),
    "class_data_dir": ("cats", "cats"),
    "pretrained_model": ("tiny", "tiny"),
    "prediction_type": ("v_prediction", "v_prediction"),
    "base": ("tiny", "tiny"),
    "resolution": ("256", 256),
    "checkpointing_steps": ("50", 50),
    "checkpointing_minutes": ("2.5", 2.5),
    "checkpoints_total_limit": ("3", 3),
    "keep_last_checkpoint": ("True", True),
    "resume": ("fresh", "fresh"),
    "sample_steps": ("100", 100),
    "sample_prompt": ("a photo of a zwx dog", "a photo of a zwx dog"),
    "memory_plan": ("8bit_adamw", "8bit_adamw"),
    "export_precision": ("fp16", "fp16"),
    "export_single_file": ("True", True),
    "compute_scores": ("True", True),
    "masked_loss": ("True", True),
    "meter": ("False", False),
    "meter_pictures_share": ("0.5", 0.5),
    "early_stopping": ("True", True),
    "keep_states": ("3", 3),
    "fid_features": ("models/dinov2-base", "models/dinov2-base"),
    "deterministic": ("True", True),
    "prior_preservation_mode": ("prediction", "prediction"),
    "training_guidance_scale": ("2.5", 2.5),
    "keep_subjects": ("true", "True"),
    "fast_step": ("True", True),
    "processes": ("2", "2"),
}


def value_of(name: str, raw: object) -> object:
    return getattr(parse({name: raw}).hyperparameters, name)


def faults_of(raw: dict[str, object]) -> tuple[str, ...]:
    with pytest.raises(HyperparameterError) as caught:
        parse(raw)
    assert all(fault in str(caught.value) for fault in caught.value.faults)
    return caught.value.faults


def test_names_order_and_defaults_are_the_published_ones() -> None:
    assert list(hyperparameter_text.defaults().items()) == [
        *PUBLISHED.items(),
        *ACCEPTED.items(),
        *OURS.items(),
    ]
    assert [knob.name for knob in KNOBS if knob.origin == PUBLISHED_ORIGIN] == list(PUBLISHED)


def test_defaults_parse_to_themselves() -> None:
    assert parse({}).hyperparameters == Hyperparameters()
    assert parse(hyperparameter_text.defaults()).hyperparameters == Hyperparameters()
    assert parse(dataclasses.asdict(Hyperparameters())).hyperparameters == Hyperparameters()


@pytest.mark.parametrize("name", OFF_DEFAULT)
def test_every_knob_arrives_in_every_encoding(name: str) -> None:
    text, value = OFF_DEFAULT[name]
    prior = {"with_prior_preservation": "True"}
    context = {
        "prior_preservation_mode": prior,
        "training_guidance_scale": {**prior, "prior_preservation_mode": "prediction"},
    }.get(name, {})
    encodings = {
        "str() of the SDK": text,
        "JSON of str()": json.dumps(text),
        "JSON of the Python value": json.dumps(value),
        "the Python value": value,
        "extra single quotes": f"'{text}'",
        "JSON of single quotes": json.dumps(f"'{text}'"),
        "blanks around": f"  {text} ",
    }
    for encoding, raw in encodings.items():
        parsed = parse({**context, name: raw})
        assert getattr(parsed.hyperparameters, name) == value, encoding
        assert type(getattr(parsed.hyperparameters, name)) is type(value), encoding
        assert parsed.warnings == ()


@pytest.mark.parametrize("name", OFF_DEFAULT)
@pytest.mark.parametrize("unset", ["", '""', "''", "None", "null", '"None"', None])
def test_unset_means_the_default_for_every_type(name: str, unset: str | None) -> None:
    assert value_of(name, unset) == getattr(Hyperparameters(), name)


def test_every_knob_is_tested_off_its_default() -> None:
    assert list(OFF_DEFAULT) == [knob.name for knob in KNOBS]
    for name, (_, value) in OFF_DEFAULT.items():
        assert value != getattr(Hyperparameters(), name)


def test_every_wrong_value_is_reported_at_once() -> None:
    faults = faults_of(
        {
            "max_steps": '"many"',
            "learning_rate": "-1",
            "lr_scheduler": "step",
            "prior_preservation_mode": "prediction",
            "center_crop": "perhaps",
            "memory_plan": "fp32_adamw",
            "use_8bit_adam": "True",
        }
    )
    assert [fault.split()[0].split("=")[0] for fault in faults] == [
        "max_steps",
        "learning_rate",
        "lr_scheduler",
        "center_crop",
        "prior_preservation_mode",
        "memory_plan",
    ]


def test_a_memory_plan_that_is_gone_names_the_nearest_one() -> None:
    (fault,) = faults_of({"memory_plan": '"8bit_adamw_stochastic_rounding"'})
    assert fault.startswith("memory_plan=8bit_adamw_stochastic_rounding is gone: ")
    assert fault.endswith("the nearest plan is 8bit_adamw_in_backward.")


@pytest.mark.parametrize(
    ("plan", "knob", "value", "fits"),
    [
        ("fp32_adamw", "use_8bit_adam", "True", False),
        ("fp32_adamw", "use_8bit_adam", "False", True),
        ("fp32_adamw", "gradient_checkpointing", "True", False),
        ("8bit_adamw", "use_8bit_adam", "False", False),
        ("8bit_adamw", "gradient_checkpointing", "False", True),
        ("8bit_adamw_checkpointing", "gradient_checkpointing", "False", False),
        ("8bit_adamw_checkpointing", "use_8bit_adam", "True", True),
        ("8bit_adamw_in_backward", "gradient_checkpointing", "False", False),
        ("8bit_adamw_in_backward", "gradient_accumulation_steps", "2", False),
        ("8bit_adamw_in_backward", "mixed_precision", "fp16", True),
        ("8bit_adamw_checkpointing", "gradient_accumulation_steps", "2", True),
        ("auto", "gradient_checkpointing", "True", True),
    ],
)
def test_a_memory_plan_may_not_contradict_what_it_fixes(
    plan: str, knob: str, value: str, fits: bool
) -> None:
    raw: dict[str, object] = {"memory_plan": plan, knob: value}
    if fits:
        parse(raw)
    else:
        (fault,) = faults_of(raw)
        assert plan in fault
        assert knob in fault


@pytest.mark.parametrize(
    ("knob", "value", "fits"),
    [
        ("train_text_encoder", "True", False),
        ("gradient_accumulation_steps", "2", False),
        ("gradient_checkpointing", "True", False),
        ("gradient_checkpointing", "False", True),
        ("mixed_precision", "no", False),
        ("mixed_precision", "fp16", True),
        ("memory_plan", "8bit_adamw_checkpointing", False),
        ("memory_plan", "8bit_adamw_in_backward", False),
        ("memory_plan", "8bit_adamw", True),
        ("use_8bit_adam", "True", True),
    ],
)
def test_the_fast_step_refuses_what_it_does_not_go_with(knob: str, value: str, fits: bool) -> None:
    raw: dict[str, object] = {"fast_step": "True", knob: value}
    if fits:
        parse(raw)
    else:
        (fault,) = faults_of(raw)
        assert f"fast_step does not go with {knob}={value}" in fault
        parse({knob: value})


def test_prediction_mode_needs_prior_preservation() -> None:
    (fault,) = faults_of({"prior_preservation_mode": "prediction"})
    assert "with_prior_preservation=True" in fault
    parse({"prior_preservation_mode": "prediction", "with_prior_preservation": "true"})


def test_training_for_guidance_needs_prediction_mode() -> None:
    for mode in ({}, {"with_prior_preservation": "True"}):
        (fault,) = faults_of({"training_guidance_scale": "2", **mode})
        assert "prior_preservation_mode=prediction" in fault
    assert "1" in faults_of({"training_guidance_scale": "0.5"})[0]


def test_a_contradiction_with_a_wrong_value_is_not_told_twice() -> None:
    faults = faults_of(
        {"prior_preservation_mode": "prediction", "with_prior_preservation": "maybe"}
    )
    assert len(faults) == 1


def test_unknown_names_are_warned_of_with_the_nearest_one() -> None:
    parsed = parse({"max_step": "5", "zzz": "1", "x" * 5000: 1})

    assert parsed.hyperparameters == Hyperparameters()
    assert "'max_step'" in parsed.warnings[0]
    assert "Did you mean max_steps?" in parsed.warnings[0]
    assert "mean" not in parsed.warnings[1]
    assert max(map(len, parsed.warnings)) < 200


def test_what_the_sdk_adds_is_set_aside_silently() -> None:
    names = (
        "sagemaker_program",
        "sagemaker_submit_directory",
        "sagemaker_container_log_level",
        "_tuning_objective_metric",
        "local_rank",
        "--local-rank",
        "scale_lr",
    )
    parsed = parse({name: '"x"' for name in names})

    assert parsed.warnings == ()
    assert parsed.hyperparameters == Hyperparameters()


def test_a_tuners_mixture() -> None:
    parsed = parse(
        {
            "max_steps": "213",
            "learning_rate": "1.9e-06",
            "with_prior_preservation": '"False"',
            "lr_scheduler": '"constant"',
            "compute_fid": '"True"',
            "_tuning_objective_metric": "fid_score",
        }
    )
    assert parsed.hyperparameters == Hyperparameters(
        max_steps=213, learning_rate=1.9e-06, compute_fid=True
    )


def test_dashes_in_names() -> None:
    assert parse({"max-steps": "3", "--batch-size": "2"}).hyperparameters == Hyperparameters(
        max_steps=3, batch_size=2
    )


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([knob.name for knob in KNOBS]) | st.text(),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=4,
        ),
    )
)
def test_whatever_is_sent_gives_settings_or_one_error(raw: dict[str, object]) -> None:
    with contextlib.suppress(HyperparameterError):
        parsed = parse(raw)
        assert list(hyperparameter_text.as_strings(parsed.hyperparameters)) == list(OFF_DEFAULT)


def test_sentences_are_short_and_whole() -> None:
    for knob in (*KNOBS, *container.OPTIONS, *serve_options.KNOBS, *generate_options.KNOBS):
        assert len(knob.sentence) < 160
        assert knob.sentence.endswith(".")


def test_the_ground_floor_imports_the_standard_library_alone() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(hyperparameters.__file__).parents[2])!r})\n"
        "from dreambooth import errors, limits\n"
        "from dreambooth.model_folder import archives, tar_stream\n"
        "from dreambooth.process import failure, progress\n"
        "from dreambooth.settings import container, hyperparameter_text, hyperparameters, knob\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    loaded = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    foreign = set(loaded) - set(sys.stdlib_module_names) - {"dreambooth"}
    assert not {name for name in foreign if not name.startswith("_")} - {"sitecustomize"}
