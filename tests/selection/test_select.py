"""`select` finds the vectors that a comparison of all pairs finds, whatever the blocks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raydet import SelectConfig, UserError, select
from raydet.selection.near_duplicates import near_duplicates
from raydet.selection.vectors import ImageColumn, ImageVectors
from raydet.tables.kept.columns import KeptVectors
from raydet.tables.kept.thumbnails import THUMBNAIL_FIELD
from raydet.tables.schema import Category, build_schema
from raydet.tables.table import TableWriter, open_table
from tests.json_output import check_result
from tests.small_sets import rows_of

CATEGORIES = (Category(3, "cat"), Category(7, "dog"))
DIMENSION = 16
EMBEDDINGS = ImageColumn("image_embedding", DIMENSION, np.float16)
NUM_IMAGES = 60
UNREADABLE = 7
COPIES = {20: 3, 41: 3, 42: 12, 59: 58}
"""Images that are nearly the same as an earlier one."""


def vectors_of_images() -> np.ndarray:
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(NUM_IMAGES, DIMENSION)).astype(np.float32)
    for copy, original in COPIES.items():
        vectors[copy] = 3 * vectors[original] + 0.01 * generator.normal(size=DIMENSION)
    return vectors.astype(np.float16)


def rows() -> list[dict[str, Any]]:
    """Two detections of one query and one of another in each image that can be read."""
    generator = np.random.default_rng(1)
    result = []
    for number, vector in enumerate(vectors_of_images()):
        readable = number != UNREADABLE
        boxes = [[float(number), 0.0, 4.0, 3.0], [0.0, float(number), 2.0, 2.0]]
        detections: dict[str, Any] = {"bbox": [boxes[0], boxes[1], boxes[0]], "score": [0.9, 0.5, 0.1]}
        detections |= {"category": [1, 0, 0], "query": [0, 1, 0]}
        queries: dict[str, Any] = {"bbox": boxes, "embedding": generator.normal(size=(2, DIMENSION)).tolist()}
        if not readable:
            detections, queries = ({key: [] for key in part} for part in (detections, queries))
        result.append(
            {
                "image_id": 100 + number,
                "path": f"{number}.jpg",
                "width": 64,
                "height": 64,
                "detections": detections,
                "queries": queries,
                "image_embedding": vector.tolist() if readable else None,
                "error": None if readable else "no image",
            }
        )
    return result


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("select") / "d")
    with TableWriter(uri, KeptVectors(dimension=DIMENSION).schema(CATEGORIES, {}), config_hash="0" * 12) as writer:
        writer.write_rows(rows())
    return uri


def unit(vectors: Any) -> np.ndarray:
    values = np.asarray(vectors, np.float64)
    lengths: np.ndarray = np.linalg.norm(values, axis=-1, keepdims=True)
    return np.asarray(values / lengths)


@pytest.mark.parametrize("rows_at_once", [1, 7, 1000])
def test_planted_copies_and_only_these_are_found(table: str, rows_at_once: int) -> None:
    with ImageVectors(open_table(table), EMBEDDINGS) as vectors:
        original, similarity = near_duplicates(vectors, 0.99, rows_at_once=rows_at_once)
        ids = vectors.image_ids
    assert len(ids) == NUM_IMAGES - 1 and 100 + UNREADABLE not in ids
    found = {int(ids[place]) - 100: int(ids[original[place]]) - 100 for place in np.flatnonzero(original >= 0)}
    assert found == COPIES
    assert (similarity[original >= 0] > 0.99).all() and (similarity[original < 0] == 0).all()


@pytest.mark.parametrize("rows_at_once", [3, 8, 1000])
def test_a_lower_limit_finds_what_one_after_the_other_does(table: str, rows_at_once: int) -> None:
    with ImageVectors(open_table(table), EMBEDDINGS) as vectors:
        original, similarity = near_duplicates(vectors, 0.3, rows_at_once=rows_at_once)
    values = unit([row["image_embedding"] for row in rows() if row["image_embedding"] is not None])
    kept: list[int] = []
    for place, vector in enumerate(values):
        products = values[kept] @ vector
        best = int(products.argmax()) if kept else -1
        if kept and products[best] >= 0.3:
            assert original[place] == kept[best]
            assert similarity[place] == pytest.approx(products[best], abs=1e-5)
        else:
            assert original[place] == -1
            kept.append(place)
    assert 3 < len(kept) < 50


def test_the_table_and_the_list_of_near_duplicates(table: str, tmp_path: Path) -> None:
    result = select(SelectConfig(detections=table, near_duplicates=True, min_similarity=0.99, out=str(tmp_path)))
    assert check_result(result, "select")["num_found"] == 4 and result.num_listed == NUM_IMAGES - 1 - 4
    found = rows_of(result.table, "near_duplicates")
    assert {row["image_id"] - 100: row["duplicate_of"] - 100 for row in found} == COPIES
    assert [row["path"] for row in found] == ["20.jpg", "41.jpg", "42.jpg", "59.jpg"]
    listed = Path(result.list_file).read_text().split()
    assert listed == [f"{number}.jpg" for number in range(NUM_IMAGES) if number not in (*COPIES, UNREADABLE)]
    again = select(SelectConfig(detections=table, near_duplicates=True, min_similarity=0.99, out=str(tmp_path)))
    assert again == result
    with pytest.raises(UserError, match="--min-similarity"):
        select(SelectConfig(detections=table, near_duplicates=True, min_similarity=0.5, out=str(tmp_path)))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_objects_are_ranked_as_all_vectors_are(table: str, tmp_path: Path, number: int) -> None:
    result = select(SelectConfig(detections=table, similar_to=f"130:{number}", num=9, out=str(tmp_path)))
    found = rows_of(result.table, "similar")
    values = {
        (row["image_id"], query): vector
        for row in rows()
        for query, vector in enumerate(unit(row["queries"]["embedding"]) if row["error"] is None else [])
    }
    own = values.pop((130, 1 if number == 1 else 0))
    expected = sorted(values, key=lambda key: -float(values[key] @ own))[:9]
    assert [(row["image_id"], row["detection"]) for row in found] == expected
    np.testing.assert_allclose([row["similarity"] for row in found], [values[key] @ own for key in expected], atol=1e-3)
    by_id = {row["image_id"]: row["detections"] for row in rows()}
    for row in found:
        detections = by_id[row["image_id"]]
        assert row["bbox"] == detections["bbox"][row["detection"]]
        assert row["score"] == detections["score"][row["detection"]]
        assert row["category"] == ("dog", "cat")[row["detection"]]
    assert Path(result.list_file).read_text().split() == list(dict.fromkeys(row["path"] for row in found))


def test_images_are_ranked_by_their_own_vectors(table: str, tmp_path: Path) -> None:
    result = select(SelectConfig(detections=table, similar_to="103", min_similarity=0.9, out=str(tmp_path)))
    found = rows_of(result.table, "similar")
    assert {row["image_id"] for row in found} == {120, 141}
    assert all(row["detection"] is None and row["bbox"] is None and row["similarity"] > 0.99 for row in found)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("5", "has no image 5"),
        ("130:3", "does not have a detection 3; it has 3"),
        (f"{100 + UNREADABLE}", "could not be read"),
        (f"{100 + UNREADABLE}:0", "does not have a detection 0; it has 0"),
    ],
)
def test_a_target_that_is_not_there_is_named(table: str, tmp_path: Path, target: str, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        select(SelectConfig(detections=table, similar_to=target, out=str(tmp_path / "out")))
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_table_without_embeddings_is_refused(tmp_path: Path) -> None:
    with TableWriter(str(tmp_path / "d"), build_schema("detections", CATEGORIES), config_hash="0" * 12) as writer:
        writer.write_rows([])
    base: dict[str, Any] = {"detections": str(tmp_path / "d"), "out": str(tmp_path / "out")}
    for options, reason in (
        ({"near_duplicates": True}, "--near-duplicates compares thumbnails or embeddings.*--keep thumbnail"),
        ({"near_duplicates": True, "compare": "embedding", "min_similarity": 0.9}, "embeddings.*--keep embedding"),
        ({"by": ["uncertainty"], "min_similarity": 0.9}, "--min-similarity compares.*--keep thumbnail"),
        ({"by": ["uncertainty"], "compare": "thumbnail"}, "--compare thumbnail compares thumbnails"),
        ({"similar_to": "1:0"}, "--keep embedding"),
    ):
        with pytest.raises(UserError, match=reason):
            select(SelectConfig(**base, **options))
    assert not (tmp_path / "out").exists()


def test_thumbnails_are_compared_by_their_pixels_and_single_colours_are_alike(tmp_path: Path) -> None:
    picture, other = np.random.default_rng(2).integers(20, 150, (2, 192))
    flat = np.full(192, 7)
    thumbnails = [picture, flat, other, 1.5 * picture + 20, flat + 200, None, flat]
    schema = build_schema("detections", CATEGORIES, extra_fields=[THUMBNAIL_FIELD])
    nothing: dict[str, Any] = {"bbox": [], "score": [], "category": []}
    with TableWriter(str(tmp_path / "d"), schema, config_hash="0" * 12) as writer:
        for number, pixels in enumerate(thumbnails):
            about = {"image_id": number, "path": f"{number}.jpg", "width": 8, "height": 8, "detections": nothing}
            thumbnail = None if pixels is None else np.minimum(pixels, 255).astype(np.uint8).tolist()
            writer.write_rows([{**about, "error": "no image" if pixels is None else None, "thumbnail": thumbnail}])
    result = select(SelectConfig(detections=str(tmp_path / "d"), near_duplicates=True, out=str(tmp_path / "out")))
    found = rows_of(result.table, "near_duplicates")
    assert [(row["image_id"], row["duplicate_of"]) for row in found] == [(3, 0), (4, 1), (6, 1)]
    assert result.num_listed == 3
    equal = SelectConfig(
        detections=str(tmp_path / "d"), near_duplicates=True, min_similarity=1.0, out=str(tmp_path / "equal")
    )
    assert [row["image_id"] for row in rows_of(select(equal).table, "near_duplicates")] == [4, 6]


def test_embeddings_have_no_default_limit(table: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no thumbnails: --min-similarity is required.*--keep thumbnail"):
        select(SelectConfig(detections=table, near_duplicates=True, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"near_duplicates": True, "compare": "embedding"},
        {"similar_to": "1:0", "compare": "thumbnail"},
        {"near_duplicates": True, "min_similarity": 0.9, "similar_to": "1:0"},
        {"similar_to": "1:x"},
        {"similar_to": "1:0", "num": 0},
        {"similar_to": "1:0", "min_similarity": 1.5},
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        SelectConfig(detections="d", out="o", **options)
