"""One safetensors file in: what its header alone shows, and the sentences for what it is not.

The files are of full size with holes in place of their numbers. That the numbers arrive is tested
in test_single_file_export.py.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dreambooth.errors import ModelArtifactError, ResourceError
from dreambooth.model_folder import clip_vocabulary, single_file, source
from dreambooth.model_folder.published_layout import Family
from tests.model_folder.single_files import Tensors, averages, published, write_holes

Make = Callable[..., Path]
V, EPSILON = "v_prediction", "epsilon"
CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
TEXT_1 = "cond_stage_model.transformer.text_model."
TEXT_2 = "cond_stage_model.model."


def facts(path: Path, **said: Any) -> source.ModelFacts:
    found = source.peek(source.locate(str(path), **said))
    assert found is not None
    return found


def refused(path: Path, **said: Any) -> str:
    with pytest.raises(ModelArtifactError) as error:
        facts(path, **said)
    message = str(error.value)
    assert message.isprintable()
    assert message.endswith(".")
    assert path.stem in message
    return message


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("ema", [False, True])
def test_a_published_1_x_is_known_by_its_header(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: str, ema: bool
) -> None:
    held = published("1.x", dtype)
    held |= averages(held) if ema else {}
    path = write_holes(tmp_path / "sd.safetensors", held)
    caplog.set_level(logging.INFO)
    began = time.process_time()
    found = facts(path)
    assert time.process_time() - began < 3  # a dry run's time; far less in fact
    assert (found.prediction_type, found.resolution) == (EPSILON, 512)
    assert found.unet_parameters == 859_520_964
    assert found.text_encoder_parameters == 123_060_480
    assert found.vae_parameters == 83_653_863
    log = caplog.text
    assert f"Stable Diffusion 1.x in {dict(F32='fp32', F16='fp16', BF16='bf16')[dtype]}" in log
    assert "prediction_type is epsilon, as in all published 1.x" in log
    assert "the noise schedule's tables (12 tensors)" in log
    assert "position_ids (1 tensor)" in log
    assert ("model_ema.* (688 tensors), moving averages" in log) is ema


def test_a_published_2_x_is_known_by_its_header(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_holes(tmp_path / "sd2.safetensors", published("2.x"))
    caplog.set_level(logging.INFO)
    found = facts(path, prediction_type=V)
    assert (found.prediction_type, found.resolution) == (V, 768)
    assert found.unet_parameters == 865_910_724
    assert found.text_encoder_parameters == 340_387_840
    assert "resblocks.23.* (12 tensors), the layer behind the one that the U-Net reads" in (
        caplog.text
    )
    assert "text_projection and logit_scale (2 tensors)" in caplog.text
    assert facts(path, prediction_type=EPSILON).resolution == 512


def test_base_and_v_prediction_are_never_guessed(tmp_path: Path) -> None:
    path = write_holes(tmp_path / "sd2.safetensors", published("2.x"))
    message = refused(path)
    assert "--prediction_type=epsilon" in message
    assert "--prediction_type=v_prediction" in message


SPEC = "modelspec."
PARAMETERIZATION = "model:\n  target: ldm.x\n  params:\n    parameterization: {}\n    x: 9\n"
# (metadata, sidecar, what is said, the prediction type, words of the log)
SOURCES: list[tuple[dict[str, str], str | None, str | None, str, str]] = [
    ({}, None, V, V, "as --prediction_type says"),
    ({f"{SPEC}prediction_type": "v"}, None, EPSILON, EPSILON, "as --prediction_type says"),
    ({f"{SPEC}prediction_type": "v"}, PARAMETERIZATION.format("eps"), None, V, "prediction_type"),
    ({f"{SPEC}prediction_type": "epsilon"}, None, None, EPSILON, f"{SPEC}prediction_type"),
    ({f"{SPEC}architecture": "stable-diffusion-v2-768-v"}, None, None, V, f"{SPEC}architecture"),
    ({f"{SPEC}architecture": "stable-diffusion-v2-512"}, None, None, EPSILON, "architecture"),
    ({}, PARAMETERIZATION.format('"v"'), None, V, "sd2.yaml says"),
    ({}, "model: {params: {linear_start: 0.1}}", None, EPSILON, "sd2.yaml says"),
    ({f"{SPEC}architecture": "my-model"}, PARAMETERIZATION.format("v"), None, V, "sd2.yaml"),
]


@pytest.mark.parametrize(("metadata", "sidecar", "said", "expected", "words"), SOURCES)
def test_the_first_source_that_states_it_decides(
    tmp_path: Path,
    metadata: dict[str, str],
    sidecar: str | None,
    said: str | None,
    expected: str,
    words: str,
) -> None:
    path = write_holes(tmp_path / "sd2.safetensors", published("2.x", "F16"), metadata)
    if sidecar is not None:
        path.with_suffix(".yaml").write_text(sidecar)
    found = single_file.read(path, prediction_type=said)
    assert found.configurations["scheduler"]["prediction_type"] == expected
    assert words in found.remarks[0]


def test_1_x_with_v_prediction_takes_someone_to_say_so(tmp_path: Path) -> None:
    path = write_holes(tmp_path / "sd.safetensors", published("1.x"))
    assert facts(path).prediction_type == EPSILON
    path.with_suffix(".yaml").write_text(PARAMETERIZATION.format("v"))
    found = facts(path)
    assert (found.prediction_type, found.resolution) == (V, 512)


def test_a_foreign_prediction_type_in_the_metadata_is_asked_about(tmp_path: Path) -> None:
    metadata = {f"{SPEC}prediction_type": "rectified flow\n"}
    path = write_holes(tmp_path / "sd.safetensors", published("1.x"), metadata)
    assert "'rectified flow'" in refused(path)
    assert facts(path, prediction_type=EPSILON).prediction_type == EPSILON


BAD_SIDECARS = {
    "empty": "",
    "a list": "- 1\n",
    "another kind": PARAMETERIZATION.format("x0"),
    "a list as parameterization": PARAMETERIZATION.format("[v]"),
    "code": "model: !!python/object/apply:os.system ['touch hacked']\n",
    "an alias": "a: &a {model: {params: {parameterization: v}}}\nmodel: *a\n",
    "nested": "[" * 20_000,
    "braces": "{a: " * 5_000,
    "long": "model: {params: {}}\n#" + "x" * 70_000,
    "a number": "model: {params: {parameterization: " + "9" * 5_000 + "}}",
    "binary": "\0\x01",
    "a date": "model: {params: {parameterization: 2000-99-99}}",
}


@pytest.mark.parametrize("text", BAD_SIDECARS.values(), ids=BAD_SIDECARS)
def test_a_sidecar_is_data_or_refused(tmp_path: Path, text: str) -> None:
    path = write_holes(tmp_path / "sd2.safetensors", published("2.x", "F16"))
    path.with_suffix(".yaml").write_text(text)
    began = time.process_time()
    assert "does not state its parameterization" in refused(path)
    assert time.process_time() - began < 5
    assert not Path("hacked").exists()
    assert facts(path, prediction_type=V).prediction_type == V


def test_a_sidecar_that_is_no_file_is_refused(tmp_path: Path) -> None:
    path = write_holes(tmp_path / "sd2.safetensors", published("2.x", "F16"))
    path.with_suffix(".yaml").mkdir()
    refused(path)
    path.with_suffix(".yaml").rmdir()
    path.with_suffix(".yaml").symlink_to("/dev/zero")
    refused(path)


def test_a_resolution_in_the_metadata_counts_if_it_is_a_side(tmp_path: Path) -> None:
    for stated, expected in (("640x640", 640), ("640x512", 512), ("9x9", 512), ("641x641", 512)):
        metadata = {f"{SPEC}resolution": stated}
        path = write_holes(tmp_path / "sd.safetensors", published("1.x"), metadata)
        assert facts(path).resolution == expected


def without(prefix: str) -> Callable[[Tensors], object]:
    def change(held: Tensors) -> None:
        for name in [name for name in held if name.startswith(prefix)]:
            del held[name]

    return change


def holding(name: str, dtype: str = "F32", shape: tuple[int, ...] = (4,)) -> Any:
    return lambda held: held.update({name: (dtype, shape)})


def of_text_2(held: Tensors) -> None:
    without(TEXT_1)(held)
    held |= {name: value for name, value in published("2.x").items() if TEXT_2 in name}


def half_of_the_averages(held: Tensors) -> None:
    found = averages(held)
    held |= {name: found[name] for name in list(found)[::2]}


# (change of a published 1.x, words of the sentence)
FAULTS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "inpainting": (holding(CONV_IN, shape=(320, 9, 3, 3)), "is an inpainting model"),
    "depth": (holding(CONV_IN, shape=(320, 5, 3, 3)), "is a depth model"),
    "pix2pix": (holding(CONV_IN, shape=(320, 8, 3, 3)), "is an instruct-pix2pix model"),
    "three channels": (holding(CONV_IN, shape=(320, 3, 3, 3)), "in the shape [320, 3, 3, 3]"),
    "one dimension": (holding(CONV_IN, shape=(11_520,)), "in the shape [11520]"),
    "XL": (holding("conditioner.embedders.0.x"), "it is Stable Diffusion XL"),
    "XL's U-Net": (holding("model.diffusion_model.label_emb.0.0.weight"), "more inputs than text"),
    "SD 3": (holding("model.diffusion_model.joint_blocks.0.x"), "it is newer than 2.x"),
    "Flux": (holding("model.diffusion_model.double_blocks.0.x"), "it is Flux"),
    "a ControlNet inside": (holding("control_model.time_embed.0.weight"), "it is a ControlNet"),
    "no VAE": (without("first_stage_model."), "it has no VAE (first_stage_model.*)"),
    "no text encoder": (without("cond_stage_model."), "it has no text encoder"),
    "the U-Net alone": (
        lambda held: [without(p)(held) for p in ("first_", "cond_")],
        "no VAE (first_stage_model.*) and no text encoder",
    ),
    "two text encoders": (
        holding(f"{TEXT_2}ln_final.weight"),
        "the text encoders of Stable Diffusion 1.x and of 2.x",
    ),
    "2.x's text encoder": (of_text_2, ", where Stable Diffusion 2.x has [320, 320]"),
    "one is missing": (
        without("model.diffusion_model.out.2.bias"),
        "lacks model.diffusion_model.out.2.bias of the 1130 tensors",
    ),
    "many are missing": (without(f"{TEXT_1}encoder.layers.7"), "and 13 more of the 1130"),
    "unknown": (holding("embedding_manager.x"), "holds embedding_manager.x, which"),
    "a line break": (holding("a\nb\x1b[31m"), r"holds a\nb\x1b[31m, which"),
    "a long name": (holding("x" * 50_000), "xxx"),
    "fp8": (holding(CONV_IN, "F8_E4M3", (320, 4, 3, 3)), "as F8_E4M3"),
    "integers": (holding(CONV_IN, "I8", (320, 4, 3, 3)), "as I8"),
    "an average of nothing": (holding("model_ema.nothing"), "holds model_ema.nothing, which"),
    "two names for one": (
        holding("cond_stage_model.transformer.final_layer_norm.bias", shape=(768,)),
        "twice, under two names",
    ),
}


@pytest.mark.parametrize(("change", "words"), FAULTS.values(), ids=FAULTS)
def test_other_files_are_refused_in_a_sentence(
    tmp_path: Path, change: Callable[[Tensors], object], words: str
) -> None:
    path = write_holes(tmp_path / "x.safetensors", published("1.x"), change=change)
    assert words in refused(path)


def test_half_of_the_averages_are_as_little_read_as_all(tmp_path: Path) -> None:
    path = write_holes(tmp_path / "x.safetensors", published("1.x"), change=half_of_the_averages)
    assert any("model_ema.* (344 tensors)" in remark for remark in single_file.read(path).remarks)


def old_names(held: Tensors) -> None:
    for name in [name for name in held if name.startswith(TEXT_1)]:
        held[name.replace(".text_model.", ".")] = held.pop(name)


def linear_projections(held: Tensors) -> None:
    for name, (dtype, shape) in held.items():
        if ".mid.attn_1." in name and len(shape) == 4:
            held[name] = (dtype, shape[:2])


@pytest.mark.parametrize("change", [old_names, linear_projections])
def test_what_other_tools_name_or_shape_otherwise_is_read(
    tmp_path: Path, change: Callable[[Tensors], object]
) -> None:
    path = write_holes(tmp_path / "x.safetensors", published("1.x"), change=change)
    assert facts(path).unet_parameters == 859_520_964


def test_a_million_tensors_are_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    entry = b'"model.diffusion_model.%07d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = b"{" + b",".join(entry % number for number in range(1_000_000)) + b"}"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    began = time.process_time()
    assert "not a valid safetensors file" in refused(path)
    assert time.process_time() - began < 1
    short = header[: 14 * 2**20].rsplit(b",", 1)[0].rsplit(b"}", 1)[0] + b"}}"
    path.write_bytes(len(short).to_bytes(8, "little") + short)
    assert "tensors, and at most 20000 are read" in refused(path)


def test_overlapping_tensors_and_gaps_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for offsets in ([0, 4], [8, 12]):
        header = json.dumps(
            {
                CONV_IN: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                "y": {"dtype": "F32", "shape": [1], "data_offsets": offsets},
            }
        ).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
        assert "not a valid safetensors file" in refused(path)


@settings(max_examples=50)
@given(
    st.dictionaries(
        st.text(max_size=8).map(lambda text: f"model.diffusion_model.{text}"), st.integers(0, 3)
    )
)
def test_any_names_give_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, held: dict[str, int]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    write_holes(path, {name: ("F16", (size,)) for name, size in held.items()})
    with pytest.raises(ModelArtifactError):
        facts(path)


def test_a_channel_may_hold_one_file(tmp_path: Path) -> None:
    folder = tmp_path / "channel"
    folder.mkdir()
    first = write_holes(folder / "sd.safetensors", published("1.x", "F16"))
    lora = {"lora_unet_x.lora_up.weight": ("F16", (4, 4))}
    write_holes(folder / "lora.safetensors", lora)  # is no model, and beside one no fault
    found = source.locate(None, folder)
    assert (found.kind, found.path) == ("single_file", first)
    write_holes(folder / "other.safetensors", published("1.x", "F16"))
    with pytest.raises(ModelArtifactError, match=r"2 single-file checkpoints \(other.safetensors,"):
        source.locate(None, folder)


def test_a_link_that_leads_out_of_a_channel_is_not_followed(tmp_path: Path) -> None:
    channel = tmp_path / "channel"
    channel.mkdir()
    there = write_holes(tmp_path / "sd.safetensors", published("1.x", "F16"))
    (channel / "sd.safetensors").symlink_to(there)
    with pytest.raises(ModelArtifactError, match="leads out of the model"):
        source.peek(source.locate(None, channel))
    assert facts(channel / "sd.safetensors")  # named by the user


def test_what_is_said_of_a_folder_must_be_so(small_model_folder: Path) -> None:
    for said, words in (
        ({"prediction_type": V}, "and .* says 'epsilon'"),
        ({"base": "tiny"}, "leave --base away"),
    ):
        found = source.locate(str(small_model_folder), **said)
        with pytest.raises(ModelArtifactError, match=words):
            source.peek(found)
        with pytest.raises(ModelArtifactError, match=words):
            source.open_source(found, small_model_folder)
    assert facts(small_model_folder, prediction_type=EPSILON)


def test_a_base_of_another_family_or_none_is_refused(
    tmp_path: Path, small_model_folder: Path
) -> None:
    path = write_holes(tmp_path / "sd.safetensors", published("1.x"))
    for base, words in (
        (str(small_model_folder), "is Stable Diffusion 2.x, and the file 1.x"),
        (str(tmp_path), "--base .* is no diffusers folder"),
        ("tiny", r"lacks .* of the 416 tensors of .*weights\.$"),
    ):
        with pytest.raises(ModelArtifactError, match=words):
            facts(path, base=base)


def test_a_base_whose_vocabulary_leads_out_of_it_is_refused(
    tmp_path: Path, make_model_folder: Make
) -> None:
    base = make_model_folder()
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (base / "tokenizer" / "added_tokens.json").symlink_to(secret)
    path = write_holes(tmp_path / "sd.safetensors", published("2.x"))
    with pytest.raises(ModelArtifactError, match="leads out of the model"):
        facts(path, base=str(base))


# As OpenAI's tokenizer encodes them, without the first and the last token. In 2.x transformers
# takes a "!" of the prompt for padding, in the published folder too.
KNOWN_IDS = {
    "hello world": (3306, 1002),
    "a photo of a cat": (320, 1125, 539, 320, 2368),
    "a photograph of an astronaut riding a horse": (
        *(320, 8853, 539, 550, 18376, 6765, 320, 4558),
    ),
    "": (),
}


@pytest.mark.parametrize("family", ["1.x", "2.x"])
def test_the_vocabulary_is_clips(tmp_path: Path, family: Family) -> None:
    from transformers import CLIPTokenizer

    clip_vocabulary.write(tmp_path, family)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 49_408
    ids = tokenizer.get_vocab()
    assert (ids["!"], ids["!</w>"], ids["<|startoftext|>"], ids["<|endoftext|>"]) == (
        0,
        256,
        49_406,
        49_407,
    )
    for text, expected in KNOWN_IDS.items():
        padded = tokenizer(text, padding="max_length", truncation=True).input_ids
        padding = {"1.x": 49_407, "2.x": 0}[family]
        whole = [49_406, *expected, 49_407]
        assert padded == whole + [padding] * (77 - len(whole))


def test_without_the_vocabulary_the_sentence_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_holes(tmp_path / "sd.safetensors", published("1.x"))
    for name, value in (("_PACKAGE", "no-such-package"), ("_SHA256", "0")):
        with monkeypatch.context() as patch:
            patch.setattr(clip_vocabulary, name, value)
            with pytest.raises(ResourceError, match=r"clip-vocabulary\.txt.*--base"):
                facts(path)
