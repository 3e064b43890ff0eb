"""Other tools open what raydet exports, and raydet reads what they write, each in a virtual environment of its own.

A test is skipped where its tool cannot be installed.
"""

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raydet.config import (
    ExportCocoConfig,
    ExportCvatConfig,
    ExportLabelStudioConfig,
    PrepareCocoConfig,
    PrepareCvatConfig,
    PrepareLabelStudioConfig,
)
from raydet.exports.coco import export_coco
from raydet.exports.cvat import export_cvat
from raydet.exports.label_studio import export_label_studio
from raydet.preparation.prepare import prepare_coco, prepare_cvat, prepare_label_studio
from raydet.tables.table import open_table
from tests.environments import run_with
from tests.small_sets import rows_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
DATA = {"bccd": "images", "coco_mini": "val"}
"""Real data sets, and the folders of their images; the second has crowds."""
PREFIX = f"from pathlib import Path\nsets = {sorted(DATA)!r}\n"


class Exported:
    """Exports of one real table, and what a tool should find in them."""

    def __init__(self, source: Path, images: Path, folder: Path) -> None:
        self.folder, self.images, self.table = folder, images, str(folder / "table")
        annotations = str(source / "instances_val.json")
        prepare_coco(PrepareCocoConfig(annotations=annotations, images=str(images), out=self.table))
        self.rows = {Path(row["image"]["path"]).stem: row for row in rows_of(self.table)}
        (folder / "coco" / "annotations").mkdir(parents=True)
        (folder / "coco" / "images" / "val").mkdir(parents=True)
        for row in self.rows.values():
            (folder / "coco" / "images" / "val" / row["image"]["path"]).write_bytes(row["image"]["bytes"])
        export_coco(ExportCocoConfig(data=self.table, out=f"{folder}/coco/annotations/instances_val.json"))
        export_cvat(ExportCvatConfig(data=self.table, out=f"{folder}/cvat"))
        export_label_studio(ExportLabelStudioConfig(data=self.table, out=f"{folder}/label-studio"))
        self.num_crowds = sum(sum(row["objects"]["iscrowd"]) for row in self.rows.values())

    def boxes(self) -> dict[str, Counter[tuple[Any, ...]]]:
        """Return class name, left, top, width and height of all boxes by image, to a hundredth of a pixel."""
        names = [category.name for category in open_table(self.table, "images").categories]
        return {
            stem: Counter(
                (names[category], *(round(side, 2) for side in box))
                for category, box in zip(row["objects"]["category"], row["objects"]["bbox"], strict=True)
            )
            for stem, row in self.rows.items()
        }

    def is_found(self, boxes: dict[str, list[list[Any]]]) -> bool:
        """Return True if a tool has found all boxes: (class name, left, top, width, height) by image."""
        found = {
            Path(path).stem: Counter((name, *(round(side, 2) for side in sides)) for name, *sides in items)
            for path, items in boxes.items()
        }
        return found == self.boxes()

    def assert_comes_back(self, table: str, *, keeps: Collection[str], atol: float = 1e-6) -> None:
        """Compare a table that was read from a tool's file with the original one.

        Args:
            table: URI of the table.
            keeps: What the tool keeps, beside names and boxes: "image_id", "id" (of boxes), "iscrowd".
            atol: Largest difference of a coordinate in pixels.
        """
        first, second = (
            [category.name for category in open_table(uri, "images").categories] for uri in (self.table, table)
        )
        rows = {Path(row["image"]["path"]).stem: row for row in rows_of(table)}
        assert rows.keys() == self.rows.keys()
        for stem, mine in self.rows.items():
            other = rows[stem]
            assert mine["image"]["bytes"] == other["image"]["bytes"]
            assert "image_id" not in keeps or mine["image_id"] == other["image_id"]
            ours, theirs = mine["objects"], other["objects"]
            assert [first[index] for index in ours["category"]] == [second[index] for index in theirs["category"]]
            for key in {"id", "iscrowd"} & set(keeps):
                assert ours[key] == theirs[key]
            boxes, others = (np.reshape(objects["bbox"], (-1, 4)) for objects in (ours, theirs))
            np.testing.assert_allclose(boxes, others, rtol=0, atol=atol)

    def read_coco(self, name: str) -> str:
        """Return the table of a COCO file below the folder."""
        out = f"{self.folder}/from-{Path(name).parts[0]}"
        annotations = str(self.folder / name)
        prepare_coco(PrepareCocoConfig(annotations=annotations, images=str(self.images), out=out))
        return out


@pytest.fixture(scope="module")
def exported(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    root = tmp_path_factory.mktemp("exported")
    return {name: Exported(test_data / name, test_data / name / images, root / name) for name, images in DATA.items()}


def run(package: str, script: str, folder: Path, exported: dict[str, Exported], **options: Any) -> Any:
    """Run a script in the folder above those of the data sets, whose names are `sets`."""
    root = next(iter(exported.values())).folder.parent
    return run_with(package, PREFIX + script, folder, cwd=root, **options)


def test_datumaro(exported: dict[str, Exported], tmp_path: Path) -> None:
    script = """
import datumaro
result = {}
for name in sets:
    for folder, format in (("coco", "coco_instances"), ("cvat", "cvat")):
        data = datumaro.Dataset.import_from(f"{name}/{folder}", format)
        names = [label.name for label in data.categories()[datumaro.AnnotationType.label].items]
        boxes = {item.id: [[names[box.label], *box.get_bbox()] for box in item.annotations] for item in data}
        crowds = sum(bool(box.attributes["is_crowd"]) for item in data for box in item.annotations)
        result.setdefault(name, []).append([boxes, crowds])
        data.export(f"{name}/datumaro-{folder}", format, save_media=False)
print(json.dumps(result))
"""
    for name, results in run("datumaro", script, tmp_path, exported).items():
        own = exported[name]
        assert len(results) == 2 and all(own.is_found(boxes) and crowds == own.num_crowds for boxes, crowds in results)
        # Datumaro rounds coordinates to a hundredth of a pixel, and its COCO files mark only masks as crowds.
        table = own.read_coco("datumaro-coco/annotations/instances_val.json")
        own.assert_comes_back(table, keeps=("image_id", "id"), atol=0.02)
        (annotations,) = (own.folder / "datumaro-cvat").glob("*.xml")
        out = f"{own.folder}/from-datumaro-cvat"
        prepare_cvat(PrepareCvatConfig(annotations=str(annotations), images=str(own.images), out=out))
        own.assert_comes_back(out, keeps=("iscrowd",), atol=0.02)


def test_supervision(exported: dict[str, Exported], tmp_path: Path) -> None:
    script = """
import supervision
result = {}
for name in sets:
    images = f"{name}/coco/images/val"
    data = supervision.DetectionDataset.from_coco(images, f"{name}/coco/annotations/instances_val.json")
    result[name] = {
        path: [[data.classes[label], x, y, right - x, bottom - y] for label, (x, y, right, bottom) in
               zip(found.class_id.tolist() if len(found) else [], found.xyxy.tolist())]
        for path, found in data.annotations.items()
    }
    data.as_coco(annotations_path=f"{name}/supervision/instances.json")
print(json.dumps(result))
"""
    for name, boxes in run("supervision", script, tmp_path, exported).items():
        own = exported[name]
        assert own.is_found(boxes)
        # It keeps neither ids nor crowds, and stores corners.
        own.assert_comes_back(own.read_coco("supervision/instances.json"), keeps=(), atol=1e-3)


def test_label_studio(exported: dict[str, Exported], tmp_path: Path) -> None:
    script = """
from label_studio_sdk.converter import Converter
from label_studio_sdk.label_interface import LabelInterface
result = {}
for name in sets:
    folder = f"{name}/label-studio"
    config = open(f"{folder}/label_config.xml").read()
    tasks = json.load(open(f"{folder}/tasks.json"))
    interface = LabelInterface(config)
    interface.validate()
    assert all(interface.validate_annotation(item) for task in tasks for item in task["annotations"])
    converter = Converter(config=config, project_dir=folder, download_resources=False)
    out = f"{name}/label-studio-coco"
    converter.convert_to_coco(f"{folder}/tasks.json", out, output_image_dir=f"{out}/images", is_dir=False)
    coco = json.load(open(f"{out}/result.json"))
    names = {category["id"]: category["name"] for category in coco["categories"]}
    boxes = {image["file_name"]: [] for image in coco["images"]}
    paths = {image["id"]: image["file_name"] for image in coco["images"]}
    for item in coco["annotations"]:
        boxes[paths[item["image_id"]]].append([names[item["category_id"]], *item["bbox"]])
    result[name] = boxes
print(json.dumps(result))
"""
    for name, boxes in run("label-studio-sdk", script, tmp_path, exported).items():
        own = exported[name]
        assert own.is_found(boxes)
        files, out = own.folder / "label-studio", f"{own.folder}/from-label-studio"
        prepare_label_studio(
            PrepareLabelStudioConfig(
                annotations=str(files / "tasks.json"),
                images=str(own.images),
                classes=[str(files / "classes.txt")],
                out=out,
            )
        )
        own.assert_comes_back(out, keeps=("image_id", "id", "iscrowd"))


def test_fiftyone(exported: dict[str, Exported], tmp_path: Path) -> None:
    """FiftyOne's data sets need a MongoDB server, which its package downloads; its COCO reader and writer do not."""
    script = """
from fiftyone.utils.coco import COCODetectionDatasetExporter, COCODetectionDatasetImporter
result = {}
for name in sets:
    importer = COCODetectionDatasetImporter(
        data_path=f"{name}/coco/images/val", labels_path=f"{name}/coco/annotations/instances_val.json",
        label_types="detections", include_id=True, include_annotation_id=True,
    )
    with importer:
        samples, info = list(importer), importer.get_dataset_info()

    class Collection:
        def __init__(self):
            self.info = info
        def values(self, names):
            return [[path for path, _, _ in samples], [label["coco_id"] for _, _, label in samples]]

    exporter = COCODetectionDatasetExporter(
        data_path=f"{name}/fiftyone/data", labels_path=f"{name}/fiftyone/labels.json", export_media=False,
        coco_id="coco_id", annotation_id="coco_id", categories=info["categories"],
    )
    boxes, crowds = {}, 0
    with exporter:
        exporter.log_collection(Collection())
        for path, metadata, label in samples:
            found = label.get("detections")
            exporter.export_sample(path, found, metadata)
            size = [metadata.width, metadata.height] * 2
            objects = found.detections if found else []
            boxes[path] = [
                [item.label, *(side * whole for side, whole in zip(item.bounding_box, size))] for item in objects
            ]
            crowds += sum(item["iscrowd"] for item in objects)
    result[name] = [boxes, crowds]
print(json.dumps(result))
"""
    variables = {"HOME": str(tmp_path), "FIFTYONE_DO_NOT_TRACK": "true"}
    for name, (boxes, crowds) in run("fiftyone", script, tmp_path, exported, **variables).items():
        own = exported[name]
        assert own.is_found(boxes) and crowds == own.num_crowds
        own.assert_comes_back(own.read_coco("fiftyone/labels.json"), keeps=("image_id", "id", "iscrowd"))


def test_cvat_accepts_the_labels_of_a_task(exported: dict[str, Exported], tmp_path: Path) -> None:
    """Only CVAT's server reads its XML; its SDK checks the labels of a new task."""
    script = """
from cvat_sdk.api_client.models import AttributeRequest, InputTypeEnum, PatchedLabelRequest
result = {}
for name in sets:
    labels = [
        PatchedLabelRequest(
            name=label["name"],
            attributes=[
                AttributeRequest(**{**item, "input_type": InputTypeEnum(item["input_type"]), "default_value": ""})
                for item in label["attributes"]
            ],
        )
        for label in json.load(open(f"{name}/cvat/labels.json"))
    ]
    result[name] = [label.name for label in labels]
print(json.dumps(result))
"""
    for name, names in run("cvat-sdk", script, tmp_path, exported).items():
        assert names == [category.name for category in open_table(exported[name].table, "images").categories]


def test_crowds_are_among_the_data(exported: dict[str, Exported]) -> None:
    assert exported["coco_mini"].num_crowds > 0
