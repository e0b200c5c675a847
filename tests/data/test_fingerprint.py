from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from PIL import Image

from dreambooth.data import dataset_info, fingerprint


def test_fingerprints_change_with_every_part() -> None:
    parts = ["a photo of a cat", "weights", "512", "0", "fp16"]
    found = {fingerprint.of_texts(*parts)}
    for index in range(len(parts)):
        found.add(fingerprint.of_texts(*parts[:index], "x", *parts[index + 1 :]))
    assert len(found) == 6
    assert fingerprint.of_texts("ab", "c") != fingerprint.of_texts("a", "bc")
    assert len(fingerprint.of_texts()) == 16


def test_a_data_set_is_its_prompts_names_and_bytes(tmp_path: Path) -> None:
    for number, name in enumerate(("a.png", "b.png")):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / name)
    (tmp_path / "dataset_info.json").write_text('{"instance_prompt": "a photo of x"}')
    dataset = dataset_info.read(tmp_path)
    (subject,) = dataset.subjects
    first = fingerprint.of_dataset(dataset)
    assert first == fingerprint.of_dataset(dataset)
    found = {
        first,
        fingerprint.of_dataset(replace(dataset, subjects=(replace(subject, instance_prompt="y"),))),
        fingerprint.of_dataset(
            replace(dataset, subjects=(replace(subject, class_prompt="a photo"),))
        ),
    }
    Image.new("RGB", (8, 8), (7, 0, 0)).save(tmp_path / "b.png")
    assert fingerprint.of_dataset(dataset) == first  # of the pictures that were checked
    found.add(fingerprint.of_dataset(dataset_info.read(tmp_path)))
    (tmp_path / "b.png").rename(tmp_path / "c.png")
    found.add(fingerprint.of_dataset(dataset_info.read(tmp_path)))
    (tmp_path / "c.png").unlink()
    found.add(fingerprint.of_dataset(dataset_info.read(tmp_path)))
    assert len(found) == 6


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
