"""VOC and YOLO from S3: what is there is read, and each way in which it cannot be is one line of the command's."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow import fs as pafs

from raydet import storage
from raydet.cli import main
from raydet.tables import open_table
from tests.s3_stand_in import BUCKET, StandIn, started

pytestmark = pytest.mark.slow  # the stand-in for S3 takes seconds to start

XML = """<annotation><filename>{name}</filename><size><width>640</width><height>480</height></size>
<object><name>RBC</name><bndbox><xmin>11</xmin><ymin>21</ymin><xmax>110</xmax><ymax>220</ymax></bndbox></object>
</annotation>"""


@pytest.fixture(scope="module")
def s3(test_data: Path) -> Iterator[StandIn]:
    """Two real pictures with a box each, as VOC and as YOLO have them."""
    with pytest.MonkeyPatch.context() as patch, started() as stand_in:
        for name, value in stand_in.environment.items():
            patch.setenv(name, value)
        # The patience for servers in trouble is tested elsewhere; here it would only take its time.
        patch.setattr(storage, "S3_ATTEMPTS", 1)
        for path in sorted((test_data / "bccd/images").iterdir())[:2]:
            storage.write_bytes(f"{BUCKET}/voc/images/{path.name}", path.read_bytes())
            storage.write_bytes(f"{BUCKET}/voc/xml/{path.stem}.xml", XML.format(name=path.name).encode())
            storage.write_bytes(f"{BUCKET}/yolo/images/train/{path.name}", path.read_bytes())
            storage.write_bytes(f"{BUCKET}/yolo/labels/train/{path.stem}.txt", b"1 0.09375 0.25 0.15625 0.41666666\n")
        storage.write_bytes(f"{BUCKET}/yolo/data.yaml", b"train: images/train\nval: images/train\nnames: [a, RBC]\n")
        yield stand_in


def arguments(source: str, out: object, bucket: str = BUCKET) -> list[str]:
    places = {
        "voc": ["--images", f"{bucket}/voc/images", "--annotations", f"{bucket}/voc/xml"],
        "yolo": ["--data", f"{bucket}/yolo/data.yaml"],
    }
    return ["prepare", source, *places[source], "--out", str(out)]


@pytest.mark.parametrize("source", ["voc", "yolo"])
@pytest.mark.timeout(60)
def test_a_table_is_made_of_what_is_in_a_bucket(s3: StandIn, source: str) -> None:
    assert main(arguments(source, f"{BUCKET}/out/{source}")) == 0
    rows = open_table(f"{BUCKET}/out/{source}", "images").read().to_pylist()
    assert len(rows) == 2
    for row in rows:
        assert row["objects"]["bbox"][0] == pytest.approx([10, 20, 100, 200], abs=1e-4)
        assert row["image"]["bytes"][:2] == b"\xff\xd8"


@pytest.mark.parametrize("source", ["voc", "yolo"])
@pytest.mark.parametrize("trouble", ["wrong key", "missing bucket", "server gone"])
@pytest.mark.timeout(60)
def test_what_is_wrong_is_one_line(
    s3: StandIn,
    source: str,
    trouble: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bucket = f"{BUCKET}-that-is-not-there" if trouble == "missing bucket" else BUCKET
    if trouble == "wrong key":
        s3.fail("403", 30)
    elif trouble == "server gone":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    try:
        code = main(arguments(source, tmp_path / "out", bucket))
    finally:
        s3.fail("403", 0)
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1), error
    assert error.startswith("raydet: error: ") and bucket in error and "Traceback" not in error
    words = {"wrong key": "ACCESS_DENIED|403", "missing bucket": "no such", "server gone": "onnect"}
    assert any(word in error for word in words[trouble].split("|")), error
    assert not (tmp_path / "out").exists()


def test_the_stand_in_speaks_for_s3(s3: StandIn) -> None:
    assert isinstance(storage.resolve(BUCKET)[0], pafs.S3FileSystem)
