"""Runs the blocks of README and docs/ for docker and for SageMaker's SDKs as printed.

Only folders, ports and the image's name are replaced, and steps reduced. A stand-in takes the place
of AWS's endpoints and notes the calls: they are made by the real SDK and checked by botocore.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from dreambooth.tiny import DATA, WEIGHTS
from tests.container.aws_stand_in import Aws
from tests.documents import blocks, shell_block

BEFORE = """
import time
time.sleep = lambda seconds: None  # between two questions whether a job is done
role, bucket = "arn:aws:iam::111111111111:role/anything", "bucket"
image_uri = "111111111111.dkr.ecr.us-east-1.amazonaws.com/dreambooth:latest"
model_uri = "s3://bucket/base.tar.gz"
"""
# Prints the driver version that AWS's API description gives for a host image.
DRIVER_OF = """
import re, sys, botocore.loaders
shapes = botocore.loaders.Loader().load_service_model("sagemaker", "service-2")["shapes"]
structure, member, host = sys.argv[1:]
told = shapes[structure]["members"][member]["documentation"]
print(re.search(f"<dt>{host}</dt>.*?driver version: ([0-9]+)", told)[1])
"""
Docker = Callable[..., subprocess.CompletedProcess[str]]
Tree = Callable[..., Path]
Start = Callable[..., str]


def python_blocks(*words: str) -> list[str]:
    return [code for code in blocks("python") if any(word in code for word in words)]


def run_block(variable: str, code: str, **environ: str) -> str:
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} names no python with the SDK: see `make test-container`")
    done = subprocess.run(
        [python, "-c", code],
        env={**os.environ, "AWS_DEFAULT_REGION": "us-east-1", **environ},
        capture_output=True,
        text=True,
        timeout=570,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def replaced(code: str, *pairs: tuple[str, str]) -> str:
    for old, new in pairs:
        assert old in code, old
        code = code.replace(old, new)
    return code


def test_the_docker_lines_train_and_serve(image: str, tree: Tree, free_port: int) -> None:
    """They run in their order, in one folder, without --gpus all where there is no GPU."""
    root = tree(pretrained_model="tiny", max_steps=2, learning_rate="1e-4")
    name = f"dreambooth-test-readme-{free_port}"
    client = os.environ.get("DOCKER", "docker")
    train, serve = (
        replaced(
            line,
            ("docker run", f"{client} run --name {name}"),
            ("--gpus all", "" if shutil.which("nvidia-smi") is None else "--gpus all"),
            ("$PWD/ml", str(root)),
            (" dreambooth ", f" {image} "),
        )
        for line in shell_block("docker run").splitlines()
    )
    subprocess.run(["bash", "-c", train], check=True, capture_output=True, timeout=240)
    serve = replaced(serve, ("-p 8080:", f"-p 127.0.0.1:{free_port}:"))
    server = subprocess.Popen(["bash", "-c", serve], stderr=subprocess.DEVNULL)
    try:
        wait_for_ping(f"http://127.0.0.1:{free_port}")
    finally:
        subprocess.run([client, "stop", name], check=True, capture_output=True, timeout=60)
        assert server.wait(60) == 0


def wait_for_ping(url: str) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{url}/ping", timeout=2) as reply:
                assert reply.status == 200
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(f"{url}/ping never said 200")


def test_the_clients_of_an_endpoint_read_its_pictures(
    image: str, container: Start, free_port: int
) -> None:
    mount = f"--volume={WEIGHTS}:/opt/ml/model:ro"
    container(f"--publish=127.0.0.1:{free_port}:8080", mount, image, "serve")
    url = f"http://127.0.0.1:{free_port}"
    wait_for_ping(url)
    boto3, predictor = python_blocks('"my-endpoint"')
    with Aws(url) as aws:
        shown = replaced(boto3, (".show()", ".load(); print('a picture')"))
        assert run_block("DREAMBOOTH_SDK_V2", shown, **aws.environ) == "a picture\n"
        printed = run_block("DREAMBOOTH_SDK_V2", f"{predictor}\nprint(body)", **aws.environ)
        assert '"generated_image":' in printed


def test_the_blocks_for_aws_make_the_calls_that_they_promise() -> None:
    story = [code for code in python_blocks("{bucket}", "predictor.delete_model()")]
    with Aws() as aws:
        run_block("DREAMBOOTH_SDK_V2", "\n".join([BEFORE, *story]), **aws.environ)
    (job,) = aws.calls["CreateTrainingJob"]
    assert job["HyperParameters"]["max_steps"] == "400"
    assert job["EnableManagedSpotTraining"]
    assert job["CheckpointConfig"]["S3Uri"].startswith("s3://bucket/checkpoints/")
    assert [channel["ChannelName"] for channel in job["InputDataConfig"]] == ["training", "model"]
    assert len(aws.calls["CreateEndpoint"]) == 2
    assert "AsyncInferenceConfig" in aws.calls["CreateEndpointConfig"][1]
    (tuning,) = aws.calls["CreateHyperParameterTuningJob"]
    assert tuning["TrainingJobDefinition"]["StaticHyperParameters"]["compute_fid"] == "True"
    (transform,) = aws.calls["CreateTransformJob"]
    assert transform["TransformOutput"]["Accept"] == "application/json;jpeg"
    assert {"DeleteModel", "DeleteEndpoint", "DeleteEndpointConfig"} <= set(aws.calls)


def test_the_hosts_that_the_blocks_ask_for_have_a_driver_for_the_image() -> None:
    """The default build's CUDA 13 needs driver 580, the other build's CUDA 12 needs 525."""
    code = "\n".join(python_blocks("{bucket}"))
    hosts = re.findall(r'(?:inference_ami_version=|TransformAmiVersion=)"(\S+)"', code)
    assert len(hosts) == 3
    for host in hosts:
        endpoint = "-inference-" in host
        place = ("ProductionVariant", "InferenceAmiVersion")
        if not endpoint:
            place = ("TransformResources", "TransformAmiVersion")
        asked = f"import sys; sys.argv = {['', *place, host]}\n{DRIVER_OF}"
        assert int(run_block("DREAMBOOTH_SDK_V2", asked)) >= (580 if endpoint else 525), host


@pytest.mark.usefixtures("no_leftovers")
def test_the_block_for_local_mode_trains(image: str, tmp_path: Path, free_port: int) -> None:
    data = local_data(tmp_path)
    (block,) = python_blocks("LocalSession()")
    block = replaced(
        block,
        ("/tmp/sagemaker", str(tmp_path / "root")),
        ("18080", str(free_port)),
        ('"dreambooth"', f'"{image}"'),
        ("file:///data", f"file://{data}"),
        ('"400"', '"2"'),
    )
    run_block("DREAMBOOTH_SDK_V2", block, SAGEMAKER_SUPPRESS_V2_WARNING="1")
    assert (data / "out" / "model.tar.gz").is_file()


@pytest.mark.usefixtures("no_leftovers")
def test_the_block_for_sdk_v3_trains(image: str, tmp_path: Path) -> None:
    data = local_data(tmp_path)
    (block,) = python_blocks("ModelTrainer(")
    block = replaced(
        block,
        ("/tmp/sagemaker", str(tmp_path / "root")),
        ('"dreambooth"', f'"{image}"'),
        ('"/data/', f'"{data}/'),
        ('"400"', '"2"'),
    )
    run_block("DREAMBOOTH_SDK_V3", block)
    assert (tmp_path / "root/compressed_artifacts/model.tar.gz").is_file()


def local_data(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    shutil.copytree(DATA / "cat", data / "pictures")
    for folder in (data / "base", data / "out", tmp_path / "root"):
        folder.mkdir()
    with tarfile.open(data / "base" / "base.tar.gz", "w:gz") as archive:
        archive.add(WEIGHTS, arcname=".")
    return data


def test_every_python_block_is_run_by_one_of_these() -> None:
    known = ('"my-endpoint"', "{bucket}", "delete_model()", "LocalSession()", "ModelTrainer(")
    for code in blocks("python"):
        assert sum(word in code for word in known) == 1, code
