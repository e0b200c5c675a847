"""Measures what a model draws of its subject, and what it has kept, from features of pictures.

Each measure has a number for every drawing; their mean is reported with its interval. A table in
docs/measurements.md says what each one means.

Legend: N drawings, M instance images, G class pictures, D width of a feature. Features are float64
and of length 1, so that a product is a cosine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

Picture = npt.NDArray[np.uint8]
Features = npt.NDArray[np.float64]
Values = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

# A drawing nearer to an instance image than this share of the distance at which the instance images
# lie from each other is a copy. Found on drawings and photographs: docs/measurements.md.
COPY_SHARE = 0.1
_COPY_SIDE = 16  # pixels of the thumbnails in which copies are looked for
_COPY_CROP = 0.9  # of a side: what a copy may show of an instance image
KNOWN_SHARE = 0.8  # of a class's pictures that must be read alike, for their reading to count
_RESAMPLES = 2_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """The mean of a measure over drawings, and its 95 % interval."""

    mean: float
    low: float
    high: float
    of: int


def summarised(values: Values) -> Measure:
    """Return the mean of values [N] with the bootstrap's 95 % interval (Efron 1979, percentiles).

    It is drawn with a fixed seed, so that equal values have equal intervals.
    """
    generator = np.random.default_rng(0)
    means = generator.choice(values, (_RESAMPLES, len(values))).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Measure(mean=float(values.mean()), low=float(low), high=float(high), of=len(values))


def of_length_one(features: Features) -> Features:
    """Return features [N,D] divided by their lengths; one of length 0 stays as it is."""
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    scaled: Features = features / np.where(lengths > 0, lengths, 1.0)
    return scaled


def subject_rank(drawn: Features, instance: Features, others: Features) -> Values:
    """Return [N] how far instance images [M,D] come before other pictures [G,D], for each drawing.

    The average precision of the instance images where all M + G are ranked by their cosine to the
    drawing (Finer-Personalization Rank, arXiv 2512.19026): 1 if they all come first.
    """
    gallery = np.concatenate([instance, others])
    order = np.argsort(-(drawn @ gallery.T), axis=1, kind="stable")
    hits = order < len(instance)
    precision = np.cumsum(hits, axis=1) / np.arange(1, len(gallery) + 1)
    found: Values = (precision * hits).sum(axis=1) / len(instance)
    return found


def likeness(drawn: Features, instance: Features) -> Values:
    """Return [N] the mean cosine of each drawing to the instance images [M,D].

    For drawings of the class prompt it is the PRES of DreamBooth's paper (section 4.3), where less
    is better.
    """
    means: Values = (drawn @ instance.T).mean(axis=1)
    return means


def kept(drawn: Features, instance: Features, own: Features) -> Values:
    """Return [N] 1 where a drawing of a class has its nearest picture in the class, 0 elsewhere.

    own: pictures of the class [G,D]. instance: the subject's pictures [M,D].
    """
    nearer = (drawn @ own.T).max(axis=1) >= (drawn @ instance.T).max(axis=1)
    found: Values = nearer.astype(np.float64)
    return found


def variety(drawn: Features) -> Values:
    """Return [N] the mean distance, 1 - cosine, of each drawing to the N - 1 others.

    Raises ValueError below two drawings.
    """
    if len(drawn) < 2:
        raise ValueError("the variety of pictures needs two at least")
    distances = 1 - drawn @ drawn.T
    np.fill_diagonal(distances, 0)
    of_each: Values = distances.sum(axis=1) / (len(drawn) - 1)
    return of_each


def copied(drawn: Sequence[Picture], instance: Sequence[Picture]) -> Values:
    """Return [N] 1 where a drawing is a copy of an instance image, 0 elsewhere.

    It is one where its distance, 1 - correlation of small thumbnails, to an instance image or its
    middle, as it is or mirrored, is below COPY_SHARE of the median distance of the instance images
    to their own nearest one: the spread of real pictures of the subject sets the limit. Features
    would not do: they are trained to overlook where things stand. Raises ValueError below two
    instance images.
    """
    if len(instance) < 2:
        raise ValueError("the spread of instance images needs two at least")
    views = [_thumbnails([view[at] for view in map(_views, instance)]) for at in range(4)]

    def distances(rows: Features) -> Values:
        return np.asarray(1 - np.max([rows @ view.T for view in views], axis=0))

    between = distances(views[0])
    np.fill_diagonal(between, np.inf)
    limit = COPY_SHARE * float(np.median(between.min(axis=1)))
    found: Values = (distances(_thumbnails(drawn)).min(axis=1) < limit).astype(np.float64)
    return found


def _views(picture: Picture) -> list[Picture]:
    """Return a picture and its middle, each as it is and mirrored."""
    height, width = picture.shape[:2]
    top, left = (round(side * (1 - _COPY_CROP) / 2) for side in (height, width))
    middle = picture[top : height - top, left : width - left]
    return [picture, picture[:, ::-1], middle, middle[:, ::-1]]


def _thumbnails(pictures: Sequence[Picture]) -> Features:
    """Return thumbnails without their mean, of length 1, whose products are correlations."""
    size = (_COPY_SIDE, _COPY_SIDE)
    small = [
        np.asarray(Image.fromarray(np.ascontiguousarray(one)).resize(size, Image.Resampling.BOX))
        for one in pictures
    ]
    return of_length_one(np.stack([one.ravel() - one.mean() for one in small]))


def better_fit(elsewhere: Values, plain: Values) -> Values:
    """Return [N] 1 where a drawing fits a prompt better than 95 % of other drawings fit it.

    elsewhere: the fit of the prompt's own drawings [N]. plain: that of drawings of the subject
    without a place, to the same prompt.
    """
    found: Values = (elsewhere > np.quantile(plain, 0.95)).astype(np.float64)
    return found


def most_often(labels: Labels) -> int:
    """Return the label that is read most often in labels [N]."""
    values, counts = np.unique(labels, return_counts=True)
    return int(values[counts.argmax()])


def read_alike(drawn: Labels, own: Labels, akin: npt.NDArray[np.bool_]) -> Values | None:
    """Return [N] 1 where a drawing is read as a class of the `own` pictures, or as one akin to it.

    None where the classifier has no class for these pictures: where fewer than KNOWN_SHARE of them
    are read as akin to another one. drawn [N], own [G]: the classes that are read. akin: as
    `akin_classes` returns it.
    """
    between = akin[np.ix_(own, own)]
    np.fill_diagonal(between, False)
    if not len(own) or between.any(axis=0).mean() < KNOWN_SHARE:
        return None
    return np.asarray(akin[np.ix_(own, drawn)].any(axis=0), np.float64)


def akin_classes(weights: Features) -> npt.NDArray[np.bool_]:
    """Return [K,K] which classes of a classifier look alike, by its last layer's weights [K,D].

    Rows of classes that look alike point in like directions: those of dogs' breeds, for example.
    Two classes are neighbours where each is among the other's five nearest; akin are those at most
    three neighbours apart.
    """
    rows = of_length_one(weights)
    cosines = rows @ rows.T
    np.fill_diagonal(cosines, -np.inf)
    near = np.zeros(cosines.shape)
    np.put_along_axis(near, np.argsort(-cosines, axis=1)[:, :5], 1, axis=1)
    steps = np.minimum(near, near.T) + np.eye(len(rows))
    found: npt.NDArray[np.bool_] = np.linalg.matrix_power(steps, 3) > 0
    return found
