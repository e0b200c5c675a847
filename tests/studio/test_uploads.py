from __future__ import annotations

import asyncio
import io
import json
import os
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import pytest
from PIL import Image
from starlette.applications import Starlette

from dreambooth.limits import LIMITS
from dreambooth.runs import run_list
from dreambooth.runs.run_folder import Run
from dreambooth.runs.run_list import RunList
from dreambooth.studio import heic, routes, uploads
from dreambooth.studio.access import Access
from dreambooth.tiny import DATA
from tests.studio.asgi import Reply, send
from tests.studio.needed import needed

CAT = (DATA / "cat" / "riobugger_00.png").read_bytes()


@pytest.fixture
def runs(tmp_path: Path) -> RunList:
    return RunList(tmp_path / "runs")


@pytest.fixture
def draft(runs: RunList) -> Run:
    return runs.new_draft({})


def app(runs: RunList, **limits: int) -> Access:
    return Access(Starlette(routes=routes.routes(runs, limits=replace(LIMITS, **limits))))


def upload(runs: RunList, name: str, *chunks: bytes, **limits: int) -> Reply:
    return send(app(runs, **limits), "POST", f"/runs/0001/pictures?name={quote(name)}", body=chunks)


def picture(size: tuple[int, int], format: str = "PNG", colour: int = 7) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", size, colour).save(buffer, format)
    return buffer.getvalue()


def held(draft: Run) -> list[str]:
    return sorted(os.listdir(draft.folder / "pictures"))


def test_a_picture_is_taken_in_pieces(runs: RunList, draft: Run) -> None:
    reply = upload(runs, "my cat.PNG", CAT[:5], b"", CAT[5:])
    assert (reply.status, reply.json) == (200, {"name": "my-cat.png"})
    assert held(draft) == ["my-cat.png"]
    assert (draft.folder / "pictures" / "my-cat.png").read_bytes() == CAT


@pytest.mark.parametrize(
    ("sent", "stored"),
    [
        ("../../etc/passwd.png", "passwd.png"),
        ("..", "picture.png"),
        ("", "picture.png"),
        ("/", "picture.png"),
        ("C:\\Users\\me\\cat.jpeg", "cat.png"),
        ("<img src=x onerror=alert(1)>.png", "img-src-x-onerror-alert-1.png"),
        (".hidden", "hidden.png"),
        ("dataset_info.json", "dataset-info.png"),
        ("cat\0\n\x1b[31m.png", "cat-31m.png"),
        ("ka\u0308tzchen.png", "k\u00e4tzchen.png"),
        ("x" * 500 + ".png", "x" * 60 + ".png"),
        ("\u202egnp.exe", "gnp.png"),
    ],
)
def test_a_name_is_never_a_path(runs: RunList, draft: Run, sent: str, stored: str) -> None:
    before = {path for path in runs.folder.parent.rglob("*") if "pictures" not in path.parts}
    assert upload(runs, sent, CAT).json == {"name": stored}
    assert held(draft) == [stored]
    assert before == {
        path for path in runs.folder.parent.rglob("*") if "pictures" not in path.parts
    }


def test_the_same_picture_is_stored_once_and_another_one_of_its_name_beside_it(
    runs: RunList, draft: Run
) -> None:
    for content in (CAT, CAT, picture((64, 64)), picture((64, 64), "JPEG")):
        assert upload(runs, "cat.png", content).status == 200
    assert held(draft) == ["cat-2.png", "cat.jpg", "cat.png"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("notes.png", b"these are my notes", "notes.png holds no known picture format"),
        ("cat.png", b"", "cat.png is empty"),
        ("cat.png", CAT[:100], "cat.png is damaged"),
        ("IMG_1.HEIC", b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + b"\0" * 90, "Most Compatible"),
        ("<b>.svg", b"<svg onload='alert(1)'/>", "<b>.svg holds no known picture format"),
    ],
)
def test_what_is_no_picture_gets_a_sentence_and_leaves_nothing(
    runs: RunList, draft: Run, name: str, content: bytes, sentence: str
) -> None:
    reply = upload(runs, name, content)
    assert reply.status == 422
    assert reply.headers["content-type"] == "application/json"
    assert sentence in reply.json["error"]
    assert str(draft.folder) not in reply.json["error"]
    assert held(draft) == []


def test_an_iphones_picture_becomes_a_png(runs: RunList, draft: Run) -> None:
    pillow_heif = needed("pillow_heif")
    image = Image.new("RGB", (96, 64), (200, 30, 30))
    buffer = io.BytesIO()
    pillow_heif.from_pillow(image).save(buffer)
    assert upload(runs, "IMG_1.HEIC", buffer.getvalue()).json == {"name": "IMG-1.png"}
    assert upload(runs, "IMG_2.HEIC", buffer.getvalue()).json == {"name": "IMG-1.png"}
    with Image.open(draft.folder / "pictures" / "IMG-1.png") as stored:
        assert (stored.format, stored.size) == ("PNG", (96, 64))
        assert all(
            abs(a - b) < 8 for a, b in zip(stored.getpixel((9, 9)), (200, 30, 30), strict=True)
        )
    for content in (buffer.getvalue()[:300], buffer.getvalue()[:60] + b"x" * 500):
        assert "Most Compatible" in upload(runs, "x.heic", content).json["error"]
    assert (
        "Most Compatible"
        in upload(runs, "x.heic", buffer.getvalue(), max_image_pixels=95 * 64).json["error"]
    )
    assert held(draft) == ["IMG-1.png"]


def test_without_the_library_heic_gets_a_sentence(
    runs: RunList, draft: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heic.importlib.util, "find_spec", lambda name: None)
    content = b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + b"\0" * 90
    assert "Most Compatible" in upload(runs, "IMG_1.HEIC", content).json["error"]
    assert held(draft) == []


def test_caps_hold_on_bytes_pixels_and_pictures(runs: RunList, draft: Run) -> None:
    reply = upload(runs, "big.png", *[CAT] * 10, max_image_file_bytes=len(CAT) + 5)
    assert "big.png has more than" in reply.json["error"]
    reply = upload(runs, "wide.png", picture((200, 200)), max_image_pixels=100 * 100)
    assert "wide.png is 200 x 200, more than" in reply.json["error"]
    assert held(draft) == []
    statuses = [
        upload(runs, "c.png", picture((9, 9), colour=i), max_uploaded_pictures=3).status
        for i in range(5)
    ]
    assert statuses == [200, 200, 200, 422, 422]
    assert len(held(draft)) == 3


def test_a_stream_is_cut_at_the_cap_and_not_read_to_its_end(runs: RunList, draft: Run) -> None:
    read = 0

    async def endless() -> object:
        nonlocal read
        while True:
            read += 1
            yield b"x" * 1_000

    with pytest.raises(uploads.UserError, match="has more than"):
        asyncio.run(
            uploads.add(draft, "x", endless(), limits=replace(LIMITS, max_image_file_bytes=9_500))
        )
    assert read == 10
    assert held(draft) == []


def test_a_folders_pictures_are_copied_as_uploads_are(runs: RunList, draft: Run) -> None:
    folder = runs.folder / "theirs"
    (folder / "class_data_dir").mkdir(parents=True)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "notes.png").write_text("no picture")
    for number, name in enumerate(("b.JPEG", "a.png", "c.jpg")):
        (folder / name).write_bytes(picture((9, 9), "JPEG", colour=90 * number))
    uploads.copy_from(draft, folder)
    assert held(draft) == ["a.jpg", "b.jpg", "c.jpg"]
    uploads.copy_from(draft, folder / "none")
    other = runs.new_draft({})
    uploads.copy_from(other, folder, limits=replace(LIMITS, max_uploaded_pictures=2))
    assert held(other) == ["a.jpg", "b.jpg"]


def test_only_drafts_take_and_lose_pictures(runs: RunList, draft: Run) -> None:
    upload(runs, "cat.png", CAT)
    run_list.submit(draft, {"train": str(draft.folder / "pictures")})
    assert "is no draft any more" in upload(runs, "dog.png", CAT).json["error"]
    with pytest.raises(uploads.UserError, match="no draft"):
        uploads.remove(draft, "cat.png")
    assert held(draft) == ["cat.png"]


def test_pictures_are_found_by_name_alone(runs: RunList, draft: Run) -> None:
    upload(runs, "cat.png", CAT)
    (draft.folder / "pictures" / ".hidden.png").write_bytes(CAT)
    for name in ("../draft.json", "..", ".hidden.png", "dog.png", "CAT.PNG"):
        with pytest.raises(uploads.UserError, match="There is no picture"):
            uploads.remove(draft, name)
        reply = send(app(runs), "GET", f"/runs/0001/pictures/{quote(name, safe='')}?side=64")
        assert reply.status == 404
    uploads.remove(draft, "cat.png")
    assert uploads.pictures(draft) == []
    for name in ("..", "%2e%2e", "0002", "..%2f0001"):
        assert send(app(runs), "GET", f"/runs/{name}/loss.svg").status == 404
        reply = send(app(runs), "POST", f"/runs/{name}/pictures?name=x.png", body=[CAT])
        assert reply.status in (404, 405, 422)


def test_pictures_are_shown_as_training_sees_them(runs: RunList, draft: Run) -> None:
    buffer = io.BytesIO()
    image = Image.new("RGB", (300, 100), (0, 0, 255))
    image.paste((255, 0, 0), (100, 0, 200, 100))
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    image.save(buffer, "JPEG", exif=exif, quality=95)
    upload(runs, "a.jpg", buffer.getvalue())
    reply = send(app(runs), "GET", "/runs/0001/pictures/a.jpg?side=64")
    assert reply.headers["content-type"] == "image/png"
    with Image.open(io.BytesIO(reply.body)) as shown:
        assert shown.size == (64, 64)
        red, green, blue = shown.getpixel((32, 32))
        assert (red > 240, green < 15, blue < 15) == (True, True, True)
        assert "exif" not in shown.info
    for side in ("", "0", "15", "4096", "-64", "64.5", "\u0663\u0662", "9" * 50):
        target = f"/runs/0001/pictures/a.jpg?side={quote(side)}"
        assert send(app(runs), "GET", target).status == 404


def test_the_curve_and_the_report_can_do_nothing(runs: RunList, draft: Run) -> None:
    (draft.folder / "report.html").write_text("<script>alert(1)</script>")
    row = {"step": 1, "loss": 1, "instance_loss": 1, "class_loss": None, "learning_rate": 1}
    row |= {"grad_norm": 1, "meter": {"loss_1": 0.5, "drift_class": 0.25, "guidance": 1.5}}
    (draft.folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert send(app(runs), "GET", "/runs/0001/meter-3.svg").status == 404
    for name in ("loss.svg", "meter-0.svg", "meter-1.svg", "meter-2.svg", "report.html"):
        reply = send(app(runs), "GET", f"/runs/0001/{name}")
        assert reply.status == 200
        assert reply.headers["content-security-policy"].startswith("default-src 'none';")
        assert "script-src" not in reply.headers["content-security-policy"]


def test_the_pictures_that_a_run_has_drawn_are_sent_and_nothing_else(
    runs: RunList, draft: Run
) -> None:
    for folder, name in (("samples", "step-000020.png"), ("meter", "step-000020-subject.png")):
        (draft.folder / folder).mkdir()
        (draft.folder / folder / name).write_bytes(CAT)
        (draft.folder / folder / "notes.txt").write_text("notes")
        assert send(app(runs), "GET", f"/runs/0001/{folder}/{name}").body == CAT
        for other in ("notes.txt", "step-000040.png", "..%2fdraft.json"):
            assert send(app(runs), "GET", f"/runs/0001/{folder}/{other}").status == 404
