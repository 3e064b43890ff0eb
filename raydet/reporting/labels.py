"""Placement of the labels of boxes on a thumbnail: texts next to the boxes, or numbers where texts would overlap."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

FONT_PX = 15
_CHARACTER_PX = 8.2
"""Width of an average character of the page's bold font at `FONT_PX`."""
_LINE_PX = 18
_GAP_PX = 3
_MOST_TEXTS = 6
_MOST_CHARACTERS = 32

_Area = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Label:
    """Text on a thumbnail, whose baseline starts at `x`, `y` in the thumbnail's pixels."""

    text: str
    x: float
    y: float


def place_labels(
    boxes_xywh: Sequence[Sequence[float]], texts: Sequence[str], size_wh: tuple[int, int]
) -> tuple[tuple[Label, ...], tuple[tuple[str, str], ...]]:
    """Place one label per box.

    Args:
        boxes_xywh: Boxes in pixels of the thumbnail.
        texts: Text of each box.
        size_wh: Size of the thumbnail in pixels.

    Returns:
        The labels, and a legend: numbers such as "1" or "2–5", and the text that they stand for. The legend is empty
        if the labels are the texts themselves, which takes short texts and room for all of them.
    """
    most_characters = min(_MOST_CHARACTERS, int(size_wh[0] / _CHARACTER_PX))
    if len(texts) <= _MOST_TEXTS and all(len(text) <= most_characters for text in texts):
        labels = _placed(boxes_xywh, texts, size_wh)
        if None not in labels:
            return tuple(label for label in labels if label is not None), ()
    numbers = [str(number) for number in range(1, len(texts) + 1)]
    numbered = [
        label or next(_corners(box, number, size_wh))
        for label, box, number in zip(_placed(boxes_xywh, numbers, size_wh), boxes_xywh, numbers, strict=True)
    ]
    return tuple(numbered), tuple(_legend(texts))


def _placed(boxes: Sequence[Sequence[float]], texts: Sequence[str], size_wh: tuple[int, int]) -> list[Label | None]:
    """Return the first place of each text that no earlier one covers; None where there is no such place."""
    taken: list[_Area] = []
    labels: list[Label | None] = []
    for box, text in zip(boxes, texts, strict=True):
        free = (
            label for label in _corners(box, text, size_wh) if not any(_overlap(_area(label), one) for one in taken)
        )
        label = next(free, None)
        labels.append(label)
        if label is not None:
            taken.append(_area(label))
    return labels


def _corners(box: Sequence[float], text: str, size_wh: tuple[int, int]) -> Iterator[Label]:
    """Yield the places of a label: above and inside the top edge of its box, inside and below the bottom edge."""
    x, y, _, height = box
    left = min(max(x, 0) + _GAP_PX, max(size_wh[0] - _width(text) - _GAP_PX, 0))
    for baseline in (y - 5, y + 2 + FONT_PX, y + height - 5, y + height + 2 + FONT_PX):
        if FONT_PX <= baseline <= size_wh[1] - 2:
            yield Label(text, round(left, 1), round(baseline, 1))
    yield Label(text, round(left, 1), round(min(max(y + 2 + FONT_PX, FONT_PX), size_wh[1] - 2.0), 1))


def _width(text: str) -> float:
    return len(text) * _CHARACTER_PX


def _area(label: Label) -> _Area:
    return label.x, label.y - _LINE_PX, label.x + _width(label.text), label.y


def _overlap(one: _Area, other: _Area) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _legend(texts: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield runs of equal texts with their numbers."""
    first = 1
    for text, same in groupby(texts):
        last = first + len(list(same)) - 1
        yield (f"{first}" if first == last else f"{first}–{last}"), text
        first = last + 1
