"""Several images tables as one: one after the other, with merged classes, each image shown as often as planned."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raydet.tables.schema import LABELLED_COLUMN, Category
from raydet.tables.table import RowGroup, Table
from raydet.training.feeding.chunks import ROW_TYPE, TEACHER
from raydet.training.feeding.repeats import Repeats
from raydet.training.feeding.teachers import Teacher, taught


@dataclass(frozen=True)
class WeightedTable:
    """A table of a mixture.

    Attributes:
        table: The images table.
        weight: How often each of its images is shown per epoch, on average, if none is repeated for its classes.
        class_map: Index in the mixture of each of the table's classes.
    """

    table: Table
    weight: float
    class_map: tuple[int, ...]


@dataclass(frozen=True)
class Mixture:
    """Images tables, one after the other, to be read like one `Table`.

    An image is labelled only for the classes of its own table, and of these for what the table says.

    Attributes:
        sources: The tables.
        categories: The classes of all tables, merged by name.
        repeats: How often each image is shown per epoch; None for once.
        teachers: Models that have scored images of the tables.
    """

    sources: tuple[WeightedTable, ...]
    categories: tuple[Category, ...]
    repeats: Repeats | None = None
    teachers: tuple[Teacher, ...] = ()

    @property
    def uri(self) -> str:
        """URIs of the tables, for messages."""
        return ", ".join(source.table.uri for source in self.sources)

    @property
    def num_rows(self) -> int:
        """Number of rows of all tables."""
        return sum(source.table.num_rows for source in self.sources)

    @property
    def num_shown(self) -> int:
        """Images per epoch; an image counts as often as it is shown."""
        return self.num_rows if self.repeats is None else self.repeats.num_shown

    def row_groups(self) -> tuple[RowGroup, ...]:
        """Return the row groups of all tables, with the positions of their rows and the size of the teachers' rows."""
        row_bytes = sum(teacher.row_bytes for teacher in self.teachers)
        return tuple(
            replace(
                group,
                first_row=first + group.first_row,
                num_bytes=group.num_bytes + math.ceil(group.num_rows * row_bytes),
            )
            for source, first in zip(self.sources, self._first_rows(), strict=True)
            for group in source.table.row_groups()
        )

    def read(self, group: RowGroup) -> pa.StructArray:
        """Read a row group as an array of `ROW_TYPE`, with the classes of the mixture."""
        number = int(np.searchsorted(self._first_rows(), group.first_row, side="right")) - 1
        source = self.sources[number]
        images = with_classes(read_images(source.table, group), source.class_map, len(self.categories))
        if not self.teachers:
            return images
        return _replaced(images, {TEACHER: taught(self.teachers, group.first_row, group.num_rows)})

    def rows_at(self, positions: Sequence[int]) -> Iterator[tuple[int, pa.StructScalar]]:
        """Yield the rows at some positions as `read` returns them, in order, reading only their row groups."""
        left, groups = sorted(positions), self.row_groups()
        ends = np.cumsum([group.num_rows for group in groups])
        for number in np.unique(np.searchsorted(ends, left, side="right")).tolist():
            first, rows = groups[number].first_row, self.read(groups[number])
            while left and left[0] < ends[number]:
                position = left.pop(0)
                yield position, rows[position - first]

    def _first_rows(self) -> list[int]:
        return list(accumulate((source.table.num_rows for source in self.sources[:-1]), initial=0))


def images_per_epoch(train: Table | Mixture) -> int:
    """Return the number of images per epoch; an image counts as often as it is shown."""
    return train.num_shown if isinstance(train, Mixture) else train.num_rows


def read_images(table: Table | Mixture, group: RowGroup) -> pa.StructArray:
    """Read a row group as an array of `ROW_TYPE`."""
    if isinstance(table, Mixture):
        return table.read(group)
    own = [name for name in table.schema.names if name != TEACHER]
    missing = {field.name: field.type for field in ROW_TYPE if field.name not in own}
    content = table.read_row_group(group, [field.name for field in ROW_TYPE if field.name not in missing])
    for name, dtype in missing.items():
        content = content.append_column(name, pa.nulls(len(content), dtype))
    rows = content.select(list(ROW_TYPE.names)).to_struct_array()
    return pa.concat_arrays(rows.chunks).cast(ROW_TYPE)


def with_classes(images: pa.StructArray, class_map: Sequence[int], num_classes: int) -> pa.StructArray:
    """Replace the classes of images, and state which ones they are labelled for.

    Args:
        images: Array of `ROW_TYPE`.
        class_map: New index of each class.
        num_classes: Number of new classes. Images are not labelled for those that `class_map` lacks, nor for one of
            which only a part is labelled.

    Returns:
        An array of `ROW_TYPE`.
    """
    new = np.asarray(class_map, np.int64)
    columns = {LABELLED_COLUMN: _labelled(images.field(LABELLED_COLUMN), new, num_classes)}
    if not np.array_equal(new, np.arange(len(new))):
        old = images.field("objects").field("category")
        indices = old.values.to_numpy(zero_copy_only=False).astype(np.int64)
        category = pa.ListArray.from_arrays(old.offsets, pa.array(new[indices], old.type.value_type))
        columns["objects"] = _replaced(images.field("objects"), {"category": category})
    return _replaced(images, columns)


def _replaced(rows: pa.StructArray, columns: Mapping[str, pa.Array]) -> pa.StructArray:
    """Return the same rows with other values in some fields."""
    fields = list(rows.type)
    arrays = [columns[field.name] if field.name in columns else rows.field(field.name) for field in fields]
    return pa.StructArray.from_arrays(arrays, fields=fields)


def _labelled(lists: pa.ListArray, new: npt.NDArray[np.int64], num_classes: int) -> pa.ListArray:
    """Return the new classes that each image is labelled for; null for all."""
    all_own = sorted(set(new.tolist()))
    default = None if len(all_own) == num_classes else all_own
    if lists.null_count == len(lists) and default is None:
        return lists
    result: list[list[int] | None] = []
    for own in lists.to_pylist():
        if own is None:
            result.append(default)
            continue
        others = np.delete(new, own)
        result.append(sorted(set(new[own].tolist()) - set(others.tolist())))
    return pa.array(result, lists.type)
