from __future__ import annotations

import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dreambooth.errors import ModelArtifactError, ResourceError
from dreambooth.model_folder import conversion, weights

Make = Callable[..., Path]
CPU = torch.device("cpu")


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(3, 2)
        self.second = torch.nn.Conv2d(2, 4, 3)


@pytest.fixture
def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def write(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "model.safetensors")
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Net:
    with torch.device("meta"):
        empty = Net()
    weights.load_into(empty, folder, device=CPU, dtype=dtype)
    return empty


def test_weights_come_out_bit_for_bit_in_memory_of_their_own(tmp_path: Path, net: Net) -> None:
    folder = write(tmp_path / "net", net.state_dict())
    loaded = load(folder)
    (folder / "model.safetensors").write_bytes(b"gone")  # a memory-mapped file would crash here
    for key, value in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_cast(tmp_path: Path, net: Net, stored: torch.dtype) -> None:
    state = {key: value.to(stored) for key, value in net.state_dict().items()}
    loaded = load(write(tmp_path / "net", state))
    for key, value in state.items():
        assert loaded.state_dict()[key].dtype == torch.float32
        assert torch.equal(loaded.state_dict()[key], value.float())


def test_tables_of_positions_are_harmless(tmp_path: Path, net: Net) -> None:
    extra = {"embeddings.position_ids": torch.arange(3)}
    load(write(tmp_path / "net", net.state_dict() | extra))


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, net: Net) -> None:
    state = net.state_dict()
    cases: list[tuple[dict[str, torch.Tensor], str]] = [
        ({k: v for k, v in state.items() if k != "first.bias"}, "lacks first.bias"),
        (state | {"third.weight": torch.zeros(1)}, "holds the foreign third.weight"),
        (state | {"first.bias": torch.zeros(3)}, r"'first.bias' in the shape \[3\]"),
        (state | {"first.bias": torch.zeros(2, dtype=torch.int32)}, "torch.int32"),
        (state | {"first.bias": torch.tensor([0.0, float("nan")])}, "not finite"),
        (state | {"first.bias": torch.tensor([0.0, float("inf")])}, "not finite"),
        ({}, "lacks first.weight, first.bias, second.weight and 1 more"),
    ]
    for number, (changed, message) in enumerate(cases):
        with pytest.raises(ModelArtifactError, match=message):
            load(write(tmp_path / str(number), changed))
    big = state | {"first.bias": torch.tensor([0.0, 1e6])}
    with pytest.raises(ModelArtifactError, match=r"not finite as torch\.float16"):
        load(write(tmp_path / "big", big), torch.float16)


@pytest.mark.parametrize("old_format", [False, True])
def test_an_old_bin_is_read(tmp_path: Path, net: Net, old_format: bool) -> None:
    torch.save(
        net.state_dict(),
        tmp_path / "pytorch_model.bin",
        _use_new_zipfile_serialization=not old_format,
    )
    loaded = load(tmp_path)
    for key, value in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


def test_an_old_model_is_warned_of_once(
    make_model_folder: Make, caplog: pytest.LogCaptureFixture
) -> None:
    folders = [make_model_folder(bin=True) for _ in range(2)]
    for folder in (*folders, *folders):
        tensors(folder)
    ours = [record for record in caplog.records if record.name.startswith("dreambooth")]
    warned = [record.getMessage() for record in ours]
    assert [str(folder) in text for folder, text in zip(folders, warned, strict=True)] == [True] * 2
    assert "safetensors" in warned[0]


class Evil:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {os.environ['EVIL_MARK']}",)


@pytest.fixture
def evil_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EVIL_MARK", str(tmp_path / "code-was-run"))
    return tmp_path / "code-was-run"


def _evil_zip(path: Path) -> None:
    torch.save({"a": Evil()}, path)


def _evil_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"a": Evil()}))


def _cut_off(path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])


def _compressed(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00." * 1000)


def _whole_module(path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), path)


def _nested(path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}}, path)


@pytest.mark.parametrize(
    "spoil",
    [
        _evil_zip,
        _evil_pickle,
        _cut_off,
        _compressed,
        _whole_module,
        _nested,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"MZ" + b"\0" * 100),
        lambda path: torch.save([torch.zeros(1)], path),
    ],
)
def test_a_pickle_that_is_more_than_weights_is_refused_unrun(
    tmp_path: Path, evil_mark: Path, spoil: Callable[[Path], object]
) -> None:
    spoil(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelArtifactError, match=r"pytorch_model\.bin"):
        load(tmp_path)
    assert not evil_mark.exists()


def test_a_damaged_safetensors_file_is_named(tmp_path: Path, net: Net) -> None:
    folder = write(tmp_path / "net", net.state_dict())
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelArtifactError, match=r"model\.safetensors"):
        load(folder)


def test_saving_takes_tensors_as_they_lie_in_memory(tmp_path: Path) -> None:
    picture = torch.rand(2, 3, 4, 4)
    state = {
        "channels_last": picture.to(memory_format=torch.channels_last),
        "trained": torch.nn.Parameter(picture.clone()),
        "shared": picture[0],
        "shared too": picture[1],
        "transposed": picture[0, 0].T,
    }
    weights.save(state, tmp_path / "x.safetensors")
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    (tmp_path / "plain").touch()
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{part}/{key}": tensor
        for part in ("unet", "vae", "text_encoder")
        for _, key, tensor in weights.read_tensors(folder / part)
    }


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "options",
    [{}, {"variant": "fp16"}, {"sharded": True}, {"sharded": True, "variant": "fp16"}],
    ids=str,
)
def test_convert_turns_every_bin_into_safetensors_and_changes_nothing_else(
    make_model_folder: Make, tmp_path: Path, options: dict[str, Any]
) -> None:
    old = make_model_folder(bin=True, **options)
    (old / "notes.txt").write_text("mine")
    conversion.convert(old, tmp_path / "new")
    new = make_model_folder(**options)  # the same model, saved as safetensors from the start
    assert names(tmp_path / "new") == names(new) | {"notes.txt"}
    expected, converted = tensors(new), tensors(tmp_path / "new")
    assert expected.keys() == converted.keys()
    assert all(
        torch.equal(expected[k], converted[k]) and expected[k].dtype == converted[k].dtype
        for k in expected
    )
    for name in names(old) - {name for name in names(old) if ".bin" in name}:
        assert (old / name).read_bytes() == (tmp_path / "new" / name).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_convert_takes_a_tarball_and_an_empty_folder(
    make_model_folder: Make, tmp_path: Path
) -> None:
    old = make_model_folder(bin=True)
    with tarfile.open(tmp_path / "old.tar.gz", "w:gz") as tar:
        tar.add(old, arcname=".")
    (tmp_path / "new").mkdir()
    conversion.convert(tmp_path / "old.tar.gz", tmp_path / "new")
    assert (tmp_path / "new" / "text_encoder" / "model.safetensors").exists()
    assert not list((tmp_path / "new").rglob("*.bin"))


def test_convert_prefers_a_twin_that_is_safetensors_already(
    make_model_folder: Make, tmp_path: Path
) -> None:
    old = make_model_folder()
    twin = old / "unet" / "diffusion_pytorch_model.bin"
    twin.write_bytes(b"never opened")
    conversion.convert(old, tmp_path / "new")
    assert names(tmp_path / "new") == names(old) - {"unet/diffusion_pytorch_model.bin"}


def test_convert_writes_nothing_where_it_refuses(
    make_model_folder: Make, tmp_path: Path, evil_mark: Path
) -> None:
    evil = make_model_folder(bin=True)
    torch.save({"a": Evil()}, evil / "vae" / "diffusion_pytorch_model.bin")
    other = make_model_folder()
    (other / "v1-5.ckpt").write_bytes(b"pickle")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").touch()
    inside = make_model_folder()
    for origin, target in (
        (evil, tmp_path / "new"),
        (other, tmp_path / "new"),
        (other / "v1-5.ckpt", tmp_path / "new"),
        (tmp_path / "missing", tmp_path / "new"),
        (make_model_folder(), full),
        (inside, inside / "new"),
    ):
        with pytest.raises(ModelArtifactError):
            conversion.convert(origin, target)
        assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert names(full) == {"mine"}
    assert not evil_mark.exists()
    assert not (inside / "new").exists()


def _nested() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])


@pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*[Qq]uantiz.*:UserWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(4, 4).to_sparse(),
        lambda: torch.eye(4).to_sparse_csr(),
        _nested,
        lambda: torch.zeros(4, device="meta"),
        lambda: torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8),
        lambda: torch.zeros(1).expand(2**40),
        lambda: torch.zeros(4, dtype=torch.complex64),
        lambda: torch.zeros(4, dtype=torch.uint8).view(torch.bits8),
        lambda: torch.zeros((1,) * 9),
    ],
    ids=[
        *("sparse", "sparse rows", "nested", "meta", "quantized", "larger than its data"),
        *("complex", "bits", "nine dimensions"),
    ],
)
def test_a_tensor_that_is_no_plain_one_is_one_sentence(
    make_model_folder: Make, tmp_path: Path, make: Callable[[], torch.Tensor]
) -> None:
    folder = make_model_folder(bin=True)
    path = folder / "unet" / "diffusion_pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "conv_in.bias": make()}, path)
    with pytest.raises(ModelArtifactError, match=r"model\.bin .*"):
        weights.read_bin(path)
    with pytest.raises(ModelArtifactError):
        conversion.convert(folder, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_pickle_that_names_its_data_again_and_again_is_refused(tmp_path: Path) -> None:
    whole = torch.zeros(100_000)
    torch.save({f"w{n}": whole for n in range(50)}, tmp_path / "x.bin")
    with pytest.raises(ModelArtifactError, match="the same data again and again: 20000000 bytes"):
        weights.read_bin(tmp_path / "x.bin")


def test_tensors_that_share_their_memory_are_plain(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    torch.save({"a": whole, "b": whole[2:], "c": whole.reshape(2, 3).T}, tmp_path / "x.bin")
    assert torch.equal(weights.read_bin(tmp_path / "x.bin")["b"], whole[2:])


def test_convert_takes_nothing_from_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelArtifactError, match="no folder or file models/stable-diffusion") as e:
        conversion.convert(Path("models/stable-diffusion-2-1-base"), tmp_path / "new")
    assert "hub" not in str(e.value)
    assert not list(tmp_path.iterdir())


def test_convert_follows_links_to_files_and_none_to_folders(
    make_model_folder: Make, tmp_path: Path
) -> None:
    old, blob = make_model_folder(bin=True), tmp_path / "blob"
    file = old / "unet" / "diffusion_pytorch_model.bin"
    file.rename(blob)
    file.symlink_to(blob)  # the hub client's cache uses such links
    conversion.convert(old, tmp_path / "new")
    assert not list(path for path in (tmp_path / "new").rglob("*") if path.is_symlink())
    (old / "unet" / "loop").symlink_to("..")
    with pytest.raises(ModelArtifactError, match=r"unet/loop is a link to a folder"):
        conversion.convert(old, tmp_path / "newer")
    (old / "unet" / "loop").unlink()
    (old / "notes.txt").symlink_to("nowhere")
    with pytest.raises(ModelArtifactError, match=r"notes\.txt is no regular file, or a link to"):
        conversion.convert(old, tmp_path / "newer")
    assert not (tmp_path / "newer").exists()


def test_convert_asks_for_room_only_where_it_is_short(
    make_model_folder: Make, tmp_path: Path
) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(ResourceError) as caught:
        conversion.convert(make_model_folder(), tmp_path / "dangling")
    assert "free some space" not in str(caught.value)


def test_convert_tells_where_it_cannot_write(make_model_folder: Make, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="cannot be written to"):
        conversion.convert(make_model_folder(), tmp_path / "file" / "new")


def test_a_converted_index_is_plain_json(make_model_folder: Make, tmp_path: Path) -> None:
    conversion.convert(make_model_folder(bin=True, sharded=True), tmp_path / "new")
    path = tmp_path / "new" / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    files = set(json.loads(path.read_text("utf-8"))["weight_map"].values())
    assert files == {f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)}
