"""Settings of Ray Data apply to data sets created inside the context manager, and to no others."""

import contextlib
from collections.abc import Iterator
from functools import partial

import pyarrow as pa
import ray.data
from ray.data import DataContext

from raydet.cluster.ray_data import TaskSource, one_row_blocks


def settings() -> dict[str, object]:
    return {name: repr(value) for name, value in vars(DataContext.get_current()).items()}


def test_the_caller_s_context_is_the_current_one_again() -> None:
    context, before = DataContext.get_current(), settings()
    with one_row_blocks():
        assert settings() != before
    with contextlib.suppress(ZeroDivisionError), one_row_blocks():
        _ = 1 / 0
    assert DataContext.get_current() is context and settings() == before


def _numbers(*numbers: int) -> Iterator[pa.Table]:
    for number in numbers:
        yield pa.table({"number": [number]})


def test_a_data_set_keeps_the_settings_that_it_was_created_with(ray_cluster: None) -> None:
    with one_row_blocks():
        data = ray.data.read_datasource(TaskSource("Numbers", [partial(_numbers, 0, 1), partial(_numbers, 2)]))
    batches = data.map_batches(lambda table: table, batch_format="pyarrow", batch_size=None).iter_batches(
        batch_size=None, batch_format="pyarrow"
    )
    assert [batch["number"].to_pylist() for batch in batches] == [[0], [1], [2]]
