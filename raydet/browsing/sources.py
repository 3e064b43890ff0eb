"""Config of `browse` → the opened tables: images, labels, detections of up to two runs, and where the pictures are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from raydet.common.errors import UserError
from raydet.config import BrowseConfig
from raydet.images.collection import Collection, TableCollection, VideoCollection, open_collection
from raydet.measuring.answers.columns import Answers, read_answers
from raydet.measuring.detections import Scored, read_detections
from raydet.measuring.joining import ImageKeys, list_images
from raydet.measuring.truth import Truth, extra_columns, read_truth
from raydet.reporting.judging import read_scored, score_threshold
from raydet.reporting.run_tables import RunTables, read_run
from raydet.selection.scored_files import scored_collection
from raydet.tables import storage
from raydet.tables.columns import Integers, TruthColumns, image_ids_in, image_places, places_in
from raydet.tables.schema import Category
from raydet.tables.table import Table, is_table, open_table

_DEFAULT_THRESHOLD = 0.3


@dataclass(frozen=True, kw_only=True)
class ShownRun:
    """Detections of one run.

    Attributes:
        name: Name on the page.
        scored: Detections, with the labels of the same images.
        threshold: Lowest score at which a detection is judged; None if there are no labels to judge by.
        class_agnostic: Detections are judged without regard to their class, as in the evaluation.
        suspects: `suspects` table of the evaluation, if there is one.
    """

    name: str
    scored: Scored
    threshold: float | None
    class_agnostic: bool = False
    suspects: pa.Table | None = None


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Everything that the page shows; images in ascending id order, I of them.

    Attributes:
        title: Name of what is shown.
        uri: Table or folder that was opened.
        categories: Classes of all boxes.
        images: Ids, paths and sizes of the images.
        truth: Labelled boxes of the images; no boxes if there are no labels.
        has_labels: The images have labels.
        runs: At most two runs.
        columns: Extra columns of the images table, in the order of the images.
        collection: Place of the pictures; None if it is unknown.
        positions: Position of each image in the collection, -1 if it is not there, int64 [I].
        notes: What could not be shown, one line each.
        answers: Answers of crops tables about the detections of all runs, one run after the other.
    """

    title: str
    uri: str
    categories: tuple[Category, ...]
    images: ImageKeys
    truth: TruthColumns
    has_labels: bool
    runs: tuple[ShownRun, ...] = ()
    columns: Mapping[str, pa.ChunkedArray] = field(default_factory=dict)
    collection: Collection | None = None
    positions: Integers
    notes: tuple[str, ...] = ()
    answers: tuple[Answers, ...] = ()


def open_sources(config: BrowseConfig) -> Sources:
    """Open the tables that a config names.

    Raises:
        UserError: A table is missing, damaged or of another kind, or options do not fit what was found.
    """
    sources = _opened(config)
    if not config.crops:
        return sources
    scored = [run.scored for run in sources.runs]
    image_ids = np.concatenate([own.found_ids[image_places(own.columns)] for own in scored])
    boxes_xywh = np.concatenate([own.columns.boxes_xywh for own in scored])
    return replace(sources, answers=tuple(read_answers(config.crops, image_ids, boxes_xywh)))


def _opened(config: BrowseConfig) -> Sources:
    uri = storage.absolute_uri(config.data).rstrip("/")
    if _is_metrics(uri):
        _refuse(config.images, "--images", "the metrics name their images")
        return _of_metrics(config, read_run(uri, config.run))
    _refuse(config.run, "--run", f"{uri} is not a metrics folder")
    table = open_table(uri, ("images", "detections"))
    if table.kind == "detections":
        return _of_detections(config, table)
    for option in ("second", "second_run", "images", "crops", "score_threshold"):
        _refuse(getattr(config, option), f"--{option.replace('_', '-')}", f"{uri} is an images table")
    truth = read_truth(uri) if table.categories else None
    return _sources(table.uri, table, truth)


def _is_metrics(uri: str) -> bool:
    return not is_table(uri) and is_table(storage.join(uri, "metrics"))


def _refuse(value: object, flag: str, reason: str) -> None:
    if value is not None:
        raise UserError(f"{flag} does not apply: {reason}")


def _of_metrics(config: BrowseConfig, first: RunTables) -> Sources:
    truth = read_truth(first.truth.uri)
    runs = [_evaluated(first, truth, config.score_threshold)]
    if config.second is not None or config.second_run is not None:
        runs.append(_second(config, config.second or first.uri, truth))
    return _sources(first.uri, first.truth, truth, runs)


def _evaluated(run: RunTables, truth: Truth, threshold: float | None) -> ShownRun:
    return ShownRun(
        name=run.run,
        scored=read_scored(run, truth),
        threshold=score_threshold(run) if threshold is None else threshold,
        class_agnostic=bool(run.settings.get("class_agnostic")),
        suspects=run.tables.get("suspects"),
    )


def _second(config: BrowseConfig, uri: str, truth: Truth) -> ShownRun:
    uri = storage.absolute_uri(uri).rstrip("/")
    if _is_metrics(uri):
        return _evaluated(read_run(uri, config.second_run), truth, config.score_threshold)
    _refuse(config.second_run, "--second-run", f"{uri} is not a metrics folder")
    return _scored(open_table(uri, "detections"), truth, config.score_threshold)


def _scored(table: Table, truth: Truth, threshold: float | None) -> ShownRun:
    """Read a detections table; without labels nothing is judged."""
    judged_at = _DEFAULT_THRESHOLD if threshold is None else threshold
    return ShownRun(
        name=_place(table.uri),
        scored=read_detections(table.uri, truth, allow_partial=True),
        threshold=judged_at if len(truth.columns.category) else None,
    )


def _of_detections(config: BrowseConfig, table: Table) -> Sources:
    notes: list[str] = []
    collection = _scored_images(config, table, notes)
    images = collection.table if isinstance(collection, TableCollection) else None
    if images is not None and images.categories:
        try:
            truth = read_truth(images.uri)
            return _sources(table.uri, images, truth, _runs(config, table, truth), notes)
        except UserError as error:
            notes.append(f"Labels are not shown: {error}")
    truth = _without_labels(table)
    return _sources(table.uri, images or collection, truth, _runs(config, table, truth), notes)


def _runs(config: BrowseConfig, table: Table, truth: Truth) -> list[ShownRun]:
    runs = [_scored(table, truth, config.score_threshold)]
    if config.second is not None:
        runs.append(_second(config, config.second, truth))
    else:
        _refuse(config.second_run, "--second-run", "it requires --second")
    return runs


def _scored_images(config: BrowseConfig, table: Table, notes: list[str]) -> Collection | None:
    """Open the images of a detections table: those that the user names, or those that the run recorded."""
    if config.images is not None:
        given = open_collection(config.images, index_uri=None)
        if isinstance(given, VideoCollection) and given.id_space != table.manifest.get("id_space"):
            raise UserError(
                f"--images {config.images} has other frames than were scored; omit it, so that browse shows those"
            )
        return given
    try:
        found = scored_collection(table)
        if found is None:
            raise UserError("the folder does not record what was scored; name it with --images")
        return found
    except (UserError, OSError) as error:
        notes.append(f"Pictures are not shown: {error}")
        return None


def _without_labels(table: Table) -> Truth:
    """Return the images of a detections table as a truth without boxes."""
    images = list_images(table)
    images = images.take(np.argsort(images.image_ids, kind="stable"))
    if not len(images.image_ids):
        raise UserError(f"{table.uri} has no images")
    return Truth(uri=table.uri, categories=table.categories, columns=_no_boxes(images), images=images)


def _no_boxes(images: ImageKeys) -> TruthColumns:
    nothing = np.zeros(0)
    return TruthColumns(
        image_ids=images.image_ids,
        starts=np.zeros(len(images.image_ids) + 1, np.int64),
        boxes_xywh=nothing.reshape(0, 4),
        category=nothing.astype(np.int64),
        area=nothing,
        iscrowd=nothing.astype(np.bool_),
    )


def _sources(
    uri: str,
    pictures: Table | Collection | None,
    truth: Truth | None,
    runs: Sequence[ShownRun] = (),
    notes: Sequence[str] = (),
) -> Sources:
    table = pictures if isinstance(pictures, Table) else None
    if truth is None:
        assert table is not None, "only images tables may have no classes"
        images = list_images(table)
        images = images.take(np.argsort(images.image_ids, kind="stable"))
    else:
        images = truth.images
    collection = TableCollection.of(pictures) if isinstance(pictures, Table) else pictures
    positions = np.full(len(images.image_ids), -1) if collection is None else _positions(collection, images.image_ids)
    columns: dict[str, Any] = {}
    if table is not None and (truth is None or truth.uri == table.uri):
        columns = extra_columns(table)
    return Sources(
        title=_place(uri),
        uri=uri,
        categories=() if truth is None else truth.categories,
        images=images,
        truth=_no_boxes(images) if truth is None else truth.columns,
        has_labels=table is not None and bool(table.categories) and truth is not None and truth.uri == table.uri,
        runs=_distinct(runs),
        columns=columns,
        collection=collection,
        positions=positions,
        notes=tuple(notes),
    )


def _place(uri: str) -> str:
    """Return a short name of a table or folder: folders of runs have names, those inside them rarely do."""
    return "/".join(uri.split("/")[-2:])


def _distinct(runs: Sequence[ShownRun]) -> tuple[ShownRun, ...]:
    if len({run.name for run in runs}) == len(runs):
        return tuple(runs)
    return tuple(
        replace(run, name=f"{run.name} ({which})") for run, which in zip(runs, ("first", "second"), strict=True)
    )


def _positions(collection: Collection, image_ids: Integers) -> Integers:
    """Return the position of each image; the id of an image that is not in a table is its position."""
    if not isinstance(collection, TableCollection):
        return np.where(image_ids < collection.num_rows, image_ids, -1)
    batches = collection.table.iter_batches(["image_id"], 2**16)
    known = np.concatenate([np.zeros(0, np.int64), *map(image_ids_in, batches)])
    order = np.argsort(known, kind="stable")
    places, is_known = places_in(known[order], image_ids)
    return np.where(is_known, order[places], -1)
