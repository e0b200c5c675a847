"""Run the engine's process and time each request: one line per request on stderr."""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import Any, Final

from dreambooth.serving.contract.reply import Picture
from dreambooth.serving.engine.drawing_jobs import DrawingJob, OnPicture
from dreambooth.serving.engine.engine import Engine
from dreambooth.serving.supervision import child

LINE: Final = "engine seconds"


class _TimedEngine(Engine):
    """An engine that logs the time from `submit` to a request's last picture."""

    def submit(self, *args: Any, **keywords: Any) -> DrawingJob:
        """Submit as the engine does; log the time when the job is done."""
        begun = drawn = time.perf_counter()
        on_picture: OnPicture = keywords.pop("on_picture")

        def note(index: int, picture: Picture) -> None:
            nonlocal drawn
            drawn = time.perf_counter()
            on_picture(index, picture)

        job = super().submit(*args, on_picture=note, **keywords)
        job.add_done_callback(lambda _: _tell(drawn - begun))
        return job


def _tell(seconds: float) -> None:
    os.write(sys.stderr.fileno(), f"{LINE} {seconds:.6f}\n".encode())


if __name__ == "__main__":
    from dreambooth.serving.engine import engine

    engine.Engine = _TimedEngine  # type: ignore[misc]
    code = child.main(sys.argv[1:])
    logging.shutdown()
    os._exit(code)
