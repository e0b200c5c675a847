"""Write down how a run's model is served and trained elsewhere, with the run's own settings.

Every text of a user is quoted for the language in which it stands, so that what is copied from the
page does the same for any prompt, path or name.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
from pathlib import Path
from typing import Final

from dreambooth.process import addresses
from dreambooth.runs import run_folder
from dreambooth.runs.run_folder import Run
from dreambooth.runs.run_list import OPTIONS
from dreambooth.settings.knob import is_unset, unwrapped
from dreambooth.studio.drafts import EMBEDDED

_MODEL: Final = "pretrained_model"
_OF_THE_BASE: Final = (_MODEL, "base", "prediction_type")
_PATHS: Final = ("fid_features",)
_HEAD: Final = """\
from sagemaker.estimator import Estimator

role = "<your role>"
bucket = "<your bucket>"
image_uri = "<account>.dkr.ecr.<region>.amazonaws.com/dreambooth:latest"
"""
_DEPLOY: Final = """\
predictor = estimator.create_model().deploy(
    initial_instance_count=1,
    instance_type="ml.g5.2xlarge",
    inference_ami_version="al2023-ami-sagemaker-inference-gpu-4-1",  # driver 580, CUDA 13
)
"""


def docker(run: Run, *, has_gpu: bool) -> str:
    """Return the shell commands that build the image and serve the run's model on port 8080."""
    mount = io.StringIO()  # docker reads this value as a line of CSV
    csv.writer(mount, lineterminator="").writerow(
        ["type=bind", f"source={_model_folder(run)}", "target=/opt/ml/model", "readonly"]
    )
    gpus = "--gpus all " if has_gpu else ""
    return (
        "make image\n"
        f"docker run --rm {gpus}-p 8080:8080 --mount {shlex.quote(mount.getvalue())} "
        "dreambooth serve\n"
    )


def serve(run: Run) -> str:
    """Return the shell command that serves the run's model without a container."""
    return f"python -m dreambooth serve --model {shlex.quote(str(_model_folder(run)))}\n"


def request(prompt: str, seed: str, *, port: int) -> str:
    """Return the shell command that asks a server on this machine for one picture."""
    body = {"prompt": prompt, **({"seed": int(seed)} if seed else {})}
    return (
        f"curl -s http://127.0.0.1:{port}/invocations -H 'Content-Type: application/json' "
        f"-H 'Accept: image/png' -o picture.png -d {shlex.quote(json.dumps(body))}\n"
    )


def uploads(run: Run) -> str:
    """Return the shell commands that bring what a job on SageMaker reads to S3."""
    settings = run.settings()
    train = str(settings.get("train", ""))
    lines = ['BUCKET="<your bucket>"']
    if not addresses.is_remote(train):
        pictures = f'"s3://$BUCKET/"{shlex.quote(f"{run.name}/pictures/")}'
        lines.append(f"aws s3 cp --recursive {shlex.quote(train)} {pictures}")
    base = _local_base(run)
    if base is not None:
        lines += _packed(base, _options_of(settings, *_OF_THE_BASE[1:]))
        archive = f'"s3://$BUCKET/"{shlex.quote(f"{run.name}/base.tar.gz")}'
        lines.append(f"aws s3 cp base.tar.gz {archive}")
    return "\n".join(lines) + "\n"


def sagemaker(run: Run) -> str:
    """Return the Python statements that train a run's model on SageMaker and deploy it."""
    settings = run.settings()
    base, train = _local_base(run), str(settings.get("train", ""))
    left_out = [*OPTIONS, *_PATHS, *(_OF_THE_BASE if base is not None else ())]
    given = {name: str(value) for name, value in settings.items() if name not in left_out}
    pictures = repr(train) if addresses.is_remote(train) else 'f"s3://{bucket}/{run}/pictures/"'
    missing = [name for name in _PATHS if not is_unset(unwrapped(settings.get(name)) or "")]
    return "\n".join(
        [
            f"{_HEAD}run = {run.name!r}",
            "",
            *(f"# Left out, for it is a path of this machine: {name}" for name in missing),
            "estimator = Estimator(",
            "    role=role,",
            "    image_uri=image_uri,",
            *(['    model_uri=f"s3://{bucket}/{run}/base.tar.gz",'] if base is not None else []),
            "    instance_count=1,",
            '    instance_type="ml.g5.2xlarge",',
            "    max_run=360000,",
            "    hyperparameters={",
            *(f"        {name!r}: {value!r}," for name, value in given.items()),
            "    },",
            '    output_path=f"s3://{bucket}/{run}/out",',
            ")",
            f'estimator.fit({{"training": {pictures}}})',
            "",
            _DEPLOY,
        ]
    )


def _model_folder(run: Run) -> Path:
    return Path(os.path.abspath(run.folder / run_folder.MODEL))


def _local_base(run: Run) -> str | None:
    """Return the path of the base model, None where the image has it or fetches it by its id."""
    model = unwrapped(run.settings().get(_MODEL)) or ""
    is_here = model != EMBEDDED and not is_unset(model) and os.path.exists(model)
    return os.path.abspath(model) if is_here else None


def _packed(base: str, options: str) -> list[str]:
    """Return the commands that make base.tar.gz of a folder, an archive or a single file."""
    if os.path.isfile(base) and not base.endswith((".tar.gz", ".tgz", ".tar")):
        return [
            f"python -m dreambooth convert {shlex.quote(base)} base{options}",
            "python -m dreambooth pack base base.tar.gz",
        ]
    return [f"python -m dreambooth pack {shlex.quote(base)} base.tar.gz"]


def _options_of(settings: dict[str, object], *names: str) -> str:
    values = ((name, unwrapped(settings.get(name)) or "") for name in names)
    return "".join(
        f" --{name} {shlex.quote(value)}" for name, value in values if not is_unset(value)
    )
