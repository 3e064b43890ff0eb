"""A small collection is scored in one process, by the same engine and with the same rows as on a cluster."""

import dataclasses
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from raydet import PredictConfig, SelectConfig, UserError, select
from raydet.cli.main import main
from raydet.models.detector import Detections
from raydet.models.geometry import Image, ResizeRule, SizeHW
from raydet.models.loading import build_detector
from raydet.scoring.predict import predict_with
from raydet.tables.layout import MANIFEST_NAME
from raydet.tables.schema import Category
from raydet.tables.table import open_table
from tests.json_output import parse_output
from tests.outcomes import RecordingConsole, assert_same_rows
from tests.small_sets import rows_of

SIDE = 64


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> PredictConfig:
    """A run over 24 images in four files."""
    folder = tmp_path_factory.mktemp("local")
    categories = open_table(str(shapes / "val"), "images").categories
    build_detector("rt_detr_v2_tiny", categories, image_size=SIDE, seed=3).save(str(folder / "checkpoint"))
    return PredictConfig(
        checkpoint=str(folder / "checkpoint"),
        data=str(shapes / "train"),
        out=str(folder / "d"),
        batch_size=3,
        rows_per_file=6,
        threads_per_worker=1,
    )


def resumed(config: PredictConfig, *, in_process: bool) -> list[dict[str, Any]]:
    """Remove half of a finished run, and finish it again."""
    out = Path(config.out)
    (out / MANIFEST_NAME).unlink()
    removed, kept = sorted(out.glob("part-*.parquet"))[::2], sorted(out.glob("part-*.parquet"))[1::2]
    for part in removed:
        part.unlink()
    times = [part.stat().st_mtime_ns for part in kept]
    result = predict_with(config, in_process=in_process)
    assert (result.num_images, result.already_done) == (24, False)
    assert [part.stat().st_mtime_ns for part in kept] == times
    return rows_of(config.out, "detections")


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"flip": True, "merge": "wbf", "tile": SIDE, "tile_overlap": 0.0},
        {"resize_on": "device", "flip": True},
    ],
)
def test_the_rows_are_equal_and_either_place_resumes_the_other_s_run(
    config: PredictConfig, tmp_path: Path, options: dict[str, Any]
) -> None:
    config = dataclasses.replace(config, **options)
    runs = [dataclasses.replace(config, out=str(tmp_path / name)) for name in ("cluster", "here")]
    for in_process, run in enumerate(runs):
        predict_with(run, in_process=bool(in_process))
    rows = rows_of(runs[0].out, "detections")
    assert len(rows) == 24 and all(row["detections"]["score"] for row in rows)
    assert_same_rows(rows_of(runs[1].out, "detections"), rows)
    for in_process, run in enumerate(reversed(runs)):
        assert_same_rows(resumed(run, in_process=bool(in_process)), rows)


def test_ray_is_not_even_imported_and_the_caller_s_threads_stay(config: PredictConfig, tmp_path: Path) -> None:
    script = """
        import sys
        import torch
        torch.set_num_threads(2)
        from raydet import PredictConfig, predict
        checkpoint, data, out = sys.argv[1:]
        result = predict(PredictConfig(checkpoint=checkpoint, data=data, out=out, threads_per_worker=1))
        assert "ray" not in sys.modules and torch.get_num_threads() == 2
        print(result.num_images, "images")
    """
    words = [config.checkpoint or "", config.data_uri, str(tmp_path / "d")]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *words], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "in this process" in done.stdout and "24 images" in done.stdout
    assert not (tmp_path / "d" / "__log").exists()


def test_its_progress_and_result_as_json(
    config: PredictConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--{name}={getattr(config, name)}" for name in ("checkpoint", "data", "batch_size", "rows_per_file")]
    assert main(["predict", *options, f"--out={tmp_path}", "--json"]) == 0
    objects = parse_output(capsys.readouterr().out, "predict")
    progress = [item for item in objects if item["type"] == "progress"][-1]
    assert (progress["task"], progress["completed"], progress["total"]) == ("scoring", 24, 24)
    assert progress["values"]["memory_mb"] > 0 and progress["waiting_for"] is None
    assert objects[-1]["num_images"] == 24


@dataclasses.dataclass
class BrightnessEngine:
    """An engine that reports the mean brightness of an image as the score of its only box."""

    categories: tuple[Category, ...] = (Category(1, "image"),)
    max_detections: int = 1
    resize_rule: ResizeRule = ResizeRule(mode="fixed", size_hw=(SIDE, SIDE))

    def input_size_hw(self, size_hw: SizeHW) -> SizeHW:
        return self.resize_rule.target_size_hw(size_hw)

    def prepare(self, images: Sequence[Image]) -> Any:
        raise AssertionError("decoders resize")

    def prepare_planes(self, planes: Sequence[Image], original_sizes_hw: Sequence[SizeHW]) -> Any:
        assert all(image.shape == (3, SIDE, SIDE) and image.dtype == np.uint8 for image in planes)
        return [(float(image.mean() / 255), size_hw) for image, size_hw in zip(planes, original_sizes_hw, strict=True)]

    def start(self, prepared: Any) -> Callable[[], list[Detections]]:
        return lambda: [
            Detections(np.array([[0.0, 0.0, width, height]]), np.array([score]), np.zeros(1, np.int64))
            for score, (height, width) in prepared
        ]


def load_brightness(config: PredictConfig, *, device: str, num_threads: int) -> BrightnessEngine:
    assert (device, num_threads) == ("cpu", 1)
    return BrightnessEngine()


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("in_process", [True, False])
def test_another_engine_can_take_the_model_s_place(config: PredictConfig, tmp_path: Path, in_process: bool) -> None:
    config = dataclasses.replace(config, out=str(tmp_path / "d"))
    result = predict_with(config, in_process=in_process, load=load_brightness)
    assert result.num_detections == 24
    for row in rows_of(config.out, "detections"):
        assert row["detections"]["bbox"] == [[0.0, 0.0, row["width"], row["height"]]]
        assert 0 < row["detections"]["score"][0] < 1


def test_a_gpu_that_is_missing_and_a_model_that_changes_are_refused(config: PredictConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--use-gpu requires a GPU"):
        predict_with(dataclasses.replace(config, out=str(tmp_path / "gpu"), use_gpu=True), in_process=True)

    def broken(config: PredictConfig, *, device: str, num_threads: int) -> BrightnessEngine:
        raise UserError("no such model")

    with pytest.raises(UserError, match="no such model"):
        predict_with(dataclasses.replace(config, out=str(tmp_path / "d")), in_process=True, load=broken)


def save_pictures(folder: Path) -> Path:
    """Save four pictures in a subfolder."""
    pictures = folder / "pictures"
    pictures.mkdir()
    for number in range(4):
        PIL.Image.new("RGB", (SIDE, SIDE), (50 * number + 9, 0, 0)).save(pictures / f"{number}.png")
    return pictures


def test_sql_finds_only_rows_of_the_table_and_a_run_of_an_earlier_version_resumes(
    config: PredictConfig, tmp_path: Path
) -> None:
    pictures, out = save_pictures(tmp_path), tmp_path / "d"
    config = dataclasses.replace(config, data=str(pictures), out=str(out), batch_size=2, rows_per_file=2)
    assert predict_with(config, in_process=True, load=load_brightness).num_images == 4
    duckdb = pytest.importorskip("duckdb")
    count = f"SELECT count(*), sum(len(detections.score)) FROM '{out}/*.parquet'"
    assert duckdb.sql(count).fetchall() == [(4, 4)]
    (out / ".inputs").rename(out / ".inputs.parquet")
    for name in (MANIFEST_NAME, "part-0000001.parquet"):
        (out / name).unlink()
    PIL.Image.new("RGB", (SIDE, SIDE), "red").save(pictures / "0a.png")
    console = RecordingConsole()
    assert predict_with(config, console=console, in_process=True, load=load_brightness).num_images == 4
    assert "resuming at 2 of 4 images" in console.lines and not (out / ".inputs").exists()


def test_select_lists_files_that_predict_finds_from_anywhere(config: PredictConfig, tmp_path: Path) -> None:
    pictures, listed = save_pictures(tmp_path), tmp_path / "list.txt"
    listed.write_text("".join(f"pictures/{number}.png\n" for number in range(4)))
    for data in (pictures, listed):
        out, chosen = tmp_path / f"scored {data.name}", tmp_path / f"chosen {data.name}"
        predict_with(dataclasses.replace(config, data=str(data), out=str(out)), in_process=True, load=load_brightness)
        found = select(SelectConfig(detections=str(out), by=["uncertainty"], num=2, out=str(chosen)))
        files = Path(found.list_file).read_text().splitlines()
        assert len(files) == 2 and {Path(file) for file in files} < set(pictures.iterdir())
