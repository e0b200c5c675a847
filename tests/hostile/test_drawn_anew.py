"""The kinds of faults that outside cases found: a few of each, drawn anew, through whole jobs.

The rooms' own tests try each kind alone and by the hundred; the seed of a run is printed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.data.test_picture_structure import SLOW
from tests.diffusion.test_trial import ODD, change
from tests.hostile.conftest import Sandbox
from tests.model_folder.test_configuration import CODE, PLACES, SIZES
from tests.model_folder.test_mistaken_files import ARCHIVES, MESSAGES, POINTERS

Own = Callable[..., Path]
PARTS = ("unet", "vae", "text_encoder", "scheduler")
# Characters that end a line, a block of YAML or Markdown, or a word elsewhere than they seem to.
SHARP = (
    "\x7f\x80\x85\x9f\xa0\u2028\u2029\ufeff\ufffe\ufffd\u202e\U0010ffff"
    "\t\n\r-#|:`\"'\\{}[]<>&*_!%@ "
)


@pytest.fixture
def draws() -> random.Random:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


def test_sizes_and_code_in_a_configuration(
    sandbox: Sandbox, own_model: Own, draws: random.Random
) -> None:
    folder = own_model()
    size = {draws.choice(SIZES): draws.choice((10**9, [1, [10**6]], [[10**9]]))}
    setting = draws.choice((size, {"auto_map": {"AutoModel": "x.Y"}}, {"trust_remote_code": True}))
    part = draws.choice(PARTS)
    print(part, setting)
    change(folder, part, PLACES[draws.choice(sorted(PLACES))](setting))
    sandbox.refuses(part)


def test_a_kernel_that_a_configuration_names_is_never_asked_for(
    sandbox: Sandbox, own_model: Own, draws: random.Random
) -> None:
    folder = own_model()
    place = PLACES[draws.choice(["on top", "in a part"])]
    change(folder, draws.choice(PARTS[:3]), place({draws.choice(CODE): "someone/evil-kernel"}))
    assert sandbox.runs("config.json") is None


@pytest.mark.parametrize("part", PARTS)
def test_any_odd_value(sandbox: Sandbox, own_model: Own, draws: random.Random, part: str) -> None:
    folder = own_model()
    path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    name = draws.choice(sorted(json.loads(path.read_text("utf-8"))))
    value = draws.choice(ODD)
    print(name, str(value)[:80])
    change(folder, part, {name: value})
    sandbox.runs(part)


def test_pictures_that_take_minutes(sandbox: Sandbox, draws: random.Random) -> None:
    name = draws.choice(sorted(SLOW))
    print(name)
    (sandbox.photos / "good.png").unlink()
    (sandbox.photos / "slow.png").write_bytes(SLOW[name][1]())
    sandbox.refuses("slow.png")


def test_what_stands_in_place_of_an_archive(sandbox: Sandbox, draws: random.Random) -> None:
    sandbox.model = sandbox.root / draws.choice(ARCHIVES)
    content = draws.choice([*POINTERS, *(message for message, _ in MESSAGES)])
    print(sandbox.model.name, content[:80])
    sandbox.model.write_bytes(content)
    sandbox.refuses(sandbox.model.name)


def test_prompts_of_sharp_characters(sandbox: Sandbox, draws: random.Random) -> None:
    prompt = "a photo of " + "".join(draws.choices(SHARP, k=12)) + " cat"
    print(ascii(prompt))
    info = {"instance_prompt": prompt}
    (sandbox.photos / "dataset_info.json").write_text(json.dumps(info), "utf-8")
    if sandbox.runs("dataset_info.json") is None:
        card = (sandbox.root / "out" / "model" / "README.md").read_text("utf-8")
        matter: dict[str, Any] = yaml.safe_load(card.split("---\n", 2)[1])
        assert matter["pipeline_tag"] == "text-to-image"
