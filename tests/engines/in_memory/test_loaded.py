"""`raydet.load`: the boxes of `predict`, for any kind of image in memory."""

import functools
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PilImage

import raydet
from raydet import PredictConfig, UserError
from raydet.engines.in_memory.loaded import LoadedModel
from raydet.engines.in_memory.picture_detections import PictureDetections
from raydet.tables.table import open_table
from tests.engines.test_engines import pictures, tiny

SIZES_HW = [(120, 160), (90, 90), (160, 70)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("rt_detr_v2_tiny", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LoadedModel:
    return raydet.load(checkpoint, score_threshold=0.0, top_k=20, batch_size=2)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{number}.png" for number in range(len(SIZES_HW))]
    for path, picture in zip(paths, pictures(SIZES_HW), strict=True):
        PilImage.fromarray(picture).save(path)
    return paths


@pytest.fixture(scope="module")
def found(model: LoadedModel, files: list[Path]) -> list[PictureDetections]:
    results: list[PictureDetections] = model([*files])
    return results


def assert_same(one: PictureDetections, other: PictureDetections) -> None:
    np.testing.assert_array_equal(one.image, other.image)
    np.testing.assert_array_equal(one.class_indices, other.class_indices)
    np.testing.assert_allclose(one.boxes_xywh, other.boxes_xywh, atol=1e-3)
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-6)


def test_the_boxes_are_those_of_predict(
    checkpoint: Path, files: list[Path], found: list[PictureDetections], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"top_k": 20, "batch_size": 2}
    data = str(files[0].parent)
    raydet.predict(PredictConfig(checkpoint=str(checkpoint), data=data, out=str(tmp_path / "out"), **options))
    rows = {Path(row["path"]).name: row for row in open_table(str(tmp_path / "out"), "detections").read().to_pylist()}
    for path, one in zip(files, found, strict=True):
        expected = rows[path.name]["detections"]
        assert len(one) == 20
        np.testing.assert_array_equal(one.boxes_xywh, expected["bbox"])
        np.testing.assert_array_equal(one.scores, expected["score"])
        np.testing.assert_array_equal(one.class_indices, expected["category"])


def test_kinds_of_images_are_one(model: LoadedModel, files: list[Path], found: list[PictureDetections]) -> None:
    path, pixels = files[0], found[0].image
    for picture in (path, str(path), path.read_bytes(), pixels, PilImage.open(path), PilImage.fromarray(pixels)):
        assert_same(model(picture), found[0])


def test_photographs_are_turned_upright(model: LoadedModel, files: list[Path], tmp_path: Path) -> None:
    exif = PilImage.Exif()
    exif[0x0112] = 6
    turned = tmp_path / "turned.jpg"
    PilImage.open(files[0]).save(turned, exif=exif)
    assert_same(model(PilImage.open(turned)), model(turned))
    assert model(turned).image.shape == (160, 120, 3)


def test_a_web_address_is_read(model: LoadedModel, files: list[Path], found: list[PictureDetections]) -> None:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=files[0].parent)
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert_same(model(f"http://127.0.0.1:{server.server_port}/0.png"), found[0])
        server.shutdown()


def test_an_iterator_is_read_batch_by_batch(model: LoadedModel, files: list[Path]) -> None:
    taken: list[int] = []

    def source() -> Iterator[Path]:
        for number in range(5):
            taken.append(number)
            yield files[number % 3]

    results = model(source())
    assert taken == []
    first = next(results)
    assert taken == [0, 1]
    assert len([first, *results]) == 5


def test_unreadable_images_are_named(model: LoadedModel, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8no picture")
    with pytest.raises(UserError, match=r"broken\.jpg: "):
        model(broken)
    with pytest.raises(UserError, match=r"missing\.jpg: the file no longer exists|missing\.jpg: .*not"):
        model([tmp_path / "missing.jpg"])
    with pytest.raises(UserError, match=r"uint8 \[height, width, 3\], got float64 \[4 × 4\]"):
        model(np.zeros((4, 4)))
    with pytest.raises(UserError, match="got NoneType"):
        model([None])  # type: ignore[list-item]


def test_wrong_options_are_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no option draw"):
        raydet.load(checkpoint, draw=3)
    with pytest.raises(UserError, match="score-threshold"):
        raydet.load(checkpoint, score_threshold=2.0)
    with pytest.raises(UserError, match="batch_size"):
        raydet.load(checkpoint, batch_size="auto")
    with pytest.raises(UserError, match="no_model"):
        raydet.load(tmp_path / "no_model")


def test_detections_are_filtered_and_converted(model: LoadedModel, found: list[PictureDetections]) -> None:
    one = found[0]
    threshold = float(np.median(one.scores))
    best = one.filter(score_threshold=threshold)
    assert 0 < len(best) < len(one)
    assert (best.scores > threshold).all()
    name = one.class_names[0]
    assert set(one.filter(classes=[name]).class_names) == {name}
    assert len(one.filter(top_k=3)) == 3
    with pytest.raises(UserError, match="zebra"):
        one.filter(classes=["zebra"])

    entries = best.to_coco(image_id=7)
    json.dumps(entries)
    assert [entry["bbox"] for entry in entries] == best.boxes_xywh.tolist()
    ids = {category.name: category.id for category in model.categories}
    assert [entry["category_id"] for entry in entries] == [ids[name] for name in best.class_names]
    assert {entry["image_id"] for entry in entries} == {7}

    rows = best.to_arrow().to_pylist()
    assert [row["class_name"] for row in rows] == best.class_names
    assert [row["bbox"] for row in rows] == best.boxes_xywh.tolist()


def test_detections_are_drawn(found: list[PictureDetections]) -> None:
    drawn = np.array(found[0].draw())
    assert drawn.shape == found[0].image.shape
    assert (drawn != found[0].image).any()
    assert found[0]._repr_png_().startswith(b"\x89PNG")
    nothing = found[0].filter(top_k=0)
    np.testing.assert_array_equal(np.array(nothing.draw()), nothing.image)
    assert repr(nothing) == "0 objects in an image of 160 × 120 pixels"
    assert nothing.to_arrow().num_rows == 0
    assert nothing.to_coco() == []


def test_supervision_takes_them(found: list[PictureDetections]) -> None:
    supervision = pytest.importorskip("supervision")
    converted = found[0].to_supervision()
    assert isinstance(converted, supervision.Detections)
    assert converted.data["class_name"].tolist() == found[0].class_names
