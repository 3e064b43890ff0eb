"""Filters that the page sends → SQL conditions; every value is a parameter, every column a name of this module."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec

from raydet.browsing.codes import ERROR_KINDS, OUTCOMES, SIDES, SIZES
from raydet.common.errors import UserError

MAX_PAGE = 120
_MOST_VALUES = 200
_LONGEST_TEXT = 200
_Number = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
_Numbers = Annotated[tuple[_Number, ...], msgspec.Meta(max_length=_MOST_VALUES)]
_Text = Annotated[str, msgspec.Meta(max_length=_LONGEST_TEXT)]
_Score = Annotated[float, msgspec.Meta(ge=0, le=1)]


class ImageFilter(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A choice of images; one passes if one of its boxes meets all conditions on boxes, if there are any.

    Attributes:
        sides: Indices in `SIDES`.
        classes: Class indices.
        scores: Lowest and highest score, both inclusive; labels, which have none, do not pass.
        sizes: Indices in `SIZES`.
        outcomes: Indices in `OUTCOMES`.
        second_outcomes: The same, of labels with respect to the second run.
        errors: Indices in `ERROR_KINDS`.
        groups: Pairs of a group and one of its values; values of one group are alternatives.
        answers: Pairs of a column of answers and one of its values, which are alternatives too.
        answer_texts: Pairs of a column of answers and a part of its text.
        images: All images, those without boxes, those that the detector could not read, or the selected ones.
        text: Part of the path, or the id of an image.
    """

    sides: _Numbers = ()
    classes: _Numbers = ()
    scores: tuple[_Score, _Score] | None = None
    sizes: _Numbers = ()
    outcomes: _Numbers = ()
    second_outcomes: _Numbers = ()
    errors: _Numbers = ()
    groups: Annotated[tuple[tuple[_Number, _Number], ...], msgspec.Meta(max_length=_MOST_VALUES)] = ()
    answers: Annotated[tuple[tuple[_Number, _Number], ...], msgspec.Meta(max_length=_MOST_VALUES)] = ()
    answer_texts: Annotated[tuple[tuple[_Number, _Text], ...], msgspec.Meta(max_length=_MOST_VALUES)] = ()
    images: Literal["all", "without boxes", "unreadable", "selected"] = "all"
    text: _Text = ""


class PageRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of the images that pass a filter, in an order: `count` images from `start`."""

    filter: ImageFilter = ImageFilter()
    sort: str = "id"
    start: _Number = 0
    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_PAGE)] = 60


class SelectRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Images to select or deselect: some, or all that pass a filter."""

    is_selected: bool
    images: Annotated[tuple[_Number, ...], msgspec.Meta(max_length=10_000)] = ()
    filter: ImageFilter | None = None


@dataclass(frozen=True)
class Condition:
    """A part of a WHERE clause.

    Attributes:
        of: What it is about: a field of the filter, or `group N`, `answer N` or `answer text N`.
        sql: Text with `?` for parameters.
        parameters: Their values.
    """

    of: str
    sql: str
    parameters: tuple[Any, ...] = ()


_BOX_COLUMNS = {
    "sides": ("side", len(SIDES)),
    "classes": ("category", None),
    "sizes": ("size", len(SIZES)),
    "outcomes": ("outcome", len(OUTCOMES)),
    "second_outcomes": ("second_outcome", len(OUTCOMES)),
    "errors": ("error", len(ERROR_KINDS)),
}
"""Field of the filter → column of the table `boxes`, and the number of its values."""


_FIRST_SUSPECT = ERROR_KINDS.index("no_truth")
WITHOUT_SUSPECTS = Condition("sides", f"side < {SIDES.index('suspects')}")
"""Suspects repeat boxes of labels or detections, so they count only if they are asked for."""


def box_conditions(chosen: ImageFilter, num_answers: int) -> list[Condition]:
    """Return the conditions on boxes, of which `num_answers` columns hold answers.

    Raises:
        UserError: A value is out of range.
    """
    conditions = _any_of("answer", chosen.answers, "answer_", num_answers)
    for number, text in chosen.answer_texts:
        _check_number("answer_texts", number, num_answers)
        conditions.append(Condition(f"answer text {number}", _ANSWER_CONTAINS.format(number), (number, text.strip())))
    for name, (column, limit) in _BOX_COLUMNS.items():
        values = getattr(chosen, name)
        if limit is not None and any(value >= limit for value in values):
            raise UserError(f"{name}: values must be below {limit}")
        if values:
            conditions.append(_one_of(name, column, values))
    if chosen.scores is not None:
        conditions.append(Condition("scores", "score BETWEEN ? AND ?", chosen.scores))
    is_about_suspects = any(value >= _FIRST_SUSPECT for value in chosen.errors)
    return [*conditions, WITHOUT_SUSPECTS] if conditions and not (chosen.sides or is_about_suspects) else conditions


def image_conditions(chosen: ImageFilter, num_groups: int) -> list[Condition]:
    """Return the conditions on images.

    Raises:
        UserError: A group does not exist.
    """
    conditions = _any_of("group", chosen.groups, "slice_", num_groups)
    if chosen.images != "all":
        conditions.append(Condition("images", _KINDS[chosen.images]))
    if text := chosen.text.strip():
        sql = "contains(lower(path), lower(?))"
        if text.isascii() and text.isdigit() and len(text) < 17:
            conditions.append(Condition("text", f"({sql} OR image_id = ?)", (text, int(text))))
        else:
            conditions.append(Condition("text", sql, (text,)))
    return conditions


_KINDS = {
    "without boxes": "NOT EXISTS (FROM boxes WHERE boxes.image = images.image)",
    "unreadable": "error IS NOT NULL",
    "selected": "selected",
}


_ANSWER_CONTAINS = "answer_{} IN (SELECT code FROM answers WHERE question = ? AND contains(lower(value), lower(?)))"


def _any_of(name: str, pairs: Sequence[tuple[int, int]], column: str, number: int) -> list[Condition]:
    """Return a condition for each of some numbered columns: it has one of the values that are paired with it."""
    values: dict[int, list[int]] = {}
    for place, value in pairs:
        _check_number(f"{name}s", place, number)
        values.setdefault(place, []).append(value)
    return [_one_of(f"{name} {place}", f"{column}{place}", own) for place, own in values.items()]


def _check_number(name: str, place: int, number: int) -> None:
    if place >= number:
        raise UserError(f"{name}: there are {number}, got number {place}")


def _one_of(name: str, column: str, values: Sequence[int]) -> Condition:
    return Condition(name, f"{column} IN ({', '.join('?' * len(values))})", tuple(values))


def where(conditions: Sequence[Condition]) -> tuple[str, list[Any]]:
    """Join conditions to a WHERE clause, empty without conditions, and its parameters."""
    clause = " AND ".join(condition.sql for condition in conditions)
    return f"WHERE {clause}" if clause else "", [value for one in conditions for value in one.parameters]
