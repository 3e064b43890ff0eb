"""Images of a table and their rows in a table of detections, matched by image id and checked by path and size."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydet.common.console import counted
from raydet.common.errors import UserError
from raydet.measuring.joining import key_columns, paths_in
from raydet.measuring.paths import paths_differ
from raydet.preparation.sources.scored.rows import RecentRows
from raydet.tables.columns import BATCH_ROWS, Flags, Integers, image_ids_in, numbers_of, places_in
from raydet.tables.table import Table


class OtherImagesError(UserError):
    """Detections of other images than those of the table."""


def places_of(images: Table, found: Table) -> Integers | None:
    """Return the row of the detections of each image, int64 [N]; None if both tables have the same order.

    Raises:
        UserError: An image has no row, or a row is that of another image.
    """
    if not images.num_rows:
        raise UserError(f"{images.uri} has no images")
    image_ids, found_ids = _ids_of(images), _ids_of(found)
    places: Integers | None = None
    if not np.array_equal(image_ids, found_ids):
        order = np.argsort(found_ids)
        at, is_known = places_in(found_ids[order], image_ids) if len(order) else (image_ids, image_ids < 0)
        if not is_known.all():
            raise (UserError if is_known.any() else OtherImagesError)(
                f"{found.uri} has no row for {(~is_known).sum():,} of the {counted(len(image_ids), 'image')} of "
                f"{images.uri}, for example image {image_ids[~is_known][0]}; use {_remedy(images)}"
            )
        places = order[at]
    _check_same(images, found, places)
    return places


def _ids_of(table: Table) -> Integers:
    """Return the image ids of a table in the order of its rows."""
    return np.concatenate([np.zeros(0, np.int64), *map(image_ids_in, table.iter_batches(["image_id"], BATCH_ROWS))])


def _remedy(images: Table) -> str:
    is_images = images.kind == "images"
    return "the detections that predict found in this table" if is_images else "two runs on the same images"


def _check_same(images: Table, found: Table, places: Integers | None) -> None:
    """Refuse detections of other images: equal ids are no proof, because most folders are numbered from 0.

    Nor are equal names in two folders, such as `train/000000.jpg` and `val/000000.jpg`, if each side has numbered its
    own images. Then the path on one side must end with that on the other.
    """
    rows, position, has_paths = RecentRows(found, ["path", "width", "height"]), 0, False
    spaces = [table.manifest.get("id_space") for table in (images, found)]
    is_foreign = None not in spaces and spaces[0] != spaces[1]
    for batch in images.iter_batches(key_columns(images), BATCH_ROWS):
        own = np.arange(position, position + batch.num_rows)
        other = rows.take(own if places is None else places[own])
        is_bad = np.zeros(batch.num_rows, np.bool_)
        for name in ("width", "height"):
            sides = numbers_of(batch.column(name)), numbers_of(other.column(name))
            is_bad |= (sides[0] != sides[1]) & (sides[0] > 0) & (sides[1] > 0)
        paths = [pc.fill_null(paths_in(side), "") for side in (batch, other)]
        both = np.flatnonzero(np.logical_and(*(numbers_of(pc.binary_length(own)) > 0 for own in paths)))
        if len(both):
            has_paths = True
            of_both = [own.take(pa.array(both)) for own in paths]
            is_bad[both] |= paths_differ(*of_both)
            if is_foreign:
                is_bad[both] |= ~(_end_alike(*of_both) | _end_alike(*reversed(of_both)))
        if is_bad.any():
            row = int(np.argmax(is_bad))
            shown = [
                f"{path[row].as_py()!r}, {side.column('width')[row]} × {side.column('height')[row]}"
                for path, side in zip(paths, (batch, other), strict=True)
            ]
            raise OtherImagesError(
                f"{images.uri} and {found.uri} describe different images: image {batch.column('image_id')[row]} is "
                f"{shown[0]} in the first, {shown[1]} in the second; use {_remedy(images)}"
            )
        position += batch.num_rows
    if not has_paths and is_foreign:
        raise OtherImagesError(
            f"{images.uri} and {found.uri} number their images independently and share no paths that would identify "
            f"them; use {_remedy(images)}"
        )


def _end_alike(longer: pa.LargeStringArray, shorter: pa.LargeStringArray) -> Flags:
    """Return a mask of the paths that end with those of the other side, or equal them, bool [N]."""
    own, other = ([f"/{path}" for path in paths.to_pylist()] for paths in (longer, shorter))
    return np.array([path.endswith(end) for path, end in zip(own, other, strict=True)], np.bool_)
