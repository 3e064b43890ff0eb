"""A folder that holds the images of a data set elsewhere is refused, and the folder that was meant is named."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raydet.common.errors import UserError
from raydet.config import PrepareCocoConfig, PrepareCsvConfig
from raydet.preparation.prepare import prepare_coco, prepare_csv
from raydet.preparation.report import PrepareReport


def prepare(folder: Path, names: list[str], images: str) -> PrepareReport:
    content = {
        "images": [{"id": number, "file_name": name} for number, name in enumerate(names)],
        "annotations": [],
        "categories": [{"id": 1, "name": "dog"}],
    }
    (folder / "instances.json").write_text(json.dumps(content))
    paths = {"annotations": str(folder / "instances.json"), "images": str(folder / images), "out": str(folder / "out")}
    return prepare_coco(PrepareCocoConfig(**paths))  # type: ignore[arg-type]


def save(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)


@pytest.mark.parametrize(
    ("names", "images", "words"),
    [
        (["a.jpg", "b.jpg"], "data", r"did you mean --images .*/data/train\?"),
        (["train/a.jpg"], "data/train", r"begin with train/, so --images must name the folder that holds train/"),
        (["pictures/a.jpg"], "data", r"/data/train holds its file; .* begin with pictures/"),
        (["a.jpg"], "labels", r"none of the 1 images can be used \(no such file: 1\)"),
        (["z.jpg"], "data", r"none of the 1 images can be used \(no such file: 1\)"),
    ],
)
def test_another_folder_is_refused_with_the_one_that_was_meant(
    tmp_path: Path, names: list[str], images: str, words: str
) -> None:
    save(tmp_path / "data" / "train" / "a.jpg", tmp_path / "data" / "train" / "b.jpg")
    (tmp_path / "labels").mkdir()
    with pytest.raises(UserError, match=words) as caught:
        prepare(tmp_path, names, images)
    assert "\n" not in str(caught.value)


def test_a_part_of_the_images_is_enough(tmp_path: Path) -> None:
    save(tmp_path / "data" / "c.jpg", tmp_path / "data" / "old" / "a.jpg")
    report = prepare(tmp_path, ["a.jpg", "b.jpg", "c.jpg"], "data")
    assert (report.accepted, report.reasons) == (1, {"no such file": 2})
    # A few are named, so that nobody has to open the table.
    assert report.rejected_paths == {"a.jpg": "no such file", "b.jpg": "no such file"}
    assert report.lines()[1:3] == ["  rejected, a.jpg: no such file", "  rejected, b.jpg: no such file"]
    again = prepare(tmp_path, ["a.jpg", "b.jpg", "c.jpg"], "data")
    assert again.already_done and again.lines()[:3] == report.lines()[:3]


def test_many_rejected_images_are_counted(tmp_path: Path) -> None:
    save(tmp_path / "data" / "z.jpg")
    report = prepare(tmp_path, [*(f"{number}.jpg" for number in range(11)), "z.jpg"], "data")
    assert not report.rejected_paths and report.lines()[1] == "  rejected, no such file: 11"


def test_the_parent_of_the_images_of_a_csv_file_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "data" / "train" / "a.jpg")
    (tmp_path / "a.csv").write_text("a.jpg,1,1,5,5,dog\n")
    paths = {"annotations": str(tmp_path / "a.csv"), "images": str(tmp_path / "data"), "out": str(tmp_path / "out")}
    with pytest.raises(UserError, match=r"did you mean --images .*/data/train\?"):
        prepare_csv(PrepareCsvConfig(**paths))  # type: ignore[arg-type]
