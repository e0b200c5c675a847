from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreambooth.diffusion.sampling_request import SamplingFacts
from dreambooth.errors import RequestError
from dreambooth.limits import KIB, LIMITS, MIB
from dreambooth.model_folder.facts import SMALLEST_UNIT
from dreambooth.serving.contract import request
from dreambooth.serving.contract.request import SEED_COUNT, GenerationRequest, parse
from dreambooth.serving.http.guard import GuardLimits
from dreambooth.serving.supervision.messages import Generate, ToEngine, pack, unpack
from dreambooth.settings.serve_options import ServeSettings
from tests.documents import DOCUMENTS

FACTS = SamplingFacts(resolution=512, unit=8, max_steps=999)
CAT = "a photo of a cat"


def parsed(payload: object, facts: SamplingFacts = FACTS) -> GenerationRequest:
    return parse("application/json", json.dumps(payload).encode(), facts)


def asked(**keys: Any) -> GenerationRequest:
    return parsed({"prompt": CAT} | keys)


def refused(payload: object, status: int = 400) -> str:
    with pytest.raises(RequestError) as error:
        parsed(payload)
    assert error.value.status == status
    return str(error.value)


# Texts.


def test_a_text_body_is_the_prompt_and_all_else_is_the_default() -> None:
    assert parse("application/x-text", CAT.encode(), FACTS) == GenerationRequest(
        form="text",
        prompts=(CAT,),
        negative_prompts=("",),
        echo=CAT,
        width=512,
        height=512,
        num_inference_steps=50,
        guidance_scale=7.5,
        num_images_per_prompt=1,
        eta=0.0,
        seed=None,
        batch_size=None,
    )


@pytest.mark.parametrize(
    ("body", "prompt"),
    [
        (json.dumps("a cat with a \u201ehat\u201c"), "a cat with a \u201ehat\u201c"),
        ('  "a cat"\n', "a cat"),
        ('""', ""),
        ('"a cat" and "a dog"', '"a cat" and "a dog"'),
        ('"a cat', '"a cat'),
        ('"\\ud800"', '"\\ud800"'),
        ("a cat\n", "a cat\n"),
        ('{"prompt": "a cat"}', '{"prompt": "a cat"}'),
        ("[1]", "[1]"),
        ("5", "5"),
        ("ein K\u00e4fer, \u732b \N{CAT FACE}", "ein K\u00e4fer, \u732b \N{CAT FACE}"),
    ],
)
def test_one_json_string_is_unquoted_and_echoed_as_sent(body: str, prompt: str) -> None:
    for sent in (body, body.encode(), bytearray(body.encode())):
        found = parse("application/x-text", sent, FACTS)
        assert found.prompts == (prompt,)
        assert found.echo == body


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "The body is empty"),
        (b"\xff\xfea\0", "not valid UTF-8"),
        ("a cat".encode("utf-16-le"), "NUL characters"),
        ("\ufeffa cat".encode(), "byte order mark"),
        (b"a" * (LIMITS.max_prompt_characters + 1), "prompt has 4001 characters"),
        (b'"' + b"a" * 4_001 + b'"', "prompt has 4001 characters"),
    ],
)
def test_texts_that_are_no_prompt_are_refused(body: bytes, words: str) -> None:
    with pytest.raises(RequestError, match=words) as error:
        parse("application/x-text", body, FACTS)
    assert error.value.status == 400


def test_prompts_are_measured_in_characters() -> None:
    longest = "\N{CAT FACE}" * LIMITS.max_prompt_characters
    assert parse("application/x-text", longest.encode(), FACTS).prompts == (longest,)
    assert asked(prompt=longest, negative_prompt=longest).prompts == (longest,)


# The JSON form.


def test_every_key_arrives() -> None:
    found = asked(
        prompt=["x", "y"],
        width=320,
        height=256,
        num_inference_steps=7,
        guidance_scale=3,
        negative_prompt=["n", "m"],
        num_images_per_prompt=2,
        eta=0.5,
        seed=2**64 - 2,
        batch_size=3,
    )
    assert found == GenerationRequest(
        form="json",
        prompts=("x", "y"),
        negative_prompts=("n", "m"),
        echo=("x", "y"),
        width=320,
        height=256,
        num_inference_steps=7,
        guidance_scale=3.0,
        num_images_per_prompt=2,
        eta=0.5,
        seed=2**64 - 2,
        batch_size=3,
    )
    assert found.picture_count == 4
    drawn = found.sampling_requests(2**64 - 2)
    texts = [(each.prompt, each.negative_prompt, each.seed) for each in drawn]
    first, last = 2**64 - 2, 2**64 - 1
    assert texts == [("x", "n", first), ("x", "n", last), ("y", "m", 0), ("y", "m", 1)]
    for each in drawn:
        assert (each.width, each.height, each.num_inference_steps) == (320, 256, 7)
        assert (each.guidance_scale, each.eta) == (3.0, 0.5)


def test_missing_keys_are_the_published_defaults() -> None:
    found = asked()
    assert (found.num_inference_steps, found.guidance_scale) == (50, 7.5)
    assert (found.width, found.height, found.num_images_per_prompt) == (512, 512, 1)
    assert (found.seed, found.batch_size, found.eta, found.echo) == (None, None, 0.0, CAT)
    wide = asked(width=768)
    assert (wide.width, wide.height) == (768, 512)


def test_a_short_noise_schedule_lowers_the_default_steps() -> None:
    facts = replace(FACTS, max_steps=20)
    assert parsed({"prompt": CAT}, facts).num_inference_steps == 20
    assert parse("application/x-text", CAT, facts).num_inference_steps == 20


def test_one_negative_prompt_serves_all_prompts() -> None:
    assert asked(prompt=["x", "y"], negative_prompt="nm").negative_prompts == ("nm", "nm")
    assert asked(prompt=["x"], negative_prompt=["nm"]).negative_prompts == ("nm",)


def test_a_list_comes_back_as_a_list() -> None:
    assert asked(prompt=[CAT]).echo == (CAT,)
    assert asked(prompt="").echo == ""


@pytest.mark.parametrize(
    ("payload", "sentence"),
    [
        (
            {"prompt": CAT, "widht": 512},
            "Input payload contains an invalid key widht. Valid keys are ['prompt', 'height', "
            "'width', 'num_inference_steps', 'guidance_scale', 'negative_prompt', "
            "'num_images_per_prompt', 'eta', 'seed', 'batch_size'].",
        ),
        ({"width": 64}, "Input payload must contain 'prompt' key."),
        ({}, "Input payload must contain 'prompt' key."),
        ({"prompt": CAT, "width": 65}, "width must be divisible by 8, got 65."),
        ({"prompt": CAT, "width": "64"}, 'width must be an integer, got "64" (a string).'),
        (
            {"prompt": CAT, "num_inference_steps": 0},
            "num_inference_steps must be at least 1, got 0.",
        ),
        ({"prompt": CAT, "seed": 1.0}, "seed must be an integer, got 1.0."),
        ({"prompt": 5}, "prompt must be a string or a list of string. Got 5."),
    ],
)
def test_published_sentences_are_kept(payload: object, sentence: str) -> None:
    assert refused(payload) == sentence


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("prompt", [], "string or a list of string. Got []"),
        ("prompt", ["x", 5], 'string or a list of string. Got ["x", 5].'),
        ("prompt", None, "Input payload must contain 'prompt' key."),
        ("prompt", ["x", None], 'string or a list of string. Got ["x", null].'),
        ("prompt", {"a": 1}, 'string or a list of string. Got {"a": 1}.'),
        ("prompt", "x" * 4_001, "prompt has 4001 characters; at most 4000"),
        ("prompt", ["x"] * 65, "prompt holds 65 texts"),
        ("negative_prompt", 5, "negative_prompt must be a string or a list of string. Got 5"),
        ("negative_prompt", ["n"], "a list is allowed only beside a list"),
        ("negative_prompt", "x" * 4_001, "negative_prompt has 4001 characters"),
        ("width", True, "width must be an integer, got true."),
        ("width", [None], "width must be an integer, got [null]."),
        ("width", 512.0, "width must be an integer, got 512.0"),
        ("width", 0, "width must be at least 1, got 0"),
        ("width", 4, "width must be divisible by 8, got 4"),
        ("width", 4104, "width must be a multiple of 8 from 8 to 4096, not 4104"),
        ("height", -8, "height must be at least 1, got -8"),
        ("height", 10**90, "height must be "),
        ("num_inference_steps", 1000, "num_inference_steps must lie between 1 and 999, not 1000"),
        ("num_inference_steps", True, "num_inference_steps must be an integer, got true."),
        ("guidance_scale", "7", 'guidance_scale must be a number, got "7" (a string).'),
        ("guidance_scale", False, "guidance_scale must be a number, got false."),
        ("num_images_per_prompt", 0, "num_images_per_prompt must be at least 1, got 0"),
        ("num_images_per_prompt", 65, "make 65 pictures; one request may ask for 64"),
        ("eta", -0.1, "eta must lie between 0 and 1, not -0.1"),
        ("eta", 2, "eta must lie between 0 and 1, not 2."),
        ("eta", [0], "eta must be a number, got [0]"),
        ("seed", -1, "seed must lie between 0 and 2**64 - 1, not -1"),
        ("seed", 2**64, "seed must lie between 0 and 2**64 - 1"),
        ("seed", True, "seed must be an integer, got true."),
        ("seed", "1\n2", 'seed must be an integer, got "1\\n2" (a string).'),
        ("seed", "\u202e1", 'seed must be an integer, got "\\u202e1" (a string).'),
        ("seed", "7" * 200, f'got "{"7" * 99}…" (a string).'),
        ("widht", None, "Input payload contains an invalid key widht."),
        ("batch_size", 0, "batch_size must be at least 1, got 0"),
        ("batch_size", 257, "batch_size must be at most 256, got 257"),
        ("x" * 200, 1, f"an invalid key {'x' * 100}…."),
    ],
)
def test_bad_values_are_refused_in_one_sentence(key: str, value: object, words: str) -> None:
    assert words in refused({"prompt": CAT, key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("width", 8),
        ("width", 4096),
        ("num_inference_steps", 1),
        ("num_inference_steps", 999),
        ("guidance_scale", 0),
        ("guidance_scale", -1.5),
        ("guidance_scale", 1e6),
        ("num_images_per_prompt", 64),
        ("eta", 0),
        ("eta", 1),
        ("seed", 0),
        ("seed", 2**64 - 1),
        ("batch_size", 1),
        ("batch_size", 256),
        ("prompt", ["x"] * 64),
    ],
)
def test_values_at_the_bounds_arrive(key: str, value: object) -> None:
    found = asked(**{key: value})
    arrived = found.prompts if key == "prompt" else getattr(found, key)
    assert arrived == (tuple(value) if isinstance(value, list) else value)


def test_prompts_times_pictures_are_bounded() -> None:
    assert asked(prompt=["x"] * 8, num_images_per_prompt=8).picture_count == 64
    words = refused({"prompt": ["x"] * 8, "num_images_per_prompt": 9})
    assert words.startswith("8 prompt(s) x num_images_per_prompt 9 make 72 pictures")


def test_sides_follow_the_models_own_unit() -> None:
    with pytest.raises(RequestError, match="width must be divisible by 16, got 24"):
        parsed({"prompt": CAT, "width": 24}, replace(FACTS, unit=16))


@pytest.mark.parametrize("payload", ["a cat", 5, None, [], [{"prompt": CAT}], True])
def test_a_body_that_is_no_object_is_refused(payload: object) -> None:
    sentence = refused(payload)
    assert "must be an object with a 'prompt' key" in sentence
    said = "a string" if isinstance(payload, str) else json.dumps(payload)
    assert said in sentence.partition(", not ")[2]


@given(st.sets(st.sampled_from([*request.PARAMETERS, *request.HUGGINGFACE_KEYS])))
def test_a_key_that_is_null_is_not_given(keys: set[str]) -> None:
    nulls = dict.fromkeys(keys)
    assert parsed({"prompt": CAT, **nulls}) == asked()
    within = {key: None for key in keys if key in request.PARAMETERS}
    found = parsed({"prompt": None, **nulls, "inputs": CAT, "parameters": within or None})
    assert found == replace(asked(), form="huggingface")


@given(
    st.sampled_from(["width", "num_inference_steps", "seed", "batch_size", "eta"]),
    st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    ).filter(lambda value: value is not None and not isinstance(value, float)),
)
def test_values_in_sentences_are_json(key: str, value: object) -> None:
    sentence = refused({"prompt": CAT, key: value})
    assert sentence.isprintable()
    said = sentence.partition(", got ")[2].removesuffix(".")
    if isinstance(value, str):
        assert said.endswith('" (a string)')
        said = said.removesuffix(" (a string)")
    if "…" not in said:
        assert json.loads(said) == value


@given(st.sampled_from(["guidance_scale", "eta", "seed", "num_inference_steps"]), st.data())
def test_numbers_out_of_bounds_are_shown_as_sent(key: str, data: st.DataObject) -> None:
    whole = st.integers(10**20, 10**80) | st.integers(-(10**80), -(10**7))
    real = st.floats(1e7, allow_infinity=False) | st.floats(max_value=-1e7, allow_infinity=False)
    value = data.draw(whole | real if key in ("guidance_scale", "eta") else whole)
    sentence = refused({"prompt": CAT, key: value})
    assert re.search(rf"(not|got) {re.escape(json.dumps(value))}\.$", sentence)


@given(st.integers(-(10**6), 10**6), st.integers(0, 1))
def test_whole_numbers_arrive_as_the_floats_they_are(scale: int, eta: int) -> None:
    found = parsed({"prompt": CAT, "guidance_scale": scale, "eta": eta})
    assert (found.guidance_scale, found.eta) == (scale, eta)
    assert {type(found.guidance_scale), type(found.eta)} == {float}


def test_the_caps_are_those_given() -> None:
    body = json.dumps({"prompt": [CAT, CAT]})
    with pytest.raises(RequestError, match="prompt holds 2 texts"):
        parse("application/json", body, FACTS, replace(LIMITS, max_request_pictures=1))
    with pytest.raises(RequestError, match="prompt has 16 characters; at most 15"):
        parse("application/json", body, FACTS, replace(LIMITS, max_prompt_characters=15))
    with pytest.raises(RequestError, match="multiple of 8 from 8 to 256, not 512"):
        parse("application/json", body, FACTS, replace(LIMITS, max_generated_side_pixels=256))


def test_a_body_beyond_the_cap_is_413() -> None:
    limits = replace(LIMITS, max_body_bytes=20)
    assert parse("application/x-text", b"x" * 20, FACTS, limits).prompts == ("x" * 20,)
    with pytest.raises(RequestError, match="The body has 21 bytes; at most 20 are read") as error:
        parse("application/x-text", b"x" * 21, FACTS, limits)
    assert error.value.status == 413


# The Hugging Face toolkit's form.


def test_the_hugging_face_form_is_read() -> None:
    plain = parsed({"inputs": CAT})
    assert plain == replace(asked(), form="huggingface")
    assert parsed({"inputs": CAT, "parameters": None}) == plain
    keys = {"num_inference_steps": 3, "negative_prompt": "n", "num_images_per_prompt": 2, "seed": 9}
    found = parsed({"inputs": CAT, "parameters": keys})
    assert found == replace(asked(**keys), form="huggingface")
    assert parsed({"inputs": ["x", "y"]}).echo == ("x", "y")


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        ({"inputs": 5}, "inputs must be a string or a list of string. Got 5."),
        ({"inputs": CAT, "parameters": [1]}, "parameters must be an object, got [1]."),
        (
            {"inputs": CAT, "parameters": {"prompt": CAT}},
            "Input payload contains an invalid key prompt. Valid keys are ['height', 'width',",
        ),
        ({"inputs": CAT, "seed": 1}, "invalid key seed. Valid keys are ['inputs', 'parameters']."),
        ({"inputs": CAT, "prompt": CAT}, "invalid key inputs. Valid keys are ['prompt',"),
        ({"inputs": CAT, "parameters": {"width": 65}}, "width must be divisible by 8, got 65."),
    ],
)
def test_bad_hugging_face_payloads_are_refused(payload: object, words: str) -> None:
    assert words in refused(payload)


# Content types.


@pytest.mark.parametrize(
    "header",
    [
        "application/json",
        "Application/JSON",
        "application/json; charset=utf-8",
        'application/json;charset="UTF-8"',
        " application/json ; CHARSET = utf8 ; version=1 ;",
    ],
)
def test_json_is_known_whatever_its_case_and_parameters(header: str) -> None:
    assert parse(header, b'{"prompt": "x"}', FACTS).form == "json"
    text = header.lower().replace("json", "x-text")
    assert parse(text, b"x", FACTS).form == "text"


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (None, "Unsupported content type (none): send application/json or application/x-text"),
        ("", "initial_args"),
        ("application/octet-stream", "a SageMaker Predictor without a serializer"),
        ("text/plain", "Unsupported content type text/plain: send application/json"),
        ("application/json;jpeg", "Unsupported content type application/json;jpeg"),
        ("application/json;verbose", "Unsupported content type"),
        ("application/json, text/plain", "Unsupported content type"),
        ("application/jsonx", "Unsupported content type"),
        (";", "Unsupported content type"),
        ("application/json; charset=latin-1", "Unsupported charset latin-1"),
        ("application/x-text; charset=utf-16", "send UTF-8"),
        ("x" * 10_000, "Unsupported content type xxx"),
    ],
)
def test_other_content_types_are_415(header: str | None, words: str) -> None:
    with pytest.raises(RequestError) as error:
        parse(header, b'{"prompt": "x"}', FACTS)
    assert error.value.status == 415
    assert words in str(error.value)
    assert len(str(error.value)) < 400


# Untrusted input.

REQUEST = json.dumps(
    {"prompt": [CAT, "x"], "width": 512, "seed": 1, "guidance_scale": 7.5, "negative_prompt": "n"}
).encode()


def parses_or_refuses(content_type: str | None, body: bytes | str) -> None:
    try:
        found = parse(content_type, body, FACTS)
    except RequestError as error:
        told = error
    else:
        assert isinstance(found, GenerationRequest)
        assert 1 <= found.picture_count <= LIMITS.max_request_pictures
        assert len(found.sampling_requests(0)) == found.picture_count
        return
    assert told.status in (400, 413, 415)
    assert str(told).isprintable()
    assert len(str(told)) < 1_000


headers = st.sampled_from(["application/json", "application/x-text"]) | st.none() | st.text()


@given(headers, st.binary() | st.text())
def test_random_bodies_are_parsed_or_refused(content_type: str | None, body: bytes | str) -> None:
    parses_or_refuses(content_type, body)


@given(st.integers(0, len(REQUEST)), st.integers(0, len(REQUEST)), st.binary(max_size=8))
def test_damaged_requests_are_parsed_or_refused(start: int, end: int, filling: bytes) -> None:
    parses_or_refuses("application/json", REQUEST[:start] + filling + REQUEST[end:])


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(CAT)
anything = scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.text(), scalars, max_size=2)
names = st.sampled_from([*request.KEYS, *request.HUGGINGFACE_KEYS]) | st.text()


@given(st.dictionaries(names, anything, max_size=6), st.booleans())
def test_any_values_of_any_keys_are_parsed_or_refused(
    payload: dict[str, Any], with_prompt: bool
) -> None:
    payload |= {"prompt": CAT} if with_prompt else {}
    parses_or_refuses("application/json", json.dumps(payload))


@pytest.mark.parametrize(
    "extreme",
    [
        {"guidance_scale": LIMITS.max_guidance_scale},
        {"guidance_scale": -LIMITS.max_guidance_scale, "eta": 1},
        {"seed": SEED_COUNT - 1, "num_images_per_prompt": 64, "batch_size": 256},
        {"prompt": ["\N{GRINNING FACE}" * 3_900] * 64},
        {"prompt": "\0\x7f\u2028\U0010ffff", "negative_prompt": "\\"},
    ],
)
def test_what_is_accepted_survives_the_way_to_the_engine(extreme: dict[str, Any]) -> None:
    body = json.dumps({"prompt": CAT} | extreme, ensure_ascii=False).encode()
    pictures = parse("application/json", body, FACTS).sampling_requests(SEED_COUNT - 1)
    message = Generate(request_id=1, pictures=pictures, batch_size=None)
    header, payload = pack(message)
    read = unpack(header[12:], payload, ToEngine)
    assert read == message


def test_the_limits_of_the_documents_are_these() -> None:
    (document,) = [text for text in DOCUMENTS.values() if "| limit | value |" in text]
    table = document.partition("| limit | value |")[2].partition("\n\n")[0]
    told = {row.split("|")[1].strip(): row.split("|")[2] for row in table.splitlines()[2:]}
    settings, sockets = ServeSettings(model=""), GuardLimits()
    values = {
        "time from arrival to reply": (f"{settings.request_timeout_s:g}",),
        "pictures waiting or being drawn": (f"{settings.max_queue}",),
        "body": (
            f"{settings.max_body_bytes // MIB} MiB",
            f"{sockets.body_bytes // MIB} MiB",
            f"{sockets.body_s:g} s",
        ),
        "request head": (
            f"{sockets.head_bytes // KIB} KiB",
            f"{sockets.headers} headers",
            f"{sockets.head_s:g} s",
        ),
        "open connections": (f"{settings.max_connections:,}",),
        "prompt": (f"{LIMITS.max_prompt_characters:,} characters",),
        "sides": (
            f"{SMALLEST_UNIT} up to {LIMITS.max_generated_side_pixels:,}",
            f"{LIMITS.max_generated_pixels:,} pixels",
        ),
        "guidance_scale": (f"{LIMITS.max_guidance_scale:,.0f}",),
        "pictures of one request": (f"{LIMITS.max_request_pictures}",),
        "JSON": (f"{LIMITS.max_json_depth} levels", f"{LIMITS.max_json_values:,} values"),
        "reading a reply": (f"{sockets.write_bytes // KIB} KiB within {sockets.write_s:g} s",),
        "reply": (f"{settings.max_response_bytes:,}",),
    }
    for name, texts in values.items():
        for text in texts:
            assert text in told[name], name
