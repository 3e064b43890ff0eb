"""Temporary storage on this machine's disk for data that may be larger than memory, such as millions of labels.

The data lives in anonymous SQLite databases: files in TMPDIR, or else /var/tmp, that are unlinked immediately, so
nothing is left behind when the process dies.
"""

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

import msgspec

from raydet.common.errors import RunError

CACHE_BYTES = 32 * 2**20
"""Page cache of a database, in memory."""

_FETCH_ROWS = 256

Item = TypeVar("Item")


def open_database(*, cache_bytes: int = CACHE_BYTES) -> sqlite3.Connection:
    """Open an empty temporary database, private to this process; several threads may read it."""
    connection = sqlite3.connect("", check_same_thread=False, isolation_level=None)
    cache = f"cache_size = -{cache_bytes >> 10}"
    for setting in ("journal_mode = OFF", "synchronous = OFF", "temp_store = FILE", cache):
        connection.execute(f"PRAGMA {setting}")
    # Never committed, since nothing else reads it: a commit per row would dominate the run time.
    connection.execute("BEGIN")
    return connection


@contextlib.contextmanager
def spill_errors() -> Iterator[None]:
    """Context manager: convert a failed write of a temporary database, which reading can cause too, to a RunError.

    Raises:
        RunError: The disk is full or the file cannot grow.
    """
    try:
        yield
    except sqlite3.OperationalError as error:
        raise RunError(
            f"cannot store labels in a temporary file: {error}; set TMPDIR to a folder with free space"
        ) from error


def select(database: sqlite3.Connection, query: str, *values: object) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of a query, fetched in small batches.

    Raises:
        RunError: See `spill_errors`.
    """
    with spill_errors():
        cursor = database.execute(query, values)
        rows = cursor.fetchmany(_FETCH_ROWS)
    while rows:
        yield from rows
        with spill_errors():
            rows = cursor.fetchmany(_FETCH_ROWS)


class Spilled(Generic[Item]):
    """Append-only list on disk with sequential and random access."""

    def __init__(self, kind: type[Item], items: Iterable[Item] = (), *, cache_bytes: int = CACHE_BYTES) -> None:
        """Create the list of items of one type, which MessagePack can encode; `cache_bytes` of them stay in memory.

        Raises:
            RunError: See `spill_errors`.
        """
        self._encode, self._decode = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder(kind).decode
        self._database = open_database(cache_bytes=cache_bytes)
        self._database.execute("CREATE TABLE items (place INTEGER PRIMARY KEY, item BLOB)")
        self._num_items = 0
        for item in items:
            self.append(item)

    def append(self, item: Item) -> None:
        """Append an item."""
        row = (self._num_items, self._encode(item))
        with spill_errors():
            self._database.execute("INSERT INTO items VALUES (?, ?)", row)
        self._num_items += 1

    def __len__(self) -> int:
        return self._num_items

    def __getitem__(self, place: int) -> Item:
        for (item,) in select(self._database, "SELECT item FROM items WHERE place = ?", place):
            return self._decode(item)
        raise IndexError(place)

    def __iter__(self) -> Iterator[Item]:
        for (item,) in select(self._database, "SELECT item FROM items ORDER BY place"):
            yield self._decode(item)
