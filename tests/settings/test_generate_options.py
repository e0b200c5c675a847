from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from dreambooth.errors import UserError
from dreambooth.settings import generate_options
from dreambooth.settings.command_line import Parser
from dreambooth.settings.generate_options import GenerateSettings

CAT = "a photo of a cat"


def parsed(*argv: str) -> argparse.Namespace:
    parser = Parser()
    generate_options.add_arguments(parser)
    return parser.parse_args(argv)


def fault(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        generate_options.read(parsed(*argv))
    return str(caught.value)


def test_all_faults_are_reported_in_one_message() -> None:
    message = fault(
        *("--steps", "0", "--count", "many", "--width", "30", "--guidance_scale", "inf"),
        *("--precision", "fp8", "--format", "gif", "--seed", "-1", "--batch_size", "1.5"),
    )
    for name in ("model", "prompt", "num_inference_steps", "count", "width", "guidance_scale"):
        assert f"--{name} " in message
    for name in ("precision", "format", "seed", "batch_size"):
        assert f"--{name} " in message
    assert "not 'many'" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ("--height", "0"),
            "--height must be a whole number, at least 8, at most 4096, a multiple of 8, not '0'",
        ),
        (
            ("--height", ""),
            "--height must be a whole number, at least 8, at most 4096, a multiple of 8, not ''",
        ),
        (
            ("--width", "80000"),
            "--width must be a whole number, at least 8, at most 4096, a multiple of 8, not '8",
        ),
        (("--batch_size", "257"), "--batch_size must be a whole number, at least 1, at most 256"),
        (
            ("--steps", "1001"),
            "--num_inference_steps must be a whole number, at least 1, at most 1000",
        ),
        (
            ("--seed", str(2**64)),
            f"--seed must be a whole number, at least 0, at most {2**64 - 1}, not '{2**64}'",
        ),
        (
            ("--seed", str(2**64 - 1), "--count", "2"),
            f"--seed must be at most {2**64 - 2}, not {2**64 - 1}: picture i of 2 uses seed + i",
        ),
        (("--count", "10001"), "--count must be a whole number, at least 1, at most 10000"),
        (("--guidance_scale", "nan"), "--guidance_scale must be a number, not 'nan'"),
        (("--prompt", "x" * 10_001), "--prompt has 10001 characters; at most 4000 are read."),
        (
            ("--negative_prompt", "bad \udcff"),
            "--negative_prompt must be a text, not 'bad \\udcff'",
        ),
    ],
)
def test_a_wrong_value_is_one_sentence(argv: tuple[str, ...], words: str) -> None:
    message = fault("--model", "tiny", "--prompt", CAT, *argv)
    assert words in message
    assert message.count("--") <= 1


def test_the_last_seeds_that_fit_are_taken() -> None:
    options = ("--model", "tiny", "--prompt", CAT, "--count", "2", "--seed", str(2**64 - 2))
    assert generate_options.read(parsed(*options)).seed == 2**64 - 2


def test_both_sides_together_have_a_cap() -> None:
    options = ("--model", "tiny", "--prompt", CAT, "--width", "4096", "--height")
    assert generate_options.read(parsed(*options, "1024")).height == 1024
    told = "--width times --height must be at most 4194304 pixels, not 4096 x 1032."
    assert fault(*options, "1032") == told


def test_texts_are_taken_as_they_are_typed() -> None:
    texts = ['"a cat"', "", "None", " a 'dog' "]
    prompts = [word for text in texts for word in ("--prompt", text)]
    found = generate_options.read(parsed("--model", "caf\u00e9\u00a0x", *prompts, "--out", "~"))
    assert found.prompts == tuple(texts)
    assert found.model == "caf\u00e9\u00a0x"
    assert found.out == Path.home()


def test_every_option_arrives() -> None:
    words = (
        *("--model", "tiny", "--prompt", CAT, "--negative_prompt", "dog", "--steps", "3"),
        *("--guidance-scale", "4", "--width", "64", "--height", "72", "--seed", "5"),
        *("--count", "2", "--batch_size", "3", "--out", "there", "--prec", "FP16"),
        *("--format", "webp"),
    )
    assert generate_options.read(parsed(*words)) == GenerateSettings(
        model="tiny",
        prompts=(CAT,),
        negative_prompt="dog",
        num_inference_steps=3,
        guidance_scale=4.0,
        width=64,
        height=72,
        seed=5,
        count=2,
        batch_size=3,
        out=Path("there"),
        precision="fp16",
        format="webp",
    )


def test_the_defaults() -> None:
    found = generate_options.read(parsed("--model", "tiny", "--prompt", CAT))
    assert found == GenerateSettings(model="tiny", prompts=(CAT,))
    assert (found.num_inference_steps, found.guidance_scale, found.count) == (50, 7.5, 1)
    assert (found.width, found.height, found.seed, found.batch_size) == (None, None, None, 4)
    assert (found.out, found.precision, found.format) == (Path("out/generate"), "auto", "png")
