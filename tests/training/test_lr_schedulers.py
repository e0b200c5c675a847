from __future__ import annotations

import pytest
import torch
from diffusers.optimization import get_scheduler

from dreambooth.settings.hyperparameters import LR_SCHEDULERS
from dreambooth.training import lr_schedulers


@pytest.mark.parametrize("name", LR_SCHEDULERS)
@pytest.mark.parametrize("warmup_steps", [0, 7])
def test_curves_equal_those_of_diffusers(name: str, warmup_steps: int) -> None:
    learning_rate, steps = 2e-6, 50
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=learning_rate)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=steps)
    for step in range(steps):
        ours = learning_rate * lr_schedulers.factor(
            name, step, steps=steps, warmup_steps=warmup_steps, learning_rate=learning_rate
        )
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-18)
        optimizer.step()
        theirs.step()


def test_warm_up_is_off_unless_the_curve_is_about_it() -> None:
    assert lr_schedulers.default_warmup_steps("linear", 400) == 0
    assert lr_schedulers.default_warmup_steps("constant_with_warmup", 400) == 40
    assert lr_schedulers.default_warmup_steps("constant_with_warmup", 5) == 1
    assert lr_schedulers.default_warmup_steps("constant_with_warmup", 1) == 0


def test_polynomial_below_its_customary_end_falls_to_zero() -> None:
    factors = [
        lr_schedulers.factor("polynomial", step, steps=10, warmup_steps=0, learning_rate=5e-8)
        for step in range(10)
    ]
    assert factors[0] == 1.0
    assert factors == sorted(factors, reverse=True)
    assert 0 < factors[-1] < 0.11


def test_the_sketch_names_curve_and_rates() -> None:
    text = lr_schedulers.sketch("linear", steps=100, warmup_steps=10, learning_rate=1e-4)
    assert text.startswith("linear")
    assert "11: 0.0001" in text
