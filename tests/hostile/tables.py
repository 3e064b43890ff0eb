"""Damage of tables: their Parquet files, columns, values, metadata and the files beside them."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq

from raydet.tables.layout import MANIFEST_NAME
from tests.hostile import things

Damage = Callable[[Path], None]
Rows = list[dict[str, Any]]


def part_of(folder: Path) -> Path:
    """Return the first file of a table."""
    return min(folder.glob("*.parquet"))


def write(folder: Path, table: pa.Table, *, fits: bool = True, **options: Any) -> None:
    """Replace the table's rows; `fits` adjusts the manifest, so that only the rows are wrong."""
    part = part_of(folder)
    pq.write_table(table, part, **options)
    if fits:
        footer = pq.read_metadata(part)
        groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
        sizes = [[group.num_rows, group.total_byte_size] for group in groups]
        change_manifest(folder, files={part.name: sizes}, num_rows=table.num_rows)


def change_manifest(folder: Path, **values: Any) -> None:
    """Overwrite entries of the manifest, if the folder has one."""
    path = folder / MANIFEST_NAME
    if not path.exists():
        return
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def read(folder: Path) -> pa.Table:
    """Read the first file of a table."""
    return pq.ParquetFile(part_of(folder)).read()


def rows(change: Callable[[Rows], None]) -> Damage:
    """Return the damage that changes rows within the schema."""

    def damage(folder: Path) -> None:
        table = read(folder)
        content = table.to_pylist()
        change(content)
        write(folder, pa.Table.from_pylist(content, schema=table.schema))

    return damage


def columns(change: Callable[[pa.Table], pa.Table]) -> Damage:
    """Return the damage that changes columns."""

    def damage(folder: Path) -> None:
        table = read(folder)
        write(folder, change(table).replace_schema_metadata(table.schema.metadata))

    return damage


def metadata(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Return the damage that changes the metadata of the schema; the function returns the new content or its bytes."""

    def damage(folder: Path) -> None:
        table = read(folder)
        content = change(json.loads(table.schema.metadata[b"raydet"]))
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        write(folder, table.replace_schema_metadata({**table.schema.metadata, b"raydet": data}))

    return damage


def _retyped(name: str, dtype: pa.DataType, value: object) -> Damage:
    def change(table: pa.Table) -> pa.Table:
        if name not in table.column_names:
            return table
        column = pa.array([value] * table.num_rows, dtype)
        return table.set_column(table.column_names.index(name), name, column)

    return columns(change)


def _nulls(name: str) -> Damage:
    def change(table: pa.Table) -> pa.Table:
        place = table.column_names.index(name)
        return table.set_column(place, name, pa.nulls(table.num_rows, table.schema.field(name).type))

    return columns(change)


def _each(field: str, value: object) -> Damage:
    """Set a field of the first row, such as `width` or `objects.bbox`."""

    def change(content: Rows) -> None:
        outer, _, inner = field.partition(".")
        if inner:
            content[0][outer] = {**(content[0][outer] or {}), inner: value}
        else:
            content[0][outer] = value

    return rows(change)


def _flipped(seed: int, part: float) -> Damage:
    """Change bytes at random: of the footer for a part of 0, or in a share of the file."""

    def damage(folder: Path) -> None:
        data = bytearray(part_of(folder).read_bytes())
        chooser = random.Random(seed)
        footer = int.from_bytes(data[-8:-4], "little")
        low, high = (len(data) - 8 - footer, len(data) - 8) if part == 0 else (4, len(data) - 8 - footer)
        for _ in range(3):
            data[chooser.randrange(low, max(high, low + 1))] ^= 1 << chooser.randrange(8)
        part_of(folder).write_bytes(data)

    return damage


def pictured(data: bytes) -> Damage:
    """Return the damage that puts another picture into the first row."""
    return _each("image", {"bytes": data, "path": "a.png"})


def _bytes(change: Callable[[bytes], bytes]) -> Damage:
    def damage(folder: Path) -> None:
        part_of(folder).write_bytes(change(part_of(folder).read_bytes()))

    return damage


def _manifest_name(name: str) -> Damage:
    def damage(folder: Path) -> None:
        text = name.replace("@OUTSIDE@", str(folder.parents[2] / "outside"))
        change_manifest(folder, files={text: _groups(folder)})

    return damage


def _groups(folder: Path) -> Any:
    return json.loads((folder / MANIFEST_NAME).read_text())["files"][part_of(folder).name]


def _part_outside(folder: Path) -> None:
    part, groups = part_of(folder), _groups(folder)
    shutil.move(part, folder.parents[2] / "outside" / part.name)
    change_manifest(folder, files={f"../../../outside/{part.name}": groups})


def _folder_for_manifest(folder: Path) -> None:
    (folder / MANIFEST_NAME).unlink()
    (folder / MANIFEST_NAME).mkdir()


def _thousand_columns(table: pa.Table) -> pa.Table:
    more = {f"c{number}": pa.array([number] * table.num_rows) for number in range(1000)}
    return pa.table({**dict(zip(table.column_names, table.columns, strict=True)), **more})


def _named_class(text: str) -> Damage:
    return metadata(lambda content: {**content, "categories": [{"id": 1, "name": text}, {"id": 2, "name": "dog"}]})


def _foreign_part(folder: Path) -> None:
    shutil.copy(part_of(folder), folder / "part-00001.parquet")


def _listed_twice(folder: Path) -> None:
    part, groups = part_of(folder), _groups(folder)
    shutil.copy(part_of(folder), folder / "part-00001.parquet")
    change_manifest(folder, files={part.name: groups, "part-00001.parquet": groups}, num_rows=4)


def _other_kind(folder: Path) -> None:
    other = "detections" if "objects" in read(folder).column_names else "images"
    source = folder.parent / other
    if source.exists():
        write(folder, read(source))


def _many_groups(folder: Path) -> None:
    table = read(folder)
    write(folder, table, row_group_size=1)
    change_manifest(folder, files={part_of(folder).name: [[1, 10**15]] * table.num_rows})


def _with_list(key: str) -> Callable[[Rows], None]:
    """Lengthen one of the lists of objects or detections, so that they no longer agree."""

    def change(content: Rows) -> None:
        for name in ("objects", "detections"):
            if name in content[0] and key in content[0][name]:
                content[0][name][key] = [*content[0][name][key], *content[0][name][key][:1], *content[0][name][key][:1]]

    return change


def _numbers(inner: str, value: object) -> Callable[[Rows], None]:
    """Set the first entry of a list of objects or detections."""

    def change(content: Rows) -> None:
        for name in ("objects", "detections"):
            if name in content[0] and inner in (content[0][name] or {}) and content[0][name][inner]:
                content[0][name][inner][0] = value

    return change


_TYPES: dict[str, tuple[pa.DataType, object]] = {
    "text": (pa.string(), "x"),
    "a fraction": (pa.float64(), 0.5),
    "binary": (pa.binary(), b"x"),
    "a list": (pa.list_(pa.int64()), [1]),
    "a struct": (pa.struct([("a", pa.int64())]), {"a": 1}),
    "an unsigned number": (pa.uint64(), 2**64 - 1),
    "a decimal": (pa.decimal128(38, 10), 1),
    "null": (pa.null(), None),
}
_INF, _NAN = float("inf"), float("nan")
_BOXES: dict[str, list[Any] | None] = {
    "NaN": [_NAN] * 4,
    "infinite": [0.0, 0.0, _INF, _INF],
    "negative": [5.0, 5.0, -3.0, -3.0],
    "huge": [0.0, 0.0, 1e300, 1e300],
    "far away": [-1e18, 1e18, 1.0, 1.0],
    "empty": [0.0] * 4,
    "tiny": [1.0, 1.0, 5e-324, 5e-324],
    "null": None,
    "of nulls": [None] * 4,
}

FILES: dict[str, Damage] = {
    "empty file": _bytes(lambda _: b""),
    "text for a part": _bytes(lambda _: b"this is no Parquet file"),
    "half a part": _bytes(lambda data: data[: len(data) // 2]),
    "no magic at the end": _bytes(lambda data: data[:-4]),
    "encrypted footer": _bytes(lambda data: b"PARE" + data[4:-4] + b"PARE"),
    "footer of 2^31 bytes": _bytes(lambda data: data[:-8] + b"\xff\xff\xff\x7f" + data[-4:]),
    "footer of no bytes": _bytes(lambda data: data[:-8] + bytes(4) + data[-4:]),
    "rubbish for a footer": _bytes(lambda _: b"PAR1" + b"\xff" * 500 + (500).to_bytes(4, "little") + b"PAR1"),
    "Arrow IPC for Parquet": _bytes(lambda _: b"ARROW1\0\0" + bytes(100)),
    "Feather": lambda folder: pyarrow.feather.write_feather(read(folder), str(part_of(folder))),
    **{f"changed footer {seed}": _flipped(seed, 0) for seed in range(12)},
    **{f"changed data {seed}": _flipped(seed, 1) for seed in range(6)},
}
"""Damage of any Parquet file."""

ANY: dict[str, Damage] = {
    **FILES,
    "part outside": _part_outside,
    "foreign part": _foreign_part,
    "a part twice": _listed_twice,
    "a part of another kind": _other_kind,
    "huge row groups": _many_groups,
    "no rows": columns(lambda table: table.slice(0, 0)),
    "rows that the manifest does not state": lambda folder: write(
        folder, pa.concat_tables([read(folder)] * 3), fits=False
    ),
    "an additional column": columns(lambda table: table.append_column("more", pa.array(["x"] * table.num_rows))),
    "a column called like a part": columns(lambda t: t.append_column("../../outside", pa.array(["x"] * t.num_rows))),
    "a column with escape sequences": columns(
        lambda table: table.append_column(things.ESCAPE, pa.array([things.ESCAPE] * table.num_rows))
    ),
    "1,000 columns": columns(_thousand_columns),
    "columns in another order": columns(lambda table: table.select(table.column_names[::-1])),
    "no metadata": lambda folder: write(folder, read(folder).replace_schema_metadata(None)),
    "metadata that is no JSON": metadata(lambda _: b"{"),
    "metadata that is not text": metadata(lambda _: b"\xff\xfe"),
    "metadata that is a list": metadata(lambda _: []),
    "metadata that is empty": metadata(lambda _: {}),
    "metadata 100,000 deep": metadata(lambda _: b"[" * 100_000),
    "metadata of 20 MB": metadata(lambda content: {**content, "more": "x" * 20_000_000}),
    "a million categories": metadata(
        lambda content: {**content, "categories": [{"id": n, "name": f"c{n}"} for n in range(1_000_000)]}
    ),
    "categories twice": metadata(lambda content: {**content, "categories": content["categories"] * 2}),
    "no categories": metadata(lambda content: {**content, "categories": []}),
    "categories that are text": metadata(lambda content: {**content, "categories": "cat"}),
    "a category without a name": metadata(lambda content: {**content, "categories": [{"id": 1}]}),
    "a category whose name is a number": metadata(lambda content: {**content, "categories": [{"id": "x", "name": 1}]}),
    "another version": metadata(lambda content: {**content, "schema_version": 1}),
    "a version that is text": metadata(lambda content: {**content, "schema_version": things.ESCAPE}),
    "another kind": metadata(lambda content: {**content, "kind": "trials"}),
    "an unknown kind": metadata(lambda content: {**content, "kind": things.ESCAPE}),
    "a kind that is a list": metadata(lambda content: {**content, "kind": ["images"]}),
    "a folder for the manifest": _folder_for_manifest,
    "a manifest of another table": lambda folder: change_manifest(folder, files={"other.parquet": [[2, 100]]}),
    "a manifest of 10^6 files": lambda folder: change_manifest(
        folder, files={f"part-{n:07d}.parquet": [[1, 1]] for n in range(1_000_000)}
    ),
    "a manifest of 10^15 rows": lambda folder: change_manifest(
        folder, files={part_of(folder).name: [[10**15, 10**15]]}, num_rows=10**15
    ),
    **{f"a manifest that names a file: {name}": _manifest_name(text) for name, text in things.NAMES.items()},
}
"""Damage of any table."""

IMAGES_AND_DETECTIONS: dict[str, Damage] = {
    **{f"image_id is {name}": _retyped("image_id", *typed) for name, typed in _TYPES.items()},
    **{f"width is {name}": _retyped("width", *typed) for name, typed in _TYPES.items()},
    **{f"the first image_id is {value}": _each("image_id", value) for value in (-1, 2**53, 2**63 - 1, -(2**63), None)},
    "the same image_id twice": rows(lambda content: content[1].update(image_id=content[0]["image_id"])),
    **{f"width is {value}": _each("width", value) for value in (0, -1, 2**40, None)},
    "no image_id": columns(lambda table: table.drop_columns(["image_id"])),
    "no width": columns(lambda table: table.drop_columns(["width"])),
    "nulls for every image_id": _nulls("image_id"),
    **{f"a box that is {name}": rows(_numbers("bbox", box)) for name, box in _BOXES.items()},
    **{f"a category of {value}": rows(_numbers("category", value)) for value in (-1, 2, 10**9, 2**63 - 1, None)},
    **{
        f"too many values of {key}": rows(_with_list(key))
        for key in ("id", "bbox", "category", "area", "iscrowd", "score")
    },
}
"""Damage of tables with boxes."""

IMAGES: dict[str, Damage] = {
    **{f"image is {name}": _retyped("image", *typed) for name, typed in _TYPES.items()},
    **{f"objects is {name}": _retyped("objects", *typed) for name, typed in _TYPES.items()},
    "nulls for every image": _nulls("image"),
    "nulls for all objects": _nulls("objects"),
    "an image that is null": _each("image", None),
    "an image without bytes and path": _each("image", {"bytes": None, "path": None}),
    "an image of no bytes": _each("image", {"bytes": b"", "path": "a.png"}),
    "objects that are null": _each("objects", None),
    **{f"{key} that is null": _each(f"objects.{key}", None) for key in ("id", "bbox", "category", "area", "iscrowd")},
    **{f"an area of {value}": rows(_numbers("area", value)) for value in (-1.0, _NAN, _INF, 1e300, None)},
    **{f"an annotation id of {value}": rows(_numbers("id", value)) for value in (0, -1, 2**63 - 1, None)},
    "iscrowd of null": rows(_numbers("iscrowd", None)),
    **{
        f"a path to {name}": _each("image", {"bytes": None, "path": text})
        for name, text in things.NAMES.items()
        if "\ud800" not in text and "\udce4" not in text
    },
}
"""Damage of images tables."""

DETECTIONS: dict[str, Damage] = {
    **{f"detections is {name}": _retyped("detections", *typed) for name, typed in _TYPES.items()},
    "nulls for all detections": _nulls("detections"),
    "detections that are null": _each("detections", None),
    **{f"{key} that is null": _each(f"detections.{key}", None) for key in ("bbox", "score", "category")},
    **{f"a score of {value}": rows(_numbers("score", value)) for value in (-1.0, 2.0, _NAN, _INF, -_INF, None)},
    "an error with escape sequences": _each("error", things.ESCAPE),
    "a path with escape sequences": _each("path", things.ESCAPE),
    "a path outside": _each("path", "../../outside/secret.png"),
    "a path that is null": _each("path", None),
    "10^6 boxes": rows(
        lambda content: content[0].update(
            detections={"bbox": [[0.0, 0.0, 1.0, 1.0]] * 10**6, "score": [0.5] * 10**6, "category": [0] * 10**6}
        )
    ),
}
"""Damage of detections tables."""

CLASS_NAMES: dict[str, Damage] = {name: _named_class(text) for name, text in things.LABELS.items()}
"""Class names in the metadata."""


def damages(kind: str) -> dict[str, Damage]:
    """Return the damages of a kind of table."""
    if kind == "rows":  # without metadata and manifest
        boxes = {name: damage for name, damage in IMAGES_AND_DETECTIONS.items() if name.startswith(("a box", "a cat"))}
        return {**FILES, **boxes, **IMAGES}
    own = {"images": IMAGES, "detections": DETECTIONS}.get(kind)
    return ANY if own is None else {**ANY, **IMAGES_AND_DETECTIONS, **own}
