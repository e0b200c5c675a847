"""An engine process that misbehaves as a real one cannot: it hangs or sends invalid data.

``python stand_in.py MODE MARKER ... --fd N``: where the file MARKER does not exist, it creates it
and misbehaves as MODE says; later starts answer every request with black pictures at once.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np

from dreambooth.errors import ModelArtifactError, UserError
from dreambooth.serving.contract.engine_status import EngineStatus
from dreambooth.serving.contract.reply import Picture
from dreambooth.serving.supervision.link import read_blocking
from dreambooth.serving.supervision.messages import (
    Done,
    Drawn,
    Fault,
    FromEngine,
    Generate,
    LoadFailed,
    Ready,
    pack,
)

READY = Ready(seconds_per_call=((1, 1e-4),), seconds_per_decode=1e-4, rows=8)
LOAD_FAULTS = {
    "cannot_load": OverflowError("an int too big to convert"),
    "cannot_load_again": ModelArtifactError("the model is gone."),
    "refuses_settings": UserError("batch_rows must be at least 2."),
}
MODES = (
    "cannot_load",
    "cannot_load_again",
    "hangs_silently",
    "hangs_in_a_step",
    "never_ready",
    "nonsense",
    "refuses_settings",
    "stops_in_a_frame",
    "too_few",
    "wrong_size",
)


def main(mode: str, marker: Path, connection: socket.socket) -> None:
    behaves = marker.exists()
    marker.touch()

    sending = threading.Lock()

    def send(*messages: FromEngine) -> None:
        for message in messages:
            data = b"".join(pack(message))
            with sending:
                if mode == "stops_in_a_frame" and isinstance(message, Drawn):
                    connection.sendall(data[: len(data) // 2])
                    os.kill(os.getpid(), signal.SIGSTOP)
                    data = data[len(data) // 2 :]
                connection.sendall(data)

    if mode in LOAD_FAULTS and (behaves or mode != "cannot_load_again"):
        send(LoadFailed(fault=Fault.of(LOAD_FAULTS[mode])))
        return

    def beat() -> None:
        while True:
            send(EngineStatus(running_rows=0 if behaves or mode == "never_ready" else 1))
            time.sleep(0.05)

    if behaves or mode != "never_ready":
        send(READY)
    if behaves or mode != "hangs_silently":
        threading.Thread(target=beat, daemon=True).start()
    while (message := read_blocking(connection)) is not None:
        if isinstance(message, Generate) and (behaves or not mode.startswith("hangs")):
            answer(mode if not behaves else "", message, connection, send)


def answer(mode: str, message: Generate, connection: socket.socket, send: object) -> None:
    assert callable(send)
    if mode == "nonsense":
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
        return
    for i, wanted in enumerate(message.pictures if mode != "too_few" else ()):
        width, height = wanted.width or 8, wanted.height or 8
        if mode == "wrong_size":
            width += 8
        black = np.zeros((height, width, 3), np.uint8)
        picture = Picture(pixels=black, seed=wanted.seed, finish_reason="BLACK")
        send(Drawn(request_id=message.request_id, index=i, picture=picture))
    send(Done(request_id=message.request_id))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), socket.socket(fileno=int(sys.argv[-1])))
