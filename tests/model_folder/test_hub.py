from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest

from dreambooth.errors import ModelArtifactError, ResourceError
from dreambooth.model_folder import hub, source

HUB = [
    ".gitattributes",
    "README.md",
    "model_index.json",
    "v2-1_512-ema-pruned.ckpt",
    "v2-1_512-ema-pruned.safetensors",
    "feature_extractor/preprocessor_config.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/model.safetensors",
    "text_encoder/pytorch_model.bin",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
    "unet/diffusion_pytorch_model.fp16.bin",
    "unet/diffusion_pytorch_model.safetensors.index.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.bin",
    "vae/nested/evil.json",
]


def test_of_a_hub_repository_only_one_copy_of_the_weights_is_fetched() -> None:
    assert sorted(hub.needed_files(HUB)) == sorted(
        name
        for name in HUB
        if not name.endswith((".ckpt", "pruned.safetensors", ".gitattributes", "evil.json"))
        and "fp16" not in name
        and name != "text_encoder/pytorch_model.bin"
    )


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def silent() -> Iterator[str]:
    """Yield the address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


class Hub(BaseHTTPRequestHandler):
    """A hub with one model of two files and a LoRA, which demands a login for all others."""

    def do_GET(self) -> None:
        if not self.path.startswith(("/api/models/owner/known", "/api/models/owner/lora")):
            self.send_response(401)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        names = ("model_index.json", "weights.ckpt")
        if "lora" in self.path:
            names = ("README.md", "pytorch_lora_weights.safetensors")
        siblings = [{"rfilename": name} for name in names]
        body = json.dumps({"id": "owner/known", "siblings": siblings}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def small_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        monkeypatch.setattr(
            huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}"
        )
        yield
        server.shutdown()
        thread.join()


def test_a_hub_that_does_not_answer_is_one_sentence_within_seconds(
    tmp_path: Path,
    silent: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(hub, "_SECONDS", 0.5)
    found = source.locate("out/mine", None)
    assert found.kind == "hub"
    levels = logging.getLogger("huggingface_hub").level
    with caplog.at_level(logging.INFO):
        # The first refuses connections, the second never answers.
        for endpoint in ("http://127.0.0.1:9", silent):
            monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
            start = time.monotonic()
            with pytest.raises(ResourceError) as caught:
                source.open_source(found, tmp_path)
            assert time.monotonic() - start < 3
            message = str(caught.value)
            assert message.startswith(f"There is no folder or file out/mine in {tmp_path}")
            assert "the hub cannot be reached" in message
            assert "\n" not in message
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("huggingface_hub").level == levels


def test_offline_mode_is_the_same_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ResourceError, match="no earlier download"):
        hub.download("owner/name")


def test_an_earlier_download_is_taken_where_there_is_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository, commit = tmp_path / "cache" / "models--owner--name", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    assert hub.download("owner/name") == repository / "snapshots" / commit


@pytest.mark.usefixtures("small_hub")
def test_a_name_that_the_hub_does_not_know_may_be_a_mistyped_path() -> None:
    # The last two are not valid hub names.
    for name in ("out/mine", "out/my--model", "out/mine.git"):
        with pytest.raises(ModelArtifactError, match=r"no folder or file out/.*the hub has no"):
            hub.download(name)


@pytest.mark.usefixtures("small_hub")
def test_a_repository_of_a_lora_is_no_model() -> None:
    with pytest.raises(ModelArtifactError, match=r"owner/lora is not a whole model.*a LoRA"):
        hub.download("owner/lora")


@pytest.mark.usefixtures("small_hub")
def test_a_repositorys_files_are_listed() -> None:
    assert hub._file_names("owner/known") == ["model_index.json", "weights.ckpt"]


@pytest.mark.usefixtures("small_hub")
def test_a_base_that_has_moved_is_told_where_it_is(tmp_path: Path) -> None:
    for name in ("runwayml/stable-diffusion-v1-5", "stabilityai/stable-diffusion-2-1-base"):
        with pytest.raises(ModelArtifactError, match=r"stable-diffusion-v1-5/.*under sd2-commun"):
            hub.download(name)
    with pytest.raises(ModelArtifactError) as error:
        hub.download("owner/other")
    assert "sd2-community" not in str(error.value)
    with pytest.raises(ModelArtifactError, match="nothing is fetched unless it is named"):
        source.locate(None, tmp_path / "nothing")
