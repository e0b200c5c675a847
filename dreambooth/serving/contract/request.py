"""Parse the body of a request, in one of three forms, into one typed request.

text: the body is the prompt. json: JumpStart's object with ``prompt`` and its nine other keys.
huggingface: ``{"inputs": ..., "parameters": {...}}`` as the Hugging Face toolkit takes it.
A key that is null counts as not given. Everything is checked here, before any work. Error messages
are JumpStart's where it has one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from dreambooth.diffusion import sampling_request
from dreambooth.diffusion.sampling_request import SamplingFacts, SamplingRequest
from dreambooth.errors import RequestError
from dreambooth.limits import LIMITS, Limits
from dreambooth.serving.contract import strict_json
from dreambooth.serving.contract.strict_json import printable, shown

Form = Literal["text", "json", "huggingface"]

JSON = "application/json"
TEXT = "application/x-text"
CONTENT_TYPES = (JSON, TEXT)
# In the order of JumpStart's own error message.
PARAMETERS = (
    *("height", "width", "num_inference_steps", "guidance_scale", "negative_prompt"),
    *("num_images_per_prompt", "eta", "seed", "batch_size"),
)
KEYS = ("prompt", *PARAMETERS)
HUGGINGFACE_KEYS = ("inputs", "parameters")
NUM_INFERENCE_STEPS = 50
GUIDANCE_SCALE = 7.5
SEED_COUNT = 2**64
_SERIALIZER_HINT = (
    " (a SageMaker Predictor without a serializer sends application/octet-stream; give it one, or "
    f'call predict(prompt, initial_args={{"ContentType": "{TEXT}"}}))'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A client's request, after all checks.

    prompts, negative_prompts: of equal length, "" where there is no negative prompt. echo: the
    prompt as it was sent, a tuple where it was a list. width, height: pixels. seed: None where the
    server chooses. batch_size: the most pictures of this request in one U-Net call.
    """

    form: Form
    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    echo: str | tuple[str, ...]
    width: int
    height: int
    num_inference_steps: int = NUM_INFERENCE_STEPS
    guidance_scale: float = GUIDANCE_SCALE
    num_images_per_prompt: int = 1
    eta: float = 0.0
    seed: int | None = None
    batch_size: int | None = None

    @property
    def picture_count(self) -> int:
        """Return the number of pictures in the reply."""
        return len(self.prompts) * self.num_images_per_prompt

    def sampling_requests(self, base_seed: int) -> tuple[SamplingRequest, ...]:
        """Return what to draw for each picture, in the order of the prompts.

        Picture i has the seed base_seed + i (modulo 2**64).
        """
        texts = [
            pair
            for pair in zip(self.prompts, self.negative_prompts, strict=True)
            for _ in range(self.num_images_per_prompt)
        ]
        return tuple(
            SamplingRequest(
                prompt=prompt,
                negative_prompt=negative_prompt,
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance_scale,
                width=self.width,
                height=self.height,
                seed=(base_seed + i) % SEED_COUNT,
                eta=self.eta,
            )
            for i, (prompt, negative_prompt) in enumerate(texts)
        )


def parse(
    content_type: str | None,
    body: bytes | bytearray | str,
    facts: SamplingFacts,
    limits: Limits = LIMITS,
) -> GenerationRequest:
    """Return the request that a body holds, with every value checked.

    Raises RequestError: 413 for a body beyond the cap, 415 for a content type other than
    application/json and application/x-text in UTF-8, 400 for the rest.
    """
    kind = media_type(content_type)
    if len(body) > limits.max_body_bytes:
        raise RequestError(
            f"The body has {len(body)} bytes; at most {limits.max_body_bytes} are read.", 413
        )
    if not body:
        raise RequestError("The body is empty: send a prompt.")
    if kind == TEXT:
        return _from_text(strict_json.decode(body), facts, limits)
    payload = strict_json.loads(body, limits=limits)
    if not isinstance(payload, dict):
        raise RequestError(
            "The body's JSON must be an object with a 'prompt' key, such as "
            f'{{"prompt": "a photo of a cat"}}, not {shown(payload)}.'
        )
    payload = _given(payload)
    if "inputs" in payload and "prompt" not in payload:
        return _from_huggingface(payload, facts, limits)
    _check_keys(payload, KEYS)
    if "prompt" not in payload:
        raise RequestError("Input payload must contain 'prompt' key.")
    return _from_fields("json", "prompt", payload["prompt"], payload, facts, limits)


def media_type(header: str | None) -> str:
    """Return the media type of a Content-Type: one of CONTENT_TYPES.

    Case is ignored, and so are parameters other than charset. Raises RequestError (415) for other
    types, for a charset other than UTF-8, and for JumpStart's bare words (``;jpeg``), which belong
    in Accept.
    """
    kind, *parameters = [part.strip() for part in (header or "").lower().split(";")]
    hint = _SERIALIZER_HINT if kind in ("", "application/octet-stream") else ""
    refusal = RequestError(
        f"Unsupported content type {printable(header or '(none)')}: send {JSON} or {TEXT}{hint}.",
        415,
    )
    if kind not in CONTENT_TYPES:
        raise refusal
    for parameter in parameters:
        name, equals, value = parameter.partition("=")
        if parameter and not equals:
            raise refusal
        if name.strip() == "charset" and value.strip().strip('"') not in ("utf-8", "utf8"):
            raise RequestError(
                f"Unsupported charset {printable(value)} in the content type: send UTF-8.", 415
            )
    return kind


def _from_text(body: str, facts: SamplingFacts, limits: Limits) -> GenerationRequest:
    if "\0" in body:
        raise RequestError("The body holds NUL characters; send plain UTF-8 text.")
    prompt = body
    if body.strip()[:1] == '"':
        # Published notebooks send json.dumps(prompt); a plain prompt may begin with a quote too.
        try:
            value = strict_json.loads(body, limits=limits)
        except RequestError:
            value = None
        prompt = value if isinstance(value, str) else body
    _check_length("prompt", prompt, limits)
    request = GenerationRequest(
        form="text",
        prompts=(prompt,),
        negative_prompts=("",),
        echo=body,
        width=facts.resolution,
        height=facts.resolution,
        num_inference_steps=min(NUM_INFERENCE_STEPS, facts.max_steps),
    )
    sampling_request.check(facts, request.sampling_requests(0)[0], limits=limits)
    return request


def _from_huggingface(
    payload: Mapping[str, Any], facts: SamplingFacts, limits: Limits
) -> GenerationRequest:
    _check_keys(payload, HUGGINGFACE_KEYS)
    parameters = payload.get("parameters", {})
    if not isinstance(parameters, dict):
        raise RequestError(f"parameters must be an object, got {shown(parameters)}.")
    parameters = _given(parameters)
    _check_keys(parameters, PARAMETERS)
    return _from_fields("huggingface", "inputs", payload["inputs"], parameters, facts, limits)


def _from_fields(
    form: Form,
    name: str,
    prompt: object,
    given: Mapping[str, Any],
    facts: SamplingFacts,
    limits: Limits,
) -> GenerationRequest:
    prompts = _texts(name, prompt, limits)
    request = GenerationRequest(
        form=form,
        prompts=prompts,
        negative_prompts=_negative_prompts(prompt, given, limits),
        echo=prompt if isinstance(prompt, str) else prompts,
        height=_side("height", given, facts),
        width=_side("width", given, facts),
        num_inference_steps=_count(
            "num_inference_steps", given, min(NUM_INFERENCE_STEPS, facts.max_steps)
        ),
        guidance_scale=_number("guidance_scale", given, GUIDANCE_SCALE),
        num_images_per_prompt=_count("num_images_per_prompt", given, 1),
        eta=_number("eta", given, 0.0),
        seed=_whole("seed", given["seed"]) if "seed" in given else None,
        batch_size=_batch_size(given, limits),
    )
    if request.picture_count > limits.max_request_pictures:
        raise RequestError(
            f"{len(prompts)} prompt(s) x num_images_per_prompt {request.num_images_per_prompt} "
            f"make {request.picture_count} pictures; one request may ask for "
            f"{limits.max_request_pictures}."
        )
    first = request.sampling_requests(0)[0]
    seed = 0 if request.seed is None else request.seed
    sampling_request.check(facts, replace(first, seed=seed), limits=limits)
    scale, eta = float(request.guidance_scale), float(request.eta)
    return replace(request, guidance_scale=scale, eta=eta)


def _given(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return a request's object without the known keys that are null, which means "not given"."""
    known = (*KEYS, *HUGGINGFACE_KEYS)
    return {key: value for key, value in payload.items() if value is not None or key not in known}


def _check_keys(payload: Mapping[str, Any], valid: Sequence[str]) -> None:
    for key in payload:
        if key not in valid:
            raise RequestError(
                f"Input payload contains an invalid key {printable(key)}. "
                f"Valid keys are {list(valid)}."
            )


def _texts(name: str, value: object, limits: Limits) -> tuple[str, ...]:
    """Return the texts of a string or a list of strings, the forms that JumpStart takes."""
    items = value if isinstance(value, list) else [value]
    texts = tuple(item for item in items if isinstance(item, str))
    if not items or len(texts) < len(items):
        raise RequestError(f"{name} must be a string or a list of string. Got {shown(value)}.")
    if len(texts) > limits.max_request_pictures:
        raise RequestError(
            f"{name} holds {len(texts)} texts; one request may ask for "
            f"{limits.max_request_pictures} pictures."
        )
    for text in texts:
        _check_length(name, text, limits)
    return texts


def _negative_prompts(prompt: object, given: Mapping[str, Any], limits: Limits) -> tuple[str, ...]:
    count = len(prompt) if isinstance(prompt, list) else 1
    value = given.get("negative_prompt", "")
    texts = _texts("negative_prompt", value, limits)
    if isinstance(value, str):
        return texts * count
    if not isinstance(prompt, list) or len(texts) != count:
        raise RequestError(
            f"negative_prompt is a list of {len(texts)}: a list is allowed only beside a list "
            "of as many prompts; a string is used for all prompts."
        )
    return texts


def _check_length(name: str, text: str, limits: Limits) -> None:
    if len(text) > limits.max_prompt_characters:
        raise RequestError(
            f"{name} has {len(text)} characters; at most {limits.max_prompt_characters} are read."
        )


def _whole(name: str, value: object) -> int:
    if type(value) is not int:  # refuses True and False too
        raise RequestError(f"{name} must be an integer, got {shown(value)}.")
    return value


def _count(name: str, given: Mapping[str, Any], default: int) -> int:
    value = _whole(name, given.get(name, default))
    if value < 1:
        raise RequestError(f"{name} must be at least 1, got {value}.")
    return value


def _batch_size(given: Mapping[str, Any], limits: Limits) -> int | None:
    if "batch_size" not in given:
        return None
    value, most = _count("batch_size", given, 1), limits.max_generated_batch
    if value > most:
        raise RequestError(f"batch_size must be at most {most}, got {value}.")
    return value


def _side(name: str, given: Mapping[str, Any], facts: SamplingFacts) -> int:
    value = _count(name, given, facts.resolution)
    if value % facts.unit:
        raise RequestError(f"{name} must be divisible by {facts.unit}, got {value}.")
    return value


def _number(name: str, given: Mapping[str, Any], default: float) -> int | float:
    """Return a number as it was sent, for sentences about it."""
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(f"{name} must be a number, got {shown(value)}.")
    return value
