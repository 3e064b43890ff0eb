"""Answers of crops tables beside detections, and image by image, equal those of plain loops."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raydet import EvaluateConfig, UserError, evaluate
from raydet.measuring.answers.by_image import answers_by_image
from raydet.measuring.answers.columns import read_answers
from raydet.measuring.detections import Scored, read_detections
from raydet.measuring.truth import read_truth
from raydet.tables.columns import image_places
from raydet.tables.schema import build_schema
from raydet.tables.table import TableWriter, open_table
from tests.browsing.made import write_detections, write_images
from tests.crops_tables import Rule, write_crops

COLOURS = ("red", "blue", "")
RULES: dict[str, Rule] = {
    "answer_1": lambda image, place: None if place == 1 else COLOURS[(image // 10 + place) % 3],
    "answer_2": lambda image, place: f"an answer of image {image}",
    "label": lambda image, place: ("cap", "hat")[place % 2],
    "label_score": lambda image, place: 0.5 + place / 100,
    "depth": lambda image, place: image + place / 10,
}
ASK = ["What colour?", "What is it?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables `images`, `found` and `crops`, whose low scores have no answers."""
    folder = tmp_path_factory.mktemp("answers")
    found = write_detections(folder / "found", write_images(folder / "images", 40))
    write_crops(folder / "crops", found, RULES, ask=ASK, min_score=0.3)
    return folder


@pytest.fixture(scope="module")
def scored(folder: Path) -> Scored:
    return read_detections(str(folder / "found"), read_truth(str(folder / "images")))


def expected(folder: Path, name: str) -> dict[tuple[int, tuple[float, ...]], Any]:
    """Return a column of answers by image and box."""
    rows = open_table(str(folder / "crops"), "crops").read().to_pylist()
    return {(row["image_id"], tuple(row["bbox"])): row[name] for row in rows}


def test_detections_have_the_answers_about_their_boxes(folder: Path, scored: Scored) -> None:
    ids, boxes = scored.found_ids[image_places(scored.columns)], scored.columns.boxes_xywh
    columns = {answers.name: answers for answers in read_answers([str(folder / "crops")], ids, boxes)}
    assert [answers.title for answers in columns.values()] == [*ASK, "label", "depth"]
    assert len(columns["depth"].values) == 4, "numbers are in four ranges of about as many crops each"
    places = list(zip(ids.tolist(), map(tuple, boxes.tolist()), strict=True))
    for name, answers in columns.items():
        known = expected(folder, name)
        assert len(set(known.values()) - {None}) > 1
        for row, place in enumerate(places):
            value, text = known.get(place), answers.text_of(row)
            if value is None:
                assert answers.codes[row] == -1 and text is None
            elif name == "depth":
                assert answers.numbers is not None and answers.numbers[row] == value and text == f"{value:.3g}"
                low, _, high = answers.values[answers.codes[row]].partition(" to ")
                assert float(low) <= value <= float(high or low)
            elif name == "label":
                score = expected(folder, "label_score")[place]
                assert answers.values[answers.codes[row]] == value and text == f"{value} {score:.2f}"
            else:
                assert answers.values[answers.codes[row]] == value and text == (value or "(empty)")


def test_detections_in_another_order_or_fewer_have_the_same_answers(folder: Path, scored: Scored) -> None:
    ids, boxes = scored.found_ids[image_places(scored.columns)], scored.columns.boxes_xywh
    (whole, *_) = read_answers([str(folder / "crops")], ids, boxes)
    chosen = np.random.default_rng(0).permutation(len(ids))[: len(ids) // 2]
    (part, *_) = read_answers([str(folder / "crops")], ids[chosen], boxes[chosen])
    assert part.values == whole.values and (part.codes == whole.codes[chosen]).all()


def test_an_image_has_the_answer_about_its_best_detection_with_one(folder: Path, scored: Scored) -> None:
    columns = answers_by_image(str(folder / "crops"), scored)
    assert set(columns) == {"answer_1", "answer_2", "label", "depth"}
    for name, column in columns.items():
        best: dict[int, Any] = {}
        for row in open_table(str(folder / "crops"), "crops").read().to_pylist():  # by falling score
            if row[name] is not None:
                best.setdefault(row["image_id"], row[name])
        assert column.to_pylist() == [best.get(image_id) for image_id in scored.found_ids.tolist()]


def test_images_that_are_joined_by_path_keep_their_answers(folder: Path, scored: Scored, tmp_path: Path) -> None:
    table = open_table(str(folder / "images"), "images")
    with TableWriter(str(tmp_path / "images"), table.schema, config_hash="x") as writer:
        writer.write_rows([{**row, "image_id": 7000 - row["image_id"]} for row in table.read().to_pylist()])
    other = read_detections(scored.uri, read_truth(str(tmp_path / "images")), join="path")
    assert (other.truth_columns.image_ids == 7000 - other.found_ids).all()
    expected_of = dict(zip(scored.found_ids.tolist(), by_image(folder, scored), strict=True))
    assert by_image(folder, other) == [expected_of[image_id] for image_id in other.found_ids.tolist()]


def by_image(folder: Path, scored: Scored) -> list[Any]:
    return list(answers_by_image(str(folder / "crops"), scored)["label"].to_pylist())


def test_metrics_are_sliced_by_answers(folder: Path, tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "truth": str(folder / "images"),
        "detections": str(folder / "found"),
        "crops": str(folder / "crops"),
    }
    measured = evaluate(EvaluateConfig(**config, slice_by=["answer_1", "camera"]))
    sizes = {part.name: part.num_images for part in measured.slices}
    scored = read_detections(config["detections"], read_truth(config["truth"]))
    values = answers_by_image(config["crops"], scored)["answer_1"].to_pylist()
    assert {name: number for name, number in sizes.items() if name and name.startswith("answer_1=")} == {
        f"answer_1={'unknown' if value is None else value or '(empty)'}": number
        for value, number in Counter(values).items()
    }
    assert sum(sizes.values()) == 2 * 40
    # The numbers are those of a column with the same values in the images table.
    table = open_table(config["truth"], "images")
    schema = build_schema("images", table.categories, extra_fields=[pa.field("colour", pa.string())])
    with TableWriter(str(tmp_path / "images"), schema, config_hash="x") as writer:
        for row, value in zip(table.read().to_pylist(), values, strict=True):
            writer.write_rows([{**{name: row[name] for name in schema.names if name != "colour"}, "colour": value}])
    same = evaluate(
        EvaluateConfig(truth=str(tmp_path / "images"), detections=config["detections"], slice_by=["colour"])
    )
    numbers = {part.name: [value.value for value in part.blocks[0]] for part in measured.slices}
    assert {
        str(part.name).replace("colour=", "answer_1="): [value.value for value in part.blocks[0]]
        for part in same.slices
    } == {name: found for name, found in numbers.items() if name and name.startswith("answer_1=")}


def test_unfit_tables_are_refused_in_one_line(folder: Path, scored: Scored, tmp_path: Path) -> None:
    ids, boxes = scored.found_ids[image_places(scored.columns)], scored.columns.boxes_xywh
    found = str(folder / "found")
    crops = write_crops(tmp_path / "nothing", found, {})
    with pytest.raises(UserError, match="no answers in words or numbers"):
        read_answers([crops], ids, boxes)
    with pytest.raises(UserError, match="is about none of these detections"):
        read_answers([str(folder / "crops")], ids, boxes + 0.5)
    schema = build_schema("crops", extra_fields=[pa.field("label", pa.int64()), pa.field("label_score", pa.float64())])
    with TableWriter(str(tmp_path / "odd"), schema, config_hash="x"):
        pass
    with pytest.raises(UserError, match="one column label of type string"):
        read_answers([str(tmp_path / "odd")], ids, boxes)
    with pytest.raises(UserError, match="detections"):
        read_answers([found], ids, boxes)
    with pytest.raises(UserError, match="--crops needs --slice-by"):
        EvaluateConfig(truth="t", detections="d", crops="c")


def test_columns_with_one_title_are_told_apart(folder: Path, scored: Scored) -> None:
    ids, boxes = scored.found_ids[image_places(scored.columns)], scored.columns.boxes_xywh
    columns = read_answers([str(folder / "crops")] * 2, ids, boxes)
    assert len({answers.title for answers in columns}) == len(columns) == 8
