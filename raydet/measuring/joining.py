"""The images of the truth and those of the detections → which row belongs to which, by image id or by path.

Ids alone prove nothing: most folders are numbered from 0. Paths and sizes that both sides know must agree.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import pyarrow as pa

from raydet.common.errors import UserError
from raydet.config.measuring import JoinKey
from raydet.measuring.paths import behind_prefix, common_prefixes, differ, num_equal_parts, sampled
from raydet.tables.columns import BATCH_ROWS, Flags, Integers, image_ids_in, numbers_of, places_in, take_rows
from raydet.tables.table import Table

_MOST_NAMESAKES = 1000
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class ImageList:
    """The images of a truth or of detections, one entry a row.

    Attributes:
        uri: Where they are listed.
        image_ids: int64 [R].
        sizes_hw: Height and width in pixels, 0 where unknown, int64 [R, 2].
        paths: Large strings [R], null or empty where unknown; None where no image has one.
        id_space: Names what the ids count; tables of one id space give an image the same id. None where unknown.
    """

    uri: str
    image_ids: Integers
    sizes_hw: Integers
    paths: pa.LargeStringArray | None = None
    id_space: str | None = None

    def take(self, rows: Integers) -> Self:
        """Some of the images, in the order given."""
        return replace(
            self,
            image_ids=self.image_ids[rows],
            sizes_hw=self.sizes_hw[rows],
            paths=None if self.paths is None else take_rows(self.paths, rows),
        )


@dataclass(frozen=True, kw_only=True)
class Join:
    """The rows of the detections that belong to the images of a truth.

    Attributes:
        truth_row: For each row of the detections the row of its image in the truth, -1 for none, int64 [R].
        truth_rows: The images to measure, as rows of the truth, rising, int64 [I].
        num_left_out: Images that only one side has.
        note: A line about how the images were joined, where that is worth one.
    """

    truth_row: Integers
    truth_rows: Integers
    num_left_out: int
    note: str | None

    def rows_of(self, num_truth: int) -> Integers:
        """The row of the detections for each image of the truth, -1 for none, int64 [num_truth]."""
        rows = np.full(num_truth, -1, dtype=np.int64)
        joined = np.flatnonzero(self.truth_row >= 0)
        rows[self.truth_row[joined]] = joined
        return rows


def list_images(table: Table) -> ImageList:
    """Lists the images of an images table or a detections table in the order of its rows; boxes are not read."""
    import pyarrow.compute as pc  # takes a while to import, and JSON has no need of it

    is_images = table.kind == "images"
    ids, sizes, paths = [np.zeros(0, np.int64)], [np.zeros((0, 2), np.int64)], []
    columns = ["image_id", "image.path" if is_images else "path", "height", "width"]
    for batch in table.iter_batches(columns, BATCH_ROWS):
        ids.append(image_ids_in(batch))
        sizes.append(np.stack([numbers_of(batch.column(name)) for name in ("height", "width")], axis=1))
        path = pc.struct_field(batch.column("image"), "path") if is_images else batch.column("path")
        paths.append(path.cast(pa.large_string()))
    return ImageList(
        uri=table.uri,
        image_ids=np.concatenate(ids),
        sizes_hw=np.concatenate(sizes),
        paths=pa.concat_arrays(paths) if paths else None,
        id_space=table.manifest.get("id_space"),
    )


def join_images(
    truth: ImageList, found: ImageList, *, by: JoinKey, allow_partial: bool, has_every_image: bool = True
) -> Join:
    """Joins detections to the images of the truth, and makes sure that both speak of the same images.

    Paths agree when they are equal once one prefix, the same for all images, is taken from each side: a folder may
    have been moved or renamed, a file may not. Sizes must be equal.

    Args:
        truth: Its images, by rising id, each once.
        found: The images of the detections, in any order.
        by: Whether the same image has the same id or the same path on both sides.
        allow_partial: Leave out the images that only one side has.
        has_every_image: Whether the detections must list every image of the truth; otherwise, those they do not list
            have no detections.

    Raises:
        UserError: The images differ, or cannot be told apart.
    """
    truth_row = _rows_by_id(truth, found) if by == "id" else _rows_by_path(truth, found)
    joined = np.flatnonzero(truth_row >= 0)
    note = _check_same(truth, found, truth_row[joined], joined, by)
    has_row = np.zeros(len(truth.image_ids), np.bool_)
    has_row[truth_row[joined]] = True
    num_unknown = _refuse_unknown(truth, found, truth_row, by, has_every_image=has_every_image, allow=allow_partial)
    if not has_every_image:
        return Join(truth_row=truth_row, truth_rows=np.arange(len(has_row)), num_left_out=num_unknown, note=note)
    num_missing = int((~has_row).sum())
    if num_missing and not allow_partial:
        raise UserError(
            f"{found.uri} has no row for {num_missing:,} of the {len(has_row):,} images of {truth.uri}, such as image "
            f"{truth.image_ids[~has_row][0]}; run predict on the images of this truth, or measure the images that both "
            "sides have with --allow-partial"
        )
    return Join(
        truth_row=truth_row, truth_rows=np.flatnonzero(has_row), num_left_out=num_unknown + num_missing, note=note
    )


def _refuse_unknown(
    truth: ImageList, found: ImageList, truth_row: Integers, by: JoinKey, *, has_every_image: bool, allow: bool
) -> int:
    """Counts the images of the detections that the truth does not have; refuses them unless they may be left out."""
    if has_every_image and not found.image_ids.size:
        raise UserError(f"{found.uri} holds no image; the truth {truth.uri} has {len(truth.image_ids):,}")
    unknown = np.flatnonzero(truth_row < 0)
    has_any = len(unknown) < len(truth_row)
    if unknown.size and not (allow and has_any):
        first = unknown[np.argmin(found.image_ids[unknown])]
        example = f"image {found.image_ids[first]}" if by == "id" else f"{_path_at(found, int(first))!r}"
        raise UserError(
            f"{found.uri} has {'rows of' if has_every_image else 'detections in'} {unknown.size:,} images that the "
            f"truth {truth.uri} does not have, such as {example}"
            + (
                "; --allow-partial measures the images that both sides have"
                if has_any
                else ", and none that the truth has: they are of different data"
            )
        )
    return len(unknown)


# By id, by path.


def _rows_by_id(truth: ImageList, found: ImageList) -> Integers:
    ids, counts = np.unique(found.image_ids, return_counts=True)
    if len(ids) < len(found.image_ids):
        raise UserError(
            f"{found.uri} has image {ids[counts > 1][0]} more than once; a detections table has one row for each image"
        )
    places, is_known = places_in(truth.image_ids, found.image_ids)
    return np.where(is_known, places, -1)


def _rows_by_path(truth: ImageList, found: ImageList) -> Integers:
    import pyarrow.compute as pc

    for side in (truth, found):
        if side.paths is None or not _has_path(side).any():
            raise UserError(f"--join path needs the paths of the images, and {side.uri} has none; leave out --join")
    prefixes = common_prefixes(_namesakes(truth, found))
    if prefixes is None:
        return np.full(len(found.image_ids), -1)
    known: list[tuple[Integers, pa.LargeStringArray]] = []
    for side, prefix in zip((truth, found), prefixes, strict=True):
        rest, begins = behind_prefix(side.paths, prefix)
        rows = np.flatnonzero(begins)
        rest = take_rows(rest, rows)
        counts = pc.value_counts(rest)
        repeated = counts.filter(pc.greater(counts.field("counts"), 1))
        if len(repeated):
            path = prefix + repeated.field("values")[0].as_py()
            raise UserError(f"{side.uri} has the path {path!r} more than once; --join path needs one row for each")
        known.append((rows, rest))
    (truth_rows, in_truth), (found_rows, in_found) = known
    places = numbers_of(pc.index_in(in_found, value_set=in_truth).fill_null(-1))
    truth_row = np.full(len(found.image_ids), -1, np.int64)
    truth_row[found_rows] = np.where(places >= 0, truth_rows[places], -1)
    return truth_row


def _namesakes(truth: ImageList, found: ImageList) -> Iterator[tuple[str, str]]:
    """Pairs of paths, of the truth and of the detections, that end alike as far as any: likely the same image."""
    import pyarrow.compute as pc

    is_truth_few = len(truth.image_ids) < len(found.image_ids)
    few, many = (truth, found) if is_truth_few else (found, truth)
    for row in sampled(np.flatnonzero(_has_path(few))):
        path = _path_at(few, row)
        name = path.rpartition("/")[2]
        alike = pc.or_(pc.equal(many.paths, name), pc.ends_with(many.paths, "/" + name))
        others = many.paths.filter(alike).slice(0, _MOST_NAMESAKES).to_pylist() if many.paths is not None else []
        if others:
            other = max(others, key=lambda other: num_equal_parts(path, other))
            yield (path, other) if is_truth_few else (other, path)


# The same images?


def _check_same(truth: ImageList, found: ImageList, in_truth: Integers, in_found: Integers, by: JoinKey) -> str | None:
    """Refuses joined images whose paths or sizes differ; returns a note on what could not be checked.

    Args:
        truth: One side.
        found: The other side.
        in_truth: Rows of the joined images in it, int64 [J].
        in_found: Likewise, int64 [J].
        by: How they were joined.
    """
    sizes = truth.sizes_hw[in_truth], found.sizes_hw[in_found]
    has_size = ((sizes[0] > 0) & (sizes[1] > 0)).all(axis=1)
    bad_size = has_size & (sizes[0] != sizes[1]).any(axis=1)
    has_path, bad_path = np.zeros_like(bad_size), np.zeros_like(bad_size)
    if by == "id" and truth.paths is not None and found.paths is not None and len(in_found):
        has_path = _has_path(truth)[in_truth] & _has_path(found)[in_found]
        rows = zip((truth.paths, found.paths), (in_truth, in_found), strict=True)
        bad_path[has_path] = differ(*(take_rows(paths, own[has_path]) for paths, own in rows))
    bad = np.flatnonzero(bad_path | bad_size)
    if bad.size:
        shown = [_difference(truth, found, int(in_truth[row]), int(in_found[row])) for row in bad[:_SHOWN]]
        remedy = (
            "where they are the same images numbered otherwise, --join path joins them"
            if bad_path.any()
            else "run predict on the images of this truth"
        )
        raise UserError(
            f"{found.uri} and {truth.uri} are of different images: {bad.size:,} of the {len(in_found):,} that they "
            f"share by {by} differ in path or size: {'; '.join(shown)}; {remedy}"
        )
    if by == "path":
        return "joined by path"
    is_foreign = None not in (truth.id_space, found.id_space) and truth.id_space != found.id_space
    if is_foreign and len(in_found) and not has_path.any():
        raise UserError(
            f"{found.uri} and {truth.uri} number their images independently, and no path shows that they are of the "
            "same ones; run predict on the images of this truth"
        )
    is_known = truth.id_space is not None and truth.id_space == found.id_space
    if has_path.any() or is_known or not len(in_found):
        return None
    known = "; only the sizes could be checked" if has_size.any() else ", unchecked"
    return f"joined by image id{known}: {_without_paths(truth, found)} has no paths"


def _without_paths(truth: ImageList, found: ImageList) -> str:
    return found.uri if found.paths is None or not _has_path(found).any() else truth.uri


def _difference(truth: ImageList, found: ImageList, in_truth: int, in_found: int) -> str:
    """An image as both sides have it."""
    texts = []
    for side, row in ((truth, in_truth), (found, in_found)):
        path, (height, width) = _path_at(side, row), side.sizes_hw[row].tolist()
        size = f"{width} × {height}" if width and height else ""
        texts.append(" ".join(part for part in (repr(path) if path else "", size) if part))
    return f"image {truth.image_ids[in_truth]} is {texts[0]} in the truth, {texts[1]} in the detections"


def _has_path(side: ImageList) -> Flags:
    import pyarrow.compute as pc

    if side.paths is None:
        return np.zeros(len(side.image_ids), np.bool_)
    has_path: Flags = numbers_of(pc.binary_length(side.paths)) > 0
    return has_path


def _path_at(side: ImageList, row: int) -> str:
    return "" if side.paths is None else side.paths[row].as_py() or ""
