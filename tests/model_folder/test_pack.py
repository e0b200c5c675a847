from __future__ import annotations

import errno
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dreambooth.__main__ import main
from dreambooth.errors import ModelArtifactError, ResourceError, UserError
from dreambooth.limits import LIMITS
from dreambooth.model_folder import archives, code_folder, layout, pack

Make = Callable[..., Path]

MODEL_FILES = {
    *("model_index.json", "scheduler/scheduler_config.json"),
    *("unet/config.json", "unet/diffusion_pytorch_model.safetensors"),
    *("vae/config.json", "vae/diffusion_pytorch_model.safetensors"),
    *("text_encoder/config.json", "text_encoder/model.safetensors"),
    *("tokenizer/vocab.json", "tokenizer/merges.txt"),
    *("tokenizer/special_tokens_map.json", "tokenizer/tokenizer_config.json"),
}


def members(archive: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(archive) as tar:
        return tar.getmembers()


def names(archive: Path) -> set[str]:
    return {member.name for member in members(archive)}


def test_the_archive_holds_the_model_at_its_top(small_model_folder: Path, tmp_path: Path) -> None:
    pack.write(str(small_model_folder), tmp_path / "new" / "model.tar.gz")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.tar.gz"]
    unpacked = tmp_path / "unpacked"
    archives.extract(tmp_path / "new" / "model.tar.gz", unpacked)
    layout.validate_folder(unpacked)
    for name in MODEL_FILES:
        assert (unpacked / name).read_bytes() == (small_model_folder / name).read_bytes()
    assert names(tmp_path / "new" / "model.tar.gz") == MODEL_FILES


def test_what_an_export_adds_is_packed_and_what_a_stranger_adds_is_not(
    make_model_folder: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_model_folder(model_info={"resolution": 32})
    ours = ("README.md", "hyperparameters.json", "samples/01_a_cat.png")
    strangers = (
        *("model.ckpt", "notes/private.txt", "code/inference.py", ".git/config", "samples/.x.png"),
        *("samples/run.py", "unet/modeling.py", "unet/.DS_Store", "tokenizer/tokenizer.py"),
        *("scheduler/state.pkl", "unet/optimizer.safetensors", "safety_checker/config.json"),
    )
    for name in ours + strangers:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    pack.write(str(folder), tmp_path / "model.tar.gz")
    assert names(tmp_path / "model.tar.gz") == MODEL_FILES | {*ours, "__model_info__.json"}
    assert [record.getMessage() for record in caplog.records] == [
        "left out, no part of a model folder: model.ckpt, notes"
    ]


def test_only_the_copy_of_the_weights_that_is_read_is_packed(
    make_model_folder: Make, tmp_path: Path
) -> None:
    folder = make_model_folder(sharded=True)
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"a second copy")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a third one")
    pack.write(str(folder), tmp_path / "model.tar.gz")
    inside = {name for name in names(tmp_path / "model.tar.gz") if name.startswith("unet/")}
    assert inside == {
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
    }


def test_the_same_model_gives_the_same_bytes(make_model_folder: Make, tmp_path: Path) -> None:
    first, second = make_model_folder(), make_model_folder()
    for path in second.rglob("*"):
        os.utime(path, (1, 1))
        if path.is_file():
            path.chmod(0o600)
    pack.write(str(first), tmp_path / "1.tar.gz", with_code=True)
    pack.write(str(second), tmp_path / "2.tar.gz", with_code=True)
    pack.write(str(tmp_path / "1.tar.gz"), tmp_path / "3.tar.gz", with_code=True)
    assert (tmp_path / "1.tar.gz").read_bytes() == (tmp_path / "2.tar.gz").read_bytes()
    assert (tmp_path / "1.tar.gz").read_bytes() == (tmp_path / "3.tar.gz").read_bytes()
    for member in members(tmp_path / "1.tar.gz"):
        assert member.isreg()
        assert (member.uid, member.gid, member.uname, member.gname) == (0, 0, "", "")
        assert (member.mode, member.mtime) == (0o644, 315_532_800)
    listed = [member.name for member in members(tmp_path / "1.tar.gz")]
    assert listed == sorted(listed)


def test_with_code_adds_our_modules_and_what_they_need(
    small_model_folder: Path, tmp_path: Path
) -> None:
    pack.write(str(small_model_folder), tmp_path / "model.tar.gz", with_code=True)
    ours = {f"code/{path.as_posix()}" for path in code_folder.sources()}
    added = names(tmp_path / "model.tar.gz") - MODEL_FILES
    assert added == ours | {"code/requirements.txt"}
    archives.extract(tmp_path / "model.tar.gz", tmp_path / "unpacked")
    inside = (tmp_path / "unpacked" / "code" / "requirements.txt").read_text()
    assert inside == code_folder.REQUIREMENTS


IN_AN_ENDPOINT = """
import sys
sys.path.insert(0, sys.argv[1] + "/code")
import inference
model = inference.model_fn(sys.argv[1])
data = inference.input_fn(b'{"prompt": "a cat", "num_inference_steps": 1}', "application/json")
body, kind = inference.output_fn(inference.predict_fn(data, model), "image/jpeg")
assert (body[:2], kind) == (b"\\xff\\xd8", "image/jpeg")
ours = [m for name, m in sys.modules.items() if name.partition(".")[0] == "dreambooth"]
assert {m.__file__.startswith(sys.argv[1] + "/code/dreambooth/") for m in ours} == {True}
"""


def test_the_code_runs_where_nothing_else_of_ours_is(
    small_model_folder: Path, tmp_path: Path
) -> None:
    pack.write(str(small_model_folder), tmp_path / "model.tar.gz", with_code=True)
    archives.extract(tmp_path / "model.tar.gz", tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-I", "-c", IN_AN_ENDPOINT, str(tmp_path / "model")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,  # it must end by itself, whatever threads the model has started
    )
    assert done.returncode == 0, done.stderr


def test_a_safety_checker_goes_along(make_model_folder: Make, tmp_path: Path) -> None:
    folder = make_model_folder()
    index = layout.read_index(folder)
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    added = (
        *("safety_checker/config.json", "safety_checker/model.safetensors"),
        "feature_extractor/preprocessor_config.json",
    )
    for name in added:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"{}")
    shutil.copyfile(
        folder / "vae" / "diffusion_pytorch_model.safetensors",
        folder / "safety_checker" / "model.safetensors",
    )
    pack.write(str(folder), tmp_path / "model.tar.gz")
    assert names(tmp_path / "model.tar.gz") == MODEL_FILES | {*added}


def test_old_pickles_are_refused_and_the_remedy_named(
    make_model_folder: Make, tmp_path: Path
) -> None:
    with pytest.raises(ModelArtifactError, match="python -m dreambooth convert IN OUT"):
        pack.write(str(make_model_folder(bin=True)), tmp_path / "model.tar.gz")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_model_is_refused_and_leaves_nothing(
    make_model_folder: Make, tmp_path: Path
) -> None:
    folder = make_model_folder()
    shutil.rmtree(folder / "vae")
    with pytest.raises(ModelArtifactError, match="vae/ is missing"):
        pack.write(str(folder), tmp_path / "out" / "model.tar.gz")
    with pytest.raises(ModelArtifactError, match="no-such-folder"):
        pack.write(str(tmp_path / "no-such-folder"), tmp_path / "out" / "model.tar.gz")
    (folder / "vae").symlink_to(folder / "unet")
    (folder / "README.md").symlink_to(folder / "nowhere")
    with pytest.raises(ModelArtifactError, match="vae"):
        pack.write(str(folder), tmp_path / "out" / "model.tar.gz")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_link_to_nothing_is_named(make_model_folder: Make, tmp_path: Path) -> None:
    folder = make_model_folder()
    (folder / "README.md").symlink_to(folder / "nowhere")
    with pytest.raises(ModelArtifactError, match=r"README\.md is no regular file"):
        pack.write(str(folder), tmp_path / "model.tar.gz")


def test_nothing_is_overwritten(small_model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.tar.gz"
    out.write_bytes(b"an archive of somebody")
    with pytest.raises(UserError, match="is there already"):
        pack.write(str(small_model_folder), out)
    assert out.read_bytes() == b"an archive of somebody"


def test_the_name_says_what_it_is(small_model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"must end in \.tar\.gz"):
        pack.write(str(small_model_folder), tmp_path / "model.zip")


def test_absurd_sizes_are_refused_before_any_work(small_model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.tar.gz"
    with pytest.raises(ModelArtifactError, match=r"comes to \S+ MiB, more than the 0\.0 MiB"):
        pack.write(str(small_model_folder), out, limits=replace(LIMITS, archive_max_bytes=1000))
    with pytest.raises(ModelArtifactError, match="comes to 12 files, more than the 3"):
        pack.write(str(small_model_folder), out, limits=replace(LIMITS, archive_max_members=3))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Limit every file to 100,000 bytes, which makes writing really fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_leaves_nothing_behind(small_model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="free some space there") as caught:
        pack.write(str(small_model_folder), tmp_path / "model.tar.gz")
    cause = caught.value.__cause__
    assert isinstance(cause, OSError)
    assert cause.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_reported(unprivileged_folder: Path) -> None:
    closed = unprivileged_folder / "closed"
    closed.mkdir(mode=0o555)
    with pytest.raises(ResourceError, match="Permission denied"):
        pack.write("tiny", closed / "model.tar.gz")


def test_the_verb_prints_the_archive(
    small_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logging.getLogger().handlers.clear()
    out = tmp_path / "model.tar.gz"
    assert main(["pack", str(small_model_folder), str(out), "--with-code"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert "code/inference.py" in names(out)
    assert main(["pack", str(small_model_folder), str(out)]) == 1
    assert capsys.readouterr().err.startswith("error: ")
