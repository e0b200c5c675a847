"""Say whether a model tells its subjects apart, and bring the shares of several subjects together.

Legend: S subjects, N drawings, M instance images, D width of a feature. Features have length 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dreambooth.evaluation.measures import Features, Values
from dreambooth.evaluation.prompt_list import AskedPrompts
from dreambooth.evaluation.shares import Found


def together(
    asked: Sequence[AskedPrompts], found: Sequence[Mapping[str, Found]]
) -> dict[str, Found]:
    """Return what `shares.measured` found of each subject as one, by the same names.

    Drawings of a class that several subjects share are kept where they are for each of these.
    A share that one subject lacks is lacking, with that subject's reason.
    """
    if len(found) == 1:
        return dict(found[0])
    return {name: _joined(name, asked, [each.get(name) for each in found]) for name in found[0]}


def _joined(name: str, asked: Sequence[AskedPrompts], found: Sequence[Found | None]) -> Found:
    parts: dict[object, Values] = {}
    for number, (each, values) in enumerate(zip(asked, found, strict=True)):
        if values is None or isinstance(values, str):
            return f"{each.subject}: {values or 'it is not measured'}"
        key: object = each.own_class if name == "class_kept" else number
        parts[key] = np.minimum(parts[key], values) if key in parts else values
    return np.concatenate(list(parts.values()))


def nearest_subjects(drawn: Features, galleries: Sequence[Features]) -> Values:
    """Return [N] the number of the subject whose instance images come first for each drawing.

    drawn: [N,D]. galleries: the instance images [M,D] of each subject. All images are ranked by
    their cosine to the drawing; that subject is taken of which an image most probably comes before
    one of another subject (the area under the ROC curve), so that the numbers of images do not
    matter.
    """
    sizes = [len(gallery) for gallery in galleries]
    images = np.concatenate(galleries)
    of = np.repeat(np.arange(len(galleries)), sizes)
    order = np.argsort(drawn @ images.T, axis=1, kind="stable")
    ranks = np.empty(order.shape)
    np.put_along_axis(ranks, order, np.arange(len(images), dtype=np.float64)[None], axis=1)
    areas = []
    for subject, size in enumerate(sizes):
        below = ranks[:, of == subject].sum(axis=1) - size * (size - 1) / 2
        areas.append(below / (size * (len(images) - size)))
    found: Values = np.argmax(areas, axis=0)
    return found


def matrix(drawn: Sequence[Features], galleries: Sequence[Features]) -> Values:
    """Return [S,S] the share of each subject's drawings that come nearest to each subject.

    drawn: the drawings of each subject's instance prompt; a row without any is not a number.
    """
    rows = np.full((len(galleries), len(galleries)), np.nan)
    for number, each in enumerate(drawn):
        if len(each):
            counts = np.bincount(nearest_subjects(each, galleries), minlength=len(galleries))
            rows[number] = counts / len(each)
    return rows


def collapse_rate(confusion: Values) -> float:
    """Return the share of drawings that come nearest to another subject than their own.

    It is the mean of the subjects' shares. confusion: as `matrix` returns it.
    """
    return float(np.nanmean(1 - np.diag(confusion)))
