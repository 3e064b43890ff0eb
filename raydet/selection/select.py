"""The command `select`: a detections table with embeddings → near-duplicates, or what is similar to one thing."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from raydet.common.console import Console, counted
from raydet.common.notebook.showing import Shown
from raydet.config import SelectConfig, config_hash, identity
from raydet.config.fields import with_options
from raydet.selection.near_duplicates import near_duplicates
from raydet.selection.similar import Probe, find_similar
from raydet.selection.vectors import ImageVectors, open_embeddings
from raydet.tables import storage
from raydet.tables.columns import Integers, image_ids_in, take_rows
from raydet.tables.layout import MANIFEST_NAME
from raydet.tables.output_folder import open_folder
from raydet.tables.schema import TableKind, build_schema
from raydet.tables.table import Table, TableWriter

_LISTS: dict[TableKind, str] = {"near_duplicates": "distinct.txt", "similar": "similar.txt"}
"""Name of the list by table."""


@dataclass(frozen=True, kw_only=True)
class Selection(Shown):
    """Result of `select`.

    Attributes:
        out: Folder that was written.
        table: URI of the table `near_duplicates` or `similar`.
        list_file: URI of the list of images: with `near_duplicates` those that remain without the duplicates.
        num_found: Rows of the table.
        num_listed: Images in the list.
    """

    out: str
    table: str
    list_file: str
    num_found: int
    num_listed: int

    def lines(self) -> list[str]:
        """Return a summary for the terminal."""
        return [
            f"{counted(self.num_found, 'row')}: {self.table}",
            f"{counted(self.num_listed, 'image')} listed: {self.list_file}",
        ]


@with_options(SelectConfig)
def select(config: SelectConfig, *, console: Console | None = None) -> Selection:
    """Find near-duplicates among scored images, or what is most similar to one of them or to an object in it.

    Raises:
        UserError: The table has no embeddings or lacks the image or the detection, or the folder holds other files.
        RunError: The disk is full.
    """
    console = console or Console()
    table, dimension = open_embeddings(config.detections)
    kind: TableKind = "near_duplicates" if config.near_duplicates else "similar"
    with open_folder(config.out, command="select", notify=console.line) as folder:
        run_identity = {**identity(config), "detections_fingerprint": table.fingerprint}
        folder.admit(run_identity, folders=[kind], is_disposable=not folder.exists(kind, MANIFEST_NAME))
        with console.progress("comparing images"):
            found = (
                _duplicates(table, dimension, config) if config.near_duplicates else _similar(table, dimension, config)
            )
        folder.delete_table(kind)
        folder.begin(run_identity, folders=[kind])
        num_listed = _write_list(folder.uri_of(_LISTS[kind]), found.listed(table))
        schema = build_schema(kind, table.categories)
        num_found = 0
        with TableWriter(folder.uri_of(kind), schema, config_hash=config_hash(config)) as writer:
            for rows in found.rows(table):
                num_found += len(rows)
                writer.write_rows(rows)
        return Selection(
            out=folder.uri,
            table=folder.uri_of(kind),
            list_file=folder.uri_of(_LISTS[kind]),
            num_found=num_found,
            num_listed=num_listed,
        )


class _Results(Protocol):
    """Rows and images to write."""

    def rows(self, table: Table) -> Iterator[list[dict[str, Any]]]:
        """Yield the rows of the table to write."""

    def listed(self, table: Table) -> Iterator[str | None]:
        """Yield the paths of the images in the list."""


@dataclass(frozen=True)
class _Duplicates:
    """Near-duplicates among the images with the given ids, as `near_duplicates` returns them."""

    image_ids: Integers
    original: Integers
    similarity: npt.NDArray[np.float32]

    def rows(self, table: Table) -> Iterator[list[dict[str, Any]]]:
        for places, paths in self._paths(table):
            yield [
                {
                    "image_id": int(self.image_ids[place]),
                    "path": path,
                    "duplicate_of": int(self.image_ids[self.original[place]]),
                    "similarity": float(self.similarity[place]),
                }
                for place, path in zip(places.tolist(), paths, strict=True)
                if self.original[place] >= 0
            ]

    def listed(self, table: Table) -> Iterator[str | None]:
        for places, paths in self._paths(table):
            yield from (path for place, path in zip(places.tolist(), paths, strict=True) if self.original[place] < 0)

    def _paths(self, table: Table) -> Iterator[tuple[Integers, list[str | None]]]:
        """Yield the places of images, and their paths; a second pass, so that the paths need no memory."""
        start = 0
        for batch in table.iter_batches(["image_id", "path"]):
            ids = image_ids_in(batch)
            rows = np.flatnonzero(np.isin(ids, self.image_ids[start : start + len(ids)]))
            yield np.arange(start, start + len(rows)), take_rows(batch.column("path"), rows).to_pylist()
            start += len(rows)


@dataclass(frozen=True)
class _Similar:
    """Rows of the table `similar`."""

    found: list[dict[str, Any]]

    def rows(self, table: Table) -> Iterator[list[dict[str, Any]]]:
        yield self.found

    def listed(self, table: Table) -> Iterator[str | None]:
        yield from dict.fromkeys(row["path"] for row in self.found)


def _duplicates(table: Table, dimension: int, config: SelectConfig) -> _Results:
    assert config.min_similarity is not None, "the config requires it for near-duplicates"
    with ImageVectors(table, dimension) as vectors:
        return _Duplicates(vectors.image_ids, *near_duplicates(vectors, config.min_similarity))


def _similar(table: Table, dimension: int, config: SelectConfig) -> _Results:
    least = -np.inf if config.min_similarity is None else config.min_similarity
    probe = Probe.parse(config.similar_to or "")
    return _Similar(find_similar(table, dimension, probe, num=config.num, least=least))


def _write_list(uri: str, paths: Iterator[str | None]) -> int:
    """Write paths, one a line, and return their number; a path that no line can hold is left out."""
    count = 0
    with storage.open_output(uri) as file:
        for path in paths:
            if path and not path.startswith("#") and path == path.strip() and len(path.splitlines()) == 1:
                file.write(f"{path}\n".encode())
                count += 1
    return count
