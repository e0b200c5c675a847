"""Kill a training run with SIGKILL at random moments, restart it until it is done, and compare.

The run samples class images, writes checkpoints and unpacks its model from a tarball. It is killed
after a random time or while a file is being written, and the same command is started again. When a
run has ended by itself the next one begins, until all kills are spent. Every finished model folder
must equal that of an unbroken run byte for byte. At no moment may an incomplete model folder exist,
and nothing temporary may be left at the end.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import multiprocessing
import multiprocessing.context
import os
import random
import re
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dreambooth import tiny

CHECKPOINTING_STEPS = 4
_WHERE = re.compile(r"\[([a-z ]+)(?:, step \d+)?\] ")
_POLL_S = 0.001
_WRITING_S = 0.03  # about the time of one write of the small model


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """The job that is run: base model (a folder), data, number of steps and of class images."""

    model: Path = tiny.WEIGHTS
    data: Path = tiny.DATA / "dog1_8"
    steps: int = 16
    class_images: int = 4


@dataclass(slots=True, kw_only=True)
class SurvivalResult:
    """The observations of all runs; faults: one sentence each, and there should be none."""

    kills: int = 0
    runs: int = 0
    unbroken_seconds: float = 0.0
    seconds: float = 0.0
    phases: collections.Counter[str] = field(default_factory=collections.Counter)
    faults: list[str] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options: the number of kills, and the seed of their moments."""
    parser.add_argument("--kills", type=int, default=50, help="default: 50")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")


def main(arguments: argparse.Namespace) -> int:
    """Run, print the table and the JSON line; return 1 if anything was wrong."""
    with tempfile.TemporaryDirectory(prefix="survive-") as folder:
        result = run(Path(folder), Setup(), kills=arguments.kills, seed=arguments.seed)
    print(f"{'killed during':<24}kills")
    for phase, count in result.phases.most_common():
        print(f"{phase:<24}{count:>5}")
    print(f"{'all':<24}{result.kills:>5}")
    print(f"\nruns completed {result.runs}, an unbroken one takes {result.unbroken_seconds:.1f} s")
    for fault in result.faults:
        print(f"FAULT: {fault}")
    summary = {
        "benchmark": "survive",
        "kills": result.kills,
        "runs": result.runs,
        "faults": len(result.faults),
        "unbroken_seconds": round(result.unbroken_seconds, 1),
        "seconds": round(result.seconds, 1),
        "kills_by_phase": dict(result.phases.most_common()),
    }
    print(json.dumps(summary), flush=True)
    return 1 if result.faults else 0


def run(folder: Path, setup: Setup, *, kills: int, seed: int) -> SurvivalResult:
    """Kill `kills` times in the empty `folder`; compare each finished run with the unbroken one."""
    began = time.monotonic()
    # Every start forks a process that has imported what a job needs and done nothing else.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["dreambooth.job.run", "dreambooth.job.fine_tune"])
    archive = folder / "base.tar.gz"
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        tar.add(setup.model, arcname=".")
    unbroken = _Run(folder / "unbroken", archive, setup, processes)
    process = unbroken.start()
    process.join()  # the first start also waits for the imports
    assert process.exitcode == 0, unbroken.last_line()
    expected = _content(unbroken.model)
    result = SurvivalResult()
    shutil.rmtree(unbroken.folder)
    at = time.monotonic()
    unbroken.start().join()
    result.unbroken_seconds = time.monotonic() - at

    generator = random.Random(seed)
    while result.kills < kills:
        result.runs += 1
        one = _Run(folder / f"run{result.runs}", archive, setup, processes)
        _until_done(one, result, expected, generator, kills)
        result.faults += [f"run {result.runs}: {fault}" for fault in one.faults(expected)]
        shutil.rmtree(one.folder)
    result.seconds = time.monotonic() - began
    return result


def _until_done(
    one: _Run,
    result: SurvivalResult,
    expected: dict[str, str],
    generator: random.Random,
    kills: int,
) -> None:
    """Start the run again and again, killing it while kills are left, until it ends by itself."""
    longest_s = result.unbroken_seconds
    while True:
        began = time.monotonic()
        process = one.start()
        if result.kills < kills:
            _wait(one, process, generator, longest_s)
            process.kill()
        process.join()
        if process.exitcode != -9:
            if one.starts == 1:  # it ended before its kill: the machine is less busy now
                result.unbroken_seconds = min(longest_s, time.monotonic() - began)
            if process.exitcode != 0:
                result.faults.append(f"exit {process.exitcode}: {one.last_line()}")
            return
        result.kills += 1
        result.phases[one.phase()] += 1
        if (one.model / "model_index.json").exists() and not _is_whole(one.model, expected):
            result.faults.append(f"a half model after kill {result.kills}")


def _wait(
    one: _Run,
    process: multiprocessing.context.ForkServerProcess,
    generator: random.Random,
    longest_s: float,
) -> None:
    """Wait a random time; in half of the cases wait on until something is being written."""
    process.join(generator.uniform(0, longest_s))
    if generator.random() < 0.5:
        while process.is_alive() and not any(one.temporary_names()):
            time.sleep(_POLL_S)
        process.join(generator.uniform(0, _WRITING_S))


class _Run:
    """The folders of one training run, which is started as often as it takes."""

    def __init__(
        self,
        folder: Path,
        archive: Path,
        setup: Setup,
        processes: multiprocessing.context.ForkServerContext,
    ) -> None:
        self.folder = folder
        self.model = folder / "model"
        self._setup = setup
        self._processes = processes
        self.starts = 0
        self._argv = [
            *("--pretrained-model", str(archive), "--train", str(setup.data)),
            *("--model_dir", str(self.model), "--output_data_dir", str(folder / "output")),
            *("--checkpoint_dir", str(folder / "checkpoints")),
            *("--with_prior_preservation", f"--num_class_images={setup.class_images}"),
            *("--batch_size=2", f"--max_steps={setup.steps}", "--learning_rate=0.0001"),
            "--processes=1",
            f"--checkpointing_steps={CHECKPOINTING_STEPS}",
        ]

    def start(self) -> multiprocessing.context.ForkServerProcess:
        """Start the same command once more."""
        (self.folder / "tmp").mkdir(parents=True, exist_ok=True)
        process = self._processes.Process(target=_train, args=(self._argv, str(self.folder)))
        process.start()
        self.starts += 1
        return process

    def phase(self) -> str:
        """Return the phase that the log named last."""
        found = _WHERE.findall(self._log())
        return found[-1] if found else "starting"

    def last_line(self) -> str:
        """Return the last line of the log."""
        return (self._log().splitlines() or [""])[-1]

    def temporary_names(self) -> Iterator[Path]:
        """Yield the paths that are being written, or were when the run was killed."""
        for place in (self.model, self.folder / "checkpoints", self.folder / "output"):
            for folder, below, files in os.walk(place):
                for name in (*below, *files):
                    if name.startswith(".partial-") or name.endswith(".part"):
                        yield Path(folder, name)

    def faults(self, expected: dict[str, str]) -> Iterator[str]:
        """Yield what is wrong with a finished run, one sentence each."""
        if _content(self.model) != expected:
            yield "its model is not the unbroken run's"
        for path in (*self.temporary_names(), *(self.folder / "tmp").iterdir()):
            yield f"{path.relative_to(self.folder)} was left"
        checkpoints = list((self.folder / "checkpoints").glob("step-*"))
        if len(checkpoints) != 1:
            yield f"{len(checkpoints)} checkpoints were left"
        rows = (self.folder / "output" / "metrics.jsonl").read_text().splitlines()
        if [json.loads(row)["step"] for row in rows] != list(range(1, self._setup.steps + 1)):
            yield "metrics.jsonl does not have every step once"

    def _log(self) -> str:
        """Return the log of the last start."""
        return (self.folder / "log").read_text(errors="replace")


def _train(argv: Sequence[str], folder: str) -> None:
    """Run the job in the child process, with its output in a file and its own temporary folder."""
    log = os.open(Path(folder, "log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    tempfile.tempdir = str(Path(folder, "tmp"))
    from dreambooth.job.run import run_job

    sys.exit(run_job(argv, {}))


def _is_whole(model: Path, expected: dict[str, str]) -> bool:
    """Return whether a model folder holds everything except what is written last.

    Sample pictures and the model card that shows them come last.
    """

    def essence(content: dict[str, str]) -> dict[str, str]:
        last = (".partial-", "samples", "README.md")
        return {name: digest for name, digest in content.items() if not name.startswith(last)}

    return essence(_content(model)) == essence(expected)


def _content(model: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a model folder, by relative path."""
    return {
        str(path.relative_to(model)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(model.rglob("*"))
        if path.is_file()
    }
