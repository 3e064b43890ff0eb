"""What a source knows of its images, on this machine's disk: labels by the million do not belong into the memory.

It lies in SQLite's nameless databases: files in TMPDIR, or else in /var/tmp, that are already unlinked, so that nothing
of them is left however the process ends.
"""

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

import msgspec

from raydet.common.errors import RunError

CACHE_BYTES = 32 * 2**20
"""Of a database: what is in memory of it."""

_ROWS_AT_ONCE = 256

Item = TypeVar("Item")


def open_database() -> sqlite3.Connection:
    """A database of this process alone, which several threads may read; empty, and gone when it is closed."""
    connection = sqlite3.connect("", check_same_thread=False, isolation_level=None)
    cache = f"cache_size = -{CACHE_BYTES >> 10}"
    for setting in ("journal_mode = OFF", "synchronous = OFF", "temp_store = FILE", cache):
        connection.execute(f"PRAGMA {setting}")
    # Never committed, as nobody else reads this: a commit for each row would take most of the time.
    connection.execute("BEGIN")
    return connection


@contextlib.contextmanager
def spill_errors() -> Iterator[None]:
    """Says what to do when a database cannot be written to, which even reading may have to.

    Raises:
        RunError: The disk is full, or as good as full.
    """
    try:
        yield
    except sqlite3.OperationalError as error:
        raise RunError(
            f"cannot keep the labels in a temporary file: {error}; TMPDIR (or else /var/tmp) must be a folder with room"
        ) from error


def select(database: sqlite3.Connection, query: str, *values: object) -> Iterator[tuple[Any, ...]]:
    """The rows that a query finds, a few of them at a time in memory.

    Raises:
        RunError: As `spill_errors` says.
    """
    with spill_errors():
        cursor = database.execute(query, values)
        rows = cursor.fetchmany(_ROWS_AT_ONCE)
    while rows:
        yield from rows
        with spill_errors():
            rows = cursor.fetchmany(_ROWS_AT_ONCE)


class Spilled(Generic[Item]):
    """A list that only grows, and is read in order or at any place."""

    def __init__(self, kind: type[Item], items: Iterable[Item] = ()) -> None:
        """Writes the items, one at a time.

        Args:
            kind: What they are, in types that MessagePack can tell from each other.
            items: The first ones.

        Raises:
            RunError: As `spill_errors` says.
        """
        self._encode, self._decode = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder(kind).decode
        self._database = open_database()
        self._database.execute("CREATE TABLE items (place INTEGER PRIMARY KEY, item BLOB)")
        self._num_items = 0
        for item in items:
            self.append(item)

    def append(self, item: Item) -> None:
        """Adds an item at the end."""
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
