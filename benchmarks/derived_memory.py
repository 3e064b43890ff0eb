"""Peak memory of the commands that derive tables from detections, over more and more images.

    python benchmarks/derived_memory.py [--images 10000 100000] [--quick]

The detections are generated, three an image, with class scores, embeddings of 64 numbers and thumbnails. Each command
runs in its own process; `peak MB` is the memory of its tree of processes, with shared pages counted once. The last line
is one JSON object.
"""

import argparse
import io
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from PIL import Image

from raydet.tables.kept.columns import IMAGE_EMBEDDING_COLUMN, QUERIES_COLUMN, KeptVectors
from raydet.tables.kept.thumbnails import THUMBNAIL_FIELD
from raydet.tables.schema import IMAGE_TYPE, OBJECTS_TYPE, THUMBNAIL_COLUMN, THUMBNAIL_TYPE, build_schema
from raydet.tables.table import TableWriter, open_table

if TYPE_CHECKING:
    from benchmarks.contest import child_environment, run_command
    from benchmarks.generated_boxes import CATEGORIES, NUM_CLASSES, generate, write_tables
else:  # a script imports its neighbours without the package name
    from contest import child_environment, run_command
    from generated_boxes import CATEGORIES, NUM_CLASSES, generate, write_tables

DIMENSION, BOXES_PER_IMAGE, DETECTIONS_PER_IMAGE = 64, 2, 3
IMAGES_PER_PART = 10_000
COMMANDS: Mapping[str, tuple[str, ...]] = {
    "prepare detections": (
        *("prepare", "detections", "--detections", "{0}/kept", "--data", "{0}/images"),
        *("--threshold", "0.6", "--ignore-threshold", "0.3"),
    ),
    "select --by": ("select", "--detections", "{0}/kept", "--by", "uncertainty,rare,diversity", "--num", "100"),
    "select --similar-to": ("select", "--detections", "{0}/kept", "--similar-to", "1:0"),
    "select --near-duplicates": ("select", "--detections", "{0}/kept", "--near-duplicates"),
    "the same by embeddings": (
        *("select", "--detections", "{0}/kept", "--near-duplicates", "--compare", "embedding"),
        *("--min-similarity", "0.99"),
    ),
}


def main() -> None:
    """Run every command over both tables, and print its memory and its time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 100_000], help="sizes of the tables")
    parser.add_argument("--quick", action="store_true", help="1,000 and 10,000 images")
    options = parser.parse_args()
    sizes = [1_000, 10_000] if options.quick else options.images
    summary: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="raydet-benchmark-") as name:
        for num_images in sizes:
            folder = Path(name, str(num_images))
            folder.mkdir()
            _write(folder, num_images)
            for command, words in COMMANDS.items():
                out = folder / command.replace(" ", "_")
                arguments = [*(word.format(folder) for word in words), "--out", str(out)]
                _, cost = run_command(command, [sys.executable, "-m", "raydet", *arguments], child_environment())
                numbers = {"peak_mb": round(cost["peak_mb"]), "seconds": round(cost["seconds"], 1)}
                summary.setdefault(command, {})[str(num_images)] = numbers
                print(f"{command:26}{num_images:>9,} images {numbers}", flush=True)
    print(json.dumps(summary))


def _write(folder: Path, num_images: int) -> None:
    """Write the tables `truth` and `kept`, holding one part at a time in memory."""
    size = min(num_images, IMAGES_PER_PART)
    parts = [(size, BOXES_PER_IMAGE * size, DETECTIONS_PER_IMAGE * size, first) for first in range(0, num_images, size)]
    write_tables((generate(*numbers, seed=first, first_id=first) for *numbers, first in parts), folder)
    schema = build_schema("images")
    with TableWriter(str(folder / "images"), schema, config_hash="generated") as writer:
        for batch in open_table(str(folder / "truth"), "images").iter_batches():
            writer.write(_with_pictures(batch, schema))
    kept = KeptVectors(class_scores="sigmoid", num_classes=NUM_CLASSES, dimension=DIMENSION)
    schema = kept.schema(CATEGORIES, {}, [THUMBNAIL_FIELD])
    with TableWriter(str(folder / "kept"), schema, config_hash="generated") as writer:
        for batch in open_table(str(folder / "detections"), "detections").iter_batches():
            writer.write(_with_vectors(batch, schema))


def _with_pictures(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Return rows of an images table with a picture in each, and without labels."""
    file = io.BytesIO()
    Image.new("RGB", (640, 480)).save(file, "JPEG")
    count = batch.num_rows
    starts = pa.array(np.zeros(count + 1, np.int32))
    parts = {"bytes": pa.array([file.getvalue()] * count), "path": pa.nulls(count, pa.string())}
    lists = [pa.ListArray.from_arrays(starts, pa.array([], field.type.value_type)) for field in OBJECTS_TYPE]
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    columns["image"] = pa.StructArray.from_arrays([parts[field.name] for field in IMAGE_TYPE], fields=list(IMAGE_TYPE))
    columns["objects"] = pa.StructArray.from_arrays(lists, fields=list(OBJECTS_TYPE))
    return pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)


def _with_vectors(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Return rows of a detections table with a query for each detection, and with random vectors."""
    generator = np.random.default_rng(int(batch.column("image_id")[0].as_py()))
    detections = batch.column("detections")
    bbox = detections.field("bbox")
    starts = bbox.offsets.to_numpy() - bbox.offsets[0].as_py()
    num_queries = int(starts[-1])
    numbers = np.arange(num_queries) - np.repeat(starts[:-1], np.diff(starts))

    def lists(values: pa.Array) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(starts, pa.int32()), values)

    def vectors(count: int, length: int) -> pa.Array:
        halves = generator.random(count * length, np.float32).astype(np.float16)
        return pa.FixedSizeListArray.from_arrays(pa.array(halves), length)

    columns = {name: batch.column(name) for name in batch.schema.names}
    own = {field.name: detections.field(field.name) for field in detections.type}
    own["query"] = lists(pa.array(numbers, schema.field("detections").type.field("query").type.value_type))
    fields = schema.field("detections").type
    columns["detections"] = pa.StructArray.from_arrays([own[field.name] for field in fields], fields=list(fields))
    queries = {"bbox": bbox, "class_scores": lists(vectors(num_queries, NUM_CLASSES))}
    queries["embedding"] = lists(vectors(num_queries, DIMENSION))
    fields = schema.field(QUERIES_COLUMN).type
    columns[QUERIES_COLUMN] = pa.StructArray.from_arrays([queries[field.name] for field in fields], fields=list(fields))
    columns[IMAGE_EMBEDDING_COLUMN] = vectors(batch.num_rows, DIMENSION)
    pixels = pa.array(generator.integers(256, size=batch.num_rows * THUMBNAIL_TYPE.list_size, dtype=np.uint8))
    columns[THUMBNAIL_COLUMN] = pa.FixedSizeListArray.from_arrays(pixels, THUMBNAIL_TYPE.list_size)
    return pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)


if __name__ == "__main__":
    main()
