"""Tables → Label Studio's JSON: one task per image, with an annotation, or with a prediction and its scores.

`tasks.json` is for Label Studio's import, `label_config.xml` for the labelling interface of the project, and
`classes.txt` lists the classes in index order, which the JSON does not hold. Boxes are percentages of the upright
image, with enough digits to read the same box back within rounding.
"""

import json
from itertools import count
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydet.common.console import Console
from raydet.config import ExportLabelStudioConfig
from raydet.config.fields import with_options
from raydet.exports.label_files import FolderExportReport, LabelRows, check_class_names, write_rows
from raydet.exports.rows import Numbers, as_text, filled, open_scored
from raydet.tables.new_output import new_folder

_MODEL_VERSION = "raydet"


@with_options(ExportLabelStudioConfig)
def export_label_studio(config: ExportLabelStudioConfig, *, console: Console | None = None) -> FolderExportReport:
    """Write an images or detections table as Label Studio's JSON.

    An images table becomes tasks with annotations, in which crowds have the choice `crowd`; a detections table becomes
    tasks with predictions, for people to correct, without its unreadable images. Image ids are the ids of the tasks and
    `data.image_id`, which Label Studio keeps; ids of boxes are ids of regions. Class ids and areas are lost.

    Raises:
        UserError: The table is missing or damaged, a number in it is not finite, a class name is invalid, an image
            cannot be copied, or `out` holds other files. Nothing has been written.
    """
    table = open_scored(config.data, config.score_threshold)
    names = check_class_names(table)
    is_images = table.kind == "images"
    quoted_names = pa.array([json.dumps(name) for name in names], pa.string())
    numbers = count(1)
    has_crowds = False
    with new_folder(config.out, command="export label-studio") as folder:
        with (folder / "tasks.json").open("w", encoding="utf-8") as file:
            separator = "[\n"

            def write(rows: LabelRows) -> None:
                nonlocal separator, has_crowds
                has_crowds |= bool(rows.iscrowd.any())
                ids = rows.ids if is_images else np.fromiter(numbers, np.int64, len(rows.boxes_xywh))
                regions = rows.joined(_regions(rows, ids, quoted_names, with_scores=not is_images))
                scores = np.split(rows.scores, np.cumsum(rows.counts)[:-1])
                for place, is_error in enumerate(rows.errors.tolist()):
                    if not is_error:
                        address = _address(config.image_prefix, rows.names[place])
                        score = None if is_images or not len(scores[place]) else float(scores[place].mean())
                        image_id = int(rows.image_ids[place])
                        file.write(separator + _task_text(image_id, address, regions[place], is_images, score))
                        separator = ",\n"

            report = write_rows(table, folder, config, images_folder="images", write=write, console=console)
            file.write("\n]\n" if separator == ",\n" else "[]\n")
        (folder / "label_config.xml").write_text(_label_config(names, has_crowds), encoding="utf-8")
        (folder / "classes.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    return report


def _address(prefix: str, name: str) -> str:
    """Return the address of an image; stores take names as they are, URLs need them quoted."""
    is_url = prefix.startswith(("/", "http://", "https://"))
    return prefix + (quote(name) if is_url else name)


def _task_text(image_id: int, address: str, regions: str, is_images: bool, score: float | None) -> str:
    data = json.dumps({"image": address, "image_id": image_id})
    result = f'"result": [{",".join(filter(None, regions.split(chr(10))))}]'
    if is_images:
        return f'{{"id": {image_id}, "data": {data}, "annotations": [{{{result}}}]}}'
    about = json.dumps({"model_version": _MODEL_VERSION, **({} if score is None else {"score": score})})
    return f'{{"id": {image_id}, "data": {data}, "predictions": [{about[:-1]}, {result}}}]}}'


def _regions(rows: LabelRows, ids: Numbers, quoted_names: pa.StringArray, *, with_scores: bool) -> pa.StringArray:
    """Build the results of each box: its rectangle, and for a crowd the choice that marks it."""
    sizes = np.repeat(np.stack([rows.widths, rows.heights], axis=1), rows.counts, axis=0)
    percentages = rows.boxes_xywh / np.tile(sizes, 2) * 100
    head = filled(
        '{"id": "%", "to_name": "image", "original_width": %, "original_height": %, "image_rotation": 0, '
        '"value": {"rotation": 0, "x": %, "y": %, "width": %, "height": %',
        as_text(ids),
        *(as_text(column.astype(np.int64)) for column in sizes.T),
        *(as_text(column) for column in percentages.T.copy()),
    )
    names = quoted_names.take(pa.array(rows.categories))
    score = filled(', "score": %', as_text(rows.scores)) if with_scores else ""
    rectangles = filled(
        '%, "rectanglelabels": [%]}, "from_name": "label", "type": "rectanglelabels"%}', head, names, score
    )
    crowds = filled('%,%, "choices": ["crowd"]}, "from_name": "kind", "type": "choices"}', rectangles, head)
    return pc.if_else(pa.array(rows.iscrowd, pa.bool_()), crowds, rectangles)


def _label_config(names: list[str], has_crowds: bool) -> str:
    labels = "".join(f"    <Label value={quoteattr(name)}/>\n" for name in names)
    choice = '  <Choices name="kind" toName="image" perRegion="true"><Choice value="crowd"/></Choices>\n'
    return (
        '<View>\n  <Image name="image" value="$image"/>\n  <RectangleLabels name="label" toName="image">\n'
        f"{labels}  </RectangleLabels>\n{choice if has_crowds else ''}</View>\n"
    )
