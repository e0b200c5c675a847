from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

from dreambooth.process import child_process
from dreambooth.serving.contract.engine_status import EngineStatus
from dreambooth.serving.supervision import child, engine_process
from dreambooth.serving.supervision.engine_process import COMMAND, EngineProcess
from dreambooth.serving.supervision.messages import Cancel
from dreambooth.settings.serve_options import ServeSettings

LONG_S = 60.0
SAY_AND = """
import socket, subprocess, sys, time
from dreambooth.serving.supervision.messages import pack
from dreambooth.process import child_process
from dreambooth.serving.contract.engine_status import EngineStatus
connection = socket.socket(fileno=int(sys.argv[-1]))
connection.sendall(b"".join(pack(EngineStatus(rss_bytes=5))))
"""


def program(text: str) -> list[str]:
    return [sys.executable, "-c", SAY_AND + text]


def test_it_talks_to_a_process_and_says_how_that_ended() -> None:
    async def talk() -> None:
        process = await EngineProcess.spawn(program("sys.exit(3)"))
        assert await process.receive() == EngineStatus(rss_bytes=5)
        assert await process.receive() is None
        assert await process.wait(LONG_S)
        assert process.exited
        assert process.exit_reason == "exit code 3"
        await process.send(Cancel(request_id=1))  # the process is gone: no error
        await process.end()

    asyncio.run(talk())


def test_it_has_a_session_of_its_own_and_takes_what_it_started_with_it() -> None:
    async def talk() -> None:
        process = await EngineProcess.spawn(program("time.sleep(1000)"))
        await process.receive()
        assert os.getsid(process.pid) == process.pid != os.getsid(0)
        assert not process.exited
        await process.end()
        assert process.exit_reason == "killed by SIGKILL"

    asyncio.run(talk())


def test_it_is_seen_to_be_gone_though_its_own_child_holds_the_socket() -> None:
    async def talk() -> None:
        held = "subprocess.Popen(['sleep', '1000'], pass_fds=[connection.fileno()]); sys.exit(0)"
        process = await EngineProcess.spawn(program(held))
        await process.receive()
        assert await process.wait(LONG_S)
        assert process.exit_reason == "exit code 0"
        async with asyncio.timeout(LONG_S):
            assert await process.receive() is None  # `sleep` was killed too
        await process.end()

    asyncio.run(talk())


def test_the_engine_gets_every_setting() -> None:
    odd = ServeSettings(
        model="dog",
        host="::1",
        port=1,
        request_timeout_s=1.5,
        max_queue=2,
        batch_rows=4,
        max_response_bytes=3,
        max_body_bytes=4,
        max_connections=5,
        safety_checker=False,
        device="cpu",
        precision="bf16",
        cuda_graphs=True,
        channels_last=True,
        log_level="debug",
        model_is_platforms=True,
        prediction_type="v_prediction",
        base="folder",
    )
    usual = ServeSettings(model='\u00e9 \\ " tiny')
    assert all(
        getattr(odd, field.name) != getattr(usual, field.name) for field in fields(ServeSettings)
    )
    for settings in (odd, usual):
        arguments = engine_process.arguments(Path("/models/dog"), settings)
        read = child._parser().parse_args([*arguments, "--fd", "3"])
        assert vars(read) == {"fd": 3, "model": Path("/models/dog"), "settings": settings}


def test_what_lies_in_the_current_folder_is_not_imported(tmp_path: Path) -> None:
    for name in ("json", "torch", "dreambooth"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the model folder')")
    environ = child_process.environment({"PATH": os.environ["PATH"]})
    done = subprocess.run(
        [*COMMAND, "--help"], cwd=tmp_path, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--fd" in done.stdout


def test_the_servers_side_needs_no_torch() -> None:
    code = (
        "import sys, dreambooth.serving.supervision.supervisor; "
        "print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    )
    root = Path(engine_process.__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "[]", done.stderr
