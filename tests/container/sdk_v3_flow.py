"""Runs a training job with SageMaker's Python SDK v3 in a local container.

Run by test_local_mode.py in the SDK's own environment as `sdk_v3_flow.py JSON`; prints one JSON
line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from sagemaker.core.training.configs import Compute, InputData
from sagemaker.train import ModelTrainer
from sagemaker.train.model_trainer import Mode

given = json.loads(sys.argv[1])
ModelTrainer(
    training_mode=Mode.LOCAL_CONTAINER,
    training_image=given["image"],
    compute=Compute(instance_type="local_cpu", instance_count=1),
    hyperparameters=given["hyperparameters"],
    role="arn:aws:iam::111111111111:role/anything",
    local_container_root=given["root"],
).train(
    [
        InputData(channel_name="training", data_source=given["training"]),
        InputData(channel_name="model", data_source=given["model"]),
    ],
    wait=True,
)
artifacts = Path(given["root"]) / "compressed_artifacts"
print(json.dumps({"files": sorted(path.name for path in artifacts.iterdir())}))
