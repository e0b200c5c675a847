from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from dreambooth.diffusion import model as models
from dreambooth.errors import ModelArtifactError
from dreambooth.evaluation import features

CPU = torch.device("cpu")


def pictures(count: int, side: int = 32) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 255, (side, side, 3), dtype=np.uint8) for _ in range(count)]


def test_vae_features_are_one_row_per_picture_whatever_the_company(
    small_model_folder: Path,
) -> None:
    network = features.of_vae(models.load(small_model_folder, device=CPU))
    rows = network(pictures(3))
    assert rows.shape == (3, 16)
    assert np.array_equal(rows[1:2], network(pictures(3)[1:2]))
    assert not np.array_equal(rows[0], rows[1])
    assert "VAE" in network.name


@pytest.fixture
def vision_folder(tmp_path: Path) -> Path:
    config = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        projection_dim=8,
    )
    torch.manual_seed(0)
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def test_a_vision_models_folder_gives_its_pooled_features(vision_folder: Path) -> None:
    network = features.of_vision_model(vision_folder, CPU)
    rows = network(pictures(2, side=64))
    assert rows.shape == (2, 8)
    assert np.isfinite(rows).all()
    assert "CLIPVisionModelWithProjection" in network.name
    own = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (vision_folder / "preprocessor_config.json").write_text(json.dumps(own))
    changed = features.of_vision_model(vision_folder, CPU)(pictures(2, side=64))
    assert not np.allclose(rows, changed)


def test_other_folders_are_refused_in_one_sentence(vision_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelArtifactError, match=r"config\.json"):
        features.of_vision_model(tmp_path / "none", CPU)
    config = json.loads((vision_folder / "config.json").read_text())
    for changes in ({"model_type": "bert"}, {"auto_map": {"AutoModel": "evil.Model"}}):
        (vision_folder / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(ModelArtifactError, match="is expected"):
            features.of_vision_model(vision_folder, CPU)
    (vision_folder / "config.json").write_text(json.dumps(config))
    (vision_folder / "preprocessor_config.json").write_text('{"image_mean": "grey"}')
    with pytest.raises(ModelArtifactError, match="image_mean"):
        features.of_vision_model(vision_folder, CPU)
    (vision_folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelArtifactError, match=r"model\.safetensors"):
        features.of_vision_model(vision_folder, CPU)
