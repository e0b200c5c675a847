"""Real jobs on the device of this machine: a GPU, or the CPU in the ordinary suite.

Tests marked `gpu` are skipped without CUDA.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dreambooth.job.run import run_job
from tests.training import plain_loop

# cuBLAS reads it at the first matrix product of the process, whichever test makes that.
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Start = Callable[..., Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = pytest.mark.skip(reason="torch sees no CUDA GPU; see tests/gpu/README.md")
    for item in items:
        if DEVICE == "cpu" and item.get_closest_marker("gpu"):
            item.add_marker(missing)


@pytest.fixture(autouse=True)
def determinism_ends_with_the_test() -> Iterator[None]:
    """Undo what a job with deterministic=True asks of the whole process."""
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark


@pytest.fixture(params=[DEVICE])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Return the device that jobs of this process use; it appears in the test's name."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write three instance images, and four class images in `class_data_dir`, of 32 x 32 pixels."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "class_data_dir").mkdir()
    generator = np.random.default_rng(0)
    for number in range(7):
        pixels = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        place = folder if number < 3 else folder / "class_data_dir"
        Image.fromarray(pixels).save(place / f"{number}.png")
    prompts = {"instance_prompt": plain_loop.INSTANCE, "class_prompt": plain_loop.CLASS}
    (folder / "dataset_info.json").write_text(json.dumps(prompts))
    return folder


@pytest.fixture
def start(small_model_folder: Path, pictures: Path, tmp_path: Path, device: torch.device) -> Start:
    """Return a function that runs a job of the miniature model and returns the model folder.

    code: the exit code it must have.
    """

    def run(out: str, *options: str, code: int = 0) -> Path:
        argv = [f"--pretrained-model={small_model_folder}", f"--train={pictures}"]
        argv += [f"--model_dir={tmp_path / out}", "--num_class_images=4", "--log_level=info"]
        argv += ["--processes=1"]
        assert run_job([*argv, *options], {"SAGEMAKER_BASE_DIR": str(tmp_path)}) == code
        return tmp_path / out

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return all weights of a U-Net by name."""
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
