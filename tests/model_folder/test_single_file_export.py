"""One safetensors file out, and back in: numbers, names, pictures, and what is not in it.

The models are narrow, with the blocks of the published 1.x and 2.x; the embedded model goes both
ways too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dreambooth import __main__ as cli
from dreambooth import tiny
from dreambooth.data import fingerprint
from dreambooth.diffusion import model as models
from dreambooth.diffusion import sampling
from dreambooth.diffusion.sampling_request import SamplingRequest
from dreambooth.errors import ModelArtifactError, ResourceError, UserError
from dreambooth.limits import LIMITS
from dreambooth.model_folder import conversion, single_file, single_file_export, source
from dreambooth.model_folder.headers import read_with_metadata
from tests.conftest import old_vae_name
from tests.job.test_published_shapes import SHAPES, write
from tests.model_folder.single_files import published, write_holes

Make = Callable[..., Path]
PARTS = ("unet", "vae", "text_encoder")
SHAPES_AND_TINY = [*SHAPES, "tiny"]


@dataclasses.dataclass(frozen=True)
class Pair:
    """A folder, its model as one file, and the folder that is made of that."""

    folder: Path
    file: Path
    back: Path


@pytest.fixture(scope="module")
def pairs(
    make_model_folder: Make, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Pair]:
    """Return a function that makes the pair of a shape, once."""
    made: dict[str, Pair] = {}

    def pair(name: str) -> Pair:
        if name not in made:
            place = tmp_path_factory.mktemp("pair")
            folder = tiny.WEIGHTS if name == "tiny" else write(make_model_folder(), SHAPES[name])
            conversion.convert(folder, place / "one.safetensors")
            conversion.convert(place / "one.safetensors", place / "back", base=str(folder))
            made[name] = Pair(folder, place / "one.safetensors", place / "back")
        return made[name]

    return pair


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Any:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def state_of(folder: Path, part: str) -> dict[str, torch.Tensor]:
    [file] = (folder / part).glob("*.safetensors")
    prefix = "text_model." if part == "text_encoder" else ""
    return {prefix + k.removeprefix(prefix): tensor for k, tensor in load_file(file).items()}


def same(first: Path, second: Path) -> bool:
    for part in PARTS:
        one, other = state_of(first, part), state_of(second, part)
        if one.keys() != other.keys() or any(one[k].dtype != other[k].dtype for k in one):
            return False
        if not all(torch.equal(one[key], other[key]) for key in one):
            return False
    return True


def picture(folder: Path) -> np.ndarray:
    model = models.load(folder, device=torch.device("cpu"))
    request = SamplingRequest(
        prompt="a photo of a cat",
        negative_prompt="",
        num_inference_steps=3,
        guidance_scale=5.0,
        width=None,
        height=None,
        seed=0,
    )
    [drawn] = sampling.generate(model, [request])
    assert drawn is not None
    return drawn


@pytest.mark.parametrize("name", SHAPES_AND_TINY)
def test_there_and_back_every_number_and_the_picture_are_the_same(
    pairs: Callable[[str], Pair], name: str
) -> None:
    pair = pairs(name)
    assert same(pair.folder, pair.back)
    for part in PARTS:
        first, second = (
            json.loads((f / part / "config.json").read_text()) for f in (pair.folder, pair.back)
        )
        assert first == second
    assert np.array_equal(picture(pair.folder), picture(pair.back))


@pytest.mark.parametrize("name", SHAPES_AND_TINY)
@pytest.mark.usefixtures("no_network")
def test_unmodified_diffusers_reads_it_and_draws_the_same(
    pairs: Callable[[str], Pair], name: str
) -> None:
    pair = pairs(name)
    whole = StableDiffusionPipeline.from_pretrained(pair.folder, local_files_only=True)
    read = StableDiffusionPipeline.from_single_file(  # the first is of 2022, with a safety checker
        pair.file, config=str(pair.back), local_files_only=True, torch_dtype=torch.float32
    )
    drawn = []
    for pipeline in (whole, read):
        pipeline.to(torch.float32)
        pipeline.safety_checker = None
        pipeline.set_progress_bar_config(disable=True)
        result = pipeline(
            "a photo of a cat",
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        )
        drawn.append(result.images[0])
    for part in PARTS:
        first, second = (getattr(p, part).state_dict() for p in (whole, read))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert np.abs(drawn[0] - drawn[1]).max() < 1 / 255


@pytest.mark.parametrize("name", ["1.x", "2.x 768"])
def test_the_metadata_says_what_tools_show(pairs: Callable[[str], Pair], name: str) -> None:
    pair = pairs(name)
    entries, metadata = read_with_metadata(pair.file)
    is_2 = name.startswith("2")
    assert metadata == {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"stable-diffusion-{'v2-768-v' if is_2 else 'v1'}",
        "modelspec.implementation": metadata["modelspec.implementation"],
        "modelspec.title": "one",
        "modelspec.resolution": "64x64",
        "modelspec.prediction_type": "v" if is_2 else "epsilon",
        "modelspec.hash_sha256": metadata["modelspec.hash_sha256"],
    }
    data = pair.file.read_bytes()[min(entry.begin for entry in entries) :]
    assert metadata["modelspec.hash_sha256"] == f"0x{hashlib.sha256(data).hexdigest()}"
    with safe_open(pair.file, "pt") as file:  # as the library reads it
        assert file.metadata() == metadata


def test_a_trained_model_says_its_licence_and_prompt(
    make_model_folder: Make, tmp_path: Path
) -> None:
    folder = make_model_folder(model_info={"instance_prompt": "a photo of riobugger\ncat"})
    (folder / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n")
    conversion.convert(folder, tmp_path / "mine.safetensors")
    _, metadata = read_with_metadata(tmp_path / "mine.safetensors")
    assert metadata["modelspec.license"] == "creativeml-openrail-m"
    assert metadata["modelspec.trigger_phrase"] == r"a photo of riobugger\ncat"


def test_the_same_model_gives_the_same_bytes(pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    pair = pairs("2.x base")
    conversion.convert(pair.back, tmp_path / "one.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == pair.file.read_bytes()


def test_what_is_not_in_the_file_is_named(
    pairs: Callable[[str], Pair], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    single_file_export.export(pairs("1.x").folder, tmp_path / "a.safetensors")
    for words in ("position_ids", "safety_checker", "moving averages", "diffusers reads"):
        assert words in caplog.text
    caplog.clear()
    single_file_export.export(pairs("2.x base").folder, tmp_path / "b.safetensors")
    assert "resblocks.3.*, text_projection and logit_scale" in caplog.text


def test_a_job_that_starts_again_finds_the_same_model(
    pairs: Callable[[str], Pair], tmp_path: Path
) -> None:
    """Its checkpoints are known by the weights' hash."""
    pair = pairs("2.x base")
    found = source.locate(str(pair.file), base=str(pair.folder))
    opened = [source.open_source(found, tmp_path / name) for name in "ab"]
    prints = {
        fingerprint.of_weights(sorted((folder / part).glob("*.safetensors"))[0] for part in PARTS)
        for folder in opened
    }
    assert len(prints) == 1
    other = source.open_source(source.locate("tiny"), tmp_path)
    assert fingerprint.of_weights([*(other / "unet").glob("*.safetensors")]) not in prints


def test_settings_that_the_file_cannot_hold_are_named(tmp_path: Path) -> None:
    """At full size other tools take the published settings, whatever the folder says."""
    holes = write_holes(tmp_path / "sd.safetensors", published("1.x", "F16"))
    folder = source.open_source(source.locate(str(holes)), tmp_path)
    structure = single_file.structure_of(folder)

    def remarks(prediction_type: str) -> str:
        out = tmp_path / "x.safetensors"
        found = single_file_export._remarks(folder, out, structure, prediction_type, LIMITS)
        return "\n".join(found)

    assert "other tools take" not in remarks("epsilon")
    assert "other tools take 1.x for epsilon" in remarks("v_prediction")
    for part, change in (
        ("vae/config.json", {"scaling_factor": 0.5}),
        ("unet/config.json", {"attention_head_dim": [8, 8, 8, 8], "norm_num_groups": 16}),
        ("scheduler/scheduler_config.json", {"beta_end": 0.02}),
    ):
        config = json.loads((folder / part).read_text())
        (folder / part).write_text(json.dumps(config | change))
    structure = single_file.structure_of(folder)
    told = remarks("epsilon")
    for words in ("vae's scaling_factor = 0.5", "unet's norm_num_groups = 16", "beta_end = 0.02"):
        assert words in told
    assert "attention_head_dim" not in told  # the same, said for each block


def test_bf16_goes_there_and_back(make_model_folder: Make, tmp_path: Path) -> None:
    folder = make_model_folder(dtype=torch.bfloat16)
    conversion.convert(folder, tmp_path / "a.safetensors")
    conversion.convert(tmp_path / "a.safetensors", tmp_path / "back", base=str(folder))
    assert same(folder, tmp_path / "back")


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_a_precision_casts_every_number(
    pairs: Callable[[str], Pair], tmp_path: Path, precision: str
) -> None:
    name, dtype = {"fp16": ("1.x", torch.float16), "fp32": ("tiny", torch.float32)}[precision]
    pair = pairs(name)
    out = tmp_path / "cast.safetensors"
    assert cli.main(["convert", str(pair.folder), str(out), "--precision", precision]) == 0
    before, after = load_file(pair.file), load_file(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], before[key].to(dtype)) for key in before)


def test_a_number_beyond_half_precision_is_named_and_nothing_is_left(
    make_model_folder: Make, tmp_path: Path
) -> None:
    folder = make_model_folder()
    [file] = (folder / "unet").glob("*.safetensors")
    state = load_file(file)
    state["conv_out.bias"][0] = 1e6
    save_file(state, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"'model\.diffusion_model\.out\.2\.bias' does not fit"):
        single_file_export.export(folder, tmp_path / "x.safetensors", precision="fp16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [{"bin": True}, {"sharded": True}, {"variant": "fp16"}, {"text_model_prefix": False}],
    ids=str,
)
def test_every_layout_of_a_folder_gives_the_same_file(
    make_model_folder: Make, tmp_path: Path, options: dict[str, Any]
) -> None:
    folder = make_model_folder(**options)
    conversion.convert(folder, tmp_path / "a.safetensors")
    plain = make_model_folder()
    for part in PARTS:
        [file] = (plain / part).glob("*.safetensors")
        if "variant" in options:
            save_file({k: t.half() for k, t in load_file(file).items()}, file, {"format": "pt"})
    conversion.convert(plain, tmp_path / "b" / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (
        tmp_path / "b" / "a.safetensors"
    ).read_bytes()


def test_old_names_and_convolutions_of_the_vae_are_written_as_published(
    make_model_folder: Make, tmp_path: Path
) -> None:
    folder, plain = make_model_folder(), make_model_folder()
    [file] = (folder / "vae").glob("*.safetensors")
    state = {old_vae_name(key): tensor for key, tensor in load_file(file).items()}
    state = {
        key: t[:, :, None, None].contiguous() if ".attentions." in key and t.ndim == 2 else t
        for key, t in state.items()
    }
    save_file(state, file, {"format": "pt"})
    (tmp_path / "b").mkdir()
    for each, name in ((folder, "a.safetensors"), (plain, "b/a.safetensors")):
        conversion.convert(each, tmp_path / name)
    assert (tmp_path / "a.safetensors").read_bytes() == (
        tmp_path / "b" / "a.safetensors"
    ).read_bytes()


def test_a_pickle_is_converted_if_it_holds_weights_alone(
    pairs: Callable[[str], Pair], tmp_path: Path
) -> None:
    pair = pairs("2.x base")
    path = tmp_path / "old.ckpt"
    state = load_file(pair.file)
    torch.save({"state_dict": state, "global_step": 7}, path)
    said = ["--base", str(pair.folder), "--prediction_type", "epsilon"]
    assert cli.main(["convert", str(path), str(tmp_path / "new"), *said]) == 0
    assert same(pair.folder, tmp_path / "new")
    path.with_suffix(".yaml").write_text("model: {params: {parameterization: v}}")
    conversion.convert(path, tmp_path / "v", base=str(pair.folder))
    scheduler = json.loads((tmp_path / "v" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"
    for content in ({"state_dict": state, "callbacks": shutil.rmtree}, {"state_dict": {"a": 1}}):
        torch.save(content, path)
        with pytest.raises(ModelArtifactError, match=r"old\.ckpt"):
            conversion.convert(path, tmp_path / "evil")
    assert not (tmp_path / "evil").exists()


def test_models_that_other_tools_have_no_file_for_are_refused(
    make_model_folder: Make, tmp_path: Path
) -> None:
    out = tmp_path / "x.safetensors"
    mixed = make_model_folder(use_linear_projection=False)
    with pytest.raises(ModelArtifactError, match="draw other pictures"):
        single_file_export.export(mixed, out)
    sample = make_model_folder(prediction_type="sample")
    with pytest.raises(ModelArtifactError, match="predicts 'sample'"):
        single_file_export.export(sample, out)
    foreign = make_model_folder()
    [file] = (foreign / "unet").glob("*.safetensors")
    save_file(load_file(file) | {"extra\n": torch.zeros(1)}, file, {"format": "pt"})
    with pytest.raises(ModelArtifactError, match=r"holds the foreign extra\\n"):
        single_file_export.export(foreign, out)
    assert not out.exists()


def test_a_file_that_is_there_stays_and_a_full_disk_leaves_nothing(
    small_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x.safetensors"
    out.write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        conversion.convert(small_model_folder, out)
    assert out.read_text() == "mine"
    out.unlink()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(single_file_export, "write", full)
    with pytest.raises(ResourceError, match="the disk is full"):
        conversion.convert(small_model_folder, out)
    assert list(tmp_path.iterdir()) == []


def test_precision_is_for_one_file(small_model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--precision is for one file"):
        conversion.convert(small_model_folder, tmp_path / "folder", precision="fp16")


def test_generate_draws_with_one_file(
    pairs: Callable[[str], Pair], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = pairs("tiny")
    asked = ["generate", "--prompt=a photo of a cat", "--steps=2", "--seed=1"]
    for name, model in (
        ("file", ["--model", str(pair.file), "--base=tiny"]),
        ("folder", ["--model=tiny"]),
    ):
        assert cli.main([*asked, *model, "--out", str(tmp_path / name)]) == 0
    first, second = (
        np.asarray(Image.open(next((tmp_path / name).iterdir()))) for name in ("file", "folder")
    )
    assert np.array_equal(first, second)
