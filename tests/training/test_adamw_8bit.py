from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dreambooth.diffusion.loss import dreambooth_loss
from dreambooth.fast.graphed_passes import GraphedPasses, without_capture
from dreambooth.fast.master_weights import MasterWeights
from dreambooth.settings.hyperparameters import Hyperparameters
from dreambooth.training import adamw_8bit, loop, optimizer

SETTINGS = Hyperparameters(learning_rate=1e-3)


def network() -> nn.Module:
    torch.manual_seed(0)
    # Weights of 9216 values and fewer.
    return nn.Sequential(nn.Linear(96, 96), nn.LayerNorm(96), nn.Linear(96, 4))


def step(module: nn.Module, adamw: torch.optim.Optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for parameter in module.parameters():
        gradient = torch.randn(parameter.shape, generator=generator) * 1e-3
        parameter.grad = gradient.to(parameter.dtype)
    adamw.step()
    adamw.zero_grad()


def trained(steps: int, *, eight_bit: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    module = network()
    adamw = optimizer.build([module], SETTINGS, use_8bit_adam=eight_bit)
    for number in range(steps):
        step(module, adamw, number)
    return module, adamw


def moments(saved: dict[str, Any]) -> list[torch.Tensor]:
    return [state[name] for state in saved.values() for name in ("exp_avg", "exp_avg_sq")]


@pytest.mark.parametrize("first_bits", ["fp32", "8-bit"])
def test_a_run_resumes_with_states_of_other_bits(first_bits: str) -> None:
    before = network()
    reference, adamw = trained(10, eight_bit=False)
    for number in range(10, 20):
        step(reference, adamw, number)

    module, saved = trained(10, eight_bit=first_bits == "8-bit")
    other = optimizer.build([module], SETTINGS, use_8bit_adam=first_bits != "8-bit")
    optimizer.load(other, copy.deepcopy(saved.state_dict()))
    for number in range(10, 20):
        step(module, other, number)

    moved, expected = (
        torch.cat([(b - a).detach().flatten() for a, b in zip(*parameters, strict=True)])
        for parameters in (
            (before.parameters(), after.parameters()) for after in (module, reference)
        )
    )
    cosine = torch.nn.functional.cosine_similarity(moved, expected, dim=0)
    assert cosine > 0.999
    assert float(moved.norm() / expected.norm()) == pytest.approx(1, abs=0.01)
    assert {type(state["step"]) for state in saved.state.values()} != {
        type(state["step"]) for state in other.state.values()
    }


def test_states_come_back_from_fp32_within_one_code() -> None:
    _, adamw = trained(5, eight_bit=True)
    for state in adamw.state_dict()["state"].values():
        back = adamw_8bit.from_fp32(adamw_8bit.to_fp32(state))
        assert back["step"] == state["step"] == 5
        (old,) = (value for value in state.values() if isinstance(value, dict))
        (new,) = (value for value in back.values() if isinstance(value, dict))
        assert new.keys() == old.keys()
        # The signed codes end at -0.993, so a block whose largest moment is negative shrinks by
        # that factor.
        assert int((new["state1"].int() - old["state1"].int()).abs().max()) <= 1
        assert torch.equal(new["state2"], old["state2"])
        if "absmax1" in old:
            assert torch.allclose(new["absmax1"], old["absmax1"], rtol=0.01)
            assert torch.equal(new["absmax2"], old["absmax2"])


def test_8_bit_moments_are_near_those_of_fp32() -> None:
    _, plain = trained(10, eight_bit=False)
    _, small = trained(10, eight_bit=True)
    states = small.state_dict()["state"]
    restored = {number: adamw_8bit.to_fp32(state) for number, state in states.items()}
    for a, b in zip(moments(restored), moments(plain.state_dict()["state"]), strict=True):
        assert float((a - b).norm() / b.norm()) < 0.05


def test_states_of_other_weights_are_refused() -> None:
    _, saved = trained(1, eight_bit=False)
    other = optimizer.build([nn.Linear(4, 4)], SETTINGS, use_8bit_adam=True)
    with pytest.raises(ValueError, match="another number of weights"):
        optimizer.load(other, saved.state_dict())


class RefusesToWait(TorchDispatchMode):
    """Fails if a value is copied to the host, which would wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        assert func not in (aten._local_scalar_dense.default, aten.equal.default), func
        return func(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Return the shapes of weights that bitsandbytes synchronizes for, as it does on any GPU."""
    seen: list[torch.Size] = []
    monkeypatch.setattr(
        bitsandbytes.optim.optimizer, "sync_gpu", lambda weight: seen.append(weight.shape)
    )
    return seen


def states_and_weights(module: nn.Module, adamw: torch.optim.Optimizer) -> list[Any]:
    found: list[Any] = list(module.parameters())
    for state in adamw.state_dict()["state"].values():
        for value in state.values():
            found += value.values() if isinstance(value, dict) else [torch.tensor(value)]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_waiting_states_and_weights_are_bitsandbytes_own(
    waits: list[torch.Size], dtype: torch.dtype
) -> None:
    kinds = (bitsandbytes.optim.AdamW8bit, adamw_8bit.NonBlockingAdamW8bit)
    runs = []
    for kind in kinds:
        waits.clear()
        module = network().to(dtype)
        untouched = nn.Parameter(torch.ones(8))
        module.register_parameter("untouched", untouched)
        adamw = kind(optimizer.decay_groups([module], 0.01), lr=1e-3)
        for number in range(12):
            for group in adamw.param_groups:
                group["lr"] = 1e-3 / (1 + number)
            generator = torch.Generator().manual_seed(number)
            for parameter in module.parameters():
                if parameter is not untouched:
                    gradient = torch.randn(parameter.shape, generator=generator) * 1e-3
                    parameter.grad = gradient.to(parameter)
            adamw.step()
            if number == 5:  # the state is saved and loaded as when a run is resumed
                adamw.load_state_dict(adamw.state_dict())
        runs.append(states_and_weights(module, adamw))
        assert len(waits) == (12 * 6 if kind is kinds[0] else 0)
    assert len(runs[0]) == len(runs[1]) > 6 * 4
    for theirs, ours in zip(*runs, strict=True):
        assert theirs.dtype == ours.dtype
        assert torch.equal(theirs, ours)


def test_with_another_stream_than_its_kernels_it_waits_as_ever(
    waits: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = network()
    adamw = optimizer.build([module], SETTINGS, use_8bit_adam=True)
    monkeypatch.setattr(type(adamw), "_in_order", lambda self: False)
    step(module, adamw, 0)
    assert len(waits) == len(list(module.parameters()))


def test_no_8_bit_step_waits_for_each_weight(waits: list[torch.Size]) -> None:
    module = network()
    step(module, optimizer.build([module], SETTINGS, use_8bit_adam=True), 0)
    assert waits == []


def test_nothing_in_an_8_bit_fast_step_waits_for_the_device(
    make_training: Callable[..., Any], waits: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = make_training(mixed_precision="bf16", fast_step=True, use_8bit_adam=True)
    masters = MasterWeights(training.state, 1.0)

    def refuse(*_: object) -> None:
        raise AssertionError("synchronize")

    def one_pass(noisy: Tensor, timesteps: Tensor, text: Tensor, target: Tensor) -> Tensor:
        model_pred = loop.predict(masters.unet, noisy, timesteps, text)
        losses = dreambooth_loss(model_pred, target, instances=1, prior_loss_weight=1.0)
        training.state.precision.backward(losses.total)
        return losses.total.detach()

    graphed = GraphedPasses(one_pass, list(masters.unet.parameters()), without_capture)
    latents = torch.ones(1, 4, 8, 8)
    given = latents, torch.tensor([500]), training.data.instance_text, latents
    monkeypatch.setattr(torch.cuda, "synchronize", refuse)
    before = training.weights()
    with RefusesToWait():
        for _ in range(2):
            masters.collect(lambda: graphed(*given))
            masters.norm()
            assert masters.update(lambda: torch.zeros(3))
    assert waits == []
    assert not torch.equal(training.weights(), before)
