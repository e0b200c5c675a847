"""Send a run's model as one file, which is made when it is asked for and kept nowhere."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import BinaryIO, Final
from urllib.parse import quote

from starlette.responses import Response, StreamingResponse

from dreambooth.errors import UserError
from dreambooth.limits import MIB
from dreambooth.model_folder import pack
from dreambooth.process import child_process, temporary_folder
from dreambooth.runs import run_folder
from dreambooth.runs.run_folder import Run

PRECISIONS: Final = ("fp32", "fp16")

_ERROR: Final = "error: "
_conversions = asyncio.Semaphore(1)  # each holds a whole model in memory


async def archive(run: Run) -> Response:
    """Return model.tar.gz, written into the reply as it is packed.

    Raises UserError without a model, ModelArtifactError for one that cannot be packed.
    """
    members = await asyncio.to_thread(pack.members_of, _model(run))
    return _as_file(
        _streamed(lambda file: pack.write_members(file, members)),
        "model.tar.gz",
        "application/gzip",
    )


async def single_file(run: Run, precision: str) -> Response:
    """Return the model as one safetensors file; a process of its own makes it in the run's folder.

    Raises UserError with that process's sentence where it cannot be made.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision must be {' or '.join(PRECISIONS)}.")
    name = f"{re.sub('[^A-Za-z0-9._-]', '_', run.name)}.safetensors"  # other tools show it
    model = _model(run)
    async with _conversions:
        with temporary_folder.temporary(run.folder) as folder:
            made = folder / name
            await _convert(model, made, precision)
            file = made.open("rb")
    # From here on it has no name: whatever ends the download frees the disk.
    size = os.fstat(file.fileno()).st_size

    def copy(target: BinaryIO) -> None:
        with file:
            shutil.copyfileobj(file, target, MIB)

    return _as_file(_streamed(copy), name, "application/octet-stream", size)


def _model(run: Run) -> Path:
    if not run.has_model():
        raise UserError(f"The run {run.name} has no model yet.")
    return run.folder / run_folder.MODEL


async def _convert(model: Path, out: Path, precision: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "dreambooth", "convert", str(model), str(out)),
        *("--precision", precision),
        env=child_process.environment(os.environ),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        _, log = await process.communicate()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode != 0:
        lines = log.decode("utf-8", "replace").splitlines()
        faults = [line.removeprefix(_ERROR) for line in lines if line.startswith(_ERROR)]
        raise UserError(faults[-1] if faults else f"It ended with the code {process.returncode}.")


async def _streamed(write: Callable[[BinaryIO], None]) -> AsyncIterator[bytes]:
    """Yield what a function writes to a pipe, as it comes; raise what it raises.

    A reply that breaks off so is no whole file to any browser. A reader who leaves closes the pipe,
    which ends the function.
    """
    reader, writer = os.pipe()

    def fill() -> None:
        with os.fdopen(writer, "wb") as file:
            write(file)

    filling = asyncio.create_task(asyncio.to_thread(fill))
    filling.add_done_callback(lambda done: done.cancelled() or done.exception())
    content = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(content), os.fdopen(reader, "rb", 0)
    )
    try:
        while chunk := await content.read(MIB):
            yield chunk
        await filling
    finally:
        transport.close()


def _as_file(
    content: AsyncIterator[bytes], name: str, media_type: str, size: int | None = None
) -> Response:
    headers = {"Content-Disposition": f'attachment; filename="{quote(name)}"'}
    if size is not None:
        headers["Content-Length"] = str(size)
    return StreamingResponse(content, media_type=media_type, headers=headers)
