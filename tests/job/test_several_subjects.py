"""Whole jobs that teach several subjects together."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dreambooth.job.run import run_job

Start = Callable[..., int]
CAT = {
    "folder": "cat",
    "instance_prompt": "a photo of riobugger cat",
    "class_prompt": "a photo of cat",
}
DOG = {
    "folder": "dog",
    "instance_prompt": "a photo of doppler dog",
    "class_prompt": "a photo of dog",
}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a training folder with three pictures of one subject and one of another."""
    generator = np.random.default_rng(0)
    for name, count in (("cat", 3), ("dog", 1)):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 255, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    list_subjects(tmp_path / "photos", CAT, DOG)
    return tmp_path / "photos"


def list_subjects(photos: Path, *subjects: dict[str, str]) -> None:
    (photos / "dataset_info.json").write_text(json.dumps({"subjects": subjects}))


@pytest.fixture
def start(small_model_folder: Path, tmp_path: Path, photos: Path) -> Start:
    def run(out: str, *options: str) -> int:
        argv = [f"--pretrained-model={small_model_folder}", f"--train={photos}"]
        argv += [f"--model_dir={tmp_path / out}", "--learning_rate=1e-4", *options]
        return run_job(argv, {"SAGEMAKER_BASE_DIR": str(tmp_path)})

    return run


def weights(folder: Path) -> torch.Tensor:
    tensors = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    return torch.cat([tensors[key].flatten() for key in sorted(tensors)])


def metrics(folder: Path) -> list[dict[str, dict[str, float]]]:
    lines = (folder.with_name(folder.name + "-output") / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_job_teaches_both_with_class_images_of_each_class(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--with_prior_preservation", "--num_class_images=2", "--epochs=1")
    assert start("out", *options, "--sample_steps=2", "--log_level=info") == 0
    shown = capsys.readouterr()
    assert "4 (3 of cat + 1 of dog, which is 1 epochs of each subject's instance" in shown.out
    assert re.search(
        r"instance loss of each subject in epoch 1: cat [\d.]+, dog [\d.]+\n", shown.err
    )
    output = tmp_path / "out-output"
    assert [sorted(row["subject_losses"]) for row in metrics(tmp_path / "out")] == [
        ["cat"],
        ["dog"],
        ["cat"],
        ["dog"],
    ]
    assert len(list((output / "class_images").glob("*/class_0000?.png"))) == 4
    assert len(list((output / "class_images").iterdir())) == 2
    side = Image.open(output / "samples" / "step-000004.png").size
    assert side[0] == 2 * side[1]
    page = (output / "report.html").read_text()
    assert "Instance loss of each subject" in page
    for prompt in (CAT["instance_prompt"], DOG["instance_prompt"]):
        assert page.count(f"<q>{prompt}</q>") == {"cat": 3, "dog": 1}[prompt.split()[-1]]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- Instance prompt of subject 2: `a photo of doppler dog`" in card
    assert len(list((tmp_path / "out" / "samples").iterdir())) == 2
    info = json.loads((tmp_path / "out" / "__model_info__.json").read_text())
    assert info["instance_prompt"] == CAT["instance_prompt"]
    assert info["subjects"] == [
        {key: each[key] for key in ("instance_prompt", "class_prompt")} for each in (CAT, DOG)
    ]


def test_the_class_images_of_each_class_are_sampled_with_its_prompt_and_kept(
    start: Start, tmp_path: Path, photos: Path
) -> None:
    """They are those that a run of each subject alone samples, and are found again."""
    options = ("--with_prior_preservation", "--num_class_images=1", "--max_steps=1")
    kept = (*options, f"--checkpoint_dir={tmp_path / 'checkpoints'}")
    assert start("both", *kept) == 0
    found = {
        path.parent.name: path.read_bytes()
        for path in (tmp_path / "checkpoints" / "class_images").glob("*/class_00000.png")
    }
    assert len(found) == 2
    list_subjects(photos, DOG)
    assert start("alone", *kept, "--resume=fresh") == 0
    after = list((tmp_path / "checkpoints" / "class_images").glob("*/class_00000.png"))
    assert {path.parent.name: path.read_bytes() for path in after} == found


def test_a_resumed_run_is_the_unbroken_one_and_other_prompts_are_refused(
    start: Start, tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mode = ("--with_prior_preservation", "--prior_preservation_mode=prediction")
    mode += ("--training_guidance_scale=1.5", "--center_crop")
    assert start("whole", *mode, "--max_steps=5") == 0
    kept = (*mode, f"--checkpoint_dir={tmp_path / 'checkpoints'}", "--keep_last_checkpoint")
    assert start("part", *kept, "--max_steps=3") == 0
    assert not torch.equal(weights(tmp_path / "part"), weights(tmp_path / "whole"))
    assert start("part", *kept, "--max_steps=5") == 0
    assert torch.equal(weights(tmp_path / "part"), weights(tmp_path / "whole"))
    list_subjects(photos, CAT, {**DOG, "instance_prompt": "a photo of zwx dog"})
    assert start("part", *kept, "--max_steps=6") == 1
    assert "belongs to another job: data was" in capsys.readouterr().err


def test_one_subject_in_a_list_learns_what_it_learns_beside_the_file(
    start: Start, tmp_path: Path, photos: Path
) -> None:
    list_subjects(photos, CAT)
    assert start("listed", "--max_steps=3") == 0
    for picture in (photos / "cat").iterdir():
        picture.rename(photos / picture.name)
    info = {key: CAT[key] for key in ("instance_prompt", "class_prompt")}
    (photos / "dataset_info.json").write_text(json.dumps(info))
    assert start("plain", "--max_steps=3") == 0
    assert torch.equal(weights(tmp_path / "listed"), weights(tmp_path / "plain"))
    assert "subject_losses" not in metrics(tmp_path / "plain")[0]


def test_scores_are_those_of_all_subjects(
    start: Start, tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.effect_noise((40, 48), 90).convert("RGB").save(photos / "dog" / "1.png")
    scored = ("--compute_scores", "--compute_fid", "--max_steps=1", "--train_text_encoder")
    assert start("out", *scored, "--log_level=info") == 0
    shown = capsys.readouterr()
    names = re.findall(r"^(\w+)=[\d.]+$", shown.out, re.M)
    assert names == ["fid_score", "subject_score", "class_kept", "clean"]
    of_each = [float(x) for x in re.findall(r"subject_score of \w+: ([\d.]+)", shown.err)]
    (mean,) = re.findall(r"^subject_score=([\d.]+)$", shown.out, re.M)
    assert float(mean) == pytest.approx(sum(of_each) / 2, abs=1e-4)
    parts = re.search(r"mean of the subjects': cat ([\d.]+), dog ([\d.]+)", shown.err)
    assert parts is not None
    (fid,) = re.findall(r"^fid_score=([\d.]+)$", shown.out, re.M)
    assert float(fid) == pytest.approx((float(parts[1]) + float(parts[2])) / 2, abs=1e-3)
    assert "subject_score of dog" in (tmp_path / "out-output" / "report.html").read_text()
