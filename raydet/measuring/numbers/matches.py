"""Result of matching: the outcome of every detection and every labelled box, and the matching rules.

All measurements start from it: AP and AR, intervals, slices, comparisons.
"""

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from raydet.tables.columns import Flags, Floats, Integers

BitSets = npt.NDArray[np.unsignedinteger]

COCO_IOU_THRESHOLDS: tuple[float, ...] = tuple(np.linspace(0.5, 0.95, 10).tolist())
"""As in pycocotools: np.linspace, not multiples of 0.05, which round differently."""
COCO_AREAS: dict[str, tuple[float, float]] = {
    "all": (0.0, 1e10),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}
"""Name → smallest and largest area in square pixels, both inclusive."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Rules by which detections are matched with the truth.

    Attributes:
        iou_thresholds: Ascending; at most 64.
        areas: Names and bounds of the size classes; the first covers all sizes.
        max_detections: Limits of detections per class and image, by descending score (COCO), ascending; detections
            beyond the last limit are not matched.
        class_agnostic: All classes count as one.
    """

    iou_thresholds: tuple[float, ...] = COCO_IOU_THRESHOLDS
    areas: tuple[tuple[str, tuple[float, float]], ...] = tuple(COCO_AREAS.items())
    max_detections: tuple[int, ...] = (1, 10, 100)
    class_agnostic: bool = False


COCO = Protocol()


@dataclass(frozen=True, kw_only=True)
class Matches:
    """Outcome of every detection and every labelled box of some images.

    Images are in ascending id order. Detections are ordered by image, category and descending score (ties in input
    order); those beyond the last of `protocol.max_detections` of their class and image are left out.
    A is the number of size classes, T the number of IoU thresholds. Sets of thresholds are bits, bit t for threshold t,
    in the smallest unsigned integer that holds T bits.

    Attributes:
        num_categories: Number of classes; 1 if they count as one.
        image_ids: int64 [I], ascending, all images including those without boxes.
        detection_image: Row in `image_ids`, int32 [D].
        detection_category: int32 [D]; all 0 if classes count as one.
        detection_row: Row in the `DetectionColumns`, int64 [D]; -1 after `concatenate`.
        scores: float64 [D].
        rank: Position among the detections of its image and class, from 0, int32 [D].
        true_positive: Thresholds at which the detection found a box that counts, unsigned [A, D].
        ignored: Thresholds at which the detection does not count, unsigned [A, D].
        truth_image: Row in `image_ids`, int32 [G].
        truth_category: int32 [G].
        truth_row: Row in the `TruthColumns`, int64 [G]; -1 after `concatenate`.
        truth_ignored: True if the box does not count in a size class (crowd, or another size), bool [A, G].
        truth_found: Thresholds at which a detection matched the box, over all sizes, unsigned [G].
    """

    protocol: Protocol
    num_categories: int
    image_ids: Integers
    detection_image: npt.NDArray[np.int32]
    detection_category: npt.NDArray[np.int32]
    detection_row: Integers
    scores: Floats
    rank: npt.NDArray[np.int32]
    true_positive: npt.NDArray[np.unsignedinteger]
    ignored: npt.NDArray[np.unsignedinteger]
    truth_image: npt.NDArray[np.int32]
    truth_category: npt.NDArray[np.int32]
    truth_row: Integers
    truth_ignored: Flags
    truth_found: npt.NDArray[np.unsignedinteger]


def bits_type(num_thresholds: int) -> type[np.unsignedinteger]:
    """Return the smallest unsigned integer type with a bit for each threshold."""
    for bits in (np.uint8, np.uint16, np.uint32):
        if num_thresholds <= np.iinfo(bits).bits:
            return bits
    return np.uint64


def bits_at(sets: BitSets, threshold_index: int) -> Flags:
    """Return True for each set of thresholds, of any shape, that contains the given threshold."""
    flags: Flags = (sets & sets.dtype.type(1 << threshold_index)) != 0
    return flags


_OF_DETECTIONS = (
    "detection_image",
    "detection_category",
    "detection_row",
    "scores",
    "rank",
    "true_positive",
    "ignored",
)
_OF_TRUTH = ("truth_image", "truth_category", "truth_row", "truth_ignored", "truth_found")


def take_images(matches: Matches, chosen: Flags) -> Matches:
    """Return the matches of the images that a mask, bool [I], selects."""
    new_place = np.cumsum(chosen, dtype=np.int32) - np.int32(1)
    columns: dict[str, Any] = {"image_ids": matches.image_ids[chosen]}
    for names, image in ((_OF_DETECTIONS, matches.detection_image), (_OF_TRUTH, matches.truth_image)):
        kept = np.flatnonzero(chosen[image])
        columns |= {name: getattr(matches, name)[..., kept] for name in names}
    for name in ("detection_image", "truth_image"):
        columns[name] = new_place[columns[name]]
    return replace(matches, **columns)


def concatenate(parts: Sequence[Matches]) -> Matches:
    """Concatenate the matches of several parts, with images in ascending id order and -1 as column rows.

    Raises:
        ValueError: There are no parts, parts differ in protocol or number of classes, or an image is in two parts.
    """
    if not parts:
        raise ValueError("no matches to concatenate")
    first = parts[0]
    if any((part.protocol, part.num_categories) != (first.protocol, first.num_categories) for part in parts):
        raise ValueError("cannot concatenate matches with different protocols or classes")
    # After this, parts that are ranges of ids need no further sorting.
    parts = sorted(parts, key=lambda part: int(part.image_ids[0]) if len(part.image_ids) else -1)
    image_ids = np.concatenate([part.image_ids for part in parts])
    order = np.argsort(image_ids, kind="stable")
    twice = np.flatnonzero(np.diff(image_ids[order]) == 0)
    if len(twice):
        raise ValueError(f"{len(twice)} images are in two parts, for example {image_ids[order[twice[0]]]}")
    place = np.empty(len(order), dtype=np.int32)
    place[order] = np.arange(len(order))
    offsets = np.cumsum([0, *(len(part.image_ids) for part in parts)])
    columns: dict[str, Any] = {"image_ids": image_ids[order]}
    for names in (_OF_DETECTIONS, _OF_TRUTH):
        image = np.concatenate(
            [place[getattr(part, names[0]) + offset] for part, offset in zip(parts, offsets[:-1], strict=True)]
        )
        is_sorted = bool((image[1:] >= image[:-1]).all())
        rows = slice(None) if is_sorted else np.argsort(image, kind="stable")
        columns[names[0]] = image[rows]
        for name in names[1:]:
            if name.endswith("_row"):
                columns[name] = np.full(len(image), -1)
            else:
                columns[name] = np.concatenate([getattr(part, name) for part in parts], axis=-1)[..., rows]
    return replace(first, **columns)


def to_bytes(matches: Matches) -> bytes:
    """Serialise matches, for `from_bytes` in another process that runs the same version of raydet."""
    columns = {name: getattr(matches, name) for name in ("image_ids", *_OF_DETECTIONS, *_OF_TRUTH)}
    header = json.dumps({"protocol": asdict(matches.protocol), "num_categories": matches.num_categories})
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, header=np.array(header), **columns)
    return buffer.getvalue()


def from_bytes(state: bytes) -> Matches:
    """Restore the matches that `to_bytes` serialised.

    Raises:
        ValueError: The bytes are not a valid state.
    """
    try:
        with np.load(io.BytesIO(state), allow_pickle=False) as columns:
            values: dict[str, Any] = {name: columns[name] for name in columns.files}
        header = json.loads(str(values.pop("header")))
        given = header["protocol"]
        protocol = Protocol(
            iou_thresholds=tuple(given["iou_thresholds"]),
            areas=tuple((name, (low, high)) for name, (low, high) in given["areas"]),
            max_detections=tuple(given["max_detections"]),
            class_agnostic=given["class_agnostic"],
        )
        return Matches(protocol=protocol, num_categories=header["num_categories"], **values)
    except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError("not the state of Matches of this version") from error
