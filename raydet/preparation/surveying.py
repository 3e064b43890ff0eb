"""The survey of all images before the first is written, needed to split them or to drop duplicates.

A survey examines every image once and keeps its hash and its classes, about fifty bytes. The images are read a second
time when they are written, but not decoded again.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from raydet.preparation.examining import HASH_BYTES, Examine, Rejected
from raydet.preparation.parts import SURVEY_IMAGES, Executor, SourcePart, as_hashes, cut, examine_all
from raydet.preparation.sources.source import SourceImage
from raydet.preparation.splitting import Hashes, UnitLabels, choose_validation
from raydet.tables.columns import Flags, Integers


@dataclass(frozen=True)
class Survey:
    """Facts about all images of a source, or about those of a part.

    Attributes:
        image_ids: Ids in the images table, [N].
        is_accepted: True for images that can be read, [N].
        hashes: Hashes of the contents, [N, 2]; zeros for images that cannot be read.
        labels: The classes present in each image, by its index.
        reasons: Reasons for rejection, by index of the image.
    """

    image_ids: Integers
    is_accepted: Flags
    hashes: Hashes
    labels: UnitLabels
    reasons: dict[int, str]


def survey(
    images: Iterable[SourceImage],
    examine: Examine,
    execute: Executor,
    num_threads: int | None,
    images_per_part: int = SURVEY_IMAGES,
) -> Survey:
    """Examine all images of a source except those with a refusal."""
    look = partial(_survey_part, examine=examine, num_threads=num_threads)
    parts = list(execute(look, cut(images, images_per_part)))
    starts = np.cumsum([0, *(len(part.image_ids) for part in parts[:-1])]).tolist()
    placed = list(zip(parts, starts, strict=True))
    return Survey(
        image_ids=np.concatenate([part.image_ids for part in parts]),
        is_accepted=np.concatenate([part.is_accepted for part in parts]),
        hashes=np.concatenate([part.hashes for part in parts]),
        labels=UnitLabels(
            np.concatenate([part.labels.units + start for part, start in placed]),
            np.concatenate([part.labels.classes for part in parts]),
        ),
        reasons={number + start: reason for part, start in placed for number, reason in part.reasons.items()},
    )


def _survey_part(part: SourcePart, examine: Examine, num_threads: int | None) -> Survey:
    image_ids: list[int] = []
    hashes: list[bytes] = []
    reasons: dict[int, str] = {}
    units: list[int] = []
    classes: list[int] = []
    for number, result in enumerate(examine_all(part, examine, num_threads)):
        if isinstance(result, Rejected):
            image_ids.append(result.image_id)
            hashes.append(bytes(HASH_BYTES))
            reasons[number] = result.reason
            continue
        image_ids.append(result.values["image_id"])
        hashes.append(result.content_hash)
        present = set(result.values["objects"]["category"])
        units += [number] * len(present)
        classes += present
    is_accepted = np.ones(len(hashes), np.bool_)
    is_accepted[list(reasons)] = False
    labels = UnitLabels(np.asarray(units, np.int64), np.asarray(classes, np.int64))
    return Survey(np.asarray(image_ids, np.int64), is_accepted, as_hashes(hashes), labels, reasons)


def find_duplicates(hashes: Hashes) -> tuple[Integers, Integers]:
    """Return the indices of repeated contents, ascending, and for each the index of its first occurrence."""
    _, first, group = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    firsts = first[group.reshape(-1)]
    places = np.flatnonzero(firsts != np.arange(len(hashes)))
    return places, firsts[places]


def without(found: Survey, places: Integers, reason: str) -> Survey:
    """Return a copy of a survey in which some images are rejected."""
    is_accepted = found.is_accepted.copy()
    is_accepted[places] = False
    reasons = {**found.reasons, **dict.fromkeys(places.tolist(), reason)}
    kept = is_accepted[found.labels.units]
    labels = UnitLabels(found.labels.units[kept], found.labels.classes[kept])
    return dataclasses.replace(found, is_accepted=is_accepted, labels=labels, reasons=reasons)


def hold_out(found: Survey, *, num_classes: int, val_fraction: float, seed: int) -> Flags:
    """Choose the images for validation, as a mask [N]; rejected images are never chosen.

    Raises:
        UserError: There are too few images.
    """
    number_of = np.cumsum(found.is_accepted) - 1
    labels = UnitLabels(number_of[found.labels.units], found.labels.classes)
    is_val = np.zeros(len(found.is_accepted), np.bool_)
    is_val[found.is_accepted] = choose_validation(
        found.hashes[found.is_accepted], labels, num_classes=num_classes, val_fraction=val_fraction, seed=seed
    )
    return is_val


def with_outcome(images: Iterable[SourceImage], found: Survey, wanted: Flags) -> Iterator[SourceImage]:
    """Yield the wanted images, each with its hash from the survey or its reason for rejection."""
    for number, image in enumerate(images):
        if wanted[number]:
            reason = found.reasons.get(number)
            content_hash = None if reason is not None else found.hashes[number].tobytes()
            yield dataclasses.replace(image, refusal=reason, content_hash=content_hash)
