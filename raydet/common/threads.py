"""The same work on many items, side by side in threads: where it waits (for storage) or lets go of the interpreter."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

NUM_READ_THREADS = 16
"""Enough to make up for how late remote storage answers."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    num_threads: int = NUM_READ_THREADS,
    ahead: int | None = None,
) -> Iterator[Result]:
    """Does the same to each item in threads and yields the results in the items' order.

    Items are taken, one at a time, in the thread of the reader. When the reader stops, what has not begun is dropped,
    and what has is waited for.

    Args:
        work: What to do; several threads call it at once.
        items: Of any number; they may be made while they are read.
        num_threads: As many work at once.
        ahead: Items at most whose results have not been handed on, at work, done or waiting, which bounds the memory;
            twice `num_threads` by default.

    Raises:
        Exception: What the work raised, in place of the result of the first item for which it did.
    """
    ahead = ahead or 2 * num_threads
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="in-order") as pool:
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) >= ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
