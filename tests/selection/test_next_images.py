"""`select --by` ranks images as the definitions of its criteria do, and chooses those that differ."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raydet import ExportLabelStudioConfig, SelectConfig, UserError, export_label_studio, select
from raydet.selection import next_images
from raydet.selection.criteria import disagreement, uncertainty_of
from raydet.selection.farthest import Neighbourhood, farthest_first
from raydet.selection.ranking import ImageScores
from raydet.tables.columns import DetectionColumns
from raydet.tables.kept.columns import KeptVectors
from raydet.tables.kept.thumbnails import THUMBNAIL_FIELD
from raydet.tables.schema import Category, build_schema
from raydet.tables.table import TableWriter, open_table
from tests.json_output import check_result
from tests.small_sets import rows_of

CATEGORIES = (Category(3, "cat"), Category(7, "dog"), Category(9, "yak"))
BOX = [10.0, 10.0, 20.0, 20.0]
ELSEWHERE = [60.0, 60.0, 20.0, 20.0]
Found = tuple[float, int, list[float], list[float]]
"""Score, class, box and all class scores of a detection."""


def write(
    uri: Path,
    images: Sequence[Sequence[Found]],
    vectors: Any,
    *,
    unreadable: Sequence[int] = (),
    thumbnails: Sequence[Any] | None = None,
) -> str:
    """Write a detections table with class scores, embeddings of two dimensions and, if they are given, thumbnails."""
    kept = KeptVectors(class_scores="sigmoid", num_classes=3, dimension=2)
    schema = kept.schema(CATEGORIES, {"checkpoint": "a"}, [THUMBNAIL_FIELD] if thumbnails else [])
    with TableWriter(str(uri), schema, config_hash="0" * 12) as writer:
        for number, (found, vector) in enumerate(zip(images, vectors, strict=True)):
            found = [] if number in unreadable else found
            boxes = [box for _, _, box, _ in found]
            detections = {"bbox": boxes, "score": [score for score, *_ in found]}
            detections |= {"category": [category for _, category, *_ in found], "query": list(range(len(found)))}
            queries = {"bbox": boxes, "class_scores": [scores for *_, scores in found]}
            queries |= {"embedding": [[1.0, 0.0]] * len(found)}
            writer.write_rows(
                [
                    {
                        "image_id": 100 + number,
                        "path": f"photos/{number}.jpg",
                        "width": 100,
                        "height": 100,
                        "detections": detections,
                        "queries": queries,
                        "image_embedding": None if number in unreadable else list(vector),
                        "error": "no image" if number in unreadable else None,
                        **({"thumbnail": thumbnails[number]} if thumbnails else {}),
                    }
                ]
            )
    return str(uri)


def single(score: float, category: int = 0, box: list[float] = BOX, others: float = 0.0) -> Found:
    scores = [others] * 3
    scores[category] = score
    return score, category, box, scores


def test_uncertain_images_come_first_with_the_detection_that_is_uncertain(tmp_path: Path) -> None:
    images = [
        [single(0.99), single(0.001, 1)],
        [single(0.5, 1), single(0.9)],
        [single(0.9, 0, others=0.85)],  # an object for sure, of one class or another
        [single(0.5, 2), single(0.4, 0)],
        [],
    ]
    uri = write(tmp_path / "d", images, np.eye(2)[[0, 0, 0, 0, 0]])
    result = select(SelectConfig(detections=uri, by=["uncertainty"], num=4, out=str(tmp_path / "out")))
    assert check_result(result, "select")["num_found"] == 4
    rows = rows_of(result.table, "to_label")
    assert [(row["place"], row["image_id"]) for row in rows] == [(1, 103), (2, 101), (3, 102), (4, 100)]
    assert [row["reason"] for row in rows] == [
        "uncertain: yak 0.50",
        "uncertain: dog 0.50",
        "uncertain: cat 0.90",
        "uncertain: cat 0.99",
    ]
    entropy = {p: -p * np.log2(p) - (1 - p) * np.log2(1 - p) for p in (0.5, 0.4, 0.9)}
    assert rows[0]["uncertainty"] == pytest.approx((1 + entropy[0.4]) / 5, abs=1e-3)
    assert rows[2]["uncertainty"] == pytest.approx((1 - (1 - entropy[0.9]) * 0.15) / 5, abs=1e-3)
    assert all(row["rare"] is None and row["disagreement"] is None for row in rows)
    assert Path(result.list_file).read_text().split() == [row["path"] for row in rows]


def test_certain_scores_are_not_uncertain() -> None:
    np.testing.assert_array_equal(uncertainty_of(np.array([0.0, 1.0, 0.5]), np.zeros(3)), [0, 0, 1])


def test_rare_classes_are_those_that_few_labels_have(tmp_path: Path) -> None:
    images = [[single(0.9, 0)], [single(0.8, 1)], [single(0.5, 2)], [single(0.6, 2, others=0.0)], [single(0.95, 0)]]
    uri = write(tmp_path / "d", images, np.eye(2)[[0] * 5])
    labelled = write_labels(tmp_path / "labels", paths=["x/photos/4.jpg", "x/photos/77.jpg"], classes=[0] * 8 + [1] * 3)
    config = SelectConfig(detections=uri, by=["rare"], labelled_data=labelled, num=9, out=str(tmp_path / "out"))
    rows = rows_of(select(config).table, "to_label")
    rarity = np.sqrt(np.array([1 / 9, 1 / 4, 1.0]))
    assert [row["image_id"] for row in rows] == [103, 102, 101, 100]  # the image 104 is labelled
    assert rows[0]["reason"] == "rare: yak 0.60"
    expected = [0.6 * rarity[2], 0.5 * rarity[2], 0.8 * rarity[1], 0.9 * rarity[0]]
    np.testing.assert_allclose([row["rare"] for row in rows], expected, rtol=1e-3)


def write_labels(uri: Path, *, paths: Sequence[str], classes: Sequence[int]) -> str:
    """Write an images table whose first image has all boxes; its classes are in another order."""
    with TableWriter(str(uri), build_schema("images", CATEGORIES[::-1]), config_hash="0" * 12) as writer:
        for number, path in enumerate(paths):
            own = [2 - category for category in classes] if number == 0 else []
            objects = {"id": list(range(len(own))), "bbox": [BOX] * len(own), "category": own}
            objects |= {"area": [400.0] * len(own), "iscrowd": [False] * len(own)}
            image = {"bytes": None, "path": path}
            writer.write_rows(
                [{"image_id": 100 + number, "image": image, "width": 100, "height": 100, "objects": objects}]
            )
    return str(uri)


def columns(images: Sequence[Sequence[Found]]) -> DetectionColumns:
    found = [one for image in images for one in image]
    return DetectionColumns(
        starts=np.cumsum([0, *map(len, images)]),
        boxes_xywh=np.array([one[2] for one in found], float).reshape(-1, 4),
        scores=np.array([one[0] for one in found]),
        category=np.array([one[1] for one in found], np.int64),
    )


def test_runs_disagree_where_boxes_classes_or_scores_differ() -> None:
    first = [[single(0.9)], [single(0.9)], [single(0.9)], [single(0.9)], [single(0.02)], [], [single(0.9), single(0.8)]]
    second = [
        [single(0.9)],
        [single(0.9, 1)],
        [single(0.9, 0, ELSEWHERE)],
        [single(0.3)],
        [single(0.02, 1)],
        [],
        [single(0.9)],
    ]
    found = disagreement(np.arange(7), columns(first), columns(second))
    dice = 2 * 0.9 * 0.3 / (0.9**2 + 0.3**2)
    twice = 2 * 0.9**2 / (2 * 0.9**2 + 0.8**2)
    np.testing.assert_allclose(found, [0, 0.9, 0.9, (1 - dice) * 0.9, 0.02, 0, (1 - twice) * 0.9], atol=1e-12)


@pytest.mark.parametrize("is_reversed", [False, True])
def test_another_run_may_have_another_order_of_images_and_classes(tmp_path: Path, is_reversed: bool) -> None:
    images = [[single(0.9)], [single(0.9, 1)], [single(0.9)]]
    uri = write(tmp_path / "d", images, np.eye(2)[[0, 1, 1]])
    other = tmp_path / "other"
    order = [2, 1, 0] if is_reversed else [0, 1, 2]
    categories = CATEGORIES[::-1] if is_reversed else CATEGORIES
    with TableWriter(str(other), build_schema("detections", categories), config_hash="1" * 12) as writer:
        for number in order:
            name = ("cat", "dog", "dog")[number]
            place = [category.name for category in categories].index(name)
            detections = {"bbox": [BOX], "score": [0.9], "category": [place]}
            row = {"image_id": 100 + number, "path": f"photos/{number}.jpg", "width": 100, "height": 100}
            writer.write_rows([{**row, "detections": detections, "error": None}])
    config = SelectConfig(detections=uri, by=["disagreement"], other=str(other), num=3, out=str(tmp_path / "out"))
    rows = rows_of(select(config).table, "to_label")
    assert rows[0]["image_id"] == 102 and rows[0]["reason"] == "the runs disagree: 0.90"
    assert [row["disagreement"] for row in rows] == pytest.approx([0.9, 0, 0], abs=1e-3)


def test_a_run_on_other_images_is_refused(tmp_path: Path) -> None:
    uri = write(tmp_path / "d", [[single(0.9)]], np.eye(2)[[0]])
    with TableWriter(str(tmp_path / "o"), build_schema("detections", CATEGORIES), config_hash="1" * 12) as writer:
        row = {"image_id": 100, "path": "photos/5.jpg", "width": 100, "height": 100, "error": None}
        writer.write_rows([{**row, "detections": {"bbox": [], "score": [], "category": []}}])
    config = SelectConfig(detections=uri, by=["disagreement"], other=str(tmp_path / "o"), out=str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"describe different images.*use two runs on the same images"):
        select(config)
    assert not (tmp_path / "out").exists()


def test_different_images_are_chosen_and_planted_copies_are_not(tmp_path: Path) -> None:
    angles = np.deg2rad([0, 0.5, 90, 90.5, 45, 180])
    uri = write(tmp_path / "d", [[single(0.5)]] * 6, np.stack([np.cos(angles), np.sin(angles)], axis=1), unreadable=[5])
    labelled = write_labels(tmp_path / "labels", paths=["photos/0.jpg"], classes=[0])
    config = SelectConfig(
        detections=uri,
        by=["diversity"],
        labelled_data=labelled,
        min_similarity=0.999,
        num=5,
        out=str(tmp_path / "out"),
    )
    result = select(config)
    rows = rows_of(result.table, "to_label")
    assert [row["image_id"] for row in rows] == [103, 104]  # 101 is like 100, which is labelled; 102 like 103
    assert [row["similarity"] for row in rows] == pytest.approx([np.cos(angles[3]), np.cos(angles[4])], abs=1e-2)
    assert rows[1]["reason"].startswith("unlike the others: 0.7")
    nothing = str(tmp_path / "nothing")
    with pytest.raises(
        UserError, match="near-duplicates of a labelled one, with a similarity of at least -1; set a higher"
    ):
        select(dataclasses.replace(config, min_similarity=-1.0, out=nothing))
    with TableWriter(str(tmp_path / "images"), build_schema("images"), config_hash="0" * 12):
        pass
    with pytest.raises(UserError, match=r"--labelled-data .* has no classes"):
        select(dataclasses.replace(config, labelled_data=str(tmp_path / "images"), out=nothing))
    assert not Path(nothing).exists()


@pytest.mark.parametrize("by", [["uncertainty"], ["uncertainty", "diversity"]])
def test_the_same_picture_is_not_chosen_twice_whatever_the_model_sees_in_it(
    tmp_path: Path, by: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each batch has one vector, and at first two candidates are looked at.
    monkeypatch.setattr(next_images, "_VECTORS_AT_ONCE", 1)
    monkeypatch.setattr(next_images, "CANDIDATES_PER_IMAGE", 1)
    first, second = np.random.default_rng(0).integers(40, 200, (2, 192), np.uint8)
    # The third picture is the first one, brighter and with more contrast; to the model it is like the second.
    pictures = [first, second, first * 1.1 + 15, None]
    thumbnails = [None if picture is None else picture.astype(np.uint8) for picture in pictures]
    images = [[single(0.5)], [single(0.8)], [single(0.6)], []]
    uri = write(tmp_path / "d", images, np.eye(2)[[0, 1, 1, 0]], thumbnails=thumbnails, unreadable=[3])
    labelled = write_labels(tmp_path / "labels", paths=["photos/3.jpg"], classes=[0])
    config = SelectConfig(detections=uri, by=by, num=2, labelled_data=labelled, out=str(tmp_path / "out"))

    def chosen(name: str, **options: Any) -> list[int]:
        changed = dataclasses.replace(config, out=str(tmp_path / name), **options)
        return [row["image_id"] for row in rows_of(select(changed).table, "to_label")]

    assert chosen("out") == [100, 101]
    assert chosen("by_model", compare="embedding", min_similarity=0.9) == [100, 102]
    assert chosen("nothing_left_out", compare="embedding", num=3) == [100, 102, 101]
    assert chosen("equal_ones", min_similarity=1.0, num=3) == [100, 102, 101]


def test_the_detections_of_the_chosen_images_go_to_a_labelling_tool(tmp_path: Path) -> None:
    uri = write(tmp_path / "d", [[single(0.5, 1)], [single(0.9)], [single(0.6, 2)]], np.eye(2)[[0, 1, 1]])
    result = select(SelectConfig(detections=uri, by=["uncertainty"], num=2, out=str(tmp_path / "out")))
    assert result.detections is not None
    table = open_table(result.detections, "detections")
    assert "queries" not in table.schema.names and table.categories == CATEGORIES
    assert [row["detections"]["score"] for row in rows_of(result.detections, "detections")] == [[0.5], [0.6]]
    export_label_studio(ExportLabelStudioConfig(data=result.detections, out=str(tmp_path / "tasks")))
    tasks = (tmp_path / "tasks" / "tasks.json").read_text()
    assert '"image_id": 100' in tasks and '"image_id": 102' in tasks and '"image_id": 101' not in tasks
    assert select(SelectConfig(detections=uri, by=["uncertainty"], num=2, out=str(tmp_path / "out"))) == result


def test_ranks_are_those_of_all_candidates_whatever_the_blocks() -> None:
    generator = np.random.default_rng(0)
    scores = np.round(generator.random((1000, 2)), 2)
    is_candidate = generator.random(1000) < 0.9
    with ImageScores(2) as spilled:
        for start in range(0, 1000, 37):
            spilled.append(scores[start : start + 37], is_candidate[start : start + 37])
        best = spilled.best(50)
    halves = scores.astype(np.float16).astype(float)
    own = halves[is_candidate]
    expected = np.stack(
        [[(np.sum(column < value) + np.sum(column == value) / 2) / len(own) for value in column] for column in own.T],
        axis=1,
    )
    mean = np.full(1000, -1.0)
    mean[is_candidate] = expected.mean(axis=1)
    assert is_candidate[best.rows].all() and len(set(best.rows.tolist())) == 50
    np.testing.assert_allclose(best.mean_ranks, np.sort(mean)[::-1][:50])
    np.testing.assert_allclose(best.mean_ranks, mean[best.rows])
    np.testing.assert_array_equal(best.scores, halves[best.rows])


def test_the_farthest_image_comes_first_as_a_direct_search_finds_it() -> None:
    generator = np.random.default_rng(1)
    vectors = generator.normal(size=(60, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    weights = generator.random(60) + 0.1
    images = Neighbourhood(vectors, np.full(60, -1, np.float32))
    chosen, similarity = farthest_first(weights, images, num=20, max_similarity=0.9)
    kept: list[int] = []
    for _ in range(20):
        nearest = (vectors @ vectors[kept].T).max(axis=1) if kept else np.full(60, -1)
        gain = np.where(nearest < 0.9, weights * (1 - nearest), -1)
        gain[kept] = -1
        kept.append(int(gain.argmax()))
    assert chosen.tolist() == kept and (similarity < 0.9).all() and similarity[0] == -1


@pytest.mark.parametrize(
    "options",
    [
        {"by": ["uncertainty"], "near_duplicates": True, "min_similarity": 0.9},
        {"by": ["disagreement"]},
        {"by": ["uncertainty"], "other": "o"},
        {"by": ["rare", "rare"]},
        {"similar_to": "1:0", "labelled_data": "t"},
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        SelectConfig(detections="d", out="o", **options)


def test_what_the_table_lacks_is_named(tmp_path: Path) -> None:
    with TableWriter(str(tmp_path / "d"), build_schema("detections", CATEGORIES), config_hash="1" * 12) as writer:
        row = {"image_id": 1, "path": "photos/0.jpg", "width": 100, "height": 100, "error": None}
        writer.write_rows([{**row, "detections": {"bbox": [], "score": [], "category": []}}])
    base = SelectConfig(detections=str(tmp_path / "d"), by=["diversity"], out=str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"--by diversity compares embeddings.*--keep embedding"):
        select(base)
    labelled = write_labels(tmp_path / "labels", paths=["photos/0.jpg"], classes=[0])
    with pytest.raises(UserError, match="no image that could be read and is not labelled"):
        select(
            SelectConfig(detections=str(tmp_path / "d"), by=["rare"], labelled_data=labelled, out=str(tmp_path / "out"))
        )
    assert not (tmp_path / "out").exists()
