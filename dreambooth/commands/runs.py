"""`python -m dreambooth runs` lists runs and starts, stops, continues, repeats and deletes them.

Of what a run has kept it makes another state the model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

from dreambooth.errors import UserError, one_line
from dreambooth.limits import size_in_words
from dreambooth.process import addresses, libraries
from dreambooth.runs import run_folder, run_list, run_states, stop_run
from dreambooth.runs.run_folder import Run, RunState
from dreambooth.runs.run_list import RunList
from dreambooth.runs.run_status import RunStatus
from dreambooth.settings import command_line, container, hyperparameters
from dreambooth.settings.knob import BARE_FLAG

# What a run is asked to do: the training options, without the folders that a run has itself.
_SETTINGS: Final = (
    *(knob for knob in container.OPTIONS if knob.name in run_list.OPTIONS),
    *hyperparameters.KNOBS,
)
_LOG_LINES: Final = 20
_Printed = tuple[str, dict[str, Any]]  # for people, and for a JSON object


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions with their options."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--dir",
        default=argparse.SUPPRESS,
        metavar="DIR",
        help=f"folder of the runs; default: {run_list.DEFAULT}",
    )
    shared.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON object"
    )
    for action in shared._actions:
        parser._add_action(action)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def add(name: str, sentence: str) -> argparse.ArgumentParser:
        return actions.add_parser(name, help=sentence, parents=[shared])

    add("list", "all runs with states, steps, losses and sizes")
    show = add("show", "all about one run")
    start = add("start", "add a run, if --train is given, and execute all that wait")
    stop = add("stop", "stop runs, and say what is left of them")
    go_on = add("continue", "go on from the checkpoint, with changes if any are given")
    again = add("again", "add a run with the settings of another one and these changes")
    keep = add("keep", "make a state that a run has kept its model")
    delete = add("delete", "delete runs and all that they hold")
    delete.add_argument("--yes", action="store_true", help="do not ask")
    for one in (show, go_on, again, keep):
        one.add_argument("name", metavar="RUN")
    keep.add_argument("step", metavar="STEP", type=int, help="`show` lists them")
    for several in (stop, delete):
        several.add_argument("names", metavar="RUN", nargs="+")
    for new in (start, again):
        new.add_argument("--name", dest="new_name", default="", help="added to the run's number")
    for changed in (start, go_on, again):
        command_line.add_arguments(changed, _SETTINGS)


def main(arguments: argparse.Namespace) -> int:
    """Carry out one action; raise DreamBoothError with a sentence where it cannot be."""
    folder = getattr(arguments, "dir", None)
    runs = RunList(addresses.to_path(folder, "--dir") if folder else run_list.DEFAULT)
    text, found = _ACTIONS[arguments.action](runs, arguments)
    if getattr(arguments, "json", False):
        where = {"dir": str(runs.folder.absolute()), "runner": runs.has_runner()}
        print(json.dumps({**where, **found}, indent=2))
    else:
        print(text)
    return 0


def _list(runs: RunList, arguments: argparse.Namespace) -> _Printed:
    found = runs.statuses()
    if not found:
        return f"There are no runs in {one_line(str(runs.folder), 300)}.", {"runs": []}
    rows: list[tuple[str, ...]] = [("RUN", "STATE", "STEP", "LOSS", "CHECKPOINT", "MODEL", "SIZE")]
    rows += [_row(status) for status in found]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    waiting = sum(status.state == RunState.WAITING for status in found)
    if waiting and not runs.has_runner():
        lines.append(f"No runner: `runs start` executes the {waiting} that wait.")
    return "\n".join(lines), {"runs": [status.as_json() for status in found]}


def _row(status: RunStatus) -> tuple[str, ...]:
    return (
        _shown(status),
        f"{status.state}, stopping" if status.stopping else str(status.state),
        f"{status.step}/{status.steps or '?'}" if status.step or status.steps else "-",
        "-" if status.loss is None else f"{status.loss:.4f}",
        "-" if status.checkpoint_step is None else str(status.checkpoint_step),
        "yes" if status.has_model else "-",
        size_in_words(status.sizes.total),
    )


def _shown(run: Run | RunStatus) -> str:
    """Return the name of a run for people: it may hold a terminal's codes."""
    return one_line(run.name, 100)


def _show(runs: RunList, arguments: argparse.Namespace) -> _Printed:
    run = runs.run(arguments.name)
    status = RunStatus.of(run)
    log, settings, report = run.log_tail(_LOG_LINES), run.settings(), run.folder / run_folder.REPORT
    states = [state.step for state in run_states.states_of(run)]
    sizes = {name: size for name, size in asdict(status.sizes).items() if size}
    lines = [
        f"{status.name}: {status.state}. {status.sentence}",
        f"  folder       {status.folder}",
        *(f"  {name:<12} {size_in_words(size)}" for name, size in sizes.items()),
        *([f"  states       of the steps {', '.join(map(str, states))}"] if states else []),
        *(f"  --{name} {value}" for name, value in settings.items()),
        *(f"  {name:<16} {text}" for name, text in run.plan()),
        *(f"  | {line}" for line in log),
    ]
    lines = [one_line(line) for line in lines]  # names and logs may hold a terminal's codes
    details = {
        "settings": settings,
        "draft": run.draft(),
        "plan": run.plan(),
        "samples": [str(path.absolute()) for path in run.samples()],
        "report": str(report.absolute()) if report.is_file() else None,
        "log": log,
        "states": states,
    }
    return "\n".join(lines), {"run": {**status.as_json(), **details}}


def _start(runs: RunList, arguments: argparse.Namespace) -> _Printed:
    settings, added = _given(arguments), []
    if settings or arguments.new_name:
        added = [runs.new(settings, name=arguments.new_name)]
    waiting = sum(status.state == RunState.WAITING for status in runs.statuses())
    if waiting:
        runs.start()
    text = f"{waiting} wait and are executed one after another." if waiting else "No run waits."
    names = [run.name for run in added]
    return "".join(f"{name} was added. " for name in names) + text, {"added": names}


def _stop(runs: RunList, arguments: argparse.Namespace) -> _Printed:
    lines, stopped = [], []
    for run in [runs.run(name) for name in arguments.names]:
        result = stop_run.stop(run)
        lines.append(f"{_shown(run)}: {result.sentence}")
        stopped.append({"name": run.name, **asdict(result), "sentence": result.sentence})
    return "\n".join(lines), {"stopped": stopped}


def _continue(runs: RunList, arguments: argparse.Namespace) -> _Printed:
    run = runs.run(arguments.name)
    run_list.go_on(run, _given(arguments))
    step = run.checkpoint_step()
    runs.start()
    how = "from its first step, as it has no checkpoint"
    if step is not None:
        how = f"from its checkpoint of step {step}"
    return f"{_shown(run)} goes on {how}.", {"name": run.name, "checkpoint_step": step}


def _again(runs: RunList, arguments: argparse.Namespace) -> _Printed:
    old = runs.run(arguments.name)
    run = runs.again(old, _given(arguments), name=arguments.new_name)
    runs.start()
    return f"{run.name} was added, as {_shown(old)}.", {"added": [run.name]}


def _keep(runs: RunList, arguments: argparse.Namespace) -> _Printed:
    run, step = runs.run(arguments.name), arguments.step
    with libraries.importing():
        from dreambooth.job import chosen_state
    chosen_state.keep(run, step)
    text = f"The model of {_shown(run)} is that of step {step} now."
    return text, {"name": run.name, "model_step": step}


def _delete(runs: RunList, arguments: argparse.Namespace) -> _Printed:
    chosen = [runs.run(name) for name in dict.fromkeys(arguments.names)]
    for run in chosen:
        if run.is_running:
            raise UserError(f"The run {run.name} is running: stop it first.")
    size = size_in_words(sum(run.sizes().total for run in chosen))
    names = ", ".join(map(_shown, chosen))
    if not arguments.yes and not _agrees(f"Delete {names}? This frees {size}. [y/N] "):
        return "Nothing was deleted.", {"deleted": [], "freed_bytes": 0}
    freed = sum(runs.delete(run) for run in chosen)
    text = f"{names}: deleted, {size_in_words(freed)} freed."
    return text, {"deleted": [run.name for run in chosen], "freed_bytes": freed}


def _agrees(question: str) -> bool:
    if not sys.stdin.isatty():
        raise UserError(f"{question.partition('?')[0]} needs --yes where nobody can be asked.")
    print(question, end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the training options that were given, as they were given."""
    names: Mapping[str, Any] = vars(arguments)
    given = {knob.name: names[knob.name] for knob in _SETTINGS if knob.name in names}
    return {name: True if value is BARE_FLAG else value for name, value in given.items()}


_ACTIONS: Final = {
    "list": _list,
    "show": _show,
    "start": _start,
    "stop": _stop,
    "continue": _continue,
    "delete": _delete,
    "again": _again,
    "keep": _keep,
}
