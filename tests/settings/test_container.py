from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dreambooth.errors import HyperparameterError
from dreambooth.process import failure
from dreambooth.settings import container, sources
from dreambooth.settings.container import Environment
from dreambooth.settings.hyperparameters import KNOBS, Hyperparameters, parse
from dreambooth.settings.ways_in import WaysIn


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a container's /opt/ml as SageMaker makes it, without channels."""
    (tmp_path / "ml" / "input" / "config").mkdir(parents=True)
    return tmp_path / "ml"


def write_settings(root: Path, settings: object) -> Path:
    path = root / "input" / "config" / "hyperparameters.json"
    path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return path


def read(root: Path, *argv: str, **variables: str) -> Environment:
    return container.read(argv, {"SAGEMAKER_BASE_DIR": str(root), **variables})


def settings_of(environment: Environment) -> Hyperparameters:
    return parse(environment.settings).hyperparameters


def faults_of(root: Path, *argv: str, **variables: str) -> tuple[str, ...]:
    with pytest.raises(HyperparameterError) as caught:
        read(root, *argv, **variables)
    return caught.value.faults


def test_the_default_root_is_sagemakers() -> None:
    assert container.failure_file({}) == Path("/opt/ml/output/failure")
    assert container.read([], {}).training == Path("/opt/ml/input/data/training")


def test_paths_in_a_container(root: Path) -> None:
    (root / "input" / "data" / "model").mkdir(parents=True)
    (root / "checkpoints").mkdir()

    assert read(root) == Environment(
        root=root,
        training=root / "input" / "data" / "training",
        model_channel=root / "input" / "data" / "model",
        model_dir=root / "model",
        output_data_dir=root / "output" / "data",
        failure_file=root / "output" / "failure",
        checkpoint_dir=root / "checkpoints",
        settings={},
        dry_run=False,
        log_level="info",
        ways_in=WaysIn(
            ways=dict.fromkeys((*sources.OUTPUTS, "train", "model"), "platform"),
            channels=("model",),
        ),
    )


def test_channels_and_checkpoints_that_are_not_there_are_none(root: Path) -> None:
    environment = read(root)

    assert environment.model_channel is None
    assert environment.checkpoint_dir is None


def test_paths_in_script_mode(tmp_path: Path) -> None:
    environment = read(
        tmp_path,
        SM_CHANNEL_TRAINING="/data/pictures",
        SM_CHANNEL_MODEL="/data/base",
        SM_MODEL_DIR="/data/model",
        SM_OUTPUT_DATA_DIR="/data/extras",
        SM_NUM_GPUS="1",
        SM_LOG_LEVEL="10",
    )

    assert environment.training == Path("/data/pictures")
    assert environment.model_channel == Path("/data/base")
    assert environment.model_dir == Path("/data/model")
    assert environment.output_data_dir == Path("/data/extras")
    assert environment.log_level == "debug"


def test_script_mode_without_an_output_variable_uses_the_root(tmp_path: Path) -> None:
    environment = read(tmp_path, SM_MODEL_DIR="/data/model")
    assert environment.output_data_dir == tmp_path / "output" / "data"


def test_arguments_win_over_variables_and_files(root: Path) -> None:
    (root / "checkpoints").mkdir()
    write_settings(root, {"max_steps": "1", "seed": "1", "epochs": "1", "batch_size": "1"})

    environment = read(
        root,
        "--train=/a/pictures",
        "--model-dir",
        "/a/model",
        "--output_data_dir",
        "/a/output",
        "--checkpoint-dir=/a/checkpoints",
        "--max-steps",
        "4",
        SM_CHANNEL_TRAINING="/v/pictures",
        SM_MODEL_DIR="/v/model",
        SM_OUTPUT_DATA_DIR="/v/output",
        SM_HPS='{"max_steps": 2, "seed": 2, "epochs": "2"}',
        SM_HP_MAX_STEPS="3",
        SM_HP_SEED="3",
    )

    assert environment.training == Path("/a/pictures")
    assert environment.model_dir == Path("/a/model")
    assert environment.output_data_dir == Path("/a/output")
    assert environment.checkpoint_dir == Path("/a/checkpoints")
    assert settings_of(environment) == Hyperparameters(max_steps=4, seed=3, epochs=2, batch_size=1)


def test_outside_a_container_extras_lie_beside_the_model(tmp_path: Path) -> None:
    outside = tmp_path / "not-there"

    environment = read(outside, "--train", "cat", "--model_dir", "out/model/")

    assert environment.model_dir == Path("out/model")
    assert environment.output_data_dir == Path("out/model-output")
    assert environment.failure_file == outside / "output" / "failure"
    here = read(outside, "--model_dir", ".").output_data_dir
    assert here == Path(f"{Path.cwd()}-output")


def test_reading_makes_nothing(tmp_path: Path) -> None:
    read(tmp_path / "ml", "--model_dir", str(tmp_path / "model"))
    assert list(tmp_path.iterdir()) == []


def test_home_is_expanded(tmp_path: Path) -> None:
    assert read(tmp_path, "--train=~/cat").training == Path.home() / "cat"


def test_empty_paths_mean_the_default(root: Path) -> None:
    assert read(root, "--train", "", SM_CHANNEL_TRAINING="").training == read(root).training


def test_the_model_is_a_setting(root: Path) -> None:
    assert settings_of(read(root, "--pretrained-model", "tiny")).pretrained_model == "tiny"
    write_settings(root, {"pretrained_model": '"hub/model"'})
    assert settings_of(read(root)).pretrained_model == "hub/model"


SDK_FILES: dict[str, Mapping[str, str]] = {
    "with source_dir": {
        "max_steps": '"400"',
        "learning_rate": '"1e-06"',
        "with_prior_preservation": '"True"',
        "lr_scheduler": '"cosine"',
        "sagemaker_submit_directory": '"s3://bucket/sourcedir.tar.gz"',
        "sagemaker_program": '"transfer_learning.py"',
        "sagemaker_container_log_level": "20",
        "sagemaker_job_name": '"job"',
        "sagemaker_region": '"us-east-1"',
    },
    "with source_dir, Python values": {
        "max_steps": "400",
        "learning_rate": "1e-06",
        "with_prior_preservation": "true",
        "lr_scheduler": '"cosine"',
        "mixed_precision": "null",
    },
    "without source_dir": {
        "max_steps": "400",
        "learning_rate": "1e-06",
        "with_prior_preservation": "True",
        "lr_scheduler": "cosine",
        "mixed_precision": "None",
    },
    "a tuner": {
        "max_steps": "400",
        "learning_rate": "1e-06",
        "with_prior_preservation": '"True"',
        "lr_scheduler": '"cosine"',
        "_tuning_objective_metric": "fid_score",
    },
    "extra single quotes": {
        "max_steps": "'400'",
        "learning_rate": "\"'1e-06'\"",
        "with_prior_preservation": "'True'",
        "lr_scheduler": "'cosine'",
        "center_crop": "",
    },
}


@pytest.mark.parametrize("client", SDK_FILES)
def test_hyperparameters_json_of_every_client(root: Path, client: str) -> None:
    write_settings(root, SDK_FILES[client])

    parsed = parse(read(root).settings)

    assert parsed.warnings == ()
    assert parsed.hyperparameters == Hyperparameters(
        max_steps=400, learning_rate=1e-06, with_prior_preservation=True, lr_scheduler="cosine"
    )


def test_typed_json_values_keep_every_digit(root: Path) -> None:
    write_settings(root, '\ufeff{"learning_rate": 1.9e-06, "seed": 7, "max_steps": null}')
    assert settings_of(read(root)) == Hyperparameters(learning_rate=1.9e-06, seed=7)

    write_settings(root, '{"seed": ' + "9" * 10_000 + ', "learning_rate": NaN}')
    with pytest.raises(HyperparameterError, match=r"seed.*learning_rate must be"):
        parse(read(root).settings)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{'max_steps': 4}", "is not valid JSON (line 1)."),
        ("", "is not valid JSON (line 1)."),
        ("[1, 2]", "must hold one JSON object"),
        ("[" * 200_000, "is not valid JSON"),
        ('{"a": "' + "x" * 5_000_000 + '"}', "is longer than 4194304 bytes."),
    ],
)
def test_a_malformed_file_is_one_sentence(root: Path, content: str, told: str) -> None:
    path = write_settings(root, content)
    (fault,) = faults_of(root)
    assert fault.startswith(f"The file {path} ")
    assert told in fault


def test_a_file_that_is_no_text_or_no_file(root: Path) -> None:
    path = root / "input" / "config" / "hyperparameters.json"
    path.write_bytes(b'{"a": "\xff"}')
    assert faults_of(root) == (f"The file {path} is not UTF-8 text.",)
    path.unlink()
    os.mkfifo(path)
    assert faults_of(root) == (f"The file {path} is not a regular file.",)


def test_malformed_variables_are_reported(root: Path) -> None:
    (fault,) = faults_of(root, SM_HPS="{")
    assert fault == "The variable SM_HPS is not valid JSON (line 1)."


def test_all_faults_of_a_job_are_reported_at_once(root: Path) -> None:
    write_settings(root, {"learning_rate": "-1", "resume": "perhaps"})

    faults = faults_of(
        root, "stray", "--max_steps", "x", "--train", "--log_level", "loud", SM_HPS="[]"
    )

    for told in (
        "'stray'",
        "train needs a value: ",
        "log_level must",
        "SM_HPS",
        "learning_rate",
        "resume",
    ):
        assert any(told in fault for fault in faults), told
    assert any(fault.startswith("max_steps must") for fault in faults)
    assert len(faults) == 7


def test_options_in_every_spelling(root: Path) -> None:
    environment = read(
        root,
        "--max_steps=4",
        "--batch-size",
        "2",
        "--center_crop",
        "--with-prior-preservation",
        "true",
        "--sample_prompt=a=b --c",
        "--learning_rate",
        "1e-6",
        "--compute_fid",
        "False",
        "--deterministic",
    )
    assert settings_of(environment) == Hyperparameters(
        max_steps=4,
        batch_size=2,
        center_crop=True,
        with_prior_preservation=True,
        sample_prompt="a=b --c",
        learning_rate=1e-06,
        deterministic=True,
    )


def test_negative_numbers_are_values(root: Path) -> None:
    with pytest.raises(HyperparameterError, match="learning_rate must be a number, above 0"):
        parse(read(root, "--learning_rate", "-1e-6").settings)


def test_the_last_of_two_equal_options_counts(root: Path) -> None:
    assert settings_of(read(root, "--max_steps", "1", "--max-steps=2")).max_steps == 2


def test_unknown_options_reach_the_parser_as_unknown_settings(root: Path) -> None:
    environment = read(root, "--x", "v", "--y=w", "--z", "--max_stepz", "3", "--bare-last")

    assert environment.settings == {
        "x": "v",
        "y": "w",
        "z": environment.settings["z"],
        "max_stepz": "3",
        "bare_last": environment.settings["bare_last"],
    }
    parsed = parse(environment.settings)
    assert parsed.hyperparameters == Hyperparameters()
    assert len(parsed.warnings) == 5
    assert "Did you mean max_steps?" in parsed.warnings[3]


@pytest.mark.parametrize("stray", ["train", "-x", "--", "--1", ""])
def test_words_that_belong_to_no_option_are_faults(root: Path, stray: str) -> None:
    (fault,) = faults_of(root, stray)
    assert repr(stray) in fault


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(["--train", "--max_steps", "--x=", "-1", "--dry-run"]) | st.text()),
    st.dictionaries(st.sampled_from(["SM_HPS", "SM_HP_SEED", "SM_NUM_GPUS"]), st.text()),
)
def test_whatever_is_called_gives_an_environment_or_one_error(
    argv: list[str], variables: dict[str, str]
) -> None:
    argv = [word for word in argv if word not in ("-h", "--help")]
    told = ""
    try:
        container.read(argv, {"SAGEMAKER_BASE_DIR": "/none", **variables})
    except HyperparameterError as error:
        told = failure.describe_failure(error)
    assert len(told.encode()) <= 1024


@pytest.mark.parametrize(
    ("argv", "dry"),
    [
        (["--dry-run"], True),
        (["--dry_run"], True),
        (["--dry-run", "True"], True),
        (["--dry-run=false"], False),
        (["--dry-run", "--max_steps", "3"], True),
        ([], False),
    ],
)
def test_dry_run(root: Path, argv: list[str], dry: bool) -> None:
    assert read(root, *argv).dry_run is dry


def test_a_dry_run_takes_no_other_word(root: Path) -> None:
    assert "'folder'" in faults_of(root, "--dry-run", "folder")[0]
    assert "dry_run must be" in faults_of(root, "--dry-run=folder")[0]


@pytest.mark.parametrize(
    ("argv", "variables", "level"),
    [
        (["--log_level", "DEBUG"], {}, "debug"),
        (["--log-level=40"], {}, "error"),
        (["--log_level", "warning"], {"SM_LOG_LEVEL": "10"}, "warning"),
        ([], {"SM_LOG_LEVEL": "20"}, "info"),
        ([], {"SM_LOG_LEVEL": "nonsense"}, "info"),
    ],
)
def test_log_levels(root: Path, argv: list[str], variables: dict[str, str], level: str) -> None:
    assert read(root, *argv, **variables).log_level == level


def test_help_names_every_option_and_ends_well(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        read(root, "--max_steps", "nonsense", "--help")
    assert end.value.code == 0
    told = capsys.readouterr().out
    for knob in KNOBS:
        assert f"--{knob.name} " in told
    for option in ("--train", "--model_dir", "--output_data_dir", "--checkpoint_dir", "--dry_run"):
        assert option in told
    assert "--log_level" in told


# The root is empty, as outside a container: (arguments, variables, output_data_dir); B is the base
# folder.
MODEL_ARGUMENT = ["--model_dir=B/x"]
OUTPUTS: dict[str, tuple[list[str], dict[str, str], str]] = {
    "nothing given": ([], {}, "ml/model-output"),
    "a stray variable": ([], {"SM_CHANNEL_MODEL": "/base"}, "ml/model-output"),
    "a model folder": (MODEL_ARGUMENT, {}, "x-output"),
    "a model folder, a stray variable": (MODEL_ARGUMENT, {"SM_CHANNEL_MODEL": "/b"}, "x-output"),
    "a model folder, the platform's": (MODEL_ARGUMENT, {"SM_MODEL_DIR": "/ml/model"}, "x-output"),
    "a hyperparameter": ([], {"SM_HP_MODEL_DIR": "B/x", "SM_MODEL_DIR": "/ml/model"}, "x-output"),
    "script mode": ([], {"SM_MODEL_DIR": "B/x"}, "ml/output/data"),
    "script mode, its output": ([], {"SM_MODEL_DIR": "B/x", "SM_OUTPUT_DATA_DIR": "B/y"}, "y"),
    "its output and a model folder": (MODEL_ARGUMENT, {"SM_OUTPUT_DATA_DIR": "B/y"}, "y"),
    "an output folder": (["--output_data_dir=B/z"], {"SM_OUTPUT_DATA_DIR": "B/y"}, "z"),
    "empty words": (
        ["--model_dir=", "--output_data_dir="],
        {"SM_MODEL_DIR": ""},
        "ml/model-output",
    ),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_where_extras_go_outside_a_container(tmp_path: Path, case: str) -> None:
    argv, variables, expected = OUTPUTS[case]
    base = str(tmp_path)
    environment = read(
        tmp_path / "ml",
        *(word.replace("B/", f"{base}/") for word in argv),
        **{name: value.replace("B/", f"{base}/") for name, value in variables.items()},
    )
    assert environment.output_data_dir == tmp_path / expected


@pytest.mark.parametrize("variables", [{}, {"SM_MODEL_DIR": "/v"}, {"SM_CHANNEL_MODEL": "/v"}])
def test_in_a_container_extras_go_under_the_root(root: Path, variables: dict[str, str]) -> None:
    for argv in ([], ["--model_dir=/x"]):
        assert read(root, *argv, **variables).output_data_dir == root / "output" / "data"


# For each option the attribute that it sets and the platform's own variable.
PATHS = {
    "train": ("training", "SM_CHANNEL_TRAINING"),
    "model_dir": ("model_dir", "SM_MODEL_DIR"),
    "output_data_dir": ("output_data_dir", "SM_OUTPUT_DATA_DIR"),
    "checkpoint_dir": ("checkpoint_dir", None),
}


@pytest.mark.parametrize("option", PATHS)
def test_the_precedence_of_every_path(root: Path, option: str) -> None:
    attribute, variable = PATHS[option]

    def found(*argv: str, **variables: str) -> object:
        return getattr(read(root, *argv, **variables), attribute)

    default = found()
    write_settings(root, {option: "/file"})
    assert found() == Path("/file")
    variables = {variable: "/platform"} if variable else {}
    assert found(**variables) == Path("/platform" if variable else "/file")
    variables["SM_HPS"] = json.dumps({option: "/hps"})
    assert found(**variables) == Path("/hps")
    variables[f"SM_HP_{option.upper()}"] = "/hp"
    assert found(**variables) == Path("/hp")
    argument = f"--{option.replace('_', '-')}"
    assert found(argument, "/argument", **variables) == Path("/argument")
    assert found(argument, "", **variables) == Path("/hp")  # an empty argument counts as unset
    for unset in ("", "None", "null", '""', None):
        write_settings(root, {option: unset})
        assert found() == default


def test_the_precedence_of_the_log_level(root: Path) -> None:
    write_settings(root, {"log_level": '"error"'})
    assert read(root).log_level == "error"
    assert read(root, SM_LOG_LEVEL="nonsense").log_level == "error"
    assert read(root, SM_LOG_LEVEL="10").log_level == "debug"
    variables = {"SM_LOG_LEVEL": "10", "SM_HP_LOG_LEVEL": "30"}
    assert read(root, **variables).log_level == "warning"
    assert read(root, "--log_level=critical", **variables).log_level == "critical"


def test_the_precedence_of_a_dry_run(root: Path) -> None:
    write_settings(root, {"dry_run": '"True"'})
    assert read(root).dry_run
    assert not read(root, SM_HP_DRY_RUN="false").dry_run
    assert read(root, "--dry-run", SM_HP_DRY_RUN="false").dry_run
    assert not read(root, "--dry-run=False").dry_run


@pytest.mark.parametrize("value", ["/x", '"/x"', "\"'/x'\"", " /x "])
def test_a_path_in_every_encoding(root: Path, value: str) -> None:
    write_settings(root, {"model_dir": value})
    assert read(root).model_dir == Path("/x")


def test_options_among_the_hyperparameters_are_not_called_unknown(root: Path) -> None:
    values = {"log_level": "info", "dry_run": "False", "max_steps": "3", "max_stepz": "4"}
    write_settings(root, {**dict.fromkeys(PATHS, "/x"), **values})
    environment = read(root, SM_HPS=json.dumps({"train": "/y"}), SM_HP_MODEL_DIR="/z")
    assert environment.settings == {"max_steps": "3", "max_stepz": "4"}
    (warning,) = parse(environment.settings).warnings
    assert "'max_stepz'" in warning


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"model_dir": ["a"]}, "model_dir must be the path of a file or folder, not ['a']."),
        ({"train": "a\0b"}, "train must be the path of a file or folder, not 'a\\x00b'."),
        ({"train": "\ud800"}, "train must be the path of a file or folder, not '\\ud800'."),
        ({"dry_run": "perhaps"}, "dry_run must be True or False, not 'perhaps'."),
        (
            {"log_level": "loud"},
            "log_level must be one of debug, info, warning, error, critical, not 'loud'.",
        ),
    ],
)
def test_wrong_options_in_the_file_are_one_sentence(
    root: Path, settings: dict[str, object], told: str
) -> None:
    write_settings(root, settings)
    assert faults_of(root) == (told,)
    (name,) = settings
    # An argument takes precedence.
    read(root, f"--{name}", "True" if name == "dry_run" else "debug")


def test_names_that_are_no_utf8_stay_paths(root: Path) -> None:
    assert read(root, "--train", "caf\udce9").training == Path("caf\udce9")
