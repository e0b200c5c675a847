"""BERT and XLM-RoBERTa text encoders, compared with plain transformers and diffusers."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, BertTokenizer

from dreambooth.diffusion import model as models
from dreambooth.diffusion import sampling, text_encoders
from dreambooth.diffusion.sampling_request import SamplingRequest
from dreambooth.errors import ModelArtifactError
from dreambooth.job.run import run_job
from dreambooth.model_folder import layout

pytestmark = pytest.mark.usefixtures("class_images_of_four_steps")
Make = Callable[..., Path]
CPU = torch.device("cpu")
LENGTH, WIDTH = 24, 32
WORDS = ("a", "photo", "of", "cat", "dog", "##s", "飞", "流", "直", "下", "猫", ",", "!")
PIECES = ("▁a", "▁photo", "▁of", "▁cat", "s", "▁", "猫", "流", "c", "a", "t", "o", "!", "ä")
PROMPTS = ["a photo of cats", "", "飞流直下, a CAT!", "☃ unknown", "a photo of a cat " * 9]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def change(path: Path, **values: Any) -> None:
    write_json(path, json.loads(path.read_text("utf-8")) | values)


def bert_tokenizer(folder: Path) -> int:
    """Write vocab.txt and its settings as transformers 4.x saves them; return the size."""
    rows = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")
    special = {
        f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")
    }
    write_json(folder / "special_tokens_map.json", special)
    settings = {"do_lower_case": True, "model_max_length": LENGTH, "strip_accents": None}
    write_json(folder / "tokenizer_config.json", {**special, **settings})
    return len(rows)


@pytest.fixture
def bert_folder(make_model_folder: Make) -> Path:
    """Return a folder like Taiyi Stable Diffusion's: a StableDiffusionPipeline with a BertModel."""
    folder = make_model_folder()
    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(folder / part)
        (folder / part).mkdir()
    config = BertConfig(
        vocab_size=bert_tokenizer(folder / "tokenizer"),
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=LENGTH + 8,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        BertModel(config).save_pretrained(folder / "text_encoder")
    change(
        folder / "model_index.json",
        text_encoder=["transformers", "BertModel"],
        tokenizer=["transformers", "BertTokenizer"],
    )
    return folder


def length_delimited(number: int, content: bytes) -> bytes:
    """Return one length-delimited protocol buffer field; its content must be under 16 KiB."""
    size = len(content)
    return bytes([number << 3 | 2, *([size] if size < 128 else [size & 127 | 128, size >> 7])]) + (
        content
    )


def sentencepiece_file(pieces: Sequence[str], *, kind: int = 1, charsmap: bytes = b"") -> bytes:
    """Return a unigram model as SentencePiece writes it: pieces, trainer_spec, normalizer_spec."""
    data = b""
    for number, piece in enumerate(("<unk>", "<s>", "</s>", *pieces)):
        score = struct.pack("<f", -number / 2 if number > 2 else 0.0)
        entry = length_delimited(1, piece.encode()) + bytes([2 << 3 | 5]) + score
        entry += bytes([3 << 3, 2 if number == 0 else 3]) if number < 3 else b""
        data += length_delimited(1, entry)
    data += length_delimited(2, bytes([3 << 3, kind]))
    return data + length_delimited(3, length_delimited(1, b"nfkc") + length_delimited(2, charsmap))


def xlm_roberta_folder(folder: Path, *, before_last: bool) -> Path:
    """Make a folder like AltDiffusion's, whose text encoder is a class of diffusers' own."""
    from diffusers.pipelines.deprecated.alt_diffusion import modeling_roberta_series as theirs

    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(folder / part)
        (folder / part).mkdir()
    (folder / "tokenizer" / "sentencepiece.bpe.model").write_bytes(sentencepiece_file(PIECES))
    mask = {"content": "<mask>", "lstrip": True, "rstrip": False}
    settings = {"bos_token": "<s>", "mask_token": mask, "model_max_length": LENGTH}
    write_json(folder / "tokenizer" / "tokenizer_config.json", settings)
    config = theirs.RobertaSeriesConfig(
        vocab_size=len(PIECES) + 5,
        hidden_size=40,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=LENGTH + 2,
        type_vocab_size=1,
        project_dim=WIDTH,
        has_pre_transformation=before_last,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        theirs.RobertaSeriesModelWithTransformation(config).save_pretrained(folder / "text_encoder")
    change(
        folder / "model_index.json",
        _class_name="AltDiffusionPipeline",
        text_encoder=["alt_diffusion", "RobertaSeriesModelWithTransformation"],
        tokenizer=["transformers", "XLMRobertaTokenizer"],
    )
    return folder


def alt_pipeline(folder: Path) -> Any:
    """Return diffusers' own pipeline of a folder.

    from_pretrained no longer finds its class.
    """
    from diffusers.pipelines.deprecated.alt_diffusion import modeling_roberta_series as theirs
    from diffusers.pipelines.deprecated.alt_diffusion.pipeline_alt_diffusion import (
        AltDiffusionPipeline,
    )

    model = models.load(folder, device=CPU)
    text_encoder = theirs.RobertaSeriesModelWithTransformation.from_pretrained(
        folder / "text_encoder"
    )
    return AltDiffusionPipeline(
        vae=model.vae,
        text_encoder=text_encoder.eval(),
        tokenizer=model.tokenizer,
        unet=model.unet,
        scheduler=models.sampling_scheduler(model),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def plain_pipeline(folder: Path) -> Any:
    return StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, dtype=torch.float32, local_files_only=True
    )


def assert_same(folder: Path, theirs: Any) -> None:
    """Assert that the text features and a guided picture equal the pipeline's."""
    model = models.load(folder, device=CPU)
    for prompt in PROMPTS:
        ids = models.tokenize(model, [prompt])
        assert ids.shape == (1, LENGTH)
        expected, _ = theirs.encode_prompt([prompt], CPU, 1, False)
        features = models.encode_text(model, ids)
        assert features.shape == (1, LENGTH, WIDTH)
        assert torch.allclose(features, expected, atol=1e-6)
    theirs.set_progress_bar_config(disable=True)
    prompt, negative = PROMPTS[0], PROMPTS[2]
    expected = theirs(
        prompt,
        negative_prompt=negative,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
    ).images[0]
    request = SamplingRequest(
        prompt=prompt, negative_prompt=negative, num_inference_steps=4, seed=5
    )
    (picture,) = sampling.generate(model, [request])
    assert picture is not None
    assert np.abs(picture - (expected * 255).round()).max() <= 1


def test_a_bert_folder_gives_the_pipelines_pictures(bert_folder: Path) -> None:
    assert_same(bert_folder, plain_pipeline(bert_folder))


def test_a_bert_folder_needs_no_token_that_ends_a_prompt(bert_folder: Path) -> None:
    change(bert_folder / "text_encoder" / "config.json", eos_token_id=None)
    layout.validate_folder(bert_folder)


def test_the_mask_of_a_bert_folder_is_the_pipelines(bert_folder: Path) -> None:
    change(bert_folder / "text_encoder" / "config.json", use_attention_mask=True)
    assert_same(bert_folder, plain_pipeline(bert_folder))


@pytest.mark.parametrize("before_last", [False, True])
def test_an_xlm_roberta_folder_gives_the_pipelines_pictures(
    make_model_folder: Make, before_last: bool
) -> None:
    folder = xlm_roberta_folder(make_model_folder(), before_last=before_last)
    assert_same(folder, alt_pipeline(folder))


def rename_weights(file: Path, rename: Callable[[str], str | None]) -> None:
    state = {rename(key): tensor for key, tensor in load_file(file).items()}
    save_file({key: t for key, t in state.items() if key}, file, {"format": "pt"})


def as_bert_was_first_saved(key: str) -> str:
    """Return a weight's name under `bert.`, with TensorFlow's names for layer norm weights."""
    for new, old in ((".weight", ".gamma"), (".bias", ".beta")):
        key = key.replace(f"LayerNorm{new}", f"LayerNorm{old}")
    return f"bert.{key}"


@pytest.mark.parametrize(
    "rename",
    [as_bert_was_first_saved, lambda key: None if key.startswith("pooler.") else key],
    ids=["old names", "no pooler"],
)
def test_older_files_of_bert_load_and_come_out_in_todays_names(
    bert_folder: Path, photos: Path, tmp_path: Path, rename: Callable[[str], str | None]
) -> None:
    expected = models.load(bert_folder, device=CPU).text_encoder.state_dict()
    file = bert_folder / "text_encoder" / "model.safetensors"
    rename_weights(file, rename)
    state = load_file(file)
    file.unlink()
    state["bert.embeddings.position_ids"] = torch.arange(LENGTH + 8)[None]
    torch.save(state, file.with_name("pytorch_model.bin"))
    loaded = models.load(bert_folder, device=CPU).text_encoder.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in expected.items())
    assert train(bert_folder, photos, tmp_path / "mine") == 0
    stored = load_file(tmp_path / "mine" / "text_encoder" / "model.safetensors")
    assert all(torch.equal(stored[key], value) for key, value in expected.items())


def test_a_layer_that_nothing_reads_is_neither_loaded_nor_needed(make_model_folder: Make) -> None:
    folder = xlm_roberta_folder(make_model_folder(), before_last=True)
    model = models.load(folder, device=CPU)
    model.text_encoder.requires_grad_(True)
    models.text_features(model, models.tokenize(model, ["a cat"])).sum().backward()
    assert all(p.grad is not None for p in model.text_encoder.parameters())
    assert len(model.text_encoder.roberta.encoder.layer) == 2
    rename_weights(
        folder / "text_encoder" / "model.safetensors",
        lambda key: None if "layer.2." in key or key.startswith("transformation.") else key,
    )
    models.load(folder, device=CPU)


def test_tokenizer_json_gives_the_same_tokens(make_model_folder: Make, bert_folder: Path) -> None:
    for folder in (bert_folder, xlm_roberta_folder(make_model_folder(), before_last=True)):
        first = models.load(folder, device=CPU)
        expected = models.tokenize(first, PROMPTS)
        shutil.rmtree(folder / "tokenizer")
        first.tokenizer.save_pretrained(folder / "tokenizer")
        assert (folder / "tokenizer" / "tokenizer.json").exists()
        assert torch.equal(models.tokenize(models.load(folder, device=CPU), PROMPTS), expected)


def test_the_end_that_is_cut_is_reported(
    bert_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = models.load(bert_folder, device=CPU)
    models.tokenize(model, ["飞流直下" * 5])  # 20 tokens and one at either end
    assert not caplog.records
    models.tokenize(model, ["飞流直下" * 6])
    assert "longer than the 24 tokens" in caplog.text


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(2):
        pixels = generator.integers(0, 255, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    prompts = {"instance_prompt": "a photo of 飞 cat", "class_prompt": "a photo of a cat"}
    write_json(folder / "dataset_info.json", prompts)
    return folder


def train(model: Path, photos: Path, out: Path, *more: str) -> int:
    arguments = ["--pretrained-model", str(model), "--train", str(photos), "--model_dir", str(out)]
    return run_job([*arguments, "--max_steps=2", "--learning_rate=0.01", *more], {})


@pytest.mark.parametrize("text_encoder", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("family", ["BERT", "XLM-RoBERTa"])
def test_training_and_export_keep_the_family(
    make_model_folder: Make,
    bert_folder: Path,
    photos: Path,
    tmp_path: Path,
    family: str,
    text_encoder: bool,
) -> None:
    base, pipeline = bert_folder, plain_pipeline
    if family != "BERT":
        base = xlm_roberta_folder(make_model_folder(), before_last=True)
        pipeline = alt_pipeline
    out = tmp_path / "mine"
    options = ["--with_prior_preservation", "--num_class_images=1"]
    options += [f"--train_text_encoder={text_encoder}", f"--gradient_checkpointing={text_encoder}"]
    assert train(base, photos, out, *options) == 0
    before, after = (load_file(f / "text_encoder" / "model.safetensors") for f in (base, out))
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert bool(changed) == text_encoder
    assert not any("pooler" in key or "layer.2." in key for key in changed)
    for name in ("vocab.txt", "sentencepiece.bpe.model", "tokenizer_config.json"):
        if (base / "tokenizer" / name).exists():
            copy = (out / "tokenizer" / name).read_bytes()
            assert copy == (base / "tokenizer" / name).read_bytes()
    assert_same(out, pipeline(out))


def test_an_export_has_the_table_that_transformers_4_reads(
    bert_folder: Path, photos: Path, tmp_path: Path
) -> None:
    table = (bert_folder / "tokenizer" / "vocab.txt").read_text("utf-8")
    tokenizer = BertTokenizer.from_pretrained(bert_folder / "tokenizer")
    shutil.rmtree(bert_folder / "tokenizer")
    tokenizer.save_pretrained(bert_folder / "tokenizer")
    assert not (bert_folder / "tokenizer" / "vocab.txt").exists()
    assert train(bert_folder, photos, tmp_path / "mine") == 0
    assert (tmp_path / "mine" / "tokenizer" / "vocab.txt").read_text("utf-8") == table
    special = json.loads((tmp_path / "mine/tokenizer/special_tokens_map.json").read_text("utf-8"))
    assert special["sep_token"] == "[SEP]"


@pytest.mark.parametrize(
    "entries",
    [
        {"text_encoder": ["transformers", "T5EncoderModel"]},
        {"tokenizer": ["transformers", "T5Tokenizer"]},
        {"tokenizer": ["transformers", "CLIPTokenizer"]},
        {"text_encoder": ["transformers", "CLIPTextModel"]},
        {"_class_name": "AltDiffusionPipeline"},
    ],
    ids=str,
)
def test_other_text_encoders_and_mixtures_are_refused_by_what_can_be_used(
    bert_folder: Path, entries: dict[str, Any]
) -> None:
    change(bert_folder / "model_index.json", **entries)
    with pytest.raises(ModelArtifactError) as caught:
        models.load(bert_folder, device=CPU)
    for words in ("BertModel with BertTokenizer", "CLIP", "XLM-RoBERTa"):
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def vocab(raw: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "vocab.txt").write_bytes(raw)


def single(content: object) -> Callable[[Path], object]:
    text = json.dumps(content)
    return lambda folder: (folder / "tokenizer.json").write_text(text, encoding="utf-8")


TABLE = {"vocab": {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}, "type": "WordPiece"}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "vocab.txt").unlink(),
        vocab(b"\xff\xfe"),
        vocab(b""),
        vocab(b"[PAD]\n" * 10_000 + b"[UNK]\n[CLS]\n[SEP]\n"),  # more than the text encoder has
        vocab(b"a\nb\n"),
        single({"model": {"vocab": {"a": "b"}}}),
        single({"model": {"vocab": {"a": 10**9}, "type": "WordPiece"}}),
        single({"model": TABLE, "version": "1.0", "added_tokens": [], "post_processor": "evil"}),
        single(
            {
                "model": TABLE,
                "version": "1.0",
                "added_tokens": [],
                "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
            }
        ),
        lambda folder: change(folder / "tokenizer_config.json", auto_map={"A": "evil.B"}),
        lambda folder: change(folder / "tokenizer_config.json", model_max_length="long"),
    ],
)
def test_a_spoilt_bert_tokenizer_is_refused_in_one_sentence(
    bert_folder: Path, spoil: Callable[[Path], object]
) -> None:
    spoil(bert_folder / "tokenizer")
    with pytest.raises(ModelArtifactError, match="token") as caught:
        models.load(bert_folder, device=CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 40,
        sentencepiece_file(PIECES)[:-3],
        sentencepiece_file(PIECES, kind=2),
        sentencepiece_file(PIECES, charsmap=b"\x01\x02\x03"),
        sentencepiece_file(["extra", *PIECES]),
        sentencepiece_file(PIECES).replace("猫".encode(), b"\xff\xff\xff"),
        sentencepiece_file(PIECES).replace(b"<unk>", b"<abc>"),
        sentencepiece_file(PIECES).replace(struct.pack("<f", -1.5), struct.pack("<f", np.nan)),
    ],
    ids=range(9),
)
def test_a_spoilt_sentencepiece_file_is_refused_in_one_sentence(
    make_model_folder: Make, data: bytes
) -> None:
    folder = xlm_roberta_folder(make_model_folder(), before_last=True)
    (folder / "tokenizer" / "sentencepiece.bpe.model").write_bytes(data)
    with pytest.raises(ModelArtifactError, match="token") as caught:
        models.load(folder, device=CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": None},
        {"num_hidden_layers": 1},
        {"project_dim": "wide"},
        {"project_dim": 16},
        {"hidden_size": 39},
        {"max_position_embeddings": 20_000},
        {"pad_token_id": -5},
    ],
    ids=str,
)
def test_an_xlm_roberta_configuration_that_does_not_fit_is_refused(
    make_model_folder: Make, values: dict[str, Any]
) -> None:
    folder = xlm_roberta_folder(make_model_folder(), before_last=True)
    change(folder / "text_encoder" / "config.json", **values)
    with pytest.raises(ModelArtifactError) as caught:
        models.load(folder, device=CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_configuration_cannot_ask_for_a_kernel(
    make_model_folder: Make, bert_folder: Path, key: str
) -> None:
    for folder in (make_model_folder(), bert_folder):
        change(folder / "text_encoder" / "config.json", **{key: "someone/evil-kernel"})
        model = models.load(folder, device=CPU)
        assert "evil" not in str(model.text_encoder.config._attn_implementation)


class Tokens:
    """A tokenizer of single letters, with these tokens added."""

    def __init__(self, *added: str) -> None:
        self.added_tokens_encoder = {token: 100 + number for number, token in enumerate(added)}

    def tokenize(self, prompt: str) -> list[str]:
        return [word for word in prompt.split() if word in self.added_tokens_encoder]


def test_an_expanded_prompt_stays_small() -> None:
    names = [chr(ord("a") + k) for k in range(20)]
    vectors = [each for name in names for each in (name, *(f"{name}_{n}" for n in range(1, 3000)))]
    tokens = Tokens(*vectors)
    prompt = text_encoders.expanded(tokens, "z a y " + " ".join(names * 100))
    assert prompt.startswith("z a a_1 a_2 ")
    assert len(prompt) <= 65_536


def test_tokens_of_several_vectors_are_written_out() -> None:
    tokens = Tokens("<a>", "<a>_1", "<a>_2", "<b>", "<c>_1", "<d>", "<d>_2")
    given = "x <a> <b>, <c>_1 <d> <a>_1"
    expected = "x <a> <a>_1 <a>_2 <b>, <c>_1 <d> <a> <a>_1 <a>_2_1"  # as diffusers replaces text
    assert text_encoders.expanded(tokens, given) == expected
    assert StableDiffusionPipeline._maybe_convert_prompt(None, given, tokens) == expected
