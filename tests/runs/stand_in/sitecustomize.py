"""Lets the half of a training job that needs torch be a stand-in which keeps the same files.

A folder on PYTHONPATH: Python imports this module at the start of every process.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

STEP_S = 0.02


def work(job: Any, folder: Path, stop: Any, *warnings: str) -> None:
    """Write what `dreambooth.job.run._work` writes, in place of it."""
    from dreambooth.process import files

    environment, steps = job.environment, job.hyperparameters.max_steps
    job.record.plan(steps, [("steps", str(steps))])
    with files.disk_faults_named("The metrics", environment.output_data_dir, elsewhere="go away"):
        _train(environment, steps, stop)


def _train(environment: Any, steps: int, stop: Any) -> None:
    metrics = environment.output_data_dir / "metrics.jsonl"
    saved = [int(path.name[5:]) for path in environment.checkpoint_dir.glob("step-*")]
    begun = max(saved, default=0)
    rows = metrics.read_text().splitlines(keepends=True)[:begun] if begun else []
    time.sleep(5 * STEP_S)
    with stop.held(), metrics.open("w") as file:
        file.writelines(rows)
        for step in range(begun + 1, steps + 1):
            time.sleep(STEP_S)
            file.write(json.dumps({"step": step, "loss": 1 / step, "steps_per_second": 50}) + "\n")
            file.flush()
            if stop.asked or step % 10 == 0:
                _write(environment.checkpoint_dir / f"step-{step:06}" / "manifest.json")
            stop.check()
        print(f"End of training: train_avg_loss={1 / steps:.8f}", flush=True)
        (environment.model_dir / ".partial-x").mkdir(parents=True, exist_ok=True)
        time.sleep(5 * STEP_S)
        (environment.model_dir / ".partial-x").rmdir()
        _write(environment.model_dir / "model_index.json")


def _write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text("{}")
    os.replace(part, path)


if "train" in sys.orig_argv:
    from dreambooth.job import run

    run._work = work
