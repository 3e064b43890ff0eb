"""Label Studio's JSON export → records.

The file is a list of tasks. Boxes are percentages of the image as the browser shows it, which is upright. `labels`
chooses between what people drew (`annotations`) and what models found (`predictions`). Of several annotations of a
task, the one marked as ground truth is used, otherwise the last; skipped ones never. A task without any is unlabelled,
and one whose annotation is empty has no objects. A rotated rectangle becomes the upright box around it, with the area
that it had. A region with the choice `crowd` becomes a crowd. Polygons, masks, ellipses and key points are dropped and
counted, and so are rectangles without a label.

Image ids are `data.image_id`, which raydet's export writes, or else the ids of the tasks. Region ids are kept if all
are positive integers, as raydet's export writes them. If ids are missing or repeated, images are numbered from 0 and
regions from 1. The format has no list of classes. Label Studio's addresses of images are matched with the files of a
folder by their last components.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

from raydet.common.boxes import enclosing_xywh
from raydet.common.errors import UserError
from raydet.config import PrepareLabelStudioConfig
from raydet.config.preparing import TaskLabels
from raydet.images.files import ImageFolder, is_image_name, readable
from raydet.preparation.sources.source import (
    UNLABELLED,
    UNLABELLED_KEPT,
    Finding,
    FindingLog,
    NamedBoxes,
    Source,
    SourceImage,
    are_image_ids,
    are_unique,
    image_id_of,
    read_class_names,
    size_hw_of,
)
from raydet.preparation.sources.tools.addresses import FolderFiles, address_path
from raydet.tables import storage
from raydet.tables.coco_json import MAX_INTEGER, BoxXywh, Entry, errors_in_one_line, integer, placed
from raydet.tables.json_stream import elements
from raydet.tables.schema import Category
from raydet.tables.spill import Spilled

CROWD_CHOICE = "crowd"
_EXPECTED = "Label Studio's export format JSON, a list of tasks"
_OTHER_REGION = "regions other than labelled rectangles, dropped"
_ROTATED_REGION = "rotated rectangles, replaced by the upright box around them"
_ROTATED_UNKNOWN = "rotated rectangles of images without a stated size, dropped"
_SEVERAL_LABELS = "rectangles with several labels, of which the first is used"
_SEVERAL_RESULTS = "tasks with several annotations or predictions, of which one is used"
_LOW_SCORE = "predictions at or below --score-threshold, dropped"
_ROTATED_IMAGE = "it was rotated in Label Studio, and its boxes refer to the rotated image"


@dataclass(kw_only=True)
class _LabelStudioTask(NamedBoxes):
    """One task; boxes are fractions of the image if its size is not stated."""

    image_ids: tuple[int | None, int | None]
    path: str
    size_hw: tuple[int, int] | None = None
    is_labelled: bool = False
    ids: list[int | None] = field(default_factory=list)


def read_label_studio(config: PrepareLabelStudioConfig, folder: ImageFolder) -> Source:
    """Read a JSON file of Label Studio; its tasks become records in file order. Category ids start at 1.

    Raises:
        UserError: The file is missing, is not Label Studio's JSON, or names no image or no class.
    """
    where, classes, labels = storage.absolute_uri(config.annotations), config.classes, config.labels
    find = FolderFiles(folder)
    parse = partial(_task, find=find, labels=labels, score_threshold=config.score_threshold)
    tasks = Spilled(_LabelStudioTask, _read_tasks(config.annotations, parse))
    if not len(tasks):
        raise UserError(f"{where} has no tasks; expected {_EXPECTED}")
    names = sorted({name for task in tasks for name in task.names}) if classes is None else read_class_names(classes)
    if not names:
        raise UserError(
            f"{where} has no labelled rectangle among its {labels}; for images without labels, use "
            "`raydet prepare images`"
        )
    findings = FindingLog()
    image_ids = _image_ids(tasks, findings)
    keeps_ids = _are_unique(tasks)
    index_of = {name: index for index, name in enumerate(names)}
    for image_id, task in zip(image_ids, tasks, strict=True):
        task.add_findings(findings, index_of, task.path, image_id)
        if config.unlabelled == "keep" and not task.is_labelled and task.refusal is None:
            findings.note(Finding(UNLABELLED_KEPT, task.path, image_id))

    def records() -> Iterator[SourceImage]:
        numbers = count(1)
        for image_id, task in zip(image_ids, tasks, strict=True):
            known = (id_ or 0 for name, id_ in zip(task.names, task.ids, strict=True) if name in index_of)
            is_refused = config.unlabelled == "reject" and not task.is_labelled
            yield SourceImage(
                image_id=image_id,
                path=task.path,
                objects=task.objects(index_of, known if keeps_ids else numbers, is_normalised=task.size_hw is None),
                size_hw=task.size_hw,
                refusal=task.refusal or (UNLABELLED if is_refused else None),
            )

    categories = tuple(Category(index + 1, name) for name, index in index_of.items())
    return Source(records, len(tasks), categories, findings=findings)


def _read_tasks(uri: str, parse: Any) -> Iterator[_LabelStudioTask]:
    with errors_in_one_line(uri, _EXPECTED), storage.open_stream(uri) as stream:
        for entry, place in placed(elements(stream), storage.absolute_uri(uri)):
            yield parse(entry, place)


def _task(
    entry: Entry, place: str, *, find: FolderFiles, labels: TaskLabels, score_threshold: float
) -> _LabelStudioTask:
    data = entry.get("data")
    if not isinstance(data, dict):
        hint = "; it looks like JSON-MIN, export JSON instead" if "image" in entry else ""
        raise UserError(f'{place} has no object "data"; expected {_EXPECTED}{hint}')
    texts = [value for value in (data.get("image"), *data.values()) if isinstance(value, str)]
    address = next((text for text in texts if is_image_name(address_path(text))), texts[0] if texts else None)
    if address is None:
        raise UserError(f'{place}: its "data" has no image address')
    path = find(address)
    task = _LabelStudioTask(
        image_ids=(image_id_of(data.get("image_id")), image_id_of(entry.get("id"))),
        path=readable(address_path(address) if path is None else path),
        refusal="no such file: no image path matches the end of its address"
        if path is None
        else find.refuse_outside(path),
    )
    found = [item for item in _list(entry.get(labels)) if isinstance(item, dict) and not item.get("was_cancelled")]
    if not found:
        return task
    task.note(_SEVERAL_RESULTS, len(found) > 1)
    chosen = next((item for item in found if item.get("ground_truth")), found[-1])
    task.is_labelled = True
    _add_regions(task, chosen, score_threshold if labels == "predictions" else None)
    return task


def _add_regions(task: _LabelStudioTask, chosen: Entry, threshold: float | None) -> None:
    results = [item for item in _list(chosen.get("result")) if isinstance(item, dict)]
    task.size_hw = next((size for size in map(_original_size_hw, results) if size is not None), None)
    if any(_number(item.get("image_rotation", 0)) not in (0.0, None) for item in results):
        task.refusal = task.refusal or _ROTATED_IMAGE
    crowds = {_text(item.get("id")) for item in results if CROWD_CHOICE in _choices(item)}
    labelled = {_text(item.get("id")) for item in results if item.get("type") in ("rectanglelabels", "labels")}
    for item in results:
        kind, region_id = _text(item.get("type")), _text(item.get("id"))
        if (kind == "rectangle" and region_id in labelled) or not kind.endswith(("labels", "rectangle")):
            continue
        value: Any = item.get("value")
        names, percentages = _names(value), _percentages(value)
        if kind == "rectangle" or not names or percentages is None:
            task.note(_OTHER_REGION)
            continue
        score = _number(item.get("score", chosen.get("score")))
        if threshold and (score is None or score <= threshold):
            task.note(_LOW_SCORE)
            continue
        task.note(_SEVERAL_LABELS, len(names) > 1)
        high, wide = task.size_hw or (1, 1)
        left, top, width, height = (side / 100 for side in percentages)
        box = (left * wide, top * high, width * wide, height * high)
        degrees = _number(value.get("rotation")) or 0.0
        if degrees % 360:
            task.note(_ROTATED_REGION if task.size_hw else _ROTATED_UNKNOWN)
            if task.size_hw is None:
                continue
        number = integer(region_id)
        task.ids.append(number if number is not None and 0 < number < MAX_INTEGER else None)
        enclosing = enclosing_xywh(box, degrees, box[:2])
        task.add(names[0], enclosing, area=box[2] * box[3], iscrowd=region_id in crowds)


def _image_ids(tasks: Spilled[_LabelStudioTask], findings: FindingLog) -> Sequence[int]:
    """Return `data.image_id` of all tasks if these are unique, or else the tasks' ids, or else their ranks."""
    for source in (0, 1):
        ids = array("q", (-1 if (id_ := task.image_ids[source]) is None else id_ for task in tasks))
        if are_image_ids(ids):
            return ids
    findings.note(Finding("task ids that are missing or repeated, so all images are numbered from 0"))
    return range(len(tasks))


def _are_unique(tasks: Spilled[_LabelStudioTask]) -> bool:
    """Return True if all regions have different ids that the table can hold."""
    ids = array("q")
    for task in tasks:
        for id_ in task.ids:
            if id_ is None:
                return False
            ids.append(id_)
    return are_unique(ids)


def _original_size_hw(item: Entry) -> tuple[int, int] | None:
    return size_hw_of(item.get("original_height"), item.get("original_width"))


def _names(value: object) -> list[str]:
    """Return the labels of a region."""
    if not isinstance(value, dict):
        return []
    found = _list(value.get("rectanglelabels")) or _list(value.get("labels"))
    return [readable(name) for name in found if isinstance(name, str) and name]


def _percentages(value: Any) -> BoxXywh | None:
    """Return the box of a region as percentages of its image, or None."""
    if not isinstance(value, dict):
        return None
    left, top, width, height = (_number(value.get(key)) for key in ("x", "y", "width", "height"))
    return None if left is None or top is None or width is None or height is None else (left, top, width, height)


def _choices(item: Entry) -> list[Any]:
    value = item.get("value")
    return _list(value.get("choices")) if isinstance(value, dict) else []


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: object) -> str:
    return value if isinstance(value, str) else str(value) if isinstance(value, int) else ""


def _number(value: object) -> float | None:
    """Return a finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) < float("inf") else None
