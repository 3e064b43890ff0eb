"""Filters, orders and counts equal what pyarrow and plain loops find in the tables."""

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from raydet.browsing.codes import ERROR_KINDS, OUTCOMES, SCORE_BINS, SIDES
from raydet.browsing.filters import ImageFilter
from raydet.browsing.index import build_index
from raydet.browsing.queries import SORTS, Queries
from raydet.browsing.selection import save_selection
from raydet.browsing.sources import Sources, open_sources
from raydet.common.errors import UserError
from raydet.config import BrowseConfig, PrepareImagesConfig
from raydet.images.collection import open_collection
from raydet.measuring import metrics_folder
from raydet.preparation.prepare import prepare_images
from raydet.tables.schema import Category, build_schema
from raydet.tables.table import TableWriter, open_table
from tests.browsing.made import NAMES, write_two_runs
from tests.small_sets import save_image

NUM_IMAGES = 80
Row = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, two tables of their detections, and the metrics of both."""
    return write_two_runs(tmp_path_factory.mktemp("browse"), NUM_IMAGES)


@pytest.fixture(scope="module")
def both(folder: Path) -> Queries:
    """Two evaluated runs side by side."""
    config = BrowseConfig(data=str(folder / "metrics"), run="a", second_run="b")
    return Queries(build_index(open_sources(config)))


def boxes_of(folder: Path) -> list[Row]:
    """List the labels and the detections of both tables, in plain Python."""
    boxes: list[Row] = []
    for number, row in enumerate(open_table(str(folder / "images"), "images").read().to_pylist()):
        own = row["objects"]
        for box, kind, area in zip(own["bbox"], own["category"], own["area"], strict=True):
            boxes.append({"image": number, "side": 0, "class": kind, "score": None, "area": area, "box": box})
    for side, name in ((1, "a"), (2, "b")):
        for number, row in enumerate(open_table(str(folder / name), "detections").read().to_pylist()):
            own = row["detections"]
            for box, kind, score in zip(own["bbox"], own["category"], own["score"], strict=True):
                area = box[2] * box[3]
                boxes.append({"image": number, "side": side, "class": kind, "score": score, "area": area, "box": box})
    return boxes


def size_of(box: Row) -> int:
    return int(box["area"] >= 32**2) + int(box["area"] >= 96**2)


CASES: list[tuple[ImageFilter, Callable[[Row], bool], Callable[[int], bool]]] = [
    (ImageFilter(), lambda _: True, lambda _: True),
    (ImageFilter(sides=(0, 1)), lambda box: box["side"] in (0, 1), lambda _: True),
    (ImageFilter(classes=(1, 3)), lambda box: box["class"] in (1, 3), lambda _: True),
    (
        ImageFilter(scores=(0.25, 0.8), sides=(1,)),
        lambda box: box["side"] == 1 and 0.25 <= box["score"] <= 0.8,
        lambda _: True,
    ),
    (ImageFilter(sizes=(1,), sides=(0,)), lambda box: size_of(box) == 1 and box["side"] == 0, lambda _: True),
    (
        ImageFilter(classes=(2,), groups=((1, 0),)),
        lambda box: box["class"] == 2,
        lambda image: image % 2 == 1,  # the values are sorted: the rear camera comes first
    ),
    (ImageFilter(sides=(2,), text="PICTURE 001"), lambda box: box["side"] == 2, lambda image: 10 <= image < 20),
    (ImageFilter(text="550"), lambda _: True, lambda image: image == 55),
]


@pytest.mark.parametrize(("chosen", "passes", "fits"), CASES, ids=[str(number) for number in range(len(CASES))])
def test_counts_equal_those_of_plain_loops(
    folder: Path, both: Queries, chosen: ImageFilter, passes: Callable[[Row], bool], fits: Callable[[int], bool]
) -> None:
    assert [group.name for group in both.index.groups] == ["crowding", "camera"]
    found = [box for box in boxes_of(folder) if passes(box) and fits(box["image"])]
    facets = both.facets(chosen)
    has_boxes = bool(chosen.sides or chosen.classes or chosen.scores or chosen.sizes)
    images = {box["image"] for box in found} if has_boxes else {number for number in range(NUM_IMAGES) if fits(number)}
    assert facets["images"] == len(images) and facets["boxes"] == len(found)
    assert sorted(both.order(chosen, "id").tolist()) == sorted(images)
    if not chosen.sides:
        sides = dict(facets["sides"])
        sides.pop(SIDES.index("suspects"), None)
        assert sides == Counter(box["side"] for box in found)
    if not chosen.classes:
        assert dict(facets["classes"]) == Counter(box["class"] for box in found)
    if not chosen.sizes:
        assert dict(facets["sizes"]) == Counter(size_of(box) for box in found)
    if not chosen.scores:
        bins = Counter(min(int(box["score"] * SCORE_BINS), SCORE_BINS - 1) for box in found if box["score"] is not None)
        assert dict(facets["scores"]) == bins
    if not chosen.groups:
        assert dict(facets["groups"][-1]) == Counter(1 - image % 2 for image in images)


def test_a_property_is_counted_without_its_own_condition(folder: Path, both: Queries) -> None:
    facets = both.facets(ImageFilter(sides=(1,), classes=(0,)))
    boxes = boxes_of(folder)
    assert dict(facets["classes"]) == Counter(box["class"] for box in boxes if box["side"] == 1)
    sides = Counter(box["side"] for box in boxes if box["class"] == 0)
    assert [pair for pair in facets["sides"] if pair[0] != SIDES.index("suspects")] == sorted(sides.items())


def test_outcomes_are_those_of_the_evaluation(folder: Path, both: Queries) -> None:
    for number, (run, side) in enumerate((("a", 1), ("b", 2)), 1):
        table = metrics_folder.open_run(str(folder / "metrics"), "per_image", run)
        assert table is not None
        rows = table.read().to_pylist()
        cards = both.cards(range(NUM_IMAGES), ImageFilter(), is_single=True)
        for card, row in zip(cards, rows, strict=True):
            assert card["image_id"] == row["image_id"]
            assert (card[f"false_{number}"], card[f"missed_{number}"]) == (
                row["false_positives"],
                row["false_negatives"],
            )
            assert card[f"f1_{number}"] == (None if row["f1"] is None else pytest.approx(row["f1"]))
            place, missing = (4, "outcome") if number == 1 else (5, "second")
            outcomes = Counter(OUTCOMES[box[4]] for box in card["boxes"] if box[0] == side)
            assert (outcomes["correct"], outcomes["false"]) == (row["true_positives"], row["false_positives"]), missing
            labels = Counter(OUTCOMES[box[place]] for box in card["boxes"] if box[0] == 0)
            assert labels["missed"] == row["false_negatives"]


def test_every_false_detection_has_one_kind_of_error(both: Queries) -> None:
    for chosen, kinds in (
        (ImageFilter(outcomes=(OUTCOMES.index("false"),)), ERROR_KINDS[1:6]),
        (ImageFilter(outcomes=(OUTCOMES.index("correct"),)), ("none",)),
    ):
        assert {ERROR_KINDS[value] for value, _ in both.facets(chosen)["errors"]} <= set(kinds)


def test_what_one_run_found_and_the_other_missed(folder: Path, both: Queries) -> None:
    found, missed = OUTCOMES.index("found"), OUTCOMES.index("missed")
    chosen = ImageFilter(sides=(0,), outcomes=(found,), second_outcomes=(missed,))
    cards = both.cards(both.order(chosen, "id").tolist(), chosen)
    assert cards
    for card in cards:
        assert any(box[0] == 0 and box[4] == found and box[5] == missed for box in card["boxes"])
        assert all(box[-1] == (box[0] == 0 and box[4] == found and box[5] == missed) for box in card["boxes"])


@pytest.mark.parametrize("sort", SORTS)
def test_orders(both: Queries, sort: str) -> None:
    order = both.order(ImageFilter(), sort).tolist()
    assert sorted(order) == list(range(NUM_IMAGES))
    cards = {card["image"]: card for card in both.cards(range(NUM_IMAGES), ImageFilter(), is_single=True)}

    def key(image: int) -> Any:
        card = cards[image]
        boxes = [box for box in card["boxes"] if box[0] != SIDES.index("suspects")]
        scores = [box[2] for box in boxes if box[2] is not None]
        change = None if card["f1_1"] is None or card["f1_2"] is None else card["f1_2"] - card["f1_1"]
        value = {
            "id": card["image_id"],
            "boxes": -len(boxes) if boxes else None,
            "highest": -max(scores) if scores else None,
            "lowest": min(scores, default=None),
            "false": -card["false_1"],
            "missed": -card["missed_1"],
            "f1": card["f1_1"],
            "better": None if change is None else -change,
            "worse": change,
            "size": -card["width"] * card["height"],
            "path": card["path"],
            "suspect": card["suspect"],
        }[sort]
        return value is None, "" if value is None else round(value, 4) if isinstance(value, float) else value

    keys = [key(image) for image in order]
    assert keys == sorted(keys)


def test_a_selection_is_kept_listed_and_taken_by_other_commands(tmp_path: Path) -> None:
    for number in range(6):
        save_image(tmp_path / "photos" / f"photo {number}.jpg", seed=number)
    prepare_images(
        PrepareImagesConfig(images=str(tmp_path / "photos"), out=str(tmp_path / "table"), image_storage="reference")
    )
    sources = open_sources(BrowseConfig(data=str(tmp_path / "table")))
    queries = Queries(build_index(sources))
    assert queries.select([4, 1, 1], None, is_selected=True) == 2
    assert queries.order(ImageFilter(images="selected"), "id").tolist() == [1, 4]
    assert queries.select([1], None, is_selected=False) == 1
    assert queries.order(ImageFilter(images="selected"), "id").tolist() == [4]
    assert queries.select([], ImageFilter(text="photo 2"), is_selected=True) == 2
    parquet, text = save_selection(str(tmp_path / "chosen"), sources, queries.selected())
    assert open_ids(parquet) == [2, 4]
    collection = open_collection(text, index_uri=None)
    assert [row.path for row in collection.read(0, collection.num_rows)] == [
        str(tmp_path / "photos" / f"photo {number}.jpg") for number in (2, 4)
    ]
    assert queries.select([], ImageFilter(), is_selected=False) == 0
    with pytest.raises(UserError, match="no image is selected"):
        save_selection(str(tmp_path / "chosen"), sources, queries.selected())


def open_ids(path: str) -> list[int]:
    import pyarrow.parquet as pq

    ids: list[int] = pq.read_table(path)["image_id"].to_pylist()
    return ids


def test_images_inside_a_table_are_listed_by_id_only(folder: Path, tmp_path: Path) -> None:
    sources = open_sources(BrowseConfig(data=str(folder / "images")))
    queries = Queries(build_index(sources))
    queries.select(range(4), None, is_selected=True)
    assert save_selection(str(tmp_path / "chosen"), sources, queries.selected()) == [f"{tmp_path}/chosen.parquet"]
    assert open_ids(f"{tmp_path}/chosen.parquet") == [0, 10, 20, 30]


def opened(**options: Any) -> tuple[Sources, Queries]:
    sources = open_sources(BrowseConfig(**options))
    return sources, Queries(build_index(sources))


def test_a_table_of_images_alone_and_of_detections_alone(folder: Path) -> None:
    sources, queries = opened(data=str(folder / "images"))
    assert queries.index.sides == (SIDES.index("labels"),) and sources.notes == ()
    assert queries.index.names == NAMES and {"false", "better", "highest"}.isdisjoint(queries.sorts)
    sources, queries = opened(data=str(folder / "a"))
    assert queries.index.sides == (SIDES.index("first"),)
    assert len(sources.notes) == 1 and "--images" in sources.notes[0]
    assert dict(queries.facets(ImageFilter())["outcomes"]).keys() == {0}
    sources, queries = opened(data=str(folder / "a"), images=str(folder / "images"), second=str(folder / "b"))
    assert queries.index.sides == (0, 1, 2) and sources.runs[0].threshold == 0.3
    assert (sources.positions == range(NUM_IMAGES)).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data": "{}/images", "second": "{}/b"}, "--second does not apply"),
        ({"data": "{}/images", "run": "a"}, "not a metrics folder"),
        ({"data": "{}/metrics", "images": "{}/images"}, "--images does not apply"),
        ({"data": "{}/metrics", "run": "c"}, "no run 'c'"),
        ({"data": "{}/a", "second_run": "b"}, "requires --second"),
        ({"data": "{}/nothing"}, "no such table"),
    ],
)
def test_options_that_do_not_fit_are_one_line(folder: Path, options: dict[str, str], words: str) -> None:
    given: dict[str, Any] = {name: text.format(folder) for name, text in options.items()}
    with pytest.raises(UserError, match=words):
        open_sources(BrowseConfig(**given))


@pytest.mark.parametrize("options", [{"port": 70_000}, {"port": -1}, {"score_threshold": 1.5}, {"selection": " / "}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(options)).replace('_', '-')} must"):
        BrowseConfig(data="x", **options)


def test_numbers_and_texts_of_any_size_fit_the_page(tmp_path: Path) -> None:
    """Check boxes beyond every image, and names of a megabyte, which a table may hold."""
    schema = build_schema("images", [Category(1, "cat")], extra_fields=[pa.field("camera", pa.string())])
    box = [-1e15, -1e15, 1e15, 1e15]
    objects = {"id": [1], "bbox": [box], "category": [0], "area": [1e308], "iscrowd": [False]}
    with TableWriter(str(tmp_path / "images"), schema, config_hash="x") as writer:
        for number in range(2):
            row = {"image_id": number, "image": {"bytes": None, "path": "x" * 10**6}, "width": 10, "height": 10}
            writer.write_rows([{**row, "objects": objects, "camera": f"{number}" * 10**6}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, queries = opened(data=str(tmp_path / "images"))
    (card, _) = queries.cards([0, 1], ImageFilter())
    assert len(card["path"]) == 1000 and card["boxes"][0][8:12] == [-1e9, -1e9, 1e9, 1e9]
    assert max(len(value) for group in queries.index.groups for value in group.values) == 200


def test_values_out_of_range_are_refused(both: Queries) -> None:
    for chosen in (ImageFilter(sides=(4,)), ImageFilter(errors=(99,)), ImageFilter(groups=((50, 0),))):
        with pytest.raises(UserError):
            both.facets(chosen)
    with pytest.raises(UserError, match="sort must be one of"):
        both.order(ImageFilter(), "id; DROP TABLE boxes")
