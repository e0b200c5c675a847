"""A faulty fid_features folder is refused with one sentence before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dreambooth.errors import ModelArtifactError
from dreambooth.evaluation import vision_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "vision"
    made.mkdir()
    (made / "config.json").write_text('{"model_type": "vit"}')
    save_file({"weight": np.zeros(2, np.float32)}, made / "model.safetensors")
    return made


def write(folder: Path, config: object, preprocessor: object = None) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))


def test_defaults_are_the_librarys_and_clips(folder: Path) -> None:
    found = vision_model.read(folder)
    assert (found.kind, found.height, found.width) == ("vit", 224, 224)
    assert found.mean == pytest.approx((0.48, 0.46, 0.41), abs=0.01)
    assert found.std == pytest.approx((0.27, 0.26, 0.28), abs=0.01)


def test_a_folders_own_values_are_read(folder: Path) -> None:
    own = {"image_mean": [0, 0.5, 1], "image_std": [1, 0.5, 2]}
    write(folder, {"model_type": "dinov2", "image_size": [28, 42]}, own)
    found = vision_model.read(folder)
    assert (found.height, found.width) == (28, 42)
    assert found.config["image_size"] == [28, 42]
    assert (found.mean, found.std) == ((0.0, 0.5, 1.0), (1.0, 0.5, 2.0))
    write(folder, {"model_type": "clip", "vision_config": {"image_size": [28, 28]}})
    assert vision_model.read(folder).config == {"image_size": 28}


def test_what_would_run_code_or_change_the_weights_is_left_out(folder: Path) -> None:
    unwanted = {"_attn_implementation": "a/kernel", "attn_implementation": "a/kernel"}
    unwanted |= {"torch_dtype": "float16", "dtype": "float16"}
    quantised = {"quantization_config": {"quant_method": "bitsandbytes"}}
    write(folder, {"model_type": "vit", "hidden_size": 8, **unwanted, **quantised})
    assert vision_model.read(folder).config == {
        "model_type": "vit",
        "hidden_size": 8,
        "image_size": 224,
    }


@pytest.mark.parametrize(
    ("config", "preprocessor", "sentence"),
    [
        ({"model_type": "clip", "vision_config": None}, None, "vision_config as null"),
        ({"model_type": "clip"}, None, "vision_config as null"),
        ({"model_type": "clip", "vision_config": [1]}, None, "vision_config as [1]"),
        ({"model_type": "clip_vision_model", "image_size": [28, 42]}, None, "42 x 28 pixels"),
        ({"model_type": "vit", "image_size": None}, None, "image_size as null"),
        ({"model_type": "vit", "image_size": 0}, None, "image_size as 0"),
        ({"model_type": "vit", "image_size": True}, None, "image_size as true"),
        ({"model_type": "vit", "image_size": [28]}, None, "image_size as [28]"),
        ({"model_type": "vit", "image_size": {"height": 28}}, None, "image_size as {"),
        ({"model_type": "vit", "num_channels": 1}, None, "1 channels"),
        ({"model_type": ["vit"]}, None, "is of the type ['vit']"),
        ({"model_type": "vit", "auto_map": {"AutoModel": "x.Y"}}, None, "code of its own"),
        ({"model_type": "vit"}, {"image_std": [0, 0, 0]}, "three positive numbers"),
        ({"model_type": "vit"}, {"image_std": [1, 1, 1e-300]}, "three positive numbers"),
        ({"model_type": "vit"}, {"image_std": None}, "image_std as null"),
        ({"model_type": "vit"}, {"image_mean": [0.5, 0.5]}, "three numbers"),
        ({"model_type": "vit"}, {"image_mean": [0.5, 0.5, float("nan")]}, "three numbers"),
        ({"model_type": "vit"}, {"image_mean": [0.5, 0.5, 10**99]}, "three numbers"),
        ({"model_type": "vit"}, {"image_mean": [0.5, 0.5, 10**400]}, "a number has 401 digits"),
        ({"model_type": "vit"}, {"image_mean": [True, 0.5, 0.5]}, "three numbers"),
        ([], None, "one JSON object"),
    ],
)
def test_a_wrong_setting_is_reported_in_one_sentence(
    folder: Path, config: object, preprocessor: object, sentence: str
) -> None:
    write(folder, config, preprocessor)
    with pytest.raises(ModelArtifactError) as caught:
        vision_model.read(folder)
    assert str(caught.value).startswith("fid_features: ")
    assert sentence in str(caught.value)
    assert str(folder) in str(caught.value)


def test_weights_must_be_there_and_be_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\0\1\2")
    with pytest.raises(ModelArtifactError, match=r"model\.safetensors is not a valid"):
        vision_model.read(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelArtifactError, match="holds no weights"):
        vision_model.read(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\2K\1.")
    with pytest.raises(ModelArtifactError, match="is a pickle; safetensors are expected"):
        vision_model.read(folder)


def test_a_folder_that_is_none_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none", tmp_path / "file"):
        with pytest.raises(ModelArtifactError, match="There is no folder"):
            vision_model.read(path)
