"""Answers of crops tables in `browse`: filters, counts and texts equal those of plain loops over the tables."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from raydet.browsing.filters import ImageFilter
from raydet.browsing.index import build_index
from raydet.browsing.queries import Queries
from raydet.browsing.sources import open_sources
from raydet.common.errors import UserError
from raydet.config import BrowseConfig
from raydet.tables.table import open_table
from tests.browsing.made import EVIL, write_two_runs
from tests.crops_tables import Rule, write_crops

NUM_IMAGES = 40
COLOURS = ("red", EVIL, "Dark Red")
RULES: dict[str, Rule] = {
    "answer_1": lambda image, place: None if place == 1 else COLOURS[(image // 10 + place) % 3],
    "answer_2": lambda image, place: f"image {image}, box {place}",
}
COLOUR, SENTENCE = 0, 1
FIRST = 1
ANSWERS = -2
"""Place of the answers in a box."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_two_runs(tmp_path_factory.mktemp("browse"), NUM_IMAGES)
    write_crops(folder / "crops", str(folder / "a"), RULES, ask=["What colour is it?", "Describe it"], min_score=0.4)
    return folder


@pytest.fixture(scope="module")
def queries(folder: Path) -> Queries:
    config = BrowseConfig(data=str(folder / "metrics"), run="a", second_run="b", crops=[str(folder / "crops")])
    return Queries(build_index(open_sources(config)))


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, Any]]:
    return list(open_table(str(folder / "crops"), "crops").read().to_pylist())


def code_of(queries: Queries, value: str) -> int:
    return queries.index.answers[COLOUR].values.index(value)


def test_answers_are_counted_as_in_the_table(queries: Queries, rows: list[dict[str, Any]]) -> None:
    colours, sentences = queries.facets(ImageFilter())["answers"]
    assert {text: number for _, number, text in colours} == Counter(row["answer_1"] for row in rows if row["answer_1"])
    assert [number for _, number, _ in colours] == sorted((number for _, number, _ in colours), reverse=True)
    assert len(sentences) == 50, "only the most frequent answers are listed"


@pytest.mark.parametrize(
    ("chosen", "passes"),
    [
        ({"texts": ((COLOUR, "RED "),)}, lambda row: row["answer_1"] in ("red", "Dark Red")),
        ({"texts": ((SENTENCE, "image 30, box 0"),)}, lambda row: row["answer_2"] == "image 30, box 0"),
        ({"values": ("red", "Dark Red")}, lambda row: row["answer_1"] in ("red", "Dark Red")),
        (
            {"values": ("red",), "texts": ((SENTENCE, "box 0"),)},
            lambda row: (row["answer_1"], row["detection"]) == ("red", 0),
        ),
        ({"values": ("red",), "scores": (0.6, 1.0)}, lambda row: row["answer_1"] == "red" and row["score"] >= 0.6),
    ],
)
def test_filters_by_answers(queries: Queries, rows: list[dict[str, Any]], chosen: Any, passes: Any) -> None:
    values = tuple((COLOUR, code_of(queries, value)) for value in chosen.get("values", ()))
    wanted = ImageFilter(answers=values, answer_texts=chosen.get("texts", ()), scores=chosen.get("scores"))
    found = [row for row in rows if passes(row)]
    facets = queries.facets(wanted)
    assert facets["boxes"] == len(found) > 0
    images = sorted({row["image_id"] // 10 for row in found})
    assert queries.order(wanted, "id").tolist() == images and facets["images"] == len(images)
    hits = Counter(card["image"] for card in queries.cards(images, wanted) for box in card["boxes"] if box[-1])
    assert hits == Counter(row["image_id"] // 10 for row in found)


def test_a_column_is_counted_without_the_choice_of_its_own_values(queries: Queries, rows: list[dict[str, Any]]) -> None:
    chosen = ImageFilter(answers=((COLOUR, code_of(queries, "red")),), scores=(0.9, 1.0))
    colours, sentences = queries.facets(chosen)["answers"]
    high = [row for row in rows if row["score"] >= 0.9]
    assert {text: number for _, number, text in colours} == Counter(row["answer_1"] for row in high if row["answer_1"])
    assert {text for _, _, text in sentences} == {row["answer_2"] for row in high if row["answer_1"] == "red"}
    # A chosen value is listed even if there is no such box.
    chosen = ImageFilter(answers=((COLOUR, code_of(queries, "red")),), sides=(0,))
    assert [entry[1:] for entry in queries.facets(chosen)["answers"][COLOUR]] == [(0, "red")]


def test_boxes_carry_their_answers(queries: Queries, rows: list[dict[str, Any]]) -> None:
    expected = {(row["image_id"], round(row["score"], 4)): [row["answer_1"], row["answer_2"]] for row in rows}
    num_answers = 0
    for card in queries.cards(range(NUM_IMAGES), ImageFilter(), is_single=True):
        for box in card["boxes"]:
            own = expected.get((card["image_id"], box[2])) if box[0] == FIRST else None
            assert box[ANSWERS] == (own or [None, None])
            num_answers += own is not None
    assert num_answers == len(rows)


def test_answers_belong_to_the_run_whose_boxes_they_are_about(folder: Path) -> None:
    crops = write_crops(folder / "of b", str(folder / "b"), {"label": lambda *_: "hat", "label_score": lambda *_: 0.5})
    config = BrowseConfig(data=str(folder / "a"), second=str(folder / "b"), crops=[crops, str(folder / "crops")])
    queries = Queries(build_index(open_sources(config)))
    assert [answers.title for answers in queries.index.answers] == ["label", "What colour is it?", "Describe it"]
    chosen = ImageFilter(answers=((0, 0),))
    assert [side for side, _ in queries.facets(chosen)["sides"]] == [2]
    cards = queries.cards(queries.order(chosen, "id")[:3].tolist(), chosen)
    assert {box[ANSWERS][0] for card in cards for box in card["boxes"] if box[-1]} == {"hat 0.50"}


def test_unfit_options_and_values_are_refused(folder: Path, queries: Queries) -> None:
    crops = [str(folder / "crops")]
    with pytest.raises(UserError, match="--crops does not apply"):
        open_sources(BrowseConfig(data=str(folder / "images"), crops=crops))
    with pytest.raises(UserError, match="is about none of these detections"):
        open_sources(BrowseConfig(data=str(folder / "b"), crops=crops))
    for chosen in (ImageFilter(answers=((2, 0),)), ImageFilter(answer_texts=((2, "red"),))):
        with pytest.raises(UserError, match="answer"):
            queries.facets(chosen)
