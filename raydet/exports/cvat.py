"""Tables → CVAT's XML 1.1, in the variant "CVAT for images".

`annotations.xml` lists all images of the folder `images`, with their boxes as corners in pixels of the upright image.
`labels.json` holds the classes, to paste into the raw label editor of a new task, since CVAT ignores attributes that
its task does not define. Corners have enough digits to read the same float64 back.
"""

import json
from typing import TextIO
from xml.sax.saxutils import escape, quoteattr

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydet.common.console import Console
from raydet.config import ExportCvatConfig
from raydet.config.fields import with_options
from raydet.exports.label_files import FolderExportReport, LabelRows, check_class_names, write_rows
from raydet.exports.rows import as_text, filled, open_scored
from raydet.tables.new_output import new_folder

_CHECKBOX = {"name": "is_crowd", "input_type": "checkbox", "mutable": False, "values": ["false"]}
_SCORE = {"name": "score", "input_type": "text", "mutable": False, "values": [""]}


@with_options(ExportCvatConfig)
def export_cvat(config: ExportCvatConfig, *, console: Console | None = None) -> FolderExportReport:
    """Write an images or detections table as CVAT's XML.

    Image ids are kept; CVAT itself numbers the images of a task and matches them by name. Crowds have the attribute
    `is_crowd`. Detections become boxes of source `auto` with the attribute `score`, for people to correct. Unreadable
    images of a detections table are omitted. Box ids, class ids and areas are lost; classes keep their order.

    Raises:
        UserError: The table is missing or damaged, a number in it is not finite, a class name is invalid, an image
            cannot be copied, or `out` holds other files. Nothing has been written.
    """
    table = open_scored(config.data, config.score_threshold)
    names = check_class_names(table)
    is_images = table.kind == "images"
    attribute = _CHECKBOX if is_images else _SCORE
    quoted_names = pa.array([quoteattr(name) for name in names], pa.string())
    with new_folder(config.out, command="export cvat") as folder:
        with (folder / "annotations.xml").open("w", encoding="utf-8") as file:
            file.write(_head(table.num_rows, names, str(attribute["name"]), str(attribute["input_type"])))

            def write(rows: LabelRows) -> None:
                _write_images(file, rows, _boxes(rows, quoted_names, is_images=is_images))

            report = write_rows(table, folder, config, images_folder="images", write=write, console=console)
            file.write("</annotations>\n")
        labels = [{"name": name, "attributes": [attribute]} for name in names]
        (folder / "labels.json").write_text(json.dumps(labels, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def _head(num_images: int, names: list[str], attribute: str, input_type: str) -> str:
    value = "false" if input_type == "checkbox" else ""
    spec = (
        f"<attribute><name>{attribute}</name><mutable>False</mutable><input_type>{input_type}</input_type>"
        f"<default_value>{value}</default_value><values>{value}</values></attribute>"
    )
    labels = "".join(
        f"        <label><name>{escape(name)}</name><type>rectangle</type><attributes>{spec}</attributes></label>\n"
        for name in names
    )
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n  <version>1.1</version>\n  <meta>\n    <task>\n'
        f"      <name>raydet</name>\n      <size>{num_images}</size>\n      <mode>annotation</mode>\n"
        f"      <labels>\n{labels}      </labels>\n    </task>\n  </meta>\n"
    )


def _boxes(rows: LabelRows, quoted_names: pa.StringArray, *, is_images: bool) -> list[str]:
    """Build the `<box>` elements of each image."""
    ends = rows.boxes_xywh[:, :2] + rows.boxes_xywh[:, 2:]
    sides = [as_text(column) for column in np.concatenate([rows.boxes_xywh[:, :2], ends], axis=1).T.copy()]
    if is_images:
        source, attribute = "manual", "is_crowd"
        values = pc.if_else(pa.array(rows.iscrowd, pa.bool_()), "true", "false")
    else:
        source, attribute, values = "auto", "score", as_text(rows.scores)
    template = f'    <box label=% source="{source}" occluded="0" xtl="%" ytl="%" xbr="%" ybr="%" z_order="0">'
    template += f'<attribute name="{attribute}">%</attribute></box>'
    return rows.joined(filled(template, quoted_names.take(pa.array(rows.categories)), *sides, values))


def _write_images(file: TextIO, rows: LabelRows, boxes: list[str]) -> None:
    sizes = zip(rows.image_ids.tolist(), rows.names, rows.widths.tolist(), rows.heights.tolist(), strict=True)
    for (image_id, name, width, height), is_error, text in zip(sizes, rows.errors.tolist(), boxes, strict=True):
        if not is_error:
            size = f' width="{width:.0f}" height="{height:.0f}"' if width > 0 and height > 0 else ""
            file.write(f'  <image id="{image_id}" name={quoteattr(name)}{size}>\n{text}  </image>\n')
