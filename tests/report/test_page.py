"""report.html of small real jobs and of report data made by hand."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dreambooth.data import cache, dataset_info, images
from dreambooth.data.dataset_info import DatasetInfo
from dreambooth.job.run import run_job
from dreambooth.report import page as report_page
from dreambooth.report import pictures as report_pictures
from dreambooth.report.report_data import InstancePicture, MeterPicture, MetricsRow, ReportData
from dreambooth.settings.hyperparameters import KNOBS, Hyperparameters

pytestmark = pytest.mark.usefixtures("class_images_of_four_steps")
EVIL = "<script>alert(1)<"  # file names cannot contain a slash
PROMPT = 'a photo of <script>alert("x")</script> & riobugger cat'
SECTIONS = [
    *("Warnings", "What it draws", "Curves", "Instance images", "Class images"),
    *("Time and memory", "Plan", "Hyperparameters", "Versions"),
]


class Page(HTMLParser):
    """Parses a page as a browser does: tags with attributes, texts, and texts by enclosing tag."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append((self._open[-1] if self._open else "", data))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return "".join(data for tag, data in self.texts if tag != "style")

    def pictures(self, alt: str) -> list[Image.Image]:
        """Return the pictures whose alt text begins with `alt`."""
        found = []
        for attributes in self.of("img"):
            if (attributes["alt"] or "").startswith(alt):
                data = (attributes["src"] or "").partition(";base64,")[2]
                picture = Image.open(io.BytesIO(base64.b64decode(data)))
                stated = (int(attributes["width"] or 0), int(attributes["height"] or 0))
                assert picture.size == stated
                found.append(picture.convert("RGB"))
        return found


def assert_self_contained(html: str, page: Page) -> None:
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base"}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert not attributes.keys() & {"href", "action", "srcset", "background"}
        assert (attributes.get("src") or "data:image/").startswith("data:image/")
    assert not re.search(r"https?:|url\(|@import|javascript:", html, re.IGNORECASE)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a square picture, a wide one with an evil name, and one that EXIF turns upright."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    Image.fromarray(noise(generator, 32, 32)).save(folder / "square.png")
    Image.fromarray(noise(generator, 40, 100)).save(folder / f"{EVIL}.png")
    turned = Image.new("RGB", (96, 64), "red")
    # EXIF turns this left half into the upper half.
    turned.paste("blue", (0, 0, 48, 64))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(folder / "turned.jpg", exif=exif, quality=95)
    prompts = {"instance_prompt": PROMPT, "class_prompt": "a photo of cat"}
    (folder / "dataset_info.json").write_text(json.dumps(prompts))
    (folder / "notes.txt").write_text("no picture")
    return folder


def noise(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    return generator.integers(0, 255, (height, width, 3), dtype=np.uint8)


def train(model: Path, photos: Path, out: Path, *more: str) -> int:
    argv = ["--pretrained-model", str(model), "--train", str(photos), "--model_dir", str(out)]
    return run_job([*argv, *more], {})


OPTIONS = (
    *("--max_steps=24", "--learning_rate=0.0001", "--sample_steps=12", "--seed=3"),
    *("--with_prior_preservation", "--num_class_images=3"),
)


@pytest.fixture(scope="module")
def html(small_model_folder: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("run") / "model"
    assert train(small_model_folder, photos, out, *OPTIONS) == 0
    return (out.parent / "model-output" / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_the_page_needs_nothing_but_itself(html: str, page: Page) -> None:
    assert_self_contained(html, page)
    metas = {m.get("name") or m.get("http-equiv"): m.get("content") for m in page.of("meta")}
    assert metas["viewport"] == "width=device-width, initial-scale=1"
    assert (metas["Content-Security-Policy"] or "").startswith("default-src 'none'")


def test_prompts_and_file_names_are_text_only(page: Page) -> None:
    assert ("h1", PROMPT) in page.texts
    assert f"{EVIL}.png" in page.text
    assert PROMPT in [data for tag, data in page.texts if tag == "q"]
    assert any((image["alt"] or "").startswith(EVIL) for image in page.of("img"))


def test_all_sections_of_a_real_run_are_there(page: Page) -> None:
    titles = [data for tag, data in page.texts if tag == "h2" and data.strip()]
    assert titles == SECTIONS
    assert "notes.txt" in page.text  # it is named in a warning
    for phase in ("class images", "encoding", "training", "sample pictures", "export"):
        assert ("th", phase) in page.texts
    for name in ("seconds per step", "peak memory", "torch", "fingerprint of the data", "steps"):
        assert ("th", name) in page.texts
    for name in ("python", "pillow"):
        assert ("th", name) in page.texts
    charts = [svg["aria-label"] or "" for svg in page.of("svg") if svg.get("role") == "img"]
    assert [label.partition(" over")[0] for label in charts] == [
        *("Loss", "Gradient norm", "Learning rate"),
    ]
    assert "class loss" in charts[0]
    assert len(page.pictures("class_0000")) == 3
    assert len(page.pictures(f"{PROMPT}, step")) == 2
    assert len(page.pictures(PROMPT)) == 3  # two between steps and the final one


def test_settings_off_their_default_are_marked(html: str, page: Page) -> None:
    plain = html.replace("<wbr>", "")
    marked = set(re.findall(r'<tr class="changed"><th title="[^"]*">(\w+)</th>', plain))
    assert marked == {
        *("max_steps", "learning_rate", "sample_steps", "seed", "with_prior_preservation"),
        *("num_class_images", "pretrained_model"),
    }
    told = set(re.findall(r'<tr[^>]*><th title="[^"]*">(\w+)</th>', plain))
    assert told == {knob.name for knob in KNOBS}


def test_a_turned_picture_stands_upright_and_whole_beside_its_crops(page: Page) -> None:
    (whole,) = page.pictures("turned.jpg")
    assert whole.size == (64, 96)
    top, bottom = whole.getpixel((32, 20)), whole.getpixel((32, 76))
    assert isinstance(top, tuple)
    assert isinstance(bottom, tuple)
    assert top[2] > 200 > 100 > top[0]
    assert bottom[0] > 200 > 100 > bottom[2]
    assert len(page.pictures("crop")) == 1 + 2 * report_pictures.MAX_CROPS


def test_the_crops_shown_are_those_that_were_cached(page: Page, photos: Path) -> None:
    cached: list[np.ndarray] = []

    def keep(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        picture = (pixels[0].permute(1, 2, 0) + 1) * 127.5
        cached.append(picture.round().to(torch.uint8).numpy())
        return torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 4, 4)

    names = [f"{EVIL}.png", "square.png", "turned.jpg"]
    cache.build(
        [photos / name for name in names],
        resolution=32,
        center_crop=False,
        crops_per_picture=8,
        seed=3,
        stream="instance",
        encode_image=keep,
    )
    of_first, of_last = cached[:8], cached[9:]
    for expected, name in ((of_first, names[0]), ([cached[8]], names[1]), (of_last, names[2])):
        for number, picture in enumerate(expected[: report_pictures.MAX_CROPS]):
            (shown,) = page.pictures(f"crop {number + 1} of {name}")
            assert np.array_equal(np.asarray(shown), picture)


def test_a_diverging_run_shows_its_curve_up_to_there(
    small_model_folder: Path, photos: Path, tmp_path: Path
) -> None:
    options = ["--learning_rate=1", "--max_steps=200", "--max_grad_norm=1e9"]
    options += ["--adam_epsilon=1e-30", "--adam_weight_decay=1000"]
    output = tmp_path / "model-output"
    output.mkdir()
    (output / "report.html").write_text("of an earlier run")
    assert train(small_model_folder, photos, tmp_path / "model", *options) == 1
    html = (output / "report.html").read_text(encoding="utf-8")
    assert_self_contained(html, Page(html))
    text = Page(html).text
    assert "The run was stopped." in text
    assert "training has diverged" in text
    assert "steps of 200" in text
    steps = len((output / "metrics.jsonl").read_text().splitlines())
    assert 0 < steps < 200
    assert not (tmp_path / "model" / "model_index.json").exists()


def test_a_resumed_run_shows_the_whole_curve(
    small_model_folder: Path, photos: Path, tmp_path: Path
) -> None:
    checkpoints = tmp_path / "checkpoints"
    options = ["--max_steps=4", "--checkpointing_steps=2", "--checkpoints_total_limit=2"]
    options.append(f"--checkpoint_dir={checkpoints}")
    for _ in range(2):
        assert train(small_model_folder, photos, tmp_path / "model", *options) == 0
        shutil.rmtree(checkpoints / "step-00000004")  # as if stopped after step 2
    html = (tmp_path / "model-output" / "report.html").read_text(encoding="utf-8")
    (line,) = re.findall(r"<title>learning rate</title><path d=\"([^\"]*)\"", html)
    assert line.count("L") == 3  # four points, joined by three lines
    assert ("th", "checkpoints") in Page(html).texts


def test_a_page_that_cannot_be_written_costs_no_model(
    small_model_folder: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model-output" / "report.html").mkdir(parents=True)
    assert train(small_model_folder, photos, tmp_path / "model", "--max_steps=1") == 0
    assert (tmp_path / "model" / "model_index.json").is_file()
    assert "report.html could not be written" in capsys.readouterr().err
    assert not list((tmp_path / "model-output").glob("*.part"))


@pytest.fixture
def make_record(tmp_path: Path) -> Callable[..., ReportData]:
    """Return a function that makes report data by hand.

    It has `pictures` large instance images and as many class images.
    """

    def make(pictures: int = 0, **changes: object) -> ReportData:
        generator = np.random.default_rng(0)
        paths = [tmp_path / f"{number:04d}.png" for number in range(pictures)]
        for path in paths:
            Image.fromarray(noise(generator, 400, 300)).save(path)
        values: dict[str, object] = {
            "instance_prompt": "a photo of a riobugger cat",
            "class_prompt": "",
            "sample_prompt": "a photo of a riobugger cat",
            "base": "tiny",
            "finished_at": "2024-02-29 12:00 UTC",
            "device": "CPU",
            "steps": 0,
            "planned_steps": 10,
            "stopped": None,
            "resolution": 256,
            "metrics": (),
            "last_sample": None,
            "fid_score": None,
            "scores": (),
            "step_pictures": (),
            "instance_pictures": [
                InstancePicture(
                    path=path, size=(256, 341), offsets=((0, 0), (0, 85)), prompt="a cat"
                )
                for path in paths
            ],
            "class_images": paths,
            "settings": Hyperparameters(),
            "plan": (("steps", "10"), ("", "a row without a name")),
            "phases": (("training", 75.0),),
            "seconds": 80.0,
            "memory": (("peak memory", "1.00 GiB"),),
            "versions": (("torch", "2.13.0"),),
            "data_fingerprint": "0123456789abcdef",
            "warnings": (),
        }
        return ReportData(**(values | changes))  # type: ignore[arg-type]

    return make


def test_an_empty_run_makes_a_page(make_record: Callable[..., ReportData]) -> None:
    html = report_page.render(make_record())
    page = Page(html)
    assert_self_contained(html, page)
    assert "no values" in page.text
    assert "All are at their defaults." in page.text
    assert "1 min 15 s" in page.text


def test_the_time_in_all_is_that_of_the_job(
    small_model_folder: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_record: Callable[..., ReportData],
) -> None:
    rendered: list[ReportData] = []
    read = dataset_info.read

    def slow_read(*args: object, **options: object) -> DatasetInfo:
        time.sleep(1.5)
        return read(*args, **options)  # type: ignore[arg-type]

    render = report_page.render
    monkeypatch.setattr(dataset_info, "read", slow_read)
    monkeypatch.setattr(
        report_page,
        "render",
        lambda record, **more: rendered.append(record) or render(record, **more),
    )
    began = time.monotonic()
    assert train(small_model_folder, photos, tmp_path / "model", "--max_steps=1") == 0
    took = time.monotonic() - began
    (record,) = rendered
    assert sum(seconds for _, seconds in record.phases) + 1.5 <= record.seconds <= took
    page = Page(report_page.render(make_record(seconds=80.0)))
    assert "1 min 20 sin all" in page.text
    rows = re.findall(r"before and between the phases(.*?)training", page.text, re.DOTALL)
    assert [row.strip() for row in rows] == ["5.0 s"]


def test_the_average_loss_is_that_of_the_log(
    page: Page, make_record: Callable[..., ReportData]
) -> None:
    assert "train_avg_loss" in page.text
    rows = [
        MetricsRow(
            step=step,
            loss=loss,
            instance_loss=9,
            class_loss=None,
            learning_rate=1,
            grad_norm=1,
            seconds=1,
        )
        for step, loss in ((1, 0.25), (2, 0.5))
    ]
    assert (
        "0.375train_avg_loss" in Page(report_page.render(make_record(steps=2, metrics=rows))).text
    )
    scored = Page(report_page.render(make_record(fid_score=12.345678)))
    assert "12.35fid_score" in scored.text
    assert "Scores" not in scored.text
    rows = (("subject_score", "0.875 (0.625 to 1.000, 8 pictures)"),)
    scored = Page(report_page.render(make_record(scores=rows)))
    assert "subject_score0.875 (0.625 to 1.000, 8 pictures)" in scored.text
    partial = Page(report_page.render(make_record(steps=2, metrics=rows[1:])))
    assert "train_avg_loss" not in partial.text  # some rows of metrics are missing


def test_pictures_stop_at_the_cap_and_the_page_says_so(
    make_record: Callable[..., ReportData],
) -> None:
    record = make_record(12)
    whole = report_page.render(record)
    assert "left out" not in Page(whole).text
    html = report_page.render(record, max_picture_bytes=200_000)
    assert len(html) < 200_000 + 40_000 < len(whole)
    page = Page(html)
    assert 1 <= len(page.pictures("000")) < 12
    assert re.search(r"\d+ more pictures are left out", page.text)


def test_of_many_pictures_a_sample_is_shown(make_record: Callable[..., ReportData]) -> None:
    record = make_record(1)
    many = [record.class_images[0]] * 2000
    page = Page(report_page.render(make_record(1, instance_pictures=(), class_images=many)))
    assert len(page.of("img")) == report_pictures.MAX_CLASS_IMAGES
    assert "2000 in all, 24 of them here" in page.text


def test_the_meters_pictures_stand_in_rows_and_the_kept_one_is_marked(
    make_record: Callable[..., ReportData],
) -> None:
    steps = [*range(0, 400, 10), 395]
    (path,) = make_record(1).class_images
    record = make_record(
        kept_step=150,
        meter_pictures=[
            MeterPicture(step=step, name=name, path=path)
            for step in steps
            for name in ("subject", "place", "class_2")
        ],
        meter_prompts={"subject": EVIL, "place": "on a beach"},
        meter_scores={150: {"class_kept": 0.5}},
    )
    html = report_page.render(record)
    page = Page(html)
    assert_self_contained(html, page)
    titles = [text.strip() for tag, text in page.texts if tag == "h3" and text.strip()]
    assert titles[0] == "Step 0, the base model"
    assert "Step 150, the model that was kept" in titles  # every tenth or so is left out
    assert titles[-1] == "Step 395"
    assert len(titles) <= report_pictures.MAX_METER_STEPS + 1
    assert len(page.pictures(f"{EVIL}, meter, step")) == len(titles)
    assert "class_2, meter, step 150" in [image["alt"] for image in page.of("img")]
    assert page.text.count("class kept 0.50") == 1
    assert "Pictures over the steps" not in report_page.render(make_record(1))


def test_at_the_cap_every_section_keeps_some_and_counts_them(
    make_record: Callable[..., ReportData], tmp_path: Path
) -> None:
    paths = make_record(40).class_images
    record = make_record(
        40,
        last_sample=Image.open(paths[0]),
        step_pictures=[(step, paths[step]) for step in range(1, 31)],
        resolution=256,
    )
    html = report_page.render(record, max_picture_bytes=1_500_000)
    assert len(html) < 1_500_000 + 60_000
    parts = dict(re.findall(r"<h2>([^<]*)</h2>(.*?)</section>", html, re.DOTALL))
    steps = Page(parts["What it draws"]).pictures("a photo of a riobugger cat, step")
    whole = Page(parts["Instance images"]).pictures("00")
    drawn = Page(parts["Class images"]).pictures("00")
    assert 3 <= len(steps) < 30
    assert 3 <= len(whole) < 40
    assert 3 <= len(drawn) <= report_pictures.MAX_CLASS_IMAGES
    assert f"40 in all, {len(drawn)} of them here." in parts["Class images"]
    assert f"40 were trained on, {len(whole)} of them here." in parts["Instance images"]
    assert "All 30 are in <code>samples/</code>." in parts["What it draws"]
    # A section may use the room that another does not need.
    lone = report_page.render(make_record(40, class_images=()), max_picture_bytes=1_500_000)
    assert len(Page(lone).pictures("00")) > len(whole)


def test_a_cap_that_no_picture_fits_under_is_reported(
    make_record: Callable[..., ReportData],
) -> None:
    page = Page(report_page.render(make_record(3), max_picture_bytes=1000))
    assert not page.of("img")
    assert "3 in all, none of them here." in page.text
    assert "3 were trained on, none of them here." in page.text


def test_pictures_that_are_gone_are_left_out(make_record: Callable[..., ReportData]) -> None:
    record = make_record(3)
    record.instance_pictures[1].path.unlink()
    page = Page(report_page.render(record))
    assert len(page.pictures("0000")) == 2  # once as instance image, once as class image
    assert not page.pictures("0001")


def test_every_text_of_a_stranger_is_escaped(make_record: Callable[..., ReportData]) -> None:
    evil = "\"'><script>alert(1)</script>\u202e\ud800"
    settings = Hyperparameters(sample_prompt=evil, pretrained_model=evil)
    row = MetricsRow(
        step=1, loss=1, instance_loss=1, class_loss=None, learning_rate=1, grad_norm=1, seconds=1
    )
    record = make_record(
        instance_prompt=evil,
        sample_prompt=evil,
        class_prompt=evil,
        base=evil,
        device=evil,
        stopped=(1, evil),
        metrics=[row],
        last_sample=Image.new("RGB", (8, 8)),
        settings=settings,
        plan=((evil, evil),),
        phases=((evil, 1.0),),
        memory=((evil, evil),),
        versions=((evil, evil),),
        warnings=[evil] * 100,
    )
    html = report_page.render(record)
    page = Page(html)
    assert_self_contained(html, page)
    assert "\u202e" not in html  # this character would reverse the rest of the line
    html.encode("utf-8")
    assert f"and {100 - report_page.MAX_WARNINGS} more in the log" in page.text


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0342, "34 ms"),
        (8.25, "8.2 s"),
        (59.97, "1 min 0 s"),
        (150, "2 min 30 s"),
        (7260, "2 h 1 min"),
    ],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert report_page.duration(seconds) == words


@pytest.mark.parametrize("expression", ["value", "value|breakable"])
def test_a_value_is_escaped_printable_and_bounded(expression: str) -> None:
    template = report_page.templates().from_string(f"{{{{ {expression} }}}}")

    def filled(value: str) -> str:
        return template.render(value=value)

    assert filled("<b a=\"1\" c='2'>&") == "&lt;b a=&#34;1&#34; c=&#39;2&#39;&gt;&amp;"
    assert filled("a\nb\u00a0c\u202e\x00\udc80") == "a b c\\u202e\\x00\\udc80"
    assert filled("ein Kätzchen 猫 🐈") == "ein Kätzchen 猫 🐈"
    assert len(filled("x" * 100_000)) < report_page.MAX_TEXT + 10


def test_the_template_exempts_nothing_of_a_stranger_from_escaping() -> None:
    source = (Path(report_page.__file__).parent / "page.html.jinja").read_text("utf-8")
    assert set(re.findall(r"(\S+)\|safe", source)) == {"thumbnail.uri", "chart"}
    assert "autoescape" not in source


def test_a_row_without_a_name_is_one_wide_cell(make_record: Callable[..., ReportData]) -> None:
    html = report_page.render(make_record(plan=(("", "a < b"),)))
    assert '<td colspan="2">a &lt; b</td>' in html


PHOTOS = os.environ.get("DREAMBOOTH_PHOTOS")
SUBJECTS = sorted(path for path in Path(PHOTOS).iterdir() if path.is_dir()) if PHOTOS else []


@pytest.mark.skipif(PHOTOS is None, reason="DREAMBOOTH_PHOTOS names no folder of photographs")
def test_there_are_photographs_where_they_are_promised() -> None:
    assert SUBJECTS


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda path: path.name)
def test_real_photographs_are_shown_upright_and_whole(
    small_model_folder: Path, tmp_path: Path, subject: Path
) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(subject, folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    names = sorted(path.name for path in folder.iterdir())
    with images.open_image(folder / names[0]) as first:
        side = min(first.size)
        upright = first.crop((0, 0, side * 2 // 3, side))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.jpg", exif=exif)
    prompts = {"instance_prompt": "a photo of riobugger cat"}
    (folder / "dataset_info.json").write_text(json.dumps(prompts))
    assert train(small_model_folder, folder, tmp_path / "model", "--max_steps=14") == 0
    html = (tmp_path / "model-output" / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    for name in (*names, "turned.jpg"):
        (shown,) = page.pictures(name)
        original = images.open_image(folder / name).resize(shown.size)
        apart = np.abs(np.asarray(shown, dtype=float) - np.asarray(original, dtype=float))
        assert apart.mean() < 8, name
    (turned,) = page.pictures("turned.jpg")
    assert turned.height == 480
    assert turned.width == 320
    assert len(page.pictures("crop 2 of turned.jpg")) == 1
