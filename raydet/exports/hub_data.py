"""Tables → a data set for the Hugging Face Hub: the Parquet files to upload, unchanged, and the dataset card.

The card's metadata registers the files: configurations, splits, and features with class names. `datasets.load_dataset`
and the viewer of the Hub need nothing else.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from huggingface_hub import DatasetCardData
from pyarrow import fs as pafs

from raydet.common.errors import UserError
from raydet.config import PushConfig
from raydet.exports.markdown import escaped, fenced, markdown_table
from raydet.exports.rows import refuse_categories
from raydet.measuring import metrics_folder
from raydet.tables import storage
from raydet.tables.columns import Integers, flatten
from raydet.tables.schema import TableKind
from raydet.tables.table import Table, is_table, open_table, read_footers

RepoKind = Literal["model", "dataset"]
_SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
"""Names of table folders, and of the splits on the Hub, where `val` is called `validation`."""
_BOXES = {"images": "objects", "detections": "detections"}
_LIMITS = {10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M", 10**7: "1M<n<10M"}
_COLUMNS = {
    "image_id": "number of the image, unique",
    "image": "encoded image file, and its name",
    "path": "image file",
    "width": "width of the upright image in pixels",
    "height": "height of the upright image in pixels",
    "objects": "labelled boxes: id, box, class, area in square pixels, and whether the box stands for a crowd",
    "detections": "detected boxes in descending score order: box, score and class",
    "queries": "queries of the detections: box, and the scores of all classes or the embedding that the run kept",
    "image_embedding": "mean of the encoder's features of the image; null if it was not read",
    "thumbnail": "the image at 8 × 8 pixels: red, green and blue, row by row; null if it was not read",
    "error": "why an image has no detections; null if it was read",
}
"""Descriptions of the columns of images and detections tables."""


@dataclass(frozen=True, kw_only=True)
class HubContent:
    """Content of a commit to the Hub.

    Attributes:
        files: URI of each file by its name in the repository.
        card: Content of README.md: metadata in YAML, then markdown.
        notes: Warnings for the user who pushes it.
        is_stale: Selects files of an earlier push to delete, by name.
    """

    kind: RepoKind
    files: Mapping[str, str]
    card: str
    notes: tuple[str, ...]
    is_stale: Callable[[str], bool]


@dataclass(frozen=True, kw_only=True)
class _HubTable:
    """A table as a split of a configuration.

    `counts` is the number of boxes of each class, int64 [classes], None for tables without boxes; `revealing` lists the
    columns that hold absolute paths or URIs.
    """

    config: str
    split: str
    table: Table
    num_bytes: int
    counts: Integers | None
    revealing: tuple[str, ...]

    @property
    def folder(self) -> str:
        """Folder in the repository."""
        return self.split if self.config == "default" else self.config


def read_dataset(config: PushConfig) -> HubContent:
    """Check the tables of `config.data`, and build the card from their rows.

    Every file is compared with its manifest, but only the columns that the card describes are read.

    Raises:
        UserError: There are no tables, one is damaged or refers to images instead of holding them, or they do not
            belong together.
    """
    assert config.data is not None
    parts = _parts(storage.absolute_uri(config.data))
    if any(part.table.schema.names != parts[0].table.schema.names for part in parts if part.config == "default"):
        raise UserError(f"the tables in {config.data} have different columns; push them to different repositories")
    files = {f"{part.folder}/{name}": storage.join(part.table.uri, name) for part in parts for name in part.table.files}
    revealing = sorted({name for part in parts for name in part.revealing})
    note = f"whoever may read {config.repo} sees the absolute paths or URIs in the columns {', '.join(revealing)}"
    card = f"---\n{_metadata(config, parts).to_yaml()}\n---\n\n" + "\n\n".join(_sections(config, parts)) + "\n"
    folders = {name.partition("/")[0] for name in files}
    return HubContent(
        kind="dataset",
        files=files,
        card=card,
        notes=(note,) if revealing else (),
        is_stale=lambda name: name.partition("/")[0] in folders and name.endswith(".parquet"),
    )


def _parts(uri: str) -> list[_HubTable]:
    if is_table(uri):
        split = _SPLITS.get(storage.split(uri)[1], "train")
        return [_part("default", split, open_table(uri, get_args(TableKind)))]
    if is_table(storage.join(uri, "metrics")):
        kinds = [kind for kind in reversed(metrics_folder.KINDS) if is_table(storage.join(uri, kind))]
        return [_part(kind, "train", open_table(storage.join(uri, kind), kind)) for kind in kinds]
    names = [name for name in _SPLITS if is_table(storage.join(uri, name))]
    if not names:
        raise UserError(
            f"--data {uri} must be a table, a folder with the tables train and val, or the --out folder of "
            "`raydet evaluate`"
        )
    tables = [open_table(storage.join(uri, name), ("images", "detections")) for name in names]
    if len({(table.kind, table.categories) for table in tables}) > 1:
        raise UserError(
            f"the tables {', '.join(names)} in {uri} are of different kinds or classes; push them to different "
            "repositories"
        )
    return [_part("default", _SPLITS[name], table) for name, table in zip(names, tables, strict=True)]


def _part(config: str, split: str, table: Table) -> _HubTable:
    filesystem, path = storage.resolve(table.uri)
    for name in table.files:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.=-]*\.parquet", name):
            raise UserError(f"{table.uri} has a file with an unusual name, which is not uploaded: {name}")
        if isinstance(filesystem, pafs.LocalFileSystem) and Path(path, name).is_symlink():
            raise UserError(f"{table.uri} has a link instead of the file {name}, which is not followed")
    if table.kind == "images":
        _refuse_references(table)
    counts, revealing = _examine(table)
    sizes = filesystem.get_file_info([f"{path}/{name}" for name in table.files])
    num_bytes = sum(info.size or 0 for info in sizes)
    return _HubTable(config=config, split=split, table=table, num_bytes=num_bytes, counts=counts, revealing=revealing)


def _refuse_references(table: Table) -> None:
    """Refuse an images table that refers to its images; the footers state whether there are bytes."""
    for footer in read_footers(table.uri, table.files):
        assert footer is not None, "the table was examined"
        paths = [footer.schema.column(index).path for index in range(len(footer.schema))]
        for group in map(footer.row_group, range(footer.num_row_groups)):
            statistics = group.column(paths.index("image.bytes")).statistics
            if statistics is not None and statistics.null_count:
                raise UserError(
                    f"{table.uri} refers to its images instead of holding them, so that nobody else could open the "
                    "data set; write it again with --image-storage inline"
                )


def _examine(table: Table) -> tuple[Integers | None, tuple[str, ...]]:
    """Return the number of boxes of each class, and the columns that hold absolute paths or URIs."""
    boxes = _BOXES.get(table.kind)
    texts = [field.name for field in table.schema if pa.types.is_string(field.type)]
    texts += ["image.path"] if table.kind == "images" else []
    counts = np.zeros(len(table.categories), np.int64)
    revealing: set[str] = set()
    for batch in table.iter_batches(["image_id", f"{boxes}.category", *texts] if boxes else texts):
        for name in set(texts) - revealing:
            column = batch.column(name.partition(".")[0])
            values = pc.struct_field(column, "path") if name == "image.path" else column
            if pc.any(pc.match_substring_regex(values, r"^(/|[A-Za-z][A-Za-z0-9+.-]*://)")).as_py():
                revealing.add(name)
        if boxes:
            lengths, columns = flatten(batch, boxes, ("category",), table.uri)
            image_ids = np.repeat(batch.column("image_id").to_numpy(), lengths)
            refuse_categories(table, image_ids, columns["category"])
            counts += np.bincount(columns["category"], minlength=len(counts))
    return counts if boxes else None, tuple(revealing)


def _metadata(config: PushConfig, parts: Sequence[_HubTable]) -> DatasetCardData:
    # Slow to import, and the upload of a model does not need it.
    from datasets import DatasetInfo, Features
    from datasets.info import DatasetInfosDict
    from datasets.utils.metadata import MetadataConfigs

    num_rows = parts[0].table.num_rows if parts[0].counts is None else sum(part.table.num_rows for part in parts)
    has_labels = parts[0].table.kind == "images"
    data = DatasetCardData(
        license=config.license,
        pretty_name=config.repo.partition("/")[2],
        tags=["object-detection", "raydet"],
        task_categories=["object-detection"] if has_labels else None,
        size_categories=next((name for limit, name in _LIMITS.items() if num_rows < limit), "n>10M"),
    )
    infos, configs = DatasetInfosDict(), MetadataConfigs()
    for name in dict.fromkeys(part.config for part in parts):
        own = [part for part in parts if part.config == name]
        memory = [int(part.table.layout.num_bytes.sum()) for part in own]
        infos[name] = DatasetInfo(
            features=Features.from_arrow_schema(own[0].table.schema),
            splits={
                part.split: {"name": part.split, "num_bytes": num_bytes, "num_examples": part.table.num_rows}
                for part, num_bytes in zip(own, memory, strict=True)
            },
            download_size=sum(part.num_bytes for part in own),
            dataset_size=sum(memory),
        )
        files = [{"split": part.split, "path": f"{part.folder}/*.parquet"} for part in own]
        configs[name] = {"data_files": files, **({"default": True} if name == "metrics" else {})}
    infos.to_dataset_card_data(data)
    configs.to_dataset_card_data(data)
    return data


def _sections(config: PushConfig, parts: Sequence[_HubTable]) -> list[str]:
    kind = parts[0].table.kind
    titles = {
        "images": "Images with labelled boxes",
        "detections": "Detections of a model, one row per image",
        "metrics": "Metrics of object detection, computed by `raydet evaluate`",
    }
    sections = [
        f"# {escaped(config.repo.partition('/')[2])}",
        f"{titles.get(kind, f'A table of {kind}')}; written by raydet.",
    ]
    if kind in _BOXES:
        header = ("split", "images", _BOXES[kind])
        rows = [
            (part.split, f"{part.table.num_rows:,}", f"{part.counts.sum():,}")
            for part in parts
            if part.counts is not None
        ]
        sections += [markdown_table(header, rows), *_classes_section(parts), *_columns_section(parts[0].table)]
    else:
        lengths = [(part.table.kind, f"{part.table.num_rows:,}") for part in parts]
        sections.append(markdown_table(("table", "rows"), lengths))
    return [*sections, "## Use", *_use_section(config, parts)]


def _classes_section(parts: Sequence[_HubTable]) -> list[str]:
    counts = [part.counts.tolist() for part in parts if part.counts is not None]
    rows = [
        (str(index), escaped(category.name), *(f"{own[index]:,}" for own in counts))
        for index, category in enumerate(parts[0].table.categories)
    ]
    header = ("index", "class", *(f"boxes in {part.split}" for part in parts))
    return ["## Classes", markdown_table(header, rows)] if rows else []


def _columns_section(table: Table) -> list[str]:
    rows = [(f"`{name}`", _COLUMNS.get(name, "further column of the source")) for name in table.schema.names]
    return [
        "## Columns",
        "Boxes are (x, y, width, height) in absolute pixels of the upright image; classes are indices from 0.",
        markdown_table(("column", "content"), rows),
    ]


def _use_section(config: PushConfig, parts: Sequence[_HubTable]) -> list[str]:
    first = parts[0]
    revision = f', revision="{config.revision}"' if config.revision else ""
    name = "" if first.config == "default" else f'"{first.config}", '
    code = f'from datasets import load_dataset\n\nrows = load_dataset("{config.repo}", {name}split="{first.split}"'
    code += f"{revision})\n"
    boxes = _BOXES.get(first.table.kind)
    if boxes and first.table.categories:
        code += f'print(rows.features["{boxes}"]["category"].feature.names)\n'
    code += "print(rows[0])"
    branch = f"@{config.revision.replace('/', '%2F')}" if config.revision else ""
    query = f"SELECT * FROM 'hf://datasets/{config.repo}{branch}/{first.folder}/*.parquet' LIMIT 10;"
    sections = [fenced(code, "python"), "In DuckDB:", fenced(query, "sql")]
    if first.table.kind == "images":
        shell = f"raydet prepare hub --dataset {config.repo} --split {first.split} --out data/{first.split}"
        shell += f" --revision {config.revision}" if config.revision else ""
        sections += ["As an images table, to train and evaluate with raydet:", fenced(shell, "bash")]
    return sections
