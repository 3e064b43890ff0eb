"""A video is scored frame by frame: one row a frame, whatever dies, in one process and on a cluster."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raydet import BrowseConfig, ExportYoloConfig, PredictConfig, UserError, export_yolo, predict
from raydet.browsing.pictures import Pictures
from raydet.browsing.sources import open_sources
from raydet.cli.main import main
from raydet.images.collection import VideoCollection
from raydet.models.loading import build_detector
from raydet.scoring.predict import predict_with
from raydet.tables.schema import Category
from raydet.tables.table import open_table
from tests.drivers import command_of, started, wait_for_progress
from tests.outcomes import assert_same_rows
from tests.small_sets import rows_of
from tests.videos import frames_in_sequence, write_video

NUM_FRAMES = 60


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PredictConfig:
    """A run over a video with B-frames, in files that begin inside groups of frames."""
    folder = tmp_path_factory.mktemp("video")
    times_ms = np.cumsum(np.random.default_rng(0).integers(10, 70, NUM_FRAMES)).tolist()
    write_video(folder / "movie.mp4", NUM_FRAMES, times_ms=[0, *times_ms[:-1]], group=16)
    categories = [Category(1, "square")]
    build_detector("rt_detr_v2_tiny", categories, image_size=64, seed=3).save(str(folder / "checkpoint"))
    return PredictConfig(
        checkpoint=str(folder / "checkpoint"),
        data=str(folder / "movie.mp4"),
        out=str(folder / "d"),
        batch_size=2,
        rows_per_file=6,
        threads_per_worker=1,
    )


@pytest.fixture(scope="module")
def rows(config: PredictConfig) -> list[dict[str, Any]]:
    predict_with(config, in_process=True)
    return rows_of(config.out, "detections")


def test_there_is_one_row_a_frame(config: PredictConfig, rows: list[dict[str, Any]]) -> None:
    assert [row["frame"] for row in rows] == list(range(NUM_FRAMES))
    assert [row["path"] for row in rows[:2]] == ["movie.mp4/frame_000000", "movie.mp4/frame_000001"]
    assert rows[0]["time_s"] == 0 and (np.diff([row["time_s"] for row in rows]) > 0.009).all()
    assert {(row["height"], row["width"], row["error"]) for row in rows} == {(64, 96, None)}
    schema = open_table(config.out, "detections").schema
    assert [str(schema.field(name).type) for name in ("frame", "time_s")] == ["int64", "double"]
    assert all(row["detections"]["score"] for row in rows)


def test_its_frames_are_scored_as_pictures_are(
    config: PredictConfig, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    from PIL import Image

    for number, pixels in enumerate(frames_in_sequence(Path(config.data_uri))):
        (tmp_path / "frames").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "frames" / f"{number:06d}.png")
    pictures = dataclasses.replace(config, data=str(tmp_path / "frames"), out=str(tmp_path / "d"))
    predict_with(pictures, in_process=True)
    found = rows_of(pictures.out, "detections")
    assert [row["detections"] for row in found] == [row["detections"] for row in rows]


@pytest.mark.parametrize("fps", [2.0, 7.5])
def test_fps_chooses_frames(config: PredictConfig, rows: list[dict[str, Any]], tmp_path: Path, fps: float) -> None:
    config = dataclasses.replace(config, fps=fps, out=str(tmp_path / "d"), keep=["class_scores"])
    assert predict_with(config, in_process=True).num_images == len(rows_of(config.out, "detections"))
    for row in rows_of(config.out, "detections"):
        same = rows[row["frame"]]
        assert [row[name] for name in ("path", "time_s")] == [same[name] for name in ("path", "time_s")]
        # Batches hold other frames, which changes the last bits.
        np.testing.assert_allclose(row["detections"]["score"], same["detections"]["score"], atol=1e-5)
    with pytest.raises(UserError, match="--fps"):
        predict_with(dataclasses.replace(config, fps=fps + 1), in_process=True)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_cluster_finds_the_same(config: PredictConfig, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    config = dataclasses.replace(config, out=str(tmp_path / "d"))
    predict_with(config, in_process=False)
    assert_same_rows(rows_of(config.out, "detections"), rows)


@pytest.mark.slow
def test_a_killed_run_resumes(config: PredictConfig, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    config = dataclasses.replace(config, out=str(tmp_path / "d"))
    output = tmp_path / "output"

    def parts() -> list[Path]:
        return sorted(Path(config.out).glob("part-*.parquet"))

    for least in (1, 4, 7):
        with started(command_of("predict", config), output) as driver:
            wait_for_progress(lambda least=least: len(parts()) >= least, driver, output)  # type: ignore[misc]
        assert len(parts()) < NUM_FRAMES / 6, "killed too late to tell"
    done = {part: part.stat().st_mtime_ns for part in parts()}
    predict(config)
    assert {part: part.stat().st_mtime_ns for part in done} == done, "work was done again"
    assert_same_rows(rows_of(config.out, "detections"), rows)


@pytest.mark.slow
def test_the_page_shows_the_frames_that_were_scored(config: PredictConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, fps=4, out=str(tmp_path / "d"), draw=2)
    predict_with(config, in_process=True)
    assert len(list((tmp_path / "d" / "__drawn").glob("*-frame_*.jpg"))) == 2
    sources = open_sources(BrowseConfig(data=config.out))
    assert isinstance(sources.collection, VideoCollection) and not sources.notes
    assert sources.collection.num_rows == len(rows_of(config.out, "detections"))
    assert Pictures(sources).thumbnail(3).startswith(b"\xff\xd8")
    with pytest.raises(UserError, match="other frames than were scored"):
        open_sources(BrowseConfig(data=config.out, images=config.data_uri))


def test_label_files_have_names_of_their_own(config: PredictConfig, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    export_yolo(ExportYoloConfig(data=config.out, out=str(tmp_path / "yolo")))
    assert len(list((tmp_path / "yolo").rglob("frame_*.txt"))) == len(rows)


def test_a_broken_video_ends_the_command_with_one_line(
    config: PredictConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.mp4"
    path.write_bytes(Path(config.data_uri).read_bytes()[:1000])
    out = tmp_path / "d"
    command = ["predict", f"--checkpoint={config.checkpoint}", f"--data={path}", f"--out={out}"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert f"cannot read the video {path}: broken or truncated" in error and "Traceback" not in error
    assert not out.exists()
    assert main([*command[:2], "--data=photo.jpg", "--fps=2"]) == 2
    assert "--fps cannot be combined with pictures" in capsys.readouterr().err
