"""Tables → YOLO label files in the layout of Ultralytics, which CVAT reads too.

`images/train/a.jpg` has its labels in `labels/train/a.txt`, one line a box: `class cx cy width height`, in parts of the
upright image, and of detections the score as sixth number. Numbers have as many digits as it takes to read the same
float64 back. `data.yaml` names the classes in their order; it has no `path`, since that would be taken from the working
directory, and both `train` and `val`, since Ultralytics opens no data set without.
"""

from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import yaml

from raydet.common.errors import UserError
from raydet.config import ExportYoloConfig
from raydet.exports.label_files import FolderExportReport, LabelRows, check_class_names, write_labels
from raydet.exports.rows import Numbers, as_text
from raydet.tables import storage
from raydet.tables.new_output import new_folder
from raydet.tables.table import open_table


def export_yolo(config: ExportYoloConfig) -> FolderExportReport:
    """Writes a table of images or of detections as YOLO label files.

    Crowd boxes are left out and counted: YOLO has no place for them, and as plain boxes they would be wrong. Images
    without boxes get an empty file; images that could not be read, in a table of detections, none. Ids of images,
    boxes and classes have no place: images keep their names, classes their order.

    Returns:
        What was written.

    Raises:
        UserError: There is no such table, it is damaged, a number or the name of a class in it means nothing, a picture
            cannot be copied, or `out` holds other files. Nothing has been written then.
    """
    out, uri = storage.absolute_uri(config.out), storage.absolute_uri(config.data)
    table = open_table(uri, ("images", "detections"))
    if table.kind == "images" and config.score_threshold > 0:
        raise UserError(f"{uri} is a table of images, which has no scores; leave out --score-threshold")
    names = check_class_names(table)
    notes = {
        "crowd boxes left out, since YOLO has none": 0,
        "detections at or below the threshold left out": 0,
        "images that could not be read, so without a label file": 0,
    }
    crowd_note, score_note, error_note = notes

    def make_texts(rows: LabelRows) -> tuple[LabelRows, list[str | None]]:
        is_low = (rows.scores <= config.score_threshold) & (config.score_threshold > 0)
        notes[crowd_note] += int(rows.iscrowd.sum())
        notes[score_note] += int(is_low.sum())
        notes[error_note] += int(rows.errors.sum())
        kept = rows.keep(np.logical_not(rows.iscrowd | is_low))
        texts = _texts(kept, with_scores=table.kind == "detections")
        return kept, [None if error else text for text, error in zip(texts, rows.errors.tolist(), strict=True)]

    pictures_folder = f"images/{config.split}"
    with new_folder(out, command="export yolo") as folder:
        written = write_labels(
            table,
            folder,
            pictures_folder=pictures_folder,
            labels_folder=f"labels/{config.split}",
            extension=".txt",
            copy_images=config.copy_images,
            make_texts=make_texts,
        )
        _write_data_yaml(folder / "data.yaml", pictures_folder, config.split, names)
    return FolderExportReport(
        out,
        len(written.names),
        written.num_boxes,
        written.num_copied,
        pictures_folder,
        written.num_renamed,
        notes,
    )


def _texts(rows: LabelRows, *, with_scores: bool) -> list[str]:
    columns = [as_text(rows.categories), *(as_text(column) for column in _normalised_cxcywh(rows).T.copy())]
    columns += [as_text(rows.scores)] if with_scores else []
    return rows.joined(pc.binary_join_element_wise(*columns, " "))


def _normalised_cxcywh(rows: LabelRows) -> Numbers:
    """Boxes of images of many sizes, in parts of their image, [N, 4]."""
    sizes_wh = np.repeat(np.stack([rows.widths, rows.heights], axis=1), rows.counts, axis=0)
    centres = rows.boxes_xywh[:, :2] + rows.boxes_xywh[:, 2:] / 2
    return np.asarray(np.concatenate([centres / sizes_wh, rows.boxes_xywh[:, 2:] / sizes_wh], axis=1))


def _write_data_yaml(path: Path, pictures_folder: str, split: str, names: list[str]) -> None:
    parts = dict.fromkeys(("train", "val", split), pictures_folder)
    text = yaml.safe_dump({**parts, "names": dict(enumerate(names))}, sort_keys=False, allow_unicode=True)
    path.write_text(
        f"# Written by raydet: this is only the part `{split}`, under all the keys that are wanted.\n{text}"
    )
