"""Other tools open what raydet exports, each in a virtual environment of its own.

A test is skipped where its tool cannot be installed.
"""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from raydet.config import ExportCocoConfig, ExportCvatConfig, ExportLabelStudioConfig, PrepareCocoConfig
from raydet.exports.coco import export_coco
from raydet.exports.cvat import export_cvat
from raydet.exports.label_studio import export_label_studio
from raydet.preparation.prepare import prepare_coco
from raydet.tables.table import open_table
from tests.small_sets import rows_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Exported:
    """Exports of one real table with crowds, and what a tool should find in them."""

    def __init__(self, test_data: Path, folder: Path) -> None:
        self.folder = folder
        source, table = test_data / "coco_mini", str(folder / "table")
        annotations, images = str(source / "instances_val.json"), str(source / "val")
        prepare_coco(PrepareCocoConfig(annotations=annotations, images=images, out=table))
        (folder / "coco" / "annotations").mkdir(parents=True)
        shutil.copytree(images, folder / "coco" / "images" / "val")
        export_coco(ExportCocoConfig(data=table, out=f"{folder}/coco/annotations/instances_val.json"))
        export_cvat(ExportCvatConfig(data=table, out=f"{folder}/cvat"))
        export_label_studio(ExportLabelStudioConfig(data=table, out=f"{folder}/label-studio"))
        names = [category.name for category in open_table(table, "images").categories]
        rows = rows_of(table)
        self.boxes = {
            Path(row["image"]["path"]).stem: Counter(
                (names[category], *(round(side, 2) for side in box))
                for category, box in zip(row["objects"]["category"], row["objects"]["bbox"], strict=True)
            )
            for row in rows
        }
        self.num_crowds = sum(sum(row["objects"]["iscrowd"]) for row in rows)

    def is_found(self, boxes: dict[str, list[list[Any]]]) -> bool:
        """Return True if a tool has found all boxes: (class name, left, top, width, height) by image."""
        found = {
            Path(path).stem: Counter((name, *(round(side, 2) for side in sides)) for name, *sides in items)
            for path, items in boxes.items()
        }
        return found == self.boxes


@pytest.fixture(scope="module")
def exported(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(test_data, tmp_path_factory.mktemp("exported"))


def run_with(package: str, script: str, folder: Path, exported: Exported) -> Any:
    """Run a script in a new virtual environment with a package, and return the JSON that it prints last."""
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True, timeout=120)
    python = str(folder / "venv" / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--only-binary=:all:", package]
    done = subprocess.run(install, capture_output=True, text=True, timeout=400, check=False)
    if done.returncode:
        pytest.skip(f"{package} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, "-c", f"import json\n{script}"]
    done = subprocess.run(
        command, cwd=exported.folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_datumaro_opens_coco_and_cvat(exported: Exported, tmp_path: Path) -> None:
    script = """
import datumaro
result = {}
for folder, format in (("coco", "coco_instances"), ("cvat", "cvat")):
    data = datumaro.Dataset.import_from(folder, format)
    names = [label.name for label in data.categories()[datumaro.AnnotationType.label].items]
    boxes = {item.id: [[names[box.label], *box.get_bbox()] for box in item.annotations] for item in data}
    crowds = sum(bool(box.attributes["is_crowd"]) for item in data for box in item.annotations)
    result[folder] = [boxes, crowds]
print(json.dumps(result))
"""
    for boxes, num_crowds in run_with("datumaro", script, tmp_path, exported).values():
        assert exported.is_found(boxes) and num_crowds == exported.num_crowds > 0


def test_supervision_opens_coco(exported: Exported, tmp_path: Path) -> None:
    script = """
import supervision
data = supervision.DetectionDataset.from_coco("coco/images/val", "coco/annotations/instances_val.json")
boxes = {
    path: [[data.classes[label], x, y, right - x, bottom - y] for label, (x, y, right, bottom) in
           zip(found.class_id.tolist() if len(found) else [], found.xyxy.tolist())]
    for path, found in data.annotations.items()
}
print(json.dumps(boxes))
"""
    boxes = run_with("supervision", script, tmp_path, exported)
    assert {Path(path).stem: len(items) for path, items in boxes.items()} == {
        stem: items.total() for stem, items in exported.boxes.items()
    }
    assert exported.is_found(boxes)


def test_label_studio_accepts_and_converts_its_tasks(exported: Exported, tmp_path: Path) -> None:
    script = """
from label_studio_sdk.converter import Converter
from label_studio_sdk.label_interface import LabelInterface
config = open("label-studio/label_config.xml").read()
tasks = json.load(open("label-studio/tasks.json"))
interface = LabelInterface(config)
interface.validate()
assert all(interface.validate_annotation(item) for task in tasks for item in task["annotations"])
converter = Converter(config=config, project_dir="label-studio", download_resources=False)
converter.convert_to_coco("label-studio/tasks.json", "converted", output_image_dir="converted/images", is_dir=False)
coco = json.load(open("converted/result.json"))
names = {category["id"]: category["name"] for category in coco["categories"]}
boxes = {image["file_name"]: [] for image in coco["images"]}
paths = {image["id"]: image["file_name"] for image in coco["images"]}
for item in coco["annotations"]:
    boxes[paths[item["image_id"]]].append([names[item["category_id"]], *item["bbox"]])
print(json.dumps(boxes))
"""
    assert exported.is_found(run_with("label-studio-sdk", script, tmp_path, exported))
