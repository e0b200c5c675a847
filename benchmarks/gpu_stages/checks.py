"""The stages that check instead of measuring: replays of graphs, and the tests in tests/gpu."""

from __future__ import annotations

import gc
import os
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.gpu_stages.facts import FactFile
from benchmarks.gpu_stages.running import ROOT, StageContext
from benchmarks.train_step import graph_check
from dreambooth.errors import UserError
from dreambooth.fast.cuda_graphs import CudaGraphCapturer
from dreambooth.fast.graphed_passes import without_capture

TESTS = ROOT / "tests" / "gpu"


def graphs(context: StageContext, facts: FactFile) -> None:
    """Compare replays of the training step's CUDA graph with eager calls, bit for bit."""
    capture, device = without_capture, torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        capture = CudaGraphCapturer(device).capture
    # CPUs compute fp16 ten times slower.
    for mixed_precision in ("bf16",) if context.dry else ("bf16", "fp16"):
        try:
            found = graph_check.check(
                context.model,
                device,
                mixed_precision=mixed_precision,
                pictures=2,
                capture=capture,
            )
        except RuntimeError as error:  # the other precision is tried all the same
            found = graph_check.GraphCheck(error=" ".join(str(error).split())[:500])
        facts.add("graphs", mixed_precision, **asdict(found), in_words=found.in_words)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def learning(context: StageContext, facts: FactFile) -> None:
    """Run tests/gpu/test_training.py; in miniature only what learns."""
    _run_tests(TESTS / "test_training.py", facts, "-k=learns" if context.dry else "")


def memory(context: StageContext, facts: FactFile) -> None:
    """Run tests/gpu/test_memory.py, which skips itself without a GPU."""
    _run_tests(TESTS / "test_memory.py", facts)


def _run_tests(path: Path, facts: FactFile, *options: str) -> None:
    """Run a file of tests in this process; every test becomes a fact when it ends."""
    if not path.exists():
        raise UserError(f"There is no {path}: run it in a checkout of the project.")
    import pytest

    # cuBLAS reads this at the first matrix product of a process; deterministic runs need it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    class Outcomes:
        """A plugin of pytest that writes each test's outcome."""

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            """Write the outcome of a test; of its set-up and tear-down only failures and skips."""
            if report.when == "call" or report.outcome != "passed":
                facts.add(
                    "test",
                    report.nodeid,
                    outcome=report.outcome,
                    seconds=round(report.duration, 1),
                    why=report.longreprtext[-600:] if report.failed else None,
                )

    os.chdir(ROOT)
    words = [str(path), "-q", "--tb=short", "-p", "no:cacheprovider", *filter(None, options)]
    code = pytest.main(words, plugins=[Outcomes()])
    facts.add("tests", path.name, exit_code=int(code))
