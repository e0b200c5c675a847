"""bitsandbytes' AdamW with states of 8 bits (Dettmers et al. 2022), also on bf16 weights alone.

Imported only by those who need it: bitsandbytes takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.optim import AdamW8bit
from torch import nn

from dreambooth.data.seeds import derive_seed

__all__ = [
    "AdamW8bit",
    "NonBlockingAdamW8bit",
    "StochasticRoundingAdamW8bit",
    "from_fp32",
    "round_stochastically",
    "to_fp32",
]

_BLOCK = 256  # moments that share a scale
_SMALLEST = 4096  # tensors with fewer elements keep fp32 states
_WRAPPED = AdamW8bit._FSDP_WRAPPED_QUANT_STATE_KEY


class NonBlockingAdamW8bit(AdamW8bit):  # type: ignore[misc]
    """The same updates, launched one after the other: the host goes on while the GPU computes.

    bitsandbytes 0.50.2 waits for the GPU after each weight, 686 times in a step of Stable
    Diffusion. Its kernels run on CUDA's default stream; where the caller's is another one, the wait
    stays. For the fast step alone: nobody has measured it on a GPU.
    """

    _started = False

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """As bitsandbytes' own `Optimizer8bit.step`."""
        if closure is not None or not self._in_order():
            loss: float | None = super().step(closure)
            return loss
        if not self._started:
            self.check_overrides()
            self.to_gpu()
            self._started = True
        for number, group in enumerate(self.param_groups):
            for place, weight in enumerate(group["params"]):
                if weight.grad is None:
                    continue
                if not self.state[weight]:
                    self.init_state(group, weight, number, place)
                self.update_step(group, weight, number, place)
        return None

    def _in_order(self) -> bool:
        """Whether all that is computed before and after a kernel runs on its stream."""
        devices = {weight.device for group in self.param_groups for weight in group["params"]}
        return all(
            torch.cuda.current_stream(device) == torch.cuda.default_stream(device)
            for device in devices
            if device.type == "cuda"
        )


class StochasticRoundingAdamW8bit(AdamW8bit):  # type: ignore[misc]
    """Of bf16 weights with no fp32 ones beside them: updates are rounded up or down by chance.

    At the published learning rate updates are far below bf16's steps; rounded to the nearest they
    would all be lost, rounded by chance their mean is kept. What is drawn is a function of the
    seed, the step and the weight's place.
    """

    def __init__(self, groups: list[dict[str, object]], *, seed: int, **settings: object) -> None:
        super().__init__(groups, **settings)
        self._seed = seed

    @torch.no_grad()
    def update_step(self, group: dict[str, Any], p: nn.Parameter, gindex: int, pindex: int) -> None:
        """AdamW on an fp32 copy that lives as long as this call."""
        weight, gradient = p.data, p.grad
        assert gradient is not None
        p.grad = None
        p.data = weight.float()
        p.grad = gradient.float()
        super().update_step(group, p, gindex, pindex)
        updated = p.data
        p.grad = None
        p.data = weight
        step = self.state[p]["step"]
        generator = torch.Generator(weight.device).manual_seed(
            derive_seed(self._seed, "rounding", step, gindex, pindex)
        )
        weight.copy_(round_stochastically(updated, generator))


def round_stochastically(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """values, float32, as bfloat16: of the two neighbours, each the likelier the nearer it is.

    bf16 is the upper half of fp32's bits: random lower bits are added, then the lower half is cut.
    """
    bits = torch.randint(
        0, 1 << 16, values.shape, dtype=torch.int32, generator=generator, device=values.device
    )
    bits.add_(values.contiguous().view(torch.int32)).bitwise_and_(-(1 << 16))
    return bits.view(torch.float32).to(torch.bfloat16)


def from_fp32(state: Mapping[str, Any]) -> dict[str, Any]:
    """One weight's state of torch's AdamW, as 8-bit AdamW saves it."""
    moments = {"state1": state["exp_avg"].float(), "state2": state["exp_avg_sq"].float()}
    if moments["state1"].numel() >= _SMALLEST:
        for number, signed in ((1, True), (2, False)):
            code = functional.create_dynamic_map(signed=signed).to(state["exp_avg"].device)
            moment, scales = functional.quantize_blockwise(
                moments[f"state{number}"], code=code, blocksize=_BLOCK
            )
            moments[f"state{number}"] = moment
            moments |= {f"qmap{number}": code, f"absmax{number}": scales.absmax}
    return {"step": int(state["step"]), _WRAPPED: moments}


def to_fp32(state: Mapping[str, Any]) -> dict[str, Any]:
    """One weight's state of 8-bit AdamW, as torch's AdamW saves it."""
    moments = state[_WRAPPED]
    fp32 = {"step": torch.tensor(float(state["step"]))}
    for number, name in ((1, "exp_avg"), (2, "exp_avg_sq")):
        moment = moments[f"state{number}"]
        if moment.dtype == torch.uint8:
            moment = functional.dequantize_blockwise(
                moment,
                absmax=moments[f"absmax{number}"],
                code=moments[f"qmap{number}"],
                blocksize=_BLOCK,
            )
        fp32[name] = moment.float()
    return fp32
