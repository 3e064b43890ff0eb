"""Findings about a data set: detected while it is streamed, counted completely, listed up to a limit."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raydet.common.boxes import Boxes, intersections, xywh_to_xyxy
from raydet.inspection.counting import Counts
from raydet.inspection.rows import Rows
from raydet.tables.columns import Integers

EXTREME_RATIO = 20.0
SAME_PLACE_IOU = 0.95
FAR_LARGER = 4.0
"""An image is far larger than the model's view if its longer side exceeds the model's by this factor."""
RARE_SHARE = 0.01
"""A class is rare if it has fewer boxes than this share of the most frequent class."""
MOST_LISTED = 1000
"""Maximum number of cases listed in the table per kind."""
MEANINGS = {
    "rejected": ("Images left out", "`prepare` rejected them for the reasons given"),
    "identical_images": ("Same image in both tables", "training images must not be used for validation"),
    "class_only_in_data": ("Class missing in the validation data", "its AP cannot be measured"),
    "class_only_in_val": ("Class only in the validation data", "it is measured, but never trained"),
    "class_without_boxes": ("Class without boxes", "listed, but no object has this label"),
    "rare_class": ("Rare class", f"fewer than {RARE_SHARE:.0%} of the boxes of the most frequent class"),
    "image_without_boxes": ("Image without boxes", "correct if it shows no objects, otherwise its labels are missing"),
    "duplicate_boxes": ("Duplicate box", "repeats a box of the same class in the same image"),
    "same_place": ("Two classes at one location", f"boxes of different classes with IoU ≥ {SAME_PLACE_IOU}"),
    "tiny_boxes": ("Box below 1 px²", "too small to detect"),
    "extreme_aspect_ratio": ("Extreme aspect ratio", f"one side is more than {EXTREME_RATIO:.0f} times the other"),
    "large_image": (
        "Image far larger than the model's view",
        f"reduced by a factor above {FAR_LARGER:.0f}; small objects vanish, so consider a larger --image-size or tiles",
    ),
}
"""Title and meaning of each kind; kinds reported by `prepare` are shown under their own name."""


@dataclass(frozen=True, kw_only=True)
class DataFinding:
    """Single finding.

    Attributes:
        split: `data` or `val`.
        kind: Key of `MEANINGS`, or a kind reported by `prepare`.
        table: URI of the table with the affected image; None if the finding does not concern a single table.
        image_id: Affected image; None if it does not concern a single image.
        path: Path of that image; may be empty.
        category: Class name; None if it does not concern a single class.
    """

    split: str
    kind: str
    table: str | None = None
    image_id: int | None = None
    path: str = ""
    category: str | None = None
    detail: str = ""


class Findings:
    """All findings: the count of each kind, and its first cases.

    Attributes:
        counts: Number of cases by split and kind.
        listed: Listed cases by split and kind, at most `MOST_LISTED` each.
    """

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.listed: dict[tuple[str, str], list[DataFinding]] = {}

    def add(self, finding: DataFinding, *, times: int = 1) -> None:
        """Add a case, or several cases of an image that are listed as one."""
        key = (finding.split, finding.kind)
        self.counts[key] += times
        kept = self.listed.setdefault(key, [])
        if len(kept) < MOST_LISTED:
            kept.append(finding)

    def add_many(self, split: str, kind: str, places: Integers, describe: Callable[[int], DataFinding]) -> None:
        """Count all given cases, and describe those that still fit the list."""
        if len(places):
            key = (split, kind)
            self.counts[key] += len(places)
            kept = self.listed.setdefault(key, [])
            kept.extend(describe(place) for place in places[: MOST_LISTED - len(kept)].tolist())

    def to_json(self) -> dict[str, dict[str, int]]:
        """Return the number of cases by split and kind; the table `findings` lists them."""
        splits = dict.fromkeys(split for split, _ in self.counts)
        return {
            split: {kind: number for (own, kind), number in self.counts.items() if own == split} for split in splits
        }

    def sorted_keys(self) -> list[tuple[str, str]]:
        """Return splits and kinds, most important first, followed by the findings of `prepare`."""
        order = {kind: number for number, kind in enumerate(MEANINGS)}
        return sorted(self.counts, key=lambda key: (order.get(key[1], len(order)), key[1], key[0]))


def add_row_findings(findings: Findings, rows: Rows, split: str, names: Sequence[str], model_side_px: int) -> None:
    """Add the findings about some images and their boxes; the model sees images with this longer side in pixels."""
    width, height = rows.boxes_xywh[:, 2], rows.boxes_xywh[:, 3]
    longer, shorter = np.maximum(width, height), np.minimum(width, height)
    sides = rows.sizes_wh.max(axis=1, initial=0.0)

    def note(kind: str, places: Integers, describe: Callable[[int], tuple[int, str, int | None]]) -> None:
        def finding(place: int) -> DataFinding:
            row, detail, category = describe(place)
            return DataFinding(
                split=split,
                kind=kind,
                table=rows.table,
                image_id=int(rows.image_ids[row]),
                path=rows.paths[row].as_py(),
                category=None if category is None else names[category],
                detail=detail,
            )

        findings.add_many(split, kind, places, finding)

    def of_large_image(row: int) -> tuple[int, str, None]:
        return row, f"{rows.sizes_wh[row, 0]:.0f} × {rows.sizes_wh[row, 1]:.0f} px for {model_side_px} px", None

    def of_box(box: int, before: str = "") -> tuple[int, str, int]:
        x, y, w, h = rows.boxes_xywh[box]
        text = f"{before}{w:.4g} × {h:.4g} px at {x:.4g}, {y:.4g}"
        return int(rows.owners[box]), text, int(rows.categories[box])

    first, second = same_places(rows)

    def of_pair(pair: int) -> tuple[int, str, int]:
        return of_box(int(first[pair]), f"and {names[rows.categories[second[pair]]]}: ")

    note("image_without_boxes", np.flatnonzero(rows.num_boxes == 0), lambda row: (row, "", None))
    note("large_image", np.flatnonzero(sides > FAR_LARGER * model_side_px), of_large_image)
    note("tiny_boxes", np.flatnonzero(width * height < 1), of_box)
    is_extreme = (longer > EXTREME_RATIO * shorter) & (width * height >= 1)
    note("extreme_aspect_ratio", np.flatnonzero(is_extreme), of_box)
    note("duplicate_boxes", duplicates(rows), of_box)
    note("same_place", np.arange(len(first)), of_pair)


def add_class_findings(findings: Findings, counts: Counts, split: str, names: Sequence[str]) -> None:
    """Add the findings about the frequency of each class."""
    most = int(counts.boxes.max(initial=0))
    if not most:
        return
    for index in np.flatnonzero(counts.boxes == 0).tolist():
        findings.add(DataFinding(split=split, kind="class_without_boxes", category=names[index]))
    for index in np.flatnonzero((counts.boxes > 0) & (counts.boxes < RARE_SHARE * most)).tolist():
        detail = f"{counts.boxes[index]:,} boxes; the most frequent class has {most:,}"
        findings.add(DataFinding(split=split, kind="rare_class", category=names[index], detail=detail))


def duplicates(rows: Rows) -> Integers:
    """Return the boxes that exactly repeat an earlier box of the same image and class, in ascending order."""
    keys = (*rows.boxes_xywh.T, rows.categories, rows.owners)
    order = np.lexsort((rows.numbers, *keys))
    is_same = np.ones(max(len(order) - 1, 0), bool)
    for key in keys:
        is_same &= key[order][1:] == key[order][:-1]
    return np.sort(order[1:][is_same])


def same_places(rows: Rows) -> tuple[Integers, Integers]:
    """Return pairs of non-crowd boxes of different classes in one image, with an IoU of at least `SAME_PLACE_IOU`."""
    usable = np.flatnonzero(~rows.iscrowd & (rows.boxes_xywh[:, 2:] > 0).all(axis=1))
    order = usable[np.lexsort((rows.boxes_xywh[usable, 0], rows.owners[usable]))]
    boxes_xywh, owners, categories = rows.boxes_xywh[order], rows.owners[order], rows.categories[order]
    # Such boxes start at nearly the same x: in this order, once no neighbour at some distance is within reach, none
    # further along is. The overlap in x is at least SAME_PLACE_IOU of the range that both cover.
    reach = boxes_xywh[:, 0] + boxes_xywh[:, 2] * (1 / SAME_PLACE_IOU - 1) * (1 + 1e-9)
    pairs: list[npt.NDArray[np.int64]] = []
    near = np.arange(len(order))
    for step in range(1, len(order)):
        near = near[near < len(order) - step]
        near = near[(owners[near + step] == owners[near]) & (boxes_xywh[near + step, 0] <= reach[near])]
        if not len(near):
            break
        others = near + step
        is_pair = categories[near] != categories[others]
        is_pair &= _iou(boxes_xywh[near], boxes_xywh[others]) >= SAME_PLACE_IOU
        pairs.append(np.sort(order[np.stack([near[is_pair], others[is_pair]], axis=1)], axis=1))
    first, second = np.concatenate([np.empty((0, 2), np.int64), *pairs]).T
    order = np.lexsort((second, first))
    return first[order], second[order]


def _iou(one_xywh: Boxes, other_xywh: Boxes) -> npt.NDArray[np.float64]:
    """Return the IoU of box pairs, [N, 4] and [N, 4] → [N]."""
    both = intersections(xywh_to_xyxy(one_xywh), xywh_to_xyxy(other_xywh))
    either = one_xywh[:, 2:].prod(axis=1) + other_xywh[:, 2:].prod(axis=1) - both
    return np.asarray(both / np.maximum(either, 1e-12))
