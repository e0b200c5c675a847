"""Says what a model draws and what it has kept: shares from 0 to 1, and raw measures beside them.

A table in docs/measurements.md defines each. Pictures of the embedded world are read by its judge;
those of other models are compared by their features, and by the classes that the features' network
was trained to read, where it has some.

Legend: N drawings, M instance images, G class pictures, D width of a feature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dreambooth.evaluation import clean, measures
from dreambooth.evaluation.features import FeatureNetwork, Picture, labels
from dreambooth.evaluation.measures import KNOWN_SHARE, Features, Values, of_length_one
from dreambooth.evaluation.prompt_list import AskedPrompts
from dreambooth.evaluation.text_image import TextImage

SHARES = ("subject", "context", "class_kept", "other_class_kept", "clean")

_LOOK = ("color", "marking", "collar")  # of the judge's heads: what an individual looks like
_SUBJECT = ("species", *_LOOK)
_NOT_FINITE = "no picture of it is finite"
_NO_CLASS_PROMPT = "dataset_info.json gives no class_prompt"
_NO_BASE = "it needs --base"
_NO_CLASS_PICTURES = f"{_NO_BASE}, or class images beside the data's pictures"

Drawn = Mapping[str, Sequence[Picture | None]]
"""Pictures by prompt, in the order of their seeds; None stands for one that is not finite."""
Found = Values | str
"""A number for each drawing, or why there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPictures:
    """The pictures that are measured, all of one size.

    base: drawn by the base model with the same seeds. class_images: given ones, which stand in for
    the base's drawings of the class prompt.
    """

    instance: Sequence[Picture]
    drawn: Drawn
    base: Drawn
    class_images: Sequence[Picture] = ()


def finite(pictures: Sequence[Picture | None]) -> list[Picture]:
    """Return the pictures that are finite."""
    return [picture for picture in pictures if picture is not None]


def measured(
    asked: AskedPrompts,
    pictures: MeasuredPictures,
    network: FeatureNetwork,
    reader: TextImage | None = None,
    base_loss: Callable[[Sequence[Picture]], Values] | None = None,
) -> dict[str, Found]:
    """Return the SHARES by name, then the raw measures that there are.

    base_loss: the base model's `clean.denoising_loss` of pictures.
    """
    seen = _SeenFeatures.by(network, asked, pictures)
    found = {"subject": _subject(seen), **_context(seen, pictures, reader)}
    found["clean"] = _clean(seen.asked, pictures, base_loss)
    own = seen.class_pictures
    if asked.own_class is None:
        found["class_kept"] = _NO_CLASS_PROMPT
    else:
        found |= _kept(seen, asked.own_class, own, "class", missing=_NO_CLASS_PICTURES)
    if asked.other_class is None:
        found["other_class_kept"] = "no prompt of another class is drawn"
    else:
        other = seen.base.get(asked.other_class)
        found |= _kept(seen, asked.other_class, other, "other_class", missing=_NO_BASE)
    return {name: found[name] for name in SHARES} | found | dict(_raw(seen, pictures))


@dataclass(frozen=True, slots=True, kw_only=True)
class _SeenFeatures:
    """The features of pictures as the network gives them, each [N,D]; of drawings by their prompts.

    class_pictures: drawn by the base, or given.
    """

    network: FeatureNetwork
    asked: AskedPrompts
    instance: Features
    drawn: Mapping[str, Features]
    base: Mapping[str, Features]
    class_pictures: Features | None

    @classmethod
    def by(
        cls, network: FeatureNetwork, asked: AskedPrompts, pictures: MeasuredPictures
    ) -> _SeenFeatures:
        """Return the features of all pictures."""
        drawn, base = (
            {prompt: network(finite(row)) for prompt, row in rows.items() if finite(row)}
            for rows in (pictures.drawn, pictures.base)
        )
        class_pictures = base.get(asked.own_class or "")
        if class_pictures is None and pictures.class_images:
            class_pictures = network(pictures.class_images)
        return cls(
            network=network,
            asked=asked,
            instance=network(pictures.instance),
            drawn=drawn,
            base=base,
            class_pictures=class_pictures,
        )

    @property
    def is_judged(self) -> bool:
        """Return whether the network reads what the embedded world's pictures show."""
        return "species" in self.network.heads

    def is_read_as(
        self, drawn: Features, attributes: Sequence[str], those: Features
    ) -> npt.NDArray[np.bool_]:
        """Return [N] whether all attributes of a drawing are read as in most of those pictures."""
        heads = [self.network.heads[name] for name in attributes]
        found: npt.NDArray[np.bool_] = np.all(
            [labels(drawn, head) == measures.most_often(labels(those, head)) for head in heads],
            axis=0,
        )
        return found


def _subject(seen: _SeenFeatures) -> Found:
    drawn = seen.drawn.get(seen.asked.subject)
    if drawn is None:
        return _NOT_FINITE
    if seen.is_judged:
        return seen.is_read_as(drawn, _SUBJECT, seen.instance).astype(np.float64)
    if seen.class_pictures is None:
        return _NO_CLASS_PICTURES if seen.asked.own_class else _NO_CLASS_PROMPT
    pictures = (drawn, seen.instance, seen.class_pictures)
    return measures.subject_rank(*(of_length_one(rows) for rows in pictures))


def _context(
    seen: _SeenFeatures, pictures: MeasuredPictures, reader: TextImage | None
) -> dict[str, Found]:
    """Return the context's share, and CLIP's cosines where they are known."""
    asked = [prompt for prompt in seen.asked.elsewhere if prompt in seen.drawn]
    if seen.is_judged:
        return {"context": _settings_met(seen, asked)}
    if reader is None:
        return {"context": "it needs --text_image, a CLIP model"}
    if not asked or seen.asked.subject not in seen.drawn:
        return {"context": _NOT_FINITE}
    plain = reader.pictures(finite(pictures.drawn[seen.asked.subject]))
    shares, cosines = [], []
    for prompt in asked:
        cosines.append(reader.fit(reader.pictures(finite(pictures.drawn[prompt])), prompt))
        shares.append(measures.better_fit(cosines[-1], reader.fit(plain, prompt)))
    return {"context": np.concatenate(shares), "context_cosine": np.concatenate(cosines)}


def _settings_met(seen: _SeenFeatures, asked: Sequence[str]) -> Found:
    """Return 1 where a drawing shows the setting that the base draws with the same prompt."""
    if not seen.base:
        return _NO_BASE
    met = []
    for prompt in asked:
        own = seen.base.get(prompt)
        if own is not None and seen.is_read_as(own, ["setting"], own).mean() >= KNOWN_SHARE:
            met.append(seen.is_read_as(seen.drawn[prompt], ["setting"], own).astype(np.float64))
    return np.concatenate(met) if met else "no prompt makes the base draw one setting"


def _kept(
    seen: _SeenFeatures, prompt: str, own: Features | None, name: str, *, missing: str
) -> dict[str, Found]:
    """Return `<name>_kept`: 1 where a drawing is of its class, and is not the subject.

    With it comes `<name>_read`, 1 where the class is read, wherever the network has such a class.
    own: pictures of the class. missing: why there are none.
    """
    drawn = seen.drawn.get(prompt)
    if drawn is None:
        return {f"{name}_kept": _NOT_FINITE}
    if own is None:
        return {f"{name}_kept": missing}
    if seen.is_judged:
        read = seen.is_read_as(drawn, ["species"], own)
        kept = read & ~seen.is_read_as(drawn, _LOOK, seen.instance)
        return {f"{name}_kept": kept.astype(np.float64), f"{name}_read": read.astype(np.float64)}
    nearest = measures.kept(*(of_length_one(rows) for rows in (drawn, seen.instance, own)))
    head = seen.network.heads.get("class")
    alike = None
    if head is not None:
        akin = measures.akin_classes(head[0])
        alike = measures.read_alike(labels(drawn, head), labels(own, head), akin)
    if alike is None:
        return {f"{name}_kept": nearest}
    return {f"{name}_kept": nearest * alike, f"{name}_read": alike}


def _clean(
    asked: AskedPrompts,
    pictures: MeasuredPictures,
    base_loss: Callable[[Sequence[Picture]], Values] | None,
) -> Found:
    """Return 1 where a drawing is as clean as the base's drawings of the same prompt."""
    if base_loss is None:
        return _NO_BASE
    found = []
    for prompt in asked.all:
        drawn, own = (finite(rows.get(prompt, ())) for rows in (pictures.drawn, pictures.base))
        if drawn and own:
            found.append(clean.clean(base_loss(drawn), base_loss(own)))
    return np.concatenate(found) if found else _NOT_FINITE


def _raw(seen: _SeenFeatures, pictures: MeasuredPictures) -> Iterator[tuple[str, Found]]:
    """Yield the raw measures of the subject's drawings, then of its class's."""
    instance = of_length_one(seen.instance)
    drawn = seen.drawn.get(seen.asked.subject)
    if drawn is not None:
        yield "likeness", measures.likeness(of_length_one(drawn), instance)
        if len(instance) < 2:
            yield "copies", "it needs two instance images"
        else:
            mine = finite(pictures.drawn[seen.asked.subject])
            yield "copies", measures.copied(mine, pictures.instance)
    prompt = seen.asked.own_class or ""
    if prompt in seen.drawn:
        yield "class_likeness", measures.likeness(of_length_one(seen.drawn[prompt]), instance)
    for name, rows in (("class_variety", seen.drawn), ("base_class_variety", seen.base)):
        if len(rows.get(prompt, ())) > 1:
            yield name, measures.variety(of_length_one(rows[prompt]))
