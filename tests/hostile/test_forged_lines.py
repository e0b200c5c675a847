"""Names from untrusted files must not forge or flood lines of messages and logs."""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dreambooth import __main__ as cli
from dreambooth import errors
from dreambooth.errors import DreamBoothError, HyperparameterError, ModelArtifactError
from dreambooth.job.run import run_job
from dreambooth.process import failure, logs
from tests.hostile.conftest import Sandbox

FORGED = "fid_score=0.0"
# Line breaks of every kind, and escape codes that erase a terminal's line.
NASTY = f"x\n{FORGED}\r{FORGED}\x0b\x0c\x1c\x85\u2028{FORGED}\u2029\x1b[2K\x1b[1A{FORGED}\n"
HUGE = "x" * 3_000_000
OwnModel = Callable[..., Path]


def change(path: Path, name: str, value: object) -> None:
    content = json.loads(path.read_text("utf-8"))
    content[name] = value
    path.write_text(json.dumps(content), encoding="utf-8")


def rename_tensor(path: Path, name: str, **changes: object) -> None:
    """Rename the first tensor of a safetensors file and change keys of its entry."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    first = next(key for key in header if key != "__metadata__")
    header[name] = {**header.pop(first), **changes}
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])


UNET = "unet/diffusion_pytorch_model.safetensors"
# The places of a name in a model folder: each function puts a name there.
PLACES: dict[str, Callable[[Path, str], None]] = {
    "tensor": lambda model, name: rename_tensor(model / UNET, name),
    "tensor, dtype": lambda model, name: rename_tensor(model / UNET, "a", dtype=name),
    "tensor, shape": lambda model, name: rename_tensor(model / UNET, name, shape=[1]),
    "part": lambda model, name: change(model / "model_index.json", name, ["diffusers", "X"]),
    "pipeline": lambda model, name: change(model / "model_index.json", "_class_name", name),
    "class of a part": lambda model, name: change(
        model / "model_index.json", "unet", ["diffusers", name]
    ),
    "library of a part": lambda model, name: change(
        model / "model_index.json", "vae", [name, "AutoencoderKL"]
    ),
    "class in a part": lambda model, name: change(model / "unet/config.json", "_class_name", name),
    "key of a part": lambda model, name: change(
        model / "unet/config.json", f"layers {name}", 100_000
    ),
    "value of a part": lambda model, name: change(
        model / "unet/config.json", "down_block_types", [name]
    ),
    "channels": lambda model, name: change(model / "vae/config.json", "latent_channels", name),
    "resolution": lambda model, name: change(model / "unet/config.json", "sample_size", name),
    "prediction type": lambda model, name: change(
        model / "scheduler/scheduler_config.json", "prediction_type", name
    ),
    "beta schedule": lambda model, name: change(
        model / "scheduler/scheduler_config.json", "beta_schedule", name
    ),
    "token": lambda model, name: change(model / "tokenizer/vocab.json", name, name),
    "merge": lambda model, name: (model / "tokenizer/merges.txt").write_text(
        "#version: 0.2\n" + name.replace("\n", "\x0b"), encoding="utf-8"
    ),
    "a library's own log": lambda model, name: change(
        model / "text_encoder/config.json", "use_return_dict", name
    ),
    "weight map": lambda model, name: write_weight_map(model, name),
}


def write_weight_map(model: Path, name: str) -> None:
    (model / UNET).unlink()
    index = model / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": f"{name}.safetensors"}}), encoding="utf-8")


def check(*texts: str) -> None:
    """Assert that no line was forged, unprintable or very long."""
    for text in texts:
        for line in text.splitlines():
            assert not line.startswith(FORGED), line[:200]
            assert line.isprintable(), line[:200]
            assert len(line) < 10_000


@pytest.mark.parametrize("name", [NASTY, HUGE], ids=["nasty", "huge"])
@pytest.mark.parametrize("place", PLACES)
def test_no_name_in_a_model_folder_forges_or_fills_a_line(
    sandbox: Sandbox, own_model: OwnModel, place: str, name: str
) -> None:
    PLACES[place](own_model(), name)
    sandbox.capsys.readouterr()
    root = sandbox.root / "out"
    (root / "output").mkdir(parents=True)
    assert run_job(sandbox.argv(), {"SAGEMAKER_BASE_DIR": str(root)}) == 1
    shown = sandbox.capsys.readouterr()
    told = (root / "output" / "failure").read_text("utf-8")
    check(shown.out, shown.err, told)
    assert "Traceback" not in shown.err
    assert len(told.splitlines()) == 1
    sentences = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    (sentence,) = sentences
    assert len(sentence) < 3_000
    assert sentence.endswith((".", ".)"))  # the end, which says what to do, was not cut


@pytest.mark.parametrize("name", [NASTY[:40], "x" * 200], ids=["nasty", "long"])
def test_no_file_name_forges_a_line(sandbox: Sandbox, own_model: OwnModel, name: str) -> None:
    model = own_model()
    strange = model.with_name(name.replace("/", "_"))
    model.rename(strange)
    (strange / UNET).rename((strange / UNET).with_name(f"{name}.ckpt"))
    sandbox.model = strange
    (sandbox.photos / f"{name}.png").write_bytes(b"no picture")
    sandbox.capsys.readouterr()
    assert run_job(sandbox.argv(), {}) == 1
    shown = sandbox.capsys.readouterr()
    check(shown.out, shown.err)
    assert "holds no weights that can be read" in shown.err


def test_no_name_is_forged_by_what_the_other_verbs_log(
    sandbox: Sandbox, own_model: OwnModel, capsys: pytest.CaptureFixture[str]
) -> None:
    model = own_model()
    (model / "notes\nfid_score=0.0").touch()
    assert cli.main(["pack", str(model), str(sandbox.root / "out.tar.gz")]) == 0
    shown = capsys.readouterr()
    assert "left out, no part of a model folder" in shown.err
    check(shown.out, shown.err)


@pytest.mark.parametrize("name", [NASTY, HUGE], ids=["nasty", "huge"])
@pytest.mark.parametrize(
    "given",
    [
        lambda name: ([f"--{name}=1"], {}),
        lambda name: ([f"--epochs={name}"], {}),
        lambda name: ([f"--lr_scheduler={name}"], {}),
        lambda name: ([f"--log_level={name}"], {}),
        lambda name: ([f"--dry_run={name}"], {}),
        lambda name: ([name], {}),
        lambda name: ([f"--pretrained-model={name}"], {}),
        lambda name: ([f"--train={name}"], {}),
        lambda name: ([f"--class_data_dir={name}", "--with_prior_preservation"], {}),
        lambda name: ([], {"SM_HPS": json.dumps({name: 1, "seed": name})}),
        lambda name: ([], {"SM_HPS": name}),
        lambda name: ([], {f"SM_HP_{name}": "1", "SM_HP_SEED": name}),
        lambda name: ([], {"WORLD_SIZE": name}),
    ],
)
def test_no_setting_forges_or_fills_a_line(
    sandbox: Sandbox, given: Callable[[str], tuple[list[str], dict[str, str]]], name: str
) -> None:
    argv, environ = given(name)
    root = sandbox.root / "out"
    (root / "output").mkdir(parents=True)
    sandbox.capsys.readouterr()
    wrong = ["--max_steps=0"]  # stops the job where the name itself is harmless
    code = run_job([*sandbox.argv(), *wrong, *argv], {**environ, "SAGEMAKER_BASE_DIR": str(root)})
    assert code == 1
    shown = sandbox.capsys.readouterr()
    check(shown.out, shown.err, (root / "output" / "failure").read_text("utf-8"))
    assert "Traceback" not in shown.err


def test_a_fault_of_ours_forges_no_line_in_its_trace(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> Any:
        try:
            raise KeyError(NASTY)
        except KeyError as error:
            raise ValueError(NASTY) from error

    monkeypatch.setattr("dreambooth.job.run.dataset_info.read", fail)
    root = sandbox.root / "out"
    (root / "output").mkdir(parents=True)
    assert run_job(sandbox.argv(), {"SAGEMAKER_BASE_DIR": str(root)}) == 1
    shown = sandbox.capsys.readouterr().err
    check(shown, (root / "output" / "failure").read_text("utf-8"))
    assert "The above exception was the direct cause" in shown
    assert "ValueError: x\\nfid_score=0.0" in shown


def test_notes_groups_and_syntax_errors_forge_no_line() -> None:
    def failed(kind: Callable[..., BaseException], *arguments: Any) -> str:
        try:
            error = kind(*arguments)
            error.add_note(NASTY)
            raise error
        except BaseException as caught:
            return logs.trace_of(caught)

    group = failed(ExceptionGroup, NASTY, [ValueError(NASTY), KeyError(NASTY)])
    syntax = failed(SyntaxError, NASTY, (NASTY, 1, 1, NASTY))
    plain = failed(ValueError, NASTY)
    check(group, syntax, plain)
    for text in (group, syntax, plain):
        assert "  x\\nfid_score=0.0" in text  # the note of the error


def test_a_fault_of_ours_in_another_verb_is_reported_the_same_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> Any:
        raise ValueError(NASTY)

    monkeypatch.setattr("dreambooth.model_folder.pack.write", fail)
    assert cli.main(["pack", "a", "b.tar.gz"]) == 1
    shown = capsys.readouterr().err
    assert "ValueError: x\\nfid_score=0.0" in shown
    check(shown)


def test_a_log_line_is_one_line_whatever_the_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import warnings

    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    root.handlers[:] = []
    try:
        logs.to_stderr("info", phase="test")
        logging.getLogger("dreambooth").info("said: %s", NASTY)
        logging.getLogger("a.library").error(HUGE)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            logging.captureWarnings(False)
            logging.captureWarnings(True)
            warnings.warn(NASTY, stacklevel=1)
        try:
            raise ValueError(NASTY)
        except ValueError:
            logging.getLogger("dreambooth").exception("it failed")
    finally:
        logging.captureWarnings(False)
        root.handlers[:] = before
        root.setLevel(level)
    shown = capsys.readouterr().err
    check(shown)
    assert shown.count("[test]") == 4
    assert "UserWarning: x fid_score=0.0" in shown


def test_an_error_keeps_the_beginning_and_the_end_of_its_sentence() -> None:
    said = f"The file {HUGE} is wrong: do this."
    for kind in (DreamBoothError, ModelArtifactError):
        text = str(kind(said))
        assert text.startswith("The file xxx")
        assert text.endswith("xxx is wrong: do this.")
        assert len(text) < 2_100
    many = HyperparameterError([said, NASTY, "plain."])
    assert many.faults[2] == "plain."
    assert all(fault.isprintable() and len(fault) < 2_100 for fault in many.faults)
    check(str(many), failure.describe_failure(many))


@pytest.mark.parametrize("value", [NASTY, HUGE, [HUGE], {NASTY: 1}, 10**4000, None, "\udc80", b"x"])
def test_a_quoted_value_is_short_and_printable(value: object) -> None:
    text = errors.quoted(value)
    assert len(text) <= 60
    assert text.isprintable()


@pytest.mark.parametrize("text", ["", "a", "ä ☃", "a  b", "x" * 2_000])
def test_what_is_fine_is_left_as_it_is(text: str) -> None:
    assert errors.one_line(text) == text
