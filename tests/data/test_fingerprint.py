from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dreambooth.data import fingerprint
from dreambooth.data.dataset_info import DatasetInfo


def test_fingerprints_change_with_every_part() -> None:
    parts = ["a photo of a cat", "weights", "512", "0", "fp16"]
    found = {fingerprint.of_texts(*parts)}
    for index in range(len(parts)):
        found.add(fingerprint.of_texts(*parts[:index], "x", *parts[index + 1 :]))
    assert len(found) == 6
    assert fingerprint.of_texts("ab", "c") != fingerprint.of_texts("a", "bc")
    assert len(fingerprint.of_texts()) == 16


@pytest.fixture
def dataset(tmp_path: Path) -> DatasetInfo:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(name.encode())
    return DatasetInfo(
        folder=tmp_path,
        instance_prompt="a photo of x",
        class_prompt=None,
        instance_images=(tmp_path / "a.png", tmp_path / "b.png"),
        class_images=(),
        warnings=(),
    )


def test_a_data_set_is_its_prompts_names_and_bytes(dataset: DatasetInfo) -> None:
    first = fingerprint.of_dataset(dataset)
    assert first == fingerprint.of_dataset(dataset)
    others = [replace(dataset, instance_prompt="y"), replace(dataset, class_prompt="a photo")]
    others.append(replace(dataset, instance_images=dataset.instance_images[:1]))
    found = {first, *map(fingerprint.of_dataset, others)}
    (dataset.folder / "b.png").write_bytes(b"other")
    found.add(fingerprint.of_dataset(dataset))
    assert len(found) == 5


def test_weights_differ_by_names_sizes_and_blocks_throughout(tmp_path: Path) -> None:
    path = tmp_path / "unet.safetensors"
    content = bytearray(40 << 20)
    path.write_bytes(content)
    found = {fingerprint.of_weights([path])}
    for offset in (5, (16 << 20) + 9, (32 << 20) + 1000):
        content[offset] ^= 1
        path.write_bytes(content)
        found.add(fingerprint.of_weights([path]))
    path.write_bytes(content + b"more")
    found.add(fingerprint.of_weights([path]))
    assert len(found) == 5
