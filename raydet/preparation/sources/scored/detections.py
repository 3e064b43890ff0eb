"""A scored images table and its detections → records whose boxes are the detections that pass a threshold."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from raydet.common.class_names import is_unused
from raydet.common.errors import UserError, one_line
from raydet.common.redaction import without_secrets
from raydet.common.version import __version__
from raydet.config import PrepareDetectionsConfig
from raydet.measuring.fitting.scores import passing
from raydet.preparation.sources.scored.pairing import places_of
from raydet.preparation.sources.scored.rows import RecentRows
from raydet.preparation.sources.scored.thresholds import choose_thresholds
from raydet.preparation.sources.source import (
    ORIGIN_KEY,
    Finding,
    FindingLog,
    Source,
    SourceImage,
    SourceObjects,
    labelled_for,
    size_hw_of,
)
from raydet.tables import storage
from raydet.tables.columns import flatten, starts_of
from raydet.tables.schema import build_schema, parse_metadata
from raydet.tables.table import Table, is_table, open_table

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
    places = places_of(images, found)
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


def refuse_changed(config: PrepareDetectionsConfig, written: Table) -> None:
    """Refuse a finished table if the same command would choose other labels now; detections may be gone since.

    Raises:
        UserError: The detections, or the thresholds in their file, have changed.
    """
    if not is_table(config.detections):
        return
    origin = parse_metadata(written.schema, kind="images", where=written.uri).get(ORIGIN_KEY, {})
    found = open_table(config.detections, "detections")
    has_file = config.thresholds is not None and storage.exists(config.thresholds)
    changed = ""
    if origin.get("detections_hash") != found.fingerprint:
        changed = f"--detections {found.uri}"
    elif has_file and origin.get("thresholds") != _by_name(found, choose_thresholds(found, config)):
        changed = f"--thresholds {config.thresholds}"
    if changed:
        raise UserError(f"{written.uri} is finished, and {changed} has changed since; choose another --out")


def _by_name(found: Table, thresholds: Sequence[float | None]) -> dict[str, float | None]:
    pairs = zip(found.categories, thresholds, strict=True)
    return {
        category.name: least
        for index, (category, least) in enumerate(pairs)
        if least is not None or not is_unused(category.name, index)
    }


def _origin(found: Table, thresholds: list[float | None], config: PrepareDetectionsConfig) -> Mapping[str, Any]:
    content = parse_metadata(found.schema, kind="detections", where=found.uri)
    return {
        "checkpoint": content.get("checkpoint"),
        "checkpoint_hash": content.get("checkpoint_hash"),
        "detections": without_secrets(found.uri),
        "detections_hash": found.fingerprint,
        "thresholds": _by_name(found, thresholds),
        "ignore_threshold": config.ignore_threshold,
        "target_precision": config.target_precision,
        "truth": None if config.truth is None else without_secrets(config.truth),
        "raydet_version": __version__,
    }
