from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from dreambooth.diffusion import model as models
from dreambooth.errors import ResourceError, TrainingDivergedError, UserError
from dreambooth.model_folder import destination, export, source
from dreambooth.model_folder.taught_subjects import TaughtSubject

Make = Callable[..., Path]
CPU = torch.device("cpu")
FILES = {
    *("model_index.json", "__model_info__.json", "hyperparameters.json", "README.md"),
    *("unet/config.json", "unet/diffusion_pytorch_model.safetensors"),
    *("vae/config.json", "vae/diffusion_pytorch_model.safetensors"),
    *("text_encoder/config.json", "text_encoder/model.safetensors"),
    *("tokenizer/vocab.json", "tokenizer/merges.txt"),
    *("tokenizer/tokenizer_config.json", "tokenizer/special_tokens_map.json"),
    "scheduler/scheduler_config.json",
}
# Names of CLIPTextModel's weights in all published Stable Diffusion folders, here for two layers.
PUBLISHED_TEXT_ENCODER_NAMES = {
    "text_model.embeddings.position_embedding.weight",
    "text_model.embeddings.token_embedding.weight",
    "text_model.final_layer_norm.bias",
    "text_model.final_layer_norm.weight",
    *(
        f"text_model.encoder.layers.{layer}.{part}.{kind}"
        for layer in (0, 1)
        for kind in ("bias", "weight")
        for part in (
            *("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2", "self_attn.k_proj"),
            *("self_attn.out_proj", "self_attn.q_proj", "self_attn.v_proj"),
        )
    ),
}


def card(**values: Any) -> export.ModelCard:
    standard = {
        "base": "base",
        "subjects": [TaughtSubject(instance_prompt="a photo of a riobugger cat")],
        "steps": 3,
        "planned_steps": 3,
        "data_fingerprint": "abc",
    }
    return export.ModelCard(**{**standard, **values})


def trained_model(folder: Path, seed: int = 1) -> models.DiffusionModel:
    """Return a model whose U-Net and text encoder differ from the base, as after training."""
    model = models.load(folder, device=CPU)
    generator = torch.Generator().manual_seed(seed)
    for module in (model.unet, model.text_encoder):
        module.requires_grad_(True).train()
        with torch.no_grad():
            for weight in module.parameters():
                weight += 1e-3 * torch.randn(weight.shape, generator=generator)
    return model


def write(
    model_dir: Path,
    base: Path,
    model: models.DiffusionModel,
    *,
    text_encoder: bool = False,
    unet: torch.nn.Module | None = None,
    samples: Mapping[str, Image.Image] | None = None,
    **options: Any,
) -> Path:
    told = options.pop("card", card())
    export.write(
        model_dir,
        base_folder=base,
        trained=export.TrainedParts(
            unet=model.unet if unet is None else unet,
            text_encoder=model.text_encoder if text_encoder else None,
        ),
        resolution=32,
        card=told,
        hyperparameters_json='{"max_steps": "3"}',
        **options,
    )
    if samples:
        export.add_samples(model_dir, card=told, samples=samples)
    return model_dir


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def draw(folder: Path) -> np.ndarray:
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    result = pipeline("a photo of a cat", num_inference_steps=3, generator=generator)
    return np.asarray(result.images[0])


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]) for key in left
    )


def test_the_folder_holds_exactly_what_is_listed(small_model_folder: Path, tmp_path: Path) -> None:
    model = trained_model(small_model_folder)
    picture = Image.new("RGB", (8, 8), "red")
    samples = {"a photo of a cat, on a beach!": picture, "Ж": picture}
    write(tmp_path / "model", small_model_folder, model, samples=samples)
    sampled = {"samples/01_a_photo_of_a_cat_on_a_beach.png", "samples/02.png"}
    assert files(tmp_path / "model") == FILES | sampled
    assert {path.name for path in (tmp_path / "model").iterdir()} <= set(export.ENTRIES)
    text = (tmp_path / "model" / "README.md").read_text("utf-8")
    assert "](samples/01_a_photo_of_a_cat_on_a_beach.png)" in text
    info = json.loads((tmp_path / "model" / "__model_info__.json").read_text("utf-8"))
    assert info["resolution"] == 32
    assert info["instance_prompt"] == "a photo of a riobugger cat"
    hyperparameters = (tmp_path / "model" / "hyperparameters.json").read_text("utf-8")
    assert json.loads(hyperparameters) == {"max_steps": "3"}
    plain = tmp_path / "plain"
    plain.touch()
    modes = {path.stat().st_mode for path in (tmp_path / "model").rglob("*") if path.is_file()}
    assert modes == {plain.stat().st_mode}


def test_without_samples_nothing_more_is_written(small_model_folder: Path, tmp_path: Path) -> None:
    write(tmp_path, small_model_folder, trained_model(small_model_folder))
    assert files(tmp_path) == FILES


@pytest.mark.parametrize("text_encoder", [False, True])
def test_weights_are_what_was_trained_and_the_rest_is_the_bases(
    small_model_folder: Path, tmp_path: Path, text_encoder: bool
) -> None:
    model = trained_model(small_model_folder)
    before = {key: value.clone() for key, value in model.unet.state_dict().items()}
    write(tmp_path, small_model_folder, model, text_encoder=text_encoder)
    assert equal(load_file(tmp_path / "unet/diffusion_pytorch_model.safetensors"), before)
    loaded, base = (models.load(f, device=CPU) for f in (tmp_path, small_model_folder))
    assert equal(loaded.unet.state_dict(), before)
    assert equal(loaded.vae.state_dict(), base.vae.state_dict())
    expected = model if text_encoder else base
    assert equal(loaded.text_encoder.state_dict(), expected.text_encoder.state_dict())
    assert loaded.scheduler_config == base.scheduler_config
    for name in files(small_model_folder):
        if name.startswith(("tokenizer/", "scheduler/", "vae/", "model_index")):
            assert (tmp_path / name).read_bytes() == (small_model_folder / name).read_bytes()


def test_the_same_picture_comes_out_of_memory_and_of_the_folder(
    small_model_folder: Path, tmp_path: Path
) -> None:
    model = trained_model(small_model_folder)
    write(tmp_path / "model", small_model_folder, model, text_encoder=True)
    latents, text = torch.randn(1, 4, 16, 16), torch.randn(1, 32, 32)
    loaded = models.load(tmp_path / "model", device=CPU)
    with torch.no_grad():
        expected = model.unet.eval()(latents, 5, text).sample
        assert torch.equal(loaded.unet(latents, 5, text).sample, expected)
    assert not np.array_equal(draw(tmp_path / "model"), draw(small_model_folder))


def test_what_wrappers_leave_on_a_module_is_taken_off(
    small_model_folder: Path, tmp_path: Path
) -> None:
    model = trained_model(small_model_folder)
    expected = {key: value.clone() for key, value in model.unet.state_dict().items()}
    model.unet.to(memory_format=torch.channels_last)
    assert not model.unet.conv_in.weight.is_contiguous()
    # Compile one block as well; nothing is run.
    model.unet.mid_block = torch.compile(model.unet.mid_block)
    compiled = torch.compile(model.unet)
    assert any(key.startswith("_orig_mod.mid_block._orig_mod.") for key in compiled.state_dict())
    write(tmp_path, small_model_folder, model, unet=compiled)
    assert equal(load_file(tmp_path / "unet/diffusion_pytorch_model.safetensors"), expected)


def test_half_precision_is_for_every_weight_and_only_when_asked(
    small_model_folder: Path, tmp_path: Path
) -> None:
    model = trained_model(small_model_folder)
    expected = {key: value.detach().half() for key, value in model.unet.state_dict().items()}
    write(tmp_path, small_model_folder, model, precision="fp16")
    assert files(tmp_path) == FILES
    assert equal(load_file(tmp_path / "unet/diffusion_pytorch_model.safetensors"), expected)
    for path in tmp_path.rglob("*.safetensors"):
        assert {value.dtype for value in load_file(path).values()} == {torch.float16}
    assert {p.dtype for p in model.unet.parameters()} == {torch.float32}
    draw(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"bin": True},
        {"bin": True, "sharded": True, "variant": "fp16"},
        {"sharded": True},
        {"variant": "fp16"},
        {"old_vae_names": True},
        {"text_model_prefix": False},
    ],
    ids=str,
)
def test_every_layout_of_a_base_comes_out_as_plain_safetensors(
    make_model_folder: Make, tmp_path: Path, options: dict[str, Any]
) -> None:
    base = make_model_folder(**options)
    model = trained_model(base)
    write(tmp_path, base, model)
    assert files(tmp_path) == FILES
    loaded, original = (models.load(f, device=CPU) for f in (tmp_path, base))
    assert equal(loaded.vae.state_dict(), original.vae.state_dict())
    assert equal(loaded.text_encoder.state_dict(), original.text_encoder.state_dict())
    stored = load_file(tmp_path / "text_encoder/model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float32}
    assert stored.keys() == PUBLISHED_TEXT_ENCODER_NAMES
    for path in tmp_path.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
    draw(tmp_path)


def test_an_exported_folder_is_a_base_again(small_model_folder: Path, tmp_path: Path) -> None:
    first = write(tmp_path / "a", small_model_folder, trained_model(small_model_folder))
    second = write(tmp_path / "b", first, trained_model(first, seed=2), text_encoder=True)
    facts = source.read_facts(second)
    assert facts.unet_parameters == source.read_facts(small_model_folder).unet_parameters
    assert facts.resolution == 32
    draw(second)


def test_what_the_base_knew_of_itself_is_kept(make_model_folder: Make, tmp_path: Path) -> None:
    base = make_model_folder(model_info={"resolution": 64, "use_scheduler": True})
    write(tmp_path, base, trained_model(base))
    info = json.loads((tmp_path / "__model_info__.json").read_text("utf-8"))
    assert (info["use_scheduler"], info["resolution"]) == (True, 32)


def with_safety_checker(folder: Path) -> Path:
    """Add a safety checker (one tensor in an old pickle) and its feature extractor."""
    for part in ("safety_checker", "feature_extractor"):
        (folder / part).mkdir()
    (folder / "safety_checker/config.json").write_text('{"model_type": "clip"}')
    torch.save({"weight": torch.ones(2)}, folder / "safety_checker/pytorch_model.bin")
    (folder / "feature_extractor/preprocessor_config.json").write_text('{"size": 224}')
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_a_safety_checker_goes_with_the_model(make_model_folder: Make, tmp_path: Path) -> None:
    base = with_safety_checker(make_model_folder())
    write(tmp_path, base, trained_model(base))
    assert files(tmp_path) == FILES | {
        "safety_checker/config.json",
        "safety_checker/model.safetensors",
        "feature_extractor/preprocessor_config.json",
    }
    index, base_index = (json.loads((f / "model_index.json").read_text()) for f in (tmp_path, base))
    assert index == base_index
    # A base that lists a safety checker which it lacks still gives a folder that can be loaded.
    shutil.rmtree(base / "safety_checker")
    write(tmp_path / "again", base, trained_model(base))
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["safety_checker"] == [None, None]


def test_settings_that_would_run_code_do_not_go_along(
    make_model_folder: Make, tmp_path: Path
) -> None:
    base = with_safety_checker(make_model_folder())
    parts = ("unet", "vae", "text_encoder", "safety_checker")
    for part in parts:
        path = base / part / "config.json"
        evil = {"_attn_implementation": "someone/evil", "vision_config": {"quantization_config": 1}}
        path.write_text(json.dumps(json.loads(path.read_text()) | evil))
    write(tmp_path, base, trained_model(base))
    for part in parts:
        copy = (tmp_path / part / "config.json").read_text()
        assert "evil" not in copy
        assert "quantization" not in copy


def as_transformers_5_saves(folder: Path) -> Path:
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    for part, object_ in (("tokenizer", tokenizer), ("text_encoder", encoder)):
        shutil.rmtree(folder / part)
        object_.save_pretrained(folder / part)
    return folder


@pytest.mark.parametrize("trained", [False, True])
def test_an_export_has_the_names_that_transformers_4_reads(
    make_model_folder: Make, tmp_path: Path, trained: bool
) -> None:
    base = as_transformers_5_saves(make_model_folder())
    assert not (base / "tokenizer" / "vocab.json").exists()
    write(tmp_path, base, trained_model(base), text_encoder=trained)
    assert files(tmp_path) == FILES | {"tokenizer/tokenizer.json"}
    stored = load_file(tmp_path / "text_encoder/model.safetensors")
    assert stored.keys() == PUBLISHED_TEXT_ENCODER_NAMES


IN_TRANSFORMERS_4 = """
import sys, torch, transformers
from transformers import CLIPTextModel, CLIPTokenizer, CLIPTokenizerFast
assert transformers.__version__.startswith("4."), transformers.__version__
prompt, out, *folders = sys.argv[1:]
found = []
for folder in folders:
    ids = []
    for tokenizer_class in (CLIPTokenizer, CLIPTokenizerFast):
        tokenizer = tokenizer_class.from_pretrained(folder + "/tokenizer")
        ids.append(tokenizer(prompt, padding="max_length", truncation=True).input_ids)
    encoder, report = CLIPTextModel.from_pretrained(
        folder + "/text_encoder", output_loading_info=True
    )
    assert not any(report.values()), report
    with torch.no_grad():
        found.append({"ids": ids, "text": encoder(torch.tensor(ids[:1]))[0]})
torch.save(found, out)
"""


@pytest.mark.skipif(
    not os.environ.get("DREAMBOOTH_TRANSFORMERS4"),
    reason="DREAMBOOTH_TRANSFORMERS4 names no folder with transformers 4.x",
)
def test_transformers_4_gives_the_same_embeddings(make_model_folder: Make, tmp_path: Path) -> None:
    """Of a published base and one that transformers 5 saved, with and without its text encoder."""
    published, saved = make_model_folder(), make_model_folder()
    as_transformers_5_saves(saved)
    folders = [
        write(tmp_path / f"{name}-{trained}", base, trained_model(base), text_encoder=trained)
        for name, base in (("published", published), ("saved", saved))
        for trained in (False, True)
    ]
    prompt = "A photo of a riobugger cat, on the beach! Äh 42"
    environment = os.environ | {
        "PYTHONPATH": os.environ["DREAMBOOTH_TRANSFORMERS4"],
        "HF_HUB_OFFLINE": "1",
    }
    arguments = [prompt, str(tmp_path / "out"), *map(str, folders)]
    subprocess.run(
        [sys.executable, "-c", IN_TRANSFORMERS_4, *arguments], env=environment, check=True
    )
    theirs = torch.load(tmp_path / "out", weights_only=True)
    assert len(theirs) == 4
    for folder, found in zip(folders, theirs, strict=True):
        model = models.load(folder, device=CPU)
        ids = models.tokenize(model, [prompt])
        assert found["ids"] == [ids[0].tolist()] * 2
        assert torch.allclose(models.encode_text(model, ids), found["text"], atol=1e-6)


def test_a_diverged_model_is_not_written(small_model_folder: Path, tmp_path: Path) -> None:
    model = trained_model(small_model_folder)
    with torch.no_grad():
        model.unet.conv_out.bias[0] = float("nan")
    with pytest.raises(TrainingDivergedError, match=r"conv_out\.bias") as caught:
        write(tmp_path, small_model_folder, model)
    assert caught.value.step == 3
    assert not list(tmp_path.iterdir())
    with torch.no_grad():
        model.unet.conv_out.bias[0] = 1e6
    with pytest.raises(UserError, match="export_precision=fp32"):
        write(tmp_path, small_model_folder, model, precision="fp16")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def full_disk() -> Iterator[Callable[[int], None]]:
    """Return a function that limits the size of any file, which makes writing really fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [0, 1000, 200_000, 3_000_000])
def test_a_full_disk_leaves_the_earlier_model_and_no_leftovers(
    small_model_folder: Path, tmp_path: Path, full_disk: Callable[[int], None], size: int
) -> None:
    model = trained_model(small_model_folder)
    write(tmp_path, small_model_folder, model)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    full_disk(size)
    with pytest.raises(ResourceError, match="cannot be written to") as caught:
        write(tmp_path, small_model_folder, trained_model(small_model_folder, seed=2))
    full_disk(resource.RLIM_INFINITY)
    assert "\n" not in str(caught.value)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


@pytest.mark.parametrize("moves", range(1, 10))
def test_a_crash_between_two_moves_leaves_no_model(
    small_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    model = trained_model(small_model_folder)
    write(tmp_path, small_model_folder, model)
    (tmp_path / "mine.txt").touch()
    replace, done = os.replace, 0

    def fail_later(origin: str, target: str) -> None:
        nonlocal done
        if done == moves - 1:
            raise KeyboardInterrupt
        done += 1
        replace(origin, target)

    monkeypatch.setattr(os, "replace", fail_later)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, small_model_folder, model)
    monkeypatch.undo()
    assert not (tmp_path / "model_index.json").exists()
    export.clear(tmp_path)
    assert files(tmp_path) == {"mine.txt"} if moves > 1 else "mine.txt" in files(tmp_path)
    write(tmp_path, small_model_folder, model)
    assert files(tmp_path) == FILES | {"mine.txt"}


def test_a_place_that_cannot_be_written_is_one_sentence(
    small_model_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    model, advice = trained_model(small_model_folder), "choose another --model_dir"
    with pytest.raises(ResourceError, match=advice):
        write(tmp_path / "file", small_model_folder, model, elsewhere=advice)


def test_a_run_writes_again_where_an_earlier_one_wrote(
    small_model_folder: Path, tmp_path: Path
) -> None:
    picture = Image.new("RGB", (8, 8))
    for seed in (1, 2):
        export.check(tmp_path, base_folder=small_model_folder)
        export.clear(tmp_path)
        model = trained_model(small_model_folder, seed=seed)
        write(tmp_path, small_model_folder, model, samples={"a": picture} if seed == 1 else {})
        expected = FILES | ({"samples/01_a.png"} if seed == 1 else set())
        assert files(tmp_path) == expected
        stored = load_file(tmp_path / "unet/diffusion_pytorch_model.safetensors")
        assert equal(stored, model.unet.state_dict())
    # The mark is written even where the base has a __model_info__.json of its own.
    info = json.loads((tmp_path / "__model_info__.json").read_text("utf-8"))
    assert info["written_by"] == "dreambooth"


@pytest.mark.parametrize("removed", range(1, 9))
def test_a_crash_while_clearing_leaves_what_the_next_run_clears(
    small_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: int
) -> None:
    write(tmp_path, small_model_folder, trained_model(small_model_folder))
    remove, done = destination.remove, 0

    def fail_later(path: Path) -> None:
        nonlocal done
        if done == removed:
            raise KeyboardInterrupt
        done += 1
        remove(path)

    monkeypatch.setattr(destination, "remove", fail_later)
    with pytest.raises(KeyboardInterrupt):
        export.clear(tmp_path)
    monkeypatch.undo()
    assert (tmp_path / "__model_info__.json").exists()
    assert not (tmp_path / "model_index.json").exists()
    export.clear(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_somebody_adds_while_we_train_is_set_aside(
    small_model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    export.clear(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    write(tmp_path, small_model_folder, trained_model(small_model_folder))
    (kept,) = files(tmp_path) - FILES
    assert (tmp_path / kept).read_text() == "mine"
    assert files(tmp_path) >= FILES
    assert "README.md" in caplog.text


def test_a_run_never_deletes_the_model_that_it_starts_from(
    make_model_folder: Make, small_model_folder: Path, tmp_path: Path
) -> None:
    other = make_model_folder()
    with pytest.raises(UserError, match="not written by an earlier run"):
        export.check(other)
    assert source.read_facts(other)
    ours = write(tmp_path / "a", small_model_folder, trained_model(small_model_folder))
    with pytest.raises(UserError, match="over the base model"):
        export.check(ours, base_folder=ours)
    assert files(ours) == FILES
