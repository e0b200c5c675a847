from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import pytest

from dreambooth.errors import UserError
from dreambooth.settings import serve_options
from dreambooth.settings.command_line import Parser
from dreambooth.settings.serve_options import ServeSettings

ROOT = Path(__file__).parents[2]


def read(*argv: str, environ: Mapping[str, str] | None = None) -> ServeSettings:
    parser = Parser()
    serve_options.add_arguments(parser)
    return serve_options.read(parser.parse_args(argv), environ or {})


def test_the_defaults_are_sagemakers() -> None:
    found = read()
    assert found == ServeSettings(model="/opt/ml/model", model_is_platforms=True)
    assert not read("--model", "/opt/ml/model").model_is_platforms
    assert (found.host, found.port, found.request_timeout_s) == ("0.0.0.0", 8080, 60.0)
    assert found.max_response_bytes == 6_291_456
    assert found.safety_checker


# For every option an unusual value and the setting it must give.
ODD = {
    "model": ("tiny", "tiny"),
    "prediction_type": ("V_prediction", "v_prediction"),
    "base": ("tiny", "tiny"),
    "host": ("127.0.0.1", "127.0.0.1"),
    "port": ("0", 0),
    "request_timeout_s": ("3600.5", 3600.5),
    "max_queue": ("7", 7),
    "batch_rows": ("4", 4),
    "max_response_bytes": ("20000000", 20_000_000),
    "max_connections": ("300", 300),
    "device": ("CPU", "cpu"),
    "precision": ("bf16", "bf16"),
    "log_level": ("warning", "warning"),
}
SWITCHES = {
    "no_safety_checker": ("safety_checker", False),
    "cuda_graphs": ("cuda_graphs", True),
    "channels_last": ("channels_last", True),
}


@pytest.mark.parametrize("name", ODD)
def test_every_option_and_its_variable_arrive(name: str) -> None:
    text, value = ODD[name]
    assert getattr(read(f"--{name}", text), name) == value
    assert getattr(read(f"--{name.replace('_', '-')}={text}"), name) == value
    variable = f"DREAMBOOTH_{name.upper()}"
    assert getattr(read(environ={variable: text}), name) == value
    assert getattr(read(environ={variable: json.dumps(text)}), name) == value
    assert read(environ={variable: " "}) == read(), "an empty variable says nothing"


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_and_its_variable_arrive(name: str) -> None:
    field, switched = SWITCHES[name]
    assert getattr(read(), field) is not switched
    assert getattr(read(f"--{name}"), field) is switched
    assert getattr(read(f"--{name.replace('_', '-')}"), field) is switched
    variable = f"DREAMBOOTH_{name.upper()}"
    assert getattr(read(environ={variable: "True"}), field) is switched
    assert getattr(read(environ={variable: "1"}), field) is switched
    assert getattr(read(environ={variable: "0"}), field) is not switched
    assert getattr(read(environ={variable: "false"}), field) is not switched


def test_every_field_has_an_option() -> None:
    named = set(ODD) | {field for field, _ in SWITCHES.values()}
    assert {field.name for field in fields(ServeSettings)} - named == {
        "max_body_bytes",
        "model_is_platforms",
    }


def test_an_option_counts_before_its_variable_before_the_platform() -> None:
    platform = {
        "SAGEMAKER_BIND_TO_PORT": "1111",
        "MMS_MAX_RESPONSE_SIZE": "20000000",
        "SM_MODEL_DIR": "/there",
        "SAGEMAKER_BASE_DIR": "/root/",
    }
    found = read(environ=platform)
    assert (found.port, found.max_response_bytes, found.model) == (1111, 20_000_000, "/there")
    assert read(environ=platform | {"DREAMBOOTH_PORT": "2222"}).port == 2222
    assert read("--port", "3333", environ=platform | {"DREAMBOOTH_PORT": "2222"}).port == 3333
    assert read(environ={"SAGEMAKER_BASE_DIR": "/root/"}).model == "/root/model"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("model", ""),
        ("model", "a\0b"),
        ("model", "a\nb"),
        ("host", "\x1b[2J"),
        ("port", "65536"),
        ("port", "-1"),
        ("port", ""),
        ("port", "8_080"),
        ("port", "٨٠"),
        ("port", "9" * 5000),
        ("request_timeout_s", "nan"),
        ("request_timeout_s", "inf"),
        ("request_timeout_s", "0.5"),
        ("request_timeout_s", "minute"),
        ("max_queue", "0"),
        ("batch_rows", "1"),
        ("batch_rows", "1000"),
        ("device", "tpu"),
        ("precision", "fp8"),
    ],
)
def test_wrong_values_are_refused_by_name(name: str, text: str) -> None:
    with pytest.raises(UserError, match=f"^--{name} must be .{{1,150}}not .{{2,120}}$"):
        read(f"--{name}={text}")


def test_all_faults_are_reported_at_once_and_a_variables_by_its_own_name() -> None:
    environ = {"SAGEMAKER_BIND_TO_PORT": "http", "DREAMBOOTH_NO_SAFETY_CHECKER": "maybe"}
    with pytest.raises(UserError) as caught:
        read("--max_queue", "none", environ=environ)
    message = str(caught.value)
    assert "SAGEMAKER_BIND_TO_PORT must be a whole number" in message
    assert "DREAMBOOTH_NO_SAFETY_CHECKER must be True or False" in message
    assert "--max_queue must be a whole number, at least 1, at most 100000, not 'none'." in message
    assert message.startswith("3 settings are wrong: (1) ")


def test_the_command_line_tells_a_fault_in_one_sentence() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dreambooth", "serve", "--port", "x"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 1
    assert (
        done.stderr == "error: --port must be a whole number, at least 0, at most 65535, not 'x'.\n"
    )
