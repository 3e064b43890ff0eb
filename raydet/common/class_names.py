"""Class names of two lists, matched by name: the classes of a checkpoint and of a table, or of detections and truth."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from raydet.common.errors import UserError

UNUSED_NAME = "N/A"
"""Name of an index without a class, as in published checkpoints for COCO's 91 ids."""
_UNUSED_FOLDED = ("", "n/a", "background")


def folded(name: str) -> str:
    """Return a class name in lower case, with underscores and runs of spaces as one space."""
    return " ".join(name.replace("_", " ").split()).lower()


def is_unused(name: str, index: int) -> bool:
    """Return True if the name says that no class has this index: N/A, __background__, or a placeholder as LABEL_12."""
    has_class = folded(name) not in _UNUSED_FOLDED or name == "background"
    return not has_class or name == f"LABEL_{index}"


def match_names(
    names: Sequence[str], known: Sequence[str], *, mapping: Mapping[str, str] | None = None
) -> list[int | None]:
    """Find each name in another list.

    An equal name takes precedence; otherwise case, underscores and spaces do not matter, unless several known names
    then become the same. Unused names match nothing.

    Args:
        names: Names to find.
        known: Names to search, in the order of their indices.
        mapping: Known name → name, for classes with different names on the two sides; takes precedence.

    Returns:
        For each name, its index in `known`; None if there is no such name.
    """
    usable = {index: name for index, name in enumerate(known) if not is_unused(name, index)}
    # Reversed, so that the first of several equal names counts.
    exact = {name: index for index, name in reversed(usable.items())}
    counts = Counter(folded(name) for name in exact)
    alike = {folded(name): index for name, index in exact.items() if counts[folded(name)] == 1}
    renamed = {folded(new): exact.get(old, alike.get(folded(old))) for old, new in (mapping or {}).items()}
    found: list[int | None] = []
    for index, name in enumerate(names):
        place = renamed.get(folded(name))
        if place is None:
            place = exact.get(name, alike.get(folded(name)))
        found.append(None if is_unused(name, index) else place)
    return found


def indices_in(names: Sequence[str], known: Sequence[str]) -> npt.NDArray[np.int64]:
    """Return the index in `known` of each name, as `match_names` finds it, int64 [names]; -1 if there is none."""
    return np.array([-1 if place is None else place for place in match_names(names, known)], np.int64)


def check_mapping(
    mapping: Mapping[str, str],
    names: Sequence[str],
    known: Sequence[str],
    *,
    where: str,
    of_names: str = "the training table",
) -> None:
    """Refuse a mapping, known name → name, whose names do not occur.

    `where` is the source of `known` in the message, and `of_names` that of `names`.

    Raises:
        UserError: A key is not one of `known`, or a value is not one of `names`.
    """
    for side, wanted, classes in ((where, mapping, known), (of_names, mapping.values(), names)):
        have = {folded(name) for name in classes}
        for name in wanted:
            if folded(name) not in have:
                raise UserError(
                    f"--class-mapping: {side} has no class {name}; its classes are {', '.join(classes) or 'not named'}"
                )
