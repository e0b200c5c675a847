"""Run `dreambooth serve` with an engine that logs its time for each request (`timed_engine`)."""

from __future__ import annotations

import sys
from pathlib import Path

from dreambooth.__main__ import main
from dreambooth.serving.http import server
from dreambooth.serving.supervision.supervisor import Supervisor
from dreambooth.settings.serve_options import ServeSettings

ENGINE = (sys.executable, "-P", "-m", "benchmarks.server_probes.timed_engine")


class _TimedSupervisor(Supervisor):
    """A supervisor that starts the timed engine."""

    def __init__(self, folder: Path, settings: ServeSettings) -> None:
        super().__init__(folder, settings, command=ENGINE)


if __name__ == "__main__":
    server.Supervisor = _TimedSupervisor  # type: ignore[assignment, attr-defined]
    sys.exit(main(sys.argv[1:]))
