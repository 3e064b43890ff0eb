"""Crops → the detections with the classes that a classifier gave them.

A label with the name of one of the detector's classes means that class; the others are further classes. The class that
the detector gave is kept in a column beside.
"""

import itertools
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from raydet.common.class_names import indices_in
from raydet.common.errors import UserError
from raydet.config import CropsConfig
from raydet.models.checkpoints import Checkpoint, categories_in
from raydet.scoring.plan import part_name
from raydet.second_looks.cutting import detections_in
from raydet.second_looks.work import CropsWork
from raydet.tables.columns import Integers, image_ids_in, numbers_of, starts_of
from raydet.tables.kept.plain import plain_columns, plain_schema
from raydet.tables.output_folder import token_of_run
from raydet.tables.schema import Category, token_of
from raydet.tables.table import RowGroup, Table, TableWriter, is_table, open_table, read_manifest

RELABELLED = "relabelled"
"""Folder of the table inside that of the crops."""
DETECTOR_COLUMN = "detector_category"
"""Column with the class that the detector gave to each detection of an image."""


def labels_of(config: CropsConfig, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the names of all labels that a classifier may give.

    Raises:
        UserError: They have no names.
    """
    if config.labels:
        return tuple(config.labels)
    names = tuple(category.name for category in categories_in(checkpoint.content))
    if not names:
        raise UserError(f"--relabel needs names of classes, but the labels of {config.model} have none")
    return names


def relabel(work: CropsWork, labels: Sequence[str]) -> str:
    """Write the detections with the classes of their labels, once all crops are written; nothing if that is done.

    A detection keeps its class if it has no label, or one below `--relabel`. Its score remains that of the detector.

    Returns:
        The URI of the detections table.
    """
    uri = work.folder.uri_of(RELABELLED)
    wanted = token_of_run({"crops": token_of(work.schema.metadata), "relabel": work.config.relabel})
    if is_table(uri) and read_manifest(uri)["config_hash"] == wanted:
        return uri
    work.folder.delete_table(RELABELLED)
    index_of, categories = _classes(work.found, labels)
    field = pa.field(DETECTOR_COLUMN, pa.list_(pa.int64()))
    schema = plain_schema(work.found.schema, categories, where=work.found.uri, extra_fields=[field])
    crops = open_table(work.folder.uri, "crops")
    groups = {name: list(own) for name, own in itertools.groupby(crops.row_groups(), lambda group: group.file)}
    with TableWriter(uri, schema, config_hash=wanted) as writer:
        writer.extra["id_space"] = work.found.manifest.get("id_space")
        for chunk in range(work.num_chunks):
            given = _labels_in(crops, groups.get(part_name(chunk), []), work.config.relabel or 0.0)
            for batch in detections_in(work.found, work.rows_of(chunk)):
                writer.write(_relabelled(batch, given, index_of, schema))
    return uri


def _classes(found: Table, labels: Sequence[str]) -> tuple[dict[str, int], tuple[Category, ...]]:
    """Return the index of each label's class, and all classes: those of the detector and then the further labels."""
    categories = list(found.categories)
    next_id = max((category.id for category in categories), default=-1) + 1
    index_of: dict[str, int] = {}
    for label, index in zip(labels, indices_in(labels, [category.name for category in categories]), strict=True):
        if index < 0:
            index = len(categories)
            categories.append(Category(next_id, label))
            next_id += 1
        index_of.setdefault(label, int(index))
    return index_of, tuple(categories)


def _labels_in(crops: Table, groups: Sequence[RowGroup], min_score: float) -> pa.Table:
    """Return image, detection and label of the crops of a file whose labels have at least a score."""
    columns = ["image_id", "detection", "label", "label_score"]
    schema = pa.schema([crops.schema.field(name) for name in columns])
    rows = pa.Table.from_batches(crops.iter_batches(columns, groups=groups), schema=schema)
    return rows.filter(pc.greater_equal(rows["label_score"], min_score))  # null: no label


def _relabelled(batch: pa.RecordBatch, given: pa.Table, index_of: dict[str, int], schema: pa.Schema) -> pa.RecordBatch:
    """Return rows with the classes of their labels, and those of the detector in a further column."""
    columns = plain_columns(batch)
    detections = columns["detections"]
    lists = detections.field("category")
    starts, old = starts_of(numbers_of(pc.fill_null(pc.list_value_length(lists), 0))), numbers_of(lists.flatten())
    new = old.copy()
    row_of = {image_id: row for row, image_id in enumerate(image_ids_in(batch).tolist())}
    for image_id, place, label in zip(*(given[name].to_pylist() for name in given.column_names[:3]), strict=True):
        if image_id in row_of:
            new[starts[row_of[image_id]] + place] = index_of[label]
    fields = list(detections.type)
    parts = [_lists(starts, new) if field.name == "category" else detections.field(field.name) for field in fields]
    columns["detections"] = pa.StructArray.from_arrays(parts, fields=fields)
    columns[DETECTOR_COLUMN] = _lists(starts, old)
    return pa.RecordBatch.from_arrays(list(columns.values()), schema=schema)


def _lists(starts: Integers, values: Integers) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(starts, pa.int32()), pa.array(values, pa.int64()))
