"""`predict` of single pictures: the boxes of the job, a table, a drawing, and what is refused."""

import functools
import http.server
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import raydet
from raydet import PredictConfig, UserError
from raydet.cli.main import main
from raydet.common.console import counted
from raydet.scoring.pictures import pictures_in
from tests.engines.test_engines import pictures, tiny
from tests.small_sets import rows_of


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny("rt_detr_v2_tiny", tmp_path_factory.mktemp("model")))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with two pictures in `photos`."""
    (tmp_path / "photos").mkdir()
    for name, pixels in zip(("a.jpg", "b.png"), pictures([(120, 160), (90, 70)]), strict=True):
        Image.fromarray(pixels).save(tmp_path / "photos" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(["predict", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("options", [{"score_threshold": 0.0}, {"flip": True, "tile": 64, "top_k": 7, "batch_size": 1}])
def test_the_boxes_are_those_of_the_job(checkpoint: str, folder: Path, options: dict[str, Any]) -> None:
    options = {"score_threshold": 0.1, **options}
    raydet.predict(PredictConfig(checkpoint=checkpoint, data="photos", out="table", **options))
    rows = {Path(row["path"]).name: row["detections"] for row in rows_of("table", "detections")}
    result = raydet.predict(PredictConfig(checkpoint=checkpoint, data=["photos/a.jpg", "photos/b.png"], **options))
    assert (result.num_images, result.num_errors) == (2, 0)
    for picture in result.pictures:
        expected = rows[Path(picture.name).name]
        assert picture.scores == expected["score"] and picture.scores
        assert picture.boxes_xywh == expected["bbox"]
        assert picture.class_names == [("cat", "dog", "toothbrush")[index] for index in expected["category"]]


def test_the_command_prints_a_table_and_draws(
    checkpoint: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (folder / "photos" / "a.jpg").read_bytes()
    words = ["--checkpoint", checkpoint, "--data", "photos/a.jpg"]
    code, out, err = run(words, capsys)
    assert (code, err) == (0, "")
    title, header, *rows, drawn = out.splitlines()
    assert title == f"photos/a.jpg: {counted(len(rows), 'object')} in 160 × 120 pixels"
    assert header.split() == ["class", "score", "x", "y", "width", "height"]
    assert all(float(row.split()[1]) > 0.3 for row in rows) and rows
    assert drawn == "drawn: a.detections.jpg"
    with Image.open("a.detections.jpg") as picture:
        assert picture.size == (160, 120)
        with Image.open("photos/a.jpg") as source:
            assert (np.asarray(picture) != np.asarray(source)).any()
    assert run(words, capsys)[1].endswith("drawn: a.detections.jpg (replaces an earlier one)\n")
    assert (folder / "photos" / "a.jpg").read_bytes() == before
    code, out, _ = run([*words, "--score-threshold", "0.999"], capsys)
    assert (code, out.splitlines()[0]) == (0, "photos/a.jpg: 0 objects in 160 × 120 pixels")
    assert sorted(path.name for path in folder.iterdir()) == ["a.detections.jpg", "photos"]


def test_out_is_a_file_or_a_folder(checkpoint: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--checkpoint", checkpoint, "--data", "photos/a.jpg"]
    assert run([*words, "--out", "new/drawn.png"], capsys)[1].endswith("drawn: new/drawn.png\n")
    with Image.open("new/drawn.png") as picture:
        assert picture.format == "PNG"
    (folder / "other").mkdir()
    Image.fromarray(pictures([(50, 60)])[0]).save("other/a.jpg")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8no picture")
    code, out, _ = run([*words, "photos/b.png", "other/a.jpg", "broken.jpg", "--out", "drawn"], capsys)
    assert code == 0 and "  unreadable, broken.jpg: " in out
    assert sorted(path.name for path in (folder / "drawn").iterdir()) == [
        "a.detections-2.jpg",
        "a.detections.jpg",
        "b.detections.png",
    ]


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        (["photos/a.jpg", "--out", "photos/a.jpg"], ("would overwrite", "photos/a.jpg", "--out")),
        (["photos/a.jpg", "--out", "link.jpg"], ("would overwrite", "link.jpg")),
        (["photos/a.jpg", "photos/b.png", "--out", "x.jpg"], ("one file for 2 pictures",)),
        (["photos/a.jpg", "--out", "x.gif"], (".jpg, .jpeg, .png, .webp", "x.gif")),
        (["photos/a.jpg", "--limit", "3", "--num-workers", "2"], ("--num-workers, --limit", "pictures")),
        (["photos/a.jpg", "--draw-threshold", "0.5"], ("--draw-threshold", "use --score-threshold")),
        (["photos/a.jpg", "--batch-size", "auto"], ("--batch-size auto",)),
        (["photos/a.jpg", "photos"], ("photos is not an image file",)),
        (["absent.jpg"], ("no such file: absent.jpg",)),
        (["photos/a.jpg", "photos/*.jpg"], ("no such file: photos/*.jpg",)),
        (["broken.jpg"], ("broken.jpg",)),
        (["broken.jpg", "link.png"], ("none of the 2 pictures", "broken.jpg")),
        (["photos"], ("--out",)),
    ],
)
def test_what_makes_no_sense_is_one_line(
    checkpoint: str, words: list[str], facts: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "broken.jpg").write_bytes(b"\xff\xd8no picture")
    (folder / "link.jpg").symlink_to("photos/a.jpg")
    (folder / "link.png").symlink_to("broken.jpg")
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    code, out, err = run(["--checkpoint", checkpoint, "--data", *words], capsys)
    assert (code, out) == (2, "")
    assert err.startswith("raydet: error: ") and err.count("\n") == 1
    assert all(fact in err for fact in facts), err
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before


def test_a_web_address(checkpoint: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    serve = functools.partial(Quiet, directory=folder / "photos")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/a.jpg?size=1"
        code, out, _ = run(["--checkpoint", checkpoint, "--data", address], capsys)
        server.shutdown()
    assert code == 0 and out.endswith("drawn: a.detections.jpg\n")


def test_what_counts_as_a_picture(folder: Path) -> None:
    (folder / "folder.jpg").mkdir()
    for data in ("photos", "folder.jpg", "list.txt", "shards.tar", "s3-table", ["photos"]):
        assert pictures_in(data) is None
    for data in ("a.jpg", "A.JPEG", "https://host/image?id=3", ["a.jpg", "b.png"]):
        assert pictures_in(data) == ([data] if isinstance(data, str) else data)
    assert pictures_in(["a.jpg", "a.jpg"]) == ["a.jpg"]
    with pytest.raises(UserError, match="several places"):
        pictures_in(["a.jpg", "list.txt"])


def test_ray_and_what_trains_are_not_imported(checkpoint: str, folder: Path) -> None:
    script = """
        import sys
        from raydet.cli.main import main
        assert main(["predict", "--checkpoint", sys.argv[1], "--data", "photos/a.jpg"]) == 0
        needless = {"ray", "albumentations", "datasets", "torchmetrics", "pandas", "plotly"} & set(sys.modules)
        assert not needless, needless
    """
    command = [sys.executable, "-c", textwrap.dedent(script), checkpoint]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
