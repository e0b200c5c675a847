from __future__ import annotations

import argparse

import pytest

from dreambooth.errors import UserError
from dreambooth.settings import generate_options
from dreambooth.settings.command_line import Parser

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
        (("--height", "0"), "--height must be a multiple of 8 from 8 to 4096, not '0'"),
        (("--height", ""), "--height"),
        (("--width", "80000"), "--width must be a multiple of 8 from 8 to 4096, not '80000'"),
        (("--batch_size", "257"), "--batch_size must be a whole number from 1 to 256"),
        (("--steps", "1001"), "--num_inference_steps must be a whole number from 1 to 1000"),
        (("--seed", str(2**64)), f"--seed must be a whole number from 0 to {2**64 - 1}, not"),
        (
            ("--seed", str(2**64 - 1), "--count", "2"),
            f"--seed must be a whole number from 0 to {2**64 - 2} (picture i of 2 uses seed + i)",
        ),
        (("--count", "10001"), "--count must be a whole number from 1 to 10000"),
        (("--guidance_scale", "nan"), "--guidance_scale must be a finite number"),
        (("--prompt", "x" * 10_001), "10001 characters"),
        (("--negative_prompt", "bad \udcff"), "not valid UTF-8"),
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
