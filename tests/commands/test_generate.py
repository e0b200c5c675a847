from __future__ import annotations

import argparse
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dreambooth.commands import generate
from dreambooth.diffusion import model as models
from dreambooth.diffusion.sampling import generate as sample
from dreambooth.diffusion.sampling_request import SamplingRequest
from dreambooth.errors import UserError
from dreambooth.settings import generate_options
from dreambooth.settings.command_line import Parser
from tests.conftest import write_safety_checker

CAT = "a photo of a cat"


def run(*argv: object) -> int:
    return generate.main(parsed(*argv))


def parsed(*argv: object) -> argparse.Namespace:
    parser = Parser()
    generate_options.add_arguments(parser)
    return parser.parse_args([str(word) for word in argv])


def test_writes_one_named_picture_per_seed_and_a_grid_and_prints_the_paths(
    small_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ("--prompt", CAT, "--prompt", "ein Käfer, 猫")
    options = ("--count", 2, "--seed", 7, "--steps", 3, "--guidance-scale", 4, "--batch-size", 3)
    assert run("--model", small_model_folder, *prompts, *options, "--out", tmp_path) == 0
    names = [
        "000_a-photo-of-a-cat_seed7.png",
        "001_a-photo-of-a-cat_seed8.png",
        "002_ein-käfer-猫_seed9.png",
        "003_ein-käfer-猫_seed10.png",
        "grid.png",
    ]
    captured = capsys.readouterr()
    assert captured.out.split() == [str(tmp_path / name) for name in names]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert "8/8" in captured.err  # two batches of 4 U-Net calls: PNDM makes one more than asked
    facts = Image.open(tmp_path / names[2]).text  # type: ignore[attr-defined]
    assert facts == {
        "prompt": "ein Käfer, 猫",
        "negative_prompt": "",
        "seed": "9",
        "num_inference_steps": "3",
        "guidance_scale": "4.0",
        "model": str(small_model_folder),
    }


def test_every_option_reaches_the_picture(small_model_folder: Path, tmp_path: Path) -> None:
    options = ("--negative_prompt", "snow", "--steps", 2, "--guidance_scale", 3.5, "--seed", 11)
    size = ("--width", 24, "--height", 40)
    argv = ("--model", small_model_folder, "--prompt", CAT, *options, *size, "--out", tmp_path)
    assert run(*argv) == 0
    (path,) = tmp_path.iterdir()  # only one picture, so no grid
    request = SamplingRequest(
        prompt=CAT,
        negative_prompt="snow",
        num_inference_steps=2,
        guidance_scale=3.5,
        width=24,
        height=40,
        seed=11,
    )
    (expected,) = sample(models.load(small_model_folder, device=torch.device("cpu")), [request])
    assert expected is not None
    assert np.array_equal(np.asarray(Image.open(path)), expected)


@pytest.mark.parametrize("option", [[], ["--no_safety_checker"]])
def test_what_the_models_safety_checker_hides_is_black(
    make_model_folder: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    option: list[str],
) -> None:
    folder = write_safety_checker(make_model_folder(), hides=True)
    argv = ("--model", folder, "--prompt", CAT, "--steps", 1, "--seed", 4, "--count", 2, *option)
    assert run(*argv, "--out", tmp_path) == 0
    pictures = sorted(path for path in tmp_path.iterdir() if path.name != "grid.png")
    assert len(pictures) == 2
    for path in pictures:
        assert bool(np.asarray(Image.open(path)).any()) == bool(option)
    assert ("unsafe" in caplog.text) is not bool(option)
    assert ("(seed 4, 5)" in caplog.text) is not bool(option)


def test_half_precision_draws_another_rounding_of_the_picture(
    small_model_folder: Path, tmp_path: Path
) -> None:
    pictures = []
    for precision in ("auto", "fp32", "bf16"):
        argv = ("--model", small_model_folder, "--prompt", CAT, "--steps", 2, "--seed", 1)
        assert run(*argv, "--precision", precision, "--out", tmp_path / precision) == 0
        (path,) = (tmp_path / precision).iterdir()
        pictures.append(np.asarray(Image.open(path)).astype(int))
    if not torch.cuda.is_available():
        assert np.array_equal(pictures[0], pictures[1])
    assert 0 < np.abs(pictures[1] - pictures[2]).mean() < 3


def test_without_a_seed_one_is_chosen_and_printed_and_draws_the_same_again(
    small_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("--model", small_model_folder, "--prompt", CAT, "--steps", 1)
    assert run(*argv, "--out", tmp_path / "first") == 0
    first_line = capsys.readouterr().out.splitlines()[0]
    found = re.fullmatch(r"seed (\d+) \(chosen at random; --seed \1 draws them again\)", first_line)
    assert found is not None
    assert run(*argv, "--seed", found[1], "--out", tmp_path / "second") == 0
    (first,), (second,) = (tmp_path / "first").iterdir(), (tmp_path / "second").iterdir()
    assert first.name == second.name
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(("name", "ending"), [("jpeg", ".jpg"), ("webp", ".webp")])
def test_other_formats_say_how_the_picture_was_made(
    small_model_folder: Path, tmp_path: Path, name: str, ending: str
) -> None:
    argv = ("--model", small_model_folder, "--prompt", "猫", "--steps", 1, "--seed", 9)
    assert run(*argv, "--format", name, "--out", tmp_path) == 0
    (path,) = tmp_path.iterdir()
    assert path.suffix == ending
    with Image.open(path) as picture:
        assert picture.format == name.upper()
        facts = json.loads(picture.getexif()[0x010E])  # ImageDescription
    assert facts["prompt"] == "猫"
    assert facts["seed"] == 9


def test_a_tarball_is_a_model_too(small_model_folder: Path, tmp_path: Path) -> None:
    archive = tmp_path / "model.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for part in small_model_folder.iterdir():
            tar.add(part, part.name)
    out = tmp_path / "out"
    assert run("--model", archive, "--prompt", CAT, "--steps", 1, "--seed", 0, "--out", out) == 0
    assert len(list(out.iterdir())) == 1


def test_pictures_that_are_not_finite_are_named_and_not_written(
    make_model_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_model_folder()
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["conv_out.bias"].fill_(3e38)  # finite here, but not after guidance
    save_file(state, weights, metadata={"format": "pt"})
    out = tmp_path / "out"
    argv = ("--model", folder, "--prompt", CAT, "--steps", 4, "--seed", 5, "--count", 2)
    assert run(*argv, "--out", out) == 1
    assert "2 of 2 pictures came out not finite" in (captured := capsys.readouterr()).err
    assert "(seed 5, 6)" in captured.err
    assert list(out.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_reported_before_the_model_is_loaded(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("here")
    with pytest.raises(UserError, match=r"--out .* cannot be made"):
        run("--model", "missing", "--prompt", CAT, "--out", tmp_path / "file")


def test_steps_that_the_model_does_not_know_are_refused_before_its_weights_are_read(
    make_model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_model_folder()
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"\0\1\2")
    told = "--num_inference_steps must lie between 1 and 999 with this model, not 1000"
    with pytest.raises(UserError, match=told):
        run("--model", folder, "--prompt", CAT, "--steps", 1000, "--out", tmp_path)


def test_names_sort_in_order_and_stay_short() -> None:
    request = SamplingRequest(prompt="Über " * 100, seed=3)
    name = generate.file_name(7, 20_000, request)
    assert name.startswith("00007_über-über")
    assert len(name.encode()) <= 100
    assert name.endswith("_seed3.png")


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("猫", "007_猫_seed3.png"),
        ("ein Käfer, 猫!", "007_ein-käfer-猫_seed3.png"),
        ("Ka\u0308fer", "007_käfer_seed3.png"),  # a decomposed letter equals the composed one
        ("एक हिन्दी", "007_एक-हिन्दी_seed3.png"),
        ("../../etc/passwd\0\n", "007_etc-passwd_seed3.png"),
        ("a\\b:c*d\udcffe", "007_a-b-c-d-e_seed3.png"),
        ("\u0301 ❤\ufe0f", "007_seed3.png"),
        ("猫" * 50, f"007_{'猫' * 26}_seed3.png"),  # 78 of 80 bytes
    ],
)
def test_names_keep_letters_of_any_script_and_nothing_else(prompt: str, name: str) -> None:
    assert generate.file_name(7, 8, SamplingRequest(prompt=prompt, seed=3)) == name
