"""Show which share of a step goes into communication when 1, 2, 4 or 8 processes train together.

After each backward pass the processes average all gradients (an all-reduce). At full size its bytes
are counted, the step's seconds are derived as in `derived`, and links are taken from data sheets.
On the embedded model both are measured on this machine's CPU, over gloo. Nothing here has been
measured on several GPUs, where torch sends gradients while others are still computed: the shares
are those without that overlap, the most that communication can take.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.train_step import derived, full_size
from dreambooth import tiny
from dreambooth.errors import UserError
from dreambooth.model_folder.facts import read_facts

PROCESSES = (1, 2, 4, 8)
_GRADIENT_BYTES = 4  # per parameter: fp32
_ROUNDS = 5

# As SageMaker's instances connect their GPUs: bytes per second that each GPU sends in a ring.
# NCCL's bus bandwidth within a host, without and with NVLink; between hosts the network's.
_WITHIN_A_HOST = {"T4": 6e9, "A10G": 12e9, "H100": 370e9}
_BETWEEN_HOSTS = 5e9  # 40 Gbit/s
# Bound by 3,300 launches, as the path of several processes replays no CUDA graph.
_H100_STEP_S = 0.055
_PLANS = {"T4": "8bit_adamw", "A10G": "fp32_adamw"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """One row: a number of processes. step_s: computing alone. reduce_s: the all-reduce."""

    where: str
    processes: int
    step_s: float
    reduce_s: float

    @property
    def share(self) -> float:
        """Return the share of communication in a step, if nothing overlaps."""
        return self.reduce_s / (self.step_s + self.reduce_s)

    @property
    def speed(self) -> float:
        """Return how many times the pictures per second of one process are trained."""
        return self.processes * (1 - self.share)


def ring_seconds(sent: float, processes: int, bytes_per_s: float) -> float:
    """Return the seconds of an all-reduce in a ring: each sends 2 (n - 1) / n of all bytes."""
    return 2 * (processes - 1) / processes * sent / bytes_per_s


def count() -> list[Scaling]:
    """Return the rows of full size: batch 1 with prior preservation on three cards."""
    steps = {
        row.card: row.step_s
        for _, row in derived.derive()
        if row.weights == "autocast" and row.memory_plan == _PLANS[row.card]
    }
    sent = _GRADIENT_BYTES * full_size.PARAMETERS["unet"]
    found = []
    for card, step_s in {**steps, "H100": _H100_STEP_S}.items():
        links = {"one host": _WITHIN_A_HOST[card], "a host each": _BETWEEN_HOSTS}
        found += [
            Scaling(
                where=f"{card}, {place}",
                processes=processes,
                step_s=step_s,
                reduce_s=ring_seconds(sent, processes, bytes_per_s),
            )
            for place, bytes_per_s in links.items()
            for processes in PROCESSES
        ]
    return found


def measure(processes: Sequence[int] = PROCESSES, *, steps: int = 20) -> list[Scaling]:
    """Return the rows of the embedded model on this CPU; raise UserError if a run fails."""
    step_s = _measured_step(steps)
    sent = _GRADIENT_BYTES * read_facts(tiny.WEIGHTS).unet_parameters
    return [
        Scaling(
            where="embedded model, gloo",
            processes=count,
            step_s=step_s,
            reduce_s=_measured_reduce(sent, count) if count > 1 else 0.0,
        )
        for count in processes
    ]


def _measured_step(steps: int) -> float:
    """Return the median seconds of a step of one process on one core."""
    with tempfile.TemporaryDirectory(prefix="scaling-") as place:
        argv = ["--pretrained-model=tiny", f"--train={tiny.DATA / 'dog1_8'}", "--processes=1"]
        argv += [f"--model_dir={place}/model", f"--max_steps={steps}", "--log_level=error"]
        _run([sys.executable, "-m", "dreambooth", "train", *argv], {})
        lines = Path(place, "model-output", "metrics.jsonl").read_text().splitlines()
    speeds = sorted(float(json.loads(line)["steps_per_second"]) for line in lines)
    return 1 / speeds[len(speeds) // 2]


def _measured_reduce(sent: int, processes: int) -> float:
    """Return the seconds of an all-reduce of so many bytes, as processes of their own do it."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    command = [sys.executable, "-m", __name__, str(sent)]
    ours = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    others = [
        subprocess.Popen(
            command, env=_environ({**ours, "RANK": str(rank)}), stdout=subprocess.DEVNULL
        )
        for rank in range(1, processes)
    ]
    try:
        return float(_run(command, {**ours, "RANK": "0"}))
    finally:
        for other in others:
            other.kill()
            other.wait()


def _run(command: Sequence[str], variables: Mapping[str, str]) -> str:
    done = subprocess.run(command, env=_environ(variables), capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"A process that is measured has failed: {done.stderr[-500:]}")
    return done.stdout


def _environ(variables: Mapping[str, str]) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1", **variables}


def _reduce(sent: int) -> float:
    """Join the group that the variables name; return the median seconds of an all-reduce."""
    import torch
    from torch import distributed

    distributed.init_process_group("gloo")
    gradients = torch.zeros(sent // _GRADIENT_BYTES)
    seconds = []
    for _ in range(_ROUNDS):
        distributed.barrier()
        began = time.monotonic()
        distributed.all_reduce(gradients)
        seconds.append(time.monotonic() - began)
    distributed.barrier()
    distributed.destroy_process_group()
    return sorted(seconds)[_ROUNDS // 2]


def show(rows: Sequence[Scaling]) -> None:
    """Print the rows as a table."""
    cores = len(os.sched_getaffinity(0))
    print("COMMUNICATION of several processes: a step's computing, the all-reduce of all gradients")
    print("without overlap, its share, and the pictures per second beside one process's")
    print(
        f"{'where':<24}{'processes':>10}{'computing':>12}{'all-reduce':>12}{'share':>8}{'speed':>8}"
    )
    for row in rows:
        cells = f"{row.step_s:>10.3f} s{row.reduce_s:>10.3f} s{row.share:>8.0%}{row.speed:>7.1f}x"
        print(f"{row.where:<24}{row.processes:>10}{cells}")
    print("T4, A10G, H100: counted, never measured; a host each: 40 Gbit/s between them. Embedded:")
    print(f"measured on this CPU, whose {cores} cores all processes share.")


def document(rows: Sequence[Scaling]) -> dict[str, Any]:
    """Return the JSON document."""
    cells = [{**asdict(row), "share": row.share, "speed": row.speed} for row in rows]
    return {"benchmark": "train", "scaling": cells}


if __name__ == "__main__":
    print(_reduce(int(sys.argv[1])))
