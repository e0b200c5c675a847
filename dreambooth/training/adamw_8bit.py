"""bitsandbytes' AdamW with 8-bit states (Dettmers et al. 2022), without its waits for the GPU.

Import this module only where it is needed: importing bitsandbytes takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.optim import AdamW8bit

_BLOCK = 256  # elements of a moment that share a scale
_SMALLEST = 4096  # tensors with fewer elements keep fp32 states
_WRAPPED = AdamW8bit._FSDP_WRAPPED_QUANT_STATE_KEY


class NonBlockingAdamW8bit(AdamW8bit):  # type: ignore[misc]
    """8-bit AdamW that launches its updates without waiting for the GPU after each weight.

    The updates are the same. bitsandbytes 0.50.2 waits after each weight, 686 times in a step of
    Stable Diffusion. Its kernels run on CUDA's default stream; if the caller's stream is another
    one, this class waits as well. It has not been measured on a GPU.
    """

    _started = False

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the weights as bitsandbytes' own `Optimizer8bit.step` does."""
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
        """Return whether the work before and after the kernels runs on their stream."""
        devices = {weight.device for group in self.param_groups for weight in group["params"]}
        return all(
            torch.cuda.current_stream(device) == torch.cuda.default_stream(device)
            for device in devices
            if device.type == "cuda"
        )


def from_fp32(state: Mapping[str, Any]) -> dict[str, Any]:
    """Convert one weight's state of torch's AdamW to the form that 8-bit AdamW saves."""
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
    """Convert one weight's state of 8-bit AdamW to the form that torch's AdamW saves."""
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
