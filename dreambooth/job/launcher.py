"""Read the variables with which a launcher makes several processes one job, and join them.

torchrun and `accelerate launch` set WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in
each process; MPI sets counts and ranks of its own. accelerate reads them all, with tracebacks.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from dreambooth.errors import UserError, in_one_line, quoted
from dreambooth.process.memory import is_out_of_memory

if TYPE_CHECKING:
    from accelerate import Accelerator

# The first one that is set counts; the processes of one host come last.
_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_LOCAL_COUNTS = (
    *("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS"),
    *("OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
)
_RANKS = (
    *("RANK", "LOCAL_RANK", "PMI_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_RANK"),
    *("OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
)
# What each process needs beside the count, to find the others.
_NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_LAUNCH = "start the job with torchrun or accelerate launch, or unset {} to train in one process"
# While one process draws pictures or writes a model, the others wait in a collective.
_LONGEST_WAIT = timedelta(hours=2)
_NAME_SECONDS = 30.0  # the other hosts of a cluster may get their names late


class NotJoinedError(UserError):
    """A process cannot find the others; one that has ended may be the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """The processes that train together.

    count_variable: the one that gives their number, None without one. is_group: whether they are to
    be joined, which a single process of a launcher is too.
    """

    processes: int
    count_variable: str | None
    is_main_process: bool
    is_group: bool


def is_main_process(environ: Mapping[str, str]) -> bool:
    """Return whether this process is the first of its job's, or the only one."""
    return not re.fullmatch("0*[1-9][0-9]*", environ.get("RANK", "0"))


def read(environ: Mapping[str, str]) -> Launch:
    """Read the launcher's variables. Raises UserError for one that is not a fitting number."""
    for name in (*_COUNTS, *_LOCAL_COUNTS):
        text = environ.get(name, "1")
        if not re.fullmatch("[0-9]{1,6}", text) or int(text) < 1:
            raise UserError(
                f"The variable {name} is {quoted(text)}, and must be the number of processes that "
                f"train together: {_LAUNCH.format(name)}."
            )
    count_variable = next((name for name in _COUNTS if name in environ), None)
    processes = int(environ[count_variable]) if count_variable else 1
    for name in _RANKS:
        text = environ.get(name, "0")
        most = processes - 1 if name in _NEEDED else 10**6
        # -1 means that there is no launcher
        if not re.fullmatch("-1|[0-9]{1,6}", text) or int(text) > most:
            raise UserError(
                f"The variable {name} is {quoted(text)}, and must be this process's number, which "
                f"is below the number of processes, {processes}: {_LAUNCH.format(name)}."
            )
    return Launch(
        processes=processes,
        count_variable=count_variable,
        is_main_process=is_main_process(environ),
        is_group=processes > 1 or int(environ.get("LOCAL_RANK", "-1")) >= 0,
    )


def refuse_a_lone_process(launch: Launch, environ: Mapping[str, str]) -> None:
    """Raise UserError where a process should be one of a group but cannot find the others."""
    if not launch.is_group:
        return
    name = launch.count_variable
    missing = [each for each in _NEEDED if not environ.get(each)]
    if name is None:
        raise UserError(
            f"LOCAL_RANK is set, and WORLD_SIZE is not: {_LAUNCH.format('LOCAL_RANK')}."
        )
    if missing:
        raise UserError(
            f"{name} says that {launch.processes} processes train together, and {missing[0]} is "
            f"not set: {_LAUNCH.format(name)}."
        )
    port, address = environ["MASTER_PORT"], environ["MASTER_ADDR"]
    if not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65_536:
        raise UserError(
            f"The variable MASTER_PORT is {quoted(port)}, and must be a port, from 1 to 65535: "
            f"{_LAUNCH.format(name)}."
        )
    if not _has_an_address(address):
        raise UserError(
            f"The variable MASTER_ADDR is {quoted(address)}, and must be the name or address of "
            f"the host of process 0, which cannot be found: {_LAUNCH.format(name)}."
        )


def _has_an_address(host: str) -> bool:
    until = time.monotonic() + _NAME_SECONDS
    while True:
        try:
            socket.getaddrinfo(host, None)
        except UnicodeError:  # no name can be like this
            return False
        except OSError:
            if time.monotonic() > until:
                return False
            time.sleep(1.0)
        else:
            return True


def refuse_a_missing_gpu(environ: Mapping[str, str], gpus: int) -> None:
    """Raise UserError where a process of a host with GPUs has none for itself."""
    number = int(environ.get("LOCAL_RANK", "0"))
    if 0 < gpus <= number:
        raise UserError(
            f"Process {number} of this host needs a GPU of its own, and torch sees {gpus}: start "
            "as many processes as there are GPUs, or set CUDA_VISIBLE_DEVICES=-1 to train on the "
            "CPU."
        )


def join(launch: Launch, *, on_cpu: bool) -> Accelerator:
    """Join the processes of the group. Raises NotJoinedError where they do not come together."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    group = [
        InitProcessGroupKwargs(timeout=_LONGEST_WAIT),
        DistributedDataParallelKwargs(
            gradient_as_bucket_view=True
        ),  # holds gradients once, not twice
    ]
    try:
        # The training loop sets the precision and nothing is compiled, whatever an accelerate
        # configuration says.
        accelerator = Accelerator(
            mixed_precision="no",
            dynamo_backend="no",
            cpu=on_cpu,
            kwargs_handlers=group if launch.processes > 1 else None,
        )
    except (ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise NotJoinedError(
            f"The processes of this job cannot be joined ({in_one_line(error)}): check the "
            "variables MASTER_ADDR, MASTER_PORT, OMP_NUM_THREADS and ACCELERATE_*, or unset them "
            "to train in one process."
        ) from error
    # Otherwise each process would train on its own and write to the same folders as the others.
    if accelerator.num_processes != launch.processes:
        name = launch.count_variable or "WORLD_SIZE"
        raise UserError(
            f"{launch.processes} process(es) should train together, and this one is in a group of "
            f"{accelerator.num_processes}: {_LAUNCH.format(name)}."
        )
    return accelerator
