"""Links in a model folder must not carry text of this machine into a model, archive or message.

A hostile folder may link to a file outside itself. The hub client's cache consists of links, and a
user may link to weights on another disk.
"""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

import inference
from dreambooth import __main__ as cli
from dreambooth.errors import ModelArtifactError
from dreambooth.evaluation import vision_model
from dreambooth.model_folder import conversion, layout, pack, source
from dreambooth.model_folder.model_card import licence_of
from dreambooth.serving.http import server
from dreambooth.settings.serve_options import ServeSettings

Make = Callable[..., Path]
SECRET = "root:x:0:0:root:/root:/bin/bash"
TEXTS = (
    *("model_index.json", "__model_info__.json", "README.md", "hyperparameters.json"),
    *("unet/config.json", "vae/config.json", "text_encoder/config.json"),
    *("tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json"),
    *("tokenizer/special_tokens_map.json", "tokenizer/vocab.txt", "tokenizer/added_tokens.json"),
    *("scheduler/scheduler_config.json", "samples/01.png", "unet/notes.txt"),
    *("feature_extractor/preprocessor_config.json", "safety_checker/config.json"),
)
WEIGHTS = ("unet", "vae", "text_encoder")


def link(path: Path, target: Path) -> Path:
    """Replace a file by a link; move the file to the target unless something is there already."""
    path.parent.mkdir(exist_ok=True)
    if path.exists() and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, target)
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    return path


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text(SECRET)
    return path


@pytest.mark.parametrize("name", TEXTS)
def test_text_behind_a_link_that_leads_out_is_refused(
    make_model_folder: Make, secret: Path, name: str
) -> None:
    folder = make_model_folder()
    link(folder / name, secret)
    with pytest.raises(ModelArtifactError, match="is a link, or lies behind one") as caught:
        layout.validate_folder(folder)
    assert str(folder / name) in str(caught.value)
    assert SECRET not in str(caught.value)


def test_no_way_in_takes_text_from_behind_a_link(
    make_model_folder: Make,
    secret: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, out = make_model_folder(), tmp_path / "out"
    out.mkdir()
    link(folder / "tokenizer" / "vocab.txt", secret)  # a CLIP tokenizer does not need this file
    with pytest.raises(ModelArtifactError, match=r"vocab\.txt"):
        inference.model_fn(str(folder))
    for words in (
        ["generate", f"--model={folder}", "--prompt=x", f"--out={out}"],
        ["pack", str(folder), str(out / "model.tar.gz")],
        ["convert", str(folder), str(out / "model")],
        ["train", f"--pretrained-model={folder}", f"--model_dir={out}", f"--train={photos(out)}"],
    ):
        assert cli.main(words) == 1
        shown = capsys.readouterr().err
        assert "vocab.txt is a link" in shown
        assert SECRET not in shown
    assert {path.name for path in out.iterdir()} <= {"photos", "out-output"}


def photos(place: Path) -> Path:
    from PIL import Image

    folder = place / "photos"
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (40, 40), (200, 100, 50)).save(folder / "1.png")
    prompts = {"instance_prompt": "a photo of riobugger cat"}
    (folder / "dataset_info.json").write_text(json.dumps(prompts))
    return folder


def test_convert_copies_no_file_from_behind_a_link(
    make_model_folder: Make, secret: Path, tmp_path: Path
) -> None:
    """convert copies every file of a folder, including those that nothing else reads."""
    folder = make_model_folder(bin=True)
    (folder / "docs").mkdir()
    link(folder / "docs" / "notes.md", secret)
    with pytest.raises(ModelArtifactError, match=r"docs/notes\.md is a link"):
        conversion.convert(folder, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["notes.safetensors", "unet/extra.safetensors", "unet/x.bin"])
def test_text_that_is_named_like_weights_is_copied_by_nobody(
    make_model_folder: Make, secret: Path, tmp_path: Path, name: str
) -> None:
    folder = make_model_folder()
    link(folder / name, secret)
    with pytest.raises(ModelArtifactError, match=Path(name).name):
        conversion.convert(folder, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("part", WEIGHTS)
def test_no_archive_holds_text_in_the_place_of_weights(
    make_model_folder: Make, secret: Path, tmp_path: Path, part: str
) -> None:
    folder = make_model_folder()
    (path,) = (folder / part).glob("*.safetensors")
    path.unlink()
    link(path, secret)
    with pytest.raises(ModelArtifactError, match=path.name):
        pack.write(str(folder), tmp_path / "model.tar.gz")
    assert not (tmp_path / "model.tar.gz").exists()


@pytest.mark.parametrize("part", WEIGHTS)
def test_weights_behind_a_link_are_taken_from_a_folder_that_was_named(
    make_model_folder: Make, tmp_path: Path, part: str
) -> None:
    folder, other = make_model_folder(), tmp_path / "other disk"
    (path,) = (folder / part).glob("*.safetensors")
    link(path, other / path.name)
    assert source.open_source(source.locate(str(folder)), tmp_path) == folder
    pack.write(str(folder), tmp_path / "model.tar.gz")
    with tarfile.open(tmp_path / "model.tar.gz") as archive:
        assert all(member.isfile() for member in archive)
    with pytest.raises(ModelArtifactError, match=f"{path.name} is a link"):
        source.open_source(source.locate(None, folder), tmp_path)  # a SageMaker channel
    with pytest.raises(ModelArtifactError, match=f"{path.name} is a link"):
        source.peek(source.locate(None, folder))  # a dry run refuses it too
    assert source.peek(source.locate(str(folder))) is not None
    with pytest.raises(ModelArtifactError, match=f"{path.name} is a link"):
        inference.model_fn(str(folder))
    settings = ServeSettings(model=str(folder), model_is_platforms=True)
    with pytest.raises(ModelArtifactError, match=f"{path.name} is a link"):
        server._folder_of(settings, tmp_path)
    assert server._folder_of(ServeSettings(model=str(folder)), tmp_path) == folder


@pytest.mark.parametrize("part", [*WEIGHTS, "tokenizer", "scheduler"])
def test_a_folder_behind_a_link_that_leads_out_is_refused(
    make_model_folder: Make, tmp_path: Path, part: str
) -> None:
    folder = make_model_folder()
    link(folder / part, tmp_path / part)
    with pytest.raises(ModelArtifactError, match=f"{part}/.* lies behind one"):
        layout.validate_folder(folder)


def test_a_snapshot_of_the_hub_clients_cache_is_a_model(
    make_model_folder: Make, tmp_path: Path
) -> None:
    cache = tmp_path / "models--owner--name"
    folder = make_model_folder(cache / "snapshots" / "0123abcd")
    for number, path in enumerate(sorted(folder.rglob("*.*"))):
        link(path, cache / "blobs" / str(number))
        path.unlink()
        path.symlink_to(os.path.relpath(cache / "blobs" / str(number), path.parent))
    layout.validate_folder(folder, linked_weights=False)
    conversion.convert(folder, tmp_path / "new")
    # In a folder of another name the same links lead outside.
    (cache / "snapshots").rename(cache / "shots")
    with pytest.raises(ModelArtifactError, match="leads out of the model"):
        layout.validate_folder(cache / "shots" / "0123abcd")


def test_links_within_the_folder_and_to_the_folder_are_fine(
    make_model_folder: Make, tmp_path: Path
) -> None:
    folder = make_model_folder()
    for name in ("tokenizer/merges.txt", "vae/config.json"):
        link(folder / name, folder / "shared" / name)
    (tmp_path / "alias").symlink_to(folder)
    layout.validate_folder(folder, linked_weights=False)
    layout.validate_folder(tmp_path / "alias", linked_weights=False)


@pytest.mark.parametrize("name", [*TEXTS, "unet/diffusion_pytorch_model.safetensors"])
@pytest.mark.parametrize("is_link", [False, True])
def test_a_pipe_is_never_opened(
    make_model_folder: Make, tmp_path: Path, name: str, is_link: bool
) -> None:
    folder = make_model_folder()
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(tmp_path / "pipe" if is_link else path)
    if is_link:
        path.symlink_to(tmp_path / "pipe")
    with pytest.raises(ModelArtifactError, match="no regular file"):
        layout.validate_folder(folder)


def test_a_device_is_never_opened(make_model_folder: Make) -> None:
    folder = make_model_folder()
    link(folder / "README.md", Path("/dev/zero"))
    with pytest.raises(ModelArtifactError, match=r"README\.md is no regular file"):
        layout.validate_folder(folder)


def test_a_card_that_became_a_pipe_since_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "README.md")
    assert licence_of(tmp_path) is None


@pytest.mark.parametrize(
    "name", ["config.json", "preprocessor_config.json", "model.safetensors.index.json"]
)
def test_the_folder_of_fid_features_is_held_to_the_same(
    tmp_path: Path, secret: Path, name: str
) -> None:
    folder = tmp_path / "vit"
    folder.mkdir()
    link(folder / name, secret)
    with pytest.raises(ModelArtifactError, match=f"fid_features: .*{name} is a link"):
        vision_model.read(folder)
