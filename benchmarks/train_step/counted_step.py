"""Count what a training step launches, moves and waits for, at full size and without a device.

The step is the product's own (`training.loop`, or `fast.captured_loop`), on meta tensors, which
have no data. Of what needs a GPU these stand in: autocast, whose rules are written out here; flash
attention, which torch chooses in half precision; values that are read; and bitsandbytes' 8-bit
kernels, each of which counts as one launch that reads and writes its tensors once. An operation on
a list of tensors counts as one launch, though a GPU takes a few.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from benchmarks.train_step import full_size
from dreambooth.data.cache import LatentPosteriors
from dreambooth.data.dataset_info import ClassSet, DatasetInfo, SubjectData
from dreambooth.fast import captured_loop
from dreambooth.settings.hyperparameters import Hyperparameters
from dreambooth.training import loop, optimizer
from dreambooth.training import plan as plans
from dreambooth.training.device import DeviceFacts
from dreambooth.training.mixed_precision import Precision
from dreambooth.training.state import TrainingState

# As the driver and the data sheets describe them, with nothing else on them.
T4 = DeviceFacts(
    kind="cuda",
    name="Tesla T4",
    compute_capability=(7, 5),
    memory_bytes=int(14.6 * 2**30),
    free_bytes=int(14.2 * 2**30),
)
A10G = DeviceFacts(
    kind="cuda",
    name="NVIDIA A10G",
    compute_capability=(8, 6),
    memory_bytes=int(22.0 * 2**30),
    free_bytes=int(21.6 * 2**30),
)

_META = torch.device("meta")
_CELLS = full_size.SIDE // 8
_PICTURES = 4  # of each set


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One kernel launch: its floating-point operations, and the bytes read and written."""

    flops: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCount:
    """The counts of one step.

    waits: why the host waits for the device, once for each time. peak_bytes: of all tensors that
    are alive at a time, with weights and optimizer states.
    """

    memory_plan: str
    expected_bytes: int
    peak_bytes: int
    operations: tuple[Operation, ...]
    waits: tuple[str, ...]

    @property
    def flops(self) -> int:
        """Return the floating-point operations of the step."""
        return sum(operation.flops for operation in self.operations)

    @property
    def bytes(self) -> int:
        """Return the bytes that the step reads and writes."""
        return sum(operation.bytes for operation in self.operations)

    @property
    def launches(self) -> int:
        """Return how many kernels the step launches one by one."""
        return len(self.operations)


def count(device: DeviceFacts, **settings: Any) -> StepCount:
    """Count the second step of a job on such a device; settings: hyperparameters off their default.

    The planner chooses memory plan and precision for the device. Raises ValueError for a plan that
    frees gradients or checkpoints activations.
    """
    # A checkpoint is due at the second step, so the fast step too reads its metrics there.
    hyperparameters = Hyperparameters(checkpointing_steps=2, **settings)
    dataset = DatasetInfo(
        folder=Path("pictures"),
        subjects=(
            SubjectData(
                instance_prompt="a photo of a riobugger cat",
                class_prompt="a photo of a cat",
                instance_images=tuple(Path(f"{n}.png") for n in range(_PICTURES)),
            ),
        ),
        class_sets=(
            ClassSet(
                class_prompt="a photo of a cat",
                images=tuple(Path(f"class/{n}.png") for n in range(_PICTURES)),
            ),
        ),
    )
    plan = plans.make(hyperparameters, dataset, full_size.FACTS, device)
    if plan.gradient_checkpointing or plan.frees_gradients:
        raise ValueError(f"a step of {plan.memory_plan} is not counted")
    counting = Counting()
    with stand_ins(counting), counting:
        steps = _steps(plan, hyperparameters)
        next(steps)  # makes the optimizer's states
        counting.begin()
        next(steps)
        return StepCount(
            memory_plan=plan.memory_plan,
            expected_bytes=plan.memory_bytes,
            peak_bytes=counting.peak_bytes,
            operations=tuple(counting.operations),
            waits=tuple(counting.waits),
        )


def _steps(plan: plans.TrainingPlan, hyperparameters: Hyperparameters) -> Iterator[object]:
    """Yield after each step of a job that is like one at full size, but for its data."""
    from diffusers import DDPMScheduler, UNet2DConditionModel

    with _META:
        unet = UNet2DConditionModel(**full_size.UNET).requires_grad_(True).train()
    text = torch.empty(1, full_size.TOKENS, full_size.WIDTH, device=_META)
    posteriors = LatentPosteriors(
        mean=torch.empty(_PICTURES, 4, _CELLS, _CELLS, device=_META),
        std=torch.empty(_PICTURES, 4, _CELLS, _CELLS, device=_META),
        first_rows=tuple(range(_PICTURES)),
        crop_counts=(1,) * _PICTURES,
    )
    with_class = hyperparameters.with_prior_preservation
    state = TrainingState(
        unet=unet,
        text_encoder=None,
        optimizer=optimizer.build([unet], hyperparameters, use_8bit_adam=plan.use_8bit_adam),
        precision=_Precision.for_plan(plan, _META),
    )
    train: Callable[..., Iterator[object]] = captured_loop.train if plan.fast_step else loop.train
    return train(
        state,
        loop.TrainingData(
            instance=posteriors,
            class_=posteriors if with_class else None,
            instance_text=text,
            class_text=text if with_class else None,
            latent_scale=0.18215,
        ),
        plan,
        hyperparameters,
        noise_scheduler=DDPMScheduler.from_config(full_size.NOISE_SCHEDULER),
        encode_text=lambda ids: ids,
        accelerator=_OneProcess(),
    )


class _OneProcess:
    """What the loops ask of accelerate's Accelerator; it knows no meta device."""

    device, process_index, num_processes = _META, 0, 1

    def prepare(self, networks: Any) -> Any:
        return networks

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        return tensor


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records what is done on meta tensors: every operation that computes, and each wait.

    Views cost nothing. peak_bytes: of the tensors that are alive at a time, as far as they were
    made under this mode.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.waits: list[str] = []
        self.peak_bytes = self._live_bytes = 0
        self._alive: set[int] = set()  # the addresses of storages

    def begin(self) -> None:
        """Forget what was recorded so far, but for what is alive."""
        self.operations.clear()
        self.waits.clear()
        self.peak_bytes = self._live_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        on_device = any(tensor.is_meta for tensor in given)
        if func is _ATEN._local_scalar_dense.default and on_device:
            self.waits.append("a value is read")
            return given[0].dtype == torch.bool
        if func is _ATEN._to_copy.default and on_device and kwargs.get("device") == _CPU:
            self.waits.append("a tensor is copied to the host")
            return torch.ones(given[0].shape, dtype=kwargs.get("dtype") or given[0].dtype)
        result = func(*args, **kwargs)
        if not any(tensor.is_meta for tensor in (*given, *_tensors(result))):
            return result  # computed by the host
        self._note_memory(result)
        if func is _ATEN._to_copy.default and not on_device and not kwargs.get("non_blocking"):
            self.waits.append("a tensor is copied from the host")
        if not func.is_view and func not in _FREE:
            self.operations.append(
                Operation(
                    flops=_flops(func, args, kwargs, result),
                    bytes=_moved(func, args, kwargs, result),
                )
            )
        return result

    def _note_memory(self, result: Any) -> None:
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            address, size = storage._cdata, storage.nbytes()
            if tensor.is_meta and address not in self._alive:
                self._alive.add(address)
                self._live_bytes += size
                self.peak_bytes = max(self.peak_bytes, self._live_bytes)
                weakref.finalize(storage, self._freed, address, size)

    def _freed(self, address: int, size: int) -> None:
        self._alive.remove(address)
        self._live_bytes -= size

    def update(self, _: str, gradient: Tensor, weight: Tensor, *others: Any, **__: Any) -> None:
        """Stand in for a kernel of bitsandbytes; the states come first among `others`."""
        moved = _size(gradient) + 2 * sum(map(_size, (weight, *_tensors(others[:2]))))
        self.operations.append(Operation(flops=0, bytes=moved))


_ATEN = torch.ops.aten
_CPU = torch.device("cpu")
_FREE = frozenset(
    {_ATEN.empty.memory_format, _ATEN.empty_like.default, _ATEN.detach.default}
    | {_ATEN._unsafe_view.default, torch.ops.prim.device.default}
)
_ONLY_WRITTEN = frozenset(
    {_ATEN.copy_.default, _ATEN._foreach_copy_.default, _ATEN.zero_.default}
    | {_ATEN.fill_.Scalar, _ATEN.fill_.Tensor}
)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _moved(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Return the bytes that an operation reads and writes."""
    moved = 0
    changes = False
    for number, argument in enumerate(func._schema.arguments):
        value = args[number] if number < len(args) else kwargs.get(argument.name)
        size = sum(map(_size, _tensors(value)))
        is_changed = argument.alias_info is not None and argument.alias_info.is_write
        if is_changed and argument.name == "grads" and kwargs.get("grad_scale") is None:
            is_changed = False  # fused AdamW writes gradients only where it unscales them
        changes = changes or is_changed
        is_read = not (is_changed and (func in _ONLY_WRITTEN or argument.is_out))
        moved += size * (is_read + is_changed)
    return moved if changes else moved + sum(map(_size, _tensors(result)))


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    formula = flop_registry.get(func._overloadpacket)
    return int(formula(*args, **kwargs, out_val=result)) if formula else 0


class _Precision(Precision):
    """The product's, with autocast's rules on CUDA written out."""

    def autocast(self, *, keeps_copies: bool = True) -> AbstractContextManager[Any]:
        keeps_copies = keeps_copies and self._keeps_copies
        return _Autocast(self.dtype, keeps_copies) if self._casts else nullcontext()


_IN_HALF = frozenset((functional.linear, torch.conv2d, torch.matmul, torch.bmm, torch.baddbmm)) | {
    functional.scaled_dot_product_attention
}
_IN_FP32 = frozenset((functional.group_norm, functional.layer_norm, functional.softmax))


class _Autocast(TorchFunctionMode):
    """Casts as autocast does on CUDA for the functions that a U-Net calls."""

    def __init__(self, dtype: torch.dtype, keeps_copies: bool) -> None:
        super().__init__()
        self._dtype, self._keeps_copies = dtype, keeps_copies
        self._copies: dict[Tensor, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _IN_HALF:
            args, kwargs = tree_map(self._half, (args, kwargs))
        elif func in _IN_FP32:
            args, kwargs = tree_map(lambda each: self._cast(each, torch.float32), (args, kwargs))
        elif func is torch.cat:
            dtypes = {tensor.dtype for tensor in args[0]}
            if len(dtypes) > 1:
                args = ([tensor.float() for tensor in args[0]], *args[1:])
        return func(*args, **kwargs)

    def _half(self, value: Any) -> Any:
        if not self._keeps_copies or not isinstance(value, torch.nn.Parameter):
            return self._cast(value, self._dtype)
        if value not in self._copies:
            self._copies[value] = self._cast(value, self._dtype)
        return self._copies[value]

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        is_cast = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if is_cast else value


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **others: Any) -> Tensor:
    """Stand in for scaled_dot_product_attention with flash attention's operations."""
    output: Tensor = _ATEN._scaled_dot_product_flash_attention(query, key, value)[0]
    return output


@contextmanager
def stand_ins(counting: Counting) -> Iterator[None]:
    """Let meta tensors take the ways of CUDA's."""
    import bitsandbytes

    make_tensor = torch.tensor
    with _META:  # torch keeps a list of what makes tensors, from the first time that it asks
        torch.empty(0)

    def wait(*_: object) -> None:
        counting.waits.append("the device is synchronized")

    def tensor(data: Any, **options: Any) -> Tensor:
        made = make_tensor(data, **options)
        if made.is_meta:  # its data come from the host, though no operation says so
            counting.waits.append("a tensor is copied from the host")
        return made

    with (
        # The lists of devices with foreach and with fused kernels both name this one.
        mock.patch.object(torch._C, "_get_privateuse1_backend_name", return_value="meta"),
        mock.patch.object(functional, "scaled_dot_product_attention", _attention),
        mock.patch.object(torch, "tensor", tensor),
        mock.patch.object(torch.cuda, "synchronize", wait),
        mock.patch.object(bitsandbytes.optim.optimizer, "sync_gpu", wait),
        mock.patch.object(
            bitsandbytes.functional, "optimizer_update_8bit_blockwise", counting.update
        ),
        mock.patch.object(bitsandbytes.functional, "optimizer_update_32bit", counting.update),
    ):
        yield
