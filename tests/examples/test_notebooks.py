"""Holds the notebooks as committed, and runs them as a person would.

`make test-notebooks` runs them from top to bottom in their own environment, on the embedded model;
a stand-in takes the place of AWS. `make test-notebooks WRITE=1` also writes the run's outputs into
the notebooks: do so after each change of a cell, look at the pictures, and commit.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.container.aws_stand_in import Aws
from tests.documents import ROOT

EXAMPLES = ROOT / "examples"
NAMES = ("fun_images_of_your_pet", "use_an_endpoint")  # the second one draws with the first's model
Notebook = dict[str, Any]


def committed(name: str) -> Notebook:
    return load(EXAMPLES / f"{name}.ipynb")


def load(path: Path) -> Notebook:
    notebook: Notebook = json.loads(path.read_text("utf-8"))
    return notebook


def code_cells(notebook: Notebook) -> list[Notebook]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def outputs(notebook: Notebook) -> list[Notebook]:
    return [output for cell in code_cells(notebook) for output in cell["outputs"]]


def digest(notebook: Notebook) -> str:
    """Return a digest of what is run."""
    sources = ["".join(cell["source"]) for cell in code_cells(notebook)]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def shown(notebook: Notebook) -> list[list[list[str]]]:
    """Return the kinds of each code cell's outputs, such as image/png."""
    return [
        sorted(sorted(output.get("data", [output.get("name")])) for output in cell["outputs"])
        for cell in code_cells(notebook)
    ]


def check_outputs(notebook: Notebook) -> None:
    """All cells ran in their order without an error, and tell nothing of the machine."""
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert all("tags" not in cell["metadata"] for cell in notebook["cells"])
    assert all("%%" not in "".join(cell["source"]) for cell in cells)  # no cell of another kind
    for output in outputs(notebook):
        assert output["output_type"] != "error"
        if output.get("name") == "stderr":  # the SDK's sentences
            assert "".join(output["text"]).startswith("INFO:sagemaker:"), output
        data = {kind: text for kind, text in output.get("data", {}).items() if "/png" not in kind}
        told = json.dumps([output.get("text"), data])
        assert not re.search(r"(?<![\w.:/-])/(work|root|home|tmp|usr|opt|etc|var)/", told), told
        assert not re.search(r"Traceback|Warning", told), told
        assert socket.gethostname() not in told.split()
    assert sum("image/png" in output.get("data", {}) for output in outputs(notebook)) >= 8


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Notebook], Aws]:
    """Return the executed notebooks by name, and the calls to AWS that they made."""
    python = os.environ.get("DREAMBOOTH_NOTEBOOKS")
    if not python:
        pytest.skip("DREAMBOOTH_NOTEBOOKS names no python with jupyter: see `make test-notebooks`")
    folder = tmp_path_factory.mktemp("notebooks")
    for name in ("dreambooth", "transfer_learning.py", ".venv"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(EXAMPLES, folder / "examples", ignore=shutil.ignore_patterns(".*", "__*"))
    port = free_port()
    executed = {}
    with Aws(f"http://127.0.0.1:{port}") as aws:
        environ = {
            **os.environ,
            **aws.environ,
            "AWS_DEFAULT_REGION": "us-east-1",
            "DREAMBOOTH_PORT": str(port),
            "SAGEMAKER_SUPPRESS_V2_WARNING": "1",
            "IPYTHONDIR": str(kernel_settings(folder)),
        }
        for name in NAMES:
            path = folder / "examples" / f"{name}.ipynb"
            start, used = time.monotonic(), processor_seconds()
            command = [python, "-m", "jupyter", "execute", "--inplace", "--timeout=900", str(path)]
            done = subprocess.run(
                command, env=environ, capture_output=True, text=True, timeout=1200, check=False
            )
            assert done.returncode == 0, done.stderr[-6000:]
            seconds, used = time.monotonic() - start, processor_seconds() - used
            print(f"{name}: {seconds:.0f} s, {used:.0f} s of processor time")
            executed[name] = tidied(load(path))
        with pytest.raises(ConnectionRefusedError):  # no server is left
            socket.create_connection(("127.0.0.1", port), timeout=5)
    return executed, aws


def kernel_settings(folder: Path) -> Path:
    """Return a folder of IPython's in which nothing waits long: the SDK asks every 30 s."""
    startup = folder / "ipython/profile_default/startup"
    startup.mkdir(parents=True)
    patch = "import time; time.sleep = lambda s, sleep=time.sleep: sleep(min(s, 3)); del time\n"
    (startup / "waits.py").write_text(patch)
    return folder / "ipython"


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def tidied(notebook: Notebook) -> Notebook:
    """Leave out times and versions, and join what a cell printed piece by piece.

    Both differ from run to run.
    """
    for cell in notebook["cells"]:
        cell["metadata"] = {}
    for cell in code_cells(notebook):
        joined: dict[Any, Notebook] = {}
        for number, output in enumerate(cell["outputs"]):
            first = joined.setdefault(output.get("name", number), output)
            if first is not output:
                first["text"] += output["text"]
        cell["outputs"] = list(joined.values())
    return {
        **notebook,
        "metadata": {
            "kernelspec": notebook["metadata"]["kernelspec"],
            "language_info": {"name": "python"},
            "digest_of_what_was_run": digest(notebook),
        },
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_from_top_to_bottom(
    name: str, run: tuple[dict[str, Notebook], Aws], tmp_path: Path
) -> None:
    notebook = run[0][name]
    path = tmp_path / f"{name}.ipynb"
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")
    validate = "import nbformat, sys; nbformat.validate(nbformat.read(sys.argv[1], 4))"
    command = [os.environ["DREAMBOOTH_NOTEBOOKS"], "-W", "error", "-c", validate, str(path)]
    subprocess.run(command, check=True)
    check_outputs(notebook)
    if os.environ.get("DREAMBOOTH_WRITE_NOTEBOOKS"):
        shutil.copy(path, EXAMPLES)
    assert digest(notebook) == digest(committed(name))
    assert shown(notebook) == shown(committed(name)), "the outputs are those of another version"


def test_they_call_aws_as_the_published_notebooks_do(run: tuple[dict[str, Notebook], Aws]) -> None:
    calls = run[1].calls
    (job,) = calls["CreateTrainingJob"]
    assert job["HyperParameters"]["max_steps"] == "400"
    channels = {channel["ChannelName"]: channel for channel in job["InputDataConfig"]}
    source = channels["training"]["DataSource"]["S3DataSource"]["S3Uri"]
    assert source == "s3://my-bucket/my-pet/"
    assert set(channels) == {"training", "model"}
    configs = calls["CreateEndpointConfig"]
    assert ["AsyncInferenceConfig" in config for config in configs] == [False, False, True]
    for config in configs:
        assert "-inference-gpu-" in config["ProductionVariants"][0]["InferenceAmiVersion"]
    (transform,) = calls["CreateTransformJob"]
    assert transform["TransformResources"]["TransformAmiVersion"]
    assert len(calls["DeleteEndpoint"]) == len(calls["CreateEndpoint"]) == 3
    assert len(calls["DeleteModel"]) == 2


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_has_the_outputs_of_a_whole_run(name: str) -> None:
    notebook = committed(name)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["digest_of_what_was_run"] == digest(notebook)
    check_outputs(notebook)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_small(name: str) -> None:
    assert (EXAMPLES / f"{name}.ipynb").stat().st_size <= 1_000_000


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_for_people(name: str) -> None:
    """Its cells are short, each piece of code is explained, and its links lead somewhere."""
    cells = committed(name)["cells"]
    assert cells[0]["cell_type"] == "markdown"
    assert max(len(cell["source"]) for cell in cells if cell["cell_type"] == "code") <= 30
    assert sum(cell["cell_type"] == "markdown" for cell in cells) >= len(cells) / 3
    text = "".join(line for cell in cells for line in cell["source"])
    for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", text):
        assert target.startswith("../out/") or (EXAMPLES / target).is_file(), target
