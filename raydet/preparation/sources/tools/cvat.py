"""CVAT's XML 1.1, in the variant "CVAT for images" → records.

The file lists every image of a task, with its boxes in pixels of the upright image. An image without a box is
therefore an image without objects; CVAT does not record whether anybody has looked at it. The attribute `is_crowd` of
a box, which CVAT's COCO import and export use too, marks a crowd. A rotated box becomes the upright box around it, with
the area that it had. Polygons, masks, points, cuboids, skeletons and tags are dropped and counted. A file of tracks
("CVAT for video") is refused.

Ids of images are kept if they are unique; those of several tasks in one file repeat, and then all images are numbered
from 0. The format has no ids of boxes and classes: both are numbered from 1, classes in the order of the labels in
`meta`. The file is read in chunks, so it may be larger than memory. A DOCTYPE is refused.
"""

import math
import xml.etree.ElementTree as ElementTree
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count

from raydet.common.boxes import enclosing_xywh
from raydet.common.errors import UserError, one_line
from raydet.common.untrusted.xml import NoDoctype, XmlError
from raydet.config import PrepareCvatConfig
from raydet.images.files import ImageFolder, readable
from raydet.preparation.sources.source import (
    Finding,
    FindingLog,
    NamedBoxes,
    Source,
    SourceImage,
    are_image_ids,
    finite_numbers,
    image_id_of,
    size_hw_of,
)
from raydet.tables import storage
from raydet.tables.coco_json import errors_in_one_line, plain_path
from raydet.tables.schema import Category
from raydet.tables.spill import Spilled

CROWD_ATTRIBUTES = ("is_crowd", "iscrowd")
MAX_BOXES = 100_000
"""Boxes of an image held in memory; a file with more is refused."""
MAX_SILENT_BYTES = 16 * 2**20
"""Bytes without the start or end of an element, such as one endless attribute; a file with more is refused."""

_EXPECTED = "an XML file in the format CVAT for images 1.1"
_CHUNK_BYTES = 2**20
_MAX_DEPTH = 32
_MAX_NAMES = 1_000
_MAX_TEXT_CHARS = 10_000
_OTHER_SHAPES = frozenset(["polygon", "polyline", "points", "ellipse", "cuboid", "mask", "skeleton", "tag"])
_NO_BOX = "boxes without a label or four numbers, dropped"
_ROTATED_BOX = "rotated boxes, replaced by the upright box around them"


@dataclass(kw_only=True)
class _CvatImage(NamedBoxes):
    """One `<image>`."""

    image_id: int | None
    path: str
    size_hw: tuple[int, int] | None


def read_cvat(config: PrepareCvatConfig, folder: ImageFolder) -> Source:
    """Read an XML file of CVAT; its `<image>` elements become records in file order.

    Raises:
        UserError: The file is missing, is not CVAT's XML for images, or names no image or no class.
    """
    where = storage.absolute_uri(config.annotations)
    labels: dict[str, None] = {}
    images = Spilled(_CvatImage, _read_images(config.annotations, labels))
    if not len(images):
        raise UserError(f"{where} has no images; expected {_EXPECTED}")
    findings, ids, used = FindingLog(), array("q"), set[str]()
    for image in images:
        ids.append(-1 if image.image_id is None else image.image_id)
        used.update(image.names)
    for name in sorted(used - labels.keys()):
        findings.note(Finding("classes that the labels of the file do not list, added", detail=readable(name)))
        labels[name] = None
    if not labels:
        raise UserError(f"{where} has no classes; for images without labels, use `raydet prepare images`")
    keeps_ids = are_image_ids(ids)
    if not keeps_ids:
        findings.note(Finding("image ids that are missing or repeated, so all are renumbered"))
    index_of = {name: index for index, name in enumerate(labels)}
    for rank, image in enumerate(images):
        image.add_findings(findings, index_of, readable(image.path), ids[rank] if keeps_ids else rank)

    def records() -> Iterator[SourceImage]:
        box_ids = count(1)
        for rank, image in enumerate(images):
            yield SourceImage(
                image_id=ids[rank] if keeps_ids else rank,
                path=readable(image.path),
                objects=image.objects(index_of, box_ids),
                size_hw=image.size_hw,
                refusal=folder.refuse_outside(image.path),
            )

    categories = tuple(Category(index + 1, readable(name)) for name, index in index_of.items())
    return Source(records, len(images), categories, findings=findings)


def _read_images(uri: str, labels: dict[str, None]) -> Iterator[_CvatImage]:
    """Yield the images of a file, and add its labels to `labels`."""
    where = storage.absolute_uri(uri)
    target = _CvatTarget(labels)
    parser = ElementTree.XMLParser(target=target)
    with errors_in_one_line(uri, _EXPECTED), storage.open_stream(uri) as stream:
        try:
            while data := stream.read(_CHUNK_BYTES):
                target.silent_bytes += len(data)
                parser.feed(data)
                if target.silent_bytes > MAX_SILENT_BYTES:
                    raise XmlError("broken XML: an endless attribute, text or comment")
                yield from target.take()
            parser.close()
            yield from target.take()
        except (ElementTree.ParseError, ValueError, LookupError) as error:
            raise UserError(f"{where} is not XML: {one_line(error)}; expected {_EXPECTED}") from None
        except XmlError as error:
            raise UserError(f"{where}: {error}; expected {_EXPECTED}") from None


class _CvatTarget(NoDoctype):
    """Parser target that collects images, and keeps nothing else in memory.

    Attributes:
        silent_bytes: Bytes read since the last start or end of an element; the reader adds to it.
    """

    def __init__(self, labels: dict[str, None]) -> None:
        self.silent_bytes = 0
        self._labels = labels
        self._images: list[_CvatImage] = []
        self._num_images = 0
        self._path: list[str] = []
        self._names: set[str] = set()
        self._has_box = False
        self._attribute = ""
        self._text: str | None = None

    def take(self) -> list[_CvatImage]:
        """Return the images completed since the last call."""
        is_open = len(self._path) > 1 and self._path[1] == "image"
        done = self._images[: len(self._images) - is_open]
        del self._images[: len(done)]
        return done

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        self.silent_bytes = 0
        self._names |= {tag, *attributes}
        if len(self._path) >= _MAX_DEPTH or len(self._names) > _MAX_NAMES:
            raise XmlError(
                f"broken XML: elements more than {_MAX_DEPTH} deep, or more than {_MAX_NAMES:,} different names"
            )
        parent = tuple(self._path)
        self._path.append(tag)
        if not parent and tag != "annotations":
            raise XmlError(f"its root is <{readable(tag)[:40]}>, not <annotations>")
        if parent == ("annotations",) and tag == "track":
            raise XmlError("it has tracks, in the format CVAT for video")
        if parent == ("annotations",) and tag == "image":
            self._images.append(self._start_image(attributes))
            self._num_images += 1
        elif parent == ("annotations", "image"):
            self._has_box = tag == "box" and self._add_box(self._images[-1], attributes)
            if tag in _OTHER_SHAPES:
                self._images[-1].note(f"shapes other than boxes, dropped: {tag}")
        elif parent == ("annotations", "image", "box") and tag == "attribute":
            self._attribute, self._text = attributes.get("name", ""), ""
        elif parent[1:2] == ("meta",) and parent[-1] == "label" and tag == "name":
            self._text = ""

    def data(self, text: str) -> None:
        if self._text is not None and len(self._text) < _MAX_TEXT_CHARS:
            self._text += text[:_MAX_TEXT_CHARS]

    def end(self, tag: str) -> None:
        self.silent_bytes = 0
        self._path.pop()
        if self._text is not None and tag == "name" and self._text.strip():
            self._labels.setdefault(readable(self._text.strip()))
        if self._text is not None and tag == "attribute" and self._has_box and self._attribute in CROWD_ATTRIBUTES:
            self._images[-1].iscrowd[-1] = self._text.strip().lower() in ("true", "1")
        self._text = None

    def close(self) -> None:
        """Do nothing; the images have been taken."""

    def _start_image(self, attributes: Mapping[str, str]) -> _CvatImage:
        path = plain_path(attributes.get("name", ""))
        if not path:
            raise XmlError(f"image {self._num_images + 1} has no name")
        size_hw = size_hw_of(attributes.get("height"), attributes.get("width"))
        return _CvatImage(image_id=image_id_of(attributes.get("id")), path=path, size_hw=size_hw)

    def _add_box(self, image: _CvatImage, attributes: Mapping[str, str]) -> bool:
        """Add a box to an image, unless it is unusable."""
        if len(image.names) >= MAX_BOXES:
            raise XmlError(f"image {self._num_images} has more than {MAX_BOXES:,} boxes")
        name = readable(attributes.get("label", "").strip())
        sides = [attributes.get(key) for key in ("xtl", "ytl", "xbr", "ybr")]
        numbers = finite_numbers([*sides, attributes.get("rotation", "0")])
        if not name or numbers is None or not math.isfinite(sum(numbers)):
            image.note(_NO_BOX)
            return False
        left, top, right, bottom, degrees = numbers
        box_xywh = (left, top, right - left, bottom - top)
        image.note(_ROTATED_BOX, bool(degrees % 360))
        enclosing = enclosing_xywh(box_xywh, degrees, ((left + right) / 2, (top + bottom) / 2))
        image.add(name, enclosing, area=box_xywh[2] * box_xywh[3])
        return True
