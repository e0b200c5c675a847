from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import provenance, train
from benchmarks.__main__ import main
from benchmarks.train_step import (
    counted_step,
    full_size,
    levers,
    ours,
    peer,
    processes,
    scaling,
    table,
    work,
)
from benchmarks.train_step import transforms_stand_in as transforms
from benchmarks.train_step.counted_step import Operation, StepCount
from benchmarks.train_step.figures import StepTimes, step_times
from benchmarks.train_step.ours import RunFigures, RunOutcome, RunScale, Setting, Subject
from benchmarks.train_step.phases import Phase
from benchmarks.train_step.processes import Line, Memory
from benchmarks.train_step.result import Row, TrainResult
from dreambooth import tiny
from dreambooth.settings.hyperparameters import MEMORY_PLANS
from dreambooth.training.device import CPU, DeviceFacts

# A script with the peer's options and progress bar that does not train.
PEER = """
import argparse, pathlib, sys, time
from PIL import Image
parser = argparse.ArgumentParser()
for name in ("pretrained_model_name_or_path", "instance_data_dir", "instance_prompt"):
    parser.add_argument("--" + name, required=True)
parser.add_argument("--output_dir", required=True)
parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"))
parser.add_argument("--with_prior_preservation", action="store_true")
for name in ("class_data_dir", "class_prompt"):
    parser.add_argument("--" + name)
for name in ("resolution", "train_batch_size", "max_train_steps", "num_class_images"):
    parser.add_argument("--" + name, type=int)
args = parser.parse_args()
assert (pathlib.Path(args.pretrained_model_name_or_path) / "model_index.json").is_file()
for folder, count in ((args.instance_data_dir, 8), (args.class_data_dir, args.num_class_images)):
    pictures = list(pathlib.Path(folder).iterdir())
    assert len(pictures) == count, pictures
    for path in pictures:
        Image.open(path).load()
assert args.with_prior_preservation and args.class_prompt == "a photo of a dog"
from torchvision import transforms
transforms.Compose([transforms.Resize(args.resolution)])
for step in range(args.max_train_steps + 1):
    bar = f"Steps:  {step}%|   | {step}/{args.max_train_steps} [00:00<?, ?it/s]"
    print("\\r" + bar, end="", file=sys.stderr, flush=True)
    time.sleep(0.05)
"""


FOUND = provenance.facts(torch.device("cpu"))


def script(folder: Path, text: str) -> Path:
    path = folder / "script.py"
    path.write_text(textwrap.dedent(text))
    return path


def test_a_run_is_measured_and_set_beside_a_peer(
    small_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subject = Subject(model=small_model_folder, photos=tiny.DATA / "dog1_8", device=CPU)
    scale = RunScale(steps=3, warm_up=1, class_images=2)
    setting = Setting(with_prior_preservation=True, memory_plan="fp32_adamw")
    place = tmp_path / "place"
    place.mkdir()
    result = train.measure(subject, [setting], scale, place, script=script(tmp_path, PEER))
    assert list(place.iterdir()) == []
    (row,) = result.rows
    figures, theirs = row.outcome.figures, row.peer and row.peer.figures
    assert figures is not None, row.outcome.fault
    assert theirs is not None, row.peer
    assert 40 < theirs.times.median_ms < 1000
    assert 0 < figures.times.p10_ms <= figures.times.median_ms <= figures.times.p90_ms
    assert 0 < figures.times.median_ms < 1000 * figures.first_step_s < 1000 * figures.run_s
    assert row.flops == 2 * work.count_flops(small_model_folder, 1) > 0
    assert figures.class_image_s is not None
    assert 0 < 2 * figures.class_image_s <= figures.run_s - figures.without_class_images_s
    assert 0 < figures.export_s < figures.run_s
    assert figures.memory is not None
    assert 2**27 < figures.memory.resident < 2**33
    assert figures.memory.allocated is None

    table.show(result)
    text = capsys.readouterr().out
    assert "  ratio" in text
    assert ("stand-in" in text) == result.stand_in == peer.needs_stand_in()
    document = json.loads(
        json.dumps(train.summary(result, subject, scale, scale, model="small", found=FOUND))
    )
    assert (document["device"], document["commit"]) == ("cpu", FOUND["commit"])
    (plain,) = document["settings"]
    assert plain["faults"] == []
    assert plain["ratio"] == pytest.approx(theirs.times.median_ms / figures.times.median_ms)
    assert plain["share_of_floor"] == pytest.approx(row.floor_ms / figures.times.median_ms)
    assert plain["tflop_per_s"] == pytest.approx(row.flops / figures.times.median_ms / 1e9)
    assert plain["pictures_per_s"] == pytest.approx(2000 / figures.times.mean_ms)


def test_what_failed_and_the_memory_of_a_gpu_stand_in_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gib = 2**30
    figures = RunFigures(
        times=StepTimes(median_ms=25.0, p10_ms=24.0, p90_ms=26.0, mean_ms=50.0),
        memory=Memory(
            resident=gib,
            allocated=12 * gib,
            reserved=13 * gib,
            process=14 * gib,
            phases={"training": Phase(seconds=9.0, times=1, allocated=11 * gib)},
        ),
        expected_bytes=10 * gib,
        first_step_s=9.0,
        class_image_s=None,
        export_s=2.0,
        run_s=30.0,
        without_class_images_s=30.0,
    )
    rows = tuple(
        Row(
            outcome=RunOutcome(
                setting=Setting(with_prior_preservation=False, memory_plan=plan),
                figures=made,
                fault=fault,
                class_images=tmp_path,
            ),
            flops=10**12,
            floor_ms=12.5,
            peer=None,
        )
        for plan, made, fault in (
            ("8bit_adamw", figures, None),
            ("fp32_adamw", None, "exit 1: no room"),
        )
    )
    peak = work.peak(DeviceFacts(kind="cuda", name="Tesla T4"))
    table.show(TrainResult(rows=rows, peak=peak, stand_in=False))
    lines = capsys.readouterr().out.splitlines()
    for shown in (
        "25.0",
        "24.0-26.0",
        " 20.00 ",
        " 40 ",
        " 50.0% ",
        " 12.00/13.00/14.00 ",
        " 110.0% ",
    ):
        assert shown in lines[1]
    assert lines[2].split(maxsplit=2) == ["plain", "fp32_adamw", "exit 1: no room"]


def test_a_peer_that_is_not_there_is_reported_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--peer", str(tmp_path / "none.py")]) == 1
    assert "none.py: give --peer a train_dreambooth.py" in capsys.readouterr().err


@pytest.mark.on_demand
def test_the_whole_command_runs_as_users_call_it(
    small_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--quick", "--steps", "2", "--model", str(small_model_folder)]
    assert main(["train", *options]) == 0
    *shown, line = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("device cpu, ")
    document = json.loads(line)
    assert {"driver", "torch", "cuda", "commit", "date", "diffusers"} <= set(document)
    plain, prior, whole = document["settings"]
    rows = [next(row for row in shown if row.startswith(name)) for name in ROWS]
    for row, each in zip(rows, (plain, prior, whole), strict=True):
        assert each["faults"] == []
        assert f"{each['times']['median_ms']:.1f}" in row
        assert each["memory_plan"] == "fp32_adamw"
        assert each["of_expected"] is None  # torch has no peak for a CPU's memory
        assert each["expected_bytes"] > 0
    assert whole["whole_job"]
    assert not prior["whole_job"]
    phases = whole["memory"]["phases"]
    for name in ("class images", "training", "sample pictures", "export", "fid_score"):
        assert phases[name]["seconds"] > 0
        assert any(row.startswith(name) for row in shown)
    # Of 3 steps, each followed by a checkpoint and a picture.
    assert (phases["checkpoints"]["times"], phases["sample pictures"]["times"]) == (3, 3)
    assert whole["checkpoint_s"] == pytest.approx(phases["checkpoints"]["seconds"] / 3)
    assert 0 < whole["ready_s"] < 600
    assert sum(phase["seconds"] for phase in phases.values()) < whole["run_s"]
    told = f"{whole['run_s']:.1f} s from start to end, a checkpoint {whole['checkpoint_s']:.2f} s"
    assert any(f"{told}, server ready after {whole['ready_s']:.2f} s" in row for row in shown)


ROWS = ("plain fp32_adamw ", "prior fp32_adamw ", "prior job auto ")


def test_levers_are_printed_with_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--levers"]) == 0
    *shown, line = capsys.readouterr().out.splitlines()
    assert shown[2].split() == ["lever", "predicted", "measured", "where"]
    for each in json.loads(line)["levers"]:
        assert each["measured"].startswith(("CPU 2026-", levers.NOT_MEASURED))
        assert any(row.startswith(each["lever"][:30].rsplit(" ", 1)[0]) for row in shown)


def test_compiling_is_back_after_so_many_steps() -> None:
    assert levers.compile_break_even() == (17_000, 120_000)


def test_one_step_has_no_spread(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--steps", "1"])
    assert "at least 2 steps" in capsys.readouterr().err


def test_a_cpu_is_offered_one_plan_and_a_gpu_all() -> None:
    card = DeviceFacts(kind="cuda", name="a card", compute_capability=(8, 0))
    assert [s.memory_plan for s in ours.settings(CPU, quick=False)] == ["fp32_adamw"] * 2
    settings = list(ours.settings(card, quick=False))
    assert len([s for s in settings if not s.fast_step]) == 2 * len(MEMORY_PLANS)
    fast = ["fp32_adamw"] * 2 + ["8bit_adamw"] * 2
    assert [s.memory_plan for s in settings if s.fast_step] == fast
    assert [s.pictures for s in ours.settings(card, quick=True)] == [1, 2]


def test_steps_are_timed_after_the_warm_up() -> None:
    times = step_times([9.0, 10.0, 10.1, 10.2, 10.5], warm_up=2)
    assert times.median_ms == pytest.approx(100)
    assert times.mean_ms == pytest.approx(500 / 3)
    assert 99 < times.p10_ms < times.p90_ms < 300
    own = step_times([9.0, 10.0, 10.1, 10.2], warm_up=2, milliseconds=[900, 800, 90, 80])
    assert (own.median_ms, own.mean_ms) == (85, pytest.approx(100))


def test_a_bar_tells_when_each_step_ended() -> None:
    texts = {
        1.0: "Loading weights: 100%|##| 4/4 [00:00<00:00]",
        2.0: "Steps:   0%|  | 0/4 [00:00<?, ?it/s]",
        3.0: "Steps:  25%|# | 1/4 [00:01<00:03,  1.0s/it]",
        3.1: "Steps:  25%|# | 1/4 [00:01<00:03,  1.0s/it, loss=0.1, lr=5e-6]",
        5.0: "Steps:  75%|# | 3/4 [00:03<00:01,  1.0s/it, loss=0.1, lr=5e-6]",
        6.0: "Steps: 100%|##| 4/4 [00:04<00:00,  1.0s/it, loss=0.1, lr=5e-6]",
        9.0: "Steps: 100%|##| 4/4 [00:07<00:00,  1.0s/it, loss=0.1, lr=5e-6]",
    }
    lines = [Line(seconds=at, text=text) for at, text in texts.items()]
    assert peer.step_ends(lines, 4) == [3.0, 4.0, 5.0, 6.0]
    assert peer.step_ends(lines, 5) == []


def test_a_line_is_timed_by_its_text_and_not_by_its_end(tmp_path: Path) -> None:
    said = """
        import sys, time
        print("\\rone", end="", flush=True)
        time.sleep(0.4)
        print("\\rtwo\\n", end="", file=sys.stderr, flush=True)
    """
    ended = processes.run(script(tmp_path, said), [], folder=tmp_path / "run")
    assert ended.fault() is None
    one, two = ended.lines
    assert (one.text, two.text) == ("one", "two")
    assert two.seconds - one.seconds > 0.35
    assert ended.memory is not None
    assert 2**22 < ended.memory.resident < 2**30


def test_a_script_that_fails_says_why_and_still_has_its_memory(tmp_path: Path) -> None:
    fails = script(tmp_path, "import sys\nprint(sys.argv[1])\nsys.exit('no room')")
    ended = processes.run(fails, ["word"], folder=tmp_path / "run")
    assert ended.fault() == "exit 1: no room"
    assert [line.text for line in ended.lines] == ["word", "no room"]
    assert ended.memory is not None


def test_the_work_of_the_full_size_is_what_was_counted_for_it() -> None:
    flops = work.unet_flops(full_size.UNET, pictures=1, side=64, tokens=77)
    assert flops == pytest.approx(2.409e12, rel=1e-3)


@pytest.mark.parametrize(
    ("plan", "mixed_precision", "expected"),
    [
        ("fp32_adamw", "bf16", 30),
        ("8bit_adamw", "fp16", 18),
        ("fp32_adamw", "no", 32),
    ],
)
def test_the_optimizer_moves_so_many_bytes(plan: str, mixed_precision: str, expected: int) -> None:
    assert work.optimizer_bytes(plan, mixed_precision) == expected


def test_a_known_card_has_its_table_and_another_device_is_measured() -> None:
    card = DeviceFacts(kind="cuda", name="Tesla T4", compute_capability=(7, 5))
    assert work.peak(card).flop_per_s == 65e12
    measured = work.peak(CPU)
    assert 1e8 < measured.flop_per_s < 1e14
    assert 1e8 < measured.bytes_per_s < 1e13


def test_the_stand_in_makes_of_a_picture_what_the_script_trains_on() -> None:
    picture = Image.new("RGB", (60, 40), (255, 0, 0))
    picture.paste((0, 0, 255), (0, 0, 10, 40))
    steps = [transforms.Resize(20), transforms.RandomCrop(16), transforms.ToTensor()]
    pixels = transforms.Compose([*steps, transforms.Normalize([0.5], [0.5])])(picture)
    assert pixels.shape == (3, 16, 16)
    assert pixels.dtype == torch.float32
    assert (float(pixels.min()), float(pixels.max())) == (-1, 1)
    assert transforms.Resize(20)(picture).size == (30, 20)
    centre = transforms.CenterCrop(20)(picture)
    assert centre.size == (20, 20)
    assert centre.getpixel((0, 0)) == (255, 0, 0)


def test_derived_figures_say_that_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each takes a second: one on a T4 at its sustained rate, one to move its bytes there.
    operations = (Operation(flops=int(30e12), bytes=1), Operation(flops=1, bytes=int(320e9)))
    monkeypatch.setattr(
        counted_step,
        "count",
        lambda device, **_: StepCount(
            memory_plan="", expected_bytes=0, peak_bytes=0, operations=operations, waits=("", "")
        ),
    )
    assert main(["train", "--derived"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("DERIVED, not measured")
    document = json.loads(said.splitlines()[-1])
    assert document["derived"] is True
    row = document["cards"][0]
    assert (row["card"], row["weights"], row["memory_plan"]) == ("T4", "autocast", "fp32_adamw")
    assert (row["launches"], row["waits"]) == (2, 2)
    assert row["step_s"] == pytest.approx(2)
    assert row["gpu_s"] == pytest.approx(30 / 65 + 1)


def test_an_all_reduce_takes_as_long_as_a_ring_and_more_processes_gain_less_each() -> None:
    assert scaling.ring_seconds(8e9, 1, 1e9) == 0
    assert scaling.ring_seconds(8e9, 2, 1e9) == 8
    assert scaling.ring_seconds(8e9, 8, 1e9) == 14
    rows = [
        scaling.Scaling(where="", processes=count, step_s=1, reduce_s=reduce_s)
        for count, reduce_s in ((1, 0.0), (2, 1.0))
    ]
    assert [(row.share, row.speed) for row in rows] == [(0, 1), (0.5, 1)]


@pytest.mark.on_demand
def test_the_share_of_communication_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--scaling", "--quick"]) == 0
    shown = capsys.readouterr().out
    rows = json.loads(shown.splitlines()[-1])["scaling"]
    assert [row["processes"] for row in rows] == [1, 2, 4, 8] * 6 + [1, 2]
    assert all(row["share"] == 0 if row["processes"] == 1 else row["share"] > 0 for row in rows)
    assert rows[-1]["where"] == "embedded model, gloo"
