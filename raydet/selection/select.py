"""The command `select`: a detections table → what to label next, near-duplicates, or what is similar to one thing."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from raydet.common.console import Console, counted
from raydet.common.errors import UserError
from raydet.common.notebook.showing import Shown
from raydet.config import SelectConfig, config_hash, identity
from raydet.config.fields import with_options
from raydet.selection.near_duplicates import near_duplicates
from raydet.selection.next_images import NextImages, next_images
from raydet.selection.scored_files import file_finder
from raydet.selection.similar import Probe, find_similar
from raydet.selection.vectors import ImageVectors, Sameness
from raydet.tables import storage
from raydet.tables.columns import Integers, image_ids_in, take_rows
from raydet.tables.layout import MANIFEST_NAME
from raydet.tables.output_folder import open_folder
from raydet.tables.schema import TableKind, build_schema
from raydet.tables.table import Table, TableWriter, open_table

_LISTS: dict[TableKind, str] = {
    "near_duplicates": "distinct.txt",
    "similar": "similar.txt",
    "to_label": "to_label.txt",
}
"""Name of the list by table."""
_DETECTIONS: TableKind = "detections"


@dataclass(frozen=True, kw_only=True)
class Selection(Shown):
    """Result of `select`.

    Attributes:
        out: Folder that was written.
        table: URI of the table `to_label`, `near_duplicates` or `similar`.
        list_file: URI of the list of images: with `near_duplicates` those that remain without the duplicates.
        num_found: Rows of the table.
        num_listed: Images in the list.
        detections: URI of a table with the detections in the images to label; None for other selections.
    """

    out: str
    table: str
    list_file: str
    num_found: int
    num_listed: int
    detections: str | None = None

    def lines(self) -> list[str]:
        """Return a summary for the terminal."""
        lines = [
            f"{counted(self.num_found, 'row')}: {self.table}",
            f"{counted(self.num_listed, 'image')} listed: {self.list_file}",
        ]
        return (
            lines if self.detections is None else [*lines, f"their detections, for a labelling tool: {self.detections}"]
        )


@with_options(SelectConfig)
def select(config: SelectConfig, *, console: Console | None = None) -> Selection:
    """Find what to label next among scored images, near-duplicates, or what is similar to an image or an object.

    Raises:
        UserError: The table lacks the vectors, the image or the detection, another table does not fit it, or the folder
            holds other files.
        RunError: The disk is full.
    """
    console = console or Console()
    kind: TableKind = "to_label" if config.by else "near_duplicates" if config.near_duplicates else "similar"
    table = open_table(config.detections, "detections")
    other = None if config.other is None else open_table(config.other, "detections")
    labelled = None if config.labelled_data is None else open_table(config.labelled_data, "images")
    folders: list[str] = [kind, _DETECTIONS] if config.by else [kind]
    with open_folder(config.out, command="select", notify=console.line) as folder:
        run_identity = {
            **identity(config),
            "detections_fingerprint": table.fingerprint,
            "other_fingerprint": other and other.fingerprint,
            "labelled_fingerprint": labelled and labelled.fingerprint,
        }
        folder.admit(run_identity, folders=folders, is_disposable=not folder.exists(kind, MANIFEST_NAME))
        found: _Results
        with console.progress("comparing images", total=table.num_rows if config.by else None) as progress:
            if config.by:
                found = next_images(table, config, progress, other=other, labelled=labelled)
            elif config.near_duplicates:
                found = _duplicates(table, config)
            else:
                found = _similar(table, config)
        for name in folders:
            folder.delete_table(name)
        folder.begin(run_identity, folders=folders)
        num_listed = _write_list(folder.uri_of(_LISTS[kind]), found.listed(table), file_finder(table))
        if isinstance(found, NextImages):
            rows_found = found.detections
            uri = folder.uri_of(_DETECTIONS)
            with TableWriter(uri, rows_found.schema, config_hash=config_hash(config)) as writer:
                writer.extra["id_space"] = table.manifest.get("id_space")
                writer.write(rows_found)
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
            detections=folder.uri_of(_DETECTIONS) if config.by else None,
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


def _duplicates(table: Table, config: SelectConfig) -> _Results:
    same = Sameness.of(table, config)
    if same is None:
        raise UserError(
            f"{table.uri} has embeddings but no thumbnails: --min-similarity is required, which depends on the model, "
            "so look at some pairs first; or score the images again with `raydet predict --keep thumbnail`"
        )
    with ImageVectors(table, same.column) as vectors, _cluster(table, config) as cluster:
        search = None if cluster is None else cluster.VectorActors(table, same.column).search
        return _Duplicates(vectors.image_ids, *near_duplicates(vectors, same.min_similarity, search=search))


def _similar(table: Table, config: SelectConfig) -> _Results:
    least = -np.inf if config.min_similarity is None else config.min_similarity
    probe = Probe.parse(config.similar_to or "")
    with _cluster(table, config) as cluster:
        parallel = None if cluster is None else partial(cluster.search_parts, table)
        return _Similar(find_similar(table, probe, num=config.num, least=least, parallel=parallel))


@contextlib.contextmanager
def _cluster(table: Table, config: SelectConfig) -> Iterator[ModuleType | None]:
    """Context manager: connect to `--ray-address`, and yield the module that works there; None without an address."""
    if config.ray_address is None:
        yield None
        return
    # Ray takes a second to import.
    from raydet.cluster.shared_storage import table_session
    from raydet.selection import on_ray

    with table_session(config.ray_address, "--detections", table):
        yield on_ray


def _write_list(uri: str, paths: Iterator[str | None], file_of: Callable[[str], str]) -> int:
    """Write the files of paths, one a line, and return their number; one that no line can hold is left out.

    Relative paths would start from the folder of the list.
    """
    count = 0
    with storage.open_output(uri) as file:
        for path in (file_of(path) for path in paths if path):
            if not path.startswith("#") and path == path.strip() and len(path.splitlines()) == 1:
                file.write(f"{path}\n".encode())
                count += 1
    return count
