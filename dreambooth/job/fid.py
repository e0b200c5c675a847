"""Measure how far pictures of the instance prompt are from the instance images (compute_fid)."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator

import torch

from dreambooth.data import images
from dreambooth.data.seeds import derive_seed
from dreambooth.diffusion.model import DiffusionModel
from dreambooth.errors import DatasetError
from dreambooth.evaluation import features, scores, vision_model
from dreambooth.evaluation.features import FeatureNetwork, Picture
from dreambooth.job.previews import Previews, failure_reason
from dreambooth.job.task import Task
from dreambooth.process import logs
from dreambooth.process.progress import Progress

log = logging.getLogger(__name__)

MIN_PICTURES, MAX_PICTURES = 8, 32  # drawn: one per instance image, within these bounds


def check_features(task: Task) -> None:
    """Load the folder of fid_features before training, so that a fault in it ends the job early.

    Raises ModelArtifactError.
    """
    settings = task.hyperparameters
    if settings.compares_features and settings.fid_features:
        folder = vision_model.read(settings.fid_features)
        features.of_vision_model(folder, torch.device("cpu"))


def feature_network(task: Task, model: DiffusionModel) -> FeatureNetwork:
    """Return the network whose features are compared: that of fid_features, or a built-in one."""
    folder = task.hyperparameters.fid_features
    return features.choose(
        vision_model.read(folder) if folder else None,
        model,
        resolution=task.resolution,
        device=task.device,
    )


def print_score(task: Task, model: DiffusionModel, previews: Previews) -> float | None:
    """Print `fid_score=<plain decimal>`, log what it was computed from, and return it.

    Return None, with a warning, where there is no score, so that a tuner sees none and not a false
    one. No error in scoring may cost the trained model; a stop signal still ends the job.
    """
    try:
        return _print_score(task, model, previews)
    except Exception as error:  # a score is not worth failing the job
        log.warning("no fid_score: %s", failure_reason(error))
        return None


def _print_score(task: Task, model: DiffusionModel, previews: Previews) -> float | None:
    network = feature_network(task, model)
    given = list(instance_images(task))
    if len(given) < 2:
        log.warning("no fid_score: it needs two instance images, and there is %d", len(given))
        return None
    count = min(MAX_PICTURES, max(MIN_PICTURES, len(given)))
    seeds = [derive_seed(task.hyperparameters.seed, "fid", number) for number in range(count)]
    drawn = []
    with Progress(count, "drawing for fid_score", stream=sys.stderr, unit="pictures") as progress:
        for number, picture in enumerate(previews.draw(task.dataset.instance_prompt, seeds)):
            if picture is not None:
                drawn.append(picture)
            progress.update(number + 1)
    if len(drawn) < 2:
        log.warning(
            "no fid_score: it needs two drawn pictures that are finite, and there is %d", len(drawn)
        )
        return None
    score = scores.frechet_distance(network(given), network(drawn))
    log.info(
        "Frechet distance between %d instance images and %d drawn with the instance prompt; "
        "features: %s; no regularisation (singular covariances are used as they are)",
        len(given),
        len(drawn),
        network.name,
    )
    logs.metric(f"fid_score={score:.6f}")
    return score


def instance_images(task: Task) -> Iterator[Picture]:
    """Yield the instance images uint8 [H,W,3], resized and centre-cropped to the resolution."""
    sha256 = task.dataset.sha256
    for path in task.dataset.instance_images:
        try:
            picture = images.resize(images.open_image(path, sha256=sha256[path]), task.resolution)
        except DatasetError as error:  # it was readable before training: a flaky mount
            log.warning("left out of the scores: %s", error)
            continue
        left = (picture.width - task.resolution) // 2
        top = (picture.height - task.resolution) // 2
        box = (left, top, left + task.resolution, top + task.resolution)
        yield images.to_array(picture.crop(box))
