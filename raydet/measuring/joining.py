"""Join the images of the truth and of the detections by image id or path.

Equal ids alone are no proof, because most folders are numbered from 0. Paths and sizes known on both sides must agree.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import pyarrow as pa

from raydet.common.errors import UserError
from raydet.config.measuring import JoinKey
from raydet.measuring.paths import common_prefixes, num_equal_parts, paths_differ, remove_prefix, sampled
from raydet.tables.columns import BATCH_ROWS, Flags, Integers, image_ids_in, numbers_of, places_in, take_rows
from raydet.tables.table import Table

_MAX_NAMESAKES = 1000
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class ImageKeys:
    """Images of a truth or of detections, one entry per row.

    Attributes:
        image_ids: int64 [R].
        sizes_hw: Height and width in pixels, 0 if unknown, int64 [R, 2].
        paths: Large strings [R], null or empty if unknown; None if no image has a path.
        id_space: Name of the numbering; tables with the same id space assign an image the same id. None if unknown.
    """

    uri: str
    image_ids: Integers
    sizes_hw: Integers
    paths: pa.LargeStringArray | None = None
    id_space: str | None = None

    def take(self, rows: Integers) -> Self:
        """Return the images in the given rows, in that order."""
        return replace(
            self,
            image_ids=self.image_ids[rows],
            sizes_hw=self.sizes_hw[rows],
            paths=None if self.paths is None else take_rows(self.paths, rows),
        )


@dataclass(frozen=True, kw_only=True)
class Join:
    """Mapping between the rows of the detections and the images of a truth.

    Attributes:
        truth_row: Row in the truth of each row of the detections, -1 for none, int64 [R].
        truth_rows: Rows of the truth to measure, ascending, int64 [I].
        found_ids: Image id of each of them in the detections, -1 if it has no row there, int64 [I].
        num_left_out: Number of images that only one side has.
        note: Line about how the images were joined, if worth reporting.
    """

    truth_row: Integers
    truth_rows: Integers
    found_ids: Integers
    num_left_out: int
    note: str | None

    def rows_of(self, num_truth: int) -> Integers:
        """Return the row of the detections for each image of the truth, -1 for none, int64 [num_truth]."""
        rows = np.full(num_truth, -1, dtype=np.int64)
        joined = np.flatnonzero(self.truth_row >= 0)
        rows[self.truth_row[joined]] = joined
        return rows


def list_images(table: Table, among: Integers | None = None) -> ImageKeys:
    """List the images of an images or detections table in row order, or those `among` some ids, without their boxes."""
    ids, sizes, paths = [np.zeros(0, np.int64)], [np.zeros((0, 2), np.int64)], []
    batches = table.iter_batches(key_columns(table), BATCH_ROWS)
    for batch in batches if among is None else rows_among(batches, among):
        ids.append(image_ids_in(batch))
        sizes.append(np.stack([numbers_of(batch.column(name)) for name in ("height", "width")], axis=1))
        paths.append(paths_in(batch))
    return ImageKeys(
        uri=table.uri,
        image_ids=np.concatenate(ids),
        sizes_hw=np.concatenate(sizes),
        paths=pa.concat_arrays(paths) if paths else None,
        id_space=table.manifest.get("id_space"),
    )


def key_columns(table: Table) -> list[str]:
    """Return the columns of an images or detections table that identify an image."""
    return ["image_id", "image.path" if table.kind == "images" else "path", "height", "width"]


def paths_in(batch: pa.RecordBatch) -> pa.LargeStringArray:
    """Return the paths of the images in some rows with `key_columns`."""
    import pyarrow.compute as pc  # slow to import, and JSON input does not need it

    has_image = "image" in batch.schema.names
    path = pc.struct_field(batch.column("image"), "path") if has_image else batch.column("path")
    return path.cast(pa.large_string())


def rows_among(batches: Iterable[pa.RecordBatch], image_ids: Integers) -> Iterator[pa.RecordBatch]:
    """Yield the rows of some images, in order."""
    for batch in batches:
        is_wanted = np.isin(image_ids_in(batch), image_ids)
        yield batch if is_wanted.all() else batch.filter(pa.array(is_wanted))


def join_images(
    truth: ImageKeys, found: ImageKeys, *, by: JoinKey, allow_partial: bool | None, has_every_image: bool = True
) -> Join:
    """Join detections to the images of the truth and check that both describe the same images.

    Paths agree if they are equal after one prefix, the same for all images, is removed from each side: a folder may
    have been moved or renamed, a file may not. Sizes must be equal.

    The truth is in ascending id order, without duplicates, the detections in any order. `allow_partial` leaves out the
    images that only one side has, instead of raising an error; None if the command has no such option. If the
    detections do not list `has_every_image`, unlisted images have no detections.

    Raises:
        UserError: The images differ or are ambiguous.
    """
    truth_row = _rows_by_id(truth, found) if by == "id" else _rows_by_path(truth, found)
    joined = np.flatnonzero(truth_row >= 0)
    note = _check_same(truth, found, truth_row[joined], joined, by)
    has_row = np.zeros(len(truth.image_ids), np.bool_)
    has_row[truth_row[joined]] = True
    ids = np.full(len(has_row), -1, np.int64)
    ids[truth_row[joined]] = found.image_ids[joined]
    num_unknown = _refuse_unknown(truth, found, truth_row, by, has_every_image=has_every_image, allow=allow_partial)
    if not has_every_image:
        everything = np.arange(len(has_row))
        return Join(truth_row=truth_row, truth_rows=everything, found_ids=ids, num_left_out=num_unknown, note=note)
    num_missing = int((~has_row).sum())
    if num_missing and not allow_partial:
        raise UserError(
            f"{found.uri} has no row for {num_missing:,} of the {len(has_row):,} images of {truth.uri}, for example "
            f"image {truth.image_ids[~has_row][0]}; run predict on the images of this truth"
            + ("" if allow_partial is None else ", or pass --allow-partial to measure only the images that both have")
        )
    return Join(
        truth_row=truth_row,
        truth_rows=np.flatnonzero(has_row),
        found_ids=ids[has_row],
        num_left_out=num_unknown + num_missing,
        note=note,
    )


def _refuse_unknown(
    truth: ImageKeys, found: ImageKeys, truth_row: Integers, by: JoinKey, *, has_every_image: bool, allow: bool | None
) -> int:
    """Return the number of detection images unknown to the truth; raise UserError unless they may be left out."""
    if has_every_image and not found.image_ids.size:
        raise UserError(f"{found.uri} has no images; the truth {truth.uri} has {len(truth.image_ids):,}")
    unknown = np.flatnonzero(truth_row < 0)
    has_any = len(unknown) < len(truth_row)
    if unknown.size and not (allow and has_any):
        first = unknown[np.argmin(found.image_ids[unknown])]
        advice = "run predict on the images of this truth"
        if allow is False:
            advice = "--allow-partial measures only the images that both sides have"
        example = f"image {found.image_ids[first]}" if by == "id" else f"{_path_at(found, int(first))!r}"
        raise UserError(
            f"{found.uri} has {'rows for' if has_every_image else 'detections in'} {unknown.size:,} images that the "
            f"truth {truth.uri} does not have, for example {example}"
            + (
                f"; {advice}"
                if has_any
                else ", and none that it has; use the detections and the truth of the same data"
            )
        )
    return len(unknown)


def rows_of_same_images(known: ImageKeys, found: ImageKeys, *, option: str) -> Integers:
    """Find the images that two tables have in common: by id if both use one numbering, otherwise by path.

    `option` is the command-line option that names the known images, for messages.

    Returns:
        Rows of `found`, int64 [M].

    Raises:
        UserError: Nothing identifies the images, or ids or paths are not unique.
    """
    known = known.take(np.argsort(known.image_ids, kind="stable"))
    is_alike = known.id_space is not None and known.id_space == found.id_space
    if not len(known.image_ids):
        return np.zeros(0, np.int64)
    rows = _rows_by_id(known, found) if is_alike else _rows_by_path(known, found, option)
    return np.flatnonzero(rows >= 0)


def _rows_by_id(truth: ImageKeys, found: ImageKeys) -> Integers:
    ids, counts = np.unique(found.image_ids, return_counts=True)
    if len(ids) < len(found.image_ids):
        raise UserError(
            f"{found.uri} has several rows for image {ids[counts > 1][0]}; a detections table has one row per image"
        )
    places, is_known = places_in(truth.image_ids, found.image_ids)
    return np.where(is_known, places, -1)


def _rows_by_path(truth: ImageKeys, found: ImageKeys, option: str = "--join path") -> Integers:
    import pyarrow.compute as pc

    for side in (truth, found):
        if side.paths is None or not _has_path(side).any():
            raise UserError(f"{option} requires image paths, but {side.uri} has none; omit {option.split()[0]}")
    prefixes = common_prefixes(_namesakes(truth, found))
    if prefixes is None:
        return np.full(len(found.image_ids), -1)
    known: list[tuple[Integers, pa.LargeStringArray]] = []
    for side, prefix in zip((truth, found), prefixes, strict=True):
        rest, starts_with_it = remove_prefix(side.paths, prefix)
        rows = np.flatnonzero(starts_with_it)
        rest = take_rows(rest, rows)
        counts = pc.value_counts(rest)
        repeated = counts.filter(pc.greater(counts.field("counts"), 1))
        if len(repeated):
            path = prefix + repeated.field("values")[0].as_py()
            raise UserError(f"{side.uri} has the path {path!r} more than once; {option} requires unique paths")
        known.append((rows, rest))
    (truth_rows, in_truth), (found_rows, in_found) = known
    places = numbers_of(pc.index_in(in_found, value_set=in_truth).fill_null(-1))
    truth_row = np.full(len(found.image_ids), -1, np.int64)
    truth_row[found_rows] = np.where(places >= 0, truth_rows[places], -1)
    return truth_row


def _namesakes(truth: ImageKeys, found: ImageKeys) -> Iterator[tuple[str, str]]:
    """Yield pairs of a truth path and a detection path with the longest equal ending, likely the same image."""
    import pyarrow.compute as pc

    is_truth_few = len(truth.image_ids) < len(found.image_ids)
    few, many = (truth, found) if is_truth_few else (found, truth)
    for row in sampled(np.flatnonzero(_has_path(few))):
        path = _path_at(few, row)
        name = path.rpartition("/")[2]
        alike = pc.or_(pc.equal(many.paths, name), pc.ends_with(many.paths, "/" + name))
        others = many.paths.filter(alike).slice(0, _MAX_NAMESAKES).to_pylist() if many.paths is not None else []
        if others:
            other = max(others, key=lambda other: num_equal_parts(path, other))
            yield (path, other) if is_truth_few else (other, path)


def _check_same(truth: ImageKeys, found: ImageKeys, in_truth: Integers, in_found: Integers, by: JoinKey) -> str | None:
    """Check that the paths and sizes of joined images agree; return a note about what could not be checked.

    `in_truth` and `in_found` are the rows of the joined images on both sides, int64 [J].

    Raises:
        UserError: Paths or sizes differ, or nothing shows that the images are the same.
    """
    sizes = truth.sizes_hw[in_truth], found.sizes_hw[in_found]
    has_size = ((sizes[0] > 0) & (sizes[1] > 0)).all(axis=1)
    bad_size = has_size & (sizes[0] != sizes[1]).any(axis=1)
    has_path, bad_path = np.zeros_like(bad_size), np.zeros_like(bad_size)
    if by == "id" and truth.paths is not None and found.paths is not None and len(in_found):
        has_path = _has_path(truth)[in_truth] & _has_path(found)[in_found]
        rows = zip((truth.paths, found.paths), (in_truth, in_found), strict=True)
        bad_path[has_path] = paths_differ(*(take_rows(paths, own[has_path]) for paths, own in rows))
    bad = np.flatnonzero(bad_path | bad_size)
    if bad.size:
        shown = [_difference(truth, found, int(in_truth[row]), int(in_found[row])) for row in bad[:_SHOWN]]
        remedy = (
            "if these are the same images with other ids, use --join path"
            if bad_path.any()
            else "run predict on the images of this truth"
        )
        raise UserError(
            f"{found.uri} and {truth.uri} describe different images: {bad.size:,} of the {len(in_found):,} images "
            f"joined by {by} differ in path or size: {'; '.join(shown)}; {remedy}"
        )
    if by == "path":
        return "joined by path"
    is_foreign = None not in (truth.id_space, found.id_space) and truth.id_space != found.id_space
    if is_foreign and len(in_found) and not has_path.any():
        raise UserError(
            f"{found.uri} and {truth.uri} number their images independently and share no paths that would identify "
            "them; run predict on the images of this truth"
        )
    is_known = truth.id_space is not None and truth.id_space == found.id_space
    if has_path.any() or is_known or not len(in_found):
        return None
    known = "; checked by size only" if has_size.any() else ", unchecked"
    without = found if not _has_path(found).any() else truth
    return f"joined by image id{known}: {without.uri} has no paths"


def _difference(truth: ImageKeys, found: ImageKeys, in_truth: int, in_found: int) -> str:
    """Describe an image as recorded on both sides."""
    texts = []
    for side, row in ((truth, in_truth), (found, in_found)):
        path, (height, width) = _path_at(side, row), side.sizes_hw[row].tolist()
        size = f"{width} × {height}" if width and height else ""
        texts.append(" ".join(part for part in (repr(path) if path else "", size) if part))
    return f"image {truth.image_ids[in_truth]} is {texts[0]} in the truth, {texts[1]} in the detections"


def _has_path(side: ImageKeys) -> Flags:
    import pyarrow.compute as pc

    if side.paths is None:
        return np.zeros(len(side.image_ids), np.bool_)
    has_path: Flags = numbers_of(pc.binary_length(side.paths)) > 0
    return has_path


def _path_at(side: ImageKeys, row: int) -> str:
    return "" if side.paths is None else side.paths[row].as_py() or ""
