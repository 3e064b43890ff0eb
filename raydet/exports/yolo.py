"""Tables → YOLO label files in Ultralytics layout, which CVAT reads too.

`images/train/a.jpg` has its labels in `labels/train/a.txt`, one line per box: `class cx cy width height` as fractions
of the upright image, followed by the score for detections. Numbers have enough digits to read the same float64 back.
`data.yaml` lists the classes in index order. It has no `path`, which would be relative to the working directory, and
both `train` and `val`, because Ultralytics requires both.
"""

from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import yaml

from raydet.common.console import Console
from raydet.config import ExportYoloConfig
from raydet.config.fields import with_options
from raydet.exports.label_files import FolderExportReport, LabelRows, check_class_names, write_labels
from raydet.exports.rows import Numbers, as_text, open_scored
from raydet.tables.new_output import new_folder


@with_options(ExportYoloConfig)
def export_yolo(config: ExportYoloConfig, *, console: Console | None = None) -> FolderExportReport:
    """Write an images or detections table as YOLO label files.

    Crowd boxes are omitted and counted: YOLO cannot mark them, and as plain boxes they would be wrong. Images without
    boxes get an empty file; unreadable images of a detections table get none. Ids of images, boxes and classes are
    lost; images keep their names, classes their order.

    Raises:
        UserError: The table is missing or damaged, a number in it is not finite, a class name is invalid, an image
            cannot be copied, or `out` holds other files. Nothing has been written.
    """
    images_folder = f"images/{config.split}"
    table = open_scored(config.data, config.score_threshold)
    names = check_class_names(table)
    with new_folder(config.out, command="export yolo") as folder:
        report = write_labels(
            table,
            folder,
            config,
            images_folder=images_folder,
            labels_folder=f"labels/{config.split}",
            extension=".txt",
            make_texts=partial(_texts, with_scores=table.kind == "detections"),
            console=console,
            crowds="crowd boxes omitted, which YOLO cannot represent",
            unreadable="unreadable images without a label file",
        )
        _write_data_yaml(folder / "data.yaml", images_folder, config.split, names)
    return report


def _texts(rows: LabelRows, *, with_scores: bool) -> list[str]:
    columns = [as_text(rows.categories), *(as_text(column) for column in _normalised_cxcywh(rows).T.copy())]
    columns += [as_text(rows.scores)] if with_scores else []
    return rows.joined(pc.binary_join_element_wise(*columns, " "))


def _normalised_cxcywh(rows: LabelRows) -> Numbers:
    """Return cxcywh boxes as fractions of their image, float64 [N, 4]."""
    sizes_wh = np.repeat(np.stack([rows.widths, rows.heights], axis=1), rows.counts, axis=0)
    centres = rows.boxes_xywh[:, :2] + rows.boxes_xywh[:, 2:] / 2
    return np.asarray(np.concatenate([centres / sizes_wh, rows.boxes_xywh[:, 2:] / sizes_wh], axis=1))


def _write_data_yaml(path: Path, images_folder: str, split: str, names: list[str]) -> None:
    parts = dict.fromkeys(("train", "val", split), images_folder)
    text = yaml.safe_dump({**parts, "names": dict(enumerate(names))}, sort_keys=False, allow_unicode=True)
    path.write_text(
        f"# Written by raydet: only the split `{split}`, listed under all keys that Ultralytics requires.\n{text}"
    )
