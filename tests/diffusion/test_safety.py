from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig

from dreambooth.diffusion import model as models
from dreambooth.diffusion import safety
from dreambooth.diffusion.sampling_request import SamplingRequest
from dreambooth.errors import ModelArtifactError
from dreambooth.model_folder import feature_extractor
from dreambooth.model_folder.feature_extractor import ClipInput
from dreambooth.serving.engine.drawing_jobs import DrawingJob
from dreambooth.serving.engine.engine import open_engine
from dreambooth.serving.engine.worker import Worker
from dreambooth.settings.serve_options import ServeSettings

CPU = torch.device("cpu")
SIDE = 32
CONFIG = {
    "architectures": ["StableDiffusionSafetyChecker"],
    "model_type": "clip",
    "projection_dim": 8,
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 16,
        "projection_dim": 8,
        "model_type": "clip_vision_model",
    },
}
# feature_extractor/preprocessor_config.json of Stable Diffusion 2.1 base, at this test's size.
PREPROCESSOR = {
    "crop_size": {"height": SIDE, "width": SIDE},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPFeatureExtractor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": SIDE},
}
Maker = Callable[..., Path]


@pytest.fixture
def make_folder(make_model_folder: Callable[..., Path]) -> Maker:
    """Return a function that writes a model folder with a safety checker.

    A cosine threshold of -2 makes the checker hide every picture, +2 none.
    """

    def make(*, threshold: float = 2.0, bin: bool = False, **config: Any) -> Path:
        folder = make_model_folder()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = StableDiffusionSafetyChecker(CLIPConfig.from_dict(CONFIG))
        state = network.state_dict()
        for name in ("concept_embeds", "special_care_embeds"):
            state[name] = torch.ones_like(state[name])
            state[f"{name}_weights"] = torch.full_like(state[f"{name}_weights"], threshold)
        # Published folders use the names of transformers 4.x.
        inner = "vision_model.vision_model."
        state = {
            key.replace("vision_model.", inner, 1) if not key.startswith(inner) else key: value
            for key, value in state.items()
        }
        state[inner + "embeddings.position_ids"] = torch.arange(5)[None]
        part = folder / "safety_checker"
        part.mkdir()
        if bin:
            torch.save(state, part / "pytorch_model.bin")
        else:
            save_file(state, part / "model.safetensors", {"format": "pt"})
        (part / "config.json").write_text(json.dumps(CONFIG | config))
        extractor = folder / "feature_extractor"
        extractor.mkdir()
        (extractor / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
        index = json.loads((folder / "model_index.json").read_text())
        index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
        index["feature_extractor"] = ["transformers", "CLIPFeatureExtractor"]
        (folder / "model_index.json").write_text(json.dumps(index))
        return folder

    return make


def picture(width: int = 48, height: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("bin", [False, True])
@pytest.mark.parametrize(("threshold", "hidden"), [(-2.0, True), (2.0, False)])
def test_a_checker_hides_what_lies_above_its_thresholds(
    make_folder: Maker, threshold: float, hidden: bool, bin: bool
) -> None:
    checker = safety.load(
        make_folder(threshold=threshold, bin=bin), device=CPU, dtype=torch.float32
    )
    assert checker is not None
    assert checker.hides(picture()) is hidden


def test_a_checker_that_yields_no_numbers_hides_the_picture(
    make_folder: Maker, caplog: pytest.LogCaptureFixture
) -> None:
    checker = safety.load(make_folder(), device=CPU, dtype=torch.float32)
    assert checker is not None
    network = checker._network
    network.visual_projection.weight.fill_(float("nan"))
    assert checker.hides(picture())
    assert "not finite" in caplog.text


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_configuration_cannot_ask_for_a_kernel(make_folder: Maker, key: str) -> None:
    evil = {key: "someone/evil-kernel"}
    vision = {**CONFIG["vision_config"], **evil}
    checker = safety.load(
        make_folder(vision_config=vision, **evil), device=CPU, dtype=torch.float32
    )
    assert checker is not None
    config = checker._network.config
    assert (
        "evil" not in f"{config._attn_implementation} {config.vision_config._attn_implementation}"
    )


def test_a_folder_without_a_checker_has_none(small_model_folder: Path) -> None:
    assert safety.load(small_model_folder, device=CPU, dtype=torch.float32) is None


@pytest.mark.parametrize("threshold", [-2.0, 2.0])
def test_the_engine_says_what_was_hidden(make_folder: Maker, threshold: float) -> None:
    folder = make_folder(threshold=threshold)
    model = models.load(folder, device=CPU)
    checker = safety.load(folder, device=CPU, dtype=torch.float32)
    engine = Worker(model, batch_rows=None, max_rows=4, safety_checker=checker)
    job = DrawingJob([SamplingRequest(prompt="a cat", num_inference_steps=2, seed=1)])
    engine.add(job)
    while engine.has_work:
        engine.run_round()
    (drawn,) = job.result(timeout=0)
    hidden = threshold < 0
    assert drawn.finish_reason == ("CONTENT_FILTERED" if hidden else "SUCCESS")
    assert bool(drawn.pixels.any()) is not hidden


@pytest.mark.parametrize("wanted", [True, False])
def test_the_checker_can_be_switched_off(make_folder: Maker, wanted: bool) -> None:
    settings = ServeSettings(model="", safety_checker=wanted)
    with open_engine(make_folder(threshold=-2.0), settings, warm_up_budget_s=0.0) as e:
        request = SamplingRequest(prompt="a cat", num_inference_steps=1, seed=1)
        (drawn,) = e.submit([request]).result(60)
    assert drawn.finish_reason == ("CONTENT_FILTERED" if wanted else "SUCCESS")


@pytest.mark.parametrize("size", [(48, 40), (32, 32), (24, 90), (512, 300), (33, 32)])
def test_pictures_are_prepared_as_transformers_prepares_them(size: tuple[int, int]) -> None:
    transformers = pytest.importorskip("transformers")
    processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    options = {k: v for k, v in PREPROCESSOR.items() if not k.endswith("_type")}
    pixels = picture(*size)
    expected = processor(**options)(Image.fromarray(pixels), return_tensors="np").pixel_values
    clip_input = ClipInput(shortest_edge=SIDE, crop=(SIDE, SIDE))
    np.testing.assert_allclose(safety.prepare(pixels, clip_input).numpy(), expected, atol=1e-5)


def test_old_and_new_preprocessor_files_say_the_same(tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(PREPROCESSOR))
    new = feature_extractor.read(tmp_path)
    old = {k: v for k, v in PREPROCESSOR.items() if "rescale" not in k}
    path.write_text(json.dumps(old | {"size": SIDE, "crop_size": SIDE}))
    assert feature_extractor.read(tmp_path) == new
    assert (new.shortest_edge, new.crop) == (SIDE, (SIDE, SIDE))


def test_what_is_switched_off_is_left_out(tmp_path: Path) -> None:
    off = {f"do_{what}": False for what in ("resize", "center_crop", "rescale", "normalize")}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR | off))
    pixels = picture()
    prepared = safety.prepare(pixels, feature_extractor.read(tmp_path))
    np.testing.assert_array_equal(prepared[0].numpy().transpose(1, 2, 0), pixels)


@pytest.mark.parametrize(
    "change",
    [
        {"size": {"width": 3}},
        {"size": {"shortest_edge": SIDE, "longest_edge": 2 * SIDE}},
        {"size": SIDE, "default_to_square": True},
        {"size": SIDE, "use_square_size": True},
        {"do_pad": True, "pad_size": 64},
        {"size": 10**6},
        {"size": True},
        {"crop_size": -1},
        {"image_mean": [1, 2]},
        {"image_std": [1, 2, "x"]},
        {"image_std": [1, 0, 1]},
        {"resample": 77},
        {"rescale_factor": None},
        {"image_processor_type": "Foreign"},
        {"image_processor_type": ["CLIPImageProcessor"]},
        {"feature_extractor_type": {"a": 1}},
    ],
)
def test_a_preprocessor_file_without_sense_is_reported(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR | change))
    with pytest.raises(ModelArtifactError, match="preprocessor_config"):
        feature_extractor.read(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["Foreign"]},
        {"auto_map": {"AutoModel": "x.Y"}},
        {"vision_config": CONFIG["vision_config"] | {"num_hidden_layers": 10**9}},
        {"vision_config": CONFIG["vision_config"] | {"hidden_size": 64}},
        {"vision_config": CONFIG["vision_config"] | {"hidden_size": 17}},
        {"vision_config": CONFIG["vision_config"] | {"image_size": 10**5, "patch_size": 1}},
        {"vision_config": "none"},
        {"vision_config": CONFIG["vision_config"] | {"hidden_size": 10**9}},
        {"vision_config": CONFIG["vision_config"] | {"patch_size": [1, [10**9]]}},
        {"vision_config": CONFIG["vision_config"] | {"hidden_act": "evil"}},
        {"vision_config": CONFIG["vision_config"] | {"layer_norm_eps": "small"}},
        {"vision_config": CONFIG["vision_config"] | {"attention_dropout": "much"}},
        {"vision_config": CONFIG["vision_config"] | {"dtype": "evil"}},
        {"vision_config": None, "projection_dim": 10**9},
        {"projection_dim": 10**6},
        {"projection_dim": "wide"},
        {"architectures": [["StableDiffusionSafetyChecker"]]},
        {"architectures": {"a": 1}},
        {"architectures": "Foreign"},
    ],
    ids=str,
)
def test_a_checker_that_cannot_run_is_reported_and_not_passed_over(
    make_folder: Maker, config: dict[str, Any]
) -> None:
    with pytest.raises(ModelArtifactError, match="safety_checker"):
        safety.load(make_folder(**config), device=CPU, dtype=torch.float32)


def test_a_checker_that_sees_another_size_is_reported(make_folder: Maker) -> None:
    folder = make_folder()
    path = folder / "feature_extractor" / "preprocessor_config.json"
    path.write_text(json.dumps(PREPROCESSOR | {"crop_size": 16}))
    with pytest.raises(ModelArtifactError, match="32 x 32"):
        safety.load(folder, device=CPU, dtype=torch.float32)
