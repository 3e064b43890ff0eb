"""A scored images table and its detections → records whose boxes are the detections that pass a threshold."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydet.common.class_names import is_unused
from raydet.common.console import counted
from raydet.common.errors import UserError, one_line
from raydet.common.redaction import without_secrets
from raydet.common.version import __version__
from raydet.config import PrepareDetectionsConfig
from raydet.measuring.fitting.scores import passing
from raydet.measuring.paths import paths_differ
from raydet.preparation.sources.scored.rows import RecentRows
from raydet.preparation.sources.scored.thresholds import choose_thresholds
from raydet.preparation.sources.source import (
    Finding,
    FindingLog,
    Source,
    SourceImage,
    SourceObjects,
    labelled_for,
    size_hw_of,
)
from raydet.tables.columns import (
    BATCH_ROWS,
    Integers,
    flatten,
    image_ids_in,
    numbers_of,
    places_in,
    starts_of,
)
from raydet.tables.schema import build_schema, parse_metadata
from raydet.tables.table import Table

_ROWS_AT_ONCE = 1024
_LONGEST_REASON = 200
_SCALARS = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_string, pa.types.is_timestamp)


def read_detections(images: Table, found: Table, config: PrepareDetectionsConfig) -> Source:
    """Read the images of a table and, as their boxes, the detections in them.

    A detection with at least the threshold of its class becomes a label, another one with at least
    `config.ignore_threshold` a crowd. Detections may be in any order of images; they are read fastest in that of the
    images, which is that of `predict`.

    Returns:
        One record per image, in the order of the table, with its id, path, size and further columns of scalars.
        Annotations are numbered from 1. If a class has no threshold, the images are labelled for the others only. An
        image that the model could not read has a reason to be rejected.

    Raises:
        UserError: An image has no row of detections, the detections are those of other images, or the thresholds are
            invalid.
    """
    places = _find(images, found)
    thresholds = choose_thresholds(found, config)
    findings = FindingLog()
    fields = _further_fields(images, findings)
    rows = RecentRows(found, ["detections", "error"])

    def records() -> Iterator[SourceImage]:
        position, next_id = 0, 1
        columns = ["image_id", "image.path", "width", "height", *(field.name for field in fields)]
        for batch in images.iter_batches(columns, _ROWS_AT_ONCE):
            own = np.arange(position, position + batch.num_rows)
            labels = _labels(rows.take(own if places is None else places[own]), found.uri, thresholds, config)
            for image, (objects, error) in zip(batch.to_pylist(), labels, strict=True):
                objects.ids.extend(range(next_id, next_id + len(objects.categories)))
                next_id += len(objects.ids)
                yield SourceImage(
                    image_id=image["image_id"],
                    path=(image["image"] or {}).get("path") or f"{position:08d}",
                    objects=objects,
                    size_hw=size_hw_of(image["height"], image["width"]),
                    extra={field.name: image[field.name] for field in fields},
                    refusal=None if error is None else f"not scored: {one_line(error, limit=_LONGEST_REASON)}",
                    locator=str(position),
                )
                position += 1

    source = Source(records, images.num_rows, found.categories, fields, findings, _origin(found, thresholds, config))
    pairs = [*zip(found.categories, thresholds, strict=True)]
    if all(own is not None for _, own in pairs):
        return source
    # A class without a threshold has no labels, but may well be in the images.
    return labelled_for(source, [category.name for category, own in pairs if own is not None])


def _labels(
    rows: pa.RecordBatch, where: str, thresholds: Sequence[float | None], config: PrepareDetectionsConfig
) -> Iterator[tuple[SourceObjects, str | None]]:
    """Yield the boxes of each row, without ids, and the reason why it has no detections."""
    counts, columns = flatten(rows, "detections", ("bbox", "score", "category"), where)
    scores, categories = columns["score"], columns["category"]
    is_label = passing(thresholds, scores, categories)
    is_kept = is_label if config.ignore_threshold is None else is_label | (scores >= config.ignore_threshold)
    owners = np.repeat(np.arange(len(counts)), counts)
    starts = starts_of(np.bincount(owners[is_kept], minlength=len(counts))).tolist()
    boxes_xywh = columns["bbox"][is_kept]
    areas = (boxes_xywh[:, 2] * boxes_xywh[:, 3]).tolist()
    lists = boxes_xywh.tolist(), categories[is_kept].tolist(), areas, (~is_label[is_kept]).tolist()
    all_scores = scores[is_kept].tolist()
    for number, error in enumerate(rows.column("error").to_pylist()):
        own = slice(starts[number], starts[number + 1])
        boxes, classes, own_areas, iscrowd = (values[own] for values in lists)
        yield SourceObjects([], boxes, classes, own_areas, iscrowd, scores=all_scores[own]), error


def _find(images: Table, found: Table) -> Integers | None:
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
            raise UserError(
                f"{found.uri} has no row for {(~is_known).sum():,} of the {counted(len(image_ids), 'image')} of "
                f"{images.uri}, for example image {image_ids[~is_known][0]}; use the detections that predict found in "
                "this table"
            )
        places = order[at]
    _check_same(images, found, places)
    return places


def _ids_of(table: Table) -> Integers:
    return np.concatenate([np.zeros(0, np.int64), *map(image_ids_in, table.iter_batches(["image_id"], BATCH_ROWS))])


def _check_same(images: Table, found: Table, places: Integers | None) -> None:
    """Refuse detections of other images: equal ids are no proof, because most folders are numbered from 0."""
    rows, position, has_paths = RecentRows(found, ["path", "width", "height"]), 0, False
    for batch in images.iter_batches(["image_id", "image.path", "width", "height"], BATCH_ROWS):
        own = np.arange(position, position + batch.num_rows)
        other = rows.take(own if places is None else places[own])
        is_bad = np.zeros(batch.num_rows, np.bool_)
        for name in ("width", "height"):
            sides = numbers_of(batch.column(name)), numbers_of(other.column(name))
            is_bad |= (sides[0] != sides[1]) & (sides[0] > 0) & (sides[1] > 0)
        paths = [
            pc.fill_null(column, "").cast(pa.large_string())
            for column in (pc.struct_field(batch.column("image"), "path"), other.column("path"))
        ]
        both = np.flatnonzero(np.logical_and(*(numbers_of(pc.binary_length(own)) > 0 for own in paths)))
        if len(both):
            has_paths = True
            is_bad[both] |= paths_differ(*(own.take(pa.array(both)) for own in paths))
        if is_bad.any():
            row = int(np.argmax(is_bad))
            shown = [
                f"{path[row].as_py()!r}, {side.column('width')[row]} × {side.column('height')[row]}"
                for path, side in zip(paths, (batch, other), strict=True)
            ]
            raise UserError(
                f"{found.uri} and {images.uri} describe different images: image {batch.column('image_id')[row]} is "
                f"{shown[0]} in the images table, {shown[1]} in the detections; use the detections that predict found "
                "in this table"
            )
        position += batch.num_rows
    spaces = [table.manifest.get("id_space") for table in (images, found)]
    if not has_paths and None not in spaces and spaces[0] != spaces[1]:
        raise UserError(
            f"{found.uri} and {images.uri} number their images independently and share no paths that would identify "
            "them; use the detections that predict found in this table"
        )


def _further_fields(images: Table, findings: FindingLog) -> tuple[pa.Field, ...]:
    """Return the further columns of a table that its copy gets, those of scalars."""
    own = set(build_schema("images").names)
    fields = []
    for field in images.schema:
        if field.name in own:
            continue
        if any(test(field.type) for test in _SCALARS):
            fields.append(pa.field(field.name, field.type))
        else:
            findings.note(Finding("columns without scalar values, dropped", detail=field.name))
    return tuple(fields)


def _origin(found: Table, thresholds: list[float | None], config: PrepareDetectionsConfig) -> Mapping[str, Any]:
    content = parse_metadata(found.schema, kind="detections", where=found.uri)
    pairs = zip(found.categories, thresholds, strict=True)
    by_name = {
        category.name: least
        for index, (category, least) in enumerate(pairs)
        if least is not None or not is_unused(category.name, index)
    }
    return {
        "checkpoint": content.get("checkpoint"),
        "checkpoint_hash": content.get("checkpoint_hash"),
        "detections": without_secrets(found.uri),
        "detections_hash": found.fingerprint,
        "thresholds": by_name,
        "ignore_threshold": config.ignore_threshold,
        "target_precision": config.target_precision,
        "truth": None if config.truth is None else without_secrets(config.truth),
        "raydet_version": __version__,
    }
