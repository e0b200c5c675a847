"""Miniatures with the configurations of Stable Diffusion 1.x and 2.x, through the whole job.

Only widths and depths are smaller; all other settings are those of the published folders, as are
the names, keys and index of the files of 2022 and 2023.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from dreambooth.diffusion import model as models
from dreambooth.job.run import run_job
from tests.conftest import write_safety_checker

pytestmark = pytest.mark.usefixtures("class_images_of_four_steps")
Make = Callable[..., Path]
CPU = torch.device("cpu")
TOKENS, VOCABULARY = 32, 560
WIDTHS = (16, 32, 32, 32)
BLOCKS = {
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
}
# The published noise schedulers of 2.x add prediction_type to these.
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The settings in which generations of Stable Diffusion differ."""

    scheduler: dict[str, Any]
    unet: dict[str, Any]
    text_encoder: dict[str, Any]
    safety_checker: bool = False
    index: dict[str, Any] = field(default_factory=dict)


STABLE_DIFFUSION_1 = Shape(
    scheduler=SCHEDULER,  # without a prediction_type
    unet={"attention_head_dim": 8},  # one number for all blocks; convolutions as projections
    text_encoder={"hidden_act": "quick_gelu", "num_hidden_layers": 2, "projection_dim": 24},
    safety_checker=True,
)
STABLE_DIFFUSION_2_BASE = Shape(
    scheduler={**SCHEDULER, "prediction_type": "epsilon"},
    unet={
        "attention_head_dim": [2, 4, 4, 4],
        "use_linear_projection": True,
        "dual_cross_attention": False,
        "only_cross_attention": False,
        "num_class_embeds": None,
    },
    text_encoder={"hidden_act": "gelu", "num_hidden_layers": 3, "projection_dim": 24},
)
STABLE_DIFFUSION_2_768 = Shape(
    scheduler={
        **SCHEDULER,
        "_class_name": "DDIMScheduler",
        "prediction_type": "v_prediction",
    },
    unet={**STABLE_DIFFUSION_2_BASE.unet, "upcast_attention": True},
    text_encoder=STABLE_DIFFUSION_2_BASE.text_encoder,
)
SHAPES = {
    "1.x": STABLE_DIFFUSION_1,
    "2.x base": STABLE_DIFFUSION_2_BASE,
    "2.x 768": STABLE_DIFFUSION_2_768,
}


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write(folder: Path, shape: Shape) -> Path:
    """Replace all parts of a miniature except the tokenizer by those of a published shape."""
    for path in folder.glob("*/*.safetensors"):
        path.unlink()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        UNet2DConditionModel(
            sample_size=8,
            block_out_channels=WIDTHS,
            norm_num_groups=8,
            cross_attention_dim=32,
            **BLOCKS,
            **shape.unet,
        ).save_pretrained(folder / "unet")
        AutoencoderKL(
            sample_size=64,
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            norm_num_groups=4,
        ).save_pretrained(folder / "vae")
        text = CLIPTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            bos_token_id=VOCABULARY - 2,
            eos_token_id=VOCABULARY - 1,
            **shape.text_encoder,
        )
        CLIPTextModel(text).save_pretrained(folder / "text_encoder")
        if shape.safety_checker:
            write_safety_checker(folder)
            write_special_tokens(folder / "tokenizer")
    write_json(folder / "scheduler" / "scheduler_config.json", shape.scheduler)
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    index["scheduler"] = ["diffusers", shape.scheduler["_class_name"]]
    if shape.safety_checker:
        index["requires_safety_checker"] = True
    write_json(folder / "model_index.json", index)
    return folder


def write_special_tokens(folder: Path) -> None:
    """Write special tokens as in 1.x: full tables of a named class, padded with the end token."""
    how = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    names["unk_token"] = "<|endoftext|>"
    tables = {name: {"content": text, **how} for name, text in names.items()}
    pad = {"pad_token": "<|endoftext|>"}
    write_json(folder / "special_tokens_map.json", tables | pad)
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    for name, table in tables.items():
        settings[name] = {"__type": "AddedToken", **table}
    write_json(folder / "tokenizer_config.json", settings | pad)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos")


def write_photos(folder: Path) -> Path:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(2):
        pixels = generator.integers(0, 255, (80, 72, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    prompts = {"instance_prompt": "a photo of riobugger cat", "class_prompt": "a photo of cat"}
    write_json(folder / "dataset_info.json", prompts)
    return folder


def train(model: Path, photos: Path, out: Path, *more: str) -> None:
    arguments = ["--pretrained-model", str(model), "--train", str(photos), "--model_dir", str(out)]
    assert run_job([*arguments, "--max_steps=2", "--learning_rate=0.01", *more], {}) == 0


@pytest.fixture(scope="module")
def earlier_model(make_model_folder: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model that an earlier run has written."""
    place = tmp_path_factory.mktemp("earlier")
    train(make_model_folder(), write_photos(place / "photos"), place / "model")
    return place / "model"


def plain(folder: Path, **options: Any) -> Any:
    """Load a folder with plain diffusers, including its safety checker."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    result = pipeline(
        "a photo of a cat", num_inference_steps=3, generator=generator, output_type="np"
    )
    picture: np.ndarray = result.images[0]
    return picture


@pytest.mark.parametrize("prior", [False, True], ids=["alone", "prior preservation"])
@pytest.mark.parametrize("name", SHAPES)
def test_each_shape_trains_and_comes_out_as_plain_diffusers_loads_it(
    make_model_folder: Make, photos: Path, tmp_path: Path, name: str, prior: bool
) -> None:
    shape = SHAPES[name]
    base, out = write(make_model_folder(), shape), tmp_path / "mine"
    options = ["--with_prior_preservation", "--num_class_images=1"] if prior else []
    train(base, photos, out, *options)
    lines = (tmp_path / "mine-output" / "metrics.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(np.isfinite(row["loss"]) for row in rows)
    pipeline = plain(out)
    assert type(pipeline.scheduler).__name__ == shape.scheduler["_class_name"]
    expected = shape.scheduler.get("prediction_type", "epsilon")
    assert pipeline.scheduler.config.prediction_type == expected
    for key, value in shape.unet.items():
        assert pipeline.unet.config[key] == value
    picture = draw(pipeline)
    assert picture.shape == (64, 64, 3)
    assert not np.array_equal(picture, draw(plain(base)))
    index, base_index = (
        json.loads((f / "model_index.json").read_text("utf-8")) for f in (out, base)
    )
    assert index == base_index
    assert (pipeline.safety_checker is not None) == shape.safety_checker
    assert (pipeline.feature_extractor is not None) == shape.safety_checker


def test_the_tokens_of_1_x_are_padded_by_the_ends_token(make_model_folder: Make) -> None:
    base = write(make_model_folder(), STABLE_DIFFUSION_1)
    model, pipeline = models.load(base, device=CPU), plain(base)
    ids = models.tokenize(model, ["a photo of a cat"])
    assert ids[0, -1] == VOCABULARY - 1
    expected, _ = pipeline.encode_prompt("a photo of a cat", CPU, 1, False)
    assert torch.equal(models.encode_text(model, ids), expected)


def test_the_safety_checker_comes_out_as_it_was(
    make_model_folder: Make, photos: Path, tmp_path: Path
) -> None:
    base, out = write(make_model_folder(), STABLE_DIFFUSION_1), tmp_path / "mine"
    train(base, photos, out)
    before, after = (load_file(f / "safety_checker" / "model.safetensors") for f in (base, out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    for pipeline in (plain(base), plain(out)):
        torch.nn.init.constant_(pipeline.safety_checker.concept_embeds_weights, -9.0)
        assert not draw(pipeline).any()  # the checker still hides what it should


# A file of a model folder, what it says instead, and whether a dry run can tell.
FAULTS = {
    "feature_extractor/preprocessor_config.json": ({"size": {"longest": 3}}, True),
    "safety_checker/config.json": ({"architectures": ["Evil"]}, True),
    "unet/config.json": ({"only_cross_attention": [True, 3, None]}, False),
    "text_encoder/config.json": ({"num_attention_heads": 3}, False),
    "scheduler/scheduler_config.json": ({"trained_betas": [0.5]}, False),
    "vae/config.json": ({"out_channels": 4}, False),
}


@pytest.mark.parametrize("prior", [False, True], ids=["alone", "class images"])
@pytest.mark.parametrize("faulty", FAULTS)
def test_a_model_that_is_refused_leaves_an_earlier_one_whole(
    make_model_folder: Make,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    earlier_model: Path,
    faulty: str,
    prior: bool,
) -> None:
    base, out = write(make_model_folder(), STABLE_DIFFUSION_1), tmp_path / "mine"
    shutil.copytree(earlier_model, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    change, is_seen_by_a_dry_run = FAULTS[faulty]
    config = json.loads((base / faulty).read_text("utf-8"))
    (base / faulty).write_text(json.dumps(config | change))
    argv = [f"--pretrained-model={base}", f"--train={photos}", f"--model_dir={out}"]
    argv += ["--with_prior_preservation=True", "--num_class_images=1"] if prior else []
    for more in ["--dry-run"] * is_seen_by_a_dry_run, []:
        capsys.readouterr()
        assert run_job([*argv, "--max_steps=1", *more], {}) == 1
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
        shown = capsys.readouterr().err.splitlines()
        assert shown[-1].startswith("error: ")
        assert faulty in shown[-1] or faulty.split("/")[0] in shown[-1]
        assert not any("training: " in line for line in shown)


@pytest.mark.parametrize("hides", [False, True])
def test_a_sample_picture_that_the_safety_checker_hides_is_not_kept(
    make_model_folder: Make,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    hides: bool,
) -> None:
    base = write_safety_checker(make_model_folder(), hides=hides)
    train(base, photos, tmp_path / "mine")
    assert ("safety checker hides it" in capsys.readouterr().err) is hides
    assert (tmp_path / "mine" / "samples").exists() is not hides


OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def old_vae(key: str) -> str:
    for new, old in OLD_NAMES.items():
        key = key.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
    return key


def as_in_2022(
    folder: Path, *, variant: str = "", bin: bool = False, convolutions: bool = False
) -> Path:
    """Give the weights the names, keys and files in which they were first published."""
    for part in ("unet", "vae", "text_encoder", "safety_checker"):
        (file,) = (folder / part).glob("*.safetensors")
        state = load_file(file)
        file.unlink()
        if variant:
            state = {key: tensor.half() for key, tensor in state.items()}
        if part == "vae":
            state = {old_vae(key): tensor for key, tensor in state.items()}
            if convolutions:
                state = {
                    key: t[:, :, None, None] if ".attentions." in key and t.ndim == 2 else t
                    for key, t in state.items()
                }
        if part == "text_encoder":
            state = {f"text_model.{k.removeprefix('text_model.')}": t for k, t in state.items()}
            state["text_model.embeddings.position_ids"] = torch.arange(TOKENS)[None]
        if part == "safety_checker":
            name = "vision_model.vision_model.embeddings.position_ids"
            state[name] = torch.arange(5)[None]
        stem = file.name.removesuffix(".safetensors")
        if bin:
            stem = "pytorch_model" if stem == "model" else stem
            torch.save(state, file.with_name(f"{stem}{variant}.bin"))
        else:
            whole = {key: tensor.contiguous() for key, tensor in state.items()}
            save_file(whole, file.with_name(f"{stem}{variant}.safetensors"), {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bin": True},
        {"variant": ".fp16"},
        {"variant": ".fp16", "bin": True},
        {"convolutions": True, "bin": True},
    ],
    ids=str,
)
def test_files_of_2022_train_and_come_out_in_todays_layout(
    make_model_folder: Make, photos: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    today = write(make_model_folder(), STABLE_DIFFUSION_1)
    expected = models.load(today, device=CPU)
    base, out = as_in_2022(write(make_model_folder(), STABLE_DIFFUSION_1), **options), tmp_path
    loaded = models.load(base, device=CPU)
    half = "variant" in options
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = (getattr(m, part).state_dict() for m in (loaded, expected))
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert torch.equal(ours[key], value.half().float() if half else value)
    train(base, photos, out / "mine")
    files = {path.suffix for path in (out / "mine").glob("*/*") if path.suffix != ".json"}
    assert files == {".safetensors", ".txt", ".png"}
    pipeline = plain(out / "mine")
    assert draw(pipeline).shape == (64, 64, 3)
    for part in ("vae", "text_encoder"):  # frozen parts, as diffusers loads our export
        ours, theirs = getattr(pipeline, part).state_dict(), getattr(loaded, part).state_dict()
        assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    concepts = pipeline.safety_checker.concept_embeds_weights
    assert torch.equal(concepts, torch.full_like(concepts, 9.0))
