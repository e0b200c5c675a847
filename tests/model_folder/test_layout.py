from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dreambooth.errors import ModelArtifactError
from dreambooth.limits import Limits
from dreambooth.model_folder.layout import choose_weights, validate_folder, weight_files

Make = Callable[..., Path]


def change(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text("utf-8")) | values
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["model.safetensors", "pytorch_model.bin"], "model.safetensors"),
        (["model.fp16.safetensors", "pytorch_model.bin"], "pytorch_model.bin"),
        (["model.fp16.safetensors", "pytorch_model.fp32.bin"], "pytorch_model.fp32.bin"),
        (["model.fp16.safetensors", "pytorch_model.fp16.bin"], "model.fp16.safetensors"),
        (["model.fp16.safetensors", "model.safetensors"], "model.safetensors"),
        (["pytorch_model.fp16.bin", "pytorch_model.bin"], "pytorch_model.bin"),
        (["diffusion_pytorch_model.safetensors", "model.safetensors"], "model.safetensors"),
        (
            ["diffusion_pytorch_model.non_ema.safetensors", "diffusion_pytorch_model.safetensors"],
            "diffusion_pytorch_model.safetensors",
        ),
        (
            ["model.safetensors.index.json", "model-00001-of-00002.safetensors"],
            "model.safetensors.index.json",
        ),
        (["model.safetensors", "model.safetensors.index.json"], "model.safetensors"),
        (["model.safetensors.index.fp16.json"], "model.safetensors.index.fp16.json"),
        (["model.fp16.safetensors.index.json"], "model.fp16.safetensors.index.json"),
        (["weights.ckpt", "model.pt", "model.onnx", "flax_model.msgpack"], None),
        (["model-00001-of-00002.safetensors"], None),
        ([], None),
    ],
)
def test_weights_are_those_that_the_pipeline_takes(names: list[str], chosen: str | None) -> None:
    found = choose_weights("text_encoder", names)
    assert (found and found.name) == chosen


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_of_diffusers_parts_the_shards_are_taken(part: str) -> None:
    stem = "diffusion_pytorch_model"
    whole, shards = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    found = choose_weights(part, ["model.safetensors", whole, shards, f"{stem}.bin"])
    assert found is not None
    assert found.name == shards


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"variant": "fp16"},
        {"sharded": True},
        {"sharded": True, "variant": "fp16"},
        {"bin": True},
        {"bin": True, "sharded": True, "variant": "fp16"},
        {"scheduler": "EulerDiscreteScheduler"},
    ],
    ids=str,
)
def test_every_published_layout_is_valid(make_model_folder: Make, options: dict[str, Any]) -> None:
    validate_folder(make_model_folder(**options))


@pytest.mark.parametrize(
    "entry",
    [
        {"unet": ["diffusers", "UNet3DConditionModel"]},
        {"unet": ["os", "UNet2DConditionModel"]},
        {"unet": ["diffusers.pipelines", "UNet2DConditionModel"]},
        {"unet": ["unet.evil", "UNet2DConditionModel"]},
        {"unet": ["diffusers", "UNet2DConditionModel", "more"]},
        {"unet": {"library": "diffusers"}},
        {"unet": ["diffusers", ["UNet2DConditionModel"]]},
        {"scheduler": ["builtins", "exec"]},
        {"tokenizer": ["transformers", "AutoTokenizer"]},
        {"extra": ["my_module", "Thing"]},
        {"image_encoder": ["transformers", "CLIPVisionModelWithProjection"]},
        {"_class_name": "StableDiffusionXLPipeline"},
        {"_class_name": ["pipeline", "Mine"]},
        {"_class_name": None},
    ],
    ids=str,
)
def test_a_class_outside_of_the_list_is_refused(
    make_model_folder: Make, entry: dict[str, Any]
) -> None:
    folder = make_model_folder()
    change(folder / "model_index.json", **entry)
    with pytest.raises(ModelArtifactError, match=r"model_index\.json"):
        validate_folder(folder)


def test_an_ordinary_safety_checker_is_allowed(make_model_folder: Make) -> None:
    folder = make_model_folder()
    change(
        folder / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
    )
    validate_folder(folder)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler"])
@pytest.mark.parametrize(
    "values",
    [
        {"auto_map": {"AutoModel": "evil.Model"}},
        {"trust_remote_code": True},
        {"_class_name": "Other"},
        {"architectures": ["Other"]},
        {"architectures": "Other"},
        {"architectures": {"Other": 1}},
        {"architectures": [["Other"]]},
        {"architectures": 7},
        {"_class_name": ["UNet2DConditionModel"]},
        {"_class_name": {"a": 1}},
        {"_class_name": 7},
        {"a": [{"auto_map": {"AutoModel": "evil.Model"}}]},
        {"transformer_layers_per_block": [1, [10**6]]},
        {"layers_per_block": 10**6},
        {"transformer_layers_per_block": [1, 10**6]},
        {"block_out_channels": [32] * 10**5},
    ],
    ids=str,
)
def test_a_configuration_that_asks_for_code_or_for_the_impossible_is_refused(
    make_model_folder: Make, part: str, values: dict[str, Any]
) -> None:
    folder = make_model_folder()
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    change(folder / part / name, **values)
    with pytest.raises(ModelArtifactError, match=f"{part}/{name}"):
        validate_folder(folder)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_named(make_model_folder: Make, part: str) -> None:
    folder = make_model_folder()
    (folder / part).rename(folder / "elsewhere")
    with pytest.raises(ModelArtifactError, match=f"{part}/ is missing"):
        validate_folder(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, '"text"', "\x00"])
def test_json_that_is_none_is_refused(make_model_folder: Make, content: str) -> None:
    folder = make_model_folder()
    (folder / "unet" / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelArtifactError, match=r"unet/config\.json"):
        validate_folder(folder)


def test_json_beyond_the_cap_is_refused(small_model_folder: Path) -> None:
    with pytest.raises(ModelArtifactError, match="larger than 20 bytes"):
        validate_folder(small_model_folder, limits=Limits(max_config_bytes=20))


def test_a_byte_order_mark_is_tolerated(make_model_folder: Make) -> None:
    folder = make_model_folder()
    index = folder / "model_index.json"
    index.write_bytes(b"\xef\xbb\xbf" + index.read_bytes())
    validate_folder(folder)


@pytest.mark.parametrize(
    "name", ["../../secret.safetensors", "/etc/passwd", "missing.safetensors", "model.bin"]
)
def test_an_index_that_points_elsewhere_is_refused(make_model_folder: Make, name: str) -> None:
    folder = make_model_folder(sharded=True)
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    change(index, weight_map={"a": name})
    with pytest.raises(ModelArtifactError, match="index"):
        weight_files(folder / "unet")


def test_other_pickles_are_no_weights(make_model_folder: Make) -> None:
    folder = make_model_folder()
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("model.ckpt"))
    with pytest.raises(ModelArtifactError, match=r"model\.ckpt is there.*no pickle but an old"):
        validate_folder(folder)


@pytest.mark.parametrize("name", ["v1-5.ckpt", "unet.pt"])
def test_a_pickle_gets_the_convert_command_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(bytes(100))
    with pytest.raises(ModelArtifactError, match="dreambooth convert FILE FOLDER"):
        validate_folder(tmp_path / name)


def test_a_file_that_only_is_called_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sd.safetensors").write_bytes(bytes(100))
    with pytest.raises(ModelArtifactError, match="not a valid safetensors file"):
        validate_folder(tmp_path / "sd.safetensors")


def test_a_link_to_nothing_is_no_weights(make_model_folder: Make) -> None:
    for options in ({}, {"bin": True}, {"sharded": True}):
        folder = make_model_folder(**options)
        file = next((folder / "unet").glob("*1-of*" if "sharded" in options else "*model.*"))
        file.unlink()
        file.symlink_to(folder / "blobs" / "gone")
        with pytest.raises(ModelArtifactError, match=f"{file.name} is a link to nothing"):
            validate_folder(folder)
