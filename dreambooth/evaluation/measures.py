"""Measures what a model draws of its subject, and what it has kept, from features of pictures.

Each measure has a number for every drawing; their mean is reported with its interval. A table in
docs/measurements.md says what each one means.

Legend: N drawings, M instance images, G class pictures, D width of a feature. Features are float64
and of length 1, so that a product is a cosine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Features = npt.NDArray[np.float64]
Values = npt.NDArray[np.float64]

# Above it a picture that is compared flipped too is a copy: with EfficientNet-Lite0 99 % of other
# real photographs of a subject lie below .90, and lightly altered copies above.
COPY_COSINE = 0.90
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


def copied(drawn: Features, instance: Features, flipped: Features) -> Values:
    """Return [N] 1 where a drawing is a copy of an instance image [M,D] or of its mirror image.

    It is one where it is nearer than COPY_COSINE and than the instance images are to each other.
    flipped: the features of the mirror images [M,D].
    """
    between = instance @ instance.T
    np.fill_diagonal(between, -1)
    nearest = np.maximum(drawn @ instance.T, drawn @ flipped.T).max(axis=1)
    found: Values = (nearest > max(COPY_COSINE, float(between.max()))).astype(np.float64)
    return found
