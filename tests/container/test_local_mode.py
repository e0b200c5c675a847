"""SageMaker's own clients and the image with a real docker: local modes of SDK v2 and SDK v3.

DREAMBOOTH_SDK_V2 and DREAMBOOTH_SDK_V3 name the python of an environment with each SDK.
"""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dreambooth.tiny import DATA, WEIGHTS

HERE = Path(__file__).parent
STRINGS = {"max_steps": "4", "learning_rate": "1e-4", "seed": "0", "lr_scheduler": "constant"}
ENVIRONMENT = {
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "SAGEMAKER_SUPPRESS_V2_WARNING": "1",
}
pytestmark = pytest.mark.usefixtures("no_leftovers")
Flow = Callable[..., tuple[dict[str, Any], str]]


def run_flow(variable: str, *arguments: str) -> tuple[dict[str, Any], str]:
    """Return the flow's JSON line and everything it printed."""
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} names no python with the SDK: see `make test-container`")
    done = subprocess.run(
        [python, *arguments],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=570,
        check=False,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed[-6000:]
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result, printed


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "train-model-txt2img.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(WEIGHTS, arcname=".")
    return path


@pytest.fixture
def v2(image: str, base: Path, tmp_path: Path, free_port: int) -> Flow:
    def run(name: str, **more: Any) -> tuple[dict[str, Any], str]:
        given: dict[str, Any] = {
            "image": image,
            "port": free_port,
            "root": str(tmp_path / "root"),
            "output": str(tmp_path / "out"),
            "training": f"{DATA / 'cat'}/",
            "model": f"file://{base}",
            "hyperparameters": STRINGS,
            **more,
        }
        for folder in ("root", "output", "transformed"):
            Path(given.get(folder, tmp_path)).mkdir(parents=True, exist_ok=True)
        return run_flow("DREAMBOOTH_SDK_V2", str(HERE / "sdk_v2_flow.py"), name, json.dumps(given))

    return run


def test_v2_fit_deploy_predict(v2: Flow) -> None:
    prompt = "a photo of a riobugger cat"
    result, _ = v2("fit_deploy_predict", prompt=prompt)
    nested, jpeg = result["replies"]["application/json"], result["replies"]["application/json;jpeg"]
    for replies in (nested, jpeg):
        assert replies["text"]["prompt"] == replies["json"]["prompt"] == prompt
        assert len(replies["json"]["generated_images"]) == 2
    for picture in (nested["text"]["generated_image"], *nested["json"]["generated_images"]):
        assert picture["shape"] == [64, 64, 3]
        assert 0 <= picture["low"] < picture["high"] <= 255
    for picture in (jpeg["text"]["generated_image"], *jpeg["json"]["generated_images"]):
        assert picture == {"format": "JPEG", "size": [64, 64]}
    assert result["wrong"]["code"] == 400
    assert "invalid key widht" in result["wrong"]["message"]


def test_v2_a_failing_job_raises_with_our_sentence(v2: Flow, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for _ in range(3):  # on a busy machine docker-compose 1.29 may miss that a container has failed
        result, printed = v2("fit", training=f"{empty}/")
        if "raised" in result:
            break
    assert "exited with code: 1" in result["raised"]
    assert "dataset_info.json" in printed


def test_v2_with_the_published_source_dir_the_image_runs_its_own_code(
    v2: Flow, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "transfer_learning.py").write_text("raise SystemExit('this is not run')\n")
    result, printed = v2("fit", source_dir=str(source))
    assert "model.tar.gz" in result["files"]
    assert "source_dir" in printed
    assert "this is not run" not in printed


def test_v2_prior_preservation_with_class_images(v2: Flow) -> None:
    settings = {**STRINGS, "with_prior_preservation": "True", "num_class_images": "2"}
    result, _ = v2("fit", hyperparameters=settings)
    assert {"model.tar.gz", "output.tar.gz"} <= set(result["files"])


def test_v2_two_hosts_train_one_model(v2: Flow, tmp_path: Path) -> None:
    settings = {**STRINGS, "with_prior_preservation": "True", "num_class_images": "9"}
    result, printed = v2("fit", hosts=2, hyperparameters=settings)
    assert {"model.tar.gz", "output.tar.gz"} <= set(result["files"])
    assert "2 processes: global batch 2" in printed
    assert printed.count("End of training: train_avg_loss=") == 1
    assert "Traceback" not in printed
    with tarfile.open(tmp_path / "out" / "output.tar.gz") as archive:
        names = archive.getnames()
    assert len([name for name in names if name.endswith(".png") and "class_images" in name]) == 9
    assert not [name for name in names if name.endswith("failure")]


def test_v2_a_second_job_resumes_from_the_firsts_model(v2: Flow, tmp_path: Path) -> None:
    v2("fit")
    first = tmp_path / "out" / "model.tar.gz"
    assert (first.parent / "output.tar.gz").is_file()  # lies beside the model in the same channel
    result, _ = v2("fit", model=f"file://{first}", output=str(tmp_path / "second"))
    assert "model.tar.gz" in result["files"]


def test_v2_batch_transform(v2: Flow, tmp_path: Path) -> None:
    requests = tmp_path / "requests"
    requests.mkdir()
    for number in range(2):
        body = {"prompt": "a photo of a dog", "num_inference_steps": 3, "seed": number}
        (requests / f"{number}.json").write_text(json.dumps(body))
    result, _ = v2("transform", requests=f"{requests}/", transformed=str(tmp_path / "transformed"))
    expected = [{"format": "JPEG", "size": [64, 64]}]
    assert result["written"] == {"0.json.out": expected, "1.json.out": expected}


def test_v3_model_trainer(image: str, base: Path, tmp_path: Path) -> None:
    given = {
        "image": image,
        "root": str(tmp_path),
        "training": str(DATA / "cat"),
        "model": str(base.parent),
        "hyperparameters": {"max_steps": 4, "learning_rate": 1e-4, "center_crop": True},
    }
    result, _ = run_flow("DREAMBOOTH_SDK_V3", str(HERE / "sdk_v3_flow.py"), json.dumps(given))
    assert "model.tar.gz" in result["files"]
