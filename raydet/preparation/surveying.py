"""What has to be known of all images before the first is written: where they are split, or duplicates left out.

A survey examines every image once and keeps of each its hash and its classes, some fifty bytes. The images themselves
are read a second time when they are written, but not decoded again.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from raydet.preparation.examining import HASH_BYTES, Examine, Rejected
from raydet.preparation.parts import SURVEY_IMAGES, Executor, SourcePart, as_hashes, cut, examine_all
from raydet.preparation.sources.source import SourceImage
from raydet.preparation.splitting import Flags, Hashes, Integers, Labels, choose_validation


@dataclass(frozen=True)
class Survey:
    """What is known of all images of a source, or of those of a part.

    Attributes:
        image_ids: As in the images table, [N].
        is_accepted: Whether the image can be read, [N].
        hashes: Of its content, [N, 2]; zeros where it cannot.
        labels: The classes that are present in each image, by its number from 0.
        reasons: Why those that cannot be read cannot, by their numbers.
    """

    image_ids: Integers
    is_accepted: Flags
    hashes: Hashes
    labels: Labels
    reasons: dict[int, str]


def survey(images: Iterable[SourceImage], examine: Examine, execute: Executor, num_threads: int | None) -> Survey:
    """Examines all images of a source, those with a refusal excepted."""
    look = partial(_survey_part, examine=examine, num_threads=num_threads)
    parts = list(execute(look, cut(images, SURVEY_IMAGES)))
    starts = np.cumsum([0, *(len(part.image_ids) for part in parts[:-1])]).tolist()
    placed = list(zip(parts, starts, strict=True))
    return Survey(
        image_ids=np.concatenate([part.image_ids for part in parts]),
        is_accepted=np.concatenate([part.is_accepted for part in parts]),
        hashes=np.concatenate([part.hashes for part in parts]),
        labels=Labels(
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
    labels = Labels(np.asarray(units, np.int64), np.asarray(classes, np.int64))
    return Survey(np.asarray(image_ids, np.int64), is_accepted, as_hashes(hashes), labels, reasons)


def find_duplicates(hashes: Hashes) -> tuple[Integers, Integers]:
    """The places of those whose content came before, ascending, and for each of them the place where it came first."""
    _, first, group = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    firsts = first[group.reshape(-1)]
    places = np.flatnonzero(firsts != np.arange(len(hashes)))
    return places, firsts[places]


def without(found: Survey, places: Integers, reason: str) -> Survey:
    """The same survey, in which some images are refused and so have no part in anything that follows."""
    is_accepted = found.is_accepted.copy()
    is_accepted[places] = False
    reasons = {**found.reasons, **dict.fromkeys(places.tolist(), reason)}
    kept = is_accepted[found.labels.units]
    labels = Labels(found.labels.units[kept], found.labels.classes[kept])
    return dataclasses.replace(found, is_accepted=is_accepted, labels=labels, reasons=reasons)


def hold_out(found: Survey, *, num_classes: int, val_fraction: float, seed: int) -> Flags:
    """Which images go to validation, [N]; of those that cannot be read none does.

    Raises:
        UserError: There are too few images.
    """
    number_of = np.cumsum(found.is_accepted) - 1
    labels = Labels(number_of[found.labels.units], found.labels.classes)
    is_val = np.zeros(len(found.is_accepted), np.bool_)
    is_val[found.is_accepted] = choose_validation(
        found.hashes[found.is_accepted], labels, num_classes=num_classes, val_fraction=val_fraction, seed=seed
    )
    return is_val


def with_outcome(images: Iterable[SourceImage], found: Survey, wanted: Flags) -> Iterator[SourceImage]:
    """The images that are wanted, each with what the survey found: its hash, or why it must not be read."""
    for number, image in enumerate(images):
        if wanted[number]:
            reason = found.reasons.get(number)
            content_hash = None if reason is not None else found.hashes[number].tobytes()
            yield dataclasses.replace(image, refusal=reason, content_hash=content_hash)
