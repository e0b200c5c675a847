from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dreambooth.diffusion import model as models
from dreambooth.errors import ModelArtifactError
from dreambooth.evaluation import features, vision_model

CPU = torch.device("cpu")
MEAN, STD = (0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)  # CLIP's normalization


def pictures(count: int, side: int = 32) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 255, (side, side, 3), dtype=np.uint8) for _ in range(count)]


def of_folder(folder: Path) -> features.FeatureNetwork:
    return features.of_vision_model(vision_model.read(folder), CPU)


def test_vae_features_are_one_row_per_picture_whatever_the_company(
    small_model_folder: Path,
) -> None:
    network = features.of_vae(models.load(small_model_folder, device=CPU), CPU)
    rows = network(pictures(3))
    assert rows.shape == (3, 16)
    assert np.array_equal(rows[1:2], network(pictures(3)[1:2]))
    assert not np.array_equal(rows[0], rows[1])
    assert "VAE" in network.name


def test_the_vae_is_brought_to_the_device_from_where_it_waits(
    small_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.load(small_model_folder, device=CPU)
    device, moved = torch.device("cuda", 1), []
    monkeypatch.setattr(model.vae, "to", moved.append)
    features.of_vae(model, device)(pictures(2))
    assert set(moved) == {device}


SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.fixture
def vision_folder(tmp_path: Path) -> Path:
    config = transformers.CLIPVisionConfig(**SMALL, intermediate_size=64, projection_dim=8)
    torch.manual_seed(0)
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


@pytest.fixture
def vit_folder(tmp_path: Path) -> Path:
    """Return a ViT folder without a pooler, as DINO's are published."""
    config = transformers.ViTConfig(**SMALL, intermediate_size=64)
    torch.manual_seed(0)
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def test_a_vision_models_folder_gives_its_pooled_features(vision_folder: Path) -> None:
    network = of_folder(vision_folder)
    rows = network(pictures(2, side=64))
    assert rows.shape == (2, 8)
    assert np.isfinite(rows).all()
    assert "CLIPVisionModelWithProjection" in network.name
    own = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (vision_folder / "preprocessor_config.json").write_text(json.dumps(own))
    changed = of_folder(vision_folder)(pictures(2, side=64))
    assert not np.allclose(rows, changed)


def test_other_folders_are_refused_in_one_sentence(vision_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelArtifactError, match=r"config\.json"):
        of_folder(tmp_path / "none")
    config = json.loads((vision_folder / "config.json").read_text())
    for changes, sentence in (
        ({"model_type": "bert"}, "is expected"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "code of its own"),
    ):
        (vision_folder / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(ModelArtifactError, match=sentence):
            of_folder(vision_folder)
    (vision_folder / "config.json").write_text(json.dumps(config))
    (vision_folder / "preprocessor_config.json").write_text('{"image_mean": "grey"}')
    with pytest.raises(ModelArtifactError, match="image_mean"):
        of_folder(vision_folder)
    (vision_folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelArtifactError, match=r"model\.safetensors"):
        of_folder(vision_folder)


def test_a_vit_without_a_pooler_gives_its_cls_token_each_time(vit_folder: Path) -> None:
    first, second = (of_folder(vit_folder)(pictures(2, side=28)) for _ in range(2))
    assert np.array_equal(first, second)
    mean, std = (torch.tensor(numbers).reshape(3, 1, 1) for numbers in (MEAN, STD))
    pixels = torch.tensor(np.stack(pictures(2, side=28))).permute(0, 3, 1, 2) / 255.0
    network = transformers.ViTModel.from_pretrained(vit_folder, add_pooling_layer=False).eval()
    with torch.no_grad():
        theirs = network((pixels - mean) / std).last_hidden_state[:, 0]
    assert np.allclose(first, theirs, atol=1e-5)


def test_a_poolers_weights_change_nothing(vit_folder: Path, tmp_path: Path) -> None:
    # The pooler is added with random weights.
    whole = transformers.ViTModel.from_pretrained(vit_folder)
    whole.save_pretrained(tmp_path / "whole")
    rows = [of_folder(folder)(pictures(2)) for folder in (vit_folder, tmp_path / "whole")]
    assert np.array_equal(*rows)


def test_dinov2_gives_the_cls_token_behind_its_last_norm(tmp_path: Path) -> None:
    network = transformers.Dinov2Model(transformers.Dinov2Config(**SMALL)).eval()
    network.save_pretrained(tmp_path / "dinov2")
    own = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    (tmp_path / "dinov2" / "preprocessor_config.json").write_text(json.dumps(own))
    rows = of_folder(tmp_path / "dinov2")(pictures(2, side=28))
    with torch.no_grad():
        pixels = torch.tensor(np.stack(pictures(2, side=28))).permute(0, 3, 1, 2) / 255.0
        theirs = network(pixels).pooler_output
    assert np.allclose(rows, theirs, atol=1e-5)


def test_a_whole_clip_model_gives_what_its_vision_half_gives(
    vision_folder: Path, tmp_path: Path
) -> None:
    vision = json.loads((vision_folder / "config.json").read_text())
    text = {**SMALL, "intermediate_size": 32, "vocab_size": 64, "bos_token_id": 1}
    config = transformers.CLIPConfig(
        text_config={**text, "eos_token_id": 2}, vision_config=vision, projection_dim=8
    )
    whole = transformers.CLIPModel(config)
    half = transformers.CLIPVisionModelWithProjection.from_pretrained(vision_folder)
    whole.vision_model.load_state_dict(half.vision_model.state_dict())
    whole.visual_projection.load_state_dict(half.visual_projection.state_dict())
    whole.save_pretrained(tmp_path / "whole")
    rows = [of_folder(folder)(pictures(2)) for folder in (vision_folder, tmp_path / "whole")]
    assert np.allclose(*rows, atol=1e-6)


@pytest.mark.parametrize("name", ["clip", "vit"])
def test_both_sides_of_the_picture_may_be_given(
    name: str, vision_folder: Path, vit_folder: Path
) -> None:
    folder = {"clip": vision_folder, "vit": vit_folder}[name]
    before = of_folder(folder)(pictures(2))
    change(folder, image_size=[28, 28])
    assert np.array_equal(before, of_folder(folder)(pictures(2)))


def test_a_vit_of_oblong_pictures_is_fed_oblong_pictures(tmp_path: Path) -> None:
    config = transformers.ViTConfig(**{**SMALL, "image_size": [28, 42]}, intermediate_size=64)
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "oblong")
    assert of_folder(tmp_path / "oblong")(pictures(2)).shape == (2, 32)


def test_half_precision_is_read_as_float32(vit_folder: Path) -> None:
    whole = of_folder(vit_folder)(pictures(2))
    path = vit_folder / "model.safetensors"
    halves = {name: weight.half() for name, weight in load_file(path).items()}
    save_file(halves, path, {"format": "pt"})
    change(vit_folder, dtype="float16")
    assert np.allclose(whole, of_folder(vit_folder)(pictures(2)), atol=1e-2)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_hidden_layers": 2}, "lacks the weights layers.1."),
        ({"hidden_size": 34}, "in other shapes than its config.json"),
        ({"hidden_act": "magic"}, "cannot be loaded"),
        ({"hidden_size": None}, "cannot be loaded"),
        ({"num_attention_heads": 0}, "cannot be loaded"),
    ],
)
def test_a_folder_that_does_not_fit_its_weights_is_refused(
    vit_folder: Path, changes: dict[str, object], sentence: str
) -> None:
    change(vit_folder, **changes)
    with pytest.raises(ModelArtifactError) as caught:
        of_folder(vit_folder)
    assert str(caught.value).startswith("fid_features: ")
    assert sentence in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_clip_without_its_projection_is_refused(vision_folder: Path) -> None:
    path = vision_folder / "model.safetensors"
    weights = load_file(path)
    del weights["visual_projection.weight"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ModelArtifactError, match=r"lacks the weights visual_projection\.weight:"):
        of_folder(vision_folder)


def test_weights_that_are_not_finite_are_refused(vit_folder: Path) -> None:
    path = vit_folder / "model.safetensors"
    weights = load_file(path)
    weights["layernorm.weight"][3] = torch.nan
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ModelArtifactError, match=r"not finite in layernorm\.weight:"):
        of_folder(vit_folder)


def test_features_that_are_not_finite_are_refused() -> None:
    network = features.FeatureNetwork(name="a test", one=lambda _: torch.tensor([1.0, torch.inf]))
    with pytest.raises(ModelArtifactError, match="Features of a test are not finite"):
        network(pictures(2))


def test_loading_says_nothing_and_leaves_the_library_as_it_was(
    vit_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    transformers.ViTModel.from_pretrained(vit_folder).save_pretrained(tmp_path / "whole")
    library = transformers.utils.logging
    before = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity_info()
    try:
        capfd.readouterr()
        of_folder(tmp_path / "whole")  # the folder holds weights that the features do not use
        shown = capfd.readouterr()
        assert shown.out + shown.err == ""
        assert library.get_verbosity() == library.INFO
        assert library.is_progress_bar_enabled() == before[1]
    finally:
        library.set_verbosity(before[0])


def change(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
