from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.serving_load import full_size_calls, full_size_pictures, full_size_run
from benchmarks.serving_load.full_size_calls import EAGER, ROWS, WAYS, CallFigure
from benchmarks.serving_load.full_size_pictures import Effort, FullSize, GpuMemory, WayFigures
from benchmarks.serving_load.redrawing import Agreement
from dreambooth.diffusion import model as models

EFFORT = Effort(calls=1, steps=20, alone=1, burst=1, redrawn=1, batch_rows=2, warm_up_budget_s=0.0)
GIB = 2**30


def figures(way: str, *, graphs: int = 0, bytes_differing: int = 0) -> WayFigures:
    return WayFigures(
        way=way,
        calls=[CallFigure(rows=rows, ms=rows + 0.125, largest_difference=0.0) for rows in ROWS],
        picture_s=0.5,
        alone_per_s=2.0,
        burst_per_s=5.0,
        rows=16,
        exact=Agreement(
            pictures=40, bytes_differing=bytes_differing, largest_difference=1, not_exact=0
        ),
        graphs=graphs,
        peak=GpuMemory(allocated=3 * GIB, reserved=4 * GIB, in_use=5 * GIB),
    )


def full_size(*ways: WayFigures) -> FullSize:
    return FullSize(dtype="bfloat16", pixels=512, peer_picture_s=1.0, ways=list(ways))


@pytest.mark.on_demand
def test_without_a_gpu_one_run_measures_what_a_cpu_has_and_ends_in_one_json_line(
    small_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--full_size", "--quick", "--model", str(small_model_folder)]
    assert main(["serving", *options]) == 0
    *table, line = capsys.readouterr().out.splitlines()
    summary = json.loads(line)
    assert [each["way"] for each in summary["ways"]] == ["eager", "channels_last"]
    for each in summary["ways"]:
        assert [call["rows"] for call in each["calls"]] == [1, 2, 4, 8]
        assert all(call["ms"] > 0 and call["largest_difference"] < 1e-4 for call in each["calls"])
        assert each["picture_s"] > 0
        assert each["alone_per_s"] > 0
        assert each["burst_per_s"] > 0
        assert each["exact"]["bytes_differing"] == each["exact"]["not_exact"] == 0
        assert each["peak"] is None
    assert {call["largest_difference"] for call in summary["ways"][0]["calls"]} == {0.0}
    assert summary["peer_picture_s"] > 0
    assert {"device", "driver", "torch", "cuda", "commit", "date", "diffusers"} <= set(summary)
    for way in ("graphs", "channels_last+graphs"):
        (row,) = (row for row in table if row.startswith(f"{way} "))
        assert row.split(maxsplit=1)[1] == "not on a CPU"


def test_a_gpus_figures_are_all_in_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    ways = [figures(way.name, graphs=18 if way.cuda_graphs else 0) for way in WAYS]
    full_size_run.show(full_size(*ways), EFFORT, {"device": "a GPU", "driver": "1.2"})
    shown = capsys.readouterr().out
    assert shown.startswith("device a GPU, driver 1.2; bfloat16, 512 x 512 pixels\n")
    assert shown.count("8.12 (0)") == 4
    row = shown.split("\nchannels_last+graphs ")[-1].splitlines()[0]
    assert " ".join(row.split()) == "0.500 2.00 2.00 5.00 2.50 16 0 in 40 18 3.00/4.00/5.00"
    assert "not on a CPU" not in shown


@pytest.mark.parametrize(
    ("ways", "code"),
    [
        ([figures("eager"), figures("graphs", graphs=16)], 0),
        ([figures("eager"), figures("graphs", graphs=16, bytes_differing=1)], 1),
        ([figures("eager"), figures("graphs", graphs=0)], 1),
    ],
    ids=["well", "an exact picture changed", "graphs were given up"],
)
def test_what_went_wrong_is_exit_1(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ways: list[WayFigures],
    code: int,
) -> None:
    monkeypatch.setattr(full_size_pictures, "measure", lambda *_, **__: full_size(*ways))
    assert main(["serving", "--full-size", "--quick"]) == code
    shown = capsys.readouterr().out
    assert ("given up" in shown) == (ways[1].graphs == 0)


def test_an_output_that_differs_is_measured_on_inputs_that_were_not_timed(
    small_model_folder: Path,
) -> None:
    model = models.load(small_model_folder, device=torch.device("cpu"))
    eager = full_size_calls.outputs(model)
    first, second = (full_size_calls.inputs(model, 2, seed=seed) for seed in (0, 1))
    assert not torch.equal(first[0], second[0])
    shifted = {rows: output + 0.5 for rows, output in eager.items()}
    for reference, difference in ((eager, 0.0), (shifted, 0.5)):
        found = full_size_calls.time_calls(model, reference, calls=1)
        for each in found:
            assert each.largest_difference == pytest.approx(difference, abs=1e-6)


def test_plain_calls_come_first_and_the_layout_changes_once() -> None:
    assert WAYS[0] is EAGER
    assert [way.channels_last for way in WAYS] == sorted(way.channels_last for way in WAYS)
