"""Images and labels from S3 and Google Cloud Storage, and one-line errors."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs as pafs

from raydet.cli.main import main
from raydet.tables import storage
from raydet.tables.table import open_table
from tests import gcs_stand_in, s3_stand_in

pytestmark = pytest.mark.slow  # the stand-in for S3 takes seconds to start

XML = """<annotation><filename>{name}</filename><size><width>640</width><height>480</height></size>
<object><name>RBC</name><bndbox><xmin>11</xmin><ymin>21</ymin><xmax>110</xmax><ymax>220</ymax></bndbox></object>
</annotation>"""
BOX_XYWH = [10, 20, 100, 200]
SOURCES = ("voc", "yolo", "coco", "images")


def fill(bucket: str, test_data: Path) -> None:
    """Upload two real images with one box each, in VOC, YOLO and COCO format."""
    images: list[dict[str, Any]] = []
    for path in sorted((test_data / "bccd/images").iterdir())[:2]:
        storage.write_bytes(f"{bucket}/voc/images/{path.name}", path.read_bytes())
        storage.write_bytes(f"{bucket}/voc/xml/{path.stem}.xml", XML.format(name=path.name).encode())
        storage.write_bytes(f"{bucket}/yolo/images/train/{path.name}", path.read_bytes())
        storage.write_bytes(f"{bucket}/yolo/labels/train/{path.stem}.txt", b"1 0.09375 0.25 0.15625 0.41666666\n")
        images.append({"id": len(images), "file_name": path.name})
    storage.write_bytes(f"{bucket}/yolo/data.yaml", b"train: images/train\nval: images/train\nnames: [a, RBC]\n")
    boxes = [{"id": image["id"] + 1, "image_id": image["id"], "category_id": 2, "bbox": BOX_XYWH} for image in images]
    coco = {"images": images, "annotations": boxes, "categories": [{"id": 2, "name": "RBC"}]}
    storage.write_bytes(f"{bucket}/instances.json", json.dumps(coco).encode())


@pytest.fixture(scope="module")
def s3(test_data: Path) -> Iterator[s3_stand_in.StandIn]:
    with pytest.MonkeyPatch.context() as patch, s3_stand_in.started() as stand_in:
        stand_in.use(patch)
        # Retries are tested elsewhere and would only slow this down.
        patch.setattr(storage, "S3_ATTEMPTS", 1)
        fill(s3_stand_in.BUCKET, test_data)
        yield stand_in


@pytest.fixture(scope="module")
def gs(test_data: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, gcs_stand_in.started() as url:
        patch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", url)
        patch.setattr(storage, "GCS_RETRY_S", 1)
        fill(gcs_stand_in.BUCKET, test_data)
        yield


@pytest.fixture(params=["s3", "gs"])
def bucket(request: pytest.FixtureRequest) -> str:
    """Return the URI of a bucket on a running stand-in server."""
    request.getfixturevalue(request.param)
    return {"s3": s3_stand_in.BUCKET, "gs": gcs_stand_in.BUCKET}[request.param]


def arguments(source: str, out: object, bucket: str) -> list[str]:
    places = {
        "voc": ["--images", f"{bucket}/voc/images", "--annotations", f"{bucket}/voc/xml"],
        "yolo": ["--data", f"{bucket}/yolo/data.yaml"],
        "coco": ["--images", f"{bucket}/voc/images", "--annotations", f"{bucket}/instances.json"],
        "images": ["--images", f"{bucket}/voc/images"],
    }
    return ["prepare", source, *places[source], "--out", str(out)]


@pytest.mark.parametrize("storage_of_images", ["inline", "reference"])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.timeout(60)
def test_a_table_is_made_of_what_is_in_a_bucket(bucket: str, source: str, storage_of_images: str) -> None:
    out = f"{bucket}/out/{source}-{storage_of_images}"
    assert main([*arguments(source, out, bucket), "--image-storage", storage_of_images]) == 0
    rows = open_table(out, "images").read().to_pylist()
    assert len(rows) == 2
    for row in rows:
        if source != "images":
            assert row["objects"]["bbox"][0] == pytest.approx(BOX_XYWH, abs=1e-4)
        data = row["image"]["bytes"] or storage.read_bytes(row["image"]["path"])
        assert data[:2] == b"\xff\xd8"
        assert (row["image"]["bytes"] is None) == (storage_of_images == "reference")


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("trouble", ["wrong key", "missing bucket", "server gone"])
@pytest.mark.timeout(60)
def test_what_is_wrong_is_one_line(
    request: pytest.FixtureRequest,
    bucket: str,
    source: str,
    trouble: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = f"{bucket}-that-is-not-there" if trouble == "missing bucket" else bucket
    if trouble == "server gone":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", "http://127.0.0.1:9")
    if trouble == "wrong key" and bucket.startswith("gs"):
        pytest.skip("the stand-in for Google Cloud Storage lets everybody in")
    if trouble == "wrong key":
        request.getfixturevalue("s3").fail("403", 30)
    try:
        code = main(arguments(source, tmp_path / "out", place))
    finally:
        if trouble == "wrong key":
            request.getfixturevalue("s3").fail("403", 0)
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (1 if trouble == "server gone" else 2, 1), error
    assert error.startswith("raydet: error: ") and place in error and "Traceback" not in error
    words = {"wrong key": "ACCESS_DENIED|403", "missing bucket": "no such|NoSuchBucket|404", "server gone": "onnect"}
    assert any(word in error for word in words[trouble].split("|")), error
    assert not (tmp_path / "out").exists()


def test_the_stand_ins_speak_for_the_stores(bucket: str) -> None:
    kind = {"s3": pafs.S3FileSystem, "gs": pafs.GcsFileSystem}[bucket.partition(":")[0]]
    assert isinstance(storage.resolve(bucket)[0], kind)
