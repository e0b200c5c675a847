"""Miniature Stable Diffusion folders with random weights, for all tests.

`make_model_folder` (session-scoped) is a factory: every keyword changes one thing about an
otherwise ordinary diffusers folder. `small_model_folder` is the plain one; treat it as read-only.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # only tests that write a folder import torch and diffusers
    import torch

# Where the tests were started in the background, or by nohup, jobs would inherit what is ignored.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

ModelFolderFactory = Callable[..., Path]

WORDS = (
    *("a", "photo", "of", "cat", "dog", "riobugger", "doppler", "on", "in", "the"),
    *("beach", "snow", "sketch", "black", "white"),
)
TOKENS = 32
WIDTH = 32
# scheduler/scheduler_config.json of Stable Diffusion 2.1 base.
NOISE_SCHEDULER = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
# Names that diffusers up to 0.17 gave to the VAE's attention layers; Stable Diffusion 1.x and 2.x
# were published with them.
OLD_VAE_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Import without collecting garbage; leave what the imports made out of all later collections.

    Each job asks for some collections.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def tried_once() -> Iterator[None]:
    """Try equal parts of models once in a session: most tests load the same few."""
    if "torch" not in sys.modules:  # then no test here loads a model
        yield
        return
    from dreambooth.diffusion import trial

    passed: set[str] = set()

    def once(try_part: Callable[..., None]) -> Callable[..., None]:
        def tried(part: Any, **options: object) -> None:
            dtype = getattr(part, "dtype", None)
            key = f"{try_part.__name__} {type(part)} {dtype} {part.config} {options}"
            if key not in passed:
                try_part(part, **options)
            passed.add(key)

        return tried

    with pytest.MonkeyPatch.context() as patch:
        for each in (trial.sample, trial.add_noise, trial.predict, trial.encode_and_decode):
            patch.setattr(trial, each.__name__, once(each))
        yield


@pytest.fixture(scope="session", autouse=True)
def samples_of_two_steps() -> Iterator[None]:
    """Draw sample pictures in 2 steps of 25: every job draws one, and most tests look at none.

    For compute_scores draw 2 pictures of 2 steps, of 8 and 50.
    """
    if "torch" not in sys.modules:  # then no test here trains
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dreambooth.job.previews.NUM_INFERENCE_STEPS", 2)
        patch.setattr("dreambooth.job.scoring.SCORED_STEPS", 2)
        patch.setattr("dreambooth.job.scoring.SCORED_PICTURES", 2)
        yield


@pytest.fixture(scope="module")
def class_images_of_four_steps() -> Iterator[None]:
    """Sample class images in 4 steps of 25, for modules whose jobs only need to have some."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dreambooth.job.class_sampling.NUM_INFERENCE_STEPS", 4)
        yield


@pytest.fixture
def unprivileged_folder() -> Iterator[Path]:
    """Yield an empty folder, and run the test without root's right to read everything."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    effective = os.geteuid()
    if effective == 0:
        os.seteuid(65534)  # the user `nobody`
    try:
        yield folder
    finally:
        os.seteuid(effective)
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def make_model_folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolderFactory:
    """Return a function that writes a miniature model folder (see `write_model_folder`)."""

    written: dict[str, Path] = {}

    def make(folder: Path | None = None, **options: Any) -> Path:
        folder = folder or tmp_path_factory.mktemp("model") / "small"
        first = written.get(repr(options))
        if first is None:
            first = written[repr(options)] = tmp_path_factory.mktemp("first") / "small"
            write_model_folder(first, **options)
        shutil.copytree(first, folder, dirs_exist_ok=True)
        return folder

    return make


@pytest.fixture(scope="session")
def small_model_folder(make_model_folder: ModelFolderFactory) -> Path:
    """Return the plain miniature model folder of the whole session; never write into it."""
    return make_model_folder()


def write_model_folder(
    folder: Path,
    *,
    prediction_type: str = "epsilon",
    scheduler: str = "PNDMScheduler",
    scheduler_settings: Mapping[str, object] | None = None,
    pixels: int = 32,
    seed: int = 0,
    variant: str | None = None,
    dtype: torch.dtype | None = None,
    sharded: bool = False,
    bin: bool = False,  # the old pickled layout, with .bin in place of .safetensors
    # As transformers 4.x writes names and all published folders have them.
    text_model_prefix: bool = True,
    old_vae_names: bool = False,
    use_linear_projection: bool = True,
    model_info: Mapping[str, object] | None = None,
) -> None:
    """Write model_index.json, unet, vae, text_encoder, tokenizer and scheduler into `folder`."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = write_tokenizer(folder / "tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=pixels // 2,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=(2, 4),
            cross_attention_dim=WIDTH,
            use_linear_projection=use_linear_projection,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=pixels,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(vocabulary),
                hidden_size=WIDTH,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=TOKENS,
                hidden_act="gelu",
                bos_token_id=vocabulary["<|startoftext|>"],
                eos_token_id=vocabulary["<|endoftext|>"],
                pad_token_id=vocabulary["!"],
                projection_dim=WIDTH,
            )
        )
    if dtype is None:
        dtype = torch.float16 if variant == "fp16" else torch.float32
    layout: dict[str, Any] = {"variant": variant, "sharded": sharded, "bin": bin}
    for part, name in ((unet, "unet"), (vae, "vae")):
        part.save_config(folder / name)
        state = {key: value.to(dtype) for key, value in part.state_dict().items()}
        if name == "vae" and old_vae_names:
            state = {old_vae_name(key): value for key, value in state.items()}
        write_weights(folder / name, "diffusion_pytorch_model", state, **layout)
    text_encoder.config.architectures = ["CLIPTextModel"]
    text_encoder.config.save_pretrained(folder / "text_encoder")
    prefix = "text_model." if text_model_prefix else ""
    state = {prefix + key: value.to(dtype) for key, value in text_encoder.state_dict().items()}
    write_weights(folder / "text_encoder", "model", state, **layout)
    settings = {
        **NOISE_SCHEDULER,
        "_class_name": scheduler,
        "_diffusers_version": "0.8.0",
        "prediction_type": prediction_type,
        **(scheduler_settings or {}),
    }
    write_json(folder / "scheduler" / "scheduler_config.json", settings)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.8.0",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(folder / "model_index.json", index)
    if model_info is not None:
        write_json(folder / "__model_info__.json", dict(model_info))


def write_safety_checker(folder: Path, *, hides: bool = False) -> Path:
    """Add a miniature safety checker, which hides every picture or none; return the folder."""
    import torch
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    tower = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config={**tower, "num_hidden_layers": 2, "image_size": 28, "patch_size": 14},
        text_config={**tower, "num_hidden_layers": 1},
        projection_dim=24,
    )
    checker = StableDiffusionSafetyChecker(config)
    for thresholds in (checker.concept_embeds_weights, checker.special_care_embeds_weights):
        torch.nn.init.constant_(thresholds, -9.0 if hides else 9.0)  # of a cosine
    checker.save_pretrained(folder / "safety_checker")
    (folder / "feature_extractor").mkdir()
    write_json(
        folder / "feature_extractor" / "preprocessor_config.json",
        {
            "crop_size": 28,
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "resample": 3,
            "size": 28,
        },
    )
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPFeatureExtractor"]
    write_json(folder / "model_index.json", index)
    return folder


def write_weights(
    folder: Path,
    stem: str,
    state: Mapping[str, torch.Tensor],
    *,
    variant: str | None,
    sharded: bool,
    bin: bool,
) -> None:
    """Write a component's weights under the names that diffusers and transformers use."""
    import torch
    from safetensors.torch import save_file

    if bin and stem == "model":
        stem = "pytorch_model"
    suffix = "bin" if bin else "safetensors"
    dotted = f".{variant}" if variant else ""
    folder.mkdir(exist_ok=True)

    def write(name: str, part: Mapping[str, torch.Tensor]) -> None:
        if bin:
            torch.save(dict(part), folder / name)
        else:
            contiguous = {key: value.contiguous() for key, value in part.items()}
            save_file(contiguous, folder / name, metadata={"format": "pt"})

    if not sharded:
        write(f"{stem}{dotted}.{suffix}", state)
        return
    keys = sorted(state)
    weight_map = {}
    for index, start in enumerate((0, len(keys) // 3)):
        chosen = keys[start : len(keys) // 3] if index == 0 else keys[start:]
        name = f"{stem}{dotted}-{index + 1:05d}-of-00002.{suffix}"
        write(name, {key: state[key] for key in chosen})
        weight_map |= dict.fromkeys(chosen, name)
    total = sum(value.numel() * value.element_size() for value in state.values())
    index_name = f"{stem}.{suffix}.index{dotted}.json"
    write_json(folder / index_name, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_tokenizer(folder: Path) -> dict[str, int]:
    """Write a byte-level CLIP vocabulary with one token per word of WORDS, and '!' as padding."""
    letters = byte_letters()
    vocabulary = letters + [letter + "</w>" for letter in letters]
    merges = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pair, pieces = pieces[:2], ["".join(pieces[:2]), *pieces[2:]]
            if pieces[0] not in vocabulary:
                merges.append(" ".join(pair))
                vocabulary.append(pieces[0])
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: index for index, token in enumerate(vocabulary)}
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "!",
        "unk_token": "<|endoftext|>",
    }
    write_json(folder / "vocab.json", ids)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    write_json(folder / "special_tokens_map.json", special)
    settings = {
        **special,
        # As in Stable Diffusion 2.1 base; the special tokens map overrides it.
        "pad_token": "<|endoftext|>",
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": TOKENS,
        "tokenizer_class": "CLIPTokenizer",
    }
    write_json(folder / "tokenizer_config.json", settings)
    return ids


def byte_letters() -> list[str]:
    """Return one printable character per byte, in the order of CLIP's vocabulary ('!' is 0)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def old_vae_name(key: str) -> str:
    """Return the name that diffusers up to 0.17 gave to a weight of the VAE."""
    for new, old in OLD_VAE_NAMES.items():
        key = key.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
    return key


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write one JSON object; create the folder if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
