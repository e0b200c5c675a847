"""Model folders with pickles that hold more than weights, damaged headers and foreign classes."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Own = Callable[..., Path]
UNET = "unet/diffusion_pytorch_model.safetensors"


def header(table: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    raw = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def tensor(begin: int, end: int, shape: list[Any], dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


FOUR = tensor(0, 4, [1])
SAFETENSORS: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "length alone": struct.pack("<Q", 0),
    "length beyond the file": header(b"{}", length=2**20),
    "length of an exabyte": header(b"{}", length=2**60),
    "negative length": header(b"{}", length=2**64 - 1),
    "no json": header(b"not json at all"),
    "cut json": header(b'{"a": {"dtype": "F32", "sha'),
    "a list": header([1, 2, 3]),
    "null": header(b"null"),
    "not utf-8": header(b'{"caf\xe9": 1}'),
    "deep": header(b"[" * 50_000),
    "the same name twice": header(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"\0" * 4,
    ),
    "overlapping": header({"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}, b"\0" * 12),
    "the same bytes twice": header({"a": FOUR, "b": FOUR}, b"\0" * 4),
    "a hole": header({"a": FOUR, "b": tensor(8, 12, [1])}, b"\0" * 12),
    "a hole in front": header({"a": tensor(4, 8, [1])}, b"\0" * 8),
    "bytes behind": header({"a": FOUR}, b"\0" * 5),
    "bytes missing": header({"a": FOUR}, b"\0" * 3),
    "backward offsets": header({"a": tensor(4, 0, [1])}, b"\0" * 4),
    "negative offsets": header({"a": tensor(-4, 0, [1])}, b"\0" * 4),
    "offsets of text": header({"a": {**FOUR, "data_offsets": ["0", "4"]}}, b"\0" * 4),
    "three offsets": header({"a": {**FOUR, "data_offsets": [0, 2, 4]}}, b"\0" * 4),
    "no offsets": header({"a": {"dtype": "F32", "shape": [1]}}, b"\0" * 4),
    "offsets beyond": header({"a": tensor(0, 2**40, [2**38])}, b"\0" * 4),
    "negative shape": header({"a": tensor(0, 4, [-1, -1])}, b"\0" * 4),
    "a shape of fractions": header({"a": tensor(0, 4, [0.5, 2])}, b"\0" * 4),
    "a shape that overflows": header({"a": tensor(0, 4, [2**62, 4, 2**62])}, b"\0" * 4),
    "a shape of text": header({"a": {**FOUR, "shape": "1"}}, b"\0" * 4),
    "a shape too large": header({"a": tensor(0, 4, [2])}, b"\0" * 4),
    "an unknown type": header({"a": tensor(0, 4, [1], "Q128")}, b"\0" * 4),
    "a type that is a number": header({"a": tensor(0, 4, [1], 7)}, b"\0" * 4),
    "an entry that is a text": header({"a": "tensor"}),
    "an entry that is null": header({"a": None}),
    "metadata of numbers": header({"__metadata__": {"a": 1}, "a": FOUR}, b"\0" * 4),
    "metadata that is a list": header({"__metadata__": [], "a": FOUR}, b"\0" * 4),
    "a pickle": pickle.dumps({"a": 1}),
    "a zip": b"PK\x03\x04" + b"\0" * 100,
    "git lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
    "html": b"<html><body>401 Unauthorized</body></html>",
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_a_damaged_safetensors_file_is_named(sandbox: Any, own_model: Own, name: str) -> None:
    (own_model() / UNET).write_bytes(SAFETENSORS[name])
    sandbox.refuses("diffusion_pytorch_model.safetensors")


def _wrong_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / UNET)
    change(state)
    save_file(state, folder / UNET)


CHANGES: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "none": dict.clear,
    "one missing": lambda state: state.pop("conv_in.weight"),
    "one more": lambda state: state.update(extra=torch.zeros(1)),
    "another shape": lambda state: state.update({"conv_in.bias": torch.zeros(7)}),
    "not a number": lambda state: state["conv_in.weight"].fill_(float("nan")),
    "infinite": lambda state: state["conv_out.bias"].fill_(float("inf")),
    "integers": lambda state: state.update({"conv_in.bias": torch.zeros(32, dtype=torch.int64)}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_tensors_that_do_not_fit_are_refused(sandbox: Any, own_model: Own, name: str) -> None:
    _wrong_tensors(own_model(), CHANGES[name])  # type: ignore[arg-type]
    sandbox.refuses("unet")


class Calls:
    """An object whose pickle makes a call when it is loaded."""

    def __init__(self, what: Callable[..., object], *arguments: object) -> None:
        self._call = (what, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self._call


def saved(value: object, *, old: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not old)
    return buffer.getvalue()


def zip_of(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "/"), data)
    return buffer.getvalue()


WEIGHT = torch.zeros(1)
PICKLES: dict[str, Callable[[], bytes]] = {
    "system": lambda: pickle.dumps(Calls(os.system, "touch owned")),
    "eval": lambda: pickle.dumps(Calls(eval, "open('owned', 'w')")),
    "exec": lambda: pickle.dumps({"a": Calls(exec, "open('owned', 'w')")}),
    "open": lambda: pickle.dumps(Calls(open, "owned", "w")),
    "system in a torch file": lambda: saved({"a": Calls(os.system, "touch owned")}),
    "system in an old torch file": lambda: saved({"a": Calls(os.system, "touch owned")}, old=True),
    "eval beside weights": lambda: saved({"a": WEIGHT, "b": Calls(eval, "open('owned', 'w')")}),
    "mkdir": lambda: saved({"a": Calls(os.mkdir, "owned")}),
    "getattr": lambda: saved({"a": Calls(getattr, WEIGHT, "data_ptr")}),
    "torch.load": lambda: saved({"a": Calls(torch.load, "owned")}),
    "a whole module": lambda: saved(torch.nn.Linear(2, 2)),
    "a list": lambda: saved([WEIGHT]),
    "a tensor": lambda: saved(WEIGHT),
    "a number": lambda: saved(7),
    "no tensors": lambda: saved({"a": "text"}),
    "keys that are numbers": lambda: saved({1: WEIGHT}),
    "nested": lambda: saved({"a": {"b": WEIGHT}}),
    "empty": lambda: b"",
    "noise": lambda: b"\x80\x05noise that is no pickle",
    "cut": lambda: saved({"a": torch.zeros(1_000)})[:600],
    "a zip of nothing": lambda: zip_of(),
    "a zip without a pickle": lambda: zip_of(readme=b"hello"),
    "a zip that leads out": lambda: zip_of(**{"..____owned": b"x"}),
    "a recursive pickle": lambda: b"\x80\x04" + b"(" * 100_000 + b".",
    "a memo bomb": lambda: b"\x80\x04]" + b"(K\x01" * 1_000 + b"R.",
}


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_of_more_than_tensors_is_refused_unrun(
    sandbox: Any, own_model: Own, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sandbox.root / "here").mkdir()
    monkeypatch.chdir(sandbox.root / "here")
    folder = own_model(bin=True)
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(PICKLES[name]())
    sandbox.refuses("unet")
    assert not list(sandbox.root.rglob("owned"))


INDEXES: dict[str, dict[str, object]] = {
    "another pipeline": {"_class_name": "StableDiffusionXLPipeline"},
    "no pipeline": {"_class_name": None},
    "a pipeline of numbers": {"_class_name": 7},
    "os.system": {"unet": ["os", "system"]},
    "a module of the folder": {"unet": ["my_unet", "UNet2DConditionModel"]},
    "another class": {"unet": ["diffusers", "UNet3DConditionModel"]},
    "another library": {"text_encoder": ["os", "CLIPTextModel"]},
    "a class of dots": {"vae": ["diffusers", "AutoencoderKL.from_pretrained"]},
    "three names": {"vae": ["diffusers", "AutoencoderKL", "evil"]},
    "one name": {"vae": ["diffusers"]},
    "a class of numbers": {"scheduler": ["diffusers", 7]},
    "an object": {"scheduler": {"class": "PNDMScheduler"}},
    "a foreign scheduler": {"scheduler": ["diffusers", "ExecScheduler"]},
    "another part": {"controlnet": ["diffusers", "ControlNetModel"]},
    "a part with code": {"backdoor": ["builtins", "exec"]},
    "no unet": {"unet": [None, None]},
    "a unet that is a text": {"unet": "UNet2DConditionModel"},
    "a foreign safety checker": {"safety_checker": ["evil", "Checker"]},
}


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_that_names_foreign_classes(sandbox: Any, own_model: Own, name: str) -> None:
    path = own_model() / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **INDEXES[name]}))
    sandbox.refuses("base")


CONFIGS: dict[str, tuple[str, dict[str, object]]] = {
    "unet with code": ("unet", {"auto_map": {"AutoModel": "evil.Model"}}),
    "vae with code": ("vae", {"auto_map": {"AutoModel": "evil.Model"}}),
    "remote code": ("text_encoder", {"trust_remote_code": True}),
    "a foreign unet": ("unet", {"_class_name": "EvilModel"}),
    "a foreign vae": ("vae", {"_class_name": "AsymmetricAutoencoderKL"}),
    "a foreign architecture": ("text_encoder", {"architectures": ["LlamaForCausalLM"]}),
    "a million layers": ("unet", {"layers_per_block": 1_000_000}),
    "a million hidden layers": ("text_encoder", {"num_hidden_layers": 1_000_000}),
    "a foreign block": ("unet", {"down_block_types": ["EvilBlock", "DownBlock2D"]}),
    "channels of text": ("unet", {"block_out_channels": "many"}),
    "no channels": ("unet", {"block_out_channels": []}),
    "channels of zero": ("unet", {"block_out_channels": [0, 0]}),
    "negative latents": ("vae", {"latent_channels": -4}),
    "a size of text": ("unet", {"sample_size": "large"}),
    "a huge size": ("unet", {"sample_size": 10**9}),
    "other latents": ("unet", {"in_channels": 9}),
    "another text width": ("unet", {"cross_attention_dim": 1024}),
    "no steps": ("scheduler", {"num_train_timesteps": 0}),
    "endless steps": ("scheduler", {"num_train_timesteps": 10**9}),
    "steps of text": ("scheduler", {"num_train_timesteps": "1000"}),
    "an unknown prediction": ("scheduler", {"prediction_type": "evil"}),
    "a prediction without a loss": ("scheduler", {"prediction_type": "sample"}),
    "an unknown curve": ("scheduler", {"beta_schedule": "evil"}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_that_asks_for_too_much(sandbox: Any, own_model: Own, name: str) -> None:
    part, changes = CONFIGS[name]
    file = "scheduler_config.json" if part == "scheduler" else "config.json"
    path = own_model() / part / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    sandbox.refuses("base")


FILES = ("model_index.json", "unet/config.json", "vae/config.json", "tokenizer/vocab.json")
CONTENTS = {"empty": b"", "a list": b"[]", "cut": b'{"a":', "not utf-8": b"\xff\xfe{}"}


@pytest.mark.parametrize("file", [*FILES, "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("content", CONTENTS)
def test_json_that_is_none(sandbox: Any, own_model: Own, file: str, content: str) -> None:
    (own_model() / file).write_bytes(CONTENTS[content])
    sandbox.refuses(file.rpartition("/")[2])


@pytest.mark.parametrize("file", [*FILES, UNET, "tokenizer/merges.txt"])
@pytest.mark.parametrize("kind", ["missing", "fifo", "loop"])
def test_files_that_are_none(sandbox: Any, own_model: Own, file: str, kind: str) -> None:
    path = own_model() / file
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    sandbox.refuses("base")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.safetensors", "is not a valid safetensors file"),
        *((f"model.{end}", "dreambooth convert FILE FOLDER") for end in ("ckpt", "pt", "bin")),
    ],
)
def test_a_single_file_gets_a_sentence(sandbox: Any, name: str, words: str) -> None:
    sandbox.model = sandbox.root / name
    sandbox.model.write_bytes(b"\0" * 100)
    assert words in sandbox.refuses(name)
