"""One image of a source → its row in the images table, or the reason for its rejection.

Threads and Ray tasks do this work: read the file, check that it can be decoded, hash it, and fit the boxes.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from raydet.common.errors import RunError
from raydet.config import PrepareShapesConfig
from raydet.images.decode import DecodeError, TruncatedError, check, orientation, repair, upright_size_hw
from raydet.images.files import ReadError
from raydet.preparation.sources import shapes
from raydet.preparation.sources.fitting import fit_objects
from raydet.preparation.sources.source import Finding, SourceImage, SourceObjects

HASH_BYTES = 16

SIZE_MISMATCH = "images whose size differs from the annotations"
ROTATED = "images whose boxes were rotated with them"
WITHOUT_BOXES = "images without boxes"
KEPT_IN_PART = "truncated images whose readable part was kept"


@dataclass(frozen=True)
class Row:
    """A finished row of the images table.

    Attributes:
        values: Values by column name.
        content_hash: The first `HASH_BYTES` of the SHA-256 of the image's bytes.
        findings: Anomalies of the image and its boxes.
    """

    values: dict[str, Any]
    content_hash: bytes
    findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True)
class Rejected:
    """A row of the table of rejected images, and the number of boxes lost with it."""

    path: str
    image_id: int
    reason: str
    num_boxes: int = 0


Examine = Callable[[SourceImage], Row | Rejected]
"""The work per image; picklable, to run in a Ray task."""


class ImageReader(Protocol):
    """The place of a source's images: a folder, a list, or rows of a data set."""

    def read(self, path: str, /) -> bytes:
        """Read one image; raise ReadError if it cannot be read."""

    def uri_of(self, path: str, /) -> str:
        """Return the absolute path or URI of one image; raise ReadError if there is none."""


def hash_content(data: bytes) -> bytes:
    """Hash an image's bytes; files with the same hash count as identical."""
    return hashlib.sha256(data).digest()[:HASH_BYTES]


def read_row(
    image: SourceImage,
    *,
    reader: ImageReader,
    inline: bool,
    max_pixels: int,
    drop_duplicate_boxes: bool,
    keep_truncated: bool,
) -> Row | Rejected:
    """Read one image. An image that was examined before is not decoded again, but its content must be unchanged.

    Raises:
        RunError: The image has changed since it was examined.
        OSError: The storage failed, for reasons that do not concern this image.
    """
    objects = image.objects or SourceObjects()
    if image.refusal is not None:
        return Rejected(image.path, image.image_id, image.refusal, len(objects.ids))
    place = image.locator or image.path
    try:
        data = reader.read(place)
        content_hash = hash_content(data)
        if image.content_hash is not None:
            _refuse_changed(image, content_hash)
        is_known = image.content_hash is not None
        whole, size_hw = _whole(data, max_pixels=max_pixels, keep_truncated=keep_truncated, is_known=is_known)
        is_mismatch = image.size_hw not in (None, size_hw)
        turn = orientation(data) if is_mismatch and image.size_hw == size_hw[::-1] else 1
        stored = {"bytes": whole, "path": image.path} if inline else {"bytes": None, "path": reader.uri_of(place)}
    except (ReadError, DecodeError) as error:
        if image.content_hash is not None:
            _refuse_changed(image, b"")
        return Rejected(image.path, image.image_id, str(error), len(objects.ids))
    fitted = fit_objects(objects, size_hw, turn=turn, drop_duplicates=drop_duplicate_boxes)
    height, width = size_hw
    values = {
        "image_id": image.image_id,
        "image": stored,
        "width": width,
        "height": height,
        "objects": fitted.objects,
        **image.extra,
    }
    findings = [
        Finding(kind, image.path, image.image_id, annotation_id, detail=detail)
        for kind, boxes in fitted.findings.items()
        for annotation_id, detail in boxes
    ]
    if is_mismatch and image.size_hw is not None:
        detail = "annotations: {} × {}, file: {} × {}".format(*image.size_hw[::-1], *size_hw[::-1])
        findings.append(Finding(ROTATED if turn >= 5 else SIZE_MISMATCH, image.path, image.image_id, detail=detail))
    if image.objects is not None and not fitted.objects["id"]:
        detail = f"none of {len(objects.ids)} could be kept" if objects.ids else "the source has none"
        findings.append(Finding(WITHOUT_BOXES, image.path, image.image_id, detail=detail))
    if whole is not data:
        findings.append(Finding(KEPT_IN_PART, image.path, image.image_id, detail=f"{len(data):,} bytes were there"))
    return Row(values, content_hash, findings)


def _whole(data: bytes, *, max_pixels: int, keep_truncated: bool, is_known: bool) -> tuple[bytes, tuple[int, int]]:
    """Return the bytes to store and the size of the image; an image known to be complete is not decoded again."""
    if is_known and not keep_truncated:
        return data, upright_size_hw(data)
    try:
        return data, check(data, max_pixels=max_pixels)
    except TruncatedError:
        if not keep_truncated:
            raise
        repaired = repair(data, max_pixels=max_pixels)
        return repaired, upright_size_hw(repaired)


def _refuse_changed(image: SourceImage, content_hash: bytes) -> None:
    if image.content_hash != content_hash:
        raise RunError(f"{image.path} changed while it was being prepared; run the same command again")


def draw_row(image: SourceImage, *, split: shapes.Split, config: PrepareShapesConfig) -> Row:
    """Draw one generated image."""
    drawn = shapes.draw(config.seed, split, image.image_id, image_size=config.image_size, max_shapes=config.max_shapes)
    fitted = fit_objects(drawn.objects, (config.image_size, config.image_size))
    data = shapes.encode(drawn.pixels)
    values = {
        "image_id": image.image_id,
        "image": {"bytes": data, "path": image.path},
        "width": config.image_size,
        "height": config.image_size,
        "objects": fitted.objects,
    }
    return Row(values, hash_content(data))
