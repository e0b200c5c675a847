"""dataset_info.json, malformed in every way."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

GOOD = '{"instance_prompt": "a photo of riobugger cat", "class_prompt": "a photo of cat"}'


def prompts(**changes: object) -> bytes:
    return json.dumps({**json.loads(GOOD), **changes}).encode()


VALUES: tuple[object, ...] = (
    *(None, "", "   ", "\n\t", 0, 1, -3.5, True, False, [], ["a cat"], {}, {"en": "a cat"}),
    *("x" * 10_001, "\ud800", "a \udfff cat"),
)
CASES: dict[str, bytes] = {
    "empty": b"",
    "blank": b" \n\n ",
    "zeros": b"\0" * 64,
    "bom alone": b"\xef\xbb\xbf",
    "utf-16": GOOD.encode("utf-16"),
    "utf-16 without a mark": GOOD.encode("utf-16-le"),
    "utf-32": GOOD.encode("utf-32"),
    "latin-1": '{"instance_prompt": "ein Foto von Kätzchen"}'.encode("latin-1"),
    "cp1252 quotes": "{“instance_prompt”: “a cat”}".encode("cp1252"),
    "typographic quotes": "{“instance_prompt”: “a cat”}".encode(),
    "a broken sequence": b'{"instance_prompt": "caf\xc3"}',
    "an overlong sequence": b'{"instance_prompt": "\xc0\xaf"}',
    "null": b"null",
    "true": b"true",
    "a number": b"42",
    "a text": b'"a photo of a cat"',
    "a list": b'["a photo of a cat"]',
    "a list of objects": b"[" + GOOD.encode() + b"]",
    "no object": b"instance_prompt: a photo of a cat",
    "yaml": b"---\ninstance_prompt: a cat\n",
    "xml": b"<instance_prompt>a cat</instance_prompt>",
    "csv": b"instance_prompt,class_prompt\na cat,cat\n",
    "two objects": GOOD.encode() * 2,
    "json lines": (GOOD + "\n").encode() * 3,
    "text behind": GOOD.encode() + b" // done",
    "a comment": b"/* prompts */ " + GOOD.encode(),
    "no quotes": b"{instance_prompt: a photo of a cat}",
    "one quote": b'{"instance_prompt: "a cat"}',
    "a missing colon": b'{"instance_prompt" "a cat"}',
    "a missing comma": b'{"instance_prompt": "a" "class_prompt": "b"}',
    "two commas": b'{"instance_prompt": "a",, "class_prompt": "b"}',
    "a raw line break": b'{"instance_prompt": "a photo\nof a cat"}',
    "a bad escape": b'{"instance_prompt": "C:\\cats"}',
    "a bad unicode escape": b'{"instance_prompt": "\\u12"}',
    "infinity": b'{"instance_prompt": Infinity}',
    "not a number": b'{"instance_prompt": NaN}',
    "a python call": b'{"instance_prompt": __import__("os").getcwd()}',
    "python without a prompt": b"{'prompt': 'a cat'}",
    "a python set": b"{'a photo of a cat'}",
    "a python expression": b"{'instance_prompt': 1 + 1}",
    "deep lists": b"[" * 100_000,
    "closed deep lists": b"[" * 50_000 + b"]" * 50_000,
    "deep objects": b'{"a":' * 50_000,
    "a deep python notation": b"{'a': " + b"(" * 5_000 + b")" * 5_000 + b"}",
    "two mebibytes": b" " * 2**21 + GOOD.encode(),
    "a long number": b'{"instance_prompt": ' + b"9" * 10_000 + b"}",
    "an empty object": b"{}",
    "other keys": b'{"prompt": "a cat", "class": "cat"}',
    "another case": b'{"Instance_Prompt": "a cat"}',
    "a space in the key": b'{"instance_prompt ": "a cat"}',
    "a png": b"\x89PNG\r\n\x1a\n" + b"\0" * 100,
    "gzip": b"\x1f\x8b\x08\0" + b"\0" * 50,
    "cut 1": GOOD.encode()[:1],
    "cut 10": GOOD.encode()[:10],
    "cut 30": GOOD.encode()[:30],
    "cut before the end": GOOD.encode()[:-1],
    **{f"instance_prompt {n}": prompts(instance_prompt=v) for n, v in enumerate(VALUES)},
    **{f"class_prompt {n}": prompts(class_prompt=v) for n, v in enumerate(VALUES)},
}


@pytest.mark.parametrize("name", CASES)
def test_a_malformed_file_is_named(sandbox: Any, name: str) -> None:
    (sandbox.photos / "dataset_info.json").write_bytes(CASES[name])
    sandbox.refuses("dataset_info.json", "--with_prior_preservation", "--num_class_images=1")


def test_what_is_no_file_is_named(sandbox: Any) -> None:
    path = sandbox.photos / "dataset_info.json"
    path.unlink()
    path.mkdir()
    sandbox.refuses("dataset_info.json")


@pytest.mark.parametrize("kind", ["fifo", "loop", "dangling", "device", "missing"])
def test_special_files_neither_hang_nor_open(sandbox: Any, kind: str) -> None:
    path = sandbox.photos / "dataset_info.json"
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    sandbox.refuses("dataset_info.json")
