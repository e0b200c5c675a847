from __future__ import annotations

import ast
import time
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from dreambooth.errors import one_line
from dreambooth.model_folder.model_card import ModelCard, licence_of, render
from dreambooth.model_folder.taught_subjects import TaughtSubject

NASTY = 'a "photo": of | a `sks` [cat]\n---\n# no heading'


def card(**values: object) -> ModelCard:
    standard: dict[str, object] = {
        "base": "stabilityai/stable-diffusion-2-1-base",
        "subjects": [TaughtSubject(instance_prompt="a photo of a riobugger cat")],
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


@pytest.mark.parametrize("text", ["---" + "\n" * 65_530, "---\n" + " \n" * 30_000, "\n" * 65_536])
def test_a_card_of_a_stranger_is_read_at_once(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    began = time.process_time()
    assert licence_of(tmp_path) is None
    assert time.process_time() - began < 1


def test_the_card_tells_what_went_in_and_what_to_beware_of() -> None:
    text = render(
        card(
            subjects=[
                TaughtSubject(
                    instance_prompt="a photo of a riobugger cat", class_prompt="a photo of a cat"
                )
            ],
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
        "- Instance images: 8\n",
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
    subjects = [TaughtSubject(instance_prompt=NASTY)]
    text = render(card(subjects=subjects, base=NASTY), samples=[("1.png", NASTY)])
    assert front_matter(text)["instance_prompt"] == NASTY
    assert front_matter(text)["base_model"] == NASTY
    assert "\n# no heading" not in text


# Characters that YAML, Markdown or Python read as more than themselves, or not at all.
ODD = [chr(code) for code in (0, 7, 9, 10, 13, *range(0x7F, 0xA1), 0xAD, 0x200D, 0x2028)]
ODD += [chr(code) for code in (0x2029, 0x202E, 0xE000, 0xFEFF, 0xFFFE, 0xFFFF, 0x1F408, 0xE0001)]
ODD += [chr(0x1FFFE), chr(0x10FFFF), "---", "\n---\n", "...", "```", "`", "``", "~~~", "](x)", "!["]
ODD += [
    "\\",
    "\\|",
    "|",
    "<b>",
    "<!--",
    "&amp;",
    "&#42;",
    "*a*",
    "_b_",
    "# ",
    "- ",
    "1. ",
    ": ",
    "{}",
]
ODD += [
    "http://x.org",
    "a@b.org",
    "'",
    '"',
    '\\"',
    "%",
    "@",
    "!",
    "\\u0041",
    "${x}",
    "\t",
    "=====",
    "> ",
]
prompts = st.lists(st.sampled_from([*ODD, "cat", " "]) | st.text(max_size=3), max_size=6)


def shown(text: str) -> str:
    """Return what a reader sees of a prompt: one line, with escapes for what is not printable."""
    return one_line(" ".join(text.split()), most=10**6) or "(blank)"


def check_texts(instance: str, other: str) -> None:
    """Check that all readers of a card get the prompts as they are."""
    made = card(
        subjects=[TaughtSubject(instance_prompt=instance, class_prompt=other)],
        base=other,
        licence=None,
    )
    text = render(made, samples=[("1.png", instance), ("2.png", other)])
    text.encode("utf-8")
    expected = front_matter(render(card())) | {"instance_prompt": instance, "base_model": other}
    assert front_matter(text) == expected
    read = huggingface_hub.ModelCard(text)
    assert read.data.to_dict() == expected
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(read.text)
    inline = [child for token in tokens for child in token.children or ()]
    spans = [child.content for child in inline if child.type == "code_inline"]
    for prompt in (instance, other):
        assert shown(prompt) in spans
    alts = [
        "".join(part.content for part in child.children or ())
        for child in inline
        if child.type == "image"
    ]
    assert alts == [shown(instance), shown(other)]
    assert not {"html_inline", "html_block", "link_open"} & {
        found.type for found in (*tokens, *inline)
    }
    headings = [token.type for token in tokens].count("heading_open")
    assert headings == render(card(), samples=[("1.png", "x")]).count("\n#")
    (code,) = [token.content for token in tokens if token.type == "fence"]
    (call,) = [
        node.args[0]
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "pipeline"
    ]
    assert ast.literal_eval(call) == instance


@pytest.mark.parametrize("odd", ODD)
def test_odd_characters_are_text_everywhere(odd: str) -> None:
    check_texts(odd, f"a {odd} cat {odd}")


@settings(max_examples=80)
@given(prompts, prompts)
def test_any_prompt_is_text_everywhere(instance: list[str], other: list[str]) -> None:
    check_texts("".join(instance), "".join(other))


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: openrail++\ntags:\n- a\n---\n# Model", "openrail++"),
        ('---\nlicense: "CreativeML-OpenRAIL-M"\n---\n', "creativeml-openrail-m"),
        ("---\ntags: []\n---\nlicense: mit\n", None),
        ("# Model\n\nlicense: mit\n", None),
        ("---\nlicense: [a, b]\n---\n", None),
        ("---\r\nlicense: mit\r\n---\r\n# Model", "mit"),
        ("---\ntitle: a ---\nlicense: mit\n---\n", "mit"),
        ("---\ntitle: a\n--- \nlicense: mit\n---\n", None),
        ("---\nlicense: mit\n---", "mit"),
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
