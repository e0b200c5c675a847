from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from starlette.applications import Starlette

from dreambooth.errors import HyperparameterError, UserError
from dreambooth.runs.run_list import RunList
from dreambooth.studio import routes
from dreambooth.studio.drawings import FOLDER, Drawing, Drawings
from dreambooth.tiny import WEIGHTS
from tests.studio.asgi import send

FORM = {
    **{"model": "base tiny", "prompt": "a photo of a cat", "num_inference_steps": "2"},
    **{"count": "2", "seed": "7", "negative_prompt": "", "guidance_scale": " 3.5 "},
}
LONG_S = 300  # only guards against a hang


@pytest.fixture
def drawings(tmp_path: Path) -> Drawings:
    return Drawings(RunList(tmp_path), None)


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_pictures_are_drawn_and_keep_their_settings(drawings: Drawings) -> None:
    drawing = drawings.draw(FORM)
    assert drawing.request() == {
        **{"model": "base tiny", "prompt": "a photo of a cat", "num_inference_steps": "2"},
        **{"count": "2", "seed": "7", "guidance_scale": "3.5"},
    }
    assert drawing.is_drawing
    with pytest.raises(UserError, match="cancel it first"):
        drawing.delete()
    wait_until(lambda: not drawing.is_drawing)
    assert drawing.sentence == "2 were drawn."
    with Image.open(drawing.pictures()[1]) as image:
        assert image.text["seed"] == "8"
        assert image.text["prompt"] == "a photo of a cat"
    app = Starlette(routes=routes.routes(drawings.runs))
    for name, status in (
        (drawing.pictures()[0].name, 200),
        ("grid.png", 404),
        ("request.json", 404),
        ("..%2frequest.json", 404),
    ):
        assert send(app, "GET", f"/drawings/0001/{name}").status == status
    for name in ("0002", "..", "%2e", "form.json"):
        assert send(app, "GET", f"/drawings/{name}/x.png").status == 404
    drawing.delete()
    assert drawings.all() == []


def test_requests_wait_for_each_other(drawings: Drawings) -> None:
    first = drawings.draw({**FORM, "count": "64", "num_inference_steps": "999"})
    second, third = drawings.draw(FORM), drawings.draw({**FORM, "count": "1"})
    assert [one.is_waiting for one in (first, second, third)] == [False, True, True]
    assert third.sentence == "It waits for the others."
    with pytest.raises(UserError, match="cancel it first"):
        third.delete()
    second.cancel()
    assert not second.is_waiting
    assert second.sentence == "It was cancelled; 0 of 2 were drawn."
    first.cancel()
    wait_until(lambda: third.pictures())  # without any page that looks
    assert second.pictures() == []
    drawings.draw({**FORM, "count": "64", "num_inference_steps": "999"})
    for number in range(20):
        shutil.copytree(second.folder, drawings.folder / f"{100 + number}")
        (drawings.folder / f"{100 + number}" / "stopped").unlink()
    with pytest.raises(UserError, match="20 requests wait already"):
        drawings.draw(FORM)
    for drawing in drawings.all():
        drawing.cancel()
    wait_until(lambda: not any(drawing.is_drawing for drawing in drawings.all()))


def test_base_and_model_draw_the_same_prompts_from_the_same_seed(drawings: Drawings) -> None:
    run = drawings.runs.new_draft({}, name="cat")
    with pytest.raises(UserError, match="does not name the base model"):
        drawings.compare(run, ["a cat"], {})
    run.write_settings({"train": "pictures", "pretrained_model": "tiny"})
    shutil.copytree(WEIGHTS, run.folder / "model")
    prompts, settings = ["--a photo of a cat", "a dog"], {"seed": "5", "num_inference_steps": "2"}
    for wrong in ({"seed": "x"}, {"num_inference_steps": "0"}):
        with pytest.raises(UserError):
            drawings.compare(run, prompts, {**settings, **wrong})
    assert drawings.comparison(run) == []
    drawings.compare(run, prompts, settings)
    base, tuned = drawings.comparison(run)
    assert (base.request()["model"], tuned.request()["model"]) == (
        *("base of run 0001-cat", "run 0001-cat"),
    )
    with pytest.raises(UserError, match="cancel it first"):
        drawings.compare(run, prompts, settings)
    wait_until(lambda: len(tuned.pictures()) == 2 and not tuned.is_drawing)
    assert base.sentence == "2 were drawn."
    assert base.prompts() == prompts
    for number, (ours, theirs) in enumerate(zip(base.pictures(), tuned.pictures(), strict=True)):
        assert ours.name == theirs.name
        with Image.open(ours) as image, Image.open(theirs) as other:
            assert image.text["prompt"] == prompts[number]
            assert image.tobytes() == other.tobytes()  # of the same weights
    drawings.compare(run, prompts[:1], settings)
    assert [one.prompts() for one in drawings.comparison(run)] == [prompts[:1]] * 2
    for one in drawings.comparison(run):
        one.cancel()
    wait_until(lambda: not any(one.is_drawing for one in drawings.all()))


def test_cancelled_pictures_stop(drawings: Drawings) -> None:
    drawing = drawings.draw({**FORM, "count": "64", "num_inference_steps": "999"})
    drawing.cancel()
    wait_until(lambda: not drawing.is_drawing)
    assert drawing.sentence.startswith("It was cancelled; 0 of 64")


def test_a_fault_of_the_model_is_said(drawings: Drawings) -> None:
    drawing = Drawings(drawings.runs, "/nowhere").draw({**FORM, "model": "base /nowhere"})
    wait_until(lambda: not drawing.is_drawing)
    assert drawing.sentence.startswith("There is no model at /nowhere")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": ""}, "Choose a model"),
        ({"model": "run 0001"}, "Choose a model"),
        ({"model": "base /etc"}, "Choose a model"),
        ({"prompt": " "}, "--prompt is missing"),
        ({"seed": "-1"}, "--seed must be"),
        ({"width": "100"}, "--width must be"),
        ({"count": "65"}, "At most 64"),
        ({"prompt": "x" * 5_000}, "has 5000 characters"),
    ],
)
def test_wrong_requests_start_nothing(
    drawings: Drawings, changes: dict[str, str], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        drawings.draw({**FORM, **changes})
    assert drawings.all() == []


def test_all_faults_of_a_request_are_named(drawings: Drawings) -> None:
    with pytest.raises(HyperparameterError) as caught:
        drawings.draw({**FORM, "seed": "x", "width": "x"})
    assert len(caught.value.faults) == 2


def test_the_form_lies_on_the_disk_and_no_run_is_made_of_it(drawings: Drawings) -> None:
    assert drawings.form() == {}
    drawings.save_form({**FORM, "strange": "x"})
    assert drawings.form() == FORM
    assert drawings.runs.runs() == []
    for content in ("", "[]", '{"prompt": 3}', "{" * 100_000):
        (drawings.folder / "form.json").write_text(content)
        assert drawings.form() == {}


def test_models_are_those_of_runs_and_the_bases(tmp_path: Path) -> None:
    runs = RunList(tmp_path)
    run = runs.new_draft({}, name="cat")
    found = Drawings(runs, "/models/sd")
    assert [*found.models()] == ["base /models/sd", "base tiny"]
    (run.folder / "model").mkdir()
    (run.folder / "model" / "model_index.json").write_text("{}")
    assert found.models()["run 0001-cat"] == "run 0001-cat"


def test_a_process_that_was_killed_with_its_page_is_not_drawing(tmp_path: Path) -> None:
    folder = tmp_path / FOLDER / "0003"
    folder.mkdir(parents=True)
    (folder / "process.json").write_text('{"pid": 1, "start_time": "0", "boot_id": "x"}')
    assert not Drawing(folder).is_drawing
    assert Drawing(folder).sentence == "0 were drawn."
