"""Good data sets, tables and models, which the cases copy and damage."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from raydet.cli.main import main
from raydet.tables.schema import IMAGE_TYPE, Category, build_schema
from raydet.tables.table import TableWriter
from tests.hostile import pictures, tiffs

WIDTH, HEIGHT = 40, 30
CLASSES = ("cat", "dog")
IMAGES = ("a.png", "b.png")


def picture(path: Path, seed: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    """Write noise, which is the same for the same seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def coco() -> dict[str, Any]:
    """Return the content of a COCO instances file of both images."""
    return {
        "info": {"description": "two images"},
        "images": [
            {"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT}
            for number, name in enumerate(IMAGES, start=1)
        ],
        "annotations": [
            {
                "id": number,
                "image_id": number,
                "category_id": number,
                "bbox": [2.0, 3.0, 20.0, 10.0],
                "area": 200.0,
                "iscrowd": 0,
                "segmentation": [[2, 3, 22, 3, 22, 13]],
            }
            for number in (1, 2)
        ],
        "categories": [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=1)],
    }


def results() -> list[dict[str, Any]]:
    """Return the content of a COCO results file for both images."""
    return [
        {"image_id": number, "category_id": number, "bbox": [2.0, 3.0, 20.0, 10.0], "score": 0.9} for number in (1, 2)
    ]


def voc(name: str, label: str) -> str:
    """Return the XML of one image."""
    return (
        f"<annotation><folder>images</folder><filename>{name}</filename>"
        f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size><segmented>0</segmented>"
        f"<object><name>{label}</name><pose>Left</pose><truncated>0</truncated><difficult>0</difficult>"
        "<bndbox><xmin>3</xmin><ymin>4</ymin><xmax>22</xmax><ymax>13</ymax></bndbox></object></annotation>"
    )


def cvat() -> str:
    """Return CVAT's XML of both images."""
    images = "".join(
        f'<image id="{number}" name="{name}" width="{WIDTH}" height="{HEIGHT}">'
        f'<box label="{label}" source="manual" occluded="0" xtl="2" ytl="3" xbr="22" ybr="13" rotation="0">'
        '<attribute name="is_crowd">false</attribute></box></image>'
        for number, (name, label) in enumerate(zip(IMAGES, CLASSES, strict=True))
    )
    labels = "".join(f"<label><name>{name}</name></label>" for name in CLASSES)
    meta = f"<meta><task><labels>{labels}</labels></task></meta>"
    return f"<annotations><version>1.1</version>{meta}{images}</annotations>"


def label_studio() -> list[dict[str, Any]]:
    """Return Label Studio's tasks of both images."""
    return [
        {
            "id": number,
            "data": {"image": f"/data/upload/1/0123abcd-{name}", "image_id": number},
            "annotations": [
                {
                    "id": number,
                    "was_cancelled": False,
                    "ground_truth": False,
                    "result": [
                        {
                            "id": str(number),
                            "type": "rectanglelabels",
                            "original_width": WIDTH,
                            "original_height": HEIGHT,
                            "image_rotation": 0,
                            "score": 0.5,
                            "value": {
                                "x": 5,
                                "y": 10,
                                "width": 50,
                                "height": 30,
                                "rotation": 0,
                                "rectanglelabels": [label],
                            },
                        }
                    ],
                }
            ],
        }
        for number, (name, label) in enumerate(zip(IMAGES, CLASSES, strict=True), start=1)
    ]


DATA_YAML = {"path": ".", "train": "images/train", "val": "images/train", "nc": 2, "names": list(CLASSES)}
_EPOCH = {
    "epoch": 1,
    "ended": "2026-01-01T00:00:00+00:00",
    "loss": 2.5,
    "losses": {"loss_bbox": 2.5},
    "learning_rate": 1e-4,
    "images_per_s": 10.0,
    "seconds": 5.0,
    "step_s": {"data": 0.1, "compute": 0.2, "communication": 0.0},
    "start_s": 1.0,
    "AP": 0.25,
    "AP_by_class": {"cat": 0.25, "dog": None},
    "validation_s": 1.0,
}


_NUMBER = {"dtype": "float64", "_type": "Value"}
_OBJECTS = {
    "bbox": {"feature": {"feature": _NUMBER, "length": -1, "_type": "List"}, "length": -1, "_type": "List"},
    "category": {"feature": {"dtype": "int64", "_type": "Value"}, "length": -1, "_type": "List"},
}


def _texts() -> dict[str, str]:
    """Return the text files by path."""
    paths = [f"images/train/{name}" for name in IMAGES]
    rows = [
        {"file_name": name, "objects": {"bbox": [[2.0, 3.0, 20.0, 10.0]], "category": [label]}}
        for name, label in zip(IMAGES, CLASSES, strict=True)
    ]
    found = {
        "coco/coco.json": json.dumps(coco()),
        "coco/results.json": json.dumps(results()),
        "cvat/cvat.xml": cvat(),
        "label-studio/tasks.json": json.dumps(label_studio()),
        "yolo/data.yaml": json.dumps(DATA_YAML),
        "yolo/classes.txt": "\n".join(CLASSES) + "\n",
        "yolo list/data.yaml": json.dumps({**DATA_YAML, "train": "list.txt"}),
        "yolo list/list.txt": "".join(f"./{path}\n" for path in paths),
        "voc/split.txt": "a\nb\n",
        "voc/classes.txt": "\n".join(CLASSES) + "\n",
        "images/list.txt": "".join(f"{name}\n" for name in IMAGES),
        "images/list.csv": "path,camera\n" + "".join(f"{name},north\n" for name in IMAGES),
        "csv/boxes.csv": "filename,width,height,class,xmin,ymin,xmax,ymax\n"
        + "".join(f"{name},{WIDTH},{HEIGHT},{label},2,3,22,13\n" for name, label in zip(IMAGES, CLASSES, strict=True)),
        "csv/retinanet.csv": "".join(
            f"{name},2,3,22,13,{label}\n" for name, label in zip(IMAGES, CLASSES, strict=True)
        ),
        "hub/metadata.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "train run/log/history.json": json.dumps([_EPOCH, {**_EPOCH, "epoch": 2}]),
    }
    for number, (name, label) in enumerate(zip(IMAGES, CLASSES, strict=True)):
        stem = name.removesuffix(".png")
        found[f"voc/xml/{stem}.xml"] = voc(name, label)
        for folder in ("yolo", "yolo list"):
            found[f"{folder}/labels/train/{stem}.txt"] = f"{number} 0.3 0.25 0.5 0.3\n{1 - number} 0.5 0.5 0.25 0.25\n"
    return found


TEXTS = _texts()
"""The text files by path."""
_IMAGE_FOLDERS = (
    "coco/images",
    "voc/images",
    "yolo/images/train",
    "yolo list/images/train",
    "cvat/images",
    "label-studio/images",
    "csv/images",
    "images",
    "hub",
    "hub rows",
)


def make(base: Path) -> None:
    """Write the data sets, tables and metrics; run it in a process of its own."""
    picture(base / "outside.png", 99)
    for place, text in TEXTS.items():
        (base / place).parent.mkdir(parents=True, exist_ok=True)
        (base / place).write_text(text)
    for folder in _IMAGE_FOLDERS:
        for number, name in enumerate(IMAGES):
            picture(base / folder / name, number)
    (base / "windowed").mkdir()
    for name in ("a.tif", "b.tif"):
        (base / "windowed" / name).write_bytes(tiffs.GOOD["tiles"]())
    hub_rows(base / "hub rows", list(IMAGES))
    source = f"--annotations {base}/coco/coco.json --images {base}/coco/images"
    run_command(f"prepare coco {source} --out {base}/tables/images")
    _write_detections(base / "tables" / "detections")
    tables = f"--truth {base}/tables/images --detections {base}/tables/detections"
    run_command(f"evaluate {tables} --bootstrap 10 --out {base}/metrics")


def make_model(base: Path) -> None:
    """Write the model, and a run of it; needs torch and transformers, so run it in a process of its own."""
    from raydet.models.loading import build_detector
    from raydet.tables.schema import Category

    categories = [Category(number, name) for number, name in enumerate(CLASSES, start=1)]
    build_detector("rt_detr_v2_tiny", categories, image_size=64, seed=0).save(str(base / "model"))
    run_command(f"predict --checkpoint {base}/model --data {base}/images --out {base}/run")


def make_pictures(base: Path) -> None:
    """Write all hostile pictures."""
    (base / "pictures").mkdir()
    for name, data in pictures.made():
        (base / "pictures" / pictures.file_name(name)).write_bytes(data)


def hub_rows(folder: Path, paths: list[str]) -> None:
    """Write a Parquet file whose rows name their images by path."""
    table = pa.table(
        {
            "image": pa.array([{"bytes": None, "path": path} for path in paths], IMAGE_TYPE),
            "objects": [{"bbox": [[2.0, 3.0, 20.0, 10.0]], "category": [number]} for number, _ in enumerate(paths)],
        }
    )
    features = {"image": {"_type": "Image"}, "objects": _OBJECTS}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), folder / "rows.parquet")


def _write_detections(folder: Path) -> None:
    categories = [Category(number, name) for number, name in enumerate(CLASSES, start=1)]
    rows = [
        {
            "image_id": number,
            "path": name,
            "width": WIDTH,
            "height": HEIGHT,
            "detections": {
                "bbox": [[2.0, 3.0, 20.0, 10.0], [1.0, 1.0, 5.0, 5.0]],
                "score": [0.9, 0.4],
                "category": [number - 1, 0],
            },
            "error": None,
        }
        for number, name in enumerate(IMAGES, start=1)
    ]
    with TableWriter(str(folder), build_schema("detections", categories), config_hash="0" * 12) as writer:
        writer.write_rows(rows)


def run_command(line: str) -> None:
    """Run a command that must succeed, without its output."""
    with contextlib.redirect_stdout(io.StringIO()):
        code = main(line.split())
    if code:
        raise RuntimeError(f"raydet {line}: exit code {code}")
