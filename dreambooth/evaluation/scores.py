"""Computes scores over picture features, with pure functions.

Legend: N pictures, D width of a feature.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Features = npt.NDArray[np.float64]


def frechet_distance(first: Features, second: Features) -> float:
    """Return the Fréchet distance of features [N,D] and [M,D], each set taken as a Gaussian.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)): Heusel et al. 2017, section 2 (after Dowson and
    Landau 1982). With fewer pictures than D the covariances are singular; nothing is inverted
    here, so nothing needs to be regularised: with centred features A and B, S1 = A'A/(N-1), the
    last trace is the nuclear norm of A B' / sqrt((N-1)(M-1)). Raises ValueError below two pictures.
    """
    if min(len(first), len(second)) < 2:
        raise ValueError("a covariance needs two pictures at least")
    centred = [features - features.mean(axis=0) for features in (first, second)]
    scaled = [part / np.sqrt(len(part) - 1) for part in centred]
    means = float(((first.mean(axis=0) - second.mean(axis=0)) ** 2).sum())
    variances = sum(float((part**2).sum()) for part in scaled)
    common = float(np.linalg.norm(scaled[0] @ scaled[1].T, ord="nuc"))
    return max(0.0, means + variances - 2 * common)
