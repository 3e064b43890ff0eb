"""COCO JSON → columns of boxes.

A file is decoded in one step; if that fails, entry by entry, to accept lenient spellings or report the faulty entry.
"""

import contextlib
import gc
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from raydet.common.boxes import Boxes
from raydet.common.errors import UserError
from raydet.tables import coco_json
from raydet.tables.columns import DetectionColumns, Integers, TruthColumns
from raydet.tables.schema import MAX_IMAGE_ID, Category

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Federated:
    """LVIS's statements about its non-exhaustive labels; categories are indices.

    Attributes:
        negatives: For each image, the classes known to be absent from it.
        not_exhaustive: For each image, the classes whose objects are not all labelled.
        frequency: For each class "r", "c" or "f" (rare, common, frequent); None unless the file states all of them.
    """

    negatives: tuple[tuple[int, ...], ...]
    not_exhaustive: tuple[tuple[int, ...], ...]
    frequency: tuple[str, ...] | None


@dataclass(frozen=True)
class Instances:
    """Contents of a COCO instances file.

    Attributes:
        categories: Classes in ascending order of id.
        columns: Boxes; images in ascending order of id.
        sizes_hw: Heights and widths in pixels, 0 where unknown, int64 [I, 2].
        paths: File names with `/`; empty where unknown.
        federated: LVIS's additions, if requested.
    """

    categories: tuple[Category, ...]
    columns: TruthColumns
    sizes_hw: Integers
    paths: list[str]
    federated: Federated | None


_ImageId = Annotated[int, msgspec.Meta(ge=0, lt=MAX_IMAGE_ID)]
_Box = tuple[float, float, float, float]


class _Image(msgspec.Struct, gc=False):
    id: _ImageId
    height: _ImageId = 0
    width: _ImageId = 0
    file_name: str = ""
    neg_category_ids: tuple[int, ...] = ()
    not_exhaustive_category_ids: tuple[int, ...] = ()


class _AnnotationStruct(msgspec.Struct, gc=False):
    image_id: _ImageId
    category_id: int
    bbox: _Box
    area: float | None = None
    iscrowd: int | bool | None = 0


class _Class(msgspec.Struct, gc=False):
    id: int
    name: str
    frequency: str | None = None


class _InstancesFile(msgspec.Struct):
    images: list[_Image]
    annotations: list[_AnnotationStruct]
    categories: list[_Class]


class _Result(msgspec.Struct, gc=False):
    image_id: _ImageId
    category_id: int
    bbox: _Box
    score: float


@contextlib.contextmanager
def _gc_disabled() -> Iterator[None]:
    """Disable the garbage collector while the block runs: millions of new tuples would trigger it again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_gc_disabled()
def read_instances(uri: str, *, lvis: bool) -> Instances:
    """Read a COCO instances file, with LVIS's additions if requested.

    Raises:
        UserError: The file is not COCO instances JSON, or an entry is invalid.
    """
    content = _decode(uri, _InstancesFile, _instances_one_by_one)
    images, annotations = sorted(content.images, key=lambda image: image.id), content.annotations
    classes = sorted(content.categories, key=lambda category: category.id)
    if any(first.id == second.id for first, second in itertools.pairwise(classes)):
        raise UserError(f"{uri} has duplicate category ids")
    categories = tuple(Category(category.id, category.name) for category in classes)
    image_ids = _column((image.id for image in images), np.int64, len(images))
    count = len(annotations)
    image_of = _column((item.image_id for item in annotations), np.int64, count)
    category = _to_indices([item.category_id for item in annotations], categories, f"{uri}: annotations")
    boxes_xywh = _boxes_column([item.bbox for item in annotations])
    unknown = np.setdiff1d(image_of, image_ids)
    if unknown.size:
        raise UserError(
            f"{uri} has annotations of {unknown.size:,} images that it does not list, such as image {unknown[0]}"
        )
    area = _column((np.nan if item.area is None else item.area for item in annotations), np.float64, count)
    # NaN marks a missing area.
    area = np.where(np.isnan(area), boxes_xywh[:, 2] * boxes_xywh[:, 3], area)
    order = np.argsort(image_of, kind="stable")
    columns = TruthColumns(
        image_ids=image_ids,
        starts=np.append(np.searchsorted(image_of[order], image_ids), count),
        boxes_xywh=boxes_xywh[order],
        category=category[order],
        area=area[order],
        iscrowd=_column((bool(item.iscrowd) for item in annotations), np.bool_, count)[order],
    )
    sizes_hw = np.array([(image.height, image.width) for image in images], dtype=np.int64).reshape(-1, 2)
    federated = _federated(images, classes, uri) if lvis else None
    paths = [coco_json.plain_path(image.file_name) for image in images]
    return Instances(categories, columns, sizes_hw, paths, federated)


def _federated(images: Sequence[_Image], classes: Sequence[_Class], uri: str) -> Federated:
    if not any(image.neg_category_ids or image.not_exhaustive_category_ids for image in images):
        raise UserError(
            f"{uri} is not an LVIS file: none of its images has neg_category_ids or not_exhaustive_category_ids; "
            "remove --protocol lvis"
        )
    index_of = {category.id: index for index, category in enumerate(classes)}

    def indices(category_ids: Sequence[int]) -> tuple[int, ...]:
        unknown = [category_id for category_id in category_ids if category_id not in index_of]
        if unknown:
            raise UserError(f"{uri}: an image refers to category {unknown[0]}, which is not in `categories`")
        return tuple(index_of[category_id] for category_id in category_ids)

    frequency = tuple(category.frequency or "" for category in classes)
    return Federated(
        negatives=tuple(indices(image.neg_category_ids) for image in images),
        not_exhaustive=tuple(indices(image.not_exhaustive_category_ids) for image in images),
        frequency=frequency if all(letter in ("r", "c", "f") for letter in frequency) else None,
    )


@_gc_disabled()
def read_results(uri: str, categories: Sequence[Category]) -> tuple[Integers, DetectionColumns]:
    """Read a COCO results file, whose category ids are those of the truth.

    Returns:
        Ids of the images that have detections, ascending, int64 [R]; and their detections.

    Raises:
        UserError: The file is not COCO results JSON, an entry is invalid, or a category id is not in `categories`.
    """
    results = _decode(uri, list[_Result], _results_one_by_one)
    image_of = _column((item.image_id for item in results), np.int64, len(results))
    category = _to_indices([item.category_id for item in results], categories, uri)
    scores = _column((item.score for item in results), np.float64, len(results))
    boxes_xywh = _boxes_column([item.bbox for item in results])
    order = np.argsort(image_of, kind="stable")
    image_ids, lengths = np.unique(image_of, return_counts=True)
    columns = DetectionColumns(
        starts=np.append(np.zeros(1, np.int64), np.cumsum(lengths)),
        boxes_xywh=boxes_xywh[order],
        scores=scores[order],
        category=category[order],
    )
    return image_ids, columns


def _column(values: Iterable[Any], dtype: Any, count: int) -> npt.NDArray[Any]:
    return np.fromiter(values, dtype=dtype, count=count)


def _boxes_column(boxes: Sequence[_Box]) -> Boxes:
    # Several times as fast as np.array, which inspects each tuple first.
    return np.fromiter(itertools.chain.from_iterable(boxes), np.float64, 4 * len(boxes)).reshape(-1, 4)


def _to_indices(category_ids: Sequence[int], categories: Sequence[Category], where: str) -> Integers:
    index_of = {category.id: index for index, category in enumerate(categories)}
    if len(index_of) < len(categories):
        raise UserError(f"{where}: the truth has duplicate category ids, so category_id is ambiguous")
    try:
        return _column((index_of[category_id] for category_id in category_ids), np.int64, len(category_ids))
    except KeyError:
        unknown = sorted(set(category_ids) - set(index_of))
        names = ", ".join(map(str, unknown[:10]))
        raise UserError(f"{where} has category ids that the truth does not have: {names}") from None


def _decode(uri: str, type_: type[_T], one_by_one: Callable[[str], _T]) -> _T:
    """Decode the complete file; if that fails, entry by entry."""
    try:
        return msgspec.json.decode(coco_json.read_whole(uri), type=type_)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return one_by_one(uri)


def _instances_one_by_one(uri: str) -> _InstancesFile:
    content = _InstancesFile([], [], [])
    for key, entries in coco_json.read_lists(uri):
        for entry, place in entries:
            if key == "images":
                content.images.append(_image(entry, place))
            elif key == "annotations":
                content.annotations.append(_annotation(entry, place))
            else:
                category, frequency = coco_json.category(entry, place), entry.get("frequency")
                content.categories.append(_Class(category.id, category.name, frequency))
    return content


def _image(entry: coco_json.Entry, place: str) -> _Image:
    sides = (coco_json.integer(entry.get(side)) for side in ("height", "width"))
    height, width = (side if side is not None and 0 <= side < MAX_IMAGE_ID else 0 for side in sides)
    lists = (tuple(entry.get(key) or ()) for key in ("neg_category_ids", "not_exhaustive_category_ids"))
    return _Image(coco_json.image_id(entry, "id", place), height, width, str(entry.get("file_name") or ""), *lists)


def _annotation(entry: coco_json.Entry, place: str) -> _AnnotationStruct:
    area = coco_json.stated_area(entry)
    return _AnnotationStruct(
        image_id=coco_json.image_id(entry, "image_id", place),
        category_id=coco_json.required_integer(entry, "category_id", place),
        bbox=coco_json.box_xywh(entry, place),
        # NaN marks a missing area, so a stated NaN becomes infinity, which is refused later.
        area=math.inf if area is not None and math.isnan(area) else area,
        iscrowd=coco_json.is_crowd(entry, place),
    )


def _results_one_by_one(uri: str) -> list[_Result]:
    try:
        items = json.loads(coco_json.read_whole(uri))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{uri} is not JSON: {error}; expected COCO results, a list") from None
    if not isinstance(items, list):
        raise UserError(
            f"{uri} contains a {type(items).__name__}; COCO results are a list of objects with image_id, category_id, "
            "bbox and score"
        )
    return [_result(entry, place) for entry, place in coco_json.placed(items, f"{uri}: results")]


def _result(entry: coco_json.Entry, place: str) -> _Result:
    for key in ("image_id", "category_id", "bbox"):
        value = entry.get(key)
        # Annotations may be hand-written, but results come from programs: a quoted number is a bug there.
        if any(isinstance(item, str) for item in (value if isinstance(value, list) else [value])):
            raise UserError(f"{place}: {key} must not be a string, got {value!r:.60}")
    return _Result(
        coco_json.image_id(entry, "image_id", place),
        coco_json.required_integer(entry, "category_id", place),
        coco_json.box_xywh(entry, place),
        coco_json.score(entry, place),
    )
