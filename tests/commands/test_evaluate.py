from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreambooth import tiny
from dreambooth.__main__ import main
from dreambooth.commands import evaluate
from dreambooth.errors import HyperparameterError, UserError
from dreambooth.settings import evaluate_options
from dreambooth.settings.command_line import Parser

PROMPTS = {"instance_prompt": "a photo of riobugger cat", "class_prompt": "a photo of cat"}
FAST = ("--steps", 1, "--pictures", 2)


def run(*argv: object) -> int:
    return evaluate.main(parsed(*argv))


def parsed(*argv: object) -> argparse.Namespace:
    parser = Parser()
    evaluate_options.add_arguments(parser)
    return parser.parse_args([str(word) for word in argv])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(3):
        pixels = generator.integers(0, 255, (48, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "dataset_info.json").write_text(json.dumps(PROMPTS))
    return folder


def test_a_model_is_measured_against_its_base(
    small_model_folder: Path,
    make_model_folder: Callable[..., Path],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tuned, out = make_model_folder(seed=1), tmp_path / "out"
    argv = ("--model", tuned, "--base", small_model_folder, "--data", data, "--out", out)
    assert run(*argv, *FAST) == 0
    shown = capsys.readouterr().out
    written = json.loads((out / "evaluation.json").read_text("utf-8"))
    assert written["features"] == "EfficientNet-Lite0, trained on ImageNet"
    assert written["guidance_scale"] == 7.5
    assert set(written["measures"]) - {"class_read", "other_class_read"} == {
        *("subject", "likeness", "copies", "class_kept", "class_likeness"),
        *("class_variety", "base_class_variety", "other_class_kept", "clean"),
    }
    assert list(written["measures"])[:3] == ["subject", "class_kept", "other_class_kept"]
    for name, found in written["measures"].items():
        assert found["low"] <= found["mean"] <= found["high"]
        assert found["of"] == (8 if name == "clean" else 2)  # of all four prompts
        assert f"{name:<20} {found['mean']:6.3f}" in shown
    assert set(written["not_measured"]) == {"context"}
    assert written["frechet_distance"] > 0
    assert written["prompts"]["elsewhere"] == ["a photo of riobugger cat on a beach"]
    assert written["prompts"]["other_class"] == "a photo of a dog"
    assert str(out / "sheet.png") in shown
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width > 300


def test_a_model_that_learned_nothing_has_kept_everything(
    small_model_folder: Path, data: Path, tmp_path: Path
) -> None:
    argv = ("--model", small_model_folder, "--base", small_model_folder, "--data", data)
    assert run(*argv, *FAST, "--out", tmp_path) == 0
    measures = json.loads((tmp_path / "evaluation.json").read_text("utf-8"))["measures"]
    assert measures["class_kept"]["mean"] == measures["other_class_kept"]["mean"] == 1
    assert measures["class_variety"] == measures["base_class_variety"]
    assert measures["clean"]["mean"] == 1


def test_what_cannot_be_measured_is_named_with_the_reason(
    small_model_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "dataset_info.json").write_text(json.dumps({"instance_prompt": "a photo of cat"}))
    assert run("--model", small_model_folder, "--data", data, *FAST, "--out", tmp_path) == 0
    shown = capsys.readouterr().out
    for name, reason in (
        ("subject", "gives no class_prompt"),
        ("class_kept", "gives no class_prompt"),
        ("other_class_kept", "needs --base"),
        ("context", "needs --text_image"),
    ):
        (line,) = [line for line in shown.splitlines() if line.startswith(f"{name} ")]
        assert "not measured" in line
        assert reason in line


def test_class_images_stand_in_for_the_base(
    small_model_folder: Path, data: Path, tmp_path: Path
) -> None:
    (data / "class_data_dir").mkdir()
    Image.new("RGB", (40, 40), "green").save(data / "class_data_dir" / "1.png")
    assert run("--model", small_model_folder, "--data", data, *FAST, "--out", tmp_path) == 0
    measures = json.loads((tmp_path / "evaluation.json").read_text("utf-8"))["measures"]
    assert {"subject", "class_kept"} <= set(measures)


def test_the_embedded_world_is_read_by_its_judge(tmp_path: Path) -> None:
    argv = ("--model", "tiny", "--base", "tiny", "--data", tiny.DATA / "dog2_4")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of a dog on a beach\n")
    assert run(*argv, *FAST, "--prompts", prompts, "--out", tmp_path / "out") == 0
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text("utf-8"))
    assert written["features"] == "the judge of the embedded world"
    assert written["prompts"]["elsewhere"] == ["a photo of a dog on a beach"]
    assert written["prompts"]["other_class"] == "a photo of a cat"


def test_faults_are_said_before_anything_is_loaded(data: Path, tmp_path: Path) -> None:
    with pytest.raises(HyperparameterError, match="--data is missing"):
        run("--model", "tiny")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--out"):
        run("--model", "tiny", "--data", data, "--out", tmp_path / "file")
    with pytest.raises(UserError, match="--prompts"):
        run("--model", "tiny", "--data", data, "--prompts", tmp_path, "--out", tmp_path / "out")
    with pytest.raises(UserError, match="--features"):
        run("--model", "tiny", "--data", data, "--features", tmp_path, "--out", tmp_path / "out")


def test_several_subjects_are_measured_one_by_one_and_against_each_other(
    small_model_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subjects = []
    for number, name in enumerate(("one", "two")):
        (data / name).mkdir()
        (data / f"{number}.png").rename(data / name / "0.png")
        subjects.append(
            {"folder": name, "instance_prompt": f"a photo of {name} cat", "class_prompt": "a cat"}
        )
    (data / "2.png").rename(data / "one" / "1.png")
    (data / "dataset_info.json").write_text(json.dumps({"subjects": subjects}))
    base = ("--base", small_model_folder)
    assert run("--model", small_model_folder, "--data", data, "--out", tmp_path, *base, *FAST) == 0
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert list(written["subjects"]) == ["one", "two"]
    for name, found in written["subjects"].items():
        assert found["prompts"]["subject"] == f"a photo of {name} cat"
        assert found["measures"]["subject"]["of"] == 2
    assert [sum(row) for row in written["confusion"]] == pytest.approx([1, 1])
    diagonal = [row[number] for number, row in enumerate(written["confusion"])]
    assert written["collapse_rate"] == pytest.approx(1 - sum(diagonal) / 2)
    shown = capsys.readouterr().out
    assert "\none: a photo of one cat\n" in shown
    assert "collapse_rate" in shown


def test_pictures_that_were_drawn_before_are_measured(
    small_model_folder: Path, make_model_folder: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    tuned, places = make_model_folder(seed=1), {}
    prompts = ("a photo of riobugger cat", "a photo of riobugger cat on a beach")
    prompts += ("a photo of cat", "a photo of a dog")
    for name, model in (("drawn", tuned), ("base_drawn", small_model_folder)):
        places[name] = tmp_path / name
        argv = ["generate", f"--model={model}", f"--out={tmp_path / name}", "--steps=1", "--seed=0"]
        assert main([*argv, *(f"--prompt={prompt}" for prompt in prompts)]) == 0
    argv = ["--model", tuned, "--base", small_model_folder, "--data", data]
    given = [word for name, place in places.items() for word in (f"--{name}", place)]
    assert run(*argv, *given, "--out", tmp_path / "out") == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text("utf-8"))
    assert {name: one["of"] for name, one in found["measures"].items()} == {
        **dict.fromkeys(("subject", "class_kept", "other_class_kept", "likeness", "copies"), 1),
        **{"class_likeness": 1, "clean": 4},
    }
    next(places["drawn"].glob("002_*")).unlink()
    with pytest.raises(UserError, match=r"--drawn .* holds no picture of the prompt 'a photo of c"):
        run(*argv, *given, "--out", tmp_path / "out")
