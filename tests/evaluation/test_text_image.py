from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from dreambooth.errors import ModelArtifactError
from dreambooth.evaluation import text_image

CPU = torch.device("cpu")
PROMPT = "a photo of a cat on the beach"
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.fixture
def clip(tmp_path: Path, small_model_folder: Path) -> Path:
    """Return the folder of a whole miniature CLIP model."""
    own = json.loads((small_model_folder / "text_encoder" / "config.json").read_text("utf-8"))
    ids = {name: own[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
    config = transformers.CLIPConfig(
        text_config={**TOWER, **ids, "max_position_embeddings": 32},
        vision_config={**TOWER, "image_size": 28, "patch_size": 14},
        projection_dim=8,
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(tmp_path / "clip")
    for path in (small_model_folder / "tokenizer").iterdir():
        shutil.copy(path, tmp_path / "clip")
    return tmp_path / "clip"


def test_the_fit_is_what_the_whole_model_finds(clip: Path) -> None:
    generator = np.random.default_rng(0)
    pictures = [generator.integers(0, 255, (28, 28, 3), dtype=np.uint8) for _ in range(3)]
    reader = text_image.load(str(clip), CPU)
    found = reader.fit(reader.pictures(pictures), PROMPT)
    whole = transformers.CLIPModel.from_pretrained(clip).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(clip)
    mean, std = (
        torch.tensor(n)[:, None, None] for n in ((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758))
    )
    pixels = torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2) / 255.0
    ids = tokenizer([PROMPT], padding="max_length", max_length=32, return_tensors="pt").input_ids
    with torch.no_grad():
        out = whole(pixel_values=(pixels - mean) / std, input_ids=ids)
    theirs = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
    assert np.allclose(found, theirs.numpy(), atol=1e-5)


def test_other_folders_are_refused_by_the_options_name(
    clip: Path, small_model_folder: Path, tmp_path: Path
) -> None:
    config = json.loads((clip / "config.json").read_text("utf-8"))
    (clip / "config.json").write_text(json.dumps({**config, "text_config": None}))
    with pytest.raises(ModelArtifactError, match="--text_image"):
        text_image.load(str(clip), CPU)
    with pytest.raises(ModelArtifactError, match="--text_image"):
        text_image.load(str(tmp_path / "none"), CPU)
