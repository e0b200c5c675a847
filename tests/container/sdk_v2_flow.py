"""Makes the published notebook's calls with SageMaker's Python SDK v2 in local mode.

Run by test_local_mode.py in the SDK's own environment as `sdk_v2_flow.py FLOW JSON`; prints one
JSON line with the results.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sagemaker.deserializers import JSONDeserializer
from sagemaker.estimator import Estimator
from sagemaker.local import LocalSession
from sagemaker.predictor import Predictor
from sagemaker.serializers import IdentitySerializer

ROLE = "arn:aws:iam::111111111111:role/anything"


def session(given: dict[str, Any]) -> Any:
    made = LocalSession()
    made.config = {
        "local": {
            "local_code": True,
            "container_root": given["root"],
            "serving_port": given["port"],
        }
    }
    return made


def estimator(given: dict[str, Any], made: Any, **more: Any) -> Any:
    options: dict[str, Any] = {
        "role": ROLE,
        "image_uri": given["image"],
        "instance_count": given.get("hosts", 1),
        "instance_type": "local",
        "model_uri": given.get("model"),
        "hyperparameters": given["hyperparameters"],
        "output_path": "file://" + given["output"],
        "sagemaker_session": made,
        "max_run": 360000,
        **more,
    }
    return Estimator(**options)


def fit(given: dict[str, Any]) -> dict[str, Any]:
    made = session(given)
    more = {}
    if given.get("source_dir"):
        more = {"source_dir": given["source_dir"], "entry_point": "transfer_learning.py"}
    try:
        estimator(given, made, **more).fit({"training": "file://" + given["training"]})
    except RuntimeError as error:
        return {"raised": str(error)}
    return {"files": sorted(path.name for path in Path(given["output"]).iterdir())}


def picture(item: Any) -> dict[str, Any]:
    if isinstance(item, str):
        decoded = Image.open(io.BytesIO(base64.b64decode(item)))
        return {"format": decoded.format, "size": list(decoded.size)}
    pixels = np.array(item)
    return {"shape": list(pixels.shape), "low": int(pixels.min()), "high": int(pixels.max())}


def fit_deploy_predict(given: dict[str, Any]) -> dict[str, Any]:
    made = session(given)
    fitted = estimator(given, made)
    fitted.fit({"training": "file://" + given["training"]})
    predictor = fitted.deploy(
        initial_instance_count=1, instance_type="local", predictor_cls=Predictor
    )
    result: dict[str, Any] = {"replies": {}}
    try:
        predictor.serializer, predictor.deserializer = IdentitySerializer(), JSONDeserializer()
        payload = {
            "prompt": given["prompt"],
            "num_inference_steps": 3,
            "guidance_scale": 3.5,
            "num_images_per_prompt": 2,
            "seed": 1,
        }
        for accept in ("application/json", "application/json;jpeg"):
            text = predictor.predict(
                given["prompt"].encode("utf-8"),
                {"ContentType": "application/x-text", "Accept": accept},
            )
            asked = predictor.predict(
                json.dumps(payload).encode("utf-8"),
                {"ContentType": "application/json", "Accept": accept},
            )
            result["replies"][accept] = {
                "text": {**text, "generated_image": picture(text["generated_image"])},
                "json": {
                    **asked,
                    "generated_images": [picture(item) for item in asked["generated_images"]],
                },
            }
        wrong = predictor.predict(
            b'{"prompt": "x", "widht": 64}',
            {"ContentType": "application/json", "Accept": "application/json"},
        )
        result["wrong"] = wrong
    finally:
        predictor.delete_endpoint()
    return result


def transform(given: dict[str, Any]) -> dict[str, Any]:
    made = session(given)
    fitted = estimator(given, made)
    fitted.fit({"training": "file://" + given["training"]})
    transformer = fitted.transformer(
        instance_count=1,
        instance_type="local",
        output_path="file://" + given["transformed"],
        accept="application/json;jpeg",
        strategy="SingleRecord",
    )
    transformer.transform(
        "file://" + given["requests"],
        content_type="application/json",
        logs=False,  # local mode has no CloudWatch logs of a transform job
    )
    written = {}
    for path in sorted(Path(given["transformed"]).rglob("*.out")):
        reply = json.loads(path.read_text())
        written[path.name] = [picture(item) for item in reply["generated_images"]]
    return {"written": written}


FLOWS = {"fit": fit, "fit_deploy_predict": fit_deploy_predict, "transform": transform}


if __name__ == "__main__":
    logging.getLogger("sagemaker.telemetry.telemetry_logging").disabled = True
    print(json.dumps(FLOWS[sys.argv[1]](json.loads(sys.argv[2]))))
