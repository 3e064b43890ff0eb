"""The Arrow schemas of the tables, the categories, and the metadata that carries them.

Boxes are (x, y, width, height) in absolute pixels of the upright image. Categories are indices from 0; the ids and
names that the source used stand in the schema's metadata.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from raydet.common.errors import UserError

SCHEMA_VERSION = 1
"""Raised when a reader of the old version would misread the new tables."""

MAX_IMAGE_ID = 2**53
"""COCO evaluators hold image ids in a float64, which is exact below this."""

TableKind = Literal[
    "images",
    "detections",
    "metrics",
    "per_image",
    "pr_curves",
    "errors",
    "confusion",
    "calibration",
    "suspects",
    "comparison",
    "changed_images",
    "runs",
    "rejected",
    "trials",
    "findings",
    "data_summary",
    "per_class",
    "histograms",
    "co_occurrence",
    "box_centres",
    "data_findings",
]

_METADATA_KEY = b"raydet"


@dataclass(frozen=True)
class Category:
    """A class: its place in the tables is its index; `id` and `name` are the source's."""

    id: int
    name: str


IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
OBJECTS_TYPE = pa.struct(
    [
        ("id", pa.list_(pa.int64())),
        ("bbox", pa.list_(pa.list_(pa.float64(), 4))),
        ("category", pa.list_(pa.int64())),
        ("area", pa.list_(pa.float64())),
        ("iscrowd", pa.list_(pa.bool_())),
    ]
)
DETECTIONS_TYPE = pa.struct(
    [
        ("bbox", pa.list_(pa.list_(pa.float64(), 4))),
        ("score", pa.list_(pa.float64())),
        ("category", pa.list_(pa.int64())),
    ]
)

_FIELDS: dict[TableKind, list[tuple[str, pa.DataType]]] = {
    "images": [
        ("image_id", pa.int64()),
        ("image", IMAGE_TYPE),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("objects", OBJECTS_TYPE),
    ],
    "detections": [
        ("image_id", pa.int64()),
        ("path", pa.string()),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("detections", DETECTIONS_TYPE),
        ("error", pa.string()),
    ],
    "metrics": [
        ("run", pa.string()),
        ("model", pa.string()),
        ("split", pa.string()),
        ("slice", pa.string()),
        ("metric", pa.string()),
        ("iou", pa.float64()),
        ("area", pa.string()),
        ("max_detections", pa.int64()),
        ("category", pa.string()),
        ("value", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
    ],
    "per_image": [
        ("run", pa.string()),
        ("image_id", pa.int64()),
        ("num_truth", pa.int64()),
        ("num_detections", pa.int64()),
        ("true_positives", pa.int64()),
        ("false_positives", pa.int64()),
        ("false_negatives", pa.int64()),
        ("f1", pa.float64()),
        ("error", pa.string()),
    ],
    "pr_curves": [
        ("run", pa.string()),
        ("category", pa.string()),  # null: the mean over all classes
        ("iou", pa.float64()),  # null: the mean over .50:.95
        ("recall", pa.float64()),
        ("precision", pa.float64()),
        ("score", pa.float64()),  # of the last detection needed for this recall; null for a mean and beyond the last
    ],
    "errors": [
        ("run", pa.string()),
        ("category", pa.string()),  # null: all classes
        ("error", pa.string()),  # class, location, both, duplicate, background, missed; false_positive, false_negative
        ("count", pa.int64()),  # detections, or labelled boxes for missed; null for the last two
        ("ap_points", pa.float64()),  # by how much AP50 would rise were this error not there
    ],
    "confusion": [
        ("run", pa.string()),
        ("truth", pa.string()),  # null: nothing is there
        ("detected", pa.string()),  # null: nothing was found
        ("count", pa.int64()),
    ],
    "calibration": [
        ("run", pa.string()),
        ("category", pa.string()),  # null: all classes
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("count", pa.int64()),
        ("mean_score", pa.float64()),
        ("precision", pa.float64()),
    ],
    "suspects": [  # labels that are probably wrong, the most probable first
        ("run", pa.string()),
        ("image_id", pa.int64()),
        ("kind", pa.string()),  # no_truth: a sure detection of what is not labelled; not_found; other_class
        ("category", pa.string()),  # of the labelled box, or of the detection where there is none
        ("detected", pa.string()),  # of the detection; null for not_found
        ("bbox", pa.list_(pa.float64(), 4)),
        ("score", pa.float64()),
        ("iou", pa.float64()),
    ],
    "comparison": [
        ("first", pa.string()),
        ("second", pa.string()),
        ("metric", pa.string()),
        ("category", pa.string()),
        ("first_value", pa.float64()),
        ("second_value", pa.float64()),
        ("difference", pa.float64()),  # second - first
        ("low", pa.float64()),
        ("high", pa.float64()),
    ],
    "changed_images": [
        ("first", pa.string()),
        ("second", pa.string()),
        ("image_id", pa.int64()),
        ("num_truth", pa.int64()),
        ("first_f1", pa.float64()),
        ("second_f1", pa.float64()),
        ("difference", pa.float64()),
    ],
    "runs": [
        ("run", pa.string()),
        ("model", pa.string()),
        ("split", pa.string()),
        ("truth", pa.string()),
        ("detections", pa.string()),
        ("checkpoint_hash", pa.string()),
        ("data_hash", pa.string()),
        ("config", pa.string()),  # JSON
        ("version", pa.string()),
        ("time", pa.timestamp("us", tz="UTC")),
        ("num_images", pa.int64()),
        ("num_truth", pa.int64()),
        ("num_detections", pa.int64()),
        ("num_unreadable", pa.int64()),
        ("num_left_out", pa.int64()),  # images of the truth without a row in the detections, or the other way round
    ],
    "trials": [  # of a search, one row each; an option NAME that was varied has its column param_NAME
        ("trial", pa.string()),  # the name of its run folder
        ("state", pa.string()),  # finished, stopped (by the scheduler), failed, unfinished
        ("source", pa.string()),  # default, point (given by the user), search
        ("parameters", pa.string()),  # JSON: the value of each option that was varied
        ("metric", pa.string()),
        ("value", pa.float64()),  # of the metric in the best epoch, of which also those that follow are
        ("best_epoch", pa.int64()),
        ("num_epochs", pa.int64()),
        ("seconds", pa.float64()),
        *[(name, pa.float64()) for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")],
        *[(name, pa.float64()) for name in ("AR1", "AR10", "AR100", "ARs", "ARm", "ARl")],
        ("loss", pa.float64()),
        ("checkpoint", pa.string()),
        ("error", pa.string()),
    ],
    "rejected": [
        ("path", pa.string()),
        ("image_id", pa.int64()),
        ("reason", pa.string()),
    ],
    "findings": [
        ("kind", pa.string()),
        ("path", pa.string()),  # of the image or the file of annotations; null where it is about neither
        ("image_id", pa.int64()),
        ("annotation_id", pa.int64()),
        ("count", pa.int64()),
        ("detail", pa.string()),
    ],
    "data_summary": [
        ("split", pa.string()),  # data, val; null: what is between the two
        ("name", pa.string()),
        ("value", pa.float64()),
    ],
    "per_class": [
        ("split", pa.string()),
        ("category", pa.string()),
        ("boxes", pa.int64()),  # crowds included
        ("share", pa.float64()),  # of all boxes
        ("images", pa.int64()),
        ("boxes_per_image", pa.float64()),  # of the images that have the class
        ("crowd_boxes", pa.int64()),
        ("small_boxes", pa.int64()),  # COCO's areas, without crowds
        ("medium_boxes", pa.int64()),
        ("large_boxes", pa.int64()),
    ],
    "histograms": [
        ("split", pa.string()),
        ("quantity", pa.string()),
        ("category", pa.string()),  # null: all classes
        ("low", pa.float64()),  # this value and above
        ("high", pa.float64()),  # below this value; the outermost bins also hold what lies beyond them
        ("count", pa.int64()),
    ],
    "co_occurrence": [
        ("split", pa.string()),
        ("first", pa.string()),
        ("second", pa.string()),
        ("images", pa.int64()),  # that have both classes
    ],
    "box_centres": [
        ("split", pa.string()),
        ("category", pa.string()),
        ("left", pa.float64()),  # of a cell, as a part of the image's width
        ("top", pa.float64()),
        ("boxes", pa.int64()),
    ],
    "data_findings": [
        ("split", pa.string()),
        ("kind", pa.string()),
        ("image_id", pa.int64()),
        ("path", pa.string()),
        ("category", pa.string()),
        ("detail", pa.string()),
    ],
}


def build_schema(
    kind: TableKind,
    categories: Sequence[Category] = (),
    *,
    extra_fields: Sequence[pa.Field] = (),
    extra_metadata: Mapping[str, Any] | None = None,
) -> pa.Schema:
    """Builds the Arrow schema of a table, with the categories and the schema version in its metadata.

    Args:
        kind: Which table.
        categories: The classes, in the order of their indices.
        extra_fields: Further scalar columns, such as camera or city, carried through as they are.
        extra_metadata: Anything JSON can hold, kept beside the categories.
    """
    fields = [pa.field(name, dtype) for name, dtype in _FIELDS[kind]] + list(extra_fields)
    content = {
        "kind": kind,
        "schema_version": SCHEMA_VERSION,
        "categories": [{"id": category.id, "name": category.name} for category in categories],
        **(extra_metadata or {}),
    }
    metadata = {_METADATA_KEY: json.dumps(content).encode()}
    if kind == "images":
        metadata[b"huggingface"] = json.dumps(_huggingface_features(fields, categories)).encode()
    return pa.schema(fields, metadata=metadata)


def parse_metadata(schema: pa.Schema, *, kind: TableKind | tuple[TableKind, ...], where: str) -> dict[str, Any]:
    """Reads back what `build_schema` put into the metadata.

    Raises:
        UserError: It is not a raydet table of this kind, or one of these, and of this schema version.
    """
    raw = (schema.metadata or {}).get(_METADATA_KEY)
    if raw is None:
        raise UserError(f"{where} is not a raydet table (no raydet metadata); make one with `raydet prepare`")
    content: dict[str, Any] = json.loads(raw)
    if content["schema_version"] != SCHEMA_VERSION:
        raise UserError(
            f"{where} has schema version {content['schema_version']}, this raydet reads version {SCHEMA_VERSION}; "
            "write the table again with this version"
        )
    kinds = (kind,) if isinstance(kind, str) else kind
    if content["kind"] not in kinds:
        expected = " or ".join(kinds)
        raise UserError(f"{where} is a table of {content['kind']}, expected a table of {expected}")
    missing = [name for name, _ in _FIELDS[content["kind"]] if name not in schema.names]
    if missing:
        raise UserError(f"{where} lacks the columns {', '.join(missing)}")
    return content


def categories_of(content: Mapping[str, Any]) -> tuple[Category, ...]:
    """The categories in parsed metadata, in the order of their indices."""
    return tuple(Category(id=item["id"], name=item["name"]) for item in content["categories"])


def _huggingface_features(fields: Sequence[pa.Field], categories: Sequence[Category]) -> dict[str, Any]:
    """The `huggingface` schema metadata, by which `datasets.load_dataset("parquet", …)` sees images and class names."""

    def value(dtype: str) -> dict[str, str]:
        return {"dtype": dtype, "_type": "Value"}

    def sequence(feature: dict[str, Any], length: int = -1) -> dict[str, Any]:
        return {"feature": feature, "length": length, "_type": "List"}

    label = (
        {"names": [category.name for category in categories], "_type": "ClassLabel"} if categories else value("int64")
    )
    special: dict[str, Any] = {
        "image": {"_type": "Image"},
        "objects": {
            "id": sequence(value("int64")),
            "bbox": sequence(sequence(value("float64"), 4)),
            "category": sequence(label),
            "area": sequence(value("float64")),
            "iscrowd": sequence(value("bool")),
        },
    }
    features = {field.name: special.get(field.name) or value(_huggingface_dtype(field.type)) for field in fields}
    return {"info": {"features": features}}


def _huggingface_dtype(dtype: pa.DataType) -> str:
    names = {"double": "float64", "float": "float32"}
    return names.get(str(dtype), str(dtype))
