"""Images tables → Pascal VOC XML files, in the folders of the VOC devkit.

`Annotations` has one XML file per image, `JPEGImages` the images, `ImageSets/Main/train.txt` their names. The classes
are listed in `labelmap.txt` for CVAT, and in index order in `classes.txt`. Pixels count from 1, so that xmin = left + 1
and xmax = left + width; zero-based, xmin = left and xmax = left + width. Fractions have enough digits to read the same
float64 back, integers have none. Counted from 1, a box narrower than a pixel has xmin > xmax, which raydet reads back
and some programs refuse.
"""

from pathlib import PurePosixPath
from xml.sax.saxutils import escape

import numpy as np
import pyarrow as pa

from raydet.common.console import Console
from raydet.common.errors import UserError
from raydet.config import ExportVocConfig
from raydet.config.fields import with_options
from raydet.exports.label_files import FolderExportReport, LabelRows, check_class_names, write_labels
from raydet.exports.rows import as_text, filled, open_scored
from raydet.tables.new_output import new_folder

_IMAGES = "JPEGImages"


@with_options(ExportVocConfig)
def export_voc(config: ExportVocConfig, *, console: Console | None = None) -> FolderExportReport:
    """Write an images table as Pascal VOC XML files.

    Crowds become `difficult` objects. The format has no scores, so a detections table is refused: read back, its
    predictions would become ground truth. Ids of images, boxes and classes are lost; images keep their names.

    Raises:
        UserError: The table is missing, damaged or holds detections, a number in it is not finite, a class name is
            invalid, an image cannot be copied, or `out` holds other files. Nothing has been written.
    """
    table = open_scored(config.data, 0.0)
    if table.kind == "detections":
        raise UserError(
            f"{table.uri} is a detections table, but Pascal VOC has no scores; use export coco or export yolo"
        )
    names = check_class_names(table)
    escaped_names = pa.array([escape(name) for name in names], pa.string())

    stems: list[str] = []

    def make_texts(rows: LabelRows) -> list[str]:
        stems.extend(name.rpartition(".")[0] for name in rows.names)
        objects = rows.joined(_objects(rows, escaped_names, 0.0 if config.zero_based else 1.0))
        sizes = zip(rows.names, rows.widths.tolist(), rows.heights.tolist(), objects, strict=True)
        return [_document(*size) for size in sizes]

    with new_folder(config.out, command="export voc") as folder:
        report = write_labels(
            table,
            folder,
            config,
            images_folder=_IMAGES,
            labels_folder="Annotations",
            extension=".xml",
            make_texts=make_texts,
            console=console,
        )
        labels = ["# label:color_rgb:parts:actions", *(f"{name}:::" for name in names)]
        for path, lines in {
            f"ImageSets/Main/{config.split}.txt": stems,
            "labelmap.txt": labels,
            "classes.txt": names,
        }.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return report


def _objects(rows: LabelRows, escaped_names: pa.StringArray, first_pixel: float) -> pa.StringArray:
    """Build one `<object>` per box."""
    starts = rows.boxes_xywh[:, :2] + first_pixel
    ends = rows.boxes_xywh[:, :2] + rows.boxes_xywh[:, 2:]
    corners = (as_text(column) for column in np.concatenate([starts, ends], axis=1).T.copy())
    return filled(
        "  <object>\n    <name>%</name>\n    <pose>Unspecified</pose>\n    <truncated>0</truncated>\n"
        "    <difficult>%</difficult>\n    <bndbox>\n      <xmin>%</xmin>\n      <ymin>%</ymin>\n"
        "      <xmax>%</xmax>\n      <ymax>%</ymax>\n    </bndbox>\n  </object>",
        escaped_names.take(pa.array(rows.categories)),
        as_text(rows.iscrowd.astype(np.int64)),
        *corners,
    )


def _document(name: str, width: float, height: float, objects: str) -> str:
    return (
        f"<annotation>\n  <folder>{_IMAGES}</folder>\n  <filename>{escape(PurePosixPath(name).name)}</filename>\n"
        f"  <size>\n    <width>{width:.0f}</width>\n    <height>{height:.0f}</height>\n"
        f"    <depth>3</depth>\n  </size>\n"
        f"  <segmented>0</segmented>\n{objects}</annotation>\n"
    )
