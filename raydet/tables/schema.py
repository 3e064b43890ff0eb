"""Arrow schemas of all tables, and the metadata that stores kind, version and categories.

Boxes are (x, y, width, height) in absolute pixels of the upright image. Categories are indices from 0; the
source's ids and names are stored in the schema's metadata.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from raydet.common.errors import UserError
from raydet.common.untrusted.documents import DocumentError, parse_json

SCHEMA_VERSION = 3
"""Incremented when a reader of the old version would misread new tables."""

MAX_IMAGE_ID = 2**53
"""Exclusive limit: COCO evaluators store image ids in a float64, which is exact below it."""

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
    "near_duplicates",
    "similar",
    "to_label",
    "crops",
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
_TOKEN_KEY = b"raydet_token"
_MAX_CATEGORIES = 100_000
LONGEST_CLASS_NAME = 1000
"""In characters."""


@dataclass(frozen=True)
class Category:
    """A class as named by the source; tables refer to it by its index in the list of categories."""

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
SCORED_OBJECTS_TYPE = pa.struct([*OBJECTS_TYPE, ("score", pa.list_(pa.float64()))])
"""Of a table whose boxes a model found: the score of each; null for a box that a person drew."""
DETECTIONS_TYPE = pa.struct(
    [
        ("bbox", pa.list_(pa.list_(pa.float64(), 4))),
        ("score", pa.list_(pa.float64())),
        ("category", pa.list_(pa.int64())),
    ]
)

QUERIED_TYPE = pa.struct([*DETECTIONS_TYPE, ("query", pa.list_(pa.int64()))])
"""Detections of a table with `queries` (`raydet.tables.kept`): the index of each detection's query in its row."""

LABELLED_COLUMN = "labelled_categories"
"""Optional column of an images table: the classes that an image is labelled for; null means all."""
THUMBNAIL_COLUMN = "thumbnail"
THUMBNAIL_SHAPE = (8, 8, 3)
THUMBNAIL_TYPE = pa.list_(pa.uint8(), math.prod(THUMBNAIL_SHAPE))
"""Of an optional column of a detections table: red, green and blue of each pixel of a shrunk image, row by row."""
OPTIONAL_FIELDS: Mapping[TableKind, Mapping[str, pa.DataType]] = {
    "images": {LABELLED_COLUMN: pa.list_(pa.int64())},
    "detections": {THUMBNAIL_COLUMN: THUMBNAIL_TYPE},
}
"""Columns that a table may have, with a meaning for raydet."""

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
        ("score", pa.float64()),  # of the last detection needed for this recall; null for means and unreached recalls
    ],
    "errors": [
        ("run", pa.string()),
        ("category", pa.string()),  # null: all classes
        ("error", pa.string()),  # class, location, both, duplicate, background, missed; false_positive, false_negative
        ("count", pa.int64()),  # detections, or labelled boxes for missed; null for the last two
        ("ap_points", pa.float64()),  # gain in AP50 if these errors were fixed
    ],
    "confusion": [
        ("run", pa.string()),
        ("truth", pa.string()),  # null: background
        ("detected", pa.string()),  # null: missed
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
    "suspects": [  # probable label errors, most probable first
        ("run", pa.string()),
        ("image_id", pa.int64()),
        ("kind", pa.string()),  # no_truth (confident detection without a label), not_found, other_class
        ("category", pa.string()),  # of the labelled box; of the detection for no_truth
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
        ("num_left_out", pa.int64()),  # images in the truth but not in the detections, or vice versa
    ],
    "trials": [  # one row per trial; a searched option NAME has a column param_NAME
        ("trial", pa.string()),  # name of the run folder
        ("state", pa.string()),  # finished, stopped (by the scheduler), failed, unfinished
        ("source", pa.string()),  # default, point (given by the user), search
        ("parameters", pa.string()),  # JSON: value of each searched option
        ("metric", pa.string()),
        ("value", pa.float64()),  # of the metric in the best epoch, as are the metrics below
        ("best_epoch", pa.int64()),
        ("num_epochs", pa.int64()),
        ("seconds", pa.float64()),
        *[(name, pa.float64()) for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")],
        *[(name, pa.float64()) for name in ("AR1", "AR10", "AR100", "ARs", "ARm", "ARl")],
        ("loss", pa.float64()),
        ("checkpoint", pa.string()),
        ("error", pa.string()),
    ],
    "near_duplicates": [
        ("image_id", pa.int64()),
        ("path", pa.string()),
        ("duplicate_of", pa.int64()),  # image id of an earlier row
        ("similarity", pa.float64()),
    ],
    "similar": [  # most similar first; null in the columns of a detection if images are compared
        ("image_id", pa.int64()),
        ("path", pa.string()),
        ("detection", pa.int64()),  # place by score, from 0
        ("category", pa.string()),
        ("bbox", pa.list_(pa.float64(), 4)),
        ("score", pa.float64()),
        ("similarity", pa.float64()),
    ],
    "to_label": [  # in the order of the choice; null in the column of a criterion that was not asked for
        ("place", pa.int64()),  # from 1
        ("image_id", pa.int64()),
        ("path", pa.string()),
        ("reason", pa.string()),
        ("uncertainty", pa.float64()),
        ("rare", pa.float64()),
        ("disagreement", pa.float64()),
        ("similarity", pa.float64()),  # to the nearest image that is labelled or was chosen earlier; null without one
    ],
    "crops": [  # further columns hold the answers
        ("image_id", pa.int64()),
        ("path", pa.string()),
        ("detection", pa.int64()),  # place by score, from 0
        ("category", pa.string()),
        ("bbox", pa.list_(pa.float64(), 4)),
        ("score", pa.float64()),
        ("error", pa.string()),
    ],
    "rejected": [
        ("path", pa.string()),
        ("image_id", pa.int64()),
        ("reason", pa.string()),
    ],
    "findings": [
        ("kind", pa.string()),
        ("path", pa.string()),  # image or annotation file; null if the finding concerns neither
        ("image_id", pa.int64()),
        ("annotation_id", pa.int64()),
        ("count", pa.int64()),
        ("detail", pa.string()),
    ],
    "data_summary": [
        ("split", pa.string()),  # data, val; null: concerns both
        ("name", pa.string()),
        ("value", pa.float64()),
    ],
    "per_class": [
        ("split", pa.string()),
        ("category", pa.string()),
        ("boxes", pa.int64()),  # crowds included
        ("share", pa.float64()),  # of all boxes
        ("images", pa.int64()),
        ("boxes_per_image", pa.float64()),  # over images that contain the class
        ("crowd_boxes", pa.int64()),
        ("small_boxes", pa.int64()),  # COCO's area limits, crowds excluded
        ("medium_boxes", pa.int64()),
        ("large_boxes", pa.int64()),
    ],
    "histograms": [
        ("split", pa.string()),
        ("quantity", pa.string()),
        ("category", pa.string()),  # null: all classes
        ("low", pa.float64()),  # inclusive
        ("high", pa.float64()),  # exclusive; the outermost bins include values beyond their limits
        ("count", pa.int64()),
    ],
    "co_occurrence": [
        ("split", pa.string()),
        ("first", pa.string()),
        ("second", pa.string()),
        ("images", pa.int64()),  # images that contain both classes
    ],
    "box_centres": [
        ("split", pa.string()),
        ("category", pa.string()),
        ("left", pa.float64()),  # of a cell, as a fraction of the image width
        ("top", pa.float64()),
        ("boxes", pa.int64()),
    ],
    "data_findings": [
        ("split", pa.string()),
        ("kind", pa.string()),
        ("table", pa.string()),
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
    with_scores: bool = False,
    with_queries: bool = False,
) -> pa.Schema:
    """Build the Arrow schema of a table, with the categories and the schema version in its metadata.

    Args:
        kind: Kind of the table.
        categories: Classes in index order.
        extra_fields: Further columns: scalar ones, such as camera or city, and those of `OPTIONAL_FIELDS`.
        extra_metadata: Further JSON-serialisable metadata.
        with_scores: True for an images table whose boxes have scores.
        with_queries: True for a detections table whose detections name their queries.

    Raises:
        UserError: The name of a class is too long.
    """
    check_class_names(categories)
    types = dict(_FIELDS[kind])
    if with_scores:
        types["objects"] = SCORED_OBJECTS_TYPE
    if with_queries:
        types["detections"] = QUERIED_TYPE
    fields = [pa.field(name, dtype) for name, dtype in types.items()] + list(extra_fields)
    content = {
        "kind": kind,
        "schema_version": SCHEMA_VERSION,
        "categories": [{"id": category.id, "name": category.name} for category in categories],
        **(extra_metadata or {}),
    }
    metadata = {_METADATA_KEY: json.dumps(content).encode()}
    if kind in ("images", "detections"):
        metadata[b"huggingface"] = json.dumps(_huggingface_features(fields, categories)).encode()
    return pa.schema(fields, metadata=metadata)


def check_class_names(categories: Sequence[Category]) -> None:
    """Refuse classes that no table can hold.

    Raises:
        UserError: The name of a class is too long, or there are too many.
    """
    if len(categories) > _MAX_CATEGORIES:
        raise UserError(f"there are {len(categories):,} classes; a table holds at most {_MAX_CATEGORIES:,}")
    for category in categories:
        if len(category.name) > LONGEST_CLASS_NAME:
            raise UserError(
                f"the name of class {category.id} has {len(category.name):,} characters; a table holds names of at "
                f"most {LONGEST_CLASS_NAME:,}"
            )


def parse_metadata(schema: pa.Schema, *, kind: TableKind | tuple[TableKind, ...], where: str) -> dict[str, Any]:
    """Parse the metadata that `build_schema` wrote.

    Raises:
        UserError: The table was not written by raydet, or has a different kind or schema version.
    """
    raw = (schema.metadata or {}).get(_METADATA_KEY)
    if raw is None:
        raise UserError(f"{where} is not a raydet table (no raydet metadata); create one with `raydet prepare`")
    try:
        content = parse_json(raw)
        kinds = (kind,) if isinstance(kind, str) else kind
        version, found = content["schema_version"], content["kind"]
        if version == SCHEMA_VERSION and found in kinds:
            _check_categories(content["categories"])
        for name in ("checkpoint", "checkpoint_hash"):
            if not isinstance(content.get(name), str | None):
                raise DocumentError(f"`{name}` has a value of the wrong type")
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"{where} is damaged: its raydet metadata is malformed ({error}); write it again") from None
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{where} has schema version {version!r:.20}, but this raydet reads version {SCHEMA_VERSION}; "
            "write the table again with this version"
        )
    if found not in kinds:
        raise UserError(f"{where} is a table of {found!s:.40}; expected a table of {' or '.join(kinds)}")
    missing = [name for name, _ in _FIELDS[found] if name not in schema.names]
    if missing:
        raise UserError(f"{where} lacks the columns {', '.join(missing)}")
    parsed: dict[str, Any] = content
    return parsed


def _check_categories(categories: Any) -> None:
    if not isinstance(categories, list) or len(categories) > _MAX_CATEGORIES:
        raise DocumentError(f"`categories` must be a list of at most {_MAX_CATEGORIES:,}")
    for item in categories:
        if type(item["id"]) is not int or not isinstance(item["name"], str) or len(item["name"]) > LONGEST_CLASS_NAME:
            raise DocumentError("a category needs a whole number as id and a name of at most 1,000 characters")


def categories_of(content: Mapping[str, Any]) -> tuple[Category, ...]:
    """Return the categories in parsed metadata, in index order."""
    return tuple(Category(id=item["id"], name=item["name"]) for item in content["categories"])


def declared_fields(kind: TableKind) -> Sequence[tuple[str, pa.DataType]]:
    """Return the names and types of the columns that every table of a kind has."""
    return _FIELDS[kind]


def with_token(schema: pa.Schema, token: str) -> pa.Schema:
    """Return the schema of a run's files: the token in their metadata shows that they belong to the run."""
    return schema.with_metadata({**(schema.metadata or {}), _TOKEN_KEY: token.encode()})


def token_of(metadata: Mapping[bytes, bytes] | None) -> str | None:
    """Return the token in a file's metadata, None without one."""
    token = (metadata or {}).get(_TOKEN_KEY)
    return None if token is None else token.decode(errors="replace")


def _huggingface_features(fields: Sequence[pa.Field], categories: Sequence[Category]) -> dict[str, Any]:
    """Build the `huggingface` metadata, so that `datasets.load_dataset("parquet", …)` finds images and class names."""
    names = [category.name for category in categories]
    # `datasets` refuses repeated names, which a checkpoint may have.
    is_label = 0 < len(names) == len(set(names))
    label = {"names": names, "_type": "ClassLabel"} if is_label else {"dtype": "int64", "_type": "Value"}

    def feature_of(name: str, dtype: pa.DataType) -> dict[str, Any]:
        if name == "image":
            return {"_type": "Image"}
        if pa.types.is_struct(dtype):
            return {field.name: feature_of(field.name, field.type) for field in dtype}
        if pa.types.is_list(dtype) or pa.types.is_fixed_size_list(dtype):
            feature = label if name in ("category", LABELLED_COLUMN) else feature_of(name, dtype.value_type)
            length = dtype.list_size if pa.types.is_fixed_size_list(dtype) else -1
            return {"feature": feature, "length": length, "_type": "List"}
        return {"dtype": _huggingface_dtype(dtype), "_type": "Value"}

    return {"info": {"features": {field.name: feature_of(field.name, field.type) for field in fields}}}


def _huggingface_dtype(dtype: pa.DataType) -> str:
    names = {"double": "float64", "float": "float32", "halffloat": "float16"}
    return names.get(str(dtype), str(dtype))
