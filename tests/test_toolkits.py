"""SageMaker's inference toolkits serve archives that `pack` makes.

Each runs in a process with an environment of its own: no server, no network, and not this
repository.
"""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreambooth import tiny
from dreambooth.model_folder import archives, pack

TEXT = "application/x-text"
JSON = "application/json"
JPEG = "application/json;jpeg"
STEPS = 2

# Stands in for what a toolkit's server passes to its handler. It is the only test code inside the
# process; argv is the folder, the requests and where the replies go.
CONTEXT = """
import base64, json, os, sys
folder, requests, out = sys.argv[1:]

class Processor:
    def __init__(self, headers): self.headers = headers
    def get_request_properties(self): return self.headers

class Metrics:
    def add_time(self, name, value): pass

class Context:
    model_name = "model"
    metrics = Metrics()
    def __init__(self, headers):
        self.system_properties = {"model_dir": folder, "batch_size": 1, "gpu_id": 0}
        self.request_processor = [Processor(headers)]
        self.status, self.content_type = 200, None
    def set_response_content_type(self, index, content_type): self.content_type = content_type
    def set_response_status(self, code, phrase): self.status = code

def answer_all(handle):
    replies = []
    for headers, body in json.load(open(requests)):
        context = Context(headers)
        body = handle([{"body": bytearray(body.encode())}], context)[0]
        body = bytes(body, "utf-8") if isinstance(body, str) else bytes(body)
        encoded = base64.b64encode(body).decode()
        replies.append([context.status, context.content_type, encoded])
    json.dump(replies, open(out, "w"))
"""

SAGEMAKER_INFERENCE = (
    CONTEXT
    + """
os.environ["SAGEMAKER_PROGRAM"] = "inference.py"
sys.path.insert(0, folder + "/code")
from sagemaker_inference.transformer import Transformer
answer_all(Transformer().transform)
import dreambooth
assert dreambooth.__file__.startswith(folder + "/code/"), dreambooth.__file__
"""
)

HUGGINGFACE = (
    CONTEXT
    + """
import sagemaker_huggingface_inference_toolkit.handler_service as module
from mms.service import PredictionException
service = module.HuggingFaceHandlerService()
service.initialize(Context({}))

def handle(data, context):
    try:
        return service.handle(data, context)
    except PredictionException as error:  # its server makes the status and a JSON object of it
        context.status = error.error_code
        return [error.message]

answer_all(handle)
code = os.path.isdir(folder + "/code")
assert ("dreambooth" in sys.modules) == code
if code:
    assert sys.modules["dreambooth"].__file__.startswith(folder + "/code/")
"""
)

Reply = tuple[int, str | None, bytes]


def environment(variable: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        not os.environ.get(variable), reason=f"{variable} names no folder with the toolkit"
    )


def unpacked(tmp_path: Path, *, with_code: bool) -> Path:
    pack.write("tiny", tmp_path / "model.tar.gz", with_code=with_code)
    archives.extract(tmp_path / "model.tar.gz", tmp_path / "model")
    return tmp_path / "model"


def drive(program: str, variable: str, folder: Path, *requests: object, **more: str) -> list[Reply]:
    """Send all requests to one process that finds the toolkit first and not this repository."""
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "requests.json").write_text(json.dumps(requests))
    names = ("PATH", "HOME", "LD_LIBRARY_PATH", "OMP_NUM_THREADS")
    variables = {name: os.environ[name] for name in names if name in os.environ}
    variables |= {"PYTHONPATH": os.environ[variable], "HF_HUB_OFFLINE": "1", **more}
    arguments = [str(folder), "requests.json", "replies.json"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=elsewhere,
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    replies = json.loads((elsewhere / "replies.json").read_text())
    return [(status, kind, base64.b64decode(body)) for status, kind, body in replies]


def request(content_type: str, accept: str | None, body: object) -> object:
    headers = {"Content-Type": content_type} | ({"Accept": accept} if accept else {})
    return headers, body if isinstance(body, str) else json.dumps(body)


def picture(encoded: str | bytes) -> np.ndarray:
    data = base64.b64decode(encoded) if isinstance(encoded, str) else encoded
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert pixels.std() > 1
    return pixels


@environment("DREAMBOOTH_SAGEMAKER_INFERENCE")
def test_sagemaker_inference_serves_the_archive_with_code(tmp_path: Path) -> None:
    asked = {"prompt": ["a cat", "a dog"], "num_inference_steps": STEPS, "seed": 3}
    replies = drive(
        SAGEMAKER_INFERENCE,
        "DREAMBOOTH_SAGEMAKER_INFERENCE",
        unpacked(tmp_path, with_code=True),
        request(TEXT, JPEG, "a photo of a cat"),
        request(JSON, None, asked),
        request(JSON, JPEG, asked | {"width": 32}),
        request(JSON, "image/png", asked | {"prompt": "a dog", "seed": 4}),
        request(JSON, JPEG, asked | {"width": 65}),
        request(JSON, JPEG, asked | {"widht": 64}),
        request(JSON, JPEG, '{"prompt": NaN}'),
        request("text/plain", JPEG, "a cat"),
        request(JSON, "text/html", asked),
        request(JSON, JSON, asked | {"num_images_per_prompt": 4}),
        MMS_MAX_RESPONSE_SIZE="200000",
    )
    assert [status for status, _, _ in replies] == [200] * 4 + [400, 400, 400, 415, 406, 400]
    assert [kind for _, kind, _ in replies[:4]] == [JPEG, JSON, JPEG, "image/png"]
    text, nested, jpeg = (json.loads(body) for _, _, body in replies[:3])
    assert text["prompt"] == "a photo of a cat"
    assert picture(text["generated_image"]).shape == (64, 64, 3)
    assert nested["prompt"] == jpeg["prompt"] == ["a cat", "a dog"]
    assert np.array(nested["generated_images"]).shape == (2, 64, 64, 3)
    assert [picture(item).shape for item in jpeg["generated_images"]] == [(64, 32, 3)] * 2
    dog = np.array(nested["generated_images"][1], dtype=int)
    # Drawn alone, with the second picture's seed.
    assert np.abs(picture(replies[3][2]) - dog).max() <= 2
    # The toolkit writes its own traceback below our message.
    sentences = [body.decode().splitlines()[0] for _, _, body in replies[4:]]
    assert sentences[0] == "width must be divisible by 8, got 65."
    words = ("widht", "NaN", "text/plain", "text/html", "200000")
    for sentence, word in zip(sentences[1:], words, strict=True):
        assert word in sentence


@environment("DREAMBOOTH_HUGGINGFACE_TOOLKIT")
def test_the_hugging_face_toolkit_serves_the_plain_archive_by_itself(tmp_path: Path) -> None:
    asked = {"inputs": "a photo of a cat", "parameters": {"num_inference_steps": STEPS}}
    replies = drive(
        HUGGINGFACE,
        "DREAMBOOTH_HUGGINGFACE_TOOLKIT",
        unpacked(tmp_path, with_code=False),
        request(JSON, "image/png", asked),
        request(JSON, None, asked),
    )
    assert [(status, kind) for status, kind, _ in replies] == [(200, "image/png"), (200, JSON)]
    assert picture(replies[0][2]).shape == (64, 64, 3)
    assert picture(str(json.loads(replies[1][2]))).shape == (64, 64, 3)


@environment("DREAMBOOTH_HUGGINGFACE_TOOLKIT")
def test_the_hugging_face_toolkit_runs_the_archives_code(tmp_path: Path) -> None:
    asked = {"prompt": ["a cat", "a dog"], "num_inference_steps": STEPS}
    replies = drive(
        HUGGINGFACE,
        "DREAMBOOTH_HUGGINGFACE_TOOLKIT",
        unpacked(tmp_path, with_code=True),
        request(TEXT, JPEG, "a photo of a cat"),
        request(JSON, None, asked),
        request(JSON, "image/webp", {"inputs": "a cat", "parameters": {"num_inference_steps": 2}}),
        request(JSON, JSON, asked | {"width": 65}),
    )
    assert [status for status, _, _ in replies] == [200, 200, 200, 400]
    assert [kind for _, kind, _ in replies[:3]] == [JPEG, JSON, "image/webp"]
    assert picture(json.loads(replies[0][2])["generated_image"]).shape == (64, 64, 3)
    assert np.array(json.loads(replies[1][2])["generated_images"]).shape == (2, 64, 64, 3)
    assert picture(replies[2][2]).shape == (64, 64, 3)
    assert replies[3][2] == b"width must be divisible by 8, got 65."


def test_plain_diffusers_loads_the_plain_archive(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    folder = unpacked(tmp_path, with_code=False)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    (drawn,) = pipeline("a photo of a cat", num_inference_steps=STEPS).images
    assert drawn.size == (64, 64)
    assert {path.name for path in folder.iterdir()} <= {
        path.name for path in tiny.WEIGHTS.iterdir()
    }
