"""What the base model thinks of clean and of spoiled pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dreambooth import tiny
from dreambooth.diffusion import model as models
from dreambooth.diffusion.model import DiffusionModel
from dreambooth.evaluation.clean import CLEAN_WITHIN, clean, denoising_loss
from tiny_world import clean as labels


@pytest.fixture(scope="module")
def base() -> DiffusionModel:
    return models.load(tiny.WEIGHTS, device=torch.device("cpu"))


def test_pictures_that_readers_call_clean_are_told_from_others(base: DiffusionModel) -> None:
    """A sixth of the labelled pictures; `python -m tiny_world clean` measures all of them."""
    facts, pictures = labels.labelled()
    assert len(facts) >= 120
    assert len({fact.run for fact in facts}) >= 8
    assert {fact.subject for fact in facts} == {*labels.SUBJECTS, None}
    agreed = [fact for fact in facts[::6] if fact.is_clean is not None]
    losses = denoising_loss(base, [pictures[fact.number] for fact in agreed])
    is_clean = np.array([bool(fact.is_clean) for fact in agreed])
    assert labels.auc(losses, is_clean) > 0.9  # 0.87 to 0.95 of larger parts
    # Each picture is measured with the same noise, whatever stands beside it.
    again = denoising_loss(base, [pictures[agreed[3].number]])
    assert again[0] == pytest.approx(losses[3], abs=1e-5)


def test_spoiling_a_picture_raises_its_loss(base: DiffusionModel) -> None:
    facts, pictures = labels.labelled()
    drawn = [pictures[fact.number] for fact in facts if fact.run == "base"][:3]
    noise = np.random.default_rng(0).normal(0, 40, (64, 64, 3))
    spoiled = [np.clip(one + noise, 0, 255).astype(np.uint8) for one in drawn]
    burnt = [np.clip((one - 128.0) * 2.5 + 128, 0, 255).astype(np.uint8) for one in drawn]
    own = denoising_loss(base, drawn)
    for other in (spoiled, burnt):
        losses = denoising_loss(base, other)
        assert (losses > own).all()
        assert clean(losses, own).sum() == 0


def test_a_clean_picture_is_near_the_bases_own() -> None:
    own = np.array([0.0, 1.0])
    limit = 0.5 + CLEAN_WITHIN
    assert list(clean(np.array([limit - 0.01, limit + 0.01, np.nan]), own)) == [1, 0, 0]


def test_the_area_under_the_curve_counts_pairs() -> None:
    is_clean = np.array([True, True, False, False])
    assert labels.auc(np.array([1.0, 2.0, 3.0, 1.5]), is_clean) == 0.75
    assert np.isnan(labels.auc(np.array([1.0]), np.array([True])))


@pytest.mark.on_demand
def test_both_measures_on_all_labels(tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert labels.main(["--out", str(tmp_path)]) == 0
    any_model, drawn_world = (
        {name: float(value) for name, value in zip(line[0::2], line[1::2], strict=True)}
        for line in (
            shown.replace("chosen on", "chosen").replace("other half", "other").split()[2:]
            for shown in capsys.readouterr().out.splitlines()[::2]
        )
    )
    assert any_model["chosen"] == pytest.approx(0.950, abs=0.005)
    assert any_model["other"] == pytest.approx(0.875, abs=0.005)
    assert drawn_world["chosen"] == pytest.approx(0.991, abs=0.005)
    assert drawn_world["other"] == pytest.approx(0.945, abs=0.005)
