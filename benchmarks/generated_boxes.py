"""Generated ground truth and detections of any size, with crowds, near misses and false positives."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from raydet.tables.columns import DetectionColumns, TruthColumns
from raydet.tables.schema import DETECTIONS_TYPE, OBJECTS_TYPE, Category, build_schema
from raydet.tables.table import TableWriter

NUM_CLASSES = 80
CATEGORIES = tuple(Category(index + 1, f"class {index + 1}") for index in range(NUM_CLASSES))
_IMAGES_PER_BATCH = 10_000


@dataclass(frozen=True)
class Generated:
    """Images with their boxes, in ascending order of ids."""

    truth: TruthColumns
    detections: DetectionColumns

    @property
    def num_images(self) -> int:
        return len(self.truth.image_ids)


def generate(num_images: int, num_boxes: int, num_detections: int, *, seed: int, first_id: int = 1) -> Generated:
    """Generate boxes and detections; half of the detections lie near a box of their image, most with its class."""
    random = np.random.default_rng(seed)
    image = np.sort(random.integers(0, num_images, num_boxes))
    category = random.integers(0, NUM_CLASSES, num_boxes)
    boxes_xywh = np.concatenate([random.random((num_boxes, 2)) * 500, np.exp(random.normal(4, 0.9, (num_boxes, 2)))], 1)
    boxes_xywh = np.round(boxes_xywh, 2)
    truth = TruthColumns(
        image_ids=np.arange(first_id, first_id + num_images),
        starts=np.searchsorted(image, np.arange(num_images + 1)),
        boxes_xywh=boxes_xywh,
        category=category,
        area=boxes_xywh[:, 2] * boxes_xywh[:, 3],
        iscrowd=random.random(num_boxes) < 0.01,
    )
    source = random.integers(0, num_boxes, num_detections)
    is_near = random.random(num_detections) < 0.5
    found_in = np.where(is_near, image[source], random.integers(0, num_images, num_detections))
    order = np.argsort(found_in, kind="stable")
    source, found_in, is_near = source[order], found_in[order], is_near[order]
    has_class = random.random(num_detections) < 0.8
    scores = np.clip(random.normal(np.where(is_near & has_class, 0.6, 0.3), 0.2), 0.001, 0.999)
    found_xywh = boxes_xywh[source] + random.normal(0, 6, (num_detections, 4))
    found_xywh[:, 2:] = np.maximum(found_xywh[:, 2:], 1)
    detections = DetectionColumns(
        starts=np.searchsorted(found_in, np.arange(num_images + 1)),
        boxes_xywh=np.round(found_xywh, 2),
        scores=np.round(scores, 4),
        category=np.where(has_class, category[source], random.integers(0, NUM_CLASSES, num_detections)),
    )
    return Generated(truth, detections)


def write_json(boxes: Generated, folder: Path) -> None:
    """Write the COCO files `truth.json` and `results.json`."""
    truth, found = boxes.truth, boxes.detections
    truth_image = np.repeat(truth.image_ids, np.diff(truth.starts))
    found_image = np.repeat(truth.image_ids, np.diff(found.starts))
    columns = (truth_image, truth.category + 1, truth.boxes_xywh, truth.area, truth.iscrowd.astype(int))
    keys = ("image_id", "category_id", "bbox", "area", "iscrowd")
    rows = zip(*(column.tolist() for column in columns), strict=True)
    content = {
        "images": [{"id": id_, "width": 640, "height": 480} for id_ in truth.image_ids.tolist()],
        "annotations": [{"id": number, **dict(zip(keys, row, strict=True))} for number, row in enumerate(rows, 1)],
        "categories": [{"id": category.id, "name": category.name} for category in CATEGORIES],
    }
    (folder / "truth.json").write_text(json.dumps(content))
    of_detections = (found_image, found.category + 1, found.boxes_xywh, found.scores)
    rows = zip(*(column.tolist() for column in of_detections), strict=True)
    results = [dict(zip(("image_id", "category_id", "bbox", "score"), row, strict=True)) for row in rows]
    (folder / "results.json").write_text(json.dumps(results))


def write_tables(parts: Iterable[Generated], folder: Path) -> None:
    """Write the tables `truth` and `detections`, holding one part at a time in memory."""
    images, detections = (build_schema(kind, CATEGORIES) for kind in ("images", "detections"))
    with (
        TableWriter(str(folder / "truth"), images, config_hash="generated") as truth_writer,
        TableWriter(str(folder / "detections"), detections, config_hash="generated") as detections_writer,
    ):
        for part in parts:
            for batch in _batches(part, images, is_truth=True):
                truth_writer.write(batch)
            for batch in _batches(part, detections, is_truth=False):
                detections_writer.write(batch)


def _batches(boxes: Generated, schema: pa.Schema, *, is_truth: bool) -> Iterator[pa.RecordBatch]:
    truth, found = boxes.truth, boxes.detections
    side = truth if is_truth else found
    for first in range(0, boxes.num_images, _IMAGES_PER_BATCH):
        last = min(first + _IMAGES_PER_BATCH, boxes.num_images)
        rows, count = slice(side.starts[first], side.starts[last]), last - first
        numbers = pa.array((side.starts[first : last + 1] - side.starts[first]).astype(np.int32))
        values = {"bbox": pa.FixedSizeListArray.from_arrays(pa.array(side.boxes_xywh[rows].ravel()), 4)}
        values["category"] = pa.array(side.category[rows])
        if is_truth:
            values |= {"area": pa.array(truth.area[rows]), "iscrowd": pa.array(truth.iscrowd[rows])}
            values["id"] = pa.array(np.arange(rows.start, rows.stop))
        else:
            values["score"] = pa.array(found.scores[rows])
        dtype = OBJECTS_TYPE if is_truth else DETECTIONS_TYPE
        lists = [pa.ListArray.from_arrays(numbers, values[field.name]) for field in dtype]
        columns = {
            "image_id": pa.array(truth.image_ids[first:last]),
            "width": pa.array(np.full(count, 640)),
            "height": pa.array(np.full(count, 480)),
            "path": pa.nulls(count, pa.string()),
            "error": pa.nulls(count, pa.string()),
            "image": pa.nulls(count, schema.field("image").type) if is_truth else None,
            "objects": pa.StructArray.from_arrays(lists, fields=list(dtype)),
        }
        columns["detections"] = columns["objects"]
        yield pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)
