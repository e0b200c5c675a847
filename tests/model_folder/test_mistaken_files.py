"""Files that stand where a model or its weights should: what the sentence says they are."""

from __future__ import annotations

import json
import struct
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dreambooth.errors import ModelArtifactError
from dreambooth.model_folder import archives, source, vocabulary
from dreambooth.model_folder.layout import validate_folder
from dreambooth.model_folder.mistaken_files import refuse_stand_in

Make = Callable[..., Path]

POINTERS = [
    b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 3438167534\n" % (b"ab" * 32),
    b"version https://git-lfs.github.com/spec/v1\next-0-foo sha256:12\noid sha256:12\nsize 0\n",
    b"version https://hawser.github.com/spec/v1\noid sha256:12\nsize 3\n",
]
# (what a failed download saved, words of it that must be seen)
MESSAGES = [
    (
        b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code></Error>',
        "AccessDenied",
    ),
    (
        b"\n<?xml version='1.0'?><Error><Code>NoSuchKey</Code>" + b"<Key>k</Key>" * 200,
        "NoSuchKey",
    ),
    (b"<Error><Code>ExpiredToken</Code><Message>x</Message></Error>\n", "ExpiredToken"),
    (
        b'<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML">\n<!-- x -->\n<html><title>404</title>',
        "<html>",
    ),
    (b"<html>\r\n<head><title>403 Forbidden</title></head>\r\n" + b" " * 600, "403 Forbidden"),
    (b'{"message": "Missing Authentication Token"}', "Missing Authentication"),
    (b'{"error":"Repository not found"}' + b"\n" * 5_000, "Repository not found"),
    (b"Entry not found", "Entry not found"),
    ("Zugriff verweigert: Schl\u00fcssel fehlt\n".encode() * 30, "Zugriff verweigert"),
    (b"Invalid username or password.", "Invalid username"),
    (b"404: Not Found", "404: Not Found"),
]
ARCHIVES = ["model.tar.gz", "model.tgz", "model.tar"]
SINGLE = ["sd.safetensors", "v1.ckpt", "m.bin", "x.pt", "lora.safetensors"]
UNET = "unet/diffusion_pytorch_model"
Give = Callable[[Path, Path], object]


def train_source(path: Path, workspace: Path) -> None:
    source.open_source(source.locate(str(path)), workspace)


def channel(path: Path, workspace: Path) -> None:
    source.open_source(source.locate(None, path.parent), workspace)


def refused(give: Give, path: Path, workspace: Path) -> str:
    with pytest.raises(ModelArtifactError) as error:
        give(path, workspace)
    message = str(error.value)
    assert path.name in message
    assert message.isprintable()
    for misleading in ("cut short", "damaged", "run code", "single-file checkpoint, and"):
        assert misleading not in message
    return message


@pytest.mark.parametrize("give", [train_source, channel])
@pytest.mark.parametrize("name", [*ARCHIVES, *SINGLE])
@pytest.mark.parametrize("pointer", POINTERS)
def test_a_pointer_alone_is_called_one(
    tmp_path: Path, give: Give, name: str, pointer: bytes
) -> None:
    folder = tmp_path / "channel"
    folder.mkdir()
    (folder / name).write_bytes(pointer)
    assert "is a git-lfs pointer" in refused(give, folder / name, tmp_path / "w")


@pytest.mark.parametrize("pointer", POINTERS)
@pytest.mark.parametrize(
    "name",
    [
        *(f"{UNET}.safetensors", "vae/diffusion_pytorch_model.safetensors"),
        *("text_encoder/model.safetensors", "unet/config.json", "model_index.json"),
        *("scheduler/scheduler_config.json", "vae/config.json", "text_encoder/config.json"),
    ],
)
def test_a_pointer_in_a_model_is_called_one(
    make_model_folder: Make, name: str, pointer: bytes
) -> None:
    path = make_model_folder() / name
    path.write_bytes(pointer)
    assert "is a git-lfs pointer" in refused(
        lambda _path, folder: validate_folder(folder),
        path,
        path.parent.parent if "/" in name else path.parent,
    )


@pytest.mark.parametrize("options", [{"bin": True}, {"sharded": True}, {"variant": "fp16"}])
def test_a_pointer_in_other_layouts_is_called_one(
    make_model_folder: Make, options: dict[str, object]
) -> None:
    files = sorted((make_model_folder(**options) / "unet").glob("*.[sb]*"))
    for path in files:
        kept = path.read_bytes()
        path.write_bytes(POINTERS[0])
        with pytest.raises(ModelArtifactError, match=f"{path.name} is a git-lfs pointer"):
            validate_folder(path.parent.parent)
        path.write_bytes(kept)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.json"])
def test_a_pointer_among_a_tokenizers_files_is_called_one(
    make_model_folder: Make, name: str
) -> None:
    folder = make_model_folder() / "tokenizer"
    (folder / name).write_bytes(POINTERS[0])
    with pytest.raises(ModelArtifactError, match=f"{name} is a git-lfs pointer"):
        vocabulary.read(folder)


def test_a_pointer_that_is_not_read_is_no_fault(make_model_folder: Make) -> None:
    """A clone may have fetched only the weights that are needed."""
    folder = make_model_folder()
    for name in (f"{UNET}.bin", f"{UNET}.fp16.safetensors", "sd.ckpt", "unet/model.msgpack"):
        (folder / name).write_bytes(POINTERS[0])
    validate_folder(folder)


@pytest.mark.parametrize("give", [train_source, channel])
@pytest.mark.parametrize("name", [*ARCHIVES, *SINGLE])
@pytest.mark.parametrize(("content", "words"), MESSAGES)
def test_a_message_in_place_of_a_file_is_shown(
    tmp_path: Path, give: Give, name: str, content: bytes, words: str
) -> None:
    folder = tmp_path / "channel"
    folder.mkdir()
    (folder / name).write_bytes(content)
    message = refused(give, folder / name, tmp_path / "w")
    wanted = "a tar archive" if name in ARCHIVES else "a weight file"
    assert f"is not {wanted} but text that begins with" in message
    assert words in message


@pytest.mark.parametrize(("content", "words"), MESSAGES)
@pytest.mark.parametrize("bin", [False, True])
def test_a_message_in_place_of_weights_is_shown(
    make_model_folder: Make, content: bytes, words: str, bin: bool
) -> None:
    path = make_model_folder(bin=bin) / f"{UNET}.{'bin' if bin else 'safetensors'}"
    path.write_bytes(content)
    assert words in refused(lambda _path, folder: validate_folder(folder), path, path.parents[1])


@pytest.mark.parametrize("name", ARCHIVES)
@pytest.mark.parametrize(
    ("magic", "kind"),
    [
        (b"PK\x03\x04\x14\0", "zip"),
        (b"BZh91AY&SY\0", "bzip2"),
        (b"\xfd7zXZ\0\0", "xz"),
        (b"\x28\xb5\x2f\xfd\0", "zstd"),
        (b"7z\xbc\xaf\x27\x1c\0", "7z"),
        (b"Rar!\x1a\x07\0", "rar"),
    ],
)
def test_other_archives_are_called_by_their_kind(
    tmp_path: Path, name: str, magic: bytes, kind: str
) -> None:
    path = tmp_path / name
    path.write_bytes(magic + bytes(3_000))
    assert f"but {kind}: pack the folder" in refused(train_source, path, tmp_path / "w")


@settings(max_examples=200)
@given(st.binary(max_size=600))
def test_only_text_is_called_text(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "mistaken"
    path.write_bytes(data)
    try:
        refuse_stand_in(path, "a weight file")
    except ModelArtifactError:
        text = data[:512].decode("utf-8", "ignore")
        assert all(c.isprintable() or c.isspace() for c in text)


def test_the_embedded_models_files_are_not_mistaken(tmp_path: Path) -> None:
    root = source.locate("tiny").path
    assert root is not None
    for path in root.rglob("*.safetensors"):
        refuse_stand_in(path, "a weight file")
    for mode, name in (("w", "a.tar"), ("w:gz", "a.tar.gz")):
        with tarfile.open(tmp_path / name, mode) as tar:  # type: ignore[call-overload]
            tar.add(root / "scheduler", "scheduler")
        assert archives.member_names(tmp_path / name)


# Weights that are no whole model.


def write_safetensors(path: Path, names: Sequence[str], metadata: object = None) -> Path:
    header = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]}
        for i, name in enumerate(names)
    }
    text = json.dumps(({"__metadata__": metadata} if metadata else {}) | header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4 * len(names)))
    return path


# kohya's scripts, diffusers of three ages, PEFT, LyCORIS.
LORA_NAMES = [
    "lora_{kohya}_down_blocks_0_attentions_0_proj_in.lora_{way}.weight",
    "lora_{kohya}_mid_block_attentions_0_proj_in.alpha",
    "{part}.down_blocks.0.attentions.0.to_q.lora.{way}.weight",
    "{part}.mid_block.attentions.0.processor.to_q_lora.{way}.weight",
    "{part}.up_blocks.1.attentions.0.to_k.lora_{letter}.weight",
    "{part}.up_blocks.1.to_k.lora_linear_layer.{way}.weight",
    "base_model.model.down_blocks.0.to_v.lora_{letter}.default.weight",
    "base_model.model.conv_in.lora_magnitude_vector",
    "lora_{kohya}_down_blocks_0_proj_in.dora_scale",
    "lycoris_{kohya}_mid_block_proj_in.hada_w1_a",
    "lycoris_{kohya}_mid_block_proj_in.lokr_w1",
    "down_blocks.0.attn1.to_q.oft_blocks",
]


@settings(max_examples=120)
@given(
    st.lists(st.sampled_from(LORA_NAMES), min_size=1, max_size=4),
    st.sampled_from(["unet", "te", "te1"]),
    st.sampled_from(["unet", "text_encoder"]),
    st.sampled_from(["down", "up"]),
    st.sampled_from(["A", "B"]),
    st.sampled_from(["pytorch_lora_weights", "adapter_model", "style", "v1-5"]),
    st.sampled_from(["safetensors", "SAFETENSORS"]),
)
def test_a_lora_alone_is_called_one(
    tmp_path_factory: pytest.TempPathFactory,
    patterns: list[str],
    kohya: str,
    part: str,
    way: str,
    letter: str,
    stem: str,
    suffix: str,
) -> None:
    folder = tmp_path_factory.mktemp("lora")
    names = {p.format(kohya=kohya, part=part, way=way, letter=letter) for p in patterns}
    path = write_safetensors(folder / f"{stem}.{suffix}", sorted(names), {"format": "pt"})
    for give in (train_source, channel):
        message = refused(give, path, folder / "w")
        assert "is a LoRA" in message
        assert "fuse_lora" in message


@pytest.mark.parametrize("name", ["pytorch_lora_weights.bin", "my-LoRA.pt", "adapter_model.bin"])
def test_a_pickled_lora_is_known_by_its_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04" + bytes(50))
    assert "is a LoRA" in refused(channel, tmp_path / name, tmp_path / "w")


@pytest.mark.parametrize(
    "names",
    [
        ["emb_params"],
        ["<cat>"],
        ["conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"],
        ["encoder.conv_in.weight", "decoder.conv_in.weight"],
        ["first_stage_model.encoder.conv_in.weight"],
        ["control_model.input_blocks.0.0.weight"],
        ["text_model.embeddings.token_embedding.weight"],
    ],
)
def test_a_part_alone_is_no_checkpoint(tmp_path: Path, names: list[str]) -> None:
    path = write_safetensors(tmp_path / "part.safetensors", names)
    message = refused(channel, path, tmp_path / "w")
    assert "not those of a whole Stable Diffusion model" in message
    assert min(names) in message


@pytest.mark.parametrize("metadata", [None, {"merged": "0.5 lora_a + lora_b"}])
@pytest.mark.parametrize("stem", ["v1-5-pruned", "flora", "with-lora-merged"])
def test_a_checkpoint_is_still_called_one(tmp_path: Path, stem: str, metadata: object) -> None:
    names = ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.explora.weight"]
    path = write_safetensors(tmp_path / f"{stem}.safetensors", names, metadata)
    assert source.locate(str(path)).kind == "single_file"
    with pytest.raises(ModelArtifactError, match=r"is a single-file checkpoint.*dreambooth conver"):
        validate_folder(path)


@pytest.mark.parametrize(
    "inside", ["pytorch_lora_weights.safetensors", "adapter_model.safetensors"]
)
def test_a_tarball_of_a_lora_says_so(tmp_path: Path, inside: str) -> None:
    path = write_safetensors(tmp_path / inside, ["unet.conv_in.lora_A.weight"])
    archive = tmp_path / "model.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(path, inside)
    message = refused(train_source, archive, tmp_path / "w")
    assert f"model.tar.gz holds {inside}, which is a LoRA" in message


@settings(max_examples=100)
@given(st.binary(max_size=200))
def test_any_header_is_told_or_left_to_the_checkpoints_sentence(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    for content in (data, struct.pack("<Q", len(data)) + data, b"\xff" * 8 + data):
        path.write_bytes(content)
        with pytest.raises(ModelArtifactError):
            source.locate(str(path))
