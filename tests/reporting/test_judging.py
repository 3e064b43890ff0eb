"""The report judges the same detections that the evaluation measured."""

from pathlib import Path

from raydet.measuring.evaluate import evaluate
from raydet.reporting.judging import judge
from raydet.reporting.run_tables import read_run
from tests.measuring.test_joining import NUM_IMAGES, config, renumbered


def test_detections_that_were_joined_by_path_are_judged_by_path(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    evaluate(config(tmp_path / "same", out=out, run="id"))
    evaluate(config(tmp_path / "renumbered", renumbered, out=out, run="path", join="path"))
    by_id, by_path = (judge(read_run(out, run), range(NUM_IMAGES)) for run in ("id", "path"))
    for image_id in range(NUM_IMAGES):
        assert len(by_id[image_id].detections) == 1
        assert by_path[image_id].detections == by_id[image_id].detections
        assert by_path[image_id].is_missed.tolist() == by_id[image_id].is_missed.tolist()
