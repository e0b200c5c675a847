"""`python -m benchmarks gpu`: stages, their ends, facts, verdicts and the packages to carry."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.__main__ import main
from benchmarks.gpu_stages import child, facts, pack, report, running, stages
from benchmarks.gpu_stages.facts import Fact, FactFile
from benchmarks.gpu_stages.found import Found
from benchmarks.gpu_stages.running import StageContext
from benchmarks.gpu_stages.stages import STAGES, Stage
from benchmarks.gpu_stages.verdicts import LeverVerdict, lever_verdicts, verdicts
from benchmarks.train_step import ours
from benchmarks.train_step import peer as peers
from benchmarks.train_step.figures import StepTimes
from benchmarks.train_step.ours import RunFigures, RunOutcome, Setting, Subject
from benchmarks.train_step.peer import PeerFigures, PeerOutcome
from benchmarks.train_step.processes import Memory
from dreambooth.errors import UserError
from dreambooth.training.device import DeviceFacts
from tests.documents import ROOT

GIB = 2**30


@pytest.fixture
def context(tmp_path: Path) -> StageContext:
    out, work = tmp_path / "out", tmp_path / "work"
    out.mkdir()
    work.mkdir()
    return StageContext(out=out, work=work, model=tmp_path / "none", dry=True)


def stage(name: str, *, limit_s: int = 60) -> Stage:
    return Stage(name=name, sentence="a stand-in", expected_s=1, limit_s=limit_s)


def by_script(scripts: dict[str, str]) -> Callable[[Stage, StageContext], list[str]]:
    """Return a command that runs a script without torch instead of a stage."""
    return lambda one, _: [sys.executable, "-c", textwrap.dedent(scripts[one.name])]


def until(true: Callable[[], object], seconds: float = 30) -> None:
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.02)


def gone(pid: int) -> bool:
    """Return whether a process has ended, also if nobody has asked for its exit code yet."""
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True


# Stages and the budget.


def test_the_most_valuable_facts_come_first_and_fit_a_call_of_nine_minutes() -> None:
    assert (
        *("ceilings", "model", "steps", "graphs", "learning", "job", "serving", "t4", "peer"),
        *("levers", "memory"),
    ) == stages.NAMES
    *most, last = STAGES  # whole jobs in every memory plan take what is left, or a second call
    assert sum(one.expected_s for one in most) + stages.RESERVE_S < gpu.BUDGET_S == 540
    assert all(one.expected_s < one.limit_s for one in STAGES)
    assert last.name == "memory"


@pytest.mark.parametrize(
    ("left", "seconds"),
    [
        (540, 180),  # its own limit
        (150, 140),  # what the table leaves
        (35, 25),  # not all of its facts, but some
        (34, None),
        (-3, None),
    ],
)
def test_a_stage_gets_its_limit_or_what_is_left(left: float, seconds: float | None) -> None:
    assert stages.seconds_for(STAGES[stages.NAMES.index("steps")], left) == seconds


def test_a_stage_that_hangs_is_killed_with_its_children_and_one_that_crashes_costs_itself(
    context: StageContext,
) -> None:
    pids = context.work / "pids"
    scripts = {
        "hangs": f"""
            import os, pathlib, subprocess, sys, time
            sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
            own = subprocess.Popen(sleep, start_new_session=True)
            same = subprocess.Popen(sleep)
            made = pathlib.Path({str(pids)!r} + ".partial")
            made.write_text(f"{{os.getpid()}} {{own.pid}} {{same.pid}}")
            made.rename({str(pids)!r})
            time.sleep(600)
        """,
        "crashes": "import os; print('the last words', flush=True); os.abort()",
        "fails": "raise SystemExit(3)",
        "works": "",
    }
    run = [stage("hangs", limit_s=2), stage("crashes"), stage("fails"), stage("works")]
    running.run_all(run, context, budget_s=60, command=by_script(scripts))
    found = Found(facts.read(context.out))
    assert found.end("hangs")[0::2] == ("killed", "it was not over after 2 s")
    assert found.end("crashes")[0::2] == ("crashed", "signal SIGABRT")
    assert found.end("fails")[0::2] == ("crashed", "exit code 3")
    assert found.end("works")[0::2] == ("done", None)
    hanging = [int(pid) for pid in pids.read_text().split()]
    assert len(hanging) == 3
    until(lambda: all(gone(pid) for pid in hanging))
    assert "===== crashes\nthe last words" in (context.out / running.LOG_NAME).read_text()


def test_what_the_budget_cuts_off_or_leaves_out_is_named(context: StageContext) -> None:
    scripts = {"long": "import time; time.sleep(600)", "later": ""}
    run = [stage("long"), stage("later")]
    running.run_all(run, context, budget_s=12, command=by_script(scripts))
    found = Found(facts.read(context.out))
    assert found.end("long")[0::2] == ("cut off", "the budget of 12 s was used up")
    ended, _, why = found.end("later")
    assert ended == "left out"
    assert re.fullmatch(r"(9|10) of the budget's 12 s were left", why)
    assert found.end("never asked") == ("not asked for", 0.0, None)


RUN_TWO = """
import sys
from pathlib import Path
from benchmarks.gpu_stages import running
from benchmarks.gpu_stages.stages import Stage
found = "from benchmarks.gpu_stages.facts import FactFile; from pathlib import Path; "
found += "FactFile(Path(sys.argv[1]), 'steps').add('step', 'one', ms=1.5)"
hang = "import threading, time; from benchmarks.gpu_stages import child; "
hang += "threading.Thread(target=child._end_with_the_input, daemon=True).start(); "
hang += "open(sys.argv[1] + '/pid', 'w').write(str(__import__('os').getpid())); time.sleep(600)"
stages = [Stage(name=n, sentence="", expected_s=1, limit_s=500) for n in ("steps", "graphs")]
out = Path(sys.argv[1])
running.run_all(
    stages,
    running.StageContext(out=out, work=out, model=out),
    budget_s=600,
    command=lambda one, _: [
        sys.executable, "-c", "import sys; " + (found if one.name == "steps" else hang), str(out)
    ],
)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_when_the_call_is_cut_all_facts_up_to_then_are_kept_and_nothing_runs_on(
    tmp_path: Path, number: signal.Signals
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", RUN_TWO, str(tmp_path)], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    pid = tmp_path / "pid"
    until(lambda: pid.exists() and pid.read_text())
    process.send_signal(number)
    assert process.wait(30) != 0
    until(lambda: gone(int(pid.read_text())))
    found = Found(facts.read(tmp_path))
    assert found.figures("steps", "step", "one") == {"ms": 1.5}
    assert found.end("steps")[0] == "done"
    assert found.end("graphs") == ("cut off", 0.0, "the run ended while it was running")
    assert [*found.incomplete()] == ["graphs: cut off: the run ended while it was running"]


def test_the_call_itself_needs_nothing_that_has_to_be_carried() -> None:
    missing = ("torch", *pack.LACKING)
    script = f"""
        import sys
        sys.modules |= dict.fromkeys({missing}, None)
        from benchmarks import __main__
        __main__.parser()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, check=True)


def test_half_a_line_costs_only_itself(tmp_path: Path) -> None:
    FactFile(tmp_path, "steps").add("step", "one", ms=1)
    with (tmp_path / facts.FILE_NAME).open("ab") as file:
        file.write(b'{"stage": "steps", "kind": "st')
    FactFile(tmp_path, "run").add("stage", "steps", ended="killed")
    assert [fact.name for fact in facts.read(tmp_path)] == ["one", "steps"]


# The stages themselves, in miniature.


def test_stages_find_their_facts_in_miniature(
    context: StageContext, small_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.gpu_stages import step_trials

    context = replace(context, model=small_model_folder)
    assert [child.run(name, context) for name in ("ceilings", "graphs", "peer")] == [0, 0, 0]
    trials = [*step_trials.levers_trials()]
    unusable = step_trials.Trial(hyperparameters={"memory_plan": "fp32_adamw", "batch_size": 0})
    fast = next(trial for trial in trials if trial.name == "fast fp32_adamw prior + channels last")
    monkeypatch.setattr(
        step_trials, "levers_trials", lambda: iter([step_trials.REFERENCE, unusable, fast])
    )
    assert child.run("levers", context) == 0
    found = Found(facts.read(context.out))
    assert found.dry is False  # the orchestrator says it
    assert found.machine["device"] == "cpu"
    assert len([*found.all("ceilings", "ceiling")]) == 5
    assert all(fact.figures["value"] > 0 for fact in found.all("ceilings", "ceiling"))
    graphs = found.figures("graphs", "graphs", "bf16")
    assert graphs is not None
    assert graphs["graph_equals_eager"]
    assert found.why_missing("peer") == "stage peer not asked for"
    reference, tried = found.all("levers", "step")
    assert reference.figures["cosine"] == pytest.approx(1)
    assert reference.figures["mixed_precision"] == "no"
    assert tried.figures["fast_step"]
    assert tried.figures["cosine"] > 0.99
    assert tried.figures["times"]["median_ms"] > 0
    assert tried.figures["expected_bytes"] > 0
    (error,) = found.all("levers", "error")
    assert error.name == unusable.name
    assert list(context.work.iterdir()) == []


def test_a_model_is_written_whole_or_not_at_all(
    context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.train_step import full_size

    def cut(folder: Path) -> None:
        folder.mkdir()
        raise OSError("no space left")

    monkeypatch.setattr(full_size, "write_model", cut)
    assert child.run("model", context) == 1
    assert not context.model.exists()
    monkeypatch.setattr(full_size, "write_model", lambda folder: folder.mkdir(exist_ok=True))
    assert child.run("model", context) == 0
    assert context.model.is_dir()


def test_whole_jobs_are_run_as_they_are_measured_elsewhere(
    context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Setting, Subject]] = []
    times = StepTimes(median_ms=50.0, p10_ms=49.0, p90_ms=51.0, mean_ms=60.0)
    figures = RunFigures(
        times=times,
        memory=Memory(resident=1, allocated=5 * GIB, reserved=6 * GIB),
        first_step_s=9.0,
        class_image_s=0.1,
        export_s=2.0,
        run_s=30.0,
        without_class_images_s=28.0,
        memory_plan="fp32_adamw",
    )

    def run(setting: Setting, subject: Subject, _: object, folder: Path) -> RunOutcome:
        asked.append((setting, subject))
        faulty = subject.conditions.as_t4
        return RunOutcome(
            setting=setting,
            figures=None if faulty else figures,
            fault="exit 1: no room" if faulty else None,
            class_images=folder,
        )

    beside = PeerFigures(
        times=replace(times, median_ms=150.0), memory=None, first_step_s=1, run_s=9
    )
    monkeypatch.setattr(ours, "run", run)
    monkeypatch.setattr(peers, "run", lambda *_: PeerOutcome(figures=beside, fault=None))
    context = replace(context, peer=Path(__file__))
    assert [child.run(name, context) for name in ("job", "t4", "peer")] == [0, 0, 0]
    settings = [(setting.memory_plan, setting.whole_job) for setting, _ in asked]
    assert settings == [("auto", True), ("auto", True), ("fp32_adamw", False)]
    assert [subject.conditions.as_t4 for _, subject in asked] == [False, True, False]
    found = Found(facts.read(context.out))
    text = report.write(context.out, found)
    assert "| job, whole | fp32_adamw | 50.0 | 9.0 s | 30.0 s | 5.00/6.00 |" in text
    assert "| peer, theirs | - | 150.0 | 1.0 s | 9.0 s | - |" in text
    assert "* t4, whole: exit 1: no room" in text
    shown = lines(*found.facts)
    assert "a step beside diffusers' script: goal 4 times as fast: 3.00 times, missed" in shown


def test_every_stage_has_a_function() -> None:
    for one in STAGES:
        assert callable(child.function(one.name))


def test_a_stage_that_raises_leaves_the_reason(
    context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise ValueError("no\n  room")

    monkeypatch.setattr(child, "function", lambda name: fails)
    assert child.run("graphs", context) == 1
    found = Found(facts.read(context.out))
    assert found.why_missing("graphs", "bf16") == "ValueError: no room"
    assert found.failed


def test_at_full_size_a_stage_refuses_a_cpu(tmp_path: Path) -> None:
    assert child.run("steps", StageContext(out=tmp_path, work=tmp_path, model=tmp_path)) == 1
    assert "can use no GPU here" in Found(facts.read(tmp_path)).why_missing("steps")


def test_trials_differ_in_their_names_and_begin_with_the_likeliest_defaults() -> None:
    from benchmarks.gpu_stages import step_trials

    steps = [trial.name for trial in step_trials.steps_trials()]
    assert steps[:5] == [
        "fp32_adamw in fp32 prior",
        "fp32_adamw prior",
        "fast fp32_adamw prior",
        "8bit_adamw prior",
        "fast 8bit_adamw prior",
    ]
    levers = [trial.name for trial in step_trials.levers_trials()]
    assert "fast fp32_adamw prior + channels last" in levers
    for names in (steps, levers):
        assert len(set(names)) == len(names)


def test_a_dry_run_of_one_stage_ends_in_a_table_and_a_json_line(
    small_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--dry", "--only", "ceilings", "--model", str(small_model_folder)]
    assert main(["gpu", "--out", str(tmp_path), *options]) == 0
    shown = capsys.readouterr().out
    summary = json.loads(shown.splitlines()[-1])
    assert (summary["device"], summary["dry"], summary["incomplete"]) == ("cpu", True, [])
    assert summary["goals"]["met"] == summary["goals"]["missed"] == 0
    table = (tmp_path / report.TABLE_NAME).read_text()
    assert table in shown
    assert "A dry run: everything in miniature" in table
    document = json.loads(Path(summary["record"]).read_text())
    assert {"torch", "commit", "date", "driver", "cuda"} <= set(document)
    assert [each["name"] for each in document["facts"] if each["kind"] == "stage"] == ["ceilings"]
    (tmp_path / report.TABLE_NAME).unlink()
    assert main(["gpu", "show", "--out", str(tmp_path)]) == 0
    assert (tmp_path / report.TABLE_NAME).read_text() == table


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ([], stages.NAMES),
        (["--only", "memory,ceilings"], ("ceilings", "memory")),
        (["--only", "levers,steps"], ("model", "steps", "levers")),
        (["--only", "levers,model", "--model", "tiny"], ("levers",)),
    ],
)
def test_the_full_size_model_is_written_where_a_stage_needs_it(
    options: list[str], asked: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = DeviceFacts(kind="cuda", name="a card", compute_capability=(8, 6))
    monkeypatch.setattr("dreambooth.training.device.visible_gpus", lambda _: (card,))
    given: list[Any] = []
    monkeypatch.setattr(gpu, "run_all", lambda *run, **named: given.append((*run, named)))
    assert main(["gpu", "--out", str(tmp_path), "--budget", "99", *options]) == 0
    ((run, given_context, named),) = given
    assert tuple(one.name for one in run) == asked
    assert StageContext.from_json(given_context.to_json()) == given_context
    assert (given_context.dry, named["budget_s"]) == (False, 99)
    found = Found(facts.read(tmp_path))
    assert (found.machine["device"], found.compute_capability) == ("a card", "8.6")


def test_a_call_that_is_stopped_shows_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "run_all", stopped)
    assert main(["gpu", "--dry", "--out", str(tmp_path)]) == 130
    assert "## Goals" in capsys.readouterr().out
    assert (tmp_path / report.RECORD_NAME).exists()


@pytest.mark.on_demand
def test_a_dry_run_goes_through_every_stage(small_model_folder: Path, tmp_path: Path) -> None:
    peer = tmp_path / "peer.py"
    from tests.benchmarks.test_train import PEER

    peer.write_text(PEER)
    options = ["--dry", "--budget", "1200", "--model", str(small_model_folder)]
    assert main(["gpu", "--out", str(tmp_path / "out"), *options, "--peer", str(peer)]) == 0
    found = Found(facts.read(tmp_path / "out"))
    assert [*found.incomplete()] == []
    for name in stages.NAMES:
        assert found.end(name)[0] == ("not asked for" if name == "model" else "done")
    for where, count in {"steps": 10, "levers": 10}.items():
        assert len([*found.all(where, "step")]) == count
    for where, name in {"job": "whole", "t4": "whole", "peer": "theirs"}.items():
        job = found.figures(where, "job", name)
        assert job is not None
        assert job["run_s"] > 0
    assert {fact.name for fact in found.all("serving", "pictures")} == {
        *("diffusers", "eager", "channels_last")
    }
    outcomes = {fact.figures["outcome"] for fact in found.all("learning", "test")}
    assert outcomes == {"passed", "skipped"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["run"], "nvidia-smi shows no GPU here: --dry runs every stage in miniature"),
        (["--only", "stpes"], "--only knows no stage stpes: there are ceilings, model, steps"),
        (["--peer", "none.py"], "There is no file none.py: give --peer a train_dreambooth.py"),
        (["--dry", "--model", "/none"], "/none"),
        (["show"], "give --out the folder of a run"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_sentence(
    options: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dreambooth.training.device.visible_gpus", lambda _: ())
    assert main(["gpu", *options, "--out", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert said in shown.err
    assert len(shown.err.splitlines()) == 1
    assert shown.out == ""


# Verdicts, from recorded facts.


def step(name: str, ms: float, **changes: Any) -> Fact:
    figures = {
        "levers": name.split(" + ")[1:],
        "times": {"median_ms": ms, "p10_ms": ms, "p90_ms": ms, "mean_ms": ms},
        "allocated": 10 * GIB,
        "reserved": 11 * GIB,
        "expected_bytes": 10 * GIB,
        "cosine": 0.999,
        **changes,
    }
    stage_name = "levers" if figures["levers"] else "steps"
    return Fact(stage=stage_name, kind="step", name=name, figures=figures)


def ended(name: str, how: str = "done", why: str | None = None) -> Fact:
    figures = {"ended": how, "seconds": 20.0, "why": why}
    return Fact(stage="run", kind="stage", name=name, figures=figures)


def results_of(where: str, *outcomes: str, over: bool = True) -> Iterator[Fact]:
    for number, outcome in enumerate(outcomes):
        yield Fact(stage=where, kind="test", name=f"t{number}", figures={"outcome": outcome})
    if over:
        name = {"learning": "test_training.py", "memory": "test_memory.py"}[where]
        yield Fact(stage=where, kind="tests", name=name, figures={"exit_code": 0})


MACHINE = Fact(
    stage="ceilings",
    kind="machine",
    name="NVIDIA H200",
    figures={"device": "NVIDIA H200", "compute_capability": [9, 0], "date": "2026-12-01T08:00"},
)


def lines(*found: Fact) -> list[str]:
    """Return the verdicts without the goals' sources."""
    each = verdicts(Found([MACHINE, *found]))
    return [verdict.in_words.replace(f" ({verdict.source})", "") for verdict in each]


def test_figures_are_held_against_the_goals_of_their_card() -> None:
    shown = lines(
        step("fast fp32_adamw plain", 27.3),
        step("fast fp32_adamw prior", 29.9),
        step("8bit_adamw prior", 60.0, allocated=12 * GIB),
        ended("steps", "killed", "it was not over after 180 s"),
    )
    assert "a step, fast fp32_adamw plain: goal 25 ms: 27.3 ms, missed" in shown
    assert "a step, fast fp32_adamw prior: goal 30 ms: 29.9 ms, met" in shown
    assert "memory of 8bit_adamw: goal within 10 % of the expected: 120.0% of it, missed" in shown
    assert "reserved by 8bit_adamw: goal 10 GiB: 11.00 GiB, missed" in shown
    why = "stage steps killed: it was not over after 180 s, not measured"
    assert f"a step, fp32_adamw prior: goal 65 ms: {why}" in shown
    assert not any("A10G" in line or "300 ms" in line for line in shown)
    call = Fact(stage="run", kind="call", name="gpu", figures={"device": "Tesla T4"})
    (words,) = (each.in_words for each in verdicts(Found([call])) if each.wanted == "300 ms")
    assert words == (
        "a step, 8bit_adamw prior: goal 300 ms (the project's goal): stage steps not asked for, "
        "not measured"
    )


def test_jobs_graphs_tests_and_pictures_have_verdicts() -> None:
    job = {
        "times": {"median_ms": 50.0, "mean_ms": 60.0},
        "first_step_s": 18.0,
        "run_s": 40.0,
        "class_image_s": 0.1,
        "memory": {"reserved": 14 * GIB},
        "scale": {"steps": 45, "warm_up": 5, "class_images": 16},
    }
    theirs = {"times": {"median_ms": 150.0}}
    exact = {"bytes_differing": 0, "pictures": 8}
    given_up = {"picture_s": 1.0, "exact": exact, "graphs": 0, "peak": None}
    graph = {
        "captured": True,
        "eager_repeats": True,
        "graph_equals_eager": True,
        "in_words": "equal",
    }
    shown = lines(
        Fact(stage="job", kind="job", name="whole", figures=job),
        Fact(stage="t4", kind="job", name="whole", figures=job),
        Fact(stage="peer", kind="job", name="ours", figures=job),
        Fact(stage="peer", kind="job", name="theirs", figures=theirs),
        Fact(stage="serving", kind="pictures", name="graphs", figures=given_up),
        Fact(stage="graphs", kind="graphs", name="bf16", figures=graph),
        *results_of("learning", "passed", "failed"),
        *results_of("memory", "passed", over=False),
        ended("memory", "cut off", "the budget of 540 s was used up"),
    )
    for line in (
        "first step of a job: goal 20 s: 18.0 s, met",
        "400 steps with 100 class images: goal 60 s: 66 s, extrapolated, missed",
        "a step beside diffusers' script: goal 4 times as fast: 3.00 times, missed",
        "a whole job as on a T4: goal 13 GiB reserved: 14.00 GiB, missed",
        "replays of the training step's graph, bf16: goal bit-equal to eager calls: equal, met",
        "tests/gpu/test_training.py: goal all pass: 1 passed, 1 failed, missed",
        "tests/gpu/test_memory.py: goal all pass: 1 passed, the others not run (stage memory "
        "cut off: the budget of 540 s was used up), not measured",
        "pictures drawn again in exact mode, graphs: goal 0 bytes differ: 0 in 8 pictures, the "
        "graphs were given up, missed",
    ):
        assert line in shown


def test_a_job_that_fails_under_a_t4s_memory_misses_its_goal() -> None:
    fault = {"error": "exit 1: no room"}
    shown = lines(
        Fact(stage="t4", kind="error", name="whole", figures=fault),
        Fact(stage="job", kind="error", name="whole", figures=fault),
    )
    assert "a whole job as on a T4: goal 13 GiB reserved: exit 1: no room, missed" in shown
    assert "first step of a job: goal 20 s: exit 1: no room, not measured" in shown


GREEN = (*results_of("learning", "passed"), *results_of("memory", "passed"))


def lever(name: str, *found: Fact) -> LeverVerdict:
    return next(each for each in lever_verdicts(Found([MACHINE, *found])) if each.lever == name)


def test_a_lever_becomes_the_default_only_if_all_is_measured_and_good() -> None:
    plain, fast = step("fp32_adamw prior", 60.0), step("fast fp32_adamw prior", 30.0)
    name = "fast_step, fp32_adamw"
    found = lever(name, plain, fast, *GREEN)
    assert found.becomes_default
    assert found.decision == "the default for compute capability 9.0"
    assert found.speed.found == "60.0 to 30.0 ms, +100 %"
    for changes, decision in (
        ({"ms": 55.0}, "stays off: speed"),
        ({"allocated": 10.6 * GIB}, "stays off: memory"),
        ({"cosine": 0.98}, "stays off: equality"),
        ({"ms": 59.0, "cosine": 0.9}, "stays off: speed, equality"),
    ):
        worse = step("fast fp32_adamw prior", **{"ms": 30.0, **changes})  # type: ignore[arg-type]
        assert lever(name, plain, worse, *GREEN).decision == decision
    assert lever(name, plain, fast).decision == "undecided: tests"
    red = lever(
        name, plain, fast, *results_of("learning", "failed"), *results_of("memory", "passed")
    )
    assert red.decision == "stays off: tests"
    why = lever(name, plain, *GREEN, ended("steps", "crashed", "signal SIGABRT"))
    assert why.decision == "undecided: speed, memory, equality"
    assert why.speed.found == "stage steps crashed: signal SIGABRT"


def test_levers_of_serving_and_single_levers_are_decided_too() -> None:
    base = step("fp32_adamw prior", 50.0)
    again = Fact(stage="levers", kind="step", name=base.name, figures=base.figures)
    single = lever(
        "channels last, fp32_adamw prior",
        again,
        step("fp32_adamw prior + channels last", 40.0),
        *GREEN,
    )
    assert single.becomes_default
    peak = {"allocated": 5 * GIB, "reserved": 6 * GIB, "in_use": 7 * GIB}
    exact = {"bytes_differing": 0, "pictures": 8}
    eager = {"picture_s": 0.5, "exact": exact, "graphs": 0, "peak": peak}
    drawn = [
        Fact(stage="serving", kind="pictures", name="eager", figures=eager),
        Fact(
            stage="serving",
            kind="pictures",
            name="graphs",
            figures={**eager, "picture_s": 0.2, "graphs": 16},
        ),
    ]
    assert lever("--cuda_graphs", *drawn, *GREEN).becomes_default
    assert lever("--channels_last", *drawn, *GREEN).becomes_default is None
    drawn[1] = Fact(stage="serving", kind="pictures", name="graphs", figures=eager)
    assert lever("--cuda_graphs", *drawn, *GREEN).decision == "stays off: speed, equality"


def test_a_stage_that_is_run_again_replaces_what_it_had_found() -> None:
    begins = Fact(stage="run", kind="begins", name="steps")
    error = Fact(stage="steps", kind="error", name="steps", figures={"error": "no room"})
    first = (begins, step("8bit_adamw prior", 50.0), error, ended("steps", "crashed"))
    assert Found(first).failed
    again = Found([*first, begins, step("fp32_adamw prior", 60.0)])
    assert again.figures("steps", "step", "8bit_adamw prior") is None
    assert again.end("steps")[0] == "cut off"
    assert not again.failed
    assert again.facts[: len(first)] == first


def test_the_table_is_markdown_and_names_what_is_missing(tmp_path: Path) -> None:
    found = Found(
        [
            MACHINE,
            step("fp32_adamw prior", 60.0),
            ended("steps"),
            ended("graphs", "killed", "it was not over after 60 s"),
            Fact(
                stage="steps", kind="error", name="8bit_adamw prior", figures={"error": "no | lib"}
            ),
        ]
    )
    text = report.write(tmp_path, found)
    assert text.startswith("# NVIDIA H200, 2026-12-01\n")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert "| fp32_adamw prior | 60.0 | 60.0 to 60.0 | 10.00/11.00 | 100.0% | 0.99900 |" in rows
    assert "* graphs: killed: it was not over after 60 s" in text
    assert "* steps, 8bit_adamw prior: no | lib" in text
    assert any(line.endswith(": no | lib, not measured") for line in text.splitlines())
    assert "| --cuda_graphs | ?: stage serving not asked for |" in text
    document = json.loads((tmp_path / report.RECORD_NAME).read_text())
    assert document["compute_capability"] == [9, 0]
    assert len(document["facts"]) == 5
    assert {each["becomes_default"] for each in document["levers"]} <= {None, False}
    assert found.failed


# What is carried to a machine without a network.


def wheel(folder: Path, name: str, **files: bytes) -> Path:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as made:
        for file, content in files.items():
            made.writestr(file.replace("__", "/").replace("_so", ".so"), content)
    return path


@pytest.fixture
def downloaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put two small wheels in place of the downloaded ones; return the pins asked for."""
    asked: list[str] = []

    def download(pins: list[str], folder: Path, *, python: str) -> None:
        asked.extend(pins)
        wheel(folder, "diffusers", diffusers__init=b"1")
        libraries = {f"bitsandbytes__lib_{kind}_so": os.urandom(999) for kind in KINDS}
        wheel(folder, "bitsandbytes", **libraries, bitsandbytes__code=b"2")

    monkeypatch.setattr(pack, "download", download)
    return asked


KINDS = ("cuda121", "cuda130", "rocm62", "cpu")


def test_the_packages_are_packed_with_one_library_and_unpacked_again(
    tmp_path: Path, downloaded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gpu", "pack", "--out", str(tmp_path / "new")]) == 0
    assert "python -m benchmarks gpu --out DIR --packages packages.zip" in capsys.readouterr().out
    pinned = (ROOT / "requirements.txt").read_text()
    assert {pin.split("==")[0] for pin in downloaded} == set(pack.LACKING)
    assert all(pin in pinned for pin in downloaded)
    folder = pack.unpack(tmp_path / "new" / pack.FILE_NAME, tmp_path / "site")
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    kept = {f"bitsandbytes/lib_{kind}.so" for kind in ("cuda130", "cpu")}
    assert files == {"diffusers/init", "bitsandbytes/code", *kept}


@pytest.mark.usefixtures("downloaded")
def test_more_than_may_be_carried_is_not_written(tmp_path: Path) -> None:
    assert pack.LIMIT_BYTES == 64 * 2**20
    with pytest.raises(UserError, match=r"take .* and 1 KiB may be carried|nothing was written"):
        pack.write(tmp_path, python="3.12", cuda="13.0", limit_bytes=1024)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"no library for CUDA 11\.8"):
        pack.write(tmp_path, python="3.12", cuda="11.8")


def test_without_a_network_pip_has_the_last_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["WARNING: retrying", "ERROR: No matching distribution found for diffusers==1"]
    ended = subprocess.CompletedProcess([], 1, stdout="", stderr="\n".join(words))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(UserError) as raised:
        pack.download(["diffusers==1"], tmp_path, python="3.12")
    assert "for Python 3.12: pack on a machine that reaches a package index" in str(raised.value)
    assert str(raised.value).endswith("No matching distribution found for diffusers==1")


def test_another_file_is_no_pack(tmp_path: Path) -> None:
    (tmp_path / "packages.zip").write_text("no zip")
    with pytest.raises(UserError, match="no archive that `gpu pack` wrote"):
        pack.unpack(tmp_path / "packages.zip", tmp_path / "site")
