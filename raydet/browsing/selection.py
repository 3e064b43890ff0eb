"""Selected images → lists on disk: ids and paths as Parquet, and the files as a list that other commands take."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raydet.browsing.sources import Sources
from raydet.common.errors import UserError
from raydet.images.collection import Collection, IndexedCollection, TableCollection
from raydet.tables import storage
from raydet.tables.columns import Integers
from raydet.tables.new_output import new_file


def save_selection(place: str, sources: Sources, rows: pa.Table) -> list[str]:
    """Write the selected images, replacing an earlier selection at the same place.

    PLACE.parquet has the columns `image_id` and `path`. PLACE.txt has one file a line, as `predict --data` and `prepare
    images --images` take it; it is written only if every selected image is a file of its own.

    Args:
        place: Path or URI without an ending.
        sources: What the page shows.
        rows: Columns `image` (row in the sources), `image_id` and `path`.

    Returns:
        The files written.

    Raises:
        UserError: Nothing is selected, or the place cannot be written.
    """
    if not rows.num_rows:
        raise UserError("no image is selected")
    place = storage.absolute_uri(place)
    files = _files_of(sources, rows["image"].to_numpy())
    written = [f"{place}.parquet"]
    with new_file(written[0], command="browse", endings=(".parquet",)) as file:
        pq.write_table(rows.select(["image_id", "path"]).cast(_SCHEMA), file)
    if files is not None:
        written.append(f"{place}.txt")
        about = f"# {len(files)} of {len(sources.images.image_ids)} images of {sources.uri}".splitlines()[0]
        with new_file(written[1], command="browse", endings=(".txt",)) as file:
            file.write("".join(f"{line}\n" for line in [about, *files]).encode())
    return written


_SCHEMA = pa.schema([("image_id", pa.int64()), ("path", pa.string())])


def _files_of(sources: Sources, images: npt.NDArray[np.int32]) -> list[str] | None:
    """Return the file of each image; None if one is inside a table or tar file, or has a name that no list can hold."""
    positions = sources.positions[images]
    if sources.collection is None or (positions < 0).any():
        return None
    files: dict[int, str] = {}
    for position, file in _references(sources.collection, np.unique(positions)):
        if file is None or file.startswith("#") or file != file.strip() or len(file.splitlines()) != 1:
            return None
        files[position] = file
    return [files[position] for position in positions.tolist()]


def _references(collection: Collection, positions: Integers) -> Iterator[tuple[int, str | None]]:
    """Yield each position, ascending, with the file that the image is; None if it is a part of something else."""
    if isinstance(collection, TableCollection):
        yield from _in_table(collection, positions)
    elif isinstance(collection, IndexedCollection):
        yield from _in_index(collection, positions)


def _in_table(collection: TableCollection, positions: Integers) -> Iterator[tuple[int, str | None]]:
    ends = np.cumsum(collection.table.layout.num_rows)
    for number in np.unique(np.searchsorted(ends, positions, side="right")).tolist():
        first, last = int(ends[number] - collection.table.layout.num_rows[number]), int(ends[number])
        content = next(collection.table.read_row_groups(collection.table.row_groups(first, last), ["image"]))
        own = positions[(positions >= first) & (positions < last)]
        rows = content["image"].take(pa.array(own - first))
        paths = pc.if_else(pc.is_null(pc.struct_field(rows, "bytes")), pc.struct_field(rows, "path"), None)
        yield from zip(own.tolist(), paths.to_pylist(), strict=True)


def _in_index(collection: IndexedCollection, positions: Integers) -> Iterator[tuple[int, str | None]]:
    wanted = set(positions.tolist())
    references = collection.references(0, int(positions[-1]) + 1)
    for position, (_, reference) in enumerate(references):
        if position in wanted:
            yield position, reference.uri if reference.offset is None else None
