"""The four functions that SageMaker's inference toolkits call to serve a model folder.

`python -m dreambooth serve` is built from the same parts. Its variables, `DREAMBOOTH_<NAME>` and
`MMS_MAX_RESPONSE_SIZE`, are read once, when the model is loaded. Here those apply that say how to
draw and how long a reply may be. REQUEST_TIMEOUT_S, MAX_QUEUE, MAX_CONNECTIONS, HOST, PORT and
LOG_LEVEL do not: requests wait in the toolkit's own server, which gives them up after its own time
(SAGEMAKER_MODEL_SERVER_TIMEOUT).
"""

from __future__ import annotations

import argparse
import contextlib
import http
import logging
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dreambooth.model_folder import layout
from dreambooth.process import libraries
from dreambooth.serving.contract import error_reply, reply
from dreambooth.serving.contract.reply import Picture
from dreambooth.serving.contract.request import GenerationRequest, media_type, parse
from dreambooth.settings import serve_options

with libraries.importing():
    from dreambooth.serving.engine.engine import Engine, open_engine

log = logging.getLogger(__name__)

_ANY_FORMAT = ", ".join(offered.media_type for offered in reply.FORMATS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A loaded model. Several threads may draw with it; their pictures share U-Net calls."""

    engine: Engine
    max_response_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """A request as received; `predict_fn` parses it, as valid values depend on the model."""

    content_type: str
    content: bytes | bytearray | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The pictures of one request, not encoded yet."""

    request: GenerationRequest
    pictures: Sequence[Picture]
    max_response_bytes: int


def model_fn(model_dir: str) -> Model:
    """Load and warm up a model folder.

    Raises ModelArtifactError for a folder that holds no model, UserError for wrong settings,
    ResourceError for a model that does not fit into memory.
    """
    with _told():
        options = argparse.ArgumentParser()
        serve_options.add_arguments(options)
        settings = serve_options.read(options.parse_args([]), os.environ)
        folder = Path(model_dir)
        layout.validate_folder(folder, linked_weights=False)
        return Model(
            engine=open_engine(folder, settings), max_response_bytes=settings.max_response_bytes
        )


def input_fn(request_body: bytes | bytearray | str, content_type: str) -> Body:
    """Accept a body of a known content type; raise RequestError (415) for any other."""
    with _told():
        media_type(content_type)
    return Body(content_type=content_type, content=request_body)


def predict_fn(data: Body, model: Model) -> Prediction:
    """Check everything that the request asks for, then draw it.

    Raises RequestError, ResourceError (507) or UnavailableError (503).
    """
    with _told():
        request = parse(data.content_type, data.content, model.engine.facts)
        # Refuse what no format could hold before any work; only output_fn knows the Accept header.
        reply.negotiate(_ANY_FORMAT, request, max_response_bytes=model.max_response_bytes)
        seed = secrets.randbelow(2**32) if request.seed is None else request.seed
        requests = request.sampling_requests(seed)
        job = model.engine.submit(requests, most_pictures=request.batch_size)
        return Prediction(
            request=request,
            pictures=job.result(),
            max_response_bytes=model.max_response_bytes,
        )


def output_fn(prediction: Prediction, accept: str) -> tuple[bytes, str] | bytes:
    """Encode the pictures as `accept` asks; return the reply's body and content type.

    The Hugging Face toolkit takes the body alone and sets the content type from `accept`. Raises
    RequestError (406 or 400).
    """
    with _told():
        chosen = reply.negotiate(
            accept, prediction.request, max_response_bytes=prediction.max_response_bytes
        )
        body, content_type = reply.encode(
            prediction.request,
            prediction.pictures,
            chosen,
            max_response_bytes=prediction.max_response_bytes,
        )
    if "sagemaker_huggingface_inference_toolkit" in sys.modules:
        return body
    return body, content_type


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Under a toolkit, raise errors as the toolkit's own, which carry an HTTP status.

    Of others it sends the trace, with the folders of this machine, to the client.
    """
    try:
        yield
    except Exception as error:  # a request's border
        toolkit = sys.modules.get("sagemaker_inference.errors")
        if toolkit is None:
            raise
        said = error_reply.of(error)
        if said.status == 500:
            log.error("the model or a request failed", exc_info=error)
        phrase = http.HTTPStatus(said.status).phrase
        told = toolkit.BaseInferenceToolkitError(said.status, said.message, phrase)
        told.args = (said.message,)  # str() of it is what the Hugging Face toolkit sends
        raise told from None
