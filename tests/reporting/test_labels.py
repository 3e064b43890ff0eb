"""Labels on thumbnails: they keep clear of each other, and numbers replace texts that do not fit."""

from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydet.measuring.slices import in_words
from raydet.reporting.labels import Label, place_labels

SIZE_WH = (480, 320)
BOXES = st.lists(st.tuples(*[st.floats(-20, 480)] * 2, *[st.floats(0, 300)] * 2), min_size=1, max_size=40)


def test_texts_with_room_stand_at_their_boxes() -> None:
    labels, legend = place_labels([(10, 50, 40, 40), (300, 200, 50, 50)], ["cat 0.90", "dog 0.80"], SIZE_WH)
    assert labels == (Label("cat 0.90", 13, 45), Label("dog 0.80", 303, 195)) and legend == ()


def test_texts_without_room_become_numbers_with_a_legend() -> None:
    boxes = [(10 + 2 * index, 50, 20, 12) for index in range(6)]
    labels, legend = place_labels(boxes, ["red blood cell"] * 3 + ["platelet"] + ["red blood cell"] * 2, SIZE_WH)
    assert [label.text for label in labels] == ["1", "2", "3", "4", "5", "6"]
    assert legend == (("1–3", "red blood cell"), ("4", "platelet"), ("5–6", "red blood cell"))


def test_texts_that_are_longer_than_the_picture_become_numbers_with_a_legend() -> None:
    texts = ["cat 0.90 · red", "dog 0.80"]
    boxes = [(10, 20, 20, 20), (50, 60, 20, 20)]
    assert [label.text for label in place_labels(boxes, texts, SIZE_WH)[0]] == texts
    labels, legend = place_labels(boxes, texts, (96, 96))
    assert [label.text for label in labels] == ["1", "2"] and legend == (("1", texts[0]), ("2", texts[1]))


@given(BOXES, st.data())
def test_labels_stay_on_the_picture_and_texts_apart(boxes: list[tuple[float, ...]], data: st.DataObject) -> None:
    texts = data.draw(st.lists(st.text(min_size=1, max_size=60), min_size=len(boxes), max_size=len(boxes)))
    labels, legend = place_labels(boxes, texts, SIZE_WH)
    assert len(labels) == len(boxes)
    assert all(0 <= label.x <= SIZE_WH[0] and 15 <= label.y <= SIZE_WH[1] for label in labels)
    if legend:
        assert [label.text for label in labels] == [str(number) for number in range(1, len(boxes) + 1)]
        assert [text for _, text in legend] == [text for text, _ in groupby(texts)]
    else:
        rows = sorted((label.y, label.x, len(label.text)) for label in labels)
        assert all(
            other[0] - one[0] >= 18 or other[1] >= one[1] + 8 * one[2] or one[1] >= other[1] + 8 * other[2]
            for at, one in enumerate(rows)
            for other in rows[at + 1 :]
        )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("box_size=small", "small boxes, under 32² px"),
        ("crowding=1–5", "images with 1–5 boxes"),
        ("crowding=21+", "images with 21 or more boxes"),
        ("image_size=up to 640 px", "images up to 640 px"),
        ("image_size=unknown", "images of unknown size"),
        ("camera=a=b", "camera: a=b"),
    ],
)
def test_slices_are_named_in_words(name: str, words: str) -> None:
    assert in_words(name) == words
