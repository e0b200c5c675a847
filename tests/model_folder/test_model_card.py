from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dreambooth.model_folder.model_card import ModelCard, licence_of, render

NASTY = 'a "photo": of | a `sks` [cat]\n---\n# no heading'


def card(**values: object) -> ModelCard:
    standard: dict[str, object] = {
        "base": "stabilityai/stable-diffusion-2-1-base",
        "instance_prompt": "a photo of a riobugger cat",
        "steps": 400,
        "planned_steps": 400,
        "data_fingerprint": "0123456789abcdef",
    }
    return ModelCard(**{**standard, **values})  # type: ignore[arg-type]


def front_matter(text: str) -> dict[str, object]:
    assert text.startswith("---\n")
    content = yaml.safe_load(text.split("---\n", 2)[1])
    assert isinstance(content, dict)
    return content


def test_the_front_matter_is_what_model_hubs_read() -> None:
    text = render(card(licence="creativeml-openrail-m"))
    assert front_matter(text) == {
        "license": "creativeml-openrail-m",
        "base_model": "stabilityai/stable-diffusion-2-1-base",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["stable-diffusion", "text-to-image", "dreambooth", "diffusers"],
        "instance_prompt": "a photo of a riobugger cat",
        "inference": True,
    }


@pytest.mark.parametrize("licence", [None, "my-own-licence"])
def test_an_unknown_licence_is_other_with_a_sentence(licence: str | None) -> None:
    text = render(card(licence=licence))
    assert front_matter(text)["license"] == "other"
    assert (licence or "without a stated licence") in text.split("## Licence")[1]


def test_the_card_tells_what_went_in_and_what_to_beware_of() -> None:
    text = render(
        card(
            class_prompt="a photo of a cat",
            instance_images=8,
            class_images=100,
            steps=120,
            train_text_encoder=True,
            versions=(("torch", "2.13.0"), ("diffusers", "0.42.1")),
        ),
        samples=[("01_on_a_beach.png", "on a beach")],
    )
    for part in (
        "stabilityai/stable-diffusion-2-1-base",
        "`a photo of a riobugger cat`",
        "`a photo of a cat`",
        "| Instance images | 8 |",
        "100",
        "120 of 400 planned",
        "the U-Net and the text encoder",
        "0123456789abcdef",
        "torch 2.13.0, diffusers 0.42.1",
        "![on a beach](samples/01_on_a_beach.png)",
        "from_pretrained",
        "Faces",
        "LAION-5B",
        "forgets",
    ):
        assert part in text


def test_prompts_cannot_break_out_of_their_place() -> None:
    text = render(card(instance_prompt=NASTY, base=NASTY), samples=[("1.png", NASTY)])
    assert front_matter(text)["instance_prompt"] == NASTY
    assert front_matter(text)["base_model"] == NASTY
    assert "\n# no heading" not in text
    row = next(line for line in text.splitlines() if line.startswith("| Instance prompt"))
    assert row.count("`") == 2
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: openrail++\ntags:\n- a\n---\n# Model", "openrail++"),
        ('---\nlicense: "CreativeML-OpenRAIL-M"\n---\n', "creativeml-openrail-m"),
        ("---\ntags: []\n---\nlicense: mit\n", None),
        ("# Model\n\nlicense: mit\n", None),
        ("---\nlicense: [a, b]\n---\n", None),
        ("---\nlicense: mit\n", None),
        ("", None),
    ],
)
def test_the_licence_comes_from_the_base_models_own_card(
    tmp_path: Path, text: str, licence: str | None
) -> None:
    assert licence_of(tmp_path) is None
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert licence_of(tmp_path) == licence


def test_a_written_card_gives_its_licence_on(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(render(card(licence="openrail++")), encoding="utf-8")
    assert licence_of(tmp_path) == "openrail++"
